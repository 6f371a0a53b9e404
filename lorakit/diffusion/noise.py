"""Which noise a sample is trained with: standard normal as in the papers, or changed in one of three ways.

    offset        noise + strength · z: besides the white noise one number z for a whole channel (Guttenberg 2023,
                  crosslabs.org/blog/diffusion-with-offset-noise), since the average brightness survives white noise
    pyramid       (√2 · noise + Σ discount^k · z_k) / σ: z_k is noise at ever lower resolutions, enlarged (Whitaker
                  2023, "multi-resolution noise")
    perturbation  the input is mixed from noise + gamma · z, the target from noise alone: inputs that are as wrong as
                  those of sampling are (Ning et al. 2023, arXiv:2301.11706)

The pyramid comes first and has variance 1 everywhere; the offset comes on top, and is not normalised. What is random of
it is drawn with the sample by `extra`, and mixed in by `noises`. Batches without it, those of validation, have plain
noise: like dropout, this belongs to training, and losses stay comparable between runs.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from lorakit.core import settings as core_settings
from lorakit.core.types import Batch, Process


class Offset(core_settings.Settings):
    """A shift of each whole channel, drawn anew for each sample: for pictures darker or brighter than the model's."""

    strength: float = Field(0.05, ge=0, le=1)
    """Standard deviation of the shift; that of the noise itself is 1."""
    adaptive: float = Field(0.0, ge=-10, le=10)
    """What is added to strength: so many times the absolute mean of the sample's own channel. At least 0 is left."""
    random: bool = False
    """Whether each sample's shift is multiplied by a random number in 0 … 1."""

    @model_validator(mode="after")
    def _some(self) -> "Offset":
        if self.strength == 0 and self.adaptive <= 0:
            raise ValueError("strength = 0 without adaptive above 0 shifts nothing: leave the section out.")
        return self


class Pyramid(core_settings.Settings):
    """Noise of several resolutions, of variance 1 at each place: for composition and colour."""

    iterations: int = Field(6, ge=2, le=16)
    """How many resolutions, the full one included; each has sides 2 to 4 times smaller, until one is 1."""
    discount: float = Field(0.3, gt=0, le=1)
    """What each resolution counts of the one before."""


class Perturbation(core_settings.Settings):
    """More noise in the model's input than the model is asked for: less to lose when sampling errs."""

    gamma: float = Field(0.1, gt=0, le=1)
    """Standard deviation of what is added to the input's noise."""
    random: bool = False
    """Whether each sample's gamma is multiplied by a random number in 0 … 1."""


class Noise(core_settings.Settings):
    offset: Offset | None = None
    """A shift of whole channels. Not for flows, and of no use to models with zero terminal SNR."""
    pyramid: Pyramid | None = None
    """Noise of several resolutions. Not for flows, and of no use to models with zero terminal SNR."""
    perturbation: Perturbation | None = None
    """More noise in the input than in the target."""


def noise_problems(settings: Noise, process: Process) -> list[str]:
    """Why these settings say nothing for this process, each with its key and what to do; empty: they do.

    A flow is the way from standard normal noise to the data, and sampling begins with that noise: from another noise it
    is another way, and at its end no signal is left that the model would have to be kept from reading.
    """
    if process.prediction_type != "flow":
        return []
    return [
        f"objective.noise.{name} is not defined for a flow, which this model is: it begins at standard normal noise. "
        "Leave the section out."
        for name in _of_other_covariance(settings)
    ]


def noise_advice(settings: Noise, process: Process) -> list[str]:
    """What a person should know of these settings for this process, each with its key.

    Offset and pyramid keep a model from reading the little signal that is left at the last step, from which sampling
    does not start. With zero terminal SNR none is left (Lin et al. 2023, arXiv:2305.08891).
    """
    if process.prediction_type == "flow" or process.snr(torch.tensor([process.timesteps - 1])).any():
        return []
    return [
        f"objective.noise.{name}: this model's last step is pure noise (zero terminal SNR), as sampling's start is: "
        "other noise has nothing to mend there, and makes the two differ. Leave it out unless the model was made so."
        for name in _of_other_covariance(settings)
    ]


def _of_other_covariance(settings: Noise) -> list[str]:
    return [name for name in ("offset", "pyramid") if getattr(settings, name) is not None]


def extra(settings: Noise, shape: tuple[int, ...], of: Callable[[str], torch.Generator]) -> dict[str, Tensor]:
    """What is random of a sample with latents (C, h, w) besides its noise; `of` gives its generator for a purpose."""
    found = {}
    if settings.offset is not None:
        g = of("offset noise")
        found["offset"] = torch.randn(shape[0], 1, 1, generator=g) * _share(g, drawn=settings.offset.random)
    if settings.pyramid is not None:
        found["pyramid"], found["variance"] = _pyramid(settings.pyramid, shape, of("pyramid noise"))
    if settings.perturbation is not None:
        g = of("input perturbation")
        found["perturbation"] = torch.randn(shape, generator=g) * _share(g, drawn=settings.perturbation.random)
    return found


def noises(settings: Noise, batch: Batch) -> tuple[Tensor, Tensor]:
    """The noise of the target and the noise of the input, (B, C, h, w), of a batch with latents."""
    noise = batch.noise
    if not batch.extra:
        return noise, noise
    if settings.pyramid is not None:
        noise = (math.sqrt(2) * noise + batch.extra["pyramid"]) / (2 + batch.extra["variance"]).sqrt()
    if settings.offset is not None:
        assert batch.latents is not None, "pixels are encoded before"
        level = batch.latents.mean((2, 3), keepdim=True).abs()
        strength = (settings.offset.strength + settings.offset.adaptive * level).clamp(min=0)
        noise = noise + strength * batch.extra["offset"]
    if settings.perturbation is None:
        return noise, noise
    return noise, noise + settings.perturbation.gamma * batch.extra["perturbation"]


def _share(g: torch.Generator, *, drawn: bool) -> Tensor:
    return torch.rand((), generator=g) if drawn else torch.ones(())


def _pyramid(settings: Pyramid, shape: tuple[int, ...], g: torch.Generator) -> tuple[Tensor, Tensor]:
    """The sum of the lower resolutions (C, h, w), and its variance at each place (1, h, w).

    Level k has sides r^k times smaller with r drawn from 2 … 4, and is enlarged bilinearly. The full resolution counts
    twice, as the sample's own noise and as level 0, which is why `noises` multiplies it by √2: so the numbers mean what
    they do elsewhere.
    """
    channels, height, width = shape
    total, variance = torch.zeros(shape), torch.zeros(1, height, width)
    for k in range(1, settings.iterations):
        r = 2 + 2 * float(torch.rand((), generator=g))
        low = max(1, int(height / r**k)), max(1, int(width / r**k))
        counts = settings.discount**k
        total += counts * _enlarged(torch.randn(channels, *low, generator=g), (height, width))
        variance += counts**2 * _gain(low[0], height)[:, None] * _gain(low[1], width)
        if 1 in low:
            break
    return total, variance


def _enlarged(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x[None], size=size, mode="bilinear", align_corners=False)[0]


@lru_cache(4096)
def _gain(low: int, high: int) -> Tensor:
    """The variance (high,) of `low` standard normal numbers in a row, enlarged: the sum of their squared shares."""
    shares = F.interpolate(torch.eye(low)[None], size=high, mode="linear", align_corners=False)[0]
    return shares.square().sum(0)
