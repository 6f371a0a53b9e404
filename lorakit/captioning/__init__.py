"""Floor 3: captions written for pictures, one file for each kind of writer.

A kind's module defines `Settings` (of `protocol.WriterSettings`), `check(settings)` (raises InputError for what can be
told without loading a model) and `load(settings, *, root, device) -> Writer`. Beside them lies what all share:
`folder.py` says which pictures lack captions and puts them there, `undo.py` keeps what was there before. `texts/` works
on captions that are written already.
"""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorakit.captioning.pictures import Picture
from lorakit.captioning.protocol import Writer, WriterSettings, one_line, pattern, worded
from lorakit.core.errors import InputError
from lorakit.core.files import printable
from lorakit.core.registry import Registry
from lorakit.core.settings import validate

SHARED = frozenset({"protocol", "facts", "folder", "models", "pictures", "prompts", "undo"})  # files that are no kind
WRITERS = Registry("lorakit.captioning", "kind of caption writer", SHARED)


def validate_settings(values: dict[str, Any]) -> tuple[WriterSettings, ...]:
    """The settings of the writer that `values` describe and, where there is a table `combine`, of the second one.

    The kind follows from what else is given, where it is not named. Raises InputError with all that is wrong.
    """
    values = dict(values)
    second = values.pop("combine", None)
    if second is not None and not isinstance(second, dict):
        raise InputError(f"combine = {second!r}: it is a table, of the writer whose text comes second.")
    tables = [("", values)] + ([("combine", second)] if second is not None else [])
    made, problems = [], []
    for where, table in tables:
        try:
            kind = table.get("kind") or _kind(table, where)
            settings = WRITERS.module(kind, where=f"{where}.kind".lstrip(".")).Settings
            made.append(validate(settings, {**table, "kind": kind}, where=where, name=str(kind)))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return tuple(made)


def _kind(table: dict[str, Any], where: str) -> str:
    from lorakit.captioning.models import kind_at

    if "template" in table:
        return "template"
    if "model" not in table:
        raise InputError(
            f"{where + ': ' if where else ''}there is nothing to write captions with: name a model (--model, a folder "
            'or a hub name), or give a --template, like "a photo of {folder}".'
        )
    return kind_at(str(table["model"]))


def read_settings(file: Path) -> dict[str, Any]:
    """The settings in a TOML file; relative paths of models in it are relative to it."""
    shown = printable(file)
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{shown} cannot be read ({error.strerror}): name a TOML file of captioning settings."
        ) from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{shown} is not valid TOML: {error}.") from None
    for table in (values, values.get("combine")):
        if isinstance(table, dict) and isinstance(table.get("model"), str):
            beside = file.parent / table["model"]
            table["model"] = str(beside.resolve()) if beside.exists() else table["model"]
    return values


def check_settings(writers: Sequence[WriterSettings]) -> None:
    """Raises InputError with all that is wrong with the writers and can be told before a model is loaded."""
    problems: list[str] = []
    for settings in writers:
        try:
            for old, new in settings.replace:
                pattern(old, new, regex=settings.regex)
            WRITERS.module(settings.kind).check(settings)
        except ValueError as error:
            problems.append(f"replace: {error}")
        except InputError as error:
            problems += error.problems
    if len(writers) > 1 and writers[1].texts > 1:
        problems.append(f"combine: it writes {writers[1].texts} texts for a picture, and one is put behind the first.")
    if problems:
        raise InputError(problems)


def load_writers(writers: Sequence[WriterSettings], *, root: Path, device: Any) -> Writer:
    """One writer that does as all of `writers` together: the second's text stands behind the first's."""
    first, *second = (WRITERS.module(settings.kind).load(settings, root=root, device=device) for settings in writers)
    if second:
        first = Combined(first, Worded(second[0], writers[1]))
    return Worded(first, writers[0])


class Worded:
    """What a writer says, as captions: on one line, with what its settings replace and put around it."""

    def __init__(self, writer: Writer, settings: WriterSettings) -> None:
        self._writer, self._settings, self.batch_size = writer, settings, writer.batch_size

    def __call__(self, pictures: Sequence[Picture]) -> list[tuple[str, ...] | ValueError]:
        return [
            said if isinstance(said, ValueError) else tuple(worded(text, self._settings) for text in said)
            for said in self._writer(pictures)
        ]


class Combined:
    """A sentence, then tags: every text of the first writer with the second one's behind it."""

    def __init__(self, first: Writer, second: Writer) -> None:
        self._first, self._second = first, second
        self.batch_size = min(first.batch_size, second.batch_size)

    def __call__(self, pictures: Sequence[Picture]) -> list[tuple[str, ...] | ValueError]:
        both = zip(self._first(pictures), self._second(pictures), strict=True)
        return [_joined(texts, tags) for texts, tags in both]


def _joined(texts: tuple[str, ...] | ValueError, tags: tuple[str, ...] | ValueError) -> tuple[str, ...] | ValueError:
    if isinstance(texts, ValueError):
        return texts
    if isinstance(tags, ValueError):
        return tags
    lines = [one_line(text) for text in texts]
    return tuple(f"{line}{' ' if line[-1:] in '.!?,;' else ', '}{tags[0]}" if tags[0] else line for line in lines)
