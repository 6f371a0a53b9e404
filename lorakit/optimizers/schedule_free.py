"""Schedule-free AdamW: an average of the weights in place of a decaying rate (Defazio et al., arXiv:2405.15682).

By schedulefree. It trains y, and draws and exports with x: `state.weights_to_use`.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from lorakit.optimizers.common import Adam, Beta, without_decay
from lorakit.optimizers.schedules import Schedule

# what it changes in its groups and reads again
GROUP_STATE = ("k", "weight_sum", "lr_max")


class Settings(Adam):
    kind: Literal["schedule_free"] = "schedule_free"
    """AdamW with an average of the weights in place of a decaying rate: no end needs to be known."""
    lr: float = Field(3e-4, gt=0)
    """Learning rate at its full value; somewhat more than AdamW's."""
    betas: tuple[Annotated[float, Field(gt=0, lt=1)], Beta] = (0.9, 0.999)
    """Share of the average in the weights that gradients are taken at, and the decay of the second moment."""
    schedule: Schedule = Schedule(kind="constant")
    """Its warm-up; a decay has no place here."""

    library = ("schedulefree", "schedulefree")

    @model_validator(mode="after")
    def _no_decay(self) -> "Settings":
        without_decay(self, "schedule_free, whose average does what a decay is for: leave it out")
        return self


def build(settings: Settings, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer over parameter `groups` ({"params": …}, as torch takes them), in training mode for good."""
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(
        list(groups),
        lr=settings.full_rate,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    optimizer.train()
    return optimizer
