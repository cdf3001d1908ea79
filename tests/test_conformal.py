"""Intervals around predicted expression."""

import numpy as np
import pytest
from conftest import LOGNORM

import common
from study import conformal, splitting


def test_half_the_width_is_the_error_of_the_rank_that_counts_by_hand():
    errors = np.array([[0.1], [0.2], [0.3], [0.4]])
    # Of five errors, the new one among them, 80 % are four.
    assert conformal.choose_error(errors, 0.80) == 0.4
    assert conformal.choose_error(errors, 0.60) == 0.3
    assert conformal.choose_error(errors, 0.59) == 0.3
    assert np.isnan(conformal.choose_error(errors, 0.81)), "four errors cannot tell"
    assert np.isnan(conformal.choose_error(np.empty((0, 2)), 0.80)).all()


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_one_more_spot_is_covered_as_often_as_asked(level):
    errors = np.abs(np.random.default_rng(0).standard_t(3, (39, 20_000)))
    errors[:38].sort(axis=0)
    covered = (errors[38] <= conformal.choose_error(errors[:38], level)).mean()
    rank = np.ceil(39 * level)
    assert covered == pytest.approx(rank / 39, abs=0.01)
    assert covered > level - 0.005


def test_a_calm_validation_slide_widens_the_intervals(simulated):
    data = common.load_dataset(simulated, "lognorm")
    slides = data.spots["tissue_index"].to_numpy()
    roles = np.select([slides == 1, slides == 2, slides == 4], ["test", "valid", "train"], "")
    split = splitting.make_split(data, roles.astype("U5"), LOGNORM, 42, 0)
    truth = split.data.lognorm[np.arange(len(slides))].copy()
    middle = truth[slides == 2].mean(0)
    truth[slides == 2] = middle + (truth[slides == 4] - truth[slides == 4].mean(0)) / 3
    # Variances of 1 and 1/9: their mean is 5 of these ninths.
    assert conformal.compare_spread(split, truth) == pytest.approx(np.sqrt(5), rel=1e-3)
    truth[slides == 2] = 0
    assert conformal.compare_spread(split, truth) == 1


def test_coverage_counts_spots_and_knows_what_it_cannot_know():
    predicted = np.zeros((4, 3))
    truth = np.array([[0.1, 1, 1], [-0.2, 2, 1], [0.3, 3, 1], [-0.4, np.nan, 1]])
    half_widths = {"80": np.array([0.3, 9, np.nan]), "95": np.array([0.4, 9, 2])}
    coverage = conformal.measure_coverage(predicted, truth, half_widths, -np.inf)
    np.testing.assert_array_equal(coverage["coverage_80"], [0.75, np.nan, np.nan])
    np.testing.assert_array_equal(coverage["coverage_95"], [1, np.nan, 1])
    none = conformal.measure_coverage(predicted - 1, np.zeros((4, 3)), half_widths)
    np.testing.assert_array_equal(none["coverage_80"], [1, 1, np.nan])  # as its ends: 0 and 0


def test_limits_stop_at_the_least_expression():
    predicted = np.array([[1.0, 0.2], [-0.4, 0.2]], np.float32)
    half = np.array([0.3, np.nan])
    low = conformal.find_limit(predicted, -half)
    np.testing.assert_allclose(low, [[0.7, np.nan], [0, np.nan]], rtol=1e-6)
    high = conformal.find_limit(predicted, half)
    np.testing.assert_allclose(high, [[1.3, np.nan], [0, np.nan]], rtol=1e-6)
    assert low.dtype == high.dtype == np.float32
    assert conformal.find_limit(predicted, -half, -np.inf)[1, 0] == pytest.approx(-0.7)
