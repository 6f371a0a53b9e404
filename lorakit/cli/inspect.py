"""Says what is in an adapter file; needs no model.

lorakit inspect mascot.safetensors
"""

import argparse
from pathlib import Path

from lorakit.core.files import printable

HELP = "look into an adapter file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="an adapter file or a peft folder")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> None:
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
