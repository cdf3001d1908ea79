"""The bins of Visium HD, summed to spots."""

import math
import tempfile
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse

from common import POSITION_COLUMNS
from slides import inputs, space_ranger
from slides.counts import check_counts, read_matrix_file
from slides.imaging import ARRAY, PLACE
from slides.positions import read_positions
from study import files
from study.errors import InputError

BINS = ("square_008um", "square_016um")  # of Visium HD's folders, the finest of these is read
BIN_POSITIONS = "tissue_positions.parquet"


def make_spots(outs, name, bin_um):
    """(positions file, matrix file) of spots of `bin_um`, summed from a folder of Visium HD's bins.

    Both lie in inputs.scratch_folder(). The matrix holds the spots of the tissue alone.
    """
    side = count_bins(outs, bin_um)
    positions_file = space_ranger.find_spatial(outs, BIN_POSITIONS)
    matrix = space_ranger.find_matrix(outs)
    bins = read_positions(positions_file)
    spots, spot_of_bin = group_bins(bins, side, bin_um)
    tissue = (spots["in_tissue"] == 1).to_numpy()
    if not tissue.any():
        raise InputError(
            f"{positions_file}: no spot of {bin_um:g} um has half of its bins in_tissue"
        )
    table = read_matrix_file(matrix)
    check_counts(table, matrix)
    rows = bins.index.get_indexer(table.obs_names)
    if (rows < 0).any():
        raise InputError(
            f"{positions_file}: no position for barcode {table.obs_names[rows < 0][0]} of {matrix}:"
            " the two files are not of one slide"
        )
    counts = sum_bins(table.X, spot_of_bin[rows], tissue)
    summed = anndata.AnnData(counts, pd.DataFrame(index=spots.index[tissue]), table.var)
    print(
        f"{name}: {len(bins):,} bins are summed to {len(spots):,} spots of {bin_um:g} um, "
        f"{tissue.sum():,} of them in_tissue"
    )
    folder = Path(tempfile.mkdtemp(dir=inputs.scratch_folder()))
    made = folder / f"positions_{bin_um:g}um.csv", folder / f"matrix_{bin_um:g}um.h5ad"
    files.save_csv(made[0], spots.reset_index())
    summed.write_h5ad(made[1])
    return made


def count_bins(outs, bin_um):
    """How many bins of a folder of Visium HD lie along the side of a spot of `bin_um`."""
    size = space_ranger.read_scale(outs, "bin_size_um")
    side = round(bin_um / size)
    if side < 1 or not math.isclose(side * size, bin_um):
        raise InputError(
            f"--bin-um {bin_um:g}: no multiple of the {size:g} um of the bins in {outs}; "
            f"give {max(side, 1) * size:g}"
        )
    return side


def group_bins(bins, side, bin_um):
    """(positions of spots of side x side bins, (n bins,) number of each bin's spot).

    Positions are as read_positions gives them; array_row and array_col count spots. A spot is
    in_tissue where half of its side x side bins are: those that the border of the slide cuts off
    are not.
    """
    squares = bins[ARRAY] // side
    groups = bins.groupby([squares["array_row"], squares["array_col"]])
    spots = np.rint(find_centres(bins, groups, side)).astype(np.int64)
    spots["in_tissue"] = (2 * groups["in_tissue"].sum() >= side**2).astype(np.int64)
    barcodes = [f"s_{bin_um:03.0f}um_{row:05d}_{column:05d}-1" for row, column in spots.index]
    spots = spots.reset_index().set_axis(pd.Index(barcodes, name="barcode"))
    return spots[POSITION_COLUMNS[1:]], groups.ngroup().to_numpy()


def find_centres(bins, groups, side):
    """The centres of squares of side x side bins in px, by row and column of the squares.

    It is the mean of the bins; of a square that the border of the slide cuts, it is moved to where
    the mean would be with the bins that lack, by the affine map from bins to px.
    """
    array = bins[ARRAY] - bins[ARRAY].mean()
    pixels = bins[PLACE] - bins[PLACE].mean()
    affine = np.linalg.lstsq(array.to_numpy(np.float64), pixels.to_numpy(np.float64))[0]
    means = groups[PLACE].mean()
    whole = side * means.index.to_frame().to_numpy() + (side - 1) / 2
    return means + (whole - groups[ARRAY].mean().to_numpy()) @ affine


def sum_bins(counts, spot_of_bin, kept):
    """CSR: the rows of counts (n bins, G), CSR, summed by the number of their spot.

    Spots are left out that `kept`, one bool for each, does not name.
    """
    n_bins = len(spot_of_bin)
    ones = np.ones(n_bins, counts.dtype)
    belongs = scipy.sparse.csr_matrix((ones, (spot_of_bin, np.arange(n_bins))), (len(kept), n_bins))
    return belongs[kept] @ counts
