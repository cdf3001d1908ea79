"""Slides to patches.npy, lognorm.npy and counts.h5ad, which all training scripts read.

Question   Which pixels and which expression belong to each spot?
Reads      <DATA_ROOT>/slides.csv and the images, positions and matrices that it names
Writes     <DATA_ROOT>/dataset/: patches.npy (N, 224, 224, 3) uint8 RGB, lognorm.npy and, with
           Harmony or log1p, target.npy (N, G) float32 (what is learnt), dataset.csv (the same as a
           table), counts.h5ad (raw counts of the panel; obs: blocks; var: per slide the
           counting-noise ceiling and Moran's I of each gene; colour statistics of the patches;
           thumbnails, as scanpy and squidpy draw them), meta.json, contact_sheet.png,
           thumbnail_<slide>.png, spots_<slide>.png (the same with the spots)
Prints     per slide: spots, image and how it is read, patches over its border; panel and target
Command    python 19_make_patches_and_csv.py --data-root GSE240429_data
Override   python 19_make_patches_and_csv.py --data-root HER2ST_data --target lognorm
           python 19_make_patches_and_csv.py --data-root mine --from-spaceranger A/outs,B/outs
           --images A.tif,B.tif
           python 19_make_patches_and_csv.py --data-root liver --from-hest hest_data --organ Liver
           python 19_make_patches_and_csv.py --data-root IDC --from-hest tasks/IDC
           python 19_make_patches_and_csv.py --data-root mine --check

A slide is never read into memory: contiguous TIFFs are memory-mapped, tiles and strips are decoded
once each. JPEG and PNG have no such access and are decoded whole. Counts are in memory one slide at
a time. Files are read in slides/: manifest, positions, counts, spots and, of pixels, imaging.
"""

from study import shell

if __name__ == "__main__":  # Check the command before the slow imports.
    shell.check_command(__file__, files=("PANEL", "FROM_HEST"), manifest=True)


import contextlib
import json
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageDraw

import common
from common import PATCH_SIZE
from slides import hest, imaging, inputs, space_ranger
from slides.ceilings import counting_ceiling, morans_i
from slides.colour import colour_statistics
from slides.counts import find_part, join_genes, read_barcodes, take_genes
from slides.cutting import cut_spots
from slides.hest_patches import holds_patches
from slides.manifest import (
    check_unchanged,
    describe_file,
    describe_slide,
    list_files,
    note_files,
    read_manifest,
    warn_of_magnifications,
)
from slides.panel import (
    PUBLISHED,
    choose_panel,
    find_variable_genes,
    listed_by_all,
    published_panel,
    read_panel,
    warn_of_lost_genes,
    warn_of_unlisted,
)
from slides.positions import measure_pitch, place_spots
from slides.spots import read_spots
from slides.twins import check_alike_counts, check_patches
from study import constants, drawing, exports, files, hashes, panels, splitting
from study.errors import InputError
from study.features import describe_size, hash_patches, remove_others

# -------------------------------------------------------------------------------- constants
DATA_ROOT = "GSE240429_data"  # folder with slides.csv
TARGET = "harmony"  # harmony (the paper's: over all slides) or lognorm; HEST-Benchmark has log1p
HVG_PER_SLIDE = 1000  # highly variable genes of each slide; their union is the panel
SEED = 42  # of Harmony's clustering
PANEL = ""  # CSV with a column gene: the panel, in place of variable genes
UM_PER_PX = 0.0  # of the patches; another slide is resampled to it; 0 = each slide's own
FROM_SPACERANGER = ""  # folders outs/, or of samples, comma-separated: write slides.csv first
IMAGES = ""  # their full-resolution images, in the same order
USE_HIRES = False  # true = read tissue_hires_image.png, where there is no full-resolution image
BIN_UM = 56.0  # spots to which the bins of Visium HD are summed; a multiple of the bins' 8 or 16 um
FROM_HEST = ""  # folder of HEST-1k, or of a task of HEST-Benchmark: write slides.csv first
SAMPLES = ""  # of it, comma-separated, as NCBI826,NCBI827; or those that the next three choose
ORGAN = ""  # as Liver
SPECIES = ""  # as "Homo sapiens"
TECHNOLOGY = ""  # as Visium
HEST_PATCHES = False  # true = take HEST's own patches, 0.5 um/px, so that wsis/ is not needed
GENOME = ""  # of a matrix with two species: the one that is read, as GRCh38
CHECK = False  # true = say what is found and what fits, and write no patches
THUMBNAIL = True  # false = no thumbnails; of a tiled slide only what the patches need is decoded
# -------------------------------------------------------------------------------------------

# Patterns of the files in dataset/; meta.json is the last, as exchange_files needs it.
WRITTEN = (
    "patches.npy",
    "lognorm.npy",
    "target.npy",
    "dataset.csv",
    "counts.h5ad",
    "contact_sheet.png",
    "thumbnail_*.png",
    "spots_*.png",
    "meta.json",
)
LEAST_SPOTS = 16  # for which Harmony makes a cluster at all


# -------------------------------------------------------------------------------- panel


def find_panel(root):
    """The file of the panel: the genes of a task of HEST-Benchmark, or PANEL; None for neither."""
    if has_folds(root):
        return root / common.TASK_GENES
    return Path(PANEL) if PANEL else None


def read_named(root):
    """The genes that the file of find_panel names; none without one."""
    path = find_panel(root)
    return read_panel(path) if path else []


# -------------------------------------------------------------------------------- target


def has_published_target(root, manifest):
    """Whether the published panel and the harmony_matrix.npy of every slide are there."""
    paths = [root / PUBLISHED, *(slide.matrix / "harmony_matrix.npy" for slide in manifest)]
    return all(path.is_file() for path in paths)


def check_harmony(n_slides, n_spots=LEAST_SPOTS):
    """InputError where Harmony cannot align so few slides or cluster so few spots."""
    if n_slides == 1:
        raise InputError(
            "--target harmony: Harmony aligns slides, and there is only one; use --target lognorm"
        )
    if n_spots < LEAST_SPOTS:
        raise InputError(
            f"--target harmony: Harmony clusters spots and needs {LEAST_SPOTS} of them, and there "
            f"are {n_spots}; use --target lognorm"
        )


def harmonise_panel(root, lognorm, obs, panel, manifest, published):
    """Harmony over all slides, of the log-normalised panel (N, G): (N, G) float32.

    The published matrices, whose genes are the ids `published`, are taken where they are. Harmony
    holds all of it in memory.
    """
    if has_published_target(root, manifest):
        print("target: the published harmony_matrix.npy of every slide")
        order = pd.Index(published).get_indexer(panel["gene_ids"])
        if (order < 0).any():
            raise InputError(
                f"the published panel lacks the marker {panel.index[order < 0][0]}, so that "
                "harmony_matrix.npy has no values of it"
            )
        every = [read_harmony(slide, obs, published) for slide in manifest]
        return np.ascontiguousarray(np.concatenate(every)[:, order])
    check_harmony(len(manifest), len(obs))
    return panels.harmonise(lognorm, obs["tissue_index"], SEED)


def read_harmony(slide, obs, published):
    """One slide's published matrix, (n, G) float32, its spots in the order of `obs`.

    The file holds the published genes x spots, in the order of barcodes.tsv.
    """
    path = slide.matrix / "harmony_matrix.npy"
    barcodes = read_barcodes(find_part(slide.matrix, "barcodes.tsv"))
    expected = len(published), len(barcodes)
    matrix = inputs.load_array(path)
    if matrix.shape != expected or not np.isfinite(matrix).all():
        raise InputError(
            f"{path}: {matrix.shape}; "
            f"expected finite ({expected[0]} genes of the panel, {expected[1]} spots)"
        )
    spots = obs["barcode"][obs["tissue_index"] == slide.tissue_index]
    return matrix[:, pd.Index(barcodes).get_indexer(spots)].T.astype(np.float32)


# -------------------------------------------------------------------------------- genes


def describe_genes(root, counts, lognorm):
    """{column of var: (G,)} of one slide: ceiling_, moran_ and, simulated, image_ceiling_."""
    spots, slide = counts.obs, counts.obs["tissue_index"].iloc[0]
    centres = spots[["pxl_col", "pxl_row"]].to_numpy(np.float64)
    columns = {
        f"ceiling_{slide}": counting_ceiling(counts.X.toarray(), spots["n_counts"]),
        f"moran_{slide}": morans_i(lognorm, centres, spots["pitch"].iloc[0]),
    }
    if is_simulated(root):
        truth = anndata.read_h5ad(root / "truth" / f"{slide}.h5ad")
        truth = truth[spots["barcode"].to_numpy(), counts.var["gene_ids"].to_numpy()]
        columns[f"image_ceiling_{slide}"] = common.pearson_per_gene(
            truth.layers["visible"], lognorm
        )
    return columns


def describe_task_folds(root, tables):
    """{"ceiling_fold_<fold>": (G,)}: of each fold of a task of HEST-Benchmark the ceiling of r over
    all its test spots at once, against log1p of their raw counts.

    A spot's own depth is no more known to a model than its rate: both are one intensity of counts,
    which is a rate at a depth that is the same for all spots.
    """
    counts = {table.obs["tissue_index"].iloc[0]: table.read().X.toarray() for table in tables}
    columns = {}
    folds = splitting.read_task_folds(root)
    for fold, tested in folds[folds["role"] == "test"].groupby("fold"):
        pooled = np.concatenate([counts[slide] for slide in tested["tissue_index"]])
        same_depth = np.full(len(pooled), 1e4)
        columns[f"ceiling_fold_{fold}"] = counting_ceiling(pooled, same_depth)
    return columns


def has_folds(root):
    """Whether the slides of a data root are a task of HEST-Benchmark."""
    return (root / common.TASK_FOLDS).is_file()


def is_simulated(root):
    """Whether script 18 made the slides of a data root."""
    return (root / "simulation.json").is_file()


# -------------------------------------------------------------------------------- files


@contextlib.contextmanager
def whole_folder(folder):
    """Give an empty folder inside `folder`; move its files into `folder` at the end.

    On failure nothing moves. Where `folder` is a link, its target is used. The folder of work lies
    inside, so that files are renamed on one file system wherever that is.
    """
    folder = folder.resolve()
    was_there = folder.exists()
    if was_there and not folder.is_dir():
        raise InputError(f"{folder}: a file, where the dataset's folder belongs: move it away")
    folder.mkdir(parents=True, exist_ok=True)
    for path in find_written(folder):
        if path.is_dir():
            raise InputError(f"{path}: a folder, where a file of this script belongs: move it away")
    work = folder / ".new"  # of a run that was killed, perhaps
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(exist_ok=True)
    try:
        yield work
        exchange_files(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if not was_there and not any(folder.iterdir()):
            folder.rmdir()


def find_written(folder):
    """The paths in a folder whose names this script gives."""
    return [path for name in WRITTEN for path in sorted(folder.glob(name))]


def exchange_files(work, folder):
    """Move the files of `work` into `folder`, and what this script wrote there before out of it.

    Either all files move or none; others stay. No reader takes a folder without meta.json, which
    goes first and comes last, so no mixture is ever read.
    """
    old = work / "old"
    moves = [(path, old / path.name) for path in reversed(find_written(folder))]
    moves += [(path, folder / path.name) for path in find_written(work)]
    old.mkdir()
    begun = []
    try:
        for source, target in moves:
            begun.append((source, target))
            source.replace(target)
    except BaseException:
        for source, target in reversed(begun):
            if not source.exists():
                target.replace(source)
        raise


def open_array(path, dtype, shape):
    """The array of a new .npy file, memory-mapped, whose disk space is taken now."""
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    files.reserve_disk(path)
    return array


def write_patches(out, manifest, obs, thumbnails):
    """patches.npy, contact_sheet.png and, of each slide, thumbnail_ and spots_<slide>.png of spots
    `obs`, slide by slide.

    `thumbnails` holds, by slide name, those that were made to lay a grid, and None for the others,
    which are made in the same pass over the image as the patches. Returns the number of patches
    over the border, by slide name, and (n,) bool: spots whose centre lies in the image, of which
    alone patches are kept.
    """
    patches = open_array(out / "patches.npy", np.uint8, (len(obs), PATCH_SIZE, PATCH_SIZE, 3))
    over_border, inside = {}, []
    print("slide  name       spots   rows x columns px   over the border   read as")
    for slide in manifest:
        numbers = np.flatnonzero(obs["tissue_index"] == slide.tissue_index)
        spots, part = obs.iloc[numbers], patches[numbers[0] : numbers[-1] + 1]
        thumbnail = thumbnails[slide.name]
        makes = THUMBNAIL and thumbnail is None
        cut = cut_spots(slide, spots, part, UM_PER_PX, out, thumbnail=makes)
        over_border[slide.name] = cut.over_border
        inside.append(cut.inside)
        size = f"{cut.image.shape[0]:>7} x {cut.image.shape[1]:<7}"
        counted = f"{len(spots):6} {size} {cut.over_border:15}"
        print(f"{slide.tissue_index:>5}  {slide.name:9} {counted}   {cut.image.how}")
        if THUMBNAIL and not holds_patches(slide.image):
            picture = Image.fromarray((cut.thumbnail or thumbnail).pixels())
            picture.save(out / f"thumbnail_{slide.tissue_index}.png")
            circle_spots(picture, spots, imaging.thumbnail_step(slide))
            picture.save(out / f"spots_{slide.tissue_index}.png")
    patches.flush()
    inside = np.concatenate(inside)
    if not inside.all():
        patches = keep_rows(out / "patches.npy", np.flatnonzero(inside))
    tissue_index = obs["tissue_index"].to_numpy()[inside]
    draw_contact_sheet(patches, tissue_index).save(out / "contact_sheet.png")
    return over_border, inside


def circle_spots(picture, spots, step):
    """Draw a circle around every spot on a thumbnail, whose px is `step` px of the slide."""
    pen = ImageDraw.Draw(picture)
    radius = drawing.SPOT * measure_pitch(spots) / step / 2
    for x, y in spots[["pxl_col", "pxl_row"]].to_numpy() / step:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline="lime")


def keep_rows(path, kept):
    """Rewrite a .npy file with these rows alone, by their numbers, and map it."""
    rows = np.load(path, mmap_mode="r", allow_pickle=False)
    with files.whole_file(path) as partial:
        made = open_array(partial, rows.dtype, (len(kept), *rows.shape[1:]))
        for part in common.parts_of(len(kept), 256):
            made[part] = rows[kept[part]]
        made.flush()
    return np.load(path, mmap_mode="r", allow_pickle=False)


def draw_contact_sheet(patches, tissue_index):
    """Eight patches of every slide in a row, as an image."""
    border = (2, 2), (2, 2), (0, 0)
    rows = []
    for slide in np.unique(tissue_index):
        numbers = np.flatnonzero(tissue_index == slide)
        chosen = numbers[np.linspace(0, len(numbers) - 1, 8).astype(int)]
        framed = [np.pad(patches[number], border, constant_values=255) for number in chosen]
        rows.append(np.concatenate(framed, axis=1))
    sheet = Image.fromarray(np.concatenate(rows))
    return sheet.resize((8 * 114, len(rows) * 114), Image.Resampling.BOX)


class StoredSpots:
    """The spots of a slide as AnnData on disk; of all slides only obs is in memory."""

    def __init__(self, path, table):
        table.write_h5ad(path, convert_strings_to_categoricals=False)
        self.path = path
        self.obs = table.obs

    def read(self):
        """All of it, as AnnData."""
        return anndata.read_h5ad(self.path)

    def read_features(self):
        """var: a line a gene."""
        return common.read_annotations(self.path).var

    def keep(self, ids):
        """The same without the spots whose id is not among `ids`."""
        table = self.read()
        return StoredSpots(self.path, table[table.obs_names.isin(ids)].copy())

    def take(self, genes):
        """The same with these genes alone, as take_genes."""
        return StoredSpots(self.path, take_genes(self.read(), genes))


def write_expression(root, out, tables, manifest, named):
    """counts.h5ad, lognorm.npy, target.npy and dataset.csv, from the StoredSpots of every slide, of
    which one is in memory at a time; `named` are the genes that a file names for the panel.
    """
    obs = pd.concat([table.obs for table in tables])
    patches = np.load(out / "patches.npy", mmap_mode="c", allow_pickle=False)
    check_patches({}, patches, obs.index)
    genes = join_genes(
        (slide.tissue_index, table.read_features())
        for slide, table in zip(manifest, tables, strict=True)
    )
    shared = genes[listed_by_all(genes)]
    seen, variable = {}, {}
    for slide, stored in zip(manifest, tables, strict=True):
        table = stored.read()
        check_alike_counts(seen, table)
        check_alike_counts(seen, take_genes(table, shared))
        # By the slide's own genes alone, so that no other slide changes them.
        chosen = table.var_names[find_variable_genes(table, HVG_PER_SLIDE)]
        variable[f"hvg_{slide.tissue_index}"] = genes["gene_ids"].isin(chosen).to_numpy()
    published = published_panel(root, tables, genes)
    panel = choose_panel(genes.assign(**variable), find_panel(root), named, published)
    tables = [table.take(panel) for table in tables]
    var = write_lognorm(root, out / "lognorm.npy", tables, panel)
    values = common.map_array(out / "lognorm.npy")
    if has_folds(root):
        var = var.assign(**describe_task_folds(root, tables))
        counts = (table.read().X.toarray().astype(np.float64) for table in tables)
        values = np.concatenate([np.log1p(part).astype(np.float32) for part in counts])
        np.save(out / "target.npy", values)
    elif TARGET == "harmony":
        values = harmonise_panel(root, values, obs, panel, manifest, published)
        np.save(out / "target.npy", values)
    exports.save_expression(
        out / "dataset.csv", obs.reset_index(names="id"), values, panel.index.tolist()
    )
    annotations = anndata.AnnData(obs=obs, var=var)
    annotations.obsm["spatial"] = obs[["pxl_col", "pxl_row"]].to_numpy(np.float64)
    annotations.obsm["colour"] = colour_statistics(patches)
    annotations.uns["spatial"] = describe_libraries(out, manifest, obs)
    names = {slide.tissue_index: exports.name_library(slide.name) for slide in manifest}
    annotations.obs["library_id"] = obs["tissue_index"].map(names).to_numpy()
    write_counts(out / "counts.h5ad", annotations, tables)


def describe_libraries(out, manifest, obs):
    """uns["spatial"] of counts.h5ad: exports.describe_library of the slides with a thumbnail."""
    libraries = {}
    for slide in manifest:
        path = out / f"thumbnail_{slide.tissue_index}.png"
        if path.is_file():
            pitch = obs["pitch"][obs["tissue_index"] == slide.tissue_index].iloc[0]
            with Image.open(path) as image:
                pixels = np.asarray(image)
            step = imaging.thumbnail_step(slide)
            name = exports.name_library(slide.name)
            libraries[name] = exports.describe_library(pixels, step, drawing.SPOT * pitch)
    return libraries


def write_lognorm(root, path, tables, panel):
    """Log-normalised counts of the panel, (N, G) float32; returns the panel with describe_genes's
    columns.
    """
    n_spots = sum(len(table.obs) for table in tables)
    lognorm = open_array(path, np.float32, (n_spots, len(panel)))
    first, columns, sums, depths = 0, {}, {}, {}
    for table in tables:
        counts = table.read()
        slide = counts.obs["tissue_index"].iloc[0]
        sums[slide] = np.asarray(counts.X.sum(0), np.float64).ravel()
        depths[slide] = counts.obs["n_counts"].sum()
        part = common.log_normalise(counts.X, counts.obs["n_counts"])
        lognorm[first : first + len(part)] = part
        first += len(part)
        columns |= describe_genes(root, counts, part)
    lognorm.flush()
    warn_of_unlisted(panel, sums, depths)
    return panel.assign(**columns)


def write_counts(path, annotations, tables):
    """counts.h5ad: the annotations with the raw counts of the panel, a slide at a time."""
    annotations.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        for table in tables:
            counts = table.read().X.astype(np.int32)
            if "X" in file:
                anndata.io.sparse_dataset(file["X"]).append(counts)
                continue
            counts.indptr = counts.indptr.astype(np.int64)  # All slides may have 2^31 counts.
            options = {"compression": "lzf"}
            anndata.io.write_elem(file, "X", counts, dataset_kwargs=options)


def write_meta(root, out, manifest, target, over_border):
    """meta.json: what the other files were made of and with; no reader takes them without it.
    Returns it.
    """
    patches = torch.from_numpy(common.map_array(out / "patches.npy"))
    whole = [slide for slide in manifest if not holds_patches(slide.image)]
    steps = {slide.name: imaging.thumbnail_step(slide) for slide in whole}
    libraries = ("numpy", "pandas", "scanpy", "anndata", "tifffile", "harmonypy")
    given = constants.flags_given(globals())
    task_files = (common.TASK_FOLDS, common.TASK_GENES) if has_folds(root) else ()
    meta = {
        "format": common.FORMAT,
        "target": target,
        "simulated": is_simulated(root),
        "spots": len(patches),
        "patch_size": PATCH_SIZE,
        "um_per_px": {slide.name: UM_PER_PX or slide.um_per_px for slide in manifest},
        "padded_at_border": over_border,
        "px_per_thumbnail_px": steps if THUMBNAIL else {},
        "seed": SEED,
        "hvg_per_slide": HVG_PER_SLIDE,
        "dataset_sha256": hashes.hash_file(out / "dataset.csv"),
        "patches_sha256": hash_patches(patches),
        "slides": [describe_slide(root, slide) for slide in manifest],
        "task": {name: describe_file(root / name) for name in task_files},
        "panel": {str(Path(PANEL).absolute()): describe_file(Path(PANEL))} if PANEL else {},
        "warnings": inputs.WARNINGS,
        "flags": {flag: value for flag, value in given.items() if flag != "--data-root"},
        "versions": {library: version(library) for library in libraries},
    }
    (out / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    return meta


# -------------------------------------------------------------------------------- check


def check_slides(root, manifest, needs_harmony):
    """Print what each slide holds and whether it fits together; InputError where one does not, or
    where the target needs Harmony, which has too few spots.
    """
    tables, errors, named, seen = [], [], read_named(root), {}
    for slide in manifest:
        print(f"\nslide {slide.tissue_index}: {slide.name}, donor {slide.donor}")
        try:
            tables.append(check_slide(slide, named, seen))
        except InputError as error:
            print("  error      ", *str(error).split())
            errors.append(error)
    if not errors and tables[0].X is not None:
        print()
        numbers = [slide.tissue_index for slide in manifest]
        genes = join_genes(zip(numbers, (table.var for table in tables), strict=True))
        shared = genes[listed_by_all(genes)]
        for table in tables:
            check_alike_counts(seen, table)
            check_alike_counts(seen, take_genes(table, shared))
        if needs_harmony:
            check_harmony(len(manifest), sum(table.n_obs for table in tables))
        markers = genes.index.isin(common.MARKER_GENES).sum()
        print(f"{markers} of the {len(common.MARKER_GENES)} markers among them")
        if named:
            warn_of_lost_genes(find_panel(root), named, set(genes.index))
    if errors:
        raise InputError(f"{len(errors)} of {len(manifest)} slides cannot be used: {errors[0]}")
    print(describe_size(sum(table.n_obs for table in tables)))
    print(f"{root}: {len(manifest)} slides can be used, with {len(inputs.WARNINGS)} warnings")


def check_slide(slide, named, seen):
    """Print what one slide holds; returns its spots as AnnData. `named` as for read_spots, and
    `seen` as for check_patches.

    Its patches are cut as write_patches cuts them, into the folder for temporary files.
    """
    describe_image(slide)
    positions, thumbnail = place_spots(slide)
    pitch = measure_pitch(positions)
    print(f"  pitch       {pitch:.4g} px, {pitch * slide.um_per_px:.4g} um")
    table = read_spots(slide, positions, GENOME, named)
    scratch = inputs.scratch_folder()
    patches = imaging.map_scratch(scratch, (table.n_obs, PATCH_SIZE, PATCH_SIZE, 3))
    makes = THUMBNAIL and thumbnail is None
    inside = cut_spots(slide, table.obs, patches, UM_PER_PX, scratch, thumbnail=makes).inside
    left_out = dict(table.uns.get("left_out", {}))
    if not inside.all():
        left_out["outside the image"] = int((~inside).sum())
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
    print(
        f"  spots       {inside.sum()} kept; {sum(left_out.values())} left out ({reasons or '-'})"
    )
    if slide.matrix is not None:
        kept = (patches[number] for number in np.flatnonzero(inside))  # one in memory at a time
        check_patches(seen, kept, table.obs_names[inside])
        symbols = ", ".join(table.var["name"][:3])
        depth = np.median(table.obs["n_counts"])
        print(f"  counts      {table.n_vars:,} genes, as {symbols}; median of {depth:,.0f} a spot")
    return table[inside].copy()


def describe_image(slide):
    """Print what the image of a slide is, or that it is patches of HEST."""
    if holds_patches(slide.image):
        print(f"  image       {slide.image}: patches of HEST, {slide.um_per_px:g} um/px")
        return
    image = imaging.open_image(inputs.unpack(slide.image))
    height, width = image.shape
    print(f"  image       {slide.image}: {height} x {width} px, {image.how}")
    stated = "nothing"
    with contextlib.suppress(InputError):
        stated = f"{imaging.read_resolution(inputs.unpack(slide.image)):g}"
    print(f"  resolution  {slide.um_per_px:g} um/px in slides.csv; its tags say {stated}")


# -------------------------------------------------------------------------------- start


def split_paths(flag, text):
    """The paths of a comma-separated list; what stands between two commas may be part of a name."""
    paths, parts = [], text.split(",") if text else []
    while parts:
        # The shortest name that is there, so that a list without such names is read as it stands.
        for length in range(1, len(parts) + 1):
            path = Path(",".join(parts[:length]).strip())
            if path.name and path.exists():
                break
        else:
            raise InputError(f"{flag}: {parts[0]!r}: no such file or folder")
        paths.append(path)
        parts = parts[length:]
    return paths


def link_hest(root):
    """Write slides.csv for the samples of HEST-1k that the constants choose, or for a task of
    HEST-Benchmark.
    """
    folder = Path(FROM_HEST)
    if not folder.is_dir():
        raise InputError(f"--from-hest {FROM_HEST}: no such folder")
    if FROM_SPACERANGER:
        raise InputError(
            "--from-hest and --from-spaceranger: give one of them; both write slides.csv"
        )
    filters = {"organ": ORGAN, "species": SPECIES, "st_technology": TECHNOLOGY}
    filters = {column: value for column, value in filters.items() if value}
    named = [sample.strip() for sample in SAMPLES.split(",") if sample.strip()]
    if (folder / "splits").is_dir():
        if named or filters:
            raise InputError(
                f"--from-hest {FROM_HEST}: a task of HEST-Benchmark, whose splits/ names its "
                "samples: leave out --samples, --organ, --species and --technology"
            )
        files.hold_folder(root)
        hest.write_task(root, folder)
        return
    # A folder above tasks, as the data set MahmoodLab/hest-bench is.
    tasks = sorted(path.parent.name for path in folder.glob("[!.]*/splits") if path.is_dir())
    if tasks and not (folder / "st").is_dir():
        raise InputError(
            f"--from-hest {FROM_HEST}: a folder of {len(tasks)} tasks of HEST-Benchmark, "
            f"{', '.join(tasks)}: name one, as --from-hest {folder / tasks[0]}"
        )
    if not named and not filters:
        raise InputError(
            "--from-hest: which samples? Give --samples NCBI826,NCBI827, or --organ, --species or "
            "--technology"
        )
    files.hold_folder(root)
    hest.write_hest_manifest(root, folder, list(dict.fromkeys(named)), filters, HEST_PATCHES)


def choose_target(root):
    """The target to write: TARGET, but log1p for a task of HEST-Benchmark."""
    if has_folds(root):
        if PANEL:
            raise InputError(
                f"--panel {PANEL}: {root} is a task of HEST-Benchmark, which has genes of its own: "
                "leave it out"
            )
        return "log1p"
    if TARGET == "log1p":
        raise InputError(
            "--target log1p: is that of a task of HEST-Benchmark (--from-hest FOLDER_OF_A_TASK): "
            "use --target lognorm"
        )
    return TARGET


def check_task(manifest, tables, genes):
    """InputError where a sample of a task of HEST-Benchmark lacks one of its genes."""
    for slide, table in zip(manifest, tables, strict=True):
        names = set(table.read_features()["name"])
        lost = [gene for gene in genes if gene not in names]
        if lost:
            raise InputError(
                f"{slide.matrix}: sample {slide.name} lacks the gene {lost[0]} "
                f"({len(lost)} of the {len(genes)} genes of the task): fetch it again"
            )


def main():
    root = Path(DATA_ROOT)
    inputs.WARNINGS.clear()
    if (IMAGES or USE_HIRES) and not FROM_SPACERANGER:
        raise InputError("--images and --use-hires go with --from-spaceranger")
    if IMAGES and USE_HIRES:
        raise InputError("--images and --use-hires: give one of them")
    if FROM_HEST:
        link_hest(root)
    elif SAMPLES or ORGAN or SPECIES or TECHNOLOGY or HEST_PATCHES:
        raise InputError(
            "--samples, --organ, --species, --technology and --hest-patches go with --from-hest"
        )
    if FROM_SPACERANGER:
        files.hold_folder(root)
        folders = split_paths("--from-spaceranger", FROM_SPACERANGER)
        images = split_paths("--images", IMAGES)
        space_ranger.write_manifest(root, folders, images, USE_HIRES, BIN_UM)
    target = choose_target(root)
    manifest = read_manifest(root)
    if not CHECK:  # It writes no dataset, and may look at what it cannot write to.
        files.hold_folder(root)
    have_counts = {slide.matrix is not None for slide in manifest}
    if len(have_counts) > 1:
        raise InputError(
            f"{root / 'slides.csv'}: some slides have a matrix and some have none; "
            "use two data roots"
        )
    if not UM_PER_PX:
        warn_of_magnifications(manifest)
    if True not in have_counts:
        target = None
    needs_harmony = target == "harmony" and not has_published_target(root, manifest)
    if needs_harmony:
        check_harmony(len(manifest))
    if CHECK:
        check_slides(root, manifest, needs_harmony)
        return
    with whole_folder(root / "dataset") as out, tempfile.TemporaryDirectory(dir=out) as scratch:
        panel = [Path(PANEL)] if PANEL else []
        noted = note_files([path for slide in manifest for path in list_files(slide)] + panel)
        tables, thumbnails, named = [], {}, read_named(root)
        for slide in manifest:
            positions, thumbnails[slide.name] = place_spots(slide)
            table = read_spots(slide, positions, GENOME, named)
            tables.append(StoredSpots(Path(scratch, f"{slide.tissue_index}.h5ad"), table))
        if has_folds(root):
            check_task(manifest, tables, named)
        obs = pd.concat([table.obs for table in tables])
        over_border, inside = write_patches(out, manifest, obs, thumbnails)
        if not inside.all():
            tables = [table.keep(obs.index[inside]) for table in tables]
            obs = obs[inside]
        if target:
            write_expression(root, out, tables, manifest, named)
        else:
            spots = obs.reset_index(names="id")
            files.save_csv(out / "dataset.csv", spots[common.ID_COLUMNS])
        meta = write_meta(root, out, manifest, target, over_border)
        check_unchanged(noted)
    remove_others(root / "dataset", meta["patches_sha256"])
    print(f"wrote {root / 'dataset'}: {len(obs):,} spots, target {target or 'none'}")


if __name__ == "__main__":
    shell.run_script(globals())
