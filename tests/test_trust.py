"""What tells how far a number can be trusted: ceilings, protocols that leak nothing, further
metrics, leak check.
"""

import json
import shutil
from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
import scanpy
import scipy.io
import scipy.sparse
import scipy.stats
from conftest import (
    AT_RANDOM,
    NETWORK,
    PAPER,
    TIMING,
    TINY,
    TINY_SEARCH,
    expect_refusal,
    load_script,
    printed_table,
    refused,
    rows_of,
    run_script,
    stdout_of,
    table_of,
)
from scipy.spatial.distance import cdist

import common
from slides import twins
from slides.ceilings import fit_ceilings
from study import printing, runs, splitting


# ------------------------------------------------------------------------------ ceiling, Moran's I
@pytest.fixture(scope="module")
def simulated_counts():
    """{depth: (counts, totals, r of knowing each spot's realised rate)} of one slide of 1,500
    spots, 258 genes.
    """
    script, found = load_script("18"), {}
    names = " ".join([*script.PROGRAMMES.values(), script.HOUSEKEEPING]).split()
    genes = script.gene_table(list(dict.fromkeys(names)), np.random.default_rng(1))
    table = script.hexagonal_grid(1500)
    border = 3 * script.PITCH // 2
    shape = tuple(int(table[axis].max() + border) for axis in ("pxl_row", "pxl_col"))
    fields = script.tissue_fields(table, shape, np.random.default_rng(1))
    spots = table[table["in_tissue"] == 1].reset_index(drop=True)
    for depth in (1000, 100):
        script.DEPTH = depth
        random = np.random.default_rng(depth)
        counts, rate, _ = script.simulate_counts(fields, spots, genes, random)
        counts = counts.toarray()
        totals = counts.sum(1)
        kept = totals > 0
        measured = common.log_normalise(counts, totals)[kept]
        known = common.log_normalise(rate, rate.sum(1))[kept]
        found[depth] = counts[kept], totals[kept], common.pearson_per_gene(measured, known)
    return found


def halve(counts, totals, random):
    """The plain estimator: r between two halves of the counts, Spearman-Brown, square root."""
    one = random.binomial(counts, 0.5)
    depth = random.binomial(totals, 0.5)
    kept = (depth > 0) & (depth < totals)
    first = common.log_normalise(one[kept], depth[kept])
    second = common.log_normalise((counts - one)[kept], (totals - depth)[kept])
    r = common.pearson_per_gene(first, second).clip(0)
    return np.sqrt(2 * r / (1 + r))


@pytest.mark.parametrize("depth, most", [(1000, 0.02), (100, 0.04)])
def test_ceiling_is_the_r_of_knowing_every_rate(simulated_counts, depth, most):
    counts, totals, known = simulated_counts[depth]
    told = known > 0.3
    assert told.sum() > 150
    error = (load_script("19").counting_ceiling(counts, totals) - known)[told]
    assert np.abs(error).mean() < most
    assert abs(error.mean()) < most / 2
    plain = (halve(counts, totals, np.random.default_rng(0)) - known)[told]
    assert np.abs(error).mean() < np.abs(plain).mean() / 2


# Counts a spot, coefficient of variation of the rates, and how far off their mean ceiling may be.
KINDS = [(0.1, 0, 0.1), (0.1, 0.3, 0.06), (0.1, 1, 0.06), (1, 0, 0.12), (1, 0.3, 0.06)]
KINDS += [(1, 1, 0.03), (5, 0.3, 0.03)]


def draw_genes(rate, totals, random):
    """(counts at these rates, r of knowing every rate)."""
    counts = random.poisson(rate * totals[:, None])
    measured = np.log1p(1e4 * counts / totals[:, None])
    return counts, common.pearson_per_gene(measured, np.log1p(1e4 * rate))


@pytest.mark.parametrize("per_spot, variation, most", KINDS)
def test_ceilings_of_genes_with_little_variation(per_spot, variation, most):
    """Negative binomial counts of 1,000 spots: Poisson noise on rates of a gamma distribution."""
    random = np.random.default_rng(1)
    totals = random.lognormal(np.log(5000), 0.4, 1000)
    relative = np.ones((1000, 48))
    if variation:
        relative = random.gamma(1 / variation**2, variation**2, relative.shape)
    counts, truth = draw_genes(per_spot / 5000 * relative, totals, random)
    truth, script = np.nan_to_num(truth), load_script("19")
    assert abs((script.counting_ceiling(counts, totals) - truth).mean()) < most
    if truth.mean() < 0.1:
        assert (fit_ceilings(counts, totals) - truth).mean() > 2 * most


def test_the_mean_ceiling_of_many_kinds_of_genes_is_near_the_truth():
    """As group `all` has them: mostly few counts and little variation."""
    random = np.random.default_rng(2)
    totals = random.lognormal(np.log(3000), 0.5, 600)
    per_spot = np.exp(random.normal(np.log(0.4), 1.2, 400))
    spread = random.uniform(0.1, 0.8, 400)
    relative = np.exp(random.normal(size=(600, 400)) * spread - spread**2 / 2)
    counts, truth = draw_genes(per_spot / 3000 * relative, totals, random)
    found = np.nanmean(load_script("19").counting_ceiling(counts, totals))
    assert found == pytest.approx(np.nanmean(truth), abs=0.03)
    assert np.nanmean(fit_ceilings(counts, totals)) > np.nanmean(truth) + 0.08


def test_no_share_of_a_ceiling_of_nothing():
    assert printing.format_share(0.2, 0.4) == "50%"
    for r, ceiling in ((0.2, 0.0), (0.2, np.nan), (np.nan, 0.4)):
        assert printing.format_share(r, ceiling) == "-"


def test_a_mean_says_of_how_many_genes_and_slides_it_is():
    lines = pd.DataFrame({"slide": ["1", "2"], "heg": [0.3, 0.2], "heg_n": [50, 50]})
    assert printing.format_group(lines, "heg", 50) == "0.250"
    assert printing.format_group(lines, "heg", 50, "slide") == "0.250±0.071"
    lines.loc[1, "heg_n"] = 47
    assert printing.format_group(lines, "heg", 50) == "0.250/47"
    assert "the mean of n genes" in printing.explain_fewer("setting HEG\nridge 0.250/47")
    assert printing.explain_fewer("setting HEG\nST-Net/BLEEP 0.250") == ""
    lines.loc[1, ["heg", "heg_n"]] = np.nan, 0
    assert printing.format_group(lines, "heg", 50, "slide") == "0.300 (1 of 2)"
    assert printing.format_group(lines[1:], "heg", 50) == "-"


def test_folds_that_validate_on_unlike_slides_count_alike():
    lines = pd.DataFrame({"slide": ["1,2", "1", "1"], "fold": [0, 1, 2], "seed": 42})
    lines = lines.assign(split="valid", heg=[0.1, 0.2, 0.6], heg_n=50, heg_ceiling=0.6)
    lines = lines.assign(hvg=0.1, hvg_n=50, mg=0.1, mg_n=8, all=0.1, all_n=900, protocol="block")
    lines = lines.assign(n_genes_r30=9, n_genes_q05=np.nan)
    shown = printing.describe_scores(lines, [np.nan, np.nan], {}, 900)
    assert shown["HEG"].startswith("0.300±")


def test_columns_that_have_no_room_follow_below_beside_what_their_lines_are(capsys):
    table = pd.DataFrame({"setting": ["a", "a"], "set": ["first", "second"]})
    for number in range(4):
        table[f"number {number}"] = [f"{number}." + 40 * "1", f"{number}." + 40 * "2"]
    printing.print_table("a title", table, keys=2)
    stdout = capsys.readouterr().out
    assert max(map(len, stdout.splitlines())) <= printing.WIDTH
    head, lines = printed_table(stdout, "a title")
    assert [line.count("second") for line in lines] == [0, 2]
    for number in range(4):
        assert f"number {number}" in head
        assert f"{number}." + 40 * "1" in lines[0]
        assert f"{number}." + 40 * "2" in lines[1]


def test_slides_of_a_table_are_listed_once():
    lines = pd.DataFrame({"slide": ["1,10", "1,2"], "fold": [0, 1], "n_spots": [9, 9], "seed": 42})
    lines["split"], lines["truth"] = "valid", "lognorm"
    assert printing.describe_scored(lines).startswith("validation, slides 1,2,10, log-norm")
    lines["split"] = "test"
    text = printing.describe_scored(lines)
    assert text.startswith("test slides 1,2,10, log-norm"), "how many spots of slide 1 is not known"
    lines["slide"] = ["1,10", "2"]
    assert printing.describe_scored(lines).startswith("test slides 1,2,10 (18 spots), log-norm")


def test_long_settings_stay_apart():
    names = [f"tf_efficientnet_b7.{tag}_in1k, 8 views of a patch" for tag in ("ra", "ap")]
    names = pd.Series([*names, "ridge"])
    shortened = printing.shorten(names, 30)
    assert shortened.nunique() == 3 and shortened[2] == "ridge"
    assert printing.shorten(names[[0, 2, 0]], 30).str.len().max() == 30


def test_ceiling_stays_in_its_bounds():
    random = np.random.default_rng(0)
    totals = random.integers(500, 5000, 300)
    rates = np.exp(random.normal(size=300))
    genes = [totals * 0, random.poisson(totals * 1e-3), (totals * rates).astype(int), totals * 0]
    counts = np.stack(genes, axis=1)
    counts[0, 3] = 1
    nothing, noise, certain, once = load_script("19").counting_ceiling(counts, totals)
    assert np.isnan(nothing)
    assert 0 <= noise < 0.3
    assert 0.995 < certain <= 1
    assert 0 <= once <= 1


def test_morans_i_equals_scanpys():
    table = load_script("18").hexagonal_grid(60)
    centres = table[["pxl_col", "pxl_row"]].to_numpy(float)
    values = np.random.default_rng(0).normal(size=(len(table), 3)).astype(np.float32)
    values[:, 1] = np.sin(centres[:, 0] / 500)
    near = (cdist(centres, centres) < 1.2 * 329) & ~np.eye(len(table), dtype=bool)
    expected = scanpy.metrics.morans_i(scipy.sparse.csr_matrix(near.astype(float)), values.T)
    constant = np.ones(len(table))
    found = load_script("19").morans_i(np.column_stack([values, constant]), centres, 329)
    np.testing.assert_allclose(found[:3], expected, rtol=1e-5)
    assert np.isnan(found[3])
    assert found[1] > 0.5


def test_genes_are_described_slide_by_slide(simulated):
    data = common.load_dataset(simulated, "lognorm")
    at = (data.spots["tissue_index"] == 3).to_numpy()
    counts = anndata.read_h5ad(simulated / "dataset" / "counts.h5ad")[at]
    expected = load_script("19").counting_ceiling(counts.X.toarray(), counts.obs["n_counts"])
    np.testing.assert_array_equal(data.annotations.var["ceiling_3"], expected)
    truth = anndata.read_h5ad(simulated / "truth" / "3.h5ad")
    truth = truth[data.spots["barcode"][at].to_numpy(), data.genes]
    shown = common.pearson_per_gene(truth.layers["visible"], data.lognorm[at])
    np.testing.assert_allclose(data.annotations.var["image_ceiling_3"], shown)


# --------------------------------------------------------------------------------------- protocols
LOSO = PAPER | {"PROTOCOL": "loso"}


def slides_with_donors(donors):
    """Four spots a slide, one slide a donor's letter."""
    slide = np.repeat(np.arange(1, len(donors) + 1), 4)
    return pd.DataFrame({"tissue_index": slide, "donor": np.array(list(donors))[slide - 1]})


def slides_by_role(spots, recipe):
    """[{role: its slides}], one a training."""
    trainings = []
    for roles in splitting.split_spots(spots, recipe, 42):
        slides = {role: spots["tissue_index"][roles == role] for role in ("train", "valid", "test")}
        trainings.append({role: sorted(set(of)) for role, of in slides.items()})
    return trainings


@pytest.mark.parametrize("donors, chosen, expected", [
    ("AABBC", (), [((5,), (3, 4), 1), ((5,), (3, 4), 2), ((1, 2), (5,), 3), ((1, 2), (5,), 4),
                   ((3, 4), (1, 2), 5)]),
    ("AAAA", (), [((3, 4), (2,), 1), ((1, 4), (3,), 2), ((1, 2), (4,), 3), ((2, 3), (1,), 4)]),
    ("AAAA", (1, 2, 4), [((4,), (2,), 1), ((1,), (4,), 2), ((2,), (1,), 4)]),
], ids=["the donor is left out", "of one donor the test slide", "chosen slides alone"])  # fmt: skip
def test_slides_of_the_trainings_under_loso(donors, chosen, expected):
    trainings = slides_by_role(slides_with_donors(donors), LOSO | {"TRAIN_SLIDES": chosen})
    assert trainings == [
        {"train": [*train], "valid": [*valid], "test": [test]} for train, valid, test in expected
    ]


@pytest.mark.parametrize("train, left_out", [((1, 2, 3), False), ((), True)])
def test_the_header_says_of_the_slides_that_take_part_whether_a_donor_is_left_out(
    simulated, train, left_out
):
    data = common.load_dataset(simulated, "lognorm")
    donors = data.spots["tissue_index"].map({1: "A", 2: "A", 3: "A" if train else "B", 4: "B"})
    data = replace(data, spots=data.spots.assign(donor=donors))
    recipe = NETWORK | LOSO | {"TARGET": "lognorm", "TRAIN_SLIDES": train, "BATCH_SIZE": 8}
    roles = splitting.split_spots(data.spots, recipe, 42)[0]
    split = splitting.make_split(data, roles, recipe, 42, 0)
    text = runs.describe_run(recipe, [split])["protocol"]
    assert text.endswith("; its donor is left out)" if left_out else "who is not left out)")


def test_one_slide_to_learn_from_is_too_few_under_loso():
    with refused("slide 1 has 1 slides to learn from"):
        slides_by_role(slides_with_donors("AAB"), LOSO)


@pytest.fixture(scope="module")
def disturbed(simulated, tmp_path_factory):
    """The simulated slides twice, target lognorm: as they are, and with other counts on slide 3,
    made anew by 19.
    """
    roots = [tmp_path_factory.mktemp("same") / "root", tmp_path_factory.mktemp("other") / "root"]
    for root in roots:
        shutil.copytree(simulated, root)
    path = roots[1] / "data" / "filtered_expression_matrices" / "3" / "matrix.mtx"
    counts = scipy.io.mmread(path).toarray()
    shuffled = np.random.default_rng(0).permutation(counts.ravel()).reshape(counts.shape)
    scipy.io.mmwrite(path, scipy.sparse.coo_matrix(shuffled))
    for root in roots:
        assert run_script("19", data_root=root, target="lognorm", hvg_per_slide=100) == 0
    return roots


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """Folder of runs on the slides as they are, of which none is computed twice."""
    return tmp_path_factory.mktemp("quiet")


SMALL = TINY | {"target": "lognorm", "epochs": 1}
BLEEP = {"only": "BLEEP (resnet10t)", "bleep_backbone": "resnet10t", "bleep_epochs": 1}


@pytest.mark.parametrize(
    "name, protocol, more, n_records",
    [("20", "loso", {}, 2), ("20", "block", {}, 4), ("25", "loso", BLEEP, 2)],
)
def test_expression_of_the_test_slide_changes_nothing_but_its_score(
    disturbed, quiet, tmp_path, monkeypatch, name, protocol, more, n_records
):
    if protocol == "block":  # Ten spots a slide leave no room.
        monkeypatch.setattr(common, "MARGIN", 0)
        monkeypatch.setattr(common, "FOLDS", 2)
    options = SMALL | {"protocol": protocol} | more
    outs = [quiet / f"{name} {protocol}", tmp_path / "loud"]
    tables = []
    for root, out in zip(disturbed, outs, strict=True):
        table = table_of(stdout_of(name, data_root=root, out=out, **options))
        tables.append(table.query("split == 'test' and slide == '3'").to_dict("records"))
    assert [len(table) for table in tables] == [n_records] * 2
    for one, other in zip(*tables, strict=True):
        check_same_but_scores(outs[0] / one["folder"], outs[1] / other["folder"])
        assert one["mse"] != other["mse"]
        if name == "20":  # BLEEP retrieves the mean of so few spots, and has no r.
            assert one["heg_ceiling"] != other["heg_ceiling"]


TRAINED = ("EfficientNet-B0", "BLEEP_resnet10t-")  # beginnings of the folders that hold weights


def check_same_but_scores(quiet, loud):
    """The folders of two records hold the same genes, split, predictions and weights, if any."""
    for table in ("genes.csv", "split.csv"):
        assert (quiet / table).read_text() == (loud / table).read_text()
    one, other = (anndata.read_h5ad(folder / "predictions.h5ad") for folder in (quiet, loud))
    np.testing.assert_array_equal(one.X, other.X)
    assert list(one.var_names) == list(other.var_names)
    name = "weights.safetensors"
    assert (quiet / name).exists() == (loud / name).exists() == quiet.name.startswith(TRAINED)
    if (quiet / name).exists():
        one, other = (safetensors.numpy.load_file(folder / name) for folder in (quiet, loud))
        for tensor in one:
            np.testing.assert_array_equal(one[tensor], other[tensor])


def test_the_panel_of_all_slides_does_see_the_test_slide(disturbed):
    """The counterpart, so that the test above can fail: 19's panel follows from all slides."""
    panels = [set(common.load_dataset(root, "lognorm").genes) for root in disturbed]
    assert panels[0] != panels[1]


@pytest.fixture(scope="module")
def crowds(simulated, tmp_path_factory):
    """The simulated slides twice: without slide 3, and with it, which stands in the middle."""
    roots = [tmp_path_factory.mktemp(name) / "root" for name in ("few", "all")]
    for root in roots:
        shutil.copytree(simulated, root)
    table = pd.read_csv(roots[0] / "slides.csv")
    table[table["tissue_index"] != 3].to_csv(roots[0] / "slides.csv", index=False)
    for root in roots:
        assert run_script("19", data_root=root, hvg_per_slide=100) == 0
    return roots


@pytest.mark.parametrize("target", ["lognorm", "harmony"])
@pytest.mark.parametrize("name", ["20", "25"])
def test_a_slide_that_takes_no_part_changes_no_bit(crowds, tmp_path, name, target):
    options = TINY | {"target": target, "epochs": 1, "train_slides": "1,2", "test_slide": 4}
    options |= BLEEP if name == "25" else {}
    outs, tables = [tmp_path / "few", tmp_path / "all"], []
    for root, out in zip(crowds, outs, strict=True):
        tables.append(table_of(stdout_of(name, data_root=root, out=out, **options)))
    few, every = (table.drop(columns=["folder", *TIMING], errors="ignore") for table in tables)
    pd.testing.assert_frame_equal(few, every)
    for one, other in zip(tables[0]["folder"], tables[1]["folder"], strict=True):
        check_same_but_scores(outs[0] / one, outs[1] / other)


def test_genes_that_the_test_slide_does_not_list_stay_in_the_panel(disturbed, tmp_path):
    """What is learnt and asked does not depend on the test slide's list of genes."""
    root = tmp_path / "root"
    shutil.copytree(disturbed[0], root)
    folder = root / "data" / "filtered_expression_matrices" / "3"
    features = pd.read_csv(folder / "features.tsv", sep="\t", header=None)
    kept = np.arange(len(features)) % 3 > 0
    features[kept].to_csv(folder / "features.tsv", sep="\t", header=False, index=False)
    counts = scipy.sparse.csr_matrix(scipy.io.mmread(folder / "matrix.mtx"))[kept]
    scipy.io.mmwrite(folder / "matrix.mtx", counts.tocoo())
    printed = stdout_of("19", data_root=root, target="lognorm", hvg_per_slide=100)
    assert f"slide 3 does not list {(~kept).sum()} of them: no counts there" in printed
    outs, tables = [tmp_path / "whole", tmp_path / "part"], []
    for data_root, out in zip((disturbed[0], root), outs, strict=True):
        tables.append(table_of(stdout_of("20", data_root=data_root, out=out, **SMALL)))
    for one, other in zip(tables[0]["folder"], tables[1]["folder"], strict=True):
        check_same_but_scores(outs[0] / one, outs[1] / other)
    assert (tables[1]["heg_n"] < tables[0]["heg_n"]).any(), "a gene without counts has no r"


def test_loso_shows_every_slide_and_their_mean(disturbed, quiet):
    options = SMALL | {"protocol": "loso", "out": quiet / "20 loso"}
    stdout = stdout_of("20", data_root=disturbed[0], **options)
    on_one_line = " ".join(stdout.split())
    assert "every slide once the test slide" in on_one_line
    assert "the first of 4 trainings" in on_one_line
    rows = table_of(stdout).query("split == 'test' and setting == 'ridge (colour)'")
    assert rows["slide"].tolist() == ["1", "2", "3", "4"]
    assert set(rows["gene_lists"]) == {"training spots"}
    assert "test slides 1,2,3,4 (40 spots)" in stdout
    _, lines = printed_table(stdout, "mean Pearson r")
    (line,) = [line for line in lines if line.startswith("ridge")]
    assert f" {rows['heg'].mean():.3f}±{rows['heg'].std():.3f} " in line
    of_ceiling = rows["heg"].mean() / rows["heg_ceiling"].mean()
    assert f" {of_ceiling:.0%} " in line, "the ratio of means"


def test_search_chooses_for_every_test_slide_on_its_own(disturbed, tmp_path):
    options = {name: value for name, value in TINY_SEARCH.items() if name != "folds"}
    options |= {"epochs": 1, "protocol": "loso", "STAGES": (0,), "HIDDENS": (0, 4)}
    options |= {"backbone": "mobilenetv3_small_050"}  # of 28 trainings
    rows = table_of(stdout_of("22", data_root=disturbed[0], out=tmp_path, **options))
    rows = rows.astype({"heg": float, "hvg": float})
    assert rows["split"].value_counts().to_dict() == {"valid": 2 * 4 * 3, "test": 4}
    for final in rows[rows["split"] == "test"].itertuples():
        numbers = range(3 * final.fold, 3 * final.fold + 3)  # of the folds of its search
        valid = rows[(rows["split"] == "valid") & rows["fold"].isin(numbers)]
        assert final.slide not in set(valid["slide"])
        means = valid.groupby("setting")[["heg", "hvg"]].mean()
        means = means[valid.groupby("setting")["heg_n"].min() == valid["heg_n"].max()]
        best = means.sort_values(["heg", "hvg"], ascending=False).index[0]
        recipe = json.loads((tmp_path / final.folder / "recipe.json").read_text())
        assert f"stages={recipe['TRAINABLE_STAGES']} hidden={recipe['HIDDEN']}" == best


def test_targets_are_set_side_by_side_on_one_truth(simulated, tmp_path):
    options = TINY | AT_RANDOM | {"data_root": simulated, "out": tmp_path}
    rows = table_of(stdout_of("20", "--compare-targets", **options))
    rows = rows.query("split == 'test' and truth == 'lognorm'").set_index("setting")
    other = "EfficientNet-B0, lognorm target"
    targets = dict.fromkeys(("EfficientNet-B0", "ridge (colour)"), "harmony")
    targets |= dict.fromkeys((other, "ridge (colour), lognorm target"), "lognorm")
    assert rows["target"].to_dict() == targets
    differences = pd.read_csv(tmp_path / "paired_differences.csv")
    line = differences.set_index(["setting", "group"]).loc[(other, "HEG")]
    assert line["minus"] == "EfficientNet-B0"
    gain = rows.loc[other, "heg"] - rows.loc["EfficientNet-B0", "heg"]
    assert line["difference"] == pytest.approx(gain)


# ------------------------------------------------------------------------------ metrics, intervals
@pytest.fixture(scope="module")
def scored(trained):
    """(record, test spots' predictions, per-gene table, folder) of 20's network, truth lognorm."""
    out, stdout = trained
    rows = table_of(stdout).set_index(["setting", "split", "truth"])
    record = rows.loc[("EfficientNet-B0", "test", "lognorm")]
    folder = out / record["folder"]
    table = anndata.read_h5ad(folder / "predictions.h5ad")
    per_gene = pd.read_csv(folder / "per_gene.csv", index_col="gene").filter(like="test_lognorm_")
    per_gene.columns = per_gene.columns.str.removeprefix("test_lognorm_")
    return record, table[table.obs["role"] == "test"], per_gene, folder


def test_a_record_averages_metrics_and_ceilings_over_the_genes_that_have_an_r(scored):
    record, _, per_gene, folder = scored
    heg = pd.read_csv(folder / "genes.csv").query("group == 'HEG'")["gene"]
    defined = per_gene.loc[heg].dropna(subset="r")
    for name in ("ceiling", "image_ceiling", "moran", "spearman"):
        assert record[f"heg_{name}"] == pytest.approx(defined[name].mean())
    assert record["heg_pooled"] == pytest.approx(defined["r_pooled"].mean())


def test_a_record_has_the_ratio_of_variances_and_ranks_r(scored):
    record, table, per_gene, _ = scored
    x, y = table.X.astype(float), table.layers["lognorm"].astype(float)
    assert record["variance_ratio"] == pytest.approx(x.var(0).sum() / y.var(0).sum(), rel=1e-6)
    for name in ("moran", "mean"):
        order = per_gene[["r", name]].dropna()
        expected = scipy.stats.spearmanr(order["r"], order[name]).statistic
        # The CSV breaks ties.
        assert record[f"r_against_{name}"] == pytest.approx(expected, abs=2e-3)


def test_a_record_has_r_over_genes_spot_by_spot(scored, simulated):
    record, table, _, folder = scored
    data = common.load_dataset(simulated, "lognorm")
    role = pd.read_csv(folder / "split.csv").set_index("id")["role"]
    train = (data.spots["id"].map(role) == "train").to_numpy()
    usual = data.lognorm[train].mean(0)
    pairs = zip(table.X.astype(float), table.layers["lognorm"].astype(float), strict=True)
    r = [scipy.stats.pearsonr(x - usual, y - usual).statistic for x, y in pairs]
    assert record["spot_r"] == pytest.approx(np.mean(r), abs=1e-6)


def test_ceilings_are_of_the_log_normalised_truth(trained):
    for row in rows_of(trained[1]):
        assert (row["heg_ceiling"] is None) == (row["truth"] == "harmony")


# -------------------------------------------------------------------------------------------- leaks
COPIED = {"pixels": ["image", "positions"], "counts": ["matrix", "positions"]}


@pytest.mark.parametrize("what", COPIED)
def test_a_slide_that_is_there_twice_is_a_leak(simulated, tmp_path, what):
    root = tmp_path / "root"
    shutil.copytree(simulated, root, ignore=shutil.ignore_patterns("dataset"))
    table = pd.read_csv(root / "slides.csv")
    table.loc[2, COPIED[what]] = table.loc[0, COPIED[what]].to_numpy()
    table.to_csv(root / "slides.csv", index=False)
    words = [f"the same {what}", "the spots 1_", " 3_", *["a leak: "] * (what == "pixels")]
    expect_refusal(words, "19", data_root=root, target="lognorm")
    assert not (root / "dataset").exists()


def count_spots(*values):
    """Three spots of two genes with these counts."""
    obs = pd.DataFrame({"n_counts": np.sum(values, 1)}, list("abc"))
    return anndata.AnnData(scipy.sparse.csr_matrix(np.array(values, np.float32)), obs)


def test_blank_patches_and_empty_spots_are_no_leak():
    patches = np.full((3, 224, 224, 3), 255, np.uint8)
    patches[2, 5, 5] = 0
    counts = count_spots([1, 0], [1, 0], [500, 3])
    twins.check_patches({}, patches, counts.obs_names)
    twins.check_alike_counts({}, counts)
    with refused("a leak", " same pixels"):
        twins.check_patches({}, patches[[2, 1, 2]], counts.obs_names)
    with refused("same pixels, and are of one slide"):
        twins.check_patches({}, patches[[2, 1, 2]], ["1_a", "1_b", "1_c"])
    with refused("same counts, on two slides"):
        twins.check_alike_counts({}, count_spots([500, 3], [1, 0], [500, 3]))


@pytest.mark.parametrize("kind", [np.int64, np.float32, np.float64])
def test_the_same_counts_in_numbers_of_another_type_are_a_leak(kind):
    """A folder of Space Ranger has whole numbers, its .h5 floats; an .h5ad has its own."""
    seen, one = {}, count_spots([500, 0], [1, 0], [7, 300])
    other = one[[0]].copy()
    other.X = scipy.sparse.csr_matrix((np.array([500], kind), [0], [0, 1]), (1, 2))
    other.X.indices = other.X.indices.astype(np.int64)
    other.X.indptr = other.X.indptr.astype(np.int64)
    other.obs_names = ["2_a"]
    twins.check_alike_counts(seen, one)
    with refused("the same counts"):
        twins.check_alike_counts(seen, other)
