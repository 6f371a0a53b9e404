"""Looks at a recipe's data before training: what the model will see, and what is wrong.

  lorakit check RECIPE [section.key=value …]
  lorakit check RECIPE --out DIR       check.html, contact-sheet.png, check.json
  lorakit check RECIPE --json          the whole report for machines
  lorakit check RECIPE --deep          loads the model too: does it predict what its configuration says?

It ends with 2 where something keeps the training from starting.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.core.errors import InputError
from lorakit.core.files import printable

if TYPE_CHECKING:
    from rich.console import Console

    from lorakit.data.report import DataReport

HELP = "look at a recipe's data before training"

_LINES = 20  # of a list; more would push the table off the screen
_MOST_BUCKETS = 30
_WIDE_ENOUGH = 72  # for the columns of the sources' table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a recipe (TOML)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the recipe's")
    parser.add_argument(
        "--deep",
        action="store_true",
        help="load the model too, and see whether it predicts what its configuration says",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="write a page, a contact sheet and the report there")
    parser.add_argument("--json", action="store_true", help="print the report as JSON, and nothing else")
    parser.add_argument(
        "--originals", metavar="N", type=int, default=40, help="show so many pictures with their crops (default 40)"
    )


def run(args: argparse.Namespace) -> None:
    if args.originals < 1:
        raise InputError("--originals must be at least 1.")
    from lorakit.core.quiet import quiet_libraries

    quiet_libraries()
    from lorakit.data.report import DataReport
    from lorakit.recipe import load_recipe

    try:
        recipe = load_recipe(args.recipe, overrides=args.overrides)
    except InputError as error:
        if args.json:  # a document in any case
            print(json.dumps(DataReport(errors=tuple(error.problems)).to_json(), indent=2))
        raise
    from lorakit.verbs.check import check

    name = Path(args.recipe).name
    found = check(recipe, deep=args.deep, out=args.out, originals=args.originals, title=name)
    if args.json:
        print(json.dumps(found.report.to_json(), indent=2, allow_nan=False))
    else:
        show(found.report, title=name)
        if found.unexplained:
            print(_model(found.unexplained))
        for file in found.files:
            print(f"Written: {printable(file)}")
    sys.stdout.flush()  # before the message that comes on stderr
    if found.report.errors:
        raise InputError(list(found.report.errors))


def _model(unexplained: Mapping[str, float]) -> str:
    """What the model's predictions leave unexplained, for a person."""
    parts = [f"{share:.0%} read as {name}" for name, share in sorted(unexplained.items(), key=lambda item: item[1])]
    return f"Of noised training pictures the model leaves unexplained: {', '.join(parts)}."


def show(report: "DataReport", *, title: str = "") -> None:
    """Prints the tables of a report to stdout; its errors are for the caller to say."""
    from rich.console import Console

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(
            errors="replace"
        )  # a terminal that cannot show a caption's letters still shows the table
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = 120  # a file or a pipe has room
    console.print(f"Data of {printable(title)}" if title else "Data", style="bold", soft_wrap=True)
    if console.width >= _WIDE_ENOUGH:
        console.print(_sources(report))
    else:
        for i, source in enumerate(report.sources):
            text = f"{i} {source.folder}: {source.role}, {source.pictures:,} pictures"
            console.print(_plain(text), soft_wrap=True)
    console.print()
    console.print(_numbers(report))
    console.print()
    if report.buckets:
        console.print(_buckets(report, width=console.width, solid="█" if console.encoding.startswith("utf") else "#"))
        if len(report.buckets) > _MOST_BUCKETS:
            more = f"  and {len(report.buckets) - _MOST_BUCKETS:,} more: --json or --out shows all"
            console.print(_plain(more, "dim"), soft_wrap=True)
        console.print()
    _list(console, "Warnings", report.warnings)
    _list(console, "Bad pictures, left out", report.skipped)
    if not report.errors:
        console.print("Ready to train.", style="bold green")


def _table(*columns: str, right: Sequence[int] = ()) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim", show_header=any(columns))
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i in right else "left", overflow="fold")
    return table


def _sources(report: "DataReport") -> Any:
    table = _table("", "source", "role", "pictures", "repeats", "samples an epoch", "steps", right=(0, 3, 4, 5))
    for i, source in enumerate(report.sources):
        end = "" if source.end_step is None else f"{source.end_step:,}"
        window = f"{source.start_step:,} to {end}" if end else f"from {source.start_step:,} on"
        aside = f" ({source.validation:,} aside)" if source.validation and source.role != "validation" else ""
        table.add_row(
            str(i),
            _plain(source.folder),
            source.role,
            f"{source.pictures:,}{aside}",
            f"{source.repeats:,}",
            f"{source.samples_per_epoch:,g}" if report.steps_per_epoch else "",
            window if end or source.start_step else "all",
        )
    return table


def _numbers(report: "DataReport") -> Any:
    table = _table("", "")
    aside = [f"{report.validation:,} for validation"] if report.validation else []
    aside += [f"{report.masked:,} with a mask"] if report.masked else []
    forms = f" in {report.caption_variants:,} forms" if report.caption_variants > report.captions else ""
    # the report's crops are what a crop in the middle cuts off at either side; another cuts the same off in all
    crops = f"{2 * report.mean_crop:.1%} of width or height on average, {2 * report.largest_crop:.1%} at most"
    steps = f"{report.steps:,} in all, {report.steps_per_epoch:,} an epoch"
    lines: list[tuple[str, str, object]] = [
        ("pictures", ", ".join([f"{report.pictures:,}", *aside]), report.pictures == 0),
        ("captions", f"{report.captions:,}{forms}", False),
        ("too long captions", f"{report.long_captions:,}", report.long_captions),
        ("duplicates", f"{report.duplicates:,}", report.duplicates),
    ]
    if report.errors:
        lines.insert(0, ("errors", f"{len(report.errors):,}", True))
    if report.skipped:
        lines.append(("bad pictures", f"{len(report.skipped):,} left out", True))
    lines.append(("files of no use", f"{len(report.unused):,}", report.unused))
    if report.buckets:  # else it is not known what becomes of the pictures
        lines += [("cut off", crops, False), ("enlarged", f"{report.enlarged:,}", report.enlarged)]
    if report.steps_per_epoch:
        lines.append(("steps", f"{steps}, {report.epochs:g} epochs" if report.epochs else steps, False))
    for name, text, notable in lines:
        table.add_row(_plain(name, "dim"), _plain(text, "yellow" if notable else ""))
    return table


def _buckets(report: "DataReport", *, width: int, solid: str) -> Any:
    table = _table("bucket", "", "pictures", right=(0, 2))
    longest, most = max(5, min(48, width - 30)), max(report.buckets.values())
    for name, number in list(report.buckets.items())[:_MOST_BUCKETS]:
        table.add_row(name, _plain(solid * max(1, round(longest * number / most)), "cyan"), f"{number:,}")
    return table


def _list(console: "Console", name: str, texts: Sequence[str]) -> None:
    if not texts:
        return
    console.print(f"{name} ({len(texts):,})", style="bold yellow", soft_wrap=True)
    for text in texts[:_LINES]:
        console.print(_plain(f"  {text}"), soft_wrap=True)
    if len(texts) > _LINES:
        console.print(_plain(f"  and {len(texts) - _LINES:,} more: --json or --out shows all", "dim"), soft_wrap=True)


def _plain(text: str, style: str = "") -> Any:
    """A text that is shown as it stands: what looks like markup stays so, control characters are spelled out."""
    from rich.text import Text

    return Text(printable(text), style=style)
