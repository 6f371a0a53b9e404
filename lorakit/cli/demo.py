"""The whole road on the model that ships with lorakit: train a subject it has never seen, and look at what it learned.

Takes a few minutes on a CPU and writes pictures, scores and the trained adapter into --out.
"""

import argparse
from pathlib import Path

HELP = "train, export and look, on the model that ships with lorakit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), help="new folder for all that it makes (default demo)"
    )


def run(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from lorakit.verbs.demo import demo

    report = demo(args.out)
    table = Table(title="What the judge sees in pictures of the stock pipeline")
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, words in (
        ("subject", "the subject, in new prompts that name it"),
        ("backgrounds", "the background asked for, in the same"),
        ("old", "old prompts wholly right"),
        ("traces", "traces of the subject in old prompts"),
    ):
        table.add_row(words, *(f"{getattr(scores, name):.0%}" for scores in (report.before, report.after)))
    console = Console()
    console.print(table)
    console.print(
        f"Trained in {report.train_seconds:.0f} s ({report.train_cpu_seconds:.0f} s of CPU).\n\n"
        f"  pictures   {report.picture}\n"
        f"  adapter    {report.adapter}\n"
        f"  numbers    {args.out / 'demo.json'}\n\n"
        "With your own photographs: put them into a folder, a .txt with the caption beside each, and type\n\n"
        "  lorakit train recipes/photos_cpu.toml data.sources.0.path=YOUR_FOLDER\n",
        soft_wrap=True,
        highlight=False,
    )
