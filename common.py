"""Everything that two scripts share, in the order in which the data flows.

conventions -> run set-up -> dataset -> augmentation -> model -> training -> prediction -> correlation -> reporting

Shapes: N spots, G genes, B patches of a batch, S px a side. A `recipe` is the plain dict of a script's constants.
"""

import argparse
import hashlib
import json
import os
import re
import resource
import sys
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import polars
import safetensors.torch
import scipy.sparse
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from tqdm import tqdm

# ------------------------------------------------------------------------------------------- conventions

PATCH_SIZE = 224  # px of the slide; 68 um at GSE240429's 0.304 um/px
GROUP_SIZE = 50  # genes of the groups HEG and HVG
GROUPS = ("HEG", "HVG", "MG")
MARKER_GENES = ("HAL", "CYP3A4", "VWF", "SOX9", "KRT7", "ANXA4", "ACTA2", "DCN")
ID_COLUMNS = ["id", "tissue_index", "barcode", "array_row", "array_col", "pxl_row", "pxl_col"]
POSITION_COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row", "pxl_col"]
EVAL_BATCH = 128  # prediction keeps no activations for a backward pass, so it affords more than training
R_THRESHOLD = 0.30  # the paper counts the genes above it

# What a constant may be: a tuple of the allowed values, or the two ends of a range.
ALLOWED = {
    "TARGET": ("harmony", "lognorm"),
    "PROTOCOL": ("paper",),
    "AUG": ("mpa", "stnet", "none"),
    "DEVICE": ("auto", "cpu", "cuda"),
    "PRECISION": ("auto", "bf16", "fp16", "fp32"),
    "DATASET": ("GSE240429", "HER2ST"),
    "VALID_FRACTION": range(0, 1),
    "HIDDEN": range(0, 1 << 20),
    "IMAGE_SIZE": range(32, 1 << 12),
    "EPOCHS": range(1, 1 << 20),
    "BATCH_SIZE": range(2, 1 << 20),
    "LEARNING_RATE": range(0, 1),
    "SPOTS": range(2, 1 << 20),
    "SLIDES": range(1, 1 << 10),
}


class InputError(Exception):
    """The user's input is at fault. Its one line names the file or value, what was expected and the fix."""


@contextmanager
def whole_file(path):
    """Give a temporary path beside `path`; rename it to `path` on success, remove it otherwise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")  # keeps the suffix, which writers look at
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_not_truncated(page, path):
    """Raise InputError where a TIFF page's pixels (a tifffile page) lie beyond the end of its file."""
    needed = max(o + n for o, n in zip(page.dataoffsets, page.databytecounts, strict=True))
    if needed > page.parent.filehandle.size:
        held = page.parent.filehandle.size
        raise InputError(f"{path}: truncated: {held:,} of at least {needed:,} bytes; remove it and fetch it again")


def _seed(*words):
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:8], "little") >> 1


def torch_generator(*words):
    """CPU generator that depends on the words alone: what ran before does not matter."""
    return torch.Generator().manual_seed(_seed(*words))


def numpy_generator(*words):
    """As `torch_generator`, for NumPy."""
    return np.random.default_rng(_seed(*words))


# ------------------------------------------------------------------------------------------- run set-up


def constants_of(script):
    """{name: value} of a script's UPPER_CASE settings that carry a value and a comment or stand in the ruled block."""
    block = re.split(r"^# -{20,}.*$", Path(script["__file__"]).read_text(), flags=re.MULTILINE)[1]
    lines = re.findall(r"^([A-Z][A-Z0-9_]*) = .*?(?:  # (.*))?$", block, flags=re.MULTILINE)
    return {name: (script[name], comment) for name, comment in lines}


def _parse_constant(name, text, default):
    """The command line's `text` as a value of the default's type, checked against ALLOWED."""
    flag = f"--{name.lower().replace('_', '-')} {text}"
    try:
        if isinstance(default, bool):
            value = {"true": True, "false": False}[text.lower()]
        elif isinstance(default, tuple):
            kind = type(default[0]) if default else int
            value = tuple(kind(part) for part in text.split(",") if part)
        else:
            value = type(default)(text)
    except (KeyError, ValueError):
        raise InputError(f"{flag}: expected {type(default).__name__} like {default!r}") from None
    check_constant(name, value, flag)
    return value


def check_constant(name, value, shown=None):
    """Raise InputError where ALLOWED forbids the value."""
    allowed = ALLOWED.get(name)
    shown = shown or f"{name} = {value!r}"
    if isinstance(allowed, tuple) and value not in allowed:
        raise InputError(f"{shown}: expected one of {', '.join(allowed)}")
    if isinstance(allowed, range) and not allowed.start <= value <= allowed.stop:
        raise InputError(f"{shown}: expected a number from {allowed.start} to {allowed.stop}")


def override_constants(script, argv):
    """Set a script's constants from the command line, `--quick`'s QUICK_BUDGET first. Prints what changed."""
    constants = constants_of(script)
    parser = argparse.ArgumentParser(
        description=script["__doc__"],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for name, (value, comment) in constants.items():
        bare = {"nargs": "?", "const": "true"} if isinstance(value, bool) else {}
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        parser.add_argument(
            f"--{name.lower().replace('_', '-')}",
            dest=name,
            metavar="",
            help=f"{comment} [{shown}]".replace("%", "%%").strip(),
            **bare,
        )
    parser.exit_on_error = False
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [f"--{name.lower().replace('_', '-')}" for name in constants]
        close = get_close_matches(unknown[0].split("=")[0], flags, 1)
        hint = f"did you mean {close[0]}?" if close else "--help lists the constants"
        raise InputError(f"{Path(script['__file__']).name} has no constant {unknown[0]}: {hint}")
    parsed = {k: _parse_constant(k, text, constants[k][0]) for k, text in vars(given).items() if text is not None}
    if parsed.get("QUICK", script.get("QUICK", False)):
        parsed = {**script["QUICK_BUDGET"], **parsed}
    for name, value in parsed.items():
        if value != script[name]:
            print(f"{name} = {value!r}")
    script.update(parsed)
    for name in constants:
        check_constant(name, script[name])


def run_script(script):
    """Apply the command line to a script's globals and call its main(). Ends the process with 2 on an InputError."""
    try:
        override_constants(script, sys.argv[1:])
        script["main"]()
    except (InputError, argparse.ArgumentError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last finished epoch or row", file=sys.stderr)
        sys.exit(130)


def recipe_of(script):
    """The script's constants as they stand now, {name: value}: what a run is made with and saved with."""
    return {name: script[name] for name in constants_of(script)}


def choose_device(recipe):
    """(torch.device, autocast dtype, reason) from DEVICE, PRECISION and IMAGE_SIZE."""
    cuda = torch.cuda.is_available()
    if recipe["DEVICE"] == "cuda" and not cuda:
        raise InputError("DEVICE = 'cuda': torch sees no CUDA device; use --device cpu")
    device = torch.device("cuda" if cuda and recipe["DEVICE"] != "cpu" else "cpu")
    named = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if recipe["PRECISION"] != "auto":
        if recipe["PRECISION"] == "fp16" and device.type == "cpu":
            raise InputError("PRECISION = 'fp16': needs a GPU, since it trains with a loss scaler; use bf16 or fp32")
        return device, named[recipe["PRECISION"]], "as asked"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return device, torch.bfloat16, "the GPU has bf16"
        return device, torch.float16, "the GPU lacks bf16; with a loss scaler"
    if not torch.cpu._is_avx512_bf16_supported():
        return device, torch.float32, "the processor lacks bf16"
    if recipe["IMAGE_SIZE"] < 160:
        return device, torch.float32, "bf16 was measured slower on processors below 160 px"
    return device, torch.bfloat16, "the processor has bf16"


# ------------------------------------------------------------------------------------------- dataset


@dataclass(frozen=True)
class SpotData:
    """The spots of a data root; row i of every member is the same spot."""

    root: Path
    patches: np.ndarray  # (N, 224, 224, 3) uint8 RGB, memory-mapped
    spots: pd.DataFrame  # N rows, ID_COLUMNS
    genes: list  # G names: the panel
    target: np.ndarray  # (N, G) float32, what is trained on: Harmony or log-normalised
    lognorm: np.ndarray  # (N, G) float32, log-normalised counts
    meta: dict  # meta.json of script 19
    fingerprint: str  # of meta.json, which holds hashes of the sources

    @property
    def simulated(self):
        return self.meta["simulated"]

    @property
    def pitch_px(self):
        """Median distance between neighbouring spots, px; 1 where no slide has two spots."""
        distances = [
            np.sort(np.hypot(*(part[["pxl_row", "pxl_col"]].to_numpy()[:, None] - point).T), 0)[1]
            for _, part in self.spots.groupby("tissue_index")
            if len(part) > 1
            for point in [part[["pxl_row", "pxl_col"]].to_numpy()]
        ]
        return float(np.median(np.concatenate(distances))) if distances else 1.0


def log_normalise(counts, totals):
    """log1p of counts scaled to 10,000 a spot: (N, G) counts, (N,) totals over ALL genes -> (N, G) float32.

    Equals scanpy's normalize_total(target_sum=1e4) and log1p on the full matrix. A spot without counts is all 0.
    """
    scale = 1e4 / np.maximum(np.asarray(totals, np.float64), 1)
    dense = counts.toarray() if scipy.sparse.issparse(counts) else np.asarray(counts)
    return np.log1p(dense * scale[:, None]).astype(np.float32)


def load_dataset(data_root, target):
    """Read what script 19 wrote. Raises InputError with 19's command where it is missing or made otherwise."""
    root = Path(data_root)
    folder = root / "dataset"
    command = f"python 19_make_patches_and_csv.py --data-root {data_root}"
    for name in ("meta.json", "patches.npy", "dataset.csv", "counts.h5ad"):
        if not (folder / name).is_file():
            raise InputError(f"no {name} in {folder}: run {command} first")
    meta_text = (folder / "meta.json").read_bytes()
    meta = json.loads(meta_text)
    if target == "harmony" and meta["target"] != "harmony":
        raise InputError(f"{folder} was made with target {meta['target']}: run {command} --target harmony first")
    counts = anndata.read_h5ad(folder / "counts.h5ad")
    genes = counts.var_names.tolist()
    lognorm = log_normalise(counts.X, counts.obs["n_counts"])
    columns = polars.scan_csv(folder / "dataset.csv", n_rows=0).collect_schema().names()
    if columns != ID_COLUMNS + genes:
        raise InputError(f"{folder / 'dataset.csv'}: its genes are not those of counts.h5ad: run {command} again")
    types = dict.fromkeys(genes, polars.Float32) | dict.fromkeys(("id", "barcode"), polars.String)
    wanted = ID_COLUMNS if target == "lognorm" else columns
    table = polars.read_csv(folder / "dataset.csv", columns=wanted, schema_overrides=types)
    patches = np.load(folder / "patches.npy", mmap_mode="c", allow_pickle=False)  # "c": torch wants writable memory
    if not len(table) == len(patches) == len(lognorm):
        raise InputError(f"{folder}: {len(table)} rows, {len(patches)} patches, {len(lognorm)} counts: run {command}")
    return SpotData(
        root=root,
        patches=patches,
        spots=pd.DataFrame({name: table[name].to_numpy() for name in ID_COLUMNS}),
        genes=genes,
        target=lognorm if target == "lognorm" else table.select(genes).to_numpy(),
        lognorm=lognorm,
        meta=meta,
        fingerprint=hashlib.sha256(meta_text).hexdigest()[:16],
    )


def split_random(spots, train_slides, test_slide, valid_fraction, seed):
    """The paper's split: (N,) array of "train", "valid", "test" or "" (a slide that takes no part).

    The training slides' spots are pooled and `valid_fraction` of them drawn at random for validation.
    """
    slides = sorted(spots["tissue_index"].unique())
    train_slides = train_slides or tuple(s for s in slides if s != test_slide)
    for slide in (*train_slides, test_slide):
        if slide not in slides:
            raise InputError(f"slide {slide} is not in the dataset: it holds slides {', '.join(map(str, slides))}")
    if test_slide in train_slides:
        raise InputError(f"slide {test_slide} is both in TRAIN_SLIDES and TEST_SLIDE: choose another one")
    roles = np.where(spots["tissue_index"] == test_slide, "test", "").astype("U5")
    pool = np.flatnonzero(spots["tissue_index"].isin(train_slides))
    n_valid = round(valid_fraction * len(pool))
    if not 0 < n_valid < len(pool) - 1:
        raise InputError(f"VALID_FRACTION = {valid_fraction} of {len(pool)} spots leaves none for validation or training")
    order = numpy_generator(seed, "split").permutation(pool)
    roles[order[:n_valid]], roles[order[n_valid:]] = "valid", "train"
    return roles


def choose_gene_groups(data, roles):
    """(table, source): a table `group, gene, rank` of HEG, HVG and MG, and where it comes from.

    The data root's gene_sets.csv where there is one, else HEG and HVG are the 50 genes of the panel with the
    highest mean and variance of the log-normalised expression over the training spots.
    """
    path = data.root / "gene_sets.csv"
    if path.is_file():
        table = pd.read_csv(path)
        if not {"group", "gene"} <= set(table.columns) or not set(table["group"]) <= set(GROUPS):
            raise InputError(f"{path}: expected the columns group, gene and the groups {', '.join(GROUPS)}")
        return table.assign(rank=table.groupby("group").cumcount() + 1)[["group", "gene", "rank"]], path.name
    train = data.lognorm[roles == "train"].astype(np.float64)
    parts = {"HEG": train.mean(0), "HVG": train.var(0)}
    lists = {group: [data.genes[g] for g in np.argsort(-v, kind="stable")[:GROUP_SIZE]] for group, v in parts.items()}
    lists["MG"] = list(MARKER_GENES)
    rows = [(group, gene, rank) for group, names in lists.items() for rank, gene in enumerate(names, 1)]
    return pd.DataFrame(rows, columns=["group", "gene", "rank"]), "training spots"


def resize_patches(patches, size):
    """(N, 224, 224, 3) uint8 array -> (N, 3, size, size) uint8 tensor in channels-last memory, antialiased.

    At 224 px the memory map itself is passed on, so nothing is read yet.
    """
    if size == patches.shape[1]:
        return torch.from_numpy(patches).permute(0, 3, 1, 2)
    small = torch.empty((len(patches), size, size, 3), dtype=torch.uint8)
    for start in range(0, len(patches), 256):
        chunk = torch.from_numpy(patches[start : start + 256]).permute(0, 3, 1, 2).float()
        chunk = F.interpolate(chunk, size=(size, size), mode="bilinear", antialias=True)
        small[start : start + 256] = chunk.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return small.permute(0, 3, 1, 2)


def place_patches(patches, device):
    """The patches on the device where they fill at most half of its free memory, else where they are."""
    if device.type == "cuda" and patches.nbytes < 0.5 * torch.cuda.mem_get_info(device)[0]:
        return patches.to(device, memory_format=torch.channels_last)
    return patches


# ------------------------------------------------------------------------------------------- augmentation


@dataclass(frozen=True)
class AugmentationDraw:
    """One draw for n patches, on the CPU; row i belongs to patch i."""

    symmetry: torch.Tensor  # (n, 3) bool: flip left-right, flip up-down, transpose, applied in this order
    warped: torch.Tensor  # (n,) bool: whether the affine warp is applied
    affine: torch.Tensor  # (n, 2, 3) float32: output (x, y, 1) in [-1, 1] -> input (x, y), as F.affine_grid takes it

    def __getitem__(self, rows):
        return AugmentationDraw(self.symmetry[rows], self.warped[rows], self.affine[rows])


def draw_augmentation(n, preset, generator):
    """Draw parameters for n patches. Presets: "mpa" (the paper's), "stnet" (the 8 symmetries), "none".

    MPA: flip left-right, flip up-down, transpose, each p = .5; then with p = .5 one affine warp of shift within
    10 % of the side, scale 0.9-1.1 and rotation within 30 degrees.
    """
    uniform = torch.rand((n, 8), generator=generator)
    symmetry = (uniform[:, :3] < 0.5) & (preset != "none")
    warped = (uniform[:, 3] < 0.5) & (preset == "mpa")
    shift = 2 * (uniform[:, 4:6] * 2 - 1) * 0.10  # the side is 2 in affine_grid's units
    scale = 0.9 + 0.2 * uniform[:, 6]
    angle = torch.deg2rad((uniform[:, 7] * 2 - 1) * 30)
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    turn = torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 1)  # inverse of rotate and scale
    return AugmentationDraw(symmetry, warped, torch.cat([turn, -turn @ shift[:, :, None]], 2))


def apply_symmetry(patches, symmetry):
    """Flip and transpose (B, 3, S, S) by (B, 3) bool; exact in any dtype."""
    left_right, up_down, transpose = symmetry.to(patches.device)[:, :, None, None, None].unbind(1)
    patches = torch.where(left_right, patches.flip(3), patches)
    patches = torch.where(up_down, patches.flip(2), patches)
    return torch.where(transpose, patches.transpose(2, 3), patches)


def augment(patches, draw):
    """(B, 3, S, S) uint8 -> (B, 3, S, S) float32 in 0..255: symmetries, then one bilinear resample of the warped ones."""
    images = apply_symmetry(patches, draw.symmetry).float()
    rows = draw.warped.nonzero().squeeze(1)  # found on the CPU: on the GPU it would cost a synchronisation
    if len(rows):
        affine = draw.affine[rows].to(images.device, non_blocking=True)
        rows = rows.to(images.device, non_blocking=True)
        grid = F.affine_grid(affine, (len(rows), *images.shape[1:]), align_corners=False)
        images[rows] = F.grid_sample(images[rows], grid, padding_mode="reflection", align_corners=False)
    return images


# ------------------------------------------------------------------------------------------- model


class SpotRegressor(nn.Module):
    """Backbone and head: (B, 3, S, S) pixel values 0..255 -> (B, G) expression."""

    def __init__(self, backbone, head, mean, std):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, pixels):
        return self.head(self.backbone((pixels.float() - self.mean) / self.std))


def build_model(backbone, n_genes, hidden, pretrained, seed, start=None):
    """timm backbone with the paper's head, Dropout - Linear - ReLU - Dropout - Linear; hidden = 0 is one Linear.

    Same seed, same initial weights; `start` (G,) is the output bias to start from instead of a random one.
    Raises InputError for an unknown name and for weights that cannot be had.
    """
    import timm  # here, because it takes seconds to import and scripts 17-19 do without

    if pretrained:
        _go_offline_if_unreachable()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(seed, "weights"))
        try:
            body = timm.create_model(backbone, pretrained=pretrained, num_classes=0)
        except (OSError, RuntimeError) as error:
            if not pretrained and "Unknown model" in str(error):
                raise InputError(f"BACKBONE = {backbone!r}: timm knows no such model") from None
            reason = str(error).splitlines()[0]
            raise InputError(
                f"pretrained weights of {backbone} could not be loaded ({reason[:120]}): "
                "connect to the network once, or train from random weights with --pretrained false"
            ) from None
        layers = [nn.Dropout(0.5), nn.Linear(body.num_features, hidden), nn.ReLU(), nn.Dropout(0.5)] if hidden else []
        head = nn.Sequential(*layers, nn.Linear(hidden or body.num_features, n_genes))
    if start is not None:
        head[-1].bias.data.copy_(torch.from_numpy(start))
    return SpotRegressor(body, head, body.pretrained_cfg["mean"], body.pretrained_cfg["std"])


def _go_offline_if_unreachable():
    """Let the hub client read its cache only where the hub does not answer: it would retry for most of a minute."""
    from huggingface_hub import constants

    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=10).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True


def count_parameters(model):
    """{"backbone", "total", "trainable"}: numbers of parameters."""
    return {
        "backbone": sum(p.numel() for p in model.backbone.parameters()),
        "total": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


# ------------------------------------------------------------------------------------------- training


def learning_rate_at(epoch, epochs, base):
    """Cosine from `base` in epoch 0 to zero after the last one; stepped by the epoch, never by the loss."""
    return base * 0.5 * (1 + np.cos(np.pi * epoch / epochs))


def batches_of(order, batch_size):
    """Split row indices into batches; a last batch of one joins the one before, since BatchNorm needs two."""
    parts = list(order.split(batch_size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def train_epoch(model, optimiser, scaler, patches, target, rows, recipe, seed, epoch, dtype):
    """One pass over `rows`; returns the mean training loss. Everything random follows from (seed, epoch)."""
    device = next(model.parameters()).device
    generator = torch_generator(seed, "epoch", epoch)
    order = rows[torch.randperm(len(rows), generator=generator)]
    draw = draw_augmentation(len(order), recipe["AUG"], generator)
    torch.manual_seed(_seed(seed, "dropout", epoch))
    model.train()
    total = torch.zeros((), device=device)
    start = 0
    for batch in tqdm(batches_of(order, recipe["BATCH_SIZE"]), f"epoch {epoch + 1}", leave=False, disable=None):
        stop = start + len(batch)
        at = batch.to(patches.device)
        images = augment(patches[at].to(device, non_blocking=True), draw[start:stop])
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            predicted = model(images.contiguous(memory_format=torch.channels_last))
        loss = F.mse_loss(predicted.float(), target[batch.to(target.device)])
        optimiser.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        total += loss.detach() * len(batch)
        start = stop
    return total.item() / len(order)  # the epoch's only synchronisation


def fit(model, patches, target, train_rows, valid_rows, *, recipe, seed, dtype, checkpoint=None, report=None):
    """Train; leave the weights of the epoch with the lowest validation MSE in `model`; return the history.

    patches (N, 3, S, S) uint8, target (N, G) float32 array, rows int64 arrays. `checkpoint` is a file that a killed
    run goes on from. `report(epoch, predicted)` sees each epoch's validation prediction and returns more columns.
    """
    device = next(model.parameters()).device
    optimiser = torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad], recipe["LEARNING_RATE"], fused=True
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    truth = torch.from_numpy(target).to(device)
    rows = torch.from_numpy(train_rows)
    history, best = [], None
    if checkpoint is not None and checkpoint.is_file():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        scaler.load_state_dict(state["scaler"])
        history, best = state["history"], state["best"]
        print(f"going on after epoch {len(history)} of {recipe['EPOCHS']} ({checkpoint})")
    for epoch in range(len(history), recipe["EPOCHS"]):
        began = time.perf_counter()
        rate = learning_rate_at(epoch, recipe["EPOCHS"], recipe["LEARNING_RATE"])
        for group in optimiser.param_groups:
            group["lr"] = rate
        loss = train_epoch(model, optimiser, scaler, patches, truth, rows, recipe, seed, epoch, dtype)
        trained = time.perf_counter() - began
        predicted = predict(model, patches, valid_rows, dtype=dtype)
        mse = float(np.mean((predicted.astype(np.float64) - target[valid_rows]) ** 2))
        if not np.isfinite(mse):
            raise InputError(f"epoch {epoch + 1}: the validation MSE is {mse}: lower LEARNING_RATE ({rate:g})")
        line = {"epoch": epoch + 1, "learning_rate": float(rate), "train_mse": loss, "valid_mse": mse}
        line |= {"images_per_s": len(rows) / trained, "seconds": time.perf_counter() - began}
        if best is None or mse < best["valid_mse"]:
            weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
            best = {"epoch": epoch + 1, "valid_mse": mse, "weights": weights}
        history.append(line | (report(line, predicted, best["epoch"]) if report else {}))
        if checkpoint is not None:
            with whole_file(checkpoint) as path:
                state = {"model": model.state_dict(), "optimiser": optimiser.state_dict()}
                torch.save(state | {"scaler": scaler.state_dict(), "history": history, "best": best}, path)
    model.load_state_dict(best["weights"])
    return history


# ------------------------------------------------------------------------------------------- prediction


@torch.inference_mode()
def predict(model, patches, rows, *, dtype, tta=False, batch_size=EVAL_BATCH):
    """(len(rows), G) float32 expression; with `tta` the mean over the 8 symmetries of every patch."""
    device = next(model.parameters()).device
    model.eval()
    codes = torch.cartesian_prod(*[torch.tensor([False, True])] * 3) if tta else torch.zeros((1, 3), dtype=torch.bool)
    parts = []
    for batch in torch.from_numpy(np.asarray(rows)).split(batch_size):
        images = patches[batch.to(patches.device)].to(device, non_blocking=True)
        total = 0
        for code in codes:
            seen = apply_symmetry(images, code.expand(len(images), 3)).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                total = total + model(seen).float()
        parts.append(total / len(codes))
    return torch.cat(parts).cpu().numpy()


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


def predict_ridge(features, target, train_rows, rows, alpha=100.0):
    """Ridge regression on standardised features: (len(rows), G) float32 predicted from (N, K) features."""
    ridge = make_pipeline(StandardScaler(), Ridge(alpha)).fit(features[train_rows], target[train_rows])
    return ridge.predict(features[rows]).astype(np.float32)


# ------------------------------------------------------------------------------------------- correlation


def pearson_per_gene(predicted, truth):
    """Pearson r of every column, (n, G) and (n, G) -> (G,) float64.

    NaN where r is undefined: a constant or non-finite column, or fewer than two spots. Never 0 in its place.
    """
    predicted, truth = np.array(predicted, np.float64), np.array(truth, np.float64)
    if predicted.shape != truth.shape or predicted.ndim != 2:
        raise ValueError(f"predicted {predicted.shape} and truth {truth.shape} must be one (n, G)")
    if len(truth) < 2:
        return np.full(truth.shape[1], np.nan)
    constant = (np.ptp(predicted, axis=0) == 0) | (np.ptp(truth, axis=0) == 0)
    predicted -= predicted.mean(0)
    truth -= truth.mean(0)
    products = [np.einsum("ng,ng->g", a, b) for a, b in ((predicted, truth), (predicted, predicted), (truth, truth))]
    with np.errstate(divide="ignore", invalid="ignore"):  # 0/0 of a constant column is the NaN that it should be
        r = products[0] / np.sqrt(products[1] * products[2])
    r[constant] = np.nan
    return np.clip(r, -1, 1)


def score_genes(predicted, truth, slides):
    """Per gene (G rows): r (mean over slides of the r within each), r_pooled (all spots together) and mse."""
    within = np.stack([pearson_per_gene(predicted[slides == s], truth[slides == s]) for s in np.unique(slides)])
    defined = np.isfinite(within).sum(0)
    r = np.where(defined > 0, np.nansum(within, axis=0) / np.maximum(defined, 1), np.nan)
    mse = np.mean((predicted.astype(np.float64) - truth) ** 2, axis=0)
    return pd.DataFrame({"r": r, "r_pooled": pearson_per_gene(predicted, truth), "mse": mse})


def group_means(per_gene, genes, groups, column="r"):
    """{"heg": mean r, "heg_n": genes it is the mean of, ...}: missing genes and undefined r lower the count."""
    r = pd.Series(per_gene[column].to_numpy(), index=genes)
    means = {}
    for group in GROUPS:
        values = r.reindex(groups.loc[groups["group"] == group, "gene"]).dropna()
        means |= {group.lower(): values.mean() if len(values) else np.nan, f"{group.lower()}_n": len(values)}
    return means | {"all": r.mean(), "all_n": int(r.notna().sum())}


# ------------------------------------------------------------------------------------------- reporting


def row_folder(out, setting, recipe, seed, data):
    """`<out>/<setting>-<hash>`: the hash is over the data and every constant that can change the row."""
    unhashed = ("OUT", "ONLY", "QUICK", "DATA_ROOT", "SEEDS")
    facts = {name: value for name, value in recipe.items() if name not in unhashed}
    key = hashlib.sha256(json.dumps([setting, facts, seed, data.fingerprint], sort_keys=True).encode()).hexdigest()
    return Path(out) / f"{re.sub(r'[^A-Za-z0-9.=]+', '_', setting).strip('_')}-{key[:10]}"


def finished_rows(folder):
    """The rows of a setting that is on disk, else None."""
    path = folder / "rows.json"
    return json.loads(path.read_text()) if path.is_file() else None


def train_and_score(setting, recipe, *, data, roles, groups, source, out, seed):
    """Train one setting, or take it from disk, and return its rows; all its files are in its own folder."""
    folder = row_folder(out, setting, recipe, seed, data)
    if (rows := finished_rows(folder)) is not None:
        print(f"{setting}: on disk already ({folder})")
        return rows
    began = time.perf_counter()
    device, dtype, _ = choose_device(recipe)
    train_rows, valid_rows, test_rows = (np.flatnonzero(roles == role) for role in ("train", "valid", "test"))
    start = data.target[train_rows].mean(0) if recipe["START_AT_MEAN"] else None
    model = build_model(recipe["BACKBONE"], len(data.genes), recipe["HIDDEN"], recipe["PRETRAINED"], seed, start)
    model.to(device, memory_format=torch.channels_last)
    patches = place_patches(resize_patches(data.patches, recipe["IMAGE_SIZE"]), device)
    slides = data.spots["tissue_index"].to_numpy()

    def report(line, predicted, best_epoch):
        heg = group_means(score_genes(predicted, data.target[valid_rows], slides[valid_rows]), data.genes, groups)["heg"]
        mark = "*" if line["epoch"] == best_epoch else " "
        if line["epoch"] == 1:
            print("epoch   learning rate   train MSE   valid MSE   valid HEG r   images/s   seconds   (* best so far)")
        print(
            f"{line['epoch']:4}{mark} {line['learning_rate']:15.2e} {line['train_mse']:11.5f} {line['valid_mse']:11.5f}"
            f" {heg:13.3f} {line['images_per_s']:10.1f} {line['seconds']:9.1f}",
            flush=True,
        )
        return {"valid_heg": heg}

    history = fit(
        model, patches, data.target, train_rows, valid_rows,
        recipe=recipe, seed=seed, dtype=dtype, checkpoint=folder / "checkpoint.pt", report=report,
    )  # fmt: skip
    rows = np.concatenate([valid_rows, test_rows])
    predicted = predict(model, patches, rows, dtype=dtype, tta=recipe["TTA"])
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else _peak_memory()
    facts = {
        "backbone": recipe["BACKBONE"],
        "weights": "pretrained" if recipe["PRETRAINED"] else "random",
        "best_epoch": min(history, key=lambda line: line["valid_mse"])["epoch"],
        "seconds": time.perf_counter() - began,
        "images_per_s": float(np.median([line["images_per_s"] for line in history])),
        "peak_memory_mb": peak / 2**20,
        **{f"parameters_{part}": count for part, count in count_parameters(model).items()},
    }
    metadata = {
        "recipe": recipe, "genes": data.genes, "um_per_px": data.meta["um_per_px"], "patch_size": PATCH_SIZE,
        "mean": model.mean.flatten().tolist(), "std": model.std.flatten().tolist(), "fingerprint": data.fingerprint,
    }  # fmt: skip
    with whole_file(folder / "weights.safetensors") as path:
        state = {name: value.contiguous() for name, value in model.state_dict().items()}
        safetensors.torch.save_file(state, path, {name: json.dumps(value) for name, value in metadata.items()})
    with whole_file(folder / "history.csv") as path:
        pd.DataFrame(history).to_csv(path, index=False)
    draw_history(folder / "loss.png", history, _title(setting, data))
    return write_rows(
        folder, setting, recipe, predicted, rows,
        data=data, roles=roles, groups=groups, source=source, seed=seed, facts=facts,
    )  # fmt: skip


def _peak_memory():
    """Peak resident memory of this process, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def ridge_and_score(recipe, *, data, roles, groups, source, out, seed):
    """The baseline that no image network may lose to: ridge regression on 40 colour statistics of the patch."""
    setting = "ridge (colour)"
    used = {name: recipe[name] for name in ("TARGET", "PROTOCOL", "TRAIN_SLIDES", "TEST_SLIDE", "VALID_FRACTION")}
    folder = row_folder(out, setting, used, seed, data)
    if (rows := finished_rows(folder)) is not None:
        return rows
    began = time.perf_counter()
    rows = np.flatnonzero((roles == "valid") | (roles == "test"))
    features = colour_statistics(data.patches)
    predicted = predict_ridge(features, data.target, np.flatnonzero(roles == "train"), rows)
    facts = {"weights": "none", "seconds": time.perf_counter() - began}
    return write_rows(
        folder, setting, used, predicted, rows,
        data=data, roles=roles, groups=groups, source=source, seed=seed, facts=facts,
    )  # fmt: skip


def write_rows(folder, setting, recipe, predicted, rows, *, data, roles, groups, source, seed, facts):
    """Score a prediction of the spots `rows` and write the setting's folder; rows.json comes last and marks it whole."""
    truths = {"lognorm": data.lognorm} | ({"harmony": data.target} if recipe["TARGET"] == "harmony" else {})
    slides = data.spots["tissue_index"].to_numpy()
    table, per_gene = [], pd.DataFrame({"gene": data.genes})
    for split in ("valid", "test"):
        at = roles[rows] == split
        for truth_name, truth in reversed(truths.items()):
            scores = score_genes(predicted[at], truth[rows][at], slides[rows][at])
            for column in scores:
                per_gene[f"{split}_{truth_name}_{column}"] = scores[column]
            pooled = group_means(scores, data.genes, groups, "r_pooled")
            shown = np.unique(slides[rows][at]).tolist()
            table.append(
                {
                    "setting": setting,
                    "split": split,
                    "slide": ",".join(map(str, shown)),
                    "fold": 0,
                    "seed": seed,
                    "target": recipe["TARGET"],
                    "truth": truth_name,
                    "protocol": recipe["PROTOCOL"],
                    "gene_lists": source,
                    "n_spots": int(at.sum()),
                    **group_means(scores, data.genes, groups),
                    **{f"{group}_pooled": pooled[group] for group in ("heg", "hvg", "mg", "all")},
                    "n_genes_r30": int((scores["r"] >= R_THRESHOLD).sum()),
                    "mse": scores["mse"].mean(),
                    **facts,
                }
            )
    with whole_file(folder / "per_gene.csv") as path:
        per_gene.to_csv(path, index=False)
    with whole_file(folder / "split.csv") as path:
        pd.DataFrame({"id": data.spots["id"], "role": roles, "fold": 0})[roles != ""].to_csv(path, index=False)
    with whole_file(folder / "genes.csv") as path:
        groups.to_csv(path, index=False)
    with whole_file(folder / "recipe.json") as path:
        path.write_text(json.dumps(recipe | {"seed": seed, "fingerprint": data.fingerprint}, indent=1) + "\n")
    write_predictions(folder / "predictions.h5ad", predicted, rows, data, roles, per_gene)
    draw_maps(folder / "maps.png", predicted, rows, data, roles, groups, per_gene, setting)
    draw_ranked_r(folder / "r_ranked.png", per_gene, groups, _title(setting, data))
    table = json.loads(pd.DataFrame(table).to_json(orient="records", double_precision=15))  # NaN -> null
    with whole_file(folder / "rows.json") as path:
        path.write_text(json.dumps(table, indent=1) + "\n")
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    return table


def write_predictions(path, predicted, rows, data, roles, per_gene):
    """AnnData of the validation and test spots: X predicted; layers lognorm and target; var per-gene scores."""
    obs = data.spots.iloc[rows].set_index("id").assign(role=roles[rows])
    table = anndata.AnnData(
        predicted,
        obs=obs,
        var=per_gene.set_index("gene"),
        layers={"lognorm": data.lognorm[rows], "target": data.target[rows]},
        obsm={"spatial": obs[["pxl_col", "pxl_row"]].to_numpy(np.float64)},
    )
    with whole_file(path) as partial:
        table.write_h5ad(partial)


def _title(text, data):
    return f"SIMULATED slides: {text}" if data.simulated else text


def _save_figure(figure, path):
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=110)


def draw_history(path, history, title):
    """Loss curves; the vertical line is the epoch whose weights are kept."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    table = pd.DataFrame(history)
    axes.plot(table["epoch"], table["train_mse"], label="training (augmented, dropout)")
    axes.plot(table["epoch"], table["valid_mse"], label="validation")
    axes.axvline(table["epoch"][table["valid_mse"].idxmin()], color="grey", linewidth=0.8, label="kept")
    axes.set(xlabel="epoch", ylabel="MSE over the panel", title=title)
    axes.legend(frameon=False)
    _save_figure(figure, path)


def draw_ranked_r(path, per_gene, groups, title):
    """r of all genes on the test slide, sorted; the gene groups marked."""
    column = next(c for c in per_gene if c.startswith("test_") and c.endswith("_r"))
    ranked = per_gene.set_index("gene")[column].dropna().sort_values(ascending=False)
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(np.arange(1, len(ranked) + 1), ranked, color="0.6", linewidth=1)
    for group, colour in zip(GROUPS, ("tab:red", "tab:blue", "tab:green"), strict=True):
        at = ranked.index.isin(groups.loc[groups["group"] == group, "gene"])
        axes.plot(np.flatnonzero(at) + 1, ranked[at], ".", color=colour, label=group)
    axes.axhline(R_THRESHOLD, color="black", linewidth=0.6, linestyle=":")
    truth = column.split("_")[1]
    axes.set(xlabel="gene, by r", ylabel=f"Pearson r, test slide\n({truth} truth)", title=title)
    axes.legend(frameon=False)
    _save_figure(figure, path)


def draw_maps(path, predicted, rows, data, roles, groups, per_gene, setting):
    """Measured beside predicted expression on the test slide: the best, a median and the best marker gene."""
    column = next(c for c in per_gene if c.startswith("test_") and c.endswith("_r"))
    ranked = per_gene.set_index("gene")[column].dropna().sort_values(ascending=False)
    markers = ranked[ranked.index.isin(groups.loc[groups["group"] == "MG", "gene"])]
    chosen = dict([("best", ranked.index[:1]), ("median", ranked.index[len(ranked) // 2 :][:1]), ("marker", markers.index[:1])])
    chosen = {label: names[0] for label, names in chosen.items() if len(names)}
    if not chosen:
        return  # a constant prediction has no r and nothing to map
    at = roles[rows] == "test"
    spots = data.spots.iloc[rows[at]]
    truth = data.target if column.startswith("test_harmony") else data.lognorm
    figure = Figure(figsize=(3.4 * len(chosen), 6.2), layout="constrained")
    axes = figure.subplots(2, len(chosen), squeeze=False)
    extent = max(np.ptp(spots["pxl_col"]), np.ptp(spots["pxl_row"]), 1) + data.pitch_px
    size = (0.9 * data.pitch_px / extent * 3.0 * 72) ** 2  # pt^2 of a marker as wide as the pitch, on 3 inches
    for column_axes, (label, gene) in zip(axes.T, chosen.items(), strict=True):
        g = data.genes.index(gene)
        for ax, name, values in zip(column_axes, ("measured", "predicted"), (truth[rows[at], g], predicted[at, g]), strict=True):
            shown = ax.scatter(spots["pxl_col"], spots["pxl_row"], c=values, s=size, cmap="viridis", linewidths=0)
            figure.colorbar(shown, ax=ax, shrink=0.7)
            ax.set_aspect("equal")
            ax.invert_yaxis()
            ax.set_axis_off()
            ax.set_title(f"{gene} ({label}), {name}" + (f", r = {ranked[gene]:.2f}" if name == "predicted" else ""), size=9)
    figure.suptitle(_title(f"{setting}, test slide {spots['tissue_index'].iloc[0]}", data), size=10)
    _save_figure(figure, path)


def print_header(script_name, recipe, data, roles, groups, source):
    """What is run on what: data, target, protocol, split, gene groups, machine and weights."""
    device, dtype, reason = choose_device(recipe)
    slides = data.spots["tissue_index"]
    count = {role: int((roles == role).sum()) for role in ("train", "valid", "test")}
    of = {role: ",".join(map(str, sorted(slides[roles == role].unique()))) for role in count}
    missing = {
        group: sorted(set(part["gene"]) - set(data.genes)) for group, part in groups.groupby("group", sort=False)
    }
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    harmony = "Harmony over all slides, the test slide included" if recipe["TARGET"] == "harmony" else "log1p of counts per 10,000"
    print(f"\n{script_name}{'   SIMULATED slides' if data.simulated else ''}")
    print(f"data        {data.root}: {slides.nunique()} slides, {len(slides):,} spots x {len(data.genes):,} genes")
    print(f"target      {recipe['TARGET']} ({harmony})")
    print(f"protocol    {recipe['PROTOCOL']} (as published: the panel is chosen on all slides, so transductive)")
    print(f"split       {count['train']} training and {count['valid']} validation spots of slides {of['train']};"
          f" {count['test']} test spots of slide {of['test']}")  # fmt: skip
    print(f"gene groups {source}" + "".join(f"; {g}: not in the panel: {', '.join(m)}" for g, m in missing.items() if m))
    print(f"device      {device.type} ({where}), {str(dtype).removeprefix('torch.')} ({reason})")


def print_parameters(recipe, n_genes):
    """The model's size and the weights it starts from."""
    with torch.device("meta"):
        count = count_parameters(build_model(recipe["BACKBONE"], n_genes, recipe["HIDDEN"], False, 0))
    print(f"weights     {'ImageNet (timm)' if recipe['PRETRAINED'] else 'random: no pretraining'}")
    print(f"model       {recipe['BACKBONE']} at {recipe['IMAGE_SIZE']} px: {count['backbone'] / 1e6:.1f} M in the backbone, "
          f"{count['total'] / 1e6:.1f} M with the head")  # fmt: skip


TABLE_COLUMNS = {  # row key: (heading, width, format)
    "setting": ("setting", -24, "s"),
    "split": ("split", -6, "s"),
    "truth": ("truth", -8, "s"),
    "n_spots": ("spots", 6, "d"),
    "heg": ("HEG", 7, ".3f"),
    "hvg": ("HVG", 7, ".3f"),
    "mg": ("MG", 7, ".3f"),
    "all": ("all", 7, ".3f"),
    "heg_pooled": ("pooled", 7, ".3f"),
    "n_genes_r30": ("r>=.30", 7, "d"),
    "mse": ("MSE", 8, ".4f"),
    "seconds": ("seconds", 8, ".0f"),
}


def print_table(title, rows):
    """One ruled table; a group mean over fewer genes than the group has shows their number, as 0.31/47."""
    lines = []
    for row in rows:
        cells = []
        for key, (_, width, form) in TABLE_COLUMNS.items():
            value = row.get(key)
            cells.append(f"{'-' if value is None else format(value, form):{'<' if width < 0 else '>'}{abs(width)}}")
        lines.append(" ".join(cells))
    head = " ".join(f"{h:{'<' if w < 0 else '>'}{abs(w)}}" for h, w, _ in TABLE_COLUMNS.values())
    print(f"\n{title}\n{'=' * len(head)}\n{head}\n{'-' * len(head)}")
    print("\n".join(lines))
    print("=" * len(head))


def finish_run(script, out, data, rows):
    """Rewrite <out>/rows.csv from all rows on disk and print the one JSON line that ends every script's output."""
    on_disk = [row for path in sorted(Path(out).glob("*/rows.json")) for row in json.loads(path.read_text())]
    with whole_file(Path(out) / "rows.csv") as path:
        pd.DataFrame(on_disk).to_csv(path, index=False)
    result = {"script": Path(script["__file__"]).stem, "data_root": str(data.root), "simulated": data.simulated}
    print(json.dumps(result | {"out": str(out), "rows": rows}))
