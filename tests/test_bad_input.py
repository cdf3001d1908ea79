"""Bad input: exit code 2, one line that names the file or value and the fix, nothing half-written."""

import bz2
import gzip
import io
import json
import lzma
import shutil
import tarfile
import zipfile
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from conftest import (
    AT_RANDOM,
    TINY,
    TINY_SEARCH,
    edit_manifest,
    expect_refusal,
    flags_of,
    refused,
    rows_of,
    run_script,
    stdout_of,
    write_slide,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_patches import HEIGHT, WIDTH, make_root, picture, spot_table

import common
from slides import inputs
from slides.counts import check_counts, read_matrix
from slides.manifest import MANIFEST, read_manifest
from slides.positions import read_positions
from study import panels, runs, splitting
from study.errors import InputError


# Each of these gives a function that spoils a data root.
def without(name):
    return lambda root: (root / name).unlink()


def edited(**columns):
    return lambda root: edit_manifest(root, **columns)


def written(name, content):
    content = content if isinstance(content, bytes) else content.encode()
    return lambda root: (root / name).write_bytes(content)


def changed(name, change):
    """The text of a file is what `change` makes of it."""

    def spoil(root):
        (root / name).write_text(change((root / name).read_text()))

    return spoil


def cut(name, keep=0.5):
    def spoil(root):
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[: int(keep * len(content))])

    return spoil


def positioned(change):
    """The positions are what `change` makes of their table."""

    def spoil(root):
        change(spot_table()).to_csv(root / "positions1.csv", header=False, index=False)

    return spoil


def tiff(pixels, **options):
    return lambda root: tifffile.imwrite(root / "slide.tif", pixels, **options)


def pillow(pixels, kind, change=lambda image: image):
    return lambda root: change(Image.fromarray(pixels)).save(root / "slide.tif", kind)


def both(*spoils):
    def spoil(root):
        for part in spoils:
            part(root)

    return spoil


def keep_counts(root, change, kind="integer"):
    """Rewrite the entries "gene spot count" of matrix.mtx."""
    path = root / "matrix1" / "matrix.mtx"
    lines = [line for line in path.read_text().splitlines() if not line.startswith("%")]
    entries = change(lines[1:])
    head = f"%%MatrixMarket matrix coordinate {kind} general"
    sizes = " ".join([*lines[0].split()[:2], str(len(entries))])
    path.write_text("\n".join([head, sizes, *entries]) + "\n")


def counted(change, kind="integer"):
    return lambda root: keep_counts(root, change, kind)


def with_first_count(value):
    """The first count of matrix.mtx becomes another number."""
    return counted(lambda lines: [" ".join([*lines[0].split()[:2], value]), *lines[1:]], "real")


def repeat_first_slide(text):
    return text + text.split("\n")[1] + "\n"


def rename_first_slide(text):
    return text + text.split("\n")[1].replace("1,", "2,", 1) + "\n"


def spoil_tile(root):
    tiles = {"photometric": "rgb", "tile": (128, 128), "compression": "zlib"}
    tifffile.imwrite(root / "slide.tif", picture(), **tiles)
    content = (root / "slide.tif").read_bytes()
    damaged = content[:3000] + b"\xff" * 60_000 + content[63_000:]
    (root / "slide.tif").write_bytes(damaged)


LZW = {"photometric": "rgb", "tile": (128, 128), "compression": "lzw"}
COLOURS = {"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)}
DAMAGED_GZIP = gzip.compress(b"x" * 99)[:-12] + b"no" * 9
CLASH = "".join(f"I{g}\t{'barcode' if g == 3 else g}\tGene Expression\n" for g in range(12))


def make_zip(*names):
    """An archive with empty files of these names."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name in names:
            archive.writestr(name, "")
    return made.getvalue()


def make_tar():
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("slides.csv"))
    return made.getvalue()


OTHER_KINDS = {
    "an Excel workbook (.xlsx)": make_zip("[Content_Types].xml", "xl/workbook.xml"),
    "a .zip archive": make_zip("slides.csv"),
    "an old Excel workbook (.xls)": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(512),
    "an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "a .tar archive": make_tar(),
    "packed as .bz2": bz2.compress(b"gene\nHAL\n"),
    "packed as .xz": lzma.compress(b"gene\nHAL\n"),
    "a web page": b"<!DOCTYPE html>\n<html><body>Not found</body></html>",
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "binary": bytes(range(256)),
}

WORKBOOK = "an Excel workbook (.xlsx)"


# name: (what is spoilt, words that the message must hold)
CASES = {
    "no manifest": (without("slides.csv"), ["slides.csv", "17_download_data.py"]),
    "empty manifest": (written("slides.csv", ""), ["slides.csv"]),
    "manifest without a column": (written("slides.csv", "tissue_index,name\n1,A\n"), ["slides.csv", "donor"]),
    "no slide in the manifest": (written("slides.csv", ",".join(MANIFEST) + "\n"), ["slides.csv", "tissue_index"]),
    "one slide twice": (changed("slides.csv", repeat_first_slide), ["slides.csv", "tissue_index"]),
    "two slides of one name": (changed("slides.csv", rename_first_slide), ["slides.csv", "name"]),
    "a workbook for a manifest": (written("slides.csv", OTHER_KINDS[WORKBOOK]), ["slides.csv", f"this is {WORKBOOK}", "as CSV"]),
    "missing slide": (without("slide.tif"), ["slides.csv", "slide.tif", "does not exist"]),
    "path out of the data root": (edited(image="../slide.tif"), ["../slide.tif", "outside"]),
    "an absolute path": (edited(image="/etc/hostname"), ["/etc/hostname", "outside"]),
    "a folder for an image": (edited(image="matrix1"), ["matrix1", "is a folder"]),
    "matrix without positions": (edited(positions=np.nan), ["slides.csv", "slide 1 has a matrix and no positions"]),
    "slide without an image": (edited(image=np.nan), ["slides.csv", "slide 1 has no image"]),
    "slide without a donor": (edited(donor=np.nan), ["slides.csv", "S1", "no donor"]),
    "um_per_px of zero": (edited(um_per_px=0), ["um_per_px"]),
    "um_per_px that is no number": (edited(um_per_px="half"), ["um_per_px"]),
    "tissue_index that is no number": (edited(tissue_index="first"), ["tissue_index"]),
    "truncated contiguous TIFF": (cut("slide.tif"), ["slide.tif", "truncated", "fetch it again"]),
    "truncated tiled TIFF": (both(tiff(picture(), **LZW), cut("slide.tif", 0.9)), ["slide.tif", "fetch"]),
    "corrupt tile": (spoil_tile, ["slide.tif"]),
    "text for an image": (written("slide.tif", "no image"), ["slide.tif", "not a readable image"]),
    "empty image file": (written("slide.tif", ""), ["slide.tif"]),
    "cut within the TIFF header": (written("slide.tif", b"II*\0\x08\0"), ["slide.tif"]),
    "truncated JPEG": (both(pillow(picture(), "JPEG"), cut("slide.tif")), ["slide.tif", "the JPEG has no end"]),
    "16-bit image": (tiff(picture().astype(np.uint16), photometric="rgb"), ["slide.tif", "uint16", "8-bit"]),
    "one-bit image": (tiff(picture()[..., 0] > 99, photometric="minisblack"), ["slide.tif", "bool", "8-bit"]),
    "palette TIFF": (tiff(picture()[..., 0], **COLOURS), ["slide.tif", "PALETTE", "RGB"]),
    "16-bit PNG": (pillow(picture()[..., 0].astype(np.uint16) * 257, "PNG"), ["slide.tif", "I;16", "8-bit"]),
    "palette PNG": (pillow(picture(), "PNG", lambda image: image.quantize(16)), ["slide.tif", "P image", "8-bit"]),
    "CMYK": (pillow(picture(), "TIFF", lambda image: image.convert("CMYK")), ["slide.tif", "SEPARATED"]),
    "spot outside the image": (
        positioned(lambda spots: spots.assign(pxl_row=spots["pxl_row"] + HEIGHT)),
        ["slide.tif", "outside the image", f"{HEIGHT} x {WIDTH}"],
    ),
    "a workbook for positions": (written("positions1.csv", OTHER_KINDS[WORKBOOK]), ["positions1.csv", f"this is {WORKBOOK}", "as CSV"]),
    "a spot without barcode": (positioned(lambda spots: spots.assign(barcode=["", *spots["barcode"][1:]])), ["positions1.csv", "no barcode"]),
    "barcode twice": (positioned(lambda spots: pd.concat([spots, spots[:1]])), ["positions1.csv", "A0-1", "twice"]),
    "positions with five columns": (positioned(lambda spots: spots.drop(columns="in_tissue")), ["positions1.csv", "5 columns"]),
    "positions without tissue": (
        both(positioned(lambda spots: spots.assign(in_tissue=0)), edited(matrix=np.nan)),
        ["positions1.csv", "no spot is in_tissue"],
    ),
    "most barcodes without a position": (positioned(lambda spots: spots[4:]), ["positions1.csv", "A0-1", "4 of 7", "not of one slide"]),
    "no matrix in the folder": (without("matrix1/matrix.mtx"), ["matrix.mtx", "matrix1"]),
    "matrix of another shape than its barcodes": (
        written("matrix1/barcodes.tsv", "A0-1\nC1-1\n"), ["matrix.mtx", "12 genes x 7 spots", "2 barcodes"],
    ),
    "truncated matrix": (cut("matrix1/matrix.mtx"), ["matrix.mtx", "whole"]),
    "no h5": (both(written("m.h5", "text"), edited(matrix="m.h5")), ["m.h5", "10x"]),
    "empty barcodes": (written("matrix1/barcodes.tsv", ""), ["barcodes.tsv"]),
    "ragged features": (written("matrix1/features.tsv", "a\nb\tc\td\te\n"), ["features.tsv"]),
    "corrupt gzip": (both(without("matrix1/matrix.mtx"), written("matrix1/matrix.mtx.gz", DAMAGED_GZIP)), ["matrix.mtx.gz"]),
    "a zero byte in the matrix": (
        counted(lambda lines: [*lines[:-1], lines[-1] + "\0"]), ["matrix.mtx", "zero byte", "fetch it again"],
    ),
    "a count beyond all numbers": (counted(lambda lines: [lines[0] + "0" * 30, *lines[1:]]), ["matrix.mtx", "out of range"]),
    "negative counts": (with_first_count("-2"), ["matrix1", "no counts"]),
    "NaN counts": (with_first_count("nan"), ["matrix1", "no counts"]),
    "fractional counts": (with_first_count("1.5"), ["matrix1", "no counts", "raw counts"]),
    "infinite counts": (with_first_count("inf"), ["matrix1", "no counts"]),
    "all counts zero": (counted(lambda lines: []), ["matrix1", "no spot has a count"]),
    "a barcode twice in the matrix": (
        changed("matrix1/barcodes.tsv", lambda text: text.replace("C1-1", "A0-1")), ["matrix1", "A0-1", "twice"],
    ),
    "a gene id twice": (
        changed("matrix1/features.tsv", lambda text: 12 * (text.split("\n")[0] + "\n")), ["matrix1", "gene id", "twice"],
    ),
    "a gene called as a column": (written("matrix1/features.tsv", CLASH), ["'barcode'", "rename it"]),
    "one slide for harmony": (lambda root: None, ["harmony", "--target lognorm"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def dataset_files(tmp_path_factory):
    """{name: content} of what script 19 makes of the root that is spoilt."""
    root = tmp_path_factory.mktemp("before")
    make_root(root)
    assert run_script("19", data_root=root, target="lognorm") == 0
    return {path.name: path.read_bytes() for path in (root / "dataset").iterdir()}


@pytest.mark.parametrize("case", CASES)
def test_script_19_refuses(tmp_path, dataset_files, case):
    spoil, words = CASES[case]
    make_root(tmp_path)
    (tmp_path / "dataset").mkdir()
    for name, content in dataset_files.items():
        (tmp_path / "dataset" / name).write_bytes(content)
    spoil(tmp_path)
    target = "harmony" if "harmony" in case else "lognorm"
    expect_refusal(words, "19", data_root=tmp_path, target=target)
    left = {path.name: path.read_bytes() for path in (tmp_path / "dataset").iterdir()}
    assert left == dataset_files, "the old one is whole, and nothing lies beside it"


LOSO = ["--protocol", "loso", "--target", "lognorm"]
COMMANDS = [
    ("17", ["--source", "http://example.org"], ["http://example.org", "https"]),
    ("18", ["--slides", "0"], ["--slides 0", "from 1"]),
    ("18", ["--geometry", "."], ["tissue_positions_list_1.csv"]),
    ("19", ["--hvg-per-slide", "0"], ["--hvg-per-slide 0", "from 1"]),
    ("19", ["--seed", "x"], ["--seed", "invalid int value: 'x'"]),
    ("19", ["--images", "a.tif"], ["--images and --use-hires go with --from-spaceranger"]),
    ("19", ["--use-hires"], ["--images and --use-hires go with --from-spaceranger"]),
    ("19", ["--um-per-px", "nan"], ["--um-per-px nan", "from 0"]),
    ("19", ["--um-per-px", "-0.5"], ["--um-per-px -0.5", "from 0"]),
    ("20", ["--epoch", "3", "--nonsense"], ["--epoch", "--nonsense", "--help"]),
    ("20", ["--epochs", "three"], ["--epochs", "invalid int value: 'three'"]),
    ("20", ["--epochs", "0"], ["--epochs 0", "needs --head-start ridge"]),
    ("20", ["--epochs"], ["--epochs"]),
    ("20", ["--batch-size", "1"], ["--batch-size 1", "from 2"]),
    ("20", ["--target", "raw"], ["--target raw", "harmony, lognorm"]),
    ("20", ["--target", "lognorm", "--compare-targets"], ["--compare-targets", "--target harmony"]),
    ("20", ["--tta", "no"], ["--tta", "invalid bool value: 'no'"]),
    ("20", ["--pretrained", "no"], ["--pretrained no", "no such file or folder", "true, false"]),
    ("20", ["--train-slides", "1,x"], ["--train-slides", "invalid tuple value: '1,x'"]),
    ("20", ["--train-slides", "1,3"], ["slide 3", "TRAIN_SLIDES"]),
    ("20", ["--test-slide", "9"], ["slide 9", "[1 2 3 4]"]),
    ("20", ["--valid-fraction", "0"], ["--valid-fraction 0.0"]),
    ("20", ["--valid-fraction", "1.5"], ["--valid-fraction 1.5"]),
    ("20", ["--backbone", "efficientnet_b00"], ["efficientnet_b00", "timm"]),
    ("20", ["--backbone", "efficientnet_b0.zzz"], ["efficientnet_b0.zzz", "timm"]),
    ("20", ["--backbone", "vgg11", "--stochastic-depth", "0.2"], ["use --stochastic-depth 0"]),
    ("20", ["--aug", "nonsense"], ["--aug nonsense", ", ".join(common.AUGMENTATIONS)]),
    ("20", ["--loss", "huber"], ["--loss huber: expected one of mse"]),
    ("20", ["--seeds", ""], ["--seeds"]),
    ("20", ["--seeds", "42,43,42"], ["--seeds 42,43,42", "twice"]),
    ("20", ["--train-slides", "1,1,2"], ["--train-slides 1,1,2", "twice"]),
    ("20", [*LOSO, "--test-slide", "2"], ["--test-slide 2: --protocol loso does not ask for it"]),
    ("20", [*LOSO, "--test-slide", "3"], ["--test-slide 3: --protocol loso does not ask for it"]),
    ("20", [*LOSO, "--valid-fraction", "0.3"], ["--valid-fraction 0.3: --protocol loso"]),
    ("20", ["--device", "tpu"], ["--device tpu"]),
    ("20", ["--protocol", "block"], ["--protocol block", "--target lognorm"]),
    ("20", [*LOSO, "--train-slides", "1,2"], ["slide 1", "two are needed"]),
    ("20", ["--protocol", "random"], ["--protocol random", "paper, loso, block"]),
    ("20", ["--trainable-stages", "10"], ["TRAINABLE_STAGES 10", "9 stages"]),
    ("20", ["--trainable-stages", "-2"], ["--trainable-stages -2", "from -1"]),
    ("20", ["--data-root", "nowhere"], ["nowhere", "19_make_patches_and_csv.py --data-root nowhere"]),
    ("21", ["--recipe", "published", "--only", "densenet121"], ["another recipe than published"]),
    ("22", [*LOSO, "--folds", "3"], ["--folds 3: --protocol loso does not ask for it"]),
    ("23", ["--seeds", "1.5"], ["--seeds", "invalid tuple value"]),
    ("24", ["--min-cluster", "2"], ["--min-cluster 2.0", "from 0 to 1"]),
]  # fmt: skip


@pytest.mark.parametrize("script, arguments, words", COMMANDS)
def test_a_command_is_refused_before_anything_is_written(
    simulated, tmp_path, monkeypatch, script, arguments, words
):
    monkeypatch.chdir(tmp_path)
    options = {"data_root": tmp_path} if script in ("18", "19") else {}
    if script >= "20":
        options = TINY_SEARCH if script == "22" else TINY
        options = options | {"data_root": simulated, "out": tmp_path / "out"}
    expect_refusal(words, script, *flags_of(options), *arguments)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {".lock"}


def test_spots_without_counts_are_left_out_and_said(tmp_path):
    make_root(tmp_path)
    keep_counts(tmp_path, lambda lines: [line for line in lines if line.split()[1] != "3"])
    printed = stdout_of("19", data_root=tmp_path, target="lognorm")
    assert "slide 1: 1 spots without counts are left out" in printed
    assert len(common.load_dataset(tmp_path, "lognorm").spots) == 6


@pytest.mark.parametrize("content, words", [
    (b"", []), (b"gene\n", ["names no gene"]), (b"gene\nNONE\n", ["hold none", "NONE"]),
    (OTHER_KINDS[WORKBOOK], [f"this is {WORKBOOK}", "as CSV"]),
])  # fmt: skip
def test_a_panel_without_genes(tmp_path, content, words):
    make_root(tmp_path)
    panel = tmp_path / "panel.csv"
    panel.write_bytes(content)
    options = {"data_root": tmp_path, "target": "lognorm", "panel": panel}
    expect_refusal(["panel.csv", *words], "19", **options)
    assert not (tmp_path / "dataset").exists()


def test_a_dataset_that_19_exchanges_while_it_is_read_is_refused(simulated, tmp_path, monkeypatch):
    shutil.copytree(simulated / "dataset", tmp_path / "dataset")
    meta = tmp_path / "dataset" / "meta.json"
    read = common.map_array

    def exchange(path):
        meta.write_bytes(meta.read_bytes() + b"\n")
        return read(path)

    monkeypatch.setattr(common, "map_array", exchange)
    with refused("dataset: made anew in this moment"):
        common.load_dataset(tmp_path, "lognorm")


@pytest.mark.parametrize(
    "name", ["patches.npy", "counts.h5ad", "meta.json", "lognorm.npy", "target.npy"]
)
@pytest.mark.parametrize("spoil", [cut, without])
def test_a_damaged_dataset_names_the_command(simulated, tmp_path, name, spoil):
    shutil.copytree(simulated / "dataset", tmp_path / "dataset")
    spoil(name)(tmp_path / "dataset")
    with refused("19_make_patches_and_csv.py --data-root"):
        common.load_dataset(tmp_path, "harmony")


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_results_cannot_go_into_a_file(simulated, tmp_path, out):
    (tmp_path / "file").write_text("mine")
    options = TINY | {"data_root": simulated, "out": tmp_path / out}
    expect_refusal([out, "no folder to write to"], "20", **options)
    assert (tmp_path / "file").read_text() == "mine"


def test_harmony_over_a_lognorm_dataset_names_the_command(tmp_path):
    make_root(tmp_path)
    assert run_script("19", data_root=tmp_path, target="lognorm") == 0
    command = f"19_make_patches_and_csv.py --data-root {tmp_path} --target harmony"
    options = TINY | {"data_root": tmp_path, "target": "harmony"}
    expect_refusal(["lognorm", command], "20", **options)


def test_gene_sets_csv_with_other_columns_names_the_line():
    with pytest.raises(InputError, match=r"gene_sets\.csv, line 1: .* group, gene"):
        inputs.parse_gene_sets("set,gene\nHEG,ALB\n", "gene_sets.csv")


def test_pretrained_weights_without_a_network_name_the_way_out(simulated, tmp_path, monkeypatch):
    from huggingface_hub import constants

    # As HF_HUB_OFFLINE=1 does: the client would retry for a minute.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    options = TINY | {"data_root": simulated, "out": tmp_path / "out", "pretrained": True}
    expect_refusal(["efficientnet_b0", "--pretrained false"], "20", **options)


def test_slides_are_not_simulated_over_others(simulated):
    expect_refusal(["slides.csv", "--data-root"], "18", data_root=simulated)


def test_help_lists_every_constant_with_its_comment():
    text = stdout_of("20", "--help")
    for words in ("--learning-rate", "[0.0003]", "average predictions over the 8 symmetries"):
        assert words in text


# ---------------------------------------------------------------------------------------------- odd, and legal


def make_dataset(root):
    assert run_script("19", data_root=root, target="lognorm") == 0
    return common.load_dataset(root, "lognorm")


def test_swapped_row_and_column_are_warned_of(tmp_path):
    """A tissue much wider than high, on a square image, in which every spot stays when swapped."""
    rows, cols = (part.ravel() for part in np.mgrid[0:3, 0:12])
    spots = pd.DataFrame({"barcode": [f"S{i}" for i in range(36)], "in_tissue": 1})
    spots["array_row"], spots["array_col"] = rows, cols
    spots["pxl_row"], spots["pxl_col"] = 300 + 200 * rows, 200 + 230 * cols
    image = np.full((3000, 3000, 3), 235, np.uint8)
    image[100:1000] = np.random.default_rng(0).integers(0, (200, 80, 160), (900, 3000, 3))
    tifffile.imwrite(tmp_path / "slide.tif", image, photometric="rgb")
    counts = np.random.default_rng(1).integers(1, 9, (36, 12))
    write_slide(tmp_path, "slide.tif", spots, counts, [f"G{g}" for g in range(12)])
    swapped = spots.rename(columns={"pxl_row": "pxl_col", "pxl_col": "pxl_row"})[spots.columns]
    mirrored = spots.assign(array_col=11 - spots["array_col"])  # as scanned: no mistake
    told = "positions1.csv: pxl_row and pxl_col look swapped"
    edit_manifest(tmp_path, um_per_px=1.0)  # 200 um, as a square grid of ST has
    for table, warning in ((spots, ""), (swapped, told), (mirrored, "")):
        table.to_csv(tmp_path / "positions1.csv", header=False, index=False)
        printed = stdout_of("19", data_root=tmp_path, target="lognorm")
        assert warning in printed and ("warning" in printed) == bool(warning)


@pytest.mark.parametrize("kind", ["TIFF", "JPEG", "PNG"])
def test_a_grey_image_is_repeated_in_three_channels(tmp_path, kind):
    make_root(tmp_path)
    Image.fromarray(picture()[..., 0]).save(tmp_path / "slide.tif", kind)
    patches = make_dataset(tmp_path).patches.numpy()
    assert (patches == patches[..., :1]).all() and len(np.unique(patches)) > 9


def test_a_link_inside_the_data_root_may_lead_elsewhere(tmp_path):
    (tmp_path / "root").mkdir()
    make_root(tmp_path / "root")
    expected = make_dataset(tmp_path / "root").patches.clone()
    (tmp_path / "root" / "slide.tif").rename(tmp_path / "elsewhere.tif")
    (tmp_path / "root" / "slide.tif").symlink_to(tmp_path / "elsewhere.tif")
    assert torch.equal(make_dataset(tmp_path / "root").patches, expected)


def two_slides(root, spots=(7, 7)):
    """A data root with two slides."""
    tifffile.imwrite(root / "slide.tif", picture(), photometric="rgb")
    for slide, n in enumerate(spots, 1):
        counts = np.random.default_rng(slide).integers(20, 90, (n, 12))
        table = spot_table(n, seed=slide)
        write_slide(root, "slide.tif", table, counts, [f"G{i}" for i in range(12)], slide)


def network_on(root, **changed):
    """Options of a small run of 20."""
    options = TINY | AT_RANDOM | {"target": "lognorm", "data_root": root, "out": root / "out"}
    return options | changed


def test_one_slide_alone_is_a_dataset_but_no_experiment(tmp_path):
    make_root(tmp_path)
    assert len(make_dataset(tmp_path).patches) == 7
    expect_refusal(["--valid-fraction", "0 spots"], "20", **network_on(tmp_path, test_slide=1))


def test_of_a_slide_of_one_spot_there_is_a_prediction_and_no_r_or_it_is_refused(tmp_path):
    two_slides(tmp_path, spots=(9, 1))
    assert make_dataset(tmp_path).annotations.var["ceiling_2"].isna().all()
    rows = rows_of(stdout_of("20", **network_on(tmp_path, test_slide=2)))
    (row,) = [row for row in rows if is_tested(row)]
    assert row["n_spots"] == 1 and row["heg"] is None and row["heg_n"] == 0
    assert np.isfinite(row["mse"])
    words = ["--valid-fraction 0.2", "1 spots"]
    expect_refusal(words, "20", **network_on(tmp_path, test_slide=1, out=tmp_path / "other"))


def is_tested(row):
    return (row["setting"], row["split"]) == ("EfficientNet-B0", "test")


def test_gene_sets_with_unknown_genes_an_empty_group_and_fewer_than_fifty_genes(tmp_path):
    two_slides(tmp_path)
    data = make_dataset(tmp_path)
    (tmp_path / "gene_sets.csv").write_text("group,gene\nHEG,G1\nHEG,NOVEL\nHVG,G2\n")
    groups = panels.choose_gene_groups(data, np.arange(7), published=True)
    members = splitting.Split(data, np.full(7, "train"), groups, 42).members
    assert (members["heg"], members["hvg"], members["mg"]) == (["G1"], ["G2"], [])
    printed = stdout_of("20", **network_on(tmp_path, test_slide=2))
    assert "gene groups training spots" in printed, "published lists go with harmony"
    (row,) = [row for row in rows_of(printed) if is_tested(row)]
    assert row["heg_n"] == row["hvg_n"] == 12 and row["mg_n"] == 0 and row["mg"] is None


# ---------------------------------------------------------------------------------------------- fuzzed
CHECKED = [HealthCheck.function_scoped_fixture]
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=CHECKED)
ODD = ["1", "0", "-1", "1e9", "1e400", "nan", "", "A0-1", "slide.tif", "matrix1", "..", '"']
CELL = st.one_of(st.sampled_from(ODD), st.text(max_size=6))


def spoilt(whole):
    """Strategy: a file's bytes with a piece replaced, a table of odd cells, or anything at all."""

    def replace(edit):
        at, length, piece = edit
        return whole[:at] + piece + whole[at + length :]

    def join(rows):
        return "\n".join(",".join(row) for row in rows).encode("utf-8", "surrogatepass")

    edits = st.tuples(st.integers(0, len(whole)), st.integers(0, 40), st.binary(max_size=20))
    replaced = edits.map(replace)
    table = st.lists(st.lists(CELL, max_size=8), max_size=6).map(join)
    under_header = table.map(lambda rows: whole.split(b"\n")[0] + b"\n" + rows)
    return st.one_of(replaced, table, under_header, st.binary(max_size=60))


@pytest.fixture(scope="module")
def whole_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    make_root(root)
    (root / "gene_sets.csv").write_text("group,gene\nHEG,G1\nHVG,G2\nMG,G3\n")
    return root


READERS = {
    "slides.csv": lambda root: read_manifest(root),
    "positions1.csv": lambda root: read_positions(root / "positions1.csv"),
    "matrix1/matrix.mtx": lambda root: read_checked(root / "matrix1"),
    "matrix1/barcodes.tsv": lambda root: read_checked(root / "matrix1"),
    "matrix1/features.tsv": lambda root: read_checked(root / "matrix1"),
    "gene_sets.csv": lambda root: panels.choose_gene_groups(
        SimpleNamespace(root=root, lognorm=np.eye(3, dtype=np.float32), genes=["G1", "G2", "G3"]),
        [0, 1],
        True,
    ),
}


def read_checked(folder):
    table = read_matrix(folder)
    check_counts(table, folder)


@pytest.mark.parametrize("name", READERS)
def test_readers_raise_nothing_but_input_errors(whole_root, name):
    path = whole_root / name
    whole = path.read_bytes()

    @FUZZ
    @given(spoilt(whole))
    def read(content):
        path.write_bytes(content)
        with suppress(InputError):
            READERS[name](whole_root)

    try:
        READERS[name](whole_root)
        read()
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("given", ["", "results"])
def test_results_of_another_data_root_stay(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    one, other = tmp_path / "a" / "slides", tmp_path / "b" / "slides"
    one.mkdir(parents=True)
    other.mkdir(parents=True)
    script = {"__file__": "20_train.py", "OUT": given}
    out = runs.choose_out(script, one)
    out.mkdir(parents=True)
    (out / "run.json").write_text(json.dumps({"data_root": str(one)}))
    assert runs.choose_out(script, one) == out
    with refused("--out"):
        runs.choose_out(script, other)


@pytest.mark.parametrize("quick", [{"quick": True}, {"QUICK": True}])
def test_the_best_recipe_does_not_start_from_the_quick_budgets_random_weights(quick):
    expect_refusal(["--recipe best", "--quick"], "20", recipe="best", **quick)


@pytest.mark.parametrize("kind", OTHER_KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_file_of_another_kind_under_the_name_of_a_table_is_named(tmp_path, kind, packed):
    content = OTHER_KINDS[kind]
    path = tmp_path / "table.csv"
    path.write_bytes(gzip.compress(content) if packed else content)
    for read in (inputs.split_cells, inputs.read_dense_table):
        with refused(f"table.csv: this is {kind}", "as CSV"):
            read(path)
