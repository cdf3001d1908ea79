"""Bad input: exit code 2, one line that names the file or value and the fix, nothing half-written."""

import gzip

import numpy as np
import pandas as pd
import pytest
import tifffile
from conftest import TINY, run_script
from PIL import Image
from test_patches import HEIGHT, WIDTH, make_root, picture, spot_table


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
            "".join([(r / "slides.csv").read_text(), (r / "slides.csv").read_text().split("\n")[1], "\n"]),
        ),
        ["slides.csv", "tissue_index"],
    ),
    "missing slide": (lambda r: (r / "slide.tif").unlink(), ["slides.csv", "slide.tif", "does not exist"]),
    "path out of the data root": (lambda r: edit_manifest(r, image="../slide.tif"), ["../slide.tif", "outside"]),
    "um_per_px of zero": (lambda r: edit_manifest(r, um_per_px=0), ["um_per_px"]),
    "truncated contiguous TIFF": (lambda r: truncate(r / "slide.tif"), ["slide.tif", "truncated", "fetch it again"]),
    "truncated tiled TIFF": (
        lambda r: (tiles_lzw(r / "slide.tif", picture()), truncate(r / "slide.tif", 0.9)),
        ["slide.tif", "fetch"],
    ),
    "corrupt tile": (
        lambda r: (
            tifffile.imwrite(r / "slide.tif", picture(), photometric="rgb", tile=(128, 128), compression="zlib"),
            (r / "slide.tif").write_bytes(
                b"".join(
                    [(r / "slide.tif").read_bytes()[:3000], b"\xff" * 60_000, (r / "slide.tif").read_bytes()[63_000:]]
                )
            ),
        ),
        ["slide.tif"],
    ),
    "text for an image": (lambda r: write_text(r / "slide.tif", "not an image"), ["slide.tif", "not a readable image"]),
    "empty image file": (lambda r: write_text(r / "slide.tif", ""), ["slide.tif"]),
    "truncated JPEG": (
        lambda r: (Image.fromarray(picture()).save(r / "slide.tif", "JPEG"), truncate(r / "slide.tif")),
        ["slide.tif", "truncated"],
    ),
    "16-bit image": (
        lambda r: replace_image(r, lambda p: tifffile.imwrite(p, picture().astype(np.uint16), photometric="rgb")),
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
        lambda r: append_positions(r, lambda t: t.assign(pxl_col=["x"] + t["pxl_col"].tolist()[1:])),
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
    "barcode without a position": (
        lambda r: append_positions(r, lambda t: t[1:]),
        ["positions1.csv", "A0-1", "not of one slide"],
    ),
    "no matrix in the folder": (lambda r: (r / "matrix1/matrix.mtx").unlink(), ["matrix.mtx", "matrix1"]),
    "matrix whose shape disagrees with its barcodes": (
        lambda r: write_text(r / "matrix1/barcodes.tsv", "A0-1\nC1-1\n"),
        ["matrix.mtx", "12 genes x 7 spots", "2 barcodes"],
    ),
    "truncated matrix": (lambda r: truncate(r / "matrix1/matrix.mtx"), ["matrix.mtx", "whole"]),
    "negative counts": (
        lambda r: write_text(
            r / "matrix1/matrix.mtx", (r / "matrix1/matrix.mtx").read_text().replace("\n1 1 ", "\n1 1 -")
        ),
        ["matrix1", "no counts"],
    ),
    "no h5": (lambda r: (write_text(r / "m.h5", "text"), edit_manifest(r, matrix="m.h5")), ["m.h5", "10x"]),
    "channels as pages": (
        lambda r: replace_image(
            r, lambda p: tifffile.imwrite(p, picture().transpose(2, 0, 1), photometric="minisblack")
        ),
        ["slide.tif", "pages", "RGB"],
    ),
    "CMYK": (
        lambda r: replace_image(r, lambda p: Image.fromarray(picture()).convert("CMYK").save(p, "TIFF")),
        ["slide.tif", "SEPARATED"],
    ),
    "cut within the TIFF header": (
        lambda r: write_bytes(r / "slide.tif", (r / "slide.tif").read_bytes()[:6]),
        ["slide.tif"],
    ),
    "a folder for an image": (lambda r: edit_manifest(r, image="matrix1"), ["matrix1", "does not exist"]),
    "empty barcodes": (lambda r: write_text(r / "matrix1/barcodes.tsv", ""), ["barcodes.tsv"]),
    "ragged features": (lambda r: write_text(r / "matrix1/features.tsv", "a\nb\tc\td\te\n"), ["features.tsv"]),
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
    assert {path.name: path.read_bytes() for path in (tmp_path / "dataset").iterdir()} == before, "the old one is whole"
    assert not list(tmp_path.glob(".dataset*")) and not list(tmp_path.glob("dataset/.partial*"))


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
        (["--epochs", "0"], ["--epochs 0", "from 1"]),
        (["--epochs"], ["--epochs"]),
        (["--batch-size", "1"], ["--batch-size 1", "from 2"]),
        (["--target", "raw"], ["--target raw", "harmony, lognorm"]),
        (["--pretrained", "no"], ["--pretrained", "invalid bool value: 'no'"]),
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
        (["--protocol", "loso", "--target", "lognorm", "--train-slides", "1,2"], ["slide 1", "two are needed"]),
        (["--protocol", "random"], ["--protocol random", "paper, loso, block"]),
        (["--trainable-stages", "10"], ["TRAINABLE_STAGES 10", "9 stages"]),
        (["--trainable-stages", "-2"], ["--trainable-stages -2", "from -1"]),
        (["--data-root", "nowhere"], ["nowhere", "19_make_patches_and_csv.py --data-root nowhere"]),
    ],
)
def test_script_20_refuses(simulated, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert run_script("20", "--data-root", simulated, "--out", tmp_path / "out", *TINY, *arguments) == 2
    check_one_line(capsys, words)
    assert not (tmp_path / "out").exists()


def test_harmony_over_a_lognorm_dataset_names_the_command(tmp_path, capsys):
    make_root(tmp_path)
    assert run_script("19", "--data-root", tmp_path, "--target", "lognorm") == 0
    capsys.readouterr()
    assert run_script("20", "--data-root", tmp_path, "--target", "harmony", *TINY) == 2
    check_one_line(capsys, ["lognorm", f"19_make_patches_and_csv.py --data-root {tmp_path} --target harmony"])


def test_unknown_group_in_gene_sets(simulated, tmp_path, capsys):
    import shutil

    root = tmp_path / "copy"
    shutil.copytree(simulated / "dataset", root / "dataset")
    (root / "gene_sets.csv").write_text("group,gene\nTOP,ALB\n")
    assert run_script("20", "--data-root", root, "--out", tmp_path / "out", *TINY) == 2
    check_one_line(capsys, ["gene_sets.csv", "HEG, HVG, MG"])


def test_pretrained_weights_without_a_network_name_the_way_out(simulated, tmp_path, monkeypatch, capsys):
    from huggingface_hub import constants

    monkeypatch.setattr(
        constants, "HF_HUB_OFFLINE", True
    )  # as HF_HUB_OFFLINE=1 does: the client would retry for a minute
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert run_script("20", "--data-root", simulated, "--out", tmp_path / "out", *TINY, "--pretrained", "true") == 2
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
    assert "--learning-rate" in text and "[0.0003]" in text and "average predictions over the 8 symmetries" in text
