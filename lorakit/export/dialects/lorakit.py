"""lorakit's own form, in which checkpoints are kept: AdapterState's names, alphas as one entry of the metadata."""

import functools
import sys
from collections.abc import Iterable, Mapping

from torch import Tensor

from lorakit.adapters import AdapterState
from lorakit.adapters.state import METADATA_KEY, state_from, state_metadata
from lorakit.export.keymap import KeyMap, family_layers, foreign_tensors, read_pairs
from lorakit.families.protocol import Names

FOLDER = False
READER = "lorakit"
PREFIXED = False
KINDS = ("lora",)
CONFIGURED = METADATA_KEY
ENDINGS = {"lora_A.weight": "lora_A.weight", "lora_B.weight": "lora_B.weight"}


def recognises(keys: Iterable[str], metadata: Mapping[str, str]) -> bool:
    return METADATA_KEY in metadata


def keymap(family: Names) -> KeyMap:
    names = [f"{component}.{path}" for component, layers in family_layers(family).items() for path in layers]
    return KeyMap({name: name for name in names}, ENDINGS)


def component(base: str) -> str:
    return base.split(".", 1)[0]


def configured_alpha(base: str, rank: int, metadata: Mapping[str, str]) -> float | None:
    return _alphas(metadata[METADATA_KEY]).get(base)


@functools.lru_cache(maxsize=2)
def _alphas(entry: str) -> dict[str, float]:
    return state_from({}, {METADATA_KEY: entry}).alphas


def write(state: AdapterState, family: Names, metadata: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of the file."""
    return foreign_tensors(state, keymap(family), alphas=False), {**metadata, **state_metadata(state)}


def read(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], family: Names, *, assume_alpha: float | None = None
) -> AdapterState:
    """The inverse of `write`; see `keymap.read_pairs` for what it refuses."""
    return read_pairs(sys.modules[__name__], tensors, metadata, family, assume_alpha=assume_alpha)
