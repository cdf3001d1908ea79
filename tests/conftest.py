"""Fixtures: the scripts run in this process on about 40 simulated spots; nothing reaches beyond loopback."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
SHARED = REPOSITORY.parent / "shared"  # real data, where someone has put it


def load_script(name):
    """A fresh module of a numbered script: load_script("19")."""
    (path,) = REPOSITORY.glob(f"{name}_*.py")
    spec = importlib.util.spec_from_file_location(f"script_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(name, *arguments, **changed):
    """Run a numbered script as the shell would, in this process, with names `changed`; returns its exit code."""
    import common

    module, before = load_script(name), sys.argv
    vars(module).update(changed)
    sys.argv = [module.__file__, *map(str, arguments)]
    try:
        common.run_script(vars(module))
    except SystemExit as ended:
        return ended.code
    finally:
        sys.argv = before
    return 0


def write_slide(root, image, positions, counts, genes, slide=1):
    """A data root of one slide: image is written by the caller, positions a table, counts (spots, genes)."""
    matrix = root / f"matrix{slide}"
    matrix.mkdir(parents=True, exist_ok=True)
    positions.to_csv(root / f"positions{slide}.csv", header=False, index=False)
    (matrix / "barcodes.tsv").write_text("\n".join(positions["barcode"]) + "\n")
    (matrix / "features.tsv").write_text("".join(f"ID{g}\t{g}\tGene Expression\n" for g in genes))
    scipy.io.mmwrite(matrix / "matrix.mtx", scipy.sparse.coo_matrix(np.asarray(counts).T))
    row = [slide, f"S{slide}", f"D{slide}", image, 0.5, f"positions{slide}.csv", f"matrix{slide}"]
    table = pd.DataFrame([row], columns=load_script("19").MANIFEST)
    if (root / "slides.csv").exists():
        table = pd.concat([pd.read_csv(root / "slides.csv"), table])
    table.to_csv(root / "slides.csv", index=False)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_reports():
    """Reports, which take longer to draw than these runs to train, are made where a test asks for them."""
    import common

    call = common.call_script
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "call_script", lambda name, *flags: name.startswith("27_") or call(name, *flags))
        yield


@pytest.fixture(scope="session")
def simulated(tmp_path_factory):
    """Data root of four simulated slides with 10 spots each, patches made, target harmony."""
    root = tmp_path_factory.mktemp("data") / "SIMULATED_data"
    assert run_script("18", "--data-root", root, "--spots", 10) == 0
    assert run_script("19", "--data-root", root, "--thumbnail") == 0
    return root


TINY = ("--image-size", 32, "--epochs", 4, "--batch-size", 8, "--learning-rate", 0.003, "--hidden", 16)
TINY += ("--pretrained", "false", "--device", "cpu")


@pytest.fixture(scope="session")
def trained(simulated, tmp_path_factory):
    """(output folder, stdout) of script 20 on the simulated slides."""
    import contextlib
    import io

    out, stdout = tmp_path_factory.mktemp("runs"), io.StringIO()
    with contextlib.redirect_stdout(stdout):
        assert run_script("20", "--data-root", simulated, "--out", out, *TINY) == 0
    return out, stdout.getvalue()
