"""A few steps of any registered optimizer, on weights of the shapes that adapters have."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from lorakit.core.seeding import generator
from lorakit.optimizers import OPTIMIZERS
from lorakit.optimizers.state import Taken, guarded_step, optimizer_state, restore_optimizer

# 8-bit states begin at 4,096 elements
SHAPES = {
    "unet.a": (64, 80),
    "unet.b": (8, 4, 3, 3),
    "unet.zero": (6, 5),
    "text_encoder.c": (7, 6),
    "text_encoder.d": (5,),
    "text_encoder.e": (60, 70),
}
# every registered optimizer, and what one of them becomes by a setting
CASES: dict[str, dict[str, Any]] = {kind: {} for kind in OPTIMIZERS.names()} | {
    "prodigy": {"d0": 1e-2, "d_coef": 10.0},  # its estimate grows at each step
    "adafactor with lr": {"lr": 1e-3},
}
PAGED: dict[str, dict[str, Any]] = {f"{kind} paged": {"paged": True} for kind in ("adamw8bit", "lion", "lion8bit")}
ONE_RATE = {"prodigy", "adafactor"}


@dataclass
class Trained:
    """An optimizer and its weights; the gradients are those of a bowl, with noise that only the step decides."""

    kind: str
    optimizer: torch.optim.Optimizer
    parameters: dict[str, nn.Parameter]

    @property
    def group_state(self) -> tuple[str, ...]:
        return getattr(OPTIMIZERS.module(self.kind), "GROUP_STATE", ())

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def gradients(self, step: int) -> None:
        for name, p in self.parameters.items():
            noise = torch.randn(p.shape, generator=generator(step, name)).to(p.device)
            p.grad = p.detach() - 1 + 0.3 * noise

    def step(self, step: int, *, good: bool = True) -> Taken:
        self.gradients(step)
        return self.take(step, good=good)

    def take(self, step: int, *, good: bool = True) -> Taken:
        """A step on the gradients there are."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["full_lr"] * (1 - step / 100)
        taken = guarded_step(self.optimizer, self.parameters, torch.tensor(good, device=self.device))
        taken.settle(bool(taken.good))
        return taken

    def save(self) -> tuple[bytes, str]:
        """The weights and all that was learned, as the bytes that would lie on disk."""
        tensors, numbers = optimizer_state(self.optimizer, self.parameters, group_state=self.group_state)
        weights = {f"weight:{name}": p.detach().cpu() for name, p in self.parameters.items()}
        return save({**tensors, **weights}), json.dumps(numbers, allow_nan=False)

    def restore(self, data: bytes, text: str) -> None:
        tensors = load(data)
        for name, p in self.parameters.items():
            p.data.copy_(tensors.pop(f"weight:{name}"))
        restore_optimizer(self.optimizer, self.parameters, tensors, json.loads(text), group_state=self.group_state)


def made(case: str, *, seed: int = 0, shapes: Mapping[str, tuple[int, ...]] = SHAPES, device: str = "cpu") -> Trained:
    """A fresh optimizer over weights drawn from `seed`; the text encoder's have half the rate where it may."""
    kind = case.split()[0]
    module = OPTIMIZERS.module(kind)
    own = module.Settings(**(CASES | PAGED)[case])
    parameters = {
        name: nn.Parameter((torch.randn(shape, generator=generator(seed, name)) * ("zero" not in name)).to(device))
        for name, shape in shapes.items()
    }
    groups = []
    for component in dict.fromkeys(name.split(".")[0] for name in shapes):
        lr = own.full_rate if component == "unet" or case in ONE_RATE else own.full_rate / 2
        members = [p for name, p in parameters.items() if name.startswith(f"{component}.")]
        groups.append({"params": members, "lr": lr, "full_lr": lr, "name": component})
    return Trained(kind, module.build(own, groups), parameters)


def after(case: str, steps: int, **how: Any) -> Trained:
    """What `made` makes, trained for so many steps."""
    trained = made(case, **how)
    for step in range(steps):
        trained.step(step)
    return trained


def bits(tensors: Mapping[str, Tensor]) -> bytes:
    return save({name: tensor.detach().clone() for name, tensor in tensors.items()})
