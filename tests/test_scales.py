"""study/scales.py: neighbourhoods, r of their means, r of components."""

import numpy as np
import pandas as pd
import pytest
from scipy.spatial.distance import cdist

from study import scales


def lay_grid(kind, side=9):
    """(side^2, 2) places in pitches of a square or a hexagonal grid."""
    row, column = np.divmod(np.arange(side**2), side)
    if kind == "square":
        return np.stack([column, row], 1).astype(float)
    return np.stack([column + row % 2 / 2, row * 0.75**0.5], 1)


@pytest.mark.parametrize("kind, counts", [("hexagonal", (7, 19)), ("square", (9, 21))])
def test_a_neighbourhood_is_the_spots_around_and_fewer_at_a_border(kind, counts):
    places = lay_grid(kind)
    middle, corner = 40, 0
    for scale, count in zip(("k7", "k19"), counts, strict=True):
        weights = scales.weigh_neighbours(places, scales.RADII[scale]).toarray()
        np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
        assert (weights[middle] > 0).sum() == count
        assert 3 <= (weights[corner] > 0).sum() < count
        nearest = np.argsort(cdist(places[[middle]], places)[0])[:count]
        assert {*np.flatnonzero(weights[middle])} == {*nearest}


@pytest.mark.parametrize("kind", ["hexagonal", "square"])
def test_spots_that_lie_a_little_beside_their_grid_keep_their_neighbours(kind):
    places = lay_grid(kind)
    shift = 0.005 if kind == "hexagonal" else 0.05
    moved = places + np.random.default_rng(0).uniform(-shift, shift, places.shape)
    for radius in scales.RADII.values():
        expected = scales.weigh_neighbours(places, radius).toarray() > 0
        assert ((scales.weigh_neighbours(moved, radius).toarray() > 0) == expected).all()


def test_r_of_neighbourhoods_is_that_of_means_over_one_slide_each():
    random = np.random.default_rng(1)
    places = np.concatenate([lay_grid("hexagonal"), lay_grid("square", 6)])
    slides = np.repeat([1, 2], [81, 36])
    predicted = random.normal(size=(117, 5)).astype(np.float32)
    truth = (predicted + 2 * random.normal(size=(117, 5))).astype(np.float32)
    truth[slides == 2, 4] = 1  # constant there, so that slide 1 alone counts
    found = scales.score_neighbourhoods(predicted, truth, slides, places)
    for scale, radius in scales.RADII.items():
        for gene in range(5):
            r = []
            for slide in (1, 2) if gene < 4 else (1,):
                at = slides == slide
                near = cdist(places[at], places[at]) <= radius
                x, y = ([v[at, gene][row].mean() for row in near] for v in (predicted, truth))
                r.append(np.corrcoef(x, y)[0, 1])
            assert found[scale][gene] == pytest.approx(np.mean(r), abs=1e-5)


def test_few_spots_of_slides_with_large_numbers_have_neighbours_of_their_own():
    random = np.random.default_rng(5)
    values = random.normal(size=(2, 8, 3)).astype(np.float32)
    places = np.tile(lay_grid("hexagonal", 2), (2, 1))
    alone = scales.score_neighbourhoods(*values[:, :4], np.zeros(4), places[:4])
    other = scales.score_neighbourhoods(*values[:, 4:], np.zeros(4), places[4:])
    slides = np.repeat([7, 2**31 - 1], 4)
    both = scales.score_neighbourhoods(*values, slides, places)
    np.testing.assert_allclose(both["k7"], (alone["k7"] + other["k7"]) / 2, rtol=1e-6)


def test_components_are_the_singular_vectors_of_the_prediction():
    random = np.random.default_rng(2)
    predicted = random.normal(size=(60, 12)) * np.linspace(3, 0.2, 12)
    truth = predicted + 3 * random.normal(size=predicted.shape)
    _, _, axes = np.linalg.svd(predicted - predicted.mean(0))
    expected = [np.corrcoef(predicted @ axis, truth @ axis)[0, 1] for axis in axes[:2]]
    slides = np.zeros(60)
    found = scales.score_components(predicted.astype(np.float32), truth, slides)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    found = scales.score_components(-predicted, truth, slides)
    np.testing.assert_allclose(found, -np.array(expected), atol=1e-5)


def test_what_has_no_component_has_no_r():
    random = np.random.default_rng(3)
    truth = random.normal(size=(40, 6)).astype(np.float32)
    zeros = np.zeros(40)
    constant = np.full_like(truth, 0.7)
    assert np.isnan(scales.score_components(constant, truth, zeros)).all()
    one = (3 + random.normal(size=(40, 1)) @ random.normal(size=(1, 6))).astype(np.float32)
    first, second = scales.score_components(one, truth, zeros)
    assert np.isfinite(first) and np.isnan(second), "of rank 1"
    with_nan = np.concatenate([one, np.full((40, 1), np.nan)], 1)
    again = scales.score_components(with_nan, truth[:, [*range(6), 0]], zeros)
    np.testing.assert_allclose(again[0], first, atol=1e-6)
    assert np.isnan(scales.score_components(one[:1], truth[:1], zeros[:1])).all()
    assert np.isnan(scales.score_components(one[:, :1], truth[:, :1], zeros)[1])


def test_a_field_under_noise_holds_better_over_more_spots():
    """By theory r of means over k spots of a constant field is 1 / sqrt(1 + variance / k)."""
    random = np.random.default_rng(4)
    places = lay_grid("hexagonal", 40)
    field = np.sin(places[:, :1] / 9) + np.cos(places[:, 1:] / 7)
    noise = random.normal(size=(1600, 30)) * 2 * field.std()
    spots = pd.DataFrame(places, columns=["pxl_col", "pxl_row"]).assign(pitch=1.0, tissue_index=1)
    genes = [f"G{i}" for i in range(30)]
    members = {"heg": genes[:20], "hvg": [], "all": genes}
    found = scales.describe_scales(np.repeat(field, 30, 1), field + noise, spots, genes, members)
    assert found["heg_k7"] == pytest.approx((1 + 4 / 7) ** -0.5, abs=0.03)
    assert found["heg_k19"] == pytest.approx((1 + 4 / 19) ** -0.5, abs=0.03)
    assert np.isnan(found["hvg_k7"])
