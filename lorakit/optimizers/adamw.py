"""AdamW: Adam with the weight decay apart from the gradient (Loshchilov and Hutter, arXiv:1711.05101)."""

from collections.abc import Sequence
from typing import Any, Literal

import torch

from lorakit.optimizers.common import Adam


class Settings(Adam):
    kind: Literal["adamw"] = "adamw"
    """Adam with decoupled weight decay."""


def build(settings: Settings, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer over parameter `groups` ({"params": …}, as torch takes them)."""
    # one kernel for all tensors: adapters are hundreds of small ones
    return torch.optim.AdamW(
        list(groups),
        lr=settings.full_rate,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )
