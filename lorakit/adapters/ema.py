"""The moving average of the trained weights: average ← d · average + (1 − d) · weights after every step.

Diffusion models are drawn with it since Ho et al. (arXiv:2006.11239, appendix B). Here are its settings and numbers;
`state.replaced` puts them in the place of the trained ones.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lorakit.adapters.state import shortened
from lorakit.core import settings as core_settings
from lorakit.core.errors import InputError
from lorakit.core.files import printable


class EmaSettings(core_settings.Settings):
    decay: float = Field(0.999, gt=0, lt=1)
    """How much of the average each step keeps; it looks back over about 1 / (1 - decay) steps."""
    warmup: bool = True
    """Keep less in the first steps, (1 + step) / (10 + step), so that a short run's average is not its beginning."""
    export: Literal["instead", "beside"] = "instead"
    """Hand out the average instead of the trained weights, or beside them."""


def decay_at(settings: EmaSettings, step: int) -> float:
    """The decay of update `step`, counted from 1: min(decay, (1 + step) / (10 + step)), as TensorFlow's
    ExponentialMovingAverage(num_updates) and diffusers' EMAModel have it."""
    return min(settings.decay, (1 + step) / (10 + step)) if settings.warmup else settings.decay


class Average:
    """The average of `parameters`, which begins as they are now; `tensors` by name, fp32, on their devices."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: EmaSettings) -> None:
        self._parameters, self._settings = parameters, settings
        self.tensors: dict[str, Tensor] = {
            name: parameter.detach().to(torch.float32, copy=True) for name, parameter in parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes the weights after optimizer step `step`, counted from 1, in."""
        weights = [parameter.detach().float() for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self.tensors.values()), weights, 1 - decay_at(self._settings, step))

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes on from an earlier average's `tensors`, bit for bit; InputError unless they are of these weights."""
        problems = [f"the average of {name} is missing." for name in self.tensors.keys() - tensors.keys()]
        problems += [f"the average of {printable(name)} has no place." for name in tensors.keys() - self.tensors.keys()]
        for name in self.tensors.keys() & tensors.keys():
            there, given = tuple(self.tensors[name].shape), tuple(tensors[name].shape)
            if there != given:
                problems.append(f"the average of {name} has the shape {given}, {there} is asked for.")
        if problems:
            raise InputError(
                shortened([f"The checkpoint's EMA does not fit: {problem}" for problem in sorted(problems)])
            )
        for name, average in self.tensors.items():
            average.copy_(tensors[name])
