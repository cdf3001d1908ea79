"""The ridge on frozen features, and a head that starts as it; stain shift."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import NETWORK, PAPER, ask, load_script, refused
from sklearn.linear_model import Ridge

import common
from study import methods, recipes, recording, ridges, rows, weights

RECIPE = NETWORK | PAPER | recipes.RECIPES["best"]
RECIPE |= {"BACKBONE": "resnet10t", "TARGET": "lognorm", "IMAGE_SIZE": 32, "LOSS": "mse"}
RECIPE |= {"BATCH_SIZE": 8, "EPOCHS": 1, "AUG": "stnet", "RECIPE": "best"}
RECIPE |= {"REFIT": False, "NEIGHBOURHOOD": False}  # One network, one ridge, that may be trained.


def start(split, **changed):
    """(network before training, patches, the row that it is of)."""
    row = rows.Row("started", RECIPE | changed, split, None)
    return methods.start_network(row), row.place_patches(), row


# -------------------------------------------------------------------------------------------- ridge
def ridge_problem(n=60, width=5, n_genes=4):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(n, width))
    target = features @ rng.normal(size=(width, n_genes)) + rng.normal(size=(n, n_genes))
    spots = pd.DataFrame({"id": np.arange(n), "tissue_index": np.repeat([1, 2, 3], n // 3)})
    spots["block"] = [f"{slide}:{i // 4}" for i, slide in enumerate(spots["tissue_index"])]
    spots["pitch"] = 1.0
    spots["pxl_col"] = 100 * np.arange(n)
    spots["pxl_row"] = 0
    return features + 10 * spots[["tissue_index"]].to_numpy(), target, spots


def centred_within_slides(values, spots):
    values = pd.DataFrame(values)
    return (values - values.groupby(spots["tissue_index"]).transform("mean")).to_numpy()


def test_the_ridge_is_scikit_learns_on_values_centred_within_slides():
    features, target, spots = ridge_problem()
    every, leading = np.arange(60), [0, 1]
    ridge, told = ridges.fit_ridge(features, target, every, spots, leading, full_rank=True)
    x, y = centred_within_slides(features, spots), centred_within_slides(target, spots)
    penalty = told.alpha * (x**2).sum(1).mean()
    expected = Ridge(penalty, fit_intercept=False).fit(x, y).coef_.T
    np.testing.assert_allclose(ridge.weight, expected, rtol=1e-6)
    assert told.rank is None
    predicted = ridge.predict(features)
    np.testing.assert_allclose(predicted.mean(0), target.mean(0), rtol=1e-5)


@pytest.mark.parametrize("full_rank", [False, True])
def test_more_features_than_spots_change_nothing(full_rank, monkeypatch):
    features, target, spots = ridge_problem(width=80)
    options = np.arange(60), spots, np.arange(4), full_rank
    ridge, told = ridges.fit_ridge(features, target, *options)
    monkeypatch.setattr(ridges, "turn_to_span", lambda features, *_: (features, np.eye(80)))
    expected, told_then = ridges.fit_ridge(features, target, *options)
    assert told == told_then
    np.testing.assert_allclose(ridge.weight, expected.weight, atol=1e-8)


def test_a_ridge_of_a_rank_keeps_the_main_patterns_of_what_it_predicts():
    features, target, spots = ridge_problem()
    x = centred_within_slides(features, spots)
    centred = ridges.Centred(features, target, np.arange(60), spots["tissue_index"].to_numpy())
    full = x @ ridges.solve_ridge(centred, np.arange(60), 3.0).weight
    reduced = x @ ridges.solve_ridge(centred, np.arange(60), 3.0, 2, np.arange(4)).weight
    left, strengths, right = np.linalg.svd(full, full_matrices=False)
    by_hand = left[:, :2] * strengths[:2] @ right[:2]
    np.testing.assert_allclose(reduced, by_hand, atol=1e-8)
    # What all genes need is taken from two genes, where two are leading.
    of_two = x @ ridges.solve_ridge(centred, np.arange(60), 3.0, 2, [0, 1]).weight
    np.testing.assert_allclose(of_two[:, :2], full[:, :2], atol=1e-8)
    expected = full[:, :2] @ np.linalg.lstsq(full[:, :2], full, rcond=None)[0]
    np.testing.assert_allclose(of_two, expected, atol=1e-8)


def test_the_rank_is_the_number_of_patterns_that_there_are():
    """Forty genes that follow two patterns, each with noise of its own."""
    features, _, spots = ridge_problem(n_genes=40)
    rng = np.random.default_rng(2)
    truth = features @ rng.normal(size=(5, 2)) @ rng.normal(size=(2, 40))
    target = truth + rng.normal(scale=4, size=(60, 40))
    every = np.arange(60)
    reduced, told = ridges.fit_ridge(features, target, every, spots, np.arange(40))
    full, _ = ridges.fit_ridge(features, target, every, spots, np.arange(40), full_rank=True)
    assert told.rank == 2
    off = [centred_within_slides(x.predict(features) - truth, spots) for x in (reduced, full)]
    assert np.square(off[0]).mean() < np.square(off[1]).mean()


def vary_features(kind, features):
    """The features (n, F) as they are, or with some that tell nothing beside the others."""
    features = features.copy()
    if kind == "constant and doubled":
        features[:, 1] = 7
        features[:, 2:4] = features[:, 4:6]
    if kind == "one in the others' shadow":
        features[:, 0] *= 1e4
    return features


@pytest.mark.parametrize("kind", ["plain", "constant and doubled", "one in the others' shadow"])
@pytest.mark.parametrize("width", [12, 45, 80])  # of 60 spots, of which folds learn on fewer
def test_alpha_and_rank_are_those_of_the_least_error_on_held_out_spots(width, kind):
    """By hand: every pair of them is tried on every fold, by an SVD of what is predicted."""
    features, target, spots = ridge_problem(width=width)
    features = vary_features(kind, features)
    target = target + np.random.default_rng(3).normal(scale=3, size=target.shape)
    every, genes = np.arange(60), np.arange(4)
    x, y = centred_within_slides(features, spots), centred_within_slides(target, spots)
    unit = (x**2).sum(1).mean()

    def learn(spots, alpha):
        penalised = x[spots].T @ x[spots] + alpha * unit * np.eye(width)
        weight = np.linalg.solve(penalised, x[spots].T @ y[spots])
        return weight, np.linalg.svd(x[spots] @ weight, full_matrices=False)[2]

    errors = np.zeros((len(ridges.ALPHAS), 4))
    for train, held_out in ridges.choose_folds(spots):
        for i, alpha in enumerate(ridges.ALPHAS):
            weight, patterns = learn(train, alpha)
            for rank in range(1, 5):
                kept = patterns[:rank].T @ patterns[:rank]
                error = y[held_out] - x[held_out] @ weight @ kept
                errors[i, rank - 1] += (error**2).sum()
    alpha, rank = np.unravel_index(errors.argmin(), errors.shape)
    ridge, told = ridges.fit_ridge(features, target, every, spots, genes)
    assert told == (ridges.ALPHAS[alpha], rank + 1)
    _, told = ridges.fit_ridge(features, target, every, spots, genes, full_rank=True)
    assert told == (ridges.ALPHAS[errors[:, -1].argmin()], None)
    weight, patterns = learn(every, ridges.ALPHAS[alpha])
    expected = x @ weight @ patterns[: rank + 1].T @ patterns[: rank + 1]
    np.testing.assert_allclose(x @ ridge.weight, expected, rtol=0, atol=1e-6)


def test_a_folds_sums_are_those_of_the_spots_that_it_learns_on():
    features, target, spots = ridge_problem()
    # Of a grid of blocks some spots lie in the margin of a fold, others in none.
    spots["pxl_col"], spots["pxl_row"] = np.arange(60) % 8, np.arange(60) // 8
    spots["tissue_index"] = 1
    corners = spots[["pxl_col", "pxl_row"]].to_numpy() // 2
    spots["block"] = [f"{column}:{row}" for column, row in corners]
    chosen = np.random.default_rng(0).permutation(60)[:50]
    centred = ridges.Centred(features, target, chosen, spots["tissue_index"].to_numpy())
    x, y = features - features[chosen].mean(0), target - target[chosen].mean(0)
    sizes = []
    folds = ridges.choose_folds(spots.iloc[chosen])
    measured, whole = ridges.measure_folds(centred, chosen, spots)
    np.testing.assert_allclose(whole, x[chosen].T @ x[chosen], rtol=1e-9, atol=1e-9)
    for (train, held_out), (learnt_on, *moments) in zip(folds, measured, strict=True):
        sizes.append(50 - train.sum() - held_out.sum())
        np.testing.assert_array_equal(learnt_on, chosen[train])
        for part, (xx, xy) in zip((chosen[train], chosen[held_out]), moments, strict=True):
            np.testing.assert_allclose(xx, x[part].T @ x[part], rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(xy, x[part].T @ y[part], rtol=1e-9, atol=1e-9)
    assert any(sizes), "no fold has a margin, so nothing was tested"


def test_small_steps_are_one_threads_and_then_there_are_as_many_as_before():
    libraries = ridges.find_libraries()

    def count_threads():
        blas = libraries.select(user_api="blas")
        return {library.num_threads for library in blas.lib_controllers}

    with libraries.limit(limits=2, user_api="blas"):
        with ridges.on_one_core():
            assert count_threads() == {1}
        assert count_threads() == {2}


def test_there_is_no_higher_rank_than_features():
    features, target, spots = ridge_problem(width=2, n_genes=12)
    _, told = ridges.fit_ridge(features, target, np.arange(60), spots, np.arange(12))
    assert 1 <= told.rank <= 2


def test_alpha_is_inside_the_grid_and_grows_with_noise():
    features, target, spots = ridge_problem()
    noise = np.random.default_rng(1).normal(scale=8, size=target.shape)
    every, genes = np.arange(60), np.arange(4)
    _, little = ridges.fit_ridge(features, target, every, spots, genes, full_rank=True)
    _, much = ridges.fit_ridge(features, target + noise, every, spots, genes, full_rank=True)
    assert ridges.ALPHAS[0] < little.alpha < much.alpha < ridges.ALPHAS[-1]


@pytest.mark.parametrize("full_rank", [False, True])
def test_genes_that_never_vary_are_predicted_as_they_are(full_rank):
    features, target, spots = ridge_problem()
    constant = np.full_like(target, 2.5)
    every, genes = np.arange(60), np.arange(4)
    ridge, _ = ridges.fit_ridge(features, constant, every, spots, genes, full_rank=full_rank)
    np.testing.assert_allclose(ridge.predict(features), 2.5, rtol=1e-6)


@pytest.mark.parametrize("width", [5, 80])
def test_features_that_never_vary_give_the_mean(width):
    _, target, spots = ridge_problem()
    features = np.full((60, width), 0.1, np.float32)
    ridge, _ = ridges.fit_ridge(features, target, np.arange(60), spots, np.arange(4))
    np.testing.assert_allclose(ridge.predict(features), np.tile(target.mean(0), (60, 1)), rtol=1e-5)


# ------------------------------------------------------------------------------------- ridge start
def test_half_a_blended_spot_are_the_others_of_its_slide_by_their_distance():
    """A row of four spots a pitch apart on one slide; two spots, out of each other's reach, on
    another that lies in the same place.
    """
    spots = pd.DataFrame({"tissue_index": [1, 2, 1, 1, 1, 2], "pitch": 50.0, "pxl_row": 7})
    spots["pxl_col"] = [0, 0, 50, 100, 150, 250]
    values = np.eye(6)
    blended = common.blend_neighbourhood(values, spots, 1.0)
    near, far = np.exp(-1 / 2), np.exp(-4 / 2)
    expected = np.array([near, far, np.exp(-9 / 2)])  # at 1, 2 and 3 pitches
    np.testing.assert_allclose(blended[0, [2, 3, 4]], expected / expected.sum() / 2, rtol=1e-6)
    assert blended[0, 0] == 0.5, "its own"
    assert (blended[0, [1, 5]] == 0).all(), "of another slide"
    expected = np.array([near, near, far]) / (2 * near + far) / 2
    np.testing.assert_allclose(blended[2, [0, 3, 4]], expected, rtol=1e-6)
    np.testing.assert_array_equal(blended[[1, 5]], values[[1, 5]])
    np.testing.assert_array_equal(values, np.eye(6), "the values given stay as they are")


@pytest.mark.parametrize("changed", [{}, {"NEIGHBOURHOOD": True, "EPOCHS": 0}])
@pytest.mark.parametrize("pool_stages", [True, False])
def test_the_first_prediction_is_the_ridges(paper_split, pool_stages, changed):
    model, patches, row = start(paper_split, POOL_STAGES=pool_stages, **changed)
    ridge, told = ask(methods.ridge_on_features, row.recipe, paper_split)
    np.testing.assert_allclose(row.predict(model, patches), ridge, atol=1e-4)
    assert row.notes == {name: told[name] for name in ("alpha", "rank")}


def test_without_an_epoch_the_network_is_the_ridge_on_its_features(paper_split):
    row = rows.Row("best", RECIPE | {"EPOCHS": 0}, paper_split, None)
    predicted = load_script("20").efficientnet(row)
    ridge, told = ask(methods.ridge_on_features, RECIPE, paper_split)
    np.testing.assert_allclose(predicted, ridge, atol=1e-4)
    np.testing.assert_allclose(row.predict(row.model, row.place_patches()), ridge, atol=1e-4)
    assert row.notes["steps"] == 0
    assert row.notes["alpha"] == told["alpha"]


def test_without_an_epoch_one_view_is_one_view(paper_split):
    """What is scored is what script 26 does with the weights."""
    script = load_script("20")
    row = rows.Row("best", RECIPE | {"EPOCHS": 0, "TTA": False}, paper_split, None)
    predicted = script.efficientnet(row)
    np.testing.assert_array_equal(predicted, row.predict(row.model, row.place_patches()))
    eight = script.efficientnet(rows.Row("best", RECIPE | {"EPOCHS": 0}, paper_split, None))
    assert np.abs(predicted - eight).max() > 1e-3


def test_a_network_of_no_epoch_predicts_again(paper_split, tmp_path):
    recipe = RECIPE | {"EPOCHS": 0}
    row = rows.Row("best", recipe, paper_split, tmp_path / "best").fill(methods.network_of_no_epoch)
    again = rows.Row("best, 1 view", recipe | {"TTA": False}, paper_split, tmp_path / "again")
    predicted = methods.predict_again(row, again)
    assert np.isfinite(predicted).all()
    assert (again.notes["steps"], again.notes["best_epoch"]) == (0, 0)


def test_a_stain_shift_is_of_the_test_slide_alone(paper_split, tmp_path):
    """The widths of intervals follow from validation spots as they are."""
    recipe = RECIPE | {"EPOCHS": 0, "TTA": False}
    row = rows.Row("best", recipe, paper_split, tmp_path / "best")
    row.fill(load_script("20").efficientnet)
    first = recording.read_prediction(row.folder).to_numpy()
    shifted = methods.predict_again(row, row, stain_shift=True)
    is_valid = paper_split.roles[paper_split.scored()] == "valid"
    np.testing.assert_array_equal(shifted[is_valid], first[is_valid])
    assert np.abs(shifted[~is_valid] - first[~is_valid]).max(1).min() > 1e-3
    colour, _ = ask(methods.ridge_on_colour, RECIPE, paper_split)
    other, _ = ask(load_script("23").ridge_under_stain_shift, RECIPE, paper_split)
    np.testing.assert_array_equal(other[is_valid], colour[is_valid])
    assert np.abs(other[~is_valid] - colour[~is_valid]).max(1).min() > 1e-3


def test_patches_are_as_coarse_as_those_of_the_slides_that_taught(paper_split):
    names = {slide["tissue_index"]: slide["name"] for slide in paper_split.data.meta["slides"]}
    learnt = [names[number] for number in paper_split.slides("train", "valid")]
    coarse = dict.fromkeys(names.values(), 2.0) | dict.fromkeys(learnt, 0.25)
    data = dataclasses.replace(paper_split.data, meta=paper_split.data.meta | {"um_per_px": coarse})
    assert weights.find_patch_resolution(dataclasses.replace(paper_split, data=data)) == 0.25


def test_rows_by_another_harmony_are_others(paper_split):
    """Folds of 22 hold no test spot, and yet their target follows from the test slide."""
    data = paper_split.data
    one, other = (
        dataclasses.replace(paper_split, data=dataclasses.replace(data, harmonised=slides))
        for slides in ((1, 2, 3), (1, 2, 4))
    )
    assert one.made_with(RECIPE) != other.made_with(RECIPE)


def test_pooled_stages_are_sd_and_mean_of_every_stages_output(paper_split):
    model, patches, _ = start(paper_split)
    backbone = model.backbone.eval()
    images = model.normalise(patches[torch.arange(2)])
    by_hand, x = [], images
    with torch.no_grad():
        for stage in common.stages_of(backbone):
            for module in stage:
                x = module(x)
            by_hand += [x.std((2, 3), correction=0), x.mean((2, 3))] if x.ndim == 4 else [x]
        pooled = common.pool_each_stage(backbone, images)
    torch.testing.assert_close(torch.cat(pooled, 1), torch.cat(by_hand, 1), rtol=1e-4, atol=1e-3)
    assert model.widths == [part.shape[1] for part in by_hand]


def test_a_stage_that_is_constant_over_the_image_has_a_slope(paper_split):
    model, *_ = start(paper_split)
    backbone = model.backbone.eval()
    image = torch.full((1, 3, 32, 32), 0.5, requires_grad=True)
    torch.cat(common.pool_each_stage(backbone, image), 1).sum().backward()
    assert torch.isfinite(image.grad).all()


class TokensAfterChannelsLast(torch.nn.Module):
    """A stage of (B, S, S, 4), then one of tokens (B, S x S, 5)."""

    output_fmt = "NHWC"

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Linear(3, 4)
        self.blocks = torch.nn.Sequential(torch.nn.Linear(4, 5))

    def forward(self, images):
        return self.blocks(self.stem(images).flatten(1, 2))


def test_channels_last_and_tokens_are_pooled_over_their_places():
    backbone, images = TokensAfterChannelsLast(), torch.randn(2, 6, 6, 3)
    stem = backbone.stem(images).flatten(1, 2)
    tokens = backbone(images)
    expected = [part for x in (stem, tokens) for part in (x.std(1, correction=0), x.mean(1))]
    for part, wanted in zip(common.pool_each_stage(backbone, images), expected, strict=True):
        torch.testing.assert_close(part, wanted, rtol=1e-4, atol=1e-4)


def test_a_hidden_layer_cannot_start_as_a_ridge(paper_split):
    with refused("--hidden 16"):
        start(paper_split, HIDDEN=16)


def test_the_start_is_judged_and_kept_where_training_only_harms(paper_split):
    model, patches, row = start(paper_split)
    before = common.copy_state(model)
    changed = {"LEARNING_RATE": 0.5}
    history = common.fit(model, patches, paper_split, row.recipe | changed)
    assert [line["epoch"] for line in history] == [0, 1]
    assert history[1]["valid_mse"] > history[0]["valid_mse"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


# --------------------------------------------------------------------------------------- restaining
@pytest.fixture
def tissue():
    """(4, 3, 32, 32) uint8, in the colours of stained tissue."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(60, 256, (4, 3, 32, 32), np.uint8)
    return torch.from_numpy(pixels)


def test_restaining_with_the_identity_is_exact(tissue):
    same = common.StainShiftedPatches(tissue, torch.eye(3))
    assert torch.equal(same[torch.arange(4)], tissue)
    strengths = torch.ones(4, 3)
    unchanged = common.change_stain(tissue, common.change_of_stain(strengths))
    torch.testing.assert_close(unchanged, tissue.float(), rtol=0, atol=0.05)


def test_restaining_is_undone_by_the_inverse_to_a_grey_level(tissue):
    change = common.OTHER_STAINING.expand(4, 3, 3)
    there = common.change_stain(tissue, change)
    back = common.change_stain(there, torch.linalg.inv(change))
    assert (there - tissue).abs().mean() > 5, "another laboratory's colours are others"
    torch.testing.assert_close(back, tissue.float(), rtol=0, atol=1)


def test_pure_dyes_become_the_other_laboratorys():
    dyes = torch.tensor(common.DYES[:2])
    pixels = 256 * torch.exp(-dyes / dyes.norm(dim=1, keepdim=True)) - 1
    there = common.change_stain(pixels[:, :, None, None], common.OTHER_STAINING.expand(2, 3, 3))
    density = -torch.log((there[:, :, 0, 0] + 1) / 256)
    others = torch.tensor(common.OTHER_DYES[:2])
    expected = others / others.norm(dim=1, keepdim=True)
    expected = expected * torch.tensor(common.OTHER_STRENGTHS[:2])[:, None]
    torch.testing.assert_close(density, expected, rtol=1e-3, atol=1e-3)


def test_white_stays_white_and_stain_jitter_stays_in_range():
    white = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
    draws = common.draw_augmentation(2, "mpa_stain", torch.Generator().manual_seed(0))
    torch.testing.assert_close(common.augment(white, *draws), white.float(), rtol=0, atol=0.1)
    noise = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    changed = common.augment(noise, *draws)
    assert changed.min() >= 0
    assert changed.max() <= 255
