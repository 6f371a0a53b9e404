"""Says what is in an adapter file, or which timesteps a recipe trains; needs no model's weights.

lorakit inspect mascot.safetensors [--out norms.png]
lorakit inspect --diff one.safetensors other.safetensors
lorakit inspect --timesteps RECIPE [section.key=value …] [--out timesteps.png]
"""

import argparse
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.core.errors import InputError
from lorakit.core.files import printable

if TYPE_CHECKING:
    from PIL.Image import Image

    from lorakit.export.survey import Survey

HELP = "look into an adapter file, or at a recipe's timesteps"
_LISTED = 20  # of a list


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", nargs="?", type=Path, help="an adapter file, a peft folder or a run")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument(
        "--timesteps", action="store_true", help="FILE is a recipe: how often and how much each t counts"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for --timesteps, as in training")
    parser.add_argument("--diff", metavar=("A", "B"), nargs=2, type=Path, help="how far two adapters are apart")
    parser.add_argument("--base", metavar="PATH", help="for --diff: their model, whose names formats spell otherwise")
    parser.add_argument("--out", metavar="PNG", type=Path, help="draw what is found into this file")


def run(args: argparse.Namespace) -> None:
    if args.out and args.out.suffix.lower() != ".png":
        raise InputError(f"--out {printable(args.out)}: the picture is a PNG: name it so.")
    if (args.file is None) == (args.diff is None):
        raise InputError("give one FILE, or --diff and two of them.")
    if args.base is not None and args.diff is None:
        raise InputError("--base goes with --diff: leave it out.")
    if args.timesteps and args.file is not None:
        _timesteps(args)
    elif args.overrides or args.timesteps:
        raise InputError("section.key=value goes with --timesteps and a recipe: leave it out.")
    elif args.diff is not None:
        _diff(args)
    else:
        _adapter(args)


def _adapter(args: argparse.Namespace) -> None:
    if args.file.suffix == ".toml":
        raise InputError(f"{printable(args.file)} is a recipe: say --timesteps to see those that it trains.")
    from lorakit.export.adapter import source_of
    from lorakit.export.heat import heat_map
    from lorakit.export.survey import inspect_adapter

    args.file = source_of(args.file)
    found = inspect_adapter(args.file)
    print(json.dumps(found.to_json(), indent=2, allow_nan=False) if args.json else "\n".join(_lines(found, args.file)))
    if args.out:
        _draw(heat_map(found, title=args.file.name), args)


def _lines(found: "Survey", file: Path) -> Iterator[str]:
    yield f"{printable(file)}: {found.format} format, {found.kind}, {found.dtype}, {found.modules} layers"
    yield f"  for models of the family {' or '.join(found.families) or 'unknown'}"
    yield (
        "  "
        + {
            "verified": "digest verified: weights and alphas are those that were written",
            "differs": "DIGEST DIFFERS: weights or alphas are not those that were written",
            "none": "no digest: whether it has changed cannot be told",
        }[found.digest]
    )
    if found.note:
        yield f"  not read: {found.note}"
    for name, part in found.components.items():
        ranks = ", ".join(f"{r} ({n} layers)" if len(part.ranks) > 1 else str(r) for r, n in part.ranks.items())
        alphas = ", ".join("none stored" if alpha is None else f"{alpha:g}" for alpha in part.alphas[:8])
        alphas += f" and {len(part.alphas) - 8} more" if len(part.alphas) > 8 else ""
        title = printable(name) or "one component"
        yield f"  {title}: {part.layers} layers, rank {ranks}, alpha {alphas}, norm {part.norm:.4g}"
        largest = max(part.blocks.values())
        for block, norm in part.blocks.items():
            bar = solid() * round(32 * norm / largest) if largest else ""
            yield f"    {block or 'outside':<18}{norm:>10.4g}  {bar}"
    for what, names in (("adds nothing", found.dead), ("not finite", found.broken), ("not understood", found.odd)):
        yield from (f"  {what}: {printable(name)}" for name in names[:_LISTED])
        if len(names) > _LISTED:
            yield f"  {what}: {len(names) - _LISTED} more"
    for key, value in sorted(found.metadata.items()):
        text = printable(value)
        yield f"  {printable(key)} = {text if len(text) <= 100 else text[:97] + '…'}"


def _diff(args: argparse.Namespace) -> None:
    from lorakit.export.adapter import source_of
    from lorakit.export.survey import compare_adapters

    if args.out:
        raise InputError("--out draws one adapter's norms, and --diff compares two: leave it out.")
    family = None
    if args.base is not None:
        from lorakit import families
        from lorakit.core.quiet import quiet_libraries

        quiet_libraries()
        family = families.outline(args.base)
    found = compare_adapters(*map(source_of, args.diff), family=family)
    if args.json:
        print(json.dumps(found.to_json(), indent=2, allow_nan=False))
        return
    apart = sorted(found.layers.items(), key=lambda item: (-item[1], item[0]))
    equal = sum(off == 0 for _, off in apart)
    differing = "; relative difference of what they add to the weights:" if equal < len(apart) else ""
    print(f"{len(apart)} layers in both, {equal} of them equal{differing}")
    if apart and not differing and not found.only_first and not found.only_second:
        print("the adapters are the same: each layer adds the same to the weights")
    for name, off in apart[:_LISTED]:
        if off:
            print(f"  {off:10.3e}  {printable(name)}")
    if len(apart) - equal > _LISTED:
        print(f"  and {len(apart) - equal - _LISTED} more, at most {apart[_LISTED][1]:.3e}: --json has all")
    for file, names in zip(args.diff, (found.only_first, found.only_second), strict=True):
        if names:
            some = ", ".join(map(printable, names[:5]))
            print(f"only in {printable(file)}: {len(names)} layers, like {some}")


def solid() -> str:
    """What bars are made of: a block where the terminal has one."""
    return "█" if (sys.stdout.encoding or "").lower().startswith("utf") else "#"


def _draw(picture: "Image", args: argparse.Namespace) -> None:
    from lorakit.core.files import write_bytes

    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_bytes(args.out, buffer.getvalue())
    print(f"Written: {printable(args.out)}", file=sys.stderr if args.json else sys.stdout)


def _timesteps(args: argparse.Namespace) -> None:
    """Bars of the recipe's law and weighting, and a picture where one is asked for."""
    from dataclasses import asdict

    from lorakit.core.quiet import quiet_libraries
    from lorakit.recipe import load_recipe
    from lorakit.verbs.timesteps import chart, emphasis, lines

    quiet_libraries()
    found = emphasis(load_recipe(args.file, overrides=args.overrides))
    if args.json:
        print(json.dumps(asdict(found), indent=2))
    else:
        print("\n".join(lines(found, solid=solid())))
    if args.out:
        _draw(chart(found, title=printable(args.file.name)), args)
