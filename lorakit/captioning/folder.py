"""Which pictures of a folder lack captions, and the files beside them that captions are written into.

A picture's captions are the lines of the text file beside it, as the data side reads them. Not here: who writes them
(`template.py`, `vlm.py`, `tagger.py`).
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorakit.captioning import undo
from lorakit.core.errors import InputError
from lorakit.core.files import printable, write_text
from lorakit.data.images import suffixes
from lorakit.data.sources import Found, Item
from lorakit.data.sources.folder import FolderStorage, split_name


@dataclass(frozen=True)
class Work:
    """`todo` are pictures to write captions for, one for each file that they go into; `there` have captions already.

    `empty` are text files without a caption, which are left as they are: training does not take them.
    `problems` name what cannot be done. `kept` is what is written over.
    """

    todo: tuple[Item, ...]
    there: int
    problems: tuple[str, ...]
    empty: tuple[str, ...] = ()
    kept: undo.Kept | None = None


def storage(folder: Path) -> FolderStorage:
    """The pictures in `folder`; InputError where there is none."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"{printable(folder)} {what}: name a folder of pictures.")
    return FolderStorage(str(folder), 0)


def listed(folder: Path) -> tuple[list[Item], list[str]]:
    """All pictures in `folder`, and what is wrong there. InputError where it holds no picture."""
    found = Found()
    items = list(storage(folder).items(found))
    if not items and not found.problems:
        raise InputError(f"{printable(folder)} holds no pictures ({' '.join(sorted(suffixes()))}).")
    return items, found.problems


def work(folder: Path, *, overwrite: bool, made_by: str) -> Work:
    """What is to be done in `folder`, by what lies there now; so a run that was stopped goes on where it was.

    With `overwrite` pictures with captions come too, and these are kept in an undo file; where `made_by` left off
    writing over them, those that it has not come to.
    """
    items, problems = listed(folder)
    problems += [problem for item in items for problem in item.problems]
    items = [item for item in items if not item.problems]
    by_file = {sidecar(item): item for item in reversed(items)}  # one text may belong to several pictures: the first
    bare = {file: item for file, item in by_file.items() if not item.captions}
    todo, kept = dict(bare), None
    if overwrite:
        fixed = [item for item in by_file.values() if item.captions and not item.caption_file]
        problems += [
            f"{printable(folder / item.name)}: its captions stand in metadata or JSON, which is not written over: "
            "remove them there."
            for item in fixed
        ]
        over = {file: item for file, item in by_file.items() if item.caption_file}
        kept = undo.unfinished(folder, made_by=made_by)
        if kept is not None:
            before = kept.before
            over = {file: item for file, item in over.items() if undo.text_at(folder / file) == before.get(file)}
        elif over:
            texts = {file: undo.text_at(folder / file) for file in over}
            kept = undo.keep(folder, texts, made_by=made_by, finished=False)
        todo |= over
    ordered = tuple(sorted(todo.values(), key=lambda item: item.name))
    left = {file: item for file, item in by_file.items() if file not in todo}
    empty = tuple(sorted(file for file, item in left.items() if not any(item.captions)))
    return Work(ordered, len(left) - len(empty), tuple(problems), empty, kept)


def sidecar(item: Item) -> str:
    """The file that a picture's captions go into, by its path below the folder."""
    head, name = os.path.split(item.name)
    return item.caption_file or os.path.join(head, f"{split_name(name)[0]}.txt")


def put(folder: Path, item: Item, captions: Sequence[str]) -> None:
    """Writes a picture's captions, one on a line, whole or not at all."""
    write_text(folder / sidecar(item), "".join(f"{caption}\n" for caption in captions))


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
