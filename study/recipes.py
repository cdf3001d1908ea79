"""Constants of training that have names, what a constant may be, and the headline of a protocol.

Plain data that needs no package: --help reads it.
"""

from dataclasses import dataclass

# ------------------------------------------------------------------------------------------ recipes
# Constants of training, together; RECIPE names one. PAPER holds the values that the scripts come
# with. Where a script has a constant itself, an edited value wins over the recipe's.
PAPER = {
    # what is learnt from a patch
    "HIDDEN": 3000,  # units of the head's hidden layer; 0 = a linear head
    "TRAINABLE_STAGES": -1,  # of the backbone's last ones; -1 = all, 0 = frozen
    "HEAD_START": "mean",  # the last layer: random, mean (0, bias at the training means) or ridge
    "POOL_STAGES": False,  # the head sees sd and mean of every stage, of the last its mean
    "STOCHASTIC_DEPTH": 0.0,  # chance to leave out a block of a step, rising with depth to this
    "CHANNELS": "rgb",  # bgr = blue is taken for red
    # how
    "AUG": "mpa",  # a name of common.AUGMENTATIONS
    "WARP_BORDER": "reflect",  # what a warp shows beyond the patch: reflect or black
    "WARP_ASPECT": "fixed",  # free = a warp scales across and down apart
    "EPOCHS": 30,  # 0 = none: a ridge start is what is kept
    "LEARNING_RATE": 3e-4,  # Adam
    "SCHEDULE": "cosine",  # of the rates over the epochs: cosine (to zero) or constant
    # what is kept of it
    "BEST_EPOCH": "mse",  # by validation: mse, or heg (mean r of HEG)
    "REFIT": False,  # then train again, on training + validation spots, up to that epoch
    "TTA": False,  # predictions are averaged over the 8 symmetries
    "NEIGHBOURHOOD": False,  # half of what is seen of a spot are those around it; without epochs
}
# What the public scripts do and the paper does not describe: docs/trust.md, "How the public scripts
# differ from the paper".
PUBLISHED = PAPER | {
    "HEAD_START": "random",
    "STOCHASTIC_DEPTH": 0.2,
    "CHANNELS": "bgr",
    "WARP_BORDER": "black",
    "WARP_ASPECT": "free",
    "SCHEDULE": "constant",
}
# How it was chosen: docs/trust.md.
BEST = PAPER | {
    "HIDDEN": 0,
    "HEAD_START": "ridge",
    "POOL_STAGES": True,
    "EPOCHS": 0,
    "REFIT": True,
    "TTA": True,
    "NEIGHBOURHOOD": True,
}
RECIPES = {"paper": PAPER, "published": PUBLISHED, "best": BEST}
# What `--quick` sets in 20 to 25, each of which adds its own.
QUICK = {
    "DATA_ROOT": "SIMULATED_data",
    "TARGET": "lognorm",
    "PRETRAINED": False,
    "HIDDEN": 512,
    "IMAGE_SIZE": 64,
    "EPOCHS": 3,
    "LEARNING_RATE": 1e-3,
}
# ------------------------------------------------------------------------------------------- limits
# What a constant may be: one of these words, several as here, or a number from the least to the
# greatest, whole where the greatest is whole. They stand here and not in their scripts, so that a
# mistake is told before a script loads its packages.
ALLOWED = {
    "TARGET": ("harmony", "lognorm", "log1p"),
    "PROTOCOL": ("paper", "loso", "block", "hest"),
    "RECIPE": tuple(RECIPES),
    "HEAD_START": ("random", "mean", "ridge"),
    "CHANNELS": ("rgb", "bgr"),
    "STOCHASTIC_DEPTH": (0, 0.9),
    "WARP_BORDER": ("reflect", "black"),
    "WARP_ASPECT": ("fixed", "free"),
    "SCHEDULE": ("cosine", "constant"),
    "BEST_EPOCH": ("mse", "heg"),
    "DEVICE": ("auto", "cpu", "cuda"),
    "PRECISION": ("auto", "bf16", "fp16", "fp32"),
    "IMAGE_SIZE": (32, 4096),
    "HIDDEN": (0, 10**6),
    "TRAINABLE_STAGES": (-1, 1000),
    "VALID_FRACTION": (0, 1.0),
    "LEARNING_RATE": (0, 1.0),
    "BATCH_SIZE": (2, 10**6),
    "EPOCHS": (0, 10**6),
    "UM_PER_PX": (0, 20.0),
    # of 17 to 19
    "DATASET": ("GSE240429", "HER2ST"),
    "SLIDES": (1, 1000),
    "SPOTS": (2, 10**6),
    "DEPTH": (1, 10**6),
    "DISPERSION": (0, 100.0),
    "HVG_PER_SLIDE": (1, 10**6),
    "BIN_UM": (2, 2000.0),
    # of 22, 24 and 25
    "FOLDS": (2, 10**6),
    "MIN_CLUSTER": (0, 1.0),
    "NEIGHBOURS": (2, 10**6),
    "EMBEDDING": (1, 10**6),
    "STNET_EPOCHS": (1, 10**6),
    "BLEEP_EPOCHS": (1, 10**6),
    "BLEEP_BATCH": (2, 10**6),
    "MICRO_BATCH": (3, 999),
}
SWITCHES = ("REFIT", "TTA", "NEIGHBOURHOOD", "POOL_STAGES", "COMPARE_TARGETS", "QUICK", "CHECK")
ALLOWED |= dict.fromkeys((*SWITCHES, "USE_HIRES", "HEST_PATCHES", "THUMBNAIL"), (False, True))
ALLOWED |= dict.fromkeys(("SEEDS", "TRAIN_SLIDES"), ((42,),))
# Constants that change nothing under a protocol.
WITHOUT_EFFECT = {
    "loso": ("TEST_SLIDE", "VALID_FRACTION", "FOLDS"),
    "block": ("VALID_FRACTION",),
    "hest": ("TRAIN_SLIDES", "TEST_SLIDE"),
}


# ----------------------------------------------------------------------------------------- headline
@dataclass(frozen=True)
class Headline:
    """The number by which a protocol compares settings."""

    name: str  # head of its column
    truth: str  # of the lines that hold it
    group: str  # of the genes
    ending: str  # of the columns <group><ending> of lines and draws
    unit: str  # column of the lines: their mean within it, then over it

    @property
    def column(self):
        """The column of the lines that holds it."""
        return f"{self.group.lower()}{self.ending}"

    @property
    def ceiling(self):
        """The column of the lines that holds its ceiling."""
        return f"{self.group.lower()}_ceiling"


HEG = Headline("HEG", truth="lognorm", group="HEG", ending="", unit="slide")
# Of HEST-Benchmark: all its genes, all test spots of a fold at once, mean over the folds.
OF_HEST = Headline("HEST r", truth="log1p", group="all", ending="_pooled", unit="fold")


def headline_of(protocol):
    """The Headline of a PROTOCOL."""
    return OF_HEST if protocol == "hest" else HEG
