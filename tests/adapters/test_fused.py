"""The fused path computes what peft computes, forward and backward, and leaves alone what it does not know."""

import copy
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit.adapters.fused import fuse
from lorakit.adapters.state import (
    LayerPlan,
    adapter_layers,
    adapter_state,
    adapters_disabled,
    copy_adapter_state,
    inject_layers,
    replaced,
    trainable_parameters,
)
from lorakit.families.quantized import QuantizedLinear

IN, OUT, RANK = 6, 10, 3
ROWS = {"few rows": 4, "more than inputs": 8, "more than outputs": 24}
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "1×1": {"kernel_size": 1},
    "3×3": {"kernel_size": 3, "padding": 1},
    "every other": {"kernel_size": 3, "padding": 1, "stride": 2},
    "uneven": {"kernel_size": (3, 5), "padding": (0, 2), "stride": (2, 1), "bias": False},
}
SIDES = {"few pixels": 4, "many more than outputs": 10}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


class Packed(nn.Linear):
    """A base that keeps its weights otherwise and makes them when it is asked, as quantised ones do."""

    def __init__(self) -> None:
        super().__init__(IN, OUT, dtype=torch.float64)
        self.register_buffer("packed", self._parameters.pop("weight").detach())

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.held()(torch.float64)

    def held(self) -> Callable[[torch.dtype], Tensor]:
        return partial(self.unpacked, self.packed)

    @staticmethod
    def unpacked(packed: Tensor, dtype: torch.dtype) -> Tensor:
        return packed.to(dtype) * 1.0

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def pair(base: nn.Module | None = None, *, dropout: float = 0.0) -> tuple[nn.Module, nn.Module]:
    """The same layer with an adapter that does something, as peft's and fused."""
    torch.manual_seed(0)
    model = nn.Sequential(base or nn.Linear(IN, OUT, dtype=torch.float64))
    inject_layers(model, {"0": LayerPlan(rank=RANK, alpha=2.0)}, dropout=dropout)
    [(_, layer)] = adapter_layers(model)
    for part in (layer.lora_A, layer.lora_B):
        part["default"].to(torch.float64).weight.data.normal_()
    fused = copy.deepcopy(model)
    fuse(fused)
    return model.train(), fused.train()


def learning(model: nn.Module) -> list[Tensor]:
    return list(trainable_parameters({"m": model}).values())


def learned(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output and the gradients of x, A and B."""
    x = x.clone().requires_grad_()
    y = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    return [y, *torch.autograd.grad((y * weights).sum(), [x, *trained])]


@pytest.mark.parametrize("base", [None, Packed])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_it_is_what_peft_computes(rows: int, base: type[nn.Module] | None) -> None:
    plain, fused = pair(base and base())
    x = torch.randn(2, rows // 2, IN, dtype=torch.float64)
    for one, other in zip(learned(fused, x), learned(plain, x), strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_its_gradients_are_those_of_its_output(rows: int) -> None:
    _, fused = pair()
    [(_, layer)] = adapter_layers(fused)
    x = torch.randn(rows, IN, dtype=torch.float64, requires_grad=True)
    weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    assert torch.autograd.gradcheck(lambda x, *_: fused(x), (x, *weights))


def convolution(kind: dict[str, Any], layout: torch.memory_format) -> nn.Module:
    made = nn.Conv2d(IN, OUT, **kind, dtype=torch.float64)
    return made.to(memory_format=layout)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("side", SIDES.values(), ids=SIDES)
@pytest.mark.parametrize("kind", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_convolution_is_what_peft_computes(kind: dict[str, Any], side: int, layout: torch.memory_format) -> None:
    plain, fused = pair(convolution(kind, layout))
    x = torch.randn(3, IN, side, side, dtype=torch.float64).contiguous(memory_format=layout)
    assert "LowRankConvolution" in str(fused(x).grad_fn)
    for one, other in zip(learned(fused, x), learned(plain, x), strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert all(model(x).is_contiguous(memory_format=layout) for model in (plain, fused))


@pytest.mark.parametrize("side", SIDES.values(), ids=SIDES)
@pytest.mark.parametrize("kind", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_convolutions_gradients_are_those_of_its_output(kind: dict[str, Any], side: int) -> None:
    _, fused = pair(convolution(kind, torch.contiguous_format))
    x = torch.randn(1, IN, side, side, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: fused(x), (x, *learning(fused)), fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_convolution_in_bf16_keeps_its_input_once(layout: torch.memory_format) -> None:
    plain, fused = (model.float() for model in pair(convolution(CONVOLUTIONS["3×3"], layout)))
    for model in (plain, fused):
        model[0].base_layer.bfloat16()  # type: ignore[union-attr]
    x = torch.randn(2, IN, 4, 4, dtype=torch.bfloat16).contiguous(memory_format=layout)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = learned(plain, x), learned(fused, x)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            fused(x)
    assert sum(kept.values()) == x.nbytes + x.nbytes * RANK // IN, "and what A makes of it"
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).abs().max() < 0.02 * other.abs().max()


def test_under_autocast_it_computes_in_bf16_and_gives_gradients_in_fp32() -> None:
    plain, fused = (model.float() for model in pair(nn.Linear(IN, OUT)))
    for model in (plain, fused):
        [(_, layer)] = adapter_layers(model)
        layer.base_layer.bfloat16()
    x = torch.randn(24, IN)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = learned(fused, x), learned(plain, x)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)


class Casts(TorchDispatchMode):
    """Counts what changes numbers' precision."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten._foreach_copy_, torch.ops.aten.copy_):
            self.counted[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def in_bf16(layers: int = 2) -> nn.Module:
    """Layers in a row, of which each has an adapter, to be computed under autocast."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(IN, IN) for _ in range(layers))).bfloat16()
    inject_layers(model, {str(i): LayerPlan(rank=RANK, alpha=2.0) for i in range(layers)})
    for weight in learning(model):
        nn.init.normal_(weight)
    fuse(model)
    return model.train()


def said(model: nn.Module) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y: Tensor = model(torch.ones(4, IN, dtype=torch.bfloat16))
    return y


def test_weights_are_rounded_together_and_once_for_each_change() -> None:
    model = in_bf16()
    weights = learning(model)
    for change in (1, 2):
        with Casts() as casts:
            said(model), said(model)
        assert casts.counted == {"_foreach_copy_": 1}, change
        with Casts() as casts:
            said(model).sum().backward()
        assert casts.counted == {"_to_copy": len(weights)}, "each gradient, to fp32"
        with torch.no_grad():
            weights[-1].mul_(2)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a copy": lambda model: copy_adapter_state({"m": model}, adapter_state({"m": in_bf16()})),
    "all at once": lambda model: torch._foreach_mul_([p.detach() for p in learning(model)], 3),
    "another place": lambda model: [setattr(p, "data", 3 * p) for p in learning(model)],
    "another precision": lambda model: [
        setattr(p, "data", 3 * p.half()) for p in model.parameters() if p.requires_grad
    ],
    "other weights": lambda model: setattr(model[0].lora_B["default"], "weight", nn.Parameter(torch.zeros(IN, RANK))),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_rounded_is_never_stale(change: Callable[[nn.Module], object]) -> None:
    model = in_bf16()
    for weight in learning(model):
        nn.init.ones_(weight)
    before = said(model)
    change(model)
    fresh = copy.deepcopy(model)
    fuse(fresh)
    assert torch.equal(said(model), said(fresh)) and not torch.equal(said(model), before)


def test_weights_that_are_put_in_place_for_a_while_count_for_a_while() -> None:
    model = in_bf16()
    parameters = trainable_parameters({"m": model})
    before = said(model)
    with replaced(parameters, {name: torch.zeros_like(p) for name, p in parameters.items()}):
        with adapters_disabled({"m": model}):
            bare = said(model)
        assert torch.equal(said(model), bare)
    assert torch.equal(said(model), before) and not torch.equal(before, bare)


def test_nothing_is_computed_for_an_input_that_learns_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    base = Packed()
    _, fused = pair(base)
    y = fused(torch.randn(4, IN, dtype=torch.float64))
    monkeypatch.setattr(Packed, "unpacked", lambda *_: pytest.fail("weights were unpacked"))
    y.sum().backward()


def test_no_gradient_of_pictures_is_computed_that_nobody_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fused = pair(convolution(CONVOLUTIONS["3×3"], torch.contiguous_format))
    backward, asked = torch.ops.aten.convolution_backward, []
    monkeypatch.setattr(
        torch.ops.aten, "convolution_backward", lambda *args: (asked.append(args[-1]), backward(*args))[1]
    )
    fused(torch.randn(2, IN, 4, 4, dtype=torch.float64)).sum().backward()
    assert asked == [(False, True, False)]


@pytest.mark.parametrize("base", [nn.Linear, Packed, "quantised", "convolution"])
def test_it_goes_back_with_the_weights_that_it_came_with(base: Any) -> None:
    """A block that waits in the CPU's memory has gone there before its backward pass."""
    made: nn.Module = Packed() if base is Packed else nn.Linear(IN, OUT, dtype=torch.float64).requires_grad_(False)
    x = torch.randn(4, IN, dtype=torch.float64)
    if base == "convolution":
        made, x = convolution(CONVOLUTIONS["3×3"], torch.contiguous_format).requires_grad_(False), x.view(1, IN, 2, 2)
    _, fused = pair(QuantizedLinear(made, "int8") if base == "quantised" else made)
    wanted = learned(fused, x)

    def gone(model: nn.Module, *_: Any) -> None:
        for held in (model[0].base_layer._parameters, model[0].base_layer._buffers):
            held.update(dict.fromkeys(held))

    fused.register_forward_hook(gone)
    assert all(map(torch.equal, learned(fused, x), wanted))


def test_a_base_without_its_adapter_is_the_base() -> None:
    _, fused = pair()
    x = torch.randn(4, IN, dtype=torch.float64)
    with adapters_disabled({"": fused}):
        assert torch.equal(fused(x), fused[0].base_layer(x))


def test_a_second_adapter_counts() -> None:
    plain, fused = pair()
    x = torch.randn(4, IN, dtype=torch.float64)
    for model in (plain, fused):
        inject_layers(model, {"0": LayerPlan(rank=1, alpha=1.0)})
        [(_, layer)] = adapter_layers(model)
        layer.lora_A["default_1"].double().weight.data.fill_(1)
        layer.lora_B["default_1"].double().weight.data.fill_(1)
    assert torch.equal(fused(x), plain(x))
    assert fuse(plain) == {"several adapters": 1}


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
def test_what_is_left_to_peft_is_told() -> None:
    plain, _ = pair(dropout=0.5)
    assert fuse(plain) == {"dropout": 1}
    for kind, reason in {
        "groups": (2, "a grouped or dilated convolution"),
        "dilation": (2, "a grouped or dilated convolution"),
        "padding_mode": ("circular", "a convolution that pads otherwise"),
        "padding": ("same", "a convolution that pads otherwise"),
    }.items():
        model = nn.Sequential(nn.Conv2d(4, 4, 3, **{kind: reason[0]}))  # type: ignore[arg-type]
        inject_layers(model, {"0": LayerPlan(rank=2, alpha=1.0)})
        assert fuse(model) == {reason[1]: 1}


def test_a_single_picture_without_a_batch_is_convolved_too() -> None:
    plain, fused = pair(convolution(CONVOLUTIONS["3×3"], torch.contiguous_format))
    x = torch.randn(IN, 4, 4, dtype=torch.float64)
    assert torch.equal(fused(x), plain(x))
