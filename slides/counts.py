"""Counts of slides, spots x genes, from what holds them; and the genes of all slides, joined."""

import io
import re
import warnings

import anndata
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse

import common
from slides import inputs
from slides.sections import check_one_sample, find_part_spots, is_anndata, read_anndata, split_part
from study.errors import InputError

ASSEMBLY = r"(?i:GRC[a-z]\d|hg\d|mm\d|rn\d)"  # how the name of a genome begins
MOST_GENOMES = 4  # in one matrix; more prefixes than these are parts of names
ONE_DEPTH = 0.02  # of the mean: standard deviation of depths below which they were made equal
FEW_DEPTHS = 10  # spots, of which depths may be equal by chance
# What Xenium, CosMx and MERSCOPE count beside genes, HTSeq and the ST pipeline, and spike-ins.
CONTROLS = (
    r"(?i:__|ERCC-\d{5}|neg_?control|negative_?control|negprb|negative\d|system_?control|falsecode|"
    r"unassigned|deprecated|intergenic_?region|blank[_-]?\d|antisense_)"
)
FEATURE_SPELLINGS = {
    "id": ("gene_ids", "id", "gene_id", "ensembl", "ensembl_id", "feature_id"),
    "name": (
        "name",
        "gene_name",
        "gene_names",
        "gene_short_name",
        "symbol",
        "gene_symbol",
        "gene_symbols",
        "hgnc_symbol",
        "external_gene_name",
        "feature_name",
    ),
    "kind": ("feature_type", "feature_types", "kind", "type"),
}
ROW_NAMES = ("index", "features", "gene", "genes")  # columns in which R keeps lost names of genes
# A file of a folder with a matrix; GEO sets a sample's accession before the names.
FOLDER_PART = re.compile(
    r"([^.].*[_.-])?(?:barcodes\.tsv|features\.tsv|genes\.tsv|matrix\.mtx)(?:\.gz)?"
)
# What programs keep of spots beside their genes, in lower case: columns of a plain table of both.
OF_SPOTS = (
    r"(?i:n_?counts?(_.*)?|total_?(counts|umis?|reads)(_.*)?|log1p_.*counts.*|n_?genes?(_.*)?|"
    r"n_?features?(_.*)?|n_?(umis?|reads|mito|ribo)(_.*)?|(umi|gene|read)_?counts?|umis|"
    r"pct_counts_.*|percent[._]?(mt|mito|ribo)|leiden.*|louvain.*|seurat_clusters|clusters?|"
    r"library_?size|selected|in_?tissue|array_row|array_col|pxl_.*|image_?row|image_?col|"
    r"(pixel|pxl|px|coord|pos|array|spot|image|spatial|center|centre|centroid|new)s?[._]?[xy]|"
    r"[xy][._]?(pixel|pxl|px|coord|coordinate|pos|position|centroid)s?|"
    r"tissue|row|col|total|sum)"
)
# Barcodes: letters as 10x has, or ST's place on the array, 10x13, with what programs add to it.
BARCODES = r"(?:.*[ACGT]{14,}.*)|(?:.*?\d+(?:\.\d+)?x\d+(?:\.\d+)?(?:[-_]\w+)?)"
PROBE = r"[^|]+\|[^|]+\|[0-9a-f]{7}"  # id, symbol and number of a probe, of which a gene has three
# What spreadsheets, and those who read them, make of MARCH1, SEPT2 and DEC1.
DATES = r"\d{1,2}-(?:mar|sep|dec)(?:-\d+)?|(?:mar|sep|dec)-\d{1,4}|\d{4}-(?:03|09|12)-\d\d.*"
BINARISED = 50  # counts a spot, of which some would be above 1
RENAMED = 0.2  # of the ids that slides share: with other symbols, above which it is warned of
MOST_COUNTS = 2**31 - 1  # in which counts.h5ad keeps one
# Columns of obs in which programs keep the counts of a spot before genes are left out.
DEPTHS = ("total_counts", "n_counts", "nCount_Spatial", "nCount_RNA", "sum_umi", "nUMI")
DEPTHS_DIFFER = 0.1  # of a spot's counts, median over the spots
VERSION = r"^(ENS[A-Z]*\d{6,})\.\d+$"  # an Ensembl id with its version
ENSEMBL = r"ENS[A-Z]*\d{6,}(?:\.\d+)?"


def read_matrix(path, genome="", named=()):
    """Counts of one slide from a 10x folder or .h5, an .h5ad or a plain table, as AnnData (spots x
    genes, CSR); var_names are gene ids, var["name"] the symbols.

    Controls of imaging panels are left out, but for those `named`, by symbol or id. Of several
    genomes in one matrix, `genome` chooses one; without it, genes of all are taken.
    """
    table = read_matrix_file(path)
    if not table.n_obs or not table.n_vars:
        size = f"{table.n_obs} spots and {table.n_vars} genes"
        raise InputError(f"{path}: holds {size}: fetch or export it again")
    file, part = split_part(path)
    if part:
        print(f"{file}: {table.n_obs} spots are taken, those of {part}")
    check_one_sample(path, table.obs)
    if table.var_names.str.fullmatch(PROBE).mean() > 0.5:
        raise InputError(
            f"{path}: holds counts of probes, as {table.var_names[0]}, and not of genes: give "
            "filtered_feature_bc_matrix"
        )
    table.obs_names, table.var_names = map(write_plainly, (table.obs_names, table.var_names))
    symbols = write_plainly(table.var["name"].astype(str))
    unnamed = symbols.str.strip() == ""
    table.var["name"] = symbols.where(~unnamed, table.var_names.to_series())
    table = leave_out_controls(choose_genome(table, path, genome), path, named)
    bare = table.var_names.str.replace(VERSION, r"\1", regex=True)
    if bare.is_unique:  # Slides are joined by their ids, whatever annotation each was read with.
        table.var_names = bare
    return table


def write_plainly(names):
    """Names without the marks that Python's text of bytes has, as b'HAL'."""
    return names.str.replace(r"^b'(.*)'$", r"\1", regex=True)


def leave_out_controls(table, path, named):
    """The table without the features that are no genes by their symbol or id, counted in a line."""
    symbols, ids = table.var["name"].astype(str), table.var_names.to_series().astype(str)
    controls = symbols.str.match(CONTROLS).to_numpy() | ids.str.match(CONTROLS).to_numpy()
    controls &= ~(symbols.isin(named).to_numpy() | ids.isin(named).to_numpy())
    if not controls.any():
        return table
    example = symbols[controls].iloc[0]
    print(f"{path}: {controls.sum()} controls are left out, as {example}: they are no genes")
    return table[:, ~controls].copy()


def read_matrix_file(path):
    """As read_matrix, of the genes of all genomes."""
    if is_anndata(path):
        return read_anndata_matrix(path)
    file, part = split_part(path)
    if inputs.is_called(file, ".tsv", ".csv", ".txt"):
        table = read_dense_matrix(file)
    elif file.is_file():
        table = read_h5_matrix(file)
    else:
        table = read_matrix_folder(file)
    chosen = find_part_spots(file, part, table.obs)
    return table if chosen.all() else table[chosen].copy()


def make_table(path, counts, barcodes, features):
    """AnnData of counts (spots x genes), CSR, and of `features`, whose index are the genes' ids;
    InputError where a barcode or an id stands there twice.
    """
    inputs.check_unique(barcodes, "barcode", path)
    inputs.check_unique(features.index, "gene id", path)
    return anndata.AnnData(counts, pd.DataFrame(index=[*barcodes]), features)


def choose_genome(table, path, genome):
    """The genes of one genome, without the prefix that 10x sets before ids and symbols then."""
    genomes = find_genomes(table)
    counted = genomes.value_counts()
    found = " and ".join(f"{name} ({count} genes)" for name, count in counted.items())
    if not genome:
        if len(counted) > 1:
            inputs.warn(
                f"{path}: {found} are read together: choose one with --genome {counted.index[0]}"
            )
        if len(counted) != 1 or not re.match(ASSEMBLY, str(counted.index[0])):
            return table
        genome = counted.index[0]  # What was left of a matrix of two may keep its prefix.
    if genome not in counted:
        if len(counted) == 1 and str(counted.index[0]).startswith(genome):
            return table  # A slide of this species alone, by a fuller name, as GRCh38-2020-A.
        raise InputError(f"{path}: --genome {genome}: it holds {found or 'genes of one, unnamed'}")
    if len(counted) > 1:
        table = table[:, (genomes == genome).to_numpy()].copy()
    prefix = rf"^{re.escape(genome)}_+"
    table.var["name"] = table.var["name"].astype(str).str.replace(prefix, "", regex=True)
    table.var_names = table.var_names.str.replace(prefix, "", regex=True)
    return table


def find_genomes(table):
    """The genome of each gene: as the file says, or by a prefix that ids and symbols share."""
    if "genome" in table.var:
        return table.var["genome"].astype(str)
    ids = pd.Series(table.var_names).str.extract(r"^(.+?)_", expand=False)
    symbols = table.var["name"].reset_index(drop=True).str.extract(r"^(.+?)_", expand=False)
    if not len(ids) or ids.isna().any() or ids.nunique() > MOST_GENOMES or (ids != symbols).any():
        return pd.Series(dtype=str)
    return ids


def read_dense_matrix(path):
    """Counts in a plain table, spots x genes or genes x spots, as read_matrix gives them.

    The first line and the first column are names; those that look like barcodes are the spots'.
    Genes have one name there, which is both id and symbol.
    """
    names, table = inputs.read_dense_table(path)
    shares = [pd.Series(part).str.fullmatch(BARCODES).mean() for part in (table.index, names)]
    of_rows, of_columns = (share > 0.5 for share in shares)
    if of_rows == of_columns:
        raise InputError(
            f"{path}: neither rows, as {table.index[0]}, nor columns, as {names[0]}, are spots "
            "alone: name the spots of one of them by their barcodes, as AAACAAGTATCTCCCA-1 or 10x13"
        )
    counts, barcodes, genes = table.to_numpy(), table.index, names
    if of_columns:
        counts, barcodes, genes = counts.T, names, table.index
    inputs.check_unique(genes, "gene", path)
    genes = pd.Index([*genes])
    of_spots = genes.str.fullmatch(OF_SPOTS).astype(bool)
    lower = genes.str.lower()
    if {"x", "y"} <= {*lower}:  # One alone is a gene: flies have y.
        of_spots |= lower.isin(["x", "y"])
    if of_spots.any():
        left_out = ", ".join(genes[of_spots][:4])
        inputs.warn(f"{path}: {of_spots.sum()} columns are no genes and are left out: {left_out}")
        counts, genes = counts[:, ~of_spots], genes[~of_spots]
    totals = (2 * counts == counts.sum(axis=1, keepdims=True)).all(axis=0)
    if totals.any() and counts.shape[1] > 2:
        inputs.warn(f"{path}: {genes[totals][0]} is the sum of the others and is left out")
        counts, genes = counts[:, ~totals], genes[~totals]
    features = pd.DataFrame({"name": genes}, index=genes)
    return make_table(path, scipy.sparse.csr_matrix(counts), barcodes, features)


def read_h5_matrix(path):
    """A filtered_feature_bc_matrix.h5, as read_matrix gives it."""
    import scanpy  # Here, because numba takes seconds to load.

    try:
        # Names that several genes share are warned of; join_genes makes them unique.
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            table = scanpy.read_10x_h5(inputs.unpack(path), gex_only=False)
        table.X.check_format()  # A gene's number beyond the last one would crash the process.
    except InputError:
        raise
    except Exception as error:  # h5py raises what it likes; the cause goes into the message
        raise InputError(
            f"{path}: not a 10x filtered_feature_bc_matrix.h5 ({error}): give that, a "
            "folder with matrix.mtx, an .h5ad, or a table as .csv or .tsv"
        ) from None
    genes = are_genes(table.var.get("feature_types"), path)
    if not np.all(genes):  # Else a copy would double the memory, of Visium HD by 1.5 GB.
        table = table[:, genes].copy()
    features = table.var.assign(name=table.var_names).set_index("gene_ids").rename_axis(None)
    return make_table(path, table.X, table.obs_names, features)


def are_genes(kinds, path):
    """(features,) bool: which features of these `kinds` are genes, as those of CytAssist and of
    several modes are not all; the others are counted in a line. True without kinds. InputError
    where none is a gene.
    """
    if kinds is None:
        return True
    genes = (kinds == "Gene Expression").to_numpy()
    others = ", ".join(kinds[~genes].astype(str).unique()[:4])
    if not genes.any():
        raise InputError(f"{path}: no feature is of the kind Gene Expression, but of {others}")
    if not genes.all():
        print(f"{path}: {(~genes).sum()} features are left out, which are no genes but {others}")
    return genes


def read_anndata_matrix(path):
    """The counts that choose_counts finds in an .h5ad, as read_matrix gives them. Gene ids are a
    column of var, as gene_ids, or else the var_names; so are the symbols.
    """
    table = choose_counts(read_anndata(path), path)
    check_depths(table, path)
    var = table.var.set_axis([inputs.normalise_name(str(name)) for name in table.var], axis=1)
    var = var.loc[:, ~var.columns.duplicated()]  # Of names that differ in case the first counts.
    genes = are_genes(find_kinds(var), path)
    if not np.all(genes):
        table, var = table[:, genes], var[genes]
    var.index = find_row_names(var, path)
    ids = find_gene_names(var, FEATURE_SPELLINGS["id"])
    names = find_gene_names(var, FEATURE_SPELLINGS["name"], ids)
    features = pd.DataFrame({"name": names.to_numpy()}, index=ids.to_numpy())
    if "genome" in var:
        features["genome"] = var["genome"].astype(str).to_numpy()
    counts = table.X
    if not scipy.sparse.issparse(counts):
        counts = np.asarray(counts, np.result_type(counts, np.float32))  # scipy has no float16.
    return make_table(path, scipy.sparse.csr_matrix(counts), table.obs_names, features)


def find_kinds(var):
    """The column of var that says which features are genes, as 10x spells it; feature_types where
    none does, and None without that. CELLxGENE keeps biotypes in feature_type.
    """
    for spelling in FEATURE_SPELLINGS["kind"]:
        if spelling in var and (var[spelling] == "Gene Expression").any():
            return var[spelling]
    return var.get("feature_types")


def choose_counts(table, path):
    """The AnnData whose X is the raw counts among layers["counts"], X and raw.

    Counts of one depth, as SCTransform and counts per million have, give way to others, and those
    of few genes to those of most. Where none holds counts, X is as it stands, for check_counts to
    refuse.
    """
    found = {'layers["counts"]': table.layers.get("counts"), "X": table.X}
    found["raw"] = None if table.raw is None else table.raw.X
    found = {name: counts for name, counts in found.items() if counts is not None}
    for name, counts in found.items():
        try:
            if scipy.sparse.issparse(counts):
                counts.check_format()
        except ValueError as error:
            raise InputError(f"{path}: {name} is damaged ({error}): fetch it again") from None
    usable = {name: counts for name, counts in found.items() if holds_counts(counts)}
    if not usable:
        if table.X is None:
            raise InputError(f"{path}: holds no X; raw counts are needed")
        refuse_layers(table, path)
        return table
    # Of equals max() takes the first.
    name = max(usable, key=lambda name: (not has_one_depth(usable[name]), usable[name].shape[1]))
    say_what_is_taken(path, name, found, usable)
    if name == "raw":
        raw = table.raw.to_adata()
        lacking = table.var.columns.difference(raw.var.columns)
        raw.var = raw.var.join(table.var[lacking])  # Symbols are often kept there alone.
        return raw
    if name != "X":
        table.X = table.layers["counts"]
    return table


def say_what_is_taken(path, name, found, usable):
    """Print which counts of an .h5ad are taken, unless they are X and nothing else has more genes;
    `found` {name: values} holds all there are, `usable` those that are counts.
    """
    n_genes = found[name].shape[1]
    larger = [other for other in found if found[other].shape[1] > n_genes]
    if name == "X" and not larger:
        return
    line = f"{path}: {name} is taken, whose counts are of {n_genes} genes"
    for other in larger:
        cause = "are no counts"
        if other in usable:
            cause = "have one depth in all spots, as raw counts never do"
        line += f"; the values of {found[other].shape[1]} genes in {other} {cause}"
    print(line)


def has_one_depth(counts):
    """Whether all spots have about as many counts, which the tissue never gives."""
    depth = np.asarray(counts.sum(1), np.float64).ravel()
    return len(depth) >= FEW_DEPTHS and depth.std() < ONE_DEPTH * depth.mean()


def refuse_layers(table, path):
    """InputError that names the layers, where there are some, of an .h5ad in which choose_counts
    found no counts.
    """
    if not len(table.layers):
        return
    counts = [name for name in table.layers if holds_counts(table.layers[name])]
    fix = f'copy that of raw counts, as {counts[0]}, to layers["counts"]' if counts else "add them"
    raise InputError(
        f'{path}: raw counts are needed, and neither X nor layers["counts"] nor raw holds them; of '
        f"the layers {', '.join(table.layers)} these hold counts: "
        f"{', '.join(counts) or '-'}: {fix}"
    )


def check_depths(table, path):
    """Warn where a column of obs has other counts of the spots than the matrix: it holds some of
    the genes alone, as the variable ones, or corrected counts, as SCTransform gives them.
    """
    known = [name for name in DEPTHS if name in table.obs]
    if not known:
        return
    depth = np.asarray(table.X.sum(1), np.float64).ravel()
    for name in known:
        stated = pd.to_numeric(table.obs[name], errors="coerce").to_numpy(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            differs = np.nanmedian(np.abs(depth / stated - 1)) if stated.any() else 0
        if differs > DEPTHS_DIFFER:
            inputs.warn(
                f'{path}: by obs["{name}"] a spot has {np.nanmedian(stated):,.0f} counts, and by '
                f"the matrix {np.median(depth):,.0f}: genes are missing or counts were corrected, "
                "so depth and ceilings are wrong: give the raw counts of all genes"
            )


def find_row_names(var, path):
    """The index of var or, where the names of genes were lost and are numbers, the column in which
    programs of R keep them. InputError without one.
    """
    names = var.index.astype(str)
    if len(names) < 2 or not inputs.counts_up([*names]):
        return names
    known = (*ROW_NAMES, *FEATURE_SPELLINGS["id"], *FEATURE_SPELLINGS["name"])
    found = find_gene_names(var, known)
    if inputs.counts_up([*found]):
        raise InputError(
            f"{path}: its genes are called {names[0]}, {names[1]}, ...: give their names"
        )
    return pd.Index(found)


def find_gene_names(var, spellings, instead=None):
    """The first column of var that is spelt so, as texts; its index where there is none. Gaps are
    filled from `instead`, without which a column with gaps is passed over.
    """
    for spelling in spellings:
        if spelling not in var:
            continue
        found = var[spelling]
        if len(found) > 1 and inputs.counts_up([*found.astype(str)]):
            continue  # Numbers of rows, which a program has left behind.
        if found.notna().all():
            return found.astype(str)
        if instead is not None and found.notna().any():
            return found.astype(object).where(found.notna(), instead).astype(str)
    return pd.Series(var.index.astype(str), var.index)


def read_matrix_folder(folder):
    """matrix.mtx, barcodes.tsv and features.tsv or genes.tsv, as read_matrix gives them."""
    named = find_part(folder, "barcodes.tsv")
    listed = find_part(folder, "features.tsv", "genes.tsv")
    matrix = find_part(folder, "matrix.mtx")
    for file in (listed, matrix):
        if FOLDER_PART.fullmatch(file.name)[1] != FOLDER_PART.fullmatch(named.name)[1]:
            refuse_samples(folder, named, file)
    barcodes = read_barcodes(named)
    features = inputs.read_table(listed, FEATURE_SPELLINGS, row_names="name")
    if "id" not in features:
        raise InputError(f"{listed}: no column id among {', '.join(features)}")
    are_ids = {column: features[column].str.fullmatch(ENSEMBL).mean() for column in features}
    if are_ids["id"] < 0.5 < are_ids.get("name", 0):
        print(f"{listed}: symbols, as {features['id'].iloc[0]}, stand there before the ids")
        features = features.rename(columns={"id": "name", "name": "id"})
    counts = scipy.sparse.csr_matrix(read_market_matrix(matrix).T)
    if counts.shape == (len(features), len(barcodes)) != counts.shape[::-1]:
        print(f"{matrix}: its rows are spots and its columns genes")
        counts = counts.T.tocsr()
    if counts.shape != (len(barcodes), len(features)):
        raise InputError(
            f"{matrix}: {counts.shape[1]} genes x {counts.shape[0]} spots, but there are "
            f"{len(features)} features and {len(barcodes)} barcodes: the three files are not of "
            "one slide"
        )
    if "kind" in features:  # CytAssist's and multi-modal folders hold other kinds too
        genes = are_genes(features["kind"], folder)
        counts, features = counts[:, genes], features[genes]
    symbols = features.get("name", features["id"])
    var = pd.DataFrame({"name": symbols.to_numpy()}, index=features["id"].to_numpy())
    return make_table(folder, counts, barcodes, var)


def read_barcodes(path):
    """The barcodes of a 10x folder, in the order of its matrix."""
    return inputs.read_table(path, {"barcode": ("barcode", "barcodes", "x")}, "barcode")["barcode"]


def find_part(folder, *names):
    """The file of one of these names in a folder; it may be gzipped, and its name have a prefix.

    The first name that is there counts, plain before gzipped before prefixed. GEO sets a sample's
    accession before every name. Raises InputError for none, and for several samples.
    """
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.exists():
                return path
    for name in names:
        # Hidden files are a Mac's ._NAME beside every file, or a program's own.
        pattern = re.compile(rf"[^.].*[_.-]{re.escape(name)}(\.gz)?")
        found = sorted(path for path in folder.glob("*") if pattern.fullmatch(path.name))
        if len(found) > 1:
            refuse_samples(folder, *found[:2])
        if found:
            return found[0]
    raise InputError(f"no {' or '.join(names)} (plain or .gz) in {folder}")


def refuse_samples(folder, one, other):
    """InputError that names two files of a folder that are of two samples."""
    raise InputError(
        f"{folder}: {one.name} and {other.name} are of two samples: give each a folder of its own"
    )


def read_market_matrix(path):
    """The sparse matrix of a matrix.mtx, plain or .gz.

    scipy's reader ends the process at a zero byte, and at a number with which the file breaks off.
    """
    try:
        content = inputs.read_bytes(path)
        if b"\0" in content:
            raise ValueError("a zero byte in it")
        return scipy.io.mmread(io.BytesIO(content + b"\n"))
    except (ValueError, OverflowError, *inputs.UNREADABLE) as error:
        raise InputError(
            f"{path}: not a whole file of this kind ({error}); fetch it again"
        ) from None


def check_counts(table, path):
    """InputError unless the counts are finite whole numbers from 0 on."""
    if not holds_counts(table.X):
        raise InputError(
            f"{path}: holds values that are no counts (negative, fractional or NaN); "
            "raw counts are needed"
        )
    most = table.X.max() if table.n_obs and table.n_vars else 0
    if most > MOST_COUNTS:
        raise InputError(f"{path}: a count of {most:.4g}: more than {MOST_COUNTS} is no count")
    if most == 1 and table.X.sum() > BINARISED * table.n_obs:
        inputs.warn(f"{path}: no count is above 1: was it made 0 and 1? Raw counts are needed")


def holds_counts(matrix):
    """Whether a matrix, sparse or dense, holds finite whole numbers from 0 on alone."""
    values = matrix.data if scipy.sparse.issparse(matrix) else np.asarray(matrix)
    parts = (values[part] for part in common.parts_of(len(values), 2**16))  # to spare memory
    return all(((part >= 0) & (part < np.inf) & (part == np.rint(part))).all() for part in parts)


def join_genes(features):
    """The genes of all slides, joined by id and in the order of the ids: a table gene_ids, name and
    a column of bool a slide, listed_<key>, by the symbols, made unique.

    `features` gives (key, var) of every slide, one at a time. Of several symbols of an id the first
    of the alphabet is taken, and one that only repeats the id gives way to any other, so that the
    order of the slides does not matter. InputError for a slide that shares no id with the others,
    and where more symbols have other ids on other slides than genes are shared.
    """
    symbols = {key: var["name"].astype(str) for key, var in features}
    table = pd.concat(symbols.values()).rename_axis("id").reset_index()
    table["repeats"] = table["id"] == table["name"]
    warn_of_renamed(table[~table["repeats"]])
    table = table.sort_values(["id", "repeats", "name"]).drop_duplicates("id")
    ids = pd.Index(table["id"])
    genes = pd.DataFrame({"gene_ids": ids, "name": table["name"].to_numpy()})
    genes.index = name_genes(genes["name"])
    for key, found in symbols.items():
        genes[f"listed_{key}"] = ids.isin(found.index)
    report_missing_genes(genes, list(symbols))
    warn_of_split_genes(genes)
    warn_of_spellings(genes)
    return genes


def warn_of_split_genes(genes):
    """Warn of symbols of join_genes's table that have other ids on other slides, each of which
    lists one of them at most: those are two genes, each without counts where the other stands.

    InputError where these symbols are more than the genes that all slides share.
    """
    names = find_split(genes, genes["name"])
    if not len(names):
        return
    ids = " and ".join(genes["gene_ids"][genes["name"] == names[0]][:2])
    found = (
        f"genes of one symbol with other ids on other slides: {len(names)}, as {names[0]}: {ids}"
    )
    if len(names) > genes.filter(like="listed_").all(axis=1).sum():
        raise InputError(
            f"{found}; that is more than the genes that all slides share: name genes by the ids "
            'of one annotation on all slides, in features.tsv or in var["gene_ids"] of an .h5ad'
        )
    inputs.warn(
        f"{found}. These are two genes here, each without counts where the other stands: give "
        "all slides the ids of one annotation"
    )


def warn_of_spellings(genes):
    """Warn of genes of join_genes's table whose names differ by case, dots or dashes alone, and
    which no slide lists both: HLA.A is what R makes of HLA-A. Ids tell genes apart.
    """
    symbols = genes[genes["gene_ids"] == genes["name"]]
    spelling = symbols["name"].str.upper().str.replace("[._]", "-", regex=True)
    split = find_split(symbols, spelling)
    if len(split):
        first = " and ".join(sorted(symbols["name"][spelling == split[0]]))
        inputs.warn(
            f"genes that are spelled otherwise on other slides: {len(split)}, as {first}. These "
            "are two genes here, each without counts where the other stands: spell them alike"
        )


def find_split(genes, names):
    """The `names` that several of the genes have, of which each slide lists one at most."""
    listed = genes.filter(like="listed_").groupby(names.to_numpy())
    is_split = (listed.size() > 1) & (listed.sum() <= 1).all(axis=1)
    return is_split.index[is_split]


def warn_of_renamed(symbols):
    """Warn where slides call many genes of one id otherwise, and of names that a spreadsheet has
    made dates of; `symbols` has a line a slide and gene, with id and name.
    """
    names = symbols.groupby("id")["name"].agg(["size", "nunique"])
    shared = names[names["size"] > 1]
    renamed = shared.index[shared["nunique"] > 1]
    if len(renamed) > RENAMED * len(shared) > 0:
        first = symbols["name"][symbols["id"] == renamed[0]].unique()
        inputs.warn(
            f"{len(renamed)} of {len(shared)} gene ids have other symbols on other slides, as "
            f"{renamed[0]}: {', '.join(first[:2])}: are ids the same genes on all slides?"
        )
    dates = symbols["name"][symbols["name"].str.fullmatch(DATES, case=False)]
    if len(dates):
        inputs.warn(
            f"a gene is called {dates.iloc[0]}, which a spreadsheet has made of a name as MARCH1: "
            "where another slide has the name, these are two genes here"
        )


def report_missing_genes(genes, keys):
    """Print how many genes there are and how many of them a slide does not list; InputError for a
    slide that shares none with the others.
    """
    if len(keys) == 1:
        print(f"{len(genes):,} genes")
        return
    listed = genes.filter(like="listed_").set_axis(keys, axis=1)
    everywhere, is_shared = listed.all(axis=1), listed.sum(axis=1) > 1
    print(f"{len(genes):,} genes, {everywhere.sum():,} of them in every slide")
    for key in keys:
        if not (listed[key] & is_shared).any():
            raise InputError(
                f"slide {key} shares no gene id with the others: are they of one species and one "
                "annotation?"
            )
        if not listed[key].all():
            lacking = (~listed[key]).sum()
            print(f"  slide {key} does not list {lacking:,} of them: no counts there")
    if not everywhere.any():
        firsts = [f"slide {key}: {genes['gene_ids'][listed[key]].iloc[0]}" for key in keys[:4]]
        raise InputError(
            f"no gene id is in every slide ({'; '.join(firsts)}): do some call genes by ids and "
            "others by symbols?"
        )


def take_genes(table, genes):
    """The spots of one slide with these genes, a part of join_genes's table; no counts of one that
    the slide does not list.
    """
    places = pd.Index(genes["gene_ids"]).get_indexer(table.var_names)
    found = np.flatnonzero(places >= 0)
    shape = table.n_vars, len(genes)
    ones = np.ones(len(found), table.X.dtype)
    chosen = scipy.sparse.csr_matrix((ones, (found, places[found])), shape)
    counts = scipy.sparse.csr_matrix(table.X @ chosen)
    counts.sort_indices()
    return anndata.AnnData(counts, table.obs, genes)


def name_genes(symbols):
    """Symbols as an index in which each is unique; InputError where one is a column's name."""
    names = pd.Index(symbols)
    twice = names[names.duplicated()]
    if len(twice):
        print(
            f"{len(twice)} gene names stand for several ids and were made unique, as {twice[0]}-1"
        )
    clash = sorted(set(common.ID_COLUMNS) & set(names))
    if clash:
        raise InputError(
            f"a gene is called {clash[0]!r}, as a column of dataset.csv: "
            "rename it in the features table"
        )
    return anndata.utils.make_index_unique(names)
