"""Adafactor's first two steps in double precision, with a rate and without."""

import math

import pytest
import torch
from torch import Tensor

from lorakit.optimizers.adafactor import Settings, build


def gradient(step: int, shape: tuple[int, ...]) -> Tensor:
    return torch.cos(torch.arange(math.prod(shape)) * (step + 1.0)).view(shape)


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


@pytest.mark.parametrize("shape", [(5, 6), (4, 3, 2, 2)])
@pytest.mark.parametrize("lr", [0.03, None])
@pytest.mark.parametrize("size", [1.0, 0.0])
def test_the_papers_algorithm(shape: tuple[int, ...], lr: float | None, size: float) -> None:
    """arXiv:1804.04235, algorithm 4; its relative steps are scaled by the weights' size, at least 1e-3."""
    weight = torch.nn.Parameter(torch.linspace(-1, 1, math.prod(shape)).view(shape) * size)
    optimizer = build(Settings(lr=lr, weight_decay=0.1), [{"params": [weight], "name": "unet"}])
    expected = weight.detach().double()
    rows = columns = torch.zeros((), dtype=torch.float64)
    for step in range(2):
        weight.grad = gradient(step, shape)
        optimizer.step()
        g = gradient(step, shape).double()
        decay = 1 - (step + 1) ** -0.8
        rows = decay * rows + (1 - decay) * g.square().mean(-1, keepdim=True)
        columns = decay * columns + (1 - decay) * g.square().mean(-2, keepdim=True)
        update = g / (rows * columns / rows.mean(-2, keepdim=True)).sqrt()
        update = update / rms(update).clamp(min=1)
        rate = lr or min(0.01, 1 / math.sqrt(step + 1)) * max(1e-3, rms(expected).item())
        expected = expected - rate * (0.1 * expected + update)
        torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-7)


def test_settings_arrive() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3))
    group = build(Settings(lr=0.1, clip_threshold=2.0, decay_rate=-0.5, beta1=0.9), [{"params": [weight]}])
    found = group.param_groups[0]
    assert (found["lr"], found["clip_threshold"], found["decay_rate"], found["beta1"]) == (0.1, 2.0, -0.5, 0.9)
