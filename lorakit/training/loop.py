"""The loop: steps, and what happens between them (metrics, checkpoints, samples, signals).

Here is the order of things and nothing else: how a step is computed is in `step.py`, what a checkpoint is in
`checkpoint.py`. All inputs are in the signature of `run_loop`.
"""

import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from lorakit.adapters.ema import EmaSettings
from lorakit.core import settings as core_settings
from lorakit.core.errors import DivergedError, InterruptedRun
from lorakit.core.files import printable
from lorakit.core.processes import rank
from lorakit.core.settings import Neutral
from lorakit.data.loader import StepPlan
from lorakit.export.metadata import AboutSettings
from lorakit.optimizers.state import adapted_rate
from lorakit.training.execution import Attention
from lorakit.training.interrupt import Interrupt, decided
from lorakit.training.step import StepReport, Trainee, learning_rates, run_step

log = logging.getLogger("lorakit")

Share = Annotated[float, Field(gt=0, le=1)]
MAX_SKIPPED = 3  # non-finite steps in a row that end a run


class RunSettings(core_settings.Settings):
    output: Neutral[str]
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
    """What the frozen model computes in; "auto": bf16, on a GPU without it fp16, without a GPU fp32. Adapters: fp32."""
    gradient_checkpointing: Neutral[bool | Share] = False
    """Compute activations again in the backward pass: less memory, about a third more time. A number between 0 and 1:
    of this share of the backbone's blocks, those first that keep the most for the least computing."""
    fit: Neutral[str | None] = None
    """"auto": what does not fit into memory is tried with smaller settings, cheapest first: `gradient_checkpointing` of
    a quarter, half and all of the blocks, `batch_size` 1 and as much more `accumulate`, on a GPU `offload`; then what
    changes numbers: optimizer.kind adamw8bit, where that saves 100 MB, and model.quantize. "8GB": until a step takes no
    more (of a GPU, else resident). The run's own recipe has what was found; a resume changes no number for it."""
    offload: Neutral[float | None] = Field(None, gt=0, le=1)
    """This share of the backbone's blocks waits in the CPU's memory and comes to the GPU one by one, each while the one
    before computes. Needs `gradient_checkpointing`. Left out: all stay on the GPU."""
    offload_activations: Neutral[bool] = False
    """What the backward pass needs of the forward pass waits in the CPU's memory meanwhile."""
    attention: Attention = "auto"
    """The kernel that attention runs in during training; refused where torch has it not for the model and device.
    "auto": torch chooses, by rules. "fastest": what a measurement of the model's own calls finds before the first step,
    torch's choice where nothing is faster by 5 %; the run's own recipe has what it was, so a resume keeps to it."""
    channels_last: bool = False
    """Keep the weights of a U-Net's convolutions in the layout that GPUs read fastest."""
    compile: bool = False
    """Compile the backbone's transformer blocks: minutes at the start, once for each size of picture, then faster. What
    is computed stays the same but for rounding."""
    compile_cache: Neutral[str | None] = None
    """Where what is compiled is kept for other runs, in a folder of your own: torch's files, pickles and code among
    them, which are run when they are read. Left out: nothing is kept. Needs `compile`."""
    shard: Neutral[bool] = False
    """Share the frozen backbone's weights out over the processes (FSDP2), for a model that does not fit one GPU; each
    block is gathered when it runs. Adapters stay whole. What is computed stays the same but for rounding."""
    save_every: Neutral[int] = Field(500, ge=0)
    """Optimizer steps between checkpoints; 0: only at the end."""
    keep_last: Neutral[int] = Field(3, ge=0)
    """The newest checkpoints, so many, are kept; 0: all."""
    keep_every: Neutral[int] = Field(0, ge=0)
    """Checkpoints of steps that are multiples of this are kept too; 0: none."""
    keep_best: Neutral[int] = Field(0, ge=0)
    """So many checkpoints with the lowest validation loss are kept too; needs pictures for validation, or
    `validate_training`."""
    sample_every: Neutral[int] = Field(0, ge=0)
    """Optimizer steps between sample pictures; 0: none."""
    validate_every: Neutral[int] = Field(100, ge=0)
    """Optimizer steps between measurements on the pictures put aside for validation, if there are any; 0: none."""
    validate_training: Neutral[int | None] = Field(None, ge=0)
    """Training pictures, always the same, that are measured beside them: what these lose and those do not shows what is
    learned by heart. Where none are put aside their loss is the validation loss, which shows over-fitting less. Left
    out: as many as are put aside; 0: none."""
    check_model: Neutral[bool] = True
    """Refuse, before a new run's first step, a model that clearly predicts something else (noise, v, x0) than its
    configuration says."""
    save_dtype: Literal["fp32", "bf16", "fp16"] = "fp16"
    """Number format of the adapter that is handed out."""
    ema: EmaSettings | None = None
    """A moving average of the adapter's weights beside those that are trained. Left out: none."""
    deterministic: Neutral[bool] = False
    """On a GPU, use only operations that give the same bits every time, at some cost; the CPU's always do."""
    format: str | None = None
    """Dialect of RUN/adapter.safetensors; the one that most programs read for the family where not given."""
    about: AboutSettings | None = None
    """What the adapter's file says to people. Left out: what follows from the recipe."""
    trackers: Neutral[list[Literal["wandb", "tensorboard"]]] = []
    """Where metrics go besides metrics.jsonl. Keys are taken from the environment only."""

    @field_validator("fit")
    @classmethod
    def _an_amount(cls, value: str | None) -> str | None:
        amount = re.fullmatch(r"(\d+(\.\d+)?)GB", value or "")
        if value in (None, "auto") or (amount and float(amount[1]) > 0):
            return value
        raise ValueError(f'{value!r} is no amount of memory: write "auto", or more than 0 like "8GB" or "7.5GB".')

    @model_validator(mode="after")
    def _offloadable(self) -> "RunSettings":
        if self.offload and self.gradient_checkpointing != 1:
            raise ValueError(
                "offload needs gradient_checkpointing = true: else the backward pass keeps every block on the GPU."
            )
        if self.offload and self.compile:
            raise ValueError("offload and compile do not go together: remove one of them.")
        return self

    @model_validator(mode="after")
    def _kept_for_something(self) -> "RunSettings":
        if self.compile_cache and not self.compile:
            raise ValueError("compile_cache has no effect without compile = true: remove it, or set that.")
        return self

    @model_validator(mode="after")
    def _chosen_alike(self) -> "RunSettings":
        if self.attention == "fastest" and self.deterministic:
            raise ValueError(
                'attention = "fastest" is chosen by the clock, which may choose otherwise next time, and deterministic '
                "wants the same bits every time: name a kernel, or remove one of them."
            )
        return self

    @model_validator(mode="after")
    def _measured_sometimes(self) -> "RunSettings":
        if self.validate_training and not self.validate_every:
            raise ValueError("validate_training has no effect with validate_every = 0: remove one of them.")
        return self


@dataclass(frozen=True)
class LoopReport:
    """Optimizer steps done in all, and the last finite loss."""

    step: int
    loss: float | None


class Hooks(Protocol):
    """What the loop calls between steps; `step` is the number of updates done, `output` the run's folder."""

    @property
    def output(self) -> Path: ...

    def metrics(self, record: dict[str, Any]) -> None: ...

    def save(self, step: int, *, needed: bool) -> bool:
        """Whether the checkpoint of `step` is on disk; StorageError where it is not and the run cannot do without."""
        ...

    def sample(self, step: int) -> None: ...
    def validate(self, step: int) -> None: ...

    def rescue(self, weights: Mapping[str, Tensor]) -> str:
        """Hands out `weights` as the adapter of a run that has gone wrong, and says where."""
        ...


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
    """Steps first_step + 1 … last_step. A checkpoint comes before samples and validation, and one at the end in any
    case. A run begins with a validation; a resumed one repeats samples and validation of the step it goes on from.

    Raises InterruptedRun after saving where a signal or RUN/control said so, DivergedError after MAX_SKIPPED
    non-finite steps in a row.
    """
    skipped, loss, proven = 0, None, None

    def look(step: int, *, saved: bool, sample: bool = False) -> None:
        last = step == last_step
        sample = sample or bool(sample_every and step and (last or step % sample_every == 0))
        validate = bool(validate_every and (last or step % validate_every == 0))
        if sample:
            hooks.sample(step)
        if validate:
            hooks.validate(step)
        # both give up where a stop is asked for; here and now, for only a resume at this very step makes them again
        if (sample or validate) and (number := interrupt.stop_of_any()) is not None:
            if not saved:
                hooks.save(step, needed=True)
            raise _stopped(step, number, hooks.output)

    look(first_step, saved=True)
    for step in range(first_step + 1, last_step + 1):
        started = time.perf_counter()
        plan = next(plans)
        factor = lr_factor(step - 1)
        report = run_step(
            trainee,
            plan.batches,
            padding=plan.padding,
            count=len(plan.keys),
            lr_factor=factor,
            votes=interrupt.votes(),
        )
        if trainee.average:
            trainee.average.update(step)
        if report.skipped:
            skipped += not report.overflow
        else:
            skipped, loss, proven = 0, report.loss, report.before
        hooks.metrics(_record(trainee, plan, report, step=step, factor=factor, started=started))
        if report.skipped and not report.overflow:
            _tell(report, plan, step)
        if skipped == MAX_SKIPPED:
            raise DivergedError(
                f"The loss or its gradient was not finite for {MAX_SKIPPED} steps in a row, last at step {step} with "
                f"the examples {', '.join(map(printable, plan.keys))}: lower optimizer.lr, or look at these pictures. "
                + (hooks.rescue(proven()) if proven is not None else "Nothing was learned before.")
            )
        wishes = decided(report.votes)
        needed = step == last_step or wishes.stop is not None
        due = needed or wishes.save or bool(save_every and step % save_every == 0)
        saved = due and hooks.save(step, needed=needed)
        if wishes.save and saved and rank() == 0:
            log.info("step %d is saved, as was asked", step)
        if wishes.stop is not None:
            raise _stopped(step, wishes.stop, hooks.output)
        look(step, saved=saved, sample=wishes.sample)
    return LoopReport(last_step, loss)


def _stopped(step: int, number: int, run: Path) -> InterruptedRun:
    done = f"step {step} is saved" if step else "no step was done"
    again = f"`lorakit train --resume {printable(run)}` goes on from there"
    return InterruptedRun(f"Stopped; {done}, and {again}.", signal_number=number)


def _record(
    trainee: Trainee, plan: StepPlan, report: StepReport, *, step: int, factor: float, started: float
) -> dict[str, Any]:
    """The step's line in metrics.jsonl."""
    return {
        "step": step,
        "epoch": plan.epoch,
        "loss": None if report.skipped else report.loss,
        **({"preservation": None if report.skipped else report.preservation} if trainee.preserves else {}),
        **learning_rates(trainee, factor),
        **adapted_rate(trainee.optimizer),
        "grad_norm": None if report.skipped else report.grad_norm,
        "samples": list(plan.keys),
        "losses": [loss if math.isfinite(loss) else None for loss in report.losses],
        "timesteps": list(report.timesteps),
        "seconds": time.perf_counter() - started,
        **({"skipped": True} if report.skipped else {}),
    }


def _tell(report: StepReport, plan: StepPlan, step: int) -> None:
    """Logs what a step that was not finite trained on: the samples to blame, or all where no one is."""
    if rank() == 0:
        samples = list(zip(plan.keys, report.timesteps, report.losses, strict=True))
        blamed = [sample for sample in samples if not math.isfinite(sample[2])]
        what = "loss" if blamed else "gradient or update"
        where = ", ".join(f"{printable(key)} at t = {t:g}" for key, t, _ in blamed or samples)
        log.warning("step %d: the %s is not finite, so no update was made: %s", step, what, where)
