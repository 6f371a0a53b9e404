"""What memory a training takes on the CPU: of its step, with each setting that saves some, and of its parts.

`settings`: the dry step on the largest bucket, each row in a fresh process: resident before and at its highest, the
operations of its products and convolutions, and CPU seconds. `parts`: one step of a training: resident when the model
has been read, in the step, and at most while the adapter is verified, as it is and with all parts of the model kept and
read. `estimate`: what the dry step says, by which `run.fit` goes, beside what the first steps of a training without one
take, in another process; and the most until then, reading and caching too.

    OMP_NUM_THREADS=1 python scripts/bench/memory.py settings parts --shape sd-small --json build/memory.json
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # this folder holds a profile.py, which is not the standard library's
    sys.path[0] = str(Path(__file__).parents[1])

from bench import shapes
from bench.meter import peak_bytes

MIB = 2**20
CHECKPOINTS = "run.gradient_checkpointing=true"
ROWS = [
    (),
    ("run.gradient_checkpointing=0.25",),
    ("run.gradient_checkpointing=0.5",),
    (CHECKPOINTS,),
    ("run.batch_size=1", "run.accumulate=4"),
    ("run.gradient_checkpointing=0.5", "run.batch_size=1", "run.accumulate=4"),
    (CHECKPOINTS, "run.batch_size=1", "run.accumulate=4"),
    ('model.quantize="int8"',),
    ('model.quantize="nf4"',),
    (CHECKPOINTS, "run.batch_size=1", "run.accumulate=4", 'model.quantize="nf4"'),
]


def resident() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def step(file: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """What the dry step of this recipe takes."""
    from torch.utils.flop_counter import FlopCounterMode

    from lorakit.recipe import load_recipe
    from lorakit.training.dry import dry_step
    from lorakit.verbs import train

    found: dict[str, Any] = {}

    def measured(*args: Any, **options: Any) -> Any:
        found["before"], started = resident(), time.process_time()
        report = dry_step(*args, **{**options, "allowed": 1 << 60})  # its own peak, and not that of loading
        found.update(peak=report.peak_bytes, seconds=(time.process_time() - started) / options["passes"])
        with FlopCounterMode(display=False) as counter:
            dry_step(*args, **{**options, "passes": 1})
        found["operations"] = counter.get_total_flops()
        return report

    train.dry_step = measured  # type: ignore[assignment]
    train.dry_run(load_recipe(file, overrides=list(overrides)))
    return found


def parts(file: Path, *, all_kept: bool) -> dict[str, Any]:
    """What the parts of a training of one step take; `all_kept`: no part of the model is freed or left unread."""
    from lorakit import families
    from lorakit.core.memory import forget_peak
    from lorakit.export import adapter
    from lorakit.families import base, source
    from lorakit.recipe import load_recipe
    from lorakit.training import loop
    from lorakit.verbs import train

    found: dict[str, Any] = {}

    def noting(
        name: str, function: Callable[..., Any], *, after: bool = False, peak: bool = False
    ) -> Callable[..., Any]:
        def noted(*args: Any, **options: Any) -> Any:
            if peak:
                forget_peak()
            elif not after:
                found[name] = resident()
            result = function(*args, **options)
            if after:
                found[name] = peak_bytes() if peak else resident()
            return result

        return noted

    families.load_settings = noting("read", families.load_settings, after=True)
    loop.run_step = noting("step", loop.run_step)  # type: ignore[assignment]
    adapter.write_verified = noting("verified", adapter.write_verified, after=True, peak=True)
    if all_kept:
        whole = base.Frozen.stock_pipeline
        source.later = lambda names: contextlib.nullcontext()
        base.Frozen.stock_pipeline = lambda self, without=(): whole(self)  # type: ignore[method-assign]
    train.train(load_recipe(file, overrides=["run.steps=1", "run.check_model=false"]))
    return found


def estimated(file: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """What the dry step says of this recipe."""
    from lorakit.recipe import load_recipe
    from lorakit.training.dry import dry_step
    from lorakit.verbs import train

    found: dict[str, Any] = {}

    def measured(*args: Any, **options: Any) -> Any:
        report = dry_step(*args, **{**options, "passes": 1, "allowed": 1 << 60})
        found["estimate"] = report.peak_bytes
        return report

    train.dry_step = measured  # type: ignore[assignment]
    train.dry_run(load_recipe(file, overrides=list(overrides)))
    return found


def stepped(file: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """What the first steps take where there was no dry step."""
    from lorakit.core.memory import forget_peak
    from lorakit.data.loader import Loader
    from lorakit.recipe import load_recipe
    from lorakit.training import loop
    from lorakit.training.keeper import Keeper
    from lorakit.verbs import train

    found: dict[str, Any] = {}
    step = loop.run_step

    def noted(*args: Any, **options: Any) -> Any:
        if not found:
            found["before"] = peak_bytes()
            forget_peak()
        return step(*args, **options)

    def finish(keeper: Any, step: int) -> Path:
        found["steps"] = peak_bytes()
        return Path(keeper.output)

    loop.run_step = noted  # type: ignore[assignment]
    Keeper.finish = finish  # type: ignore[method-assign]
    Loader.is_largest = lambda self, step: True  # type: ignore[method-assign]
    train.train(load_recipe(file, overrides=["run.check_model=false", "run.steps=3", *overrides]))
    return found


def one(what: str, file: Path, words: Sequence[str]) -> dict[str, Any]:
    """What is measured in a process of its own."""
    if what == "settings":
        return step(file, words)
    if what == "parts":
        return parts(file, all_kept=words == ["True"])
    if what in ("estimated", "stepped"):
        return estimated(file, words) if what == "estimated" else stepped(file, words)
    from lorakit.recipe import load_recipe
    from lorakit.verbs import cache

    cache.fill(load_recipe(file))
    return {}


def in_a_process(*words: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "one", *words]
    lines = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout.splitlines()
    return json.loads(lines[-1])  # type: ignore[no-any-return]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=("settings", "parts", "estimate"))
    parser.add_argument("--shape", choices=shapes.SHAPES, default="sd-small")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--set", action="append", default=[], help="a setting of the recipe, for `estimate`")
    parser.add_argument("--json", type=Path, help="a file for all that was measured")
    args = parser.parse_args(arguments)
    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="lorakit-memory-") as temporary:
        folder = Path(temporary)

        def fresh(i: int) -> str:
            file, cache = folder / f"run{i}.toml", folder / "cache"
            made = shapes.recipe(args.shape, file, bases=folder, cache=cache, count=args.batch, batch=args.batch)
            return str(made)

        in_a_process("cache", fresh(-1))  # so that no row fills it
        if "settings" in args.what:
            print("| settings | resident before | at its highest | operations | CPU time |\n|" + " --- |" * 5)
            measured["settings"] = {}
            for i, row in enumerate(ROWS):
                found = measured["settings"][" ".join(row)] = in_a_process("settings", fresh(i), *row)
                label = ", ".join(f"`{word}`" for word in row) or "none"
                sizes = f"{found['before'] / MIB:.0f} MiB | {found['peak'] / MIB:.0f} MiB"
                work = f"{found['operations'] / 1e9:.1f} G | {found['seconds']:.2f} s"
                print(f"| {label} | {sizes} | {work} |", flush=True)
        if "parts" in args.what:
            print("| model | read | in a step | verifying |\n| --- | --- | --- | --- |")
            measured["parts"] = {}
            for i, label in enumerate(("all parts kept and read", "as it is")):
                found = measured["parts"][label] = in_a_process("parts", fresh(100 + i), str(not i))
                sizes = " | ".join(f"{found[name] / MIB:.0f} MiB" for name in ("read", "step", "verified"))
                print(f"| {label} | {sizes} |", flush=True)
        if "estimate" in args.what:
            print("| settings | the dry step | the first steps | ratio | until then |\n|" + " --- |" * 5)
            said = in_a_process("estimated", fresh(200), *args.set)
            took = in_a_process("stepped", fresh(201), *args.set)
            found = measured["estimate"] = {**said, **took, "ratio": said["estimate"] / took["steps"]}
            sizes = [f"{found[name] / MIB:.0f} MiB" for name in ("estimate", "steps", "before")]
            label = ", ".join(f"`{word}`" for word in args.set) or "none"
            print(f"| {label} | {sizes[0]} | {sizes[1]} | {found['ratio']:.3f} | {sizes[2]} |", flush=True)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"shape": args.shape, "at": time.time(), **measured}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "one":
        what, file, *words = sys.argv[2:]
        print(json.dumps(one(what, Path(file), words)))
        sys.exit(0)
    sys.exit(main())
