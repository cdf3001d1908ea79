"""What can be predicted of a gene on one slide: the r that counting noise allows, and Moran's I."""

import numpy as np
import scipy.sparse
import torch
from scipy.spatial import cKDTree

from study import hashes


def counting_ceiling(counts, totals):
    """The r that knowing every spot's own rate would give, (G,): NaN for a constant gene.

    It is the r of measured log-normalised expression and that of the rates, from (n, G) counts of
    one slide and (n,) totals over all genes. All that varies between spots, but for Poisson noise,
    counts as signal, so this is an upper bound. Deterministic.

    The fit gives some spread to genes of one rate as well: what it gives them, c0, is taken off, as
    ((c^6 - c0^6) / (1 - c0^6))^(1/6). That rule is empirical: it leaves simulated genes with little
    variation the least bias and changes next to nothing of others (docs/trust.md).
    """
    counts, totals = np.asarray(counts), np.asarray(totals, np.float64)
    noise = ceiling_of_noise(counts.sum(0), totals) ** 6
    sixth = (fit_ceilings(counts, totals) ** 6 - noise) / (1 - noise)
    return sixth.clip(0) ** (1 / 6)


def ceiling_of_noise(gene_totals, totals, levels=16, draws=32):
    """(G,) what fit_ceilings gives to genes that have one rate in all spots and these counts (G,)
    in all: mean and half a standard deviation of drawn ones, at `levels` between which it is
    interpolated.
    """
    # The levels are the slide's, so that a gene's ceiling does not depend on the other genes.
    level = np.geomspace(1, max(totals.sum() / 2, 2), levels)
    share = np.repeat(level, draws) / totals.sum()
    random = np.random.default_rng(hashes.seed_of("ceiling of noise"))
    drawn = random.poisson(totals[:, None] * share)
    # Where no count was drawn, there is nothing to find.
    found = np.nan_to_num(fit_ceilings(drawn, totals)).reshape(levels, draws)
    usual = found.mean(1) + found.std(1) / 2
    return np.interp(np.log(np.maximum(gene_totals, 1)), np.log(level), usual)


def fit_ceilings(counts, totals):
    """As counting_ceiling, with what the fit gives to genes that do not vary."""
    counts = np.ascontiguousarray(np.asarray(counts, np.float32).T)
    totals = torch.from_numpy(np.asarray(totals, np.float32))
    groups = torch.from_numpy(counts).split(16)  # whose likelihoods stay in the processor's cache
    return torch.cat([ceiling_of_genes(genes, totals) for genes in groups]).double().numpy()


def ceiling_of_genes(counts, totals, levels=24, steps=50):
    """As fit_ceilings, of (genes, n) counts and (n,) totals, as tensors.

    A gene's rates are taken to come from an unknown distribution over `levels` values, which is
    fitted to its counts by maximum likelihood under Poisson noise (Laird, JASA 1978; EM, stopped
    after `steps`, before it falls into atoms).
    """
    measured = torch.log1p(1e4 * counts / totals)
    low, high = measured.aminmax(dim=1, keepdim=True)
    level = low + (high - low) * torch.linspace(0, 1, levels)  # (genes, levels), log-normalised
    level = level.clamp_min(1e-3)
    rate = torch.expm1(level) / 1e4
    likelihood = counts[:, :, None] * rate.log()[:, None] - totals[:, None] * rate[:, None]
    # (genes, n, levels); a factor of a spot's own does not matter.
    likelihood = (likelihood - likelihood.amax(2, keepdim=True)).exp_()
    weight = torch.full_like(level, 1 / levels)
    for _ in range(steps):
        evidence = torch.bmm(likelihood, weight[:, :, None])
        weight = weight * torch.bmm((1 / evidence).mT, likelihood)[:, 0] / len(totals)
    evidence = torch.bmm(likelihood, weight[:, :, None])
    expected = torch.bmm(likelihood, (weight * level)[:, :, None]) / evidence
    centred = measured - measured.mean(1, keepdim=True)
    covariance = (expected[:, :, 0] * centred).mean(1)
    variance = (weight * level**2).sum(1) - (weight * level).sum(1) ** 2
    r = covariance / (variance * measured.var(1, correction=0)).sqrt()
    varies = (high > low)[:, 0]
    return torch.where(varies, r.clamp(0, 1), torch.nan)


def morans_i(values, centres, pitch):
    """Moran's I, (G,), of (n, G) values at (n, 2) centres.

    A spot's neighbours are those within 1.3 pitches. NaN for a constant gene, and where no spot has
    a neighbour.
    """
    pairs = cKDTree(centres).query_pairs(1.3 * pitch, output_type="ndarray")
    size = len(values), len(values)
    neighbours = scipy.sparse.coo_matrix((np.ones(len(pairs)), pairs.T), size).tocsr()
    values = values.astype(np.float64) - values.mean(0, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = np.where(np.ptp(values, axis=0) > 0, (values**2).mean(0), np.nan)
        return (values * (neighbours @ values)).sum(0) / len(pairs) / variance
