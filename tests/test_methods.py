"""Scripts 24 and 25: prior methods against independent calculations, what controls and clusters may see, intervals."""

import json

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY, load_script, run_script
from scipy.special import log_softmax, softmax
from torch import nn

import common

NETWORK = {"BACKBONE": "resnet18", "PRETRAINED": False, "HIDDEN": 0, "TRAINABLE_STAGES": -1}
CPU = {"DEVICE": "cpu", "PRECISION": "fp32", "IMAGE_SIZE": 32, "PRETRAINED": False}


def last_json(stdout):
    return json.loads(stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def experiment(simulated, tmp_path_factory):
    data = common.load_dataset(simulated, "lognorm")
    recipe = {"TEST_SLIDE": 3, "TRAIN_SLIDES": (), "VALID_FRACTION": 0.2, "PROTOCOL": "paper"}
    (roles,) = common.split_spots(data.spots, recipe, 42)
    groups = common.choose_gene_groups(data, roles == "train", True)
    return common.Experiment(data, roles, groups, tmp_path_factory.mktemp("runs"), 42)


def change_test_spots(experiment):
    """The experiment with other expression, counts and depth on the test slide."""
    import dataclasses

    data, test = experiment.data, experiment.roles == "test"
    target, counts = data.target.copy(), data.counts.copy()
    target[test] = np.random.default_rng(0).random((test.sum(), target.shape[1]), np.float32) * 9
    counts.obs.loc[test, "n_counts"] = 7.0
    return dataclasses.replace(
        experiment, data=dataclasses.replace(data, target=target, lognorm=target, counts=counts)
    )


# ------------------------------------------------------------------------------------- BLEEP


def test_contrastive_loss_against_numpy():
    images, spots = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), torch.randn(5, 8)
    a, b = images.numpy().astype(float), spots.numpy().astype(float)
    targets, logits = softmax((a @ a.T + b @ b.T) / 2, axis=1), b @ a.T
    expected = [
        -(targets * log_softmax(logits, axis=1)).sum(1),
        -(targets.T * log_softmax(logits.T, axis=1)).sum(1),
    ]
    assert load_script("25").contrast(images, spots).item() == pytest.approx(
        np.mean(expected), rel=1e-5
    )


def test_retrieval_is_the_plain_mean_of_the_nearest_by_cosine():
    random = np.random.default_rng(1)
    images, spots, expression = (
        random.normal(size=(3, 8)),
        random.normal(size=(9, 8)),
        random.normal(size=(9, 4)),
    )
    spots[0] *= 100  # length is not to matter
    cosine = (
        images @ spots.T / np.linalg.norm(images, axis=1)[:, None] / np.linalg.norm(spots, axis=1)
    )
    expected = [expression[np.argsort(-line)[:4]].mean(0) for line in cosine]
    given = [torch.from_numpy(part) for part in (images, spots, expression)]
    np.testing.assert_allclose(load_script("25").retrieve(*given, k=4), expected)
    everything = load_script("25").retrieve(*given, k=50)
    np.testing.assert_allclose(everything, np.tile(expression.mean(0), (3, 1)))


class Encoder(nn.Module):
    """An image encoder without BatchNorm, so that nothing but the loss ties a batch together."""

    def __init__(self, script):
        super().__init__()
        self.body, self.head, self.spots = (
            nn.Linear(48, 32),
            script.Projection(32),
            script.Projection(6),
        )

    def forward(self, patches):
        return self.head(self.body(patches.flatten(1)))


def bleep_of(micro_batch):
    """BLEEP over 12 spots of 6 genes and patches of 4 px."""
    script = load_script("25")
    torch.manual_seed(3)
    return script.Bleep(Encoder(script), torch.randn(12, 6), micro_batch)


@pytest.mark.parametrize("micro_batch", [1, 5, 11])
def test_accumulation_gives_the_loss_and_gradient_of_one_contrastive_batch(
    micro_batch, monkeypatch
):
    images, target = torch.randn(12, 3, 4, 4).double(), torch.randn(12, 6).double()
    whole, parts = bleep_of(12).double(), bleep_of(micro_batch).double()
    for network in (whole, parts):
        (
            network.model.eval(),
            network.model.spots.eval(),
        )  # dropout draws depend on the split; BLEEP itself trains
        network.training = True
        network.loss(network(images), target).backward()
    assert whole.loss(whole(images), target).item() == pytest.approx(
        parts.loss(parts(images), target).item(), rel=1e-12
    )
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12)


def test_accumulation_repeats_its_dropout():
    """Each part is computed twice; a gradient of other dropout draws would not be that of the loss."""
    network, images, target = bleep_of(4).train(), torch.randn(12, 3, 4, 4), torch.randn(12, 6)
    weight, loss = network.model.body.weight, lambda: network.loss(network(images), target)
    torch.manual_seed(7)
    loss().backward()
    direction = torch.randn_like(weight)
    step, ends = 1e-3, []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction
        torch.manual_seed(7)
        ends.append(loss().item())
        with torch.no_grad():
            weight -= sign * step * direction
    slope = (ends[0] - ends[1]) / (2 * step)
    assert slope == pytest.approx((weight.grad * direction).sum().item(), rel=0.02, abs=1e-3)


def test_bleep_retrieves_training_spots_with_the_weights_of_now(experiment):
    script, data = load_script("25"), experiment.data
    recipe = NETWORK | CPU | {"METHOD": "BLEEP", "MICRO_BATCH": 8}
    patches = common.place_patches(data.patches, 32, torch.device("cpu"))
    network, _ = script.adapt(
        common.build_model(recipe, len(data.genes), 42), patches, recipe, experiment
    )
    train = experiment.rows("train")
    assert np.array_equal(network.expression, data.target[train])
    predicted = common.predict(network, patches, np.arange(len(patches)), dtype=torch.float32)
    np.testing.assert_allclose(
        predicted, np.tile(data.target[train].mean(0), (len(predicted), 1)), atol=1e-4
    )  # 24 < 50
    before = network.embedded.clone()
    with torch.no_grad():
        network.model.spots.first.weight += 1
    assert not torch.equal(before, network.eval().embedded)


@pytest.mark.parametrize("method", ["BLEEP", "ST-Net"])
def test_an_interrupted_training_ends_with_the_same_bits(experiment, tmp_path, method):
    script, data = load_script("25"), experiment.data
    recipe = (
        script.methods()[method]
        | CPU
        | {"BACKBONE": "resnet18", "BATCH_SIZE": 12, "EPOCHS": 3, "MICRO_BATCH": 6}
    )
    recipe |= {"LEARNING_RATE": 1e-3}
    patches = common.place_patches(data.patches, 32, torch.device("cpu"))

    def train(stop_after, name):
        def stop(line, predicted, best_epoch):
            if line["epoch"] > stop_after:
                raise KeyboardInterrupt

        model = common.build_model(recipe, len(data.genes), 42)
        network, _ = script.adapt(model, patches, recipe, experiment)
        rows = experiment.rows("train"), experiment.rows("valid")
        options = {
            "recipe": recipe,
            "seed": 42,
            "dtype": torch.float32,
            "checkpoint": tmp_path / name / "checkpoint.pt",
            "report": stop,
        }
        common.fit(network, patches, data.target, *rows, **options)
        return common.predict(network, patches, experiment.rows("test"), dtype=torch.float32)

    whole = train(9, "whole")
    with pytest.raises(KeyboardInterrupt):
        train(1, "stopped")
    np.testing.assert_array_equal(train(9, "stopped"), whole)


# ------------------------------------------------------------------------------------- ST-Net


@pytest.mark.parametrize("method", ["ST-Net", "ST-Net, our optimiser"])
def test_stnets_first_prediction_is_the_training_mean(experiment, method):
    script, data = load_script("25"), experiment.data
    recipe = script.methods()[method] | CPU | {"BACKBONE": "resnet18"}
    assert (
        recipe["HIDDEN"] == 0
        and recipe["START_AT_MEAN"]
        and recipe["TTA"]
        and recipe["AUG"] == "stnet"
    )
    model, mean = (
        common.build_model(recipe, len(data.genes), 42),
        data.target[experiment.rows("train")].mean(0),
    )
    model.head[-1].bias.data.copy_(
        torch.from_numpy(mean)
    )  # as train_network does where START_AT_MEAN
    network, patches = script.adapt(
        model, common.place_patches(data.patches, 32, torch.device("cpu")), recipe, experiment
    )
    predicted = common.predict(network, patches, experiment.rows("test"), dtype=torch.float32)
    np.testing.assert_array_equal(predicted, np.tile(mean, (len(predicted), 1)))


def test_published_stnet_loss_and_optimiser(experiment):
    script = load_script("25")
    recipe = script.methods()["ST-Net"]
    published = {"EPOCHS": 50, "BATCH_SIZE": 32, "LEARNING_RATE": 1e-6, "BACKBONE": "densenet121"}
    assert {key: recipe[key] for key in published} == published
    network = script.StNet(nn.Linear(3, 4))
    predicted, target = torch.randn(5, 4), torch.randn(5, 4)
    per_spot = ((predicted - target) ** 2).mean(1)  # over genes; summed over the batch
    assert network.loss(predicted, target).item() == pytest.approx(per_spot.sum().item(), rel=1e-5)
    weight = network[0].weight
    optimiser, schedule = network.optimise(network.parameters(), recipe)
    before, velocity = weight.detach().clone(), 0
    for _ in range(3):  # momentum by hand, and a rate that stays
        optimiser.zero_grad()
        network.loss(network(torch.ones(5, 3)), target).backward()
        velocity = 0.9 * velocity + weight.grad
        before = before - 1e-6 * velocity
        optimiser.step()
        schedule.step()
    torch.testing.assert_close(weight.detach(), before)


# ------------------------------------------------------------------------------------- baselines and controls


def test_ridges_never_see_the_test_spots(experiment):
    script, changed = load_script("25"), change_test_spots(experiment)
    for compute, recipe in (
        (script.ridge_on_features, CPU | {"FEATURES": "resnet18"}),
        (common.ridge_on_colour, {}),
    ):
        one, facts = compute(recipe, experiment, None)
        other, facts_then = compute(recipe, changed, None)
        np.testing.assert_array_equal(one, other)
        assert facts == facts_then and np.ptp(one[-10:], axis=0).max() > 0
    changed.data.target[changed.roles == "train"] *= -3
    assert not np.allclose(
        script.ridge_on_features(CPU | {"FEATURES": "resnet18"}, changed, None)[0], one
    )


def test_depth_control_uses_the_spots_own_depth(experiment):
    script = load_script("25")
    predicted, _ = script.depth_only({}, experiment, None)
    depth = np.log(experiment.data.counts.obs["n_counts"].to_numpy(float))
    rows, train = experiment.rows(*common.SPLITS), experiment.rows("train")
    for g in (0, 100):
        slope, intercept = np.polyfit(depth[train], experiment.data.target[train, g], 1)
        np.testing.assert_allclose(
            predicted[:, g], intercept + slope * depth[rows], rtol=1e-3, atol=1e-3
        )
    dark, _ = script.depth_only({}, change_test_spots(experiment), None)
    assert (np.ptp(dark[rows >= 0][experiment.roles[rows] == "test"], axis=0) == 0).all(), (
        "all have the same depth now"
    )


def test_nearest_spot_control_copies_the_neighbouring_training_slide(experiment):
    data, script = experiment.data, load_script("25")
    predicted, _ = script.nearest_spot({}, experiment, None)
    rows, spots = experiment.rows(*common.SPLITS), data.spots
    slide = spots["tissue_index"].to_numpy()
    middle = spots.groupby("tissue_index")[["pxl_col", "pxl_row"]].transform("mean").to_numpy()
    xy = spots[["pxl_col", "pxl_row"]].to_numpy() - middle
    source = experiment.rows("train")[
        slide[experiment.rows("train")] == 2
    ]  # of slide 3: 2 and 4 are as near; the first
    for i in experiment.rows("test")[:4]:
        nearest = source[np.linalg.norm(xy[source] - xy[i], axis=1).argmin()]
        np.testing.assert_array_equal(predicted[rows == i][0], data.target[nearest])
    np.testing.assert_array_equal(
        predicted, script.nearest_spot({}, change_test_spots(experiment), None)[0]
    )


def test_without_another_training_slide_there_is_no_nearest_spot(experiment):
    import dataclasses

    alone = experiment.roles.copy()
    alone[experiment.data.spots["tissue_index"].isin([2, 4])] = ""
    predicted, _ = load_script("25").nearest_spot(
        {}, dataclasses.replace(experiment, roles=alone), None
    )
    test = alone[dataclasses.replace(experiment, roles=alone).rows(*common.SPLITS)] == "test"
    assert np.isnan(predicted[~test]).all() and np.isfinite(predicted[test]).all()


TINY_25 = (
    *TINY,
    "--target",
    "lognorm",
    "--epochs",
    1,
    "--stnet-epochs",
    1,
    "--bleep-epochs",
    2,
    "--bleep-batch",
    24,
)
TINY_25 += ("--micro-batch", 8, "--features", "resnet18")


def test_methods_end_to_end(simulated, tmp_path, capsys):
    arguments = ("--data-root", simulated, "--out", tmp_path, *TINY_25, "--published")
    assert run_script("25", *arguments) == 0
    stdout = capsys.readouterr().out
    rows = pd.DataFrame(last_json(stdout)["rows"])
    names = [
        "EfficientNet-B0",
        "ST-Net",
        "ST-Net, our optimiser",
        "BLEEP",
        "training mean",
        "ridge (colour)",
    ]
    names += ["ridge (resnet18)", "depth only (control)", "nearest spot (control)"]
    assert (
        rows["setting"].unique().tolist() == names and (rows["setting"].value_counts() == 2).all()
    )
    mean = rows[rows["setting"] == "training mean"]
    assert (
        mean["heg"].isna().all() and (mean["heg_n"] == 0).all() and (mean["n_genes_r30"] == 0).all()
    )
    line, costs = [
        line
        for line in stdout.splitlines()
        if line.startswith("training mean") and " test " in line
    ]
    assert line.split()[6:10] == ["-"] * 4 and costs.split()[-1] == "-", line
    assert "over BLEEP" in stdout and "million" in stdout and "minutes" in stdout
    assert "published, not computed here" not in stdout, "this data root has none"
    trained = rows.dropna(subset="parameters_total").drop_duplicates("setting").set_index("setting")
    panel = len(common.load_dataset(simulated, "lognorm").genes)
    assert trained.loc["ST-Net", "parameters_total"] == 6953856 + 1025 * panel
    projections = (2048 + 1) * 256 + (256 + 1) * 256 + (panel + 1) * 256 + (256 + 1) * 256 + 4 * 256
    assert trained.loc["BLEEP", "parameters_total"] == 23508032 + projections
    assert run_script("25", *arguments, "--only", "depth only (control)") == 0
    assert "on disk already" in capsys.readouterr().out
    assert run_script("25", *arguments, "--only", "BLEEP", "--stnet-epochs", 9) == 0
    assert "on disk already" in capsys.readouterr().out, "a constant of ST-Net does not touch BLEEP"
    assert run_script("25", *arguments, "--only", "bleep") == 2


# ------------------------------------------------------------------------------------- script 24


def recipe_24(script, **changed):
    return runner.recipe_of(vars(script)) | CPU | {"FEATURES": ""} | changed


def grid_of_spots(n_slides=3, side=14):
    """A data root's spots in memory: each slide a square grid with image features that follow its quarters."""
    rows, cols = (axis.ravel() for axis in np.mgrid[:side, :side])
    spots = pd.concat(
        [
            pd.DataFrame({"tissue_index": s, "array_row": rows, "array_col": cols})
            for s in range(n_slides)
        ]
    )
    spots = spots.reset_index(drop=True).assign(id=lambda t: t.index.astype(str), pitch=100.0)
    spots = spots.assign(pxl_row=spots["array_row"] * 100, pxl_col=spots["array_col"] * 100)
    quarter = (spots["array_row"] // (side / 2) * 2 + spots["array_col"] // (side / 2)).to_numpy(
        int
    )
    colour = np.eye(4)[quarter] * 10 + np.random.default_rng(0).normal(size=(len(spots), 4))
    counts = anndata.AnnData(
        np.random.default_rng(1).random((len(spots), 3)), obsm={"colour": colour}
    )
    data = common.SpotData(None, None, spots, list("abc"), counts.X, counts.X, counts, {}, "", "")
    return data, quarter


def test_clusters_find_the_tissue_and_test_spots_follow_their_image():
    script, (data, quarter) = load_script("24"), grid_of_spots()
    script.WEIGHTS = ((1, 0), (1, 0.5))
    train = np.flatnonzero((data.spots["tissue_index"] < 2) & (np.arange(len(quarter)) % 5 > 0))
    threads = torch.get_num_threads()
    ids, points, grid = script.cluster_spots(data, train, recipe_24(script), 42)
    assert torch.get_num_threads() == threads and points.shape == (len(train), 2) and len(grid) == 2
    shares = pd.crosstab(quarter, ids, normalize="columns")
    assert (shares.max() > 0.95).all() and shares.idxmax().nunique() == 4, (
        "each cluster lies in one quarter"
    )
    assert grid["silhouette"].is_monotonic_decreasing
    again, _, _ = script.cluster_spots(data, train, recipe_24(script), 42)
    np.testing.assert_array_equal(ids, again)


def test_a_test_spots_cluster_does_not_change_with_its_expression(experiment):
    script = load_script("24")
    script.WEIGHTS = ((1, 0.5),)
    recipe, train = recipe_24(script, MIN_CLUSTER=0.1), experiment.rows("train")
    ids, _, _ = script.cluster_spots(experiment.data, train, recipe, 42)
    changed, _, _ = script.cluster_spots(change_test_spots(experiment).data, train, recipe, 42)
    np.testing.assert_array_equal(ids, changed)


def test_positional_codes_are_64_numbers_scaled_within_a_slide():
    script, (data, _) = load_script("24"), grid_of_spots(2)
    spots = data.spots.copy()
    spots.loc[spots["tissue_index"] == 1, ["array_row", "array_col"]] = (
        3 * spots[["array_row", "array_col"]] + 50
    )
    codes = script.encode_positions(spots)
    assert codes.shape == (len(spots), 64) and np.abs(codes).max() <= 1
    np.testing.assert_allclose(codes[: len(codes) // 2], codes[len(codes) // 2 :], atol=1e-9)
    assert len(np.unique(codes[: len(codes) // 2].round(6), axis=0)) == len(codes) // 2, (
        "each position is its own"
    )
    flat = script.encode_positions(spots.assign(array_row=4))
    assert np.isfinite(flat).all()


def test_shuffled_ids_are_the_same_ids_of_each_slide():
    script, slides = load_script("24"), np.repeat([1, 2], 50)
    ids = np.random.default_rng(0).integers(0, 5, 100)
    shuffled = script.shuffle_ids(ids, slides, 42)
    assert not np.array_equal(ids, shuffled) and np.array_equal(
        shuffled, script.shuffle_ids(ids, slides, 42)
    )
    for slide in (1, 2):
        np.testing.assert_array_equal(
            np.sort(ids[slides == slide]), np.sort(shuffled[slides == slide])
        )


@pytest.mark.parametrize("hidden", [0, 16])
def test_with_an_id_the_network_starts_as_the_same_function(hidden):
    script, recipe = load_script("24"), NETWORK | {"HIDDEN": hidden}
    patches, ids = (
        torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8),
        np.array([0, 4, 2, 2, 1, 0]),
    )
    plain, model = (common.build_model(recipe, 5, 1).eval() for _ in range(2))
    network, with_id = script.WithId(model, 5, 8).eval(), script.PatchesWithId(patches, ids)
    rows = torch.tensor([5, 1, 2])
    torch.testing.assert_close(network(with_id[rows]), plain(patches[rows]))
    nn.init.normal_(next(layer for layer in model.head if isinstance(layer, nn.Linear)).weight)
    assert not torch.equal(
        network(with_id[torch.tensor([0])]), network(script.PatchesWithId(patches, ids + 1)[[0]])
    )


def test_a_warp_leaves_the_id_as_it_is():
    patches = load_script("24").PatchesWithId(
        torch.zeros((64, 3, 32, 32), dtype=torch.uint8), np.arange(64) * 4
    )
    draw = common.draw_augmentation(64, "mpa", torch.Generator().manual_seed(0))
    warped = common.augment(patches[torch.arange(64)], *draw)
    assert draw[1].sum() > 20 and torch.equal(
        warped[:, 3, 0, 0].round().long(), torch.arange(64) * 4
    )


def test_cluster_ids_end_to_end(simulated, tmp_path, capsys):
    arguments = (
        "--data-root",
        simulated,
        "--out",
        tmp_path,
        *TINY,
        "--target",
        "lognorm",
        "--seeds",
        42,
    )
    arguments += ("--features", "", "--min-cluster", 0.1, "--epochs", 2)
    assert run_script("24", *arguments, WEIGHTS=((1, 0), (1, 1))) == 0
    stdout = capsys.readouterr().out
    rows = pd.DataFrame(last_json(stdout)["rows"])
    assert (
        rows["setting"].unique().tolist() == ["no id", "cluster id", "shuffled id"]
        and len(rows) == 6
    )
    assert "silhouette" in stdout and "HEG ahead" in stdout and "of no id" in stdout
    assert (
        len(pd.read_csv(tmp_path / "grid.csv")) == 2
        and (tmp_path / "clusters.png").stat().st_size > 10_000
    )
    assert pd.read_csv(tmp_path / "clusters.csv")["cluster_42_0"].nunique() >= 2
    assert (
        run_script("24", *arguments, "--embedding", 8, "--only", "no id", WEIGHTS=((1, 0), (1, 1)))
        == 0
    )
    assert "on disk already" in capsys.readouterr().out, (
        "a constant of the ids does not touch the row without one"
    )
    assert run_script("24", *arguments, "--min-cluster", 0.9) == 2
    assert "MIN_CLUSTER" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- intervals


def make_slide(noise, n=20, genes=6, seed=0):
    """(spots, predicted, truth) of an n x n grid, where prediction and truth share a smooth field."""
    random, (rows, cols) = np.random.default_rng(seed), (axis.ravel() for axis in np.mgrid[:n, :n])
    block = [f"1:{col // 5}:{row // 5}" for row, col in zip(rows, cols, strict=True)]
    spots = pd.DataFrame(
        {"tissue_index": 1, "pxl_row": rows * 100, "pxl_col": cols * 100, "block": block}
    )
    field = np.sin(rows / 4)[:, None] * random.normal(size=genes) + np.cos(cols / 5)[:, None]
    return (
        spots,
        field + noise * random.normal(size=field.shape),
        field + random.normal(size=field.shape),
    )


MEMBERS = {"heg": ["0", "1"], "hvg": ["2"], "mg": [], "all": [str(g) for g in range(6)]}


def test_a_bootstrap_draw_is_r_of_whole_blocks_drawn_by_hand():
    spots, predicted, truth = make_slide(1.0)
    predicted[:, 5] = 3.0
    means = common.bootstrap_means(predicted, truth, spots, [str(g) for g in range(6)], MEMBERS)
    block = (
        spots["pxl_col"] // 500 * 4 + spots["pxl_row"] // 500
    ).to_numpy()  # in the order of their names
    drawn = np.random.default_rng(
        common.seed_of("bootstrap", *np.unique(spots["block"]))
    ).multinomial(16, np.full(16, 1 / 16), common.DRAWS)
    for i in (0, 7, 999):
        at = np.concatenate(
            [np.flatnonzero(block == b) for b in np.repeat(np.arange(16), drawn[i])]
        )
        r = common.pearson_per_gene(predicted[at], truth[at])
        assert means.loc[i, "heg"] == pytest.approx(r[:2].mean()) and means.loc[
            i, "hvg"
        ] == pytest.approx(r[2])
        assert means.loc[i, "all"] == pytest.approx(r[:5].mean()), (
            "the constant gene has no r in any draw"
        )
    assert means["mg"].isna().all() and len(means) == common.DRAWS


def test_intervals_over_blocks_are_wider_than_over_spots():
    """Neighbours are alike: an interval that draws spots one by one would claim too much."""
    spots, predicted, truth = make_slide(0.3)
    names = [str(g) for g in range(6)]
    by_block = common.bootstrap_means(predicted, truth, spots, names, MEMBERS)["heg"]
    alone = spots.assign(block=spots.index.astype(str))
    by_spot = common.bootstrap_means(predicted, truth, alone, names, MEMBERS)["heg"]
    assert by_block.std() > 1.3 * by_spot.std()
    r = common.pearson_per_gene(predicted, truth)[:2].mean()
    assert by_block.quantile(0.025) < r < by_block.quantile(0.975)


def test_one_block_has_no_interval():
    spots, predicted, truth = make_slide(0.3, n=5)
    assert (
        common.bootstrap_means(predicted, truth, spots, MEMBERS["all"], MEMBERS)
        .isna()
        .all(axis=None)
    )


def test_paired_differences_over_seeds(tmp_path):
    """Rows written by hand: a method better by .1 in each draw is better by .1 for sure, however wide its own interval."""
    rows, random = [], np.random.default_rng(0)
    for seed in (1, 2):
        base = random.normal(0.2, 0.2, common.DRAWS)
        for setting, more in (("a", 0.0), ("b", 0.1), ("c", np.nan)):
            folder = tmp_path / f"{setting}{seed}"
            folder.mkdir()
            draws = {
                f"lognorm_{key}": base + (seed * more if key == "heg" else 0)
                for key in ("heg", "hvg", "mg", "all")
            }
            pd.DataFrame(draws).to_csv(folder / "bootstrap.csv", index=False)
            row = {
                "setting": setting,
                "seed": seed,
                "fold": 0,
                "slide": "3",
                "split": "test",
                "truth": "lognorm",
            }
            row["folder"] = folder.name
            for key in ("heg", "hvg", "mg", "all"):
                row |= {
                    key: 0.2 + (seed * more if key == "heg" else 0),
                    f"{key}_n": 50 if setting != "c" else 49,
                }
            rows += [row, row | {"split": "valid"}]
    table = common.pair_differences(rows, tmp_path, {"b": "a", "c": "a"}).set_index(
        ["setting", "group"]
    )
    again = common.pair_differences(rows[::-1], tmp_path, {"b": "a", "c": "a"}).set_index(
        ["setting", "group"]
    )
    pd.testing.assert_frame_equal(table, again)
    line = table.loc["b", "HEG"]
    assert line["difference"] == pytest.approx(0.15), "the mean of .1 and .2"
    assert line["low"] == pytest.approx(0.1) and line["high"] == pytest.approx(0.2), (
        "both seeds twice, or one of each"
    )
    assert (table.loc["b", "HVG"][["difference", "low", "high"]] == 0).all()
    assert table.loc["c"][["difference", "low", "high"]].isna().all(axis=None), (
        "r of other numbers of genes"
    )
