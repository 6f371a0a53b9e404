"""diffusers' own layout: `unet.<path>.lora_A.weight`, alphas in the metadata.

The backbone is spelled by its modules' paths, text encoders as published (the stock loader takes both there, other
programs only that). Without `lora_adapter_metadata`, diffusers takes every alpha for the rank.

Files for ComfyUI, which spell the backbone `diffusion_model.<published name>`, are read as well.
"""

import json
import sys
from collections.abc import Iterable, Mapping

from torch import Tensor

from lorakit.adapters import AdapterState
from lorakit.adapters.state import METADATA_KEY
from lorakit.export.alphas import ENTRY, entry_alpha
from lorakit.export.fused import split
from lorakit.export.keymap import KeyMap, family_layers, foreign_tensors, read_pairs
from lorakit.export.peft_config import config_of
from lorakit.families.protocol import Names

FOLDER = False
READER = "stock pipeline"
PREFIXED = False
KINDS = ("lora",)
CONFIGURED = ENTRY
COMFYUI = "diffusion_model."
# some programs write alphas beside; they are read, and never written: diffusers would refuse the file
ENDINGS = {"lora_A.weight": "lora_A.weight", "lora_B.weight": "lora_B.weight", "alpha": "alpha"}


def recognises(keys: Iterable[str], metadata: Mapping[str, str]) -> bool:
    endings = (".lora_A.weight", ".lora_B.weight")
    ours = METADATA_KEY in metadata
    return not ours and any(k.endswith(endings) and "base_model.model." not in k for k in keys)


def keymap(family: Names) -> KeyMap:
    bases: dict[str, str] = {}
    also = {COMFYUI + whole.partition(".")[2]: whole for whole in family.fused}
    for component, layers in family_layers(family).items():
        for path in layers:
            layer = f"{component}.{path}"
            bases[layer] = layer if component == family.backbone else _published(family, component, path)
            also[layer] = layer
            if component == family.backbone:
                also[COMFYUI + family.original_name(component, path)] = layer
    return KeyMap(bases, ENDINGS, also)


def _published(family: Names, component: str, path: str) -> str:
    return f"{component}.{family.original_name(component, path)}"


def component(base: str) -> str:
    return base.split(".", 1)[0]


def configured_alpha(base: str, rank: int, metadata: Mapping[str, str]) -> float | None:
    return entry_alpha(base, rank, metadata)


def write(state: AdapterState, family: Names, metadata: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of the file."""
    entries = {}
    for part in state.components():
        # a text encoder's names are longer in some versions of transformers: its patterns match their ends
        for key, value in config_of(state, part, anchored=part == family.backbone).items():
            entries[f"{part}.{key}"] = value
    text = json.dumps(entries, sort_keys=True)
    return foreign_tensors(state, keymap(family), alphas=False), {**metadata, "format": "pt", ENTRY: text}


def read(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], family: Names, *, assume_alpha: float | None = None
) -> AdapterState:
    """The inverse of `write`; see `keymap.read_pairs` for what it refuses."""
    state = read_pairs(sys.modules[__name__], tensors, metadata, family, assume_alpha=assume_alpha)
    return split(state, family)
