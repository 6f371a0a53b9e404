"""Folding adapters into a base: W + Σ weight · alpha/rank · B A, tensor by tensor, saved as a model of its own.

No model is loaded for it, so that a base of any size can be folded; the check at the end, that it predicts what base
and adapters do, loads it twice, and can be left out. Weights on disk: shards.py.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lorakit import families
from lorakit.adapters import AdapterState, load_adapter_state
from lorakit.adapters.state import FIRST, SECOND
from lorakit.core.errors import InputError, VerificationError
from lorakit.core.files import folder_aside, printable
from lorakit.core.quiet import quiet_libraries
from lorakit.export.files import dtype_name, read_adapter
from lorakit.export.keymap import family_layers
from lorakit.export.probe import Outputs, difference, largest, record_calls, stock_components
from lorakit.export.shards import Stored, write_stored
from lorakit.export.weights import Weights
from lorakit.families.protocol import Family, Names

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
MAX_SHARD_SIZE = 10 * 1000**3  # diffusers' own
Adapter = Path | str | tuple[Path | str, float | Mapping[str, float] | Weights]


@dataclass(frozen=True)
class MergeReport:
    """The merged model's folder, the number format of each component, how many layers changed, and how far its
    predictions are from those of base and adapters, relative to the largest one (None: not checked)."""

    path: Path
    dtypes: dict[str, str]
    modules: int
    max_difference: float | None


def merge_adapter(
    base: Family | str,
    adapters: Sequence[Adapter],
    *,
    out: Path | str,
    dtype: torch.dtype | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    assume_alpha: float | None = None,
    verify: bool = True,
    on_progress: Callable[[int, int], object] = lambda done, total: None,
) -> MergeReport:
    """Saves `base` with each adapter, times its weight, folded in, as a diffusers folder at `out`.

    `base` is a family or a model's path; an adapter is a path, or a path and its weight: a number, or numbers by
    component and block (weights.py). Everything is computed in fp32; `dtype` is what is saved, by default each tensor's
    own. `on_progress` is told bytes done and in all. Raises InputError for an adapter that does not fit and an `out`
    that exists, VerificationError (nothing is left) where the saved model predicts otherwise than base and adapters.
    """
    out = Path(out)
    if out.exists():
        raise InputError(f"{printable(out)} exists already: choose another folder.")
    if not adapters:
        raise InputError("merge needs an adapter at least.")
    quiet_libraries()
    names: Names = families.outline(base) if isinstance(base, str) else base
    folder = families.folder_of(base) if isinstance(base, str) else base.path
    states = weighted_states(adapters, names, assume_alpha=assume_alpha)
    parts = {part: Stored.found(folder / part) for part in _components(folder)}
    weights = {part: stored for part, stored in parts.items() if stored is not None}
    changes = _places(names, weights, states)
    total, done = sum(stored.size() for stored in weights.values()), 0

    def progress(size: int) -> None:
        nonlocal done
        done += size
        on_progress(min(done, total), total)

    with folder_aside(out) as aside:
        _copy_rest(folder, aside, parts)
        for part, stored in weights.items():
            write_stored(
                stored,
                aside / part,
                dtype=dtype,
                max_shard_size=max_shard_size,
                change=_change(changes.get(part, {}), states),
                on_progress=progress,
            )
        dtypes = {part: dtype or stored.dtype() for part, stored in weights.items()}
        weights.clear()  # the base's files
        worst = None
        if verify:
            family = families.load(names.name, base) if isinstance(base, str) else base
            worst = _verified(family, states, aside, dtypes, out)
    return MergeReport(out, {name: dtype_name(kind) for name, kind in dtypes.items()}, changed_layers(states), worst)


def weighted_states(adapters: Sequence[Adapter], names: Names, *, assume_alpha: float | None) -> list[AdapterState]:
    """What each adapter holds, times its weight."""
    states = []
    for entry in adapters:
        path, weight = entry if isinstance(entry, tuple) else (entry, 1.0)
        states.append(Weights.of(weight).applied(read_adapter(path, family=names, assume_alpha=assume_alpha)))
    return states


def changed_layers(states: Sequence[AdapterState]) -> int:
    """How many layers the states add something to."""
    adding = (
        layer
        for state in states
        for layer in state.layers()
        if state.alphas[layer] and state.tensors[layer + SECOND].any()
    )
    return len(set(adding))


def _components(folder: Path) -> list[str]:
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return [part for part, entry in index.items() if isinstance(entry, list) and (folder / part).is_dir()]


def _places(names: Names, weights: Mapping[str, Stored], states: Sequence[AdapterState]) -> dict[str, dict[str, str]]:
    """The layer that each tensor on disk which changes belongs to, by component and key."""
    found: dict[str, dict[str, str]] = {}
    layers = family_layers(names)
    for name in sorted({layer for state in states for layer in state.layers()}):
        component, _, path = name.partition(".")
        stored = weights.get(component)
        # a file may have the published names, which a library has since changed
        spelled = (f"{path}.weight", f"{names.original_name(component, path)}.weight")
        key = next((key for key in spelled if stored is not None and key in stored.files), None)
        shape = list(layers[component][path].weight.shape)  # type: ignore[arg-type]
        if stored is None or key is None or stored.headers[key]["shape"] != shape:
            raise InputError(f"the base has no weights {shape} of {printable(name)}, which the adapter changes.")
        found.setdefault(component, {})[key] = name
    return found


def _change(places: Mapping[str, str], states: Sequence[AdapterState]) -> Callable[[str, Tensor], Tensor]:
    return lambda key, tensor: folded(tensor, states, places[key]) if key in places else tensor


@torch.no_grad()
def folded(weight: Tensor, states: Sequence[AdapterState], layer: str) -> Tensor:
    """The weight of `layer` with what `states` add to it, in fp32."""
    total = weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    for state in states:
        if state.alphas.get(layer):
            first, second = state.tensors[layer + FIRST], state.tensors[layer + SECOND]
            # in place, so that a weight is in memory once and no product beside it
            total.flatten(1).addmm_(second.flatten(1), first.flatten(1), alpha=state.alphas[layer] / len(first))
    return total


def product(first: Tensor, second: Tensor) -> Tensor:
    """B A as a layer's weight: (out, in), for convolutions (out, in, k, k)."""
    return (second.flatten(1) @ first.flatten(1)).reshape(second.shape[0], *first.shape[1:])


def _copy_rest(folder: Path, aside: Path, parts: Mapping[str, Stored | None]) -> None:
    """Copies configurations, tokenizers and the licence, without where on this machine they came from."""
    files = [folder / "model_index.json", *folder.glob("LICENSE*")]
    for part in parts:
        (aside / part).mkdir(parents=True)
        files += [
            path
            for path in sorted((folder / part).iterdir())
            if path.suffix in (".json", ".txt", ".model", ".jinja") and not path.name.endswith(".index.json")
        ]
    for file in files:
        target = aside / file.relative_to(folder)
        if file.suffix != ".json":
            shutil.copyfile(file, target)
            continue
        text = file.read_text(encoding="utf-8")
        value = json.loads(text)
        if isinstance(value, dict) and value.pop("_name_or_path", None) is not None:
            text = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
        target.write_text(text, encoding="utf-8")


def _verified(
    base: Family, states: Sequence[AdapterState], saved: Path, dtypes: Mapping[str, torch.dtype], out: Path
) -> float:
    """The largest relative difference of a prediction of the model at `saved` from base and adapters."""
    calls = record_calls(base)
    with torch.random.fork_rng(devices=[]):
        pipeline = base.stock_pipeline()
        loader = type(pipeline)
        components: dict[str, nn.Module] = stock_components(pipeline, base)
        for state in states:
            load_adapter_state(components, state)
        wanted = calls.answer(components)
        del pipeline, components  # one copy of the model at a time
        merged = loader.from_pretrained(saved, dtype=torch.float32, local_files_only=True)
        got = calls.answer(stock_components(merged, base))
    return compared(wanted, got, {name: TOLERANCE.get(kind, 1e-5) for name, kind in dtypes.items()}, out)


def compared(wanted: Outputs, got: Outputs, tolerances: Mapping[str, float], out: Path) -> float:
    """The largest relative difference; VerificationError where one is above its component's tolerance."""
    worst = 0.0
    for component, answers in wanted.items():
        size = largest(answers)
        off = difference(got[component], answers) / size if size else 0.0
        if not off <= tolerances[component]:
            raise VerificationError(
                f"the merged {component} predicts otherwise than the base with its adapters: "
                f"by {off:.1e} of the predictions' size. Nothing was left at {printable(out)}."
            )
        worst = max(worst, off)
    return worst
