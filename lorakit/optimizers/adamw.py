"""AdamW: Adam with the weight decay apart from the gradient (Loshchilov and Hutter, arXiv:1711.05101)."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from lorakit.core import settings as core_settings
from lorakit.optimizers.schedules import Schedule


class Settings(core_settings.Settings):
    kind: Literal["adamw"] = "adamw"
    """Adam with decoupled weight decay."""
    lr: float = Field(1e-4, gt=0)
    """Learning rate at its full value."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.01, ge=0)
    """How far each step pulls the weights to zero, times the learning rate."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients of a larger norm, over all trainable weights, are scaled down to it; 0: never."""
    schedule: Schedule = Schedule()
    """How the learning rate moves over the run."""


def build(settings: Settings, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer over parameter `groups` ({"params": …}, as torch takes them)."""
    # one kernel for all tensors: adapters are hundreds of small ones
    return torch.optim.AdamW(
        list(groups),
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )
