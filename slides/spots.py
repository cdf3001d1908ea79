"""The spots of a slide: positions and counts that belong together, and which spots are left out."""

import anndata
import numpy as np

from slides import inputs
from slides.counts import check_counts, has_one_depth, read_matrix
from slides.hest_patches import holds_patches, open_hest_patches
from slides.positions import lay_blocks, measure_pitch
from study.errors import InputError

FEW_COUNTED = 0.2  # of the spots in tissue: not in the matrix, from which it is warned of
SAME_TISSUE = 0.95  # of the spots; of four slides of one liver, two shared up to 0.92


def read_spots(slide, positions, genome="", named=()):
    """The spots of a slide as AnnData, by array_row and array_col; without a matrix X is None.

    obs holds positions, tissue_index, donor, barcode, pitch (px), block and, with a matrix,
    n_counts. Left out are spots without a position, not in_tissue or without counts; one line a
    reason says so, and uns["left_out"] counts them by reason. `genome` and `named` are those
    of read_matrix.
    """
    if slide.matrix is None:
        table = anndata.AnnData(obs=positions)
    else:
        table = read_counts(slide, positions, genome, named)
    table = leave_out(slide, table, table.obs["in_tissue"] != 1, "not in_tissue")
    if not table.n_obs:
        raise InputError(f"{slide.positions}: no spot is in_tissue")
    if slide.matrix is not None:
        table = leave_out(slide, table, table.obs["n_counts"] == 0, "without counts")
        if not table.n_obs:
            raise InputError(f"{slide.matrix}: no spot has a count")
    if holds_patches(slide.image):
        with open_hest_patches(slide.image) as (barcodes, _):
            lost = ~table.obs_names.isin(barcodes)
        if lost.all():
            raise InputError(f"{slide.image}: no patch for barcode {table.obs_names[0]}, or others")
        table = leave_out(slide, table, lost, "without a patch")
    table = table[np.lexsort([table.obs["array_col"], table.obs["array_row"]])].copy()
    table.obs["tissue_index"] = slide.tissue_index
    table.obs["donor"] = slide.donor
    table.obs["pitch"] = pitch = measure_pitch(table.obs)
    table.obs["block"] = lay_blocks(table.obs, pitch, slide.tissue_index)
    table.obs["barcode"] = table.obs_names
    table.obs_names = [f"{slide.tissue_index}_{barcode}" for barcode in table.obs_names]
    return table


def leave_out(slide, table, spots, reason, say=True):
    """The table without these of its spots, (n,) bool, counted in uns and, to say, in a line."""
    spots = np.asarray(spots)
    if not spots.any():
        return table
    barcode = table.obs_names[spots][0]
    # Without a matrix, positions list the whole array, of which tissue is a part: that is no news.
    if say and slide.matrix is not None:
        n_spots = spots.sum()
        print(f"slide {slide.tissue_index}: {n_spots} spots {reason} are left out, as {barcode}")
    kept = table[~spots].copy()
    kept.uns["left_out"] = {**table.uns.get("left_out", {}), reason: int(spots.sum())}
    return kept


def read_counts(slide, positions, genome, named):
    """The matrix of a slide, checked, with positions and n_counts in obs.

    Barcodes without a position are left out where most have one.
    """
    table = read_matrix(slide.matrix, genome, named)
    check_counts(table, slide.matrix)
    table.X.eliminate_zeros()  # which some files hold
    table.X.sort_indices()
    places = match_barcodes(slide, table.obs_names, positions.index)
    lost = places < 0
    if lost.any():
        barcode, count = table.obs_names[lost][0], f"{lost.sum()} of {len(lost)} barcodes"
        if lost.mean() >= 0.5:
            raise InputError(
                f"{slide.positions}: no position for barcode {barcode} of {slide.matrix} "
                f"({count}): the two files are not of one slide"
            )
        inputs.warn(
            f"{slide.positions}: {count} of {slide.matrix} have no position and are left out, "
            f"as {barcode}: add them if they are wanted"
        )
        table = leave_out(slide, table, lost, "without a position", say=False)
    table.obs = positions.iloc[places[~lost]].set_axis(table.obs_names)
    # Over all genes of the matrix, also those that other slides lack.
    table.obs["n_counts"] = np.asarray(table.X.sum(1)).ravel()
    if has_one_depth(table.X):
        inputs.warn(
            f"{slide.matrix}: all spots have about {table.obs['n_counts'].median():,.0f} counts, "
            "so that these are no raw counts: give those"
        )
    check_tissue(slide, table.obs, positions)
    report_uncounted(slide, positions, places[~lost])
    return table


def report_uncounted(slide, positions, places):
    """Print how many spots in tissue are not in the matrix, which holds those at these `places` of
    the positions; warn where they are many, as of a table that breaks off.
    """
    tissue = positions["in_tissue"].to_numpy() == 1
    uncounted = tissue.copy()
    uncounted[places] = False
    if not uncounted.any():
        return
    barcode = positions.index[uncounted][0]
    found = f"{uncounted.sum()} of {tissue.sum()} spots in_tissue are not in it, as {barcode}"
    if uncounted.sum() < FEW_COUNTED * tissue.sum():
        print(f"{slide.matrix}: {found}")
    else:
        inputs.warn(f"{slide.matrix}: {found}: fetch it again, unless they were left out by hand")


def match_barcodes(slide, barcodes, positioned):
    """The place of each barcode among those that have a position, -1 for none.

    Where most do not match as they stand, they are compared without what programs set before and
    after them: -1, -2 of an aggregated matrix, a sample's name.
    """
    places = positioned.get_indexer(barcodes)
    bare, bare_positioned = map(strip_barcodes, (barcodes, positioned))
    if (places >= 0).mean() > 0.5 or not bare.is_unique or not bare_positioned.is_unique:
        return places
    found = bare_positioned.get_indexer(bare)
    if (found >= 0).mean() <= 0.5:
        return places
    number = np.flatnonzero(found >= 0)[0]
    print(
        f"slide {slide.tissue_index}: barcodes are matched without prefix and suffix: "
        f"{barcodes[number]} of the matrix is {positioned[found[number]]} of the positions"
    )
    return found


def strip_barcodes(barcodes):
    """Barcodes without prefix and suffix: their 14 letters or more, or what precedes -1."""
    letters = barcodes.str.extract("([ACGT]{14,})", expand=False)
    others = barcodes.str.replace(r"^X(?=\d)|[-.]\d+$", "", regex=True)  # R makes X10x13 of 10x13.
    return letters.where(letters.notna(), others)


def check_tissue(slide, spots, positions):
    """InputError where the tissue of the positions is not that of the matrix.

    Barcodes prove nothing, since they are the same on every Visium slide. A matrix may hold all
    spots of the array, or fewer than lie in the tissue. But where it lacks spots of the tissue and
    has others, which are as deep, it is another slide's.
    """
    inside = spots["in_tissue"] == 1
    n_tissue = (positions["in_tissue"] == 1).sum()
    smaller = min(len(spots), n_tissue)
    if inside.sum() >= SAME_TISSUE * smaller:
        return
    depth = spots["n_counts"]
    if inside.any() and depth[~inside].median() < 0.5 * depth[inside].median():
        return  # Few counts: they came there by diffusion.
    raise InputError(
        f"{slide.positions}: {inside.sum()} of the {len(spots)} spots of {slide.matrix} are "
        f"in_tissue, of {n_tissue} that are: the two files are not of one slide; if both were "
        "filtered by hand, set in_tissue to 1 where there are counts"
    )
