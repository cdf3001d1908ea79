"""Visium HD: bins are summed to spots as a dense sum gives them, on a square grid that script 19
takes as it takes Visium's; what does not fit together is refused in one line.
"""

import json
from decimal import Decimal

import anndata
import numpy as np
import pandas as pd
import polars
import pytest
import scipy.sparse
import tifffile
from conftest import run_script, stdout_of, write_h5, write_matrix
from PIL import Image
from test_files import GENES, paint, refuse

from slides import space_ranger, visium_hd
from slides.positions import measure_pitch, read_positions
from slides.spots import read_spots

BIN_PX = 16  # of 8 um at 0.5 um/px
ROWS, COLUMNS = 38, 45  # bins: five whole spots of 7 x 7 and three rows more, six and three columns
CORNER = 160, 130  # px of the first bin
SCALES = {"microns_per_pixel": 0.5, "bin_size_um": 8.0, "tissue_hires_scalef": 0.25}


# -------------------------------------------------------------------------------- invented outputs
def make_bins():
    """(positions of ROWS x COLUMNS bins as Visium HD has them, their counts (bins, genes))."""
    row, column = (axis.ravel() for axis in np.mgrid[:ROWS, :COLUMNS])
    names = [f"s_008um_{place[0]:05d}_{place[1]:05d}-1" for place in zip(row, column, strict=True)]
    tissue = np.ones(len(row), int)
    # Of spot (0, 0) 24 of 49 bins are tissue, and of spot (0, 1) 25.
    for left, kept in ((0, 24), (7, 25)):
        square = np.flatnonzero((row < 7) & (column >= left) & (column < left + 7))
        tissue[square[kept:]] = 0
    table = {"barcode": names, "in_tissue": tissue, "array_row": row, "array_col": column}
    table["pxl_row_in_fullres"] = CORNER[0] + (row + 0.5) * BIN_PX
    table["pxl_col_in_fullres"] = CORNER[1] + (column + 0.5) * BIN_PX
    counts = np.random.default_rng(3).poisson(0.3, (len(row), len(GENES)))
    return pd.DataFrame(table), counts


def write_parquet(path, table):
    polars.DataFrame({name: table[name].to_list() for name in table}).write_parquet(path)


def make_hd(folder):
    """(outs/ with bins of 8 um, its full-resolution image) in a folder."""
    binned = folder / "outs" / "binned_outputs" / "square_008um"
    (binned / "spatial").mkdir(parents=True)
    table, counts = make_bins()
    write_parquet(binned / "spatial" / "tissue_positions.parquet", table)
    tissue = table["in_tissue"] == 1
    matrix = binned / "filtered_feature_bc_matrix.h5"
    write_h5(matrix, counts[tissue], GENES, barcodes=table["barcode"][tissue])
    (binned / "spatial" / "scalefactors_json.json").write_text(json.dumps(SCALES))
    image = paint(1, 900, 960)
    small = Image.fromarray(image).resize((240, 225), Image.Resampling.BOX)
    small.save(binned / "spatial" / "tissue_hires_image.png")
    path = folder / "scan.tif"
    tifffile.imwrite(path, image, photometric="rgb")
    return folder / "outs", path


def sum_densely():
    """{(row, column) of each spot that is tissue: (counts, px of its centre)} by a loop over spots."""
    table, counts = make_bins()
    found = {}
    for row in range(-(-ROWS // 7)):
        for column in range(-(-COLUMNS // 7)):
            inside = (table["array_row"] // 7 == row) & (table["array_col"] // 7 == column)
            tissue = inside & (table["in_tissue"] == 1)
            if tissue.sum() >= 24.5:
                centre = np.array(CORNER) + (np.array([row, column]) * 7 + 3.5) * BIN_PX
                found[row, column] = counts[tissue].sum(0), centre
    return found


def check_dataset(root, expected):
    """The dataset holds these spots, with their sums, places and pixels."""
    table = anndata.read_h5ad(root / "dataset" / "counts.h5ad")
    assert list(zip(table.obs["array_row"], table.obs["array_col"], strict=True)) == [*expected]
    patches = np.load(root / "dataset" / "patches.npy")
    padded = np.pad(paint(1, 900, 960), ((112, 112), (112, 112), (0, 0)), constant_values=255)
    for number, (sums, centre) in enumerate(expected.values()):
        row, column = centre.astype(int)
        assert [*table.obs[["pxl_row", "pxl_col"]].iloc[number]] == [row, column]
        assert np.array_equal(patches[number], padded[row : row + 224, column : column + 224])
        assert table.obs["n_counts"].iloc[number] == sums.sum()
        measured = pd.Series(table.X[number].toarray().ravel(), table.var_names)
        assert np.array_equal(measured, pd.Series(sums, GENES)[table.var_names])
    return table


# ---------------------------------------------------------------------------------------- good input
def test_sums_of_bins_are_those_of_a_dense_matrix():
    table, counts = make_bins()
    bins = table.rename(columns=lambda name: name.removesuffix("_in_fullres")).set_index("barcode")
    spots, spot_of_bin = visium_hd.group_bins(bins, 7, 56.0)
    kept = np.arange(len(spots)) != 3
    sums = visium_hd.sum_bins(scipy.sparse.csr_matrix(counts), spot_of_bin, kept)
    dense = np.zeros((len(spots), len(GENES)), int)
    np.add.at(dense, spot_of_bin, counts)
    assert scipy.sparse.issparse(sums) and np.array_equal(sums.toarray(), dense[kept])
    places = table[["array_row", "array_col"]].to_numpy() // 7
    assert np.array_equal(spots[["array_row", "array_col"]].to_numpy()[spot_of_bin], places)
    assert spots.index[-1] == "s_056um_00005_00006-1"


def test_a_spot_is_tissue_where_half_of_its_bins_are():
    """Bins beyond the slide's border count as none: 3 x 7 of 49 are too few."""
    found = sum_densely()
    assert (0, 0) not in found and (0, 1) in found
    assert (5, 0) not in found and (4, 6) not in found and len(found) == 29


@pytest.mark.parametrize("part", ["", "binned_outputs", "binned_outputs/square_008um"])
def test_a_run_over_binned_outputs(tmp_path, part):
    outs, image = make_hd(tmp_path / "liver")
    root, expected = tmp_path / "mine", sum_densely()
    options = {"from_spaceranger": outs / part, "images": image, "target": "lognorm"}
    printed = stdout_of("19", data_root=root, **options)
    assert "warning" not in printed
    assert "1,710 bins are summed to 42 spots of 56 um, 29 of them in_tissue" in printed
    table = check_dataset(root, expected)
    assert set(table.obs["pitch"]) == {7 * BIN_PX} and table.obs["block"].nunique() > 1
    assert np.isfinite(table.var["moran_1"]).any()
    manifest = pd.read_csv(root / "slides.csv").iloc[0]
    assert manifest["name"] == "liver" and manifest["um_per_px"] == 0.5
    # What is there already is read again, with and without the folder.
    for again in ({}, options):
        stdout_of("19", data_root=root, **{"target": "lognorm", **again})
        check_dataset(root, expected)


def test_the_hires_image_of_bins(tmp_path):
    outs, _ = make_hd(tmp_path / "liver")
    options = {"from_spaceranger": outs, "use_hires": True, "target": "lognorm", "bin_um": 112.0}
    printed = stdout_of("19", data_root=tmp_path / "mine", **options)
    assert "2.00 um/px" in printed
    table = anndata.read_h5ad(tmp_path / "mine" / "dataset" / "counts.h5ad")
    assert set(table.obs["pitch"]) == {112 / 2}


def test_a_sample_of_larger_bins_in_a_matrix_folder(tmp_path):
    """As script 26 takes it: a folder without a data root."""
    outs, image = make_hd(tmp_path / "liver")
    binned = outs / "binned_outputs" / "square_008um"
    binned = binned.rename(binned.with_name("square_016um"))
    scales = SCALES | {"bin_size_um": 16.0, "microns_per_pixel": 1.0}
    (binned / "spatial" / "scalefactors_json.json").write_text(json.dumps(scales))
    (binned / "filtered_feature_bc_matrix.h5").unlink()
    table, counts = make_bins()
    write_matrix(binned / "filtered_feature_bc_matrix", table["barcode"], counts, GENES)
    slide, positions = space_ranger.read_space_ranger(outs, image, bin_um=112.0)
    spots = read_spots(slide, positions)
    assert slide.um_per_px == 1.0 and set(spots.obs["pitch"]) == {7 * BIN_PX}
    whole = counts.sum(1).reshape(ROWS, COLUMNS)[7:14, :7]
    assert spots.obs.loc["1_s_112um_00001_00000-1", "n_counts"] == whole.sum()


def test_positions_may_be_a_parquet(tmp_path):
    table, _ = make_bins()
    path = tmp_path / "positions.PARQUET"
    kinds = {"in_tissue": bool, "pxl_row_in_fullres": str}
    table = table.astype(kinds).assign(pxl_row_in_fullres=lambda t: t.iloc[:, 4].map(Decimal))
    write_parquet(path, table)
    text = tmp_path / "positions.csv"
    table.to_csv(text, index=False)
    pd.testing.assert_frame_equal(read_positions(path), read_positions(text))


# ---------------------------------------------------------------------------------------- bad input
PARQUET = "spatial/tissue_positions.parquet"


def positioned(change):
    """The positions of the bins are what `change` makes of their table."""
    return lambda binned: write_parquet(binned / PARQUET, change(make_bins()[0]))


def cut_parquet(binned):
    content = (binned / PARQUET).read_bytes()
    (binned / PARQUET).write_bytes(content[:1000])


def leave_a_gap(table):
    table["pxl_row_in_fullres"] = table["pxl_row_in_fullres"].where(table.index != 4)
    return table


def name_other_bins(binned):
    table, counts = make_bins()
    names = table["barcode"].str.replace("008um", "016um")
    write_h5(binned / "filtered_feature_bc_matrix.h5", counts, GENES, barcodes=names)


def drop_bin_size(binned):
    scales = {name: SCALES[name] for name in SCALES if name != "bin_size_um"}
    (binned / "spatial" / "scalefactors_json.json").write_text(json.dumps(scales))


@pytest.mark.parametrize("change, words", [
    (lambda binned: (binned / PARQUET).unlink(), ["no tissue_positions.parquet"]),
    (cut_parquet, ["tissue_positions.parquet", "not a whole .parquet"]),
    (positioned(lambda table: table.drop(columns="array_row")), ["tissue_positions.parquet", "no column array_row"]),
    (positioned(leave_a_gap), ["s_008um_00000_00004-1", "pxl_row", "not a number"]),
    (positioned(lambda table: table.assign(in_tissue=0)), ["tissue_positions.parquet", "no spot of 56 um", "in_tissue"]),
    (name_other_bins, ["s_016um_00000_00000-1", "not of one slide"]),
    (drop_bin_size, ["scalefactors_json.json", "no bin_size_um"]),
    (lambda binned: binned.rename(binned.with_name("square_002um")), ["square_008um or square_016um"]),
])  # fmt: skip
def test_bins_that_cannot_be_read_are_refused(tmp_path, change, words):
    outs, image = make_hd(tmp_path / "liver")
    change(outs / "binned_outputs" / "square_008um")
    refuse(tmp_path / "mine", *words, from_spaceranger=outs, images=image)
    assert not (tmp_path / "mine" / "slides.csv").exists()


@pytest.mark.parametrize("part", ["", "segmented_outputs"])
def test_counts_of_cells_are_refused(tmp_path, capsys, part):
    """Of Space Ranger 4, whose bins were left behind."""
    outs, image = make_hd(tmp_path)
    (outs / "binned_outputs").rename(outs / "segmented_outputs")
    options = {"from_spaceranger": outs / part, "images": image, "target": "lognorm"}
    assert run_script("19", data_root=tmp_path / "mine", **options) == 2
    assert "counts of cells" in capsys.readouterr().err


@pytest.mark.parametrize("size, fit", [(2, 56), (24, 48), (64, 64)])
def test_bins_of_other_sizes_are_read_as_the_message_says(tmp_path, size, fit):
    outs, image = make_hd(tmp_path / "liver")
    binned = outs / "binned_outputs" / "square_008um"
    scales = SCALES | {"bin_size_um": size, "microns_per_pixel": size / BIN_PX}
    (binned / "spatial" / "scalefactors_json.json").write_text(json.dumps(scales))
    folder = binned.rename(binned.with_name(f"square_{size:03d}um"))
    words = f"or name the folder {folder} and --bin-um {fit}"
    refuse(tmp_path / "mine", words, from_spaceranger=outs, images=image)
    slide, positions = space_ranger.read_space_ranger(folder, image, bin_um=float(fit))
    assert slide.um_per_px == size / BIN_PX
    assert measure_pitch(positions) == pytest.approx(fit / size * BIN_PX, abs=1)


@pytest.mark.parametrize("bin_um, fix", [(50.0, "give 48"), (4.0, "give 8")])
def test_spots_that_are_no_multiple_of_the_bins_are_refused(tmp_path, bin_um, fix):
    outs, image = make_hd(tmp_path / "liver")
    options = {"from_spaceranger": outs, "images": image, "bin_um": bin_um}
    refuse(tmp_path / "mine", f"--bin-um {bin_um:g}", "8 um", fix, **options)
