"""REFIT: what predicts the test slide has learnt from the validation spots, too; what predicts the
validation spots has not.
"""

import dataclasses
import json

import numpy as np
import pytest
import safetensors
import torch
from conftest import NETWORK, PAPER
from test_ridge_start import RECIPE

import common
import runner

RECIPE = RECIPE | {"REFIT": True}
ONCE = RECIPE | {"REFIT": False}


@pytest.fixture
def split(paper_split):
    return paper_split


def rows_of(split, role):
    return split.roles[split.scored()] == role


def keep_checkpoints(monkeypatch, after):
    """Have training end as a kill does when fit has saved its checkpoint `after` times."""
    save, saved = common.save_checkpoint, []

    def save_and_die(path, *arguments):
        save(path, *arguments)
        saved.append(path)
        if len(saved) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(common, "save_checkpoint", save_and_die)
    return saved


def read_valid_r(folder):
    """(G,) validation r in the metadata of a folder's weights."""
    with safetensors.safe_open(folder / "weights.safetensors", "numpy") as file:
        return np.array(json.loads(file.metadata()["valid_r"]), float)


# -------------------------------------------------------------------------------------------- ridges
def test_a_ridge_predicts_the_test_slide_from_all_training_slides_spots(split):
    whole = dataclasses.replace(split, roles=np.where(split.roles == "valid", "train", split.roles))
    once, _ = runner.ridge_on_colour(ONCE, split, None)
    refitted, _ = runner.ridge_on_colour(RECIPE, split, None)
    of_all, _ = runner.ridge_on_colour(ONCE, whole, None)
    np.testing.assert_array_equal(refitted[rows_of(split, "valid")], once[rows_of(split, "valid")])
    np.testing.assert_array_equal(refitted[rows_of(split, "test")], of_all)
    assert np.abs(refitted - once)[rows_of(split, "test")].max() > 1e-3


def test_the_genes_are_chosen_without_the_validation_spots(split):
    assert split.without_validation().members == split.members


def test_validation_spots_do_not_move_their_own_prediction(split):
    """The target of the validation spots, changed, changes what is predicted of the test slide and
    nothing of them.
    """
    target = np.array(split.data.target[:])
    target[split.spots("valid")] += 1
    other = dataclasses.replace(split, data=dataclasses.replace(split.data, target=target))
    for compute in (runner.ridge_on_colour, runner.ridge_on_features):
        before, _ = compute(RECIPE, split, None)
        after, _ = compute(RECIPE, other, None)
        valid = rows_of(split, "valid")
        np.testing.assert_array_equal(after[valid], before[valid])
        assert (after[~valid] != before[~valid]).any()


# ------------------------------------------------------------------------------------------ networks
def test_a_network_is_trained_again_up_to_the_epoch_that_validation_chose(split, tmp_path):
    once, first = runner.train_network(ONCE, split, tmp_path / "once")
    predicted, more = runner.train_network(RECIPE, split, tmp_path / "refit")
    whole = split.without_validation()
    of_all, _ = runner.train_network(ONCE, whole, tmp_path / "all", keep=first["best_epoch"])
    assert more["best_epoch"] == first["best_epoch"]
    valid = rows_of(split, "valid")
    np.testing.assert_array_equal(predicted[valid], once[valid])
    np.testing.assert_array_equal(predicted[~valid], of_all)
    assert np.abs(predicted - once)[~valid].max() > 1e-4
    files = [tmp_path / name / "weights.safetensors" for name in ("refit", "all")]
    refit, alone = (safetensors.torch.load_file(path) for path in files)
    for name, value in alone.items():
        torch.testing.assert_close(refit[name], value, rtol=0, atol=0)
    # What the weights say of themselves was measured on spots that had been left out.
    before, after = (read_valid_r(tmp_path / name) for name in ("once", "refit"))
    np.testing.assert_array_equal(after, before)
    assert np.isfinite(before).any()


@pytest.mark.parametrize("after", [1, 2])
def test_a_killed_training_goes_on_where_it_was(split, tmp_path, monkeypatch, after):
    recipe = RECIPE | {"BEST_EPOCH": "mse", "HEAD_START": "zero", "GENE_WEIGHTS": "equal"}
    expected, _ = runner.train_network(recipe, split, tmp_path / "whole")
    with monkeypatch.context() as patched:
        saved = keep_checkpoints(patched, after)
        with pytest.raises(KeyboardInterrupt):
            runner.train_network(recipe, split, tmp_path / "killed")
        assert saved[-1].name == ("checkpoint.pt", "checkpoint_refit.pt")[after - 1]
    predicted, _ = runner.train_network(recipe, split, tmp_path / "killed")
    np.testing.assert_array_equal(predicted, expected)


def test_weights_that_have_seen_validation_do_not_predict_it(split, tmp_path):
    _, more = runner.train_network(RECIPE, split, tmp_path / "refit")
    trained = {"folder": "refit", "weights": "random", **more}
    predicted, _ = runner.predict_again(tmp_path, trained)(RECIPE, split, None)
    valid = rows_of(split, "valid")
    assert np.isnan(predicted[valid]).all() and np.isfinite(predicted[~valid]).all()


def test_without_a_test_slide_there_is_nothing_to_learn_again_for(split):
    roles = np.where(split.roles == "test", "", split.roles)
    assert not runner.is_refitted(RECIPE, dataclasses.replace(split, roles=roles))
    assert not runner.is_refitted(RECIPE, split.without_validation())
    assert runner.is_refitted(RECIPE, split)
    assert not runner.is_refitted(ONCE | PAPER | NETWORK, split)
