"""The benchmarks run by hand; here they start, and what they compare is the same thing."""

import importlib.util
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY

import common


def load_benchmark(name):
    """A fresh module of benchmarks/."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAMES = ["compare_stages", "check_intervals", "check_trust"]


@pytest.mark.parametrize("name", NAMES)
def test_its_constants_are_listed(name):
    command = [sys.executable, REPOSITORY / "benchmarks" / f"{name}.py", "--help"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "--out" in shown
    assert "Question" in shown


def test_both_sides_cut_the_same_patches(tmp_path):
    stages = load_benchmark("compare_stages")
    pixels = np.random.default_rng(0).integers(0, 256, (700, 600, 3), np.uint8)
    stages.tifffile.imwrite(tmp_path / "slide.tif", pixels, photometric="rgb")
    corners = np.array([[-20, 30], [400, 100], [500, 450]])
    stages.conventional.cut_patches(tmp_path / "slide.tif", corners, tmp_path)
    stages.cut_here(tmp_path / "slide.tif", corners, tmp_path)
    here = np.load(tmp_path / "patches.npy")
    for number, patch in enumerate(here):
        image = stages.conventional.Image.open(tmp_path / f"{number:05d}.png")
        assert np.array_equal(image, patch)


def test_both_sides_score_the_same():
    stages = load_benchmark("compare_stages")
    predicted, truth = np.random.default_rng(0).normal(size=(2, 50, 9)).astype(np.float32)
    conventionally = stages.conventional.correlate(predicted, truth)
    assert np.allclose(conventionally, common.pearson_per_gene(predicted, truth))


def test_both_sides_choose_the_same_ridge(tmp_path, monkeypatch):
    """It is asserted before anything is timed; here with another answer of one side."""
    stages = load_benchmark("compare_stages")
    monkeypatch.setattr(stages, "RIDGE_SIZE", (100, 40, 5))
    monkeypatch.setattr(stages, "REPEATS", 1)
    (row,) = stages.compare_ridges(tmp_path)
    assert row["ratio"] > 0
    monkeypatch.setattr(stages.conventional, "choose_shrinkage", lambda *problem: (0, 1))
    with pytest.raises(AssertionError):
        stages.compare_ridges(tmp_path)


def test_both_sides_train(tmp_path, monkeypatch):
    """One step of 32 small patches and five genes each."""
    stages = load_benchmark("compare_stages")
    monkeypatch.setattr(common, "PATCH_SIZE", 64)
    for name, value in {"STEPS": 1, "GENES": 5, "DEVICE": "cpu"}.items():
        monkeypatch.setattr(stages, name, value)
    monkeypatch.setattr(stages.os, "cpu_count", lambda: 0)  # The loader has no processes.
    called = []

    def call_both(repeats, *sides):
        for side in sides:
            side()
            called.append(side.__name__)
        return np.ones((1, 2))

    monkeypatch.setattr(stages, "alternate", call_both)
    assert len(stages.compare_training(tmp_path)) == 2
    assert called == ["conventionally", "here", "fixed", "here"]


def test_a_stage_ends_with_its_table(tmp_path):
    command = [sys.executable, REPOSITORY / "benchmarks" / "compare_stages.py"]
    command += ["--only", "scoring", "--repeats", "1", "--out", tmp_path]
    subprocess.run(command, check=True, capture_output=True)
    table = pd.read_csv(tmp_path / "stages.csv")
    assert (table["conventional"] > 0).all()
    assert (table["ratio"] > 0).all()
    assert {path.name for path in tmp_path.iterdir()} == {"stages.csv", "machine.json"}
