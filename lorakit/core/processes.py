"""How many processes train together, which of them this is, and what they say to each other.

Thin functions on torch.distributed that are right with one process too, so that nobody asks whether it is initialised.
Starting the processes is Accelerate's work (training/).
"""

import ctypes
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

HEARTBEAT = 15.0
"""Seconds after which processes meet at the latest: a collective that waits for hours runs into its time limit."""


_PR_SET_PDEATHSIG = 1  # of Linux's <sys/prctl.h>


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def barrier() -> None:
    if world() > 1:
        dist.barrier()


def leave() -> None:
    """Ends the connection to the others; without it gloo's threads now and then abort a process that is done."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in rank order, on every rank."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def on_first_rank(action: Callable[[], T]) -> T:
    """What `action` returns on rank 0, on every rank; what it raises there, every rank raises.

    It may take hours: with several ranks it runs in a thread, and all meet every HEARTBEAT seconds until it is done.
    """
    if world() == 1:
        return action()
    call = _Call(action) if rank() == 0 else None
    outcome: list[Any] = [False, None, None]
    while not outcome[0]:
        if call:
            outcome = call.outcome(HEARTBEAT)
        dist.broadcast_object_list(outcome, src=0)
    if outcome[2] is not None:
        raise outcome[2]
    return outcome[1]


class _Call:
    """`action` running in a thread, which does not keep the process alive."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self._outcome: list[Any] = [False, None, None]
        self._thread = threading.Thread(target=self._run, args=(action,), daemon=True)
        self._thread.start()

    def _run(self, action: Callable[[], Any]) -> None:
        try:
            self._outcome = [True, action(), None]
        except BaseException as error:
            self._outcome = [True, None, error]

    def outcome(self, timeout: float) -> list[Any]:
        """Whether it is done, what it returned and what it raised, after at most `timeout` seconds."""
        self._thread.join(timeout)
        return self._outcome


def leave_signals_to_the_parent(worker: int) -> None:
    """For a DataLoader's workers. Ctrl-C reaches the whole process group: the parent saves and then ends its workers,
    by SIGTERM if need be, which must not meet a handler that the parent had set for itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # a killed parent cannot end its workers, and while they live they hold what it had locked
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def sum_tensors(tensors: Iterable[Tensor]) -> None:
    """Adds up `tensors` over the ranks, in place and in rank order: one gather of one flat buffer.

    A gather and a sum in a fixed order, not an all-reduce, whose order may depend on the number of elements.
    """
    if world() == 1:
        return
    tensors = list(tensors)
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    parts = [torch.empty_like(flat) for _ in range(world())]
    dist.all_gather(parts, flat)
    total = parts[0]
    for part in parts[1:]:
        total += part
    offset = 0
    for tensor in tensors:
        tensor.copy_(total[offset : offset + tensor.numel()].view_as(tensor))
        offset += tensor.numel()
