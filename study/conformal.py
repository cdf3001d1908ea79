"""Intervals around predicted expression, by how far off the validation spots were: split conformal
prediction (Lei et al., Journal of the American Statistical Association 2018), a width a gene.

Shapes: n spots, N spots of a data root, G genes.
"""

import math

import numpy as np

import common
from study import panels

LEVELS = {"80": 0.80, "95": 0.95}  # share of spots that an interval is to hold


def find_half_widths(split, predicted, truth):
    """{name of a level: (G,)} half the widths of the intervals of each gene, by the prediction
    (n, G) of split.scored() and the truth (N, G); NaN where the validation spots are too few.
    """
    valid = split.roles[split.scored()] == "valid"
    errors = np.abs(predicted[valid] - truth[split.spots("valid")])
    errors.sort(axis=0)
    factor = compare_spread(split, truth)
    return {name: factor * choose_error(errors, level) for name, level in LEVELS.items()}


def choose_error(errors, level):
    """(G,) of the sorted errors (n, G) the one that the error of one more spot stays below with at
    least the probability `level`, if all are exchangeable; NaN where n errors cannot tell.
    """
    n, n_genes = errors.shape
    rank = math.ceil(round((n + 1) * level, 9))  # (n + 1) * level may end in ...0001.
    return errors[rank - 1].astype(np.float64) if rank <= n else np.full(n_genes, np.nan)


def compare_spread(split, truth):
    """How many times as widely expression (N, G) varies on the slides of training and validation as
    on those of validation: the median over the reported genes.

    A slide that validates alone may be deeper and calmer than slides are. It is 1 where spots of
    every slide validate.
    """
    reported = panels.GenesOf(truth, split.reported)
    slide_of = split.data.spots["tissue_index"].to_numpy()
    spots = split.spots("train", "valid")
    variances = {}
    for slide in split.slides("train", "valid"):
        inside = spots[slide_of[spots] == slide]
        variances[slide] = common.mean_and_variance(reported, inside)[1]
    of_all = np.mean(list(variances.values()), axis=0)
    of_valid = [variances[slide] for slide in split.slides("valid")]
    of_valid = np.mean(of_valid, axis=0) if of_valid else np.zeros_like(of_all)
    varies = of_valid > 0
    return float(np.median(np.sqrt(of_all[varies] / of_valid[varies]))) if varies.any() else 1.0


def measure_coverage(predicted, truth, half_widths, floor=0.0):
    """{"coverage_80": (G,), ...}: the share of the spots whose truth (n, G) lies in the interval
    around its prediction (n, G), with the ends of find_limit; NaN where one of the three is not
    known.
    """
    measured = np.isfinite(predicted).all(0) & np.isfinite(truth).all(0)
    coverage = {}
    for name, half in half_widths.items():
        inside = truth >= find_limit(predicted, -half, floor)
        inside &= truth <= find_limit(predicted, half, floor)
        share = inside.mean(0)
        coverage[f"coverage_{name}"] = np.where(measured & np.isfinite(half), share, np.nan)
    return coverage


def find_limit(predicted, step, floor=0.0):
    """(n, G) float32 ends of the intervals around the prediction (n, G): `step` (G,) away from it,
    none below `floor`, the least value of what they are to hold, as of log-normalised counts.
    """
    limit = predicted + np.asarray(step, np.float32)
    return np.maximum(limit, floor, out=limit)
