"""Gene sets: their files, the genes that they match, and scores held against scipy and pandas."""

import dataclasses
import gzip
import json
from unittest.mock import Mock

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from conftest import expect_refusal, load_script, printed_table, refused

import common
from study import gene_sets, intervals, panels, recording, runs

# ------------------------------------------------------------------------------------------- files
SETS = {"HYPOXIA": ["VEGFA", "CA9", "NA"], "T cells": ["CD3E", "CD2"]}
GMT = "HYPOXIA\thttp://a.b/c\tVEGFA\tCA9\tNA\nT cells\t\tCD3E\tCD2\n"
CSV = "group,gene\nHYPOXIA,VEGFA\nT cells,CD3E\nHYPOXIA,CA9\nHYPOXIA,NA\nT cells,CD2\n"


def shuffled_columns(text):
    return "\n".join(",".join(reversed(line.split(","))) for line in text.splitlines())


@pytest.mark.parametrize(
    "name, content",
    [
        ("sets.gmt", GMT.encode()),
        ("sets.gmt.gz", gzip.compress(GMT.encode(), mtime=0)),
        ("sets.gmt", GMT.replace("\n", "\r\n").encode()),
        ("sets.gmt", GMT.replace("\n", "\r").encode()),
        ("sets.gmt", GMT.encode("utf-8-sig")),
        ("sets.gmt", GMT.encode("utf-16")),
        ("sets.gmt", GMT.replace("\t", "\t ").replace("\n", " \n").encode()),
        ("sets.gmt", GMT.replace("\n", "\t\t\n\n").encode()),
        ("sets.gmt", GMT.replace("T cells", '"T cells"').encode()),
        ("sets.gmt", GMT.replace("CA9", "CA9\tVEGFA").encode()),
        ("sets.csv", GMT.encode()),
        ("sets.csv", CSV.encode()),
        ("sets.gmt", CSV.encode()),
        ("sets.csv", CSV.replace(",", ";").replace("\n", "\r\n").encode("utf-8-sig")),
        ("sets.csv", CSV.replace(",", "\t").encode()),
        ("sets.csv", CSV.replace(",", " , ").encode()),
        ("sets.csv", CSV.replace("\nT", "\n\nT").encode()),
        ("sets.csv", shuffled_columns(CSV).encode()),
        ("sets.csv.gz", gzip.compress(CSV.encode(), mtime=0)),
    ],
)
def test_a_file_of_sets_is_read_by_its_content(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert gene_sets.read_sets(path) == SETS


BAD = {
    "no tab": (b"A\t-\tALB\nB,-,HAL\n", ["line 2", "no tab in 'B,-,HAL'", ".gmt"]),
    "one column": (b"ALB\nHAL\n", ["line 1", "no tab in 'ALB'"]),
    "two columns": (b"A\tALB\n", ["line 1", "without genes"]),
    "no name": (b"\t-\tALB\n", ["line 1", "without a name"]),
    "a name twice": (b"A\t-\tALB\n\nB\t-\tHAL\nA\t-\tHAL\n", ["line 4", "A is the set of line 1"]),
    "empty": (b"", ["holds no gene set"]),
    "blank": (b"\n \r\n", ["holds no gene set"]),
    "a head alone": (b"group,gene\n", ["holds no gene set"]),
    "another head": (b"set,symbol\nA,ALB\n", ["line 1", "set,symbol", "group,gene"]),
    "a cell too few": (b"group,gene\nA,ALB\n\nA\n", ["line 4", "group, gene"]),
    "no group": (b"group,gene\nA,ALB\n,HAL\n", ["line 3", "group, gene"]),
    "a spreadsheet": (b"PK\x03\x04\x14\x00\x00\x00", ["a .zip archive", "CSV"]),
    "half a .gz": (gzip.compress(GMT.encode(), mtime=0)[:-9], ["cannot be read as text"]),
    "a column's name": (b"A\t-\tALB\nA_score\t-\tHAL\n", ["rename the set A_score"]),
}


@pytest.mark.parametrize("content, words", BAD.values(), ids=BAD)
def test_a_bad_file_is_refused_in_words(tmp_path, content, words):
    path = tmp_path / "sets.gmt"
    path.write_bytes(content)
    with refused("sets.gmt", *words):
        gene_sets.read_sets(path)


def test_groups_of_the_data_root_stand_beside_the_file(tmp_path):
    (tmp_path / "gene_sets.csv").write_text("group,gene\nHEG,ALB\nZONE,HAL\nZONE,GLUL\n")
    assert gene_sets.read_all_sets("", tmp_path) == {"ZONE": ["HAL", "GLUL"]}
    path = tmp_path / "sets.gmt"
    path.write_text(GMT)
    assert gene_sets.read_all_sets(str(path), tmp_path) == {"ZONE": ["HAL", "GLUL"]} | SETS
    path.write_text("ZONE\t-\tALB\n")
    with refused("sets.gmt: ZONE is a group of ", "gene_sets.csv, too"):
        gene_sets.read_all_sets(path, tmp_path)
    path.write_text("HEG\t-\tALB\n")
    with refused("sets.gmt: rename the set HEG"):
        gene_sets.read_all_sets(path, tmp_path)


def test_further_groups_are_no_lists_of_heg(paper_split, tmp_path):
    data = dataclasses.replace(paper_split.data, root=tmp_path)
    spots = paper_split.spots("train")
    ranked = panels.choose_gene_groups(data, spots, published=True)
    (tmp_path / "gene_sets.csv").write_text("group,gene\nZONE,HAL\n")
    assert panels.choose_gene_groups(data, spots, published=True).equals(ranked)
    (tmp_path / "gene_sets.csv").write_text("group,gene\nZONE,HAL\nHEG,ALB\n")
    published = panels.choose_gene_groups(data, spots, published=True)
    assert published.to_numpy().tolist() == [["HEG", "ALB", 1]]
    (tmp_path / "gene_sets.csv").write_text("group,gene\nHEG,ALB\nHEG,ALB\n")
    twice = panels.choose_gene_groups(data, spots, published=True)
    assert twice.equals(published), "a gene that is listed twice is one"


def test_groups_and_sets_of_the_data_root_are_read_in_one_encoding(paper_split, tmp_path):
    """As a spreadsheet in Western Europe saves it."""
    text = "group;gene\nHEG;ALB\nGefäße;HAL\n"
    (tmp_path / "gene_sets.csv").write_bytes(text.encode("cp1252"))
    data = dataclasses.replace(paper_split.data, root=tmp_path)
    groups = panels.choose_gene_groups(data, paper_split.spots("train"), published=True)
    assert groups["gene"].tolist() == ["ALB"]
    assert gene_sets.read_all_sets("", tmp_path) == {"Gefäße": ["HAL"]}


def test_a_bad_file_ends_a_script_before_it_trains(simulated, tmp_path):
    path = tmp_path / "sets.gmt"
    options = {"data_root": simulated, "out": tmp_path / "out", "gene_sets": path}
    path.write_text("A ALB HAL\n")
    expect_refusal(["sets.gmt, line 1", "no tab"], "20", **options)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------- matching
NAMES = [f"G{i}" for i in range(8)]
VAR = pd.DataFrame({"gene_ids": [f"ENSG0000000000{i}" for i in range(8)]}, NAMES)


def test_names_match_exactly_and_ids_without_their_version():
    listed = {
        "names": [*NAMES[:6], "G9"],
        "ids": [f"ENSG0000000000{i}.{i + 1}" for i in range(5)] + ["G4"],
        "case": [name.lower() for name in NAMES],
        "few": NAMES[:4],
    }
    sets = gene_sets.match_sets(listed, VAR, [NAMES])
    assert sets.members == {"names": NAMES[:6], "ids": NAMES[:5]}
    assert sets.left_out == {"case": 0, "few": 4}
    text = sets.describe()
    assert text.startswith("2 of 4, of 5 to 6 genes in the panel; left out")
    assert "case (0), few (4)" in text
    assert "8 genes, as g0 for G0" in text
    table = sets.table().set_index("set")
    assert table.loc["few"].tolist() == [4, 4, False]
    assert table.loc["ids"].tolist() == [6, 5, True]


def test_a_version_is_stripped_of_ensembl_ids_alone():
    assert gene_sets.strip_version("ENSMUSG00000029368.11") == "ENSMUSG00000029368"
    assert gene_sets.strip_version("RP11-34P13.7") == "RP11-34P13.7"


def test_a_set_needs_five_genes_in_every_panel():
    sets = gene_sets.match_sets({"A": NAMES[:6], "B": NAMES[2:]}, VAR, [NAMES, NAMES[1:7]])
    assert sets.members == {"A": NAMES[:6], "B": NAMES[2:]}
    sets = gene_sets.match_sets({"A": NAMES[:6], "B": NAMES[2:]}, VAR, [NAMES, NAMES[2:7]])
    assert sets.left_out == {"A": 4}
    assert sets.members == {"B": NAMES[2:]}


def test_the_header_does_not_name_thousands():
    sets = gene_sets.match_sets({f"S{i}": ["G0"] for i in range(500)}, VAR, [NAMES])
    assert "S19 (1) and 480 others, see sets_in_panel.csv" in sets.describe()
    assert len(sets.table()) == 500


# ------------------------------------------------------------------------------------------ scores
def scores_by_hand(values, slides, genes):
    """Mean over the genes of z-scores within each slide, by pandas."""
    table = pd.DataFrame(values[:, genes], dtype=float)
    groups = table.groupby(slides)
    z = (table - groups.transform("mean")) / groups.transform("std", ddof=0)
    return z.mean(axis=1).to_numpy()


def test_a_score_is_the_mean_of_z_scores_within_a_slide():
    random = np.random.default_rng(0)
    slides = np.repeat([1, 2], [40, 25])
    truth = random.normal(slides[:, None], np.arange(1, 7), (65, 6)).astype(np.float32)
    predicted = (truth + random.normal(0, 3, (65, 6))).astype(np.float32)
    members = np.zeros((6, 3), bool)
    members[[0, 2, 3], 0] = True
    members[:, 1] = True
    x, y = gene_sets.find_scores(predicted, truth, slides, members)
    for column, genes in enumerate(([0, 2, 3], range(6))):
        for found, values in ((x, predicted), (y, truth)):
            expected = scores_by_hand(values, slides, genes)
            np.testing.assert_allclose(found[:, column], expected, atol=1e-6)
    assert np.isnan(x[:, 2]).all() and np.isnan(y[:, 2]).all(), "a set without genes"


@pytest.mark.parametrize("spoil", ["constant prediction", "NaN prediction", "constant truth"])
def test_a_gene_without_an_r_is_in_neither_score_of_its_slide(spoil):
    random = np.random.default_rng(1)
    slides = np.repeat([1, 2], 30)
    truth, predicted = random.normal(size=(2, 60, 4)).astype(np.float32)
    values = truth if "truth" in spoil else predicted
    values[:30, 1] = np.nan if "NaN" in spoil else 0.5
    x, y = gene_sets.find_scores(predicted, truth, slides, np.ones((4, 1), bool))
    for found, values in ((x, predicted), (y, truth)):
        first = scores_by_hand(values[:30], slides[:30], [0, 2, 3])
        second = scores_by_hand(values[30:], slides[30:], range(4))
        np.testing.assert_allclose(found[:, 0], [*first, *second], atol=1e-6)


@pytest.mark.parametrize("protocol, truth", [("paper", "lognorm"), ("hest", "log1p")])
def test_a_line_is_of_slides_or_of_all_spots_as_the_headline(protocol, truth):
    random = np.random.default_rng(2)
    slides = np.repeat([1, 2], 50)
    measured = random.normal(3 * slides[:, None], 1, (100, 6))
    predicted = measured + random.normal(0, 2, (100, 6))
    places = random.uniform(0, 10, (100, 2))
    obs = pd.DataFrame({"tissue_index": slides, "pitch": 1.0, "role": "test"})
    obs[["pxl_col", "pxl_row"]] = places
    r = pd.Series(common.pearson_per_gene(predicted, measured))
    names = {f"test_{truth}_{name}": r for name in ("r", "r_pooled", "ceiling")}
    obs, var = obs.set_index(obs.index.astype(str)), pd.DataFrame(names).set_axis(NAMES[:6])
    table = anndata.AnnData(obs=obs, var=var)
    inside = pd.DataFrame({"heg": True, "set_A": np.arange(6) < 5}, index=range(6))
    line = {"split": "test", "truth": truth, "protocol": protocol}
    values, moved = gene_sets.score_line(line, table, predicted, measured, inside)
    units = [slides > 0] if protocol == "hest" else [slides == 1, slides == 2]
    expected = []
    for unit in units:
        one = np.ones(unit.sum())
        x, y = (scores_by_hand(part[unit], one, range(5)) for part in (predicted, measured))
        expected.append(scipy.stats.pearsonr(x, y)[0])
    assert values["set_A_score"] == pytest.approx(np.mean(expected), abs=1e-9)
    assert values["set_A"] == pytest.approx(r[:5].mean())
    low, high = values["set_A_score_ci"]
    assert low < values["set_A_score"] < high
    assert list(moved) == ["heg_score", "set_A_score", "set_A"]
    assert "heg" not in values, "the row has it"


# -------------------------------------------------------------------------------------------- rows
RECIPE = {"TARGET": "lognorm", "PROTOCOL": "paper", "DEVICE": "cpu", "PRECISION": "fp32"}
RECIPE |= {"PRETRAINED": False, "REFIT": False}


def predict_with_noise(row):
    """A method: the target and noise; one gene is constant."""
    random = np.random.default_rng(row.split.seed)
    target = row.split.data.target[row.split.scored()]
    predicted = target + random.normal(0, 1, target.shape)
    predicted[:, row.split.data.genes.index(row.split.members["heg"][7])] = 1
    return predicted.astype(np.float32)


def start(split, out, members, **changed):
    """A Run of these sets {name: genes} that has its row."""
    listed = {name: len(genes) for name, genes in members.items()}
    sets = gene_sets.GeneSets(members, {}, listed, {})
    script = {"__file__": "25_test.py"}
    run = runs.Run(script, RECIPE | {"QUICK": False} | changed, [split], out, sets)
    run.fill(run.row("noisy", split), predict_with_noise)
    return run


@pytest.fixture(scope="module")
def scored(paper_split, tmp_path_factory):
    """(run, its members, lines of rows.csv) of three sets: HEG again, one gene, some genes."""
    out = tmp_path_factory.mktemp("runs")
    heg, genes = paper_split.members["heg"], paper_split.data.genes
    members = {"AGAIN": heg, "ONE": heg[:1], "SOME": genes[3:40]}
    run = start(paper_split, out, members)
    return run, members, pd.read_csv(out / "rows.csv")


def of_test(lines):
    (line,) = lines.query("split == 'test' and truth == 'lognorm'").to_dict("records")
    return line


def test_a_set_of_the_genes_of_heg_has_the_numbers_of_heg(scored):
    line = of_test(scored[2])
    for ending in ("", "_n", "_ceiling"):
        assert line[f"set_AGAIN{ending}"] == pytest.approx(line[f"heg{ending}"], rel=1e-6)
    for ending in ("", "_score"):
        found, expected = line[f"set_AGAIN{ending}_ci"], line[f"heg{ending}_ci"]
        np.testing.assert_allclose(json.loads(found), json.loads(expected), rtol=1e-5)
    assert line["set_AGAIN_score"] == line["heg_score"]
    assert line["set_AGAIN_n"] == 49


def test_rows_of_other_sets_of_one_name_are_not_mixed(paper_split, tmp_path):
    genes = paper_split.data.genes
    start(paper_split, tmp_path, {"A": genes[3:40]})
    start(paper_split, tmp_path, {"A": genes[40:80]}, LEARNING_RATE=1)
    lines = pd.read_csv(tmp_path / "rows.csv").query("split == 'test'")
    assert lines["set_A_score"].notna().sum() == 1
    assert lines["heg_score"].notna().all() and len(lines) == 2
    start(paper_split, tmp_path, {"A": genes[40:80]})
    assert pd.read_csv(tmp_path / "rows.csv")["set_A_score"].notna().all()


def test_the_score_of_one_gene_is_the_gene(scored):
    line = of_test(scored[2])
    assert line["set_ONE_score"] == pytest.approx(line["set_ONE"], rel=1e-6)
    pair = [json.loads(line[f"set_ONE{ending}_ci"]) for ending in ("", "_score")]
    np.testing.assert_allclose(*pair, rtol=1e-5)


@pytest.mark.parametrize("role", ["valid", "test"])
def test_rows_hold_what_scipy_finds_in_the_prediction(scored, role):
    run, members, lines = scored
    (row,) = run.rows
    table = anndata.read_h5ad(row.folder / "predictions.h5ad")
    table = table[table.obs["role"] == role]
    line = lines.query(f"split == '{role}'").iloc[0]
    for name, genes in (("set_SOME", members["SOME"]), ("mg", row.split.members["mg"])):
        r, of_score = [], []
        for _, spots in table.obs.groupby("tissue_index", observed=True):
            if len(spots) == 1:  # It has no r.
                continue
            x, y = table[spots.index, genes].X, table[spots.index, genes].layers["lognorm"]
            varies = (np.ptp(x, axis=0) > 1e-5) & (np.ptp(y, axis=0) > 1e-5)
            r.append(np.full(len(genes), np.nan))
            for gene in np.flatnonzero(varies):
                r[-1][gene] = scipy.stats.pearsonr(x[:, gene], y[:, gene])[0]
            z = [scipy.stats.zscore(values[:, varies].astype(float)) for values in (x, y)]
            of_score.append(scipy.stats.pearsonr(*(part.mean(1) for part in z))[0])
        mean = pd.DataFrame(r).mean()
        assert line[f"{name}_score"] == pytest.approx(np.mean(of_score), abs=1e-6)
        assert line[name] == pytest.approx(mean.mean(), abs=1e-6)
        assert line[f"{name}_n"] == mean.notna().sum()


def test_sets_are_scored_long_after_a_row_was_computed(paper_split, tmp_path):
    genes = paper_split.data.genes
    (row,) = start(paper_split, tmp_path, {}).rows
    written = {path.name: path.read_bytes() for path in row.folder.iterdir()}
    assert "heg_score" in pd.read_csv(tmp_path / "rows.csv")

    def never(row):
        raise AssertionError("it was on disk")

    for name in ("A", "B"):
        sets = gene_sets.GeneSets({name: genes[:9]})
        run = runs.Run({}, RECIPE, [paper_split], tmp_path, sets)
        again = run.fill(run.row("noisy", paper_split), never)
        assert again.folder == row.folder
        table = pd.read_csv(tmp_path / "rows.csv")
        assert f"set_{name}_score" in table
    assert "set_A" not in table, "what is no longer asked"
    for name in ("rows.json", "predictions.h5ad", "recipe.json", "influence.csv", "genes.csv"):
        assert (row.folder / name).read_bytes() == written[name]


def test_scores_on_disk_are_kept_and_rows_csv_has_those_of_this_start(
    paper_split, tmp_path, monkeypatch
):
    members = {"A": paper_split.data.genes[:9]}
    first = start(paper_split, tmp_path, members)
    other = dataclasses.replace(paper_split, seed=43)
    start(other, tmp_path, {"B": members["A"]})
    table = pd.read_csv(tmp_path / "rows.csv").set_index("seed")
    assert table.loc[42, "set_B"].isna().all() and table.loc[43, "set_B"].notna().all()
    assert "set_A" not in table
    monkeypatch.setattr(gene_sets, "score_row", None)
    again = start(paper_split, tmp_path, members)
    assert again.rows[0].lines == first.rows[0].lines


def test_a_kill_between_two_files_of_scores_mixes_no_sets(paper_split, tmp_path, monkeypatch):
    genes = paper_split.data.genes
    first = start(paper_split, tmp_path, {"A": genes[:9]})
    path = tmp_path / first.rows[0].folder.name / gene_sets.INFLUENCE
    influence = path.read_bytes()
    with monkeypatch.context() as killed:
        killed.setattr(gene_sets.files, "save_json", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            start(paper_split, tmp_path, {"A": genes[9:20]})
    start(paper_split, tmp_path, {"A": genes[:9]})
    assert path.read_bytes() == influence


def test_a_file_of_sets_is_no_part_of_a_rows_name(paper_split):
    one, other = (paper_split.made_with(RECIPE | {"GENE_SETS": name}) for name in ("a.gmt", ""))
    assert one == other


# ------------------------------------------------------------------------------------------- table
def test_the_second_table_has_a_line_a_set(scored, capsys):
    run, _, lines = scored
    run.print_scores("methods")
    head, shown = printed_table(capsys.readouterr().out, "gene sets: test slide 3")
    assert head.split()[:5] == ["setting", "set", "genes", "mean", "r"]
    assert [line.split()[1] for line in shown] == ["HEG", "HVG", "MG", "AGAIN", "ONE", "SOME"]
    line = of_test(lines)
    expected = [f"{line['set_SOME']:.3f}", f"{line['set_SOME_score']:.3f}"]
    expected += [recording_interval(line[f"set_SOME{ending}_ci"]) for ending in ("", "_score")]
    assert all(text in shown[-1] for text in expected)
    assert f"{line['set_SOME'] / line['set_SOME_ceiling']:.0%}" in shown[-1]
    assert shown[0].split()[3] == shown[3].split()[3], "HEG again"
    (first, caption), (_, table) = run.tables, run.tables.values()
    assert first.startswith(f"{run.data.label}methods: test slide 3")
    assert caption.startswith("Gene sets, test slide 3")
    assert [line["set"] for line in table][-1] == "SOME"


def recording_interval(text):
    low, high = json.loads(text)
    return f"[{low:.2f}, {high:.2f}]"


def test_the_interval_of_two_seeds_is_of_their_mean(paper_split, tmp_path):
    members = {"A": paper_split.data.genes[:30]}
    run = start(paper_split, tmp_path, members)
    second = dataclasses.replace(paper_split, seed=43)
    run.fill(run.row("noisy", second), predict_with_noise)
    records = recording.select_lines(runs.lines_of(run.rows))
    parts = [pd.read_csv(row.folder / "set_influence.csv") for row in run.rows]
    mean = (parts[0] + parts[1]) / 2
    place = mean[["tissue_index", "column", "row"]]
    slides, places = place["tissue_index"].to_numpy(), place[["column", "row"]].to_numpy()
    error, freedom = intervals.measure_error(mean[["set_A_score"]].to_numpy(), slides, places)
    value = records["set_A_score"].mean()
    half = scipy.stats.t.ppf(0.975, freedom[0]) * error[0]
    line = gene_sets.describe_sets(records, members, tmp_path)[-1]
    assert line["its [95 %]"] == f"[{value - half:.2f}, {value + half:.2f}]"
    sd = records["set_A_score"].std()
    assert line["score r"] == f"{value:.3f}±{sd:.3f}"


def test_of_many_lines_the_first_setting_is_printed(capsys):
    line = {"set": "A", "genes": "5", "mean r": "0.1"}
    lines = [{"setting": setting} | line for setting in ("one", "two") for _ in range(30)]
    gene_sets.print_sets("sets", lines)
    out = capsys.readouterr().out
    assert "two" not in out and "the other 1 settings in report.html" in out
    gene_sets.print_sets("sets", lines[15:45])
    assert "two" in capsys.readouterr().out
    gene_sets.print_sets("sets", [])
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------------------------------------- 26
def test_maps_have_the_scores_of_sets(tmp_path):
    random = np.random.default_rng(3)
    script = load_script("26")
    names = [f"G{i}" for i in range(9)]
    predicted = random.normal(size=(40, 9)).astype(np.float32)
    var = pd.DataFrame({"valid_r": np.linspace(0, 0.8, 9), "ceiling": 0.9}, names)
    var["valid_r_k7"] = var["valid_r"] + 0.1
    obs = pd.DataFrame({"pitch": 60.0, "distance": 1.0}, [f"{i}" for i in range(40)])
    table = anndata.AnnData(predicted, obs, var)
    table.layers["measured"] = (predicted + random.normal(size=(40, 9))).astype(np.float32)
    table.layers["measured"][:, 1] = np.nan  # of a gene that the slide lacks
    table.obsm["spatial"] = random.uniform(0, 500, (40, 2))
    image = np.full((60, 60, 3), 200, np.uint8)
    scales = {"tissue_hires_scalef": 0.1, "spot_diameter_fullres": 40.0}
    table.uns["scale"] = ""
    table.uns["spatial"] = {"S": {"images": {"hires": image}, "scalefactors": scales}}
    table.var["r"] = common.pearson_per_gene(predicted, table.layers["measured"])
    sets = {"T/NK": names[:5], **{f"S{i}": names[i : i + 3] for i in range(6)}}
    found = script.score_sets(table, sets)
    one = np.ones(40)
    x = scores_by_hand(predicted, one, [0, 2, 3, 4])
    y = scores_by_hand(table.layers["measured"], one, [0, 2, 3, 4])
    # A prediction's score does not depend on the genes that the slide lacks.
    score = scores_by_hand(predicted, one, [0, 1, 2, 3, 4])
    np.testing.assert_allclose(table.obs["set_T|NK"], score, atol=1e-6)
    np.testing.assert_allclose(table.obs["set_T|NK_measured"], y, atol=1e-6)
    facts = found.var.loc["T/NK"]
    assert facts["r"] == pytest.approx(scipy.stats.pearsonr(x, y)[0], abs=1e-9)
    assert facts["valid_r"] == pytest.approx(0.2) and facts["genes"] == 5
    assert facts["valid_r_k7"] == pytest.approx(0.3)
    drawn = script.join_drawn(table, ["G8", "G0"], found)
    best = [f"S{i}, score of 3 genes" for i in (5, 4, 3, 2, 1)]
    assert drawn.var_names.tolist() == ["G8", "G0", *best, "T/NK, score of 5 genes"]
    np.testing.assert_allclose(drawn.X[:, -1], score, atol=1e-6)
    np.testing.assert_array_equal(drawn.X[:, 1], predicted[:, 0])
    script.draw_maps(tmp_path / "maps.png", drawn, ["G8", "T/NK, score of 5 genes"], "maps", [])
    assert (tmp_path / "maps.png").stat().st_size > 10_000
    table.write_h5ad(tmp_path / "predictions.h5ad")
    assert "set_T|NK" in anndata.read_h5ad(tmp_path / "predictions.h5ad").obs
