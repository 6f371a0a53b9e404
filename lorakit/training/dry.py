"""The dry step: forward and backward on the largest micro step, without an update, before the first step.

What does not fit into memory fails there at once instead of hours later, when the largest bucket comes; and
`lorakit train --dry-run` tells from it how long a run takes.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lorakit.core import memory
from lorakit.core.errors import InputError
from lorakit.core.files import size
from lorakit.core.processes import gather_objects
from lorakit.core.types import Batch
from lorakit.training.execution import explained
from lorakit.training.savings import Kept, counted, savings
from lorakit.training.step import Trainee, forward_backward, ready

_GIB = 1 << 30


class TooLarge(InputError):
    """A micro step does not fit into memory: it took `peak` bytes, if that is known, and settings would have `saved`
    so many."""

    def __init__(
        self, problems: str | Sequence[str], *, peak: int | None = None, saved: Mapping[str, int] | None = None
    ) -> None:
        super().__init__(problems)
        self.peak, self.saved = peak, saved or {}


@dataclass(frozen=True)
class DryReport:
    """What a micro step of `examples` pictures of the size `bucket` (width, height) costs: `seconds`, and memory.

    `peak_bytes` of `total_bytes` is what torch took of the GPU; without one, what this process took in all, if the
    system says. `kept_bytes` wait for the backward pass. `weights` is how many are trained.
    """

    seconds: float
    peak_bytes: int | None
    total_bytes: int | None
    kept_bytes: int
    bucket: tuple[int, int]
    examples: int
    weights: int

    def lines(self, *, accumulate: int = 1, steps: int | None = None, weight_bytes: int = 2) -> list[str]:
        """The report for a person: of a run of `steps` steps of `accumulate` micro steps each."""
        width, height = self.bucket
        found = [
            f"largest micro step: {self.examples} × {width}×{height} pixels, {self.seconds:.3g} s",
            f"step: about {self.seconds * accumulate:.3g} s",
        ]
        if self.peak_bytes is not None:
            of = f" of {self.total_bytes / _GIB:.1f}" if self.total_bytes is not None else ""
            found.append(f"memory: {self.peak_bytes / _GIB:.1f}{of} GiB at its peak")
        found.append(f"adapter: {self.weights:,} weights, a file of about {self.weights * weight_bytes / 1e6:.1f} MB")
        if steps is not None:
            minutes = round(self.seconds * accumulate * steps / 60)
            found.append(
                f"{steps} steps: about {minutes // 60} h {minutes % 60:02d} min, without samples and validation"
            )
        return found


def dry_step(
    trainee: Trainee,
    batch: Batch,
    *,
    count: int,
    state_size: float = 2.0,
    passes: int = 1,
    allowed: int | None = None,
) -> DryReport:
    """Tries the micro step `batch`, with room for what the optimizer will hold, `passes` times; the last is timed.

    `state_size` is how many 32-bit numbers that is for each weight. On all ranks together. Weights, optimizer, loss
    scale and random generators are afterwards as they were, and there are no gradients. Raises on every rank TooLarge
    where the memory of one does not suffice, or it took more bytes than `allowed`, and InputError where an operation
    has no deterministic form.
    """
    report, kept = None, Kept()
    failure: InputError | None = None
    devices = [trainee.device] if trainee.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            if allowed is not None:  # what loading took before is gone
                memory.forget_peak()
            for _ in range(passes):
                with counted(trainee) as kept:
                    report = _measured(trainee, batch, kept, count=count, state_size=state_size)
            if allowed is not None and report is not None and (report.peak_bytes or 0) > allowed:
                failure = _too_large(trainee, batch, kept.bytes, peak=report.peak_bytes)
        except (RuntimeError, MemoryError, AssertionError) as error:
            failure = _too_large(trainee, batch, kept.bytes) if memory.is_lack(error) else _problem(error)
            if failure is None:
                raise
        finally:
            trainee.optimizer.zero_grad(set_to_none=True)
    if trainee.device.type == "cuda":
        torch.cuda.empty_cache()  # the run's own sizes come next
    found = [failure for failure in gather_objects(failure) if failure is not None]
    if found:
        problems = sorted({problem for failure in found for problem in failure.problems})
        of_memory = [failure for failure in found if isinstance(failure, TooLarge)]
        if len(of_memory) < len(found):
            raise InputError(problems)
        peaks = [failure.peak for failure in of_memory if failure.peak is not None]
        raise TooLarge(problems, peak=max(peaks) if len(peaks) == len(found) else None, saved=of_memory[0].saved)
    assert report is not None
    return report


def told(trainee: Trainee, batch: Batch, *, count: int) -> TooLarge:
    """What to say where a step itself has run out of memory, of its largest micro step `batch`; as `dry_step` does, and
    not where other ranks wait."""
    trainee.optimizer.zero_grad(set_to_none=True)
    try:
        return _too_large(trainee, batch, dry_step(trainee, batch, count=count).kept_bytes)
    except TooLarge as error:
        return error


def _measured(trainee: Trainee, batch: Batch, kept: Kept, *, count: int, state_size: float) -> DryReport:
    own = sum(parameter.nbytes for parameter in trainee.parameters.values())
    held = sum(v.nbytes for state in trainee.optimizer.state.values() for v in state.values() if isinstance(v, Tensor))
    room = partial(torch.empty, dtype=torch.uint8, device=trainee.device)
    cuda = trainee.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(trainee.device)
        torch.cuda.empty_cache()  # what encoded pictures has left behind
        torch.cuda.reset_peak_memory_stats(trainee.device)
    started = time.perf_counter()
    moments = room(max(0, math.ceil(state_size * own) - held))
    forward_backward(trainee, ready(trainee, batch), count=count)
    room(2 * (own + moments.nbytes + held))  # what a step keeps to be able to take itself back
    if cuda:
        torch.cuda.synchronize(trainee.device)
    seconds = time.perf_counter() - started
    assert batch.sizes is not None
    height, width = batch.sizes[0, 4:].tolist()
    return DryReport(
        seconds,
        peak_bytes=torch.cuda.max_memory_reserved(trainee.device) if cuda else memory.peak(),
        total_bytes=torch.cuda.mem_get_info(trainee.device)[1] if cuda else None,
        kept_bytes=kept.bytes,
        bucket=(width, height),
        examples=len(batch.keys),
        weights=sum(parameter.numel() for parameter in trainee.parameters.values()),
    )


def _too_large(trainee: Trainee, batch: Batch, kept: int, *, peak: int | None = None) -> TooLarge:
    """What is too large, and the settings that save most."""
    assert batch.sizes is not None
    height, width = batch.sizes[0, 4:].tolist()
    saved = savings(trainee, examples=len(batch.keys), kept=kept)
    return TooLarge(
        f"A micro step of {len(batch.keys)} pictures of {width}×{height} pixels does not fit into memory. "
        + "".join(f"{setting} would save some {size(number)}; " for setting, number in [*saved.items()][:3])
        + "a lower data.buckets.resolution always helps.",
        peak=peak,
        saved=saved,
    )


def _problem(error: BaseException) -> InputError | None:
    """What a person can do about another `error`, or None."""
    if problem := explained(error):
        return InputError(problem)
    if "deterministic" in str(error) and torch.are_deterministic_algorithms_enabled():
        where = str(error).partition(".")[0]
        return InputError(f"run.deterministic cannot be kept here ({where}): leave it out.")
    return None
