"""Folding adapters into a base that is one file in the layout it was published in, as Stable Diffusion's mostly are.

Which key of the file a layer's weight has, the family says; what is not changed is copied as it is.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lorakit import families
from lorakit.adapters import AdapterState, load_adapter_state
from lorakit.core.errors import InputError
from lorakit.core.files import make_folder, printable, rename, storage_errors, written_aside
from lorakit.core.quiet import quiet_libraries
from lorakit.export.container import Tensors
from lorakit.export.files import dtype_name
from lorakit.export.keymap import family_layers
from lorakit.export.merge import TOLERANCE, Adapter, MergeReport, changed_layers, compared, folded, weighted_states
from lorakit.export.probe import record_drawing, stock_components
from lorakit.export.shards import Stored, planned, write_planned
from lorakit.families.protocol import Names, SingleFile


def merge_single_file(
    base: Path | str,
    adapters: Sequence[Adapter],
    *,
    config: str,
    out: Path | str,
    dtype: torch.dtype | None = None,
    assume_alpha: float | None = None,
    verify: bool = True,
    on_progress: Callable[[int, int], object] = lambda done, total: None,
) -> MergeReport:
    """Saves the model in the file `base` with each adapter, times its weight, folded in, as the file `out`.

    `config` is a diffusers folder of such a model, of which no weights are read. All else is as with `merge_adapter`.
    """
    base, out = Path(base).expanduser(), Path(out)
    if out.exists():
        raise InputError(f"{printable(out)} exists already: choose another file.")
    if out.suffix != ".safetensors":
        raise InputError(f"{printable(out)}: the merged model is one file like its base: name it .safetensors.")
    if not adapters:
        raise InputError("merge needs an adapter at least.")
    quiet_libraries()
    names = families.outline(config)
    if not isinstance(names, SingleFile):
        raise InputError(f"merge reads no single files of the family {names.name}: give a diffusers folder.")
    tensors = Tensors({"": base})
    stored = Stored(base.parent, base.stem, dict.fromkeys(tensors, base), tensors.headers)
    states = weighted_states(adapters, names, assume_alpha=assume_alpha)
    places, plan = _places(names, stored, states), planned(stored, dtype)
    total, done = stored.size(), 0

    def change(key: str, tensor: Tensor) -> Tensor:
        layers = places.get(key)
        if layers is None or len(layers) == 1:
            return tensor if layers is None else folded(tensor, states, layers[0])
        return torch.cat(
            [folded(rows, states, one) for rows, one in zip(tensor.chunk(len(layers)), layers, strict=True)]
        )

    def progress(size: int) -> None:
        nonlocal done
        done += size
        on_progress(min(done, total), total)

    worst = None
    make_folder(out.parent)
    with (
        storage_errors(out),
        tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent) as folder,
    ):
        written = Path(folder) / out.name  # readers go by the name's ending
        with written_aside(written) as aside:
            write_planned(stored, aside, plan, change=change, metadata=tensors.metadata, on_progress=progress)
        if verify:
            tolerance = max((TOLERANCE.get(plan[key][0], 1e-5) for key in places), default=1e-5)
            worst = _verified(base, names, states, written, config, tolerance, out)
        rename(written, out)
    return MergeReport(out, {"model": dtype_name(dtype or stored.dtype())}, changed_layers(states), worst)


def _places(names: SingleFile, stored: Stored, states: Sequence[AdapterState]) -> dict[str, list[str]]:
    """The layers in each tensor that changes, by its key, in the order of their rows: "" for one that stays."""
    found: dict[str, list[str]] = {}
    layers = family_layers(names)
    for name in sorted({layer for state in states for layer in state.layers()}):
        component, _, path = name.partition(".")
        key, part, parts = names.single_file_key(component, path)
        shape = list(layers[component][path].weight.shape)  # type: ignore[arg-type]
        shape[0] *= parts
        # a linear layer may be a 1×1 convolution there, and the other way round
        if key not in stored.headers or _plain(stored.headers[key]["shape"]) != _plain(shape):
            raise InputError(
                f"{printable(stored.name)}.safetensors has no weights {shape} at {printable(key)}, of the layer "
                f"{printable(name)} that the adapter changes: is --config a folder of the same model?"
            )
        found.setdefault(key, [""] * parts)[part] = name
    return found


def _plain(shape: Sequence[int]) -> list[int]:
    return list(shape[:2] if list(shape[2:]) == [1, 1] else shape)


def _verified(
    base: Path, names: Names, states: Sequence[AdapterState], saved: Path, config: str, tolerance: float, out: Path
) -> float:
    """The largest relative difference of a prediction of the model in `saved` from base and adapters."""
    with torch.random.fork_rng(devices=[]):
        pipeline = families.load_single_file(base, config)
        calls = record_drawing(pipeline, names)
        components = stock_components(pipeline, names)
        for state in states:
            load_adapter_state(components, state)
        wanted = calls.answer(components)
        del pipeline, components  # one copy of the model at a time
        merged = families.load_single_file(saved, config)
        got = calls.answer(stock_components(merged, names))
    return compared(wanted, got, dict.fromkeys(wanted, tolerance), out)
