"""lorakit/adapters/ema.py against closed forms: what the average is after n steps, and that it goes on exactly."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lorakit.adapters.ema import Average, EmaSettings, decay_at
from lorakit.core.errors import InputError
from lorakit.core.seeding import generator
from lorakit.core.settings import validate


def weights(value: float = 0.0, *, dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.full((2, 3), value, dtype=dtype)) for name in ("a", "b")}


def walk(parameters: dict[str, nn.Parameter], step: int) -> None:
    """The weights as some training has them after `step`."""
    for name, parameter in parameters.items():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator("walk", name, step)))


def test_the_decay_is_the_usual_one_and_a_function_of_the_step() -> None:
    training_utils = pytest.importorskip("diffusers.training_utils")
    stock = training_utils.EMAModel([nn.Parameter(torch.zeros(1))], decay=0.9)
    for step in range(1, 200):
        ours = decay_at(EmaSettings(decay=0.9), step)
        assert ours == stock.get_decay(step + 1)  # diffusers counts updates before this one, from 0
        assert decay_at(EmaSettings(decay=0.9, warmup=False), step) == 0.9
    assert decay_at(EmaSettings(decay=0.9), 1) == 2 / 11
    assert decay_at(EmaSettings(decay=0.9), 79) < 0.9 == decay_at(EmaSettings(decay=0.9), 81)


@given(st.floats(0.01, 0.999), st.integers(1, 60))
def test_without_warmup_it_is_the_geometric_mean_of_the_past(decay: float, steps: int) -> None:
    """Weights that jump from 0 to 1 before the first step: 1 − d^n."""
    parameters = weights(0.0)
    average = Average(parameters, EmaSettings(decay=decay, warmup=False))
    for parameter in parameters.values():
        parameter.data.fill_(1.0)
    for step in range(1, steps + 1):
        average.update(step)
    for tensor in average.tensors.values():
        torch.testing.assert_close(tensor, torch.full((2, 3), 1 - decay**steps), rtol=1e-4, atol=1e-6)


def test_with_warmup_it_is_the_product_of_the_decays() -> None:
    """Started at 1 with weights at 0, it is ∏ (1 + k) / (10 + k): the first steps are soon forgotten."""
    parameters = weights(1.0)
    average = Average(parameters, EmaSettings(decay=0.999))
    for parameter in parameters.values():
        parameter.data.zero_()
    expected = 1.0
    for step in range(1, 30):
        average.update(step)
        expected *= (1 + step) / (10 + step)
        torch.testing.assert_close(average.tensors["b"], torch.full((2, 3), expected), rtol=1e-5, atol=0)


def test_weights_that_stay_are_their_own_average_to_the_bit() -> None:
    parameters = weights()
    walk(parameters, 0)
    average = Average(parameters, EmaSettings())
    for step in range(1, 10):
        average.update(step)
    assert all(torch.equal(average.tensors[name], parameter) for name, parameter in parameters.items())


def test_it_is_fp32_and_apart_from_the_weights() -> None:
    parameters = weights(1.0, dtype=torch.bfloat16)
    average = Average(parameters, EmaSettings(decay=0.999, warmup=False))
    for parameter in parameters.values():
        parameter.data.add_(0.5)
    average.update(1)
    for name, tensor in average.tensors.items():
        assert tensor.dtype == torch.float32 and not tensor.requires_grad
        torch.testing.assert_close(tensor, torch.full((2, 3), 1.0005))
        assert torch.equal(parameters[name], torch.full((2, 3), 1.5, dtype=torch.bfloat16))


@pytest.mark.parametrize("cut", [0, 1, 4])
def test_a_loaded_average_goes_on_bit_for_bit(cut: int) -> None:
    straight, parameters = None, weights()
    for broken in (False, True):
        walk(parameters, 0)
        average = Average(parameters, EmaSettings(decay=0.7))
        for step in range(1, 9):
            if broken and step == cut + 1:
                taken = {name: tensor.clone() for name, tensor in average.tensors.items()}
                walk(parameters, 99)  # a resumed run makes its average before the weights are back
                average = Average(parameters, EmaSettings(decay=0.7))
                average.load(taken)
            walk(parameters, step)
            average.update(step)
        if straight is None:
            straight = average.tensors
    assert straight is not None
    assert all(torch.equal(straight[name], tensor) for name, tensor in average.tensors.items())


def test_an_average_of_other_weights_is_refused() -> None:
    average = Average(weights(), EmaSettings())
    before = {name: tensor.clone() for name, tensor in average.tensors.items()}
    with pytest.raises(InputError) as error:
        average.load({"a": torch.ones(3, 2), "\x1bc": torch.ones(1)})
    text = str(error.value)
    assert "a has the shape (3, 2), (2, 3)" in text and "b is missing" in text and "\\x1bc has no place" in text
    assert all(torch.equal(before[name], tensor) for name, tensor in average.tensors.items())


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5])
def test_a_decay_that_averages_nothing_is_refused(decay: float) -> None:
    with pytest.raises(InputError, match="run.ema.decay"):
        validate(EmaSettings, {"decay": decay}, where="run.ema", name="ema")
