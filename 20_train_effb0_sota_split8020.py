"""The paper's main experiment: EfficientNet-B0 with MPA, spots split 80/20, one test slide.

Question   How well does one H&E patch predict the expression of its spot on a slide that was not trained on?
Reads      <DATA_ROOT>/dataset/ (script 19)
Writes     <OUT>/rows.csv and a folder a row: per-gene r, predictions, figures, weights, split, gene groups
Prints     header, one row an epoch, the table of mean Pearson r, one JSON line
Command    python 20_train_effb0_sota_split8020.py --data-root GSE240429_data
Override   python 20_train_effb0_sota_split8020.py --quick      (four simulated slides, made where missing)
           python 20_train_effb0_sota_split8020.py --data-root HER2ST_data --test-slide 4 --pretrained false
Time       --quick: 90 s, slides included; HER2ST: 22 min (two cores of an AMD EPYC, 2026-11-24)
Source     "From histology to spatial transcriptomics: establishing a lightweight single-patch baseline",
           BMC Bioinformatics, 2026
"""

import functools
from dataclasses import replace
from datetime import timedelta

import pandas as pd
import torch.distributed

import common

# ---------------------------------------------------------------------------------------------- constants
DATA_ROOT = "GSE240429_data"  # folder with slides.csv and dataset/
OUT = ""  # folder of the results; empty = runs/<this script>/<data root's name>

TARGET = "harmony"  # harmony (the paper's) or lognorm
COMPARE_TARGETS = False  # true = train on the other target, lognorm, as well: both in one table, on the same truth
PROTOCOL = "paper"  # paper, loso (each slide is once the test slide) or block (folds of spatial blocks)
TRAIN_SLIDES = ()  # tissue_index values; empty = every slide but the test slide
TEST_SLIDE = 3  # tissue_index; GSE240429's C73_C1
VALID_FRACTION = 0.2  # of the training slides' spots
SEEDS = (42,)  # one training each

BACKBONE = "efficientnet_b0"  # any timm name
PRETRAINED = True  # ImageNet weights; false = random weights
HIDDEN = 3000  # units of the head's hidden layer; 0 = a linear head
TRAINABLE_STAGES = -1  # of the backbone's last ones; -1 = all, 0 = frozen; EfficientNet-B0 has 9
START_AT_MEAN = False  # true = output bias starts at each gene's training mean: a great help from random weights

AUG = "mpa"  # mpa (the paper's), stnet (8 symmetries) or none
IMAGE_SIZE = 224  # px of the network's input; patches are 224 px of the slide
EPOCHS = 30
BATCH_SIZE = 32  # a last batch of one spot is left out, since BatchNorm needs two
LEARNING_RATE = 3e-4  # Adam; cosine to zero over the epochs
TTA = False  # average predictions over the 8 symmetries

DEVICE = "auto"  # auto, cpu or cuda
PRECISION = "auto"  # auto, bf16, fp16 or fp32
QUICK = False  # the small budget below, on simulated slides
# --------------------------------------------------------------------------------------------------------

QUICK_BUDGET = {
    "DATA_ROOT": "SIMULATED_data",
    "TARGET": "lognorm",
    "PRETRAINED": False,
    "HIDDEN": 512,
    "START_AT_MEAN": True,
    "IMAGE_SIZE": 96,
    "EPOCHS": 12,
    "LEARNING_RATE": 1e-3,
}


def print_epoch(experiment, line, predicted, best_epoch):
    """One line an epoch, with the mean r of HEG over the validation spots."""
    data, rows = experiment.data, experiment.rows("valid")
    slides = data.spots["tissue_index"].to_numpy()[rows]
    r = common.average_slides(common.pearson_per_gene, predicted, data.target[rows], slides)
    line["valid_heg"] = pd.Series(r, data.genes)[experiment.members["heg"]].mean()
    if line["epoch"] == 1:
        print("epoch   learning rate   train MSE   valid MSE   valid HEG r   images/s   seconds   (* best so far)")
    form = "{epoch:4}{} {learning_rate:15.2e} {train_mse:11.5f} {valid_mse:11.5f} {valid_heg:13.3f}"
    form += " {images_per_s:10.1f} {seconds:9.1f}"
    print(form.format("* "[line["epoch"] != best_epoch], **line), flush=True)


def join_ranks(recipe):
    """Have torchrun's processes, if there are several, train one network together."""
    if common.RANKS > 1:
        device, _, _ = common.choose_device(recipe)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=timedelta(hours=2))  # the first process scores and draws


def main():
    recipe, experiments = common.open_run(globals())
    join_ranks(recipe)
    common.print_header(globals(), recipe, experiments)
    data, rows = experiments[0].data, []
    trainings = [("", recipe, experiment) for experiment in experiments]
    if COMPARE_TARGETS:
        common.require(TARGET == "harmony", "--compare-targets sets lognorm beside --target harmony")
        for experiment in experiments:
            other = replace(experiment, data=replace(experiment.data, target=experiment.data.lognorm))
            trainings.append((", lognorm target", recipe | {"TARGET": "lognorm"}, other))
    for suffix, changed, experiment in trainings:
        train = functools.partial(common.train_network, report=functools.partial(print_epoch, experiment))
        for setting, compute in (("EfficientNet-B0", train), ("ridge (colour)", common.ridge_on_colour)):
            rows += common.run_setting(setting + suffix, changed, experiment, compute)
    against = {"EfficientNet-B0": "ridge (colour)", "EfficientNet-B0, lognorm target": "EfficientNet-B0"}
    against = against if COMPARE_TARGETS else {"EfficientNet-B0": "ridge (colour)"}
    common.report_scores("mean Pearson r per gene group", experiments, rows, against)
    if (data.root / "published_results.csv").is_file():
        published = pd.read_csv(data.root / "published_results.csv")
        common.print_table("published, not computed here, other protocols", data, published.fillna("-"))
    for folder in dict.fromkeys(row["folder"] for row in rows):
        print(f"per-gene r, predictions, maps: {experiments[0].out / folder}")
    common.finish_run(globals(), experiments[0], rows)


if __name__ == "__main__":
    common.run_script(globals())
