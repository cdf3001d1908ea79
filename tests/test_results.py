"""The numbers of docs/results.md are those of the rows behind them, in results/."""

import re

import pandas as pd
import pytest
from conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "results.md").read_text()
SHORT = {
    "Lite0": "tf_efficientnet_lite0",
    "MobileNetV2": "mobilenetv2_100",
    "DenseNet-121": "densenet121",
}


def table_above(name):
    """([{head: cell}] of every line of the table that stands above the link to a file of results/,
    the text between the section's head and that link).

    The head of r is "HEG", without what follows it.
    """
    above = PAGE[: PAGE.index(f"(../results/{name})")]
    lines = [line for line in above.splitlines() if line.startswith("| ")]
    last_head = max(i for i, line in enumerate(lines) if line.startswith("| method"))
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[last_head:]]
    heads = [re.sub("^HEG ±.*", "HEG", head) for head in cells[0]]
    section = " ".join(above[above.rindex("\n## ") :].split())
    return [dict(zip(heads, line, strict=True)) for line in cells[2:]], section


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "results").glob("*.csv")), ids=lambda p: p.name
)
def test_a_table_says_what_its_rows_say(path):
    rows = pd.read_csv(path)
    lines, section = table_above(path.name)
    assert lines
    kinds = {"22_": 12, "_c5_": 3}  # rows a setting: folds, seeds; else sections
    n_rows = next((count for kind, count in kinds.items() if kind in path.name), 4)
    for line in lines:
        method = line["method"]
        for short, name in SHORT.items():
            method = method.replace(short, name)
        found = rows[rows["setting"] == method]
        assert len(found) == n_rows, method
        mean, sd = re.match(r"(\S+) ± (\S+)", line["HEG"]).groups()
        assert float(mean) == pytest.approx(found["heg"].mean(), abs=5.1e-4), method
        assert float(sd) == pytest.approx(found["heg"].std(), abs=5.1e-4), method
        share = found["heg"].mean() / found["heg_ceiling"].mean()
        assert line["of ceiling"] == f"{share:.0%}".replace("%", " %")
        if "HVG" in line:
            assert float(line["HVG"]) == pytest.approx(found["hvg"].mean(), abs=5.1e-4), method
        steps = "-" if found["steps"].isna().all() else f"{found['steps'].mean():.0f}"
        if "steps" in line:
            assert line["steps"] == steps
        elif steps != "-":
            assert f"{steps} steps" in section, method
