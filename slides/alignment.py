"""Whether the spots of a slide lie on its tissue: rows and columns swapped, the image turned or
mirrored, patches that show nothing.

Patches (n, S, S, 3) uint8 RGB. Places on a slide are rows and columns in px of its image.
"""

import numpy as np
import pandas as pd

from common import PATCH_SIZE, parts_of
from slides import inputs
from slides.imaging import DARK_SLIDE, PLACE, SWAPPED, find_inside, lies_mirrored, read_patches
from slides.positions import is_hexagonal
from study.errors import InputError

SWAP_SAMPLE = 64  # spots that are looked at for pxl_row and pxl_col being swapped
LEAST_DETAIL = 5.0  # of 255, a standard deviation: glass has less, HER2ST's spots 22 and more
LEAST_COLOUR = 40.0  # of 255, from the least to the most of red, green and blue: glass has less
GLASS = 180  # of 255: glass is brighter, in the brightest of its channels
MANY_BLANK = 0.25  # of the spots; fat and lumina are blank as well
FEW_BLANK = 0.05  # of the spots; from here on it is asked whether the image is turned
TURNS = {  # (rows, columns) on an image of (height, width), were it turned or mirrored back
    "turned by 180 degrees": lambda row, col, high, wide: (high - 1 - row, wide - 1 - col),
    "turned by 90 degrees clockwise": lambda row, col, high, wide: (col, wide - 1 - row),
    "turned by 90 degrees anticlockwise": lambda row, col, high, wide: (high - 1 - col, row),
    "mirrored top to bottom": lambda row, col, high, wide: (high - 1 - row, col),
    "mirrored left to right": lambda row, col, high, wide: (row, wide - 1 - col),
    "mirrored with rows and columns swapped": lambda row, col, high, wide: (col, row),
    "mirrored with rows and columns swapped and turned by 180 degrees": (
        lambda row, col, high, wide: (high - 1 - col, wide - 1 - row)
    ),
}


def warn_of_swap(slide, spots, shape):
    """Print a warning where pxl_row and pxl_col look swapped.

    Swapped, the array lies mirrored on the image; the spots would then cover its tissue, which has
    colour, better the other way round.
    """
    spots = spots[find_inside(spots, shape)]
    if not lies_mirrored(spots) or (spots[["pxl_col", "pxl_row"]].to_numpy() >= shape).any():
        return
    some = choose_some(spots)
    saturations = []  # from 0 to 1: the largest less the smallest of red, green and blue
    for places in (some, some.rename(columns=SWAPPED)):
        patches = np.empty((len(some), PATCH_SIZE, PATCH_SIZE, 3), np.uint8)
        read_patches(slide.image, places, patches)
        saturations.append(np.ptp(patches, axis=3).mean() / 255)
    here, there = saturations
    if there > 1.25 * here:
        inputs.warn(
            f"{slide.positions}: pxl_row and pxl_col look swapped: the other way round, "
            f"the spots' mean saturation would be {there:.2f} and not {here:.2f}"
        )
    elif is_hexagonal(spots):
        inputs.warn(
            f"{slide.positions}: Visium's array lies mirrored on the image: are pxl_row and "
            "pxl_col swapped, or the image flipped? Look at maps of its counts"
        )


def find_blank(centres):
    """(n,) bool: patches (n, S, S, 3) that show nothing: no colour, and no detail in squares of
    8 x 8 px, in which the noise of a camera averages out; or one colour in all their pixels.
    """
    squares = centres.shape[1] // 8
    blank = np.empty(len(centres), bool)
    for part in parts_of(len(centres), 64):
        some = centres[part, : 8 * squares, : 8 * squares]
        flat = np.ptp(some, axis=(1, 2)).max(1) == 0
        means = some.reshape(len(some), squares, 8, squares, 8, 3).mean((2, 4))
        detail, mean = means.std((1, 2)).max(1), means.mean((1, 2))
        colour, brightest = np.ptp(mean, axis=1), mean.max(1)
        seen = (brightest > DARK_SLIDE) & (brightest < GLASS)  # neither unscanned nor glass
        blank[part] = flat | ((detail < LEAST_DETAIL) & (colour < LEAST_COLOUR) & ~seen)
    return blank


def report_blank(slide, spots, patches, shape):
    """Count in a line the spots that show nothing, as glass, or what was not scanned or is lost, by
    the inner halves of their patches: at 0.5 um/px a spot of Visium.

    It is a warning where the spots are many, where one has a single colour, which no camera gives,
    or where they would lie on tissue were the image turned or mirrored.
    """
    inside = find_inside(spots, shape)
    side = patches.shape[1]
    inner = slice(side // 4, side // 4 + side // 2)
    spots, centres = spots[inside], patches[:, inner, inner][inside]
    if len(centres) > 1 and not np.ptp(centres, axis=(0, 1, 2)).any():
        raise InputError(
            f"{slide.image}: all {len(spots)} spots are of one colour, {centres[0, 0, 0]}: nothing "
            "is there, or its alpha is 0 everywhere: export it as RGB without alpha"
        )
    some = centres[:, ::8, ::8]
    stain = "grey" if not np.ptp(some, axis=3).any() else "nearly black"
    if len(centres) and (stain == "grey" or np.median(some) < DARK_SLIDE):
        inputs.warn(
            f"{slide.image}: its spots are {stain}: no H&E? It may be fluorescence or one channel: "
            "give the H&E image as 8-bit RGB"
        )
    blank = find_blank(centres)
    if not blank.any():
        return
    counted = (
        f"{slide.image}: {blank.sum()} of {len(spots)} spots lie on glass, or on what was not "
        f"scanned or is lost, as {spots['barcode'][blank].iloc[0]}"
    )
    turns = find_turns(slide, spots, blank.mean(), shape) if blank.mean() >= FEW_BLANK else []
    flat = sum(np.ptp(centre, axis=(0, 1)).max() == 0 for centre in centres[blank])
    if turns:
        likeliest = ", the first by the array's rows and columns" if len(turns) > 1 else ""
        inputs.warn(
            f"{counted}: they would lie on tissue were the image {', or '.join(turns)}{likeliest}: "
            "have the positions fit its pixels"
        )
    elif flat or blank.mean() >= MANY_BLANK:
        inputs.warn(
            f"{counted} ({flat} are of one colour): is it whole, and are these its positions?"
        )
    else:
        print(counted)


def choose_some(spots):
    """SWAP_SAMPLE of the spots at most, evenly over the table."""
    return spots.iloc[np.linspace(0, len(spots) - 1, min(len(spots), SWAP_SAMPLE)).astype(int)]


def find_turns(slide, spots, share, shape):
    """Names of the TURNS that bring most of the blank spots, a `share` of all, onto tissue; those
    first that the array's rows and columns speak for.
    """
    some = choose_some(spots)
    rows, columns = some[PLACE].to_numpy().T
    turned = {
        name: some.assign(**dict(zip(PLACE, turn(rows, columns, *shape), strict=True)))
        for name, turn in TURNS.items()
    }
    turned = {name: moved for name, moved in turned.items() if find_inside(moved, shape).all()}
    if not turned:
        return []
    side = PATCH_SIZE // 2  # as of the inner halves in report_blank
    every = np.empty((len(turned) * len(some), side, side, 3), np.uint8)
    read_patches(slide.image, pd.concat(turned.values()), every)
    blank = find_blank(every).reshape(len(turned), len(some)).mean(1)
    most = min(share / 4, min(blank) + FEW_BLANK)
    fitting = [name for name, left in zip(turned, blank, strict=True) if left < most]
    mirrored = lies_mirrored(spots)  # as positions do that count rows from below
    return sorted(fitting, key=lambda name: name.startswith("mirrored") != mirrored)
