"""Does a cluster id help? Spots are clustered by image and place, and the id goes to EfficientNet-B0's head.

Question   Does knowing the cluster of a patch help to predict its expression, more than a shuffled id does?
Reads      <DATA_ROOT>/dataset/ (script 19)
Writes     <OUT>/rows.csv, a folder a row (as script 20), grid.csv, clusters.csv, clusters.png, paired_differences.csv
Prints     header, the grid of weights with its cluster scores, the table of r with paired differences, one JSON line
Command    python 24_cluster_id.py --data-root GSE240429_data
Override   python 24_cluster_id.py --data-root HER2ST_data --test-slide 4 --pretrained false --features ""
           python 24_cluster_id.py --quick      (small budget on simulated slides, one seed: no evidence)
Time       --quick: 85 s, slides included; HER2ST, README's small budget: 14 min (two Intel Xeon cores, 2026-11-23)
Source     the paper's cluster-id experiment

Training spots alone are clustered: principal components of the image features, beside sines and cosines of array row
and column, UMAP, HDBSCAN. Of the weights in WEIGHTS, those with the highest silhouette are used. A validation or test
spot, and one that HDBSCAN leaves out, gets the id that most of its NEIGHBOURS nearest clustered training spots have, by
the same features: expression is never looked at. The shuffled ids are the same ids in another order within each slide.
"""

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

import common

# ---------------------------------------------------------------------------------------------- constants
DATA_ROOT = "GSE240429_data"  # folder with slides.csv and dataset/
OUT = ""  # folder of the results; empty = runs/<this script>/<data root's name>

TARGET = "harmony"  # harmony (the paper's) or lognorm
PROTOCOL = "paper"  # paper, loso (each slide is once the test slide) or block (folds of spatial blocks)
TRAIN_SLIDES = ()  # tissue_index values; empty = every slide but the test slide
TEST_SLIDE = 3  # tissue_index; GSE240429's C73_C1
VALID_FRACTION = 0.2  # of the training slides' spots
SEEDS = (42, 43, 44)  # one training, split and clustering each, the same for every setting

FEATURES = "efficientnet_b0"  # timm name of the frozen backbone whose features are clustered; empty = colour statistics
MIN_CLUSTER = 0.02  # of the training spots; the smallest cluster
NEIGHBOURS = 15  # of UMAP, and of the vote on a spot's id
EMBEDDING = 32  # numbers that an id becomes, learned

BACKBONE = "efficientnet_b0"  # any timm name
PRETRAINED = True  # ImageNet weights; false = random weights, also of FEATURES
HIDDEN = 3000  # units of the head's hidden layer; 0 = a linear head
START_AT_MEAN = False  # true = output bias starts at each gene's training mean

IMAGE_SIZE = 224  # px of the network's input; patches are 224 px of the slide
EPOCHS = 30
BATCH_SIZE = 32  # a last batch of one spot is left out, since BatchNorm needs two
LEARNING_RATE = 3e-4  # Adam; cosine to zero over the epochs

DEVICE = "auto"  # auto, cpu or cuda
PRECISION = "auto"  # auto, bf16, fp16 or fp32
ONLY = ""  # one of the settings; empty = all
QUICK = False  # the small budget below, on simulated slides
# --------------------------------------------------------------------------------------------------------

WEIGHTS = ((1, 0), (1, 0.25), (1, 0.5), (1, 1), (0.5, 1), (0, 1))  # of image features and of positions
SETTINGS = ("no id", "cluster id", "shuffled id")

QUICK_BUDGET = {
    "DATA_ROOT": "SIMULATED_data",
    "TARGET": "lognorm",
    "SEEDS": (42,),
    "PRETRAINED": False,
    "FEATURES": "",
    "HIDDEN": 512,
    "START_AT_MEAN": True,
    "IMAGE_SIZE": 64,
    "EPOCHS": 3,
    "LEARNING_RATE": 1e-3,
    "WEIGHTS": ((1, 0), (1, 0.5)),
}


# ---------------------------------------------------------------------------------------------- clusters
def encode_positions(spots, frequencies=16):
    """(N, 64) sines and cosines of array row and column, each scaled to 0..1 within its slide; half a wave to eight."""
    places = spots[["array_row", "array_col"]].astype(float)
    low, high = (places.groupby(spots["tissue_index"]).transform(end) for end in ("min", "max"))
    angles = (
        ((places - low) / (high - low).clip(lower=1)).to_numpy()[:, :, None] * np.pi * np.geomspace(1, 16, frequencies)
    )
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=2).reshape(len(spots), -1)


def describe_spots(data, train, recipe, seed):
    """(N, up to 50) principal components of the standardised image features, and (N, 64) positional codes, both scaled
    to a mean squared length of 1; fitted on the training rows.
    """
    features = data.counts.obsm["colour"]
    if recipe["FEATURES"]:
        features = common.encode_patches(data.patches, recipe["FEATURES"], recipe, seed)
    scaler = StandardScaler().fit(features[train])
    pca = PCA(min(50, len(train) - 1, features.shape[1]), random_state=seed).fit(scaler.transform(features[train]))
    parts = pca.transform(scaler.transform(features)), encode_positions(data.spots)
    return [part / np.sqrt((part[train] ** 2).sum(1).mean()) for part in parts]


def cluster_spots(data, train, recipe, seed):
    """(ids, map, grid): the cluster (N,) of every spot, UMAP's map of the training rows (n, 2), and a table of cluster
    scores, a line a pair of weights, best silhouette first. InputError where no pair gives two clusters.
    """
    import umap  # here, because numba takes seconds to load

    parts, lines, found = describe_spots(data, train, recipe, seed), [], {}
    threads = torch.get_num_threads()
    for weights in WEIGHTS:
        joint = np.hstack([weight * part for weight, part in zip(weights, parts, strict=True)]).astype(np.float32)
        reducer = umap.UMAP(
            n_neighbors=min(NEIGHBOURS, len(train) - 1), min_dist=0.0, random_state=seed % 2**32, n_jobs=1
        )
        points = reducer.fit_transform(joint[train])
        smallest = max(2, round(MIN_CLUSTER * len(train)))
        ids = HDBSCAN(smallest, copy=True).fit_predict(points)
        inside, line = ids >= 0, {"image": weights[0], "position": weights[1], "clusters": ids.max() + 1}
        line["left out"] = f"{1 - inside.mean():.0%}"
        if 0 < ids.max() < 256:  # an id travels as a byte
            for name, score in (
                ("silhouette", silhouette_score),
                ("Calinski-Harabasz", calinski_harabasz_score),
                ("Davies-Bouldin", davies_bouldin_score),
            ):
                line[name] = score(points[inside], ids[inside])
            vote = KNeighborsClassifier(min(NEIGHBOURS, inside.sum())).fit(joint[train[inside]], ids[inside])
            every = vote.predict(joint)
            every[train[inside]] = ids[inside]
            found[weights] = every, points
        lines.append(line)
    torch.set_num_threads(threads)  # numba has set it to the number of cores, whatever the user asked for
    common.require(found, f"no weights of {WEIGHTS} give 2 to 256 clusters: change MIN_CLUSTER ({MIN_CLUSTER})")
    grid = pd.DataFrame(lines).sort_values("silhouette", ascending=False, kind="stable")
    return *found[tuple(grid.iloc[0][["image", "position"]])], grid


def shuffle_ids(ids, slides, seed):
    """The same ids in another order within each slide."""
    shuffled, random = ids.copy(), np.random.default_rng(common.seed_of(seed, "shuffled id"))
    for slide in np.unique(slides):
        shuffled[slides == slide] = random.permutation(ids[slides == slide])
    return shuffled


# ---------------------------------------------------------------------------------------------- network
class PatchesWithId:
    """Patches whose fourth channel is the spot's id; symmetries and warps leave a constant channel as it is."""

    def __init__(self, patches, ids):
        self.patches, self.device = patches, patches.device
        self.ids = torch.from_numpy(ids.astype(np.uint8)).to(patches.device)

    def __len__(self):
        return len(self.patches)

    def __getitem__(self, rows):
        images = self.patches[rows]
        return torch.cat([images, self.ids[rows][:, None, None, None].expand(-1, 1, *images.shape[2:])], dim=1)


class WithId(nn.Module):
    """The network with a learned embedding of the id beside the image features, at the head."""

    def __init__(self, model, n_ids, size):
        super().__init__()
        self.model = model
        model.embedding = nn.Embedding(n_ids, size)
        index, first = next((i, layer) for i, layer in enumerate(model.head) if isinstance(layer, nn.Linear))
        wider = nn.Linear(first.in_features + size, first.out_features)
        with torch.no_grad():  # the same function as without an id, until a step is made
            wider.weight.zero_()[:, : first.in_features] = first.weight
            wider.bias.copy_(first.bias)
        model.head[index] = wider

    def forward(self, pixels):
        ids = pixels[:, 3, 0, 0].round().long()
        return self.model.head(torch.cat([self.model.encode(pixels[:, :3]), self.model.embedding(ids)], dim=1))


def add_id(ids, model, patches, recipe, experiment):
    """`adapt` of common.train_network: `ids` holds the cluster of every spot, by training."""
    if recipe["ID"] == "no id":
        return model, patches
    own = ids[experiment.seed, experiment.fold]
    if recipe["ID"] == "shuffled id":
        own = shuffle_ids(own, experiment.data.spots["tissue_index"].to_numpy(), experiment.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(common.seed_of(experiment.seed, "embedding"))
        network = WithId(model, own.max() + 1, recipe["EMBEDDING"])
    return network.to(model.mean.device), PatchesWithId(patches, own)


# ---------------------------------------------------------------------------------------------- figure
def draw_clusters(path, title, experiment, ids, points, patches=5):
    """UMAP by cluster and by slide, share of slides per cluster, sample patches per cluster, ids on the tissue."""
    data, train = experiment.data, experiment.rows("train")
    slides, n = data.spots["tissue_index"].to_numpy(), ids.max() + 1
    shown = np.unique(slides)
    colours = {"cmap": "tab20", "vmin": 0, "vmax": max(n - 1, 19)}
    figure = Figure(figsize=(3.4 * max(4, len(shown)), 7), layout="constrained")
    axes = figure.subplots(2, max(4, len(shown)))
    axes[0, 0].scatter(*points.T, c=ids[train], s=4, **colours)
    axes[0, 0].set_title("UMAP of the training spots, by cluster", size=9)
    for slide in np.unique(slides[train]):
        axes[0, 1].scatter(*points[slides[train] == slide].T, s=4, label=f"slide {slide}")
    axes[0, 1].set_title("by slide", size=9)
    axes[0, 1].legend(frameon=False, markerscale=3, fontsize=8)
    share = pd.crosstab(ids[train], slides[train], normalize="index")
    share.plot.barh(stacked=True, ax=axes[0, 2], legend=False, width=0.9)
    axes[0, 2].set(ylabel="cluster", xlabel="share of slides (training spots)")
    random = np.random.default_rng(common.seed_of("sample patches"))
    rows = [random.choice(at, patches) for at in (train[ids[train] == cluster] for cluster in range(min(n, 10)))]
    sheet = np.vstack([np.hstack([data.patches[i, ::4, ::4] for i in row]) for row in rows])
    axes[0, 3].imshow(sheet)
    axes[0, 3].set_yticks(28 + 56 * np.arange(len(rows)), range(len(rows)))
    axes[0, 3].set(xticks=[], title="sample patches", ylabel="cluster")
    for ax, slide in zip(axes[1], shown, strict=False):
        of = data.spots[slides == slide]
        ax.scatter(of["pxl_col"], -of["pxl_row"], c=ids[slides == slide], s=8, **colours)
        test = slide in slides[experiment.rows("test")]
        ax.set_title(f"slide {slide}" + " (test)" * test, size=9)
    for ax in (*axes[1], *axes[0, 4:]):
        ax.set(aspect="equal")
        ax.set_axis_off()
    figure.suptitle(title)
    common.save_figure(path, figure, "clusters of spots on every slide")


def main():
    recipe, experiments = common.open_run(globals())
    common.print_header(globals(), recipe, experiments)
    data, out, note = experiments[0].data, experiments[0].out, "quick budget, no evidence: " * QUICK
    clusterings = {(e.seed, e.fold): cluster_spots(data, e.rows("train"), recipe, e.seed) for e in experiments}
    ids, points, grid = clusterings[SEEDS[0], 0]
    common.save_csv(out / "grid.csv", grid)
    title = f"{note}clusters of the first training by weights; the first line is used"
    common.print_table(title, data, grid.round(3).fillna("-"))
    every = {training: of[0] for training, of in clusterings.items()}
    clusters = pd.DataFrame({f"cluster_{seed}_{fold}": of for (seed, fold), of in every.items()})
    common.save_csv(out / "clusters.csv", data.spots[["id", "tissue_index"]].join(clusters))
    draw_clusters(out / "clusters.png", f"{data.title}{note}the first training", experiments[0], ids, points)
    # A row follows from the ids, not from how they were found; without an id, from neither.
    shared = {"TTA": False, "AUG": "mpa", "TRAINABLE_STAGES": -1}
    shared |= dict.fromkeys(("FEATURES", "MIN_CLUSTER", "NEIGHBOURS"))
    found = {"IDS": hashlib.sha256(clusters.to_numpy().tobytes()).hexdigest()}
    settings = {name: shared | {"ID": name} | found for name in SETTINGS}
    settings["no id"] |= {"IDS": None, "EMBEDDING": None}
    rows = common.run_grid(globals(), settings, experiments, functools.partial(add_id, every))
    against = {} if ONLY else {"cluster id": "no id", "shuffled id": "no id"}
    common.report_scores(f"{note}EfficientNet-B0 with and without a cluster id", experiments, rows, against)
    print(f"figure: {out / 'clusters.png'}")
    common.finish_run(globals(), experiments[0], rows)


if __name__ == "__main__":
    common.run_script(globals())
