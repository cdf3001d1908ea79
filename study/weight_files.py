"""Files of ImageNet weights for timm's backbones: which one is meant, whether it fits, what its
content is.
"""

import functools
import itertools
import json
from pathlib import Path

from study import shell
from study.shell import InputError

WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin")


def find_weights(pretrained, backbone):
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


def load_weights(backbone, name, path):
    """Load a file of weights into a timm backbone. A classifier in it is ignored.

    Tensors of other names are taken in timm's order, if each has the shape of its place. Nothing in
    the file is run. InputError naming the first tensor that does not fit.
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
    check_extra(backbone, name, path, state, wanted)
    names = dict.fromkeys(wanted)
    if wanted.keys() <= state.keys():
        names = {key: key for key in wanted}
    else:  # Other names, in timm's order; a .safetensors file has its tensors by the alphabet.
        names |= dict(zip(wanted, state, strict=False))
    for key, shape in wanted.items():
        found = names[key]
        if found is None or shapes[found] != shape:
            its_shape = shapes.get(found, ())
            raise InputError(
                f"{path}: {found or 'nothing'} {its_shape} stands where {name} has {key} {shape}: "
                "these are weights of another backbone"
            )
    state = {key: state[names[key]] for key in wanted}
    backbone.load_state_dict(state, strict=False)


def check_extra(backbone, name, path, state, wanted):
    """InputError where a file holds all that a backbone has, and more than a classifier beside."""
    classifiers = backbone.pretrained_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    if not wanted.keys() <= state.keys():
        return
    for key in state:
        if key not in wanted and not key.startswith(classifiers):
            raise InputError(
                f"{path}: holds {key}, which {name} does not have: these are weights of another "
                "backbone"
            )


def is_counter(key):
    """Whether a tensor only counts BatchNorm's steps; files may lack these."""
    return key.endswith("num_batches_tracked")


@functools.lru_cache(maxsize=64)
def hash_unchanged(path, size, changed):
    """hash_file, which reads the file again when its size or time of change is another."""
    return shell.hash_file(path)


def identify_weights(pretrained, backbone):
    """What PRETRAINED means for a backbone: true, false, or name and hash of the file."""
    path = find_weights(pretrained, backbone)
    if path is None:
        return pretrained
    return f"{path.name} {identify_file(path)}"


def identify_file(path):
    """The first digits of the hash of a file's content."""
    status = path.stat()
    return hash_unchanged(path, status.st_size, status.st_mtime_ns)[:16]
