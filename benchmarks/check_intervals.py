"""How often the 95 % intervals hold a known r, and how wide they are, on fields made for it.

Question   Does an interval hold the true r as often as it says, and no wider than it must be?
Reads      <DATA_ROOT>/dataset/ (script 19), if it is given: the places of TEST_SLIDE's spots
Writes     <OUT>/intervals.csv and machine.json
Prints     a line a slide and range: degrees of freedom; of the mean r of 50 genes and of the paired
           difference of two models, coverage and width, over the width that is needed
Command    python benchmarks/check_intervals.py
Override   python benchmarks/check_intervals.py --data-root HER2ST_data --test-slide 4

Expression is a sum of smooth fields, a smooth part of each gene's own and white noise; two models
see the fields in part, beside smooth fields of their own. The correlation of a field falls to 1/e
at the range. The true r is that of the whole population, so it is known. Needed is 1.96 times the
standard deviation of the estimate over the slides that were made.
"""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from study import shell

if __name__ == "__main__":  # Check the command before the slow imports.
    shell.check_command(__file__)


import numpy as np
import pandas as pd
from compare_stages import describe_host
from scipy.spatial.distance import cdist

import common
from study import files, intervals

# ---------------------------------------------------------------------------------------- constants
OUT = "runs/benchmarks"
DATA_ROOT = ""  # a data root of 19; empty = hexagonal arrays alone
TEST_SLIDE = 4  # tissue_index of the slide in it whose places are taken
SLIDES = 400  # that are made of each kind
# --------------------------------------------------------------------------------------------------

GENES, FACTORS = 50, 5
ARRAYS = {"144 hexagons": (12, (1.5,)), "1,156 hexagons": (34, (1.5, 3.0))}
RANGES = (0.5, 1.0, 1.5, 2.0)  # pitches, of the slide of DATA_ROOT


def lay_hexagons(side):
    """(side^2, 2) places of a hexagonal array, in pitches."""
    row, column = (axis.ravel() for axis in np.mgrid[:side, :side])
    return np.stack([column + 0.5 * (row % 2), row * 0.866], 1)


def read_places():
    """(n, 2) places of the spots of TEST_SLIDE, in pitches."""
    spots = common.load_dataset(DATA_ROOT, "lognorm").spots
    spots = spots[spots["tissue_index"] == TEST_SLIDE]
    return common.places_in_pitches(spots).to_numpy()


def make_slide(root, random):
    """([predicted (n, G) of two models], truth (n, G), [true mean r of both]) of a slide on whose
    places `root` is a root of the fields' covariance.
    """
    n = len(root)
    loading = 0.5 * random.normal(size=(GENES, FACTORS))
    fields = root @ random.normal(size=(n, FACTORS))
    of_gene = 0.4 * root @ random.normal(size=(n, GENES))
    truth = fields @ loading.T + of_gene + random.normal(size=(n, GENES))
    variance = (loading**2).sum(1) + 0.4**2 + 1
    predictions, true = [], []
    for _ in range(2):
        seen = 0.35 * loading + 0.125 * random.normal(size=loading.shape)
        wrong = 0.25 * random.normal(size=(GENES, 3))
        predictions.append(fields @ seen.T + root @ random.normal(size=(n, 3)) @ wrong.T)
        spread = (seen**2).sum(1) + (wrong**2).sum(1)
        true.append(((loading * seen).sum(1) / np.sqrt(variance * spread)).mean())
    return predictions, truth, true


def check_field(places, reach):
    """{column: value} of SLIDES slides at these places (n, 2), their fields' range `reach`."""
    covariance = np.exp(-cdist(places, places) / reach) + 1e-8 * np.eye(len(places))
    root, one_slide = np.linalg.cholesky(covariance), np.ones(len(places))
    spots = pd.DataFrame(places, columns=["pxl_col", "pxl_row"]).assign(tissue_index=1)
    genes = [str(gene) for gene in range(GENES)]
    misses, halves = [], []
    for slide in range(SLIDES):
        predictions, truth, true = make_slide(root, np.random.default_rng(slide))
        found = [common.pearson_per_gene(x, truth).mean() for x in predictions]
        moved = [
            intervals.find_influence(x, truth, spots, genes, {"all": genes}).to_numpy()
            for x in predictions
        ]
        influence = np.hstack([moved[0], moved[0] - moved[1]])
        errors, freedoms = intervals.measure_error(influence, one_slide, places)
        misses.append([found[0] - true[0], found[0] - found[1] - (true[0] - true[1])])
        limits = [intervals.find_interval(0, *pair) for pair in zip(errors, freedoms, strict=True)]
        halves.append([high for _, high in limits])
    misses, halves = np.array(misses), np.array(halves)
    coverage = (np.abs(misses) <= halves).mean(0)
    width = halves.mean(0) / (1.96 * misses.std(0))
    return {
        "degrees of freedom": round(freedoms[0]),
        "coverage": coverage[0],
        "width": width[0],
        "paired: coverage": coverage[1],
        "width ": width[1],
    }


def main():
    kinds = {name: (lay_hexagons(side), ranges) for name, (side, ranges) in ARRAYS.items()}
    if DATA_ROOT:
        places = read_places()
        kinds = {f"slide {TEST_SLIDE}, {len(places)} spots": (places, RANGES)} | kinds
    lines = []
    for name, (places, ranges) in kinds.items():
        for reach in ranges:
            lines.append({"places": name, "range": reach} | check_field(places, reach))
            print(*(f"{key} {value:.3g}" for key, value in lines[-1].items() if key != "places"))
    table = pd.DataFrame(lines)
    out = Path(OUT)
    files.save_csv(out / "intervals.csv", table)
    files.save_json(out / "machine.json", describe_host())
    print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    shell.run_script(globals())
