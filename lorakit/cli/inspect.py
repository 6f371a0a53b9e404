"""Says what is in an adapter file, or which timesteps a recipe trains; needs no model's weights.

lorakit inspect mascot.safetensors
lorakit inspect --timesteps RECIPE [section.key=value …] [--out timesteps.png]
"""

import argparse
from pathlib import Path

from lorakit.core.errors import InputError
from lorakit.core.files import printable

HELP = "look into an adapter file, or at a recipe's timesteps"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="an adapter file or a peft folder")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument(
        "--timesteps", action="store_true", help="FILE is a recipe: how often and how much each t counts"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for --timesteps, as in training")
    parser.add_argument("--out", metavar="PNG", type=Path, help="for --timesteps: draw them into this file")


def run(args: argparse.Namespace) -> None:
    if args.timesteps:
        _timesteps(args)
        return
    if args.overrides or args.out:
        raise InputError("section.key=value and --out go with --timesteps: leave them out.")
    from lorakit.export.survey import inspect_adapter

    found = inspect_adapter(args.file)
    if args.json:
        import json

        print(json.dumps(found.to_json(), indent=2))
        return
    print(f"{printable(args.file)}: {found.format} format, {found.kind}, {found.dtype}, {found.modules} layers")
    for name, part in found.components.items():
        ranks = ", ".join(f"{r} ({n} layers)" if len(part.ranks) > 1 else str(r) for r, n in part.ranks.items())
        alphas = ", ".join("none stored" if alpha is None else f"{alpha:g}" for alpha in part.alphas)
        title = printable(name) or "one component"
        print(f"  {title}: {part.layers} layers, rank {ranks}, alpha {alphas}, norm {part.norm:.4g}")
    for key in found.odd:
        print(f"  not understood: {printable(key)}")
    for key, value in sorted(found.metadata.items()):
        text = printable(value)
        print(f"  {printable(key)} = {text if len(text) <= 100 else text[:97] + '…'}")


def _timesteps(args: argparse.Namespace) -> None:
    """Bars of the recipe's law and weighting, and a picture where one is asked for."""
    import io
    import json
    import sys
    from dataclasses import asdict

    from lorakit.core.files import write_bytes
    from lorakit.core.quiet import quiet_libraries
    from lorakit.recipe import load_recipe
    from lorakit.verbs.timesteps import chart, emphasis, lines

    quiet_libraries()
    if args.out and args.out.suffix.lower() != ".png":
        raise InputError(f"--out {printable(args.out)}: the picture is a PNG: name it so.")
    found = emphasis(load_recipe(args.file, overrides=args.overrides))
    if args.json:
        print(json.dumps(asdict(found), indent=2))
    else:
        solid = "█" if (sys.stdout.encoding or "").lower().startswith("utf") else "#"
        print("\n".join(lines(found, solid=solid)))
    if args.out:
        buffer = io.BytesIO()
        chart(found, title=printable(args.file.name)).save(buffer, "PNG")
        write_bytes(args.out, buffer.getvalue())
        print(f"Written: {printable(args.out)}", file=sys.stderr if args.json else sys.stdout)
