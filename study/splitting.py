"""Which spots do what in a training, and which panel and gene groups follow."""

import functools
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

import common
from common import GROUPS, SCORED
from study import backbones, hashes, panels
from study.errors import InputError


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
        genes = self.data.genes
        inside = self.groups[self.groups["gene"].isin(genes)]
        members = {
            group.lower(): inside["gene"][inside["group"] == group].tolist() for group in GROUPS
        }
        return members | {"all": genes}

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
        trains = np.isin(slides, self.slides("train", "valid")) & (self.roles != "test")
        return replace(self, roles=np.where(trains, "train", self.roles))

    def slides(self, *roles):
        """tissue_index values of the slides of these spots, in order."""
        return np.unique(self.data.spots["tissue_index"].to_numpy()[self.spots(*roles)])

    def validate_genes(self, predicted, truth):
        """(G,) r of the prediction (n, G) of the validation spots with their truth, or NaN."""
        valid = self.spots("valid")
        if not len(valid):
            return np.full(len(self.data.genes), np.nan)
        slides = self.data.spots["tissue_index"].to_numpy()[valid]
        return common.average_slides(common.pearson_per_gene, predicted, truth[valid], slides)

    def mean_heg(self, predicted):
        """Mean over HEG of r of the prediction (n, G) of the validation spots."""
        r = self.validate_genes(predicted, self.data.target)
        return float(pd.Series(r, self.data.genes)[self.members["heg"]].mean())

    def made_with(self, recipe):
        """{name: value} of all that a row of this split follows from."""
        # Where it lies, and what the hash of the roles below stands for, takes no part.
        elsewhere = ("OUT", "QUICK", "DATA_ROOT", "SEEDS", "ONLY", "COMPARE_TARGETS", "GENE_SETS")
        elsewhere += ("TRAIN_SLIDES", "TEST_SLIDE", "VALID_FRACTION")
        made_with = {name: value for name, value in recipe.items() if name not in elsewhere}
        if isinstance(recipe["PRETRAINED"], str):
            # The files' content counts, not where they lie.
            files = {}
            for name in ("BACKBONE", "FEATURES"):
                if recipe.get(name):
                    path = backbones.find_pretrained(recipe["PRETRAINED"], recipe[name])
                    files[recipe[name]] = f"{path.name} {hashes.identify_file(path)}"
            made_with["PRETRAINED"] = files
        if "LOSS" in recipe:
            made_with["LOSS"] = common.describe_loss(recipe["LOSS"])
        if "AUG" in recipe:
            made_with["augmentation"] = common.describe_augmentation(recipe["AUG"])
        if recipe.get("NEIGHBOURHOOD"):
            made_with["neighbourhood_pitches"] = common.BLEND_SD
        device, dtype, _ = common.choose_device(recipe)
        made_with["DEVICE"] = device.type
        made_with["PRECISION"] = str(dtype).removeprefix("torch.")
        made_with |= {"seed": self.seed, "fold": self.fold, "data": self.data.fingerprint}
        made_with["results"] = common.RESULTS
        made_with["split"] = hashlib.sha256(self.roles.tobytes()).hexdigest()
        made_with["harmonised"] = self.data.harmonised
        genes = json.dumps([self.groups.values.tolist(), self.data.genes])
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
        data = panels.take_part(data, tuple(np.unique(slides[roles != ""]).tolist()))
    else:
        data = panels.restrict_panel(data, tuple(np.unique(slides[train]).tolist()))
    published = recipe["TARGET"] == "harmony" and recipe["PROTOCOL"] == "paper"
    groups = panels.choose_gene_groups(data, train, published)
    return Split(data, roles, groups, seed, fold)


def is_refitted(recipe, split):
    """Whether REFIT applies: there are validation spots to add and a test slide to predict."""
    return recipe["REFIT"] and {"valid", "test"} <= {*split.roles}


def final_split(recipe, split):
    """The split that the saved weights have learnt from: with REFIT validation spots train too."""
    return split.with_all_in_training() if is_refitted(recipe, split) else split


def keep_validation_of(first, second, split):
    """(n, G): validation spots' lines of `first`, and all others of `second`, which lacks them."""
    merged = first.copy()
    merged[split.roles[split.scored()] != "valid"] = second
    return merged


# ------------------------------------------------------------------------------------------- roles
def split_spots(spots, recipe, seed):
    """The trainings of PROTOCOL: for each an array (N,) of ROLES, "" for a spot that takes no part.

    paper: VALID_FRACTION of the training slides' spots validate. block: a fifth of their blocks in
    turn. Both test on TEST_SLIDE. loso: every slide (of TRAIN_SLIDES, if any) is once the test
    slide. hest: the folds of the task of HEST-Benchmark in DATA_ROOT.
    """
    slides = spots["tissue_index"].to_numpy()
    if recipe["PROTOCOL"] == "hest":
        folds = read_task_folds(Path(recipe["DATA_ROOT"]))
        return split_task(slides, folds, recipe["VALID_FRACTION"], seed)
    if recipe["PROTOCOL"] == "loso":
        return split_slides(spots, choose_train_slides(slides, recipe, ()))
    test = recipe["TEST_SLIDE"]
    pool = np.flatnonzero(np.isin(slides, choose_train_slides(slides, recipe, (test,))))
    if recipe["PROTOCOL"] == "block":
        trainings = split_folds(spots, pool, "block", common.FOLDS, seed)
    else:
        trainings = [split_random(len(spots), pool, recipe["VALID_FRACTION"], seed)]
    for roles in trainings:
        roles[slides == test] = "test"
    return trainings


def split_off_test(spots, recipe, seed):
    """As split_spots, but the training slides' spots all train; under block as under paper."""
    outer = "loso" if recipe["PROTOCOL"] == "loso" else "paper"
    trainings = split_spots(spots, recipe | {"PROTOCOL": outer, "VALID_FRACTION": 0.5}, seed)
    return [np.where(roles == "valid", "train", roles) for roles in trainings]


def choose_train_slides(slides, recipe, test):
    """TRAIN_SLIDES, or all but those of `test`. InputError where one is missing or in both."""
    train = recipe["TRAIN_SLIDES"] or tuple(np.setdiff1d(slides, test))
    for slide in (*train, *test):
        if slide not in slides:
            held = np.unique(slides)
            raise InputError(f"slide {slide} is not in the dataset: it holds slides {held}")
        if slide in train and slide in test:
            raise InputError(
                f"slide {slide} is both in TRAIN_SLIDES and TEST_SLIDE: choose another one"
            )
    return train


def split_random(n, pool, valid_fraction, seed):
    """Roles (n,): of the spot numbers `pool`, a random share is "valid" and the rest "train"."""
    n_valid = round(valid_fraction * len(pool))
    if not 0 < n_valid < len(pool) - 1:
        raise InputError(
            f"--valid-fraction {valid_fraction} of {len(pool)} spots leaves validation or training "
            "none"
        )
    order = np.random.default_rng(hashes.seed_of(seed, "split")).permutation(pool)
    return assign_roles(n, train=order[n_valid:], valid=order[:n_valid])


def assign_roles(n, **spots_of):
    """Roles (n,) of {role: its spots, as numbers or as bool (n,)}; of two roles the later holds."""
    roles = np.full(n, "", "U5")
    for role, spots in spots_of.items():
        roles[spots] = role
    return roles


def split_slides(spots, slides):
    """One array (N,) of roles for each of `slides`, which is the test slide; the next one
    validates.

    All slides of the test slide's donor are left out, unless there is no other donor. Of three
    donors or more, all slides of the validation slide's donor validate, so that the epoch is chosen
    on a person who does not train.
    """
    slide_of = spots["tissue_index"].to_numpy()
    donors = {slide: set(spots["donor"][slide_of == slide]) for slide in slides}
    trainings = []
    for test in sorted(slides):
        others = [slide for slide in slides if donors[slide] != donors[test]]
        if not others:
            others = [slide for slide in slides if slide != test]
        if len(others) < 2:
            raise InputError(
                f"--protocol loso: slide {test} has {len(others)} slides to learn from; "
                "two are needed"
            )
        after = [slide for slide in others if slide > test]
        valid = [min(after or others)]
        same_donor = [slide for slide in others if donors[slide] == donors[valid[0]]]
        if len(same_donor) < len(others):
            valid = same_donor
        train, valid = np.isin(slide_of, others), np.isin(slide_of, valid)
        roles = assign_roles(len(spots), train=train, valid=valid, test=slide_of == test)
        trainings.append(roles)
    return trainings


def read_task_folds(root):
    """Table fold, role (train or test), tissue_index of a data root; InputError without one."""
    path = root / common.TASK_FOLDS
    command = f"python 19_make_patches_and_csv.py --data-root {root} --from-hest FOLDER_OF_A_TASK"
    if not path.is_file():
        raise InputError(
            f"no {path}: --protocol hest is for a task of HEST-Benchmark: run {command} first"
        )
    table = pd.read_csv(path)
    if not {"fold", "role", "tissue_index"} <= set(table):
        raise InputError(f"{path}: expected the columns fold, role, tissue_index: run {command}")
    return table


def split_task(slides, folds, valid_fraction, seed):
    """One array (N,) of roles for each fold of the table `folds`, of (N,) tissue_index `slides`.

    The benchmark has no validation: a random share of the training slides' spots is held out for
    it, and a fold's test slides take no part in that.
    """
    trainings = []
    for _, fold in folds.groupby("fold"):
        slides_of = fold.groupby("role")["tissue_index"].apply(list)
        pool = np.flatnonzero(np.isin(slides, slides_of["train"]))
        roles = split_random(len(slides), pool, valid_fraction, seed)
        roles[np.isin(slides, slides_of["test"])] = "test"
        trainings.append(roles)
    return trainings


def split_folds(spots, pool, protocol, folds, seed):
    """`folds` arrays (N,) of roles: of the spot numbers `pool`, another share is "valid" each time,
    the rest "train".

    paper draws spots; block draws blocks and leaves out what lies within MARGIN of "valid". loso
    takes each donor in turn or, of one donor, each slide, however many `folds` are asked for.
    """
    fold_of = assign_folds(spots.iloc[pool], protocol, folds, seed)
    if protocol == "loso":
        folds = fold_of.max() + 1
    trainings = []
    for fold in range(folds):
        valid = pool[fold_of == fold]
        train = pool[fold_of != fold]
        if protocol == "block" and len(valid):
            pitches = common.pitches_to_nearest(spots.iloc[train], spots.iloc[valid])
            train = train[pitches > common.MARGIN + 0.1]  # A grid in whole px is not exact.
        if len(valid) == 0 or len(train) < 2:
            raise InputError(
                f"fold {fold} of {folds}: {len(pool)} spots are too few for so many folds"
            )
        trainings.append(assign_roles(len(spots), train=train, valid=valid))
    return trainings


def assign_folds(spots, protocol, folds, seed):
    """(n,) fold in which each of these spots validates; units that belong together stay so."""
    if protocol == "loso":
        apart = "donor" if spots["donor"].nunique() > 1 else "tissue_index"
        return pd.factorize(spots[apart])[0]
    column = {"paper": "id", "block": "block"}[protocol]
    units = pd.factorize(spots[column], sort=protocol == "block")[0]
    sizes = np.bincount(units)
    order = np.random.default_rng(hashes.seed_of(seed, "folds")).permutation(len(sizes))
    drawn_before = np.empty(len(sizes), np.int64)
    drawn_before[order] = np.cumsum(sizes[order]) - sizes[order]
    return drawn_before[units] * folds // len(spots)
