"""Everything that two scripts share, in the order in which the data flows:
conventions -> run set-up -> dataset -> augmentation -> model -> training -> prediction -> correlation -> reporting

Shapes: N spots, G genes, B patches of a batch, S px a side. A `recipe` is the plain dict of a script's constants.
"""

import argparse
import hashlib
import json
import math
import os
import re
import resource
import sys
import time
import urllib.error
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
from huggingface_hub import constants as hub
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
R_THRESHOLD = 0.30  # the paper counts the genes above it

# What a constant may be: a tuple of the allowed values, or the two ends of a range.
ALLOWED = {
    "TARGET": ("harmony", "lognorm"), "PROTOCOL": ("paper",), "AUG": ("mpa", "stnet", "none"),
    "DEVICE": ("auto", "cpu", "cuda"), "PRECISION": ("auto", "bf16", "fp16", "fp32"),
    "DATASET": ("GSE240429", "HER2ST"), "VALID_FRACTION": range(0, 1), "HIDDEN": range(0, 10**6),
    "IMAGE_SIZE": range(32, 4096), "EPOCHS": range(1, 10**6), "BATCH_SIZE": range(2, 10**6),
    "LEARNING_RATE": range(0, 1), "SPOTS": range(2, 10**6), "SLIDES": range(1, 1000),
    "HVG_PER_SLIDE": range(1, 10**6), "DEPTH": range(1, 10**9), "DISPERSION": range(0, 100),
}  # fmt: skip


class InputError(Exception):
    """The user's input is at fault. Its one line names the file or value, what was expected and the fix."""


@contextmanager
def whole_file(path):
    """Give a temporary path beside `path`; rename it to `path` on success, remove it otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")  # keeps the suffix, which writers look at
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def seed_of(*words):
    """A seed that depends on the words alone, as seed_of(42, "epoch", 3): what ran before does not matter."""
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:8], "little") >> 1


# ------------------------------------------------------------------------------------------- run set-up
def recipe_of(script):
    """{name: value} of the constants in a script's ruled block as they stand now; a run is saved with them."""
    return {name: script[name] for name, _ in _constant_lines(script)}


def _constant_lines(script):
    block = re.split(r"^# -{20,}.*$", Path(script["__file__"]).read_text(), flags=re.MULTILINE)[1]
    return re.findall(r"^([A-Z][A-Z0-9_]*) = .*?(?:  # (.*))?$", block, flags=re.MULTILINE)


def _parse_constant(flag, text, default):
    """The command line's text as a value of the default's type; an empty tuple takes whole numbers."""
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(default, tuple):
            kind = type(default[0]) if default else int
            return tuple(kind(part) for part in text.split(",") if part)
        return type(default)(text)
    except (KeyError, ValueError):
        raise InputError(f"{flag} {text}: expected {type(default).__name__} like {default!r}") from None


def override_constants(script, argv):
    """Set a script's constants from the command line, `--quick`'s QUICK_BUDGET first. Prints what changed."""
    raw = argparse.RawDescriptionHelpFormatter  # keeps the docstring's lines
    parser = argparse.ArgumentParser(None, None, script["__doc__"], formatter_class=raw, allow_abbrev=False)
    parser.exit_on_error = False
    flags = {}
    for name, comment in _constant_lines(script):
        flags[name], value = "--" + name.lower().replace("_", "-"), script[name]
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        bare = {"nargs": "?", "const": "true"} if isinstance(value, bool) else {}
        parser.add_argument(flags[name], dest=name, metavar="", help=f"{comment} [{shown}]".replace("%", "%%"), **bare)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        close = [*get_close_matches(unknown[0].split("=")[0], flags.values(), 1), "--help, which lists the constants"]
        raise InputError(f"{Path(script['__file__']).name} has no constant {unknown[0]}: did you mean {close[0]}?")
    texts = {name: text for name, text in vars(given).items() if text is not None}
    values = {name: _parse_constant(flags[name], text, script[name]) for name, text in texts.items()}
    if values.get("QUICK", script.get("QUICK", False)):
        values = script["QUICK_BUDGET"] | values
    for name, value in values.items():
        if value != script[name]:
            print(f"{name} = {value!r}")
    script.update(values)
    for name in flags:
        value, allowed = script[name], ALLOWED.get(name)
        if isinstance(allowed, tuple) and value not in allowed:
            raise InputError(f"{flags[name]} {value}: expected one of {', '.join(allowed)}")
        if isinstance(allowed, range) and not allowed.start <= value <= allowed.stop:
            raise InputError(f"{flags[name]} {value}: expected a number from {allowed.start} to {allowed.stop}")


def run_script(script):
    """Apply the command line to a script's globals and call its main(). Ends the process with 2 on an InputError."""
    try:
        override_constants(script, sys.argv[1:])
        script["main"]()
    except (InputError, argparse.ArgumentError) as error:
        print("error:", *str(error).split(), file=sys.stderr)  # one line, whatever a library's message held
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: run the same command again", file=sys.stderr)
        sys.exit(130)


def choose_device(recipe):
    """(torch.device, autocast dtype, reason) from DEVICE, PRECISION and IMAGE_SIZE."""
    cuda = torch.cuda.is_available() and recipe["DEVICE"] != "cpu"
    if recipe["DEVICE"] == "cuda" and not cuda:
        raise InputError("--device cuda: torch sees no CUDA device; use --device cpu")
    device = torch.device("cuda" if cuda else "cpu")
    if recipe["PRECISION"] == "fp16" and not cuda:
        raise InputError("--precision fp16: needs a GPU, since it trains with a loss scaler; use bf16 or fp32")
    if recipe["PRECISION"] != "auto":
        choice, reason = recipe["PRECISION"], "as asked"
    elif cuda:
        has = torch.cuda.is_bf16_supported(including_emulation=False)
        choice, reason = ("bf16", "the GPU has it") if has else ("fp16", "the GPU lacks bf16; with a loss scaler")
    elif not torch.cpu._is_avx512_bf16_supported():
        choice, reason = "fp32", "the processor lacks bf16"
    elif recipe["IMAGE_SIZE"] < 160:
        choice, reason = "fp32", "measured faster than bf16 on processors below 160 px"
    else:
        choice, reason = "bf16", "the processor has it"
    return device, {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[choice], reason


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
    colour: np.ndarray  # (N, 40) float64, colour and texture statistics of every patch
    meta: dict  # meta.json of script 19
    fingerprint: str  # of meta.json, which holds hashes of the sources


def log_normalise(counts, totals):
    """log1p of counts scaled to 10,000 a spot: (N, G) counts, (N,) totals over ALL genes -> (N, G) float32."""
    scale = 1e4 / np.maximum(np.asarray(totals, np.float64), 1)
    dense = counts.toarray() if scipy.sparse.issparse(counts) else np.asarray(counts)
    return np.log1p(dense * scale[:, None]).astype(np.float32)


def load_dataset(data_root, target):
    """Read what script 19 wrote. Raises InputError with 19's command where it is missing or made otherwise."""
    root, folder = Path(data_root), Path(data_root) / "dataset"
    command = f"python 19_make_patches_and_csv.py --data-root {data_root}"
    if not (folder / "meta.json").is_file():
        raise InputError(f"no meta.json in {folder}: run {command} first")
    meta_text = (folder / "meta.json").read_bytes()
    meta = json.loads(meta_text)
    if meta["target"] is None:
        raise InputError(f"{folder} holds patches alone: its slides.csv names no matrix, so there is nothing to learn")
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
    spots = pd.DataFrame({name: table[name].to_numpy() for name in ID_COLUMNS})
    expression = lognorm if target == "lognorm" else table.select(genes).to_numpy()
    fingerprint = hashlib.sha256(meta_text).hexdigest()[:16]
    return SpotData(root, patches, spots, genes, expression, lognorm, counts.obsm["colour"], meta, fingerprint)


def split_random(spots, train_slides, test_slide, valid_fraction, seed):
    """The paper's split: (N,) array of "train", "valid", "test" or "" (a slide that takes no part). The training
    slides' spots are pooled and `valid_fraction` of them drawn at random for validation.
    """
    slides = sorted(spots["tissue_index"].unique())
    train_slides = train_slides or tuple(s for s in slides if s != test_slide)
    if unknown := {*train_slides, test_slide} - set(slides):
        raise InputError(f"slide {min(unknown)} is not in the dataset: it holds slides {', '.join(map(str, slides))}")
    if test_slide in train_slides:
        raise InputError(f"slide {test_slide} is both in TRAIN_SLIDES and TEST_SLIDE: choose another one")
    roles = np.where(spots["tissue_index"] == test_slide, "test", "").astype("U5")
    pool = np.flatnonzero(spots["tissue_index"].isin(train_slides))
    n_valid = round(valid_fraction * len(pool))
    if not 0 < n_valid < len(pool) - 1:
        raise InputError(f"--valid-fraction {valid_fraction} of {len(pool)} spots leaves validation or training none")
    order = np.random.default_rng(seed_of(seed, "split")).permutation(pool)
    roles[order[:n_valid]], roles[order[n_valid:]] = "valid", "train"
    return roles


def choose_gene_groups(data, roles):
    """(table `group, gene, rank` of HEG, HVG and MG, where it comes from): the data root's gene_sets.csv, else the
    50 genes of the panel with the highest mean and variance of log-normalised expression over the training spots.
    """
    path = data.root / "gene_sets.csv"
    if path.is_file():
        try:
            table = pd.read_csv(path)[["group", "gene"]].dropna()
        except (ValueError, KeyError):
            table = pd.DataFrame({"group": [""]})
        if not set(table["group"]) <= set(GROUPS):
            raise InputError(f"{path}: expected the columns group, gene and the groups {', '.join(GROUPS)}")
        return table.assign(rank=table.groupby("group").cumcount() + 1)[["group", "gene", "rank"]], path.name
    train = data.lognorm[roles == "train"].astype(np.float64)
    parts = {"HEG": train.mean(0), "HVG": train.var(0)}
    lists = {group: [data.genes[g] for g in np.argsort(-v, kind="stable")[:GROUP_SIZE]] for group, v in parts.items()}
    lists["MG"] = list(MARKER_GENES)
    rows = [(group, gene, rank) for group, names in lists.items() for rank, gene in enumerate(names, 1)]
    return pd.DataFrame(rows, columns=["group", "gene", "rank"]), "training spots"


def resize_patches(patches, size, device="cpu"):
    """(N, 224, 224, 3) uint8 array -> (N, 3, size, size) uint8 tensor in channels-last memory, antialiased; on the
    device where it fills at most half of the free memory, else on the CPU: at 224 px the memory map itself.
    """
    resized = torch.from_numpy(patches)
    if size != patches.shape[1]:
        resized = torch.empty((len(patches), size, size, 3), dtype=torch.uint8)
        for start in range(0, len(patches), 256):
            chunk = torch.from_numpy(patches[start : start + 256]).permute(0, 3, 1, 2).float()
            chunk = F.interpolate(chunk, size=(size, size), mode="bilinear", antialias=True).round().clamp(0, 255)
            resized[start : start + 256] = chunk.to(torch.uint8).permute(0, 2, 3, 1)
    device = torch.device(device)
    if device.type == "cuda" and resized.nbytes < 0.5 * torch.cuda.mem_get_info(device)[0]:
        resized = resized.to(device)
    return resized.permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------- augmentation
def draw_augmentation(n, preset, generator):
    """Parameters for n patches, on the CPU: symmetry (n, 3) bool, warped (n,) bool, affine (n, 2, 3) float32.
    Symmetry is flip left-right, flip up-down, transpose, in this order; affine maps output (x, y, 1) in [-1, 1] to
    input (x, y), as F.affine_grid takes it. Presets: "mpa" (each symmetry p = .5, then p = .5 one warp of shift within
    10 % of the side, scale 0.9-1.1 and rotation within 30 degrees), "stnet" (the 8 symmetries alone), "none".
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
    left_right, up_down, transpose = symmetry.to(patches.device)[:, :, None, None, None].unbind(1)
    patches = torch.where(left_right, patches.flip(3), patches)
    patches = torch.where(up_down, patches.flip(2), patches)
    return torch.where(transpose, patches.transpose(2, 3), patches)


def augment(patches, symmetry, warped, affine):
    """(B, 3, S, S) uint8 -> (B, 3, S, S) float32 in 0..255: symmetries, then one bilinear resample where warped."""
    images = apply_symmetry(patches, symmetry).float()
    rows = warped.nonzero().squeeze(1)  # found on the CPU: on the GPU it would cost a synchronisation
    if len(rows):
        affine, rows = (part.to(images.device, non_blocking=True) for part in (affine[rows], rows))
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


def build_model(recipe, n_genes, seed, start=None):
    """timm BACKBONE with the paper's head, Dropout - Linear - ReLU - Dropout - Linear; HIDDEN = 0 is one Linear.

    Same seed, same weights; `start` (G,) is an output bias. InputError for an unknown name or weights not to be had.
    """
    import timm  # here, because it takes seconds to import and scripts 17-19 do without

    backbone, hidden, pretrained = recipe["BACKBONE"], recipe["HIDDEN"], recipe["PRETRAINED"]
    if pretrained:  # where the hub does not answer, read its cache only: the client would retry for most of a minute
        try:
            urllib.request.urlopen(urllib.request.Request(hub.ENDPOINT, method="HEAD"), timeout=10).close()
        except OSError as error:
            hub.HF_HUB_OFFLINE = not isinstance(error, urllib.error.HTTPError)  # which is an answer, too
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "weights"))
        try:
            body = timm.create_model(backbone, pretrained=pretrained, num_classes=0)
        except (OSError, RuntimeError) as error:
            fix = (
                "connect to the network once, or use --pretrained false"
                if pretrained
                else "choose a name that timm has"
            )
            raise InputError(f"--backbone {backbone}: {str(error).splitlines()[0][:120]}; {fix}") from None
        width = getattr(body, "head_hidden_size", None) or body.num_features  # of what comes out: VGG, MobileNetV3
        layers = [nn.Dropout(0.5), nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(0.5)] if hidden else []
        head = nn.Sequential(*layers, nn.Linear(hidden or width, n_genes))
    if start is not None:
        head[-1].bias.data.copy_(torch.from_numpy(start))
    return SpotRegressor(body, head, body.pretrained_cfg["mean"], body.pretrained_cfg["std"])


def count_parameters(model):
    """{"backbone", "total", "trainable"}: numbers of parameters."""
    size = lambda module, *kinds: sum(p.numel() for p in module.parameters() if p.requires_grad in kinds)  # noqa: E731
    return {"backbone": size(model.backbone, 0, 1), "total": size(model, 0, 1), "trainable": size(model, 1)}


# ------------------------------------------------------------------------------------------- training
def learning_rate_at(epoch, epochs, base):
    """Cosine from `base` in epoch 0 to zero after the last one; stepped by the epoch, never by the loss."""
    return base * 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def batches_of(order, batch_size):
    """Split row indices into batches; a last batch of one joins the one before, since BatchNorm needs two."""
    parts = list(order.split(batch_size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def train_epoch(model, optimiser, scaler, patches, target, rows, recipe, seed, epoch, dtype):
    """One pass over `rows`; returns the mean training loss. Everything random follows from (seed, epoch)."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed_of(seed, "epoch", epoch))
    order = rows[torch.randperm(len(rows), generator=generator)]
    draw = draw_augmentation(len(order), recipe["AUG"], generator)
    torch.manual_seed(seed_of(seed, "dropout", epoch))
    model.train()
    total, start = torch.zeros((), device=device), 0
    for batch in tqdm(batches_of(order, recipe["BATCH_SIZE"]), f"epoch {epoch + 1}", leave=False, disable=None):
        stop = start + len(batch)
        images = augment(
            patches[batch.to(patches.device)].to(device, non_blocking=True), *(part[start:stop] for part in draw)
        )
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


def fit(
    model, patches, target, train_rows, valid_rows, *, recipe, seed, dtype, checkpoint=None, report=lambda *_: None
):
    """Train; leave the weights of the epoch with the lowest validation MSE in `model`; return the history.
    patches (N, 3, S, S) uint8, target (N, G) float32 array, rows int64 arrays. `checkpoint` is a file that a killed
    run goes on from. `report(line, predicted, best_epoch)` sees each epoch's line of the history and may add to it.
    """
    device = next(model.parameters()).device
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(trainable, recipe["LEARNING_RATE"], fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    stateful = {"model": model, "optimiser": optimiser, "scaler": scaler}
    truth, rows = torch.from_numpy(target).to(device), torch.from_numpy(train_rows)
    history, best = [], None
    if checkpoint is not None and checkpoint.is_file():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        for part, owner in stateful.items():
            owner.load_state_dict(state[part])
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
        line = {"epoch": epoch + 1, "learning_rate": rate, "train_mse": loss, "valid_mse": mse}
        line |= {"images_per_s": len(rows) / trained, "seconds": time.perf_counter() - began}
        if best is None or mse < best["valid_mse"]:
            weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
            best = {"epoch": epoch + 1, "valid_mse": mse, "weights": weights}
        report(line, predicted, best["epoch"])
        history.append(line)
        if checkpoint is not None:
            with whole_file(checkpoint) as path:
                state = {part: owner.state_dict() for part, owner in stateful.items()}
                torch.save(state | {"history": history, "best": best}, path)
    model.load_state_dict(best["weights"])
    return history


# ------------------------------------------------------------------------------------------- prediction
@torch.inference_mode()
def predict(model, patches, rows, *, dtype, tta=False, batch_size=128):
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


# ------------------------------------------------------------------------------------------- correlation
def pearson_per_gene(predicted, truth):
    """Pearson r of every column, (n, G) and (n, G) -> (G,) float64.
    NaN where r is undefined: a constant or non-finite column, or fewer than two spots. Never 0 in its place.
    """
    predicted, truth = np.asarray(predicted, np.float64), np.asarray(truth, np.float64)
    if predicted.shape != truth.shape or predicted.ndim != 2:
        raise ValueError(f"predicted {predicted.shape} and truth {truth.shape} must be one (n, G)")
    if len(truth) < 2:
        return np.full(truth.shape[1], np.nan)
    constant = (np.ptp(predicted, axis=0) == 0) | (np.ptp(truth, axis=0) == 0)
    predicted, truth = predicted - predicted.mean(0), truth - truth.mean(0)
    scale = np.sqrt((predicted**2).sum(0) * (truth**2).sum(0))
    with np.errstate(divide="ignore", invalid="ignore"):  # 0/0 of a constant column is the NaN that it should be
        return np.clip(np.where(constant, np.nan, (predicted * truth).sum(0) / scale), -1, 1)


def score_genes(predicted, truth, slides):
    """Per gene (G rows): r (mean over slides of the r within each), r_pooled (all spots together) and mse."""
    within = np.stack([pearson_per_gene(predicted[slides == s], truth[slides == s]) for s in np.unique(slides)])
    defined = np.isfinite(within).sum(0)
    r = np.where(defined > 0, np.nansum(within, axis=0) / np.maximum(defined, 1), np.nan)
    squared = (predicted.astype(np.float64) - truth) ** 2
    return pd.DataFrame({"r": r, "r_pooled": pearson_per_gene(predicted, truth), "mse": squared.mean(0)})


def group_means(r, genes, groups):
    """{"heg": mean r, "heg_n": genes it is the mean of, ...}: missing genes and undefined r lower the count."""
    r, means = pd.Series(np.asarray(r), index=genes), {}
    for group in GROUPS:
        values = r.reindex(groups.loc[groups["group"] == group, "gene"]).dropna()
        means |= {group.lower(): float(values.mean()), f"{group.lower()}_n": len(values)}
    return means | {"all": float(r.mean()), "all_n": int(r.notna().sum())}


# ------------------------------------------------------------------------------------------- reporting
@dataclass(frozen=True)
class Experiment:
    """One split of a data root: which spots do what, which genes are reported, and where the rows go."""

    data: SpotData
    roles: np.ndarray  # (N,) "train", "valid", "test" or ""
    groups: pd.DataFrame  # columns group, gene, rank
    gene_lists: str  # where the groups come from
    out: Path
    seed: int

    def rows(self, *roles):
        """Row numbers of the spots with these roles, in the order of the roles."""
        return np.concatenate([np.flatnonzero(self.roles == role) for role in roles])


def title_of(data):
    """What the header, every table's title and every figure of a run on simulated slides begin with."""
    return "SIMULATED slides: " if data.meta["simulated"] else ""


def set_up_experiment(recipe, data, out, seed):
    """Split the spots and choose the gene groups as the recipe says."""
    roles = split_random(data.spots, recipe["TRAIN_SLIDES"], recipe["TEST_SLIDE"], recipe["VALID_FRACTION"], seed)
    return Experiment(data, roles, *choose_gene_groups(data, roles), Path(out), seed)


def run_setting(setting, recipe, experiment, compute):
    """The rows of one setting: from disk where they are, else computed, scored and written to a folder of their own:
    <out>/<setting>-<hash of data and constants>. rows.json is written last and marks the folder as whole.

    compute(recipe, experiment, folder) returns the prediction (n, G) of experiment.rows("valid", "test") and facts.
    """
    data, roles, at = experiment.data, experiment.roles, experiment.rows("valid", "test")
    facts = {k: v for k, v in recipe.items() if k not in ("OUT", "QUICK", "DATA_ROOT", "SEEDS")}
    facts |= {"seed": experiment.seed, "data": data.fingerprint, "genes": experiment.groups.values.tolist()}
    key = hashlib.sha256(json.dumps([setting, facts], sort_keys=True).encode()).hexdigest()[:10]
    folder = experiment.out / f"{re.sub(r'[^A-Za-z0-9.=-]+', '_', setting).strip('_')}-{key}"
    if (folder / "rows.json").is_file():
        print(f"{setting}: on disk already ({folder})")
        return json.loads((folder / "rows.json").read_text())
    began = time.perf_counter()
    predicted, more = compute(recipe, experiment, folder)
    more = {"seconds": time.perf_counter() - began, "folder": folder.name, **more}
    rows, per_gene = score_rows(setting, recipe, experiment, predicted, more)
    split = pd.DataFrame({"id": data.spots["id"], "role": roles, "fold": 0})[roles != ""]
    table = anndata.AnnData(predicted, data.spots.iloc[at].set_index("id").assign(role=roles[at]))
    table.var = per_gene.set_index("gene")
    table.layers["lognorm"], table.layers["target"] = data.lognorm[at], data.target[at]
    table.obsm["spatial"] = table.obs[["pxl_col", "pxl_row"]].to_numpy(np.float64)
    for name, frame in (("per_gene", per_gene), ("split", split), ("genes", experiment.groups)):
        with whole_file(folder / f"{name}.csv") as path:
            frame.to_csv(path, index=False)
    with whole_file(folder / "predictions.h5ad") as path:
        table.write_h5ad(path)
    for name, content in (("recipe", facts), ("rows", rows)):
        with whole_file(folder / f"{name}.json") as path:
            path.write_text(json.dumps(content, indent=1) + "\n")
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    return rows


def score_rows(setting, recipe, experiment, predicted, facts):
    """([one dict a split and truth], per-gene table); NaN becomes None in the dicts, as JSON has none."""
    data, rows = experiment.data, experiment.rows("valid", "test")
    truths = {recipe["TARGET"]: data.target, "lognorm": data.lognorm}
    table, per_gene = [], pd.DataFrame({"gene": data.genes})
    for split in ("valid", "test"):
        at = experiment.roles[rows] == split
        slides = data.spots["tissue_index"].to_numpy()[rows[at]]
        for truth, values in truths.items():
            scores = score_genes(predicted[at], values[rows[at]], slides)
            per_gene = per_gene.join(scores.add_prefix(f"{split}_{truth}_"))
            row = {"setting": setting, "split": split, "slide": ",".join(map(str, np.unique(slides))), "fold": 0}
            row |= {"seed": experiment.seed, "target": recipe["TARGET"], "truth": truth, "protocol": recipe["PROTOCOL"]}
            row |= {"gene_lists": experiment.gene_lists, "n_spots": len(slides), **facts}
            row |= group_means(scores["r"], data.genes, experiment.groups)
            pooled = group_means(scores["r_pooled"], data.genes, experiment.groups)
            row |= {f"{group}_pooled": r for group, r in pooled.items() if not group.endswith("_n")}
            row |= {"n_genes_r30": int((scores["r"] >= R_THRESHOLD).sum()), "mse": float(scores["mse"].mean())}
            table.append({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()})
    return table, per_gene


def train_network(recipe, experiment, folder):
    """Train the recipe's network and predict, for run_setting; writes weights.safetensors and history.csv."""
    data = experiment.data
    train_rows, valid_rows = experiment.rows("train"), experiment.rows("valid")
    device, dtype, _ = choose_device(recipe)
    start = data.target[train_rows].mean(0) if recipe["START_AT_MEAN"] else None
    model = build_model(recipe, len(data.genes), experiment.seed, start).to(device, memory_format=torch.channels_last)
    patches = resize_patches(data.patches, recipe["IMAGE_SIZE"], device)
    slides = data.spots["tissue_index"].to_numpy()[valid_rows]
    print("epoch   learning rate   train MSE   valid MSE   valid HEG r   images/s   seconds   (* best so far)")

    def report(line, predicted, best_epoch):
        r = score_genes(predicted, data.target[valid_rows], slides)["r"]
        line["valid_heg"] = group_means(r, data.genes, experiment.groups)["heg"]
        form = "{epoch:4}{} {learning_rate:15.2e} {train_mse:11.5f} {valid_mse:11.5f} {valid_heg:13.3f}"
        print(
            (form + " {images_per_s:10.1f} {seconds:9.1f}").format("* "[line["epoch"] != best_epoch], **line),
            flush=True,
        )

    history = fit(
        model, patches, data.target, train_rows, valid_rows,
        recipe=recipe, seed=experiment.seed, dtype=dtype, checkpoint=folder / "checkpoint.pt", report=report,
    )  # fmt: skip
    predicted = predict(model, patches, experiment.rows("valid", "test"), dtype=dtype, tta=recipe["TTA"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    metadata = {
        "recipe": recipe, "genes": data.genes, "um_per_px": data.meta["um_per_px"], "patch_size": PATCH_SIZE,
        "mean": model.mean.flatten().tolist(), "std": model.std.flatten().tolist(), "data": data.fingerprint,
    }  # fmt: skip
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    with whole_file(folder / "weights.safetensors") as path:
        path.write_bytes(safetensors.torch.save(state, {name: json.dumps(value) for name, value in metadata.items()}))
    with whole_file(folder / "history.csv") as path:
        pd.DataFrame(history).to_csv(path, index=False)
    return predicted, {
        "weights": "pretrained" if recipe["PRETRAINED"] else "random",
        "best_epoch": min(history, key=lambda line: line["valid_mse"])["epoch"],
        "images_per_s": float(np.median([line["images_per_s"] for line in history])),
        "seconds": sum(line["seconds"] for line in history),  # also of epochs before an interruption
        "peak_memory_mb": (torch.cuda.max_memory_allocated() if device.type == "cuda" else peak) / 2**20,
        **{f"parameters_{part}": count for part, count in count_parameters(model).items()},
    }


def ridge_on_colour(recipe, experiment, folder, alpha=100.0):
    """Ridge regression on standardised colour statistics, for run_setting: no image network may lose to it."""
    data, train_rows = experiment.data, experiment.rows("train")
    ridge = make_pipeline(StandardScaler(), Ridge(alpha)).fit(data.colour[train_rows], data.target[train_rows])
    return ridge.predict(data.colour[experiment.rows("valid", "test")]).astype(np.float32), {"weights": "none"}


def print_header(script, recipe, experiment):
    """What is run on what: data, target, protocol, split, gene groups, machine, weights and size of the model."""
    data = experiment.data
    device, dtype, reason = choose_device(recipe)
    slides, rows = data.spots["tissue_index"], [experiment.rows(role) for role in ("train", "valid", "test")]
    of = [",".join(map(str, np.unique(slides[at]))) for at in rows]
    target = {"harmony": "Harmony over all slides, the test slide included", "lognorm": "log1p of counts per 10,000"}
    missing = experiment.groups[~experiment.groups["gene"].isin(data.genes)]
    lists = experiment.gene_lists + (f"; not in the panel: {', '.join(missing['gene'])}" if len(missing) else "")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    with torch.device("meta"):  # sizes without memory
        size = count_parameters(build_model(recipe | {"PRETRAINED": False}, len(data.genes), 0))
    print(f"\n{title_of(data)}{Path(script['__file__']).stem}")
    print(f"data        {data.root}: {slides.nunique()} slides, {len(slides):,} spots x {len(data.genes):,} genes")
    print(f"target      {recipe['TARGET']} ({target[recipe['TARGET']]})")
    print(f"protocol    {recipe['PROTOCOL']} (as published: the panel is chosen on all slides, so transductive)")
    print(f"split       training {len(rows[0])} and validation {len(rows[1])} spots of slides {of[0]}", end="; ")
    print(f"test {len(rows[2])} spots of slide {of[2]}")
    print(f"gene groups {lists}")
    print(f"device      {device.type} ({where}), {str(dtype).removeprefix('torch.')} ({reason})")
    print("weights    ", "pretrained (timm)" if recipe["PRETRAINED"] else "random: no pretraining")
    print(
        f"model       {recipe['BACKBONE']} at {recipe['IMAGE_SIZE']} px, {size['total'] / 1e6:.1f} M parameters,",
        end=" ",
    )
    print(f"{size['backbone'] / 1e6:.1f} M of them in the backbone")


def print_table(title, experiment, rows):
    """One ruled table; a group mean over fewer genes than the group lists says over how many, as 0.310/47."""
    table, listed = pd.DataFrame(rows), {"all": len(experiment.data.genes), **experiment.groups["group"].value_counts()}
    shown = table[["setting", "seed", "split", "truth", "n_spots"]].rename(columns={"n_spots": "spots"})
    shown["setting"] = shown["setting"].str.ljust(shown["setting"].str.len().max())
    for key, heading in (("heg", "HEG"), ("hvg", "HVG"), ("mg", "MG"), ("all", "all"), ("heg_pooled", "HEG pooled")):
        few = [f"/{n}" if n < listed.get(heading, 0) else "" for n in table.get(f"{key}_n", [math.inf] * len(table))]
        shown[heading] = table[key].astype(float).map("{:.3f}".format).replace("nan", "-") + few
    shown["r>=.30"], shown["MSE"] = table["n_genes_r30"], table["mse"].map("{:.4f}".format)
    shown["seconds"] = table["seconds"].map("{:.0f}".format)
    head, *body = shown.to_string(index=False, col_space=7).splitlines()
    title = f"\n{title_of(experiment.data)}{title} ({experiment.data.root})"
    print(title, "=" * len(head), head, "-" * len(head), *body, "=" * len(head), sep="\n")


def finish_run(script, experiment, rows):
    """Rewrite <out>/rows.csv from all rows on disk and print the one JSON line that ends every script's output."""
    out, data, name = experiment.out, experiment.data, Path(script["__file__"]).stem
    on_disk = [row for path in sorted(out.glob("*/rows.json")) for row in json.loads(path.read_text())]
    with whole_file(out / "rows.csv") as path:
        pd.DataFrame(on_disk).to_csv(path, index=False)
    result = {"script": name, "data_root": str(data.root), "simulated": data.meta["simulated"], "out": str(out)}
    print(json.dumps(result | {"rows": rows}))
