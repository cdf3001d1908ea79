"""slides/ and script 19: the same spot in patch, row and count for every image kind; borders; both position formats; panel."""

import gzip
import json
import shutil

import anndata
import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from conftest import (
    NETWORK,
    SHARED,
    edit_manifest,
    load_script,
    run_script,
    stdout_of,
    write_h5,
    write_slide,
)
from PIL import Image

import common
from slides import imaging
from slides.colour import colour_statistics
from slides.counts import join_genes, read_matrix
from slides.positions import lay_blocks, measure_pitch, read_positions

HEIGHT, WIDTH = 700, 900


def spot_table(n=7, seed=0):
    rng = np.random.default_rng(seed)
    table = pd.DataFrame({"barcode": [f"{'ACGT'[i % 4]}{i}-1" for i in range(n)], "in_tissue": 1})
    table["array_row"], table["array_col"] = rng.permutation(n), rng.permutation(n)
    table["pxl_row"], table["pxl_col"] = rng.integers(0, HEIGHT, n), rng.integers(0, WIDTH, n)
    return table


def picture():
    """Smooth in every channel, so that JPEG keeps it, and different at every place."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    channels = [y * 255 // HEIGHT, x * 255 // WIDTH, (x + y) * 255 // (HEIGHT + WIDTH)]
    return np.stack(channels, -1).astype(np.uint8)


def tiff(**options):
    return lambda path, image: tifffile.imwrite(path, image, photometric="rgb", **options)


def planes(**options):
    """One plane a channel."""
    options |= {"photometric": "rgb", "planarconfig": "separate"}
    return lambda path, image: tifffile.imwrite(path, np.moveaxis(image, -1, 0), **options)


def save_opaque(path, image):
    opaque = np.dstack([image, np.full_like(image[..., :1], 255)])
    tiff(extrasamples=["unassalpha"], tile=(128, 128))(path, opaque)


def jpeg_tiles(side, **arguments):
    arguments |= {"level": 97}
    return tiff(tile=(side, side), compression="jpeg", compressionargs=arguments)


def save_picture(path, image):
    Image.fromarray(image).save(path, quality=97, subsampling=0)


def write_pyramid(path, image):
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(image, photometric="rgb", tile=(128, 128), subifds=1)
        tiff.write(image[::2, ::2], photometric="rgb", tile=(128, 128), subfiletype=1)


WRITERS = {
    "contiguous.tif": tiff(),
    "big-endian.tif": tiff(byteorder=">", bigtiff=True),
    "strips.tif": tiff(rowsperstrip=37),
    "strips-lzw.tif": tiff(rowsperstrip=37, compression="lzw"),
    "one-strip-deflate.tif": tiff(rowsperstrip=HEIGHT, compression="zlib"),
    "tiles.tif": tiff(tile=(128, 256)),
    "tiles-lzw-predictor.tif": tiff(tile=(64, 64), compression="lzw", predictor=True),
    "tiles-jpeg.svs": jpeg_tiles(256),
    "tiles-ycbcr.tif": jpeg_tiles(128, outcolorspace="ycbcr"),
    "planes.tif": planes(),
    "planes-tiles.tif": planes(tile=(128, 128), compression="zlib"),
    "opaque.tif": save_opaque,
    "pyramid.ome.tif": write_pyramid,
    "photo.jpg": save_picture,
    "photo.png": save_picture,
    "opaque.png": lambda path, image: Image.fromarray(image).convert("RGBA").save(path),
}


def make_root(tmp_path, image="slide.tif", writer=None, pixels=None, spots=None, counts=None):
    """A data root of one slide; returns its (spots, counts)."""
    spots = spot_table() if spots is None else spots
    if counts is None:
        counts = np.random.default_rng(1).poisson(3.0, (len(spots), 12)) + 1
    genes = [f"G{i}" for i in range(np.shape(counts)[1])]
    (writer or WRITERS["contiguous.tif"])(tmp_path / image, picture() if pixels is None else pixels)
    write_slide(tmp_path, image, spots, counts, genes)
    return spots, np.asarray(counts)


def make_dataset(root):
    """(patches.npy, dataset.csv, what 19 printed) of a data root."""
    printed = stdout_of("19", data_root=root, target="lognorm")
    folder = root / "dataset"
    return np.load(folder / "patches.npy"), pd.read_csv(folder / "dataset.csv"), printed


def read_meta(root):
    return json.loads((root / "dataset" / "meta.json").read_text())


def read_counts(root):
    return anndata.read_h5ad(root / "dataset" / "counts.h5ad")


def expected_patch(image, row, col):
    padded = np.pad(image, ((112, 112), (112, 112), (0, 0)), constant_values=255)
    return padded[row : row + 224, col : col + 224]


@pytest.mark.parametrize("kind", WRITERS)
def test_patch_row_and_count_are_of_one_spot(tmp_path, kind):
    spots, counts = make_root(tmp_path, kind, WRITERS[kind])
    patches, rows, printed = make_dataset(tmp_path)
    stored = read_counts(tmp_path)
    assert patches.shape == (7, 224, 224, 3) and patches.dtype == np.uint8
    assert list(rows.columns[:7]) == common.ID_COLUMNS
    assert rows["array_row"].is_monotonic_increasing
    assert rows["id"].tolist() == stored.obs_names.tolist()
    image, lossy = picture(), "jp" in kind or "ycbcr" in kind
    for i, row in rows.iterrows():
        spot = spots[spots["barcode"] == row["barcode"]].iloc[0]
        assert (row["array_row"], row["array_col"]) == (spot["array_row"], spot["array_col"])
        patch = expected_patch(image, spot["pxl_row"], spot["pxl_col"]).astype(int)
        if lossy:
            difference = np.abs(patches[i] - patch)[8:-8, 8:-8]
            assert np.median(difference) <= 4
        else:
            assert np.array_equal(patches[i], patch)
        k = spots.index[spots["barcode"] == row["barcode"]][0]
        counted = counts[k][[int(name.removeprefix("G")) for name in stored.var_names]]
        assert np.array_equal(stored.X[i].toarray()[0], counted)
        assert stored.obs["n_counts"].iloc[i] == counts[k].sum()
        lognorm = np.log1p(counted * 1e4 / counted.sum())
        np.testing.assert_allclose(row[stored.var_names].astype(float), lognorm, rtol=1e-6)
    how = {"contiguous.tif": "memory-mapped", "strips-lzw.tif": "strips of 900 x 37 px"}
    how["tiles-lzw-predictor.tif"] = "tiles of 64 x 64 px"
    assert how.get(kind, "") in printed


def test_every_segment_is_decoded_at_most_once(tmp_path, monkeypatch):
    spots, _ = make_root(tmp_path, "s.tif", WRITERS["tiles-lzw-predictor.tif"])
    decoded, original = [], tifffile.TiffPage.decode

    class Spy:
        def __get__(self, page, owner):
            if page is None:
                return original
            return lambda data, index, **k: (
                decoded.append(index) or original.__get__(page)(data, index, **k)
            )

    monkeypatch.setattr(tifffile.TiffPage, "decode", Spy())
    patches = np.zeros((7, 224, 224, 3), np.uint8)
    imaging.read_patches(tmp_path / "s.tif", spots, patches)
    assert decoded and len(decoded) == len(set(decoded))
    expected = expected_patch(picture(), *spots.loc[0, ["pxl_row", "pxl_col"]])
    assert np.array_equal(patches[0], expected)


@pytest.mark.parametrize("kind", WRITERS)
def test_the_regions_of_an_image_cover_it_once(tmp_path, kind):
    WRITERS[kind](tmp_path / kind, picture())
    image = imaging.open_image(tmp_path / kind)
    assert image.shape == (HEIGHT, WIDTH)
    times, found = np.zeros((HEIGHT, WIDTH), int), np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for pixels, top, left in image.regions(lambda box: True):
        assert pixels.dtype == np.uint8
        bottom, right = top + len(pixels), left + pixels.shape[1]
        times[top:bottom, left:right] += 1
        found[top:bottom, left:right] = pixels
    assert (times == 1).all()
    tolerance = 4 if "jp" in kind or "ycbcr" in kind else 0
    assert np.median(np.abs(found.astype(int) - picture())) <= tolerance
    if not tolerance:
        assert np.array_equal(found, picture())


def test_only_regions_that_are_needed_are_read(tmp_path):
    WRITERS["tiles.tif"](tmp_path / "s.tif", picture())
    image = imaging.open_image(tmp_path / "s.tif")
    regions = image.regions(lambda box: box[0] <= 300 < box[2] and box[3] == WIDTH)
    assert [(top, left) for _, top, left in regions] == [(256, 768)]


def test_a_new_format_is_one_function(tmp_path, monkeypatch):
    """As SlideImage's docstring says, here of NumPy files, in squares of 200 px."""

    def open_numpy(path):
        pixels = imaging.as_rgb(np.load(path, mmap_mode="r"), path)

        def regions(needed):
            for top in range(0, HEIGHT, 200):
                for left in range(0, WIDTH, 200):
                    part = pixels[top : top + 200, left : left + 200]
                    if needed((top, left, top + part.shape[0], left + part.shape[1])):
                        yield part, top, left

        return imaging.SlideImage("squares", pixels.shape[:2], regions)

    make_root(tmp_path, "slide.npy", np.save)
    monkeypatch.setattr(imaging, "open_image", open_numpy)
    patches, made, _ = make_dataset(tmp_path)
    for patch, row in zip(patches, made.itertuples(), strict=True):
        assert np.array_equal(patch, expected_patch(picture(), row.pxl_row, row.pxl_col))


def test_a_sparse_tiff_is_white_where_it_has_no_tiles(tmp_path):
    tile = picture()[:128, :128]
    tiles = iter([tile, None, None, tile])
    sparse = tiff(shape=(256, 256, 3), dtype=np.uint8, tile=(128, 128), compression="zlib")
    sparse(tmp_path / "s.tif", tiles)
    spots = pd.DataFrame({"barcode": ["A"], "pxl_row": [128], "pxl_col": [128]})
    patches = np.zeros((1, 224, 224, 3), np.uint8)
    imaging.read_patches(tmp_path / "s.tif", spots, patches)
    expected = np.full((224, 224, 3), 255, np.uint8)
    expected[:112, :112] = tile[16:, 16:]
    expected[112:, 112:] = tile[:112, :112]
    assert np.array_equal(patches[0], expected)


SOME = ["contiguous.tif", "tiles-lzw-predictor.tif", "strips-lzw.tif", "planes-tiles.tif"]


@pytest.mark.parametrize("kind", [*SOME, "photo.png"])
def test_the_thumbnail_averages_squares_and_is_made_in_the_same_pass(tmp_path, monkeypatch, kind):
    opened, original = [], imaging.open_image
    monkeypatch.setattr(imaging, "open_image", lambda path: opened.append(path) or original(path))
    make_root(tmp_path, kind, WRITERS[kind])
    make_dataset(tmp_path)
    assert len(opened) == 1, "the image is read once"
    meta = read_meta(tmp_path)
    assert meta["px_per_thumbnail_px"] == {"S1": 16} and meta["slides"][0]["um_per_px"] == 0.5
    with Image.open(tmp_path / "dataset" / "thumbnail_1.png") as image:
        thumbnail = np.asarray(image)
    # Of 700 x 900 px: the last row is 12 px high, the last column 4 px wide.
    assert thumbnail.shape == (44, 57, 3)
    for row, column in ((0, 0), (20, 30), (43, 56), (43, 0)):
        square = picture()[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
        assert np.array_equal(thumbnail[row, column], np.rint(square.mean((0, 1))))


def test_without_thumbnails_none_is_written(tmp_path):
    make_root(tmp_path)
    assert run_script("19", data_root=tmp_path, target="lognorm", thumbnail=False) == 0
    assert not list((tmp_path / "dataset").glob("thumbnail*"))
    assert read_meta(tmp_path)["px_per_thumbnail_px"] == {}


def test_patches_over_the_border_are_padded_white_and_counted(tmp_path):
    spots = spot_table(4)
    spots["pxl_row"], spots["pxl_col"] = [0, 350, 699, 350], [0, 450, 899, 111]
    make_root(tmp_path, spots=spots, pixels=np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    patches, rows, _ = make_dataset(tmp_path)
    by_spot = patches[pd.Index(rows["barcode"]).get_indexer(spots["barcode"])]
    white = [(patch == 255).mean() for patch in by_spot]
    assert white == [0.75, 0, 1 - (113 / 224) ** 2, 1 / 224]
    assert (by_spot[0][112:, 112:] == 0).all() and (by_spot[0][:112] == 255).all()
    assert read_meta(tmp_path)["padded_at_border"] == {"S1": 3}


def test_blocks_are_squares_five_pitches_wide():
    rows, cols = (axis.ravel() for axis in np.mgrid[:12, :11])
    spots = pd.DataFrame({"pxl_row": rows * 80, "pxl_col": cols * 80})
    pitch = measure_pitch(spots)
    blocks = lay_blocks(spots, pitch, 7)
    assert pitch == 80 and blocks[0] == "7:0:0" and blocks[-1] == "7:2:2" and len(set(blocks)) == 9
    assert pd.Series(blocks).value_counts().max() == 25
    alone = spots.iloc[:1]
    assert measure_pitch(alone) == 1.0, "a spot alone"
    assert lay_blocks(alone, 1.0, 7) == ["7:0:0"]
    assert measure_pitch(spots.iloc[[3, 3, 3]]) == 1.0, "three in one place"


def test_red_stays_red_from_slide_to_network(tmp_path):
    pixels = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    pixels[300:400, 400:500] = (255, 0, 0)
    spots = spot_table(3)
    spots["pxl_row"], spots["pxl_col"] = 350 + np.arange(3), 450
    make_root(tmp_path, spots=spots, pixels=pixels)
    make_dataset(tmp_path)
    data = common.load_dataset(tmp_path, "lognorm")
    assert data.patches[0, 112, 112].tolist() == [255, 0, 0]
    seen = []
    model = common.build_model(NETWORK | {"HIDDEN": 0}, 2, 0)
    model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    mean, sd = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = ([1, 0, 0] - mean) / sd
    for size in (224, 32):
        patches = common.place_patches(data.patches, size, torch.device("cpu"))
        common.predict(model, patches, [0], dtype=torch.float32)
        centre = seen.pop()[0, :, size // 2, size // 2]
        np.testing.assert_allclose(centre, expected, rtol=1e-5)


def test_gzipped_folder_and_h5_give_the_same_counts(tmp_path):
    make_root(tmp_path)
    plain = read_matrix(tmp_path / "matrix1")
    packed = tmp_path / "packed"
    packed.mkdir()
    for path in (tmp_path / "matrix1").iterdir():
        with open(path, "rb") as source, gzip.open(packed / f"{path.name}.gz", "wb") as target:
            shutil.copyfileobj(source, target)
    h5, names = tmp_path / "filtered_feature_bc_matrix.h5", [*plain.var["name"]]
    write_h5(h5, plain.X.toarray(), names, barcodes=plain.obs_names)
    for other in (read_matrix(packed), read_matrix(h5)):
        tables = other.to_df(), plain.to_df()
        pd.testing.assert_frame_equal(*tables, check_dtype=False, check_names=False)
        assert other.var["name"].tolist() == names


def test_genes_are_aligned_by_id_and_those_of_one_slide_kept(tmp_path):
    make_root(tmp_path, "one.tif")
    counts = np.random.default_rng(2).poisson(3.0, (7, 11)) + 1
    WRITERS["contiguous.tif"](tmp_path / "two.tif", picture())
    # G10 is missing, the order another one.
    order = [f"G{i}" for i in (11, 3, 2, 1, 0, 4, 5, 6, 7, 8, 9)]
    write_slide(tmp_path, "two.tif", spot_table(seed=5), counts, order, slide=2)
    assert "12 genes, 11 of them in every slide" in make_dataset(tmp_path)[2]
    stored = read_counts(tmp_path)
    assert stored.var_names.is_monotonic_increasing
    assert stored.var.loc["G10", ["listed_1", "listed_2"]].tolist() == [True, False]
    second = stored[stored.obs["tissue_index"] == 2]
    barcode = second.obs["barcode"].iloc[0]
    at = spot_table(seed=5)["barcode"].tolist().index(barcode)
    assert second[:, "G11"].X.toarray()[0, 0] == counts[at, 0]
    assert second[:, "G3"].X.toarray()[0, 0] == counts[at, 1]
    assert second[:, "G10"].X.nnz == 0
    assert second.obs["n_counts"].iloc[0] == counts[at].sum(), "depth is over the slide's own genes"


def test_duplicate_gene_names_are_made_unique_and_said(tmp_path):
    make_root(tmp_path)
    path = tmp_path / "matrix1" / "features.tsv"
    path.write_text(path.read_text().replace("\tG1\t", "\tG0\t"))
    assert "1 gene names" in make_dataset(tmp_path)[2]
    assert "G0-1" in read_counts(tmp_path).var_names


@pytest.mark.parametrize("expression", [True, False])
def test_nothing_but_the_results_is_in_the_dataset(tmp_path, expression):
    make_root(tmp_path)
    names = ["contact_sheet.png", "dataset.csv", "meta.json", "patches.npy"]
    names += ["spots_1.png", "thumbnail_1.png"]
    if expression:
        names += ["counts.h5ad", "lognorm.npy"]
    else:
        edit_manifest(tmp_path, matrix="")
    target = "lognorm" if expression else "harmony"
    assert run_script("19", data_root=tmp_path, target=target) == 0
    assert sorted(path.name for path in (tmp_path / "dataset").iterdir()) == sorted(names)
    assert not (tmp_path / ".dataset").exists()
    columns = pd.read_csv(tmp_path / "dataset" / "dataset.csv").columns.tolist()
    assert (columns == common.ID_COLUMNS) != expression


def test_circles_show_where_the_spots_lie():
    picture = Image.new("RGB", (60, 40), "white")
    spots = pd.DataFrame({"pxl_col": [200, 400], "pxl_row": [100, 300]})
    load_script("19").circle_spots(picture, spots, 10)
    changed = np.argwhere((np.array(picture) != 255).any(2))
    away = np.hypot(*(changed[:, None, ::-1] - [[20, 10], [40, 30]]).transpose(2, 0, 1)).min(1)
    radius = 0.55 * np.hypot(200, 200) / 10 / 2
    assert len(changed) > 60 and np.abs(away - radius).max() < 1.5


def test_published_panel_and_harmony_are_used_where_they_are(tmp_path):
    folder = tmp_path / "data" / "filtered_expression_matrices"
    folder.mkdir(parents=True)
    spots, _ = make_root(tmp_path)
    mask = np.arange(12) % 2 == 0
    np.save(folder / "hvg_union.npy", mask)
    harmony = np.random.default_rng(0).normal(size=(6, 7)).astype(np.float32)
    np.save(tmp_path / "matrix1" / "harmony_matrix.npy", harmony)
    assert run_script("19", "--data-root", tmp_path) == 0
    data = common.load_dataset(tmp_path, "harmony")
    assert data.genes == ["G0", "G10", "G2", "G4", "G6", "G8"], "in the order of the ids"
    order = [spots["barcode"].tolist().index(b) for b in data.spots["barcode"]]
    assert np.array_equal(data.target, harmony.T[order][:, [0, 5, 1, 2, 3, 4]])


@pytest.mark.parametrize(
    "save", [None, np.savez, lambda path, mask: np.save(path, mask.astype(str))]
)
def test_a_published_panel_that_is_no_array_of_numbers_is_refused(tmp_path, capsys, save):
    path = tmp_path / "data" / "filtered_expression_matrices" / "hvg_union.npy"
    path.parent.mkdir(parents=True)
    make_root(tmp_path)
    with open(path, "wb") as file:
        if save is not None:
            save(file, np.arange(12) % 2 == 0)
    assert run_script("19", "--data-root", tmp_path, "--target", "lognorm") == 2
    assert "hvg_union.npy: not a NumPy array of numbers" in capsys.readouterr().err


def test_colour_statistics_tell_what_they_say():
    patches = np.empty((3, 224, 224, 3), np.uint8)
    patches[0], patches[1] = 255, (200, 100, 50)
    patches[2] = np.random.default_rng(0).integers(0, 256, (224, 224, 3))
    values = colour_statistics(patches)
    assert values.shape == (3, 40) and np.isfinite(values).all()
    np.testing.assert_allclose(values[1, :3], np.array([200, 100, 50]) / 255, rtol=1e-5)
    halves = patches[2].reshape(112, 2, 112, 2, 3).mean((1, 3)) / 255
    np.testing.assert_allclose(values[2, 5:8], halves.std((0, 1)), rtol=1e-3)  # sd, after 5 means


def test_panel_is_the_union_of_each_slides_variable_genes_and_the_markers(simulated):
    stored = read_counts(simulated)
    assert stored.var[["hvg_1", "hvg_2", "hvg_3", "hvg_4", "MG"]].any(axis=1).all()
    markers = stored.var_names[stored.var["MG"]]
    assert markers.isin(common.MARKER_GENES).all() and len(markers) == 8


def test_harmony_takes_the_slide_effect_out(simulated):
    data = common.load_dataset(simulated, "harmony")
    slides = data.spots["tissue_index"].to_numpy()

    def between(values):
        means = [values[slides == slide].mean(0) for slide in (1, 2, 3, 4)]
        return np.var(means, axis=0).mean()

    assert between(data.target) < 0.8 * between(data.lognorm)


def test_outputs_are_the_same_when_made_again(tmp_path):
    make_root(tmp_path)
    made = []
    for _ in range(2):
        make_dataset(tmp_path)
        paths = [path for path in (tmp_path / "dataset").iterdir() if path.suffix != ".h5ad"]
        made.append({path.name: path.read_bytes() for path in paths})
    assert made[0] == made[1]
    assert not list((tmp_path / "dataset").glob(".partial*"))


@pytest.mark.data
@pytest.mark.skipif(not (SHARED / "gse240429").is_dir(), reason="shared/gse240429 is not there")
def test_real_positions_and_features_are_read():
    folder = SHARED / "gse240429" / "data"
    table = read_positions(folder / "tissue_pos_matrices" / "tissue_positions_list_1.csv")
    barcodes = folder / "filtered_expression_matrices" / "1" / "barcodes.tsv"
    barcodes = barcodes.read_text().split()
    assert len(table) == 4992 and set(barcodes) <= set(table.index) and len(barcodes) == 2378


# ------------------------------------------------------------------------------------ genes, joined
def gene_table(ids, symbols):
    return pd.DataFrame({"name": symbols}, index=pd.Index(ids))


def test_symbols_do_not_depend_on_the_order_of_the_slides():
    """The first slide may have ids where symbols should be, and another one the symbols."""
    ids = ["ENSG2", "ENSG1"]
    features = {1: gene_table(ids, ids), 2: gene_table(ids, ["ALB", "HAL"])}
    forth = join_genes(features.items())
    back = join_genes(reversed(features.items()))
    assert forth.index.tolist() == back.index.tolist() == ["HAL", "ALB"]
    assert forth["gene_ids"].tolist() == ["ENSG1", "ENSG2"]
