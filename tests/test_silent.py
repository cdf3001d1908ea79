"""Files that look right and are not: pixels or counts of another place, slide or person. Each is
refused or warned of, by script 19 and by its --check alike.
"""

import gzip
import re
import shlex
import shutil
import struct
import zlib

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import tifffile
from conftest import (
    edit_manifest,
    expect_refusal,
    load_script,
    refused,
    run_script,
    stdout_of,
    write_h5,
    write_matrix,
)
from PIL import Image
from test_files import (
    GENES,
    check_spots,
    make_dataset,
    make_outs,
    make_slides,
    pack,
    paint,
    spot_array,
)
from test_hest import make_anndata, make_h5ad
from test_pixels import write_alpha

import common
from slides import alignment, cutting, hest
from slides.counts import CONTROLS, read_matrix
from slides.manifest import check_manifest, check_sources, read_manifest
from slides.positions import place_spots
from slides.spots import read_spots
from study import hashes
from study.errors import InputError

HEIGHT, WIDTH = 2600, 1800  # of a slide whose lower half is glass


def warnings_of(root, *words, least=1):
    """What 19 and 19 --check warn of on a data root; each holds the words."""
    for check in (False, True):
        printed = stdout_of("19", data_root=root, target="lognorm", check=check)
        lines = [line for line in printed.splitlines() if line.startswith("warning: ")]
        found = [line for line in lines if all(word in line for word in words)]
        assert len(found) >= least, printed
    return lines


def assert_no_warning(root):
    for check in (False, True):
        printed = stdout_of("19", data_root=root, target="lognorm", check=check)
        assert "warning: " not in printed


def assert_refused(root, *words):
    """19 and 19 --check end with 2 and one line that holds the words."""
    for check in (False, True):
        expect_refusal(words, "19", data_root=root, target="lognorm", check=check)


# ------------------------------------------------------------------------------------------- glass
def paint_half(seed):
    """A slide with tissue above and glass, as a camera sees it, below."""
    noise = np.random.default_rng(seed).normal(0, 3, (HEIGHT, WIDTH, 3))
    image = np.clip([244, 240, 246] + noise, 0, 255).astype(np.uint8)
    image[:1300, :1600] = paint(seed, 1300, 1600)
    return image


def lose(colour):
    """A slide of whose lowest row of spots one colour was left."""
    image = paint(1)
    image[1000:] = colour
    return image


GLASS = "of 36 spots lie on glass"
LOST = [f"6 {GLASS}", "6 are of one colour"]
# The image of a slide, and what is warned of.
IMAGES = {
    "as it is": (lambda: paint_half(1), []),
    "turned by 180 degrees": (lambda: paint_half(1)[::-1, ::-1], [GLASS, "180"]),
    "turned by 90 degrees": (lambda: np.rot90(paint_half(1), -1), [GLASS, "90 degrees clockwise"]),
    "mirrored": (lambda: paint_half(1)[::-1], [GLASS, "top to bottom"]),
    "lost, black": (lambda: lose(0), LOST),
    "lost, grey": (lambda: lose(128), LOST),
    "not scanned": (lambda: lose(255), LOST),
    "one channel": (lambda: paint(1)[..., 0], ["no H&E"]),
    "dark": (lambda: paint(1) // 6, ["no H&E"]),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_an_image_that_is_not_as_it_should_be_is_warned_of(tmp_path, kind):
    make_image, words = IMAGES[kind]
    image = make_image()
    make_slides(tmp_path, 1)
    photometric = "rgb" if image.ndim == 3 else "minisblack"
    tifffile.imwrite(tmp_path / "image1.tif", image, photometric=photometric)
    if words:
        warnings_of(tmp_path, "image1.tif", *words)
    else:
        assert_no_warning(tmp_path)


@pytest.mark.parametrize("kind", ["positions", "anndata"])
def test_rows_counted_from_below_are_warned_of(tmp_path, kind):
    make_slides(tmp_path, 1)
    tifffile.imwrite(tmp_path / "image1.tif", paint_half(1), photometric="rgb")
    spots = spot_array()
    spots["pxl_row"] = HEIGHT - 1 - spots["pxl_row"]
    spots.to_csv(tmp_path / "positions1.csv", header=False, index=False)
    if kind == "anndata":
        table = make_anndata()
        table.obsm["spatial"] = spots[["pxl_col", "pxl_row"]].to_numpy()
        table.obs = table.obs[[]]
        table.write_h5ad(tmp_path / "slide1.h5ad")
        edit_manifest(tmp_path, positions="", matrix="slide1.h5ad")
    # The tissue is above on the left, where a turn by 180 degrees brings them as well.
    first = "mirrored top to bottom, or " if kind == "positions" else "180 degrees, or "
    both = ("turned by 180 degrees", "mirrored top to bottom")
    warnings_of(tmp_path, "36 of 36 spots lie on glass", *both, first)


def test_a_few_spots_of_fat_are_counted_and_not_warned_of(tmp_path):
    make_slides(tmp_path, 1)
    image = paint(1)
    noise = np.random.default_rng(0).normal(0, 2, (200, 200, 3))
    image[280:480, 200:400] = np.clip(244 + noise, 0, 255)
    tifffile.imwrite(tmp_path / "image1.tif", image, photometric="rgb")
    for check in (False, True):
        printed = stdout_of("19", data_root=tmp_path, target="lognorm", check=check)
        assert "image1.tif: 1 of 36 spots lie on glass" in printed
        assert "warning: " not in printed


# ------------------------------------------------------------------------------- after script 19
@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    root = make_slides(tmp_path_factory.mktemp("made") / "root")
    make_dataset(root)
    return root


@pytest.fixture
def made(made_once, tmp_path):
    """A data root of two slides of its own, and their dataset."""
    return shutil.copytree(made_once, tmp_path / "root")


@pytest.mark.parametrize("column, value, words", [
    ("donor", "D3", ["donor of slide 1 is D3", "was D1"]),
    ("name", "other", ["name of slide 1 is other"]),
    ("um_per_px", 0.25, ["um_per_px of slide 1 is 0.25"]),
    ("image", "image2.tif", ["image of slide 1 is image2.tif"]),
    ("matrix", "matrix2", ["matrix of slide 1 is matrix2"]),
    ("tissue_index", 7, ["other slides"]),
])  # fmt: skip
def test_a_manifest_that_changed_after_19_is_refused(made, column, value, words):
    before = pd.read_csv(made / "slides.csv")[column]
    edit_manifest(made, **{column: [value, before[0 if value == before[1] else 1]]})
    refuse_training(made, "slides.csv", *words)


def test_a_dataset_that_says_nothing_of_a_task_is_read(made):
    """As an older version of this format wrote it."""
    meta = common.load_dataset(made, "lognorm").meta
    del meta["task"]
    check_sources(made, meta)
    edit_manifest(made, um_per_px=0.6)
    with refused("um_per_px of slide 1 is 0.6"):
        check_sources(made, meta)


@pytest.mark.parametrize("name", ["image2.tif", "positions1.csv", "matrix2/matrix.mtx"])
def test_a_source_that_changed_after_19_is_refused(made, name):
    """Also where it keeps its size."""
    content = (made / name).read_bytes()
    (made / name).write_bytes(content + b"\n")
    refuse_training(made, name, f"{len(content) + 1:,} bytes, and {len(content):,}")
    digits = [place for place, byte in enumerate(content) if byte in b"45"]
    edited = bytearray(content)
    edited[digits[len(digits) // 2]] ^= 1  # 4 and 5
    (made / name).write_bytes(edited)
    refuse_training(made, name, "its content is not as it was")
    (made / name).unlink()  # to spare disk
    common.load_dataset(made, "lognorm")


@pytest.mark.parametrize("name", ["image1.tif", "positions1.csv", "matrix1/matrix.mtx", "panel"])
def test_a_source_that_changes_while_19_runs_is_refused(tmp_path, monkeypatch, name):
    """Else meta.json would describe another file than the patches and counts are of."""
    make_slides(tmp_path, 1)
    (tmp_path / "panel").write_text("gene\nHAL\n")
    cut_spots = cutting.cut_spots

    def change(*arguments, **options):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes())
        return cut_spots(*arguments, **options)

    monkeypatch.setattr(cutting, "cut_spots", change)
    command = {"data_root": tmp_path, "target": "lognorm", "panel": tmp_path / "panel"}
    expect_refusal([name, "changed while it was read"], "19", **command)
    assert not (tmp_path / "dataset").exists()


def test_a_panel_that_changed_after_19_is_refused(tmp_path):
    make_slides(tmp_path)
    path = tmp_path / "panel.csv"
    path.write_text("gene\nHAL\n")
    make_dataset(tmp_path, panel=path)
    meta = common.load_dataset(tmp_path, "lognorm").meta
    check_sources(tmp_path, meta)
    path.write_text("gene\nVWF\n")
    with pytest.raises(InputError, match=r"panel\.csv: its content is not as it was"):
        check_sources(tmp_path, meta)
    path.unlink()
    check_sources(tmp_path, meta)


def test_a_file_that_came_into_the_folder_of_a_matrix_is_refused(tmp_path):
    """A plain matrix.mtx is read in place of a .gz."""
    make_slides(tmp_path)
    packed = pack(tmp_path / "matrix1" / "matrix.mtx")
    make_dataset(tmp_path)
    meta = common.load_dataset(tmp_path, "lognorm").meta
    (tmp_path / "matrix1" / "notes.txt").write_text("of no reader")
    check_sources(tmp_path, meta)
    (tmp_path / "matrix1" / "matrix.mtx").write_bytes(gzip.decompress(packed.read_bytes()))
    with pytest.raises(InputError, match=r"matrix\.mtx: was not there when the dataset was made"):
        check_sources(tmp_path, meta)


def test_blocks_of_a_large_file_are_compared(tmp_path, monkeypatch):
    """Both ends, and no less than every gap between two blocks; the cost does not grow."""
    monkeypatch.setattr(hashes, "WHOLE_BYTES", 2**20)
    path = tmp_path / "image.tif"
    content = bytearray(np.random.default_rng(0).bytes(3 * 2**20))
    path.write_bytes(content)
    before = hashes.hash_blocks(path)
    gap = (len(content) - hashes.BLOCK_BYTES) // (hashes.BLOCKS - 1)
    for start in (0, len(content) - 1, 5 * gap + 100, len(content) // 2):
        edited = content.copy()
        edited[start] ^= 1
        path.write_bytes(edited)
        assert hashes.hash_blocks(path) != before
    path.write_bytes(content)
    assert hashes.hash_blocks(path) == before


def test_the_flags_of_19_are_in_its_command(tmp_path):
    """Those that wrote slides.csv only where that has not been edited since."""
    outs, images = zip(*[make_outs(tmp_path / f"s {i}", i) for i in (1, 2)], strict=True)
    root = tmp_path / "my slides"
    (tmp_path / "panel.csv").write_text("gene\nHAL\nGENE1\n")
    linking = {"from_spaceranger": f"{outs[0]},{outs[1]}", "images": f"{images[0]},{images[1]}"}
    make_dataset(root, **linking, panel=tmp_path / "panel.csv", thumbnail=False)
    meta = common.load_dataset(root, "lognorm").meta
    others = ["--panel", str(tmp_path / "panel.csv"), "--thumbnail", "False"]
    with open(outs[0] / "spatial" / "tissue_positions.csv", "a") as file:
        file.write("\n")
    with pytest.raises(InputError) as caught:
        check_sources(root, meta)
    command = str(caught.value).split(": run ")[1].removesuffix(" again")
    words = shlex.split(command)
    assert words[2:6] == ["--data-root", str(root), "--target", "lognorm"]
    assert set(others + ["--from-spaceranger", linking["from_spaceranger"], "--images"]) < {*words}
    assert run_script("19", *words[2:]) == 0
    edit_manifest(root, donor=["D1", "D1"])
    with pytest.raises(InputError, match="donor of slide 1 is D1") as caught:
        check_sources(root, common.load_dataset(root, "lognorm").meta)
    assert "--from-spaceranger" not in str(caught.value) and "--images" not in str(caught.value)
    words = shlex.split(str(caught.value).split(": run ")[1].removesuffix(" again"))
    assert run_script("19", *words[2:]) == 0
    check_sources(root, common.load_dataset(root, "lognorm").meta)


def test_files_of_one_name_in_two_folders_are_told_apart(tmp_path):
    """The sizes of one must not be held against those of the other."""
    make_slides(tmp_path, 1)
    for folder, name in (("a", "image1.tif"), ("b", "positions1.csv")):
        (tmp_path / folder).mkdir()
        (tmp_path / name).rename(tmp_path / folder / "slide1")
    edit_manifest(tmp_path, image="a/slide1", positions="b/slide1")
    make_dataset(tmp_path)
    common.load_dataset(tmp_path, "lognorm")
    with (tmp_path / "b" / "slide1").open("ab") as file:
        file.write(b"\n")
    refuse_training(tmp_path, "b/slide1")


def refuse_training(root, *words):
    """Script 20 refuses with these words and the command of 19 that makes the dataset anew."""
    command = f"19_make_patches_and_csv.py --data-root {root} --target lognorm"
    options = {"data_root": root, "target": "lognorm", "out": root / "runs"}
    expect_refusal([*words, command], "20", **options)
    assert not (root / "runs").exists()


# ------------------------------------------------------------------------------- frames of an .h5ad
def name_scales(table, by, **scales):
    table.obsm["spatial"] = table.obsm["spatial"] * by
    table.uns["spatial"] = {"S1": {"scalefactors": {"spot_diameter_fullres": 110.0, **scales}}}


@pytest.mark.parametrize("by, scales, words", [
    (0.4, {"tissue_hires_scalef": 0.4}, ["79.93 px", "110 px", "tissue_hires_scalef 0.4: divide"]),
    (0.1, {"tissue_hires_scalef": 0.4, "tissue_lowres_scalef": 0.1}, ["tissue_lowres_scalef 0.1"]),
    (0.5, {"tissue_hires_scalef": 0.1}, ["another frame than px of the full-resolution image"]),
])  # fmt: skip
def test_positions_that_the_file_says_are_scaled_are_refused(tmp_path, by, scales, words):
    make_h5ad(tmp_path, lambda table: name_scales(table, by, **scales))
    assert_refused(tmp_path, "slide1.h5ad", *words)


def test_scale_factors_of_right_positions_are_no_news(tmp_path):
    make_h5ad(tmp_path, lambda table: name_scales(table, 1, tissue_hires_scalef=0.2))
    assert_no_warning(tmp_path)


@pytest.mark.parametrize("by, words", [(0.5, ["in microns"]), (0.4, ["as px of a scaled image"])])
def test_an_off_pitch_names_another_frame(tmp_path, by, words):
    def scale(table):
        table.obsm["spatial"] = table.obsm["spatial"] * by

    make_h5ad(tmp_path, scale)
    warnings_of(tmp_path, "slide1.h5ad", "positions in another frame", *words)


# --------------------------------------------------------------------- several samples in one file
def in_two_halves(table, prefix="", suffix=""):
    """The second half of the barcodes gets a prefix, or another suffix."""
    names = table.obs_names.tolist()
    table.obs_names = names[:18] + [prefix + name[:-2] + (suffix or "-1") for name in names[18:]]


def repeat_places(table):
    table.obs.iloc[18:, 1:] = table.obs.iloc[:18, 1:].to_numpy()


def name_column(column):
    def change(table):
        table.obs[column] = ["A"] * 18 + ["B"] * 18

    return change


def add_stray(table):
    """A third sample, of one spot: it must not hide the second."""
    in_two_halves(table, suffix="-2")
    names = table.obs_names.tolist()
    table.obs_names = [*names[:35], names[35][:-2] + "-3"]


def name_libraries(table):
    table.uns["spatial"] = {"A": {}, "B": {}}


def name_where(change):
    """The change, and a column of no usual name that tells the sections apart."""

    def change_both(table):
        change(table)
        name_column("where")(table)

    return change_both


@pytest.mark.parametrize("change, words", [
    (lambda table: in_two_halves(table, suffix="-2"),
     ["2 samples", "...-1", "...-2", "slide1.h5ad#suffix=1"]),
    (lambda table: in_two_halves(table, prefix="B_"),
     ["2 samples", "B_...-1", "slide1.h5ad#prefix=B"]),
    (repeat_places, ["18 spots have the array_row and array_col", "a matrix of its own"]),
    (name_column("library_id"),
     ['obs["library_id"] names 2 sections (A, B)', "slide1.h5ad#library_id=A"]),
    (name_column("Sample"), ['obs["Sample"] names 2 sections (A, B)', "slide1.h5ad#Sample=A"]),
    (name_column("batch"), ['obs["batch"] names 2 sections (A, B)', "slide1.h5ad#batch=A"]),
    (name_column("orig.ident"),
     ['obs["orig.ident"] names 2 sections (A, B)', "slide1.h5ad#orig.ident=A"]),
    (add_stray, ["3 samples", "...-2", "slide1.h5ad#suffix=1"]),
    (name_libraries, ['uns["spatial"] names 2 sections (A, B)', "a matrix of its own"]),
    (name_where(name_libraries),
     ['uns["spatial"] names 2 sections (A, B)', "slide1.h5ad#where=A"]),
    (name_where(repeat_places),
     ["18 spots have the array_row and array_col", "slide1.h5ad#where=A"]),
])  # fmt: skip
def test_two_sections_in_one_h5ad_are_refused(tmp_path, change, words):
    make_h5ad(tmp_path, change)
    assert_refused(tmp_path, "slide1.h5ad", *words)


@pytest.mark.parametrize("repeated", [True, False])
def test_an_aggregated_matrix_is_refused(tmp_path, repeated):
    make_slides(tmp_path)
    path = tmp_path / "matrix1" / "barcodes.tsv"
    barcodes = path.read_text().split()
    second = barcodes[:18] if repeated else barcodes[18:]
    both = barcodes[:18] + [barcode.replace("-1", "-2") for barcode in second]
    path.write_text("\n".join(both) + "\n")
    assert_refused(tmp_path, "matrix1", "2 samples (...-1, ...-2)", "matrix1#suffix=1")


# ------------------------------------------------------------------------ one section of a file
def make_two_sections(root, name="both.h5ad", **differ):
    """A data root of two slides whose sections are in one file, on the same places of the array;
    `differ` are columns of obs with the two values.
    """
    make_slides(root)
    parts = []
    for number in (1, 2):
        part = make_anndata(number)
        part.obs_names = [f"{barcode[:-2]}-{number}" for barcode in part.obs_names]
        parts.append(part.copy())
    both = anndata.concat(parts, merge="same")
    for column, values in differ.items():
        both.obs[column] = np.repeat(values, 36)
    both.uns["spatial"] = {"a": {"scalefactors": {"spot_diameter_fullres": 110.0}}, "b": {}}
    both.write_h5ad(root / name)
    return both


@pytest.mark.parametrize("column, values, written", [
    ("library_id", ["a", "b"], ["library_id=a", "library_id=b"]),
    ("orig.ident", ["a", "b"], ["orig.ident=a", "orig_ident=b"]),
    ("sample", [1, 2], ["sample=1", "sample=2"]),
    ("sample", [1.0, 2.0], ["sample=1", "sample=2"]),
    ("where", ["x = 1/2", "#2"], ["where=x = 1/2", "where=#2"]),
    ("nothing", ["", ""], ["suffix=1", "suffix=-2"]),
])  # fmt: skip
def test_a_section_of_an_h5ad_is_chosen(tmp_path, column, values, written):
    make_two_sections(tmp_path, **{column: values})
    edit_manifest(tmp_path, positions=["", ""], matrix=[f"both.h5ad#{text}" for text in written])
    check_two_sections(tmp_path)


def check_two_sections(root):
    """Each of the two slides of make_two_sections has its own counts and places."""
    for number, slide in enumerate(read_manifest(root), 1):
        positions, _ = place_spots(slide)
        spots = read_spots(slide, positions)
        expected = make_anndata(number)
        assert np.array_equal(spots.X.toarray(), expected.X.toarray())
        places = spots.obs[["pxl_col", "pxl_row"]].to_numpy()
        assert np.array_equal(places, expected.obsm["spatial"])


def test_script_19_takes_the_sections_of_a_file(tmp_path):
    make_two_sections(tmp_path, library_id=["a", "b"])
    paths = ["both.h5ad#library_id=a", "both.h5ad#library_id=b"]
    edit_manifest(tmp_path, positions=["", "both.h5ad#suffix=2"], matrix=paths)
    assert "2 slides can be used" in stdout_of("19", data_root=tmp_path, check=True)
    printed, table, patches = make_dataset(tmp_path)
    assert "both.h5ad: 36 spots are taken, those of library_id=b" in printed
    assert "warning: " not in printed
    table.obs["barcode"] = table.obs["barcode"].str.replace(r"-\d$", "-1", regex=True)
    for number in (1, 2):
        check_spots(table, patches, number, paint(number), 36)
    common.load_dataset(tmp_path, "lognorm")


def test_script_26_takes_a_section_of_a_file(tmp_path):
    make_two_sections(tmp_path, library_id=["a", "b"])
    script = load_script("26")
    script.IMAGE, script.UM_PER_PX = str(tmp_path / "image2.tif"), 0.5
    script.POSITIONS = script.MATRIX = str(tmp_path / "both.h5ad#library_id=b")
    slide, _ = script.choose_slide()
    spots = read_spots(slide, place_spots(slide)[0])
    assert np.array_equal(spots.X.toarray(), make_anndata(2).X.toarray())
    script.MATRIX = str(tmp_path / "none.h5ad#library_id=b")
    with pytest.raises(InputError, match="library_id=b: no such file"):
        script.choose_slide()


@pytest.mark.parametrize("kind", ["h5", "folder", "table"])
def test_a_sample_of_an_aggregated_matrix_is_chosen(tmp_path, kind):
    both = make_two_sections(tmp_path)
    name = {"h5": "aggr.h5", "folder": "aggr", "table": "aggr.csv.gz"}[kind]
    counts = both.X.toarray().astype(int)
    if kind == "h5":
        write_h5(tmp_path / name, counts, GENES, barcodes=both.obs_names)
    elif kind == "folder":
        write_matrix(tmp_path / name, both.obs_names, counts, GENES)
    else:
        pd.DataFrame(counts, both.obs_names, GENES).to_csv(tmp_path / name)
    edit_manifest(tmp_path, matrix=[f"{name}#suffix=1", f"{name}#suffix=2"])
    check_two_sections(tmp_path)


@pytest.mark.parametrize("part, words", [
    ("library=a", ["no column 'library'", "library_id, prefix, suffix"]),
    ("library_id=c", ["library_id has no value 'c'", "a (36 spots), b (36 spots)"]),
    ("a", ["no column 'a'", "column=value"]),
    ("suffix=3", ["suffix has no value '3'", "-1 (36 spots), -2 (36 spots)"]),
])  # fmt: skip
def test_a_section_that_is_not_there_is_refused(tmp_path, part, words):
    make_two_sections(tmp_path, library_id=["a", "b"])
    edit_manifest(tmp_path, matrix=[f"both.h5ad#{part}", "matrix2"])
    expect_refusal([f"both.h5ad#{part}", *words], "19", data_root=tmp_path, check=True)


@pytest.mark.parametrize("name", ["both#1.h5ad", "a#b=c.h5ad"])
def test_a_name_with_the_sign_of_a_section_is_found(tmp_path, name):
    make_two_sections(tmp_path, name, library_id=["a", "b"])
    edit_manifest(tmp_path, matrix=[f"{name}#library_id=a", f"{name}#library_id=b"])
    check_two_sections(tmp_path)
    make_anndata().write_h5ad(tmp_path / name)
    edit_manifest(tmp_path, positions=[name, "positions2.csv"], matrix=[name, "matrix2"])
    check_two_sections(tmp_path)


# ------------------------------------------------------------------------------ pixels of an image
def test_alpha_that_is_0_everywhere_is_refused(tmp_path):
    make_slides(tmp_path, 1)
    write_alpha(tmp_path / "image1.tif", paint(1), np.zeros((1400, 1600), np.uint8))
    assert_refused(tmp_path, "image1.tif", "one colour", "alpha is 0")


def write_png16(path, image):
    """A PNG of RGB, 16 bits a channel, which Pillow cannot write."""
    height, width = image.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in image)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", head), (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b"")):
        check = struct.pack(">I", zlib.crc32(kind + data))
        content += struct.pack(">I", len(data)) + kind + data + check
    path.write_bytes(content)


def test_a_png_of_16_bits_is_refused(tmp_path):
    make_slides(tmp_path, 1)
    write_png16(tmp_path / "image1.tif", paint(1).astype(np.uint16) * 16)
    assert_refused(tmp_path, "image1.tif", "8-bit RGB")


@pytest.mark.parametrize("compression, left", [
    ("jpeg", 0.25), ("jpeg", 0.0), ("aperio_jp2000_rgb", 0.5), ("jpeg2000", 0.9),
])  # fmt: skip
def test_a_jpeg_tile_that_is_cut_is_refused(tmp_path, compression, left):
    make_slides(tmp_path, 1)
    path = tmp_path / "image1.tif"
    options = {"compression": compression, "tile": (256, 256)}
    tifffile.imwrite(path, paint(1), photometric="rgb", **options)
    assert_no_warning(tmp_path)
    with tifffile.TiffFile(path) as tiff:
        start, length = tiff.pages[0].dataoffsets[9], tiff.pages[0].databytecounts[9]
    data = bytearray(path.read_bytes())
    kept = int(left * length)
    data[start + kept : start + length] = bytes(length - kept)
    path.write_bytes(data)
    assert_refused(tmp_path, "image1.tif", "fetch")


# ------------------------------------------------------------------------------------------ donors
@pytest.mark.parametrize("names, same", [
    (["P1", "p1"], True), (["Pat 2", "Pat_2"], True), (["P-01", "P1"], True),
    (["1_11", "11_1"], False), (["P1", "P10"], False), (["P1", "P1"], False),
])  # fmt: skip
def test_donors_that_are_spelt_in_two_ways_are_warned_of(tmp_path, capsys, names, same):
    make_slides(tmp_path)
    edit_manifest(tmp_path, donor=names)
    read_manifest(tmp_path)
    printed = capsys.readouterr().out
    assert (f"donors {names[0]!r} and {names[1]!r}" in printed) == same
    assert ("warning" in printed) == same


def test_one_file_of_positions_for_two_slides_is_warned_of(tmp_path, capsys):
    make_slides(tmp_path)
    edit_manifest(tmp_path, positions="positions1.csv")
    read_manifest(tmp_path)
    assert "slides S1 and S2 have one file of positions" in capsys.readouterr().out
    edit_manifest(tmp_path, matrix="", positions="")
    read_manifest(tmp_path)
    assert "warning" not in capsys.readouterr().out, "each gets a grid"


def test_slides_are_named_beside_those_whose_positions_they_have(tmp_path, capsys):
    table = pd.DataFrame({"tissue_index": [1, 2, 3, 4], "um_per_px": 0.5, "donor": "A"})
    table = table.assign(name=[*"abcd"], positions=[*"pqpq"])
    check_manifest(tmp_path, table)
    printed = capsys.readouterr().out
    assert "slides a and c have" in printed and "slides b and d have" in printed


def test_two_slides_without_a_donor_are_refused(tmp_path):
    """NA is a name beside others, and two people that programs had no name for."""
    make_slides(tmp_path)
    edit_manifest(tmp_path, donor=["NA", "D2"])
    read_manifest(tmp_path)
    edit_manifest(tmp_path, donor=["NA", "NA"])
    with pytest.raises(InputError, match="slides S1 and S2 have the donor 'NA'"):
        read_manifest(tmp_path)


def test_a_blank_patient_is_missing():
    assert hest.name_donor({"patient": "   ", "dataset_title": "A"}) == ""
    assert hest.name_donor({"patient": " P1 ", "dataset_title": "A"}) == "A P1"


# ------------------------------------------------------------------------------------------ counts
CONTROL_NAMES = ["NegControlProbe_00042", "NegControlCodeword_0500", "BLANK_0001", "Blank-1",
                 "UnassignedCodeword_0001", "DeprecatedCodeword_0002", "antisense_ENSG1", "Negative3",
                 "NegPrb2", "SystemControl7"]  # fmt: skip


@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_a_jpeg_that_ends_in_zeros_is_refused(tmp_path, kept):
    make_slides(tmp_path, 1)
    path = tmp_path / "image1.jpg"
    Image.fromarray(paint(1)).save(path, quality=95)
    data = path.read_bytes()
    edit_manifest(tmp_path, image=["image1.jpg"])
    path.write_bytes(data + b"a program's note")
    assert_no_warning(tmp_path)
    whole = int(kept * len(data))
    path.write_bytes(data[:whole] + bytes(len(data) - whole))
    assert_refused(tmp_path, "image1.jpg", "no end", "fetch")


def test_smooth_tissue_of_a_stain_is_no_glass():
    """Pale, dull and glass patches of 112 px, with the noise of a camera."""
    noise = np.random.default_rng(0).normal(0, 3, (4, 112, 112, 3))
    means = np.array([[90, 117, 90], [150, 120, 145], [244, 240, 246], [20, 20, 20]])
    patches = np.clip(means[:, None, None] + noise, 0, 255).astype(np.uint8)
    assert alignment.find_blank(patches).tolist() == [False, False, True, True]


def with_controls(table):
    """Ten controls beside the genes, with more counts than any of them."""
    controls = anndata.AnnData(
        scipy.sparse.csr_matrix(np.full((36, 10), 500, np.float32)),
        obs=table.obs,
        var=pd.DataFrame(index=CONTROL_NAMES),
    )
    made = anndata.concat([table, controls], axis=1, merge="same")
    made.obsm["spatial"] = table.obsm["spatial"]
    return made


def test_controls_are_no_genes(tmp_path):
    make_h5ad(tmp_path, with_controls)
    printed, table, _ = make_dataset(tmp_path)
    assert "slide1.h5ad: 10 controls are left out, as NegControlProbe_00042" in printed
    assert sorted(table.var_names) == sorted(GENES)
    assert table.obs["n_counts"].median() < 500  # of one control
    checked = stdout_of("19", data_root=tmp_path, target="lognorm", check=True)
    assert "10 controls are left out" in checked


def test_a_panel_that_names_a_control_gets_it(tmp_path):
    make_h5ad(tmp_path, with_controls)
    (tmp_path / "panel.csv").write_text("gene\nGENE1\nBlank-1\n")
    printed, table, _ = make_dataset(tmp_path, panel=tmp_path / "panel.csv")
    assert "9 controls are left out" in printed
    assert sorted(table.var_names) == ["Blank-1", "GENE1"]


def test_genes_are_no_controls():
    names = ["NEGR1", "BLNK", "BLANKET", "NELFA", "UNC5A", "DEPDC1", "INTS1", "SYS1", "ANTXR1"]
    assert not any(re.match(CONTROLS, name) for name in names)


def correct_depth(table, depth):
    """X of one depth, as SCTransform and rounded counts per million have; the raw in a layer."""
    table.layers["counts"] = table.X.copy()
    counts = table.X.toarray()
    scaled = np.rint(counts * depth / counts.sum(1, keepdims=True))
    table.X = scipy.sparse.csr_matrix(scaled.astype(np.float32))


def keep_variable(table):
    """X of a third of the genes, all of them in raw, as scanpy leaves a file."""
    table.raw = table.copy()
    return table[:, :16].copy()


@pytest.mark.parametrize("change, taken", [
    (lambda table: correct_depth(table, 430), 'layers["counts"]'),
    (lambda table: correct_depth(table, 1e6), 'layers["counts"]'),
    (keep_variable, "raw"),
])  # fmt: skip
def test_the_raw_counts_of_most_genes_are_taken(tmp_path, change, taken):
    make_h5ad(tmp_path, change)
    printed, table, patches = make_dataset(tmp_path)
    assert f"{taken} is taken, whose counts are of 48 genes" in printed
    assert "warning: " not in printed
    check_spots(table, patches, 1, paint(1), 36)


def few_beside_raw(layer, depth):
    """X or layers["counts"] of 16 genes beside raw of all, which has one depth or is no counts."""

    def change(table):
        few = table[:, :16].copy()
        correct_depth(table, 1e4)
        if depth is None:
            table.X.data += 0.5
        few.raw = table
        if layer:
            few.layers["counts"] = few.X.copy()
            few.X = few.X.log1p()
        return few

    return change


@pytest.mark.parametrize("layer, depth, words", [
    (False, 1e4, "X is taken, whose counts are of 16 genes; the values of 48 genes in raw have one"),
    (True, 1e4, 'layers["counts"] is taken, whose counts are of 16 genes; the values of 48 genes '
     "in raw have one"),
    (False, None, "X is taken, whose counts are of 16 genes; the values of 48 genes in raw are no"),
])  # fmt: skip
def test_counts_of_few_genes_beside_others_are_named(tmp_path, capsys, layer, depth, words):
    table = few_beside_raw(layer, depth)(make_anndata())
    table.write_h5ad(tmp_path / "slide1.h5ad")
    taken = read_matrix(tmp_path / "slide1.h5ad")
    assert np.array_equal(taken.X.toarray(), make_anndata().X.toarray()[:, :16])
    assert words in capsys.readouterr().out


def test_x_alone_is_taken_without_a_word(tmp_path, capsys):
    table = make_anndata()
    table.raw = table.copy()
    table.write_h5ad(tmp_path / "slide1.h5ad")
    read_matrix(tmp_path / "slide1.h5ad")
    assert not capsys.readouterr().out


def test_equal_depths_are_warned_of(tmp_path):
    def change(table):
        correct_depth(table, 1e4)
        del table.layers["counts"]

    make_h5ad(tmp_path, change)
    warnings_of(tmp_path, "slide1.h5ad", "all spots have about 10,0", "no raw counts")
