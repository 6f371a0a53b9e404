"""Adafactor: a second moment of rows and columns only (Shazeer and Stern, arXiv:1804.04235), by transformers.

Transformers' and not torch's: torch's always scales its steps by the root mean square of the weights, at least 1e-3,
and a fresh adapter's B is zero, so that it would hardly start. With `lr` this one takes it as it is, as the recipes
that people share mean it; without `lr` it takes the paper's relative steps, which are scaled so.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from lorakit.optimizers.common import Beta, Common, without_decay


class Settings(Common):
    kind: Literal["adafactor"] = "adafactor"
    """Hardly any memory: the second moment of a matrix is kept as one of its rows and one of its columns."""
    lr: float | None = Field(None, gt=0)  # type: ignore[assignment]
    """Learning rate at its full value. Left out: the paper's relative steps, min(1e-2, 1/√step) times the size of the
    weights."""
    clip_threshold: float = Field(1.0, gt=0)
    """The largest root mean square of a tensor's update."""
    decay_rate: float = Field(-0.8, le=0)
    """The second moment's decay at step t is 1 - t^decay_rate."""
    beta1: Beta | None = None
    """Decay of a first moment, which costs as much memory as the weights. Left out: none."""
    weight_decay: float = Field(0.0, ge=0)
    """How far each step pulls the weights to zero, times the learning rate."""

    @property
    def full_rate(self) -> float:
        return 1.0 if self.lr is None else self.lr

    @property
    def state_size(self) -> float:
        return 1.0 if self.beta1 is None else 2.0

    @model_validator(mode="after")
    def _relative(self) -> "Settings":
        if self.lr is None:
            without_decay(self, "adafactor's relative steps: leave it out, or give lr")
            if self.schedule.warmup:
                raise ValueError(
                    "schedule.warmup does nothing for adafactor's relative steps: leave it out, or give lr"
                )
        return self

    def problems(self, rates: Mapping[str, float | None]) -> list[str]:
        own = [key for key, rate in rates.items() if rate is not None and self.lr is None]
        return super().problems(rates) + [
            f"{key}: adafactor without optimizer.lr chooses its steps itself. Leave it out, or give optimizer.lr."
            for key in own
        ]


def build(settings: Settings, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer over parameter `groups` ({"params": …}, as torch takes them)."""
    from transformers.optimization import Adafactor

    relative = settings.lr is None
    own = [{**group, "lr": None} for group in groups] if relative else list(groups)
    return Adafactor(
        own,
        lr=settings.lr,
        scale_parameter=relative,
        relative_step=relative,
        clip_threshold=settings.clip_threshold,
        decay_rate=settings.decay_rate,
        beta1=settings.beta1,
        weight_decay=settings.weight_decay,
    )
