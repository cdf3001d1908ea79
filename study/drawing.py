"""Spots of a slide on axes: AnnData with obs["pitch"] and obsm["spatial"], in px of the slide."""

from matplotlib.collections import EllipseCollection

SPOT = 0.55  # of the pitch: a spot's diameter (Visium 55 of 100 um, ST 100 of 200 um)


def diameter_of(table):
    """A spot's diameter, in px of the slide."""
    return SPOT * table.obs["pitch"].iloc[0]


def view_of(table):
    """((left, right), (top, bottom)) of the part of the slide that holds the spots, in px."""
    margin = table.obs["pitch"].iloc[0]
    low = table.obsm["spatial"].min(0) - margin
    high = table.obsm["spatial"].max(0) + margin
    return tuple(zip(low, high, strict=True))


def shape_of(table):
    """Height of a map over its width, at most 1.6 and at least 0.4."""
    (left, right), (top, bottom) = view_of(table)
    return min(1.6, max(0.4, (bottom - top) / (right - left)))


def draw_circles(ax, table, values, **colours):
    """Values (n,) of the spots, in circles of their size; returns them for a colour bar."""
    diameter = [diameter_of(table)]
    places = {"offsets": table.obsm["spatial"], "offset_transform": ax.transData}
    spots = EllipseCollection(
        diameter, diameter, [0], units="x", array=values, linewidths=0, **places, **colours
    )
    ax.add_collection(spots)
    return spots
