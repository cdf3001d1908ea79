"""What the fast path costs in r: fp32 and bf16, from the same weights and trained from scratch.

Question   Does bfloat16 change a score by more than chance does?
Reads      <DATA_ROOT>/dataset/ (script 19)
Writes     <OUT>/rows.csv, paired_differences.csv and a folder a row (as script 20)
Prints     header, the table: trained in fp32, trained in bf16, and the weights trained in fp32
           that predict in bf16; the differences of every gene group; one JSON line
Command    python benchmarks/compare_precision.py --quick
Override   python benchmarks/compare_precision.py --data-root HER2ST_data --test-slide 4
Source     the differences' intervals are those of scripts 20-25: blocks of the test slide and seeds
"""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import shell

if __name__ == "__main__":  # Mistakes are told before the imports, which take long.
    shell.check_command(__file__)


import runner

# ---------------------------------------------------------------------------------------- constants
DATA_ROOT = "GSE240429_data"  # folder with slides.csv and dataset/
OUT = ""  # folder of the results; empty = runs/<this script>/<data root's name>

TARGET = "lognorm"  # harmony (the paper's) or lognorm
PROTOCOL = "paper"  # paper, loso (each slide is once the test slide) or block (spatial folds)
TRAIN_SLIDES = ()  # tissue_index values; empty = every slide but the test slide
TEST_SLIDE = 3  # tissue_index; GSE240429's C73_C1
VALID_FRACTION = 0.2  # of the training slides' spots
SEEDS = (42, 43, 44)  # one training each

BACKBONE = "efficientnet_b0"  # any timm name
PRETRAINED = True  # ImageNet weights; false = random weights
HIDDEN = 3000  # units of the head's hidden layer; 0 = a linear head
TRAINABLE_STAGES = -1  # of the backbone's last ones; -1 = all
HEAD_START = "mean"  # the last layer: random, mean (0, bias at the training means) or ridge
AUG = "mpa"  # mpa (the paper's) or another name of common.AUGMENTATIONS
IMAGE_SIZE = 224  # px of the network's input; patches are 224 px of the slide
EPOCHS = 30
BATCH_SIZE = 32
LEARNING_RATE = 3e-4  # Adam; cosine to zero over the epochs
LOSS = "mse"  # a name of common.LOSSES
TTA = False  # average predictions over the 8 symmetries

DEVICE = "auto"  # auto, cpu or cuda
PRECISION = "fp32"  # of the reference rows
FAST = "bf16"  # what it is compared with: bf16, or fp16 on a GPU
ONLY = ""  # fp32 or the fast one; empty = both
QUICK = False  # the small budget below, on simulated slides
# --------------------------------------------------------------------------------------------------

QUICK_BUDGET = {
    "DATA_ROOT": "SIMULATED_data",
    "PRETRAINED": False,
    "HIDDEN": 512,
    "HEAD_START": "mean",
    "IMAGE_SIZE": 96,
    "EPOCHS": 12,
    "LEARNING_RATE": 1e-3,
}


def main():
    run = runner.open_run(globals())
    run.print_header()
    settings = run.chosen({precision: {"PRECISION": precision} for precision in ("fp32", FAST)})
    records = run.train(settings)
    same = f"fp32 weights, {FAST} prediction"
    minus = {}
    if not ONLY:
        minus = {FAST: "fp32", same: "fp32"}
        recipe = run.recipe | settings[FAST]
        for split in run.splits:
            trained = runner.record_of(records, "fp32", split)
            compute = runner.predict_again(run.out, trained)
            records += run.compute(same, recipe, split, compute)
    run.print_scores("precision", records, minus=minus)
    if minus:
        print((run.out / "paired_differences.csv").read_text())
    run.finish(records)


if __name__ == "__main__":
    shell.run_script(globals())
