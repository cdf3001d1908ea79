"""Which genes a training is about: the panel of the slides that take part, and the gene groups."""

import functools
from dataclasses import replace

import numpy as np
import pandas as pd

import common
from common import GROUPS
from slides import inputs


class GenesOf:
    """Expression (N, G) of some genes of a memory-mapped array: [spots] reads (n, G)."""

    def __init__(self, values, genes):
        self.values = values
        self.genes = genes  # their numbers
        self.shape = (values.shape[0], len(genes))

    def __getitem__(self, spots):
        return self.values[spots][..., self.genes]


@functools.cache
def restrict_panel(data, slides):
    """The data with the panel that 19 would have chosen on these slides alone: the variable genes,
    markers and named genes that one of them lists.
    """
    var = data.annotations.var
    listed = var[[f"listed_{slide}" for slide in slides]].any(axis=1)
    chosen = var[["MG", "named", *(f"hvg_{slide}" for slide in slides)]].any(axis=1)
    kept = np.flatnonzero(listed & chosen)
    annotations = data.annotations[:, kept].copy()
    lognorm = GenesOf(data.lognorm, kept)
    target = lognorm if data.target is data.lognorm else GenesOf(data.target, kept)
    genes = annotations.var_names.tolist()
    return replace(data, genes=genes, annotations=annotations, lognorm=lognorm, target=target)


@functools.cache
def take_part(data, slides):
    """As restrict_panel, its target Harmony's of these slides alone; NaN on others."""
    slide_of = data.spots["tissue_index"].to_numpy()
    inside = np.flatnonzero(np.isin(slide_of, slides))
    if len(inside) == len(slide_of):
        return data
    data = restrict_panel(data, slides)
    target = np.full(data.lognorm.shape, np.nan, np.float32)
    target[inside] = harmonise(data.lognorm[inside], slide_of[inside], data.meta["seed"])
    return replace(data, target=target, harmonised=slides)


def harmonise(lognorm, slides, seed):
    """Harmony over slides (Korsunsky et al. 2019): (N, G) log-normalised and (N,) tissue_index ->
    (N, G) float32. It holds all of it in memory.
    """
    import harmonypy  # Here, because lognorm does without.

    batch = pd.DataFrame({"slide": np.asarray(slides).astype(str)})
    result = harmonypy.run_harmony(lognorm, batch, "slide", random_state=seed, verbose=False)
    return np.ascontiguousarray(result.Z_corr, np.float32)


def choose_gene_groups(data, spots, published):
    """Table group, gene, rank, whose attrs["source"] says where the groups are from.

    They are HEG, HVG and MG of the data root's gene_sets.csv if `published` may be used and they
    are there, else those of rank_genes. Other groups of that file are gene sets (study/gene_sets).
    """
    path = data.root / "gene_sets.csv"
    table = pd.DataFrame()
    if published and path.is_file():
        listed = inputs.parse_gene_sets(inputs.read_text(path), path)
        table, source = listed[listed["group"].isin(GROUPS)].reset_index(drop=True), path.name
    if table.empty:
        table, source = rank_genes(data, spots), "training spots"
    table["rank"] = table.groupby("group").cumcount() + 1
    table.attrs["source"] = source
    return table


def rank_genes(data, spots):
    """Table group, gene: HEG and HVG are the 50 genes of the panel with the highest mean and
    variance of log-normalised expression over `spots` (numbers), MG the markers.
    """
    mean, variance = common.mean_and_variance(data.lognorm, spots)
    lists = {}
    for group, values in {"HEG": mean, "HVG": variance}.items():
        best = np.argsort(-values, kind="stable")[: common.GROUP_SIZE]
        lists[group] = [data.genes[gene] for gene in best]
    lists["MG"] = common.MARKER_GENES
    return pd.Series(lists).explode().rename_axis("group").reset_index(name="gene")
