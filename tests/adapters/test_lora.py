"""lorakit/adapters/lora.py: a fresh adapter is the identity, comes from its seed alone, and alone learns."""

import pytest
import torch
from torch import nn

from lorakit.adapters import ADAPTERS, adapter_state, load_adapter_state, lora, trainable_parameters
from lorakit.adapters.state import adaptable_layers
from lorakit.core.errors import InputError
from lorakit.core.settings import validate


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, 6)
        self.to_out = nn.ModuleList([nn.Linear(6, 6)])
        self.proj = nn.Linear(6, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.to_out[0](self.norm(self.conv(x)).flatten(2).transpose(1, 2)))


TARGETS = ("conv", "to_out.0", "proj")
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net() -> Net:
    torch.manual_seed(1)
    return Net().eval()


def test_the_kind_is_found_and_its_settings_are_checked() -> None:
    assert ADAPTERS.names() == ["lora"]
    with pytest.raises(InputError) as error:
        validate(lora.Settings, {"rnak": 4, "dropout": 1.0}, where="adapter", name="lora")
    assert "adapter.rnak is not a setting of lora. Did you mean rank?" in error.value.problems
    assert any("adapter.dropout" in problem for problem in error.value.problems)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_is_exactly_the_identity_and_fp32(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    # frozen, as it is beside an adapter: torch may compute a layer that learns by another kernel
    before = net().to(dtype).requires_grad_(False)(X.to(dtype))
    lora.inject(model, lora.Settings(rank=2), targets=TARGETS, seed=0)
    assert torch.equal(model(X.to(dtype)), before)
    parameters = trainable_parameters({"net": model})
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in parameters.values()}
    assert len(trainable) == 6
    assert parameters["net.conv.lora_A.weight"].shape == (2, 3, 3, 3)
    assert parameters["net.conv.lora_B.weight"].shape == (6, 2, 1, 1)


def test_weights_come_from_the_seed_and_the_layer_only() -> None:
    def first(seed: int, targets: tuple[str, ...], stirred: int) -> dict[str, torch.Tensor]:
        model = net()
        torch.manual_seed(stirred)
        state = torch.get_rng_state()
        lora.inject(model, lora.Settings(rank=2), targets=targets, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return adapter_state({"net": model}).tensors

    whole, alone, other = first(0, TARGETS, 5), first(0, ("proj",), 6), first(1, TARGETS, 5)
    for name, tensor in alone.items():
        assert torch.equal(tensor, whole[name])
    assert not torch.equal(whole["net.proj.lora_A.weight"], other["net.proj.lora_A.weight"])
    assert not torch.equal(whole["net.proj.lora_A.weight"], whole["net.to_out.0.lora_A.weight"])
    for name, inputs in (("conv", 27), ("proj", 6)):
        a = whole[f"net.{name}.lora_A.weight"]
        assert a.abs().max() <= inputs**-0.5
        assert a.std() > 0.2 * inputs**-0.5


@pytest.mark.parametrize(("alpha", "rslora"), [(None, False), (1.0, False), (12.0, True), (0.1, False)])
def test_the_forward_pass_is_the_equation(alpha: float | None, rslora: bool) -> None:
    model = net()
    lora.inject(model, lora.Settings(rank=3, alpha=alpha, rslora=rslora), targets=("proj",), seed=0)
    parameters = trainable_parameters({"net": model})
    a, b = parameters["net.proj.lora_A.weight"], parameters["net.proj.lora_B.weight"]
    b.data.normal_()
    x = torch.randn(4, 6)
    scale = (alpha or 3.0) / (3**0.5 if rslora else 3)
    expected = x @ net().proj.weight.T + scale * x @ a.T @ b.T
    torch.testing.assert_close(model.proj(x), expected)
    state = adapter_state({"net": model})
    assert state.alphas["net.proj"] == torch.tensor(state.alphas["net.proj"]).item(), "a float32 file must hold it"
    again = net()
    load_adapter_state({"net": again}, state)
    assert torch.equal(model.proj(x), again.proj(x))


def test_dropout_follows_the_mode_of_the_model() -> None:
    model = net()
    lora.inject(model, lora.Settings(rank=3, dropout=0.5), targets=TARGETS, seed=0)
    for name, parameter in trainable_parameters({"net": model}).items():
        if "lora_B" in name:
            parameter.data.fill_(1.0)
    assert torch.equal(model(X), model(X))
    model.train()
    assert not torch.equal(model(X), model(X))


def test_a_target_that_names_nothing_is_told_with_what_there_is() -> None:
    with pytest.raises(InputError) as error:
        lora.inject(net(), lora.Settings(), targets=("conv", "norm", "to_uot.0"), seed=0)
    assert len(error.value.problems) == 2
    assert error.value.problems[0].startswith("adapter.targets:")
    assert "'norm'" in error.value.problems[0]
    assert "Did you mean to_out.0?" in error.value.problems[1]
    with pytest.raises(InputError, match=r"adapter\.text_encoder\.targets: .*'xyz'.* conv, proj, to_out\.0"):
        lora.inject(net(), lora.PartSettings(), targets=("xyz",), seed=0)


def test_rslora_reaches_the_text_encoder() -> None:
    settings = lora.Settings(rank=4, rslora=True, text_encoder=lora.PartSettings(rank=9, alpha=2.0))
    assert settings.text_encoder is not None
    assert settings.text_encoder.plan_of("x", 9).alpha == 6.0
    kept = lora.Settings(rslora=True, text_encoder=lora.PartSettings(rank=9, alpha=2.0, rslora=False))
    assert kept.text_encoder is not None
    assert kept.text_encoder.plan_of("x", 9).alpha == 2.0


@pytest.mark.parametrize("targets", [TARGETS, ("proj",), ("0",), ("nothing",)])
@pytest.mark.parametrize("part", [lora.Settings(rank=3), lora.PartSettings(rank=1)])
def test_weights_are_counted_without_a_model(targets: tuple[str, ...], part: lora.Settings) -> None:
    """From the shapes of the layers alone; `0` ends `to_out.0`'s name."""
    model = net()
    shapes = {name: tuple(layer.weight.shape) for name, layer in adaptable_layers(model).items()}
    counted = lora.weight_count(shapes, part, targets)
    if targets == ("nothing",):
        assert counted == 0
        return
    lora.inject(model, part, targets=targets, seed=0)
    assert counted == sum(p.numel() for p in trainable_parameters({"net": model}).values())


def test_a_star_in_a_target_is_any_number() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([Net() for _ in range(11)]), "proj": nn.Linear(2, 2)})
    lora.inject(model, lora.Settings(rank=1), targets=("blocks.*.proj",), seed=0)
    adapted = {name.partition(".lora_")[0] for name in trainable_parameters({"net": model})}
    assert adapted == {f"net.blocks.{i}.proj" for i in range(11)}
    with pytest.raises(InputError, match=r"'block\.\*\.proj'"):
        lora.inject(model, lora.Settings(rank=1), targets=("block.*.proj",), seed=0)
