"""Fixtures and helpers: the scripts run in this process on about 40 simulated spots; nothing
reaches beyond loopback.
"""

import contextlib
import importlib.util
import io
import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

# Small steps on two threads mostly wait for each other, and longer still beside a second worker.
# Read when numpy and torch are loaded, here and in the processes that tests start.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

import h5py
import numpy as np
import pandas as pd
import pytest
import safetensors
import scipy.io
import scipy.sparse

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
SHARED = REPOSITORY.parent / "shared"  # real data, where someone has put it

import common  # noqa: E402
from slides.manifest import MANIFEST  # noqa: E402
from study import constants, intervals, recipes, rows, shell, splitting  # noqa: E402
from study.errors import InputError  # noqa: E402

# ------------------------------------------------------------------------------------------ options
# Of the command line, for flags_of and run_script: a network that trains in a second.
TINY = {
    "image_size": 32,
    "epochs": 4,
    "batch_size": 8,
    "learning_rate": 0.03,
    "hidden": 16,
    "pretrained": False,
    "device": "cpu",
}
TINY_SEARCH = {name: value for name, value in TINY.items() if name != "hidden"}  # 22 has no HIDDEN
# Behind a head that starts at 0, so few steps leave most predictions constant.
AT_RANDOM = {"head_start": "random"}
TINY_SEARCH |= AT_RANDOM | {"epochs": 3, "folds": 2, "target": "lognorm"}
SMALL_GRID = {"STAGES": (0, 1), "HIDDENS": (0, 4)}  # of script 22
# A run says that its budget is small, and nothing else of --quick is used.
QUICK = {"quick": True, "QUICK_BUDGET": {"DATA_ROOT": "SIMULATED_data"}}

# Options of the runs that `finished` gives. Scripts without --seeds here use their own.
SMALL_RUNS = {
    "20": TINY,
    "21": {
        **(TINY | QUICK | {"target": "lognorm"}),
        "BACKBONES": ("mobilenetv3_small_050", "resnet10t"),
        "FROZEN": ("resnet10t",),
    },
    "22": TINY_SEARCH | QUICK | SMALL_GRID,
    "23": TINY | AT_RANDOM | QUICK | {"target": "lognorm", "epochs": 2, "seeds": (42, 43)},
    "24": {
        **(TINY | QUICK | {"target": "lognorm", "epochs": 2, "seeds": (42,)}),
        "features": "",
        "min_cluster": 0.1,
        "WEIGHTS": ((1, 0), (1, 1)),
    },
    "25": {
        **(TINY | QUICK | {"target": "lognorm", "epochs": 1}),
        "stnet_epochs": 1,
        "bleep_epochs": 2,
        "other_backbones": "resnet10t",
        "bleep_batch": 24,
        "micro_batch": 8,
        "features": "resnet18",
    },
}

# ------------------------------------------------------------------------------------------ recipes
NETWORK = recipes.PAPER | {"BACKBONE": "efficientnet_b0", "PRETRAINED": False, "HIDDEN": 8}
NETWORK |= {"IMAGE_SIZE": 32, "LOSS": "mse", "DEVICE": "cpu", "PRECISION": "fp32"}
PAPER = {"PROTOCOL": "paper", "TRAIN_SLIDES": (), "TEST_SLIDE": 3, "VALID_FRACTION": 0.2}
LOGNORM = {"PROTOCOL": "paper", "TARGET": "lognorm"}  # of make_split
TIMING = ("seconds", "images_per_s", "peak_memory_mb")  # differ between two runs of the same thing


# ---------------------------------------------------------------------------------------- a script
def load_script(name):
    """A fresh module of a numbered script: load_script("19"), or of a script's path."""
    path = name
    if not isinstance(name, Path):
        (path,) = REPOSITORY.glob(f"{name}_*.py")
    spec = importlib.util.spec_from_file_location(f"script_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flags_of(options):
    """Options as the command line takes them: {"image_size": 32} -> ["--image-size", "32"]."""
    words = []
    for name, value in options.items():
        words += [constants.flag_of(name), constants.show_constant(value)]
    return words


def run_script(name, *arguments, **options):
    """Run a numbered script as the shell would, in this process; returns its exit code.

    `arguments` stand on the command line as they are. An option in lower case is a flag,
    image_size=32; one in upper case replaces a name of the script that has no flag, STAGES=(0, 1).
    """
    module, before = load_script(name), sys.argv
    replaced = {option: value for option, value in options.items() if option.isupper()}
    flags = {option: value for option, value in options.items() if option not in replaced}
    vars(module).update(replaced)
    sys.argv = [module.__file__, *map(str, arguments), *flags_of(flags)]
    try:
        shell.run_script(vars(module))
    except SystemExit as ended:
        return ended.code
    finally:
        sys.argv = before
    return 0


def stdout_of(name, *arguments, **options):
    """What run_script prints, of a run that ends well."""
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        assert run_script(name, *arguments, **options) == 0
    return stdout.getvalue()


def expect_refusal(words, name, *arguments, **options):
    """A script ends with 2 and one line, which holds these words."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        assert run_script(name, *arguments, **options) == 2
    error = stderr.getvalue()
    assert error.startswith("error: ") and error.count("\n") == 1, error
    for word in words:
        assert word in error, (word, error)


@contextlib.contextmanager
def refused(*words):
    """What is done here is refused by an InputError of one line, which holds these words."""
    with pytest.raises(InputError) as caught:
        yield
    error = str(caught.value)
    assert "\n" not in error
    for word in words:
        assert word in error, (word, error)


def rows_of(stdout):
    """The rows, dicts, of the run that printed this, in its order."""
    word, path = stdout.splitlines()[-1].split(": ")
    assert word == "rows"
    out = Path(path).parent
    folders = json.loads((out / "run.json").read_text())["folders"]
    rows = [json.loads((out / folder / "rows.json").read_text()) for folder in folders]
    return list(itertools.chain(*rows))


def table_of(stdout):
    """The rows of the run that printed this, as a table."""
    return pd.DataFrame(rows_of(stdout))


def printed_table(stdout, title):
    """(head, lines) of the ruled table under the title that holds these words; of a table in
    several parts the lines of each part stand side by side.
    """
    lines = iter(stdout[stdout.index(title) :].splitlines())
    rule = next(line for line in lines if line and set(line) == {"="})
    heads, parts = [next(lines)], []
    while len(parts) < len(heads):
        assert set(next(lines)) == {"-"}
        parts.append([*itertools.takewhile(lambda line: line != rule, lines)])
        following = next(lines, "")
        if following.startswith("setting "):
            heads.append(following)
    return "\n".join(heads), ["  ".join(several) for several in zip(*parts, strict=True)]


def metadata_of(path):
    """{name: value} of what a .safetensors file says of itself."""
    with safetensors.safe_open(path, "numpy") as file:
        return {name: json.loads(text) for name, text in file.metadata().items()}


def without_timing(records):
    """The records less what differs between two runs of the same thing."""
    return [
        {name: value for name, value in record.items() if name not in TIMING} for record in records
    ]


# ------------------------------------------------------------------------------------------ a method
def ask(method, recipe, split, folder=None, **more):
    """(prediction (n, G) of the scored spots, notes) of a method, of a row that is not saved."""
    row = rows.Row("asked", recipe, split, folder, report=None, **more)
    return row.ask(method, refit=True), row.notes


def split_of(target, train, valid, seed=42):
    """What common.fit asks of a Split, for a target (N, G) and numbers of spots."""
    return SimpleNamespace(
        data=SimpleNamespace(target=target),
        seed=seed,
        spots={"train": train, "valid": valid}.__getitem__,
        mean_heg=lambda predicted: None,
        made_with=lambda recipe: {},
    )


def write_slide(root, image, positions, counts, genes, slide=1):
    """A data root of one slide: image is written by the caller, positions a table, counts (spots,
    genes).
    """
    write_matrix(root / f"matrix{slide}", positions["barcode"], counts, genes)
    positions.to_csv(root / f"positions{slide}.csv", header=False, index=False)
    row = [slide, f"S{slide}", f"D{slide}", image, 0.5, f"positions{slide}.csv", f"matrix{slide}"]
    table = pd.DataFrame([row], columns=MANIFEST)
    if (root / "slides.csv").exists():
        table = pd.concat([pd.read_csv(root / "slides.csv"), table])
    table.to_csv(root / "slides.csv", index=False)


def edit_manifest(root, **columns):
    """Give these columns of slides.csv other values."""
    table = pd.read_csv(root / "slides.csv", dtype=str, keep_default_na=False)
    table.assign(**columns).to_csv(root / "slides.csv", index=False)


def write_matrix(folder, barcodes, counts, genes):
    """A folder filtered_feature_bc_matrix/ of counts (spots, genes)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "barcodes.tsv").write_text("\n".join(barcodes) + "\n")
    (folder / "features.tsv").write_text("".join(f"ID{g}\t{g}\tGene Expression\n" for g in genes))
    scipy.io.mmwrite(folder / "matrix.mtx", scipy.sparse.coo_matrix(np.asarray(counts).T))


def write_h5(path, counts, genes, genomes=None, barcodes=(), ids=None):
    """A filtered_feature_bc_matrix.h5 of counts (spots, genes)."""
    matrix = scipy.sparse.csr_matrix(counts)
    features = {"id": ids or [f"ID{gene}" for gene in genes], "name": genes}
    features["feature_type"] = ["Gene Expression"] * len(genes)
    features["genome"] = genomes or ["GRCh38"] * len(genes)
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["data"], group["indices"] = matrix.data.astype(np.int32), matrix.indices
        group["indptr"], group["shape"] = matrix.indptr, np.array(matrix.shape[::-1])
        group["barcodes"] = np.array([*barcodes], "S")
        for name, cells in features.items():
            group[f"features/{name}"] = np.array(cells, "S")


# ----------------------------------------------------------------------------------------- fixtures
@pytest.fixture(scope="session", autouse=True)
def no_reports():
    """Reports, which take longer to draw than these runs to train, are made where a test asks for
    them.
    """
    call = shell.call_script

    def call_others(name, *flags):
        if not name.startswith("27_"):
            call(name, *flags)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shell, "call_script", call_others)
        yield


@pytest.fixture(scope="session", autouse=True)
def small_slides_have_intervals():
    """The slides of these tests are smaller than an interval asks for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "LEAST_SPOTS", 0)
        yield


@pytest.fixture(scope="session")
def simulated(tmp_path_factory):
    """Data root of four simulated slides with 10 spots each, patches made, target harmony."""
    root = tmp_path_factory.mktemp("data") / "SIMULATED_data"
    assert run_script("18", data_root=root, spots=10) == 0
    assert run_script("19", data_root=root) == 0
    return root


@pytest.fixture(scope="session")
def paper_split(simulated):
    """The Split of protocol paper on the simulated slides, target lognorm, seed 42."""
    data = common.load_dataset(simulated, "lognorm")
    (roles,) = splitting.split_spots(data.spots, PAPER, 42)
    return splitting.make_split(data, roles, LOGNORM, 42, 0)


@pytest.fixture(scope="session")
def finished(simulated, tmp_path_factory):
    """finished("21") -> (output folder, stdout) of a script with SMALL_RUNS' options, run once."""
    runs = {}

    def run(name):
        if name not in runs:
            out = tmp_path_factory.mktemp(f"runs{name}")
            stdout = stdout_of(name, data_root=simulated, out=out, **SMALL_RUNS[name])
            runs[name] = out, stdout
        return runs[name]

    return run


@pytest.fixture
def copied(finished, tmp_path):
    """copied("21") -> a copy of the output folder of finished("21"), for another start in it."""
    return lambda name: shutil.copytree(finished(name)[0], tmp_path / "copied")


@pytest.fixture(scope="session")
def trained(finished):
    """(output folder, stdout) of script 20 on the simulated slides."""
    return finished("20")


@pytest.fixture(scope="session")
def report(trained):
    """(folder, text of report.html) of the run of script 20."""
    assert run_script("27", "--run", trained[0]) == 0
    return trained[0], (trained[0] / "report.html").read_text()
