"""The denoising objective: predict what was mixed into x_t (DDPM eq. 14; Salimans and Ho 2022 for v).

The target is the process's own (`target`). Which t, which noise, how each t counts, and what a difference costs are
settings, each in a file of its own: `timesteps.py`, `noise.py`, `weightings.py`, `losses.py`; so is where the base is
kept besides (`preservation.py`). Here they meet, and the mean over a picture.
"""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from lorakit.core import settings as core_settings
from lorakit.core.types import Batch, LossReport, Predict, Process
from lorakit.diffusion.losses import MSE, Loss, loss
from lorakit.diffusion.noise import Noise, noise_advice, noise_problems, noises
from lorakit.diffusion.preservation import NoPreservation, Preservation, preserve
from lorakit.diffusion.timesteps import Timesteps, Uniform, law
from lorakit.diffusion.weightings import NoWeighting, Weighting, weighting


class Settings(core_settings.Settings):
    kind: Literal["denoising"] = "denoising"
    """Predict the noise (or v, x0, velocity: whatever the model does) that was mixed into the latents."""
    timesteps: Timesteps = Uniform()
    """Which timesteps are trained, and how often."""
    noise: Noise = Noise()
    """Which noise is mixed in."""
    weighting: Weighting = NoWeighting()
    """How each timestep counts."""
    loss: Loss = MSE()
    """What a difference between prediction and target costs."""
    preservation: Preservation = NoPreservation()
    """Where the model is held to what it was: a second term of the loss, of the same loss and weighting."""


def per_example(error: Tensor, mask: Tensor | None) -> Tensor:
    """The mean (B,) of `error` (B, C, h, w) by `mask` (B, 1, h, w), over the mask's area: Σ m·e / (C · Σ m)."""
    if mask is None:
        return error.flatten(1).mean(1)
    area = mask.flatten(1).sum(1).clamp(min=1e-6)  # a crop may miss the mask: then there is nothing to learn of it
    return (error * mask).flatten(1).sum(1) / (error.shape[1] * area)


def problems(settings: Settings, process: Process) -> list[str]:
    """Why these settings say nothing for this process, each with its key and what to do; empty: they do."""
    found = []
    for part in (lambda: law(settings.timesteps, process), lambda: weighting(settings.weighting, process)):
        try:
            part()
        except ValueError as error:
            found.append(str(error))
    return found + noise_problems(settings.noise, process)


def advice(settings: Settings, process: Process) -> list[str]:
    """What a person should know of these settings for this process before hours are spent."""
    return noise_advice(settings.noise, process)


def build(settings: Settings, process: Process) -> Callable[[Predict, Batch], LossReport]:
    """The objective over `process`: the mean loss per example, weighted by timestep, and what keeping the base adds.

    Raises ValueError with all `problems`, a line each.
    """
    found = problems(settings, process)
    if found:
        raise ValueError("\n".join(found))
    draw = law(settings.timesteps, process)
    weigh = weighting(settings.weighting, process)
    cost = loss(settings.loss, process)
    keep = settings.preservation

    def of(difference: Tensor, t: Tensor, share: Tensor | None) -> Tensor:
        error = per_example(cost(difference, t), share)
        return error if weigh is None else error * weigh(t).to(error)

    def objective(predict: Predict, batch: Batch) -> LossReport:
        assert batch.latents is not None, "pixels are encoded before"
        t = draw(batch.quantile, size=batch.latents.shape[-2:]).to(batch.latents.device)
        of_target, of_input = noises(settings.noise, batch)
        x_t = process.q_sample(batch.latents, t, of_input)
        predicted = predict(x_t, t, text=batch.text).float()
        error = of(predicted - process.target(batch.latents, t, of_target), t, batch.mask)
        kept = None
        if not isinstance(keep, NoPreservation):
            drift = preserve(keep, predict, batch, x_t, t, predicted)
            kept = error.new_zeros(error.shape) if drift is None else keep.weight * of(drift.difference, t, drift.share)
        return LossReport(per_example=error, t=t, preservation=kept)

    return objective
