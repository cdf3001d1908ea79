"""The list of what is read, in docs/running.md: each line is held by a test that is there."""

import re

from conftest import REPOSITORY

# The line of the list: the file and the name of its test.
HELD_BY = {
    "Space Ranger 1 to 4, `outs/`; CytAssist": "test_predict_slide.test_space_rangers_folders_become_a_data_root",
    "`spaceranger aggr`: a matrix of samples": "test_silent.test_a_sample_of_an_aggregated_matrix_is_chosen",
    "files of GEO with prefixes, old `genes.tsv`, `.gz`": "test_files.test_matrix_folders_of_geo_and_of_old_versions",
    "Visium HD, bins of 8 and 16 um": "test_visium_hd.test_a_run_over_binned_outputs",
    "HEST-1k, slides or patches": "test_hest.test_samples_of_hest_become_a_dataset",
    "HEST-Benchmark, a task": "test_hest_benchmark.test_spots_are_those_that_have_a_patch_and_genes_are_the_tasks",
    "AnnData of scanpy, squidpy and R converters": "test_hest.test_an_h5ad_gives_the_pixels_and_counts_of_its_spots",
    "AnnData of several sections": "test_silent.test_a_section_of_an_h5ad_is_chosen",
    "SpatialData `.zarr`": "test_hest.test_of_a_zarr_folder_the_conversion_is_named",
    "count tables, CSV or TSV, either way round (ST)": "test_files.test_slides_whose_counts_are_plain_tables_either_way_round",
    "Excel, OpenDocument, other binaries as tables": "test_bad_input.test_a_file_of_another_kind_under_the_name_of_a_table_is_named",
    "TIFF, BigTIFF, striped or tiled; JPEG, PNG": "test_patches.test_patch_row_and_count_are_of_one_spot",
    "OME-TIFF, channels as pages": "test_pixels.test_red_green_and_blue_may_be_pages_of_their_own",
    "SVS of Aperio, JPEG 2000 too": "test_pixels.test_jpeg_2000_of_older_aperio_scanners_is_of_ycbcr",
    "NDPI of Hamamatsu": "test_foreign_files.test_an_ndpi_is_read_tile_by_tile",
    "CZI, MIRAX, VSI, DICOM and others": "test_pixels.test_other_formats_are_refused_by_name",
    "16-bit and fluorescence images": "test_silent.test_a_png_of_16_bits_is_refused",
}  # fmt: skip


def test_each_line_of_what_is_read_is_held_by_a_test():
    text = (REPOSITORY / "docs" / "running.md").read_text()
    section = text.split("## What is read")[1].split("\n## ")[0]
    lines = re.findall(r"^\| (.+?) \| (.+) \|$", section, re.MULTILINE)
    assert [name for name, _ in lines if name not in ("files", "---")] == [*HELD_BY]
    assert "WSL" in section
    for test in HELD_BY.values():
        module, name = test.split(".")
        content = (REPOSITORY / "tests" / f"{module}.py").read_text()
        assert f"\ndef {name}(" in content, test
