"""Floor 1: adapter kinds, one file each, and what is common to all of them (`state.py`).

A kind's module defines `Settings` and `inject`. Adapter files and their dialects are in lorakit/export/.
"""

from lorakit.adapters.state import (
    AdapterState,
    adapter_state,
    adapters_disabled,
    copy_adapter_state,
    load_adapter_state,
    trainable_parameters,
)
from lorakit.core.registry import Registry

ADAPTERS = Registry("lorakit.adapters", "adapter kind", frozenset({"ema", "fused", "state", "targets"}))

__all__ = [
    "ADAPTERS",
    "AdapterState",
    "adapter_state",
    "adapters_disabled",
    "copy_adapter_state",
    "load_adapter_state",
    "trainable_parameters",
]
