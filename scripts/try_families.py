"""Trains, kills, resumes, draws and exports a small instance of each model family from one recipe but for `[model]`.

    python scripts/try_families.py                  all families, about a minute each
    python scripts/try_families.py sd flux --keep runs

Everything goes through the command line, as a user would do it. A family's row names the first thing that did not work.
Ends with 1 where there is one.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from lorakit.families import FAMILIES

RECIPE = """
[model]
family = "{family}"
path = "{path}"

[adapter]
rank = 4

[[data.sources]]
path = "photos"

[data]
cache = "cache"

[data.buckets]
resolution = {side}

[optimizer]
lr = 1e-3

[run]
output = "runs/{family}"
steps = {steps}
batch_size = 2
save_every = 2
precision = "fp32"
sample_every = {steps}

[sample]
prompts = ["a red square"]
steps = 2
width = {side}
height = {side}
"""
STEPS = 40


class Failed(Exception):
    """What did not work."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=FAMILIES.names(), help="default: all")
    parser.add_argument("--keep", type=Path, help="folder for what is made (default: a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        make_photos(folder / "photos")
        print("| family | killed at step | resumed | formats | s |\n|---|---|---|---|---|")
        failed = False
        for name in args.families:
            began = time.monotonic()
            try:
                row = tried(name, folder)
            except Failed as error:
                row, failed = f"**{error}** | | ", True
            print(f"| {name} | {row} | {time.monotonic() - began:.0f} |", flush=True)
    return int(failed)


def make_photos(folder: Path) -> None:
    """Six plain pictures of three shapes."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (colour, size) in enumerate([("red", (160, 160)), ("green", (200, 150)), ("blue", (150, 200))] * 2):
        Image.new("RGB", size, colour).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {colour} square, number {i}")


def tried(name: str, folder: Path) -> str:
    """A row of the table."""
    tiny = FAMILIES.module(name).tiny()
    side = 128 if tiny.side_multiple > 16 else 64
    recipe = folder / f"{name}.toml"
    recipe.write_text(RECIPE.format(family=name, path=tiny.path, side=side, steps=STEPS))
    run = folder / "runs" / name
    killed = kill(["train", recipe], run)
    lorakit("train", "--resume", run)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    if steps != list(range(1, STEPS + 1)):
        raise Failed(f"metrics.jsonl has the steps {steps}")
    if not list(run.glob(f"samples/step-{STEPS:06d}/*.png")):
        raise Failed("no sample was drawn in training")
    adapter = run / "adapter.safetensors"
    size = f"{side}x{side}"
    drawing = ["--prompt", "a red square", "--steps", "2", "--size", size]
    lorakit("sample", tiny.path, "--adapter", adapter, *drawing, "--out", folder / "drawn" / name)
    formats = ["lorakit", "diffusers", "peft", *(["kohya"] if tiny.lora_prefixes else [])]
    for format in formats:
        out = folder / "exports" / name / (format if format == "peft" else f"{format}.safetensors")
        lorakit("export", run, "--format", format, "--out", out)
    lorakit("inspect", adapter)
    return f"{killed} | to step {STEPS} | {', '.join(formats)}"


def kill(arguments: list[object], run: Path) -> int:
    """Starts lorakit and kills it once a checkpoint is there; the step that had been saved."""
    log = run.parent / f"{run.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(command(*arguments), stdout=file, stderr=file)
        while process.poll() is None and not (saved := sorted(run.glob("checkpoints/step-*/manifest.json"))):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    if process.returncode != -signal.SIGKILL or not saved:
        raise Failed(f"train ended with {process.returncode}: {log.read_text()[-300:]}")
    return int(saved[-1].parent.name.removeprefix("step-"))


def lorakit(*arguments: object) -> None:
    done = subprocess.run(command(*arguments), capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"{arguments[0]} ended with {done.returncode}: {' '.join(done.stderr.split())[-300:]}")


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "lorakit", *map(str, arguments)]


if __name__ == "__main__":
    sys.exit(main())
