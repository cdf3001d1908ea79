"""How far a slide is from those that a network has learnt from."""

import json
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist

import common
from slides.colour import colour_statistics
from study import similarity


def colours_of_slides(n_slides, spots=30, seed=0):
    """(statistics (n, 40), table of the spots) of slides whose statistics are drawn, each with a
    shift of its own; a grid of five columns a slide.
    """
    random = np.random.default_rng(seed)
    slides = np.repeat(np.arange(1, n_slides + 1), spots)
    shifts = random.normal(0, 0.5, (n_slides, 40))
    colour = random.normal(3, 1, (len(slides), 40)) * np.linspace(0.1, 20, 40)
    colour += shifts[slides - 1] * np.linspace(0.1, 20, 40)
    place = np.arange(len(slides)) % spots
    table = pd.DataFrame({"tissue_index": slides, "pitch": 10.0})
    table["pxl_row"], table["pxl_col"] = place // 5 * 10, place % 5 * 10
    table["block"] = slides * 100 + table["pxl_row"] // 20
    table["id"] = np.arange(len(slides))
    return colour, table


def mean_of_nearest(patches, seen):
    """similarity.find_distances by all pairs of patches."""
    return np.sort(cdist(seen, patches), axis=1)[:, : similarity.NEIGHBOURS].mean(1)


def test_distances_are_those_of_all_pairs_of_standardised_patches():
    colour, table = colours_of_slides(3)
    training = similarity.describe_training(colour, table)
    standard = (colour - colour.mean(0)) / colour.std(0)
    slides = table["tissue_index"].to_numpy()
    expected = np.empty(len(slides))
    for slide in (1, 2, 3):
        here = slides == slide
        expected[here] = mean_of_nearest(standard[~here], standard[here])
    np.testing.assert_allclose(training.distances, expected, atol=0.01)
    other = np.random.default_rng(5).normal(4, 2, (7, 40)) * np.linspace(0.1, 20, 40)
    found = similarity.measure_distances(training, other)
    seen = (other - colour.mean(0)) / colour.std(0)
    np.testing.assert_allclose(
        found, mean_of_nearest(standard, seen) / np.median(expected), atol=0.005
    )


def test_one_training_slide_is_compared_by_its_blocks(monkeypatch):
    colour, table = colours_of_slides(1, spots=60)
    monkeypatch.setattr(common, "MARGIN", 0)
    training = similarity.describe_training(colour, table)
    standard = (colour - colour.mean(0)) / colour.std(0)
    blocks = table["block"].to_numpy()
    # A fold is one block or more, so what is left is never nearer than without one block.
    for block in np.unique(blocks):
        here = blocks == block
        least = mean_of_nearest(standard[~here], standard[here])
        assert (np.array(training.distances)[here] > least - 0.01).all()
    told = similarity.describe_distances(training, np.ones(3))
    assert "its parts are from each other" in told


def test_weights_stay_small(monkeypatch):
    colour, table = colours_of_slides(4, spots=600)
    training = similarity.describe_training(colour, table)
    assert len(training.patches) == similarity.KEPT == len(training.distances)
    assert len(json.dumps(asdict(training))) < 1e6
    some = similarity.measure_distances(training, colour[:300])
    monkeypatch.setattr(similarity, "KEPT", 2400)
    every = similarity.measure_distances(similarity.describe_training(colour, table), colour[:300])
    assert np.median(some) == pytest.approx(np.median(every), abs=0.25)


def test_a_statistic_that_never_varies_and_patches_that_are_all_alike():
    colour, table = colours_of_slides(2)
    colour[:, 3] = 0.7
    training = similarity.describe_training(colour, table)
    assert training.sd[3] == 1
    assert np.isfinite(similarity.measure_distances(training, colour)).all()
    alike = similarity.describe_training(np.ones((8, 40)), table.iloc[[0, 1, 2, 3, 31, 32, 33, 34]])
    assert (similarity.measure_distances(alike, np.ones((3, 40))) == 0).all()
    assert similarity.is_far(similarity.measure_distances(alike, np.zeros((3, 40))))


def test_the_line_says_how_far_and_warns_beyond_the_level():
    colour, table = colours_of_slides(2)
    training = similarity.describe_training(colour, table)
    near, far = np.array([0.9, 1.1, 1.0, 99]), np.array([2.4, 2.4, 0.1])
    told = similarity.describe_distances(training, near)
    assert told.startswith("this slide is 1.1 times as far from the training slides as they are")
    assert "expect" not in told
    assert "1 of 4 spots are farther than 95% of theirs" in told
    assert not similarity.is_far(near)
    assert "2.4 times" in similarity.describe_distances(training, far)
    assert "expect less than the validation r" in similarity.describe_distances(training, far)
    assert similarity.is_far(far)


def glass(patch):
    return np.full_like(patch, 240)


def ink(patch):
    marked = patch.copy()
    marked[60:160] = (20, 40, 120)
    return marked


def fold(patch):
    """Twice the tissue in a band: its transmission squared."""
    folded = patch.astype(np.float32)
    folded[60:160] *= folded[60:160] / 255
    return folded.astype(np.uint8)


def blur(patch):
    return gaussian_filter(patch, (8, 8, 0))


@pytest.mark.parametrize("spoil", [glass, ink, fold, blur])
def test_a_spoilt_patch_stands_out_on_its_slide(paper_split, spoil):
    data = paper_split.data
    learnt = paper_split.spots("train", "valid")
    training = similarity.describe_training(
        data.annotations.obsm["colour"][learnt], data.spots.iloc[learnt]
    )
    patches = data.patches.numpy()[paper_split.spots("test")].copy()
    patches[4] = spoil(patches[4])
    distances = similarity.measure_distances(training, colour_statistics(patches))
    assert distances.argmax() == 4
    assert distances[4] > 1.2 * np.delete(distances, 4).max()
