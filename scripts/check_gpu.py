"""Whether a run that is killed goes on exactly on this machine's GPU: what docs/reliability.md promises, tried.

For each precision, with and without `run.deterministic`, a short training is run straight through, once more, with a
kill -9 in the middle, and with a SIGTERM in the middle; the broken ones are resumed. Then they are compared:

  order, lr    keys of the pictures and learning rate of every step: must be equal
  noise, t     the noise and timestep of every sample: must be equal
  scale        fp16's loss scale and what it counts: must be equal
  weights      adapter, its average and the optimizer's moments at the end: the same bits with run.deterministic and on
               the CPU, else how far apart. "again" is the second straight run: what resuming cannot be better than.
  stops in     seconds from SIGTERM to the end of the process, state saved: must be under 30

    python scripts/check_gpu.py                                 the embedded base, all precisions; some minutes
    python scripts/check_gpu.py --precision bf16 --model stabilityai/some-model --steps 30

On a GPU two more lines are of `model.compute`, in bf16 and with run.deterministic, where the GPU can. Without one it
tries fp32 and bf16 on the CPU. Ends with 1 where something that must hold does not.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# seconds, paid once; diffusers and transformers load their parts at the first use
EARLY = [
    "accelerate",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "lorakit.verbs.train",
    "peft.tuners.lora.bnb",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
]
LIMIT = 600.0  # seconds for a run


@dataclass(frozen=True)
class Outcome:
    """What is compared of a run that has ended."""

    order: Any
    rates: Any
    draws: Any
    scale: Any
    weights: dict[str, bytes]


@dataclass(frozen=True)
class Row:
    """A line of the table. `weights` and `again` are None for the same bits, else the largest difference."""

    precision: str
    deterministic: bool
    exact: dict[str, bool]
    weights: float | None
    again: float | None
    seconds_to_stop: float

    def broken(self, *, always: bool) -> list[str]:
        """The promises that were not kept; `always`: weights are promised without run.deterministic too."""
        found = [name for name, equal in self.exact.items() if not equal]
        found += ["weights"] if self.weights is not None and (self.deterministic or always) else []
        return found + (["stops in"] if self.seconds_to_stop >= 30 else [])


# -- in the process of a run -----------------------------------------------------------------------------------------


def train_traced(
    values: dict[str, Any], trace: Path, *, resumed: bool = False, die_at: int | None = None, slow: float = 0.0
) -> None:
    """Trains, writing a line for each micro step; dies before micro step `die_at`, counted from 0."""
    from lorakit.core.errors import LorakitError
    from lorakit.recipe import build
    from lorakit.training import step
    from lorakit.verbs.train import resume, train

    compute, done = step.forward_backward, 0

    def traced(trainee: Any, batch: Any, *, count: int) -> Any:
        nonlocal done
        if done == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(slow)
        loss, seen = compute(trainee, batch, count=count)
        noise = [hashlib.sha256(one.cpu().numpy().tobytes()).hexdigest() for one in batch.noise]
        with open(trace, "a", encoding="utf-8") as file:
            file.write(json.dumps(list(zip(batch.numbers, noise, seen.t.tolist()))) + "\n")
        done += 1
        return loss, seen

    step.forward_backward = traced
    try:
        recipe = build(values)
        resume(recipe.run.output) if resumed else train(recipe)
    except LorakitError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


# -- around it -------------------------------------------------------------------------------------------------------


class Runs:
    """Runs of one recipe, each in a process of its own, below `folder`."""

    def __init__(self, folder: Path, values: dict[str, Any]) -> None:
        self.folder, self.values = folder, values
        # a server that has everything imported and has not touched CUDA forks them
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(EARLY)

    def start(self, name: str, **how: Any) -> Any:
        values = {**self.values, "run": {**self.values["run"], "output": str(self.folder / name)}}
        process = self.context.Process(target=train_traced, args=(values, self.folder / f"{name}.trace"), kwargs=how)
        process.start()
        return process

    def end(self, process: Any, *codes: int) -> None:
        process.join(LIMIT)
        if process.exitcode is None:
            process.kill()
        if process.exitcode not in codes:
            raise SystemExit(f"error: a run ended with {process.exitcode} in place of {codes}: see above")

    def lines(self, name: str) -> list[str]:
        trace = self.folder / f"{name}.trace"
        return trace.read_text().splitlines() if trace.exists() else []

    def straight(self, name: str) -> Outcome:
        self.end(self.start(name), 0)
        return self.outcome(name)

    def killed(self, name: str, *, at: int) -> Outcome:
        self.end(self.start(name, die_at=at), -signal.SIGKILL)
        self.end(self.start(name, resumed=True), 0)
        return self.outcome(name)

    def stopped(self, name: str, *, after: int) -> tuple[Outcome, float]:
        process = self.start(name, slow=0.05)
        while len(self.lines(name)) < after and process.is_alive():
            time.sleep(0.01)
        sent = time.perf_counter()
        os.kill(process.pid, signal.SIGTERM)
        self.end(process, 128 + signal.SIGTERM)
        seconds = time.perf_counter() - sent
        self.end(self.start(name, resumed=True), 0)
        return self.outcome(name), seconds

    def outcome(self, name: str) -> Outcome:
        """Raises where a sample that was drawn twice, before and after a kill, was not the same one."""
        run = self.folder / name
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        draws: dict[int, Any] = {}
        for line in self.lines(name):
            for number, *drawn in json.loads(line):
                # a difference becomes a third value, which equals no other run's
                draws[number] = drawn if draws.get(number, drawn) == drawn else "two values"
        last = max((run / "checkpoints").iterdir())
        return Outcome(
            order=[line["samples"] for line in metrics],
            rates=[{key: line[key] for key in line if key.startswith("lr")} for line in metrics],
            draws=draws,
            scale=json.loads((last / "state.json").read_text())["scaler"],
            weights={file.name: file.read_bytes() for file in sorted(last.glob("*.safetensors"))},
        )


def difference(a: Outcome, b: Outcome) -> float | None:
    """None for the same bits; else the largest difference of two numbers in the checkpoints' tensors."""
    if a.weights == b.weights:
        return None
    from safetensors.torch import load

    largest = 0.0
    for name in a.weights:
        first, second = load(a.weights[name]), load(b.weights[name])
        largest = max([largest, *(float((first[k].double() - second[k].double()).abs().max()) for k in first)])
    return largest


def check(folder: Path, values: dict[str, Any], *, steps: int) -> Row:
    """One line of the table; `steps` of the recipe `values` are trained, with a checkpoint after each third."""
    runs = Runs(folder, values)
    straight = runs.straight("straight")
    again = runs.straight("again")
    micro_steps = len(runs.lines("straight"))
    killed = runs.killed("killed", at=micro_steps // 2)
    stopped, seconds = runs.stopped("stopped", after=micro_steps // 2)
    return Row(
        precision=" ".join([values["run"]["precision"], *values["model"].get("compute", "").split()]),
        deterministic=values["run"]["deterministic"],
        exact={
            "order": straight.order == again.order == killed.order == stopped.order,
            "lr": straight.rates == again.rates == killed.rates == stopped.rates,
            "noise, t": straight.draws == again.draws == killed.draws == stopped.draws,
            "scale": straight.scale == again.scale == killed.scale == stopped.scale,
        },
        weights=max(
            (d for d in (difference(straight, killed), difference(straight, stopped)) if d is not None), default=None
        ),
        again=difference(straight, again),
        seconds_to_stop=seconds,
    )


def recipe_values(
    folder: Path, *, model: str, data: str, steps: int, precision: str, deterministic: bool, compute: str | None = None
) -> Any:
    """A recipe with all that has a state: two adapters, dropout, an average, moments, a moving rate."""
    return {
        "model": {"path": model, **({"compute": compute} if compute else {})},
        "adapter": {"rank": 4, "dropout": 0.1, "text_encoder": {"rank": 2}},
        "data": {"sources": [{"path": data}], "cache": str(folder / "cache"), "buckets": {"resolution": 32}},
        "optimizer": {"lr": 1e-3, "schedule": {"kind": "cosine", "warmup": 2}},
        "run": {
            "steps": steps,
            "batch_size": 2,
            "save_every": max(1, steps // 3),
            "precision": precision,
            "deterministic": deterministic,
            "ema": {"decay": 0.9},
            "sample_every": 0,
        },
    }


def table(rows: Sequence[Row], *, device: str) -> str:
    def words(value: float | None) -> str:
        return "same bits" if value is None else f"{value:.1e}"

    head = ["precision", "deterministic", "order", "lr", "noise, t", "scale", "weights", "again", "stops in"]
    cells = [head]
    for row in rows:
        exact = ["equal" if row.exact[name] else "DIFFER" for name in head[2:6]]
        cells.append([row.precision, "yes" if row.deterministic else "no", *exact])
        cells[-1] += [words(row.weights), words(row.again), f"{row.seconds_to_stop:.1f} s"]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]
    return "\n".join([device, *lines])


def main(arguments: Sequence[str] | None = None) -> int:
    import torch

    from lorakit.core.embedded import embedded

    gpu = torch.cuda.device_count() > 0  # does not start CUDA
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="*", default=["fp32", "bf16", *(["fp16"] if gpu else [])])
    parser.add_argument("--deterministic", nargs="+", choices=["no", "yes"], default=["no", "yes"])
    parser.add_argument("--compute", nargs="*", choices=["int8", "fp8"], default=["int8", "fp8"] if gpu else [])
    parser.add_argument("--model", default="embedded", help="a diffusers folder or a hub name")
    parser.add_argument("--data", default=str(embedded("mascot")), help="a folder of pictures with captions")
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--json", type=Path, help="where to write the table as JSON too")
    args = parser.parse_args(arguments)
    rows = []
    tried: list[tuple[str, str, str | None]] = [(p, d, None) for p in args.precision for d in args.deterministic]
    if args.compute:
        from lorakit.families.eightbit import problems

        tried += [("bf16", "yes", kind) for kind in args.compute if not problems(kind)]
    for precision, chosen, compute in tried:
        folder = Path(tempfile.mkdtemp(prefix="lorakit-check-"))
        try:
            values = recipe_values(
                folder,
                model=args.model,
                data=args.data,
                steps=args.steps,
                precision=precision,
                deterministic=chosen == "yes",
                compute=compute,
            )
            rows.append(check(folder, values, steps=args.steps))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    device = torch.cuda.get_device_name() if gpu else "CPU"
    print(table(rows, device=f"{device}, torch {torch.__version__}"))
    broken = [f"{r.precision}, deterministic {r.deterministic}: {r.broken(always=not gpu)}" for r in rows]
    broken = [text for text, row in zip(broken, rows) if row.broken(always=not gpu)]
    if args.json:
        args.json.write_text(json.dumps([{**row.__dict__, "device": device} for row in rows], indent=2) + "\n")
    for text in broken:
        print(f"NOT KEPT: {text}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
