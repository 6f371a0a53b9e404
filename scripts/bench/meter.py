"""What a process and all below it has used, and how sure a ratio of two series is."""

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil


def cpu_seconds() -> float:
    """CPU seconds of this process, of its children that have ended, and of those that run."""
    own, ended = time.process_time(), os.times()
    running = 0.0
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:  # it has just ended
            continue
        running += times.user + times.system
    return own + ended.children_user + ended.children_system + running


def gpu_counts() -> bool:
    """Whether a GPU works here, so that the clock's seconds count and its memory."""
    import torch

    return torch.cuda.is_available()


def clock() -> float:
    """Seconds that count: of the CPU, or the clock's when the GPU has done its work."""
    if not gpu_counts():
        return cpu_seconds()
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes() -> int:
    """The most memory that this process had: of the GPU where there is one, else resident."""
    if gpu_counts():
        import torch

        return torch.cuda.max_memory_allocated()
    # not getrusage's: that one remembers what the parent had when it forked
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


@dataclass(frozen=True)
class Ratio:
    """The median of ratios of pairs, and the range in which the true median lies with 95 % confidence (the k-th
    lowest to the k-th highest, k by the sign test; of fewer than six pairs the lowest to the highest)."""

    median: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.median:.3f} × ({self.low:.3f} … {self.high:.3f})"


def ratio(ours: Sequence[float], others: Sequence[float]) -> Ratio:
    """Of paired measurements: pairs were taken right after each other, so what else the machine does cancels out."""
    ratios = sorted(a / b for a, b in zip(ours, others, strict=True))
    count = len(ratios)
    cut = max(0, int(count / 2 - 0.98 * count**0.5))
    return Ratio(statistics.median(ratios), ratios[cut], ratios[count - 1 - cut], count)
