"""The measurement of a true-size training: it sees all processes, stops what takes too much, and says what is wrong."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import true_size_sd15
from true_size_sd15 import GIB, Outcome, problems, watch

from lorakit.recipe import load_recipe

GOOD = Outcome(0, GIB, GIB, 9.0, [1.0, 1.0, 1.0], [0.3, 0.2, 0.1])
# a process below the one that is started holds the memory
HOLD = "import time; held = bytearray(b'x') * (300 << 20); time.sleep({seconds})"
START = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {code!r}, {mark!r}]).returncode)"


def started(seconds: float, mark: Path) -> list[str]:
    return [sys.executable, "-c", START.format(code=HOLD.format(seconds=seconds), mark=str(mark))]


def test_memory_of_all_processes_counts(tmp_path: Path) -> None:
    outcome = watch(started(0.5, tmp_path), tmp_path / "run", limit=GIB)
    assert 300 << 20 < outcome.peak == outcome.peak_of_training < 400 << 20
    assert outcome.code == 0 and outcome.losses == []


def test_what_takes_too_much_is_stopped(tmp_path: Path) -> None:
    outcome = watch(started(600, tmp_path), tmp_path / "run", limit=200 << 20)
    assert outcome.code != 0 and outcome.whole_seconds < 30
    assert not [one for one in psutil.process_iter(["cmdline"]) if str(tmp_path) in (one.info["cmdline"] or [])]


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    assert problems(GOOD, tmp_path, limit=GIB) == ["there is no adapter"]
    (tmp_path / "adapter.safetensors").touch()
    assert problems(GOOD, tmp_path, limit=GIB) == []
    for bad, said in (
        (replace(GOOD, peak=2 * GIB), "2.0 GiB were resident"),
        (replace(GOOD, code=3), "ended with 3"),
        (replace(GOOD, losses=[0.3, None, 0.1]), "losses of 3 steps"),
        (replace(GOOD, losses=[0.3, 0.2]), "losses of 3 steps"),
    ):
        [problem] = problems(bad, tmp_path, limit=GIB)
        assert said in problem


def test_the_row_says_what_was_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def make(command: list[str], **_: bool) -> None:
        unet = Path(command[command.index("--out") + 1]) / "unet"
        unet.mkdir(parents=True)
        (unet / "diffusion_pytorch_model.safetensors").write_bytes(bytes(4_000_000))

    def train(command: list[str], run: Path, *, limit: int) -> Outcome:
        assert load_recipe(run.parent / command[-1]).run.steps == 3
        assert len([*(run.parent / "photos").glob("*.png")]) == len([*(run.parent / "photos").glob("*.txt")]) == 4
        run.mkdir()
        (run / "adapter.safetensors").touch()
        return replace(GOOD, peak=min(limit, 2 * GIB))

    monkeypatch.setattr(true_size_sd15.subprocess, "run", make)
    monkeypatch.setattr(true_size_sd15, "watch", train)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert true_size_sd15.main(["--json", str(tmp_path / "a.json")]) == 0
    said, row = capsys.readouterr().out.splitlines()
    assert json.loads(said) == json.loads((tmp_path / "a.json").read_text())
    assert row == "| 2 million | 256 | 3 | 2 | 1.0 s | 1.0 GiB | 2.0 GiB | 9 s |"
