"""The denoising objective: predict what was mixed into x_t (DDPM eq. 14; Salimans and Ho 2022 for v).

The target is the process's own (`target`); here is which t, how each t counts, and the mean over a picture.
"""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from lorakit.core import settings as core_settings
from lorakit.core.types import Batch, LossReport, Predict, Process


class NoWeighting(core_settings.Settings):
    kind: Literal["none"] = "none"
    """Every timestep counts alike."""


class MinSNR(core_settings.Settings):
    kind: Literal["min_snr"]
    """Easy timesteps count less (Hang et al. 2023, arXiv:2303.09556)."""
    gamma: float = Field(5.0, gt=0)
    """The signal-to-noise ratio above which a timestep counts less."""


class Settings(core_settings.Settings):
    kind: Literal["denoising"] = "denoising"
    """Predict the noise (or v) that was mixed into the latents."""
    weighting: Annotated[NoWeighting | MinSNR, Field(discriminator="kind")] = NoWeighting()
    """How each timestep counts."""


def timesteps(quantile: Tensor, count: int) -> Tensor:
    """The uniform law: quantiles (B,) in [0, 1) to integer timesteps 0 … count - 1."""
    return (quantile.double() * count).long().clamp(max=count - 1)


def min_snr_weight(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """min(snr, gamma) over what the prediction's loss is worth in x0: snr for epsilon, snr + 1 for v, 1 for x0."""
    clipped = snr.clamp(max=gamma)
    if prediction_type == "epsilon":
        # snr = 0 (zero terminal SNR) is the limit 1; epsilon is not trained there anyway
        return torch.where(snr > 0, clipped / snr.clamp(min=1e-20), torch.ones_like(snr))
    return clipped / (snr + 1) if prediction_type == "v_prediction" else clipped


def per_example(error: Tensor, mask: Tensor | None) -> Tensor:
    """The mean (B,) of `error` (B, C, h, w) by `mask` (B, 1, h, w), over the mask's area: Σ m·e / (C · Σ m)."""
    if mask is None:
        return error.flatten(1).mean(1)
    area = mask.flatten(1).sum(1).clamp(min=1e-6)  # a crop may miss the mask: then there is nothing to learn of it
    return (error * mask).flatten(1).sum(1) / (error.shape[1] * area)


def build(settings: Settings, process: Process) -> Callable[[Predict, Batch], LossReport]:
    """The objective over `process`: mean squared error per example, weighted by timestep."""

    def objective(predict: Predict, batch: Batch) -> LossReport:
        assert batch.latents is not None, "pixels are encoded before"
        t = timesteps(batch.quantile, process.timesteps).to(batch.latents.device)
        x_t = process.q_sample(batch.latents, t, batch.noise)
        predicted = predict(x_t, t, text=batch.text).float()
        error = per_example((predicted - process.target(batch.latents, t, batch.noise)).square(), batch.mask)
        if isinstance(settings.weighting, MinSNR):
            weight = min_snr_weight(process.snr(t), settings.weighting.gamma, process.prediction_type)
            error = error * weight.to(error)
        return LossReport(per_example=error, t=t)

    return objective
