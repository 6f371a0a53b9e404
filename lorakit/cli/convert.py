"""Changes an adapter file's format, verified: what export does, for files.

lorakit convert mascot.safetensors --base embedded --to diffusers --out mascot-diffusers.safetensors
"""

import argparse
from pathlib import Path

from lorakit.cli import export

HELP = "change an adapter file's format, verified"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="FILE", type=Path, help="an adapter file or peft folder")
    parser.add_argument("--to", dest="format", metavar="FORMAT", required=True, choices=export.FORMATS)
    export.add_common(parser)
    parser.set_defaults(step=None)


run = export.run
