"""Weights from a file or a folder: what is loaded, what is refused in one line, what a record
remembers of them.
"""

import json
import pickle
from collections import OrderedDict

import pytest
import safetensors.torch
import timm
import torch
from conftest import NETWORK, TINY, refused, run_script, table_of

import common
from study.errors import InputError

SMALL = "mobilenetv3_small_050"  # a backbone of half a million parameters


def pretend(name, n_classes=10, seed=7):
    """timm's backbone with a classifier, at random: what somebody trained, for these tests."""
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=n_classes)


def weights_of(folder, name=SMALL, seed=7):
    """The folder, with a file of weights at random for a backbone."""
    folder.mkdir(exist_ok=True)
    state = pretend(name, seed=seed).state_dict()
    safetensors.torch.save_file(state, folder / f"{name}.safetensors")
    return folder


def save(path, state):
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save({"state_dict": state}, path)


def build(name, pretrained):
    recipe = NETWORK | {"BACKBONE": name, "PRETRAINED": str(pretrained)}
    return common.build_model(recipe, 5, 0).backbone


def assert_same_weights(backbone, trained):
    wanted = trained.state_dict()
    for name, value in backbone.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(value, wanted[name], rtol=0, atol=0)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
def test_a_checkpoint_of_timm_is_loaded_and_its_classifier_ignored(tmp_path, suffix):
    trained = pretend(SMALL)
    path = tmp_path / f"{SMALL}{suffix}"
    save(path, trained.state_dict())
    assert_same_weights(build(SMALL, path), trained)
    assert_same_weights(build(SMALL, tmp_path), trained)


def test_a_folder_as_the_hub_has_it_is_read(tmp_path):
    trained = pretend(SMALL)
    safetensors.torch.save_file(trained.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": SMALL}))
    assert_same_weights(build(SMALL, tmp_path), trained)
    with refused("holds no resnet18.safetensors"):
        build("resnet18", tmp_path)
    with refused("no such file or folder"):
        build(SMALL, tmp_path / "nowhere")


@pytest.mark.parametrize("backbone", ["resnet10t", "densenet121", "efficientnet_b0"])
def test_other_names_in_the_same_order_are_taken(tmp_path, backbone):
    """As torchvision's files have them; counters of BatchNorm's steps may be missing."""
    trained = pretend(backbone, n_classes=1000)
    state = OrderedDict()
    for name, value in trained.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            state[f"body.{len(state)}.{name.split('.')[-1]}"] = value
    torch.save(state, tmp_path / "brought.pth")
    assert_same_weights(build(backbone, tmp_path / "brought.pth"), trained)


def test_other_names_without_their_order_are_refused(tmp_path):
    """BatchNorm's tensors have one shape: by the alphabet they would change places unseen."""
    state = {}
    for number, (name, value) in enumerate(pretend("resnet10t").state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            state[f"body.{number:03}.{name.split('.')[-1]}"] = value
    path = tmp_path / "resnet10t.safetensors"
    safetensors.torch.save_file(state, path)
    with pytest.raises(InputError, match=r"resnet10t\.safetensors: .*lost the order"):
        build("resnet10t", path)


@pytest.mark.parametrize("other, words", [
    ("densenet121", r"\(.*\) stands where resnet18 has .* \(.*\)"),
    ("resnet34", "layer.*which resnet18 does not have"),  # all names are there, and more
    ("resnet50", "layer.*which resnet18 does not have"),
])  # fmt: skip
def test_another_architecture_is_told_with_its_tensors(tmp_path, other, words):
    path = tmp_path / "resnet18.safetensors"
    save(path, pretend(other).state_dict())
    with pytest.raises(InputError, match=words):
        build("resnet18", path)


class Malice:
    """A pickle that would run a command when it is opened."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def test_a_pickle_with_code_is_refused_and_nothing_is_run(tmp_path):
    path = tmp_path / f"{SMALL}.pth"
    torch.save({"state_dict": Malice(tmp_path / "ran")}, path)
    with refused("not a file of weights"):
        build(SMALL, path)
    path.write_bytes(pickle.dumps(Malice(tmp_path / "ran")))
    with refused("not a file of weights"):
        build(SMALL, path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_truncated_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"{SMALL}{suffix}"
    save(path, pretend(SMALL).state_dict())
    path.write_bytes(path.read_bytes()[:10_000])
    with pytest.raises(InputError, match="not a file of weights"):
        build(SMALL, path)


def test_a_hub_that_does_not_answer_is_told_at_once(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    recipe = NETWORK | {"BACKBONE": SMALL, "PRETRAINED": True}
    with pytest.raises(InputError, match=f"--pretrained FOLDER with {SMALL}.safetensors"):
        common.build_model(recipe, 5, 0)
    assert huggingface_hub.constants.HF_HUB_OFFLINE, "it was not tried again and again"


@pytest.mark.parametrize("backbone, size, fits", [
    ("test_vit", 96, True),  # timm builds it for another size
    ("levit_128s", 96, True),
    ("test_vit", 100, False),  # not a whole number of its 16 px
    ("resnet10t", 96, True),
])  # fmt: skip
def test_backbones_for_one_size_take_it_or_say_so(backbone, size, fits):
    recipe = NETWORK | {"BACKBONE": backbone, "IMAGE_SIZE": size}
    if fits:
        images = torch.zeros(2, 3, size, size)
        assert common.build_model(recipe, 5, 0).eval()(images).shape == (2, 5)
        return
    with pytest.raises(InputError, match=rf"{backbone}.*--image-size"):
        common.build_model(recipe, 5, 0)


@pytest.mark.parametrize("pool_stages", [False, True])
def test_an_image_that_is_too_small_is_told_whatever_the_head_sees(pool_stages):
    recipe = NETWORK | {"BACKBONE": "inception_v3", "IMAGE_SIZE": 32, "POOL_STAGES": pool_stages}
    with pytest.raises(InputError, match=r"inception_v3 cannot take --image-size 32"):
        common.build_model(recipe, 5, 0)


# ------------------------------------------------------------------------------------------ records
def test_a_record_follows_from_the_files_content_and_26_needs_it_no_more(
    simulated, tmp_path, capsys
):
    weights, other = weights_of(tmp_path / "weights"), tmp_path / "other"
    path = weights / f"{SMALL}.safetensors"
    options = TINY | {"backbone": SMALL, "target": "lognorm", "data_root": simulated, "epochs": 1}
    options |= {"out": tmp_path / "out"}
    del options["pretrained"]

    assert run_script("20", pretrained=weights, **options) == 0
    stdout = capsys.readouterr().out
    assert f"weights{path}" in "".join(stdout.split()), "a long path is printed on two lines"
    table = table_of(stdout)
    assert set(table["weights"][table["setting"] == SMALL]) == {path.name}

    weights.rename(other)
    assert run_script("20", pretrained=other / path.name, **options) == 0
    assert f"{SMALL}: on disk already" in capsys.readouterr().out

    weights_of(other, seed=8)
    assert run_script("20", pretrained=other, **options) == 0
    assert len(list((tmp_path / "out").glob(f"{SMALL}-*"))) == 2

    (other / path.name).unlink()
    (folder, *_) = (tmp_path / "out").glob(f"{SMALL}-*")
    image = next((simulated / "image").iterdir())
    predict = {"weights": folder, "image": image, "um_per_px": 0.304, "out": tmp_path / "maps"}
    assert run_script("26", device="cpu", **predict) == 0
