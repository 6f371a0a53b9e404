"""Which t a sample is trained at: laws of t, each the inverse of its distribution function.

A law takes a uniform quantile in [0, 1) to the share u of the way from clean (0) to noise (1), without randomness of
its own and never falling, so that even quantiles give an even picture of the law. `law` puts u into the process's unit:
step floor(u · timesteps) of a discrete process, t = u of a flow. With `model_shift` u moves on by the flow's own shift,
which may go by the picture's size. Not here: how much each t counts (`weightings.py`).

Sources: SD3, Esser et al. 2024 (arXiv:2403.03206), section 3.1; style-friendly SNR, Choi et al. 2024
(arXiv:2411.14793); T2I-Adapter, Mou et al. 2023 (arXiv:2302.08453), section 3.4.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Annotated, Literal, Protocol, assert_never

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lorakit.core import settings as core_settings
from lorakit.core.types import Process
from lorakit.diffusion.flow import RectifiedFlow, shift_time

Inverse = Callable[[Tensor], Tensor]
POINTS = 2**16  # of a tabulated law: t is wrong by less than 1e-6, for half a megabyte
LEAST_MASS = 1e-9  # between min and max: below it the quantiles of double precision run out


class _Drawn(core_settings.Settings):
    """What all laws have."""

    stratified: bool = False
    """Whether the N samples of a step are spread over the law, one in each N-th of it, so that the loss varies less."""


class _Range(_Drawn):
    """What all laws on the whole way have: the part of it that is kept."""

    min: float = Field(0.0, ge=0, lt=1)
    """No t below this share of the way from clean to noise; the law keeps its shape in what is left."""
    max: float = Field(1.0, gt=0, le=1)
    """No t above this share of the way from clean to noise."""

    @model_validator(mode="after")
    def _in_order(self) -> "_Range":
        if self.min >= self.max:
            raise ValueError(f"min = {self.min} must be below max = {self.max}.")
        return self


class _Whole(_Range):
    """What the laws have that know of no shift."""

    model_shift: bool = False
    """Whether t moves on as in sampling: by the model's own shift, constant or by picture size. For flows."""


class Uniform(_Whole):
    kind: Literal["uniform"] = "uniform"
    """Every t alike (DDPM)."""


class LogitNormal(_Whole):
    kind: Literal["logit_normal"]
    """The logit of t is normal: mostly the middle (SD3 eq. 19)."""
    mean: float = 0.0
    """Mean of the logit: above 0 more noise. ln(shift) does what a shift of t would."""
    std: float = Field(1.0, gt=0)
    """Standard deviation of the logit: the larger, the more of both ends."""


class Sigmoid(_Whole):
    kind: Literal["sigmoid"]
    """The sigmoid of a scaled standard normal number, as other trainers name it: logit_normal with mean 0."""
    scale: float = Field(1.0, gt=0)
    """What the normal number is multiplied by."""


class Mode(_Whole):
    kind: Literal["mode"]
    """More of the middle, and some of both ends for certain (SD3 eq. 20)."""
    scale: float = Field(1.29, ge=-1, le=2 / (math.pi - 2))
    """How much more of the middle; below 0: of the ends."""


class CosMap(_Whole):
    kind: Literal["cosmap"]
    """The log-SNR of the cosine schedule, for a flow (SD3 eq. 21)."""


class Beta(_Whole):
    kind: Literal["beta"]
    """The beta distribution."""
    alpha: float = Field(2.0, ge=0.01, le=1000)
    """The larger, the less of the clean end."""
    beta: float = Field(2.0, ge=0.01, le=1000)
    """The larger, the less of the noisy end."""


class Shifted(_Range):
    kind: Literal["shifted"]
    """Uniform, moved by a constant: shift · t / (1 + (shift - 1) · t) (SD3). For a flow's own: uniform, model_shift."""
    shift: float = Field(3.0, gt=0)
    """Above 1: more noise."""


class LogSNR(_Whole):
    kind: Literal["log_snr"]
    """The logarithm of the signal-to-noise ratio is normal, within what the process has. By default mostly noise."""
    mean: float = -6.0
    """Mean of the log-SNR: the lower, the more noise."""
    std: float = Field(2.0, gt=0)
    """Standard deviation of the log-SNR."""


class Content(_Whole):
    kind: Literal["content"]
    """More of the noisy steps, at which a picture's structure is made: 1 - (1 - q)^power (T2I-Adapter's cubic law)."""
    power: float = Field(3.0, gt=1)
    """How strongly."""


class Style(_Whole):
    kind: Literal["style"]
    """More of the clean steps, at which a picture gets its texture and colours: q^power."""
    power: float = Field(3.0, gt=1)
    """How strongly."""


class Listed(_Drawn):
    kind: Literal["list"]
    """These and no others, each as often as it stands here."""
    values: list[Annotated[float, Field(ge=0)]] = Field(min_length=1)
    """In the process's own unit: whole steps from 0, or numbers in 0 … 1 for a flow."""


_Laws = Uniform | LogitNormal | Sigmoid | Mode | CosMap | Beta | Shifted | LogSNR | Content | Style
Timesteps = Annotated[_Laws | Listed, Field(discriminator="kind")]


class Law(Protocol):
    """Quantiles (B,) in [0, 1) to t (B,) in the process's unit: integers, or of the quantiles' dtype for a flow.

    `size` is (h, w) of the latents; what it is matters only where the model's shift goes by it.
    """

    def __call__(self, quantile: Tensor, *, size: Sequence[int] = ()) -> Tensor: ...


def law(settings: Timesteps, process: Process) -> Law:
    """The law of t for a process.

    Raises ValueError for listed steps that the process does not have, where nothing is left between min and max, and
    for a model's shift where it has none.
    """
    if isinstance(settings, Listed):
        fixed = _of_list(settings, process)
    elif isinstance(settings, _Whole) and settings.model_shift:
        if not isinstance(process, RectifiedFlow) or (process.dynamic is None and process.shift == 1):
            raise ValueError(
                "objective.timesteps.model_shift: this model has no shift of its own: leave it out, or say how much "
                'with kind = "shifted".'
            )
        if process.dynamic is not None:
            return _by_size(settings, process)
        fixed = _of_share(settings, process, process.shift)
    else:
        fixed = _of_share(settings, process)
    return lambda quantile, *, size=(): fixed(quantile)


def _by_size(settings: _Laws, process: RectifiedFlow) -> Law:
    dynamic = process.dynamic
    assert dynamic is not None

    @cache
    def at(tokens: int) -> Inverse:
        return _of_share(settings, process, dynamic.at(tokens))

    for tokens in (dynamic.base_tokens, dynamic.max_tokens):
        at(tokens)  # refuses now what has nothing left between min and max
    return lambda quantile, *, size=(): at(dynamic.tokens(*size))(quantile)


def _of_share(settings: _Laws, process: Process, shift: float = 1.0) -> Inverse:
    """Quantiles to t by way of a law's share, then shifted, of what lies between min and max."""
    plain = _inverse(settings, process)
    shifted = plain if shift == 1 else lambda q: shift_time(plain(q), shift)
    inverse = _within(shifted, settings.min, settings.max)
    if process.prediction_type == "flow":
        return lambda quantile: inverse(quantile.double()).to(quantile.dtype)
    count = process.timesteps
    # what rounding does to 0.29 · 1000 must not let in a step too many
    first, end = math.floor(settings.min * count + 1e-6), math.ceil(settings.max * count - 1e-6)
    return lambda quantile: (inverse(quantile.double()) * count).long().clamp(first, max(first, end - 1))


def _of_list(settings: Listed, process: Process) -> Inverse:
    flow, values = process.prediction_type == "flow", sorted(settings.values)
    wrong = [f"{v:g}" for v in values if (v > 1 if flow else v != int(v) or v >= process.timesteps)]
    if wrong:
        unit = "numbers in 0 … 1" if flow else f"whole numbers in 0 … {process.timesteps - 1}"
        raise ValueError(f"objective.timesteps.values: {', '.join(wrong)}: the timesteps of this model are {unit}.")

    @cache  # a copy to a GPU in each step would wait for it
    def there(dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    def timesteps(quantile: Tensor) -> Tensor:
        at = (quantile.double() * len(values)).long().clamp(max=len(values) - 1)
        return there(quantile.dtype if flow else torch.long, quantile.device)[at]

    return timesteps


def _inverse(settings: _Laws, process: Process) -> Inverse:
    """Quantiles (B,) in double precision to shares of the way (B,)."""
    match settings:
        case Uniform():
            return lambda q: q
        case LogitNormal():
            return _logit_normal(settings.mean, settings.std)
        case Sigmoid():
            return _logit_normal(0.0, settings.scale)
        case Mode(scale=s):
            # eq. 20 at 1 - q, so that it rises
            return lambda q: q - s * ((q * (math.pi / 2)).sin() ** 2 - q)
        case CosMap():
            # 1 - 1 / (tan(π q / 2) + 1), without the pole
            return lambda q: (q * (math.pi / 2)).sin() / ((q * (math.pi / 2)).sin() + (q * (math.pi / 2)).cos())
        case Beta(alpha=a, beta=b):
            return _beta(a, b)
        case Shifted(shift=s):
            return lambda q: shift_time(q, s)
        case LogSNR():
            if process.prediction_type == "flow":  # snr = ((1 - t) / t)²
                return _logit_normal(-settings.mean / 2, settings.std / 2)
            return _log_snr(settings, process)
        case Content(power=p):
            return lambda q: 1 - (1 - q) ** p
        case Style(power=p):
            return lambda q: q**p
        case _:
            assert_never(settings)


def _logit_normal(mean: float, std: float) -> Inverse:
    return lambda q: torch.sigmoid(mean + std * torch.special.ndtri(q))


def _beta(alpha: float, beta: float) -> Inverse:
    """Tabulated over x = logit(t): there the density t^alpha (1 - t)^beta is smooth, and falls at both ends."""
    middle, width = math.log(alpha / beta), 10 * math.sqrt(1 / alpha + 1 / beta)
    low = max(middle - width - 40 / alpha, min(middle, 0) - 50)  # t is nothing beyond, but its mass may not be
    high = min(middle + width + 40 / beta, max(middle, 0) + 50)
    x = torch.linspace(low, high, POINTS, dtype=torch.float64)
    log_density = alpha * torch.nn.functional.logsigmoid(x) + beta * torch.nn.functional.logsigmoid(-x)
    density = (log_density - log_density.max()).exp()
    # what lies below is exponential there: its integral is density / alpha; likewise above
    below, above = density[:1] / alpha, density[-1:] / beta
    cumulative = torch.cat([below, below + torch.cumulative_trapezoid(density, dx=(high - low) / (POINTS - 1))])
    logit = _Table(cumulative / (cumulative[-1] + above), x)
    return lambda q: torch.sigmoid(logit(q))


def _log_snr(settings: LogSNR, process: Process) -> Inverse:
    """A normal law of -log-SNR, cut to the steps that a discrete process has, and these by linear interpolation."""
    snr = process.snr(torch.arange(process.timesteps)).double()
    noisiness = -snr[snr > 0].log()  # a step without signal has no logarithm, and no part in the law
    share = (torch.arange(len(noisiness), dtype=torch.float64) + 0.5) / process.timesteps
    ends = torch.special.ndtr((noisiness[[0, -1]] + settings.mean) / settings.std)
    low, high = ends.tolist()
    _refuse_no_mass(high - low, "mean and std leave nothing within the signal-to-noise ratios of this model")
    table = _Table(noisiness, share)
    return lambda q: table(-settings.mean + settings.std * torch.special.ndtri(low + (high - low) * q))


class _Table:
    """The piecewise linear function through the points (x, y), x rising; constant beyond them."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __call__(self, at: Tensor) -> Tensor:
        if self.x.device != at.device:  # moved once
            self.x, self.y = self.x.to(at.device), self.y.to(at.device)
        right = torch.searchsorted(self.x, at.contiguous()).clamp(1, len(self.x) - 1)
        x0, x1, y0, y1 = self.x[right - 1], self.x[right], self.y[right - 1], self.y[right]
        part = ((at - x0) / (x1 - x0).clamp(min=torch.finfo(torch.float64).tiny)).clamp(0, 1)
        return y0 + part * (y1 - y0)


def _within(inverse: Inverse, least: float, most: float) -> Inverse:
    """The law given least ≤ t ≤ most: F⁻¹(F(least) + q · (F(most) - F(least)))."""
    if (least, most) == (0.0, 1.0):
        return inverse
    low = _reached(inverse, least) if least > 0 else 0.0
    high = _reached(inverse, most) if most < 1 else 1.0
    _refuse_no_mass(high - low, f"the law leaves nothing between min = {least:g} and max = {most:g}")
    return lambda q: inverse(low + q * (high - low)).clamp(least, most)


def _reached(inverse: Inverse, share: float) -> float:
    """F(share): the quantile at which the law gets there, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if float(inverse(torch.tensor([middle], dtype=torch.float64))) < share:
            low = middle
        else:
            high = middle
    return high


def _refuse_no_mass(mass: float, what: str) -> None:
    if not mass > LEAST_MASS:
        raise ValueError(f"objective.timesteps: {what}: move them.")
