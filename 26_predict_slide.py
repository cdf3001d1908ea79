"""Expression maps for a slide that has no expression, or whose own is to be compared.

Question   What would the genes of a trained model look like on this slide?
Reads      WEIGHTS (weights.safetensors of a row of scripts 20 to 23), which say all that is needed; IMAGE; POSITIONS:
           a folder outs/ of Space Ranger, a positions CSV, or nothing: the tissue is found and covered with a grid
Writes     <OUT>/predictions.h5ad, predictions.csv, maps.png, report.html; correlations.csv if the slide has counts;
           <OUT>/slide/, the slide as script 19 reads it
Prints     script 19's lines, the genes that the model predicts best, and their r if the slide has counts
Command    python 26_predict_slide.py --weights weights.safetensors --image slide.tif
Override   python 26_predict_slide.py --weights weights.safetensors --image slide.tif --positions sample/outs
           python 26_predict_slide.py --weights weights.safetensors --image slide.tif --um-per-px 0.25 --genes ALB,GLUL
Time       75 s and 0.9 GB of memory for 26,000 x 25,400 px, 4,919 spots and 3,467 genes (two cores of an AMD EPYC,
           2026-11-24)
"""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import safetensors
import tifffile
import torch
from matplotlib.figure import Figure
from PIL import Image

import common
import runner
from common import InputError, require

# ---------------------------------------------------------------------------------------------- constants
WEIGHTS = ""  # weights.safetensors of a run, or its folder
IMAGE = ""  # the slide: what script 19 reads; empty = outs/spatial/tissue_hires_image.png, which is coarse
POSITIONS = ""  # a folder outs/, a positions CSV, or empty: a hexagonal grid of 100 um over the tissue
MATRIX = ""  # counts beside a positions CSV: a 10x folder or .h5; empty = none. A folder outs/ has its own
UM_PER_PX = 0.0  # of the image; 0 = by the TIFF's resolution tags. A folder outs/ tells it: its spots are 100 um apart
OUT = ""  # folder of the results; empty = runs/<this script>/<the image's name>
GENES = ""  # to be drawn, comma-separated; empty = the six of HEG and HVG that were predicted best in validation

DEVICE = "auto"  # auto, cpu or cuda
PRECISION = "auto"  # auto, bf16, fp16 or fp32
# --------------------------------------------------------------------------------------------------------

NETWORK = {"BACKBONE", "HIDDEN", "TRAINABLE_STAGES", "IMAGE_SIZE", "TTA"}  # of the recipe
FIELDS = ("recipe", "genes", "um_per_px", "patch_size", "groups", "valid_r", "ceiling", "title")
SPOT = 55.0  # um, the diameter that is drawn
LEAST_R = 0.1  # of HEG in validation, below which a model is warned of


def read_weights(path):
    """(model, metadata as a namespace of FIELDS). InputError for another kind, version or network."""
    require(WEIGHTS, "--weights: give the weights.safetensors, or its folder, of a run of scripts 20 to 23")
    path = path / "weights.safetensors" if path.is_dir() else path
    require(path.is_file(), f"--weights {path}: no such file; expected weights.safetensors of a run")
    try:
        with safetensors.safe_open(path, "pt") as file:
            found, state = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found = {name: json.loads(text) for name, text in found.items()}
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise InputError(f"{path}: not a .safetensors file of a run ({error})") from None
    version = found.get("format")
    again = "train it again with this version"
    require(version == common.FORMAT, f"{path}: format {version}, and this version reads {common.FORMAT}: {again}")
    for name in FIELDS:
        require(name in found, f"{path}: its metadata lack {name!r}: {again}")
    meta = SimpleNamespace(**{name: found[name] for name in FIELDS})
    require(meta.patch_size == common.PATCH_SIZE, f"{path}: patches of {meta.patch_size} px; expected 224: {again}")
    whole = isinstance(meta.recipe, dict) and meta.recipe.keys() >= NETWORK
    require(whole, f"{path}: its recipe lacks one of {', '.join(sorted(NETWORK))}: {again}")
    meta.recipe |= {"DEVICE": DEVICE, "PRECISION": PRECISION}
    try:
        model = common.build_model(meta.recipe | {"PRETRAINED": False}, len(meta.genes), 0)
        model.load_state_dict(state)
    except (RuntimeError, KeyError, TypeError):
        raise InputError(f"{path}: not the network of its metadata; one that takes a cluster id or retrieves spots, as "
                         "24's and 25's do, cannot be used here") from None  # fmt: skip
    return model, meta


def read_resolution(path):
    """um per px from a TIFF's tags (Aperio's MPP, OME's PhysicalSizeX, or its resolution)."""
    found = 0.0
    try:
        with tifffile.TiffFile(path) as tiff:
            page, text = tiff.pages[0], f"{tiff.ome_metadata or ''} {tiff.pages[0].description}"
            stated = re.search(r'MPP ?= ?([\d.]+)|PhysicalSizeX="([\d.eE+-]+)"', text)
            unit = page.tags["ResolutionUnit"].value if "ResolutionUnit" in page.tags else 1
            if stated:
                found = float(stated[1] or stated[2])
            elif "XResolution" in page.tags and unit in (2, 3):
                across, of = page.tags["XResolution"].value
                found = {2: 25_400, 3: 10_000}[unit] * of / across
    except (tifffile.TiffFileError, ValueError, TypeError, ZeroDivisionError, OSError):
        pass  # a JPEG or PNG, or tags that say nothing: asked for below
    require(0.05 < found < 20, f"{path}: its resolution is not known (tags say {found:g} um/px): give --um-per-px")
    return found


def prepare_slide(root, meta):
    """Have script 19 make the patches of the slide, and its counts of the model's genes if it has any, in `root`."""
    flags = ["--data-root", root, "--target", "lognorm", "--um-per-px", meta.um_per_px, "--thumbnail"]
    given = {"image": IMAGE, "positions": POSITIONS, "matrix": MATRIX}
    paths = {part: Path(path).resolve() for part, path in given.items() if path}
    spaceranger = "positions" in paths and paths["positions"].is_dir()
    for part, path in paths.items():
        require(path.exists() and (part != "image" or path.is_file()), f"--{part} {given[part]}: no such file")
        require(root.resolve() not in path.parents, f"--{part} {given[part]}: {root} is made anew: keep it elsewhere")
    if spaceranger:
        require(not MATRIX, f"--matrix {MATRIX}: {POSITIONS} has its own")
        require(not UM_PER_PX, f"--um-per-px {UM_PER_PX}: {POSITIONS} tells it, since its spots are 100 um apart")
        require("," not in f"{POSITIONS}{IMAGE}", f"{POSITIONS} {IMAGE}: rename what has a comma, or link to it")
        flags += ["--from-spaceranger", POSITIONS, *(["--images", IMAGE] if IMAGE else ["--use-hires"])]
    else:
        require(not MATRIX or POSITIONS, f"--matrix {MATRIX}: needs the --positions of its spots")
        name = paths["image"].stem
        row = {"tissue_index": 1, "name": name, "donor": name}
        row["um_per_px"] = UM_PER_PX or read_resolution(paths["image"])
    mark = root / "made_by_26_predict_slide"  # what lies beside it may go
    require(not root.exists() or mark.exists(), f"{root} is there and not of this script: choose another --out")
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    mark.touch()
    if not spaceranger:
        for part in given:
            row[part] = f"{part}_{paths[part].name}" if part in paths else ""
            if part in paths:
                (root / row[part]).symlink_to(paths[part])
        common.save_csv(root / "slides.csv", pd.DataFrame([row]))
    if MATRIX or spaceranger:
        common.save_csv(root / "panel.csv", pd.DataFrame({"gene": meta.genes}))
        flags += ["--panel", root / "panel.csv"]
    runner.call_script("19_make_patches_and_csv.py", *map(str, flags))


def assemble(root, predicted, meta):
    """AnnData as scanpy and squidpy draw it: X, obsm["spatial"], uns["spatial"] with the thumbnail; var says how well
    each gene was predicted in validation. layers["measured"] are log-normalised counts, NaN for genes it lacks.
    """
    made = json.loads((root / "dataset" / "meta.json").read_text())
    spots = pd.read_csv(root / "dataset" / "dataset.csv", usecols=common.ID_COLUMNS, dtype={"barcode": str})
    table = anndata.AnnData(predicted, spots.set_index("id"), pd.DataFrame(index=meta.genes))
    table.var["valid_r"], table.var["ceiling"] = (np.array(v, np.float64) for v in (meta.valid_r, meta.ceiling))
    for group, genes in meta.groups.items():
        table.var[group] = table.var_names.isin(genes)
    table.obsm["spatial"] = spots[["pxl_col", "pxl_row"]].to_numpy(np.float64)
    (name, step), row = next(iter(made["px_per_thumbnail_px"].items())), pd.read_csv(root / "slides.csv").iloc[0]
    with Image.open(root / "dataset" / f"thumbnail_{row['tissue_index']}.png") as image:
        thumbnail = np.asarray(image)
    scales = {"tissue_hires_scalef": 1 / step, "spot_diameter_fullres": SPOT / row["um_per_px"]}
    table.uns["spatial"] = {name: {"images": {"hires": thumbnail}, "scalefactors": scales, "metadata": {}}}
    if made["target"]:
        counts = anndata.read_h5ad(root / "dataset" / "counts.h5ad")
        measured = pd.DataFrame(common.log_normalise(counts.X, counts.obs["n_counts"]), columns=counts.var_names)
        table.layers["measured"] = measured.reindex(columns=meta.genes).to_numpy(np.float32)
        table.var["r"] = common.pearson_per_gene(predicted, table.layers["measured"])
    return table


def choose_genes(meta):
    """Names of the genes to be drawn."""
    asked = [gene.strip() for gene in GENES.split(",") if gene.strip()]
    for gene in asked:
        require(gene in meta.genes, f"--genes {gene}: not among the {len(meta.genes)} genes of the model")
    # Of all genes of the panel, the best by validation would be those that chance favoured.
    known = {*meta.groups.get("heg", []), *meta.groups.get("hvg", [])} & {*meta.genes} or meta.genes
    best = pd.Series(meta.valid_r, meta.genes, np.float64).sort_values(ascending=False, na_position="last").index
    return asked or best[best.isin(known)][:6].tolist()


def draw_maps(path, table, genes, title):
    """Rows of H&E and three genes' predicted expression; where it was measured, that below."""
    ((name, slide),) = table.uns["spatial"].items()
    image, scale = slide["images"]["hires"], slide["scalefactors"]["tissue_hires_scalef"]
    x, y = (table.obsm["spatial"] * scale).T
    layers = {"predicted": table.X} | ({"measured": table.layers["measured"]} if "measured" in table.layers else {})
    lines = [(genes[i : i + 3], *layer) for i in range(0, len(genes), 3) for layer in layers.items()]
    height = 2.9 * image.shape[0] / image.shape[1] + 0.4
    figure = Figure(figsize=(14, 0.4 + height * len(lines)), layout="constrained")
    size = (0.9 * slide["scalefactors"]["spot_diameter_fullres"] * scale * 2.6 * 72 / image.shape[1]) ** 2  # pt^2
    for row, (shown, label, values) in zip(figure.subplots(len(lines), 4, squeeze=False), lines, strict=True):
        for ax in row:
            ax.set_axis_off()
        for ax in row[: 1 + len(shown)]:
            ax.imshow(image, alpha=1 if ax is row[0] else 0.25)
        row[0].set_title(name, size=9)
        for ax, gene in zip(row[1:], shown, strict=False):
            at, valid = table.var_names.get_loc(gene), table.var["valid_r"][gene]
            points = ax.scatter(x, y, c=values[:, at], s=max(size, 0.5), linewidths=0)
            figure.colorbar(points, ax=ax, shrink=0.7, format="{x:.3g}")
            known = "not validated" if np.isnan(valid) else f"r {valid:.2f} in validation"
            known += f", ceiling {table.var['ceiling'][gene]:.2f}" if table.var["ceiling"][gene] > 0 else ""
            known = f"r {table.var['r'][gene]:.2f} on this slide" if label == "measured" else known
            ax.set_title(f"{gene}, {label}\n{known}", size=9)
    figure.suptitle(f"{title} (log1p of counts per 10,000)")
    common.save_figure(path, figure, f"{title}: H&E and maps of {', '.join(genes)}")


def describe_groups(table):
    """Mean r of the groups in validation, with the ceiling in training, and against the slide's own log-normalised
    counts where it has any: a DataFrame.
    """
    lines = []
    for group in [g for g in (*map(str.lower, common.GROUPS), "all") if g == "all" or g in table.var]:
        part = table.var[table.var[group]] if group != "all" else table.var
        part = part.dropna(subset="r") if "r" in part else part
        line = {"group": group.upper() if group != "all" else group, "genes": len(part)}
        line |= {"r": part["r"].mean()} if "r" in part else {}
        lines.append(line | {"r in validation": part["valid_r"].mean(), "ceiling in training": part["ceiling"].mean()})
    return pd.DataFrame(lines)


def main():
    model, meta = read_weights(Path(WEIGHTS))
    genes = choose_genes(meta)
    require(IMAGE or (POSITIONS and Path(POSITIONS).is_dir()), "--image: which slide?")
    sample = Path(POSITIONS).resolve()
    stem = Path(IMAGE).stem if IMAGE else (sample.parent if sample.name == "outs" else sample).name
    out = Path(OUT or Path("runs", Path(__file__).stem, stem))
    runner.hold_folder(out)
    (out / "correlations.csv").unlink(missing_ok=True)  # of another slide, perhaps
    slide = out / "slide"
    prepare_slide(slide, meta)
    device, dtype, reason = common.choose_device(meta.recipe)
    print(f"device      {device.type}, {str(dtype).removeprefix('torch.')} ({reason})")
    patches = np.load(slide / "dataset" / "patches.npy", mmap_mode="c", allow_pickle=False)
    patches = common.place_patches(torch.from_numpy(patches), meta.recipe["IMAGE_SIZE"], device)
    model = model.to(device, memory_format=torch.channels_last)
    predicted = common.predict(model, patches, np.arange(len(patches)), dtype=dtype, tta=meta.recipe["TTA"])
    del model, patches  # before as much again is taken to draw and write
    table = assemble(slide, predicted, meta)
    title = f"{meta.title}{stem}, predicted"
    draw_maps(out / "maps.png", table, genes, title)
    with common.whole_file(out / "predictions.h5ad") as path:
        table.write_h5ad(path)
    common.save_expression(out / "predictions.csv", table.obs.reset_index(), predicted, meta.genes)
    best = table.var.loc[genes, [c for c in ("valid_r", "ceiling", "r") if c in table.var]].rename_axis("gene")
    measured, groups = "measured" in table.layers, describe_groups(table)
    caption = "mean Pearson r in validation" + ", and r against this slide's own log-normalised counts" * measured
    tables, where = {caption: groups, "Genes drawn": best.reset_index()}, SimpleNamespace(title=meta.title, root=slide)
    for name, content in tables.items():
        common.print_table(name, where, content.round(3).fillna("-"))
    if measured:
        common.save_csv(out / "correlations.csv", table.var.rename_axis("gene").reset_index())
    if not groups["r in validation"][0] >= LEAST_R:
        print(f"\nwarning: HEG r in validation is {groups['r in validation'][0]:.2f}: these maps may be noise")
    tables["Trained with"] = pd.Series(meta.recipe, dtype=str).rename_axis("name").reset_index(name="value")
    print(f"\n{len(table):,} spots x {table.n_vars:,} genes, {out}: predictions.h5ad and .csv, maps.png, report.html")
    tables = {name: content.replace({np.nan: None}).to_dict("records") for name, content in tables.items()}
    where = SimpleNamespace(data=where, out=out)
    common.finish_run(globals(), where, tables[caption], tables)


if __name__ == "__main__":
    runner.run_script(globals())
