"""Files as people have them: tables of R, pandas and spreadsheets, GEO's names, files that do not
belong together, spots that do not count, odd names. Each is read rightly, or refused in one line.
"""

import csv
import functools
import gzip
import itertools
import json
import os
import re
import shutil
import unicodedata
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.io
import tifffile
from conftest import (
    edit_manifest,
    expect_refusal,
    refused,
    run_script,
    stdout_of,
    write_h5,
    write_matrix,
    write_slide,
)
from PIL import Image

import common
from slides.counts import read_barcodes, read_matrix
from slides.manifest import MANIFEST, Slide, read_manifest
from slides.panel import warn_of_unlisted
from slides.positions import check_pitch, read_positions
from slides.spots import match_barcodes, read_spots
from study import files
from study.errors import InputError

FULLRES = {"pxl_row": "pxl_row_in_fullres", "pxl_col": "pxl_col_in_fullres"}
GENES = [*common.MARKER_GENES, *(f"GENE{number}" for number in range(40))]


# --------------------------------------------------------------------------------- invented slides
def spot_array(rows=6, columns=6, pitch=200):
    """Positions of a Visium-like array: 200 px are 100 um at 0.5 um/px."""
    row, column = (axis.ravel() for axis in np.mgrid[:rows, :columns])
    letters = np.random.default_rng(7).choice(list("ACGT"), (len(row), 16))
    table = pd.DataFrame({"barcode": ["".join(word) + "-1" for word in letters], "in_tissue": 1})
    table["array_row"], table["array_col"] = row, 2 * column + row % 2
    table["pxl_row"] = np.rint(200 + row * pitch * 0.75**0.5).astype(int)
    table["pxl_col"] = np.rint(200 + (column + row % 2 / 2) * pitch).astype(int)
    return table


def paint(seed, height=1400, width=1600):
    """An image of which no two patches are alike."""
    return paint_once(seed, height, width).copy()


@functools.cache
def paint_once(seed, height, width):
    y, x = np.mgrid[:height, :width]
    waves = [np.sin((seed + 1) * x / 300), np.cos(y / 250 + seed), np.sin((x - seed * y) / 400)]
    noise = np.random.default_rng(seed).integers(-20, 20, (height, width, 3))
    return np.clip(140 + 70 * np.stack(waves, -1) + noise, 0, 255).astype(np.uint8)


def draw_counts(n, seed, genes=48):
    return np.random.default_rng(seed).poisson(8, (n, genes)) + 1


def make_slides(root, n=2, genes=GENES):
    """A data root of n slides that is read without a warning."""
    root.mkdir(exist_ok=True, parents=True)
    for slide in range(1, n + 1):
        tifffile.imwrite(root / f"image{slide}.tif", paint(slide), photometric="rgb")
        counts = draw_counts(36, slide, len(genes))
        write_slide(root, f"image{slide}.tif", spot_array(), counts, genes, slide)
    return root


def make_dataset(root, **options):
    """(what script 19 printed, counts.h5ad, patches) of a data root."""
    printed = stdout_of("19", data_root=root, target="lognorm", **options)
    folder = root / "dataset"
    patches = np.load(folder / "patches.npy")
    return printed, anndata.read_h5ad(folder / "counts.h5ad"), patches


def check_spots(table, patches, slide, image, n_spots):
    """Each spot of a slide has the pixels of its place and the depth of its barcode."""
    at = np.flatnonzero(table.obs["tissue_index"] == slide)
    assert len(at) == n_spots
    truth = spot_array().set_index("barcode")
    depth = pd.Series(draw_counts(36, slide).sum(1), truth.index)
    padded = np.pad(image, ((112, 112), (112, 112), (0, 0)), constant_values=255)
    for number in at:
        barcode = table.obs["barcode"].iloc[number]
        row, column = truth.loc[barcode, ["pxl_row", "pxl_col"]]
        assert np.array_equal(patches[number], padded[row : row + 224, column : column + 224])
        assert table.obs["n_counts"].iloc[number] == depth[barcode]


def check_slides(root):
    """Script 19 makes of all slides what make_slides wrote; returns what it printed."""
    printed, table, patches = make_dataset(root)
    for slide in table.obs["tissue_index"].unique():
        check_spots(table, patches, slide, paint(slide), 36)
    return printed


def refuse(root, *words, **options):
    """Script 19 refuses in one line with these words, and leaves no dataset."""
    expect_refusal(words, "19", data_root=root, **({"target": "lognorm"} | options))
    assert not (root / "dataset").exists()
    assert not list(root.glob(".dataset*"))


def pack(path):
    """Replace a file by its .gz."""
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return packed


# ------------------------------------------------------------------------------------------- tables
def write_as_r(path, table, **options):
    """As R's write.csv does, with row names from 1 on."""
    table = table.set_axis(range(1, len(table) + 1))
    table.to_csv(path, index_label="", quoting=csv.QUOTE_NONNUMERIC, **options)


def write_as_write_table(path, table):
    """As R's write.table does: row names have no head."""
    lines = [" ".join(f'"{name}"' for name in table)]
    for number, row in enumerate(table.itertuples(index=False), 1):
        lines.append(" ".join([f'"{number}"', f'"{row[0]}"', *map(str, row[1:])]))
    path.write_text("\n".join(lines) + "\n")


SEURAT = ["barcode", "tissue", "row", "col", "imagerow", "imagecol"]
HEADED = spot_array().rename(columns=FULLRES)
TABLES = {
    "columns in another order": lambda p: HEADED[HEADED.columns[[0, 1, 2, 3, 5, 4]]].to_csv(p, index=False),
    "columns by the alphabet": lambda p: HEADED[sorted(HEADED)].to_csv(p, index=False),
    "short names, the barcode last": lambda p: spot_array()[spot_array().columns[::-1]].to_csv(p, index=False),
    "further columns": lambda p: HEADED.assign(cluster="a, b", row=7).to_csv(p, index=False),
    "barcodes as the index of pandas": lambda p: HEADED.set_index("barcode").to_csv(p, index_label=""),
    "a number as the index of pandas": lambda p: HEADED.to_csv(p),
    "the same without a header": lambda p: spot_array().to_csv(p, header=False),
    "numbers for names": lambda p: spot_array().set_axis(range(6), axis=1).to_csv(p, index=False),
    "R's default names": lambda p: spot_array().set_axis([f"V{i}" for i in range(1, 7)], axis=1).to_csv(p, index=False),
    "write.csv": lambda p: write_as_r(p, HEADED),
    "write.csv2": lambda p: write_as_r(p, HEADED.assign(pxl_row_in_fullres=HEADED["pxl_row_in_fullres"] + 0.25), sep=";", decimal=","),
    "write.table": lambda p: write_as_write_table(p, HEADED),
    "Seurat": lambda p: spot_array().set_axis(SEURAT, axis=1).set_index("barcode").to_csv(p, index_label=""),
    "decimals that are no thousands": lambda p: HEADED.assign(**{name: HEADED[name] + 0.125 for name in FULLRES.values()}).to_csv(p, sep=";", index=False),
    "logical in_tissue": lambda p: HEADED.assign(in_tissue="TRUE").to_csv(p, index=False),
    "tabs": lambda p: spot_array().to_csv(p, sep="\t", index=False, header=False),
    "blanks": lambda p: spot_array().to_csv(p, sep=" ", index=False, header=False),
    "a byte order mark and CRLF": lambda p: HEADED.to_csv(p, index=False, encoding="utf-8-sig", lineterminator="\r\n"),
    "UTF-16 with tabs": lambda p: HEADED.to_csv(p, index=False, sep="\t", encoding="utf-16"),
    "empty lines at the end": lambda p: p.write_text(HEADED.to_csv(index=False) + ",,,,,\n\n"),
    "gzipped under a plain name": lambda p: p.write_bytes(gzip.compress(spot_array().to_csv(index=False, header=False).encode())),
}  # fmt: skip


@pytest.mark.parametrize("kind", TABLES)
def test_positions_are_read_as_they_were_meant(tmp_path, kind):
    TABLES[kind](tmp_path / "positions.csv")
    found = read_positions(tmp_path / "positions.csv")
    pd.testing.assert_frame_equal(found, spot_array().set_index("barcode"), check_index_type=False)


REFUSED = {
    "x and y": ({"pxl_row": "y", "pxl_col": "x"}, {}, ["no column pxl_row", "y, x", "which is the row"]),
    "unknown names": (dict.fromkeys(common.POSITION_COLUMNS, "what"), {}, ["what", "not known", "pxl_row"]),
    "one name twice": ({"pxl_col": "pxl_row"}, {}, ["pxl_row", "twice"]),
    "thousands": ({}, {"pxl_row": '1,234'}, ["pxl_row", "'1,234'", "not a number"]),
    "a tissue of two": ({}, {"in_tissue": "2"}, ["in_tissue", "2", "0 or 1"]),
    "a missing number": ({}, {"pxl_col": "NA"}, ["pxl_col", "'NA'", "not a number"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_positions_in_doubt_are_refused(tmp_path, kind):
    names, cells, words = REFUSED[kind]
    table = spot_array().astype(str)
    table.loc[3, list(cells)] = list(cells.values())
    table.rename(columns=names).to_csv(tmp_path / "positions.csv", index=False)
    with refused("positions.csv", *words):
        read_positions(tmp_path / "positions.csv")


def test_names_are_text_and_never_missing(tmp_path):
    genes = ["NA", "nan", "1E5", "007", "True", *GENES[:43]]
    make_slides(tmp_path, genes=genes)
    codes = [f"{number:04d}" for number in range(36)]
    for slide in (1, 2):
        table = spot_array().assign(barcode=codes)
        table.to_csv(tmp_path / f"positions{slide}.csv", header=False, index=False)
        (tmp_path / f"matrix{slide}" / "barcodes.tsv").write_text("\n".join(codes) + "\n")
    edit_manifest(tmp_path, name=["NA", "007"], donor=["nan", "1"])
    _, table, _ = make_dataset(tmp_path)
    assert table.obs["barcode"].tolist() == codes * 2
    assert sorted(table.var_names) == sorted(genes)
    assert set(table.obs["donor"]) == {"nan", "1"}
    assert [slide.name for slide in read_manifest(tmp_path)] == ["NA", "007"]
    data = common.load_dataset(tmp_path, "lognorm")
    assert data.spots["barcode"].tolist() == codes * 2
    assert sorted(data.genes) == sorted(genes)


def test_numbers_may_be_barcodes(tmp_path):
    (tmp_path / "barcodes.tsv").write_text("0\n1\n2\n")
    assert read_barcodes(tmp_path / "barcodes.tsv").tolist() == ["0", "1", "2"]
    (tmp_path / "barcodes.tsv").write_text('"x"\n"1" "AC-1"\n"2" "AG-1"\n')
    assert read_barcodes(tmp_path / "barcodes.tsv").tolist() == ["AC-1", "AG-1"]


def test_paths_of_windows(tmp_path):
    make_slides(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "image1.tif").rename(tmp_path / "images" / "image1.tif")
    edit_manifest(tmp_path, image=["images\\image1.tif", "image2.tif"])
    assert read_manifest(tmp_path)[0].image == tmp_path / "images" / "image1.tif"


# how a file's name is spelt on the disk: from the text in slides.csv
SPELLINGS = {
    "decomposed, of a Mac": lambda name: unicodedata.normalize("NFD", name),
    "composed": lambda name: unicodedata.normalize("NFC", name),
    "Latin-1": lambda name: os.fsdecode(unicodedata.normalize("NFC", name).encode("latin-1")),
}


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("kind", SPELLINGS)
def test_names_are_found_however_a_disk_spells_them(tmp_path, kind, form):
    make_slides(tmp_path, 1)
    names = [f"Gewebe_Müller_é{ending}" for ending in (".tif", ".csv", "")]
    for name, before in zip(names, ("image1.tif", "positions1.csv", "matrix1"), strict=True):
        (tmp_path / before).rename(tmp_path / SPELLINGS[kind](name))
    image, positions, matrix = [unicodedata.normalize(form, name) for name in names]
    edit_manifest(tmp_path, image=image, positions=positions, matrix=matrix)
    check_slides(tmp_path)


MANIFESTS = {
    "a spreadsheet's": {"sep": ";", "decimal": ",", "encoding": "utf-8-sig", "lineterminator": "\r\n"},
    "tabs": {"sep": "\t"},
    "UTF-16": {"sep": "\t", "encoding": "utf-16"},
    "Western Europe's": {"sep": ";", "encoding": "cp1252"},
}  # fmt: skip


@pytest.mark.parametrize("kind", MANIFESTS)
def test_manifests_of_spreadsheets(tmp_path, kind):
    make_slides(tmp_path)
    expected = read_manifest(tmp_path)
    table = pd.read_csv(tmp_path / "slides.csv").iloc[:, ::-1].rename(columns={"name": "Name"})
    table["donor"] = "Größe"
    table.to_csv(tmp_path / "slides.csv", index=False, **MANIFESTS[kind])
    found = read_manifest(tmp_path)
    assert {slide.donor for slide in found} == {"Größe"}
    for one, other in zip(found, expected, strict=True):
        assert (one.image, one.um_per_px) == (other.image, other.um_per_px)


# ------------------------------------------------------------------------------ GEO's and 10x's names
def add_prefix(path):
    pack(path.rename(path.with_name(f"GSM{path.parent.name}_{path.name}")))


def write_old_genes(path):
    """genes.tsv of two columns, as Cell Ranger 2 had it."""
    if path.name == "features.tsv":
        lines = [line.split("\t")[:2] for line in path.read_text().splitlines()]
        path.with_name("genes.tsv").write_text("".join("\t".join(line) + "\n" for line in lines))
        path.unlink()


def turn_round(path):
    """As mmwrite writes X of AnnData: spots are rows."""
    if path.name == "matrix.mtx":
        scipy.io.mmwrite(path, scipy.io.mmread(path).T)


PARTS = {"packed": pack, "with GEO's prefix": add_prefix, "genes.tsv": write_old_genes}
PARTS["the other way round"] = turn_round


def litter(folder):
    """What a Mac leaves beside every file of a folder on a disk of another system."""
    for path in list(folder.iterdir()):
        path.with_name(f"._{path.name}").write_bytes(bytes.fromhex("0005160700020000") + bytes(60))


@pytest.mark.parametrize("of_a_mac", [False, True])
@pytest.mark.parametrize("kind", PARTS)
def test_matrix_folders_of_geo_and_of_old_versions(tmp_path, kind, of_a_mac):
    make_slides(tmp_path, 1)
    for path in list((tmp_path / "matrix1").iterdir()):
        PARTS[kind](path)
    if of_a_mac:
        litter(tmp_path / "matrix1")
    check_slides(tmp_path)


def test_zeros_that_a_file_stores_are_not_read(tmp_path):
    make_slides(tmp_path, 1)
    path = tmp_path / "matrix1" / "matrix.mtx"
    path.write_text(re.sub(r"(?m)^(5 5) [1-9]\d*$", r"\1 0", path.read_text()))
    (slide,) = read_manifest(tmp_path)
    counts = read_spots(slide, read_positions(slide.positions)).X
    assert 0 < counts.nnz == (counts.toarray() > 0).sum()
    assert counts.has_sorted_indices


# name of the file: (separator, whether genes are rows, whether there is a head above row names)
DENSE = {
    "counts.tsv": ("\t", False, True),
    "counts.tsv.gz": ("\t", False, False),
    "counts.csv": (",", True, True),
    "counts.csv.gz": (";", True, True),
    "counts.txt": (" ", True, False),
}


def write_dense(path, counts, barcodes, separator, turned, head):
    """Counts (spots, genes) as a plain table."""
    table = pd.DataFrame(counts, index=[*barcodes], columns=GENES)
    table = table.T if turned else table
    text = table.to_csv(sep=separator)
    text = text if head else text[1:]  # as R's write.table
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("of_st", ["", "{}x{}", "SPOT{}x{}-1"])
@pytest.mark.parametrize("name", DENSE)
def test_counts_as_a_plain_table(tmp_path, name, of_st):
    counts, barcodes = draw_counts(36, 1), spot_array()["barcode"]
    if of_st:
        barcodes = [of_st.format(*divmod(number, 6)) for number in range(36)]
    write_dense(tmp_path / name, counts, barcodes, *DENSE[name])
    table = read_matrix(tmp_path / name)
    assert [*table.obs_names] == [*barcodes]
    assert [*table.var_names] == [*table.var["name"]] == GENES
    assert np.array_equal(table.X.toarray(), counts)


def test_slides_whose_counts_are_plain_tables_either_way_round(tmp_path):
    make_slides(tmp_path)
    for slide, name in ((1, "counts.tsv.gz"), (2, "counts.csv")):
        path = tmp_path / f"slide{slide}_{name}"
        write_dense(path, draw_counts(36, slide), spot_array()["barcode"], *DENSE[name])
    edit_manifest(tmp_path, matrix=["slide1_counts.tsv.gz", "slide2_counts.csv"])
    check_slides(tmp_path)


def test_names_of_a_plain_table_are_text(tmp_path):
    (tmp_path / "counts.csv").write_text("gene,1x1,1x2\nNA,1,2\n7,3,4\nnan,5,6\n")
    assert [*read_matrix(tmp_path / "counts.csv").var_names] == ["NA", "7", "nan"]


BAD_DENSE = {
    "no barcode": ("gene,a,b\nX,1,2\nY,3,4\n", ["as X", "as a", "barcodes"]),
    "a text": ("gene,1x1,1x2\nX,1,many\n", ["many"]),
    "cells that lack": ("gene,1x1,1x2\nX,1\n", ["2 names|3 names", "1 columns"]),
    "a gene twice": ("gene,1x1,1x2\nX,1,2\nX,3,4\n", ["gene X", "twice"]),
    "nothing": ("", ["not a table of counts"]),
}


@pytest.mark.parametrize("kind", BAD_DENSE)
def test_tables_that_hold_no_counts_are_refused(tmp_path, kind):
    text, words = BAD_DENSE[kind]
    path = tmp_path / "counts.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=str(path)) as caught:
        read_matrix(path)
    for word in words:
        assert re.search(word, str(caught.value))


def test_two_samples_in_one_folder_are_refused(tmp_path):
    make_slides(tmp_path)
    for path in list((tmp_path / "matrix1").iterdir()):
        shutil.copy(path, path.with_name(f"GSM2_{path.name}"))
        path.rename(path.with_name(f"GSM1_{path.name}"))
    refuse(tmp_path, "matrix1", "GSM1_barcodes.tsv", "GSM2_barcodes.tsv", "two samples")
    for name in ("GSM2_barcodes.tsv", "GSM1_features.tsv", "GSM1_matrix.mtx"):
        (tmp_path / "matrix1" / name).unlink()
    refuse(tmp_path, "matrix1", "GSM1_barcodes.tsv", "GSM2_features.tsv", "two samples")


def test_packed_images_and_positions(tmp_path):
    make_slides(tmp_path, 1)
    for name in ("image1.tif", "positions1.csv"):
        pack(tmp_path / name)
    edit_manifest(tmp_path, image="image1.tif.gz", positions="positions1.csv.gz")
    check_slides(tmp_path)


def test_a_packed_image_that_is_cut_is_refused(tmp_path):
    make_slides(tmp_path)
    packed = pack(tmp_path / "image1.tif")
    packed.write_bytes(packed.read_bytes()[:-999])
    edit_manifest(tmp_path, image=["image1.tif.gz", "image2.tif"])
    refuse(tmp_path, "image1.tif.gz", "fetch it again")


AFFIXES = {
    "no -1": lambda barcode: barcode[:-2],
    "-2 of an aggregation": lambda barcode: barcode[:-1] + "2",
    "R's point": lambda barcode: barcode.replace("-", "."),
    "a sample's name": lambda barcode: f"S1_{barcode}",
}


@pytest.mark.parametrize("kind", AFFIXES)
def test_barcodes_are_matched_without_what_surrounds_them(tmp_path, kind):
    make_slides(tmp_path, 1)
    table = spot_array()
    table["barcode"] = table["barcode"].map(AFFIXES[kind])
    table.to_csv(tmp_path / "positions1.csv", header=False, index=False)
    assert "matched without prefix and suffix" in check_slides(tmp_path)


def test_places_of_st_are_matched_as_r_writes_them():
    slide = Slide(1, "A", "A", *[None] * 4)
    places = match_barcodes(slide, pd.Index(["X10x13", "X2x7"]), pd.Index(["2x7", "10x13", "3x3"]))
    assert places.tolist() == [1, 0]


# ------------------------------------------------------------------------------ which spots count
def test_what_is_not_in_tissue_is_left_out_with_and_without_a_matrix(tmp_path):
    make_slides(tmp_path)
    table = spot_array()
    table.loc[table["array_row"] >= 4, "in_tissue"] = 0
    for slide in (1, 2):
        table.to_csv(tmp_path / f"positions{slide}.csv", header=False, index=False)
    printed, made, patches = make_dataset(tmp_path)
    assert "slide 2: 12 spots not in_tissue are left out" in printed
    check_spots(made, patches, 1, paint(1), 24)
    edit_manifest(tmp_path, matrix="")
    stdout_of("19", data_root=tmp_path)
    assert len(np.load(tmp_path / "dataset" / "patches.npy")) == 48


def test_a_few_barcodes_without_a_position_are_left_out(tmp_path):
    make_slides(tmp_path)
    spot_array()[5:].to_csv(tmp_path / "positions1.csv", header=False, index=False)
    printed, table, patches = make_dataset(tmp_path)
    check_spots(table, patches, 1, paint(1), 31)
    check_spots(table, patches, 2, paint(2), 36)
    (warning,) = json.loads((tmp_path / "dataset" / "meta.json").read_text())["warnings"]
    assert f"warning: {warning}" in printed
    assert "positions1.csv: 5 of 36 barcodes" in warning


@pytest.mark.parametrize("lost, start", [(7, ""), (8, "warning: ")])
def test_spots_that_a_matrix_lacks_are_counted(tmp_path, lost, start):
    """A table that breaks off at the end of a line is whole to any reader."""
    make_slides(tmp_path, 1)
    counts, barcodes = draw_counts(36, 1)[lost:], spot_array()["barcode"]
    write_matrix(tmp_path / "matrix1", barcodes[lost:], counts, GENES)
    printed, _, _ = make_dataset(tmp_path)
    line = f"matrix1: {lost} of 36 spots in_tissue are not in it, as {barcodes[0]}"
    assert f"\n{start}{tmp_path / line}" in printed


def test_a_few_spots_outside_the_image_are_left_out(tmp_path):
    make_slides(tmp_path)
    cropped = paint(1)[:, :1250]  # the last spot of every other row lies beyond it
    tifffile.imwrite(tmp_path / "image1.tif", cropped, photometric="rgb")
    printed, table, patches = make_dataset(tmp_path)
    assert "image1.tif: 3 of 36 spots lie outside the image (1400 x 1250 px)" in printed
    check_spots(table, patches, 1, cropped, 33)
    check_spots(table, patches, 2, paint(2), 36)
    meta = json.loads((tmp_path / "dataset" / "meta.json").read_text())
    assert meta["spots"] == len(patches) == 69
    checked = stdout_of("19", data_root=tmp_path, check=True)
    assert "2 slides can be used, with 1 warnings" in checked
    for lines in (printed, checked):
        assert lines.count("3 of 36 spots lie outside the image") == 1


@pytest.mark.parametrize("width, cause", [(900, "the positions of this"), (1350, "swapped")])
def test_swapped_is_named_only_where_it_would_help(tmp_path, width, cause):
    make_slides(tmp_path)
    tifffile.imwrite(tmp_path / "image1.tif", paint(1)[:1150, :width], photometric="rgb")
    swapped = spot_array()
    swapped[["pxl_row", "pxl_col"]] = spot_array()[["pxl_col", "pxl_row"]].to_numpy()
    if cause != "swapped":
        swapped["pxl_row"] += 900
    swapped.to_csv(tmp_path / "positions1.csv", header=False, index=False)
    refuse(tmp_path, "image1.tif", "outside the image", cause)


def test_positions_of_another_slide_are_refused_by_their_tissue(tmp_path):
    """The barcodes are the same on both; the upper half of one and the left half of the other."""
    make_slides(tmp_path)
    table = spot_array()
    upper = table["array_row"] < 3
    write_matrix(tmp_path / "matrix1", table["barcode"][upper], draw_counts(18, 1), GENES)
    table["in_tissue"] = (table["array_col"] < 6).astype(int)
    table.to_csv(tmp_path / "positions1.csv", header=False, index=False)
    refuse(tmp_path, "positions1.csv", "matrix1", "9 of the 18", "not of one slide")


# ------------------------------------------------------------------------- do these belong together
def make_outs(folder, seed, height=1400, scale=0.25):
    """A folder outs/ of Space Ranger with its hires image; returns it and the full image."""
    outs, image = folder / "outs", paint(seed, height)
    (outs / "spatial").mkdir(parents=True)
    HEADED.to_csv(outs / "spatial" / "tissue_positions.csv", index=False)
    counts = draw_counts(36, seed)
    write_matrix(outs / "filtered_feature_bc_matrix", spot_array()["barcode"], counts, GENES)
    size = round(image.shape[1] * scale), round(height * scale)
    small = Image.fromarray(image).resize(size, Image.Resampling.BOX)
    small.save(outs / "spatial" / "tissue_hires_image.png")
    scales = json.dumps({"tissue_hires_scalef": scale})
    (outs / "spatial" / "scalefactors_json.json").write_text(scales)
    path = folder / f"scan{seed}.tif"
    tifffile.imwrite(path, image, photometric="rgb")
    return outs, path


@pytest.mark.parametrize("part", ["", "outs"])
def test_outs_of_aggr_are_told_from_those_of_a_sample(tmp_path, part):
    outs, image = make_outs(tmp_path / "AGG123", 1)
    (outs / "spatial" / "A1").mkdir()
    for path in [*(outs / "spatial").glob("*.*")]:
        path.rename(outs / "spatial" / "A1" / path.name)
    HEADED.to_csv(outs / "aggr_tissue_positions.csv", index=False)
    options = {"from_spaceranger": tmp_path / "AGG123" / part, "images": image}
    refuse(tmp_path / "mine", "spaceranger aggr", "the outs/ of each sample", **options)


def list_of(paths):
    return ",".join(map(str, paths))


@pytest.mark.parametrize("heights", [(1400, 1400), (1400, 1440)])
def test_images_in_another_order_are_refused_with_the_order_that_fits(tmp_path, heights):
    made = [make_outs(tmp_path / f"s{i}", i, height) for i, height in enumerate(heights, 1)]
    outs, images = zip(*made, strict=True)
    root, options = tmp_path / "mine", {"from_spaceranger": list_of(outs)}
    words = "scan2.tif", f"the order that fits is {list_of(images)}"
    refuse(root, *words, images=list_of(images[::-1]), **options)
    assert not (root / "slides.csv").exists()
    _, table, patches = make_dataset(root, images=list_of(images), **options)
    check_spots(table, patches, 1, paint(1, heights[0]), 36)


@pytest.mark.parametrize("change, words", [
    (lambda image: image.repeat(2, 0).repeat(2, 1), ["2800 x 3200", "1400 x 1600", "2 times"]),
    (lambda image: image[::4, ::4], ["350 x 400", "1400 x 1600", "0.25 times"]),
    (lambda image: image[:, :-30], ["1400 x 1570", "1400 x 1600"]),
    (lambda image: image[::-1, ::-1], ["shows something else", "tissue_hires_image.png"]),
])  # fmt: skip
def test_another_image_than_space_rangers_is_refused(tmp_path, change, words):
    outs, path = make_outs(tmp_path / "s1", 1)
    tifffile.imwrite(path, change(paint(1)), photometric="rgb")
    options = {"from_spaceranger": outs, "images": path}
    refuse(tmp_path / "mine", "scan1.tif", *words, **options)


def list_outs(root):
    """Of a data root whose files are where Space Ranger put them, (outs/, the full image)."""
    outs, path = make_outs(root, 1)
    row = [1, "S", "D", path.name, 0.5, "outs/spatial/tissue_positions.csv"]
    row.append("outs/filtered_feature_bc_matrix")
    pd.DataFrame([row], columns=MANIFEST).to_csv(root / "slides.csv", index=False)
    return outs, path


def test_an_image_is_held_against_the_hires_image_beside_its_positions(tmp_path):
    outs, path = list_outs(tmp_path)
    tifffile.imwrite(path, paint(1)[:, ::-1], photometric="rgb")
    refuse(tmp_path, "scan1.tif", "shows something else", "tissue_hires_image.png")
    (outs / "spatial" / "scalefactors_json.json").write_text('{"tissue_lowres_scalef": 0.1}')
    printed, _, _ = make_dataset(tmp_path)
    assert "warning: " in printed and "cannot be told" in printed, "its scale is not known"


def test_space_rangers_files_as_geo_has_them(tmp_path):
    """Packed, with the sample's accession before every name, and a packed full image."""
    outs, path = make_outs(tmp_path / "s1", 1)
    matrix = read_matrix(outs / "filtered_feature_bc_matrix")
    shutil.rmtree(outs / "filtered_feature_bc_matrix")
    h5 = outs / "GSM1_filtered_feature_bc_matrix.h5"
    write_h5(h5, matrix.X.toarray(), GENES, barcodes=matrix.obs_names)
    pack(h5)
    for file in list((outs / "spatial").iterdir()):
        pack(file.rename(file.with_name(f"GSM1_{file.name}")))
    options = {"from_spaceranger": outs, "images": pack(path)}
    printed, table, patches = make_dataset(tmp_path / "mine", **options)
    check_spots(table, patches, 1, paint(1), 36)
    assert "warning" not in printed


def test_a_folder_without_a_hires_image_is_taken_with_a_warning(tmp_path):
    outs, path = make_outs(tmp_path / "s1", 1)
    (outs / "spatial" / "tissue_hires_image.png").unlink()
    printed, _, _ = make_dataset(tmp_path / "mine", from_spaceranger=outs, images=path)
    assert "warning: " in printed and "cannot be told" in printed


@pytest.mark.parametrize("um, words", [
    (0.25, ["199.8 px", "50 um", "um_per_px 0.50"]), (0.5, []), (1.0, ["200 um; expected 100, as Visium's array"]), (0.4, ["80 um"]), (2.0, ["400 um"]),
])  # fmt: skip
def test_the_pitch_is_held_against_um_per_px(tmp_path, um, words):
    make_slides(tmp_path, 1)
    edit_manifest(tmp_path, um_per_px=um)
    printed, _, _ = make_dataset(tmp_path)
    assert ("warning" in printed) == bool(words)
    assert all(word in printed for word in words), printed


def lay_visium():
    """Visium's array, whose hexagons the numbers of rows and columns do not tell."""
    positions = spot_array().set_index("barcode")
    return positions.assign(array_col=positions["array_col"] // 2)


def lay_squares(names=None):
    """A square grid of 200 px."""
    row, col = np.divmod(np.arange(30), 6)
    places = {"pxl_row": 200 * row + 300 + col, "pxl_col": 200 * col + 300}
    return pd.DataFrame({"array_row": row, "array_col": col} | places, names)


def lay_hest():
    """Squares of Xenium, which HEST has made 100 um wide and tells by their names."""
    return lay_squares([f"{i // 6:03}x{i % 6:03}" for i in range(30)])


# Spots 200 px apart: of how many um that is somebody's design, of how many it is not.
PITCHES = {
    lay_visium: ((100, 108, 110, 128, 185), (114, 120, 124, 150, 256), ["{} um; expected 100 (Visium), 200 (ST)"]),
    # As where the um_per_px of a section of ST is half of what it should be.
    lay_squares: ((110, 188), (94, 100, 400), ["expected 200 of a square grid (ST)", "would be 200"]),
    lay_hest: ((100, 128), (50,), []),
}  # fmt: skip


@pytest.mark.parametrize("lay", PITCHES)
def test_pitches_that_collections_have_by_design_are_known(capsys, lay):
    known, others, words = PITCHES[lay]
    image = Path("a.tif")
    for um in (*known, *others):
        check_pitch(Slide(1, "A", "A", image, um / 199.9, positions=image, matrix=None), lay())
        printed = capsys.readouterr().out
        assert ("warning" in printed) == (um in others), um
        assert um in known or all(word.format(um) in printed for word in words), printed


@pytest.mark.parametrize("turn", [0, 10, 45])
def test_visium_without_an_array_is_no_square_grid(tmp_path, capsys, turn):
    """Rows and columns that are made from px are as far apart down as across."""
    row, col = np.divmod(np.arange(100), 10)
    places = (200 * col + 100 * (row % 2) + 173.2j * row) * np.exp(1j * np.deg2rad(turn))
    places += 3000 + 3000j
    table = anndata.AnnData(np.ones((100, 2), np.float32))
    table.obsm["spatial"] = np.column_stack([places.real, places.imag])
    table.write_h5ad(tmp_path / "a.h5ad")
    slide = Slide(1, "A", "A", tmp_path / "a.tif", 0.5, tmp_path / "a.h5ad", None)
    check_pitch(slide, read_positions(tmp_path / "a.h5ad"))
    printed = capsys.readouterr().out
    assert "no array_row and array_col" in printed and "warning" not in printed


@pytest.mark.parametrize(
    "resolutions, check", [((0.25, 0.5), False), ((0.5, 0.25), True), ((0.5, 1.0), True)]
)
def test_two_magnifications_are_warned_of(tmp_path, resolutions, check):
    make_slides(tmp_path)
    edit_manifest(tmp_path, um_per_px=resolutions)
    options = {"data_root": tmp_path, "target": "lognorm", "check": check}
    printed = stdout_of("19", **options)
    assert f"warning: slides.csv: um_per_px is {min(resolutions)}" in printed
    assert f"give --um-per-px {max(resolutions):g}" in printed
    printed = stdout_of("19", **options, um_per_px=max(resolutions))
    assert "slides.csv: um_per_px" not in printed


# -------------------------------------------------------------------------------- genes and panels
PANELS = {
    "a spreadsheet's": "gene\r\n4-Sep\r\n GENE5 \r\nGene6\r\nGENE7\r\n",
    "write.csv": '"","gene"\n"1","4-Sep"\n"2","GENE5"\n"3","Gene6"\n"4","GENE7"\n',
    "a list without a header": "4-Sep\nGENE5\nGene6\nGENE7\n",
    "semicolons": "group;Symbol\na;4-Sep\na;GENE5\nb;Gene6\nb;GENE7\n",
}


@pytest.mark.parametrize("kind", PANELS)
def test_genes_that_a_panel_loses_are_named(tmp_path, kind):
    make_slides(tmp_path / "root", 1)
    (tmp_path / "panel.csv").write_bytes(PANELS[kind].encode())
    printed, table, _ = make_dataset(tmp_path / "root", panel=tmp_path / "panel.csv")
    assert set(table.var_names) == {"GENE5", "GENE7"}
    assert "2 of 4 genes are not in the slides: 4-Sep, Gene6" in printed
    assert "Gene6 (GENE6)" in printed


def make_two_species(root, kind):
    """A slide with GRCh38_... and mm10___... in one matrix, as an .h5 or a folder."""
    make_slides(root, 1)
    names = [f"GRCh38_{gene}" for gene in GENES] + [f"mm10___{gene}" for gene in GENES]
    counts = np.hstack([draw_counts(36, 1), draw_counts(36, 10)])
    matrix, barcodes = root / "m1.h5", spot_array()["barcode"]
    if kind == "h5":
        genomes = ["GRCh38"] * len(GENES) + ["mm10"] * len(GENES)
        write_h5(matrix, counts, names, genomes, barcodes)
    else:
        write_matrix(matrix, barcodes, counts, names)
        path = matrix / "features.tsv"
        path.write_text(path.read_text().replace("IDGRCh38_", "GRCh38_").replace("IDmm", "mm"))
    edit_manifest(root, matrix="m1.h5")


@pytest.mark.parametrize("kind", ["h5", "folder"])
def test_of_two_species_one_is_chosen(tmp_path, kind):
    make_two_species(tmp_path, kind)
    printed, table, _ = make_dataset(tmp_path)
    assert table.n_vars == 2 * len(GENES)
    assert "m1.h5: GRCh38 (48 genes) and mm10 (48 genes)" in printed and "--genome" in printed
    printed, table, patches = make_dataset(tmp_path, genome="GRCh38")
    assert sorted(table.var_names) == sorted(GENES)
    assert "warning" not in printed
    check_spots(table, patches, 1, paint(1), 36)
    shutil.rmtree(tmp_path / "dataset")
    refuse(tmp_path, "--genome hg19", "GRCh38", "mm10", genome="hg19")


# ------------------------------------------------------------------------------------ odd and small
def test_few_spots_for_harmony_are_refused(tmp_path):
    make_slides(tmp_path)
    for slide in (1, 2):
        table = spot_array().assign(in_tissue=[1] * 6 + [0] * 30)
        table.to_csv(tmp_path / f"positions{slide}.csv", header=False, index=False)
    refuse(tmp_path, "--target harmony", "12", "--target lognorm", target="harmony")


@pytest.mark.parametrize("name", ["Pat. 7, Größe #2", "a,b", "肝 ; ' 1"])
def test_paths_of_any_characters(tmp_path, name):
    made = [make_outs(tmp_path / name / f"sample {i}, 0", i) for i in (1, 2)]
    outs, images = zip(*made, strict=True)
    options = {"from_spaceranger": list_of(outs), "images": list_of(images)}
    _, table, patches = make_dataset(tmp_path / name / "mine", **options)
    check_spots(table, patches, 2, paint(2), 36)


def test_a_path_that_is_not_there_is_named(tmp_path):
    outs, _ = make_outs(tmp_path / "s1", 1)
    options = {"from_spaceranger": f"{outs},{tmp_path / 'none'}", "images": "a.tif,b.tif"}
    refuse(tmp_path / "mine", "--from-spaceranger", "none", "no such", **options)


# -------------------------------------------------------------------------------------------- leaks
def name_otherwise(features):
    """The lines of a features.tsv, of genes that other slides lack, but for GENE7."""
    return re.sub(r"ID(?!GENE7\t)(\S+)\t", r"OTHER\1\tOTHER", features)


def test_few_shared_genes_are_no_leak(tmp_path):
    """Of 48 genes the slides share two, in which many spots have the same counts."""
    make_slides(tmp_path)
    path = tmp_path / "matrix2" / "features.tsv"
    first, others = path.read_text().split("\n", 1)
    path.write_text(f"{first}\n{name_otherwise(others)}")
    printed, table, _ = make_dataset(tmp_path)
    assert "slide 2 does not list 46 of the 94 genes of the panel" in printed
    shared = table[:, table.var[["listed_1", "listed_2"]].all(axis=1)]
    assert shared.n_vars == 2
    assert len(np.unique(shared.X.toarray(), axis=0)) < 72


def test_a_slide_that_is_there_twice_is_found_beside_one_of_other_genes(tmp_path):
    make_slides(tmp_path, 3)
    path = tmp_path / "matrix2" / "features.tsv"
    path.write_text(name_otherwise(path.read_text()))
    edit_manifest(tmp_path, matrix=["matrix1", "matrix2", "matrix1"])
    refuse(tmp_path, "1_", "3_", "the same counts, on two slides", "its own")


@pytest.mark.parametrize("expected, warned", [(500, True), (5, False)])
def test_genes_that_were_not_measured_on_a_slide_are_warned_of(capsys, expected, warned):
    """But not those of which a slide may have no count by chance."""
    panel = pd.DataFrame({"listed_1": True, "listed_2": [False, True]}, ["HAL", "VWF"])
    counts = {1: np.array([2.0 * expected, 4000]), 2: np.array([0, 2000.0])}
    warn_of_unlisted(panel, counts, {1: 20_000, 2: 10_000})
    text = "slide 2 does not list 1 of the 2 genes of the panel, though by the other slides"
    printed = capsys.readouterr().out
    assert [text in printed, "(500 of HAL): they count as 0 there" in printed] == [warned] * 2
    assert "slide 1" not in printed


# -------------------------------------------------------------------------------------------- check
def test_check_says_what_is_found_and_writes_nothing(tmp_path, monkeypatch):
    """It needs no folder that can be written to."""
    make_slides(tmp_path)
    spot_array()[2:].to_csv(tmp_path / "positions1.csv", header=False, index=False)
    monkeypatch.setattr(files, "hold_folder", lambda folder: pytest.fail(f"{folder} is held"))
    printed = stdout_of("19", data_root=tmp_path, check=True)
    for line in ["1400 x 1600 px", "0.5 um/px in slides.csv", "its tags say nothing",
                 "34 kept; 2 left out (2 without a position)", "48 genes, as HAL, CYP3A4",
                 "8 of the 8 markers", "2 slides can be used, with 1 warnings"]:  # fmt: skip
        assert line in printed
    assert not list(tmp_path.glob("*dataset*")) and not (tmp_path / ".lock").exists()


def test_check_refuses_slides_that_are_alike(tmp_path):
    make_slides(tmp_path)
    check = {"data_root": tmp_path, "check": True}
    edit_manifest(tmp_path, matrix=["matrix1", "matrix1"])
    expect_refusal(["the same counts, on two slides"], "19", **check)
    edit_manifest(tmp_path, image=["image1.tif", "image1.tif"], matrix=["matrix1", "matrix2"])
    expect_refusal(["a leak: ", "have the same pixels"], "19", **check)


@pytest.mark.parametrize("check", [False, True])
def test_one_slide_for_harmony_is_refused_before_patches_are_cut(tmp_path, capsys, check):
    make_slides(tmp_path, 1)
    assert run_script("19", data_root=tmp_path, target="harmony", check=check) == 2
    printed = capsys.readouterr()
    assert "there is only one; use --target lognorm" in printed.err
    assert "slide  name" not in printed.out and "spots " not in printed.out


def test_check_goes_on_after_a_slide_that_is_refused(tmp_path, capsys):
    make_slides(tmp_path)
    (tmp_path / "positions1.csv").write_text("what,is,this\n")
    expect_refusal(["1 of 2 slides cannot be used"], "19", data_root=tmp_path, check=True)
    assert "36 kept; 0 left out" in capsys.readouterr().out
    assert not list(tmp_path.glob("*dataset*"))


@pytest.mark.parametrize("column", ["pxl_row", "pxl_col"])
@pytest.mark.parametrize("separator, mark", [*itertools.product("\t;", ".,"), (",", ".")])
@pytest.mark.parametrize("far", [0, 2000])
def test_thousands_under_any_separator_are_refused_by_name(tmp_path, column, separator, mark, far):
    """Far from the corner all numbers have a point: then the spots lie on few pixels."""
    table = spot_array().rename(columns=FULLRES)
    name = FULLRES[column]
    table[name] = table[name].map(lambda value: f"{value + far:,}".replace(",", mark))
    table.to_csv(tmp_path / "positions.csv", sep=separator, index=False)
    words = rf"{column} '[1-9]\{mark}\d+' of barcode [ACGT]+-1 may be .*separators of thousands"
    with pytest.raises(InputError, match=words):
        read_positions(tmp_path / "positions.csv")


def test_spots_on_one_pixel_are_refused(tmp_path):
    table = spot_array()
    table.loc[5, ["pxl_row", "pxl_col"]] = table.loc[7, ["pxl_row", "pxl_col"]]
    table.loc[[1, 2], ["in_tissue", "pxl_row", "pxl_col"]] = 0  # as of spots without a place
    table.to_csv(tmp_path / "positions.csv", index=False)
    barcodes = " and ".join(table["barcode"][[5, 7]])
    with refused(f"the spots {barcodes} lie on one pixel, pxl_row"):
        read_positions(tmp_path / "positions.csv")
