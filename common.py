"""Everything that two scripts share, in the order in which the data flows:
conventions -> run set-up -> dataset -> augmentation -> model -> training -> prediction -> correlation -> reporting

Shapes: N spots, G genes, B patches of a batch, S px a side. A `recipe` is the plain dict of a script's constants.
"""

import argparse
import ctypes
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import os
import pickle
import platform
import re
import resource
import runpy
import signal
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import polars
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.spatial import cKDTree
from scipy.stats import rankdata
from sklearn.linear_model import Ridge
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

# ------------------------------------------------------------------------------------------- conventions
FORMAT = 3  # of 19's files, rows and weights; raised when one of them changes, so that what is older is made again
PATCH_SIZE = 224  # px of the slide; 68 um at GSE240429's 0.304 um/px
GROUP_SIZE = 50  # genes of the groups HEG and HVG
GROUPS = ("HEG", "HVG", "MG")
MARKER_GENES = ("HAL", "CYP3A4", "VWF", "SOX9", "KRT7", "ANXA4", "ACTA2", "DCN")
ID_COLUMNS = ["id", "tissue_index", "barcode", "array_row", "array_col", "pxl_row", "pxl_col"]
SPOT_FACTS = ["donor", "pitch", "block"]  # further columns of script 19
FACTS = ("ceiling", "image_ceiling", "moran")  # of a gene on a slide, by script 19 (image_ceiling: simulated slides)
POSITION_COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row", "pxl_col"]
SPLITS = ("oof", "valid", "test")  # roles whose spots are scored; oof = out of fold
R_THRESHOLD = 0.30  # the paper counts the genes above it
FOLDS = 5  # of PROTOCOL block
MARGIN = 2  # pitches; under block, training spots this near to a validation spot take no part
DRAWS = 1000  # of the bootstrap
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun's processes
PREDICT_BATCH = {"cpu": 16, "cuda": 256}  # what was fastest; on a processor the caches decide

# What a constant may be: one of these values, or the least and the greatest number.
ALLOWED = {
    "TARGET": ("harmony", "lognorm"), "PROTOCOL": ("paper", "loso", "block"), "AUG": ("mpa", "stnet", "none"),
    "DEVICE": ("auto", "cpu", "cuda"), "PRECISION": ("auto", "bf16", "fp16", "fp32"),
    "DATASET": ("GSE240429", "HER2ST"), "IMAGE_SIZE": (32, 4096), "HIDDEN": (0, 10**6), "TRAINABLE_STAGES": (-1, 1000),
    **dict.fromkeys(("VALID_FRACTION", "LEARNING_RATE", "MIN_CLUSTER"), (0, 1)), "DISPERSION": (0, 100),
    **dict.fromkeys(("SPOTS", "FOLDS", "BATCH_SIZE", "BLEEP_BATCH", "NEIGHBOURS"), (2, 10**6)), "MICRO_BATCH": (3, 999),
    **dict.fromkeys(("EPOCHS", "STNET_EPOCHS", "BLEEP_EPOCHS", "HVG_PER_SLIDE", "EMBEDDING", "DEPTH"), (1, 10**6)),
    "SLIDES": (1, 1000), "UM_PER_PX": (0, 20), "VIEWS": (0, 1000),
}  # fmt: skip


class InputError(Exception):
    """The user's input is at fault. Its one line names the file or value, what was expected and the fix."""


def require(condition, message):
    """InputError with the message unless the condition holds."""
    if not condition:
        raise InputError(message)


@contextmanager
def whole_file(path):
    """Give a temporary path beside `path`; rename it to `path` on success, remove it otherwise. What a kill leaves is
    overwritten the next time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{RANK}-{path.name}")  # keeps the suffix, which writers look at
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save_csv(path, table):
    """Write the table, without its index, whole or not at all."""
    with whole_file(path) as partial:
        table.to_csv(partial, index=False)


def hold_folder(folder):
    """Keep other processes, but torchrun's of the same run, out of a folder until this process ends."""
    if RANK:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(
            folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644
        )  # left open: closed, the lock is given back
    except OSError as error:
        require(error.errno == errno.ENOSPC, f"{folder}: no folder to write to ({error.strerror}): choose another one")
        raise
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        busy = f"{folder}: another process is writing there: wait until it ends, or choose another folder"
        raise InputError(busy) from None


def save_figure(path, figure, description):
    """Write a figure whole, with the text that stands for it where it cannot be seen."""
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=100, metadata={"Description": description})


def reserve_disk(path):
    """Take the space of a sparse file now: to be written through memory, a full disk would kill the process."""
    with open(path, "rb+") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def seed_of(*words):
    """A seed that depends on the words alone, as seed_of(42, "epoch", 3): what ran before does not matter."""
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:8], "little") >> 1


# ------------------------------------------------------------------------------------------- run set-up
def recipe_of(script):
    """{name: value} of the constants in a script's ruled block as they stand now; a run is saved with them."""
    return {name: script[name] for name in _constant_comments(script)}


def _constant_comments(script):
    block = re.split(r"^# -{20,}.*$", Path(script["__file__"]).read_text(), flags=re.MULTILINE)[1]
    return dict(re.findall(r"^([A-Z][A-Z0-9_]*) = .*?(?:  # (.*))?$", block, flags=re.MULTILINE))


def _parse_constant(default, text):
    """The command line's text as a value of the default's type; an empty tuple takes whole numbers."""
    if isinstance(default, tuple):
        return tuple(type((*default, 0)[0])(part) for part in text.split(",") if part)
    return bool(("false", "true").index(text.lower())) if isinstance(default, bool) else type(default)(text)


def override_constants(script, argv):
    """Set a script's constants from the command line, `--quick`'s QUICK_BUDGET first. Prints what changed."""
    raw = argparse.RawDescriptionHelpFormatter  # keeps the docstring's lines
    parser = argparse.ArgumentParser(description=script["__doc__"], formatter_class=raw, allow_abbrev=False)
    parser.error = lambda message: require(False, f"{message}; --help lists this script's constants")
    flag = lambda name: "--" + name.lower().replace("_", "-")  # noqa: E731
    for name, comment in _constant_comments(script).items():
        value, kind = script[name], functools.partial(_parse_constant, script[name])
        kind.__name__ = type(value).__name__  # for the message
        shown = f"{comment} [{','.join(map(str, value)) if isinstance(value, tuple) else value}]".replace("%", "%%")
        bare = {"nargs": "?", "const": True} if isinstance(value, bool) else {}
        parser.add_argument(flag(name), dest=name, type=kind, metavar="", help=shown, **bare)
    values = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    if values.get("QUICK", script.get("QUICK", False)):
        values = script["QUICK_BUDGET"] | values
    print(*(f"{name} = {value!r}\n" for name, value in values.items() if value != script[name]), sep="", end="")
    script.update(values)
    for name in script.keys() & ALLOWED.keys():
        value, allowed = script[name], ALLOWED[name]
        words = isinstance(allowed[0], str)
        expected = f"one of {', '.join(allowed)}" if words else f"a number from {allowed[0]} to {allowed[1]}"
        fits = value in allowed if words else allowed[0] <= value <= allowed[1]
        require(fits, f"{flag(name)} {value}: expected {expected}")


def run_script(script):
    """Apply the command line to a script's globals and call its main(). Ends the process with 2 on an InputError, a
    full disk or the loss of another process of torchrun's, of which the first one prints.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # of torchrun and batch systems: as Ctrl-C
    try:
        with redirect_stdout(open(os.devnull, "w") if RANK else sys.stdout):
            override_constants(script, sys.argv[1:])
            script["main"]()
    except InputError as error:
        print("error:", *str(error).split(), file=sys.stderr)  # one line, whatever a library's message held
        sys.exit(2)
    except Exception as error:
        first = error  # torch and HDF5 raise others on top of the disk's own
        while first.__context__ is not None:
            first = first.__context__
        if isinstance(first, OSError) and os.strerror(errno.ENOSPC) in str(first):
            reason = "no space left on the disk: free some and"
        elif isinstance(first, dist.DistError) or "gloo/" in str(first):  # gloo's own are plain RuntimeErrors
            reason = f"another process of this run ended ({str(first).splitlines()[0]}):"
        else:
            raise
        print(f"error: {reason} run the same command again", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: run the same command again", file=sys.stderr)
        sys.exit(130)


def choose_device(recipe):
    """(torch.device, autocast dtype, reason) from DEVICE, PRECISION and IMAGE_SIZE."""
    cuda = torch.cuda.is_available() and recipe["DEVICE"] != "cpu"
    require(cuda or recipe["DEVICE"] != "cuda", "--device cuda: torch sees no CUDA device; use --device cpu")
    has_bf16 = torch.cuda.is_bf16_supported(False) if cuda else torch.cpu._is_avx512_bf16_supported()
    choice, reason = ("fp16", "no bf16; with a loss scaler") if cuda else ("fp32", "the processor lacks bf16")
    if recipe["PRECISION"] != "auto":
        choice, reason = recipe["PRECISION"], "as asked"
    elif has_bf16 and not cuda and recipe.get("IMAGE_SIZE", PATCH_SIZE) < 160:
        choice, reason = "fp32", "on processors as fast as bf16 below 160 px"
    elif has_bf16:
        choice, reason = "bf16", "the device has it"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[choice]
    place = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count() if cuda else None
    return torch.device("cuda" if cuda else "cpu", place), dtype, reason


def call_script(name, *flags):
    """Run another numbered script in this process, its command printed first. What it refuses ends this one as well."""
    print("$ python", name, *flags, flush=True)
    path, before = str(Path(__file__).with_name(name)), sys.argv
    sys.argv = [path, *flags]
    try:
        runpy.run_path(path, run_name="__main__")
    finally:
        sys.argv = before


def open_run(script, split=None):
    """(recipe, one Experiment a training); `--quick` has its slides made where missing. `split` as split_spots."""
    recipe, root = recipe_of(script), Path(script["DATA_ROOT"])
    require(recipe["SEEDS"], "--seeds: expected one number at least")
    while RANK and not (root / "dataset" / "meta.json").exists() and recipe["QUICK"]:
        time.sleep(0.2)  # the first process makes them
    if recipe["QUICK"] and str(root) == script["QUICK_BUDGET"]["DATA_ROOT"]:
        if not (root / "slides.csv").exists():
            call_script("18_simulate_slides.py", "--data-root", str(root))
        if not (root / "dataset" / "meta.json").exists():
            call_script("19_make_patches_and_csv.py", "--data-root", str(root), "--target", recipe["TARGET"])
    out = Path(recipe["OUT"] or Path("runs", Path(script["__file__"]).stem, root.resolve().name))
    data, paper, experiments = load_dataset(root, recipe["TARGET"]), recipe["PROTOCOL"] == "paper", []
    clean = f"--protocol {recipe['PROTOCOL']} needs --target lognorm: Harmony has seen the test slide"
    require(paper or recipe["TARGET"] == "lognorm", clean)
    for seed in recipe["SEEDS"]:
        for fold, roles in enumerate((split or split_spots)(data.spots, recipe, seed)):
            train = roles == "train"
            own = data if paper else restrict_panel(data, tuple(np.unique(data.spots["tissue_index"][train])))
            experiments.append(Experiment(own, roles, choose_gene_groups(own, train, paper), out, seed, fold))
    hold_folder(out)
    return recipe, experiments


# ------------------------------------------------------------------------------------------- dataset
@dataclass(frozen=True, eq=False)  # hashed by identity, for restrict_panel
class SpotData:
    """The spots of a data root; row i of every member is the same spot."""

    root: Path
    patches: torch.Tensor  # (N, 224, 224, 3) uint8 RGB, memory-mapped
    spots: pd.DataFrame  # N rows, ID_COLUMNS and SPOT_FACTS: pitch in px, block a square five pitches wide
    genes: list  # G names: the panel
    target: np.ndarray  # (N, G) float32, what is trained on: Harmony or log-normalised
    lognorm: np.ndarray  # (N, G) float32, log-normalised counts
    counts: anndata.AnnData  # N x G raw counts; obs n_counts; obsm colour (N, 40); var ceilings and Moran's I by slide
    meta: dict  # meta.json of script 19
    fingerprint: str  # of meta.json, which holds hashes of the sources
    title: str  # begins the header, tables and figures of a run on simulated slides


def log_normalise(counts, totals):
    """log1p of counts scaled to 10,000 a spot: (N, G) counts, (N,) totals over ALL genes -> (N, G) float32."""
    scale, result = 1e4 / np.maximum(np.asarray(totals, np.float64), 1), np.empty(counts.shape, np.float32)
    for start in range(0, len(scale), 1024):  # in float64, of which all rows at once would take four times the memory
        part = counts[(rows := slice(start, start + 1024))]
        dense = part.toarray() if hasattr(part, "toarray") else np.asarray(part)
        result[rows] = np.log1p(dense * scale[rows, None])
    return result


def load_dataset(data_root, target):
    """Read what script 19 wrote. Raises InputError with 19's command where it is missing or made otherwise."""
    root, folder = Path(data_root), Path(data_root) / "dataset"
    command = f"python 19_make_patches_and_csv.py --data-root {data_root}"
    require((folder / "meta.json").is_file(), f"no meta.json in {folder}: run {command} first")
    try:
        meta = json.loads(meta_text := (folder / "meta.json").read_bytes())
        require(meta["format"] == FORMAT, f"{folder} was made by another version: run {command} again")
        require(
            meta["target"], f"{folder} holds patches alone: its slides.csv names no matrix, so nothing can be learnt"
        )
        made = meta["target"] == "harmony" or target == "lognorm"
        require(made, f"{folder} was made with target {meta['target']}: run {command} --target harmony first")
        counts = anndata.read_h5ad(folder / "counts.h5ad")
        genes, spots = counts.var_names.tolist(), counts.obs.reset_index(names="id")[ID_COLUMNS + SPOT_FACTS]
        trained_on = lognorm = log_normalise(counts.X, counts.obs["n_counts"])
        if target == "harmony":
            table = polars.scan_csv(folder / "dataset.csv", schema_overrides=dict.fromkeys(genes, polars.Float32))
            whole = table.collect_schema().names() == ID_COLUMNS + genes
            require(whole, f"{folder / 'dataset.csv'}: its genes are not those of counts.h5ad: run {command} again")
            trained_on = table.select(genes).collect().to_numpy()
        patches = np.load(folder / "patches.npy", mmap_mode="c", allow_pickle=False)  # "c": torch wants it writable
        require(len(patches) == len(counts) == len(trained_on), f"{folder}: not of one piece: run {command} again")
    except (OSError, ValueError, LookupError, TypeError, polars.exceptions.PolarsError) as error:
        raise InputError(f"{folder} is damaged ({error}): run {command} again") from None
    fingerprint, title = hashlib.sha256(meta_text).hexdigest()[:16], "SIMULATED slides: " * meta["simulated"]
    tables = spots, genes, trained_on, lognorm, counts
    return SpotData(root, torch.from_numpy(patches), *tables, meta, fingerprint, title)


def save_expression(path, spots, values, genes):
    """A CSV as dataset.csv is: ID_COLUMNS of the spots, then (n, G) values, a column a gene; by polars, which takes a
    second where pandas takes half a minute.
    """
    with whole_file(path) as partial, open(partial, "wb") as file:
        for start in range(0, len(spots), 1024):  # all rows at once would be held twice
            part = spots.iloc[start : start + 1024]
            columns = polars.DataFrame({name: part[name].to_list() for name in ID_COLUMNS})
            columns = columns.hstack(polars.from_numpy(values[start : start + 1024], genes))
            columns.write_csv(file, include_header=start == 0, batch_size=128)


def split_spots(spots, recipe, seed):
    """The trainings of PROTOCOL, an array (N,) each: "train", one of SPLITS, or "" for a spot that takes no part.
    paper: VALID_FRACTION of the training slides' spots validate. block: a fifth of their blocks in turn. Both test on
    TEST_SLIDE. loso: each slide (of TRAIN_SLIDES, if any) is once the test slide, the next one validates; all slides
    of the test slide's donor are left out, unless there is no other donor.
    """
    slide, donor, protocol = spots["tissue_index"].to_numpy(), spots["donor"].to_numpy(), recipe["PROTOCOL"]
    tests = () if protocol == "loso" else (recipe["TEST_SLIDE"],)
    train = recipe["TRAIN_SLIDES"] or tuple(np.setdiff1d(slide, tests))
    for s in (*train, *tests):
        require(s in set(slide), f"slide {s} is not in the dataset: it holds slides {np.unique(slide)}")
    both = f"slide {recipe['TEST_SLIDE']} is both in TRAIN_SLIDES and TEST_SLIDE: choose another one"
    require(not {*tests} & {*train}, both)
    pool, trainings = np.flatnonzero(np.isin(slide, train)), []
    if protocol == "block":
        trainings = split_folds(spots, pool, protocol, FOLDS, seed)
    elif protocol == "paper":
        n_valid = round(recipe["VALID_FRACTION"] * len(pool))
        few = f"--valid-fraction {recipe['VALID_FRACTION']} of {len(pool)} spots leaves validation or training none"
        require(0 < n_valid < len(pool) - 1, few)
        order, roles = np.random.default_rng(seed_of(seed, "split")).permutation(pool), np.full(len(slide), "", "U5")
        roles[order[:n_valid]], roles[order[n_valid:]] = "valid", "train"
        trainings = [roles]
    for s in sorted(train) if protocol == "loso" else ():
        others = [o for o in train if set(donor[slide == o]) != set(donor[slide == s])] or [o for o in train if o != s]
        require(len(others) > 1, f"--protocol loso: slide {s} has {len(others)} slides to learn from; two are needed")
        parts = slide == s, slide == min(others, key=lambda o: (o < s, o)), np.isin(slide, others)
        trainings.append(np.select(parts, ("test", "valid", "train"), ""))
    return [np.where(np.isin(slide, tests), "test", roles) for roles in trainings]


def split_folds(spots, pool, protocol, folds, seed):
    """`folds` arrays (N,) of roles: of the rows `pool`, another share is "valid" each time and the rest "train". paper
    draws spots, loso takes a slide in turn, block draws blocks and leaves out ("") what lies within MARGIN of "valid".
    """
    column = {"paper": "id", "loso": "tissue_index", "block": "block"}[protocol]
    units = pd.factorize(spots[column].iloc[pool], sort=protocol != "paper")[0]
    sizes = np.bincount(units)
    order = np.random.default_rng(seed_of(seed, "folds")).permutation(len(sizes))
    drawn_before = np.empty(len(sizes), np.int64)
    drawn_before[order] = np.cumsum(sizes[order]) - sizes[order]
    fold_of = units if protocol == "loso" else drawn_before[units] * folds // len(pool)
    places = spots[["pxl_col", "pxl_row"]].div(spots["pitch"], axis=0)
    places = places.assign(slide=spots["tissue_index"] * 1e9).to_numpy()  # slides far apart
    trainings = []
    for fold in range(folds):
        roles = np.full(len(spots), "", "U5")
        valid, train = pool[fold_of == fold], pool[fold_of != fold]
        if protocol == "block" and len(valid):
            train = train[cKDTree(places[valid]).query(places[train])[0] > MARGIN + 0.1]  # not exactly on the grid
        few = f"fold {fold} of {folds}: {len(pool)} spots are too few; take fewer folds"
        require(len(valid) and len(train) > 1, few)
        roles[valid], roles[train] = "valid", "train"
        trainings.append(roles)
    return trainings


@functools.cache
def restrict_panel(data, slides):
    """The data with the panel that 19 would have chosen on these slides alone."""
    kept = data.counts.var[["MG", *(f"hvg_{slide}" for slide in slides)]].any(axis=1).to_numpy()
    counts, lognorm = data.counts[:, kept].copy(), data.lognorm[:, kept]
    genes = counts.var_names.tolist()
    return replace(data, genes=genes, counts=counts, lognorm=lognorm, target=lognorm)


def choose_gene_groups(data, spots, published):
    """Table group, gene, rank, attrs["source"]: the data root's gene_sets.csv if `published` may be used, else HEG and
    HVG are the 50 genes of the panel with the highest mean and variance of log-normalised expression over `spots`.
    """
    path, source = data.root / "gene_sets.csv", "training spots"
    ranked = {"HEG": data.lognorm[spots].mean(0, np.float64), "HVG": data.lognorm[spots].var(0, np.float64)}
    lists = {k: [data.genes[g] for g in np.argsort(-v, kind="stable")[:GROUP_SIZE]] for k, v in ranked.items()}
    table = pd.Series(lists | {"MG": MARKER_GENES}).explode().rename_axis("group").reset_index(name="gene")
    if published and path.is_file():
        table, source = pd.DataFrame({"group": ["unread"]}), path.name
        with suppress(ValueError, KeyError):
            table = pd.read_csv(path)[["group", "gene"]].dropna()
        known = set(table["group"]) <= set(GROUPS)
        require(known, f"{path}: expected the columns group, gene and the groups {', '.join(GROUPS)}")
    table["rank"] = table.groupby("group").cumcount() + 1
    table.attrs["source"] = source
    return table


class MappedPatches:
    """SpotData's patches as they lie on disk: [rows] reads them, (B, 3, size, size) uint8, channels last."""

    device = torch.device("cpu")

    def __init__(self, patches, size):
        self.patches, self.size = patches, size

    def __len__(self):
        return len(self.patches)

    def __getitem__(self, rows):
        images = self.patches[rows].permute(0, 3, 1, 2)
        if self.size != PATCH_SIZE:  # each time anew: 0.04 ms a patch, and memory does not grow with their number
            images = F.interpolate(images, size=(self.size, self.size), mode="bilinear", antialias=True)
        return images


@functools.lru_cache(maxsize=1)  # the trainings of a run share one copy
def place_patches(patches, size, device):
    """SpotData's patches for [rows]: on a GPU, if half of its free memory holds them; else MappedPatches."""
    mapped, shape = MappedPatches(patches, size), (len(patches), 3, size, size)
    if device.type != "cuda" or np.prod(shape) > 0.5 * torch.cuda.mem_get_info(device)[0]:
        return mapped
    resident = torch.empty(shape, dtype=torch.uint8, device=device, memory_format=torch.channels_last)
    for rows in torch.arange(len(patches)).split(1024):
        resident[rows[0] : rows[-1] + 1] = mapped[rows].to(device)
    return resident


def read_ahead(patches, batches, device):
    """Yield patches[rows] on the device for each of the batches; while one is used, a thread reads the next two."""

    def read(rows):
        images = patches[rows.to(patches.device, non_blocking=True)]
        return images.pin_memory() if images.device.type != device.type else images

    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as thread:  # cores are for the network
        waiting = deque(thread.submit(read, rows) for rows in batches[:2])
        for rows in [*batches[2:], None, None][: len(batches)]:
            images = waiting.popleft().result()
            if rows is not None:
                waiting.append(thread.submit(read, rows))
            yield images.to(device, non_blocking=True)


# ------------------------------------------------------------------------------------------- augmentation
def draw_augmentation(n, preset, generator):
    """Parameters for n patches, on the CPU: symmetry (n, 3) bool (flip left-right, flip up-down, transpose, in this
    order), warped (n,) bool, affine (n, 2, 3) as F.affine_grid's. Presets: "mpa" (each symmetry p = .5, then
    p = .5 one warp of shift within 10 % of the side, scale 0.9-1.1, rotation within 30 degrees), "stnet" (the 8
    symmetries alone; "stnet_color" of script 23 likewise), "none".
    """
    uniform = torch.rand((n, 8), generator=generator)
    symmetry = (uniform[:, :3] < 0.5) & (preset != "none")
    warped = (uniform[:, 3] < 0.5) & (preset == "mpa")
    shift = 2 * (uniform[:, 4:6] * 2 - 1) * 0.10  # the side is 2 in affine_grid's units
    scale = 0.9 + 0.2 * uniform[:, 6]
    angle = torch.deg2rad((uniform[:, 7] * 2 - 1) * 30)
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    turn = torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 1)  # inverse of rotate and scale
    return symmetry, warped, torch.cat([turn, -turn @ shift[:, :, None]], 2)


def apply_symmetry(patches, symmetry):
    """Flip and transpose (B, 3, S, S) by (B, 3) bool; exact in any dtype."""
    if patches.device.type != "cpu":
        return apply_symmetry_at_once(patches, symmetry)
    turned = torch.empty_like(patches)  # image by image: on a processor 14 times as fast as at once
    for image, patch, (left_right, up_down, transpose) in zip(turned, patches, symmetry.tolist(), strict=True):
        patch = patch.flip([2] * left_right + [1] * up_down)
        image.copy_(patch.transpose(1, 2) if transpose else patch)
    return turned


def apply_symmetry_at_once(patches, symmetry):
    """apply_symmetry in few steps that a GPU takes without waiting."""
    symmetry = symmetry.to(patches.device, non_blocking=True)  # as everywhere: a blocking copy waits for the GPU
    left_right, up_down, transpose = symmetry[:, :, None, None, None].unbind(1)
    patches = torch.where(left_right, patches.flip(3), patches)
    patches = torch.where(up_down, patches.flip(2), patches)
    return torch.where(transpose, patches.transpose(2, 3), patches)


def lay_affine_grid(affine, size):
    """F.affine_grid of (n, 2, 3) for square images, align_corners=False: (n, size, size, 2) by one broadcast sum, where
    torch multiplies matrices (on a processor 68 times as long, and a quarter of the whole augmentation).
    """
    at = (2 * torch.arange(size, device=affine.device) + 1) / size - 1
    rows = affine[:, :, 1, None] * at + affine[:, :, 2, None]
    return (affine[:, :, 0, None, None] * at + rows[:, :, :, None]).permute(0, 2, 3, 1)


def augment(patches, symmetry, warped, affine):
    """(B, 3, S, S) uint8 -> (B, 3, S, S) float32 in 0..255: symmetries, then one bilinear resample where warped."""
    images = apply_symmetry(patches, symmetry).float()
    rows = warped.nonzero().squeeze(1)  # found on the CPU: on the GPU it would cost a synchronisation
    if images.device.type == "cpu":  # one by one, each a copy of its own in the caches: twice as fast
        for row in rows.tolist():
            images[row : row + 1] = warp(images[row : row + 1].clone(), affine[row : row + 1])
    elif len(rows):
        affine, rows = (part.to(images.device, non_blocking=True) for part in (affine[rows], rows))
        images[rows] = warp(images[rows], affine)
    return images


def warp(images, affine):
    """(n, 3, S, S) float32 resampled by (n, 2, 3), bilinear, mirrored border."""
    grid = lay_affine_grid(affine, images.shape[3])
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


# ------------------------------------------------------------------------------------------- model
def stages_of(backbone):
    """The backbone's modules in stages, input side first; of EfficientNet-B0 stem, seven stages, head convolution."""
    stages = []
    for name, child in backbone.named_children():
        for module in child.children() if name in ("blocks", "features", "stages", "layers") else [child]:
            if not stages or any(p.ndim > 1 for p in module.parameters()):  # norm and pooling: not a stage of their own
                stages.append([])
            stages[-1].append(module)
    return stages


def widen_depthwise(convolution, forward, images):
    """A depthwise convolution's forward: training under a processor's autocast, it computes in fp32 and returns the
    type it got, since its backward pass in bf16 takes up to seven times as long (and half of a step's time).
    """
    if not (convolution.training and images.device.type == "cpu" and torch.is_autocast_enabled("cpu")):
        return forward(images)
    with torch.autocast("cpu", enabled=False):
        return forward(images.float()).to(images.dtype)


class SpotRegressor(nn.Module):
    """Backbone and head: (B, 3, S, S) pixel values 0..255 -> (B, G) expression; the last stages are trainable."""

    def __init__(self, backbone, head, trainable_stages):
        super().__init__()
        self.backbone, self.head = backbone, head
        for name in ("mean", "std"):  # of the images that the backbone was pretrained on
            self.register_buffer(name, 255 * torch.tensor(backbone.pretrained_cfg[name]), False)
        for module in backbone.modules():
            if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
                module.forward = functools.partial(widen_depthwise, module, module.forward)
        stages = stages_of(backbone)
        few = f"TRAINABLE_STAGES {trainable_stages}: this backbone has {len(stages)} stages"
        require(trainable_stages <= len(stages), few)
        n_frozen = 0 if trainable_stages == -1 else len(stages) - trainable_stages
        self.frozen = [module for stage in stages[:n_frozen] for module in stage]
        backbone.requires_grad_(not self.frozen)  # a transformer's own parameters belong to the stem
        for module in [module for stage in stages[n_frozen:] for module in stage]:
            module.requires_grad_(True)

    def train(self, mode=True):
        """Frozen stages stay in evaluation mode: their BatchNorm would go on averaging, dropping paths would go on."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def normalise(self, pixels):
        """(B, 3, S, S) pixel values 0..255 -> the backbone's input, channels last."""
        rows = pixels.permute(0, 2, 3, 1).flatten(2).float()  # (B, S, 3 S): with an axis of 3, broadcasting is slow
        rows = (rows - self.mean.repeat(pixels.shape[3])).div_(self.std.repeat(pixels.shape[3]))
        return rows.unflatten(2, (-1, 3)).permute(0, 3, 1, 2)

    def encode(self, pixels):
        """(B, 3, S, S) pixel values 0..255 -> (B, F) features."""
        return self.backbone(self.normalise(pixels))

    def forward(self, pixels):
        return self.head(self.encode(pixels))


def build_model(recipe, n_genes, seed):
    """timm BACKBONE with the paper's head, Dropout - Linear - ReLU - Dropout - Linear; HIDDEN = 0 is one Linear.
    Same seed, same weights. InputError for an unknown name or weights that are not to be had.
    """
    import timm.layers  # here, because it takes seconds to import and scripts 17-19 do without

    backbone, hidden, pretrained = recipe["BACKBONE"], recipe["HIDDEN"], recipe["PRETRAINED"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "weights"))
        try:
            body = timm.create_model(backbone, pretrained=pretrained, num_classes=0)
        except (OSError, RuntimeError, ValueError) as error:
            fix = "connect to the network once, or use --pretrained false" if pretrained else "is it a name of timm's?"
            raise InputError(f"backbone {backbone}: {str(error).splitlines()[0][:120]}; {fix}") from None
        if dist.is_initialized() and dist.get_backend() == "nccl":  # the modules to freeze are chosen from the new ones
            body = timm.layers.convert_sync_batchnorm(body)
        width = getattr(body, "head_hidden_size", None) or body.num_features  # of what comes out: VGG, MobileNetV3
        layers = [nn.Dropout(0.5), nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(0.5)] if hidden else []
        head = nn.Sequential(*layers, nn.Linear(hidden or width, n_genes))
    return SpotRegressor(body, head, recipe["TRAINABLE_STAGES"])


def count_parameters(model):
    """{"backbone", "trainable", "total"}: numbers of parameters."""
    size = lambda module, *kinds: sum(p.numel() for p in module.parameters() if p.requires_grad in kinds)  # noqa: E731
    return {"backbone": size(model.backbone, 0, 1), "trainable": size(model, 1), "total": size(model, 0, 1)}


# ------------------------------------------------------------------------------------------- training
def train_epoch(model, optimiser, scaler, patches, target, rows, recipe, seed, epoch, dtype):
    """One pass over `rows`; returns the mean training loss. Everything random follows from (seed, epoch). Of several
    joined ranks each takes its share of every batch.
    """
    device, ranks, rank = next(model.parameters()).device, *joined_ranks()
    generator = torch.Generator().manual_seed(seed_of(seed, "epoch", epoch))
    order = rows[torch.randperm(len(rows), generator=generator)]
    draw = draw_augmentation(len(order), recipe["AUG"], generator)
    torch.manual_seed(seed_of(seed, "dropout", epoch, *[rank] * (rank > 0)))
    model.train()
    total, loss_of = torch.zeros((), device=device), getattr(getattr(model, "module", model), "loss", F.mse_loss)
    batches = [batch for batch in torch.arange(len(order)).split(recipe["BATCH_SIZE"]) if len(batch) >= 2 * ranks]
    require(batches, f"--batch-size {recipe['BATCH_SIZE']}: no batch has two spots for each of {ranks} processes")
    shares = [batch[rank::ranks] for batch in batches]  # BatchNorm needs two
    images_of = read_ahead(patches, [order[share] for share in shares], device)
    for batch, share in zip(
        tqdm(batches, f"epoch {epoch + 1}", leave=False, disable=rank > 0 or None), shares, strict=True
    ):
        images = augment(next(images_of), *(part[share] for part in draw))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            predicted = model(images)
        loss = loss_of(predicted.float(), target[order[share].to(device, non_blocking=True)])
        optimiser.zero_grad(set_to_none=True)
        scaler.scale(loss * (len(share) * ranks / len(batch))).backward()  # gradients are averaged over the ranks
        scaler.step(optimiser)
        scaler.update()
        total += loss.detach() * len(share)
    if ranks > 1:
        dist.all_reduce(total)
        for buffer in model.buffers():  # BatchNorm's averages, of which each rank has seen its share
            dist.broadcast(buffer, 0)
    return total.item() / sum(map(len, batches))  # the epoch's only synchronisation


def joined_ranks():
    """(number of ranks that train one network together, the own rank's number)."""
    return (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)


def adam_with_cosine(parameters, recipe):
    """(optimiser, schedule stepped by the epoch) of the paper's recipe."""
    optimiser = torch.optim.Adam(parameters, recipe["LEARNING_RATE"], fused=True)
    return optimiser, torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, recipe["EPOCHS"])


def fit(
    model, patches, target, train_rows, valid_rows, *, recipe, seed, dtype, keep=0, checkpoint=None, facts=None,
    report=None,
):  # fmt: skip
    """Train; leave the weights of the epoch with the lowest validation MSE in `model`; return the history.
    Loss and optimiser are MSE and adam_with_cosine, or the model's own `loss` and `optimise`.
    patches (N, 3, S, S) uint8, target (N, G) float32 array, rows int64 arrays. With `keep` there is no validation and
    training ends with that epoch. `checkpoint` is a file that a killed run goes on from, and that holds the `facts` it
    was made with. `report(line, predicted, best_epoch)` sees each epoch's line of the history and may add to it.
    """
    device = next(model.parameters()).device
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimiser, schedule = getattr(model, "optimise", adam_with_cosine)(trainable, recipe)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    stateful = {"model": model, "optimiser": optimiser, "schedule": schedule, "scaler": scaler}
    truth, rows = torch.from_numpy(target).to(device), torch.from_numpy(train_rows)
    history, best = [], None
    if checkpoint is not None and checkpoint.is_file():
        state = read_checkpoint(checkpoint, device, facts)
        for part, owner in stateful.items():
            owner.load_state_dict(state[part])
        history, best = state["history"], state["best"]
        tqdm.write(f"going on after epoch {len(history)} of {recipe['EPOCHS']} ({checkpoint})")
    network = DistributedDataParallel(model) if dist.is_initialized() else model
    for epoch in range(len(history), keep or recipe["EPOCHS"]):
        began, rate = time.perf_counter(), schedule.get_last_lr()[0]
        loss = train_epoch(network, optimiser, scaler, patches, truth, rows, recipe, seed, epoch, dtype)
        schedule.step()
        trained = time.perf_counter() - began
        predicted = None if keep else predict(model, patches, valid_rows, dtype=dtype)
        mse = loss if keep else float(mean_square(predicted, target[valid_rows]).mean())
        require(np.isfinite(mse), f"epoch {epoch + 1}: the MSE is {mse}: lower LEARNING_RATE ({rate:g})")
        line = {"epoch": epoch + 1, "learning_rate": rate, "train_mse": loss, "valid_mse": None if keep else mse}
        line |= {"images_per_s": len(rows) / trained, "seconds": time.perf_counter() - began}
        if best is None or keep or mse < best["valid_mse"]:
            weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
            best = {"epoch": epoch + 1, "valid_mse": mse, "weights": weights}
        if report is not None:
            report(line, predicted, best["epoch"])
        history.append(json.loads(json.dumps(line)))  # plain numbers: a checkpoint with NumPy's is not read again
        if checkpoint is not None and joined_ranks()[1] == 0:
            state = {part: owner.state_dict() for part, owner in stateful.items()}
            with whole_file(checkpoint) as path, open(path, "wb") as file:  # a file's own error tells of a full disk
                torch.save(state | {"history": history, "best": best, "facts": facts}, file)
    model.load_state_dict(best["weights"])
    return history


def read_checkpoint(path, device, facts):
    """What fit saved. InputError where it is damaged, or was made with other constants or data, which are named."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        made = state["facts"] or {}
    except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise InputError(f"{path}: not a checkpoint of this version ({error}): remove it") from None
    differ = [f"{k} = {made.get(k)} (now {v})" for k, v in (facts or {}).items() if made.get(k) != v]
    require(not differ, f"{path} was made with {', '.join(differ)}: remove it, or go back to what it was made with")
    return state


# ------------------------------------------------------------------------------------------- prediction
@torch.inference_mode()
def predict(model, patches, rows, *, dtype, tta=False):
    """(len(rows), G) float32 expression; with `tta` the mean over the 8 symmetries of every patch."""
    device, rows, ranks = next(model.parameters()).device, torch.from_numpy(np.asarray(rows)), joined_ranks()
    batches = rows.tensor_split(ranks[0])[ranks[1]].split(PREDICT_BATCH[device.type])
    model.eval()
    codes, parts = list(itertools.product((False, True), repeat=3))[: 8 if tta else 1], []
    for images in read_ahead(patches, batches, device):
        total = 0
        for code in codes:
            seen = apply_symmetry(images, torch.tensor([code] * len(images))) if any(code) else images
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                total = total + model(seen).float()
        parts.append(total / len(codes))
    share = [torch.cat(parts).cpu().numpy()] if parts else []
    shares = [share] * ranks[0]
    if ranks[0] > 1:
        dist.all_gather_object(shares, share)  # in the order of the ranks, which is that of the rows
    return np.concatenate(list(itertools.chain(*shares)))


def predict_again(trained, recipe, experiment, folder):
    """`compute` of run_setting: the weights of a `trained` row predict once more, by another recipe."""
    device, dtype, _ = choose_device(recipe)
    model = build_model(recipe | {"PRETRAINED": False}, len(experiment.data.genes), experiment.seed)
    model.load_state_dict(safetensors.torch.load_file(experiment.out / trained["folder"] / "weights.safetensors"))
    model = model.to(device, memory_format=torch.channels_last)
    patches, rows = place_patches(experiment.data.patches, recipe["IMAGE_SIZE"], device), experiment.rows(*SPLITS)
    facts = {key: trained[key] for key in trained if key in ("weights", "best_epoch") or key.startswith("parameters_")}
    return predict(model, patches, rows, dtype=dtype, tta=recipe["TTA"]), facts


def encode_patches(patches, backbone, recipe, seed):
    """(N, F) float32 features of the plain patches by a timm backbone as it comes, PRETRAINED or random by `seed`."""
    device, dtype, _ = choose_device(recipe)
    model = build_model(recipe | {"BACKBONE": backbone, "HIDDEN": 0, "TRAINABLE_STAGES": 0}, 1, seed)
    model.head = nn.Identity()
    patches = place_patches(patches, recipe["IMAGE_SIZE"], device)
    return predict(model.to(device, memory_format=torch.channels_last), patches, np.arange(len(patches)), dtype=dtype)


# ------------------------------------------------------------------------------------------- correlation
def pearson_per_gene(predicted, truth):
    """Pearson r of every column, (n, G) and (n, G) -> (G,) float64.
    NaN where r is undefined: a constant or non-finite column, or a single spot. Never 0 in its place.
    """
    predicted, truth, n = np.asarray(predicted), np.asarray(truth), len(truth)
    assert predicted.shape == truth.shape and predicted.ndim == 2
    sums = np.zeros((5, predicted.shape[1]))
    for start in range(0, n, 16):  # so few rows stay in the processor's cache
        part = slice(start, start + 16)  # beyond the first row: exactly 0 in a constant column, and nearly centred
        x, y = (np.subtract(values[part], values[0], dtype=np.float64) for values in (predicted, truth))
        sums += [x.sum(0), y.sum(0), *(np.einsum("ng,ng->g", *pair) for pair in ((x, x), (y, y), (x, y)))]
    x, y, xx, yy, xy = sums
    with np.errstate(divide="ignore", invalid="ignore"):  # 0/0 of a constant column is the NaN that it should be
        return np.clip((xy - x * y / n) / np.sqrt((xx - x * x / n) * (yy - y * y / n)), -1, 1)


def mean_square(predicted, truth):
    """Mean squared difference of every column, (n, G) and (n, G) -> (G,) float64."""
    difference = np.subtract(predicted, truth, dtype=np.float64)
    return np.einsum("ng,ng->g", difference, difference) / len(truth)


def average_slides(score, predicted, truth, slides):
    """Mean over slides of each one's score(predicted, truth), (G,); a slide where it is NaN is left out."""
    scores = [score(predicted[slides == s], truth[slides == s]) for s in np.unique(slides)]
    return pd.DataFrame(scores).mean().to_numpy()


def score_genes(predicted, truth, slides):
    """Per gene, (G,) arrays: mean over slides of r, Spearman's r and both variances; r_pooled over all spots; mse."""
    rank = lambda values: rankdata(np.ascontiguousarray(values.T), axis=1).T  # noqa: E731 - along columns is slower
    scores = {
        "r": pearson_per_gene,
        "spearman": lambda predicted, truth: pearson_per_gene(rank(predicted), rank(truth)),
        "variance": lambda predicted, truth: truth.var(0, np.float64),
        "variance_predicted": lambda predicted, truth: predicted.var(0, np.float64),
    }
    scores = {name: average_slides(score, predicted, truth, slides) for name, score in scores.items()}
    scores["r_pooled"] = pearson_per_gene(predicted, truth)
    return scores | {"mse": mean_square(predicted, truth)}


def bootstrap_means(predicted, truth, spots, genes, members):
    """(DRAWS, 4) table heg, hvg, mg, all: group means of r when whole blocks of one slide's spots are drawn with
    replacement. The draws follow from the spots alone, so those of two methods are paired.
    """
    block, names = pd.factorize(spots["block"], sort=True)
    inside = (np.arange(len(names))[:, None] == block).astype(np.float64)  # (blocks, n)
    random = np.random.default_rng(seed_of("bootstrap", *names))
    drawn = random.multinomial(len(inside), np.full(len(inside), 1 / len(inside)), DRAWS).astype(np.float64)
    x, y = (values.astype(np.float64) - values.mean(0, np.float64) for values in (predicted, truth))
    mean = lambda values: drawn @ (inside @ values) / (drawn @ inside.sum(1))[:, None]  # noqa: E731
    mean_x, mean_y = mean(x), mean(y)
    spread = (mean(x**2) - mean_x**2) * (mean(y**2) - mean_y**2)
    defined = spread > 1e-9 * (x**2).mean(0) * (y**2).mean(0)  # else the gene is constant in this draw
    r = np.where(defined, (mean(x * y) - mean_x * mean_y) / np.sqrt(np.where(defined, spread, 1)), np.nan)
    r = pd.DataFrame(r if len(inside) > 1 else np.nan, range(DRAWS), genes)  # one block says nothing of others
    return pd.DataFrame({key: r[names].mean(axis=1) for key, names in members.items()})


def join_draws(rows, out):
    """(DRAWS, 4) draws, as bootstrap_means, of a setting's mean over its test slides against log-normalised truth; of
    several trainings on one slide, as many are drawn with replacement, and those of two settings stay paired.
    """
    means = []
    for _, folders in rows.sort_values(["seed", "fold"]).groupby("slide")["folder"]:
        draws = np.stack([pd.read_csv(out / f / "bootstrap.csv").filter(like="lognorm_") for f in folders], axis=1)
        picked = np.random.default_rng(seed_of("trainings")).integers(draws.shape[1], size=draws.shape[:2])
        means.append(np.take_along_axis(draws, picked[:, :, None], axis=1).mean(1))
    return np.mean(means, axis=0)


def pair_differences(rows, out, against):
    """r of a setting minus r of another, {setting: another}, of the same trainings: table setting, minus, group, n,
    difference, low, high (95 %). Test slides, log-normalised truth. NaN where r is not defined for equally many genes.
    """
    rows, lines = pd.DataFrame(rows).query("split == 'test' and truth == 'lognorm'").sort_values(["seed", "fold"]), []
    for pair in against.items():
        ones, others = (rows[rows["setting"] == setting].reset_index() for setting in pair)
        low, high = np.quantile(join_draws(ones, out) - join_draws(others, out), [0.025, 0.975], axis=0)
        for group, *ends in zip((*GROUPS, "all"), low, high, strict=True):
            key = group.lower()
            same = (ones[f"{key}_n"] == others[f"{key}_n"]).all() and ones[f"{key}_n"].all()
            ends = [(ones[key] - others[key]).mean(), *ends] if same else [np.nan] * 3
            lines.append([*pair, group, len(ones), *ends])
    return pd.DataFrame(lines, columns=["setting", "minus", "group", "n", "difference", "low", "high"])


# ------------------------------------------------------------------------------------------- reporting
@dataclass(frozen=True)
class Experiment:
    """One split of a data root: which spots do what, which genes are reported, and where the rows go."""

    data: SpotData
    roles: np.ndarray  # (N,) "train", one of SPLITS, or "" for a spot that takes no part
    groups: pd.DataFrame  # columns group, gene, rank; attrs["source"]
    out: Path
    seed: int
    fold: int = 0

    @functools.cached_property
    def members(self):
        """{"heg": its genes that are in the panel, "hvg", "mg", "all": the panel}."""
        inside = self.groups[self.groups["gene"].isin(self.data.genes)]
        return {g.lower(): inside["gene"][inside["group"] == g].tolist() for g in GROUPS} | {"all": self.data.genes}

    def facts(self, recipe):
        """What a row of this experiment follows from, {name: value}."""
        facts = {k: v for k, v in recipe.items() if k not in ("OUT", "QUICK", "DATA_ROOT", "SEEDS", "ONLY")}
        device, dtype, _ = choose_device(recipe)
        facts |= {"DEVICE": device.type, "PRECISION": str(dtype).removeprefix("torch.")}
        facts |= {"seed": self.seed, "fold": self.fold, "data": self.data.fingerprint}
        split, genes = self.roles.tobytes(), json.dumps(self.groups.values.tolist()).encode()
        facts |= {"split": hashlib.sha256(split).hexdigest(), "genes": hashlib.sha256(genes).hexdigest()}
        return json.loads(json.dumps(facts))

    def rows(self, *roles):
        """Row numbers of the spots with these roles, in the order of the roles."""
        return np.concatenate([np.flatnonzero(self.roles == role) for role in roles])


def run_setting(setting, recipe, experiment, compute, rank=0):
    """The rows of one setting: from disk where they are, else computed, scored and written to a folder of their own,
    <out>/<setting>-<hash of what they follow from>; rows.json comes last and marks it as whole.
    compute(recipe, experiment, folder) returns the prediction (n, G) of experiment.rows(*SPLITS) and facts.
    Of torchrun's processes, `rank` computes them, or all do that have joined, and the others wait.
    """
    facts = experiment.facts(recipe)
    key = hashlib.sha256(json.dumps([setting, facts], sort_keys=True).encode()).hexdigest()[:10]
    folder = experiment.out / f"{re.sub(r'[^A-Za-z0-9.=-]+', '_', setting).strip('_')}-{key}"
    done = folder / "rows.json"
    if done.is_file():
        tqdm.write(f"{setting}: on disk already ({folder})")
    elif rank == RANK or dist.is_initialized():
        began = time.perf_counter()
        predicted, more = compute(recipe, experiment, folder)
        more = {"seconds": time.perf_counter() - began, "folder": folder.name, **more}
        if rank == RANK:
            save_setting(setting, recipe, experiment, predicted, more, facts)
    while not done.is_file():
        time.sleep(0.2)
    if rank == RANK:
        (folder / "checkpoint.pt").unlink(missing_ok=True)
    on_disk = [row for path in sorted(experiment.out.glob("*/rows.json")) for row in json.loads(path.read_text())]
    save_csv(experiment.out / "rows.csv", pd.DataFrame(on_disk))
    return json.loads(done.read_text())


def save_setting(setting, recipe, experiment, predicted, more, facts):
    """Score a setting's prediction and write its folder."""
    data, roles, at = experiment.data, experiment.roles, experiment.rows(*SPLITS)
    folder = experiment.out / more["folder"]
    rows, per_gene, draws = score_rows(setting, recipe, experiment, predicted, more)
    split = pd.DataFrame({"id": data.spots["id"], "role": roles, "fold": experiment.fold})[roles != ""]
    table = anndata.AnnData(predicted, data.spots.iloc[at].set_index("id").assign(role=roles[at]))
    table.var = per_gene.set_index("gene")
    table.layers["lognorm"], table.layers["target"] = data.lognorm[at], data.target[at]
    table.obsm["spatial"] = table.obs[["pxl_col", "pxl_row"]].to_numpy(np.float64)
    tables = {"per_gene": per_gene, "split": split, "genes": experiment.groups, "bootstrap": draws}
    for name, frame in tables.items():
        save_csv(folder / f"{name}.csv", frame)
    with whole_file(folder / "predictions.h5ad") as path:
        table.write_h5ad(path)
    for name, content in (("recipe", facts), ("rows", rows)):
        with whole_file(folder / f"{name}.json") as path:
            path.write_text(json.dumps(content, indent=1) + "\n")


def ridge_on_colour(recipe, experiment, folder, alpha=100.0):
    """`compute` of run_setting: ridge on standardised colour statistics, which no image network may lose to."""
    colour, train = experiment.data.counts.obsm["colour"], experiment.rows("train")
    colour = (colour - colour[train].mean(0)) / np.maximum(colour[train].std(0), 1e-12)
    ridge = Ridge(alpha).fit(colour[train], experiment.data.target[train])
    return ridge.predict(colour[experiment.rows(*SPLITS)]).astype(np.float32), {"weights": "none"}


def run_grid(script, settings, experiments, adapt=None):
    """The rows of each setting {name: {CONSTANT: value}}, or of ONLY, and experiment, by train_network with `adapt`.
    Of torchrun's processes each computes every so many-th training, and then collects the others'.
    """
    recipe, only = recipe_of(script), script["ONLY"]
    require(only in ("", *settings), f"--only {only}: expected one of {'; '.join(settings)}")
    tasks = [(name, recipe | settings[name], e) for name in settings if only in ("", name) for e in experiments]
    own_first = sorted(range(len(tasks)), key=lambda number: number % RANKS != RANK)
    epochs, rows = sum(task[1]["EPOCHS"] for task in tasks), {}
    with tqdm(total=epochs, unit="epoch", smoothing=0, mininterval=2, disable=RANK > 0) as bar:
        train = functools.partial(train_network, adapt=adapt, report=lambda *_: bar.update())
        for number in own_first:
            name, changed, experiment = tasks[number]
            bar.set_description(f"{number + 1}/{len(tasks)} {name}")
            before = bar.n
            rows[number] = run_setting(name, changed, experiment, train, number % RANKS)
            bar.total -= changed["EPOCHS"] - (bar.n - before)  # epochs that were on disk, or another process's
    return [row for number in sorted(rows) for row in rows[number]]


def score_rows(setting, recipe, experiment, predicted, facts):
    """([one dict a split and truth], per-gene table, bootstrap draws); NaN is None in the dicts, as JSON has none."""
    data, rows, train = experiment.data, experiment.rows(*SPLITS), experiment.rows("train", "oof")
    table, per_gene, draws = [], pd.DataFrame(index=pd.Index(data.genes, name="gene")), pd.DataFrame()
    splits = [split for split in SPLITS if split in experiment.roles]
    truths = {recipe["TARGET"]: data.target, "lognorm": data.lognorm}
    for split, (truth, values) in itertools.product(splits, truths.items()):
        at = experiment.roles[rows] == split
        x, y, spots, usual = predicted[at], values[rows[at]], data.spots.iloc[rows[at]], values[train].mean(0)
        slides = np.unique(spots["tissue_index"])
        scores = pd.DataFrame(score_genes(x, y, spots["tissue_index"].to_numpy()), data.genes).assign(mean=y.mean(0))
        for fact in FACTS:  # of whole slides
            columns = [f"{fact}_{slide}" for slide in slides if truth == "lognorm"]
            scores[fact] = data.counts.var.reindex(columns=columns).mean(axis=1)
        per_gene = per_gene.join(scores.add_prefix(f"{split}_{truth}_"))
        row = {"setting": setting, "split": split, "slide": ",".join(map(str, slides)), "fold": experiment.fold}
        row |= {"seed": experiment.seed, "target": recipe["TARGET"], "truth": truth, "protocol": recipe["PROTOCOL"]}
        row |= {"gene_lists": experiment.groups.attrs["source"], "n_spots": len(x), **facts}
        row |= {"n_genes_r30": int((scores["r"] >= R_THRESHOLD).sum()), "mse": scores["mse"].mean()}
        row |= {"variance_ratio": scores["variance_predicted"].sum() / (scores["variance"].sum() or np.nan)}
        scores = scores.dropna(subset="r").rename(columns={"r_pooled": "pooled"})
        for key, genes in experiment.members.items():
            mean = scores[scores.index.isin(genes)].mean()
            row |= {key: mean["r"], f"{key}_n": int(scores.index.isin(genes).sum()), f"{key}_ci": None}
            row |= {f"{key}_{name}": mean[name] for name in ("pooled", "spearman", *FACTS)}
        order = scores[["r", "moran", "mean"]].corr("spearman")["r"]
        row["spot_r"] = pd.Series(pearson_per_gene((x - usual).T, (y - usual).T)).mean()
        row |= {"r_against_moran": order["moran"], "r_against_mean": order["mean"]}
        if split == "test":
            means = bootstrap_means(x, y, spots, data.genes, experiment.members)
            draws = draws.join(means.add_prefix(f"{truth}_"), how="outer")
            row |= {f"{key}_ci": means[key].quantile([0.025, 0.975]).tolist() for key in means.dropna(axis=1)}
        table.append({key: None if value != value else value for key, value in row.items()})
    return table, per_gene.reset_index(), draws


def train_network(recipe, experiment, folder, *, keep=0, adapt=None, report=None):
    """Train and predict, for run_setting; writes weights.safetensors and history.csv. `keep` and `report` as in fit;
    adapt(model, patches, recipe, experiment) returns another (network, its input) that holds `model.head` to train.
    """
    data, (device, dtype, _), facts = experiment.data, choose_device(recipe), experiment.facts(recipe)
    patches = place_patches(data.patches, recipe["IMAGE_SIZE"], device)
    with suppress(OSError, AttributeError, TypeError):  # the peak is to be this training's own; Linux can forget others
        torch.cuda.reset_peak_memory_stats() if device.type == "cuda" else ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    model = build_model(recipe, len(data.genes), experiment.seed).to(device, memory_format=torch.channels_last)
    if recipe["START_AT_MEAN"]:
        model.head[-1].bias.data.copy_(torch.from_numpy(data.target[experiment.rows("train")].mean(0)))
    network, patches = adapt(model, patches, recipe, experiment) if adapt else (model, patches)
    history = fit(
        network, patches, data.target, experiment.rows("train"), experiment.rows("valid"), recipe=recipe,
        seed=experiment.seed, dtype=dtype, keep=keep, checkpoint=folder / "checkpoint.pt",
        facts=facts, report=report,
    )  # fmt: skip
    predicted = predict(network, patches, experiment.rows(*SPLITS), dtype=dtype, tta=recipe["TTA"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if joined_ranks()[1] == 0:
        save_weights(folder / "weights.safetensors", model, experiment, facts, predicted)
        save_csv(folder / "history.csv", pd.DataFrame(history))
    return predicted, {
        "weights": "pretrained" if recipe["PRETRAINED"] else "random",
        "best_epoch": keep or min(history, key=lambda line: line["valid_mse"])["epoch"],
        "images_per_s": float(np.median([line["images_per_s"] for line in history])),
        "seconds": sum(line["seconds"] for line in history),  # also of epochs before an interruption
        "peak_memory_mb": (torch.cuda.max_memory_allocated() if device.type == "cuda" else peak) / 2**20,
        **{f"parameters_{part}": count for part, count in count_parameters(model).items()},
    }


def save_weights(path, model, experiment, facts, predicted):
    """Weights whose metadata say all that script 26 needs: how to build the network and make its patches, and per gene
    r over the validation spots (against log-normalised counts) and the ceiling on the training slides; null if unknown.
    """
    data, rows = experiment.data, experiment.rows(*SPLITS)
    valid, slides = experiment.roles[rows] == "valid", data.spots["tissue_index"].to_numpy()
    r = np.full(len(data.genes), np.nan)
    if valid.any():
        r = average_slides(pearson_per_gene, predicted[valid], data.lognorm[rows[valid]], slides[rows[valid]])
    columns = [f"ceiling_{slide}" for slide in np.unique(slides[experiment.rows("train")])]
    ceiling = data.counts.var.reindex(columns=columns).mean(axis=1)
    um_per_px = float(np.median([*data.meta["um_per_px"].values()]))
    metadata = {"format": FORMAT, "recipe": facts, "genes": data.genes, "um_per_px": um_per_px, "title": data.title}
    metadata |= {"patch_size": PATCH_SIZE, "mean": model.mean.tolist(), "std": model.std.tolist()}
    metadata |= {"groups": {key: genes for key, genes in experiment.members.items() if key != "all"}}
    metadata |= {name: [None if x != x else float(x) for x in v] for name, v in (("valid_r", r), ("ceiling", ceiling))}
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    with whole_file(path) as partial:
        partial.write_bytes(safetensors.torch.save(state, {key: json.dumps(part) for key, part in metadata.items()}))


def print_header(script, recipe, experiments):
    """What is run on what: data, target, protocol, split, gene groups, machine and weights."""
    experiment, (device, dtype, reason) = experiments[0], choose_device(recipe)
    data, slides, split = experiment.data, experiment.data.spots["tissue_index"], []
    for role in [role for role in ("train", *SPLITS) if role in experiment.roles]:
        at = experiment.rows(role)
        split.append(f"{role} {len(at)} spots of slides {','.join(map(str, np.unique(slides.iloc[at])))}")
    missing = sorted(set(experiment.groups["gene"]) - set(data.genes))
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    says = {
        "harmony": "Harmony over all slides, the test slide included", "lognorm": "log1p of counts per 10,000",
        "paper": "as published: the panel is chosen on all slides, so transductive",
        "block": f"{FOLDS} folds of spatial blocks, then the test slide, of which nothing else is used",
        "loso": "every slide once the test slide, of which nothing else is used; "
        + ("one donor alone, who is not left out" if data.spots["donor"].nunique() == 1 else "its donor is left out"),
    }  # fmt: skip
    print(f"\n{data.title}{Path(script['__file__']).stem}")
    for name, value in {
        "data": f"{data.root}: {slides.nunique()} slides, {len(slides):,} spots x {len(data.genes):,} genes",
        "target": f"{recipe['TARGET']} ({says[recipe['TARGET']]})",
        "protocol": f"{recipe['PROTOCOL']} ({says[recipe['PROTOCOL']]})",
        "split": "; ".join(split) + f"; the first of {len(experiments)} trainings" * (len(experiments) > 1),
        "gene groups": experiment.groups.attrs["source"] + f"; not in the panel: {', '.join(missing)}" * bool(missing),
        "device": f"{device.type} ({where}), {str(dtype).removeprefix('torch.')} ({reason})",
        "weights": "pretrained (timm)" if recipe["PRETRAINED"] else "random: no pretraining",
    }.items():
        print(f"{name:11} {value}")


def report_scores(title, experiments, rows, against=None, add=None):
    """Print a run's rows in two tables, a line a setting, split and truth: mean±sd over n seeds, folds or slides (and
    each test slide's own line); 0.310/47 is of 47 genes only; intervals are over blocks. pair_differences `against` is
    saved, and its HEG shown. `add(table, parts)` may add columns; parts are the rows that each line is of.
    """
    out, data, keys, lines, parts = experiments[0].out, experiments[0].data, ["setting", "split", "truth"], [], []
    sizes = {"all": len(data.genes), **experiments[0].groups["group"].value_counts()}
    differences = pair_differences(rows, out, against or {})
    save_csv(out / "paired_differences.csv", differences)
    ahead = differences[differences["group"] == "HEG"].set_index("setting").to_dict("index")
    rows = pd.DataFrame(rows)
    rows[rows.columns[rows.isna().all()]] = np.nan  # in place of None
    for key, of in rows.groupby(keys, sort=False):
        several = key[1] == "test" and of["slide"].nunique() > 1
        for part in [*(part for _, part in of.groupby("slide") if several), of]:
            mean, scored, slides = part.mean(numeric_only=True), key[1:] == ("test", "lognorm"), part["slide"].unique()
            line = dict(zip(keys, key, strict=True)) | {
                "n": len(part),
                "slide": "all" if slides[1:].size else slides[0],
            }
            for group in (*GROUPS, "all"):
                r = part.groupby("slide" if slides[1:].size else ["seed", "fold"])[group.lower()].mean()
                n = int(part[f"{group.lower()}_n"].min())
                few = f"/{n}" * bool(n < sizes.get(group, 0))
                line[group] = f"{r.mean():.3f}" + f"±{r.std():.3f}" * (len(r) > 1) + few
            ends = np.quantile(join_draws(part, out)[:, 0], [0.025, 0.975]) if scored else (np.nan, np.nan)
            line |= {"HEG 95 %": "[{:.2f}, {:.2f}]".format(*ends), "ceiling": f"{mean['heg_ceiling']:.3f}"}
            line |= {"share": f"{mean['heg'] / mean['heg_ceiling']:.0%}", "r>=.30": f"{mean['n_genes_r30']:.0f}"}
            if scored and part is of and key[0] in ahead:
                line["HEG ahead"] = "{difference:+.3f} [{low:+.3f}, {high:+.3f}] of {minus}".format(**ahead[key[0]])
            parts.append(part)
            lines.append(line)
    table = pd.DataFrame(lines).fillna("").replace({r"^\[?\+?nan.*": "-", r" \[\+nan, \+nan\]": ""}, regex=True)
    table["setting"] = table["setting"].str.ljust(table["setting"].str.len().max())
    print_table(title, data, table)
    more = {"heg_image_ceiling": "image ceiling", "heg_pooled": "pooled", "heg_spearman": "Spearman"}
    more |= {"spot_r": "spot-wise", "variance_ratio": "variance", "r_against_moran": "r~Moran"}
    more |= {"r_against_mean": "r~mean", "mse": "MSE"}
    means = pd.DataFrame([part.mean(numeric_only=True) for part in parts])
    table = table[[*keys, "slide"]].join(means[[*more]].rename(columns=more).round(3)).fillna("-")
    table["seconds"] = [f"{part['seconds'].sum():.0f}" for part in parts]
    if add:
        add(table, parts)
    print_table("the same rows, further metrics: of HEG are image ceiling, pooled r and Spearman's", data, table)


def print_table(title, data, table):
    """One ruled table."""
    head, *body = table.to_string(index=False, col_space=7).splitlines()
    double, single = "=" * len(head), "-" * len(head)
    print(f"\n{data.title}{title} ({data.root})", double, head, single, *body, double, sep="\n")


def describe_machine(device):
    """What a number depends on, {name: value}."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = (*re.findall(r"model name\s*: (.+)", cpu), platform.processor(), platform.machine())[0]
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none used"
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"), "processor": cpu, "cores": os.cpu_count(), "GPU": gpu,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "system": platform.system(),
    }  # fmt: skip


def finish_run(script, experiment, rows, tables=None):
    """Save run.json, have script 27 make the report of it, and print the one JSON line that ends every script's output.
    `tables` {caption: records} are shown in the report.
    """
    if RANK:
        return
    data, out, recipe, name = experiment.data, experiment.out, recipe_of(script), Path(script["__file__"]).stem
    result = {"script": name, "data_root": str(data.root), "simulated": bool(data.title), "out": str(out), "rows": rows}
    facts = {"title": f"{data.title}{name}, {data.root}", "label": data.title, "tables": tables or {}}
    facts |= {"settings": recipe, "machine": describe_machine(choose_device(recipe)[0])}
    with whole_file(out / "run.json") as path:
        path.write_text(json.dumps(facts | result, indent=1) + "\n")
    try:
        call_script("27_write_report.py", "--run", str(out))
    finally:
        print(json.dumps(result))
