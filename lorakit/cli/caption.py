"""Writes captions for the pictures of a folder, into a text file beside each.

  lorakit caption photos --model Salesforce/blip-image-captioning-large
  lorakit caption photos --model HuggingFaceTB/SmolVLM-Instruct --style detailed --dtype bf16
  lorakit caption photos --model SmilingWolf/wd-vit-tagger-v3 thresholds.general=0.4
  lorakit caption photos --template "a photo of {folder}, {exif.Artist=nobody}"
  lorakit caption photos --recipe captions.toml          settings in a file (TOML)
  accelerate launch -m lorakit caption photos …          several processes, each picture once

What has captions already stays as it is. A run that was stopped goes on with the same command. Every setting of
docs/captions.md may stand in the file or, as key=value, on the command line. It ends with 2 where pictures could not be
captioned, and names them.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from lorakit.core.errors import InputError
from lorakit.core.files import printable

HELP = "write captions for a folder of pictures"

_GIVEN = ("kind", "model", "template", "prefix", "suffix", "dtype", "quantize", "trigger", "max_tokens", "temperature")
_WHOLE = ("batch_size", "captions")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", type=Path, help="a folder of pictures")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="further settings")
    parser.add_argument("--model", metavar="NAME_OR_PATH", help="a vision-language model or tagger: folder or hub name")
    parser.add_argument("--template", metavar="TEXT", help='a text with fields, like "a photo of {folder}"')
    parser.add_argument("--recipe", metavar="FILE", type=Path, help="a TOML file of settings")
    parser.add_argument("--kind", help="the kind of writer (default: as the model's folder says)")
    parser.add_argument("--style", action="append", help="tags, short, detailed or subject; each gives a caption")
    parser.add_argument("--prompt", action="append", help="what the model is asked, in the place of a style")
    parser.add_argument("--trigger", metavar="WORD", help="the subject's name, for --style subject")
    parser.add_argument("--combine", metavar="MODEL", nargs="?", const="", help="tags behind, by the same or a model")
    parser.add_argument("--prefix", help="put before every caption")
    parser.add_argument("--suffix", help="put behind every caption")
    parser.add_argument("--replace", metavar=("A", "B"), nargs=2, action="append", help="B in the place of A")
    parser.add_argument("--regex", action="store_true", default=None, help="A is a regular expression")
    parser.add_argument("--max-tokens", metavar="N", type=int, help="so many at most in a caption")
    parser.add_argument("--captions", metavar="N", type=int, help="so many for each picture, with --temperature")
    parser.add_argument("--temperature", metavar="T", type=float, help="draw words instead of taking the likeliest")
    parser.add_argument("--dtype", help="fp32, bf16 or fp16 (default: as the device computes best)")
    parser.add_argument("--quantize", metavar="BITS", help="8bit or 4bit weights, by bitsandbytes")
    parser.add_argument("--batch-size", metavar="N", type=int, help="pictures at a time, on each process")
    parser.add_argument("--overwrite", action="store_true", help="write over captions; they are kept in an undo file")


def run(args: argparse.Namespace) -> None:
    from lorakit.captioning import read_settings, validate_settings
    from lorakit.recipe import apply_override

    values = read_settings(args.recipe) if args.recipe is not None else {}
    values |= _given(args)
    if args.combine:
        values["combine"] = {"model": args.combine}
    elif args.combine is not None:  # the same model once more, which is loaded once
        same = {name: values[name] for name in ("model", "dtype", "quantize", "batch_size") if name in values}
        values["combine"] = {**same, "styles": ["tags"]}
    for override in args.overrides:
        apply_override(values, override)
    writers = validate_settings(values)
    from lorakit.core.processes import rank
    from lorakit.verbs.caption import caption

    done = caption(args.folder, writers, overwrite=args.overwrite)
    if rank() != 0:
        return  # a launcher would end the first process, which has yet to say what is wrong, when another ends with 2
    there = f", {done.there:,} had some already" if done.there else ""
    print(f"{printable(args.folder)}: captions of {done.written:,} pictures written{there}")
    if done.empty:
        more = f" and {len(done.empty) - 5:,} more" if len(done.empty) > 5 else ""
        print(
            f"Empty text files, which training refuses: {', '.join(map(printable, done.empty[:5]))}{more}. "
            "Write a caption into them, or remove them, or add --overwrite."
        )
    if done.undo is not None:
        print(f"What was written over: {printable(done.undo)} (lorakit captions DIR --undo)")
    sys.stdout.flush()  # before the message that comes on stderr
    if done.problems:
        raise InputError([*done.problems])


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that stand on the command line by names of their own."""
    names = {name: name for name in (*_GIVEN, *_WHOLE, "replace", "regex")} | {"style": "styles", "prompt": "prompts"}
    return {name: getattr(args, word) for word, name in names.items() if getattr(args, word) is not None}
