"""A warm start: a training that begins with the weights of an adapter file, of any dialect, instead of fresh ones.

Not the way to go on with a run: optimizer, step and random numbers begin anew.
"""

import math
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import nn

from lorakit.adapters import AdapterState, adapter_state, copy_adapter_state
from lorakit.adapters.state import FIRST, with_alphas
from lorakit.core.errors import InputError
from lorakit.core.files import printable
from lorakit.export.files import AdapterFile, interpret, read_file, readable
from lorakit.families.protocol import Family


def warm_start(adapted: Mapping[str, nn.Module], file: Path, *, family: Family) -> None:
    """Copies the weights of the adapter in `file` into the adapters in `adapted`.

    Raises InputError naming adapter.init_from where the file cannot be read, is of another base, or differs in layers,
    ranks or alphas; nothing is changed then.
    """
    wanted = adapter_state(adapted)
    try:
        state = _interpreted(read_file(file), family, _rank_as_alpha(wanted))
    except InputError as error:
        raise InputError([f"adapter.init_from: {problem}" for problem in error.problems]) from None
    folded = readable(wanted, "kohya", family).alphas
    if state.alphas.keys() == folded.keys() and all(
        math.isclose(a, folded[n], rel_tol=1e-6) for n, a in state.alphas.items()
    ):
        state = with_alphas(state, wanted.alphas)
    problems = _components(wanted, state, family.backbone) or _layers(wanted, state, family.backbone)
    if problems:
        raise InputError([f"adapter.init_from = {printable(file)}: {problem}" for problem in problems])
    copy_adapter_state(adapted, state)


def _interpreted(file: AdapterFile, family: Family, assumed: float | None) -> AdapterState:
    try:
        return interpret(file, family=family)
    except InputError:
        if assumed is None:
            raise
        return interpret(file, family=family, assume_alpha=assumed)


def _rank_as_alpha(wanted: AdapterState) -> float | None:
    """What a file that does not say its alphas is taken for: what most programs do, where the recipe does so too."""
    ranks = {len(wanted.tensors[layer + FIRST]) for layer in wanted.layers()}
    return float(min(ranks)) if len(ranks) == 1 and ranks == set(wanted.alphas.values()) else None


def _section(component: str, backbone: str) -> str:
    return "adapter" if component == backbone else "adapter.text_encoder"


def _components(wanted: AdapterState, given: AdapterState, backbone: str) -> list[str]:
    problems = []
    for name in sorted({*wanted.components()} - {*given.components()}):
        leave = "" if name == backbone else f"leave {_section(name, backbone)} out, or "
        problems.append(f"it has no weights for {name}, which the recipe trains: {leave}take a file that has them.")
    for name in sorted({*given.components()} - {*wanted.components()}):
        problems.append(
            f"it has weights for {printable(name)}, which the recipe does not train: set "
            f"{_section(name, backbone)}.rank, or take a file without them."
        )
    return problems


def _layers(wanted: AdapterState, given: AdapterState, backbone: str) -> list[str]:
    """What of the layers, ranks and alphas differs, summed up for each component."""
    problems = []
    for component in wanted.components():
        section = _section(component, backbone)
        asked = {layer for layer in wanted.layers() if layer.startswith(f"{component}.")}
        there = {layer for layer in given.layers() if layer.startswith(f"{component}.")}
        if asked - there:
            some = min(asked - there)
            problems.append(
                f"it lacks {len(asked - there)} layers that {section}.targets names, like {some}: take them out there."
            )
        if there - asked:
            some = printable(min(there - asked))
            problems.append(
                f"it has {len(there - asked)} layers that {section}.targets does not name, like {some}: add them."
            )
        ranks = {(len(given.tensors[layer + FIRST]), len(wanted.tensors[layer + FIRST])) for layer in asked & there}
        alphas = {(given.alphas[layer], wanted.alphas[layer]) for layer in asked & there}
        problems += _numbers(f"{section}.rank", ranks)
        problems += _numbers(f"{section}.alpha", alphas, note=" (rslora makes it larger by the root of the rank)")
    return problems


def _numbers(key: str, pairs: Collection[tuple[float, float]], *, note: str = "") -> list[str]:
    """The problem, if there is one, with a setting that layers have as (given, wanted)."""
    if all(theirs == ours for theirs, ours in pairs):
        return []
    theirs, ours = sorted({given for given, _ in pairs}), sorted({wanted for _, wanted in pairs})
    some = ", ".join(f"{number:g}" for number in theirs[:5])
    if len(ours) > 1:
        return [f"{key} and its patterns give other numbers than the file's layers have ({some}): make them equal."]
    if len(theirs) > 1:
        return [f"{key} is one number for all layers, and its layers have several ({some}): give them by patterns."]
    return [f"{key} is {ours[0]:g} and the file's {theirs[0]:g}{note}: make them equal."]
