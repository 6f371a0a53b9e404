"""Lion: steps by the sign of a momentum (Chen et al., arXiv:2302.06675), by bitsandbytes; half of AdamW's memory."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from lorakit.optimizers.common import Beta, Bitsandbytes


class SignSettings(Bitsandbytes):
    """What Lion has, in 32 bits and in 8."""

    # the paper's section 5: a rate 3-10 times smaller than AdamW's, a decay as many times larger
    lr: float = Field(2e-5, gt=0)
    """Learning rate at its full value; a third to a tenth of AdamW's."""
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """Weight of the momentum in a step's direction, and the momentum's own decay."""
    weight_decay: float = Field(0.05, ge=0)
    """How far each step pulls the weights to zero, times the learning rate."""

    def advice(self) -> list[str]:
        if self.lr < 3e-4:
            return []
        return [f"optimizer.lr = {self.lr:g} is much for Lion: a third to a tenth of AdamW's is usual"]

    @property
    def state_size(self) -> float:
        return 1.0


class Settings(SignSettings):
    kind: Literal["lion"] = "lion"
    """Steps of one size, by the sign of the momentum."""


def build(settings: SignSettings, groups: Sequence[dict[str, Any]], *, bits: int = 32) -> torch.optim.Optimizer:
    """The optimizer over parameter `groups` ({"params": …}, as torch takes them)."""
    from bitsandbytes.optim import Lion

    return Lion(
        list(groups),
        lr=settings.full_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        optim_bits=bits,
        is_paged=settings.paged,
    )
