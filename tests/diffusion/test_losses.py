"""Losses against torch's own, their limits, and their gradients in double precision."""

import math

import pytest
import torch
from pydantic import TypeAdapter
from torch.nn import functional as F

from lorakit.diffusion import GaussianDiffusion, RectifiedFlow
from lorakit.diffusion.losses import Loss, elementwise, loss, threshold

D = torch.cat([torch.linspace(-4, 4, 801, dtype=torch.float64), torch.tensor([1e-7, -1e-9], dtype=torch.float64)])
ZERO = torch.zeros_like(D)
KINDS = ["mse", "l1", "log_cosh", "huber", "pseudo_huber", "smooth_l1"]
THRESHOLDS = KINDS[3:]


def losses(**values):
    return TypeAdapter(Loss).validate_python(values)


def cost(d=D, *, delta=0.7, **values):
    return elementwise(losses(**values), d, delta=torch.tensor(delta, dtype=d.dtype))


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-15)


def test_each_is_what_torch_says():
    close(cost(kind="mse"), F.mse_loss(D, ZERO, reduction="none"))
    close(cost(kind="l1"), F.l1_loss(D, ZERO, reduction="none"))
    for delta in (0.05, 0.7, 3.0):
        close(cost(kind="huber", delta=delta), 2 * F.huber_loss(D, ZERO, reduction="none", delta=delta))
        close(cost(kind="smooth_l1", delta=delta), F.smooth_l1_loss(D, ZERO, reduction="none", beta=delta))
        close(cost(kind="pseudo_huber", delta=delta), 2 * delta * ((D**2 + delta**2).sqrt() - delta), 1e-6)
    near = D.abs() > 1e-6
    close(cost(kind="log_cosh")[near], D.cosh().log()[near], 1e-9)


def test_the_limits():
    close(cost(kind="huber", delta=1e9), D**2)
    close(cost(kind="pseudo_huber", delta=1e9), D**2, 1e-9)
    torch.testing.assert_close(cost(kind="smooth_l1", delta=1e-9), D.abs(), rtol=0, atol=1e-9)
    far = torch.tensor([-300.0, 90.0, 1e4])  # single precision, in which cosh overflows
    torch.testing.assert_close(cost(far, kind="log_cosh"), far.abs() - math.log(2))
    small = torch.tensor([1e-4, -3e-4])
    torch.testing.assert_close(cost(small, kind="log_cosh"), small**2 / 2, rtol=1e-5, atol=0)
    torch.testing.assert_close(cost(small, kind="pseudo_huber"), small**2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_double_precision(kind):
    d = torch.tensor([-2.5, -1.3, -0.4, -0.02, 0.03, 0.6, 0.9, 1.4, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: cost(x, kind=kind), (d,))
    nothing = torch.zeros(3, requires_grad=True)
    cost(nothing, kind=kind).sum().backward()
    assert nothing.grad is not None and nothing.grad.tolist() == [0.0] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_is_even_and_rises_with_the_distance(kind):
    of = cost(kind=kind)[:801]
    close(of, of.flip(0), 1e-9)
    assert bool((of[400:].diff() > 0).all()) and of[400] < 1e-15


def test_thresholds_in_closed_form():
    process = GaussianDiffusion()
    t = torch.arange(1000)
    sigma = ((1 - process.alphas_cumprod) / process.alphas_cumprod).sqrt()
    close(threshold(losses(kind="huber", delta=0.3), process, t), torch.full((1000,), 0.3, dtype=torch.float64))
    close(threshold(losses(kind="huber", delta=0.3, schedule="snr"), process, t), 0.7 / (1 + sigma) ** 2 + 0.3, 1e-9)
    exponential = threshold(losses(kind="huber", delta=0.3, schedule="exponential"), process, t)
    close(exponential, 0.3 ** (t.double() / 1000))
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    flow = RectifiedFlow()
    close(threshold(losses(kind="huber", delta=0.3, schedule="snr"), flow, t), 0.7 * (1 - t) ** 2 + 0.3, 1e-9)
    close(threshold(losses(kind="huber", delta=0.3, schedule="exponential"), flow, t), 0.3**t)


@pytest.mark.parametrize("kind", THRESHOLDS)
@pytest.mark.parametrize("process", [GaussianDiffusion(zero_terminal_snr=True), RectifiedFlow()], ids=["gauss", "flow"])
def test_each_example_has_its_own_threshold(kind, process):
    t = torch.tensor([0, 400, 999]) if process.prediction_type != "flow" else torch.tensor([0.0, 0.4, 1.0])
    d = torch.linspace(-3, 3, 3 * 2 * 4 * 5, dtype=torch.float32).view(3, 2, 4, 5)
    for schedule in ("constant", "snr", "exponential"):
        settings = losses(kind=kind, delta=0.2, schedule=schedule)
        found = loss(settings, process)(d, t)
        assert found.dtype == d.dtype and found.shape == d.shape and bool(found.isfinite().all())
        for i, delta in enumerate(threshold(settings, process, t).tolist()):
            torch.testing.assert_close(found[i], cost(d[i], kind=kind, delta=delta))
