"""timm's backbones, with pretrained weights from its hub, a file or a folder."""

import itertools
import json
from pathlib import Path

from study.errors import InputError

WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin")


def build_backbone(recipe):
    """timm's BACKBONE without a classifier, its weights as PRETRAINED says."""
    import timm

    name, pretrained = recipe["BACKBONE"], recipe["PRETRAINED"]
    path = find_pretrained(pretrained, name)
    from_hub = pretrained is True
    if from_hub:
        check_hub()
    depth = recipe["STOCHASTIC_DEPTH"]
    options = {}
    try:
        usual = timm.get_pretrained_cfg(name, allow_unregistered=True)
        is_fixed = usual is not None and usual.fixed_input_size
        if is_fixed and usual.input_size[1] != recipe["IMAGE_SIZE"]:
            options["img_size"] = recipe["IMAGE_SIZE"]
        if depth:
            options["drop_path_rate"] = depth
        backbone = timm.create_model(name, pretrained=from_hub, num_classes=0, **options)
    except TypeError as error:
        if "drop_path_rate" in str(error):
            raise InputError(
                f"backbone {name} has no blocks that could be left out: use --stochastic-depth 0 "
                "(in 20), or another recipe than published"
            ) from None
        size = timm.get_pretrained_cfg(name).input_size[1]
        raise InputError(f"backbone {name} takes --image-size {size} alone") from None
    except (OSError, RuntimeError, ValueError) as error:
        fix = "is it a name of timm's?"
        if from_hub:
            fix = (
                f"connect to the network once, or use --pretrained FOLDER with {name}.safetensors "
                "in it, or --pretrained false"
            )
        reason = str(error).splitlines()[0][:120]
        raise InputError(f"backbone {name}: {reason}; {fix}") from None
    if path:
        load_pretrained(backbone, name, path)
    return backbone


def find_pretrained(pretrained, backbone):
    """The file of weights that PRETRAINED names for a backbone; None for true and false.

    In a folder it is called <backbone>.safetensors (or .pth, .pt, .bin) or, as the hub has it,
    model.safetensors beside a config.json that names the backbone.
    """
    if isinstance(pretrained, bool):
        return None
    path = Path(pretrained)
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(
            f"--pretrained {pretrained}: no such file or folder; expected true, false, a file or a "
            "folder of weights"
        )
    architecture = backbone.split(".")[0]  # timm puts what it was trained on behind a dot.
    names = [backbone, architecture]
    if read_architecture(path / "config.json") == architecture:
        names += ["model", "pytorch_model"]
    for name, suffix in itertools.product(names, WEIGHT_FILES):
        if (path / (name + suffix)).is_file():
            return path / (name + suffix)
    raise InputError(f"--pretrained {pretrained}: the folder holds no {architecture}.safetensors")


def read_architecture(path):
    """The backbone that a config.json of the hub names, or None."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["architecture"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def load_pretrained(backbone, name, path):
    """Load a file of weights into a timm backbone. A classifier in it is ignored.

    Tensors of other names are taken in timm's order, if each has the shape of its place; not of a
    .safetensors, which holds them in another order. Nothing in the file is run. InputError naming
    the first tensor that does not fit.
    """
    from timm.models import load_state_dict

    try:
        state = load_state_dict(str(path), weights_only=True)
        state = {key: value for key, value in state.items() if not is_counter(key)}
        shapes = {key: tuple(value.shape) for key, value in state.items()}
    except Exception as error:  # Of a damaged file each reader raises its own.
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a file of weights ({reason})") from None
    wanted = {
        key: tuple(value.shape)
        for key, value in backbone.state_dict().items()
        if not is_counter(key)
    }
    has_timms_names = wanted.keys() <= state.keys()
    names = dict(zip(wanted, wanted if has_timms_names else state, strict=False))
    if has_timms_names:
        refuse_extra(backbone, name, path, [key for key in state if key not in wanted])
    for key, shape in wanted.items():
        found = names.get(key)
        if found is None or shapes[found] != shape:
            its_shape = shapes.get(found, ())
            raise InputError(
                f"{path}: {found or 'nothing'} {its_shape} stands where {name} has {key} {shape}: "
                "these are weights of another backbone"
            )
    if not has_timms_names and Path(path).suffix == ".safetensors":
        # BatchNorm's four tensors have one shape, so that shapes do not tell which is which.
        raise InputError(
            f"{path}: its names are not timm's, as {next(iter(state))}, and a .safetensors has "
            f"lost the order by which they could be told: save {name} by timm, or as .pth"
        )
    state = {key: state[names[key]] for key in wanted}
    backbone.load_state_dict(state, strict=False)


def refuse_extra(backbone, name, path, extra):
    """InputError where the names `extra` of a file are more than a classifier's."""
    classifiers = backbone.pretrained_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    for key in extra:
        if not key.startswith(classifiers):
            raise InputError(
                f"{path}: holds {key}, which {name} does not have: these are weights of another "
                "backbone"
            )


def is_counter(key):
    """Whether a tensor only counts BatchNorm's steps; files may lack these."""
    return key.endswith("num_batches_tracked")


def check_hub():
    """Where timm's hub does not answer, have its client look into its cache, not wait a minute."""
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:  # It has been found out, or the user says so.
        return
    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:  # The client's own errors change with its version; each means no answer.
        huggingface_hub.constants.HF_HUB_OFFLINE = True
