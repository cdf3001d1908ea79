"""Scripts 21, 22 and 23: what is trainable, what stays frozen, folds, resuming, ranking, colour augmentation."""

import dataclasses
import json

import anndata
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import timm
import torch
from conftest import TINY, load_script, run_script
from scipy.spatial.distance import cdist
from torchvision.transforms.v2 import functional as torchvision

import common

NETWORK = {"BACKBONE": "efficientnet_b0", "HIDDEN": 8, "PRETRAINED": False, "TRAINABLE_STAGES": -1}
GRID = TINY[:-6] + TINY[-4:]  # without --hidden
TINY_22 = ("--image-size", 32, "--epochs", 3, "--batch-size", 8, "--learning-rate", 0.003, "--folds", 2)
TINY_22 += ("--pretrained", "false", "--device", "cpu", "--target", "lognorm")
SMALL_GRID = {"STAGES": (0, 1), "HIDDENS": (0, 4)}


def last_json(stdout):
    return json.loads(stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------- what is trainable

# Parameters of the whole network as torchvision's documentation lists them, less its classifier of 1,000 classes.
PUBLISHED = {
    "efficientnet_b0": 5_288_548 - 1281 * 1000,
    "tf_efficientnet_b7.ra_in1k": 66_347_960 - 2561 * 1000,
    "resnet18": 11_689_512 - 513 * 1000,
    "resnet50": 25_557_032 - 2049 * 1000,
    "densenet121": 7_978_856 - 1025 * 1000,
    "mobilenetv2_100": 3_504_872 - 1281 * 1000,
}


@pytest.mark.parametrize("backbone", PUBLISHED)
def test_every_backbone_is_whole_and_wholly_trainable(backbone):
    with torch.device("meta"):
        model = common.build_model(NETWORK | {"BACKBONE": backbone}, 5, 0)
        frozen = common.build_model(NETWORK | {"BACKBONE": backbone, "TRAINABLE_STAGES": 0}, 5, 0)
    head = (model.head[1].in_features + 1) * 8 + 9 * 5
    total = PUBLISHED[backbone] + head
    assert common.count_parameters(model) == {"backbone": PUBLISHED[backbone], "trainable": total, "total": total}
    assert common.count_parameters(frozen) == {"backbone": PUBLISHED[backbone], "trainable": head, "total": total}


def test_every_default_backbone_has_pretrained_weights():
    backbones = load_script("21").BACKBONES
    assert set(backbones) == set(PUBLISHED)
    assert all(timm.get_pretrained_cfg(name).hf_hub_id for name in backbones)


def mbconv(inputs, outputs, kernel, expansion):
    """Parameters of one block of EfficientNet's table, by hand: convolutions without bias, two numbers a BatchNorm."""
    wide, squeezed = inputs * expansion, inputs // 4
    expand = (inputs * wide + 2 * wide) * (expansion > 1)
    depthwise = kernel**2 * wide + 2 * wide
    squeeze_and_excite = wide * squeezed + squeezed + squeezed * wide + wide
    return expand + depthwise + squeeze_and_excite + wide * outputs + 2 * outputs


def stages_by_hand():
    """EfficientNet-B0's nine: stem, the seven stages of Tan and Le's table 1, head convolution."""
    table = [(1, 16, 1, 3), (6, 24, 2, 3), (6, 40, 2, 5), (6, 80, 3, 3), (6, 112, 3, 5), (6, 192, 4, 5), (6, 320, 1, 3)]
    stages, inputs = [3 * 3 * 3 * 32 + 2 * 32], 32
    for expansion, outputs, blocks, kernel in table:
        first = mbconv(inputs, outputs, kernel, expansion)
        stages.append(first + (blocks - 1) * mbconv(outputs, outputs, kernel, expansion))
        inputs = outputs
    return [*stages, 320 * 1280 + 2 * 1280]


@pytest.mark.parametrize("stages", [0, 1, 3, 5, 7, 9, -1])
def test_trainable_parameters_of_each_stage_setting(stages):
    by_hand = stages_by_hand()
    assert len(by_hand) == 9 and sum(by_hand) == PUBLISHED["efficientnet_b0"]
    with torch.device("meta"):
        model = common.build_model(NETWORK | {"TRAINABLE_STAGES": stages}, 5, 0)
    head = 1281 * 8 + 9 * 5
    assert common.count_parameters(model)["trainable"] == head + sum(by_hand[9 - stages :] if stages >= 0 else by_hand)
    names = [name for name, parameter in model.backbone.named_parameters() if parameter.requires_grad]
    first = {0: "nothing", 1: "conv_head", 3: "blocks.5", 5: "blocks.3", 7: "blocks.1"}.get(stages, "conv_stem")
    assert [*names, "nothing"][0].startswith(first)


@pytest.mark.parametrize("stages", [0, 1, 3, 5, 7, 9])
def test_frozen_stages_are_bit_equal_after_training(stages):
    rng = np.random.default_rng(0)
    patches = torch.from_numpy(rng.integers(0, 256, (10, 3, 32, 32), np.uint8))
    target = rng.normal(size=(10, 5)).astype(np.float32)
    model = common.build_model(NETWORK | {"TRAINABLE_STAGES": stages}, 5, 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recipe = {"LEARNING_RATE": 1e-2, "EPOCHS": 1, "BATCH_SIZE": 5, "AUG": "none"}
    common.fit(model, patches, target, np.arange(7), np.arange(7, 10), recipe=recipe, seed=1, dtype=torch.float32)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    parts = [("conv_stem", "bn1"), *((f"blocks.{i}.",) for i in range(7)), ("conv_head", "bn2")]
    for number, prefixes in enumerate(parts):
        own = {name for name in before if name.startswith(tuple(f"backbone.{prefix}" for prefix in prefixes))}
        statistics = {name for name in own if "running" in name}
        assert own and statistics
        if number < 9 - stages:
            assert not own & changed, number
        else:
            assert statistics <= changed and own & changed - statistics, number
    assert any(name.startswith("head") for name in changed)


def test_a_transformers_own_parameters_are_frozen_with_its_stem():
    with torch.device("meta"):
        model = common.build_model(NETWORK | {"BACKBONE": "vit_tiny_patch16_224", "TRAINABLE_STAGES": 3}, 5, 0)
    free = [name for name, parameter in model.backbone.named_parameters() if parameter.requires_grad]
    assert {name.split(".")[0] for name in free} == {"blocks", "norm"} and "blocks.9.attn.qkv.weight" in free
    assert not any(name.startswith("blocks.8.") for name in free)


# ------------------------------------------------------------------------------------- script 21


def test_backbones_end_to_end(simulated, tmp_path, capsys):
    arguments = ("--data-root", simulated, "--out", tmp_path, *TINY, "--target", "lognorm")
    changed = {"BACKBONES": ("mobilenetv3_small_050", "resnet10t"), "FROZEN": ("resnet10t",)}
    assert run_script("21", *arguments, **changed) == 0
    stdout = capsys.readouterr().out
    rows = pd.DataFrame(last_json(stdout)["rows"])
    names = ["mobilenetv3_small_050", "resnet10t", "resnet10t frozen"]
    assert rows["setting"].tolist() == [name for name in names for _ in range(2)] and "x)" in stdout
    tuned = rows[rows["setting"] != "resnet10t frozen"]
    assert (tuned["parameters_trainable"] == tuned["parameters_total"]).all()
    frozen = rows[rows["setting"] == "resnet10t frozen"].iloc[0]
    assert frozen["parameters_trainable"] == frozen["parameters_total"] - frozen["parameters_backbone"]
    assert (rows[["images_per_s", "peak_memory_mb"]] > 0).all(axis=None)
    assert (tmp_path / "r_against_parameters.png").stat().st_size > 5000
    assert run_script("21", *arguments, "--only", "resnet10t frozen", **changed) == 0
    again = last_json(capsys.readouterr().out)["rows"]
    assert again == rows.query("setting == 'resnet10t frozen'").to_dict("records")


def test_memory_of_one_row_is_not_that_of_a_row_before(simulated, tmp_path, capsys):
    """Peak memory of the process starts anew with each training where the system can."""
    changed = {"BACKBONES": ("resnet50", "mobilenetv3_small_050"), "FROZEN": ()}
    assert run_script("21", "--data-root", simulated, "--out", tmp_path, *TINY, "--epochs", 1, **changed) == 0
    peaks = {row["setting"]: row["peak_memory_mb"] for row in last_json(capsys.readouterr().out)["rows"]}
    assert peaks["mobilenetv3_small_050"] < peaks["resnet50"]


@pytest.mark.parametrize(
    "name, arguments, changed, words",
    [
        ("21", ["--only", "resnet5"], {}, ["--only resnet5", "efficientnet_b0", "resnet50 frozen"]),
        ("21", [], {"BACKBONES": ("resnet18", "resnet51")}, ["resnet51", "timm"]),
        ("21", [], {"BACKBONES": ("resnet18", "vit_tiny_patch16_224")}, ["vit_tiny_patch16_224", "--image-size 224"]),
        (
            "21",
            ["--pretrained", "true"],
            {"BACKBONES": ("efficientnet_b7",)},
            ["efficientnet_b7", "no pretrained weights"],
        ),
        ("21", ["--protocol", "block"], {}, ["--protocol block", "--target lognorm"]),
        ("22", ["--protocol", "loso"], {}, ["--protocol loso", "--target lognorm"]),
        ("22", ["--protocol", "block", "--target", "harmony"], {}, ["--protocol block", "--target lognorm"]),
        ("22", ["--folds", "1"], {}, ["--folds 1", "from 2"]),
        ("22", ["--folds", "40"], {}, ["40: 30 spots", "fewer"]),
        ("22", ["--folds", "99"], {}, ["99: 30 spots", "fewer"]),
        ("22", [], {"STAGES": (0, 12), "HIDDENS": (0,)}, ["TRAINABLE_STAGES 12", "9 stages"]),
        ("23", ["--only", "mpa2"], {}, ["--only mpa2", "stnet_color"]),
    ],
)
def test_refused_before_anything_is_trained(simulated, tmp_path, monkeypatch, capsys, name, arguments, changed, words):
    monkeypatch.setattr(common, "fit", lambda *a, **k: pytest.fail("a training began"))
    small = [] if name == "22" else ["--hidden", 4]
    common_part = ["--data-root", simulated, "--out", tmp_path / "out", "--pretrained", "false", "--image-size", 32]
    assert run_script(name, *common_part, *small, *arguments, **changed) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(word in error for word in words), error
    assert {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()} <= {".lock"}


# ------------------------------------------------------------------------------------- script 22: folds


def two_slides():
    """Visium's hexagonal grid, 24 x 40 positions, pitch 100 px, on two training slides and a test slide."""
    grid = pd.DataFrame([(r, 2 * c + r % 2) for r in range(24) for c in range(40)], columns=["array_row", "array_col"])
    grid = pd.concat([grid.assign(tissue_index=slide) for slide in (1, 2, 3)], ignore_index=True)
    grid["pxl_row"] = np.rint(grid["array_row"] * 100 * 3**0.5 / 2).astype(int) + 250
    grid = grid.assign(pxl_col=grid["array_col"] * 50 + 400, id=grid.index.astype(str), pitch=100.0)
    square = [f"{s}:{x // 500}:{y // 500}" for s, x, y in grid[["tissue_index", "pxl_col", "pxl_row"]].to_numpy()]
    return grid.assign(block=square)


def fold_roles(spots, protocol, seed=42, folds=5):
    """The folds of the spots on slides 1 and 2; slide 3 is the test slide."""
    pool = np.flatnonzero(spots["tissue_index"] < 3)
    return pool, common.split_folds(spots, pool, protocol, folds, seed)


@pytest.mark.parametrize("protocol, folds", [("paper", 5), ("block", 5), ("loso", 2)])
def test_folds_are_disjoint_and_exhaustive(protocol, folds):
    spots = two_slides()
    pool, trainings = fold_roles(spots, protocol, folds=folds)
    times, test = np.sum([roles == "valid" for roles in trainings], axis=0), np.arange(len(spots)) > pool[-1]
    assert len(trainings) == folds and (times[~test] == 1).all() and (times[test] == 0).all()
    for roles in trainings:
        assert (roles[test] == "").all()
        spread = 25 if protocol == "block" else 1
        assert (roles == "valid").sum() == pytest.approx(len(spots) * 2 / 3 / folds, abs=spread)
    again, other = (fold_roles(spots, protocol, seed, folds)[1] for seed in (42, 43))
    assert np.array_equal(trainings, again) and np.array_equal(trainings, other) == (protocol == "loso")


def test_blocks_are_really_apart():
    spots = two_slides()
    xy, slide = spots[["pxl_col", "pxl_row"]].to_numpy(float), spots["tissue_index"].to_numpy()
    nearest = {
        protocol: [
            cdist(xy[(roles == "valid") & (slide == s)], xy[(roles == "train") & (slide == s)]).min()
            for roles in fold_roles(spots, protocol)[1]
            for s in (1, 2)
        ]
        for protocol in ("paper", "block")
    }
    assert max(nearest["paper"]) <= 101 and min(nearest["block"]) > 200  # px; the pitch is 100
    pool, (roles, *_) = fold_roles(spots, "block")
    square = pd.Series(list(zip(slide, *(xy // 500).T, strict=True)))[pool]
    assert pd.Series(roles[pool] == "valid").groupby(square.to_numpy()).nunique().max() == 1, "cut in two"
    assert 0.3 < (roles == "train").sum() / len(pool) < 0.8


def test_under_block_the_test_slide_decides_nothing(simulated, tmp_path, monkeypatch, capsys):
    """Other counts, variable genes and published lists: the same panel, lists, folds and out-of-fold scores."""
    import shutil

    load, root = common.load_dataset, tmp_path / "root"
    shutil.copytree(simulated / "dataset", root / "dataset")
    arguments = ("--data-root", root, *TINY_22, "--protocol", "block")
    read = anndata.read_h5ad

    def run(out):
        assert run_script("22", *arguments, "--out", out, STAGES=(0,), HIDDENS=(0,)) == 0
        rows = last_json(capsys.readouterr().out)["rows"]
        return [
            {
                k: v
                for k, v in row.items()
                if "seconds" not in k and k not in ("images_per_s", "peak_memory_mb", "folder")
            }
            for row in rows
        ]

    def disturb(root, target):
        data = load(root, target)
        test = (data.spots["tissue_index"] == 3).to_numpy()
        noise = np.random.default_rng(0).gamma(1, size=data.lognorm.shape).astype(np.float32)
        changed = np.where(test[:, None], noise, data.lognorm)
        return dataclasses.replace(data, lognorm=changed, target=changed)

    def other_genes(path):
        table = read(path)
        if path.name == "counts.h5ad":
            table.var["hvg_3"] = ~table.var["hvg_3"]
        return table

    monkeypatch.setattr(common, "MARGIN", 0)  # ten spots a slide leave no room
    quiet = run(tmp_path / "a")
    (root / "gene_sets.csv").write_text("group,gene\nHEG,ALB\nHVG,ALB\n")  # as if ranked on the test slide
    monkeypatch.setattr(common, "load_dataset", disturb)
    monkeypatch.setattr(anndata, "read_h5ad", other_genes)
    loud = run(tmp_path / "b")
    assert [row for row in quiet if row["split"] != "test"] == [row for row in loud if row["split"] != "test"]
    assert [row for row in quiet if row["split"] == "test"] != [row for row in loud if row["split"] == "test"]


# ------------------------------------------------------------------------------------- script 22: the search


@pytest.fixture(scope="module")
def searched(simulated, tmp_path_factory):
    """(output folder, stdout) of script 22 on a grid of four settings and two folds."""
    import contextlib
    import io

    out, stdout = tmp_path_factory.mktemp("search"), io.StringIO()
    with contextlib.redirect_stdout(stdout):
        assert run_script("22", "--data-root", simulated, "--out", out, *TINY_22, **SMALL_GRID) == 0
    return out, stdout.getvalue()


def test_search_reports_out_of_fold_and_then_the_test_slide(searched, simulated):
    out, stdout = searched
    rows = pd.DataFrame(last_json(stdout)["rows"])
    assert rows["split"].value_counts().to_dict() == {"valid": 8, "oof": 4, "test": 1}
    oof, valid = rows[rows["split"] == "oof"], rows[rows["split"] == "valid"]
    assert (oof["n_spots"] == 30).all() and set(valid["n_spots"]) == {15} and set(valid["fold"]) == {0, 1}
    ranked = oof.astype({"heg": float}).sort_values("heg", ascending=False)["setting"].tolist()
    assert rows[rows["split"] == "test"]["setting"].tolist() == ranked[:1]
    lines = stdout[stdout.index("best setting first") :].splitlines()[4:8]
    assert [" ".join(line.split()[:2]) for line in lines] == ranked
    lines = stdout[stdout.index("further metrics") :].splitlines()[4:8]
    for setting, line in zip(ranked, lines, strict=True):
        of = valid[valid["setting"] == setting]["heg"].astype(float)
        assert line.startswith(setting) and f" {of.mean():.3f}±{of.std():.3f} " in line
    assert (out / "search.png").stat().st_size > 5000


def test_out_of_fold_r_is_of_predictions_by_the_other_folds(searched, simulated):
    out, stdout = searched
    rows = pd.DataFrame(last_json(stdout)["rows"])
    data = common.load_dataset(simulated, "lognorm")
    setting = rows["setting"].iloc[0]
    predicted, seen = {}, {}
    for row in rows[(rows["setting"] == setting) & (rows["split"] == "valid")].itertuples():
        table = anndata.read_h5ad(out / row.folder / "predictions.h5ad")
        predicted |= dict(zip(table.obs_names, table.X, strict=True))
        split = pd.read_csv(out / row.folder / "split.csv")
        seen[row.fold] = set(split["id"][split["role"] == "train"])
        assert not seen[row.fold] & set(table.obs_names) and set(split["fold"]) == {row.fold}
    (folder,) = rows[(rows["setting"] == setting) & (rows["split"] == "oof")]["folder"]
    table = anndata.read_h5ad(out / folder / "predictions.h5ad")
    assert len(table) == 30 and all(np.array_equal(table[i].X[0], predicted[i]) for i in table.obs_names)
    per_gene = pd.read_csv(out / folder / "per_gene.csv", index_col="gene")["oof_lognorm_r"]
    slide = data.spots.set_index("id")["tissue_index"].loc[table.obs_names].to_numpy()
    truth = pd.DataFrame(data.lognorm, data.spots["id"], data.genes).loc[table.obs_names]
    gene = per_gene.idxmax()
    x = table[:, gene].X[:, 0].astype(float)
    r = [np.corrcoef(x[slide == s], truth[gene].to_numpy(float)[slide == s])[0, 1] for s in (1, 2, 4)]
    assert per_gene[gene] == pytest.approx(np.mean(r), abs=1e-5)


def test_the_final_training_has_no_validation_and_keeps_its_folds_best_epoch(searched):
    out, stdout = searched
    rows = pd.DataFrame(last_json(stdout)["rows"])
    (final,) = rows[rows["split"] == "test"].to_dict("records")
    split = pd.read_csv(out / final["folder"] / "split.csv")["role"].value_counts().to_dict()
    assert split == {"train": 30, "test": 10}
    folds = rows[(rows["setting"] == final["setting"]) & (rows["split"] == "valid")]["folder"]
    curve = np.mean([pd.read_csv(out / folder / "history.csv")["valid_mse"] for folder in folds], axis=0)
    assert final["best_epoch"] == curve.argmin() + 1
    history = pd.read_csv(out / final["folder"] / "history.csv")
    assert len(history) == final["best_epoch"] and history["valid_mse"].isna().all()


def test_search_under_harmony_with_two_seeds_keeps_truths_apart(simulated, tmp_path, capsys):
    arguments = ("--data-root", simulated, "--out", tmp_path, *TINY_22, "--target", "harmony", "--seeds", "42,43")
    assert run_script("22", *arguments, STAGES=(0,), HIDDENS=(0,)) == 0
    stdout = capsys.readouterr().out
    rows = pd.DataFrame(last_json(stdout)["rows"])
    assert rows.groupby(["split", "truth"]).size().to_dict() == {
        (split, truth): n for split, n in (("oof", 2), ("test", 2), ("valid", 4)) for truth in ("harmony", "lognorm")
    }
    lines = stdout[stdout.index("further metrics") :].splitlines()[4:6]
    for truth, line in zip(("harmony", "lognorm"), lines, strict=True):
        of = rows[(rows["split"] == "valid") & (rows["truth"] == truth)]["heg"].astype(float)
        assert truth in line and f" {of.mean():.3f}±{of.std():.3f} " in line


def test_ranking_is_by_out_of_fold_r_and_never_by_nan():
    script = load_script("22")
    script.TARGET = "lognorm"
    row = lambda setting, heg, hvg, split="oof", truth="lognorm", heg_n=50: locals()  # noqa: E731
    rows = [
        row("undefined", None, 0.9),
        row("second", 0.3, 0.1),
        row("first", 0.3, 0.2),
        row("test is not looked at", 0.1, 0.1),
        row("test is not looked at", 0.9, 0.9, split="test"),
        row("nor folds", 0.9, 0.9, split="valid"),
        row("nor the other truth", 0.9, 0.9, truth="harmony"),
        row("no hvg", 0.3, None),
        row("best of a few genes", 0.8, 0.8, heg_n=3),
    ]
    assert script.rank_settings(rows) == ["first", "second", "no hvg", "test is not looked at"]
    with pytest.raises(common.InputError, match="no setting"):
        script.rank_settings([row("undefined", None, 0.9, heg_n=0)])


def test_a_killed_search_loses_no_row_and_computes_none_twice(searched, simulated, tmp_path, monkeypatch, capsys):
    arguments = ("--data-root", simulated, "--out", tmp_path, *TINY_22)
    fit, began = common.fit, []

    def stop_in_the_sixth(*args, report=None, **options):
        began.append(options["checkpoint"].parent.name)

        def second_epoch(line, *more):
            if len(began) == 6 and line["epoch"] == 2:
                raise KeyboardInterrupt
            report(line, *more)

        return fit(*args, report=second_epoch if report else None, **options)

    monkeypatch.setattr(common, "fit", stop_in_the_sixth)
    assert run_script("22", *arguments, **SMALL_GRID) == 130
    assert len(list(tmp_path.glob("*/rows.json"))) == 5 == pd.read_csv(tmp_path / "rows.csv")["folder"].nunique()
    capsys.readouterr()
    first = began.copy()
    assert run_script("22", *arguments, **SMALL_GRID) == 0
    resumed = capsys.readouterr().out
    assert f"going on after epoch 1 of 3 ({tmp_path / first[5]}" in resumed
    assert began[6] == first[5] and len(began) == 6 + 4 and not set(began[7:]) & set(first)  # 8 folds and the final one
    timing = ("seconds", "images_per_s", "peak_memory_mb")
    plain = [{k: v for k, v in row.items() if k not in timing} for row in last_json(resumed)["rows"]]
    whole = [{k: v for k, v in row.items() if k not in timing} for row in last_json(searched[1])["rows"]]
    assert plain == whole, "an interrupted search must end with the same numbers"
    (tmp_path / "rows.csv").unlink()
    assert run_script("22", *arguments, **SMALL_GRID) == 0
    assert len(pd.read_csv(tmp_path / "rows.csv")) == len(whole), "a lost table is mended from the rows' own folders"


def test_frozen_features_are_exact_without_augmentation(simulated, tmp_path, monkeypatch, capsys):
    """Training the head on stored features equals training it behind the frozen backbone."""
    script = load_script("22")
    data = common.load_dataset(simulated, "lognorm")
    recipe = {"BACKBONE": "efficientnet_b0", "PRETRAINED": False, "HIDDEN": 4, "TRAINABLE_STAGES": 0, "AUG": "none"}
    recipe |= {
        "IMAGE_SIZE": 32,
        "EPOCHS": 3,
        "BATCH_SIZE": 8,
        "LEARNING_RATE": 0.01,
        "START_AT_MEAN": True,
        "TTA": False,
    }
    recipe |= {"DEVICE": "cpu", "PRECISION": "fp32", "TARGET": "lognorm", "PROTOCOL": "paper"}
    recipe |= {"TRAIN_SLIDES": (), "TEST_SLIDE": 3, "VALID_FRACTION": 0.2}
    (roles,) = common.split_spots(data.spots, recipe, 42)
    experiment = common.Experiment(data, roles, common.choose_gene_groups(data, roles == "train", True), tmp_path, 42)
    slow, _ = common.train_network(recipe, experiment, tmp_path / "slow")
    fast, _ = common.train_network(recipe, experiment, tmp_path / "fast", adapt=script.use_features)
    np.testing.assert_allclose(slow, fast, rtol=1e-4, atol=1e-4)
    assert "0 augmented views" in capsys.readouterr().out
    calls = []
    monkeypatch.setattr(common, "augment", lambda x, *draw: calls.append(len(x)) or x.float())
    _, spots = script.use_features(common.build_model(recipe, 5, 42), None, recipe | {"AUG": "mpa"}, experiment)
    assert sum(calls) == (1 + 3) * len(data.spots) and len(spots) == len(data.spots)
    script.use_features(common.build_model(recipe, 5, 42), None, recipe | {"AUG": "mpa", "HIDDEN": 0}, experiment)
    assert sum(calls) == (1 + 3) * len(data.spots), "the features of one backbone are computed once"


def test_a_view_is_drawn_while_training_and_the_plain_patch_scored():
    features = torch.arange(3 * 5 * 2, dtype=torch.float32).view(3, 5, 2)
    stored, spots = load_script("22").FrozenFeatures(features), torch.tensor([4.0, 0, 2]).view(3, 1, 1, 1)
    assert torch.equal(stored.eval()(spots), features[0, [4, 0, 2]])
    stored.train()
    drawn = torch.stack([stored(spots) for _ in range(40)])
    views = {int((value[0] - features[0, 4, 0]) // 10) for value in drawn[:, 0]}
    assert views == {1, 2} and not list(stored.parameters()) and not stored.state_dict()


# ------------------------------------------------------------------------------------- script 23


@pytest.fixture
def images():
    return torch.rand((9, 3, 20, 24), generator=torch.Generator().manual_seed(0)) * 255


def test_colour_equals_torchvision_image_by_image(images):
    images[0] = 128  # grey: no hue
    images[1, :, :4] = torch.tensor([255.0, 0, 0])[:, None, None]
    draw = torch.rand((9, 4), generator=torch.Generator().manual_seed(1)) * 2 - 1
    factors = torch.tensor([1.0, 1, 1, 0]) + draw * torch.tensor([0.4, 0.4, 0.4, 0.3])
    got = load_script("23").change_colour(images, factors)
    for image, (brightness, contrast, saturation, hue), changed in zip(images, factors.tolist(), got, strict=True):
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


def test_colour_is_for_training_alone_and_as_often_as_stated(images):
    step = load_script("23").ColourAndBlur()
    assert torch.equal(step.eval()(images), images)
    many = images[2:3].expand(2000, -1, -1, -1)
    torch.manual_seed(0)
    changed = step.train()(many)
    torch.manual_seed(0)
    assert torch.equal(changed, step(many)), "draws follow torch's seed, so that a resumed epoch repeats them"
    untouched = (changed == many).flatten(1).all(1).float().mean()
    assert untouched == pytest.approx(0.5 * 0.8, abs=0.04)
    assert changed.min() >= 0 and changed.max() <= 255.01
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(changed, step(many)), "mixed precision leaves colours alone"


def test_stnet_color_is_stnet_and_colour(images):
    script = load_script("23")
    model = common.build_model(NETWORK, 5, 0)
    for aug in ("mpa", "stnet", "none"):
        assert script.add_colour(model, images, {"AUG": aug}, None) == (model, images)
    network, _ = script.add_colour(model, images, {"AUG": "stnet_color"}, None)
    assert isinstance(network[0], script.ColourAndBlur) and network[1] is model
    plain, colour = (
        common.draw_augmentation(50, p, torch.Generator().manual_seed(0)) for p in ("stnet", "stnet_color")
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, colour, strict=True))


def test_augmentations_end_to_end_with_paired_differences(simulated, tmp_path, capsys):
    arguments = ("--data-root", simulated, "--out", tmp_path, *TINY, "--target", "lognorm", "--seeds", "42,43")
    assert run_script("23", *arguments, "--epochs", 2) == 0
    stdout = capsys.readouterr().out
    rows = pd.DataFrame(last_json(stdout)["rows"])
    names = ["mpa", "stnet", "stnet_color", "none"]
    names += [f"{name}, 8 views" for name in names]
    assert rows["setting"].unique().tolist() == names and (rows["setting"].value_counts() == 4).all()
    assert "±" in stdout and "HEG ahead" in stdout and (tmp_path / "paired_differences.png").is_file()
    table = pd.read_csv(tmp_path / "paired_differences.csv").set_index(["setting", "group"])
    per_seed = []
    for seed in (42, 43):
        folders = rows[rows["seed"] == seed].groupby("setting")["folder"].first()
        r = {
            name: pd.read_csv(tmp_path / folders[name] / "per_gene.csv", index_col="gene")["test_lognorm_r"]
            for name in ("none", "mpa")
        }
        lists = pd.read_csv(tmp_path / folders["mpa"] / "genes.csv")  # each seed's own training spots
        per_seed.append((r["none"] - r["mpa"]).reindex(lists["gene"][lists["group"] == "HEG"]).mean())
    expected = np.mean(per_seed)
    line = table.loc["none", "HEG"]
    assert line["difference"] == pytest.approx(expected) and line["n"] == 2 and line["minus"] == "mpa"
    pairs = {"mpa, 8 views": "mpa", "none, 8 views": "mpa, 8 views"}
    assert all(set(table.loc[[one]]["minus"]) == {other} for one, other in pairs.items())


def test_views_are_averaged_over_the_rows_own_weights(simulated, tmp_path, capsys):
    arguments = ("--data-root", simulated, "--out", tmp_path, *TINY, "--target", "lognorm", "--epochs", 1)
    assert run_script("23", *arguments, "--seeds", "42,43", AUGS=("mpa", "none")) == 0
    rows = pd.DataFrame(last_json(capsys.readouterr().out)["rows"]).query("split == 'test'")
    data = common.load_dataset(simulated, "lognorm")
    patches = common.place_patches(data.patches, 32, torch.device("cpu"))
    for (setting, seed), folder in rows.set_index(["setting", "seed"])["folder"].items():
        if not setting.endswith(", 8 views"):
            continue
        (own,) = rows[(rows["setting"] == setting.removesuffix(", 8 views")) & (rows["seed"] == seed)]["folder"]
        model = common.build_model(NETWORK | {"HIDDEN": 16}, len(data.genes), 0)
        model.load_state_dict(safetensors.torch.load_file(tmp_path / own / "weights.safetensors"))
        table = anndata.read_h5ad(tmp_path / folder / "predictions.h5ad")
        at = data.spots.reset_index().set_index("id")["index"].loc[table.obs_names].to_numpy()
        np.testing.assert_allclose(
            table.X, common.predict(model, patches, at, dtype=torch.float32, tta=True), atol=1e-4
        )
    assert rows["weights"].notna().all() and rows["parameters_total"].notna().all()


def test_a_group_without_genes_is_a_dash_in_every_table(simulated, tmp_path, capsys):
    import shutil

    shutil.copytree(simulated / "dataset", tmp_path / "root" / "dataset")
    genes = common.load_dataset(simulated, "lognorm").genes
    (tmp_path / "root" / "gene_sets.csv").write_text("group,gene\n" + "".join(f"HEG,{gene}\n" for gene in genes[:5]))
    arguments = ("--data-root", tmp_path / "root", "--out", tmp_path / "out", "--target", "lognorm")
    assert run_script("22", *arguments, *TINY_22, STAGES=(0,), HIDDENS=(0,)) == 0
    assert run_script("23", *arguments, *TINY, "--epochs", 1, "--seeds", "42", AUGS=("mpa", "none")) == 0
    shown = capsys.readouterr().out
    assert (
        "nan" not in shown.replace("NaN", "") and len(pd.read_csv(tmp_path / "out" / "paired_differences.csv")) == 3 * 4
    )
