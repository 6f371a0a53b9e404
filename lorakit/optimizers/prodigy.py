"""Prodigy: AdamW that finds its own learning rate (Mishchenko and Defazio, arXiv:2306.06101), by prodigyopt."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from lorakit.optimizers.common import Adam

# what it changes in its groups and reads again; d is the rate that it has found
GROUP_STATE = ("d", "d_max", "d_numerator", "k")


class Settings(Adam):
    kind: Literal["prodigy"] = "prodigy"
    """AdamW that finds its own learning rate from how far the weights have gone."""
    lr: float = Field(1.0, gt=0)
    """What the rate that it finds is multiplied by; better tuned by d_coef."""
    d_coef: float = Field(1.0, gt=0)
    """What the estimate of the rate is multiplied by; 0.5 and 2 are gentler and bolder."""
    d0: float = Field(1e-6, gt=0)
    """Where the estimate begins; it can only grow."""
    growth_rate: float | None = Field(None, gt=1)
    """The most that the estimate grows by in a step. Left out: without a limit."""
    # both as the authors' page advises for diffusion models
    bias_correction: bool = True
    """Adam's correction of young moments."""
    safeguard_warmup: bool = True
    """Leave the schedule's factor out of the estimate, which a warm-up would spoil."""
    slice_p: int = Field(1, ge=1)
    """Estimate from every n-th weight only: less memory; 11 is usual."""

    library = ("prodigyopt", "prodigy")

    @property
    def state_size(self) -> float:
        return 2 + 2 / self.slice_p

    def advice(self) -> list[str]:
        if self.lr >= 0.1:
            return []
        return [f"optimizer.lr = {self.lr:g} multiplies the rate that Prodigy finds by itself, and is usually 1"]

    def problems(self, rates: Mapping[str, float | None]) -> list[str]:
        own = {key: rate for key, rate in rates.items() if rate is not None}
        if len({self.lr if rate is None else rate for rate in rates.values()}) <= 1:
            own = {}
        return super().problems(rates) + [
            f"{key} = {rate}: prodigy finds one rate for all parts. Leave it out." for key, rate in own.items()
        ]


def build(settings: Settings, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer over parameter `groups` ({"params": …}, as torch takes them), which all have one rate."""
    from prodigyopt import Prodigy

    return Prodigy(
        # given to the class as a whole, it would print a line about the decay
        [{**group, "weight_decay": settings.weight_decay} for group in groups],
        lr=settings.full_rate,
        betas=settings.betas,
        eps=settings.eps,
        d0=settings.d0,
        d_coef=settings.d_coef,
        growth_rate=settings.growth_rate or math.inf,
        use_bias_correction=settings.bias_correction,
        safeguard_warmup=settings.safeguard_warmup,
        slice_p=settings.slice_p,
    )
