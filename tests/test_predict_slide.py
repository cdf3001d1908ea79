"""Script 26, Space Ranger's folders, the grid over the tissue, and resampling."""

import gzip
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import scanpy
import scipy.sparse
import tifffile
import torch
from conftest import (
    TINY,
    expect_refusal,
    load_script,
    metadata_of,
    printed_table,
    refused,
    rows_of,
    run_script,
    stdout_of,
    write_h5,
)
from matplotlib.figure import Figure
from PIL import Image
from test_exports import check_drawn
from test_patches import picture, spot_table
from test_report import Page, make_slide
from test_similarity import blur, fold, glass, ink

import common
from slides import imaging, inputs
from slides.counts import read_matrix
from slides.manifest import MANIFEST, Slide
from slides.positions import place_spots, read_positions
from study import drawing, files
from study import weights as weighing
from study.errors import InputError


@pytest.fixture(scope="module")
def weights(trained):
    row = rows_of(trained[1])[0]
    return trained[0] / row["folder"] / "weights.safetensors"


@pytest.fixture(scope="module")
def predicted(simulated, weights, tmp_path_factory):
    """(folder, AnnData) of script 26's prediction of the run's own test slide, with counts."""
    out = tmp_path_factory.mktemp("predicted")
    return out, predicted_with(weights, *slide_of(simulated), out=out)[0]


def predict(weights, *options, out):
    """The exit code of script 26."""
    return run_script("26", "--weights", weights, *options, "--out", out, "--device", "cpu")


def predicted_with(weights, *options, out):
    """(predictions.h5ad of script 26, what it printed)."""
    printed = stdout_of("26", "--weights", weights, *options, "--out", out, "--device", "cpu")
    return anndata.read_h5ad(out / "predictions.h5ad"), printed


def facts_of(out):
    """run.json of a run."""
    return json.loads((out / "run.json").read_text())


def slide_of(simulated, number=3):
    """The options of one simulated slide, with positions and counts."""
    row = pd.read_csv(simulated / "slides.csv").set_index("tissue_index").loc[number]
    paths = [f"--{name}={simulated / row[name]}" for name in ("image", "positions", "matrix")]
    return [*paths, "--um-per-px", row["um_per_px"]]


def test_a_slide_gets_the_predictions_of_its_run(weights, predicted):
    folder, ours = predicted
    theirs = anndata.read_h5ad(weights.parent / "predictions.h5ad")
    theirs = theirs[theirs.obs["role"] == "test"]
    assert ours.obs["barcode"].tolist() == theirs.obs["barcode"].tolist()
    assert list(ours.var_names) == list(theirs.var_names)
    np.testing.assert_allclose(ours.X, theirs.X, rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours.layers["measured"], theirs.layers["lognorm"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(ours.var["valid_r"], theirs.var["valid_lognorm_r"], atol=1e-9)
    np.testing.assert_allclose(
        ours.var["r"], theirs.var["test_lognorm_r"], atol=0.01
    )  # of predictions that hardly vary
    facts = facts_of(folder)
    groups = next(iter(facts["tables"].values()))
    rows = {row["group"]: row["r"] for row in groups}
    assert rows["HEG"] == pytest.approx(row_of_test(weights)["heg"], abs=1e-3)
    assert facts["label"] == "SIMULATED slides: "
    assert "EPOCHS" not in facts["settings"], "26 has no such constant"
    table = pd.read_csv(folder / "predictions.csv")
    np.testing.assert_allclose(table[list(ours.var_names)], ours.X, rtol=1e-6)


def test_spots_are_blended_as_in_the_run_over_as_many_micrometres(simulated, tmp_path):
    options = TINY | {"target": "lognorm", "head_start": "ridge", "hidden": 0, "epochs": 0}
    options["neighbourhood"] = True
    rows = rows_of(stdout_of("20", data_root=simulated, out=tmp_path / "run", **options))
    weights = tmp_path / "run" / rows[0]["folder"] / "weights.safetensors"
    theirs = anndata.read_h5ad(weights.parent / "predictions.h5ad")
    ours, printed = predicted_with(weights, *slide_of(simulated), out=tmp_path / "ours")
    assert "of 10 of 10 spots half is the mean of those around, sd 150 um" in printed
    test = theirs[theirs.obs["role"] == "test"].X
    np.testing.assert_allclose(ours.X, test, rtol=0, atol=1e-4)

    def single(metadata, _):
        recipe = json.loads(metadata["recipe"])
        del recipe["NEIGHBOURHOOD"]  # as weights of an older version
        metadata["recipe"] = json.dumps(recipe)

    def coarse(metadata, _):
        metadata["pitch_um"] = json.dumps(2 * json.loads(metadata["pitch_um"]))

    def near(metadata, _):
        metadata["pitch_um"] = "20"

    tables = {}
    for change in (single, coarse, near):
        name = change.__name__
        changed = spoil_weights(weights, tmp_path / f"{name}.safetensors", change)
        tables[name], printed = predicted_with(changed, *slide_of(simulated), out=tmp_path / name)
    alone = tables["single"]
    expected = common.blend_neighbourhood(alone.X, alone.obs, 3.0)
    np.testing.assert_allclose(tables["coarse"].X, expected, rtol=0, atol=1e-4)
    assert np.abs(expected - ours.X).max() > 1e-2
    np.testing.assert_array_equal(tables["near"].X, alone.X)
    assert ours.uns["neighbourhood"] and not alone.uns["neighbourhood"]
    assert "no spot has any: of 0 of 10 spots half is the mean of those around, sd 30 um" in printed


def row_of_test(weights):
    """The row of the test slide, log-normalised truth, beside weights."""
    scored = json.loads((weights.parent / "rows.json").read_text())
    return next(row for row in scored if (row["split"], row["truth"]) == ("test", "lognorm"))


def test_other_weights_have_another_folder(tmp_path):
    script = load_script("26")
    slide = SimpleNamespace(image=tmp_path / "a.tif")
    first, second = (script.choose_folder(slide, "a", tmp_path / name) for name in "xy")
    assert first != second, "of one run, too"


def painted(simulated, folder):
    """Options of simulated slide 3 with four spoilt spots, by their number: glass on 0, ink on 1, a
    fold on 2, and 3 out of focus.
    """
    image_option, positions_option, *others = slide_of(simulated)
    image = tifffile.imread(image_option.removeprefix("--image="))
    positions = read_positions(Path(positions_option.removeprefix("--positions=")))
    spots = positions[positions["in_tissue"] == 1].sort_values(["array_row", "array_col"])
    for number, (row, col) in enumerate(spots[["pxl_row", "pxl_col"]].to_numpy(int)[:4]):
        part = image[row - 112 : row + 112, col - 112 : col + 112]
        spoilt = (glass, ink, fold, blur)[number](part)
        image[row - 112 : row + 112, col - 112 : col + 112] = spoilt
    tifffile.imwrite(folder / "painted.tif", image, photometric="rgb")
    return [f"--image={folder / 'painted.tif'}", positions_option, *others]


def test_glass_ink_folds_and_blur_stand_out(simulated, weights, tmp_path):
    table, printed = predicted_with(weights, *painted(simulated, tmp_path), out=tmp_path / "out")
    assert "times as far from the training slides as they are" in printed
    distances = table.obs["distance"].to_numpy()
    assert (distances[:3] > distances[4:].max()).all()
    assert distances[3] > 1.2 * np.median(distances[4:])


def test_another_staining_raises_the_alarm(simulated, weights, tmp_path):
    image_option, *others = slide_of(simulated)
    image = tifffile.imread(image_option.removeprefix("--image="))
    for rows in common.parts_of(len(image), 512):
        pixels = torch.from_numpy(image[rows]).permute(2, 0, 1)[None]
        changed = common.change_stain(pixels, common.OTHER_STAINING[None])[0].round().clamp(0, 255)
        image[rows] = changed.permute(1, 2, 0).to(torch.uint8).numpy()
    tifffile.imwrite(tmp_path / "shifted.tif", image, photometric="rgb")
    image = ("--image", tmp_path / "shifted.tif")
    _, printed = predicted_with(weights, *others, *image, out=tmp_path / "out")
    warned = next(line for line in printed.splitlines() if "warning: this slide is" in line)
    assert "expect less than the validation r" in warned
    assert "do not rely on the intervals" in warned
    assert facts_of(tmp_path / "out")["warnings"]


def test_intervals_are_those_of_the_validation_spots(weights, predicted):
    _, table = predicted
    run = anndata.read_h5ad(weights.parent / "predictions.h5ad")
    valid = run[run.obs["role"] == "valid"]
    errors = np.sort(np.abs(valid.X - valid.layers["lognorm"]), axis=0)
    half = errors[int(np.ceil(0.8 * (len(errors) + 1))) - 1]
    np.testing.assert_allclose(table.var["half_width_80"], half, rtol=1e-5)
    ends = table.layers["low"], table.layers["high"]
    for end, values in zip(ends, (table.X - half, table.X + half), strict=True):
        np.testing.assert_allclose(end, values.clip(0), atol=1e-5)  # as counts, also of Harmony's
    assert np.isnan(table.layers["low_95"]).all(), "six validation spots cannot tell 95 %"
    inside = (ends[0] <= table.layers["measured"]) & (table.layers["measured"] <= ends[1])
    np.testing.assert_allclose(table.var["coverage_80"], inside.mean(0), atol=0.11)
    per_gene = pd.read_csv(weights.parent / "per_gene.csv").set_index("gene")
    np.testing.assert_allclose(
        table.var["coverage_80"], per_gene["test_lognorm_coverage_80"], atol=0.11
    )  # of ten spots, one may lie on the limit
    defined = per_gene.dropna(subset="test_lognorm_r")
    heg = defined.index.isin(table.var_names[table.var["heg"]])
    expected = defined["test_lognorm_coverage_80"][heg].mean()
    assert row_of_test(weights)["heg_coverage_80"] == pytest.approx(expected)


def test_weights_of_a_fold_predict_and_say_what_they_cannot(simulated, weights, tmp_path):
    def forget(metadata, state):
        metadata["evidence"] = "null"

    fold = spoil_weights(weights, tmp_path / "fold.safetensors", forget)
    table, printed = predicted_with(fold, *slide_of(simulated), out=tmp_path / "out")
    assert printed.count("of a fold of 22") == 1
    assert "distance" in table.obs and "low" in table.layers
    assert "believe" not in table.var


def judged_weights(weights, folder, believed):
    """Weights that say that these of HEG pass in validation, and no others."""

    def judge(metadata, _):
        told, genes = json.loads(metadata["evidence"]), json.loads(metadata["genes"])
        told["genes"]["believe"] = [gene in believed for gene in genes]
        for name, r in (("r", 0.3), ("r_k7", 0.4), ("r_k19", 0.2)):
            told["genes"][name] = [r] * len(genes)
        metadata["evidence"] = json.dumps(told)

    return spoil_weights(weights, folder / "changed.safetensors", judge)


def drawn_titles(monkeypatch):
    """A list that gets what stands below the title of each figure that is saved, and the titles of
    its axes.
    """
    titles = []

    def note(path, figure, description):
        titles.append(figure.get_suptitle().partition("\n")[2])
        titles.extend(ax.get_title() for ax in figure.axes if ax.get_title())

    monkeypatch.setattr(drawing, "save_figure", note)
    return titles


def test_genes_that_pass_are_drawn_at_the_scale_that_holds_better(
    simulated, weights, tmp_path, monkeypatch
):
    heg = metadata_of(weights)["groups"]["heg"]
    passing = heg[2:4]
    changed = judged_weights(weights, tmp_path, passing)
    titles = drawn_titles(monkeypatch)
    table, printed = predicted_with(changed, *slide_of(simulated), out=tmp_path)
    assert f"2 of {len(pd.read_csv(weights.parent / 'per_gene.csv')):,} pass" in printed
    assert "lie among training spots" in printed
    assert "means over 7 spots hold better than single ones: r 0.40 against 0.30" in printed
    for column in ("believe", "drawn"):
        assert {*table.var_names[table.var[column]]} == {*passing}
    assert table.uns["scale"] == "k7"
    assert "lie among training spots" in titles[0] and "expect less than that r" in titles[0]
    for kind in ("predicted", "means over 7 spots", "measured"):
        assert {title.split(",")[0] for title in titles if f", {kind}\n" in title} == {*passing}
    tables = facts_of(tmp_path)["tables"]
    assert {line["gene"] for line in tables["Genes drawn"]} == {*passing}
    (caption,) = [name for name in tables if "in validation: validation spots lie" in name]
    lines = {line["gene"]: line for line in tables[caption]}
    assert {*heg} <= {*lines}
    assert lines[passing[0]]["believe"] and lines[passing[0]]["valid_r_k7"] == 0.4
    assert metadata_of(weights)["pitch_um"] == pytest.approx(100, rel=0.05)
    change = lambda metadata, _: metadata.update(pitch_um="189")  # noqa: E731
    wide = spoil_weights(changed, tmp_path / "wide.safetensors", change)
    genes = ("--genes", f"{passing[0]},{heg[5]}")
    table, printed = predicted_with(wide, *slide_of(simulated), *genes, out=tmp_path)
    told = "no means over neighbourhoods are shown: spots are 100 um apart, and 189 um in"
    assert told in printed and table.uns["scale"] == ""
    assert f"drawn as asked, but failing in validation: {heg[5]}\n" in printed


@pytest.mark.parametrize("kind", ["measured", "k7"])
def test_a_map_says_where_its_r_is_not_defined(kind):
    table = make_slide(3, 3)
    table.layers["measured"] = table.X
    table.obs[["pxl_col", "pxl_row"]] = table.obsm["spatial"]
    table.var = table.var.assign(r=np.nan, valid_r=0.3, valid_r_k7=np.nan, ceiling=0.5)
    ax = Figure().add_subplot()
    load_script("26").draw_map(ax, table, None, "A", kind)
    assert ax.get_title().endswith("\nr is not defined")


def test_where_no_gene_passes_none_is_drawn(simulated, weights, tmp_path, monkeypatch):
    changed = judged_weights(weights, tmp_path, ())
    titles = drawn_titles(monkeypatch)
    table, printed = predicted_with(changed, *slide_of(simulated), out=tmp_path)
    assert "no gene of HEG and HVG passes in validation" in printed
    assert not any("predicted" in title for title in titles) and titles
    assert not table.var["drawn"].any() and table.uns["scale"] == ""
    assert "Genes drawn" not in facts_of(tmp_path)["tables"]


def test_what_validation_says_is_in_the_h5ad(weights, predicted):
    _, table = predicted
    told = metadata_of(weights)["evidence"]["genes"]
    for name in ("low", "high", "p", "q", "r_k7", "r_k19"):
        np.testing.assert_array_equal(table.var[f"valid_{name}"], np.array(told[name], float))
    assert table.var["believe"].tolist() == told["believe"]


def test_a_slide_of_one_spot(simulated, weights, tmp_path):
    positions = tmp_path / "positions.csv"
    table = spot_table().iloc[:1].assign(pxl_row=2000, pxl_col=2000)
    table.to_csv(positions, header=False, index=False)
    image_option, *_ = slide_of(simulated)
    options = (image_option, "--positions", positions, "--um-per-px", 0.304)
    table, printed = predicted_with(weights, *options, out=tmp_path / "out")
    assert "of 1 spots are farther" in printed
    assert len(table) == 1


def write_gmt(path, sets):
    path.write_text("".join("\t".join([name, "-", *sets[name]]) + "\n" for name in sets))
    return "--gene-sets", path


def test_a_new_slide_gets_the_scores_of_sets(simulated, weights, tmp_path):
    """Of symbols and of Ensembl's ids; long names that are nearly the same are all drawn."""

    def name_ids(metadata, _):
        metadata["gene_ids"] = json.dumps([f"ENSG{n:011}" for n in range(len(genes))])

    genes = metadata_of(weights)["genes"]
    changed = spoil_weights(weights, tmp_path / "changed.safetensors", name_ids)
    sets = {"A": genes[:12], "FEW": ["NOWHERE"], "IDS": [f"ENSG{n:011}.3" for n in range(12)]}
    for cell in "TB":
        sets[f"GOBP_POSITIVE_REGULATION_OF_{cell}_CELL_PROLIFERATION"] = genes[:12]
    options = (*slide_of(simulated), *write_gmt(tmp_path / "sets.gmt", sets))
    twice = ("--genes", f"{genes[0]},{genes[0]}")
    table, printed = predicted_with(changed, *options, *twice, out=tmp_path / "out")
    assert "gene sets   4 of 5, of 12 genes in the panel; left out" in printed
    assert "FEW (0)" in printed
    _, lines = printed_table(printed, "Gene sets: mean r")
    assert len(lines) == 4
    assert lines[0].split()[:2] == ["A", "12"]
    assert {"set_A", "set_IDS"} < {*table.obs}
    np.testing.assert_array_equal(table.obs["set_A"], table.obs["set_IDS"])
    assert any(caption.startswith("Gene sets") for caption in facts_of(tmp_path / "out")["tables"])


def rename_genes(matrix, folder, change):
    """A copy of a matrix folder whose features.tsv `change` has changed."""
    shutil.copytree(matrix, folder, ignore=shutil.ignore_patterns("*.npy"))
    features = pd.read_csv(folder / "features.tsv", sep="\t", header=None)
    for column in (0, 1):
        features[column] = change(features[column], features[1])
    features.to_csv(folder / "features.tsv", sep="\t", header=False, index=False)
    return "--matrix", folder


def test_genes_that_the_counts_lack_change_no_score_and_nothing_of_validation(
    simulated, weights, tmp_path
):
    genes, lost = metadata_of(weights)["genes"], metadata_of(weights)["groups"]["heg"]
    sets = write_gmt(tmp_path / "sets.gmt", {"A": [*lost, *genes[-3:]]})
    image, positions, matrix, *um = slide_of(simulated)
    lacking = rename_genes(
        matrix.removeprefix("--matrix="),
        tmp_path / "matrix",
        lambda column, symbols: column.where(~symbols.isin(lost), "no-" + symbols),
    )
    found = []
    for counts in ((), lacking):
        options = (image, positions, *um, *counts, *sets)
        table, printed = predicted_with(weights, *options, out=tmp_path / "out")
        group = next(iter(facts_of(tmp_path / "out")["tables"].values()))[0]
        found.append((table.obs["set_A"].tolist(), group["r in validation"], group["pass"]))
    assert found[0] == found[1]
    assert (group["genes"], group["compared"]) == (len(lost), 0)
    assert f"lack {len(lost)} of the model's {len(genes):,} genes, as" in printed


def test_no_slide_overwrites_the_results_of_another(weights, tmp_path, monkeypatch):
    """Images of one name in two samples, the same again by another path, and without an image."""
    monkeypatch.chdir(tmp_path)
    options = {"weights": weights, "um_per_px": 0.5, "device": "cpu"}
    for seed, sample in enumerate(("A", "B")):
        (tmp_path / sample).mkdir()
        image = np.random.default_rng(seed).integers((90, 40, 80), (220, 90, 190), (700, 900, 3))
        tifffile.imwrite(tmp_path / sample / "image.tif", image.astype(np.uint8), photometric="rgb")
    positions = tmp_path / "positions.csv"
    spot_table().to_csv(positions, header=False, index=False)
    folders = tmp_path / "runs" / "26_predict_slide"

    def predict_image(image):
        assert run_script("26", image=image, positions=positions, **options) == 0
        return {path.parent: path.read_bytes() for path in folders.glob("*/predictions.csv")}

    first = predict_image("A/image.tif")
    both = predict_image("B/image.tif")
    assert len(first) == 1
    assert len(both) == 2
    assert first.items() < both.items()
    assert predict_image(tmp_path / "A" / "image.tif") == both, "the same slide is the same folder"
    assert all(folder.name.startswith("image-") for folder in both)


def test_the_h5ad_opens_in_scanpy_and_draws(predicted):
    check_drawn(scanpy.read_h5ad(predicted[0] / "predictions.h5ad"))


def test_results_of_another_script_stay_and_those_of_another_start_go(
    simulated, copied, weights, tmp_path, monkeypatch
):
    run = copied("20")
    command = ("26", "--weights", weights, *slide_of(simulated), "--out")
    for out, name in ((run, "rows.csv"), (run / weights.parent.name, "rows.json")):
        expect_refusal([str(out), name, "another folder"], *command, out)
    (run / "rows.csv").unlink()
    expect_refusal(["run.json", "another folder"], *command, run)
    out = tmp_path / "out"
    assert predict(weights, *slide_of(simulated), out=out) == 0
    monkeypatch.setattr(imaging, "map_scratch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        predict(weights, *slide_of(simulated), out=out)
    assert [path.name for path in out.iterdir()] == [".lock"]


def ellipse(step=1):
    """A slide of light background with an ellipse of tissue, a hole in it, a speck beside it, of
    0.5 um a px or `step` times as coarse; (image, mask).
    """
    y, x = np.mgrid[:3200:step, :3800:step]
    tissue = ((y - 1600) / 1200) ** 2 + ((x - 1900) / 1500) ** 2 < 1
    speck = (y - 150) ** 2 + (x - 150) ** 2 < 60**2
    hole = (y - 1600) ** 2 + (x - 1900) ** 2 < 60**2
    image = np.full((*tissue.shape, 3), 238, np.uint8)
    noise = np.random.default_rng(0).integers(-12, 12, (*tissue.shape, 1))
    image[(tissue & ~hole) | speck] = (196, 120, 178)
    return np.clip(image + noise, 0, 255).astype(np.uint8), tissue


def grid_of(tmp_path, image, um_per_px, **options):
    path = tmp_path / f"{um_per_px}.tif"
    tifffile.imwrite(path, image, photometric="rgb", **options)
    slide = Slide(1, "S", "D", path, um_per_px, positions=None, matrix=None)
    return place_spots(slide)[0]


@pytest.mark.parametrize(
    "options", [{}, {"tile": (240, 176), "compression": "zlib"}, {"rowsperstrip": 37}]
)
def test_the_grid_covers_tissue_and_skips_background(tmp_path, options):
    image, tissue = ellipse(2)
    spots = grid_of(tmp_path, image, 1.0, **options)
    at = spots[["pxl_row", "pxl_col"]].to_numpy()
    on = tissue[tuple(at.T)]
    assert on.mean() > 0.97, "no spots on background, nor on the speck"
    cell = 100**2 * 0.75**0.5  # px of a spot at a pitch of 100 px
    # None are missing in tissue, nor in its small hole.
    assert len(spots) == pytest.approx(tissue.sum() / cell, rel=0.06)
    nearest = np.sqrt(((at[:, None] - at[None]) ** 2).sum(2) + 1e9 * np.eye(len(at))).min(1)
    assert np.median(nearest) == pytest.approx(100, abs=0.75), "100 um apart"
    row, col = spots["array_row"], spots["array_col"]
    assert ((row + col) % 2 == 0).all() and spots.index.is_unique


def test_half_the_resolution_gives_the_same_spots_and_nearly_the_same_patches(tmp_path):
    image, _ = ellipse()
    half = image.reshape(1600, 2, 1900, 2, 3).mean((1, 3)).astype(np.uint8)
    one, other = grid_of(tmp_path, image, 0.5), grid_of(tmp_path, half, 1.0)
    shared = one.index.intersection(other.index)
    assert len(shared) >= 0.97 * max(len(one), len(other))
    for axis in ("pxl_row", "pxl_col"):
        assert (one.loc[shared, axis] - 2 * other.loc[shared, axis]).abs().max() <= 1
    patches = []
    for name, um in (("one", 0.5), ("half", 1.0)):
        root = tmp_path / name
        root.mkdir()
        tifffile.imwrite(root / "slide.tif", image if um == 0.5 else half, photometric="rgb")
        row = [1, "S", "D", "slide.tif", um, "", ""]
        pd.DataFrame([row], columns=MANIFEST).to_csv(root / "slides.csv", index=False)
        assert run_script("19", "--data-root", root, "--um-per-px", 0.5, "--target", "lognorm") == 0
        table = pd.read_csv(root / "dataset" / "dataset.csv").set_index("barcode")
        made = np.load(root / "dataset" / "patches.npy")
        patches.append(made[table.index.get_indexer(shared[:20])].astype(float))
    assert np.abs(patches[0].mean((1, 2)) - patches[1].mean((1, 2))).max() < 3


def test_tissue_up_to_the_border_has_no_spot_beyond_it(tmp_path):
    random = np.random.default_rng(0)
    image = random.integers((120, 60, 90), (200, 90, 160), (1207, 1411, 3))
    image[:600, :600] = 240
    spots = grid_of(tmp_path, image.astype(np.uint8), 0.5)
    assert (spots["pxl_row"] < 1207).all() and (spots["pxl_col"] < 1411).all() and len(spots) > 20


def test_a_white_slide_has_no_tissue(tmp_path):
    with pytest.raises(InputError, match="no tissue"):
        grid_of(tmp_path, np.full((900, 900, 3), 240, np.uint8), 0.5)


@pytest.mark.parametrize(
    "shape, um, size", [((20, 10_600, 3), 20, "212"), ((150, 150, 3), 5e-4, "7.5e-05")]
)
def test_a_slide_of_no_possible_size_is_refused(tmp_path, shape, um, size):
    """As where the magnification, or mm, stand for um per px: its grid may have billions of spots."""
    image = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    with refused(f"um_per_px {um:g}", f"{size} mm", "give um per px"):
        grid_of(tmp_path, image, um)


def test_an_image_alone(simulated, weights, tmp_path):
    image = next((simulated / "image").glob("*C1.tif"))
    options = ("--image", image, "--um-per-px", 0.304, "--genes")
    table, printed = predicted_with(weights, *options, "ALB,RPL41", out=tmp_path)
    assert table.n_obs > 9 and "measured" not in table.layers and "ALB" in printed
    assert run_script("27", "--run", tmp_path) == 0
    page = Page((tmp_path / "report.html").read_text())
    assert (page.tags.count("img"), page.tags.count("table")) == (1, 6)
    assert not page.mute and not page.outside
    command = ("26", "--weights", weights, "--out", tmp_path)
    expect_refusal(["NOVEL", "of the model"], *command, *options, "NOVEL")


@pytest.mark.parametrize("target", ["log1p", "lognorm"])
def test_counts_are_measured_in_the_unit_of_the_prediction(target):
    counts = scipy.sparse.csr_matrix(np.array([[3.0, 0, 1], [0, 5, 2]], np.float32))
    obs = pd.DataFrame({"n_counts": [400, 700]}, ["a", "b"])
    var = pd.DataFrame({"name": ["A", "B", "C"]}, ["ID1", "ID2", "ID3"])
    spots = anndata.AnnData(counts, obs, var)
    slide = SimpleNamespace(tissue_index=1, matrix="matrix")
    genes = ["C", "A", "NOVEL"]
    trained = SimpleNamespace(genes=genes, gene_ids=genes, recipe={"TARGET": target})
    scale = 1 if target == "log1p" else 1e4 / obs["n_counts"].to_numpy()[:, None]
    expected = np.log1p(counts.toarray()[:, [2, 0]] * scale)
    found = load_script("26").measure(slide, spots, trained)
    np.testing.assert_allclose(found[:, :2], expected, rtol=1e-6)
    assert np.isnan(found[:, 2]).all()


def test_a_gene_is_compared_by_its_id_where_its_symbol_is_shared():
    features = pd.DataFrame({"name": ["ALB", "ALB", "HAL"]}, ["ID0", "ID1", "ID2"])
    script = load_script("26")
    inputs.WARNINGS.clear()
    trained = SimpleNamespace(genes=["HAL", "ALB"], gene_ids=["ID2", "ID1"])
    assert script.find_genes(features, trained).tolist() == [2, 1]
    trained.gene_ids = ["HAL", "ALB"]  # of a table of symbols
    assert script.find_genes(features, trained).tolist() == [2, -1]
    assert len(inputs.WARNINGS) == 1
    assert "1 genes of the model are not compared, as ALB" in inputs.WARNINGS[0]
    inputs.WARNINGS.clear()
    trained.gene_ids = ["ID1", "ENSG2"]  # The line of ALB, by its id, is another gene's.
    features["name"] = ["OTHER", "ALB", "NAT1"]
    trained.genes = ["GENE1", "ALB"]
    assert script.find_genes(features, trained).tolist() == [1, -1]


def spoil_weights(weights, path, change):
    with safetensors.safe_open(weights, "pt") as file:
        metadata, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(metadata, state)
    safetensors.torch.save_file(state, path, metadata)
    return path


SPOILT = {
    "another version": (lambda m, s: m.update(format="2"), ["format 2", "this version"]),
    "no version": (lambda m, s: m.pop("format"), ["format None"]),
    "a missing field": (lambda m, s: m.pop("genes"), ["'genes'", "train it again"]),
    "older weights": (lambda m, s: [m.pop(name) for name in ("training_slides", "half_width_80", "evidence")], ["lack 'training_slides'", "train it again"]),
    "no intervals": (lambda m, s: m.pop("half_width_95"), ["'half_width_95'", "train it again"]),
    "evidence left out": (lambda m, s: m.pop("evidence"), ["'evidence'", "train it again"]),
    "a missing tensor": (lambda m, s: s.pop("head.4.weight"), ["not the network"]),
    "another patch size": (lambda m, s: m.update(patch_size="256"), ["256 px"]),
    "no evidence": (lambda m, s: m.update(evidence="{}"), ["evidence are of another version"]),
    "other evidence": (lambda m, s: m.update(evidence='{"claim": "", "genes": {"r": [0.3]}}'), ["evidence are of another version", "train it again"]),
    "no recipe": (lambda m, s: m.update(recipe="[]"), ["recipe", "train it again"]),
    "half a recipe": (lambda m, s: m.update(recipe='{"HIDDEN": 16}'), ["BACKBONE", "train it again"]),
    "other training slides": (lambda m, s: m.update(training_slides='{"mean": []}'), ["training_slides", "train it again"]),
    "no JSON": (lambda m, s: m.update(genes="[A"), ["not a .safetensors file of a run"]),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
def test_other_weights_are_refused_in_one_line(simulated, weights, tmp_path, case):
    change, words = SPOILT[case]
    path = spoil_weights(weights, tmp_path / "spoilt.safetensors", change)
    command = ("26", "--weights", path, *slide_of(simulated), "--out", tmp_path / "out")
    expect_refusal(["spoilt.safetensors", *words], *command)
    assert not (tmp_path / "out").exists()


def name_folder(run, name, *tables):
    """A run whose rows.csv are these tables, and whose network's folder is there again under a
    name, as one of this start.
    """
    pd.concat(tables).to_csv(run / "rows.csv", index=False)
    (network,) = run.glob("EfficientNet-B0-*")
    shutil.copytree(network, run / name)
    facts = facts_of(run)
    facts["folders"].append(name)
    files.save_json(run / "run.json", facts)


def test_of_a_run_the_best_network_in_validation_is_taken(simulated, copied, tmp_path):
    run = copied("20")
    table = pd.read_csv(run / "rows.csv")
    network = table["setting"] == "EfficientNet-B0"
    better = table[network].assign(folder="better", setting="another seed")
    valid, test = better["split"] == "valid", better["split"] == "test"
    better.loc[valid, "heg"] += 0.1
    better.loc[test, "heg"] -= 0.5
    # Against Harmony's values r is another number, which chooses nothing.
    harmony = better.assign(folder="none", truth="harmony", heg=0.9)
    # Another protocol's r in validation is not to be compared.
    earlier = better.assign(folder="earlier", setting="an earlier start", protocol="block")
    earlier.loc[valid, "heg"] += 0.1
    name_folder(run, "better", harmony, earlier, better, table)
    shutil.copytree(run / "better", run / "earlier")
    command = ["26", *slide_of(simulated), "--out", tmp_path / "out", "--device", "cpu", "--run"]
    assert "another seed: better, HEG r" in stdout_of(*command, run)
    expect_refusal(["--run", "or --weights"], *command, run, "--weights", run / "better")
    expect_refusal(["no rows.csv"], *command, tmp_path / "out")


def test_of_a_search_its_choice_is_taken_and_no_fold(simulated, copied, capsys):
    run = copied("20")
    table = pd.read_csv(run / "rows.csv")
    network = table[table["setting"] == "EfficientNet-B0"]
    tested = network[network["split"] == "test"]
    choice = tested.assign(folder="choice", setting="chosen by search")
    name_folder(run, "choice", choice, network)
    script = load_script("26")
    script.RUN = str(run)
    image = simulated / pd.read_csv(simulated / "slides.csv")["image"].iloc[2]
    assert script.choose_weights(slide_in(image)) == run / "choice"
    assert "chosen by search: choice, not validated" in capsys.readouterr().out


def slide_in(image, positions=None, matrix=None):
    return Slide(1, "S", "D", image, 0.5, positions, matrix)


def test_a_slide_of_the_run_gets_a_network_that_has_not_learnt_from_it(
    simulated, weights, tmp_path, capsys
):
    """Under protocol loso every slide trained most networks, the best in validation among them."""
    run = tmp_path / "run"
    options = TINY | {"epochs": 1, "target": "lognorm", "protocol": "loso"}
    assert run_script("20", data_root=simulated, out=run, **options) == 0
    rows = pd.read_csv(run / "rows.csv", dtype={"slide": str}).query("setting == 'EfficientNet-B0'")
    heg = dict(zip(rows["folder"], np.linspace(0.1, 0.4, len(rows)), strict=True))
    rows.assign(heg=rows["folder"].map(heg)).to_csv(run / "rows.csv", index=False)  # all known
    tests = rows[rows["split"] == "test"].set_index("slide")["folder"]
    images = pd.read_csv(simulated / "slides.csv").set_index("tissue_index")["image"]
    script = load_script("26")
    script.RUN = str(run)
    capsys.readouterr()
    for number, image in images.items():
        copied = tmp_path / f"another name {number}.tif"
        shutil.copy(simulated / image, copied)
        assert script.choose_weights(slide_in(copied)) == run / tests[str(number)]
    assert "no test" not in capsys.readouterr().out
    script.RUN = ""
    for number, image in images.items():
        script.WEIGHTS = str(run / tests["3"] / "weights.safetensors")
        script.choose_weights(slide_in(simulated / image))
        role = {3: "", 4: "validated"}.get(number, "trained")
        told = capsys.readouterr().out
        assert (f"this slide {role} the model: its r here is no test" in told) == (number != 3)
    # Of another data root nothing is known; where all have learnt from it, the best is taken.
    script.RUN, script.WEIGHTS = str(run), ""
    rows[rows["folder"] != tests["1"]].to_csv(run / "rows.csv", index=False)
    script.choose_weights(slide_in(simulated / images[1]))
    assert "no test" in capsys.readouterr().out
    # Of a row that is older than the data root nothing is known, and others come first.
    older = json.loads((run / tests["1"] / "recipe.json").read_text()) | {"data": "older"}
    (run / tests["1"] / "recipe.json").write_text(json.dumps(older))
    rows.to_csv(run / "rows.csv", index=False)
    assert script.choose_weights(slide_in(simulated / images[2])) == run / tests["2"]
    assert "not known whether" not in capsys.readouterr().out
    assert script.choose_weights(slide_in(simulated / images[1])) == run / tests["1"]
    told = "not known whether the model has learnt from this slide, since"
    assert told in capsys.readouterr().out
    files.save_json(run / "run.json", facts_of(run) | {"data_root": str(tmp_path)})
    script.choose_weights(slide_in(simulated / images[1]))
    told = capsys.readouterr().out
    assert "no test" not in told
    assert f"no {tmp_path / 'dataset' / 'meta.json'}: so it is not known whether" in told


def test_a_training_slide_is_known_by_any_of_its_files(simulated, trained, tmp_path):
    """Packed, by its counts or positions where the image was saved again, and not at all."""
    run, other = trained[0], tmp_path / "other.tif"
    row = pd.read_csv(simulated / "slides.csv").set_index("tissue_index").loc[1]
    image, positions, matrix = (simulated / row[name] for name in ("image", "positions", "matrix"))
    tifffile.imwrite(other, picture(), photometric="rgb")
    packed = tmp_path / "slide.tif.gz"
    packed.write_bytes(gzip.compress(image.read_bytes(), 1))
    for slide in (slide_in(packed), slide_in(other, positions, matrix)):
        assert weighing.find_in_run(run, slide)[0] == {1}
    assert not weighing.find_in_run(run, slide_in(other, positions))[0], "all have these positions"
    meta = json.loads((simulated / "dataset" / "meta.json").read_text())
    meta["slides"] = meta["slides"][:1]
    files.save_json(tmp_path / "one" / "dataset" / "meta.json", meta)
    facts = {"script": "20", "folders": []}
    files.save_json(tmp_path / "of_one" / "run.json", facts | {"data_root": "../one"})
    assert weighing.find_in_run(tmp_path / "of_one", slide_in(other, positions))[0] == {1}
    numbers, fingerprint = weighing.find_in_run(run, slide_in(other))
    assert numbers == set()
    folder = run / rows_of(trained[1])[0]["folder"]
    assert weighing.find_role(folder, (numbers, fingerprint)) is None
    assert weighing.find_role(folder, (numbers, "changed")) == weighing.UNKNOWN
    assert weighing.find_in_run(tmp_path, slide_in(image)) is None, "no run.json"
    assert weighing.find_role(folder, None) == weighing.UNKNOWN


@pytest.mark.parametrize("arguments, words", [
    (["--weights", "nowhere"], ["nowhere", "no such file"]),
    (["--weights", __file__], ["test_predict_slide.py", "not a .safetensors"]),
    (["--image", ""], ["--image", "which slide"]),
    (["--image", "no.tif"], ["no.tif", "no such file"]),
    (["--image", "patches.h5"], ["patches.h5", "patches alone"]),
    (["--genes", ",".join(map(str, range(101)))], ["101 genes", "at most 100 are drawn"]),
    (["--gene-sets", "slash.gmt"], ["slash.gmt", "A/B and A|B would share"]),
    (["--gene-sets", "measured.gmt"], ["measured.gmt", "Foo and Foo_measured would share"]),
])  # fmt: skip
def test_script_26_refuses_what_is_not_there(
    simulated, weights, tmp_path, monkeypatch, arguments, words
):
    monkeypatch.chdir(tmp_path)
    Path("patches.h5").touch()
    genes = metadata_of(weights)["genes"][:6]
    for path, names in (("slash.gmt", ("A/B", "A|B")), ("measured.gmt", ("Foo", "Foo_measured"))):
        write_gmt(Path(path), dict.fromkeys(names, genes))
    options = ["--weights", weights, *slide_of(simulated), "--out", tmp_path / "out"]
    expect_refusal(words, "26", *options, *arguments)


def test_a_damaged_run_json_is_refused_and_any_name_of_an_image_drawn(
    simulated, copied, weights, tmp_path
):
    odd = tmp_path / "a $x_{ b$.tif"
    odd.symlink_to(slide_of(simulated)[0].removeprefix("--image="))
    image = (*slide_of(simulated), "--image", odd)
    assert predict(weights, *image, out=tmp_path / "out") == 0
    figure = Figure()
    figure.suptitle("caf\udce9")
    drawing.save_figure(tmp_path / "maps.png", figure, "caf\udce9")
    run = copied("20")
    (run / "run.json").write_text("{")
    options = ("--run", run, *image, "--out", tmp_path / "other")
    expect_refusal(["run.json", "not as a script wrote it"], "26", *options)


# ---------------------------------------------------------------------------------------------- Space Ranger


def space_ranger(folder, simulated, number, kind):
    """A folder outs/ as Space Ranger writes it: "new" (positions with a header, .h5), "old", or "cytassist"."""
    row = pd.read_csv(simulated / "slides.csv").set_index("tissue_index").loc[number]
    outs = folder / f"sample{number}" / "outs"
    (outs / "spatial").mkdir(parents=True)
    positions = pd.read_csv(
        simulated / row["positions"], header=None, names=common.POSITION_COLUMNS
    )
    header = ["pxl_row_in_fullres", "pxl_col_in_fullres"]
    named = positions.set_axis([*common.POSITION_COLUMNS[:4], *header], axis=1)
    matrix = read_matrix(simulated / row["matrix"])
    if kind == "old":
        positions.to_csv(outs / "spatial" / "tissue_positions_list.csv", header=False, index=False)
        shutil.copytree(simulated / row["matrix"], outs / "filtered_feature_bc_matrix",
                        ignore=shutil.ignore_patterns("*.npy"))  # fmt: skip
    else:
        named.to_csv(outs / "spatial" / "tissue_positions.csv", index=False)
        names, ids = [*matrix.var["name"]], [*matrix.var_names]
        h5 = outs / "filtered_feature_bc_matrix.h5"
        write_h5(h5, matrix.X, names, barcodes=matrix.obs_names, ids=ids)
    image = tifffile.imread(simulated / row["image"])
    for name in ["unused.tif"] + ["cytassist_image.tiff"] * (kind == "cytassist"):
        tifffile.imwrite(outs / "spatial" / name, image[::8, ::8], photometric="rgb")
    Image.fromarray(image[::4, ::4]).save(outs / "spatial" / "tissue_hires_image.png")
    files.save_json(outs / "spatial" / "scalefactors_json.json", {"tissue_hires_scalef": 0.25})
    return outs, simulated / row["image"]


def test_space_rangers_folders_become_a_data_root(simulated, tmp_path):
    kinds = {1: "new", 2: "old", 3: "cytassist", 4: "new"}
    made = [space_ranger(tmp_path, simulated, number, kind) for number, kind in kinds.items()]
    outs = ",".join(
        str(outs if number % 2 else outs.parent) for number, (outs, _) in enumerate(made)
    )
    options = ("--from-spaceranger", outs, "--images", ",".join(str(image) for _, image in made))
    assert run_script("19", "--data-root", tmp_path / "mine", *options, "--target", "lognorm") == 0
    expected = common.load_dataset(simulated, "lognorm")
    found = common.load_dataset(tmp_path / "mine", "lognorm")
    assert found.genes == expected.genes
    assert found.spots["barcode"].tolist() == expected.spots["barcode"].tolist()
    assert (found.patches == expected.patches).all()
    np.testing.assert_array_equal(found.lognorm, expected.lognorm)
    manifest = pd.read_csv(tmp_path / "mine" / "slides.csv")
    assert manifest["name"].tolist() == ["sample1", "sample2", "sample3", "sample4"]
    assert manifest["um_per_px"].tolist() == pytest.approx([0.304] * 4, rel=0.01)
    assert run_script("19", "--data-root", tmp_path / "mine", *options, "--check") == 0, "once more"
    other = {"from_spaceranger": made[0][0], "images": made[0][1], "data_root": tmp_path / "mine"}
    expect_refusal(["slides.csv", "already", "other slides"], "19", **other)


def test_a_users_own_files_stay(simulated, weights, tmp_path):
    outs, image = space_ranger(tmp_path, simulated, 1, "new")
    own = outs.parent / "A.tif"  # in the folder that bears the slide's name, inside the data root
    shutil.copy(image, own)
    options = {"from_spaceranger": outs, "images": own, "target": "lognorm"}
    assert run_script("19", data_root=tmp_path, **options) == 0
    assert own.is_file() and not own.is_symlink()
    assert (tmp_path / "links" / "sample1" / "A.tif").is_symlink()
    out = tmp_path / "run"
    notes = out / "slide" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    inside = out / "B.tif"
    shutil.copy(image, inside)
    pixels = inside.read_bytes()
    assert predict(weights, "--um-per-px", 0.304, "--image", inside, out=out) == 0
    assert notes.read_text() == "mine"
    assert inside.read_bytes() == pixels
    made = {"predictions.h5ad", "predictions.csv", "predictions.geojson"}
    made |= {"maps.png", "run.json", ".lock"}
    assert {path.name for path in out.iterdir()} == made | {"slide", "B.tif"}, "patches do not stay"


def test_a_slide_without_the_models_genes_is_refused(simulated, weights, tmp_path):
    matrix = slide_of(simulated, 1)[2].removeprefix("--matrix=")
    mouse = rename_genes(matrix, tmp_path / "matrix", lambda column, _: "mouse-" + column)
    options = ("--weights", weights, *slide_of(simulated, 1), *mouse, "--out", tmp_path / "out")
    expect_refusal([str(tmp_path / "matrix"), "none of the model's"], "26", *options)
    assert not (tmp_path / "out" / "predictions.csv").exists()


def test_a_space_ranger_folder_alone_is_predicted_from_its_hires_image(
    simulated, weights, tmp_path
):
    outs, _ = space_ranger(tmp_path, simulated, 3, "new")
    table, printed = predicted_with(weights, "--positions", outs, out=tmp_path / "out")
    assert "hires image, 1.2" in printed
    truth = read_positions(outs / "spatial" / "tissue_positions.csv").loc[table.obs["barcode"]]
    assert np.abs(table.obs["pxl_row"].to_numpy() - truth["pxl_row"].to_numpy() / 4).max() <= 0.5
    assert list(table.uns["spatial"]) == ["sample3"] and "measured" in table.layers


def test_the_full_resolution_image_is_asked_for(simulated, tmp_path):
    outs, _ = space_ranger(tmp_path, simulated, 1, "new")
    options = ("--data-root", tmp_path / "mine", "--from-spaceranger", outs, "--target", "lognorm")
    expect_refusal(["outs", "--images", "--use-hires"], "19", *options)
    assert not (tmp_path / "mine" / "slides.csv").exists()
    assert "hires image, 1.2" in stdout_of("19", *options, "--use-hires")
    coarse = np.load(tmp_path / "mine" / "dataset" / "patches.npy")
    assert coarse.shape[1:] == (224, 224, 3) and len(coarse) == 10


@pytest.mark.parametrize("gone, words", [
    ("spatial", ["tissue_positions.csv", "outs/"]),
    ("filtered_feature_bc_matrix.h5", ["filtered_feature_bc_matrix.h5", "outs/"]),
])  # fmt: skip
def test_a_folder_that_is_not_space_rangers(simulated, tmp_path, gone, words):
    outs, image = space_ranger(tmp_path, simulated, 1, "new")
    shutil.rmtree(outs / gone) if (outs / gone).is_dir() else (outs / gone).unlink()
    options = {"data_root": tmp_path / "mine", "from_spaceranger": outs, "images": image}
    expect_refusal(words, "19", **options)


def test_a_space_ranger_folder_is_predicted_and_compared(simulated, weights, tmp_path):
    outs, image = space_ranger(tmp_path, simulated, 3, "new")
    assert predict(weights, "--image", image, "--positions", outs, out=tmp_path / "out") == 0
    table = pd.read_csv(tmp_path / "out" / "correlations.csv").set_index("gene")
    assert {"r", "valid_r", "ceiling"} <= set(table.columns) and table["r"].notna().mean() > 0.9
