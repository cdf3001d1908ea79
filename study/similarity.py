"""Is a slide like those that a network has learnt from? Patches are compared by their 40 colour
statistics (slides/colour.py), since a network's own features hardly tell glass, ink or
another staining: docs/trust.md has the measurement.

Shapes: n training patches, m patches of a slide, 40 statistics.
"""

from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

import common
from study import ridges

NEIGHBOURS = 5  # training patches, the mean distance to which counts
KEPT = 2000  # training patches at most, drawn at random, so that weights stay small
FAR = 0.95  # of the training patches are nearer than a far one
# How many times as far as training slides from each other a slide may be before the alarm; sections
# of one donor stay below 1.2, another laboratory's staining is beyond 3.
ALARM = 1.3


@dataclass(frozen=True)
class TrainingSlides:
    """What weights keep of the patches that they have learnt from; plain lists, as JSON has them.
    Distances are Euclidean, of standardised statistics.
    """

    n_slides: int
    mean: list  # (40,) of the statistics over the training patches
    sd: list  # (40,) likewise; 1 for a statistic that is constant
    patches: list  # (n, 40) standardised
    distances: list  # (n,) of each to the other slides, or of the only one to its other parts

    @property
    def unit(self):
        """The distance of the median training patch, in which others are told."""
        return max(np.median(self.distances), 1e-6)  # Training patches may all be the same.


def describe_training(colour, table):
    """TrainingSlides of the colour statistics (n, 40) of the training patches, whose spots are the
    lines of a table like SpotData.spots.
    """
    chosen = np.random.default_rng(0).permutation(len(colour))[:KEPT]
    chosen.sort()
    colour, table = colour[chosen], table.iloc[chosen].reset_index(drop=True)
    mean, sd = colour.mean(0), colour.std(0)
    sd = np.where(sd > common.SPREAD * np.abs(mean), sd, 1)
    patches = ((colour - mean) / sd).round(3)
    distances = np.empty(len(patches))
    for others, held_out in part_slides(table):
        distances[held_out] = find_distances(patches[others], patches[held_out])
    return TrainingSlides(
        n_slides=table["tissue_index"].nunique(),
        mean=mean.tolist(),
        sd=sd.tolist(),
        patches=patches.tolist(),
        distances=distances.round(3).tolist(),
    )


def part_slides(table):
    """[(spots of the others, spots of a slide)] of every slide, as (n,) bool; of a single slide
    folds of its blocks with a margin, because neighbours look alike.
    """
    slides = table["tissue_index"].to_numpy()
    if len(np.unique(slides)) == 1:
        return ridges.choose_folds(table)
    return [(slides != slide, slides == slide) for slide in np.unique(slides)]


def find_distances(patches, seen):
    """(m,) mean distance of each of `seen` (m, 40) to the nearest of the patches (n, 40)."""
    nearest = min(NEIGHBOURS, len(patches))
    return cKDTree(patches).query(seen, range(1, nearest + 1))[0].mean(1)


def measure_distances(training, colour):
    """(m,) how many times as far the patches of colour statistics (m, 40) are from the training
    patches as the median training patch is from the other training slides.
    """
    seen = (colour - np.array(training.mean)) / np.array(training.sd)
    return find_distances(np.array(training.patches), seen) / training.unit


def is_far(distances):
    """Whether a slide with these distances (m,) is too far to be believed."""
    return bool(np.median(distances) > ALARM)


def are_far(training, distances):
    """(m,) bool: which of these distances (m,) are beyond those of FAR of the training patches."""
    return distances > np.quantile(training.distances, FAR) / training.unit


def describe_distances(training, distances):
    """One line for the reader about a slide with these distances (m,)."""
    n_far = are_far(training, distances).sum()
    from_whom, each_other = "the training slides", "they are from each other"
    if training.n_slides == 1:
        from_whom, each_other = "the training slide", "its parts are from each other"
    times = f"{np.median(distances):.1f} times as far from {from_whom} as {each_other}"
    expect = ""
    if is_far(distances):
        expect = ": expect less than the validation r, and do not rely on the intervals"
    spots = f"{n_far:,} of {len(distances):,} spots are farther than {FAR:.0%} of theirs"
    return f"this slide is {times}{expect}; {spots}"
