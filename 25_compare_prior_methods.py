"""Prior methods, baselines and controls on the same spots, genes and truth, in one table.

Question   Is EfficientNet-B0 with MPA better than BLEEP, ST-Net and what needs no image network at
           all?
Reads      <DATA_ROOT>/dataset/ (script 19); FEATURES, where it is a folder
Writes     <OUT>/rows.csv, a folder a row (as script 20), paired_differences.csv
Prints     header, the table with parameters, minutes, variance ratio and gain over BLEEP
Command    python 25_compare_prior_methods.py --data-root GSE240429_data
Override   python 25_compare_prior_methods.py --data-root HER2ST_data --only BLEEP
           python 25_compare_prior_methods.py --quick      (a smoke test, not a result)
           python 25_compare_prior_methods.py --data-root IDC --protocol hest --target log1p
           python 25_compare_prior_methods.py --features embeddings      (a folder a model)
Time       --quick: 2 min, slides included (two Intel Xeon cores, 2026-11-23)
Source     ST-Net: He et al., Nature Biomedical Engineering 2020. BLEEP: Xie et al., NeurIPS 2023.
           The idea of a ridge on frozen features is HEST-Benchmark's (Jaume et al., NeurIPS 2024),
           whose two probes stand beside it under protocol hest; low rank: Mukherjee and Zhu 2011

At its published rate ST-Net learns next to nothing in few steps, so it has rows with this project's
optimiser, each also from a random last layer. BLEEP's loss compares the spots of a batch with each
other: BLEEP_BATCH is what it compares, MICRO_BATCH what the image encoder holds in memory at once
and normalises together. All but the rows "neighbourhood" see single spots; those rows tell what the
tissue around a spot would add. A control uses what no image model may: the test spots' own depth,
or expression measured next door.
"""

from study import recipes, shell

if __name__ == "__main__":  # Check the command before the slow imports.
    shell.check_command(__file__, dataset=True, files=("GENE_SETS",))


import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.spatial import cKDTree
from torch import nn
from torch.utils.checkpoint import checkpoint

import common
from study import (
    embeddings,
    hashes,
    methods,
    printing,
    probes,
    recording,
    ridges,
    runs,
    shell,
    splitting,
)
from study.errors import InputError
from study.features import freeze_features

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

BACKBONE = "efficientnet_b0"  # timm name of the network that is compared
PRETRAINED = True  # ImageNet weights of every image encoder: true, false, or a folder of files
HIDDEN = 3000  # units of the head of BACKBONE; 0 = a linear head
OTHER_BACKBONES = ("mobilenetv2_100", "densenet121")  # in place of BACKBONE, the rest as it is
FEATURES = "resnet50"  # frozen timm backbone of ridges; or a folder of others' embeddings, as in 20

IMAGE_SIZE = 224  # px of the network's input; patches are 224 px of the slide
EPOCHS = 30  # of all networks but ST-Net as published and BLEEP
BATCH_SIZE = 32  # a last batch of one spot is left out, since BatchNorm needs two
LEARNING_RATE = 3e-4  # Adam; cosine to zero over the epochs
LOSS = "mse"  # a name of common.LOSSES
TTA = True  # average predictions over the 8 symmetries; what ridges see, always is
REFIT = False  # true = every method is refitted on training + validation spots
STNET_EPOCHS = 50  # of ST-Net as published
BLEEP_BACKBONE = "resnet50"  # timm name of BLEEP's image encoder
BLEEP_EPOCHS = 150
BLEEP_BATCH = 512  # spots that BLEEP's loss compares with each other, or all of them
MICRO_BATCH = 64  # patches in memory at once; where there are more, BLEEP computes them twice

DEVICE = "auto"  # auto, cpu or cuda
PRECISION = "auto"  # auto, bf16, fp16 or fp32
ONLY = ""  # one method; empty = all
QUICK = False  # the small budget below, on simulated slides
# --------------------------------------------------------------------------------------------------

QUICK_BUDGET = recipes.QUICK | {"FEATURES": "resnet18", "STNET_EPOCHS": 3, "BLEEP_EPOCHS": 3}


STNET_BACKBONE = "densenet121"
# He et al. 2020 predict 250 genes, over which their loss is averaged; SGD's rate is for that.
STNET_GENES = 250


def name_bleep():
    """What BLEEP's row is called: with its encoder, if that is another than published."""
    return "BLEEP" if BLEEP_BACKBONE == "resnet50" else f"BLEEP ({BLEEP_BACKBONE})"


def trained_methods():
    """{setting: {CONSTANT: value}} of what is trained; METHOD is one of METHODS, and other methods'
    constants stay out of it.
    """
    others = ("FEATURES", "STNET_EPOCHS", "BLEEP_EPOCHS", "BLEEP_BATCH", "MICRO_BATCH")
    others += ("BLEEP_BACKBONE", "OTHER_BACKBONES")
    shared = dict.fromkeys(others)
    network = methods.name_network(BACKBONE)
    paper = {"BACKBONE": BACKBONE, "RECIPE": "paper"}
    at_random = {"HEAD_START": "random"}
    as_published = {"SCHEDULE": "constant", "LOSS": "mse"}  # LOSS is not asked: each has its own
    published = {"EPOCHS": STNET_EPOCHS, "BATCH_SIZE": 32, "LEARNING_RATE": 1e-6}
    published |= as_published | {"STNET_GENES": STNET_GENES}
    stnet = {"BACKBONE": STNET_BACKBONE, "HIDDEN": 0, "HEAD_START": "mean", "AUG": "stnet"}
    # Without a head whose output is expression, it cannot start at the means.
    bleep = stnet | as_published | {"BACKBONE": BLEEP_BACKBONE, "HEAD_START": "random"}
    bleep |= {"EPOCHS": BLEEP_EPOCHS, "BATCH_SIZE": BLEEP_BATCH, "MICRO_BATCH": MICRO_BATCH}
    bleep["LEARNING_RATE"] = 1e-3
    found = {
        network: ("network", paper),
        f"{network}, random start": ("network", paper | at_random),
        f"{network}, linear head": ("network", paper | {"HIDDEN": 0}),
    }
    for backbone in OTHER_BACKBONES:
        found[methods.name_network(backbone)] = ("network", paper | {"BACKBONE": backbone})
    found |= {
        "ST-Net": ("ST-Net", stnet | published),
        "ST-Net, random start": ("ST-Net", stnet | published | at_random),
        "ST-Net, Adam": ("ST-Net, Adam", stnet),
        "ST-Net, Adam, random start": ("ST-Net, Adam", stnet | at_random),
        name_bleep(): ("BLEEP", bleep),
    }
    return {name: shared | own | {"METHOD": method} for name, (method, own) in found.items()}


# ----------------------------------------------------------------------------------------- networks
def stnet(row):
    """A method: ST-Net as published."""
    return methods.network(row, loss=sum_of_squares, optimise=sgd_with_momentum)


def bleep(row):
    """A method: BLEEP's two encoders are trained on the patches and expression of the same spots;
    a scored spot is predicted by the training spots whose expression lies nearest to its image.
    """
    model = methods.start_network(row)
    patches = row.place_patches()
    pair = build_bleep(model, row)
    row.fit(pair, patches, model=model, loss=pair.loss, optimise=adamw)
    return row.predict(pair, patches)


# ------------------------------------------------------------------------------------------- ST-Net
def sum_of_squares(predicted, target):
    """ST-Net's loss as published: summed over the batch, averaged over genes.

    It is divided by the published number of genes whatever the panel: the mean over 3,320 genes
    would make the steps of each gene's weights at SGD's fixed rate 13 times smaller.
    """
    return F.mse_loss(predicted, target, reduction="sum") / STNET_GENES


sgd_with_momentum = functools.partial(torch.optim.SGD, momentum=0.9)


# -------------------------------------------------------------------------------------------- BLEEP
class Projection(nn.Module):
    """BLEEP's projection head: (B, width) -> (B, 256)."""

    def __init__(self, width, size=256):
        super().__init__()
        self.first = nn.Linear(width, size)
        self.second = nn.Linear(size, size)
        self.dropout = nn.Dropout(0.1)
        self.norm = nn.LayerNorm(size)

    def forward(self, features):
        projected = self.first(features)
        return self.norm(projected + self.dropout(self.second(F.gelu(projected))))


def contrast(images, spots):
    """BLEEP's loss of (B, 256) embeddings of the same spots, temperature 1.

    Cross entropy both ways against softmax of the mean similarity among the images and among the
    spots. Gradients flow through these targets, as published.
    """
    targets = F.softmax((images @ images.T + spots @ spots.T) / 2, dim=1)
    logits = spots @ images.T
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets.T)) / 2


def retrieve(images, spots, expression, k=50):
    """(B, G) plain mean of expression (n, G) of the k spots of the highest cosine."""
    # In 16 bits many of the spots would tie.
    with torch.autocast(images.device.type, enabled=False):
        similarity = F.normalize(images.to(spots.dtype)) @ F.normalize(spots).T
    nearest = similarity.topk(min(k, len(spots))).indices
    return expression[nearest].mean(1)


class Bleep(nn.Module):
    """Patches -> embeddings in training, in evaluation the retrieved expression."""

    def __init__(self, model, expression, micro_batch):
        super().__init__()
        self.model = model  # model.head and model.spots are the two projections
        self.micro_batch = micro_batch
        # (n, G) and (n, 256) of the training spots
        self.register_buffer("expression", expression, persistent=False)
        self.register_buffer("embedded", torch.zeros(len(expression), 256), persistent=False)

    def train(self, mode=True):
        """Entering evaluation embeds the training spots with the weights of now."""
        super().train(mode)
        if not mode:
            with torch.no_grad():
                self.embedded = self.model.spots(self.expression)
        return self

    def forward(self, patches):
        if not self.training:
            return retrieve(self.model(patches), self.embedded, self.expression)
        # The encoder holds one part in memory and computes it again, with the same dropout, when
        # its gradient is due. Loss and gradient are those of the whole batch; BatchNorm averages
        # within a part.
        n_parts = -(-len(patches) // self.micro_batch)
        if n_parts == 1:
            return self.model(patches)
        parts = patches.tensor_split(n_parts)
        return torch.cat([checkpoint(self.model, part, use_reentrant=False) for part in parts])

    def loss(self, embedded, target):
        """`contrast` with the spots' own embeddings."""
        return contrast(embedded, self.model.spots(target))


adamw = functools.partial(torch.optim.AdamW, weight_decay=1e-3)


def build_bleep(model, row):
    """The network of BLEEP around the image encoder of `model`."""
    split = row.split
    expression = torch.from_numpy(split.data.target[split.spots("train")])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hashes.seed_of(split.seed, "projections"))
        model.head = Projection(model.head[-1].in_features)
        model.spots = Projection(expression.shape[1])
    return Bleep(model, expression, row.recipe["MICRO_BATCH"]).to(model.mean.device)


METHODS = {
    "network": methods.network,
    "ST-Net": stnet,
    "ST-Net, Adam": methods.network,
    "BLEEP": bleep,
}


def train_method(row):
    """A method: that of METHODS which the row names."""
    return METHODS[row.recipe["METHOD"]](row)


# ------------------------------------------------------------------------------ baselines, controls
def training_mean(row):
    """A method: each gene's mean over the training spots; r is undefined, MSE what is left."""
    mean, _ = common.mean_and_variance(row.split.data.target, row.split.spots("train"))
    mean = mean.astype(np.float32)
    return np.tile(mean, (len(row.split.scored()), 1))


def depth_only(row):
    """A method, control: a straight line a gene through the log of the spot's own total counts."""
    split = row.split
    train = split.spots("train")
    depth = np.log(split.data.annotations.obs["n_counts"].to_numpy(np.float64))[:, None]
    centred = ridges.Centred(depth, split.data.target, train, np.zeros(len(depth)))
    line = ridges.solve_ridge(centred, train, penalty=0)
    return line.predict(depth[split.scored()])


def nearest_spot(row):
    """A method, control: expression measured at the nearest position of the neighbouring training
    slide, slides laid upon each other by the middle of their spots; NaN without such a slide.
    """
    split, data = row.split, row.split.data
    train, scored = split.spots("train"), split.scored()
    slides = data.spots["tissue_index"].to_numpy()
    places = common.places_in_pitches(data.spots)
    places = (places - places.groupby(slides).transform("mean")).to_numpy()
    predicted = np.full((len(scored), len(data.genes)), np.nan, np.float32)
    for slide in np.unique(slides[scored]):
        others = np.setdiff1d(slides[train], slide)
        if not len(others):
            continue
        neighbour = others[np.abs(others - slide).argmin()]
        source = train[slides[train] == neighbour]
        here = np.flatnonzero(slides[scored] == slide)
        _, nearest = cKDTree(places[source]).query(places[scored[here]])
        predicted[here] = data.target[source[nearest]]
    return predicted


def same_slide(row):
    """A method, control: the ridge on frozen features, learnt on the test slide itself, on the
    blocks around those that it predicts. What it has over the other ridges is the step to another
    slide, and what it lacks to them the number of spots; what it lacks to the ceiling, the image
    does not show, or not to these features. NaN for other slides.

    All folds have one intercept, the slide's means: where a fold is high, the others are low, so
    with their mean for its intercept even permuted counts would have an r, below 0.
    """
    split, data = row.split, row.split.data
    features, _ = freeze_features(row.recipe, split)
    row.note(weights=methods.name_weights(row.recipe))
    slides = data.spots["tissue_index"].to_numpy()
    scored = split.scored()
    line_of = pd.Series(range(len(scored)), scored)
    predicted = np.full((len(scored), len(data.genes)), np.nan, np.float32)
    for slide in split.slides("test"):
        here = split.spots("test")
        here = here[slides[here] == slide]
        mean_x, _ = common.mean_and_variance(features, here)
        mean_y, _ = common.mean_and_variance(data.target, here)
        for train, held_out in ridges.choose_folds(data.spots.iloc[here]):
            learn, judge = here[train], here[held_out]
            ridge, _ = methods.learn_ridge(split, features, learn)
            ridge = ridge.through(mean_x, mean_y)
            predicted[line_of[judge]] = ridge.predict(features[judge])
    return predicted


def retrieve_from_all(trained, row):
    """A method, given BLEEP's row: test spots are retrieved from validation spots as well."""
    all_train = replace(row, split=row.split.with_all_in_training())
    predicted = methods.predict_again(trained, all_train, wrap=build_bleep)
    first = recording.read_prediction(trained.folder).to_numpy()
    return splitting.keep_validation_of(first, predicted, row.split)


def predict_otherwise(run, settings):
    """Fill the rows of networks by one view, and of BLEEP by all spots of the training slides."""
    for name, changed in settings.items():
        recipe = run.recipe | changed
        for split in run.splits:
            trained = run.find(name, split)
            again = recipe | {"AGAIN": trained.folder.name}
            if name == name_bleep() and not REFIT:  # which has taken them all
                row = run.row(f"{name}, all references", split, again)
                run.fill(row, functools.partial(retrieve_from_all, trained))
            if recipe["METHOD"] == "network" and TTA:
                # Refitted weights have learnt from validation spots, which then are no test of it.
                learnt = splitting.final_split(recipe, split)
                row = run.row(f"{name}, 1 view", learnt, again | {"TTA": False})
                run.fill(row, functools.partial(methods.predict_again, trained))


def average_predictions(members, row):
    """A method, given rows: the mean of their predictions."""
    row.note(weights="several")
    total = sum(recording.read_prediction(member.folder).to_numpy() for member in members)
    return total / len(members)


def computed_methods(run):
    """{setting: (its constants, its method)} of what needs no training by epochs."""
    plain = run.baseline
    found = {
        "training mean": (plain, training_mean),
        "ridge (colour)": (plain, methods.ridge_on_colour),
    }
    embedded = embedded_methods(run)
    found |= embedded
    features = BACKBONE if embedded else FEATURES
    frozen = plain | {"POOL_STAGES": False}
    frozen |= {name: run.recipe[name] for name in ("PRETRAINED", "IMAGE_SIZE")}
    backbones = [features, BACKBONE, STNET_BACKBONE, BLEEP_BACKBONE]
    for backbone in dict.fromkeys(backbones if PRETRAINED is not False else [features]):
        recipe = frozen | {"BACKBONE": backbone}
        found[f"ridge ({backbone})"] = (recipe, methods.ridge_on_features)
        if PRETRAINED is False:
            continue
        pooled = recipe | {"POOL_STAGES": True}
        found[f"ridge ({backbone}, all stages)"] = (pooled, methods.ridge_on_features)
        if backbone == features:
            full_rank = pooled | {"FULL_RANK": True}
            found[f"ridge ({backbone}, full rank)"] = (full_rank, methods.ridge_on_features)
        wide = pooled | {"NEIGHBOURHOOD": True}
        found[f"ridge ({backbone}, neighbourhood)"] = (wide, methods.ridge_on_features)
        if PROTOCOL == "hest":
            for probe, changed in probes.name_probes(backbone).items():
                found[probe] = (recipe | changed, probes.hest_probe)
    found["depth only (control)"] = (plain, depth_only)
    found["nearest spot (control)"] = (plain, nearest_spot)
    if PRETRAINED is not False:
        recipe = frozen | {"BACKBONE": features, "POOL_STAGES": True, "REFIT": False}
        found["same-slide ridge (control)"] = (recipe, same_slide)
    return found


def embedded_methods(run):
    """As computed_methods, of the models whose embeddings lie in FEATURES; {} of a timm name."""
    if not Path(FEATURES).is_dir():
        if "/" in FEATURES and ":" not in FEATURES:  # No name of timm's is so.
            raise InputError(f"--features {FEATURES}: no such folder")
        return {}
    backbones = BACKBONE, STNET_BACKBONE, BLEEP_BACKBONE
    models = embeddings.open_models(FEATURES, run.data, run.splits, backbones)
    return embeddings.settings_of(models, run.baseline)


# {what is averaged: how the names of the ridges in it end}, beside the networks that learn by Adam.
# Models see single spots; with the neighbourhood, their ridges see more.
ENSEMBLES = {"models": ", all stages)", "models, neighbourhood": ", neighbourhood)"}


def fill_ensembles(run):
    """Fill the rows of the means of predictions that ENSEMBLES name, where there are ridges."""
    settings = dict.fromkeys(row.setting for row in run.rows)
    backbones = BACKBONE, *OTHER_BACKBONES
    networks = {"ST-Net, Adam", *(methods.name_network(backbone) for backbone in backbones)}
    for kind, ending in ENSEMBLES.items():
        ridges = [name for name in settings if name.endswith(ending)]
        names = ridges + [name for name in settings if name in networks]
        for split in run.splits if ridges and len(names) > 1 else ():
            members = [run.find(name, split) for name in names]
            recipe = run.baseline | {"MEMBERS": sorted(member.folder.name for member in members)}
            row = run.row(f"mean of {len(names)} {kind}", split, recipe)
            run.fill(row, functools.partial(average_predictions, members), refit=False)


# -------------------------------------------------------------------------------------------- table
def describe_costs_and_gain(lines):
    """{setting: {column: text}}: parameters, minutes, variance ratio and r over BLEEP's."""
    headline = recording.headline_of_lines(lines)
    bleep = lines[lines["setting"] == name_bleep()]
    bleep_r = bleep[headline.column].astype(float).mean()
    columns = {}
    for setting, group in lines.groupby("setting"):
        parameters = group.get("parameters_total", pd.Series(dtype=float)).mean()
        gain = np.nan
        if bleep_r > 0 and recording.share_genes(group, bleep, headline.group):
            gain = group[headline.column].mean() / bleep_r - 1
        columns[setting] = {
            "M": "-" if np.isnan(parameters) else f"{parameters / 1e6:.1f}",
            "min": f"{group['seconds'].mean() / 60:.1f}",
            "var": f"{group['variance_ratio'].mean():.2f}",
            "over BLEEP": "-" if np.isnan(gain) else f"{gain:+.0%}",
        }
    return columns


def main():
    run = runs.open_run(globals())
    trained, computed = trained_methods(), computed_methods(run)
    chosen = run.chosen(trained | computed)
    run.print_header()
    for name in [name for name in computed if name in chosen]:
        recipe, method = computed[name]
        for split in run.splits:  # before the trainings: what fails, fails now
            run.fill(run.row(name, split, recipe), method)
    without_training = run.rows
    run.rows = []
    settings = {name: setting for name, setting in trained.items() if name in chosen}
    run.train(settings, train_method)
    predict_otherwise(run, settings)
    run.rows += without_training
    fill_ensembles(run)
    names = dict.fromkeys(row.setting for row in run.rows if row.setting != name_bleep())
    run.print_scores(
        "methods; a control uses what no image model may",
        minus={} if ONLY else dict.fromkeys(names, name_bleep()),
        columns=describe_costs_and_gain(run.tested()),
        leave_out=("HVG", "MG", "all", "in slides", "r>=.30", "q<.05"),
    )
    run.finish(printing.print_published(run.data.root))


if __name__ == "__main__":
    shell.run_script(globals())
