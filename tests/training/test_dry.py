"""The dry step sees what does not fit, and leaves nothing behind."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lorakit.core.errors import InputError
from lorakit.core.types import Batch, LossReport, Predict
from lorakit.training import dry
from lorakit.training.dry import DryReport, TooLarge, dry_step
from lorakit.training.step import Trainee, run_step
from tests.training.test_step import batch, trainee


def sized(numbers: list[int] = [1, 2], **changes: Any) -> Batch:  # noqa: B006 - it is only read
    sizes = torch.tensor([[100, 200, 0, 0, 48, 96]] * len(numbers))
    return replace(batch(numbers), sizes=sizes, **changes)


def adam(trainee: Trainee) -> Trainee:
    groups = trainee.optimizer.param_groups
    return replace(trainee, optimizer=torch.optim.AdamW([dict(group) for group in groups]))


def bits(value: Any) -> Any:
    """Something that is equal only where all bits are."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.detach().numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(inner) for key, inner in value.items()}
    return value


def everything(trainee: Trainee) -> Any:
    states = {name: trainee.optimizer.state.get(p) for name, p in trainee.parameters.items()}
    return (
        bits(dict(trainee.parameters)),
        bits(states),
        bits(torch.get_rng_state()),
        random.getstate(),
        str(np.random.get_state()),
        {name: parameter.grad is None for name, parameter in trainee.parameters.items()},
    )


@pytest.mark.parametrize("steps", [0, 2])
def test_a_dry_step_changes_nothing(steps: int) -> None:
    """With dropout in the model, whose seed each micro step sets, and with moments already there."""

    def dropping(predict: Predict, batch: Batch) -> LossReport:
        assert batch.latents is not None
        kept = torch.nn.functional.dropout(batch.latents, 0.5)
        t = torch.zeros(len(batch.keys))
        return LossReport(predict(kept, t, text={}).square().flatten(1).mean(1), t)

    runs = []
    for tried in (False, True):
        t = adam(trainee(dropping))
        for step in range(steps):
            run_step(t, [batch([step])], count=1, lr_factor=1.0)
        t.optimizer.zero_grad(set_to_none=True)
        if tried:
            before = everything(t)
            report = dry_step(t, sized(), count=4, passes=2)
            assert everything(t) == before
            assert (report.bucket, report.examples, report.weights) == ((96, 48), 2, 72)
            assert report.seconds > 0 and report.peak_bytes is not None and report.peak_bytes > 1 << 20
        reports = [run_step(t, [batch([step])], count=1, lr_factor=1.0) for step in (7, 8)]
        runs.append((bits(dict(t.parameters)), [(r.loss, r.grad_norm) for r in reports]))
    assert runs[0] == runs[1]


def test_the_loss_scale_stays() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)  # overflows at once in fp16, not in the float64 of here
    t = replace(trainee(), scaler=scaler)
    before = scaler.state_dict()
    dry_step(t, sized(), count=2)
    assert scaler.state_dict() == before


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("… can't allocate memory: 9 TB")],
)
def test_what_does_not_fit_is_one_clear_error(error: BaseException) -> None:
    def greedy(predict: Predict, batch: Batch) -> LossReport:
        predict(batch.latents, torch.zeros(2), text={}).sum().backward()  # type: ignore[arg-type]
        torch.rand(3)
        raise error

    t = trainee(greedy)
    before = everything(t)
    with pytest.raises(InputError) as caught:
        dry_step(t, sized(), count=2)
    (problem,) = caught.value.problems
    assert "2 pictures of 96×48" in problem
    assert isinstance(caught.value, TooLarge)
    for key in ("run.batch_size", "run.gradient_checkpointing", "data.buckets.resolution"):
        assert key in problem
    assert caught.value.__context__ is None, "the traceback would hold the activations"
    assert everything(t) == before


def test_more_than_is_allowed_does_not_fit() -> None:
    t = trainee()
    needed = dry_step(t, sized(), count=2).peak_bytes
    assert needed is not None
    before = everything(t)
    with pytest.raises(TooLarge, match="would save some") as caught:
        dry_step(t, sized(), count=2, allowed=needed // 2)
    assert caught.value.peak is not None and caught.value.peak > needed // 2
    assert {"run.batch_size = 1 with run.accumulate 2 times as high", "run.gradient_checkpointing = true"} == {
        *caught.value.saved
    }
    assert everything(t) == before
    dry_step(t, sized(), count=2, allowed=2 * needed)


@pytest.mark.parametrize("fits", [False, True])
def test_where_a_step_itself_has_failed_the_same_is_told(fits: bool) -> None:
    """Also where the step fits when it is tried again: something else took the memory."""

    def greedy(predict: Predict, batch: Batch) -> LossReport:
        out = predict(batch.latents, torch.zeros(2), text={}).square().flatten(1).mean(1)  # type: ignore[arg-type]
        if not fits:
            raise MemoryError
        return LossReport(out, torch.zeros(2))

    told = dry.told(trainee(greedy), sized(), count=2)
    assert "2 pictures of 96×48" in str(told) and "run.gradient_checkpointing = true would save some" in str(told)
    assert told.saved["run.gradient_checkpointing = true"] > 0


def test_what_is_kept_is_that_of_one_pass() -> None:
    kept = {passes: dry_step(trainee(), sized(), count=2, passes=passes).kept_bytes for passes in (1, 2, 3)}
    assert kept[1] > 0 and len({*kept.values()}) == 1


def test_other_errors_are_not_taken_for_it() -> None:
    def broken(predict: Predict, batch: Batch) -> LossReport:
        raise RuntimeError("upsample has no deterministic implementation. Look there.")

    t = trainee(broken)
    with pytest.raises(RuntimeError, match="no deterministic"):
        dry_step(t, sized(), count=2)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(InputError, match=r"run.deterministic .* \(upsample has no deterministic implementation\)"):
            dry_step(t, sized(), count=2)
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_memory_of_another_rank_is_everybodys_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry, "gather_objects", lambda value: [value, TooLarge("it does not fit there", peak=9), value])
    with pytest.raises(TooLarge, match="does not fit there") as caught:
        dry_step(trainee(), sized(), count=2)
    assert caught.value.peak == 9
    other = InputError("another problem")
    monkeypatch.setattr(dry, "gather_objects", lambda value: [value, TooLarge("too large"), other])
    with pytest.raises(InputError, match="another problem\ntoo large") as mixed:
        dry_step(trainee(), sized(), count=2)
    assert not isinstance(mixed.value, TooLarge)


def test_room_is_made_for_what_the_optimizer_does_not_hold_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    empty = torch.empty

    def counted(size: int, **options: Any) -> Tensor:
        asked.append(size)
        return empty(size, **options)

    t = adam(trainee())
    monkeypatch.setattr(torch, "empty", counted)
    own = 72 * 8
    dry_step(t, sized(), count=2)
    assert asked == [2 * own, 2 * 3 * own], "two moments, and copies of weights and moments while a step is taken"
    asked.clear()
    dry_step(t, sized(), count=2, state_size=4.25)
    assert asked == [4.25 * own, 2 * 5.25 * own]
    run_step(t, [batch([0])], count=1, lr_factor=1.0)
    asked.clear()
    dry_step(t, sized(), count=2)
    assert asked[0] == 0, "the moments are there now"


def test_the_report_in_words() -> None:
    report = DryReport(2.0, 3 << 30, 24 << 30, 0, (1024, 768), 4, 1_000_000)
    assert report.lines(accumulate=2, steps=3600, weight_bytes=4) == [
        "largest micro step: 4 × 1024×768 pixels, 2 s",
        "step: about 4 s",
        "memory: 3.0 of 24.0 GiB at its peak",
        "adapter: 1,000,000 weights, a file of about 4.0 MB",
        "3600 steps: about 4 h 00 min, without samples and validation",
    ]
    assert len(DryReport(2.0, None, None, 0, (8, 8), 4, 10).lines()) == 3
