"""Where the spots of a slide lie: rows and columns in px of its image, read or laid as a grid."""

import re

import numpy as np
import pandas as pd
import scipy.ndimage
import scipy.sparse
from scipy.spatial import cKDTree
from skimage.filters import threshold_otsu
from skimage.morphology import remove_small_holes, remove_small_objects

from common import POSITION_COLUMNS
from slides import imaging, inputs
from slides.hest_patches import holds_patches
from slides.imaging import ARRAY, PLACE
from slides.sections import (
    check_one_sample,
    find_part_spots,
    is_anndata,
    list_libraries,
    read_anndata,
    split_part,
)
from study.errors import InputError

SPOT_PITCH = 100.0  # um between the spots of Visium, and of a grid over a slide without positions
# um: the share by which spots may be off, of Visium, its forerunner ST, and two that HEST-1k has by
# design and states exactly: ST of 110 um and Visium HD, whose bins are summed to 128 um. Of these
# Visium's array alone is hexagonal, and HEST-1k's squares of Xenium alone are as far apart.
PITCHES = {SPOT_PITCH: 0.1, 200.0: 0.1, 110.0: 0.02, 128.0: 0.02}
HEST_BIN = r"\d{3,}x\d{3,}"  # how HEST-1k calls the squares of Xenium, 100 um wide, and Visium HD
LARGEST_SLIDE = 210.0  # mm: glass for sections of whole organs has 203
BLOCK_WIDTH = 5  # pitches
THOUSANDS = r"[1-9]\d{0,2}([.,]\d{3})+"  # as 1.234
# How the columns of positions are called by Space Ranger, its readers in R and Python, and Seurat.
POSITION_SPELLINGS = {
    "barcode": ("barcode", "barcodes", "barcode_id", "cell", "cell_id", "spot", "spot_id"),
    "in_tissue": ("in_tissue", "intissue", "tissue"),
    "array_row": ("array_row", "row"),
    "array_col": ("array_col", "col"),
    "pxl_row": ("pxl_row_in_fullres", "pxl_row", "row_pxl", "pixel_row", "imagerow", "image_row"),
    "pxl_col": ("pxl_col_in_fullres", "pxl_col", "col_pxl", "pixel_col", "imagecol", "image_col"),
}

OFF_ARRAY = 0.5  # pitches from its place on the array, beyond which a spot is warned of
# How a DataFrame of centres calls its columns, x beside y.
X_SPELLINGS = (*POSITION_SPELLINGS["pxl_col"], "x")
Y_SPELLINGS = (*POSITION_SPELLINGS["pxl_row"], "y")


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
        if inputs.is_called(file, ".parquet"):
            table = inputs.read_parquet(file, POSITION_SPELLINGS)
        else:
            table = inputs.read_table(file, POSITION_SPELLINGS, row_names="barcode")
        check_position_columns(file, table)
        table = table[find_part_spots(file, part, table.set_index("barcode"))]
    return parse_positions(path, table[POSITION_COLUMNS].copy())


def parse_positions(path, table):
    """Positions by barcode, in whole numbers, of a table of texts or numbers with
    POSITION_COLUMNS, as inputs.read_table gives it.
    """
    separator = table.attrs["separator"]
    truths = {"true": "1", "false": "0"}  # of R and pandas
    table["in_tissue"] = table["in_tissue"].map(lambda value: truths.get(str(value).lower(), value))
    texts = table.astype(str)
    for column in POSITION_COLUMNS[1:]:
        check_thousands(path, texts, column, separator)
        numbers = inputs.parse_numbers(table[column], separator)
        unknown = ~(numbers.abs() < 2**31)
        if unknown.any():
            barcode, text = texts.loc[unknown, ["barcode", column]].iloc[0]
            raise InputError(
                f"{path}: the position of barcode {barcode} is not a number ({column} {text!r})"
            )
        table[column] = np.rint(numbers).astype(np.int64)
    odd = table[~table["in_tissue"].isin([0, 1])]
    if len(odd):
        barcode, value = odd[["barcode", "in_tissue"]].iloc[0]
        raise InputError(f"{path}: in_tissue of barcode {barcode} is {value}; expected 0 or 1")
    unnamed = table[table["barcode"].astype(str).str.strip() == ""]
    if len(unnamed):
        row, col = unnamed[PLACE].iloc[0]
        raise InputError(f"{path}: the spot at pxl_row {row} and pxl_col {col} has no barcode")
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
    twins = spots[spots.duplicated(PLACE, keep=False)]
    if twins.empty:
        return
    cells = texts.loc[twins.index]
    for column in PLACE:
        marked = cells[column].str.fullmatch(THOUSANDS)
        if marked.any():  # Cut to whole numbers, the thousands of a slide are a few pixels.
            refuse_thousands(path, cells[marked], column)
    first, second, *_ = twins.sort_values(PLACE, kind="stable").itertuples()
    raise InputError(
        f"{path}: the spots {first.barcode} and {second.barcode} lie on one pixel, pxl_row "
        f"{first.pxl_row} and pxl_col {first.pxl_col}: fix the positions"
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
    spatial = order_axes(spots.obsm["spatial"])
    if scipy.sparse.issparse(spatial):
        spatial = spatial.toarray()
    try:
        centres = np.asarray(spatial, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(
            f'{path}: obsm["spatial"] holds no numbers ({error}): give x and y in px of the '
            "full-resolution image"
        ) from None
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
    check_frame(path, spots.uns, measure_pitch(table, least=0.0))
    if {*ARRAY} <= {*spots.obs}:
        table[ARRAY] = spots.obs[ARRAY].to_numpy()
    else:  # Half pitches, as Visium's columns count them, so that no two spots get the same ones.
        print(f"{path}: no array_row and array_col, by which swapped x and y would be noticed")
        table[ARRAY] = np.rint((table[PLACE] - table[PLACE].min()) / (measure_pitch(table) / 2))
    if "in_tissue" in spots.obs:
        table["in_tissue"] = spots.obs["in_tissue"].to_numpy()
    table = table.astype(str)
    table.attrs["separator"] = "\t"
    return table


def order_axes(spatial):
    """obsm["spatial"] with x before y, where it is a DataFrame whose columns say which is which."""
    if not isinstance(spatial, pd.DataFrame):
        return spatial
    names = {inputs.normalise_name(str(column)): column for column in spatial}
    for x, y in zip(X_SPELLINGS, Y_SPELLINGS, strict=True):
        if {x, y} <= names.keys():
            return spatial[[names[x], names[y]]]
    return spatial


def check_frame(path, uns, pitch):
    """InputError where an .h5ad says itself that its positions are those on a scaled image.

    It does by the spots' diameter on the full-resolution image: no spot of Visium, 55 um wide and
    100 um from the next, or of ST, 100 and 200, reaches the next. `pitch` is that of the positions.
    """
    for library, facts in list_libraries(uns).items():
        scales = facts.get("scalefactors")
        if not hasattr(scales, "get"):  # A list or text does not say which number is which.
            continue
        diameter = read_scale(scales, "spot_diameter_fullres")
        if not diameter > 1.1 * pitch > 0:  # Square bins are as wide as they are far apart.
            continue
        stated = (
            f'{path}: obsm["spatial"] is {pitch:.4g} px from spot to spot, but uns["spatial"]'
            f'["{library}"] has spots of {diameter:.4g} px: these are positions in another frame'
        )
        for name in ("tissue_hires_scalef", "tissue_lowres_scalef"):
            scale = read_scale(scales, name)
            if scale > 0 and 0.4 < diameter / (pitch / scale) < 0.9:
                raise InputError(f"{stated}, scaled by {name} {scale:g}: divide them by it")
        raise InputError(f"{stated} than px of the full-resolution image: give those")


def read_scale(scales, name):
    """A number of an .h5ad's scale factors, which R keeps as an array of one; 0 for none."""
    value = pd.to_numeric(pd.Series(np.ravel(scales.get(name, 0))), errors="coerce")
    return float(value.iloc[0]) if len(value) and np.isfinite(value.iloc[0]) else 0.0


def check_position_columns(path, table):
    """InputError unless a table read by read_table has all columns of positions, and no doubt."""
    expected = ", ".join(POSITION_COLUMNS)
    if not table.attrs["named"]:
        number = re.compile(r"[-+]?\d+([.,]\d+)?([eE][-+]?\d+)?")
        if table.empty or not any(map(number.fullmatch, table.iloc[0])):
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


def measure_pitch(positions, least=1.0):
    """px from a spot to its nearest, median over the slide; `least` at least, and for one alone."""
    if len(positions) < 2:
        return least
    centres = positions[PLACE].to_numpy(np.float64)
    distances, _ = cKDTree(centres).query(centres, k=2)  # the nearest of all is the spot itself
    return max(float(np.median(distances[:, 1])), least)


def lay_blocks(positions, pitch, tissue_index):
    """Of each spot the square that it lies in, BLOCK_WIDTH pitches wide, as "slide:column:row".

    Folds and intervals take blocks whole.
    """
    centres = positions[["pxl_col", "pxl_row"]].to_numpy(np.float64)
    squares = (centres // (BLOCK_WIDTH * pitch)).astype(int)
    return [f"{tissue_index}:{column}:{row}" for column, row in squares]


def place_spots(slide):
    """(positions as read_positions gives them, Thumbnail or None) of a slide; of one without
    positions a grid, and the thumbnail on which its tissue was found, which took all its pixels.
    """
    check_tags(slide)
    if slide.positions is not None:
        positions = read_positions(slide.positions)
        check_pitch(slide, positions)
        check_array(slide, positions)
        return positions, None
    image = imaging.open_image(inputs.unpack(slide.image))
    thumbnail = imaging.make_thumbnail(image, imaging.thumbnail_step(slide))
    return lay_grid(slide, thumbnail), thumbnail


def check_pitch(slide, positions):
    """Warn where the spots are neither as far apart as Visium's nor as those of ST, HEST or bins.

    Visium and ST may be a tenth off: on sections of ST whose spots were measured one by one it is
    6 %.
    """
    if holds_patches(slide.image):  # which were made elsewhere, of no matter which positions
        return
    pitch = measure_pitch(positions)
    um = pitch * slide.um_per_px
    pitches, expected = PITCHES, "100 (Visium), 200 (ST), or HEST-1k's 110 (ST) or 128 (Visium HD)"
    # A spot of Visium HD's bins is called by its width.
    stated = re.match(r"s_(\d+)um_", str(positions.index[0]) if len(positions) else "")
    if stated:
        pitches, expected = {float(stated[1]): 0.1}, f"{float(stated[1]):g}, as their barcodes say"
    elif is_hexagonal(positions):
        pitches, expected = {SPOT_PITCH: 0.1}, "100, as Visium's array"
    elif is_square(positions) and not re.fullmatch(HEST_BIN, str(positions.index[0])):
        pitches = {um: share for um, share in PITCHES.items() if um != SPOT_PITCH}
        expected = "200 of a square grid (ST), HEST-1k's 110 or 128, or a pitch of your own"
    if len(positions) < 2 or any(abs(um / known - 1) < share for known, share in pitches.items()):
        return
    # HEST-1k states its own exactly, so they are no guess.
    guesses = [known for known, share in pitches.items() if share > 0.05]
    likely = " or ".join(f"{known / pitch:.4g} they would be {known:g}" for known in guesses)
    other = "unless these are positions in another frame, as px of a scaled image or microns"
    if any(abs(pitch / known - 1) < 0.02 for known in pitches):
        other = "unless these are positions in another frame, in microns, as it seems: then give px"
    inputs.warn(
        f"{slide.positions}: the spots are {pitch:.4g} px apart, which at um_per_px "
        f"{slide.um_per_px:g} are {um:.0f} um; expected {expected}: "
        f"with um_per_px {likely}, {other}"
    )


def check_array(slide, positions):
    """Warn where spots lie elsewhere than their places on the array say, as where the order of the
    centres is not that of the barcodes, or a number was cut.
    """
    affine, array, rank = imaging.fit_array(positions)
    if len(array) < 4 or rank < 3:  # The array is no more than a line.
        return
    away = np.linalg.norm(array @ affine - positions[PLACE], axis=1) / measure_pitch(positions)
    if away.max() > OFF_ARRAY:
        inputs.warn(
            f"{slide.positions}: {(away > OFF_ARRAY).sum()} of {len(away)} spots lie more than "
            f"{OFF_ARRAY:g} pitches from where array_row and array_col put them, as "
            f"{positions.index[away.argmax()]}, {away.max():.1f}: are the centres in the order of "
            "the barcodes, and is no number cut?"
        )


def is_hexagonal(positions):
    """Whether the spots are numbered as on Visium's array: of row + column every other number."""
    parity = (positions["array_row"] + positions["array_col"]) % 2
    rows = positions["array_row"] % 2
    return len(positions) > 1 and parity.nunique() == 1 and rows.nunique() == 2


def is_square(positions):
    """Whether the spots lie on a square grid, as those of ST do.

    It is seen from the directions to neighbours, and not from the array: where a file has none, its
    rows and columns are made from px, and say nothing. Directions at right angles have the same
    fourth power, and the three of a hexagonal grid cancel out. Those of one line have the same
    square.
    """
    if len(positions) < 2:
        return False
    centres = positions["pxl_col"].to_numpy() + 1j * positions["pxl_row"].to_numpy()
    tree = cKDTree(np.column_stack([centres.real, centres.imag]))
    near = tree.query_pairs(1.25 * measure_pitch(positions), output_type="ndarray")
    angles = np.angle(centres[near[:, 0]] - centres[near[:, 1]])
    return abs(np.exp(4j * angles).mean()) > 0.5 > abs(np.exp(2j * angles).mean())


def check_tags(slide):
    """Warn where the image states another resolution than um_per_px."""
    if holds_patches(slide.image):
        return
    try:
        stated = imaging.read_resolution(inputs.unpack(slide.image))
    except InputError:
        return
    if abs(stated / slide.um_per_px - 1) > 0.1:
        inputs.warn(
            f"{slide.image}: um_per_px is {slide.um_per_px:g}, and its tags say {stated:.4g}: "
            "which is right?"
        )


def lay_grid(slide, thumbnail):
    """A hexagonal grid over a slide's tissue, as read_positions gives positions.

    Spots are SPOT_PITCH um apart and numbered as on Visium: row + column is even.
    """
    height, width = thumbnail.slide_shape
    high, wide = (side * slide.um_per_px / 1000 for side in (height, width))
    if min(high, wide) < SPOT_PITCH / 1000 or max(high, wide) > LARGEST_SLIDE:
        raise InputError(
            f"{slide.image}: at um_per_px {slide.um_per_px:g} its {height} x {width} px are "
            f"{high:.3g} x {wide:.3g} mm, which no section is: give um per px, about 0.5 at "
            "20x (um_per_px in slides.csv, --um-per-px in 26)"
        )
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
