"""One patch of H&E to one Pearson r, in the order in which the data flows: device -> spot data ->
patches -> augmentation -> stain -> model -> training -> prediction -> correlation

Arrays and tensors in, arrays and tensors out. What belongs to one start of a script is in study/,
how slides become patches and counts in slides/ and script 19.

Shapes: N spots, G genes, B patches of a batch, S px a side, F features. A `recipe` is the plain
dict of a script's constants.
"""

import functools
import hashlib
import inspect
import itertools
import json
import os
import pickle
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.spatial import cKDTree
from scipy.stats import rankdata
from sklearn.preprocessing import normalize
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from study import backbones, files, hashes, shell
from study.errors import InputError

# -------------------------------------------------------------------------------------- conventions
FORMAT = 4  # of script 19's files, rows and weights; raised when one of them changes
RESULTS = 9  # raised when the same constants give another number: rows on disk are made anew then
PATCH_SIZE = 224  # px of the slide; 68 um at GSE240429's 0.304 um/px
GROUP_SIZE = 50  # genes of the groups HEG and HVG
GROUPS = ("HEG", "HVG", "MG")
MARKER_GENES = ("HAL", "CYP3A4", "VWF", "SOX9", "KRT7", "ANXA4", "ACTA2", "DCN")
ID_COLUMNS = ["id", "tissue_index", "barcode", "array_row", "array_col", "pxl_row", "pxl_col"]
SPOT_COLUMNS = ["donor", "pitch", "block"]  # what script 19 adds to them
POSITION_COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row", "pxl_col"]
ROLES = ("train", "valid", "test")  # of a spot; "" takes no part
SCORED = ("valid", "test")  # the roles whose spots are predicted and scored
FOLDS = 5  # of PROTOCOL block
TASK_FOLDS = "folds.csv"  # in a data root that 19 made of a task of HEST-Benchmark
TASK_GENES = "hest_genes.csv"  # there as well: the task's genes, which are the panel
MARGIN = 2  # pitches; under block, training spots this near to a validation spot take no part
SPREAD = 1e-6  # relative; a column that varies less is constant
PREDICT_BATCH = {"cpu": 16, "cuda": 256}  # what was fastest; on a processor the caches decide
READ_AHEAD = 2  # batches that are read while one is used
SPOTS_AT_ONCE = 1024  # spots, and genes, whose expression is in memory at a time
GENES_AT_ONCE = 512
BLEND_SD = 1.5  # pitches; of the Gaussian by which NEIGHBOURHOOD averages the spots around


# ------------------------------------------------------------------------------------------- device
def find_device(recipe):
    """The torch.device by DEVICE; of torchrun's processes each has its own GPU."""
    cuda = torch.cuda.is_available() and recipe["DEVICE"] != "cpu"
    if recipe["DEVICE"] == "cuda" and not cuda:
        raise InputError("--device cuda: torch sees no CUDA device; use --device cpu")
    if not cuda:
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def choose_device(recipe):
    """(torch.device, autocast dtype, reason of the dtype) by DEVICE, PRECISION and IMAGE_SIZE."""
    device = find_device(recipe)
    asked = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if recipe["PRECISION"] != "auto":
        return device, asked[recipe["PRECISION"]], "as asked"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(False):
            return device, torch.bfloat16, "the device has it"
        return device, torch.float16, "no bf16; with a loss scaler"
    if not torch.cpu._is_avx512_bf16_supported():
        return device, torch.float32, "the processor lacks bf16"
    if recipe["IMAGE_SIZE"] < 160:
        return device, torch.float32, "on processors as fast as bf16 below 160 px"
    return device, torch.bfloat16, "the device has it"


def joined_ranks():
    """(number of processes that train one network together, this one's number)."""
    if not dist.is_initialized():
        return 1, 0
    return dist.get_world_size(), dist.get_rank()


# ---------------------------------------------------------------------------------------- spot data
@dataclass(frozen=True, eq=False)  # Hashed by identity, which restrict_panel's cache needs.
class SpotData:
    """The spots of a data root; row i of every member is the same spot."""

    root: Path
    patches: torch.Tensor  # (N, 224, 224, 3) uint8 RGB, memory-mapped
    # N rows, ID_COLUMNS and SPOT_COLUMNS: pitch in px, block a square five pitches wide.
    spots: pd.DataFrame
    genes: list  # G names: the panel
    # (N, G) float32, memory-mapped: [spots] of either reads (n, G) into memory.
    target: np.ndarray  # what is trained on: that of TARGET
    lognorm: np.ndarray  # log-normalised counts
    # N x G without values; obs n_counts; obsm colour (N, 40); var ceilings and Moran's I by slide.
    annotations: anndata.AnnData
    meta: dict  # meta.json of script 19
    fingerprint: str  # of meta.json, which holds hashes of the sources
    label: str  # "SIMULATED slides: " or nothing; begins the header, titles and figures of a run
    harmonised: tuple = ()  # tissue_index values that Harmony was run on; () = all of the data root

    @property
    def slide_names(self):
        """{tissue_index: the slide's name} of all slides of the data root."""
        return {slide["tissue_index"]: slide["name"] for slide in self.meta["slides"]}


def places_in_pitches(spots):
    """Table (N, 2): where the spots lie, column and row, in pitches of their slide."""
    return spots[["pxl_col", "pxl_row"]].div(spots["pitch"], axis=0)


def pitches_to_nearest(spots, others):
    """(n,) pitches from a table's spots to the nearest of `others` on the slide; inf without."""
    pitches = np.full(len(spots), np.inf)
    inside = spots.groupby("tissue_index").indices
    for slide, near in others.groupby("tissue_index"):
        if slide in inside:
            tree = cKDTree(places_in_pitches(near))
            here = inside[slide]
            pitches[here], _ = tree.query(places_in_pitches(spots.iloc[here]))
    return pitches


def parts_of(n, size):
    """Slices of 0..n, `size` long but for the last."""
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def log_normalise(counts, totals):
    """log1p of counts (N, G) scaled to 10,000 a spot by totals (N,) over ALL genes: float32."""
    scale = 1e4 / np.maximum(np.asarray(totals, np.float64), 1)
    result = np.empty(counts.shape, np.float32)
    # In parts, because all spots at once would take four times the memory in float64.
    for part in parts_of(len(scale), SPOTS_AT_ONCE):
        counted = counts[part]
        dense = counted.toarray() if hasattr(counted, "toarray") else np.asarray(counted)
        result[part] = np.log1p(dense * scale[part, None])
    return result


def load_dataset(data_root, target):
    """Read what script 19 wrote, as SpotData with the target named `target`. InputError with 19's
    command where it is missing, damaged or made otherwise.
    """
    root = Path(data_root)
    folder = shell.find_dataset(data_root)
    command = f"python 19_make_patches_and_csv.py --data-root {data_root}"
    try:
        meta_text = (folder / "meta.json").read_bytes()
        meta = json.loads(meta_text)
        check_meta(meta, folder, target, command)
        annotations = read_annotations(folder / "counts.h5ad")
        lognorm = map_array(folder / "lognorm.npy")
        trained_on = lognorm if target == "lognorm" else map_array(folder / "target.npy")
        spots = annotations.obs.reset_index(names="id")[ID_COLUMNS + SPOT_COLUMNS]
        patches = map_array(folder / "patches.npy")
        is_changed = (folder / "meta.json").read_bytes() != meta_text
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{folder} is damaged ({error}): run {command} again") from None
    if is_changed:
        raise InputError(f"{folder}: made anew in this moment: run the same command again")
    if not lognorm.shape == trained_on.shape == annotations.shape or len(patches) != len(spots):
        raise InputError(f"{folder}: not of one piece: run {command} again")
    return SpotData(
        root=root,
        patches=torch.from_numpy(patches),
        spots=spots,
        genes=annotations.var_names.tolist(),
        target=trained_on,
        lognorm=lognorm,
        annotations=annotations,
        meta=meta,
        fingerprint=hashes.fingerprint_of(meta_text),
        label="SIMULATED slides: " if meta["simulated"] else "",
    )


def check_meta(meta, folder, target, command):
    """InputError unless script 19 made the folder with this version and for this target."""
    if meta["format"] != FORMAT:
        raise InputError(f"{folder} was made by another version: run {command} again")
    if not meta["target"]:
        raise InputError(
            f"{folder} holds patches alone: its slides.csv names no matrix, "
            "so nothing can be learnt"
        )
    if target in ("lognorm", meta["target"]):
        return
    if meta["target"] == "log1p":
        raise InputError(
            f"{folder} is of a task of HEST-Benchmark: use --protocol hest --target log1p"
        )
    if target == "log1p":
        raise InputError(
            f"{folder} is of no task of HEST-Benchmark, which --protocol hest is for: make a data "
            "root with 19_make_patches_and_csv.py --from-hest FOLDER_OF_A_TASK"
        )
    raise InputError(
        f"{folder} was made with target {meta['target']}: run {command} --target harmony first"
    )


def read_annotations(path):
    """A file of AnnData without its values: obs, obsm and var."""
    with h5py.File(path) as file:
        parts = {name: anndata.io.read_elem(file[name]) for name in ("obs", "obsm", "var")}
    return anndata.AnnData(**parts)


def map_array(path):
    """The array of a .npy file, memory-mapped.

    Mode "c" keeps the file as it is; torch wants memory that could be written.
    """
    return np.load(path, mmap_mode="c", allow_pickle=False).view(np.ndarray)


def mean_and_variance(values, spots):
    """((G,), (G,)) float64 of expression (N, G) over these spots, given by their numbers."""
    sums = squares = 0
    for part in parts_of(len(spots), SPOTS_AT_ONCE):
        read = values[spots[part]].astype(np.float64)
        sums = sums + read.sum(0)
        squares = squares + (read**2).sum(0)
    mean = sums / len(spots)
    return mean, (squares / len(spots) - mean**2).clip(0)


# ------------------------------------------------------------------------------------------ patches
class MappedPatches:
    """SpotData's patches as they lie on disk: [spots] reads (B, 3, size, size) uint8, channels
    last, resized each time anew, in 0.04 ms a patch.
    """

    device = torch.device("cpu")

    def __init__(self, patches, size):
        self.patches = patches
        self.size = size

    def __getitem__(self, spots):
        images = self.patches[spots].permute(0, 3, 1, 2)
        if self.size == PATCH_SIZE:
            return images
        return F.interpolate(images, size=(self.size, self.size), mode="bilinear", antialias=True)


class MappedExpression:
    """Expression as it lies on disk, for read_ahead: [spots] reads a (n, G) float32 tensor."""

    device = torch.device("cpu")

    def __init__(self, values):
        self.values = values

    def __getitem__(self, spots):
        return torch.from_numpy(self.values[spots.numpy()])


@functools.lru_cache(maxsize=1)  # The trainings of a run share one copy.
def place_patches(patches, size, device):
    """SpotData's patches for [spots]: on a GPU whose free memory takes them twice, else mapped."""
    mapped = MappedPatches(patches, size)
    shape = (len(patches), 3, size, size)
    if device.type != "cuda" or np.prod(shape) > 0.5 * torch.cuda.mem_get_info(device)[0]:
        return mapped
    resident = torch.empty(
        shape, dtype=torch.uint8, device=device, memory_format=torch.channels_last
    )
    for spots in torch.arange(len(patches)).split(1024):
        resident[spots[0] : spots[-1] + 1] = mapped[spots].to(device)
    return resident


def read_ahead(source, batches, device):
    """Yield source[spots] on the device for each of the batches, source being patches or
    MappedExpression; while one is used, a thread reads the next two.
    """

    def read(spots):
        values = source[spots.to(source.device, non_blocking=True)]
        on_its_way = values.device.type != device.type
        return values.pin_memory() if on_its_way else values

    # The reading thread gets one core, because the others are for the network.
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as thread:
        waiting = deque()
        for spots in batches:
            waiting.append(thread.submit(read, spots))
            if len(waiting) > READ_AHEAD:
                yield waiting.popleft().result().to(device, non_blocking=True)
        while waiting:
            yield waiting.popleft().result().to(device, non_blocking=True)


# ------------------------------------------------------------------------------------- augmentation
@dataclass(frozen=True)
class Preset:
    """What an augmentation may do to a training patch."""

    symmetries: bool  # flip left-right, flip up-down, transpose: each with p = .5
    warp: bool  # with p = .5 one affine warp
    stain: bool = False  # the strengths of the dyes are changed


# A new mix is one more line here, and AUG names it; a new operation is a module before the network,
# as ColourAndBlur in script 23. MPA is the paper's, stnet the 8 symmetries alone, and mpa_stain MPA
# with the dyes' strengths changed.
AUGMENTATIONS = {
    "mpa": Preset(symmetries=True, warp=True),
    "mpa_stain": Preset(symmetries=True, warp=True, stain=True),
    "stnet": Preset(symmetries=True, warp=False),
    "none": Preset(symmetries=False, warp=False),
}
SHIFT = 0.10  # of the side, at most
SCALE = (0.9, 1.1)
ROTATION = 30  # degrees, at most
STRENGTH = 0.25  # of each dye's optical density, by which it is changed at most


def draw_augmentation(n, aug, generator, aspect="fixed"):
    """Parameters for n patches, on the CPU: symmetry (n, 3) bool (flip left-right, flip up-down,
    transpose, in this order), warped (n,) bool, affine (n, 2, 3) as F.affine_grid's and, if `aug`
    changes stains, stain (n, 3, 3) as change_stain's. `aspect` is WARP_ASPECT.
    """
    preset = AUGMENTATIONS[aug]
    # Every preset draws as much, so that seeds are comparable.
    uniform = torch.rand((n, 9), generator=generator)
    symmetry = (uniform[:, :3] < 0.5) & preset.symmetries
    warped = (uniform[:, 3] < 0.5) & preset.warp
    draws = (symmetry, warped, sample_affine(uniform[:, 4:], aspect))
    if not preset.stain:
        return draws
    strengths = 1 + STRENGTH * (2 * torch.rand((n, 3), generator=generator) - 1)
    return *draws, change_of_stain(strengths)


def describe_augmentation(aug):
    """[all that the draws of an augmentation follow from], for what a row is made with."""
    mix = AUGMENTATIONS[aug]
    numbers = [SHIFT, *SCALE, ROTATION, STRENGTH]
    return [*asdict(mix).values(), *numbers, *(DYES if mix.stain else ())]


def sample_affine(uniform, aspect="fixed"):
    """(n, 2, 3) affine maps from (n, 5) numbers in 0..1: shift across and down, scale, rotation,
    and the scale down where the `aspect` is free, so that it is not that across.
    """
    shift = 2 * (uniform[:, :2] * 2 - 1) * SHIFT  # The side is 2 in affine_grid's units.
    scale = SCALE[0] + (SCALE[1] - SCALE[0]) * uniform
    across = scale[:, 2, None]
    down = scale[:, 4, None] if aspect == "free" else across
    angle = torch.deg2rad((uniform[:, 3] * 2 - 1) * ROTATION)
    cos, sin = torch.cos(angle), torch.sin(angle)
    # affine_grid maps the result's places to the image's: this is the inverse of rotate and scale.
    first = torch.stack([cos, sin], 1) / across
    second = torch.stack([-sin, cos], 1) / down
    turn = torch.stack([first, second], 1)
    return torch.cat([turn, -turn @ shift[:, :, None]], 2)


def augment(patches, symmetry, warped, affine, stain=None, border="reflect"):
    """(B, 3, S, S) uint8 -> (B, 3, S, S) float32 in 0..255: symmetries, then one bilinear resample
    where warped, then other stains if there are any. `border` is WARP_BORDER.
    """
    images = apply_symmetry(patches, symmetry).float()
    chosen = warped.nonzero().squeeze(1)  # Found on the CPU: on the GPU it would cost a wait.
    if images.device.type == "cpu":  # One by one, each in the caches, is twice as fast.
        for i in chosen.tolist():
            images[i : i + 1] = warp(images[i : i + 1].clone(), affine[i : i + 1], border)
    elif len(chosen):
        affine = affine[chosen].to(images.device, non_blocking=True)
        chosen = chosen.to(images.device, non_blocking=True)
        images[chosen] = warp(images[chosen], affine, border)
    if stain is None:
        return images
    return change_stain(images, stain.to(images.device, non_blocking=True)).clamp(0, 255)


def apply_symmetry(patches, symmetry):
    """Flip and transpose (B, 3, S, S) by (B, 3) bool; exact in any dtype."""
    if patches.device.type != "cpu":
        return apply_symmetry_at_once(patches, symmetry)
    turned = torch.empty_like(patches)
    # Image by image is 14 times as fast on a processor as all at once.
    for image, patch, (left_right, up_down, transpose) in zip(
        turned, patches, symmetry.tolist(), strict=True
    ):
        if left_right:
            patch = patch.flip(2)
        if up_down:
            patch = patch.flip(1)
        if transpose:
            patch = patch.transpose(1, 2)
        image.copy_(patch)
    return turned


def apply_symmetry_at_once(patches, symmetry):
    """apply_symmetry in few steps that a GPU takes without waiting."""
    # A blocking copy would wait for the GPU.
    symmetry = symmetry.to(patches.device, non_blocking=True)
    left_right, up_down, transpose = symmetry[:, :, None, None, None].unbind(1)
    patches = torch.where(left_right, patches.flip(3), patches)
    patches = torch.where(up_down, patches.flip(2), patches)
    return torch.where(transpose, patches.transpose(2, 3), patches)


PADDING = {"reflect": "reflection", "black": "zeros"}  # torch's names of WARP_BORDER's choices


def warp(images, affine, border="reflect"):
    """(n, 3, S, S) float32 resampled by (n, 2, 3), bilinear; outside is mirrored, or black."""
    grid = lay_affine_grid(affine, images.shape[3])
    return F.grid_sample(images, grid, padding_mode=PADDING[border], align_corners=False)


def lay_affine_grid(affine, size):
    """F.affine_grid of (n, 2, 3) for square images, align_corners=False: (n, size, size, 2).

    By one broadcast sum: torch's product of matrices takes 68 times as long on a processor.
    """
    centres = (2 * torch.arange(size, device=affine.device) + 1) / size - 1
    rows = affine[:, :, 1, None] * centres + affine[:, :, 2, None]
    return (affine[:, :, 0, None, None] * centres + rows[:, :, :, None]).permute(0, 2, 3, 1)


# ------------------------------------------------------------------------------------------- stain
# Optical densities of red, green and blue of hematoxylin, eosin and what is neither: of Ruifrok and
# Johnston (2001), and of another laboratory, as Macenko et al. (2009) give them.
DYES = ((0.650, 0.704, 0.286), (0.072, 0.990, 0.105), (0.268, 0.570, 0.776))
OTHER_DYES = ((0.5626, 0.7201, 0.4062), (0.2159, 0.8012, 0.5581), (0.268, 0.570, 0.776))
OTHER_STRENGTHS = (1.3, 0.7, 1.0)  # of the other laboratory's staining, hematoxylin first


def change_of_stain(strengths, dyes=DYES, become=DYES):
    """(n, 3, 3) linear maps of optical densities: the `dyes` become others, (n, 3) times as strong.

    After Tellez et al. (Medical Image Analysis 2019), whose shifts of density are left out, because
    they would colour the glass.
    """
    dyes = F.normalize(torch.tensor(dyes, dtype=torch.float64), dim=1)
    become = F.normalize(torch.tensor(become, dtype=torch.float64), dim=1)
    strengths = torch.as_tensor(strengths, dtype=torch.float64).diag_embed()
    return (torch.linalg.inv(dyes) @ strengths @ become).float()


def change_stain(pixels, change):
    """(B, 3, S, S) pixel values 0..255 with their optical densities mapped by (B, 3, 3), float32.

    White stays white. What leaves 0..255 is not cut off, so that the inverse map undoes it.
    """
    density = -torch.log((pixels.float() + 1) / 256)
    changed = torch.einsum("bchw,bcd->bdhw", density, change)
    return 256 * torch.exp(-changed) - 1


OTHER_STAINING = change_of_stain(OTHER_STRENGTHS, DYES, OTHER_DYES)  # (3, 3)


class StainShiftedPatches:
    """Patches as another laboratory would have stained them, for [spots]: uint8 as they are."""

    def __init__(self, patches, change):
        self.patches = patches
        self.device = patches.device
        self.change = change.to(patches.device)  # (3, 3) as change_stain's

    def __getitem__(self, spots):
        images = self.patches[spots]
        changed = change_stain(images, self.change.expand(len(images), 3, 3))
        changed = changed.round().clamp(0, 255).to(torch.uint8)
        return changed.contiguous(memory_format=torch.channels_last)


# -------------------------------------------------------------------------------------------- model
def stages_of(backbone):
    """The backbone's modules in stages, input side first, as lists of modules.

    Of EfficientNet-B0 these are the stem, seven stages and the head convolution. Norm and pooling
    layers belong to the stage before them.
    """
    stages = []
    for name, child in backbone.named_children():
        holds_stages = name in ("blocks", "features", "stages", "layers")
        for module in child.children() if holds_stages else [child]:
            has_weights = any(parameter.ndim > 1 for parameter in module.parameters())
            if has_weights or not stages:
                stages.append([])
            stages[-1].append(module)
    return stages


def widen_depthwise(convolution, forward, images):
    """A depthwise convolution's forward: training under a processor's autocast it computes in fp32,
    since its backward pass in bf16 takes up to seven times as long.
    """
    autocast = images.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    if not (convolution.training and autocast):
        return forward(images)
    with torch.autocast("cpu", enabled=False):
        return forward(images.float()).to(images.dtype)


def pool_each_stage(backbone, images):
    """[(B, C) float32]: of every stage the standard deviation and the mean of its output over the
    image or a transformer's tokens; of an output that is pooled already, as most backbones' last
    one, the output alone. So the last part is always a mean.
    """
    pooled = []

    def keep(module, arguments, output):
        output = output.float()
        if output.ndim == 2:
            pooled.append(output)
            return
        last_axis = output.ndim == 3 or getattr(backbone, "output_fmt", "NCHW") == "NHWC"
        places = tuple(range(1, output.ndim - 1)) if last_axis else (2, 3)
        variance, mean = torch.var_mean(output, places, correction=0)
        # The slope of a root is infinite at 0.
        pooled.extend([(variance + 1e-6).sqrt(), mean])

    hooks = [stage[-1].register_forward_hook(keep) for stage in stages_of(backbone)]
    try:
        backbone(images)
    finally:
        for hook in hooks:
            hook.remove()
    return pooled


class SpotRegressor(nn.Module):
    """Backbone and head: (B, 3, S, S) pixel values 0..255 -> (B, G) expression.

    The last TRAINABLE_STAGES stages of the backbone are trained, all of them if that is -1. With
    POOL_STAGES the head sees sd and mean of every stage's output, and not the last one's mean
    alone: colour and texture are still there in early stages. CHANNELS bgr gives the backbone blue
    as red, as the published scripts do.
    """

    def __init__(self, backbone, head, widths, recipe):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.pool_stages = recipe["POOL_STAGES"]
        self.swap_channels = recipe["CHANNELS"] == "bgr"
        for name in ("mean", "std"):  # Of the images that the backbone was pretrained on.
            values = 255 * torch.tensor(backbone.pretrained_cfg[name])
            self.register_buffer(name, values, persistent=False)
        for module in backbone.modules():
            if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
                module.forward = functools.partial(widen_depthwise, module, module.forward)
        self.widths = list(widths)
        if self.pool_stages:
            # One factor a feature, by which a ridge start makes all its parts equally strong.
            self.register_buffer("feature_scale", torch.ones(sum(widths)))
        self.freeze(recipe["TRAINABLE_STAGES"])

    def freeze(self, trainable_stages):
        """Exempt all but the last stages from training. InputError where there are fewer."""
        stages = stages_of(self.backbone)
        if trainable_stages > len(stages):
            raise InputError(
                f"TRAINABLE_STAGES {trainable_stages}: this backbone has {len(stages)} stages"
            )
        n_frozen = 0 if trainable_stages == -1 else len(stages) - trainable_stages
        self.frozen = list(itertools.chain(*stages[:n_frozen]))
        trained = list(itertools.chain(*stages[n_frozen:]))
        # A transformer's own parameters are in no module; they belong to the stem.
        self.backbone.requires_grad_(n_frozen == 0)
        for module in trained:
            module.requires_grad_(True)

    def train(self, mode=True):
        """Frozen stages stay in evaluation mode: else their BatchNorm would go on averaging."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def normalise(self, pixels):
        """(B, 3, S, S) pixel values 0..255 -> the backbone's input, channels last."""
        size = pixels.shape[3]
        if self.swap_channels:
            pixels = pixels.flip(1)
        # Broadcasting over an axis of 3 is slow, so a row of pixels is one axis of 3 S.
        rows = pixels.permute(0, 2, 3, 1).flatten(2).float()
        rows = (rows - self.mean.repeat(size)).div_(self.std.repeat(size))
        return rows.unflatten(2, (-1, 3)).permute(0, 3, 1, 2)

    def encode(self, pixels):
        """(B, 3, S, S) pixel values 0..255 -> (B, F) features."""
        images = self.normalise(pixels)
        if not self.pool_stages:
            return self.backbone(images)
        return torch.cat(pool_each_stage(self.backbone, images), 1) * self.feature_scale

    def forward(self, pixels):
        return self.head(self.encode(pixels))


def build_model(recipe, n_genes, seed):
    """timm BACKBONE with the paper's head, Dropout - Linear - ReLU - Dropout - Linear.

    HIDDEN = 0 is one Linear. Same seed, same weights. InputError for a name, weights or an
    IMAGE_SIZE that do not go together.
    """
    import timm.layers  # Here, because it takes seconds, and scripts 17 to 19 do without.

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hashes.seed_of(seed, "weights"))
        backbone = backbones.build_backbone(recipe)
        widths = measure_features(backbone, recipe)
        if dist.is_initialized() and dist.get_backend() == "nccl":
            # This makes new modules, and those to freeze are chosen from the new ones.
            backbone = timm.layers.convert_sync_batchnorm(backbone)
        head = build_head(sum(widths), recipe["HIDDEN"], n_genes)
    return SpotRegressor(backbone, head, widths, recipe)


def measure_features(backbone, recipe):
    """[numbers of features] of an image of IMAGE_SIZE, with POOL_STAGES as pool_each_stage gives
    them. InputError where the backbone cannot take it.
    """
    pool_stages = recipe["POOL_STAGES"]
    name, size = recipe["BACKBONE"], recipe["IMAGE_SIZE"]
    image = torch.zeros(1, 3, size, size)
    backbone.eval()
    try:
        with torch.inference_mode():
            features = pool_each_stage(backbone, image) if pool_stages else [backbone(image)]
        # Anything but (1, width) is refused as well.
        widths = [width for _, width in (part.shape for part in features)]
    except Exception as error:  # A backbone raises what it likes: the name and size are the user's.
        usual = backbone.pretrained_cfg["input_size"][1]
        reason = str(error).splitlines()[0][:120]
        raise InputError(
            f"backbone {name} cannot take --image-size {size} ({reason}); it was made for {usual}"
        ) from None
    backbone.train()
    return widths


def build_head(width, hidden, n_genes):
    """The paper's head from `width` features; without `hidden` units, one linear layer."""
    if hidden == 0:
        return nn.Sequential(nn.Linear(width, n_genes))
    return nn.Sequential(
        nn.Dropout(0.5),
        nn.Linear(width, hidden),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(hidden, n_genes),
    )


def count_parameters(model):
    """{"backbone", "trainable", "total"}: numbers of parameters."""
    return {
        "backbone": sum(p.numel() for p in model.backbone.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "total": sum(p.numel() for p in model.parameters()),
    }


# ----------------------------------------------------------------------------------------- training
# A new loss is one more function (predicted (B, G), target (B, G)) -> scalar here; LOSS names it.
LOSSES = {"mse": F.mse_loss}


def describe_loss(name):
    """A loss's name and, unless torch has it, a hash of its lines: rows of a changed one differ."""
    loss = LOSSES[name]
    if loss is getattr(F, f"{name}_loss", None):
        return name
    given = ""
    if isinstance(loss, functools.partial):
        given, loss = f"{loss.args} {loss.keywords}", loss.func
    try:
        lines = inspect.getsource(loss)
    except (OSError, TypeError):  # It is not written in Python, or is no function.
        lines = repr(getattr(loss, "__name__", type(loss)))
    return f"{name} {hashlib.sha256((lines + given).encode()).hexdigest()[:16]}"


adam = functools.partial(torch.optim.Adam, fused=True)  # the paper's optimiser


def prepare_optimiser(network, recipe, optimise=adam):
    """(`optimise` of what is trained, SCHEDULE of its rates: cosine to zero, or constant)."""
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimiser = optimise(trainable, recipe["LEARNING_RATE"])
    if recipe["SCHEDULE"] == "constant":
        return optimiser, torch.optim.lr_scheduler.ConstantLR(optimiser, factor=1.0)
    return optimiser, torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, recipe["EPOCHS"])


def count_steps(n_spots, recipe, stop=None):
    """How many steps a training takes, of all EPOCHS or up to the epoch `stop`."""
    epochs = recipe["EPOCHS"] if stop is None else stop
    ranks, _ = joined_ranks()
    return epochs * len(split_batches(n_spots, recipe, ranks))


def split_batches(n_spots, recipe, ranks=1):
    """The batches of an epoch, as tensors of places in its order; one that is too small to give
    each rank two spots is left out, for BatchNorm.
    """
    batches = torch.arange(n_spots).split(recipe["BATCH_SIZE"])
    return [batch for batch in batches if len(batch) >= 2 * ranks]


def fit(
    network,
    patches,
    split,
    recipe,
    *,
    loss=None,
    optimise=adam,
    stop=None,
    checkpoint=None,
    report=None,
):
    """Train; leave the weights of the best epoch in `network`; return the history, a dict an epoch.

    patches (N, 3, S, S) uint8; `split` a study.splitting.Split, whose training spots are learnt
    from; `loss` and `optimise` LOSS and adam unless given. The best epoch has the lowest validation
    MSE or, by BEST_EPOCH, the highest mean r of HEG; a ridge start is judged before its first
    epoch, too. With `stop` there is no validation, and training ends with that epoch. From the file
    `checkpoint` a killed run goes on. report(history, best_epoch) is called after each epoch.
    """
    device = next(network.parameters()).device
    _, dtype, _ = choose_device(recipe)
    made_with = split.made_with(recipe)
    loss = loss or LOSSES[recipe["LOSS"]]
    optimiser, schedule = prepare_optimiser(network, recipe, optimise)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    stateful = {"model": network, "optimiser": optimiser, "schedule": schedule, "scaler": scaler}
    last = recipe["EPOCHS"] if stop is None else stop
    history, best = resume(checkpoint, stateful, made_with, device)
    if history:
        done = history[-1]["epoch"]
        tqdm.write(f"going on after epoch {done} of {last} ({checkpoint})")
    else:
        done = 0
        best = {"epoch": 0, "weights": copy_state(network)}
        if stop == 0:
            history.append(begin_line(0, schedule))
        if stop is None and recipe["HEAD_START"] == "ridge":
            history.append(begin_line(0, schedule) | validate(network, patches, split, dtype))
            if report is not None:
                report(history, 0)
    joined = DistributedDataParallel(network) if dist.is_initialized() else network
    step = functools.partial(make_step, joined, optimiser, scaler, loss, dtype)
    for epoch in range(done, last):
        began = time.perf_counter()
        line = begin_line(epoch + 1, schedule)
        line["train_loss"] = train_epoch(joined, step, patches, split, recipe, epoch)
        schedule.step()
        n_images = len(split.spots("train"))
        line["images_per_s"] = n_images / (time.perf_counter() - began)
        if stop is None:
            line |= validate(network, patches, split, dtype)
        line["seconds"] = time.perf_counter() - began
        check_finite(line)
        history.append(line)
        if stop is not None or choose_epoch(history, recipe) == epoch + 1:
            best = {"epoch": epoch + 1, "weights": copy_state(network)}
        if report is not None:
            report(history, best["epoch"])
        if checkpoint is not None and joined_ranks()[1] == 0:
            save_checkpoint(checkpoint, stateful, history, best, made_with)
    network.load_state_dict(best["weights"])
    return history


def begin_line(epoch, schedule):
    """A line of the history in which nothing is known yet."""
    line = {"epoch": epoch, "learning_rate": schedule.get_last_lr()[0]}
    line |= dict.fromkeys(("train_loss", "valid_mse", "valid_heg", "images_per_s"))
    return line | {"seconds": 0.0}


def validate(network, patches, split, dtype):
    """{"valid_mse", "valid_heg"} of the validation spots."""
    spots = split.spots("valid")
    predicted = predict(network, patches, spots, dtype=dtype)
    mse = float(mean_square(predicted, split.data.target[spots]).mean())
    return {"valid_mse": mse, "valid_heg": split.mean_heg(predicted)}


def choose_epoch(history, recipe):
    """Number of the best epoch by validation: the first of the lowest MSE or, if BEST_EPOCH asks
    for it and it is defined, of the highest r of HEG.
    """
    judged_by = [line["valid_mse"] for line in history]
    r = np.array([line["valid_heg"] for line in history], np.float64)
    if recipe["BEST_EPOCH"] == "heg" and np.isfinite(r).any():
        judged_by = -r
    return history[int(np.nanargmin(judged_by))]["epoch"]


def check_finite(line):
    """InputError where training has diverged."""
    loss = line["train_loss"] if line["valid_mse"] is None else line["valid_mse"]
    if not np.isfinite(loss):
        rate = line["learning_rate"]
        raise InputError(
            f"epoch {line['epoch']}: the loss is {loss}: lower LEARNING_RATE ({rate:g})"
        )


def train_epoch(network, step, patches, split, recipe, epoch):
    """One pass over the training spots; returns the mean training loss.

    Everything random follows from the split's seed and the epoch. Of several joined ranks each
    takes its share of every batch.
    """
    ranks, rank = joined_ranks()
    generator = torch.Generator().manual_seed(hashes.seed_of(split.seed, "epoch", epoch))
    order = torch.from_numpy(split.spots("train"))
    order = order[torch.randperm(len(order), generator=generator)]
    aspect = recipe["WARP_ASPECT"]
    draws = draw_augmentation(len(order), recipe["AUG"], generator, aspect)
    border = recipe["WARP_BORDER"]
    torch.manual_seed(hashes.seed_of(split.seed, "dropout", epoch, *([rank] if rank else [])))
    batches = split_batches(len(order), recipe, ranks)
    if not batches:
        raise InputError(
            f"--batch-size {recipe['BATCH_SIZE']}: no batch has two spots for each of "
            f"{ranks} processes"
        )
    network.train()
    device = next(network.parameters()).device
    total = torch.zeros((), device=device)
    shares = [batch[rank::ranks] for batch in batches]
    numbers = [order[share] for share in shares]
    images_of = read_ahead(patches, numbers, device)
    wanted_of = read_ahead(MappedExpression(split.data.target), numbers, device)
    progress = tqdm(batches, f"epoch {epoch + 1}", leave=False, disable=rank > 0 or None)
    for batch, share in zip(progress, shares, strict=True):
        images = augment(next(images_of), *(draw[share] for draw in draws), border=border)
        weight = len(share) * ranks / len(batch)  # Gradients are averaged over the ranks.
        total += step(images, next(wanted_of), weight) * len(share)
    if ranks > 1:
        dist.all_reduce(total)
        for buffer in network.buffers():  # BatchNorm's averages: each rank has seen its share.
            dist.broadcast(buffer, 0)
    return total.item() / sum(map(len, batches))  # The epoch's only synchronisation.


def make_step(network, optimiser, scaler, loss, dtype, images, wanted, weight):
    """Forward, loss, backward, step; returns the loss of these images, on the device."""
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        predicted = network(images)
    value = loss(predicted.float(), wanted)
    optimiser.zero_grad(set_to_none=True)
    scaler.scale(value * weight).backward()
    scaler.step(optimiser)
    scaler.update()
    return value.detach()


def copy_state(model):
    """{name: copy} of the model's weights as they stand now."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def save_checkpoint(path, stateful, history, best, made_with):
    """Write all that fit needs to go on from here, whole or not at all."""
    state = {part: owner.state_dict() for part, owner in stateful.items()}
    state |= {"history": history, "best": best, "made_with": made_with}
    with files.whole_file(path) as partial, open(partial, "wb") as file:
        torch.save(state, file)  # To an open file, whose own error tells of a full disk.


def resume(path, stateful, made_with, device):
    """(history, best) of what save_checkpoint wrote, whose state goes into `stateful`; ([], None)
    if there is none.

    InputError where it is damaged, or was made with other constants or data, which are named.
    """
    if path is None or not path.is_file():
        return [], None
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        then = state["made_with"] or {}
    except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise InputError(f"{path}: not a checkpoint of this version ({error}): remove it") from None
    differ = [
        f"{name} = {then.get(name)} (now {value})"
        for name, value in (made_with or {}).items()
        if then.get(name) != value
    ]
    if differ:
        raise InputError(
            f"{path} was made with {', '.join(differ)}: remove it, or go back to what it was made "
            "with"
        )
    for part, owner in stateful.items():
        owner.load_state_dict(state[part])
    return state["history"], state["best"]


# --------------------------------------------------------------------------------------- prediction
# Flip left-right, flip up-down, transpose: all eight, the plain patch first.
SYMMETRIES = tuple(itertools.product((False, True), repeat=3))


@torch.inference_mode()
def predict(model, patches, spots, *, dtype, tta=False):
    """(len(spots), G) float32 expression; with `tta` the mean over the 8 symmetries of every patch.

    Of several joined ranks each predicts its part, and all get the whole.
    """
    device = next(model.parameters()).device
    ranks, rank = joined_ranks()
    symmetries = SYMMETRIES if tta else SYMMETRIES[:1]
    numbers = torch.from_numpy(np.asarray(spots)).tensor_split(ranks)[rank]
    batches = numbers.split(PREDICT_BATCH[device.type])
    model.eval()
    parts = []
    for images in read_ahead(patches, batches, device):
        total = 0
        for symmetry in symmetries:
            seen = images
            if any(symmetry):
                seen = apply_symmetry(images, torch.tensor([symmetry] * len(images)))
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                total = total + model(seen).float()
        parts.append(total / len(symmetries))
    parts = [torch.cat(parts).cpu().numpy()] if parts else []
    if ranks > 1:
        gathered = [None] * ranks
        dist.all_gather_object(gathered, parts)  # In the order of the ranks, which is the spots'.
        parts = list(itertools.chain(*gathered))
    return np.concatenate(parts)


def blend_neighbourhood(values, spots, sd=BLEND_SD):
    """(N, F) values (N, F) of a table's spots, half of each its own and half the mean over the
    other spots of its slide, weighted by a Gaussian of `sd` pitches. Where no other spot lies
    within three sd, a spot keeps its own.

    Behind a linear head, blended features are the blended predictions of single patches.
    """
    blended = values.copy()
    places = places_in_pitches(spots).to_numpy(np.float64)
    for numbers in spots.groupby("tissue_index").indices.values():
        around = weigh_around(places[numbers], sd)
        for part in parts_of(values.shape[1], GENES_AT_ONCE):
            own = values[numbers, part]
            blended[numbers, part] = (own + around @ own) / 2
    return blended


def weigh_around(places, sd):
    """Sparse (n, n) float32 matrix that takes values of spots at places (n, 2) to their means over
    the other spots, weighted by a Gaussian; to their own where none lies within three sd.
    """
    tree = cKDTree(places)
    near = tree.sparse_distance_matrix(tree, 3 * sd, output_type="coo_matrix").tocsr()
    near.data = np.exp(-((near.data / sd) ** 2) / 2)
    near.setdiag(0)
    near.setdiag(near.sum(1).A1 == 0)
    return normalize(near, "l1").astype(np.float32)


# -------------------------------------------------------------------------------------- correlation
def pearson_per_gene(predicted, truth):
    """Pearson r of every column, (n, G) and (n, G) -> (G,) float64.

    NaN where r is undefined: a non-finite column, a single spot, or a column that is constant but
    for the last digits of float32 (SPREAD). Never 0 instead.
    """
    predicted = np.asarray(predicted)
    truth = np.asarray(truth)
    assert predicted.shape == truth.shape and predicted.ndim == 2
    n, n_genes = predicted.shape
    x, y, xx, yy, xy = np.zeros((5, n_genes))
    for start in range(0, n, 16):  # So few rows stay in the processor's cache.
        part = slice(start, start + 16)
        # Minus the first row, a constant column is exactly 0, and others are nearly centred.
        a = np.subtract(predicted[part], predicted[0], dtype=np.float64)
        b = np.subtract(truth[part], truth[0], dtype=np.float64)
        x += a.sum(0)
        y += b.sum(0)
        xx += np.einsum("ng,ng->g", a, a)
        yy += np.einsum("ng,ng->g", b, b)
        xy += np.einsum("ng,ng->g", a, b)
    spread_x, spread_y = xx - x * x / n, yy - y * y / n
    varies = (spread_x > n * (SPREAD * np.abs(predicted).max(0)) ** 2) & (
        spread_y > n * (SPREAD * np.abs(truth).max(0)) ** 2
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        r = (xy - x * y / n) / np.sqrt(spread_x * spread_y)
    return np.where(varies, np.clip(r, -1, 1), np.nan)


def spearman_per_gene(predicted, truth):
    """Spearman's rank correlation of every column, as pearson_per_gene."""
    # Along rows of the transpose, which is faster.
    by_gene = [np.ascontiguousarray(values.T) for values in (predicted, truth)]
    return pearson_per_gene(*(rankdata(values, axis=1).T for values in by_gene))


def mean_square(predicted, truth):
    """Mean squared difference of every column, (n, G) and (n, G) -> (G,) float64."""
    means = np.empty(predicted.shape[1])
    for genes in parts_of(len(means), GENES_AT_ONCE):
        difference = np.subtract(predicted[:, genes], truth[:, genes], dtype=np.float64)
        means[genes] = np.einsum("ng,ng->g", difference, difference) / len(truth)
    return means


# A new metric is one more function (predicted (n, G), truth (n, G)) -> (G,) here. It is taken on
# each slide; per_gene.csv, rows.csv (as heg_<name>, ...) and report.html then have it.
METRICS = {
    "r": pearson_per_gene,
    "spearman": spearman_per_gene,
    "variance": lambda predicted, truth: truth.var(0, np.float64),
    "variance_predicted": lambda predicted, truth: predicted.var(0, np.float64),
}


def average_slides(metric, predicted, truth, slides):
    """Mean over slides of each one's metric(predicted, truth), (G,); NaN slides are left out."""
    values = []
    for slide in np.unique(slides):
        inside = slides == slide
        values.append(metric(predicted[inside], truth[inside]))
    return pd.DataFrame(values).mean().to_numpy()


def score_genes(predicted, truth, slides):
    """{name: (G,)}: the mean over slides of every metric; r_pooled and mse over all spots.

    A part of the genes at a time, since metrics take several copies of it in float64.
    """
    parts = []
    for genes in parts_of(predicted.shape[1], GENES_AT_ONCE):
        x, y = predicted[:, genes], truth[:, genes]
        scores = {name: average_slides(metric, x, y, slides) for name, metric in METRICS.items()}
        scores["r_pooled"] = pearson_per_gene(x, y)
        scores["mse"] = mean_square(x, y)
        parts.append(scores)
    return {name: np.concatenate([scores[name] for scores in parts]) for name in parts[0]}


def correlate_spots(predicted, truth, usual):
    """Mean over spots of r over genes, after each gene's `usual` (G,) expression is taken off."""
    parts = []
    for part in parts_of(len(predicted), SPOTS_AT_ONCE):
        parts.append(pearson_per_gene((predicted[part] - usual).T, (truth[part] - usual).T))
    return pd.Series(np.concatenate(parts)).mean()
