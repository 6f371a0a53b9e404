"""What this process takes of the machine's memory, whether it lacks some, and giving back what it has freed."""

import contextlib
import ctypes
import sys
from pathlib import Path

import torch


def give_back() -> None:
    """Returns freed memory to the system: glibc keeps pieces below 32 MB, as most of a model's weights are."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def is_lack(error: BaseException) -> bool:
    """Whether `error` says that memory was lacking; torch has a class of its own for it on GPUs alone."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def forget_peak() -> None:
    """From here `peak` is measured anew, where the system lets us (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int | None:
    """The most bytes that this process has had resident, if the system says."""
    if sys.platform == "win32":
        return None
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
