"""Starting under Accelerate: processes, device, mixed precision, trackers, the progress bar.

What Accelerate is not used for, and why: gradients are summed by our own `core.processes.sum_tensors` (the same bits
for any split), and state is saved by `checkpoint.py` (Accelerate's hooks unpickle).
"""

import atexit
import importlib.util
import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, cast

import torch

from lorakit.core.errors import InputError
from lorakit.core.processes import leave, rank

Precision = Literal["fp32", "bf16", "fp16"]


def resolve_precision(wanted: str) -> tuple[Precision, str]:
    """The precision that "auto" stands for here, and why; fp16 without a GPU is an InputError."""
    if wanted == "fp16" and not torch.cuda.is_available():
        raise InputError('run.precision = "fp16" needs a GPU, and there is none here: use "bf16" or "fp32".')
    if wanted != "auto":
        return cast("Precision", wanted), "as the recipe says"
    if not torch.cuda.is_available():
        return "fp32", "there is no GPU"
    if torch.cuda.is_bf16_supported():
        return "bf16", "the GPU computes in it"
    return "fp16", "the GPU does not compute in bf16"


class Runtime:
    """What Accelerate gives a run: a device, autocast, fp16's loss scaler (or None), trackers.

    Raises InputError where the launcher and Accelerate count processes differently.
    """

    def __init__(self, precision: Precision, *, trackers: list[str], folder: Path) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import GradientAccumulationPlugin

        missing = [name for name in trackers if importlib.util.find_spec(name) is None]
        if missing:  # Accelerate would go on without them
            raise InputError(
                [
                    f'run.trackers: {name} is not installed: pip install "lorakit[{name}]", or leave it out.'
                    for name in missing
                ]
            )
        # one process may train several times, each time in another precision
        AcceleratorState._reset_state()
        try:
            self._accelerator = Accelerator(
                cpu=not torch.cuda.is_available(),  # without it each of several CPU processes would believe it is alone
                mixed_precision={"fp32": "no"}.get(precision, precision),
                log_with=trackers or None,
                project_dir=str(folder),
                # an environment variable would override a plain gradient_accumulation_steps=1
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
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
        self._tracked = bool(trackers)
        self.device: torch.device = self._accelerator.device
        self.scaler: torch.amp.GradScaler | None = self._accelerator.scaler

    def autocast(self) -> AbstractContextManager[Any]:
        return cast("AbstractContextManager[Any]", self._accelerator.autocast())

    def track(self, record: Mapping[str, Any]) -> None:
        """Hands the numbers of a metrics record to the trackers, which the first call starts."""
        if not self._tracked:
            return
        if not self._accelerator.trackers:
            self._accelerator.init_trackers("lorakit")
        numbers = {name: value for name, value in record.items() if isinstance(value, float)}
        self._accelerator.log(numbers, step=record["step"])

    def end(self) -> None:
        if self._tracked:
            self._accelerator.end_training()


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
