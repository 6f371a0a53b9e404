"""How many threads compute on a CPU, and how they wait for each other."""

import os
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: "200000 100000" is two cores' time


def let_waiting_sleep() -> None:
    """To be called before torch is imported, which reads it once; what the user has set stays.

    Threads that spin while they wait take the core from the one they wait for, where anything else runs: ten times the
    time of small operations on two busy cores (scripts/bench/waiting.py).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def usable_cores(quota: Path = _QUOTA) -> int:
    """The cores whose time this process may take: those it is bound to, and no more than its container has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        most, period = quota.read_text().split()
        return max(1, min(cores, int(most) // int(period)))
    except (OSError, ValueError):  # no container, or "max"
        return cores


def cap_threads(cores: int) -> str:
    """Lets torch compute with a thread for each of `cores` at most, unless OMP_NUM_THREADS says how many; in words."""
    import torch

    said = "OMP_NUM_THREADS" in os.environ
    if not said and torch.get_num_threads() > cores:
        torch.set_num_threads(cores)
    why = "as OMP_NUM_THREADS says" if said else f"of {cores} usable cores"
    wait = "sleep" if os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE" else "may spin"
    return f"CPU threads: {torch.get_num_threads()}, {why}; they {wait} while they wait for each other"
