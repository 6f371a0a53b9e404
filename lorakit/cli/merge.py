"""Folds adapters into a base and saves the result as a pipeline of its own.

lorakit merge embedded runs/mascot/adapter.safetensors:0.8 --out merged
"""

import argparse
import math
from pathlib import Path

from lorakit.cli.export import DTYPES, load_base
from lorakit.core.errors import InputError
from lorakit.core.files import printable

HELP = "fold adapters into a base"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help='a diffusers folder, a hub name, or "embedded"')
    parser.add_argument("adapters", metavar="ADAPTER[:WEIGHT]", nargs="+", help="adapter files, weight 1 if not said")
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the merged pipeline")
    parser.add_argument("--dtype", choices=DTYPES, help="number format to save (default: each component's own)")
    parser.add_argument("--family", help="the base's model family")
    parser.add_argument("--assume-alpha", type=float, help="alpha of layers whose file holds none")


def run(args: argparse.Namespace) -> None:
    if args.out.exists():
        raise InputError(f"--out {printable(args.out)} exists already: choose another folder.")
    adapters = [weighted(text) for text in args.adapters]
    from lorakit.core.quiet import quiet_libraries

    quiet_libraries()
    from lorakit.export import merge_adapter
    from lorakit.export.files import DTYPES as KNOWN

    report = merge_adapter(
        load_base(args.base, args.family),
        adapters,
        out=args.out,
        dtype=KNOWN[args.dtype] if args.dtype else None,
        assume_alpha=args.assume_alpha,
    )
    kinds = ", ".join(f"{name} {kind}" for name, kind in report.dtypes.items())
    print(f"{report.path}: {report.modules} layers changed; saved as {kinds}")
    print(f"loaded back: predictions differ from those of base and adapters by {report.max_difference:.1e} at most")


def weighted(text: str) -> tuple[Path, float]:
    """`FILE[:WEIGHT]` as path and weight; a colon that no number follows belongs to the path."""
    path, colon, number = text.rpartition(":")
    if colon and path:
        try:
            weight = float(number)
        except ValueError:
            if Path(path).exists() and not Path(text).exists():
                raise InputError(f"{printable(text)}: the weight {printable(number)!r} is no number.") from None
            return Path(text), 1.0
        if not math.isfinite(weight):
            raise InputError(f"{printable(text)}: the weight must be a finite number.")
        return Path(path), weight
    return Path(text), 1.0
