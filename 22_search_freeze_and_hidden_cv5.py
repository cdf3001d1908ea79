"""Cross-validated search: how many trailing stages to train, and how wide a head.

Question   Which number of trainable stages and hidden units predicts spots best that were left out of training?
Reads      <DATA_ROOT>/dataset/ (script 19)
Writes     <OUT>/rows.csv, a folder a training and one for each setting's out-of-fold predictions (as script 20),
           search.png
Prints     header, the table of out-of-fold r with mean and sd over the folds, the chosen setting on the test slide,
           one JSON line
Command    python 22_search_freeze_and_hidden_cv5.py --data-root GSE240429_data
Override   python 22_search_freeze_and_hidden_cv5.py --data-root HER2ST_data --test-slide 4 --pretrained false
           python 22_search_freeze_and_hidden_cv5.py --quick      (four settings, two folds: no evidence)
Time       --quick: 80 s, slides included; HER2ST, README's small budget: 53 min (two Intel Xeon cores, 2026-11-23)
Source     the paper's search, whose settings were all the same network

The choice is by out-of-fold HEG, then HVG, never by the test slide. (A fold's best epoch is chosen on its validation
spots, so out-of-fold r flatters a little, every setting alike.) The chosen one is trained once on all training spots,
up to the epoch that was best over the folds. A frozen stage keeps its BatchNorm, parameters and statistics alike; with
all of them frozen, features are computed once: of each plain patch and, where AUG asks, of VIEWS augmented views of it,
one of which a spot draws in each epoch.
"""

import dataclasses
import functools

import anndata
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

import common

# ---------------------------------------------------------------------------------------------- constants
DATA_ROOT = "GSE240429_data"  # folder with slides.csv and dataset/
OUT = ""  # folder of the results; empty = runs/<this script>/<data root's name>

TARGET = "harmony"  # harmony (the paper's) or lognorm
PROTOCOL = "paper"  # folds of random spots; block: of spatial blocks; loso: of slides, each slide once the test slide
TRAIN_SLIDES = ()  # tissue_index values; empty = every slide but the test slide
TEST_SLIDE = 3  # tissue_index; GSE240429's C73_C1
FOLDS = 5
SEEDS = (42,)  # one search each

BACKBONE = "efficientnet_b0"  # any timm name
PRETRAINED = True  # ImageNet weights; false = random weights
START_AT_MEAN = False  # true = output bias starts at each gene's training mean

AUG = "mpa"  # mpa (the paper's), stnet (8 symmetries) or none
VIEWS = 8  # augmented views of each patch whose features a wholly frozen backbone computes
IMAGE_SIZE = 224  # px of the network's input; patches are 224 px of the slide
EPOCHS = 30
BATCH_SIZE = 32  # a last batch of one spot is left out, since BatchNorm needs two
LEARNING_RATE = 3e-4  # Adam; cosine to zero over the epochs

DEVICE = "auto"  # auto, cpu or cuda
PRECISION = "auto"  # auto, bf16, fp16 or fp32
ONLY = ""  # one setting, as "stages=3 hidden=1024", without the choice; empty = all
QUICK = False  # the small budget below, on simulated slides
# --------------------------------------------------------------------------------------------------------

# Trainable stages, from the head convolution back to the stem: 9 = all of EfficientNet-B0. Dearest first, so that the
# time left is not told too short.
STAGES = (9, 7, 5, 3, 1, 0)
HIDDENS = (0, 1024, 3000, 4096)  # units; 0 = a linear head

QUICK_BUDGET = {
    "DATA_ROOT": "SIMULATED_data",
    "TARGET": "lognorm",
    "FOLDS": 2,
    "PRETRAINED": False,
    "START_AT_MEAN": True,
    "IMAGE_SIZE": 64,
    "EPOCHS": 3,
    "LEARNING_RATE": 1e-3,
    "STAGES": (9, 0),
    "HIDDENS": (0, 512),
}


def hold_out(spots, recipe, seed):
    """`split` of common.open_run: "test", and "train" for every spot that the folds may use."""
    outer = "loso" if recipe["PROTOCOL"] == "loso" else "paper"
    trainings = common.split_spots(spots, recipe | {"PROTOCOL": outer, "VALID_FRACTION": 0.5}, seed)
    return [np.where(roles == "valid", "train", roles) for roles in trainings]


def split_folds(whole):
    """The experiments that `whole`'s training spots are split into, FOLDS or, under loso, one a slide."""
    pool, slides = whole.rows("train"), whole.data.spots["tissue_index"].to_numpy()
    count = len(np.unique(slides[pool])) if PROTOCOL == "loso" else FOLDS
    folds = common.split_folds(whole.data.spots, pool, PROTOCOL, count, whole.seed)
    first = whole.fold * count
    return [dataclasses.replace(whole, roles=roles, fold=fold) for fold, roles in enumerate(folds, first)]


class FrozenFeatures(nn.Module):
    """In place of a backbone that never changes: (B, 1, 1, 1) spot numbers -> (B, F) features of the plain patch; while
    training, of one of its augmented views drawn at random.
    """

    def __init__(self, features):
        super().__init__()
        self.register_buffer("features", features, persistent=False)  # (1 + views, N, F), the plain patches first

    def forward(self, spots):
        spots = spots.flatten().round().long()
        last = len(self.features) - 1
        if not self.training or not last:
            return self.features[0, spots]
        return self.features[torch.randint(1, last + 1, (len(spots),)).to(spots.device, non_blocking=True), spots]


@functools.lru_cache(maxsize=4)  # all folds and widths of the head share them; one entry a seed
def compute_features(patches, seed, views, constants):
    """(1 + views, N, F) features of the recipe's untrained backbone; view 0 is the plain patch."""
    recipe = dict(constants)
    device, dtype, _ = common.choose_device(recipe)
    model = common.build_model(recipe | {"TRAINABLE_STAGES": 0, "HIDDEN": 0}, 1, seed)
    model = model.to(device, memory_format=torch.channels_last).eval()
    patches, parts = common.place_patches(patches, recipe["IMAGE_SIZE"], device), []
    tqdm.write(f"all stages frozen: features of the plain patches and {views} augmented views are computed once")
    with torch.inference_mode(), tqdm(total=(1 + views) * len(patches), unit="patch", leave=False) as bar:
        for view in range(1 + views):
            generator = torch.Generator().manual_seed(common.seed_of(seed, "view", view))
            draw = common.draw_augmentation(len(patches), recipe["AUG"] if view else "none", generator)
            batches = torch.arange(len(patches)).split(common.PREDICT_BATCH[device.type])
            for rows, images in zip(batches, common.read_ahead(patches, batches, device), strict=True):
                images = common.augment(images, *(part[rows] for part in draw))
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    parts.append(model.encode(images).float())
                bar.update(len(rows))
    return torch.cat(parts).view(1 + views, len(patches), -1)


def use_features(model, patches, recipe, experiment):
    """`adapt` of common.train_network: with no stage to train, the head alone is trained, on features."""
    if recipe["TRAINABLE_STAGES"] != 0:
        return model, patches
    names = ("BACKBONE", "PRETRAINED", "IMAGE_SIZE", "AUG", "DEVICE", "PRECISION")
    views = min(VIEWS, recipe["EPOCHS"]) * (recipe["AUG"] != "none")
    features = compute_features(experiment.data.patches, experiment.seed, views, tuple((k, recipe[k]) for k in names))
    spots = torch.arange(features.shape[1], dtype=torch.float32).view(-1, 1, 1, 1)
    return nn.Sequential(FrozenFeatures(features), model.head), spots


def join_folds(rows, recipe, experiment, folder):
    """`compute` of common.run_setting: the folds' predictions, each spot's by the network that did not see it."""
    rows = [row for row in rows if row["truth"] == recipe["TARGET"]]
    tables = [anndata.read_h5ad(experiment.out / row["folder"] / "predictions.h5ad") for row in rows]
    ids = experiment.data.spots["id"].to_numpy()[experiment.rows("oof")]
    facts = {k: rows[0][k] for k in ("weights", "parameters_backbone", "parameters_trainable", "parameters_total")}
    curves = [pd.read_csv(experiment.out / row["folder"] / "history.csv")["valid_mse"] for row in rows]
    facts |= {"best_epoch": int(np.mean(curves, axis=0).argmin()) + 1, "seconds": sum(row["seconds"] for row in rows)}
    return anndata.concat(tables)[ids].X, facts


def rank_settings(rows):
    """Names of the settings, best first: by out-of-fold HEG, then HVG, against the target, mean over the seeds. A
    setting whose r of HEG is undefined, or defined for fewer genes than another's, is left out.
    """
    table = pd.DataFrame(rows).query("split == 'oof' and truth == @TARGET").astype({"heg": float, "hvg": float})
    table = table.groupby("setting", sort=False)[["heg", "hvg", "heg_n"]].mean().dropna(subset="heg")
    table = table[table["heg_n"] == table["heg_n"].max()]
    if table.empty:
        raise common.InputError("no setting has a defined r of HEG: its genes are missing from the panel or constant")
    return table.sort_values(["heg", "hvg"], ascending=False, kind="stable").index.tolist()


def add_folds(trained, table, parts):
    """`add` of common.report_scores: mean±sd over the folds of each gene group's r."""
    trained = pd.DataFrame(trained).astype(dict.fromkeys(("heg", "hvg", "mg", "all"), float))
    for group in ("HEG", "HVG", "MG", "all"):
        r = trained.groupby(["setting", "truth"])[group.lower()].agg(["mean", "std"])
        r = r.loc[[(part["setting"].iloc[0], part["truth"].iloc[0]) for part in parts]]
        form = r["mean"].map("{:.3f}±".format) + r["std"].map("{:.3f}".format)
        table[f"{group} folds"] = form.mask(r["mean"].isna(), "-").to_numpy()


def draw_figure(path, title, rows):
    """Out-of-fold HEG r of the grid, against the target."""
    table = pd.DataFrame(rows).query("truth == @TARGET").astype({"heg": float})
    grid = table.groupby("setting")["heg"].mean()
    values = np.array([[grid[f"stages={k} hidden={h}"] for h in HIDDENS] for k in STAGES])
    figure = Figure(figsize=(1.5 + 0.9 * len(HIDDENS), 1.5 + 0.45 * len(STAGES)), layout="constrained")
    ax = figure.subplots()
    figure.colorbar(ax.imshow(values, aspect="auto"), label="mean Pearson r, HEG, out of fold")
    for (y, x), value in np.ndenumerate(values):
        ax.text(x, y, f"{value:.3f}", ha="center", va="center", size=8, bbox={"fc": "white", "ec": "none", "pad": 1})
    ax.set_xticks(range(len(HIDDENS)), HIDDENS)
    ax.set_yticks(range(len(STAGES)), STAGES)
    ax.set(xlabel="hidden units", ylabel="trainable stages")
    ax.set_title(title, size=9)
    common.save_figure(path, figure, "out-of-fold r by trainable stages and hidden units")


def main():
    settings = {
        f"stages={k} hidden={h}": {"TRAINABLE_STAGES": k, "HIDDEN": h, "TTA": False} for k in STAGES for h in HIDDENS
    }
    recipe, wholes = common.open_run(globals(), hold_out)
    common.print_header(globals(), recipe, wholes)
    with torch.device("meta"):  # InputError now, not hours from now, where the backbone has fewer stages
        common.build_model(recipe | {"TRAINABLE_STAGES": max(STAGES), "HIDDEN": 0, "PRETRAINED": False}, 1, 0)
    data, out, note = wholes[0].data, wholes[0].out, "quick budget, no evidence: " * QUICK
    folds, oof, final = {(whole.seed, whole.fold): split_folds(whole) for whole in wholes}, [], []
    trained = common.run_grid(globals(), settings, [fold for of in folds.values() for fold in of], use_features)
    for name in [name for name in settings if ONLY in ("", name)]:
        for whole in wholes:
            own = [(name, fold.seed, fold.fold) for fold in folds[whole.seed, whole.fold]]
            of = [row for row in trained if (row["setting"], row["seed"], row["fold"]) in own]
            left_out = dataclasses.replace(whole, roles=np.where(whole.roles == "train", "oof", ""))
            changed = recipe | settings[name] | {"JOINED": sorted({row["folder"] for row in of})}
            oof += common.run_setting(name, changed, left_out, functools.partial(join_folds, of))
    order = rank_settings(oof)
    oof.sort(key=lambda row: order.index(row["setting"]) if row["setting"] in order else len(order))
    title = f"{note}out of fold over {len(folds[SEEDS[0], 0])} folds, best setting first"
    common.report_scores(title, wholes, oof, add=functools.partial(add_folds, trained))
    if not ONLY:
        draw_figure(out / "search.png", f"{data.title}{note}", oof)
        for whole in wholes:  # each test slide's setting is chosen on its own training spots, over the seeds
            of = [row for row in oof if row["fold"] == whole.fold]
            best = rank_settings(of)[0]
            (keep,) = {row["best_epoch"] for row in of if (row["setting"], row["seed"]) == (best, whole.seed)}
            train = functools.partial(common.train_network, keep=keep, adapt=use_features)
            changed = recipe | settings[best] | {"KEEP": keep}
            final += common.run_setting(best, changed, whole, train)
        title = f"{note}the chosen setting, trained on all training spots up to its folds' best epoch"
        common.report_scores(title, wholes, final)
        print(f"figure: {out / 'search.png'}")
    common.finish_run(globals(), wholes[0], oof + final + trained)


if __name__ == "__main__":
    common.run_script(globals())
