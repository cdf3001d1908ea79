"""AnnData, and one section among several in a file: `file#column=value` is a part of its spots."""

import re
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

from slides import inputs
from slides.imaging import ARRAY
from study.errors import InputError

# How programs call the column of obs that names the section of a spot, by normalise_name.
SECTION = re.compile(r"(library|sample|section|slide)(_id)?|sample_name|batch|orig_ident|slice")
BARCODE = r"^(.*?)([ACGT]{14,})(.*)$"  # prefix, letters and suffix
ENDS = {"prefix": 0, "suffix": 2}  # what of BARCODE chooses spots where obs has no such column


def split_part(path):
    """(path of a file, "column=value" or "") of `file#column=value`, which is a part of its spots.

    A file whose name holds a # is itself.
    """
    text = str(path)
    if "#" not in text or path.exists():
        return path, ""
    for mark in reversed([*re.finditer("#", text)]):
        if Path(text[: mark.start()]).exists():
            return Path(text[: mark.start()]), text[mark.end() :]
    lost = re.fullmatch("(.+)#([^#=]+=.*)", text)
    return (Path(lost[1]), lost[2]) if lost else (path, "")


def is_anndata(path):
    """Whether a path, or None, is that of an .h5ad, plain or gzipped, or of a part of its spots."""
    return path is not None and inputs.is_called(split_part(path)[0], ".h5ad")


def read_anndata(path, backed=None):
    """An .h5ad, plain or gzipped, as it stands there; its barcodes are checked.

    Of `file#column=value` these spots are given. `backed` "r" leaves the counts in the file, which
    is open then; of some of its spots they are not read.
    """
    file, part = split_part(path)
    try:
        # Names that stand there twice are refused below, and old formats read as well.
        with warnings.catch_warnings(action="ignore"):
            table = anndata.read_h5ad(inputs.unpack(file), backed)
    except InputError:
        raise
    except Exception as error:  # h5py and anndata raise what they like
        raise InputError(f"{file}: not a whole .h5ad of AnnData ({error})") from None
    if part:
        table = take_section(table, find_part_spots(file, part, table.obs))
    check_one_section(path, table)
    inputs.check_unique(table.obs_names, "barcode", path)
    return table


def take_section(table, chosen):
    """An AnnData of the chosen spots, (n,) bool, with what uns["spatial"] says of them."""
    libraries = list_libraries(table.uns)
    if table.isbacked:
        places = {name: values[chosen] for name, values in table.obsm.items()}
        section = anndata.AnnData(obs=table.obs[chosen], obsm=places)
        table.file.close()
    else:
        section = table[chosen].copy()
    words = {show_value(value) for column in section.obs for value in section.obs[column].unique()}
    section.uns["spatial"] = {name: libraries[name] for name in libraries if str(name) in words}
    return section


def list_libraries(uns):
    """{library: facts} of uns["spatial"], as scanpy reads Space Ranger's folders."""
    found = uns.get("spatial")
    libraries = found if isinstance(found, dict) else {}
    # CELLxGENE's files say beside them that there is one.
    return {name: facts for name, facts in libraries.items() if hasattr(facts, "get")}


def find_part_spots(path, part, obs):
    """(n,) bool: the spots, by barcode in `obs`, that "column=value" chooses; "" chooses all.

    The column is one of obs, or prefix or suffix: what stands around the letters of a barcode,
    with or without its hyphen. InputError for a column or value that is not there.
    """
    if not part:
        return np.ones(len(obs), bool)
    column, _, value = (text.strip() for text in part.partition("="))
    values = find_values(obs, column)
    if values is None:
        names = ", ".join([*map(str, obs), *ENDS])
        raise InputError(f"{path}#{part}: no column {column!r}: choose by column=value of {names}")
    chosen = values == value
    if column in ENDS:
        chosen |= values.str.strip("-_.") == value
    if not chosen.any():
        counted = values.value_counts()
        names = ", ".join(f"{name} ({count} spots)" for name, count in counted[:8].items())
        further = f" and {len(counted) - 8} others" if len(counted) > 8 else ""
        raise InputError(f"{path}#{part}: {column} has no value {value!r}: it has {names}{further}")
    return chosen.to_numpy()


def find_values(obs, column):
    """The values of a column of `obs`, or of a part of its barcodes, as texts; None without it."""
    for name in obs:
        if column in (str(name), inputs.normalise_name(str(name))):
            return obs[name].astype(object).map(show_value)
    if column not in ENDS:
        return None
    found = pd.Series(obs.index).astype(str).str.extract(BARCODE)[ENDS[column]]
    return found.fillna("").set_axis(obs.index)


def show_value(value):
    """A value of obs as a person writes it: 1 for 1.0."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def refuse_sections(path, cause, obs, libraries=()):
    """InputError with a cause why the spots are of several sections, and what to write to choose
    one: by a column that is called like a section or holds the `libraries`, by what surrounds the
    barcodes, or by any column that leaves each array place once.
    """
    choices = []
    for column in obs:
        values = {show_value(value) for value in obs[column].dropna().unique()}
        if len(values) > 1 and (names_section(column) or values <= set(map(str, libraries))):
            choices.append(column)
    choices += [end for end in ENDS if find_values(obs, end).nunique() > 1]
    choices += [column for column in obs if tells_sections_apart(obs, column)]
    file = split_part(path)[0]
    if not choices:
        raise InputError(
            f"{path}: {cause}, and a slide is one; no column tells them apart: give each a "
            "matrix of its own, and its positions"
        )
    values = sorted(set(find_values(obs, str(choices[0]))) - {""})
    value = values[0].strip("-_.") if choices[0] in ENDS else values[0]
    raise InputError(
        f"{path}: {cause}, and a slide is one: choose one in slides.csv or with --matrix by "
        f"writing {file.name}#{choices[0]}={value}"
    )


def names_section(column):
    """Whether a column of obs is called as programs call that of sections."""
    return SECTION.fullmatch(inputs.normalise_name(str(column))) is not None


def tells_sections_apart(obs, column):
    """Whether a column of a few values has each array place once in each of them."""
    if column in ARRAY or not {*ARRAY} <= {*obs} or not 1 < obs[column].nunique() <= 64:
        return False
    return not obs.duplicated([*ARRAY, column]).any()


def check_one_sample(path, obs):
    """InputError where barcodes, the index of `obs`, are of several samples, which have a suffix or
    a prefix each, as spaceranger aggr and anndata.concat give them.
    """
    found = pd.Series(obs.index).astype(str).str.extract(BARCODE).dropna()
    samples = (found[0] + "..." + found[2]).value_counts()
    if len(samples) > 1 and samples.iloc[1] > 1:
        names = ", ".join(samples.index[:4])
        refuse_sections(path, f"barcodes of {len(samples)} samples ({names})", obs)
    twice = found[1][found[1].duplicated()]
    if len(twice):
        cause = (
            f"{len(twice)} barcodes stand there twice but for what surrounds them, as "
            f"{twice.iloc[0]}, so they are of several samples"
        )
        refuse_sections(path, cause, obs)


def check_one_section(path, spots):
    """InputError where an AnnData is of several sections, by what it says of its spots."""
    obs, libraries = spots.obs, list(list_libraries(spots.uns))
    for column in obs:
        values = obs[column].dropna().unique()
        if names_section(column) and len(values) > 1:
            names = ", ".join(map(str, values[:4]))
            cause = f'obs["{column}"] names {len(values)} sections ({names})'
            refuse_sections(path, cause, obs, libraries)
    if len(libraries) > 1:
        cause = f'uns["spatial"] names {len(libraries)} sections ({", ".join(libraries[:4])})'
        refuse_sections(path, cause, obs, libraries)
    twice = obs[ARRAY][obs.duplicated(ARRAY)] if {*ARRAY} <= {*obs} else ()
    if len(twice) and len(obs.drop_duplicates(ARRAY)) > 1:
        row, column = twice.iloc[0]
        cause = (
            f"{len(twice)} spots have the array_row and array_col of another, as {row} and "
            f"{column}, so they are of several sections"
        )
        refuse_sections(path, cause, obs)
