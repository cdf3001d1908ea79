"""Folders as Space Ranger, Visium HD and HEST-1k leave them, to the rows of a slides.csv.

Space Ranger -> HEST -> tasks of HEST-Benchmark -> Visium HD

How the files themselves are read is in slides.py and imaging.py.
"""

import json
import math
import re
import shutil
import tempfile
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse
from PIL import Image

import common
import imaging
import inputs
import shell
import slides
from common import PATCH_SIZE, POSITION_COLUMNS
from shell import InputError

ARRAY = ["array_row", "array_col"]
BINS = ("square_008um", "square_016um")  # of Visium HD's folders, the finest of these is read
BIN_POSITIONS = "tissue_positions.parquet"
BIN_UM = 56.0  # um, the spots to which the bins of Visium HD are summed
HEST_UM_PER_PX = 0.5  # of HEST-1k's patches
SAME_IMAGE = 0.9  # r of the views' grey values, at least; sections side by side reach 0.8
VIEW = 64  # px, the side of the views by which two images are compared


# -------------------------------------------------------------------------------- Space Ranger


def read_space_ranger(folder, image=None, check=True, bin_um=BIN_UM):
    """(Slide, its positions) of a folder outs/ of Space Ranger, or of the folder that holds outs/.

    Its full-resolution image is not among Space Ranger's files. Without `image`,
    tissue_hires_image.png is taken, which is coarse, and the positions are scaled to it. Its um per
    px follow from the spots, which are 100 um apart. An image is held against the hires image, but
    where `check` is False. The bins of Visium HD are summed to spots of `bin_um`, whose files lie
    in inputs.scratch_folder(); their um per px is stated.
    """
    outs = find_outs(folder)
    if image is not None and not image.exists():
        raise InputError(f"image {image}: no such file")
    name = name_sample(folder)
    if is_binned(outs):
        positions_file, matrix = make_spots(outs, name, bin_um)
        positions = slides.read_positions(positions_file)
        um_per_px = read_scale(outs, "microns_per_pixel")
    else:
        positions_file = find_spatial(outs, "tissue_positions.csv", "tissue_positions_list.csv")
        matrix = find_matrix(outs)
        positions = slides.read_positions(positions_file)
        um_per_px = slides.SPOT_PITCH / slides.measure_pitch(positions)
    if image is None:
        image = find_spatial(outs, "tissue_hires_image.png")
        scale = read_hires_scale(outs)
        positions = scale_positions(positions, scale)
        um_per_px /= scale
        width = f"{PATCH_SIZE} px of it are {PATCH_SIZE * um_per_px:.0f} um"
        print(f"{name}: the hires image, {um_per_px:.2f} um/px: {width}")
    elif check:
        check_images("the image", [folder], [image])
    um_per_px = round(um_per_px, 4)
    return slides.Slide(1, name, name, image, um_per_px, positions_file, matrix), positions


def scale_positions(positions, scale):
    """The positions on an image that is `scale` times as wide, in whole px."""
    places = np.rint(positions[imaging.PLACE] * scale).astype(int)
    return positions.assign(**places)


def find_outs(folder):
    """The folder outs/ of Space Ranger, which may be `folder` itself; of Visium HD, its bins'."""
    outs = folder / "outs" if (folder / "outs").is_dir() else folder
    binned = outs / "binned_outputs"
    if not binned.is_dir():
        return outs
    for name in BINS:
        if (binned / name).is_dir():
            return binned / name
    raise InputError(f"{binned}: Visium HD without {' or '.join(BINS)}; copy one of them there")


def is_binned(outs):
    """Whether a folder holds what outs/ does, of the bins of Visium HD."""
    return outs.absolute().name.startswith("square_") or (outs / "spatial" / BIN_POSITIONS).exists()


def find_matrix(outs):
    """The matrix in a folder of Space Ranger."""
    return find_output(outs, "filtered_feature_bc_matrix.h5", "filtered_feature_bc_matrix")


def find_spatial(outs, *names):
    """The first of the names in Space Ranger's folder spatial/, or beside the others."""
    return find_output(outs / "spatial" if (outs / "spatial").is_dir() else outs, *names)


def find_output(folder, *names):
    """The first of the names in one of Space Ranger's folders, as slides.find_part finds it."""
    try:
        return slides.find_part(folder, *names)
    except InputError as error:
        raise InputError(f"{error}; {folder} is to lie in a folder outs/ of Space Ranger") from None


def name_sample(folder):
    """The name of a sample's folder, which holds outs/, is outs/, or is a folder of bins in it."""
    place = folder.absolute()
    if place.parent.name == "binned_outputs":
        place = place.parent.parent
    return (place.parent if place.name == "outs" else place).resolve().name


def read_hires_scale(outs):
    """px of the hires image a full-resolution px, as Space Ranger's scalefactors_json.json says."""
    return read_scale(outs, "tissue_hires_scalef")


def read_scale(outs, name):
    """A number above 0 that Space Ranger's scalefactors_json.json states under this name."""
    path = find_spatial(outs, "scalefactors_json.json")
    try:
        scale = float(json.loads(inputs.decode_text(inputs.read_bytes(path)))[name])
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no {name} ({error})") from None
    if not 0 < scale < math.inf:
        raise InputError(f"{path}: {name} is {scale:g}; expected a number above 0")
    return scale


@dataclass(frozen=True)
class View:
    """An image on a few px, to tell whether two files show the same."""

    path: Path
    shape: np.ndarray  # height, width in px of the full-resolution image
    grey: np.ndarray  # (VIEW, VIEW) float64
    tolerance: float = 0.0  # px by which the shape may be wrong


def view_image(path, scale=1.0):
    """The View of an image that is `scale` times as wide as the full-resolution one."""
    image = imaging.open_image(inputs.unpack(path))
    thumbnail = imaging.make_thumbnail(image, max(1, min(image.shape) // (2 * VIEW)))
    return view_thumbnail(path, thumbnail, scale)


def view_thumbnail(path, thumbnail, scale=1.0):
    """As view_image, of an image whose Thumbnail is there."""
    grey = Image.fromarray(thumbnail.pixels()).convert("L").resize((VIEW, VIEW), Image.BOX)
    tolerance = 0.0 if scale == 1 else 1.5 / scale  # A scaled image's sides are whole px.
    shape = np.array(thumbnail.slide_shape) / scale
    return View(path, shape, np.asarray(grey, np.float64), tolerance)


def view_hires(folder):
    """The View of Space Ranger's hires image; None, and a warning, where it cannot be had."""
    outs = find_outs(folder)
    try:
        image, scale = find_spatial(outs, "tissue_hires_image.png"), read_hires_scale(outs)
    except InputError as error:
        inputs.warn(f"{folder}: whether its image fits cannot be told ({error})")
        return None
    return view_image(image, scale)


def check_hires(slide, shape, thumbnail=None):
    """InputError where an image is not the one of the hires image that lies beside the positions.

    `shape` is its (height, width); its content is compared where its Thumbnail is there.
    """
    if slide.positions is None:
        return
    spatial = slide.positions.resolve().parent
    names = "tissue_hires_image.png", "scalefactors_json.json"
    if not all((spatial / name).exists() for name in names):
        return
    if slide.image.samefile(spatial / names[0]):
        return
    hires = view_image(spatial / names[0], read_hires_scale(spatial))
    view = View(slide.image, np.array(shape), hires.grey)
    if thumbnail is not None:
        view = view_thumbnail(slide.image, thumbnail)
    if not is_same_image(view, hires):
        raise InputError(describe_misfit("image", slide.positions, view, hires, None))


def is_same_size(view, hires):
    """Whether an image is as large as the one of which Space Ranger made the hires image."""
    return (abs(view.shape - hires.shape) <= hires.tolerance).all()


def is_same_image(view, hires):
    """Whether an image has the size and shows the content of a hires image."""
    if not is_same_size(view, hires):
        return False
    r = common.pearson_per_gene(view.grey.reshape(-1, 1), hires.grey.reshape(-1, 1))[0]
    return np.isnan(r) or r >= SAME_IMAGE


def check_images(name, folders, images):
    """InputError unless each image is that of its folder of Space Ranger.

    The hires image and its scale factor tell the size and the content. `name` is what the message
    calls the images; the order that fits is named where there is one.
    """
    hires = [view_hires(folder) for folder in folders]
    views = [view_image(image) for image in images]
    for folder, view, expected in zip(folders, views, hires, strict=True):
        if expected is not None and not is_same_image(view, expected):
            order = order_images(views, hires)
            raise InputError(describe_misfit(name, folder, view, expected, order))


def order_images(views, hires):
    """The images in the order in which they fit the hires images; None where there is none."""
    order = []
    for expected in hires:
        fitting = [view for view in views if expected is None or is_same_image(view, expected)]
        if len(fitting) != 1:
            return None
        order.append(fitting[0].path)
    return order if len(set(order)) == len(order) else None


def describe_misfit(name, folder, view, expected, order):
    """Why an image is not that of a folder of Space Ranger, and what to do."""
    height, width = view.shape
    if is_same_size(view, expected):
        cause = f"shows something else than {expected.path}"
    else:
        high, wide = expected.shape
        cause = (
            f"is {height:.0f} x {width:.0f} px, {height / high:.3g} times what Space Ranger got, "
            f"about {high:.0f} x {wide:.0f} px by its hires image and tissue_hires_scalef"
        )
    fix = f"give the image that Space Ranger got for {folder}"
    if order:
        fix = f"the order that fits is {','.join(map(str, order))}"
    return f"{name} {view.path} {cause}: {fix}"


def write_manifest(root, folders, images, use_hires, bin_um=BIN_UM):
    """slides.csv for Space Ranger's folders and their images, and root/links/ to what it names.

    Positions and matrix of Visium HD, of spots of `bin_um`, are written there.
    """
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
    samples = read_samples(folders, images or [None] * len(folders), bin_um)
    if images:
        check_images("--images", folders, images)
    linked = [
        name_links(slide, slide.positions.name if images else "positions_hires.csv")
        for slide, _ in samples
    ]
    table = pd.DataFrame([asdict(slide) for slide in linked])
    check_manifest_is_new(path, table, "--from-spaceranger")
    for (slide, positions), links in zip(samples, linked, strict=True):
        place_link(root / links.image, slide.image)
        place_file(root / links.matrix, slide.matrix)
        if images:
            place_file(root / links.positions, slide.positions)
        else:
            shell.save_csv(root / links.positions, positions.reset_index())
    shell.save_csv(path, table)
    print(f"wrote {path}: each slide is taken for another donor's; mend that there if it is not so")


def check_manifest_is_new(path, table, flag):
    """InputError where a slides.csv is there that is not this table; `flag` is what makes it."""
    if path.exists() and inputs.decode_text(inputs.read_bytes(path)) != table.to_csv(index=False):
        raise InputError(
            f"{path} is there already and names other slides: leave out {flag}, or remove it"
        )


def read_samples(folders, images, bin_um):
    """[(Slide, its positions)] of Space Ranger's folders; those of one name get their number."""
    names = [name_sample(folder) for folder in folders]
    samples = []
    for number, (folder, image) in enumerate(zip(folders, images, strict=True), 1):
        slide, positions = read_space_ranger(folder, image, False, bin_um)
        name = f"{slide.name}_{number}" if names.count(slide.name) > 1 else slide.name
        slide = replace(slide, tissue_index=number, name=name, donor=name)
        samples.append((slide, positions))
    return samples


def name_links(slide, positions):
    """The slide with the paths that its files get in a data root; `positions` is the name of the
    file of positions there, or None.
    """
    folder = Path("links", slide.name)
    return replace(
        slide,
        image=folder / slide.image.name,
        positions=positions and folder / positions,
        matrix=folder / slide.matrix.name,
    )


def place_file(place, path):
    """Make a link to a path, or a copy of a file that would go when the process ends."""
    if inputs.scratch_folder() not in path.parents:
        place_link(place, path)
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    with shell.whole_file(place) as partial:
        shutil.copyfile(path, partial)


def place_link(link, path):
    """Make a link to a path, in place of an older link."""
    if link.exists() and not link.is_symlink():
        raise InputError(f"{link} is no link: move it away")
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(path.resolve())


# -------------------------------------------------------------------------------- HEST


def write_hest_manifest(root, folder, samples, filters, use_patches):
    """slides.csv for samples of HEST-1k, and root/links/ to their images and counts.

    `samples` are ids, as NCBI826. `filters` {column of the metadata table: value} choose among
    them, or among all where none is named. To `use_patches`, the files of patches stand in
    place of the images, and the positions are scaled to them.
    """
    path = root / "slides.csv"
    metadata = read_hest_metadata(folder)
    samples = samples or list(metadata)
    chosen = choose_hest_samples(folder, metadata, samples, filters)
    made = [
        read_hest_sample(folder, number, sample, metadata.get(sample, {}), use_patches)
        for number, sample in enumerate(chosen, 1)
    ]
    linked = [name_links(slide, "positions_patches.csv" if use_patches else None) for slide in made]
    if use_patches:
        linked = [replace(links, um_per_px=HEST_UM_PER_PX) for links in linked]
    table = pd.DataFrame([asdict(slide) for slide in linked])
    check_manifest_is_new(path, table, "--from-hest")
    positions = [None] * len(made)  # They are in the .h5ad.
    if use_patches:
        positions = [scale_to_patches(slide) for slide in made]
    place_slides(root, made, linked, positions)
    shell.save_csv(path, table)
    print(f"wrote {path}: {len(table)} slides of {table['donor'].nunique()} donors")


def scale_to_patches(slide):
    """The positions of a sample in px of its patches' resolution."""
    positions = slides.read_positions(slide.matrix)
    return scale_positions(positions, slide.um_per_px / HEST_UM_PER_PX)


def place_slides(root, made, linked, positions):
    """Make the links of a data root to the files of slides, and the files of their positions, where
    these are not None.
    """
    for slide, links, places in zip(made, linked, positions, strict=True):
        place_link(root / links.image, slide.image)
        place_link(root / links.matrix, slide.matrix)
        if places is not None:
            shell.save_csv(root / links.positions, places.reset_index())


def read_hest_metadata(folder):
    """{sample: {column: text}} of the newest table HEST_v*.csv in HEST's folder; {} without one."""
    tables = sorted(folder.glob("HEST_v*.csv"), key=number_version)
    if not tables:
        return {}
    table = inputs.read_table(tables[-1], {"id": ("id",)})
    if "id" not in table or not table.attrs["named"]:
        raise InputError(f"{tables[-1]}: no column id among {', '.join(map(str, table))}")
    inputs.check_unique(table["id"], "sample", tables[-1])
    return table.set_index("id").to_dict("index")


def number_version(path):
    """The numbers in a file's name, by which v1_10_0 follows v1_9_0."""
    return [int(number) for number in re.findall(r"\d+", path.stem)]


def choose_hest_samples(folder, metadata, samples, filters):
    """The samples that pass every filter; InputError where one is unknown, or none is left.

    Upper and lower case are the same to a filter.
    """
    if not metadata and filters:
        raise InputError(
            f"{folder}: no table HEST_v*.csv, in which --organ, --species and --technology look: "
            "fetch it, or name the samples with --samples"
        )
    unknown = [sample for sample in samples if metadata and sample not in metadata]
    if unknown:
        raise InputError(
            f"--samples {unknown[0]}: not in the table HEST_v*.csv of {folder}, which names "
            f"{len(metadata)} samples, as {next(iter(metadata))}"
        )
    for column, value in filters.items():
        values = {sample: metadata[sample].get(column, "") for sample in samples}
        samples = [sample for sample in samples if values[sample].lower() == value.lower()]
        if not samples:
            raise InputError(
                f"{folder}: no sample whose {column} is {value!r}; "
                f"there are {', '.join(sorted(set(values.values())))}"
            )
    return samples


def read_hest_sample(folder, number, sample, row, use_patches):
    """The Slide of a sample of HEST-1k, of its metadata and of its row in their table.

    A donor is a patient of a data set, since patients of two data sets may have one name.
    """
    matrix = folder / "st" / f"{sample}.h5ad"
    image = folder / "wsis" / f"{sample}.tif"
    if use_patches:
        image = folder / "patches" / f"{sample}.h5"
    for path in (matrix, image):
        if not path.is_file():
            raise InputError(
                f"{path}: no such file: fetch it from the data set MahmoodLab/hest, or name "
                "other samples with --samples"
            )
    facts = row | read_hest_json(folder, sample, row)
    if facts.get("patient", "").strip() in slides.NO_FILE:
        inputs.warn(
            f"{folder}: sample {sample} names no patient and is taken for a donor of its own: "
            "mend donor in slides.csv where two samples are of one person"
        )
    um_per_px = pd.to_numeric(facts.get("pixel_size_um_estimated"), errors="coerce")
    if um_per_px is None or not 0.05 <= um_per_px <= 20:
        raise InputError(
            f"{folder}: pixel_size_um_estimated of sample {sample} is "
            f"{facts.get('pixel_size_um_estimated')}; expected a number from 0.05 to 20"
        )
    donor = name_donor(sample, facts)
    return slides.Slide(number, sample, donor, image, float(um_per_px), None, matrix)


def name_donor(sample, facts):
    """The patient that the metadata {name: text} of a sample name, or else the sample."""
    patient = facts.get("patient", "").strip()
    if patient in slides.NO_FILE:
        return sample
    return f"{facts.get('dataset_title', '')} {patient}".strip()


def read_hest_json(folder, sample, row):
    """What metadata/<sample>.json says, as texts by name; a `row` of the table may stand for it."""
    path = folder / "metadata" / f"{sample}.json"
    if not path.is_file() and row:
        return {}
    try:
        facts = json.loads(inputs.decode_text(path.read_bytes()))
        return {
            name: str(value) for name, value in facts.items() if str(value) not in slides.NO_FILE
        }
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path}: no metadata of sample {sample} ({error}): fetch it, or the table HEST_v*.csv"
        ) from None


# -------------------------------------------------------------------------------- HEST-Benchmark


def has_splits(folder):
    """Whether a folder has splits/, as a task of HEST-Benchmark does and HEST-1k does not."""
    return (folder / "splits").is_dir()


def write_task(root, folder):
    """slides.csv, folds.csv and hest_genes.csv for a task of HEST-Benchmark, and root/links/.

    Its spots are those that have a patch.
    """
    splits = read_splits(folder)
    genes = read_task_genes(folder)
    metadata = read_hest_metadata(folder)
    made, linked = [], []
    rows = splits.drop_duplicates("sample_id").sort_values("sample_id").to_dict("records")
    for number, row in enumerate(rows, 1):
        slide = read_task_sample(folder, number, row, metadata)
        made.append(slide)
        linked.append(name_links(slide, "positions_patches.csv"))
    table = pd.DataFrame([asdict(slide) for slide in linked])
    check_manifest_is_new(root / "slides.csv", table, "--from-hest")
    positions = [read_task_positions(slide) for slide in made]  # Refused before a link is made.
    place_slides(root, made, linked, positions)
    numbers = {slide.name: slide.tissue_index for slide in made}
    splits["tissue_index"] = splits["sample_id"].map(numbers)
    shell.save_csv(root / common.TASK_GENES, pd.DataFrame({"gene": genes}))
    shell.save_csv(root / common.TASK_FOLDS, splits[["fold", "role", "tissue_index", "sample_id"]])
    shell.save_csv(root / "slides.csv", table)
    n_folds = splits["fold"].nunique()
    print(f"wrote {root / 'slides.csv'}: {len(table)} slides, {n_folds} folds, {len(genes)} genes")


def read_splits(folder):
    """Table fold, role (train or test), sample_id, patches_path, expr_path of a task's splits/.

    InputError where a file of a fold is missing, or a sample has both roles in one.
    """
    numbers = []
    for path in (folder / "splits").glob("*.csv"):
        numbers += re.findall(r"^(?:train|test)_(\d+)$", path.stem)
    n_folds = max(map(int, numbers), default=0) + 1
    parts = []
    for fold in range(n_folds):
        roles = {role: read_split(folder, role, fold) for role in ("train", "test")}
        twice = set(roles["train"]["sample_id"]) & set(roles["test"]["sample_id"])
        if twice:
            raise InputError(
                f"{folder / 'splits'}: sample {min(twice)} is both in train_{fold}.csv and in "
                f"test_{fold}.csv: fetch the task again"
            )
        parts += [part.assign(fold=fold, role=role) for role, part in roles.items()]
    return pd.concat(parts, ignore_index=True)


def read_split(folder, role, fold):
    """Table sample_id, patches_path, expr_path of a file of a task's splits/."""
    path = folder / "splits" / f"{role}_{fold}.csv"
    if not path.is_file():
        raise InputError(
            f"{path}: no such file: a fold needs train_{fold}.csv and test_{fold}.csv; fetch the "
            "task again"
        )
    columns = ["sample_id", "patches_path", "expr_path"]
    table = inputs.read_table(path, {column: (column,) for column in columns})
    missing = [column for column in columns if column not in table or not table.attrs["named"]]
    if missing or table.empty:
        raise InputError(f"{path}: expected the columns {', '.join(columns)} and a row a sample")
    inputs.check_unique(table["sample_id"], "sample", path)
    return table[columns]


def read_task_genes(folder):
    """The genes that a task of HEST-Benchmark predicts."""
    path = folder / "var_50genes.json"
    try:
        genes = json.loads(inputs.decode_text(path.read_bytes()))["genes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no list of genes ({error}): fetch the task again") from None
    if not isinstance(genes, list) or not genes:
        raise InputError(f"{path}: genes is {genes!r}; expected a list of names")
    inputs.check_unique(genes, "gene", path)
    return genes


def read_task_sample(folder, number, row, metadata):
    """The Slide of a sample, of its row in a task's splits and of {sample: its metadata}."""
    sample = row["sample_id"]
    image, matrix = folder / row["patches_path"], folder / row["expr_path"]
    for path in (image, matrix):
        if not path.is_file():
            raise InputError(
                f"{path}: no such file, which splits/ names for sample {sample}: fetch the task "
                "again from the data set MahmoodLab/hest-bench"
            )
    known = {"id": sample} | metadata.get(sample, {})
    donor = name_donor(sample, known | read_hest_json(folder, sample, known))
    return slides.Slide(number, sample, donor, image, HEST_UM_PER_PX, None, matrix)


def read_task_positions(slide):
    """The positions of a task's sample, in px of its whole image, whose size nobody states.

    Those spots count as tissue that have a patch.
    """
    positions = slides.read_positions(slide.matrix)
    with imaging.open_hest_patches(slide.image) as (barcodes, _):
        lost = barcodes[~barcodes.isin(positions.index)]
        if len(lost):
            raise InputError(
                f"{slide.image}: {slide.matrix} has no barcode {lost[0]}: the two files are not of "
                "one sample"
            )
        return positions.assign(in_tissue=positions.index.isin(barcodes).astype(int))


# -------------------------------------------------------------------------------- Visium HD


def make_spots(outs, name, bin_um):
    """(positions file, matrix file) of spots of `bin_um`, summed from a folder of Visium HD's bins.

    Both lie in inputs.scratch_folder(). The matrix holds the spots of the tissue alone.
    """
    side = count_bins(outs, bin_um)
    positions_file, matrix = find_spatial(outs, BIN_POSITIONS), find_matrix(outs)
    bins = slides.read_positions(positions_file)
    spots, spot_of_bin = group_bins(bins, side, bin_um)
    tissue = (spots["in_tissue"] == 1).to_numpy()
    if not tissue.any():
        raise InputError(
            f"{positions_file}: no spot of {bin_um:g} um has half of its bins in_tissue"
        )
    table = slides.read_matrix_file(matrix)
    slides.check_counts(table, matrix)
    rows = bins.index.get_indexer(table.obs_names)
    if (rows < 0).any():
        raise InputError(
            f"{positions_file}: no position for barcode {table.obs_names[rows < 0][0]} of {matrix}:"
            " the two files are not of one slide"
        )
    counts = sum_bins(table.X, spot_of_bin[rows], tissue)
    summed = anndata.AnnData(counts, spots[tissue], table.var)
    print(
        f"{name}: {len(bins):,} bins are summed to {len(spots):,} spots of {bin_um:g} um, "
        f"{tissue.sum():,} of them in_tissue"
    )
    folder = Path(tempfile.mkdtemp(dir=inputs.scratch_folder()))
    made = folder / f"positions_{bin_um:g}um.csv", folder / f"matrix_{bin_um:g}um.h5"
    shell.save_csv(made[0], spots.reset_index())
    write_h5_matrix(made[1], summed)
    return made


def count_bins(outs, bin_um):
    """How many bins of a folder of Visium HD lie along the side of a spot of `bin_um`."""
    size = read_scale(outs, "bin_size_um")
    side = round(bin_um / size)
    if side < 1 or not math.isclose(side * size, bin_um):
        raise InputError(
            f"--bin-um {bin_um:g}: no multiple of the {size:g} um of the bins in {outs}; "
            f"give {max(side, 1) * size:g}"
        )
    return side


def group_bins(bins, side, bin_um):
    """(positions of spots of side x side bins, (n bins,) number of each bin's spot).

    Positions are as read_positions gives them; array_row and array_col count spots. A spot is
    in_tissue where half of its side x side bins are: those that the border of the slide cuts off
    are not.
    """
    squares = bins[ARRAY] // side
    groups = bins.groupby([squares["array_row"], squares["array_col"]])
    spots = np.rint(find_centres(bins, groups, side)).astype(np.int64)
    spots["in_tissue"] = (2 * groups["in_tissue"].sum() >= side**2).astype(np.int64)
    barcodes = [f"s_{bin_um:03.0f}um_{row:05d}_{column:05d}-1" for row, column in spots.index]
    spots = spots.reset_index().set_axis(pd.Index(barcodes, name="barcode"))
    return spots[POSITION_COLUMNS[1:]], groups.ngroup().to_numpy()


def find_centres(bins, groups, side):
    """The centres of squares of side x side bins in px, by row and column of the squares.

    It is the mean of the bins; of a square that the border of the slide cuts, it is moved to where
    the mean would be with the bins that lack, by the affine map from bins to px.
    """
    array = bins[ARRAY] - bins[ARRAY].mean()
    pixels = bins[imaging.PLACE] - bins[imaging.PLACE].mean()
    affine = np.linalg.lstsq(array.to_numpy(np.float64), pixels.to_numpy(np.float64))[0]
    means = groups[imaging.PLACE].mean()
    whole = side * means.index.to_frame().to_numpy() + (side - 1) / 2
    return means + (whole - groups[ARRAY].mean().to_numpy()) @ affine


def sum_bins(counts, spot_of_bin, kept):
    """CSR: the rows of counts (n bins, G), CSR, summed by the number of their spot.

    Spots are left out that `kept`, one bool for each, does not name.
    """
    n_bins = len(spot_of_bin)
    ones = np.ones(n_bins, counts.dtype)
    belongs = scipy.sparse.csr_matrix((ones, (spot_of_bin, np.arange(n_bins))), (len(kept), n_bins))
    return belongs[kept] @ counts


def write_h5_matrix(path, table):
    """Write counts (spots x genes, CSR), as slides.read_h5_matrix gives them, as such a file."""
    table.X.sort_indices()
    genomes = slides.find_genomes(table)
    if genomes.empty:
        genomes = [""] * table.n_vars
    features = {
        "id": table.var_names,
        "name": table.var["name"],
        "feature_type": ["Gene Expression"] * table.n_vars,
        "genome": genomes,
    }
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["data"] = table.X.data.astype(np.int32)
        group["indices"], group["indptr"] = table.X.indices, table.X.indptr
        group["shape"] = np.array([table.n_vars, table.n_obs], np.int32)  # genes x spots
        group["barcodes"] = encode_names(table.obs_names)
        for name, cells in features.items():
            group[f"features/{name}"] = encode_names(cells)


def encode_names(names):
    """Names as HDF5 keeps them: bytes of one length."""
    return np.char.encode(np.array([*map(str, names)]), "utf-8")
