"""Patches of HEST-1k, as a file of them stands in place of a slide's image."""

from contextlib import contextmanager

import h5py
import numpy as np
import pandas as pd

from common import PATCH_SIZE
from slides import imaging, inputs
from study.errors import InputError


def holds_patches(image):
    """Whether the image of a slide is a file of patches, as HEST-1k has them, one for each spot."""
    return image.suffix == ".h5"


@contextmanager
def open_hest_patches(path):
    """The (barcodes, patches (n, S, S, 3) uint8) in a file of HEST-1k, which is open meanwhile."""
    try:
        with h5py.File(path) as file:
            patches = file["img"]
            if patches.shape[1:] != (PATCH_SIZE, PATCH_SIZE, 3) or patches.dtype != np.uint8:
                raise InputError(
                    f"{path}: img is {patches.dtype} {patches.shape}; "
                    f"expected uint8 (n, {PATCH_SIZE}, {PATCH_SIZE}, 3)"
                )
            barcodes = pd.Index(file["barcode"].asstr()[:].ravel())
            inputs.check_unique(barcodes, "barcode", path)
            yield barcodes, patches
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"{path}: not a whole file of patches with img and barcode ({error}); fetch it again"
        ) from None


def copy_hest_patches(slide, spots, patches, um_per_px):
    """Fill patches (n, S, S, 3) uint8 with those of the spots' barcodes; returns a SlideImage.

    It has no regions, and is as large as its spots need.
    """
    if um_per_px not in (0, slide.um_per_px):
        raise InputError(
            f"--um-per-px {um_per_px:g}: the patches of {slide.image} are {slide.um_per_px:g} "
            "um/px and are taken as they are: leave it out, or give the whole image"
        )
    with open_hest_patches(slide.image) as (barcodes, images):
        for number, place in enumerate(barcodes.get_indexer(spots["barcode"])):
            patches[number] = images[place]
    bottom, right = spots[imaging.PLACE].max() + 1
    return imaging.SlideImage("patches of HEST", (int(bottom), int(right)), lambda needed: iter(()))
