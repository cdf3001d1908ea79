"""Slides as other programs read them: GeoJSON for QuPath, uns["spatial"] for scanpy and squidpy, a
CSV with a column a gene.
"""

import json

import numpy as np
import pandas as pd
import polars

from common import ID_COLUMNS, SPOTS_AT_ONCE, parts_of
from study import conformal, files

MOST_MEASUREMENTS = 50  # a spot; QuPath shows them as a list
CORNERS = 32  # of the polygon that stands for a round spot


def write_geojson(path, centres, diameter, table):
    """Write a detection a spot, as QuPath 0.4 and later read them (File > Import objects).

    `centres` (n, 2) are x and y in px of the full-resolution image and `diameter` is in px; `table`
    has a line a spot, whose index names it, and a column a measurement.
    A measurement that is not finite is left out of its spot, since JSON has no NaN. QuPath keeps
    round shapes as polygons in GeoJSON
    (https://qupath.readthedocs.io/en/stable/docs/advanced/exporting_annotations.html); measurements
    are an object {name: number} since 0.4 (qupath-core, QuPathTypeAdapters).
    """
    angles = np.linspace(0, 2 * np.pi, CORNERS + 1)
    circle = diameter / 2 * np.column_stack([np.cos(angles), np.sin(angles)])
    circle[-1] = circle[0]  # A ring ends where it begins (RFC 7946).
    features = []
    for name, centre, values in zip(table.index, centres, table.to_numpy(float), strict=True):
        features.append(describe_spot(str(name), centre + circle, table.columns, values))
    collection = {"type": "FeatureCollection", "features": features}
    with files.whole_file(path) as partial:
        partial.write_text(json.dumps(collection, allow_nan=False), encoding="utf-8")


def name_library(name):
    """A slide's name as a key of uns, in which HDF5 takes a slash for a group."""
    return name.replace("/", "_")


def describe_library(image, step, diameter):
    """What uns["spatial"] holds of a slide for scanpy.pl.spatial and squidpy.pl.spatial_scatter.

    Its `image` (h, w, 3) uint8, of which a px is `step` px of the slide, and the spots' diameter in
    px of the slide.
    """
    scales = {"tissue_hires_scalef": 1 / step, "spot_diameter_fullres": float(diameter)}
    return {"images": {"hires": image}, "scalefactors": scales, "metadata": {}}


def read_library(uns):
    """(name, (image, px of the slide a px of it)) of the only slide that an AnnData's uns tells of,
    as describe_library has it.
    """
    ((name, slide),) = uns["spatial"].items()
    return name, (slide["images"]["hires"], 1 / slide["scalefactors"]["tissue_hires_scalef"])


def describe_spot(name, ring, columns, values):
    """A spot as a GeoJSON feature: its ring (corners, 2) in px and its measurements."""
    measured = {
        str(column): round(float(value), 6)
        for column, value in zip(columns, values, strict=True)
        if np.isfinite(value)
    }
    properties = {"objectType": "detection", "name": name, "measurements": measured}
    geometry = {"type": "Polygon", "coordinates": [ring.round(2).tolist()]}
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def choose_measurements(table, drawn):
    """Table of the measurements of write_geojson, of 26's AnnData: the distance, the genes `drawn`,
    the scores of gene sets, then the genes that pass in validation, or are of HEG and HVG where
    that is not known, best first. Genes have intervals of 80 %.
    """
    groups = [{"distance": table.obs["distance"].to_numpy()}]
    groups += [measure_gene(table, gene) for gene in drawn]
    for name in table.obs.filter(regex="^set_(?!.*_measured$)"):
        groups.append({name: table.obs[name].to_numpy()})
    passes = table.var["believe"] if "believe" in table.var else table.var["heg"] | table.var["hvg"]
    best = table.var["valid_r"][passes].sort_values(ascending=False, kind="stable").index
    others = [gene for gene in best[:MOST_MEASUREMENTS] if gene not in drawn]
    groups += [measure_gene(table, gene) for gene in others]
    columns = {}
    for found in groups:
        if len(columns) + len(found) > MOST_MEASUREMENTS:
            break
        columns |= found
    return pd.DataFrame(columns, table.obs_names)


def measure_gene(table, gene):
    """{column: (n,)} of a gene's prediction and, where it is known, its interval of 80 %."""
    values = table.X[:, table.var_names.get_loc(gene)]
    half = table.var["half_width_80"][gene]
    if not np.isfinite(half):
        return {gene: values}
    low, high = (conformal.find_limit(values, step) for step in (-half, half))
    return {gene: values, f"{gene} low": low, f"{gene} high": high}


def save_expression(path, spots, values, genes):
    """Write a CSV as dataset.csv is: ID_COLUMNS of the spots, then (n, G) values, a column a gene.

    By polars, which takes a second where pandas takes half a minute; in parts, because all spots at
    once would be held twice.
    """
    with files.whole_file(path) as partial, open(partial, "wb") as file:
        for part in parts_of(len(spots), SPOTS_AT_ONCE):
            columns = spots.iloc[part]
            table = polars.DataFrame({name: columns[name].to_list() for name in ID_COLUMNS})
            table = table.hstack(polars.from_numpy(values[part], genes))
            table.write_csv(file, include_header=part.start == 0, batch_size=128)
