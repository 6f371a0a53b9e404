"""The learning rate as a pure function of the optimizer step: nothing to save, nothing to run N times too fast."""

import math
from typing import Literal

from pydantic import Field

from lorakit.core import settings as core_settings


class Schedule(core_settings.Settings):
    kind: Literal["constant", "linear", "cosine"] = "cosine"
    """What follows the warm-up: the full rate, a straight line down, or half a cosine down."""
    warmup: int = Field(0, ge=0)
    """Optimizer steps over which the rate rises to its full value."""
    floor: float = Field(0.0, ge=0, le=1)
    """The fraction of the full rate that linear and cosine end at."""


def factor(schedule: Schedule, step: int, total: int) -> float:
    """What the full learning rate is multiplied by for optimizer step `step` (from 0) of `total`.

    The first step of a warm-up of w steps takes 1/(w + 1), the first one after it takes 1, and the one after the last
    would take `floor`. A warm-up longer than the run simply never ends.
    """
    if step < schedule.warmup:
        return (step + 1) / (schedule.warmup + 1)
    progress = min(1.0, (step - schedule.warmup) / max(1, total - schedule.warmup))
    shape = {
        "constant": 1.0,
        "linear": schedule.floor + (1 - schedule.floor) * (1 - progress),
        "cosine": schedule.floor + (1 - schedule.floor) * 0.5 * (1 + math.cos(math.pi * progress)),
    }
    return shape[schedule.kind]
