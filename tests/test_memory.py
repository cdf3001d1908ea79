"""Expression that memory could not hold: it stays on disk, a part of it is read at a time, and what
follows from it is the same for every size of the parts.
"""

import mmap

import anndata
import numpy as np
import pandas as pd
import pytest
from conftest import PAPER, ask

import common
from study import methods, panels, recording, splitting

LOSO = PAPER | {"PROTOCOL": "loso"}


def base_of(array):
    """What the memory of an array belongs to in the end."""
    while isinstance(array, np.ndarray):
        array = array.base
    return array


def split_of(simulated, recipe):
    """The first Split of a protocol on the simulated slides, log-normalised."""
    data = common.load_dataset(simulated, "lognorm")
    roles = splitting.split_spots(data.spots, recipe, 42)[0]
    return splitting.make_split(data, roles, recipe | {"TARGET": "lognorm"}, 42, 0)


@pytest.mark.parametrize("target", ["lognorm", "harmony"])
def test_expression_is_memory_mapped(simulated, target):
    data = common.load_dataset(simulated, target)
    assert isinstance(base_of(data.target), mmap.mmap)
    assert isinstance(base_of(data.lognorm), mmap.mmap)


def test_the_panel_of_some_slides_holds_no_expression(simulated):
    whole = common.load_dataset(simulated, "lognorm")
    part = panels.restrict_panel(whole, (1,))
    assert part.lognorm is part.target
    assert part.lognorm.values is whole.lognorm
    assert part.lognorm.shape == (len(whole.spots), len(part.genes))


def test_some_genes_of_some_genes():
    values = np.arange(40).reshape(4, 10)
    some = panels.GenesOf(panels.GenesOf(values, np.array([1, 4, 7, 9])), np.array([3, 1]))
    assert some.shape == (4, 2)
    np.testing.assert_array_equal(some[np.array([2, 0])], [[29, 24], [9, 4]])


def results_of(split):
    """All that follows from expression: gene groups, a ridge, scores and influence."""
    records, per_gene, influence = recording.score_split(
        "x",
        PAPER | {"TARGET": "lognorm", "REFIT": False},
        split,
        ask(methods.ridge_on_colour, {"REFIT": False, "NEIGHBOURHOOD": True}, split)[0],
        {},
    )
    features = split.data.annotations.obsm["colour"]
    ridge, _ = methods.learn_ridge(split, features, split.spots("train"))
    numbers = pd.DataFrame(records).select_dtypes("number")
    return split.groups["gene"], numbers, per_gene, influence, ridge.predict(features)


@pytest.mark.parametrize("recipe", [PAPER, LOSO], ids=["paper", "loso"])
def test_results_do_not_depend_on_how_much_is_read_at_a_time(simulated, monkeypatch, recipe):
    expected = results_of(split_of(simulated, recipe))
    monkeypatch.setattr(common, "SPOTS_AT_ONCE", 7)
    monkeypatch.setattr(common, "GENES_AT_ONCE", 5)
    panels.restrict_panel.cache_clear()
    groups, *found = results_of(split_of(simulated, recipe))
    assert groups.equals(expected[0])
    for one, other in zip(found, expected[1:], strict=True):
        one, other = (pd.DataFrame(values).select_dtypes("number") for values in (one, other))
        # A layout that scores as the prediction but for the last bit may count for chance or not.
        by_chance = one.columns.astype(str).str.contains("_[pq]$")
        np.testing.assert_allclose(one.loc[:, by_chance], other.loc[:, by_chance], atol=0.03)
        one, other = one.loc[:, ~by_chance], other.loc[:, ~by_chance]
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_mean_and_variance_are_numpys():
    values = np.random.default_rng(0).normal(3, 0.5, (50, 4)).astype(np.float32)
    spots = np.array([1, 5, 7, 30, 49])
    mean, variance = common.mean_and_variance(values, spots)
    np.testing.assert_allclose(mean, values[spots].mean(0, np.float64))
    np.testing.assert_allclose(variance, values[spots].var(0, np.float64), rtol=1e-9)


def test_counts_of_several_slides_are_written_whole(simulated):
    counts = anndata.read_h5ad(simulated / "dataset" / "counts.h5ad")
    lognorm = np.load(simulated / "dataset" / "lognorm.npy")
    assert counts.X.dtype == np.int32
    assert counts.obs["tissue_index"].unique().tolist() == [1, 2, 3, 4]
    own = common.log_normalise(counts.X, counts.obs["n_counts"])
    np.testing.assert_array_equal(own, lognorm)
    table = pd.read_csv(simulated / "dataset" / "dataset.csv")
    assert table["id"].tolist() == counts.obs_names.tolist()
