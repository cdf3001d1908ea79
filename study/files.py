"""Files that are whole or not there, tables that are checked, folders that one process holds."""

import errno
import fcntl
import functools
import json
import math
import os
import shutil
from contextlib import contextmanager

from study.errors import InputError
from study.ranks import RANK


@contextmanager
def whole_file(path, mark=RANK):
    """Give a temporary path beside `path`; rename it to `path` on success, remove it otherwise.

    The `mark` in its name keeps apart processes that write the same file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Writers look at the suffix, so it stays.
    partial = path.with_name(f".partial-{mark}-{path.name}")
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save_csv(path, table):
    """Write the table, without its index, whole or not at all."""
    with whole_file(path) as partial:
        table.to_csv(partial, index=False)


def read_csv(path, texts=(), numbers=(), **options):
    """A table that save_csv wrote, with these columns at least; `options` of pandas.read_csv. Empty
    cells alone are NaN, since a gene may be called NA.

    InputError where another program has saved it since: a spreadsheet may separate cells by
    semicolons, and write decimals with commas. Numbers that it cut cannot be had back.
    """
    import pandas as pd  # Here, because commands are checked without it.

    fix = "run its script again"
    if (path.parent / "rows.json").is_file():  # Else the row counts as computed.
        fix = f"remove {path.parent} and {fix}"
    fix += "; a spreadsheet may have saved it in a form of its own"
    try:
        table = pd.read_csv(path, keep_default_na=False, na_values=[""], **options)
    except ValueError as error:  # in which pandas has its own errors, and those of encodings
        cause = " ".join(str(error).split())
        raise InputError(f"{path}: not as a script wrote it ({cause}): {fix}") from None
    lacking = {*texts, *numbers} - {*table}
    if lacking:
        raise InputError(f"{path}: lacks {', '.join(sorted(lacking))}: {fix}")
    for name in numbers:
        cells = table[name].dropna()
        wrong = cells[pd.to_numeric(cells, errors="coerce").isna()]
        if len(wrong):
            raise InputError(f"{path}: {name} is {wrong.iloc[0]!r}, no number: {fix}")
    return table


def save_json(path, content):
    """Write the content as indented JSON, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def without_nan(values):
    """A list of floats with None for NaN, which JSON does not have."""
    return [none_for_nan(float(value)) for value in values]


def none_for_nan(value):
    """The value, or None for NaN, which JSON does not have."""
    if isinstance(value, float) and math.isnan(value):
        return None
    return value


def as_utf8(text):
    """The text, with question marks for what UTF-8 does not have."""
    return text.encode("utf-8", "replace").decode()


def reserve_disk(path):
    """Take the space of a sparse file now: written through memory, a full disk would kill the
    process later. macOS cannot reserve; there the free space is at least compared.
    """
    size = path.stat().st_size
    if not hasattr(os, "posix_fallocate"):
        if shutil.disk_usage(path.parent).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return
    with open(path, "rb+") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def hold_folder(folder):
    """Keep other processes, but torchrun's of one run, out of a folder until this one ends."""
    if RANK:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Left open, because closing it gives the lock back.
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise InputError(
            f"{folder}: no folder to write to ({error.strerror}): choose another one"
        ) from None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise InputError(
            f"{folder}: another process is writing there: wait until it ends, or choose another "
            "folder"
        ) from None
    except OSError as error:  # of a file system without locks, as NFS and Lustre may be mounted
        warn_of_no_locks(folder, error.strerror)


@functools.cache  # so that it is said once
def warn_of_no_locks(folder, reason):
    """Print that two runs on a folder would not notice each other."""
    print(
        f"warning: {folder}: its file system has no locks ({reason}): two runs at once are not "
        "kept apart, so start one at a time"
    )
