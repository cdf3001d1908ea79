"""Slides to patches.npy, dataset.csv and counts.h5ad: the one place where slides and counts are read.

Question   Which pixels and which expression belong to each spot?
Reads      <DATA_ROOT>/slides.csv and the images, positions and matrices that it names
Writes     <DATA_ROOT>/dataset/: patches.npy (N, 224, 224, 3) uint8 RGB, dataset.csv (the training target),
           counts.h5ad (raw counts of the panel; obs: blocks; var: per slide the counting-noise ceiling and
           Moran's I of each gene; colour statistics of the patches), meta.json, contact_sheet.png
Prints     per slide: spots, image and how it is read, patches over its border; then the panel and the target
Command    python 19_make_patches_and_csv.py --data-root GSE240429_data
Override   python 19_make_patches_and_csv.py --data-root HER2ST_data --target lognorm
           python 19_make_patches_and_csv.py --data-root mine --from-spaceranger A/outs,B/outs --images A.tif,B.tif

A slide is never read into memory: contiguous TIFFs are memory-mapped, tiles and strips are decoded once each and
only where a patch lies. JPEG and PNG have no such access and are decoded whole.
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import struct
import tempfile
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import anndata
import harmonypy
import numpy as np
import pandas as pd
import scanpy
import scipy.io
import scipy.ndimage
import scipy.sparse
import tifffile
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.spatial import cKDTree
from skimage.filters import threshold_otsu
from skimage.morphology import remove_small_holes, remove_small_objects
from tqdm import tqdm

import common
import runner
from common import PATCH_SIZE, InputError

# ---------------------------------------------------------------------------------------------- constants
DATA_ROOT = "GSE240429_data"  # folder with slides.csv
TARGET = "harmony"  # harmony (the paper's: Harmony over all slides) or lognorm
HVG_PER_SLIDE = 1000  # highly variable genes of each slide; their union is the panel
SEED = 42  # of Harmony's clustering
PANEL = ""  # CSV with a column gene: the panel, in place of variable genes
UM_PER_PX = 0.0  # of the patches; another slide is resampled to it; 0 = each slide's own
FROM_SPACERANGER = ""  # folders outs/ of Space Ranger, comma-separated, or those that hold one: write slides.csv first
IMAGES = ""  # their full-resolution images, in the same order
USE_HIRES = False  # true = read tissue_hires_image.png, where there is no full-resolution image
THUMBNAIL = False  # true = write thumbnail_<slide>.png too, THUMBNAIL_UM um a pixel
# --------------------------------------------------------------------------------------------------------

BLOCK_WIDTH = 5  # pitches
THUMBNAIL_UM = 8.0
GRID_PITCH = 100.0  # um between the spots of a slide without positions, as on Visium
FEW_COUNTS = 100  # two spots with fewer may be the same by chance
MANIFEST = ["tissue_index", "name", "donor", "image", "um_per_px", "positions", "matrix"]
DAMAGED_TIFF = (tifffile.TiffFileError, ValueError, TypeError, LookupError, ArithmeticError, struct.error, OSError)
DAMAGED_TIFF += (RuntimeError,)  # of the codecs
Image.MAX_IMAGE_PIXELS = 4_000_000_000  # a whole slide is no decompression bomb


# ---------------------------------------------------------------------------------------------- manifest


def read_manifest(root):
    """slides.csv as a DataFrame with checked, absolute paths; `matrix` may be empty."""
    path = root / "slides.csv"
    if not path.is_file():
        raise InputError(f"no {path}: make it with 17_download_data.py or 18_simulate_slides.py, or write it by hand")
    try:
        table = pd.read_csv(path, dtype={"name": str, "donor": str, "image": str, "positions": str, "matrix": str})
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a CSV table ({error})") from None
    if missing := [column for column in MANIFEST if column not in table.columns]:
        raise InputError(f"{path}: the column {missing[0]} is missing; expected {', '.join(MANIFEST)}")
    if (
        table.empty
        or not pd.api.types.is_integer_dtype(table["tissue_index"])
        or table["tissue_index"].duplicated().any()
    ):
        raise InputError(f"{path}: tissue_index must be a different whole number for every slide, and one at least")
    if not pd.api.types.is_numeric_dtype(table["um_per_px"]) or not table["um_per_px"].between(0.05, 20).all():
        raise InputError(f"{path}: um_per_px must be a number from 0.05 to 20 for every slide")
    if table["name"].isna().any() or table["name"].duplicated().any():
        raise InputError(f"{path}: every slide needs a name of its own")
    for column in ("image", "positions", "matrix"):
        for row, value in table[column].items():
            if pd.isna(value) and column == "matrix":
                continue
            if pd.isna(value) and column == "positions" and pd.isna(table["matrix"][row]):
                continue  # a grid is laid over the tissue
            full, base = (Path(os.path.abspath(part)) for part in (root / str(value), root))  # noqa: PTH100 - links may
            if not full.is_relative_to(base):  # lead elsewhere: the user made them
                raise InputError(f"{path}: {column} {value!r} lies outside {root}; copy or link it into the data root")
            if not (full.exists() if column == "matrix" else full.is_file()):
                which = f"{column} {value!r} of slide {table['tissue_index'][row]}"
                raise InputError(f"{path}: {which} does not exist: fetch it with 17_download_data.py or mend the path")
            table.loc[row, column] = str(full)
    return table.sort_values("tissue_index").reset_index(drop=True)


def find_outs(folder):
    """{"positions", "matrix", "image"} of a folder outs/ of Space Ranger, or one that holds it; the image is coarse."""
    outs = folder / "outs" if (folder / "outs").is_dir() else folder
    if (outs / "binned_outputs").is_dir():
        raise InputError(f"{outs}: Visium HD, which has no spots of 55 um; Visium and CytAssist are read")
    parts = {
        "positions": ["spatial/tissue_positions.csv", "spatial/tissue_positions_list.csv"],
        "matrix": ["filtered_feature_bc_matrix.h5", "filtered_feature_bc_matrix"],
    }
    found = {part: next((outs / n for n in names if (outs / n).exists()), None) for part, names in parts.items()}
    for part, path in found.items():
        if path is None:
            raise InputError(f"{outs}: no {' or '.join(parts[part])}: expected a folder outs/ of Space Ranger")
    return found | {"image": outs / "spatial" / "tissue_hires_image.png"}


def write_manifest(root, folders, images):
    """slides.csv, and root/links/ to what it names, for Space Ranger's folders `folders` and their images."""
    if len(images) not in (0, len(folders)):
        raise InputError(
            f"--images: {len(images)} images for {len(folders)} folders of Space Ranger: give one for each"
        )
    if not images and not USE_HIRES:
        raise InputError(
            f"{folders[0]} holds no full-resolution image, which Space Ranger got with --image or --cytaimage: name it "
            "with --images, or take --use-hires"
        )
    names, lines, links = [(f.parent if f.name == "outs" else f).resolve().name for f in folders], [], {}
    for slide, (folder, name) in enumerate(zip(folders, names, strict=True), 1):
        found = find_outs(folder) | ({"image": images[slide - 1]} if images else {})
        image = found["image"]
        name += f"_{slide}" * (names.count(name) > 1)
        positions = read_positions(found["positions"])
        um_per_px = GRID_PITCH / lay_blocks(positions, slide)[0]  # Visium's spots are 100 um apart
        for part, path in found.items():
            common.require(path.exists(), f"{part} {path}: no such file")
            links[root / "links" / name / path.name] = path
            found[part] = Path("links", name, path.name)
        if not images:
            scale = read_hires_scale(image)
            positions[["pxl_row", "pxl_col"]] = np.rint(positions[["pxl_row", "pxl_col"]] * scale).astype(int)
            um_per_px /= scale
            found["positions"] = Path("links", name, "positions_hires.csv")
            links[root / found["positions"]] = positions
            print(f"{name}: the hires image, {um_per_px:.2f} um/px: 224 px of it are {PATCH_SIZE * um_per_px:.0f} um")
        lines.append({"tissue_index": slide, "name": name, "donor": name, "um_per_px": round(um_per_px, 4), **found})
    table = pd.DataFrame(lines)[MANIFEST].astype(dict.fromkeys(("image", "positions", "matrix"), str))
    path = root / "slides.csv"
    if path.exists() and path.read_text() != table.to_csv(index=False):
        raise InputError(f"{path} is there already and names other slides: leave out --from-spaceranger, or remove it")
    for link, content in links.items():
        if isinstance(content, pd.DataFrame):
            common.save_csv(link, content.reset_index())
            continue
        common.require(link.is_symlink() or not link.exists(), f"{link} is no link: move it away")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(content.resolve())
    common.save_csv(path, table)
    print(f"wrote {path}: each slide is taken for another donor's; mend that there if it is not so")


def read_hires_scale(image):
    """px of the hires image a full-resolution px, as the file beside it says."""
    path = image.with_name("scalefactors_json.json")
    try:
        return float(json.loads(path.read_text())["tissue_hires_scalef"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no tissue_hires_scalef ({error})") from None


# ---------------------------------------------------------------------------------------------- spots


def read_positions(path):
    """Space Ranger positions with or without a header: POSITION_COLUMNS, one row a barcode."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            header = 0 if file.readline().startswith("barcode") else None
        table = pd.read_csv(path, header=header, encoding="utf-8-sig")
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a positions table ({error})") from None
    if table.shape[1] != 6:
        raise InputError(f"{path}: {table.shape[1]} columns; expected {', '.join(common.POSITION_COLUMNS)}")
    table.columns = common.POSITION_COLUMNS
    numbers = table[common.POSITION_COLUMNS[1:]].apply(pd.to_numeric, errors="coerce")
    if not np.isfinite(numbers.to_numpy(float)).all():
        bad = table["barcode"][~np.isfinite(numbers.to_numpy(float)).all(1)].iloc[0]
        raise InputError(f"{path}: the position of barcode {bad} is not a number")
    table[common.POSITION_COLUMNS[1:]] = np.rint(numbers).astype(np.int64)
    table["barcode"] = table["barcode"].astype(str)
    check_unique(table["barcode"], "barcode", path)
    return table.set_index("barcode")


def find_part(folder, name):
    """`name` or `name`.gz in a 10x folder."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise InputError(f"no {name} (plain or .gz) in {folder}: expected a 10x folder")


def read_matrix(path):
    """Counts of one slide as AnnData (spots x genes, CSR): var_names are gene ids, var["name"] the symbols."""
    path = Path(path)
    if path.is_file():
        try:
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # names that align_genes makes unique
                table = scanpy.read_10x_h5(path, gex_only=True)
        except Exception as error:  # h5py raises what it likes; the cause goes into the message
            raise InputError(f"{path}: not a 10x filtered_feature_bc_matrix.h5 ({error})") from None
        check_unique(table.obs_names, "barcode", path)
        check_unique(table.var["gene_ids"], "gene id", path)
        table.var["name"] = table.var_names
        table.var_names = table.var["gene_ids"].astype(str)
        return table
    parts = {name: find_part(path, name) for name in ("matrix.mtx", "barcodes.tsv", "features.tsv")}
    read_table = functools.partial(pd.read_csv, header=None, sep="\t", dtype=str)
    readers = {"barcodes.tsv": read_table, "features.tsv": read_table, "matrix.mtx": scipy.io.mmread}
    content = {}
    for name, reader in readers.items():
        try:
            content[name] = reader(parts[name])
        except (ValueError, OSError, EOFError, zlib.error) as error:
            raise InputError(f"{parts[name]}: not a whole file of this kind ({error}); fetch it again") from None
    barcodes, features = content["barcodes.tsv"][0], content["features.tsv"]
    counts = scipy.sparse.csr_matrix(content["matrix.mtx"].T)
    if counts.shape != (len(barcodes), len(features)):
        raise InputError(
            f"{parts['matrix.mtx']}: {counts.shape[1]} genes x {counts.shape[0]} spots, but there are {len(features)} "
            f"features and {len(barcodes)} barcodes: the three files are not of one slide"
        )
    if features.shape[1] > 2:
        keep = (features[2] == "Gene Expression").to_numpy()  # CytAssist and multi-modal folders hold other kinds too
        counts, features = counts[:, keep], features[keep]
    check_unique(barcodes, "barcode", path)
    check_unique(features[0], "gene id", path)
    var = pd.DataFrame({"name": features[min(1, features.shape[1] - 1)].to_numpy()}, index=features[0].to_numpy())
    return anndata.AnnData(counts, obs=pd.DataFrame(index=barcodes.to_numpy()), var=var)


def check_unique(names, kind, path):
    """InputError where one of the names stands there twice."""
    names = pd.Series(names)
    if names.duplicated().any():
        raise InputError(f"{path}: {kind} {names[names.duplicated()].iloc[0]} stands there twice")


def check_counts(table, path):
    """Raise InputError unless the counts are finite whole numbers from 0 on."""
    values = table.X.data
    if not np.isfinite(values).all() or (values < 0).any() or (values != np.rint(values)).any():
        raise InputError(
            f"{path}: holds values that are no counts (negative, fractional or NaN); raw counts are needed"
        )


def read_slide(slide):
    """Counts of one slide, rows sorted by array_row, array_col, positions in obs; X is empty without a matrix."""
    positions = lay_grid(slide) if pd.isna(slide["positions"]) else read_positions(slide["positions"])
    if pd.isna(slide["matrix"]):
        inside = positions[positions["in_tissue"] == 1]
        common.require(len(inside), f"{slide['positions']}: no spot is in_tissue")
        table = anndata.AnnData(obs=inside)
    else:
        table = read_matrix(slide["matrix"])
        check_counts(table, slide["matrix"])
        lost = table.obs_names.difference(positions.index)
        if len(lost):
            raise InputError(
                f"{slide['positions']}: no position for barcode {lost[0]} of {slide['matrix']} "
                f"({len(lost)} such barcodes): the two files are not of one slide"
            )
        table.obs = positions.loc[table.obs_names]
        table.obs["n_counts"] = np.asarray(table.X.sum(1)).ravel()  # over all genes, also those of this slide alone
        empty = (table.obs["n_counts"] == 0).to_numpy()
        common.require(not empty.all(), f"{slide['matrix']}: no spot has a count")
        if empty.any():
            first = table.obs_names[empty][0]
            print(f"slide {slide['tissue_index']}: {empty.sum()} spots without counts are left out, as {first}")
            table = table[~empty].copy()
    table = table[np.lexsort([table.obs["array_col"], table.obs["array_row"]])].copy()
    table.obs["tissue_index"], table.obs["donor"] = slide["tissue_index"], str(slide["donor"])
    table.obs["pitch"], table.obs["block"] = lay_blocks(table.obs, slide["tissue_index"])
    table.obs["barcode"] = table.obs_names
    table.obs_names = [f"{slide['tissue_index']}_{barcode}" for barcode in table.obs_names]
    return table


def thumbnail_step(slide):
    """px of a slide a px of its thumbnail."""
    return max(1, round(THUMBNAIL_UM / slide["um_per_px"]))


@functools.lru_cache(maxsize=1)  # for the grid, and to be saved
def read_thumbnail(path, step):
    """((h, w, 3) uint8, the slide's (height, width) in px)."""
    shape = visit_slide(path, taker := Thumbnail(step))[1]
    return taker.pixels(), shape


def find_tissue(thumbnail, um_per_px):
    """(h, w) bool: saturation above Otsu's threshold; holes and specks of less than four spots' area are undone."""
    high, low = thumbnail.max(2).astype(np.float64), thumbnail.min(2)
    saturation = scipy.ndimage.median_filter((high - low) / np.maximum(high, 1), 5)
    if np.ptp(saturation) == 0:
        return np.zeros(saturation.shape, bool)
    tissue, least = saturation > threshold_otsu(saturation), int(4 * (GRID_PITCH / um_per_px) ** 2)
    return remove_small_holes(remove_small_objects(tissue, max_size=least), max_size=least)


def lay_grid(slide):
    """Positions, as read_positions gives them, of a hexagonal grid with a pitch of GRID_PITCH over a slide's tissue."""
    thumbnail, (height, width) = read_thumbnail(slide["image"], step := thumbnail_step(slide))
    tissue, pitch = find_tissue(thumbnail, step * slide["um_per_px"]), GRID_PITCH / slide["um_per_px"]
    down, across = height / pitch, width / pitch
    rows, cols = (part.ravel() for part in np.mgrid[0 : int(down / 0.866) + 1, 0 : int(2 * across) + 1])
    rows, cols = rows[(rows + cols) % 2 == 0], cols[(rows + cols) % 2 == 0]  # as Visium numbers them
    y, x = np.rint((rows + 0.5) * pitch * 0.75**0.5).astype(int), np.rint((cols + 1) * pitch / 2).astype(int)
    inside = (y < height) & (x < width)
    inside[inside] = tissue[y[inside] // step, x[inside] // step]
    if not inside.any():
        raise InputError(f"{slide['image']}: no tissue found (saturation); give the positions of its spots")
    names = [f"{row}x{col}" for row, col in zip(rows[inside], cols[inside], strict=True)]
    values = [np.ones(inside.sum(), int), rows[inside], cols[inside], y[inside], x[inside]]
    return pd.DataFrame(dict(zip(common.POSITION_COLUMNS[1:], values, strict=True)), pd.Index(names, name="barcode"))


def lay_blocks(positions, tissue_index):
    """(pitch, blocks): px from a spot to its nearest, median over the slide (1 for a spot alone), and of each spot the
    square, BLOCK_WIDTH pitches wide, that it lies in, as "slide:column:row". Folds and intervals take blocks whole.
    """
    centres = positions[["pxl_col", "pxl_row"]].to_numpy(np.float64)
    nearest = cKDTree(centres).query(centres, k=2)[0][:, 1]  # infinite for a spot alone, 0 where two are in one place
    pitch = max(float(np.median(nearest)), 1.0) if len(centres) > 1 else 1.0
    return pitch, [f"{tissue_index}:{x}:{y}" for x, y in (centres // (BLOCK_WIDTH * pitch)).astype(int)]


# ---------------------------------------------------------------------------------------------- pixels


class PatchCopier:
    """Takes regions of a slide and copies what they share with each patch (n, S, S, 3) at corners (n, 2)."""

    def __init__(self, corners, patches):
        self.corners, self.patches, self.side = corners, patches, patches.shape[1]
        self.order = np.argsort(corners[:, 0], kind="stable")

    def touches(self, shape, cell):
        """(down, across) bool: which cells (height, width) of an image are needed."""
        wanted = np.zeros(-(-np.array(shape) // cell), bool)
        first, last = np.maximum(self.corners, 0), np.minimum(self.corners + self.side, shape) - 1
        for (y0, x0), (y1, x1) in zip(first // cell, last // cell, strict=True):
            wanted[y0 : y1 + 1, x0 : x1 + 1] = True
        return wanted

    def take(self, region, top, left, channels=slice(None)):
        """A region (h, w, channels) at (top, left)."""
        bottom, right, side = top + region.shape[0], left + region.shape[1], self.side
        # Patches are sorted by their top row, so those that may touch this region are one run of them.
        first = np.searchsorted(self.corners[self.order, 0], top - side, side="right")
        last = np.searchsorted(self.corners[self.order, 0], bottom, side="left")
        for i in self.order[first:last]:
            y, x = self.corners[i]
            y0, y1, x0, x1 = max(y, top), min(y + side, bottom), max(x, left), min(x + side, right)
            if x0 < x1 and y0 < y1:
                part = region[y0 - top : y1 - top, x0 - left : x1 - left]
                self.patches[i, y0 - y : y1 - y, x0 - x : x1 - x, channels] = part


class Thumbnail:
    """Takes all regions of a slide and averages them over squares of `step` px."""

    def __init__(self, step):
        self.step, self.lock = step, threading.Lock()

    def touches(self, shape, cell):
        self.shape = -(-np.array(shape) // self.step)
        self.sums, self.sizes = np.zeros((*self.shape, 3)), np.zeros((*self.shape, 1))
        return np.ones(-(-np.array(shape) // cell), bool)

    def take(self, region, top, left, channels=slice(None)):
        for start in range(0, len(region), 512):  # a memory-mapped slide comes as one region
            self._add(region[start : start + 512], top + start, left, channels)

    def _add(self, region, top, left, channels):
        starts = [np.unique(np.r_[0, np.arange(-first % self.step, n, self.step)])
                  for first, n in zip((top, left), region.shape[:2], strict=True)]  # fmt: skip
        sums = np.add.reduceat(np.add.reduceat(region, starts[0], 0, np.uint32), starts[1], 1)
        sizes = [np.diff(np.r_[part, n]) for part, n in zip(starts, region.shape[:2], strict=True)]
        rows, cols = ((first + part) // self.step for first, part in zip((top, left), starts, strict=True))
        with self.lock:
            self.sums[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1, channels] += sums
            if channels in (slice(None), slice(0, 1)):
                self.sizes[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1, 0] += np.outer(*sizes)

    def pixels(self):
        """(h, w, 3) uint8."""
        return np.rint(self.sums / self.sizes).astype(np.uint8)


def as_rgb(pixels, path):
    """(h, w) or (h, w, 1 | 3 | 4) uint8 -> (h, w, 3): grey is repeated, alpha dropped."""
    if pixels.dtype != np.uint8:
        raise InputError(f"{path}: {pixels.dtype} pixels; expected 8 bits a channel: convert the image to 8-bit RGB")
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.shape[2] not in (1, 3, 4):
        raise InputError(f"{path}: {pixels.shape[2]} channels; expected RGB, RGBA or grey")
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3)) if pixels.shape[2] == 1 else pixels[:, :, :3]


def visit_tiff(path, taker):
    """Show a TIFF's first page to `taker`, region by region; returns how it was read and its (height, width)."""
    try:
        with tifffile.TiffFile(path) as tiff:
            page = tiff.series[0].keyframe
            shape = (page.imagelength, page.imagewidth)
            needed, held = max(np.add(page.dataoffsets, page.databytecounts)), tiff.filehandle.size
            if needed > held:
                raise InputError(
                    f"{path}: truncated: {held:,} of at least {needed:,} bytes; remove it and fetch it again"
                )
            decoded = page.photometric.name == "YCBCR" and page.compression.name == "JPEG"  # which comes out as RGB
            if page.photometric.name not in ("RGB", "MINISBLACK") and not decoded:
                raise InputError(
                    f"{path}: a {page.photometric.name} image; expected RGB or grey: convert it to 8-bit RGB"
                )
            if len(tiff.series[0].pages) > 1 or page.imagedepth != 1:
                raise InputError(
                    f"{path}: its channels or planes are pages of their own: convert it to 8-bit RGB in one"
                )
            if page.is_memmappable and page.planarconfig == tifffile.PLANARCONFIG.CONTIG:
                pixels = as_rgb(page.asarray(out="memmap").reshape(*shape, page.samplesperpixel), path)
                taker.touches(shape, shape)
                taker.take(pixels, 0, 0)  # one region: the whole slide, on disk
                return "memory-mapped", shape
            visit_segments(page, path, taker)
            kind = f"{'tiles' if page.is_tiled else 'strips'} of {page.chunks[1]} x {page.chunks[0]} px"
            return f"{kind}, {page.compression.name.lower()}", shape
    except DAMAGED_TIFF as error:
        raise InputError(f"{path}: not a readable TIFF ({error}); fetch or export it again") from None


def visit_segments(page, path, taker):
    """Decode the tiles or strips that are wanted, each once, one row of them at a time, on all cores."""
    height, width = page.imagelength, page.imagewidth
    cell = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, width)
    planes = page.samplesperpixel if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE else 1
    wanted = taker.touches((height, width), cell)
    down, across = wanted.shape
    handle = page.parent.filehandle

    def decode(part):
        data, index = part
        decoded, place, shape = page.decode(data, index, jpegtables=page.jpegtables, jpegheader=page.jpegheader)
        if decoded is None:
            decoded = np.full((*shape[:3], 1 if planes > 1 else page.samplesperpixel), 255, page.dtype)  # sparse TIFF
        return place, decoded[0]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for row in tqdm(range(down), f"decode {Path(path).name}", leave=False, disable=None):
            cells = [
                plane * down * across + row * across + col
                for plane in range(planes)
                for col in np.flatnonzero(wanted[row]).tolist()
            ]
            if not cells:
                continue
            offsets, counts = [page.dataoffsets[c] for c in cells], [page.databytecounts[c] for c in cells]
            parts = ((data, cells[k]) for data, k in handle.read_segments(offsets, counts, sort=False))
            for (plane, _, top, left, _), pixels in pool.map(decode, parts):
                pixels = as_rgb(pixels[: height - top, : width - left], path)  # the last tiles reach beyond the image
                if planes == 1:
                    taker.take(pixels, top, left)
                elif plane < 3:
                    taker.take(pixels[:, :, :1], top, left, slice(plane, plane + 1))


def visit_picture(path, taker):
    """As visit_tiff, of a JPEG or PNG, which is decoded whole."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("RGB", "RGBA", "L"):
                raise InputError(f"{path}: a {image.mode} image; expected 8-bit RGB, RGBA or grey: convert it")
            pixels = as_rgb(np.asarray(image), path)
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{path}: not a readable image ({error}); fetch or export it again") from None
    taker.touches(pixels.shape[:2], pixels.shape[:2])
    taker.take(pixels, 0, 0)
    return "decoded whole", pixels.shape[:2]


def visit_slide(path, taker):
    """Show a slide to `taker`; returns how it was read and its (height, width)."""
    with open(path, "rb") as file:
        tiff = file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    return (visit_tiff if tiff else visit_picture)(path, taker)


def read_patches(path, spots, patches):
    """Fill patches (n, S, S, 3) uint8 with the pixels around each spot's centre, white beyond the border.

    Returns how the image was read, its (height, width) and the number of patches over the border.
    """
    side = patches.shape[1]
    corners = spots[["pxl_row", "pxl_col"]].to_numpy() - side // 2
    patches[:] = 255
    how, shape = visit_slide(path, PatchCopier(corners, patches))
    centres = spots[["pxl_row", "pxl_col"]].to_numpy()
    outside = (centres < 0) | (centres >= shape)
    if outside.any():
        barcode = spots["barcode"].iloc[np.flatnonzero(outside.any(1))[0]]
        swapped = (centres[:, ::-1] < shape).all()
        cause = "pxl_row and pxl_col swapped" if swapped else "these the positions of this full-resolution image"
        raise InputError(
            f"{path}: the centre of spot {barcode} lies outside the image ({shape[0]} x {shape[1]} px); are {cause}?"
        )
    over = ((corners < 0) | (corners + side > shape)).any(1)
    return how, shape, int(over.sum())


def read_resampled(path, spots, patches, um_per_px):
    """As read_patches, of patches that show as many um as others of UM_PER_PX do: read larger or smaller, beside them
    on the disk, and resized.
    """
    side, finer = max(1, round(PATCH_SIZE * UM_PER_PX / um_per_px)), um_per_px / UM_PER_PX
    if 0.99 < finer < 1.01:
        return read_patches(path, spots, patches)
    if finer > 2:
        print(f"warning: {path} is {finer:.0f} times as coarse as the patches made of it: its detail is not there")
    with tempfile.NamedTemporaryFile(dir=Path(patches.filename).parent) as file:
        file.truncate(len(spots) * side**2 * 3)
        common.reserve_disk(Path(file.name))
        native = np.memmap(file.name, np.uint8, "r+", shape=(len(spots), side, side, 3))
        how, *result = read_patches(path, spots, native)
        for part in np.array_split(np.arange(len(spots)), -(-len(spots) // 64)):
            images = torch.from_numpy(native[part]).permute(0, 3, 1, 2)
            images = F.interpolate(images, size=(PATCH_SIZE, PATCH_SIZE), mode="bilinear", antialias=True)
            patches[part] = images.permute(0, 2, 3, 1).numpy()
    return f"{how}; resampled from {um_per_px:g} to {UM_PER_PX:g} um/px", *result


def warn_of_swap(slide, spots, patches, shape):
    """Print a warning where the array lies mirrored on the image, as it does when pxl_row and pxl_col are swapped, and
    the spots would cover the image's tissue better the other way round (64 of them are looked at).
    """
    array = np.column_stack([spots[["array_col", "array_row"]], np.ones(len(spots))]).astype(np.float64)
    places = spots[["pxl_col", "pxl_row"]].to_numpy(np.float64)
    if np.linalg.det(np.linalg.lstsq(array, places)[0][:2]) >= 0 or (places >= shape).any():
        return
    few = np.linspace(0, len(spots) - 1, min(len(spots), 64)).astype(int)
    swapped = spots.iloc[few].rename(columns={"pxl_row": "pxl_col", "pxl_col": "pxl_row"})
    others = np.empty((len(few), *patches.shape[1:]), np.uint8)
    read_patches(slide["image"], swapped, others)
    here, there = (np.ptp(pixels, axis=3).mean() / 255 for pixels in (patches[few], others))  # tissue has colour
    if there > 1.25 * here:
        print(
            f"warning: {slide['positions']}: pxl_row and pxl_col look swapped: the other way round, the spots' mean "
            f"saturation would be {there:.2f} and not {here:.2f}"
        )


def colour_statistics(patches):
    """40 colour and texture statistics a patch, (n, 224, 224, 3) uint8 -> (n, 40) float64: a baseline's only input.

    Mean, sd and three percentiles of red, green, blue; these and the skewness of the two dyes' densities
    (Ruifrok and Johnston 2001); mean and sd of saturation; gradients and contrast of grey at three scales and
    gradients of hematoxylin; shares of dark and white pixels.
    """
    dyes = torch.tensor([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])
    unmix = torch.linalg.inv(dyes / dyes.norm(dim=1, keepdim=True))[:, :2]
    parts = []
    for start in range(0, len(patches), 64):
        rgb = torch.from_numpy(patches[start : start + 64]).permute(0, 3, 1, 2).float().div(255)
        rgb = F.avg_pool2d(rgb, 2)
        stains = torch.einsum("bchw,cd->bdhw", -torch.log(rgb.clamp_min(1 / 255)), unmix)
        flat = torch.cat([rgb, stains], 1).flatten(2)
        mean, sd = flat.mean(2), flat.std(2)
        skew = ((flat[:, 3:] - mean[:, 3:, None]) ** 3).mean(2) / sd[:, 3:].clamp_min(1e-6) ** 3
        levels = flat[:, :, ::4].quantile(torch.tensor([0.1, 0.5, 0.9]), dim=2).permute(1, 0, 2).flatten(1)
        saturation = (1 - rgb.amin(1) / rgb.amax(1).clamp_min(1e-3)).flatten(1)
        grey = rgb.mean(1, keepdim=True)
        texture = [saturation.mean(1), saturation.std(1)]
        for scale in (1, 2, 4):
            for image in (F.avg_pool2d(grey, scale), F.avg_pool2d(stains[:, :1], scale)):
                texture += [(image.diff(dim=2).abs().mean((1, 2, 3)) + image.diff(dim=3).abs().mean((1, 2, 3)))]
            texture += [F.avg_pool2d(grey, scale).std((1, 2, 3))]
        texture += [(grey < 0.4).float().mean((1, 2, 3)), (grey > 0.85).float().mean((1, 2, 3))]
        parts.append(torch.cat([mean, sd, skew, levels, torch.stack(texture, 1)], 1))
    return torch.cat(parts).double().numpy()


# ---------------------------------------------------------------------------------------------- expression


def align_genes(tables):
    """Restrict all slides to the genes that they share, by id, in the first slide's order; names are made unique."""
    shared = tables[0].var_names[np.all([tables[0].var_names.isin(t.var_names) for t in tables], axis=0)]
    if not len(shared):
        raise InputError("the slides share no gene id: are they of one species and one annotation?")
    counts = anndata.concat([table[:, shared] for table in tables], join="inner")
    counts.var = pd.DataFrame({"gene_ids": shared, "name": tables[0][:, shared].var["name"].to_numpy()}, index=shared)
    twice = counts.var["name"].duplicated()
    if twice.any():
        print(
            f"{twice.sum()} gene names stand for several ids and were made unique, "
            f"as {counts.var['name'][twice].iloc[0]}-1"
        )
    counts.var_names = counts.var["name"].astype(str).to_numpy()
    counts.var_names_make_unique()
    clash = set(common.ID_COLUMNS) & set(counts.var_names)
    if clash:
        raise InputError(
            f"a gene is called {sorted(clash)[0]!r}, as a column of dataset.csv: rename it in the features table"
        )
    most = max(table.n_vars for table in tables)
    print(f"{len(shared):,} genes in every slide" + (f" (of up to {most:,})" if most > len(shared) else ""))
    return counts


def published_panel(root, counts):
    """Panel mask of the published preprocessing where hvg_union.npy is there and fits, else None."""
    path = root / "data" / "filtered_expression_matrices" / "hvg_union.npy"
    if not path.is_file():
        return None
    try:
        mask = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise InputError(f"{path}: not a NumPy array of numbers ({error})") from None
    if mask.dtype != bool or mask.shape != (counts.n_vars,):
        raise InputError(f"{path}: {mask.dtype} {mask.shape}; expected one bool for each of the {counts.n_vars} genes")
    print(f"panel: the published {path.name}")
    return mask


def read_panel(path):
    """The genes of a CSV table with a column gene."""
    try:
        return pd.read_csv(path, dtype=str)["gene"].dropna().tolist()
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: expected a CSV table with a column gene ({error})") from None


def choose_panel(root, counts, full):
    """Panel mask over genes, and var columns hvg_<slide>: each slide's highly variable genes (scanpy, seurat)."""
    chosen, threads = {}, torch.get_num_threads()
    for slide, rows in counts.obs.groupby("tissue_index").indices.items():
        part = anndata.AnnData(full[rows], var=pd.DataFrame(index=counts.var_names))
        if part.n_vars <= HVG_PER_SLIDE:
            chosen[f"hvg_{slide}"] = np.ones(part.n_vars, bool)
        else:
            scanpy.pp.highly_variable_genes(part, flavor="seurat", n_top_genes=HVG_PER_SLIDE)
            chosen[f"hvg_{slide}"] = part.var["highly_variable"].to_numpy()
    torch.set_num_threads(threads)  # scanpy's numba takes all of them
    markers = counts.var_names.isin(common.MARKER_GENES)
    panel = published_panel(root, counts)
    if PANEL:
        genes = read_panel(Path(PANEL))
        common.require(genes, f"{PANEL}: names no gene")
        panel, markers = counts.var_names.isin(genes), markers & counts.var_names.isin(genes)
        if not panel.any():
            raise InputError(f"{PANEL}: the slides hold none of its {len(genes)} genes, as {genes[0]}")
    panel = np.any(list(chosen.values()), axis=0) if panel is None else panel
    return panel | markers, pd.DataFrame({**chosen, "MG": markers}, index=counts.var_names)


def harmonise(root, lognorm, counts, slides):
    """Harmony over all slides on the log-normalised panel, (N, G) float32; the published matrices where they are."""
    paths = [Path(slide["matrix"]) / "harmony_matrix.npy" for slide in slides]
    published = (root / "data" / "filtered_expression_matrices" / "hvg_union.npy").is_file()
    if published and all(path.is_file() for path in paths):
        print("target: the published harmony_matrix.npy of every slide")
        return np.concatenate([read_harmony(p, s, counts) for p, s in zip(paths, slides, strict=True)])
    if len(slides) == 1:
        raise InputError("--target harmony: Harmony aligns slides, and there is only one; use --target lognorm")
    batch = pd.DataFrame({"slide": counts.obs["tissue_index"].astype(str)})
    result = harmonypy.run_harmony(lognorm, batch, "slide", random_state=SEED, verbose=False).Z_corr
    return np.ascontiguousarray(result if result.shape == lognorm.shape else result.T, np.float32)


def read_harmony(path, slide, counts):
    """One slide's published matrix (panel genes x spots, in the order of barcodes.tsv) in the order of `counts`."""
    barcodes = pd.read_csv(find_part(Path(slide["matrix"]), "barcodes.tsv"), header=None, dtype=str)[0]
    try:
        matrix = np.load(path, allow_pickle=False)
        usable = matrix.shape == (counts.n_vars, len(barcodes)) and np.isfinite(matrix).all()
    except (ValueError, TypeError, OSError, EOFError) as error:
        raise InputError(f"{path}: not a NumPy array of numbers ({error})") from None
    if not usable:
        raise InputError(
            f"{path}: {matrix.shape}; expected finite ({counts.n_vars} genes of the panel, {len(barcodes)} spots)"
        )
    order = counts.obs["barcode"][counts.obs["tissue_index"] == slide["tissue_index"]]
    return matrix[:, pd.Index(barcodes).get_indexer(order)].T.astype(np.float32)


# ---------------------------------------------------------------------------------------------- trust


def check_leaks(patches, counts):
    """InputError where two spots have the same pixels or the same counts of all genes: a split could learn from one and
    be scored on the other. Blank patches, and spots of few counts, may be the same by chance.
    """
    counts.X.sort_indices()
    seen = {}
    for i, (spot, total) in enumerate(counts.obs["n_counts"].items()):
        at, patch, content = slice(*counts.X.indptr[i : i + 2]), patches[i], {}
        if (patch != patch[0, 0]).any():
            content["pixels"] = patch.tobytes()
        if total >= FEW_COUNTS:
            content["counts"] = counts.X.indices[at].tobytes() + counts.X.data[at].tobytes()
        for what, values in content.items():
            twin = seen.setdefault((what, hashlib.blake2b(values).digest()), spot)
            if twin != spot:
                raise InputError(
                    f"a leak: the spots {twin} and {spot} have the same {what}, so a split could learn from one and be "
                    "scored on the other; is a slide in slides.csv twice?"
                )


def counting_ceiling(counts, totals, levels=24, steps=50):
    """The r that knowing every spot's own rate would give, (G,): r of measured log-normalised expression and that of
    the rates, from (n, G) counts of one slide and (n,) totals over all genes. NaN for a constant gene.

    A gene's rates are taken to come from an unknown distribution over `levels` values, which is fitted to its counts by
    maximum likelihood under Poisson noise (Laird, JASA 1978; EM, stopped after `steps`, before it falls into atoms).
    All else that varies between spots counts as signal, so this is an upper bound. Deterministic.
    """
    totals, parts = torch.from_numpy(np.asarray(totals, np.float32)), []
    for part in torch.from_numpy(np.ascontiguousarray(np.asarray(counts, np.float32).T)).split(16):  # stays in cache
        measured = torch.log1p(1e4 * part / totals)
        low, high = measured.aminmax(dim=1, keepdim=True)
        level = (low + (high - low) * torch.linspace(0, 1, levels)).clamp_min(1e-3)  # log-normalised, (genes, levels)
        rate = torch.expm1(level) / 1e4
        likelihood = part[:, :, None] * rate.log()[:, None] - totals[:, None] * rate[:, None]
        likelihood = (likelihood - likelihood.amax(2, keepdim=True)).exp_()  # (genes, n, levels); free up to a factor
        share = torch.full_like(level, 1 / levels)
        for _ in range(steps):
            evidence = torch.bmm(likelihood, share[:, :, None])
            share = share * torch.bmm((1 / evidence).mT, likelihood)[:, 0] / len(totals)
        expected = torch.bmm(likelihood, (share * level)[:, :, None]) / torch.bmm(likelihood, share[:, :, None])
        variance = (share * level**2).sum(1) - (share * level).sum(1) ** 2
        shared = (expected[:, :, 0] * (measured - measured.mean(1, keepdim=True))).mean(1)
        r = shared / (variance * measured.var(1, correction=0)).sqrt()
        parts.append(torch.where((high > low)[:, 0], r.clamp(0, 1), torch.nan))
    return torch.cat(parts).double().numpy()


def morans_i(values, centres, pitch):
    """Moran's I, (G,), of (n, G) values at (n, 2) centres: a spot's neighbours are those within 1.3 pitches."""
    one, other = cKDTree(centres).query_pairs(1.3 * pitch, output_type="ndarray").T
    values = values.astype(np.float64) - values.mean(0, np.float64)
    pairs = scipy.sparse.coo_matrix((np.ones(len(one)), (one, other)), [len(values)] * 2).tocsr()
    with np.errstate(invalid="ignore", divide="ignore"):  # NaN for a constant gene, and where nobody has a neighbour
        spread = np.where(np.ptp(values, axis=0) > 0, (values**2).mean(0), np.nan)
        return (values * (pairs @ values)).sum(0) / len(one) / spread


def describe_genes(root, counts, lognorm):
    """var columns of every slide: ceiling_, moran_ and, of simulated slides, image_ceiling_<slide>."""
    columns = {}
    for slide, at in counts.obs.groupby("tissue_index").indices.items():
        part, measured = counts.obs.iloc[at], lognorm[at]
        columns[f"ceiling_{slide}"] = counting_ceiling(counts.X[at].toarray(), part["n_counts"])
        places = part[["pxl_col", "pxl_row"]].to_numpy(np.float64)
        columns[f"moran_{slide}"] = morans_i(measured, places, part["pitch"].iloc[0])
        if (root / "simulation.json").is_file():
            truth = anndata.read_h5ad(root / "truth" / f"{slide}.h5ad")
            shown = truth[part["barcode"].to_numpy(), counts.var["gene_ids"].to_numpy()].layers["visible"]
            columns[f"image_ceiling_{slide}"] = common.pearson_per_gene(shown, measured)
    return pd.DataFrame(columns, index=counts.var_names)


# ---------------------------------------------------------------------------------------------- files


def source_files(slide):
    """Size and SHA-256 of what a slide was made from."""
    files = []
    for part in [Path(slide[name]) for name in ("image", "positions", "matrix") if not pd.isna(slide[name])]:
        files += [path for path in (sorted(part.iterdir()) if part.is_dir() else [part]) if path.is_file()]
    facts = {}
    for path in files:
        with open(path, "rb") as file:
            facts[path.name] = {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    return facts


def draw_contact_sheet(patches, slides):
    """Eight patches of every slide in a row, as an image."""
    rows = []
    for slide in np.unique(slides):
        at = np.flatnonzero(slides == slide)
        chosen = at[np.linspace(0, len(at) - 1, 8).astype(int)]
        rows.append(
            np.concatenate([np.pad(patches[i], ((2, 2), (2, 2), (0, 0)), constant_values=255) for i in chosen], 1)
        )
    return Image.fromarray(np.concatenate(rows)).resize((8 * 114, len(rows) * 114), Image.Resampling.BOX)


@contextlib.contextmanager
def whole_folder(folder):
    """Give an empty folder beside `folder`; move its files there at the end, meta.json last. On failure nothing moves.

    meta.json of the old files goes first, and no reader takes a folder without it, so no mixture is ever read.
    """
    work = folder.with_name(f".{folder.name}")  # of a run that was killed, perhaps
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        yield work
        folder.mkdir(exist_ok=True)
        (folder / "meta.json").unlink(missing_ok=True)
        for old in folder.iterdir():
            old.unlink()
        for path in sorted(work.iterdir(), key=lambda path: path.name == "meta.json"):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def main():
    root = Path(DATA_ROOT)
    if FROM_SPACERANGER:
        runner.hold_folder(root)
        write_manifest(root, *([Path(p) for p in text.split(",") if p] for text in (FROM_SPACERANGER, IMAGES)))
    slides = read_manifest(root)
    runner.hold_folder(root)
    with_counts = slides["matrix"].notna()
    if with_counts.any() and not with_counts.all():
        raise InputError(f"{root / 'slides.csv'}: some slides have a matrix and some have none; use two data roots")
    rows = slides.to_dict("records")
    tables = [read_slide(slide) for slide in rows]
    obs = pd.concat([table.obs for table in tables])
    with whole_folder(root / "dataset") as out:
        padded = write_patches(out, rows, obs)
        for row in rows if THUMBNAIL else ():
            Image.fromarray(read_thumbnail(row["image"], thumbnail_step(row))[0]).save(
                out / f"thumbnail_{row['tissue_index']}.png"
            )
        target = write_expression(root, out, tables, rows) if with_counts.all() else write_positions(out, obs)
        with open(out / "dataset.csv", "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        meta = {
            "format": common.FORMAT,
            "target": target,
            "simulated": (root / "simulation.json").is_file(),
            "spots": len(obs),
            "patch_size": PATCH_SIZE,
            "um_per_px": {row["name"]: UM_PER_PX or row["um_per_px"] for row in rows},
            "padded_at_border": padded,
            "px_per_thumbnail_px": {row["name"]: thumbnail_step(row) for row in rows} if THUMBNAIL else {},
            "seed": SEED,
            "hvg_per_slide": HVG_PER_SLIDE,
            "dataset_sha256": digest,
            "slides": [
                {**{k: row[k] for k in ("tissue_index", "name", "donor")}, "files": source_files(row)} for row in rows
            ],
            "versions": {n: version(n) for n in ("numpy", "pandas", "scanpy", "anndata", "tifffile", "harmonypy")},
        }
        (out / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    print(f"wrote {root / 'dataset'}: {len(obs):,} spots, target {target or 'none'}")


def write_patches(out, slides, obs):
    """patches.npy and contact_sheet.png; returns the number of patches over the border, by slide name."""
    patches = np.lib.format.open_memmap(out / "patches.npy", "w+", np.uint8, (len(obs), PATCH_SIZE, PATCH_SIZE, 3))
    common.reserve_disk(out / "patches.npy")
    padded = {}
    print("slide  name       spots   rows x columns px   over the border   read as")
    for slide in slides:
        at = np.flatnonzero(obs["tissue_index"] == slide["tissue_index"])
        at = slice(at[0], at[-1] + 1)
        read = functools.partial(read_resampled, um_per_px=slide["um_per_px"]) if UM_PER_PX else read_patches
        how, shape, over = read(slide["image"], obs.iloc[at], patches[at])
        padded[slide["name"]] = over
        size = f"{shape[0]:>7} x {shape[1]:<7}"
        print(f"{slide['tissue_index']:>5}  {slide['name']:9} {at.stop - at.start:6} {size} {over:15}   {how}")
        if not pd.isna(slide["positions"]):
            warn_of_swap(slide, obs.iloc[at], patches[at], shape)
    patches.flush()
    draw_contact_sheet(patches, obs["tissue_index"].to_numpy()).save(out / "contact_sheet.png")
    return padded


def write_expression(root, out, tables, slides):
    """counts.h5ad and dataset.csv; returns the target's name."""
    counts = align_genes(tables)
    patches = np.load(out / "patches.npy", mmap_mode="c", allow_pickle=False)
    check_leaks(patches, counts)
    full = scipy.sparse.csr_matrix(counts.X, dtype=np.float32)
    full = scipy.sparse.diags_array(1e4 / counts.obs["n_counts"].to_numpy()) @ full
    panel, var = choose_panel(root, counts, scipy.sparse.csr_matrix(full.log1p(), dtype=np.float32))
    counts = counts[:, panel].copy()
    counts.var = counts.var[["gene_ids"]].join(var[panel])
    counts.X = scipy.sparse.csr_matrix(counts.X, dtype=np.int32)
    counts.obsm["spatial"] = counts.obs[["pxl_col", "pxl_row"]].to_numpy(np.float64)
    counts.obsm["colour"] = colour_statistics(patches)
    lognorm = common.log_normalise(counts.X, counts.obs["n_counts"])
    counts.var = counts.var.join(describe_genes(root, counts, lognorm))
    target = harmonise(root, lognorm, counts, slides) if TARGET == "harmony" else lognorm
    print(
        f"panel of {counts.n_vars:,} genes, "
        f"{counts.var['MG'].sum()} of the {len(common.MARKER_GENES)} markers among them"
    )
    counts.write_h5ad(out / "counts.h5ad", compression="lzf")
    common.save_expression(out / "dataset.csv", counts.obs.reset_index(names="id"), target, counts.var_names.tolist())
    return TARGET


def write_positions(out, obs):
    """dataset.csv without expression, for slides that have none; returns None as the target."""
    common.save_csv(out / "dataset.csv", obs.reset_index(names="id")[common.ID_COLUMNS])
    return None


if __name__ == "__main__":
    runner.run_script(globals())
