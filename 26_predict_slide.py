"""Expression maps for a slide that has no expression, or whose own is to be compared.

Question   What would the genes of a trained model look like on this slide?
Reads      RUN, the folder of a run of scripts 20 to 23, of which the network with the highest
           validation r of HEG is taken, or WEIGHTS, one weights.safetensors; IMAGE; POSITIONS: a
           folder outs/ of Space Ranger, a positions CSV, or nothing: the tissue is found and
           covered with a grid; MATRIX, or the counts in outs/
Writes     <OUT>/predictions.h5ad, predictions.csv, predictions.geojson (for QuPath), maps.png,
           report.html; correlations.csv if the slide has counts
Prints     how the slide is read; mean r of HEG, HVG, MG and all genes in validation, and on this
           slide if it has counts; the same of the genes drawn
Command    python 26_predict_slide.py --run runs/20_train_effb0_sota_split8020/HER2ST_data
           --image slide.tif
Override   python 26_predict_slide.py --weights weights.safetensors --image slide.tif
           --positions sample/outs
           python 26_predict_slide.py --weights weights.safetensors --image slide.tif
           --um-per-px 0.25 --genes ALB,GLUL
Time       75 s and 0.9 GB of memory for 26,000 x 25,400 px, 4,919 spots and 3,467 genes (two cores
           of an AMD EPYC, 2026-11-24)
"""

from study import shell

if __name__ == "__main__":  # Mistakes are told before the imports, which take long.
    shell.check_command(__file__, files=("RUN", "WEIGHTS", "IMAGE"))


import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import safetensors
import torch
from matplotlib.figure import Figure

import common
from common import PATCH_SIZE
from slides import imaging, inputs, readers, space_ranger
from study import exports, printing, runs, shell
from study.shell import InputError

# -------------------------------------------------------------------------------- constants
RUN = ""  # folder of a run of scripts 20 to 23: its best network in validation
WEIGHTS = ""  # in place of RUN: one weights.safetensors, or its folder
IMAGE = ""  # TIFF, JPEG or PNG; empty = outs/spatial/tissue_hires_image.png, which is coarse
POSITIONS = ""  # a folder outs/, a positions CSV, or empty: a grid of 100 um over the tissue
MATRIX = ""  # counts beside positions: 10x folder, .h5, .h5ad, table or FILE#column=value of it
GENOME = ""  # of a matrix with two species: the one that is read, as GRCh38
UM_PER_PX = 0.0  # of the image; 0 = by the TIFF's resolution tags, or by the spots of outs/
OUT = ""  # folder of the results; empty = runs/<this script>/<the image's name>-<hash of paths>
GENES = ""  # to be drawn, comma-separated; empty = the six of HEG and HVG best in validation

DEVICE = "auto"  # auto, cpu or cuda
PRECISION = "auto"  # auto, bf16, fp16 or fp32
# -------------------------------------------------------------------------------------------

NETWORK = {"BACKBONE", "HIDDEN", "TRAINABLE_STAGES", "IMAGE_SIZE", "TTA", "TARGET"}  # of recipe
SPOT = 55.0  # um, the diameter that is drawn
UNITS = {
    "lognorm": "log1p of counts per 10,000",
    "harmony": "Harmony's values",
    "log1p": "log1p of counts",
}
LEAST_R = 0.1  # of HEG in validation, below which a model is warned of
TRAIN_AGAIN = "train it again with this version"


# -------------------------------------------------------------------------------- model


@dataclass
class Trained:
    """What the metadata of weights.safetensors say; lists are in the order of the genes."""

    recipe: dict  # constants of the script that trained the network
    genes: list
    um_per_px: float  # of the patches
    patch_size: int  # px
    groups: dict  # names of genes by "heg", "hvg", "mg"
    valid_r: list  # r in validation, against log-normalised counts; None where unknown
    ceiling: list  # the counting-noise ceiling on the training slides; None where unknown
    title: str  # "SIMULATED slides: " or nothing


def choose_weights():
    """The path of WEIGHTS, or of the network of RUN whose validation r of HEG is the highest.

    The test slide chooses nothing.
    """
    if bool(RUN) == bool(WEIGHTS):
        raise InputError(
            "give --run FOLDER of scripts 20 to 23, or --weights, a weights.safetensors or its "
            "folder"
        )
    if WEIGHTS:
        return Path(WEIGHTS)
    path = Path(RUN, "rows.csv")
    if not path.is_file():
        raise InputError(f"--run {RUN}: no rows.csv there: is it the folder of a run?")
    table = shell.read_csv(path, texts=("folder", "split", "truth"), numbers=("heg",))
    judged = table[table["split"] == "valid"].dropna(subset="heg")
    trained = [Path(RUN, folder, "weights.safetensors").is_file() for folder in judged["folder"]]
    judged = judged[trained]
    judged = judged.sort_values("heg", kind="stable")
    if judged.empty:
        raise InputError(f"--run {RUN}: holds no network with a validation r: give --weights")
    chosen = judged.iloc[-1]
    print(f"{chosen['setting']}: {chosen['folder']}, HEG r {chosen['heg']:.3f} in validation")
    return Path(RUN, chosen["folder"])


def read_weights(path):
    """(model, Trained) of weights.safetensors, or of the folder that holds it.

    InputError for a file of another kind or version, and for a network that takes other input.
    """
    path = path / "weights.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"--weights {path}: no such file; expected weights.safetensors of a run")
    try:
        with safetensors.safe_open(path, "pt") as file:
            texts = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = {name: json.loads(text) for name, text in texts.items()}
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise InputError(f"{path}: not a .safetensors file of a run ({error})") from None
    trained = check_metadata(path, metadata)
    try:
        recipe = trained.recipe | {"PRETRAINED": False}
        model = common.build_model(recipe, len(trained.genes), 0)
        model.load_state_dict(state)
    except (RuntimeError, KeyError, TypeError):
        raise InputError(
            f"{path}: not the network of its metadata: one of an older version must be "
            f"trained again, and one that takes a cluster id or retrieves spots, as 24's and 25's "
            "do, cannot be used here"
        ) from None
    return model, trained


def check_metadata(path, metadata):
    """Trained, of the metadata by name; InputError where they are not of this version."""
    version = metadata.get("format")
    if version != common.FORMAT:
        raise InputError(
            f"{path}: format {version}, and this version reads {common.FORMAT}: {TRAIN_AGAIN}"
        )
    names = [field.name for field in fields(Trained)]
    for name in names:
        if name not in metadata:
            raise InputError(f"{path}: its metadata lack {name!r}: {TRAIN_AGAIN}")
    trained = Trained(**{name: metadata[name] for name in names})
    if trained.patch_size != PATCH_SIZE:
        raise InputError(
            f"{path}: patches of {trained.patch_size} px; expected {PATCH_SIZE}: {TRAIN_AGAIN}"
        )
    if not isinstance(trained.recipe, dict) or not trained.recipe.keys() >= NETWORK:
        raise InputError(
            f"{path}: its recipe lacks one of {', '.join(sorted(NETWORK))}: {TRAIN_AGAIN}"
        )
    trained.recipe |= {"DEVICE": DEVICE, "PRECISION": PRECISION}
    return trained


def choose_genes(trained):
    """Names of the genes to be drawn."""
    asked = [gene.strip() for gene in GENES.split(",") if gene.strip()]
    for gene in asked:
        if gene not in trained.genes:
            raise InputError(
                f"--genes {gene}: not among the {len(trained.genes)} genes of the model"
            )
    if asked:
        return asked
    r = pd.Series(trained.valid_r, trained.genes, np.float64)
    # Of all genes of the panel, the best by validation would be those that chance favoured.
    candidates = [*trained.groups.get("heg", []), *trained.groups.get("hvg", [])]
    if r.index.isin(candidates).any():
        r = r[r.index.isin(candidates)]
    return r.sort_values(ascending=False, na_position="last").index[:6].tolist()


# -------------------------------------------------------------------------------- slide


def choose_slide():
    """(Slide, its positions where they are known by now, else None) of IMAGE, POSITIONS, MATRIX."""
    for flag, path in (("image", IMAGE), ("positions", POSITIONS), ("matrix", MATRIX)):
        if path and not readers.split_part(Path(path))[0].exists():
            raise InputError(f"--{flag} {path}: no such file")
    if POSITIONS and Path(POSITIONS).is_dir():
        return choose_sample()
    if not IMAGE:
        raise InputError("--image: which slide?")
    if MATRIX and not POSITIONS:
        raise InputError(f"--matrix {MATRIX}: needs the --positions of its spots")
    image = check_image()
    slide = readers.Slide(
        tissue_index=1,
        name=image.stem,
        donor=image.stem,
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
    image = check_image() if IMAGE else None
    return space_ranger.read_space_ranger(Path(POSITIONS), image)


def check_image():
    """IMAGE as a path; InputError where it is no file."""
    if not Path(IMAGE).is_file():
        raise InputError(f"--image {IMAGE}: no such file")
    return Path(IMAGE)


def choose_folder(slide, name):
    """OUT, or a folder of this image, its positions and these weights alone.

    Images of several samples may have one name, as pipelines write them.
    """
    paths = [Path(path).resolve() for path in (slide.image, POSITIONS, RUN, WEIGHTS) if path]
    digest = hashlib.sha256(repr(paths).encode()).hexdigest()[:8]
    return Path(OUT or Path("runs", Path(__file__).stem, f"{name}-{digest}"))


def read_slide(slide, positions, um_per_px, scratch):
    """(spots as AnnData, patches (n, 224, 224, 3) uint8 of um_per_px, Thumbnail) of a slide.

    The patches lie in a file in the folder `scratch`, which goes with them.
    """
    thumbnail = None
    if positions is None:
        positions, thumbnail = readers.place_spots(slide)
    spots = readers.read_spots(slide, positions, GENOME)
    patches = imaging.map_scratch(scratch, (spots.n_obs, PATCH_SIZE, PATCH_SIZE, 3))
    step = imaging.thumbnail_step(slide) if thumbnail is None else None
    image, made, over = imaging.read_resampled(slide, spots.obs, patches, um_per_px, scratch, step)
    space_ranger.check_hires(slide, image.shape, made)
    inside = imaging.find_inside(spots.obs, image.shape)
    if not inside.all():
        spots, patches = spots[inside].copy(), patches[inside]
    if slide.positions is not None:
        imaging.warn_of_swap(slide, spots.obs, patches, image.shape)
    size = f"{image.shape[0]} x {image.shape[1]} px, {image.how}"
    print(f"slide       {slide.name}: {size}; {spots.n_obs} spots, {over} patches over the border")
    return spots, patches, made or thumbnail


def predict_patches(model, trained, patches):
    """(n, G) float32 expression, as trained on, of patches (n, 224, 224, 3) uint8."""
    device, dtype, reason = common.choose_device(trained.recipe)
    print(f"device      {device.type}, {str(dtype).removeprefix('torch.')} ({reason})")
    placed = common.place_patches(torch.from_numpy(patches), trained.recipe["IMAGE_SIZE"], device)
    model = model.to(device, memory_format=torch.channels_last)
    rows = np.arange(len(patches))
    return common.predict(model, placed, rows, dtype=dtype, tta=trained.recipe["TTA"])


# -------------------------------------------------------------------------------- results


def assemble(slide, spots, predicted, thumbnail, trained):
    """AnnData as scanpy and squidpy draw it: X, obsm["spatial"], uns["spatial"] with the thumbnail.

    var says how well each gene was predicted in validation. Of a slide with counts,
    layers["measured"] are log-normalised counts, NaN for genes it lacks, and var["r"] compares.
    """
    obs = spots.obs.rename_axis("id")[common.ID_COLUMNS[1:]]
    table = anndata.AnnData(predicted, obs, pd.DataFrame(index=trained.genes))
    table.var["valid_r"] = np.array(trained.valid_r, np.float64)
    table.var["ceiling"] = np.array(trained.ceiling, np.float64)
    for group, genes in trained.groups.items():
        table.var[group] = table.var_names.isin(genes)
    table.obsm["spatial"] = obs[["pxl_col", "pxl_row"]].to_numpy(np.float64)
    shown = exports.describe_library(thumbnail.pixels(), thumbnail.step, SPOT / slide.um_per_px)
    table.uns["spatial"] = {slide.name: shown}
    if slide.matrix is not None:
        table.layers["measured"] = measure(slide, spots, trained.genes)
        table.var["r"] = common.pearson_per_gene(predicted, table.layers["measured"])
    return table


def measure(slide, spots, genes):
    """Log-normalised counts of the genes, (n, G) float32; NaN for genes that the slide lacks."""
    measured = readers.join_genes([(slide.tissue_index, spots.var)])
    known = measured.index.isin(genes)
    if not known.any():
        raise InputError(
            f"{slide.matrix}: holds none of the model's {len(genes)} genes, as {genes[0]}"
        )
    counts = readers.take_genes(spots, measured[known])
    values = common.log_normalise(counts.X, counts.obs["n_counts"])
    table = pd.DataFrame(values, columns=counts.var_names)
    return table.reindex(columns=genes).to_numpy(np.float32)


def draw_maps(path, table, genes, title):
    """Rows of H&E and three genes' predicted expression; where it was measured, that below."""
    ((name, slide),) = table.uns["spatial"].items()
    image, scale = slide["images"]["hires"], slide["scalefactors"]["tissue_hires_scalef"]
    kinds = ["predicted", *table.layers]  # "measured" is the only layer
    threes = [genes[first : first + 3] for first in range(0, len(genes), 3)]
    lines = [(three, kind) for three in threes for kind in kinds]
    height = 2.9 * image.shape[0] / image.shape[1] + 0.4  # inches a row
    figure = Figure(figsize=(14, 0.4 + height * len(lines)), layout="constrained")
    diameter = slide["scalefactors"]["spot_diameter_fullres"] * scale  # px of the thumbnail
    points = 0.9 * diameter * 2.6 * 72 / image.shape[1]  # on axes of about 2.6 inches
    rows = figure.subplots(len(lines), 4, squeeze=False)
    for axes, (three, kind) in zip(rows, lines, strict=True):
        for ax in axes:
            ax.set_axis_off()
        axes[0].imshow(image)
        axes[0].set_title(name, size=9)
        for ax, gene in zip(axes[1:], three, strict=False):
            ax.imshow(image, alpha=0.25)
            draw_map(ax, table, gene, kind, scale, max(points**2, 0.5))
    figure.suptitle(title)
    shell.save_figure(path, figure, f"{title}: H&E and maps of {', '.join(genes)}")


def draw_map(ax, table, gene, kind, scale, size):
    """One gene's predicted or measured expression, in spots of `size` pt^2 on a thumbnail."""
    values = table.X if kind == "predicted" else table.layers[kind]
    x, y = (table.obsm["spatial"] * scale).T
    shown = values[:, table.var_names.get_loc(gene)]
    points = ax.scatter(x, y, c=shown, s=size, linewidths=0)
    ax.figure.colorbar(points, ax=ax, shrink=0.7, format="{x:.3g}")
    facts = table.var.loc[gene]
    if kind == "measured":
        known = f"r {facts['r']:.2f} on this slide"
    elif np.isnan(facts["valid_r"]):
        known = "not validated"
    else:
        known = f"r {facts['valid_r']:.2f} in validation"
    if kind == "predicted" and facts["ceiling"] > 0:
        known += f", ceiling {facts['ceiling']:.2f}"
    ax.set_title(f"{gene}, {kind}\n{known}", size=9)


def describe_groups(table):
    """Mean r of the groups and of all genes, in validation and on this slide: a DataFrame.

    With the slide's own counts, the genes are those whose r on it is defined.
    """
    measured = "r" in table.var
    genes = table.var.dropna(subset="r") if measured else table.var
    lines = []
    for group in (*common.GROUPS, "all"):
        key = group.lower()
        if group != "all" and key not in genes:
            continue
        part = genes if group == "all" else genes[genes[key]]
        line = {"group": group, "genes": len(part)}
        if measured:
            line["r"] = part["r"].mean()
        line["r in validation"] = part["valid_r"].mean()
        line["ceiling in training"] = part["ceiling"].mean()
        lines.append(line)
    return pd.DataFrame(lines)


def report(slide, table, genes, trained, out):
    """Print the tables, warn of a model that cannot predict, and save correlations and report."""
    measured = "measured" in table.layers
    caption = "mean Pearson r in validation"
    if trained.recipe.get("REFIT"):
        caption += " (of the network before it learnt from the validation spots, too)"
    if measured:
        caption += ", and r against this slide's own log-normalised counts"
        shell.save_csv(out / "correlations.csv", table.var.rename_axis("gene").reset_index())
    columns = ["valid_r", "ceiling", "r"] if measured else ["valid_r", "ceiling"]
    drawn = table.var.loc[genes, columns].rename_axis("gene").reset_index()
    groups = describe_groups(table)
    tables = {caption: groups, "Genes drawn": drawn}
    for name, content in tables.items():
        title = f"{trained.title}{name} ({slide.image})"
        printing.print_table(title, content.round(3).fillna("-"))
    heg = groups["r in validation"][0]
    if np.isnan(heg) or heg < LEAST_R:
        inputs.warn(f"HEG r in validation is {heg:.2f}: these maps may be noise")
    files = "predictions.h5ad, .csv and .geojson, maps.png, report.html"
    print(f"\n{table.n_obs:,} spots x {table.n_vars:,} genes, {out}: {files}")
    made_with = pd.Series(trained.recipe, dtype=str).rename_axis("name").reset_index(name="value")
    tables["Trained with"] = made_with
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
        recipe=shell.recipe_of(globals()),
        warnings=inputs.WARNINGS,
    )


def main():
    inputs.WARNINGS.clear()
    model, trained = read_weights(choose_weights())
    genes = choose_genes(trained)
    slide, positions = choose_slide()
    name = Path(IMAGE).stem if IMAGE else slide.name
    out = choose_folder(slide, name)
    shell.hold_folder(out)
    (out / "correlations.csv").unlink(missing_ok=True)  # of another slide, perhaps
    spots, patches, thumbnail = read_slide(slide, positions, trained.um_per_px, out)
    predicted = predict_patches(model, trained, patches)
    del model, patches  # before as much again is taken to draw and write
    table = assemble(slide, spots, predicted, thumbnail, trained)
    unit = UNITS[trained.recipe["TARGET"]]
    draw_maps(out / "maps.png", table, genes, f"{trained.title}{name}, predicted ({unit})")
    with shell.whole_file(out / "predictions.h5ad") as path:
        table.write_h5ad(path)
    spots = table.obs.reset_index()
    common.save_expression(out / "predictions.csv", spots, predicted, trained.genes)
    shown = exports.choose_measurements(table.to_df(), genes, trained.groups, table.var["valid_r"])
    diameter = SPOT / slide.um_per_px
    exports.write_geojson(out / "predictions.geojson", table.obsm["spatial"], diameter, shown)
    report(slide, table, genes, trained, out)


if __name__ == "__main__":
    shell.run_script(globals())
