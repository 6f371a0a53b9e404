"""Trains an adapter from a recipe, or goes on with a run.

  lorakit train RECIPE [section.key=value …]
  lorakit train --resume RUN [section.key=value …]
  lorakit train RECIPE --dry-run

Several processes: accelerate launch --num_processes N -m lorakit train RECIPE
"""

import argparse
from pathlib import Path

from lorakit.core.errors import InputError
from lorakit.core.files import printable

HELP = "train an adapter from a recipe, or go on with a run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="a recipe (TOML)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the recipe's")
    parser.add_argument("--resume", metavar="RUN", type=Path, help="go on where the run in this folder stopped")
    parser.add_argument(
        "--allow-change", metavar="KEY", action="append", default=[], help="let --resume change this setting"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="one step on the largest bucket: whether it fits, how long it takes"
    )


def run(args: argparse.Namespace) -> None:
    overrides = list(args.overrides)
    if args.resume is not None and args.dry_run:
        raise InputError(
            "--dry-run and --resume: keep one of them. A dry run of a run's recipe: train RUN/recipe.toml."
        )
    if args.allow_change and args.resume is None:
        raise InputError("--allow-change is for --resume: in a new run, change the recipe.")
    if args.resume is not None:
        first = [] if args.recipe is None else [args.recipe]
        if first and "=" not in args.recipe:
            raise InputError(
                f"--resume goes on with the run's own recipe: leave {printable(args.recipe)} out; single settings are "
                "given as section.key=value."
            )
        overrides = [*first, *overrides]
    elif args.recipe is None:
        raise InputError("Give a recipe, `lorakit train RECIPE`, or a run to go on with, `lorakit train --resume RUN`.")
    from lorakit.core.quiet import quiet_libraries

    quiet_libraries()
    from lorakit.core.processes import rank

    if args.resume is not None:
        from lorakit.verbs.train import resume

        result = resume(args.resume, overrides=overrides, allow=args.allow_change)
    else:
        from lorakit.recipe import load_recipe

        recipe = load_recipe(args.recipe, overrides=overrides)
        from lorakit.verbs.train import dry_run, train

        if args.dry_run:
            lines = dry_run(recipe)
            if rank() == 0:
                print("\n".join(lines))
            return
        result = train(recipe)
    if rank() == 0:
        done = "nothing was left to do" if result.loss is None else f"{result.seconds:.0f} s"
        print(f"Step {result.steps} reached, {done}. The adapter: {result.adapter}")
