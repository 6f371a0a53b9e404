"""Products in 8 bits: what the equations say, exact in whole numbers, near the full ones, and beside an adapter."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lorakit import families
from lorakit.adapters import ADAPTERS
from lorakit.adapters.fused import fuse
from lorakit.adapters.state import LayerPlan, adapter_layers, inject_layers
from lorakit.core.errors import InputError
from lorakit.families import FAMILIES, eightbit, sd
from lorakit.families.eightbit import EightBitLinear, Kind, compute_in
from lorakit.families.quantized import QuantizedLinear

NEAR: dict[Kind, float] = {"int8": 0.03, "fp8": 0.05}  # how far a product may be from the full one, relative
# what rounding changes at most: so much of each number, and so much of its row's largest
ROUNDING: dict[Kind, tuple[float, float]] = {"int8": (0, 0.5 / 127), "fp8": (2**-4, 2**-10 / 448)}
IN, OUT, RANK = 48, 64, 3


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def linear(inputs: int = IN, outputs: int = OUT) -> nn.Linear:
    layer = nn.Linear(inputs, outputs).requires_grad_(False)
    layer.weight.data, layer.bias.data = drawn(outputs, inputs, seed=1), drawn(outputs, seed=2)
    layer.weight.data[3] *= 50  # channels differ
    return layer


@pytest.fixture(params=NEAR)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param  # type: ignore[no-any-return]


def both_ways(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of x for one that is given."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(drawn(*y.shape, seed=3).to(y.dtype))
    assert x.grad is not None
    return y.detach(), x.grad


def rounded(rows: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """Rows in 8 bits and their scales, in double precision and by the book."""
    largest = {"int8": 127.0, "fp8": 448.0}[kind]
    scales = (rows.float().abs().amax(1, keepdim=True) / largest).double()
    scaled = (rows.float() / scales.float()).double()
    return (scaled.round() if kind == "int8" else scaled.to(torch.float8_e4m3fn).double()), scales


def test_both_products_are_what_the_equations_say(kind: Kind) -> None:
    full = linear()
    layer = EightBitLinear(full, kind)
    y, of_x = both_ways(layer, drawn(20, IN))
    assert isinstance(layer.scales, Tensor) and layer.scales.shape == (OUT, 1)
    q, s_w = rounded(full.weight, kind)
    a, s_x = rounded(drawn(20, IN), kind)
    wanted = (a @ q.t()) * s_x * s_w.t() + full.bias.double()
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    g, s_g = rounded(drawn(20, OUT, seed=3) * s_w.t().float(), kind)
    torch.testing.assert_close(of_x.double(), (g @ q) * s_g, rtol=1e-5, atol=1e-5)


def test_they_are_near_the_full_ones(kind: Kind) -> None:
    """Each within what rounding both factors can make of it at most."""
    full = linear()
    x, g = drawn(20, IN).double(), drawn(20, OUT, seed=3).double()
    w = full.weight.double()

    def error(rows: Tensor) -> Tensor:
        of_each, of_largest = ROUNDING[kind]
        return rows.abs() * of_each + rows.abs().amax(1, keepdim=True) * of_largest

    y, of_x = (tensor.double() for tensor in both_ways(EightBitLinear(full, kind), x.float()))
    of_w, slack = error(w), 1 + 1e-4
    bound = error(x) @ w.t().abs() + x.abs() @ of_w.t() + error(x) @ of_w.t()
    assert ((y - (x @ w.t() + full.bias)).abs() <= slack * bound + 1e-6).all()
    scales = w.abs().amax(1) / 127  # those of fp8 differ by a factor, which bounds do not feel
    of_g = error(g * scales) / scales
    bound = of_g @ w.abs() + g.abs() @ of_w + of_g @ of_w
    assert ((of_x - g @ w).abs() <= slack * bound + 1e-6).all()
    assert (y - both_ways(full, x.float())[0]).norm() < NEAR[kind] * y.norm()
    assert (of_x - g @ w).norm() < NEAR[kind] * of_x.norm()


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_whole_numbers_are_multiplied_exactly(rows: int) -> None:
    numbers = torch.Generator().manual_seed(0)
    q = torch.randint(-127, 128, (OUT, 4096), generator=numbers, dtype=torch.int8)
    a = torch.randint(-127, 128, (rows, 4096), generator=numbers, dtype=torch.int8)
    one, ones = torch.ones(rows, 1), torch.ones(OUT, 1)
    y = eightbit._scaled_product(a, one, q.t(), ones, None, None, None, 1.0, torch.float32)
    assert torch.equal(y, (a.long() @ q.long().t()).float())


def test_in_bf16_under_autocast_as_any_linear_layer(kind: Kind) -> None:
    layer = EightBitLinear(linear(), kind)
    with torch.autocast("cpu", torch.bfloat16):
        y, of_x = both_ways(layer, drawn(2, 3, IN))
    assert y.dtype == torch.bfloat16 and y.shape == (2, 3, OUT) and of_x.dtype == torch.float32
    wanted, _ = both_ways(layer, drawn(2, 3, IN).bfloat16().float())
    torch.testing.assert_close(y.float(), wanted, rtol=2**-8, atol=1e-6)


def test_what_is_not_finite_stays_so_and_zeros_stay_zeros(kind: Kind) -> None:
    layer = EightBitLinear(linear(), kind)
    x = drawn(4, IN)
    x[0, 5], x[1, 6], x[2] = float("inf"), float("nan"), 0
    y = layer(x)
    assert not y[:2].isfinite().any() and torch.equal(y[2], layer.bias) and y[3].isfinite().all()


def adapted(kind: Kind, *, fused: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(EightBitLinear(linear(), kind))
    inject_layers(model, {"0": LayerPlan(rank=RANK, alpha=2.0)})
    [(_, layer)] = adapter_layers(model)
    for part in (layer.lora_A, layer.lora_B):
        part["default"].weight.data.normal_()
    if fused:
        assert fuse(model) == {}
    return model.train()


@pytest.mark.parametrize("rows", [4, 200])  # more than there are inputs: where full weights would be folded
def test_a_fused_adapter_is_what_peft_makes_of_the_same_products(kind: Kind, rows: int) -> None:
    results = []
    for model in (adapted(kind, fused=False), adapted(kind, fused=True)):
        y, of_x = both_ways(model, drawn(rows, IN))
        results.append([y, of_x, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(results[0]) == 4
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_a_fused_adapter_never_asks_for_unpacked_weights(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(kind, fused=True)
    monkeypatch.setattr(QuantizedLinear, "unpacked", lambda *_: pytest.fail("weights were unpacked"))
    both_ways(model, drawn(200, IN))


def test_compiled_it_takes_rows_that_lie_elsewise(kind: Kind) -> None:
    layer, x = EightBitLinear(linear(), kind), drawn(IN, 20).view(1, IN, 20).transpose(1, 2)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="inductor")(x), layer(x.contiguous()))
    numbers = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[kind]
    with_rows = (torch.randn(IN, 20).t(), None, numbers)
    torch.library.opcheck(eightbit._QUANTIZED, with_rows, test_utils="test_faketensor")


def test_compiled_it_computes_the_same_bits_and_adds_the_adapter_itself(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    added: list[bool] = []
    times = eightbit.Products.times
    monkeypatch.setattr(
        eightbit.Products, "times", lambda *a, low=None: added.append(low is None) or times(*a, low=low)
    )
    for plain in (EightBitLinear(linear(), kind), adapted(kind, fused=True)):
        traced = torch.compile(copy.deepcopy(plain), backend="aot_eager", fullgraph=True)
        results = []
        for model in (plain, traced):
            with torch.autocast("cpu", torch.bfloat16):
                results.append([*both_ways(model, drawn(20, IN)), *(p.grad for p in model.parameters())])
        for one, other in zip(*results, strict=True):
            assert one is other is None or torch.equal(one, other)


def test_layers_of_other_sizes_stay_and_are_counted(kind: Kind, caplog: pytest.LogCaptureFixture) -> None:
    blocks = nn.ModuleList([nn.Sequential(linear(), linear(24, 64), linear(64, 24)), nn.Conv2d(4, 4, 1)])
    model = nn.ModuleDict({"first": linear(), "blocks": blocks})
    with caplog.at_level("INFO"):
        compute_in(model, kind)
    assert f"1 layers multiply in {kind}, and 2 of other sizes stay" in caplog.text
    assert type(model["first"]) is type(blocks[0][1]) is nn.Linear and isinstance(blocks[0][0], EightBitLinear)
    with pytest.raises(InputError, match=r"model\.compute.*no linear layers"):
        compute_in(nn.Sequential(nn.ModuleList([linear(24, 64)])), kind)


@pytest.mark.parametrize("name", FAMILIES.names())
def test_every_family_s_backbone_multiplies_so(name: str) -> None:
    module = FAMILIES.module(name)
    family = module.load(module.Settings(path=str(module.tiny().path), compute="int8"))
    parts = {part for part, at in family.components.items() if any(map(_is_eight, at.modules()))}
    assert parts == {family.backbone}
    lora = ADAPTERS.module("lora")
    backbone = family.components[family.backbone]
    lora.inject(backbone, lora.Settings(rank=2), targets=family.default_targets[family.backbone], seed=0)
    fuse(backbone)
    side = 8 * family.side_multiple
    x_t = drawn(2, *family.latent_shape(side, side))
    text = {key: tensor.detach() for key, tensor in family.encode_text(["a", "b"]).items()}
    family.predict(x_t, family.process.at(torch.tensor([0.3, 0.6])), text).square().mean().backward()
    gradients = [p.grad for key, p in backbone.named_parameters() if "lora_B" in key]
    assert any(gradient is not None and gradient.any() for gradient in gradients)


def _is_eight(layer: nn.Module) -> bool:
    return isinstance(layer, EightBitLinear)


def test_it_goes_with_small_weights_of_its_own_kind_alone() -> None:
    path = str(sd.tiny().path)
    family = families.load("sd", path, compute="int8", quantize="int8")
    kinds = {type(layer) for layer in family.unet.modules() if isinstance(layer, nn.Linear)}
    assert kinds == {nn.Linear, EightBitLinear, QuantizedLinear}, "what does not fit is small all the same"
    assert any(type(layer) is QuantizedLinear for layer in family.text_encoder.modules())
    assert not any(isinstance(layer, QuantizedLinear) for layer in family.stock_pipeline().unet.modules())
    with pytest.raises(InputError, match=r'compute = "int8".*quantize = "nf4".*both the same'):
        families.load("sd", path, compute="int8", quantize="nf4")


def test_fp8_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.2")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    assert not eightbit.problems("int8") and "AMD" in eightbit.problems("fp8")[0]


@pytest.mark.parametrize(("capability", "refused"), [((7, 5), ["int8", "fp8"]), ((8, 6), ["fp8"]), ((9, 0), [])])
def test_a_gpu_that_cannot_is_told(
    capability: tuple[int, int], refused: list[Kind], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    assert [one for one in NEAR if eightbit.problems(one)] == refused
    path = str(sd.tiny().path)
    for one in refused:
        with pytest.raises(InputError, match=rf'model\.compute = "{one}" needs a GPU of .* a card has'):
            families.describe("sd", path, compute=one)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert all("triton" in problem for one in NEAR for problem in eightbit.problems(one) if one not in refused)
