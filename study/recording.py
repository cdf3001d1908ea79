"""Scores on disk: what a setting scored on a split, and differences of two settings."""

import hashlib
import itertools
import json
import re

import anndata
import h5py
import numpy as np
import pandas as pd
from tqdm import tqdm

import common
from common import GROUPS, SCORED
from study import conformal, files, intervals, recipes, scales, splitting

SET_SCORES = "set_scores.json"  # in a row's folder: what gene_sets adds to the lines of rows.json
SET_PREFIX = "set_"  # of a gene set's columns there


# ------------------------------------------------------------------------------------------- rows
def name_folder(setting, made_with):
    """<setting>-<hash of what it was made with>, in letters that every file system takes."""
    content = json.dumps([setting, made_with], sort_keys=True)
    key = hashlib.sha256(content.encode()).hexdigest()[:10]
    name = re.sub(r"[^A-Za-z0-9.=-]+", "_", setting).strip("_")
    return f"{name}-{key}"


def read_rows(out, fingerprint, sets):
    """{folder's name: its lines of rows.csv} of the rows in `out` that this version has made on
    the dataset of this fingerprint, with the scores that lie beside them: of gene sets only where
    they are these `sets` (see gene_sets.name_members), since other files may call other genes the
    same.
    """
    lines, n_others = {}, 0
    for path in sorted(out.glob("[!.]*/rows.json")):
        made_with = json.loads(path.with_name("recipe.json").read_text())
        if made_with.get("data") != fingerprint:
            n_others += 1
            continue
        if made_with.get("results") != common.RESULTS:
            continue
        found = json.loads(path.read_text())
        if {line["folder"] for line in found} != {path.parent.name}:
            tqdm.write(f"{path.parent} has been copied or renamed: rows.csv leaves it out")
            continue
        scores = path.with_name(SET_SCORES)
        if scores.is_file():
            kept = json.loads(scores.read_text())
            of_sets = kept["lines"]
            if kept.get("members") != sets:
                of_sets = [leave_out_sets(line) for line in of_sets]
            found = [line | scored for line, scored in zip(found, of_sets, strict=True)]
        lines[path.parent.name] = found
    if n_others:
        tqdm.write(
            f"{out}: rows.csv leaves out {n_others} of another data root, or of what 19 made before"
        )
    return lines


def leave_out_sets(line):
    """A line {column: value} without the columns of gene sets."""
    return {name: value for name, value in line.items() if not name.startswith(SET_PREFIX)}


def save_setting(folder, setting, recipe, split, predicted, more, made_with):
    """Score a setting's prediction and write its folder."""
    data = split.data
    scored = split.scored()
    lines, per_gene, influence = score_split(setting, recipe, split, predicted, more)
    roles = pd.DataFrame({"id": data.spots["id"], "role": split.roles, "fold": split.fold})
    obs = data.spots.iloc[scored].set_index("id").assign(role=split.roles[scored])
    table = anndata.AnnData(predicted, obs, per_gene.set_index("gene"))
    table.layers["lognorm"] = lognorm = data.lognorm[scored]
    table.layers["target"] = lognorm if data.target is data.lognorm else data.target[scored]
    table.obsm["spatial"] = table.obs[["pxl_col", "pxl_row"]].to_numpy(np.float64)
    files.save_csv(folder / "per_gene.csv", per_gene)
    files.save_csv(folder / "split.csv", roles[split.roles != ""])
    files.save_csv(folder / "genes.csv", split.groups)
    files.save_csv(folder / "influence.csv", influence)
    with files.whole_file(folder / "predictions.h5ad") as path:
        table.write_h5ad(path)
    files.save_json(folder / "recipe.json", made_with)
    files.save_json(folder / "rows.json", lines)


def read_prediction(folder):
    """Table (n, G) of float32, by id and gene: the prediction alone of a setting's folder."""
    path = folder / "predictions.h5ad"
    table = common.read_annotations(path)
    with h5py.File(path) as file:
        return pd.DataFrame(file["X"][:], table.obs_names, table.var_names)


def score_split(setting, recipe, split, predicted, more):
    """([a line a role and truth], per-gene table, influence of the test spots) of a prediction."""
    data = split.data
    scored = split.scored()
    truths = {recipe["TARGET"]: data.target, "lognorm": data.lognorm}
    roles = [role for role in SCORED if role in split.roles]
    usual_spots = split.spots("train")
    usual = {
        truth: common.mean_and_variance(values, usual_spots)[0] for truth, values in truths.items()
    }
    lines, influence = [], locate_spots(data.spots.iloc[split.spots("test")])
    per_gene = pd.DataFrame(index=pd.Index(data.genes, name="gene"))
    for role, (truth, values) in itertools.product(roles, truths.items()):
        at = split.roles[scored] == role
        x, y, spots = predicted[at], values[scored[at]], data.spots.iloc[scored[at]]
        genes = tabulate_genes(data, x, y, spots, name_ceilings(recipe, split, role, truth))
        if role == "test" and truth == recipes.headline_of(recipe["PROTOCOL"]).truth:
            p = intervals.compare_with_chance(x, y, *part_places(influence))
            genes = genes.assign(p=p, q=intervals.control_discoveries(p))
        if role == "test":
            half_widths = conformal.find_half_widths(split, predicted, values)
            floor = -np.inf if truth == "harmony" else 0.0
            genes = genes.assign(**conformal.measure_coverage(x, y, half_widths, floor))
        per_gene = per_gene.join(genes.add_prefix(f"{role}_{truth}_"))
        line = {"setting": setting, "split": role}
        line["slide"] = ",".join(map(str, np.unique(spots["tissue_index"])))
        line |= {"fold": split.fold, "seed": split.seed}
        line |= {"target": recipe["TARGET"], "truth": truth, "protocol": recipe["PROTOCOL"]}
        line["recipe"] = recipe.get("RECIPE")
        line["refit"] = bool(splitting.is_refitted(recipe, split))
        line["neighbourhood"] = bool(recipe.get("NEIGHBOURHOOD"))
        line |= {"gene_lists": split.groups.attrs["source"], "n_spots": len(x), **more}
        line |= summarise_genes(genes, split.members)
        line["spot_r"] = common.correlate_spots(x, y, usual[truth])
        line |= scales.describe_scales(x, y, spots, data.genes, split.members)
        if role == "test":
            scored_values = x, y, spots, data.genes, split.members
            moved = intervals.find_influence(*scored_values)
            if recipe["PROTOCOL"] == "hest":
                over_slides = intervals.find_influence(*scored_values, pooled=True)
                moved = moved.join(over_slides.add_suffix("_pooled"))
            line |= describe_intervals(line, moved, influence)
            influence = influence.join(moved.add_prefix(f"{truth}_"))
        lines.append({name: files.none_for_nan(value) for name, value in line.items()})
    return lines, per_gene.reset_index(), influence


PLACE = ["tissue_index", "column", "row"]  # of influence.csv: where a spot lies, in pitches


def locate_spots(spots):
    """Table (n, 3) of PLACE."""
    places = common.places_in_pitches(spots).set_axis(PLACE[1:], axis=1)
    places.insert(0, PLACE[0], spots[PLACE[0]])
    return places.reset_index(drop=True)


def part_places(places):
    """(tissue_index (n,), places (n, 2) in pitches) of a table with the columns PLACE."""
    return places[PLACE[0]].to_numpy(), places[PLACE[1:]].to_numpy(np.float64)


def describe_intervals(line, influence, places):
    """{<group>_ci: [low, high], interval_df} of a line, by its influence (n, k) at `places`."""
    errors, freedoms = measure_errors(influence, places)
    found = {}
    for key, error, freedom in zip(influence, errors, freedoms, strict=True):
        value = np.nan if line[key] is None else line[key]
        found[f"{key}_ci"] = intervals.find_interval(value, error, freedom)
    return found | {"interval_df": freedoms[0]}


def measure_errors(influence, places):
    """intervals.measure_error of a table of influence at a table with the columns PLACE."""
    return intervals.measure_error(influence.to_numpy(), *part_places(places))


R_THRESHOLD = 0.30  # the paper counts the genes above it
Q_THRESHOLD = 0.05  # genes below it are told from chance
# What script 19 tells of a gene on a slide; image_ceiling on simulated slides alone.
GENE_COLUMNS = ("ceiling", "image_ceiling", "moran")


def name_ceilings(recipe, split, role, truth):
    """The endings of the var columns that tell GENE_COLUMNS of these spots: for log-normalised
    counts one a slide, for a test fold of HEST-Benchmark the fold's.
    """
    if truth == "lognorm":
        return [str(slide) for slide in split.slides(role)]
    if recipe["PROTOCOL"] == "hest" and role == "test":
        return [f"fold_{split.fold}"]
    return []


def tabulate_genes(data, predicted, truth, spots, ceilings):
    """A line a gene: scores, mean expression and GENE_COLUMNS, by var's endings `ceilings`."""
    slides = spots["tissue_index"].to_numpy()
    genes = pd.DataFrame(common.score_genes(predicted, truth, slides), data.genes)
    genes["mean"] = truth.mean(0)
    for name in GENE_COLUMNS:
        columns = [f"{name}_{ending}" for ending in ceilings]
        genes[name] = data.annotations.var.reindex(columns=columns).mean(axis=1)
    return genes


def summarise_genes(genes, members):
    """A line's means over the genes that have an r, by group; <group>_n is how many have one, and
    <group>_lacks stands for which have none.
    """
    line = {
        "n_genes_r30": int((genes["r"] >= R_THRESHOLD).sum()),
        "n_genes_q05": int((genes["q"] < Q_THRESHOLD).sum()) if "q" in genes else None,
        "mse": genes["mse"].mean(),
        "variance_ratio": genes["variance_predicted"].sum() / (genes["variance"].sum() or np.nan),
    }
    defined = genes.dropna(subset="r")
    averaged = [name for name in (*common.METRICS, *GENE_COLUMNS) if name != "r"]
    averaged += genes.columns[genes.columns.str.startswith("coverage_")].tolist()
    for key, group in members.items():
        inside = defined.index.isin(group)
        mean = defined[inside].mean()
        line |= {key: mean["r"], f"{key}_n": int(inside.sum()), f"{key}_ci": None}
        lacking = sorted({*group} - {*defined.index})
        digest = hashlib.sha256(json.dumps(lacking).encode()).hexdigest()
        line[f"{key}_lacks"] = digest[:8] if lacking else "-"
        line[f"{key}_pooled"] = mean["r_pooled"]
        line |= {f"{key}_{name}": mean[name] for name in averaged}
    order = defined[["r", "moran", "mean"]].corr("spearman")["r"]
    line["r_against_moran"] = order["moran"]
    line["r_against_mean"] = order["mean"]
    return line


# -------------------------------------------------------------------------------------- differences
def headline_of_lines(lines):
    """The recipes.Headline of these lines, dicts or a table, all of one protocol."""
    protocols = pd.DataFrame(lines)["protocol"]
    return recipes.headline_of(next(iter(protocols), None))


def select_lines(lines, role="test", truth=None):
    """Table of the lines of this role and truth, by default the headline's, as trainings go."""
    table = pd.DataFrame(lines)
    truth = truth or headline_of_lines(table).truth
    chosen = (table["split"] == role) & (table["truth"] == truth)
    table = table[chosen].copy()
    empty = table.columns[table.isna().all()]
    table[empty] = np.nan  # in place of None
    return table


def join_influence(lines, out):
    """(table (n, 4) heg, hvg, mg, all of the influence of every test spot on a setting's mean over
    its test slides, or over the folds of HEST-Benchmark; their table PLACE).

    Of several trainings on one of them a spot's influence is the mean.
    """
    headline = headline_of_lines(lines)
    keys = [group.lower() for group in (*GROUPS, "all")]
    columns = {f"{headline.truth}_{key}{headline.ending}": key for key in keys}
    return join_columns(lines, out, "influence.csv", columns)


def join_columns(lines, out, name, columns):
    """As join_influence, of the `columns` {column: what to call it} of the file `name`."""
    units = lines.groupby(headline_of_lines(lines).unit)["folder"]
    parts = []
    for _, folders in units:
        for folder in folders:
            table = files.read_csv(out / folder / name, numbers=[*PLACE, *columns])
            moved = table[[*columns]].rename(columns=columns) / len(folders) / len(units)
            parts.append(pd.concat([table[PLACE], moved], axis=1))
    keys = [*columns.values()]
    grouped = pd.concat(parts).groupby(PLACE)[keys]
    # Where one training has none, as of a constant prediction, the mean is not known either.
    joined = grouped.sum().where(grouped.count().eq(grouped.size(), axis=0)).reset_index()
    return joined[keys], joined[PLACE]


def find_headline_interval(lines, out):
    """[low, high] of the headline's r of a setting on its test slides; NaN of other spots."""
    if (lines["split"] != "test").any():
        return [np.nan, np.nan]
    headline = headline_of_lines(lines)
    influence, places = join_influence(lines, out)
    (error,), (freedom,) = measure_errors(influence[[headline.group.lower()]], places)
    value = lines.groupby(headline.unit)[headline.column].mean().mean()
    return intervals.find_interval(value, error, freedom) or [np.nan, np.nan]


def share_genes(ones, others, group):
    """Whether r of a gene group is defined for the same genes in two settings' trainings."""
    lacking = [
        lines.set_index(["seed", "fold"])[f"{group.lower()}_lacks"].sort_index()
        for lines in (ones, others)
    ]
    return lacking[0].equals(lacking[1])


def pair_differences(lines, out, minus):
    """r of a setting minus r of another, {setting: another}, of the same trainings, on test slides
    against the headline's truth: table setting, minus, group, n, difference, low, high (95 %).

    NaN where r is not defined for the same genes.
    """
    table = select_lines(lines).sort_values(["seed", "fold"])
    ending = headline_of_lines(lines).ending
    differences = []
    for setting, other in minus.items():
        ones = table[table["setting"] == setting].reset_index()
        others = table[table["setting"] == other].reset_index()
        influence, places = join_influence(ones, out)
        errors, freedoms = measure_errors(influence - join_influence(others, out)[0], places)
        for place, group in enumerate((*GROUPS, "all")):
            key = group.lower()
            pair = {"setting": setting, "minus": other, "group": group, "n": len(ones)}
            pair |= {"difference": np.nan, "low": np.nan, "high": np.nan}
            if share_genes(ones, others, group) and ones[f"{key}_n"].all():
                difference = (ones[f"{key}{ending}"] - others[f"{key}{ending}"]).mean()
                interval = intervals.find_interval(difference, errors[place], freedoms[place])
                pair["difference"] = difference
                pair["low"], pair["high"] = interval or (np.nan, np.nan)
            differences.append(pair)
    columns = ["setting", "minus", "group", "n", "difference", "low", "high"]
    return pd.DataFrame(differences, columns=columns)
