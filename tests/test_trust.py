"""What tells how far a number can be trusted: ceilings, protocols that leak nothing, further metrics, leak check."""

import json
import shutil

import anndata
import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
import scipy.io
import scipy.sparse
import scipy.stats
from conftest import TINY, load_script, run_script

import common


def last_json(stdout):
    return json.loads(stdout.strip().splitlines()[-1])


# ------------------------------------------------------------------------------------- ceiling, Moran's I


@pytest.fixture(scope="module")
def simulated_counts():
    """{depth: (counts, totals, r of knowing each spot's realised rate)} of one slide of 1,500 spots, 258 genes."""
    script, found = load_script("18"), {}
    names = dict.fromkeys(" ".join([*script.PROGRAMMES.values(), script.HOUSEKEEPING]).split())
    genes = script.gene_table(list(names), np.random.default_rng(1))
    table = script.hexagonal_grid(1500)
    shape = tuple(int(table[axis].max() + 3 * script.PITCH // 2) for axis in ("pxl_row", "pxl_col"))
    fields = script.tissue_fields(table, shape, np.random.default_rng(1))
    spots = table[table["in_tissue"] == 1].reset_index(drop=True)
    for depth in (1000, 100):
        script.DEPTH = depth
        counts, rate, _ = script.simulate_counts(fields, spots, genes, np.random.default_rng(depth))
        counts = counts.toarray()
        totals = counts.sum(1)
        kept = totals > 0
        knowing = common.log_normalise(rate, rate.sum(1))[kept]
        r = common.pearson_per_gene(common.log_normalise(counts, totals)[kept], knowing)
        found[depth] = counts[kept], totals[kept], r
    return found


def halve(counts, totals, random):
    """The plain estimator: r between two halves of the counts, Spearman-Brown, square root."""
    one, depth = random.binomial(counts, 0.5), random.binomial(totals, 0.5)
    kept = (depth > 0) & (depth < totals)
    halves = [common.log_normalise(c[kept], d[kept]) for c, d in ((one, depth), (counts - one, totals - depth))]
    r = common.pearson_per_gene(*halves).clip(0)
    return np.sqrt(2 * r / (1 + r))


@pytest.mark.parametrize("depth, most", [(1000, 0.02), (100, 0.04)])
def test_ceiling_is_the_r_of_knowing_every_rate(simulated_counts, depth, most):
    counts, totals, known = simulated_counts[depth]
    estimated, told = load_script("19").counting_ceiling(counts, totals), known > 0.3
    error = (estimated - known)[told]
    assert told.sum() > 150 and np.abs(error).mean() < most and abs(error.mean()) < most / 2
    plain = np.abs(halve(counts, totals, np.random.default_rng(0)) - known)[told].mean()
    assert np.abs(error).mean() < plain / 2


def test_ceiling_stays_in_its_bounds():
    random = np.random.default_rng(0)
    totals = random.integers(500, 5000, 300)
    rates = np.exp(random.normal(size=300))
    counts = np.stack([totals * 0, random.poisson(totals * 1e-3), (totals * rates).astype(int), totals * 0], axis=1)
    counts[0, 3] = 1
    nothing, noise, certain, once = load_script("19").counting_ceiling(counts, totals)
    assert np.isnan(nothing) and 0 <= noise < 0.3 and 0.995 < certain <= 1 and 0 <= once <= 1


def test_morans_i_equals_scanpys():
    import scanpy
    import scipy.sparse
    from scipy.spatial.distance import cdist

    table = load_script("18").hexagonal_grid(60)
    centres = table[["pxl_col", "pxl_row"]].to_numpy(float)
    values = np.random.default_rng(0).normal(size=(len(table), 3)).astype(np.float32)
    values[:, 1] = np.sin(centres[:, 0] / 500)
    near = (cdist(centres, centres) < 1.2 * 329) & ~np.eye(len(table), dtype=bool)
    expected = scanpy.metrics.morans_i(scipy.sparse.csr_matrix(near.astype(float)), values.T)
    own = load_script("19").morans_i(np.column_stack([values, np.ones(len(table))]), centres, 329)
    np.testing.assert_allclose(own[:3], expected, rtol=1e-5)
    assert np.isnan(own[3]) and own[1] > 0.5


def test_genes_are_described_slide_by_slide(simulated):
    data = common.load_dataset(simulated, "lognorm")
    at = (data.spots["tissue_index"] == 3).to_numpy()
    expected = load_script("19").counting_ceiling(data.counts.X[at].toarray(), data.counts.obs["n_counts"][at])
    np.testing.assert_array_equal(data.counts.var["ceiling_3"], expected)
    truth = anndata.read_h5ad(simulated / "truth" / "3.h5ad")[data.spots["barcode"][at].to_numpy(), data.genes]
    shown = common.pearson_per_gene(truth.layers["visible"], data.lognorm[at])
    np.testing.assert_allclose(data.counts.var["image_ceiling_3"], shown)


# ------------------------------------------------------------------------------------- protocols


RECIPE = {"TRAIN_SLIDES": (), "TEST_SLIDE": 3, "VALID_FRACTION": 0.2}


def slides_with_donors(donors):
    slide = np.repeat(np.arange(1, len(donors) + 1), 4)
    return pd.DataFrame({"tissue_index": slide, "donor": np.array(list(donors))[slide - 1]})


def used(spots, roles):
    return {role: sorted(set(spots["tissue_index"][roles == role])) for role in ("train", "valid", "test")}


def test_loso_leaves_the_donor_out():
    spots = slides_with_donors("AABBC")
    trainings = [used(spots, roles) for roles in common.split_spots(spots, RECIPE | {"PROTOCOL": "loso"}, 42)]
    assert trainings == [
        {"train": [4, 5], "valid": [3], "test": [1]},
        {"train": [4, 5], "valid": [3], "test": [2]},
        {"train": [1, 2], "valid": [5], "test": [3]},
        {"train": [1, 2], "valid": [5], "test": [4]},
        {"train": [2, 3, 4], "valid": [1], "test": [5]},
    ]


def test_loso_over_one_donor_and_over_chosen_slides():
    spots = slides_with_donors("AAAA")
    trainings = [used(spots, roles) for roles in common.split_spots(spots, RECIPE | {"PROTOCOL": "loso"}, 42)]
    assert [t["test"] + t["valid"] for t in trainings] == [[1, 2], [2, 3], [3, 4], [4, 1]]
    assert all(len(t["train"]) == 2 for t in trainings)
    chosen = RECIPE | {"PROTOCOL": "loso", "TRAIN_SLIDES": (1, 2, 4)}
    trainings = [used(spots, roles) for roles in common.split_spots(spots, chosen, 42)]
    assert [t["test"] for t in trainings] == [[1], [2], [4]]
    assert all(3 not in [*t["train"], *t["valid"]] for t in trainings)


@pytest.fixture(scope="module")
def disturbed(simulated, tmp_path_factory):
    """The simulated slides twice, target lognorm: as they are, and with other counts on slide 3, made anew by 19."""
    roots = [tmp_path_factory.mktemp("same") / "root", tmp_path_factory.mktemp("other") / "root"]
    for root in roots:
        shutil.copytree(simulated, root)
    path = roots[1] / "data" / "filtered_expression_matrices" / "3" / "matrix.mtx"
    counts = scipy.io.mmread(path).toarray()
    scipy.io.mmwrite(
        path, scipy.sparse.coo_matrix(np.random.default_rng(0).permutation(counts.ravel()).reshape(counts.shape))
    )
    for root in roots:
        assert run_script("19", "--data-root", root, "--target", "lognorm", "--hvg-per-slide", 100) == 0
    return roots


SMALL = (*TINY, "--target", "lognorm", "--epochs", 1)
BLEEP = ("--only", "BLEEP", "--bleep-epochs", 1)


@pytest.mark.parametrize("name, protocol, more", [("20", "loso", ()), ("20", "block", ()), ("25", "loso", BLEEP)])
def test_expression_of_the_test_slide_changes_nothing_but_its_score(
    disturbed, tmp_path, capsys, monkeypatch, name, protocol, more
):
    monkeypatch.setattr(common, "MARGIN", 0)  # ten spots a slide leave no room
    monkeypatch.setattr(common, "FOLDS", 2)
    found = []
    for number, root in enumerate(disturbed):
        out = tmp_path / str(number)
        assert run_script(name, "--data-root", root, "--out", out, *SMALL, "--protocol", protocol, *more) == 0
        rows = last_json(capsys.readouterr().out)["rows"]
        found.append([row | {"out": out} for row in rows if (row["split"], row["slide"]) == ("test", "3")])
    assert len(found[0]) == {("20", "loso"): 2, ("20", "block"): 4, ("25", "loso"): 1}[name, protocol]
    for quiet, loud in zip(*found, strict=True):
        folders = [row["out"] / row["folder"] for row in (quiet, loud)]
        for table in ("genes.csv", "split.csv"):
            assert folders[0].joinpath(table).read_text() == folders[1].joinpath(table).read_text()
        predictions = [anndata.read_h5ad(folder / "predictions.h5ad") for folder in folders]
        np.testing.assert_array_equal(predictions[0].X, predictions[1].X)
        assert list(predictions[0].var_names) == list(predictions[1].var_names)
        if quiet["weights"] == "random":
            weights = [safetensors.numpy.load_file(folder / "weights.safetensors") for folder in folders]
            assert all(np.array_equal(weights[0][key], weights[1][key]) for key in weights[0])
        assert quiet["heg"] != loud["heg"] and quiet["heg_ceiling"] != loud["heg_ceiling"]


def test_paper_does_see_the_test_slide(disturbed):
    """The counterpart, so that the test above can fail: under paper the panel follows from all slides."""
    panels = [set(common.load_dataset(root, "lognorm").genes) for root in disturbed]
    assert panels[0] != panels[1]


def test_loso_shows_every_slide_and_their_mean(disturbed, tmp_path, capsys):
    assert run_script("20", "--data-root", disturbed[0], "--out", tmp_path, *SMALL, "--protocol", "loso") == 0
    stdout = capsys.readouterr().out
    rows = pd.DataFrame(last_json(stdout)["rows"]).query("split == 'test' and setting == 'ridge (colour)'")
    assert rows["slide"].tolist() == ["1", "2", "3", "4"] and (rows["gene_lists"] == "training spots").all()
    lines = [line for line in stdout.splitlines() if line.startswith("ridge") and " test " in line][:5]
    assert [line.split()[5] for line in lines] == ["1", "2", "3", "4", "all"]
    assert f"{rows['heg'].mean():.3f}±{rows['heg'].std():.3f}" in lines[4]
    assert f"{rows['heg'].mean() / rows['heg_ceiling'].mean():.0%}" in lines[4], "share: the ratio of means"
    assert "every slide once the test slide" in stdout and "the first of 4 trainings" in stdout


def test_search_chooses_for_every_test_slide_on_its_own(disturbed, tmp_path, capsys):
    small = ("--image-size", 32, "--epochs", 1, "--batch-size", 8, "--pretrained", "false", "--target", "lognorm")
    grid = {"STAGES": (0,), "HIDDENS": (0, 4)}
    assert run_script("22", "--data-root", disturbed[0], "--out", tmp_path, *small, "--protocol", "loso", **grid) == 0
    rows = pd.DataFrame(last_json(capsys.readouterr().out)["rows"]).astype({"heg": float, "hvg": float})
    assert rows["split"].value_counts().to_dict() == {"valid": 2 * 4 * 3, "oof": 2 * 4, "test": 4}
    final = rows[rows["split"] == "test"].set_index("fold")
    for fold, of in rows[rows["split"] == "oof"].groupby("fold"):
        of = of[of["heg_n"] == of["heg_n"].max()]
        best = of.sort_values(["heg", "hvg"], ascending=False)["setting"].iloc[0]
        assert final.loc[fold, "setting"] == best and final.loc[fold, "slide"] not in of["slide"].iloc[0].split(",")


def test_targets_are_set_side_by_side_on_one_truth(simulated, tmp_path, capsys):
    arguments = ("--data-root", simulated, "--out", tmp_path, *TINY, "--epochs", 1)
    assert run_script("20", *arguments, "--compare-targets") == 0
    stdout = capsys.readouterr().out
    rows = pd.DataFrame(last_json(stdout)["rows"]).query("split == 'test' and truth == 'lognorm'").set_index("setting")
    assert rows["target"].to_dict() == {
        "EfficientNet-B0": "harmony",
        "ridge (colour)": "harmony",
        "EfficientNet-B0, lognorm target": "lognorm",
        "ridge (colour), lognorm target": "lognorm",
    }
    differences = pd.read_csv(tmp_path / "paired_differences.csv").set_index(["setting", "group"])
    line = differences.loc[("EfficientNet-B0, lognorm target", "HEG")]
    gain = rows.loc["EfficientNet-B0, lognorm target", "heg"] - rows.loc["EfficientNet-B0", "heg"]
    assert line["minus"] == "EfficientNet-B0" and line["difference"] == pytest.approx(gain)
    assert run_script("20", *arguments, "--compare-targets", "--target", "lognorm") == 2


# ------------------------------------------------------------------------------------- metrics, intervals


def test_further_metrics_against_scipy():
    random = np.random.default_rng(0)
    truth = random.poisson(2.0, (40, 3)).astype(np.float32)
    predicted = (0.5 * truth + random.normal(size=truth.shape)).astype(np.float32)
    slides = np.repeat([1, 2], 20)
    scores = common.score_genes(predicted, truth, slides)
    expected = np.mean(
        [
            [scipy.stats.spearmanr(predicted[slides == s, g], truth[slides == s, g])[0] for g in range(3)]
            for s in (1, 2)
        ],
        axis=0,
    )
    np.testing.assert_allclose(scores["spearman"], expected)
    np.testing.assert_allclose(scores["variance"], [truth[:20].var(0) / 2 + truth[20:].var(0) / 2][0], rtol=1e-6)


def test_row_carries_metrics_and_ceilings(trained):
    out, stdout = trained
    row = next(r for r in last_json(stdout)["rows"] if (r["split"], r["truth"]) == ("test", "lognorm"))
    table = anndata.read_h5ad(out / row["folder"] / "predictions.h5ad")
    every = pd.read_csv(out / row["folder"] / "per_gene.csv").set_index("gene").add_prefix("_")
    genes = pd.read_csv(out / row["folder"] / "genes.csv").query("group == 'HEG'")["gene"]
    table = table[table.obs["role"] == "test"]
    x, y = table.X.astype(float), table.layers["lognorm"].astype(float)
    assert row["variance_ratio"] == pytest.approx(x.var(0).sum() / y.var(0).sum(), rel=1e-6)
    of = every.loc[[g for g in genes if np.isfinite(every.loc[g, "_test_lognorm_r"])]]
    for name in ("ceiling", "image_ceiling", "moran", "spearman"):
        assert row[f"heg_{name}"] == pytest.approx(of[f"_test_lognorm_{name}"].mean())
    order = every[["_test_lognorm_r", "_test_lognorm_moran", "_test_lognorm_mean"]].dropna()
    expected = scipy.stats.spearmanr(order["_test_lognorm_r"], order["_test_lognorm_moran"])[0]
    assert row["r_against_moran"] == pytest.approx(expected, abs=2e-3)  # the CSV breaks ties
    data = common.load_dataset(row_root(stdout), "lognorm")
    split = pd.read_csv(out / row["folder"] / "split.csv").set_index("id")["role"]
    usual = data.lognorm[(data.spots["id"].map(split) == "train").to_numpy()].mean(0)
    spots = [scipy.stats.pearsonr(a - usual, b - usual).statistic for a, b in zip(x, y, strict=True)]
    assert row["spot_r"] == pytest.approx(np.mean(spots), abs=1e-6)
    harmony = next(r for r in last_json(stdout)["rows"] if (r["split"], r["truth"]) == ("test", "harmony"))
    assert harmony["heg_ceiling"] is None, "ceilings are of the log-normalised truth"


def row_root(stdout):
    from pathlib import Path

    return Path(last_json(stdout)["data_root"])


def test_draws_over_slides_are_means_of_independent_slides(tmp_path):
    rows, random = [], np.random.default_rng(0)
    for slide in "123":
        draws = pd.DataFrame(random.normal(size=(common.DRAWS, 4)), columns=["heg", "hvg", "mg", "all"])
        (tmp_path / slide).mkdir()
        draws.add_prefix("lognorm_").to_csv(tmp_path / slide / "bootstrap.csv", index=False)
        rows.append({"slide": slide, "folder": slide, "seed": 42, "fold": int(slide)})
    joined = common.join_draws(pd.DataFrame(rows), tmp_path)
    assert joined.shape == (common.DRAWS, 4) and joined[:, 0].std() == pytest.approx(1 / np.sqrt(3), rel=0.1)
    spots = [pd.DataFrame({"block": [f"{s}:{i // 4}:0" for i in range(40)]}) for s in (1, 2)]
    values = random.normal(size=(2, 40, 1))
    one, other = (common.bootstrap_means(*values, of, ["g"], {"all": ["g"]})["all"] for of in spots)
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.15, "blocks of one slide are not drawn with those of another"


# ------------------------------------------------------------------------------------- leaks


@pytest.mark.parametrize("what", ["pixels", "counts"])
def test_a_slide_that_is_there_twice_is_a_leak(simulated, tmp_path, capsys, what):
    root = tmp_path / "root"
    shutil.copytree(simulated, root, ignore=shutil.ignore_patterns("dataset"))
    table = pd.read_csv(root / "slides.csv")
    columns = {"pixels": ["image", "positions"], "counts": ["matrix", "positions"]}[what]
    table.loc[2, columns] = table.loc[0, columns].to_numpy()
    table.to_csv(root / "slides.csv", index=False)
    assert run_script("19", "--data-root", root, "--target", "lognorm") == 2
    error = capsys.readouterr().err
    assert f"the same {what}" in error and "a leak: the spots 1_" in error and " 3_" in error
    assert not (root / "dataset").exists()


def test_blank_patches_and_empty_spots_are_no_leak():
    patches = np.full((3, 224, 224, 3), 255, np.uint8)
    patches[2, 5, 5] = 0

    def spots(*values):
        obs = pd.DataFrame({"n_counts": np.sum(values, 1)}, list("abc"))
        return anndata.AnnData(scipy.sparse.csr_matrix(np.array(values, np.float32)), obs)

    counts, twins = spots([1, 0], [1, 0], [500, 3]), spots([500, 3], [1, 0], [500, 3])
    script = load_script("19")
    script.check_leaks(patches, counts)
    with pytest.raises(common.InputError, match="pixels"):
        script.check_leaks(patches[[2, 1, 2]], counts)
    with pytest.raises(common.InputError, match="counts"):
        script.check_leaks(patches, twins)
