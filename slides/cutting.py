"""A slide's patches: cut at its spots, and checked to belong to them. Scripts 19 and 26 do both."""

from typing import NamedTuple

import numpy as np

from slides import imaging, space_ranger


class Cut(NamedTuple):
    """What is known of a slide when its patches are cut."""

    image: imaging.SlideImage
    thumbnail: imaging.Thumbnail | None
    over_border: int  # patches that lie partly outside the image
    inside: np.ndarray  # (n,) bool: spots whose centre lies in the image


def cut_spots(slide, spots, patches, um_per_px, scratch, *, thumbnail):
    """Fill patches (n, S, S, 3) uint8 of um_per_px (0: the slide's own) around the spots of a
    table, in one pass over the image, and check them; larger ones are read into `scratch` first.

    A `thumbnail` is made in the same pass, if asked for. Returns the Cut.
    """
    step = imaging.thumbnail_step(slide) if thumbnail else None
    image, made, over = imaging.read_resampled(slide, spots, patches, um_per_px, scratch, step)
    if slide.positions is not None:
        imaging.warn_of_swap(slide, spots, patches, image.shape)
    space_ranger.check_hires(slide, image.shape, made)
    if not imaging.holds_patches(slide.image):
        imaging.report_blank(slide, spots, imaging.cut_centres(patches), image.shape)
    return Cut(image, made, over, imaging.find_inside(spots, image.shape))
