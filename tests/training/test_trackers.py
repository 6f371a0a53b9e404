"""Trackers: the numbers arrive to the last bit, and nothing that a tracker does reaches the run."""

import json
import logging
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorakit.core.errors import InputError
from lorakit.training import trackers
from lorakit.training.trackers import Trackers, flat, refuse_missing

CONFIG = {"run": {"steps": 3, "tags": ["a", "b"]}, "data": {"sources": [{"repeats": 2}]}, "adapter": {"lr": 1e-4}}
LOSSES = [0.1, 1 / 3, 2e-7]


@pytest.fixture(autouse=True)
def _state() -> None:
    """What a Runtime has made before a tracker starts."""
    from accelerate import PartialState

    PartialState(cpu=True)


def records(losses: list[float], *, first: int = 1) -> list[dict[str, Any]]:
    return [
        {"step": step, "loss": loss, "lr": 1e-4, "samples": ["0/secret.png"], "epoch": 0}
        for step, loss in enumerate(losses, first)
    ]


def run_with(names: list[str], folder: Path, given: list[dict[str, Any]]) -> None:
    tracking = Trackers(names, folder=folder, config=CONFIG)
    for record in given:
        tracking.log(record)
    tracking.end()
    tracking.end()  # once more does no harm


class Fake:
    """A tracker that fails where it is told to: "init", "log" at step 2, "finish"."""

    def __init__(self, fails: str = "", error: BaseException | None = None) -> None:
        self.fails, self.error, self.seen, self.finished = fails, error or RuntimeError("no \x1b network"), [], False
        if fails == "init":
            raise self.error

    def log(self, numbers: dict[str, float], *, step: int) -> None:
        if self.fails == "log" and step >= 2:
            raise self.error
        self.seen.append((step, numbers))

    def finish(self) -> None:
        self.finished = True
        if self.fails == "finish":
            raise self.error


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
@pytest.mark.parametrize("error", [RuntimeError("no \x1b network"), SystemExit(1)])
def test_a_tracker_that_fails_is_one_warning_and_the_others_go_on(
    fails: str, error: BaseException, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    made: dict[str, Fake] = {}

    def started(name: str, *_: object, **__: object) -> Fake:
        made[name] = Fake(fails, error) if name == "wandb" else Fake()
        return made[name]

    monkeypatch.setattr(trackers, "_started", started)
    with caplog.at_level(logging.WARNING, "lorakit"):
        run_with(["wandb", "tensorboard"], tmp_path, records(LOSSES))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "wandb" in caplog.text and type(error).__name__ in caplog.text and "\x1b" not in caplog.text
    assert made["tensorboard"].seen == [(i, {"loss": x, "lr": 1e-4}) for i, x in enumerate(LOSSES, 1)]
    assert made["tensorboard"].finished


@pytest.mark.parametrize(("steps", "said"), [(100, "do not keep up"), (4, "have not finished in 0.2 seconds")])
def test_a_tracker_that_hangs_holds_nobody_up(
    steps: int, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    release, fake = threading.Event(), Fake()
    rescue = threading.Timer(10, release.set)  # a test that hangs says nothing
    rescue.start()
    monkeypatch.setattr(fake, "log", lambda *_, **__: release.wait())
    monkeypatch.setattr(trackers, "_started", lambda *_, **__: fake)
    monkeypatch.setattr(trackers, "PATIENCE", 0.2)
    monkeypatch.setattr(trackers, "_WAITING", 5)
    started = time.perf_counter()
    with caplog.at_level(logging.WARNING, "lorakit"):
        run_with(["wandb"], tmp_path, records([0.0] * steps))
    assert time.perf_counter() - started < 2
    assert len(caplog.records) == 1 and said in caplog.text
    rescue.cancel()
    release.set()


def test_nobody_is_asked_for_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A login prompt would wait for ever in a run that nobody watches."""

    class Terminal:
        def isatty(self) -> bool:
            return True

        def readline(self) -> str:
            raise AssertionError("the keyboard was read")

    seen = []

    def asks(*_: object, **__: object) -> None:
        seen.append((sys.stdin.isatty(), sys.stdin.readline()))

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdin", terminal)
    import accelerate.tracking

    monkeypatch.setattr(accelerate.tracking.TensorBoardTracker, "start", asks)
    run_with(["tensorboard"], tmp_path, records([1.0]))
    assert seen == [(False, "")]
    assert sys.stdin is terminal


def test_a_folder_of_its_name_is_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """wandb writes a folder "wandb", which Python takes for an empty package of that name."""
    (tmp_path / "wandb9").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"(?s)lorakit\[wandb9\].*lorakit\[nowhere\]"):
        refuse_missing(["tensorboard", "wandb9", "nowhere"])
    refuse_missing(["tensorboard"])


def test_settings_are_handed_on_flat() -> None:
    assert dict(flat(CONFIG)) == {
        "run.steps": 3,
        "run.tags": "['a', 'b']",
        "data.sources.0.repeats": 2,
        "adapter.lr": 1e-4,
    }


def test_tensorboard_has_the_numbers_and_a_resumed_run_goes_over_them(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_with(["tensorboard"], tmp_path, records([0.5, 0.25, 0.125, 9.0]))
    time.sleep(1.1)  # a file's name is a second
    run_with(["tensorboard"], tmp_path, records([1.5, 2.5], first=3))
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in found] == [(1, 0.5), (2, 0.25), (3, 1.5), (4, 2.5)]


# -- wandb itself, offline ---------------------------------------------------------------------------------------

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def wandb_offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # it reads the environment once
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    yield
    wandb.teardown()


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: seven bytes, then LevelDB's log format (blocks of 32 KiB; crc, length, kind)."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def wandb_history(folder: Path) -> dict[int, dict[str, Any]]:
    """What wandb holds of each step of the one run below `folder`."""
    (file,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    found = {}
    for record in wandb_records(file):
        if record.HasField("history"):
            item = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            found[item["_step"]] = item
    return found


@pytest.mark.usefixtures("wandb_offline")
def test_wandb_has_the_numbers_below_the_run_and_no_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "my-run"
    run.mkdir()
    with caplog.at_level(logging.WARNING, "lorakit"):
        run_with(["wandb"], run, records(LOSSES))
    assert not caplog.records
    history = wandb_history(run)
    assert [(step, item["loss"], item["lr"]) for step, item in history.items()] == [
        (step, loss, 1e-4) for step, loss in enumerate(LOSSES, 1)
    ]
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    begun = next(record.run for record in wandb_records(file) if record.HasField("run"))
    assert (begun.display_name, begun.project) == ("my-run", "lorakit")
    for path in run.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
    # what wandb would send: no folder, host or program of this machine (its logs stay here)
    sent = [p for p in run.rglob("*") if p.is_file() and not p.is_symlink() and p.parent.name != "logs"]
    host = socket.gethostname()
    for private in (str(tmp_path), os.getcwd(), sys.executable, "secret", *([host] if len(host) > 4 else [])):
        assert not [path.name for path in sent if private.encode() in path.read_bytes()], private
    assert [path.name for path in sent] == [file.name]
