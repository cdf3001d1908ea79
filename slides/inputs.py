"""Files as people have them, packed or not, of any encoding and separator; warnings of what was
found in them; and counts written as 10x does.

What cannot be read raises InputError.
"""

import atexit
import codecs
import csv
import functools
import gzip
import io
import re
import shutil
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import polars
import scipy.io

from study import files
from study.errors import InputError

GZIP = b"\x1f\x8b"  # how a gzipped file begins
# (first bytes, bytes further on, what it is) of files that people keep under a name of a table.
KINDS = (
    (b"PK", b"xl/", "an Excel workbook (.xlsx)"),
    (b"PK", b"opendocument", "an OpenDocument spreadsheet (.ods)"),
    (b"PK", b"Index/", "a Numbers spreadsheet (.numbers)"),
    (b"PK\3\4", b"", "a .zip archive"),
    (b"\xd0\xcf\x11\xe0", b"", "an old Excel workbook (.xls)"),
    (b"\x89HDF", b"", "an HDF5 file (.h5, .h5ad)"),
    (b"PAR1", b"", "a .parquet"),
    (b"BZh", b"", "packed as .bz2"),
    (b"\xfd7zXZ", b"", "packed as .xz"),
    (b"\x28\xb5\x2f\xfd", b"", "packed as .zst"),
    (b"7z\xbc\xaf", b"", "a .7z archive"),
    (b"%PDF", b"", "a PDF"),
    (b"<", b"<html", "a web page, as a download that failed"),
    (b"<", b"<HTML", "a web page, as a download that failed"),
    (b"version https://git-lfs", b"", "a pointer of Git LFS (fetch it with git lfs pull)"),
    (b"X\n", b"\0", "an .rds of R"),
    (b"RDX", b"", "an .RData of R"),
)
KIND_BYTES = 2**16  # of a file, by which its kind is known
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # how such a text begins
DAMAGED_GZIP = (gzip.BadGzipFile, EOFError, zlib.error)  # what reading such a file raises
UNREADABLE = (OSError, *DAMAGED_GZIP)
WARNINGS = []  # of this start of a script, in the order in which warn() printed them


def warn(text):
    """Print one line `warning: file: value: fix`, and keep it for the report."""
    line = " ".join(text.split())
    print(f"warning: {line}")
    WARNINGS.append(line)


def warn_once(text):
    """warn, unless it was said before in this run: images are opened several times."""
    if " ".join(text.split()) not in WARNINGS:
        warn(text)


def read_bytes(path):
    """The bytes of a file, unpacked where they are gzipped, whatever the file is called."""
    content = path.read_bytes()
    return gzip.decompress(content) if content.startswith(GZIP) else content


@functools.cache
def scratch_folder():
    """A folder that goes when the process ends."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def unpack(path):
    """The path of a file that can be read anywhere: a gzipped one is unpacked, once.

    It is unpacked to the system's folder for temporary files, which TMPDIR names.
    """
    with open(path, "rb") as file:
        if file.read(len(GZIP)) != GZIP:
            return path
    found = path.stat()
    return unpack_to_scratch(path.absolute(), found.st_size, found.st_mtime_ns)


@functools.cache
def unpack_to_scratch(path, size, changed):
    """The path of the unpacked file, whose `size` and time of change tell it from an older one."""
    folder = Path(tempfile.mkdtemp(dir=scratch_folder()))
    plain = folder / path.name.removesuffix(".gz")
    print(f"unpack {path} to {folder}", flush=True)
    try:
        with gzip.open(path) as packed, open(plain, "wb") as file:
            shutil.copyfileobj(packed, file, 2**24)
    except DAMAGED_GZIP as error:
        raise InputError(f"{path}: not a whole .gz file ({error}); fetch it again") from None
    return plain


def read_text(path):
    """The text of a table, packed or not. InputError for a damaged file and one of another kind."""
    try:
        content = read_bytes(path)
        kind = name_kind(content[:KIND_BYTES])
        if kind:
            raise InputError(f"{path}: this is {kind}: give a table of text, saved as CSV")
        text = decode_text(content)
    except (*UNREADABLE, ValueError) as error:
        raise InputError(f"{path}: cannot be read as text ({error}); export it as CSV") from None
    return re.sub(r"\Asep=.\r?\n", "", text)  # Excel's own line, which names the separator.


def name_kind(content):
    """What a file that is no text is, by its bytes; "" for text."""
    if content[257:262] == b"ustar":
        return "a .tar archive"
    for first, inside, kind in KINDS:
        if content.startswith(first) and inside in content:
            return kind
    return "binary, no text" if b"\0" in content and not content.startswith(UTF_16) else ""


def decode_text(content):
    """Bytes as text: UTF-8, UTF-16 with its mark, or what spreadsheets write in Western Europe."""
    if content.startswith(UTF_16):
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252")


def find_separator(text):
    """The character that separates the cells of a table; a tab for a table of one column.

    It is that of the first line, or of the second where R quotes row names that have no head.
    """
    first, second, *_ = [*text.split("\n", 2), ""]
    lines = [first, second] if second.startswith('"') else [first]
    for line in lines:
        outside_quotes = re.sub(r'"[^"]*"', "", line.strip())
        for separator in ("\t", ";", ",", " "):
            if separator in outside_quotes:
                return separator
    return "\t"  # The cells of one column may hold commas.


def split_cells(path):
    """(rows of cells, separator) of a table: texts without blanks around them, no empty row."""
    text = read_text(path).lstrip()
    separator = find_separator(text)
    lines = csv.reader(io.StringIO(text, newline=None), delimiter=separator, skipinitialspace=True)
    try:
        rows = [[cell.strip() for cell in line] for line in lines]
    except csv.Error as error:
        raise InputError(f"{path}: not a table of text ({error}); export it as CSV") from None
    rows = [row for row in rows if any(row)]
    if not rows:
        raise InputError(f"{path}: holds no line")
    return rows, separator


def read_dense_table(path):
    """(names of the columns, table of numbers whose index are the names of the rows) of a file.

    The cell above the names of the rows may be there or not. Names may stand there twice.
    """
    text = read_text(path).lstrip("\r\n")
    separator = find_separator(text)
    try:
        table = pd.read_csv(
            io.StringIO(text),
            sep=separator,
            header=None,
            skiprows=1,
            low_memory=False,  # Else pandas warns of what is refused below.
            converters={0: str.strip},  # A gene may be called NA.
        ).set_index(0)
        heads = next(csv.reader(io.StringIO(text), delimiter=separator))
        table = table.astype(float)
    except (ValueError, csv.Error, StopIteration) as error:
        raise InputError(
            f"{path}: not a table of counts ({error}): expected names in its first line and "
            "first column, and numbers"
        ) from None
    names = [head.strip() for head in heads]
    if len(names) == table.shape[1] + 1:
        names = names[1:]  # R's write.table gives row names no head.
    if len(names) != table.shape[1] or table.empty:
        raise InputError(
            f"{path}: {len(names)} names in the first line and {table.shape[1]} columns of "
            "counts; expected as many"
        )
    return names, table


def load_array(path):
    """The numbers in a .npy file. InputError for a damaged one and one of anything else."""
    try:
        with open(path, "rb") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"its values are {array.dtype}")
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not a NumPy array of numbers ({error})") from None
    return array


def normalise_name(cell):
    """A column's name in lower case, with underscores for all that is no letter or number."""
    return re.sub(r"[\W_]+", "_", cell.lower()).strip("_")


def counts_up(cells):
    """Whether these are the names or numbers that R and pandas give by default: 0, 1, 2, or V1."""
    numbers = [re.sub(r"^(V|X|Unnamed: )(?=\d+$)", "", cell) for cell in cells]
    first = 1 if numbers[:1] == ["1"] else 0
    return numbers == [str(first + place) for place in range(len(numbers))]


def read_table(path, spellings, row_names=None):
    """A table of texts, with the columns that `spellings` {column: (spelling, ...)} name.

    Columns are found by their names where the first line holds a known one, whatever their order,
    the first spelling before the others; else by their places. An unnamed first column, as R and
    pandas write row names, is `row_names` where the table has no other column of that name, and is
    left out otherwise. Other columns keep their names, or are called by their numbers. attrs hold
    "named" and "separator". Commas, semicolons, tabs and blanks separate; quotes, byte order marks
    and .gz are seen to. Raises InputError.
    """
    rows, separator = split_cells(path)
    known = {spelling for column in spellings for spelling in spellings[column]}
    named = any(normalise_name(cell) in known for cell in rows[0])
    if named:
        names, rows = rows[0], rows[1:]
        if rows and all(len(row) == len(names) + 1 for row in rows):
            names = ["", *names]  # R's write.table gives row names no head
        columns = name_columns(path, names, spellings, row_names)
    else:
        heads = rows[0] if rows[0][0] else rows[0][1:]
        if len(rows) > 1 and len(heads) > 1 and counts_up(heads):
            rows = rows[1:]  # It is the head that R and pandas give a table without names.
        columns = number_columns(rows, list(spellings))
    table = pd.DataFrame([fit_row(path, row, len(columns)) for row in rows], columns=columns)
    table = table.drop(columns="", errors="ignore").astype(object)
    table.attrs = {"named": named, "separator": separator}
    return table


def read_columns(path, columns):
    """A table of texts with these columns at least, by their names. InputError without one."""
    table = read_table(path, {column: (column,) for column in columns})
    for column in columns:
        if column not in table or not table.attrs["named"]:
            expected = ", ".join(columns)
            raise InputError(f"{path}: the column {column} is missing; expected {expected}")
    return table


def read_parquet(path, spellings):
    """A .parquet as read_table gives a table with a head; numbers stay numbers."""
    try:
        table = polars.read_parquet(io.BytesIO(read_bytes(path)))
    except (*UNREADABLE, polars.exceptions.PolarsError) as error:
        cause = str(error).splitlines()[0]
        raise InputError(f"{path}: not a whole .parquet ({cause}); fetch it again") from None
    if not table.columns:
        raise InputError(f"{path}: holds no column")
    columns = name_columns(path, table.columns, spellings, None)
    cells = [column.to_numpy() for column in table.iter_columns()]
    table = pd.DataFrame(dict(zip(columns, cells, strict=True)))
    table.attrs = {"named": True, "separator": "\t"}
    return table


def name_columns(path, names, spellings, row_names):
    """What the columns under these heads are called; "" for row names."""
    found = [normalise_name(name) for name in names]
    columns = list(names)
    for column, allowed in spellings.items():
        spelling = next((spelling for spelling in allowed if spelling in found), None)
        if spelling is None:
            continue
        if found.count(spelling) > 1:
            raise InputError(f"{path}: the column {spelling} stands there twice")
        columns[found.index(spelling)] = column
    if found[0] in ("", "unnamed_0"):
        columns[0] = row_names if row_names and row_names not in columns else ""
    return columns


def number_columns(rows, columns):
    """What the columns of a table without a head are called: by their places, "" for row numbers.

    Those beyond the known `columns` are called by their numbers.
    """
    width = len(rows[0])
    if width > len(columns) and counts_up([row[0] for row in rows]):
        columns = ["", *columns]
    further = [str(place + 1) for place in range(len(columns), width)]
    return [*columns, *further][:width]


def fit_row(path, row, width):
    """A row with as many cells as the table has columns; those that it lacks are empty."""
    if any(row[width:]):
        raise InputError(
            f"{path}: the line of {row[0]!r} has {len(row)} cells; expected {width} as in the first"
        )
    return row[:width] + [""] * (width - len(row))


def parse_numbers(texts, separator):
    """Texts as float64, with a point or a comma before decimals; NaN for what is no number.

    Columns of numbers, as a .parquet has, are taken as they are. Where commas separate the cells,
    1,234 in quotes may be a thousand and is no number here.
    """
    if pd.api.types.is_numeric_dtype(texts):
        return texts.astype(np.float64)
    texts = texts.astype(str)  # A .parquet may hold decimals, or dates.
    doubtful = texts.str.fullmatch(r"-?[1-9]\d{0,2}(,\d{3})+")
    numbers = pd.to_numeric(texts.str.replace(",", ".", regex=False), errors="coerce")
    return numbers.astype(np.float64).mask(doubtful & (separator == ","))


def is_called(path, *endings):
    """Whether a file's name, plain or gzipped, has one of these endings, in capitals or not."""
    return path.name.lower().removesuffix(".gz").endswith(endings)


def check_unique(names, kind, path):
    """InputError where one of the names stands there twice."""
    names = pd.Series(names)
    twice = names[names.duplicated()]
    if len(twice):
        raise InputError(f"{path}: {kind} {twice.iloc[0]} stands there twice")


def write_10x_folder(folder, counts, barcodes, genes):
    """Write sparse counts (n, G) as an unpacked 10x folder, each file whole or not at all; `genes`
    is a table id, name.
    """
    with files.whole_file(folder / "barcodes.tsv") as path:
        path.write_text("".join(f"{barcode}\n" for barcode in barcodes))
    with files.whole_file(folder / "features.tsv") as path:
        features = genes.assign(kind="Gene Expression")
        features.to_csv(path, sep="\t", header=False, index=False)
    with files.whole_file(folder / "matrix.mtx") as path:
        scipy.io.mmwrite(path, counts.T.tocoo())


def parse_gene_sets(text, path):
    """Table group, gene of a CSV's text, whose cells commas, semicolons or tabs separate.

    Lines that name no gene, or are there already, are left out. InputError, which names the line of
    the file at `path`, for other columns and for a line that lacks a cell.
    """
    if not text:
        raise InputError(f"{path}: is empty; expected the columns group, gene")
    separator = max(",;\t", key=text.partition("\n")[0].count)
    lines = csv.reader(io.StringIO(text, newline=None), delimiter=separator, skipinitialspace=True)
    pairs = []
    try:
        heads = [cell.strip() for cell in next(lines)]
        columns = heads.index("group"), heads.index("gene")
        for line in lines:
            cells = [cell.strip() for cell in line]
            if any(cells):
                pairs.append([cells[column] for column in columns])
                if not pairs[-1][0]:
                    raise ValueError("no group")
    except (ValueError, LookupError, csv.Error):
        expected = "expected the columns group, gene and a cell of each in every line"
        raise InputError(f"{path}, line {lines.line_num}: {expected}") from None
    table = pd.DataFrame(pairs, columns=["group", "gene"], dtype=str)
    return table[table["gene"] != ""].drop_duplicates(ignore_index=True)
