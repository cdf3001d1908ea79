"""How far sections, changed sections and other tissue are from training slides, and whether the
intervals hold on them.

Question   Which slides raise script 26's alarm, and how often do intervals hold the measured value?
Reads      <DATA_ROOT>/dataset/ and <OTHER_ROOT>/dataset/ (script 19); RUN, if it is given: the
           folder of a run under loso on DATA_ROOT, whose networks of SETTING are taken
Writes     <OUT>/distances.csv, coverage.csv and machine.json
Prints     a line a kind of slide and change: distances, shares of far spots, alarms; a line a
           network, slide and change: the distance, r of HEG and the share of spots that intervals
           of 80 and 95 % hold, mean over HEG
Command    python benchmarks/check_trust.py --data-root HER2ST_data --other-root SIMULATED_data
Override   python benchmarks/check_trust.py --run runs/25_compare_prior_methods/HER2ST_data
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
import torch
import torch.nn.functional as F
from compare_stages import describe_host
from scipy.ndimage import gaussian_filter

import common
from slides.colour import colour_statistics
from study import conformal, files, similarity, weights

# ---------------------------------------------------------------------------------------- constants
OUT = "runs/benchmarks"
DATA_ROOT = "HER2ST_data"  # a data root of 19 with several slides
OTHER_ROOT = "SIMULATED_data"  # one of other tissue
RUN = ""  # folder of a run under loso on DATA_ROOT; empty = distances alone
SETTING = "tf_efficientnet_lite0"  # of RUN, a network
# --------------------------------------------------------------------------------------------------


def shift_stain(patches):
    """Patches (n, 224, 224, 3) uint8 as 23 stains them otherwise."""
    stored = common.MappedPatches(torch.from_numpy(patches), common.PATCH_SIZE)
    shifted = common.StainShiftedPatches(stored, common.OTHER_STAINING)
    parts = torch.arange(len(patches)).split(64)
    return np.concatenate([shifted[part].permute(0, 2, 3, 1).numpy() for part in parts])


def blur(patches, sigma):
    """Patches out of focus, by a Gaussian of `sigma` px."""
    return np.stack([gaussian_filter(patch, (sigma, sigma, 0)) for patch in patches])


def show_half(patches):
    """Patches that show half the side, as of a slide whose um_per_px is given as half of it."""
    quarter = common.PATCH_SIZE // 4
    middle = torch.from_numpy(patches[:, quarter:-quarter, quarter:-quarter].copy())
    size = (common.PATCH_SIZE, common.PATCH_SIZE)
    shown = F.interpolate(middle.permute(0, 3, 1, 2), size=size, mode="bilinear", antialias=True)
    return shown.permute(0, 2, 3, 1).contiguous().numpy()


CHANGES = {
    "as it is": lambda patches: patches,
    "stain shift": shift_stain,
    "blurred, 2 px": lambda patches: blur(patches, 2),
    "blurred, 4 px": lambda patches: blur(patches, 4),
    "half the side": show_half,
}


def describe_slides(data, slides):
    """similarity.TrainingSlides of all spots of these slides."""
    spots = np.flatnonzero(data.spots["tissue_index"].isin(slides))
    return similarity.describe_training(
        data.annotations.obsm["colour"][spots], data.spots.iloc[spots]
    )


def compare(training, colour):
    """{column: value} of the patches of colour statistics (m, 40) against training slides."""
    distances = similarity.measure_distances(training, colour)
    return {
        "distance": np.median(distances),
        "far": similarity.are_far(training, distances).mean(),
        "alarm": similarity.is_far(distances),
    }


def measure_slides(data, label):
    """Lines of every slide, as it is and changed, against the others, and against each alone."""
    slides = data.spots["tissue_index"].to_numpy()
    lines = []
    for slide in np.unique(slides):
        patches = data.patches[np.flatnonzero(slides == slide)].numpy()
        others = np.setdiff1d(slides, [slide])
        for change, apply in CHANGES.items():
            colour = colour_statistics(apply(patches))
            for learnt in [others, *([other] for other in others)]:
                line = {"trained": label, "by": ",".join(map(str, learnt)), "slides": len(learnt)}
                line |= {"seen": label, "slide": slide, "change": change}
                lines.append(line | compare(describe_slides(data, learnt), colour))
    return lines


def compare_slides():
    """Table of compare within DATA_ROOT, within OTHER_ROOT and from one to the other."""
    roots = {
        Path(root).name: common.load_dataset(root, "lognorm") for root in (DATA_ROOT, OTHER_ROOT)
    }
    lines = []
    for label, data in roots.items():
        lines += measure_slides(data, label)
        training = describe_slides(data, np.unique(data.spots["tissue_index"]))
        for other, seen in roots.items():
            if other != label:
                line = {"trained": label, "by": "all", "slides": training.n_slides, "seen": other}
                found = compare(training, seen.annotations.obsm["colour"])
                lines.append(line | {"slide": "all", "change": "as it is"} | found)
    return pd.DataFrame(lines)


def summarise(table):
    """A line a kind: the least and the greatest distance and share of far spots, and how many
    alarms of how many.
    """
    lines = []
    for kind, part in table.groupby(["trained", "slides", "seen", "change"], sort=False):
        line = dict(zip(("trained", "slides", "seen", "change"), kind, strict=True))
        for column in ("distance", "far"):
            line[column] = f"{part[column].min():.2f} to {part[column].max():.2f}"
        lines.append(line | {"alarms": f"{part['alarm'].sum()} of {len(part)}"})
    return pd.DataFrame(lines)


def measure_network(data, folder):
    """Lines of the network in a setting's folder on its test slide, as it is and changed."""
    model, trained = weights.read_weights(folder)
    recipe, training = trained.recipe, trained.training_slides
    read = files.read_csv(folder / "split.csv", ("id", "role"))
    test = np.flatnonzero(data.spots["id"].isin(read["id"][read["role"] == "test"]))
    truth = data.lognorm[test][:, pd.Index(data.genes).get_indexer(trained.genes)]
    heg = np.isin(trained.genes, trained.groups["heg"])
    dtype = getattr(torch, recipe["PRECISION"])
    lines = []
    for change, apply in CHANGES.items():
        patches = apply(data.patches[test].numpy())
        placed = common.MappedPatches(torch.from_numpy(patches), recipe["IMAGE_SIZE"])
        seen = common.predict(model, placed, range(len(test)), dtype=dtype, tta=recipe["TTA"])
        if recipe["NEIGHBOURHOOD"]:
            seen = common.blend_neighbourhood(seen, data.spots.iloc[test])
        coverage = conformal.measure_coverage(seen, truth, trained.half_widths)
        line = {"slide": data.spots["tissue_index"].iloc[test[0]], "change": change}
        line |= compare(training, colour_statistics(patches))
        line["HEG r"] = common.pearson_per_gene(seen[:, heg], truth[:, heg]).mean()
        line |= {name: share[heg].mean() for name, share in coverage.items()}
        line["least, a gene"] = coverage["coverage_80"][heg].min()
        lines.append(line)
    return lines


def main():
    out = Path(OUT)
    table = compare_slides()
    files.save_csv(out / "distances.csv", table)
    files.save_json(out / "machine.json", describe_host())
    print(summarise(table).to_string(index=False))
    if not RUN:
        return
    data = common.load_dataset(DATA_ROOT, "lognorm")
    rows = files.read_csv(Path(RUN, "rows.csv"), ("setting", "split", "folder"))
    chosen = rows[(rows["setting"] == SETTING) & (rows["split"] == "test")]
    lines = []
    for folder in chosen["folder"].unique():
        lines += measure_network(data, Path(RUN, folder))
    table = pd.DataFrame(lines)
    files.save_csv(out / "coverage.csv", table)
    print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    shell.run_script(globals())
