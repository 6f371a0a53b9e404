"""What is made ahead, in other processes or in threads: pictures for the encoder, and a training's steps."""

import contextlib
import warnings
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from lorakit.core import processes
from lorakit.core.errors import LorakitError
from lorakit.data.images import Prepared

Job = TypeVar("Job")

_READERS, _AHEAD = 2, 6


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
    """`made[n]` of all `numbers`, in order and as they are, by worker processes that end with the generator."""
    with warnings.catch_warnings():
        # more workers than cores are slower, not wrong, and the user's choice
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader = DataLoader(
            made,
            batch_size=None,
            sampler=numbers,
            num_workers=min(workers, len(numbers)),
            collate_fn=_as_it_is,
            worker_init_fn=processes.leave_signals_to_the_parent,
            # DataLoader draws a seed for its workers, by default from the global generator
            generator=torch.Generator(),
        )
        ahead = iter(loader)
    yield from ahead


def _as_it_is(thing: Any) -> Any:
    return thing
