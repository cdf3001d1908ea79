"""Ridge regression of expression on features: how strong, of which rank, and as the start of a
network's head.

Shapes: N spots, F features, G genes. Spots are given by their numbers; of features and expression
only theirs are read.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.linalg
import torch
from threadpoolctl import ThreadpoolController

import common
from study import panels, splitting
from study.errors import InputError

# In units of the features' mean squared length; so wide that its ends are not chosen.
ALPHAS = np.logspace(-4, 5, 37)
ROUNDING = 1e-12  # of the greatest squared length along an axis; smaller ones are rounding's


@dataclass(frozen=True)
class Ridge:
    """A linear map of features to expression: features @ weight + bias."""

    weight: np.ndarray  # (F, G)
    bias: np.ndarray  # (G,)

    def predict(self, features):
        """(n, F) features -> (n, G) float32 expression."""
        predicted = np.empty((len(features), len(self.bias)), np.float32)
        for part in common.parts_of(len(features), common.SPOTS_AT_ONCE):
            predicted[part] = features[part] @ self.weight + self.bias
        return predicted

    def through(self, mean_x, mean_y):
        """The Ridge of the same weight that predicts mean_y (G,) for the features mean_x (F,)."""
        return Ridge(self.weight, mean_y - mean_x @ self.weight)


class Moments(NamedTuple):
    """Sums over spots of the products of features x and expression y: all that a ridge needs."""

    xx: np.ndarray  # (F, F)
    xy: np.ndarray  # (F, G)

    def add(self, moments):
        """Add the Moments over other spots, in place."""
        np.add(self.xx, moments.xx, out=self.xx)
        np.add(self.xy, moments.xy, out=self.xy)


class Centred:
    """Features (N, F) and expression (N, G) minus their means over the `spots` (numbers) of each of
    the `groups` (N,); the expression of a few spots is in memory at a time.
    """

    def __init__(self, features, target, spots, groups):
        self.features = features
        self.target = target
        names, self.group_of = np.unique(groups, return_inverse=True)
        self.x_means = np.zeros((len(names), features.shape[1]))
        self.y_means = np.zeros((len(names), target.shape[1]))
        squares = 0
        for group in np.unique(self.group_of[spots]):
            inside = spots[self.group_of[spots] == group]
            self.x_means[group], variance = common.mean_and_variance(features, inside)
            self.y_means[group], _ = common.mean_and_variance(target, inside)
            squares += len(inside) * variance.sum()
        # Of the features, the unit of alpha; not quite 0 where none varies, so that a ridge exists.
        self.mean_squared_length = max(squares / len(spots), 1e-12)

    def parts(self, spots):
        """Yield ((n, F), (n, G)) float64, a part of these spots at a time."""
        for part in common.parts_of(len(spots), common.SPOTS_AT_ONCE):
            at = spots[part]
            group = self.group_of[at]
            yield self.features[at] - self.x_means[group], self.target[at] - self.y_means[group]

    def moments(self, spots, xx=None):
        """Moments over these spots, of which the products `xx` may be known already."""
        width, n_genes = self.features.shape[1], self.target.shape[1]
        is_known = xx is not None
        xx = xx if is_known else np.zeros((width, width))
        xy = np.zeros((width, n_genes))
        for x, y in self.parts(spots):
            if not is_known:
                xx += x.T @ x
            xy += x.T @ y
        return Moments(xx, xy)


class Shrinkage(NamedTuple):
    """What keeps a ridge from learning noise."""

    alpha: float  # the penalty, in units of the features' mean squared length
    rank: int | None  # how many numbers tell of a spot, from which all genes follow; None: no limit


def fit_ridge(features, target, spots, table, leading, full_rank=False):
    """(Ridge of expression (N, G) on features (N, F), its Shrinkage), learnt on `spots` (numbers)
    of the `table`.

    Both are centred within every slide, since slides differ in staining and depth. The genes
    `leading` (numbers; those that are reported) choose the Shrinkage, and the patterns to which the
    others are reduced; with `full_rank` they choose alpha alone.
    """
    slides = table["tissue_index"].to_numpy()
    features, axes = turn_to_span(features, spots, slides)
    of_leading = Centred(features, panels.GenesOf(target, leading), spots, slides)
    shrinkage, xx = choose_shrinkage(of_leading, spots, table, full_rank)
    centred = Centred(features, target, spots, slides)
    penalty = shrinkage.alpha * centred.mean_squared_length
    ridge = solve_ridge(centred, spots, penalty, shrinkage.rank, leading, xx)
    if axes is not None:
        ridge = Ridge(axes @ ridge.weight, ridge.bias)
    return ridge, shrinkage


def turn_to_span(features, spots, slides):
    """(features (N, f) on other axes, these axes (F, f)) of features (N, F): where there are fewer
    spots than features, f is no more than the spots; else (features, None).

    Of a ridge that learns on these spots nothing changes, since what it cannot tell apart it does
    not use, and a turn of the axes leaves lengths as they are.
    """
    if len(spots) >= features.shape[1]:
        return features, None
    nothing = np.empty((len(features), 0))
    _, axes = find_axes(Centred(features, nothing, spots, slides), spots)
    if not axes.size:  # No feature varies.
        return features, None
    return features @ axes, axes


def find_axes(centred, spots, xx=None):
    """((k,) squared lengths in all of these spots along k axes, the axes (F, k)): those that turn
    xx, which is moments(spots).xx, to a diagonal.

    They follow from products of the features or, where xx is not given or larger, from those of the
    spots. Axes along which the spots do not vary are left out.
    """
    of_features = xx is not None and len(spots) >= len(xx)
    if not of_features:
        x = np.concatenate([x for x, _ in centred.parts(spots)])
    with on_one_core():
        sizes, axes = scipy.linalg.eigh(xx if of_features else x @ x.T, driver="evd")
    kept = sizes > ROUNDING * max(sizes[-1], 1e-12)
    sizes, axes = sizes[kept], axes[:, kept]
    return sizes, axes if of_features else x.T @ (axes / np.sqrt(sizes))


def on_one_core():
    """The context in which linear algebra is done by one thread.

    Of many small steps threads save little, and beside a busy process they wait for each other.
    """
    return find_libraries().limit(limits=1, user_api="blas")


# threadpoolctl's hold on the libraries of linear algebra that are loaded; to search for them takes
# longer than a small step, so it is done once.
find_libraries = functools.cache(ThreadpoolController)


def choose_shrinkage(centred, spots, table, full_rank=False):
    """(the Shrinkage with the least squared error of all genes of `centred` in folds of spatial
    blocks, the products of features (F, F) over all spots, which the folds share).
    """
    penalties = ALPHAS * centred.mean_squared_length
    gained = 0
    folds, xx = measure_folds(centred, spots, table)
    for train, learnt, judged in folds:
        axes = find_axes(centred, train, learnt.xx)
        with on_one_core():
            gained = gained + measure_gains(*axes, learnt.xy, judged, penalties)
    # What every alpha (row) explains by the first, the first two, ... patterns (columns).
    explained = gained.cumsum(1)
    if full_rank:
        return Shrinkage(float(ALPHAS[explained[:, -1].argmax()]), rank=None), xx
    alpha, last = np.unravel_index(explained.argmax(), explained.shape)
    return Shrinkage(float(ALPHAS[alpha]), rank=int(last) + 1), xx


def measure_folds(centred, spots, table):
    """([(spots to fit, their Moments, Moments of those held out)] of every fold of choose_folds,
    the products xx (F, F) over all spots).

    Spots that play the same role in every fold are summed together, so that the products of none
    are taken twice.
    """
    folds = choose_folds(table.iloc[spots])
    xx = np.zeros((centred.features.shape[1],) * 2)
    learnt = [centred.moments(spots[:0]) for _ in folds]
    judged = [centred.moments(spots[:0]) for _ in folds]
    # A row a fold; 0 is a spot in the fold's margin, which is neither.
    roles = np.array([train + 2 * held_out for train, held_out in folds])
    alike, group_of = np.unique(roles, axis=1, return_inverse=True)
    for group, roles_of_group in enumerate(alike.T):
        moments = centred.moments(spots[group_of == group])
        xx += moments.xx
        for fold, role in enumerate(roles_of_group):
            if role == 1:
                learnt[fold].add(moments)
            elif role == 2:
                judged[fold].add(moments)
    trains = [spots[train] for train, _ in folds]
    return list(zip(trains, learnt, judged, strict=True)), xx


def measure_gains(sizes, axes, xy, judged, penalties):
    """(penalties, patterns) by how much each pattern of expression, the main one first, lowers the
    squared error of the spots of Moments `judged`, for the ridge of every penalty on spots of
    products xy (F, G) whose find_axes are `sizes` and `axes`.

    Along these axes every penalty is a division, and the patterns follow from a product of the size
    of genes x genes.
    """
    xy = axes.T @ xy
    # Expression too is turned to axes of its own, since no more patterns are predicted than there
    # are axes of features.
    turn = np.linalg.qr(xy.T)[0]
    xy = xy @ turn
    judged_xx = axes.T @ judged.xx @ axes
    judged_xy = axes.T @ judged.xy @ turn
    gained = np.zeros((len(penalties), min(judged.xy.shape)))
    for row, penalty in zip(gained, penalties, strict=True):
        weight = xy / (sizes + penalty)[:, None]
        _, patterns = np.linalg.eigh((sizes[:, None] * weight).T @ weight)
        products = weight.T @ (2 * judged_xy - judged_xx @ weight)
        gains = (patterns * (products @ patterns)).sum(0)
        row[: len(gains)] = gains[::-1]
    return gained


def solve_ridge(centred, spots, penalty, rank=None, leading=None, xx=None):
    """The Ridge that is learnt on `spots` (numbers), of a `rank` by the genes `leading` (numbers)
    if one is given. `xx` are the features' products over these spots, where they are known.
    """
    moments = centred.moments(spots, xx)
    penalised = moments.xx + penalty * np.eye(len(moments.xx))
    weight = scipy.linalg.solve(penalised, moments.xy, assume_a="pos")
    if rank is not None:
        weight = reduce_rank(weight, moments.xx, rank, leading)
    mean_x, _ = common.mean_and_variance(centred.features, spots)
    mean_y, _ = common.mean_and_variance(centred.target, spots)
    return Ridge(weight, mean_y - mean_x @ weight)


def reduce_rank(weight, xx, rank, leading):
    """(F, G) the weight (F, G) of a ridge where spots of moments xx (F, F) are told by `rank`
    numbers each: how strongly they show each of the main patterns of expression, which are the
    first principal components of what the ridge predicts of the genes `leading` (numbers).

    The counts of one gene are mostly noise, and a pattern that many genes share is less so.
    Reduced-rank ridge regression: Mukherjee and Zhu, Statistical Analysis and Data Mining 2011.
    """
    weight_of_leading = weight[:, leading]
    variances, patterns = scipy.linalg.eigh(weight_of_leading.T @ xx @ weight_of_leading)
    variances, patterns = variances[-rank:], patterns[:, -rank:]
    # A pattern that does not vary over these spots is divided by something, and stays nothing.
    variances = variances.clip(max(1e-12 * variances[-1], np.finfo(float).tiny))
    directions = weight_of_leading @ (patterns / np.sqrt(variances))
    return directions @ (directions.T @ xx @ weight)


def choose_folds(table):
    """[(spot numbers to fit, spot numbers held out)]: folds of spatial blocks of the spots of a
    table, with a margin; of single spots where the slides are too small for that.
    """
    numbers = np.arange(len(table))
    try:
        folds = splitting.split_folds(table, numbers, "block", common.FOLDS, 0)
    except InputError:  # A fold would be empty, or its margin would take all others.
        folds = splitting.split_folds(table, numbers, "paper", min(common.FOLDS, len(table)), 0)
    return [(roles == "train", roles == "valid") for roles in folds]


def balance_parts(features, widths):
    """(F,) float32 factors by which every part of the features, of these widths, varies as much in
    total as the last part; 0 for parts that do not vary.
    """
    starts = np.cumsum([0, *widths[:-1]])
    totals = np.add.reduceat(features.var(0, np.float64), starts)
    varies = totals > 1e-12
    factors = np.sqrt(varies * totals[-1] / np.where(varies, totals, 1))
    return np.repeat(factors.astype(np.float32), widths)


def copy_to_head(ridge, model, scale):
    """Have the network's linear head predict what the ridge does on its features times `scale`."""
    with torch.no_grad():
        if model.pool_stages:
            model.feature_scale.copy_(torch.from_numpy(scale))
        model.head[-1].weight.copy_(torch.from_numpy(ridge.weight.T))
        model.head[-1].bias.copy_(torch.from_numpy(ridge.bias))
