"""What other programs write beside counts and places, and what of it would go wrong in silence."""

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import tifffile
from test_hest import make_anndata

from slides import imaging, inputs
from slides.counts import join_genes, read_matrix
from slides.manifest import Slide
from slides.positions import check_pitch, check_tags, read_positions
from study import gene_sets
from study.shell import InputError

GENES = ["HAL", "CYP3A4", "VWF", "SOX9"]
BARCODES = [f"AAACAAGTATCTCC{letter}A-1" for letter in "ACGT"]


@pytest.fixture(autouse=True)
def no_warnings():
    inputs.WARNINGS.clear()
    yield
    inputs.WARNINGS.clear()


def write(path, var, obs=None, counts=None):
    """An .h5ad of 4 spots x 4 genes with these tables."""
    counts = np.arange(16, dtype=np.float32).reshape(4, 4) if counts is None else counts
    obs = pd.DataFrame(index=BARCODES) if obs is None else obs.set_axis(BARCODES)
    anndata.AnnData(scipy.sparse.csr_matrix(counts), obs, var).write_h5ad(path)
    return path


@pytest.mark.parametrize("column", ["index", "features", "gene_ids", "gene_symbols"])
def test_genes_that_lost_their_names_have_them_in_a_column(tmp_path, column):
    """SeuratDisk leaves row numbers in their place, by which slides would be joined."""
    var = pd.DataFrame({column: GENES}, [str(number) for number in range(4)])
    table = read_matrix(write(tmp_path / "m.h5ad", var))
    assert table.var["name"].tolist() == GENES


def test_genes_without_names_are_refused(tmp_path):
    path = write(tmp_path / "m.h5ad", pd.DataFrame(index=["0", "1", "2", "3"]))
    with pytest.raises(InputError, match="its genes are called 0, 1"):
        read_matrix(path)


def test_symbols_have_many_columns_and_gaps(tmp_path):
    ids = [f"ENSG0000000000{number}" for number in range(4)]
    for column in ("gene_symbols", "hgnc_symbol", "Symbol"):
        var = pd.DataFrame({column: [*GENES[:3], None]}, ids)
        table = read_matrix(write(tmp_path / "m.h5ad", var))
        assert table.var["name"].tolist() == [*GENES[:3], ids[3]]
    var = pd.DataFrame({"Symbol": GENES, "symbol": GENES[::-1]}, ids)
    assert read_matrix(write(tmp_path / "m.h5ad", var)).var["name"].tolist() == GENES


def test_ids_are_joined_without_their_versions(tmp_path):
    ids = [f"ENSG0000000000{number}" for number in range(4)]
    plain = read_matrix(write(tmp_path / "a.h5ad", pd.DataFrame(index=ids)))
    versions = pd.DataFrame(index=[f"{name}.{number}" for number, name in enumerate(ids, 3)])
    other = read_matrix(write(tmp_path / "b.h5ad", versions))
    assert len(join_genes([(1, plain.var), (2, other.var)])) == 4


def test_slides_of_two_naming_schemes_are_refused():
    ids = pd.DataFrame({"name": GENES}, [f"ENSG{number}" for number in range(4)])
    symbols = pd.DataFrame({"name": GENES}, GENES)
    with pytest.raises(InputError, match=r"no gene id is in every slide .*slide 1: ENSG0"):
        join_genes([(1, ids), (2, ids), (3, symbols), (4, symbols)])


@pytest.mark.parametrize("name", ["total_counts", "nCount_Spatial"])
def test_counts_of_some_of_the_genes_are_warned_of(tmp_path, name):
    counts = np.arange(1, 17, dtype=np.float32).reshape(4, 4)
    var = pd.DataFrame(index=GENES)
    of_all = pd.DataFrame({name: counts.sum(1)})
    read_matrix(write(tmp_path / "m.h5ad", var, of_all, counts))
    assert not inputs.WARNINGS
    read_matrix(write(tmp_path / "m.h5ad", var, 1.5 * of_all, counts))
    (line,) = inputs.WARNINGS
    assert name in line and "raw counts of all genes" in line


def test_kinds_of_features_are_counted_or_refused(tmp_path, capsys):
    kinds = ["Gene Expression", "Gene Expression", "Antibody Capture", None]
    var = pd.DataFrame({"feature_types": kinds}, GENES)
    assert read_matrix(write(tmp_path / "m.h5ad", var)).n_vars == 2
    assert "2 features are left out, which are no genes but Antibody" in capsys.readouterr().out
    with pytest.raises(InputError, match="no feature is of the kind Gene Expression, but of Gene"):
        read_matrix(write(tmp_path / "m.h5ad", var.assign(feature_types="Gene")))


def test_columns_of_spots_are_no_genes(tmp_path, capsys):
    table = pd.DataFrame(np.arange(16).reshape(4, 4), BARCODES, GENES)
    table = table.assign(total_counts=9, leiden=1, imagerow=5, __no_feature=3)
    table["ERCC-00002"] = 7
    table.to_csv(tmp_path / "counts.csv")
    assert read_matrix(tmp_path / "counts.csv").var["name"].tolist() == GENES
    (line,) = inputs.WARNINGS
    assert "3 columns are no genes and are left out: total_counts, leiden, imagerow" in line
    assert "2 controls are left out" in capsys.readouterr().out


def test_the_scale_factors_of_r_and_cellxgene_are_read(tmp_path):
    table = make_anndata(1)
    table.uns["spatial"] = {
        "is_single": True,
        "S1": {"scalefactors": {"spot_diameter_fullres": np.array([50.0])}},
    }
    table.write_h5ad(tmp_path / "a.h5ad")
    assert len(read_positions(tmp_path / "a.h5ad")) == table.n_obs
    table.uns["spatial"] = {"S1": {"images": {}}}
    table.write_h5ad(tmp_path / "a.h5ad")
    assert len(read_positions(tmp_path / "a.h5ad")) == table.n_obs


def make_slide(path, um_per_px):
    return Slide(1, "S", "D", path, um_per_px, path, None)


def test_the_resolution_of_visiums_array_is_not_taken_for_that_of_st(tmp_path):
    rows, columns = np.mgrid[0:8, 0:16].reshape(2, -1)
    even = (rows + columns) % 2 == 0
    hexagons = pd.DataFrame({"array_row": rows[even], "array_col": columns[even]})
    hexagons["pxl_row"] = hexagons["array_row"] * 173.2
    hexagons["pxl_col"] = hexagons["array_col"] * 100.0
    check_pitch(make_slide(tmp_path / "s.tif", 0.5), hexagons)
    assert not inputs.WARNINGS
    check_pitch(make_slide(tmp_path / "s.tif", 1.0), hexagons)
    (line,) = inputs.WARNINGS
    assert "200 um; expected 100, as Visium's array" in line


def test_a_resolution_that_the_image_contradicts_is_warned_of(tmp_path):
    path = tmp_path / "s.tif"
    resolution = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, np.zeros((64, 64, 3), np.uint8), photometric="rgb", **resolution)
    check_tags(make_slide(path, 0.52))
    assert not inputs.WARNINGS
    check_tags(make_slide(path, 0.25))
    (line,) = inputs.WARNINGS
    assert "um_per_px is 0.25, and its tags say 0.5" in line


def test_other_scenes_of_an_image_are_named(tmp_path):
    scenes = {"first": (300, 340), "second": (300, 352), "small": (75, 88)}
    with tifffile.TiffWriter(tmp_path / "s.ome.tif", ome=True) as tiff:
        for name, size in scenes.items():
            image = np.full((*size, 3), 200, np.uint8)
            tiff.write(image, photometric="rgb", metadata={"axes": "YXS", "Name": name})
    for _ in range(2):
        imaging.open_image(tmp_path / "s.ome.tif")
    (line,) = inputs.WARNINGS
    assert "second (300 x 352 px) is taken, and not first (300 x 340 px)" in line


def test_channels_that_imagej_names_are_no_colours(tmp_path):
    planes = np.zeros((3, 64, 64), np.uint8)
    labels = ["DAPI", "CD8", "PanCK"]
    path = tmp_path / "s.tif"
    tifffile.imwrite(path, planes, imagej=True, metadata={"axes": "CYX", "Labels": labels})
    with pytest.raises(InputError, match="its channels are dapi, cd8, panck"):
        imaging.open_image(path)


@pytest.mark.parametrize("second, warned", [("HAL", True), ("http://broad/X", False), ("", False)])
def test_a_gmt_without_descriptions_is_warned_of(tmp_path, second, warned):
    lines = ["\t".join([name, second and f"{second}{name}", *GENES]) for name in ("S1", "S2")]
    (tmp_path / "sets.gmt").write_text("\n".join(lines))
    gene_sets.read_sets(tmp_path / "sets.gmt")
    assert len(inputs.WARNINGS) == warned
