"""kohya's layout, which most programs load: `lora_unet_down_blocks_0_….lora_down.weight`, `.lora_up.weight`, `.alpha`.

Names are the published layout's, with "_" for ".", behind a prefix for each component; both come from the family.
Layers that are one there and several here are written as one (export/fused.py).
"""

import sys
from collections.abc import Iterable, Mapping

from torch import Tensor

from lorakit.adapters import AdapterState
from lorakit.export.fused import fuse, split
from lorakit.export.keymap import KeyMap, family_layers, foreign_tensors, read_pairs
from lorakit.families.protocol import Names

FOLDER = False
READER = "stock pipeline"
PREFIXED = True
KINDS = ("lora",)
CONFIGURED = None  # alphas are tensors
# diffusers 0.42.1 gives attention layers of these whose alpha is not the usual one that of the others
ONE_ALPHA = ("unet", "text_encoder", "text_encoder_2")
ENDINGS = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight", "alpha": "alpha"}

# where there is one text encoder, programs write it in either way
_ALIKE = {"lora_te_": "lora_te1_", "lora_te1_": "lora_te_"}


def recognises(keys: Iterable[str], metadata: Mapping[str, str]) -> bool:
    return any(key.endswith((".lora_down.weight", ".lora_up.weight")) and key.startswith("lora_") for key in keys)


def keymap(family: Names) -> KeyMap:
    bases, also = {}, {}
    parts = {part for group in family.fused.values() for part in group}
    for component, layers in family_layers(family).items():
        prefix = family.lora_prefixes[component].rstrip("_") + "_"
        for path in layers:
            layer, name = f"{component}.{path}", family.original_name(component, path).replace(".", "_")
            if layer not in parts:
                bases[layer] = prefix + name
            for start in (prefix, f"lora_{component}_"):  # some write diffusers' names where kohya has its own
                also[start + path.replace(".", "_")] = layer
            if len(family.text_encoders) == 1 and prefix in _ALIKE:
                also[_ALIKE[prefix] + name] = layer
    for whole in family.fused:
        component, _, name = whole.partition(".")
        bases[whole] = family.lora_prefixes[component].rstrip("_") + "_" + name.replace(".", "_")
    return KeyMap(bases, ENDINGS, also)


def component(base: str) -> str:
    return "_".join(base.split("_")[:2])


def configured_alpha(base: str, rank: int, metadata: Mapping[str, str]) -> float | None:
    return None


def write(state: AdapterState, family: Names, metadata: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of the file."""
    return foreign_tensors(fuse(state, family), keymap(family), alphas=True), dict(metadata)


def read(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], family: Names, *, assume_alpha: float | None = None
) -> AdapterState:
    """The inverse of `write`; see `keymap.read_pairs` for what it refuses."""
    state = read_pairs(sys.modules[__name__], tensors, metadata, family, assume_alpha=assume_alpha)
    return split(state, family)
