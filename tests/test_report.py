"""Script 27: the page of a run, its links and tables, and maps on the H&E."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import anndata
import numpy as np
import pandas as pd
import pytest
from conftest import TINY, expect_refusal, load_script, refused, run_script
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy.ndimage import distance_transform_cdt

from study import drawing, files, recording


class Page(HTMLParser):
    """Tags of a page, images without alternative text, relative links, and addresses elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.mute, self.links, self.outside = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        if tag == "img" and len(attributes.get("alt", "")) < 10:
            self.mute.append(attributes)
        for name in {"src", "href"} & attributes.keys():
            address = attributes[name]
            if tag == "a" and ":" not in address and not address.startswith("/"):
                self.links.append(unquote(address))
            elif not address.startswith("data:"):
                self.outside.append(address)


FACTS = {"title": "run", "label": "", "tables": {}, "figures": [], "folders": []}
FACTS |= {"settings": {}, "machine": {}}


def written(folder, **facts):
    """The text of the page that is written from these facts."""
    load_script("27").write_report(folder, FACTS | facts)
    return (folder / "report.html").read_text()


# -------------------------------------------------------------------------------------- page


def test_a_run_names_its_data_root_by_the_way_from_its_folder(report, simulated):
    name = json.loads((report[0] / "run.json").read_text())["data_root"]
    assert not Path(name).is_absolute()
    assert (report[0] / name).resolve() == simulated.resolve()


def test_the_report_of_a_run_is_one_file_that_needs_nothing(report):
    _, text = report
    page = Page(text)
    assert page.tags.count("img") == 5  # the settings, and maps and scores of two of them
    assert not page.mute and not page.outside
    assert page.tags.count("script") == 2  # the viewer's data and the viewer
    for words in ("SIMULATED", "LEARNING_RATE", "color-scheme"):
        assert words in text
    assert "prefers" not in text


def test_the_report_begins_with_a_picture_of_its_settings(report):
    run, text = report
    picture = text.index("<img")
    assert text.index("</h1>") < picture < text.index("<table>")
    words = text[picture:].split('alt="')[1].split('"')[0]
    rows = pd.read_csv(run / "rows.csv").query("split == 'test' and truth == 'lognorm'")
    assert len(rows) == 2
    for setting, heg in zip(rows["setting"], rows["heg"], strict=True):
        assert f"{setting}  {heg:.3f}" in words
    assert "SIMULATED" in words


def scored_row(setting, slide, heg, interval, split="test"):
    """What the picture of the settings takes of a row."""
    row = {"setting": setting, "slide": slide, "split": split, "protocol": "loso"}
    return row | {"heg": heg, "heg_ci": interval, "heg_ceiling": 0.6}


def test_points_intervals_and_ceilings_stand_at_their_numbers():
    rows = [
        scored_row("a", "1", 0.3, [0.2, 0.4]),
        scored_row("a", "2", 0.1, [0.05, 0.2]),
        scored_row("b", "1", None, None),
        scored_row("c", "2", 0.2, None),
    ]
    figure, words = load_script("27").draw_settings(rows, "")
    (ax,) = figure.axes
    drawn = {"o": [], "|": [], "None": []}
    for line in ax.lines:
        drawn[line.get_marker()] += np.round(line.get_xydata(), 9).tolist()
    points = [point for point in drawn["o"] if not np.isnan(point[0])]
    assert sorted(points) == [[0.1, 0.3], [0.2, 2], [0.3, -0.3]]
    assert sorted(drawn["|"]) == [[0.6, -0.3], [0.6, 0.3], [0.6, 1], [0.6, 2]]
    for end in ([0.2, -0.3], [0.4, -0.3], [0.05, 0.3], [0.2, 0.3]):
        assert end in drawn["None"]
    names = ["a  0.200", "b  -", "c  0.200"]
    assert [text.get_text() for text in ax.get_yticklabels()] == names
    assert words.endswith("; ".join(names))
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["slide 1", "slide 2", "ceiling"]


def test_every_row_of_a_run_is_in_its_report(report):
    run, text = report
    rows = pd.read_csv(run / "rows.csv")
    assert {*rows["split"]} == {"valid", "test"}
    assert {*rows["truth"]} == {"harmony", "lognorm"}
    for metric in ("heg", "heg_pooled", "heg_spearman", "spot_r", "variance_ratio", "mse"):
        for value in rows[metric]:
            assert f"<td>{value:.3f}</td>" in text
    for number in rows["parameters_total"].dropna():
        assert f"<td>{number:,.0f}</td>" in text
    named = "heg_image_ceiling hvg_n mg_n all_n seconds images_per_s peak_memory_mb best_epoch"
    for heading in named.split():
        assert f">{heading}</th>" in text


def headings_of(text, caption):
    """The headings of the table of a page whose caption begins so, and how many lines it has."""
    (table,) = [part for part in text.split("<caption>") if part.startswith(caption)]
    head, body = table.split("</table>")[0].split("</thead>")
    return re.findall(r"<th(?: [^>]*)?>([^<]*)<", head), body.count("<tr>")


def test_no_number_of_a_row_stands_in_two_tables(report):
    run, text = report
    scores, n_first = headings_of(text, "Mean Pearson r")
    others, n_others = headings_of(text, "Of validation spots")
    further, n_further = headings_of(text, "Further metrics")
    assert n_first + n_others == n_further == len(pd.read_csv(run / "rows.csv"))
    shared = {"setting", "split", "truth", "slide", "seed", "fold"}
    assert {*others} <= {*scores}
    assert {*further} & {*scores, "heg", "n_spots", "n_genes_r30"} == shared
    assert "heg_ceiling" in further


def test_the_scales_of_every_row_stand_in_one_table(report):
    run, text = report
    headings, n_lines = headings_of(text, "At which scale")
    rows = pd.read_csv(run / "rows.csv")
    assert n_lines == len(rows)
    assert headings[-2:] == ["component 1", "component 2"]
    for column in ("heg_k7", "hvg_k19", "component_1_r"):
        for value in rows[column].dropna():
            assert f"<td>{value:.3f}</td>" in text
        assert f">{column}</th>" not in text


def test_rows_of_an_earlier_start_are_left_out(report):
    run, _ = report
    script = load_script("27")
    folders = pd.read_csv(run / "rows.csv")["folder"].unique().tolist()
    assert len(folders) == 2
    for chosen in (folders, folders[::-1], folders[:1]):
        rows = script.read_rows_of_run(run, chosen)
        assert list(dict.fromkeys(row["folder"] for row in rows)) == chosen


def test_figures_of_an_earlier_start_are_left_out(tmp_path):
    for name in ("now.png", "before.png"):
        image, about = Image.new("RGB", (8, 8)), PngInfo()
        about.add_text("Description", f"drawn {name}")
        image.save(tmp_path / name, pnginfo=about)
    text = written(tmp_path, figures=["now.png", "removed.png"])
    assert "drawn now.png" in text and "before.png" not in text


def test_a_row_is_read_as_it_was_written(report):
    """An interval is two numbers, a whole number none with a point, and an empty cell None."""
    run, _ = report
    folders = pd.read_csv(run / "rows.csv")["folder"].unique().tolist()
    for row in load_script("27").read_rows_of_run(run, folders):
        written = json.loads((run / row["folder"] / "rows.json").read_text())
        (same,) = [
            line for line in written
            if (line["split"], line["truth"]) == (row["split"], row["truth"])
        ]  # fmt: skip
        found = {name: value for name, value in row.items() if value is not None}
        # What is scored from a row's predictions, whenever they were made, lies beside it.
        found = {name: value for name, value in found.items() if "_score" not in name}
        assert found == {name: value for name, value in same.items() if value is not None}


@pytest.mark.parametrize("name", ["folder", "heg", "setting", "n_spots"])
def test_a_rows_csv_without_a_column_is_named(report, tmp_path, name):
    pd.read_csv(report[0] / "rows.csv").drop(columns=name).to_csv(tmp_path / "rows.csv")
    with refused(f"rows.csv: lacks {name}: run its script again"):
        load_script("27").read_rows_of_run(tmp_path, [])


def test_a_gene_may_be_called_na(tmp_path):
    table = pd.DataFrame({"gene": ["NA", "nan", "ALB"], "r": [0.1, np.nan, 0.2]})
    files.save_csv(tmp_path / "genes.csv", table)
    pd.testing.assert_frame_equal(files.read_csv(tmp_path / "genes.csv", ("gene",), ("r",)), table)


SAVED = {
    "german": {"sep": ";", "decimal": ",", "encoding": "utf-8-sig"},
    "quoted": {"decimal": ",", "encoding": "utf-8-sig"},
    "unicode text": {"sep": "\t", "encoding": "utf-16"},
    "workbook": b"PK\x03\x04\x14\x00\x06\x00" + bytes(200),
    "nothing": b"",
}


def save_as(kind, path):
    """Save a CSV again, as a spreadsheet program may."""
    how = SAVED[kind]
    if isinstance(how, bytes):
        path.write_bytes(how)
    else:
        # Of so few spots there are no intervals, so that influence.csv would hold no decimals.
        table = pd.read_csv(path)
        table = table.fillna(0.5) if path.name == "influence.csv" else table
        table.to_csv(path, index=False, **how)


@pytest.fixture
def copied(report, tmp_path):
    """(copy of script 20's run whose figures are still to be drawn, a setting's folder in it)."""
    run = tmp_path / "run"
    shutil.copytree(report[0], run)
    for path in run.glob("*/*.png"):
        path.unlink()
    facts = json.loads((run / "run.json").read_text())
    return run, run / facts["folders"][0]


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.parametrize("name", ["rows.csv", "genes.csv", "per_gene.csv", "history.csv"])
def test_a_table_that_a_spreadsheet_saved_is_named(copied, name, kind):
    run, folder = copied
    path, fix = run / name, "run its script again"
    if name != "rows.csv":
        path, fix = folder / name, f"remove {folder} and run its script again"
    if (name, kind) == ("genes.csv", "quoted"):
        pytest.skip("it holds no decimals")
    save_as(kind, path)
    expect_refusal([f"error: {path}: ", fix, "spreadsheet"], "27", "--run", run)


@pytest.mark.parametrize("name", ["rows.csv", "genes.csv", "predictions.h5ad"])
def test_a_file_that_is_gone_is_named(copied, name):
    run, folder = copied
    (run / name if name == "rows.csv" else folder / name).unlink()
    expect_refusal([name, "gone", "run its script again"], "27", "--run", run)


@pytest.mark.parametrize("kind", SAVED)
def test_influence_that_a_spreadsheet_saved_are_named(copied, kind):
    run, folder = copied
    path = folder / "influence.csv"
    rows = pd.read_csv(run / "rows.csv").query("split == 'test' and truth == 'lognorm'")
    rows = rows[rows["folder"] == folder.name]
    assert recording.join_influence(rows, run)[0].shape[1] == 4
    save_as(kind, path)
    with refused(f"{path}: ", f"remove {folder} and run"):
        recording.join_influence(rows, run)


def test_a_setting_whose_folder_was_removed_is_computed_again(trained, simulated, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained[0], out)
    options = {"data_root": simulated, "out": out, **TINY}
    folder = next(path.parent for path in out.glob("*/influence.csv"))
    save_as("german", folder / "influence.csv")
    expect_refusal([f"remove {folder} and run its script again"], "20", **options)
    shutil.rmtree(folder)
    assert run_script("20", **options) == 0
    assert {(folder / name).is_file() for name in ("influence.csv", "rows.json")} == {True}


def test_every_row_links_its_genes_and_their_columns_are_explained(report):
    run, text = report
    page = Page(text)
    rows = pd.read_csv(run / "rows.csv")
    assert set(page.links) == {f"{folder}/per_gene.csv" for folder in rows["folder"]}
    assert len(page.links) > len(rows)  # each row of the tables of scores, and headings
    (explanation,) = [part for part in text.split("<p>") if part.startswith("Each per_gene.csv")]
    columns = pd.read_csv(run / page.links[0], nrows=1).columns[1:]
    prefixes = ("valid_lognorm_", "test_lognorm_", "valid_harmony_", "test_harmony_")
    for column in columns:
        (prefix,) = [prefix for prefix in prefixes if column.startswith(prefix)]
        assert column.removeprefix(prefix) in explanation.replace(",", " ").split()
    assert explanation.count(". ") == 0, "one sentence"


def test_a_report_escapes_what_it_shows(tmp_path):
    text = written(
        tmp_path,
        title="<b>&",
        tables={"a<script>": [{"<i>": "<script>"}]},
        settings={"<u>": "<u>"},
        warnings=["<em>"],
    )
    assert not {"script", "i", "b", "u", "em"} & set(Page(text).tags)


def test_warnings_and_what_there_is_to_say_stand_before_the_tables(tmp_path):
    told = {"warnings": ["a.csv: 3 of 9", "b.csv: 4 of 9"], "about": "q < 0.05 passes"}
    text = written(tmp_path, tables={"T": [{"x": 1}]}, **told)
    assert text.index("<h1>") < text.index("a.csv: 3 of 9") < text.index("b.csv: 4 of 9")
    assert text.index("b.csv: 4 of 9") < text.index("<table>")
    assert text.index("<p>q &lt; 0.05 passes</p>") < text.index("<table>")
    assert "Warnings" not in written(tmp_path, warnings=[])
    assert "Warnings" not in written(tmp_path)


@pytest.mark.parametrize("value, shown", [
    (None, "-"), (float("nan"), "-"), (0.12345, "0.123"), (1234.5, "1,234"), (7, "7"),
    (4007548, "4,007,548"), (2024, "2024"), ("C1 & D1", "C1 &amp; D1"), (False, "False"),
])  # fmt: skip
def test_cells(value, shown):
    assert load_script("27").as_cell(value) == shown


def test_columns_keep_their_order_and_empty_ones_go():
    lines = [{"a": None, "b": 1, "c": None}, {"a": 2, "b": None, "c": None, "d": "x"}]
    table = load_script("27").as_table("T", lines)
    assert headings_of(table, "T")[0] == ["a", "b", "d"]
    assert '<tr><td>-</td><td>1</td><td class="text">-</td></tr>' in table


def test_other_tables_of_a_run_are_shown(tmp_path):
    published = [{"method": "BLEEP", "HEG": 0.175}, {"method": "EfficientNet-B0", "HVG": 0.2}]
    text = written(tmp_path, tables={"published": published})
    assert "<caption>published</caption>" in text
    assert '<td class="text">BLEEP</td><td>0.175</td><td>-</td>' in text


@pytest.mark.parametrize("content, word", [
    (None, "cannot be read"), ("{", "cannot be read"), ("[]", "cannot be read"), ("{}", "lacks data_root"),
])  # fmt: skip
def test_a_folder_without_a_finished_run_has_no_report(tmp_path, content, word):
    if content:
        (tmp_path / "run.json").write_text(content)
    expect_refusal(["run.json", word], "27", "--run", tmp_path)
    assert not (tmp_path / "report.html").exists()


# -------------------------------------------------------------------------------------- maps


PINK = np.array([235, 120, 190], np.uint8)  # in no map of colours that is used here


def count_pink(path):
    """Number of pixels of a PNG that are nearly PINK."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    return int((np.abs(pixels - PINK).max(2) < 16).sum())


def make_slide(width, height):
    """AnnData of width x height spots, 100 px apart, as a row's predictions.h5ad holds them."""
    places = np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).reshape(-1, 2)
    random = np.random.default_rng(0)
    table = anndata.AnnData(random.random((len(places), 3), np.float32))
    table.var_names = ["A", "B", "HAL"]
    table.var["r"] = [0.2, 0.6, 0.1]
    table.layers["target"] = random.random((len(places), 3), np.float32)
    table.obsm["spatial"] = 300.0 + 100 * places
    table.obs["pitch"] = 100.0
    return table


@pytest.fixture
def slide():
    return make_slide(6, 5)


GROUPS = pd.DataFrame({"group": ["HEG", "HEG", "MG", "MG"], "gene": ["absent", "A", "HAL", "B"]})


def draw(folder, table, thumbnail):
    path = folder / "maps.png"
    load_script("27").draw_test_slide(path, table, GROUPS, thumbnail, "a title")
    return path


def test_maps_lie_on_the_slide_and_say_what_they_show(slide, tmp_path):
    path = draw(tmp_path, slide, (np.tile(PINK, (60, 70, 1)), 20))
    assert count_pink(path) > 10_000
    with Image.open(path) as image:
        assert image.info["Description"].startswith("a title: measured and predicted")
    assert path.stat().st_size < 300_000
    assert count_pink(draw(tmp_path, slide, None)) == 0, "white where there is no thumbnail"


@pytest.mark.parametrize("height, genes", [(15, ["A", "HAL"]), (5, ["A"])])
def test_no_part_of_the_maps_picture_is_empty(height, genes, tmp_path):
    """No blank square is half as wide as a map, whatever the slide's shape and the genes."""
    table = make_slide(6, height)[:, genes].copy()
    path = draw(tmp_path, table, (np.tile(PINK, (100, 70, 1)), 20))
    with Image.open(path) as image:
        blank = np.asarray(image.convert("L"))[80:] == 255  # beneath the title
    width = blank.shape[1] / (1 + len(genes))
    blank = np.pad(blank, 1)
    assert 2 * distance_transform_cdt(blank, "chessboard").max() < width / 2


def test_a_spot_lies_on_its_own_pixel_of_the_thumbnail(slide):
    thumbnail = np.zeros((60, 70, 3), np.uint8)  # 20 px of the slide a pixel
    x, y = slide.obsm["spatial"][7]
    thumbnail[int(y // 20), int(x // 20)] = 255
    ax = Figure().add_subplot()
    drawing.draw_spots(ax, slide, (thumbnail, 20), slide.X[:, 0])
    shown, (left, right, bottom, top) = ax.images[0].get_array(), ax.images[0].get_extent()
    row, column = np.argwhere(shown > 0)[0]
    assert left + column * (right - left) / 70 <= x < left + (column + 1) * (right - left) / 70
    assert top + row * (bottom - top) / 60 <= y < top + (row + 1) * (bottom - top) / 60
    np.testing.assert_array_equal(ax.collections[0].get_offsets(), slide.obsm["spatial"])


def pixels_of(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())


def test_circles_have_the_size_of_the_spots(slide):
    figure = Figure(figsize=(8, 8), dpi=100)
    ax = figure.add_axes((0, 0, 1, 1))
    drawing.draw_tissue(ax, slide, None)
    before = pixels_of(figure)
    drawing.draw_spots(ax, slide, None, np.zeros(30))
    ax.set_position((0, 0, 1, 1))  # the colour bar took some of it
    figure.axes[1].remove()
    changed = (pixels_of(figure) != before).any(2).sum()
    px_per_px = 800 / 700  # five pitches and a margin of one on either side
    assert changed == pytest.approx(30 * np.pi * (0.275 * 100 * px_per_px) ** 2, rel=0.05)


@pytest.mark.parametrize("low, high", [(0, 3), (3.90218, 3.90224), (-5, -4.999), (2e4, 2e4 + 0.5)])
def test_ticks_of_a_colour_bar_differ(low, high, slide):
    figure = Figure(layout="constrained")
    drawing.draw_spots(figure.subplots(), slide, None, np.linspace(low, high, 30))
    figure.draw_without_rendering()
    ticks = [tick.get_text() for tick in figure.axes[1].get_yticklabels()]
    assert len({*ticks}) == len(ticks) >= 3


def test_where_no_value_is_known_there_is_no_colour_bar(slide):
    figure = Figure()
    drawing.draw_spots(figure.subplots(), slide, None, np.full(30, np.nan))
    assert len(figure.axes) == 1


@pytest.mark.parametrize("r, chosen", [
    ([0.2, 0.6, 0.1], {"B": "best", "A": "median", "HAL": "best marker"}),
    ([0.7, np.nan, 0.1], {"A": "best", "HAL": "median"}),
    ([np.nan] * 3, {"A": "highest expression"}),
])  # fmt: skip
def test_genes_of_the_maps(r, chosen):
    groups = GROUPS[GROUPS["gene"] != "B"]
    assert load_script("27").choose_drawn_genes(pd.Series(r, ["A", "B", "HAL"]), groups) == chosen


def test_a_constant_prediction_is_drawn(slide, tmp_path):
    slide.X = np.ones_like(slide.X)
    slide.var["r"] = np.nan
    assert draw(tmp_path, slide, None).is_file()
    genes = slide.var.assign(ceiling=0.5)
    load_script("27").draw_scores(tmp_path / "scores.png", genes, GROUPS, None, None, "a title")
    assert (tmp_path / "scores.png").is_file()


def test_names_with_dollars_are_drawn_as_they_are(slide, tmp_path):
    script, odd = load_script("27"), "a$x_{$"
    slide.var_names = ["A", odd, "HAL"]
    assert draw(tmp_path, slide, None).is_file()
    groups = pd.DataFrame({"group": [odd], "gene": ["A"]})
    genes = slide.var.assign(ceiling=0.5)
    script.draw_scores(tmp_path / "scores.png", genes, groups, None, None, "a title")
    figure, _ = script.draw_settings([scored_row(odd, "3", 0.3, None)], "")
    figure.savefig(tmp_path / "settings.png")
    with Image.open(tmp_path / "settings.png") as image:
        assert image.width > 500


def test_a_run_is_drawn_on_the_slide_it_was_made_on(report, simulated):
    run, _ = report
    for path in run.glob("*/maps.png"):
        assert path.stat().st_size < 300_000
    folder = next(run.glob("EfficientNet-B0-*"))
    fingerprint = json.loads((folder / "recipe.json").read_text())["data"]
    image, step = load_script("27").read_saved_thumbnail(simulated, 3, fingerprint)
    slides = pd.read_csv(simulated / "slides.csv").set_index("tissue_index")
    with Image.open(simulated / slides["image"][3]) as whole:
        assert np.abs(np.array(whole.size) / step - image.shape[1::-1]).max() <= 1
    with Image.open(folder / "maps.png") as maps:
        pixels = np.asarray(maps.convert("RGB")).astype(int)
    tissue = (pixels[:, :, 0] > 150) & (pixels[:, :, 2] > 150) & (pixels[:, :, 1] < 190)
    assert tissue.sum() > 3000, "H&E is pink and violet, which no map is"


@pytest.mark.parametrize("damage", ["no folder", "other data", "no thumbnail", "older", "broken"])
def test_no_thumbnail_is_taken_for_another(simulated, tmp_path, damage):
    script = load_script("27")
    shutil.copytree(
        simulated / "dataset", tmp_path / "dataset", ignore=shutil.ignore_patterns("*.npy", "*.csv")
    )
    path = tmp_path / "dataset" / "meta.json"
    fingerprint = script.fingerprint_of(path.read_bytes())
    assert script.read_saved_thumbnail(tmp_path, 3, fingerprint) is not None
    if damage == "no folder":
        shutil.rmtree(tmp_path / "dataset")
    elif damage == "other data":
        fingerprint = "0" * 16
    elif damage == "no thumbnail":
        (tmp_path / "dataset" / "thumbnail_3.png").unlink()
    elif damage == "older":
        meta = json.loads(path.read_text())
        del meta["px_per_thumbnail_px"]
        path.write_text(json.dumps(meta))
        fingerprint = script.fingerprint_of(path.read_bytes())
    else:
        (tmp_path / "dataset" / "thumbnail_3.png").write_bytes(b"not a PNG")
    assert script.read_saved_thumbnail(tmp_path, 3, fingerprint) is None
