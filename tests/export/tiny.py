"""What the tests of lorakit/export/ share: a tiny family, an adapter that changes something, and who predicts what."""

import functools

import torch
from torch import Tensor

from lorakit.adapters import AdapterState, adapter_state, load_adapter_state, lora, trainable_parameters
from lorakit.export.probe import Calls, record_calls, stock_components
from lorakit.families import FAMILIES
from lorakit.families.protocol import Family
from lorakit.families.sd import tiny

CONVS = ("conv1", "conv_in", "downsamplers.0.conv")


def family() -> Family:
    return tiny()


@functools.cache
def made(
    *,
    of: str = "sd",
    rank: int = 4,
    alpha: float = 4.0,
    rslora: bool = False,
    size: float = 0.05,
    targets: tuple[str, ...] = (),
    text: bool = True,
) -> AdapterState:
    """An adapter on a tiny family with a random B; the text encoders' has half the rank and another alpha."""
    model = FAMILIES.module(of).tiny()
    components = stock_components(model.stock_pipeline(), model)
    settings = lora.Settings(rank=rank, alpha=alpha, rslora=rslora)
    lora.inject(components["unet"], settings, targets=targets or (*model.default_targets["unet"], *CONVS), seed=0)
    if text:
        part = lora.PartSettings(rank=max(1, rank // 2), alpha=1.5 * alpha, rslora=rslora)
        for name in model.text_encoders:
            lora.inject(components[name], part, targets=model.default_targets[name], seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trainable_parameters(components).items():
        if name.endswith("lora_B.weight"):
            parameter.data.copy_(size * torch.randn(parameter.shape, generator=generator))
    return adapter_state(components)


@functools.cache
def calls() -> Calls:
    return record_calls(tiny())


@functools.cache
def base() -> dict[str, list[Tensor]]:
    """What the tiny family says without an adapter."""
    return predictions()


def predictions(*states: tuple[AdapterState, float]) -> dict[str, list[Tensor]]:
    """What the tiny family says with the states, each at its weight, injected by lorakit."""
    components = stock_components(tiny().stock_pipeline(), tiny())
    for state, weight in states:
        load_adapter_state(components, state, weight=weight)
    return calls().answer(components)


def equal(one: dict[str, list[Tensor]], other: dict[str, list[Tensor]]) -> bool:
    return all(torch.equal(a, b) for name in one for a, b in zip(one[name], other[name], strict=True))


def same_state(one: AdapterState, other: AdapterState) -> bool:
    return (
        one.alphas == other.alphas
        and one.tensors.keys() == other.tensors.keys()
        and all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
    )
