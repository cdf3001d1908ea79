"""Script 18: geometry, counts and truth are what they claim, and the slide is painted without
seams.
"""

import anndata
import numpy as np
import pandas as pd
import pytest
import tifffile
from conftest import REPOSITORY, SHARED, load_script, stdout_of

import common
from slides.counts import read_matrix
from slides.positions import read_positions
from study import hashes, shell


def test_layout_is_gse240429s(simulated):
    slides = pd.read_csv(simulated / "slides.csv")
    assert slides["tissue_index"].tolist() == [1, 2, 3, 4]
    assert slides["um_per_px"].unique().tolist() == [0.304]
    table = read_positions(simulated / slides["positions"][0])
    inside = table[table["in_tissue"] == 1]
    assert len(inside) == 10
    points = inside[["pxl_row", "pxl_col"]].to_numpy()
    distances = np.hypot(*(points[:, None] - points).transpose(2, 0, 1))
    np.fill_diagonal(distances, np.inf)
    assert np.median(distances.min(1)) == pytest.approx(329, abs=2)
    # Visium's hexagonal index.
    assert ((inside["array_row"] + inside["array_col"]) % 2 == 0).all()


def test_the_published_gene_groups_are_among_the_genes(simulated):
    path = simulated / "data/filtered_expression_matrices/1/features.tsv"
    genes = set(pd.read_csv(path, sep="\t", header=None)[1])
    lists = pd.read_csv(REPOSITORY / "GSE240429_data" / "gene_sets.csv")
    assert set(common.MARKER_GENES) <= genes
    assert lists[lists["group"] == "HEG"]["gene"].isin(genes).mean() > 0.9


def test_counts_are_poisson_around_the_realised_rate(simulated):
    counts = read_matrix(simulated / "data/filtered_expression_matrices/2")
    truth = anndata.read_h5ad(simulated / "truth/2.h5ad")
    assert counts.obs_names.tolist() == truth.obs_names.tolist()
    assert counts.var_names.tolist() == truth.var_names.tolist()
    rate = truth.X
    z = ((counts.X.toarray() - rate) / np.sqrt(rate))[rate > 5]
    assert abs(z.mean()) < 0.1
    assert z.std() == pytest.approx(1, abs=0.1)
    assert truth.layers["visible"].shape == rate.shape
    assert {"zone", "fat", "fibrosis", "immune"} <= set(truth.obs.columns)


def paint(folder, monkeypatch, tile, strip, threads):
    """The pixels of one small slide, painted in tiles and strips of these sizes."""
    script, shape = load_script("18"), (1200, 1300)
    script.TILE, script.STRIP, script.MOST_THREADS = tile, strip, threads
    monkeypatch.setattr(shell, "count_cores", lambda: threads)
    rng = np.random.default_rng(hashes.seed_of(0))
    fields = script.tissue_fields(script.hexagonal_grid(4), shape, rng)
    path = folder / f"{tile}_{strip}_{threads}.tif"
    script.paint(path, fields, script.scatter_objects(fields, rng), shape, rng)
    pixels = tifffile.imread(path).astype(int)
    assert pixels.shape == (*shape, 3)
    return pixels


def test_tiles_join_without_a_seam(tmp_path, monkeypatch):
    small, large = (paint(tmp_path, monkeypatch, tile, 32, 1) for tile in (256, 2048))
    assert np.abs(small - large).max() <= 3


def test_strips_and_threads_change_no_pixel(tmp_path, monkeypatch):
    expected = paint(tmp_path, monkeypatch, 700, 32, 1)
    for strip, threads in ((700, 1), (32, 3)):
        np.testing.assert_array_equal(paint(tmp_path, monkeypatch, 700, strip, threads), expected)


@pytest.mark.slow
def test_the_ceiling_of_the_default_slides_is_not_easy(tmp_path):
    stdout = stdout_of("18", data_root=tmp_path / "SIMULATED_data")
    ceiling = float(stdout.split("per slide: ")[1].split()[0])
    assert 0.75 <= ceiling <= 0.9


@pytest.mark.data
@pytest.mark.skipif(not (SHARED / "gse240429").is_dir(), reason="shared/gse240429 is not there")
def test_real_geometry_gives_real_positions_and_names(tmp_path, monkeypatch):
    script = load_script("18")
    table, genes = script.read_geometry(SHARED / "gse240429", 3)
    assert table["in_tissue"].sum() == 2277
    assert len(genes) == 36601
    random = np.random.default_rng(hashes.seed_of(0))
    base, visible, hidden = script.gene_table(genes["name"].tolist(), random)
    assert base.shape == (36601,)
    assert visible.shape[0] == hidden.shape[0] == 36601
