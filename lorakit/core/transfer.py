"""What goes from the host to a device without the host's waiting for all that the device has yet to do.

A copy from ordinary memory waits for it; one from pinned memory takes its place behind it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from lorakit.core.types import Batch


def sent(values: Sequence[float], device: torch.device) -> Tensor:
    """A tensor of `values` on `device`."""
    return torch.tensor(values, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """`batch` with its tensors there."""
    return _changed(batch, lambda tensor: tensor.to(device, non_blocking=True))


def pinned(batch: Batch) -> Batch:
    """`batch` with its tensors in pinned memory, which only a machine with a GPU has."""
    return _changed(batch, lambda tensor: tensor.pin_memory())


def _changed(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    def changed(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        if isinstance(value, Mapping):
            return {name: changed(tensor) for name, tensor in value.items()}
        return value

    return replace(batch, **{field.name: changed(getattr(batch, field.name)) for field in fields(batch)})
