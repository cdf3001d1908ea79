"""Several processes by torchrun, over gloo on the processor: a grid shared out, one network trained together."""

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
from conftest import TINY
from test_interruptions import SCRIPTS, finish, results, start

import common

SMALL = [option for option in TINY if option not in ("--epochs", 4)] + ["--epochs", 2, "--target", "lognorm"]
RECIPE = {
    "BACKBONE": "efficientnet_b0", "PRETRAINED": False, "HIDDEN": 0, "TRAINABLE_STAGES": -1, "AUG": "mpa",
    "BATCH_SIZE": 7, "LEARNING_RATE": 1e-3, "EPOCHS": 1,
}  # fmt: skip
SPOTS, GENES = 11, 5


def torchrun(ranks, script, *options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    return [*map(str, command), SCRIPTS[script], *map(str, options)]


def test_rows_of_two_ranks_equal_one_process(simulated, tmp_path):
    options = ("--data-root", simulated, *SMALL, "--seeds", "42,43")
    finish([sys.executable, SCRIPTS["23"], *map(str, options), "--out", tmp_path / "one"])
    stdout = finish(torchrun(2, "23", *options, "--out", tmp_path / "two"))
    assert results(tmp_path / "two") == results(tmp_path / "one")
    assert stdout.count('{"script"') == 1, "the first rank prints, and no other"


def test_one_network_is_trained_by_two_ranks_and_goes_on_after_one_died(simulated, tmp_path):
    command = torchrun(2, "20", "--data-root", simulated, "--out", tmp_path, *SMALL, "--epochs", 3)
    process = start(command)
    while process.poll() is None and not list(tmp_path.glob("*/checkpoint.pt")):
        time.sleep(0.01)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "20_train"], capture_output=True, text=True)
    os.kill(int(ranks.stdout.split()[-1]), signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0
    assert any(line.endswith("run the same command again") for line in stderr.splitlines()), stderr[-3000:]
    stdout = finish(command)
    assert "going on after epoch" in stdout and stdout.count('{"script"') == 1
    (folder,) = tmp_path.glob("EfficientNet-B0-*")
    whole = finish([*command[:-1], "3", "--out", str(tmp_path / "whole")])
    assert "going on" not in whole
    (other,) = (tmp_path / "whole").glob("EfficientNet-B0-*")
    assert results(folder) == results(other), "the same bits as without the death"


def in_ranks(work, ranks, *arguments):
    """work(rank, *arguments) in as many processes that joined each other."""
    torch.multiprocessing.spawn(_joined, (ranks, work, *arguments), ranks)


def _joined(rank, ranks, work, *arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{arguments[0]}/meet", rank=rank, world_size=ranks)
    work(rank, *arguments)
    dist.destroy_process_group()


def little():
    """(model with BatchNorm frozen and no dropout, patches, target)."""
    random = np.random.default_rng(0)
    patches = random.integers(0, 256, (SPOTS, 224, 224, 3), dtype=np.uint8)
    model = common.build_model(RECIPE, GENES, 1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.training, module.train = False, lambda mode=True: None
    target = torch.from_numpy(random.normal(size=(SPOTS, GENES)).astype(np.float32))
    return model, common.MappedPatches(torch.from_numpy(patches), 32), target


def save_gradient(rank, folder):
    model, patches, target = little()
    network = torch.nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model
    optimiser, scaler = torch.optim.SGD(model.parameters(), 0.0), torch.amp.GradScaler("cpu", enabled=False)
    rows = torch.arange(7)  # one batch, of which the two ranks take 4 and 3
    loss = common.train_epoch(network, optimiser, scaler, patches, target, rows, RECIPE, 42, 0, torch.float32)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.save((loss, gradient), f"{folder}/gradient{rank}.pt")


def test_the_gradient_of_one_batch_from_two_ranks_is_that_of_one_process(tmp_path):
    in_ranks(save_gradient, 2, tmp_path)
    save_gradient("alone", tmp_path)
    loss, alone = torch.load(tmp_path / "gradientalone.pt")
    assert alone.abs().max() > 1e-3
    for rank in (0, 1):
        its_loss, gradient = torch.load(tmp_path / f"gradient{rank}.pt")
        assert its_loss == pytest.approx(loss, abs=1e-5)
        torch.testing.assert_close(gradient, alone, rtol=0, atol=1e-5)


class MeanColour(torch.nn.Linear):
    """(B, 3, S, S) -> (B, 3): what it gives is known of every spot."""

    def forward(self, pixels):
        return pixels.float().mean((2, 3)) + 0 * self.bias


def save_prediction(rank, folder):
    patches = torch.arange(SPOTS, dtype=torch.uint8).view(-1, 1, 1, 1).expand(SPOTS, 224, 224, 3)
    model, patches = MeanColour(3, 3), common.MappedPatches(patches, 32)
    rows = np.array([8, 3, 0, 10, 1, 5, 2])  # 3, 2 and 2 of them
    np.save(f"{folder}/prediction{rank}.npy", common.predict(model, patches, rows, dtype=torch.float32))
    assert common.predict(model, patches, rows[:2], dtype=torch.float32)[:, 0].tolist() == [8, 3]  # the third has none


def test_a_prediction_gathered_from_three_ranks_is_that_of_one(tmp_path):
    in_ranks(save_prediction, 3, tmp_path)
    for rank in range(3):
        assert np.load(tmp_path / f"prediction{rank}.npy").tolist() == [[n] * 3 for n in (8, 3, 0, 10, 1, 5, 2)]


@pytest.mark.parametrize("stages, backbone", [(1, "efficientnet_b0"), (0, "resnet18"), (0, "densenet121")])
def test_frozen_stages_stay_frozen_when_batch_norm_is_joined(monkeypatch, stages, backbone):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    model = common.build_model(RECIPE | {"BACKBONE": backbone, "TRAINABLE_STAGES": stages}, GENES, 1).train()
    joined = [m for m in model.backbone.modules() if isinstance(m, torch.nn.SyncBatchNorm)]
    frozen = [m for part in model.frozen for m in part.modules() if isinstance(m, torch.nn.SyncBatchNorm)]
    assert joined and {id(m) for m in frozen} <= {id(m) for m in joined}
    assert not any(m.training for m in frozen) and sum(m.training for m in joined) == len(joined) - len(frozen)
    assert frozen or stages
