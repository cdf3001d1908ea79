"""Make four small simulated H&E slides with Visium counts and a known truth.

Question   How good can a correlation get on tissue of which everything is known?
Reads      nothing (or, with --geometry DIR, real spot positions and gene names in GSE240429's layout)
Writes     <DATA_ROOT>/slides.csv, image/*.tif, positions and 10x matrices in GSE240429's layout,
           truth/<slide>.h5ad (X: realised rate; layers["visible"]: what an image can show) and simulation.json
Prints     per slide: spots, pixels, counts a spot; then the best mean r of the 50 highest expressed genes
Command    python 18_simulate_slides.py
Override   python 18_simulate_slides.py --spots 2300          (the size of a real slide)
           python 18_simulate_slides.py --geometry DIR        (real positions, 36,601 real gene names)
Time       four default slides: 35 s; one slide of real geometry (2,378 spots, 24,368 x 23,612 px): 4.4 min, 4.6 GiB of
           memory, 2.4 GB of disk (two cores of an AMD EPYC, 2026-11-23)

The image shows zonation, fat, fibrosis, inflammation and nuclear size. Expression follows those fields, plus
smooth fields and spot-to-spot variation that no image shows; counts are negative binomial (gamma-Poisson) with
a depth that is independent of the tissue, and every slide has its own stain and its own fold change per gene.
"""

import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse
import tifffile
from PIL import Image, ImageDraw, ImageFilter
from scipy.ndimage import distance_transform_edt, gaussian_filter, map_coordinates, zoom
from scipy.spatial import cKDTree
from scipy.special import expit
from scipy.stats import norm
from tqdm import tqdm

import common
import runner

# ---------------------------------------------------------------------------------------------- constants
DATA_ROOT = "SIMULATED_data"  # folder to write; must not hold slides already
GEOMETRY = ""  # folder with real positions, barcodes and features; empty = a small hexagonal grid
SPOTS = 140  # spots a slide (without GEOMETRY); a real slide has about 2300
SLIDES = 4  # slides, each of its own simulated donor
SEED = 42

DEPTH = 1000  # median counts a spot over all genes
DEPTH_SD = 0.35  # sd of log depth over spots, independent of the tissue
VISIBLE_SD = 1.0  # sd of log rate that the image shows
HIDDEN_SD = 0.2  # sd of log rate in smooth fields that no image shows
DISPERSION = 0.02  # squared coefficient of variation of the gamma in the negative binomial
SLIDE_SD = 0.25  # sd of a gene's log fold change from slide to slide
# --------------------------------------------------------------------------------------------------------

PITCH = 329  # px between neighbouring spots: 100 um at 0.304 um/px, as in GSE240429
UM_PER_PX = 0.304
SPOT_RADIUS = 90  # px; 55 um diameter
CELL = 16  # px; the tissue fields live on this coarser grid
TILE = 2048  # px; side of the squares that are painted one after the other
HALO = 48  # px painted around a tile, so that objects and blur cross its border seamlessly

# What a gene follows, with real symbols of the human liver. A gene of no programme gets a random one.
PROGRAMMES = {
    "pericentral": "CYP2E1 CYP3A4 GLUL CYP1A2 CYP2C8 CYP2C9 ADH1B ADH4 OAT SLCO1B3 LGR5 TBX3 RHBG AKR1C1 AKR1C4 CYP2A6 "
    "CYP2B6 CES1 PON3 LECT2 RGN ACSM2A",
    "periportal": "HAL ASS1 SDS PCK1 ARG1 ALDOB CPS1 HSD17B6 GLS2 SAA1 SAA2 ORM1 APOA5 HP CRP FGA FGB FGG SERPINA1 "
    "APOA1 ALB GSTZ1 GPT PRAP1 MT1F TFR2 C9 CFHR1",
    "mid-zone": "HAMP IGFBP2 CYP8B1 HAMP2 COX7C MT1X MT2A TF FTL FTH1 GATM BHMT ECHS1 PRDX6 RIDA ALDH1L1 TSKU GGCX H19",
    "fat": "PLIN2 CIDEC CIDEB FABP1 SCD FASN G0S2 PLIN5 CD36 ANGPTL4 APOB ACACA IGFBP1 PLIN4 HMGCS2 CREB3L3",
    "fibrosis": "COL1A1 COL1A2 COL3A1 COL4A1 DCN LUM ACTA2 TAGLN VIM IGFBP7 TIMP1 SPARC BGN VWF SOX9 KRT7 KRT19 ANXA4 "
    "COL18A1 TMSB10 MGP THBS1",
    "interface": "SPP1 EPCAM CD24 CLDN4 TACSTD2 KRT8 KRT18 ANXA2 S100A6 S100A11 LGALS3 CLU",
    "immune": "IGKC IGHM IGHA1 IGHG1 JCHAIN CD74 HLA-A HLA-DRA HLA-DRB1 LYZ C1QA C1QB CD3D CD3E TRAC PTPRC CCL14 "
    "S100A8 S100A9 TMSB4X LY6E CD99 MZB1 CXCL10",
    "nuclear size": "MALAT1 NEAT1 MKI67 TOP2A CCND1 CDKN1A ATF3 FOS JUN EGR1 HSPB1 HSPA1A HSPA1B DNAJB1 UBC MDM2 TP53 "
    "CEBPD RHOB SAT1",
}
HOUSEKEEPING = (
    [f"RPL{i}" for i in (3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 18, 19, 21, 23, 24, 26, 27, 28, 29, 30, 31)]
    + [f"RPL{i}" for i in ("18A", "7A", "13A", "37A", "32", "34", "35", "36", "37", "38", "39", "41", "P0", "P1", "P2")]
    + [f"RPS{i}" for i in ("2", "3", "3A", "5", "6", "7", "8", "9", "12", "13", "14", "15", "16", "17", "18", "19")]
    + [f"RPS{i}" for i in ("20", "21", "23", "24", "25", "27", "28", "29", "4X", "A")]
    + [f"MT-{i}" for i in ("ND1", "ND2", "ND3", "ND4", "ND4L", "ND5", "CO1", "CO2", "CO3", "ATP6", "CYB")]
    + ["UBA52", "EEF1A1", "TPT1", "FAU", "ACTB", "B2M", "GAPDH", "TUBA1B", "CD81", "IFITM3", "P4HB", "SERF2", "CST3"]
    + ["COX7B", "ATP5IF1", "CALR", "PPIA", "HSPA5"]
)
# Optical density of the two dyes in red, green and blue (Ruifrok and Johnston 2001).
HEMATOXYLIN = np.array([0.650, 0.704, 0.286], np.float32)
EOSIN = np.array([0.072, 0.990, 0.105], np.float32)


def hexagonal_grid(spots):
    """Positions table of a hexagonal grid whose innermost `spots` places are in tissue."""
    columns = int(np.ceil(np.sqrt(spots * np.sqrt(3) / 2))) + 2
    rows = int(np.ceil(spots / (columns - 2))) + 2
    row, place = np.divmod(np.arange(rows * columns), columns)
    col = 2 * place + row % 2
    x, y = col * PITCH / 2, row * PITCH * np.sqrt(3) / 2
    # A rounded square: the fourth power lets the tissue fill the corners of the grid without touching them.
    distance = ((x - x.mean()) / np.ptp(x)) ** 4 + ((y - y.mean()) / np.ptp(y)) ** 4
    in_tissue = np.zeros(len(row), int)
    in_tissue[np.argsort(distance, kind="stable")[:spots]] = 1
    barcodes = ["".join("ACGT"[i >> 2 * k & 3] for k in range(8)) + "-1" for i in range(len(row))]
    return pd.DataFrame(
        {
            "barcode": barcodes,
            "in_tissue": in_tissue,
            "array_row": row,
            "array_col": col,
            "pxl_row": np.rint(y + PITCH).astype(int),
            "pxl_col": np.rint(x + PITCH).astype(int),
        }
    )


def read_geometry(folder, slide):
    """Real positions of slide number `slide` (in tissue: those with counts) and the gene table (id, name)."""
    matrices = Path(folder) / "data" / "filtered_expression_matrices" / str(slide)
    path = Path(folder) / "data" / "tissue_pos_matrices" / f"tissue_positions_list_{slide}.csv"
    if not path.is_file():
        raise common.InputError(f"no {path}: --geometry needs positions and 10x tables in GSE240429's layout")
    if not (matrices / "barcodes.tsv").is_file() or not (matrices / "features.tsv").is_file():
        raise common.InputError(f"{matrices}: expected barcodes.tsv and features.tsv")
    table = pd.read_csv(path, header=None, names=common.POSITION_COLUMNS)
    barcodes = (matrices / "barcodes.tsv").read_text().split()
    table["in_tissue"] = table["barcode"].isin(barcodes).astype(int)
    genes = pd.read_csv(matrices / "features.tsv", sep="\t", header=None, names=["id", "name"], usecols=[0, 1])
    return table, genes


def smooth_noise(shape, scale, rng):
    """Gaussian field of unit variance on the cell grid, correlated over about `scale` px."""
    step = max(1, int(scale / CELL / 3))  # drawn on a coarser grid: a wide blur at full size costs minutes
    small = [int(np.ceil(n / step)) + 3 for n in shape]
    field = gaussian_filter(rng.standard_normal(small), scale / CELL / step / 2, mode="wrap")
    field = zoom(field, step, order=1)[: shape[0], : shape[1]]
    return ((field - field.mean()) / field.std()).astype(np.float32)


def tissue_fields(positions, shape, rng):
    """The slide's morphology on the cell grid: {name: (rows, columns) float32 in 0..1} and two nuisance fields."""
    rows, cols = (int(np.ceil(n / CELL)) for n in shape)
    squash = lambda field, middle, width: expit((field - middle) / width)  # noqa: E731
    spacing = 6 * PITCH  # between central veins
    grid = np.mgrid[-1 : shape[0] / spacing + 2, -1 : shape[1] / spacing + 2].reshape(2, -1).T
    grid[:, 1] += 0.5 * (np.rint(grid[:, 0]) % 2)
    veins = (grid + rng.uniform(-0.25, 0.25, grid.shape)) * spacing
    centres = np.stack(np.mgrid[:rows, :cols], -1).reshape(-1, 2) * CELL + CELL / 2
    near, far = cKDTree(veins).query(centres, k=2, workers=-1)[0].T.reshape(2, rows, cols)
    zone = ((near / (near + far)).argsort(axis=None).argsort() / near.size).reshape(rows, cols)
    zone = 1 - zone  # evenly spread: 1 at the central vein, 0 at the lobule's border
    septum = np.exp(-(((far - near) / (0.45 * PITCH)) ** 2))
    tissue = np.ones((rows, cols), bool)
    inside = positions[positions["in_tissue"] == 1]
    tissue[inside["pxl_row"] // CELL, inside["pxl_col"] // CELL] = False
    edge = distance_transform_edt(tissue) * CELL + 60 * smooth_noise((rows, cols), 500, rng)
    fields = {
        "zone": zone,
        "fat": np.maximum(0, 1.4 * norm.cdf(smooth_noise((rows, cols), 2.5 * PITCH, rng)) - 0.4),
        "fibrosis": np.maximum(
            septum * squash(smooth_noise((rows, cols), 4 * PITCH, rng), 0.0, 0.3),
            squash(smooth_noise((rows, cols), 2 * PITCH, rng), 1.6, 0.15),
        ),
        "immune": squash(smooth_noise((rows, cols), 1.8 * PITCH, rng), 0.8, 0.3),
        "size": squash(smooth_noise((rows, cols), 2.5 * PITCH, rng), 0.0, 0.5),
        "gaps": squash(smooth_noise((rows, cols), 1.5 * PITCH, rng), 0.3, 0.4),  # wide sinusoids: no gene follows them
        "stain": 1 + 0.08 * smooth_noise((rows, cols), 1.2 * PITCH, rng),  # uneven section thickness
        "tissue": squash(-edge, -1.1 * PITCH, 12),
    }
    return {name: field.astype(np.float32) for name, field in fields.items()}


def scatter_objects(fields, shape, rng):
    """Everything that is drawn, as {kind: (n, 4) float32 of row, column, half length, half width} and an angle."""

    def scatter(density):  # density: objects per px^2 on the cell grid
        counts = rng.poisson(density * fields["tissue"] * CELL**2)
        cell = np.repeat(np.arange(counts.size), counts.ravel())
        row, col = np.divmod(cell, counts.shape[1])
        points = np.stack([row, col], 1) * CELL + rng.uniform(0, CELL, (len(cell), 2))
        return points.astype(np.float32), {name: field[row, col] for name, field in fields.items()}

    def objects(points, length, width):
        angle = rng.uniform(0, np.pi, len(points))
        wobble = rng.uniform(0.85, 1.15, (len(points), 1))
        return np.column_stack([points, np.column_stack([length, width]) * wobble, angle]).astype(np.float32)

    parenchyma = 1 - np.minimum(1, fields["fibrosis"])
    kinds = {}
    points, at = scatter(1.9e-4 * parenchyma * (1.35 - 0.8 * fields["size"]))
    radius = 7.5 + 9 * at["size"]
    kinds["hepatocyte"] = objects(points, radius, radius * 0.9)
    points, at = scatter(1.6e-3 * fields["immune"] ** 1.5)
    kinds["lymphocyte"] = objects(points, np.full(len(points), 6.5), np.full(len(points), 6.0))
    points, at = scatter(7e-4 * fields["fibrosis"])
    kinds["fibroblast"] = objects(points, np.full(len(points), 16.0), np.full(len(points), 3.0))
    points, at = scatter(1.6e-3 * fields["fibrosis"])
    kinds["fibre"] = objects(points, np.full(len(points), 38.0), np.full(len(points), 1.5))
    points, at = scatter(1.1e-3 * fields["zone"] ** 2 * parenchyma)
    kinds["granule"] = objects(points, np.full(len(points), 3.2), np.full(len(points), 3.2))
    points, at = scatter(4.5e-4 * fields["fat"] * parenchyma)
    radius = rng.gamma(6, 1.9, len(points))
    kinds["droplet"] = objects(points, radius, radius)
    points, at = scatter(2.2e-4 * (0.25 + fields["gaps"]) * parenchyma)
    kinds["sinusoid"] = objects(points, np.full(len(points), 34.0), np.full(len(points), 4.0))
    return kinds


def draw(objects, origin, size):
    """Ellipses of one kind as a blurred mask, (size + 2 HALO) squared float32 in 0..1."""
    side = size + 2 * HALO
    local = objects[:, :2] - (origin - HALO)
    keep = ((local > -HALO) & (local < side + HALO)).all(1)
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    turn = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    circle = np.stack([np.cos(turn), np.sin(turn)])
    angle = objects[keep, 4]
    rotation = np.stack([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]).transpose(2, 0, 1)
    outlines = rotation @ (circle * objects[keep, 2:4, None])  # (n, 2, 12)
    outlines = (outlines + local[keep, ::-1, None]).transpose(0, 2, 1).reshape(len(angle), 2 * len(turn))
    for outline in outlines.tolist():
        pen.polygon(outline, fill=255)
    return np.asarray(mask.filter(ImageFilter.GaussianBlur(1.2)), np.float32) / 255


def paint(path, fields, kinds, shape, rng):
    """Paint the slide tile by tile into an uncompressed TIFF, by Beer and Lambert's law."""
    image = tifffile.memmap(
        path, shape=(*shape, 3), dtype=np.uint8, photometric="rgb", bigtiff=True,
        resolution=(1e4 / UM_PER_PX, 1e4 / UM_PER_PX), resolutionunit="CENTIMETER",
    )  # fmt: skip
    common.reserve_disk(path)
    grain = gaussian_filter(rng.standard_normal((2, 1024, 1024)), (0, 0.8, 0.8), mode="wrap").astype(np.float32)
    shade = rng.normal(1, [0.06, 0.06])  # the slide's own strength of either dye
    tint = rng.normal(0, 0.015, 3).astype(np.float32)
    tiles = [(y, x) for y in range(0, shape[0], TILE) for x in range(0, shape[1], TILE)]
    for y, x in tqdm(tiles, f"paint {path.name}", leave=False, disable=None):
        height, width = min(TILE, shape[0] - y), min(TILE, shape[1] - x)
        size = max(height, width)
        inner = (slice(HALO, HALO + height), slice(HALO, HALO + width))
        mask = {kind: draw(objects, np.array([y, x]), size)[inner] for kind, objects in kinds.items()}
        rows = (np.arange(y, y + height) + 0.5) / CELL - 0.5
        cols = (np.arange(x, x + width) + 0.5) / CELL - 0.5
        field = {name: resample(values, rows, cols) for name, values in fields.items()}
        speckle = np.take(np.take(grain, np.arange(y, y + height) % 1024, 1), np.arange(x, x + width) % 1024, 2)
        nuclei = np.maximum.reduce([0.85 * mask["hepatocyte"], mask["lymphocyte"], 0.95 * mask["fibroblast"]])
        hematoxylin = 0.08 + 0.22 * field["zone"] + 1.15 * nuclei + 0.55 * mask["granule"] + 0.03 * speckle[0]
        eosin = 0.56 - 0.38 * field["zone"] + 0.15 * field["fibrosis"] + 0.30 * mask["fibre"] + 0.05 * speckle[1]
        solid = (1 - 0.95 * np.maximum(mask["droplet"], 0.9 * mask["sinusoid"])) * field["tissue"] * field["stain"]
        for channel in range(3):
            density = shade[0] * hematoxylin * HEMATOXYLIN[channel] + shade[1] * eosin * (EOSIN + tint)[channel]
            image[y : y + height, x : x + width, channel] = 244 * np.exp(-density * solid) + 0.5
    image.flush()


def resample(values, rows, cols):
    """Bilinear (len(rows), len(cols)) read of a cell-grid field at fractional cells."""

    def along(values, places):
        low = np.clip(np.floor(places).astype(int), 0, len(values) - 2)
        part = np.clip(places - low, 0, 1).astype(np.float32)[:, None]
        return values[low] * (1 - part) + values[low + 1] * part

    return along(along(values, rows).T, cols).T


def spot_means(field, spots):
    """Mean of a cell-grid field over every spot's disc, (n,)."""
    disc = gaussian_filter(field, SPOT_RADIUS / 2 / CELL)  # a Gaussian of the disc's own second moment
    at = np.stack([spots["pxl_row"], spots["pxl_col"]]) / CELL - 0.5
    return map_coordinates(disc, at, order=1, mode="nearest")


def gene_table(names, rng):
    """Per gene: log base rate, loadings on the visible programmes (G, P) and on hidden fields (G, 3)."""
    programme = {gene: p for p, genes in enumerate(PROGRAMMES.values()) for gene in genes.split()}
    count = len(PROGRAMMES)
    known = np.array([name in programme or name in HOUSEKEEPING for name in names])
    base = np.where(
        known, rng.normal(0, 0.8, len(names)) + 1.5 * np.isin(names, HOUSEKEEPING), rng.normal(-3.5, 1.6, len(names))
    )
    home = np.array([programme.get(name, 2 if name in HOUSEKEEPING else rng.integers(count)) for name in names])
    visible = rng.normal(0, 0.12, (len(names), count))
    sign = np.where([name in programme for name in names], 1, rng.choice([-1, 1], len(names)))
    visible[np.arange(len(names)), home] += sign * rng.uniform(0.7, 1.3, len(names))
    visible /= np.linalg.norm(visible, axis=1, keepdims=True)
    hidden = rng.normal(0, 1, (len(names), 3))
    hidden /= np.linalg.norm(hidden, axis=1, keepdims=True)
    return base, visible, hidden


def visible_programmes(fields, spots):
    """What the image shows of the eight programmes at each spot, (n, 8), scaled to about unit sd.

    Zones and interfaces are peaks, not slopes: a gene of the middle zone tells the same of either side of it.
    """
    at = {name: spot_means(fields[name], spots) for name in ("zone", "fat", "fibrosis", "immune", "size")}
    peak = lambda field, place, width: np.exp(-(((at[field] - place) / width) ** 2)) / 0.35  # noqa: E731
    return np.stack(
        [
            peak("zone", 0.95, 0.3),
            peak("zone", 0.05, 0.3),
            peak("zone", 0.5, 0.22),
            at["fat"] / 0.3,
            at["fibrosis"] / 0.25,
            peak("fibrosis", 0.35, 0.25),
            at["immune"] / 0.25,
            at["size"] / 0.25,
        ],
        1,
    )


def simulate_counts(fields, spots, genes, shape, rng):
    """Counts (n, G) CSR, realised rate (n, G) and visible log-normalised expression (n, G) of one slide."""
    base, visible, hidden = genes
    shown = VISIBLE_SD * (visible_programmes(fields, spots) @ visible.T)
    cells = fields["zone"].shape
    unseen = np.stack([spot_means(smooth_noise(cells, 2.5 * PITCH, rng), spots) for _ in range(3)], 1)
    own = base + SLIDE_SD * rng.standard_normal(len(base))
    rate = np.exp(own + shown + HIDDEN_SD * (unseen @ hidden.T))
    depth = DEPTH * np.exp(DEPTH_SD * rng.standard_normal((len(spots), 1)))
    rate *= depth / rate.sum(1, keepdims=True)
    if DISPERSION > 0:
        rate *= rng.gamma(1 / DISPERSION, DISPERSION, rate.shape)
    visible = np.exp(own + shown)
    return (
        scipy.sparse.csr_matrix(rng.poisson(rate)),
        rate.astype(np.float32),
        common.log_normalise(visible, visible.sum(1)),
    )


def write_slide(root, slide, name, table, names, genes, rng):
    """Simulate one slide and write its image, positions, matrix and truth. Returns its spots and its truth."""
    shape = tuple(int(table[axis].max() + 3 * PITCH // 2) for axis in ("pxl_row", "pxl_col"))
    spots = table[table["in_tissue"] == 1].reset_index(drop=True)
    fields = tissue_fields(table, shape, rng)
    paint(root / "image" / f"{name}.tif", fields, scatter_objects(fields, shape, rng), shape, rng)
    counts, rate, visible = simulate_counts(fields, spots, genes, shape, rng)
    positions = root / "data" / "tissue_pos_matrices"
    matrices = root / "data" / "filtered_expression_matrices" / str(slide)
    for folder in (positions, matrices, root / "truth"):
        folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(positions / f"tissue_positions_list_{slide}.csv", header=False, index=False)
    (matrices / "barcodes.tsv").write_text("\n".join(spots["barcode"]) + "\n")
    names.assign(kind="Gene Expression").to_csv(matrices / "features.tsv", sep="\t", header=False, index=False)
    scipy.io.mmwrite(matrices / "matrix.mtx", counts.T.tocoo(), field="integer")
    shown = {name: spot_means(field, spots) for name, field in fields.items()}
    truth = anndata.AnnData(
        rate, obs=spots.assign(**shown).set_index("barcode"), var=names.set_index("id"), layers={"visible": visible}
    )
    truth.write_h5ad(root / "truth" / f"{slide}.h5ad")
    depth = np.asarray(counts.sum(1)).ravel()
    print(f"{slide:>5}  {name:8} {len(spots):6} {shape[0]:>7} x {shape[1]:<7} {np.median(depth):10.0f}")
    measured = common.log_normalise(counts, depth)
    heg = np.argsort(-measured.mean(0), kind="stable")[: common.GROUP_SIZE]
    ceiling = common.pearson_per_gene(common.log_normalise(rate, rate.sum(1))[:, heg], measured[:, heg])
    shown = common.pearson_per_gene(visible[:, heg], measured[:, heg])
    return float(np.nanmean(ceiling)), float(np.nanmean(shown))


def main():
    root = Path(DATA_ROOT)
    if (root / "slides.csv").exists():
        raise common.InputError(f"{root / 'slides.csv'} exists already: remove {root} or choose another --data-root")
    runner.hold_folder(root)
    (root / "image").mkdir(parents=True, exist_ok=True)
    tables = [read_geometry(GEOMETRY, i + 1)[0] if GEOMETRY else hexagonal_grid(SPOTS) for i in range(SLIDES)]
    if GEOMETRY:
        names = read_geometry(GEOMETRY, 1)[1]
    else:
        symbols = dict.fromkeys([g for genes in PROGRAMMES.values() for g in genes.split()] + HOUSEKEEPING)
        names = pd.DataFrame({"id": list(symbols), "name": list(symbols)})
    genes = gene_table(names["name"].tolist(), np.random.default_rng(common.seed_of(SEED, "genes")))
    print("SIMULATED slides\nslide  name      spots   rows x columns px   counts/spot (median)")
    rows, best = [], []
    for slide in range(1, SLIDES + 1):
        name = f"SIM_{'ABCDEFGH'[slide - 1]}1" if slide <= 8 else f"SIM_{slide}"
        table = tables[slide - 1]
        best.append(
            write_slide(
                root, slide, name, table, names, genes, np.random.default_rng(common.seed_of(SEED, "slide", slide))
            )
        )
        rows.append(
            {
                "tissue_index": slide,
                "name": name,
                "donor": f"SIM{slide}",
                "image": f"image/{name}.tif",
                "um_per_px": UM_PER_PX,
                "positions": f"data/tissue_pos_matrices/tissue_positions_list_{slide}.csv",
                "matrix": f"data/filtered_expression_matrices/{slide}",
            }
        )
    constants = {key: globals()[key] for key in ("GEOMETRY", "SPOTS", "SLIDES", "SEED", "DEPTH", "DEPTH_SD")}
    constants |= {key: globals()[key] for key in ("VISIBLE_SD", "HIDDEN_SD", "DISPERSION", "SLIDE_SD")}
    (root / "simulation.json").write_text(json.dumps(constants, indent=1) + "\n")
    with common.whole_file(root / "slides.csv") as path:  # last: a folder without it is not a data root
        pd.DataFrame(rows).to_csv(path, index=False)
    ceiling, shown = np.mean(best, axis=0)
    print(f"best mean r of the 50 highest expressed genes, per slide: {ceiling:.3f} against counting noise,")
    print(f"{shown:.3f} from what the image shows\nnext: python 19_make_patches_and_csv.py --data-root {DATA_ROOT}")


if __name__ == "__main__":
    runner.run_script(globals())
