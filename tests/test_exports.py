"""Predictions as other programs read them."""

import json

import numpy as np
import pandas as pd
import pytest

from study import exports
from study.shell import InputError


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


def test_more_measurements_than_qupath_shows_are_refused(tmp_path):
    with pytest.raises(InputError, match="51 measurements"):
        exports.write_geojson(tmp_path / "a.geojson", np.zeros((3, 2)), 1.0, make_table(3, 51))
    assert not (tmp_path / "a.geojson").exists()


def test_drawn_genes_come_first_and_then_the_best_in_validation():
    table = make_table(2, 80)
    valid_r = pd.Series(np.linspace(0, 1, 80), table.columns)
    groups = {"heg": [*table.columns[:40]], "hvg": [*table.columns[30:70]], "mg": ["GENE79"]}
    chosen = [*exports.choose_measurements(table, ["GENE75", "GENE3"], groups, valid_r)]
    assert chosen == ["GENE75", "GENE3", *[f"GENE{number}" for number in range(69, 21, -1)]]
