"""An adapter file into any stock pipeline that holds the components it was made for: image to image, ControlNet, …

The layers' names come from the pipeline itself (families.around), so that no base is read a second time. What reads the
file: files.py; what puts it beside the layers: lorakit/adapters/state.py.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lorakit import families
from lorakit.adapters import load_adapter_state
from lorakit.adapters.state import adapter_layers
from lorakit.core.errors import InputError
from lorakit.core.files import printable
from lorakit.core.quiet import quiet_libraries
from lorakit.export.files import interpret, read_file
from lorakit.families.protocol import Names


@dataclass(frozen=True)
class LoadedAdapter:
    """What a pipeline calls the adapter, its weight in each component, and how many layers it has there."""

    name: str
    weights: Mapping[str, float]
    layers: Mapping[str, int]


def load_adapter(
    pipeline: Any,
    file: Path | str,
    weight: float | Mapping[str, float] = 1.0,
    *,
    adapter_name: str | None = None,
    assume_alpha: float | None = None,
) -> LoadedAdapter:
    """Puts the adapter at `file`, a file or peft folder of any dialect, into a stock pipeline: W x + weight · ΔW x.

    `weight` is one number or, by component, several (1 where none is said). What is active in the pipeline stays so,
    and effects add up. Afterwards its `set_adapters`, `fuse_lora`, `delete_adapters` and `unload_lora_weights`, where
    it has them, treat the adapter as one that diffusers loaded, by `adapter_name` ("default_0", "default_1", … where
    not given). `assume_alpha` is the alpha of layers whose file does not say it.

    Raises InputError for a pipeline of no known family, a file that is not wholly for it, and a name that is taken or
    cannot be one; nothing is changed then.
    """
    quiet_libraries()
    names = families.around(pipeline)
    name = _checked_name(adapter_name, _there(names))
    _check_ready(names)
    read = read_file(Path(file))
    try:
        state = interpret(read, family=names, assume_alpha=assume_alpha)
        weights = _weights(weight, state.components())
    except InputError as error:
        missing = sorted(set(names.lora_prefixes) - {names.backbone, *names.text_encoders})
        without = f", which has no {' and no '.join(missing)}" if missing else ""
        raise InputError(
            [f"{printable(file)} does not fit this {type(pipeline).__name__} of the family {names.name}{without}:"]
            + error.problems
        ) from None
    active = list(dict.fromkeys(one for _, layer in _adapted(names) for one in layer.active_adapters))
    load_adapter_state({part: names.components[part] for part in weights}, state, name=name)
    for part, layer in _adapted(names):
        # all layers are told of all active adapters, as diffusers does it, which asks any one of them
        layer.set_adapter([*active, name], inference_mode=True)
        if name in layer.r:
            layer.set_scale(name, weights[part])
            dtype = layer.base_layer.weight.dtype
            if dtype.is_floating_point:
                layer.lora_A[name].to(dtype)
                layer.lora_B[name].to(dtype)
    for part in weights:
        names.components[part]._hf_peft_config_loaded = True  # type: ignore[assignment]
    counted = {part: sum(layer.startswith(f"{part}.") for layer in state.layers()) for part in weights}
    return LoadedAdapter(name, weights, counted)


def _adapted(names: Names) -> Iterator[tuple[str, Any]]:
    """The layers that have an adapter, each with its component's name."""
    for part in (names.backbone, *names.text_encoders):
        for _, layer in adapter_layers(names.components[part]):
            yield part, layer


def _there(names: Names) -> set[str]:
    """The names of the adapters in a pipeline, active or not."""
    return {one for _, layer in _adapted(names) for one in layer.r}


def _checked_name(wanted: str | None, there: set[str]) -> str:
    if wanted is None:
        return next(name for name in (f"default_{n}" for n in range(len(there) + 1)) if name not in there)
    if wanted in there:
        raise InputError(f"adapter_name = {printable(wanted)!r} is in the pipeline already: choose another name.")
    # it becomes an entry of a ModuleDict
    if not wanted or "." in wanted or hasattr(nn.ModuleDict, wanted):
        raise InputError(f"adapter_name = {printable(wanted)!r} cannot be one: choose a word without a full stop.")
    return wanted


def _check_ready(names: Names) -> None:
    if any(layer.merged for _, layer in _adapted(names)):
        raise InputError(
            "an adapter is fused into this pipeline, which would compute without the new one: "
            "call pipeline.unfuse_lora() first, and fuse both afterwards."
        )
    for part in (names.backbone, *names.text_encoders):
        if any(parameter.is_meta for parameter in names.components[part].parameters()):
            raise InputError(f"the weights of {part} are offloaded: load adapters before you turn offloading on.")


def _weights(weight: float | Mapping[str, float], parts: list[str]) -> dict[str, float]:
    """The weight of each of `parts`."""
    given = weight if isinstance(weight, Mapping) else dict.fromkeys(parts, weight)
    problems = [
        f"weight: the adapter has no part {printable(p)!r}, only {', '.join(parts)}." for p in given.keys() - parts
    ]
    problems += [f"weight = {w} is no finite number." for w in {*given.values()} if not math.isfinite(w)]
    if problems:
        raise InputError(problems)
    return {part: float(given.get(part, 1.0)) for part in parts}
