"""LoRA (Hu et al., 2106.09685, eq. 3): W x + alpha/rank · B A x beside frozen linear and convolution layers.

Here are its settings and how it is put into a module, by peft. What is done with an adapter once it is in (state, load,
switching off) is in state.py, its files are in lorakit/export/.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lorakit.adapters.state import LayerPlan, adaptable_layers, adapter_layers, inject_layers
from lorakit.core import settings as core_settings
from lorakit.core.errors import InputError
from lorakit.core.files import printable
from lorakit.core.seeding import generator
from lorakit.core.settings import did_you_mean


class _Part(core_settings.Settings):
    rank: int = Field(16, ge=1)
    """How many directions each layer may change in; the file's size grows with it."""
    alpha: float | None = Field(None, gt=0, allow_inf_nan=False)
    """The adapter's effect is scaled by alpha / rank. Left out: equal to rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability with which an input of the adapter is zeroed during training."""
    lr: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Learning rate of this adapter. Left out: the optimizer's."""
    targets: list[str] | None = Field(None, min_length=1)
    """Endings of the names of the layers that are adapted; * in one is any number. Left out: the family's own."""

    @property
    def effective_alpha(self) -> float:
        """The alpha of alpha/rank · B A; for rsLoRA (2312.03732) that is alpha · sqrt(rank). Exact in single precision.

        Files hold alphas in single precision: rounding here makes a file give back the very bits that were trained.
        """
        alpha = float(self.rank if self.alpha is None else self.alpha)
        if getattr(self, "rslora", False):
            alpha *= math.sqrt(self.rank)
        return float(torch.tensor(alpha, dtype=torch.float32))


class PartSettings(_Part):
    rslora: bool | None = None
    """Scale by alpha / sqrt(rank) instead of alpha / rank. Left out: as the rest of the adapter."""


class Settings(_Part):
    kind: Literal["lora"] = "lora"
    """Low-rank adapters on linear and convolution layers."""
    init_from: str | None = None
    """An adapter file or peft folder of the same layers, rank and alpha whose weights the training starts from (not the
    way to go on with a run: that is --resume). Left out: a fresh adapter."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank, which keeps high ranks learning."""
    text_encoder: PartSettings | None = None
    """An adapter in the text encoders too. Left out: they stay frozen."""

    @model_validator(mode="after")
    def _hand_down(self) -> "Settings":
        part = self.text_encoder
        if part is not None and part.rslora is None:
            # the class is frozen for its users; this is still its construction
            object.__setattr__(self, "text_encoder", part.model_copy(update={"rslora": self.rslora}))
        return self


def inject(module: nn.Module, settings: Settings | PartSettings, *, targets: Sequence[str], seed: int) -> None:
    """Freezes `module` and puts a fresh adapter, which changes nothing yet, beside each layer that a target names.

    A is uniform in ±1/sqrt(inputs), drawn from `seed` and the layer's own name; B is zero; both fp32. `targets` are
    endings of dotted names ("to_q", "ff.net.2", "blocks.*.proj"). Raises InputError for a target that no linear or
    convolution layer has, and names the endings that there are.
    """
    where = "adapter.text_encoder.targets" if isinstance(settings, PartSettings) else "adapter.targets"
    layers = adaptable_layers(module)
    names = _matching(layers, targets, where=where)
    shapes = [tuple(cast("Tensor", layers[name].weight).shape) for name in names]
    most = max(min(shape[0], math.prod(shape[1:])) for shape in shapes)
    if settings.rank > most:
        key = where.replace("targets", "rank")
        raise InputError(f"{key} = {settings.rank} is more than any of its layers has (at most {most}): lower it.")
    plan = {name: LayerPlan(rank=settings.rank, alpha=settings.effective_alpha) for name in names}
    adapter = inject_layers(module, plan, dropout=settings.dropout)
    for name, layer in adapter_layers(module):
        if name not in plan:
            continue
        first, second = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        first.data.copy_(_uniform(first.shape, seed=seed, name=name))
        second.data.zero_()


def weight_count(shapes: Mapping[str, tuple[int, ...]], part: Settings | PartSettings, targets: Sequence[str]) -> int:
    """How many weights `inject` adds to a module whose layers' weights have these `shapes`, by dotted path."""
    named = [shape for name, shape in shapes.items() if any(_ends(name, target) for target in targets)]
    return sum(part.rank * (math.prod(shape[1:]) + shape[0]) for shape in named)


def _uniform(shape: torch.Size, *, seed: int, name: str) -> Tensor:
    # peft's own law (Kaiming with a = sqrt(5)), but from a seed that no other layer's existence shifts
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator(seed, "adapter", name))


def _ends(name: str, target: str) -> bool:
    return re.search(rf"(^|\.){re.escape(target).replace(re.escape('*'), '[0-9]+')}$", name) is not None


def _matching(layers: Mapping[str, nn.Module], targets: Sequence[str], *, where: str) -> list[str]:
    problems = []
    for target in targets:
        matched = [name for name in layers if _ends(name, target)]
        if not matched:
            hint = did_you_mean(target, _endings(layers))
            problems.append(f"{where}: no linear or convolution layer's name ends in {printable(target)!r}.{hint}")
        grouped = [name for name in matched if getattr(layers[name], "groups", 1) != 1]
        if grouped:
            problems.append(f"{where}: {target!r} names grouped convolutions ({grouped[0]}): leave it out.")
    if problems:
        raise InputError(problems)
    return [name for name in layers if any(_ends(name, target) for target in targets)]


def _endings(names: Mapping[str, nn.Module]) -> list[str]:
    """The shortest endings that say something: a number is told with the word before it (`to_out.0`)."""
    words = (re.search(r"[^.]*[^.\d][^.]*(\.\d+)*$", name) for name in names)
    return sorted({word.group() for word in words if word})
