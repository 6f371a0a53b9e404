"""The loop: steps, and what happens between them (metrics, checkpoints, samples, signals).

Here is the order of things and nothing else: how a step is computed is in `step.py`, what a checkpoint is in
`checkpoint.py`. All inputs are in the signature of `run_loop`.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pydantic import Field

from lorakit.core import settings as core_settings
from lorakit.core.errors import DivergedError, InterruptedRun
from lorakit.data.loader import StepPlan
from lorakit.training.interrupt import Interrupt, decided
from lorakit.training.step import Trainee, learning_rates, run_step

MAX_SKIPPED = 3  # non-finite steps in a row that end a run


class RunSettings(core_settings.Settings):
    output: str
    """Folder of the run, which must not hold one already. Left out: runs/ and the recipe's name, where you are."""
    steps: int | None = Field(None, gt=0)
    """Optimizer steps to train for; 1000 where neither this nor `epochs` is given."""
    epochs: int | None = Field(None, gt=0)
    """Passes over the data to train for, in place of `steps`."""
    batch_size: int = Field(1, gt=0)
    """Examples per process and micro step."""
    accumulate: int = Field(1, gt=0)
    """Micro steps per optimizer step; the global batch is batch_size × accumulate × processes."""
    seed: int = Field(0, ge=0)
    """What all randomness of the run follows from."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """What the frozen model computes in; "auto": bf16 where the GPU has it, else fp32. Adapters are always fp32."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    save_every: int = Field(500, ge=0)
    """Optimizer steps between checkpoints; 0: only at the end."""
    keep_last: int = Field(3, ge=0)
    """Checkpoints to keep; 0: all."""
    sample_every: int = Field(0, ge=0)
    """Optimizer steps between sample pictures; 0: none."""
    validate_every: int = Field(100, ge=0)
    """Optimizer steps between measurements on the pictures put aside for validation, if there are any; 0: none."""
    save_dtype: Literal["fp32", "bf16", "fp16"] = "fp16"
    """Number format of the adapter that is handed out."""
    format: str | None = None
    """Dialect of RUN/adapter.safetensors; the one that most programs read for the family where not given."""
    trackers: list[Literal["wandb", "tensorboard"]] = []
    """Where metrics go besides metrics.jsonl. Keys are taken from the environment only."""


@dataclass(frozen=True)
class LoopReport:
    """Optimizer steps done in all, and the last finite loss."""

    step: int
    loss: float | None


class Hooks(Protocol):
    """What the loop calls between steps; `step` is the number of updates done."""

    def metrics(self, record: dict[str, Any]) -> None: ...
    def save(self, step: int) -> None: ...
    def sample(self, step: int) -> None: ...
    def validate(self, step: int) -> None: ...


def run_loop(
    trainee: Trainee,
    plans: Iterator[StepPlan],
    *,
    first_step: int,
    last_step: int,
    lr_factor: Callable[[int], float],
    save_every: int,
    sample_every: int,
    validate_every: int,
    hooks: Hooks,
    interrupt: Interrupt,
) -> LoopReport:
    """Steps first_step + 1 … last_step. A checkpoint comes before samples, and one at the end in any case; a run begins
    with a validation, and a resumed one repeats that of the step it goes on from.

    Raises InterruptedRun after saving where a signal came, DivergedError after MAX_SKIPPED non-finite steps in a row.
    """
    skipped, loss, saved = 0, None, first_step
    if validate_every and (first_step % validate_every == 0 or first_step == last_step):
        hooks.validate(first_step)
    for step in range(first_step + 1, last_step + 1):
        started = time.perf_counter()
        plan = next(plans)
        factor = lr_factor(step - 1)
        report = run_step(trainee, plan.batches, count=len(plan.keys), lr_factor=factor, votes=interrupt.votes())
        if not report.skipped:
            skipped = 0
        elif not report.overflow:
            skipped += 1
        loss = loss if report.skipped else report.loss
        hooks.metrics(
            {
                "step": step,
                "epoch": plan.epoch,
                "loss": None if report.skipped else report.loss,
                **learning_rates(trainee, factor),
                "grad_norm": None if report.skipped else report.grad_norm,
                "samples": list(plan.keys),
                "seconds": time.perf_counter() - started,
                **({"skipped": True} if report.skipped else {}),
            }
        )
        if skipped == MAX_SKIPPED:
            raise DivergedError(
                f"The loss was not finite for {MAX_SKIPPED} steps in a row, last at step {step} with the examples "
                f"{', '.join(plan.keys)}: lower optimizer.lr, or look at these pictures. "
                + (f"The checkpoint of step {saved} is good." if saved else "Nothing was saved before.")
            )
        signal_number = decided(report.votes)
        last = step == last_step
        if last or signal_number or (save_every and step % save_every == 0):
            hooks.save(step)
            saved = step
        if signal_number and not last:
            raise InterruptedRun(
                f"Stopped by a signal; step {saved} is saved, and `lorakit train --resume` goes on from there.",
                signal_number=signal_number,
            )
        if sample_every and (last or step % sample_every == 0):
            hooks.sample(step)
        if validate_every and (last or step % validate_every == 0):
            hooks.validate(step)
    return LoopReport(last_step, loss)
