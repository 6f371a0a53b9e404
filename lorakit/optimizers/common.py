"""What all optimizers' settings share: the rate, clipping, the schedule, and the library that does the work."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from lorakit.core import settings as core_settings
from lorakit.optimizers.schedules import Schedule, unused

Beta = Annotated[float, Field(ge=0, lt=1)]


class Common(core_settings.Settings):
    lr: float = Field(1e-4, gt=0)
    """Learning rate at its full value."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients of a larger norm, over all trainable weights, are scaled down to it; 0: never."""
    schedule: Schedule = Schedule()
    """How the learning rate moves over the run."""

    # module that must be there, and the extra of lorakit that brings it
    library: ClassVar[tuple[str, str] | None] = None

    @property
    def full_rate(self) -> float:
        """What the schedule's factor is multiplied by."""
        return self.lr

    @property
    def state_size(self) -> float:
        """How many 32-bit numbers it keeps for each weight, at most."""
        return 2.0

    def state_of(self, sizes: Sequence[int]) -> float:
        """How many 32-bit numbers it keeps for tensors of so many weights."""
        return self.state_size * sum(sizes)

    def advice(self) -> list[str]:
        """What is allowed, and hardly meant."""
        return []

    def problems(self, rates: Mapping[str, float | None]) -> list[str]:
        """Why this optimizer cannot train here; `rates` are the parts' own by their keys, None where none is given.

        Loads nothing: it is asked before a model is loaded.
        """
        if self.library is None or find_spec(self.library[0]) is not None:
            return []
        module, extra = self.library
        kind = getattr(self, "kind", "")
        return [f'optimizer.kind = {kind!r} needs the library {module}: pip install "lorakit[{extra}]".']


class Adam(Common):
    """What Adam and its relatives have."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.01, ge=0)
    """How far each step pulls the weights to zero, times the learning rate."""


class Bitsandbytes(Common):
    """Of the optimizers that bitsandbytes computes (on the CPU too, measured with 0.50)."""

    paged: bool = False
    """Keep the optimizer's state where the GPU can move it to main memory when its own runs out."""

    library = ("bitsandbytes", "bnb")

    def problems(self, rates: Mapping[str, float | None]) -> list[str]:
        found = super().problems(rates)
        if self.paged and not torch.accelerator.is_available():
            found.append(
                "optimizer.paged moves state between a GPU and main memory, and there is no GPU: leave it out."
            )
        return found


class EightBits(Bitsandbytes):
    """Of those with a state in 8 bits, that of tensors below 4,096 weights in 32."""

    def state_of(self, sizes: Sequence[int]) -> float:
        in_bytes = sum(size for size in sizes if size >= 4096)
        # a byte for each number, and for each 256 a scale
        return self.state_size * (sum(sizes) - in_bytes * (1 - 1 / 4 - 1 / 256))


def without_decay(settings: Common, reason: str) -> None:
    """Makes the schedule of `settings`, under construction, constant where it names no kind.

    Raises ValueError with `reason` where it names another one.
    """
    schedule = settings.schedule
    if "kind" in schedule.model_fields_set:
        problems = (
            [] if schedule.kind == "constant" else [f"schedule.kind = {schedule.kind!r} does not go with {reason}"]
        )
    else:
        problems = [f"schedule.{text}" for text in unused(schedule, "constant")]
        # the class is frozen for its users; this is still its construction
        object.__setattr__(settings, "schedule", schedule.model_copy(update={"kind": "constant"}))
    if problems:
        raise ValueError("; ".join(problems))
