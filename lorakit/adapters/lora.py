"""LoRA (Hu et al., 2106.09685, eq. 3): W x + alpha/rank · B A x beside frozen linear and convolution layers.

Here are its settings and how it is put into a module, by peft. Which layers it goes into is in targets.py; what is done
with an adapter once it is in (state, load, switching off) in state.py, its files are in lorakit/export/.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lorakit.adapters.state import LayerPlan, adaptable_layers, adapter_layers, inject_layers
from lorakit.adapters.targets import Listed, PatternSettings, choose, pattern_of
from lorakit.core import settings as core_settings
from lorakit.core.errors import InputError
from lorakit.core.seeding import generator


class _Part(core_settings.Settings):
    rank: int = Field(16, ge=1)
    """How many directions each layer may change in; the file's size grows with it."""
    alpha: float | None = Field(None, gt=0, allow_inf_nan=False)
    """The adapter's effect is scaled by alpha / rank. Left out: equal to rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability with which an input of the adapter is zeroed during training."""
    lr: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Learning rate of this adapter. Left out: the optimizer's."""
    targets: Listed[list[str] | None] = Field(None, min_length=1)
    """The layers that are adapted: "attention", "attention+mlp", "all-linear", "all+conv", endings of their names
    (where * is any number), or several of these. Left out: the family's own."""
    blocks: Listed[list[str] | None] = Field(None, min_length=1)
    """Only layers within these parts of the model, by names in a row, where numbers may be ranges: "mid_block",
    "up_blocks.0-1", "transformer_blocks.4-11". Left out: everywhere."""
    patterns: list[PatternSettings] = []
    """Layers of these with a rank, alpha or rate of their own. Of several that match a layer the last one counts, and
    it alone."""

    def plan_of(self, name: str, rank: int) -> LayerPlan:
        """The plan of the layer `name`, of this rank.

        Its alpha is that of alpha/rank · B A; for rsLoRA (2312.03732) that is alpha · sqrt(rank). Files hold alphas in
        single precision: rounding here makes a file give back the very bits that were trained.
        """
        i = pattern_of(self, name)
        said = self.alpha if i is None or self.patterns[i].alpha is None else self.patterns[i].alpha
        alpha = float(rank if said is None else said)
        if getattr(self, "rslora", False):
            alpha *= math.sqrt(rank)
        return LayerPlan(rank=rank, alpha=float(torch.tensor(alpha, dtype=torch.float32)))

    def rate_of(self, name: str) -> tuple[str, float] | None:
        """The name and number of the layer's own learning rate, where a pattern gives it one."""
        i = pattern_of(self, name)
        rate = None if i is None else self.patterns[i].lr
        return None if i is None or rate is None else (self.patterns[i].name, rate)

    def rates(self) -> dict[str, float | None]:
        """The learning rates that are said here, by their keys; that of all layers may be None."""
        own = {f"patterns.{i}.lr": pattern.lr for i, pattern in enumerate(self.patterns) if pattern.lr is not None}
        return {"lr": self.lr, **own}

    @model_validator(mode="after")
    def _names_differ(self) -> "_Part":
        names = [pattern.name for pattern in self.patterns if pattern.lr is not None]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two patterns have rates that would both be called lr_{name}: make it one pattern")
        return self


class PartSettings(_Part):
    rslora: bool | None = None
    """Scale by alpha / sqrt(rank) instead of alpha / rank. Left out: as the rest of the adapter."""


class Settings(_Part):
    kind: Literal["lora"] = "lora"
    """Low-rank adapters on linear and convolution layers."""
    init_from: str | None = None
    """An adapter file, peft folder or run of the same layers, rank and alpha whose weights the training starts from
    (not the way to go on with a run: that is --resume). Left out: a fresh adapter."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank, which keeps high ranks learning."""
    fused: bool = True
    """Compute layers and their adapters as one operation, the same up to rounding, where that is possible."""
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
    presets or endings of dotted names ("to_q", "blocks.*.proj"), of which the settings' blocks and patterns leave some
    out. Raises InputError for what names no linear or convolution layer, and says what there is.
    """
    where = "adapter.text_encoder" if isinstance(settings, PartSettings) else "adapter"
    layers = adaptable_layers(module)
    shapes = {name: tuple(cast("Tensor", layer.weight).shape) for name, layer in layers.items()}
    grouped = [name for name, layer in layers.items() if getattr(layer, "groups", 1) != 1]
    chosen = choose(shapes, settings, targets, where=where, grouped=grouped)
    if chosen.problems:
        raise InputError(chosen.problems)
    plan = {name: settings.plan_of(name, rank) for name, rank in chosen.ranks.items()}
    adapter = inject_layers(module, plan, dropout=settings.dropout)
    for name, layer in adapter_layers(module):
        if name not in plan:
            continue
        first, second = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        with torch.no_grad():
            first.copy_(_uniform(first.shape, seed=seed, name=name))
            second.zero_()


def weight_count(shapes: Mapping[str, tuple[int, ...]], part: Settings | PartSettings, targets: Sequence[str]) -> int:
    """How many weights `inject` adds to a module whose layers' weights have these `shapes`, by dotted path."""
    ranks = choose(shapes, part, targets, where="adapter").ranks
    return sum(rank * (math.prod(shapes[name][1:]) + shapes[name][0]) for name, rank in ranks.items())


def _uniform(shape: torch.Size, *, seed: int, name: str) -> Tensor:
    # peft's own law (Kaiming with a = sqrt(5)), but from a seed that no other layer's existence shifts
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator(seed, "adapter", name))
