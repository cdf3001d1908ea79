"""How time and memory of scripts 19 and 20 grow with the number of spots, on slides of 2,500.

Question   Does anything hold a slide, all patches or all expression in memory?
Reads      nothing
Writes     <OUT>/growth.csv and machine.json; slides made for it under OUT (22 GB for 100,000 spots,
           removed at the end)
Prints     a line a size: patches and expression on disk, and for 19 and 20 seconds and peak memory;
           then one epoch's images/s
Command    python benchmarks/measure_growth.py
Override   python benchmarks/measure_growth.py --sizes 100000 --keep

Memory is what the kernel cannot drop (RssAnon): without the pages of memory-mapped files.
"""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from study import shell

if __name__ == "__main__":  # Check the command before the slow imports.
    shell.check_command(__file__)


import multiprocessing
import shutil
import subprocess
import time

import h5py
import numpy as np
import pandas as pd
import tifffile
from compare_stages import describe_machine, read_memory

# ---------------------------------------------------------------------------------------- constants
OUT = "runs/benchmarks"
SIZES = (10_000, 30_000, 100_000)  # spots
GENES = 3_467  # of the panel, as GSE240429's
IMAGE_SIZE = 64  # px of 20's network
EPOCHS = 1
KEEP = False  # true = leave the data root of the last size, OUT/growth_data
# --------------------------------------------------------------------------------------------------

SPOTS = 2_500  # a slide
FEATURES = 36_601
VARIABLE = 3_000  # features that vary as a highly variable gene does
HEIGHT, WIDTH = 16_000, 17_500  # px: 50 x 50 spots at a pitch of 329 px, 0.84 GB of pixels


def make_image(path):
    """A slide of smooth noise with a grain, so that no two patches are the same."""
    random = np.random.default_rng(0)
    image = tifffile.memmap(path, shape=(HEIGHT, WIDTH, 3), dtype=np.uint8, photometric="rgb")
    columns = np.sin(np.arange(WIDTH) / 900)[:, None] * (20, 30, 15)
    for top in range(0, HEIGHT, 400):
        part = image[top : top + 400]
        rows = np.cos(np.arange(top, top + len(part)) / 700)[:, None, None] * (30, 20, 25)
        grain = random.normal(0, 12, (*part.shape[:2], 1))
        part[:] = np.clip(170 + rows + columns + grain, 0, 255)
    image.flush()


def write_counts(path, spots, random, rates):
    """filtered_feature_bc_matrix.h5 of gamma-Poisson counts, about 2,700 features a spot."""
    data, indices, ends = [], [], [0]
    for _ in range(spots):
        varied = rates.copy()
        varied[:VARIABLE] *= random.gamma(1, 1, VARIABLE)
        counts = random.poisson(varied)
        (features,) = counts.nonzero()
        data.append(counts[features])
        indices.append(features)
        ends.append(ends[-1] + len(features))
    with h5py.File(path, "w") as file:
        matrix = file.create_group("matrix")
        matrix["data"] = np.concatenate(data).astype(np.int32)
        matrix["indices"] = np.concatenate(indices)
        matrix["indptr"] = np.array(ends)
        matrix["shape"] = np.array([FEATURES, spots])
        matrix["barcodes"] = np.array([f"SPOT{i:05d}-1" for i in range(spots)], "S")
        features = matrix.create_group("features")
        features["id"] = features["name"] = np.array([f"G{g}" for g in range(FEATURES)], "S")
        features["genome"] = np.full(FEATURES, b"none")
        features["feature_type"] = np.full(FEATURES, b"Gene Expression")


def make_root(root, size):
    """A data root of `size` spots on slides that show one image, shifted, and a panel of GENES."""
    random = np.random.default_rng(1)
    rates = random.lognormal(-3.2, 1.7, FEATURES)
    root.mkdir(parents=True)
    make_image(root / "slide.tif")
    panel = pd.DataFrame({"gene": [f"G{g}" for g in range(GENES)]})
    panel.to_csv(root / "panel.csv", index=False)
    rows, columns = (axis.ravel() for axis in np.mgrid[0:50, 0:50])
    manifest = []
    for slide in range(1, size // SPOTS + 1):
        spots = pd.DataFrame({"array_row": rows, "array_col": columns * 2 + rows % 2})
        spots["pxl_row"] = 500 + 285 * rows + 7 * slide
        spots["pxl_col"] = 500 + 329 * columns + 164 * (rows % 2) + 5 * slide
        spots.insert(0, "barcode", [f"SPOT{i:05d}-1" for i in range(len(spots))])
        spots.insert(1, "in_tissue", 1)
        positions, matrix = f"positions{slide}.csv", f"matrix{slide}.h5"
        spots.to_csv(root / positions, header=False, index=False)
        write_counts(root / matrix, len(spots), random, rates)
        row = {"tissue_index": slide, "name": f"S{slide}", "donor": f"D{slide}"}
        row |= {"image": "slide.tif", "um_per_px": 0.304}
        manifest.append(row | {"positions": positions, "matrix": matrix})
    pd.DataFrame(manifest).to_csv(root / "slides.csv", index=False)


def watch(*command):
    """(seconds, peak GB as read_memory tells it) of a script, with the scripts that it calls."""
    began = time.perf_counter()
    peak = 0
    command = [sys.executable, *map(str, command)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, read_memory(process.pid))
            time.sleep(0.02)
    if process.returncode:
        raise shell.InputError(
            f"{command[1]} ended with {process.returncode}: its message stands above"
        )
    return time.perf_counter() - began, peak / 1024


def measure(root, size):
    """A row of the table: what 19 and 20 take on a data root of this size."""
    shared = ["--data-root", root, "--target", "lognorm"]
    panel = ["--panel", root / "panel.csv"]
    seconds, memory = watch(REPOSITORY / "19_make_patches_and_csv.py", *shared, *panel)
    row = {"spots": size}
    for name in ("patches", "lognorm"):
        row[f"{name}, GB"] = (root / "dataset" / f"{name}.npy").stat().st_size / 2**30
    row |= {"19, s": seconds, "19, GB": memory}
    network = ["--epochs", EPOCHS, "--image-size", IMAGE_SIZE, "--pretrained", "false"]
    options = [*shared, *network, "--test-slide", 2, "--out", root / "run"]
    seconds, memory = watch(REPOSITORY / "20_train_effb0_sota_split8020.py", *options)
    rows = pd.read_csv(root / "run" / "rows.csv")
    (speed,) = rows["images_per_s"].dropna().unique()
    return row | {"20, s": seconds, "20, GB": memory, "images/s": speed}


def main():
    out = Path(OUT)
    measured = []
    root = out / "growth_data"
    shutil.rmtree(root, ignore_errors=True)
    for size in SIZES:
        # In a process of its own, so that in a memory cgroup the scripts have all of it.
        maker = multiprocessing.Process(target=make_root, args=(root, size))
        maker.start()
        maker.join()
        if maker.exitcode:
            raise shell.InputError(f"the slides of {size} spots could not be made: see above")
        measured.append(measure(root, size))
        print(
            pd.DataFrame(measured).to_string(index=False, float_format="{:.2f}".format), flush=True
        )
        if not (KEEP and size == SIZES[-1]):
            shutil.rmtree(root)
    shell.save_csv(out / "growth.csv", pd.DataFrame(measured))
    shell.save_json(out / "machine.json", describe_machine())


if __name__ == "__main__":
    shell.run_script(globals())
