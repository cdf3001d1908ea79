"""Scripts 24 and 25: prior methods against independent calculations, what controls and clusters
may see, intervals.
"""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    NETWORK,
    PAPER,
    SMALL_RUNS,
    ask,
    expect_refusal,
    load_script,
    printed_table,
    stdout_of,
    table_of,
)
from scipy.special import log_softmax, softmax
from torch import nn

import common
from study import constants, methods, recipes, ridges, rows, runs, splitting

SMALL_NETWORK = NETWORK | {"BACKBONE": "resnet18", "HIDDEN": 0}
CPU = {"DEVICE": "cpu", "PRECISION": "fp32", "IMAGE_SIZE": 32, "PRETRAINED": False, "REFIT": False}
CPU |= {"NEIGHBOURHOOD": False}


@pytest.fixture(scope="module")
def changed_split(paper_split):
    """paper_split with other expression, counts and depth of all spots but those of training."""
    data, others = paper_split.data, paper_split.roles != "train"
    target, annotations = data.target[:].copy(), data.annotations.copy()
    shape = others.sum(), target.shape[1]
    target[others] = np.random.default_rng(0).random(shape, np.float32) * 9
    annotations.obs.loc[others, "n_counts"] = 7.0
    data = dataclasses.replace(data, target=target, lognorm=target, annotations=annotations)
    return dataclasses.replace(paper_split, data=data)


def bleep_on(split, recipe):
    """(BLEEP's network before training, patches)."""
    row = rows.Row("BLEEP", recipe, split, None)
    model = methods.start_network(row)
    return load_script("25").build_bleep(model, row), row.place_patches()


def how_trained(script, split, monkeypatch, **changed):
    """{name: value} of what script 25 gives to Row.fit for a row, which is not trained."""
    row, seen = rows.Row("", SMALL_NETWORK | CPU | changed, split, None), {}
    monkeypatch.setattr(row, "fit", lambda network, _, **how: seen.update(how, network=network))
    monkeypatch.setattr(row, "predict", lambda network, patches: None)
    script.train_method(row)
    return seen


# ------------------------------------------------------------------------------------------- BLEEP
def test_contrastive_loss_against_numpy():
    images = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    spots = torch.randn(5, 8)
    a, b = images.numpy().astype(float), spots.numpy().astype(float)
    targets = softmax((a @ a.T + b @ b.T) / 2, axis=1)
    logits = b @ a.T
    one_way = -(targets * log_softmax(logits, axis=1)).sum(1)
    other_way = -(targets.T * log_softmax(logits.T, axis=1)).sum(1)
    loss = load_script("25").contrast(images, spots).item()
    assert loss == pytest.approx(np.mean([one_way, other_way]), rel=1e-5)


def test_retrieval_is_the_plain_mean_of_the_nearest_by_cosine():
    random = np.random.default_rng(1)
    images, spots = random.normal(size=(3, 8)), random.normal(size=(9, 8))
    expression = random.normal(size=(9, 4))
    spots[0] *= 100  # Length is not to matter.
    cosine = images @ spots.T / np.linalg.norm(spots, axis=1)
    expected = [expression[np.argsort(-line)[:4]].mean(0) for line in cosine]
    given = [torch.from_numpy(part) for part in (images, spots, expression)]
    retrieve = load_script("25").retrieve
    np.testing.assert_allclose(retrieve(*given, k=4), expected)
    everything = np.tile(expression.mean(0), (3, 1))
    np.testing.assert_allclose(retrieve(*given, k=50), everything)


def test_retrieval_does_not_tie_in_16_bits():
    random = np.random.default_rng(2)
    images, spots, expression = (
        torch.from_numpy(random.normal(size=shape).astype(np.float32))
        for shape in ((20, 256), (400, 256), (400, 5))
    )
    retrieve = load_script("25").retrieve
    with torch.autocast("cpu", dtype=torch.bfloat16):
        retrieved = retrieve(images, spots, expression)
    np.testing.assert_array_equal(retrieved, retrieve(images, spots, expression))


class Encoder(nn.Module):
    """An image encoder without BatchNorm, so that nothing but the loss ties a batch together."""

    def __init__(self, script):
        super().__init__()
        self.body = nn.Linear(48, 32)
        self.head = script.Projection(32)
        self.spots = script.Projection(6)

    def forward(self, patches):
        return self.head(self.body(patches.flatten(1)))


def bleep_of(micro_batch):
    """BLEEP over 12 spots of 6 genes and patches of 4 px."""
    script = load_script("25")
    torch.manual_seed(3)
    return script.Bleep(Encoder(script), torch.randn(12, 6), micro_batch)


@pytest.mark.parametrize("micro_batch", [1, 5, 11])
def test_accumulation_gives_the_loss_and_gradient_of_one_contrastive_batch(micro_batch):
    images, target = torch.randn(12, 3, 4, 4).double(), torch.randn(12, 6).double()
    whole, parts = bleep_of(12).double(), bleep_of(micro_batch).double()
    losses = []
    for network in (whole, parts):
        # Dropout's draws depend on the parts, so only BLEEP itself trains.
        network.model.eval()
        network.training = True
        loss = network.loss(network(images), target)
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12)


def test_accumulation_repeats_its_dropout():
    """Each part is computed twice; a gradient of other dropout draws would not be that of the
    loss.
    """
    network = bleep_of(4).train()
    images, target = torch.randn(12, 3, 4, 4), torch.randn(12, 6)
    weight = network.model.body.weight

    def loss():
        torch.manual_seed(7)
        return network.loss(network(images), target)

    loss().backward()
    direction = torch.randn_like(weight)
    before = weight.detach().clone()
    step, ends = 1e-3, []
    for sign in (1, -1):
        with torch.no_grad():
            weight.copy_(before + sign * step * direction)
        ends.append(loss().item())
    slope = (ends[0] - ends[1]) / (2 * step)
    assert slope == pytest.approx((weight.grad * direction).sum().item(), rel=0.02, abs=1e-3)


def test_bleep_retrieves_training_spots_with_the_weights_of_now(paper_split):
    recipe = SMALL_NETWORK | CPU | {"METHOD": "BLEEP", "MICRO_BATCH": 8}
    network, patches = bleep_on(paper_split, recipe)
    expression = paper_split.data.target[paper_split.spots("train")]
    assert np.array_equal(network.expression, expression)
    every = np.arange(len(paper_split.data.spots))
    predicted = common.predict(network, patches, every, dtype=torch.float32)
    # 24 training spots are fewer than the 50 that are averaged.
    mean = np.tile(expression.mean(0), (len(every), 1))
    np.testing.assert_allclose(predicted, mean, atol=1e-4)
    before = network.embedded.clone()
    with torch.no_grad():
        network.model.spots.first.weight += 1
    assert not torch.equal(before, network.eval().embedded)


def test_bleep_is_trained_by_its_own_loss_and_optimiser(paper_split, monkeypatch):
    changed = {"METHOD": "BLEEP", "MICRO_BATCH": 8, "LEARNING_RATE": 1e-3}
    how = how_trained(load_script("25"), paper_split, monkeypatch, **changed)
    network = how["network"]
    assert how["loss"] == network.loss
    optimiser = how["optimise"](network.parameters(), 1e-3)
    assert isinstance(optimiser, torch.optim.AdamW)
    assert optimiser.defaults["weight_decay"] == 1e-3


@pytest.mark.parametrize("method", ["BLEEP", "ST-Net"])
def test_an_interrupted_training_ends_with_the_same_bits(paper_split, tmp_path, method):
    recipe = NETWORK | load_script("25").trained_methods()[method] | CPU
    recipe |= {"BACKBONE": "resnet18", "BATCH_SIZE": 12, "EPOCHS": 3, "MICRO_BATCH": 6}
    recipe |= {"LEARNING_RATE": 1e-3}
    script = load_script("25")

    def train(stop_after, name):
        def stop(history, best_epoch):
            if history[-1]["epoch"] > stop_after:
                raise KeyboardInterrupt

        row = rows.Row(method, recipe, paper_split, tmp_path / name, report=stop)
        return script.train_method(row)

    whole = train(9, "whole")
    with pytest.raises(KeyboardInterrupt):
        train(1, "stopped")
    np.testing.assert_array_equal(train(9, "stopped"), whole)


# ------------------------------------------------------------------------------------------ ST-Net
def test_published_stnet_constants():
    trained = load_script("25").trained_methods()
    published = {"HIDDEN": 0, "AUG": "stnet", "HEAD_START": "mean"}
    assert trained["ST-Net, Adam"].items() >= published.items()
    published |= {"EPOCHS": 50, "BATCH_SIZE": 32, "LEARNING_RATE": 1e-6, "BACKBONE": "densenet121"}
    published |= {"SCHEDULE": "constant", "LOSS": "mse"}
    assert trained["ST-Net"].items() >= published.items()
    told = "LOSS is of other methods, and changes none of its rows"
    assert trained["BLEEP"]["LOSS"] == "mse", told


def test_bleeps_rate_is_constant_as_published():
    """A training of it by BLEEP's recipe: the optimiser's rate after several epochs."""
    recipe = recipes.PAPER | load_script("25").trained_methods()["BLEEP"]
    _, schedule = common.prepare_optimiser(nn.Linear(3, 4), recipe, load_script("25").adamw)
    for _ in range(3):
        schedule.optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == [1e-3]


def test_published_stnet_is_trained_by_its_own_loss_and_optimiser(paper_split, monkeypatch):
    script = load_script("25")
    how = how_trained(script, paper_split, monkeypatch, METHOD="ST-Net")
    assert how["loss"] is script.sum_of_squares
    assert how["optimise"] is script.sgd_with_momentum
    how = how_trained(script, paper_split, monkeypatch, METHOD="ST-Net, Adam")
    assert not how.keys() & {"loss", "optimise"}


def test_published_stnet_loss_and_optimiser():
    script = load_script("25")
    predicted, target = torch.randn(5, 250), torch.randn(5, 250)
    over_genes = ((predicted - target) ** 2).mean(1)
    loss = script.sum_of_squares(predicted, target).item()
    assert loss == pytest.approx(over_genes.sum().item(), rel=1e-5), "summed over the batch"
    target, network = target[:, :4], nn.Linear(3, 4)
    weight = network.weight
    recipe = script.trained_methods()["ST-Net"]
    optimiser, schedule = common.prepare_optimiser(network, recipe, script.sgd_with_momentum)
    expected, velocity = weight.detach().clone(), 0
    for _ in range(3):  # Momentum by hand, and a rate that stays.
        optimiser.zero_grad()
        script.sum_of_squares(network(torch.ones(5, 3)), target).backward()
        velocity = 0.9 * velocity + weight.grad
        expected = expected - 1e-6 * velocity
        optimiser.step()
        schedule.step()
    torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("n_genes", [30, 250, 3320])
def test_a_genes_step_of_published_stnet_is_that_of_250_genes(n_genes):
    """By hand: d/dp of the sum over the batch of the mean over 250 genes of (p - t)^2."""
    random = torch.Generator().manual_seed(0)
    predicted = torch.randn((5, n_genes), generator=random, requires_grad=True)
    target = torch.randn((5, n_genes), generator=random)
    load_script("25").sum_of_squares(predicted, target).backward()
    expected = 2 * (predicted.detach() - target) / 250
    torch.testing.assert_close(predicted.grad, expected)


# ------------------------------------------------------------------------------ baselines, controls
@pytest.mark.parametrize("sees_around", [False, True])
@pytest.mark.parametrize("method", [methods.ridge_on_features, methods.ridge_on_colour])
def test_ridges_see_the_training_spots_alone(paper_split, changed_split, method, sees_around):
    recipe = CPU | {"BACKBONE": "resnet18", "NEIGHBOURHOOD": sees_around}
    one, told = ask(method, recipe, paper_split)
    other, told_then = ask(method, recipe, changed_split)
    np.testing.assert_array_equal(one, other)
    assert told == told_then
    assert np.ptp(one[-10:], axis=0).max() > 0


def test_the_ridge_on_features_learns_from_training_spots(paper_split):
    method, recipe = methods.ridge_on_features, CPU | {"BACKBONE": "resnet18"}
    target = paper_split.data.target[:].copy()
    target[paper_split.spots("train")] *= -3
    data = dataclasses.replace(paper_split.data, target=target)
    one, _ = ask(method, recipe, paper_split)
    other, _ = ask(method, recipe, dataclasses.replace(paper_split, data=data))
    assert not np.allclose(one, other)


def test_depth_control_uses_the_spots_own_depth(paper_split, changed_split):
    method, data = load_script("25").depth_only, paper_split.data
    predicted, _ = ask(method, CPU, paper_split)
    depth = np.log(data.annotations.obs["n_counts"].to_numpy(float))
    train, scored = paper_split.spots("train"), paper_split.scored()
    for g in (0, 100):
        slope, intercept = np.polyfit(depth[train], data.target[train][:, g], 1)
        expected = intercept + slope * depth[scored]
        np.testing.assert_allclose(predicted[:, g], expected, rtol=1e-3, atol=1e-3)
    predicted, _ = ask(method, CPU, changed_split)
    test = predicted[paper_split.roles[scored] == "test"]
    assert (np.ptp(test, axis=0) == 0).all(), "all have the same depth now"


def test_nearest_spot_control_copies_the_neighbouring_training_slide(paper_split, changed_split):
    method, spots = load_script("25").nearest_spot, paper_split.data.spots
    predicted, _ = ask(method, CPU, paper_split)
    centres = spots[["pxl_col", "pxl_row"]]
    centres = (centres - centres.groupby(spots["tissue_index"]).transform("mean")).to_numpy()
    # Of slide 3, slides 2 and 4 are as near; the first is taken.
    train = paper_split.spots("train")
    source = train[spots["tissue_index"].to_numpy()[train] == 2]
    scored = paper_split.scored()
    for spot in paper_split.spots("test")[:4]:
        distance = np.linalg.norm(centres[source] - centres[spot], axis=1)
        nearest = source[distance.argmin()]
        (own,) = predicted[scored == spot]
        np.testing.assert_array_equal(own, paper_split.data.target[nearest])
    np.testing.assert_array_equal(predicted, ask(method, CPU, changed_split)[0])


def test_without_another_training_slide_there_is_no_nearest_spot(paper_split):
    roles = paper_split.roles.copy()
    roles[paper_split.data.spots["tissue_index"].isin([2, 4])] = ""
    alone = dataclasses.replace(paper_split, roles=roles)
    predicted, _ = ask(load_script("25").nearest_spot, CPU, alone)
    test = roles[alone.scored()] == "test"
    assert np.isnan(predicted[~test]).all()
    assert np.isfinite(predicted[test]).all()


def slide_of_smooth_fields(side=15, genes=150, fields=6):
    """(Split whose test slide is a square of spots in blocks, features (N, F) that vary smoothly
    over it, expression (N, G) that follows them).
    """
    random = np.random.default_rng(0)
    row, col = (axis.ravel() for axis in np.mgrid[:side, :side])
    waves = random.uniform(0.1, 0.5, (2, fields))
    features = np.sin(row[:, None] * waves[0] + col[:, None] * waves[1] + np.arange(fields))
    expression = features @ random.normal(size=(fields, genes))
    expression = expression + 3 * random.normal(size=expression.shape)
    spots = pd.DataFrame({"tissue_index": 1, "pitch": 100.0, "pxl_row": row * 100})
    spots["pxl_col"] = col * 100
    spots["block"] = [f"1:{x // 5}:{y // 5}" for x, y in zip(col, row, strict=True)]
    spots["id"] = spots.index.astype(str)
    data = SimpleNamespace(spots=spots, target=expression, genes=[str(g) for g in range(genes)])
    groups = pd.DataFrame({"group": "HEG", "gene": data.genes, "rank": 1})
    roles = np.full(len(spots), "test")
    return splitting.Split(data, roles, groups, seed=42), features


@pytest.mark.parametrize("permuted, low, high", [(True, -0.02, 0.02), (False, 0.3, 1)])
def test_the_same_slide_ridge_finds_what_is_there_and_nothing_in_permuted_counts(
    monkeypatch, permuted, low, high
):
    split, features = slide_of_smooth_fields()
    if permuted:
        random = np.random.default_rng(1)
        split.data.target = random.permuted(split.data.target, axis=0)  # each gene by itself
    script = load_script("25")
    monkeypatch.setattr(script, "freeze_features", lambda recipe, split: (features, None))
    recipe = {"PRETRAINED": True, "BACKBONE": "tiny", "REFIT": False}
    predicted, _ = ask(script.same_slide, recipe, split)
    r = common.pearson_per_gene(predicted, split.data.target)
    assert low < r.mean() < high


def test_a_ridge_through_a_point_has_the_same_weight():
    random = np.random.default_rng(0)
    ridge = ridges.Ridge(random.normal(size=(3, 2)), random.normal(size=2))
    point, wanted = random.normal(size=3), random.normal(size=2)
    moved = ridge.through(point, wanted)
    np.testing.assert_allclose(moved.predict(point[None])[0], wanted, rtol=1e-6)
    assert moved.weight is ridge.weight


def test_rows_of_another_version_are_made_anew_and_left_out(paper_split, tmp_path, monkeypatch):
    recipe = CPU | PAPER | {"TARGET": "lognorm"}
    for version in (common.RESULTS - 1, common.RESULTS):
        monkeypatch.setattr(common, "RESULTS", version)
        run = runs.Run({}, recipe, [paper_split], tmp_path)
        row = run.fill(run.row("ridge (colour)", paper_split), methods.ridge_on_colour)
    assert len(list(tmp_path.glob("*/rows.json"))) == 2
    assert len(pd.read_csv(tmp_path / "rows.csv")) == len(row.lines)


def test_a_folder_that_was_copied_or_renamed_is_no_row_again(paper_split, tmp_path):
    recipe = CPU | PAPER | {"TARGET": "lognorm"}

    def fill():
        run = runs.Run({}, recipe, [paper_split], tmp_path)
        return run.fill(run.row("ridge (colour)", paper_split), methods.ridge_on_colour)

    shutil.copytree(fill().folder, tmp_path / "a copy")
    fill().folder.rename(tmp_path / "renamed")
    assert len(pd.read_csv(tmp_path / "rows.csv")) == len(fill().lines)


def test_rows_of_another_dataset_are_told_and_left_out(paper_split, tmp_path, capsys):
    recipe = CPU | PAPER | {"TARGET": "lognorm"}
    told = []
    for fingerprint in ("before", "now", "now"):
        data = dataclasses.replace(paper_split.data, fingerprint=fingerprint)
        split = dataclasses.replace(paper_split, data=data)
        run = runs.Run({}, recipe, [split], tmp_path)
        row = run.fill(run.row("ridge (colour)", split), methods.ridge_on_colour)
        told.append(capsys.readouterr().out)
    assert [text.count("leaves out 1 of another data root") for text in told] == [0, 1, 1]
    assert len(list(tmp_path.glob("*/rows.json"))) == 2
    table = pd.read_csv(tmp_path / "rows.csv")
    assert {*table["folder"]} == {row.folder.name} and len(table) == len(row.lines)


def test_the_full_rank_is_kept_through_a_refit(paper_split):
    recipe = CPU | {"BACKBONE": "resnet18", "REFIT": True}
    _, told = ask(methods.ridge_on_features, recipe | {"FULL_RANK": True}, paper_split)
    assert told["rank"] is None
    _, told = ask(methods.ridge_on_features, recipe, paper_split)
    assert told["rank"] >= 1


@pytest.fixture
def with_weights():
    """Script 25 as it is started with a folder of weights, and its methods that need no training."""
    script = load_script("25")
    script.PRETRAINED, script.BACKBONE, script.FEATURES = "weights", "tiny", "densenet121"
    baseline = {"PRETRAINED": False}
    run = SimpleNamespace(
        splits=["the only one"],
        baseline=baseline,
        recipe=baseline | {"PRETRAINED": "weights", "IMAGE_SIZE": 32},
        find=lambda setting, split: SimpleNamespace(folder=Path(setting)),
        row=lambda setting, split, recipe: (setting, recipe["MEMBERS"]),
        filled=[],
    )
    run.fill = lambda row, method, refit: run.filled.append(row)
    return script, run, script.computed_methods(run)


def test_with_weights_every_backbone_has_its_ridges(with_weights):
    _, _, methods = with_weights
    for backbone in ("tiny", "densenet121", "resnet50"):
        for kind in ("", ", all stages", ", neighbourhood"):
            assert f"ridge ({backbone}{kind})" in methods
    assert [name for name in methods if "full rank" in name] == ["ridge (densenet121, full rank)"]


def test_means_are_of_networks_and_of_ridges_on_single_spots_or_the_neighbourhood(with_weights):
    script, run, methods = with_weights
    script.OTHER_BACKBONES = ("resnet50",)
    names = [*script.trained_methods(), *methods]
    run.rows = [SimpleNamespace(setting=name) for name in names]
    script.fill_ensembles(run)
    backbones = "tiny", "densenet121", "resnet50"
    networks = ["tiny", "resnet50", "ST-Net, Adam"]
    expected = {
        "mean of 6 models": ", all stages)",
        "mean of 6 models, neighbourhood": ", neighbourhood)",
    }
    assert [setting for setting, _ in run.filled] == [*expected]
    for setting, members in run.filled:
        ridges = [f"ridge ({backbone}{expected[setting]}" for backbone in backbones]
        assert members == sorted(networks + ridges)
    run.rows = [row for row in run.rows if row.setting in networks]
    script.fill_ensembles(run)
    assert len(run.filled) == 2, "none without ridges"


# -------------------------------------------------------------------------- script 25, end to end
METHODS = ["EfficientNet-B0", "EfficientNet-B0, random start", "EfficientNet-B0, linear head"]
METHODS += ["resnet10t", "ST-Net", "ST-Net, random start", "ST-Net, Adam"]
METHODS += ["ST-Net, Adam, random start", "BLEEP"]
METHODS += [f"{setting}, 1 view" for setting in METHODS[:4]]
METHODS += ["BLEEP, all references", "training mean"]
METHODS += ["ridge (colour)", "ridge (resnet18)"]
METHODS += ["depth only (control)", "nearest spot (control)"]


@pytest.fixture(scope="module")
def compared(finished):
    """Table of script 25's records."""
    return table_of(finished("25")[1])


def shown(stdout, name):
    """(head of the printed table of methods, the line of one without its name)."""
    head, lines = printed_table(stdout, "methods; a control uses")
    (line,) = [line for line in lines if line.startswith(name)]
    return head, line.removeprefix(name)


def test_every_method_has_its_rows(compared, finished):
    assert compared["setting"].unique().tolist() == METHODS
    assert set(compared["setting"].value_counts()) == {2}
    assert "published, not computed here" not in finished("25")[1]


def test_the_training_mean_has_no_r(compared, finished):
    of = compared[compared["setting"] == "training mean"]
    assert of["heg"].isna().all()
    assert (of[["heg_n", "n_genes_r30"]] == 0).all(axis=None)
    head, line = shown(finished("25")[1], "training mean")
    words = dict(zip(COLUMNS_25, line.split(), strict=False))
    for column in ("HEG", "[95 %]", "of ceiling", "steps", "M", "over BLEEP"):
        assert column in head
        assert words[column] == "-"


# Of the printed table, after the setting.
COLUMNS_25 = ["HEG", "[95 %]", "of ceiling", "steps", "M", "min", "var", "over BLEEP"]


def test_the_table_shows_how_much_predictions_vary(compared, finished):
    tested = compared[compared["split"] == "test"].set_index("setting")
    for name in ("ridge (colour)", "depth only (control)"):
        _, line = shown(finished("25")[1], name)
        assert f" {tested.loc[name, 'variance_ratio']:.2f} " in line


def test_parameters_of_prior_methods(compared, simulated):
    total = compared.groupby("setting")["parameters_total"].first()
    panel = len(common.load_dataset(simulated, "lognorm").genes)
    assert total["ST-Net"] == 6953856 + 1025 * panel
    of_images = (2048 + 1) * 256 + (256 + 1) * 256 + 2 * 256
    of_spots = (panel + 1) * 256 + (256 + 1) * 256 + 2 * 256
    assert total["BLEEP"] == 23508032 + of_images + of_spots


@pytest.mark.parametrize(
    "options", [{"only": "depth only (control)"}, {"only": "BLEEP", "stnet_epochs": 9}]
)
def test_a_method_is_not_computed_again_for_another_ones_constants(copied, simulated, options):
    options = SMALL_RUNS["25"] | options
    assert "on disk already" in stdout_of("25", data_root=simulated, out=copied("25"), **options)


# --------------------------------------------------------------------------------------- script 24
def recipe_24(script, **changed):
    return constants.recipe_of(vars(script)) | CPU | {"FEATURES": ""} | changed


def grid_of_spots(n_slides=3, side=14):
    """(SpotData, quarter of each spot): each slide a square grid whose image features follow its
    quarters.
    """
    array_row, array_col = (axis.ravel() for axis in np.mgrid[:side, :side])
    slide = pd.DataFrame({"array_row": array_row, "array_col": array_col})
    slides = [slide.assign(tissue_index=number) for number in range(n_slides)]
    spots = pd.concat(slides, ignore_index=True)
    spots = spots.assign(id=spots.index.astype(str), pitch=100.0)
    spots = spots.assign(pxl_row=spots["array_row"] * 100, pxl_col=spots["array_col"] * 100)
    half = side / 2
    quarter = (spots["array_row"] // half * 2 + spots["array_col"] // half).to_numpy(int)
    colour = np.eye(4)[quarter] * 10 + np.random.default_rng(0).normal(size=(len(spots), 4))
    values = np.random.default_rng(1).random((len(spots), 3))
    annotations = anndata.AnnData(values, obsm={"colour": colour})
    known = {"spots": spots, "target": values, "lognorm": values, "annotations": annotations}
    others = {"root": None, "patches": None, "genes": [*"abc"], "meta": {}}
    return common.SpotData(**known, **others, fingerprint="", label=""), quarter


def test_clusters_find_the_tissue_and_test_spots_follow_their_image():
    script = load_script("24")
    script.WEIGHTS = ((1, 0), (1, 0.5))
    data, quarter = grid_of_spots()
    chosen = (data.spots["tissue_index"] < 2) & (np.arange(len(quarter)) % 5 > 0)
    train = np.flatnonzero(chosen)
    threads = torch.get_num_threads()
    ids, points, grid = script.cluster_spots(data, train, recipe_24(script), 42)
    assert torch.get_num_threads() == threads
    assert points.shape == (len(train), 2)
    assert len(grid) == 2
    assert grid["silhouette"].is_monotonic_decreasing
    shares = pd.crosstab(quarter, ids, normalize="columns")
    assert (shares.max() > 0.95).all(), "each cluster lies in one quarter"
    assert shares.idxmax().nunique() == 4
    again, _, _ = script.cluster_spots(data, train, recipe_24(script), 42)
    np.testing.assert_array_equal(ids, again)


def test_any_whole_number_is_a_seed_of_clusters(paper_split):
    script = load_script("24")
    for seed in (-1, 2**40):
        script.describe_spots(paper_split.data, paper_split.spots("train"), recipe_24(script), seed)


def test_a_test_spots_cluster_does_not_change_with_its_expression(paper_split, changed_split):
    script = load_script("24")
    script.WEIGHTS = ((1, 0.5),)
    recipe, train = recipe_24(script, MIN_CLUSTER=0.1), paper_split.spots("train")
    ids, _, _ = script.cluster_spots(paper_split.data, train, recipe, 42)
    changed, _, _ = script.cluster_spots(changed_split.data, train, recipe, 42)
    np.testing.assert_array_equal(ids, changed)


def test_positional_codes_are_64_numbers_scaled_within_a_slide():
    script, (data, _) = load_script("24"), grid_of_spots(2)
    assert np.isfinite(script.encode_positions(data.spots.assign(array_row=4))).all(), "of one row"
    spots, half = data.spots.copy(), len(data.spots) // 2
    axes = ["array_row", "array_col"]
    spots.loc[spots["tissue_index"] == 1, axes] = 3 * spots[axes] + 50
    codes = script.encode_positions(spots)
    assert codes.shape == (len(spots), 64)
    assert np.abs(codes).max() <= 1
    np.testing.assert_allclose(codes[:half], codes[half:], atol=1e-9)
    assert len(np.unique(codes[:half].round(6), axis=0)) == half, "each position is its own"


def test_shuffled_ids_are_the_same_ids_of_each_slide():
    script, slides = load_script("24"), np.repeat([1, 2], 50)
    ids = np.random.default_rng(0).integers(0, 5, 100)
    shuffled = script.shuffle_ids(ids, slides, 42)
    assert not np.array_equal(ids, shuffled)
    assert np.array_equal(shuffled, script.shuffle_ids(ids, slides, 42))
    for slide in (1, 2):
        own = slides == slide
        np.testing.assert_array_equal(np.sort(ids[own]), np.sort(shuffled[own]))


@pytest.mark.parametrize("hidden", [0, 16])
def test_with_an_id_the_network_starts_as_the_same_function(hidden):
    script, recipe = load_script("24"), SMALL_NETWORK | {"HIDDEN": hidden}
    patches = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    ids = np.array([0, 4, 2, 2, 1, 0])
    plain, model = (common.build_model(recipe, 5, 1).eval() for _ in range(2))
    network = script.WithId(model, 5, 8).eval()
    with_id = script.PatchesWithId(patches, ids)
    spots = torch.tensor([5, 1, 2])
    torch.testing.assert_close(network(with_id[spots]), plain(patches[spots]))
    linear = [layer for layer in model.head if isinstance(layer, nn.Linear)]
    nn.init.normal_(linear[0].weight)
    other_id = script.PatchesWithId(patches, ids + 1)
    first = torch.tensor([0])
    assert not torch.equal(network(with_id[first]), network(other_id[first]))


@pytest.mark.parametrize("border", ["reflect", "black"])
def test_a_warp_leaves_the_id_as_it_is(border):
    images = torch.zeros((64, 3, 32, 32), dtype=torch.uint8)
    patches = load_script("24").PatchesWithId(images, np.arange(64) * 4)
    draws = common.draw_augmentation(64, "mpa", torch.Generator().manual_seed(0))
    warped = common.augment(patches[torch.arange(64)], *draws, border=border)
    assert draws[1].sum() > 20
    assert torch.equal(warped[:, 3, 16, 16].round().long(), torch.arange(64) * 4)


def test_clusters_are_printed_and_saved_and_have_their_rows(finished):
    out, stdout = finished("24")
    settings = ["no id", "cluster id", "shuffled id"]
    assert table_of(stdout)["setting"].tolist() == [name for name in settings for _ in range(2)]
    head, lines = printed_table(stdout, "clusters of the first training")
    assert "silhouette" in head
    assert len(lines) == 2
    head, _ = printed_table(stdout, "with and without a cluster id")
    assert "HEG minus no id" in head
    assert len(pd.read_csv(out / "grid.csv")) == 2
    assert (out / "clusters.png").stat().st_size > 10_000
    assert pd.read_csv(out / "clusters.csv")["cluster_42_0"].nunique() >= 2


def test_a_constant_of_the_ids_does_not_touch_the_row_without_one(copied, simulated):
    options = SMALL_RUNS["24"] | {"embedding": 8, "only": "no id"}
    stdout = stdout_of("24", data_root=simulated, out=copied("24"), **options)
    assert "on disk already" in stdout
    assert "clusters of" not in stdout, "which that row does not need"


def test_clusters_that_cannot_be_are_told(simulated, tmp_path):
    options = SMALL_RUNS["24"] | {"min_cluster": 0.9}
    expect_refusal(["MIN_CLUSTER"], "24", data_root=simulated, out=tmp_path, **options)
