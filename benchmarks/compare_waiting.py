"""How OpenMP's threads wait for each other: training and script 19, idle and beside a busy process.

Question   Does sleeping soon cost anything on an idle machine, and what does it save on a busy one?
Reads      nothing
Writes     <OUT>/waiting.csv, waiting_19.csv and machine.json; a slide made for it under OUT
           (removed at the end)
Prints     a line a way of waiting: median images/s of training EfficientNet-B0, idle and busy, as a
           share of the best when idle and as a multiple of "as it comes" when busy; then the median
           seconds of script 19, idle and busy, and their ratio
Command    python benchmarks/compare_waiting.py
Override   python benchmarks/compare_waiting.py --only training --rounds 3

Each number is of a process of its own, since OpenMP reads its settings when it is loaded; the ways
take turns in every round. The busy process is a loop in Python, which takes one core.
"""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

import shell

if __name__ == "__main__":  # Mistakes are told before the imports, which take long.
    shell.check_command(__file__)


import functools
import os
import shutil
import subprocess
import time
from contextlib import contextmanager

import pandas as pd
import torch
from compare_stages import GENES, TRAINED_BY, build_fast, describe_machine

import common

# ---------------------------------------------------------------------------------------- constants
OUT = "runs/benchmarks"
ROUNDS = 5  # in each, every way of waiting has its turn
SECONDS = 8.0  # of training that a process times
IMAGE_SIZE = 96  # px
SPOTS = 2300  # on the simulated slide of script 19, made by 18 in some minutes
ONLY = ""  # training or 19; empty = both
# --------------------------------------------------------------------------------------------------

AS_IT_COMES, BY_LOAD = "as it comes", "by the load (the default here)"
WAYS = {
    AS_IT_COMES: {},
    BY_LOAD: {},
    "spins 1,000": {"GOMP_SPINCOUNT": "1000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
}
WARM_UP = 3  # steps that are not timed


# ----------------------------------------------------------------------------------------- training
def train(seconds, image_size):
    """Images a second of training on one batch of noise, in this process."""
    model = build_fast(torch.device("cpu")).train()
    optimiser, _ = common.adam(model, TRAINED_BY)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss = common.LOSSES[TRAINED_BY["LOSS"]]
    step = functools.partial(common.make_step, model, optimiser, scaler, loss, torch.float32)
    batch = TRAINED_BY["BATCH_SIZE"]
    images = torch.randint(0, 256, (batch, 3, image_size, image_size)).float()
    images = images.contiguous(memory_format=torch.channels_last)
    target = torch.randn(batch, GENES)
    for _ in range(WARM_UP):
        step(images, target, 1.0)
    steps, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        step(images, target, 1.0)
        steps += 1
    return steps * batch / (time.perf_counter() - began)


def time_training(way):
    """train() in a process of its own, whose threads wait in this way."""
    ours = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # One of them is set in this process.
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    code = f"import compare_waiting; print(compare_waiting.train({SECONDS}, {IMAGE_SIZE}))"
    if way == BY_LOAD:
        code = f"import sys; sys.path.insert(0, '..'); import shell; shell.choose_waiting(); {code}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY / "benchmarks",
        env=environment | WAYS[way],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(done.stdout)


@contextmanager
def busy_process():
    """A process beside this one that never waits."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def compare_ways():
    """Medians (way of waiting) x (idle, busy) in images/s, and what is asked of them."""
    records = []
    for _ in range(ROUNDS):
        for way in WAYS:
            idle = time_training(way)
            with busy_process():
                busy = time_training(way)
            records.append({"waiting": way, "idle": idle, "busy": busy})
    table = pd.DataFrame(records).groupby("waiting", sort=False).median()
    table["idle / best"] = table["idle"] / table["idle"].max()
    table["busy / as it comes"] = table["busy"] / table.loc[AS_IT_COMES, "busy"]
    return table.reset_index()


# ---------------------------------------------------------------------------------------- script 19
def run(script, *flags):
    """Seconds that a script takes, its imports as well."""
    began = time.perf_counter()
    command = [sys.executable, REPOSITORY / script, *map(str, flags)]
    subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return time.perf_counter() - began


def time_script_19(root):
    """Median seconds of script 19 on a slide that 18 makes, idle and busy, and their ratio."""
    run("18_simulate_slides.py", "--data-root", root, "--slides", 1, "--spots", SPOTS)
    make_patches = ("19_make_patches_and_csv.py", "--data-root", root, "--target", "lognorm")
    records = []
    for _ in range(ROUNDS):
        idle = run(*make_patches)
        with busy_process():
            busy = run(*make_patches)
        records.append({"idle": idle, "busy": busy})
    table = pd.DataFrame(records).median().to_frame().T
    table.insert(0, "spots", SPOTS)
    table["busy / idle"] = table["busy"] / table["idle"]
    return table


def show(title, table):
    print(title)
    print(table.to_string(index=False, float_format="{:.2f}".format), flush=True)


def main():
    out = Path(OUT)
    if ONLY in ("", "training"):
        ways = compare_ways()
        show(f"training at {IMAGE_SIZE} px, images/s", ways)
        shell.save_csv(out / "waiting.csv", ways)
    if ONLY in ("", "19"):
        root = out / "work-waiting"
        shutil.rmtree(root, ignore_errors=True)
        try:
            seconds = time_script_19(root)
        finally:
            shutil.rmtree(root, ignore_errors=True)
        show("script 19, seconds", seconds)
        shell.save_csv(out / "waiting_19.csv", seconds)
    shell.save_json(out / "machine.json", describe_machine())


if __name__ == "__main__":
    shell.run_script(globals())
