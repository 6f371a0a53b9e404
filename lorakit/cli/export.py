"""Writes an adapter in the format that another program reads, and loads it back to see that nothing was lost.

  lorakit export runs/mascot --format diffusers --out mascot.safetensors
  lorakit export mascot.safetensors --base embedded --format peft --out mascot-peft

A file that lies in no run needs --base, the model that it was trained on.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.core.errors import InputError
from lorakit.core.files import printable

if TYPE_CHECKING:
    from lorakit.families.protocol import Family

HELP = "write an adapter in another program's format, verified"
FORMATS = ("kohya", "diffusers", "peft")
DTYPES = ("fp32", "fp16", "bf16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RUN_OR_FILE", type=Path, help="a run's folder or an adapter file")
    parser.add_argument("--format", choices=FORMATS, help="default: what most programs read for the family")
    parser.add_argument("--out", type=Path, required=True, help="a .safetensors file; for peft a folder")
    parser.add_argument("--dtype", choices=DTYPES, help="number format of the weights (default: as they are)")
    parser.add_argument("--base", metavar="PATH", help='the model: a diffusers folder, a hub name, or "embedded"')
    parser.add_argument("--family", help="the base's model family")
    parser.add_argument("--assume-alpha", type=float, help="alpha of layers whose file holds none")


def run(args: argparse.Namespace) -> None:
    if args.out.exists():
        raise InputError(f"--out {printable(args.out)} exists already: choose another name.")
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
        assume_alpha=args.assume_alpha,
    )
    print(f"{report.path}: {report.format}, {report.dtype}, {report.modules} layers, {report.keys} tensors")
    print(f"loaded back by {report.reader}: predictions differ by at most {report.max_difference:.1e} of their size")
    print(f"sha256 {report.sha256}")


def load_base(path: str, family: str | None) -> "Family":
    """The model at `path`, of the default family where none is named."""
    from lorakit import families

    return families.load(family or families.DEFAULT, path)
