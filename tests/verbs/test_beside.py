"""What goes on beside a training, its trackers and its dry step, changes not a bit of it; nor does a warm start's file,
once it is read."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorakit.data.loader import Loader
from lorakit.recipe import Recipe
from lorakit.training import trackers
from lorakit.verbs import train as verb
from lorakit.verbs.train import resume, train
from tests.training.test_trackers import KEY, Fake, wandb_history, wandb_offline

Make = Callable[..., Recipe]
__all__ = ["wandb_offline"]


def numbers(run: Path) -> list[dict[str, Any]]:
    """The metrics without what a clock says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def digests(run: Path) -> dict[str, str]:
    files = [run / "adapter.safetensors", *run.glob("checkpoints/step-000006/*.safetensors")]
    return {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def outcome(run: Path) -> Any:
    assert json.loads((run / "exit.json").read_text())["code"] == 0
    assert len(digests(run)) == 3
    return digests(run), numbers(run)


_PLAIN: list[Any] = []


def plain(make_recipe: Make) -> Any:
    """The outcome of a run with nothing beside it, made once: nothing of it depends on where it lies."""
    if not _PLAIN:
        _PLAIN.append(outcome(train(make_recipe("plain")).output))
    return _PLAIN[0]


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_tracker_that_fails_changes_nothing(
    fails: str, make_recipe: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = plain(make_recipe)
    monkeypatch.setattr(trackers, "_started", lambda *_, **__: Fake(fails))
    with caplog.at_level(logging.WARNING, "lorakit"):
        run = train(make_recipe("tracked", 'run.trackers=["tensorboard"]')).output
    assert outcome(run) == expected
    said = [r.getMessage() for r in caplog.records if "tracker" in r.getMessage()]
    assert len(said) == 1 and "tensorboard" in said[0]


@pytest.mark.usefixtures("wandb_offline")
def test_wandb_and_tensorboard_have_every_step_and_nothing_holds_the_key(
    make_recipe: Make, caplog: pytest.LogCaptureFixture
) -> None:
    expected = plain(make_recipe)
    with caplog.at_level(logging.WARNING, "lorakit"):
        run = train(make_recipe("tracked", 'run.trackers=["wandb", "tensorboard"]')).output
    assert outcome(run) == expected
    assert not [r.getMessage() for r in caplog.records if "tracker" in r.getMessage()]
    history = wandb_history(run)
    assert [(step, item["loss"], item["lr"]) for step, item in history.items()] == [
        (line["step"], line["loss"], line["lr"]) for line in expected[1]
    ]
    assert list(run.glob("tensorboard/events.out.tfevents*"))
    for path in run.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
    # the run's own settings reach them, its folders and pictures do not
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    assert b"optimizer.lr" in file.read_bytes() and str(run.parent).encode() not in file.read_bytes()


def test_the_dry_step_changes_nothing(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout in the adapter, which draws from the global generators."""
    monkeypatch.setattr(Loader, "is_largest", lambda *_: False)
    overrides = ("adapter.dropout=0.3", "data.workers=0")
    tried = outcome(train(make_recipe("tried", *overrides)).output)
    calls: list[object] = []
    nothing = SimpleNamespace(peak_bytes=None)
    monkeypatch.setattr(verb, "dry_step", lambda *_, **__: calls.append(None) or nothing)
    assert outcome(train(make_recipe("untried", *overrides)).output) == tried
    assert calls, "the dry step was left out"
    calls.clear()
    monkeypatch.setattr(Loader, "is_largest", lambda *_: True)
    assert outcome(train(make_recipe("first", *overrides)).output) == tried
    assert not calls or torch.cuda.is_available(), "on a CPU the first step tells as much"


def test_deterministic_changes_nothing_on_the_cpu_and_is_put_back(make_recipe: Make) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU's bits may differ")
    expected = plain(make_recipe)
    assert outcome(train(make_recipe("same", "run.deterministic=true")).output) == expected
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_warm_start_begins_with_what_its_file_gives_and_is_resumed_without_it(make_recipe: Make) -> None:
    """The loss on the pictures put aside is that of the file's weights, and a resumed run asks for the file no more."""
    aside = ("data.validation=0.3", "run.validate_every=3")
    first = train(make_recipe("first", "run.steps=3", *aside)).output
    file = first / "adapter.safetensors"
    run = train(make_recipe("warm", f"adapter.init_from={first}", *aside)).output
    fresh, taught = validated(first)
    assert validated(run)[0] == taught != fresh
    straight = outcome(run)
    assert straight[1][0]["samples"] == numbers(first)[0]["samples"], "the run's own numbers begin anew"
    file.unlink()
    shutil.rmtree(run / "checkpoints" / "step-000006")
    assert outcome(resume(run).output) == straight


def validated(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "validation.jsonl").read_text().splitlines()]
