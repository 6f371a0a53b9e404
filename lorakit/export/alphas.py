"""The alpha of a layer, from all places where a file may say it; two that disagree are an error.

Not among them is kohya's `ss_network_alpha`: it is a note of how the training was set, which no program loads by.
"""

import math
from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor

from lorakit.core.errors import InputError
from lorakit.core.files import printable
from lorakit.export.peft_config import read_config

ENTRY = "lora_adapter_metadata"  # diffusers'


def stored_alpha(
    dialect: ModuleType,
    base: str,
    rank: int,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    layer: str | None = None,
) -> float | None:
    """The alpha of the layer that the file calls `base`; None where it does not say.

    `layer` is its name "<component>.<path>" in a known model, for entries that are not in the dialect's own names.
    Raises InputError where two places disagree, and for what is no number.
    """
    said: dict[str, float | None] = {}
    if dialect.CONFIGURED is not None:
        said[dialect.CONFIGURED] = dialect.configured_alpha(base, rank, metadata)
    if dialect.CONFIGURED != ENTRY and layer is not None:
        said[ENTRY] = entry_alpha(layer, rank, metadata)
    key = f"{base}.alpha"
    if key in tensors and "alpha" in dialect.ENDINGS:
        tensor = tensors[key]
        said[key] = _number(tensor, key)
        # a tensor in half precision is not a contradiction to the number that it was rounded from
        said = {where: value if value is None else _rounded(value, tensor) for where, value in said.items()}
    values = {where: value for where, value in said.items() if value is not None}
    if not all(map(math.isfinite, values.values())):
        raise InputError(f"{printable(base)} has an alpha that is not finite: the file is damaged.")
    if len(set(values.values())) > 1:
        told = ", ".join(f"{value:g} by {printable(where)}" for where, value in values.items())
        raise InputError(
            f"{printable(base)} has two alphas, {told}: programs that read one or the other show it at different "
            "strengths. Take one out, or ask for the file that was trained."
        )
    return next(iter(values.values()), None)


def entry_alpha(layer: str, rank: int, metadata: Mapping[str, str]) -> float | None:
    """What diffusers' entry says of the layer "<component>.<path>"."""
    if ENTRY not in metadata:
        return None
    component, _, path = layer.partition(".")
    config = read_config(metadata[ENTRY], f"its metadata entry {ENTRY}", component=component)
    return config.alpha(path, rank)


def _number(tensor: Tensor, key: str) -> float:
    if tensor.numel() != 1 or not tensor.float().isfinite().all():
        raise InputError(f"{printable(key)} is not one finite number: the file is damaged.")
    return float(tensor)


def _rounded(value: float, tensor: Tensor) -> float:
    return float(torch.tensor(value).to(tensor.dtype)) if tensor.is_floating_point() else value
