"""Does a cluster id help? Spots are clustered by image and place, and the id goes to
EfficientNet-B0's head.

Question   Does knowing the cluster of a patch help to predict its expression, more than a shuffled
           id does?
Reads      <DATA_ROOT>/dataset/ (script 19)
Writes     <OUT>/rows.csv, a folder a row (as script 20), grid.csv, clusters.csv, clusters.png,
           paired_differences.csv
Prints     header, the grid of weights with its cluster scores, the table of r with paired
           differences
Command    python 24_cluster_id.py --data-root GSE240429_data
Override   python 24_cluster_id.py --data-root HER2ST_data --test-slide 4 --features ""
           python 24_cluster_id.py --quick      (a smoke test, not a result)
Time       --quick: 85 s, slides included (two Intel Xeon cores, 2026-11-23)
Source     the paper's cluster-id experiment

Training spots alone are clustered: principal components of the image features, beside sines and
cosines of array row and column, UMAP, HDBSCAN. Of the weights in WEIGHTS, those with the highest
silhouette are used. A validation or test spot, and one that HDBSCAN leaves out, gets the id that
most of its NEIGHBOURS nearest clustered training spots have, by the same features: expression is
never looked at. The shuffled ids are the same ids in another order within each slide.
"""

from study import shell

if __name__ == "__main__":  # Check the command before the slow imports.
    shell.check_command(__file__, dataset=True, files=("GENE_SETS",))


import functools
import hashlib

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from sklearn.cluster import HDBSCAN
from sklearn.decomposition import PCA
from sklearn.metrics import calinski_harabasz_score, davies_bouldin_score, silhouette_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import nn

from study import drawing, files, hashes, methods, printing, recipes, runs, shell
from study.errors import InputError
from study.features import encode_spots

# ---------------------------------------------------------------------------------------- constants
DATA_ROOT = "GSE240429_data"  # folder with slides.csv and dataset/
OUT = ""  # folder of the results; empty = runs/<this script>/<data root's name>

TARGET = "harmony"  # harmony (the paper's), lognorm or, of protocol hest, log1p
PROTOCOL = "paper"  # paper, loso (each slide tests once), block (spatial folds) or hest
TRAIN_SLIDES = ()  # tissue_index values; empty = every slide but the test slide
TEST_SLIDE = 3  # tissue_index; GSE240429's C73_C1
VALID_FRACTION = 0.2  # of the training slides' spots
SEEDS = (42, 43, 44)  # one training, split and clustering each, the same for every setting
GENE_SETS = ""  # a .gmt, or a CSV group,gene: sets that are scored beside HEG, HVG and MG
RECIPE = "paper"  # paper or published: see study/recipes.py; flags and edited constants win

FEATURES = "efficientnet_b0"  # timm name: its features are clustered; empty = colour statistics
MIN_CLUSTER = 0.02  # of the training spots; the smallest cluster
NEIGHBOURS = 15  # of UMAP, and of the vote on a spot's id
EMBEDDING = 32  # numbers that an id becomes, learned

BACKBONE = "efficientnet_b0"  # any timm name
PRETRAINED = True  # ImageNet weights, also of FEATURES: true, false, a file or a folder
HIDDEN = 3000  # units of the head's hidden layer; 0 = a linear head
HEAD_START = "mean"  # the last layer: random, mean (0, bias at the training means) or ridge

IMAGE_SIZE = 224  # px of the network's input; patches are 224 px of the slide
EPOCHS = 30
BATCH_SIZE = 32  # a last batch of one spot is left out, since BatchNorm needs two
LEARNING_RATE = 3e-4  # Adam; cosine to zero over the epochs, or constant if published
LOSS = "mse"  # a name of common.LOSSES

DEVICE = "auto"  # auto, cpu or cuda
PRECISION = "auto"  # auto, bf16, fp16 or fp32
ONLY = ""  # one of the settings; empty = all
QUICK = False  # the small budget below, on simulated slides
# --------------------------------------------------------------------------------------------------

# Of image features and of positions.
WEIGHTS = ((1, 0), (1, 0.25), (1, 0.5), (1, 1), (0.5, 1), (0, 1))
SETTINGS = ("no id", "cluster id", "shuffled id")
MOST_CLUSTERS = 256  # an id travels as a byte

# From the ridge start of recipe best an id changes next to nothing, and without training nothing.
ALLOWED = {"RECIPE": ("paper", "published"), "EPOCHS": (1, 1_000_000)}

QUICK_BUDGET = recipes.QUICK | {"SEEDS": (42,), "FEATURES": "", "WEIGHTS": ((1, 0), (1, 0.5))}


# ----------------------------------------------------------------------------------------- clusters
def encode_positions(spots, frequencies=16):
    """(N, 64) sines and cosines of array row and column within the slide, half a wave to eight."""
    places = spots[["array_row", "array_col"]].astype(float)
    by_slide = places.groupby(spots["tissue_index"])
    low = by_slide.transform("min")
    extent = (by_slide.transform("max") - low).clip(lower=1)
    scaled = ((places - low) / extent).to_numpy()
    angles = scaled[:, :, None] * np.pi * np.geomspace(1, 16, frequencies)
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=2)
    return waves.reshape(len(spots), -1)


def describe_spots(data, train, recipe, seed):
    """(N, up to 50) principal components of the standardised image features, and (N, 64) positional
    codes, both scaled to a mean squared length of 1; fitted on the training spots.
    """
    features = data.annotations.obsm["colour"]
    if recipe["FEATURES"]:
        plain = recipe | {"BACKBONE": recipe["FEATURES"], "POOL_STAGES": False}
        features, _ = encode_spots(data, plain, seed)
    features = StandardScaler().fit(features[train]).transform(features)
    components = min(50, len(train) - 1, features.shape[1])
    pca = PCA(components, random_state=seed % 2**32)
    pca.fit(features[train])
    parts = pca.transform(features), encode_positions(data.spots)
    return [part / np.sqrt((part[train] ** 2).sum(1).mean()) for part in parts]


def cluster_spots(data, train, recipe, seed):
    """(ids, map, grid): the cluster (N,) of every spot, UMAP's map of the training spots (n, 2),
    and a table of cluster scores, a line a pair of weights, best silhouette first. InputError where
    no pair gives two clusters.
    """
    parts = describe_spots(data, train, recipe, seed)
    threads = torch.get_num_threads()
    lines, found = [], {}
    for weights in WEIGHTS:
        weighted = [weight * part for weight, part in zip(weights, parts, strict=True)]
        joint = np.hstack(weighted).astype(np.float32)
        points, ids = find_clusters(joint[train], seed)
        lines.append(dict(zip(("image", "position"), weights, strict=True)) | score(points, ids))
        if 0 < ids.max() < MOST_CLUSTERS:
            found[weights] = assign_ids(joint, train, ids), points
    # numba has set them to the number of cores, whatever the user asked for.
    torch.set_num_threads(threads)
    if not found:
        raise InputError(
            f"no weights of {WEIGHTS} give 2 to {MOST_CLUSTERS} clusters: "
            f"change MIN_CLUSTER ({MIN_CLUSTER})"
        )
    grid = pd.DataFrame(lines).sort_values("silhouette", ascending=False, kind="stable")
    ids, points = found[tuple(grid.iloc[0][["image", "position"]])]
    return ids, points, grid


def find_clusters(joint, seed):
    """UMAP's map (n, 2) of the training spots, and HDBSCAN's cluster of each, -1 for none."""
    import umap  # here, because numba takes seconds to load

    neighbours = min(NEIGHBOURS, len(joint) - 1)
    reducer = umap.UMAP(n_neighbors=neighbours, min_dist=0.0, random_state=seed % 2**32, n_jobs=1)
    points = reducer.fit_transform(joint)
    smallest = max(2, round(MIN_CLUSTER * len(joint)))
    return points, HDBSCAN(smallest, copy=True).fit_predict(points)


def score(points, ids):
    """{column: number} of the clusters of the training spots, left-out ones aside."""
    inside = ids >= 0
    line = {"clusters": ids.max() + 1, "left out": f"{1 - inside.mean():.0%}"}
    if 0 < ids.max() < MOST_CLUSTERS:
        points, ids = points[inside], ids[inside]
        line["silhouette"] = silhouette_score(points, ids)
        line["Calinski-Harabasz"] = calinski_harabasz_score(points, ids)
        line["Davies-Bouldin"] = davies_bouldin_score(points, ids)
    return line


def assign_ids(joint, train, ids):
    """(N,) cluster of every spot: its own, or the vote of the nearest training spots with one."""
    clustered = train[ids >= 0]
    vote = KNeighborsClassifier(min(NEIGHBOURS, len(clustered)))
    vote.fit(joint[clustered], ids[ids >= 0])
    every = vote.predict(joint)
    every[clustered] = ids[ids >= 0]
    return every


def shuffle_ids(ids, slides, seed):
    """The same ids in another order within each slide."""
    shuffled = ids.copy()
    random = np.random.default_rng(hashes.seed_of(seed, "shuffled id"))
    for slide in np.unique(slides):
        shuffled[slides == slide] = random.permutation(ids[slides == slide])
    return shuffled


# ------------------------------------------------------------------------------------------ network
class PatchesWithId:
    """Patches whose fourth channel is the spot's id.

    Symmetries and warps leave the middle of a constant channel as it is.
    """

    def __init__(self, patches, ids):
        self.patches = patches
        self.device = patches.device
        self.ids = torch.from_numpy(ids.astype(np.uint8)).to(patches.device)

    def __getitem__(self, spots):
        images = self.patches[spots]
        ids = self.ids[spots][:, None, None, None]
        return torch.cat([images, ids.expand(-1, 1, *images.shape[2:])], dim=1)


class WithId(nn.Module):
    """The network with a learned embedding of the id beside the image features, at the head."""

    def __init__(self, model, n_ids, size):
        super().__init__()
        self.model = model
        model.embedding = nn.Embedding(n_ids, size)
        linear = [isinstance(layer, nn.Linear) for layer in model.head]
        first = model.head[linear.index(True)]
        wider = nn.Linear(first.in_features + size, first.out_features)
        with torch.no_grad():  # the same function as without an id, until a step is made
            wider.weight.zero_()
            wider.weight[:, : first.in_features] = first.weight
            wider.bias.copy_(first.bias)
        model.head[linear.index(True)] = wider

    def forward(self, pixels):
        middle = pixels.shape[3] // 2
        ids = pixels[:, 3, middle, middle].round().long()
        features = self.model.encode(pixels[:, :3])
        return self.model.head(torch.cat([features, self.model.embedding(ids)], dim=1))


def network(ids_of, row):
    """A method, given the cluster of every spot by seed and fold: as methods.network, with the
    row's ID at the network's head.
    """
    if row.recipe["ID"] == "no id":
        return methods.network(row)
    model = methods.start_network(row)
    split = row.split
    ids = ids_of[split.seed, split.fold]
    if row.recipe["ID"] == "shuffled id":
        ids = shuffle_ids(ids, split.data.spots["tissue_index"].to_numpy(), split.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hashes.seed_of(split.seed, "embedding"))
        with_id = WithId(model, ids.max() + 1, row.recipe["EMBEDDING"]).to(row.device)
    patches = PatchesWithId(row.place_patches(), ids)
    row.fit(with_id, patches, model=model)
    return row.predict(with_id, patches)


# ------------------------------------------------------------------------------------------- figure
def draw_clusters(path, title, split, ids, points):
    """UMAP, share of slides and sample patches of clusters; below, the ids on the tissue."""
    data = split.data
    train = split.spots("train")
    slides = data.spots["tissue_index"].to_numpy()
    shown = np.unique(slides)
    colours = {"cmap": "tab20", "vmin": 0, "vmax": max(ids.max(), 19)}
    columns = max(4, len(shown))
    figure = Figure(figsize=(3.4 * columns, 7), layout="constrained")
    above, below = figure.subplots(2, columns)
    above[0].scatter(*points.T, c=ids[train], s=4, **colours)
    above[0].set_title("UMAP of the training spots, by cluster", size=9)
    for slide in np.unique(slides[train]):
        above[1].scatter(*points[slides[train] == slide].T, s=4, label=f"slide {slide}")
    above[1].set_title("by slide", size=9)
    above[1].legend(frameon=False, markerscale=3, fontsize=8)
    share = pd.crosstab(ids[train], slides[train], normalize="index")
    share.plot.barh(stacked=True, ax=above[2], legend=False, width=0.9)
    above[2].set(ylabel="cluster", xlabel="share of slides (training spots)")
    show_patches(above[3], data.patches, train, ids)
    for ax, slide in zip(below, shown, strict=False):
        spots = data.spots[slides == slide]
        ax.scatter(spots["pxl_col"], -spots["pxl_row"], c=ids[slides == slide], s=8, **colours)
        test = " (test)" if slide in split.slides("test") else ""
        ax.set_title(f"slide {slide}{test}", size=9)
    for ax in (*below, *above[4:]):
        ax.set(aspect="equal")
        ax.set_axis_off()
    figure.suptitle(title)
    drawing.save_figure(path, figure, "clusters of spots on every slide")


def show_patches(ax, patches, train, ids, columns=5, rows=10):
    """Draw a few training patches of each of the first clusters, a row a cluster."""
    random = np.random.default_rng(hashes.seed_of("sample patches"))
    sheet = []
    for cluster in range(min(ids.max() + 1, rows)):
        chosen = random.choice(train[ids[train] == cluster], columns)
        sheet.append(np.hstack([patches[spot, ::4, ::4] for spot in chosen]))
    ax.imshow(np.vstack(sheet))
    ax.set_yticks(28 + 56 * np.arange(len(sheet)), range(len(sheet)))
    ax.set(xticks=[], title="sample patches", ylabel="cluster")


# --------------------------------------------------------------------------------------------- main
def cluster_every_split(run):
    """Cluster the spots for every training; save grid.csv, clusters.csv and clusters.png of it.

    Returns the ids of every spot by seed and fold.
    """
    every = {}
    for split in run.splits:
        found = cluster_spots(run.data, split.spots("train"), run.recipe, split.seed)
        every[split.seed, split.fold] = found
    ids, points, grid = every[SEEDS[0], 0]
    files.save_csv(run.out / "grid.csv", grid)
    title = run.title("clusters of the first training by weights; the first line is used")
    printing.print_table(title, grid.round(3).fillna("-"), keys=2)
    draw_clusters(
        run.out / "clusters.png", run.title("the first training"), run.splits[0], ids, points
    )
    ids_of = {training: found[0] for training, found in every.items()}
    table = pd.DataFrame({f"cluster_{seed}_{fold}": ids for (seed, fold), ids in ids_of.items()})
    files.save_csv(run.out / "clusters.csv", run.data.spots[["id", "tissue_index"]].join(table))
    return ids_of


def main():
    run = runs.open_run(globals())
    run.print_header()
    # A row follows from the ids, not from how they were found; without an id, from neither.
    shared = {"TTA": False, "AUG": "mpa", "TRAINABLE_STAGES": -1}
    shared |= dict.fromkeys(("FEATURES", "MIN_CLUSTER", "NEIGHBOURS"))
    settings = {name: shared | {"ID": name} for name in SETTINGS}
    settings["no id"] |= {"EMBEDDING": None, "IDS": None}
    settings = run.chosen(settings)
    ids_of = {} if [*settings] == ["no id"] else cluster_every_split(run)

    def settings_of(split):
        if not ids_of:
            return settings
        found = hashlib.sha256(ids_of[split.seed, split.fold].tobytes()).hexdigest()
        return {name: {"IDS": found} | setting for name, setting in settings.items()}

    run.train(settings_of, functools.partial(network, ids_of))
    minus = {} if ONLY else {"cluster id": "no id", "shuffled id": "no id"}
    run.print_scores(f"{methods.name_network(BACKBONE)} with and without a cluster id", minus=minus)
    if ids_of:
        run.show_figure(run.out / "clusters.png")
    run.finish()


if __name__ == "__main__":
    shell.run_script(globals())
