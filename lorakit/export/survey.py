"""What is in an adapter file, told without the model it was made for; and what two of them differ in.

Layers go by the file's own names, cut into component, block and place in the block, which are spelled alike for all
dialects. Only one layer's matrices are in memory at a time. Pictures of it: heat.py.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit import families
from lorakit.adapters import AdapterState
from lorakit.core.errors import InputError
from lorakit.core.files import printable
from lorakit.export.alphas import stored_alpha
from lorakit.export.files import AdapterFile, digests, dtype_name, interpret, read_file
from lorakit.export.keymap import FIRST, SECOND, split_key
from lorakit.export.kinds import other_kind
from lorakit.families.protocol import Names

_BLOCK = re.compile(
    r"(?:^|_)((?:down|up|input|output|mid|middle|joint|double|single|transformer)_blocks?|layers)(_\d+)?_"
)
Factors = tuple[Tensor, Tensor]
_COMPONENTS = {"lora_unet": "unet", "lora_te": "text_encoder", "lora_te1": "text_encoder", "lora_te2": "text_encoder_2"}


@dataclass(frozen=True)
class LayerSurvey:
    """A layer by the file's own name, its block and its place there; `norm` is the Frobenius norm of what the adapter
    adds to its weight (None: not finite), where no alpha is stored as programs take it, alpha = rank."""

    name: str
    component: str
    block: str
    place: str
    rank: int
    alpha: float | None
    norm: float | None


@dataclass(frozen=True)
class ComponentSurvey:
    """A component's adapted layers: how many of each rank, their alphas (None: not stored, programs take the rank), and
    the norm of what the adapter adds to all their weights, and to those of each block."""

    layers: int
    ranks: dict[int, int]
    alphas: list[float | None]
    norm: float
    blocks: dict[str, float]


@dataclass(frozen=True)
class Survey:
    """`components` by the file's own name for them; `keys` is the number of tensors; `dead` are layers that add
    nothing, `broken` ones whose values are not finite, `odd` keys of no LoRA pair; `note` says what those make of it.

    `families` are those that it may be for; `digest` is "verified", "differs" or "none" where the file has none.
    """

    format: str
    families: list[str]
    kind: str
    dtype: str
    modules: int
    keys: int
    components: dict[str, ComponentSurvey]
    layers: list[LayerSurvey]
    dead: list[str]
    broken: list[str]
    odd: list[str]
    note: str
    digest: str
    metadata: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect_adapter(path: Path | str) -> Survey:
    """What the adapter file or peft folder at `path` holds, also where it is damaged so that it would not be loaded.

    Raises InputError for what is no adapter, a pickle or no whole file.
    """
    file = read_file(Path(path), accept_changed=True)
    pairs, odd = _pairs(file)
    layers = [_layer(file, base, path) for base in pairs]
    other = other_kind(file.tensors)
    found = list(digests(file).values())
    return Survey(
        format=file.format,
        families=families.recognised({k.replace("/base_model.model.", "."): x for k, x in file.tensors.items()}),
        kind="lora" if other is None else "other",
        dtype=dtype_name(file.dtype),
        modules=len(layers),
        keys=len(file.tensors),
        components={name: _component([x for x in layers if x.component == name]) for name in _names(layers)},
        layers=layers,
        dead=[layer.name for layer in layers if layer.norm == 0],
        broken=[layer.name for layer in layers if layer.norm is None],
        odd=odd,
        note=other or "",
        digest="none" if not found else "verified" if all(a == b for a, b in found) else "differs",
        metadata=dict(file.metadata),
    )


def _pairs(file: AdapterFile) -> tuple[list[str], list[str]]:
    """The layers with both matrices, and the keys that belong to none."""
    halves: Counter[str] = Counter()
    odd = []
    for key in file.tensors:
        base, ending = split_key(key, file.dialect.ENDINGS)
        if ending in (FIRST, SECOND):
            halves[base] += 1
        elif ending is None:
            odd.append(key)
    odd += [f"{base} (half of a pair)" for base, count in halves.items() if count == 1]
    return sorted(base for base, count in halves.items() if count == 2), sorted(odd)


def _names(layers: list[LayerSurvey]) -> list[str]:
    return list(dict.fromkeys(layer.component for layer in layers))


def _component(layers: list[LayerSurvey]) -> ComponentSurvey:
    squares: dict[str, float] = {}
    for layer in layers:
        squares[layer.block] = squares.get(layer.block, 0.0) + (layer.norm or 0.0) ** 2
    ordered = sorted(squares.items(), key=lambda item: _order(item[0]))
    return ComponentSurvey(
        layers=len(layers),
        ranks=dict(sorted(Counter(layer.rank for layer in layers).items())),
        alphas=sorted({layer.alpha for layer in layers}, key=lambda a: -1.0 if a is None else a),
        norm=math.sqrt(sum(squares.values())),
        blocks={block: math.sqrt(square) for block, square in ordered},
    )


def _order(block: str) -> tuple[int, int, str]:
    """As a picture goes through a model: in, down, middle, up; numbers as numbers."""
    depth = next((i for i, word in enumerate(("down", "input", "mid", "up", "output")) if block.startswith(word)), 9)
    number = block.rpartition(".")[2]
    return depth, int(number) if number.isdecimal() else -1, block


def _layer(file: AdapterFile, base: str, path: Path | str) -> LayerSurvey:
    first, second, alpha = _factors(file, base, path)
    scale = 1.0 if alpha is None else alpha / first.shape[0]
    square = float(((second.T @ second) * (first @ first.T)).sum())  # ‖B A‖² = tr((BᵀB)(A Aᵀ))
    norm = abs(scale) * math.sqrt(max(0.0, square)) if math.isfinite(square) else None
    component = file.dialect.component(base)
    block, place = located(base, component)
    return LayerSurvey(base, component, block, place, first.shape[0], alpha, norm)


def _factors(file: AdapterFile, base: str, path: Path | str) -> tuple[Tensor, Tensor, float | None]:
    """A (r, inputs) and B (outputs, r) in double precision, and the alpha."""
    first, second = (file.tensors[f"{base}.{file.dialect.ENDINGS[ending]}"] for ending in (FIRST, SECOND))
    if first.ndim < 2 or second.ndim < 2 or not first.shape[0] or first.shape[0] != second.flatten(1).shape[1]:
        raise InputError(f"{printable(path)}: the matrices of {printable(base)} do not fit each other.")
    alpha = stored_alpha(file.dialect, base, first.shape[0], file.tensors, file.metadata)
    return first.flatten(1).to(torch.float64), second.flatten(1).to(torch.float64), alpha


def located(base: str, component: str) -> tuple[str, str]:
    """(block, place in it) of the layer that a file calls `base`; the block of what is in none is "".

    >>> located("lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", "lora_unet")
    ('up_blocks.1', 'attn1_to_q')
    """
    name = base.removeprefix(component).replace("base_model.model.", "")
    name = re.sub(r"[./]", "_", name).strip("_").removeprefix("text_model_")
    match = _BLOCK.search(name)
    if not match:
        return "", name
    rest = name[match.end() :]
    return match[1] + (match[2] or "").replace("_", "."), rest[_end(rest) :] or rest


def _end(rest: str) -> int:
    """Where the numbered containers at the beginning of `rest` end."""
    match = re.match(r"((?:\d+_)|(?:(?:attentions|resnets|transformer_blocks|downsamplers|upsamplers)_\d+_))*", rest)
    return match.end() if match else 0


@dataclass(frozen=True)
class Difference:
    """How far two adapters are apart: by layer, in names that all dialects share, ‖ΔW₁ − ΔW₂‖ relative to the larger of
    both norms; and the layers that only one of them has."""

    layers: dict[str, float]
    only_first: list[str]
    only_second: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare_adapters(one: Path | str, other: Path | str, *, family: Names | None = None) -> Difference:
    """What the adapters at the two paths, files or folders of any dialect, differ in; raises as `inspect_adapter`.

    Some families have other names for the same layers in different dialects: then `family` is needed, and each must be
    wholly for it.
    """
    first, second = (_factors_of(Path(path), family) for path in (one, other))
    layers = {name: _relative(first[name](), second[name]()) for name in sorted(first.keys() & second.keys())}
    return Difference(layers, sorted(first.keys() - second.keys()), sorted(second.keys() - first.keys()))


def _factors_of(path: Path, family: Names | None) -> dict[str, Callable[[], Factors]]:
    """What gives A and scaled B of each layer, by a name that all dialects share."""
    file = read_file(path, accept_changed=True)
    if family is not None:
        state = interpret(file, family=family)
        return {layer: partial(_of_state, state, layer) for layer in state.layers()}
    found: dict[str, Callable[[], Factors]] = {}
    for base in _pairs(file)[0]:
        component = file.dialect.component(base)
        name = re.sub(r"[./]", "_", base.removeprefix(component).replace("base_model.model.", ""))
        name = f"{_COMPONENTS.get(component, component)}.{name.strip('_').removeprefix('text_model_')}"
        found[name] = partial(_of_file, file, base, path)
    return found


def _of_state(state: AdapterState, layer: str) -> Factors:
    first, second = (state.tensors[f"{layer}.{end}"].flatten(1).to(torch.float64) for end in (FIRST, SECOND))
    return first, second * (state.alphas[layer] / len(first))


def _of_file(file: AdapterFile, base: str, path: Path) -> Factors:
    first, second, alpha = _factors(file, base, path)
    return first, second * (1.0 if alpha is None else alpha / len(first))


def _relative(one: Factors, other: Factors) -> float:
    """‖B₁A₁ − B₂A₂‖ over the larger norm, by triangular factors: small matrices, and no difference of large squares."""
    (a, b), (c, d) = one, other
    if a.shape[1] != c.shape[1] or b.shape[0] != d.shape[0]:
        return 2.0  # as far as opposite ones: they do not fit the same layer
    if torch.equal(a, c) and torch.equal(b, d):
        return 0.0
    largest = max(_norm(b, a), _norm(d, c))
    return _norm(torch.cat([b, -d], 1), torch.cat([a, c])) / largest if largest else 0.0


def _norm(left: Tensor, right: Tensor) -> float:
    return float((torch.linalg.qr(left)[1] @ torch.linalg.qr(right.T)[1].T).norm())
