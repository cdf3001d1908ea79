"""One page that shows a run: its scores, settings, maps, genes and loss curves. Every script from 20 on ends with it.

Question   What came out, on what, and which genes can be believed?
Reads      <RUN>/run.json and the folders of its rows (scripts 20 to 26)
Writes     <RUN>/report.html, one file without network or script; maps.png and scores.png in a test slide's folders
Prints     the report's path
Command    python 27_write_report.py --run runs/20_train_effb0_sota_split8020/SIMULATED_data
Time       4 s for the two rows of script 20 (two cores of an AMD EPYC, 2026-11-24)
"""

import base64
import html
import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

import common
import runner

# ---------------------------------------------------------------------------------------------- constants
RUN = ""  # folder that a script from 20 on wrote: it holds run.json
# --------------------------------------------------------------------------------------------------------

# Columns of the table of scores: name in the rows, name on the page.
SCORES = {name: name for name in ("setting", "split", "truth")} | {group.lower(): group for group in common.GROUPS}
SCORES |= {
    "all": "all",
    "HEG 95 %": "HEG 95 %",
    "heg_ceiling": "HEG ceiling",
    "share": "share",
    "n_genes_r30": "genes with r >= 0.30",
}
SCORES |= {name: name for name in ("slide", "seed", "fold")} | {"n_spots": "spots"}

STYLE = """:root{color-scheme:light dark}body{font:1rem/1.5 system-ui,sans-serif;max-width:70rem;margin:auto;
padding:1rem}h1,h2{overflow-wrap:anywhere;line-height:1.2}small{font-weight:normal;opacity:.7;font-size:.7em}
figure{margin:1rem 0;break-inside:avoid}img{max-width:100%;height:auto;background:#fff}div{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.85rem;margin:1rem 0}
caption{text-align:left;font-weight:bold}td,th{padding:.2rem .6rem;border-bottom:1px solid #8886;text-align:right}
td:first-child,th:first-child{text-align:left;white-space:nowrap}@media print{body{max-width:none;font-size:9pt}}"""


# ---------------------------------------------------------------------------------------------- figures
def draw_maps(path, table, groups, title):
    """Measured above predicted expression on the test slide: the best gene, a median one and the best marker."""
    ranked = table.var["test_lognorm_r"].dropna().sort_values(ascending=False)
    markers = ranked.index[ranked.index.isin(groups["gene"][groups["group"] == "MG"])]
    chosen = {"best": ranked.index[:1], "median": ranked.index[len(ranked) // 2 :][:1], "best marker": markers[:1]}
    x, y = table.obsm["spatial"].T
    pitch = table.obs["pitch"].iloc[0]
    size = (0.8 * pitch / (max(np.ptp(x), np.ptp(y)) + pitch) * 2.5 * 72) ** 2  # pt^2 on axes of about 2.5 inches
    figure = Figure(figsize=(9.5, 6.2), layout="constrained")
    for pair, (label, genes) in zip(figure.subplots(2, 3).T, chosen.items(), strict=True):
        for ax in pair:
            ax.set(aspect="equal")
            ax.set_axis_off()
        for gene in genes:  # one, or none where no r is defined
            at = table.var_names.get_loc(gene)
            pair[0].set_title(f"{gene} ({label}), measured", size=9)
            pair[1].set_title(f"{gene}, predicted, r = {ranked[gene]:.2f}", size=9)
            for ax, values in zip(pair, (table.layers["target"], table.X), strict=True):
                shown = ax.scatter(x, -y, c=values[:, at], s=size, linewidths=0)
                figure.colorbar(shown, ax=ax, shrink=0.7, format="{x:.3g}")
    names = ", ".join(gene for genes in chosen.values() for gene in genes)
    figure.suptitle(f"{title}: measured and predicted expression (as trained on) of {names}", size=10)
    common.save_figure(path, figure, figure.get_suptitle())


def draw_scores(path, genes, groups, history, title):
    """r of the genes, best first, with their counting-noise ceilings; r against Moran's I and against mean expression,
    with rank correlations; loss curves. `genes` holds the test_lognorm_ columns of per_gene.csv without that prefix;
    `history` is None where no network was trained.
    """
    figure = Figure(figsize=(9.5, 6.2), layout="constrained")
    ((first, losses), others) = figure.subplots(2, 2)
    genes = genes.dropna(subset="r").sort_values("r", ascending=False)
    number = np.arange(1, len(genes) + 1)
    first.plot(number, genes["ceiling"], ".", color="0.85", markersize=3, zorder=0, label="ceiling")
    first.plot(number, genes["r"], color="0.4", linewidth=1)
    for group, names in groups.groupby("group", sort=False)["gene"]:
        inside = genes.index.isin(names)
        first.plot(number[inside], genes["r"][inside], ".", label=group)
    first.axhline(common.R_THRESHOLD, color="black", linewidth=0.6, linestyle=":")
    first.set(xlabel="gene, best first", ylabel="Pearson r")
    first.legend(frameon=False)
    for ax, fact, label in zip(others, ("moran", "mean"), ("Moran's I", "mean expression"), strict=True):
        ax.plot(genes[fact], genes["r"], ".", markersize=3, alpha=0.5)
        order = genes[["r", fact]].corr("spearman").iloc[0, 1]
        ax.set(xlabel=f"{label} on the measured slide", ylabel="Pearson r")
        ax.set_title(f"rank correlation {order:.2f}", size=9)
    losses.set_axis_off()
    if history is not None:
        losses.set_axis_on()
        losses.plot(history["epoch"], history["train_mse"], label="training (augmented, dropout)")
        losses.set(xlabel="epoch", ylabel="MSE over the panel")
        if history["valid_mse"].notna().any():
            losses.plot(history["epoch"], history["valid_mse"], label="validation")
            losses.axvline(history["epoch"][history["valid_mse"].idxmin()], color="grey", linewidth=0.8, label="kept")
        losses.legend(frameon=False)
    shown = "r of the genes with their ceilings, against Moran's I and mean expression"
    figure.suptitle(f"{title}: {shown}" + "; losses" * (history is not None), size=10)
    common.save_figure(path, figure, figure.get_suptitle())


def draw_row(folder, title):
    """maps.png and scores.png of a row's folder, unless they are there."""
    if all((folder / name).is_file() for name in ("maps.png", "scores.png")):
        return
    table = anndata.read_h5ad(folder / "predictions.h5ad")
    table, groups = table[table.obs["role"] == "test"], pd.read_csv(folder / "genes.csv")
    genes = table.var.filter(like="test_lognorm_").rename(columns=lambda name: name.removeprefix("test_lognorm_"))
    history = pd.read_csv(folder / "history.csv") if (folder / "history.csv").is_file() else None
    draw_scores(folder / "scores.png", genes, groups, history, title)
    draw_maps(folder / "maps.png", table, groups, title)


# ---------------------------------------------------------------------------------------------- page
def as_html(caption, table):
    """A table with its caption; it scrolls by itself where the page is narrow."""
    text = table.mask(table.isna()).to_html(
        index=False, border=0, na_rep="-", float_format="{:.3f}".format, justify="right"
    )
    return "<div>" + text.replace(">", f"><caption>{html.escape(caption)}</caption>", 1) + "</div>"


def as_image(path):
    """A PNG inside the page, with the text that it carries."""
    with Image.open(path) as image:
        alt = html.escape(image.info.get("Description", path.stem), quote=True)
    content = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img src="data:image/png;base64,{content}" alt="{alt}"></figure>'


def write_report(run, facts):
    """report.html of a run's folder from its run.json."""
    rows, title = pd.DataFrame(facts["rows"]), html.escape(facts["title"])
    parts = ['<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">']
    parts += [f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1>"]
    if "setting" in rows:
        rows["HEG 95 %"] = ["[{:.2f}, {:.2f}]".format(*ci) if isinstance(ci, list) else "-" for ci in rows["heg_ci"]]
        rows["share"] = rows["heg"].astype(float) / rows["heg_ceiling"].astype(float)
        parts.append(as_html("Mean Pearson r", rows[[*SCORES]].rename(columns=SCORES)))
    parts += [as_image(path) for path in sorted(run.glob("[!.]*.png"))]
    parts += [as_html(caption, pd.DataFrame(table)) for caption, table in facts["tables"].items()]
    tested = rows[rows["split"] == "test"].drop_duplicates("folder") if "setting" in rows else rows[:0]
    for row in tested.to_dict("records"):
        name = f"{row['setting']}, slide {row['slide']}, seed {row['seed']}"
        draw_row(run / row["folder"], f"{facts['label']}{name}")
        parts.append(f"<h2>{html.escape(name)} <small>{html.escape(row['folder'])}</small></h2>")
        parts += [as_image(run / row["folder"] / figure) for figure in ("maps.png", "scores.png")]
    for caption in ("settings", "machine"):
        table = pd.Series(facts[caption], dtype=str).rename_axis("name").reset_index(name="value")
        parts.append(as_html(caption.capitalize(), table))
    with common.whole_file(run / "report.html") as path:
        path.write_text("\n".join([*parts, "</html>\n"]), encoding="utf-8")


def main():
    path = Path(RUN, "run.json")
    try:
        facts = json.loads(path.read_text())
        lacking = {"title", "label", "tables", "rows", "settings", "machine"} - facts.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise common.InputError(f"{path}: cannot be read ({error}): run a script from 20 on first") from None
    common.require(not lacking, f"{path}: lacks {', '.join(sorted(lacking))}: run its script again")
    runner.hold_folder(path.parent)
    write_report(path.parent, facts)
    print(f"report: {path.parent / 'report.html'}")


if __name__ == "__main__":
    runner.run_script(globals())
