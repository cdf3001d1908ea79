"""README's commands name scripts and constants that exist, and run."""

import json
import re
import subprocess
import sys
import time

import pandas as pd
import pytest
from conftest import REPOSITORY, SHARED, load_script

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
        constants = common.recipe_of(vars(load_script(script[:2])))
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
    texts = [README, *(path.read_text().split("import")[0] for path in REPOSITORY.glob("[0-9]*.py"))]
    assert not re.search(r"\bTIME\d|\bT2\d\b|QUICKTIMES|SHOWS\d|TABLE\d|^BODY|@", "".join(texts), re.MULTILINE)


def run(command, folder):
    """Run a README command as typed, in another folder; returns its stdout."""
    assert command[0] == "python"
    arguments = [sys.executable, REPOSITORY / command[1], *command[2:]]
    return subprocess.run(arguments, cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_the_first_look(tmp_path):
    (command,) = [command for command in COMMANDS if "--quick" in command and command[1].startswith("20")]
    began = time.monotonic()
    stdout = run(command, tmp_path)
    print(f"the first look took {time.monotonic() - began:.0f} s")
    assert "$ python 18_simulate_slides.py" in stdout and "$ python 19_make_patches_and_csv.py" in stdout
    rows = pd.DataFrame(json.loads(stdout.splitlines()[-1])["rows"]).query("split == 'test'").set_index("setting")
    assert rows["heg"]["EfficientNet-B0"] >= 0.5
    assert rows["heg"]["EfficientNet-B0"] > rows["heg"]["ridge (colour)"]
    ceiling = float(re.search(r"per slide: ([\d.]+) against counting noise", stdout)[1])
    assert 0.75 <= ceiling <= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("script, settings", [("21", 4), ("22", 4), ("23", 8)])
def test_the_other_first_looks(tmp_path, script, settings):
    (command,) = [command for command in COMMANDS if "--quick" in command and command[1].startswith(script)]
    began = time.monotonic()
    stdout = run(command, tmp_path)
    print(f"{' '.join(command)} took {time.monotonic() - began:.0f} s, slides included; promised are 180 on two cores")
    assert "SIMULATED slides: quick budget, no evidence: " in stdout
    rows = pd.DataFrame(json.loads(stdout.splitlines()[-1])["rows"])
    assert rows["setting"].nunique() == settings and rows["heg"].notna().all()


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif(not (SHARED / "her2st").is_dir(), reason="shared/her2st is not there")
def test_real_tissue(tmp_path):
    real = [command for command in COMMANDS if any("HER2ST" in word for word in command)]
    first, *others = [command for command in real if command[1][:2] in ("17", "19", "20")]
    run([*first, "--source", str(SHARED / "her2st")], tmp_path)
    for command in others:
        stdout = run(command, tmp_path)
    rows = pd.DataFrame(json.loads(stdout.splitlines()[-1])["rows"])
    assert {"EfficientNet-B0", "ridge (colour)"} <= set(rows["setting"]) and rows["heg"].notna().all()
