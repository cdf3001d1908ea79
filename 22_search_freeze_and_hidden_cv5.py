"""Cross-validated search: how many trailing stages to train, and how wide a head.

Question   Which number of trainable stages and hidden units predicts spots best that were left out
           of training?
Reads      <DATA_ROOT>/dataset/ (script 19)
Writes     <OUT>/rows.csv, a folder a training (as script 20), search.png
Prints     header, the table of r in validation with mean and sd over the folds, the chosen setting
           on the test slide
Command    python 22_search_freeze_and_hidden_cv5.py --data-root GSE240429_data
Override   python 22_search_freeze_and_hidden_cv5.py --data-root HER2ST_data
           python 22_search_freeze_and_hidden_cv5.py --quick      (a smoke test, not a result)
Time       --quick: 80 s, slides included (two Intel Xeon cores, 2026-11-23)
Source     the paper's search, whose settings were all the same network

The choice is by HEG's r in validation, mean over the folds, then HVG's, never by the test slide. (A
fold's best epoch is chosen on its validation spots, so this r is a little optimistic for every
setting. Folds have the same genes, those of all training slides.) The chosen one is trained once on
all training spots, up to the epoch that was best over the folds. A frozen stage keeps its
BatchNorm, parameters and statistics alike.
"""

from study import shell

if __name__ == "__main__":  # Check the command before the slow imports.
    shell.check_command(__file__, dataset=True, files=("GENE_SETS",))


import itertools
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

import common
from study import drawing, files, methods, recipes, recording, runs, shell, splitting, weights
from study.errors import InputError

# ---------------------------------------------------------------------------------------- constants
DATA_ROOT = "GSE240429_data"  # folder with slides.csv and dataset/
OUT = ""  # folder of the results; empty = runs/<this script>/<data root's name>

TARGET = "harmony"  # harmony (the paper's) or lognorm
PROTOCOL = "paper"  # folds of random spots; block: of spatial blocks; loso: of donors or slides
TRAIN_SLIDES = ()  # tissue_index values; empty = every slide but the test slide
TEST_SLIDE = 3  # tissue_index; GSE240429's C73_C1
FOLDS = 5  # of paper and block; loso has a donor a fold or, of one donor, a slide
SEEDS = (42,)  # one search each
GENE_SETS = ""  # a .gmt, or a CSV group,gene: sets that are scored beside HEG, HVG and MG
RECIPE = "paper"  # paper or published: see study/recipes.py; flags and edited constants win

BACKBONE = "efficientnet_b0"  # any timm name
PRETRAINED = True  # ImageNet weights: true (timm's hub), false (random), a file or a folder
HEAD_START = "mean"  # the last layer: random, mean (0, bias at the training means) or ridge

AUG = "mpa"  # mpa (the paper's) or another name of common.AUGMENTATIONS
IMAGE_SIZE = 224  # px of the network's input; patches are 224 px of the slide
EPOCHS = 30
BATCH_SIZE = 32  # a last batch of one spot is left out, since BatchNorm needs two
LEARNING_RATE = 3e-4  # Adam; cosine to zero over the epochs, or constant if published
LOSS = "mse"  # a name of common.LOSSES

DEVICE = "auto"  # auto, cpu or cuda
PRECISION = "auto"  # auto, bf16, fp16 or fp32
ONLY = ""  # one setting, as "stages=3 hidden=1024", without the choice; empty = all
QUICK = False  # the small budget below, on simulated slides
# --------------------------------------------------------------------------------------------------

# Trainable stages, from the head convolution back to the stem: 9 = all of EfficientNet-B0. Dearest
# first, so that the time left is not told too short.
STAGES = (9, 7, 5, 3, 1, 0)
HIDDENS = (0, 1024, 3000, 4096)  # units; 0 = a linear head
# The folds of HEST-Benchmark are no search. From the ridge start of recipe best the settings hardly
# differ, and without training not at all.
ALLOWED = {
    "PROTOCOL": ("paper", "loso", "block"),
    "TARGET": ("harmony", "lognorm"),
    "RECIPE": ("paper", "published"),
    "EPOCHS": (1, 1_000_000),
}

QUICK_BUDGET = recipes.QUICK | {"FOLDS": 2, "STAGES": (9, 0), "HIDDENS": (0, 512)}
del QUICK_BUDGET["HIDDEN"]  # It is what is searched.


# ------------------------------------------------------------------------------------------- choice
@dataclass(frozen=True, eq=False)
class Search:
    """The choice for one test slide, by the folds of its training slides."""

    whole: splitting.Split  # all their spots train
    folds: list  # a Split a fold

    def choose_epoch(self, trained, setting):
        """The best epoch in the mean history of a setting's rows on the folds."""
        rows = [row for row in trained if row.setting == setting and row.split in self.folds]
        numbers = ("epoch", "valid_mse", "valid_heg")
        histories = [files.read_csv(row.folder / "history.csv", numbers=numbers) for row in rows]
        mean = pd.concat(histories).groupby("epoch", as_index=False).mean()
        return common.choose_epoch(mean.to_dict("records"), rows[0].recipe)


def open_searches(run):
    """A Search a test slide and seed: FOLDS of its training spots; of loso, donors or slides."""
    searches, n_folds = [], Counter()
    for whole in run.splits:
        pool = whole.spots("train")
        roles = splitting.split_folds(whole.data.spots, pool, PROTOCOL, FOLDS, whole.seed)
        groups = whole.groups.copy()
        groups.attrs["source"] = "training and validation spots"
        folds = []
        for of_fold in roles:  # No two folds of a seed have one number.
            number = n_folds[whole.seed]
            folds.append(replace(whole, roles=of_fold, groups=groups, fold=number))
            n_folds[whole.seed] += 1
        searches.append(Search(whole, folds))
    return searches


def rank_settings(rows):
    """Names of the settings, best first: by HEG, then HVG, in validation against the target, mean
    over folds and seeds. A setting whose r of HEG is defined for fewer genes than another's, summed
    over the folds, is left out.
    """
    table = recording.select_lines(runs.lines_of(rows), "valid", TARGET)
    table = table.astype({"heg": float, "hvg": float}).groupby("setting", sort=False)
    n_genes = table["heg_n"].sum()
    table = table[["heg", "hvg"]].mean()[n_genes == n_genes.max()].dropna(subset="heg")
    if table.empty:
        raise InputError(
            "no setting has a defined r of HEG: its genes are missing from the panel or constant, "
            "or all predictions are: take more epochs or a higher rate"
        )
    order = table.sort_values(["heg", "hvg"], ascending=False, kind="stable")
    return order.index.tolist()


def describe_epochs(trained, searches, settings):
    """{setting: {column: text}}: the epoch best over the folds, and the minutes of them all."""
    columns = {}
    for setting in settings:
        epochs = [search.choose_epoch(trained, setting) for search in searches]
        seconds = sum(row.lines[0]["seconds"] for row in trained if row.setting == setting)
        columns[setting] = {
            "best epoch": f"{np.mean(epochs):.0f}",
            "minutes": f"{seconds / 60:.1f}",
        }
    return columns


def draw_figure(path, title, rows):
    """HEG r in validation of the grid, against the target."""
    table = recording.select_lines(runs.lines_of(rows), "valid", TARGET).astype({"heg": float})
    grid = table.groupby("setting")["heg"].mean()
    hiddens = choose_hiddens()
    values = np.array([[grid[name_setting(k, h)] for h in hiddens] for k in STAGES])
    size = (3 + 0.9 * len(hiddens), 1.5 + 0.45 * len(STAGES))
    figure = Figure(figsize=size, layout="constrained")
    ax = figure.subplots()
    image = ax.imshow(values, aspect="auto")
    figure.colorbar(image, label="mean Pearson r, HEG, in validation")
    box = {"fc": "white", "ec": "none", "pad": 1}
    for (y, x), value in np.ndenumerate(values):
        ax.text(x, y, f"{value:.3f}", ha="center", va="center", size=8, bbox=box)
    ax.set_xticks(range(len(hiddens)), hiddens)
    ax.set_yticks(range(len(STAGES)), STAGES)
    ax.set(xlabel="hidden units", ylabel="trainable stages")
    ax.set_title(title, size=9)
    drawing.save_figure(path, figure, "r in validation by trainable stages and hidden units")


# --------------------------------------------------------------------------------------------- main
def name_setting(stages, hidden):
    return f"stages={stages} hidden={hidden}"


def choose_hiddens():
    """HIDDENS; a head that starts as a ridge is linear."""
    return (0,) if HEAD_START == "ridge" else HIDDENS


def train_chosen(run, searches, trained, settings):
    """The rows of the setting that each search has chosen, by the training slides alone and over
    the seeds, trained on all of them up to the epoch that was best over the folds.
    """
    chosen = []
    for search in searches:
        whole = search.whole
        of_slide = [other.folds for other in searches if other.whole.fold == whole.fold]
        folds = [*itertools.chain(*of_slide)]
        best = rank_settings([row for row in trained if row.split in folds])[0]
        stop = search.choose_epoch(trained, best)
        slides = ",".join(map(str, whole.slides("test")))
        print(f"chosen for slide {slides}, seed {whole.seed}: {best}, {stop} epochs")
        recipe = run.recipe | settings[best] | {"KEEP": stop}
        # One name for all, so that their mean is that of the search, whatever it has chosen.
        row = run.row(weights.CHOSEN, whole, recipe, stop=stop)
        row.note(chosen=best)
        row.report = None
        chosen.append(run.fill(row, methods.network))
    return chosen


def main():
    run = runs.open_run(globals(), validate=False)
    settings = {
        name_setting(stages, hidden): {"TRAINABLE_STAGES": stages, "HIDDEN": hidden, "TTA": False}
        for stages, hidden in itertools.product(STAGES, choose_hiddens())
    }
    run.print_header()
    settings = run.chosen(settings)
    with torch.device("meta"):  # too few stages are told now, not hours from now
        most = {"TRAINABLE_STAGES": max(STAGES), "HIDDEN": 0, "PRETRAINED": False}
        common.build_model(run.recipe | most, 1, 0)
    searches = open_searches(run)
    folds = [*itertools.chain(*(search.folds for search in searches))]
    trained = run.train(settings, methods.network, folds)
    order = rank_settings(trained)
    trained.sort(key=lambda r: order.index(r.setting) if r.setting in order else len(order))
    title = f"{len(searches[0].folds)} folds, best setting first"
    columns = describe_epochs(trained, searches, settings)
    leave_out = ("[95 %]", "MG", "r>=.30", "q<.05")
    run.print_scores(
        title, trained, columns=columns, leave_out=leave_out, role="valid", truth=TARGET
    )
    chosen = []
    if not ONLY:
        draw_figure(run.out / "search.png", run.title(""), trained)
        chosen = train_chosen(run, searches, trained, settings)
        run.print_scores("the chosen setting, trained on all training spots", chosen)
        run.show_figure(run.out / "search.png")
    run.rows = chosen + trained
    run.finish()


if __name__ == "__main__":
    shell.run_script(globals())
