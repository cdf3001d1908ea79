"""Scripts 21, 22 and 23: what is trainable, what stays frozen, folds, resuming, ranking, colour
augmentation.
"""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import timm
import torch
from conftest import (
    NETWORK,
    SMALL_GRID,
    SMALL_RUNS,
    TINY,
    TINY_SEARCH,
    expect_refusal,
    load_script,
    printed_table,
    rows_of,
    run_script,
    split_of,
    stdout_of,
    table_of,
    without_timing,
)
from scipy.spatial.distance import cdist
from torchvision.transforms.v2 import functional as torchvision

import common
from study import rows, splitting
from study.errors import InputError

# ------------------------------------------------------------------------------- what is trainable

# Parameters of the whole network as torchvision's documentation lists them, less its classifier of
# 1,000 classes.
PUBLISHED = {
    "efficientnet_b0": 5_288_548 - 1281 * 1000,
    "tf_efficientnet_lite0": 4_652_008 - 1281 * 1000,
    "tf_efficientnet_b7.ra_in1k": 66_347_960 - 2561 * 1000,
    "resnet18": 11_689_512 - 513 * 1000,
    "resnet50": 25_557_032 - 2049 * 1000,
    "densenet121": 7_978_856 - 1025 * 1000,
    "mobilenetv2_100": 3_504_872 - 1281 * 1000,
}


@pytest.mark.parametrize("backbone", PUBLISHED)
def test_every_backbone_is_whole_and_wholly_trainable(backbone):
    recipe = NETWORK | {"BACKBONE": backbone}
    with torch.device("meta"):
        model = common.build_model(recipe, 5, 0)
        frozen = common.build_model(recipe | {"TRAINABLE_STAGES": 0}, 5, 0)
    head = (model.head[1].in_features + 1) * 8 + 9 * 5
    whole = {"backbone": PUBLISHED[backbone], "total": PUBLISHED[backbone] + head}
    assert common.count_parameters(model) == whole | {"trainable": whole["total"]}
    assert common.count_parameters(frozen) == whole | {"trainable": head}


def test_every_default_backbone_has_pretrained_weights():
    backbones = load_script("21").BACKBONES
    assert set(backbones) == set(PUBLISHED)
    for name in backbones:
        assert timm.get_pretrained_cfg(name).hf_hub_id, name


def mbconv(inputs, outputs, kernel, expansion):
    """Parameters of one block of EfficientNet's table, by hand: convolutions without bias, two
    numbers a BatchNorm.
    """
    wide = inputs * expansion
    squeezed = inputs // 4
    expand = inputs * wide + 2 * wide if expansion > 1 else 0
    depthwise = kernel**2 * wide + 2 * wide
    squeeze_and_excite = wide * squeezed + squeezed + squeezed * wide + wide
    return expand + depthwise + squeeze_and_excite + wide * outputs + 2 * outputs


# Expansion, outputs, blocks and kernel of the seven stages in Tan and Le's table 1.
STAGES = [(1, 16, 1, 3), (6, 24, 2, 3), (6, 40, 2, 5), (6, 80, 3, 3), (6, 112, 3, 5)]
STAGES += [(6, 192, 4, 5), (6, 320, 1, 3)]


def stages_by_hand():
    """Parameters of EfficientNet-B0's nine: stem, the seven stages, head convolution."""
    stages, inputs = [3 * 3 * 3 * 32 + 2 * 32], 32
    for expansion, outputs, blocks, kernel in STAGES:
        first = mbconv(inputs, outputs, kernel, expansion)
        stages.append(first + (blocks - 1) * mbconv(outputs, outputs, kernel, expansion))
        inputs = outputs
    return [*stages, 320 * 1280 + 2 * 1280]


@pytest.mark.parametrize("stages, first", [
    (0, None), (1, "conv_head"), (3, "blocks.5"), (5, "blocks.3"), (7, "blocks.1"), (9, "conv_stem"),
    (-1, "conv_stem"),
])  # fmt: skip
def test_trainable_parameters_of_each_stage_setting(stages, first):
    with torch.device("meta"):
        model = common.build_model(NETWORK | {"TRAINABLE_STAGES": stages}, 5, 0)
    n_trainable = 9 if stages == -1 else stages
    backbone = sum(stages_by_hand()[9 - n_trainable :])
    head = 1281 * 8 + 9 * 5
    assert common.count_parameters(model)["trainable"] == head + backbone
    parameters = model.backbone.named_parameters()
    trainable = [name for name, parameter in parameters if parameter.requires_grad]
    assert trainable[0].startswith(first) if first else not trainable


# Where the names of each stage's parameters begin.
PREFIXES = [("conv_stem", "bn1"), *((f"blocks.{i}.",) for i in range(7)), ("conv_head", "bn2")]


@pytest.mark.parametrize("stages", [0, 1, 3, 5, 7, 9])
def test_frozen_stages_are_bit_equal_after_training(stages):
    rng = np.random.default_rng(0)
    patches = torch.from_numpy(rng.integers(0, 256, (10, 3, 32, 32), np.uint8))
    target = rng.normal(size=(10, 5)).astype(np.float32)
    model = common.build_model(NETWORK | {"TRAINABLE_STAGES": stages}, 5, 0)
    before = common.copy_state(model)
    recipe = NETWORK | {"LEARNING_RATE": 1e-2, "EPOCHS": 1, "BATCH_SIZE": 5, "AUG": "none"}
    split = split_of(target, np.arange(7), np.arange(7, 10))
    common.fit(model, patches, split, recipe)
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    for number, prefixes in enumerate(PREFIXES):
        prefixes = tuple(f"backbone.{prefix}" for prefix in prefixes)
        own = {name for name in before if name.startswith(prefixes)}
        statistics = {name for name in own if "running" in name}
        assert own and statistics
        if number < 9 - stages:
            assert not own & changed, number
        else:
            assert statistics <= changed, number
            assert own & changed - statistics, number
    assert any(name.startswith("head") for name in changed)


@pytest.mark.parametrize("pool_stages", [True, False])
def test_a_frozen_backbone_is_in_no_graph_and_the_same_in_training(pool_stages):
    recipe = NETWORK | {"TRAINABLE_STAGES": 0, "POOL_STAGES": pool_stages}
    model = common.build_model(recipe, 5, 0)
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    features = model.train().encode(pixels)
    assert not features.requires_grad
    assert model(pixels).requires_grad, "the head is trained"
    assert torch.equal(features, model.eval().encode(pixels))


def test_a_transformers_own_parameters_are_frozen_with_its_stem():
    recipe = NETWORK | {"BACKBONE": "vit_tiny_patch16_224", "TRAINABLE_STAGES": 3}
    with torch.device("meta"):
        model = common.build_model(recipe, 5, 0)
    parameters = model.backbone.named_parameters()
    trainable = [name for name, parameter in parameters if parameter.requires_grad]
    assert {name.split(".")[0] for name in trainable} == {"blocks", "norm"}
    assert "blocks.9.attn.qkv.weight" in trainable
    assert not any(name.startswith("blocks.8.") for name in trainable)


# --------------------------------------------------------------------------------------- script 21
@pytest.fixture(scope="module")
def backbones(finished):
    """Table of script 21's records."""
    return table_of(finished("21")[1])


def test_every_backbone_has_its_rows_and_is_tuned_but_for_the_frozen_one(backbones, finished):
    names = ["mobilenetv3_small_050", "resnet10t", "resnet10t frozen"]
    assert backbones["setting"].tolist() == [name for name in names for _ in range(2)]
    for row in backbones.itertuples():
        frozen = row.parameters_backbone if row.setting == "resnet10t frozen" else 0
        assert row.parameters_trainable == row.parameters_total - frozen
    assert (backbones[["images_per_s", "peak_memory_mb"]] > 0).all(axis=None)
    assert (finished("21")[0] / "r_against_parameters.png").stat().st_size > 5000


def test_without_epochs_no_backbone_is_called_trainable(simulated, tmp_path):
    options = SMALL_RUNS["21"] | {"head_start": "ridge", "hidden": 0, "epochs": 0}
    stdout = stdout_of("21", data_root=simulated, out=tmp_path, **options)
    assert {*table_of(stdout)["setting"]} == {*SMALL_RUNS["21"]["BACKBONES"]}
    assert "ridges on backbones, none of which is trained: test slide" in stdout
    assert "trainable" not in stdout


def test_backbones_are_measured_in_resnet50s(backbones, finished):
    """A backbone's parameters as a share of ResNet-50's stand in the printed table."""
    head, lines = printed_table(finished("21")[1], "backbones, all stages trainable")
    assert "of ResNet-50" in head
    for line, setting in zip(lines, backbones["setting"].unique(), strict=True):
        assert line.startswith(setting)
        own = backbones["parameters_backbone"][backbones["setting"] == setting].iloc[0]
        assert f" {own / 1e6:.1f} " in line
        assert f" {own / PUBLISHED['resnet50']:.2f} " in line


def test_one_backbone_alone_has_the_same_rows(backbones, copied, simulated):
    options = SMALL_RUNS["21"] | {"only": "resnet10t frozen"}
    out = copied("21")
    again = table_of(stdout_of("21", data_root=simulated, out=out, **options))
    frozen = backbones.query("setting == 'resnet10t frozen'").reset_index(drop=True)
    pd.testing.assert_frame_equal(again, frozen)
    # Differences of an earlier start are not its own.
    assert not (out / "paired_differences.csv").exists()


def test_memory_of_one_row_is_not_that_of_a_row_before(simulated, tmp_path):
    """Peak memory of the process starts anew with each training where the system can."""
    options = TINY | {"epochs": 1, "FROZEN": ()}
    options |= {"BACKBONES": ("resnet50", "mobilenetv3_small_050")}
    rows = table_of(stdout_of("21", data_root=simulated, out=tmp_path, **options))
    peaks = rows.groupby("setting")["peak_memory_mb"].first()
    assert peaks["mobilenetv3_small_050"] < peaks["resnet50"]


TOO_SMALL = ("resnet18", "inception_v3")  # an image of 32 px is too small for the second


@pytest.mark.parametrize("name, options, words", [
    ("21", {"only": "resnet5"}, ["--only resnet5", "efficientnet_b0", "resnet50 frozen"]),
    ("21", {"BACKBONES": ("resnet18", "resnet51")}, ["resnet51", "timm"]),
    ("21", {"BACKBONES": TOO_SMALL}, ["inception_v3", "--image-size 32"]),
    ("21", {"pretrained": True, "BACKBONES": ("efficientnet_b7",)}, ["efficientnet_b7", "no pretrained weights"]),
    ("22", {"protocol": "loso"}, ["--protocol loso", "--target lognorm"]),
    ("22", {"folds": 40}, ["40: 30 spots", "too few", "so many folds"]),
    ("22", {"epochs": 0}, ["--epochs 0", "from 1"]),
    ("23", {"epochs": 0}, ["--epochs 0", "from 1"]),
    ("24", {"epochs": 0}, ["--epochs 0", "from 1"]),
    ("22", {"STAGES": (0, 12), "HIDDENS": (0,)}, ["TRAINABLE_STAGES 12", "9 stages"]),
    ("23", {"only": "mpa2"}, ["--only mpa2", "stnet_color"]),
    ("25", {"only": "bleep"}, ["--only bleep", "BLEEP"]),
])  # fmt: skip
def test_refused_before_anything_is_trained(simulated, tmp_path, monkeypatch, name, options, words):
    monkeypatch.setattr(common, "fit", lambda *a, **k: pytest.fail("a training began"))
    small = {"pretrained": False, "image_size": 32, "target": "harmony"}
    if name != "22":
        small["hidden"] = 4
    out = tmp_path / "out"
    expect_refusal(words, name, data_root=simulated, out=out, **(small | options))
    assert {path.name for path in out.rglob("*") if path.is_file()} <= {".lock"}


# -------------------------------------------------------------------------------- script 22: folds
def two_slides():
    """Visium's hexagonal grid, 24 x 40 positions, pitch 100 px, on two training slides and a test
    slide.
    """
    places = [(row, 2 * column + row % 2) for row in range(24) for column in range(40)]
    grid = pd.DataFrame(places, columns=["array_row", "array_col"])
    grid = pd.concat([grid.assign(tissue_index=slide) for slide in (1, 2, 3)], ignore_index=True)
    grid["pxl_row"] = np.rint(grid["array_row"] * 100 * 3**0.5 / 2).astype(int) + 250
    grid = grid.assign(pxl_col=grid["array_col"] * 50 + 400, id=grid.index.astype(str), pitch=100.0)
    grid["donor"] = "one"
    corners = grid[["tissue_index", "pxl_col", "pxl_row"]].to_numpy()
    return grid.assign(block=[f"{slide}:{x // 500}:{y // 500}" for slide, x, y in corners])


def fold_roles(spots, protocol, seed=42, folds=5):
    """The folds of the spots on slides 1 and 2; slide 3 is the test slide."""
    pool = np.flatnonzero(spots["tissue_index"] < 3)
    return splitting.split_folds(spots, pool, protocol, folds, seed)


@pytest.mark.parametrize(
    "protocol, folds, spread", [("paper", 5, 1), ("block", 5, 25), ("loso", 2, 1)]
)
def test_folds_are_disjoint_exhaustive_and_of_the_seed(protocol, folds, spread):
    spots = two_slides()
    trainings = fold_roles(spots, protocol, folds=folds)
    assert len(trainings) == folds
    test = spots["tissue_index"] == 3
    times = np.sum([roles == "valid" for roles in trainings], axis=0)
    assert (times[~test] == 1).all()
    for roles in trainings:
        assert (roles[test] == "").all()
        assert (roles == "valid").sum() == pytest.approx((~test).sum() / folds, abs=spread)
    assert np.array_equal(trainings, fold_roles(spots, protocol, seed=42, folds=folds))
    other = fold_roles(spots, protocol, seed=43, folds=folds)
    assert np.array_equal(trainings, other) == (protocol == "loso"), "slides do not change"


def test_under_loso_a_donor_who_validates_does_not_train():
    spots = two_slides().assign(
        donor=lambda spots: spots["tissue_index"].map({1: "B", 2: "A", 3: "B"})
    )
    pool = np.arange(len(spots))
    trainings = splitting.split_folds(spots, pool, "loso", 5, 42)
    valid = [spots["tissue_index"][roles == "valid"].unique().tolist() for roles in trainings]
    assert valid == [[1, 3], [2]]


def nearest_training_spot(spots, roles):
    """Smallest distance in px from a validation spot to a training spot of its slide."""
    distances = []
    for _, of in spots.assign(role=roles).groupby("tissue_index"):
        valid = of.loc[of["role"] == "valid", ["pxl_col", "pxl_row"]]
        train = of.loc[of["role"] == "train", ["pxl_col", "pxl_row"]]
        if len(valid):
            distances.append(cdist(valid, train).min())
    return min(distances)


def test_blocks_are_really_apart():
    """The pitch is 100 px; spots drawn at random have a neighbour in training."""
    spots = two_slides()
    for roles in fold_roles(spots, "block"):
        assert nearest_training_spot(spots, roles) > 200
    for slide in (1, 2):
        one = spots[spots["tissue_index"] == slide]
        for roles in fold_roles(spots, "paper"):
            assert nearest_training_spot(one, roles[one.index]) <= 101


def test_no_block_is_cut_in_two():
    spots = two_slides()
    pool = spots["tissue_index"] < 3
    roles = fold_roles(spots, "block")[0][pool]
    square = (spots[["pxl_col", "pxl_row"]] // 500).assign(slide=spots["tissue_index"])[pool]
    square = pd.factorize(pd.MultiIndex.from_frame(square))[0]
    assert pd.Series(roles == "valid").groupby(square).nunique().max() == 1
    assert 0.3 < (roles == "train").mean() < 0.8


def test_under_block_the_test_slide_decides_nothing(simulated, tmp_path, monkeypatch):
    """Other counts, variable genes and published lists: the same panel, lists, folds and
    scores in validation.
    """
    root = tmp_path / "root"
    shutil.copytree(simulated / "dataset", root / "dataset")
    options = TINY_SEARCH | {"protocol": "block", "STAGES": (0,), "HIDDENS": (0,)}
    load_dataset, read_h5ad = common.load_dataset, anndata.read_h5ad

    def search(out):
        rows = rows_of(stdout_of("22", data_root=root, out=out, **options))
        for row in rows:
            del row["folder"]
        return without_timing(rows)

    def load_with_noise(root, target):
        data = load_dataset(root, target)
        test = (data.spots["tissue_index"] == 3).to_numpy()
        noise = np.random.default_rng(0).gamma(1, size=data.lognorm.shape).astype(np.float32)
        changed = np.where(test[:, None], noise, data.lognorm)
        return dataclasses.replace(data, lognorm=changed, target=changed)

    def read_with_other_variable_genes(path):
        table = read_h5ad(path)
        if path.name == "counts.h5ad":
            table.var["hvg_3"] = ~table.var["hvg_3"]
        return table

    monkeypatch.setattr(common, "MARGIN", 0)  # Ten spots a slide leave no room.
    quiet = search(tmp_path / "quiet")
    # As if ranked on the test slide.
    (root / "gene_sets.csv").write_text("group,gene\nHEG,ALB\nHVG,ALB\n")
    monkeypatch.setattr(common, "load_dataset", load_with_noise)
    monkeypatch.setattr(anndata, "read_h5ad", read_with_other_variable_genes)
    loud = search(tmp_path / "loud")
    assert without_test(quiet) == without_test(loud)
    assert quiet != loud


def without_test(rows):
    """The rows but for those of the test slide."""
    return [row for row in rows if row["split"] != "test"]


# --------------------------------------------------------------------------- script 22: the search
@pytest.fixture(scope="module")
def searched(finished):
    """(output folder, stdout, table of rows) of script 22 on a grid of four settings, two folds."""
    return *finished("22"), table_of(finished("22")[1])


def test_search_validates_folds_and_then_tests_once(searched):
    _, _, rows = searched
    assert rows["split"].value_counts().to_dict() == {"valid": 8, "test": 1}
    valid = rows[rows["split"] == "valid"]
    assert set(valid["n_spots"]) == {15}
    assert set(valid["fold"]) == {0, 1}


def test_search_ranks_by_heg_in_validation_and_trains_the_best(searched):
    out, stdout, rows = searched
    valid = rows[rows["split"] == "valid"].astype({"heg": float}).groupby("setting")
    ranked = pd.DataFrame({"genes": valid["heg_n"].min(), "heg": valid["heg"].mean()})
    ranked["heg"] *= ranked["genes"] == ranked["genes"].max()  # Those of fewer genes stand last.
    ranked = ranked.sort_values("heg", ascending=False).index.tolist()
    assert f"chosen for slide 3, seed 42: {ranked[0]}, " in stdout
    (chosen,) = rows[rows["split"] == "test"].itertuples()
    assert chosen.setting == "chosen by search"
    recipe = json.loads((out / chosen.folder / "recipe.json").read_text())
    assert f"stages={recipe['TRAINABLE_STAGES']} hidden={recipe['HIDDEN']}" == ranked[0]
    _, lines = printed_table(stdout, "best setting first")
    assert [" ".join(line.split()[:2]) for line in lines] == ranked
    assert (out / "search.png").stat().st_size > 5000


def check_folds_columns(stdout, rows, truth):
    """The printed search shows mean±sd over the folds of each setting against this truth."""
    _, lines = printed_table(stdout, "best setting first")
    valid = rows[(rows["split"] == "valid") & (rows["truth"] == truth)]
    for line in lines:
        of = valid[valid["setting"] == " ".join(line.split()[:2])]
        heg, hvg = of["heg"].astype(float), of["hvg"].astype(float)
        assert f" {heg.mean():.3f}±{heg.std():.3f}" in line
        assert f" {hvg.mean():.3f}" in line


def test_folds_of_a_search_learn_from_other_spots_and_differ(searched):
    out, stdout, rows = searched
    check_folds_columns(stdout, rows, "lognorm")
    for row in rows[rows["split"] == "valid"].itertuples():
        table = anndata.read_h5ad(out / row.folder / "predictions.h5ad")
        split = pd.read_csv(out / row.folder / "split.csv")
        assert not set(split["id"][split["role"] == "train"]) & set(table.obs_names)
        assert set(split["fold"]) == {row.fold}


def test_the_final_training_has_no_validation_and_keeps_its_folds_best_epoch(searched):
    out, _, rows = searched
    (final,) = rows[rows["split"] == "test"].itertuples()
    role = pd.read_csv(out / final.folder / "split.csv")["role"]
    assert role.value_counts().to_dict() == {"train": 30, "test": 10}
    best = rows[rows["split"] == "valid"].groupby("setting")["heg"].mean().idxmax()
    folds = rows["folder"][rows["setting"] == best]
    curves = [pd.read_csv(out / folder / "history.csv")["valid_mse"] for folder in folds]
    assert final.best_epoch == np.mean(curves, axis=0).argmin() + 1
    history = pd.read_csv(out / final.folder / "history.csv")
    assert len(history) == final.best_epoch
    assert history["valid_mse"].isna().all()


def test_search_under_harmony_with_two_seeds_keeps_truths_apart(simulated, tmp_path):
    options = TINY_SEARCH | {"target": "harmony", "seeds": (42, 43)}
    options |= {"STAGES": (0,), "HIDDENS": (0,)}
    stdout = stdout_of("22", data_root=simulated, out=tmp_path, **options)
    rows = table_of(stdout)
    assert rows.groupby(["split", "truth"]).size().to_dict() == {
        (split, truth): n
        for split, n in (("test", 2), ("valid", 4))
        for truth in ("harmony", "lognorm")
    }
    check_folds_columns(stdout, rows, "harmony")
    by_truth = rows[rows["split"] == "valid"].groupby("truth")["heg"].mean()
    assert by_truth["harmony"] != by_truth["lognorm"]


def valid_record(setting, heg, hvg, **changed):
    """What rank_settings looks at of a record."""
    record = {"setting": setting, "heg": heg, "hvg": hvg}
    return record | {"split": "valid", "truth": "lognorm", "heg_n": 50} | changed


def test_ranking_is_by_r_in_validation_and_never_by_nan():
    script = load_script("22")
    script.TARGET = "lognorm"
    records = [
        valid_record("undefined", None, 0.9),
        valid_record("second", 0.3, 0.1),
        valid_record("first", 0.3, 0.2),
        valid_record("test is not looked at", 0.1, 0.1),
        valid_record("test is not looked at", 0.9, 0.9, split="test"),
        valid_record("nor the other truth", 0.9, 0.9, truth="harmony"),
        valid_record("no hvg", 0.3, None),
        valid_record("best of a few genes", 0.8, 0.8, heg_n=3),
        valid_record("best where it is defined", 0.8, 0.8),
        valid_record("best where it is defined", None, 0.8, heg_n=0),
    ]
    # In a second fold the others have as many genes again.
    for name, heg in (("second", 0.3), ("first", 0.3), ("no hvg", 0.3)):
        records.append(valid_record(name, heg, None if name == "no hvg" else 0.1))
    for name in ("test is not looked at", "best of a few genes"):
        records.append(valid_record(name, 0.1, 0.1))
    ranked = ["first", "second", "no hvg", "test is not looked at"]
    assert script.rank_settings([SimpleNamespace(lines=records)]) == ranked
    undefined = [valid_record("undefined", None, 0.9, heg_n=0)]
    with pytest.raises(InputError, match="no setting"):
        script.rank_settings([SimpleNamespace(lines=undefined)])


def test_a_killed_search_loses_no_row_and_computes_none_twice(
    searched, simulated, tmp_path, monkeypatch, capsys
):
    options = TINY_SEARCH | SMALL_GRID | {"data_root": simulated, "out": tmp_path}
    fit, began = common.fit, []

    def stop_in_the_sixth(*arguments, report=None, **more):
        began.append(more["checkpoint"].parent.name)

        def report_or_stop(history, best_epoch):
            if len(began) == 6 and history[-1]["epoch"] == 2:
                raise KeyboardInterrupt
            report(history, best_epoch)

        return fit(*arguments, report=report_or_stop if report else None, **more)

    monkeypatch.setattr(common, "fit", stop_in_the_sixth)
    assert run_script("22", **options) == 130
    assert len(list(tmp_path.glob("*/rows.json"))) == 5
    assert pd.read_csv(tmp_path / "rows.csv")["folder"].nunique() == 5
    first = began.copy()
    capsys.readouterr()
    resumed = stdout_of("22", **options)
    assert f"going on after epoch 1 of 3 ({tmp_path / first[5]}" in resumed
    assert began[6] == first[5]
    assert len(began) == 6 + 4, "8 folds, of which one began twice, and the final one"
    assert not set(began[7:]) & set(first)
    whole = without_timing(rows_of(searched[1]))
    assert without_timing(rows_of(resumed)) == whole, "as if nothing had happened"
    (tmp_path / "rows.csv").unlink()
    assert run_script("22", **options) == 0
    assert len(pd.read_csv(tmp_path / "rows.csv")) == len(whole), "mended from the rows' folders"


# --------------------------------------------------------------------------------------- script 23
@pytest.fixture
def images():
    return torch.rand((9, 3, 20, 24), generator=torch.Generator().manual_seed(0)) * 255


def test_colour_equals_torchvision_image_by_image(images):
    images[0] = 128  # Grey has no hue.
    images[1, :, :4] = torch.tensor([255.0, 0, 0])[:, None, None]
    uniform = torch.rand((9, 4), generator=torch.Generator().manual_seed(1)) * 2 - 1
    factors = torch.tensor([1.0, 1, 1, 0]) + uniform * torch.tensor([0.4, 0.4, 0.4, 0.3])
    got = load_script("23").change_colour(images, factors)
    for image, changed, values in zip(images, got, factors.tolist(), strict=True):
        brightness, contrast, saturation, hue = values
        expected = torchvision.adjust_brightness(image / 255, brightness)
        expected = torchvision.adjust_contrast(expected, contrast)
        expected = torchvision.adjust_saturation(expected, saturation)
        expected = torchvision.adjust_hue(expected, hue)
        torch.testing.assert_close(changed / 255, expected, rtol=0, atol=2e-4)


def test_blur_equals_torchvision_image_by_image(images):
    size = torch.tensor([3, 5, 3, 5, 5, 3, 3, 5, 5])
    got = load_script("23").blur_gaussian(images, size)
    for image, side, blurred in zip(images, size.tolist(), got, strict=True):
        sigma = 0.3 * ((side - 1) * 0.5 - 1) + 0.8
        expected = torchvision.gaussian_blur(image / 255, [side, side], [sigma, sigma])
        torch.testing.assert_close(blurred / 255, expected, rtol=0, atol=1e-5)


def change_with_seed(step, images):
    """The step's training output, its draws from seed 0."""
    torch.manual_seed(0)
    return step.train()(images)


def test_colour_is_changed_as_often_as_stated(images):
    many = images[2:3].expand(2000, -1, -1, -1)
    changed = change_with_seed(load_script("23").ColourAndBlur(), many)
    untouched = (changed == many).flatten(1).all(1).float().mean()
    assert untouched == pytest.approx(0.5 * 0.8, abs=0.04)
    assert changed.min() >= 0
    assert changed.max() <= 255.01


def test_colour_follows_torchs_seed_and_mixed_precision_leaves_it_alone(images):
    """So a resumed epoch repeats it; and it is for training alone."""
    step = load_script("23").ColourAndBlur()
    assert torch.equal(step.eval()(images), images)
    changed = change_with_seed(step, images)
    assert not torch.equal(changed, images)
    assert torch.equal(changed, change_with_seed(step, images))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(changed, change_with_seed(step, images))


@pytest.mark.parametrize("aug", ["mpa", "stnet", "none", "stnet_color"])
def test_colour_stands_before_the_network_of_stnet_color_alone(paper_split, monkeypatch, aug):
    script, seen = load_script("23"), {}
    setting = script.setting_of(aug)
    row = rows.Row(aug, NETWORK | setting, paper_split, None)
    monkeypatch.setattr(row, "fit", lambda network, patches, **how: seen.update(how, it=network))
    monkeypatch.setattr(row, "predict", lambda network, patches: network)
    assert script.network(row) is seen["it"]
    if aug == "stnet_color":
        assert setting["AUG"] == "stnet"
        assert isinstance(seen["it"][0], script.ColourAndBlur)
        assert seen["it"][1] is seen["model"]
    else:
        assert setting["AUG"] == aug
        assert seen["it"] is seen["model"]


AUGS = ("mpa", "mpa_stain", "stnet", "stnet_color", "none")


@pytest.fixture(scope="module")
def compared(finished):
    """(output folder, table of records) of script 23 with two seeds."""
    out, stdout = finished("23")
    return out, table_of(stdout)


def test_every_augmentation_has_its_rows(compared):
    _, rows = compared
    anew = [f"{name}, {kind}" for name in AUGS for kind in ("8 views", "stain shift")]
    ridges = ["ridge (colour)", "ridge (colour), stain shift"]
    assert sorted(rows["setting"].unique()) == sorted([*AUGS, *anew, *ridges])
    assert set(rows["setting"].value_counts()) == {4}
    assert rows["weights"].notna().all()
    networks = rows[~rows["setting"].str.startswith("ridge")]
    assert networks["parameters_total"].notna().all()


def test_augmentations_are_printed_with_sd_and_differences(finished):
    out, stdout = finished("23")
    head, lines = printed_table(stdout, "augmentations; 8 views")
    assert "HEG minus" in head
    assert "±" in lines[0]
    (shifted,) = [line for line in lines if line.startswith("ridge (colour), stain shift")]
    assert shifted.endswith("] ridge (colour)"), "the interval and what it is of are not cut"
    assert (out / "paired_differences.png").is_file()


def heg_r(out, rows, seed, setting):
    """r of the HEG (of this seed's training spots) on the test slide."""
    of = rows[(rows["seed"] == seed) & (rows["setting"] == setting)]
    folder = out / of["folder"].iloc[0]
    lists = pd.read_csv(folder / "genes.csv")
    r = pd.read_csv(folder / "per_gene.csv", index_col="gene")["test_lognorm_r"]
    return r.reindex(lists["gene"][lists["group"] == "HEG"])


def test_differences_are_paired_by_seed(compared):
    out, rows = compared
    by_seed = []
    for seed in (42, 43):
        difference = heg_r(out, rows, seed, "none") - heg_r(out, rows, seed, "mpa")
        by_seed.append(difference.mean())
    table = pd.read_csv(out / "paired_differences.csv").set_index(["setting", "group"])
    line = table.loc["none", "HEG"]
    assert line["difference"] == pytest.approx(np.mean(by_seed))
    assert line["n"] == 2
    assert line["minus"] == "mpa"


def test_differences_are_to_mpa_with_as_many_views(compared):
    table = pd.read_csv(compared[0] / "paired_differences.csv")
    found = table.drop_duplicates("setting").set_index("setting")["minus"].to_dict()
    expected = {"mpa, 8 views": "mpa"}
    for views in ("", ", 8 views"):
        expected |= {f"{name}{views}": f"mpa{views}" for name in AUGS[1:]}
    expected |= {f"{name}, stain shift": name for name in (*AUGS, "ridge (colour)")}
    assert found == expected


@pytest.mark.parametrize("seed", [42, 43])
@pytest.mark.parametrize("aug", ["mpa", "none"])
def test_views_are_averaged_over_the_rows_own_weights(compared, simulated, aug, seed):
    out, rows = compared
    rows = rows[(rows["split"] == "test") & (rows["seed"] == seed)].set_index("setting")
    data = common.load_dataset(simulated, "lognorm")
    model = common.build_model(NETWORK | {"HIDDEN": 16}, len(data.genes), 0)
    weights = out / rows.loc[aug, "folder"] / "weights.safetensors"
    model.load_state_dict(safetensors.torch.load_file(weights))
    folder = out / rows.loc[f"{aug}, 8 views", "folder"]
    table = anndata.read_h5ad(folder / "predictions.h5ad")
    spots = pd.Index(data.spots["id"]).get_indexer(table.obs_names)
    patches = common.place_patches(data.patches, 32, torch.device("cpu"))
    predicted = common.predict(model, patches, spots, dtype=torch.float32, tta=True)
    np.testing.assert_allclose(table.X, predicted, atol=1e-4)


@pytest.fixture(scope="module")
def few_genes(simulated, tmp_path_factory):
    """Data root whose published lists have five HEG and nothing else."""
    root = tmp_path_factory.mktemp("few") / "root"
    shutil.copytree(simulated / "dataset", root / "dataset")
    genes = common.load_dataset(simulated, "lognorm").genes[:5]
    lines = [f"HEG,{gene}\n" for gene in genes]
    (root / "gene_sets.csv").write_text("group,gene\n" + "".join(lines))
    return root


# Under another target the published lists are not read.
FEW = {
    "22": TINY_SEARCH | {"target": "harmony", "STAGES": (0,), "HIDDENS": (0,)},
    "23": TINY | {"target": "harmony", "epochs": 1, "seeds": (42,), "AUGS": ("mpa", "none")},
}


@pytest.mark.parametrize("name", FEW)
def test_a_group_without_genes_is_a_dash_in_every_table(few_genes, tmp_path, name):
    stdout = stdout_of(name, data_root=few_genes, out=tmp_path, **FEW[name])
    assert " gene_sets.csv" in stdout, "the lists are read"
    printed = stdout.splitlines()[:-1]
    assert not [line for line in printed if "nan" in line]
    differences = [len(pd.read_csv(path)) for path in tmp_path.glob("paired_differences.csv")]
    assert differences == ([6 * 4] if name == "23" else [])
