"""Draws pictures from a base with adapters.

  lorakit sample embedded --adapter runs/mascot/adapter.safetensors:0.8 --prompt "a zorp on a blue background"

--prompt may be given several times; the n-th prompt takes the seed --seed + n.
"""

import argparse
import re
from pathlib import Path

from lorakit.core.errors import InputError
from lorakit.core.files import printable

HELP = "draw pictures from a base with adapters"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help='a diffusers folder, a hub name, or "embedded"')
    parser.add_argument("--adapter", metavar="FILE[:WEIGHT]", action="append", default=[], help="may be repeated")
    parser.add_argument("--prompt", action="append", required=True, help="may be repeated")
    parser.add_argument("--negative", default="", help="what the guidance leads away from")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first prompt (default 0)")
    parser.add_argument("--size", metavar="WxH", help="pixels (default: the model's own size)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default 20)")
    parser.add_argument("--guidance", type=float, default=5.0, help="scale of classifier-free guidance (default 5)")
    parser.add_argument("--family", help="the base's model family")
    parser.add_argument("--assume-alpha", type=float, help="alpha of adapter files that hold none")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")


def run(args: argparse.Namespace) -> None:
    width, height = None, None
    if args.size is not None:
        match = re.fullmatch(r"(\d+)x(\d+)", args.size)
        if not match or "0" in match.groups():
            raise InputError(f"--size {printable(args.size)}: write width and height in pixels, like 512x768.")
        width, height = int(match[1]), int(match[2])
    if args.steps < 1:
        raise InputError("--steps must be at least 1.")
    from lorakit.cli.merge import weighted
    from lorakit.families import DEFAULT
    from lorakit.sampling.pictures import Request
    from lorakit.verbs.sample import sample

    wanted = [Request(prompt, args.seed + i, args.negative, width, height) for i, prompt in enumerate(args.prompt)]
    files = sample(
        args.base,
        [weighted(adapter) for adapter in args.adapter],
        wanted=wanted,
        out=args.out,
        steps=args.steps,
        guidance=args.guidance,
        family=args.family or DEFAULT,
        assume_alpha=args.assume_alpha,
    )
    for file in files:
        print(file)
