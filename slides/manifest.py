"""The manifest: which slides there are and where their files lie, as slides.csv says; whether that
is still so after script 19; and links to files elsewhere. What cannot be read raises InputError.
"""

import os
import re
import shlex
import shutil
import unicodedata
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd

from common import PATCH_SIZE
from slides import inputs
from slides.counts import FOLDER_PART
from slides.sections import is_anndata, split_part
from study import files, hashes, shell
from study.errors import InputError


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

    def paths(self):
        """{column: path or None} of its files."""
        return {column: getattr(self, column) for column in PATHS}


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
    table = inputs.read_columns(path, MANIFEST)
    for column in ("tissue_index", "um_per_px"):
        table[column] = inputs.parse_numbers(table[column], table.attrs["separator"])
    check_manifest(path, table)
    table["tissue_index"] = table["tissue_index"].astype(int)
    rows = table[MANIFEST].sort_values("tissue_index").to_dict("records")
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
    fine, coarse = finest.um_per_px, coarsest.um_per_px
    if coarse < 1.05 * fine:
        return
    inputs.warn(
        f"slides.csv: um_per_px is {fine:g} of {finest.name} and {coarse:g} of {coarsest.name}, so "
        f"that patches show {PATCH_SIZE * fine:.0f} and {PATCH_SIZE * coarse:.0f} um: give "
        f"--um-per-px {coarse:g}"
    )


def check_manifest(path, table):
    """InputError where a slide lacks a number or a name of its own, a donor or a resolution."""
    numbers, resolutions = table["tissue_index"], table["um_per_px"]
    whole = (numbers == np.rint(numbers)) & (numbers.abs() < 2**31)
    if table.empty or not whole.all() or numbers.duplicated().any():
        raise InputError(
            f"{path}: tissue_index must be a different whole number for every slide, "
            "and one at least"
        )
    if not resolutions.between(0.05, 20).all():
        raise InputError(f"{path}: um_per_px must be a number from 0.05 to 20 for every slide")
    names, donors = table["name"], table["donor"]
    if (names == "").any() or names.duplicated().any():
        raise InputError(f"{path}: every slide needs a name of its own")
    if (donors == "").any():
        raise InputError(
            f"{path}: slide {names[donors == ''].iloc[0]} has no donor: give every person a name, "
            "since slides of one person are left out together"
        )
    unnamed = donors.isin(NO_FILE)
    if unnamed.sum() > 1:
        raise InputError(
            f"{path}: slides {' and '.join(names[unnamed][:2])} have the donor "
            f"{donors[unnamed].iloc[0]!r}, which programs write for no name: give every person one"
        )
    positions = table["positions"][~table["positions"].isin(NO_FILE)]
    for file, twins in names[positions.index].groupby(positions):
        if len(twins) > 1:
            inputs.warn(
                f"{path}: slides {' and '.join(twins)} have one file of positions, {file}: give "
                "each slide its own"
            )


def read_manifest_row(root, row, need_files):
    """A Slide from a row of slides.csv, a dict by column."""
    named = {column: find_named(root, row, column, need_files) for column in PATHS}
    slide, place = Slide(**row | named), f"{root / 'slides.csv'}: slide {row['tissue_index']}"
    if slide.image is None:
        raise InputError(f"{place} has no image")
    if slide.matrix is None:
        return slide
    if inputs.is_called(slide.matrix, ".zarr"):
        raise InputError(
            f"{slide.matrix}: a .zarr folder is not read: convert SpatialData with "
            "spatialdata_io.experimental.to_legacy_anndata and its write_h5ad, and name the .h5ad"
        )
    if slide.positions is None and is_anndata(slide.matrix):
        return replace(slide, positions=slide.matrix)  # It holds them in obsm["spatial"].
    if slide.positions is None:
        raise InputError(
            f"{place} has a matrix and no positions: name them, or leave the matrix out"
        )
    return slide


def spell_path(path):
    """The path, with the separators of Windows as well, as file systems may spell it.

    A Mac's disk has accents as characters of their own, and archives of Windows have bytes of
    Latin-1.
    """
    for spelling in (path, path.replace("\\", "/")):
        composed = unicodedata.normalize("NFC", spelling)
        yield from (spelling, composed, unicodedata.normalize("NFD", spelling))
        yield os.fsdecode(composed.encode("cp1252", "replace"))


def find_named(root, row, column, need_files):
    """The absolute path in a column of a row of slides.csv; None where the column is empty."""
    value, manifest = row[column], root / "slides.csv"
    if value in NO_FILE:
        return None
    found = (text for text in spell_path(value) if split_part(root / text)[0].exists())
    value = next(found, value.replace("\\", "/"))
    # Links are not followed: they may lead out of the data root, since the user made them.
    path = Path(os.path.abspath(root / value))  # noqa: PTH100
    if not path.is_relative_to(os.path.abspath(root)):  # noqa: PTH100
        raise InputError(
            f"{manifest}: {column} {value!r} lies outside {root}; "
            "copy or link it into the data root"
        )
    file, _ = split_part(path)
    usable = file.exists() if column == "matrix" else file.is_file()
    if need_files and not usable:
        cause = "is a folder, no file" if file.is_dir() else "does not exist"
        raise InputError(
            f"{manifest}: {column} {value!r} of slide {row['tissue_index']} {cause}: "
            "fetch it with 17_download_data.py or fix the path"
        )
    return path


def describe_slide(root, slide):
    """What meta.json says of a slide: its row of slides.csv, and its files."""
    described = {name_file(root, path): describe_file(path) for path in list_files(slide)}
    return describe_row(root, slide) | {"files": described}


def describe_row(root, slide):
    """{column of slides.csv: value} of a Slide, whose paths are relative to `root`."""
    named = {column: path and name_file(root, path) for column, path in slide.paths().items()}
    return asdict(slide) | named


def name_file(root, path):
    """What meta.json calls a file: its path in the data root, since folders may share names."""
    return Path(os.path.relpath(path, root)).as_posix()


def describe_file(path):
    """What meta.json says of a file, of which check_source compares size and `blocks`."""
    found = {"bytes": path.stat().st_size, "sha256": hashes.hash_file(path)}
    return found | {"blocks": hashes.hash_blocks(path)}


def list_files(slide):
    """The paths of the files that a slide is read from, if they exist; of a folder its parts."""
    paths = []
    for path in dict.fromkeys(split_part(path)[0] for path in slide.paths().values() if path):
        if path.is_dir():
            parts = [part for part in path.iterdir() if FOLDER_PART.fullmatch(part.name)]
            paths += sorted([*parts, path / "harmony_matrix.npy"])
        else:
            paths.append(path)
    return [path for path in paths if path.is_file()]


def note_files(paths):
    """{path: (bytes, time of change)} of files, for check_unchanged."""
    found = {path: path.stat() for path in paths}
    return {path: (status.st_size, status.st_mtime_ns) for path, status in found.items()}


def check_unchanged(noted):
    """InputError where a file is gone or no more as note_files found it."""
    for path, before in noted.items():
        if not path.is_file() or note_files([path])[path] != before:
            raise InputError(f"{path}: changed while it was read: run the same command again")


def check_sources(root, meta):
    """InputError where slides.csv, a file that it names, the file of a panel, or the folds or genes
    of a task of HEST-Benchmark, are no more as script 19 described them in meta.json.

    A file that is gone is not compared: the patches are there, and images take much disk. Of large
    files some blocks are compared, so that no start of a script waits. One that came into the
    folder of a matrix is refused: it may be read in place of another.
    """
    if not (root / "slides.csv").is_file():
        return
    manifest = read_manifest(root, need_files=False)
    then = {row["tissue_index"]: row for row in meta["slides"]}
    command = name_command(root, meta, without=MANIFEST_FLAGS)
    same_command = name_command(root, meta)
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
            described = row["files"].get(name_file(root, path))
            if described is None:
                raise InputError(
                    f"{path}: was not there when the dataset was made: run {same_command} again"
                )
            check_source(path, described, same_command)
    # Older datasets of this format say nothing of a task. The path of a panel is absolute.
    for name, described in (meta.get("task", {}) | meta.get("panel", {})).items():
        if (root / name).is_file():
            check_source(root / name, described, command)


def check_source(path, described, command):
    """InputError where a file is no more as a part of meta.json describes it, which the command of
    script 19 would make anew.
    """
    size = path.stat().st_size
    if size != described.get("bytes", size):
        raise InputError(
            f"{path}: {size:,} bytes, and {described['bytes']:,} when the dataset was made: run "
            f"{command} again"
        )
    if "blocks" in described and described["blocks"] != hashes.hash_blocks(path):
        raise InputError(
            f"{path}: its content is not as it was when the dataset was made: run {command} again"
        )


def name_command(root, meta, without=()):
    """The command of script 19 that made a dataset, by its meta.json, less the flags `without`."""
    words = ["python", "19_make_patches_and_csv.py", "--data-root", str(root)]
    for flag, value in meta["flags"].items():
        if flag not in without:
            words += [flag, value]
    return shlex.join(words)


def link_slides(root, slides, positions, name, flag):
    """Make links in a data root to the files of slides; returns the slides.csv that names them.

    Of `positions` those that are not None, tables as read_positions gives them, are written as
    files of this name in place of the slide's own. `flag` is what makes the slides.csv.
    """
    linked = []
    for slide, places in zip(slides, positions, strict=True):
        folder = Path("links", slide.name)
        names = {column: path and folder / path.name for column, path in slide.paths().items()}
        if places is not None:
            names["positions"] = folder / name
        linked.append(replace(slide, **names))
    table = pd.DataFrame([asdict(slide) for slide in linked])
    path, text = root / "slides.csv", table.to_csv(index=False)
    if path.exists() and inputs.decode_text(inputs.read_bytes(path)) != text:
        raise InputError(
            f"{path} is there already and names other slides: leave out {flag}, or remove it"
        )
    for slide, links, places in zip(slides, linked, positions, strict=True):
        place_file(root / links.image, slide.image)
        place_file(root / links.matrix, slide.matrix)
        if places is not None:
            files.save_csv(root / links.positions, places.reset_index())
        elif slide.positions is not None:
            place_file(root / links.positions, slide.positions)
    return table


def place_file(place, path):
    """Make a link to a path, in place of an older link, or a copy of a file that would go when the
    process ends.
    """
    if inputs.scratch_folder() in path.parents:
        with files.whole_file(place) as partial:
            shutil.copyfile(path, partial)
        return
    if place.exists() and not place.is_symlink():
        raise InputError(f"{place} is no link: move it away")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(path.resolve())
