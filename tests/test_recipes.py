"""Recipes: what they change is used and printed, and an edited constant wins over them."""

import re

import pytest
from conftest import REPOSITORY, TINY, load_script, stdout_of

import common
from study import constants, recipes, shell
from study.errors import InputError

SCRIPTS = ["20", "21", "22", "23", "24", "25"]


def override(name, *flags, **edited):
    """The globals of a script, some of them edited, after its command line."""
    script = vars(load_script(name))
    script.update(edited)
    constants.override_constants(script, list(flags))
    return script


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_come_with_the_constants_of_recipe_paper(name):
    script = vars(load_script(name))
    shared = script.keys() & recipes.PAPER.keys()
    assert len(shared) > 2
    different = {key for key in shared if script[key] != recipes.PAPER[key]}
    assert different <= ({"TTA"} if name == "25" else set())


def test_every_recipe_says_the_same_constants():
    assert recipes.PUBLISHED.keys() == recipes.BEST.keys() == recipes.PAPER.keys()
    for recipe in recipes.RECIPES.values():
        constants.check_constants(recipe, recipes.ALLOWED)


def test_an_edited_constant_wins_over_the_recipe_and_is_told(capsys):
    script = override("20", "--recipe", "best", "--neighbourhood", "false", EPOCHS=9)
    assert script["EPOCHS"] == 9
    assert constants.recipe_of(script)["EPOCHS"] == 9
    assert constants.recipe_of(script)["HEAD_START"] == recipes.BEST["HEAD_START"]
    told = capsys.readouterr().out
    assert f"EPOCHS = 9 as edited, in place of {recipes.BEST['EPOCHS']} of recipe best" in told


@pytest.mark.parametrize("name", ["20", "21"])
@pytest.mark.parametrize("flags, edited", [(["--epochs", "9"], {}), ([], {"EPOCHS": 9})])
def test_a_network_in_training_is_refused_the_neighbourhood(name, flags, edited):
    with pytest.raises(InputError, match="--epochs 9: a network in training sees single"):
        override(name, "--recipe", "best", *flags, **edited)


@pytest.mark.parametrize("name", ["22", "23", "24"])
def test_what_compares_trainings_refuses_a_recipe_without_any_and_its_ridge_start(name):
    for flags in ([], ["--epochs", "2"]):
        with pytest.raises(InputError, match="--recipe best: expected one of paper, publish"):
            override(name, "--recipe", "best", *flags)
    with pytest.raises(InputError, match="--epochs 0: expected a number from 1"):
        override(name, "--epochs", "0")


PUBLISHED = [("published", name) for name in ("20", "21", "22", "23", "24")]


@pytest.mark.parametrize("recipe, name", [*PUBLISHED, ("best", "20"), ("best", "21")])
def test_all_that_a_recipe_changes_is_used_and_printed(name, recipe, capsys):
    script = override(name, "--recipe", recipe)
    told = capsys.readouterr().out
    for constant, value in recipes.RECIPES[recipe].items():
        assert constants.recipe_of(script)[constant] == value
        if value != recipes.PAPER[constant]:
            assert f"{constant} = {value!r}" in told


def test_a_flag_wins_over_the_recipe():
    script = override("20", "--recipe", "published", "--warp-border", "reflect")
    assert script["WARP_BORDER"] == "reflect"
    assert script["CHANNELS"] == "bgr"


def test_true_and_false_are_no_paths_of_weights_whatever_the_script_says():
    for default in (True, "weights"):
        found = [
            constants.parse_constant("PRETRAINED", default, text) for text in ("false", "True")
        ]
        assert found == [False, True]
        assert constants.parse_constant("PRETRAINED", default, "folder") == "folder"


def test_the_published_recipe_trains_otherwise_by_each_of_its_constants(simulated, tmp_path):
    """Each deviation of the published scripts changes the numbers, and so has a row of its own."""
    found = {}
    options = TINY | {"target": "lognorm", "epochs": 2, "image_size": 64, "batch_size": 4}
    changes = {
        name: value for name, value in recipes.PUBLISHED.items() if value != recipes.PAPER[name]
    }
    assert len(changes) == 6
    for name, value in [("RECIPE", "paper"), *changes.items()]:
        out = tmp_path / name
        flags = [constants.flag_of(name), constants.show_constant(value)]
        stdout = stdout_of("20", *flags, data_root=simulated, out=out, **options)
        losses = re.findall(r"^ +\d\*? +\S+ +(\S+)", stdout, flags=re.MULTILINE)
        assert len(losses) == 2
        found[name] = tuple(losses)
    assert len(set(found.values())) == 1 + len(changes)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_quick_budget_sets_nothing_that_a_script_lacks(name):
    script = vars(load_script(name))
    assert script["QUICK_BUDGET"].keys() <= script.keys()


def test_recipes_need_no_package():
    text = (REPOSITORY / "study" / "recipes.py").read_text()
    assert re.findall(r"^(?:import|from) (\S+)", text, flags=re.MULTILINE) == ["dataclasses"]


def test_steps_are_those_that_training_takes():
    recipe = {"EPOCHS": 3, "BATCH_SIZE": 4}
    assert common.count_steps(9, recipe) == 3 * 2, "a last batch of one spot is left out"
    assert common.count_steps(10, recipe) == 3 * 3
    assert common.count_steps(10, recipe, stop=2) == 2 * 3, "a training that ends before"


@pytest.mark.parametrize(
    "line, told",
    [
        ('REFIT = "false"', "REFIT = 'false' in the script: expected one of False, True"),
        ("SEEDS = (42)", "SEEDS = 42 in the script: expected several in brackets, as (42,)"),
        ("TRAIN_SLIDES = [1, 2]", "TRAIN_SLIDES = [1, 2] in the script: expected several"),
        ("EPOCHS = 1e2", "EPOCHS = 100.0 in the script: expected a number from 0 to 1000000, with"),
        ('IMAGE_SIZE = "64"', "IMAGE_SIZE = '64' in the script: expected a number from 32"),
        ("LEARNING_RATE = 3 * 1e-4", "LEARNING_RATE = 3 * 0.0001 in 20_copy.py: expected a value"),
    ],
)
def test_a_constant_edited_to_another_kind_is_told(line, told, tmp_path, monkeypatch, capsys):
    (script,) = REPOSITORY.glob("20_*.py")
    name = line.split(" = ")[0]
    text = re.sub(rf"^{name} = .*$", line, script.read_text(), flags=re.MULTILINE)
    copy = tmp_path / "20_copy.py"
    copy.write_text(text)
    monkeypatch.setattr("sys.argv", [str(copy), "--quick"])
    with pytest.raises(SystemExit):
        shell.check_command(str(copy))
    assert told in capsys.readouterr().err
