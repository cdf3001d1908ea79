"""Embeddings of patches that others' models have made: files to arrays, and ridges on them.

A file is an .h5 a slide, as HEST-Benchmark writes it (`embeddings` and `barcodes`; embed_tiles in
src/hest/bench/benchmark.py of mahmoodlab/HEST) or TRIDENT (`features` and `coords`, the top left of
each patch in px of the whole image, whose attribute patch_size_level0 is its side; WSI.py and IO.py
of mahmoodlab/TRIDENT).

Shapes: n spots, m embeddings in a file, D numbers an embedding.
"""

import functools
import numbers
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

import common
from slides import inputs
from study import hashes, methods, probes, ridges
from study.errors import InputError

VALUES = ("embeddings", "features")  # what the dataset of the embeddings is called
BARCODES = ("barcodes", "barcode")
HOW_TO = "docs/running.md shows how to embed the patches of script 19"
NAMED = 3  # slides that a message names at most
OTHER_SIDE = 0.1  # share by which patches may be larger or smaller than others on the tissue


# -------------------------------------------------------------------------------------------- files
class Embeddings(NamedTuple):
    """What a file holds; either barcodes or centres tell whose the embeddings are."""

    values: np.ndarray  # (m, D) float32
    barcodes: pd.Index | None = None  # (m,) of the spots
    centres: np.ndarray | None = None  # (m, 2) x and y of the patches, in px of the slide
    side: float = 0.0  # of the patches with centres, in px of the slide
    slide: str = ""  # the name of the image that TRIDENT has embedded, without its ending


def read_embeddings(path):
    """The Embeddings of an .h5. InputError where it is none, or its parts do not fit together."""
    try:
        with h5py.File(path) as file:
            values = read_values(path, find_values(path, file, VALUES))
            barcodes = find_values(path, file, BARCODES, needed=False)
            if barcodes is not None:
                return Embeddings(values, read_embedded_barcodes(path, barcodes, len(values)))
            coords = find_values(path, file, ("coords",), needed=False)
            if coords is None:
                raise InputError(
                    f"{path}: holds {', '.join(file)}; expected barcodes or coords, which tell "
                    f"the spots: {HOW_TO}"
                )
            return Embeddings(values, None, *read_patch_centres(path, coords, len(values)))
    except (OSError, RuntimeError, UnicodeDecodeError) as error:  # of h5py, whatever is damaged
        raise InputError(f"{path}: not a whole .h5 ({error}): make it again") from None


def find_values(path, file, names, needed=True):
    """The dataset of an open file that has one of the names; None where none is nor is needed."""
    held = [name for name in names if isinstance(file.get(name), h5py.Dataset)]
    if len(held) == 1:
        return file[held[0]]
    if held or needed:
        raise InputError(
            f"{path}: holds {', '.join(file) or 'nothing'}; expected one of {', '.join(names)}: "
            f"{HOW_TO}"
        )
    return None


def read_whole(dataset):
    """All of a dataset, without the batch of one slide that may stand before the patches."""
    array = dataset[()]
    return array[0] if array.ndim == 3 and len(array) == 1 else array


def read_values(path, dataset):
    """(m, D) float32 of a dataset of numbers of any precision."""
    values = read_whole(dataset)
    name = dataset.name.strip("/")
    if values.dtype.kind not in "fiu" or values.ndim != 2 or not values.size:
        raise InputError(
            f"{path}: {name} are {values.dtype} of shape {values.shape}; expected numbers of "
            "shape (patches, width): an embedding a patch, and not one a slide"
        )
    with np.errstate(over="ignore"):  # What is too large becomes infinite, which is told later.
        return values.astype(np.float32)


def read_embedded_barcodes(path, dataset, count):
    """(m,) texts of a dataset of `count` of them, of shape (m,) or (m, 1)."""
    if h5py.check_string_dtype(dataset.dtype) is None:
        raise InputError(f"{path}: {dataset.name.strip('/')} are {dataset.dtype}; expected texts")
    barcodes = pd.Index(np.ravel(dataset.asstr()[()]))
    if len(barcodes) != count:
        raise InputError(f"{path}: {count} embeddings and {len(barcodes)} barcodes; one each")
    inputs.check_unique(barcodes, "barcode", path)
    return barcodes


def read_patch_centres(path, dataset, count):
    """((m, 2) centres in px, side in px, name of the slide) of TRIDENT's coords."""
    corners, side = read_whole(dataset), dataset.attrs.get("patch_size_level0")
    if corners.shape != (count, 2) or corners.dtype.kind not in "fiu":
        raise InputError(
            f"{path}: coords are {corners.dtype} of shape {corners.shape}; expected numbers of "
            f"shape ({count}, 2), as there are embeddings"
        )
    if not isinstance(side, numbers.Real) or not side > 0:
        raise InputError(
            f"{path}: patch_size_level0 of coords is {side}; expected the side of a patch in px, "
            "as TRIDENT writes it: add it, or barcodes"
        )
    return corners + side / 2, float(side), str(dataset.attrs.get("name", ""))


def match_spots(path, embeddings, spots):
    """(n,) the number of the embedding of each spot of a table; -1 where there is none.

    By barcode, or as that of the nearest patch in which the spot's centre lies. InputError where
    two patches are as near to a spot, or one is the nearest to two spots.
    """
    if embeddings.barcodes is not None:
        return embeddings.barcodes.get_indexer(spots["barcode"])
    places = spots[["pxl_col", "pxl_row"]].to_numpy(np.float64)
    distances, nearest = cKDTree(embeddings.centres).query(places, k=2)
    first = nearest[:, 0]
    inside = np.abs(places - embeddings.centres[first]).max(axis=1) <= embeddings.side / 2
    found = np.where(inside, first, -1)
    barcodes = spots["barcode"].to_numpy()
    tied = inside & (distances[:, 0] == distances[:, 1])
    if tied.any():
        raise InputError(f"{path}: two patches are as near to spot {barcodes[tied][0]}: keep one")
    shared = inside & pd.Series(found).duplicated(keep=False).to_numpy()
    if shared.any():
        raise InputError(
            f"{path}: patches are nearest to several spots, as to {barcodes[shared][0]}, so they "
            f"lie farther apart than spots: embed a patch around each spot; {HOW_TO}"
        )
    return found


def pick_embeddings(path, embeddings, slide, spots):
    """(n, D) float32 of a file's Embeddings, those of the spots of a table; NaN for a spot without.
    InputError where an embedding itself holds NaN or infinity.
    """
    bad = ~np.isfinite(embeddings.values).all(axis=1)
    if bad.any():
        raise InputError(
            f"{path}: {bad.sum()} of {len(bad)} embeddings of slide {slide} hold NaN or infinity: "
            "embed it again, in float32 if it was in half precision"
        )
    found = match_spots(path, embeddings, spots)
    values = embeddings.values[found]
    values[found < 0] = np.nan
    return values


def find_patch_centres(path):
    """A file's patches, as read_positions gives spots. InputError where it holds barcodes."""
    embeddings = read_embeddings(path)
    if embeddings.centres is None:
        raise InputError(f"{path}: holds barcodes: give the --positions of its spots")
    centres = np.rint(embeddings.centres).astype(np.int64)
    columns, rows = (np.unique(axis, return_inverse=True)[1] for axis in centres.T)
    table = pd.DataFrame({"in_tissue": 1, "array_row": rows, "array_col": columns})
    table[["pxl_col", "pxl_row"]] = centres
    barcodes = [f"{column}x{row}" for column, row in centres]
    inputs.check_unique(barcodes, "patch", path)
    return table.set_index(pd.Index(barcodes, name="barcode"))


# ------------------------------------------------------------------------------------------- models
@dataclass(frozen=True)
class Model:
    """One model's embeddings of a run's slides, of one width and of patches of one size."""

    name: str  # of its folder
    files: dict  # {tissue_index: path}
    width: int  # D
    side_um: float = 0.0  # of a patch; 0 where its files do not tell

    @property
    def constants(self):
        """{name: value} of what its rows follow from: the files' content, not where they lie."""
        held = {str(slide): hashes.identify_file(path) for slide, path in self.files.items()}
        constants = {"METHOD": "ridge", "BACKBONE": self.name, "WIDTH": self.width}
        if self.side_um:
            constants["SIDE_UM"] = self.side_um
        return constants | {"EMBEDDINGS": held}

    def read(self, spots):
        """(N, D) float32 embeddings of a run's spots; NaN on slides that take no part."""
        slides = spots["tissue_index"].to_numpy()
        values = np.full((len(slides), self.width), np.nan, np.float32)
        for slide, path in self.files.items():
            held = read_embeddings(path)
            values[slides == slide] = pick_embeddings(path, held, slide, spots[slides == slide])
        return values


def open_models(folder, data, splits, backbones):
    """The Models of a folder: itself where it holds .h5 files, else each folder in it that does.

    InputError, before any training, where a spot of a slide that takes part has no embedding,
    widths differ, or a folder is called as one of the `backbones`, which have rows of their own.
    """
    folder = Path(folder)
    inside = sorted(folder.glob("[!.]*"))
    folders = [folder] if holds_files(folder) else filter(holds_files, inside)
    slides = np.unique(np.concatenate([split.slides(*common.ROLES) for split in splits]))
    names = data.slide_names
    names = {int(slide): names[slide] for slide in slides}
    um_per_px = {slide["tissue_index"]: slide["um_per_px"] for slide in data.meta["slides"]}
    models = [open_model(path, names, data.spots, um_per_px) for path in folders]
    for model in models:
        if model.name in ("colour", *backbones):
            raise InputError(
                f"--features {folder}: ridge ({model.name}) is another row: rename the folder"
            )
    if not models:
        raise InputError(
            f"--features {folder}: no folder of .h5 files, nor of such folders: {HOW_TO}"
        )
    return models


def holds_files(folder):
    """Whether a path is a folder of files of embeddings."""
    return folder.is_dir() and any(folder.glob("[!.]*.h5"))


def find_files(folder, names):
    """{tissue_index: path}: <name>.h5 where one is called so, else <tissue_index>.h5 for all."""
    by_name = {slide: folder / f"{name}.h5" for slide, name in names.items()}
    if any(path.is_file() for path in by_name.values()):
        return by_name
    return {slide: folder / f"{slide}.h5" for slide in names}


def open_model(folder, names, spots, um_per_px):
    """The Model of a folder for slides {tissue_index: name}; `um_per_px` is by slide, too."""
    files = find_files(folder, names)
    lacking, widths, sides = [], {}, {}
    for slide, path in files.items():
        if not path.is_file():
            lacking.append(f"{names[slide]} has no {path.name}")
            continue
        held = read_embeddings(path)
        if held.slide in {*names.values()} - {names[slide]}:
            raise InputError(
                f"{path}: by its coords it is of slide {held.slide}, and not of {names[slide]}"
            )
        if held.side:  # Files with barcodes do not tell it.
            sides[names[slide]] = held.side * um_per_px[slide]
        here = spots[spots["tissue_index"] == slide]
        values = pick_embeddings(path, held, names[slide], here)
        widths[names[slide]] = values.shape[1]
        missing = here["barcode"][np.isnan(values[:, 0])]
        if len(missing):
            lacking.append(
                f"{names[slide]} lacks {len(missing)} of {len(here)} spots, as {missing.iloc[0]}"
            )
    if lacking:
        further = f" and {len(lacking) - NAMED} more slides" if len(lacking) > NAMED else ""
        raise InputError(
            f"{folder}: slide {'; slide '.join(lacking[:NAMED])}{further}: rows are compared on "
            "the same spots, so each needs an embedding, in <name>.h5 or <tissue_index>.h5; "
            f"{HOW_TO}"
        )
    if len({*widths.values()}) > 1:
        found = ", ".join(f"{width} of {name}" for name, width in widths.items())
        raise InputError(f"{folder}: widths of embeddings differ: {found}: are they of one model?")
    side_um = 0.0
    if sides:
        side_um = round(float(np.mean([*sides.values()])), 1)
        if max(sides.values()) > (1 + OTHER_SIDE) * min(sides.values()):
            found = ", ".join(f"{side:.0f} um of {name}" for name, side in sides.items())
            raise InputError(f"{folder}: patches are of several sizes: {found}: embed all alike")
    return Model(folder.resolve().name, files, widths[names[slide]], side_um)


def check_embedded_slide(path, held, names, side_um, um_per_px):
    """Warn where the Embeddings `held` by the file of a slide of these `names` are of another
    image; InputError where their patches are of another size than the `side_um` of those that a
    model has learnt from.
    """
    if held.slide and held.slide not in names:
        inputs.warn(f"{path}: by its coords it is of {held.slide}, and not of {names[0]}")
    side = held.side * um_per_px
    if side and side_um and abs(side / side_um - 1) > OTHER_SIDE:
        raise InputError(
            f"{path}: its patches are {side:.0f} um wide, and the model has learnt from patches of "
            f"{side_um:.0f} um: embed the slide as those"
        )


# --------------------------------------------------------------------------------------------- rows
def settings_of(models, baseline):
    """{setting: (its constants, its method)} of the models beside the constants `baseline`."""
    found = {}
    for model in models:
        recipe = baseline | model.constants
        found[f"ridge ({model.name})"] = recipe, functools.partial(ridge_on, model)
        if baseline["PROTOCOL"] == "hest":
            for probe, changed in probes.name_probes(model.name).items():
                found[probe] = recipe | changed, functools.partial(probe_on, model)
    return found


def ridge_on(model, row):
    """A method, given a Model: the ridge on its embeddings, whose coefficients are kept."""
    spots = row.split.data.spots
    embedded = model.read(spots)
    if row.recipe["NEIGHBOURHOOD"]:
        embedded = common.blend_neighbourhood(embedded, spots)
    row.model, shrinkage = methods.learn_ridge(row.split, embedded, row.split.spots("train"))
    row.note(weights=f"{model.name}, {model.width}", **shrinkage._asdict())
    return row.model.predict(embedded[row.split.scored()])


def probe_on(model, row):
    """A method, given a Model: the probe of HEST-Benchmark on its embeddings."""
    row.note(weights=f"{model.name}, {model.width}")
    return probes.predict_by_probe(row, model.read(row.split.data.spots))


# ------------------------------------------------------------------------------------------ weights
def is_ridge(recipe):
    """Whether the recipe in weights.safetensors is of a ridge on embeddings."""
    return isinstance(recipe, dict) and "EMBEDDINGS" in recipe


def build_ridge(state, recipe, n_genes):
    """The Ridge of tensors {name: tensor}. KeyError or ValueError where they do not fit."""
    weight, bias = state["weight"].numpy(), state["bias"].numpy()
    if weight.shape != (recipe["WIDTH"], n_genes) or bias.shape != (n_genes,):
        raise ValueError(f"coefficients {weight.shape}, intercept {bias.shape}")
    return ridges.Ridge(weight, bias)
