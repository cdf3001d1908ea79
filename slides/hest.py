"""HEST-1k and the tasks of HEST-Benchmark, to the rows of a slides.csv."""

import json
import re
from dataclasses import replace

import pandas as pd

import common
from slides import inputs, space_ranger
from slides.hest_patches import open_hest_patches
from slides.manifest import NO_FILE, Slide, link_slides
from slides.positions import read_positions
from study import files
from study.errors import InputError

NUMBERS = re.compile(r"\d+").findall
HEST_UM_PER_PX = 0.5  # of HEST-1k's patches
POSITIONS = "positions_patches.csv"  # of spots that have a patch, in a data root


# -------------------------------------------------------------------------------- HEST


def write_hest_manifest(root, folder, samples, filters, use_patches):
    """slides.csv for samples of HEST-1k, and root/links/ to their images and counts.

    `samples` are ids, as NCBI826. `filters` {column of the metadata table: value} choose among
    them, or among all where none is named. To `use_patches`, the files of patches stand in
    place of the images, and the positions are scaled to them.
    """
    metadata = read_hest_metadata(folder)
    chosen = choose_hest_samples(folder, metadata, samples or list(metadata), filters)
    slides, positions = [], []
    for number, sample in enumerate(chosen, 1):
        slide = read_hest_sample(folder, number, sample, metadata.get(sample, {}), use_patches)
        places = None  # They are in the .h5ad, in px of the whole image.
        if use_patches:
            scale = slide.um_per_px / HEST_UM_PER_PX
            places = space_ranger.scale_positions(read_positions(slide.matrix), scale)
            slide = replace(slide, um_per_px=HEST_UM_PER_PX)
        slides.append(slide)
        positions.append(places)
    table = link_slides(root, slides, positions, POSITIONS, "--from-hest")
    files.save_csv(root / "slides.csv", table)
    donors = table["donor"].nunique()
    print(f"wrote {root / 'slides.csv'}: {len(table)} slides of {donors} donors")


def read_hest_metadata(folder):
    """{sample: {column: text}} of the newest table HEST_v*.csv in HEST's folder; {} without one."""
    # v1_10_0 follows v1_9_0.
    tables = sorted(folder.glob("HEST_v*.csv"), key=lambda path: [*map(int, NUMBERS(path.stem))])
    if not tables:
        return {}
    table = inputs.read_columns(tables[-1], ["id"])
    inputs.check_unique(table["id"], "sample", tables[-1])
    return table.set_index("id").to_dict("index")


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
    """The Slide of a sample of HEST-1k, of its metadata and of its row in their table."""
    matrix = folder / "st" / f"{sample}.h5ad"
    image = folder / "wsis" / f"{sample}.tif"
    if use_patches:
        image = folder / "patches" / f"{sample}.h5"
    for path in (matrix, image):
        check_file(
            path, "fetch it from the data set MahmoodLab/hest, or name other samples with --samples"
        )
    facts = row | read_hest_json(folder, sample, row)
    donor = name_donor(facts)
    if not donor:
        inputs.warn(
            f"{folder}: sample {sample} names no patient and is taken for a donor of its own: "
            "fix donor in slides.csv where two samples are of one person"
        )
    um_per_px = pd.to_numeric(facts.get("pixel_size_um_estimated"), errors="coerce")
    if um_per_px is None or not 0.05 <= um_per_px <= 20:
        raise InputError(
            f"{folder}: pixel_size_um_estimated of sample {sample} is "
            f"{facts.get('pixel_size_um_estimated')}; expected a number from 0.05 to 20"
        )
    return Slide(number, sample, donor or sample, image, float(um_per_px), None, matrix)


def check_file(path, fix):
    """InputError, with what to do, where there is no such file."""
    if not path.is_file():
        raise InputError(f"{path}: no such file: {fix}")


def name_donor(facts):
    """The patient and data set that the metadata {name: text} of a sample name, since patients of
    two data sets may have one name; "" where they name no patient.
    """
    patient = facts.get("patient", "").strip()
    return "" if patient in NO_FILE else f"{facts.get('dataset_title', '')} {patient}".strip()


def read_hest_json(folder, sample, row):
    """What metadata/<sample>.json says, as texts by name; a `row` of the table may stand for it."""
    path = folder / "metadata" / f"{sample}.json"
    if not path.is_file() and row:
        return {}
    try:
        facts = json.loads(inputs.decode_text(path.read_bytes()))
        return {name: str(value) for name, value in facts.items() if str(value) not in NO_FILE}
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path}: no metadata of sample {sample} ({error}): fetch it, or the table HEST_v*.csv"
        ) from None


# -------------------------------------------------------------------------------- HEST-Benchmark


def write_task(root, folder):
    """slides.csv, folds.csv and hest_genes.csv for a task of HEST-Benchmark, and root/links/.

    Its spots are those that have a patch.
    """
    splits = read_splits(folder)
    genes = read_task_genes(folder)
    metadata = read_hest_metadata(folder)
    rows = splits.drop_duplicates("sample_id").sort_values("sample_id").to_dict("records")
    slides = [read_task_sample(folder, number, row, metadata) for number, row in enumerate(rows, 1)]
    positions = [read_task_positions(slide) for slide in slides]  # Refused before a link is made.
    table = link_slides(root, slides, positions, POSITIONS, "--from-hest")
    numbers = {slide.name: slide.tissue_index for slide in slides}
    splits["tissue_index"] = splits["sample_id"].map(numbers)
    files.save_csv(root / common.TASK_GENES, pd.DataFrame({"gene": genes}))
    files.save_csv(root / common.TASK_FOLDS, splits[["fold", "role", "tissue_index", "sample_id"]])
    files.save_csv(root / "slides.csv", table)
    n_folds = splits["fold"].nunique()
    print(f"wrote {root / 'slides.csv'}: {len(table)} slides, {n_folds} folds, {len(genes)} genes")


def read_splits(folder):
    """Table fold, role (train or test), sample_id, patches_path, expr_path of a task's splits/.

    InputError where a file of a fold is missing, or a sample has both roles in one.
    """
    numbers = []
    for path in (folder / "splits").glob("[!.]*.csv"):
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
    check_file(path, f"a fold needs train_{fold}.csv and test_{fold}.csv; fetch the task again")
    columns = ["sample_id", "patches_path", "expr_path"]
    table = inputs.read_columns(path, columns)
    if table.empty:
        raise InputError(f"{path}: expected a row a sample")
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
        check_file(
            path,
            f"splits/ names it for sample {sample}: fetch the task again from the data set "
            "MahmoodLab/hest-bench",
        )
    known = {"id": sample} | metadata.get(sample, {})
    donor = name_donor(known | read_hest_json(folder, sample, known)) or sample
    return Slide(number, sample, donor, image, HEST_UM_PER_PX, None, matrix)


def read_task_positions(slide):
    """The positions of a task's sample, in px of its whole image, whose size nobody states.

    Those spots count as tissue that have a patch. The others are left out by read_spots, for the
    reason that the .h5ad gives, or as those that have none.
    """
    positions = read_positions(slide.matrix)
    with open_hest_patches(slide.image) as (barcodes, _):
        lost = barcodes[~barcodes.isin(positions.index)]
        if len(lost):
            raise InputError(
                f"{slide.image}: {slide.matrix} has no barcode {lost[0]}: the two files are not of "
                "one sample"
            )
        inside = positions["in_tissue"].where(~positions.index.isin(barcodes), 1)
        return positions.assign(in_tissue=inside)
