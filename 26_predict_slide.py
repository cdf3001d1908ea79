"""Expression maps for a slide that has no expression, or whose own is to be compared.

Question   What would the genes of a trained model look like on this slide?
Reads      RUN, the folder of a run of scripts 20 to 23, of which the network with the highest
           validation r of HEG is taken (of 22 the chosen one), of those that have not learnt from
           the slide if it is one of the run's; or WEIGHTS, one weights.safetensors; IMAGE;
           POSITIONS: a folder outs/ of Space Ranger, a positions CSV, or nothing: the tissue is
           found and covered with a grid; MATRIX, or the counts in outs/; FEATURES, of a model that
           takes embeddings, whose patches are the spots where no positions are given
Writes     <OUT>/predictions.h5ad (layers low, high, low_95, high_95: intervals of 80 and 95 %; obs
           distance: how far a spot is from the training slides; var believe, valid_low, ...: what
           validation says of a gene; uns neighbourhood: whether half of a value is that of the
           spots around), predictions.csv, predictions.geojson (for QuPath), maps.png,
           report.html; correlations.csv if the slide has counts
Prints     how many genes pass in validation, and what it can claim; how the slide is read, and how
           far it is from the training slides; mean r of HEG, HVG, MG and all genes in validation,
           and on this slide if it has counts; the same of the genes drawn
Command    python 26_predict_slide.py --run runs/20_train_effb0_sota_split8020/HER2ST_data
           --image slide.tif
Override   python 26_predict_slide.py --weights weights.safetensors --image slide.tif
           --positions sample/outs
           python 26_predict_slide.py --weights weights.safetensors --image slide.tif
           --um-per-px 0.25 --genes ALB,GLUL
           python 26_predict_slide.py --weights weights.safetensors --image slide.tif
           --features embeddings/slide.h5
           --gene-sets FILE in any of them saves the scores of sets, and draws the best six
           A model of recipe best sees the spots around: of other spots it predicts other values
Time       75 s and 0.9 GB of memory for 26,000 x 25,400 px, 4,919 spots and 3,467 genes (two cores
           of an AMD EPYC, 2026-11-24)
"""

from study import shell

if __name__ == "__main__":  # Check the command before the slow imports.
    shell.check_command(__file__, files=("RUN", "WEIGHTS", "IMAGE", "FEATURES", "GENE_SETS"))


import hashlib
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

import common
from common import PATCH_SIZE
from slides import imaging, inputs, space_ranger
from slides.colour import colour_statistics
from slides.cutting import cut_spots
from slides.hest_patches import holds_patches
from slides.manifest import Slide
from slides.positions import place_spots
from slides.sections import split_part
from slides.spots import read_spots
from study import (
    conformal,
    constants,
    drawing,
    embeddings,
    evidence,
    exports,
    files,
    gene_sets,
    printing,
    runs,
    scales,
    shell,
    similarity,
    viewer,
    weights,
)
from study.errors import InputError

# -------------------------------------------------------------------------------- constants
RUN = ""  # folder of a run of scripts 20 to 23: its last start's best network in validation
WEIGHTS = ""  # in place of RUN: one weights.safetensors, or its folder
FEATURES = ""  # an .h5 of this slide's embeddings, for a ridge of 20 or 25 that learnt from such
IMAGE = ""  # TIFF, JPEG or PNG; empty = outs/spatial/tissue_hires_image.png, which is coarse
POSITIONS = ""  # a folder outs/, a positions CSV, or empty: a grid of 100 um over the tissue
MATRIX = ""  # counts beside positions: 10x folder, .h5, .h5ad, table or FILE#column=value of it
GENOME = ""  # of a matrix with two species: the one that is read, as GRCh38
UM_PER_PX = 0.0  # of the image; 0 = by the TIFF's resolution tags, or by the spots of outs/
OUT = ""  # folder of the results; empty = runs/<this script>/<the image's name>-<hash of paths>
GENES = ""  # to be drawn, comma-separated; empty = six of HEG and HVG that pass, best in validation
GENE_SETS = ""  # a .gmt, or a CSV group,gene: sets whose scores are saved; the best six are drawn

DEVICE = "auto"  # auto, cpu or cuda
PRECISION = "auto"  # auto, bf16, fp16 or fp32
# -------------------------------------------------------------------------------------------

# What is written to OUT, run.json the last but for the report.
RESULTS = ["run.json", "report.html", "maps.png", "correlations.csv"]
RESULTS += ["predictions.h5ad", "predictions.csv", "predictions.geojson"]
UNITS = {
    "lognorm": "log1p of counts per 10,000",
    "harmony": "Harmony's values",
    "log1p": "log1p of counts",
}
# By how much the pitch in um may differ from that in validation: neighbourhoods are in pitches, and
# r of means over other areas is not known.
PITCH_SHARE = 0.1
MOST_DRAWN = 100  # genes of --genes; maps.png may be no higher than 65,536 px
LEAST_R = 0.1  # of HEG in validation, below which a model is warned of
# Columns of var that the tables of genes hold, those of them that are known.
REPORTED = ["valid_r", "ceiling", "r", "valid_low", "valid_high", "valid_q"]
REPORTED += ["valid_r_k7", "valid_r_k19", "believe"]
ABOUT_GENES = """valid_r is Pearson's r in validation, valid_low to valid_high its 95 % interval,
which is about tissue like that of validation and not about this slide. valid_q is how often chance
gives as high an r (after Benjamini and Hochberg), valid_r_k7 and valid_r_k19 are r of means over 7
and 19 spots, believe is whether the gene passes. ceiling is the best r that counting noise allows
on whole training slides; valid_r may exceed it. r is Pearson's r on this slide, if it has counts.
Genes that were not asked for are drawn because they are the best in validation: expect less than
their valid_r."""


# -------------------------------------------------------------------------------- model


def choose_weights(slide):
    """The path of WEIGHTS, or of the best model of RUN for this Slide."""
    if bool(RUN) == bool(WEIGHTS):
        raise InputError(
            "give --run FOLDER of scripts 20 to 23, or --weights, a weights.safetensors or its "
            "folder"
        )
    if RUN:
        return weights.choose_model(Path(RUN), slide, bool(FEATURES))
    path = Path(WEIGHTS)
    folder = path if path.is_dir() else path.parent
    found = weights.find_in_run(folder.parent, slide)
    weights.warn_of_role(slide.image, weights.find_role(folder, found))
    return path


def check_features(path, recipe):
    """InputError where weights of this recipe need FEATURES that is not given, or the reverse."""
    takes_embeddings = embeddings.is_ridge(recipe)
    if FEATURES and not takes_embeddings:
        raise InputError(f"--features {FEATURES}: {path} is a network, which sees the image")
    if takes_embeddings and not FEATURES:
        raise InputError(
            f"{path}: a ridge on embeddings by {recipe['BACKBONE']}, {recipe['WIDTH']} numbers a "
            f"spot: give --features, an .h5 of this slide's; {embeddings.HOW_TO}"
        )


def choose_genes(trained):
    """Names of the genes to be drawn: those of GENES, or the best that pass in validation."""
    asked = [*dict.fromkeys(filter(None, map(str.strip, GENES.split(","))))]
    if len(asked) > MOST_DRAWN:
        raise InputError(
            f"--genes: {len(asked)} genes; at most {MOST_DRAWN} are drawn: name fewer, "
            "predictions.h5ad holds all"
        )
    for gene in asked:
        if gene not in trained.genes:
            raise InputError(
                f"--genes {gene}: not among the {len(trained.genes)} genes of the model"
            )
    judged = trained.judged
    if asked:
        failed = [gene for gene in asked if judged is not None and not judged["believe"][gene]]
        if failed:
            print(f"genes       drawn as asked, but failing in validation: {', '.join(failed)}")
        return asked
    facts = {"r": trained.valid_r, "ceiling": trained.ceiling}
    genes = pd.DataFrame(facts, trained.genes, dtype=np.float64)
    genes = genes[genes.index.isin(trained.candidates)]
    if judged is not None:
        genes = genes[judged["believe"][genes.index]]
        if genes.empty:
            inputs.warn("no gene of HEG and HVG passes in validation: --genes draws those it names")
    # Without validation those are drawn of which counts tell the most.
    return genes.sort_values(["r", "ceiling"], ascending=False).index[:6].tolist()


# -------------------------------------------------------------------------------- slide


def choose_slide():
    """(Slide, its positions if they are read already, else None) of IMAGE, POSITIONS, MATRIX."""
    for flag, path in (("image", IMAGE), ("positions", POSITIONS), ("matrix", MATRIX)):
        if path and not split_part(Path(path))[0].exists():
            raise InputError(f"--{flag} {path}: no such file")
    if IMAGE and Path(IMAGE).is_dir():
        raise InputError(f"--image {IMAGE}: a folder; expected a file")
    if POSITIONS and Path(POSITIONS).is_dir():
        return choose_sample()
    if not IMAGE:
        raise InputError("--image: which slide?")
    if MATRIX and not POSITIONS:
        raise InputError(f"--matrix {MATRIX}: needs the --positions of its spots")
    image = Path(IMAGE)
    if holds_patches(image):
        raise InputError(
            f"--image {IMAGE}: patches alone; expected the slide's TIFF, JPEG or PNG, as HEST-1k "
            "has in wsis/"
        )
    name = files.as_utf8(image.stem)  # as files hold it
    slide = Slide(
        tissue_index=1,
        name=name,
        donor=name,
        image=image,
        um_per_px=UM_PER_PX or imaging.read_resolution(inputs.unpack(image)),
        positions=Path(POSITIONS) if POSITIONS else None,
        matrix=Path(MATRIX) if MATRIX else None,
    )
    return slide, None


def choose_sample():
    """As choose_slide, where POSITIONS is a folder of Space Ranger."""
    if MATRIX:
        raise InputError(f"--matrix {MATRIX}: {POSITIONS} has its own")
    if UM_PER_PX:
        raise InputError(
            f"--um-per-px {UM_PER_PX}: {POSITIONS} tells it, by its spots 100 um apart or, of "
            "Visium HD, by microns_per_pixel; leave it out"
        )
    return space_ranger.read_space_ranger(Path(POSITIONS), Path(IMAGE) if IMAGE else None)


def choose_folder(slide, name, weights_path):
    """OUT, or a folder of this image, its positions, embeddings and these weights alone.

    Images of several samples may have one name, as pipelines write them.
    """
    paths = [
        Path(path).resolve() for path in (slide.image, POSITIONS, weights_path, FEATURES) if path
    ]
    digest = hashlib.sha256(repr(paths).encode()).hexdigest()[:8]
    return Path(OUT or Path("runs", Path(__file__).stem, f"{name}-{digest}"))


def hold_results(out):
    """Hold the folder of the results, without those of an earlier start, perhaps of another slide.

    InputError where it holds those of another script.
    """
    made_by = weights.read_facts(out).get("script", Path(__file__).stem)
    rows = [name for name in ("rows.csv", "rows.json") if (out / name).is_file()]
    if rows or made_by != Path(__file__).stem:
        raise InputError(
            f"--out {out}: holds {rows[0] if rows else 'run.json'} of a run, which would be "
            "replaced: name another folder"
        )
    files.hold_folder(out)
    for name in RESULTS:
        (out / name).unlink(missing_ok=True)


def read_slide(slide, positions, um_per_px, scratch):
    """(spots as AnnData, patches (n, 224, 224, 3) uint8 of um_per_px, Thumbnail) of a slide.

    The patches lie in a file in the folder `scratch`, which goes with them. Without positions the
    patches of FEATURES are the spots, or those of a grid.
    """
    thumbnail = None
    if FEATURES and positions is None and slide.positions is None:
        positions = embeddings.find_patch_centres(Path(FEATURES))
    elif positions is None:
        positions, thumbnail = place_spots(slide)
    spots = read_spots(slide, positions, GENOME)
    patches = imaging.map_scratch(scratch, (spots.n_obs, PATCH_SIZE, PATCH_SIZE, 3))
    makes = thumbnail is None
    cut = cut_spots(slide, spots.obs, patches, um_per_px, scratch, thumbnail=makes)
    if not cut.inside.all():
        spots, patches = spots[cut.inside].copy(), patches[cut.inside]
    size = f"{cut.image.shape[0]} x {cut.image.shape[1]} px, {cut.image.how}"
    counted = f"{spots.n_obs} spots, {cut.over_border} patches over the border"
    print(f"slide       {slide.name}: {size}; {counted}")
    return spots, patches, cut.thumbnail or thumbnail


def predict_patches(model, trained, patches):
    """(n, G) float32 expression, as trained on, of patches (n, 224, 224, 3) uint8."""
    device, dtype, reason = common.choose_device(trained.recipe)
    print(f"device      {device.type}, {str(dtype).removeprefix('torch.')} ({reason})")
    placed = common.place_patches(torch.from_numpy(patches), trained.recipe["IMAGE_SIZE"], device)
    model = model.to(device, memory_format=torch.channels_last)
    rows = np.arange(len(patches))
    return common.predict(model, placed, rows, dtype=dtype, tta=trained.recipe["TTA"])


def blend_as_learnt(predicted, spots, trained, um_per_px):
    """The prediction (n, G) of single spots, blended as the model has learnt; as it is, if it saw
    single spots. It learnt from spots around within so many micrometres, and these count.
    """
    if not trained.recipe["NEIGHBOURHOOD"]:
        return predicted
    sd = trained.recipe["neighbourhood_pitches"] * trained.pitch_um
    blended = common.blend_neighbourhood(predicted, spots.obs, sd / pitch_in_um(spots, um_per_px))
    count = (blended != predicted).any(axis=1).sum()
    told = f"of {count} of {len(blended)} spots half is the mean of those around, sd {sd:.0f} um"
    if count:
        print(f"blended     {told}")
    else:
        inputs.warn(f"the model sees the spots around, and no spot has any: {told}")
    return blended


def pitch_in_um(spots, um_per_px):
    """um from spot to spot on a slide."""
    return um_per_px * spots.obs["pitch"].iloc[0]


def embed_slide(slide, spots, patches, recipe):
    """(spots, patches, their embeddings (n, D) by FEATURES) of those of a slide's spots and patches
    that have one.

    InputError where none has one, or where the model of the recipe takes another width.
    """
    path, names = Path(FEATURES), (slide.image.stem, slide.name)
    held = embeddings.read_embeddings(path)
    side_um = recipe.get("SIDE_UM")  # Files with barcodes do not tell it.
    embeddings.check_embedded_slide(path, held, names, side_um, slide.um_per_px)
    embedded = embeddings.pick_embeddings(path, held, slide.name, spots.obs)
    if embedded.shape[1] != recipe["WIDTH"]:
        raise InputError(
            f"--features {FEATURES}: {embedded.shape[1]} numbers an embedding; the model takes "
            f"{recipe['WIDTH']}, of {recipe['BACKBONE']}"
        )
    print(f"embeddings  {recipe['WIDTH']} numbers a spot, to be of {recipe['BACKBONE']}")
    missing = np.isnan(embedded[:, 0])
    if not missing.any():
        return spots, patches, embedded
    text = f"{FEATURES}: {missing.sum()} of {len(missing)} spots of slide {slide.name} have no"
    barcode = spots.obs["barcode"][missing].iloc[0]
    if missing.all():
        raise InputError(f"{text} embedding, as {barcode}: is it of this slide and image?")
    inputs.warn(f"{text} embedding and are left out, as {barcode}: embed them if they are wanted")
    return spots[~missing].copy(), patches[~missing], embedded[~missing]


# -------------------------------------------------------------------------------- trust


def compare_slides(trained, patches):
    """(n,) how far the patches (n, 224, 224, 3) are from the training slides, in the distance of
    these from each other, of which one line is told.
    """
    colour = colour_statistics(patches)
    distances = similarity.measure_distances(trained.training_slides, colour)
    told = similarity.describe_distances(trained.training_slides, distances)
    if similarity.is_far(distances):
        inputs.warn(told)
    else:
        print(f"distance    {told}")
    return distances


def add_trust(table, trained, distances):
    """Put the distances of the spots and half the widths of the genes' intervals into the AnnData
    of a slide; with counts also var["coverage_80"] and ["coverage_95"], the shares of the spots
    that intervals hold.
    """
    table.obs["distance"] = distances
    for name, half in trained.half_widths.items():
        table.var[f"half_width_{name}"] = half
    if "measured" in table.layers:
        values = table.X, table.layers["measured"], trained.half_widths
        table.var = table.var.assign(**conformal.measure_coverage(*values))


def add_evidence(table, trained, genes, um_per_px):
    """Put what validation says of the genes into the AnnData of a slide, as var["valid_low"], ...
    and ["believe"]; which are drawn as var["drawn"], and the scale at which they hold better than
    at single spots as uns["scale"], empty if there is none or the spots are as far apart as
    PITCH_SHARE says.
    """
    table.var["drawn"] = table.var_names.isin(genes)
    scale = evidence.choose_scale(trained.judged, trained.candidates) or ""
    here, there = pitch_in_um(table, um_per_px), trained.pitch_um
    if scale and there and abs(here / there - 1) > PITCH_SHARE:
        text = f"spots are {here:.0f} um apart, and {there:.0f} um in validation"
        print(f"scale       no means over neighbourhoods are shown: {text}")
        scale = ""
    table.uns["scale"] = scale
    if trained.judged is not None:
        judged = trained.judged.drop(columns="r")  # var["valid_r"]
        names = {name: name if name == "believe" else f"valid_{name}" for name in judged}
        table.var = table.var.join(judged.rename(columns=names))


def save_predictions(path, table, trained):
    """Write the AnnData with the intervals' ends as layers: low and high of 80 %, low_95, high_95.

    They are made one at a time, since together they would take four times a prediction's memory.
    """
    with files.whole_file(path) as partial:
        table.write_h5ad(partial)
        with h5py.File(partial, "r+") as file:
            for name, half in trained.half_widths.items():
                ending = "" if name == "80" else f"_{name}"
                for end, step in (("low", -half), ("high", half)):
                    values = conformal.find_limit(table.X, step)
                    anndata.io.write_elem(file["layers"], f"{end}{ending}", values)


# -------------------------------------------------------------------------------- results


def assemble(slide, spots, predicted, thumbnail, trained):
    """AnnData as scanpy and squidpy draw it: X, obsm["spatial"], uns["spatial"] with the thumbnail.

    var says how well each gene was predicted in validation, uns["neighbourhood"] whether half of a
    value is that of the spots around. Of a slide with counts,
    layers["measured"] are its counts in the unit of `measure`, and var["r"] compares.
    """
    obs = spots.obs.rename_axis("id")[[*common.ID_COLUMNS[1:], "pitch"]]
    table = anndata.AnnData(predicted, obs, pd.DataFrame(index=trained.genes))
    table.var["valid_r"] = np.array(trained.valid_r, np.float64)
    table.var["ceiling"] = np.array(trained.ceiling, np.float64)
    for group, genes in trained.groups.items():
        table.var[group] = table.var_names.isin(genes)
    table.obsm["spatial"] = obs[["pxl_col", "pxl_row"]].to_numpy(np.float64)
    shown = exports.describe_library(thumbnail.pixels(), thumbnail.step, drawing.diameter_of(table))
    table.uns["spatial"] = {slide.name: shown}
    table.uns["neighbourhood"] = trained.recipe["NEIGHBOURHOOD"]
    if slide.matrix is not None:
        table.layers["measured"] = measure(slide, spots, trained)
        table.var["r"] = common.pearson_per_gene(predicted, table.layers["measured"])
    return table


def measure(slide, spots, trained):
    """Measured expression of the model's genes, (n, G) float32: log-normalised counts or, of a
    model of HEST-Benchmark, log1p of counts; NaN for genes that the slide lacks.
    """
    lines = find_genes(spots.var, trained)
    known = np.flatnonzero(lines >= 0)
    if not len(known):
        raise InputError(
            f"{slide.matrix}: holds none of the model's {len(lines)} genes, as {trained.genes[0]}"
        )
    counts = spots.X[:, lines[known]]
    if trained.recipe["TARGET"] == "log1p":
        values = counts.astype(np.float32).log1p().toarray()
    else:
        values = common.log_normalise(counts, spots.obs["n_counts"])
    measured = np.full((spots.n_obs, len(lines)), np.nan, np.float32)
    measured[:, known] = values
    return measured


def find_genes(features, trained):
    """(G,) the line of each of the model's genes in the table of a slide's features, -1 where it is
    not there: by its id or, where the slide has other ids, by its symbol. A symbol that several
    ids of the slide share tells nothing, nor one whose line is another gene's by its id.
    """
    symbols = pd.Index(features["name"].astype(str))
    is_shared = symbols.duplicated(keep=False)
    line_of = pd.Series(range(len(symbols)), symbols)[~is_shared]
    lines = line_of.reindex(trained.genes, fill_value=-1).to_numpy()
    by_id = features.index.get_indexer(trained.gene_ids)
    lines[np.isin(lines, by_id)] = -1  # That line is another gene's, which has its id.
    lines = np.where(by_id >= 0, by_id, lines)
    lost = [gene for gene, line in zip(trained.genes, lines, strict=True) if line < 0]
    if lost:
        print(f"counts      lack {len(lost):,} of the model's {len(lines):,} genes, as {lost[0]}")
    doubtful = [gene for gene in lost if gene in symbols[is_shared]]
    if doubtful:
        inputs.warn(
            f"{len(doubtful)} genes of the model are not compared, as {doubtful[0]}: several ids "
            "of this slide have this symbol"
        )
    return lines


def choose_sets(trained):
    """{set: [its genes in the model]} of GENE_SETS, of which one line is told. InputError where two
    of them would have one column of obs.
    """
    if not GENE_SETS:
        return {}
    listed = gene_sets.read_sets(Path(GENE_SETS))
    var = pd.DataFrame({"gene_ids": trained.gene_ids}, trained.genes)
    sets = gene_sets.match_sets(listed, var, [trained.genes])
    print(f"gene sets   {sets.describe()}")
    names = {}
    for name in sets.members:
        other = names.setdefault(name_column(name).removesuffix("_measured"), name)
        if other != name:
            raise InputError(
                f"{GENE_SETS}: {other} and {name} would share columns of predictions.h5ad: rename "
                "one"
            )
    return sets.members


def name_column(name):
    """The column of obs for a set's score; in an .h5ad a slash would be a folder."""
    return f"set_{name}".replace("/", "|")


def score_sets(table, sets):
    """AnnData of the scores of the sets {name: genes} on a slide: X, layers["measured"] of a slide
    with counts, and var as that of genes: valid_r, at every scale, and ceiling are the means of the
    set's `genes`, r is that of the score over those that have an r here. The scores also become
    columns set_<name> of obs of the table.
    """
    inside = np.array([table.var_names.isin(genes) for genes in sets.values()])
    listed = inside.any(axis=0)
    predicted, members = table.X[:, listed], inside[:, listed].T
    one_slide = np.zeros(table.n_obs)
    # Of a slide with counts, too, a prediction has the score that it has without.
    score, _ = gene_sets.find_scores(predicted, predicted, one_slide, members)
    facts = table.var.filter(regex="^valid_r|^ceiling$")
    var = pd.DataFrame([facts.loc[genes].mean() for genes in sets.values()], [*sets])
    var.insert(0, "genes", [len(genes) for genes in sets.values()])
    scored = anndata.AnnData(score, table.obs[[]], var)
    if "measured" in table.layers:
        measured = table.layers["measured"][:, listed]
        scores = gene_sets.find_scores(predicted, measured, one_slide, members)
        scored.layers["measured"] = scores[1]
        scored.var["r"] = common.pearson_per_gene(*scores)
    names = [name_column(name) for name in sets]
    columns = {"": scored.X} | {f"_{layer}": values for layer, values in scored.layers.items()}
    columns = [
        pd.DataFrame(values, table.obs_names, names).add_suffix(suffix)
        for suffix, values in columns.items()
    ]
    table.obs = pd.concat([table.obs, *columns], axis=1)
    return scored


def join_drawn(table, genes, scored):
    """AnnData of what is drawn of a slide: these genes, and the scores of the best six sets."""
    best = scored.var["valid_r"].sort_values(ascending=False, na_position="last").index[:6]
    parts = [table[:, genes], scored[:, best]]
    drawn = anndata.concat(parts, axis="var", merge="first", uns_merge="first")
    counts = scored.var["genes"]
    drawn.var_names = [*genes, *(f"{name}, score of {counts[name]} genes" for name in best)]
    return drawn


def describe_maps(trained):
    """The lines below the maps' title: what r in validation can claim, and how to read a map."""
    lines = []
    if trained.judged is not None:
        claim = trained.evidence["claim"]
        lines.append(f"{claim[0].upper()}{claim[1:]}.")
    if trained.recipe["NEIGHBOURHOOD"]:
        lines.append("Half of a predicted value is that of the spots around.")
    lines.append("Each map has its own colour scale.")
    if trained.judged is not None and not GENES:
        lines.append("The genes are the best in validation: expect less than that r.")
    return lines


def draw_maps(path, table, genes, title, note):
    """Rows of three genes' predicted expression; its means over neighbourhoods, where they hold
    better, and what was measured, below. Before them stand the H&E and the distance. The lines
    `note` stand below the title.
    """
    name, thumbnail = exports.read_library(table.uns)
    kinds = ["predicted", table.uns["scale"], "measured" if "measured" in table.layers else ""]
    threes = [genes[first : first + 3] for first in range(0, len(genes), 3)]
    lines = [(three, kind) for three in threes for kind in kinds if kind]
    lines += [((), "predicted")] * (2 - len(lines))  # room for the distance
    height = 2.9 * drawing.shape_of(table) + 0.4  # inches a row
    wide = 1 + (len(lines) > 3)  # columns of the H&E, so that it fills the rows beside it
    columns = wide + max(1, min(3, len(genes)))  # The title takes two.
    figure = Figure(figsize=(3.5 * columns, 0.4 + height * len(lines)), layout="constrained")
    grid = figure.add_gridspec(len(lines), columns)
    half = len(lines) // 2
    tissue = figure.add_subplot(grid[:half, :wide])
    distance = figure.add_subplot(grid[half:, :wide])
    drawing.draw_tissue(tissue, table, thumbnail)
    tissue.set_title(name, size=9)
    draw_distance(distance, table, thumbnail)
    for number, (three, kind) in enumerate(lines):
        for column, gene in enumerate(three):
            ax = figure.add_subplot(grid[number, wide + column])
            draw_map(ax, table, thumbnail, gene, kind)
    drawing.entitle(figure, [title, *note])
    drawing.save_figure(path, figure, f"{title}: H&E and maps of {', '.join(genes) or 'no gene'}")


def draw_distance(ax, table, thumbnail):
    """How far each spot's patch is from the training slides; as draw_map."""
    colours = {"cmap": "magma", "clim": (0, 2 * similarity.ALARM), "extend": "max"}
    drawing.draw_spots(ax, table, thumbnail, table.obs["distance"], **colours)
    ax.set_title("distance to the training slides\n1: theirs to each other", size=9)


def draw_map(ax, table, thumbnail, gene, kind):
    """One gene's predicted or measured expression, or means of a scale of scales.RADII."""
    values = table.layers["measured"] if kind == "measured" else table.X
    shown = values[:, table.var_names.get_loc(gene)]
    if kind in scales.RADII:
        places = common.places_in_pitches(table.obs).to_numpy(np.float64)
        shown = scales.average_neighbours(shown, places, kind)
    drawing.draw_spots(ax, table, thumbnail, shown)
    facts = table.var.loc[gene]
    if kind == "measured":
        known = viewer.describe_r(facts["r"], " on this slide")
    elif np.isnan(facts["valid_r"]):
        known = "not validated"
    else:
        column = f"valid_r_{kind}" if kind in scales.RADII else "valid_r"
        known = viewer.describe_r(facts[column], " in validation")
    if kind == "predicted" and facts["ceiling"] > 0:
        known += f", ceiling {facts['ceiling']:.2f}"
    gene = printing.cut_middle(gene, 44)  # The score of a set has a long name.
    ax.set_title(f"{gene}, {evidence.MEANS.get(f'r_{kind}', kind)}\n{known}", size=9)


def describe_groups(table):
    """Mean r of the groups and of all genes, in validation and on this slide: a DataFrame.

    With the slide's own counts, r and coverage on it are of the genes whose r there is defined.
    """
    genes = table.var
    lines = []
    for group in (*common.GROUPS, "all"):
        part = genes if group == "all" else genes[genes[group.lower()]]
        line = {"group": group, "genes": len(part)}
        if "r" in part:
            compared = part.dropna(subset="r")
            line["compared"] = len(compared)
            line["r"] = compared["r"].mean()
            line["in 80 % interval"] = compared["coverage_80"].mean()
        if "believe" in part:
            line["pass"] = int(part["believe"].sum())
        line["r in validation"] = part["valid_r"].mean()
        line["ceiling in training"] = part["ceiling"].mean()
        lines.append(line)
    return pd.DataFrame(lines)


def report(slide, table, genes, scored, trained, out):
    """Print the tables, one of gene sets if they are `scored`, warn of a model that cannot predict,
    and save correlations and report.
    """
    caption = "mean Pearson r in validation"
    if trained.recipe["REFIT"]:
        caption += " (of the network before it learnt from the validation spots, too)"
    if "measured" in table.layers:
        unit = UNITS["log1p" if trained.recipe["TARGET"] == "log1p" else "lognorm"]
        caption += f", and r against this slide's own {unit}"
        files.save_csv(out / "correlations.csv", table.var.rename_axis("gene").reset_index())
    of_genes = table.var.filter(items=REPORTED).rename_axis("gene")
    groups = describe_groups(table)
    tables = {caption: groups}
    if genes:
        tables["Genes drawn"] = of_genes.loc[genes].reset_index()
    if scored is not None:
        sets = scored.var.filter(items=["genes", "valid_r", "ceiling", "r"])
        sets = sets.rename_axis("set").reset_index()
        tables["Gene sets: mean r and ceiling of their genes, r of their score"] = sets
    for name, content in tables.items():
        title = f"{trained.title}{name} ({slide.image})"
        printing.print_table(title, content.round(3).fillna("-"))
    heg = groups["r in validation"][0]
    if np.isnan(heg):
        inputs.warn("HEG has no r in validation: nothing says that these maps are more than noise")
    elif heg < LEAST_R:
        inputs.warn(f"HEG r in validation is {heg:.2f}: these maps may be noise")
    written = "predictions.h5ad, .csv and .geojson, maps.png, report.html"
    print(f"\n{table.n_obs:,} spots x {table.n_vars:,} genes, {out}: {written}")
    is_judged = trained.judged is not None
    if is_judged:
        reported = of_genes[table.var[[*trained.groups]].any(axis=1)]
        reported = reported.sort_values("valid_r", ascending=False).reset_index()
        tables[f"HEG, HVG and MG in validation: {trained.evidence['claim']}"] = reported
    made_with = pd.Series(trained.recipe, dtype=str)
    tables["Trained with"] = made_with.rename_axis("name").reset_index(name="value")
    records = {
        name: content.replace({np.nan: None}).to_dict("records") for name, content in tables.items()
    }
    runs.finish_run(
        globals(),
        out=out,
        data_root=str(slide.image),
        label=trained.title,
        folders=[],  # It has no rows.
        tables=records,
        figures=[out / "maps.png"],
        recipe=constants.recipe_of(globals()),
        warnings=inputs.WARNINGS,
        about=ABOUT_GENES if is_judged else "",
    )


def main():
    inputs.WARNINGS.clear()
    slide, positions = choose_slide()
    path = choose_weights(slide)
    model, trained = weights.read_weights(path)
    check_features(path, trained.recipe)
    trained.recipe |= {"DEVICE": DEVICE, "PRECISION": PRECISION}
    for word, text in evidence.tell_of_genes(trained):
        print(f"{word:11} {text}")
    genes, sets = choose_genes(trained), choose_sets(trained)
    name = Path(IMAGE).stem if IMAGE else slide.name
    out = choose_folder(slide, name, path)
    hold_results(out)
    spots, patches, thumbnail = read_slide(slide, positions, trained.um_per_px, out)
    if FEATURES:
        spots, patches, embedded = embed_slide(slide, spots, patches, trained.recipe)
        predicted = model.predict(embedded)
    else:
        predicted = predict_patches(model, trained, patches)
    predicted = blend_as_learnt(predicted, spots, trained, slide.um_per_px)
    distances = compare_slides(trained, patches)
    del model, patches  # before as much again is taken to draw and write
    table = assemble(slide, spots, predicted, thumbnail, trained)
    add_trust(table, trained, distances)
    add_evidence(table, trained, genes, slide.um_per_px)
    unit = UNITS[trained.recipe["TARGET"]]
    scored, drawn = None, table[:, genes]
    if sets:
        scored = score_sets(table, sets)
        drawn = join_drawn(table, genes, scored)
    title = f"{trained.title}{name}, predicted ({unit})"
    draw_maps(out / "maps.png", drawn, [*drawn.var_names], title, describe_maps(trained))
    save_predictions(out / "predictions.h5ad", table, trained)
    spots = table.obs.reset_index()
    exports.save_expression(out / "predictions.csv", spots, predicted, trained.genes)
    measurements = exports.choose_measurements(table, genes)
    path = out / "predictions.geojson"
    exports.write_geojson(path, table.obsm["spatial"], drawing.diameter_of(table), measurements)
    report(slide, table, genes, scored, trained, out)


if __name__ == "__main__":
    shell.run_script(globals())
