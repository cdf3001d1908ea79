"""Augmentations compared over several seeds, with and without averaging over the 8 symmetries at
test time.

Question   Does morphology-preserving augmentation (MPA) help, and by more than another seed does?
Reads      <DATA_ROOT>/dataset/ (script 19)
Writes     <OUT>/rows.csv, a folder a row (as script 20), paired_differences.csv,
           paired_differences.png
Prints     header, the table of mean r and sd over the seeds with differences to MPA
Command    python 23_compare_augs.py --data-root GSE240429_data
Override   python 23_compare_augs.py --data-root HER2ST_data --test-slide 4 --seeds 42,43
           python 23_compare_augs.py --quick      (a smoke test, not a result)
Time       --quick: 85 s, slides included (two Intel Xeon cores, 2026-11-23)
Source     the paper's comparison of MPA with ST-Net's augmentation; stnet_color is what its
           published scripts did

"stnet_color" is no name of common.AUGMENTATIONS, and is built here: flips and turns, then
brightness, contrast and saturation times 0.9-1.1 and hue by at most 0.02 of a turn, in this order
(p = .5), then a Gaussian blur of 3 or 5 px (p = .2).
"""

from study import shell

if __name__ == "__main__":  # Check the command before the slow imports.
    shell.check_command(__file__, dataset=True, files=("GENE_SETS",))


import functools
import itertools

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

import common
from slides.colour import colour_statistics
from study import drawing, methods, recipes, runs, shell, splitting
from study.errors import InputError

# ---------------------------------------------------------------------------------------- constants
DATA_ROOT = "GSE240429_data"  # folder with slides.csv and dataset/
OUT = ""  # folder of the results; empty = runs/<this script>/<data root's name>

TARGET = "harmony"  # harmony (the paper's), lognorm or, of protocol hest, log1p
PROTOCOL = "paper"  # paper, loso (each slide tests once), block (spatial folds) or hest
TRAIN_SLIDES = ()  # tissue_index values; empty = every slide but the test slide
TEST_SLIDE = 3  # tissue_index; GSE240429's C73_C1
VALID_FRACTION = 0.2  # of the training slides' spots
SEEDS = (42, 43, 44)  # one training and one split each, the same for every augmentation
GENE_SETS = ""  # a .gmt, or a CSV group,gene: sets that are scored beside HEG, HVG and MG
RECIPE = "paper"  # paper or published: see study/recipes.py; flags and edited constants win

BACKBONE = "efficientnet_b0"  # any timm name
PRETRAINED = True  # ImageNet weights: true (timm's hub), false (random), a file or a folder
HIDDEN = 3000  # units of the head's hidden layer; 0 = a linear head
TRAINABLE_STAGES = -1  # of the backbone's last ones; -1 = all, 0 = frozen; EfficientNet-B0 has 9
HEAD_START = "mean"  # the last layer: random, mean (0, bias at the training means) or ridge

IMAGE_SIZE = 224  # px of the network's input; patches are 224 px of the slide
EPOCHS = 30
BATCH_SIZE = 32  # a last batch of one spot is left out, since BatchNorm needs two
LEARNING_RATE = 3e-4  # Adam; cosine to zero over the epochs, or constant if published
LOSS = "mse"  # a name of common.LOSSES

DEVICE = "auto"  # auto, cpu or cuda
PRECISION = "auto"  # auto, bf16, fp16 or fp32
ONLY = ""  # one augmentation; empty = all
QUICK = False  # the small budget below, on simulated slides
# --------------------------------------------------------------------------------------------------

# Names of common.AUGMENTATIONS; stnet_color is this script's own.
AUGS = ("mpa", "mpa_stain", "stnet", "stnet_color", "none")

# From the ridge start of recipe best they hardly differ, and without training not at all.
ALLOWED = {"RECIPE": ("paper", "published"), "EPOCHS": (1, 1_000_000)}

QUICK_BUDGET = recipes.QUICK | {"SEEDS": (42,)}


def constant_on(images, values):
    """(3, 1, 1) of red, green, blue on the images' device, without waiting for it."""
    return torch.tensor(values).view(3, 1, 1).to(images.device, non_blocking=True)


def change_colour(images, factors):
    """(B, 3, S, S) in 0..255 with brightness, contrast, saturation (factors) and hue (turns)
    changed in this order, by (B, 4). Contrast is about the image's mean grey, saturation about each
    pixel's, hue as in HSV.
    """
    brightness, contrast, saturation, hue = factors[:, :, None, None, None].unbind(1)
    weights = constant_on(images, [0.2989, 0.587, 0.114])  # of red, green, blue in grey, ITU-R 601
    images = (images * brightness).clamp(0, 255)
    mean = (images * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    images = (mean + contrast * (images - mean)).clamp(0, 255)
    grey = (images * weights).sum(1, keepdim=True)
    images = (grey + saturation * (images - grey)).clamp(0, 255)
    return turn_hue(images, hue)


def turn_hue(images, hue):
    """(B, 3, S, S) with the hue of HSV turned by (B, 1, 1, 1) turns."""
    red, green, blue = images.split(1, dim=1)
    value = images.amax(1, keepdim=True)
    chroma = value - images.amin(1, keepdim=True)
    # The hue times chroma, in sixths of a turn, by the channel that is greatest.
    sixths = torch.where(value == green, 2 * chroma + blue - red, 4 * chroma + red - green)
    sixths = torch.where(value == red, green - blue, sixths)
    sixths = sixths / chroma.clamp(min=1e-6) + 6 * hue
    place = (sixths + constant_on(images, [5.0, 3, 1])) % 6
    return value - chroma * torch.minimum(place, 4 - place).clamp(0, 1)


def blur_gaussian(images, size):
    """(B, 3, S, S) blurred by (B,) 3 or 5 px, sigma 0.15 size + 0.35 (OpenCV's), mirrored."""
    steps = torch.arange(-2, 3, device=images.device)
    sigma = 0.15 * size[:, None] + 0.35
    inside = steps.abs() <= size[:, None] // 2
    kernel = torch.exp(-((steps / sigma) ** 2) / 2) * inside
    kernel = kernel / kernel.sum(1, keepdim=True)
    kernel = kernel.repeat_interleave(3, 0)[:, None, None]  # (3B, 1, 1, 5)
    flat = F.pad(images, (2, 2, 2, 2), mode="reflect").flatten(0, 1)[None]
    flat = F.conv2d(flat, kernel, groups=len(kernel))
    flat = F.conv2d(flat, kernel.mT, groups=len(kernel))
    return flat.view(images.shape)


class ColourAndBlur(nn.Module):
    """Colour jitter and blur of the training images, each with parameters of its own.

    The draws follow torch's seed.
    """

    def forward(self, images):
        if not self.training:
            return images
        uniform = torch.rand((len(images), 7))
        jitter = torch.tensor([0.1, 0.1, 0.1, 0.02])
        factors = torch.tensor([1.0, 1, 1, 0]) + (2 * uniform[:, :4] - 1) * jitter
        size = torch.where(uniform[:, 4] < 0.5, 3, 5)
        with torch.autocast(images.device.type, enabled=False):  # bfloat16 would posterise
            images = change_where(uniform[:, 5] < 0.5, change_colour, images, factors)
            return change_where(uniform[:, 6] < 0.2, blur_gaussian, images, size)


def change_where(hit, change, images, values):
    """The images with change(image, value) where hit (B,) bool, which is on the CPU."""
    chosen = hit.nonzero().squeeze(1)
    if not len(chosen):
        return images
    values = values[chosen].to(images.device, non_blocking=True)
    chosen = chosen.to(images.device, non_blocking=True)
    return images.index_copy(0, chosen, change(images[chosen], values))


def network(row):
    """A method: as methods.network, with ColourAndBlur before the network if COLOUR is set."""
    model = methods.start_network(row)
    patches = row.place_patches()
    trained = nn.Sequential(ColourAndBlur(), model) if row.recipe["COLOUR"] else model
    row.fit(trained, patches, model=model)
    return row.predict(trained, patches)


def ridge_under_stain_shift(row):
    """A method: ridge_on_colour of test slides that another laboratory would have stained."""
    data = row.split.data
    patches = common.MappedPatches(data.patches, common.PATCH_SIZE)
    patches = common.StainShiftedPatches(patches, common.OTHER_STAINING)
    colour = data.annotations.obsm["colour"].copy()
    for spots in torch.from_numpy(row.split.spots("test")).split(64):
        shifted = patches[spots].permute(0, 2, 3, 1).numpy()
        colour[spots.numpy()] = colour_statistics(shifted)
    return methods.ridge_on_colour(row, colour)


STAIN_SHIFT = {"STAIN_SHIFT": common.OTHER_STAINING.tolist()}  # what its rows are made with


def setting_of(aug):
    """{CONSTANT: value} of an augmentation; stnet_color is ST-Net's with changes of colour."""
    colour = aug == "stnet_color"
    return {"AUG": "stnet" if colour else aug, "COLOUR": colour, "TTA": False}


def draw_figure(path, title, differences):
    """Paired differences of the gene groups' r, with intervals."""
    names = differences.drop_duplicates("setting")
    figure = Figure(figsize=(7, 1 + 0.7 * len(names)), layout="constrained")
    ax = figure.subplots()
    place_of = {setting: place for place, setting in enumerate(names["setting"])}
    for shift, group in zip((-0.2, 0, 0.2), ("HEG", "HVG", "all"), strict=True):
        lines = differences[differences["group"] == group]
        places = lines["setting"].map(place_of) + shift
        middle = lines["difference"]
        ends = np.stack([middle - lines["low"], lines["high"] - middle])
        ax.errorbar(middle, places, xerr=ends, fmt="o", label=group)
    ax.axvline(0, color="grey", linewidth=0.8)
    ax.set_yticks(range(len(names)), names["setting"] + " - " + names["minus"])
    ax.invert_yaxis()
    ax.set(xlabel="difference of Pearson r, mean over genes")
    ax.set_title(title, size=10, wrap=True)
    figure.legend(frameon=False, ncols=3, loc="outside lower center")
    drawing.save_figure(path, figure, "differences in r to MPA, with 95 % intervals")


def compare_with_mpa():
    """{setting: another} of the paired differences: to MPA with as many views, and MPA's two; a
    slide with a stain shift to the same slide as it is.
    """
    if ONLY or "mpa" not in AUGS:
        return {}
    others = [aug for aug in AUGS if aug != "mpa"]
    minus = dict.fromkeys(others, "mpa")
    minus["mpa, 8 views"] = "mpa"
    for aug in others:
        minus[f"{aug}, 8 views"] = "mpa, 8 views"
    for name in (*AUGS, "ridge (colour)"):
        minus[f"{name}, stain shift"] = name
    return minus


def predict_anew(run, aug, split):
    """Fill the rows of a trained network over the 8 symmetries, and under a stain shift."""
    trained = run.find(aug, split)
    recipe = run.recipe | setting_of(aug) | {"AGAIN": trained.folder.name}
    split = splitting.final_split(recipe, split)
    row = run.row(f"{aug}, 8 views", split, recipe | {"TTA": True})
    run.fill(row, functools.partial(methods.predict_again, trained))
    row = run.row(f"{aug}, stain shift", split, recipe | STAIN_SHIFT)
    run.fill(row, functools.partial(methods.predict_again, trained, stain_shift=True))


def main():
    for aug in AUGS:  # a wrong name is told now, not when its training begins
        if setting_of(aug)["AUG"] not in common.AUGMENTATIONS:
            raise InputError(f"AUGS: {aug!r} is no name of common.AUGMENTATIONS")
    run = runs.open_run(globals())
    run.print_header()
    settings = run.chosen({aug: setting_of(aug) for aug in AUGS})
    run.train(settings, network)
    for aug, split in itertools.product(settings, run.splits):
        predict_anew(run, aug, split)
    for split in [] if ONLY else run.splits:
        row = run.row("ridge (colour)", split, run.baseline)
        run.fill(row, methods.ridge_on_colour)
        row = run.row("ridge (colour), stain shift", split, run.baseline | STAIN_SHIFT)
        run.fill(row, ridge_under_stain_shift)
    title = "augmentations; 8 views = averaged over the symmetries at test time"
    differences = run.print_scores(title, minus=compare_with_mpa())
    known = () if differences is None else differences.dropna()
    if len(known):
        path = run.out / "paired_differences.png"
        draw_figure(path, run.title(f"pairs of trainings: {known['n'].max()}"), known)
        run.show_figure(path)
    run.finish()


if __name__ == "__main__":
    shell.run_script(globals())
