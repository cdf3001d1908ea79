"""Embeddings that others' models have made: files as HEST and TRIDENT write them, the rows of ridges
on them, and the model that script 26 applies, each held against a few lines of its own.
"""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
import timm
import torch
from conftest import (
    LOGNORM,
    REPOSITORY,
    SMALL_RUNS,
    ask,
    expect_refusal,
    load_script,
    metadata_of,
    refused,
    run_script,
    stdout_of,
    table_of,
)
from sklearn.preprocessing import StandardScaler
from test_hest_benchmark import benchmarks_trainer, make_task
from test_predict_slide import predicted_with, slide_of, spoil_weights

import common
from slides import inputs
from study import embeddings, methods, recording, splitting
from study.features import freeze_features
from study.rows import Row

SIDE = 256  # px of a patch of TRIDENT's
WIDTH = 12
BASELINE = LOGNORM | {"DEVICE": "cpu", "PRECISION": "fp32", "PRETRAINED": False, "REFIT": False}
BASELINE |= {"NEIGHBOURHOOD": True}


# -------------------------------------------------------------------------------------------- files
def write(path, values, *, barcodes=None, coords=None, side=SIDE, slide=None, **more):
    """An .h5 of datasets of any names; coords get the attributes patch_size_level0 and name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, content in {**values, **more}.items():
            file[name] = content
        if barcodes is not None:
            file["barcodes"] = np.array(barcodes, "S")[:, None]  # as HEST's save_hdf5
        if coords is not None:
            file["coords"] = coords
            if side is not None:
                file["coords"].attrs["patch_size_level0"] = side
            if slide is not None:
                file["coords"].attrs["name"] = slide
    return path


def write_as_hest(path, values, spots, seed=0):
    """In another order, between embeddings of barcodes that are no spots here."""
    order = np.random.default_rng(seed).permutation(len(values) + 3)
    every = np.vstack([values, np.full((3, values.shape[1]), 99)])[order]
    barcodes = np.array([*spots["barcode"], "other-1", "other-2", "other-3"])[order]
    return write(path, {"embeddings": every}, barcodes=barcodes)


def write_as_trident(path, values, spots, seed=0):
    """Patches around spots in another order and one that is far away, as one batch."""
    corners = spots[["pxl_col", "pxl_row"]].to_numpy() - SIDE // 2
    corners = np.vstack([corners, [10**6, 10**6]])
    order = np.random.default_rng(seed).permutation(len(corners))
    every = np.vstack([values, np.full((1, values.shape[1]), 99)])[order]
    return write(path, {"features": every[None]}, coords=corners[order])


LAYOUTS = {"hest": write_as_hest, "trident": write_as_trident}


def grid(side=4, pitch=300):
    """Spots on a square grid, and an embedding of each."""
    rows, columns = (axis.ravel() for axis in np.mgrid[1 : side + 1, 1 : side + 1])
    spots = pd.DataFrame({"pxl_row": rows * pitch, "pxl_col": columns * pitch + 7})
    spots["barcode"] = [f"{row}x{column}-1" for row, column in zip(rows, columns, strict=True)]
    return spots, np.random.default_rng(1).normal(size=(len(spots), WIDTH)).astype(np.float32)


def pick(path, slide, spots):
    """What the file at `path` holds of these spots."""
    return embeddings.pick_embeddings(path, embeddings.read_embeddings(path), slide, spots)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_spot_gets_its_own_embedding(tmp_path, layout, dtype):
    spots, values = grid()
    path = LAYOUTS[layout](tmp_path / "A.h5", values.astype(dtype), spots)
    found = pick(path, "A", spots.iloc[::-1])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, values.astype(dtype).astype(np.float32)[::-1])


def test_barcodes_may_be_texts_of_any_length_in_a_row(tmp_path):
    spots, values = grid()
    barcodes = spots["barcode"].iloc[::-1].to_list()
    path = write(tmp_path / "A.h5", {"features": values[::-1], "barcode": barcodes})
    np.testing.assert_array_equal(pick(path, "A", spots), values)


def test_a_patch_counts_for_the_spots_whose_centre_it_holds(tmp_path):
    spots, values = grid(side=1)
    half = SIDE // 2
    for beside, is_held in ((0, True), (half, True), (half + 1, False), (-half - 1, False)):
        corners = spots[["pxl_col", "pxl_row"]].to_numpy() - half + [beside, 3]
        path = write(tmp_path / "A.h5", {"features": values}, coords=corners)
        found = pick(path, "A", spots)
        assert np.isfinite(found).all() == is_held
        assert np.isnan(found).all() != is_held


BARCODES = [f"b{number}" for number in range(16)]
VALUES = np.ones((16, 3), np.float32)
WITH_NAN = np.where(np.arange(48).reshape(16, 3) == 5, np.nan, VALUES)
BAD = {
    "no embeddings": ({"values": VALUES}, {"barcodes": BARCODES}, ["values", "embeddings"]),
    "both": ({"features": VALUES, "embeddings": VALUES}, {"barcodes": BARCODES}, ["one of"]),
    "nothing to tell the spots": ({"features": VALUES}, {}, ["barcodes or coords"]),
    "of a slide": ({"features": VALUES[0]}, {"barcodes": BARCODES[:1]}, ["(3,)", "a slide"]),
    "of two slides": ({"features": VALUES.reshape(2, 8, 3)}, {}, ["(2, 8, 3)", "(patches, width)"]),
    "no row": ({"features": VALUES[:0]}, {"barcodes": BARCODES[:1]}, ["(0, 3)"]),
    "texts": ({"features": np.full((16, 3), b"x")}, {"barcodes": BARCODES}, ["|S1"]),
    "NaN": ({"features": WITH_NAN}, {"barcodes": BARCODES}, ["1 of 16", "slide C1", "NaN"]),
    "too large": ({"features": np.full((16, 3), 1e300)}, {"barcodes": BARCODES}, ["16 of 16", "slide C1"]),
    "infinite": ({"features": np.float16(VALUES) * np.inf}, {"barcodes": BARCODES}, ["infinity"]),
    "fewer barcodes": ({"features": VALUES}, {"barcodes": BARCODES[:9]}, ["16 embeddings and 9"]),
    "a barcode twice": ({"features": VALUES}, {"barcodes": ["b1"] * 16}, ["b1", "twice"]),
    "numbers for barcodes": ({"features": VALUES}, {"barcode": np.arange(16)}, ["int64", "texts"]),
    "coords of three": ({"features": VALUES}, {"coords": VALUES}, ["(16, 3)", "(16, 2)"]),
    "fewer coords": ({"features": VALUES}, {"coords": VALUES[:9, :2]}, ["(9, 2)", "(16, 2)"]),
    "no side": ({"features": VALUES}, {"coords": VALUES[:, :2], "side": None}, ["patch_size_level0"]),
    "side None": ({"features": VALUES}, {"coords": VALUES[:, :2], "side": "None"}, ["None", "side"]),
    "side 0": ({"features": VALUES}, {"coords": VALUES[:, :2], "side": 0}, ["is 0", "side"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_is_not_of_the_form_is_refused(tmp_path, case):
    values, parts, words = BAD[case]
    path = write(tmp_path / "3.h5", values, **parts)
    with refused(str(path), *words):
        pick(path, "C1", grid()[0])


@pytest.mark.parametrize("content", [b"", b"no HDF5", None])
def test_a_damaged_file_is_refused(tmp_path, content):
    path = write(tmp_path / "3.h5", {"features": VALUES}, barcodes=BARCODES)
    path.write_bytes(path.read_bytes()[:700] if content is None else content)
    with refused("3.h5: not a whole .h5"):
        embeddings.read_embeddings(path)


def test_patches_that_cannot_be_told_apart_are_refused(tmp_path):
    spots, values = grid()
    corners = spots[["pxl_col", "pxl_row"]].to_numpy() - SIDE // 2
    twice = write(tmp_path / "A.h5", {"features": values[[0, 0]]}, coords=corners[[0, 0]])
    with refused("two patches are as near to spot 1x1-1"):
        pick(twice, "A", spots)
    wide = write(tmp_path / "A.h5", {"features": values[:1]}, coords=corners[:1], side=900)
    with refused("several spots, as to 1x1-1", "farther apart"):
        pick(wide, "A", spots)


def test_patches_become_positions_that_find_them_again(tmp_path):
    spots, values = grid()
    path = write_as_trident(tmp_path / "A.h5", values, spots)
    placed = embeddings.find_patch_centres(path).rename_axis("barcode").reset_index()
    found = pick(path, "A", placed)
    np.testing.assert_array_equal(found, embeddings.read_embeddings(path).values)
    near = placed[placed["pxl_row"] < 10**5]
    assert sorted(near["pxl_row"]) == sorted(spots["pxl_row"])
    assert near["array_row"].max() == near["array_col"].max() == 3
    with refused("--positions"):
        embeddings.find_patch_centres(write_as_hest(tmp_path / "B.h5", values, spots))


# ------------------------------------------------------------------------------------------- models
def embed_colour(data, seed=0):
    """(N, WIDTH) float32 that an embedding of the patches could be."""
    colour = StandardScaler().fit_transform(data.annotations.obsm["colour"])
    mixed = colour @ np.random.default_rng(seed).normal(size=(colour.shape[1], WIDTH))
    return mixed.astype(np.float32)


def write_model(folder, data, values, layout="hest", by_name=True):
    """A file of each slide of a data root in a folder of a model."""
    names = {row["tissue_index"]: row["name"] for row in data.meta["slides"]}
    for slide, rows in data.spots.groupby("tissue_index").indices.items():
        path = folder / f"{names[slide] if by_name else slide}.h5"
        LAYOUTS[layout](path, values[rows], data.spots.iloc[rows], seed=slide)
    return folder


@pytest.fixture(scope="module")
def brought(simulated, tmp_path_factory):
    """A folder of two models' embeddings of the simulated slides, one a layout."""
    folder = tmp_path_factory.mktemp("embeddings")
    data = common.load_dataset(simulated, "lognorm")
    write_model(folder / "uni", data, embed_colour(data, 0))
    write_model(folder / "conch", data, embed_colour(data, 1), "trident", by_name=False)
    (folder / ".cache").mkdir()
    (folder / "notes").mkdir()
    return folder


def open_models(folder, split, backbones=("resnet18",)):
    return embeddings.open_models(folder, split.data, [split], backbones)


def test_a_folder_is_a_model_or_holds_models(brought, paper_split):
    conch, uni = open_models(brought, paper_split)
    assert (conch.name, uni.name, uni.width) == ("conch", "uni", WIDTH)
    (alone,) = open_models(brought / "uni", paper_split)
    assert alone == uni
    for model, seed in ((uni, 0), (conch, 1)):
        found = model.read(paper_split.data.spots)
        np.testing.assert_array_equal(found, embed_colour(paper_split.data, seed))


def test_a_row_follows_from_what_files_hold_and_not_from_where_they_lie(
    brought, paper_split, tmp_path
):
    (before,) = open_models(brought / "uni", paper_split)
    shutil.copytree(brought / "uni", tmp_path / "moved" / "uni")
    (moved,) = open_models(tmp_path / "moved", paper_split)
    assert moved.files != before.files
    assert moved.constants == before.constants
    (setting,) = embeddings.settings_of([moved], BASELINE)
    assert setting == "ridge (uni)"
    with h5py.File(moved.files[2], "r+") as file:
        file["embeddings"][0, 0] += 1
    (changed,) = open_models(tmp_path / "moved", paper_split)
    assert changed.constants != before.constants


def write_all_as_trident(folder, data, sides, names):
    """A file a slide, whose patches have these sides in px, and which say that they are of these
    slides.
    """
    values = embed_colour(data, 0)
    for slide, side, name in zip(data.slide_names, sides, names, strict=True):
        inside = data.spots["tissue_index"].to_numpy() == slide
        corners = data.spots.loc[inside, ["pxl_col", "pxl_row"]].to_numpy() - side / 2
        path = folder / f"{slide}.h5"
        write(path, {"features": values[inside]}, coords=corners, side=side, slide=name)


def test_patches_of_a_model_are_of_one_size_and_of_their_slide(paper_split, tmp_path):
    data = paper_split.data
    names = [*data.slide_names.values()]
    um_per_px = data.meta["slides"][0]["um_per_px"]
    write_all_as_trident(tmp_path / "uni", data, [200.0] * 4, names)
    (model,) = open_models(tmp_path / "uni", paper_split)
    assert model.constants["SIDE_UM"] == pytest.approx(200 * um_per_px, abs=0.05)
    path = tmp_path / "uni" / "1.h5"
    held = embeddings.read_embeddings(path)
    embeddings.check_embedded_slide(path, held, [names[0]], model.side_um, um_per_px)
    with refused("embed the slide as those"):
        embeddings.check_embedded_slide(path, held, [names[0]], model.side_um, 4 * um_per_px)
    inputs.WARNINGS.clear()
    embeddings.check_embedded_slide(path, held, ["photo", "S"], None, um_per_px)
    assert f"it is of {names[0]}, and not of photo" in inputs.WARNINGS.pop()
    write_all_as_trident(tmp_path / "uni", data, [200.0, 200.0, 200.0, 150.0], names)
    with refused("patches are of several sizes"):
        open_models(tmp_path / "uni", paper_split)
    write_all_as_trident(tmp_path / "uni", data, [200.0] * 4, names[::-1])
    with refused(f"of slide {names[3]}, and not of {names[0]}"):
        open_models(tmp_path / "uni", paper_split)


def test_slides_that_take_no_part_need_no_file(brought, paper_split, tmp_path):
    folder = tmp_path / "uni"
    shutil.copytree(brought / "uni", folder)
    roles = np.where(paper_split.data.spots["tissue_index"] == 4, "", paper_split.roles)
    split = splitting.Split(paper_split.data, roles, paper_split.groups, 42)
    (path,) = folder.glob("*D1.h5")
    path.unlink()
    (model,) = open_models(folder, split)
    found = model.read(split.data.spots)
    assert list(model.files) == [1, 2, 3]
    np.testing.assert_array_equal(np.isnan(found[:, 0]), roles == "")
    with refused("slide SIM_D1 has no SIM_D1.h5"):
        open_models(folder, paper_split)


def of_second_slide(folder):
    """The file of slide SIM_B1, open to be changed."""
    (path,) = folder.glob("*B1.h5")
    return h5py.File(path, "r+")


def without_two_spots(folder):
    with of_second_slide(folder) as file:
        barcodes = file["barcodes"][:]
        spots = np.flatnonzero(~np.char.startswith(barcodes, b"other"))
        barcodes[spots[:2], 0] = b"gone", b"went"
        file["barcodes"][:] = barcodes


def without_all_files_but_one(folder):
    for path in sorted(folder.glob("*.h5"))[1:]:
        path.unlink()


def with_another_width(folder):
    with of_second_slide(folder) as file:
        narrow = file["embeddings"][:, :5]
        del file["embeddings"]
        file["embeddings"] = narrow


def with_nan(folder):
    with of_second_slide(folder) as file:
        file["embeddings"][3, 1] = np.nan


LACKING = {
    without_two_spots: ["slide SIM_B1 lacks 2 of 10 spots, as ", "<tissue_index>.h5"],
    without_all_files_but_one: ["SIM_B1 has no", "SIM_C1 has no", "SIM_D1 has no"],
    with_another_width: [f"{WIDTH} of SIM_A1", "5 of SIM_B1", "one model?"],
    with_nan: ["slide SIM_B1", "1 of 13 embeddings"],
    lambda folder: folder.rename(folder.with_name("resnet18")): ["ridge (resnet18)", "rename"],
    shutil.rmtree: ["--features", "no folder of .h5 files"],
}


@pytest.mark.parametrize("change", LACKING)
def test_what_a_model_lacks_is_named_and_counted(brought, paper_split, tmp_path, change):
    shutil.copytree(brought / "uni", tmp_path / "models" / "uni")
    change(tmp_path / "models" / "uni")
    with refused(*LACKING[change]):
        open_models(tmp_path / "models", paper_split)


# --------------------------------------------------------------------------------------------- rows
@pytest.mark.parametrize("refit", [False, True])
def test_a_ridge_on_the_features_of_a_backbone_is_that_backbones_ridge(
    paper_split, tmp_path, refit
):
    recipe = BASELINE | {"BACKBONE": "resnet18", "IMAGE_SIZE": 32, "REFIT": refit}
    expected, told = ask(methods.ridge_on_features, recipe, paper_split)
    features, _ = freeze_features(recipe, paper_split)
    single, _ = freeze_features(recipe | {"NEIGHBOURHOOD": False}, paper_split)
    folder = write_model(tmp_path / "brought", paper_split.data, single)
    (model,) = open_models(folder, paper_split, backbones=())
    ((constants, method),) = embeddings.settings_of([model], BASELINE | {"REFIT": refit}).values()
    row = Row("ridge (brought)", constants, paper_split, tmp_path / "row").fill(method)
    found = recording.read_prediction(row.folder).to_numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    for name in ("alpha", "rank"):
        assert row.lines[0][name] == told[name]
    weight, bias, metadata = read_weights(row.folder / "weights.safetensors")
    test = paper_split.spots("test")
    by_hand = features[test] @ weight + bias
    at = paper_split.roles[paper_split.scored()] == "test"
    np.testing.assert_allclose(by_hand, found[at], rtol=0, atol=1e-5)
    r = paper_split.validate_genes(found[~at], paper_split.data.lognorm)
    np.testing.assert_array_equal(np.array(metadata["valid_r"], float), r)
    assert metadata["recipe"]["BACKBONE"] == "brought"
    assert metadata["recipe"]["WIDTH"] == features.shape[1]


def read_weights(path):
    """(coefficients, intercept, metadata) of a file that a row has saved."""
    tensors = safetensors.numpy.load_file(path)
    return tensors["weight"], tensors["bias"], metadata_of(path)


def test_a_run_has_the_rows_beside_its_own_and_computes_only_these(
    simulated, copied, brought, tmp_path
):
    """The network's row is that of a run without embeddings."""
    out = copied("20")
    stdout = stdout_of("20", data_root=simulated, out=out, features=brought, **SMALL_RUNS["20"])
    assert stdout.count("on disk already") == 2
    rows = table_of(stdout).query("split == 'test' and truth == 'lognorm'").set_index("setting")
    assert list(rows.index) == ["EfficientNet-B0", "ridge (colour)", "ridge (conch)", "ridge (uni)"]
    assert rows["heg"]["ridge (uni)"] != rows["heg"]["ridge (conch)"]
    assert rows["weights"]["ridge (uni)"] == f"uni, {WIDTH}"
    shutil.copytree(brought, tmp_path / "elsewhere")
    options = SMALL_RUNS["20"] | {"features": tmp_path / "elsewhere"}
    stdout = stdout_of("20", data_root=simulated, out=out, **options)
    assert stdout.count("on disk already") == 4


OF_25 = {"pretrained": False, "target": "lognorm", "device": "cpu"}


@pytest.fixture(scope="module")
def ridge_row(simulated, brought, tmp_path_factory):
    """(folder of the row of the ridge on uni in a run of 25, that run's folder)."""
    out = tmp_path_factory.mktemp("run25")
    options = OF_25 | {"features": brought, "only": "ridge (uni)", "protocol": "loso"}
    rows = table_of(stdout_of("25", data_root=simulated, out=out, **options))
    assert rows.query("split == 'test'")["slide"].to_list() == ["1", "2", "3", "4"]
    third = rows.query("split == 'test' and slide == '3'")
    return out / third["folder"].item(), out


def test_a_fold_learns_from_its_training_slides_alone(ridge_row, simulated):
    """Against the ridge's normal equations at the alpha and rank that the row names."""
    folder, _ = ridge_row
    record = json.loads((folder / "rows.json").read_text())[0]
    roles = pd.read_csv(folder / "split.csv").set_index("id")["role"]
    data = common.load_dataset(simulated, "lognorm")
    table = anndata.read_h5ad(folder / "predictions.h5ad")
    genes = pd.Index(data.genes).get_indexer(table.var_names)
    role, x = data.spots["id"].map(roles).to_numpy(), embed_colour(data, 0).astype(np.float64)
    train, test = role == "train", role == "test"
    slide = data.spots["tissue_index"].to_numpy()
    y = data.lognorm[train][:, genes].astype(np.float64)

    def centre(values):
        return values - pd.DataFrame(values).groupby(slide[train]).transform("mean").to_numpy()

    xc, yc = centre(x[train]), centre(y)
    penalty = record["alpha"] * (xc**2).sum() / len(xc)
    weight = np.linalg.solve(xc.T @ xc + penalty * np.eye(WIDTH), xc.T @ yc)
    genes_csv = pd.read_csv(folder / "genes.csv")
    leading = table.var_names.isin(genes_csv[genes_csv["group"] != "MG"]["gene"])
    patterns = np.linalg.svd(xc @ weight[:, leading], full_matrices=False)[0][:, : record["rank"]]
    fitted = patterns @ (patterns.T @ (xc @ weight))
    weight = np.linalg.lstsq(xc, fitted, rcond=None)[0]
    expected = (x[test] - x[train].mean(0)) @ weight + y.mean(0)
    found = table[table.obs["role"] == "test"]
    np.testing.assert_allclose(found.X, expected, rtol=0, atol=1e-4)


def test_the_folds_of_hest_benchmark_have_ridge_and_probe(tmp_path):
    task = make_task(tmp_path / "task")
    root = tmp_path / "TASK"
    assert run_script("19", data_root=root, from_hest=task) == 0
    data = common.load_dataset(root, "log1p")
    values = np.random.default_rng(0).normal(size=(len(data.spots), WIDTH)).astype(np.float32)
    folder = write_model(tmp_path / "uni", data, values)
    options = OF_25 | {"protocol": "hest", "target": "log1p", "features": folder}
    for setting in ("ridge (uni)", "hest probe (uni)"):
        out = tmp_path / "runs"
        stdout = stdout_of("25", data_root=root, out=out, only=setting, **options)
        rows = table_of(stdout).query("split == 'test' and truth == 'log1p'")
        assert set(rows["setting"]) == {setting}
        assert sorted(rows["fold"]) == [0, 1]
        assert "HEST r" in stdout
    folds = pd.read_csv(root / common.TASK_FOLDS)
    for row in rows.itertuples():
        named = folds[(folds["fold"] == row.fold) & (folds["role"] == "train")]["tissue_index"]
        slides = data.spots["tissue_index"].to_numpy()
        known = np.concatenate([np.flatnonzero(slides == slide) for slide in named])
        table = anndata.read_h5ad(out / row.folder / "predictions.h5ad")
        test = table[table.obs["role"] == "test"]
        at = data.spots.set_index("id").index.get_indexer(test.obs_names)
        arrays = values[known], data.target[known], values[at]
        expected, _ = benchmarks_trainer(*arrays, full_width=False)
        np.testing.assert_allclose(test.X, expected, rtol=0, atol=1e-5)


def test_only_rows_that_see_the_neighbourhood_are_called_so():
    script, sees = load_script("20"), {}
    vars(script).update(NEIGHBOURHOOD=True, PROTOCOL="hest", PRETRAINED=False)
    run = SimpleNamespace(
        baseline=BASELINE | {"PROTOCOL": "hest"},
        row=lambda setting, split, recipe: sees.update({setting: recipe["NEIGHBOURHOOD"]}),
        fill=lambda row, method: None,
    )
    models = [embeddings.Model("uni", {}, WIDTH)]
    script.fill_rows(run, None, BASELINE, ", neighbourhood", models)
    assert "hest probe (uni)" in sees
    for setting, is_seen in sees.items():
        assert setting.endswith(", neighbourhood") == is_seen


def test_methods_of_25_keep_a_backbone_beside_embeddings(brought, paper_split):
    script = load_script("25")
    script.FEATURES, script.PRETRAINED, script.BACKBONE = str(brought), "weights", "tiny"
    recipe = {"PRETRAINED": "weights", "IMAGE_SIZE": 32}
    run = SimpleNamespace(
        baseline=BASELINE, recipe=recipe, data=paper_split.data, splits=[paper_split]
    )
    found = script.computed_methods(run)
    assert {"ridge (uni)", "ridge (conch)", "ridge (tiny, full rank)"} <= set(found)
    assert found["same-slide ridge (control)"][0]["BACKBONE"] == "tiny"
    assert not any(str(brought) in setting for setting in found)
    script.FEATURES = str(brought / "mistyped")
    with refused("mistyped: no such folder"):
        script.computed_methods(run)


# ------------------------------------------------------------------------------------ another slide
def features_of_slide(folder, simulated, layout="hest", number=3):
    """(an .h5 of the embeddings of a slide's spots, those as a table by barcode)."""
    data = common.load_dataset(simulated, "lognorm")
    here = (data.spots["tissue_index"] == number).to_numpy()
    values, spots = embed_colour(data, 0)[here], data.spots[here]
    path = LAYOUTS[layout](folder / "new.h5", values, spots, seed=9)
    return path, pd.DataFrame(values, spots["barcode"].astype(str))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_ridge_predicts_a_slide_of_which_it_gets_embeddings(
    ridge_row, simulated, tmp_path, layout
):
    folder, _ = ridge_row
    path, values = features_of_slide(tmp_path, simulated, layout)
    options = (*slide_of(simulated), "--features", path)
    found, told = predicted_with(folder, *options, out=tmp_path / "out")
    assert f"embeddings  {WIDTH} numbers a spot, to be of uni" in told
    assert "distance    this slide is" in told
    weight, bias, metadata = read_weights(folder / "weights.safetensors")
    expected = values.loc[found.obs["barcode"]].to_numpy() @ weight + bias
    assert list(found.var_names) == metadata["genes"]
    np.testing.assert_allclose(found.X, expected, rtol=0, atol=1e-5)
    row = anndata.read_h5ad(folder / "predictions.h5ad")
    row = row[row.obs["role"] == "test"]
    assert found.obs["barcode"].to_list() == row.obs["barcode"].to_list()
    np.testing.assert_allclose(found.X, row.X, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.layers["measured"], row.layers["lognorm"], atol=1e-6)
    np.testing.assert_allclose(found.var["valid_r"], row.var["valid_lognorm_r"], atol=1e-9)
    np.testing.assert_allclose(found.var["r"], row.var["test_lognorm_r"], atol=1e-4)


def test_spots_without_an_embedding_are_counted_and_left_out(ridge_row, simulated, tmp_path):
    path, values = features_of_slide(tmp_path, simulated)
    data = pd.DataFrame({"barcode": values.index[:8]})
    write_as_hest(path, values.to_numpy()[:8], data)
    options = (*slide_of(simulated), "--features", path)
    found, told = predicted_with(ridge_row[0], *options, out=tmp_path / "out")
    assert "2 of 10 spots of slide SIM_C1 have no embedding and are left out" in told
    assert sorted(found.obs["barcode"]) == sorted(values.index[:8])
    write_as_hest(path, values.to_numpy(), pd.DataFrame({"barcode": values.index + "-of-another"}))
    command = ("26", "--weights", ridge_row[0], *options, "--out", tmp_path / "out")
    expect_refusal(["10 of 10 spots of slide SIM_C1", "of this slide"], *command)


def test_patches_of_a_slide_without_positions_are_its_spots(ridge_row, simulated, tmp_path):
    path, values = features_of_slide(tmp_path, simulated, "trident")
    with h5py.File(path, "r+") as file:  # without the patch that lies nowhere
        inside = file["coords"][:, 0] < 10**6
        features, corners = file["features"][:, inside], file["coords"][inside]
    write(path, {"features": features}, coords=corners)
    options = (slide_of(simulated)[0], "--features", path, "--um-per-px", 0.304)
    found, _ = predicted_with(ridge_row[0], *options, out=tmp_path / "out")
    weight, bias, _ = read_weights(ridge_row[0] / "weights.safetensors")
    centres = found.obs[["pxl_col", "pxl_row"]].to_numpy() - SIDE // 2
    order = [np.flatnonzero((corners == centre).all(1)).item() for centre in centres]
    expected = features[0][order] @ weight + bias
    assert len(expected) == len(values)
    np.testing.assert_allclose(found.X, expected, rtol=0, atol=1e-5)


def test_26_says_in_one_line_what_does_not_fit(ridge_row, trained, simulated, tmp_path):
    folder, run = ridge_row
    path, values = features_of_slide(tmp_path, simulated)
    network = trained[0] / table_of(trained[1])["folder"].iloc[0]
    narrow = write(tmp_path / "narrow.h5", {"features": values.to_numpy()[:, :5]}, barcodes=values.index)  # fmt: skip
    for arguments, words in (
        (["--weights", folder], [f"embeddings by uni, {WIDTH} numbers", "--features"]),
        (["--run", run], ["no network", "--features"]),
        (["--weights", network, "--features", path], ["--features", "is a network"]),
        (["--run", trained[0], "--features", path], ["no ridge on embeddings"]),
        (["--weights", folder, "--features", narrow], ["5 numbers", str(WIDTH), "uni"]),
    ):
        command = ["26", *slide_of(simulated), "--out", tmp_path / "out"]
        expect_refusal(words, *command, *arguments)
    assert "ridge (uni): " in stdout_of(*command, "--features", path, "--run", run)


def test_of_two_models_26_does_not_choose_whose_embeddings_it_gets(ridge_row, simulated, tmp_path):
    folder, run = ridge_row
    path, _ = features_of_slide(tmp_path, simulated)
    shutil.copytree(run, tmp_path / "run")

    def rename(metadata, state):
        metadata["recipe"] = metadata["recipe"].replace('"uni"', '"conch"')

    weights = tmp_path / "run" / folder.name / "weights.safetensors"
    spoil_weights(folder / "weights.safetensors", weights, rename)
    options = [*slide_of(simulated), "--features", path, "--out", tmp_path / "out"]
    expect_refusal(["conch, uni", "--weights"], "26", *options, "--run", tmp_path / "run")


# --------------------------------------------------------------------------------------------- docs
def test_the_page_shows_how_to_embed_the_patches_of_script_19(simulated, tmp_path, monkeypatch):
    """The page's own lines, with a small network at random in place of the one that is fetched."""
    page = (REPOSITORY / "docs" / "running.md").read_text()
    (block,) = re.findall(r"```python\n([^`]*h5py[^`]*)```", page)
    create, asked = timm.create_model, []

    def create_small(name, **options):
        asked.append((name, options))
        torch.manual_seed(0)
        return create("resnet10t", num_classes=0)

    monkeypatch.setattr(timm, "create_model", create_small)
    monkeypatch.chdir(tmp_path)
    Path("HER2ST_data").symlink_to(simulated)
    exec(compile(block, "docs/running.md", "exec"), {})
    ((name, options),) = asked
    assert (name, options["pretrained"]) == ("hf-hub:MahmoodLab/uni", True)
    data = common.load_dataset(simulated, "lognorm")
    roles = np.full(len(data.spots), "train")
    (model,) = embeddings.open_models("embeddings", data, [splitting.Split(data, roles, None, 0)], ())  # fmt: skip
    found = model.read(data.spots)
    network = create_small("").eval()
    for spot in (0, 17, 39):
        pixels = data.patches[spot].permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(network.default_cfg[name]) for name in ("mean", "std"))
        pixels = (pixels - mean[:, None, None]) / std[:, None, None]
        with torch.inference_mode():
            expected = network(pixels[None])[0].numpy()
        np.testing.assert_allclose(found[spot], expected, rtol=0, atol=1e-4)
