"""The panel: which of the slides' genes, G in all, are predicted."""

import anndata
import numpy as np
import pandas as pd
import scipy.sparse
import torch

import common
from slides import inputs
from study.errors import InputError

PANEL_SPELLINGS = ("gene", "genes", "symbol", "gene_symbol", "gene_name", "name")
PUBLISHED = "data/filtered_expression_matrices/hvg_union.npy"  # in the paper's data root
LOST_GENES = 20  # genes of a panel that a warning names at most
UNLIKELY_ZERO = 20  # counts on a slide, where none are found by chance once in 5e8
MANY_UNLISTED = 0.01  # of the panel; tables leave out genes without a count, as a woman's of Y


def find_variable_genes(counts, n_genes):
    """(G,) bool: the `n_genes` most highly variable genes of the counts of one slide, as AnnData
    (scanpy, seurat); all where it has no more.
    """
    import scanpy  # Here, because numba takes seconds to load.

    if counts.n_vars <= n_genes:
        return np.ones(counts.n_vars, bool)
    scale = scipy.sparse.diags_array(1e4 / counts.obs["n_counts"].to_numpy())
    lognorm = (scale @ scipy.sparse.csr_matrix(counts.X, dtype=np.float32)).log1p()
    lognorm = scipy.sparse.csr_matrix(lognorm, dtype=np.float32)
    part = anndata.AnnData(lognorm, var=pd.DataFrame(index=counts.var_names))
    threads = torch.get_num_threads()
    scanpy.pp.highly_variable_genes(part, flavor="seurat", n_top_genes=n_genes)
    torch.set_num_threads(threads)  # scanpy's numba takes all of them
    return part.var["highly_variable"].to_numpy()


def choose_panel(genes, path, wanted, published):
    """The table of genes, whose columns listed_<slide> and hvg_<slide> stay, of the panel, with the
    columns MG (a marker) and named (by a file, so that every split keeps it).

    The panel is the `wanted` genes of the file at `path`, if one is given, or the `published` ids,
    or the union of the slides' variable genes; the markers among the genes belong to the last two.
    """
    markers = genes.index.isin(common.MARKER_GENES)
    named = np.zeros(len(genes), bool)
    if path:
        panel = named = genes.index.isin(wanted)
        markers = markers & panel
        if not panel.any():
            raise InputError(
                f"{path}: the slides hold none of its {len(wanted)} genes, as {wanted[0]}"
            )
        warn_of_lost_genes(path, wanted, set(genes.index))
    elif published is not None:
        panel = genes["gene_ids"].isin(published).to_numpy()
    else:
        panel = genes.filter(like="hvg_").any(axis=1).to_numpy()
    panel = panel | markers
    print(
        f"panel of {panel.sum():,} genes, {markers.sum()} of the {len(common.MARKER_GENES)} "
        "markers among them"
    )
    return genes.drop(columns="name").assign(MG=markers, named=named)[panel]


def read_panel(path):
    """The genes of a table with a column gene, or of a list without a header."""
    table = inputs.read_table(path, {"gene": PANEL_SPELLINGS}, row_names="gene")
    if "gene" not in table or (table.shape[1] > 1 and not table.attrs["named"]):
        raise InputError(f"{path}: expected a table with a column gene, and not {list(table)}")
    genes = [gene for gene in table["gene"] if gene]
    if not genes:
        raise InputError(f"{path}: names no gene")
    return genes


def warn_of_lost_genes(path, genes, names):
    """Warn of the genes of the panel in a file that no gene of the slides is called."""
    lost = [gene for gene in genes if gene not in names]
    if not lost:
        return
    shown = ", ".join(lost[:LOST_GENES])
    if len(lost) > LOST_GENES:
        shown += f" and {len(lost) - LOST_GENES} others"
    upper = {name.upper(): name for name in names}
    similar = [f"{gene} ({upper[gene.upper()]})" for gene in lost if gene.upper() in upper]
    hint = "spell them as the features table does"
    if similar:
        hint += f", as {similar[0]}"
    inputs.warn(f"{path}: {len(lost)} of {len(genes)} genes are not in the slides: {shown}: {hint}")


def warn_of_unlisted(panel, counts, depths):
    """Warn of slides that do not list many genes of the panel (G), of which they would have counts
    by the rates of the others: these were probably not measured, as by another kit, unless they are
    genes of another organ, and 0 is no measurement.

    `counts` {tissue_index: (G,) counts} and `depths` {tissue_index: counts of all genes}.
    """
    for slide, found in counts.items():
        others = sum(depths.values()) - depths[slide]
        expected = (sum(counts.values()) - found) * (depths[slide] / max(others, 1))
        unlisted = ~panel[f"listed_{slide}"].to_numpy() & (expected >= UNLIKELY_ZERO)
        if unlisted.sum() > MANY_UNLISTED * len(panel):
            gene = np.argmax(np.where(unlisted, expected, 0))
            inputs.warn(
                f"slide {slide} does not list {unlisted.sum()} of the {len(panel)} genes of the "
                "panel, though by the other slides it should have counts of them "
                f"({expected[gene]:,.0f} of {panel.index[gene]}): they count as 0 there. Was it "
                "another kit? Then give --panel with genes that all slides list"
            )


def published_panel(root, tables, genes):
    """Ids of the published preprocessing's panel where hvg_union.npy is there, else None.

    Its mask is of the genes that all slides list, in the order of the first slide.
    """
    path = root / PUBLISHED
    if not path.is_file():
        return None
    shared = genes["gene_ids"][listed_by_all(genes)]
    ids = tables[0].read_features().index
    ids, mask = ids[ids.isin(shared)], inputs.load_array(path)
    if mask.dtype != bool or mask.shape != (len(ids),):
        raise InputError(
            f"{path}: {mask.dtype} {mask.shape}; expected one bool for each of the {len(ids)} genes"
        )
    print(f"panel: the published {path.name}")
    return ids[mask]


def listed_by_all(genes):
    """(G,) bool: the genes of join_genes's table that every slide lists."""
    return genes.filter(like="listed_").all(axis=1)
