"""Folds adapters into a base and saves the result as a model of its own.

  lorakit merge embedded runs/mascot/adapter.safetensors:0.8 --out merged
  lorakit merge embedded one.safetensors:0.8,text_encoder=0,unet.up_blocks=1.2 two.safetensors --out merged
  lorakit merge base.safetensors one.safetensors --config FOLDER --out merged.safetensors

A weight is a number for the whole adapter, and behind it, if need be, numbers for components and blocks of the model by
the beginning of their names; the longest that fits a layer counts.

A base in one file (Stable Diffusion 1.x or XL) stays in one file; --config, a diffusers folder of such a model, of
which configurations and tokenizers are enough, says what is in it.
"""

import argparse
import contextlib
import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.cli.export import DTYPES
from lorakit.core.errors import InputError
from lorakit.core.files import printable

if TYPE_CHECKING:
    from lorakit.export.weights import Weights

HELP = "fold adapters into a base"
_UNITS = {"KB": 1000, "MB": 1000**2, "GB": 1000**3}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help='a diffusers folder, a hub name, "embedded", or one file')
    parser.add_argument("adapters", metavar="ADAPTER[:WEIGHT]", nargs="+", help="adapter files, weight 1 if not said")
    parser.add_argument("--out", type=Path, required=True, help="a new folder (or file) for the merged model")
    parser.add_argument("--config", metavar="FOLDER", help="for a base in one file: a diffusers folder of such a model")
    parser.add_argument("--dtype", choices=DTYPES, help="number format to save (default: each tensor's own)")
    parser.add_argument("--max-shard-size", metavar="SIZE", help="largest file (default 10GB)")
    parser.add_argument("--no-verify", action="store_true", help="do not load the result to compare its predictions")
    parser.add_argument("--family", help="the base's model family, to be sure of it")
    parser.add_argument("--assume-alpha", type=float, help="alpha of layers whose file holds none")


def run(args: argparse.Namespace) -> None:
    if args.out.exists():
        raise InputError(f"--out {printable(args.out)} exists already: choose another folder.")
    size = _bytes(args.max_shard_size or "10GB")
    _check_single(args)
    adapters = [adapter_of(text) for text in args.adapters]
    from lorakit.core.quiet import quiet_libraries

    quiet_libraries()
    from lorakit import families
    from lorakit.export import merge_adapter, merge_single_file
    from lorakit.export.files import DTYPES as KNOWN
    from lorakit.training.processes import bar

    if args.family is not None:
        families.describe(args.family, args.base)
    with contextlib.closing(bar(unit="MB", label="folding")) as progress:

        def show(done: int, total: int) -> None:
            progress.total = total // 1000**2
            progress.update(done // 1000**2 - progress.n)

        merge = (
            functools.partial(merge_adapter, max_shard_size=size)
            if args.config is None
            else functools.partial(merge_single_file, config=args.config)
        )
        report = merge(
            args.base,
            adapters,
            out=args.out,
            dtype=KNOWN[args.dtype] if args.dtype else None,
            assume_alpha=args.assume_alpha,
            verify=not args.no_verify,
            on_progress=show,
        )
    kinds = ", ".join(f"{name} {kind}" for name, kind in report.dtypes.items())
    print(f"{report.path}: {report.modules} layers changed; saved as {kinds}")
    if report.max_difference is None:
        print("not loaded back, as asked")
    else:
        print(f"loaded back: predictions differ from those of base and adapters by {report.max_difference:.1e} at most")


def _check_single(args: argparse.Namespace) -> None:
    """That a base in one file comes with --config, and other options with what they are for."""
    base = Path(args.base).expanduser()
    if args.config is None:
        if base.is_file() and base.suffix == ".safetensors":
            raise InputError(f"{printable(base)} is one file: give --config, a diffusers folder of such a model.")
        if args.out.suffix == ".safetensors":
            raise InputError(f"--out {printable(args.out)}: of a base in a folder a folder is made: name one.")
        return
    if not base.is_file():
        raise InputError(f"--config goes with a base in one file, and {printable(base)} is none.")
    for option in ("max_shard_size", "family"):
        if getattr(args, option) is not None:
            raise InputError(f"--{option.replace('_', '-')} does not go with --config, for a base in one file.")


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*([KMG]B)", text.strip(), re.IGNORECASE)
    if not match or not int(match[1]):
        raise InputError(f"--max-shard-size {printable(text)}: write a size like 500MB or 10GB.")
    return int(match[1]) * _UNITS[match[2].upper()]


def adapter_of(text: str) -> "tuple[Path, Weights]":
    """`FILE[:WEIGHT]` as path and weights; a colon that no weight follows belongs to the path, and a run means its
    adapter."""
    from lorakit.export.adapter import source_of
    from lorakit.export.weights import Weights

    path, colon, said = text.rpartition(":")
    weights = Weights.parsed(said) if colon and path else None
    if weights is not None:
        return source_of(Path(path)), weights
    if colon and Path(path).exists() and not Path(text).exists():
        raise InputError(
            f"{printable(text)}: the weight {printable(said)!r} is no number, and none like 0.8,text_encoder=0."
        )
    return source_of(Path(text)), Weights()
