"""One start of a script: constants, splits, the folder of its results, header and report."""

import functools
import io
import itertools
import json
import os
import platform
import re
import textwrap
import time
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

import common
from slides.manifest import check_sources
from study import (
    backbones,
    constants,
    files,
    gene_sets,
    printing,
    recipes,
    recording,
    shell,
    splitting,
)
from study.errors import InputError
from study.ranks import RANK, RANKS
from study.rows import Row

# What a constant that names something in common.py may be, beside recipes.ALLOWED.
NAMED_IN_COMMON = {"AUG": tuple(common.AUGMENTATIONS), "LOSS": tuple(common.LOSSES)}
# What the ruled block of a script must hold, also of a copy, in which settings may hold the rest.
NEEDED = ("DATA_ROOT", "OUT", "TARGET", "PROTOCOL", "TRAIN_SLIDES", "TEST_SLIDE", "SEEDS")
NEEDED += ("GENE_SETS", "DEVICE", "QUICK")


def make_simulated_slides(root, target):
    """Call 18 and 19 where the simulated slides or patches are missing; other ranks wait."""
    made = root / "dataset" / "meta.json"
    while RANK and not made.exists():
        time.sleep(0.2)
    if not (root / "slides.csv").exists():
        shell.call_script("18_simulate_slides.py", "--data-root", str(root))
    if not made.exists():
        shell.call_script(
            "19_make_patches_and_csv.py", "--data-root", str(root), "--target", target
        )


# ------------------------------------------------------------------------------------------- report
def describe_machine(device):
    """What a number depends on, {name: value}."""
    models = [platform.processor(), platform.machine()]
    if Path("/proc/cpuinfo").exists():
        models = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()) + models
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "processor": models[0],
        "cores": os.cpu_count(),
        "GPU": torch.cuda.get_device_name(device) if device.type == "cuda" else "none used",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "system": platform.system(),
    }


def finish_run(
    script, *, out, data_root, label, folders, tables, figures, recipe, warnings=(), about=""
):
    """Save run.json and have script 27 make the report of it.

    `folders` are those of the run's rows in rows.csv; `tables` {caption: lines}, what there is to
    say `about` them, `figures` (PNG files of the folder) and `warnings` are shown in the report;
    `recipe` names DEVICE.
    """
    if RANK:
        return
    name = Path(script["__file__"]).stem
    page = {
        "script": name,
        "title": f"{label}{name}, {data_root}",
        # From the run's folder, so that it is found from any other.
        "data_root": os.path.relpath(Path(data_root).resolve(), out.resolve()),
        "label": label,
        "folders": folders,
        "tables": tables,
        "about": about,
        "figures": [path.name for path in figures],
        "settings": constants.recipe_of(script),
        "warnings": list(warnings),
        "machine": describe_machine(common.find_device(recipe)),
    }
    files.save_json(out / "run.json", page)
    with redirect_stdout(io.StringIO()):  # What it says is said below.
        shell.call_script("27_write_report.py", "--run", str(out))
    print(f"report: {out / 'report.html'}")


# ---------------------------------------------------------------------------------------------- run
@dataclass(eq=False)
class Run:
    """One start of a script on one data root."""

    script: dict  # the script's globals
    recipe: dict  # its constants as they stand
    splits: list  # one Split a training
    out: Path
    sets: gene_sets.GeneSets = field(default_factory=gene_sets.GeneSets)  # beside the groups
    rows: list = field(default_factory=list)  # that are filled, in the order of table and report
    tables: dict = field(default_factory=dict)  # {caption: lines} of those printed, for the report
    figures: list = field(default_factory=list)  # Paths of those in its folder, for the report

    @property
    def data(self):
        """SpotData of the first training."""
        return self.splits[0].data

    @property
    def name(self):
        """The script's name."""
        return Path(self.script["__file__"]).stem

    def title(self, text):
        """A title that tells of simulated slides, and of a smoke test."""
        note = ""
        if self.recipe["QUICK"] and not self.name.startswith("20"):
            note = "smoke test, not a result: "
        return f"{self.data.label}{note}{text}"

    def chosen(self, settings):
        """The settings {name: ...}, or ONLY one of them. InputError where ONLY names another."""
        only = self.recipe["ONLY"]
        if only not in ("", *settings):
            raise InputError(f"--only {only}: expected one of {'; '.join(settings)}")
        return {name: setting for name, setting in settings.items() if only in ("", name)}

    def print_header(self):
        """What is run on what: data, target, protocol, split, gene groups, machine and weights."""
        print(f"\n{self.data.label}{self.name}")
        lines = describe_run(self.recipe, self.splits)
        if self.sets.listed:
            lines["gene sets"] = self.sets.describe()
            files.save_csv(self.out / gene_sets.TABLE, self.sets.table())
        whole_words = {"break_long_words": False, "break_on_hyphens": False}  # Paths are copied.
        wrapper = textwrap.TextWrapper(printing.WIDTH, subsequent_indent=" " * 12, **whole_words)
        for name, value in lines.items():
            print(wrapper.fill(f"{name:11} {value}"))

    @property
    def baseline(self):
        """The constants on which a method without network depends; the others stay out of it."""
        names = ("TARGET", "PROTOCOL", "DEVICE", "PRECISION", "REFIT", "NEIGHBOURHOOD")
        shared = {name: self.recipe[name] for name in names}
        # Colour is that of the patches as they are, whatever a network sees.
        return shared | {"PRETRAINED": False, "IMAGE_SIZE": common.PATCH_SIZE}

    def row(self, setting, split, recipe=None, *, stop=None):
        """The Row of a setting on a split, by the constants of the script or of `recipe`."""
        recipe = self.recipe if recipe is None else recipe
        name = recording.name_folder(setting, split.made_with(recipe))
        return Row(setting, recipe, split, self.out / name, stop)

    def fill(self, row, method, **how):
        """Fill a row (see Row.fill), and add it to the run's and to rows.csv; returns it."""
        row.fill(method, **how)
        self.rows.append(row)
        if not RANK:
            row.lines = gene_sets.add_scores(row, self.sets.members)
            self.lines_on_disk[row.folder.name] = row.lines
            lines = [self.lines_on_disk[name] for name in sorted(self.lines_on_disk)]
            table = pd.DataFrame(list(itertools.chain(*lines)))
            files.save_csv(self.out / "rows.csv", table)
        return row

    @functools.cached_property
    def lines_on_disk(self):
        """{folder's name: its lines of rows.csv}: read once, and kept by `fill`."""
        members = gene_sets.name_members(self.sets.members)
        return recording.read_rows(self.out, self.data.fingerprint, members)

    def tested(self):
        """Table of the lines of all rows on test slides, against the headline's truth."""
        return recording.select_lines(lines_of(self.rows))

    def find(self, setting, split):
        """The row of a setting that learnt from this split."""
        wanted = setting, split.seed, split.fold
        rows = [row for row in self.rows if (row.setting, row.split.seed, row.split.fold) == wanted]
        return rows[0]

    def train(self, settings, method, splits=None):
        """The rows of each setting {name: {CONSTANT: value}} and split, which `method` fills;
        `settings` may be a function of the split that gives them.

        Of torchrun's processes each fills every so many-th row, and then waits for the others'.
        """
        splits = self.splits if splits is None else splits
        settings_of = settings if callable(settings) else lambda split: settings
        rows = []
        for setting, split in itertools.product(settings_of(splits[0]), splits):
            recipe = self.recipe | settings_of(split)[setting]
            rows.append(self.row(setting, split, recipe))
        mine_first = sorted(range(len(rows)), key=lambda number: number % RANKS != RANK)
        epochs = sum(row.recipe["EPOCHS"] for row in rows)
        with tqdm(total=epochs, unit="epoch", smoothing=0, mininterval=2, disable=RANK > 0) as bar:
            for number in mine_first:
                row = rows[number]
                row.report = lambda *_: bar.update()
                bar.set_description(f"{number + 1}/{len(rows)} {row.setting}")
                before = bar.n
                self.fill(row, method, rank=number % RANKS)
                # Epochs that were on disk, or are another process's, are no work to wait for.
                bar.total -= row.recipe["EPOCHS"] - (bar.n - before)
        self.rows[len(self.rows) - len(rows) :] = rows  # in the order of a single process
        return rows

    def print_scores(
        self, title, rows=None, *, minus=None, columns=None, leave_out=(), role="test", truth=None
    ):
        """Print a line a setting of these rows, or of all: mean r (±sd over seeds, folds or
        slides), with its interval. Returns the table of paired differences, if any.

        pair_differences with `minus` {setting: another} is saved, and its headline shown.
        `columns` {setting: {name: text}} are shown as well, and others are to `leave_out`.
        """
        lines = lines_of(self.rows if rows is None else rows)
        chosen = recording.select_lines(lines, role, truth)
        sizes = printing.count_genes(self.splits[0].groups)
        headline = recording.headline_of_lines(chosen)
        if headline is recipes.OF_HEST:
            title = f"{title} (HEST r is the number of HEST-Benchmark's tables)"
        table = []
        for setting, group in chosen.groupby("setting", sort=False):
            line = {"setting": setting}
            interval = recording.find_headline_interval(group, self.out)
            line |= printing.describe_scores(group, interval, sizes, len(self.data.genes))
            for name in leave_out:
                line.pop(name, None)
            table.append(line | (columns[setting] if columns else {}))
        table = pd.DataFrame(table)
        shown = [printing.justify_left(printing.shorten(table.pop("setting"), 30)), table]
        differences = None
        if minus:
            differences = recording.pair_differences(lines, self.out, minus)
            files.save_csv(self.out / "paired_differences.csv", differences)
            settings = chosen["setting"].unique()
            shown.append(printing.describe_differences(differences, settings, headline))
        scored = printing.describe_scored(chosen) + printing.describe_freedom(chosen)
        printed = pd.concat(shown, axis=1)
        fewer = printing.explain_fewer(table.to_string())  # which holds no names of settings
        title = self.title(f"{title}: {scored}{fewer} ({self.data.root})")
        printing.print_table(title, printed)
        self.tables[title] = printed.rename(columns=str.strip).to_dict("records")
        if self.sets.members and not RANK:
            scores = gene_sets.describe_sets(chosen, self.sets.members, self.out)
            gene_sets.print_sets(self.title(f"gene sets: {scored} ({self.data.root})"), scores)
            self.tables[f"Gene sets, {scored}"] = scores
        return differences

    def show_figure(self, path):
        """Print the path of a figure in the run's folder, which the report then holds."""
        self.figures.append(path)
        print(f"figure: {path}")

    def finish(self, tables=None):
        """Save run.json, have the report made, with these `tables`, and print where it is."""
        folders = dict.fromkeys(row.folder.name for row in self.rows)
        finish_run(
            self.script,
            out=self.out,
            data_root=self.data.root,
            label=self.data.label,
            folders=list(folders),
            tables=self.tables | (tables or {}),
            figures=self.figures,
            recipe=self.recipe,
            warnings=self.data.meta.get("warnings", []),
        )
        print(f"rows: {self.out / 'rows.csv'}")


def lines_of(rows):
    """The lines of rows.csv of these rows."""
    return list(itertools.chain(*(row.lines for row in rows)))


PROTOCOLS = {
    "paper": "spots of the training slides validate, as published",
    "loso": "every slide once the test slide, of which nothing else is used",
    "block": "folds of spatial blocks, then the test slide, of which nothing else is used",
    "hest": "folds and genes of HEST-Benchmark, which has no validation: random spots of the "
    "training slides are held out for it; the genes were chosen on all slides, so transductive",
}
TARGETS = {
    "harmony": "Harmony over the slides that take part, the test slide included; so is the panel",
    "lognorm": "log1p of counts per 10,000",
    "log1p": "log1p of raw counts, as in HEST-Benchmark",
}


BY_SETTING = "by setting"  # what the header says of a constant that the settings hold


def describe_run(recipe, splits):
    """{name: text} of the header's lines."""
    split = splits[0]
    data = split.data
    slides = data.spots["tissue_index"].nunique()
    n_spots, n_genes = data.annotations.shape
    protocol = PROTOCOLS[recipe["PROTOCOL"]]
    if recipe["PROTOCOL"] == "loso":
        donors = data.spots["donor"]
        is_learnt = donors[split.roles == "test"].isin(donors[split.roles == "train"]).any()
        protocol += (
            "; one donor alone, who is not left out" if is_learnt else "; its donor is left out"
        )
    groups = split.groups.attrs["source"]
    missing = sorted(set(split.groups["gene"]) - set(data.genes))
    if missing:
        groups += f"; not in the panel: {', '.join(missing)}"
    roles = describe_split(split, len(splits))
    if splitting.is_refitted(recipe, split):
        roles += "; test is predicted after refitting on training + validation spots (REFIT)"
    if recipe["NEIGHBOURHOOD"]:
        roles += "; half of what is seen of a spot is the mean of the spots around (NEIGHBOURHOOD)"
    return {
        "data": f"{data.root}: {slides} slides, {n_spots:,} spots x {n_genes:,} genes",
        "target": f"{recipe['TARGET']} ({TARGETS[recipe['TARGET']]})",
        "protocol": f"{recipe['PROTOCOL']} ({protocol})",
        "split": roles,
        "steps": describe_steps(recipe, split),
        "gene groups": groups,
        "device": describe_device(recipe),
        "weights": describe_weights(recipe),
    }


def describe_device(recipe):
    """The header's line of what computes, and in which precision."""
    device = common.find_device(recipe)
    where = f"{torch.get_num_threads()} threads, {shell.describe_waiting()}"
    if device.type == "cuda":
        where = torch.cuda.get_device_name()
    if not {"PRECISION", "IMAGE_SIZE"} <= {*recipe}:
        return f"{device.type} ({where}), precision {BY_SETTING}"
    _, dtype, reason = common.choose_device(recipe)
    return f"{device.type} ({where}), {str(dtype).removeprefix('torch.')} ({reason})"


def describe_steps(recipe, split):
    """How many steps the optimiser takes, by the constants of the script."""
    if not {"EPOCHS", "BATCH_SIZE"} <= {*recipe}:
        return BY_SETTING
    if not recipe["EPOCHS"]:
        return "none: a ridge start is what is kept"
    steps = common.count_steps(len(split.spots("train")), recipe)
    batches = steps // recipe["EPOCHS"]
    return f"{recipe['EPOCHS']} epochs x {batches} batches of {recipe['BATCH_SIZE']} = {steps:,}"


def describe_weights(recipe):
    """The header's line of what networks start from."""
    if "PRETRAINED" not in recipe:
        return BY_SETTING
    if recipe["PRETRAINED"] is True:
        return "pretrained (timm's hub)"
    if recipe["PRETRAINED"] is False:
        return "random: no pretraining"
    if "BACKBONE" not in recipe:
        return f"from {recipe['PRETRAINED']}"
    return f"{backbones.find_pretrained(recipe['PRETRAINED'], recipe['BACKBONE'])}"


def describe_split(split, n_trainings):
    """How many spots of which slides have which role, in the first of the trainings."""
    parts = []
    for role in common.ROLES:
        if role in split.roles:
            slides = ",".join(map(str, split.slides(role)))
            parts.append(f"{role} {len(split.spots(role))} spots of slides {slides}")
    if n_trainings > 1:
        parts.append(f"the first of {n_trainings} trainings")
    return "; ".join(parts)


def choose_out(script, root):
    """OUT, or runs/<script>/<data root's name>. InputError where another one ran there."""
    usual = Path("runs", Path(script["__file__"]).stem, root.resolve().name)
    out = Path(script["OUT"] or usual)
    try:
        other = Path(out, json.loads((out / "run.json").read_text())["data_root"])
    except (OSError, ValueError, LookupError, TypeError):
        return out
    if other.exists() and other.resolve() != root.resolve():
        raise InputError(
            f"{out} holds the results of {other.resolve()}: give another folder with --out"
        )
    return out


def check_target(protocol, target):
    """InputError where a protocol does not go with a target."""
    if protocol == "hest" and target != "log1p":
        raise InputError(
            "--protocol hest needs --target log1p: HEST-Benchmark predicts log1p of raw counts"
        )
    if protocol != "hest" and target == "log1p":
        raise InputError(
            f"--target log1p goes with --protocol hest alone, and not with {protocol}: use "
            "--target lognorm"
        )
    if protocol in ("loso", "block") and target != "lognorm":
        raise InputError(
            f"--protocol {protocol} needs --target lognorm: Harmony has seen the test slide"
        )


def open_run(script, *, validate=True):
    """The Run of a script's constants; `--quick` has its slides made where they are missing.

    Without `validate` all spots of the training slides train: the script draws folds of its own.
    """
    constants.check_constants(script, NAMED_IN_COMMON)
    recipe = constants.recipe_of(script)
    for name in NEEDED:
        if name not in recipe:
            block = f"the ruled block of constants of {Path(script['__file__']).name}"
            raise InputError(f"{name} is not in {block}: every setting needs it, so write it there")
    if not recipe["SEEDS"]:
        raise InputError("--seeds: expected one number at least")
    for name in ("SEEDS", "TRAIN_SLIDES"):
        if len(set(recipe[name])) < len(recipe[name]):
            shown = constants.show_constant(recipe[name])
            raise InputError(f"{constants.flag_of(name)} {shown}: a number is there twice")
    check_target(recipe["PROTOCOL"], recipe["TARGET"])
    root = Path(recipe["DATA_ROOT"])
    if recipe["QUICK"] and recipe["DATA_ROOT"] == script["QUICK_BUDGET"]["DATA_ROOT"]:
        make_simulated_slides(root, recipe["TARGET"])
    listed = gene_sets.read_all_sets(recipe["GENE_SETS"], root)
    data = common.load_dataset(root, recipe["TARGET"])
    check_sources(root, data.meta)
    splits = []
    for seed in recipe["SEEDS"]:
        split = splitting.split_spots if validate else splitting.split_off_test
        for fold, roles in enumerate(split(data.spots, recipe, seed)):
            splits.append(splitting.make_split(data, roles, recipe, seed, fold))
    panels = [split.data.genes for split in splits]
    sets = gene_sets.match_sets(listed, data.annotations.var, panels)
    out = choose_out(script, root)
    files.hold_folder(out)
    if not RANK:  # Those of another start may be of other slides.
        (out / "paired_differences.csv").unlink(missing_ok=True)
    return Run(script, recipe, splits, out, sets)
