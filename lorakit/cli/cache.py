"""Encodes a recipe's pictures and captions ahead of its training, and looks after what was encoded.

lorakit cache                                        where it is, and how much
lorakit cache RECIPE [section.key=value …]           fill it; several processes: accelerate launch … -m lorakit cache
lorakit cache --prune [--unused-for DAYS] [--dry-run]
"""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.core.errors import InputError
from lorakit.core.files import printable, size

if TYPE_CHECKING:
    from lorakit.data.cache import Filled

HELP = "encode a recipe's data ahead of training, or tidy the cache"

_DAYS = 30.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="a recipe (TOML)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the recipe's")
    parser.add_argument("--prune", action="store_true", help="delete what no run used for a while")
    parser.add_argument("--unused-for", metavar="DAYS", type=float, help=f"how long that is (default {_DAYS:g})")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    parser.add_argument("--folder", metavar="DIR", type=Path, help="the cache (default: the user's own)")


def run(args: argparse.Namespace) -> None:
    problems = []
    if args.recipe is not None:
        given = [("--prune", args.prune), ("--folder", args.folder is not None)]
        problems += [
            f"{name} and a recipe do not go together: leave one of them out." for name, there in given if there
        ]
    if not args.prune:
        given = [("--unused-for", args.unused_for is not None), ("--dry-run", args.dry_run)]
        problems += [f"{name} belongs to --prune: add it, or leave {name} out." for name, there in given if there]
    if args.unused_for is not None and not (math.isfinite(args.unused_for) and args.unused_for >= 0):
        problems.append("--unused-for must be a number of days.")
    if problems:
        raise InputError(problems)
    if args.recipe is not None:
        _fill(args)
    elif args.prune:
        _prune(args)
    else:
        from lorakit.verbs.cache import usage

        folder, found = usage(args.folder)
        print(f"{printable(folder)}: {found.entries:,} entries, {size(found.bytes)} in {found.shards:,} files")
        if found.other_bytes:
            print(f"and {size(found.other_bytes)} of copied tables and of what is remembered of pictures")


def _fill(args: argparse.Namespace) -> None:
    from lorakit.core.quiet import quiet_libraries

    quiet_libraries()
    from lorakit.core.processes import rank
    from lorakit.recipe import load_recipe

    recipe = load_recipe(args.recipe, overrides=args.overrides)
    from lorakit.verbs.cache import fill

    done = fill(recipe)
    if rank() == 0:
        print(f"pictures: {_filled(done.pictures, 'crops are random or data.cache_latents is off')}")
        print(f"captions: {_filled(done.captions, 'the text encoder is trained')}")
        print(f"The cache: {printable(done.folder)}")


def _filled(filled: "Filled | None", why_not: str) -> str:
    if filled is None:
        return f"encoded in every step, for {why_not}"
    return f"{filled.made:,} encoded, {filled.found:,} were there"


def _prune(args: argparse.Namespace) -> None:
    from lorakit.verbs.cache import prune

    days = _DAYS if args.unused_for is None else args.unused_for
    folder, removed = prune(args.folder, days=days, dry_run=args.dry_run)
    verb = "would be deleted" if args.dry_run else "deleted"
    damaged = f", {removed.damaged:,} of them damaged" if removed.damaged else ""
    copies = f", {removed.copies:,} copies of tables" if removed.copies else ""
    half = f", and {removed.leftovers:,} half-written" if removed.leftovers else ""
    print(
        f"{printable(folder)}: {removed.shards:,} files unused for {days:g} days{damaged}{copies}{half} {verb}: "
        f"{size(removed.bytes)}"
    )
