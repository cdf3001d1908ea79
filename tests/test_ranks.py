"""Several processes by torchrun, over gloo on the processor: a grid shared out, one network
trained together.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from conftest import NETWORK, TINY, flags_of, split_of
from test_interruptions import SCRIPTS, finish, results, start

import common

SMALL = TINY | {"epochs": 2, "target": "lognorm"}
RECIPE = NETWORK | {"HIDDEN": 0, "AUG": "mpa", "BATCH_SIZE": 7, "LEARNING_RATE": 1e-3}
RECIPE |= {"EPOCHS": 1, "LOSS": "mse"}
SPOTS, GENES = 11, 5
RANKS = 3


def torchrun(ranks, script, **options):
    """The command of a run by `ranks` processes, as a list."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *launcher, SCRIPTS[script], *flags_of(options)]


def test_rows_of_two_ranks_equal_one_process(simulated, tmp_path):
    options = SMALL | {"data_root": simulated, "seeds": (42, 43), "only": "mpa"}
    alone = flags_of(options | {"out": tmp_path / "one"})
    finish([sys.executable, SCRIPTS["23"], *alone])
    stdout = finish(torchrun(2, "23", **options, out=tmp_path / "two"))
    assert results(tmp_path / "two") == results(tmp_path / "one")
    assert stdout.count("rows: ") == 1, "the first rank prints, and no other"
    one, two = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two"))
    assert one["folders"] == two["folders"], "in the order of a single process"


def test_one_network_is_trained_by_two_ranks_and_goes_on_after_one_died(simulated, tmp_path):
    options = SMALL | {"data_root": simulated, "epochs": 3}
    command = torchrun(2, "20", **options, out=tmp_path / "killed")
    process = start(command)
    while process.poll() is None and not list(tmp_path.glob("killed/*/checkpoint.pt")):
        time.sleep(0.01)
    find_ranks = ["pgrep", "-P", str(process.pid), "-f", "20_train"]
    ranks = subprocess.run(find_ranks, capture_output=True, text=True)
    os.kill(int(ranks.stdout.split()[-1]), signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0
    told = [line.endswith("run the same command again") for line in stderr.splitlines()]
    assert any(told), stderr[-3000:]
    stdout = finish(command)
    assert "going on after epoch" in stdout
    assert stdout.count("rows: ") == 1
    whole = finish(torchrun(2, "20", **options, out=tmp_path / "whole"))
    assert "going on" not in whole
    (folder,) = tmp_path.glob("killed/EfficientNet-B0-*")
    (other,) = tmp_path.glob("whole/EfficientNet-B0-*")
    assert results(folder) == results(other), "the same bits as without the death"
    assert json.loads((folder / "recipe.json").read_text())["RANKS"] == 2


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    """The folder in which three processes that joined each other saved what they computed."""
    folder = tmp_path_factory.mktemp("joined")
    torch.multiprocessing.spawn(compute_joined, (folder,), RANKS)
    return folder


def compute_joined(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=RANKS)
    save_gradient(rank, folder)
    save_prediction(rank, folder)
    dist.destroy_process_group()


def little():
    """(model with BatchNorm frozen and no dropout, patches, target)."""
    random = np.random.default_rng(0)
    patches = random.integers(0, 256, (SPOTS, 224, 224, 3), dtype=np.uint8)
    model = common.build_model(RECIPE, GENES, 1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.training, module.train = False, lambda mode=True: None
    target = random.normal(size=(SPOTS, GENES)).astype(np.float32)
    return model, common.MappedPatches(torch.from_numpy(patches), 32), target


def save_gradient(rank, folder):
    """Save (mean loss, gradient) of one batch, of which the ranks take 3, 2 and 2 spots."""
    model, patches, target = little()
    network = torch.nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model
    optimiser = torch.optim.SGD(model.parameters(), 0.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    loss = common.LOSSES["mse"]
    step = functools.partial(common.make_step, network, optimiser, scaler, loss, torch.float32)
    spots = np.arange(7)
    split = split_of(target, spots, None)
    loss = common.train_epoch(network, step, patches, split, RECIPE, 0)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.save((loss, gradient), f"{folder}/gradient{rank}.pt")


def test_the_gradient_of_one_batch_from_three_ranks_is_that_of_one_process(joined, tmp_path):
    save_gradient("alone", tmp_path)
    loss, alone = torch.load(tmp_path / "gradientalone.pt")
    assert alone.abs().max() > 1e-3
    for rank in range(RANKS):
        its_loss, gradient = torch.load(joined / f"gradient{rank}.pt")
        assert its_loss == pytest.approx(loss, abs=1e-5)
        torch.testing.assert_close(gradient, alone, rtol=0, atol=1e-5)


class MeanColour(torch.nn.Linear):
    """(B, 3, S, S) -> (B, 3): what it gives is known of every spot."""

    def forward(self, pixels):
        return pixels.float().mean((2, 3)) + 0 * self.bias


PREDICTED = [8, 3, 0, 10, 1, 5, 2]  # 3, 2 and 2 of them


def save_prediction(rank, folder):
    """Save the prediction of PREDICTED; of two spots the third rank has none."""
    model = MeanColour(3, 3)
    pixels = torch.arange(SPOTS, dtype=torch.uint8).view(-1, 1, 1, 1)
    patches = common.MappedPatches(pixels.expand(SPOTS, 224, 224, 3), 32)
    predicted = common.predict(model, patches, PREDICTED, dtype=torch.float32)
    np.save(f"{folder}/prediction{rank}.npy", predicted)
    two = common.predict(model, patches, PREDICTED[:2], dtype=torch.float32)
    assert two[:, 0].tolist() == [8, 3]


def test_a_prediction_gathered_from_three_ranks_is_that_of_one(joined):
    for rank in range(RANKS):
        predicted = np.load(joined / f"prediction{rank}.npy")
        assert predicted.tolist() == [[spot] * 3 for spot in PREDICTED]


def joined_norms(module):
    """The BatchNorm layers of a module that average over ranks."""
    return [part for part in module.modules() if isinstance(part, torch.nn.SyncBatchNorm)]


@pytest.mark.parametrize(
    "stages, backbone", [(1, "efficientnet_b0"), (0, "resnet18"), (0, "densenet121")]
)
def test_frozen_stages_stay_frozen_when_batch_norm_is_joined(monkeypatch, stages, backbone):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    recipe = RECIPE | {"BACKBONE": backbone, "TRAINABLE_STAGES": stages}
    model = common.build_model(recipe, GENES, 1).train()
    joined = joined_norms(model.backbone)
    frozen = [norm for part in model.frozen for norm in joined_norms(part)]
    assert joined
    assert {id(norm) for norm in frozen} <= {id(norm) for norm in joined}
    assert not any(norm.training for norm in frozen)
    assert sum(norm.training for norm in joined) == len(joined) - len(frozen)
    assert frozen or stages
