"""What predicts: a network that is trained, and ridges on frozen features and on colour.

A method is a `compute` of recording.compute_records.
"""

import ctypes
import functools
import json
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from sklearn import linear_model
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from tqdm import tqdm

import common
from study import ridges, shell, splitting, weight_files
from study.shell import InputError


# ----------------------------------------------------------------------------------------- training
@dataclass(frozen=True)
class Training:
    """What one training takes. A script's adapt(training, recipe, split) returns one with other
    parts.
    """

    model: common.SpotRegressor  # its weights are saved
    network: nn.Module  # what is trained: the model, or a module around it
    patches: object  # the network's input: patches[spots]
    loss: Callable | None = None  # (predicted, target) -> scalar; None = LOSS
    aug: str | None = None  # of the network's input; None = AUG
    gene_weights: np.ndarray | None = None  # (G,) in the loss; None = equal
    optimise: Callable = common.adam  # (network, recipe) -> (optimiser, schedule)
    more: dict = field(default_factory=dict)  # {name: value} for the records


def train_network(recipe, split, folder, *, keep=None, adapt=None, report=None):
    """Train and predict, as `compute` of compute_records; writes weights.safetensors, history.csv.

    `keep` and `report` as in common.fit; `adapt` as in Training. With REFIT the weights are those
    of a second network, which predicts all but the validation spots (history_refit.csv).
    """
    device, _, _ = common.choose_device(recipe)
    forget_peak_memory(device)
    checkpoint = folder / "checkpoint.pt"
    training, history, predicted = train_once(
        recipe, split, checkpoint, keep=keep, adapt=adapt, report=report
    )
    best_epoch = common.choose_epoch(history, recipe) if keep is None else keep
    # Epochs before an interruption count as well.
    seconds = sum(line["seconds"] for line in history)
    if splitting.is_refitted(recipe, split):
        whole, checkpoint = split.with_all_in_training(), folder / "checkpoint_refit.pt"
        tqdm.write(f"refitting on all {len(whole.spots('train'))} spots, up to epoch {best_epoch}")
        training, refit_history, refitted_prediction = train_once(
            recipe, whole, checkpoint, keep=best_epoch, adapt=adapt
        )
        seconds += sum(line["seconds"] for line in refit_history)
        predicted = splitting.keep_validation_of(predicted, refitted_prediction, split)
    peak = peak_memory(device)
    if common.joined_ranks()[1] == 0:
        weights = folder / "weights.safetensors"
        save_weights(weights, training.model, split, split.made_with(recipe), predicted)
        shell.save_csv(folder / "history.csv", pd.DataFrame(history))
        if splitting.is_refitted(recipe, split):
            shell.save_csv(folder / "history_refit.csv", pd.DataFrame(refit_history))
    parameters = common.count_parameters(training.model)
    return predicted, {
        "weights": name_weights(recipe),
        "steps": common.count_steps(len(split.spots("train")), recipe),
        "best_epoch": best_epoch,
        "images_per_s": median_rate(history),
        "seconds": seconds,
        "peak_memory_mb": peak / 2**20,
        **{f"parameters_{part}": count for part, count in parameters.items()},
        **training.more,
    }


def train_once(recipe, split, checkpoint, *, keep, adapt, report=None):
    """(Training, history, prediction of split.scored()) of one network, as train_network's."""
    device, dtype, _ = common.choose_device(recipe)
    patches = common.place_patches(split.data.patches, recipe["IMAGE_SIZE"], device)
    training = start_training(recipe, split, patches, device)
    if adapt:
        training = adapt(training, recipe, split)
    history = common.fit(
        training.network,
        training.patches,
        split.data.target,
        split.spots("train"),
        split.spots("valid"),
        recipe=recipe | {"AUG": training.aug or recipe["AUG"]},
        seed=split.seed,
        dtype=dtype,
        loss=training.loss,
        gene_weights=training.gene_weights,
        optimise=training.optimise,
        valid_heg=functools.partial(mean_heg, split),
        keep=keep,
        checkpoint=checkpoint,
        made_with=split.made_with(recipe),
        report=report,
    )
    predicted = common.predict(
        training.network, training.patches, split.scored(), dtype=dtype, tta=recipe["TTA"]
    )
    return training, history, predicted


def refitted(compute):
    """`compute` of compute_records for a method that needs no epochs: with REFIT it learns a second
    time, with the validation spots, and predicts all others by that.
    """

    @functools.wraps(compute)
    def compute_twice(recipe, split, folder):
        first, more = compute(recipe, split, folder)
        if not splitting.is_refitted(recipe, split):
            return first, more
        second, more = compute(recipe, split.with_all_in_training(), folder)
        return splitting.keep_validation_of(first, second, split), more

    return compute_twice


def median_rate(history):
    """Images a second of the median epoch; NaN where none was trained."""
    rates = [line["images_per_s"] for line in history if line["images_per_s"]]
    return float(np.median(rates)) if rates else np.nan


def start_training(recipe, split, patches, device):
    """The Training of a recipe: a network whose head starts as HEAD_START says."""
    target = split.data.target
    train = split.spots("train")
    model = common.build_model(recipe, len(split.data.genes), split.seed)
    model = model.to(device, memory_format=torch.channels_last)
    optimise = common.adam
    if recipe["HEAD_LEARNING_RATE"]:
        optimise = common.adamw_with_two_rates
    training = Training(model, model, patches, optimise=optimise)
    if recipe["HEAD_START"] == "mean":
        # Through a random last layer the first steps would turn the pretrained backbone before the
        # head knows anything; behind this one it waits, and the first prediction is the mean.
        mean, _ = common.mean_and_variance(target, train)
        nn.init.zeros_(model.head[-1].weight)
        model.head[-1].bias.data.copy_(torch.from_numpy(mean))
    as_ridge = recipe["HEAD_START"] == "ridge"
    if recipe["GENE_WEIGHTS"] == "predictable" and not (as_ridge and recipe["LOSS"] == "mse"):
        raise InputError(
            "--gene-weights predictable: needs --head-start ridge, which says what can be "
            "predicted, and --loss mse"
        )
    if not as_ridge:
        return training
    if recipe["HIDDEN"]:
        raise InputError(
            f"--hidden {recipe['HIDDEN']}: a ridge start needs a linear head: add --hidden 0"
        )
    features, scale = freeze_features(recipe, split)
    ridge, shrinkage = fit_ridge(split, features, train)
    ridges.start_as_ridge(model, ridge, scale)
    training = replace(training, more=shrinkage._asdict())
    if recipe["GENE_WEIGHTS"] == "equal":
        return training
    explained = ridges.explain_genes(
        features, target, train, split.data.spots, shrinkage, split.reported
    )
    if not explained.any():
        return training
    return replace(training, gene_weights=explained / explained.mean())


def freeze_features(recipe, split):
    """((N, F) features of BACKBONE before training, (F,) the factors that they have been given).

    They are averaged over the 8 symmetries, and their parts, as common.pool_each_stage gives them,
    made equally strong on the training spots.
    """
    data = split.data
    features, widths = common.encode_patches(data.patches, recipe, split.seed, tta=True)
    scale = ridges.balance_parts(features[split.spots("train")], widths)
    return features * scale, scale


def fit_ridge(split, features, spots, full_rank=False):
    """ridges.fit_ridge of the expression on the features (N, F) at these spots alone."""
    data = split.data
    return ridges.fit_ridge(features, data.target, spots, data.spots, split.reported, full_rank)


def predict_by_ridge(split, known, seen, weights, full_rank=False):
    """(prediction (n, G) from features `seen` (n, F), {name: value} for the records) of the ridge
    that the training spots teach on features `known` (N, F).
    """
    ridge, shrinkage = fit_ridge(split, known, split.spots("train"), full_rank)
    return ridge.predict(seen), {"weights": weights, **shrinkage._asdict()}


@refitted
def ridge_on_features(recipe, split, folder):
    """`compute` of compute_records: the ridge on frozen features, which no network may lose to."""
    features, _ = freeze_features(recipe, split)
    seen, full_rank = features[split.scored()], recipe.get("FULL_RANK", False)
    return predict_by_ridge(split, features, seen, name_weights(recipe), full_rank)


PROBE_COMPONENTS = 256
PROBE_SEED = 1  # of the benchmark's runs


def name_probes(backbone):
    """{setting: {CONSTANT: value}} of the two probes that HEST-Benchmark describes."""
    return {
        f"hest probe ({backbone})": {},
        f"hest probe ({backbone}, full width)": {"FULL_WIDTH": True},
    }


def hest_probe(recipe, split, folder):
    """`compute` of compute_records: a probe of HEST-Benchmark on frozen features of BACKBONE.

    Features of the last stage, of the patch as it is, in fp32 whatever PRECISION is; of all spots
    of the training slides, since the probe needs no validation; log1p of raw counts without a
    normalisation by depth (st_dataset.py in src/hest/bench of the repository mahmoodlab/HEST).

    What differs: the spots of a sample stand by their rows and not as in its file of patches, on
    which the random steps of PCA depend where there are fewer spots than features. The benchmark's
    row ResNet50 ends after the third of the four stages of timm's resnet50.tv_in1k
    (inference_models.py), so that of resnet50 here is another one.
    """
    plain = recipe | {"POOL_STAGES": False, "PRECISION": "fp32"}
    features, _ = common.encode_patches(split.data.patches, plain, split.seed)
    train = order_by_fold_file(split)
    predicted, alpha = probe_features(
        features[train],
        split.data.target[train],
        features[split.scored()],
        full_width=recipe.get("FULL_WIDTH", False),
    )
    return predicted.astype(np.float32), {"weights": name_weights(recipe), "alpha": alpha}


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
    known = split.spots("train", "valid")
    folds = splitting.read_task_folds(split.data.root)
    named = folds[(folds["fold"] == split.fold) & (folds["role"] == "train")]["tissue_index"]
    place = pd.Series(range(len(named)), named.to_numpy())
    slides = split.data.spots["tissue_index"].to_numpy()[known]
    return known[np.lexsort([known, place[slides]])]


def mean_heg(split, predicted):
    """Mean over HEG of r over the validation spots, against the target."""
    r = validate_genes(split, predicted, split.data.target)
    return float(pd.Series(r, split.data.genes)[split.members["heg"]].mean())


def name_network(backbone):
    """What a record of a network is called: the backbone that was trained."""
    return "EfficientNet-B0" if backbone == "efficientnet_b0" else backbone


def name_weights(recipe):
    """What a network started from: "pretrained" (timm's hub), "random", or a file's name."""
    path = weight_files.find_weights(recipe["PRETRAINED"], recipe["BACKBONE"])
    if path:
        return path.name
    return "pretrained" if recipe["PRETRAINED"] else "random"


def forget_peak_memory(device):
    """Have the peak that peak_memory tells be this training's own, where the system can forget
    earlier ones.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError, AttributeError, TypeError):  # Linux can, others cannot
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device):
    """Bytes of the greatest memory use: on a GPU, of tensors; else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def save_weights(path, model, split, made_with, predicted):
    """Weights whose metadata say all that script 26 needs: how to build the network and make its
    patches, and of each gene r over the validation spots (against log-normalised counts) and the
    ceiling on the training slides.
    """
    data = split.data
    valid = split.roles[split.scored()] == "valid"
    ceilings = [f"ceiling_{slide}" for slide in split.slides("train")]
    metadata = {
        "format": common.FORMAT,
        "recipe": made_with,
        "genes": data.genes,
        # Of two magnifications the coarser: no slide has what lies between them.
        "um_per_px": float(np.quantile([*data.meta["um_per_px"].values()], 0.5, method="higher")),
        "title": data.label,
        "patch_size": common.PATCH_SIZE,
        "mean": model.mean.tolist(),
        "std": model.std.tolist(),
        "groups": {key: genes for key, genes in split.members.items() if key != "all"},
        "valid_r": shell.without_nan(validate_genes(split, predicted[valid], data.lognorm)),
        "ceiling": shell.without_nan(data.annotations.var.reindex(columns=ceilings).mean(axis=1)),
    }
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    texts = {name: json.dumps(value) for name, value in metadata.items()}
    with shell.whole_file(path) as partial:
        partial.write_bytes(safetensors.torch.save(state, texts))


def validate_genes(split, predicted, truth):
    """(G,) r of the prediction (n, G) of the validation spots, against their truth (N, G); NaN
    without validation.
    """
    valid = split.spots("valid")
    if not len(valid):
        return np.full(len(split.data.genes), np.nan)
    slides = split.data.spots["tissue_index"].to_numpy()[valid]
    return common.average_slides(common.pearson_per_gene, predicted, truth[valid], slides)


def predict_again(out, trained, restained=False, wrap=None):
    """`compute` of compute_records: the weights of a trained record of `out` predict once more, by
    another recipe or on slides that another laboratory would have stained.

    wrap(model, recipe, split) gives the network that predicts, where it is not the model itself.
    """

    def compute(recipe, split, folder):
        device, dtype, _ = common.choose_device(recipe)
        plain = recipe | {"PRETRAINED": False}
        model = common.build_model(plain, len(split.data.genes), split.seed)
        network = wrap(model, recipe, split) if wrap else model
        weights = out / trained["folder"] / "weights.safetensors"
        model.load_state_dict(safetensors.torch.load_file(weights))
        network = network.to(device, memory_format=torch.channels_last)
        patches = common.place_patches(split.data.patches, recipe["IMAGE_SIZE"], device)
        if restained:
            patches = common.RestainedPatches(patches, common.OTHER_STAINING)
        predicted = common.predict(network, patches, split.scored(), dtype=dtype, tta=recipe["TTA"])
        kept = ("weights", "steps", "best_epoch", *PARAMETERS)
        return predicted, {name: trained[name] for name in kept}

    return compute


PARAMETERS = ("parameters_backbone", "parameters_trainable", "parameters_total")


def ridge_on_colour(recipe, split, folder):
    """`compute` of compute_records: ridge on standardised colour statistics."""
    return ridge_applied_to(split.data.annotations.obsm["colour"])(recipe, split, folder)


def ridge_on_other_colours(recipe, split, folder):
    """ridge_on_colour of slides that another laboratory would have stained."""
    patches = common.MappedPatches(split.data.patches, common.PATCH_SIZE)
    patches = common.RestainedPatches(patches, common.OTHER_STAINING)
    colour = np.full(split.data.annotations.obsm["colour"].shape, np.nan)
    for spots in torch.from_numpy(split.scored()).split(64):
        restained = patches[spots].permute(0, 2, 3, 1).numpy()
        colour[spots.numpy()] = common.colour_statistics(restained)
    return ridge_applied_to(colour)(recipe, split, folder)


def ridge_applied_to(colour):
    """`compute` of compute_records: the ridge on colour, applied to these statistics (N, 40)."""

    @refitted
    def compute(recipe, split, folder):
        known, train = split.data.annotations.obsm["colour"], split.spots("train")
        scaler = StandardScaler().fit(known[train])
        seen = scaler.transform(colour[split.scored()])
        return predict_by_ridge(split, scaler.transform(known), seen, "none")

    return compute
