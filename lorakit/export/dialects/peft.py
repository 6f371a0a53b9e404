"""peft's layout: for each component a folder of adapter_config.json and adapter_model.safetensors.

Keys carry the folder in front ("unet/base_model.model.<path>.lora_A.weight"), and so does the configuration's entry in
the metadata ("unet/adapter_config.json"); a folder of one component alone has neither. Writing and reading the files
themselves: export/files.py.
"""

import json
import sys
from collections.abc import Iterable, Mapping

from torch import Tensor

from lorakit.adapters import AdapterState
from lorakit.export.keymap import KeyMap, family_layers, foreign_tensors, read_pairs
from lorakit.export.peft_config import config_of, read_config
from lorakit.families.protocol import Names

FOLDER = True
READER = "peft"
PREFIXED = False
KINDS = ("lora",)
ENDINGS = {"lora_A.weight": "lora_A.weight", "lora_B.weight": "lora_B.weight"}
CONFIGURED = CONFIG = "adapter_config.json"
INNER = "base_model.model."


def recognises(keys: Iterable[str], metadata: Mapping[str, str]) -> bool:
    return any(key.rpartition("/")[2].startswith(INNER) for key in keys)


def keymap(family: Names) -> KeyMap:
    bases, also = {}, {}
    for component, layers in family_layers(family).items():
        for path in layers:
            layer, published = f"{component}.{path}", family.original_name(component, path)
            bases[layer] = f"{component}/{INNER}{path}"
            for spelled in (path, published):  # a lone component's folder; an older transformers' names
                also[f"{INNER}{spelled}"] = also[f"{component}/{INNER}{spelled}"] = layer
    return KeyMap(bases, ENDINGS, also)


def component(base: str) -> str:
    return base.partition("/")[0] if "/" in base else ""


def configured_alpha(base: str, rank: int, metadata: Mapping[str, str]) -> float | None:
    folder, slash, name = base.rpartition("/")
    entry = f"{folder}{slash}{CONFIG}"
    if entry not in metadata:
        return None
    return read_config(metadata[entry], entry).alpha(name.removeprefix(INNER), rank)


def write(state: AdapterState, family: Names, metadata: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of all folders, and metadata with their configurations."""
    configs = {}
    for part in state.components():
        config = {"peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "inference_mode": True}
        text = json.dumps({**config, "bias": "none", **config_of(state, part)}, indent=2, sort_keys=True)
        configs[f"{part}/{CONFIG}"] = text + "\n"
    return foreign_tensors(state, keymap(family), alphas=False), {**metadata, "format": "pt", **configs}


def read(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], family: Names, *, assume_alpha: float | None = None
) -> AdapterState:
    """The inverse of `write`; see `keymap.read_pairs` for what it refuses."""
    return read_pairs(sys.modules[__name__], tensors, metadata, family, assume_alpha=assume_alpha)
