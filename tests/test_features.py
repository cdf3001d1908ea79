"""Frozen features that are kept in the data root: the same bits as computed ones, and never those
of other patches or weights.
"""

import dataclasses
import errno
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import run_script, stdout_of
from test_weights import SMALL, weights_of

import common
from study import features


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of weights for the small backbone, at random."""
    return weights_of(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def recipe(weights):
    recipe = {"BACKBONE": SMALL, "PRETRAINED": str(weights), "IMAGE_SIZE": 32, "REFIT": False}
    return recipe | {"DEVICE": "cpu", "PRECISION": "fp32"}


@pytest.fixture
def data(paper_split, tmp_path):
    """The data of the simulated slides, in a data root of their own without features."""
    (tmp_path / "dataset").mkdir()
    return dataclasses.replace(paper_split.data, root=tmp_path)


@pytest.fixture(autouse=True)
def nothing_remembered():
    """Features are read from their file, as the next process would."""
    features.encode_patches.cache_clear()
    yield
    features.encode_patches.cache_clear()


def compute_directly(data, recipe, tta=False):
    """What a network of the plain recipe puts out for every patch."""
    model = features.build_encoder(recipe, None).to(memory_format=torch.channels_last)
    patches = common.place_patches(data.patches, recipe["IMAGE_SIZE"], torch.device("cpu"))
    every = np.arange(len(data.patches))
    return common.predict(model, patches, every, dtype=torch.float32, tta=tta)


def list_kept(data):
    return sorted((data.root / "dataset").glob("features/*"))


def forbid_computing(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("features that are kept were computed again")

    monkeypatch.setattr(common, "predict", refuse)


@pytest.mark.parametrize("pool_stages", [True, False])
@pytest.mark.parametrize("tta", [True, False])
def test_kept_features_are_those_computed_directly(data, recipe, monkeypatch, pool_stages, tta):
    recipe["POOL_STAGES"] = pool_stages
    expected = compute_directly(data, recipe, tta)
    computed, widths = features.encode_spots(data, recipe, 42, tta=tta)
    np.testing.assert_array_equal(computed, expected)
    (path,) = list_kept(data)
    features.encode_patches.cache_clear()
    forbid_computing(monkeypatch)
    read, widths_then = features.encode_spots(data, recipe, 43, tta=tta)
    np.testing.assert_array_equal(read, expected)
    assert read.dtype == np.float32
    assert list(widths_then) == list(widths)
    assert sum(widths) == read.shape[1]
    # All stages are kept once, and the last one's mean is taken out of them.
    other = recipe | {"POOL_STAGES": not pool_stages}
    features.encode_spots(data, other, 42, tta=tta)
    assert list_kept(data) == [path]


def test_a_backbone_whose_last_part_is_not_its_output_has_two_files(data, recipe, monkeypatch):
    pool = common.pool_each_stage
    changed = lambda *parts: [*pool(*parts)[:-1], pool(*parts)[0]]  # noqa: E731
    monkeypatch.setattr(common, "pool_each_stage", changed)
    features.ends_with_output.cache_clear()
    found, _ = features.encode_spots(data, recipe, 42)
    features.encode_spots(data, recipe | {"POOL_STAGES": True}, 42)
    features.ends_with_output.cache_clear()
    np.testing.assert_array_equal(found, compute_directly(data, recipe))
    assert len(list_kept(data)) == 2


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "convnext_atto"])
def test_the_last_part_of_all_stages_is_the_output(name):
    size = 224 if name.startswith("vit") else 32
    constants = {"BACKBONE": name, "PRETRAINED": False, "IMAGE_SIZE": size}
    assert features.ends_with_output(tuple(constants.items()))


def test_what_changes_features_has_a_file_of_its_own(data, recipe, tmp_path):
    other = weights_of(tmp_path / "other", seed=8)
    kinds = [{}, {"IMAGE_SIZE": 64}, {"CHANNELS": "bgr"}, {"PRETRAINED": str(other)}]
    for kind in kinds:
        features.encode_spots(data, recipe | kind, 42)
    features.encode_spots(data, recipe, 42, tta=True)
    dark = dataclasses.replace(data, patches=data.patches // 2, meta={})
    features.encode_spots(dark, recipe, 42)
    assert len(list_kept(data)) == len(kinds) + 2


def test_a_network_and_its_ridge_compute_them_once(data, recipe, monkeypatch):
    """Also where nothing can be kept; a baseline's recipe does not name the channels."""
    monkeypatch.setattr(features, "keep_features", lambda path, values: values)
    one, _ = features.encode_spots(data, recipe | {"CHANNELS": "rgb"}, 42, tta=True)
    forbid_computing(monkeypatch)
    other, _ = features.encode_spots(data, recipe, 42, tta=True)
    np.testing.assert_array_equal(one, other)


def test_the_hash_of_patches_is_that_of_meta_json(data):
    assert features.hash_patches(data.patches) == data.meta["patches_sha256"]
    assert features.hash_patches(data.patches // 2) != data.meta["patches_sha256"]


def test_features_of_random_weights_are_not_kept(data, recipe):
    recipe["PRETRAINED"] = False
    one, _ = features.encode_spots(data, recipe, 42)
    other, _ = features.encode_spots(data, recipe, 43)
    assert not np.array_equal(one, other)
    assert not list_kept(data)


def refuse_space(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("kind", ["a full disk", "no folder can be made"])
def test_features_that_cannot_be_kept_stay_in_memory(data, recipe, monkeypatch, capsys, kind):
    if kind == "a full disk":
        monkeypatch.setattr(np, "save", refuse_space)
    else:
        (data.root / "dataset" / "features").write_text("a file in its place")
    found, _ = features.encode_spots(data, recipe, 42)
    np.testing.assert_array_equal(found, compute_directly(data, recipe))
    assert capsys.readouterr().out.count("are not kept in") == 1
    assert not list_kept(data)


@pytest.mark.parametrize("damage", ["cut", "of fewer spots"])
def test_a_damaged_file_is_computed_again(data, recipe, capsys, damage):
    expected, _ = features.encode_spots(data, recipe, 42)
    expected = expected.copy()
    (path,) = list_kept(data)
    if damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:
        np.save(path, np.zeros((3, 4), np.float32))
    features.encode_patches.cache_clear()
    found, _ = features.encode_spots(data, recipe, 42)
    assert "is damaged" in capsys.readouterr().out
    np.testing.assert_array_equal(found, expected)
    features.encode_patches.cache_clear()
    features.encode_spots(data, recipe, 42)
    assert "is damaged" not in capsys.readouterr().out


def test_two_processes_may_write_at_once(tmp_path, monkeypatch):
    """The second one begins and ends while the first one writes."""
    path = tmp_path / "features" / "a.npy"
    values, save, begun = np.arange(12, dtype=np.float32).reshape(3, 4), np.save, []

    def save_slowly(file, array):
        begun.append(file)
        if len(begun) == 1:
            file.write(b"half of it")
            file.flush()
            with monkeypatch.context() as other:
                other.setattr(os, "getpid", lambda: -1)
                features.keep_features(path, values)
            np.testing.assert_array_equal(np.load(path), values)
            file.seek(0)
            file.truncate()
        save(file, array)

    monkeypatch.setattr(np, "save", save_slowly)
    np.testing.assert_array_equal(features.keep_features(path, values), values)
    assert len(begun) == 2
    assert [left.name for left in path.parent.iterdir()] == ["a.npy"]


def test_what_a_killed_process_left_is_removed_and_what_one_writes_now_is_not(tmp_path):
    left, now = tmp_path / ".partial-7-a.npy", tmp_path / ".partial-8-a.npy"
    for path in (left, now):
        path.write_bytes(b"half of it")
    os.utime(left, (0, 0))
    features.keep_features(tmp_path / "b.npy", np.zeros((1, 1), np.float32))
    assert not left.exists()
    assert now.exists()


def test_script_19_removes_features_of_other_patches_alone(simulated, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(simulated, root, ignore=shutil.ignore_patterns("features"))
    own = common.load_dataset(root, "lognorm").meta["patches_sha256"]
    kept = root / "dataset" / "features"
    kept.mkdir()
    for name in (f"{own[:16]}-1.npy", "0123-1.npy"):
        (kept / name).write_bytes(b"")
    (root / "dataset" / "notes.txt").write_text("mine")
    assert run_script("19", data_root=root, target="lognorm") == 0
    assert [path.name for path in kept.iterdir()] == [f"{own[:16]}-1.npy"]
    assert (root / "dataset" / "notes.txt").read_text() == "mine"
    assert common.load_dataset(root, "lognorm").meta["patches_sha256"] == own


def test_check_says_what_features_take(simulated):
    printed = stdout_of("19", data_root=simulated, check=True)
    (line,) = [line for line in printed.splitlines() if line.startswith("features/ will take")]
    assert f"{40 * 5760 * 4 / 1e6:,.0f} MB of resnet50" in line


@pytest.mark.parametrize("backbone", features.WIDTHS)
def test_the_widths_that_check_uses_are_the_backbones(backbone):
    recipe = {"BACKBONE": backbone, "PRETRAINED": False, "IMAGE_SIZE": 32, "POOL_STAGES": True}
    assert sum(features.build_encoder(recipe, 0).widths) == features.WIDTHS[backbone]
