"""Backbones like for like: the same head, schedule, patches and spots, and every stage trainable
for each of them.

Question   Is EfficientNet-B0 better than other backbones, or was it only tuned where they were
           frozen?
Reads      <DATA_ROOT>/dataset/ (script 19)
Writes     <OUT>/rows.csv, a folder a row (as script 20), paired_differences.csv,
           r_against_parameters.png
Prints     header, the table with parameters, speed and memory
Command    python 21_train_backbones.py --data-root GSE240429_data
Override   python 21_train_backbones.py --data-root HER2ST_data --test-slide 4 --only resnet18
           python 21_train_backbones.py --quick      (a smoke test, not a result)
Time       --quick: 80 s, slides included (two Intel Xeon cores, 2026-11-23)
Source     the paper's comparison, which left ResNet frozen; the row "resnet50 frozen" shows what
           that was worth
"""

from study import shell

if __name__ == "__main__":  # Check the command before the slow imports.
    shell.check_command(__file__, dataset=True, files=("GENE_SETS",))


import torch
from matplotlib.figure import Figure

import common
from study import backbones, drawing, methods, printing, recipes, recording, runs, shell
from study.errors import InputError

# ---------------------------------------------------------------------------------------- constants
DATA_ROOT = "GSE240429_data"  # folder with slides.csv and dataset/
OUT = ""  # folder of the results; empty = runs/<this script>/<data root's name>

TARGET = "harmony"  # harmony (the paper's), lognorm or, of protocol hest, log1p
PROTOCOL = "paper"  # paper, loso (each slide tests once), block (spatial folds) or hest
TRAIN_SLIDES = ()  # tissue_index values; empty = every slide but the test slide
TEST_SLIDE = 3  # tissue_index; GSE240429's C73_C1
VALID_FRACTION = 0.2  # of the training slides' spots
SEEDS = (42,)  # one training each
GENE_SETS = ""  # a .gmt, or a CSV group,gene: sets that are scored beside HEG, HVG and MG
RECIPE = "paper"  # paper, published or best: see study/recipes.py; flags and edited constants win

PRETRAINED = True  # ImageNet weights: true (timm's hub), false (random), a file or a folder
HIDDEN = 3000  # units of the head's hidden layer; 0 = a linear head
HEAD_START = "mean"  # the last layer: random, mean (0, bias at the training means) or ridge

AUG = "mpa"  # mpa (the paper's) or another name of common.AUGMENTATIONS
IMAGE_SIZE = 224  # px of the network's input; patches are 224 px of the slide
EPOCHS = 30
BATCH_SIZE = 32  # a last batch of one spot is left out, since BatchNorm needs two
LEARNING_RATE = 3e-4  # Adam; cosine to zero over the epochs, or constant if published
LOSS = "mse"  # a name of common.LOSSES
TTA = False  # average predictions over the 8 symmetries

DEVICE = "auto"  # auto, cpu or cuda
PRECISION = "auto"  # auto, bf16, fp16 or fp32
ONLY = ""  # one setting of the table; empty = all
QUICK = False  # the small budget below, on simulated slides
# --------------------------------------------------------------------------------------------------

# Any timm name, or hf-hub:owner/name such as a pathology foundation model's.
BACKBONES = (
    "efficientnet_b0",
    "tf_efficientnet_lite0",
    "tf_efficientnet_b7.ra_in1k",
    "resnet18",
    "resnet50",
    "densenet121",
    "mobilenetv2_100",
)
FROZEN = ("resnet50",)  # trained once more with no stage trainable, as published

QUICK_BUDGET = recipes.QUICK | {
    "BACKBONES": ("efficientnet_b0", "mobilenetv2_100", "resnet18"),
    "FROZEN": ("resnet18",),
}


def check_backbone(recipe):
    """InputError now for a backbone that could not be trained later, hours from now."""
    name = recipe["BACKBONE"]
    backbones.find_pretrained(recipe["PRETRAINED"], name)
    needs = build_on_meta(recipe, 1).backbone.pretrained_cfg
    has_weights = any(needs.get(source) for source in ("url", "hf_hub_id", "file"))
    if recipe["PRETRAINED"] is True and not has_weights:
        raise InputError(
            f"{name} has no pretrained weights: choose a variant with, or leave it out"
        )


def build_on_meta(recipe, n_genes):
    """The network without memory or weights, to be counted."""
    with torch.device("meta"):
        return common.build_model(recipe | {"PRETRAINED": False}, n_genes, 0)


def network(row):
    """A method: the network is built, trained on the patches, and predicts the scored spots."""
    model = methods.start_network(row)
    patches = row.place_patches()
    row.fit(model, patches)
    return row.predict(model, patches)


def describe_costs(lines, resnet):
    """{column: text} of a setting: the backbone's parameters, speed and memory."""
    parameters = lines["parameters_backbone"].mean()
    return {
        "backbone M": f"{parameters / 1e6:.1f}",
        "of ResNet-50": f"{parameters / resnet['backbone']:.2f}",
        "images/s": printing.format_count(lines["images_per_s"]),
        "peak GB": f"{lines['peak_memory_mb'].mean() / 1024:.1f}",
    }


def draw_figure(path, title, lines):
    """The headline's r on the test slides against the backbone's parameters."""
    headline = recording.headline_of_lines(lines)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    ax = figure.subplots()
    for setting, group in lines.groupby("setting", sort=False):
        x = group["parameters_backbone"].iloc[0] / 1e6
        y = group[headline.column].astype(float)
        sd = y.std() if len(group) > 1 else None
        frozen = setting.endswith(" frozen")
        face = "none" if frozen else "C0"  # hollow = frozen
        ax.errorbar(x, y.mean(), sd, fmt="o", color="C0", markerfacecolor=face)
        ax.annotate(setting, (x, y.mean()), (4, 5), textcoords="offset points", size=8)
    ax.set(xscale="log", xlabel="parameters of the backbone, millions")
    ax.set(ylabel=f"mean Pearson r, {headline.name}", title=title)
    ax.margins(x=0.3, y=0.15)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("{x:g}")
    ax.tick_params(which="both", labelsize=8)
    drawing.save_figure(path, figure, "r of every backbone against its number of parameters")


def main():
    settings = {name: {"BACKBONE": name, "TRAINABLE_STAGES": -1} for name in BACKBONES}
    for name in FROZEN:
        settings[f"{name} frozen"] = {"BACKBONE": name, "TRAINABLE_STAGES": 0}
    title = "backbones, all stages trainable unless named frozen"
    run = runs.open_run(globals())
    if run.recipe.get("EPOCHS") == 0:  # Every backbone stays as it is.
        settings = {name: settings[name] for name in BACKBONES}
        title = "ridges on backbones, none of which is trained"
    run.print_header()
    settings = run.chosen(settings)
    for setting in settings.values():
        check_backbone(run.recipe | setting)
    run.train(settings, network)
    resnet = run.rows[0].recipe | {"BACKBONE": "resnet50", "TRAINABLE_STAGES": -1}
    resnet = common.count_parameters(build_on_meta(resnet, len(run.data.genes)))
    lines = run.tested()
    costs = {name: describe_costs(group, resnet) for name, group in lines.groupby("setting")}
    minus = {name: BACKBONES[0] for name in settings if name != BACKBONES[0] and not ONLY}
    leave_out = ("MG", "all", "r>=.30", "q<.05")
    run.print_scores(title, minus=minus, columns=costs, leave_out=leave_out)
    if not ONLY:
        path = run.out / "r_against_parameters.png"
        draw_figure(path, run.title(printing.describe_scored(lines)), lines)
        run.show_figure(path)
    run.finish()


if __name__ == "__main__":
    shell.run_script(globals())
