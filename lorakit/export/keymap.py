"""Names of layers here and in a dialect, and what is common to reading every dialect: each key accounted for."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor, nn

from lorakit.adapters.state import AdapterState, adaptable_layers, check_state, factor_shapes, shortened
from lorakit.core.errors import InputError
from lorakit.core.files import printable
from lorakit.export.alphas import stored_alpha
from lorakit.export.fused import whole_layers
from lorakit.families.protocol import Names

FIRST, SECOND, ALPHA = "lora_A.weight", "lora_B.weight", "alpha"


@dataclass(frozen=True)
class KeyMap:
    """A bijection between our names and a dialect's.

    `bases` gives each layer's name "<component>.<path>" its foreign one; `endings` the same for "lora_A.weight",
    "lora_B.weight", "alpha"; `also` are foreign names that are read and never written.
    """

    bases: Mapping[str, str]
    endings: Mapping[str, str]
    also: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert len(set(self.bases.values())) == len(self.bases), "two layers have one foreign name"

    def to_foreign(self, name: str) -> str:
        """The dialect's key of "<layer>.lora_A.weight", "<layer>.lora_B.weight" or "<layer>.alpha"."""
        for ours, theirs in self.endings.items():
            if name.endswith(f".{ours}"):
                return f"{self.bases[name.removesuffix(f'.{ours}')]}.{theirs}"
        raise KeyError(name)

    def from_foreign(self, key: str) -> str | None:
        """The inverse of `to_foreign`; None for a key that the family has no place for."""
        base, ending = split_key(key, self.endings)
        layer = self._layers.get(base) if ending else None
        return f"{layer}.{ending}" if layer else None

    @functools.cached_property
    def _layers(self) -> dict[str, str]:
        return {**self.also, **{theirs: ours for ours, theirs in self.bases.items()}}


def split_key(key: str, endings: Mapping[str, str]) -> tuple[str, str | None]:
    """(the layer's foreign name, our ending), or (key, None) where it ends otherwise."""
    for ours, theirs in endings.items():
        if key.endswith(f".{theirs}"):
            return key.removesuffix(f".{theirs}"), ours
    return key, None


def family_layers(family: Names) -> dict[str, dict[str, nn.Module]]:
    """The layers that an adapter of `family` may go into: by component, by path."""
    return {name: adaptable_layers(family.components[name]) for name in (family.backbone, *family.text_encoders)}


def foreign_tensors(state: AdapterState, keymap: KeyMap, *, alphas: bool) -> dict[str, Tensor]:
    """The tensors of `state` under the dialect's names, and where it keeps them so, its alphas.

    Raises InputError for a layer that the family does not have.
    """
    strangers = [name for name in state.layers() if name not in keymap.bases]
    if strangers:
        raise InputError(shortened([f"{printable(name)}: the model has no such layer." for name in strangers]))
    tensors = {keymap.to_foreign(name): tensor for name, tensor in state.tensors.items()}
    for layer, alpha in state.alphas.items() if alphas else ():
        tensors[keymap.to_foreign(f"{layer}.{ALPHA}")] = torch.tensor(alpha, dtype=torch.float32)
    return tensors


def read_pairs(
    dialect: ModuleType,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    family: Names,
    *,
    assume_alpha: float | None,
) -> AdapterState:
    """The state that a file of `dialect` holds, for the layers of `family`: every key has its place in it.

    `assume_alpha` stands for what the file does not say. Raises InputError with every key that has no place, half of a
    pair, wrong shape, value that is not finite, and layer without alpha or with two.
    """
    keymap, layers = dialect.keymap(family), family_layers(family)
    for name, fused in whole_layers(family).items():
        component, _, path = name.partition(".")
        layers[component][path] = fused
    keys: dict[str, str] = {}
    problems = []
    for key in sorted(tensors):
        name = keymap.from_foreign(key)
        if name is None:
            problems.append(f"{printable(key)} has no place in a model of the family {family.name}.")
        elif name in keys:
            problems.append(f"{printable(key)} and {printable(keys[name])} are the same layer's: keep one of them.")
        else:
            keys[name] = key
    if tensors and len(problems) == len(tensors):
        problems.insert(0, f"none of its {len(tensors)} keys fits: it was made for another family of models.")
    ours: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    without = []
    for name, key in keys.items():
        base, ending = split_key(key, keymap.endings)
        layer = name.removesuffix(f".{ending}")
        if ending == ALPHA:
            if f"{layer}.{FIRST}" not in keys:
                problems.append(f"{printable(key)} is an alpha without matrices: the file is damaged.")
            continue
        tensor, first = tensors[key], keys.get(f"{layer}.{FIRST}")
        rank = _rank(tensor if first == key or first is None else tensors[first])
        if not rank or not tensor.is_floating_point():
            problems.append(f"{printable(key)} is {_told(tensor)}, which is no matrix of a LoRA.")
            continue
        component, _, path = layer.partition(".")
        shapes = factor_shapes(layers[component][path], rank)
        ours[name] = _respelled(tensor.float(), shapes[0] if ending == FIRST else shapes[1])
        if ending == FIRST:
            try:
                alpha = stored_alpha(dialect, base, rank, tensors, metadata, layer=layer)
            except InputError as error:
                problems += error.problems
                continue
            if alpha is None and assume_alpha is None:
                without.append(base)
            alphas[layer] = float(alpha if alpha is not None else assume_alpha or 0.0)
    if without:
        noted = metadata.get("ss_network_alpha", "None")
        note = "" if noted == "None" else f"; a note in it says {printable(noted)[:20]}"
        problems.append(
            f"{len(without)} of {len(alphas)} layers have no alpha (the first is {printable(without[0])}), which says "
            f"how strong the adapter is: give it with --assume-alpha (programs that ignore this take the rank{note})."
        )
    state = AdapterState("lora", ours, alphas)
    try:
        check_state(state, layers)
    except InputError as error:
        # what is wrong already would be told twice
        problems += [] if problems else error.problems
    if problems:
        raise InputError(shortened(list(dict.fromkeys(problems))))
    return state


def _rank(first: Tensor) -> int:
    return first.shape[0] if first.ndim else 0


def _told(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of the shape {tuple(tensor.shape)}"


def _respelled(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Matrices of a 1×1 convolution may be written with two axes or four, those of a linear layer too."""
    same = tensor.ndim in (2, 4) and tensor.shape[:2] == shape[:2] and tensor.numel() == math.prod(shape)
    return tensor.reshape(shape) if same else tensor
