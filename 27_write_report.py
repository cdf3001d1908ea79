"""One page that shows a run: its scores, settings, maps, genes and loss curves.

Question   What came out, on what, and which genes can be believed?
Reads      <RUN>/run.json (title, settings, machine), rows.csv and the folders of its rows (scripts
           20 to 26); the slides' thumbnails in the data root that run.json names (script 19)
Writes     <RUN>/report.html, one file that needs no network, with a viewer of one gene at a time of
           the best network or of the slide of script 26; in a test slide's folders maps.png and
           scores.png, unless they are there
Prints     the report's path
Command    python 27_write_report.py --run runs/20_train_effb0_sota_split8020/SIMULATED_data
Time       6 s of processor time for the two rows of script 20 (Intel Xeon, 2026-11-26)

Every script from 20 on ends with this one.
"""

from study import recipes, shell

if __name__ == "__main__":  # Check the command before the slow imports.
    shell.check_command(__file__, files=("RUN",))


import base64
import html
import io
import json
from pathlib import Path
from urllib.parse import quote

import anndata
import h5py
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from study import drawing, files, printing, recording, viewer
from study.errors import InputError
from study.hashes import fingerprint_of

# ---------------------------------------------------------------------------------------- constants
RUN = ""  # folder that a script from 20 on wrote: it holds run.json
# --------------------------------------------------------------------------------------------------

# What run.json must hold.
NEEDED = {"title", "label", "tables", "figures", "folders", "settings", "machine", "data_root"}
HISTORY = ("epoch", "train_loss", "valid_mse")  # the columns of history.csv that are drawn
ABOUT_MAPS = "as trained on; circles of the spots' size; each map with its own colour scale"
NO_THUMBNAIL = """no H&E:
the data root
holds no thumbnail
of this slide,
or was made anew"""

# Columns of a row that say what it is of.
KEYS = ("setting", "split", "truth", "slide", "seed", "fold")
# What the table of further metrics leaves out: the tables of scores or the settings hold it, it is
# of the measured expression alone, or no number for a reader.
SHOWN_ELSEWHERE = {*KEYS, "n_spots", "n_genes_r30", "n_genes_q05", "steps", "heg", "heg_moran"}
SHOWN_ELSEWHERE |= {"target", "protocol", "recipe", "refit", "neighbourhood", "gene_lists"}
SHOWN_ELSEWHERE |= {"folder", "heg_lacks"}
# What the table of scales shows: (a column of a row, its heading).
SCALES = (
    ("heg", "HEG, spots"),
    ("heg_k7", "HEG, 7 spots"),
    ("heg_k19", "HEG, 19 spots"),
    ("hvg", "HVG, spots"),
    ("hvg_k7", "HVG, 7 spots"),
    ("hvg_k19", "HVG, 19 spots"),
    ("component_1_r", "component 1"),
    ("component_2_r", "component 2"),
)
SHOWN_ELSEWHERE |= {column for column, _ in SCALES}
ABOUT_SCORES = """HEG, HVG and MG are the most highly expressed, the most variable and the marker
genes, all is the whole panel. [95 %] is HEG's interval on other tissue like that of the slide. Of
ceiling is HEG divided by the best r that counting noise allows. r>=.30 counts genes, q<.05 those
that are told from chance, steps are the optimiser's."""
ABOUT_HEST = """HEST r is the mean over the genes of Pearson's r over all test spots of a
fold at once; its mean over the folds is what the benchmark's tables hold. [95 %] is its
interval, in slides the mean over the test slides of r on each. Of ceiling is HEST r
divided by the best r that counting noise allows."""
ABOUT_GENES = """Each per_gene.csv has a line a gene and columns that begin with split and truth
(test_lognorm_: the test slide, against log-normalised counts), in which r and spearman are
Pearson's and Spearman's correlation over the spots of a slide, r_pooled is Pearson's over all
spots, variance and variance_predicted are those of measured and predicted expression, mse is the
mean squared error, mean the mean measured expression, ceiling the r that counting noise leaves to a
prediction free of error, image_ceiling the r of what a simulated slide's image shows, moran Moran's
I of the measured expression, p how often chance gives as high an r to a prediction as smooth, and q
the same after Benjamini and Hochberg, coverage_80 and coverage_95 the share of spots that intervals
of 80 and 95 % by the validation spots hold."""
ABOUT_SCALES = """r of single spots; of the means of prediction and measurement over neighbourhoods
of 7 and 19 spots (9 and 21 where the grid is square, fewer at borders, and of random validation
spots those near); and of the scores of all genes on the first two principal components of the
prediction. A map whose single spots are noise may hold over more of them."""
ABOUT_FURTHER = """The columns are those of rows.csv, which has the same of HVG, MG and all genes;
heg_spearman and so on are means over HEG of what each gene has. heg_score: r of HEG's score, the
mean of its genes' standardised expression. spot_r: over the genes of a spot, mean over spots, after
the training mean of each gene is taken away. variance_ratio: of predicted to measured expression.
r_against_moran and r_against_mean: rank correlation, over genes, of r with Moran's I and with the
mean of a gene's measured expression."""

STYLE = """:root{color-scheme:light dark}
body{font:1rem/1.5 system-ui,sans-serif;max-width:70rem;margin:auto;padding:1rem}
h1,h2{overflow-wrap:anywhere;line-height:1.2}h2{margin-top:2.5rem}
small{font-weight:normal;opacity:.7;font-size:.7em}p{max-width:50rem;font-size:.9rem}
aside{border-left:.3rem solid #d80;padding:.1rem 1rem;overflow-wrap:anywhere}
aside h2{font-size:1.1rem;margin:.5rem 0}
figure{margin:1rem 0;break-inside:avoid}img{max-width:100%;height:auto;background:#fff}
div{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;margin:1rem 0}
caption{text-align:left;font-weight:bold;padding-bottom:.3rem}
td,th{padding:.2rem .6rem;border-bottom:1px solid #8886;text-align:right}
td{font-variant-numeric:tabular-nums;white-space:nowrap}th{vertical-align:bottom}
.text{text-align:left;white-space:normal}
td:first-child,th:first-child{position:sticky;left:0;background:Canvas;white-space:nowrap}
@media print{body{max-width:none;font-size:9pt}}"""


# --------------------------------------------------------------------------------------------- maps
def read_saved_thumbnail(data_root, slide, fingerprint):
    """(RGB image, px of the slide a px of it) of slide number `slide`, as script 19 made it.

    None where there is none, or where the data root is not what it was when the run with this
    fingerprint of its meta.json was made: its slides may be others now.
    """
    folder = Path(data_root, "dataset")
    try:
        content = (folder / "meta.json").read_bytes()
        if fingerprint_of(content) != fingerprint:
            return None
        meta = json.loads(content)
        names = {entry["tissue_index"]: entry["name"] for entry in meta["slides"]}
        step = meta["px_per_thumbnail_px"][names[slide]]
        with Image.open(folder / f"thumbnail_{slide}.png") as image:
            return np.asarray(image.convert("RGB")), step
    except (OSError, ValueError, LookupError, TypeError):
        return None


def choose_drawn_genes(r, groups):
    """{gene: what it stands for} of the genes to draw: the best, a median one and the best marker.

    `r` is a Series over genes. Where none is defined, as of a constant prediction, the gene of the
    highest expression is drawn.
    """
    ranked = r.dropna().sort_values(ascending=False).index
    if ranked.empty:
        highest = groups["gene"][(groups["group"] == "HEG") & groups["gene"].isin(r.index)]
        return dict.fromkeys(highest[:1], "highest expression")
    chosen = {ranked[0]: "best"}
    chosen.setdefault(ranked[len(ranked) // 2], "median")
    markers = ranked[ranked.isin(groups["gene"][groups["group"] == "MG"])]
    for gene in markers[:1]:
        chosen.setdefault(gene, "best marker")
    return chosen


def draw_test_slide(path, table, groups, thumbnail, title):
    """A few genes, a column each: measured above predicted expression, on the slide's H&E. The
    column before them has the H&E itself and predicted against measured expression.

    `table` holds the test slide's spots, with r in var; `thumbnail` is what read_saved_thumbnail
    gives.
    """
    genes = choose_drawn_genes(table.var["r"], groups)
    shape = drawing.shape_of(table)
    columns = 1 + len(genes)
    figure = Figure(figsize=(2.8 * columns, 0.8 + 5 * shape), layout="compressed")
    ((tissue, *measured), (agreement, *predicted)) = figure.subplots(2, columns, squeeze=False)
    drawing.draw_tissue(tissue, table, thumbnail)
    tissue.set_title("H&E", size=9)
    if thumbnail is None:
        tissue.text(0.5, 0.5, NO_THUMBNAIL, ha="center", va="center", transform=tissue.transAxes)
    draw_agreement(agreement, table, genes, shape)
    for (gene, label), above, below in zip(genes.items(), measured, predicted, strict=True):
        r = table.var["r"][gene]
        score = "r not defined" if np.isnan(r) else f"r = {r:.2f}"
        titles = f"{gene} ({label}), measured", f"{gene}, predicted, {score}"
        for ax, values, words in zip((above, below), values_of(table, gene), titles, strict=True):
            drawing.draw_spots(ax, table, thumbnail, values)
            ax.set_title(words, size=9)
    shown = f"measured and predicted expression of {', '.join(genes)}"
    drawing.entitle(figure, [title, shown, ABOUT_MAPS])
    ground = "the H&E" if thumbnail else "white"
    drawing.save_photographs(path, figure, f"{title}: {shown}, on {ground}")


def values_of(table, gene):
    """(measured, predicted) expression of a gene as it was trained on, (n,) each."""
    column = table.var_names.get_loc(gene)
    return table.layers["target"][:, column], table.X[:, column]


def draw_agreement(ax, table, genes, shape):
    """Predicted against measured expression of the genes, a dot a spot: one scale for all."""
    for gene in genes:
        measured, predicted = values_of(table, gene)
        ax.plot(measured, predicted, ".", markersize=3, alpha=0.5, label=gene)
    ax.set(xlabel="measured", ylabel="predicted", box_aspect=shape)
    ax.legend(fontsize=8, markerscale=1.5, handletextpad=0.1, framealpha=0.6)


# ------------------------------------------------------------------------------------------- scores
def draw_settings(rows, label):
    """(figure, what it says) of each setting's r on a line: a point, its interval and its ceiling a
    row. Settings stand in their rows' order, the first on top.
    """
    headline = recipes.headline_of(rows[0]["protocol"])
    table = pd.DataFrame(rows)
    table["r"] = table[headline.column].astype(float)  # None becomes NaN.
    means = table.groupby("setting", sort=False)["r"].mean()
    table["height"] = place_rows(table["setting"])
    rows_a_line = table["setting"].value_counts().max()
    inches = 1.1 + len(means) * max(0.32, 0.1 * rows_a_line)
    figure = Figure(figsize=(9.5, inches), layout="constrained")
    ax = figure.subplots()
    for slide, part in table.groupby("slide", sort=False):
        draw_points(ax, part, headline, f"slide {slide}")
    ax.plot([], [], "|", color="0.4", markersize=9, label="ceiling")
    names = [f"{name}  {as_text(mean)}" for name, mean in means.items()]
    ax.set_yticks(range(len(names)), names, parse_math=False)  # A $ is no mathematics.
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.axvline(0, color="0.6", linewidth=0.8)
    ax.grid(axis="x", color="0.9")
    ax.set_xlabel(f"Pearson r, {headline.name}; its mean stands beside the name")
    lay_legend(ax)
    shown = f"{headline.name} of each setting, its 95 % interval and its ceiling"
    if (table["split"] == "valid").all():
        shown = f"{headline.name} of each setting in validation, and its ceiling"
    figure.suptitle(f"{label}{shown}", size=10)
    return figure, f"{label}{shown}: {'; '.join(names)}"


def place_rows(names):
    """(n,) the height of each row: its name's line, 0, 1, ..., and there from -0.3 to 0.3."""
    group = names.groupby(names, sort=False)
    place, count = group.cumcount(), group.transform("size")
    beside = np.where(count > 1, 0.6 * place / (count - 1).clip(lower=1) - 0.3, 0)
    return group.ngroup() + beside


def draw_points(ax, table, headline, label):
    """The points of some rows, and in the same colour their intervals and ceilings."""
    (points,) = ax.plot(table["r"], table["height"], "o", markersize=5, label=label)
    colour = points.get_color()
    intervals = table.get(f"{headline.column}_ci", pd.Series(dtype=object)).dropna()
    for row, (low, high) in intervals.items():
        ax.plot([low, high], [table["height"][row]] * 2, color=colour, linewidth=1.2)
    ceilings = table[headline.ceiling].astype(float)
    ax.plot(ceilings, table["height"], "|", color=colour, markersize=12)


def draw_scores(path, genes, groups, history, selected_epoch, title):
    """r of the genes beside their ceilings; loss curves, where a network was trained.

    `genes` has the columns r and ceiling; `history` is None where no network was trained.
    """
    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    axes = figure.subplots(1, 1 if history is None else 2, squeeze=False)[0]
    draw_ranks(axes[0], genes.sort_values("r", ascending=False), groups)
    shown = "r of the genes with their ceilings"
    if history is not None:
        draw_losses(axes[1], history, selected_epoch)
        shown += "; losses"
    figure.suptitle(f"{title}\n{shown}", size=10)
    drawing.save_figure(path, figure, f"{title}: {shown}")


def draw_ranks(ax, genes, groups):
    """r of every gene, best first, those of a group in its colour, over their ceilings."""
    rank = np.arange(1, len(genes) + 1)
    ax.plot(rank, genes["ceiling"], ".", color="0.85", markersize=3, label="ceiling")
    ax.plot(rank, genes["r"], color="0.4", linewidth=1, label="r")
    for group, names in groups.groupby("group", sort=False)["gene"]:
        inside = genes.index.isin(names)
        ax.plot(rank[inside], genes["r"][inside], ".", label=group)
    ax.axhline(recording.R_THRESHOLD, color="black", linewidth=0.6, linestyle=":")
    ax.set(xlabel="gene, best first", ylabel="Pearson r")
    lay_legend(ax)


def draw_losses(ax, history, selected_epoch):
    """Loss of training and, if there was any, MSE of validation, with the selected epoch."""
    ax.plot(history["epoch"], history["train_loss"], label="training (augmented, dropout)")
    if history["valid_mse"].notna().any():
        ax.plot(history["epoch"], history["valid_mse"], label="validation")
        ax.axvline(selected_epoch, color="grey", linewidth=0.8, label="selected epoch")
    ax.set(xlabel="epoch", ylabel="loss, MSE over the panel")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    most = 2 * history["train_loss"].max()
    if ax.get_ylim()[1] > most:  # Beside a loss that is far off, all others would lie on one line.
        ax.set_ylim(0, most)
    lay_legend(ax)


def lay_legend(ax):
    """A legend above the axes, where it hides nothing."""
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2, "ncols": 5}
    spaces = {"markerscale": 1.5, "columnspacing": 0.9, "handletextpad": 0.3}
    ax.legend(frameon=False, fontsize=8, **place, **spaces)


def read_test_slide(path):
    """The spots of the first test slide in a predictions.h5ad, with the prediction as X and the
    layer target; what is larger than memory may stay in the file.
    """
    with h5py.File(path) as file:
        obs, obsm, var = (anndata.io.read_elem(file[name]) for name in ("obs", "obsm", "var"))
        test = obs["role"] == "test"
        slide = obs["tissue_index"][test].iloc[0]
        rows = np.flatnonzero(test & (obs["tissue_index"] == slide))
        # They stand side by side, or nearly so; single lines would be read one by one.
        first, last = rows[0], rows[-1]
        predicted, target = (
            file[name][first : last + 1][rows - first] for name in ("X", "layers/target")
        )
    places = {"spatial": obsm["spatial"][rows]}
    return anndata.AnnData(predicted, obs.iloc[rows], var, obsm=places, layers={"target": target})


def read_row(folder, row, data_root):
    """(AnnData, gene groups, thumbnail) of a row's test slide: the spots of read_test_slide, with
    the columns of per_gene.csv of the test slide, against the headline's truth, as var; and what
    read_saved_thumbnail gives.
    """
    table = read_test_slide(folder / "predictions.h5ad")
    prefix = f"test_{recipes.headline_of(row['protocol']).truth}_"
    numbers = f"{prefix}r", f"{prefix}ceiling"
    genes = files.read_csv(folder / "per_gene.csv", ("gene",), numbers).set_index("gene")
    genes = genes.filter(like=prefix).rename(columns=lambda name: name.removeprefix(prefix))
    table.var = genes.reindex(table.var_names)
    groups = files.read_csv(folder / "genes.csv", ("group", "gene"), ("rank",))
    slide = int(table.obs["tissue_index"].iloc[0])
    fingerprint = json.loads((folder / "recipe.json").read_text())["data"]
    return table, groups, read_saved_thumbnail(data_root, slide, fingerprint)


def draw_row(folder, row, data_root, title):
    """maps.png and scores.png of a row's folder, unless they are there."""
    if (folder / "maps.png").is_file() and (folder / "scores.png").is_file():
        return
    table, groups, thumbnail = read_row(folder, row, data_root)
    history = None
    if (folder / "history.csv").is_file():
        history = files.read_csv(folder / "history.csv", numbers=HISTORY)
    selected = row.get("best_epoch")
    draw_scores(folder / "scores.png", table.var, groups, history, selected, title)
    if "," in row["slide"]:  # as of a fold of HEST-Benchmark
        title += f"; slide {table.obs['tissue_index'].iloc[0]} is drawn, r is the mean of all"
    draw_test_slide(folder / "maps.png", table, groups, thumbnail, title)


# --------------------------------------------------------------------------------------------- page
def as_text(value):
    """A value as a table shows it; "-" where there is none."""
    if value is None or value != value:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"
    if isinstance(value, int) and value >= 10_000:
        return f"{value:,}"
    return str(value)


def as_cell(value):
    """What stands in a table's cell; a Path becomes a link to its file."""
    if isinstance(value, Path):
        return f'<a href="{quote(value.as_posix())}">{html.escape(value.name)}</a>'
    return html.escape(as_text(value))


def as_table(caption, lines):
    """A table of dicts, a line each, without the columns that are empty in every line; it scrolls
    where the page is narrow.
    """
    lines = list(lines)
    columns = dict.fromkeys(name for line in lines for name in line)
    columns = [name for name in columns if any(line.get(name) is not None for line in lines)]
    kinds = {name: alignment([line.get(name) for line in lines]) for name in columns}
    head = "".join(f"<th{kinds[name]}>{html.escape(name)}</th>" for name in columns)
    body = []
    for line in lines:
        cells = (f"<td{kinds[name]}>{as_cell(line.get(name))}</td>" for name in columns)
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f"<div><table><caption>{html.escape(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def alignment(values):
    """The class of a column that holds words, which are set on its left; numbers on its right."""
    words = any(isinstance(value, str) and value[:1].isalpha() for value in values)
    return ' class="text"' if words else ""


def as_paragraph(text):
    return f"<p>{html.escape(text)}</p>"


def as_picture(path):
    """The PNG of a file inside the page, with the text that it carries."""
    with Image.open(path) as image:
        text = image.info.get("Description", path.stem)
    return as_image(path.read_bytes(), text)


def as_image(content, text):
    """A PNG inside the page, and the text that stands for it where it cannot be seen."""
    encoded = base64.b64encode(content).decode()
    text = html.escape(text, quote=True)
    return f'<figure><img src="data:image/png;base64,{encoded}" alt="{text}"></figure>'


def read_rows_of_run(run, folders):
    """The lines of a run's rows.csv in these folders, in their order: dicts, None where empty.

    None at all of script 26, whose run has no rows.csv. InputError where it lacks a column, or is
    gone.
    """
    path = run / "rows.csv"
    if not path.is_file() and folders:
        raise InputError(f"{path}: is gone, and run.json names its rows: run its script again")
    if not path.is_file():
        return []
    table = files.read_csv(
        path,
        (*KEYS, "folder", "protocol", "n_spots"),
        ("heg",),
        dtype={"slide": str},
        float_precision="round_trip",
    )
    table = table[table["folder"].isin(folders)].convert_dtypes().astype(object)
    table = table.sort_values("folder", key=lambda names: names.map(folders.index), kind="stable")
    for name in table.filter(regex="_ci$"):
        table[name] = table[name].map(json.loads, na_action="ignore")
    return table.where(table.notna(), None).to_dict("records")


def list_scores(row, sizes, n_genes):
    """{heading: value} of a row's line in the tables of scores: the columns of the screen, for gene
    groups of these sizes in a panel of `n_genes`.
    """
    line = pd.DataFrame([row]).astype({name: float for name in row if row[name] is None})
    interval = row.get(f"{recipes.headline_of(row['protocol']).column}_ci")
    scores = printing.describe_scores(line, interval or [np.nan, np.nan], sizes, n_genes)
    scores = {name: None if text == "-" else text for name, text in scores.items()}
    place = {name: row[name] for name in KEYS} | {"spots": row["n_spots"]}
    return place | scores | {"each gene": Path(row["folder"], "per_gene.csv")}


def list_metrics(row):
    """{heading: value} of a row's line in the table of further metrics: what no other table has,
    of HEG, and of the other gene groups the number of genes alone.
    """
    line = {name: row[name] for name in KEYS}
    for column, value in row.items():
        other_group = column.startswith(("hvg", "mg", "all")) and not column.endswith("_n")
        elsewhere = column in SHOWN_ELSEWHERE or column.startswith("set_")
        if not (other_group or elsewhere or column.endswith("_ci")):
            line[column] = value
    return line


def has_headline_truth(row):
    """Whether a row's r are against the headline's truth."""
    return row["truth"] == recipes.headline_of(row["protocol"]).truth


def is_headline(row):
    """Whether a row is of a test slide, against the headline's truth."""
    return row["split"] == "test" and has_headline_truth(row)


def show_scores(run, rows):
    """Every row once, those first that a reader wants, as the parts of a page."""
    caption = "Mean Pearson r over the spots of a slide, against log-normalised counts"
    about = ABOUT_SCORES
    if recipes.headline_of(rows[0]["protocol"]) is recipes.OF_HEST:
        caption = "Mean Pearson r over all test spots of a fold, against log1p of raw counts"
        about = ABOUT_HEST
    first = [row for row in rows if is_headline(row)]
    others = [row for row in rows if not is_headline(row)]
    tables = [(caption, first), ("Of validation spots, and against other truths", others)]
    sizes = {}
    for folder in dict.fromkeys(row["folder"] for row in rows):
        groups = files.read_csv(run / folder / "genes.csv", ("group", "gene"))
        sizes[folder] = printing.count_genes(groups)
    # The folds of HEST-Benchmark share one panel; of other protocols its size is not shown.
    path = run / rows[0]["folder"] / "per_gene.csv"
    n_genes = len(files.read_csv(path, ("gene",), usecols=["gene"]))
    parts = []
    for caption, part in tables:
        if part:
            lines = [list_scores(row, sizes[row["folder"]], n_genes) for row in part]
            parts.append(as_table(caption, lines))
    return [*parts, as_paragraph(about), as_paragraph(ABOUT_GENES)]


def show_scales(rows):
    """r of every row by scale, as the parts of a page."""
    caption = "At which scale: mean Pearson r over single spots, neighbourhoods and components"
    lines = []
    for row in rows:
        keys = {name: row[name] for name in KEYS}
        lines.append(keys | {heading: row.get(column) for column, heading in SCALES})
    return [as_table(caption, lines), as_paragraph(ABOUT_SCALES)]


def choose_viewed(run, rows):
    """The row of the test slide of the weights that are best in validation; None without any that
    have tested.
    """
    trained = {}
    for row in rows:
        is_valid = row["split"] == "valid" and has_headline_truth(row)
        is_judged = is_valid and row["heg"] is not None
        if is_judged and (run / row["folder"] / "weights.safetensors").is_file():
            trained[row["folder"]] = row
    tested = [row for row in rows if row["split"] == "test" and row["folder"] in trained]
    return max(tested, key=lambda row: trained[row["folder"]]["heg"], default=None)


def show_viewer(run, facts, rows):
    """The gene viewer of a run's best network, or of script 26's slide, as the parts of a page."""
    if (run / "predictions.h5ad").is_file():
        return ["<h2>Gene by gene</h2>", *viewer.show_slide(run / "predictions.h5ad")]
    row = choose_viewed(run, rows)
    if row is None:
        return []
    table, groups, thumbnail = read_row(run / row["folder"], row, run / facts["data_root"])
    name = f"{facts['label']}{row['setting']}, slide {table.obs['tissue_index'].iloc[0]}"
    heading = f"<h2>Gene by gene: {html.escape(name)}, seed {row['seed']}"
    if "," in row["slide"]:  # as of a fold of HEST-Benchmark
        heading += f"; a gene's r is the mean of slides {row['slide']}"
    heading += "</h2>"
    return [heading, *viewer.show_row(table, groups, thumbnail)]


def show_tested(run, facts, rows):
    """Maps and scores of each setting on its test slide, as the parts of a page."""
    tested = {row["folder"]: row for row in rows if row["split"] == "test"}
    several_folds = len({row["fold"] for row in tested.values()}) > 1
    parts = []
    for folder, row in tested.items():
        name = f"{row['setting']}, slide {row['slide']}, seed {row['seed']}"
        if several_folds:
            name += f", fold {row['fold']}"
        draw_row(run / folder, row, run / facts["data_root"], f"{facts['label']}{name}")
        link = as_cell(Path(folder, "per_gene.csv"))
        parts.append(f"<h2>{html.escape(name)} <small>{html.escape(folder)}, {link}</small></h2>")
        parts += [as_picture(run / folder / figure) for figure in ("maps.png", "scores.png")]
    return parts


def write_report(run, facts):
    """report.html of a run's folder from its run.json."""
    title = html.escape(facts["title"])
    rows = read_rows_of_run(run, facts["folders"])  # Others there may be of an earlier start.
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1>",
    ]
    scored = [row for row in rows if is_headline(row)]
    if not scored:  # as of one setting of a search
        scored = [row for row in rows if has_headline_truth(row)]
    if scored:
        figure, text = draw_settings(scored, facts["label"])
        buffer = io.BytesIO()
        drawing.paint(figure).save(buffer, "PNG")
        parts.append(as_image(buffer.getvalue(), text))
    parts += [as_picture(run / name) for name in facts["figures"] if (run / name).is_file()]
    if facts.get("warnings"):
        lines = "".join(f"<li>{html.escape(warning)}</li>" for warning in facts["warnings"])
        parts.append(f"<aside><h2>Warnings</h2><ul>{lines}</ul></aside>")
    if facts.get("about"):
        parts.append(as_paragraph(facts["about"]))
    parts += [as_table(caption, lines) for caption, lines in facts["tables"].items()]
    if rows:
        parts += show_scores(run, rows)
        parts += show_scales(rows)
        parts.append(as_table("Further metrics", map(list_metrics, rows)))
        parts.append(as_paragraph(ABOUT_FURTHER))
    parts += show_viewer(run, facts, rows)
    parts += show_tested(run, facts, rows)
    for caption in ("settings", "machine"):
        lines = [{"name": name, "value": str(value)} for name, value in facts[caption].items()]
        parts.append(as_table(caption.capitalize(), lines))
    with files.whole_file(run / "report.html") as path:
        path.write_text("\n".join([*parts, "</html>\n"]), encoding="utf-8", errors="replace")


def main():
    path = Path(RUN, "run.json")
    try:
        facts = json.loads(path.read_text())
        lacking = NEEDED - facts.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}): run a script from 20 on first"
        ) from None
    if lacking:
        raise InputError(f"{path}: lacks {', '.join(sorted(lacking))}: run its script again")
    files.hold_folder(path.parent)
    try:
        write_report(path.parent, facts)
    except FileNotFoundError as error:  # of which HDF5's does not tell the file but in its text
        raise InputError(
            f"{path.parent}: a file of a row is gone ({error}): remove the row's folder and run "
            "its script again"
        ) from None
    print(f"report: {path.parent / 'report.html'}")


if __name__ == "__main__":
    shell.run_script(globals())
