"""Every stage of this project against the conventional pipeline: both in one run, alternating, medians.

Question   What do memory-mapped uint8 patches, batched augmentation and the fast formats save, stage by stage?
Reads      nothing; with --positions a Space Ranger positions CSV of a real slide, else a hexagonal grid is laid
Writes     <OUT>/stages.csv and machine.json; slides and patches made for it under OUT (about 5 GB, removed at the end)
Prints     a line a stage: both medians, their ratio, the least and greatest ratio of the repeats, the target
Command    python benchmarks/compare_stages.py --positions tissue_positions_list_1.csv
Override   python benchmarks/compare_stages.py --only training --repeats 7
"""

import functools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import polars
import tifffile
import torch
import torch.nn.functional as F
from torch import nn

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

import conventional  # noqa: E402

import common  # noqa: E402
import slides  # noqa: E402

# ---------------------------------------------------------------------------------------------- constants
OUT = "runs/benchmarks"
POSITIONS = ""  # Space Ranger positions of a real slide; empty = a hexagonal grid of 2,378 spots
REPEATS = 5  # of each side; patches: 5 as well, dataset.csv: 3
ONLY = ""  # one stage: patches, input, training, prediction, scoring or table; empty = all
STEPS = 8  # training steps of 32 patches that are timed together
DEVICE = "auto"  # auto, cpu or cuda
PRECISION = "auto"  # of this project's side
# --------------------------------------------------------------------------------------------------------

HEIGHT, WIDTH = 26_000, 25_400  # px, as a slide of GSE240429
GENES, SPOTS = 3_467, 9_269  # of GSE240429
RECIPE = {
    "BACKBONE": "efficientnet_b0", "PRETRAINED": False, "HIDDEN": 3000, "TRAINABLE_STAGES": -1, "AUG": "mpa",
    "BATCH_SIZE": 32, "LEARNING_RATE": 3e-4, "EPOCHS": 30,
}  # fmt: skip


def describe_machine():
    """What a number depends on: common's facts and the commit."""
    device, _, _ = common.choose_device({"DEVICE": "auto", "PRECISION": "auto"})
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
    return common.describe_machine(device) | {"commit": commit.stdout.strip()}


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


def line(stage, unit, pairs, amount, target):
    """A row of the table: `pairs` (repeats, 2) seconds for `amount` of the unit."""
    ratios = pairs[:, 0] / pairs[:, 1]
    old, new = np.median(pairs, axis=0)
    rates = {"conventional": amount / old, "here": amount / new} if "/s" in unit else {"conventional": old, "here": new}
    spread = f"{ratios.min():.1f}-{ratios.max():.1f}"
    return {"stage": stage, "unit": unit, **rates, "ratio": old / new, "range": spread, "target": target}


# ---------------------------------------------------------------------------------------------- patches
def spot_corners():
    """(n, 2) rows and columns of the patches' upper left corners."""
    if POSITIONS:
        table = slides.read_positions(Path(POSITIONS))
        return table[["pxl_row", "pxl_col"]].to_numpy() - common.PATCH_SIZE // 2
    rows, cols = np.mgrid[0:90, 0:64]
    places = np.stack([1000 + rows * 285, 1500 + cols * 329 + rows % 2 * 164], 2).reshape(-1, 2)
    inside = places[(np.abs(places - (HEIGHT // 2, WIDTH // 2)) < (HEIGHT // 2 - 300, WIDTH // 2 - 300)).all(1)]
    return np.random.default_rng(0).permutation(inside)[:2378] - common.PATCH_SIZE // 2


def make_slides(folder, kinds=("contiguous", "jpeg_tiles", "lzw_strips")):
    """{kind: path} of one image as a contiguous TIFF, and as JPEG tiles or LZW strips: simulated tissue, repeated."""
    subprocess.run(
        [sys.executable, REPOSITORY / "18_simulate_slides.py", "--data-root", folder / "tissue", "--slides", "1"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    (tissue,) = (folder / "tissue" / "image").iterdir()
    tissue = tifffile.imread(tissue)
    paths = {kind: folder / f"{kind}.tif" for kind in kinds}
    whole = tifffile.memmap(paths["contiguous"], shape=(HEIGHT, WIDTH, 3), dtype=np.uint8, photometric="rgb")
    for top in range(0, HEIGHT, len(tissue)):
        for left in range(0, WIDTH, tissue.shape[1]):
            part = whole[top : top + len(tissue), left : left + tissue.shape[1]]
            part[:] = tissue[: part.shape[0], : part.shape[1]]
    whole.flush()
    jpeg = {"tile": (512, 512), "compression": "jpeg", "compressionargs": {"level": 85}}
    options = {"jpeg_tiles": jpeg, "lzw_strips": {"rowsperstrip": 16, "compression": "lzw"}}
    for kind in kinds[1:]:
        tifffile.imwrite(paths[kind], whole, photometric="rgb", bigtiff=True, maxworkers=2, **options[kind])
    shutil.rmtree(folder / "tissue")
    return paths


def watch_memory(function, *arguments):
    """(seconds, MB) of a call in a process of its own: memory that the kernel cannot drop, beyond what it began with.
    Pages of memory-mapped files are left out, since they are the file's own and go when memory is short.
    """
    receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_watched, args=(sender, function, *arguments))
    process.start()
    result = receiver.recv()
    process.join()
    return result


def _watched(sender, function, *arguments):
    def anonymous():
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) / 1024

    peak, done, before = [0.0], threading.Event(), anonymous()

    def watch():
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.perf_counter()
    function(*arguments)
    seconds = time.perf_counter() - began
    done.set()
    thread.join()
    sender.send((seconds, peak[0]))


def cut_here(path, corners, folder):
    """The reader of slides.py, into a memory-mapped patches.npy."""
    shape = len(corners), common.PATCH_SIZE, common.PATCH_SIZE, 3
    patches = np.lib.format.open_memmap(folder / "patches.npy", "w+", np.uint8, shape)
    spots = pd.DataFrame(corners + common.PATCH_SIZE // 2, columns=["pxl_row", "pxl_col"]).assign(barcode="")
    slides.read_patches(path, spots, patches)
    patches.flush()


def compare_patches(folder):
    lines, corners = [], spot_corners()
    for kind, path in make_slides(folder).items():
        pairs, peaks = [], []
        for repeat in range(REPEATS):
            sides = []
            for name, function in (("conventional", conventional.cut_patches), ("here", cut_here)):
                out = folder / f"{name}{repeat}"
                out.mkdir()
                sides.append(watch_memory(function, path, corners, out))
                shutil.rmtree(out)
            pairs.append([seconds for seconds, _ in sides])
            peaks.append([peak for _, peak in sides])
        target = ">= 20" if kind == "contiguous" else ">= 3"
        lines.append(line(f"patches, {kind.replace('_', ' ')}", "s", np.array(pairs), 1, target))
        lines.append(line("  its peak memory", "MB", np.array(peaks), 1, ">= 5" if kind == "contiguous" else ""))
        path.unlink()
    return lines


# ---------------------------------------------------------------------------------------------- patches to loss
def make_patches(folder, count):
    """(SpotData's patches, folder of PNG files, target (count, GENES)): noise under smooth tissue colours."""
    random, size = np.random.default_rng(0), common.PATCH_SIZE
    coarse = torch.from_numpy(random.uniform(60, 255, (count, 3, 14, 14)).astype(np.float32))
    smooth = F.interpolate(coarse, size=(size, size), mode="bicubic").permute(0, 2, 3, 1).numpy()
    array = np.clip(smooth + random.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
    np.save(folder / "patches.npy", array)
    (folder / "png").mkdir()
    conventional.save_patches(array, folder / "png")
    patches = torch.from_numpy(np.load(folder / "patches.npy", mmap_mode="c"))
    return patches, folder / "png", random.normal(size=(count, GENES)).astype(np.float32)


def placed(patches):
    device, dtype, reason = common.choose_device(
        {"DEVICE": DEVICE, "PRECISION": PRECISION, "IMAGE_SIZE": common.PATCH_SIZE}
    )
    return common.place_patches(patches, common.PATCH_SIZE, device), device, dtype, reason


def build(device, fast):
    """EfficientNet-B0 with the paper's head, for either side; the conventional one normalises in its loader."""
    model = common.build_model(RECIPE, GENES, 42)
    return model.to(device, memory_format=torch.channels_last) if fast else nn.Sequential(model.backbone, model.head)


def compare_input(folder):
    """Patches to network input, on one core."""
    patches, png, target = make_patches(folder, count := 256)
    images, device, _, _ = placed(patches)
    loader = conventional.load(png, target, augmented=True, workers=0)
    normalise, threads, cores = build(device, True).normalise, torch.get_num_threads(), os.sched_getaffinity(0)
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(cores)})  # the thread that reads ahead as well

    def here():
        draw = common.draw_augmentation(count, "mpa", torch.Generator().manual_seed(0))
        batches = torch.randperm(count).split(32)
        for k, batch in enumerate(common.read_ahead(images, batches, device)):
            normalise(common.augment(batch, *(part[32 * k : 32 * k + 32] for part in draw)))

    pairs = alternate(REPEATS, lambda: [None for _ in loader], here)
    torch.set_num_threads(threads)
    os.sched_setaffinity(0, cores)
    return [line("input: load, MPA, normalise, one core", "images/s", pairs, count, ">= 1.7")]


def compare_training(folder):
    count = 32 * STEPS
    patches, png, target = make_patches(folder, count)
    images, device, dtype, _ = placed(patches)
    fast, slow = build(device, True), build(device, False).to(device)
    loader = conventional.load(png, target, augmented=True, workers=os.cpu_count())
    plain = torch.optim.Adam(slow.parameters(), RECIPE["LEARNING_RATE"])
    optimiser, _ = common.adam_with_cosine(fast.parameters(), RECIPE)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    truth, rows = torch.from_numpy(target).to(device), torch.arange(count)
    epoch = functools.partial(common.train_epoch, fast, optimiser, scaler, images, truth, rows, RECIPE, 42, 0, dtype)
    pairs = alternate(REPEATS, lambda: conventional.train_epoch(slow, loader, plain, device), epoch)
    lines = [line(f"training, EfficientNet-B0, {str(dtype)[6:]}", "images/s", pairs, count, ">= 1.7")]
    batch = images[torch.arange(32).to(images.device)].to(device).float().contiguous(memory_format=torch.channels_last)

    def fixed():
        fast.train()
        for _ in range(STEPS):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                predicted = fast(batch)
            loss = F.mse_loss(predicted.float(), truth[:32])
            optimiser.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimiser)
            scaler.update()

    pairs = alternate(REPEATS, fixed, epoch)
    lines.append(line("  a fixed batch against the whole epoch", "images/s", pairs, count, ">= 0.95"))
    if device.type == "cuda":
        print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GB")
    return lines


def compare_prediction(folder):
    patches, png, target = make_patches(folder, count := 512)
    images, device, dtype, _ = placed(patches)
    fast, slow = build(device, True), build(device, False).to(device)
    loader = conventional.load(png, target, augmented=False, workers=os.cpu_count())
    here = functools.partial(common.predict, fast, images, np.arange(count), dtype=dtype)
    pairs = alternate(REPEATS, lambda: conventional.predict(slow, loader, device), here)
    return [line(f"prediction, {str(dtype)[6:]}", "images/s", pairs, count, ">= 2")]


# ---------------------------------------------------------------------------------------------- tables
def compare_scoring(folder):
    predicted, truth = np.random.default_rng(0).normal(size=(2, 2277, GENES)).astype(np.float32)
    assert np.allclose(conventional.correlate(predicted, truth), common.pearson_per_gene(predicted, truth))
    both = (functools.partial(f, predicted, truth) for f in (conventional.correlate, common.pearson_per_gene))
    return [line(f"scoring 2,277 x {GENES:,}", "s", alternate(REPEATS, *both), 1, ">= 5")]


def compare_table(folder):
    """dataset.csv as script 19 writes it and as common.load_dataset reads it, against pandas."""
    values = np.random.default_rng(0).normal(2, 1, (SPOTS, GENES)).astype(np.float32)
    names, path, repeats = [f"G{g}" for g in range(GENES)], folder / "dataset.csv", min(REPEATS, 3)
    spots = pd.DataFrame({name: np.arange(SPOTS) for name in common.ID_COLUMNS}).astype({"id": str, "barcode": str})
    whole = spots.join(pd.DataFrame(values, columns=names))
    here = functools.partial(common.save_expression, path, spots, values, names)
    pairs = alternate(repeats, lambda: whole.to_csv(path, index=False), here)
    lines = [line(f"dataset.csv {SPOTS:,} x {GENES:,}, write", "s", pairs, 1, ">= 4")]
    schema = dict.fromkeys(names, polars.Float32)
    pairs = alternate(
        repeats,
        lambda: pd.read_csv(path)[names].to_numpy(np.float32),
        lambda: polars.scan_csv(path, schema_overrides=schema).select(names).collect().to_numpy(),
    )
    return [*lines, line("  read", "s", pairs, 1, ">= 2")]


STAGES = {
    "patches": compare_patches, "input": compare_input, "training": compare_training,
    "prediction": compare_prediction, "scoring": compare_scoring, "table": compare_table,
}  # fmt: skip


def main():
    out, lines = Path(OUT), []
    common.require(ONLY in ("", *STAGES), f"--only {ONLY}: expected one of {', '.join(STAGES)}")
    out.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    print(json.dumps(machine))
    for name in [name for name in STAGES if ONLY in ("", name)]:
        work = out / f"work-{name}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            lines += STAGES[name](work)
        finally:
            shutil.rmtree(work)
        print(pd.DataFrame(lines).to_string(index=False, float_format="{:.2f}".format), flush=True)
    common.save_csv(out / "stages.csv", pd.DataFrame(lines))
    (out / "machine.json").write_text(json.dumps(machine, indent=1) + "\n")


if __name__ == "__main__":
    common.run_script(globals())
