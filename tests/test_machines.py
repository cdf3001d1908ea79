"""Machines as they are: file systems without locks, no home, signals while a library waits, RANK set by
others than torchrun, systems that cannot reserve disk space.
"""

import errno
import fcntl
import gc
import io
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, flags_of, run_script
from PIL import Image
from test_interruptions import SCRIPTS, start
from test_patches import make_root

import common
from slides import imaging
from study import errors, files, shell

NOBODY = 65534


def run_code(code):
    """What another process prints that runs this code in the repository."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return done.stdout


# ------------------------------------------------------------------------------------------- locks
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_once(tmp_path, monkeypatch, capsys, number):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    make_root(tmp_path)
    assert run_script("19", data_root=tmp_path, target="lognorm") == 0
    files.hold_folder(tmp_path)
    out = capsys.readouterr().out
    assert out.count("has no locks") == 1
    assert f"warning: {tmp_path}: its file system has no locks ({os.strerror(number)})" in out
    assert len(common.load_dataset(tmp_path, "lognorm").spots) == 7


OPEN_HDF5 = """
import runpy, sys
h5py = runpy.run_path(sys.argv[1])["h5py"]
with h5py.File(sys.argv[2], "w") as file:
    asks, _ = file.id.get_access_plist().get_file_locking()
assert not asks
"""


def test_hdf5_asks_for_no_lock_of_its_own(tmp_path):
    """In a process of its own, since the variable is read when h5py is loaded."""
    environment = {name: os.environ[name] for name in os.environ if not name.startswith("HDF5")}
    environment["PYTHONPATH"] = str(REPOSITORY)
    script = REPOSITORY / "19_make_patches_and_csv.py"
    command = [sys.executable, "-c", OPEN_HDF5, script, tmp_path / "file.h5"]
    subprocess.run(command, check=True, env=environment, cwd=REPOSITORY)


# -------------------------------------------------------------------------------------------- home
@pytest.fixture
def no_home(monkeypatch, tmp_path):
    """A process whose home is no folder, and that has no folders for caches."""
    (tmp_path / "home").write_text("a file")
    for name in ("XDG_CACHE_HOME", "NUMBA_CACHE_DIR", "MPLCONFIGDIR", "HF_HOME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_without_a_home_caches_lie_in_a_temporary_folder(no_home, monkeypatch):
    monkeypatch.setenv("HF_HOME", "/mine")
    shell.provide_caches()
    folder = Path(os.environ["NUMBA_CACHE_DIR"]).parent
    assert os.access(folder, os.W_OK)
    assert Path(os.environ["MPLCONFIGDIR"]).parent == folder
    assert os.environ["HF_HOME"] == "/mine", "what the user has chosen stays"
    shutil.rmtree(folder)


def test_with_a_home_nothing_is_set(no_home, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shell.provide_caches()
    assert "NUMBA_CACHE_DIR" not in os.environ
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "chosen"))
    shell.provide_caches()
    assert "NUMBA_CACHE_DIR" not in os.environ


@pytest.fixture
def folder_of_nobody():
    """A folder to which the user nobody may write, outside root's own."""
    if shutil.which("setpriv") is None or os.getuid() != 0:
        pytest.skip("only root can run a process as another user, by setpriv")
    folder = Path(tempfile.mkdtemp())
    yield folder
    shutil.rmtree(folder)


def test_script_19_runs_without_a_home_and_with_packages_that_it_cannot_write(folder_of_nobody):
    root = folder_of_nobody
    make_root(root, counts=np.random.default_rng(0).poisson(9, (7, 40)) + 1)
    for path in (root, *root.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    python = ["setpriv", f"--reuid={NOBODY}", "--clear-groups", sys.executable]
    probe = f"import harmonypy; open({str(SCRIPTS['19'])!r}).close()"
    if subprocess.run([*python, "-c", probe], capture_output=True).returncode:
        pytest.skip("the user nobody may not read this repository or its Python's packages")
    command = [*python, SCRIPTS["19"]]
    options = {"data_root": root, "target": "lognorm", "hvg_per_slide": 10}
    environment = {"HOME": "/nonexistent", "PATH": os.environ["PATH"], "TMPDIR": str(root)}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *flags_of(options)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert not [*root.glob("caches-*")], "they go with the process"


# ----------------------------------------------------------------------------------------- signals
# (what a script imports, how it waits); torch takes seconds to load, so that only a wait in it does.
WAITS = {
    "a row of another rank": ("time", "time.sleep(600)"),
    "a library": (
        "datetime, torch.distributed",
        "torch.distributed.HashStore().wait(['never'], datetime.timedelta(seconds=600))",
    ),
    "threads that decode": (
        "slides.imaging, time",
        """
with slides.imaging.decoding_threads() as pool:
    list(pool.map(lambda number: time.sleep(0.1), range(6000)))""",
    ),
    "a bar": (
        "time, tqdm",
        """
for _ in tqdm.tqdm(range(6000)):
    time.sleep(0.1)""",
    ),
}


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("wait", WAITS)
def test_a_signal_ends_a_process_whatever_it_waits_for(tmp_path, wait, kind):
    modules, body = WAITS[wait]
    body = textwrap.indent(body.strip(), "    ")
    (tmp_path / "script.py").write_text(f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
import {modules}
from study import shell
# {"-" * 40}
# {"-" * 40}
def main():
    print("waits", flush=True)
{body}
shell.run_script(globals())
""")
    process = start([sys.executable, tmp_path / "script.py"])
    assert process.stdout.readline() == "waits\n", process.communicate()[1]
    time.sleep(0.3)
    began = time.monotonic()
    process.send_signal(kind)
    try:
        _, stderr = process.communicate(timeout=shell.GRACE + 20)
    finally:
        process.kill()
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == shell.INTERRUPTED
    assert "Traceback" not in stderr
    assert time.monotonic() - began < shell.GRACE + 15


# ------------------------------------------------------------------------------------------- ranks
@pytest.mark.parametrize("rank", ["0", "3", "not a number"])
def test_rank_and_world_size_of_a_pod_are_not_torchruns(monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert run_code("from study import ranks; print(ranks.RANK, ranks.RANKS)") == "0 1\n"


# ------------------------------------------------------------------------------------ environments
ENVIRONMENTS = {
    "a notebook's figures, a terminal of ASCII": {
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PYTHONIOENCODING": "ascii",
    },
    "figures on a screen, no locale": {
        "MPLBACKEND": "tkagg",
        **{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    },
}


@pytest.mark.parametrize("kind", ENVIRONMENTS)
def test_script_19_runs_in_any_environment(tmp_path, kind):
    root = tmp_path / "Größe 肝"
    root.mkdir()
    make_root(root)
    command = [sys.executable, SCRIPTS["19"], "--data-root", root, "--target", "lognorm"]
    process = start(command, env=os.environ | ENVIRONMENTS[kind])
    out, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr[-2000:]
    assert "7 spots, target lognorm" in out
    assert len(common.load_dataset(root, "lognorm").spots) == 7


@pytest.mark.parametrize("kind", ENVIRONMENTS)
def test_scripts_that_draw_are_loaded_in_any_environment(kind):
    scripts = [str(SCRIPTS[number]) for number in ("20", "26", "27")]
    code = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
from study import shell
shell.prepare_process()
print("\\u8089 \\udcfc")
import matplotlib.figure, runpy
for script in {scripts!r}:
    runpy.run_path(script)
    print(matplotlib.get_backend())
"""
    command = [sys.executable, "-X", "utf8=0", "-c", code]
    process = start(command, env=os.environ | ENVIRONMENTS[kind])
    out, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr[-2000:]
    assert [line.lower() for line in out.splitlines()[-3:]] == ["agg"] * 3


# ------------------------------------------------------------------------------------------ limits
def refuse_writing(number, name):
    """Code that has the system refuse to write to files whose name ends so, as a quota does."""
    return f"""
import errno, os, sys
from pathlib import Path
sys.path.insert(0, {str(REPOSITORY)!r})
reserve = os.posix_fallocate
def refuse(descriptor, *sizes):
    if os.readlink(f"/proc/self/fd/{{descriptor}}").endswith({name!r}):
        raise OSError({number}, os.strerror({number}))
    return reserve(descriptor, *sizes)
os.posix_fallocate = refuse
"""


LIMITS = {
    "a quota": (refuse_writing(errno.EDQUOT, "patches.npy"), "disk quota is used up"),
    "a quota later": (refuse_writing(errno.EDQUOT, "lognorm.npy"), "disk quota is used up"),
    "ulimit -f": (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))",
        "larger than the system allows",
    ),
}


@pytest.mark.parametrize("kind", LIMITS)
def test_a_limit_of_the_system_is_told_in_one_line_and_the_next_start_goes_on(tmp_path, kind):
    code, words = LIMITS[kind]
    make_root(tmp_path)
    flags = ["--data-root", str(tmp_path), "--target", "lognorm"]
    code += f"""
import runpy, sys
sys.argv = [{str(SCRIPTS["19"])!r}, *{flags!r}]
sys.path.insert(0, {str(REPOSITORY)!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    process = start([sys.executable, "-c", code])
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2, stderr[-2000:]
    assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    assert words in stderr
    assert not (tmp_path / "dataset").exists()
    assert run_script("19", data_root=tmp_path, target="lognorm") == 0


def raise_as_hdf5(number):
    """Raise as h5py does, which gives the number in its message alone."""
    raise OSError(f"Can't write data (errno = {number}, error message = '{os.strerror(number)}')")


def raise_as_h5py(number):
    """Raise as h5py does for a file that it cannot open, which gives its name in the message alone."""
    cause = os.strerror(number)
    raise OSError(number, f"Unable to open file (name = '/a.h5', errno = {number}, '{cause}')")


def raise_over(error):
    """Raise as torch.save does, on top of the disk's own error."""
    try:
        raise error
    except OSError:
        raise RuntimeError("unexpected pos 704 vs 598") from None


def deny(number):
    """The error of a file that the user may not open."""
    return OSError(number, os.strerror(number), "/a")


FAILURES = {
    "numpy": (lambda: np.zeros(2**60, np.uint8), "not enough memory: .*Unable to allocate"),
    "torch": (lambda: torch.zeros(2**60, dtype=torch.uint8), "not enough memory: .*DefaultCPU"),
    "python": (lambda: bytes(2**60), "not enough memory"),
    "mmap": (lambda: mmap.mmap(-1, 2**50), "not enough memory"),
    "quota of HDF5": (lambda: raise_as_hdf5(errno.EDQUOT), "quota"),
    "limit of HDF5": (lambda: raise_as_hdf5(errno.EFBIG), "ulimit -f"),
    "a folder of another": (lambda: raise_over(deny(errno.EACCES)), "^/a: no permission .*denied"),
    "a file of HDF5": (lambda: raise_as_h5py(errno.EACCES), "^/a.h5: no permission .*denied"),
    "a read-only disk": (lambda: raise_over(deny(errno.EROFS)), "^/a: no permission .*ead-only"),
    "quota of torch": (lambda: raise_over(OSError(errno.EDQUOT, "Quota")), "quota"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_limit_that_a_library_meets_is_explained_in_one_line(kind):
    fail, words = FAILURES[kind]
    with pytest.raises(Exception) as caught:  # Libraries differ in what they raise.
        fail()
    assert re.search(words, errors.explain(caught.value))


def test_a_mistake_of_the_program_keeps_its_traceback():
    assert errors.explain(KeyError("memory")) is None
    assert errors.explain(OSError(errno.EIO, os.strerror(errno.EIO))) is None


# ------------------------------------------------------------------------------------------- macOS
def test_scratch_files_where_disk_space_cannot_be_reserved(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    scratch = imaging.map_scratch(tmp_path, (5, 4, 4, 3))
    scratch[:] = 7
    assert scratch.shape == (5, 4, 4, 3)
    assert (scratch == 7).all()
    assert not list(tmp_path.iterdir()), "it has no name"
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        imaging.map_scratch(tmp_path, (10**7, 224, 224, 3))


# ------------------------------------------------------------------------------------------- start
SLOW = {"torch", "timm", "anndata", "scanpy", "polars", "sklearn", "scipy", "pandas", "numpy"}
COMMANDS = {path.name[:2]: path for path in sorted(REPOSITORY.glob("[12]*.py"))}


def modules_of(path, *flags):
    """(exit code, stderr, names of the modules that were loaded) of a script's command."""
    code = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as ended:
    print("ENDED", ended.code or 0, *sys.modules)
"""
    command = [sys.executable, "-c", code, str(path), *flags]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    _, code, *modules = done.stdout[done.stdout.index("ENDED ") :].split()
    return int(code), done.stderr, set(modules)


@pytest.mark.parametrize("number", COMMANDS)
def test_help_loads_no_package(number):
    code, _, modules = modules_of(COMMANDS[number], "--help")
    assert code == 0
    assert not modules & SLOW


@pytest.mark.parametrize(
    ("number", "flags", "words"),
    [
        ("20", ["--epoch", "3"], "--help lists"),
        ("21", ["--epochs", "three"], "invalid int value"),
        ("17", ["--dataset", "GSE1"], "--dataset GSE1: expected one of GSE240429, HER2ST"),
        ("18", ["--spots", "1"], "--spots 1: expected a number from 2 to 1000000"),
        ("19", ["--data-root", "nowhere"], "no nowhere/slides.csv: make it with"),
        ("19", ["--um-per-px", "99"], "--um-per-px 99.0: expected a number from 0 to 20"),
        ("19", ["--panel", "nowhere.csv"], "--panel nowhere.csv: no such file or folder"),
        ("19", ["--panel", 300 * "x"], "File name too long"),
        ("19", ["--from-hest", "nowhere"], "--from-hest nowhere: no such file or folder"),
        ("20", ["--epochs", "-1"], "--epochs -1: expected a number from 0 to 1000000"),
        ("22", ["--data-root", "nowhere"], "no meta.json in nowhere/dataset"),
        ("22", ["--folds", "1"], "--folds 1: expected a number from 2 to 1000000"),
        ("22", ["--recipe", "best"], "--recipe best: expected one of paper, published"),
        ("25", ["--micro-batch", "2"], "--micro-batch 2: expected a number from 3 to 999"),
        ("26", ["--weights", "nowhere"], "--weights nowhere: no such file or folder"),
        ("27", ["--run", "nowhere"], "--run nowhere: no such file or folder"),
    ],
)
def test_a_mistake_in_the_command_is_told_before_any_package_is_loaded(number, flags, words):
    code, stderr, modules = modules_of(COMMANDS[number], *flags)
    assert code == 2
    assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    assert words in stderr
    assert not modules & SLOW


@pytest.mark.parametrize("flag", ["--from-spaceranger", "--from-hest"])
def test_where_script_19_writes_slides_csv_it_need_not_be_there(monkeypatch, tmp_path, flag):
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")  # so that what check_command sets is undone
    monkeypatch.setattr(gc, "disable", lambda: None)
    monkeypatch.setattr(sys, "argv", ["19", "--data-root", str(tmp_path), flag, str(tmp_path)])
    shell.check_command(COMMANDS["19"], files=("FROM_HEST",), manifest=True)


@pytest.mark.parametrize("asked", [{"manifest": True}, {"files": ("PANEL",)}])
def test_a_folder_in_which_nobody_may_look_is_told_in_a_line(monkeypatch, capsys, asked):
    def refuse(path, **options):
        raise deny(errno.EACCES)

    monkeypatch.setattr(Path, "stat", refuse)
    monkeypatch.setattr(sys, "argv", ["19", "--panel", "/a"])
    with pytest.raises(SystemExit, match="2"):
        shell.check_command(COMMANDS["19"], **asked)
    assert capsys.readouterr().err.startswith("error: /a: no permission")


def test_garbage_is_collected_again_once_a_script_runs(tmp_path):
    (tmp_path / "script.py").write_text(f"""
import gc, sys
sys.path.insert(0, {str(REPOSITORY)!r})
from study import shell
# {"-" * 40}
# {"-" * 40}
shell.check_command(__file__)
print(gc.isenabled(), gc.get_freeze_count() > 0)
def main():
    print(gc.isenabled(), gc.get_freeze_count() > 0)
shell.run_script(globals())
print(gc.isenabled(), gc.get_freeze_count() > 0)
""")
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["False False", "True True", "True False"], done.stderr


def test_script_17_does_not_load_torch():
    code = f"import sys, runpy; runpy.run_path({str(COMMANDS['17'])!r}); print(*sys.modules)"
    assert "torch" not in run_code(code).split()


@pytest.mark.parametrize("given, expected", [
    ({}, ["GOMP_SPINCOUNT=3000", "OMP_WAIT_POLICY=PASSIVE"]),
    ({"GOMP_SPINCOUNT": "7"}, ["GOMP_SPINCOUNT=7"] * 2),
    ({"OMP_WAIT_POLICY": "ACTIVE"}, ["OMP_WAIT_POLICY=ACTIVE"] * 2),
])  # fmt: skip
@pytest.mark.parametrize("busy", [0, 1])
def test_waiting_threads_sleep_by_the_load_unless_the_user_says_otherwise(
    monkeypatch, given, expected, busy
):
    monkeypatch.setattr(shell, "count_busy", lambda: busy)
    monkeypatch.setattr(shell, "count_cores", os.cpu_count)
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that what is set below is undone
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    shell.choose_waiting()
    assert shell.describe_waiting() == expected[busy]


def test_a_busy_process_is_counted():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            time.sleep(0.5)
            assert shell.count_busy() >= 1
        finally:
            process.kill()


def test_where_the_load_is_not_told_nobody_is_busy(monkeypatch):
    monkeypatch.setattr(shell.Path, "read_text", lambda path: "0.1 0.2")
    assert shell.count_busy() == 0


def test_a_disk_that_fills_while_a_picture_is_written_is_told(tmp_path):
    """Pillow raises an error of its own first, and the disk's while it handles that."""

    class Full(io.RawIOBase):
        def writable(self):
            return True

        def write(self, content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left") as caught:
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(Full(), format="png")
    assert "no space left" in errors.explain(caught.value)
    try:
        try:
            raise AttributeError("'_idat' object has no attribute 'fileno'")
        except AttributeError:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # noqa: B904
    except OSError as error:
        assert "no space left" in errors.explain(error)
    assert errors.explain(AttributeError("another")) is None
