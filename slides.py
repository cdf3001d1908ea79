"""Files to spots and pixels: the one place where slides, positions and counts are read.

manifest -> positions -> counts -> spots -> pixels -> patches

Shapes: n spots, patches (n, S, S, 3) uint8 RGB, images (height, width, 3) uint8 RGB. Places on a
slide are rows and columns in px of its image. What cannot be read raises InputError.
"""

import atexit
import codecs
import csv
import functools
import gzip
import io
import math
import os
import re
import shutil
import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import anndata
import h5py
import numpy as np
import pandas as pd
import polars
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
import shell
from common import PATCH_SIZE, POSITION_COLUMNS
from shell import InputError

SPOT_PITCH = 100.0  # um between the spots of Visium, and of a grid over a slide without positions
PITCHES = (SPOT_PITCH, 200.0)  # um, of Visium and of its forerunner ST
MOST_GENOMES = 4  # in one matrix; more prefixes than these are parts of names
SAME_TISSUE = 0.95  # of the spots; of four slides of one liver, two shared up to 0.92
BLOCK_WIDTH = 5  # pitches
THUMBNAIL_UM = 8.0  # um a px of a thumbnail, about
BAND = 512  # rows of an image that lies open as one array are handed on so many at a time
DARK = 50  # of 255, in the brightest channel: below it nothing was scanned
SWAP_SAMPLE = 64  # spots that are looked at for pxl_row and pxl_col being swapped
PLACE = ["pxl_row", "pxl_col"]
FEATURE_SPELLINGS = {
    "id": ("id", "gene_id", "gene_ids", "ensembl", "ensembl_id", "feature_id"),
    "name": ("name", "gene_name", "symbol", "gene_symbol", "feature_name"),
    "kind": ("feature_type", "feature_types", "kind", "type"),
}
GZIP = b"\x1f\x8b"  # how a gzipped file begins
# How the columns of positions are called by Space Ranger, its readers in R and Python, and Seurat.
POSITION_SPELLINGS = {
    "barcode": ("barcode", "barcodes", "barcode_id", "cell", "cell_id", "spot", "spot_id"),
    "in_tissue": ("in_tissue", "intissue", "tissue"),
    "array_row": ("array_row", "row"),
    "array_col": ("array_col", "col"),
    "pxl_row": ("pxl_row_in_fullres", "pxl_row", "row_pxl", "pixel_row", "imagerow", "image_row"),
    "pxl_col": ("pxl_col_in_fullres", "pxl_col", "col_pxl", "pixel_col", "imagecol", "image_col"),
}


# -------------------------------------------------------------------------------- tables

WARNINGS = []  # of this start of a script, in the order in which warn() printed them


def warn(text):
    """Print one line `warning: file: value: fix`, and keep it for the report."""
    line = " ".join(text.split())
    print(f"warning: {line}")
    WARNINGS.append(line)


def read_bytes(path):
    """The bytes of a file, unpacked where they are gzipped, whatever the file is called."""
    content = path.read_bytes()
    return gzip.decompress(content) if content.startswith(GZIP) else content


@functools.cache
def scratch_folder():
    """A folder that goes when the process ends."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def unpack(path):
    """The path of a file that can be read anywhere: a gzipped one is unpacked, once.

    It is unpacked to the system's folder for temporary files, which TMPDIR names.
    """
    with open(path, "rb") as file:
        if file.read(len(GZIP)) != GZIP:
            return path
    found = path.stat()
    return unpack_to_scratch(path.absolute(), found.st_size, found.st_mtime_ns)


@functools.cache
def unpack_to_scratch(path, size, changed):
    """The path of the unpacked file, whose `size` and time of change tell it from an older one."""
    folder = Path(tempfile.mkdtemp(dir=scratch_folder()))
    plain = folder / path.name.removesuffix(".gz")
    print(f"unpack {path} to {folder}", flush=True)
    try:
        with gzip.open(path) as packed, open(plain, "wb") as file:
            shutil.copyfileobj(packed, file, 2**24)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a whole .gz file ({error}); fetch it again") from None
    return plain


def decode_text(content):
    """Bytes as text: UTF-8, UTF-16 with its mark, or what spreadsheets write in Western Europe."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252")


def find_separator(text):
    """The character that separates the cells of a table; a tab for a table of one column.

    It is that of the first line, or of the second where R quotes row names that have no head.
    """
    first, second, *_ = [*text.split("\n", 2), ""]
    lines = [first, second] if second.startswith('"') else [first]
    for line in lines:
        outside_quotes = re.sub(r'"[^"]*"', "", line.strip())
        for separator in ("\t", ";", ",", " "):
            if separator in outside_quotes:
                return separator
    return "\t"  # The cells of one column may hold commas.


def split_cells(path):
    """(rows of cells, separator) of a table: texts without blanks around them, no empty row."""
    try:
        text = decode_text(read_bytes(path)).lstrip()
        separator = find_separator(text)
        lines = csv.reader(
            io.StringIO(text, newline=None), delimiter=separator, skipinitialspace=True
        )
        rows = [[cell.strip() for cell in line] for line in lines]
    except (ValueError, csv.Error, OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a table of text ({error}); export it as CSV") from None
    rows = [row for row in rows if any(row)]
    if not rows:
        raise InputError(f"{path}: holds no line")
    return rows, separator


def normalise_name(cell):
    """A column's name in lower case, with underscores for all that is no letter or number."""
    return re.sub(r"[\W_]+", "_", cell.lower()).strip("_")


def counts_up(cells):
    """Whether these are the names or numbers that R and pandas give by default: 0, 1, 2, or V1."""
    numbers = [re.sub(r"^(V|X|Unnamed: )(?=\d+$)", "", cell) for cell in cells]
    first = 1 if numbers[:1] == ["1"] else 0
    return numbers == [str(first + place) for place in range(len(numbers))]


def read_table(path, spellings, row_names=None):
    """A table of texts, with the columns that `spellings` {column: (spelling, ...)} name.

    Columns are found by their names where the first line holds a known one, whatever their order,
    the first spelling before the others; else by their places. An unnamed first column, as R and
    pandas write row names, is `row_names` where the table has no other column of that name, and is
    left out otherwise. Other columns keep their names, or are called by their numbers. attrs hold
    "named" and "separator". Commas, semicolons, tabs and blanks separate; quotes, byte order marks
    and .gz are seen to. Raises InputError.
    """
    rows, separator = split_cells(path)
    known = {spelling for column in spellings for spelling in spellings[column]}
    named = any(normalise_name(cell) in known for cell in rows[0])
    if named:
        names, rows = rows[0], rows[1:]
        if rows and all(len(row) == len(names) + 1 for row in rows):
            names = ["", *names]  # R's write.table gives row names no head
        columns = name_columns(path, names, spellings, row_names)
    else:
        if holds_no_names(rows[0]) and len(rows) > 1:
            rows = rows[1:]
        columns = number_columns(rows, list(spellings))
    table = pd.DataFrame([fit_row(path, row, len(columns)) for row in rows], columns=columns)
    table = table.drop(columns="", errors="ignore").astype(object)
    table.attrs = {"named": named, "separator": separator}
    return table


def read_parquet(path, spellings):
    """A .parquet as read_table gives a table with a head; numbers stay numbers."""
    try:
        table = polars.read_parquet(io.BytesIO(read_bytes(path)))
    except (OSError, EOFError, zlib.error, polars.exceptions.PolarsError) as error:
        cause = str(error).splitlines()[0]
        raise InputError(f"{path}: not a whole .parquet ({cause}); fetch it again") from None
    if not table.columns:
        raise InputError(f"{path}: holds no column")
    columns = name_columns(path, table.columns, spellings, None)
    cells = [column.to_numpy() for column in table.iter_columns()]
    table = pd.DataFrame(dict(zip(columns, cells, strict=True)))
    table.attrs = {"named": True, "separator": "\t"}
    return table


def holds_no_names(heads):
    """Whether a first line is the head that R or pandas give a table without names."""
    heads = heads if heads[0] else heads[1:]
    return len(heads) > 1 and counts_up(heads)


def name_columns(path, names, spellings, row_names):
    """What the columns under these heads are called; "" for row names."""
    found = [normalise_name(name) for name in names]
    columns = list(names)
    for column, allowed in spellings.items():
        spelling = next((spelling for spelling in allowed if spelling in found), None)
        if spelling is None:
            continue
        if found.count(spelling) > 1:
            raise InputError(f"{path}: the column {spelling} stands there twice")
        columns[found.index(spelling)] = column
    if found[0] in ("", "unnamed_0"):
        columns[0] = row_names if row_names and row_names not in columns else ""
    return columns


def number_columns(rows, columns):
    """What the columns of a table without a head are called: by their places, "" for row numbers.

    Those beyond the known `columns` are called by their numbers.
    """
    width = len(rows[0])
    if width > len(columns) and counts_up([row[0] for row in rows]):
        columns = ["", *columns]
    further = [str(place + 1) for place in range(len(columns), width)]
    return [*columns, *further][:width]


def fit_row(path, row, width):
    """A row with as many cells as the table has columns; those that it lacks are empty."""
    if any(row[width:]):
        raise InputError(
            f"{path}: the line of {row[0]!r} has {len(row)} cells; expected {width} as in the first"
        )
    return row[:width] + [""] * (width - len(row))


def parse_numbers(texts, separator):
    """Texts as float64, with a point or a comma before decimals; NaN for what is no number.

    Columns of numbers, as a .parquet has, are taken as they are. Where commas separate the cells,
    1,234 in quotes may be a thousand and is no number here.
    """
    if pd.api.types.is_numeric_dtype(texts):
        return texts.astype(np.float64)
    doubtful = texts.str.fullmatch(r"-?[1-9]\d{0,2}(,\d{3})+")
    numbers = pd.to_numeric(texts.str.replace(",", ".", regex=False), errors="coerce")
    return numbers.astype(np.float64).mask(doubtful & (separator == ","))


# -------------------------------------------------------------------------------- manifest


@dataclass(frozen=True)
class Slide:
    """One slide, as a row of slides.csv names it."""

    tissue_index: int
    name: str
    donor: str
    image: Path  # or an .h5 of HEST-1k's patches
    um_per_px: float
    positions: Path | None  # None: a grid is laid over the tissue
    matrix: Path | None  # a 10x folder or .h5, or an .h5ad; None: there are no counts


NO_FILE = ("", "NA", "NaN", "nan", "None")  # an empty cell, as R and pandas may write it
MANIFEST = [field.name for field in fields(Slide)]  # the columns of slides.csv


def read_manifest(root):
    """The list of slides that root/slides.csv names, by tissue_index; their paths are absolute.

    Raises InputError for a missing column, a value out of range, or a file that is missing or lies
    outside `root`.
    """
    path = shell.find_manifest(root)
    table = read_table(path, {column: (column,) for column in MANIFEST})
    missing = [column for column in MANIFEST if column not in table or not table.attrs["named"]]
    if missing:
        raise InputError(
            f"{path}: the column {missing[0]} is missing; expected {', '.join(MANIFEST)}"
        )
    separator = table.attrs["separator"]
    table = table[MANIFEST].copy()
    for column in ("tissue_index", "um_per_px"):
        table[column] = parse_numbers(table[column], separator)
    check_manifest_numbers(path, table)
    check_manifest_names(path, table)
    table["tissue_index"] = table["tissue_index"].astype(int)
    rows = table.sort_values("tissue_index").to_dict("records")
    return [read_manifest_row(root, row) for row in rows]


def warn_of_magnifications(manifest):
    """Warn where slides of one data root differ in um per px, and so in what a patch shows."""
    finest = min(manifest, key=lambda slide: slide.um_per_px)
    coarsest = max(manifest, key=lambda slide: slide.um_per_px)
    if coarsest.um_per_px < 1.05 * finest.um_per_px:
        return
    warn(
        f"slides.csv: um_per_px is {finest.um_per_px:g} of {finest.name} and "
        f"{coarsest.um_per_px:g} of {coarsest.name}, so that patches show "
        f"{PATCH_SIZE * finest.um_per_px:.0f} and {PATCH_SIZE * coarsest.um_per_px:.0f} um: "
        f"give --um-per-px {coarsest.um_per_px:g}"
    )


def check_manifest_names(path, table):
    """InputError unless every slide has a name of its own, and a donor."""
    names, donors = table["name"], table["donor"]
    if (names == "").any() or names.duplicated().any():
        raise InputError(f"{path}: every slide needs a name of its own")
    if (donors == "").any():
        raise InputError(
            f"{path}: slide {names[donors == ''].iloc[0]} has no donor: give every person a name, "
            "since slides of one person are left out together"
        )


def check_manifest_numbers(path, table):
    """InputError unless the slides have different whole numbers, and resolutions that can be."""
    numbers, resolutions = table["tissue_index"], table["um_per_px"]
    whole = (numbers == np.rint(numbers)) & (numbers.abs() < 2**31)
    if table.empty or not whole.all() or numbers.duplicated().any():
        raise InputError(
            f"{path}: tissue_index must be a different whole number for every slide, "
            "and one at least"
        )
    if not resolutions.between(0.05, 20).all():
        raise InputError(f"{path}: um_per_px must be a number from 0.05 to 20 for every slide")


def read_manifest_row(root, row):
    """A Slide from a row of slides.csv, a dict by column."""
    paths = {column: find_named(root, row, column) for column in ("image", "positions", "matrix")}
    if paths["image"] is None:
        raise InputError(f"{root / 'slides.csv'}: slide {row['tissue_index']} has no image")
    if paths["matrix"] is not None and paths["matrix"].suffix == ".zarr":
        raise InputError(
            f"{paths['matrix']}: a .zarr folder is not read: convert SpatialData with "
            "spatialdata_io.experimental.to_legacy_anndata and its write_h5ad, and name the .h5ad"
        )
    if paths["positions"] is None and is_anndata(paths["matrix"]):
        paths["positions"] = paths["matrix"]  # It holds them in obsm["spatial"].
    if paths["positions"] is None and paths["matrix"] is not None:
        raise InputError(
            f"{root / 'slides.csv'}: slide {row['tissue_index']} has a matrix and no positions: "
            "name them, or leave the matrix out"
        )
    return Slide(
        tissue_index=row["tissue_index"],
        name=row["name"],
        donor=row["donor"],
        um_per_px=row["um_per_px"],
        **paths,
    )


def find_named(root, row, column):
    """The absolute path in a column of a row of slides.csv; None where the column is empty."""
    value, manifest = row[column], root / "slides.csv"
    if value in NO_FILE:
        return None
    if not (root / value).exists():
        value = value.replace("\\", "/")  # as Windows writes paths
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


# -------------------------------------------------------------------------------- positions


def read_positions(path):
    """Space Ranger's positions, with or without a header: a table by barcode.

    Its columns are in_tissue, array_row, array_col, pxl_row and pxl_col. Named columns may stand in
    any order. The file may be of text, a .parquet as Visium HD has, or an .h5ad (see
    read_anndata_positions).
    """
    if is_anndata(path):
        table = read_anndata_positions(path)
    else:
        if path.name.removesuffix(".gz").endswith(".parquet"):
            table = read_parquet(path, POSITION_SPELLINGS)
        else:
            table = read_table(path, POSITION_SPELLINGS, row_names="barcode")
        check_position_columns(path, table)
    return parse_positions(path, table[POSITION_COLUMNS].copy(), table.attrs["separator"])


def parse_positions(path, table, separator):
    """Positions by barcode, in whole numbers, of a table of texts or numbers with
    POSITION_COLUMNS.
    """
    truths = {"true": "1", "false": "0"}  # of R and pandas
    table["in_tissue"] = table["in_tissue"].map(lambda value: truths.get(str(value).lower(), value))
    for column in POSITION_COLUMNS[1:]:
        numbers = parse_numbers(table[column], separator)
        unknown = ~(numbers.abs() < 2**31)
        if unknown.any():
            barcode, text = table.loc[unknown, ["barcode", column]].iloc[0]
            raise InputError(
                f"{path}: the position of barcode {barcode} is not a number ({column} {text!r})"
            )
        table[column] = np.rint(numbers).astype(np.int64)
    odd = table[~table["in_tissue"].isin([0, 1])]
    if len(odd):
        barcode, value = odd[["barcode", "in_tissue"]].iloc[0]
        raise InputError(f"{path}: in_tissue of barcode {barcode} is {value}; expected 0 or 1")
    check_unique(table["barcode"], "barcode", path)
    return table.set_index("barcode")


def read_anndata_positions(path):
    """The positions in an .h5ad, as a table of texts with POSITION_COLUMNS.

    obsm["spatial"] holds x, y in px of the full-resolution image. obs may hold array_row and
    array_col, and in_tissue; a spot of which nothing is said lies in the tissue.
    """
    spots = read_anndata(path, backed="r")
    spots.file.close()  # Of the positions nothing is left in it.
    if "spatial" not in spots.obsm:
        raise InputError(
            f'{path}: no obsm["spatial"] with x, y in px of the full-resolution image: add it, or '
            "name a file of positions in slides.csv"
        )
    centres = np.asarray(spots.obsm["spatial"], np.float64)
    if centres.ndim != 2 or centres.shape[1] != 2:
        raise InputError(
            f'{path}: obsm["spatial"] is {centres.shape}; expected ({spots.n_obs}, 2), x and y'
        )
    unknown = ~np.isfinite(centres).all(axis=1)
    if unknown.any():
        barcode, (x, y) = spots.obs_names[unknown][0], centres[unknown][0]
        raise InputError(
            f'{path}: the position of barcode {barcode} is not a number (obsm["spatial"] {x}, {y})'
        )
    table = pd.DataFrame({"barcode": spots.obs_names, "in_tissue": 1})
    table["pxl_col"], table["pxl_row"] = centres.T
    if {"array_row", "array_col"} <= set(spots.obs):
        table["array_row"] = spots.obs["array_row"].to_numpy()
        table["array_col"] = spots.obs["array_col"].to_numpy()
    else:
        number_rows_and_columns(table)
    if "in_tissue" in spots.obs:
        table["in_tissue"] = spots.obs["in_tissue"].to_numpy()
    table = table.astype(str)
    table.attrs["separator"] = "\t"
    return table


def number_rows_and_columns(table):
    """Give spots an array_row and an array_col by their places.

    They count half pitches, as Visium's columns do, so that no two spots get the same ones.
    """
    step = measure_pitch(table) / 2
    for column, place in (("array_row", "pxl_row"), ("array_col", "pxl_col")):
        table[column] = np.rint((table[place] - table[place].min()) / step)


def check_position_columns(path, table):
    """InputError unless a table read by read_table has all columns of positions, and no doubt."""
    expected = ", ".join(POSITION_COLUMNS)
    if not table.attrs["named"]:
        if table.empty or not any(map(is_number, table.iloc[0])):
            heads = ", ".join(table.iloc[0]) if len(table) else ""
            raise InputError(f"{path}: the columns {heads} are not known; expected {expected}")
        if table.shape[1] != len(POSITION_COLUMNS):
            raise InputError(f"{path}: {table.shape[1]} columns; expected {expected}")
        return
    missing = [column for column in POSITION_COLUMNS if column not in table]
    if missing:
        others = [str(column) for column in table if column not in POSITION_COLUMNS]
        hint = ""
        if others:
            hint = f" among {', '.join(others)} (x and y are not taken: which is the row?)"
        raise InputError(f"{path}: no column {missing[0]}{hint}; expected {expected}")


def is_number(text):
    """Whether a cell holds a number."""
    return bool(re.fullmatch(r"[-+]?\d+([.,]\d+)?([eE][-+]?\d+)?", text))


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


def read_matrix(path, genome=""):
    """Counts of one slide from a 10x folder or .h5, or an .h5ad, as AnnData (spots x genes, CSR).

    var_names are gene ids, var["name"] the symbols. Of several genomes in one matrix, `genome`
    chooses one; without it, genes of all are taken, and that is warned of.
    """
    return choose_genome(read_matrix_file(path), path, genome)


def read_matrix_file(path):
    """As read_matrix, of the genes of all genomes."""
    if is_anndata(path):
        return read_anndata_matrix(path)
    if path.is_file():
        return read_h5_matrix(path)
    return read_matrix_folder(path)


def choose_genome(table, path, genome):
    """The genes of one genome, without the prefix that 10x sets before ids and symbols then."""
    genomes = find_genomes(table)
    counted = genomes.value_counts()
    found = " and ".join(f"{name} ({count} genes)" for name, count in counted.items())
    if not genome:
        if len(counted) > 1:
            warn(f"{path}: {found} are read together: choose one with --genome {counted.index[0]}")
        return table
    if genome not in counted:
        raise InputError(f"{path}: --genome {genome}: it holds {found or 'genes of one, unnamed'}")
    table = table[:, (genomes == genome).to_numpy()].copy()
    prefix = rf"^{re.escape(genome)}_+"
    table.var["name"] = table.var["name"].astype(str).str.replace(prefix, "", regex=True)
    table.var_names = table.var_names.str.replace(prefix, "", regex=True)
    return table


def find_genomes(table):
    """The genome of each gene: as the file says, or by a prefix that ids and symbols share."""
    if "genome" in table.var:
        return table.var["genome"].astype(str)
    ids = pd.Series(table.var_names).str.extract(r"^(.+?)_", expand=False)
    symbols = table.var["name"].reset_index(drop=True).str.extract(r"^(.+?)_", expand=False)
    if not len(ids) or ids.isna().any() or ids.nunique() > MOST_GENOMES or (ids != symbols).any():
        return pd.Series(dtype=str)
    return ids


def read_h5_matrix(path):
    """A filtered_feature_bc_matrix.h5, as read_matrix gives it."""
    import scanpy  # Here, because numba takes seconds to load.

    try:
        # Names that several genes share are warned of; share_genes makes them unique.
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            table = scanpy.read_10x_h5(unpack(path), gex_only=False)
    except InputError:
        raise
    except Exception as error:  # h5py raises what it likes; the cause goes into the message
        raise InputError(f"{path}: not a 10x filtered_feature_bc_matrix.h5 ({error})") from None
    genes = are_genes(table.var)
    if not genes.all():  # Else a copy would double the memory, of Visium HD by 1.5 GB.
        table = table[:, genes].copy()
    check_unique(table.obs_names, "barcode", path)
    check_unique(table.var["gene_ids"], "gene id", path)
    table.var["name"] = table.var_names
    table.var_names = table.var["gene_ids"].astype(str)
    return table


def are_genes(var):
    """(features,) bool: which features of a matrix are genes; CytAssist's hold other kinds too."""
    if "feature_types" not in var:
        return np.ones(len(var), bool)
    return (var["feature_types"] == "Gene Expression").to_numpy()


def is_anndata(path):
    """Whether a path, or None, is that of an .h5ad, plain or gzipped."""
    return path is not None and path.name.removesuffix(".gz").endswith(".h5ad")


def read_anndata(path, backed=None):
    """An .h5ad, plain or gzipped, as it stands there; its barcodes are checked.

    `backed` "r" leaves the counts in the file, which is open then.
    """
    try:
        # Names that stand there twice are refused below, and old formats read as well.
        with warnings.catch_warnings(action="ignore"):
            table = anndata.read_h5ad(unpack(path), backed)
    except InputError:
        raise
    except Exception as error:  # h5py and anndata raise what they like
        raise InputError(f"{path}: not a whole .h5ad of AnnData ({error})") from None
    check_unique(table.obs_names, "barcode", path)
    return table


def read_anndata_matrix(path):
    """The counts in an .h5ad, as read_matrix gives them.

    They are X, or layers["counts"] or raw where X is not of counts. Gene ids are a column of var,
    as gene_ids, or else the var_names; so are the symbols.
    """
    table = choose_counts(read_anndata(path), path)
    var = table.var.set_axis([normalise_name(str(name)) for name in table.var], axis=1)
    genes = are_genes(var)
    if not genes.all():
        table, var = table[:, genes], var[genes]
    ids = find_gene_names(var, ("gene_ids", *FEATURE_SPELLINGS["id"]))
    names = find_gene_names(var, FEATURE_SPELLINGS["name"])
    check_unique(ids, "gene id", path)
    features = pd.DataFrame({"name": names.to_numpy()}, index=ids.to_numpy())
    if "genome" in var:
        features["genome"] = var["genome"].astype(str).to_numpy()
    counts = scipy.sparse.csr_matrix(table.X)
    return anndata.AnnData(counts, obs=pd.DataFrame(index=table.obs_names), var=features)


def choose_counts(table, path):
    """The AnnData whose X is the first of X, layers["counts"] and raw that holds counts.

    Where none does it is the table as it stands, for check_counts to refuse.
    """
    if table.X is not None and holds_counts(table.X):
        return table
    if "counts" in table.layers:
        print(f'{path}: X is not of raw counts: layers["counts"] is taken')
        table.X = table.layers["counts"]
    elif table.raw is not None:
        print(f"{path}: X is not of raw counts: raw is taken")
        table = table.raw.to_adata()
    if table.X is None:
        raise InputError(f"{path}: holds no X; raw counts are needed")
    return table


def find_gene_names(var, spellings):
    """The first whole column of var that is spelt so, as texts; its index where there is none."""
    for spelling in spellings:
        if spelling in var and var[spelling].notna().all():
            return var[spelling].astype(str)
    return pd.Series(var.index.astype(str))


def read_matrix_folder(folder):
    """matrix.mtx, barcodes.tsv and features.tsv or genes.tsv, as read_matrix gives them."""
    paths = find_parts(folder, ("barcodes.tsv",), ("features.tsv", "genes.tsv"), ("matrix.mtx",))
    barcodes = read_barcodes(paths[0])
    features = read_table(paths[1], FEATURE_SPELLINGS, row_names="name")
    if "id" not in features:
        raise InputError(f"{paths[1]}: no column id among {', '.join(features)}")
    counts = scipy.sparse.csr_matrix(read_part(paths[2], read_market_matrix).T)
    if counts.shape != (len(barcodes), len(features)):
        raise InputError(
            f"{paths[2]}: {counts.shape[1]} genes x {counts.shape[0]} spots, but there are "
            f"{len(features)} features and {len(barcodes)} barcodes: the three files are not of "
            "one slide"
        )
    if "kind" in features:  # CytAssist's and multi-modal folders hold other kinds too
        genes = (features["kind"] == "Gene Expression").to_numpy()
        counts, features = counts[:, genes], features[genes]
    check_unique(barcodes, "barcode", folder)
    check_unique(features["id"], "gene id", folder)
    symbols = features.get("name", features["id"])
    var = pd.DataFrame({"name": symbols.to_numpy()}, index=features["id"].to_numpy())
    return anndata.AnnData(counts, obs=pd.DataFrame(index=barcodes.to_numpy()), var=var)


def read_barcodes(path):
    """The barcodes of a 10x folder, in the order of its matrix."""
    return read_table(path, {"barcode": ("barcode", "barcodes", "x")}, "barcode")["barcode"]


def find_part(folder, *names):
    """The file of one of these names in a folder; it may be gzipped, and its name have a prefix.

    The first name that is there counts, plain before gzipped before prefixed. GEO sets a sample's
    accession before every name. Raises InputError for none, and for several samples.
    """
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.exists():
                return path
    for name in names:
        pattern = re.compile(rf".+[_.-]{re.escape(name)}(\.gz)?")
        found = sorted(path for path in folder.glob("*") if pattern.fullmatch(path.name))
        if len(found) > 1:
            raise InputError(
                f"{folder}: {found[0].name} and {found[1].name} are of two samples: "
                "give each a folder of its own"
            )
        if found:
            return found[0]
    raise InputError(f"no {' or '.join(names)} (plain or .gz) in {folder}")


def find_parts(folder, *kinds):
    """A path for each of the kinds, which are tuples of names: files of one sample in a folder."""
    paths = [find_part(folder, *names) for names in kinds]
    prefixes = []
    for path, names in zip(paths, kinds, strict=True):
        ends = "|".join(map(re.escape, names))
        prefixes.append(re.sub(rf"({ends})(\.gz)?$", "", path.name))
    for path, prefix in zip(paths, prefixes, strict=True):
        if prefix != prefixes[0]:
            raise InputError(
                f"{folder}: {paths[0].name} and {path.name} are of two samples: "
                "give each a folder of its own"
            )
    return paths


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
    content = read_bytes(path)
    if b"\0" in content:
        raise ValueError("a zero byte in it")
    return scipy.io.mmread(io.BytesIO(content + b"\n"))


def check_counts(table, path):
    """InputError unless the counts are finite whole numbers from 0 on."""
    if not holds_counts(table.X):
        raise InputError(
            f"{path}: holds values that are no counts (negative, fractional or NaN); "
            "raw counts are needed"
        )


def holds_counts(matrix):
    """Whether a matrix, sparse or dense, holds finite whole numbers from 0 on alone."""
    values = matrix.data if scipy.sparse.issparse(matrix) else np.asarray(matrix)
    for start in range(0, len(values), 2**16):  # In parts, since the answers take as much memory.
        part = values[start : start + 2**16]
        if not ((part >= 0) & (part < np.inf) & (part == np.rint(part))).all():
            return False
    return True


def share_genes(features):
    """The genes that all slides share: a table gene_ids and name, by the symbols, made unique.

    `features` gives the var of every slide, one at a time. Genes are matched by id and stand in the
    first slide's order.
    """
    features = iter(features)
    first = next(features)
    shared, most = first.index, len(first)
    for var in features:
        shared = shared[shared.isin(var.index)]
        most = max(most, len(var))
    if not len(shared):
        raise InputError("the slides share no gene id: are they of one species and one annotation?")
    symbols = first["name"][shared].astype(str).to_numpy()
    genes = pd.DataFrame({"gene_ids": shared, "name": symbols}, index=name_genes(symbols))
    message = f"{len(shared):,} genes in every slide"
    if most > len(shared):
        message += f" (of up to {most:,})"
    print(message)
    return genes


def take_genes(table, genes):
    """The spots of one slide with these genes, a part of share_genes's table."""
    taken = table[:, genes["gene_ids"].to_numpy()].copy()
    taken.var = genes
    return taken


def name_genes(symbols):
    """Symbols as an index in which each is unique; InputError where one is a column's name."""
    names = pd.Index(symbols)
    twice = names[names.duplicated()]
    if len(twice):
        print(
            f"{len(twice)} gene names stand for several ids and were made unique, as {twice[0]}-1"
        )
    clash = sorted(set(common.ID_COLUMNS) & set(names))
    if clash:
        raise InputError(
            f"a gene is called {clash[0]!r}, as a column of dataset.csv: "
            "rename it in the features table"
        )
    return anndata.utils.make_index_unique(names)


# -------------------------------------------------------------------------------- spots


def place_spots(slide):
    """(positions as read_positions gives them, Thumbnail or None) of a slide.

    A slide without positions gets a grid. The thumbnail on which its tissue was found is returned
    then, since to make one takes all pixels of the slide.
    """
    if slide.positions is not None:
        positions = read_positions(slide.positions)
        check_pitch(slide, positions)
        return positions, None
    thumbnail = read_thumbnail(slide)
    return lay_grid(slide, thumbnail), thumbnail


def check_pitch(slide, positions):
    """Warn where the spots are neither as far apart as Visium's nor as those of ST or bins.

    A tenth is allowed: on sections of ST whose spots were measured one by one it is 6 %. Patches
    that were made elsewhere do not follow from the positions.
    """
    if holds_patches(slide.image):
        return
    pitch = measure_pitch(positions)
    um = pitch * slide.um_per_px
    pitches, expected = PITCHES, "100 (Visium) or 200 (ST)"
    # A spot of Visium HD's bins is called by its width.
    stated = re.match(r"s_(\d+)um_", str(positions.index[0]) if len(positions) else "")
    if stated:
        pitches, expected = (float(stated[1]),), f"{float(stated[1]):g}, as their barcodes say"
    if len(positions) < 2 or any(abs(um / known - 1) < 0.1 for known in pitches):
        return
    warn(
        f"{slide.positions}: the spots are {pitch:.4g} px apart, which at um_per_px "
        f"{slide.um_per_px:g} are {um:.0f} um; expected {expected}: "
        f"with um_per_px {pitches[0] / pitch:.4g} they would be {pitches[0]:g}"
    )


def read_spots(slide, positions, genome=""):
    """The spots of a slide as AnnData, by array_row and array_col; without a matrix X is None.

    obs holds positions, tissue_index, donor, barcode, pitch (px), block and, with a matrix,
    n_counts. Left out are spots without a position, not in_tissue or without counts; one line a
    reason says so, and uns["left_out"] counts them by reason. `genome` as for read_matrix.
    """
    if slide.matrix is None:
        table = anndata.AnnData(obs=positions)
    else:
        table = read_counts(slide, positions, genome)
    table = leave_out(slide, table, table.obs["in_tissue"] != 1, "not in_tissue")
    if not table.n_obs:
        raise InputError(f"{slide.positions}: no spot is in_tissue")
    if slide.matrix is not None:
        table = leave_out(slide, table, table.obs["n_counts"] == 0, "without counts")
        if not table.n_obs:
            raise InputError(f"{slide.matrix}: no spot has a count")
    if holds_patches(slide.image):
        with open_hest_patches(slide.image) as (barcodes, _):
            lost = ~table.obs_names.isin(barcodes)
        if lost.all():
            raise InputError(f"{slide.image}: no patch for barcode {table.obs_names[0]}, or others")
        table = leave_out(slide, table, lost, "without a patch")
    table = table[np.lexsort([table.obs["array_col"], table.obs["array_row"]])].copy()
    table.obs["tissue_index"] = slide.tissue_index
    table.obs["donor"] = slide.donor
    table.obs["pitch"] = pitch = measure_pitch(table.obs)
    table.obs["block"] = lay_blocks(table.obs, pitch, slide.tissue_index)
    table.obs["barcode"] = table.obs_names
    table.obs_names = [f"{slide.tissue_index}_{barcode}" for barcode in table.obs_names]
    return table


def leave_out(slide, table, spots, reason, say=True):
    """The table without these of its spots, (n,) bool, counted in uns and, to say, in a line."""
    spots = np.asarray(spots)
    if not spots.any():
        return table
    barcode = table.obs_names[spots][0]
    # Without a matrix, positions list the whole array, of which tissue is a part: that is no news.
    if say and slide.matrix is not None:
        n_spots = spots.sum()
        print(f"slide {slide.tissue_index}: {n_spots} spots {reason} are left out, as {barcode}")
    kept = table[~spots].copy()
    kept.uns["left_out"] = {**table.uns.get("left_out", {}), reason: int(spots.sum())}
    return kept


def read_counts(slide, positions, genome):
    """The matrix of a slide, checked, with positions and n_counts in obs.

    Barcodes without a position are left out where most have one.
    """
    table = read_matrix(slide.matrix, genome)
    check_counts(table, slide.matrix)
    places = match_barcodes(slide, table.obs_names, positions.index)
    lost = places < 0
    if lost.any():
        barcode, count = table.obs_names[lost][0], f"{lost.sum()} of {len(lost)} barcodes"
        if lost.mean() >= 0.5:
            raise InputError(
                f"{slide.positions}: no position for barcode {barcode} of {slide.matrix} "
                f"({count}): the two files are not of one slide"
            )
        warn(
            f"{slide.positions}: {count} of {slide.matrix} have no position and are left out, "
            f"as {barcode}: add them if they are wanted"
        )
        table = leave_out(slide, table, lost, "without a position", say=False)
    table.obs = positions.iloc[places[~lost]].set_axis(table.obs_names)
    # Over all genes of the matrix, also those that other slides lack.
    table.obs["n_counts"] = np.asarray(table.X.sum(1)).ravel()
    check_tissue(slide, table.obs, positions)
    return table


def match_barcodes(slide, barcodes, positioned):
    """The place of each barcode among those that have a position, -1 for none.

    Where most do not match as they stand, they are compared without what programs set before and
    after them: -1, -2 of an aggregated matrix, a sample's name.
    """
    places = positioned.get_indexer(barcodes)
    bare, bare_positioned = map(strip_barcodes, (barcodes, positioned))
    if (places >= 0).mean() > 0.5 or not bare.is_unique or not bare_positioned.is_unique:
        return places
    found = bare_positioned.get_indexer(bare)
    if (found >= 0).mean() <= 0.5:
        return places
    number = np.flatnonzero(found >= 0)[0]
    print(
        f"slide {slide.tissue_index}: barcodes are matched without prefix and suffix: "
        f"{barcodes[number]} of the matrix is {positioned[found[number]]} of the positions"
    )
    return found


def strip_barcodes(barcodes):
    """Barcodes without prefix and suffix: their 14 letters or more, or what precedes -1."""
    bare = []
    for barcode in barcodes:
        letters = re.search("[ACGT]{14,}", barcode)
        bare.append(letters[0] if letters else re.sub(r"[-.]\d+$", "", barcode))
    return pd.Index(bare)


def check_tissue(slide, spots, positions):
    """InputError where the tissue of the positions is not that of the matrix.

    Barcodes prove nothing, since they are the same on every Visium slide. A matrix may hold all
    spots of the array, or fewer than lie in the tissue. But where it lacks spots of the tissue and
    has others, which are as deep, it is another slide's.
    """
    inside = spots["in_tissue"] == 1
    n_tissue = (positions["in_tissue"] == 1).sum()
    smaller = min(len(spots), n_tissue)
    if inside.sum() >= SAME_TISSUE * smaller:
        return
    depth = spots["n_counts"]
    if inside.any() and depth[~inside].median() < 0.5 * depth[inside].median():
        return  # Few counts: they came there by diffusion.
    raise InputError(
        f"{slide.positions}: {inside.sum()} of the {len(spots)} spots of {slide.matrix} are "
        f"in_tissue, of {n_tissue} that are: the two files are not of one slide; if both were "
        "filtered by hand, set in_tissue to 1 where there are counts"
    )


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
    return make_thumbnail(open_image(unpack(slide.image)), thumbnail_step(slide))


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
    image = open_image(unpack(path))
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
    barcode = spots["barcode"].iloc[np.flatnonzero(outside)[0]]
    size = f"{shape[0]} x {shape[1]} px"
    swapped = spots.rename(columns={"pxl_row": "pxl_col", "pxl_col": "pxl_row"})
    swapped_fits = find_inside(swapped, shape).all()
    if outside.mean() < 0.5 and not (swapped_fits and lies_mirrored(spots)):
        warn(
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
    """How many patches of `side` px reach over the border of an image of (height, width).

    Those whose centre lies outside are left out and do not count.
    """
    corners = spots[find_inside(spots, shape)][PLACE].to_numpy() - side // 2
    return int(((corners < 0) | (corners + side > shape)).any(axis=1).sum())


def read_resampled(slide, spots, patches, um_per_px, scratch, step=None):
    """As read_patches, of patches (n, S, S, 3) whose pixels are um_per_px wide; 0: the slide's own.

    Larger or smaller patches are read into a file in the folder `scratch`, and resized.
    Those of HEST-1k are taken as they are, without a thumbnail.
    Returns (SlideImage, Thumbnail or None, number of patches over the border).
    """
    if holds_patches(slide.image):
        return copy_hest_patches(slide, spots, patches, um_per_px), None, 0
    finer = slide.um_per_px / um_per_px if um_per_px else 1.0
    size = patches.shape[1]
    if 0.99 < finer < 1.01:
        image, thumbnail = read_patches(slide.image, spots, patches, step)
        return image, thumbnail, count_over_border(spots, image.shape, size)
    if finer > 2:
        warn(
            f"{slide.image}: {finer:.0f} times as coarse as the patches made of it: its detail is "
            "not there; give the full-resolution image"
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
        shell.reserve_disk(Path(file.name))
        return np.memmap(file, np.uint8, "r+", shape=shape)


def warn_of_swap(slide, spots, patches, shape):
    """Print a warning where pxl_row and pxl_col look swapped.

    Swapped, the array lies mirrored on the image; the spots would then cover its tissue, which has
    colour, better the other way round. Patches that were made elsewhere cannot tell.
    """
    if holds_patches(slide.image):
        return
    inside = find_inside(spots, shape)
    spots, patches = spots[inside], patches[inside]
    if not lies_mirrored(spots) or (spots[["pxl_col", "pxl_row"]].to_numpy() >= shape).any():
        return
    some = np.linspace(0, len(spots) - 1, min(len(spots), SWAP_SAMPLE)).astype(int)
    swapped = spots.iloc[some].rename(columns={"pxl_row": "pxl_col", "pxl_col": "pxl_row"})
    others = np.empty((len(some), *patches.shape[1:]), np.uint8)
    read_patches(slide.image, swapped, others)
    here, there = mean_saturation(patches[some]), mean_saturation(others)
    if there > 1.25 * here:
        warn(
            f"{slide.positions}: pxl_row and pxl_col look swapped: the other way round, "
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


# -------------------------------------------------------------------------------- patches of HEST


def holds_patches(image):
    """Whether the image of a slide is a file of patches, as HEST-1k has them, one for each spot."""
    return image.suffix == ".h5"


@contextmanager
def open_hest_patches(path):
    """The (barcodes, patches (n, S, S, 3) uint8) in a file of HEST-1k, which is open meanwhile."""
    try:
        with h5py.File(path) as file:
            patches = file["img"]
            if patches.shape[1:] != (PATCH_SIZE, PATCH_SIZE, 3) or patches.dtype != np.uint8:
                raise InputError(
                    f"{path}: img is {patches.dtype} {patches.shape}; "
                    f"expected uint8 (n, {PATCH_SIZE}, {PATCH_SIZE}, 3)"
                )
            barcodes = pd.Index(file["barcode"].asstr()[:].ravel())
            check_unique(barcodes, "barcode", path)
            yield barcodes, patches
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"{path}: not a whole file of patches with img and barcode ({error}); fetch it again"
        ) from None


def copy_hest_patches(slide, spots, patches, um_per_px):
    """Fill patches (n, S, S, 3) uint8 with those of the spots' barcodes; returns a SlideImage.

    It has no regions, and is as large as its spots need.
    """
    if um_per_px not in (0, slide.um_per_px):
        raise InputError(
            f"--um-per-px {um_per_px:g}: the patches of {slide.image} are {slide.um_per_px:g} "
            "um/px and are taken as they are: leave it out, or give the whole image"
        )
    with open_hest_patches(slide.image) as (barcodes, images):
        for number, place in enumerate(barcodes.get_indexer(spots["barcode"])):
            patches[number] = images[place]
    bottom, right = spots[PLACE].max() + 1
    return SlideImage("patches of HEST", (int(bottom), int(right)), lambda needed: iter(()))
