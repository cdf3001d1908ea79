"""Time and memory of script 19 on a slide of Visium HD at its full size, simulated.

Question   Do 670,000 bins become spots in minutes and under 4 GB?
Reads      nothing
Writes     <OUT>/hd.csv and machine.json; the slide made for it under OUT (5 GB, removed at the end)
Prints     one line: bins, counts that are not 0, spots, seconds and peak memory of 19
Command    python benchmarks/measure_hd.py
Override   python benchmarks/measure_hd.py --counts 600

Memory is what the kernel cannot drop (RssAnon). Pages of memory-mapped files are the files' own.
"""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

import shell

if __name__ == "__main__":  # Mistakes are told before the imports, which take long.
    shell.check_command(__file__)


import json
import shutil

import h5py
import numpy as np
import pandas as pd
import polars
from compare_stages import describe_machine
from measure_growth import make_image, watch, write_names

# ---------------------------------------------------------------------------------------- constants
OUT = "runs/benchmarks"
SIDE = 819  # bins; 819 x 819 are 670,761
COUNTS = 300  # a bin, on average
KEEP = False  # true = leave the slide and its data root, OUT/hd_data
# --------------------------------------------------------------------------------------------------

GENES = 18_085  # of the human probe set
BIN_PX = 29.2  # of 8 um at 0.274 um/px
MARGIN = 150  # px of the image around the bins
ROWS_AT_ONCE = 20


def name_bins(side):
    """The barcodes of side x side bins, row by row."""
    return [f"s_008um_{row:05d}_{column:05d}-1" for row in range(side) for column in range(side)]


def write_positions(path, side):
    """tissue_positions.parquet of bins that are all on tissue."""
    row, column = (axis.ravel() for axis in np.mgrid[:side, :side])
    table = pd.DataFrame({"barcode": name_bins(side), "in_tissue": 1})
    table["array_row"], table["array_col"] = row, column
    table["pxl_row_in_fullres"] = MARGIN + (row + 0.5) * BIN_PX
    table["pxl_col_in_fullres"] = MARGIN + (column + 0.5) * BIN_PX
    polars.DataFrame({name: column.to_list() for name, column in table.items()}).write_parquet(path)


def count_features(random, ends, n_bins, counts):
    """(feature, count, features up to each bin's end) of bins of Poisson depth."""
    depth = random.poisson(counts, n_bins)
    features = np.searchsorted(ends, random.random(depth.sum()))
    bins = np.repeat(np.arange(n_bins), depth)
    found, times = np.unique(bins * GENES + features, return_counts=True)
    return found % GENES, times, np.bincount(found // GENES, minlength=n_bins).cumsum()


def write_counts(path, side, counts):
    """filtered_feature_bc_matrix.h5, a few rows of bins at a time; returns how many are not 0."""
    random = np.random.default_rng(0)
    rates = random.lognormal(0, 1.7, GENES)
    ends = (rates / rates.sum()).cumsum()
    with h5py.File(path, "w") as file:
        matrix = file.create_group("matrix")
        growing = {"maxshape": (None,), "chunks": (2**18,), "compression": "gzip"}
        for name, kind in (("data", np.int32), ("indices", np.int64)):
            matrix.create_dataset(name, (0,), kind, compression_opts=1, **growing)
        indptr = [np.zeros(1, np.int64)]
        for top in range(0, side, ROWS_AT_ONCE):
            n_bins = (min(top + ROWS_AT_ONCE, side) - top) * side
            features, times, within = count_features(random, ends, n_bins, counts)
            begin = indptr[-1][-1]
            for name, values in (("data", times), ("indices", features)):
                matrix[name].resize((begin + len(values),))
                matrix[name][begin:] = values
            indptr.append(begin + within)
        matrix["indptr"] = np.concatenate(indptr)
        matrix["shape"] = np.array([GENES, side**2])
        write_names(matrix, name_bins(side), GENES)
    return int(indptr[-1][-1])


def make_slide(folder, side, counts):
    """outs/ of Visium HD and scan.tif in a folder; returns how many counts are not 0."""
    binned = folder / "outs" / "binned_outputs" / "square_008um"
    (binned / "spatial").mkdir(parents=True)
    write_positions(binned / "spatial" / "tissue_positions.parquet", side)
    scales = {"microns_per_pixel": 8 / BIN_PX, "bin_size_um": 8.0}
    (binned / "spatial" / "scalefactors_json.json").write_text(json.dumps(scales))
    width = round(side * BIN_PX) + 2 * MARGIN
    make_image(folder / "scan.tif", width, width)
    return write_counts(binned / "filtered_feature_bc_matrix.h5", side, counts)


def main():
    out = Path(OUT)
    folder = out / "hd_data"
    shutil.rmtree(folder, ignore_errors=True)
    not_zero = make_slide(folder, SIDE, COUNTS)
    root = folder / "root"
    sources = ["--from-spaceranger", folder / "outs", "--images", folder / "scan.tif"]
    script = REPOSITORY / "19_make_patches_and_csv.py"
    seconds, memory, _ = watch(script, "--data-root", root, "--target", "lognorm", *sources)
    spots = np.load(root / "dataset" / "patches.npy", mmap_mode="r").shape[0]
    line = {"bins": SIDE**2, "entries, M": not_zero / 1e6, "spots": spots}
    table = pd.DataFrame([line | {"19, s": seconds, "19, GB": memory}])
    print(table.to_string(index=False, float_format="{:.2f}".format))
    shell.save_csv(out / "hd.csv", table)
    shell.save_json(out / "machine.json", describe_machine())
    if not KEEP:
        shutil.rmtree(folder)


if __name__ == "__main__":
    shell.run_script(globals())
