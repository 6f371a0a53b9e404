"""AdamW with its moments in 8 bits (Dettmers et al., arXiv:2110.02861), by bitsandbytes: a quarter of the memory."""

from collections.abc import Sequence
from typing import Any, Literal

import torch

from lorakit.optimizers.common import Adam, EightBits


class Settings(EightBits, Adam):
    kind: Literal["adamw8bit"] = "adamw8bit"
    """AdamW with its moments in 8 bits; those of tensors below 4,096 weights stay in 32."""


def build(settings: Settings, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer over parameter `groups` ({"params": …}, as torch takes them)."""
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(
        list(groups),
        lr=settings.full_rate,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        is_paged=settings.paged,
    )
