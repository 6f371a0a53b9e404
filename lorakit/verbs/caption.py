"""Captions written for the pictures of a folder, by all processes together; a run that was stopped goes on."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorakit import captioning
from lorakit.captioning.folder import Work, digest, put, storage, work
from lorakit.captioning.pictures import Picture
from lorakit.captioning.protocol import Writer, WriterSettings
from lorakit.captioning.undo import finish
from lorakit.core.errors import InputError
from lorakit.core.memory import is_lack
from lorakit.core.processes import gather_objects, on_first_rank, rank, together, world
from lorakit.core.quiet import quiet_libraries
from lorakit.data.sources import Item
from lorakit.training.interrupt import watched
from lorakit.training.preflight import check_writable
from lorakit.training.processes import Runtime, bar


@dataclass(frozen=True)
class Captioned:
    """So many pictures got captions, so many others had some; `problems` name those that could not get any.

    `undo` is the file that keeps what was written over, `empty` are text files without a caption that were left.
    """

    written: int
    there: int
    problems: tuple[str, ...]
    undo: Path | None
    empty: tuple[str, ...] = ()


def caption(folder: Path, writers: Sequence[WriterSettings], *, overwrite: bool = False) -> Captioned:
    """Lets `writers` write captions beside the pictures in `folder` that have none, with `overwrite` beside all.

    A picture's captions are written as soon as it is done. Pictures that cannot be read stop nothing: they are in the
    result. Raises InputError for what is wrong with the writers, or where there are no pictures.
    """
    quiet_libraries()
    with watched() as interrupt, Runtime("fp32", folder=folder) as runtime:
        todo = on_first_rank(lambda: _begin(folder, writers, overwrite=overwrite))
        if not todo.todo:
            return Captioned(0, todo.there, todo.problems, None, todo.empty)
        writer = together(lambda: captioning.load_writers(writers, root=folder, device=runtime.device))
        problems, written = list(todo.problems), 0
        with contextlib.closing(bar(unit="picture", label="captioning", total=len(todo.todo))) as progress:
            # a batch each in turn: who is slow keeps the others waiting for a batch and not for an hour
            for first in range(0, len(todo.todo), writer.batch_size * world()):
                turn = todo.todo[first : first + writer.batch_size * world()]
                found: list[list[str]] = gather_objects(
                    together(lambda: _batch(writer, turn[rank() :: world()], folder, interrupt.check))  # noqa: B023
                )
                bad = [problem for of_rank in found for problem in of_rank]
                problems += bad
                written += len(turn) - len(bad)
                progress.update(len(turn))
        if (kept := todo.kept) is not None:
            on_first_rank(lambda: finish(kept))
        return Captioned(written, todo.there, tuple(problems), kept.file if kept else None, todo.empty)


def _begin(folder: Path, writers: Sequence[WriterSettings], *, overwrite: bool) -> Work:
    captioning.check_settings(writers)
    storage(folder)
    check_writable(folder)
    return work(folder, overwrite=overwrite, made_by=f"caption {digest(repr(writers))}")


def _batch(writer: Writer, items: Sequence[Item], folder: Path, check: Callable[[], object]) -> list[str]:
    """Writes the captions of `items`, and returns what is wrong with those that get none."""
    check()
    if not items:
        return []
    source, problems = storage(folder), []
    pictures = [Picture(item.name, lambda place=item.place: source.read(place)) for item in items]  # type: ignore[misc]
    try:
        outcomes = writer(pictures)
    except (RuntimeError, MemoryError) as error:
        if not is_lack(error):
            raise
        raise InputError(
            f"there is not enough memory for {len(items)} pictures at a time: lower --batch-size, or load the model in "
            "fewer bits (--dtype bf16, --quantize 4bit). What was written so far stays."
        ) from error
    for item, outcome in zip(items, outcomes, strict=True):
        if isinstance(outcome, ValueError):
            problems.append(f"{source.label(item.name)}: {outcome}.")
        elif not all(outcome):
            problems.append(f"{source.label(item.name)}: nothing was written for it.")
        else:
            put(folder, item, outcome)
    return problems
