"""What the files say of themselves: rooms that know only their own matters, headers that promise
what is written and printed, lines that fit a terminal.
"""

import ast
import re
import sys

import pytest
from conftest import REPOSITORY, SMALL_RUNS, load_script

from study import printing

RUNS = sorted(SMALL_RUNS)


# ------------------------------------------------------------------------------------------- rooms
# What needs no package but Python itself, so that a command is checked at once.
QUICK_ROOMS = {"shell", "errors", "ranks", "files", "hashes", "constants", "recipes"}


def imported_by(nodes):
    """(rooms of study/, other modules) that these nodes of a file's tree import."""
    rooms, others = set(), set()
    for node in nodes:
        if isinstance(node, ast.Import):
            others |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "study":
            rooms |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("study."):
            rooms.add(node.module.removeprefix("study."))
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module)
    return rooms, others


def test_common_knows_neither_its_neighbours_nor_a_script():
    text = (REPOSITORY / "common.py").read_text(encoding="utf-8")
    rooms, others = imported_by(ast.walk(ast.parse(text)))
    assert rooms == {"shell", "errors", "files", "hashes", "backbones"}
    assert not [name for name in others if name.startswith("slides")]
    assert "globals()" not in text


@pytest.mark.parametrize("room", sorted({*QUICK_ROOMS, "backbones"}))
def test_a_room_that_common_or_a_command_needs_needs_no_package(room):
    path = REPOSITORY / "study" / f"{room}.py"
    # When it is loaded, and not later in its functions.
    rooms, others = imported_by(ast.parse(path.read_text(encoding="utf-8")).body)
    assert rooms <= QUICK_ROOMS
    assert others <= sys.stdlib_module_names


# ----------------------------------------------------------------------------------------- headers
def header_of(name):
    """{field: its text on one line} of a script's docstring: Question, Reads, Writes, ..."""
    fields = re.findall(r"^([A-Z][a-z]+) +(\S.*(?:\n {11}.*)*)", load_script(name).__doc__, re.M)
    return {field: " ".join(text.split()) for field, text in fields}


# What a header may promise to print, and what of it is seen on the screen.
PRINTED = {
    "header": r"^protocol +\w",
    "one row an epoch": r"^ +1\*? +\d\.\d\de-\d\d",
    "the table": r"^setting +HEG ",
    "the grid of weights": r"^ *image +position ",
    "cluster scores": r"silhouette",
    "of r in validation": r"validation, slides",
    "mean and sd over the folds": r"^stages=\d hidden=\d+ +-?\d\.\d{3}±",
    "the chosen setting on the test slide": r"the chosen setting.*test slide",
    "sd over the seeds": r"^mpa +-?\d\.\d{3}±",
    "differences": r"HEG minus",
    "parameters": r" M ",
    "speed": r" images/s ",
    "memory": r" peak GB",
    "minutes": r" min(utes)? ",
    "variance ratio": r" var ",
    "gain over BLEEP": r" over BLEEP",
}


@pytest.mark.parametrize("name", RUNS)
def test_what_a_header_promises_is_printed(finished, name):
    _, stdout = finished(name)
    promised = header_of(name)["Prints"]
    for part in promised.split(", "):
        assert any(words in part for words in PRINTED), f"nothing is known of {part!r}"
    for words, pattern in PRINTED.items():
        if words in promised:
            assert re.search(pattern, stdout, re.M | re.S), words


@pytest.mark.parametrize("name", RUNS)
def test_what_a_header_says_is_written_is_there_and_nothing_else(finished, name):
    out, _ = finished(name)
    promised = set(re.findall(r"\b\w+\.\w+\b", header_of(name)["Writes"]))
    written = {path.name for path in out.iterdir() if path.is_file()}
    assert "rows.csv" in promised
    # run.json is what script 27 makes the report of, where a test has asked for one.
    assert written - {".lock", "run.json", "report.html"} == promised - {"report.html"}


# ------------------------------------------------------------------------------------------- width
def too_wide(stdout):
    """Printed lines that are wider than printing.WIDTH."""
    return [line for line in stdout.splitlines() if len(line) > printing.WIDTH]


def test_the_width_is_that_of_a_terminal():
    assert printing.WIDTH == 120


@pytest.mark.parametrize("name", RUNS)
def test_no_printed_line_is_wider_than_the_screen(finished, simulated, name):
    out, stdout = finished(name)
    (script,) = REPOSITORY.glob(f"{name}_*.py")
    # The paths of a run of --quick in place of the tests' long ones.
    stdout = stdout.replace(str(out), f"runs/{script.stem}/SIMULATED_data")
    assert not too_wide(stdout.replace(str(simulated), "SIMULATED_data"))
