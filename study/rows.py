"""A row: one setting on one split, the method that fills it, and its folder on disk."""

import ctypes
import json
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from tqdm import tqdm

import common
from study import files, methods, printing, recording, ridges, splitting, weights
from study.ranks import RANK


@dataclass(eq=False)
class Row:
    """One setting on one split.

    A method, method(row), returns the prediction (n, G) of row.split.scored(): it builds what
    row.recipe says, learns from row.split and leaves in the row what is to be kept of it (`fit`,
    `note`). `fill` has it do so and keeps the result in `folder`.
    """

    setting: str
    recipe: dict  # its constants
    split: splitting.Split
    folder: Path
    stop: int | None = None  # the epoch to stop after; None = validation selects one
    is_refit: bool = False  # the second of a method's two, with REFIT
    report: Callable | None = printing.print_epoch  # sees (history, best epoch) after each epoch
    notes: dict = field(default_factory=dict)  # {column: value} of all its lines in rows.csv
    lines: list = field(default_factory=list)  # of rows.csv: a dict a role and truth
    # Whose weights are saved: a network, or a ridge on others' embeddings.
    model: common.SpotRegressor | ridges.Ridge | None = None
    history: list | None = None  # of its training, a dict an epoch
    refit_history: list | None = None  # of the second training, with REFIT

    @property
    def device(self):
        """The torch.device that it is computed on."""
        return common.find_device(self.recipe)

    @property
    def checkpoint(self):
        """The file from which a killed training goes on."""
        return self.folder / ("checkpoint_refit.pt" if self.is_refit else "checkpoint.pt")

    def note(self, **values):
        """Keep these values in columns of rows.csv."""
        self.notes |= values

    # ------------------------------------------------------------------------------------- networks
    def place_patches(self):
        """The data root's patches in IMAGE_SIZE, on the device if they have room there."""
        return common.place_patches(self.split.data.patches, self.recipe["IMAGE_SIZE"], self.device)

    def fit(self, network, patches, *, model=None, **how):
        """Train a network on these patches by common.fit, which takes `how`; keep its history, and
        its weights: those of `model`, where the network is more than a common.SpotRegressor.
        """
        self.model = network if model is None else model
        self.history = common.fit(
            network,
            patches,
            self.split,
            self.recipe,
            stop=self.stop,
            checkpoint=self.checkpoint,
            report=self.report,
            **how,
        )
        seconds = sum(line["seconds"] for line in self.history)  # also before an interruption
        self.note(seconds=seconds, weights=methods.name_weights(self.recipe))
        steps = common.count_steps(len(self.split.spots("train")), self.recipe, self.stop)
        self.note(steps=steps)  # A refitted network's are those of its second training.
        if not self.is_refit:
            best_epoch = self.stop
            if best_epoch is None:
                best_epoch = common.choose_epoch(self.history, self.recipe)
            rates = [line["images_per_s"] for line in self.history if line["images_per_s"]]
            self.note(
                best_epoch=best_epoch, images_per_s=float(np.median(rates)) if rates else np.nan
            )
        self.count_parameters()

    def count_parameters(self):
        """Note the parameters of the model."""
        parameters = common.count_parameters(self.model)
        self.note(**{f"parameters_{part}": count for part, count in parameters.items()})

    def predict(self, network, patches):
        """(n, G) float32 prediction of the scored spots by a network, over the views of TTA and
        blended by NEIGHBOURHOOD.
        """
        _, dtype, _ = common.choose_device(self.recipe)
        how = {"dtype": dtype, "tta": self.recipe["TTA"]}
        scored = self.split.scored()
        if not self.recipe["NEIGHBOURHOOD"]:
            return common.predict(network, patches, scored, **how)
        spots = self.split.data.spots
        slides = self.split.slides(*common.SCORED)
        seen = np.flatnonzero(spots["tissue_index"].isin(slides))  # all that lie around them
        predicted = common.predict(network, patches, seen, **how)
        blended = common.blend_neighbourhood(predicted, spots.iloc[seen])
        return blended[np.searchsorted(seen, scored)]

    # ----------------------------------------------------------------------------------------- disk
    def fill(self, method, *, rank=0, refit=True):
        """This row with its lines: from disk where they are, else of what `method` predicts, scored
        and saved; rows.json comes last and marks the folder as whole.

        Of torchrun's processes, `rank` computes it, or all do that have joined, and the others
        wait. Without `refit` the method is asked once, since it predicts by what REFIT has been
        applied to.
        """
        done = self.folder / "rows.json"
        if done.is_file():
            tqdm.write(f"{self.setting}: on disk already ({self.folder})")
        elif rank == RANK or dist.is_initialized():
            forget_peak_memory(self.device)
            began = time.perf_counter()
            predicted = self.ask(method, refit)
            standard = {"seconds": time.perf_counter() - began, "folder": self.folder.name}
            self.notes = standard | {"weights": "none"} | self.notes
            if rank == RANK:
                self.save(predicted)
        while not done.is_file():
            time.sleep(0.2)
        if rank == RANK:
            for checkpoint in self.folder.glob("checkpoint*.pt"):
                checkpoint.unlink()
        self.lines = json.loads(done.read_text())
        self.model = None  # Its memory is the next row's.
        return self

    def ask(self, method, refit):
        """The method's prediction of the scored spots. Where REFIT applies, it is asked twice:

        - without the validation spots, which select the epoch and keep this prediction;
        - then anew, from the same start by the same schedule, with all spots of the slides of
          training and validation, up to that epoch. All other spots get this prediction, and these
          weights are saved.
        """
        predicted = method(self)
        if not (refit and splitting.is_refitted(self.recipe, self.split)):
            return predicted
        again = replace(
            self,
            split=self.split.with_all_in_training(),
            stop=self.notes.get("best_epoch"),
            is_refit=True,
            report=None,
            notes={},
            model=None,
            history=None,
        )
        if self.history is not None:
            count = len(again.split.spots("train"))
            tqdm.write(f"refitting on all {count} spots, up to epoch {again.stop}")
        predicted = splitting.keep_validation_of(predicted, method(again), self.split)
        if self.history is not None:
            again.note(seconds=self.notes["seconds"] + again.notes["seconds"])
        self.notes |= again.notes
        self.model, self.refit_history = again.model, again.history
        return predicted

    def save(self, predicted):
        """Score the prediction (n, G) of the scored spots, and write the folder."""
        made_with = self.split.made_with(self.recipe)
        if self.history is not None:
            self.note(peak_memory_mb=peak_memory(self.device) / 2**20)
            files.save_csv(self.folder / "history.csv", pd.DataFrame(self.history))
        if self.model is not None:
            path = self.folder / "weights.safetensors"
            weights.save_weights(path, self.model, self.split, made_with, predicted)
        if self.refit_history is not None:
            table = pd.DataFrame(self.refit_history)
            files.save_csv(self.folder / "history_refit.csv", table)
        recording.save_setting(
            self.folder, self.setting, self.recipe, self.split, predicted, self.notes, made_with
        )


def forget_peak_memory(device):
    """Have peak_memory tell of this row alone, where the system can forget earlier ones."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError, AttributeError, TypeError):  # Linux can, others cannot
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device):
    """Bytes of the greatest memory use: on a GPU, of tensors; else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
