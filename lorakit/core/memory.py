"""What this process takes of the machine's memory, whether it lacks some, and giving back what it has freed."""

import contextlib
import ctypes
import gc
import mmap
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

_LACKING = re.compile(
    r"can't allocate memory|CU(BLAS|DNN|SPARSE)_STATUS_ALLOC_FAILED|CUDA\S* (error: )?out of memory|\bMemoryError\b"
)


def let_go() -> None:
    """Frees what nobody can reach any more, a model whose parts refer to each other for instance, and gives it back."""
    gc.unfreeze()  # what was there when a start had come to its end (core/start.py)
    gc.collect()
    give_back()


def give_back() -> None:
    """Returns freed memory to the system: glibc keeps pieces below 32 MB, as most of a model's weights are, and torch
    what was a GPU's."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def is_lack(error: BaseException) -> bool:
    """Whether `error` says that memory was lacking. torch has a class of its own for what its allocator of a GPU's
    memory lacks, and texts for what others lack: that of a CPU's, CUDA itself, the libraries that compute, other ranks.
    """
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or bool(_LACKING.search(str(error)))


def leave_file(tensor: Tensor) -> None:
    """Takes `tensor`, if it lies in the memory map of a file (Linux), out of memory: the map, which stays as long as
    any of the file's tensors, would keep it resident. Read again it is as it was in the file."""
    first, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    with contextlib.suppress(AttributeError, OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            span, _, _, _, _, *path = line.split(maxsplit=5)
            start, stop = (int(address, 16) for address in span.split("-"))
            if path and path[0].startswith("/") and start <= first and end <= stop:
                first, end = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
                if first < end:  # whole pages: neighbours share the outer ones
                    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED)
                return


def keep_freed() -> None:
    """Lets glibc keep what is freed for what is asked for next, whatever its size: each page that comes from the system
    is a fault, of which encoding a picture would have thousands."""
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, of malloc.h
            libc.mallopt(parameter, 1 << 30)


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
