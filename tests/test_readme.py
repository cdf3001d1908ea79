"""README's commands name scripts and constants that exist, and run."""

import json
import re
import subprocess
import sys
import time

import pandas as pd
import pytest
from conftest import REPOSITORY, SHARED, load_script
from test_predict_slide import space_ranger

import common

README = (REPOSITORY / "README.md").read_text()
COMMANDS = [
    line.split("&& ")[-1].split()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]


def test_every_command_names_a_script_and_its_constants():
    scripts = [command for command in COMMANDS if command[0] == "python"]
    assert len(scripts) >= 7
    for _, script, *arguments in scripts:
        constants = runner.recipe_of(vars(load_script(script[:2])))
        flags = {"--" + name.lower().replace("_", "-") for name in constants}
        assert {word for word in arguments if word.startswith("--")} <= flags, script


def test_ci_runs_readmes_test_command():
    assert (
        "pip install -q -r requirements.txt -r requirements-dev.txt && pytest; } || exit 1"
        in (REPOSITORY / ".ci/run").read_text()
    )
    assert "pip install -r requirements.txt -r requirements-dev.txt && pytest\n" in README


def test_readme_names_every_script_and_nothing_unmeasured():
    for path in REPOSITORY.glob("[0-9]*.py"):
        assert path.name in README
    texts = [README, (REPOSITORY / "benchmarks/README.md").read_text()]
    texts += [path.read_text().split("import")[0] for path in REPOSITORY.glob("[0-9]*.py")]
    assert not re.search(
        r"\bTIME\d|\bT2\d\b|QUICKTIMES|SHOWS\d|TABLE\d|^BODY|[A-Z0-9]+_(TIME|S|GB|OLD|NEW|RATIO|RANGE)\b|@",
        "".join(texts),
        re.MULTILINE,
    )


# ---------------------------------------------------------------------------------------------- every command, run
# Real data from the local mirror; a longer training than shows that the command runs is cut short.
ADDED = {"--dataset HER2ST": ["--source", SHARED / "her2st"], "torchrun": ["--quick"]}
ADDED |= {
    "20_train_effb0_sota_split8020.py --data-root my_slides": [
        "--pretrained",
        "false",
        "--epochs",
        "1",
    ]
}
LIVER = {"17_download_data.py", "19_make_patches_and_csv.py", "20_train_effb0_sota_split8020.py"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder in which README's commands are run, one after the other."""
    return tmp_path_factory.mktemp("readme")


def own_slides(place):
    """sampleA/outs and sampleB/outs as Space Ranger writes them, A.tif and B.tif, from the simulated slides."""
    for number, letter in ((1, "A"), (2, "B")):
        outs, image = space_ranger(place, place / "SIMULATED_data", number, "new")
        outs.parent.rename(place / f"sample{letter}")
        (place / f"{letter}.tif").symlink_to(image)


def run(command, place):
    """Run a README command, with what ADDED says, in another folder; returns its stdout."""
    line = " ".join(command)
    if "HASH" in line:
        (folder,) = place.glob("runs/20_*/SIMULATED_data/EfficientNet-B0-*")
        command = [word.replace("EfficientNet-B0-HASH", folder.name) for word in command]
    if "--from-spaceranger" in line:
        own_slides(place)
    arguments = [REPOSITORY / word if word.endswith(".py") else word for word in command]
    starts = {
        "python": [sys.executable],
        "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    }
    arguments = (
        starts[command[0]]
        + arguments[1:]
        + [word for key in ADDED if key in line for word in ADDED[key]]
    )
    began = time.monotonic()
    done = subprocess.run([*map(str, arguments)], cwd=place, capture_output=True, text=True)
    print(f"{line} took {time.monotonic() - began:.0f} s")
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_command_runs(place, command):
    line = " ".join(command)
    if line == "pytest":
        pytest.skip("this is the test suite itself; .ci/run runs it")
    if len(command) == 2 and command[1] in LIVER:
        pytest.skip(
            "needs GSE240429's ten gigabytes; test_download runs script 17 against a local server"
        )
    if "HER2ST" in line and not (SHARED / "her2st").is_dir():
        pytest.skip("shared/her2st is not there")
    stdout = run(command, place)
    if command[1][:2] in ("17", "19"):
        return
    result = json.loads(stdout.splitlines()[-1])
    rows = pd.DataFrame(result["rows"])
    assert len(rows)
    if "--quick" in line:
        check_first_look(command[1], stdout, rows)
    elif "HER2ST" in line:
        assert {"EfficientNet-B0", "ridge (colour)"} <= set(rows["setting"]) and rows[
            "heg"
        ].notna().all()


def check_first_look(script, stdout, rows):
    """20's small budget shows that the network learns; the others' say that they are no evidence."""
    if not script.startswith("20"):
        settings = {"21": 4, "22": 4, "23": 8, "24": 3, "25": 9}[script[:2]]
        assert (
            "SIMULATED slides: quick budget, no evidence: " in stdout
            and rows["setting"].nunique() == settings
        )
        assert rows["heg"].notna().all() or script.startswith("25"), "25's training mean has no r"
        return
    assert (
        "$ python 18_simulate_slides.py" in stdout
        and "$ python 19_make_patches_and_csv.py" in stdout
    )
    test = rows.query("split == 'test'").set_index("setting")
    assert (
        test["heg"]["EfficientNet-B0"] >= 0.5
        and test["heg"]["EfficientNet-B0"] > test["heg"]["ridge (colour)"]
    )
    assert 0.75 <= float(re.search(r"per slide: ([\d.]+) against counting noise", stdout)[1]) <= 0.9
