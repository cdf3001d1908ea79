"""Files to spots: the one place where manifests, positions and counts of slides are read.

manifest -> positions -> counts -> spots

n spots; places on a slide are rows and columns in px of its image. Files are opened in inputs.py,
pixels read in imaging.py. What cannot be read raises InputError.
"""

import io
import os
import re
import shlex
import unicodedata
import warnings
import zlib
from dataclasses import dataclass, fields
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.io
import scipy.ndimage
import scipy.sparse
from scipy.spatial import cKDTree
from skimage.filters import threshold_otsu
from skimage.morphology import remove_small_holes, remove_small_objects

import common
from common import PATCH_SIZE, POSITION_COLUMNS
from slides import imaging, inputs
from study import shell
from study.shell import InputError

SPOT_PITCH = 100.0  # um between the spots of Visium, and of a grid over a slide without positions
# um: the share by which spots may be off, of Visium, its forerunner ST, and two that HEST-1k has by
# design and states exactly: ST of 110 um and Visium HD, whose bins are summed to 128 um.
PITCHES = {SPOT_PITCH: 0.1, 200.0: 0.1, 110.0: 0.02, 128.0: 0.02}
MOST_GENOMES = 4  # in one matrix; more prefixes than these are parts of names
SAME_TISSUE = 0.95  # of the spots; of four slides of one liver, two shared up to 0.92
BLOCK_WIDTH = 5  # pitches
ONE_DEPTH = 0.02  # of the mean: standard deviation of depths below which they were made equal
FEW_DEPTHS = 10  # spots, of which depths may be equal by chance
SECTION_SPELLINGS = (
    "library_id",
    "library",
    "sample",
    "sample_id",
    "sample_name",
    "batch",
    "orig_ident",
    "section",
    "section_id",
    "slide",
    "slide_id",
    "slice",
)
BARCODE = r"^(.*?)([ACGT]{14,})(.*)$"  # prefix, letters and suffix
THOUSANDS = r"[1-9]\d{0,2}([.,]\d{3})+"  # as 1.234
ENDS = {"prefix": 0, "suffix": 2}  # what of BARCODE chooses spots where obs has no such column
# What Xenium, CosMx and MERSCOPE count beside genes.
CONTROLS = (
    r"(?i:neg_?control|negative_?control|negprb|negative\d|system_?control|falsecode|"
    r"unassigned|deprecated|intergenic_?region|blank[_-]?\d|antisense_)"
)
FEATURE_SPELLINGS = {
    "id": ("id", "gene_id", "gene_ids", "ensembl", "ensembl_id", "feature_id"),
    "name": ("name", "gene_name", "symbol", "gene_symbol", "feature_name"),
    "kind": ("feature_type", "feature_types", "kind", "type"),
}
# How the columns of positions are called by Space Ranger, its readers in R and Python, and Seurat.
POSITION_SPELLINGS = {
    "barcode": ("barcode", "barcodes", "barcode_id", "cell", "cell_id", "spot", "spot_id"),
    "in_tissue": ("in_tissue", "intissue", "tissue"),
    "array_row": ("array_row", "row"),
    "array_col": ("array_col", "col"),
    "pxl_row": ("pxl_row_in_fullres", "pxl_row", "row_pxl", "pixel_row", "imagerow", "image_row"),
    "pxl_col": ("pxl_col_in_fullres", "pxl_col", "col_pxl", "pixel_col", "imagecol", "image_col"),
}


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
    matrix: Path | None  # a 10x folder or .h5, an .h5ad or a table; None: no counts


NO_FILE = ("", "NA", "NaN", "nan", "None")  # an empty cell, as R and pandas may write it
MANIFEST = [field.name for field in fields(Slide)]  # the columns of slides.csv
PATHS = ("image", "positions", "matrix")
# With these script 19 writes slides.csv, which is not done again once a person has edited it.
MANIFEST_FLAGS = (
    "--from-spaceranger",
    "--images",
    "--use-hires",
    "--bin-um",
    "--from-hest",
    "--samples",
    "--organ",
    "--species",
    "--technology",
    "--hest-patches",
)


def read_manifest(root, need_files=True):
    """The list of slides that root/slides.csv names, by tissue_index; their paths are absolute.

    Raises InputError for a missing column, a value out of range, or a file that lies outside `root`
    or, to `need_files`, is missing.
    """
    path = shell.find_manifest(root)
    table = inputs.read_table(path, {column: (column,) for column in MANIFEST})
    missing = [column for column in MANIFEST if column not in table or not table.attrs["named"]]
    if missing:
        raise InputError(
            f"{path}: the column {missing[0]} is missing; expected {', '.join(MANIFEST)}"
        )
    separator = table.attrs["separator"]
    table = table[MANIFEST].copy()
    for column in ("tissue_index", "um_per_px"):
        table[column] = inputs.parse_numbers(table[column], separator)
    check_manifest_numbers(path, table)
    check_manifest_names(path, table)
    table["tissue_index"] = table["tissue_index"].astype(int)
    rows = table.sort_values("tissue_index").to_dict("records")
    warn_of_spellings(path, table["donor"].unique())
    return [read_manifest_row(root, row, need_files) for row in rows]


def warn_of_spellings(path, donors):
    """Warn where donors differ in upper and lower case, signs or zeros before a number alone."""
    seen = {}
    for donor in donors:
        text = unicodedata.normalize("NFKC", donor).casefold()
        words = re.findall(r"[^\W\d_]+|\d+", text)
        key = tuple(word.lstrip("0") for word in words) or donor
        other = seen.setdefault(key, donor)
        if other != donor:
            inputs.warn(
                f"{path}: donors {other!r} and {donor!r} are taken for two people: a leak where "
                "they are one: spell them alike"
            )


def warn_of_magnifications(manifest):
    """Warn where slides of one data root differ in um per px, and so in what a patch shows."""
    finest = min(manifest, key=lambda slide: slide.um_per_px)
    coarsest = max(manifest, key=lambda slide: slide.um_per_px)
    if coarsest.um_per_px < 1.05 * finest.um_per_px:
        return
    inputs.warn(
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


def read_manifest_row(root, row, need_files):
    """A Slide from a row of slides.csv, a dict by column."""
    paths = {column: find_named(root, row, column, need_files) for column in PATHS}
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


def spell_path(path):
    """The path, with the separators of Windows as well, as file systems may spell it.

    A Mac's disk has accents as characters of their own, and archives of Windows have bytes of
    Latin-1.
    """
    for spelling in (path, path.replace("\\", "/")):
        yield spelling
        for form in ("NFC", "NFD"):
            yield unicodedata.normalize(form, spelling)
        composed = unicodedata.normalize("NFC", spelling)
        yield os.fsdecode(composed.encode("cp1252", "replace"))


def describe_row(root, slide):
    """{column of slides.csv: value} of a Slide, whose paths are relative to `root`."""
    values = {column: getattr(slide, column) for column in MANIFEST}
    for column in PATHS:
        if values[column] is not None:
            values[column] = name_file(root, values[column])
    return values


def name_file(root, path):
    """What meta.json calls a file: its path in the data root, since folders may share names."""
    return Path(os.path.relpath(path, root)).as_posix()


def list_files(slide):
    """The paths of the files that a slide is read from; those in a folder each, if they exist."""
    paths = []
    named = [slide.image]
    named += [split_part(path)[0] for path in (slide.positions, slide.matrix) if path is not None]
    for path in dict.fromkeys(named):
        paths += sorted(path.iterdir()) if path.is_dir() else [path]
    return [path for path in paths if path.is_file()]


def check_sources(root, meta):
    """InputError where slides.csv, or a file that it names, is no more as script 19 described it in
    meta.json.

    A file that is gone is not compared: the patches are there, and images take much disk. Of large
    files some blocks are compared, so that no start of a script waits.
    """
    if not (root / "slides.csv").is_file():
        return
    manifest = read_manifest(root, need_files=False)
    then = {row["tissue_index"]: row for row in meta["slides"]}
    command = name_command(root, meta, without=MANIFEST_FLAGS)
    if sorted(then) != [slide.tissue_index for slide in manifest]:
        raise InputError(f"{root / 'slides.csv'} names other slides than then: run {command} again")
    for slide in manifest:
        row = then[slide.tissue_index]
        for column, value in describe_row(root, slide).items():
            if row.get(column, value) != value:
                raise InputError(
                    f"{root / 'slides.csv'}: {column} of slide {slide.tissue_index} is {value}, "
                    f"and was {row[column]} when the dataset was made: run {command} again"
                )
        for path in list_files(slide):
            check_source(path, row["files"].get(name_file(root, path), {}), root, meta)


def check_source(path, described, root, meta):
    """InputError where a file is no more as a part of meta.json describes it."""
    size = path.stat().st_size
    command = name_command(root, meta)
    if size != described.get("bytes", size):
        raise InputError(
            f"{path}: {size:,} bytes, and {described['bytes']:,} when the dataset was made: run "
            f"{command} again"
        )
    if "blocks" in described and described["blocks"] != shell.hash_blocks(path):
        raise InputError(
            f"{path}: its content is not as it was when the dataset was made: run {command} again"
        )


def name_command(root, meta, without=()):
    """The command of script 19 that made a dataset, by its meta.json, less the flags `without`."""
    usual = {"--target": "lognorm"} if meta["target"] == "lognorm" else {}
    words = ["python", "19_make_patches_and_csv.py", "--data-root", str(root)]
    for flag, value in meta.get("flags", usual).items():
        if flag not in without:
            words += [flag, value]
    return shlex.join(words)


def find_named(root, row, column, need_files=True):
    """The absolute path in a column of a row of slides.csv; None where the column is empty."""
    value, manifest = row[column], root / "slides.csv"
    if value in NO_FILE:
        return None
    spellings = (
        spelling for spelling in spell_path(value) if split_part(root / spelling)[0].exists()
    )
    value = next(spellings, value.replace("\\", "/"))
    # Links are not followed: they may lead out of the data root, since the user made them.
    path = Path(os.path.abspath(root / value))  # noqa: PTH100
    if not path.is_relative_to(os.path.abspath(root)):  # noqa: PTH100
        raise InputError(
            f"{manifest}: {column} {value!r} lies outside {root}; "
            "copy or link it into the data root"
        )
    file, _ = split_part(path)
    found = file.exists() if column == "matrix" else file.is_file()
    if need_files and not found:
        raise InputError(
            f"{manifest}: {column} {value!r} of slide {row['tissue_index']} does not exist: "
            "fetch it with 17_download_data.py or mend the path"
        )
    return path


def split_part(path):
    """(path of a file, "column=value" or "") of `file#column=value`, which is a part of its spots.

    A file whose name holds a # is itself.
    """
    text = str(path)
    if "#" not in text or path.exists():
        return path, ""
    places = [number for number, letter in enumerate(text) if letter == "#"]
    for place in reversed(places):
        if Path(text[:place]).exists():
            return Path(text[:place]), text[place + 1 :]
    lost = re.fullmatch("(.+)#([^#=]+=.*)", text)
    return (Path(lost[1]), lost[2]) if lost else (path, "")


# -------------------------------------------------------------------------------- positions


def read_positions(path):
    """Space Ranger's positions, with or without a header: a table by barcode.

    Its columns are in_tissue, array_row, array_col, pxl_row and pxl_col. Named columns may stand in
    any order. The file may be of text, a .parquet as Visium HD has, or an .h5ad (see
    read_anndata_positions). Of `file#column=value` these spots are taken.
    """
    file, part = split_part(path)
    if is_anndata(path):
        table = read_anndata_positions(path)
    else:
        if file.name.removesuffix(".gz").endswith(".parquet"):
            table = inputs.read_parquet(file, POSITION_SPELLINGS)
        else:
            table = inputs.read_table(file, POSITION_SPELLINGS, row_names="barcode")
        check_position_columns(file, table)
        separator = table.attrs["separator"]
        table = table[find_part_spots(file, part, table.set_index("barcode"))]
        table.attrs["separator"] = separator
    return parse_positions(path, table[POSITION_COLUMNS].copy(), table.attrs["separator"])


def parse_positions(path, table, separator):
    """Positions by barcode, in whole numbers, of a table of texts or numbers with
    POSITION_COLUMNS.
    """
    truths = {"true": "1", "false": "0"}  # of R and pandas
    table["in_tissue"] = table["in_tissue"].map(lambda value: truths.get(str(value).lower(), value))
    texts = table.astype(str)
    for column in POSITION_COLUMNS[1:]:
        check_thousands(path, texts, column, separator)
        numbers = inputs.parse_numbers(table[column], separator)
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
    inputs.check_unique(table["barcode"], "barcode", path)
    check_places(path, table, texts)
    table = table.set_index("barcode")
    check_one_sample(path, table[[]])
    return table


def check_thousands(path, texts, column, separator):
    """InputError where a spreadsheet may have written 1234 as 1.234 or 1,234.

    That is where all numbers above 999 have a point or a comma before three digits, and those below
    have none; numbers with three decimals all have it, unless semicolons separate the cells, as
    spreadsheets of Europe write them.
    """
    cells = texts[column]
    marked = cells.str.fullmatch(THOUSANDS)
    small = cells.str.fullmatch(r"\d{1,3}")
    if marked.any() and (marked | small).all() and (small.any() or separator == ";"):
        refuse_thousands(path, texts[marked], column)


def refuse_thousands(path, texts, column):
    """InputError that names the first cell of a column in which 1.234 may be 1234."""
    barcode, text = texts[["barcode", column]].iloc[0]
    raise InputError(
        f"{path}: {column} {text!r} of barcode {barcode} may be a thousand or a decimal: "
        "export the numbers without separators of thousands"
    )


def check_places(path, table, texts):
    """InputError where two spots in_tissue lie on one pixel; `texts` are the cells of the table."""
    spots = table[table["in_tissue"] == 1]
    places = spots[["pxl_row", "pxl_col"]]
    twins = spots[places.duplicated(keep=False)]
    if twins.empty:
        return
    for column in places:
        cells = texts.loc[twins.index]
        marked = cells[column].str.fullmatch(THOUSANDS)
        if marked.any():  # Cut to whole numbers, the thousands of a slide are a few pixels.
            refuse_thousands(path, cells[marked], column)
    row, column = twins[["pxl_row", "pxl_col"]].iloc[0]
    same = twins[(twins["pxl_row"] == row) & (twins["pxl_col"] == column)]["barcode"]
    raise InputError(
        f"{path}: the spots {same.iloc[0]} and {same.iloc[1]} lie on one pixel, pxl_row {row} and "
        f"pxl_col {column}: mend the positions"
    )


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
    check_frame(path, spots.uns, measure_distance(table))
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


def check_frame(path, uns, pitch):
    """InputError where an .h5ad says itself that its positions are those on a scaled image.

    It does by the spots' diameter on the full-resolution image: no spot of Visium, 55 um wide and
    100 um from the next, or of ST, 100 and 200, reaches the next. `pitch` is that of the positions.
    """
    for library, facts in list_libraries(uns).items():
        scales = facts.get("scalefactors", {}) if hasattr(facts, "get") else {}
        diameter = float(scales.get("spot_diameter_fullres", 0))
        if not diameter > 1.1 * pitch > 0:  # Square bins are as wide as they are far apart.
            continue
        stated = (
            f'{path}: obsm["spatial"] is {pitch:.4g} px from spot to spot, but uns["spatial"]'
            f'["{library}"] has spots of {diameter:.4g} px: these are positions in another frame'
        )
        for name in ("tissue_hires_scalef", "tissue_lowres_scalef"):
            scale = float(scales.get(name, 0))
            if scale > 0 and 0.4 < diameter / (pitch / scale) < 0.9:
                raise InputError(f"{stated}, scaled by {name} {scale:g}: divide them by it")
        raise InputError(f"{stated} than px of the full-resolution image: give those")


def list_libraries(uns):
    """{library: facts} of uns["spatial"], as scanpy reads Space Ranger's folders."""
    found = uns.get("spatial")
    return found if isinstance(found, dict) else {}


def measure_distance(positions):
    """As measure_pitch, also below 1; 0 for a spot alone."""
    if len(positions) < 2:
        return 0.0
    centres = positions[["pxl_col", "pxl_row"]].to_numpy(np.float64)
    distances, _ = cKDTree(centres).query(centres, k=2)  # the nearest of all is the spot itself
    return float(np.median(distances[:, 1]))


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


def measure_pitch(positions):
    """px from a spot to its nearest, median over the slide, at least 1; 1 for a spot alone."""
    return max(measure_distance(positions), 1.0)


def lay_blocks(positions, pitch, tissue_index):
    """Of each spot the square that it lies in, BLOCK_WIDTH pitches wide, as "slide:column:row".

    Folds and intervals take blocks whole.
    """
    centres = positions[["pxl_col", "pxl_row"]].to_numpy(np.float64)
    squares = (centres // (BLOCK_WIDTH * pitch)).astype(int)
    return [f"{tissue_index}:{column}:{row}" for column, row in squares]


# -------------------------------------------------------------------------------- counts


def read_matrix(path, genome="", named=()):
    """Counts of one slide from a 10x folder or .h5, an .h5ad or a plain table, as AnnData (spots x
    genes, CSR).

    Controls of imaging panels are left out, but for those `named`, by symbol or id.

    var_names are gene ids, var["name"] the symbols. Of several genomes in one matrix, `genome`
    chooses one; without it, genes of all are taken, and that is warned of.
    """
    table = read_matrix_file(path)
    file, part = split_part(path)
    if part:
        print(f"{file}: {table.n_obs} spots are taken, those of {part}")
    check_one_sample(path, table.obs)
    return leave_out_controls(choose_genome(table, path, genome), path, named)


def leave_out_controls(table, path, named):
    """The table without the features that are no genes by their symbol or id, counted in a line."""
    symbols, ids = table.var["name"].astype(str), table.var_names.to_series().astype(str)
    controls = symbols.str.match(CONTROLS).to_numpy() | ids.str.match(CONTROLS).to_numpy()
    controls &= ~(symbols.isin(named).to_numpy() | ids.isin(named).to_numpy())
    if not controls.any():
        return table
    example = symbols[controls].iloc[0]
    print(f"{path}: {controls.sum()} controls are left out, as {example}: they are no genes")
    return table[:, ~controls].copy()


def read_matrix_file(path):
    """As read_matrix, of the genes of all genomes."""
    if is_anndata(path):
        return read_anndata_matrix(path)
    file, part = split_part(path)
    if file.name.lower().removesuffix(".gz").endswith((".tsv", ".csv", ".txt")):
        table = read_dense_matrix(file)
    elif file.is_file():
        table = read_h5_matrix(file)
    else:
        table = read_matrix_folder(file)
    chosen = find_part_spots(file, part, table.obs)
    return table if chosen.all() else table[chosen].copy()


def choose_genome(table, path, genome):
    """The genes of one genome, without the prefix that 10x sets before ids and symbols then."""
    genomes = find_genomes(table)
    counted = genomes.value_counts()
    found = " and ".join(f"{name} ({count} genes)" for name, count in counted.items())
    if not genome:
        if len(counted) > 1:
            inputs.warn(
                f"{path}: {found} are read together: choose one with --genome {counted.index[0]}"
            )
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


def read_dense_matrix(path):
    """Counts in a plain table, spots x genes or genes x spots, as read_matrix gives them.

    The first line and the first column are names; those that look like barcodes are the spots'.
    Genes have one name there, which is both id and symbol.
    """
    names, table = inputs.read_dense_table(path)
    of_rows, of_columns = (look_like_barcodes(part) for part in (table.index, names))
    if of_rows == of_columns:
        raise InputError(
            f"{path}: neither rows, as {table.index[0]}, nor columns, as {names[0]}, are spots "
            "alone: name the spots of one of them by their barcodes, as AAACAAGTATCTCCCA-1 or 10x13"
        )
    counts, barcodes, genes = table.to_numpy(), table.index, names
    if of_columns:
        counts, barcodes, genes = counts.T, names, table.index
    inputs.check_unique(barcodes, "barcode", path)
    inputs.check_unique(genes, "gene", path)
    var = pd.DataFrame({"name": [*genes]}, index=[*genes])
    return anndata.AnnData(scipy.sparse.csr_matrix(counts), pd.DataFrame(index=[*barcodes]), var)


def look_like_barcodes(names):
    """Whether most names are barcodes: letters as 10x has, or ST's place on the array, 10x13."""
    pattern = r"(?:.*[ACGT]{14,}.*)|(?:.*?\d+(?:\.\d+)?x\d+(?:\.\d+)?)"
    return pd.Series(names).str.fullmatch(pattern).mean() > 0.5


def read_h5_matrix(path):
    """A filtered_feature_bc_matrix.h5, as read_matrix gives it."""
    import scanpy  # Here, because numba takes seconds to load.

    try:
        # Names that several genes share are warned of; join_genes makes them unique.
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            table = scanpy.read_10x_h5(inputs.unpack(path), gex_only=False)
    except InputError:
        raise
    except Exception as error:  # h5py raises what it likes; the cause goes into the message
        raise InputError(f"{path}: not a 10x filtered_feature_bc_matrix.h5 ({error})") from None
    genes = are_genes(table.var)
    if not genes.all():  # Else a copy would double the memory, of Visium HD by 1.5 GB.
        table = table[:, genes].copy()
    inputs.check_unique(table.obs_names, "barcode", path)
    inputs.check_unique(table.var["gene_ids"], "gene id", path)
    table.var["name"] = table.var_names
    table.var_names = table.var["gene_ids"].astype(str)
    return table


def are_genes(var):
    """(features,) bool: which features of a matrix are genes; CytAssist's hold other kinds too."""
    if "feature_types" not in var:
        return np.ones(len(var), bool)
    return (var["feature_types"] == "Gene Expression").to_numpy()


def is_anndata(path):
    """Whether a path, or None, is that of an .h5ad, plain or gzipped, or of a part of its spots."""
    return path is not None and split_part(path)[0].name.removesuffix(".gz").endswith(".h5ad")


def read_anndata(path, backed=None):
    """An .h5ad, plain or gzipped, as it stands there; its barcodes are checked.

    Of `file#column=value` these spots are given. `backed` "r" leaves the counts in the file, which
    is open then.
    """
    file, part = split_part(path)
    try:
        # Names that stand there twice are refused below, and old formats read as well.
        with warnings.catch_warnings(action="ignore"):
            table = anndata.read_h5ad(inputs.unpack(file), backed)
    except InputError:
        raise
    except Exception as error:  # h5py and anndata raise what they like
        raise InputError(f"{file}: not a whole .h5ad of AnnData ({error})") from None
    if part:
        table = take_section(table, find_part_spots(file, part, table.obs))
    check_one_section(path, table)
    inputs.check_unique(table.obs_names, "barcode", path)
    return table


def take_section(table, chosen):
    """An AnnData of the chosen spots, (n,) bool, with what uns["spatial"] says of them.

    Of a file that stays open, without counts.
    """
    libraries = list_libraries(table.uns)
    if table.file.filename is None:
        section = table[chosen].copy()
    else:
        places = {name: values[chosen] for name, values in table.obsm.items()}
        section = anndata.AnnData(obs=table.obs[chosen], obsm=places)
        table.file.close()
    words = {show_value(value) for column in section.obs for value in section.obs[column].unique()}
    section.uns["spatial"] = {name: libraries[name] for name in libraries if str(name) in words}
    return section


# -------------------------------------------------------------------------------- sections


def find_part_spots(path, part, obs):
    """(n,) bool: the spots, by barcode in `obs`, that "column=value" chooses; "" chooses all.

    The column is one of obs, or prefix or suffix: what stands around the letters of a barcode,
    with or without its hyphen. InputError for a column or value that is not there.
    """
    if not part:
        return np.ones(len(obs), bool)
    column, _, value = (text.strip() for text in part.partition("="))
    values = find_values(obs, column)
    if values is None:
        names = ", ".join([*map(str, obs), *ENDS])
        raise InputError(f"{path}#{part}: no column {column!r}: choose by column=value of {names}")
    chosen = values == value
    if column in ENDS:
        chosen |= values.str.strip("-_.") == value
    if not chosen.any():
        counted = values.value_counts()
        names = ", ".join(f"{name} ({count} spots)" for name, count in counted[:8].items())
        further = f" and {len(counted) - 8} others" if len(counted) > 8 else ""
        raise InputError(f"{path}#{part}: {column} has no value {value!r}: it has {names}{further}")
    return chosen.to_numpy()


def find_values(obs, column):
    """The values of a column of `obs`, or of a part of its barcodes, as texts; None without it."""
    for name in obs:
        if column in (str(name), inputs.normalise_name(str(name))):
            return obs[name].astype(object).map(show_value)
    if column not in ENDS:
        return None
    found = pd.Series(obs.index).astype(str).str.extract(BARCODE)[ENDS[column]]
    return found.fillna("").set_axis(obs.index)


def show_value(value):
    """A value of obs as a person writes it: 1 for 1.0."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def refuse_sections(path, cause, obs, libraries=()):
    """InputError with a cause why the spots are of several sections, and what to write to choose
    one: by a column that is called like a section or holds the `libraries`, by what surrounds the
    barcodes, or by any column that leaves each array place once.
    """
    choices = []
    for column in obs:
        values = {show_value(value) for value in obs[column].dropna().unique()}
        spelt = inputs.normalise_name(str(column)) in SECTION_SPELLINGS
        if len(values) > 1 and (spelt or values <= set(map(str, libraries))):
            choices.append(column)
    choices += [end for end in ENDS if find_values(obs, end).nunique() > 1]
    choices += [column for column in obs if tells_sections_apart(obs, column)]
    file = split_part(path)[0]
    if not choices:
        raise InputError(
            f"{path}: {cause}, and a slide is one; no column tells them apart: give each a "
            "matrix of its own, and its positions"
        )
    values = sorted(set(find_values(obs, str(choices[0]))) - {""})
    value = values[0].strip("-_.") if choices[0] in ENDS else values[0]
    raise InputError(
        f"{path}: {cause}, and a slide is one: choose one in slides.csv or with --matrix by "
        f"writing {file.name}#{choices[0]}={value}"
    )


def tells_sections_apart(obs, column):
    """Whether a column of a few values has each array place once in each of them."""
    place = ["array_row", "array_col"]
    if column in place or not set(place) <= set(obs) or not 1 < obs[column].nunique() <= 64:
        return False
    return not obs.duplicated([*place, column]).any()


def check_one_sample(path, obs):
    """InputError where barcodes, the index of `obs`, are of several samples, which have a suffix or
    a prefix each.

    spaceranger aggr and anndata.concat leave them so. The letters are the same on every slide.
    """
    found = pd.Series(obs.index).astype(str).str.extract(BARCODE).dropna()
    samples = (found[0] + "..." + found[2]).value_counts()
    if len(samples) > 1 and samples.iloc[1] > 1:
        names = ", ".join(samples.index[:4])
        refuse_sections(path, f"barcodes of {len(samples)} samples ({names})", obs)
    twice = found[1][found[1].duplicated()]
    if len(twice):
        cause = (
            f"{len(twice)} barcodes stand there twice but for what surrounds them, as "
            f"{twice.iloc[0]}, so they are of several samples"
        )
        refuse_sections(path, cause, obs)


def check_one_section(path, spots):
    """InputError where an AnnData is of several sections, by what it says of its spots."""
    obs, libraries = spots.obs, list(list_libraries(spots.uns))
    for column in obs:
        values = obs[column].dropna().unique()
        if inputs.normalise_name(str(column)) in SECTION_SPELLINGS and len(values) > 1:
            names = ", ".join(map(str, values[:4]))
            cause = f'obs["{column}"] names {len(values)} sections ({names})'
            refuse_sections(path, cause, obs, libraries)
    if len(libraries) > 1:
        cause = f'uns["spatial"] names {len(libraries)} sections ({", ".join(libraries[:4])})'
        refuse_sections(path, cause, obs, libraries)
    if {"array_row", "array_col"} <= set(obs):
        places = obs[["array_row", "array_col"]]
        twice = places[places.duplicated()]
        if len(twice) and len(places.drop_duplicates()) > 1:
            row, column = twice.iloc[0]
            cause = (
                f"{len(twice)} spots have the array_row and array_col of another, as {row} and "
                f"{column}, so they are of several sections"
            )
            refuse_sections(path, cause, obs)


def read_anndata_matrix(path):
    """The counts in an .h5ad, as read_matrix gives them.

    They are X, or layers["counts"] or raw where X is not of counts. Gene ids are a column of var,
    as gene_ids, or else the var_names; so are the symbols.
    """
    stored = read_anndata(path)
    table = choose_counts(stored, path)
    check_layers(stored, table, path)
    var = table.var.set_axis([inputs.normalise_name(str(name)) for name in table.var], axis=1)
    genes = are_genes(var)
    if not genes.all():
        table, var = table[:, genes], var[genes]
    ids = find_gene_names(var, ("gene_ids", *FEATURE_SPELLINGS["id"]))
    names = find_gene_names(var, FEATURE_SPELLINGS["name"])
    inputs.check_unique(ids, "gene id", path)
    features = pd.DataFrame({"name": names.to_numpy()}, index=ids.to_numpy())
    if "genome" in var:
        features["genome"] = var["genome"].astype(str).to_numpy()
    counts = scipy.sparse.csr_matrix(table.X)
    return anndata.AnnData(counts, obs=pd.DataFrame(index=table.obs_names), var=features)


def choose_counts(table, path):
    """The AnnData whose X is the raw counts among layers["counts"], X and raw.

    Counts of one depth, as SCTransform and counts per million have, give way to others, and those
    of few genes to those of most. Where none holds counts, X is as it stands, for check_counts to
    refuse.
    """
    found = {}
    if "counts" in table.layers:
        found['layers["counts"]'] = table.layers["counts"]
    found["X"] = table.X
    if table.raw is not None:
        found["raw"] = table.raw.X
    found = {name: counts for name, counts in found.items() if counts is not None}
    usable = {name: counts for name, counts in found.items() if holds_counts(counts)}
    if not usable:
        if table.X is None:
            raise InputError(f"{path}: holds no X; raw counts are needed")
        return table
    # Of equals max() takes the first.
    name = max(usable, key=lambda name: (not has_one_depth(usable[name]), usable[name].shape[1]))
    say_what_is_taken(path, name, found, usable)
    if name == "raw":
        return table.raw.to_adata()
    if name != "X":
        table.X = table.layers["counts"]
    return table


def say_what_is_taken(path, name, found, usable):
    """Print which counts of an .h5ad are taken, unless they are X and nothing else has more genes;
    `found` {name: values} holds all there are, `usable` those that are counts.
    """
    n_genes = found[name].shape[1]
    larger = [other for other in found if found[other].shape[1] > n_genes]
    if name == "X" and not larger:
        return
    line = f"{path}: {name} is taken, whose counts are of {n_genes} genes"
    for other in larger:
        cause = "are no counts"
        if other in usable:
            cause = "have one depth in all spots, as raw counts never do"
        line += f"; the values of {found[other].shape[1]} genes in {other} {cause}"
    print(line)


def has_one_depth(counts):
    """Whether all spots have about as many counts, which the tissue never gives."""
    depth = np.asarray(counts.sum(1), np.float64).ravel()
    return len(depth) >= FEW_DEPTHS and depth.std() < ONE_DEPTH * depth.mean()


def check_layers(stored, table, path):
    """InputError that names the layers of an .h5ad, where it has some and `table`, what
    choose_counts took of it, holds no counts.
    """
    if not len(stored.layers) or holds_counts(table.X):
        return
    counts = [name for name in stored.layers if holds_counts(stored.layers[name])]
    fix = f'copy that of raw counts, as {counts[0]}, to layers["counts"]' if counts else "add them"
    raise InputError(
        f'{path}: raw counts are needed, and neither X nor layers["counts"] nor raw holds them; of '
        f"the layers {', '.join(stored.layers)} these hold counts: "
        f"{', '.join(counts) or '-'}: {fix}"
    )


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
    features = inputs.read_table(paths[1], FEATURE_SPELLINGS, row_names="name")
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
    inputs.check_unique(barcodes, "barcode", folder)
    inputs.check_unique(features["id"], "gene id", folder)
    symbols = features.get("name", features["id"])
    var = pd.DataFrame({"name": symbols.to_numpy()}, index=features["id"].to_numpy())
    return anndata.AnnData(counts, obs=pd.DataFrame(index=barcodes.to_numpy()), var=var)


def read_barcodes(path):
    """The barcodes of a 10x folder, in the order of its matrix."""
    return inputs.read_table(path, {"barcode": ("barcode", "barcodes", "x")}, "barcode")["barcode"]


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
        # Hidden files are a Mac's ._NAME beside every file, or a program's own.
        pattern = re.compile(rf"[^.].*[_.-]{re.escape(name)}(\.gz)?")
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
    content = inputs.read_bytes(path)
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


def join_genes(features):
    """The genes of all slides, joined by id and in the order of the ids: a table gene_ids, name and
    a column of bool a slide, listed_<key>, by the symbols, made unique.

    `features` gives (key, var) of every slide, one at a time. Of several symbols of an id the first
    of the alphabet is taken, and one that only repeats the id gives way to any other, so that the
    order of the slides does not matter. InputError for a slide that shares no id with the others.
    """
    symbols, listed = pd.Series(dtype=str), {}
    for key, var in features:
        listed[key] = var.index
        found = var["name"].astype(str).set_axis(var.index)
        symbols = pd.concat([symbols, found])
    table = symbols.rename_axis("id").rename("name").reset_index()
    table["repeats"] = table["id"] == table["name"]
    table = table.sort_values(["id", "repeats", "name"]).drop_duplicates("id")
    ids = pd.Index(table["id"])
    genes = pd.DataFrame({"gene_ids": ids, "name": table["name"].to_numpy()})
    genes.index = name_genes(genes["name"])
    for key, found in listed.items():
        genes[f"listed_{key}"] = ids.isin(found)
    report_missing_genes(genes, list(listed))
    return genes


def report_missing_genes(genes, keys):
    """Print how many genes there are and how many of them a slide does not list; InputError for a
    slide that shares none with the others.
    """
    listed = genes[[f"listed_{key}" for key in keys]]
    print(f"{len(genes):,} genes, {listed.all(axis=1).sum():,} of them in every slide")
    by_others = listed.sum(axis=1)
    for key in keys:
        own = genes[f"listed_{key}"]
        if len(keys) > 1 and not (own & (by_others > 1)).any():
            raise InputError(
                f"slide {key} shares no gene id with the others: are they of one species and one "
                "annotation?"
            )
        if not own.all():
            print(f"  slide {key} does not list {(~own).sum():,} of them: no counts there")


def take_genes(table, genes):
    """The spots of one slide with these genes, a part of join_genes's table; no counts of one that
    the slide does not list.
    """
    places = pd.Index(genes["gene_ids"]).get_indexer(table.var_names)
    found = np.flatnonzero(places >= 0)
    shape = table.n_vars, len(genes)
    ones = np.ones(len(found), table.X.dtype)
    chosen = scipy.sparse.csr_matrix((ones, (found, places[found])), shape)
    counts = scipy.sparse.csr_matrix(table.X @ chosen)
    counts.sort_indices()
    return anndata.AnnData(counts, table.obs, genes)


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
    thumbnail = imaging.read_thumbnail(slide)
    return lay_grid(slide, thumbnail), thumbnail


def check_pitch(slide, positions):
    """Warn where the spots are neither as far apart as Visium's nor as those of ST, HEST or bins.

    Visium and ST may be a tenth off: on sections of ST whose spots were measured one by one it is
    6 %. Patches that were made elsewhere do not follow from the positions.
    """
    if imaging.holds_patches(slide.image):
        return
    pitch = measure_pitch(positions)
    um = pitch * slide.um_per_px
    pitches, expected = PITCHES, "100 (Visium), 200 (ST), or HEST-1k's 110 (ST) or 128 (Visium HD)"
    # A spot of Visium HD's bins is called by its width.
    stated = re.match(r"s_(\d+)um_", str(positions.index[0]) if len(positions) else "")
    if stated:
        pitches, expected = {float(stated[1]): 0.1}, f"{float(stated[1]):g}, as their barcodes say"
    if len(positions) < 2 or any(abs(um / known - 1) < share for known, share in pitches.items()):
        return
    likely = next(iter(pitches))
    other = "unless these are positions in another frame, as px of a scaled image or microns"
    if any(abs(pitch / known - 1) < 0.02 for known in pitches):
        other = "but it seems that these are positions in another frame, in microns: give px"
    inputs.warn(
        f"{slide.positions}: the spots are {pitch:.4g} px apart, which at um_per_px "
        f"{slide.um_per_px:g} are {um:.0f} um; expected {expected}: "
        f"with um_per_px {likely / pitch:.4g} they would be {likely:g}, {other}"
    )


def read_spots(slide, positions, genome="", named=()):
    """The spots of a slide as AnnData, by array_row and array_col; without a matrix X is None.

    obs holds positions, tissue_index, donor, barcode, pitch (px), block and, with a matrix,
    n_counts. Left out are spots without a position, not in_tissue or without counts; one line a
    reason says so, and uns["left_out"] counts them by reason. `genome` and `named` are those
    of read_matrix.
    """
    if slide.matrix is None:
        table = anndata.AnnData(obs=positions)
    else:
        table = read_counts(slide, positions, genome, named)
    table = leave_out(slide, table, table.obs["in_tissue"] != 1, "not in_tissue")
    if not table.n_obs:
        raise InputError(f"{slide.positions}: no spot is in_tissue")
    if slide.matrix is not None:
        table = leave_out(slide, table, table.obs["n_counts"] == 0, "without counts")
        if not table.n_obs:
            raise InputError(f"{slide.matrix}: no spot has a count")
    if imaging.holds_patches(slide.image):
        with imaging.open_hest_patches(slide.image) as (barcodes, _):
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


def read_counts(slide, positions, genome, named):
    """The matrix of a slide, checked, with positions and n_counts in obs.

    Barcodes without a position are left out where most have one.
    """
    table = read_matrix(slide.matrix, genome, named)
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
        inputs.warn(
            f"{slide.positions}: {count} of {slide.matrix} have no position and are left out, "
            f"as {barcode}: add them if they are wanted"
        )
        table = leave_out(slide, table, lost, "without a position", say=False)
    table.obs = positions.iloc[places[~lost]].set_axis(table.obs_names)
    # Over all genes of the matrix, also those that other slides lack.
    table.obs["n_counts"] = np.asarray(table.X.sum(1)).ravel()
    if has_one_depth(table.X):
        inputs.warn(
            f"{slide.matrix}: all spots have about {table.obs['n_counts'].median():,.0f} counts, "
            "so that these are no raw counts: give those"
        )
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
    saturation = np.where(high < imaging.DARK_SLIDE, 0, (high - low) / np.maximum(high, 1))
    saturation = scipy.ndimage.median_filter(saturation, 5)
    if np.ptp(saturation) == 0:
        return np.zeros(saturation.shape, bool)
    tissue = saturation > threshold_otsu(saturation)
    least = int(4 * (SPOT_PITCH / um_per_px) ** 2)
    return remove_small_holes(remove_small_objects(tissue, max_size=least), max_size=least)
