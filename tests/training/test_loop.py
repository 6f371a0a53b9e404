"""The order of things between steps."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.core.errors import DivergedError, InterruptedRun, StorageError
from lorakit.core.types import LossReport
from lorakit.data.loader import StepPlan
from lorakit.training.interrupt import Interrupt
from lorakit.training.loop import LoopReport, run_loop
from tests.training.test_step import batch, trainee


class Recorder:
    def __init__(self, *, full_at: int | None = None) -> None:
        self.events: list[tuple[str, int]] = []
        self.records: list[dict[str, Any]] = []
        self.rescued: list[dict[str, torch.Tensor]] = []
        self.full_at = full_at
        self.output = Path("runs/zorp")

    def metrics(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def save(self, step: int, *, needed: bool) -> bool:
        if step == self.full_at:
            if needed:
                raise StorageError("the disk is full")
            return False
        self.events.append(("save", step))
        return True

    def sample(self, step: int) -> None:
        self.events.append(("sample", step))

    def validate(self, step: int) -> None:
        self.events.append(("validate", step))

    def rescue(self, weights: Any) -> str:
        self.rescued.append({name: tensor.clone() for name, tensor in weights.items()})
        return "rescued"


def loop(recorder: Recorder, *, first: int = 0, last: int = 5, objective: Any = None, **changed: Any) -> LoopReport:
    plans = (StepPlan(0, (f"0/{n}.png",), (batch([n]),)) for n in range(first, last))
    options: dict[str, Any] = {
        "save_every": 2,
        "sample_every": 4,
        "validate_every": 0,
        "interrupt": Interrupt(),
        **changed,
    }
    return run_loop(
        trainee(objective),
        plans,
        first_step=first,
        last_step=last,
        lr_factor=lambda step: 1 / (step + 1),
        hooks=recorder,
        **options,
    )


def test_a_checkpoint_comes_before_samples_and_at_the_end() -> None:
    recorder = Recorder()
    assert loop(recorder).step == 5
    assert recorder.events == [("save", 2), ("save", 4), ("sample", 4), ("save", 5), ("sample", 5)]


def test_zero_switches_off_all_but_the_last_checkpoint() -> None:
    recorder = Recorder()
    loop(recorder, save_every=0, sample_every=0)
    assert recorder.events == [("save", 5)]


def test_validation_comes_before_the_first_step_after_checkpoints_and_at_the_end() -> None:
    recorder = Recorder()
    loop(recorder, save_every=3, sample_every=0, validate_every=3)
    assert recorder.events == [("validate", 0), ("save", 3), ("validate", 3), ("save", 5), ("validate", 5)]
    resumed = Recorder()
    loop(resumed, first=3, save_every=3, sample_every=0, validate_every=3)
    assert resumed.events == [("validate", 3), ("save", 5), ("validate", 5)]


def test_a_resumed_run_repeats_what_it_may_have_been_stopped_in() -> None:
    recorder = Recorder()
    loop(recorder, first=4, validate_every=2)
    assert recorder.events == [("sample", 4), ("validate", 4), ("save", 5), ("sample", 5), ("validate", 5)]
    done = Recorder()
    assert loop(done, first=5).step == 5
    assert done.events == [("sample", 5)]


def test_a_full_disk_ends_a_run_only_where_it_cannot_do_without() -> None:
    recorder = Recorder(full_at=2)
    loop(recorder)
    assert recorder.events == [("save", 4), ("sample", 4), ("save", 5), ("sample", 5)]
    with pytest.raises(StorageError):
        loop(Recorder(full_at=5))


def test_wishes_are_granted_between_steps() -> None:
    recorder, interrupt = Recorder(), Interrupt()
    asked = iter([(0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0)])
    interrupt.votes = lambda: next(asked, (0.0,) * 4)  # type: ignore[method-assign]
    loop(recorder, save_every=0, sample_every=0, interrupt=interrupt)
    assert recorder.events == [("save", 2), ("sample", 3), ("save", 5)]


def test_one_record_a_step_with_the_rate_used() -> None:
    recorder = Recorder()
    loop(recorder, first=2)
    assert [r["step"] for r in recorder.records] == [3, 4, 5]
    assert [r["lr"] for r in recorder.records] == [0.1 * (1 / 3), 0.1 * (1 / 4), 0.1 * (1 / 5)]
    assert recorder.records[0]["samples"] == ["0/2.png"]
    assert recorder.records[0]["losses"] == [pytest.approx(recorder.records[0]["loss"])]
    assert recorder.records[0]["timesteps"] == [0.0]


def test_a_signal_saves_and_ends() -> None:
    recorder, interrupt = Recorder(), Interrupt()
    interrupt.votes = lambda: (0.0, 1.0, 0.0, 0.0)  # type: ignore[method-assign]
    with pytest.raises(InterruptedRun) as caught:
        loop(recorder, interrupt=interrupt)
    assert caught.value.exit_code == 143
    assert "`lorakit train --resume runs/zorp` goes on from there" in str(caught.value)
    assert recorder.events == [("save", 1)]


def test_three_non_finite_losses_in_a_row_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    calls = iter(range(100))

    def objective(predict: Any, batch: Any) -> LossReport:
        bad = next(calls) in (1, 3, 4, 5)
        t = torch.tensor(batch.numbers)
        return LossReport(predict(batch.latents, None, text={}).flatten(1).sum(1) * (float("nan") if bad else 1.0), t)

    recorder = Recorder()
    with pytest.raises(DivergedError, match=r"0/5\.png"):
        loop(recorder, last=9, objective=objective, save_every=0, sample_every=0)
    assert [r["loss"] is None for r in recorder.records] == [False, True, False, True, True, True]
    assert [r["losses"] == [None] for r in recorder.records] == [False, True, False, True, True, True]
    assert recorder.events == [] and len(recorder.rescued) == 1
    assert "0/3.png at t = 3" in caplog.text
