"""REFIT: what predicts the test slide has learnt from the validation spots, too; what predicts the
validation spots has not.
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ask, load_script, metadata_of
from test_ridge_start import RECIPE

import common
from study import methods, recording, rows, runs, splitting

RECIPE = RECIPE | {"REFIT": True}
ONCE = RECIPE | {"REFIT": False}


network = load_script("20").efficientnet


def fill(recipe, split, folder, **more):
    """A filled Row of the network."""
    return rows.Row("network", recipe, split, folder, report=None, **more).fill(network)


def rows_of(split, role):
    return split.roles[split.scored()] == role


def kill_after(monkeypatch, after):
    """Have training end as a kill does when fit has saved its checkpoint `after` times."""
    save, saved = common.save_checkpoint, []

    def save_and_die(path, *arguments):
        save(path, *arguments)
        saved.append(path)
        if len(saved) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(common, "save_checkpoint", save_and_die)
    return saved


# -------------------------------------------------------------------------------------------- ridges
def test_a_ridge_predicts_the_test_slide_from_all_training_slides_spots(paper_split):
    whole = dataclasses.replace(
        paper_split, roles=np.where(paper_split.roles == "valid", "train", paper_split.roles)
    )
    once, _ = ask(methods.ridge_on_colour, ONCE, paper_split)
    refitted, _ = ask(methods.ridge_on_colour, RECIPE, paper_split)
    of_all, _ = ask(methods.ridge_on_colour, ONCE, whole)
    np.testing.assert_array_equal(
        refitted[rows_of(paper_split, "valid")], once[rows_of(paper_split, "valid")]
    )
    np.testing.assert_array_equal(refitted[rows_of(paper_split, "test")], of_all)
    assert np.abs(refitted - once)[rows_of(paper_split, "test")].max() > 1e-3


def test_validation_spots_do_not_move_their_own_prediction(paper_split):
    """The target of the validation spots, changed, changes what is predicted of the test slide and
    nothing of them.
    """
    target = np.array(paper_split.data.target[:])
    target[paper_split.spots("valid")] += 1
    other = dataclasses.replace(
        paper_split, data=dataclasses.replace(paper_split.data, target=target)
    )
    for method in (methods.ridge_on_colour, methods.ridge_on_features):
        before, _ = ask(method, RECIPE, paper_split)
        after, _ = ask(method, RECIPE, other)
        valid = rows_of(paper_split, "valid")
        np.testing.assert_array_equal(after[valid], before[valid])
        assert (after[~valid] != before[~valid]).any()


# ------------------------------------------------------------------------------------------ networks
def test_a_network_is_trained_again_up_to_the_epoch_that_validation_chose(paper_split, tmp_path):
    whole = paper_split.with_all_in_training()
    first = fill(ONCE, paper_split, tmp_path / "once")
    refit = fill(RECIPE, paper_split, tmp_path / "refit")
    alone = fill(ONCE, whole, tmp_path / "all", stop=first.notes["best_epoch"])
    once, predicted, of_all = (
        recording.read_prediction(row.folder).to_numpy() for row in (first, refit, alone)
    )
    assert refit.notes["best_epoch"] == first.notes["best_epoch"]
    assert refit.notes["steps"] == alone.notes["steps"]
    valid = rows_of(paper_split, "valid")
    np.testing.assert_array_equal(predicted[valid], once[valid])
    np.testing.assert_array_equal(predicted[~valid], of_all)
    assert np.abs(predicted - once)[~valid].max() > 1e-4
    files = [tmp_path / name / "weights.safetensors" for name in ("refit", "all")]
    refit, alone = (safetensors.torch.load_file(path) for path in files)
    for name, value in alone.items():
        torch.testing.assert_close(refit[name], value, rtol=0, atol=0)
    # What the weights say of themselves was measured on spots that had been left out.
    files = [tmp_path / name / "weights.safetensors" for name in ("once", "refit")]
    before, after = (np.array(metadata_of(path)["valid_r"], float) for path in files)
    np.testing.assert_array_equal(after, before)
    assert np.isfinite(before).any()


@pytest.mark.parametrize("after, kept", [(1, "checkpoint.pt"), (3, "checkpoint_refit.pt")])
def test_a_killed_training_goes_on_where_it_was(paper_split, tmp_path, monkeypatch, after, kept):
    recipe = RECIPE | {"HEAD_START": "mean"}
    recipe |= {"EPOCHS": 2}
    expected, _ = ask(network, recipe, paper_split, tmp_path / "whole")
    with monkeypatch.context() as patched:
        saved = kill_after(patched, after)
        with pytest.raises(KeyboardInterrupt):
            ask(network, recipe, paper_split, tmp_path / "killed")
        assert saved[-1].name == kept
    predicted, _ = ask(network, recipe, paper_split, tmp_path / "killed")
    np.testing.assert_array_equal(predicted, expected)


def test_the_split_of_saved_weights_has_no_validation(paper_split):
    final = splitting.final_split(RECIPE, paper_split)
    assert {*final.roles} - {""} == {"train", "test"}
    np.testing.assert_array_equal(final.spots("test"), paper_split.spots("test"))
    assert splitting.final_split(ONCE, paper_split) is paper_split


def test_without_a_test_slide_there_is_nothing_to_learn_again_for(paper_split):
    roles = np.where(paper_split.roles == "test", "", paper_split.roles)
    assert not splitting.is_refitted(RECIPE, dataclasses.replace(paper_split, roles=roles))
    assert not splitting.is_refitted(RECIPE, paper_split.with_all_in_training())
    assert not splitting.is_refitted(ONCE, paper_split)
    assert splitting.is_refitted(RECIPE, paper_split)


def test_spots_of_a_margin_train_in_the_end(paper_split):
    roles = paper_split.roles.copy()
    roles[paper_split.spots("train")[:5]] = ""
    split = dataclasses.replace(paper_split, roles=roles)
    of_training_slides = np.sort(paper_split.spots("train", "valid"))
    np.testing.assert_array_equal(split.with_all_in_training().spots("train"), of_training_slides)


def test_what_refitted_weights_predict_again_is_told_as_such(paper_split, tmp_path):
    trained = fill(RECIPE, paper_split, tmp_path / "trained")
    final = splitting.final_split(RECIPE, paper_split)
    again = rows.Row("again", RECIPE | {"TTA": True}, final, tmp_path / "again", report=None)
    again.fill(functools.partial(methods.predict_again, trained), refit=False)
    assert all(line["refit"] for line in trained.lines + again.lines)


@pytest.mark.parametrize("refit", [True, False])
def test_one_view_is_not_judged_on_spots_that_the_weights_have_learnt_from(
    paper_split, monkeypatch, refit
):
    run = runs.Run({}, RECIPE | {"REFIT": refit}, [paper_split], Path("nowhere"))
    run.rows = [run.row("network", paper_split)]
    seen = []
    monkeypatch.setattr(run, "fill", lambda row, method: seen.append({*row.split.roles}))
    load_script("25").predict_otherwise(run, {"network": {"METHOD": "network"}})
    assert seen == [{"train", "test"} if refit else {"train", "valid", "test"}]
