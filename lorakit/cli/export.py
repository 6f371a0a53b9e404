"""Writes an adapter in the format that another program reads, and loads it back to see that nothing was lost.

  lorakit export runs/mascot --format diffusers --out mascot.safetensors
  lorakit export runs/mascot --step 300 --out mascot-300.safetensors --license CC-BY-4.0 --thumbnail zorp.png
  lorakit export mascot.safetensors --base embedded --format peft --out mascot-peft

A file that lies in no run needs --base, the model that it was trained on. What the file says of itself goes with it.
"""

import argparse
import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.core.errors import InputError
from lorakit.core.files import printable

if TYPE_CHECKING:
    from lorakit.families.protocol import Family

HELP = "write an adapter in another program's format, verified"
FORMATS = ("kohya", "diffusers", "peft", "lorakit")
DTYPES = ("fp32", "fp16", "bf16")
ABOUT = {
    "title": "the name that programs show (default: the file's)",
    "author": "who made it",
    "description": "what it is for",
    "license": "the terms it may be used by",
    "trigger": "the words that call up what was learnt",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RUN_OR_FILE", type=Path, help="a run, a checkpoint of one, an adapter file")
    parser.add_argument("--step", type=int, help="of a run: what it had saved at this step (default: its result)")
    parser.add_argument("--format", choices=FORMATS, help="default: what most programs read for the family")
    add_common(parser)


def add_common(parser: argparse.ArgumentParser) -> None:
    """What writing a file needs to know, whatever verb it is."""
    parser.add_argument("--out", type=Path, required=True, help="a .safetensors file; for peft a folder")
    parser.add_argument("--dtype", choices=DTYPES, help="number format of the weights (default: as they are)")
    parser.add_argument("--base", metavar="PATH", help='the model: a diffusers folder, a hub name, or "embedded"')
    parser.add_argument("--family", help="the base's model family (default: as its folder says)")
    parser.add_argument("--assume-alpha", type=float, help="alpha of layers whose file holds none")
    parser.add_argument(
        "--accept-changed", action="store_true", help="take a file that another program changed, against its digest"
    )
    about = parser.add_argument_group("what the file says of itself")
    for name, text in ABOUT.items():
        about.add_argument(f"--{name}", metavar="TEXT", help=text)
    about.add_argument("--thumbnail", metavar="PICTURE", type=Path, help="a picture to show, made small")
    about.add_argument(
        "--date",
        metavar="DAY",
        nargs="?",
        const="today",
        type=_day,
        help="a date; today if no day is said",
    )


def _day(text: str) -> str:
    return (datetime.date.today() if text == "today" else datetime.date.fromisoformat(text)).isoformat()


def run(args: argparse.Namespace) -> None:
    if args.out.exists():
        raise InputError(f"--out {printable(args.out)} exists already: choose another name.")
    folder = args.format == "peft"
    if (args.out.suffix == ".safetensors") == folder:
        what = "the format peft is a folder: leave .safetensors out" if folder else "a file's name ends in .safetensors"
        raise InputError(f"--out {printable(args.out)}: {what}.")
    if args.family is not None and args.base is None:
        raise InputError("--family says what --base is: give --base too.")
    from lorakit.core.quiet import quiet_libraries

    quiet_libraries()
    from lorakit.export import export_adapter
    from lorakit.export.files import DTYPES as KNOWN

    report = export_adapter(
        args.source,
        format=args.format,
        out=args.out,
        dtype=KNOWN[args.dtype] if args.dtype else None,
        family=load_base(args.base, args.family) if args.base is not None else None,
        step=args.step,
        metadata=_said(args),
        assume_alpha=args.assume_alpha,
        accept_changed=args.accept_changed,
    )
    print(f"{report.path}: {report.format}, {report.dtype}, {report.modules} layers, {report.keys} tensors")
    alone = " (no stock pipeline does: put it in with lorakit.load_adapter)" if report.reader == "lorakit" else ""
    most = f"predictions differ by at most {report.max_difference:.1e} of their size"
    print(f"loaded back by {report.reader}{alone}: {most}")
    print(f"sha256 {report.sha256}")


def _said(args: argparse.Namespace) -> dict[str, str]:
    """The metadata that the options ask for."""
    from lorakit.export.metadata import AboutSettings, thumbnail

    said = AboutSettings(**{name: getattr(args, name) for name in ABOUT}).entries()
    said |= thumbnail(args.thumbnail) if args.thumbnail is not None else {}
    return said | ({"modelspec.date": args.date} if args.date is not None else {})


def load_base(path: str, family: str | None) -> "Family":
    """The model at `path`, of the family that it names itself where nobody else does."""
    from lorakit import families

    return families.load(family or families.named_at(path), path)
