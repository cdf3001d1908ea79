"""The pixels of a slide: alpha, colour spaces, channels in pages, which page it is and which way up,
black that is no tissue, and units of resolution.
"""

import imagecodecs
import numpy as np
import pandas as pd
import pytest
import tifffile
from conftest import refused, run_script
from PIL import Image
from test_patches import HEIGHT, WIDTH, make_root, picture

from slides import imaging
from slides.manifest import Slide
from slides.positions import place_spots

TILES = {"tile": (128, 128), "compression": "zlib"}


def pixels_of(path):
    """(h, w, 3) uint8 of an image, put together from its regions."""
    image = imaging.open_image(path)
    found = np.zeros((*image.shape, 3), np.uint8)
    for pixels, top, left in image.regions(lambda box: True):
        found[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return found


def refuse(path, *words):
    """An image is refused with these words, on opening or when it is read."""
    with refused(path.name, *words):
        pixels_of(path)


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


def test_a_fourth_channel_that_is_no_alpha_is_left_out(tmp_path):
    for fourth in (np.zeros((HEIGHT, WIDTH, 1), np.uint8), picture()[..., :1]):
        write_alpha(tmp_path / "slide.tif", picture(), fourth, "unspecified", **TILES)
        assert np.array_equal(pixels_of(tmp_path / "slide.tif"), picture())


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
    refuse(tmp_path / "stains.tif", "2 grey channels")


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
    refuse(tmp_path / "s.tif", "YCBCR", "8-bit RGB")
    tifffile.imwrite(tmp_path / "t.tif", as_ycbcr(picture()), photometric="ycbcr", **TILES)
    refuse(tmp_path / "t.tif", "YCBCR", "8-bit RGB")


# ------------------------------------------------------------------------------ channels and pages
def write_channels(path, planes, names=None, axes="CYX", **options):
    """An OME-TIFF of grey pages, one a plane, with these names of channels."""
    metadata = {"axes": axes}
    if names:
        metadata["Channel"] = {"Name": names}
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(planes, photometric="minisblack", metadata=metadata, **options)


def planes_of(image, order=(0, 1, 2)):
    return np.ascontiguousarray(np.moveaxis(image, -1, 0)[[*order]])


def write_single_pages(path, image):
    with tifffile.TiffWriter(path) as tiff:
        for plane in planes_of(image):
            tiff.write(plane, photometric="minisblack", metadata=None, contiguous=False, **TILES)


def write_pyramid_of_channels(path, image):
    channels = {"photometric": "minisblack", "tile": (128, 128), "compression": "lzw"}
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(planes_of(image), subifds=1, metadata={"axes": "CYX"}, **channels)
        tiff.write(planes_of(image[::2, ::2]), subfiletype=1, **channels)


NAMES = ["Red", "Green", "Blue"]
CHANNELS = {
    "ome.tif": lambda p, i: write_channels(p, planes_of(i), NAMES),
    "tiled.ome.tif": lambda p, i: write_channels(p, planes_of(i), ["R", "G", "B"], **TILES),
    "unnamed.ome.tif": lambda p, i: write_channels(p, planes_of(i), **TILES),
    "numbered.ome.tif": lambda p, i: write_channels(p, planes_of(i), ["Channel 0", "C:1", "2"]),
    "backwards.ome.tif": lambda p, i: write_channels(p, planes_of(i, (2, 1, 0)), NAMES[::-1]),
    "pyramid.ome.tif": write_pyramid_of_channels,
    "plain.tif": lambda p, i: tifffile.imwrite(p, planes_of(i), photometric="minisblack"),
    "pages.tif": write_single_pages,
    "imagej.tif": lambda p, i: tifffile.imwrite(
        p, planes_of(i), imagej=True, metadata={"axes": "CYX", "mode": "composite"}
    ),
}


@pytest.mark.parametrize("kind", CHANNELS)
def test_red_green_and_blue_may_be_pages_of_their_own(tmp_path, kind):
    CHANNELS[kind](tmp_path / kind, picture())
    assert np.array_equal(pixels_of(tmp_path / kind), picture())


def test_pages_that_are_no_colours_are_refused(tmp_path):
    stained = tmp_path / "stained.ome.tif"
    write_channels(stained, planes_of(picture()), ["DAPI", "CD3", "CD20"])
    refuse(stained, "dapi, cd3, cd20", "red, green and blue")
    focus = tmp_path / "focus.ome.tif"
    write_channels(focus, planes_of(picture()), axes="ZYX")
    refuse(focus, "3 images of one size", "export")
    twins = tmp_path / "twins.tif"
    tifffile.imwrite(twins, np.stack([picture()] * 2), photometric="rgb", metadata=None)
    refuse(twins, "2 images of one size", "export")


def write_pages(path, *images, **options):
    with tifffile.TiffWriter(path) as tiff:
        for image in images:
            kind = "minisblack" if image.ndim == 2 else "rgb"
            tiff.write(image, photometric=kind, metadata=None, **options)


@pytest.mark.parametrize("options", [{}, TILES, {"rowsperstrip": 50, "compression": "lzw"}])
@pytest.mark.parametrize("place", range(4))
def test_the_slide_is_the_largest_image_wherever_it_stands(tmp_path, place, options):
    label = np.full((150, 150, 3), 9, np.uint8)
    pages = [label, picture()[::4, ::4], np.zeros((HEIGHT, WIDTH), np.uint8)]
    pages.insert(place, picture())
    write_pages(tmp_path / "slide.tif", *pages, **options)
    assert np.array_equal(pixels_of(tmp_path / "slide.tif"), picture())


def test_a_pyramid_may_begin_with_its_smallest_level(tmp_path):
    write_pages(tmp_path / "slide.tif", *(picture()[::step, ::step] for step in (4, 2, 1)), **TILES)
    assert np.array_equal(pixels_of(tmp_path / "slide.tif"), picture())


def test_a_grey_slide_is_not_mistaken_for_its_label(tmp_path):
    label = np.full((150, 150, 3), 9, np.uint8)
    write_pages(tmp_path / "slide.tif", label, picture()[..., 0], **TILES)
    assert (pixels_of(tmp_path / "slide.tif")[..., 2] == picture()[..., 0]).all()
    write_pages(tmp_path / "deep.tif", label, picture()[..., 0].astype(np.uint16), **TILES)
    refuse(tmp_path / "deep.tif", "uint16", "8-bit RGB")


# ------------------------------------------------------------------------- which way up, and formats
def write_turned_tiff(path, orientation):
    tags = [(274, "H", 1, orientation, False)]
    tifffile.imwrite(path, picture(), photometric="rgb", extratags=tags)


def write_turned_picture(path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(picture()).save(path, exif=exif, quality=97)


@pytest.mark.parametrize("name, write", [
    ("slide.tif", write_turned_tiff),
    ("slide.jpg", write_turned_picture),
    ("slide.png", write_turned_picture),
])  # fmt: skip
def test_an_image_that_is_to_be_turned_is_refused(tmp_path, name, write):
    write(tmp_path / name, 1)
    assert pixels_of(tmp_path / name).shape == (HEIGHT, WIDTH, 3)
    for orientation in (2, 3, 6):
        write(tmp_path / name, orientation)
        refuse(tmp_path / name, f"Orientation tag {orientation}", "without the tag")


def test_a_picture_in_cmyk_is_refused(tmp_path):
    Image.fromarray(picture()).convert("CMYK").save(tmp_path / "slide.jpg")
    refuse(tmp_path / "slide.jpg", "CMYK", "8-bit RGB")


@pytest.mark.parametrize("name, content, kind", [
    ("slide.dcm", b"", "DICOM"),
    ("slide", bytes(128) + b"DICM" + bytes(9), "DICOM"),
    ("slide.czi", b"ZISRAWFILE", "Zeiss CZI"),
    ("slide.mrxs", None, "MIRAX"),  # a small JPEG beside the slide's folder
    ("slide.vsi", b"II*\0", "Olympus VSI"),
])  # fmt: skip
def test_other_formats_are_refused_by_name(tmp_path, name, content, kind):
    if content is None:
        Image.fromarray(picture()[::9, ::9]).save(tmp_path / name, "JPEG")
    else:
        (tmp_path / name).write_bytes(content)
    refuse(tmp_path / name, kind, "raw2ometiff --rgb")


# -------------------------------------------------------------------------------------- background
@pytest.mark.parametrize("black", ["pure", "dark current", "tinted", "nearly neutral"])
def test_black_where_nothing_was_scanned_is_no_tissue(tmp_path, black):
    height, width, left = 2000, 3000, 1000
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    tissue = ((y - 1000) / 700) ** 2 + ((x - 2000) / 800) ** 2 < 1
    image = np.full((height, width, 3), 240, np.uint8)
    image[tissue] = (190, 110, 170)
    image += rng.integers(0, 12, (height, width, 1)).astype(np.uint8)
    dark = {"pure": 0, "tinted": (9, 4, 12), "nearly neutral": (3, 1, 2)}
    noise = rng.integers(0, 16, (height, left, 3))
    image[:, :left] = noise if black == "dark current" else dark[black]
    options = {"compression": "jpeg"} if black == "dark current" else {"compression": "zlib"}
    tifffile.imwrite(tmp_path / "s.tif", image, photometric="rgb", tile=(256, 256), **options)
    slide = Slide(1, "S", "D", tmp_path / "s.tif", 0.5, positions=None, matrix=None)
    spots, _ = place_spots(slide)
    assert (spots["pxl_col"] > left).all()
    assert len(spots) == pytest.approx(tissue.sum() / (200**2 * 0.75**0.5), rel=0.1)


# -------------------------------------------------------------------------------------- resolution
def write_tags(path, **tags):
    tifffile.imwrite(path, picture(), photometric="rgb", metadata=None, **tags)


def write_aperio(path, stated):
    write_tags(path, description=f"Aperio Image Library v11.2.1\n900x700|AppMag = 20|{stated}")


def write_ome(path, size, unit):
    metadata = {"PhysicalSizeX": size, "PhysicalSizeY": size}
    if unit:
        metadata |= {"PhysicalSizeXUnit": unit, "PhysicalSizeYUnit": unit}
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(picture(), photometric="rgb", metadata=metadata)


def write_imagej(path, per_unit, unit):
    options = {"imagej": True, "resolution": (per_unit, per_unit)}
    tifffile.imwrite(path, picture(), metadata={"unit": unit}, **options)


@pytest.mark.parametrize("write, stated, um", [
    *[(write_ome, stated, 0.5) for stated in ((500.0, "nm"), (0.5, "µm"), (0.5, None))],
    *[(write_ome, stated, 0.5) for stated in ((0.0005, "mm"), (0.00005, "cm"), (5e-7, "m"))],
    (write_ome, (0.5, "pixel"), None),  # is no length
    *[(write_imagej, (2.0, unit), 0.5) for unit in ("um", "micron", "\\u00B5m")],
    *[(write_imagej, stated, 0.5) for stated in ((2000.0, "mm"), (20000.0, "cm"), (50800.0, "inch"))],
    *[(write_aperio, [stated], 0.5) for stated in ("MPP = 0.5000", "MPP = 0,5000", "MPP=0.5", "MPP = 0,5|Date = 1")],
    (write_aperio, ["MPP = 0.4990"], 0.499),
    (write_tags, {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}, 0.5),
    (write_tags, {"resolution": (50800, 50800), "resolutionunit": "INCH"}, 0.5),
    (write_tags, {"resolution": (72, 72), "resolutionunit": "INCH"}, None),  # of a screen
    (write_tags, {}, None),
])  # fmt: skip
def test_the_resolution_is_what_tags_state(tmp_path, write, stated, um):
    path = tmp_path / "s.tif"
    if isinstance(stated, dict):
        write(path, **stated)
    else:
        write(path, *stated)
    if um:
        assert imaging.read_resolution(path) == pytest.approx(um)
    else:
        with refused("--um-per-px"):
            imaging.read_resolution(path)


def test_the_resolution_is_that_of_the_image_that_is_read(tmp_path):
    options = {"photometric": "rgb", "metadata": None, "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(tmp_path / "s.tif") as tiff:
        tiff.write(picture()[::4, ::4], resolution=(5000, 5000), **options)
        tiff.write(picture(), resolution=(20000, 20000), **options)
    assert imaging.read_resolution(tmp_path / "s.tif") == pytest.approx(0.5)
    ome = tmp_path / "s.ome.tif"
    with tifffile.TiffWriter(ome, ome=True) as tiff:
        tiff.write(picture()[::4, ::4], photometric="rgb", metadata={"PhysicalSizeX": 2.0})
        tiff.write(picture(), photometric="rgb", metadata={"PhysicalSizeX": 0.5})
    assert imaging.read_resolution(ome) == pytest.approx(0.5)
