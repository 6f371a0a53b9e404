"""The loss on chosen pictures: fixed, plain, without dropout, each number under its own name, of all ranks together."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.core.errors import InputError
from lorakit.core.types import Batch, LossReport, Predict
from lorakit.diffusion import GaussianDiffusion, RectifiedFlow
from lorakit.training import validation
from lorakit.training.step import Trainee
from lorakit.training.validation import BANDS, Measured, Validation, curves, record, validation_loss
from tests.training.test_step import batch, trainee


def untouched(predict: Predict, given: Batch) -> LossReport:
    raise AssertionError("the training's own objective is not what is measured")


def watching(process: Any = None, predict: Any = None) -> Trainee:
    """A trainee whose network says `predict(x_t, t)`: zeros, so that a loss is the target's mean square."""
    family = SimpleNamespace(
        backbone="unet",
        process=process or GaussianDiffusion(prediction_type="epsilon"),
        predict=lambda x, t, text, sizes: (predict or (lambda x, t: torch.zeros_like(x)))(x, t),
    )
    return replace(trainee(untouched), family=family)  # type: ignore[arg-type]


def picture(entry: int) -> Batch:
    """One sample in each band; the noise is `entry` everywhere, so its mean square entry²."""
    quantile = torch.tensor([(k + 0.5) / BANDS for k in range(BANDS)])
    given = batch([entry] * BANDS)
    assert given.latents is not None
    return replace(given, quantile=quantile, noise=torch.full_like(given.latents, entry))


def pictures(sets: dict[str, list[int]], *, asked: list[int] | None = None) -> Validation:
    """Examples 0 … 4 are of source 0, those from 5 on of source 2; source 1 has none."""

    def batches(entries: Sequence[int]) -> Iterator[Batch]:
        for entry in entries:
            if asked is not None:
                asked.append(entry)
            yield picture(entry)

    return Validation(sets, source_of=lambda entry: 0 if entry < 5 else 2, sources=3, batches=batches)


def test_each_source_s_and_each_set_s_numbers_are_its_own() -> None:
    found = validation_loss(watching(), pictures({"held_out": [1, 3, 6], "training": [7, 2]}))
    assert found is not None
    alike = dict.fromkeys(validation.BAND_NAMES, pytest.approx((1 + 9 + 36) / 3))
    assert found["held_out"] == Measured(pytest.approx(46 / 3), 3 * BANDS, {"0": 5.0, "2": 36.0}, alike)
    assert found["training"].by_source == {"2": 49.0, "0": 4.0} and found["training"].loss == (49 + 4) / 2


def test_each_band_s_number_is_its_own_and_they_go_from_clean_to_noise() -> None:
    def of_t(x: Tensor, t: Tensor) -> Tensor:
        return t.to(x).reshape(-1, 1, 1, 1).expand_as(x)

    found = validation_loss(watching(predict=of_t), pictures({"held_out": [0, 5]}))
    assert found is not None
    # the target is the noise, 0 and 5, and the prediction t
    steps = dict(zip(("0-0.25", "0.25-0.5", "0.5-0.75", "0.75-1"), (125, 375, 625, 875), strict=True))
    expected = {name: (t**2 + (t - 5) ** 2) / 2 for name, t in steps.items()}
    assert found["held_out"].by_band == pytest.approx(expected) and list(found["held_out"].by_band) == list(steps)
    assert found["held_out"].loss == pytest.approx(sum(expected.values()) / 4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_it_is_the_plain_loss_of_the_process_s_own_target(kind: str) -> None:
    process = RectifiedFlow() if kind == "flow" else GaussianDiffusion(prediction_type=kind)
    found = validation_loss(watching(process), pictures({"held_out": [2]}))
    given = picture(2)
    assert found is not None and given.latents is not None
    t = given.quantile if kind == "flow" else (given.quantile * 1000).long()
    target = process.target(given.latents, t, given.noise).square().flatten(1).mean(1)
    assert list(found["held_out"].by_band.values()) == pytest.approx(target.tolist(), rel=1e-6)


def test_dropout_is_off_while_it_is_measured_and_on_again_after() -> None:
    layer = nn.Dropout(0.5)
    t = replace(watching(predict=lambda x, t: layer(x)), adapted={"unet": layer.train()})
    state = torch.get_rng_state()
    first = validation_loss(t, pictures({"held_out": [1, 2]}))
    assert layer.training and torch.equal(torch.get_rng_state(), state)
    assert validation_loss(t, pictures({"held_out": [1, 2]})) == first


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_pictures_and_their_numbers_add_up(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = {"held_out": [1, 3, 6, 8], "training": [2, 5]}
    alone = validation_loss(watching(), pictures(sets))
    parts: list[list[Tensor]] = []
    asked: list[int] = []
    monkeypatch.setattr(validation, "world", lambda: world)

    def to_the_others(tensors: list[Tensor]) -> None:
        for tensor, *others in zip(tensors, *parts, strict=True):
            tensor += sum(others)

    for number in range(world):
        monkeypatch.setattr(validation, "rank", lambda number=number: number)
        keep = parts.append if number < world - 1 else to_the_others
        monkeypatch.setattr(validation, "sum_tensors", lambda tensors, keep=keep: keep(list(tensors)))
        found = validation_loss(watching(), pictures(sets, asked=asked))
    assert found == alone and asked == [1, 3, 6, 8, 2, 5], "each is measured once"


def test_it_is_abandoned_between_pictures_and_by_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    given = pictures({"held_out": [0, 1, 2, 3, 4]}, asked=asked)
    assert validation_loss(watching(), given, abandon=lambda: len(asked) == 3) is None
    assert asked == [0, 1, 2]
    monkeypatch.setattr(validation, "sum_tensors", lambda tensors: tensors[1].add_(torch.tensor([1.0, 0.0])))
    assert validation_loss(watching(), pictures({"held_out": [0]})) is None, "another rank was asked to stop"


def test_what_fails_on_one_rank_is_raised_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Dropout(0.5).train()
    t = replace(watching(), adapted={"unet": layer})
    met = []

    def broken(entries: Sequence[int]) -> Iterator[Batch]:
        yield picture(0)
        raise InputError("x.png: it was changed")

    given = replace(pictures({"held_out": [0, 1]}), batches=broken)
    monkeypatch.setattr(validation, "sum_tensors", lambda tensors: met.append(tensors[1].clone()))
    with pytest.raises(InputError, match="x.png"):
        validation_loss(t, given)
    assert len(met) == 1 and layer.training, "the others wait for this rank's part"
    monkeypatch.setattr(validation, "sum_tensors", lambda tensors: tensors[1].add_(torch.tensor([0.0, 1.0])))
    monkeypatch.setattr(validation, "gather_objects", lambda mine: [mine, "InputError: x.png"])
    with pytest.raises(RuntimeError, match="InputError: x.png"):
        validation_loss(t, pictures({"held_out": [0]}))


def test_a_line_says_what_was_measured_and_how_far_apart_it_is() -> None:
    held_out = Measured(0.5, 8, {"1": 0.5}, {"0-0.25": 0.25, "0.25-0.5": 0.75})
    trained = Measured(0.25, 8, {"0": 0.25}, {"0-0.25": None, "0.25-0.5": 0.25})
    line = record(20, {"held_out": held_out, "training": trained}, seconds=1.0)
    assert list(line)[:4] == ["step", "measured", "loss", "samples"] and line["measured"] == "held_out"
    assert (line["loss"], line["training"]["loss"], line["train_minus_validation"]) == (0.5, 0.25, -0.25)
    json.dumps(line, allow_nan=False)
    assert curves(line) == {
        "validation_loss": 0.5,
        "validation_loss_by_source/1": 0.5,
        "validation_loss_by_band/0-0.25": 0.25,
        "validation_loss_by_band/0.25-0.5": 0.75,
        "training_loss": 0.25,
        "training_loss_by_source/0": 0.25,
        "training_loss_by_band/0.25-0.5": 0.25,
        "train_minus_validation": -0.25,
    }


def test_what_only_training_pictures_say_is_not_called_validation() -> None:
    line = record(0, {"training": Measured(0.25, 4, {"0": 0.25}, {})}, seconds=1.0)
    assert line["measured"] == "training" and line["loss"] == 0.25 and "train_minus_validation" not in line
    assert curves(line) == {"training_loss": 0.25, "training_loss_by_source/0": 0.25}
    broken = Measured(None, 4, {"0": None}, {})
    assert record(0, {"held_out": broken, "training": broken}, seconds=1.0)["train_minus_validation"] is None
