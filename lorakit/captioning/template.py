"""Captions from what is known without looking: names of folders and files, fields in the file, columns of metadata."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from lorakit.captioning.facts import IPTC, Facts
from lorakit.captioning.pictures import Picture
from lorakit.captioning.protocol import WriterSettings
from lorakit.core.errors import InputError
from lorakit.core.settings import did_you_mean
from lorakit.data.sources import metadata

_FIELD = re.compile(r"\{([^{}|=]+)(?:=([^{}|]*))?\}")  # {a|b} is a wildcard, which training knows and we leave alone
_PLACES = ("folder", "parent", "name", "path")
_FILES = ("exif", "iptc", "xmp", "column")


class Settings(WriterSettings):
    """A text with fields in braces."""

    kind: Literal["template"]

    template: str
    """The caption, with fields: `{folder}`, `{parent}` (the folder above it), `{name}` (the file's, without suffix),
    `{path}`, `{exif.Artist}`, `{iptc.keywords}`, `{xmp.subject}`, `{column.title}` (of metadata.jsonl or metadata.csv).
    `{exif.Artist=nobody}` says what stands where there is none; else such a picture is named and gets no caption."""

    plain_names: bool = True
    """Whether underscores and hyphens in names become blanks, and numbers at their end are left out."""


def check(settings: Settings) -> None:
    """Raises InputError for fields that there are not."""
    problems = []
    for field, _ in _FIELD.findall(settings.template):
        place, dot, rest = field.strip().partition(".")
        if place in _FILES and not rest:
            problems.append(f"template: {{{field}}} names no field: write {{{place}.something}}.")
        elif not (place in _FILES or (place in _PLACES and not dot)):
            problems.append(f"template: there is no field {{{field}}}.{did_you_mean(place, [*_PLACES, *_FILES])}")
        elif place == "iptc" and rest.lower() not in IPTC:
            problems.append(f"template: {{{field}}}: IPTC's fields here are {', '.join(IPTC)}.")
    if problems:
        raise InputError(problems)


def load(settings: Settings, *, root: Path, device: Any) -> "Template":
    return Template(settings, root)


class Template:
    """Fills a template for each picture."""

    batch_size = 64

    def __init__(self, settings: Settings, root: Path) -> None:
        self._settings, self._root = settings, root
        self._above = (root.resolve().name, root.resolve().parent.name)
        self._tables: dict[str, Mapping[str, Mapping[str, Any]]] = {}

    def __call__(self, pictures: Sequence[Picture]) -> list[tuple[str, ...] | ValueError]:
        return [self._filled(picture) for picture in pictures]

    def _filled(self, picture: Picture) -> tuple[str, ...] | ValueError:
        try:
            values = self._reader(picture)
            return (_FIELD.sub(lambda match: _value(values, match[1].strip(), match[2]), self._settings.template),)
        except OSError as error:
            return ValueError(f"it could not be read ({error.strerror})")
        except ValueError as error:
            return error

    def _reader(self, picture: Picture) -> Callable[[str], str]:
        """What gives a field's value of `picture`, "" where it has none; the file is read when it is needed."""
        path, facts = PurePosixPath(picture.name), None

        def value(field: str) -> str:
            nonlocal facts
            place, _, name = field.partition(".")
            if place == "column":
                return self._column(path, name)
            if place in _FILES:
                facts = facts or Facts(picture.read())
                return str(getattr(facts, place)(name))
            if place == "path":
                return str(path)
            above = [*(folder.name for folder in path.parents if folder.name), *self._above]
            return self._plain({"folder": above[0], "parent": above[1], "name": path.stem}[place])

        return value

    def _plain(self, name: str) -> str:
        if not self._settings.plain_names:
            return name
        # "IMG 0042" is all number: what would be left is no name of anything, and stays
        return re.sub(r"[_\-\s]*\(?\d+\)?$", "", name).replace("_", " ").replace("-", " ").strip() or name

    def _column(self, path: PurePosixPath, column: str) -> str:
        for folder in path.parents:
            row = self._table(str(folder)).get(str(path.relative_to(folder)), {})
            if row.get(column) not in (None, "", []):
                value = row[column]
                return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        return ""

    def _table(self, folder: str) -> Mapping[str, Mapping[str, Any]]:
        if folder not in self._tables:
            found: dict[str, Mapping[str, Any]] = {}
            for name in metadata.NAMES:
                file = self._root / folder / name
                if file.is_file():
                    with open(file, "rb") as opened:
                        found |= metadata.columns(opened, name)
            self._tables[folder] = found
        return self._tables[folder]


def _value(reader: Callable[[str], str], field: str, default: str | None) -> str:
    value = reader(field)
    if not value and default is None:
        raise ValueError(f"it has no {field}, which the template wants: write {{{field}=something}} for what has none")
    return value or default or ""
