"""Starting under Accelerate: processes, device, mixed precision, trackers.

What Accelerate is not used for, and why: gradients are summed by our own `core.processes.sum_tensors` (exact, and the
same for any split), and state is saved by `checkpoint.py` (Accelerate's hooks unpickle).
"""

import os
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin

from lorakit.core.errors import InputError

Precision = Literal["fp32", "bf16", "fp16"]


def resolve_precision(wanted: str) -> tuple[Precision, str]:
    """The precision that "auto" stands for here, and why; fp16 without a GPU is an InputError."""
    if wanted == "fp16" and not torch.cuda.is_available():
        raise InputError('run.precision = "fp16" needs a GPU, and there is none here: use "bf16" or "fp32".')
    if wanted != "auto":
        return wanted, "as the recipe says"  # type: ignore[return-value]
    if not torch.cuda.is_available():
        return "fp32", "there is no GPU"
    if torch.cuda.is_bf16_supported():
        return "bf16", "the GPU computes in it"
    return "fp16", "the GPU does not compute in bf16"


def start(precision: Precision, *, trackers: list[str], folder: Path) -> Accelerator:
    """This process's Accelerator. Raises InputError where the launcher and Accelerate count processes differently."""
    # one process may train several times, each time in another precision
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),  # without it each of several CPU processes would believe it is alone
        mixed_precision={"fp32": "no"}.get(precision, precision),
        log_with=trackers or None,
        project_dir=str(folder),
        # an environment variable would override a plain gradient_accumulation_steps=1
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise InputError(
            f"The launcher started {launched} processes, and Accelerate sees {accelerator.num_processes}: "
            "on the CPU use `accelerate launch --multi_gpu --num_processes N -m lorakit train RECIPE`."
        )
    return accelerator


def dtype_of(precision: Precision) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def scaler_of(accelerator: Accelerator) -> Any:
    """The loss scaler of fp16 training, or None."""
    return accelerator.scaler
