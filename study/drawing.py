"""Figures: spots of a slide on axes, and files of figures.

A slide is AnnData with obs["pitch"] and obsm["spatial"], in px of the slide.
"""

import textwrap

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import EllipseCollection
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from study import files

PALE = 0.6  # opacity of the H&E beneath the spots
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


def entitle(figure, lines):
    """Set these lines above a figure, each wrapped at its width."""
    letters = int(13 * figure.get_figwidth())  # of a line in this size
    figure.suptitle("\n".join(textwrap.fill(line, letters) for line in lines), size=10)


def draw_tissue(ax, table, thumbnail, pale=False):
    """The H&E around the spots, in px of the slide: `thumbnail` is an RGB image and how many px of
    the slide a px of it is, or None, which leaves the ground white.

    Pale is grey, too, so that in a map all colour is the spots'.
    """
    (left, right), (top, bottom) = view_of(table)
    ax.set_axis_off()
    ax.set_anchor("N")
    if thumbnail is not None:
        image, step = thumbnail
        height, width = image.shape[:2]
        extent = (0, width * step, height * step, 0)
        if pale:
            ax.imshow(image.mean(2), cmap="gray", vmin=0, vmax=255, extent=extent, alpha=PALE)
        else:
            ax.imshow(image, extent=extent)
    ax.set(aspect="equal", xlim=(left, right), ylim=(bottom, top))


def draw_spots(ax, table, thumbnail, values, extend="neither", **colours):
    """Values (n,) of the spots on the pale H&E, in circles of their size, with a colour bar, which
    ends in an arrow where it is to `extend`.
    """
    draw_tissue(ax, table, thumbnail, pale=True)
    diameter = [diameter_of(table)]
    places = {"offsets": table.obsm["spatial"], "offset_transform": ax.transData}
    spots = EllipseCollection(
        diameter, diameter, [0], units="x", array=values, linewidths=0, **places, **colours
    )
    ax.add_collection(spots)
    if np.isfinite(values).any():
        form = f"{{x:.{count_digits(values)}g}}"
        bar = {"shrink": 0.8, "format": form, "ticks": MaxNLocator(4), "extend": extend}
        ax.figure.colorbar(spots, ax=ax, **bar)


def count_digits(values):
    """Significant digits that tell the ticks of a colour bar apart: 4, and more for values that
    hardly differ.
    """
    low, high = np.nanmin(values), np.nanmax(values)
    if low == high:
        return 4
    first, last = np.floor(np.log10([max(-low, high), high - low]))
    return max(4, 3 + int(first - last))


# -------------------------------------------------------------------------------------------- files
def paint(figure):
    """A figure as an RGB image. matplotlib's savefig would draw it twice, once for its layout."""
    keep_text(figure)
    figure.set_dpi(100)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def keep_text(figure):
    """Have the text of a figure stand as it is: it names files and genes, in which a $ is no
    mathematics and a byte may be no UTF-8.
    """
    legends = [ax.get_legend() for ax in figure.axes]
    entries = [entry for legend in legends if legend for entry in legend.get_texts()]
    for text in (*figure.texts, *(ax.title for ax in figure.axes), *entries):
        text.set_parse_math(False)
        text.set_text(files.as_utf8(text.get_text()))


def save_image(path, image, description):
    """Write a PNG whole, with the text that stands for it where it cannot be seen."""
    information = PngInfo()
    information.add_text("Description", files.as_utf8(description))
    with files.whole_file(path) as partial:
        image.save(partial, pnginfo=information, optimize=True)


def save_figure(path, figure, description):
    """Write a figure as a PNG, as save_image does."""
    save_image(path, paint(figure), description)


def save_photographs(path, figure, description):
    """As save_figure, for one that holds photographs: without its white margins and in 192 colours,
    which take a quarter of the bytes.
    """
    picture = paint(figure)
    # Cut here, since bbox_inches="tight" would draw all of it twice.
    picture = picture.crop(ImageOps.invert(picture).getbbox())
    picture = ImageOps.expand(picture, 10, "white")
    # The other methods dull rare colours, as yellow, or the shades of grey. Colours are chosen from
    # a ninth of the pixels, in a twentieth of the time: what is a pixel thin may get one that is
    # only similar.
    ninth = picture.width // 3, picture.height // 3
    sample = picture.resize(ninth, Image.Resampling.NEAREST)
    colours = sample.quantize(192, Image.Quantize.MAXCOVERAGE, kmeans=1)
    save_image(path, picture.quantize(palette=colours, dither=Image.Dither.NONE), description)
