"""What validation says of each gene: r, how sure it is, at which scale, and of which slides."""

import numpy as np
import pandas as pd

import common
from study import files, intervals, recording, scales

ROUNDS = 10  # of intervals.LAID, for genes that chance hardly reaches
# What the r of validation spots can claim, by where they lie.
CLAIMS = {
    "none": "no spot validated, so nothing is known of any gene",
    "among": "validation spots lie among training spots of their slides: r is optimistic, and says "
    "nothing of another slide",
    "apart": "validation spots lie apart from training spots, but on the same slides: r says "
    "nothing of another slide",
    "donor": "validation slides are of a donor who trains as well: r says nothing of another "
    "person",
    "other": "validation slides are of a donor who does not train",
}


def judge_genes(predicted, truth, spots, sizes):
    """Table, a line a gene, of the prediction and the truth (n, G) of the table `spots`, on slides
    of `sizes` {tissue_index: number of spots}: `r`, the mean over slides, with its 95 % interval
    `low` to `high`; `p` of find_chance and its `q`; r of neighbourhoods by scale, `r_k7` and
    `r_k19`; and whether to `believe` a map of it: q is below recording.Q_THRESHOLD and the interval
    above 0. NaN where r is undefined.
    """
    slides = spots["tissue_index"].to_numpy()
    places = common.places_in_pitches(spots).to_numpy(np.float64)
    genes = pd.DataFrame()
    genes["r"] = common.average_slides(common.pearson_per_gene, predicted, truth, slides)
    error, freedom = measure_gene_errors(predicted, truth, slides, places, sizes)
    lines = zip(genes["r"], error, freedom, strict=True)
    ranges = [intervals.find_interval(*line) or (np.nan, np.nan) for line in lines]
    genes[["low", "high"]] = np.array(ranges)
    genes["p"] = find_chance(predicted, truth, slides, places)
    genes["q"] = intervals.control_discoveries(genes["p"].to_numpy())
    around = scales.score_neighbourhoods(predicted, truth, slides, places)
    genes = genes.join(around.add_prefix("r_"))
    genes["believe"] = (genes["q"] < recording.Q_THRESHOLD) & (genes["low"] > 0)
    return genes


def find_chance(predicted, truth, slides, places):
    """(G,) p as intervals.compare_with_chance gives it; of genes that chance never reached in its
    one round, of ROUNDS.

    One round cannot tell fewer genes from chance than a tenth of the panel. The two steps stay
    valid: a null gene gets a p below 1 / (1 + LAID) only if it would in ROUNDS alone, too (Besag
    and Clifford 1991).
    """
    p = intervals.compare_with_chance(predicted, truth, slides, places)
    never = np.flatnonzero(p == 1 / (1 + intervals.LAID))
    if len(never):
        x, y = predicted[:, never], truth[:, never]
        p[never] = intervals.compare_with_chance(x, y, slides, places, ROUNDS)
    return p


def measure_gene_errors(predicted, truth, slides, places, sizes):
    """(standard error, degrees of freedom), (G,) each, of each gene's r: intervals.measure_error of
    intervals.find_gene_influence, a part of the genes at a time.
    """
    parts = []
    for genes in common.parts_of(predicted.shape[1], common.GENES_AT_ONCE):
        influence = intervals.find_gene_influence(predicted[:, genes], truth[:, genes], slides)
        parts.append(intervals.measure_error(influence, slides, places, sizes))
    errors, freedoms = zip(*parts, strict=True)
    return np.concatenate(errors), np.concatenate(freedoms)


def find_claim(spots, roles):
    """The key of CLAIMS for the table `spots` with these roles (N,).

    Spots lie among the training spots where half of them have one within common.MARGIN pitches.
    """
    valid, train = spots[roles == "valid"], spots[roles == "train"]
    if valid.empty:
        return "none"
    pitches = common.pitches_to_nearest(valid, train)
    pitches = pitches[np.isfinite(pitches)]
    if len(pitches):
        return "among" if np.median(pitches) <= common.MARGIN else "apart"
    return "donor" if {*valid["donor"]} & {*train["donor"]} else "other"


def describe_validation(split, predicted, truth):
    """What the metadata of weights keep of a prediction (n, G) of the validation spots, against the
    truth (N, G): {"genes": {column of judge_genes: [a value a gene]}, "components": [r of
    each], "claim": text}; {"claim": text} without validation spots.
    """
    data = split.data
    valid = split.spots("valid")
    claim = CLAIMS[find_claim(data.spots, split.roles)]
    if not len(valid):
        return {"claim": claim}
    truth, spots = truth[valid], data.spots.iloc[valid]
    sizes = data.spots["tissue_index"].value_counts().to_dict()
    genes = judge_genes(predicted, truth, spots, sizes)
    columns = {
        name: values.tolist() if values.dtype == bool else files.without_nan(values)
        for name, values in genes.items()
    }
    r = scales.score_components(predicted, truth, spots["tissue_index"].to_numpy())
    return {"genes": columns, "components": files.without_nan(r), "claim": claim}


# ------------------------------------------------------------------------------------ another slide
COLUMNS = ["r", "low", "high", "p", "q", "r_k7", "r_k19"]  # of judge_genes, beside believe
MEANS = {"r": "single spots"}
MEANS |= {f"r_{scale}": f"means over {name}" for scale, name in scales.NAMES.items()}


def read_genes(described, genes):
    """The table of judge_genes, its lines named by `genes`, of what describe_validation gave; None
    of weights that hold none. KeyError, ValueError or TypeError where another version gave it.
    """
    if described is None:
        return None
    if "claim" not in described:
        raise KeyError("claim")
    if "genes" not in described:
        return None
    table = pd.DataFrame(described["genes"], genes)
    return table[COLUMNS].astype(np.float64).assign(believe=table["believe"].astype(bool))


def choose_scale(judged, candidates):
    """The key of scales.RADII at which the r of these genes is highest, on average over those that
    are believed; None where it is that of single spots, or nothing is known.
    """
    if judged is None:
        return None
    chosen = judged[judged.index.isin(candidates) & judged["believe"]]
    means = chosen[[*MEANS]].mean().dropna()
    best = means.idxmax() if len(means) else "r"
    return None if best == "r" else best.removeprefix("r_")


def tell_of_genes(trained):
    """[(word, text)] for the lines that tell of a weights.Trained how many genes are believed, what
    validation can claim, and at which scale the candidates among them hold.
    """
    if trained.evidence is None:
        return [("weights", "of a fold of 22, which do not tell which genes pass")]
    judged, candidates = trained.judged, trained.candidates
    lines = []
    if judged is not None:
        passed = f"{judged['believe'].sum():,} of {len(judged):,}"
        q = recording.Q_THRESHOLD
        lines.append(("genes", f"{passed} pass in validation: q < {q:g} and interval above 0"))
    lines.append(("validation", trained.evidence["claim"]))
    scale = choose_scale(judged, candidates)
    if scale:
        chosen = judged[judged.index.isin(candidates) & judged["believe"]].mean()
        r = f"r {chosen[f'r_{scale}']:.2f} against {chosen['r']:.2f} in validation"
        text = f"{MEANS[f'r_{scale}']} hold better than single ones: {r}, of HEG and HVG that pass"
        lines.append(("scale", text))
    return lines
