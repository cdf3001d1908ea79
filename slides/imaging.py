"""The pixels of a slide: open_image, and what is cut out of it.

pixels -> patches

Patches (n, S, S, 3) uint8 RGB, images (height, width, 3) uint8 RGB. Places on a slide are rows and
columns in px of its image. What cannot be read raises InputError.
"""

import math
import os
import re
import struct
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import tifffile
from PIL import ExifTags, Image
from tqdm import tqdm

from slides import inputs
from study import files
from study.errors import InputError

THUMBNAIL_UM = 8.0  # um a px of a thumbnail, about
BAND = 512  # rows of an image that lies open as one array are handed on so many at a time
ARRAY = ["array_row", "array_col"]
PLACE = ["pxl_row", "pxl_col"]
SWAPPED = {"pxl_row": "pxl_col", "pxl_col": "pxl_row"}
DARK_SLIDE = 50  # of 255: H&E is brighter, since light shines through it


# -------------------------------------------------------------------------------- pixels


class SlideImage(NamedTuple):
    """An image that can be read region by region. A new format is one function that returns this.

    open_<format>(path) gets the path and is called in open_image, which tells the formats apart. It
    raises InputError, which names the path and the fix, for a damaged file and for all but 8-bit
    RGB, RGBA or grey; as_rgb checks pixels and composes what is transparent on white. It returns

    how      how the image is read, for the printed table
    shape    (height, width) in px
    regions  a function: regions(needed) yields (pixels, top, left), pixels (h, w, 3) uint8 RGB.
             No two regions share a pixel, and together they cover the image. A region may be left
             out where needed((top, left, bottom, right)) is False. What can be read in parts is not
             held in memory as a whole.
    """

    how: str
    shape: tuple[int, int]
    regions: Callable


# Slides that are not read here. MRXS and VSI would open, as the small picture that they begin with.
OTHER_FORMATS = {
    ".bif": "Ventana BIF",
    ".czi": "Zeiss CZI",
    ".dcm": "DICOM",
    ".isyntax": "Philips iSyntax",
    ".mrxs": "MIRAX",
    ".vsi": "Olympus VSI",
}


def open_image(path):
    """The SlideImage of a TIFF, JPEG or PNG."""
    with open(path, "rb") as file:
        start = file.read(132)
    is_dicom = start[128:] == b"DICM"
    name = "DICOM" if is_dicom else OTHER_FORMATS.get(path.suffix.lower())
    if name:
        raise InputError(
            f"{path}: a {name} slide, which is not read here: export it as an 8-bit RGB TIFF, "
            "with QuPath, or with bioformats2raw and raw2ometiff --rgb"
        )
    if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return open_tiff(path)
    return open_picture(path, start)


def check_orientation(path, orientation):
    """InputError for a tag that has viewers turn or mirror the image: nobody knows whether its
    positions were read off it as it lies in the file or as it is shown.
    """
    if orientation not in (None, 0, 1):
        raise InputError(
            f"{path}: its Orientation tag {orientation} turns or mirrors it: save it as it is to "
            "be seen, without the tag, and have the positions fit its pixels"
        )


Image.MAX_IMAGE_PIXELS = 4_000_000_000  # a whole slide is no decompression bomb


def open_picture(path, start):
    """A JPEG or PNG, which gives no access to its parts and is decoded whole; `start` are its first
    bytes.
    """
    try:
        with Image.open(path) as image:
            check_orientation(path, image.getexif().get(ExifTags.Base.Orientation))
            if "transparency" in image.info:  # of one colour, or of colours of a palette
                image = image.convert("RGBA")
            if image.mode not in ("RGB", "RGBA", "L", "LA"):
                raise InputError(
                    f"{path}: a {image.mode} image; expected 8-bit RGB, RGBA or grey: convert it"
                )
            if image.format == "PNG" and start[24] == 16:  # Pillow drops the lower half of 16 bits.
                raise InputError(f"{path}: 16 bits a channel; expected 8: convert it to 8-bit RGB")
            if image.format == "JPEG" and JPEG_END not in path.read_bytes()[-JPEG_TAIL:]:
                raise InputError(  # Its decoder fills what is lost with a colour.
                    f"{path}: the JPEG has no end: the file is damaged; fetch or export it again"
                )
            pixels = np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(
            f"{path}: not a readable image ({error}); fetch or export it again"
        ) from None
    regions = partial(cut_bands, [pixels], partial(as_rgb, path=path))
    return SlideImage("decoded whole", pixels.shape[:2], regions)


def open_tiff(path):
    """The slide of a TIFF: memory-mapped if it is contiguous, else by tiles or strips."""
    with tiff_errors(path), tifffile.TiffFile(path) as tiff:
        pages = find_slide(path, tiff)
        page = pages[0]
        shape = page.imagelength, page.imagewidth
        if all(page.is_memmappable for page in pages):
            planes = [plane for page in pages for plane in map_planes(page)]
            regions = partial(cut_bands, planes, choose_conversion(path, page))
            return SlideImage("memory-mapped", shape, regions)
        kind = "tiles" if page.is_tiled else "strips"
        down, across = page.chunks[:2]
        how = f"{kind} of {across} x {down} px, {page.compression.name.lower()}"
        if len(pages) > 1:
            how += ", three pages for red, green and blue"
        return SlideImage(how, shape, partial(decode_tiff, path))


@contextmanager
def tiff_errors(path):
    """InputError for whatever tifffile and its codecs raise for a damaged file."""
    kinds = (tifffile.TiffFileError, ValueError, TypeError, LookupError, ArithmeticError)
    kinds += (struct.error, OSError, RuntimeError)
    try:
        yield
    except kinds as error:
        raise InputError(
            f"{path}: not a readable TIFF ({error}); fetch or export it again"
        ) from None


def find_slide(path, tiff):
    """The pages of an open TIFF that are its slide: one, or one each for red, green and blue."""
    series = choose_series(tiff)
    report_scenes(path, tiff, series)
    check_tiff(path, tiff, series.keyframe)
    if len(series.pages) == 1:
        return [series.keyframe]
    return order_colours(path, tiff, series)


def choose_series(tiff):
    """The largest image of an open TIFF, in colour where one is: labels may stand before it.

    A grey image is taken where those in colour are so much smaller that they are its thumbnails.
    """

    def count_pixels(series):
        return series.keyframe.imagelength * series.keyframe.imagewidth

    def has_colours(series):
        grey = series.keyframe.photometric in (
            tifffile.PHOTOMETRIC.MINISBLACK,
            tifffile.PHOTOMETRIC.MINISWHITE,
        )
        return not grey or len(series.pages) == 3  # which may be three grey pages

    largest = max(tiff.series, key=count_pixels)
    large = [one for one in tiff.series if 4 * count_pixels(one) >= count_pixels(largest)]
    return max(filter(has_colours, large), key=count_pixels, default=largest)


def report_scenes(path, tiff, chosen):
    """Say which other images of a TIFF are large enough to be slides, as a scanner's scenes are.

    Those of the same shape are its smaller levels.
    """
    height, width = chosen.keyframe.imagelength, chosen.keyframe.imagewidth
    scenes = []
    for series in tiff.series:
        rows, columns = series.keyframe.imagelength, series.keyframe.imagewidth
        is_level = columns < 0.75 * width and abs(rows / height / (columns / width) - 1) < 0.01
        if series is not chosen and not is_level and 4 * rows * columns > height * width:
            scenes.append(f"{series.name} ({rows} x {columns} px)")
    if scenes:
        inputs.warn_once(
            f"{path}: {chosen.name or 'the largest image'} ({height} x {width} px) is taken, and "
            f"not {', '.join(scenes[:4])}: export the one that is the slide if it is another"
        )


# Their decoders fill what a tile lacks with grey or a blur. The mark of the end stands nowhere else
# in them.
JPEG = ("JPEG", "ALT_JPEG", "APERIO_JP2000_YCBC", "APERIO_JP2000_RGB", "JPEG2000")
JPEG_END = b"\xff\xd9"
JPEG_TAIL = 65_536  # bytes; programs may write notes behind the end


def check_tiff(path, tiff, page):
    """InputError for a TIFF that is cut short, and for a page that does not come out as RGB."""
    for tag in ("compression", "photometric"):  # Of one that it knows tifffile gives the name.
        value = getattr(page, tag)
        if not hasattr(value, "name"):
            raise InputError(
                f"{path}: its {tag} is number {value}, which is not known here: export it as RGB "
                "with LZW, deflate or JPEG"
            )
    needed, held = max(np.add(page.dataoffsets, page.databytecounts)), tiff.filehandle.size
    if needed > held:
        raise InputError(
            f"{path}: truncated: {held:,} of at least {needed:,} bytes; "
            "remove it and fetch it again"
        )
    check_orientation(path, page.tags.valueof("Orientation"))
    kind = page.photometric.name
    comes_out_as_rgb = kind == "YCBCR" and page.compression.name == "JPEG"
    if kind not in ("RGB", "MINISBLACK") and not comes_out_as_rgb and not holds_ycbcr(page):
        raise InputError(f"{path}: a {kind} image; expected RGB or grey: convert it to 8-bit RGB")
    if tiff.is_bif or page.imagedepth != 1 or page.tiledepth != 1:
        raise InputError(f"{path}: its tiles overlap or lie in depth: convert it to 8-bit RGB")
    images = tiff.imagej_metadata.get("images", 1) if tiff.is_imagej else 1
    if images > 1 == len(tiff.pages) and page.samplesperpixel == 1:
        raise InputError(f"{path}: ImageJ keeps {images} images in it: save it as an RGB TIFF")
    is_alpha = page.extrasamples and page.extrasamples[-1] != tifffile.EXTRASAMPLE.UNSPECIFIED
    if kind == "MINISBLACK" and page.samplesperpixel in (2, 4) and not is_alpha:
        raise InputError(
            f"{path}: {page.samplesperpixel} grey channels; expected RGB, RGBA or grey: "
            "convert it to 8-bit RGB"
        )


def holds_ycbcr(page):
    """Whether a page's JPEG 2000 is of YCbCr, as Aperio's older scanners wrote it.

    Its photometric tag may say RGB, and other programs write the same compression of true RGB.
    """
    return page.is_svs and page.compression.name == "APERIO_JP2000_YCBC"


def order_colours(path, tiff, series):
    """The three pages of an image that are its red, green and blue, in this order."""
    page = series.keyframe
    axes = series.axes.strip("YXS")
    plain = page.photometric.name == "MINISBLACK" and page.samplesperpixel == 1
    if len(series.pages) != 3 or axes not in ("C", "Q", "I") or not plain:
        raise InputError(
            f"{path}: {len(series.pages)} images of one size, which may be planes of focus, times "
            "or stains: export the one that is the slide as 8-bit RGB"
        )
    pages = [frame.aspage() for frame in series.pages]
    pixels = find_ome_pixels(tiff, page)
    channels = [] if pixels is None else pixels.iterfind("{*}Channel")
    names = [channel.get("Name", "").lower() for channel in channels]
    if not names:
        names = [str(name).lower() for name in (tiff.imagej_metadata or {}).get("Labels", ())]
    colours = [name[:1] for name in names if name in ("red", "green", "blue", "r", "g", "b")]
    if sorted(colours) == ["b", "g", "r"]:
        return [pages[colours.index(colour)] for colour in "rgb"]
    if all(re.fullmatch(r"[\W_]*(channel|ch|c)?[\W_\d]*", name) for name in names):
        return pages  # Numbers, or nothing, for names: as most programs order them.
    raise InputError(
        f"{path}: its channels are {', '.join(names)}; expected red, green and blue: "
        "export the H&E image as 8-bit RGB"
    )


def find_ome_pixels(tiff, page):
    """The element Pixels of the image of this page in OME's metadata; None where there is none."""
    try:
        tree = ElementTree.fromstring(tiff.ome_metadata or "")
    except ElementTree.ParseError:
        return None
    size = str(page.imagewidth), str(page.imagelength)
    for pixels in tree.iterfind("{*}Image/{*}Pixels"):
        if (pixels.get("SizeX"), pixels.get("SizeY")) == size:
            return pixels
    return None


def map_planes(page):
    """The arrays (h, w, channels) in which a contiguous page lies open: one, or one a channel."""
    pixels = page.asarray(out="memmap")
    size = page.imagelength, page.imagewidth
    if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
        return [*pixels.reshape(page.samplesperpixel, *size, 1)]
    return [pixels.reshape(*size, page.samplesperpixel)]


NO_ALPHA = ((), (tifffile.EXTRASAMPLE.UNSPECIFIED,))  # what a page says of its fourth channel


def choose_conversion(path, page):
    """The function that makes RGB of the pixels (h, w, channels) of a page, or of planes of it.

    A fourth channel that the page's tag does not call alpha is left out: it may be padding, or
    infrared.
    """
    if page.samplesperpixel == 4 and page.extrasamples in NO_ALPHA:
        return lambda pixels: as_rgb(pixels[:, :, :3], path)
    return partial(
        as_rgb, path=path, premultiplied=tifffile.EXTRASAMPLE.ASSOCALPHA in page.extrasamples
    )


def as_rgb(pixels, path, premultiplied=False):
    """(h, w) or (h, w, 1 to 4) uint8 -> (h, w, 3): grey is repeated, alpha composed on white.

    `premultiplied`: the colours have been multiplied by alpha already.
    """
    if pixels.dtype != np.uint8:
        raise InputError(
            f"{path}: {pixels.dtype} pixels; expected 8 bits a channel: "
            "convert the image to 8-bit RGB"
        )
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    height, width, channels = pixels.shape
    if channels > 4:
        raise InputError(f"{path}: {channels} channels; expected RGB, RGBA or grey")
    colours = pixels[:, :, :1] if channels < 3 else pixels[:, :, :3]
    if channels in (2, 4):
        colours = compose_on_white(colours, pixels[:, :, -1:], premultiplied)
    return np.broadcast_to(colours, (height, width, 3))


def compose_on_white(colours, alpha, premultiplied):
    """Colours (h, w, 1 or 3) uint8 as they look on white through alpha (h, w, 1) uint8."""
    if alpha.min() == 255:
        return colours
    alpha = alpha.astype(np.uint16)
    covered = 255 * colours.astype(np.uint16) if premultiplied else alpha * colours
    composed = (covered + 255 * (255 - alpha).astype(np.uint32) + 127) // 255
    return np.minimum(composed, 255).astype(np.uint8)


def cut_bands(planes, convert, needed):
    """Regions of an image that lies open as arrays (h, w, ...), of whose channels it is made."""
    height, width = planes[0].shape[:2]
    for top in range(0, height, BAND):
        if needed((top, 0, min(top + BAND, height), width)):
            bands = [plane[top : top + BAND] for plane in planes]
            yield convert(bands[0] if len(bands) == 1 else np.concatenate(bands, axis=2)), top, 0


def decode_tiff(path, needed):
    """Regions of a TIFF: its tiles or strips, each decoded once, a row of them at a time."""
    with tiff_errors(path), tifffile.TiffFile(path) as tiff, decoding_threads() as pool:
        pages = find_slide(path, tiff)
        convert = choose_conversion(path, pages[0])
        height, width = pages[0].imagelength, pages[0].imagewidth
        down, across = pages[0].chunks[:2]
        for top in tqdm(range(0, height, down), f"decode {path.name}", leave=False, disable=None):
            bottom = min(top + down, height)
            lefts = [
                left
                for left in range(0, width, across)
                if needed((top, left, bottom, min(left + across, width)))
            ]
            cells = pool.map(partial(decode_cell, pages, convert, top), lefts)
            for left, pixels in zip(lefts, cells, strict=True):
                # The last tiles reach beyond the image.
                yield pixels[: height - top, : width - left], top, left


@contextmanager
def decoding_threads():
    """A ThreadPoolExecutor whose queue is not waited for when its user is interrupted."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def decode_cell(pages, convert, top, left):
    """(h, w, 3) RGB of the tile or strip at a place of the image that these pages are."""
    page = pages[0]
    down, across = page.chunks[:2]
    rows, columns = math.ceil(page.imagelength / down), math.ceil(page.imagewidth / across)
    number = top // down * columns + left // across
    separate = page.planarconfig == tifffile.PLANARCONFIG.SEPARATE
    planes = page.samplesperpixel if separate else 1
    numbers = range(number, number + planes * rows * columns, rows * columns)
    parts = [decode_segment(page, number) for page in pages for number in numbers]
    return convert(np.concatenate(parts, axis=2))


def decode_segment(page, number):
    """(h, w, channels) pixels of a tile or strip, or of one plane of it, by its number."""
    handle = page.parent.filehandle.fileno()
    data = os.pread(handle, page.databytecounts[number], page.dataoffsets[number])
    # Hamamatsu's tiles are the parts of one JPEG between its restart markers, with a header apart.
    is_whole = page.jpegheader is None
    if data and page.compression.name in JPEG and is_whole and JPEG_END not in data:
        raise InputError(
            f"{page.parent.filehandle.path}: the JPEG of tile {number} has no end: the file is "
            "damaged; fetch it again"
        )
    tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
    pixels, _, shape = page.decode(data or None, number, **tables)
    if pixels is None:  # a sparse file holds no background
        return np.full(shape[1:], 255, page.dtype)
    if holds_ycbcr(page):
        image = Image.frombytes("YCbCr", pixels[0].shape[1::-1], pixels[0].tobytes())
        return np.asarray(image.convert("RGB"))
    return pixels[0]


def read_resolution(path):
    """um per px that a TIFF states; InputError where it states none that a slide can have."""
    found = 0.0
    # A JPEG or PNG, or tags that say nothing: it is asked for below.
    with suppress(InputError), tiff_errors(path), tifffile.TiffFile(path) as tiff:
        found = find_resolution(tiff)
    if not 0.05 < found < 20:
        stated = f"tags say {found:g} um/px" if found else "its tags say none that fits it"
        raise InputError(f"{path}: its resolution is not known ({stated}): give --um-per-px")
    return found


UM_PER_UNIT = {"nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6, "inch": 25_400.0, "in": 25_400.0}
UM_PER_UNIT |= dict.fromkeys(("µm", "um", "micron", "microns"), 1.0)
RESOLUTION_UNITS = {2: "inch", 3: "cm"}  # of TIFF's own tags; 1 is none


def find_resolution(tiff):
    """um per px that an open TIFF states of its slide; 0 where it states none.

    Read of the image's own metadata: of OME, then of Aperio's description, then of ImageJ, and of
    TIFF's tags last, where programs leave the resolution of the screen.
    """
    page = choose_series(tiff).keyframe
    pixels = find_ome_pixels(tiff, page)
    if pixels is not None and pixels.get("PhysicalSizeX"):
        return float(pixels.get("PhysicalSizeX")) * um_of(pixels.get("PhysicalSizeXUnit", "µm"))
    stated = re.search(r"MPP ?= ?(\d+[.,]?\d*(?:[eE][-+]?\d+)?)", page.description)
    if stated:
        return float(stated[1].replace(",", ".")) * reduction_of(page)
    if "XResolution" not in page.tags:
        return 0.0
    unit = RESOLUTION_UNITS.get(page.tags.valueof("ResolutionUnit", default=2), "")
    if tiff.is_imagej:
        unit = tiff.imagej_metadata.get("unit", unit)
    pixels, units = page.tags["XResolution"].value
    return um_of(unit) * units / pixels


def reduction_of(page):
    """How many px of the slide a px of a page is, by Aperio's description: MPP is of the slide,
    also where the image was made smaller, "4200x4200 [0,0 4096x4096] (256x256) -> 1024x1024".

    0 where the page has another width than the description says: a program that scaled or cut the
    image has left it there.
    """
    # Of several lines the first one says what was done last.
    done = re.search(r"\d+x\d+[^;|\r\n]*", page.description)
    if not done:
        return 1.0
    scanned = re.search(r"\d+", done[0])
    cut = re.search(r"(?<=,)\d+[ ,](\d+)x\d+\]", done[0])
    made = re.search(r"-> *(\d+)", done[0])
    whole = int(cut[1] if cut else scanned[0])
    width = int(made[1]) if made else whole
    return whole / width if width == page.imagewidth else 0.0


def um_of(unit):
    """um of a unit of length, as metadata spell it; 0 for another one, as "pixel"."""
    spelt = unit.replace("\\u00B5", "µ").replace("μ", "µ").strip().lower()
    return UM_PER_UNIT.get(spelt, 0.0)


# -------------------------------------------------------------------------------- patches


class Thumbnail:
    """A slide, averaged over squares of `step` px: add() takes its regions, in any order."""

    def __init__(self, slide_shape, step):
        self.slide_shape, self.step = slide_shape, step
        height, width = slide_shape
        self.sums = np.zeros((math.ceil(height / step), math.ceil(width / step), 3), np.uint32)

    def add(self, region, top, left):
        """Add the pixels (h, w, 3) that lie at (top, left) of the slide."""
        rows = self._square_starts(top, region.shape[0])
        columns = self._square_starts(left, region.shape[1])
        sums = np.add.reduceat(region, rows, axis=0, dtype=np.uint32)
        sums = np.add.reduceat(sums, columns, axis=1)
        row, column = top // self.step, left // self.step
        self.sums[row : row + len(rows), column : column + len(columns)] += sums

    def _square_starts(self, first, length):
        """Where squares begin, or go on, within `length` px that begin at px `first`."""
        return np.union1d([0], np.arange(-first % self.step, length, self.step))

    def pixels(self):
        """(h, w, 3) uint8."""
        # px of the squares down and across; the last one may be cut.
        sides = [np.diff(np.arange(0, n, self.step), append=n) for n in self.slide_shape]
        return np.rint(self.sums / np.outer(*sides)[:, :, None]).astype(np.uint8)


def thumbnail_step(slide):
    """px of a slide a px of its thumbnail."""
    return max(1, round(THUMBNAIL_UM / slide.um_per_px))


def make_thumbnail(image, step):
    """The Thumbnail of a SlideImage, of squares of `step` px, of which all pixels are read."""
    thumbnail = Thumbnail(image.shape, step)
    for pixels, top, left in image.regions(lambda box: True):
        thumbnail.add(pixels, top, left)
    return thumbnail


def read_patches(path, spots, patches, step=None):
    """Fill patches (n, S, S, 3) uint8 with the pixels around each spot, white beyond the border.

    Returns (SlideImage, Thumbnail or None). With a `step`, all pixels are read and the thumbnail is
    made of them as well; without one, only those that patches need are read. Raises InputError
    where the centres of most spots lie outside the image; find_inside tells the others.
    """
    image = open_image(inputs.unpack(path))
    check_centres(path, spots, image.shape)
    thumbnail = Thumbnail(image.shape, step) if step else None
    side = patches.shape[1]
    corners = spots[PLACE].to_numpy() - side // 2
    patches[:] = 255

    def needed(box):
        return thumbnail is not None or len(find_overlapping(corners, side, box)) > 0

    for pixels, top, left in image.regions(needed):
        copy_region(pixels, top, left, corners, patches)
        if thumbnail is not None:
            thumbnail.add(pixels, top, left)
    return image, thumbnail


def check_centres(path, spots, shape):
    """InputError where most spots lie outside an image of (height, width); warns of a few.

    Swapping pxl_row and pxl_col is named as the cause only where it would bring all inside.
    """
    outside = ~find_inside(spots, shape)
    if not outside.any():
        return
    barcode = spots["barcode"][outside].iloc[0]
    size = f"{shape[0]} x {shape[1]} px"
    swapped_fits = find_inside(spots.rename(columns=SWAPPED), shape).all()
    if outside.mean() < 0.5 and not (swapped_fits and lies_mirrored(spots)):
        inputs.warn(
            f"{path}: {outside.sum()} of {len(spots)} spots lie outside the image ({size}) and are "
            f"left out, as {barcode}: is it the whole image?"
        )
        return
    cause = "these the positions of this full-resolution image"
    if swapped_fits:
        cause = "pxl_row and pxl_col swapped"
    raise InputError(
        f"{path}: the centre of spot {barcode} lies outside the image ({size}), as of "
        f"{outside.sum()} of {len(spots)} spots; are {cause}?"
    )


def find_inside(spots, shape):
    """(n,) bool: whether the centres of spots lie in an image of (height, width)."""
    centres = spots[PLACE].to_numpy()
    return ((centres >= 0) & (centres < shape)).all(axis=1)


def find_overlapping(corners, side, box):
    """Which patches, at corners (n, 2), share pixels with a box (top, left, bottom, right)."""
    top, left, bottom, right = box
    rows, columns = corners.T
    beside = (rows >= bottom) | (rows + side <= top) | (columns >= right) | (columns + side <= left)
    return np.flatnonzero(~beside)


def copy_region(region, top, left, corners, patches):
    """Copy a region's pixels to where patches at corners (n, 2) share them with it."""
    side = patches.shape[1]
    bottom, right = top + region.shape[0], left + region.shape[1]
    for number in find_overlapping(corners, side, (top, left, bottom, right)):
        y, x = corners[number]
        y0, y1 = max(y, top), min(y + side, bottom)
        x0, x1 = max(x, left), min(x + side, right)
        shared = region[y0 - top : y1 - top, x0 - left : x1 - left]
        patches[number, y0 - y : y1 - y, x0 - x : x1 - x] = shared


def count_over_border(spots, shape, side):
    """How many patches of `side` px with their centre inside an image of (height, width) reach over
    its border.
    """
    corners = spots[find_inside(spots, shape)][PLACE].to_numpy() - side // 2
    return int(((corners < 0) | (corners + side > shape)).any(axis=1).sum())


def map_scratch(folder, shape):
    """A uint8 array in a file of `folder` without a name, which goes when the array does.

    Its disk space is taken now: to be written through memory, a full disk would kill the process.
    """
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.truncate(math.prod(shape))
        files.reserve_disk(Path(file.name))
        return np.memmap(file, np.uint8, "r+", shape=shape)


def fit_array(spots):
    """((3, 2), (n, 3), rank): the affine map that fits best from array_row, array_col and 1 to
    PLACE, and what it maps. The array may be turned, mirrored, stretched or sheared on the image.
    """
    array = np.column_stack([spots[ARRAY], np.ones(len(spots))]).astype(np.float64)
    affine, _, rank, _ = np.linalg.lstsq(array, spots[PLACE].to_numpy(np.float64))
    return affine, array, rank


def lies_mirrored(spots):
    """Whether the array lies on the image as in a mirror."""
    return np.linalg.det(fit_array(spots)[0][:2]) < 0
