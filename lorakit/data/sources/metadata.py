"""`metadata.jsonl` and `metadata.csv`: captions and boxes of many pictures in one file (the imagefolder convention).

A row names its picture by `file_name`, relative to the file's own folder. At most a megabyte of a line is ever held.
"""

import contextlib
import csv
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

from lorakit.core.files import printable
from lorakit.data.sources.sidecars import MAX_CAPTION_BYTES, NOT_UTF8, Said, from_mapping, parse_json

NAMES = ("metadata.jsonl", "metadata.csv")
_MAX_PROBLEMS = 20  # of one file: more of the same help nobody


class Row(NamedTuple):
    """What line `line` says of a picture."""

    line: int
    said: Said


@dataclass
class Metadata:
    """The rows of one file by their pictures' names; `problems` go with lines."""

    rows: dict[str, Row] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def leftover(self) -> list[str]:
        """What is wrong with the rows that no picture has taken."""
        texts = [
            f"line {row.line}: file_name '{printable(name)}' leads to no picture" for name, row in self.rows.items()
        ]
        return _some([f"{text}: correct or remove it" for text in texts])


def read(file: IO[bytes], kind: str, *, caption_key: str | None) -> Metadata:
    """The rows of a file named `kind`, of NAMES."""
    found = Metadata()
    for line, values in _rows(file, kind, found.problems):
        try:
            name = _name(values)
            said = from_mapping(values, caption_key=caption_key)
            if name in found.rows:
                raise ValueError(f"'{printable(name)}' has a row already, line {found.rows[name].line}: keep one")
        except ValueError as error:
            found.problems.append(f"line {line}: {error}")
            continue
        found.rows[name] = Row(line, said)
    found.problems = _some(found.problems)
    return found


def columns(file: IO[bytes], kind: str) -> dict[str, dict[str, Any]]:
    """All that a file named `kind`, of NAMES, says of each picture; rows that cannot be read are left out."""
    found: dict[str, dict[str, Any]] = {}
    for _, values in _rows(file, kind, []):
        with contextlib.suppress(ValueError):
            found.setdefault(_name(values), values)
    return found


def _rows(file: IO[bytes], kind: str, problems: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = _lines(file, problems)
    return _json_rows(lines, problems) if kind.endswith(".jsonl") else _csv_rows(lines, problems)


def _some(texts: list[str]) -> list[str]:
    if len(texts) <= _MAX_PROBLEMS:
        return texts
    return [*texts[:_MAX_PROBLEMS], f"{len(texts) - _MAX_PROBLEMS} more of its lines are wrong"]


def _name(values: dict[str, Any]) -> str:
    name = values.get("file_name")
    if not isinstance(name, str) or not name:
        raise ValueError("it has no file_name: name a picture")
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise ValueError(f"file_name '{printable(name)}' leads out of the folder: put the picture into it")
    return posixpath.normpath(name)


def _lines(file: IO[bytes], problems: list[str]) -> Iterator[tuple[int, str]]:
    """The numbered lines with their ends; what cannot be used is left out and noted."""
    number = 0
    while line := file.readline(MAX_CAPTION_BYTES + 1):
        number += 1
        if len(line) > MAX_CAPTION_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_CAPTION_BYTES)
            problems.append(f"line {number}: it is longer than {MAX_CAPTION_BYTES // 1_000_000} MB: shorten it")
            continue
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            problems.append(f"line {number}: {NOT_UTF8.format(error.start)}")


def _json_rows(lines: Iterator[tuple[int, str]], problems: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            values = parse_json(line)
            if not isinstance(values, dict):
                raise ValueError('it is no JSON object: write {"file_name": …, "text": …}')
        except ValueError as error:
            problems.append(f"line {number}: {str(error).replace('line 1, ', '')}")
            continue
        yield number, values


def _csv_rows(lines: Iterator[tuple[int, str]], problems: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    at = 0

    def texts() -> Iterator[str]:
        nonlocal at
        for number, line in lines:
            at = number
            yield line

    # csv itself refuses fields of over 128 KB, so that an open quote does not swallow the file
    reader = csv.reader(texts(), strict=True)
    try:
        header = next(reader, [])
        if "file_name" not in header:
            names = ", ".join(printable(name) for name in header[:20]) or "none"
            problems.append(f"line 1: there is no column file_name (columns: {names}): name it in the first line")
            return
        for values in reader:
            if not values:
                continue
            if len(values) != len(header):
                problems.append(
                    f"line {at}: it has {len(values)} fields where the first line has {len(header)}: "
                    'write captions with commas between quotes, "like, this"'
                )
                continue
            yield at, dict(zip(header, values))
    except csv.Error as error:
        problems.append(f"line {at}: it is no CSV ({error}), and what follows is not read: mend it")
