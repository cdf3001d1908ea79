"""Tables as they are printed."""

import functools
import re
import textwrap

import numpy as np
import pandas as pd

from study import recipes, recording

WIDTH = 120  # columns of what is printed, at most


# ----------------------------------------------------------------------------------- printed tables
def print_table(title, table, keys=1):
    """One ruled table under its title; columns beyond WIDTH follow below, with the first `keys`."""
    parts = [format_lines(table[names]) for names in part_columns(table, keys)]
    width = max(len(line) for lines in parts for line in lines)
    print(f"\n{textwrap.fill(title, WIDTH)}")
    for head, *body in parts:
        print("=" * width, head, "-" * width, *body, sep="\n")
    print("=" * width)


def format_lines(table):
    """A table's lines, its head first, cut at WIDTH."""
    return [cut(line.rstrip(), WIDTH) for line in table.to_string(index=False).splitlines()]


def part_columns(table, keys):
    """[names of columns that have room in WIDTH, the first `keys` in each] of a table."""
    first = [*table.columns[:keys]]
    parts = [[*first]]
    for name in table.columns[keys:]:
        wider = table[[*parts[-1], name]].to_string(index=False)
        if len(parts[-1]) > keys and max(map(len, wider.splitlines())) > WIDTH:
            parts.append([*first])
        parts[-1].append(name)
    return parts


def print_epoch(history, best_epoch):
    """One line an epoch, with the mean r of HEG over the validation spots."""
    line = history[-1]
    if len(history) == 1:
        print(
            "epoch   learning rate  train loss   valid MSE   valid HEG r   images/s   seconds"
            "   (* best so far)"
        )
    mark = "*" if line["epoch"] == best_epoch else " "
    train_loss = "-" if line["train_loss"] is None else f"{line['train_loss']:.5f}"
    rate = "-" if line["images_per_s"] is None else f"{line['images_per_s']:.1f}"
    print(
        f"{line['epoch']:4}{mark} {line['learning_rate']:15.2e} {train_loss:>11} "
        f"{line['valid_mse']:11.5f} {line['valid_heg']:13.3f} {rate:>10} {line['seconds']:9.1f}",
        flush=True,
    )


def cut(text, width):
    """The text, its end left out where it is longer."""
    return text if len(text) <= width else text[: width - 1] + "…"


def cut_middle(text, width):
    """The text, some of its middle left out where it is longer: settings differ in their ends."""
    if len(text) <= width:
        return text
    end = width // 2
    return f"{text[: width - end - 1]}…{text[-end:]}"


def shorten(texts, width):
    """A column of texts by cut_middle, wider where two that differ would be one."""
    while True:
        shortened = texts.map(functools.partial(cut_middle, width=width))
        if shortened.nunique() == texts.nunique():
            return shortened
        width += 1


def justify_left(column):
    """A column of texts with its name, padded so that they begin at the same place."""
    width = max(map(len, [column.name, *column]))
    return column.str.ljust(width).rename(column.name.ljust(width))


def format_mean(values, form="{:.3f}"):
    """The mean of a number a training or slide, ±sd of several; "-" where it is undefined."""
    values = values.dropna()
    if values.empty:
        return "-"
    text = form.format(values.mean())
    if len(values) > 1:
        text += "±" + form.format(values.std())
    return text


def format_interval(low, high, form="{:.2f}"):
    """[low, high], or "-" where it is undefined."""
    if np.isnan(low) or np.isnan(high):
        return "-"
    return f"[{form.format(low)}, {form.format(high)}]"


def format_share(r, ceiling):
    """r as a share of its ceiling; "-" where either is undefined, or counts tell of noise alone."""
    return f"{r / ceiling:.0%}" if ceiling > 0 and not np.isnan(r) else "-"


def format_group(lines, column, size, over=None, counts=None):
    """A gene group's mean r, which `column` holds. With `over`, a column or columns, it is the mean
    within each of their values, then over them ±sd. `counts` is the column of the numbers of genes,
    if not <column>_n.

    0.310/47 is of 47 genes only, where the group has more; 0.310 (3 of 4) of 3 lines, where r is
    undefined in the fourth.
    """
    defined = lines.dropna(subset=column)
    if defined.empty:
        return "-"
    text = f"{defined[column].mean():.3f}"
    if over is not None:
        text = format_mean(defined.groupby(over)[column].mean())
    n_genes = int(defined[counts or f"{column}_n"].min())
    if n_genes < size:
        text += f"/{n_genes}"
    if len(defined) < len(lines):
        text += f" ({len(defined)} of {len(lines)})"
    return text


def explain_fewer(cells):
    """What a table's title says where format_group has marked means of fewer genes; else ""."""
    if not re.search(r"\d/\d", cells):
        return ""
    return "; /n: the mean of n genes, since the others of their group have no r"


def count_genes(groups):
    """{"heg": number of genes, ...} that the groups of a table of genes.csv should hold; not of
    "all", where a few genes that are constant on a slide are no news.
    """
    counts = groups["group"].value_counts()
    return {group.lower(): count for group, count in counts.items()}


def describe_scores(lines, interval, sizes, n_genes):
    """{column: text} of one setting's scores, on the screen and in the report.

    `lines` is a table of its lines of rows.csv, one or several, and `interval` that of their
    headline's mean; `sizes` as of count_genes, `n_genes` of the panel.
    """
    headline = recording.headline_of_lines(lines)
    is_hest = headline is recipes.OF_HEST
    if is_hest:
        over = headline.unit
    else:
        # Test slides count alike; folds of a search validate on slides that they share.
        is_tested = lines["split"].iloc[0] == "test"
        over = "slide" if is_tested and lines["slide"].nunique() > 1 else ["seed", "fold"]
    group = headline.group.lower()
    size = n_genes if is_hest else sizes.get(group, 0)
    columns = {headline.name: format_group(lines, headline.column, size, over, f"{group}_n")}
    columns["[95 %]"] = format_interval(*interval)
    ceiling = lines[headline.ceiling].mean()
    columns["of ceiling"] = format_share(lines[headline.column].mean(), ceiling)
    if is_hest:  # The headline is over all test spots of a fold at once, this slide by slide.
        columns["in slides"] = f"{lines.groupby(over)['all'].mean().mean():.3f}"
    else:
        for name in ("HVG", "MG", "all"):
            columns[name] = format_group(lines, name.lower(), sizes.get(name.lower(), 0))
        columns["r>=.30"] = f"{lines['n_genes_r30'].mean():.0f}"
    columns["q<.05"] = format_count(lines["n_genes_q05"])
    steps = lines.get("steps", pd.Series(dtype=float))  # Only what learns by epochs has them.
    return columns | {"steps": format_count(steps, "{:,.0f}")}


def format_count(counts, form="{:.0f}"):
    """The mean of counts or rates; "-" without any."""
    mean = counts.astype(float).mean()
    return "-" if np.isnan(mean) else form.format(mean)


def describe_differences(table, settings, headline=recipes.HEG):
    """The column that tells the headline of each setting minus another's; the name of the other
    stands in the head where it is the same for all.
    """
    differences = table[table["group"] == headline.group]
    others = differences["minus"].unique()
    texts = {}
    for line in differences.itertuples():
        interval = format_interval(line.low, line.high, "{:+.3f}")
        other = "" if len(others) == 1 else f" {line.minus}"
        is_defined = not np.isnan(line.difference)
        texts[line.setting] = f"{line.difference:+.3f} {interval}{other}" if is_defined else "-"
    name = f"{headline.name} minus"
    if len(others) == 1:
        name = f"{name} {others[0]}"
    return justify_left(pd.Series([texts.get(setting, "") for setting in settings], name=name))


def describe_scored(lines):
    """Which spots and which truth a table of scores is about."""
    counts = lines.groupby("slide")["n_spots"].max()
    listed = [slide for several in counts.index for slide in several.split(",")]
    slides = sorted({*listed}, key=lambda slide: (len(slide), slide))
    roles = {"test": "test slide", "valid": "validation, slide"}
    truths = {
        "lognorm": "log-normalised counts",
        "harmony": "Harmony's values",
        "log1p": "log1p of raw counts",
    }
    n_trainings = len(lines.drop_duplicates(["seed", "fold"]))
    role = lines["split"].iloc[0]
    where = f"{roles[role]}{'s' if len(slides) > 1 else ''} {','.join(slides)}"
    # Validation spots of several folds may be the same or others, as test slides of hest may.
    if role == "test" and len(listed) == len(slides):
        where += f" ({counts.sum()} spots)"
    trainings = "1 training" if n_trainings == 1 else f"{n_trainings} trainings"
    return f"{where}, {truths[lines['truth'].iloc[0]]}, {trainings}"


def describe_freedom(lines):
    """How many independent places the intervals of these lines rest on, as each test slide has."""
    freedoms = lines["interval_df"].dropna() if "interval_df" in lines else []
    if not len(freedoms):
        return ""
    low, high = round(min(freedoms)), round(max(freedoms))
    span = f"{low}" if low == high else f"{low} to {high}"
    unit = recording.headline_of_lines(lines).unit
    each = f" a {unit}" if lines[unit].nunique() > 1 else ""
    return f", intervals of {span} degrees of freedom{each}"


def print_published(root):
    """Print five columns of the published numbers beside a data root, if there are any.

    Returns the whole table for the report, {caption: lines}.
    """
    path = root / "published_results.csv"
    if not path.is_file():
        return {}
    published = pd.read_csv(path, dtype=str).fillna("-")
    widths = {"method": 30, "HEG50": 25, "HVG50": 5, "source": 26, "protocol": 26}
    columns = []
    for name, width in widths.items():
        texts = published[name].map(functools.partial(cut, width=width))
        columns.append(justify_left(texts))
    caption = "published, not computed here, other protocols"
    print_table(caption, pd.concat(columns, axis=1))
    return {caption: published.to_dict("records")}
