"""What every kind of source speaks: the pictures that it lists, and all that was found wrong on the way.

Here: the nouns, and how a file's name becomes a key. Next: `folder.py`, `table.py` and `tars.py` list pictures.
"""

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from lorakit.core.files import printable
from lorakit.core.types import Place

Box = tuple[float, float, float, float]

MAX_PICTURE_BYTES = 1 << 30
"""Larger files are refused unread: no picture within the pixel limit comes near it."""

_ESCAPED = re.compile(r"\\(\\|[abfnrtv]|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})")


@dataclass
class Found:
    """What is being collected: `problems` end the run, `skipped` are bad pictures that are left out.

    `skip` says that bad pictures are to be left out.
    """

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    skip: bool = False

    def of_no_picture(self, key: str, what: str) -> None:
        """Notes a caption or mask that belongs to no picture, among the warnings too."""
        self.unused.append(f"{key}: {what} of no picture")
        self.warnings.append(self.unused[-1])

    def bad(self, key: str, label: str, reason: str) -> None:
        """Notes a picture that cannot be used: under its key where it is skipped, else as a problem of `label`."""
        if self.skip:
            self.skipped.append(f"{key}: {reason}")
        else:
            self.problems.append(f"{label}: {reason}.")


class Item(NamedTuple):
    """A picture as its storage lists it.

    `name` has / between its parts, is unescaped and unique in its source; `captions` are as written, () where there is
    none; `stamp` changes whenever the bytes may have changed, "" being unknown; `box` is left, top, right and bottom of
    what matters in it, in pixels of the upright picture; `problems` are what is wrong with its captions, complete
    messages, which count if the picture itself can be used. `caption_file` is the text file that the captions are, ""
    where they stand in something larger or there are none. `input` is the picture that an editing model begins with.
    """

    name: str
    place: Place
    captions: tuple[str, ...]
    stamp: str = ""
    mask: Place | None = None
    mask_stamp: str = ""
    box: Box | None = None
    problems: tuple[str, ...] = ()
    caption_file: str = ""
    input: Place | None = None
    input_stamp: str = ""


class Storage(Protocol):
    """One source's pictures: cheap to copy to other processes (it holds paths and opens lazily)."""

    @property
    def identity(self) -> str:
        """What tells this source from others wherever it is listed: the absolute path, for a start."""

    def items(self, found: Found) -> Iterator[Item]:
        """The pictures, in the order of their escaped names in folders; what is wrong goes to `found`."""

    def read(self, place: Place) -> bytes:
        """The bytes at `place`; OSError or ValueError say why not."""

    def label(self, name: str) -> str:
        """How messages name a picture: printable, and such that a person finds it."""

    def caption_advice(self, name: str) -> str:
        """Where a picture's missing caption would go, as an order: "write one into …"."""


def source_index(key: str) -> int:
    """Which of the sources an example's key belongs to."""
    return int(key.partition("/")[0])


def make_key(index: int, name: str) -> str:
    """The key of the picture `name` of source `index`."""
    return f"{index}/{escape(name)}"


def escape(name: str) -> str:
    """`name` on one line, different for different names: backslashes doubled, unprintable characters escaped."""
    if name.isprintable() and "\\" not in name:
        return name
    return printable(name.replace("\\", "\\\\"))


def unescape(text: str) -> str:
    """The name that `escape` made `text` of."""
    if "\\" not in text:
        return text
    return _ESCAPED.sub(_plain, text)


def _plain(match: re.Match[str]) -> str:
    code = match[1]
    if code[0] in "xuU":
        return chr(int(code[1:], 16))
    return {"\\": "\\", "a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}[code]


def read_regular(path: str, limit: int, *, start: int = 0, length: int = -1) -> bytes:
    """`length` bytes (-1: all) of a regular file from `start`.

    Opening never waits, as it would for a pipe. Raises OSError, and ValueError for what is no regular file, is longer
    than `limit`, or ends before `length`.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        state = os.fstat(handle)
        if not stat.S_ISREG(state.st_mode):
            raise ValueError("it is no regular file")
        if length < 0:
            length = state.st_size - start
        if length > limit:
            raise ValueError(f"it has over {limit // 10**6} MB: make it smaller")
        parts = []
        wanted = length
        while wanted > 0 and (part := os.pread(handle, wanted, start)):
            parts.append(part)
            start += len(part)
            wanted -= len(part)
        if wanted > 0:
            raise ValueError("it ends too early: copy it again")
        return parts[0] if len(parts) == 1 else b"".join(parts)
    finally:
        os.close(handle)
