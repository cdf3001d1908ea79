"""Kills, full disks, two processes at once: the same command again ends as if nothing had
happened.
"""

import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import pytest
import safetensors
import torch
from conftest import (
    REPOSITORY,
    TIMING,
    TINY,
    TINY_SEARCH,
    expect_refusal,
    flags_of,
    load_script,
    run_script,
    without_timing,
)
from test_patches import make_root

import common

SCRIPTS = {path.name[:2]: path for path in REPOSITORY.glob("[0-9]*.py")}
SMALL = {
    "19": {"target": "lognorm"},
    "20": TINY | {"target": "lognorm"},
    "22": TINY_SEARCH | {"only": "stages=9 hidden=0"},
}


def command_of(script, data, out):
    """The command of a small run, as a list."""
    options = {"data_root": data} | SMALL[script]
    if script != "19":
        options["out"] = out
    return [sys.executable, SCRIPTS[script], *flags_of(options)]


def start(command, **more):
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **streams, **more)


def finish(command):
    process = start(command)
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    return stdout


def results(folder):
    """{file: its content, or what of it must not vary} of a run's folder or a dataset."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != ".lock":
            found[str(path.relative_to(folder))] = lasting_content(path)
    return found


def lasting_content(path):
    """What two runs of the same thing have in common of a file."""
    if path.name == "rows.json":
        return without_timing(json.loads(path.read_text()))
    if path.name in ("rows.csv", "history.csv"):
        table = pd.read_csv(path, float_precision="round_trip")
        return table.drop(columns=[*TIMING], errors="ignore").to_csv()
    if path.suffix == ".safetensors":  # Its header lists the metadata in any order.
        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: digest(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata()
    if path.suffix in (".json", ".csv", ".npy") and path.name != "run.json":
        return digest(path.read_bytes())
    return "there"  # Figures, HDF5 and run.json hold times.


def digest(content):
    """SHA-256 of bytes, or of a tensor."""
    if isinstance(content, torch.Tensor):
        content = content.numpy().tobytes()
    return hashlib.sha256(content).hexdigest()


def slides_of(script, simulated, folder):
    """A data root of its own for 19, which writes into it; for the others one that is whole."""
    root = folder / "data"
    if script != "19":
        return simulated
    shutil.copytree(simulated, root, ignore=shutil.ignore_patterns("dataset", ".lock"))
    return root


def has_begun(script, data, out):
    """Whether a run writes: 19 its folder of work, the others their results."""
    return (data / "dataset" / ".new").is_dir() if script == "19" else out.is_dir()


def is_late(script, data, out):
    """Whether a run is past its first state: 19 wrote the counts, the others a checkpoint or a
    row.
    """
    if script == "19":
        return (data / "dataset" / ".new" / "counts.h5ad").exists()
    return bool([*out.glob("*/checkpoint.pt"), *out.glob("*/rows.json")])


def wait_for(process, reached, *arguments):
    """Wait until reached(*arguments); False if the process ended before."""
    while not reached(*arguments):
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    return True


def kill_after(pause, process, reached, *arguments):
    """Kill a process, `pause` seconds after reached(*arguments); False if it had ended before."""
    assert wait_for(process, reached, *arguments), process.communicate()[1]
    time.sleep(pause)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def undisturbed(simulated, tmp_path_factory):
    """undisturbed("20") -> (results of a run that nobody stopped, seconds for which it wrote)."""
    made = {}

    def run(script):
        if script not in made:
            folder = tmp_path_factory.mktemp(f"whole{script}")
            data, out = slides_of(script, simulated, folder), folder / "out"
            process = start(command_of(script, data, out))
            assert wait_for(process, has_begun, script, data, out)
            began = time.monotonic()
            if script == "19":
                wait_for(process, lambda: not has_begun(script, data, out))
                seconds = time.monotonic() - began
            _, stderr = process.communicate(timeout=600)
            assert process.returncode == 0, stderr
            seconds = seconds if script == "19" else time.monotonic() - began
            made[script] = results(data / "dataset" if script == "19" else out), seconds
        return made[script]

    return run


OFTEN = [(script, number) for script in ("19", "20", "22") for number in range(1, 9)]
AT_ONCE = [("19", 0), ("20", 0), ("22", 0)]


@pytest.mark.parametrize(
    "script, number", [*AT_ONCE, *(pytest.param(*one, marks=pytest.mark.slow) for one in OFTEN)]
)
def test_a_killed_run_ends_with_the_same_bits(simulated, tmp_path, undisturbed, script, number):
    """Killed at a random moment while it writes, and again when it is late, it ends the same."""
    whole, seconds = undisturbed(script)
    data, out = slides_of(script, simulated, tmp_path), tmp_path / "out"
    moment = random.Random(f"{script} {number}")
    command = command_of(script, data, out)
    made = data / "dataset" if script == "19" else out
    for reached, share in ((has_begun, 0.5), (is_late, 0.02 if script == "19" else 0.2)):
        pause = moment.uniform(0, share * seconds)
        while not kill_after(pause, start(command), reached, script, data, out):
            assert pause > 0.01, "it ends whenever it is killed"
            shutil.rmtree(made)  # It had ended: the machine is less busy than when it was timed.
            pause /= 2
    finish(command)
    assert results(made) == whole
    assert not list(tmp_path.rglob(".partial-*")), "nothing half-written stays"
    assert not (data / "dataset" / ".new").exists()


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path):
    path = tmp_path / "checkpoint.pt"
    code = f"""
import os, pathlib, signal, sys
sys.path.insert(0, {str(REPOSITORY)!r})
import torch
from study import files
for epoch in (1, 2):
    if epoch == 2:
        os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
    with files.whole_file(pathlib.Path({str(path)!r})) as partial:
        torch.save({{"epoch": epoch}}, partial)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    assert len(list(tmp_path.iterdir())) == 2, "the unfinished one, which the next try overwrites"


@pytest.fixture
def stopped(simulated, tmp_path, monkeypatch):
    """(options, checkpoint) of a run of 20 that was stopped after its first epoch."""
    out = tmp_path / "out"
    options = TINY | {"data_root": simulated, "out": out}
    save_checkpoint = common.save_checkpoint

    def save_and_stop(*arguments):
        save_checkpoint(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(common, "save_checkpoint", save_and_stop)
        assert run_script("20", **options) == 130
    (path,) = out.glob("*/checkpoint.pt")
    return options, path


def test_a_checkpoint_made_with_other_constants_or_data_is_refused(stopped):
    options, path = stopped
    state = torch.load(path, weights_only=True)
    state["made_with"] |= {"EPOCHS": 9, "data": "0123456789abcdef"}
    torch.save(state, path)
    words = ("checkpoint.pt", "EPOCHS = 9 (now 4)", "data = 0123456789abcdef (now")
    expect_refusal(words, "20", **options)


def test_a_damaged_checkpoint_is_refused(stopped):
    options, path = stopped
    path.write_bytes(path.read_bytes()[:1000])
    expect_refusal(("checkpoint.pt", "remove it"), "20", **options)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here (it needs root)")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill(disk, leave):
    """Take the space of a file system but for `leave` bytes."""
    free = shutil.disk_usage(disk).free
    (disk / "ballast").write_bytes(bytes(max(0, free - leave)))


@pytest.mark.parametrize(
    "script, leave", [("19", 100_000), ("19", 8_000_000), ("20", 100_000), ("20", 6_000_000)]
)
def test_a_full_disk_is_told_in_one_line_and_leaves_the_last_good_state(
    simulated, small_disk, script, leave
):
    if script == "19":
        data = small_disk / "data"
        data.mkdir()
        make_root(data)
        if leave > 1_000_000:  # One that fits, before the disk fills up.
            finish(command_of("19", data, None))
    else:
        data = simulated
    before = results(small_disk)
    fill(small_disk, leave if script == "20" else 100_000)
    process = start(command_of(script, data, small_disk / "out"))
    _, stderr = process.communicate(timeout=300)
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert process.returncode == 2, stderr[-2000:]
    assert len(lines) == 1, stderr[-2000:]
    assert "no space left" in lines[0]
    assert "Traceback" not in stderr
    (small_disk / "ballast").unlink()
    after = results(small_disk)
    assert before.items() <= after.items()
    assert not list(small_disk.rglob(".partial-*"))
    assert not list(small_disk.rglob("rows.json"))


def test_a_disk_that_is_too_small_for_resampling(small_disk):
    data = small_disk / "data"
    data.mkdir()
    make_root(data)
    # 15 MB a patch before it is resized.
    process = start([*command_of("19", data, None), "--um-per-px", "5"])
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 2, stderr[-2000:]
    assert stderr.count("error: ") == 1
    assert "no space left" in stderr
    assert not (data / "dataset").exists()


@pytest.mark.parametrize("script", ["19", "20"])
def test_a_second_process_on_the_same_folder_says_so_and_stops(simulated, tmp_path, script):
    data = slides_of(script, simulated, tmp_path)
    held = data if script == "19" else tmp_path / "out"
    code = f"""
import pathlib, sys
sys.path.insert(0, {str(REPOSITORY)!r})
from study import files
files.hold_folder(pathlib.Path({str(held)!r}))
print("held", flush=True)
sys.stdin.read()
"""
    first = start([sys.executable, "-c", code], stdin=subprocess.PIPE)
    assert first.stdout.readline() == "held\n"
    command = command_of(script, data, tmp_path / "out")
    second = start(command)
    _, stderr = second.communicate(timeout=120)
    assert second.returncode == 2
    assert stderr.count("error: ") == 1
    assert f"{held}: another process" in stderr
    first.kill()  # The lock goes with it, however it ends.
    first.communicate()
    finish(command)


# ------------------------------------------------------------------------- exchange of a dataset
FOREIGN = {
    "a notebook's folder": ".ipynb_checkpoints/dataset-checkpoint.csv",
    "a folder of somebody": "figures/deep/one.png",
    "a note": "notes.txt",
    "a Mac's": "._meta.json",
    "a link to nothing": None,
}


def put_foreign(folder, name):
    """Put a file that script 19 did not write into a folder; returns its path."""
    if name is None:
        (folder / "link").symlink_to("nowhere")
        return folder / "link"
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    return path


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_others_put_into_dataset_stays_when_it_is_made_anew(tmp_path, kind):
    make_root(tmp_path)
    options = {"data_root": tmp_path, "target": "lognorm"}
    assert run_script("19", **options) == 0
    folder = tmp_path / "dataset"
    (folder / "thumbnail_of_a_slide_before.png").write_text("old")
    (folder / "target.npy").write_text("old")
    path = put_foreign(folder, FOREIGN[kind])
    assert run_script("19", **options, thumbnail=False) == 0
    assert path.is_symlink() or path.read_text() == "mine"
    assert not (folder / "target.npy").exists(), "19's own files of before go"
    assert not list(folder.glob("thumbnail_*")) and not (folder / ".new").exists()
    assert len(common.load_dataset(tmp_path, "lognorm").spots) == 7


@pytest.mark.parametrize("kind", ["another disk", "beside", "not there yet"])
def test_a_linked_dataset_is_made_where_the_link_leads(tmp_path, kind):
    root = tmp_path / "root"
    root.mkdir()
    make_root(root)
    other = tempfile.mkdtemp(dir="/dev/shm") if kind == "another disk" else tmp_path / "elsewhere"
    target = Path(other, "mine")
    if kind != "not there yet":
        target.mkdir(parents=True)
    (root / "dataset").symlink_to(target)
    try:
        for thumbnail in (True, False):  # A second time it is exchanged.
            options = {"target": "lognorm", "thumbnail": thumbnail}
            assert run_script("19", data_root=root, **options) == 0
            assert (root / "dataset").is_symlink()
            assert (target / "meta.json").is_file()
            assert not list(target.glob(".*"))
        assert len(common.load_dataset(root, "lognorm").spots) == 7
    finally:
        shutil.rmtree(other, ignore_errors=True)


@pytest.mark.parametrize("name", ["meta.json", "patches.npy", "thumbnail_S1.png", ""])
def test_what_is_in_the_place_of_a_dataset_is_told_at_the_start(tmp_path, name):
    make_root(tmp_path)
    path = tmp_path / "dataset" / name
    if name:
        path.mkdir(parents=True)
    else:
        path.write_text("a file")
    words = (f"error: {path}: a ", "move it away\n")
    expect_refusal(words, "19", data_root=tmp_path, target="lognorm")
    assert path.exists()


@pytest.mark.parametrize("number", range(6))
def test_an_exchange_that_fails_at_any_file_moves_none(tmp_path, monkeypatch, number):
    script = load_script("19")
    names = ("patches.npy", "dataset.csv", "meta.json")
    for name in names:
        (tmp_path / name).write_text("old")
    replace, calls = Path.replace, []

    def fail_once(path, target):
        calls.append(target)
        if len(calls) == number + 1:
            raise OSError(5, "Input/output error")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fail_once)
    with pytest.raises(OSError, match="Input/output"), script.whole_folder(tmp_path) as work:
        for name in names:
            (work / name).write_text("new")
    assert results(tmp_path).keys() == set(names)
    assert {(tmp_path / name).read_text() for name in names} == {"old"}
