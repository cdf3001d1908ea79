"""AnnData as it is published: counts and positions in one .h5ad, and the folders of HEST-1k. Each is
read rightly, or refused in one line.
"""

import json

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import tifffile
from conftest import stdout_of
from test_files import (
    GENES,
    check_slides,
    check_spots,
    draw_counts,
    edit_manifest,
    make_dataset,
    make_slides,
    pack,
    paint,
    refuse,
    spot_array,
)

import common
from slides.counts import read_matrix
from slides.positions import read_positions


# ---------------------------------------------------------------------------------- invented slides
def make_anndata(seed=1, rows=6):
    """The spots of spot_array() as AnnData: counts in X, x and y in obsm["spatial"]."""
    spots = spot_array(rows).set_index("barcode")
    counts = scipy.sparse.csr_matrix(draw_counts(len(spots), seed), dtype=np.float32)
    obs = spots[["in_tissue", "array_row", "array_col"]]
    table = anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=GENES))
    table.obsm["spatial"] = spots[["pxl_col", "pxl_row"]].to_numpy(np.float64)
    return table


def make_h5ad(root, change=lambda table: table):
    """A data root of a slide that is an .h5ad, which `change` has changed, or what it returns."""
    make_slides(root, 1)
    table = make_anndata()
    table = change(table) or table
    table.write_h5ad(root / "slide1.h5ad")
    edit_manifest(root, positions="", matrix="slide1.h5ad")
    return root


def make_hest(folder, samples=("NCBI1", "NCBI2", "MEND3"), **changes):
    """A folder of HEST-1k: samples of 36 spots of one data set, with different patients.

    `changes` {column: values} replace columns of the table of metadata.
    """
    for part in ("st", "wsis", "metadata"):
        (folder / part).mkdir(parents=True)
    rows = {
        "id": samples,
        "organ": ["Liver", "Liver", "Brain"],
        "species": ["Homo sapiens", "Homo sapiens", "Mus musculus"],
        "st_technology": "Visium",
        "dataset_title": "A title, with a comma",
        "patient": ["P1", "P2", "P3"],
        "pixel_size_um_estimated": 0.5,
    }
    table = pd.DataFrame(rows | changes)
    for seed, row in enumerate(table.to_dict("records"), 1):
        make_anndata(seed).write_h5ad(folder / "st" / f"{row['id']}.h5ad")
        path = folder / "wsis" / f"{row['id']}.tif"
        tifffile.imwrite(path, paint(seed), photometric="rgb", tile=(256, 256))
        (folder / "metadata" / f"{row['id']}.json").write_text(json.dumps(row))
    table.to_csv(folder / "HEST_v1_1_0.csv", index=False)
    return folder


# ------------------------------------------------------------------------------------------ AnnData
def as_dense(table):
    table.X = table.X.toarray()


def in_a_layer(table):
    table.layers["counts"] = table.X.copy()
    table.X = table.X * 0.5


def in_raw(table):
    table.raw = table.copy()
    table.X = table.X * 0.5


def with_gene_ids(table):
    """As scanpy reads Space Ranger's files: symbols as names, ids in a column."""
    table.var["gene_ids"] = table.var_names
    table.var["feature_types"] = "Gene Expression"
    table.var_names = [f"symbol of {name}" for name in table.var_names]
    return table


def without_array(table):
    table.obs = table.obs[[]]
    return table


@pytest.mark.parametrize(
    "change", [lambda t: t, as_dense, in_a_layer, in_raw, with_gene_ids, without_array]
)
def test_an_h5ad_gives_the_pixels_and_counts_of_its_spots(tmp_path, change):
    check_slides(make_h5ad(tmp_path / "mine", change))


def test_an_h5ad_may_be_packed_and_stand_beside_a_folder(tmp_path):
    root = make_slides(tmp_path / "mine")
    # The genes are called by one name in both slides.
    features = "".join(f"{gene}\t{gene}\tGene Expression\n" for gene in GENES)
    (root / "matrix2" / "features.tsv").write_text(features)
    make_anndata().write_h5ad(root / "slide1.h5ad")
    pack(root / "slide1.h5ad")
    (root / "slide1.h5ad.gz").rename(root / "slide1.H5AD.gz")
    edit_manifest(root, positions=["", "positions2.csv"], matrix=["slide1.H5AD.gz", "matrix2"])
    check_slides(root)
    assert sorted(common.load_dataset(root, "lognorm").genes) == sorted(GENES)


def test_symbols_of_an_h5ad_name_the_genes(tmp_path):
    with_gene_ids(make_anndata()).write_h5ad(tmp_path / "slide.h5ad")
    genes = read_matrix(tmp_path / "slide.h5ad").var["name"]
    assert genes[GENES[0]] == f"symbol of {GENES[0]}"


def test_where_the_array_is_not_named_no_two_spots_share_a_place_on_it(tmp_path):
    path = tmp_path / "slide.h5ad"
    without_array(make_anndata(rows=12)).write_h5ad(path)
    positions = read_positions(path)
    assert not positions[["array_row", "array_col"]].duplicated().any()
    assert (positions["array_col"] == spot_array(12)["array_col"].to_numpy()).all()


def test_a_spot_that_an_h5ad_calls_outside_the_tissue_is_left_out(tmp_path):
    def change(table):
        table.obs["in_tissue"] = pd.Categorical(["False"] + ["True"] * 35)

    _, table, patches = make_dataset(make_h5ad(tmp_path / "mine", change))
    check_spots(table, patches, 1, paint(1), 35)


def test_a_file_of_positions_wins_over_an_h5ad(tmp_path):
    def change(table):
        table.obsm["spatial"] = table.obsm["spatial"] + 7

    root = make_h5ad(tmp_path / "mine", change)
    edit_manifest(root, positions="positions1.csv")
    check_slides(root)


def normalised(table):
    table.X = table.X * 0.5
    return table


def without_counts(table):
    table.X = None


def without_places(table):
    del table.obsm["spatial"]


def with_nan(table):
    table.obsm["spatial"][3, 1] = np.nan


def with_three_axes(table):
    table.obsm["spatial"] = np.zeros((36, 3))


def with_a_barcode_twice(table):
    table.obs_names = [table.obs_names[1], *table.obs_names[1:]]


def with_a_gene_twice(table):
    table.var_names = [GENES[1], *GENES[1:]]


@pytest.mark.filterwarnings("ignore:(Observation|Variable) names are not unique")
@pytest.mark.parametrize(
    "change, words",
    [
        (normalised, ["slide1.h5ad", "no counts", "raw counts are needed"]),
        (without_counts, ["slide1.h5ad", "holds no X"]),
        (without_places, ["slide1.h5ad", 'no obsm["spatial"]', "positions"]),
        (with_nan, ["slide1.h5ad", spot_array()["barcode"][3], "not a number", "nan"]),
        (with_three_axes, ["slide1.h5ad", "(36, 3)", "(36, 2)"]),
        (with_a_barcode_twice, ["slide1.h5ad", "barcode", "twice"]),
        (with_a_gene_twice, ["slide1.h5ad", f"gene id {GENES[1]}", "twice"]),
    ],
)
def test_an_h5ad_in_doubt_is_refused(tmp_path, change, words):
    refuse(make_h5ad(tmp_path / "mine", change), *words)


def in_other_layers(table):
    table.layers["lognorm"] = table.X * 0.5
    table.layers["raw_counts"] = table.X.copy()
    table.layers["umi"] = table.X.toarray()
    return normalised(table)


def in_no_layer(table):
    table.layers["scaled"] = table.X * 0.25
    table.layers["counts"] = table.X * 0.5
    return normalised(table)


def beside_raw(table):
    table.raw = normalised(table)
    table.layers["umi"] = table.X * 2
    return table


@pytest.mark.parametrize(
    "change, words",
    [
        (in_other_layers, ["lognorm, raw_counts, umi", "these hold counts: raw_counts, umi"]),
        (in_other_layers, ['copy that of raw counts, as raw_counts, to layers["counts"]']),
        (in_no_layer, ["the layers counts, scaled", "these hold counts: -", "add them"]),
        (beside_raw, ["nor raw", "the layers umi", "counts: umi"]),
    ],
)
def test_of_an_h5ad_without_counts_the_layers_are_named(tmp_path, change, words):
    refuse(make_h5ad(tmp_path / "mine", change), "slide1.h5ad", *words)


def test_a_file_that_is_no_h5ad_is_refused(tmp_path):
    root = make_h5ad(tmp_path / "mine")
    (root / "slide1.h5ad").write_bytes(b"not HDF5")
    refuse(root, "slide1.h5ad", "not a whole .h5ad")


def test_of_a_zarr_folder_the_conversion_is_named(tmp_path):
    root = make_h5ad(tmp_path / "mine")
    (root / "slide1.zarr").mkdir()
    edit_manifest(root, matrix="slide1.zarr")
    refuse(root, "slide1.zarr", "to_legacy_anndata", "write_h5ad")


# --------------------------------------------------------------------------------------------- HEST
def test_samples_of_hest_become_a_dataset(tmp_path):
    hest, root = make_hest(tmp_path / "hest"), tmp_path / "mine"
    _, table, patches = make_dataset(root, from_hest=hest, samples="NCBI1,NCBI2")
    check_spots(table, patches, 1, paint(1), 36)
    check_spots(table, patches, 2, paint(2), 36)
    manifest = pd.read_csv(root / "slides.csv")
    assert list(manifest["name"]) == ["NCBI1", "NCBI2"]
    assert list(manifest["donor"]) == ["A title, with a comma P1", "A title, with a comma P2"]
    assert (manifest["um_per_px"] == 0.5).all()
    assert (root / "links" / "NCBI1" / "NCBI1.tif").samefile(hest / "wsis" / "NCBI1.tif")


def choose(tmp_path, **options):
    """slides.csv that script 19 writes of a folder of HEST-1k, and what it prints."""
    root = tmp_path / "mine"
    printed = stdout_of("19", data_root=root, target="lognorm", check=True, **options)
    return pd.read_csv(root / "slides.csv"), printed


@pytest.mark.parametrize(
    "filters, names",
    [
        ({"organ": "liver"}, ["NCBI1", "NCBI2"]),
        ({"species": "Mus musculus", "technology": "Visium"}, ["MEND3"]),
        ({"organ": "Liver", "samples": "MEND3,NCBI2"}, ["NCBI2"]),
    ],
)
def test_samples_of_hest_are_chosen_by_their_metadata(tmp_path, filters, names):
    manifest, _ = choose(tmp_path, from_hest=make_hest(tmp_path / "hest"), **filters)
    assert list(manifest["name"]) == names


def test_the_table_of_hest_is_not_needed_where_samples_are_named(tmp_path):
    hest = make_hest(tmp_path / "hest")
    (hest / "HEST_v1_1_0.csv").unlink()
    manifest, _ = choose(tmp_path, from_hest=hest, samples="NCBI1")
    assert list(manifest["donor"]) == ["A title, with a comma P1"]


def test_the_newest_table_of_hest_is_read(tmp_path):
    hest = make_hest(tmp_path / "hest")
    table = pd.read_csv(hest / "HEST_v1_1_0.csv")
    table.assign(organ="Kidney").to_csv(hest / "HEST_v1_10_0.csv", index=False)
    manifest, _ = choose(tmp_path, from_hest=hest, organ="Kidney")
    assert len(manifest) == 3


@pytest.mark.parametrize("patients, donors, warnings", [
    (["P1", "P1"], ["A title, with a comma P1"] * 2, 0),
    (["", None], ["NCBI1", "NCBI2"], 2),
])  # fmt: skip
def test_samples_of_one_patient_are_of_one_donor(tmp_path, patients, donors, warnings):
    """One without a patient is a donor of its own, with a warning."""
    hest = make_hest(tmp_path / "hest", patient=[*patients, "P3"])
    manifest, printed = choose(tmp_path, from_hest=hest, organ="Liver")
    assert list(manifest["donor"]) == donors
    assert printed.count("names no patient") == warnings


@pytest.mark.parametrize("lost, options, words", [
    ("", {"samples": "NCBI9"}, ["--samples NCBI9", "3 samples", "NCBI1"]),
    ("", {"organ": "Lung"}, ["organ is 'Lung'", "Brain, Liver"]),
    ("", {"organ": "Brain", "species": "Homo sapiens"}, ["species", "Mus musculus"]),
    ("", {}, ["--from-hest", "--samples"]),
    ("", {"samples": "NCBI1", "from_spaceranger": "outs"}, ["--from-spaceranger", "one of"]),
    ("st/NCBI2.h5ad", {"organ": "Liver"}, ["NCBI2.h5ad", "no such file"]),
    ("wsis/NCBI1.tif", {"organ": "Liver"}, ["NCBI1.tif", "no such file"]),
    ("HEST_v1_1_0.csv", {"organ": "Liver"}, ["HEST_v*.csv", "--samples"]),
    ("HEST_v1_1_0.csv metadata/NCBI1.json", {"samples": "NCBI1"}, ["NCBI1.json", "no metadata"]),
])  # fmt: skip
def test_samples_of_hest_that_cannot_be_used_are_refused(tmp_path, lost, options, words):
    hest, root = make_hest(tmp_path / "hest"), tmp_path / "mine"
    for name in lost.split():
        (hest / name).unlink()
    refuse(root, *words, from_hest=hest, **options)
    assert not (root / "slides.csv").exists()


def test_a_sample_of_hest_without_a_resolution_is_refused(tmp_path):
    hest = make_hest(tmp_path / "hest", pixel_size_um_estimated=[None, 0.5, 0.5])
    words = "NCBI1", "pixel_size_um_estimated"
    refuse(tmp_path / "mine", *words, from_hest=hest, samples="NCBI1")


def test_filters_without_hest_are_refused(tmp_path):
    refuse(make_slides(tmp_path / "mine"), "--organ", "--from-hest", organ="Liver")


def test_another_slides_csv_is_not_replaced(tmp_path):
    root = make_slides(tmp_path / "mine")
    hest = make_hest(tmp_path / "hest")
    refuse(root, "slides.csv", "leave out --from-hest", from_hest=hest, samples="NCBI1")


def test_a_folder_of_hest_that_is_not_there_is_named(tmp_path):
    options = {"from_hest": tmp_path / "none", "samples": "NCBI1"}
    refuse(tmp_path / "mine", "--from-hest", "none", "no such folder", **options)


# ------------------------------------------------------------------------------------------ patches
def make_patches(folder, sample="NCBI1", size=224, spots=30, seed=5):
    """patches/<sample>.h5 of the first spots, in another order; returns their images by barcode."""
    barcodes = spot_array()["barcode"][:spots][::-1]
    images = np.random.default_rng(seed).integers(0, 255, (spots, size, size, 3), np.uint8)
    (folder / "patches").mkdir(exist_ok=True)
    with h5py.File(folder / "patches" / f"{sample}.h5", "w") as file:
        file["img"] = images
        file["coords"] = np.zeros((spots, 2), int)
        file["barcode"] = np.array(barcodes, dtype="S")[:, None]
    return dict(zip(barcodes, images, strict=True))


def make_hest_of_patches(folder, **options):
    """(a folder of HEST-1k without whole images, at 0.25 um/px; its patches by barcode)."""
    hest = make_hest(folder, pixel_size_um_estimated=0.25)
    for path in (hest / "wsis").iterdir():
        path.unlink()
    return hest, make_patches(hest, **options)


def test_patches_of_hest_are_taken_as_they_are(tmp_path):
    hest, images = make_hest_of_patches(tmp_path / "hest")
    root, options = tmp_path / "mine", {"from_hest": hest, "samples": "NCBI1"}
    printed, table, patches = make_dataset(root, hest_patches=True, **options)
    assert "6 spots without a patch are left out" in printed
    assert len(patches) == 30
    for barcode, patch in zip(table.obs["barcode"], patches, strict=True):
        assert np.array_equal(patch, images[barcode])
    meta = json.loads((root / "dataset" / "meta.json").read_text())
    assert meta["um_per_px"] == {"NCBI1": 0.5}
    places = spot_array().set_index("barcode").loc[table.obs["barcode"], ["pxl_row", "pxl_col"]]
    assert np.array_equal(table.obs[["pxl_row", "pxl_col"]], np.rint(places / 2))


def test_patches_of_hest_are_checked_without_being_written(tmp_path):
    hest, _ = make_hest_of_patches(tmp_path / "hest")
    options = {"samples": "NCBI1", "hest_patches": True}
    _, printed = choose(tmp_path, from_hest=hest, **options)
    assert "30 kept; 6 left out (6 without a patch)" in printed


@pytest.mark.parametrize(
    "made, options, words",
    [
        ({"size": 64}, {}, ["NCBI1.h5", "(30, 64, 64, 3)", "224"]),
        ({}, {"um_per_px": 1.0}, ["--um-per-px 1", "0.5 um/px"]),
        ({}, {"samples": "NCBI2"}, ["NCBI2.h5", "no such file"]),
    ],
)
def test_patches_of_hest_that_cannot_be_used_are_refused(tmp_path, made, options, words):
    hest, _ = make_hest_of_patches(tmp_path / "hest", **made)
    options = {"from_hest": hest, "samples": "NCBI1", "hest_patches": True} | options
    refuse(tmp_path / "mine", *words, **options)


def test_a_file_that_holds_no_patches_is_refused(tmp_path):
    hest, _ = make_hest_of_patches(tmp_path / "hest")
    (hest / "patches" / "NCBI1.h5").write_bytes(b"not HDF5")
    words, options = ("NCBI1.h5", "not a whole file of patches"), {"samples": "NCBI1"}
    refuse(tmp_path / "mine", *words, from_hest=hest, hest_patches=True, **options)
