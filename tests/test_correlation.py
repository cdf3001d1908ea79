"""Pearson r and what is made of it, against scipy."""

import dataclasses

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy
import scipy.sparse
import scipy.stats
from conftest import PAPER

import common
from study import recording


def scipy_r(predicted, truth):
    """Pearson r by scipy of every column."""
    pairs = zip(predicted.T.astype(np.float64), truth.T, strict=True)
    return [scipy.stats.pearsonr(x, y).statistic for x, y in pairs]


def test_pearson_equals_scipy_gene_by_gene():
    rng = np.random.default_rng(0)
    truth = rng.gamma(0.5, size=(50, 7))
    predicted = (truth + rng.normal(size=truth.shape)).astype(np.float32)
    r = common.pearson_per_gene(predicted, truth)
    np.testing.assert_allclose(r, scipy_r(predicted, truth), rtol=1e-12)


def test_large_offset_costs_no_precision():
    values = np.random.default_rng(0).normal(size=(40, 1))
    r = common.pearson_per_gene(values + 1e5, values)
    np.testing.assert_allclose(r, scipy_r(values + 1e5, values), rtol=1e-9)


@pytest.mark.parametrize("where", ["predicted", "truth"])
@pytest.mark.parametrize("value", [0.1, np.nan, np.inf])
def test_undefined_gene_is_nan_and_the_others_are_not(where, value):
    rng = np.random.default_rng(0)
    tables = {"predicted": rng.normal(size=(9, 3)), "truth": rng.normal(size=(9, 3))}
    changed = slice(None) if np.isfinite(value) else 4  # A constant gene, or one value of it.
    tables[where][changed, 1] = value
    with np.errstate(invalid="ignore"):
        r = common.pearson_per_gene(**tables)
    assert np.isnan(r[1])
    assert np.isfinite(r[[0, 2]]).all()


def test_a_single_spot_has_no_r():
    assert np.isnan(common.pearson_per_gene(np.ones((1, 3)), np.ones((1, 3)))).all()


def test_shapes_must_agree():
    with pytest.raises(AssertionError):
        common.pearson_per_gene(np.ones((3, 2)), np.ones((2, 3)))


def test_several_slides_are_averaged_and_pooled_apart():
    rng = np.random.default_rng(1)
    truth = rng.poisson(2.0, (30, 2)).astype(float)  # with ties
    slides = np.repeat([1, 2, 3], 10)
    predicted = truth + rng.normal(size=truth.shape) + 5 * slides[:, None]
    scores = common.score_genes(predicted, truth, slides)
    parts = [(predicted[slides == slide], truth[slides == slide]) for slide in (1, 2, 3)]
    within = [scipy_r(*part) for part in parts]
    np.testing.assert_allclose(scores["r"], np.mean(within, axis=0))
    ranked = [scipy_r(*(scipy.stats.rankdata(values, axis=0) for values in part)) for part in parts]
    np.testing.assert_allclose(scores["spearman"], np.mean(ranked, axis=0))
    variances = [measured.var(0) for _, measured in parts]
    np.testing.assert_allclose(scores["variance"], np.mean(variances, axis=0))
    np.testing.assert_allclose(scores["r_pooled"], scipy_r(predicted, truth))
    np.testing.assert_allclose(scores["mse"], ((predicted - truth) ** 2).mean(0))


def score_test_spots(split, predicted):
    """(record, per-gene table) of a prediction of split.scored() on the test slide, target
    lognorm.
    """
    recipe = PAPER | {"TARGET": "lognorm", "REFIT": False}
    records, per_gene, _ = recording.score_split("x", recipe, split, predicted, {})
    (record,) = [record for record in records if record["split"] == "test"]
    return record, per_gene.set_index("gene")


def test_missing_and_constant_genes_lower_the_count_and_never_the_mean(paper_split):
    data = paper_split.data
    varied, _, constant, *_ = data.genes
    genes = [varied, constant, "nowhere", "nowhere"]
    groups = pd.DataFrame({"group": ["HEG", "HEG", "HEG", "HVG"], "gene": genes, "rank": 1})
    groups.attrs["source"] = "by hand"
    split = dataclasses.replace(paper_split, groups=groups)
    predicted = np.full((len(split.scored()), len(data.genes)), 0.1, np.float32)
    predicted[:, :2] = np.random.default_rng(0).normal(size=(len(predicted), 2))
    record, _ = score_test_spots(split, predicted)
    measured = data.lognorm[split.spots("test")]
    r = scipy_r(predicted[-len(measured) :, :2], measured[:, :2])
    assert record["heg"] == pytest.approx(r[0], abs=1e-6)
    assert record["heg_n"] == 1
    ceiling = data.annotations.var.loc[varied, "ceiling_3"]
    assert record["heg_ceiling"] == pytest.approx(ceiling), "of the genes that have an r"
    for group in ("hvg", "mg"):
        assert record[group] is None
        assert record[f"{group}_n"] == 0
    assert record["all"] == pytest.approx(np.mean(r), abs=1e-6)
    assert record["all_n"] == 2
    other = predicted.copy()
    other[:, [1, 3]] = predicted[:, [3, 1]]
    as_many, _ = score_test_spots(split, other)
    assert as_many["all_n"] == 2
    assert as_many["all_lacks"] != record["all_lacks"], "as many genes, and others"
    assert as_many["heg_lacks"] == record["heg_lacks"] != "-"


def test_a_new_metric_is_in_per_gene_csv_and_in_the_records(paper_split, monkeypatch):
    def absolute_error(predicted, truth):
        return np.abs(predicted - truth).mean(0)

    monkeypatch.setitem(common.METRICS, "absolute_error", absolute_error)
    shape = len(paper_split.scored()), len(paper_split.data.genes)
    predicted = np.random.default_rng(0).random(shape, np.float32)
    record, per_gene = score_test_spots(paper_split, predicted)
    measured = paper_split.data.lognorm[paper_split.spots("test")]
    expected = np.abs(predicted[-len(measured) :].astype(float) - measured).mean(0)
    found = per_gene["test_lognorm_absolute_error"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    defined = per_gene.loc[paper_split.members["heg"], "test_lognorm_r"].dropna().index
    assert record["heg_absolute_error"] == pytest.approx(found[defined].mean())


def test_log_normalise_equals_scanpy():
    counts = np.random.default_rng(0).poisson(1.0, (6, 9)).astype(np.float32)
    counts[0, 0] = 1
    table = anndata.AnnData(counts.copy())
    scanpy.pp.normalize_total(table, target_sum=1e4)
    scanpy.pp.log1p(table)
    own = common.log_normalise(scipy.sparse.csr_matrix(counts[:, :4]), counts.sum(1))
    np.testing.assert_allclose(own, table.X[:, :4], rtol=1e-6)
