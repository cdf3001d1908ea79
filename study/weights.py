"""weights.safetensors of a row: written, read again, and which of a run's is taken for a slide.

Shapes: n spots, N spots of a data root, G genes.
"""

import functools
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

import common
from slides import inputs
from slides.manifest import name_file
from slides.sections import split_part
from study import conformal, embeddings, evidence, files, hashes, ridges, similarity, splitting
from study.errors import InputError
from study.recipes import headline_of

# What a recipe must say of a network, and of a ridge on embeddings.
NETWORK = {"BACKBONE", "HIDDEN", "TRAINABLE_STAGES", "IMAGE_SIZE", "TTA", "TARGET", "REFIT"}
RIDGE = {"BACKBONE", "WIDTH", "TARGET", "REFIT"}
CHOSEN = "chosen by search"  # the setting of script 22's rows of its choice
TRAIN_AGAIN = "train it again with this version"
LEARNT = {"train": "trained", "valid": "validated"}  # roles of spots that a model has learnt from
UNKNOWN = "unknown"  # the role where the run or its data root is not there, or has changed since


# ------------------------------------------------------------------------------------- what is kept
@dataclass
class Trained:
    """What the metadata of weights.safetensors say: how to build the model and make patches, what
    validation says of each gene, and how far to trust a prediction. Lists are in the order of the
    genes.
    """

    recipe: dict  # constants of the script that trained the model
    genes: list
    um_per_px: float  # of the patches
    patch_size: int  # px
    groups: dict  # names of genes by "heg", "hvg", "mg"
    valid_r: list  # r in validation, against the headline's truth; None where unknown
    ceiling: list  # the counting-noise ceiling on the training slides; None where unknown
    title: str  # "SIMULATED slides: " or nothing
    training_slides: similarity.TrainingSlides
    half_width_80: list  # of the intervals; None where the validation spots are few
    half_width_95: list
    evidence: dict | None  # of evidence.describe_validation; None of a fold of a search
    gene_ids: list
    pitch_um: float | None = None  # of the spots that validate; older weights do not tell it

    @property
    def candidates(self):
        """Names of HEG and HVG in the panel; of all genes where there are none.

        The best of all genes in validation would be those that chance favoured.
        """
        return [*self.groups.get("heg", []), *self.groups.get("hvg", [])] or self.genes

    @functools.cached_property
    def judged(self):
        """Table of what validation says of each gene, see evidence.judge_genes, or None."""
        return evidence.read_genes(self.evidence, self.genes)

    @property
    def half_widths(self):
        """{name of a level: (G,), NaN where unknown} of conformal.LEVELS."""
        found = {"80": self.half_width_80, "95": self.half_width_95}
        return {name: np.array(half, np.float64) for name, half in found.items()}


# ------------------------------------------------------------------------------------------ written
def save_weights(path, model, split, made_with, predicted):
    """Write the weights of a network, or the coefficients of a Ridge on embeddings, with all that
    script 26 needs, as metadata: describe_model, and the version of the format.
    """
    trained = describe_model(split, made_with, predicted)
    metadata = {"format": common.FORMAT} | asdict(trained)
    if isinstance(model, ridges.Ridge):
        state = {"weight": torch.from_numpy(model.weight), "bias": torch.from_numpy(model.bias)}
    else:
        state = model.state_dict()
    state = {name: value.contiguous() for name, value in state.items()}
    texts = {name: json.dumps(value) for name, value in metadata.items()}
    with files.whole_file(path) as partial:
        partial.write_bytes(safetensors.torch.save(state, texts))


def describe_model(split, made_with, predicted):
    """Trained, of the model that a recipe `made_with` gave on a split, and of its prediction (n, G)
    of split.scored().
    """
    data = split.data
    of_valid = predicted[split.roles[split.scored()] == "valid"]
    learnt = splitting.final_split(made_with, split).spots("train")
    colour = data.annotations.obsm["colour"][learnt]
    ceilings = data.annotations.var.reindex(
        columns=[f"ceiling_{slide}" for slide in split.slides("train")]
    )
    truth = data.target
    if headline_of(made_with["PROTOCOL"]).truth == "lognorm":
        truth = data.lognorm
    half_widths = conformal.find_half_widths(split, predicted, truth)
    described = None
    if "test" in split.roles:  # The folds of a search are many, and draw no one's maps.
        described = evidence.describe_validation(split, of_valid, truth)
    return Trained(
        recipe=made_with,
        genes=data.genes,
        gene_ids=data.annotations.var["gene_ids"].astype(str).tolist(),
        um_per_px=find_patch_resolution(split),
        patch_size=common.PATCH_SIZE,
        groups={key: genes for key, genes in split.members.items() if key != "all"},
        valid_r=files.without_nan(split.validate_genes(of_valid, truth)),
        ceiling=files.without_nan(ceilings.mean(axis=1)),
        title=data.label,
        training_slides=similarity.describe_training(colour, data.spots.iloc[learnt]),
        half_width_80=files.without_nan(half_widths["80"]),
        half_width_95=files.without_nan(half_widths["95"]),
        evidence=described,
        pitch_um=find_pitch(split),
    )


def find_patch_resolution(split):
    """um/px of the patches of the slides of training and validation: of two the coarser, since no
    slide has what lies between them.
    """
    names, of_slide = split.data.slide_names, split.data.meta["um_per_px"]
    found = [of_slide[names[number]] for number in split.slides("train", "valid")]
    return float(np.quantile(found, 0.5, method="higher"))


def find_pitch(split):
    """um from spot to spot on the slides that validate or, where none does, train: the median."""
    roles = "valid" if len(split.spots("valid")) else "train"
    pitches = split.data.spots.groupby("tissue_index")["pitch"].first()
    um_per_px = {slide["tissue_index"]: slide["um_per_px"] for slide in split.data.meta["slides"]}
    return float(np.median([pitches[slide] * um_per_px[slide] for slide in split.slides(roles)]))


# --------------------------------------------------------------------------------------------- read
def read_weights(path):
    """(model, Trained) of weights.safetensors, or of the folder that holds it; the model is a
    network, or the Ridge of a recipe on embeddings.

    InputError for a file of another kind or version, and for a model that takes other input.
    """
    path = path / "weights.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"--weights {path}: no such file; expected weights.safetensors of a run")
    try:
        with safetensors.safe_open(path, "pt") as file:
            texts = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = {name: json.loads(text) for name, text in texts.items()}
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise InputError(f"{path}: not a .safetensors file of a run ({error})") from None
    trained = check_metadata(path, metadata)
    try:
        if embeddings.is_ridge(trained.recipe):
            return embeddings.build_ridge(state, trained.recipe, len(trained.genes)), trained
        recipe = trained.recipe | {"PRETRAINED": False}
        model = common.build_model(recipe, len(trained.genes), 0)
        model.load_state_dict(state)
    except (RuntimeError, KeyError, TypeError, ValueError):
        raise InputError(
            f"{path}: not the network of its metadata: one of an older version must be "
            f"trained again, and one that takes a cluster id or retrieves spots, as 24's and 25's "
            "do, cannot be used here"
        ) from None
    return model, trained


def check_metadata(path, metadata):
    """Trained, of the metadata by name; InputError where they are not of this version."""
    version = metadata.get("format")
    if version != common.FORMAT:
        raise InputError(
            f"{path}: format {version}, and this version reads {common.FORMAT}: {TRAIN_AGAIN}"
        )
    names = [field.name for field in fields(Trained)]
    metadata = {"pitch_um": None} | metadata
    for name in names:
        if name not in metadata:
            raise InputError(f"{path}: its metadata lack {name!r}: {TRAIN_AGAIN}")
    trained = Trained(**{name: metadata[name] for name in names})
    if trained.patch_size != common.PATCH_SIZE:
        raise InputError(
            f"{path}: patches of {trained.patch_size} px; expected {common.PATCH_SIZE}: "
            f"{TRAIN_AGAIN}"
        )
    needed = RIDGE if embeddings.is_ridge(trained.recipe) else NETWORK
    if not isinstance(trained.recipe, dict) or not trained.recipe.keys() >= needed:
        raise InputError(
            f"{path}: its recipe lacks one of {', '.join(sorted(needed))}: {TRAIN_AGAIN}"
        )
    trained.recipe = {"NEIGHBOURHOOD": False} | trained.recipe  # Older weights do not tell it.
    try:
        trained.training_slides = similarity.TrainingSlides(**trained.training_slides)
        evidence.read_genes(trained.evidence, trained.genes)
    except (KeyError, ValueError, TypeError):
        raise InputError(
            f"{path}: its training_slides or evidence are of another version: {TRAIN_AGAIN}"
        ) from None
    return trained


# --------------------------------------------------------------------------------- which of a run's
def choose_model(run, slide, takes_embeddings):
    """The folder of the row of a run's last start whose model has the highest validation r of HEG:
    of its networks or, where it `takes_embeddings`, of its ridges on embeddings.

    Of a search by script 22 they are its choices, which no spot validates.

    Of a manifest.Slide those that have not learnt from it come first, then those of which that is
    not known, and a warning says which it is. The test slide chooses nothing.
    """
    path = run / "rows.csv"
    if not path.is_file():
        raise InputError(f"--run {run}: no rows.csv there: is it the folder of a run?")
    texts = ("folder", "setting", "split", "truth", "protocol")
    table = files.read_csv(path, texts=texts, numbers=("heg",))
    facts = read_facts(run)
    if facts:
        # The rows of its last start, which its report shows: what one protocol says in validation
        # is not to be compared with what another says.
        table = table[table["folder"].isin(facts.get("folders", []))]
    ranked = table[table["setting"] == CHOSEN].drop_duplicates("folder")
    if ranked.empty:  # No search, which has judged by folds and trained its choice.
        truth = [headline_of(protocol).truth for protocol in table["protocol"]]
        ranked = table[(table["split"] == "valid") & (table["truth"] == truth)]
        ranked = ranked.dropna(subset="heg").sort_values("heg", kind="stable")
    ranked = keep_fitting(run, ranked, takes_embeddings)
    found = find_in_run(run, slide)
    roles = [find_role(run / folder, found) for folder in ranked["folder"]]
    unseen = [number for number, role in enumerate(roles) if role not in (*LEARNT, UNKNOWN)]
    unknown = [number for number, role in enumerate(roles) if role == UNKNOWN]
    number = (unseen or unknown or range(len(roles)))[-1]  # The last has the highest r.
    warn_of_role(slide.image, roles[number])
    chosen = ranked.iloc[number]
    known = "not validated"
    if chosen["setting"] != CHOSEN:
        known = f"HEG r {chosen['heg']:.3f} in validation"
    print(f"{chosen['setting']}: {chosen['folder']}, {known}")
    return run / chosen["folder"]


def read_facts(run):
    """What run.json tells of a run; {} without one. InputError where it is damaged."""
    path = run / "run.json"
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text())
        if facts.keys() >= {"script", "data_root", "folders"}:
            return facts
    except (OSError, ValueError, AttributeError):
        pass
    raise InputError(f"{path}: not as a script wrote it: remove it and run its script again")


def find_in_run(run, slide):
    """({tissue_index of a slide}, fingerprint) of the data root of a run: of the slides that have
    the image of this manifest.Slide or, where none has, its counts, or else its positions. None
    where the run or its data root is not there.
    """
    facts = read_facts(run)
    root = Path(run, facts["data_root"]).resolve() if facts else None
    path = root / "dataset" / "meta.json" if facts else run / "run.json"
    if not path.is_file():
        print(f"no {path}: so it is not known whether the model has learnt from this slide")
        return None
    content = path.read_bytes()
    numbers = set()
    for column in ("image", "matrix", "positions"):
        given = identify_part(getattr(slide, column))
        for listed in json.loads(content)["slides"] if given else ():
            if given & identify_listed(root, listed, column):
                numbers.add(listed["tissue_index"])
        if column == "positions" and len(numbers) > 1:
            numbers = set()  # Grids of one layout may be all alike.
        if numbers:
            break
    return numbers, hashes.fingerprint_of(content)


def identify_part(path):
    """{(bytes, hash of blocks, section)} of a slide's file, as it is and unpacked; of a 10x folder
    the counts, since slides share lists of genes and barcodes. Empty for None.
    """
    if path is None:
        return set()
    file, section = split_part(path)
    parts = [*file.glob("*matrix.mtx*")] if file.is_dir() else [file]
    parts = {*parts, *map(inputs.unpack, parts)}
    return {(part.stat().st_size, hashes.hash_blocks(part), section) for part in parts}


def identify_listed(root, listed, column):
    """As identify_part, of a file of a slide that meta.json lists, which may be gone."""
    if not listed[column]:
        return set()
    path, section = split_part(root / listed[column])
    name, found = name_file(root, path), set()
    for file, described in listed["files"].items():
        if file == name or (file.startswith(f"{name}/") and "matrix.mtx" in file):
            found.add((described["bytes"], described["blocks"], section))
            if file.endswith(".gz") and (root / file).is_file():
                unpacked = identify_part(root / file)
                found |= {(size, blocks, section) for size, blocks, _ in unpacked}
    return found


def find_role(folder, found):
    """What the spots of the slides `found`, as find_in_run gives them, did for the model in a row's
    folder: "train" or "valid" if any did, else "test" or None. UNKNOWN where that cannot be known,
    as of a row that was made before script 19 changed the data root.
    """
    if found is None or not (folder / "split.csv").is_file():
        return UNKNOWN
    numbers, fingerprint = found
    if json.loads((folder / "recipe.json").read_text())["data"] != fingerprint:
        return UNKNOWN
    table = files.read_csv(folder / "split.csv", ("id", "role"))
    starts = tuple(f"{number}_" for number in numbers)
    roles = {*table["role"][table["id"].str.startswith(starts)]}
    return next((role for role in (*LEARNT, "test") if role in roles), None)


def warn_of_role(image, role):
    """Warn of a model that has learnt from the slide that it predicts, or may have."""
    if role in LEARNT:
        inputs.warn(f"{image}: this slide {LEARNT[role]} the model: its r here is no test")
    elif role == UNKNOWN:
        inputs.warn(
            f"{image}: it is not known whether the model has learnt from this slide, since its run "
            "or data root is not there or has changed: run its script again to know"
        )


def keep_fitting(run, judged, takes_embeddings):
    """The rows of a table of a run whose model takes embeddings, or pixels.

    InputError where there is none, or where they have learnt from several models' embeddings.
    """
    recipes = [read_recipe(run / folder / "weights.safetensors") for folder in judged["folder"]]
    fits = [
        recipe is not None and embeddings.is_ridge(recipe) == takes_embeddings for recipe in recipes
    ]
    if not any(fits):
        kind = "network with a validation r (a ridge on embeddings needs --features)"
        if takes_embeddings:
            kind = "ridge on embeddings with a validation r, which --features are for"
        raise InputError(
            f"--run {run}: its last start made no {kind}: give --weights, a row's folder there, or "
            "run its script again"
        )
    names = {recipe["BACKBONE"] for recipe in recipes if embeddings.is_ridge(recipe)}
    if takes_embeddings and len(names) > 1:
        raise InputError(
            f"--run {run}: has learnt from embeddings of {', '.join(sorted(names))}: give "
            "--weights, a row's folder of the model that made --features"
        )
    return judged[fits]


def read_recipe(path):
    """The recipe in weights.safetensors; None without a file. {} of one that read_weights refuses,
    and says why.
    """
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            return dict(json.loads(file.metadata()["recipe"]))
    except (safetensors.SafetensorError, ValueError, LookupError, TypeError, OSError):
        return {}
