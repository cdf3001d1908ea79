"""Pearson r and what is made of it, against scipy."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats

import common


def test_pearson_equals_scipy_gene_by_gene():
    rng = np.random.default_rng(0)
    truth = rng.gamma(0.5, size=(50, 7))
    predicted = (truth + rng.normal(size=truth.shape)).astype(np.float32)
    expected = [scipy.stats.pearsonr(predicted[:, g].astype(float), truth[:, g]).statistic for g in range(7)]
    np.testing.assert_allclose(common.pearson_per_gene(predicted, truth), expected, rtol=1e-12)


def test_large_offset_costs_no_precision():
    values = np.random.default_rng(0).normal(size=(40, 1))
    r = common.pearson_per_gene(values + 1e6, values)
    np.testing.assert_allclose(r, scipy.stats.pearsonr((values + 1e6)[:, 0], values[:, 0]).statistic, rtol=1e-9)


@pytest.mark.parametrize("where", ["predicted", "truth"])
@pytest.mark.parametrize("value", [0.1, np.nan, np.inf])
def test_undefined_gene_is_nan_and_the_others_are_not(where, value):
    rng = np.random.default_rng(0)
    tables = {"predicted": rng.normal(size=(9, 3)), "truth": rng.normal(size=(9, 3))}
    if np.isfinite(value):
        tables[where][:, 1] = value  # constant
    else:
        tables[where][4, 1] = value
    with np.errstate(invalid="ignore"):
        r = common.pearson_per_gene(**tables)
    assert np.isnan(r[1]) and np.isfinite(r[[0, 2]]).all()


def test_a_single_spot_has_no_r():
    assert np.isnan(common.pearson_per_gene(np.ones((1, 3)), np.ones((1, 3)))).all()


def test_shapes_must_agree():
    with pytest.raises(AssertionError):
        common.pearson_per_gene(np.ones((3, 2)), np.ones((2, 3)))


def test_several_slides_are_averaged_and_pooled_apart():
    rng = np.random.default_rng(1)
    truth, slides = rng.normal(size=(30, 2)), np.repeat([1, 2, 3], 10)
    predicted = truth + rng.normal(size=truth.shape) + 5 * slides[:, None]
    scores = common.score_genes(predicted, truth, slides)
    within = [scipy.stats.pearsonr(predicted[slides == s, 0], truth[slides == s, 0]).statistic for s in (1, 2, 3)]
    assert scores["r"][0] == pytest.approx(np.mean(within))
    assert scores["r_pooled"][0] == pytest.approx(scipy.stats.pearsonr(predicted[:, 0], truth[:, 0]).statistic)
    assert scores["mse"][0] == pytest.approx(np.mean((predicted[:, 0] - truth[:, 0]) ** 2))


def test_missing_and_constant_genes_lower_the_count_and_never_the_mean(simulated, tmp_path):
    data = common.load_dataset(simulated, "lognorm")
    a, _b, constant, *_ = data.genes
    genes = [a, constant, "nowhere", "nowhere"]
    groups = pd.DataFrame({"group": ["HEG", "HEG", "HEG", "HVG"], "gene": genes, "rank": 1})
    groups.attrs["source"] = "by hand"
    recipe = {"TRAIN_SLIDES": (), "TEST_SLIDE": 3, "VALID_FRACTION": 0.2, "PROTOCOL": "paper", "TARGET": "lognorm"}
    experiment = common.Experiment(data, common.split_spots(data.spots, recipe, 42)[0], groups, tmp_path, 42)
    predicted = np.full((len(experiment.rows(*common.SPLITS)), len(data.genes)), 0.1, np.float32)
    predicted[:, :2] = np.random.default_rng(0).normal(size=(len(predicted), 2))
    (row,) = (row for row in common.score_rows("x", recipe, experiment, predicted, {})[0] if row["split"] == "test")
    measured = data.lognorm[experiment.rows("test")]
    r = [scipy.stats.pearsonr(predicted[-len(measured) :, g], measured[:, g]).statistic for g in (0, 1)]
    assert row["heg"] == pytest.approx(r[0], abs=1e-6) and row["heg_n"] == 1
    assert row["heg_ceiling"] == pytest.approx(data.counts.var.loc[a, "ceiling_3"]), "of the genes that have an r"
    assert row["hvg"] is None and row["hvg_n"] == 0 and row["mg"] is None and row["mg_n"] == 0
    assert row["all"] == pytest.approx(np.mean(r), abs=1e-6) and row["all_n"] == 2


def test_log_normalise_equals_scanpy():
    import anndata
    import scanpy
    import scipy.sparse

    counts = np.random.default_rng(0).poisson(1.0, (6, 9)).astype(np.float32)
    counts[0, 0] = 1
    table = anndata.AnnData(counts.copy())
    scanpy.pp.normalize_total(table, target_sum=1e4)
    scanpy.pp.log1p(table)
    own = common.log_normalise(scipy.sparse.csr_matrix(counts[:, :4]), counts.sum(1))
    np.testing.assert_allclose(own, table.X[:, :4], rtol=1e-6)
