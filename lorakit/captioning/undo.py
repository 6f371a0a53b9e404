"""Captions as they were before something wrote over them, in a hidden file of their folder.

The file is whole before the first caption changes. A run that writes over many captions for hours goes by it too: what
stands there as it was before is still to be done.
"""

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lorakit.core.errors import InputError
from lorakit.core.files import printable, write_json, write_text

_GLOB = ".captions-undo-*.json"


@dataclass(frozen=True)
class Kept:
    """`before` has the texts of files by their paths below the folder, None of those that were not there.

    `made_by` says what wrote over them, and `finished` whether it came to its end.
    """

    file: Path
    made_by: str
    before: Mapping[str, str | None]
    finished: bool


def keep(folder: Path, before: Mapping[str, str | None], *, made_by: str, finished: bool) -> Kept:
    """Writes down what `before` says."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    kept = Kept(folder / _GLOB.replace("*", stamp), made_by, dict(before), finished)
    _write(kept)
    return kept


def finish(kept: Kept) -> None:
    _write(Kept(kept.file, kept.made_by, kept.before, finished=True))


def unfinished(folder: Path, *, made_by: str) -> Kept | None:
    """What was kept when `made_by` began what it did not end, the last time."""
    kept = (read(file) for file in sorted(folder.glob(_GLOB), reverse=True))
    return next((found for found in kept if found.made_by == made_by and not found.finished), None)


def newest(folder: Path) -> Kept | None:
    files = sorted(folder.glob(_GLOB))
    return read(files[-1]) if files else None


def read(file: Path) -> Kept:
    """What `file` keeps; InputError where it is no such file."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        before = {
            str(name): None if text is None else str(text) for name, text in values["before"].items() if _inside(name)
        }
        return Kept(file, str(values["made_by"]), before, bool(values["finished"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{printable(file)} is no undo file that can be read ({printable(error)}).") from None


def restore(folder: Path, kept: Kept) -> Kept:
    """Puts the texts back as they were, and keeps those of now: undoing the undoing is one more of the same."""
    now = {name: text_at(folder / name) for name in kept.before}
    kept_now = keep(folder, now, made_by="undo", finished=True)
    for name, text in kept.before.items():
        if text is None:
            (folder / name).unlink(missing_ok=True)
        elif text != now[name]:
            write_text(folder / name, text)
    return kept_now


def text_at(file: Path) -> str | None:
    """What stands in a file, byte for byte; None where there is none."""
    try:
        return file.read_bytes().decode("utf-8")
    except FileNotFoundError:
        return None


def _inside(name: str) -> bool:
    if name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f"{name} leads out of the folder")
    return True


def _write(kept: Kept) -> None:
    write_json(kept.file, {"made_by": kept.made_by, "finished": kept.finished, "before": dict(kept.before)})
