"""Draws pictures from a base with adapters.

  lorakit sample embedded --adapter runs/mascot/adapter.safetensors:0.8 --prompt "a zorp on a blue background" --out p
  lorakit sample embedded --prompt "a red circle" --image room.png --strength 0.7 --out p
  lorakit sample embedded --prompt "a red circle" --image room.png --mask place.png --out p
  lorakit sample embedded --prompt "a red circle" --upscale 2 --out p
  accelerate launch … -m lorakit sample …                several processes, each picture once

--prompt may be given several times; the n-th picture takes the seed --seed + n. A file of --prompts is TOML, with seed,
size and negative prompt for each where they differ:

  [[prompts]]
  prompt = "a zorp on grass"
  negative_prompt = "red"
  seed = 7
  width = 72
  height = 56

A weight may be several numbers, for parts of the model: 0.8,text_encoder=0,unet.up_blocks=1.2 (see lorakit merge).
Every PNG file says in its text how it was drawn.
"""

import argparse
import re
from pathlib import Path

from lorakit.core.errors import InputError
from lorakit.core.files import printable

HELP = "draw pictures from a base with adapters"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "base", metavar="BASE", help='a diffusers folder, a hub name, "embedded", or one .safetensors file'
    )
    parser.add_argument("--adapter", metavar="FILE[:WEIGHT]", action="append", default=[], help="may be repeated")
    parser.add_argument("--prompt", action="append", default=[], help="may be repeated")
    parser.add_argument("--prompts", metavar="FILE", type=Path, help="a TOML file of prompts, see above")
    parser.add_argument("--count", type=int, default=1, help="pictures of each prompt (default 1)")
    parser.add_argument("--negative", default="", help="what the guidance leads away from")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture (default 0)")
    parser.add_argument("--size", metavar="WxH", help="pixels (default: the model's own size, or that of --image)")
    parser.add_argument("--image", metavar="FILE", type=Path, help="a picture to draw over")
    parser.add_argument("--mask", metavar="FILE", type=Path, help="draw only what is white in this picture")
    parser.add_argument("--upscale", metavar="N", type=int, help="enlarge N times and draw over")
    parser.add_argument("--strength", type=float, help="how much of a picture is drawn anew, 0 to 1")
    parser.add_argument(
        "--image-guidance", type=float, help="how close an editing model keeps to --image (its own: 1.5)"
    )
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default 20)")
    parser.add_argument("--guidance", type=float, default=5.0, help="scale of classifier-free guidance (default 5)")
    parser.add_argument("--config", metavar="PATH", help="beside a single file: a diffusers folder of such a model")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="default auto")
    parser.add_argument("--family", help="the base's model family (default: as its folder says)")
    parser.add_argument("--assume-alpha", type=float, help="alpha of adapter files that hold none")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")


def run(args: argparse.Namespace) -> None:
    width, height = None, None
    if args.size is not None:
        match = re.fullmatch(r"(\d+)x(\d+)", args.size)
        if not match or "0" in match.groups():
            raise InputError(f"--size {printable(args.size)}: write width and height in pixels, like 512x768.")
        width, height = int(match[1]), int(match[2])
    problems = [f"{name} must be at least 1." for name in ("--steps", "--count") if getattr(args, name[2:]) < 1]
    if not args.prompt and args.prompts is None:
        problems.append("nothing to draw: give --prompt or --prompts.")
    if args.upscale is not None and args.upscale < 2:
        problems.append(f"--upscale {args.upscale}: give a whole number from 2 on.")
    if args.assume_alpha is not None and not args.adapter:
        problems.append("--assume-alpha is for adapter files: give --adapter too.")
    if problems:
        raise InputError(problems)
    from lorakit.cli.merge import adapter_of
    from lorakit.core.processes import rank
    from lorakit.sampling.prompts import Prompt, read_prompts, requests_for
    from lorakit.verbs.sample import sample

    prompts = [Prompt(prompt=prompt) for prompt in args.prompt]
    prompts += read_prompts(args.prompts) if args.prompts is not None else []
    files = sample(
        args.base,
        [adapter_of(adapter) for adapter in args.adapter],
        wanted=requests_for(
            prompts, count=args.count, seed=args.seed, negative_prompt=args.negative, width=width, height=height
        ),
        out=args.out,
        steps=args.steps,
        guidance=args.guidance,
        family=args.family,
        assume_alpha=args.assume_alpha,
        image=args.image,
        mask=args.mask,
        strength=args.strength,
        image_guidance=args.image_guidance,
        upscale=args.upscale or 1,
        config=args.config,
        precision=args.precision,
    )
    for file in files if rank() == 0 else ():
        print(file)
