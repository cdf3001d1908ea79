"""How sure an r is: intervals from the influence of every spot, and what chance alone would reach.

Shapes: n spots, G genes, k groups of genes.
"""

import functools

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist
from scipy.stats import false_discovery_control
from scipy.stats import t as student_t

import common
from common import average_slides, parts_of, pearson_per_gene
from study.hashes import seed_of

BANDWIDTHS = 4.5  # in the side of a square that holds a slide's spots; see measure_error
CELLS = 6  # in a bandwidth
LEAST_SPOTS = 36  # of a slide; with fewer, intervals are too narrow by far
LAID = 199  # times that a prediction is laid on the slide otherwise, to see what chance gives


# ---------------------------------------------------------------------------------------- intervals
def find_influence(predicted, truth, spots, genes, members, pooled=False):
    """Table (n, 4) heg, hvg, mg, all: by how much each spot moves the group's mean r, to first
    order: the mean of find_gene_influence over its genes that have an r; NaN where none has.

    Of several slides r is the mean over them or, `pooled`, that over all their spots at once.
    """
    slides = spots["tissue_index"].to_numpy()
    if pooled:
        slides = np.zeros_like(slides)
    inside = np.column_stack([np.isin(genes, group) for group in members.values()])
    moved = np.zeros((len(spots), len(members)))
    counted = np.zeros(len(members))
    for some in parts_of(len(genes), common.GENES_AT_ONCE):
        of_genes = find_gene_influence(predicted[:, some], truth[:, some], slides)
        defined = np.isfinite(of_genes[0])
        weights = inside[some][defined].astype(np.float64)
        moved += of_genes[:, defined] @ weights
        counted += weights.sum(0)
    moved /= np.where(counted > 0, counted, np.nan)
    return pd.DataFrame(moved, columns=list(members))


def find_gene_influence(predicted, truth, slides):
    """(n, G) by how much each spot moves each gene's r, the mean over the slides (n,), to first
    order: the influence function of r (Devlin, Gnanadesikan and Kettenring 1975) over the slide's
    spots. NaN for a gene without an r.
    """
    inside = [slides == slide for slide in np.unique(slides)]
    r = np.array([pearson_per_gene(predicted[part], truth[part]) for part in inside])
    n_slides = np.isfinite(r).sum(0)
    influence = np.zeros(predicted.shape)
    for part, r_of_slide in zip(inside, r, strict=True):
        defined = np.flatnonzero(np.isfinite(r_of_slide))
        x = standardise(predicted[part][:, defined])
        y = standardise(truth[part][:, defined])
        moved = (x * y - r_of_slide[defined] * (x**2 + y**2) / 2) / part.sum()
        influence[np.ix_(part, defined)] = moved / n_slides[defined]
    influence[:, n_slides == 0] = np.nan
    return influence


def standardise(values):
    """(n, G) float64 with mean 0 and variance 1 in every column."""
    centred = values - values.mean(0, np.float64)
    return centred / np.sqrt((centred**2).mean(0))


def measure_error(influence, slides, places, sizes=None):
    """(standard error, degrees of freedom), each (k,), of what spots move by (n, k) influence
    values; their tissue_index (n,) and places (n, 2) in pitches. NaN where a slide has too few.

    Where the spots are a part of a slide, `sizes` {tissue_index: number of its spots} say how large
    it is. Neighbours err together. The variance is the sum over pairs of spots of the product of
    their influence times a weight that falls with their distance and is 0 beyond the bandwidth;
    slides are independent.
    """
    variances, freedoms = [], []
    for slide in np.unique(slides):
        inside = slides == slide
        size = sizes[slide] if sizes else int(inside.sum())
        cells, weight, scale, freedom = weigh_pairs(places[inside].tobytes(), size)
        summed = np.zeros((len(weight), influence.shape[1]))
        np.add.at(summed, cells, influence[inside])
        variances.append(scale * (summed * (weight @ summed)).sum(0))
        freedoms.append(freedom)
    variances, freedoms = np.array(variances), np.array(freedoms)[:, None]
    total = variances.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        # After Satterthwaite: few degrees of one slide count as much as its variance does.
        freedom = total**2 / (variances**2 / freedoms).sum(0)
    return np.sqrt(total), np.where(total == 0, freedoms.sum(), freedom)


@functools.lru_cache(maxsize=64)  # Settings and groups of genes share the places.
def weigh_pairs(places, size):
    """(cell of each spot, (cells, cells) weights, scale, degrees of freedom) of places (n, 2),
    given as bytes, on a slide of `size` spots.

    The weights are the spherical covariance, whose bandwidth is a fixed part of the slide's side,
    so the estimate neither settles nor is without bias (Kiefer and Vogelsang 2005). Scale and
    degrees of freedom are those that hold if the errors' covariance is as the weights are, the mean
    having been taken off. Spots that lie close against the bandwidth are one cell, so that large
    slides have no more than about a thousand.
    """
    places = np.frombuffer(places).reshape(-1, 2)
    bandwidth = np.sqrt(size) / BANDWIDTHS
    corners = np.floor((places - places.min(0)) * CELLS / bandwidth)
    _, cells, counts = np.unique(corners, axis=0, return_inverse=True, return_counts=True)
    cells = cells.ravel()
    middle = np.zeros((len(counts), 2))
    np.add.at(middle, cells, places)
    middle /= counts[:, None]
    distance = (cdist(middle, middle) / bandwidth).clip(0, 1)
    weight = 1 - 1.5 * distance + 0.5 * distance**3
    share = counts / counts.sum()
    # Of the spots' influence, whose sum is 0, the cells hold sums.
    covariance = weight * counts[:, None] * counts
    off_mean = covariance - np.outer(covariance.sum(1), share)
    centred = off_mean - np.outer(share, off_mean.sum(0))
    seen = weight @ centred
    expected = np.trace(seen)
    if size < LEAST_SPOTS or len(counts) < 3 or expected <= 0:
        return cells, weight, np.nan, np.nan
    return cells, weight, covariance.sum() / expected, expected**2 / (seen * seen.T).sum()


def find_interval(value, error, freedom):
    """[low, high] of 95 % around a value by Student's t; None where it is undefined."""
    half = student_t.ppf(0.975, freedom) * error
    return [value - half, value + half] if np.isfinite(half) else None


# ------------------------------------------------------------------------------------------- chance
def compare_with_chance(predicted, truth, slides, places, rounds=1):
    """(G,) p of each gene's r, the mean over slides, on the slides (n,) at places (n, 2) in
    pitches; NaN where r is undefined.

    p is how often r is as high when the prediction is laid on the slide otherwise: turned by any
    angle, half the times mirrored, shifted by up to a quarter of the slide, every spot taking the
    value of the nearest spot. Such a field is as smooth as the prediction and has nothing to do
    with the slide. It is laid LAID times in each of the `rounds`.
    """
    found = average_slides(pearson_per_gene, predicted, truth, slides)
    reached = np.ones(len(found))
    numbers = {slide: np.flatnonzero(slides == slide) for slide in np.unique(slides)}
    for number in range(rounds):
        laid = {slide: lay_otherwise(places[at], slide, number) for slide, at in numbers.items()}
        for genes in parts_of(len(found), common.GENES_AT_ONCE):
            by_slide = []
            for slide, inside in numbers.items():
                x, y = predicted[inside][:, genes], truth[inside][:, genes]
                by_slide.append(correlate_laid(x, y, laid[slide]))
            laid_r = np.ma.masked_invalid(by_slide).mean(0).filled(np.nan)
            reached[genes] += (laid_r >= found[genes]).sum(0)
    return np.where(np.isfinite(found), reached / (1 + LAID * rounds), np.nan)


def control_discoveries(p):
    """(G,) q of p, both NaN where undefined, after Benjamini and Hochberg (1995)."""
    q = np.full(len(p), np.nan)
    defined = np.isfinite(p)
    q[defined] = false_discovery_control(p[defined])
    return q


def lay_otherwise(places, slide, number=0):
    """(LAID, n) numbers of the spots whose values the spots at places (n, 2) take."""
    words = (int(slide), number) if number else (int(slide),)
    random = np.random.default_rng(seed_of("laid otherwise", *words))
    middle = (places.max(0) + places.min(0)) / 2
    tree = cKDTree(places)
    laid = []
    for _ in range(LAID):
        angle = random.uniform(0, 2 * np.pi)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        if random.random() < 0.5:
            turn = turn @ np.diag([1, -1])
        shift = random.uniform(-0.25, 0.25, 2) * np.ptp(places, axis=0)
        laid.append(tree.query((places - middle) @ turn.T + middle + shift)[1])
    return np.array(laid)


def correlate_laid(predicted, truth, laid):
    """(LAID, G) r of (n, G) predictions laid otherwise and the truth; NaN where one is constant."""
    x = (predicted - predicted.mean(0)).astype(np.float32)
    y = (truth - truth.mean(0)).astype(np.float32)
    taken = np.zeros((len(laid), len(x)), np.float32)  # how often each spot's value is
    np.add.at(taken, (np.arange(len(laid))[:, None], laid), 1)
    spread = taken @ x**2 / len(x) - (taken @ x / len(x)) ** 2
    together = np.array([np.einsum("ng,ng->g", x[spots], y) for spots in laid]) / len(x)
    with np.errstate(invalid="ignore", divide="ignore"):
        return together / np.sqrt(spread.clip(0) * (y**2).mean(0))
