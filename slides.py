"""Files to spots and pixels: the one place where slides, positions and counts are read.

manifest -> Space Ranger's folders -> positions -> counts -> spots -> pixels -> patches

Shapes: n spots, patches (n, S, S, 3) uint8 RGB, images (height, width, 3) uint8 RGB. Places on a
slide are rows and columns in px of its image. What cannot be read raises InputError.
"""

import gzip
import io
import json
import math
import os
import re
import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import anndata
import numpy as np
import pandas as pd
import scipy.io
import scipy.ndimage
import scipy.sparse
import tifffile
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image
from scipy.spatial import cKDTree
from skimage.filters import threshold_otsu
from skimage.morphology import remove_small_holes, remove_small_objects
from tqdm import tqdm

import common
from common import PATCH_SIZE, POSITION_COLUMNS, InputError

SPOT_PITCH = 100.0  # um between the spots of Visium, and of a grid over a slide without positions
BLOCK_WIDTH = 5  # pitches
THUMBNAIL_UM = 8.0  # um a px of a thumbnail, about
BAND = 512  # rows of an image that lies open as one array are handed on so many at a time
DARK = 50  # of 255, in the brightest channel: below it nothing was scanned
SWAP_SAMPLE = 64  # spots that are looked at for pxl_row and pxl_col being swapped
PLACE = ["pxl_row", "pxl_col"]


# -------------------------------------------------------------------------------- manifest


@dataclass(frozen=True)
class Slide:
    """One slide, as a row of slides.csv names it."""

    tissue_index: int
    name: str
    donor: str
    image: Path
    um_per_px: float
    positions: Path | None  # None: a grid is laid over the tissue
    matrix: Path | None  # a 10x folder or .h5; None: there are no counts


MANIFEST = [field.name for field in fields(Slide)]  # the columns of slides.csv


def read_manifest(root):
    """The list of slides that root/slides.csv names, by tissue_index; their paths are absolute.

    Raises InputError for a missing column, a value out of range, or a file that is missing or lies
    outside `root`.
    """
    path = root / "slides.csv"
    if not path.is_file():
        raise InputError(
            f"no {path}: make it with 17_download_data.py or 18_simulate_slides.py, "
            "or write it by hand"
        )
    texts = dict.fromkeys(("name", "donor", "image", "positions", "matrix"), str)
    try:
        table = pd.read_csv(path, dtype=texts)
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a CSV table ({error})") from None
    check_manifest(path, table)
    rows = table.sort_values("tissue_index").to_dict("records")
    return [read_manifest_row(root, row) for row in rows]


def check_manifest(path, table):
    """InputError unless the table has all columns, an index and a name a slide, and resolutions."""
    missing = [column for column in MANIFEST if column not in table.columns]
    if missing:
        raise InputError(
            f"{path}: the column {missing[0]} is missing; expected {', '.join(MANIFEST)}"
        )
    numbers, names, resolutions = table["tissue_index"], table["name"], table["um_per_px"]
    whole = pd.api.types.is_integer_dtype(numbers)
    if table.empty or not whole or numbers.duplicated().any():
        raise InputError(
            f"{path}: tissue_index must be a different whole number for every slide, "
            "and one at least"
        )
    if not pd.api.types.is_numeric_dtype(resolutions) or not resolutions.between(0.05, 20).all():
        raise InputError(f"{path}: um_per_px must be a number from 0.05 to 20 for every slide")
    if names.isna().any() or names.duplicated().any():
        raise InputError(f"{path}: every slide needs a name of its own")


def read_manifest_row(root, row):
    """A Slide from a row of slides.csv, a dict by column."""
    paths = {column: find_named(root, row, column) for column in ("image", "positions", "matrix")}
    if paths["image"] is None:
        raise InputError(f"{root / 'slides.csv'}: slide {row['tissue_index']} has no image")
    if paths["positions"] is None and paths["matrix"] is not None:
        raise InputError(
            f"{root / 'slides.csv'}: slide {row['tissue_index']} has a matrix and no positions: "
            "name them, or leave the matrix out"
        )
    return Slide(
        tissue_index=row["tissue_index"],
        name=row["name"],
        donor=str(row["donor"]),
        um_per_px=row["um_per_px"],
        **paths,
    )


def find_named(root, row, column):
    """The absolute path in a column of a row of slides.csv; None where the column is empty."""
    value, manifest = row[column], root / "slides.csv"
    if pd.isna(value):
        return None
    # Links are not followed: they may lead out of the data root, since the user made them.
    path = Path(os.path.abspath(root / value))  # noqa: PTH100
    if not path.is_relative_to(os.path.abspath(root)):  # noqa: PTH100
        raise InputError(
            f"{manifest}: {column} {value!r} lies outside {root}; "
            "copy or link it into the data root"
        )
    found = path.exists() if column == "matrix" else path.is_file()
    if not found:
        raise InputError(
            f"{manifest}: {column} {value!r} of slide {row['tissue_index']} does not exist: "
            "fetch it with 17_download_data.py or mend the path"
        )
    return path


# -------------------------------------------------------------------------------- Space Ranger


def read_space_ranger(folder, image=None):
    """(Slide, its positions) of a folder outs/ of Space Ranger, or of the folder that holds outs/.

    Its full-resolution image is not among Space Ranger's files. Without `image`,
    tissue_hires_image.png is taken, which is coarse, and the positions are scaled to it. Its um per
    px follow from the spots, which are 100 um apart.
    """
    outs = folder / "outs" if (folder / "outs").is_dir() else folder
    if (outs / "binned_outputs").is_dir():
        raise InputError(
            f"{outs}: Visium HD, which has no spots of 55 um; Visium and CytAssist are read"
        )
    table, older = "spatial/tissue_positions.csv", "spatial/tissue_positions_list.csv"
    positions_file = find_first(outs, table, older)
    matrix = find_first(outs, "filtered_feature_bc_matrix.h5", "filtered_feature_bc_matrix")
    positions = read_positions(positions_file)
    um_per_px = SPOT_PITCH / measure_pitch(positions)
    name = name_sample(folder)
    if image is None:
        image = outs / "spatial" / "tissue_hires_image.png"
        scale = read_hires_scale(image)
        positions[PLACE] = np.rint(positions[PLACE] * scale).astype(int)
        um_per_px /= scale
        width = f"{PATCH_SIZE} px of it are {PATCH_SIZE * um_per_px:.0f} um"
        print(f"{name}: the hires image, {um_per_px:.2f} um/px: {width}")
    if not image.exists():
        raise InputError(f"image {image}: no such file")
    um_per_px = round(um_per_px, 4)
    return Slide(1, name, name, image, um_per_px, positions_file, matrix), positions


def name_sample(folder):
    """The name of a sample's folder, which holds outs/ or is outs/ itself."""
    place = folder.absolute()
    return (place.parent if place.name == "outs" else place).resolve().name


def find_first(outs, *names):
    """The first of the names that is in Space Ranger's folder."""
    for name in names:
        if (outs / name).exists():
            return outs / name
    raise InputError(f"{outs}: no {' or '.join(names)}: expected a folder outs/ of Space Ranger")


def read_hires_scale(image):
    """px of the hires image a full-resolution px, as the file beside it says."""
    path = image.with_name("scalefactors_json.json")
    try:
        return float(json.loads(path.read_text())["tissue_hires_scalef"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no tissue_hires_scalef ({error})") from None


def write_manifest(root, folders, images, use_hires):
    """slides.csv for Space Ranger's folders and their images, and root/links/ to what it names."""
    if len(images) not in (0, len(folders)):
        raise InputError(
            f"--images: {len(images)} images for {len(folders)} folders of Space Ranger: "
            "give one for each"
        )
    if not images and not use_hires:
        raise InputError(
            f"{folders[0]} holds no full-resolution image, which Space Ranger got with --image or "
            "--cytaimage: name it with --images, or take --use-hires"
        )
    path = root / "slides.csv"
    samples = read_samples(folders, images or [None] * len(folders))
    linked = [name_links(slide, scaled=not images) for slide, _ in samples]
    table = pd.DataFrame([asdict(slide) for slide in linked])
    if path.exists() and path.read_text() != table.to_csv(index=False):
        raise InputError(
            f"{path} is there already and names other slides: leave out --from-spaceranger, "
            "or remove it"
        )
    for (slide, positions), links in zip(samples, linked, strict=True):
        place_link(root / links.image, slide.image)
        place_link(root / links.matrix, slide.matrix)
        if images:
            place_link(root / links.positions, slide.positions)
        else:
            common.save_csv(root / links.positions, positions.reset_index())
    common.save_csv(path, table)
    print(f"wrote {path}: each slide is taken for another donor's; mend that there if it is not so")


def read_samples(folders, images):
    """[(Slide, its positions)] of Space Ranger's folders; those of one name get their number."""
    names = [name_sample(folder) for folder in folders]
    samples = []
    for number, (folder, image) in enumerate(zip(folders, images, strict=True), 1):
        slide, positions = read_space_ranger(folder, image)
        name = f"{slide.name}_{number}" if names.count(slide.name) > 1 else slide.name
        slide = replace(slide, tissue_index=number, name=name, donor=name)
        samples.append((slide, positions))
    return samples


def name_links(slide, scaled):
    """The slide with the paths that its files get in a data root; `scaled`: positions are made."""
    folder = Path("links", slide.name)
    positions = "positions_hires.csv" if scaled else slide.positions.name
    return replace(
        slide,
        image=folder / slide.image.name,
        positions=folder / positions,
        matrix=folder / slide.matrix.name,
    )


def place_link(link, path):
    """Make a link to a path, in place of an older link."""
    if link.exists() and not link.is_symlink():
        raise InputError(f"{link} is no link: move it away")
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(path.resolve())


# -------------------------------------------------------------------------------- positions


def read_positions(path):
    """Space Ranger's positions, with or without a header: a table by barcode.

    Its columns are in_tissue, array_row, array_col, pxl_row and pxl_col.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            header = 0 if file.readline().startswith("barcode") else None
        table = pd.read_csv(path, header=header, encoding="utf-8-sig")
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a positions table ({error})") from None
    if table.shape[1] != len(POSITION_COLUMNS):
        raise InputError(
            f"{path}: {table.shape[1]} columns; expected {', '.join(POSITION_COLUMNS)}"
        )
    table.columns = POSITION_COLUMNS
    numbers = table[POSITION_COLUMNS[1:]].apply(pd.to_numeric, errors="coerce")
    known = np.isfinite(numbers.to_numpy(float)).all(axis=1)
    if not known.all():
        barcode = table["barcode"][~known].iloc[0]
        raise InputError(f"{path}: the position of barcode {barcode} is not a number")
    table[POSITION_COLUMNS[1:]] = np.rint(numbers).astype(np.int64)
    table["barcode"] = table["barcode"].astype(str)
    check_unique(table["barcode"], "barcode", path)
    return table.set_index("barcode")


def check_unique(names, kind, path):
    """InputError where one of the names stands there twice."""
    names = pd.Series(names)
    twice = names[names.duplicated()]
    if len(twice):
        raise InputError(f"{path}: {kind} {twice.iloc[0]} stands there twice")


def measure_pitch(positions):
    """px from a spot to its nearest, median over the slide, at least 1; 1 for a spot alone."""
    if len(positions) < 2:
        return 1.0
    centres = positions[["pxl_col", "pxl_row"]].to_numpy(np.float64)
    distances, _ = cKDTree(centres).query(centres, k=2)  # the nearest of all is the spot itself
    return max(float(np.median(distances[:, 1])), 1.0)


def lay_blocks(positions, pitch, tissue_index):
    """Of each spot the square that it lies in, BLOCK_WIDTH pitches wide, as "slide:column:row".

    Folds and intervals take blocks whole.
    """
    centres = positions[["pxl_col", "pxl_row"]].to_numpy(np.float64)
    squares = (centres // (BLOCK_WIDTH * pitch)).astype(int)
    return [f"{tissue_index}:{column}:{row}" for column, row in squares]


# -------------------------------------------------------------------------------- counts


def read_matrix(path):
    """Counts of one slide from a 10x folder or .h5, as AnnData (spots x genes, CSR).

    var_names are gene ids, var["name"] the symbols.
    """
    return read_h5_matrix(path) if path.is_file() else read_matrix_folder(path)


def read_h5_matrix(path):
    """A filtered_feature_bc_matrix.h5, as read_matrix gives it."""
    import scanpy  # Here, because numba takes seconds to load.

    try:
        # Names that several genes share are warned of; align_genes makes them unique.
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            table = scanpy.read_10x_h5(path, gex_only=True)
    except Exception as error:  # h5py raises what it likes; the cause goes into the message
        raise InputError(f"{path}: not a 10x filtered_feature_bc_matrix.h5 ({error})") from None
    check_unique(table.obs_names, "barcode", path)
    check_unique(table.var["gene_ids"], "gene id", path)
    table.var["name"] = table.var_names
    table.var_names = table.var["gene_ids"].astype(str)
    return table


def read_matrix_folder(folder):
    """matrix.mtx, barcodes.tsv and features.tsv, plain or .gz, as read_matrix gives them."""
    read_table = partial(pd.read_csv, header=None, sep="\t", dtype=str)
    paths = [find_part(folder, name) for name in ("barcodes.tsv", "features.tsv", "matrix.mtx")]
    barcodes = read_part(paths[0], read_table)[0]
    features = read_part(paths[1], read_table)
    counts = scipy.sparse.csr_matrix(read_part(paths[2], read_market_matrix).T)
    if counts.shape != (len(barcodes), len(features)):
        raise InputError(
            f"{paths[2]}: {counts.shape[1]} genes x {counts.shape[0]} spots, but there are "
            f"{len(features)} features and {len(barcodes)} barcodes: the three files are not of "
            "one slide"
        )
    if features.shape[1] > 2:  # CytAssist's and multi-modal folders hold other kinds too
        genes = (features[2] == "Gene Expression").to_numpy()
        counts, features = counts[:, genes], features[genes]
    check_unique(barcodes, "barcode", folder)
    check_unique(features[0], "gene id", folder)
    symbols = features[1] if features.shape[1] > 1 else features[0]
    var = pd.DataFrame({"name": symbols.to_numpy()}, index=features[0].to_numpy())
    return anndata.AnnData(counts, obs=pd.DataFrame(index=barcodes.to_numpy()), var=var)


def find_part(folder, name):
    """`name` or `name`.gz in a 10x folder."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise InputError(f"no {name} (plain or .gz) in {folder}: expected a 10x folder")


def read_part(path, read):
    """read(path), of one of the files of a 10x folder."""
    try:
        return read(path)
    except (ValueError, OverflowError, OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{path}: not a whole file of this kind ({error}); fetch it again"
        ) from None


def read_market_matrix(path):
    """The sparse matrix of a matrix.mtx, plain or .gz.

    scipy's reader ends the process at a zero byte, and at a number with which the file breaks off.
    """
    open_file = gzip.open if path.suffix == ".gz" else open
    with open_file(path, "rb") as file:
        content = file.read()
    if b"\0" in content:
        raise ValueError("a zero byte in it")
    return scipy.io.mmread(io.BytesIO(content + b"\n"))


def check_counts(table, path):
    """InputError unless the counts are finite whole numbers from 0 on."""
    values = table.X.data
    if not np.isfinite(values).all() or (values < 0).any() or (values != np.rint(values)).any():
        raise InputError(
            f"{path}: holds values that are no counts (negative, fractional or NaN); "
            "raw counts are needed"
        )


def align_genes(tables):
    """The spots of all slides and the genes that they share, as one AnnData.

    Genes are matched by id and stand in the first slide's order; var_names are their symbols, made
    unique.
    """
    ids = tables[0].var_names
    shared = ids[np.all([ids.isin(table.var_names) for table in tables], axis=0)]
    if not len(shared):
        raise InputError("the slides share no gene id: are they of one species and one annotation?")
    counts = anndata.concat([table[:, shared] for table in tables], join="inner")
    symbols = tables[0][:, shared].var["name"].to_numpy()
    counts.var = pd.DataFrame({"gene_ids": shared, "name": symbols}, index=shared)
    name_genes(counts)
    most = max(table.n_vars for table in tables)
    message = f"{len(shared):,} genes in every slide"
    if most > len(shared):
        message += f" (of up to {most:,})"
    print(message)
    return counts


def name_genes(counts):
    """Make the symbols in var["name"] the var_names, each of them unique."""
    twice = counts.var["name"][counts.var["name"].duplicated()]
    if len(twice):
        print(
            f"{len(twice)} gene names stand for several ids and were made unique, "
            f"as {twice.iloc[0]}-1"
        )
    counts.var_names = counts.var["name"].astype(str).to_numpy()
    counts.var_names_make_unique()
    clash = sorted(set(common.ID_COLUMNS) & set(counts.var_names))
    if clash:
        raise InputError(
            f"a gene is called {clash[0]!r}, as a column of dataset.csv: "
            "rename it in the features table"
        )


# -------------------------------------------------------------------------------- spots


def place_spots(slide):
    """(positions as read_positions gives them, Thumbnail or None) of a slide.

    A slide without positions gets a grid. The thumbnail on which its tissue was found is returned
    then, since to make one takes all pixels of the slide.
    """
    if slide.positions is not None:
        return read_positions(slide.positions), None
    thumbnail = read_thumbnail(slide)
    return lay_grid(slide, thumbnail), thumbnail


def read_spots(slide, positions):
    """The spots of a slide as AnnData, by array_row and array_col; without a matrix X is None.

    obs holds positions, tissue_index, donor, barcode, pitch (px), block and, with a matrix,
    n_counts. Spots without counts are left out; without a matrix, those that are not in_tissue.
    """
    if slide.matrix is None:
        inside = positions[positions["in_tissue"] == 1]
        if inside.empty:
            raise InputError(f"{slide.positions}: no spot is in_tissue")
        table = anndata.AnnData(obs=inside)
    else:
        table = read_counts(slide, positions)
    table = table[np.lexsort([table.obs["array_col"], table.obs["array_row"]])].copy()
    table.obs["tissue_index"] = slide.tissue_index
    table.obs["donor"] = slide.donor
    table.obs["pitch"] = pitch = measure_pitch(table.obs)
    table.obs["block"] = lay_blocks(table.obs, pitch, slide.tissue_index)
    table.obs["barcode"] = table.obs_names
    table.obs_names = [f"{slide.tissue_index}_{barcode}" for barcode in table.obs_names]
    return table


def read_counts(slide, positions):
    """The matrix of a slide, checked, with positions in obs; spots without counts are left out."""
    table = read_matrix(slide.matrix)
    check_counts(table, slide.matrix)
    lost = table.obs_names.difference(positions.index)
    if len(lost):
        raise InputError(
            f"{slide.positions}: no position for barcode {lost[0]} of {slide.matrix} "
            f"({len(lost)} such barcodes): the two files are not of one slide"
        )
    table.obs = positions.loc[table.obs_names]
    # Over all genes of the matrix, also those that other slides lack.
    table.obs["n_counts"] = np.asarray(table.X.sum(1)).ravel()
    empty = (table.obs["n_counts"] == 0).to_numpy()
    if empty.all():
        raise InputError(f"{slide.matrix}: no spot has a count")
    if empty.any():
        print(
            f"slide {slide.tissue_index}: {empty.sum()} spots without counts are left out, "
            f"as {table.obs_names[empty][0]}"
        )
        table = table[~empty].copy()
    return table


def lay_grid(slide, thumbnail):
    """A hexagonal grid over a slide's tissue, as read_positions gives positions.

    Spots are SPOT_PITCH um apart and numbered as on Visium: row + column is even.
    """
    height, width = thumbnail.slide_shape
    pitch = SPOT_PITCH / slide.um_per_px  # px; rows are 0.866 pitches apart
    grid = np.mgrid[0 : int(height / pitch / 0.866) + 1, 0 : int(2 * width / pitch) + 1]
    even = grid.sum(axis=0) % 2 == 0
    rows, columns = grid[0][even], grid[1][even]
    table = pd.DataFrame({"in_tissue": 1, "array_row": rows, "array_col": columns})
    table["pxl_row"] = np.rint((rows + 0.5) * pitch * 0.75**0.5).astype(int)
    table["pxl_col"] = np.rint((columns + 1) * pitch / 2).astype(int)
    table.index = pd.Index([f"{row}x{col}" for row, col in zip(rows, columns, strict=True)])
    table = table[(table["pxl_row"] < height) & (table["pxl_col"] < width)]
    step = thumbnail.step
    tissue = find_tissue(thumbnail.pixels(), step * slide.um_per_px)
    table = table[tissue[table["pxl_row"] // step, table["pxl_col"] // step]]
    if table.empty:
        raise InputError(
            f"{slide.image}: no tissue found (saturation); give the positions of its spots"
        )
    return table.rename_axis("barcode")


def find_tissue(image, um_per_px):
    """(h, w) bool: saturation above Otsu's threshold, of an image (h, w, 3) uint8.

    Holes and specks of less than four spots' area are undone. What is nearly black was not scanned.
    """
    high, low = image.max(2).astype(np.float64), image.min(2)
    # Of nearly black, saturation is the noise of the camera: tissue is never so dark.
    saturation = np.where(high < DARK, 0, (high - low) / np.maximum(high, 1))
    saturation = scipy.ndimage.median_filter(saturation, 5)
    if np.ptp(saturation) == 0:
        return np.zeros(saturation.shape, bool)
    tissue = saturation > threshold_otsu(saturation)
    least = int(4 * (SPOT_PITCH / um_per_px) ** 2)
    return remove_small_holes(remove_small_objects(tissue, max_size=least), max_size=least)


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
    return open_picture(path)


def check_orientation(path, orientation):
    """InputError for a tag that has viewers turn or mirror the image.

    Nobody knows whether positions were read off the image as it lies in the file or as it is shown.
    """
    if orientation not in (None, 0, 1):
        raise InputError(
            f"{path}: its Orientation tag {orientation} turns or mirrors it: save it as it is to "
            "be seen, without the tag, and have the positions fit its pixels"
        )


Image.MAX_IMAGE_PIXELS = 4_000_000_000  # a whole slide is no decompression bomb


def open_picture(path):
    """A JPEG or PNG, which gives no access to its parts and is decoded whole."""
    try:
        with Image.open(path) as image:
            check_orientation(path, image.getexif().get(ExifTags.Base.Orientation))
            if "transparency" in image.info:  # of one colour, or of colours of a palette
                image = image.convert("RGBA")
            if image.mode not in ("RGB", "RGBA", "L", "LA"):
                raise InputError(
                    f"{path}: a {image.mode} image; expected 8-bit RGB, RGBA or grey: convert it"
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
    try:
        yield
    except (*kinds, struct.error, OSError, RuntimeError) as error:
        raise InputError(
            f"{path}: not a readable TIFF ({error}); fetch or export it again"
        ) from None


def find_slide(path, tiff):
    """The pages of an open TIFF that are its slide: one, or one each for red, green and blue.

    Raises InputError where they are cut short, or no 8-bit RGB or grey image.
    """
    series = choose_series(tiff)
    check_tiff(path, tiff, series.keyframe)
    if len(series.pages) == 1:
        return [series.keyframe]
    return order_colours(path, tiff, series)


def choose_series(tiff):
    """The largest image of an open TIFF, in colour where one is: labels may stand before it.

    A grey image is taken where those in colour are so much smaller that they are its thumbnails.
    """
    largest = max(tiff.series, key=count_pixels)
    coloured = [
        series
        for series in tiff.series
        if is_coloured(series) and 4 * count_pixels(series) >= count_pixels(largest)
    ]
    return max(coloured, key=count_pixels, default=largest)


def count_pixels(series):
    """px of an image of a TIFF at its full resolution."""
    return series.keyframe.imagelength * series.keyframe.imagewidth


def is_coloured(series):
    """Whether an image of a TIFF has colours, which may be three grey pages."""
    return len(series.pages) == 3 or series.keyframe.photometric.name not in GREY


GREY = ("MINISBLACK", "MINISWHITE")


def check_tiff(path, tiff, page):
    """InputError for a TIFF that is cut short, and for a page that does not come out as RGB."""
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
    return page.is_svs and page.compression == tifffile.COMPRESSION.APERIO_JP2000_YCBC


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
    names = read_channel_names(tiff, page)
    colours = [name[:1] for name in names if name in ("red", "green", "blue", "r", "g", "b")]
    if sorted(colours) == ["b", "g", "r"]:
        return [pages[colours.index(colour)] for colour in "rgb"]
    if all(re.fullmatch(r"[\W_]*(channel|ch|c)?[\W_\d]*", name) for name in names):
        return pages  # Numbers, or nothing, for names: as most programs order them.
    raise InputError(
        f"{path}: its channels are {', '.join(names)}; expected red, green and blue: "
        "export the H&E image as 8-bit RGB"
    )


def read_channel_names(tiff, page):
    """Names, in lower case, of the channels of the page's image in OME's metadata."""
    pixels = find_ome_pixels(tiff, page)
    if pixels is None:
        return []
    return [channel.get("Name", "").lower() for channel in pixels.iterfind("{*}Channel")]


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


def choose_conversion(path, page):
    """The function that makes RGB of the pixels (h, w, channels) of a page, or of planes of it."""
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


def convert_ycbcr(pixels):
    """(h, w, 3) uint8 RGB of YCbCr as in JPEG."""
    size = pixels.shape[1::-1]
    return np.asarray(Image.frombytes("YCbCr", size, pixels.tobytes()).convert("RGB"))


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
    tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
    pixels, _, shape = page.decode(data or None, number, **tables)
    if pixels is None:  # a sparse file holds no background
        return np.full(shape[1:], 255, page.dtype)
    return convert_ycbcr(pixels[0]) if holds_ycbcr(page) else pixels[0]


def read_resolution(path):
    """um per px that a TIFF states; InputError where it states none that a slide can have."""
    found = 0.0
    try:
        with tifffile.TiffFile(path) as tiff:
            found = find_resolution(tiff)
    except (tifffile.TiffFileError, ValueError, TypeError, ZeroDivisionError, OSError):
        pass  # A JPEG or PNG, or tags that say nothing: it is asked for below.
    if not 0.05 < found < 20:
        raise InputError(
            f"{path}: its resolution is not known (tags say {found:g} um/px): give --um-per-px"
        )
    return found


UM_PER_UNIT = {
    "nm": 1e-3,
    "µm": 1.0,
    "um": 1.0,
    "micron": 1.0,
    "microns": 1.0,
    "mm": 1e3,
    "cm": 1e4,
    "m": 1e6,
    "inch": 25_400.0,
    "in": 25_400.0,
}
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
    stated = re.search(r"MPP ?= ?(\d+[.,]?\d*)", page.description)
    if stated:
        return float(stated[1].replace(",", "."))
    if "XResolution" not in page.tags:
        return 0.0
    unit = RESOLUTION_UNITS.get(page.tags.valueof("ResolutionUnit", default=2), "")
    if tiff.is_imagej:
        unit = tiff.imagej_metadata.get("unit", unit)
    pixels, units = page.tags["XResolution"].value
    return um_of(unit) * units / pixels


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

    def _square_sides(self, length):
        """px of the squares along `length` px of the slide; the last one may be cut."""
        return np.diff(np.arange(0, length, self.step), append=length)

    def pixels(self):
        """(h, w, 3) uint8."""
        height, width = self.slide_shape
        areas = np.outer(self._square_sides(height), self._square_sides(width))
        return np.rint(self.sums / areas[:, :, None]).astype(np.uint8)


def thumbnail_step(slide):
    """px of a slide a px of its thumbnail."""
    return max(1, round(THUMBNAIL_UM / slide.um_per_px))


def read_thumbnail(slide):
    """The Thumbnail of a slide, of which all pixels are read."""
    image = open_image(slide.image)
    thumbnail = Thumbnail(image.shape, thumbnail_step(slide))
    for pixels, top, left in image.regions(lambda box: True):
        thumbnail.add(pixels, top, left)
    return thumbnail


def read_patches(path, spots, patches, step=None):
    """Fill patches (n, S, S, 3) uint8 with the pixels around each spot, white beyond the border.

    Returns (SlideImage, Thumbnail or None). With a `step`, all pixels are read and the thumbnail is
    made of them as well; without one, only those that patches need are read. Raises InputError
    where a spot's centre lies outside the image.
    """
    image = open_image(path)
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
    """InputError where the centre of a spot lies outside an image of (height, width)."""
    centres = spots[PLACE].to_numpy()
    outside = ((centres < 0) | (centres >= shape)).any(axis=1)
    if not outside.any():
        return
    barcode = spots["barcode"].iloc[np.flatnonzero(outside)[0]]
    cause = "these the positions of this full-resolution image"
    if (centres[:, ::-1] < shape).all():
        cause = "pxl_row and pxl_col swapped"
    raise InputError(
        f"{path}: the centre of spot {barcode} lies outside the image "
        f"({shape[0]} x {shape[1]} px); are {cause}?"
    )


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
    """How many patches of `side` px reach over the border of an image of (height, width)."""
    corners = spots[PLACE].to_numpy() - side // 2
    return int(((corners < 0) | (corners + side > shape)).any(axis=1).sum())


def read_resampled(slide, spots, patches, um_per_px, scratch, step=None):
    """As read_patches, of patches (n, S, S, 3) whose pixels are um_per_px wide; 0: the slide's own.

    Larger or smaller patches are read into a file in the folder `scratch`, and resized.
    Returns (SlideImage, Thumbnail or None, number of patches over the border).
    """
    finer = slide.um_per_px / um_per_px if um_per_px else 1.0
    size = patches.shape[1]
    if 0.99 < finer < 1.01:
        image, thumbnail = read_patches(slide.image, spots, patches, step)
        return image, thumbnail, count_over_border(spots, image.shape, size)
    if finer > 2:
        print(
            f"warning: {slide.image} is {finer:.0f} times as coarse as the patches made of it: "
            "its detail is not there"
        )
    side = max(1, round(size * um_per_px / slide.um_per_px))
    native = map_scratch(scratch, (len(spots), side, side, 3))
    image, thumbnail = read_patches(slide.image, spots, native, step)
    for part in np.array_split(np.arange(len(spots)), math.ceil(len(spots) / 64)):
        patches[part] = resize(native[part], size)
    how = f"{image.how}; resampled from {slide.um_per_px:g} to {um_per_px:g} um/px"
    return image._replace(how=how), thumbnail, count_over_border(spots, image.shape, side)


def resize(patches, size):
    """(n, S, S, 3) uint8 -> (n, size, size, 3), with antialiasing."""
    images = torch.from_numpy(patches).permute(0, 3, 1, 2)
    images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
    return images.permute(0, 2, 3, 1).numpy()


def map_scratch(folder, shape):
    """A uint8 array in a file of `folder` without a name, which goes when the array does.

    Its disk space is taken now: to be written through memory, a full disk would kill the process.
    """
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.truncate(math.prod(shape))
        common.reserve_disk(Path(file.name))
        return np.memmap(file, np.uint8, "r+", shape=shape)


def warn_of_swap(slide, spots, patches, shape):
    """Print a warning where pxl_row and pxl_col look swapped.

    Swapped, the array lies mirrored on the image; the spots would then cover its tissue, which has
    colour, better the other way round.
    """
    if not lies_mirrored(spots) or (spots[["pxl_col", "pxl_row"]].to_numpy() >= shape).any():
        return
    some = np.linspace(0, len(spots) - 1, min(len(spots), SWAP_SAMPLE)).astype(int)
    swapped = spots.iloc[some].rename(columns={"pxl_row": "pxl_col", "pxl_col": "pxl_row"})
    others = np.empty((len(some), *patches.shape[1:]), np.uint8)
    read_patches(slide.image, swapped, others)
    here, there = mean_saturation(patches[some]), mean_saturation(others)
    if there > 1.25 * here:
        print(
            f"warning: {slide.positions}: pxl_row and pxl_col look swapped: the other way round, "
            f"the spots' mean saturation would be {there:.2f} and not {here:.2f}"
        )


def lies_mirrored(spots):
    """Whether the affine map from array_col, array_row to pxl_col, pxl_row holds a reflection."""
    array = np.column_stack([spots[["array_col", "array_row"]], np.ones(len(spots))])
    places = spots[["pxl_col", "pxl_row"]].to_numpy(np.float64)
    affine = np.linalg.lstsq(array.astype(np.float64), places)[0]
    return np.linalg.det(affine[:2]) < 0


def mean_saturation(patches):
    """From 0 to 1: the largest less the smallest of red, green and blue."""
    return np.ptp(patches, axis=3).mean() / 255
