"""What each example of a run was, so that a run that is to go on can say which picture has changed since.

A line per example: its key, and a mark that depends on its pictures, captions, mask, focus and role.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from lorakit.core.files import printable, write_bytes
from lorakit.core.types import Example
from lorakit.data.examples import Examples

_SHOWN = 20


def mark(example: Example) -> str:
    parts = [example.digest, *example.captions, example.mask_digest, str(example.focus), example.role]
    parts += [example.input_digest] if example.input else []
    return hashlib.sha256("\x1f".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def write_marks(path: Path, examples: Examples) -> None:
    """Raises StorageError where the disk refuses."""
    lines = (json.dumps([example.key, mark(example)]) + "\n" for example in examples)
    write_bytes(path, "".join(lines).encode())


def changes(path: Path, examples: Examples) -> list[str]:
    """What is new, gone or changed against the list at `path`; empty where nothing is, or there is no such list."""
    before = dict(_read(path))
    if not before:
        return []
    found = []
    for example in examples:
        was = before.pop(example.key, None)
        if was is None:
            found.append(f"{printable(example.key)} is new: take it out.")
        elif was != mark(example):
            found.append(f"{printable(example.key)} has changed, or its caption or mask: put it back as it was.")
    found += [f"{printable(key)} is gone: put it back." for key in before]
    return found[:_SHOWN] + ([f"… and {len(found) - _SHOWN} more."] if len(found) > _SHOWN else [])


def _read(path: Path) -> Iterator[tuple[str, str]]:
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            key, value = json.loads(line)
            yield key, value
