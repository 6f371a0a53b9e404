"""The fused path computes what peft computes, forward and backward, and leaves alone what it does not know."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lorakit.adapters.fused import fuse
from lorakit.adapters.state import LayerPlan, adapter_layers, adapters_disabled, inject_layers

IN, OUT, RANK = 6, 10, 3
ROWS = {"few rows": 4, "more than inputs": 8, "more than outputs": 24}


class Packed(nn.Linear):
    """A base that keeps its weights otherwise and makes them when it is asked, as quantised ones do."""

    def __init__(self) -> None:
        super().__init__(IN, OUT, dtype=torch.float64)
        self.register_buffer("packed", self._parameters.pop("weight").detach())

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.packed * 1.0

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


def test_nothing_is_computed_for_an_input_that_learns_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    base = Packed()
    _, fused = pair(base)
    y = fused(torch.randn(4, IN, dtype=torch.float64))
    monkeypatch.setattr(Packed, "weight", property(lambda self: pytest.fail("the base was asked")))
    y.sum().backward()


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


def test_what_is_left_to_peft_is_told() -> None:
    plain, _ = pair(dropout=0.5)
    assert fuse(plain) == {"dropout": 1}
    convolution = nn.Sequential(nn.Conv2d(4, 4, 1))
    inject_layers(convolution, {"0": LayerPlan(rank=1, alpha=1.0)})
    assert fuse(convolution) == {"a convolution": 1}
