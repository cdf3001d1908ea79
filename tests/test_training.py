"""Training: schedule, overfitting, bit-equal repeats, resuming, and that a score belongs to its weights."""

import json

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import scanpy
import torch

import common

NETWORK = {"BACKBONE": "efficientnet_b0", "HIDDEN": 8, "PRETRAINED": False, "TRAINABLE_STAGES": -1}
RECIPE = {"LEARNING_RATE": 1e-3, "EPOCHS": 3, "BATCH_SIZE": 4, "AUG": "mpa"}


@pytest.fixture
def little():
    rng = np.random.default_rng(0)
    patches = torch.from_numpy(rng.integers(0, 256, (14, 32, 32, 3), np.uint8)).permute(0, 3, 1, 2)
    return patches, rng.normal(size=(14, 5)).astype(np.float32), np.arange(9), np.arange(9, 14)


def train(little, recipe=RECIPE, hidden=8, **more):
    patches, target, train_rows, valid_rows = little
    model = common.build_model({**NETWORK, "BACKBONE": "efficientnet_b0", "HIDDEN": hidden}, target.shape[1], 42)
    history = common.fit(
        model, patches, target, train_rows, valid_rows, recipe=recipe, seed=42, dtype=torch.float32, **more
    )
    return model, history, common.predict(model, patches, np.arange(len(patches)), dtype=torch.float32)


def test_the_schedule_is_what_the_optimiser_gets(little, monkeypatch):
    seen = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self, *a, **k: seen.append(self.param_groups[0]["lr"]) or step(self, *a, **k)
    )
    _, history, _ = train(little, {**RECIPE, "EPOCHS": 6})
    cosine = 1e-3 * (1 + np.cos(np.pi * np.arange(6) / 6)) / 2  # by the epoch, from the full rate down to near zero
    np.testing.assert_allclose(
        seen, np.repeat(cosine, 2), rtol=1e-9
    )  # 9 rows in batches of 4: the last one is left out
    np.testing.assert_allclose([line["learning_rate"] for line in history], cosine, rtol=1e-9)


def test_a_last_batch_of_one_is_left_out(little, monkeypatch):
    """BatchNorm needs two; which spot it is changes with the epoch."""
    patches, target, *_ = little
    left = []
    for n, sizes in ((9, [4, 4]), (10, [4, 4, 2]), (2, [2])):
        seen = []
        monkeypatch.setattr(common, "augment", lambda x, *draw, seen=seen: seen.append(len(x)) or x.float())
        train((patches, target, np.arange(n), np.arange(10, 14)), {**RECIPE, "EPOCHS": 1})
        assert seen == sizes, n
        left.append(n - sum(seen))
    assert left == [1, 0, 0]


def test_training_overfits_eight_patches():
    rng = np.random.default_rng(0)
    patches = torch.from_numpy(rng.integers(0, 256, (8, 32, 32, 3), np.uint8)).permute(0, 3, 1, 2)
    target = rng.normal(size=(8, 4)).astype(np.float32)
    rows = np.arange(8)
    recipe = {"LEARNING_RATE": 3e-3, "EPOCHS": 60, "BATCH_SIZE": 8, "AUG": "none"}
    _, history, _ = train((patches, target, rows, rows), recipe, hidden=0)
    assert history[-1]["train_mse"] < 0.02 * target.var()


def test_two_runs_with_one_seed_are_bit_equal(little):
    (first, one, a), (second, two, b) = train(little), train(little)
    assert [line["train_mse"] for line in one] == [line["train_mse"] for line in two]
    assert np.array_equal(a, b)
    assert all(
        torch.equal(x, y) for x, y in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_what_ran_before_does_not_matter(little):
    a = train(little)[2]
    torch.rand(1000)
    assert np.array_equal(a, train(little)[2])


@pytest.mark.parametrize("killed_after", [1, 2])
def test_an_interrupted_run_ends_with_the_same_bits(little, tmp_path, killed_after):
    whole = train(little)[2]

    def kill(line, predicted, best):
        if line["epoch"] == killed_after + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(little, checkpoint=tmp_path / "checkpoint.pt", report=kill)
    _model, history, resumed = train(little, checkpoint=tmp_path / "checkpoint.pt")
    assert np.array_equal(whole, resumed) and [line["epoch"] for line in history] == [1, 2, 3]
    assert not list(tmp_path.glob(".partial*"))


def test_the_kept_weights_are_the_best_epochs(little, monkeypatch):
    _patches, target, _, valid_rows = little
    rates = iter([1e-3, 1e-3, 1e-3, 1.0, 1.0])  # the last epochs wreck the weights
    step = torch.optim.Adam.step

    def wreck(self, *a, **k):
        self.param_groups[0]["lr"] = rate[0]
        return step(self, *a, **k)

    rate = [0]
    monkeypatch.setattr(torch.optim.Adam, "step", wreck)
    epoch = common.train_epoch
    monkeypatch.setattr(common, "train_epoch", lambda *a, **k: rate.__setitem__(0, next(rates)) or epoch(*a, **k))
    _, history, predicted = train(little, {**RECIPE, "EPOCHS": 5})
    best = min(line["valid_mse"] for line in history)
    assert np.mean((predicted[valid_rows].astype(float) - target[valid_rows]) ** 2) == pytest.approx(best, rel=1e-6)
    assert history[-1]["valid_mse"] != best, "the last epoch must not be the best, or this shows nothing"


def test_tta_is_the_mean_over_the_eight_symmetries(little):
    patches, _target, *_ = little
    model = common.build_model({**NETWORK, "BACKBONE": "efficientnet_b0", "HIDDEN": 0}, 5, 1).eval()
    views = [f(g) for f in (lambda x: x, lambda x: x.flip(3)) for g in (patches, patches.flip(2))]
    views += [view.transpose(2, 3) for view in views]
    with torch.inference_mode():
        expected = torch.stack([model(view.contiguous(memory_format=torch.channels_last)) for view in views]).mean(0)
    got = common.predict(model, patches, np.arange(14), dtype=torch.float32, tta=True)
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-5)


def test_parameters_of_the_papers_model():
    with torch.device("meta"):
        count = common.count_parameters(
            common.build_model({**NETWORK, "BACKBONE": "efficientnet_b0", "HIDDEN": 3000}, 3467, 0)
        )
        resnet = common.count_parameters(
            common.build_model({**NETWORK, "BACKBONE": "resnet50", "HIDDEN": 3000}, 3467, 0)
        )
    assert count["backbone"] == 4_007_548 and count["total"] == 4_007_548 + 1281 * 3000 + 3001 * 3467
    assert resnet["backbone"] == 23_508_032 and resnet["total"] == 23_508_032 + 2049 * 3000 + 3001 * 3467


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenetv2_100", "mobilenetv3_small_050", "densenet121", "vgg11"])
def test_the_head_fits_every_kind_of_backbone(backbone):
    model = common.build_model({**NETWORK, "BACKBONE": backbone}, 5, 0).eval()
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, 5)


def test_changed_gene_lists_are_another_row(trained, simulated, tmp_path, capsys):
    import shutil

    from conftest import REPOSITORY, TINY, run_script

    shutil.copytree(simulated / "dataset", tmp_path / "SIMULATED_data" / "dataset")
    (tmp_path / "SIMULATED_data" / "gene_sets.csv").write_text("group,gene\nHEG,ALB\nHEG,nowhere\nMG,HAL\n")
    shutil.copy(REPOSITORY / "GSE240429_data" / "published_results.csv", tmp_path / "SIMULATED_data")
    shutil.copytree(trained[0], tmp_path / "out")
    assert run_script("20", "--data-root", tmp_path / "SIMULATED_data", "--out", tmp_path / "out", *TINY) == 0
    stdout = capsys.readouterr().out
    below = stdout.split("published, not computed here")[1]
    assert "0.315" in below and "README of the published code" in below and "fixed gene lists" in below
    assert "gene_sets.csv; not in the panel: nowhere" in stdout and "on disk already" not in stdout
    row = json.loads(stdout.splitlines()[-1])["rows"][0]
    assert (row["heg_n"], row["hvg_n"], row["hvg"], row["gene_lists"]) == (1, 0, None, "gene_sets.csv")


def test_start_at_mean_sets_the_output_bias_to_the_training_spots_mean(simulated, tmp_path, monkeypatch):
    from conftest import TINY, run_script

    seen = []

    def look(network, patches, target, train_rows, valid_rows, **options):
        seen.append((network.head[-1].bias.detach().numpy().copy(), target[train_rows].mean(0)))
        raise common.InputError("seen enough")

    monkeypatch.setattr(common, "fit", look)
    for flags in ([], ["--start-at-mean"]):
        assert run_script("20", "--data-root", simulated, "--out", tmp_path, *TINY, *flags) == 2
    (free, mean), (bias, _) = seen
    assert np.array_equal(bias, mean) and not np.allclose(free, mean)


def test_divergence_is_told_in_one_line(little):
    patches, target, *rows = little
    with pytest.raises(common.InputError, match="LEARNING_RATE"):
        train((patches, np.full_like(target, np.inf), *rows))


# ------------------------------------------------------------------------------------- script 20, end to end


def test_last_line_is_the_json_of_the_contract(trained, simulated):
    out, stdout = trained
    result = json.loads(stdout.splitlines()[-1])
    assert (result["script"], result["simulated"]) == ("20_train_effb0_sota_split8020", True)
    assert (result["data_root"], result["out"]) == (str(simulated), str(out))
    assert [(r["setting"], r["split"], r["truth"]) for r in result["rows"]] == [
        (setting, split, truth)
        for setting in ("EfficientNet-B0", "ridge (colour)")
        for split in ("valid", "test")
        for truth in ("harmony", "lognorm")
    ]
    keys = (
        "setting split slide fold seed target truth protocol gene_lists n_spots heg hvg mg all heg_n hvg_n mg_n all_n"
    )
    keys = {*keys.split(), "n_genes_r30", "mse", "seconds", "weights"}
    assert all(keys <= set(row) for row in result["rows"])
    assert {row["n_spots"] for row in result["rows"] if row["split"] == "test"} == {10}
    saved = pd.read_csv(out / "rows.csv", float_precision="round_trip")
    shown = pd.DataFrame(result["rows"])
    for row in shown.itertuples():
        same = saved[(saved["setting"] == row.setting) & (saved["split"] == row.split) & (saved["truth"] == row.truth)]
        assert len(same) == 1 and same["mse"].iloc[0] == row.mse


def test_simulated_slides_are_named_and_the_folder_is_complete(trained):
    assert "\nSIMULATED slides: 20_train_effb0_sota_split8020\n" in trained[1]
    assert "\nSIMULATED slides: mean Pearson r per gene group" in trained[1]
    (folder,) = trained[0].glob("EfficientNet-B0-*")
    names = {"per_gene.csv", "split.csv", "genes.csv", "recipe.json", "history.csv", "predictions.h5ad"}
    names |= {"weights.safetensors", "bootstrap.csv", "rows.json"}
    assert {path.name for path in folder.iterdir()} - {"maps.png", "scores.png"} == names  # drawn by script 27


def test_the_reported_score_belongs_to_the_saved_weights(trained, simulated):
    out, stdout = trained
    (folder,) = out.glob("EfficientNet-B0-*")
    data = common.load_dataset(simulated, "harmony")
    split = pd.read_csv(folder / "split.csv").set_index("id")["role"].reindex(data.spots["id"])
    test_rows = np.flatnonzero(split == "test")
    model = common.build_model({**NETWORK, "BACKBONE": "efficientnet_b0", "HIDDEN": 16}, len(data.genes), 7)
    model.load_state_dict(safetensors.torch.load_file(folder / "weights.safetensors"))
    predicted = common.predict(
        model, common.place_patches(data.patches, 32, torch.device("cpu")), test_rows, dtype=torch.float32
    )
    saved = scanpy.read_h5ad(folder / "predictions.h5ad")
    np.testing.assert_allclose(predicted, saved[data.spots["id"][test_rows]].X, atol=1e-5)
    lists = pd.read_csv(folder / "genes.csv")
    heg = [data.genes.index(gene) for gene in lists["gene"][lists["group"] == "HEG"]]
    r = [np.corrcoef(predicted[:, g].astype(float), data.target[test_rows, g])[0, 1] for g in heg]
    rows = json.loads(stdout.splitlines()[-1])["rows"]
    (row,) = [x for x in rows if (x["setting"], x["split"], x["truth"]) == ("EfficientNet-B0", "test", "harmony")]
    assert row["heg"] == pytest.approx(np.mean(r), abs=1e-3)


def test_predictions_open_in_scanpy(trained):
    (path,) = trained[0].glob("EfficientNet-B0-*/predictions.h5ad")
    table = scanpy.read_h5ad(path)
    assert table.obsm["spatial"].shape == (table.n_obs, 2) and set(table.obs["role"]) == {"valid", "test"}
    test = table[table.obs["role"] == "test"]
    gene = test.var["test_lognorm_r"].idxmax()
    r = np.corrcoef(test[:, gene].X[:, 0].astype(float), test[:, gene].layers["lognorm"][:, 0])[0, 1]
    assert test.var["test_lognorm_r"][gene] == pytest.approx(r, abs=1e-5)


def test_a_row_on_disk_is_not_computed_again(trained, simulated, monkeypatch, capsys):
    from conftest import TINY, run_script

    monkeypatch.setattr(common, "fit", lambda *a, **k: pytest.fail("trained again"))
    assert run_script("20", "--data-root", simulated, "--out", trained[0], *TINY) == 0
    shown = capsys.readouterr().out
    assert "on disk already" in shown
    assert json.loads(shown.splitlines()[-1])["rows"] == json.loads(trained[1].splitlines()[-1])["rows"]


def test_another_constant_is_another_row(trained, simulated, capsys):
    from conftest import TINY, run_script

    assert (
        run_script("20", "--data-root", simulated, "--out", trained[0], *TINY, "--aug", "none", "--target", "lognorm")
        == 0
    )
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert {row["truth"] for row in rows} == {"lognorm"}
    assert len(list(trained[0].glob("EfficientNet-B0-*"))) == 2


def test_split_is_reproducible_disjoint_and_exhaustive(simulated):
    spots = common.load_dataset(simulated, "harmony").spots
    recipe = {"TRAIN_SLIDES": (1, 2), "TEST_SLIDE": 3, "VALID_FRACTION": 0.2, "PROTOCOL": "paper"}
    (roles,) = common.split_spots(spots, recipe, 42)
    assert (roles == common.split_spots(spots, recipe, 42)).all()
    assert (roles != common.split_spots(spots, recipe, 43)).any()
    assert (roles == "valid").sum() == 4 and (roles == "train").sum() == 16
    assert set(spots["tissue_index"][roles == "test"]) == {3} and set(spots["tissue_index"][roles == ""]) == {4}


def test_groups_are_ranked_on_training_spots_alone(simulated):
    import dataclasses

    data = common.load_dataset(simulated, "harmony")
    recipe = {"TRAIN_SLIDES": (), "TEST_SLIDE": 3, "VALID_FRACTION": 0.2, "PROTOCOL": "paper"}
    (roles,) = common.split_spots(data.spots, recipe, 42)
    groups = common.choose_gene_groups(data, roles == "train", published=True)
    assert groups.attrs["source"] == "training spots" and groups["group"].value_counts().to_dict() == {
        "HEG": 50,
        "HVG": 50,
        "MG": 8,
    }
    mean = data.lognorm[roles == "train"].mean(0)
    assert groups["gene"][0] == data.genes[int(mean.argmax())]
    changed = data.lognorm.copy()
    changed[roles != "train"] = np.random.default_rng(0).normal(size=changed[roles != "train"].shape)
    assert common.choose_gene_groups(dataclasses.replace(data, lognorm=changed), roles == "train", True).equals(groups)


def test_published_lists_are_whole():
    from conftest import REPOSITORY

    table = pd.read_csv(REPOSITORY / "GSE240429_data" / "gene_sets.csv")
    assert table["group"].value_counts().to_dict() == {"HEG": 50, "HVG": 50, "MG": 8}
    assert tuple(table["gene"][table["group"] == "MG"]) == common.MARKER_GENES


def test_depthwise_convolutions_train_in_fp32_under_a_processors_autocast(monkeypatch):
    model, seen = common.build_model({**NETWORK, "BACKBONE": "efficientnet_b0"}, 5, 42), set()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            kind, forward = ("depthwise" if module.groups > 1 else "other"), module._conv_forward

            def spy(images, *more, kind=kind, forward=forward):
                seen.add((kind, images.dtype))
                return forward(images, *more)

            monkeypatch.setattr(module, "_conv_forward", spy)
    for training, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16):
            model.train(training)(torch.zeros((2, 3, 32, 32), dtype=torch.uint8))
        assert {images for kind, images in seen if kind == "depthwise"} == {dtype}
        assert ("other", torch.bfloat16) in seen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_augments_and_trains_as_the_cpu_does(little):
    patches, target, train_rows, valid_rows = little
    draw = common.draw_augmentation(14, "mpa", torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        common.augment(patches.cuda(), *draw).cpu(), common.augment(patches, *draw), rtol=0, atol=0.05
    )
    model = (
        common.build_model({**NETWORK, "BACKBONE": "efficientnet_b0", "HIDDEN": 8}, 5, 42)
        .cuda()
        .to(memory_format=torch.channels_last)
    )
    placed = patches.cuda()
    history = common.fit(model, placed, target, train_rows, valid_rows, recipe=RECIPE, seed=42, dtype=torch.bfloat16)
    assert placed.is_cuda and np.isfinite([line["valid_mse"] for line in history]).all()
