"""What is made ahead, in other processes or in threads: pictures for the encoder, and a training's steps."""

import contextlib
import logging
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from lorakit.core import processes
from lorakit.core.errors import LorakitError, LostProcess
from lorakit.data.images import Prepared

Job = TypeVar("Job")

log = logging.getLogger("lorakit")

_READERS, _AHEAD = 2, 6

# workers that die are started again so often in a row; it is a new row after so many things made
_RESTARTS, _ENOUGH = 3, 100


def prepared(
    jobs: Sequence[tuple[str, str, Job]], part: NDArray[Any], prepare: Callable[[Job], Prepared], *, workers: int
) -> Generator[tuple[int, Prepared], None, None]:
    """The pictures of `part` in order, with their numbers, the next few already being prepared.

    `jobs` are asked for one at a time, where they are prepared: in `workers` processes, or in threads if that is 0.
    Raises what `prepare` raises.
    """
    pictures = _Pictures(jobs, prepare)
    numbers: list[int] = part.tolist()
    ahead = by_processes(pictures, numbers, workers) if workers and numbers else _by_threads(pictures, numbers)
    with contextlib.closing(ahead):
        for number, picture in zip(numbers, ahead):
            if isinstance(picture, LorakitError):
                raise picture
            yield number, picture


class _Pictures(TorchDataset, Generic[Job]):
    """Number of a job → its picture, or the error that a person should read: across processes a raised one would come
    wrapped in a traceback."""

    def __init__(self, jobs: Sequence[tuple[str, str, Job]], prepare: Callable[[Job], Prepared]) -> None:
        self._jobs, self._prepare = jobs, prepare

    def __getitem__(self, number: int) -> Prepared | LorakitError:
        try:
            return self._prepare(self._jobs[number][2])
        except LorakitError as error:
            return error


def _by_threads(pictures: _Pictures, numbers: Sequence[int]) -> Generator[Prepared | LorakitError, None, None]:
    waiting: deque[Future[Prepared | LorakitError]] = deque()
    pool = ThreadPoolExecutor(_READERS)
    try:
        for number in numbers:
            waiting.append(pool.submit(pictures.__getitem__, number))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def by_processes(made: TorchDataset, numbers: Sequence[int], workers: int) -> Generator[Any, None, None]:
    """`made[n]` of all `numbers`, in order and as they are, by worker processes that end with the generator.

    Where one of them dies (it was killed, or is out of memory) all are started again at the number that is next.
    Raises LostProcess where they die again and again.
    """
    done, deaths, since = 0, 0, 0
    while done < len(numbers):
        left = numbers[done:]
        with _Workers(made, left, workers) as ahead:
            try:
                for _ in left:
                    thing = next(ahead.things)
                    done, since = done + 1, since + 1
                    yield thing
            except (RuntimeError, OSError, EOFError) as error:
                died = ahead.died()
                if not died:
                    raise
                deaths, since = (1 if since > _ENOUGH else deaths + 1), 0
                said = f"a worker process that makes pictures and steps ready ended by itself ({died})"
                if deaths > _RESTARTS:
                    raise LostProcess(
                        f"{deaths} times in a row {said}: if the machine is out of memory, give a lower data.workers."
                    ) from error
                log.warning("%s: the workers are started again", said)


class _Workers:
    """Worker processes that make `made[n]` of `numbers`, in order: `things`. On leaving they end at once."""

    def __init__(self, made: TorchDataset, numbers: Sequence[int], workers: int) -> None:
        with warnings.catch_warnings(), _child_signals_unheard():
            # more workers than cores are slower, not wrong, and the user's choice
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            loader = DataLoader(
                made,
                batch_size=None,
                sampler=numbers,
                num_workers=min(workers, len(numbers)),
                collate_fn=_as_it_is,
                worker_init_fn=become_a_worker,
                # DataLoader draws a seed for its workers, by default from the global generator
                generator=torch.Generator(),
            )
            with processes.signals_held_back():
                self.things: Any = iter(loader)
        # torch's own names: in a version without them a death is an error as torch words it, and the end is slower
        self._processes = getattr(self.things, "_workers", ())

    def died(self) -> str:
        """How those ended that did so by themselves; empty if all are there."""
        for child in self._processes:
            child.join(0.1)  # its pipes are gone a moment before it is
        codes = {child.exitcode for child in self._processes if child.exitcode}
        return ", ".join(f"signal {-code}" if code < 0 else f"exit code {code}" for code in sorted(codes))

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *_: object) -> None:
        # an orderly end waits seconds for each that is busy, and for ever for a lock that a dead one holds
        with processes.signals_held_back():  # an exception while torch takes it down would be told and lost
            for child in self._processes:
                child.kill()
            self.things._workers_done_event = threading.Event()
            self.things = None


def become_a_worker(number: int) -> None:
    """What a worker process does first; `number` is its own."""
    processes.leave_signals_to_the_parent(number)
    sys.excepthook = _unless_the_parent_left


def _unless_the_parent_left(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The thread that hands tensors over tells through this hook too that the parent, interrupted, hung up on it."""
    if not issubclass(kind, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, trace)


@contextlib.contextmanager
def _child_signals_unheard() -> Iterator[None]:
    """Puts back what torch sets: its handler raises in the middle of whatever the main thread does when a worker dies.
    Without it the next number that is asked for finds out, within seconds."""
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # not in the main thread, where torch sets nothing either
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)


def _as_it_is(thing: Any) -> Any:
    return thing
