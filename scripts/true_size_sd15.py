"""Trains Stable Diffusion 1.5 in its true size, of random weights, for three steps at 256 pixels on the CPU in bf16,
and measures what memory `lorakit train` takes from its start to the verified adapter.

    OMP_NUM_THREADS=2 python scripts/true_size_sd15.py --json build/true_size_sd15.json

Prints the row of the table in docs/performance.md; ends with 1 where something is not as it should be, or more memory
is taken than --limit says. It needs some 2 GB of disk in the system's temporary folder.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

SCRIPTS = Path(__file__).parent
GIB = 2**30
STEPS, SIDE = 3, 256
ROW = "| {parameters} | {side} | {steps} | {threads} | {each:.1f} s | {fit:.1f} GiB | {most:.1f} GiB | {whole:.0f} s |"
RECIPE = """
[model]
path = "{base}"
[adapter]
rank = 16
[[data.sources]]
path = "photos"
[data.buckets]
resolution = {side}
[run]
output = "run"
steps = {steps}
precision = "bf16"
save_every = 0
"""


@dataclass(frozen=True)
class Outcome:
    """Bytes resident in all processes together, at most and at most up to the last step; `seconds` of each step.

    What several processes share is counted for each of them.
    """

    code: int
    peak: int
    peak_of_training: int
    whole_seconds: float
    seconds: list[float]
    losses: list[float | None]


def photographs(folder: Path, count: int = 4) -> None:
    """Noisy pictures with captions: what is on them is of no interest here."""
    folder.mkdir()
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 256, (SIDE + 32, SIDE + 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a photo of a dog, {i}\n")


def resident(process: psutil.Process) -> int:
    """Bytes of a process and all below it."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        try:
            total += one.memory_info().rss
        except psutil.NoSuchProcess:  # it has just ended
            continue
    return total


def watch(command: Sequence[str], run: Path, *, limit: int) -> Outcome:
    """Runs `command`, which trains into `run`, and looks at its memory ten times a second; stops it above `limit`."""
    started, peak, peak_of_training = time.monotonic(), 0, 0
    with subprocess.Popen(command, cwd=run.parent) as child:
        process = psutil.Process(child.pid)
        while child.poll() is None:
            try:
                peak = max(peak, resident(process))
            except psutil.NoSuchProcess:
                break
            if not (run / "checkpoints").is_dir() or not any((run / "checkpoints").iterdir()):
                peak_of_training = peak
            if peak > limit:
                for one in (*process.children(recursive=True), process):
                    one.kill()
                break
            time.sleep(0.1)
    file = run / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return Outcome(
        child.returncode,
        peak,
        peak_of_training,
        time.monotonic() - started,
        [line["seconds"] for line in lines],
        [line["loss"] for line in lines],
    )


def problems(outcome: Outcome, run: Path, *, limit: int) -> list[str]:
    found = []
    if outcome.peak > limit:
        found.append(f"{outcome.peak / GIB:.1f} GiB were resident; {limit / GIB:.1f} are allowed")
    if outcome.code != 0:
        found.append(f"lorakit train ended with {outcome.code}")
    if len(outcome.losses) != STEPS or not all(loss is not None and math.isfinite(loss) for loss in outcome.losses):
        found.append(f"the losses of {STEPS} steps are {outcome.losses}")
    if not (run / "adapter.safetensors").is_file():
        found.append("there is no adapter")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "full"), default="full", help="tiny: to try this script")
    parser.add_argument("--limit", type=float, default=24.0, help="GiB that may be resident")
    parser.add_argument("--json", type=Path, help="a file for all that was measured")
    args = parser.parse_args(arguments)
    limit = int(args.limit * GIB)
    with tempfile.TemporaryDirectory(prefix="lorakit-true-size-") as temporary:
        folder = Path(temporary)
        make = ["--out", str(folder / "base"), "--size", args.size, "--dtype", "bf16"]
        subprocess.run([sys.executable, str(SCRIPTS / "make_random_sd.py"), *make], check=True)
        photographs(folder / "photos")
        (folder / "recipe.toml").write_text(RECIPE.format(base=folder / "base", side=SIDE, steps=STEPS))
        command = [sys.executable, "-m", "lorakit", "train", "recipe.toml"]
        outcome = watch(command, folder / "run", limit=limit)
        found = problems(outcome, folder / "run", limit=limit)
        weights = (folder / "base" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    measured = {
        "parameters": f"{weights / 2 / 1e6:.0f} million",  # two bytes each; the header is nothing beside them
        "side": SIDE,
        "steps": STEPS,
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        **asdict(outcome),
    }
    print(json.dumps(measured))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(measured, indent=1) + "\n")
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    if found:
        return 1
    row = {
        **measured,
        "each": sum(outcome.seconds[1:]) / (STEPS - 1),  # the first one sets things up
        "fit": outcome.peak_of_training / GIB,
        "most": outcome.peak / GIB,
        "whole": outcome.whole_seconds,
    }
    print(ROW.format(**row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
