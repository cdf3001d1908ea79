"""Intervals that hold the true r as often as they say, and genes that are told from chance."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from scipy.spatial.distance import cdist
from test_benchmarks import load_benchmark
from test_scales import lay_grid

import common
from study import intervals, recording

NAMES = [str(gene) for gene in range(6)]
MEMBERS = {"heg": NAMES[:2], "hvg": NAMES[2:3], "mg": [], "all": NAMES}
KEYS = ("heg", "hvg", "mg", "all")


def smooth_fields(places, n_fields, reach, random):
    """(n, n_fields) fields whose correlation falls exponentially, to 1/e at `reach` pitches."""
    covariance = np.exp(-cdist(places, places) / reach) + 1e-9 * np.eye(len(places))
    return np.linalg.cholesky(covariance) @ random.normal(size=(len(places), n_fields))


def make_slides(n_slides=1, side=12, genes=6, seed=0):
    """(spots, predicted, truth) of slides on which both share a smooth field."""
    random, tables = np.random.default_rng(seed), []
    places = lay_grid("hexagonal", side)
    for slide in range(1, n_slides + 1):
        table = pd.DataFrame(places * 100, columns=["pxl_col", "pxl_row"])
        tables.append(table.assign(tissue_index=slide, pitch=100.0))
    fields = [smooth_fields(places, genes, 1.5, random) for _ in tables]
    field = np.concatenate(fields)
    spots = pd.concat(tables, ignore_index=True)
    predicted = field + random.normal(size=field.shape)
    return spots, predicted, field + random.normal(size=field.shape)


def test_a_slide_of_few_spots_has_no_interval(monkeypatch):
    monkeypatch.setattr(intervals, "LEAST_SPOTS", 36)
    for side, is_enough in ((5, False), (6, True)):
        spots, predicted, truth = make_slides(2, side=side)
        moved = intervals.find_influence(predicted, truth, spots, NAMES, MEMBERS)
        error, freedom = recording.measure_errors(moved, recording.locate_spots(spots))
        interval = intervals.find_interval(0.5, error[0], freedom[0])
        assert (interval is not None) == is_enough


# ---------------------------------------------------------------------------------------- influence
@pytest.mark.parametrize("pooled", [False, True])
def test_influence_is_what_leaving_a_spot_out_takes_away(pooled):
    """To first order: the jackknife of the mean r, done by hand."""
    spots, predicted, truth = make_slides(2)
    predicted += 2.0 * spots["tissue_index"].to_numpy()[:, None]
    predicted[:, 5] = 3.0
    moved = intervals.find_influence(predicted, truth, spots, NAMES, MEMBERS, pooled)
    slides = np.zeros(len(spots)) if pooled else spots["tissue_index"].to_numpy()

    def mean_r(kept):
        by_slide = []
        for slide in np.unique(slides):
            inside = kept & (slides == slide)
            pairs = zip(predicted[inside, :5].T, truth[inside, :5].T, strict=True)
            by_slide.append([scipy.stats.pearsonr(x, y)[0] for x, y in pairs])
        return np.mean(by_slide, axis=0)

    whole = mean_r(np.ones(len(spots), bool))
    left_out = range(0, len(spots), 7)
    taken = np.array([whole - mean_r(np.arange(len(spots)) != spot) for spot in left_out])
    for key, chosen in {"heg": [0, 1], "hvg": [2], "all": range(5)}.items():
        expected, found = taken[:, list(chosen)].mean(1), moved[key].to_numpy()[left_out]
        assert np.corrcoef(expected, found)[0, 1] > 0.99
        assert found.std() == pytest.approx(expected.std(), rel=0.1)
    assert moved["mg"].isna().all()
    np.testing.assert_allclose(moved.groupby(slides).sum()[["heg", "all"]], 0, atol=1e-9)


# ------------------------------------------------------------------------------------------- errors
def test_of_independent_spots_the_error_is_the_usual_one():
    places, random = lay_grid("hexagonal", 20), np.random.default_rng(0)
    values = random.normal(size=(400, 200))
    values = (values - values.mean(0)) / 400
    errors, freedoms = intervals.measure_error(values, np.ones(400), places)
    usual = 1 / np.sqrt(400)
    assert usual < errors.mean() < 1.6 * usual, "wider, since neighbours might go together"
    assert (freedoms < 400).all()


def test_slides_are_independent():
    spots, predicted, truth = make_slides(2)
    places = common.places_in_pitches(spots).to_numpy()
    slides = spots["tissue_index"].to_numpy()
    moved = intervals.find_influence(predicted, truth, spots, NAMES, MEMBERS)[["heg"]].to_numpy()
    both, freedom = intervals.measure_error(moved, slides, places)
    parts = ([values[slides == slide] for values in (moved, slides, places)] for slide in (1, 2))
    by_slide = [intervals.measure_error(*part) for part in parts]
    variances = [error[0] ** 2 for error, _ in by_slide]
    assert both[0] ** 2 == pytest.approx(sum(variances))
    assert max(found[0] for _, found in by_slide) < freedom[0]
    assert freedom[0] <= sum(found[0] for _, found in by_slide) + 1e-9


def test_of_a_part_of_the_spots_the_error_is_that_of_their_whole_slide():
    """Validation spots drawn at random lie apart, and err together all the same."""
    places, random = lay_grid("hexagonal", 34), np.random.default_rng(0)
    values = smooth_fields(places, 300, 2.0, random)
    some = np.sort(random.permutation(len(places))[:231])
    drawn, n = values[some], len(some)
    influence = (drawn - drawn.mean(0)) / n
    slides, true = np.ones(n), drawn.mean(0).std()

    def measure(sizes):
        errors, _ = intervals.measure_error(influence, slides, places[some], sizes)
        return np.sqrt((errors**2).mean())

    assert 0.9 * true < measure({1: len(places)}) < 1.2 * true
    assert measure(None) < 0.8 * true


def test_close_spots_may_stand_for_one_cell():
    """Large slides are cut into cells, which changes the error little."""
    places, random = lay_grid("hexagonal", 34), np.random.default_rng(0)
    values = smooth_fields(places, 20, 2.0, random)
    values = (values - values.mean(0)) / len(values)
    cells, *_ = intervals.weigh_pairs(places.tobytes(), len(places))
    assert cells.max() + 1 < len(places)
    coarse, _ = intervals.measure_error(values, np.ones(len(values)), places)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "CELLS", 100)
        intervals.weigh_pairs.cache_clear()
        fine, _ = intervals.measure_error(values, np.ones(len(values)), places)
    intervals.weigh_pairs.cache_clear()
    np.testing.assert_allclose(coarse, fine, rtol=0.05)


@pytest.mark.parametrize("n", [1, 2])
def test_so_few_spots_have_no_interval(n):
    places = lay_grid("hexagonal", 2)[:n]
    errors, freedoms = intervals.measure_error(np.zeros((n, 1)), np.ones(n), places)
    assert intervals.find_interval(0.3, errors[0], freedoms[0]) is None


def test_intervals_hold_the_true_r(monkeypatch):
    """300 slides of 144 spots, range 1.5 pitches; the whole table is in benchmarks/README.md."""
    benchmark = load_benchmark("check_intervals")
    monkeypatch.setattr(benchmark, "SLIDES", 300)
    monkeypatch.setattr(benchmark, "GENES", 20)
    found = benchmark.check_field(lay_grid("hexagonal", 12), 1.5)
    assert 0.88 <= found["coverage"] <= 0.995
    assert 0.88 <= found["paired: coverage"] <= 0.995


# -------------------------------------------------------------------------------------- differences
def write_record(out, setting, seed, spots, predicted, truth, n_genes=6):
    """A record of the test slide whose influence lies in its folder."""
    folder = out / f"{setting}{seed}"
    folder.mkdir()
    moved = intervals.find_influence(predicted, truth, spots, NAMES, MEMBERS)
    places = recording.locate_spots(spots)
    places.join(moved.add_prefix("lognorm_")).to_csv(folder / "influence.csv", index=False)
    record = {"setting": setting, "seed": seed, "fold": 0, "slide": "1", "folder": folder.name}
    record |= {"split": "test", "truth": "lognorm", "protocol": "paper"}
    r = pd.Series(common.pearson_per_gene(predicted, truth), NAMES)
    record |= {key: r[members].mean() for key, members in MEMBERS.items()}
    record |= {f"{key}_lacks": "" if n_genes == 6 else "one" for key in KEYS}
    return record | {f"{key}_n": n_genes for key in KEYS}


@pytest.fixture
def written(tmp_path):
    """(records, output folder) of two seeds: "b" is "a" with a little noise; "c" has an r for fewer
    genes.
    """
    records, random = [], np.random.default_rng(0)
    spots, predicted, truth = make_slides()
    for seed in (1, 2):
        noisy = predicted + 0.1 * random.normal(size=predicted.shape)
        records.append(write_record(tmp_path, "a", seed, spots, predicted, truth))
        records.append(write_record(tmp_path, "b", seed, spots, noisy, truth))
        records.append(write_record(tmp_path, "c", seed, spots, noisy, truth, n_genes=5))
    records += [record | {"split": "valid"} for record in records]
    return records, tmp_path


def test_a_paired_difference_is_narrower_than_either_interval(written):
    records, out = written
    line = recording.pair_differences(records, out, {"b": "a"}).set_index("group").loc["HEG"]
    r = {setting: [] for setting in "abc"}
    for record in records[:6]:
        r[record["setting"]].append(record["heg"])
    assert line["difference"] == pytest.approx(np.mean(r["b"]) - np.mean(r["a"]))
    assert line["low"] < line["difference"] < line["high"]
    table = recording.select_lines(records)
    of_one = table[table["setting"] == "a"]
    low, high = recording.find_headline_interval(of_one, out)
    assert high - low > 2 * (line["high"] - line["low"])
    influence, places = recording.join_influence(of_one, out)
    _, (freedom, *_) = recording.measure_errors(influence[["heg"]], places)
    assert 3 < freedom < 144


def test_a_setting_minus_itself_has_no_width(written):
    records, out = written
    table = recording.pair_differences(records, out, {"a": "a"}).set_index("group")
    assert table.loc["HEG", ["difference", "low", "high"]].tolist() == [0, 0, 0]


def test_r_of_other_numbers_of_genes_has_no_difference(written):
    table = recording.pair_differences(*written, {"c": "a"})
    assert table[["difference", "low", "high"]].isna().all(axis=None)


def test_of_two_seeds_one_without_r_leaves_no_interval(written):
    """The other's alone, halved by the number of seeds, would be half as wide as it should be."""
    records, out = written
    of_one = recording.select_lines(records).query("setting == 'a'")
    path = out / "a2" / "influence.csv"
    influence = pd.read_csv(path).assign(lognorm_heg=np.nan)
    influence.to_csv(path, index=False)
    assert np.isnan(recording.find_headline_interval(of_one, out)).all()


def test_differences_do_not_depend_on_the_order_of_the_records(written):
    records, out = written
    minus = {"b": "a", "c": "a"}
    table = recording.pair_differences(records, out, minus)
    again = recording.pair_differences(records[::-1], out, minus)
    pd.testing.assert_frame_equal(table, again)


# ------------------------------------------------------------------------------------------- chance
def test_fields_without_a_relation_are_rarely_told_from_chance():
    places, random = lay_grid("hexagonal", 14), np.random.default_rng(0)
    predicted, truth = (smooth_fields(places, 400, 1.5, random) for _ in range(2))
    slides = np.ones(len(places), int)
    p = intervals.compare_with_chance(predicted, truth, slides, places)
    assert 0.015 < (p <= 0.05).mean() < 0.09
    assert 0.4 < np.median(p) < 0.6
    assert (intervals.control_discoveries(p) < 0.05).mean() < 0.02


def test_a_shared_field_is_told_from_chance_and_the_rest_is_not():
    places, random = lay_grid("hexagonal", 14), np.random.default_rng(0)
    predicted, truth = (smooth_fields(places, 200, 1.5, random) for _ in range(2))
    truth[:, :60] += predicted[:, :60]
    truth[:, 199] = 2.0
    slides = np.repeat([1, 2], len(places))
    predicted, truth, places = (np.tile(values, (2, 1)) for values in (predicted, truth, places))
    p = intervals.compare_with_chance(predicted, truth, slides, places)
    q = intervals.control_discoveries(p)
    assert (q[:60] < 0.05).mean() > 0.9
    assert (q[60:199] < 0.05).mean() < 0.06
    assert np.isnan([p[199], q[199]]).all()
    expected = scipy.stats.false_discovery_control(p[:199])
    np.testing.assert_allclose(q[:199], expected)


def test_a_field_that_is_laid_as_it_is_has_the_r_of_pearson():
    random = np.random.default_rng(0)
    predicted, truth = random.normal(5, 1, (2, 50, 4)).astype(np.float32)
    laid = np.array([np.arange(50), random.integers(0, 50, 50)])
    found = intervals.correlate_laid(predicted, truth, laid)
    for line, spots in zip(found, laid, strict=True):
        r = common.pearson_per_gene(predicted[spots], truth)
        np.testing.assert_allclose(line, r, rtol=1e-4)


def test_what_varies_by_the_last_digit_alone_has_no_r():
    truth = np.random.default_rng(0).normal(3, 1, (40, 2)).astype(np.float32)
    predicted = np.full((40, 2), 3.0, np.float32)
    predicted[truth > 3] = np.nextafter(np.float32(3), np.float32(4))
    assert np.isnan(common.pearson_per_gene(predicted, truth)).all()
    predicted[truth > 3] = 3.001
    assert (common.pearson_per_gene(predicted, truth) > 0.5).all()
