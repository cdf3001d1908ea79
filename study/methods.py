"""The methods that scripts share: networks, how they start and predict once more, and what needs no
training by epochs: ridges on frozen features and on colour.

A method, method(row), returns the prediction (n, G) of row.split.scored(): see study.rows.Row.
"""

import safetensors.torch
import torch
from sklearn.preprocessing import StandardScaler
from torch import nn

import common
from study import backbones, recording, ridges, splitting
from study.errors import InputError
from study.features import freeze_features


# ----------------------------------------------------------------------------------------- networks
def build_network(row):
    """The network with a random last layer, on the row's device."""
    recipe, split = row.recipe, row.split
    starts_as_ridge = recipe["HEAD_START"] == "ridge"
    if starts_as_ridge and recipe["HIDDEN"]:
        raise InputError(
            f"--hidden {recipe['HIDDEN']}: a ridge start needs a linear head: add --hidden 0"
        )
    if not recipe["EPOCHS"] and not starts_as_ridge:
        raise InputError("--epochs 0: needs --head-start ridge, which predicts without any")
    model = common.build_model(recipe, len(split.data.genes), split.seed)
    return model.to(row.device, memory_format=torch.channels_last)


def start_network(row):
    """The network before training; its last layer starts as HEAD_START says."""
    model = build_network(row)
    if row.recipe["HEAD_START"] == "mean":
        # Through a random last layer the first steps would turn the pretrained backbone before the
        # head knows anything; behind this one it waits, and the first prediction is the mean.
        mean, _ = common.mean_and_variance(row.split.data.target, row.split.spots("train"))
        nn.init.zeros_(model.head[-1].weight)
        model.head[-1].bias.data.copy_(torch.from_numpy(mean))
    if row.recipe["HEAD_START"] == "ridge":
        start_as_ridge(row, model)
    return model


def start_as_ridge(row, model):
    """Have the head predict what the ridge on frozen features does; returns these (N, F)."""
    features, scale = freeze_features(row.recipe, row.split)
    ridge, shrinkage = learn_ridge(row.split, features, row.split.spots("train"))
    ridges.copy_to_head(ridge, model, scale)
    row.note(**shrinkage._asdict())
    return features


def network(row, **how):
    """A method: the network is built, trained by common.fit, which takes `how`, and predicts."""
    model = start_network(row)
    patches = row.place_patches()
    row.fit(model, patches, **how)
    return row.predict(model, patches)


def network_of_no_epoch(row):
    """A method: the network whose head is the ridge on its frozen features.

    With TTA it predicts by the features that the data root keeps, and sees no patch again.
    """
    row.model = build_network(row)
    features = start_as_ridge(row, row.model)
    row.note(weights=name_weights(row.recipe), steps=0, best_epoch=0)
    row.count_parameters()
    if not row.recipe["TTA"]:
        return row.predict(row.model, row.place_patches())
    head = row.model.head[-1]
    ridge = ridges.Ridge(head.weight.detach().cpu().numpy().T, head.bias.detach().cpu().numpy())
    return ridge.predict(features[row.split.scored()])


def name_network(backbone):
    """What a row of a network is called: the backbone that was trained."""
    return "EfficientNet-B0" if backbone == "efficientnet_b0" else backbone


def name_weights(recipe):
    """What a network started from: "pretrained" (timm's hub), "random", or a file's name."""
    path = backbones.find_pretrained(recipe["PRETRAINED"], recipe["BACKBONE"])
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
    predictor = wrap(model, row) if wrap else model
    model.load_state_dict(safetensors.torch.load_file(trained.folder / "weights.safetensors"))
    predictor = predictor.to(row.device, memory_format=torch.channels_last)
    patches = row.place_patches()
    if stain_shift:
        patches = common.StainShiftedPatches(patches, common.OTHER_STAINING)
    kept = ["weights", "steps", "best_epoch", "refit"]
    kept += ["parameters_backbone", "parameters_trainable", "parameters_total"]
    row.note(**{name: trained.lines[0][name] for name in kept})
    predicted = row.predict(predictor, patches)
    is_valid = row.split.roles[row.split.scored()] == "valid"
    if stain_shift and is_valid.any():
        # What validation says of the weights, as the width of intervals, is of slides as they are.
        first = recording.read_prediction(trained.folder).to_numpy()
        return splitting.keep_validation_of(first, predicted[~is_valid], row.split)
    return predicted


# ------------------------------------------------------------------------------------------- ridges
def learn_ridge(split, features, spots, full_rank=False):
    """ridges.fit_ridge of the expression on the features (N, F) at these spots alone."""
    data = split.data
    return ridges.fit_ridge(features, data.target, spots, data.spots, split.reported, full_rank)


def predict_by_ridge(row, features, seen, full_rank=False):
    """(n, G) predicted from features `seen` (n, F) by the ridge on `features` (N, F)."""
    ridge, shrinkage = learn_ridge(row.split, features, row.split.spots("train"), full_rank)
    row.note(**shrinkage._asdict())
    return ridge.predict(seen)


def ridge_on_features(row):
    """A method: the ridge on frozen features, which no network may lose to."""
    features, _ = freeze_features(row.recipe, row.split)
    row.note(weights=name_weights(row.recipe))
    full_rank = "FULL_RANK" in row.recipe
    return predict_by_ridge(row, features, features[row.split.scored()], full_rank)


def ridge_on_colour(row, seen=None):
    """A method: the ridge on standardised colour statistics, which predicts from these or, where
    others (N, 40) are `seen`, from those.
    """
    data = row.split.data
    statistics = data.annotations.obsm["colour"]
    scaler = StandardScaler().fit(statistics[row.split.spots("train")])

    def prepare(values):
        scaled = scaler.transform(values)
        if row.recipe["NEIGHBOURHOOD"]:
            return common.blend_neighbourhood(scaled, data.spots)
        return scaled

    features = prepare(statistics)
    seen = features if seen is None else prepare(seen)
    return predict_by_ridge(row, features, seen[row.split.scored()])
