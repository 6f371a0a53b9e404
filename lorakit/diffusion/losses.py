"""What a difference between prediction and target costs, element by element.

Squared error is the objective of the papers; the others count outliers less. Not here: the mean over a picture or mask
(`objectives/denoising.py`) and how much each t counts (`weightings.py`).

Source of the thresholds: scheduled pseudo-Huber loss, Khrapov et al. 2024 (arXiv:2403.16728).
"""

import math
from collections.abc import Callable
from typing import Annotated, Literal, assert_never

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from lorakit.core import settings as core_settings
from lorakit.core.types import Process


class MSE(core_settings.Settings):
    kind: Literal["mse"] = "mse"
    """d², the papers'."""


class L1(core_settings.Settings):
    kind: Literal["l1"]
    """|d|."""


class LogCosh(core_settings.Settings):
    kind: Literal["log_cosh"]
    """ln cosh d: d² / 2 where it is small, |d| - ln 2 far off."""


class _Threshold(core_settings.Settings):
    delta: float = Field(0.1, gt=0)
    """The difference from which on the loss grows no faster than |d|; of a schedule, its value at pure noise."""
    schedule: Literal["constant", "snr", "exponential"] = "constant"
    """How delta moves with t. From 1 at the clean end: snr by the signal-to-noise ratio, exponential as delta^t."""


class Huber(_Threshold):
    kind: Literal["huber"]
    """d² up to delta, then delta · (2|d| - delta): twice the textbook's, to be squared error where that is small."""


class PseudoHuber(_Threshold):
    kind: Literal["pseudo_huber"]
    """2 delta · (√(d² + delta²) - delta), huber without the corner; other trainers call it huber."""


class SmoothL1(_Threshold):
    kind: Literal["smooth_l1"]
    """d² / (2 delta) up to delta, then |d| - delta / 2 (Girshick 2015, arXiv:1504.08083, eq. 3)."""


Loss = Annotated[MSE | L1 | LogCosh | Huber | PseudoHuber | SmoothL1, Field(discriminator="kind")]


def loss(settings: Loss, process: Process) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss as a function of differences d (B, …) and t (B,), of d's shape and dtype."""

    def cost(d: Tensor, t: Tensor) -> Tensor:
        if not isinstance(settings, _Threshold):
            return elementwise(settings, d)
        return elementwise(settings, d, delta=threshold(settings, process, t).to(d).view(-1, *[1] * (d.ndim - 1)))

    return cost


def elementwise(settings: Loss, d: Tensor, *, delta: Tensor | None = None) -> Tensor:
    """The cost of each difference; `delta` broadcasts against d, and kinds without one leave it aside."""
    match settings:
        case MSE():
            return d.square()
        case L1():
            return d.abs()
        case LogCosh():
            return _log_cosh(d)
    assert delta is not None, "a threshold belongs to this kind"
    match settings:
        case Huber():
            return torch.where(d.abs() <= delta, d.square(), delta * (2 * d.abs() - delta))
        case PseudoHuber():
            # the same without the difference of two like numbers
            return 2 * delta * d.square() / ((d.square() + delta.square()).sqrt() + delta)
        case SmoothL1():
            return torch.where(d.abs() <= delta, d.square() / (2 * delta), d.abs() - delta / 2)
        case _:
            assert_never(settings)


def threshold(settings: Huber | PseudoHuber | SmoothL1, process: Process, t: Tensor) -> Tensor:
    """delta (B,) at t, in double precision.

    snr: (1 - delta) / (1 + 1/√SNR)² + delta; exponential: delta^(t / T), T being 1 for a flow (Khrapov et al., sec. 3).
    """
    delta = settings.delta
    if settings.schedule == "constant":
        return torch.full(t.shape, delta, dtype=torch.float64, device=t.device)
    if settings.schedule == "snr":
        return (1 - delta) / (1 + process.snr(t).double().rsqrt()) ** 2 + delta
    share = t.double() if process.prediction_type == "flow" else t.double() / process.timesteps
    return (share * math.log(delta)).exp()


def _log_cosh(d: Tensor) -> Tensor:
    """Two forms, each where it keeps its digits: ln(1 + 2 sinh²(d/2)) near 0, |d| + ln(1 + e^(-2|d|)) - ln 2 beyond."""
    near = torch.log1p(2 * (d.clamp(-1, 1) / 2).sinh().square())
    return torch.where(d.abs() < 1, near, d.abs() + F.softplus(-2 * d.abs()) - math.log(2))
