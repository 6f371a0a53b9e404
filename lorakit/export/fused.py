"""Layers that are several here and one in the published layout: W = [W₁; W₂; …], a part's rows below another's.

The family says which (`Names.fused`). An adapter of the parts is one of the whole whose B is block-diagonal (so does
sd-scripts' networks/convert_flux_lora.py); one of the whole is one of each part: A, and the part's rows of B.
"""

import math

import torch
from torch import nn

from lorakit.adapters.state import FIRST, SECOND, AdapterState, adaptable_layers
from lorakit.core.errors import InputError
from lorakit.core.files import printable
from lorakit.families.protocol import Names


def whole_layers(family: Names) -> dict[str, nn.Linear]:
    """The fused layers by "<component>.<published name>", without weights."""
    with torch.device("meta"):
        return {
            whole: nn.Linear(parts[0].in_features, sum(part.out_features for part in parts))
            for whole, parts in _parts(family).items()
        }


def fuse(state: AdapterState, family: Names) -> AdapterState:
    """`state` with one layer instead of the parts that it adapts of a fused one; ranks and alphas are their sums.

    So alpha/rank of the whole is that of the parts; where these differ, the difference is in their rows of B.
    """
    tensors, alphas = dict(state.tensors), dict(state.alphas)
    for whole, layers in _parts(family).items():
        names = family.fused[whole]
        there = [name in alphas for name in names]
        if not any(there):
            continue
        own = {n: alphas.pop(n) / len(tensors[n + FIRST]) for n, is_there in zip(names, there, strict=True) if is_there}
        firsts = [tensors.pop(name + FIRST) for name in own]
        rank = sum(map(len, firsts))
        alpha = sum(scale * len(first) for scale, first in zip(own.values(), firsts, strict=True)) or float(rank)
        second, row, column = firsts[0].new_zeros(sum(layer.out_features for layer in layers), rank), 0, 0
        for name, layer in zip(names, layers, strict=True):
            if name in own:
                block = tensors.pop(name + SECOND)
                more = own[name] * rank / alpha
                filled = second[row : row + layer.out_features, column : column + block.shape[1]]
                filled.copy_(block if math.isclose(more, 1) else block * more)
                column += block.shape[1]
            row += layer.out_features
        tensors |= {whole + FIRST: torch.cat(firsts), whole + SECOND: second}
        alphas[whole] = alpha
    return AdapterState(state.kind, tensors, alphas)


def fused_alphas(state: AdapterState, family: Names) -> dict[str, float]:
    """The alphas with which `fuse` leaves the rows of B as they are, of the parts that have others."""
    found: dict[str, float] = {}
    for names in family.fused.values():
        ranks = {name: len(state.tensors[name + FIRST]) for name in names if name in state.alphas}
        scale = sum(state.alphas[name] for name in ranks) / max(1, sum(ranks.values()))
        own = {name: scale * rank for name, rank in ranks.items()}
        found |= {name: alpha for name, alpha in own.items() if alpha and not math.isclose(alpha, state.alphas[name])}
    return found


def split(state: AdapterState, family: Names) -> AdapterState:
    """The inverse of `fuse` in effect: layers of the parts, each without the columns of B that are zero in its rows.

    A part with no other columns is left out, unless the whole adapter is zero. Raises InputError where a part is there
    besides.
    """
    tensors, alphas = dict(state.tensors), dict(state.alphas)
    problems = []
    for whole, layers in _parts(family).items():
        if whole not in alphas:
            continue
        first, second, alpha = tensors.pop(whole + FIRST), tensors.pop(whole + SECOND), alphas.pop(whole)
        blocks = second.split([layer.out_features for layer in layers])
        for name, block in zip(family.fused[whole], blocks, strict=True):
            if name in alphas:
                problems.append(f"{printable(name)} is adapted twice, by itself and in {printable(whole)}: keep one.")
            used = block.any(dim=0) if second.any() else torch.ones(len(first), dtype=torch.bool)
            if used.any():
                tensors |= {name + FIRST: first[used], name + SECOND: block[:, used]}
                # in single precision as files hold it: thirds of a sum are then what was summed
                alphas[name] = float(torch.tensor(alpha * int(used.sum()) / len(first), dtype=torch.float32))
    if problems:
        raise InputError(problems)
    return AdapterState(state.kind, tensors, alphas)


def _parts(family: Names) -> dict[str, list[nn.Linear]]:
    layers = {name: adaptable_layers(module) for name, module in family.components.items()} if family.fused else {}
    found: dict[str, list[nn.Linear]] = {}
    for whole, names in family.fused.items():
        found[whole] = []
        for component, _, path in (name.partition(".") for name in names):
            layer = layers[component][path]
            assert isinstance(layer, nn.Linear)
            found[whole].append(layer)
    return found
