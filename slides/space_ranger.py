"""Folders as Space Ranger leaves them, to the rows of a slides.csv."""

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

import common
from common import PATCH_SIZE
from slides import imaging, inputs, visium_hd
from slides.counts import find_part
from slides.manifest import Slide, link_slides
from slides.positions import SPOT_PITCH, measure_pitch, read_positions
from study import files
from study.errors import InputError

HIRES_IMAGE = "tissue_hires_image.png"
HIRES_SCALE = "tissue_hires_scalef"  # px of it a px of the full-resolution image
BIN_UM = 56.0  # um, the spots to which the bins of Visium HD are summed
SAME_IMAGE = 0.9  # r of the views' grey values, at least; sections side by side reach 0.8
VIEW = 64  # px, the side of the views by which two images are compared


def read_space_ranger(folder, image=None, check=True, bin_um=BIN_UM):
    """(Slide, its positions) of a folder outs/ of Space Ranger, or of the folder that holds outs/.

    Without the full-resolution `image`, which is not in the folder, the hires image is taken, which
    is coarse, and the positions are scaled to it. An image is held against the hires image, but
    where `check` is False. um per px follow from the spots, which are 100 um apart; of Visium HD,
    whose bins are summed to spots of `bin_um` by visium_hd.make_spots, they are stated.
    """
    outs = find_outs(folder)
    if image is not None and not image.exists():
        raise InputError(f"image {image}: no such file")
    name = name_sample(folder)
    bins = outs / "spatial" / visium_hd.BIN_POSITIONS
    if outs.absolute().name.startswith("square_") or bins.exists():
        positions_file, matrix = visium_hd.make_spots(outs, name, bin_um)
        positions = read_positions(positions_file)
        um_per_px = read_scale(outs, "microns_per_pixel")
    else:
        positions_file = find_spatial(outs, "tissue_positions.csv", "tissue_positions_list.csv")
        matrix = find_matrix(outs)
        positions = read_positions(positions_file)
        um_per_px = SPOT_PITCH / measure_pitch(positions)
    if image is None:
        image = find_spatial(outs, HIRES_IMAGE)
        scale = read_scale(outs, HIRES_SCALE)
        positions = scale_positions(positions, scale)
        um_per_px /= scale
        width = f"{PATCH_SIZE} px of it are {PATCH_SIZE * um_per_px:.0f} um"
        print(f"{name}: the hires image, {um_per_px:.2f} um/px: {width}")
    elif check:
        check_images("the image", [folder], [image])
    um_per_px = round(um_per_px, 4)
    return Slide(1, name, name, image, um_per_px, positions_file, matrix), positions


def scale_positions(positions, scale):
    """The positions on an image that is `scale` times as wide, in whole px."""
    places = np.rint(positions[imaging.PLACE] * scale).astype(int)
    return positions.assign(**places)


def find_outs(folder):
    """The folder outs/ of Space Ranger, which may be `folder` itself; of Visium HD, its bins'."""
    outs = folder / "outs" if (folder / "outs").is_dir() else folder
    if (outs / "aggr_tissue_positions.csv").exists():
        raise InputError(
            f"{outs}: what spaceranger aggr made of samples: name the outs/ of each sample, "
            "as spaceranger count made"
        )
    binned = outs if outs.name == "binned_outputs" else outs / "binned_outputs"
    if not binned.is_dir():
        if outs.name == "segmented_outputs" or (outs / "segmented_outputs").is_dir():
            raise InputError(
                f"{outs}: holds Visium HD's counts of cells, and spots are squares of bins here: "
                "name an outs/ with binned_outputs"
            )
        return outs
    for name in visium_hd.BINS:
        if (binned / name).is_dir():
            return binned / name
    fix = f"copy one of them there{name_bins(binned)}"
    raise InputError(f"{binned}: Visium HD without {' or '.join(visium_hd.BINS)}: {fix}")


def name_bins(binned):
    """How to read bins of another size than BINS, as a message ends; "" where there are none."""
    sizes = []
    for path in sorted(binned.glob("square_*um")):
        sizes += map(int, re.findall(r"^square_0*([1-9]\d*)um$", path.name))
    if not sizes:
        return ""
    size = max(sizes)  # The finest take the most memory.
    fit = max(round(BIN_UM / size), 1) * size
    return f", or name the folder {binned / f'square_{size:03d}um'} and --bin-um {fit}"


def find_matrix(outs):
    """The matrix in a folder of Space Ranger."""
    return find_output(outs, "filtered_feature_bc_matrix.h5", "filtered_feature_bc_matrix")


def find_spatial(outs, *names):
    """The first of the names in Space Ranger's folder spatial/, or beside the others."""
    return find_output(outs / "spatial" if (outs / "spatial").is_dir() else outs, *names)


def find_output(folder, *names):
    """The first of the names in one of Space Ranger's folders, as find_part finds it."""
    try:
        return find_part(folder, *names)
    except InputError as error:
        raise InputError(f"{error}; {folder} is to lie in a folder outs/ of Space Ranger") from None


def name_sample(folder):
    """The name of a sample's folder, which holds outs/, is outs/, or is a folder of bins in it."""
    place = folder.absolute()
    while "binned_outputs" in (place.name, place.parent.name):
        place = place.parent
    return (place.parent if place.name == "outs" else place).resolve().name


def read_scale(outs, name):
    """A number above 0 that Space Ranger's scalefactors_json.json states under this name."""
    path = find_spatial(outs, "scalefactors_json.json")
    try:
        scale = float(json.loads(inputs.decode_text(inputs.read_bytes(path)))[name])
    except (*inputs.UNREADABLE, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no {name} ({error})") from None
    if not 0 < scale < math.inf:
        raise InputError(f"{path}: {name} is {scale:g}; expected a number above 0")
    return scale


@dataclass(frozen=True)
class View:
    """An image on a few px, to tell whether two files show the same."""

    path: Path
    shape: np.ndarray  # height, width in px of the full-resolution image
    grey: np.ndarray  # (VIEW, VIEW) float64
    tolerance: float = 0.0  # px by which the shape may be wrong


def view_image(path, scale=1.0):
    """The View of an image that is `scale` times as wide as the full-resolution one."""
    image = imaging.open_image(inputs.unpack(path))
    thumbnail = imaging.make_thumbnail(image, max(1, min(image.shape) // (2 * VIEW)))
    return view_thumbnail(path, thumbnail, scale)


def view_thumbnail(path, thumbnail, scale=1.0):
    """As view_image, of an image whose Thumbnail is there."""
    grey = Image.fromarray(thumbnail.pixels()).convert("L").resize((VIEW, VIEW), Image.BOX)
    tolerance = 0.0 if scale == 1 else 1.5 / scale  # A scaled image's sides are whole px.
    shape = np.array(thumbnail.slide_shape) / scale
    return View(path, shape, np.asarray(grey, np.float64), tolerance)


def view_hires(folder):
    """The View of Space Ranger's hires image in outs/ or spatial/; None, and a warning, where it is
    not available.
    """
    outs = find_outs(folder)
    try:
        image, scale = find_spatial(outs, HIRES_IMAGE), read_scale(outs, HIRES_SCALE)
    except InputError as error:
        inputs.warn(f"{folder}: whether its image fits cannot be told ({error})")
        return None
    return view_image(image, scale)


def check_hires(slide, shape, thumbnail=None):
    """InputError where an image is not the one of the hires image that lies beside the positions.

    `shape` is its (height, width); its content is compared where its Thumbnail is there.
    """
    if slide.positions is None:
        return
    spatial = slide.positions.resolve().parent
    if not all((spatial / name).exists() for name in (HIRES_IMAGE, "scalefactors_json.json")):
        return
    if slide.image.samefile(spatial / HIRES_IMAGE):
        return
    hires = view_hires(spatial)
    if hires is None:
        return
    view = View(slide.image, np.array(shape), hires.grey)
    if thumbnail is not None:
        view = view_thumbnail(slide.image, thumbnail)
    if not is_same_image(view, hires):
        raise InputError(describe_misfit("image", slide.positions, view, hires, None))


def is_same_size(view, hires):
    """Whether an image is as large as the one of which Space Ranger made the hires image."""
    return (abs(view.shape - hires.shape) <= hires.tolerance).all()


def is_same_image(view, hires):
    """Whether an image has the size and shows the content of a hires image."""
    if not is_same_size(view, hires):
        return False
    r = common.pearson_per_gene(view.grey.reshape(-1, 1), hires.grey.reshape(-1, 1))[0]
    return np.isnan(r) or r >= SAME_IMAGE


def check_images(name, folders, images):
    """InputError unless each image has the size and content of its folder's hires image; `name` is
    what the message calls the images. The order that fits is named where there is one.
    """
    hires = [view_hires(folder) for folder in folders]
    views = [view_image(image) for image in images]
    for folder, view, expected in zip(folders, views, hires, strict=True):
        if expected is not None and not is_same_image(view, expected):
            order = order_images(views, hires)
            raise InputError(describe_misfit(name, folder, view, expected, order))


def order_images(views, hires):
    """The images in the order in which they fit the hires images; None where there is none."""
    order = []
    for expected in hires:
        fitting = [view for view in views if expected is None or is_same_image(view, expected)]
        if len(fitting) != 1:
            return None
        order.append(fitting[0].path)
    return order if len(set(order)) == len(order) else None


def describe_misfit(name, folder, view, expected, order):
    """Why an image is not that of a folder of Space Ranger, and what to do."""
    height, width = view.shape
    if is_same_size(view, expected):
        cause = f"shows something else than {expected.path}"
    else:
        high, wide = expected.shape
        cause = (
            f"is {height:.0f} x {width:.0f} px, {height / high:.3g} times what Space Ranger got, "
            f"about {high:.0f} x {wide:.0f} px by its hires image and tissue_hires_scalef"
        )
    fix = f"give the image that Space Ranger got for {folder}"
    if order:
        fix = f"the order that fits is {','.join(map(str, order))}"
    return f"{name} {view.path} {cause}: {fix}"


def write_manifest(root, folders, images, use_hires, bin_um=BIN_UM):
    """slides.csv for Space Ranger's folders and their images, and root/links/ to what it names;
    positions and matrix of Visium HD, of spots of `bin_um`, are written there. Slides of one name
    get their number.
    """
    if len(images) not in (0, len(folders)):
        raise InputError(
            f"--images: {len(images)} images for {len(folders)} folders of Space Ranger: "
            "give one for each"
        )
    if not images and not use_hires:
        raise InputError(
            f"{folders[0]} holds no full-resolution image, which Space Ranger got with --image or "
            "--cytaimage: name it with --images, or take --use-hires"
        )
    samples = [
        read_space_ranger(folder, image, check=False, bin_um=bin_um)
        for folder, image in zip(folders, images or [None] * len(folders), strict=True)
    ]
    if images:
        check_images("--images", folders, images)
    names, slides = [slide.name for slide, _ in samples], []
    for number, (slide, _) in enumerate(samples, 1):
        name = f"{slide.name}_{number}" if names.count(slide.name) > 1 else slide.name
        slides.append(replace(slide, tissue_index=number, name=name, donor=name))
    # Of a full-resolution image they are Space Ranger's own.
    positions = [None if images else places for _, places in samples]
    table = link_slides(root, slides, positions, "positions_hires.csv", "--from-spaceranger")
    path = root / "slides.csv"
    files.save_csv(path, table)
    print(f"wrote {path}: each slide is taken for another donor's; fix that there if it is not so")
