"""Two processes on the CPU, started as a user starts them, train on the same numbers as one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lorakit.cli.main import main
from lorakit.core.errors import InputError
from lorakit.recipe import Recipe
from lorakit.training.validation import curves
from lorakit.verbs.alike import base_of, refuse_unlike_base
from lorakit.verbs.train import train
from tests.verbs.conftest import in_processes

ROOT = Path(__file__).parent.parent.parent


def launch(
    *arguments: str, config: str, module: str = "lorakit", path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    command += ["--config_file", str(ROOT / "recipes" / "accelerate" / f"{config}.yaml"), "-m", module, *arguments]
    paths = os.pathsep.join(map(str, [ROOT, *([path] if path else [])]))
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": paths})


def test_two_processes_agree_with_one(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    how = ("run.accumulate=1", "run.steps=3", "data.validation=0.4", "run.validate_every=3")
    how += ("run.sample_every=3", "sample.prompts=['thing 1', 'thing 2', 'other']")
    one = train(make_recipe("one", "run.batch_size=4", *how)).output
    file = tmp_path / "recipe.toml"
    file.write_text(make_recipe("two", "run.batch_size=2", *how).to_toml())
    done = launch("train", str(file), config="cpu_x2")
    assert done.returncode == 0, done.stderr
    assert "a step takes 4 pictures: run.batch_size 2 × run.accumulate 1 × 2 processes" in done.stderr
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
    drawn = [
        [torch.from_numpy(np.array(Image.open(run / "samples" / "step-000003" / f"0{i}.png"))).int() for i in range(3)]
        for run in (one, two)
    ]
    for one_drawn, other_drawn in zip(*drawn, strict=True):
        assert (one_drawn - other_drawn).abs().max() <= 1, "each prompt's picture in its place, to one of 256 levels"
    assert not any(torch.equal(drawn[0][0], other) for other in drawn[0][1:])
    assert json.loads((two / "exit.json").read_text())["code"] == 0


def test_processes_with_unlike_recipes_are_refused(
    make_recipe: Callable[..., Recipe], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def start() -> None:
        unlike = ["optimizer.lr=0.5", "sample.negative_prompt='red'"] if os.environ["RANK"] == "1" else []
        file = tmp_path / f"recipe-{os.environ['RANK']}.toml"
        file.write_text(make_recipe("run", *unlike).to_toml())
        main(["train", str(file)])

    make_recipe("run")
    assert in_processes(2, start) == [2, 2]
    said = capfd.readouterr().err
    assert said.count("error: ") == 1 and "optimizer.lr is 0.01 in the first process and 0.5 in process 1" in said
    assert 'sample.negative_prompt is "" in the first process and "red"' in said and "run.output" not in said
    assert not (tmp_path / "run").exists()


def test_processes_with_unlike_models_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Base:
        components = dict.fromkeys(("unet", "vae"))

        def __init__(self, unet: str) -> None:
            self.unet = unet

        def fingerprint(self, part: str) -> str:
            return self.unet if part == "unet" else "same"

    both = [base_of(Base("a")), base_of(Base("b"))]  # type: ignore[arg-type]
    monkeypatch.setattr("lorakit.verbs.alike.on_each_rank", lambda action: both)
    with pytest.raises(InputError, match=r"model\.path: the files of unet are not the same for process 1"):
        refuse_unlike_base(Base("a"))  # type: ignore[arg-type]
    both[1] = both[0]
    refuse_unlike_base(Base("a"))  # type: ignore[arg-type]


# a launcher ends all processes as soon as one has ended: what all have met, rank 0 must have said by then
SLOW_FIRST = """
import os, sys, time
from lorakit.cli import main
report = main.report
def slowly(error):
    time.sleep(3 if os.environ["RANK"] == "0" else 0)
    report(error)
main.report = slowly
main.main(sys.argv[1:])
"""


def test_what_is_wrong_is_said_once_and_none_waits(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "first.py").write_text(SLOW_FIRST)
    file = tmp_path / "recipe.toml"
    file.write_text(make_recipe("two").to_toml())
    (tmp_path / "photos" / "00.txt").unlink()
    done = launch("train", str(file), config="gpus", module="first", path=tmp_path / "slow")
    assert done.returncode != 0 and done.stderr.count("error: ") == 1 and "00.png" in done.stderr
    file.write_text("[nothing]")
    done = launch("train", str(file), config="sharded", module="first", path=tmp_path / "slow")
    assert done.returncode != 0 and done.stderr.count("error: ") == 1 and "nothing is not a section" in done.stderr
