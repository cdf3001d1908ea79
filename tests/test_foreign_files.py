"""What other programs write beside counts and places, and what of it would go wrong in silence."""

import io
import re
import struct

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import tifffile
from conftest import refused, write_h5, write_matrix
from PIL import Image
from test_hest import make_anndata
from test_pixels import pixels_of

from slides import imaging, inputs
from slides.counts import check_counts, join_genes, read_matrix
from slides.manifest import Slide
from slides.positions import check_array, check_tags, read_positions
from study import gene_sets
from study.errors import InputError

GENES = ["HAL", "CYP3A4", "VWF", "SOX9"]
BARCODES = [f"AAACAAGTATCTCC{letter}A-1" for letter in "ACGT"]
IDS = [f"ENSG0000000000{number}" for number in range(4)]


@pytest.fixture(autouse=True)
def no_warnings():
    inputs.WARNINGS.clear()
    yield
    inputs.WARNINGS.clear()


def check_warned(*words):
    """There is one warning, which holds these words."""
    (line,) = inputs.WARNINGS
    assert all(word in line for word in words), line


def check_names(read, ids=GENES, names=GENES):
    """The genes of a matrix have these names, and are joined by these ids."""
    assert (read.var["name"].tolist(), read.var_names.tolist()) == ([*names], [*ids])


def write(path, var, obs=None, counts=None):
    """An .h5ad of 4 spots x 4 genes with these tables."""
    counts = np.arange(16, dtype=np.float32).reshape(4, 4) if counts is None else counts
    obs = pd.DataFrame(index=BARCODES) if obs is None else obs.set_axis(BARCODES)
    anndata.AnnData(scipy.sparse.csr_matrix(counts), obs, var).write_h5ad(path)
    return path


ROWS = [*"0123"]  # SeuratDisk leaves row numbers in place of names, by which slides would be joined
GAP = [*GENES[:3], IDS[3]]
# columns and index of var: (ids, names)
NAMED = [
    ({"index": GENES}, ROWS, GENES, GENES),
    ({"features": GENES}, ROWS, GENES, GENES),
    ({"gene_ids": GENES}, ROWS, GENES, GENES),
    ({"gene_symbols": GENES}, ROWS, GENES, GENES),
    ({"index": range(4), "gene_ids": GENES}, ROWS, GENES, GENES),
    ({"id": range(4)}, GENES, GENES, GENES),
    ({"id": range(1, 5)}, GENES, GENES, GENES),
    ({"gene_symbols": [*GENES[:3], None]}, IDS, IDS, GAP),
    ({"hgnc_symbol": [*GENES[:3], ""]}, IDS, IDS, GAP),
    ({"Symbol": [*GENES[:3], " "]}, IDS, IDS, GAP),
    ({"Symbol": GENES, "symbol": GENES[::-1]}, IDS, IDS, GENES),
]


@pytest.mark.parametrize("columns, index, ids, names", NAMED)
def test_genes_have_the_names_that_some_column_holds(tmp_path, columns, index, ids, names):
    path = write(tmp_path / "m.h5ad", pd.DataFrame(columns, index))
    check_names(read_matrix(path), ids, names)


PROBES = [f"ENSG0{number}|{number}|00a000{number}" for number in "1234"]
NO_GENES = {
    "row numbers": (pd.DataFrame(index=[*"0123"]), "its genes are called 0, 1"),
    "probes": (pd.DataFrame({"name": GENES}, PROBES), "counts of probes"),
    "another kind": (pd.DataFrame({"feature_types": "Gene"}, GENES), "no feature is of the kind Gene Expression, but of Gene"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NO_GENES)
def test_what_are_no_genes_are_refused(tmp_path, kind):
    var, words = NO_GENES[kind]
    with refused(words):
        read_matrix(write(tmp_path / "m.h5ad", var))


@pytest.mark.parametrize("head", ["", "gene_id\tgene_short_name\n"])
def test_names_of_genes_are_told_from_their_ids(tmp_path, capsys, head):
    """Without a head, symbols may stand before the ids."""
    write_matrix(tmp_path, BARCODES, np.eye(4, dtype=int), GENES)
    columns = zip(IDS, GENES, strict=True) if head else zip(GENES, IDS, strict=True)
    (tmp_path / "features.tsv").write_text(head + "".join(f"{a}\t{b}\n" for a, b in columns))
    check_names(read_matrix(tmp_path), IDS)
    assert ("stand there before the ids" in capsys.readouterr().out) == (not head)


@pytest.mark.parametrize("spots, genes", [(0, 4), (4, 0)])
def test_an_empty_matrix_is_refused(tmp_path, spots, genes):
    counts = np.ones((spots, genes), np.float32)
    obs, var = pd.DataFrame(index=BARCODES[:spots]), pd.DataFrame(index=GENES[:genes])
    anndata.AnnData(counts, obs, var).write_h5ad(tmp_path / "m.h5ad")
    with refused(f"holds {spots} spots and {genes} genes"):
        read_matrix(tmp_path / "m.h5ad")


def test_ids_are_joined_without_their_versions(tmp_path):
    plain = read_matrix(write(tmp_path / "a.h5ad", pd.DataFrame(index=IDS)))
    versions = pd.DataFrame(index=[f"{name}.{number}" for number, name in enumerate(IDS, 3)])
    other = read_matrix(write(tmp_path / "b.h5ad", versions))
    assert len(join_genes([(1, plain.var), (2, other.var)])) == 4


@pytest.mark.parametrize("name", ["total_counts", "nCount_Spatial", "sum_umi"])
def test_counts_of_some_of_the_genes_are_warned_of(tmp_path, name):
    counts = np.arange(1, 17, dtype=np.float32).reshape(4, 4)
    var = pd.DataFrame(index=GENES)
    of_all = pd.DataFrame({name: counts.sum(1)})
    read_matrix(write(tmp_path / "m.h5ad", var, of_all, counts))
    assert not inputs.WARNINGS
    read_matrix(write(tmp_path / "m.h5ad", var, 1.5 * of_all, counts))
    check_warned(name, "raw counts of all genes")


def test_kinds_of_features_are_counted(tmp_path, capsys):
    kinds = ["Gene Expression", "Gene Expression", "Antibody Capture", None]
    var = pd.DataFrame({"feature_types": kinds}, GENES)
    assert read_matrix(write(tmp_path / "m.h5ad", var)).n_vars == 2
    assert "2 features are left out, which are no genes but Antibody" in capsys.readouterr().out


@pytest.mark.parametrize("column", ["Type", "feature_type", "kind"])
def test_the_kind_of_a_feature_has_several_names(tmp_path, column):
    """Of R's ID, Symbol and Type; CELLxGENE's feature_type is of biotypes."""
    kinds = ["Gene Expression"] * 3 + ["Antibody Capture"]
    var = pd.DataFrame({column: kinds}, GENES)
    assert read_matrix(write(tmp_path / "m.h5ad", var)).n_vars == 3
    biotypes = write(tmp_path / "m.h5ad", var.assign(feature_type="lncRNA"))
    assert read_matrix(biotypes).n_vars == (4 if column == "feature_type" else 3)


def test_columns_of_spots_are_no_genes(tmp_path, capsys):
    table = pd.DataFrame(np.arange(16).reshape(4, 4), BARCODES, GENES)
    table = table.assign(total_counts=9, leiden=1, imagerow=5, __no_feature=3)
    table["ERCC-00002"] = 7
    table.to_csv(tmp_path / "counts.csv")
    assert read_matrix(tmp_path / "counts.csv").var["name"].tolist() == GENES
    check_warned("3 columns are no genes and are left out: total_counts, leiden, imagerow")
    assert "2 controls are left out" in capsys.readouterr().out


def test_places_and_totals_of_spots_are_no_genes(tmp_path):
    """But a fly's y is a gene."""
    genes = [*GENES, "PXN", "NRG1", "SUMO1", "UMI1", "GENE1"]
    spots = ["pixel_x", "pixel_y", "x_coord", "nUMI", "nGene", "UMI_count", "n_mito", "selected"]
    table = pd.DataFrame(np.arange(36).reshape(4, 9) ** 2, BARCODES, genes)
    table = table.assign(**dict.fromkeys(spots, 5))
    table.assign(x=1, y=[1, 2, 3, 4]).to_csv(tmp_path / "counts.csv")
    assert read_matrix(tmp_path / "counts.csv").var["name"].tolist() == genes
    table.assign(y=[1, 2, 3, 4]).T.to_csv(tmp_path / "counts.csv")
    assert read_matrix(tmp_path / "counts.csv").var["name"].tolist() == [*genes, "y"]


def test_the_scale_factors_of_r_and_cellxgene_are_read(tmp_path):
    one = {"spot_diameter_fullres": np.array([50.0])}
    several = (
        {"scalefactors": scales} for scales in (one, pd.DataFrame(one), np.array([50.0]), "a.json")
    )
    table = make_anndata(1)
    for library in (*several, {"images": {}}):
        table.uns["spatial"] = {"is_single": True, "S1": library}
        assert len(read_positions_of(tmp_path, table)) == table.n_obs


def test_centres_may_be_sparse_and_not_text(tmp_path):
    table = make_anndata(1)
    expected = read_positions_of(tmp_path, table)
    centres = table.obsm["spatial"]
    table.obsm["spatial"] = scipy.sparse.csr_matrix(centres)
    pd.testing.assert_frame_equal(read_positions_of(tmp_path, table), expected)
    texts = np.asarray(centres).astype(str).astype(object)
    texts[0, 0] = "pxl_col"
    table.obsm["spatial"] = texts
    with refused("holds no numbers ", "pxl_col"):
        read_positions_of(tmp_path, table)


def make_slide(path, um_per_px):
    return Slide(1, "S", "D", path, um_per_px, path, None)


@pytest.mark.parametrize("fault", ["", "turned", "order", "cut", "dummy"])
def test_centres_in_another_order_than_the_array_are_warned_of(tmp_path, fault):
    rows, columns = np.mgrid[0:6, 0:7].reshape(2, -1)
    array = np.column_stack([rows, columns])
    centres = array @ [[120.0, 3.0], [-3.0, 120.0]] + np.random.default_rng(0).normal(0, 5, (42, 2))
    if fault == "turned":
        centres = 5000 - centres[:, ::-1]
    elif fault == "order":
        centres = np.random.default_rng(1).permutation(centres)
    elif fault == "cut":
        centres[30, 0] = centres[30, 0] // 10
    elif fault == "dummy":
        array[:, 0] = 0
    table = pd.DataFrame(array, columns=["array_row", "array_col"]).set_index(rows * 100 + columns)
    table[["pxl_row", "pxl_col"]] = centres
    check_array(make_slide(tmp_path / "s.tif", 1.0), table)
    assert len(inputs.WARNINGS) == (fault in ("order", "cut"))
    if fault == "cut":
        assert "1 of 42 spots" in inputs.WARNINGS[0] and "as 402" in inputs.WARNINGS[0]


def test_named_columns_of_centres_say_which_is_which(tmp_path):
    table = make_anndata(1)
    expected = read_positions_of(tmp_path, table)
    centres = pd.DataFrame(table.obsm["spatial"], table.obs_names)
    centres.columns = ["pxl_col_in_fullres", "pxl_row_in_fullres"]
    table.obsm["spatial"] = centres.iloc[:, ::-1]
    pd.testing.assert_frame_equal(read_positions_of(tmp_path, table), expected)


def read_positions_of(folder, table):
    table.write_h5ad(folder / "a.h5ad")
    return read_positions(folder / "a.h5ad")


def test_a_total_in_a_table_is_no_gene(tmp_path):
    table = pd.DataFrame(np.arange(16).reshape(4, 4), BARCODES, GENES)
    table.assign(Everything=table.sum(axis=1)).to_csv(tmp_path / "counts.csv")
    assert read_matrix(tmp_path / "counts.csv").var["name"].tolist() == GENES
    check_warned("Everything is the sum of the others")
    table.assign(Total=5).T.to_csv(tmp_path / "counts.csv")
    assert read_matrix(tmp_path / "counts.csv").var["name"].tolist() == GENES


def test_the_line_in_which_excel_names_the_separator_is_left_out(tmp_path):
    (tmp_path / "a.csv").write_text("sep=;\r\ngene;kind\r\nHAL;a\r\n", encoding="utf-8-sig")
    table = inputs.read_table(tmp_path / "a.csv", {"gene": ("gene",)})
    assert table["gene"].tolist() == ["HAL"]


LETTERS = ["g1", "g2", "g3", "g4"]
ENSEMBL = ["ENSG0", "ENSG1", "ENSG2", "ENSG3"]
SPELLED = ["HAL", "Hal", "VWF"]  # names that one slide tells apart are other genes
OTHER_ID = "other ids on other slides: 1, as HAL: ENSG0 and "
# (names, ids) of each slide, what is warned of
JOINED = [
    ([(GENES, LETTERS), (GENES, LETTERS)], ""),
    ([(GENES, LETTERS), (GENES[::-1], LETTERS)], "4 of 4 gene ids have other symbols on other slides"),
    ([(["HAL", "1-Mar"], ["a", "b"])], "a gene is called 1-Mar"),
    ([(["HAL", "Sep-02"], ["a", "b"])], "a gene is called Sep-02"),
    ([(["HAL", "2-Dec-21"], ["a", "b"])], "a gene is called 2-Dec-21"),
    ([(["HAL", "2021-09-01 00:00:00"], ["a", "b"])], "a gene is called 2021-09-01 00:00:00"),
    ([(SPELLED, SPELLED), (SPELLED[:2], SPELLED[:2])], ""),
    ([(["HAL", "HLA-A"], ["HAL", "HLA-A"]), (["HAL", "HLA.A"], ["HAL", "HLA.A"])],
     "spelled otherwise on other slides: 1, as HLA-A and HLA.A."),
    ([(GENES, ENSEMBL), (GENES, ["HAL", *ENSEMBL[1:]])], OTHER_ID),
    ([(GENES, ENSEMBL), (GENES, ["ENSG9", *ENSEMBL[1:]])], OTHER_ID),
    ([([*GENES, "HAL"], [*ENSEMBL, "ENSG9"]), (GENES, ["ENSG9", *ENSEMBL[1:]])], ""),
]  # fmt: skip


def join_slides(slides):
    """Join the genes of slides 5, 6, ... of these (names, ids)."""
    tables = [pd.DataFrame({"name": names}, ids) for names, ids in slides]
    return join_genes(enumerate(tables, 5))


@pytest.mark.parametrize("slides, words", JOINED)
def test_genes_that_may_be_joined_wrongly_are_warned_of(slides, words):
    join_slides(slides)
    if words:
        check_warned(words)
    assert len(inputs.WARNINGS) == bool(words)


@pytest.mark.parametrize("slides, words", [
    ([(GENES, ENSEMBL)] * 2 + [(GENES, GENES)] * 2, ["no gene id is in every slide ", "slide 5: ENSG0"]),
    ([(["A"], ["A"])] * 2 + [(["B"], ["B"])], ["slide 7 shares no gene id"]),
    ([([*GENES, "GFP"], [*ENSEMBL, "GFP"]), ([*GENES, "GFP"], [*GENES, "GFP"])],
     ["other ids on other slides: 4, as CYP3A4: ", "name genes"]),
])  # fmt: skip
def test_slides_that_share_too_few_genes_are_refused(slides, words):
    with refused(*words):
        join_slides(slides)


def test_symbols_that_raw_lacks_are_those_of_var(tmp_path):
    counts = np.arange(16, dtype=np.float32).reshape(4, 4)
    var = pd.DataFrame({"gene_symbols": GENES}, IDS)
    table = anndata.AnnData(np.log1p(counts), pd.DataFrame(index=BARCODES), var)
    table.raw = anndata.AnnData(counts, table.obs, pd.DataFrame(index=IDS))
    table.write_h5ad(tmp_path / "m.h5ad")
    read = read_matrix(tmp_path / "m.h5ad")
    assert read.var["name"].tolist() == GENES
    assert read.X.max() == 15


def test_half_precision_is_read_and_what_is_no_count_is_not(tmp_path):
    var, obs = pd.DataFrame(index=GENES), pd.DataFrame(index=BARCODES)
    counts = np.arange(16).reshape(4, 4)
    anndata.AnnData(counts.astype(np.float16), obs, var).write_h5ad(tmp_path / "m.h5ad")
    assert read_matrix(tmp_path / "m.h5ad").X.max() == 15
    large = read_matrix(write(tmp_path / "m.h5ad", var, counts=counts.astype(np.int64) * 2**40))
    with refused("more than 2147483647 is no count"):
        check_counts(large, "m.h5ad")
    ones = anndata.AnnData(scipy.sparse.csr_matrix(np.ones((4, 60), np.float32)))
    check_counts(ones, "m.h5ad")
    check_warned("no count is above 1")


def test_a_slide_of_one_genome_goes_beside_one_of_two(tmp_path):
    var = pd.DataFrame({"name": GENES, "genome": "GRCh38-2020-A"}, GENES)
    path = write(tmp_path / "m.h5ad", var)
    assert read_matrix(path, "GRCh38").var["name"].tolist() == GENES
    prefixed = [f"GRCh38_{gene}" for gene in GENES]
    var = pd.DataFrame({"name": prefixed, "genome": "GRCh38"}, prefixed)
    check_names(read_matrix(write(tmp_path / "prefixed.h5ad", var), "GRCh38"))
    with refused("--genome mm10"):
        read_matrix(path, "mm10")


@pytest.mark.parametrize("around", ["GRCh38_{}", "mm10___{}", "hg19_{}", "b'{}'", "gene_{}"])
def test_what_programs_set_around_all_names_is_no_part_of_them(tmp_path, around):
    """The prefix of one genome, where the genes of the other were left out, and text of bytes; but
    not any prefix.
    """
    names = [around.format(gene) for gene in GENES]
    expected = names if around == "gene_{}" else GENES
    path = write(tmp_path / "m.h5ad", pd.DataFrame({"gene_ids": names}, names))
    check_names(read_matrix(path), expected, expected)


@pytest.mark.parametrize("name", ["indices", "indptr"])
@pytest.mark.parametrize("kind", ["h5", "h5ad"])
def test_a_sparse_matrix_that_points_beyond_itself_is_refused(tmp_path, kind, name):
    """Multiplied or sliced, it would end the process without a word."""
    counts, path = np.arange(16).reshape(4, 4), tmp_path / f"m.{kind}"
    if kind == "h5":
        write_h5(path, counts, GENES, barcodes=BARCODES)
    else:
        write(path, pd.DataFrame(index=GENES))
    with h5py.File(path, "r+") as file:
        file["matrix" if kind == "h5" else "X"][name][2] = 999
    with pytest.raises(InputError, match=f"m.{kind}: .*ind(ices|ex|ptr)"):
        read_matrix(path)


@pytest.mark.parametrize("tag", ["Compression", "PhotometricInterpretation"])
def test_a_number_that_tiff_does_not_know_is_refused(tmp_path, tag):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((64, 64, 3), np.uint8), photometric="rgb", compression="zlib")
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tiff.pages[0].tags[tag].overwrite(60_000)
    with refused(f"{path}: its {tag[:11].lower()} is number", "export it as RGB"):
        imaging.open_image(path)


def write_aperio(folder, image, start):
    """A TIFF whose description begins so, and says MPP = 0.25; returns its path."""
    description = f"{start} JPEG/RGB Q=70|AppMag = 40|MPP = 2.5e-1"
    path = folder / "s.tif"
    tifffile.imwrite(path, image, photometric="rgb", description=description, metadata=None)
    return path


def test_the_resolution_of_a_reduced_image_is_its_own(tmp_path):
    image = np.full((300, 400, 3), 200, np.uint8)
    start = "Aperio Image Library v12\r\n1600x1240 [0,40 1600x1200] (256x256)"
    for text, width, expected in (("", 1600, 0.25), (" -> 400x300", 400, 1.0)):
        path = write_aperio(tmp_path, image[:, :1].repeat(width, 1), start + text)
        assert imaging.read_resolution(path) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text", ["1600x1240 [0,40 1600x1200]", "1600x1240 [0,0,1600x1200] -> 800x600"]
)
def test_the_resolution_of_another_image_is_not_taken(tmp_path, text):
    """As of the slide, where a program has scaled or cut it and kept its description."""
    path = write_aperio(tmp_path, np.full((300, 400, 3), 200, np.uint8), text)
    with refused("its resolution is not known", "give --um-per-px"):
        imaging.read_resolution(path)


def test_a_fourth_channel_that_no_tag_names_is_left_out(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 4), np.uint8)
    path = tmp_path / "s.tif"
    tifffile.imwrite(path, image, photometric="rgb", extrasamples=["unspecified"], metadata=None)
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        tag = tiff.pages[0].tags["ExtraSamples"]
    content[tag.offset : tag.offset + 2] = (60_000).to_bytes(2, "little")  # as if not there
    path.write_bytes(content)
    assert np.array_equal(pixels_of(path), image[:, :, :3])


def write_ndpi(path, image):
    """Hamamatsu's layout: one JPEG of the whole image with restart markers, whose places a tag
    holds, in a TIFF of 64-bit offsets.
    """
    jpeg = io.BytesIO()
    options = {"quality": 95, "subsampling": 0, "restart_marker_blocks": 16}
    Image.fromarray(image).save(jpeg, "JPEG", **options)
    jpeg = jpeg.getvalue()
    scan = jpeg.index(b"\xff\xda")
    first = scan + 2 + int.from_bytes(jpeg[scan + 2 : scan + 4], "big")
    markers = re.finditer(rb"\xff[\xd0-\xd7]", jpeg[first:])
    starts = [first, *(first + marker.end() for marker in markers)]
    content = bytearray(b"II*\0" + bytes(8))

    def append(data):
        content.extend(bytes(-len(content) % 8))
        content.extend(data)
        return len(content) - len(data)

    height, width = image.shape[:2]
    resolution = append(struct.pack("<2I", 20_000, 1))
    tags = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 3, append(struct.pack("<3H", 8, 8, 8))),
        (259, 3, 1, 7),  # JPEG
        (262, 3, 1, 6),  # YCbCr
        (271, 2, 10, append(b"Hamamatsu\0")),
        (273, 4, 1, append(jpeg)),
        (277, 3, 1, 3),
        (278, 4, 1, height),
        (279, 4, 1, len(jpeg)),
        (282, 5, 1, resolution),
        (283, 5, 1, resolution),
        (296, 3, 1, 3),  # px a centimetre
        (65420, 4, 1, 1),  # Hamamatsu's format
        (65421, 11, 1, int.from_bytes(struct.pack("<f", 20.0), "little")),
        (65426, 4, len(starts), append(struct.pack(f"<{len(starts)}I", *starts))),
    ]
    table = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    high_words = bytes(4 * len(tags))
    directory = append(struct.pack("<H", len(tags)) + table + bytes(8) + high_words)
    content[4:12] = struct.pack("<Q", directory)
    path.write_bytes(content)


def test_an_ndpi_is_read_tile_by_tile(tmp_path):
    rows, columns = np.mgrid[0:256, 0:384]
    image = np.stack([rows, columns // 2, 255 - rows], axis=2).astype(np.uint8)
    path = tmp_path / "slide.ndpi"
    write_ndpi(path, image)
    with tifffile.TiffFile(path) as tiff:
        assert len(tiff.pages[0].dataoffsets) > 1
    read = pixels_of(path)
    assert np.abs(read.astype(int) - image).max() < 8
    assert imaging.read_resolution(path) == pytest.approx(0.5)


@pytest.mark.parametrize("labels, words", [
    ({}, "ImageJ keeps 3 images"),  # behind one page
    ({"Labels": ["DAPI", "CD8", "PanCK"]}, "its channels are dapi, cd8, panck"),
])  # fmt: skip
def test_channels_of_imagej_that_are_no_colours_are_refused(tmp_path, labels, words):
    options = {"imagej": True, "metadata": {"axes": "CYX", **labels}, "truncate": not labels}
    tifffile.imwrite(tmp_path / "s.tif", np.zeros((3, 64, 64), np.uint8), **options)
    with refused(words):
        imaging.open_image(tmp_path / "s.tif")


def test_a_resolution_that_the_image_contradicts_is_warned_of(tmp_path):
    path = tmp_path / "s.tif"
    resolution = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, np.zeros((64, 64, 3), np.uint8), photometric="rgb", **resolution)
    check_tags(make_slide(path, 0.52))
    assert not inputs.WARNINGS
    check_tags(make_slide(path, 0.25))
    check_warned("um_per_px is 0.25, and its tags say 0.5")


def test_other_scenes_of_an_image_are_named(tmp_path):
    scenes = {"first": (300, 340), "second": (300, 352), "small": (75, 88)}
    with tifffile.TiffWriter(tmp_path / "s.ome.tif", ome=True) as tiff:
        for name, size in scenes.items():
            image = np.full((*size, 3), 200, np.uint8)
            tiff.write(image, photometric="rgb", metadata={"axes": "YXS", "Name": name})
    for _ in range(2):
        imaging.open_image(tmp_path / "s.ome.tif")
    check_warned("second (300 x 352 px) is taken, and not first (300 x 340 px)")


@pytest.mark.parametrize("second, warned", [("HAL", True), ("http://broad/X", False), ("", False)])
def test_a_gmt_without_descriptions_is_warned_of(tmp_path, second, warned):
    lines = ["\t".join([name, second and f"{second}{name}", *GENES]) for name in ("S1", "S2")]
    (tmp_path / "sets.gmt").write_text("\n".join(lines))
    gene_sets.read_sets(tmp_path / "sets.gmt")
    assert len(inputs.WARNINGS) == warned
