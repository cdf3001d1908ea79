"""Make four small simulated H&E slides with Visium counts and a known truth.

Question   How good can a correlation get on tissue of which everything is known?
Reads      nothing; with --geometry DIR real spot positions and gene names in GSE240429's layout
Writes     <DATA_ROOT>/slides.csv, image/*.tif, positions and 10x matrices in GSE240429's layout,
           truth/<slide>.h5ad (X: realised rate; layers["visible"]: what an image can show)
           and simulation.json
Prints     one row a slide: its number, name, spots, pixels and median counts a spot;
           the best mean r of the 50 highest expressed genes; the next command
Command    python 18_simulate_slides.py
Override   python 18_simulate_slides.py --spots 2300      (the size of a real slide)
           python 18_simulate_slides.py --geometry DIR    (real positions, 36,601 real gene names)
Time       four default slides: 9 s (two idle cores of an AMD EPYC, 2026-11-27); one slide of real
           geometry (2,378 spots, 24,368 x 23,612 px): 4.4 min, 4.6 GiB of memory, 2.4 GB of disk
           (two cores of an AMD EPYC, 2026-11-23, one of them used)

The image shows zonation, fat, fibrosis, inflammation and nuclear size. Expression follows those
fields, plus smooth fields and spot-to-spot variation that no image shows; counts are negative
binomial (gamma-Poisson) with a depth that is independent of the tissue, and every slide has its own
stain and its own fold change per gene.
"""

from study import shell

if __name__ == "__main__":  # Check the command before the slow imports.
    shell.check_command(__file__, files=("GEOMETRY",))


import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse
import tifffile
from PIL import Image, ImageDraw, ImageFilter
from scipy.ndimage import distance_transform_edt, gaussian_filter, map_coordinates, zoom
from scipy.spatial import cKDTree
from scipy.special import expit
from scipy.stats import norm
from tqdm import tqdm

import common
from slides import inputs
from study import constants, files, hashes
from study.errors import InputError

# ---------------------------------------------------------------------------------------- constants
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
# --------------------------------------------------------------------------------------------------

PITCH = 329  # px between neighbouring spots: 100 um at 0.304 um/px, as in GSE240429
UM_PER_PX = 0.304
SPOT_RADIUS = 90  # px; 55 um diameter
CELL = 16  # px; the tissue fields live on this coarser grid
TILE = 2048  # px; side of the squares that threads paint
STRIP = 32  # px; height of the part of a tile whose colours are computed at a time
MOST_THREADS = 4  # that paint tiles; each holds about 50 MB
HALO = 48  # px painted around a tile, so that objects and blur cross its border seamlessly
GRAIN = 1024  # px; side of the square of noise that is repeated over the slide
CORNERS = 12  # corners of the polygon that an ellipse is drawn as
# {layer: {kind of object: its strength}}, where a stronger kind covers a weaker one.
LAYERS = {
    "nuclei": {"hepatocyte": 0.85, "fibroblast": 0.95, "lymphocyte": 1},
    "fibres": {"fibre": 1},
    "granules": {"granule": 1},
    "holes": {"sinusoid": 0.9, "droplet": 1},
}

# What a gene follows, with real symbols of the human liver. Other genes follow one at random.
PROGRAMMES = {
    "pericentral": "CYP2E1 CYP3A4 GLUL CYP1A2 CYP2C8 CYP2C9 ADH1B ADH4 OAT SLCO1B3 LGR5 TBX3 RHBG "
    "AKR1C1 AKR1C4 CYP2A6 CYP2B6 CES1 PON3 LECT2 RGN ACSM2A",
    "periportal": "HAL ASS1 SDS PCK1 ARG1 ALDOB CPS1 HSD17B6 GLS2 SAA1 SAA2 ORM1 APOA5 HP CRP FGA "
    "FGB FGG SERPINA1 APOA1 ALB GSTZ1 GPT PRAP1 MT1F TFR2 C9 CFHR1",
    "mid-zone": "HAMP IGFBP2 CYP8B1 HAMP2 COX7C MT1X MT2A TF FTL FTH1 GATM BHMT ECHS1 PRDX6 RIDA "
    "ALDH1L1 TSKU GGCX H19",
    "fat": "PLIN2 CIDEC CIDEB FABP1 SCD FASN G0S2 PLIN5 CD36 ANGPTL4 APOB ACACA IGFBP1 PLIN4 "
    "HMGCS2 CREB3L3",
    "fibrosis": "COL1A1 COL1A2 COL3A1 COL4A1 DCN LUM ACTA2 TAGLN VIM IGFBP7 TIMP1 SPARC BGN VWF "
    "SOX9 KRT7 KRT19 ANXA4 COL18A1 TMSB10 MGP THBS1",
    "interface": "SPP1 EPCAM CD24 CLDN4 TACSTD2 KRT8 KRT18 ANXA2 S100A6 S100A11 LGALS3 CLU",
    "immune": "IGKC IGHM IGHA1 IGHG1 JCHAIN CD74 HLA-A HLA-DRA HLA-DRB1 LYZ C1QA C1QB CD3D CD3E "
    "TRAC PTPRC CCL14 S100A8 S100A9 TMSB4X LY6E CD99 MZB1 CXCL10",
    "nuclear size": "MALAT1 NEAT1 MKI67 TOP2A CCND1 CDKN1A ATF3 FOS JUN EGR1 HSPB1 HSPA1A HSPA1B "
    "DNAJB1 UBC MDM2 TP53 CEBPD RHOB SAT1",
}
MID_ZONE = list(PROGRAMMES).index("mid-zone")  # the programme of the housekeeping genes
HOUSEKEEPING = (
    "RPL3 RPL4 RPL5 RPL6 RPL7 RPL8 RPL9 RPL10 RPL11 RPL12 RPL13 RPL14 RPL15 RPL17 RPL18 RPL19 "
    "RPL21 RPL23 RPL24 RPL26 RPL27 RPL28 RPL29 RPL30 RPL31 RPL18A RPL7A RPL13A RPL37A RPL32 "
    "RPL34 RPL35 RPL36 RPL37 RPL38 RPL39 RPL41 RPLP0 RPLP1 RPLP2 RPS2 RPS3 RPS3A RPS5 RPS6 RPS7 "
    "RPS8 RPS9 RPS12 RPS13 RPS14 RPS15 RPS16 RPS17 RPS18 RPS19 RPS20 RPS21 RPS23 RPS24 RPS25 "
    "RPS27 RPS28 RPS29 RPS4X RPSA MT-ND1 MT-ND2 MT-ND3 MT-ND4 MT-ND4L MT-ND5 MT-CO1 MT-CO2 "
    "MT-CO3 MT-ATP6 MT-CYB UBA52 EEF1A1 TPT1 FAU ACTB B2M GAPDH TUBA1B CD81 IFITM3 P4HB SERF2 "
    "CST3 COX7B ATP5IF1 CALR PPIA HSPA5"
)
# Optical density of the two dyes in red, green and blue.
HEMATOXYLIN, EOSIN, _ = np.array(common.DYES, np.float32)


# ----------------------------------------------------------------------------------------- geometry
def hexagonal_grid(spots):
    """Positions table of a hexagonal grid whose innermost `spots` places are in tissue."""
    columns = int(np.ceil(np.sqrt(spots * np.sqrt(3) / 2))) + 2
    rows = int(np.ceil(spots / (columns - 2))) + 2
    row, place = np.divmod(np.arange(rows * columns), columns)
    col = 2 * place + row % 2
    x = col * PITCH / 2
    y = row * PITCH * np.sqrt(3) / 2
    # A rounded square: the fourth power lets the tissue fill the corners of the grid without
    # touching them.
    distance = ((x - x.mean()) / np.ptp(x)) ** 4 + ((y - y.mean()) / np.ptp(y)) ** 4
    in_tissue = np.zeros(len(row), int)
    in_tissue[np.argsort(distance, kind="stable")[:spots]] = 1
    return pd.DataFrame(
        {
            "barcode": [barcode_of(number) for number in range(len(row))],
            "in_tissue": in_tissue,
            "array_row": row,
            "array_col": col,
            "pxl_row": np.rint(y + PITCH).astype(int),
            "pxl_col": np.rint(x + PITCH).astype(int),
        }
    )


def barcode_of(number):
    """A barcode of eight letters: the number in base 4, its last digit first."""
    digits = [number // 4**place % 4 for place in range(8)]
    return "".join("ACGT"[digit] for digit in digits) + "-1"


def read_geometry(folder, slide):
    """(positions, genes) of real slide number `slide`; in tissue are the spots with counts.

    Genes have the columns id, name. Raises InputError where `folder` lacks a file.
    """
    matrices = Path(folder, "data", "filtered_expression_matrices", str(slide))
    positions = Path(folder, "data", "tissue_pos_matrices", f"tissue_positions_list_{slide}.csv")
    if not positions.is_file():
        raise InputError(
            f"no {positions}: --geometry needs positions and 10x tables in GSE240429's layout"
        )
    if not (matrices / "barcodes.tsv").is_file() or not (matrices / "features.tsv").is_file():
        raise InputError(f"{matrices}: expected barcodes.tsv and features.tsv")
    table = pd.read_csv(positions, header=None, names=common.POSITION_COLUMNS)
    barcodes = (matrices / "barcodes.tsv").read_text().split()
    table["in_tissue"] = table["barcode"].isin(barcodes).astype(int)
    genes = pd.read_csv(matrices / "features.tsv", sep="\t", header=None, usecols=[0, 1])
    return table, genes.set_axis(["id", "name"], axis=1)


def choose_geometry():
    """([positions table of each slide], table of the genes' id and name)."""
    if GEOMETRY:
        tables, genes = zip(
            *(read_geometry(GEOMETRY, n) for n in range(1, SLIDES + 1)), strict=True
        )
        return tables, genes[0]
    symbols = list(dict.fromkeys(" ".join([*PROGRAMMES.values(), HOUSEKEEPING]).split()))
    return [hexagonal_grid(SPOTS)] * SLIDES, pd.DataFrame({"id": symbols, "name": symbols})


# ------------------------------------------------------------------------------------------- tissue
def smooth_noise(shape, scale, rng):
    """Gaussian field of unit variance on the cell grid, correlated over about `scale` px."""
    # Drawn on a coarser grid, since a wide blur at full size costs minutes.
    step = max(1, int(scale / CELL / 3))
    small = [int(np.ceil(n / step)) + 3 for n in shape]
    field = gaussian_filter(rng.standard_normal(small), scale / CELL / step / 2, mode="wrap")
    field = zoom(field, step, order=1)[: shape[0], : shape[1]]
    return ((field - field.mean()) / field.std()).astype(np.float32)


def squash(field, middle, width):
    """The field in 0..1, with a soft step of `width` at `middle`."""
    return expit((field - middle) / width)


def tissue_fields(positions, shape, rng):
    """The slide's morphology on the cell grid: {name: (rows, columns) float32}.

    Values are in 0..1, but those of "stain", the section's thickness, which lie around 1. "gaps"
    and "stain" are nuisances that no gene follows. `shape` is the image's (rows, columns) in px.
    """
    cells = tuple(int(np.ceil(n / CELL)) for n in shape)
    zone, septum = lobules(cells, shape, rng)
    edge = distance_to_spots(positions, cells) + 60 * smooth_noise(cells, 500, rng)
    fat = 1.4 * norm.cdf(smooth_noise(cells, 2.5 * PITCH, rng)) - 0.4
    septa = septum * squash(smooth_noise(cells, 4 * PITCH, rng), 0.0, 0.3)
    scars = squash(smooth_noise(cells, 2 * PITCH, rng), 1.6, 0.15)
    fields = {
        "zone": zone,
        "fat": np.maximum(0, fat),
        "fibrosis": np.maximum(septa, scars),
        "immune": squash(smooth_noise(cells, 1.8 * PITCH, rng), 0.8, 0.3),
        "size": squash(smooth_noise(cells, 2.5 * PITCH, rng), 0.0, 0.5),
        "gaps": squash(smooth_noise(cells, 1.5 * PITCH, rng), 0.3, 0.4),
        "stain": 1 + 0.08 * smooth_noise(cells, 1.2 * PITCH, rng),
        "tissue": squash(-edge, -1.1 * PITCH, 12),
    }
    return {name: field.astype(np.float32) for name, field in fields.items()}


def lobules(cells, shape, rng):
    """(zone, septum) on the cell grid, from central veins on a jittered hexagonal grid.

    Zone is 1 at a central vein and 0 at the lobule's border, evenly spread in between; septum is 1
    on the border between two lobules.
    """
    spacing = 6 * PITCH  # between central veins
    reach = [np.arange(-1, n / spacing + 2) for n in shape]
    grid = np.stack(np.meshgrid(*reach, indexing="ij"), -1).reshape(-1, 2)
    grid[:, 1] += 0.5 * (np.rint(grid[:, 0]) % 2)
    veins = (grid + rng.uniform(-0.25, 0.25, grid.shape)) * spacing
    corners = np.stack(np.mgrid[: cells[0], : cells[1]], -1).reshape(-1, 2) * CELL
    distances, _ = cKDTree(veins).query(corners + CELL / 2, k=2, workers=-1)
    near, far = distances.T.reshape(2, *cells)
    outwards = near / (near + far)
    rank = outwards.argsort(axis=None).argsort()
    zone = 1 - (rank / rank.size).reshape(cells)
    septum = np.exp(-(((far - near) / (0.45 * PITCH)) ** 2))
    return zone, septum


def distance_to_spots(positions, cells):
    """px from each cell to the next spot in tissue."""
    inside = positions[positions["in_tissue"] == 1]
    empty = np.ones(cells, bool)
    empty[inside["pxl_row"] // CELL, inside["pxl_col"] // CELL] = False
    return distance_transform_edt(empty) * CELL


# -------------------------------------------------------------------------------------------- image
def scatter_objects(fields, rng):
    """Everything that is drawn, {kind: (n, 5) float32}.

    Columns are row, column, half length, half width (px) and angle (radians).
    """
    parenchyma = 1 - np.minimum(1, fields["fibrosis"])
    kinds = {}
    density = 1.9e-4 * parenchyma * (1.35 - 0.8 * fields["size"])
    points, cells = scatter(density, fields["tissue"], rng)
    radius = 7.5 + 9 * fields["size"][cells]
    kinds["hepatocyte"] = ellipses(points, radius, radius * 0.9, rng)
    points, _ = scatter(1.6e-3 * fields["immune"] ** 1.5, fields["tissue"], rng)
    kinds["lymphocyte"] = ellipses(points, 6.5, 6.0, rng)
    points, _ = scatter(7e-4 * fields["fibrosis"], fields["tissue"], rng)
    kinds["fibroblast"] = ellipses(points, 16.0, 3.0, rng)
    points, _ = scatter(1.6e-3 * fields["fibrosis"], fields["tissue"], rng)
    kinds["fibre"] = ellipses(points, 38.0, 1.5, rng)
    points, _ = scatter(1.1e-3 * fields["zone"] ** 2 * parenchyma, fields["tissue"], rng)
    kinds["granule"] = ellipses(points, 3.2, 3.2, rng)
    points, _ = scatter(4.5e-4 * fields["fat"] * parenchyma, fields["tissue"], rng)
    radius = rng.gamma(6, 1.9, len(points))
    kinds["droplet"] = ellipses(points, radius, radius, rng)
    points, _ = scatter(2.2e-4 * (0.25 + fields["gaps"]) * parenchyma, fields["tissue"], rng)
    kinds["sinusoid"] = ellipses(points, 34.0, 4.0, rng)
    return kinds


def scatter(density, tissue, rng):
    """(places (n, 2) float32 in px, their cells) of objects at `density` per px^2 of tissue."""
    counts = rng.poisson(density * tissue * CELL**2)
    number = np.repeat(np.arange(counts.size), counts.ravel())
    row, col = np.divmod(number, counts.shape[1])
    corners = np.stack([row, col], 1) * CELL
    points = corners + rng.uniform(0, CELL, (len(number), 2))
    return points.astype(np.float32), (row, col)


def ellipses(points, length, width, rng):
    """(n, 5) float32 objects at the points, turned at random, of about these half axes in px."""
    angle = rng.uniform(0, np.pi, len(points))
    wobble = rng.uniform(0.85, 1.15, len(points))
    return np.column_stack([points, length * wobble, width * wobble, angle]).astype(np.float32)


def draw(kinds, layer, rows, columns):
    """The objects of a layer as a blurred mask, (len(rows), len(columns)) uint8."""
    height = len(rows) + 2 * HALO
    width = len(columns) + 2 * HALO
    canvas = Image.new("L", (width, height))
    pen = ImageDraw.Draw(canvas)
    for kind, strength in LAYERS[layer].items():
        local = kinds[kind][:, :2] - (np.array([rows[0], columns[0]]) - HALO)
        near = ((local > -HALO) & (local < [height + HALO, width + HALO])).all(1)
        for outline in outlines(kinds[kind][near], local[near]).tolist():
            pen.polygon(outline, fill=round(255 * strength))
    # A box of the same width as Pillow's Gaussian, which is three boxes, one after the other.
    blurred = np.asarray(canvas.filter(ImageFilter.BoxBlur(1.6)))
    return blurred[HALO:-HALO, HALO:-HALO]


def outlines(objects, centres):
    """Polygons of objects at centres (n, 2) row, column: (n, 2 x CORNERS), x and y in turn."""
    turn = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
    circle = np.stack([np.cos(turn), np.sin(turn)])
    cos, sin = np.cos(objects[:, 4]), np.sin(objects[:, 4])
    rotation = np.stack([[cos, -sin], [sin, cos]]).transpose(2, 0, 1)  # (n, 2, 2)
    around = rotation @ (circle * objects[:, 2:4, None])  # (n, 2, CORNERS)
    corners = around + centres[:, ::-1, None]
    return corners.transpose(0, 2, 1).reshape(len(objects), 2 * CORNERS)


def paint(path, fields, kinds, shape, rng):
    """Paint the slide tile by tile into an uncompressed TIFF, by Beer and Lambert's law.

    Nothing is drawn at random for a tile, so that the number of threads changes nothing.
    """
    image = tifffile.memmap(
        path,
        shape=(*shape, 3),
        dtype=np.uint8,
        photometric="rgb",
        bigtiff=True,
        resolution=(1e4 / UM_PER_PX, 1e4 / UM_PER_PX),
        resolutionunit="CENTIMETER",
    )
    files.reserve_disk(path)
    grain = rng.standard_normal((2, GRAIN, GRAIN))
    grain = gaussian_filter(grain, (0, 0.8, 0.8), mode="wrap").astype(np.float32)
    strength = rng.normal(1, [0.06, 0.06])  # of this slide's two dyes
    eosin_colour = EOSIN + rng.normal(0, 0.015, 3).astype(np.float32)

    def paint_tile(corner):
        top, left = corner
        rows = np.arange(top, min(top + TILE, shape[0]))
        columns = np.arange(left, min(left + TILE, shape[1]))
        masks = {layer: draw(kinds, layer, rows, columns) for layer in LAYERS}
        # Strips stay in the processor's caches, where a tile takes twice as long.
        for part in common.parts_of(len(rows), STRIP):
            drawn = {layer: mask[part] for layer, mask in masks.items()}
            hematoxylin, eosin, solid = stain_strip(fields, drawn, grain, rows[part], columns)
            strip = image[top : top + len(rows), left : left + len(columns)][part]
            for channel in range(3):
                density = strength[0] * hematoxylin * HEMATOXYLIN[channel]
                density = density + strength[1] * eosin * eosin_colour[channel]
                light = 244 * np.exp(-density * solid)
                strip[:, :, channel] = light + 0.5

    tiles = list(itertools.product(*(range(0, n, TILE) for n in shape)))
    with ThreadPoolExecutor(min(shell.count_cores(), MOST_THREADS)) as threads:
        painted = threads.map(paint_tile, tiles)
        for _ in tqdm(painted, f"paint {path.name}", len(tiles), leave=False, disable=None):
            pass
    image.flush()


def stain_strip(fields, drawn, grain, rows, columns):
    """(hematoxylin, eosin, solid), each (len(rows), len(columns)) float32, of the masks `drawn`.

    The amount of either dye, and how much of the light's path goes through tissue.
    """
    mask = {layer: values.astype(np.float32) / 255 for layer, values in drawn.items()}
    field = {name: resample(values, rows, columns) for name, values in fields.items()}
    speckle = grain.take(rows % GRAIN, 1).take(columns % GRAIN, 2)
    hematoxylin = 0.08 + 0.22 * field["zone"] + 1.15 * mask["nuclei"] + 0.55 * mask["granules"]
    hematoxylin = hematoxylin + 0.03 * speckle[0]
    eosin = 0.56 - 0.38 * field["zone"] + 0.15 * field["fibrosis"] + 0.30 * mask["fibres"]
    eosin = eosin + 0.05 * speckle[1]
    solid = (1 - 0.95 * mask["holes"]) * field["tissue"] * field["stain"]
    return hematoxylin, eosin, solid


def resample(values, rows, columns):
    """Bilinear (len(rows), len(columns)) read of a cell-grid field at these px."""
    return interpolate(interpolate(values, rows, 0), columns, 1)


def interpolate(values, pixels, axis):
    """Linear read of an axis of a cell-grid field at these px."""
    places = (pixels + 0.5) / CELL - 0.5
    low = np.clip(np.floor(places).astype(int), 0, values.shape[axis] - 2)
    part = np.clip(places - low, 0, 1).astype(np.float32)
    part = part[:, None] if axis == 0 else part
    return values.take(low, axis) * (1 - part) + values.take(low + 1, axis) * part


# --------------------------------------------------------------------------------------- expression
def spot_means(field, spots):
    """Mean of a cell-grid field over every spot's disc, (n,)."""
    # A Gaussian of the disc's own second moment stands for the disc.
    disc = gaussian_filter(field, SPOT_RADIUS / 2 / CELL)
    places = np.stack([spots["pxl_row"], spots["pxl_col"]]) / CELL - 0.5
    return map_coordinates(disc, places, order=1, mode="nearest")


def gene_table(names, rng):
    """Log base rates (G,), loadings on visible programmes (G, P) and on hidden fields (G, 3)."""
    count = len(PROGRAMMES)
    programme = {}
    for number, genes in enumerate(PROGRAMMES.values()):
        programme |= dict.fromkeys(genes.split(), number)
    in_programme = np.array([name in programme for name in names])
    housekeeping = np.isin(names, HOUSEKEEPING.split())
    base_known = rng.normal(0, 0.8, len(names)) + 1.5 * housekeeping
    base_other = rng.normal(-3.5, 1.6, len(names))
    base = np.where(in_programme | housekeeping, base_known, base_other)
    home = []
    for name, steady in zip(names, housekeeping, strict=True):
        # Drawn where it is not used, too, so that one gene's programme moves no other gene's.
        drawn = MID_ZONE if steady else rng.integers(count)
        home.append(programme.get(name, drawn))
    visible = rng.normal(0, 0.12, (len(names), count))
    sign = np.where(in_programme, 1, rng.choice([-1, 1], len(names)))
    visible[np.arange(len(names)), home] += sign * rng.uniform(0.7, 1.3, len(names))
    visible /= np.linalg.norm(visible, axis=1, keepdims=True)
    hidden = rng.normal(0, 1, (len(names), 3))
    hidden /= np.linalg.norm(hidden, axis=1, keepdims=True)
    return base, visible, hidden


def visible_programmes(fields, spots):
    """What the image shows of the programmes at each spot, (n, P), scaled to about unit sd.

    Zones and interfaces are peaks, not slopes: a gene of the middle zone tells the same of either
    side of it.
    """
    zone = spot_means(fields["zone"], spots)
    fibrosis = spot_means(fields["fibrosis"], spots)
    activity = {
        "pericentral": peak(zone, 0.95, 0.3),
        "periportal": peak(zone, 0.05, 0.3),
        "mid-zone": peak(zone, 0.5, 0.22),
        "fat": spot_means(fields["fat"], spots) / 0.3,
        "fibrosis": fibrosis / 0.25,
        "interface": peak(fibrosis, 0.35, 0.25),
        "immune": spot_means(fields["immune"], spots) / 0.25,
        "nuclear size": spot_means(fields["size"], spots) / 0.25,
    }
    return np.stack([activity[programme] for programme in PROGRAMMES], 1)


def peak(values, place, width):
    """A bell around `place`, scaled as visible_programmes are."""
    return np.exp(-(((values - place) / width) ** 2)) / 0.35


def simulate_counts(fields, spots, genes, rng):
    """(counts (n, G) CSR, realised rate (n, G), visible log-normalised expression (n, G))."""
    base, visible, hidden = genes
    shown = VISIBLE_SD * (visible_programmes(fields, spots) @ visible.T)
    cells = fields["zone"].shape
    unseen = [spot_means(smooth_noise(cells, 2.5 * PITCH, rng), spots) for _ in hidden.T]
    unseen = np.stack(unseen, 1)  # (n, 3)
    slide_base = base + SLIDE_SD * rng.standard_normal(len(base))
    rate = np.exp(slide_base + shown + HIDDEN_SD * (unseen @ hidden.T))
    depth = DEPTH * np.exp(DEPTH_SD * rng.standard_normal((len(spots), 1)))
    rate *= depth / rate.sum(1, keepdims=True)
    if DISPERSION > 0:
        rate *= rng.gamma(1 / DISPERSION, DISPERSION, rate.shape)
    counts = scipy.sparse.csr_matrix(rng.poisson(rate))
    visible_rate = np.exp(slide_base + shown)
    visible_lognorm = common.log_normalise(visible_rate, visible_rate.sum(1))
    return counts, rate.astype(np.float32), visible_lognorm


def best_r(counts, rate, visible):
    """Mean r of the 50 genes of the highest expression, against the measured counts.

    Returns (r of knowing each spot's rate, r of knowing what the image shows).
    """
    measured = common.log_normalise(counts, np.asarray(counts.sum(1)).ravel())
    heg = np.argsort(-measured.mean(0), kind="stable")[: common.GROUP_SIZE]
    rate = common.log_normalise(rate, rate.sum(1))
    ceiling = common.pearson_per_gene(rate[:, heg], measured[:, heg])
    image_ceiling = common.pearson_per_gene(visible[:, heg], measured[:, heg])
    return float(np.nanmean(ceiling)), float(np.nanmean(image_ceiling))


# -------------------------------------------------------------------------------------------- files
def make_manifest_row(number):
    """A slide's row of slides.csv."""
    # Called as the sections on a chip are, or by number where the chip's letters end.
    name = f"SIM_{'ABCDEFGH'[number - 1]}1" if number <= 8 else f"SIM_{number}"
    return {
        "tissue_index": number,
        "name": name,
        "donor": f"SIM{number}",
        "image": f"image/{name}.tif",
        "um_per_px": UM_PER_PX,
        "positions": f"data/tissue_pos_matrices/tissue_positions_list_{number}.csv",
        "matrix": f"data/filtered_expression_matrices/{number}",
    }


def write_slide(root, slide, table, names, genes, rng):
    """Simulate one slide, write its image, positions, matrix and truth, and print its line.

    `slide` is its row of slides.csv, `table` its positions, `names` the genes' ids and names, and
    `genes` what gene_table gives. Returns best_r of the slide.
    """
    shape = tuple(int(table[axis].max() + 3 * PITCH // 2) for axis in ("pxl_row", "pxl_col"))
    spots = table[table["in_tissue"] == 1].reset_index(drop=True)
    fields = tissue_fields(table, shape, rng)
    paint(root / slide["image"], fields, scatter_objects(fields, rng), shape, rng)
    counts, rate, visible = simulate_counts(fields, spots, genes, rng)
    (root / slide["positions"]).parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(root / slide["positions"], header=False, index=False)
    inputs.write_10x_folder(root / slide["matrix"], counts, spots["barcode"], names)
    morphology = {name: spot_means(field, spots) for name, field in fields.items()}
    truth = anndata.AnnData(
        rate,
        obs=spots.assign(**morphology).set_index("barcode"),
        var=names.set_index("id"),
        layers={"visible": visible},
    )
    truth.write_h5ad(root / "truth" / f"{slide['tissue_index']}.h5ad")
    size = f"{shape[0]:>7} x {shape[1]:<7}"
    depth = np.median(np.asarray(counts.sum(1)))
    print(f"{slide['tissue_index']:>5}  {slide['name']:8} {len(spots):6} {size} {depth:10.0f}")
    return best_r(counts, rate, visible)


def main():
    root = Path(DATA_ROOT)
    if (root / "slides.csv").exists():
        raise InputError(
            f"{root / 'slides.csv'} exists already: remove {root} or choose another --data-root"
        )
    tables, names = choose_geometry()
    files.hold_folder(root)
    for folder in ("image", "truth"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(hashes.seed_of(SEED, "genes"))
    genes = gene_table(names["name"].tolist(), rng)
    print("SIMULATED slides")
    print("slide  name      spots   rows x columns px   counts/spot (median)")
    slides = [make_manifest_row(number) for number in range(1, SLIDES + 1)]
    best = []
    for slide, table in zip(slides, tables, strict=True):
        rng = np.random.default_rng(hashes.seed_of(SEED, "slide", slide["tissue_index"]))
        best.append(write_slide(root, slide, table, names, genes, rng))
    made_with = {name: globals()[name] for name in constants.read_comments(globals())}
    del made_with["DATA_ROOT"]
    files.save_json(root / "simulation.json", made_with)
    files.save_csv(root / "slides.csv", pd.DataFrame(slides))  # last: it makes this a data root
    ceiling, image_ceiling = np.mean(best, axis=0)
    what = "best mean r of the 50 highest expressed genes, per slide"
    print(f"{what}: {ceiling:.3f} against counting noise,")
    print(f"{image_ceiling:.3f} from what the image shows")
    print(f"next: python 19_make_patches_and_csv.py --data-root {DATA_ROOT}")


if __name__ == "__main__":
    shell.run_script(globals())
