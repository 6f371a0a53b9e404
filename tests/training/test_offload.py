"""Weights come and go and change nothing; what is not needed is not on the device, which is played by clones."""

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorakit.adapters import lora
from lorakit.core.errors import InputError
from lorakit.families import sd
from lorakit.families.quantized import quantize
from lorakit.recipe import build
from lorakit.training.execution import blocks_of
from lorakit.training.offload import Offload, Wait, activations_aside, some_of


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(self.norm(x)).tanh()


class Model(nn.Module):
    def __init__(self, *, small: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(6))
        self.requires_grad_(False)
        if small:
            quantize(self, "int8")
        lora.inject(self, lora.Settings(rank=2), targets=["layer"], seed=0)
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.training else block(x)
        return x


class Device:
    """Clones of tensors: those that are alive, the most that ever were, and what was asked for in which order."""

    def __init__(self) -> None:
        self.held, self.most = 0, 0
        self.asked: list[Tensor] = []

    def __call__(self, tensors: Sequence[Tensor]) -> Wait:
        self.asked.append(tensors[0])
        copies = [tensor.detach().clone() for tensor in tensors]
        for copy in copies:
            self.held += copy.nbytes
            weakref.finalize(copy.untyped_storage(), self._gone, copy.nbytes)
        self.most = max(self.most, self.held)
        return lambda: copies

    def _gone(self, size: int) -> None:
        self.held -= size


def gradients(model: nn.Module, steps: int = 3) -> list[Tensor]:
    found = []
    for step in range(steps):
        model.zero_grad()
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(step))
        out = model(x)
        out.square().sum().backward()
        found += [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    return found


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_a_training_is_the_same_to_the_bit(fraction: float, small: bool) -> None:
    plain = gradients(Model(small=small))
    model, device = Model(small=small), Device()
    offload = Offload(some_of(list(model.blocks), fraction))
    offload.start(device, pinned=False)
    got = gradients(model)
    assert len(plain) == 3 * 13 and all(map(torch.equal, got, plain))
    one = sum(tensor.nbytes for tensor in offload.stored[0])
    assert 0 < device.most <= 3 * one, "one that computes, one that comes, and one whose gradient is on its way"
    with torch.no_grad():
        assert torch.equal(model.eval()(torch.ones(1, 64)), Model(small=small).eval()(torch.ones(1, 64)))


def test_each_block_is_on_its_way_while_the_one_before_computes() -> None:
    model, device = Model(), Device()
    offload = Offload(list(model.blocks))
    offload.start(device, pinned=False)
    gradients(model, steps=2)  # shows the way
    device.asked.clear()
    gradients(model, steps=2)
    first = [stored[0] for stored in offload.stored]
    asked = [next(i for i, tensor in enumerate(first) if tensor is one) for one in device.asked]
    order = [*range(6), *reversed(range(6))] * 2
    assert asked == [*order[1:], 0], "the next of each, and nothing else"


@pytest.mark.parametrize("small", [False, True])
def test_adapters_stay_and_frozen_weights_are_aside_while_the_rest_moves(small: bool) -> None:
    model = Model(small=small)
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    offload = Offload(list(model.blocks))
    with offload.aside():
        model.to("cpu", torch.float32)
        assert {name.rpartition("lora_")[1] for name, _ in model.named_parameters()} == {"lora_"}
    assert all(value.equal(whole[name]) for name, value in model.state_dict().items())
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) >= 6 * (64 * 64 + 3 * 64)


def test_a_model_s_own_blocks_and_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    def predicted(offloaded: bool) -> list[Tensor]:
        family = sd.load(sd.Settings(path=str(sd.tiny().path)))
        lora.inject(family.unet, lora.Settings(rank=2), targets=["to_q", "to_k"], seed=0)
        family.unet.train().enable_gradient_checkpointing()
        if offloaded:
            Offload(blocks_of(family.unet, key="x")).start(Device(), pinned=False)
        found = []
        for _ in range(2):
            family.unet.zero_grad()
            text = {"states": torch.ones(1, 16, 24)}
            out = family.predict(torch.ones(1, 4, 8, 8), torch.tensor([5.0]), text)
            out.square().sum().backward()
            found += [out.detach(), *(p.grad.clone() for p in family.unet.parameters() if p.grad is not None)]
        return found

    plain, other = predicted(False), predicted(True)
    assert len(plain) > 10 and all(map(torch.equal, plain, other))


@pytest.mark.parametrize("small", [False, True])
def test_activations_wait_elsewhere_and_weights_stay(monkeypatch: pytest.MonkeyPatch, small: bool) -> None:
    plain, model = gradients(Model(small=small).eval()), Model(small=small).eval()
    sizes: list[Any] = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **more: sizes.append(size[0]) or empty(*size, **more))
    with activations_aside(pinned=False):
        got = gradients(model)
    assert all(map(torch.equal, got, plain))
    assert (4, 64) in sizes and (64, 64) not in sizes


def test_it_needs_checkpoints_and_a_gpu() -> None:
    data = {"sources": [{"path": "x"}]}
    with pytest.raises(InputError, match=r"offload needs gradient_checkpointing"):
        build({"data": data, "run": {"output": "x", "offload": 0.5}})
    with pytest.raises(InputError, match="compile"):
        build({"data": data, "run": {"output": "x", "offload": 1.0, "gradient_checkpointing": True, "compile": True}})
