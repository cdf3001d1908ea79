"""Training: schedule, overfitting, bit-equal repeats, resuming, and that a score belongs to its
weights.
"""

import dataclasses
import functools
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import scanpy
import torch
import torch.nn.functional as F
from conftest import (
    NETWORK,
    PAPER,
    REPOSITORY,
    TINY,
    load_script,
    printed_table,
    refused,
    rows_of,
    run_script,
    split_of,
    stdout_of,
    table_of,
)

import common
from study import panels, printing, splitting
from study.errors import InputError

RECIPE = NETWORK | {"LEARNING_RATE": 1e-3, "EPOCHS": 3, "BATCH_SIZE": 4}


def draw_spots(n, n_genes):
    """(patches, target) of n spots."""
    rng = np.random.default_rng(0)
    patches = torch.from_numpy(rng.integers(0, 256, (n, 32, 32, 3), np.uint8)).permute(0, 3, 1, 2)
    return patches, rng.normal(size=(n, n_genes)).astype(np.float32)


@pytest.fixture
def little():
    """(patches, target, train_spots, valid_spots) of 14 spots and 5 genes."""
    return *draw_spots(14, 5), np.arange(9), np.arange(9, 14)


def train(little, recipe=RECIPE, hidden=8, **more):
    """(model, history, prediction of every spot)."""
    patches, target, *spots = little
    model = common.build_model(NETWORK | {"HIDDEN": hidden}, target.shape[1], 42)
    history = common.fit(model, patches, split_of(target, *spots), recipe, **more)
    every = np.arange(len(patches))
    return model, history, common.predict(model, patches, every, dtype=torch.float32)


def test_the_schedule_is_what_the_optimiser_gets(little, monkeypatch):
    seen = []
    step = torch.optim.Adam.step

    def look(self, *arguments, **options):
        seen.append(self.param_groups[0]["lr"])
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.Adam, "step", look)
    _, history, _ = train(little, RECIPE | {"EPOCHS": 6})
    # By the epoch, from the full rate down to near zero.
    cosine = 1e-3 * (1 + np.cos(np.pi * np.arange(6) / 6)) / 2
    # 9 spots in batches of 4: the last one is left out.
    np.testing.assert_allclose(seen, np.repeat(cosine, 2), rtol=1e-9)
    np.testing.assert_allclose([line["learning_rate"] for line in history], cosine, rtol=1e-9)


@pytest.mark.parametrize("n, sizes, left", [(9, [4, 4], 1), (10, [4, 4, 2], 0), (2, [2], 0)])
def test_a_last_batch_of_one_is_left_out(little, monkeypatch, n, sizes, left):
    """BatchNorm needs two; which spot it is changes with the epoch."""
    patches, target, *_ = little
    seen = []

    def look(images, *draws, border):
        seen.append(len(images))
        return images.float()

    monkeypatch.setattr(common, "augment", look)
    train((patches, target, np.arange(n), np.arange(10, 14)), RECIPE | {"EPOCHS": 1})
    assert seen == sizes
    assert n - sum(seen) == left


def test_training_overfits_eight_patches():
    patches, target = draw_spots(8, 4)
    recipe = RECIPE | {"LEARNING_RATE": 3e-3, "EPOCHS": 60, "BATCH_SIZE": 8, "AUG": "none"}
    _, history, _ = train((patches, target, np.arange(8), np.arange(8)), recipe, hidden=0)
    assert history[-1]["train_loss"] < 0.02 * target.var()


def test_two_runs_with_one_seed_are_bit_equal(little):
    first, one, a = train(little)
    torch.rand(1000)  # What ran before does not matter.
    second, two, b = train(little)
    assert [line["train_loss"] for line in one] == [line["train_loss"] for line in two]
    assert np.array_equal(a, b)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_a_new_loss_is_one_function_that_a_constant_names(little, monkeypatch):
    monkeypatch.setitem(common.LOSSES, "l1", F.l1_loss)
    _, history, named = train(little, RECIPE | {"LOSS": "l1"})
    _, _, given = train(little, loss=F.l1_loss)
    _, usual, by_mse = train(little)
    assert np.array_equal(named, given)
    assert not np.allclose(named, by_mse)
    assert history[0]["valid_mse"] != usual[0]["valid_mse"]


@pytest.mark.parametrize("killed_after", [1, 2])
def test_an_interrupted_run_ends_with_the_same_bits(little, tmp_path, killed_after):
    whole = train(little)[2]

    def kill(history, best_epoch):
        if len(history) == killed_after + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(little, checkpoint=tmp_path / "checkpoint.pt", report=kill)
    _, history, resumed = train(little, checkpoint=tmp_path / "checkpoint.pt")
    assert np.array_equal(whole, resumed)
    assert [line["epoch"] for line in history] == [1, 2, 3]
    assert not list(tmp_path.glob(".partial*"))


CHANGED_LOSSES = (
    F.l1_loss,
    lambda predicted, target: (predicted - target).abs().mean(),
    functools.partial(F.huber_loss, delta=0.5),
    functools.partial(F.huber_loss, delta=2.0),
    torch.nn.SmoothL1Loss(),
)


def test_a_loss_that_changed_is_another_row(paper_split, monkeypatch):
    found = {paper_split.made_with(RECIPE)["LOSS"]}
    for loss in CHANGED_LOSSES:
        monkeypatch.setitem(common.LOSSES, "mse", loss)
        found.add(paper_split.made_with(RECIPE)["LOSS"])
    assert "mse" in found and len(found) == 1 + len(CHANGED_LOSSES)


def test_the_kept_weights_are_the_best_epochs(little, monkeypatch):
    _, target, _, valid_spots = little
    rates = [1e-3, 1e-3, 1e-3, 1.0, 1.0]  # The last epochs wreck the weights.
    step = torch.optim.Adam.step
    train_epoch = common.train_epoch
    began = []

    def begin(*arguments):
        began.append(len(began))
        return train_epoch(*arguments)

    def wreck(self, *arguments, **options):
        self.param_groups[0]["lr"] = rates[began[-1]]
        return step(self, *arguments, **options)

    monkeypatch.setattr(common, "train_epoch", begin)
    monkeypatch.setattr(torch.optim.Adam, "step", wreck)
    _, history, predicted = train(little, RECIPE | {"EPOCHS": 5})
    best = min(line["valid_mse"] for line in history)
    difference = predicted[valid_spots].astype(float) - target[valid_spots]
    assert np.mean(difference**2) == pytest.approx(best, rel=1e-6)
    assert history[-1]["valid_mse"] != best, "else the last epoch is the best: this shows nothing"


def test_tta_is_the_mean_over_the_eight_symmetries(little):
    patches, *_ = little
    model = common.build_model(NETWORK | {"HIDDEN": 0}, 5, 1).eval()
    views = [patches, patches.flip(2), patches.flip(3), patches.flip(2).flip(3)]
    views += [view.transpose(2, 3) for view in views]
    views = [view.contiguous(memory_format=torch.channels_last) for view in views]
    with torch.inference_mode():
        expected = torch.stack([model(view) for view in views]).mean(0)
    got = common.predict(model, patches, np.arange(14), dtype=torch.float32, tta=True)
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-5)


BACKBONES = ["resnet18", "mobilenetv2_100", "mobilenetv3_small_050", "densenet121", "vgg11"]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_head_fits_every_kind_of_backbone(backbone):
    model = common.build_model(NETWORK | {"BACKBONE": backbone, "IMAGE_SIZE": 64}, 5, 0).eval()
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, 5)


def test_changed_gene_lists_are_another_row(copied, simulated, tmp_path):
    root = tmp_path / "SIMULATED_data"
    shutil.copytree(simulated / "dataset", root / "dataset")
    (root / "gene_sets.csv").write_text("group,gene\nHEG,ALB\nHEG,nowhere\nMG,HAL\n")
    shutil.copy(REPOSITORY / "GSE240429_data" / "published_results.csv", root)
    stdout = stdout_of("20", data_root=root, out=copied("20"), **TINY)
    assert "gene_sets.csv; not in the panel: nowhere" in stdout
    assert "on disk already" not in stdout
    row = rows_of(stdout)[0]
    assert row["gene_lists"] == "gene_sets.csv"
    assert row["heg_n"] == 1
    assert row["hvg_n"] == 0
    assert row["hvg"] is None
    _, lines = printed_table(stdout, "published, not computed here")
    assert any("0.315" in line and "README of the published" in line for line in lines)


def test_published_numbers_go_whole_to_the_report(capsys):
    tables = printing.print_published(REPOSITORY / "GSE240429_data")
    (records,) = tables.values()
    assert "published, not computed here" in capsys.readouterr().out
    (record, *_) = [record for record in records if "0.315" in record["HEG50"]]
    assert record["source"] == "README of the published code"
    assert "fixed gene lists" in record["protocol"]


@pytest.mark.parametrize("hidden", [0, 16])
def test_the_first_prediction_is_the_training_mean(simulated, tmp_path, monkeypatch, hidden):
    seen = []

    def look(network, patches, split, recipe, **options):
        network.eval()
        with torch.inference_mode():
            first = network(patches[torch.arange(3)].float()).numpy()
        seen.append((first, split.data.target[split.spots("train")].mean(0, np.float64)))
        raise InputError("seen enough")

    monkeypatch.setattr(common, "fit", look)
    tiny = TINY | {"hidden": hidden}
    for flags in ([], ["--head-start", "random"]):
        assert run_script("20", *flags, data_root=simulated, out=tmp_path, **tiny) == 2
    (at_mean, mean), (at_random, _) = seen
    np.testing.assert_allclose(at_mean, np.tile(mean, (3, 1)), rtol=1e-5)
    assert np.abs(at_random - mean).mean() > 0.1


def test_a_pretrained_network_learns_sooner_behind_a_head_that_starts_at_the_mean(
    tmp_path_factory, tmp_path
):
    """The network that is pretrained has learnt from slides of another simulation."""
    rows, weights = {}, tmp_path / "resnet10t.safetensors"
    root = tmp_path_factory.mktemp("larger") / "SIMULATED_data"
    assert run_script("18", data_root=root, spots=40) == 0
    assert run_script("19", data_root=root, target="lognorm") == 0
    options = TINY | {"backbone": "resnet10t", "target": "lognorm", "hidden": 64}
    first = tmp_path / "first"
    stdout_of("20", data_root=root, out=first, **(options | {"epochs": 12, "seeds": (7,)}))
    (path,) = first.glob("resnet10t-*/weights.safetensors")
    state = safetensors.torch.load_file(path)
    start = "backbone."
    backbone = {name[len(start) :]: state[name] for name in state if name.startswith(start)}
    safetensors.torch.save_file(backbone, weights)
    options |= {"epochs": 1, "pretrained": weights, "learning_rate": 3e-4}
    for start in ("mean", "random"):
        out = tmp_path / start
        stdout_of("20", data_root=root, out=out, head_start=start, **options)
        (path,) = out.glob("resnet10t-*/history.csv")
        rows[start] = pd.read_csv(path)["valid_heg"].iloc[-1]
    assert rows["mean"] > rows["random"]


def test_divergence_is_told_in_one_line(little):
    patches, target, *spots = little
    with refused("LEARNING_RATE"):
        train((patches, np.full_like(target, np.inf), *spots))


# --------------------------------------------------------------------------- script 20, end to end
@pytest.mark.parametrize(
    "backbone, name", [("efficientnet_b0", "EfficientNet-B0"), ("resnet18", "resnet18")]
)
def test_a_row_is_called_by_the_backbone_that_it_trained(backbone, name):
    script, settings = load_script("20"), []
    script.BACKBONE, script.PRETRAINED = backbone, False
    run = SimpleNamespace(baseline={}, row=lambda setting, split, recipe: setting)
    run.fill = lambda setting, method: settings.append(setting)
    script.fill_rows(run, None, {"TARGET": "lognorm"})
    assert settings == [name, "ridge (colour)"]


KEYS = """setting split slide fold seed target truth protocol gene_lists n_spots heg hvg mg all
heg_n hvg_n mg_n all_n n_genes_r30 mse seconds weights heg_k7 hvg_k19 mg_k7 all_k19 component_1_r"""


def test_the_last_lines_are_the_table_the_report_and_the_rows(trained):
    out, stdout = trained
    *_, end, report, rows = stdout.splitlines()
    assert set(end) == {"="}
    assert report == f"report: {out / 'report.html'}"
    assert rows == f"rows: {out / 'rows.csv'}"
    assert "\nSIMULATED slides: 20_train_effb0_sota_split8020\n" in stdout
    assert "\nSIMULATED slides: mean Pearson r" in stdout


def test_the_rows_are_those_of_the_contract_and_rows_csv_has_each_once(trained):
    rows = rows_of(trained[1])
    assert [(row["setting"], row["split"], row["truth"]) for row in rows] == [
        (setting, split, truth)
        for setting in ("EfficientNet-B0", "ridge (colour)")
        for split in ("valid", "test")
        for truth in ("harmony", "lognorm")
    ]
    for row in rows:
        assert {*KEYS.split()} <= row.keys()
    assert {row["n_spots"] for row in rows if row["split"] == "test"} == {10}
    saved = pd.read_csv(trained[0] / "rows.csv", float_precision="round_trip")
    names = ["setting", "split", "truth", "mse"]
    assert sorted(saved[names].values.tolist()) == sorted([row[n] for n in names] for row in rows)


FILES = """per_gene.csv split.csv genes.csv recipe.json history.csv predictions.h5ad
weights.safetensors influence.csv rows.json set_scores.json set_influence.csv"""


def test_the_folder_of_a_row_is_complete(trained):
    (folder,) = trained[0].glob("EfficientNet-B0-*")
    drawn_by_script_27 = {"maps.png", "scores.png"}
    assert {path.name for path in folder.iterdir()} - drawn_by_script_27 == {*FILES.split()}


def test_the_reported_score_belongs_to_the_saved_weights(trained, simulated):
    out, stdout = trained
    (folder,) = out.glob("EfficientNet-B0-*")
    data = common.load_dataset(simulated, "harmony")
    role = pd.read_csv(folder / "split.csv").set_index("id")["role"].reindex(data.spots["id"])
    test_spots = np.flatnonzero(role == "test")
    model = common.build_model(NETWORK | {"HIDDEN": 16}, len(data.genes), 7)
    model.load_state_dict(safetensors.torch.load_file(folder / "weights.safetensors"))
    patches = common.place_patches(data.patches, 32, torch.device("cpu"))
    predicted = common.predict(model, patches, test_spots, dtype=torch.float32)
    saved = scanpy.read_h5ad(folder / "predictions.h5ad")
    np.testing.assert_allclose(predicted, saved[data.spots["id"][test_spots]].X, atol=1e-5)
    lists = pd.read_csv(folder / "genes.csv")
    r = []
    for gene in lists["gene"][lists["group"] == "HEG"]:
        g = data.genes.index(gene)
        r.append(np.corrcoef(predicted[:, g].astype(float), data.target[test_spots, g])[0, 1])
    table = table_of(stdout).set_index(["setting", "split", "truth"])
    row = table.loc[("EfficientNet-B0", "test", "harmony")]
    assert row["heg"] == pytest.approx(np.mean(r), abs=1e-3)


def test_predictions_open_in_scanpy(trained):
    (path,) = trained[0].glob("EfficientNet-B0-*/predictions.h5ad")
    table = scanpy.read_h5ad(path)
    assert table.obsm["spatial"].shape == (table.n_obs, 2)
    assert set(table.obs["role"]) == {"valid", "test"}
    test = table[table.obs["role"] == "test"]
    gene = test.var["test_lognorm_r"].idxmax()
    measured = test[:, gene].layers["lognorm"][:, 0]
    r = np.corrcoef(test[:, gene].X[:, 0].astype(float), measured)[0, 1]
    assert test.var["test_lognorm_r"][gene] == pytest.approx(r, abs=1e-5)


def test_a_row_on_disk_is_not_computed_again(trained, simulated, monkeypatch):
    out, stdout = trained
    monkeypatch.setattr(common, "fit", lambda *a, **k: pytest.fail("trained again"))
    again = stdout_of("20", data_root=simulated, out=out, **TINY)
    assert "on disk already" in again
    assert rows_of(again) == rows_of(stdout)


def test_another_constant_is_another_row(copied, simulated):
    out = copied("20")
    options = TINY | {"aug": "none", "target": "lognorm"}
    rows = table_of(stdout_of("20", data_root=simulated, out=out, **options))
    assert set(rows["truth"]) == {"lognorm"}
    assert len(list(out.glob("EfficientNet-B0-*"))) == 2


# ---------------------------------------------------------------------------- splits, gene groups
def test_split_is_reproducible_disjoint_and_exhaustive(simulated):
    spots = common.load_dataset(simulated, "harmony").spots
    recipe = PAPER | {"TRAIN_SLIDES": (1, 2)}
    (roles,) = splitting.split_spots(spots, recipe, 42)
    assert np.array_equal([roles], splitting.split_spots(spots, recipe, 42))
    assert not np.array_equal([roles], splitting.split_spots(spots, recipe, 43))
    assert (roles == "valid").sum() == 4
    assert (roles == "train").sum() == 16
    assert set(spots["tissue_index"][roles == "test"]) == {3}
    assert set(spots["tissue_index"][roles == ""]) == {4}


def test_groups_are_ranked_on_training_spots_alone(simulated):
    data = common.load_dataset(simulated, "harmony")
    (roles,) = splitting.split_spots(data.spots, PAPER, 42)
    train = roles == "train"
    groups = panels.choose_gene_groups(data, train, published=True)
    assert groups.attrs["source"] == "training spots"
    assert groups["group"].value_counts().to_dict() == {"HEG": 50, "HVG": 50, "MG": 8}
    mean = data.lognorm[train].mean(0)
    assert groups["gene"][0] == data.genes[int(mean.argmax())]
    changed = data.lognorm[:].copy()
    changed[~train] = np.random.default_rng(0).normal(size=changed[~train].shape)
    changed = dataclasses.replace(data, lognorm=changed)
    assert panels.choose_gene_groups(changed, train, published=True).equals(groups)


def test_published_lists_are_whole():
    table = pd.read_csv(REPOSITORY / "GSE240429_data" / "gene_sets.csv")
    assert table["group"].value_counts().to_dict() == {"HEG": 50, "HVG": 50, "MG": 8}
    assert tuple(table["gene"][table["group"] == "MG"]) == common.MARKER_GENES


# ---------------------------------------------------------------------------------------- precision
def watch_convolutions(model, monkeypatch):
    """A set that fills with (kind of convolution, dtype of the images that it gets)."""
    seen = set()
    for module in model.modules():
        if not isinstance(module, torch.nn.Conv2d):
            continue
        kind = "depthwise" if module.groups > 1 else "other"

        def look(images, *more, kind=kind, forward=module._conv_forward):
            seen.add((kind, images.dtype))
            return forward(images, *more)

        monkeypatch.setattr(module, "_conv_forward", look)
    return seen


@pytest.mark.parametrize("training, dtype", [(True, torch.float32), (False, torch.bfloat16)])
def test_depthwise_convolutions_train_in_fp32_under_a_processors_autocast(
    monkeypatch, training, dtype
):
    model = common.build_model(NETWORK, 5, 42)
    seen = watch_convolutions(model, monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        model.train(training)(torch.zeros((2, 3, 32, 32), dtype=torch.uint8))
    assert {images for kind, images in seen if kind == "depthwise"} == {dtype}
    assert ("other", torch.bfloat16) in seen


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@needs_gpu
def test_gpu_augments_as_the_cpu_does(little):
    patches, *_ = little
    draws = common.draw_augmentation(14, "mpa", torch.Generator().manual_seed(0))
    on_gpu = common.augment(patches.cuda(), *draws).cpu()
    torch.testing.assert_close(on_gpu, common.augment(patches, *draws), rtol=0, atol=0.05)


@pytest.mark.gpu
@needs_gpu
def test_gpu_trains_to_finite_losses(little):
    patches, target, *spots = little
    model = common.build_model(NETWORK, 5, 42).cuda().to(memory_format=torch.channels_last)
    placed = patches.cuda()
    recipe = RECIPE | {"DEVICE": "cuda", "PRECISION": "bf16"}
    history = common.fit(model, placed, split_of(target, *spots), recipe)
    assert placed.is_cuda
    assert np.isfinite([line["valid_mse"] for line in history]).all()
