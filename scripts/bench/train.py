"""How long lorakit trains, and how much of that is not the step itself: beside the floor (floor.py), in the same run.

`steps`: steps of both alternate inside one process: the same model, the same layers adapted, the same batches.
`start`: from the start of the process to the end of the first step, with an empty and with a full cache, and the most
memory up to the third; the floor's script and ours take turns, each in a fresh process.
`help`: `lorakit --help`.  `beside`: another program's step and start-up, from runs of one step and of many.

    OMP_NUM_THREADS=1 python scripts/bench/train.py steps start help --json build/bench.json
    … steps --set adapter.fused=false --set run.gradient_checkpointing=true        a row for each of these settings
    … steps --shape sd15 --pairs 10 --batch 1
    … beside --command "accelerate launch train.py --max_train_steps {steps}"

CPU seconds are those of the whole tree of processes. A ratio is the median over the pairs, and the range in which the
true median lies with 95 % confidence. Where there is a GPU, both sides train on it in bf16, the seconds of a step are
the clock's, and memory is the GPU's.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # this folder holds a profile.py, which is not the standard library's
    sys.path[0] = str(Path(__file__).parents[1])

from bench import shapes
from bench.meter import Ratio, cpu_seconds, peak_bytes, ratio

WARM = 2  # first pairs that are left out
FLOOR = Path(__file__).with_name("floor.py")


class Enough(Exception):
    """All that was to be measured is measured: the run need not go on to its end."""


def clock() -> float:
    """Seconds that count: of the CPU, or, where a GPU works, of the clock."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return cpu_seconds()


# -- steps -----------------------------------------------------------------------------------------------------------


def floor_steps(trainee: Any, batches: Sequence[Any]) -> Iterator[None]:
    """The floor on a copy of the `trainee`'s model, of the same adapted layers, and on its batches in turn."""
    from bench import floor

    from lorakit import families
    from lorakit.adapters import state

    ours = trainee.family
    family = families.load(ours.name, str(ours.path))
    family.to(trainee.device, ours.dtype)
    targets = [path for path, _ in state.adapter_layers(trainee.adapted[ours.backbone])]
    trained = floor.adapted(family.components[ours.backbone], targets, rank=shapes.RANK)
    assert sum(p.numel() for p in trained) == sum(p.numel() for p in trainee.parameters.values())

    def inputs(step: int) -> tuple[Any, ...]:
        batch = batches[step % len(batches)]
        return batch.latents, batch.noise, (batch.quantile * 1000).long(), batch.text

    def add_noise(latents: Any, noise: Any, t: Any) -> Any:
        share = (t / 1000).view(-1, 1, 1, 1).to(latents)
        return (1 - share).sqrt() * latents + share.sqrt() * noise

    return floor.steps(family.predict, trained, inputs, add_noise)


def interleaved(recipe: Any, *, pairs: int) -> tuple[list[float], list[float]]:
    """(ours, the floor's) seconds of steps that alternate; ours with all that the loop does between two steps."""
    import lorakit.verbs.train as verb
    from lorakit.training.step import on_device

    ours: list[float] = []
    floors: list[float] = []
    run_loop = verb.run_loop

    def alternating(trainee: Any, plans: Iterator[Any]) -> Iterator[Any]:
        first = next(plans)
        floor = floor_steps(trainee, [on_device(batch, trainee.device) for batch in first.batches])
        started = clock()
        yield first
        for plan in plans:
            ours.append(clock() - started)
            started = clock()
            next(floor)
            floors.append(clock() - started)
            if len(ours) == pairs + WARM:
                raise Enough
            started = clock()  # the next batch is taken when this generator is asked again, so its time is ours
            yield plan

    verb.run_loop = lambda trainee, plans, **rest: run_loop(trainee, alternating(trainee, plans), **rest)
    try:
        verb.train(recipe)
    except Enough:
        return ours[WARM:], floors[WARM:]
    finally:
        verb.run_loop = run_loop
    raise AssertionError("the run ended too early")


def measure_steps(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    from lorakit.recipe import load_recipe

    rows = []
    for number, words in enumerate(args.set or [""]):
        said = ["run.check_model=false", f"run.steps={args.pairs + WARM + 1}", *shlex.split(words)]
        recipe = load_recipe(written(args, folder, f"steps-{number}"), overrides=said)
        ours, floors = interleaved(recipe, pairs=args.pairs)
        found = ratio(ours, floors)
        a, b = statistics.median(ours), statistics.median(floors)
        rows.append(
            {"settings": words, "ours": a, "floor": b, "ratio": asdict(found), "images_per_second": args.batch / a}
        )
        print(
            f"| {args.shape} | {words or 'as they are'} | {b:.3f} s | {a:.3f} s | {found} | {found.pairs} |", flush=True
        )
    return rows


# -- start-up --------------------------------------------------------------------------------------------------------


def written(args: argparse.Namespace, folder: Path, name: str, *, cache: str = "cache") -> Path:
    """The recipe of a run of that name."""
    side = shapes.SHAPES[args.shape].side
    return shapes.recipe(
        folder / f"{name}.toml",
        base=shapes.base(args.shape, args.bases or folder),
        photos=shapes.photos(folder, side=side, count=args.photos),
        cache=folder / cache,
        side=side,
        batch=args.batch,
    )


def third_step(recipe: str, overrides: Sequence[str]) -> None:
    """`lorakit train` up to its third step, and what it took; run in a process of its own."""
    import lorakit.verbs.train as verb
    from lorakit.cli.main import main as lorakit

    run_loop = verb.run_loop

    def watched(plans: Iterator[Any]) -> Iterator[Any]:
        spent = 0.0
        for number, plan in enumerate(plans):
            spent = cpu_seconds() if number == 1 else spent
            if number == 3:
                print(json.dumps({"cpu_seconds": spent, "peak_bytes": peak_bytes()}), flush=True)
                os._exit(0)
            yield plan

    verb.run_loop = lambda trainee, plans, **rest: run_loop(trainee, watched(plans), **rest)
    lorakit(["train", recipe, *overrides])


def measure_start(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    side, own = str(shapes.SHAPES[args.shape].side), [sys.executable, __file__, "third-step"]
    found: dict[str, list[dict[str, float]]] = {"floor": [], "empty cache": [], "full cache": []}
    for number in range(args.rounds):
        empty = written(args, folder, f"empty-{number}", cache=f"cache-{number}")
        full = written(args, folder, f"full-{number}", cache=f"cache-{number}")
        base, photos = (
            shapes.base(args.shape, args.bases or folder),
            shapes.photos(folder, side=int(side), count=args.photos),
        )
        floor = [sys.executable, str(FLOOR), str(base), str(photos), "--side", side, "--batch", str(args.batch)]
        words = [word for words in args.set or [] for word in shlex.split(words)]
        for name, command in (
            ("floor", floor),
            ("empty cache", [*own, str(empty), *words]),
            ("full cache", [*own, str(full), *words]),
        ):
            found[name].append(answer(command))
    rows = []
    for name in ("empty cache", "full cache"):
        row: dict[str, Any] = {"what": name}
        for key in ("cpu_seconds", "peak_bytes"):
            ours, others = ([one[key] for one in found[side]] for side in (name, "floor"))
            row[key] = {"ours": statistics.median(ours), "floor": statistics.median(others)}
            row[key]["ratio"] = asdict(ratio(ours, others))
        rows.append(row)
        cpu, peak = (f"{Ratio(**row[key]['ratio'])}" for key in ("cpu_seconds", "peak_bytes"))
        seconds = " | ".join(f"{row['cpu_seconds'][side]:.1f} s" for side in ("floor", "ours"))
        memory = " | ".join(f"{row['peak_bytes'][side] / 2**20:.0f} MiB" for side in ("floor", "ours"))
        print(f"| {args.shape} | {name} | {seconds} | {cpu} | {memory} | {peak} |", flush=True)
    return rows


def answer(command: Sequence[str]) -> dict[str, float]:
    """The last line of what `command` says, as JSON."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


# -- other programs --------------------------------------------------------------------------------------------------


def spent_by(command: Sequence[str]) -> float:
    """CPU seconds of a command and all that it starts and waits for."""
    before = os.times()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def measure_help(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    seconds = [spent_by([sys.executable, "-m", "lorakit", "--help"]) for _ in range(5)]
    print(f"lorakit --help: {statistics.median(seconds):.2f} s of CPU ({min(seconds):.2f} … {max(seconds):.2f})")
    return [{"cpu_seconds": seconds}]


def measure_beside(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A step is what a run of some steps costs more than one of a single step."""
    rows = []
    for text in args.command:
        few, many = (
            [spent_by(shlex.split(text.replace("{steps}", str(steps)))) for _ in range(args.rounds)]
            for steps in (1, args.pairs + 1)
        )
        each = (statistics.median(many) - statistics.median(few)) / args.pairs
        rows.append({"command": text, "one_step": few, "all_steps": many, "a_step": each})
        print(f"| {text} | {statistics.median(few):.1f} s with one step | {each:.3f} s a step more |", flush=True)
    return rows


MEASURES = {"steps": measure_steps, "start": measure_start, "help": measure_help, "beside": measure_beside}


def main(arguments: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["third-step"]:
        third_step(words[1], words[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=MEASURES)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="sd-small")
    parser.add_argument("--pairs", type=int, default=40, help="of steps (beside: steps)")
    parser.add_argument("--rounds", type=int, default=3, help="of start-ups")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--photos", type=int, default=32)
    parser.add_argument(
        "--set", action="append", metavar="WORDS", help="settings of the recipe, as on the command line"
    )
    parser.add_argument("--command", action="append", default=[], help="another program, {steps} is how many it does")
    parser.add_argument("--bases", type=Path, help="keep the bases that are made here")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="lorakit-bench-") as folder:
        found = {what: MEASURES[what](args, Path(folder)) for what in args.what}
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"shape": args.shape, "batch": args.batch, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
