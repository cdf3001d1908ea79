"""A gene viewer inside a report: maps on the H&E, one gene or set at a time, without network or
library.

Its data are JSON: `image` (a JPEG as a data URI, or null), `ratio` (height over width of the map),
`x`, `y` (base64 of uint16, in 65535ths of the map), `radius` (of a spot, in widths), `colours` (256
times RGB), `entries` of a `name` and `maps`, and the maps that all entries `share`. A map has a
`kind`, a `caption` and `codes` (base64): 0 to 254 stand for values from `low` to `high`, 255 for
none.
"""

import base64
import html
import io
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import anndata
import h5py
import matplotlib
import numpy as np
from PIL import Image

import common
from study import exports, gene_sets, scales

MISSING = 255  # the code of a value that is not there
N_GENES = 50  # at most
N_SPOTS = 20_000  # at most; of more, so many are drawn by chance
N_BYTES = 2_000_000  # of the viewer, at most: of many spots it has fewer genes
SIDE = 800  # px of the H&E, at most
DOT = 0.8  # of the pitch: the diameter of a spot, wider than it is, so that its colour shows
MARGIN = 112  # px of the slide around the spots, at least
GROUPS = ("heg", "hvg", "mg")  # columns of script 26's var
STYLE = """.viewer .panels{display:flex;flex-wrap:wrap;gap:1rem}
.viewer figure{flex:1 1 17rem;max-width:22rem;margin:0}
.viewer figure>canvas{width:100%;height:auto;display:block}
.viewer figcaption{font-size:.85rem}.viewer p{display:flex;gap:.5rem;margin:.2rem 0}
.viewer p canvas{flex:1;height:.8rem;min-width:3rem}.viewer output{display:block;min-height:1.5em}
.viewer select{font:inherit}"""


@dataclass(frozen=True)
class Tissue:
    """Where the spots of a slide lie, and what it looks like."""

    places: np.ndarray  # (n, 2) x and y, px of the slide
    pitch: float  # px
    thumbnail: tuple | None  # (RGB image (h, w, 3) uint8, px of the slide a px of it)


@dataclass(frozen=True)
class Map:
    """A number a spot."""

    kind: str  # "predicted", "measured", ...
    values: np.ndarray  # (n,), NaN where there is none
    caption: str  # what its r is
    limits: tuple | None = None  # (lowest, highest) of its colours; None = of its values


# --------------------------------------------------------------------------------------------- data
def encode(array):
    """The bytes of an array as base64."""
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def find_limits(values):
    """(lowest, highest) of the finite values; zeros where there are none."""
    finite = values[np.isfinite(values)]
    return (finite.min(), finite.max()) if len(finite) else (0.0, 0.0)


def encode_map(drawn, chosen):
    """A Map as the viewer's data hold it, of the spots `chosen`."""
    values = drawn.values[chosen].astype(np.float64)
    finite = np.isfinite(values)
    low, high = find_limits(values) if drawn.limits is None else drawn.limits
    step = (high - low) / (MISSING - 1) or 1.0
    codes = np.full(len(values), MISSING, np.uint8)
    codes[finite] = np.rint((values[finite] - low) / step)
    about = {"kind": drawn.kind, "caption": drawn.caption}
    return about | {"low": float(low), "high": float(high), "codes": encode(codes)}


def choose_spots(n):
    """Numbers of the spots that are drawn, in order."""
    if n <= N_SPOTS:
        return np.arange(n)
    return np.sort(np.random.default_rng(0).choice(n, N_SPOTS, replace=False))


def find_view(tissue):
    """((left, top), (width, height)) of the part of the slide that is drawn, px."""
    margin = max(tissue.pitch, MARGIN)
    low = tissue.places.min(0) - margin
    return low, tissue.places.max(0) + margin - low


def encode_tissue(tissue):
    """The H&E of find_view as a data URI of a JPEG, white beyond the slide; None without one."""
    if tissue.thumbnail is None:
        return None
    pixels, step = tissue.thumbnail
    (left, top), (width, height) = find_view(tissue)
    image = Image.fromarray(pixels)
    box = [round(edge / step) for edge in (left, top, left + width, top + height)]
    box[2:] = max(box[2], box[0] + 1), max(box[3], box[1] + 1)
    view = Image.new("RGB", (box[2] - box[0], box[3] - box[1]), "white")
    view.paste(image, (-box[0], -box[1]))
    view.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    view.save(buffer, "JPEG", quality=75)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def encode_slide(tissue, chosen):
    """What the viewer's data hold of a slide, beside its maps."""
    low, size = find_view(tissue)
    x, y = np.rint((tissue.places[chosen] - low) / size * 65535).astype("<u2").T
    radius = max(DOT * tissue.pitch / 2 / size[0], 0.002)
    if len(tissue.places) == 1:
        radius = 0.1  # It has no pitch.
    colours = matplotlib.colormaps["viridis"](np.arange(256), bytes=True)[:, :3]
    about = {"image": encode_tissue(tissue), "ratio": size[1] / size[0], "radius": radius}
    return about | {"x": encode(x), "y": encode(y), "colours": encode(colours)}


# --------------------------------------------------------------------------------------------- page
def as_viewer(tissue, sets, genes, shared=()):
    """The parts of a page that show `sets` and `genes`, {name: [Map]}, and the Maps `shared`.

    Genes are left out at the end where it would have more than N_BYTES; the page says so.
    """
    chosen = choose_spots(len(tissue.places))
    data = encode_slide(tissue, chosen)
    data["shared"] = [encode_map(drawn, chosen) for drawn in shared]
    data["entries"] = []
    left = N_BYTES - len(json.dumps(data)) - 20_000  # for what stands around the data
    options = {"genes": [], "sets": []}
    for heading, entries in (("sets", sets), ("genes", genes)):
        for name, maps in entries.items():
            entry = {"name": name, "maps": [encode_map(drawn, chosen) for drawn in maps]}
            left -= len(json.dumps(entry)) + 200
            if left < 0:
                break
            number, label = len(data["entries"]), html.escape(name)
            options[heading].append(f'<option value="{number}">{label}</option>')
            data["entries"].append(entry)
    groups = [
        f'<optgroup label="{heading}">{"".join(lines)}</optgroup>'
        for heading, lines in options.items()
        if lines
    ]
    note = f"{len(options['genes'])} genes"
    if len(chosen) < len(tissue.places):
        note += f"; {len(chosen):,} of {len(tissue.places):,} spots"
    content = json.dumps(data).replace("<", "\\u003c")
    script = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")
    return [
        f"<style>{STYLE}</style>",
        f'<div class="viewer"><label>Gene or set: <select>{"".join(groups)}</select></label> '
        f"<small>{note}; each map has its own scale; point at a spot for its numbers</small>"
        f'<output></output><div class="panels"></div>'
        "<noscript><p>This viewer needs JavaScript.</p></noscript>"
        f'<script type="application/json">{content}</script></div>',
        f"<script>{script}</script>",
    ]


# ------------------------------------------------------------------------------------------ slides
def describe_r(r, where=""):
    """r as a caption has it."""
    return "r is not defined" if not np.isfinite(r) else f"r {r:.2f}{where}"


def map_sets(groups, predicted, measured):
    """{"HEG: mean of 50 genes, standardised": [Map, ...], ...} of groups {name: numbers of genes};
    `predicted` and `measured` (n, G), or None.
    """
    groups = {name: numbers for name, numbers in groups.items() if len(numbers)}
    members = np.zeros((predicted.shape[1], len(groups)), bool)
    for column, numbers in enumerate(groups.values()):
        members[numbers, column] = True
    one_slide = np.zeros(len(predicted))
    # Of a slide with counts, too, a prediction has the score that it has without.
    scores, _ = gene_sets.find_scores(predicted, predicted, one_slide, members)
    if measured is None:
        maps = [[Map("predicted", score, "")] for score in scores.T]
    else:
        paired = gene_sets.find_scores(predicted, measured, one_slide, members)
        r = common.pearson_per_gene(*paired)
        maps = [
            [Map("measured", true, ""), Map("predicted", score, describe_r(value))]
            for true, score, value in zip(paired[1].T, scores.T, r, strict=True)
        ]
    sizes = {name: len(numbers) for name, numbers in groups.items()}
    titles = [f"{name}: mean of {size} genes, standardised" for name, size in sizes.items()]
    return dict(zip(titles, maps, strict=True))


def show_row(table, groups, thumbnail):
    """as_viewer of the test slide of a row: AnnData of its spots with the prediction as X, the
    layer target, var r and, perhaps, q and ceiling; `groups` has the columns group, gene and rank.
    """
    ranked = groups[groups["gene"].isin(table.var_names)].sort_values("rank", kind="stable")
    genes = {}
    for gene in ranked["gene"].unique()[:N_GENES]:
        column = table.var_names.get_loc(gene)
        facts = table.var.iloc[column]
        caption = describe_r(facts["r"])
        for name in ("q", "ceiling"):
            if facts.get(name, 0) > 0:
                caption += f", {name} {facts[name]:.2g}"
        measured = Map("measured", table.layers["target"][:, column], "")
        genes[gene] = [measured, Map("predicted", table.X[:, column], caption)]
    members = {
        name: table.var_names.get_indexer(part["gene"]) for name, part in ranked.groupby("group")
    }
    sets = map_sets(members, table.X, table.layers["target"])
    pitch = float(table.obs["pitch"].iloc[0])
    return as_viewer(Tissue(table.obsm["spatial"], pitch, thumbnail), sets, genes)


def read_columns(dataset, columns):
    """(n, len(columns)) of a (n, G) dataset in a file, of which it never holds more than a part."""
    parts = [dataset[first : first + 1024][:, columns] for first in range(0, len(dataset), 1024)]
    return np.concatenate(parts)


def choose_shown(var):
    """Names of the genes of script 26 that are shown: those that it has drawn, then the others of
    HEG, HVG and MG that pass in validation, best first.
    """
    members = var[[name for name in GROUPS if name in var]].any(axis=1)
    passing = var["believe"] if "believe" in var else var["valid_r"].notna()
    shown = var[var["drawn"] | (members & passing)]
    return shown.sort_values(["drawn", "valid_r"], ascending=False).index[:N_GENES].tolist()


def caption_validation(facts):
    """What validation says of a gene, a line of script 26's var, as a caption has it."""
    caption = describe_r(facts["valid_r"], " in validation")
    if facts.get("valid_high", np.nan) > facts.get("valid_low", np.nan):
        interval = f"{facts['valid_low']:.2f} to {facts['valid_high']:.2f}"
        caption += f" ({interval}), q {facts['valid_q']:.2g}"
    if not facts.get("believe", True):
        caption += ", does not pass"
    return caption


def map_slide_gene(facts, predicted, layers, means):
    """[Map] of a gene of script 26: `facts` is its line of var, `predicted` (n,), `layers` {"low",
    "high" and, of a slide with counts, "measured": (n,)}, and `means` {scale: (n,)}.
    """
    maps = [Map("predicted", predicted, caption_validation(facts))]
    for scale, values in means.items():
        caption = describe_r(facts[f"valid_r_{scale}"], " in validation")
        maps.append(Map(f"mean of {scales.NAMES[scale]}", values, caption))
    if "measured" in layers:
        caption = describe_r(facts["r"], " on this slide")
        maps.insert(0, Map("measured", layers["measured"], caption))
    if np.isfinite(layers["low"]).any():  # Few validation spots tell no interval.
        limits = find_limits(np.concatenate([layers["low"], layers["high"]]))
        caption = "end of the 80 % interval, both in one scale"
        maps += [Map(name, layers[name], caption, limits) for name in ("low", "high")]
    return maps


def show_slide(path):
    """as_viewer of predictions.h5ad of script 26."""
    with h5py.File(path) as file:
        obs, var, uns = (anndata.io.read_elem(file[name]) for name in ("obs", "var", "uns"))
        places = file["obsm/spatial"][:]
        genes = choose_shown(var)
        members = {name: var.index[var[name]] for name in GROUPS if name in var}
        needed = var.index[var.index.isin([*genes, *itertools.chain(*members.values())])]
        columns = var.index.get_indexer(needed)
        predicted = read_columns(file["X"], columns)
        names = [name for name in ("measured", "low", "high") if name in file["layers"]]
        layers = {name: read_columns(file["layers"][name], columns) for name in names}
    _, thumbnail = exports.read_library(uns)
    tissue = Tissue(places, float(obs["pitch"].iloc[0]), thumbnail)
    means, scale = {}, uns["scale"]
    if scale:
        means[scale] = scales.average_neighbours(predicted, places / tissue.pitch, scale)
    shown = {}
    for gene in genes:
        column = needed.get_loc(gene)
        of_gene = {name: values[:, column] for name, values in layers.items()}
        averaged = {name: values[:, column] for name, values in means.items()}
        shown[gene] = map_slide_gene(var.loc[gene], predicted[:, column], of_gene, averaged)
    members = {name.upper(): needed.get_indexer(group) for name, group in members.items()}
    sets = map_sets(members, predicted, layers.get("measured"))
    caption = "to the training slides; 1: theirs to each other"
    distance = Map("distance", obs["distance"].to_numpy(), caption)
    return as_viewer(tissue, sets, shown, [distance])
