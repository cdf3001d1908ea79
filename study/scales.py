"""At which scale a prediction holds: single spots, neighbourhoods, principal components."""

import numpy as np
import pandas as pd
import scipy.sparse
from scipy.spatial import cKDTree
from sklearn.decomposition import PCA

import common

# Pitches around a spot within which its neighbourhood lies: 7 and 19 spots of a hexagonal grid, 9
# and 21 of a square one, fewer at a border or beside a hole. Hexagons have their next spots at 1.73
# and 2.65 pitches; spots of Spatial Transcriptomics lie up to a tenth beside their squares.
RADII = {"k7": 1.65, "k19": 2.55}
COMPONENTS = 2  # of the prediction, that are scored


# ---------------------------------------------------------------------------------- neighbourhoods
def weigh_neighbours(places, radius):
    """Sparse (n, n) float32 matrix that takes the values of spots at places (n, 2) in pitches to
    the means over each spot and those within the radius.
    """
    pairs = cKDTree(places).query_pairs(radius, output_type="ndarray")
    numbers = np.arange(len(places))
    rows = np.concatenate([numbers, pairs[:, 0], pairs[:, 1]])
    columns = np.concatenate([numbers, pairs[:, 1], pairs[:, 0]])
    share = 1 / np.bincount(rows)[rows]
    shape = (len(places), len(places))
    return scipy.sparse.csr_matrix((share.astype(np.float32), (rows, columns)), shape)


def average_neighbours(values, places, scale):
    """(n, G) means of the values (n, G) of a slide over the neighbourhoods of a scale of RADII."""
    return weigh_neighbours(places, RADII[scale]) @ values


def score_neighbourhoods(predicted, truth, slides, places):
    """Table of r by gene (G lines) and scale: Pearson's of the means over neighbourhoods of the
    prediction and of the truth (n, G), the mean over the slides (n,); places (n, 2) in pitches.

    Only these spots are averaged, so that neighbourhoods of a random part of a slide are small.
    """
    found = {}
    for scale, radius in RADII.items():
        by_slide = []
        for slide in np.unique(slides):
            inside = slides == slide
            weights = weigh_neighbours(places[inside], radius)
            by_slide.append(correlate_means(predicted[inside], truth[inside], weights))
        found[scale] = common.mean_of_defined(by_slide)
    return pd.DataFrame(found)


def correlate_means(predicted, truth, weights):
    """(G,) r of the means that the weights (n, n) make; a part of the genes at a time."""
    parts = []
    for genes in common.parts_of(predicted.shape[1], common.GENES_AT_ONCE):
        x, y = weights @ predicted[:, genes], weights @ truth[:, genes]
        parts.append(common.pearson_per_gene(x, y))
    return np.concatenate(parts)


# -------------------------------------------------------------------------------------- components
def score_components(predicted, truth, slides):
    """(COMPONENTS,) r of the prediction's first principal components over all genes, on each slide
    alone, with the truth on the same axes; the mean over the slides. NaN where there is none.
    """
    by_slide = []
    for slide in np.unique(slides):
        inside = slides == slide
        by_slide.append(correlate_components(predicted[inside], truth[inside]))
    return common.mean_of_defined(by_slide)


def correlate_components(predicted, truth):
    """score_components of one slide, (n, G) and (n, G), over the genes that are finite in both."""
    r = np.full(COMPONENTS, np.nan)
    finite = np.isfinite(predicted).all(0) & np.isfinite(truth).all(0)
    predicted, truth = predicted[:, finite], truth[:, finite]
    n_components = min(COMPONENTS, *predicted.shape)
    if len(predicted) < 2 or not n_components or not np.ptp(predicted, axis=0).any():
        return r
    pca = PCA(n_components, random_state=0).fit(predicted)
    # Beyond the rank of a prediction there are components of rounding errors alone.
    spread = np.sqrt(pca.explained_variance_)
    varies = spread > common.SPREAD * np.linalg.norm(pca.mean_)
    x, y = pca.transform(predicted), (truth - truth.mean(0)) @ pca.components_.T
    r[:n_components] = np.where(varies, common.pearson_per_gene(x, y), np.nan)
    return r


# ----------------------------------------------------------------------------------------- lines
def describe_scales(predicted, truth, spots, genes, members):
    """{<group>_k7, <group>_k19, component_1_r, ...: r} for a line of the prediction and the truth
    (n, G) of the table `spots`; <group>_k7 is the mean over the genes of `members` that have one.
    """
    slides = spots["tissue_index"].to_numpy()
    places = common.places_in_pitches(spots).to_numpy(np.float64)
    r = score_neighbourhoods(predicted, truth, slides, places).set_axis(genes)
    found = {}
    for group, names in members.items():
        means = r[r.index.isin(names)].mean()
        found |= {f"{group}_{scale}": means[scale] for scale in RADII}
    components = score_components(predicted, truth, slides)
    return found | {f"component_{i}_r": value for i, value in enumerate(components, 1)}
