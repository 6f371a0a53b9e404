"""The learning rate as a pure function of the optimizer step: nothing to save, nothing to run N times too fast."""

import math
from typing import Literal

from pydantic import Field, model_validator

from lorakit.core import settings as core_settings

# what each kind reads besides `warmup`
_KEYS: dict[str, tuple[str, ...]] = {
    "constant": (),
    "linear": ("floor",),
    "cosine": ("floor", "restarts"),
    "polynomial": ("floor", "power"),
    "wsd": ("floor", "decay"),
    "rex": ("floor",),
}


class Schedule(core_settings.Settings):
    kind: Literal["constant", "linear", "cosine", "polynomial", "wsd", "rex"] = "cosine"
    """What follows the warm-up: the full rate, or a way down to the floor. wsd stays at the full rate and goes down at
    the end only (2405.18392); rex stays high for longer than a line and falls faster at the end (2107.04197)."""
    warmup: int = Field(0, ge=0)
    """Optimizer steps over which the rate rises to its full value."""
    floor: float = Field(0.0, ge=0, le=1)
    """The fraction of the full rate that the way down ends at; a constant rate has none."""
    restarts: int = Field(0, ge=0)
    """How many times a cosine starts again at the full rate, at equal distances."""
    power: float = Field(2.0, gt=0)
    """The power of what is left that polynomial takes; 1 is a straight line."""
    decay: float = Field(0.2, gt=0)
    """How long wsd goes down at the end: a fraction of the run where below 1, else optimizer steps."""

    @model_validator(mode="after")
    def _consistent(self) -> "Schedule":
        problems = unused(self, self.kind)
        if self.decay >= 1 and self.decay != int(self.decay):
            problems.append(f"decay = {self.decay} is neither a fraction below 1 nor a whole number of steps")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def unused(schedule: Schedule, kind: str) -> list[str]:
    """What is set in `schedule` and does nothing with `kind`; defaults, which RUN/recipe.toml writes out, may stay."""
    return [
        f"{key} = {getattr(schedule, key)} does nothing with kind = {kind!r}: leave it out"
        for key in sorted({key for keys in _KEYS.values() for key in keys} - set(_KEYS[kind]))
        if getattr(schedule, key) != Schedule.model_fields[key].default
    ]


def factor(schedule: Schedule, step: int, total: int) -> float:
    """What the full learning rate is multiplied by for optimizer step `step` (from 0) of `total`.

    The first step of a warm-up of w steps takes 1/(w + 1), the first one after it takes 1, and the one after the last
    would take `floor`. A warm-up longer than the run simply never ends.
    """
    if step < schedule.warmup:
        return (step + 1) / (schedule.warmup + 1)
    if schedule.kind == "constant":
        return 1.0
    span = max(1, total - schedule.warmup)
    left = _left(schedule, min(step - schedule.warmup, span), span=span, total=total)
    return schedule.floor + (1 - schedule.floor) * left


def _left(schedule: Schedule, done: int, *, span: int, total: int) -> float:
    """How much of the way down is left, from 1 to 0, after `done` of `span` steps."""
    if done == span:
        return 0.0
    progress = done / span
    if schedule.kind == "linear":
        return 1 - progress
    if schedule.kind == "cosine":  # in whole numbers: a restart must not be missed by a rounding
        phase = (schedule.restarts + 1) * done % span / span
        return 0.5 * (1 + math.cos(math.pi * phase))
    if schedule.kind == "polynomial":
        return (1 - progress) ** schedule.power
    if schedule.kind == "rex":  # 2107.04197, eq. 1
        return (1 - progress) / (0.5 + 0.5 * (1 - progress))
    # wsd, with the decay that 2405.18392 found best: 1 - sqrt
    length = schedule.decay if schedule.decay >= 1 else schedule.decay * total
    steps = min(span, max(1, round(length)))
    return 1 - math.sqrt(max(0, done - (span - steps)) / steps)


def depends_on_total(schedule: Schedule) -> bool:
    """Whether a run of another length would have had other rates from the start."""
    return schedule.kind != "constant"
