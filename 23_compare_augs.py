"""Augmentations compared over several seeds, with and without averaging over the 8 symmetries at test time.

Question   Does morphology-preserving augmentation (MPA) help, and by more than another seed does?
Reads      <DATA_ROOT>/dataset/ (script 19)
Writes     <OUT>/rows.csv, a folder a row (as script 20), paired_differences.csv, paired_differences.png
Prints     header, the table of mean r and sd over the seeds, the table of differences to MPA, one JSON line
Command    python 23_compare_augs.py --data-root GSE240429_data
Override   python 23_compare_augs.py --data-root HER2ST_data --test-slide 4 --pretrained false --seeds 42,43
           python 23_compare_augs.py --quick      (one seed on simulated slides: no evidence)
Time       --quick: 85 s, slides included; HER2ST, README's small budget: 20 min (two Intel Xeon cores, 2026-11-23)
Source     the paper's comparison of MPA with ST-Net's augmentation; stnet_color is what its published scripts did

"stnet_color" is this script's own: flips and turns, then brightness, contrast and saturation times 0.9-1.1 and hue by
at most 0.02 of a turn, in this order (p = .5), then a Gaussian blur of 3 or 5 px (p = .2).
"""

import functools

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

import common

# ---------------------------------------------------------------------------------------------- constants
DATA_ROOT = "GSE240429_data"  # folder with slides.csv and dataset/
OUT = ""  # folder of the results; empty = runs/<this script>/<data root's name>

TARGET = "harmony"  # harmony (the paper's) or lognorm
PROTOCOL = "paper"  # paper, loso (each slide is once the test slide) or block (folds of spatial blocks)
TRAIN_SLIDES = ()  # tissue_index values; empty = every slide but the test slide
TEST_SLIDE = 3  # tissue_index; GSE240429's C73_C1
VALID_FRACTION = 0.2  # of the training slides' spots
SEEDS = (42, 43, 44)  # one training and one split each, the same for every augmentation

BACKBONE = "efficientnet_b0"  # any timm name
PRETRAINED = True  # ImageNet weights; false = random weights
HIDDEN = 3000  # units of the head's hidden layer; 0 = a linear head
TRAINABLE_STAGES = -1  # of the backbone's last ones; -1 = all, 0 = frozen; EfficientNet-B0 has 9
START_AT_MEAN = False  # true = output bias starts at each gene's training mean

IMAGE_SIZE = 224  # px of the network's input; patches are 224 px of the slide
EPOCHS = 30
BATCH_SIZE = 32  # a last batch of one spot is left out, since BatchNorm needs two
LEARNING_RATE = 3e-4  # Adam; cosine to zero over the epochs

DEVICE = "auto"  # auto, cpu or cuda
PRECISION = "auto"  # auto, bf16, fp16 or fp32
ONLY = ""  # one augmentation; empty = all
QUICK = False  # the small budget below, on simulated slides
# --------------------------------------------------------------------------------------------------------

AUGS = ("mpa", "stnet", "stnet_color", "none")

QUICK_BUDGET = {
    "DATA_ROOT": "SIMULATED_data",
    "TARGET": "lognorm",
    "SEEDS": (42,),
    "PRETRAINED": False,
    "HIDDEN": 512,
    "START_AT_MEAN": True,
    "IMAGE_SIZE": 64,
    "EPOCHS": 3,
    "LEARNING_RATE": 1e-3,
}


def constant_on(images, values):
    """(3, 1, 1) of red, green, blue on the images' device, without waiting for it."""
    return torch.tensor(values).view(3, 1, 1).to(images.device, non_blocking=True)


def change_colour(images, factors):
    """(B, 3, S, S) in 0..255 with brightness, contrast, saturation (factors) and hue (turns) changed in this order, by
    (B, 4). Contrast is about the image's mean grey, saturation about each pixel's, hue as in HSV.
    """
    brightness, contrast, saturation, hue = factors[:, :, None, None, None].unbind(1)
    weights = constant_on(images, [0.2989, 0.587, 0.114])  # of red, green and blue in grey, ITU-R 601
    images = (images * brightness).clamp(0, 255)
    mean = (images * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    images = (mean + contrast * (images - mean)).clamp(0, 255)
    grey = (images * weights).sum(1, keepdim=True)
    images = (grey + saturation * (images - grey)).clamp(0, 255)
    red, green, blue = images.split(1, dim=1)
    value = images.amax(1, keepdim=True)
    chroma = value - images.amin(1, keepdim=True)
    sixths = torch.where(value == green, 2 * chroma + blue - red, 4 * chroma + red - green)
    sixths = torch.where(value == red, green - blue, sixths) / chroma.clamp(min=1e-6) + 6 * hue
    place = (sixths + constant_on(images, [5.0, 3, 1])) % 6
    return value - chroma * torch.minimum(place, 4 - place).clamp(0, 1)


def blur_gaussian(images, size):
    """(B, 3, S, S) blurred by kernels of (B,) 3 or 5 px, sigma 0.15 size + 0.35 (as OpenCV's), mirrored border."""
    steps, sigma = torch.arange(-2, 3, device=images.device), 0.15 * size[:, None] + 0.35
    kernel = torch.exp(-((steps / sigma) ** 2) / 2) * (steps.abs() <= size[:, None] // 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)[:, None, None]  # (3B, 1, 1, 5)
    flat = F.pad(images, (2, 2, 2, 2), mode="reflect").flatten(0, 1)[None]
    flat = F.conv2d(F.conv2d(flat, kernel, groups=len(kernel)), kernel.mT, groups=len(kernel))
    return flat.view(images.shape)


class ColourAndBlur(nn.Module):
    """Colour jitter and blur of the training images, each with parameters of its own; draws follow torch's seed."""

    def forward(self, images):
        if not self.training:
            return images
        uniform = torch.rand((len(images), 7))
        factors = torch.tensor([1.0, 1, 1, 0]) + (2 * uniform[:, :4] - 1) * torch.tensor([0.1, 0.1, 0.1, 0.02])
        size = torch.where(uniform[:, 4] < 0.5, 3, 5)
        steps = (change_colour, uniform[:, 5] < 0.5, factors), (blur_gaussian, uniform[:, 6] < 0.2, size)
        with torch.autocast(images.device.type, enabled=False):  # in bfloat16 it would posterise
            for change, hit, values in steps:
                rows = hit.nonzero().squeeze(1)
                if len(rows):
                    values, rows = (part.to(images.device, non_blocking=True) for part in (values[rows], rows))
                    images = images.index_copy(0, rows, change(images[rows], values))
        return images


def add_colour(model, patches, recipe, experiment):
    """`adapt` of common.train_network: stnet_color is common's "stnet" with ColourAndBlur before the network."""
    return (nn.Sequential(ColourAndBlur(), model) if recipe["AUG"] == "stnet_color" else model), patches


def draw_figure(path, title, table):
    """Difference to MPA of the gene groups, with intervals."""
    figure = Figure(figsize=(7, 1 + 0.35 * table["setting"].nunique() * 2), layout="constrained")
    ax = figure.subplots()
    names = dict(zip(table["setting"], table["setting"] + " - " + table["minus"], strict=True))
    for shift, group in zip((-0.2, 0, 0.2), ("HEG", "HVG", "all"), strict=True):
        of = table[table["group"] == group].dropna()
        error = np.stack([of["difference"] - of["low"], of["high"] - of["difference"]])
        ax.errorbar(
            of["difference"], [list(names).index(s) + shift for s in of["setting"]], xerr=error, fmt="o", label=group
        )
    ax.axvline(0, color="grey", linewidth=0.8)
    ax.set_yticks(range(len(names)), names.values())
    ax.invert_yaxis()
    ax.set(xlabel="difference of Pearson r, mean over genes", title=title)
    figure.legend(frameon=False, ncols=3, loc="outside lower center")
    common.save_figure(path, figure, "differences in r to MPA, with 95 % intervals")


def main():
    settings = {aug: {"AUG": aug, "TTA": False} for aug in AUGS}
    recipe, experiments = common.open_run(globals())
    common.print_header(globals(), recipe, experiments)
    data, out, note = experiments[0].data, experiments[0].out, "quick budget, no evidence: " * QUICK
    rows = common.run_grid(globals(), settings, experiments, add_colour)
    averaged = []
    for aug in [aug for aug in AUGS if ONLY in ("", aug)]:
        for experiment in experiments:
            own = (aug, experiment.seed, experiment.fold)
            trained = next(row for row in rows if (row["setting"], row["seed"], row["fold"]) == own)
            compute = functools.partial(common.predict_again, trained)
            changed = recipe | {"AUG": aug, "TTA": True}
            averaged += common.run_setting(f"{aug}, 8 views", changed, experiment, compute)
    rows += averaged
    title = f"{note}augmentations; 8 views = averaged over the symmetries at test time"
    against = dict.fromkeys(AUGS, "mpa") | {f"{aug}, 8 views": "mpa, 8 views" for aug in AUGS} | {"mpa, 8 views": "mpa"}
    against = {} if ONLY or "mpa" not in AUGS else {one: other for one, other in against.items() if one != other}
    common.report_scores(title, experiments, rows, against)
    if against:
        differences = pd.read_csv(out / "paired_differences.csv")
        draw_figure(out / "paired_differences.png", f"{data.title}{note}{differences['n'][0]} pairs", differences)
        print(f"figure: {out / 'paired_differences.png'}")
    common.finish_run(globals(), experiments[0], rows)


if __name__ == "__main__":
    common.run_script(globals())
