"""A slide's patches: cut at its spots, and checked to belong to them. Scripts 19 and 26 do both."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from common import parts_of
from slides import alignment, imaging, inputs, space_ranger
from slides.hest_patches import copy_hest_patches, holds_patches


class Cut(NamedTuple):
    """What is known of a slide when its patches are cut."""

    image: imaging.SlideImage
    thumbnail: imaging.Thumbnail | None
    over_border: int  # patches that lie partly outside the image
    inside: np.ndarray  # (n,) bool: spots whose centre lies in the image, or that have a patch


def cut_spots(slide, spots, patches, um_per_px, scratch, *, thumbnail):
    """Fill patches (n, S, S, 3) uint8 of um_per_px (0: the slide's own) around the spots of a
    table, in one pass over the image, and check them; larger ones are read into `scratch` first.

    A `thumbnail` is made in the same pass, if asked for. Returns the Cut.
    """
    if holds_patches(slide.image):  # Patches that were made elsewhere tell nothing of an image.
        image = copy_hest_patches(slide, spots, patches, um_per_px)
        return Cut(image, None, 0, np.ones(len(spots), bool))
    step = imaging.thumbnail_step(slide) if thumbnail else None
    image, made, over = read_resampled(slide, spots, patches, um_per_px, scratch, step)
    if slide.positions is not None:
        alignment.warn_of_swap(slide, spots, image.shape)
    space_ranger.check_hires(slide, image.shape, made)
    alignment.report_blank(slide, spots, patches, image.shape)
    return Cut(image, made, over, imaging.find_inside(spots, image.shape))


def read_resampled(slide, spots, patches, um_per_px, scratch, step):
    """As imaging.read_patches, of patches (n, S, S, 3) whose pixels are um_per_px wide; 0: the
    slide's own. Larger or smaller ones are read into a file in the folder `scratch`, and resized.

    Returns (SlideImage, Thumbnail or None, number of patches over the border).
    """
    finer = slide.um_per_px / um_per_px if um_per_px else 1.0
    size = patches.shape[1]
    if 0.99 < finer < 1.01:
        image, thumbnail = imaging.read_patches(slide.image, spots, patches, step)
        return image, thumbnail, imaging.count_over_border(spots, image.shape, size)
    if finer > 2:
        inputs.warn(
            f"{slide.image}: {finer:.0f} times as coarse as the patches made of it: its detail is "
            "not there; give the full-resolution image"
        )
    side = max(1, round(size * um_per_px / slide.um_per_px))
    native = imaging.map_scratch(scratch, (len(spots), side, side, 3))
    image, thumbnail = imaging.read_patches(slide.image, spots, native, step)
    for part in parts_of(len(spots), 64):
        images = torch.from_numpy(native[part]).permute(0, 3, 1, 2)
        images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
        patches[part] = images.permute(0, 2, 3, 1).numpy()
    how = f"{image.how}; resampled from {slide.um_per_px:g} to {um_per_px:g} um/px"
    return image._replace(how=how), thumbnail, imaging.count_over_border(spots, image.shape, side)
