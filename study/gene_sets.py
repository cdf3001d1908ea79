"""Gene sets: named lists of genes, and how well a row's prediction holds of each.

A set changes no training, so it is no part of what a row is made with: what stands here is scored
from the predictions.h5ad of a row, whether it was computed now or long ago.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import pandas as pd

import common
from common import GROUPS
from slides import inputs
from slides.counts import VERSION
from study import files, intervals, printing, recipes, recording
from study.errors import InputError

LEAST = 5  # genes of a set in the panel, of which fewer say little
NAMED = 20  # sets left out that the header names; more are in TABLE
TABLE = "sets_in_panel.csv"  # in OUT: how many genes each set lists, and has in the panel
PRINTED = 40  # lines of the table on the screen; the report has all
PREFIX = recording.SET_PREFIX  # of a set's columns in rows.csv, which end so:
ENDINGS = ("_n", "_ci", "_ceiling", "_score", "_score_ci")
EXPECTED = "expected a .gmt (name, description, genes, separated by tabs) or a CSV group,gene"
SYMBOL = r"[A-Z][A-Za-z0-9.-]{1,14}"  # what a symbol looks like, and a description does not


# -------------------------------------------------------------------------------------------- files
def read_sets(path):
    """{set: [its genes]} of a .gmt, as MSigDB has it, or of a CSV with the columns group, gene, by
    its content; plain or gzipped. InputError that names the line for anything else.
    """
    text = inputs.read_text(path)
    head = re.split(r"[,;\t]", text.partition("\n")[0])
    if {"group", "gene"} <= {cell.strip(' "\r') for cell in head}:
        table = inputs.parse_gene_sets(text, path)
        sets = {name: part.tolist() for name, part in table.groupby("group", sort=False)["gene"]}
    else:
        sets = parse_gmt(text, path)
    if not sets:
        raise InputError(f"{path}: holds no gene set; {EXPECTED}")
    for name in sets:
        check_name(name, path)
    return {name: list(dict.fromkeys(genes)) for name, genes in sets.items()}


def parse_gmt(text, path):
    """{set: [genes]} of a .gmt's text. InputError for a line without a tab or without genes, and
    for two lines of one name, since one of them may be meant to have another.
    """
    sets, line_of, described = {}, {}, []
    for number, line in enumerate(re.split(r"\r\n|\r|\n", text), 1):
        if not line.strip():
            continue
        name, *cells = [cell.strip(' "') for cell in line.split("\t")]
        where = f"{path}, line {number}"
        if not cells:
            raise InputError(f"{where}: no tab in {printing.cut(line, 40)!r}; {EXPECTED}")
        genes = [gene for gene in cells[1:] if gene]
        if not name or not genes:
            raise InputError(f"{where}: a set without {'genes' if name else 'a name'}; {EXPECTED}")
        if name in sets:
            raise InputError(f"{where}: {name} is the set of line {line_of[name]}, too: rename one")
        sets[name], line_of[name] = genes, number
        described.append(cells[0])
    # A description is a link, a sentence or nothing; symbols there are the first genes of sets.
    if len({*described}) > 1 and all(re.fullmatch(SYMBOL, cell) for cell in described):
        inputs.warn(
            f"{path}: the second cells, as {described[0]}, are taken for descriptions: if they are "
            "genes, put a cell before them"
        )
    return sets


def check_name(name, path):
    """InputError for a set whose columns in rows.csv another set or group could have."""
    if name.endswith(ENDINGS):
        raise InputError(f"{path}: rename the set {name}: rows.csv has columns that end so")


def read_all_sets(path, root):
    """{set: [its genes]} of the file at `path`, if it names one, and of the groups that the data
    root's gene_sets.csv holds beside HEG, HVG and MG.
    """
    root_file = root / "gene_sets.csv"
    sets = read_sets(root_file) if root_file.is_file() else {}
    sets = {name: genes for name, genes in sets.items() if name not in GROUPS}
    for name, genes in read_sets(Path(path)).items() if path else ():
        if name in GROUPS:
            raise InputError(
                f"{path}: rename the set {name}: {', '.join(GROUPS)} are scored anyway"
            )
        if name in sets:
            raise InputError(f"{path}: {name} is a group of {root_file}, too: rename one")
        sets[name] = genes
    return sets


# ----------------------------------------------------------------------------------------- matching
@dataclass(frozen=True)
class GeneSets:
    """The sets of a run, by the names that genes have in its data."""

    members: dict = field(default_factory=dict)  # {set: [its genes in the panels]} of those scored
    left_out: dict = field(default_factory=dict)  # {set: how many of its genes the least panel has}
    listed: dict = field(default_factory=dict)  # {set: how many genes its file lists}
    other_case: dict = field(default_factory=dict)  # {gene of a file: what the data call it}

    def describe(self):
        """One line for the header; nothing where there are no sets."""
        if not self.listed:
            return ""
        sizes = [len(genes) for genes in self.members.values()]
        text = f"{len(sizes)} of {len(self.listed)}"
        if sizes:
            span = f"{min(sizes)} to {max(sizes)}" if min(sizes) < max(sizes) else f"{sizes[0]}"
            text += f", of {span} genes in the panel"
        if self.left_out:
            names = [f"{name} ({count})" for name, count in self.left_out.items()]
            text += f"; left out, fewer than {LEAST} genes there: {', '.join(names[:NAMED])}"
            if len(names) > NAMED:
                text += f" and {len(names) - NAMED} others, see {TABLE}"
        if self.other_case:
            gene, name = next(iter(self.other_case.items()))
            count = len(self.other_case)
            text += f"; not taken, since their case differs: {count} genes, as {gene} for {name}"
        return text

    def table(self):
        """Table set, listed, in_panel, scored: a line a set."""
        lines = []
        for name, count in self.listed.items():
            scored = name in self.members
            in_panel = len(self.members[name]) if scored else self.left_out[name]
            lines.append({"set": name, "listed": count, "in_panel": in_panel, "scored": scored})
        return pd.DataFrame(lines)


def match_sets(sets, var, panels):
    """GeneSets of {set: [its genes]}, by the names or the Ensembl ids (gene_ids) of the table
    `var` of genes. `panels` are lists of its names, one a training: a set is scored if each holds
    LEAST of its genes.
    """
    panels = [{*panel} for panel in panels]
    name_of = {strip_version(str(gene_id)): name for name, gene_id in var["gene_ids"].items()}
    name_of |= {name: name for name in var.index}
    by_case = {name.upper(): name for name in var.index}
    members, left_out, other_case = {}, {}, {}
    for set_name, listed in sets.items():
        genes = [name_of.get(strip_version(gene)) for gene in listed]
        for gene, name in zip(listed, genes, strict=True):
            if name is None and gene.upper() in by_case:
                other_case[gene] = by_case[gene.upper()]
        fewest = min(len(panel.intersection(genes)) for panel in panels)
        if fewest < LEAST:
            left_out[set_name] = fewest
        else:
            in_a_panel = set.union(*panels)
            members[set_name] = [name for name in dict.fromkeys(genes) if name in in_a_panel]
    return GeneSets(members, left_out, {name: len(sets[name]) for name in sets}, other_case)


def strip_version(gene):
    """A gene's name, an Ensembl id without its version."""
    found = re.fullmatch(VERSION, gene)
    return found[1] if found else gene


# ------------------------------------------------------------------------------------------- scores
def find_scores(predicted, truth, slides, members):
    """(scores of the prediction, of the truth), (n, S) float64 each: a set's score of a spot is the
    mean over its genes of (n, G) expression that is standardised over the spots of a slide (n,),
    predicted expression by its own mean and sd.

    `members` (G, S) says which genes are in a set. A gene without an r on a slide, since it is
    constant or NaN there, is in neither score; a set without any other has NaN. The score of a
    prediction alone is that of it and itself as the truth.
    """
    scores = np.full((2, len(slides), members.shape[1]), np.nan)
    for slide in np.unique(slides):
        spots = np.flatnonzero(slides == slide)
        x, y = predicted[spots], truth[spots]
        defined = np.isfinite(common.pearson_per_gene(x, y))
        scored = np.flatnonzero(members[defined].any(axis=0))
        share = members[np.ix_(defined, scored)].astype(np.float64)
        share /= share.sum(0)
        for which, values in enumerate((x, y)):
            standardised = intervals.standardise(values[:, defined])
            scores[which][np.ix_(spots, scored)] = standardised @ share
    return tuple(scores)


def score_row(folder, lines, members):
    """([{column: value} for each of a row's `lines`], influence of its test spots on the headline's
    truth) by the predictions.h5ad in its folder.

    `members` {key: [genes]} are sets and groups. Columns are <key>_score and <key>_score_ci, and of
    a set <key> (mean r of its genes), <key>_n (genes that have one), <key>_ci and <key>_ceiling.
    """
    table = common.read_annotations(folder / "predictions.h5ad")
    inside = pd.DataFrame({key: table.var_names.isin(genes) for key, genes in members.items()})
    genes = np.flatnonzero(inside.any(axis=1))
    table, inside = table[:, genes], inside.iloc[genes].reset_index(drop=True)
    expression = read_expression(folder, genes)
    found, influence = [], None
    for line in lines:
        truth = expression["lognorm" if line["truth"] == "lognorm" else "target"]
        spots = (table.obs["role"] == line["split"]).to_numpy()
        scored = table[spots]
        scores, moved = score_line(
            line, scored, expression["prediction"][spots], truth[spots], inside
        )
        found.append({name: files.none_for_nan(value) for name, value in scores.items()})
        headline = recipes.headline_of(line["protocol"])
        if line["split"] == "test" and line["truth"] == headline.truth:
            influence = recording.locate_spots(scored.obs).join(moved)
    return found, influence


def read_expression(folder, genes):
    """{"prediction", "lognorm", "target": (n, G) float32} of scored spots and these genes."""
    found = {}
    with h5py.File(folder / "predictions.h5ad") as file:
        for name, values in {"prediction": file["X"], **file["layers"]}.items():
            parts = common.parts_of(len(values), common.SPOTS_AT_ONCE)
            found[name] = np.concatenate([values[part][:, genes] for part in parts])
    return found


def score_line(line, table, predicted, truth, inside):
    """({column: value}, influence of the spots on them) of one line of a row: AnnData of its spots
    and genes, expression (n, G) and the table (G, S) of bool of which genes are in a set.
    """
    pooled = recipes.headline_of(line["protocol"]).ending == "_pooled"
    slides = table.obs["tissue_index"].to_numpy()
    units = np.zeros_like(slides) if pooled else slides
    prefix = f"{line['split']}_{line['truth']}_"
    r = table.var[f"{prefix}r_pooled" if pooled else f"{prefix}r"].to_numpy()
    ceiling = table.var[f"{prefix}ceiling"].to_numpy()
    scores = find_scores(predicted, truth, units, inside.to_numpy())
    r_of_score = common.average_slides(common.pearson_per_gene, *scores, units)
    values = {}
    for key, score in zip(inside, r_of_score, strict=True):
        defined = inside[key].to_numpy() & np.isfinite(r)
        if key.startswith(PREFIX):
            mean = r[defined].mean() if defined.any() else np.nan
            values |= {key: mean, f"{key}_n": int(defined.sum()), f"{key}_ci": None}
            values[f"{key}_ceiling"] = pd.Series(ceiling[defined]).mean()
        values |= {f"{key}_score": score, f"{key}_score_ci": None}
    if line["split"] != "test":
        return values, None
    members = {key: table.var_names[inside[key]] for key in inside if key.startswith(PREFIX)}
    alone = {key: [key] for key in inside}
    moved = intervals.find_influence(*scores, table.obs, list(inside), alone, pooled)
    parts = [moved.add_suffix("_score")]
    if members:
        genes = table.var_names
        parts.append(intervals.find_influence(predicted, truth, table.obs, genes, members, pooled))
    moved = pd.concat(parts, axis=1)
    limits = recording.describe_intervals(values, moved, recording.locate_spots(table.obs))
    del limits["interval_df"]  # The row has it.
    return values | limits, moved


# --------------------------------------------------------------------------------------------- rows
INFLUENCE = "set_influence.csv"  # in a row's folder: as influence.csv, on the headline's truth


def name_members(members):
    """A hash of {key: [genes]}, by which scores of other genes are told."""
    return hashlib.sha256(json.dumps(members).encode()).hexdigest()


def add_scores(row, sets):
    """The lines of a filled row with the columns of score_row for the sets {name: [genes]}, and for
    HEG, HVG and MG; from its folder where they are, else scored and kept there.
    """
    members = {key: genes for key, genes in row.split.members.items() if key != "all"}
    members |= {PREFIX + name: genes for name, genes in sets.items()}
    names = {"sets": name_members(members), "members": name_members(sets)}
    path = row.folder / recording.SET_SCORES
    if not path.is_file() or not names.items() <= json.loads(path.read_text()).items():
        path.unlink(missing_ok=True)  # Else a kill could leave it beside INFLUENCE of other sets.
        lines, influence = score_row(row.folder, row.lines, members)
        if influence is not None:
            files.save_csv(row.folder / INFLUENCE, influence)
        files.save_json(path, names | {"lines": lines})
    lines = json.loads(path.read_text())["lines"]
    return [line | scores for line, scores in zip(row.lines, lines, strict=True)]


# -------------------------------------------------------------------------------------------- table
def describe_sets(lines, names, out):
    """[{column: text}], a line a setting and set, of these lines of one role and truth: for each
    of the sets `names` and for HEG, HVG and MG mean r of the genes, its interval and its share of
    the ceiling, and r of the score.
    """
    table = []
    for setting, group in lines.groupby("setting", sort=False):
        limits = find_mean_intervals(group, names, out)
        for name in (*GROUPS, *names):
            key = PREFIX + name if name in names else name.lower()
            column = key + ("" if name in names else recording.headline_of_lines(group).ending)
            if not group[f"{key}_n"].any():
                continue
            table.append(
                {
                    "setting": setting,
                    "set": name,
                    "genes": f"{group[f'{key}_n'].min():.0f}",
                    "mean r": printing.format_mean(mean_of_units(group, column)),
                    "[95 %]": limits.get(key, "-"),
                    "of ceiling": printing.format_share(
                        group[column].mean(), group[f"{key}_ceiling"].mean()
                    ),
                    "score r": printing.format_mean(mean_of_units(group, f"{key}_score")),
                    "its [95 %]": limits.get(f"{key}_score", "-"),
                }
            )
    return table


def mean_of_units(lines, column):
    """A column's mean of each slide, or of each training where there is one slide."""
    headline = recording.headline_of_lines(lines)
    units = headline.unit if lines[headline.unit].nunique() > 1 else ["seed", "fold"]
    return lines.astype({column: float}).groupby(units)[column].mean()


def find_mean_intervals(lines, names, out):
    """{key of a set or group, or <key>_score: text of the interval of its mean over slides} of a
    setting's lines; {} of spots that are not tested on, or against another truth.
    """
    headline = recording.headline_of_lines(lines)
    if (lines["split"] != "test").any() or (lines["truth"] != headline.truth).any():
        return {}
    groups = [group.lower() for group in GROUPS]
    sets = [PREFIX + name for name in names]
    columns = [*sets, *(f"{key}_score" for key in [*groups, *sets])]
    influence, places = recording.join_columns(
        lines, out, INFLUENCE, dict(zip(columns, columns, strict=True))
    )
    of_groups, same_places = recording.join_influence(lines, out)
    assert places.equals(same_places)
    influence = influence.join(of_groups[groups])
    errors, freedoms = recording.measure_errors(influence, places)
    texts = {}
    for key, error, freedom in zip(influence, errors, freedoms, strict=True):
        column = f"{key}{headline.ending}" if key in groups else key
        value = lines.groupby(headline.unit)[column].mean().mean()
        interval = intervals.find_interval(value, error, freedom)
        texts[key] = printing.format_interval(*interval or (np.nan, np.nan))
    return texts


def print_sets(title, lines):
    """Print the table of describe_sets: of many lines those of the first setting alone."""
    if not lines:
        return
    table = pd.DataFrame(lines)
    settings = table["setting"].unique()
    if len(table) > PRINTED and len(settings) > 1:
        table = table[table["setting"] == settings[0]].copy()
        title += f"; the other {len(settings) - 1} settings in report.html and rows.csv"
    texts = []
    for name in ("setting", "set"):
        texts.append(printing.justify_left(printing.shorten(table.pop(name), 25)))
    printing.print_table(title, pd.concat([*texts, table], axis=1), keys=2)
