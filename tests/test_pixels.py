"""The pixels of a slide: alpha, colour spaces, channels in pages, which page it is and which way up,
black that is no tissue, and units of resolution.
"""

import imagecodecs
import numpy as np
import pandas as pd
import pytest
import tifffile
from conftest import run_script
from PIL import Image
from test_patches import HEIGHT, WIDTH, make_root, picture

import common
import slides

TILES = {"tile": (128, 128), "compression": "zlib"}


def pixels_of(path):
    """(h, w, 3) uint8 of an image, put together from its regions."""
    image = slides.open_image(path)
    found = np.zeros((*image.shape, 3), np.uint8)
    for pixels, top, left in image.regions(lambda box: True):
        found[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return found


def refused(path, *words):
    """Whether an image is refused with these words, on opening or when it is read."""
    with pytest.raises(common.InputError) as error:
        pixels_of(path)
    for word in (path.name, *words):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------- alpha
def fading():
    """(h, w, 1) alpha: opaque on the left, ever less in the middle, nothing on the right."""
    alpha = np.clip(np.linspace(3, -1, WIDTH), 0, 1) * 255
    return np.broadcast_to(np.rint(alpha).astype(np.uint8)[None, :, None], (HEIGHT, WIDTH, 1))


def on_white(colours, alpha):
    """Colours (h, w, 1 or 3) seen on white."""
    share = alpha / 255.0
    return np.broadcast_to(np.rint(colours * share + 255 * (1 - share)), (HEIGHT, WIDTH, 3))


def write_alpha(path, colours, alpha, kind="unassalpha", **options):
    pixels = np.dstack([colours, alpha])
    tifffile.imwrite(path, pixels, photometric="rgb", extrasamples=[kind], **options)


def write_planes(path, colours, alpha, **options):
    pixels = np.moveaxis(np.dstack([colours, alpha]), -1, 0)
    options |= {"photometric": "rgb", "planarconfig": "separate", "extrasamples": ["unassalpha"]}
    tifffile.imwrite(path, pixels, **options)


def write_grey_alpha(path, colours, alpha):
    pixels = np.dstack([colours[..., :1], alpha])
    tifffile.imwrite(path, pixels, photometric="minisblack", extrasamples=["unassalpha"], **TILES)


TRANSPARENT = {
    "contiguous.tif": write_alpha,
    "tiles.tif": lambda p, c, a: write_alpha(p, c, a, **TILES),
    "strips.tif": lambda p, c, a: write_alpha(p, c, a, rowsperstrip=37, compression="lzw"),
    "unspecified.tif": lambda p, c, a: write_alpha(p, c, a, "unspecified", **TILES),
    "planes.tif": write_planes,
    "planes-tiles.tif": lambda p, c, a: write_planes(p, c, a, **TILES),
    "slide.png": lambda p, c, a: Image.fromarray(np.dstack([c, a])).save(p),
    "grey.tif": write_grey_alpha,
    "grey.png": lambda p, c, a: Image.fromarray(np.dstack([c[..., :1], a])).save(p),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_what_is_transparent_is_composed_on_white(tmp_path, kind):
    colours = picture() * (fading() > 0)  # black under what is wholly transparent, as exports are
    TRANSPARENT[kind](tmp_path / kind, colours, fading())
    expected = on_white(colours[..., :1] if "grey" in kind else colours, fading())
    found = pixels_of(tmp_path / kind)
    assert np.abs(found - expected).max() <= 1
    assert (found[:, -9:] == 255).all()


def test_colours_that_were_multiplied_by_alpha_are_not_multiplied_again(tmp_path):
    multiplied = np.rint(picture() * (fading() / 255.0)).astype(np.uint8)
    write_alpha(tmp_path / "slide.tif", multiplied, fading(), "assocalpha", **TILES)
    assert np.abs(pixels_of(tmp_path / "slide.tif") - on_white(picture(), fading())).max() <= 1


@pytest.mark.parametrize("mode", ["P", "RGB", "L"])
def test_a_transparent_colour_of_a_png_is_white(tmp_path, mode):
    image = Image.fromarray(picture() // 2).convert(mode)
    clear = image.getpixel((5, 5))
    image.save(tmp_path / "slide.png", transparency=clear)
    expected = np.asarray(image.convert("RGB")).copy()
    expected[np.atleast_3d(np.asarray(image) == clear).all(axis=2)] = 255
    assert np.array_equal(pixels_of(tmp_path / "slide.png"), expected)


def test_patches_and_thumbnail_of_a_transparent_slide(tmp_path):
    make_root(tmp_path, writer=lambda p, i: write_alpha(p, i * (fading() > 0), fading()))
    assert run_script("19", data_root=tmp_path, target="lognorm") == 0
    table = pd.read_csv(tmp_path / "dataset" / "dataset.csv")
    patches = np.load(tmp_path / "dataset" / "patches.npy")
    whole = np.pad(pixels_of(tmp_path / "slide.tif"), ((112, 112), (112, 112), (0, 0)),
                   constant_values=255)  # fmt: skip
    for patch, row in zip(patches, table.itertuples(), strict=True):
        assert np.array_equal(patch, whole[row.pxl_row :, row.pxl_col :][:224, :224])
    with Image.open(tmp_path / "dataset" / "thumbnail_1.png") as thumbnail:
        assert (np.asarray(thumbnail)[:, -2:] == 255).all()


def test_two_grey_channels_are_no_alpha(tmp_path):
    pixels = np.dstack([picture()[..., 0], picture()[..., 1]])
    tifffile.imwrite(tmp_path / "stains.tif", pixels, photometric="minisblack",
                     planarconfig="contig", extrasamples=["unspecified"])  # fmt: skip
    refused(tmp_path / "stains.tif", "2 grey channels")


# ----------------------------------------------------------------------------------- colour spaces
def as_ycbcr(pixels):
    """YCbCr of RGB by the formula of JFIF."""
    red, green, blue = np.moveaxis(pixels.astype(float), -1, 0)
    light = 0.299 * red + 0.587 * green + 0.114 * blue
    parts = [light, 128 + (blue - light) / 1.772, 128 + (red - light) / 1.402]
    return np.clip(np.rint(np.stack(parts, axis=-1)), 0, 255).astype(np.uint8)


def write_jpeg2000(path, components, description, compression, photometric="rgb", gap=None):
    """Tiles of JPEG 2000 of these components as they are; tile number `gap` is left out."""
    padded = np.pad(components, ((0, -HEIGHT % 256), (0, -WIDTH % 256), (0, 0)), mode="edge")
    tiles = []
    for top in range(0, HEIGHT, 256):
        for left in range(0, WIDTH, 256):
            tile = np.ascontiguousarray(padded[top : top + 256, left : left + 256])
            tiles.append(imagecodecs.jpeg2k_encode(tile, codecformat="j2k", mct=False, level=0))
    if gap is not None:
        tiles[gap] = b""
    options = {"shape": components.shape, "dtype": np.uint8, "tile": (256, 256), "metadata": None}
    options |= {"compression": compression, "photometric": photometric}
    tifffile.imwrite(path, iter(tiles), description=description, **options)


APERIO = "Aperio Image Library v10.0.51\n|AppMag = 20|MPP = 0.5000"


@pytest.mark.parametrize("photometric", ["rgb", "ycbcr"])
def test_jpeg_2000_of_older_aperio_scanners_is_of_ycbcr(tmp_path, photometric):
    write_jpeg2000(tmp_path / "s.svs", as_ycbcr(picture()), APERIO, 33003, photometric, gap=5)
    found = pixels_of(tmp_path / "s.svs").astype(int)
    assert (found[256:512, 256:512] == 255).all(), "a tile that was not scanned"
    found[256:512, 256:512] = picture()[256:512, 256:512]
    assert np.abs(found - picture()).max() <= 3


@pytest.mark.parametrize("description, compression", [
    ("<OME/>", 33003),  # raw2ometiff writes this number with RGB
    (None, 33003),
    (APERIO, 33005),  # of Aperio too, and of RGB
    (None, 34712),
])  # fmt: skip
def test_other_jpeg_2000_is_of_rgb(tmp_path, description, compression):
    write_jpeg2000(tmp_path / "s.tif", picture(), description, compression)
    assert np.array_equal(pixels_of(tmp_path / "s.tif"), picture())


def test_ycbcr_of_other_programs_is_refused(tmp_path):
    write_jpeg2000(tmp_path / "s.tif", as_ycbcr(picture()), None, 34712, "ycbcr")
    refused(tmp_path / "s.tif", "YCBCR", "8-bit RGB")
    tifffile.imwrite(tmp_path / "t.tif", as_ycbcr(picture()), photometric="ycbcr", **TILES)
    refused(tmp_path / "t.tif", "YCBCR", "8-bit RGB")
