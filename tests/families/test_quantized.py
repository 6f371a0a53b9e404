"""Frozen layers in few bits: near the full ones by their kind, exact in what they say they hold, trainable beside."""

import pytest
import torch
from torch import Tensor, nn

from lorakit import families
from lorakit.adapters import ADAPTERS, trainable_parameters
from lorakit.families import FAMILIES, sd
from lorakit.families.quantized import QuantizedLinear, quantize

KINDS = {"nf4": 0.12, "int8": 0.01, "fp8": 0.04}  # and how far weights may be from the full ones, relative
BITS = {"nf4": 4.5, "int8": 8.6, "fp8": 8.6}  # a number takes, with its share of the scales


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Linear(4, 96)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 96)) for _ in range(2))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 8
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest) -> tuple[Blocks, Blocks]:
    """Full and quantised."""
    small = Blocks()
    quantize(small, request.param)
    return Blocks(), small


def layers(module: nn.Module) -> list[QuantizedLinear]:
    return [layer for layer in module.modules() if isinstance(layer, QuantizedLinear)]


def test_weights_of_blocks_are_small_and_near(pair: tuple[Blocks, Blocks]) -> None:
    full, small = pair
    assert type(small.first) is nn.Linear and torch.equal(small.first.weight, full.first.weight)
    assert len(layers(small)) == 4
    for name, layer in small.named_modules():
        if isinstance(layer, QuantizedLinear):
            wanted = full.get_submodule(name).weight
            assert layer.weight.shape == wanted.shape
            assert (layer.weight - wanted).norm() < KINDS[layer.kind] * wanted.norm()
            held = sum(tensor.numel() * tensor.element_size() for tensor in (layer.packed, layer.scales))
            assert held * 8 <= BITS[layer.kind] * wanted.numel()


def test_the_product_and_its_gradient_are_those_of_the_unpacked_weights(pair: tuple[Blocks, Blocks]) -> None:
    _, small = pair
    plain = Blocks()
    for name, layer in small.named_modules():
        if isinstance(layer, QuantizedLinear):
            plain.get_submodule(name).weight.data = layer.weight
    results = []
    for module in (small, plain):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = module(x)
        out.square().sum().backward()
        results.append((out.detach(), x.grad))
    for own, wanted in zip(*results, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-5)


def test_scales_stay_whole_where_the_layer_changes_its_precision(pair: tuple[Blocks, Blocks]) -> None:
    _, small = pair
    before = [(layer.packed.clone(), layer.scales.clone()) for layer in layers(small)]
    small.to(torch.bfloat16)
    for layer, (packed, scales) in zip(layers(small), before, strict=True):
        assert torch.equal(layer.packed, packed) and torch.equal(layer.scales, scales)
        assert layer.weight.dtype == torch.bfloat16
    out = small(torch.ones(2, 4, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


def test_under_autocast_it_multiplies_like_any_linear_layer(pair: tuple[Blocks, Blocks]) -> None:
    _, small = pair
    x = torch.ones(2, 96, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = small.blocks[0][0](x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_what_is_kept_for_the_backward_pass_is_no_weight(pair: tuple[Blocks, Blocks]) -> None:
    _, small = pair
    kept: list[Tensor] = []
    x = torch.ones(2, 96, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        small.blocks[0][0](x)
    own = {parameter.data_ptr() for parameter in small.parameters()}
    assert kept and all(tensor.data_ptr() in own for tensor in kept), "but for the packed ones, which are there anyway"


@pytest.mark.parametrize("name", FAMILIES.names())
def test_every_family_trains_an_adapter_beside_small_weights(name: str) -> None:
    module = FAMILIES.module(name)
    family = module.load(module.Settings(path=str(module.tiny().path), quantize="int8"))
    backbone = family.components[family.backbone]
    assert layers(backbone) and not layers(family.components["vae"])
    encoders = [part for key, part in family.components.items() if key.startswith("text_encoder")]
    assert encoders and all(layers(encoder) for encoder in encoders)
    ADAPTERS.module("lora").inject(
        backbone, ADAPTERS.module("lora").Settings(rank=2), targets=family.default_targets[family.backbone], seed=0
    )
    side = 8 * family.side_multiple
    x_t = torch.randn(2, *family.latent_shape(side, side), generator=torch.Generator().manual_seed(0))
    text = {key: tensor.detach() for key, tensor in family.encode_text(["a", "b"]).items()}
    family.predict(x_t, family.process.at(torch.tensor([0.3, 0.6])), text).square().mean().backward()
    trained = [p for key, p in trainable_parameters({"backbone": backbone}).items() if "lora_B" in key]
    assert trained and any(parameter.grad is not None and parameter.grad.any() for parameter in trained)


def test_what_is_exported_from_small_weights_changes_the_full_ones() -> None:
    """The stock pipeline and what captions are cached under."""
    path = str(sd.tiny().path)
    small, full = families.load("sd", path, quantize="nf4"), families.load("sd", path)
    assert not layers(small.stock_pipeline().unet)
    assert small.fingerprint("text_encoder") != full.fingerprint("text_encoder")
    assert small.fingerprint("vae") == full.fingerprint("vae")
