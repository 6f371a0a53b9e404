"""What is in an adapter file, told without the model it was made for."""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.core.errors import InputError
from lorakit.core.files import printable
from lorakit.export.alphas import stored_alpha
from lorakit.export.files import dtype_name, read_file
from lorakit.export.keymap import FIRST, SECOND, split_key


@dataclass(frozen=True)
class ComponentSurvey:
    """A component's adapted layers: how many of each rank, their alphas (None: not stored, programs take the rank), and
    the Frobenius norm of what the adapter adds to all their weights."""

    layers: int
    ranks: dict[int, int]
    alphas: list[float | None]
    norm: float


@dataclass(frozen=True)
class Survey:
    """`components` by the file's own name for them; `keys` is the number of tensors; `odd` are keys of no LoRA pair."""

    format: str
    kind: str
    dtype: str
    modules: int
    keys: int
    components: dict[str, ComponentSurvey]
    odd: list[str]
    metadata: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def inspect_adapter(path: Path | str) -> Survey:
    """What the adapter file or peft folder at `path` holds.

    Raises InputError for what is no adapter, a pickle or a damaged file.
    """
    file = read_file(Path(path))
    dialect = file.dialect
    pairs: dict[str, dict[str, Tensor]] = {}
    odd = []
    for key, tensor in file.tensors.items():
        base, ending = split_key(key, dialect.ENDINGS)
        if ending in (FIRST, SECOND):
            pairs.setdefault(base, {})[ending] = tensor.float()
        elif ending is None:
            odd.append(key)
    odd += [f"{base} (half of a pair)" for base, pair in pairs.items() if len(pair) == 1]
    found: dict[str, list[tuple[int, float | None, float]]] = {}
    for base, pair in sorted(pairs.items()):
        if len(pair) == 1:
            continue
        first, second = pair[FIRST].flatten(1), pair[SECOND].flatten(1)
        if first.shape[0] != second.shape[1]:
            raise InputError(f"{printable(path)}: the matrices of {printable(base)} do not fit each other.")
        rank = first.shape[0]
        alpha = stored_alpha(dialect, base, rank, file.tensors, file.metadata)
        squared = _squared_norm(first, second) * ((rank if alpha is None else alpha) / rank) ** 2
        found.setdefault(dialect.component(base), []).append((rank, alpha, squared))
    components = {
        name: ComponentSurvey(
            layers=len(layers),
            ranks=dict(sorted(Counter(rank for rank, _, _ in layers).items())),
            alphas=sorted({alpha for _, alpha, _ in layers}, key=lambda a: -1.0 if a is None else a),
            norm=sum(squared for _, _, squared in layers) ** 0.5,
        )
        for name, layers in found.items()
    }
    modules, keys = sum(c.layers for c in components.values()), len(file.tensors)
    dtype, metadata = dtype_name(file.dtype), dict(file.metadata)
    return Survey(file.format, "lora", dtype, modules, keys, components, sorted(odd), metadata)


def _squared_norm(first: Tensor, second: Tensor) -> float:
    """‖B A‖² = tr((BᵀB)(A Aᵀ)), in rank × rank products instead of the whole matrix."""
    first, second = first.to(torch.float64), second.to(torch.float64)
    return float(((second.T @ second) * (first @ first.T)).sum())
