"""Frozen features: what a backbone tells of every patch before any training, computed once for a
data root.

Shapes: N spots, F features. <data root>/dataset/features/ holds a .npy file (N, F) float32 for each
kind of them; without the folder they are computed again, and nothing is lost.
"""

import functools
import hashlib
import json
import os
import time
from importlib.metadata import version

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import common
from study import files, recipes, ridges
from study.errors import InputError

FOLDER = "features"  # in dataset/, beside patches.npy
LEFTOVER = 3600  # seconds without a change, after which a file that was begun is nobody's
# Numbers of features of all stages, as which they are kept, for what 19 --check says.
WIDTHS = {"efficientnet_b0": 2912, "resnet50": 5760, "densenet121": 6528}


def freeze_features(recipe, split):
    """((N, F) features of BACKBONE before training, (F,) the factors that they have been given).

    They are averaged over the 8 symmetries, and their parts, as common.pool_each_stage gives them,
    made equally strong on the training spots; then blended by NEIGHBOURHOOD.
    """
    features, widths = encode_spots(split.data, recipe, split.seed, tta=True)
    scale = ridges.balance_parts(features[split.spots("train")], widths)
    features = features * scale
    if recipe["NEIGHBOURHOOD"]:
        features = common.blend_neighbourhood(features, split.data.spots)
    return features, scale


def encode_spots(data, recipe, seed, *, tta=False):
    """((N, F) float32 features of all spots by BACKBONE as it comes, [numbers of features of every
    part, as common.pool_each_stage gives them]).

    With `tta` they are the mean over the 8 symmetries. Those of pretrained weights are kept in the
    data root, and read from there, memory-mapped.
    """
    recipe = recipes.PAPER | recipe
    names = ("BACKBONE", "PRETRAINED", "IMAGE_SIZE", "CHANNELS", "DEVICE", "PRECISION")
    constants = {name: recipe[name] for name in names}
    pools = recipe["POOL_STAGES"]
    if recipe["PRETRAINED"] is False:  # Another seed gives other features: these are not kept.
        constants["POOL_STAGES"] = pools
        return encode_patches(data.patches, tuple(constants.items()), seed, tta, None)
    folder = data.root / "dataset" / FOLDER
    kept = folder, data.meta.get("patches_sha256") or hash_patches(data.patches)
    # The last part of all stages is what the backbone puts out, so that one file has both.
    constants["POOL_STAGES"] = pools or ends_with_output(tuple(constants.items()))
    features, widths = encode_patches(data.patches, tuple(constants.items()), None, tta, kept)
    if constants["POOL_STAGES"] and not pools:
        return features[:, -widths[-1] :], widths[-1:]
    return features, widths


@functools.lru_cache(maxsize=8)
def ends_with_output(constants):
    """Whether the last part by common.pool_each_stage is, bit by bit, the backbone's output."""
    recipe = dict(constants)
    try:
        model = build_encoder(recipe | {"POOL_STAGES": True}, None).eval()
    except InputError:  # A stage cannot be pooled; or building without stages tells what is wrong.
        return False
    size = recipe["IMAGE_SIZE"]
    images = torch.rand((2, 3, size, size), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        parts = common.pool_each_stage(model.backbone, images)
        return torch.equal(parts[-1], model.backbone(images).float())


def build_encoder(recipe, seed):
    """The backbone of a recipe, as a network whose output are its features."""
    recipe = recipes.PAPER | recipe | {"HIDDEN": 0, "TRAINABLE_STAGES": 0}
    model = common.build_model(recipe, 1, seed)
    model.head = nn.Identity()
    return model


@functools.lru_cache(maxsize=2)
def encode_patches(patches, constants, seed, tta, kept):
    """encode_spots of patches (N, 224, 224, 3), by what can be remembered: `constants` as pairs;
    `kept` is None, or the folder that keeps features and the patches' hash.
    """
    recipe = dict(constants)
    device, dtype, _ = common.choose_device(recipe)
    model = build_encoder(recipe, seed)
    path = None
    if kept:
        folder, of_patches = kept
        path = folder / name_features(of_patches, model, recipe, device, dtype, tta)
        features = read_kept(path, (len(patches), sum(model.widths)))
        if features is not None:
            return features, model.widths
    model = model.to(device, memory_format=torch.channels_last)
    placed = common.place_patches(patches, recipe["IMAGE_SIZE"], device)
    features = common.predict(model, placed, np.arange(len(patches)), dtype=dtype, tta=tta)
    if path and common.joined_ranks()[1] == 0:
        features = keep_features(path, features)
    return features, model.widths


# -------------------------------------------------------------------------------------------- files
def name_features(of_patches, model, recipe, device, dtype, tta):
    """A file's name: the start of the patches' hash, and a hash of what else it follows from."""
    made_with = {
        "backbone": recipe["BACKBONE"],
        "weights": hash_weights(model),
        "size": recipe["IMAGE_SIZE"],
        "channels": recipe["CHANNELS"],
        "stages": recipe["POOL_STAGES"],
        "views": 8 if tta else 1,
        "precision": f"{device.type} {dtype}",
        "versions": [version("torch"), version("timm")],
    }
    digest = hashlib.sha256(json.dumps(made_with).encode()).hexdigest()
    return f"{of_patches[:16]}-{digest[:16]}.npy"


def hash_weights(model):
    """SHA-256 of a backbone's weights, and of the mean and sd by which its input is normalised."""
    digest = hashlib.sha256()
    tensors = model.backbone.state_dict() | {"mean": model.mean, "std": model.std}
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@functools.lru_cache(maxsize=1)
def hash_patches(patches):
    """SHA-256 of patches (N, 224, 224, 3), a tensor or an array, as meta.json has it."""
    digest = hashlib.sha256()
    for part in common.parts_of(len(patches), 256):
        digest.update(np.ascontiguousarray(patches[part]))
    return digest.hexdigest()


def read_kept(path, shape):
    """The features of a file, memory-mapped; None where there is none, or it is damaged.

    Of several joined ranks all read it or none, since they compute features together.
    """
    features = None
    if path.is_file():
        try:
            features = common.map_array(path)
            if features.shape != shape:
                raise ValueError(f"shape {features.shape}")
        except (OSError, ValueError) as error:
            tqdm.write(f"{path} is damaged ({error}): its features are computed again")
            features = None
    ranks, _ = common.joined_ranks()
    if ranks == 1:
        return features
    found = [None] * ranks
    torch.distributed.all_gather_object(found, features is not None)
    return features if all(found) else None


def keep_features(path, features):
    """Write features and return them memory-mapped; as they are where the data root cannot take
    them, which is said. Other processes may write the same file, with the same content.
    """
    try:
        remove_leftovers(path.parent)
        with files.whole_file(path, mark=os.getpid()) as partial, open(partial, "wb") as file:
            np.save(file, features)
        return common.map_array(path)
    except OSError as error:
        tqdm.write(f"frozen features are not kept in {path.parent} ({error.strerror or error})")
        return features


def remove_leftovers(folder):
    """Remove what killed processes have left behind."""
    for path in folder.glob(".partial-*"):
        if time.time() - path.stat().st_mtime > LEFTOVER:
            path.unlink(missing_ok=True)


def remove_others(folder, of_patches):
    """Remove the features of other patches than those of this hash from a dataset's folder."""
    for path in (folder / FOLDER).glob("*.npy"):
        if not path.name.startswith(of_patches[:16]):
            path.unlink(missing_ok=True)


def describe_size(n_spots):
    """What the features of so many spots take on the disk, for the backbones that scripts use."""
    sizes = [f"{n_spots * width * 4 / 1e6:,.0f} MB of {name}" for name, width in WIDTHS.items()]
    return f"{FOLDER}/ will take {', '.join(sizes)}, where scripts 20 to 25 use them"
