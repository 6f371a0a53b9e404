"""lorakit/adapters/state.py: what goes in comes out, effects add up, and whatever does not fit is told."""

import dataclasses

import pytest
import torch
from torch import nn

from lorakit.adapters import (
    AdapterState,
    adapter_state,
    adapters_disabled,
    copy_adapter_state,
    load_adapter_state,
    lora,
    trainable_parameters,
)
from lorakit.adapters.state import adaptable_layers, replaced, state_from, state_metadata, with_alphas
from lorakit.core.errors import InputError
from tests.adapters.test_lora import TARGETS, X, net


def adapted(seed: int = 0, *, rank: int = 2, alpha: float = 3.0, targets: tuple[str, ...] = TARGETS) -> nn.Module:
    model = net()
    lora.inject(model, lora.Settings(rank=rank, alpha=alpha), targets=targets, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in trainable_parameters({"net": model}).values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def delta(model: nn.Module) -> torch.Tensor:
    return model.proj(torch.eye(6)) - net().proj(torch.eye(6))


def test_a_loaded_adapter_gives_the_same_bits() -> None:
    model = adapted()
    again = net()
    load_adapter_state({"net": again}, adapter_state({"net": model}))
    assert torch.equal(again(X), model(X))
    assert not torch.equal(again(X), net()(X))
    assert adaptable_layers(again).keys() == adaptable_layers(net()).keys()


def test_layers_may_differ_in_rank_and_alpha() -> None:
    state = adapter_state({"net": adapted(targets=("proj",))})
    other = adapter_state({"net": adapted(1, rank=4, alpha=1.0, targets=("conv", "to_out.0"))})
    both = AdapterState("lora", state.tensors | other.tensors, state.alphas | other.alphas)
    model = net()
    load_adapter_state({"net": model}, both)
    assert adapter_state({"net": model}).alphas == both.alphas
    torch.testing.assert_close(delta(model), delta(adapted(targets=("proj",))))


def test_weights_scale_and_several_adapters_add_up() -> None:
    states = [adapter_state({"net": adapted(seed)}) for seed in (0, 1)]
    partial = adapter_state({"net": adapted(2, targets=("conv",))})
    model = net()
    for state, weight in zip(states, (0.5, -2.0), strict=True):
        load_adapter_state({"net": model}, state, weight=weight)
    load_adapter_state({"net": model}, partial)  # on another layer: what is on this one must stay active
    torch.testing.assert_close(delta(model), 0.5 * delta(adapted(0)) - 2.0 * delta(adapted(1)), atol=1e-5, rtol=1e-5)


def test_switching_off_is_the_base_and_leaves_the_gradients_alone() -> None:
    model, base = adapted(), net().requires_grad_(False)
    loss = model(X).square().sum()
    with adapters_disabled({"net": model}):
        assert torch.equal(model(X), base(X))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainable_parameters({"net": model}).values())
    assert not torch.equal(model(X), base(X))


def test_the_state_is_a_copy_and_goes_through_a_file_form() -> None:
    model = adapted(alpha=0.1)
    state = adapter_state({"net": model})
    trainable_parameters({"net": model})["net.proj.lora_A.weight"].data.zero_()
    assert state.tensors["net.proj.lora_A.weight"].abs().sum() > 0
    back = state_from(state.tensors, state_metadata(state))
    assert back.alphas == state.alphas
    assert back.kind == "lora"
    assert len(state_metadata(state)) == 1, "more entries have no fixed order in a safetensors file"
    copy_adapter_state({"net": model}, back)
    for name, tensor in adapter_state({"net": model}).tensors.items():
        assert torch.equal(tensor, state.tensors[name])
    for damaged in ({}, {"lorakit.adapter": "{"}, {"lorakit.adapter": "[]"}):
        with pytest.raises(InputError):
            state_from(state.tensors, damaged)


def planted(name: str, state: AdapterState) -> AdapterState:
    key = "net.proj.lora_A.weight"
    tensors, alphas = dict(state.tensors), dict(state.alphas)
    if name == "unknown layer":
        tensors |= {"net.nope.lora_A.weight": torch.ones(2, 6), "net.nope.lora_B.weight": torch.ones(5, 2)}
        alphas["net.nope"] = 1.0
    elif name == "unknown component":
        tensors["x.proj.lora_A.weight"], alphas["x.proj"] = tensors[key], 1.0
    elif name == "half pair":
        del tensors[key]
    elif name == "no alpha":
        del alphas["net.proj"]
    elif name == "transposed":
        tensors[key] = tensors[key].T.contiguous()
    elif name == "not finite":
        tensors[key] = tensors[key] * float("nan")
    elif name == "foreign key":
        tensors["net.proj.dora_scale"] = torch.ones(5)
    elif name == "empty":
        tensors, alphas = {}, {}
    return dataclasses.replace(state, tensors=tensors, alphas=alphas)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("unknown layer", r"net\.nope: the model has no such layer"),
        ("unknown component", r"x\.proj: the model has no such layer"),
        ("half pair", r"net\.proj has only one of its two matrices"),
        ("no alpha", r"net\.proj has no alpha"),
        ("transposed", r"net\.proj has matrices of \(6, 2\)"),
        ("not finite", r"net\.proj\.lora_A\.weight holds values that are not finite"),
        ("foreign key", r"net\.proj\.dora_scale is no LoRA weight"),
        ("empty", "holds no weights"),
    ],
)
def test_what_does_not_fit_is_told_and_nothing_changes(fault: str, said: str) -> None:
    state = planted(fault, adapter_state({"net": adapted()}))
    model = net()
    with pytest.raises(InputError, match=said):
        load_adapter_state({"net": model}, state)
    assert not trainable_parameters({"net": model})


def test_going_on_asks_for_the_very_same_layers_ranks_and_alphas() -> None:
    state = adapter_state({"net": adapted()})
    with pytest.raises(InputError, match=r"adapter\.rank changed"):
        copy_adapter_state({"net": adapted(rank=3)}, state)
    with pytest.raises(InputError, match=r"adapter\.alpha changed"):
        copy_adapter_state({"net": adapted(alpha=2.0)}, state)
    with pytest.raises(InputError, match=r"net\.conv\.lora_A\.weight of the saved adapter has no place"):
        copy_adapter_state({"net": adapted(targets=("proj", "to_out.0"))}, state)
    partial = adapter_state({"net": adapted(targets=("proj",))})
    with pytest.raises(InputError, match="is missing from the saved adapter"):
        copy_adapter_state({"net": adapted()}, partial)


def test_replaced_weights_come_back_to_the_bit_whatever_happens_within() -> None:
    model, other = adapted(), adapted(1)
    parameters = trainable_parameters({"net": model})
    places = [parameter.data_ptr() for parameter in parameters.values()]
    parameters[next(iter(parameters))].data[0, 0] = -0.0  # a bit that == does not see
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    expected, average = model(X), {n: p.detach().clone() for n, p in trainable_parameters({"net": other}).items()}
    with pytest.raises(KeyError):
        with replaced(parameters, average):
            assert torch.equal(model(X), other(X))
            next(iter(parameters.values())).data.add_(1)  # what is drawn with must not leak into either
            raise KeyError("a picture that cannot be drawn")
    assert all(torch.equal(p.view(torch.int32), before[n].view(torch.int32)) for n, p in parameters.items())
    assert torch.equal(model(X), expected)
    assert [p.data_ptr() for p in parameters.values()] == places
    assert all(torch.equal(average[n], p) for n, p in trainable_parameters({"net": other}).items())
    with pytest.raises(AssertionError, match="replacement"), replaced(parameters, {}):
        pass


def test_another_alpha_is_the_same_adapter() -> None:
    model = net()
    lora.inject(model, lora.Settings(rank=2, alpha=3.0), targets=TARGETS, seed=0)
    for parameter in trainable_parameters({"net": model}).values():
        parameter.data.normal_()
    state = adapter_state({"net": model})
    alphas = {"net.conv": 0.5, "net.to_out.0": 3.0, "net.proj": -2.0}
    again, other = net(), with_alphas(state, alphas)
    assert (
        other.alphas == alphas
        and other.tensors["net.to_out.0.lora_B.weight"] is state.tensors["net.to_out.0.lora_B.weight"]
    )
    load_adapter_state({"net": again}, other)
    torch.testing.assert_close(again(X), model(X))
