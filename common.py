"""Everything that two scripts share, in the order in which the data flows:
conventions -> run set-up -> dataset -> augmentation -> model -> training -> prediction -> correlation -> reporting

Shapes: N spots, G genes, B patches of a batch, S px a side. A `recipe` is the plain dict of a script's constants.
"""

import argparse
import ctypes
import functools
import hashlib
import itertools
import json
import os
import re
import resource
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import polars
import safetensors.torch
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge
from torch import nn
from tqdm import tqdm

# ------------------------------------------------------------------------------------------- conventions
PATCH_SIZE = 224  # px of the slide; 68 um at GSE240429's 0.304 um/px
GROUP_SIZE = 50  # genes of the groups HEG and HVG
GROUPS = ("HEG", "HVG", "MG")
MARKER_GENES = ("HAL", "CYP3A4", "VWF", "SOX9", "KRT7", "ANXA4", "ACTA2", "DCN")
ID_COLUMNS = ["id", "tissue_index", "barcode", "array_row", "array_col", "pxl_row", "pxl_col"]
POSITION_COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row", "pxl_col"]
SPLITS = ("oof", "valid", "test")  # roles whose spots are scored; oof = out of fold
R_THRESHOLD = 0.30  # the paper counts the genes above it
DRAWS = 1000  # of the bootstrap

# What a constant may be: a tuple of the allowed values, or the two ends of a range.
ALLOWED = {
    "TARGET": ("harmony", "lognorm"), "AUG": ("mpa", "stnet", "none"),
    "DEVICE": ("auto", "cpu", "cuda"), "PRECISION": ("auto", "bf16", "fp16", "fp32"), "LEARNING_RATE": range(0, 1),
    "DATASET": ("GSE240429", "HER2ST"), "VALID_FRACTION": range(0, 1), "FOLDS": range(2, 100), "SPOTS": range(2, 10**6),
    "HIDDEN": range(0, 10**6), "TRAINABLE_STAGES": range(-1, 1000), "IMAGE_SIZE": range(32, 4096),
    "EPOCHS": range(1, 10**6), "BATCH_SIZE": range(2, 10**6), "HVG_PER_SLIDE": range(1, 10**6),
    "STNET_EPOCHS": range(1, 10**6), "BLEEP_EPOCHS": range(1, 10**6), "BLEEP_BATCH": range(2, 10**6),
    "MICRO_BATCH": range(3, 10**6), "EMBEDDING": range(1, 999), "NEIGHBOURS": range(2, 999), "MIN_CLUSTER": range(0, 1),
    "SLIDES": range(1, 1000), "DEPTH": range(1, 10**9), "DISPERSION": range(0, 100),
}  # fmt: skip


class InputError(Exception):
    """The user's input is at fault. Its one line names the file or value, what was expected and the fix."""


def require(condition, message):
    """InputError with the message unless the condition holds."""
    if not condition:
        raise InputError(message)


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


def save_csv(path, table):
    """Write the table, without its index, whole or not at all."""
    with whole_file(path) as partial:
        table.to_csv(partial, index=False)


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
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(default, tuple):
            return tuple(type((*default, 0)[0])(part) for part in text.split(",") if part)
        return type(default)(text)
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text}: expected {type(default).__name__} like {default!r}") from None


def override_constants(script, argv):
    """Set a script's constants from the command line, `--quick`'s QUICK_BUDGET first. Prints what changed."""
    raw = argparse.RawDescriptionHelpFormatter  # keeps the docstring's lines
    parser = argparse.ArgumentParser(None, None, script["__doc__"], formatter_class=raw, allow_abbrev=False)
    parser.exit_on_error = False
    flags = {name: "--" + name.lower().replace("_", "-") for name in recipe_of(script)}
    for name, comment in _constant_comments(script).items():
        value, kind = script[name], functools.partial(_parse_constant, script[name])
        shown = f"{comment} [{','.join(map(str, value)) if isinstance(value, tuple) else value}]".replace("%", "%%")
        bare = {"nargs": "?", "const": True} if isinstance(value, bool) else {}
        parser.add_argument(flags[name], dest=name, type=kind, metavar="", help=shown, **bare)
    given, unknown = parser.parse_known_args(argv)
    require(not unknown, f"{Path(script['__file__']).name} has no constant {' '.join(unknown)}: --help lists them")
    values = {name: value for name, value in vars(given).items() if value is not None}
    if values.get("QUICK", script.get("QUICK", False)):
        values = script["QUICK_BUDGET"] | values
    print(*(f"{name} = {value!r}\n" for name, value in values.items() if value != script[name]), sep="", end="")
    script.update(values)
    for name, flag in flags.items():
        value, allowed = script[name], ALLOWED.get(name)
        if isinstance(allowed, tuple):
            require(value in allowed, f"{flag} {value}: expected one of {', '.join(allowed)}")
        if isinstance(allowed, range):
            fits = allowed.start <= value <= allowed.stop
            require(fits, f"{flag} {value}: expected a number from {allowed.start} to {allowed.stop}")


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
    require(cuda or recipe["DEVICE"] != "cuda", "--device cuda: torch sees no CUDA device; use --device cpu")
    has_bf16 = torch.cuda.is_bf16_supported(False) if cuda else torch.cpu._is_avx512_bf16_supported()
    choice, reason = ("fp16", "no bf16; with a loss scaler") if cuda else ("fp32", "the processor lacks bf16")
    if recipe["PRECISION"] != "auto":
        choice, reason = recipe["PRECISION"], "as asked"
    elif has_bf16 and not cuda and recipe["IMAGE_SIZE"] < 160:
        choice, reason = "fp32", "measured faster than bf16 on processors below 160 px"
    elif has_bf16:
        choice, reason = "bf16", "the device has it"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[choice]
    return torch.device("cuda" if cuda else "cpu"), dtype, reason


def call_script(name, *flags):
    """Run another numbered script, its command printed first. InputError where it fails."""
    print("$ python", name, *flags, flush=True)
    status = subprocess.run([sys.executable, Path(__file__).with_name(name), *flags]).returncode
    require(status == 0, f"{name} failed: its message stands above")


def open_run(script, split=None):
    """(recipe, one Experiment a seed); `--quick` has its slides made where missing. `split` as split_random."""
    recipe, root = recipe_of(script), Path(script["DATA_ROOT"])
    require(recipe["SEEDS"], "--seeds: expected one number at least")
    if recipe["QUICK"] and str(root) == script["QUICK_BUDGET"]["DATA_ROOT"]:
        if not (root / "slides.csv").exists():
            call_script("18_simulate_slides.py", "--data-root", str(root))
        if not (root / "dataset" / "meta.json").exists():
            call_script("19_make_patches_and_csv.py", "--data-root", str(root), "--target", recipe["TARGET"])
    out = Path(recipe["OUT"] or Path("runs", Path(script["__file__"]).stem, root.resolve().name))
    data, experiments = load_dataset(root, recipe["TARGET"]), []
    for seed in recipe["SEEDS"]:
        roles = (split or split_random)(data.spots, recipe, seed)
        experiments.append(Experiment(data, roles, choose_gene_groups(data, roles == "train"), out, seed))
    return recipe, experiments


# ------------------------------------------------------------------------------------------- dataset
@dataclass(frozen=True, eq=False)  # hashed by identity, for place_patches
class SpotData:
    """The spots of a data root; row i of every member is the same spot."""

    root: Path
    patches: np.ndarray  # (N, 224, 224, 3) uint8 RGB, memory-mapped
    spots: pd.DataFrame  # N rows, ID_COLUMNS, pitch (px) and block, a square five pitches wide
    genes: list  # G names: the panel
    target: np.ndarray  # (N, G) float32, what is trained on: Harmony or log-normalised
    lognorm: np.ndarray  # (N, G) float32, log-normalised counts
    counts: anndata.AnnData  # N x G raw counts; obs n_counts; obsm colour (N, 40), colour and texture statistics
    meta: dict  # meta.json of script 19
    fingerprint: str  # of meta.json, which holds hashes of the sources
    title: str  # begins the header, tables and figures of a run on simulated slides


def log_normalise(counts, totals):
    """log1p of counts scaled to 10,000 a spot: (N, G) counts, (N,) totals over ALL genes -> (N, G) float32."""
    scale = 1e4 / np.maximum(np.asarray(totals, np.float64), 1)
    dense = counts.toarray() if hasattr(counts, "toarray") else np.asarray(counts)
    return np.log1p(dense * scale[:, None]).astype(np.float32)


def load_dataset(data_root, target):
    """Read what script 19 wrote. Raises InputError with 19's command where it is missing or made otherwise."""
    root, folder = Path(data_root), Path(data_root) / "dataset"
    command = f"python 19_make_patches_and_csv.py --data-root {data_root}"
    require((folder / "meta.json").is_file(), f"no meta.json in {folder}: run {command} first")
    meta = json.loads(meta_text := (folder / "meta.json").read_bytes())
    require(meta["target"], f"{folder} holds patches alone: its slides.csv names no matrix, so nothing can be learnt")
    made = meta["target"] == "harmony" or target == "lognorm"
    require(made, f"{folder} was made with target {meta['target']}: run {command} --target harmony first")
    counts = anndata.read_h5ad(folder / "counts.h5ad")
    genes, expression = counts.var_names.tolist(), log_normalise(counts.X, counts.obs["n_counts"])
    require("block" in counts.obs, f"{folder} was made by an earlier version: run {command} again")
    lognorm, spots = expression, counts.obs.reset_index(names="id")[[*ID_COLUMNS, "pitch", "block"]]
    if target == "harmony":
        table = polars.scan_csv(folder / "dataset.csv", schema_overrides=dict.fromkeys(genes, polars.Float32))
        whole = table.collect_schema().names() == ID_COLUMNS + genes
        require(whole, f"{folder / 'dataset.csv'}: its genes are not those of counts.h5ad: run {command} again")
        expression = table.select(genes).collect().to_numpy()
    patches = np.load(folder / "patches.npy", mmap_mode="c", allow_pickle=False)  # "c": torch wants writable memory
    fingerprint, title = hashlib.sha256(meta_text).hexdigest()[:16], "SIMULATED slides: " * meta["simulated"]
    return SpotData(root, patches, spots, genes, expression, lognorm, counts, meta, fingerprint, title)


def split_random(spots, recipe, seed):
    """The paper's split, (N,) of "train", "valid" (VALID_FRACTION of the training slides' spots), "test" or ""."""
    slide, test, fraction = spots["tissue_index"].to_numpy(), recipe["TEST_SLIDE"], recipe["VALID_FRACTION"]
    train = recipe["TRAIN_SLIDES"] or tuple(np.setdiff1d(slide, test))
    require(recipe["PROTOCOL"] == "paper", f"--protocol {recipe['PROTOCOL']}: this script has paper alone")
    for s in (*train, test):
        require(s in set(slide), f"slide {s} is not in the dataset: it holds slides {np.unique(slide)}")
    require(test not in train, f"slide {test} is both in TRAIN_SLIDES and TEST_SLIDE: choose another one")
    roles = np.where(slide == test, "test", "").astype("U5")
    pool = np.flatnonzero(np.isin(slide, train))
    n_valid = round(fraction * len(pool))
    enough = 0 < n_valid < len(pool) - 1
    require(enough, f"--valid-fraction {fraction} of {len(pool)} spots leaves validation or training none")
    order = np.random.default_rng(seed_of(seed, "split")).permutation(pool)
    roles[order[:n_valid]], roles[order[n_valid:]] = "valid", "train"
    return roles


def choose_gene_groups(data, spots, published=True):
    """Table group, gene, rank, attrs["source"]: the data root's gene_sets.csv if `published` may be used, else HEG and
    HVG are the 50 genes of the panel with the highest mean and variance of log-normalised expression over `spots`.
    """
    path = data.root / "gene_sets.csv"
    if published and path.is_file():
        table = pd.DataFrame({"group": ["unread"]})
        with suppress(ValueError, KeyError):
            table = pd.read_csv(path)[["group", "gene"]].dropna()
        require(
            set(table["group"]) <= set(GROUPS),
            f"{path}: expected the columns group, gene and the groups {', '.join(GROUPS)}",
        )
        table, source = table.assign(rank=table.groupby("group").cumcount() + 1), path.name
    else:
        ranked = {"HEG": data.lognorm[spots].mean(0, np.float64), "HVG": data.lognorm[spots].var(0, np.float64)}
        lists = {k: [data.genes[g] for g in np.argsort(-v, kind="stable")[:GROUP_SIZE]] for k, v in ranked.items()}
        rows = [(k, gene, n) for k, genes in (lists | {"MG": MARKER_GENES}).items() for n, gene in enumerate(genes, 1)]
        table, source = pd.DataFrame(rows, columns=["group", "gene", "rank"]), "training spots"
    table.attrs["source"] = source
    return table


@functools.lru_cache(maxsize=1)  # the trainings of a run share one copy
def place_patches(data, size, device):
    """data.patches as (N, 3, size, size) uint8, channels last; on a GPU where half of its free memory holds them."""
    images = torch.from_numpy(data.patches).permute(0, 3, 1, 2)  # the memory map itself
    if size != PATCH_SIZE:
        images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
    fits = device.type == "cuda" and images.nbytes < 0.5 * torch.cuda.mem_get_info(device)[0]
    return images.to(device) if fits else images


# ------------------------------------------------------------------------------------------- augmentation
def draw_augmentation(n, preset, generator):
    """Parameters for n patches, on the CPU: symmetry (n, 3) bool (flip left-right, flip up-down, transpose, in this
    order), warped (n,) bool, affine (n, 2, 3), which F.affine_grid takes. Presets: "mpa" (each symmetry p = .5, then
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
def stages_of(backbone):
    """The backbone's modules in stages, input side first; of EfficientNet-B0 stem, seven stages, head convolution."""
    stages = []
    for name, child in backbone.named_children():
        for module in child.children() if name in ("blocks", "features", "stages", "layers") else [child]:
            if not stages or any(p.ndim > 1 for p in module.parameters()):  # norm and pooling: not a stage of their own
                stages.append([])
            stages[-1].append(module)
    return stages


class SpotRegressor(nn.Module):
    """Backbone and head: (B, 3, S, S) pixel values 0..255 -> (B, G) expression; the last stages are trainable."""

    def __init__(self, backbone, head, trainable_stages):
        super().__init__()
        self.backbone, self.head = backbone, head
        for name in ("mean", "std"):  # of the images that the backbone was pretrained on
            self.register_buffer(name, 255 * torch.tensor(backbone.pretrained_cfg[name]).view(3, 1, 1), False)
        stages = stages_of(backbone)
        if trainable_stages > len(stages):
            raise InputError(f"TRAINABLE_STAGES {trainable_stages}: this backbone has {len(stages)} stages")
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

    def encode(self, pixels):
        """(B, 3, S, S) pixel values 0..255 -> (B, F) features."""
        return self.backbone((pixels.float() - self.mean) / self.std)

    def forward(self, pixels):
        return self.head(self.encode(pixels))


def build_model(recipe, n_genes, seed):
    """timm BACKBONE with the paper's head, Dropout - Linear - ReLU - Dropout - Linear; HIDDEN = 0 is one Linear.
    Same seed, same weights. InputError for an unknown name or weights that are not to be had.
    """
    import timm  # here, because it takes seconds to import and scripts 17-19 do without

    backbone, hidden, pretrained = recipe["BACKBONE"], recipe["HIDDEN"], recipe["PRETRAINED"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "weights"))
        try:
            body = timm.create_model(backbone, pretrained=pretrained, num_classes=0)
        except (OSError, RuntimeError, ValueError) as error:
            fix = "connect to the network once, or use --pretrained false" if pretrained else "is it a name of timm's?"
            raise InputError(f"backbone {backbone}: {str(error).splitlines()[0][:120]}; {fix}") from None
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
    """One pass over `rows`; returns the mean training loss. Everything random follows from (seed, epoch)."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed_of(seed, "epoch", epoch))
    order = rows[torch.randperm(len(rows), generator=generator)]
    draw = draw_augmentation(len(order), recipe["AUG"], generator)
    torch.manual_seed(seed_of(seed, "dropout", epoch))
    model.train()
    total, start, loss_of = torch.zeros((), device=device), 0, getattr(model, "loss", F.mse_loss)
    batches = [batch for batch in order.split(recipe["BATCH_SIZE"]) if len(batch) > 1]  # BatchNorm needs two
    for batch in tqdm(batches, f"epoch {epoch + 1}", leave=False, disable=None):
        stop, images = start + len(batch), patches[batch.to(patches.device)].to(device, non_blocking=True)
        images = augment(images, *(part[start:stop] for part in draw))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            predicted = model(images.contiguous(memory_format=torch.channels_last))
        loss = loss_of(predicted.float(), target[batch.to(target.device)])
        optimiser.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        total += loss.detach() * len(batch)
        start = stop
    return total.item() / start  # the epoch's only synchronisation


def adam_with_cosine(parameters, recipe):
    """(optimiser, schedule stepped by the epoch) of the paper's recipe."""
    optimiser = torch.optim.Adam(parameters, recipe["LEARNING_RATE"], fused=True)
    return optimiser, torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, recipe["EPOCHS"])


def fit(model, patches, target, train_rows, valid_rows, *, recipe, seed, dtype, keep=0, checkpoint=None, report=None):
    """Train; leave the weights of the epoch with the lowest validation MSE in `model`; return the history.
    Loss and optimiser are MSE and adam_with_cosine, or the model's own `loss` and `optimise`.
    patches (N, 3, S, S) uint8, target (N, G) float32 array, rows int64 arrays. With `keep` there is no validation and
    training ends with that epoch. `checkpoint` is a file that a killed run goes on from. `report(line, predicted,
    best_epoch)` sees each epoch's line of the history and may add to it.
    """
    device = next(model.parameters()).device
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimiser, schedule = getattr(model, "optimise", adam_with_cosine)(trainable, recipe)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    stateful = {"model": model, "optimiser": optimiser, "schedule": schedule, "scaler": scaler}
    truth, rows = torch.from_numpy(target).to(device), torch.from_numpy(train_rows)
    history, best = [], None
    if checkpoint is not None and checkpoint.is_file():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        for part, owner in stateful.items():
            owner.load_state_dict(state[part])
        history, best = state["history"], state["best"]
        tqdm.write(f"going on after epoch {len(history)} of {recipe['EPOCHS']} ({checkpoint})")
    for epoch in range(len(history), keep or recipe["EPOCHS"]):
        began, rate = time.perf_counter(), schedule.get_last_lr()[0]
        loss = train_epoch(model, optimiser, scaler, patches, truth, rows, recipe, seed, epoch, dtype)
        schedule.step()
        trained = time.perf_counter() - began
        predicted = None if keep else predict(model, patches, valid_rows, dtype=dtype)
        mse = loss if keep else float(np.mean((predicted.astype(np.float64) - target[valid_rows]) ** 2))
        require(np.isfinite(mse), f"epoch {epoch + 1}: the MSE is {mse}: lower LEARNING_RATE ({rate:g})")
        line = {"epoch": epoch + 1, "learning_rate": rate, "train_mse": loss, "valid_mse": None if keep else mse}
        line |= {"images_per_s": len(rows) / trained, "seconds": time.perf_counter() - began}
        if best is None or keep or mse < best["valid_mse"]:
            weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
            best = {"epoch": epoch + 1, "valid_mse": mse, "weights": weights}
        if report is not None:
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


def encode_patches(data, backbone, recipe, seed):
    """(N, F) float32 features of the plain patches by a timm backbone as it comes, PRETRAINED or random by `seed`."""
    device, dtype, _ = choose_device(recipe)
    model = build_model(recipe | {"BACKBONE": backbone, "HIDDEN": 0, "TRAINABLE_STAGES": 0}, 1, seed)
    model.head = nn.Identity()
    patches = place_patches(data, recipe["IMAGE_SIZE"], device)
    return predict(model.to(device, memory_format=torch.channels_last), patches, np.arange(len(patches)), dtype=dtype)


# ------------------------------------------------------------------------------------------- correlation
def pearson_per_gene(predicted, truth):
    """Pearson r of every column, (n, G) and (n, G) -> (G,) float64.
    NaN where r is undefined: a constant or non-finite column, or a single spot. Never 0 in its place.
    """
    predicted, truth = np.asarray(predicted, np.float64), np.asarray(truth, np.float64)
    assert predicted.shape == truth.shape and predicted.ndim == 2
    constant = (np.ptp(predicted, axis=0) == 0) | (np.ptp(truth, axis=0) == 0)
    predicted, truth = predicted - predicted.mean(0), truth - truth.mean(0)
    scale = np.sqrt((predicted**2).sum(0) * (truth**2).sum(0))
    with np.errstate(divide="ignore", invalid="ignore"):  # 0/0 of a constant column is the NaN that it should be
        return np.clip(np.where(constant, np.nan, (predicted * truth).sum(0) / scale), -1, 1)


def score_genes(predicted, truth, slides):
    """Per gene (G rows): r (mean over slides of the r within each), r_pooled (all spots together) and mse."""
    within = np.stack([pearson_per_gene(predicted[slides == s], truth[slides == s]) for s in np.unique(slides)])
    r = pd.DataFrame(within).mean().to_numpy()  # without the slides where it is undefined
    mse = ((predicted.astype(np.float64) - truth) ** 2).mean(0)
    return pd.DataFrame({"r": r, "r_pooled": pearson_per_gene(predicted, truth), "mse": mse})


def group_means(r, genes, groups):
    """{"heg": mean r, "heg_n": genes it is the mean of, ...}: missing genes and undefined r lower the count."""
    r, means = pd.Series(np.asarray(r), index=genes), {}
    for key, members in group_members(genes, groups).items():
        means |= {key: float(r[members].mean()), f"{key}_n": int(r[members].notna().sum())}
    return means


def group_members(genes, groups):
    """{"heg": its genes of the panel, "hvg", "mg", "all": the whole panel}."""
    panel = set(genes)
    lists = {group: groups.loc[groups["group"] == group, "gene"] for group in GROUPS} | {"all": genes}
    return {group.lower(): [gene for gene in names if gene in panel] for group, names in lists.items()}


def bootstrap_means(predicted, truth, spots, genes, groups):
    """(DRAWS, 4) table heg, hvg, mg, all: group means of r when whole blocks of one slide's spots are drawn with
    replacement. The draws follow from the spots alone, so those of two methods are paired.
    """
    block = pd.factorize(spots["block"], sort=True)[0]
    inside = (np.arange(block.max() + 1)[:, None] == block).astype(np.float64)  # (blocks, n)
    random = np.random.default_rng(seed_of("bootstrap"))
    drawn = random.multinomial(len(inside), np.full(len(inside), 1 / len(inside)), DRAWS).astype(np.float64)
    x, y = (values.astype(np.float64) - values.mean(0, np.float64) for values in (predicted, truth))
    mean = lambda values: drawn @ (inside @ values) / (drawn @ inside.sum(1))[:, None]  # noqa: E731
    mean_x, mean_y = mean(x), mean(y)
    spread = (mean(x**2) - mean_x**2) * (mean(y**2) - mean_y**2)
    defined = spread > 1e-9 * (x**2).mean(0) * (y**2).mean(0)  # else the gene is constant in this draw
    r = np.where(defined, (mean(x * y) - mean_x * mean_y) / np.sqrt(np.where(defined, spread, 1)), np.nan)
    r = pd.DataFrame(r if len(inside) > 1 else np.nan, range(DRAWS), genes)  # one block says nothing of others
    return pd.DataFrame({key: r[members].mean(axis=1) for key, members in group_members(genes, groups).items()})


def pair_differences(rows, out, against):
    """r of a setting minus r of another, {setting: another}, of the same seeds: table setting, minus, group, seeds,
    difference, low, high (95 % over blocks and seeds). Test slide, log-normalised truth. NaN where r is not defined for
    equally many genes in both.
    """
    of = {(row["setting"], row["seed"]): row for row in rows if (row["split"], row["truth"]) == ("test", "lognorm")}
    draws = {key: pd.read_csv(out / row["folder"] / "bootstrap.csv") for key, row in of.items()}
    lines, seeds = [], list(dict.fromkeys(seed for _, seed in of))
    picked = np.random.default_rng(seed_of("seeds")).integers(len(seeds), size=(DRAWS, len(seeds)))
    for (setting, other), group in itertools.product(against.items(), (*GROUPS, "all")):
        key, pairs = group.lower(), [((setting, seed), (other, seed)) for seed in seeds]
        difference, low, high = np.nan, np.nan, np.nan
        if all(of[a][f"{key}_n"] == of[b][f"{key}_n"] > 0 for a, b in pairs):
            drawn = np.stack([draws[a][f"lognorm_{key}"] - draws[b][f"lognorm_{key}"] for a, b in pairs], axis=1)
            low, high = pd.Series(np.take_along_axis(drawn, picked, 1).mean(1)).quantile([0.025, 0.975])
            difference = np.mean([of[a][key] - of[b][key] for a, b in pairs])
        lines.append((setting, other, group, len(seeds), difference, low, high))
    return pd.DataFrame(lines, columns=["setting", "minus", "group", "seeds", "difference", "low", "high"])


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

    def rows(self, *roles):
        """Row numbers of the spots with these roles, in the order of the roles."""
        return np.concatenate([np.flatnonzero(self.roles == role) for role in roles])


def run_setting(setting, recipe, experiment, compute):
    """The rows of one setting: from disk where they are, else computed, scored and written to a folder of their own,
    <out>/<setting>-<hash of what they follow from>; rows.json comes last and marks it as whole.
    compute(recipe, experiment, folder) returns the prediction (n, G) of experiment.rows(*SPLITS) and facts.
    """
    data, roles, at = experiment.data, experiment.roles, experiment.rows(*SPLITS)
    facts = {k: v for k, v in recipe.items() if k not in ("OUT", "QUICK", "DATA_ROOT", "SEEDS", "ONLY")}
    facts |= {"seed": experiment.seed, "fold": experiment.fold, "data": data.fingerprint}
    facts |= {"split": hashlib.sha256(roles).hexdigest(), "genes": experiment.groups.values.tolist()}
    key = hashlib.sha256(json.dumps([setting, facts], sort_keys=True).encode()).hexdigest()[:10]
    folder = experiment.out / f"{re.sub(r'[^A-Za-z0-9.=-]+', '_', setting).strip('_')}-{key}"
    if (folder / "rows.json").is_file():
        tqdm.write(f"{setting}: on disk already ({folder})")
    else:
        began = time.perf_counter()
        predicted, more = compute(recipe, experiment, folder)
        more = {"seconds": time.perf_counter() - began, "folder": folder.name, **more}
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
        (folder / "checkpoint.pt").unlink(missing_ok=True)
    on_disk = [row for path in sorted(experiment.out.glob("*/rows.json")) for row in json.loads(path.read_text())]
    save_csv(experiment.out / "rows.csv", pd.DataFrame(on_disk))
    return json.loads((folder / "rows.json").read_text())


def ridge_on_colour(recipe, experiment, folder, alpha=100.0):
    """`compute` of run_setting: ridge on standardised colour statistics, which no image network may lose to."""
    colour, train = experiment.data.counts.obsm["colour"], experiment.rows("train")
    colour = (colour - colour[train].mean(0)) / np.maximum(colour[train].std(0), 1e-12)
    ridge = Ridge(alpha).fit(colour[train], experiment.data.target[train])
    return ridge.predict(colour[experiment.rows(*SPLITS)]).astype(np.float32), {"weights": "none"}


def run_grid(script, settings, experiments, adapt=None):
    """The rows of each setting {name: {CONSTANT: value}}, or of ONLY, and experiment, by train_network with `adapt`."""
    recipe, only, rows = recipe_of(script), script["ONLY"], []
    require(only in ("", *settings), f"--only {only}: expected one of {'; '.join(settings)}")
    tasks = [(name, recipe | settings[name], e) for name in settings if only in ("", name) for e in experiments]
    with tqdm(total=sum(task[1]["EPOCHS"] for task in tasks), unit="epoch", smoothing=0, mininterval=2) as bar:
        train = functools.partial(train_network, adapt=adapt, report=lambda *_: bar.update())
        for number, (name, changed, experiment) in enumerate(tasks, 1):
            bar.set_description(f"{number}/{len(tasks)} {name}")
            before = bar.n
            rows += run_setting(name, changed, experiment, train)
            bar.total -= changed["EPOCHS"] - (bar.n - before)  # epochs that were on disk
    return rows


def score_rows(setting, recipe, experiment, predicted, facts):
    """([one dict a split and truth], per-gene table, bootstrap draws); NaN is None in the dicts, as JSON has none."""
    data, rows = experiment.data, experiment.rows(*SPLITS)
    truths = {recipe["TARGET"]: data.target, "lognorm": data.lognorm}
    table, per_gene, draws = [], pd.DataFrame({"gene": data.genes}), pd.DataFrame()
    for split in [split for split in SPLITS if split in experiment.roles]:
        at = experiment.roles[rows] == split
        spots = data.spots.iloc[rows[at]]
        slides = spots["tissue_index"].to_numpy()
        for truth, values in truths.items():
            scores = score_genes(predicted[at], values[rows[at]], slides)
            per_gene = per_gene.join(scores.add_prefix(f"{split}_{truth}_"))
            row = {"setting": setting, "split": split, "slide": ",".join(map(str, np.unique(slides)))}
            row |= {"fold": experiment.fold, "seed": experiment.seed, "target": recipe["TARGET"], "truth": truth}
            row |= {"protocol": recipe["PROTOCOL"], "gene_lists": experiment.groups.attrs["source"]}
            row |= {"n_spots": len(slides)} | facts | group_means(scores["r"], data.genes, experiment.groups)
            pooled = group_means(scores["r_pooled"], data.genes, experiment.groups)
            row |= {f"{group}_pooled": r for group, r in pooled.items() if not group.endswith("_n")}
            row |= {"n_genes_r30": int((scores["r"] >= R_THRESHOLD).sum()), "mse": float(scores["mse"].mean())}
            row |= {f"{group.lower()}_ci": None for group in (*GROUPS, "all")}
            if split == "test":
                means = bootstrap_means(predicted[at], values[rows[at]], spots, data.genes, experiment.groups)
                draws = draws.join(means.add_prefix(f"{truth}_"), how="outer")
                row |= {f"{key}_ci": means[key].quantile([0.025, 0.975]).tolist() for key in means.dropna(axis=1)}
            table.append({key: None if value != value else value for key, value in row.items()})
    return table, per_gene, draws


def train_network(recipe, experiment, folder, *, keep=0, adapt=None, report=None):
    """Train and predict, for run_setting; writes weights.safetensors and history.csv. `keep` and `report` as in fit;
    adapt(model, patches, recipe, experiment) returns another (network, its input) that holds `model.head` to train.
    """
    data, (device, dtype, _) = experiment.data, choose_device(recipe)
    patches = place_patches(data, recipe["IMAGE_SIZE"], device)
    with suppress(OSError, AttributeError, TypeError):  # the peak is to be this training's own; Linux can forget others
        torch.cuda.reset_peak_memory_stats() if device.type == "cuda" else ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    model = build_model(recipe, len(data.genes), experiment.seed).to(device, memory_format=torch.channels_last)
    if recipe["START_AT_MEAN"]:
        model.head[-1].bias.data.copy_(torch.from_numpy(data.target[experiment.rows("train")].mean(0)))
    network, patches = adapt(model, patches, recipe, experiment) if adapt else (model, patches)
    history = fit(
        network, patches, data.target, experiment.rows("train"), experiment.rows("valid"), recipe=recipe,
        seed=experiment.seed, dtype=dtype, keep=keep, checkpoint=folder / "checkpoint.pt", report=report,
    )  # fmt: skip
    predicted = predict(network, patches, experiment.rows(*SPLITS), dtype=dtype, tta=recipe["TTA"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    metadata = {
        "recipe": recipe, "genes": data.genes, "um_per_px": data.meta["um_per_px"], "patch_size": PATCH_SIZE,
        "mean": model.mean.flatten().tolist(), "std": model.std.flatten().tolist(), "data": data.fingerprint,
    }  # fmt: skip
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    with whole_file(folder / "weights.safetensors") as path:
        path.write_bytes(safetensors.torch.save(state, {name: json.dumps(value) for name, value in metadata.items()}))
    save_csv(folder / "history.csv", pd.DataFrame(history))
    return predicted, {
        "weights": "pretrained" if recipe["PRETRAINED"] else "random",
        "best_epoch": keep or min(history, key=lambda line: line["valid_mse"])["epoch"],
        "images_per_s": float(np.median([line["images_per_s"] for line in history])),
        "seconds": sum(line["seconds"] for line in history),  # also of epochs before an interruption
        "peak_memory_mb": (torch.cuda.max_memory_allocated() if device.type == "cuda" else peak) / 2**20,
        **{f"parameters_{part}": count for part, count in count_parameters(model).items()},
    }


def print_header(script, recipe, experiment):
    """What is run on what: data, target, protocol, split, gene groups, machine and weights."""
    data, (device, dtype, reason) = experiment.data, choose_device(recipe)
    slides, split = data.spots["tissue_index"], []
    for role in [role for role in ("train", *SPLITS) if role in experiment.roles]:
        at = experiment.rows(role)
        split.append(f"{role} {len(at)} spots of slides {','.join(map(str, np.unique(slides[at])))}")
    missing = sorted(set(experiment.groups["gene"]) - set(data.genes))
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    paper = " (as published: the panel is chosen on all slides, so transductive)" * (recipe["PROTOCOL"] == "paper")
    of = {"harmony": "Harmony over all slides, the test slide included", "lognorm": "log1p of counts per 10,000"}
    print(f"\n{data.title}{Path(script['__file__']).stem}")
    for name, value in {
        "data": f"{data.root}: {slides.nunique()} slides, {len(slides):,} spots x {len(data.genes):,} genes",
        "target": f"{recipe['TARGET']} ({of[recipe['TARGET']]})",
        "protocol": recipe["PROTOCOL"] + paper,
        "split": "; ".join(split),
        "gene groups": experiment.groups.attrs["source"] + f"; not in the panel: {', '.join(missing)}" * bool(missing),
        "device": f"{device.type} ({where}), {str(dtype).removeprefix('torch.')} ({reason})",
        "weights": "pretrained (timm)" if recipe["PRETRAINED"] else "random: no pretraining",
    }.items():
        print(f"{name:11} {value}")


def tabulate_scores(experiment, rows, ahead=None):
    """One line a setting, split and truth, as text: mean±sd over n seeds; 0.310/47 is of 47 genes only; 95 % intervals
    over blocks. `ahead`, a table of pair_differences, adds how far HEG r is ahead of another setting's.
    """
    sizes, lines = {"all": len(experiment.data.genes), **experiment.groups["group"].value_counts()}, []
    width = max(len(row["setting"]) for row in rows)
    for (setting, split, truth), of in pd.DataFrame(rows).groupby(["setting", "split", "truth"], sort=False):
        line = {"setting": setting.ljust(width), "n": len(of), "split": split, "truth": truth}
        line |= {"spots": int(of["n_spots"].mean())}
        for heading in (*GROUPS, "all"):
            r, n = of[heading.lower()].astype(float), of[f"{heading.lower()}_n"].min()
            spread, few = f"±{r.std():.3f}" * (len(of) > 1), f"/{n}" * bool(n < sizes.get(heading, 0))
            line[heading] = f"{r.mean():.3f}{spread}{few}"
        line["HEG 95 %"] = "[{:.2f}, {:.2f}]".format(*np.mean([ends or [np.nan] * 2 for ends in of["heg_ci"]], axis=0))
        if ahead is not None and split == "test" and truth == "lognorm":
            of_pair = ahead[(ahead["setting"] == setting) & (ahead["group"] == "HEG")].itertuples()
            line["HEG ahead"] = "".join(
                f"{d.difference:+.3f} [{d.low:+.3f}, {d.high:+.3f}] of {d.minus}" for d in of_pair
            )
        line |= {"HEG pooled": f"{of['heg_pooled'].astype(float).mean():.3f}"}
        line |= {"r>=.30": f"{of['n_genes_r30'].mean():.0f}", "MSE": f"{of['mse'].astype(float).mean():.4f}"}
        lines.append(line | {"seconds": f"{of['seconds'].sum():.0f}"})
    return pd.DataFrame(lines).fillna("").replace(r"^\[?\+?nan.*", "-", regex=True)


def print_table(title, data, table):
    """One ruled table."""
    head, *body = table.to_string(index=False, col_space=7).splitlines()
    double, single = "=" * len(head), "-" * len(head)
    print(f"\n{data.title}{title} ({data.root})", double, head, single, *body, double, sep="\n")


def finish_run(script, experiment, rows):
    """Print the one JSON line that ends every script's output."""
    data = experiment.data
    result = {"script": Path(script["__file__"]).stem, "data_root": str(data.root), "simulated": data.meta["simulated"]}
    print(json.dumps(result | {"out": str(experiment.out), "rows": rows}))
