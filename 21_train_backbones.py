"""Backbones like for like: the same head, schedule, patches and spots, and every stage trainable for each of them.

Question   Is EfficientNet-B0 better than other backbones, or was it only tuned where they were frozen?
Reads      <DATA_ROOT>/dataset/ (script 19)
Writes     <OUT>/rows.csv, a folder a row (as script 20), r_against_parameters.png
Prints     header, one line a finished training, the table with parameters, speed and memory, one JSON line
Command    python 21_train_backbones.py --data-root GSE240429_data
Override   python 21_train_backbones.py --data-root HER2ST_data --test-slide 4 --pretrained false --only resnet18
           python 21_train_backbones.py --quick      (three small backbones on simulated slides: no evidence)
Time       --quick: 80 s, slides included; HER2ST, README's small budget: 23 min (two Intel Xeon cores, 2026-11-23)
Source     the paper's comparison, which left ResNet frozen; the row "resnet50 frozen" shows what that was worth
"""

import functools

import pandas as pd
import torch
from matplotlib.figure import Figure

import common

# ---------------------------------------------------------------------------------------------- constants
DATA_ROOT = "GSE240429_data"  # folder with slides.csv and dataset/
OUT = ""  # folder of the results; empty = runs/<this script>/<data root's name>

TARGET = "harmony"  # harmony (the paper's) or lognorm
PROTOCOL = "paper"  # paper, loso (each slide is once the test slide) or block (folds of spatial blocks)
TRAIN_SLIDES = ()  # tissue_index values; empty = every slide but the test slide
TEST_SLIDE = 3  # tissue_index; GSE240429's C73_C1
VALID_FRACTION = 0.2  # of the training slides' spots
SEEDS = (42,)  # one training each

PRETRAINED = True  # ImageNet weights; false = random weights
HIDDEN = 3000  # units of the head's hidden layer; 0 = a linear head
START_AT_MEAN = False  # true = output bias starts at each gene's training mean

AUG = "mpa"  # mpa (the paper's), stnet (8 symmetries) or none
IMAGE_SIZE = 224  # px of the network's input; patches are 224 px of the slide
EPOCHS = 30
BATCH_SIZE = 32  # a last batch of one spot is left out, since BatchNorm needs two
LEARNING_RATE = 3e-4  # Adam; cosine to zero over the epochs
TTA = False  # average predictions over the 8 symmetries

DEVICE = "auto"  # auto, cpu or cuda
PRECISION = "auto"  # auto, bf16, fp16 or fp32
ONLY = ""  # one setting of the table; empty = all
QUICK = False  # the small budget below, on simulated slides
# --------------------------------------------------------------------------------------------------------

# Any timm name, or hf-hub:owner/name such as a pathology foundation model's; transformers need IMAGE_SIZE 224.
BACKBONES = ("efficientnet_b0", "tf_efficientnet_b7.ra_in1k", "resnet18", "resnet50", "densenet121", "mobilenetv2_100")
FROZEN = ("resnet50",)  # trained once more with no stage trainable, as published

QUICK_BUDGET = {
    "DATA_ROOT": "SIMULATED_data",
    "TARGET": "lognorm",
    "PRETRAINED": False,
    "HIDDEN": 512,
    "START_AT_MEAN": True,
    "IMAGE_SIZE": 64,
    "EPOCHS": 3,
    "LEARNING_RATE": 1e-3,
    "BACKBONES": ("efficientnet_b0", "mobilenetv2_100", "resnet18"),
    "FROZEN": ("resnet18",),
}


def count_on_meta(recipe, setting, n_genes):
    """Parameters of a setting, without memory or weights. InputError now for what could not be trained later."""
    with torch.device("meta"):
        model = common.build_model(recipe | setting | {"PRETRAINED": False}, n_genes, 0)
    needs = model.backbone.pretrained_cfg
    if recipe["PRETRAINED"] and not any(needs.get(source) for source in ("url", "hf_hub_id", "file")):
        raise common.InputError(
            f"{setting['BACKBONE']} has no pretrained weights: choose a variant with, or leave it out"
        )
    if needs.get("fixed_input_size") and needs["input_size"][1] != recipe["IMAGE_SIZE"]:
        raise common.InputError(f"{setting['BACKBONE']} takes --image-size {needs['input_size'][1]} alone")
    return common.count_parameters(model)


def add_costs(resnet, table, parts):
    """`add` of common.report_scores: parameters in millions (x = of ResNet-50 with the same head), speed, memory."""
    costs = pd.DataFrame([part.mean(numeric_only=True) for part in parts])
    for part in ("backbone", "trainable", "total"):
        millions = costs[f"parameters_{part}"] / 1e6
        share = "" if part == "trainable" else (costs[f"parameters_{part}"] / resnet[part]).map(" ({:.2f}x)".format)
        table[f"{part} M"] = millions.map("{:.1f}".format) + share
    table["images/s"] = costs["images_per_s"].map("{:.0f}".format)
    table["peak GB"] = (costs["peak_memory_mb"] / 1024).map("{:.1f}".format)


def draw_figure(path, title, rows):
    """HEG r on the test slide, log-normalised truth, against the backbone's parameters; hollow = frozen."""
    table = pd.DataFrame(rows).query("split == 'test' and truth == 'lognorm'").groupby("setting", sort=False)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    ax = figure.subplots()
    for setting, of in table:
        x, y = of["parameters_backbone"].iloc[0] / 1e6, of["heg"].astype(float)
        face = "none" if setting.endswith(" frozen") else "C0"
        ax.errorbar(x, y.mean(), y.std() if len(of) > 1 else None, fmt="o", color="C0", markerfacecolor=face)
        ax.annotate(setting, (x, y.mean()), (4, 5), textcoords="offset points", size=8)
    ax.set(xscale="log", xlabel="parameters of the backbone, millions", ylabel="mean Pearson r, HEG", title=title)
    ax.margins(x=0.3, y=0.15)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("{x:g}")
    ax.tick_params(which="both", labelsize=8)
    common.save_figure(path, figure, "r of every backbone against its number of parameters")


def main():
    settings = {name: {"BACKBONE": name, "TRAINABLE_STAGES": -1} for name in BACKBONES}
    settings |= {f"{name} frozen": {"BACKBONE": name, "TRAINABLE_STAGES": 0} for name in FROZEN}
    recipe, experiments = common.open_run(globals())
    common.print_header(globals(), recipe, experiments)
    data, out = experiments[0].data, experiments[0].out
    for setting in [settings[name] for name in settings if ONLY in ("", name)]:
        count_on_meta(recipe, setting, len(data.genes))
    rows = common.run_grid(globals(), settings, experiments)
    resnet = count_on_meta(recipe, {"BACKBONE": "resnet50", "TRAINABLE_STAGES": -1}, len(data.genes))
    note = "quick budget, no evidence: " * QUICK
    title = f"{note}backbones, all stages trainable unless named frozen"
    against = {name: BACKBONES[0] for name in settings if name != BACKBONES[0] and not ONLY}
    common.report_scores(title, experiments, rows, against, functools.partial(add_costs, resnet))
    if not ONLY:
        draw_figure(out / "r_against_parameters.png", f"{data.title}{note}test slide {TEST_SLIDE}", rows)
        print(f"figure: {out / 'r_against_parameters.png'}")
    common.finish_run(globals(), experiments[0], rows)


if __name__ == "__main__":
    common.run_script(globals())
