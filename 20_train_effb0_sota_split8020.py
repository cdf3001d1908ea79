"""The paper's main experiment: EfficientNet-B0 with MPA, spots split 80/20, one test slide.

Question   How well does one H&E patch predict the expression of its spot on a slide that was not
           trained on?
Reads      <DATA_ROOT>/dataset/ (script 19); FEATURES, where it is given
Writes     <OUT>/rows.csv, paired_differences.csv and a folder a row: per-gene r, predictions,
           figures, weights, split, gene groups
Prints     header, one row an epoch, the table of mean Pearson r
Command    python 20_train_effb0_sota_split8020.py --data-root GSE240429_data
Override   python 20_train_effb0_sota_split8020.py --quick      (simulated slides)
           python 20_train_effb0_sota_split8020.py --data-root HER2ST_data --test-slide 4
           python 20_train_effb0_sota_split8020.py --data-root IDC --protocol hest --target log1p
           python 20_train_effb0_sota_split8020.py --features embeddings      (a folder a model)
Time       --quick: 74 s, slides included (two idle cores of an AMD EPYC, 2026-11-27)
Source     "From histology to spatial transcriptomics: establishing a lightweight single-patch
           baseline", BMC Bioinformatics, 2026
"""

from study import shell

if __name__ == "__main__":  # Check the command before the slow imports.
    shell.check_command(__file__, dataset=True, files=("FEATURES", "GENE_SETS"))


from dataclasses import replace
from datetime import timedelta

import torch.distributed

import common
from study import embeddings, methods, printing, probes, ranks, recipes, runs, shell
from study.errors import InputError

# ---------------------------------------------------------------------------------------- constants
DATA_ROOT = "GSE240429_data"  # folder with slides.csv and dataset/
OUT = ""  # folder of the results; empty = runs/<this script>/<data root's name>

TARGET = "harmony"  # harmony (the paper's), lognorm or, of protocol hest, log1p
COMPARE_TARGETS = False  # true = train on the other target, lognorm, as well
PROTOCOL = "paper"  # paper, loso (each slide tests once), block (spatial folds) or hest
TRAIN_SLIDES = ()  # tissue_index values; empty = every slide but the test slide
TEST_SLIDE = 3  # tissue_index; GSE240429's C73_C1
VALID_FRACTION = 0.2  # of the training slides' spots
SEEDS = (42,)  # one training each
GENE_SETS = ""  # a .gmt, or a CSV group,gene: sets that are scored beside HEG, HVG and MG
RECIPE = "paper"  # paper, published or best: see study/recipes.py; flags and edited constants win

BACKBONE = "efficientnet_b0"  # any timm name
PRETRAINED = True  # ImageNet weights: true (timm's hub), false (random), a file or a folder
HIDDEN = 3000  # units of the head's hidden layer; 0 = a linear head
TRAINABLE_STAGES = -1  # of the backbone's last ones; -1 = all, 0 = frozen; EfficientNet-B0 has 9
HEAD_START = "mean"  # the last layer: random, mean (0, bias at the training means) or ridge
POOL_STAGES = False  # true = the head sees sd and mean of every stage, not the last's mean alone
STOCHASTIC_DEPTH = 0.0  # chance to leave out a block of a step, rising to this; in B0 to 7/8 of it
CHANNELS = "rgb"  # bgr = blue is taken for red, as in the published scripts
FEATURES = ""  # a folder of others' embeddings, an .h5 a slide, or of such folders; empty = none

AUG = "mpa"  # mpa (the paper's) or another name of common.AUGMENTATIONS
WARP_BORDER = "reflect"  # what a warp shows beyond the patch: reflect or black
WARP_ASPECT = "fixed"  # free = a warp scales across and down apart
IMAGE_SIZE = 224  # px of the network's input; patches are 224 px of the slide
EPOCHS = 30  # 0 = none: a ridge start is what is kept
BATCH_SIZE = 32  # a last batch of one spot is left out, since BatchNorm needs two
LEARNING_RATE = 3e-4  # Adam
SCHEDULE = "cosine"  # of the rates over the epochs: cosine (to zero) or constant
LOSS = "mse"  # a name of common.LOSSES
BEST_EPOCH = "mse"  # by validation: lowest mse, or highest r of heg
REFIT = False  # true = then refit on training + validation spots, up to that epoch
TTA = False  # average predictions over the 8 symmetries
NEIGHBOURHOOD = False  # true, without epochs = half of what is seen of a spot are those around it

DEVICE = "auto"  # auto, cpu or cuda
PRECISION = "auto"  # auto, bf16, fp16 or fp32
QUICK = False  # the small budget below, on simulated slides
# --------------------------------------------------------------------------------------------------

QUICK_BUDGET = recipes.QUICK | {"IMAGE_SIZE": 96, "EPOCHS": 12}


def efficientnet(row):
    """A method: the network is built, trained on the patches, and predicts the scored spots."""
    if not row.recipe["EPOCHS"]:
        return methods.network_of_no_epoch(row)
    model = methods.start_network(row)
    patches = row.place_patches()
    row.fit(model, patches)
    return row.predict(model, patches)


def join_ranks(recipe):
    """Have torchrun's processes, if there are several, train one network together."""
    if ranks.RANKS == 1:
        return
    device = common.find_device(recipe)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    # The first process scores and draws while the others wait.
    torch.distributed.init_process_group(backend, timeout=timedelta(hours=2))


def fill_rows(run, split, recipe, suffix="", models=()):
    """Fill the rows of the network and of ridges, whose names end in the suffix; `models` are of
    others' embeddings.
    """
    network = methods.name_network(BACKBONE)
    # Whose embeddings stand beside it changes nothing of the network.
    without = {name: value for name, value in recipe.items() if name != "FEATURES"}
    if ranks.RANKS > 1:  # Each process draws dropouts of its own, and has its share of a batch.
        without["RANKS"] = ranks.RANKS
    run.fill(run.row(network + suffix, split, without), efficientnet)
    baseline = run.baseline | {"TARGET": recipe["TARGET"]}
    run.fill(run.row("ridge (colour)" + suffix, split, baseline), methods.ridge_on_colour)
    for setting, (constants, method) in embeddings.settings_of(models, baseline).items():
        sees_the_same = constants["NEIGHBOURHOOD"] == NEIGHBOURHOOD  # not the probes under hest
        name = setting + suffix if sees_the_same else setting
        run.fill(run.row(name, split, constants), method)
    if PRETRAINED is False:  # Features of a random network are no baseline.
        return
    for name in ("PRETRAINED", "BACKBONE", "IMAGE_SIZE", "POOL_STAGES"):
        baseline[name] = recipe[name]
    stages = ", all stages" if POOL_STAGES else ""
    ridge = f"ridge ({BACKBONE}{stages}){suffix}"
    if EPOCHS:  # Without any, the network is this ridge.
        run.fill(run.row(ridge, split, baseline), methods.ridge_on_features)
    if PROTOCOL == "hest":
        plain = baseline | {"POOL_STAGES": False}
        for probe, changed in probes.name_probes(BACKBONE).items():
            run.fill(run.row(probe, split, plain | changed), probes.hest_probe)


def main():
    if COMPARE_TARGETS and TARGET != "harmony":
        raise InputError("--compare-targets sets lognorm beside --target harmony")
    run = runs.open_run(globals())
    models = []
    if FEATURES:
        models = embeddings.open_models(FEATURES, run.data, run.splits, (BACKBONE,))
    join_ranks(run.recipe)
    run.print_header()
    seen = ", neighbourhood" if NEIGHBOURHOOD else ""
    network = methods.name_network(BACKBONE) + seen
    minus = {network: "ridge (colour)" + seen}
    for split in run.splits:
        fill_rows(run, split, run.recipe, seen, models)
    for split in run.splits if COMPARE_TARGETS else ():
        other = replace(split, data=replace(split.data, target=split.data.lognorm))
        fill_rows(run, other, run.recipe | {"TARGET": "lognorm"}, f"{seen}, lognorm target", models)
        minus[f"{network}, lognorm target"] = network
    run.print_scores("mean Pearson r", minus=minus)
    run.finish(printing.print_published(run.data.root))


if __name__ == "__main__":
    shell.run_script(globals())
