"""The loss on what is put aside: fixed, without dropout, and of all ranks together."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lorakit.core.errors import InputError
from lorakit.core.types import Batch, LossReport, Predict
from lorakit.training import validation
from lorakit.training.validation import validation_loss
from tests.training.test_step import batch, trainee


def objective(predict: Predict, given: Batch) -> LossReport:
    assert given.latents is not None
    t = torch.zeros(len(given.keys))
    return LossReport(predict(given.latents, t, text=given.text).square().flatten(1).mean(1), t)


def test_dropout_is_off_while_it_is_measured_and_on_again_after() -> None:
    t = trainee(objective)
    layer = nn.Dropout(0.5)
    inner = t.family.predict
    t.family.predict = lambda x, step, text, sizes: layer(inner(x, step, text, sizes=sizes))  # type: ignore[method-assign]
    t = replace(t, adapted={"unet": layer.train()})
    state = torch.get_rng_state()
    first = validation_loss(t, [batch([0, 1])])
    assert layer.training and torch.equal(torch.get_rng_state(), state)
    assert validation_loss(t, [batch([0, 1])]) == first
    assert first is not None and first[1] == 2


def test_it_is_the_mean_over_all_samples_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    t = trainee(objective)
    whole = validation_loss(t, [batch([0, 1, 2])])
    assert validation_loss(t, [batch([0]), batch([1, 2])]) == pytest.approx(whole)

    def with_another_rank(tensors: list[Tensor]) -> None:
        tensors[0] += torch.tensor([10.0, 5.0, 0.0, 0.0])

    monkeypatch.setattr(validation, "sum_tensors", with_another_rank)
    measured = validation_loss(t, [batch([0, 1, 2])])
    assert measured is not None and whole is not None
    loss, count = measured
    assert count == 8 and loss == pytest.approx((whole[0] * 3 + 10) / 8)


def test_it_is_abandoned_between_batches_and_by_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    t = trainee(objective)
    seen = []

    def batches() -> Iterator[Batch]:
        for number in range(5):
            seen.append(number)
            yield batch([number])

    assert validation_loss(t, batches(), abandon=lambda: len(seen) == 3) is None
    assert seen == [0, 1, 2]
    monkeypatch.setattr(validation, "sum_tensors", lambda tensors: tensors[0].add_(torch.tensor([0.0, 0.0, 1.0, 0.0])))
    assert validation_loss(t, [batch([0])]) is None, "another rank was asked to stop"


def test_what_fails_on_one_rank_is_raised_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Dropout(0.5).train()
    t = replace(trainee(objective), adapted={"unet": layer})
    met = []

    def broken() -> Iterator[Batch]:
        yield batch([0])
        raise InputError("x.png: it was changed")

    monkeypatch.setattr(validation, "sum_tensors", lambda tensors: met.append(tensors[0].clone()))
    with pytest.raises(InputError, match="x.png"):
        validation_loss(t, broken())
    assert len(met) == 1 and layer.training, "the others wait for this rank's part"
    monkeypatch.setattr(validation, "sum_tensors", lambda tensors: tensors[0].add_(torch.tensor([0.0, 0.0, 0.0, 1.0])))
    monkeypatch.setattr(validation, "gather_objects", lambda mine: [mine, "InputError: x.png"])
    with pytest.raises(RuntimeError, match="InputError: x.png"):
        validation_loss(t, [batch([0])])
