"""study/evidence.py: what validation says of each gene."""

import numpy as np
import pandas as pd
from conftest import metadata_of, rows_of
from scipy.ndimage import gaussian_filter
from test_scales import lay_grid

import common
from study import evidence, intervals

N_REAL = 5


SIZES = {1: 196}  # spots of the slides that make_fields lays


def make_fields(n_genes, seed=0, side=14):
    """(prediction, truth, spots): smooth fields on a square grid, of which the first N_REAL genes
    of the truth hold what is predicted.
    """
    random = np.random.default_rng(seed)
    places = lay_grid("square", side)
    drawn = random.normal(size=(2, n_genes, side, side))
    fields = np.array([[gaussian_filter(field, 1) for field in part] for part in drawn])
    predicted, truth = fields.reshape(2, n_genes, side**2).transpose(0, 2, 1)
    truth[:, :N_REAL] = predicted[:, :N_REAL] + 0.5 * truth[:, :N_REAL]
    spots = pd.DataFrame(places, columns=["pxl_col", "pxl_row"])
    spots = spots.assign(pitch=1.0, tissue_index=1, donor="D")
    return predicted.astype(np.float32), truth.astype(np.float32), spots


def test_few_genes_are_told_from_chance_in_a_large_panel():
    predicted, truth, spots = make_fields(160)
    found = evidence.judge_genes(predicted, truth, spots, SIZES)
    assert found["believe"][:N_REAL].all()
    assert found["believe"][N_REAL:].sum() <= 2
    r = [np.corrcoef(predicted[:, gene], truth[:, gene])[0, 1] for gene in range(160)]
    np.testing.assert_allclose(found["r"], r, atol=1e-6)
    assert (found["low"] < found["r"]).all() and (found["r"] < found["high"]).all()
    expected = (found["q"] < 0.05) & (found["low"] > 0)
    assert (found["believe"] == expected).all()
    assert found["p"][N_REAL:].lt(0.05).mean() < 0.12
    p = intervals.compare_with_chance(
        predicted, truth, np.ones(196), common.places_in_pitches(spots).to_numpy()
    )
    assert (intervals.control_discoveries(p) > 0.05).all(), "one round cannot tell as few"


def test_p_is_of_more_rounds_where_chance_is_never_as_high():
    predicted, truth, spots = make_fields(20)
    places, slides = common.places_in_pitches(spots).to_numpy(), np.ones(len(spots))
    p = evidence.find_chance(predicted, truth, slides, places)
    one = intervals.compare_with_chance(predicted, truth, slides, places)
    ten = intervals.compare_with_chance(predicted, truth, slides, places, evidence.ROUNDS)
    never = one == one.min()
    assert one.min() == 1 / 200
    np.testing.assert_array_equal(p[never], ten[never])
    np.testing.assert_array_equal(p[~never], one[~never])
    assert p[:N_REAL].max() <= 2 / (1 + 199 * evidence.ROUNDS)


def test_rounds_lay_a_prediction_in_other_ways():
    places = lay_grid("square")
    first, again, second = (intervals.lay_otherwise(places, 1, number) for number in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != second).mean() > 0.9


def test_influence_of_a_gene_is_that_of_a_group_of_one():
    random = np.random.default_rng(5)
    predicted, truth = random.normal(size=(2, 50, 4))
    truth[20:, 2] = 0.3  # constant on the second slide
    truth[:, 3] = 1
    spots = pd.DataFrame({"tissue_index": np.repeat([1, 2], [20, 30])})
    genes = list("abcd")
    members = {gene: [gene] for gene in genes}
    expected = intervals.find_influence(predicted, truth, spots, genes, members)
    found = intervals.find_gene_influence(predicted, truth, spots["tissue_index"].to_numpy())
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert np.isnan(found[:, 3]).all() and np.isfinite(found[:, :3]).all()


def test_the_error_of_a_gene_is_a_sum_over_pairs_of_spots(monkeypatch):
    predicted, truth, spots = make_fields(7)
    places, slides = common.places_in_pitches(spots).to_numpy(), np.ones(len(spots))
    influence = intervals.find_gene_influence(predicted, truth, slides)
    cells, weight, scale, freedom = intervals.weigh_pairs(places.tobytes(), 100)
    expected = [np.sqrt(scale * one @ weight[np.ix_(cells, cells)] @ one) for one in influence.T]
    monkeypatch.setattr(common, "GENES_AT_ONCE", 3)
    error, freedoms = evidence.measure_gene_errors(predicted, truth, slides, places, {1: 100})
    np.testing.assert_allclose(error, expected, rtol=1e-9)
    np.testing.assert_allclose(freedoms, freedom)


def test_one_spot_and_a_constant_gene_are_not_believed():
    predicted, truth, spots = make_fields(6)
    truth[:, 0] = 2
    found = evidence.judge_genes(predicted, truth, spots, SIZES)
    assert found.loc[0, ["r", "low", "high", "p", "q", "r_k7"]].isna().all()
    assert not found["believe"][0]
    alone = evidence.judge_genes(predicted[:1], truth[:1], spots[:1], SIZES)
    assert alone["r"].isna().all() and not alone["believe"].any()


def spots_of(*slides):
    """A square grid for each (tissue_index, donor)."""
    parts = []
    for slide, donor in slides:
        places = pd.DataFrame(lay_grid("square", 12), columns=["pxl_col", "pxl_row"])
        parts.append(places.assign(pitch=1.0, tissue_index=slide, donor=donor))
    return pd.concat(parts, ignore_index=True)


def test_a_claim_says_where_validation_spots_lie():
    spots = spots_of((1, "A"), (2, "A"), (3, "B"))
    slide = spots["tissue_index"].to_numpy()
    random = np.random.default_rng(0).random(len(spots)) < 0.2
    block = (slide == 1) & (spots["pxl_col"] < 6).to_numpy()
    beside = (slide == 1) & (spots["pxl_col"] < 8).to_numpy()
    for claim, train, valid in [
        ("none", slide < 3, slide == 9),
        ("among", (slide < 3) & ~random, (slide < 3) & random),
        ("apart", (slide < 3) & ~beside, block),
        ("donor", slide == 1, slide == 2),
        ("other", slide == 1, slide == 3),
    ]:
        roles = np.select([valid, train], ["valid", "train"], "")
        assert evidence.find_claim(spots, roles) == claim
        assert claim in evidence.CLAIMS


def test_weights_hold_what_validation_says(trained):
    row = rows_of(trained[1])[0]
    path = trained[0] / row["folder"] / "weights.safetensors"
    metadata = metadata_of(path)
    found = metadata["evidence"]
    assert found["claim"] == evidence.CLAIMS["among"]
    genes = pd.DataFrame(found["genes"])
    np.testing.assert_allclose(
        genes["r"].to_numpy(np.float64), np.array(metadata["valid_r"], np.float64), atol=1e-12
    )
    assert len(genes) == len(metadata["genes"])
    assert genes["believe"].dtype == bool
    table = pd.read_csv(path.with_name("per_gene.csv"))
    assert table["gene"].tolist() == metadata["genes"]
    assert len(found["components"]) == 2


def test_without_validation_nothing_is_said_of_genes(paper_split):
    whole = paper_split.with_all_in_training()
    nothing = np.zeros((0, len(whole.data.genes)), np.float32)
    said = evidence.describe_validation(whole, nothing, whole.data.lognorm)
    assert said == {"claim": evidence.CLAIMS["none"]}
