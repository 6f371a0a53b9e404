"""How long lorakit trains, and how much of that is not the step itself: beside the floor (floor.py), in the same run.

`steps`: steps of both alternate inside one process: the same model, the same layers adapted, the same batches.
`start`: from the start of the process to the end of the first step, with an empty and with a full cache, and the most
memory up to the third; the floor's script and ours take turns, each in a fresh process.
`prepare`: decoding, cropping, encoding and caching alone, of `lorakit cache`, in steps of the floor.
`help`: `lorakit --help`.
`beside`: programs beside each other, a step of each from runs of one step and of many. In a command {steps} is how many
it does, {base} the model, {photos} a folder of pictures with texts beside them, {pictures} the same with theirs in
metadata.jsonl, {side}, {batch} and {rank} what they say, {recipe} lorakit's recipe and {out} a new path each time.

    OMP_NUM_THREADS=1 python scripts/bench/train.py steps start prepare help --json build/bench.json
    … steps --set adapter.fused=false --set run.gradient_checkpointing=true        a row for each of these settings
    … steps --shape sd15 --pairs 10 --batch 1
    … beside --command "lorakit train {recipe} run.output={out} run.steps={steps}" --command "… {base} … {steps}"

CPU seconds are those of the whole tree of processes. A ratio is the median over the pairs, and the range in which the
true median lies with 95 % confidence. Where there is a GPU, both sides train on it in bf16, the seconds of a step
and of preparing are the clock's, and memory is the GPU's.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # this folder holds a profile.py, which is not the standard library's
    sys.path[0] = str(Path(__file__).parents[1])

from bench import shapes
from bench.meter import Ratio, clock, cpu_seconds, gpu_counts, peak_bytes, ratio

WARM = 2  # first pairs that are left out
FLOOR = Path(__file__).with_name("floor.py")


class Enough(Exception):
    """All that was to be measured is measured: the run need not go on to its end."""


# -- steps -----------------------------------------------------------------------------------------------------------


def floor_steps(trainee: Any, batches: Sequence[Any], *, checkpointing: bool) -> Iterator[None]:
    """The floor on the `trainee`'s base, with the same layers adapted, and on its batches in turn."""
    from bench import floor

    from lorakit.adapters import state

    ours = trainee.family
    model = floor.model(ours.path, ours.dtype)
    if checkpointing:
        model.backbone.enable_gradient_checkpointing()
    targets = [path for path, _ in state.adapter_layers(trainee.adapted[ours.backbone])]
    trained = floor.adapted(model.backbone, targets, rank=shapes.RANK)
    assert sum(p.numel() for p in trained) == sum(p.numel() for p in trainee.parameters.values())

    def inputs(step: int) -> tuple[Any, ...]:
        batch = batches[step % len(batches)]
        return batch.latents, batch.noise, batch.quantile, batch.text

    return floor.steps(model, trained, inputs)


def interleaved(recipe: Any, *, pairs: int, checkpointing: bool = False) -> tuple[list[float], list[float]]:
    """(ours, the floor's) seconds of steps that alternate; ours with all that the loop does between two steps."""
    import lorakit.verbs.train as verb
    from lorakit.core.transfer import on_device

    ours: list[float] = []
    floors: list[float] = []
    run_loop = verb.run_loop

    def alternating(trainee: Any, plans: Iterator[Any]) -> Iterator[Any]:
        first = next(plans)
        batches = [on_device(batch, trainee.device) for batch in first.batches]
        floor = floor_steps(trainee, batches, checkpointing=checkpointing)
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
        ours, floors = interleaved(recipe, pairs=args.pairs, checkpointing=args.floor_checkpointing)
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
    return shapes.recipe(
        args.shape,
        folder / f"{name}.toml",
        bases=args.bases or folder,
        cache=folder / cache,
        count=args.photos,
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


def floor_script(args: argparse.Namespace, folder: Path) -> list[str]:
    """The command of the floor from nothing."""
    side = shapes.SHAPES[args.shape].side
    base, photos = shapes.base(args.shape, args.bases or folder), shapes.photos(folder, side=side, count=args.photos)
    return [sys.executable, str(FLOOR), str(base), str(photos), "--side", str(side), "--batch", str(args.batch)]


def measure_start(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    own = [sys.executable, __file__, "third-step"]
    found: dict[str, list[dict[str, float]]] = {"floor": [], "empty cache": [], "full cache": []}
    words = [word for words in args.set or [] for word in shlex.split(words)]
    for number in range(args.rounds):
        empty = written(args, folder, f"empty-{number}", cache=f"cache-{number}")
        full = written(args, folder, f"full-{number}", cache=f"cache-{number}")
        for name, command in (
            ("floor", floor_script(args, folder)),
            ("empty cache", [*own, str(empty), *words]),
            ("full cache", [*own, str(full), *words]),
        ):
            found[name].append(answer(command, {"XDG_CACHE_HOME": str(folder / f"user-{number}")}))
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


def answer(command: Sequence[str], environment: Mapping[str, str] | None = None) -> dict[str, float]:
    """The last line of what `command` says, as JSON, with more in its environment."""
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    if done.returncode:
        sys.exit(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


# -- preparing -------------------------------------------------------------------------------------------------------


def prepare(recipe: str) -> None:
    """`lorakit cache`, and what the filling itself took; run in a process of its own."""
    import lorakit.verbs.cache as verb
    from lorakit.recipe import load_recipe

    fill_cache, spent = verb.fill_cache, 0.0

    def watched(*args: Any, **rest: Any) -> Any:
        nonlocal spent
        started = clock()
        done = fill_cache(*args, **rest)
        spent = clock() - started
        return done

    verb.fill_cache = watched
    verb.fill(load_recipe(recipe))
    print(json.dumps({"seconds": spent}), flush=True)


def measure_prepare(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    ours, floors = [], []
    for number in range(args.rounds):
        recipe = written(args, folder, f"prepare-{number}", cache=f"prepared-{number}")
        ours.append(answer([sys.executable, __file__, "prepare-one", str(recipe)])["seconds"])
        floors.append(answer([*floor_script(args, folder), "--more", "8"])["a_step"])
    found = ratio(ours, floors)
    print(
        f"| {args.shape} | {args.photos} | {statistics.median(floors):.3f} s | {statistics.median(ours):.2f} s | "
        f"{found} | {found.pairs} |"
    )
    return [{"ours": ours, "a_step": floors, "steps": asdict(found)}]


# -- other programs --------------------------------------------------------------------------------------------------


def spent_by(command: Sequence[str]) -> float:
    """Seconds of a command that count: of the CPU, with all that it starts and waits for, or the clock's on a GPU."""
    before, started = os.times(), time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    after, ended = os.times(), time.perf_counter()
    if gpu_counts():
        return ended - started
    return after.children_user + after.children_system - before.children_user - before.children_system


def measure_help(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    seconds = [spent_by([sys.executable, "-m", "lorakit", "--help"]) for _ in range(5)]
    print(f"lorakit --help: {statistics.median(seconds):.2f} s ({min(seconds):.2f} … {max(seconds):.2f})")
    return [{"seconds": seconds}]


def measure_beside(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A step is what a run of some steps costs more than one of a single step; programs take turns. Of the first of
    them a recipe's cache is filled by the run that nobody counts."""
    side = shapes.SHAPES[args.shape].side
    known = {
        "recipe": written(args, folder, "beside"),
        "base": shapes.base(args.shape, args.bases or folder),
        "photos": shapes.photos(folder, side=side, count=args.photos),
        "pictures": shapes.pictures(folder, side=side, count=args.photos),
        "side": side,
        "batch": args.batch,
        "rank": shapes.RANK,
    }
    runs = 0

    def seconds(text: str, steps: int) -> float:
        nonlocal runs
        runs += 1
        for name, value in {**known, "steps": steps, "out": folder / f"run-{runs}"}.items():
            text = text.replace(f"{{{name}}}", str(value))
        return spent_by(shlex.split(text))

    few: list[list[float]] = [[] for _ in args.command]
    each: list[list[float]] = [[] for _ in args.command]
    for text in args.command:
        seconds(text, 1)
    for _ in range(args.rounds):
        for text, ones, found in zip(args.command, few, each):
            ones.append(seconds(text, 1))
            found.append((seconds(text, args.pairs + 1) - ones[-1]) / args.pairs)
    rows = []
    for text, ones, found in zip(args.command, few, each):
        step, than = statistics.median(found), ratio(found, each[0])
        rows.append({"command": text, "one_step": ones, "a_step": found, "of_the_first": asdict(than)})
        print(
            f"| {text} | {statistics.median(ones):.1f} s with one step | {step:.3f} s a step more | "
            f"{args.batch / step:.2f} pictures a second | a step is {than} of the first program's |",
            flush=True,
        )
    return rows


MEASURES = {
    "steps": measure_steps,
    "start": measure_start,
    "prepare": measure_prepare,
    "help": measure_help,
    "beside": measure_beside,
}


def main(arguments: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["third-step"]:
        third_step(words[1], words[2:])
        return
    if words[:1] == ["prepare-one"]:
        prepare(words[1])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=MEASURES)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="sd-small")
    parser.add_argument("--pairs", type=int, default=40, help="of steps (beside: steps)")
    parser.add_argument("--rounds", type=int, default=3, help="of all but steps")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--photos", type=int, default=32)
    parser.add_argument(
        "--set", action="append", metavar="WORDS", help="settings of the recipe, as on the command line"
    )
    parser.add_argument("--command", action="append", default=[], help="a program to measure")
    parser.add_argument("--floor-checkpointing", action="store_true", help="gradient checkpointing for the floor too")
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
