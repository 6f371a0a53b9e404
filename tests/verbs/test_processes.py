"""Two processes on the CPU, started as a user starts them, train on the same numbers as one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit.recipe import Recipe
from lorakit.training.validation import curves
from lorakit.verbs.train import train


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", "0", "-m", "lorakit", *arguments]
    root = str(Path(__file__).parent.parent.parent)
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": root})


def test_two_processes_agree_with_one(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    how = ("run.accumulate=1", "run.steps=3", "data.validation=0.4", "run.validate_every=3")
    one = train(make_recipe("one", "run.batch_size=4", *how)).output
    file = tmp_path / "recipe.toml"
    file.write_text(make_recipe("two", "run.batch_size=2", *how).to_toml())
    done = launch("train", str(file))
    assert done.returncode == 0, done.stderr
    two = tmp_path / "two"
    lines, measured = (
        [[json.loads(line) for line in (run / name).read_text().splitlines()] for run in (one, two)]
        for name in ("metrics.jsonl", "validation.jsonl")
    )
    assert len(lines[1]) == 3 and len(measured[1]) == 2
    for a, b in zip(*measured, strict=True):
        assert curves(a) == pytest.approx(curves(b), rel=1e-6, abs=1e-6) and len(curves(a)) == 2 * (1 + 1 + 4) + 1
        assert a["samples"] == b["samples"] == a["training"]["samples"] == b["training"]["samples"]
    for a, b in zip(*lines, strict=True):
        assert a["samples"] == b["samples"] and a["lr"] == b["lr"] and a["epoch"] == b["epoch"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["losses"] == pytest.approx(b["losses"], rel=1e-6) and len(set(a["losses"])) == len(a["samples"]) > 2
        assert a["timesteps"] == b["timesteps"] and len(set(a["timesteps"])) > 2
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    assert json.loads((two / "exit.json").read_text())["code"] == 0


def test_what_is_wrong_is_said_once_and_none_waits(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(make_recipe("two").to_toml())
    (tmp_path / "photos" / "00.txt").unlink()
    done = launch("train", str(file))
    assert done.returncode != 0 and done.stderr.count("error: ") == 1 and "00.png" in done.stderr
    file.write_text("[nothing]")
    done = launch("train", str(file))
    assert done.returncode != 0 and done.stderr.count("error: ") == 1 and "nothing is not a section" in done.stderr
