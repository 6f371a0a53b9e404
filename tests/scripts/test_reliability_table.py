"""The page of promises: each names a test that there is, and the table says what the figures say."""

import ast
import re
from pathlib import Path

import reliability_table

ROOT = Path(__file__).parent.parent.parent


def functions(file: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}


def test_every_test_that_the_page_names_is_there() -> None:
    page = reliability_table.PAGE.read_text(encoding="utf-8")
    named = re.findall(r"`((?:tests/)?[\w/]*test_\w+\.py)(?:::(test_\w+))?`", page)
    assert len(named) > 20
    for path, function in named:
        file = ROOT / path if path.startswith("tests/") else ROOT / "tests" / "reliability" / path
        assert file.is_file(), path
        assert not function or function in functions(file), f"{path} has no {function}"


def test_every_promise_names_a_test() -> None:
    page = reliability_table.PAGE.read_text(encoding="utf-8")
    promises = page.partition("## What you may rely on")[2].partition("\n## ")[0]
    points = [line for line in re.split(r"\n(?=- )", promises) if line.startswith("- ")]
    assert len(points) > 12
    for point in points:
        assert re.search(r"`[\w/]*test_\w+\.py", point), f"this promise names no test: {point}"


def test_the_last_figure_of_a_test_counts_and_failures_are_told() -> None:
    figures = [
        {"test": "tests/reliability/test_b.py::test_y[1]", "outcome": "failed", "seconds": 60.0},
        {"test": "tests/reliability/test_b.py::test_y[1]", "outcome": "passed", "seconds": 30.0, "trials": 1200},
        {"test": "tests/reliability/test_b.py::test_y[2]", "outcome": "skipped", "seconds": 0.0},
        {"test": "tests/reliability/test_a.py::test_x", "outcome": "failed", "seconds": 90.0, "trials": 7},
    ]
    table = reliability_table.table(reliability_table.rows(figures))
    assert table.splitlines()[2:] == [
        "| `test_a.py::test_x` | 1 | 0 | 1 | 1.5 |",
        "| `test_b.py::test_y` | 2 (1 not possible there) | 1,200 | 0 | 0.5 |",
        "| all | 3 | 1,200 | 1 | 2.0 |",
    ]


def test_the_table_takes_the_place_of_the_one_before() -> None:
    page = f"# A\n{reliability_table.BEGIN}\n\nold\n\n{reliability_table.END}\nb\n"
    new = reliability_table.into_page(page, "new")
    assert "old" not in new and new.startswith("# A\n") and new.endswith("\nb\n")
    assert reliability_table.into_page(new, "new") == new
