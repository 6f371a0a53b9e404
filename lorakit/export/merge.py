"""Folding adapters into a base: W + Σ weight · alpha/rank · B A, saved as a pipeline of its own and verified."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit import families
from lorakit.adapters import AdapterState, load_adapter_state
from lorakit.adapters.state import FIRST, SECOND, adaptable_layers
from lorakit.core.errors import InputError, VerificationError
from lorakit.core.files import folder_aside, printable
from lorakit.core.quiet import quiet_libraries
from lorakit.export.files import dtype_name, read_adapter
from lorakit.export.probe import difference, largest, record_calls, stock_components
from lorakit.families.protocol import Family

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
# headers name number formats otherwise than torch
_HEADER = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@dataclass(frozen=True)
class MergeReport:
    """The merged pipeline's folder, the number format of each component, how many layers changed, and how far its
    predictions are from those of base and adapters, relative to the largest one."""

    path: Path
    dtypes: dict[str, str]
    modules: int
    max_difference: float


def merge_adapter(
    base: Family | str,
    adapters: Sequence[Path | str | tuple[Path | str, float]],
    *,
    out: Path | str,
    dtype: torch.dtype | None = None,
    assume_alpha: float | None = None,
) -> MergeReport:
    """Saves `base` with each adapter, times its weight, folded in, as a diffusers folder at `out`.

    `base` is a family, or the path of one of the default family; an adapter is a path, or a path and its weight.
    Everything is computed in fp32; `dtype` is what is
    saved, by default each component's own. Raises InputError for an adapter that does not fit and an `out` that exists,
    VerificationError (nothing is left) where the saved pipeline predicts otherwise than base and adapters do.
    """
    out = Path(out)
    if out.exists():
        raise InputError(f"{printable(out)} exists already: choose another folder.")
    if not adapters:
        raise InputError("merge needs an adapter at least.")
    quiet_libraries()
    if isinstance(base, str):
        base = families.load(families.DEFAULT, base)
    weighted = [entry if isinstance(entry, tuple) else (entry, 1.0) for entry in adapters]
    states = [(read_adapter(path, family=base, assume_alpha=assume_alpha), float(weight)) for path, weight in weighted]
    calls = record_calls(base)
    with torch.random.fork_rng(devices=[]):
        components = stock_components(base.stock_pipeline(), base)
        for state, weight in states:
            load_adapter_state(components, state, weight=weight)
        wanted = calls.answer(components)
        del components  # one copy of the model at a time

        pipeline = base.stock_pipeline()
        loader = type(pipeline)
        for state, weight in states:
            fold(stock_components(pipeline, base), state, weight=weight)
        dtypes = _set_dtypes(pipeline, base, dtype)
        with folder_aside(out) as aside:
            pipeline.save_pretrained(aside, safe_serialization=True)
            del pipeline
            _forget_origin(aside)
            saved = loader.from_pretrained(aside, dtype=torch.float32, local_files_only=True)
            got = calls.answer(stock_components(saved, base))
            worst = 0.0
            for component, answers in wanted.items():
                size = largest(answers)
                off = difference(got[component], answers) / size if size else 0.0
                if not off <= TOLERANCE.get(dtypes[component], 1e-5):
                    raise VerificationError(
                        f"the merged {component} predicts otherwise than the base with its adapters: "
                        f"by {off:.1e} of the predictions' size. Nothing was left at {printable(out)}."
                    )
                worst = max(worst, off)
    layers = {layer for state, _ in states for layer in state.layers()}
    return MergeReport(out, {name: dtype_name(kind) for name, kind in dtypes.items()}, len(layers), worst)


@torch.no_grad()
def fold(components: dict[str, nn.Module], state: AdapterState, *, weight: float = 1.0) -> None:
    """Adds weight · alpha/rank · B A to the layers' own weights, in place and in fp32."""
    for name in state.layers():
        component, _, path = name.partition(".")
        layer = adaptable_layers(components[component])[path]
        assert isinstance(layer, (nn.Linear, nn.Conv2d))
        change = product(state.tensors[name + FIRST], state.tensors[name + SECOND])
        scale = weight * state.alphas[name] / len(state.tensors[name + FIRST])
        layer.weight += (scale * change).to(layer.weight.device)


def product(first: Tensor, second: Tensor) -> Tensor:
    """B A as a layer's weight: (out, in), for convolutions (out, in, k, k)."""
    return (second.flatten(1) @ first.flatten(1)).reshape(second.shape[0], *first.shape[1:])


def _set_dtypes(pipeline: Any, base: Family, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    dtypes = {}
    for name, module in pipeline.components.items():
        if isinstance(module, nn.Module):
            dtypes[name] = dtype or stored_dtype(base.path / name) or torch.float32
            module.to(dtypes[name])
            if not all(p.isfinite().all() for p in module.parameters()):
                held = dtype_name(dtypes[name])
                raise InputError(f"the merged {name} has values that {held} cannot hold: ask for fp32.")
    return dtypes


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The number format of most values in a component's safetensors files; None where there are none."""
    sizes: Counter[str] = Counter()
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as handle:
            header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                sizes[entry["dtype"]] += end - start
    return _HEADER.get(sizes.most_common(1)[0][0]) if sizes else None


def _forget_origin(folder: Path) -> None:
    """Takes the base's path on this machine out of the configurations: the folder is made to be passed on."""
    for file in sorted(folder.rglob("*.json")):
        value = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(value, dict) and value.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
