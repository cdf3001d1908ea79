"""Prior methods, baselines and controls on the same spots, genes and truth, in one table.

Question   Is EfficientNet-B0 with MPA better than BLEEP, ST-Net and what needs no image network at all?
Reads      <DATA_ROOT>/dataset/ (script 19)
Writes     <OUT>/rows.csv, a folder a row (as script 20)
Prints     header, the table with parameters, minutes and gain over BLEEP, one JSON line
Command    python 25_compare_prior_methods.py --data-root GSE240429_data --published
Override   python 25_compare_prior_methods.py --data-root HER2ST_data --test-slide 4 --pretrained false --only BLEEP
           python 25_compare_prior_methods.py --quick      (small budget on simulated slides: no evidence)
Time       --quick: 2 min, slides included; HER2ST, README's small budget: 49 min (two Intel Xeon cores, 2026-11-23)
Source     ST-Net: He et al., Nature Biomedical Engineering 2020. BLEEP: Xie et al., NeurIPS 2023. The ridge on frozen
           features follows HEST-Benchmark (Jaume et al., NeurIPS 2024), with alpha by cross-validation

ST-Net from random weights learns next to nothing at its published rate, so it has a second row with this project's
optimiser. BLEEP's loss compares the spots of a batch with each other: BLEEP_BATCH is what it compares, MICRO_BATCH only
what the image encoder holds in memory at once. A control uses what no image model may: the test spots' own depth, or
expression measured next door.
"""

import functools

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.spatial import cKDTree
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.checkpoint import checkpoint

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

PRETRAINED = True  # ImageNet weights for every image encoder; false = random weights
HIDDEN = 3000  # units of EfficientNet-B0's head; 0 = a linear head
START_AT_MEAN = False  # true = EfficientNet-B0's output bias starts at each gene's training mean, as ST-Net's does
FEATURES = "resnet50"  # timm name of the frozen backbone under the ridge

IMAGE_SIZE = 224  # px of the network's input; patches are 224 px of the slide
EPOCHS = 30  # of EfficientNet-B0, and of ST-Net with its optimiser
BATCH_SIZE = 32  # a last batch of one spot is left out, since BatchNorm needs two
LEARNING_RATE = 3e-4  # Adam; cosine to zero over the epochs
STNET_EPOCHS = 50  # of ST-Net as published
BLEEP_EPOCHS = 150
BLEEP_BATCH = 512  # spots that BLEEP's loss compares with each other; all of them where there are fewer
MICRO_BATCH = 64  # patches that BLEEP's image encoder holds in memory; it computes them twice where there are more

DEVICE = "auto"  # auto, cpu or cuda
PRECISION = "auto"  # auto, bf16, fp16 or fp32
ONLY = ""  # one method; empty = all
PUBLISHED = False  # true = published numbers below the table, which were not computed here
QUICK = False  # the small budget below, on simulated slides
# --------------------------------------------------------------------------------------------------------

QUICK_BUDGET = {
    "DATA_ROOT": "SIMULATED_data",
    "TARGET": "lognorm",
    "PRETRAINED": False,
    "HIDDEN": 512,
    "START_AT_MEAN": True,
    "FEATURES": "resnet18",
    "IMAGE_SIZE": 64,
    "EPOCHS": 3,
    "LEARNING_RATE": 1e-3,
    "STNET_EPOCHS": 3,
    "BLEEP_EPOCHS": 3,
}


def methods():
    """{setting: {CONSTANT: value}} of the rows that are trained; the constants of other rows stay out of a row."""
    unused = dict.fromkeys(("FEATURES", "STNET_EPOCHS", "BLEEP_EPOCHS", "BLEEP_BATCH", "MICRO_BATCH", "PUBLISHED"))
    shared = unused | {"TRAINABLE_STAGES": -1, "TTA": False}
    stnet = shared | {"BACKBONE": "densenet121", "HIDDEN": 0, "START_AT_MEAN": True, "AUG": "stnet", "TTA": True}
    bleep = {"BACKBONE": "resnet50", "HIDDEN": 0, "START_AT_MEAN": False, "AUG": "stnet", "LEARNING_RATE": 1e-3}
    bleep |= {"EPOCHS": BLEEP_EPOCHS, "BATCH_SIZE": BLEEP_BATCH, "MICRO_BATCH": MICRO_BATCH}
    settings = {
        "EfficientNet-B0": shared | {"BACKBONE": "efficientnet_b0", "AUG": "mpa"},
        "ST-Net": stnet | {"EPOCHS": STNET_EPOCHS, "BATCH_SIZE": 32, "LEARNING_RATE": 1e-6},
        "ST-Net, our optimiser": stnet,
        "BLEEP": shared | bleep,
    }
    return {name: setting | {"METHOD": name} for name, setting in settings.items()}


# ---------------------------------------------------------------------------------------------- trained
class StNet(nn.Sequential):
    """ST-Net's network with the published loss, summed over the batch and averaged over genes, and optimiser."""

    def loss(self, predicted, target):
        return F.mse_loss(predicted, target, reduction="sum") / target.shape[1]

    def optimise(self, parameters, recipe):
        return without_schedule(torch.optim.SGD(parameters, recipe["LEARNING_RATE"], momentum=0.9))


def without_schedule(optimiser):
    """(optimiser, schedule) at a constant rate."""
    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, lambda epoch: 1.0)


class Projection(nn.Module):
    """BLEEP's projection head: (B, width) -> (B, 256)."""

    def __init__(self, width, size=256):
        super().__init__()
        self.first, self.second = nn.Linear(width, size), nn.Linear(size, size)
        self.dropout, self.norm = nn.Dropout(0.1), nn.LayerNorm(size)

    def forward(self, features):
        projected = self.first(features)
        return self.norm(projected + self.dropout(self.second(F.gelu(projected))))


def contrast(images, spots):
    """BLEEP's loss of (B, 256) embeddings of the same spots, temperature 1: cross entropy both ways against softmax of
    the mean similarity among the images and among the spots. Gradients flow through these targets, as published.
    """
    targets = F.softmax((images @ images.T + spots @ spots.T) / 2, dim=1)
    logits = spots @ images.T
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets.T)) / 2


def retrieve(images, spots, expression, k=50):
    """(B, G) plain mean of the expression (n, G) of the k spots whose (n, 256) embedding has the highest cosine."""
    nearest = (F.normalize(images) @ F.normalize(spots).T).topk(min(k, len(spots))).indices
    return expression[nearest].mean(1)


class Bleep(nn.Module):
    """Patches -> embeddings while training; in evaluation the retrieved expression of training spots."""

    def __init__(self, model, expression, micro_batch):
        super().__init__()
        self.model, self.micro_batch = model, micro_batch  # model.head and model.spots are the two projections
        self.register_buffer("expression", expression, persistent=False)  # (n, G) of the training spots
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
            return retrieve(self.model(patches).float(), self.embedded, self.expression)
        # The encoder holds one part in memory and computes it again, with the same dropout, when its gradient is due.
        # Loss and gradient are those of the whole batch; BatchNorm averages within a part.
        parts = patches.tensor_split(-(-len(patches) // self.micro_batch))
        again = functools.partial(checkpoint, self.model, use_reentrant=False)
        return torch.cat([again(part) for part in parts]) if len(parts) > 1 else self.model(patches)

    def loss(self, embedded, target):
        return contrast(embedded, self.model.spots(target))

    def optimise(self, parameters, recipe):
        return without_schedule(torch.optim.AdamW(parameters, recipe["LEARNING_RATE"], weight_decay=1e-3))


def adapt(model, patches, recipe, experiment):
    """`adapt` of common.train_network for the METHOD of the recipe."""
    if recipe["METHOD"].startswith("ST-Net"):
        nn.init.zeros_(model.head[-1].weight)  # with START_AT_MEAN, its first prediction is the training mean
        return (StNet(model) if recipe["METHOD"] == "ST-Net" else model), patches
    if recipe["METHOD"] != "BLEEP":
        return model, patches
    expression = torch.from_numpy(experiment.data.target[experiment.rows("train")])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(common.seed_of(experiment.seed, "projections"))
        model.head, model.spots = Projection(model.head[-1].in_features), Projection(expression.shape[1])
    return Bleep(model, expression, recipe["MICRO_BATCH"]).to(model.mean.device), patches


# ---------------------------------------------------------------------------------------------- baselines, controls
def training_mean(recipe, experiment, folder):
    """Each gene's mean over the training spots: constant, so r is undefined and MSE what is left to explain."""
    mean = experiment.data.target[experiment.rows("train")].mean(0)
    return np.tile(mean, (len(experiment.rows(*common.SPLITS)), 1)), {"weights": "none"}


def ridge_on_features(recipe, experiment, folder):
    """Ridge on 256 principal components of a frozen backbone's features; all of it fitted on training spots, alpha by
    leaving each of them out in turn.
    """
    data, train = experiment.data, experiment.rows("train")
    features = common.encode_patches(data.patches, recipe["FEATURES"], recipe, experiment.seed)
    pca = PCA(min(256, len(train) - 1, features.shape[1]), random_state=experiment.seed)
    ridge = make_pipeline(StandardScaler(), pca, RidgeCV(np.logspace(0, 7, 15))).fit(
        features[train], data.target[train]
    )
    predicted = ridge.predict(features[experiment.rows(*common.SPLITS)]).astype(np.float32)
    weights = "pretrained" if recipe["PRETRAINED"] else "random"
    return predicted, {"weights": weights, "alpha": float(ridge[-1].alpha_)}


def depth_only(recipe, experiment, folder):
    """Control: a straight line a gene through the log of the spot's own total counts, which an image does not show."""
    data, train = experiment.data, experiment.rows("train")
    depth = np.log(data.counts.obs["n_counts"].to_numpy(np.float64))[:, None]
    line = LinearRegression().fit(depth[train], data.target[train])
    return line.predict(depth[experiment.rows(*common.SPLITS)]).astype(np.float32), {"weights": "none"}


def nearest_spot(recipe, experiment, folder):
    """Control: expression measured at the nearest position of the neighbouring training slide, slides laid upon each
    other by the middle of their spots. NaN for a spot whose slide has no such neighbour.
    """
    data, train, rows = experiment.data, experiment.rows("train"), experiment.rows(*common.SPLITS)
    slide, pitch = data.spots["tissue_index"], data.spots["pitch"].to_numpy()[:, None]
    places = data.spots[["pxl_col", "pxl_row"]]
    places = (places - places.groupby(slide).transform("mean")).to_numpy() / pitch
    slide, predicted = slide.to_numpy(), np.full((len(rows), len(data.genes)), np.nan, np.float32)
    for s in np.unique(slide[rows]):
        others = np.setdiff1d(slide[train], s)
        if len(others):
            source = train[slide[train] == others[np.abs(others - s).argmin()]]
            at = np.flatnonzero(slide[rows] == s)
            predicted[at] = data.target[source[cKDTree(places[source]).query(places[rows[at]])[1]]]
    return predicted, {"weights": "none"}


# ---------------------------------------------------------------------------------------------- table
def add_costs_and_gain(table, parts):
    """`add` of common.report_scores: parameters (millions), minutes, and HEG r over BLEEP's of the same line."""
    mean = pd.DataFrame([part.mean(numeric_only=True) for part in parts])
    table["million"] = (mean.get("parameters_total", mean["heg"] * np.nan) / 1e6).map("{:.1f}".format)
    table["minutes"] = (mean["seconds"] / 60).map("{:.1f}".format)
    bleep = (table["setting"].str.strip() == "BLEEP") & (mean["heg"] > 0)
    keys = pd.MultiIndex.from_frame(table[["split", "truth", "slide"]])
    gain = mean["heg"] / keys.map(dict(zip(keys[bleep], mean["heg"][bleep], strict=True))) - 1
    table["over BLEEP"] = gain.map("{:+.0%}".format)
    table.replace({"nan": "-", "+nan%": "-"}, inplace=True)


def main():
    computed = {
        "training mean": training_mean,
        "ridge (colour)": common.ridge_on_colour,
        f"ridge ({FEATURES})": ridge_on_features,
        "depth only (control)": depth_only,
        "nearest spot (control)": nearest_spot,
    }
    trained, rows = methods(), []
    names = (*trained, *computed)
    common.require(ONLY in ("", *names), f"--only {ONLY}: expected one of {'; '.join(names)}")
    recipe, experiments = common.open_run(globals())
    common.print_header(globals(), recipe, experiments)
    data, note = experiments[0].data, "quick budget, no evidence: " * QUICK
    own = ("TARGET", "PROTOCOL", "FEATURES", "PRETRAINED", "IMAGE_SIZE", "DEVICE", "PRECISION")
    for name in [name for name in computed if ONLY in ("", name)]:  # before the trainings: what fails, fails now
        for experiment in experiments:
            rows += common.run_setting(name, {key: recipe[key] for key in own}, experiment, computed[name])
    rows = (common.run_grid(globals(), trained, experiments, adapt) if ONLY in ("", *trained) else []) + rows
    against = {} if ONLY else {name: "BLEEP" for name in names if name != "BLEEP"}
    title = f"{note}methods; a control uses what no image model may"
    common.report_scores(title, experiments, rows, against, add_costs_and_gain)
    if PUBLISHED and (data.root / "published_results.csv").is_file():
        published = pd.read_csv(data.root / "published_results.csv")
        common.print_table("published, not computed here, other protocols", data, published.fillna("-"))
    common.finish_run(globals(), experiments[0], rows)


if __name__ == "__main__":
    common.run_script(globals())
