"""study/viewer.py: what a page embeds is what was predicted, it is small, and a browser draws it."""

import base64
import html
import io
import json
import re
import shutil
import subprocess

import anndata
import matplotlib
import numpy as np
import pandas as pd
import pytest
from conftest import load_script, run_script
from PIL import Image
from scipy.stats import zscore
from test_predict_slide import predict, slide_of
from test_scales import lay_grid

from study import scales, viewer

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def make_tissue(side=12, thumbnail=True):
    """A Tissue of side x side spots 200 px apart on a smooth pink image, 8 px of the slide a px."""
    places = 400 + 200 * lay_grid("square", side)
    size = int(places.max() + 400) // 8
    shade = np.linspace(150, 250, size).astype(np.uint8)
    image = np.stack(
        [np.full((size, size), 235), np.tile(shade, (size, 1)), np.full((size, size), 220)], -1
    )
    return viewer.Tissue(places, 200.0, (image.astype(np.uint8), 8) if thumbnail else None)


def make_genes(n_spots, n_genes=3, kinds=("measured", "predicted")):
    random = np.random.default_rng(0)
    return {
        f"G{i}": [viewer.Map(kind, random.gamma(2, 1, n_spots), f"r 0.{i}") for kind in kinds]
        for i in range(n_genes)
    }


def data_of(text):
    """The JSON that a page embeds."""
    return json.loads(text.split('<script type="application/json">')[1].split("</script>")[0])


def decode(held):
    """The values of a map as a page holds them, and the greatest error of rounding."""
    codes = np.frombuffer(base64.b64decode(held["codes"]), np.uint8).astype(float)
    codes[codes == 255] = np.nan
    step = (held["high"] - held["low"]) / 254
    return held["low"] + codes * step, step / 2


def places_of(data):
    """(n, 2) places in parts of the map's width and height."""
    parts = [np.frombuffer(base64.b64decode(data[name]), "<u2") / 65535 for name in ("x", "y")]
    return np.stack(parts, 1)


def test_a_page_embeds_what_was_predicted():
    tissue, genes = make_tissue(), make_genes(144)
    text = "\n".join(viewer.as_viewer(tissue, {}, genes))
    data = data_of(text)
    assert [entry["name"] for entry in data["entries"]] == [*genes]
    for entry in data["entries"]:
        for held, drawn in zip(entry["maps"], genes[entry["name"]], strict=True):
            values, error = decode(held)
            assert error < 0.02 * np.ptp(drawn.values)
            np.testing.assert_allclose(values, drawn.values, rtol=0, atol=error * 1.0001)
            assert (held["kind"], held["caption"]) == (drawn.kind, drawn.caption)
    low, size = viewer.find_view(tissue)
    np.testing.assert_allclose(low + places_of(data) * size, tissue.places, atol=0.05)
    with Image.open(io.BytesIO(base64.b64decode(data["image"].split(",")[1]))) as image:
        assert image.size[1] / image.size[0] == pytest.approx(data["ratio"], abs=0.01)
        x, y = (places_of(data)[60] * image.size).astype(int)
        column = int(tissue.places[60][0] / 8)
        expected = tissue.thumbnail[0][0, column]
        np.testing.assert_allclose(np.asarray(image)[y, x], expected, atol=6)
    assert not re.search("https?://", text)


def test_values_that_are_not_there_are_no_colour():
    values = np.array([np.nan, 1.0, 3.0, np.inf])
    held = viewer.encode_map(viewer.Map("measured", values, ""), np.arange(4))
    np.testing.assert_array_equal(decode(held)[0], [np.nan, 1, 3, np.nan])
    held = viewer.encode_map(viewer.Map("measured", np.full(3, np.nan), ""), np.arange(3))
    assert np.isnan(decode(held)[0]).all() and (held["low"], held["high"]) == (0, 0)
    held = viewer.encode_map(viewer.Map("predicted", np.full(3, 0.7), ""), np.arange(3))
    np.testing.assert_array_equal(decode(held)[0], 0.7)


def test_fifty_genes_of_a_visium_slide_stay_below_two_megabytes():
    kinds = ("measured", "predicted", "mean of 19 spots", "low", "high")
    tissue = make_tissue(68)
    genes = make_genes(68**2, 50, kinds)
    distance = [viewer.Map("distance", np.ones(68**2), "")]
    text = "\n".join(viewer.as_viewer(tissue, {}, genes, distance))
    assert len(text) < 2_000_000
    assert len(data_of(text)["entries"]) == 50
    assert "50 genes;" in text


def test_many_spots_have_fewer_genes_of_spots_drawn_by_chance():
    tissue = make_tissue(150)
    genes = make_genes(150**2, 50, ("measured", "predicted", "low", "high"))
    text = "\n".join(viewer.as_viewer(tissue, {}, genes))
    data = data_of(text)
    assert 1_700_000 < len(text) < 2_000_000
    assert 10 < len(data["entries"]) < 50
    assert f"{len(data['entries'])} genes; 20,000 of 22,500 spots" in text
    chosen = viewer.choose_spots(22_500)
    assert len({*chosen}) == 20_000
    values, error = decode(data["entries"][3]["maps"][1])
    np.testing.assert_allclose(values, genes["G3"][1].values[chosen], atol=error * 1.0001)


def test_names_cannot_leave_the_data():
    maps = make_genes(144, 1)["G0"]
    text = "\n".join(viewer.as_viewer(make_tissue(), {}, {"</script><b>&": maps}))
    assert text.count("</script>") == 2
    assert data_of(text)["entries"][0]["name"] == "</script><b>&"
    assert "<b>" not in text


@pytest.mark.parametrize("thumbnail", [True, False])
def test_one_spot_is_drawn(thumbnail):
    tissue = make_tissue(1, thumbnail)
    alone = viewer.Tissue(tissue.places, 1.0, tissue.thumbnail)
    data = data_of("\n".join(viewer.as_viewer(alone, {}, make_genes(1))))
    np.testing.assert_allclose(places_of(data), 0.5, atol=1e-4)
    assert data["radius"] == 0.1
    assert (data["image"] is not None) == thumbnail


def score_of(values):
    """The values of the only map of a set of all genes, without a measurement."""
    ((only,),) = viewer.map_sets({"all": range(values.shape[1])}, values, None).values()
    return only.values


def test_a_set_is_the_mean_of_standardised_genes():
    values = np.random.default_rng(1).gamma(2, 1, (50, 4)).astype(np.float32)
    values[:, 2] = 0.3
    expected = zscore(values[:, [0, 1, 3]].astype(float)).mean(1)
    np.testing.assert_allclose(score_of(values), expected, atol=1e-6)
    values[4, 3] = np.nan
    expected = zscore(values[:, :2].astype(float)).mean(1)
    np.testing.assert_allclose(score_of(values), expected, atol=1e-6)
    assert np.isnan(score_of(values[:, 2:3])).all()
    sets = viewer.map_sets({"HEG": [0, 1], "MG": []}, values[:, :2], values[:, 1::-1])
    (maps,) = sets.values()
    assert "r 1.00" in maps[1].caption, "the order of the genes does not matter"


# ----------------------------------------------------------------------------------------- reports
def test_the_report_of_script_20_shows_its_network(report):
    run, text = report
    data = data_of(text)
    folder = next(run.glob("EfficientNet-B0-*"))
    table = anndata.read_h5ad(folder / "predictions.h5ad")
    table = table[table.obs["role"] == "test"]
    groups = pd.read_csv(folder / "genes.csv")
    genes = {entry["name"]: entry["maps"] for entry in data["entries"] if " " not in entry["name"]}
    assert 40 <= len(genes) <= 50
    assert {*genes} <= {*groups["gene"]}
    per_gene = pd.read_csv(folder / "per_gene.csv").set_index("gene")["test_lognorm_r"]
    for name, (measured, predicted) in genes.items():
        truth = np.asarray(table[:, name].layers["target"]).ravel()
        values, error = decode(measured)
        np.testing.assert_allclose(values, truth, atol=error + 1e-6)
        values, error = decode(predicted)
        np.testing.assert_allclose(values, np.asarray(table[:, name].X).ravel(), atol=error + 1e-6)
        expected = f"r {per_gene[name]:.2f}" if per_gene[name] == per_gene[name] else "r is not"
        assert predicted["caption"].startswith(expected)
    assert any(entry["name"].startswith("HEG: mean of") for entry in data["entries"])
    assert data["image"].startswith("data:image/jpeg")


def test_of_several_networks_the_best_in_validation_is_viewed(tmp_path):
    rows = []
    for folder, valid, test in (("a", 0.3, 0.5), ("b", 0.4, 0.1), ("ridge", 0.9, 0.9)):
        (tmp_path / folder).mkdir()
        if folder != "ridge":
            (tmp_path / folder / "weights.safetensors").touch()
        for split, heg in (("valid", valid), ("test", test)):
            row = {"folder": folder, "split": split, "heg": heg, "protocol": "paper"}
            rows.append(row | {"truth": "lognorm"})
            # What Harmony's values say is no headline.
            rows.append(row | {"truth": "harmony", "heg": 1 - heg})
    choose = load_script("27").choose_viewed
    assert choose(tmp_path, rows)["folder"] == "b"
    assert choose(tmp_path, rows[8:]) is None
    assert choose(tmp_path, [row for row in rows if row["split"] == "test"]) is None


def make_slide_file(path):
    """predictions.h5ad as script 26 writes it; the AnnData."""
    random = np.random.default_rng(2)
    places = lay_grid("hexagonal", 10)
    table = anndata.AnnData(random.gamma(2, 1, (100, 5)).astype(np.float32))
    table.var_names = ["A", "B", "C", "D", "E"]
    table.obs["pitch"] = 180.0
    table.obs["distance"] = random.random(100)
    table.obsm["spatial"] = 500 + 180 * places
    table.var["valid_r"] = [0.3, 0.5, 0.4, np.nan, 0.9]
    table.var["valid_low"] = table.var["valid_r"] - 0.1
    table.var["valid_high"] = table.var["valid_r"] + 0.1
    table.var["valid_q"], table.var["valid_r_k7"] = 0.01, 0.66
    table.var["believe"] = [True, True, False, False, True]
    table.var["drawn"] = [False, False, True, False, False]
    table.var["heg"] = [True, True, True, True, False]
    table.var["hvg"] = table.var["mg"] = False
    table.layers["low"], table.layers["high"] = table.X - 1, table.X + 1
    image = np.full((400, 400, 3), 230, np.uint8)
    factors = {"tissue_hires_scalef": 1 / 8, "spot_diameter_fullres": 99.0}
    table.uns["spatial"] = {"S": {"images": {"hires": image}, "scalefactors": factors}}
    table.uns["scale"] = "k7"
    table.write_h5ad(path)
    return table


def test_the_viewer_of_a_new_slide_shows_what_is_there(tmp_path):
    table = make_slide_file(tmp_path / "predictions.h5ad")
    data = data_of("\n".join(viewer.show_slide(tmp_path / "predictions.h5ad")))
    entries = {entry["name"]: entry["maps"] for entry in data["entries"]}
    genes = [name for name in entries if ":" not in name]
    assert genes == ["C", "B", "A"], "drawn, then passing; E is in no group, and D fails"
    maps = {held["kind"]: held for held in entries["B"]}
    assert [*maps] == ["predicted", "mean of 7 spots", "low", "high"]
    assert maps["predicted"]["caption"] == "r 0.50 in validation (0.40 to 0.60), q 0.01"
    assert entries["C"][0]["caption"].endswith("does not pass")
    assert maps["mean of 7 spots"]["caption"] == "r 0.66 in validation"
    near = scales.weigh_neighbours(lay_grid("hexagonal", 10), scales.RADII["k7"]).toarray() > 0
    expected = [table.X[row, 1].mean() for row in near]
    for kind, wanted in (("mean of 7 spots", expected), ("low", table.X[:, 1] - 1)):
        values, error = decode(maps[kind])
        np.testing.assert_allclose(values, wanted, atol=error + 1e-5)
    assert maps["low"]["low"] == maps["high"]["low"] and maps["low"]["high"] == maps["high"]["high"]
    (distance,) = data["shared"]
    values, error = decode(distance)
    np.testing.assert_allclose(values, table.obs["distance"], atol=error * 1.0001)


def test_weights_without_evidence_and_no_gene_have_a_viewer_as_well(tmp_path):
    table = make_slide_file(tmp_path / "first.h5ad")
    table.var = table.var[["valid_r", "drawn", "heg", "hvg", "mg"]]
    table.uns["scale"] = ""
    table.write_h5ad(tmp_path / "predictions.h5ad")
    data = data_of("\n".join(viewer.show_slide(tmp_path / "predictions.h5ad")))
    entries = {entry["name"]: entry["maps"] for entry in data["entries"]}
    assert [name for name in entries if ":" not in name] == ["C", "B", "A"]
    assert [held["kind"] for held in entries["B"]] == ["predicted", "low", "high"]
    table.layers["low"][:] = table.layers["high"][:] = np.nan
    table.write_h5ad(tmp_path / "few.h5ad")
    data = data_of("\n".join(viewer.show_slide(tmp_path / "few.h5ad")))
    (maps,) = [entry["maps"] for entry in data["entries"] if entry["name"] == "B"]
    assert [held["kind"] for held in maps] == ["predicted"], "few spots tell no interval"
    table.var = table.var.assign(drawn=False, heg=False)
    table.write_h5ad(tmp_path / "none.h5ad")
    assert data_of("\n".join(viewer.show_slide(tmp_path / "none.h5ad")))["entries"] == []


# ----------------------------------------------------------------------------------------- browser
READ = """<script>
const wait = setInterval(() => {
  const select = document.querySelector(".viewer select");
  if (!document.querySelector(".viewer figure > canvas")) return;
  clearInterval(wait);
  select.value = "1";
  select.dispatchEvent(new Event("change"));
  const data = JSON.parse(document.querySelector(".viewer script").textContent);
  const at = name => new Uint16Array(
    Uint8Array.from(atob(data[name]), letter => letter.charCodeAt(0)).buffer);
  const x = at("x"), y = at("y"), found = {};
  for (const canvas of document.querySelectorAll(".viewer figure > canvas")) {
    const context = canvas.getContext("2d");
    found[canvas.ariaLabel] = Array.from(x, (value, spot) => Array.from(context.getImageData(
      value / 65535 * canvas.width, y[spot] / 65535 * canvas.height, 1, 1).data.slice(0, 3)));
  }
  const canvas = document.querySelectorAll(".viewer figure > canvas")[1];
  const box = canvas.getBoundingClientRect();
  canvas.dispatchEvent(new PointerEvent("pointermove", { bubbles: true,
    clientX: box.left + x[7] / 65535 * box.width, clientY: box.top + y[7] / 65535 * box.height }));
  document.body.dataset.found = JSON.stringify(found);
}, 20);
</script>"""


def browse(path, *options):
    """What a headless browser prints of a page; the test is skipped without one."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
    command += [f"--user-data-dir={path.parent / 'profile'}", *options, path.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return done.stdout.decode()


def write_page(path, parts):
    page = ['<!doctype html><meta charset="utf-8"><body>', *parts]
    path.write_text("\n".join(page), encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_browser_draws_the_gene_that_is_chosen(tmp_path):
    tissue, genes = make_tissue(6), make_genes(36)
    genes["G1"][0].values[3] = np.nan
    page = write_page(tmp_path / "page.html", [*viewer.as_viewer(tissue, {}, genes), READ])
    printed = browse(page, "--dump-dom")
    found = json.loads(html.unescape(re.search('data-found="([^"]*)"', printed)[1]))
    assert [*found] == ["H&E, ", "measured, r 0.1", "predicted, r 0.1"]
    pink = np.array(found["H&E, "])
    assert (pink[:, 0] > 220).all() and (pink[:, 1] < 252).all()
    for drawn in genes["G1"]:
        pixels = np.array(found[f"{drawn.kind}, {drawn.caption}"])
        shown = np.isfinite(drawn.values)
        place = (drawn.values - np.nanmin(drawn.values)) / np.ptp(drawn.values[shown])
        colours = matplotlib.colormaps["viridis"](place)[:, :3] * 255
        np.testing.assert_allclose(pixels[shown], colours[shown], atol=4)
        grey = pixels[~shown]
        assert (np.ptp(grey, axis=1) < 6).all(), "no colour where there is no value"
    told = re.search("<output>([^<]*)</output>", printed)[1]
    kinds = [part.split(" ") for part in told.split(", ")]
    assert [kind for kind, _ in kinds] == ["measured", "predicted"]
    for (_, number), drawn in zip(kinds, genes["G1"], strict=True):
        assert float(number) == pytest.approx(drawn.values[7], abs=0.03)
    assert f'option value="2">{[*genes][2]}<' in printed


@pytest.mark.slow
def test_a_browser_draws_the_reports_of_20_and_26(report, simulated, tmp_path):
    run, text = report
    printed = browse(write_page(tmp_path / "20.html", [text]), "--dump-dom")
    assert "predicted: r " in printed and printed.count("<figcaption>") == 3
    weights = next(run.glob("*/weights.safetensors"))
    gene = data_of(text)["entries"][-1]["name"]
    assert predict(weights, *slide_of(simulated), "--genes", gene, out=tmp_path / "out") == 0
    assert run_script("27", "--run", tmp_path / "out") == 0
    printed = browse(tmp_path / "out" / "report.html", "--dump-dom")
    for words in ("predicted: ", "measured: ", "distance: to the training slides", "does not pass"):
        assert words in printed
    picture = tmp_path / "page.png"
    browse(tmp_path / "out" / "report.html", f"--screenshot={picture}", "--window-size=900,700")
    with Image.open(picture) as image:
        assert len(image.convert("RGB").getcolors(10**6)) > 50
