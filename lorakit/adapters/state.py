"""An adapter's weights as plain data, and the modules they live in: take out, put in, list, switch off.

Nothing here knows a file or a model family. Tensors are named "unet.<module path>.lora_A.weight" (the component first,
then peft's names, without an adapter name), whatever program they came from; files and their names: lorakit/export/.
"""

import contextlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.errors import InputError
from lorakit.core.files import printable

METADATA_KEY = "lorakit.adapter"
FIRST, SECOND = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class AdapterState:
    """The weights of an adapter of `kind`.

    `tensors` by "<component>.<module path>.lora_A.weight" and ".lora_B.weight", `alphas` by the same without the end.
    A layer's change is alpha/rank · B A (the scaling of rsLoRA is folded into alpha).
    """

    kind: str
    tensors: dict[str, Tensor]
    alphas: dict[str, float]

    def layers(self) -> list[str]:
        """Names "<component>.<module path>" of the adapted layers, sorted."""
        return sorted({name.removesuffix(FIRST).removesuffix(SECOND) for name in self.tensors})

    def components(self) -> list[str]:
        return sorted({name.split(".", 1)[0] for name in self.layers()})


def with_alphas(state: AdapterState, alphas: Mapping[str, float]) -> AdapterState:
    """The adapter of the same effect with these alphas: alpha · B A stays, up to rounding, by a factor on B."""
    factors = {layer: state.alphas[layer] / alphas[layer] for layer in state.layers()}
    scaled = {
        f"{layer}{SECOND}": state.tensors[f"{layer}{SECOND}"] * factor
        for layer, factor in factors.items()
        if factor != 1
    }
    return replace(state, tensors={**state.tensors, **scaled}, alphas={layer: alphas[layer] for layer in factors})


@dataclass(frozen=True)
class LayerPlan:
    rank: int
    alpha: float


def adaptable_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Linear and 2-d convolution layers by dotted path, the same whether or not an adapter is already beside them."""
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, layer in module.named_modules():
        if inside and name.startswith(inside):
            continue
        if hasattr(layer, "base_layer"):
            inside = (f"{name}.",)
            layer = layer.base_layer
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            found[name] = layer
    return found


def adapter_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers of `module` with an adapter beside them, by path."""
    if not any(hasattr(layer, "base_layer") for layer in module.modules()):
        return
    from peft.tuners.lora import LoraLayer

    for name, layer in module.named_modules():
        if isinstance(layer, LoraLayer):
            yield name, layer


def inject_layers(
    module: nn.Module, plan: Mapping[str, LayerPlan], *, dropout: float = 0.0, name: str | None = None
) -> str:
    """Freezes `module` but for a new adapter beside the planned layers, fp32, and returns the new adapter's name.

    Adapters that are already there stay and are added up. Where no `name` is given, the first is called "default".
    """
    from peft import LoraConfig, inject_adapter_in_model

    there = {name for _, layer in adapter_layers(module) for name in layer.r}
    adapter = name or (f"default_{len(there)}" if there else "default")
    rank = Counter(p.rank for p in plan.values()).most_common(1)[0][0]
    alpha = Counter(p.alpha for p in plan.values()).most_common(1)[0][0]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules="|".join(re.escape(path) for path in plan),
        rank_pattern={f"^{re.escape(path)}": p.rank for path, p in plan.items() if p.rank != rank},
        alpha_pattern={f"^{re.escape(path)}": p.alpha for path, p in plan.items() if p.alpha != alpha},
        lora_dropout=dropout,
    )
    # peft initialises what is overwritten here from the global generator, which must not move
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), _without_bitsandbytes(module):
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
        inject_adapter_in_model(config, module, adapter_name=adapter)
    module.requires_grad_(False)
    injected = set()
    for path, layer in adapter_layers(module):
        layer.set_adapter(list(layer.r))  # peft left only the new one active
        layer.train(layer.base_layer.training)
        if adapter in layer.r:
            injected.add(path)
            assert layer.scaling[adapter] == plan[path].alpha / plan[path].rank
            for part in (layer.lora_A[adapter], layer.lora_B[adapter]):
                part.float()
    assert injected == set(plan), f"peft adapted {injected ^ set(plan)} otherwise than planned"
    return adapter


@contextlib.contextmanager
def _without_bitsandbytes(module: nn.Module) -> Iterator[None]:
    """peft imports it, a second's work, to see whether a layer is one of its own; not where none can be."""
    from peft.tuners.lora import model

    there = any(type(layer).__module__.startswith("bitsandbytes") for layer in module.modules())
    before = {name: getattr(model, name) for name in ("is_bnb_available", "is_bnb_4bit_available") if not there}
    try:
        vars(model).update(dict.fromkeys(before, lambda: False))
        yield
    finally:
        vars(model).update(before)


def _single(layer: Any) -> str:
    """The name of the layer's adapter; a layer with several has no one state."""
    names = list(layer.r)
    assert len(names) == 1, f"several adapters are loaded ({names})"
    return str(names[0])


def trainable_parameters(components: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The adapters' parameters by their names in AdapterState, in the order of the modules."""
    found = {}
    for component, module in components.items():
        for path, layer in adapter_layers(module):
            adapter = _single(layer)
            found[f"{component}.{path}{FIRST}"] = layer.lora_A[adapter].weight
            found[f"{component}.{path}{SECOND}"] = layer.lora_B[adapter].weight
    return found


def _alphas(components: Mapping[str, nn.Module]) -> dict[str, float]:
    found = {}
    for component, module in components.items():
        for path, layer in adapter_layers(module):
            adapter = _single(layer)
            alpha, rank, scaling = layer.lora_alpha[adapter], layer.r[adapter], layer.scaling[adapter]
            # another program may have scaled otherwise (rsLoRA); what counts is what the forward pass multiplies by
            found[f"{component}.{path}"] = float(alpha if alpha / rank == scaling else scaling * rank)
    return found


def adapter_state(components: Mapping[str, nn.Module]) -> AdapterState:
    """What the adapters in `components` hold: detached fp32 copies on the CPU."""
    tensors = {
        name: parameter.detach().to("cpu", torch.float32, copy=True)
        for name, parameter in trainable_parameters(components).items()
    }
    return AdapterState("lora", tensors, _alphas(components))


def load_adapter_state(
    components: Mapping[str, nn.Module], state: AdapterState, *, weight: float = 1.0, name: str | None = None
) -> None:
    """Adds the adapter to `components`, its effect times `weight`: a layer gives W x + weight · alpha/rank · B A x.

    Adapters already there stay, and their effects add up; `name` is the new one's among them. Raises InputError when a
    tensor has no place, lacks its partner or alpha, has another shape than its layer asks for, or is not finite;
    nothing is changed then.
    """
    check_state(state, {name: adaptable_layers(module) for name, module in components.items()})
    for component, module in components.items():
        prefix = f"{component}."
        plan = {
            layer.removeprefix(prefix): LayerPlan(len(state.tensors[layer + FIRST]), state.alphas[layer] * weight)
            for layer in state.layers()
            if layer.startswith(prefix)
        }
        if not plan:
            continue
        adapter = inject_layers(module, plan, name=name)
        for path, layer in adapter_layers(module):
            if path in plan:
                parts = {FIRST: layer.lora_A[adapter].weight, SECOND: layer.lora_B[adapter].weight}
                _copy_into(parts, {part: state.tensors[f"{component}.{path}{part}"] for part in parts})


def copy_adapter_state(components: Mapping[str, nn.Module], state: AdapterState) -> None:
    """Copies `state`, bit for bit, into adapters that are already in `components` (to go on with a training).

    Raises InputError unless names, shapes and alphas are the very same; nothing is changed then.
    """
    parameters, alphas = trainable_parameters(components), _alphas(components)
    problems = _differences(parameters.keys(), state.tensors.keys())
    for name in parameters.keys() & state.tensors.keys():
        there, given = tuple(parameters[name].shape), tuple(state.tensors[name].shape)
        if there != given:
            problems.append(
                f"{name} has the shape {given} in the saved adapter, {there} is asked for: adapter.rank changed."
            )
    problems += [
        f"{name} has alpha {state.alphas.get(name)} in the saved adapter, {alpha} is asked for: adapter.alpha changed."
        for name, alpha in alphas.items()
        if f"{name}{FIRST}" in state.tensors and state.alphas.get(name) != alpha
    ]
    if problems:
        raise InputError(shortened(problems))
    _copy_into(parameters, state.tensors)


def _differences(wanted: Iterable[str], given: Iterable[str]) -> list[str]:
    wanted, given = set(wanted), set(given)
    return [f"{n} is missing from the saved adapter." for n in sorted(wanted - given)] + [
        f"{printable(n)} of the saved adapter has no place: adapter.targets changed." for n in sorted(given - wanted)
    ]


def shortened(problems: list[str], *, most: int = 30) -> list[str]:
    """`problems`, or the first of them and how many more there are."""
    return problems if len(problems) <= most else [*problems[:most], f"… and {len(problems) - most} more problems."]


def factor_shapes(layer: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B beside `layer`: (r, in) and (out, r), for a convolution (r, in, k, k), (out, r, 1, 1)."""
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    shape = tuple(layer.weight.shape)
    return (rank, *shape[1:]), (shape[0], rank, *(1 for _ in shape[2:]))


def check_state(state: AdapterState, layers: Mapping[str, Mapping[str, nn.Module]]) -> None:
    """Raises InputError unless `state` fits: `layers` are the adaptable layers of each component by path."""
    if state.kind != "lora":
        raise InputError(f"the adapter is of the kind {printable(state.kind)}, which this version cannot load.")
    problems = []
    for name in sorted(state.tensors):
        if not name.endswith((FIRST, SECOND)):
            problems.append(f"{printable(name)} is no LoRA weight.")
        elif not torch.isfinite(state.tensors[name]).all():
            problems.append(
                f"{printable(name)} holds values that are not finite: the file is damaged, or its training diverged."
            )
    for name in state.layers():
        component, _, path = name.partition(".")
        layer = layers.get(component, {}).get(path)
        if layer is None:
            problems.append(f"{printable(name)}: the model has no such layer: the adapter was made for another one.")
            continue
        first, second = state.tensors.get(name + FIRST), state.tensors.get(name + SECOND)
        if first is None or second is None:
            problems.append(f"{name} has only one of its two matrices: the file is damaged.")
            continue
        shapes = (tuple(first.shape), tuple(second.shape))
        wanted = factor_shapes(layer, first.shape[0] if first.ndim else 0)
        if shapes != wanted:
            problems.append(
                f"{name} has matrices of {shapes[0]} and {shapes[1]}, the model asks for {wanted[0]} and {wanted[1]}."
            )
        if name not in state.alphas:
            problems.append(f"{name} has no alpha.")
    problems += [
        f"{printable(n)} has an alpha but no matrices." for n in sorted(state.alphas.keys() - set(state.layers()))
    ]
    if not state.tensors:
        problems.append("the adapter holds no weights.")
    if problems:
        raise InputError(shortened(problems))


@contextlib.contextmanager
def adapters_disabled(components: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within it, `components` compute what they compute without adapters."""
    # not peft's enable_adapters: it also clears requires_grad, under a graph that still needs it
    layers = [layer for module in components.values() for _, layer in adapter_layers(module)]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value


@contextlib.contextmanager
def replaced(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it, `parameters` hold the values of `tensors` (of the same names); afterwards their very bits again.

    Values are copied, not storages swapped: a captured graph or a compiled kernel knows the weights by their address.
    """
    assert parameters.keys() == tensors.keys(), "every parameter has its replacement"
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        _copy_into(parameters, tensors)
        yield
    finally:
        _copy_into(parameters, before)


@torch.no_grad()
def _copy_into(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


def state_metadata(state: AdapterState) -> dict[str, str]:
    """What a safetensors file of `state.tensors` needs beside them (one entry, so that its bytes are always equal)."""
    return {METADATA_KEY: json.dumps({"kind": state.kind, "alphas": state.alphas}, sort_keys=True)}


def state_from(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> AdapterState:
    """The inverse of (`state.tensors`, `state_metadata(state)`); InputError where the metadata is not of that form."""
    try:
        described = json.loads(metadata[METADATA_KEY])
        alphas = {str(name): float(alpha) for name, alpha in described["alphas"].items()}
        return AdapterState(str(described["kind"]), {n: t.float() for n, t in tensors.items()}, alphas)
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        raise InputError(f"the file's metadata entry {METADATA_KEY} is missing or damaged.") from None


def load_with_peft(module: nn.Module, folder: Path) -> nn.Module:
    """`module` with the adapter of a peft folder, loaded by peft alone: what a program without lorakit would get."""
    from peft import PeftModel

    with warnings.catch_warnings():
        # peft asks transformers for something under its old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        loaded: nn.Module = PeftModel.from_pretrained(module, folder)
    return loaded.eval()
