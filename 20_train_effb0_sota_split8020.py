"""The paper's main experiment: EfficientNet-B0 with MPA, spots split 80/20, one test slide.

Question   How well does one H&E patch predict the expression of its spot on a slide that was not trained on?
Reads      <DATA_ROOT>/dataset/ (script 19)
Writes     <OUT>/rows.csv and a folder a row: per-gene r, predictions, figures, weights, split, gene groups
Prints     header, one row an epoch, the table of mean Pearson r, one JSON line
Command    python 20_train_effb0_sota_split8020.py --data-root GSE240429_data
Override   python 20_train_effb0_sota_split8020.py --quick      (four simulated slides, made where missing)
           python 20_train_effb0_sota_split8020.py --data-root HER2ST_data --test-slide 4 --pretrained false
Source     "From histology to spatial transcriptomics: establishing a lightweight single-patch baseline",
           BMC Bioinformatics, 2026
"""

import subprocess
import sys
from pathlib import Path

import pandas as pd

import common

# ---------------------------------------------------------------------------------------------- constants
DATA_ROOT = "GSE240429_data"  # folder with slides.csv and dataset/
OUT = ""  # folder of the results; empty = runs/<this script>/<data root's name>

TARGET = "harmony"  # harmony (the paper's) or lognorm
PROTOCOL = "paper"  # spots of the training slides split at random; one test slide
TRAIN_SLIDES = ()  # tissue_index values; empty = every slide but the test slide
TEST_SLIDE = 3  # tissue_index; GSE240429's C73_C1
VALID_FRACTION = 0.2  # of the training slides' spots
SEEDS = (42,)  # one training each

BACKBONE = "efficientnet_b0"  # any timm name
PRETRAINED = True  # ImageNet weights; false = random weights
HIDDEN = 3000  # units of the head's hidden layer; 0 = a linear head
START_AT_MEAN = False  # true = output bias starts at each gene's training mean: a great help from random weights

AUG = "mpa"  # mpa (the paper's), stnet (8 symmetries) or none
IMAGE_SIZE = 224  # px of the network's input; patches are 224 px of the slide
EPOCHS = 30
BATCH_SIZE = 32
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


def make_simulated_slides():
    """Call scripts 18 and 19, printing the commands."""
    for command in (["18_simulate_slides.py"], ["19_make_patches_and_csv.py", "--target", "lognorm"]):
        command += ["--data-root", DATA_ROOT]
        if command[0].startswith("18") and (Path(DATA_ROOT) / "slides.csv").exists():
            continue
        print("$ python", *command, flush=True)
        subprocess.run([sys.executable, Path(__file__).parent / command[0], *command[1:]], check=True)


def print_published(path):
    """Published numbers, under a rule of their own: other protocols, other spots, nothing computed here."""
    table = pd.read_csv(path)
    print("\npublished, not computed here\n" + "-" * 100)
    for row in table.itertuples():
        print(f"{row.method[:42]:42} HEG {row.HEG50:>24}   {row.source}\n{'':42} {row.protocol} [{row.verified}]")


def main():
    out = Path(OUT or Path("runs") / Path(__file__).stem / Path(DATA_ROOT).resolve().name)
    if QUICK and QUICK_BUDGET["DATA_ROOT"] == DATA_ROOT and not (Path(DATA_ROOT) / "dataset" / "meta.json").exists():
        make_simulated_slides()
    recipe = common.recipe_of(globals())
    data = common.load_dataset(DATA_ROOT, TARGET)
    rows = []
    for seed in SEEDS:
        experiment = common.set_up_experiment(recipe, data, out, seed)
        if seed == SEEDS[0]:
            common.print_header(globals(), recipe, experiment)
        rows += common.run_setting("EfficientNet-B0", recipe, experiment, common.train_network)
        rows += common.run_setting("ridge (colour)", recipe, experiment, common.ridge_on_colour)
    common.print_table(f"mean Pearson r per gene group ({data.root})", rows)
    if (data.root / "published_results.csv").is_file():
        print_published(data.root / "published_results.csv")
    print(f"figures, per-gene r, predictions and weights: {out}")
    common.finish_run(globals(), experiment, rows)


if __name__ == "__main__":
    common.run_script(globals())
