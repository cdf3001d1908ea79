"""The commands of README and docs/ name scripts and constants that exist, and run."""

import re
import shlex
import subprocess
import sys
import time

import pytest
import safetensors.torch
import timm
from conftest import REPOSITORY, SHARED, TINY, expect_refusal, load_script, stdout_of, table_of
from test_predict_slide import space_ranger
from test_source import too_wide

from study import constants

README = (REPOSITORY / "README.md").read_text()
PAGES = [README, *(path.read_text() for path in sorted((REPOSITORY / "docs").glob("*.md")))]


def commands_of(page):
    """[words] of every line in the bash blocks of a page; of a && b, b."""
    blocks = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line.split("&& ")[-1]) for line in lines]


COMMANDS = []
for page in PAGES:  # A command that stands on two pages is one.
    COMMANDS += [command for command in commands_of(page) if command not in COMMANDS]


def test_every_command_names_a_script_and_its_constants():
    scripts = [command for command in COMMANDS if command[1:] and command[1].endswith(".py")]
    assert len(scripts) >= 20
    for _, script, *arguments in scripts:
        constants.build_parser(vars(load_script(script[:2]))).parse_args(arguments)


def test_ci_runs_readmes_test_command():
    install = "pip install {}-r requirements.txt -r requirements-dev.txt"
    test = " && pytest -n 2 --dist worksteal"
    ci = (REPOSITORY / ".ci/run").read_text()
    assert install.format("-q ") + test + "; } || exit 1" in ci
    assert install.format("") + test + "\n" in README


def test_readme_names_every_script():
    for path in REPOSITORY.glob("[0-9]*.py"):
        assert path.name in README


def test_a_new_experiment_is_a_copy_of_21(simulated, tmp_path):
    """Under another number and with one line more, which is a setting; what it varies has left the
    ruled block.
    """
    (original,) = REPOSITORY.glob("21_*.py")
    loop = "    for name in FROZEN:\n"
    varied = {"BATCH_SIZE": 8, "EPOCHS": 1, "PRETRAINED": False}
    varied |= {"IMAGE_SIZE": 32, "PRECISION": "fp32"}
    setting = {"BACKBONE": "resnet10t", "HIDDEN": 48} | varied
    text = original.read_text()
    assert loop in text
    text = text.replace(loop, f'    settings["wide head"] = {setting}\n{loop}')
    for name in varied:
        text, count = re.subn(f"^{name} = .*\n", "", text, flags=re.MULTILINE)
        assert count == 1
    copy = tmp_path / "28_compare_heads.py"
    copy.write_text(text)
    options = {name: value for name, value in TINY.items() if name.upper() not in varied}
    options |= {"target": "lognorm", "only": "wide head"}
    stdout = stdout_of(copy, data_root=simulated, out=tmp_path / "runs", **options)
    rows = table_of(stdout)
    assert {*rows["setting"]} == {"wide head"}
    assert "28_compare_heads" in stdout
    for line in ("steps", "weights"):
        assert re.search(f"^{line} +by setting$", stdout, re.MULTILINE)
    assert re.search("^device .*, precision by setting$", stdout, re.MULTILINE)
    (weights,) = (tmp_path / "runs").glob("wide_head-*/weights.safetensors")
    assert safetensors.torch.load_file(weights)["head.1.weight"].shape[0] == 48
    copy.write_text(text.replace('\nDEVICE = "auto"', '\n# DEVICE = "auto"'))
    del options["device"]
    words = ["DEVICE is not in the ruled block", "28_compare_heads.py"]
    expect_refusal(words, copy, data_root=simulated, out=tmp_path / "runs", **options)


# ------------------------------------------------------------------------------ every command, run
# Real data from the local mirror; a longer training than shows that the command runs is cut short.
ADDED = {
    "--dataset HER2ST": ["--source", SHARED / "her2st"],
    "torchrun": ["--quick"],
    "20_train_effb0_sota_split8020.py --data-root my_slides": [
        "--pretrained",
        "false",
        "--epochs",
        "1",
    ],
}
# A command on HER2ST is shortened to what shows that it runs; the last of two equal flags counts.
SHORTENED = ["--epochs", "1", "--image-size", "32"]
SHORTENED_METHODS = ["--stnet-epochs", "1", "--bleep-epochs", "1"]
BROUGHT = ("efficientnet_b0", "tf_efficientnet_lite0", "densenet121", "mobilenetv2_100")
LIVER = {"17_download_data.py", "19_make_patches_and_csv.py", "20_train_effb0_sota_split8020.py"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder in which the commands are run, one after the other; its weights are random."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "weights").mkdir()
    for name in BROUGHT:
        state = timm.create_model(name, num_classes=10).state_dict()
        safetensors.torch.save_file(state, folder / "weights" / f"{name}.safetensors")
    return folder


def shorten(command):
    """What is added to a command on HER2ST."""
    added = []
    if command[1] >= "20":
        added += SHORTENED
    if command[1].startswith("25"):
        added += SHORTENED_METHODS
    if "--seeds" in command:
        added += ["--seeds", "42"]
    if command[1] >= "20" and "--pretrained" not in command:
        added += ["--pretrained", "weights"]
    return added


def own_slides(place):
    """sampleA/outs and sampleB/outs as Space Ranger writes them, A.tif and B.tif, from the
    simulated slides.
    """
    for number, letter in ((1, "A"), (2, "B")):
        outs, image = space_ranger(place, place / "SIMULATED_data", number, "new")
        outs.parent.rename(place / f"sample{letter}")
        (place / f"{letter}.tif").symlink_to(image)


STARTS = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}


def run(command, place):
    """Run a README command, with what ADDED says, in another folder; returns its stdout."""
    line = " ".join(command)
    if "HASH" in line:
        (folder,) = place.glob("runs/20_*/SIMULATED_data/EfficientNet-B0-*")
        command = [word.replace("EfficientNet-B0-HASH", folder.name) for word in command]
    if "--from-spaceranger" in line:
        own_slides(place)
    arguments = [REPOSITORY / word if word.endswith(".py") else word for word in command[1:]]
    for words, added in ADDED.items():
        if words in line:
            arguments += added
    if "--data-root HER2ST" in line:
        arguments += shorten(command)
    began = time.monotonic()
    process = [*STARTS[command[0]], *map(str, arguments)]
    done = subprocess.run(process, cwd=place, capture_output=True, text=True)
    print(f"{line} took {time.monotonic() - began:.0f} s")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_command_runs(place, command):
    line = " ".join(command)
    if command[0] == "pytest":
        pytest.skip("this is the test suite itself; .ci/run runs it")
    if len(command) == 2 and command[1] in LIVER:
        pytest.skip("needs GSE240429's ten gigabytes; test_download has a local server")
    if "HER2ST" in line and not (SHARED / "her2st").is_dir():
        pytest.skip("shared/her2st is not there")
    stdout = run(command, place)
    if command[1][:2] in ("17", "19"):
        return
    rows = table_of(stdout)
    assert len(rows)
    if "--quick" in line:
        assert not too_wide(stdout)
    if line.endswith("--quick"):
        check_first_look(command[1], stdout, rows)
    elif "HER2ST" in line:
        assert rows["heg"].notna().any()
        assert not command[1].startswith("20") or "ridge (colour)" in set(rows["setting"])


N_SETTINGS = {"21": 4, "22": 4, "23": 17, "24": 3, "25": 9}  # of --quick


def check_first_look(script, stdout, rows):
    """20's small budget shows that the network learns; the others' say that they are no
    evidence.
    """
    if not script.startswith("20"):
        assert "SIMULATED slides: smoke test, not a result: " in stdout
        assert rows["setting"].nunique() == N_SETTINGS[script[:2]]
        assert rows["heg"].notna().all() or script.startswith("25"), "the training mean has no r"
        return
    assert "$ python 18_simulate_slides.py" in stdout
    assert "$ python 19_make_patches_and_csv.py" in stdout
    test = rows.query("split == 'test'").set_index("setting")["heg"]
    assert test["EfficientNet-B0"] >= 0.5
    assert 0.5 <= test["ridge (colour)"] <= 0.7
    ceiling = re.search(r"per slide: ([\d.]+) against counting noise", stdout)[1]
    assert 0.75 <= float(ceiling) <= 0.9
