"""How a network starts, what its weights' file says, and the methods that need no training by
epochs: ridges on frozen features and on colour.

A method, method(row), returns the prediction (n, G) of row.split.scored(): see study.rows.Row.
"""

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from sklearn import linear_model
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

import common
from slides.colour import colour_statistics
from study import recording, ridges, splitting
from study.features import encode_spots, freeze_features
from study.shell import InputError


# ----------------------------------------------------------------------------------------- networks
def start_network(row):
    """The network before training; its last layer starts as HEAD_START says."""
    recipe, split = row.recipe, row.split
    starts_as_ridge = recipe["HEAD_START"] == "ridge"
    if starts_as_ridge and recipe["HIDDEN"]:
        raise InputError(
            f"--hidden {recipe['HIDDEN']}: a ridge start needs a linear head: add --hidden 0"
        )
    if not recipe["EPOCHS"] and not starts_as_ridge:
        raise InputError("--epochs 0: needs --head-start ridge, which predicts without any")
    model = common.build_model(recipe, len(split.data.genes), split.seed)
    model = model.to(row.device, memory_format=torch.channels_last)
    if recipe["HEAD_START"] == "mean":
        # Through a random last layer the first steps would turn the pretrained backbone before the
        # head knows anything; behind this one it waits, and the first prediction is the mean.
        mean, _ = common.mean_and_variance(split.data.target, split.spots("train"))
        nn.init.zeros_(model.head[-1].weight)
        model.head[-1].bias.data.copy_(torch.from_numpy(mean))
    if starts_as_ridge:
        features, scale = freeze_features(recipe, split)
        ridge, shrinkage = learn_ridge(split, features, split.spots("train"))
        ridges.start_as_ridge(model, ridge, scale)
        row.note(**shrinkage._asdict())
    return model


def network_of_no_epoch(row):
    """A method: the network whose head is the ridge on its frozen features, by which it predicts.

    The features that the data root keeps are those of its backbone over the 8 symmetries, so with
    TTA it sees no patch again.
    """
    row.model = start_network(row)
    row.note(weights=name_weights(row.recipe), steps=0, best_epoch=0)
    row.count_parameters()
    if not row.recipe["TTA"]:
        return row.predict(row.model, row.place_patches())
    features, _ = freeze_features(row.recipe, row.split)
    head = row.model.head[-1]
    ridge = ridges.Ridge(head.weight.detach().cpu().numpy().T, head.bias.detach().cpu().numpy())
    return ridge.predict(features[row.split.scored()])


# ------------------------------------------------------------------------------------------- ridges
def learn_ridge(split, features, spots, full_rank=False):
    """ridges.fit_ridge of the expression on the features (N, F) at these spots alone."""
    data = split.data
    return ridges.fit_ridge(features, data.target, spots, data.spots, split.reported, full_rank)


def predict_by_ridge(row, features, seen, full_rank=False):
    """The prediction (n, G) from features `seen` (n, F) of the ridge that the training spots teach
    on `features` (N, F).
    """
    ridge, shrinkage = learn_ridge(row.split, features, row.split.spots("train"), full_rank)
    row.note(**shrinkage._asdict())
    return ridge.predict(seen)


def ridge_on_features(row):
    """A method: the ridge on frozen features, which no network may lose to."""
    features, _ = freeze_features(row.recipe, row.split)
    row.note(weights=name_weights(row.recipe))
    full_rank = "FULL_RANK" in row.recipe
    return predict_by_ridge(row, features, features[row.split.scored()], full_rank)


PROBE_COMPONENTS = 256
PROBE_SEED = 1  # of the benchmark's runs


def name_probes(backbone):
    """{setting: {CONSTANT: value}} of the two probes that HEST-Benchmark describes."""
    plain = {"REFIT": False}  # They learn from validation spots anyway.
    return {
        f"hest probe ({backbone})": plain,
        f"hest probe ({backbone}, full width)": plain | {"FULL_WIDTH": True},
    }


def hest_probe(row):
    """A method: a probe of HEST-Benchmark on frozen features of BACKBONE.

    Features of the last stage, of the patch as it is, in fp32 whatever PRECISION is; of all spots
    of the training slides, since the probe needs no validation; log1p of raw counts without a
    normalisation by depth (st_dataset.py in src/hest/bench of the repository mahmoodlab/HEST).

    What differs: the spots of a sample stand by their rows and not as in its file of patches, on
    which the random steps of PCA depend where there are fewer spots than features. The benchmark's
    row ResNet50 ends after the third of the four stages of timm's resnet50.tv_in1k
    (inference_models.py), so that of resnet50 here is another one.
    """
    plain = row.recipe | {"POOL_STAGES": False, "PRECISION": "fp32"}
    features, _ = encode_spots(row.split.data, plain, row.split.seed)
    row.note(weights=name_weights(row.recipe))
    return predict_by_probe(row, features)


def predict_by_probe(row, features):
    """The prediction (n, G) by hest_probe on features (N, F); NaN of validation spots, from which
    the probe has learnt.
    """
    split = row.split
    train = order_by_fold_file(split)
    scored = split.scored()
    predicted, alpha = probe_features(
        features[train],
        split.data.target[train],
        features[scored],
        full_width="FULL_WIDTH" in row.recipe,
    )
    row.note(alpha=alpha)
    predicted[split.roles[scored] == "valid"] = np.nan
    return predicted.astype(np.float32)


def probe_features(features, target, seen, *, full_width):
    """(prediction (m, G) from features `seen` (m, F), alpha) of HEST-Benchmark's ridge, which
    learns target (n, G) from features (n, F) float32.

    benchmark.py and trainer.py do this: for all genes at once Ridge without intercept, solver lsqr
    of at most 1,000 steps and scikit-learn's tolerance, alpha = 100 / (columns x genes). The
    benchmark's README reduces the features to 256 columns before; Table A13 of its paper takes them
    at full width, neither standardised nor reduced, and ranks models otherwise (issue 144 there).
    """
    if not full_width:
        features, seen = reduce_features(features, seen)
    alpha = 100 / (features.shape[1] * target.shape[1])
    ridge = linear_model.Ridge(alpha, fit_intercept=False, solver="lsqr", max_iter=1000)
    ridge.fit(features, target)
    return ridge.predict(seen), alpha


def reduce_features(features, seen):
    """The features (n, F) and (m, F), standardised and reduced to their 256 principal components by
    the first ones; of fewer spots or features as many components are taken as there can be.

    They are rounded to single precision, and the ridge computes in double from there on, as
    scikit-learn does with the tensors that the benchmark hands to it.
    """
    n_components = min(PROBE_COMPONENTS, *features.shape)
    reduce = make_pipeline(StandardScaler(), PCA(n_components, random_state=PROBE_SEED))
    return round_to_single(reduce.fit_transform(features)), round_to_single(reduce.transform(seen))


def round_to_single(values):
    """The values as single precision holds them, in double precision."""
    return values.astype(np.float32).astype(np.float64)


def order_by_fold_file(split):
    """Numbers of all spots of the training slides of a fold of HEST-Benchmark, slide by slide as
    its file names them.
    """
    train = split.spots("train", "valid")
    folds = splitting.read_task_folds(split.data.root)
    named = folds[(folds["fold"] == split.fold) & (folds["role"] == "train")]["tissue_index"]
    place = pd.Series(range(len(named)), named.to_numpy())
    slides = split.data.spots["tissue_index"].to_numpy()[train]
    return train[np.lexsort([train, place[slides]])]


def name_network(backbone):
    """What a row of a network is called: the backbone that was trained."""
    return "EfficientNet-B0" if backbone == "efficientnet_b0" else backbone


def name_weights(recipe):
    """What a network started from: "pretrained" (timm's hub), "random", or a file's name."""
    path = common.find_weights(recipe["PRETRAINED"], recipe["BACKBONE"])
    if path:
        return path.name
    return "pretrained" if recipe["PRETRAINED"] else "random"


def predict_again(trained, row, stain_shift=False, wrap=None):
    """A method, given a row that is trained: its weights predict the scored spots once more, by
    another recipe or on test slides that another laboratory would have stained.

    wrap(model, row) gives the network that predicts, where it is not the model itself.
    """
    recipe = row.recipe | {"PRETRAINED": False}
    model = common.build_model(recipe, len(row.split.data.genes), row.split.seed)
    network = wrap(model, row) if wrap else model
    model.load_state_dict(safetensors.torch.load_file(trained.folder / "weights.safetensors"))
    network = network.to(row.device, memory_format=torch.channels_last)
    patches = row.place_patches()
    if stain_shift:
        patches = common.StainShiftedPatches(patches, common.OTHER_STAINING)
    kept = ("weights", "steps", "best_epoch", *PARAMETERS)
    row.note(**{name: trained.lines[0][name] for name in kept})
    predicted = row.predict(network, patches)
    is_valid = row.split.roles[row.split.scored()] == "valid"
    if stain_shift and is_valid.any():
        # What validation says of the weights, as the width of intervals, is of slides as they are.
        first = recording.read_prediction(trained.folder).to_numpy()
        return splitting.keep_validation_of(first, predicted[~is_valid], row.split)
    return predicted


PARAMETERS = ("parameters_backbone", "parameters_trainable", "parameters_total")


def ridge_on_colour(row):
    """A method: the ridge on standardised colour statistics."""
    return apply_ridge_to(row, row.split.data.annotations.obsm["colour"])


def ridge_under_stain_shift(row):
    """A method: ridge_on_colour of test slides that another laboratory would have stained."""
    data = row.split.data
    patches = common.MappedPatches(data.patches, common.PATCH_SIZE)
    patches = common.StainShiftedPatches(patches, common.OTHER_STAINING)
    colour = data.annotations.obsm["colour"].copy()
    for spots in torch.from_numpy(row.split.spots("test")).split(64):
        shifted = patches[spots].permute(0, 2, 3, 1).numpy()
        colour[spots.numpy()] = colour_statistics(shifted)
    return apply_ridge_to(row, colour)


def apply_ridge_to(row, colour):
    """The prediction from these statistics (N, 40) of the ridge on colour."""
    statistics = row.split.data.annotations.obsm["colour"]
    scaler = StandardScaler().fit(statistics[row.split.spots("train")])
    seen = scaler.transform(colour[row.split.scored()])
    return predict_by_ridge(row, scaler.transform(statistics), seen)
