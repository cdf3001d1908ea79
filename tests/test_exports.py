"""Predictions as other programs read them."""

import json
import warnings
from importlib.util import find_spec

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy
import tifffile
from conftest import edit_manifest
from matplotlib import pyplot
from test_files import make_dataset, make_slides

from study import exports


def make_table(n_spots=3, n_columns=2):
    values = np.arange(n_spots * n_columns, dtype=np.float32).reshape(n_spots, n_columns) / 7
    names = [f"GENE{number}" for number in range(n_columns)]
    return pd.DataFrame(values, [f"spot {number}" for number in range(n_spots)], names)


def read_features(path):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    collection = json.loads(path.read_text(), parse_constant=refuse)
    assert collection["type"] == "FeatureCollection"
    return collection["features"]


def test_each_spot_is_a_detection_of_its_place_and_size(tmp_path):
    table, centres = make_table(), np.array([[100.0, 200], [5000, 7000], [3, 4]])
    table.iloc[1, 0] = np.nan
    exports.write_geojson(tmp_path / "spots.geojson", centres, 110.0, table)
    features = read_features(tmp_path / "spots.geojson")
    assert len(features) == 3
    for number, feature in enumerate(features):
        assert feature["type"] == "Feature" and feature["geometry"]["type"] == "Polygon"
        properties = feature["properties"]
        assert properties["objectType"] == "detection"
        assert properties["name"] == f"spot {number}"
        expected = table.iloc[number].dropna()
        assert [*properties["measurements"]] == [*expected.index]
        assert [*properties["measurements"].values()] == pytest.approx([*expected], abs=1e-6)
        (ring,) = feature["geometry"]["coordinates"]
        assert ring[0] == ring[-1]
        corners = np.array(ring[:-1])
        assert corners.mean(0) == pytest.approx(centres[number], abs=0.01)
        radii = np.linalg.norm(corners - centres[number], axis=1)
        assert radii == pytest.approx(np.full(len(corners), 55.0), abs=0.02)


def judged_slide():
    """AnnData as 26 makes it: two spots, 80 genes of which those from 40 on pass in validation, the
    later the better; no half width is known of the last one.
    """
    genes = [f"GENE{number}" for number in range(80)]
    var = pd.DataFrame({"valid_r": np.linspace(0, 1, 80), "heg": False, "hvg": False}, genes)
    var["believe"] = np.arange(80) >= 40
    var["half_width_80"] = np.where(np.arange(80) < 79, 0.5, np.nan)
    obs = pd.DataFrame({"distance": [1.0, 2], "set_A": [0.0, 1], "set_A_measured": 9.0}, ["x", "y"])
    return anndata.AnnData(np.tile(np.float32([[0.1], [2]]), 80), obs, var)


def test_measurements_are_distance_sets_and_genes_that_pass_with_their_intervals():
    shown = exports.choose_measurements(judged_slide(), ["GENE3"])
    assert [*shown][:5] == ["distance", "GENE3", "GENE3 low", "GENE3 high", "set_A"]
    assert [*shown][5:9] == ["GENE79", "GENE78", "GENE78 low", "GENE78 high"]
    np.testing.assert_allclose(
        shown[["GENE3 low", "GENE3 high"]], [[0, 0.6], [1.5, 2.5]], rtol=1e-6
    )
    assert 48 <= shown.shape[1] <= exports.MOST_MEASUREMENTS
    assert "GENE40" not in shown
    slide = judged_slide()
    slide.obs = slide.obs.join(pd.DataFrame(0.0, slide.obs_names, [f"set_{n}" for n in range(60)]))
    slide.X -= 1
    shown = exports.choose_measurements(slide, ["GENE3"])
    assert "GENE3 high" in shown and shown.shape[1] == exports.MOST_MEASUREMENTS
    assert (shown["GENE3 low"] <= shown["GENE3 high"]).all()


def test_without_evidence_the_genes_of_heg_and_hvg_are_given():
    table = judged_slide()
    table.var = table.var.drop(columns="believe")
    table.var.loc["GENE5", "heg"] = table.var.loc["GENE6", "hvg"] = True
    shown = exports.choose_measurements(table, ["GENE9"])
    genes = [name for name in shown if name in table.var_names]
    assert genes == ["GENE9", "GENE6", "GENE5"]


def test_scanpy_draws_counts_h5ad_without_options(tmp_path):
    """Each slide by itself: its image, its spots on it and as wide as they are."""
    make_slides(tmp_path)
    edit_manifest(tmp_path, name=["S1", "S/2"])
    _, table, _ = make_dataset(tmp_path)
    assert [*table.uns["spatial"]] == ["S1", "S_2"]
    names = table.obs["tissue_index"].map({1: "S1", 2: "S_2"})
    assert (table.obs["library_id"] == names).all()
    for name in ("S1", "S_2"):
        part = table[table.obs["library_id"] == name].copy()
        part.uns["spatial"] = {name: table.uns["spatial"][name]}
        check_drawn(part)
    part = table[table.obs["library_id"] == "S_2"]  # as docs/running.md says
    with warnings.catch_warnings(action="ignore"):
        (axes,) = scanpy.pl.spatial(part, library_id="S_2", color="HAL", show=False)
    image = table.uns["spatial"]["S_2"]["images"]["hires"]
    assert np.array_equal(axes.images[0].get_array(), image)
    pyplot.close(axes.figure)


def check_drawn(table):
    """scanpy, and squidpy where it is there, draw an AnnData of one slide without options."""
    (facts,) = table.uns["spatial"].values()
    high, wide, _ = facts["images"]["hires"].shape
    places = table.obsm["spatial"] * facts["scalefactors"]["tissue_hires_scalef"]
    assert (places > 0).all() and (places < [wide, high]).all()
    with warnings.catch_warnings(action="ignore"):  # of its deprecation
        (axes,) = scanpy.pl.spatial(table, color=table.var_names[0], show=False)
    assert axes.images and np.array_equal(axes.images[0].get_array(), facts["images"]["hires"])
    drawn = [spot.get_extents() for spot in axes.collections[0].get_paths()]
    middles = [(box.x0 + box.width / 2, box.y0 + box.height / 2) for box in drawn]
    assert np.allclose(sorted(middles), sorted(map(tuple, places)), atol=0.01)  # by value there
    width = facts["scalefactors"]["spot_diameter_fullres"]
    width *= facts["scalefactors"]["tissue_hires_scalef"]
    assert np.allclose([box.width for box in drawn], width, rtol=0.02)
    pyplot.close(axes.figure)
    if find_spec("squidpy"):
        with warnings.catch_warnings(action="ignore"):  # of squidpy's own, from its import on
            import squidpy

            squidpy.pl.spatial_scatter(table, color=table.var_names[0])
        pyplot.close("all")


def test_spatialdata_takes_what_scanpy_draws():
    io = pytest.importorskip("spatialdata_io.experimental", reason="spatialdata-io not installed")
    table = judged_slide()
    table.obsm["spatial"] = np.float64([[10, 20], [30, 20]])
    image = np.zeros((40, 40, 3), np.uint8)
    table.uns["spatial"] = {"S1": exports.describe_library(image, step=1, diameter=5)}
    converted = io.from_legacy_anndata(table)
    assert len(converted.images) == 1 and len(converted.tables) == 1


def test_lazyslide_takes_the_spots_that_qupath_takes(tmp_path):
    lazyslide = pytest.importorskip("lazyslide", reason="LazySlide is not installed")
    tifffile.imwrite(tmp_path / "slide.tif", np.zeros((512, 512, 3), np.uint8), tile=(256, 256))
    centres = np.array([[100.0, 200], [300, 50], [400, 400]])
    exports.write_geojson(tmp_path / "spots.geojson", centres, 60, make_table())
    slide = lazyslide.open_wsi(tmp_path / "slide.tif")
    with warnings.catch_warnings(action="ignore"):  # geopandas's, of what LazySlide does
        lazyslide.io.load_annotations(slide, tmp_path / "spots.geojson")
    spots = slide.shapes["annotations"]
    assert len(spots) == 3
    middles = np.column_stack([spots.centroid.x, spots.centroid.y])
    np.testing.assert_allclose(np.sort(middles, 0), np.sort(centres, 0), atol=0.01)
