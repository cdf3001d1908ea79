"""A script's constants: read from its ruled block, set by the command line and a recipe."""

import argparse
import ast
import re
from pathlib import Path

from study.errors import InputError
from study.recipes import ALLOWED, PAPER, RECIPES, WITHOUT_EFFECT

LINE = re.compile(r"^# -{20,}.*$", re.MULTILINE)  # rules off the block of constants


def recipe_of(script):
    """{name: value} of a script's constants as they stand and, where it trains, of its RECIPE."""
    constants = {name: script[name] for name in read_comments(script)}
    if "PROTOCOL" not in constants:
        return constants
    recipe = RECIPES[constants.get("RECIPE", "paper")] | constants
    if "EPOCHS" not in constants:  # Each setting has its own.
        del recipe["EPOCHS"]
    return recipe


def flags_given(script):
    """{flag: value} of the constants that the command line has changed from those in the file."""
    written = read_script(script["__file__"])
    changed = [name for name in read_comments(script) if script[name] != written[name]]
    return {flag_of(name): show_constant(script[name]) for name in changed}


def read_script(path):
    """{name: value} of a script's docstring, constants and ALLOWED. They are read and not run, so
    that a value must be written out: else InputError.
    """
    tree = ast.parse(Path(path).read_bytes())  # Of bytes, since an editor may add a mark to them.
    script = {"__file__": path, "__doc__": ast.get_docstring(tree)}
    constants = read_comments(script)
    for node in tree.body:
        if isinstance(node, ast.Assign):
            name = ast.unparse(node.targets[0])
            if name in constants or name == "ALLOWED":
                try:
                    script[name] = ast.literal_eval(node.value)
                except ValueError:
                    raise InputError(
                        f"{name} = {ast.unparse(node.value)} in {Path(path).name}: expected a "
                        "value that is written out, as 0.0003 for 3 * 1e-4"
                    ) from None
    return script


def read_comments(script):
    """{name: comment} of the constants in a script's ruled block."""
    block = LINE.split(Path(script["__file__"]).read_text(encoding="utf-8"))[1]
    pattern = r"^([A-Z][A-Z0-9_]*) = .*?(?:  # (.*))?$"
    return dict(re.findall(pattern, block, flags=re.MULTILINE))


def flag_of(name):
    """A constant's name on the command line."""
    return "--" + name.lower().replace("_", "-")


def show_constant(value):
    """A constant's value as the command line takes it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def parse_constant(name, default, text):
    """The text of the command line as a value of the type of `default`; () takes whole numbers."""
    words = {"true": True, "false": False}
    if isinstance(ALLOWED.get(name, ("",))[-1], float):  # also where it is edited to a whole number
        return float(text)
    if name == "PRETRAINED":  # true, false, or a file or folder, whatever it is edited to
        return words.get(text.lower(), text)
    if isinstance(default, bool):
        return words[text.lower()]
    if isinstance(default, tuple):
        kind = type(default[0]) if default else int
        return tuple(kind(part) for part in text.split(",") if part)
    return type(default)(text)


def build_parser(script):
    """argparse's parser of a script: a flag a constant, its comment and value as the help."""

    def refuse(message):
        raise InputError(f"{message}; --help lists this script's constants")

    parser = argparse.ArgumentParser(
        description=script["__doc__"],
        formatter_class=argparse.RawDescriptionHelpFormatter,  # keeps the docstring's lines
        allow_abbrev=False,
    )
    parser.error = refuse
    for name, comment in read_comments(script).items():
        value = script[name]

        def parse(text, name=name, default=value):
            try:
                return parse_constant(name, default, text)
            except (KeyError, ValueError):
                kind = type(default).__name__
                hint = ": expected true or false" if kind == "bool" else ""
                raise argparse.ArgumentTypeError(f"invalid {kind} value: {text!r}{hint}") from None

        options = {"metavar": ""}
        if isinstance(value, bool):
            options = {"nargs": "?", "const": True, "metavar": "false"}
        text = f"{comment} [{show_constant(value)}]".replace("%", "%%")
        parser.add_argument(flag_of(name), dest=name, type=parse, help=text, **options)
    return parser


def parse_command(script, argv):
    """{name: value} of the command line. InputError for what the protocol does not ask for."""
    given = vars(build_parser(script).parse_args(argv))
    given = {name: value for name, value in given.items() if value is not None}
    protocol = given.get("PROTOCOL", script.get("PROTOCOL"))
    for name in WITHOUT_EFFECT.get(protocol, ()):
        if name in given:
            flag = f"{flag_of(name)} {show_constant(given[name])}"
            raise InputError(f"{flag}: --protocol {protocol} does not ask for it: leave it out")
    return given


def override_constants(script, argv):
    """Set a script's constants: what its recipe says, but for those that were edited, then
    `--quick`'s budget, then the command line. Prints what is not as the script comes.
    """
    given = parse_command(script, argv)
    quick = given.get("QUICK", script.get("QUICK", False))
    recipe = given.get("RECIPE", script.get("RECIPE", "paper"))
    values = (script["QUICK_BUDGET"] if quick else {}) | given
    allowed = ALLOWED | script.get("ALLOWED", {})
    check_constants({"RECIPE": recipe}, allowed)
    values = choose_by_recipe(script, recipe, values) | values
    is_trained = not quick and values.get("PRETRAINED", script.get("PRETRAINED")) is not False
    if RECIPES[recipe]["HEAD_START"] == "ridge" and not is_trained:
        raise InputError(
            f"--recipe {recipe}: starts from pretrained weights, which --quick and "
            "--pretrained false leave out"
        )
    for name, value in values.items():
        if name not in script or value != script[name]:
            print(f"{name} = {value!r}")
    script.update({name: value for name, value in values.items() if name in script})
    check_constants(script, allowed)
    settled = recipe_of(script)
    if settled.get("NEIGHBOURHOOD") and settled.get("EPOCHS"):
        raise InputError(
            f"--epochs {settled['EPOCHS']}: a network in training sees single patches, without the "
            "neighbourhood of recipe best: add --neighbourhood false (in 20), or train none by "
            "--recipe best --epochs 0"
        )


def choose_by_recipe(script, recipe, given):
    """{name: value} of what a recipe changes; tells of constants that were edited against it."""
    chosen = {}
    for name, value in RECIPES[recipe].items():
        if name in given or value == PAPER[name]:
            continue
        if name in script and script[name] != PAPER[name]:
            print(f"{name} = {script[name]!r} as edited, in place of {value!r} of recipe {recipe}")
        else:
            chosen[name] = value
    return chosen


def check_constants(script, allowed):
    """InputError where a constant has a value that `allowed` {name: choices} leaves out, or one of
    another kind, as it may be edited to: REFIT = "false" would be true.
    """
    for name in script.keys() & allowed.keys():
        value, choices = script[name], allowed[name]
        kind = type(choices[-1])
        if kind is tuple:
            expected = f"several in brackets, as {choices[-1]}"
        elif kind in (str, bool):
            expected = f"one of {', '.join(map(str, choices))}"
        else:
            whole = ", without decimals" if kind is int else ""
            expected = f"a number from {choices[0]} to {choices[-1]}{whole}"
        if not isinstance(value, (int, float) if kind is float else kind):
            raise InputError(f"{name} = {value!r} in the script: expected {expected}")
        fits = value in choices if kind is str else choices[0] <= value <= choices[-1]
        if kind is not tuple and not fits:
            raise InputError(f"{flag_of(name)} {value}: expected {expected}")
