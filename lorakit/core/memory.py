"""What this process takes of the machine's memory, and giving back what it has freed."""

import contextlib
import ctypes
import sys


def give_back() -> None:
    """Returns freed memory to the system: glibc keeps pieces below 32 MB, as most of a model's weights are."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def peak() -> int | None:
    """The most bytes that this process has had resident, if the system says."""
    if sys.platform == "win32":
        return None
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
