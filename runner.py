"""A Run and its Splits, trainings, records on disk, differences, the printed header and table, the
report. How a patch becomes an r is in common.py; constants, command line and files are in shell.py.

A *record* is a dict: one line of rows.csv, the scores of one setting on one split against one
truth. The records of a setting lie in a folder of their own, <out>/<setting>-<hash of what they
were made with>/.
"""

import ctypes
import functools
import hashlib
import itertools
import json
import os
import platform
import re
import resource
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import safetensors.torch
import torch
import torch.distributed as dist
from sklearn import linear_model
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from tqdm import tqdm

import common
import recipes
import ridges
import shell
import slides
import weight_files
from common import GROUPS, SCORED
from shell import RANK, RANKS, InputError

# What a constant that names something in common.py may be, beside recipes.ALLOWED.
NAMED_IN_COMMON = {"AUG": tuple(common.AUGMENTATIONS), "LOSS": tuple(common.LOSSES)}
WIDTH = 120  # columns of what is printed, at most
WHOLE_WORDS = {"break_long_words": False, "break_on_hyphens": False}  # so that paths can be copied


# ------------------------------------------------------------------------------------------- splits
@dataclass(frozen=True, eq=False)  # Compared by identity, since arrays have no one answer.
class Split:
    """One training's share of a data root: which spots do what, and which genes are reported."""

    data: common.SpotData
    roles: np.ndarray  # (N,) of common.ROLES, "" for a spot that takes no part
    groups: pd.DataFrame  # columns group, gene, rank; attrs["source"]
    seed: int
    fold: int = 0

    @functools.cached_property
    def members(self):
        """{"heg": its genes that are in the panel, "hvg", "mg", "all": the panel}."""
        return common.members_of(self.groups, self.data.genes)

    @property
    def reported(self):
        """Numbers of the genes of HEG and HVG in the panel; of all genes where there are none."""
        names = {*self.members["heg"], *self.members["hvg"]} or self.data.genes
        return np.flatnonzero(pd.Index(self.data.genes).isin(names))

    def spots(self, *roles):
        """Numbers of the spots with these roles, in the order of the roles."""
        return np.concatenate([np.flatnonzero(self.roles == role) for role in roles])

    def scored(self):
        """Numbers of the spots that are predicted and scored, as the lines of a prediction."""
        return self.spots(*SCORED)

    def with_all_in_training(self):
        """The split in which all spots of the slides of training and validation train, those of a
        margin between them as well; its genes were chosen without these.
        """
        slides = self.data.spots["tissue_index"].to_numpy()
        known = np.isin(slides, self.slides("train", "valid")) & (self.roles != "test")
        return replace(self, roles=np.where(known, "train", self.roles))

    def slides(self, *roles):
        """tissue_index values of the slides of these spots, in order."""
        return np.unique(self.data.spots["tissue_index"].to_numpy()[self.spots(*roles)])

    def made_with(self, recipe):
        """{name: value} of all that a record of this split follows from."""
        # Where it lies, and what the hash of the roles below stands for, takes no part.
        elsewhere = ("OUT", "QUICK", "DATA_ROOT", "SEEDS", "ONLY", "COMPARE_TARGETS")
        elsewhere += ("TRAIN_SLIDES", "TEST_SLIDE", "VALID_FRACTION")
        made_with = {name: value for name, value in recipe.items() if name not in elsewhere}
        if isinstance(recipe["PRETRAINED"], str):
            # The files' content counts, not where they lie.
            made_with["PRETRAINED"] = {
                recipe[name]: weight_files.identify_weights(recipe["PRETRAINED"], recipe[name])
                for name in ("BACKBONE", "FEATURES")
                if recipe.get(name)
            }
        if "AUG" in recipe:
            made_with["augmentation"] = common.describe_augmentation(recipe["AUG"])
        device, dtype, _ = common.choose_device(recipe)
        made_with["DEVICE"] = device.type
        made_with["PRECISION"] = str(dtype).removeprefix("torch.")
        made_with |= {"seed": self.seed, "fold": self.fold, "data": self.data.fingerprint}
        made_with["results"] = common.RESULTS
        made_with["split"] = hashlib.sha256(self.roles.tobytes()).hexdigest()
        genes = json.dumps(self.groups.values.tolist())
        made_with["genes"] = hashlib.sha256(genes.encode()).hexdigest()
        return json.loads(json.dumps(made_with))  # tuples become lists, as they are when read again


def make_split(data, roles, recipe, seed, fold):
    """The Split of these roles: the panel is chosen on the slides of training, the gene groups on
    its spots.

    With the target harmony, which has seen the slides of all roles, the panel is theirs, and a
    gene_sets.csv is taken. Slides without a role change nothing.
    """
    slides = data.spots["tissue_index"].to_numpy()
    train = np.flatnonzero(roles == "train")
    if recipe["TARGET"] == "harmony":
        data = common.take_part(data, tuple(np.unique(slides[roles != ""])))
    else:
        data = common.restrict_panel(data, tuple(np.unique(slides[train])))
    published = recipe["TARGET"] == "harmony" and recipe["PROTOCOL"] == "paper"
    groups = common.choose_gene_groups(data, train, published)
    return Split(data, roles, groups, seed, fold)


def make_simulated_slides(root, target):
    """Call scripts 18 and 19 where the simulated slides or their patches are missing; other ranks
    wait for them.
    """
    made = root / "dataset" / "meta.json"
    while RANK and not made.exists():
        time.sleep(0.2)
    if not (root / "slides.csv").exists():
        shell.call_script("18_simulate_slides.py", "--data-root", str(root))
    if not made.exists():
        shell.call_script(
            "19_make_patches_and_csv.py", "--data-root", str(root), "--target", target
        )


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
    if is_refitted(recipe, split):
        whole, checkpoint = split.with_all_in_training(), folder / "checkpoint_refit.pt"
        tqdm.write(
            f"learning again from all {len(whole.spots('train'))} spots, up to epoch {best_epoch}"
        )
        training, refit_history, refitted_prediction = train_once(
            recipe, whole, checkpoint, keep=best_epoch, adapt=adapt
        )
        seconds += sum(line["seconds"] for line in refit_history)
        predicted = keep_validation_of(predicted, refitted_prediction, split)
    peak = peak_memory(device)
    if common.joined_ranks()[1] == 0:
        weights = folder / "weights.safetensors"
        save_weights(weights, training.model, split, split.made_with(recipe), predicted)
        shell.save_csv(folder / "history.csv", pd.DataFrame(history))
        if is_refitted(recipe, split):
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


def is_refitted(recipe, split):
    """Whether REFIT applies: there are validation spots to add and a test slide to predict."""
    return recipe.get("REFIT", False) and {"valid", "test"} <= {*split.roles}


def final_split(recipe, split):
    """The split that the saved weights have learnt from: with REFIT validation spots train too."""
    return split.with_all_in_training() if is_refitted(recipe, split) else split


def keep_validation_of(first, second, split):
    """The validation spots' predictions of `first`, (n, G) of split.scored(), and all others of
    `second`, of split.with_all_in_training().scored().
    """
    merged = first.copy()
    merged[split.roles[split.scored()] != "valid"] = second
    return merged


def refitted(compute):
    """`compute` of compute_records for a method that needs no epochs: with REFIT it learns a second
    time, with the validation spots, and predicts all others by that.
    """

    @functools.wraps(compute)
    def compute_twice(recipe, split, folder):
        first, more = compute(recipe, split, folder)
        if not is_refitted(recipe, split):
            return first, more
        second, more = compute(recipe, split.with_all_in_training(), folder)
        return keep_validation_of(first, second, split), more

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


def hest_probe(recipe, split, folder):
    """`compute` of compute_records: the probe of HEST-Benchmark on frozen features of BACKBONE.

    Features of the last stage, of the patch as it is, in fp32 whatever PRECISION is; of all spots
    of the training slides, since the probe needs no validation. In the repository mahmoodlab/HEST,
    src/hest/bench, benchmark.py and trainer.py do this, and st_dataset.py takes log1p of raw counts
    without a normalisation by depth: StandardScaler, PCA to 256 of seed 1, rounded to single
    precision and computed in double from there on (scikit-learn makes that of a tensor), then for
    all genes at once Ridge without intercept, solver lsqr of at most 1,000 steps and
    scikit-learn's tolerance, alpha = 100 / (columns x genes).

    What differs: the spots of a sample stand by their rows and not as in its file of patches, on
    which the random steps of PCA depend where there are fewer spots than features; of fewer than
    256 spots or features as many components are taken as there can be. The benchmark's row
    ResNet50 ends after the third of the four stages of timm's resnet50.tv_in1k
    (inference_models.py), so that of resnet50 here is another one.
    """
    target = split.data.target
    plain = recipe | {"POOL_STAGES": False, "PRECISION": "fp32"}
    features, _ = common.encode_patches(split.data.patches, plain, split.seed)
    known = order_by_fold_file(split)
    n_components = min(PROBE_COMPONENTS, len(known), features.shape[1])
    reduce = make_pipeline(StandardScaler(), PCA(n_components, random_state=PROBE_SEED))
    reduced = round_to_single(reduce.fit_transform(features[known]))
    alpha = 100 / (n_components * target.shape[1])
    ridge = linear_model.Ridge(alpha, fit_intercept=False, solver="lsqr", max_iter=1000)
    ridge.fit(reduced, target[known])
    seen = round_to_single(reduce.transform(features[split.scored()]))
    more = {"weights": name_weights(recipe), "alpha": alpha}
    return ridge.predict(seen).astype(np.float32), more


def round_to_single(values):
    """The values as single precision holds them, in double precision."""
    return values.astype(np.float32).astype(np.float64)


def order_by_fold_file(split):
    """Numbers of all spots of the training slides of a fold of HEST-Benchmark, slide by slide as
    its file names them.
    """
    known = split.spots("train", "valid")
    folds = common.read_task_folds(split.data.root)
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
        "valid_r": without_nan(validate_genes(split, predicted[valid], data.lognorm)),
        "ceiling": without_nan(data.annotations.var.reindex(columns=ceilings).mean(axis=1)),
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


def without_nan(values):
    """A list of floats with None for NaN, which JSON does not have."""
    return [none_for_nan(float(value)) for value in values]


def predict_again(out, trained, restained=False):
    """`compute` of compute_records: the weights of a trained record of `out` predict once more, by
    another recipe or on slides that another laboratory would have stained.
    """

    def compute(recipe, split, folder):
        device, dtype, _ = common.choose_device(recipe)
        plain = recipe | {"PRETRAINED": False}
        model = common.build_model(plain, len(split.data.genes), split.seed)
        weights = out / trained["folder"] / "weights.safetensors"
        model.load_state_dict(safetensors.torch.load_file(weights))
        model = model.to(device, memory_format=torch.channels_last)
        patches = common.place_patches(split.data.patches, recipe["IMAGE_SIZE"], device)
        if restained:
            patches = common.RestainedPatches(patches, common.OTHER_STAINING)
        predicted = common.predict(model, patches, split.scored(), dtype=dtype, tta=recipe["TTA"])
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


# ------------------------------------------------------------------------------------------ records
def compute_records(out, setting, recipe, split, compute, rank=0):
    """The records of one setting on one split: from disk where they are, else computed, scored and
    written to a folder of their own; rows.json comes last and marks it as whole.

    compute(recipe, split, folder) returns the prediction (n, G) of split.scored() and {name: value}
    for the records. Of torchrun's processes, `rank` computes them, or all do that have joined, and
    the others wait.
    """
    made_with = split.made_with(recipe)
    folder = out / name_folder(setting, made_with)
    done = folder / "rows.json"
    if done.is_file():
        tqdm.write(f"{setting}: on disk already ({folder})")
    elif rank == RANK or dist.is_initialized():
        began = time.perf_counter()
        predicted, more = compute(recipe, split, folder)
        more = {"seconds": time.perf_counter() - began, "folder": folder.name, **more}
        if rank == RANK:
            save_setting(folder, setting, recipe, split, predicted, more, made_with)
    while not done.is_file():
        time.sleep(0.2)
    if rank == RANK:
        for checkpoint in folder.glob("checkpoint*.pt"):
            checkpoint.unlink()
    collect_records(out)
    return json.loads(done.read_text())


def name_folder(setting, made_with):
    """<setting>-<hash of what it was made with>, in letters that every file system takes."""
    content = json.dumps([setting, made_with], sort_keys=True)
    key = hashlib.sha256(content.encode()).hexdigest()[:10]
    name = re.sub(r"[^A-Za-z0-9.=-]+", "_", setting).strip("_")
    return f"{name}-{key}"


def collect_records(out):
    """Write rows.csv: every record in the folders of `out` that this version's numbers are in."""
    records = []
    for path in sorted(out.glob("*/rows.json")):
        made_with = json.loads(path.with_name("recipe.json").read_text())
        if made_with.get("results") == common.RESULTS:
            records += json.loads(path.read_text())
    shell.save_csv(out / "rows.csv", pd.DataFrame(records))


def save_setting(folder, setting, recipe, split, predicted, more, made_with):
    """Score a setting's prediction and write its folder."""
    data = split.data
    scored = split.scored()
    records, per_gene, draws = score_split(setting, recipe, split, predicted, more)
    roles = pd.DataFrame({"id": data.spots["id"], "role": split.roles, "fold": split.fold})
    obs = data.spots.iloc[scored].set_index("id").assign(role=split.roles[scored])
    table = anndata.AnnData(predicted, obs, per_gene.set_index("gene"))
    table.layers["lognorm"] = lognorm = data.lognorm[scored]
    table.layers["target"] = lognorm if data.target is data.lognorm else data.target[scored]
    table.obsm["spatial"] = table.obs[["pxl_col", "pxl_row"]].to_numpy(np.float64)
    shell.save_csv(folder / "per_gene.csv", per_gene)
    shell.save_csv(folder / "split.csv", roles[split.roles != ""])
    shell.save_csv(folder / "genes.csv", split.groups)
    shell.save_csv(folder / "bootstrap.csv", draws)
    with shell.whole_file(folder / "predictions.h5ad") as path:
        table.write_h5ad(path)
    shell.save_json(folder / "recipe.json", made_with)
    shell.save_json(folder / "rows.json", records)


def read_prediction(folder):
    """Table (n, G) of float32, by id and gene: what a setting's folder holds of its prediction; the
    truths beside it, which are as large, are not read.
    """
    path = folder / "predictions.h5ad"
    table = common.read_annotations(path)
    with h5py.File(path) as file:
        return pd.DataFrame(file["X"][:], table.obs_names, table.var_names)


def score_split(setting, recipe, split, predicted, more):
    """([a record a role and truth], per-gene table, bootstrap draws) of the prediction of
    split.scored().
    """
    data = split.data
    scored = split.scored()
    truths = {recipe["TARGET"]: data.target, "lognorm": data.lognorm}
    roles = [role for role in SCORED if role in split.roles]
    usual_spots = split.spots("train", "oof")
    usual = {
        truth: common.mean_and_variance(values, usual_spots)[0] for truth, values in truths.items()
    }
    records, draws = [], pd.DataFrame()
    per_gene = pd.DataFrame(index=pd.Index(data.genes, name="gene"))
    for role, (truth, values) in itertools.product(roles, truths.items()):
        at = split.roles[scored] == role
        x, y, spots = predicted[at], values[scored[at]], data.spots.iloc[scored[at]]
        genes = score_genes(data, x, y, spots, name_ceilings(recipe, split, role, truth))
        per_gene = per_gene.join(genes.add_prefix(f"{role}_{truth}_"))
        record = {"setting": setting, "split": role}
        record["slide"] = ",".join(map(str, np.unique(spots["tissue_index"])))
        record |= {"fold": split.fold, "seed": split.seed}
        record |= {"target": recipe["TARGET"], "truth": truth, "protocol": recipe["PROTOCOL"]}
        record["recipe"] = recipe.get("RECIPE")
        record["refit"] = bool(is_refitted(recipe, split))
        record |= {"gene_lists": split.groups.attrs["source"], "n_spots": len(x), **more}
        record |= summarise_genes(genes, split.members)
        record["spot_r"] = common.correlate_spots(x, y, usual[truth])
        if role == "test":
            means = common.bootstrap_means(x, y, spots, data.genes, split.members)
            if recipe["PROTOCOL"] == "hest":
                pooled = common.bootstrap_means(x, y, spots, data.genes, split.members, pooled=True)
                means = means.join(pooled.add_suffix("_pooled"))
            draws = draws.join(means.add_prefix(f"{truth}_"), how="outer")
            for key in means.dropna(axis=1):
                record[f"{key}_ci"] = means[key].quantile([0.025, 0.975]).tolist()
        records.append({name: none_for_nan(value) for name, value in record.items()})
    return records, per_gene.reset_index(), draws


# What script 19 tells of a gene on a slide; image_ceiling on simulated slides alone.
GENE_COLUMNS = ("ceiling", "image_ceiling", "moran")


def name_ceilings(recipe, split, role, truth):
    """The endings of the var columns that tell GENE_COLUMNS of these spots: for log-normalised
    counts one a slide, for a test fold of HEST-Benchmark the fold's.
    """
    if truth == "lognorm":
        return [str(slide) for slide in split.slides(role)]
    if recipe["PROTOCOL"] == "hest" and role == "test":
        return [f"fold_{split.fold}"]
    return []


def score_genes(data, predicted, truth, spots, ceilings):
    """A line a gene: common.score_genes, its mean expression and GENE_COLUMNS, the mean over the
    var columns with the endings `ceilings`.
    """
    slides = spots["tissue_index"].to_numpy()
    genes = pd.DataFrame(common.score_genes(predicted, truth, slides), data.genes)
    genes["mean"] = truth.mean(0)
    for name in GENE_COLUMNS:
        columns = [f"{name}_{ending}" for ending in ceilings]
        genes[name] = data.annotations.var.reindex(columns=columns).mean(axis=1)
    return genes


def summarise_genes(genes, members):
    """A record's means over the genes that have an r, by group; <group>_n is how many have one."""
    record = {
        "n_genes_r30": int((genes["r"] >= shell.R_THRESHOLD).sum()),
        "mse": genes["mse"].mean(),
        "variance_ratio": genes["variance_predicted"].sum() / (genes["variance"].sum() or np.nan),
    }
    defined = genes.dropna(subset="r")
    averaged = [name for name in (*common.METRICS, *GENE_COLUMNS) if name != "r"]
    for key, group in members.items():
        inside = defined.index.isin(group)
        mean = defined[inside].mean()
        record |= {key: mean["r"], f"{key}_n": int(inside.sum()), f"{key}_ci": None}
        record[f"{key}_pooled"] = mean["r_pooled"]
        record |= {f"{key}_{name}": mean[name] for name in averaged}
    order = defined[["r", "moran", "mean"]].corr("spearman")["r"]
    record["r_against_moran"] = order["moran"]
    record["r_against_mean"] = order["mean"]
    return record


def none_for_nan(value):
    """The value, or None for NaN, which JSON does not have."""
    if isinstance(value, float) and np.isnan(value):
        return None
    return value


# -------------------------------------------------------------------------------------- differences
def record_of(records, setting, split):
    """The first record of a setting that was trained on this split."""
    wanted = (setting, split.seed, split.fold)
    for record in records:
        if (record["setting"], record["seed"], record["fold"]) == wanted:
            return record
    raise LookupError(f"no record of {setting}")


def headline_of(records):
    """The recipes.Headline of these records, dicts or a table, all of one protocol."""
    protocols = pd.DataFrame(records)["protocol"]
    return recipes.headline_of(next(iter(protocols), None))


def select_records(records, role="test", truth=None):
    """Table of the records of this role and truth, by default the headline's, in the order of the
    trainings.
    """
    table = pd.DataFrame(records)
    truth = truth or headline_of(table).truth
    chosen = (table["split"] == role) & (table["truth"] == truth)
    table = table[chosen].copy()
    empty = table.columns[table.isna().all()]
    table[empty] = np.nan  # in place of None
    return table


def join_draws(records, out):
    """(DRAWS, 4) draws, as common.bootstrap_means, of a setting's mean over its test slides, or
    over the folds of HEST-Benchmark.

    Of several trainings on one of them, as many are drawn with replacement; those of two settings
    stay paired.
    """
    means = []
    headline = headline_of(records)
    keys = [group.lower() for group in (*GROUPS, "all")]
    columns = [f"{headline.truth}_{key}{headline.ending}" for key in keys]
    for _, folders in records.sort_values(["seed", "fold"]).groupby(headline.unit)["folder"]:
        tables = [pd.read_csv(out / folder / "bootstrap.csv") for folder in folders]
        draws = np.stack([table[columns] for table in tables], axis=1)
        random = np.random.default_rng(shell.seed_of("trainings"))
        picked = random.integers(draws.shape[1], size=draws.shape[:2])
        means.append(np.take_along_axis(draws, picked[:, :, None], axis=1).mean(1))
    return np.mean(means, axis=0)


def pair_differences(records, out, minus):
    """r of a setting minus r of another, {setting: another}, of the same trainings, on test slides
    against the headline's truth: table setting, minus, group, n, difference, low, high (95 %).

    NaN where r is not defined for equally many genes.
    """
    table = select_records(records).sort_values(["seed", "fold"])
    ending = headline_of(records).ending
    lines = []
    for setting, other in minus.items():
        ones = table[table["setting"] == setting].reset_index()
        others = table[table["setting"] == other].reset_index()
        draws = join_draws(ones, out) - join_draws(others, out)
        low, high = np.quantile(draws, [0.025, 0.975], axis=0)
        for place, group in enumerate((*GROUPS, "all")):
            key = group.lower()
            line = {"setting": setting, "minus": other, "group": group, "n": len(ones)}
            line |= {"difference": np.nan, "low": np.nan, "high": np.nan}
            same_genes = (ones[f"{key}_n"] == others[f"{key}_n"]).all()
            if same_genes and ones[f"{key}_n"].all():
                line["difference"] = (ones[f"{key}{ending}"] - others[f"{key}{ending}"]).mean()
                line |= {"low": low[place], "high": high[place]}
            lines.append(line)
    columns = ["setting", "minus", "group", "n", "difference", "low", "high"]
    return pd.DataFrame(lines, columns=columns)


# ----------------------------------------------------------------------------------- printed tables
def print_table(title, table):
    """One ruled table under its title; no line is wider than WIDTH."""
    head, *body = table.to_string(index=False).splitlines()
    lines = [cut(line.rstrip(), WIDTH) for line in (head, *body)]
    width = max(map(len, lines))
    print(f"\n{textwrap.fill(title, WIDTH)}", "=" * width, lines[0], "-" * width, sep="\n")
    print(*lines[1:], "=" * width, sep="\n")


def cut(text, width):
    """The text, its end left out where it is longer."""
    return text if len(text) <= width else text[: width - 1] + "…"


def justify_left(column):
    """A column of texts with its name, padded so that they begin at the same place."""
    width = max(map(len, [column.name, *column]))
    return column.str.ljust(width).rename(column.name.ljust(width))


def format_mean(values, form="{:.3f}"):
    """The mean of one number a training or slide, ±sd where there are several; "-" where it is
    undefined.
    """
    values = values.dropna()
    if values.empty:
        return "-"
    text = form.format(values.mean())
    if len(values) > 1:
        text += "±" + form.format(values.std())
    return text


def format_interval(low, high, form="{:.2f}"):
    """[low, high], or "-" where it is undefined."""
    if np.isnan(low) or np.isnan(high):
        return "-"
    return f"[{form.format(low)}, {form.format(high)}]"


def format_share(r, ceiling):
    """r as a share of its ceiling; "-" where either is undefined, or counts tell of noise alone."""
    return f"{r / ceiling:.0%}" if ceiling > 0 and not np.isnan(r) else "-"


def format_group(records, group, size):
    """Mean r of a gene group; 0.310/47 is of 47 genes only, where the group has more."""
    mean = records[group].mean()
    if np.isnan(mean):
        return "-"
    n_genes = int(records[f"{group}_n"].min())
    return f"{mean:.3f}/{n_genes}" if n_genes < size else f"{mean:.3f}"


def group_sizes(split):
    """{"heg": number of genes, ...} that the groups should hold; not of "all", where a few genes
    that are constant on a slide are no news.
    """
    sizes = {}
    for group, count in split.groups["group"].value_counts().items():
        sizes[group.lower()] = count
    return sizes


def describe_setting(records, sizes, out):
    """{column: text} of one setting's records: its line of the table of scores."""
    over = "slide" if records["slide"].nunique() > 1 else ["seed", "fold"]
    low = high = np.nan
    if (records["split"] == "test").all():
        low, high = np.quantile(join_draws(records, out)[:, 0], [0.025, 0.975])
    line = {"setting": cut(records["setting"].iloc[0], 32)}
    line["HEG"] = format_mean(records.groupby(over)["heg"].mean())
    line["[95 %]"] = format_interval(low, high)
    line["of ceiling"] = format_share(records["heg"].mean(), records["heg_ceiling"].mean())
    for group in ("HVG", "MG", "all"):
        line[group] = format_group(records, group.lower(), sizes.get(group.lower(), 0))
    line["r>=.30"] = f"{records['n_genes_r30'].mean():.0f}"
    line["steps"] = describe_mean_steps(records)
    return line


def describe_mean_steps(records):
    """Mean number of the optimiser's steps; "-" of what takes none."""
    steps = records.get("steps", pd.Series(dtype=float)).astype(float).mean()
    return "-" if np.isnan(steps) else f"{steps:,.0f}"


def describe_hest(records, n_genes, out):
    """As describe_setting, of a task of HEST-Benchmark, whose panel has `n_genes`: first the number
    that its published tables hold, over all test spots of a fold at once; `in slides` is the same
    slide by slide.
    """
    low = high = np.nan
    if (records["split"] == "test").all():
        low, high = np.quantile(join_draws(records, out)[:, -1], [0.025, 0.975])
    mean = format_mean(records.groupby(recipes.OF_HEST.unit)[recipes.OF_HEST.column].mean())
    defined = int(records["all_n"].min())
    line = {"setting": cut(records["setting"].iloc[0], 32)}
    line[recipes.OF_HEST.name] = f"{mean}/{defined}" if defined < n_genes else mean
    line["[95 %]"] = format_interval(low, high)
    mean, ceiling = records[recipes.OF_HEST.column].mean(), records[recipes.OF_HEST.ceiling].mean()
    line["of ceiling"] = format_share(mean, ceiling)
    line["in slides"] = format_mean(records.groupby(recipes.OF_HEST.unit)["all"].mean())
    line["r>=.30"] = f"{records['n_genes_r30'].mean():.0f}"
    line["steps"] = describe_mean_steps(records)
    return line


def describe_differences(table, settings, headline=recipes.HEG):
    """The column that tells the headline of each setting minus another's; the name of the other
    stands in the head where it is the same for all.
    """
    of = table[table["group"] == headline.group].set_index("setting")
    others = of["minus"].unique()
    texts = []
    for setting in settings:
        if setting not in of.index:
            texts.append("")
            continue
        difference, low, high, other = of.loc[setting, ["difference", "low", "high", "minus"]]
        if np.isnan(difference):
            texts.append("-")
            continue
        text = f"{difference:+.3f} {format_interval(low, high, '{:+.3f}')}"
        texts.append(text if len(others) == 1 else f"{text} {other}")
    name = f"{headline.name} minus"
    if len(others) == 1:
        name = f"{name} {others[0]}"
    return justify_left(pd.Series(texts, name=name))


def describe_scored(records):
    """Which spots and which truth a table of scores is about."""
    slides = records["slide"].unique()
    roles = {"test": "test slide", "oof": "out of fold, slide", "valid": "validation, slide"}
    truths = {
        "lognorm": "log-normalised counts",
        "harmony": "Harmony's values",
        "log1p": "log1p of raw counts",
    }
    first = records.drop_duplicates(["slide", "fold"])
    n_spots = first.groupby("slide")["n_spots"].max().sum()
    n_trainings = len(records.drop_duplicates(["seed", "fold"]))
    slides = ",".join(slides)
    role = roles[records["split"].iloc[0]] + ("s" if "," in slides else "")
    where = f"{role} {slides} ({n_spots} spots)"
    trainings = "1 training" if n_trainings == 1 else f"{n_trainings} trainings"
    return f"{where}, {truths[records['truth'].iloc[0]]}, {trainings}"


def print_published(root):
    """Print five columns of the published numbers beside a data root, if there are any.

    Returns the whole table for the report, {caption: records}.
    """
    path = root / "published_results.csv"
    if not path.is_file():
        return {}
    published = pd.read_csv(path, dtype=str).fillna("-")
    widths = {"method": 30, "HEG50": 25, "HVG50": 5, "source": 26, "protocol": 26}
    columns = []
    for name, width in widths.items():
        texts = published[name].map(functools.partial(cut, width=width))
        columns.append(justify_left(texts))
    caption = "published, not computed here, other protocols"
    print_table(caption, pd.concat(columns, axis=1))
    return {caption: published.to_dict("records")}


# ------------------------------------------------------------------------------------------- report
def describe_machine(device):
    """What a number depends on, {name: value}."""
    models = [platform.processor(), platform.machine()]
    if Path("/proc/cpuinfo").exists():
        models = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()) + models
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "processor": models[0],
        "cores": os.cpu_count(),
        "GPU": torch.cuda.get_device_name(device) if device.type == "cuda" else "none used",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "system": platform.system(),
    }


def finish_run(script, *, out, data_root, label, rows, tables, recipe, warnings=()):
    """Save run.json, have script 27 make the report of it, and print the one JSON line that ends
    every output.

    `tables` {caption: records} and `warnings` are shown in the report; `recipe` names DEVICE and
    PRECISION.
    """
    if RANK:
        return
    name = Path(script["__file__"]).stem
    result = {"script": name, "data_root": str(data_root), "simulated": bool(label)}
    result |= {"out": str(out), "rows": rows}
    page = {"title": f"{label}{name}, {data_root}", "label": label, "tables": tables}
    page |= {"settings": shell.recipe_of(script), "warnings": list(warnings)}
    page["machine"] = describe_machine(common.choose_device(recipe)[0])
    shell.save_json(out / "run.json", page | result)
    try:
        shell.call_script("27_write_report.py", "--run", str(out))
    finally:
        print(json.dumps(result))


# ---------------------------------------------------------------------------------------------- run
@dataclass(frozen=True)
class Run:
    """One start of a script on one data root: its constants, its splits and the folder of its
    results.
    """

    script: dict  # the script's globals
    recipe: dict  # its constants as they stand
    splits: list  # one Split a training
    out: Path

    @property
    def data(self):
        """SpotData of the first training."""
        return self.splits[0].data

    @property
    def name(self):
        """The script's name."""
        return Path(self.script["__file__"]).stem

    def title(self, text):
        """A title that says whether the slides are simulated, and whether anything can be
        concluded.
        """
        note = ""
        if self.recipe["QUICK"] and not self.name.startswith("20"):
            note = "quick budget, no evidence: "
        return f"{self.data.label}{note}{text}"

    def chosen(self, settings):
        """The settings {name: ...}, or ONLY one of them. InputError where ONLY names another."""
        only = self.recipe["ONLY"]
        if only not in ("", *settings):
            raise InputError(f"--only {only}: expected one of {'; '.join(settings)}")
        return {name: setting for name, setting in settings.items() if only in ("", name)}

    def print_header(self):
        """What is run on what: data, target, protocol, split, gene groups, machine and weights."""
        print(f"\n{self.data.label}{self.name}")
        for name, value in describe_run(self.recipe, self.splits).items():
            line = f"{name:11} {value}"
            print(textwrap.fill(line, WIDTH, subsequent_indent=" " * 12, **WHOLE_WORDS))

    @property
    def baseline(self):
        """The constants on which a method without network depends; the others stay out of it."""
        names = ("TARGET", "PROTOCOL", "DEVICE", "PRECISION", "REFIT")
        return {name: self.recipe[name] for name in names} | {"PRETRAINED": False}

    def compute(self, setting, recipe, split, compute):
        """The records of one setting on one split: see compute_records."""
        return compute_records(self.out, setting, recipe, split, compute)

    def train(self, settings, adapt=None):
        """The records of each setting {name: {CONSTANT: value}} and split, by train_network with
        `adapt`.

        Of torchrun's processes each computes every so many-th training, and then collects the
        others'.
        """
        tasks = []
        for name, changed in settings.items():
            tasks += [(name, self.recipe | changed, split) for split in self.splits]
        own_first = sorted(range(len(tasks)), key=lambda number: number % RANKS != RANK)
        epochs = sum(recipe["EPOCHS"] for _, recipe, _ in tasks)
        records = {}
        with tqdm(total=epochs, unit="epoch", smoothing=0, mininterval=2, disable=RANK > 0) as bar:
            train = functools.partial(train_network, adapt=adapt, report=lambda *_: bar.update())
            for number in own_first:
                name, recipe, split = tasks[number]
                bar.set_description(f"{number + 1}/{len(tasks)} {name}")
                before = bar.n
                rank = number % RANKS
                records[number] = compute_records(self.out, name, recipe, split, train, rank)
                # Epochs that were on disk, or are another process's, are no work to wait for.
                bar.total -= recipe["EPOCHS"] - (bar.n - before)
        return list(itertools.chain(*(records[number] for number in sorted(records))))

    def print_scores(
        self, title, records, *, minus=None, add=None, leave_out=(), role="test", truth=None
    ):
        """Print a line a setting: mean r (±sd over seeds, folds or slides), intervals over blocks.

        pair_differences with `minus` {setting: another} is saved, and its headline shown.
        add(records of a setting) may give further columns {name: text}, for which others are to
        `leave_out`.
        """
        chosen = select_records(records, role, truth)
        sizes = group_sizes(self.splits[0])
        headline = headline_of(chosen)
        if headline is recipes.OF_HEST:
            title = f"{title} (HEST r is the number of HEST-Benchmark's tables)"
        lines = []
        for _, of in chosen.groupby("setting", sort=False):
            if headline is recipes.OF_HEST:
                line = describe_hest(of, len(self.data.genes), self.out)
            else:
                line = describe_setting(of, sizes, self.out)
            for name in leave_out:
                line.pop(name, None)
            if add:
                line |= add(of)
            lines.append(line)
        table = pd.DataFrame(lines)
        columns = [justify_left(table.pop("setting")), table]
        if minus:
            differences = pair_differences(records, self.out, minus)
            shell.save_csv(self.out / "paired_differences.csv", differences)
            settings = chosen["setting"].unique()
            columns.append(describe_differences(differences, settings, headline))
        table = pd.concat(columns, axis=1)
        print_table(self.title(f"{title}: {describe_scored(chosen)} ({self.data.root})"), table)

    def finish(self, records, tables=None):
        """Save run.json, have the report made of it, and print the JSON line that comes last."""
        finish_run(
            self.script,
            out=self.out,
            data_root=self.data.root,
            label=self.data.label,
            rows=records,
            tables=tables or {},
            recipe=self.recipe,
            warnings=self.data.meta.get("warnings", []),
        )


PROTOCOLS = {
    "paper": "spots of the training slides validate, as published",
    "loso": "every slide once the test slide, of which nothing else is used",
    "block": f"{common.FOLDS} folds of spatial blocks, then the test slide, of which nothing else "
    "is used",
    "hest": "folds and genes of HEST-Benchmark, which has no validation: random spots of the "
    "training slides are held out for it; the genes were chosen on all slides, so transductive",
}
TARGETS = {
    "harmony": "Harmony over the slides that take part, the test slide included; so is the panel",
    "lognorm": "log1p of counts per 10,000",
    "log1p": "log1p of raw counts, as in HEST-Benchmark",
}


def describe_run(recipe, splits):
    """{name: text} of the header's lines."""
    split = splits[0]
    data = split.data
    slides = data.spots["tissue_index"].nunique()
    n_spots, n_genes = data.annotations.shape
    protocol = PROTOCOLS[recipe["PROTOCOL"]]
    if recipe["PROTOCOL"] == "loso":
        one_donor = data.spots["donor"].nunique() == 1
        protocol += (
            "; one donor alone, who is not left out" if one_donor else "; its donor is left out"
        )
    groups = split.groups.attrs["source"]
    missing = sorted(set(split.groups["gene"]) - set(data.genes))
    if missing:
        groups += f"; not in the panel: {', '.join(missing)}"
    roles = describe_split(split, len(splits))
    if is_refitted(recipe, split):
        roles += "; test is predicted after learning again from train and valid (REFIT)"
    device, dtype, reason = common.choose_device(recipe)
    where = f"{torch.get_num_threads()} threads, {shell.describe_waiting()}"
    if device.type == "cuda":
        where = torch.cuda.get_device_name()
    return {
        "data": f"{data.root}: {slides} slides, {n_spots:,} spots x {n_genes:,} genes",
        "target": f"{recipe['TARGET']} ({TARGETS[recipe['TARGET']]})",
        "protocol": f"{recipe['PROTOCOL']} ({protocol})",
        "split": roles,
        **({"steps": describe_steps(recipe, split)} if "EPOCHS" in recipe else {}),
        "gene groups": groups,
        "device": f"{device.type} ({where}), {str(dtype).removeprefix('torch.')} ({reason})",
        "weights": describe_weights(recipe),
    }


def describe_steps(recipe, split):
    """How many steps the optimiser takes, by the constants of the script."""
    spots = len(split.spots("train"))
    batches = len(common.split_batches(spots, recipe))
    steps = common.count_steps(spots, recipe)
    return f"{recipe['EPOCHS']} epochs x {batches} batches of {recipe['BATCH_SIZE']} = {steps:,}"


def describe_weights(recipe):
    """The header's line of what networks start from."""
    if recipe["PRETRAINED"] is True:
        return "pretrained (timm's hub)"
    if recipe["PRETRAINED"] is False:
        return "random: no pretraining"
    if "BACKBONE" not in recipe:
        return f"from {recipe['PRETRAINED']}"
    return f"{weight_files.find_weights(recipe['PRETRAINED'], recipe['BACKBONE'])}"


def describe_split(split, n_trainings):
    """How many spots of which slides have which role, in the first of the trainings."""
    parts = []
    for role in common.ROLES:
        if role in split.roles:
            slides = ",".join(map(str, split.slides(role)))
            parts.append(f"{role} {len(split.spots(role))} spots of slides {slides}")
    if n_trainings > 1:
        parts.append(f"the first of {n_trainings} trainings")
    return "; ".join(parts)


def choose_out(script, root):
    """runs/<script>/<data root's name>. InputError where another data root of that name has its
    results there.
    """
    out = Path("runs", Path(script["__file__"]).stem, root.resolve().name)
    try:
        other = Path(json.loads((out / "run.json").read_text())["data_root"])
    except (OSError, ValueError, LookupError, TypeError):
        return out
    if other.exists() and other.resolve() != root.resolve():
        raise InputError(f"{out} holds the results of {other}: give another folder with --out")
    return out


def check_target(protocol, target):
    """InputError where a protocol does not go with a target."""
    if protocol == "hest" and target != "log1p":
        raise InputError(
            "--protocol hest needs --target log1p: HEST-Benchmark predicts log1p of raw counts"
        )
    if protocol != "hest" and target == "log1p":
        raise InputError(
            f"--target log1p goes with --protocol hest alone, and not with {protocol}: use "
            "--target lognorm"
        )
    if protocol in ("loso", "block") and target != "lognorm":
        raise InputError(
            f"--protocol {protocol} needs --target lognorm: Harmony has seen the test slide"
        )


def open_run(script, split=common.split_spots):
    """The Run of a script's constants; `--quick` has its slides made where they are missing.

    split(spots, recipe, seed) gives the roles of every training.
    """
    shell.check_constants(script, NAMED_IN_COMMON)
    recipe = shell.recipe_of(script)
    if not recipe["SEEDS"]:
        raise InputError("--seeds: expected one number at least")
    check_target(recipe["PROTOCOL"], recipe["TARGET"])
    root = Path(recipe["DATA_ROOT"])
    if recipe["QUICK"] and recipe["DATA_ROOT"] == script["QUICK_BUDGET"]["DATA_ROOT"]:
        make_simulated_slides(root, recipe["TARGET"])
    data = common.load_dataset(root, recipe["TARGET"])
    slides.check_sources(root, data.meta)
    splits = []
    for seed in recipe["SEEDS"]:
        for fold, roles in enumerate(split(data.spots, recipe, seed)):
            splits.append(make_split(data, roles, recipe, seed, fold))
    out = Path(recipe["OUT"] or choose_out(script, root))
    shell.hold_folder(out)
    return Run(script, recipe, splits, out)
