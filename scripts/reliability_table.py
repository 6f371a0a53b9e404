"""Puts the figures of a soak into the table of docs/reliability.md.

    make soak                                          # every test of tests/reliability; figures in build/soak.jsonl
    python scripts/reliability_table.py build/soak.jsonl

The figures are a JSON line for each test (tests/reliability/conftest.py); of a test that ran twice the last counts.
Ends with 1 where a test failed.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- the soak's table: scripts/reliability_table.py -->", "<!-- end of the table -->"


@dataclass
class Row:
    """What a test function did, over all its parameters."""

    name: str
    cases: int = 0
    trials: int = 0
    failures: int = 0
    skipped: int = 0
    seconds: float = 0.0


def rows(figures: Iterable[Mapping[str, Any]]) -> list[Row]:
    """A row for each test function, in the order of files and then of their first figures."""
    last = {figure["test"]: figure for figure in figures}
    found: dict[str, Row] = {}
    for test, figure in last.items():
        name = test.partition("[")[0].removeprefix("tests/reliability/")
        row = found.setdefault(name, Row(name))
        row.cases += 1
        row.skipped += figure["outcome"] == "skipped"
        row.failures += figure["outcome"] == "failed"
        row.trials += figure.get("trials", 1) if figure["outcome"] == "passed" else 0
        row.seconds += figure["seconds"]
    return sorted(found.values(), key=lambda row: row.name.partition("::")[0])


def table(found: Iterable[Row]) -> str:
    """The rows in Markdown, and their sum."""
    found = list(found)
    lines = ["| test | cases | trials | failures | minutes |", "|---|---|---|---|---|"]
    for row in found:
        cases = f"{row.cases} ({row.skipped} not possible there)" if row.skipped else f"{row.cases}"
        lines.append(f"| `{row.name}` | {cases} | {row.trials:,} | {row.failures} | {row.seconds / 60:.1f} |")
    total = [sum(getattr(row, name) for row in found) for name in ("cases", "trials", "failures", "seconds")]
    lines.append(f"| all | {total[0]} | {total[1]:,} | {total[2]} | {total[3] / 60:.1f} |")
    return "\n".join(lines)


def into_page(page: str, text: str) -> str:
    """`page` with `text` between its two marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"{PAGE.name} has no place for the table"
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path)
    parser.add_argument("--print", action="store_true", help="print the table and leave the page as it is")
    args = parser.parse_args()
    found = rows(json.loads(line) for line in args.figures.read_text(encoding="utf-8").splitlines())
    day = date.fromtimestamp(args.figures.stat().st_mtime)
    text = f"Last run on {day}.\n\n{table(found)}"
    if args.print:
        print(text)
    else:
        PAGE.write_text(into_page(PAGE.read_text(encoding="utf-8"), text), encoding="utf-8")
    sys.exit(any(row.failures for row in found))


if __name__ == "__main__":
    main()
