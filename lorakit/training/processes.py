"""Starting under Accelerate: processes, device, mixed precision, trackers, the progress bar.

What Accelerate is not used for, and why: gradients are summed by our own `core.processes.sum_tensors` (the same bits
for any split), and state is saved by `checkpoint.py` (Accelerate's hooks unpickle).
"""

import atexit
import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, cast

import torch

from lorakit.core.errors import InputError
from lorakit.core.memory import keep_freed
from lorakit.core.processes import TIME_LIMIT, leave, rank
from lorakit.core.threads import cap_threads, usable_cores
from lorakit.training.engines import KEPT, without_engines
from lorakit.training.trackers import Trackers, refuse_missing

log = logging.getLogger("lorakit")

Precision = Literal["fp32", "bf16", "fp16"]


def resolve_precision(wanted: str) -> tuple[Precision, str]:
    """The precision that "auto" stands for here, and why; fp16 without a GPU is an InputError."""
    if wanted == "fp16" and not torch.cuda.is_available():
        raise InputError('run.precision = "fp16" needs a GPU, and there is none here: use "bf16" or "fp32".')
    if wanted != "auto":
        return cast("Precision", wanted), "as the recipe says"
    if not torch.cuda.is_available():
        return "fp32", "there is no GPU"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", "the GPU computes in it"
    return "fp16", "the GPU does not compute in bf16"


def started_alone() -> str | None:
    """What to say where Accelerate was asked for several processes and has started one: it prepares as for several."""
    if not {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys() or "WORLD_SIZE" in os.environ:
        return None
    return (
        "accelerate was asked for several processes and has started this one alone, as it does on CPUs: launch with "
        "--multi_gpu in the place of --cpu, or with recipes/accelerate/cpu_x2.yaml"
    )


@contextlib.contextmanager
def reproducible() -> Iterator[None]:
    """Within it, torch computes the same bits from the same numbers on a GPU too, at some cost in speed.

    Where an operation has no such form, torch raises RuntimeError. Attention in a kernel whose backward pass is not
    deterministic is left out by torch itself. To be entered before CUDA starts: cuBLAS reads its workspace's form once.
    """
    variable = "CUBLAS_WORKSPACE_CONFIG"  # https://docs.nvidia.com/cuda/cublas/#results-reproducibility
    given = os.environ.get(variable)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    os.environ.setdefault(variable, ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False  # it chooses kernels by their time, which differs
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark
        if given is None:
            os.environ.pop(variable, None)


class Runtime:
    """What Accelerate gives a run: a device, autocast, fp16's loss scaler (or None), trackers, given `config`.

    To be closed by `end`, or used as a context. Raises InputError where the launcher and Accelerate count processes
    differently, for a tracker that is not installed, and for an engine that the launcher asks for and nobody starts.
    """

    def __init__(
        self,
        precision: Precision,
        *,
        trackers: Sequence[str] = (),
        folder: Path,
        config: Mapping[str, Any] | None = None,
        deterministic: bool = False,
    ) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

        refuse_missing(trackers)
        # one process may train several times, each time in another precision
        AcceleratorState._reset_state()
        try:
            with without_engines() as zero_stage:
                self._accelerator = Accelerator(
                    cpu=not torch.cuda.is_available(),  # else each of several CPU processes would believe it is alone
                    mixed_precision={"fp32": "no"}.get(precision, precision),
                    # an environment variable would override a plain gradient_accumulation_steps=1
                    gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
                    kwargs_handlers=[InitProcessGroupKwargs(timeout=TIME_LIMIT)],
                )
        except ValueError as error:  # its word for what the environment lacks
            raise InputError(f"Accelerate could not start: {error}. Start with `accelerate launch`.") from None
        atexit.register(leave)
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != self._accelerator.num_processes:
            raise InputError(
                f"The launcher started {launched} processes, and Accelerate sees {self._accelerator.num_processes}: "
                "on the CPU use `accelerate launch --multi_gpu --num_processes N -m lorakit train RECIPE`."
            )
        if (
            not torch.cuda.is_available()
            and "ACCELERATE_MIXED_PRECISION" in os.environ
            and "WORLD_SIZE" not in os.environ
        ):
            log.warning(
                "the launcher started one process: without a GPU `accelerate launch` starts no more, whatever "
                "--num_processes says, unless --multi_gpu is there (recipes/accelerate/cpu_x2.yaml)"
            )
        if zero_stage and rank() == 0:
            log.info(KEPT, zero_stage)
        self._closing = contextlib.ExitStack()
        if deterministic:
            self._closing.enter_context(reproducible())
        self._trackers = Trackers(trackers, folder=folder, config=config or {}) if trackers else None
        self.device: torch.device = self._accelerator.device
        self.scaler: torch.amp.GradScaler | None = self._accelerator.scaler
        if self.device.type == "cpu":
            keep_freed()
            threads = cap_threads(max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
            if rank() == 0:
                log.info("%s", threads)

    def autocast(self) -> AbstractContextManager[Any]:
        return cast("AbstractContextManager[Any]", self._accelerator.autocast())

    def track(self, record: Mapping[str, Any]) -> None:
        """Hands the numbers of a metrics record to the trackers, which the first call starts; never raises."""
        if self._trackers:
            self._trackers.log(record)

    def end(self) -> None:
        """Ends the trackers and puts torch's settings back; more often than once does no harm."""
        if self._trackers:
            self._trackers.end()
        self._closing.close()

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(self, *error: object) -> None:
        self.end()


def bar(*, unit: str, label: str | None = None, initial: int = 0, total: int | None = None) -> Any:
    """A progress bar, shown by rank 0 alone; one without a total comes after a second and goes again, but in logs."""
    from accelerate.utils import tqdm

    return tqdm(
        desc=label,
        unit=unit,
        initial=initial,
        total=total,
        leave=total is not None or not sys.stderr.isatty(),
        delay=0 if total is not None else 1,
        disable=rank() != 0,
        mininterval=0.1 if sys.stderr.isatty() else 10,  # a log file need not see every step
        dynamic_ncols=True,
    )
