"""Every stage of this project against the conventional pipeline: both in one run, alternating,
medians.

Question   What do memory-mapped uint8 patches, batched augmentation and the fast formats save,
           stage by stage?
Reads      nothing; with --positions a Space Ranger positions CSV of a real slide, else a hexagonal
           grid is laid
Writes     <OUT>/stages.csv and machine.json; slides and patches made for it under OUT (about 5 GB,
           removed at the end)
Prints     a line a stage: both medians, their ratio, the least and greatest ratio of the repeats,
           the target
Command    python benchmarks/compare_stages.py --positions tissue_positions_list_1.csv
Override   python benchmarks/compare_stages.py --only training --repeats 7
"""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from study import shell

if __name__ == "__main__":  # Check the command before the slow imports.
    shell.check_command(__file__)


import functools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import time
from types import SimpleNamespace

import conventional
import numpy as np
import pandas as pd
import tifffile
import torch
import torch.nn.functional as F
from torch import nn

import common
from slides import imaging
from slides.positions import read_positions
from study import exports, files, recipes, ridges, runs, shell
from study.errors import InputError

# ---------------------------------------------------------------------------------------- constants
OUT = "runs/benchmarks"
POSITIONS = ""  # Space Ranger positions of a real slide; empty = a hexagonal grid of 2,378 spots
REPEATS = 5  # of each side; dataset.csv: 3 at most
ONLY = ""  # patches, input, training, prediction, ridges, scoring or table; empty = all
STEPS = 8  # training steps of 32 patches that are timed together
DEVICE = "auto"  # auto, cpu or cuda
PRECISION = "auto"  # of this project's side
# --------------------------------------------------------------------------------------------------

HEIGHT, WIDTH = 26_000, 25_400  # px, as a slide of GSE240429
GENES, SPOTS = 3_467, 9_269  # of GSE240429
RIDGE_SIZE = 910, 2_912, 100  # spots of HER2ST, features of EfficientNet-B0, HEG and HVG
COMPRESSED = {  # kinds of slides beside the contiguous one
    "JPEG tiles": {"tile": (512, 512), "compression": "jpeg", "compressionargs": {"level": 85}},
    "LZW strips": {"rowsperstrip": 16, "compression": "lzw"},
}
TRAINED_BY = recipes.PAPER | {
    "BACKBONE": "efficientnet_b0",
    "PRETRAINED": False,
    "IMAGE_SIZE": 224,
    "BATCH_SIZE": 32,
    "LOSS": "mse",
}


def describe_host():
    """What a number depends on: the machine and the commit."""
    device = common.find_device({"DEVICE": "auto"})
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    return runs.describe_machine(device) | {"commit": commit.stdout.strip()}


def alternate(repeats, conventionally, here):
    """Seconds (repeats, 2) of both, in turn, after one round that is not counted."""
    seconds = []
    for _ in range(1 + repeats):
        pair = []
        for function in (conventionally, here):
            began = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            pair.append(time.perf_counter() - began)
        seconds.append(pair)
    return np.array(seconds[1:])


def make_row(stage, unit, pairs, amount, target):
    """A row of the table: `pairs` (repeats, 2) seconds for `amount` of the unit."""
    ratios = pairs[:, 0] / pairs[:, 1]
    old, new = np.median(pairs, axis=0)
    shown = (amount / old, amount / new) if unit.endswith("/s") else (old, new)
    return {
        "stage": stage,
        "unit": unit,
        "conventional": shown[0],
        "here": shown[1],
        "ratio": old / new,
        "range": f"{ratios.min():.1f}-{ratios.max():.1f}",
        "target": target,
    }


# ------------------------------------------------------------------------------------------ patches
def spot_corners():
    """(n, 2) rows and columns of the patches' upper left corners."""
    if POSITIONS:
        table = read_positions(Path(POSITIONS))
        return table[["pxl_row", "pxl_col"]].to_numpy() - common.PATCH_SIZE // 2
    rows, columns = (axis.ravel() for axis in np.mgrid[0:90, 0:64])
    places = np.stack([1000 + rows * 285, 1500 + columns * 329 + rows % 2 * 164], axis=1)
    centre = np.array([HEIGHT // 2, WIDTH // 2])
    inside = (np.abs(places - centre) < centre - 300).all(1)
    spots = np.random.default_rng(0).permutation(places[inside])[:2378]
    return spots - common.PATCH_SIZE // 2


def make_slides(folder):
    """{kind: path} of one image as a contiguous TIFF, as JPEG tiles and as LZW strips: simulated
    tissue, repeated.
    """
    command = [sys.executable, REPOSITORY / "18_simulate_slides.py", "--slides", "1"]
    command += ["--data-root", folder / "tissue"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (tissue,) = (folder / "tissue" / "image").iterdir()
    tissue = tifffile.imread(tissue)
    path = folder / "contiguous.tif"
    shape = (HEIGHT, WIDTH, 3)
    whole = tifffile.memmap(path, shape=shape, dtype=np.uint8, photometric="rgb")
    for top in range(0, HEIGHT, len(tissue)):
        for left in range(0, WIDTH, tissue.shape[1]):
            part = whole[top : top + len(tissue), left : left + tissue.shape[1]]
            part[:] = tissue[: part.shape[0], : part.shape[1]]
    whole.flush()
    paths = {"contiguous": path}
    for kind, options in COMPRESSED.items():
        paths[kind] = folder / f"{kind.replace(' ', '_')}.tif"
        tifffile.imwrite(
            paths[kind], whole, photometric="rgb", bigtiff=True, maxworkers=2, **options
        )
    shutil.rmtree(folder / "tissue")
    return paths


def read_memory(pid):
    """MB of a process that the kernel cannot drop: without the pages of memory-mapped files."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+)", status)  # of a process that has ended there is none
    return int(found[1]) / 1024 if found else 0.0


def watch_memory(function, *arguments):
    """(seconds, MB beyond what it began with, see read_memory) of a call in a process by itself."""
    context = multiprocessing.get_context("spawn")
    pipe, pipe_of_call = context.Pipe()
    process = context.Process(target=call_on_signal, args=(pipe_of_call, function, *arguments))
    process.start()
    pipe.recv()  # Its imports are done.
    before = peak = read_memory(process.pid)
    began = time.perf_counter()
    pipe.send("begin")
    while not pipe.poll(0.005):
        peak = max(peak, read_memory(process.pid))
    seconds = time.perf_counter() - began
    pipe.send("end")
    process.join()
    return seconds, peak - before


def call_on_signal(pipe, function, *arguments):
    """The other end of watch_memory: it lives until its memory is no longer read."""
    pipe.send("ready")
    pipe.recv()
    function(*arguments)
    pipe.send("done")
    pipe.recv()


def cut_here(path, corners, folder):
    """The reader of imaging.py, into a memory-mapped patches.npy."""
    shape = (len(corners), common.PATCH_SIZE, common.PATCH_SIZE, 3)
    patches = np.lib.format.open_memmap(folder / "patches.npy", "w+", np.uint8, shape)
    centres = corners + common.PATCH_SIZE // 2
    spots = pd.DataFrame(centres, columns=["pxl_row", "pxl_col"]).assign(barcode="")
    imaging.read_patches(path, spots, patches)
    patches.flush()


def compare_patches(folder):
    rows = []
    corners = spot_corners()
    cut = folder / "cut"
    for kind, path in make_slides(folder).items():
        watched = np.empty((REPEATS, 2, 2))  # repeat, side, (seconds, MB)
        for repeat in range(REPEATS):
            for side, function in enumerate((conventional.cut_patches, cut_here)):
                cut.mkdir()
                watched[repeat, side] = watch_memory(function, path, corners, cut)
                shutil.rmtree(cut)
        targets = (">= 20", ">= 5") if kind == "contiguous" else (">= 3", "")
        rows.append(make_row(f"patches, {kind}", "s", watched[:, :, 0], 1, targets[0]))
        rows.append(make_row("  its peak memory", "MB", watched[:, :, 1], 1, targets[1]))
        path.unlink()
    return rows


# ---------------------------------------------------------------------------------- patches to loss
def make_patches(folder, count):
    """(SpotData's patches, folder of PNG files, target (count, GENES)): noise under smooth tissue
    colours.
    """
    random = np.random.default_rng(0)
    size = common.PATCH_SIZE
    coarse = torch.from_numpy(random.uniform(60, 255, (count, 3, 14, 14)).astype(np.float32))
    smooth = F.interpolate(coarse, size=(size, size), mode="bicubic")
    smooth = smooth.permute(0, 2, 3, 1).numpy()
    array = np.clip(smooth + random.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
    np.save(folder / "patches.npy", array)
    (folder / "png").mkdir()
    conventional.save_patches(array, folder / "png")
    patches = torch.from_numpy(np.load(folder / "patches.npy", mmap_mode="c"))
    return patches, folder / "png", random.normal(size=(count, GENES)).astype(np.float32)


def place(patches):
    """(patches as scripts 20 to 25 read them, device, autocast dtype)."""
    recipe = {"DEVICE": DEVICE, "PRECISION": PRECISION, "IMAGE_SIZE": common.PATCH_SIZE}
    device, dtype, _ = common.choose_device(recipe)
    return common.place_patches(patches, common.PATCH_SIZE, device), device, dtype


def build_fast(device):
    """EfficientNet-B0 with the paper's head, as scripts 20 to 25 train it."""
    model = common.build_model(TRAINED_BY, GENES, 42)
    return model.to(device, memory_format=torch.channels_last)


def build_conventional(device):
    """The same network, whose images are normalised by their loader."""
    model = common.build_model(TRAINED_BY, GENES, 42)
    return nn.Sequential(model.backbone, model.head).to(device)


def compare_input(folder):
    """Patches to network input, on one core."""
    count = 256
    patches, png, target = make_patches(folder, count)
    images, device, _ = place(patches)
    loader = conventional.load(png, target, augmented=True, workers=0)
    normalise = build_fast(device).normalise
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(cores)})  # The thread that reads ahead as well.

    def here():
        draws = common.draw_augmentation(count, "mpa", torch.Generator().manual_seed(0))
        order = torch.randperm(count).split(32)
        parts = torch.arange(count).split(32)
        batches = common.read_ahead(images, order, device)
        for part, batch in zip(parts, batches, strict=True):
            normalise(common.augment(batch, *(draw[part] for draw in draws)))

    pairs = alternate(REPEATS, lambda: [None for _ in loader], here)
    torch.set_num_threads(threads)
    os.sched_setaffinity(0, cores)
    return [make_row("input: load, MPA, normalise, one core", "images/s", pairs, count, ">= 1.7")]


def compare_training(folder):
    count = 32 * STEPS
    patches, png, target = make_patches(folder, count)
    images, device, dtype = place(patches)
    fast, slow = build_fast(device), build_conventional(device)
    loader = conventional.load(png, target, augmented=True, workers=os.cpu_count())
    plain = torch.optim.Adam(slow.parameters(), TRAINED_BY["LEARNING_RATE"])
    optimiser, _ = common.prepare_optimiser(fast, TRAINED_BY)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    loss = common.LOSSES[TRAINED_BY["LOSS"]]
    step = functools.partial(common.make_step, fast, optimiser, scaler, loss, dtype)
    truth = torch.from_numpy(target).to(device)

    data = SimpleNamespace(target=target)
    split = SimpleNamespace(seed=42, spots=lambda role: np.arange(count), data=data)

    def conventionally():
        conventional.train_epoch(slow, loader, plain, device)

    def here():
        common.train_epoch(fast, step, images, split, TRAINED_BY, 0)

    pairs = alternate(REPEATS, conventionally, here)
    name = f"training, EfficientNet-B0, {str(dtype).removeprefix('torch.')}"
    rows = [make_row(name, "images/s", pairs, count, ">= 1.7")]
    batch = images[torch.arange(32).to(images.device)].to(device).float()
    batch = batch.contiguous(memory_format=torch.channels_last)

    def fixed():
        fast.train()
        for _ in range(STEPS):
            step(batch, truth[:32], 1.0)

    pairs = alternate(REPEATS, fixed, here)
    name = "  a fixed batch against the whole epoch"
    rows.append(make_row(name, "images/s", pairs, count, ">= 0.95"))
    if device.type == "cuda":
        print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GB")
    return rows


def compare_prediction(folder):
    count = 512
    patches, png, target = make_patches(folder, count)
    images, device, dtype = place(patches)
    fast, slow = build_fast(device), build_conventional(device)
    loader = conventional.load(png, target, augmented=False, workers=os.cpu_count())
    conventionally = functools.partial(conventional.predict, slow, loader, device)
    here = functools.partial(common.predict, fast, images, np.arange(count), dtype=dtype)
    pairs = alternate(REPEATS, conventionally, here)
    name = f"prediction, {str(dtype).removeprefix('torch.')}"
    return [make_row(name, "images/s", pairs, count, ">= 2")]


# ------------------------------------------------------------------------------------------- ridges
def make_ridge_problem(count, width, genes):
    """(features (count, width), expression (count, genes), table of the spots): one slide, on which
    twelve fields that vary from spot to spot are seen in both.
    """
    random = np.random.default_rng(0)
    fields = random.normal(size=(count, 12))
    strength = np.geomspace(1, 0.01, width)
    features = fields @ random.normal(size=(12, width)) + strength * random.normal(
        size=(count, width)
    )
    target = fields @ random.normal(size=(12, genes)) + 5 * random.normal(size=(count, genes))
    side = int(np.ceil(np.sqrt(count)))
    rows, columns = np.divmod(np.arange(count), side)
    spots = pd.DataFrame({"id": np.arange(count), "tissue_index": 1, "pitch": 1.0})
    spots = spots.assign(pxl_row=rows, pxl_col=columns, block=rows // 5 * side + columns // 5)
    return features.astype(np.float32), target.astype(np.float32), spots


def compare_ridges(folder):
    """The choice of a ridge's penalty and rank, of HER2ST's spots and EfficientNet-B0's stages."""
    count, width, genes = RIDGE_SIZE
    features, target, table = make_ridge_problem(count, width, genes)
    spots, slides = np.arange(count), table["tissue_index"].to_numpy()

    def prepare():
        turned, _ = ridges.turn_to_span(features, spots, slides)
        return ridges.Centred(turned, target, spots, slides)

    def conventionally():
        centred = prepare()
        x, y = next(centred.parts(spots))
        penalties = ridges.ALPHAS * centred.mean_squared_length
        number, rank = conventional.choose_shrinkage(x, y, ridges.choose_folds(table), penalties)
        return ridges.Shrinkage(float(ridges.ALPHAS[number]), int(rank))

    def here():
        return ridges.choose_shrinkage(prepare(), spots, table)[0]

    assert conventionally() == here()
    pairs = alternate(REPEATS, conventionally, here)
    return [make_row(f"ridge {count:,} x {width:,}, {genes} genes", "s", pairs, 1, ">= 2")]


# ------------------------------------------------------------------------------------------- tables
def compare_scoring(folder):
    predicted, truth = np.random.default_rng(0).normal(size=(2, 2277, GENES)).astype(np.float32)
    conventionally = functools.partial(conventional.correlate, predicted, truth)
    here = functools.partial(common.pearson_per_gene, predicted, truth)
    assert np.allclose(conventionally(), here())
    pairs = alternate(REPEATS, conventionally, here)
    return [make_row(f"scoring 2,277 x {GENES:,}", "s", pairs, 1, ">= 5")]


def compare_table(folder):
    """dataset.csv as script 19 writes it, against pandas, and the same expression as the .npy that
    scripts read.
    """
    path = folder / "dataset.csv"
    repeats = min(REPEATS, 3)
    values = np.random.default_rng(0).normal(2, 1, (SPOTS, GENES)).astype(np.float32)
    genes = [f"G{g}" for g in range(GENES)]
    spots = pd.DataFrame({name: np.arange(SPOTS) for name in common.ID_COLUMNS})
    spots = spots.astype({"id": str, "barcode": str})
    whole = spots.join(pd.DataFrame(values, columns=genes))

    write_conventionally = functools.partial(whole.to_csv, path, index=False)
    write_here = functools.partial(exports.save_expression, path, spots, values, genes)
    np.save(folder / "lognorm.npy", values)

    def read_conventionally():
        return pd.read_csv(path)[genes].to_numpy(np.float32)

    def read_here():
        return np.array(common.map_array(folder / "lognorm.npy"))

    pairs = alternate(repeats, write_conventionally, write_here)
    rows = [make_row(f"dataset.csv {SPOTS:,} x {GENES:,}, write", "s", pairs, 1, ">= 4")]
    pairs = alternate(repeats, read_conventionally, read_here)
    return [*rows, make_row("  read", "s", pairs, 1, ">= 2")]


STAGES = {
    "patches": compare_patches,
    "input": compare_input,
    "training": compare_training,
    "prediction": compare_prediction,
    "ridges": compare_ridges,
    "scoring": compare_scoring,
    "table": compare_table,
}


def main():
    if ONLY not in ("", *STAGES):
        raise InputError(f"--only {ONLY}: expected one of {', '.join(STAGES)}")
    out = Path(OUT)
    machine = describe_host()
    print(json.dumps(machine))
    rows = []
    for name, compare in STAGES.items():
        if ONLY not in ("", name):
            continue
        work = out / f"work-{name}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            rows += compare(work)
        finally:
            shutil.rmtree(work)
        table = pd.DataFrame(rows)
        print(table.to_string(index=False, float_format="{:.2f}".format), flush=True)
    files.save_csv(out / "stages.csv", table)
    files.save_json(out / "machine.json", machine)


if __name__ == "__main__":
    shell.run_script(globals())
