"""How many processes train together, which of them this is, and what they say to each other.

Thin functions on torch.distributed that are right with one process too, so that nobody asks whether it is initialised.
Starting the processes is Accelerate's work (training/).
"""

import contextlib
import ctypes
import datetime
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorakit.core.errors import LorakitError, LostProcess
from lorakit.core.memory import is_lack

T = TypeVar("T")

HEARTBEAT = 15.0
"""Seconds after which processes meet at the latest: a collective that waits for hours runs into its time limit."""

TIME_LIMIT = datetime.timedelta(minutes=10)
"""What a collective waits for the others before it takes them for lost. One that has died is noticed at once; this is
for one that hangs. It is as long as the longest step that is not wrong: the first one, which may compile for minutes.
All else that takes long meets every HEARTBEAT."""

_PATIENCE = 10.0  # seconds that an action is given to end when the process wants to leave

_OF_THE_GROUP = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1  # of Linux's <sys/prctl.h>


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def barrier() -> None:
    if world() > 1:
        with _together():
            dist.barrier()


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Around what needs all ranks: raises LostProcess where another has gone."""
    try:
        yield
    except RuntimeError as error:  # gloo and NCCL have no class of their own for it
        if is_lack(error):
            raise
        why = f"{error}".partition(". This is typically")[0].rpartition("] ")[2]  # gloo's, without its source line
        raise LostProcess(
            f"Another of the {world()} processes has ended or does not answer: look at what it said. "
            f"What was saved is there to go on from. (rank {rank()}: {why})"
        ) from error


def leave() -> None:
    """Ends the connection to the others; without it gloo's threads now and then abort a process that is done."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def end_now(code: int) -> NoReturn:
    """Ends this process without waiting for its threads: for one of a pool, whose start was cut short by a signal's
    exception so that the pool does not know it, the interpreter would wait for ever (seen in Python 3.11)."""
    leave()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in rank order, on every rank."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    with _together():
        dist.all_gather_object(values, value)
    return values


def on_first_rank(action: Callable[[], T]) -> T:
    """What `action` returns on rank 0, on every rank; what it raises there, every rank raises.

    It may take hours: with several ranks it runs in a thread, and all meet every HEARTBEAT seconds until it is done.
    Where rank 0 is interrupted, or another rank is lost, it is made to end before the error leaves.
    """
    if world() == 1:
        return action()
    outcome: list[Any] = [False, None, None]
    if rank() != 0:
        while not outcome[0]:
            with _together():
                dist.broadcast_object_list(outcome, src=0)
    else:
        call = _Call(action)
        try:
            while not outcome[0]:
                outcome = call.outcome(HEARTBEAT)
                with _together():
                    dist.broadcast_object_list([*outcome[:2], portable(outcome[2])], src=0)
        finally:
            call.outcome(_PATIENCE)  # what is nearly done, as a checkpoint, is worth the wait
            call.end()
    error = outcome[2]
    if isinstance(error, LorakitError):
        error.everywhere = True
    if error is not None:
        raise error
    return outcome[1]


def together(action: Callable[[], T]) -> T:
    """What `action` returns on this rank, once all are done with theirs; what it raises on one, every rank raises."""
    result, failure = None, None
    try:
        result = action()
    except (Exception, KeyboardInterrupt) as error:
        failure = error
    raise_first(gather_objects(portable(failure)), own=failure)
    return cast("T", result)


def on_each_rank(action: Callable[[], T]) -> list[T]:
    """What `action` returns on every rank, in rank order, on every rank; what it raises on one, every rank raises.

    It may take hours, and longer on one rank than on another: as `on_first_rank` for the rest. So it must not itself
    speak with other ranks.
    """
    if world() == 1:
        return [action()]
    call = _Call(action)
    try:
        while True:
            done, result, failure = call.outcome(HEARTBEAT)
            outcomes = gather_objects((done, result, portable(failure)))
            raise_first([error for _, _, error in outcomes], own=failure)
            if all(done for done, _, _ in outcomes):
                return [result for _, result, _ in outcomes]
    finally:
        call.end()


def raise_first(errors: Sequence[BaseException | None], *, own: BaseException | None = None) -> None:
    """Raises, on every rank, the first of the ranks' gathered `errors`; this rank's `own` as it was, with its trace."""
    for of_rank, error in enumerate(errors):
        if error is not None:
            error = own if of_rank == rank() and own is not None else error
            if isinstance(error, LorakitError):
                error.everywhere = True
            raise error


def first_to_say(what: str) -> bool:
    """Whether no other rank has asked so before, or nobody knows any more: a launcher's store does, the first rank's
    goes with it."""
    if world() == 1:
        return True
    call = _Call(lambda: dist.distributed_c10d._get_default_store().add(f"said: {what}", 1) == 1)
    done, first, error = call.outcome(_PATIENCE)
    return not done or error is not None or first


def meet(seconds: float) -> bool:
    """Waits until all ranks are here, but no longer than this; False where one does not come or is lost."""
    try:
        return world() == 1 or dist.barrier(async_op=True).wait(datetime.timedelta(seconds=seconds)) is not False
    except RuntimeError:
        return False


def portable(error: BaseException | None) -> BaseException | None:
    """`error` as other ranks can raise it: one of a library may not survive the journey."""
    if error is None or isinstance(error, LorakitError | KeyboardInterrupt):
        return error
    return RuntimeError(f"rank {rank()} failed: {type(error).__name__}: {error}")


class _Call:
    """`action` running in a thread, which does not keep the process alive."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self._outcome: list[Any] = [False, None, None]
        # of the thread that asks; a new one would begin with the first GPU
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._done = threading.Event()  # an interrupted Thread.join takes the thread for ended (Python 3.11)
        self._thread = threading.Thread(target=self._run, args=(action,), daemon=True)
        self._thread.start()

    def _run(self, action: Callable[[], Any]) -> None:
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)
            self._outcome = [True, action(), None]
        except BaseException as error:
            self._outcome = [True, None, error]
        finally:
            self._done.set()

    def outcome(self, timeout: float) -> list[Any]:
        """Whether it is done, what it returned and what it raised, after at most `timeout` seconds; an interrupt of
        the waiting ends it and counts as raised by it."""
        try:
            self._done.wait(timeout)
        except KeyboardInterrupt as error:
            self.end()
            return [True, None, error]
        return self._outcome

    def end(self) -> None:
        """Raises in the thread, if it has something to do, and waits until it has cleaned up: for _PATIENCE seconds, as
        it may be in a call that takes long."""
        if not self._done.is_set():
            thread = ctypes.c_ulong(self._thread.ident or 0)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(KeyboardInterrupt))
            self._done.wait(_PATIENCE)


@contextlib.contextmanager
def signals_held_back() -> Iterator[None]:
    """While workers are started or taken down: a new one would die of a signal to the group before it has its handlers,
    and an exception would leave their queues half made. What comes meanwhile is heard afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_GROUP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_the_parent(worker: int) -> None:
    """For a DataLoader's workers. A signal often reaches the whole process group: the parent needs them for the step
    that it ends with. A second SIGTERM ends them, and so does the parent's end."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _obey_the_next)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _OF_THE_GROUP)
    # a killed parent cannot end its workers, and while they live they hold what it had locked
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _obey_the_next(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)


def sum_tensors(tensors: Iterable[Tensor]) -> None:
    """Adds up `tensors` over the ranks, in place and in rank order.

    Each rank sums one part of a flat buffer of them all, and then all have all parts: a rank hears twice what the
    tensors take, however many ranks there are. Not an all-reduce, whose order may depend on the number of elements.
    """
    if world() == 1:
        return
    tensors = list(tensors)
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    parts = nn.functional.pad(flat, (0, -len(flat) % world())).view(world(), -1)
    of_ranks = torch.empty_like(parts)
    with _together():
        dist.all_to_all_single(of_ranks, parts)
        own = of_ranks[0].clone()
        for part in of_ranks[1:]:
            own += part
        dist.all_gather(list(parts), own)
    total, offset = parts.reshape(-1), 0
    for tensor in tensors:
        tensor.copy_(total[offset : offset + tensor.numel()].view_as(tensor))
        offset += tensor.numel()
