"""Lion with its momentum in 8 bits (arXiv:2302.06675, arXiv:2110.02861), by bitsandbytes."""

from collections.abc import Sequence
from typing import Any, Literal

import torch

from lorakit.optimizers import lion
from lorakit.optimizers.common import EightBits


class Settings(lion.SignSettings, EightBits):
    kind: Literal["lion8bit"] = "lion8bit"
    """Lion with its momentum in 8 bits; that of tensors below 4,096 weights stays in 32."""


def build(settings: Settings, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer over parameter `groups` ({"params": …}, as torch takes them)."""
    return lion.build(settings, groups, bits=8)
