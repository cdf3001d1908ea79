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
from conftest import TINY, TINY_SEARCH, flags_of, run_script, write_slide
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_patches import HEIGHT, WIDTH, make_root, picture, spot_table

import common
from slides import inputs, readers
from study import runs, shell
from study.shell import InputError


def edit_manifest(root, **values):
    table = pd.read_csv(root / "slides.csv").astype(object)
    for column, value in values.items():
        table[column] = value
    table.to_csv(root / "slides.csv", index=False)


def truncate(path, keep=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])


def tiles_lzw(path, image):
    tifffile.imwrite(path, image, photometric="rgb", tile=(128, 128), compression="lzw")


def replace_image(root, write):
    write(root / "slide.tif")


def write_text(path, text):
    path.write_text(text)


def write_bytes(path, content):
    path.write_bytes(content)


def append_positions(root, change):
    spots = spot_table()
    change(spots).to_csv(root / "positions1.csv", header=False, index=False)


def spoil_count(root, value):
    """The first count of matrix.mtx becomes another number."""
    keep_counts(root, lambda lines: [" ".join([*lines[0].split()[:2], value]), *lines[1:]], "real")


def keep_counts(root, change, kind="integer"):
    """Rewrite the entries "gene spot count" of matrix.mtx."""
    path = root / "matrix1" / "matrix.mtx"
    lines = [line for line in path.read_text().splitlines() if not line.startswith("%")]
    entries = change(lines[1:])
    head = [
        f"%%MatrixMarket matrix coordinate {kind} general",
        " ".join([*lines[0].split()[:2], str(len(entries))]),
    ]
    path.write_text("\n".join([*head, *entries]) + "\n")


# name: (what is spoilt, words that the message must hold)
CASES = {
    "no manifest": (lambda r: (r / "slides.csv").unlink(), ["slides.csv", "17_download_data.py"]),
    "empty manifest": (lambda r: write_text(r / "slides.csv", ""), ["slides.csv"]),
    "manifest without a column": (
        lambda r: write_text(r / "slides.csv", "tissue_index,name\n1,A\n"),
        ["slides.csv", "donor"],
    ),
    "manifest with one slide twice": (
        lambda r: write_text(
            r / "slides.csv",
            "".join(
                [
                    (r / "slides.csv").read_text(),
                    (r / "slides.csv").read_text().split("\n")[1],
                    "\n",
                ]
            ),
        ),
        ["slides.csv", "tissue_index"],
    ),
    "missing slide": (
        lambda r: (r / "slide.tif").unlink(),
        ["slides.csv", "slide.tif", "does not exist"],
    ),
    "path out of the data root": (
        lambda r: edit_manifest(r, image="../slide.tif"),
        ["../slide.tif", "outside"],
    ),
    "matrix without positions": (
        lambda r: edit_manifest(r, positions=np.nan),
        ["slides.csv", "slide 1 has a matrix and no positions"],
    ),
    "slide without an image": (
        lambda r: edit_manifest(r, image=np.nan),
        ["slides.csv", "slide 1 has no image"],
    ),
    "um_per_px of zero": (lambda r: edit_manifest(r, um_per_px=0), ["um_per_px"]),
    "truncated contiguous TIFF": (
        lambda r: truncate(r / "slide.tif"),
        ["slide.tif", "truncated", "fetch it again"],
    ),
    "truncated tiled TIFF": (
        lambda r: (tiles_lzw(r / "slide.tif", picture()), truncate(r / "slide.tif", 0.9)),
        ["slide.tif", "fetch"],
    ),
    "corrupt tile": (
        lambda r: (
            tifffile.imwrite(
                r / "slide.tif", picture(), photometric="rgb", tile=(128, 128), compression="zlib"
            ),
            (r / "slide.tif").write_bytes(
                b"".join(
                    [
                        (r / "slide.tif").read_bytes()[:3000],
                        b"\xff" * 60_000,
                        (r / "slide.tif").read_bytes()[63_000:],
                    ]
                )
            ),
        ),
        ["slide.tif"],
    ),
    "text for an image": (
        lambda r: write_text(r / "slide.tif", "not an image"),
        ["slide.tif", "not a readable image"],
    ),
    "empty image file": (lambda r: write_text(r / "slide.tif", ""), ["slide.tif"]),
    "truncated JPEG": (
        lambda r: (
            Image.fromarray(picture()).save(r / "slide.tif", "JPEG"),
            truncate(r / "slide.tif"),
        ),
        ["slide.tif", "the JPEG has no end"],
    ),
    "16-bit image": (
        lambda r: replace_image(
            r, lambda p: tifffile.imwrite(p, picture().astype(np.uint16), photometric="rgb")
        ),
        ["slide.tif", "uint16", "8-bit"],
    ),
    "palette TIFF": (
        lambda r: replace_image(
            r,
            lambda p: tifffile.imwrite(
                p, picture()[..., 0], photometric="palette", colormap=np.zeros((3, 256), np.uint16)
            ),
        ),
        ["slide.tif", "PALETTE", "RGB"],
    ),
    "spot outside the image": (
        lambda r: append_positions(r, lambda t: t.assign(pxl_row=t["pxl_row"] + HEIGHT)),
        ["slide.tif", "outside the image", f"{HEIGHT} x {WIDTH}"],
    ),
    "position that is no number": (
        lambda r: append_positions(
            r, lambda t: t.assign(pxl_col=["x"] + t["pxl_col"].tolist()[1:])
        ),
        ["positions1.csv", "A0-1"],
    ),
    "barcode twice": (
        lambda r: append_positions(r, lambda t: pd.concat([t, t[:1]])),
        ["positions1.csv", "A0-1", "twice"],
    ),
    "positions with five columns": (
        lambda r: append_positions(r, lambda t: t.drop(columns="in_tissue")),
        ["positions1.csv", "5 columns"],
    ),
    "most barcodes without a position": (
        lambda r: append_positions(r, lambda t: t[4:]),
        ["positions1.csv", "A0-1", "4 of 7", "not of one slide"],
    ),
    "positions whose columns are unknown": (
        lambda r: write_text(r / "positions1.csv", "spot_x,spot_y,other\nA0-1,3,4\n"),
        ["positions1.csv", "spot_x, spot_y, other", "not known"],
    ),
    "positions with x and y": (
        lambda r: (
            spot_table()
            .rename(columns={"pxl_row": "y", "pxl_col": "x"})
            .to_csv(r / "positions1.csv", index=False)
        ),
        ["positions1.csv", "pxl_row", "y, x"],
    ),
    "in_tissue of two": (
        lambda r: append_positions(r, lambda t: t.assign(in_tissue=2)),
        ["positions1.csv", "A0-1", "in_tissue", "0 or 1"],
    ),
    "a slide without a donor": (
        lambda r: edit_manifest(r, donor=np.nan),
        ["slides.csv", "S1", "no donor"],
    ),
    "no slide in the manifest": (
        lambda r: write_text(r / "slides.csv", ",".join(readers.MANIFEST) + "\n"),
        ["slides.csv", "tissue_index"],
    ),
    "no matrix in the folder": (
        lambda r: (r / "matrix1/matrix.mtx").unlink(),
        ["matrix.mtx", "matrix1"],
    ),
    "matrix whose shape disagrees with its barcodes": (
        lambda r: write_text(r / "matrix1/barcodes.tsv", "A0-1\nC1-1\n"),
        ["matrix.mtx", "12 genes x 7 spots", "2 barcodes"],
    ),
    "truncated matrix": (lambda r: truncate(r / "matrix1/matrix.mtx"), ["matrix.mtx", "whole"]),
    "negative counts": (
        lambda r: write_text(
            r / "matrix1/matrix.mtx",
            (r / "matrix1/matrix.mtx").read_text().replace("\n1 1 ", "\n1 1 -"),
        ),
        ["matrix1", "no counts"],
    ),
    "no h5": (
        lambda r: (write_text(r / "m.h5", "text"), edit_manifest(r, matrix="m.h5")),
        ["m.h5", "10x"],
    ),
    "two grey pages of one size": (
        lambda r: replace_image(
            r, lambda p: tifffile.imwrite(p, picture()[..., :2].transpose(2, 0, 1))
        ),
        ["slide.tif", "2 images of one size", "export"],
    ),
    "CMYK": (
        lambda r: replace_image(
            r, lambda p: Image.fromarray(picture()).convert("CMYK").save(p, "TIFF")
        ),
        ["slide.tif", "SEPARATED"],
    ),
    "cut within the TIFF header": (
        lambda r: write_bytes(r / "slide.tif", (r / "slide.tif").read_bytes()[:6]),
        ["slide.tif"],
    ),
    "a folder for an image": (
        lambda r: edit_manifest(r, image="matrix1"),
        ["matrix1", "does not exist"],
    ),
    "empty barcodes": (lambda r: write_text(r / "matrix1/barcodes.tsv", ""), ["barcodes.tsv"]),
    "ragged features": (
        lambda r: write_text(r / "matrix1/features.tsv", "a\nb\tc\td\te\n"),
        ["features.tsv"],
    ),
    "corrupt gzip": (
        lambda r: (
            (r / "matrix1/matrix.mtx").unlink(),
            write_bytes(r / "matrix1/matrix.mtx.gz", gzip.compress(b"x" * 99)[:-12] + b"no" * 9),
        ),
        ["matrix.mtx.gz"],
    ),
    "two slides of one name": (
        lambda r: write_text(
            r / "slides.csv",
            (r / "slides.csv").read_text()
            + (r / "slides.csv").read_text().split("\n")[1].replace("1,", "2,", 1)
            + "\n",
        ),
        ["slides.csv", "name"],
    ),
    "a position of NaN": (
        lambda r: append_positions(
            r, lambda t: t.assign(pxl_col=[np.nan] + t["pxl_col"].tolist()[1:])
        ),
        ["positions1.csv", "A0-1", "not a number"],
    ),
    "row and column swapped, out of the image": (
        lambda r: append_positions(
            r,
            lambda t: t.assign(
                pxl_row=[WIDTH - 9, *t["pxl_col"][1:]], pxl_col=[9, *(t["pxl_row"][1:])]
            ),
        ),
        ["slide.tif", "A0-1", "pxl_row and pxl_col swapped"],
    ),
    "a zero byte in the matrix": (
        lambda r: keep_counts(r, lambda lines: [*lines[:-1], lines[-1] + "\0"]),
        ["matrix.mtx", "zero byte", "fetch it again"],
    ),
    "a count beyond all numbers": (
        lambda r: keep_counts(r, lambda lines: [lines[0] + "0" * 30, *lines[1:]]),
        ["matrix.mtx", "out of range"],
    ),
    "NaN counts": (lambda r: spoil_count(r, "nan"), ["matrix1", "no counts"]),
    "fractional counts": (lambda r: spoil_count(r, "1.5"), ["matrix1", "no counts", "raw counts"]),
    "infinite counts": (lambda r: spoil_count(r, "inf"), ["matrix1", "no counts"]),
    "all counts zero": (
        lambda r: keep_counts(r, lambda lines: []),
        ["matrix1", "no spot has a count"],
    ),
    "a barcode twice in the matrix": (
        lambda r: write_text(
            r / "matrix1/barcodes.tsv",
            (r / "matrix1/barcodes.tsv").read_text().replace("C1-1", "A0-1"),
        ),
        ["matrix1", "A0-1", "twice"],
    ),
    "a gene id twice": (
        lambda r: write_text(
            r / "matrix1/features.tsv",
            "".join([(r / "matrix1/features.tsv").read_text().split("\n")[0] + "\n"] * 12),
        ),
        ["matrix1", "gene id", "twice"],
    ),
    "a gene called as a column": (
        lambda r: write_text(
            r / "matrix1/features.tsv",
            "".join(f"I{g}\t{'barcode' if g == 3 else g}\tGene Expression\n" for g in range(12)),
        ),
        ["'barcode'", "rename it"],
    ),
    "um_per_px that is no number": (lambda r: edit_manifest(r, um_per_px="half"), ["um_per_px"]),
    "tissue_index that is no number": (
        lambda r: edit_manifest(r, tissue_index="first"),
        ["tissue_index"],
    ),
    "an absolute path": (
        lambda r: edit_manifest(r, image="/etc/hostname"),
        ["/etc/hostname", "outside"],
    ),
    "pixels as floats": (
        lambda r: replace_image(
            r, lambda p: tifffile.imwrite(p, picture().astype(np.float32), photometric="rgb")
        ),
        ["slide.tif", "float32", "8-bit"],
    ),
    "16-bit PNG": (
        lambda r: replace_image(
            r, lambda p: Image.fromarray(picture()[..., 0].astype(np.uint16) * 257).save(p, "PNG")
        ),
        ["slide.tif", "I;16", "8-bit"],
    ),
    "palette PNG": (
        lambda r: replace_image(
            r, lambda p: Image.fromarray(picture()).quantize(16).save(p, "PNG")
        ),
        ["slide.tif", "P image", "8-bit"],
    ),
    "one-bit image": (
        lambda r: replace_image(
            r, lambda p: tifffile.imwrite(p, picture()[..., 0] > 99, photometric="minisblack")
        ),
        ["slide.tif", "bool", "8-bit"],
    ),
    "one slide for harmony": (lambda r: None, ["harmony", "--target lognorm"]),
}


@pytest.mark.parametrize("case", CASES)
def test_script_19_refuses(tmp_path, case, capsys):
    spoil, words = CASES[case]
    make_root(tmp_path)
    assert run_script("19", "--data-root", tmp_path, "--target", "lognorm") == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "dataset").iterdir()}
    capsys.readouterr()
    spoil(tmp_path)
    target = "harmony" if "harmony" in case else "lognorm"
    assert run_script("19", "--data-root", tmp_path, "--target", target) == 2
    check_one_line(capsys, words)
    assert {path.name: path.read_bytes() for path in (tmp_path / "dataset").iterdir()} == before, (
        "the old one is whole"
    )
    assert not list(tmp_path.glob("dataset/.new")) and not list(tmp_path.glob("dataset/.partial*"))


def check_one_line(capsys, words):
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    for word in words:
        assert word in error, (word, error)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--epoch", "3", "--nonsense"], ["--epoch", "--nonsense", "--help"]),
        (["--nonsense", "3"], ["--nonsense", "--help"]),
        (["--epochs", "three"], ["--epochs", "invalid int value: 'three'"]),
        (["--epochs", "0"], ["--epochs 0", "needs --head-start ridge"]),
        (["--epochs"], ["--epochs"]),
        (["--batch-size", "1"], ["--batch-size 1", "from 2"]),
        (["--target", "raw"], ["--target raw", "harmony, lognorm"]),
        (["--tta", "no"], ["--tta", "invalid bool value: 'no'"]),
        (["--pretrained", "no"], ["--pretrained no", "no such file or folder", "true, false"]),
        (["--train-slides", "1,x"], ["--train-slides", "invalid tuple value: '1,x'"]),
        (["--train-slides", "1,3"], ["slide 3", "TRAIN_SLIDES"]),
        (["--test-slide", "9"], ["slide 9", "[1 2 3 4]"]),
        (["--valid-fraction", "0"], ["--valid-fraction 0.0"]),
        (["--valid-fraction", "1.5"], ["--valid-fraction 1.5"]),
        (["--backbone", "efficientnet_b00"], ["efficientnet_b00", "timm"]),
        (["--backbone", "efficientnet_b0.zzz"], ["efficientnet_b0.zzz", "timm"]),
        (["--seeds", ""], ["--seeds"]),
        (["--device", "tpu"], ["--device tpu"]),
        (["--protocol", "block"], ["--protocol block", "--target lognorm"]),
        (
            ["--protocol", "loso", "--target", "lognorm", "--train-slides", "1,2"],
            ["slide 1", "two are needed"],
        ),
        (["--protocol", "random"], ["--protocol random", "paper, loso, block"]),
        (["--trainable-stages", "10"], ["TRAINABLE_STAGES 10", "9 stages"]),
        (["--trainable-stages", "-2"], ["--trainable-stages -2", "from -1"]),
        (["--data-root", "nowhere"], ["nowhere", "19_make_patches_and_csv.py --data-root nowhere"]),
    ],
)
def test_script_20_refuses(simulated, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert (
        run_script(
            "20", "--data-root", simulated, "--out", tmp_path / "out", *flags_of(TINY), *arguments
        )
        == 2
    )
    check_one_line(capsys, words)
    assert {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()} <= {".lock"}


OTHERS = [
    ("17", ["--dataset", "GSE1"], ["--dataset GSE1", "GSE240429, HER2ST"]),
    ("17", ["--source", "http://example.org"], ["http://example.org", "https"]),
    ("18", ["--spots", "1"], ["--spots 1", "from 2"]),
    ("18", ["--slides", "0"], ["--slides 0", "from 1"]),
    ("19", ["--hvg-per-slide", "0"], ["--hvg-per-slide 0", "from 1"]),
    ("19", ["--seed", "x"], ["--seed", "invalid int value: 'x'"]),
    ("19", ["--um-per-px", "nan"], ["--um-per-px nan", "from 0"]),
    ("19", ["--um-per-px", "-0.5"], ["--um-per-px -0.5", "from 0"]),
    ("21", ["--only", "resnet5"], ["--only resnet5", "resnet50"]),
    ("22", ["--folds", "1"], ["--folds 1", "from 2"]),
    ("22", ["--folds", "99"], ["too few", "fewer folds"]),
    ("22", ["--views", "-1"], ["--views -1", "from 0"]),
    ("23", ["--only", "blur"], ["--only blur", "stnet_color"]),
    ("23", ["--seeds", "1.5"], ["--seeds", "invalid tuple value"]),
    ("24", ["--min-cluster", "2"], ["--min-cluster 2.0", "from 0 to 1"]),
    ("25", ["--micro-batch", "2"], ["--micro-batch 2", "from 3"]),
]


@pytest.mark.parametrize("script, arguments, words", OTHERS)
def test_the_other_scripts_refuse(
    simulated, tmp_path, monkeypatch, capsys, script, arguments, words
):
    monkeypatch.chdir(tmp_path)
    options = {}
    if script > "17":
        options = {"data_root": tmp_path}
    if script > "20":
        options = TINY | {"data_root": simulated}
    if script == "22":  # which has no HIDDEN
        options = TINY_SEARCH | {"data_root": simulated}
    assert run_script(script, *flags_of(options), *arguments) == 2
    check_one_line(capsys, words)
    assert not list(tmp_path.rglob("rows.json")) and not (tmp_path / "slides.csv").exists()


def test_spots_without_counts_are_left_out_and_said(tmp_path, capsys):
    make_root(tmp_path)
    keep_counts(tmp_path, lambda lines: [line for line in lines if line.split()[1] != "3"])
    assert run_script("19", "--data-root", tmp_path, "--target", "lognorm") == 0
    assert "slide 1: 1 spots without counts are left out" in capsys.readouterr().out
    assert len(common.load_dataset(tmp_path, "lognorm").spots) == 6


@pytest.mark.parametrize("content, words", [("", ["panel.csv"]), ("gene\n", ["panel.csv", "names no gene"]),
                                            ("gene\nNONE\n", ["panel.csv", "hold none", "NONE"])])  # fmt: skip
def test_a_panel_without_genes(tmp_path, capsys, content, words):
    make_root(tmp_path)
    write_text(tmp_path / "panel.csv", content)
    assert (
        run_script(
            "19", "--data-root", tmp_path, "--target", "lognorm", "--panel", tmp_path / "panel.csv"
        )
        == 2
    )
    check_one_line(capsys, words)
    assert not (tmp_path / "dataset").exists()


def test_positions_without_tissue(tmp_path, capsys):
    make_root(tmp_path)
    append_positions(tmp_path, lambda t: t.assign(in_tissue=0))
    edit_manifest(tmp_path, matrix=np.nan)
    assert run_script("19", "--data-root", tmp_path, "--target", "lognorm") == 2
    check_one_line(capsys, ["positions1.csv", "no spot is in_tissue"])


@pytest.mark.parametrize(
    "name", ["patches.npy", "counts.h5ad", "meta.json", "lognorm.npy", "target.npy"]
)
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_dataset_names_the_command(simulated, tmp_path, name, damage):
    shutil.copytree(simulated / "dataset", tmp_path / "dataset")
    path = tmp_path / "dataset" / name
    if damage == "cut":
        write_bytes(path, path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.unlink()
    with pytest.raises(shell.InputError, match=r"19_make_patches_and_csv\.py --data-root"):
        common.load_dataset(tmp_path, "harmony")


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_results_cannot_go_into_a_file(simulated, tmp_path, capsys, out):
    write_text(tmp_path / "file", "mine")
    assert run_script("20", "--data-root", simulated, "--out", tmp_path / out, *flags_of(TINY)) == 2
    check_one_line(capsys, [out, "no folder to write to"])
    assert (tmp_path / "file").read_text() == "mine"


def test_harmony_over_a_lognorm_dataset_names_the_command(tmp_path, capsys):
    make_root(tmp_path)
    assert run_script("19", "--data-root", tmp_path, "--target", "lognorm") == 0
    capsys.readouterr()
    assert run_script("20", "--data-root", tmp_path, "--target", "harmony", *flags_of(TINY)) == 2
    check_one_line(
        capsys, ["lognorm", f"19_make_patches_and_csv.py --data-root {tmp_path} --target harmony"]
    )


@pytest.mark.parametrize(
    "text, line",
    [("set,gene\nHEG,ALB\n", 1), ("group,gene\nHEG,ALB\n\nHEG\n", 4), ("group,gene\n,ALB\n", 2)],
)
def test_gene_sets_csv_with_other_columns_names_the_line(tmp_path, text, line):
    (tmp_path / "gene_sets.csv").write_text(text)
    with pytest.raises(shell.InputError, match=f"gene_sets.csv, line {line}: .* group, gene"):
        common.read_gene_sets(tmp_path / "gene_sets.csv")


def test_pretrained_weights_without_a_network_name_the_way_out(
    simulated, tmp_path, monkeypatch, capsys
):
    from huggingface_hub import constants

    monkeypatch.setattr(
        constants, "HF_HUB_OFFLINE", True
    )  # as HF_HUB_OFFLINE=1 does: the client would retry for a minute
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert (
        run_script(
            "20",
            "--data-root",
            simulated,
            "--out",
            tmp_path / "out",
            *flags_of(TINY),
            "--pretrained",
            "true",
        )
        == 2
    )
    check_one_line(capsys, ["efficientnet_b0", "--pretrained false"])


def test_slides_are_not_simulated_over_others(simulated, capsys):
    assert run_script("18", "--data-root", simulated) == 2
    check_one_line(capsys, ["slides.csv", "--data-root"])


def test_geometry_without_positions(tmp_path, capsys):
    assert run_script("18", "--data-root", tmp_path / "new", "--geometry", tmp_path) == 2
    check_one_line(capsys, ["tissue_positions_list_1.csv"])


def test_help_lists_every_constant_with_its_comment(capsys):
    assert run_script("20", "--help") == 0
    text = capsys.readouterr().out
    assert (
        "--learning-rate" in text
        and "[0.0003]" in text
        and "average predictions over the 8 symmetries" in text
    )


# ---------------------------------------------------------------------------------------------- odd, and legal


def make_dataset(root, *arguments):
    assert run_script("19", "--data-root", root, "--target", "lognorm", *arguments) == 0
    return common.load_dataset(root, "lognorm")


def test_swapped_row_and_column_are_warned_of(tmp_path, capsys):
    """A tissue much wider than high, on a square image, in which every spot stays when swapped."""
    rows, cols = (part.ravel() for part in np.mgrid[0:3, 0:12])
    spots = pd.DataFrame(
        {
            "barcode": [f"S{i}" for i in range(36)],
            "in_tissue": 1,
            "array_row": rows,
            "array_col": cols,
        }
    )
    spots["pxl_row"], spots["pxl_col"] = 300 + 200 * rows, 200 + 230 * cols
    image = np.full((3000, 3000, 3), 235, np.uint8)
    image[100:1000] = np.random.default_rng(0).integers(0, (200, 80, 160), (900, 3000, 3))
    tifffile.imwrite(tmp_path / "slide.tif", image, photometric="rgb")
    counts = np.random.default_rng(1).integers(1, 9, (36, 12))
    write_slide(tmp_path, "slide.tif", spots, counts, [f"G{g}" for g in range(12)])
    make_dataset(tmp_path)
    assert "warning" not in capsys.readouterr().out
    swapped = spots.rename(columns={"pxl_row": "pxl_col", "pxl_col": "pxl_row"})[spots.columns]
    swapped.to_csv(tmp_path / "positions1.csv", header=False, index=False)
    make_dataset(tmp_path)
    out = capsys.readouterr().out
    assert "positions1.csv: pxl_row and pxl_col look swapped" in out
    mirrored = spots.assign(
        array_col=11 - spots["array_col"]
    )  # an image that was scanned mirrored is no mistake
    mirrored.to_csv(tmp_path / "positions1.csv", header=False, index=False)
    make_dataset(tmp_path)
    assert "warning" not in capsys.readouterr().out


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


def test_of_a_multi_page_tiff_the_first_page_is_read(tmp_path):
    make_root(tmp_path)
    expected = make_dataset(tmp_path).patches.clone()
    with tifffile.TiffWriter(tmp_path / "slide.tif") as tiff:
        tiff.write(picture(), photometric="rgb")
        tiff.write(255 - picture()[::3, ::3], photometric="rgb")  # a label or macro image
    assert torch.equal(make_dataset(tmp_path).patches, expected)


def two_slides(root, spots=(7, 7), genes=(12, 12)):
    """A data root with two slides."""
    tifffile.imwrite(root / "slide.tif", picture(), photometric="rgb")
    for slide, (n, g) in enumerate(zip(spots, genes, strict=True), 1):
        counts = np.random.default_rng(slide).integers(20, 90, (n, g))
        table = spot_table(n, seed=slide)
        write_slide(root, "slide.tif", table, counts, [f"G{i}" for i in range(g)], slide)


def network_of(root, *arguments):
    code = run_script(
        "20",
        "--data-root",
        root,
        "--out",
        root / "out",
        *flags_of(TINY | {"target": "lognorm"}),
        # Behind a head that starts at 0, so few steps leave most predictions constant.
        "--head-start",
        "random",
        *arguments,
    )
    return code, sorted((root / "out").glob("EfficientNet-B0-*/rows.json"))


def test_one_slide_alone_is_a_dataset_but_no_experiment(tmp_path, capsys):
    make_root(tmp_path)
    assert len(make_dataset(tmp_path).patches) == 7
    capsys.readouterr()
    assert network_of(tmp_path, "--test-slide", 1) == (2, [])
    check_one_line(capsys, ["--valid-fraction", "0 spots"])


def test_a_test_slide_of_one_spot_has_a_prediction_and_no_r(tmp_path, capsys):
    two_slides(tmp_path, spots=(9, 1))
    assert make_dataset(tmp_path).annotations.var["ceiling_2"].isna().all()
    code, (rows,) = network_of(tmp_path, "--test-slide", 2)
    row = next(row for row in json.loads(rows.read_text()) if row["split"] == "test")
    assert code == 0 and row["n_spots"] == 1 and row["heg"] is None and row["heg_n"] == 0
    assert np.isfinite(row["mse"])


def test_a_training_slide_of_one_spot_is_refused(tmp_path, capsys):
    two_slides(tmp_path, spots=(9, 1))
    make_dataset(tmp_path)
    capsys.readouterr()
    assert network_of(tmp_path, "--test-slide", 1) == (2, [])
    check_one_line(capsys, ["--valid-fraction 0.2", "1 spots"])


def test_fewer_than_fifty_genes_are_all_of_them(tmp_path, capsys):
    two_slides(tmp_path)
    make_dataset(tmp_path)
    code, (rows,) = network_of(tmp_path, "--test-slide", 2)
    row = json.loads(rows.read_text())[-1]
    assert (
        code == 0 and row["heg_n"] == row["hvg_n"] == 12 and row["mg_n"] == 0 and row["mg"] is None
    )


def test_a_gene_that_one_slide_lacks_has_no_counts_there_and_is_said(tmp_path, capsys):
    two_slides(tmp_path, genes=(12, 9))
    data = make_dataset(tmp_path)
    assert sorted(data.genes) == sorted(f"G{i}" for i in range(12))
    second = (data.spots["tissue_index"] == 2).to_numpy()
    lacking = [data.genes.index(f"G{i}") for i in range(9, 12)]
    assert (data.lognorm[second][:, lacking] == 0).all()
    assert (data.lognorm[~second][:, lacking] > 0).all()
    out = capsys.readouterr().out
    assert "12 genes, 9 of them in every slide" in out
    assert "slide 2 does not list 3 of them: no counts there" in out


def test_gene_sets_with_unknown_genes_and_an_empty_group(tmp_path, capsys):
    two_slides(tmp_path)
    make_dataset(tmp_path)
    (tmp_path / "gene_sets.csv").write_text("group,gene\nHEG,G1\nHEG,NOVEL\nHVG,G2\n")
    data = common.load_dataset(tmp_path, "lognorm")
    groups = common.choose_gene_groups(data, np.arange(7), published=True)
    members = common.members_of(groups, data.genes)
    assert (members["heg"], members["hvg"], members["mg"]) == (["G1"], ["G2"], [])
    code, _ = network_of(tmp_path, "--test-slide", 2)
    assert code == 0
    assert "gene groups training spots" in capsys.readouterr().out, (
        "published lists go with harmony"
    )


# ---------------------------------------------------------------------------------------------- fuzzed
FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
CELL = st.one_of(
    st.sampled_from(
        [
            "1",
            "0",
            "-1",
            "1e9",
            "1e400",
            "nan",
            "",
            "A0-1",
            "slide.tif",
            "positions1.csv",
            "matrix1",
            "..",
            '"',
        ]
    ),
    st.text(max_size=6),
)


def spoilt(whole):
    """Strategy: a file's bytes with a piece replaced, a table of odd cells, or anything at all."""
    at = st.integers(0, len(whole))
    replaced = st.tuples(at, st.integers(0, 40), st.binary(max_size=20)).map(
        lambda edit: whole[: edit[0]] + edit[2] + whole[edit[0] + edit[1] :]
    )
    cells = st.lists(st.lists(CELL, max_size=8), max_size=6)
    table = cells.map(
        lambda rows: "\n".join(",".join(row) for row in rows).encode("utf-8", "surrogatepass")
    )
    under_header = table.map(lambda rows: whole.split(b"\n")[0] + b"\n" + rows)
    return st.one_of(replaced, table, under_header, st.binary(max_size=60))


@pytest.fixture(scope="module")
def whole_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    make_root(root)
    (root / "gene_sets.csv").write_text("group,gene\nHEG,G1\nHVG,G2\nMG,G3\n")
    return root


READERS = {
    "slides.csv": lambda root: readers.read_manifest(root),
    "positions1.csv": lambda root: readers.read_positions(root / "positions1.csv"),
    "matrix1/matrix.mtx": lambda root: read_checked(root / "matrix1"),
    "matrix1/barcodes.tsv": lambda root: read_checked(root / "matrix1"),
    "matrix1/features.tsv": lambda root: read_checked(root / "matrix1"),
    "gene_sets.csv": lambda root: common.choose_gene_groups(
        SimpleNamespace(root=root, lognorm=np.eye(3, dtype=np.float32), genes=["G1", "G2", "G3"]),
        [0, 1],
        True,
    ),
}


def read_checked(folder):
    table = readers.read_matrix(folder)
    readers.check_counts(table, folder)


@pytest.mark.parametrize("name", READERS)
def test_readers_raise_nothing_but_input_errors(whole_root, name):
    path = whole_root / name
    whole = path.read_bytes()

    @FUZZ
    @given(spoilt(whole))
    def read(content):
        path.write_bytes(content)
        with suppress(shell.InputError):
            READERS[name](whole_root)

    try:
        READERS[name](whole_root)
        read()
    finally:
        path.write_bytes(whole)


def test_results_of_another_data_root_of_the_same_name_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, other = tmp_path / "a" / "slides", tmp_path / "b" / "slides"
    one.mkdir(parents=True)
    other.mkdir(parents=True)
    script = {"__file__": "20_train.py"}
    out = runs.choose_out(script, one)
    out.mkdir(parents=True)
    (out / "run.json").write_text(json.dumps({"data_root": str(one)}))
    assert runs.choose_out(script, one) == out
    with pytest.raises(shell.InputError, match="--out"):
        runs.choose_out(script, other)


@pytest.mark.parametrize("quick", [{"quick": True}, {"QUICK": True}])
def test_the_best_recipe_does_not_start_from_the_quick_budgets_random_weights(capsys, quick):
    assert run_script("20", recipe="best", **quick) == 2
    check_one_line(capsys, ["--recipe best", "--quick"])


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


@pytest.mark.parametrize("kind", OTHER_KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_file_of_another_kind_under_the_name_of_a_table_is_named(tmp_path, kind, packed):
    content = OTHER_KINDS[kind]
    path = tmp_path / "table.csv"
    path.write_bytes(gzip.compress(content) if packed else content)
    for read in (inputs.split_cells, inputs.read_dense_table):
        with pytest.raises(InputError) as caught:
            read(path)
        assert f"table.csv: this is {kind}" in str(caught.value)
        assert "as CSV" in str(caught.value)


@pytest.mark.parametrize("flag", ["manifest", "panel", "positions"])
def test_a_workbook_under_the_name_of_a_table_ends_script_19(tmp_path, capsys, flag):
    make_root(tmp_path)
    name = {"manifest": "slides.csv", "panel": "panel.csv", "positions": "positions1.csv"}[flag]
    (tmp_path / name).write_bytes(OTHER_KINDS["an Excel workbook (.xlsx)"])
    options = {"panel": tmp_path / name} if flag == "panel" else {}
    assert run_script("19", data_root=tmp_path, target="lognorm", check=True, **options) == 2
    check_one_line(capsys, [name, "this is an Excel workbook (.xlsx)", "as CSV"])
