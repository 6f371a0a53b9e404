"""Folders of pictures with their captions beside them, read once before training: every picture decoded to its end.

Here: which examples there are, and all that is wrong with them, reported at once. Not here: the picture's pixels
(`images.py`), its bucket (`buckets.py`), the walk over the folder (`folder.py`).
"""

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field

from lorakit.core.errors import InputError
from lorakit.core.files import printable
from lorakit.core.settings import Settings
from lorakit.core.types import Example
from lorakit.data import folder, images

MAX_CAPTION_BYTES = 1_000_000
# decoding releases the interpreter's lock; more threads would hold more large pictures in memory
_THREADS = min(4, os.cpu_count() or 1)


class SourceSettings(Settings):
    """A folder of pictures with captions: `a.jpg` with `a.txt` beside it, in any depth."""

    path: str
    """The folder; hidden files and folders in it are left out."""

    role: Literal["train", "regularization"] = "train"
    """`regularization`: pictures of what the model shall keep, drawn as often as all training pictures together."""

    repeats: int = Field(default=1, ge=1, le=1_000_000)
    """How often each picture is seen in an epoch (of a regularization source: how often relative to the others)."""

    weight: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    """Factor on the loss of this source's pictures."""

    trigger: str = ""
    """Put before every caption, with a space between."""

    default_caption: str | None = None
    """The caption of pictures that have none of their own."""

    allow_missing_captions: bool = False
    """Whether pictures without a caption may be trained on (with the trigger alone, if there is one)."""

    caption_dropout: float = Field(default=0.0, ge=0.0, le=1.0, allow_inf_nan=False)
    """Chance that a sample's caption is dropped as a whole, so that the model still knows what none means."""


@dataclass(frozen=True)
class Scan:
    """What the sources hold; `skipped` are the bad pictures that were left out, with the reason.

    Both texts name files by their keys: they may be passed on and hold no absolute path.
    """

    examples: tuple[Example, ...]
    warnings: tuple[str, ...]
    skipped: tuple[str, ...]


@dataclass
class _Found:
    """What is being collected, source after source."""

    examples: list[Example] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def source_index(key: str) -> int:
    """Which of the sources an example's key belongs to."""
    return int(key.partition("/")[0])


def scan(
    sources: Sequence[SourceSettings],
    *,
    size_problem: Callable[[tuple[int, int]], str | None] = lambda size: None,
    on_bad_image: Literal["error", "skip"] = "error",
) -> Scan:
    """All examples of `sources`, by source and then by key.

    `size_problem` says of an upright picture's (width, height) why it cannot be used, if so. With `on_bad_image` "skip"
    what is no usable picture is left out and named. Raises InputError with everything that is wrong: no such folder, no
    pictures, bad pictures, missing or doubled or unreadable captions, links out of the folder.
    """
    found = _Found()
    if not sources:
        raise InputError("data.sources is empty: name a folder of pictures, e.g. data.sources.0.path=photos")
    for index, source in enumerate(sources):
        _scan_source(source, index, found, size_problem=size_problem, skip=on_bad_image == "skip")
    if found.problems:
        raise InputError(found.problems)
    return Scan(tuple(found.examples), (*found.warnings, *_duplicates(found.examples)), tuple(found.skipped))


def _scan_source(
    source: SourceSettings,
    index: int,
    found: _Found,
    *,
    size_problem: Callable[[tuple[int, int]], str | None],
    skip: bool,
) -> None:
    root = Path(source.path)
    setting = f"data.sources.{index}.path = {printable(root)}"
    if "\0" in source.path or not root.is_dir():
        found.problems.append(f"{setting}: {'it is no folder' if root.exists() else 'there is no such folder'}.")
        return
    listing = folder.walk(root)
    found.problems += [f"{printable(root / path)}: {reason}" for path, reason in listing.refused]
    keys = {path: f"{index}/{folder.escape(path)}" for path in listing.pictures}
    captions, caption_problems = _read_captions(root, source, listing)
    usable = 0
    with ThreadPoolExecutor(_THREADS) as pool:
        inspect = [(root / path, size_problem) for path in listing.pictures]
        for path, result in zip(listing.pictures, pool.map(_inspect, inspect)):
            if isinstance(result, str):
                if skip:
                    found.skipped.append(f"{keys[path]}: {result}")
                else:
                    found.problems.append(f"{printable(root / path)}: {result}.")
                continue
            usable += 1
            if path in caption_problems:
                found.problems += caption_problems[path]
                continue
            size, digest = result
            found.examples.append(
                Example(keys[path], root / path, captions[path], size, digest, weight=source.weight, role=source.role)
            )
    if not usable and (skip or not listing.pictures):
        suffixes = " ".join(sorted(images.SUFFIXES))
        what = "none of its pictures can be used" if listing.pictures else f"it holds no pictures ({suffixes})"
        found.problems.append(f"{setting}: {what}.")
    found.warnings += [f"{index}/{folder.escape(path)}: {text}" for path, text in listing.warnings]


def _inspect(job: tuple[Path, Callable[[tuple[int, int]], str | None]]) -> tuple[tuple[int, int], str] | str:
    """Size and digest of a picture, or what is wrong with it."""
    path, size_problem = job
    try:
        # should a pipe have taken the file's place since the walk, opening it would wait for ever
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return "it is no regular file"
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            size = images.decode(file).size
    except images.BadImageError as error:
        return printable(error)
    except OSError as error:
        return f"it could not be read ({error.strerror}): check the disk and the file's permissions"
    return size_problem(size) or (size, digest)


def _read_captions(
    root: Path, source: SourceSettings, listing: folder.Listing
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The caption of each picture, and of some pictures what is wrong with it."""
    captions: dict[str, str] = {}
    problems: dict[str, list[str]] = {}
    for path in listing.pictures:
        files = listing.captions[path]
        text = ""
        if len(files) > 1:
            names = " and ".join(printable(Path(f).name) for f in files)
            problems[path] = [f"{printable(root / path)}: it has two captions, {names}: keep one."]
            continue
        if files:
            try:
                text = read_caption(root / files[0])
            except ValueError as error:
                problems[path] = [f"{printable(root / files[0])}: {error}."]
                continue
        text = text or (source.default_caption or "").strip()
        if not text and not source.allow_missing_captions:
            lack = "its caption is empty" if files else "it has no caption"
            name = printable(Path(path).with_suffix(".txt").name)
            problems[path] = [
                f"{printable(root / path)}: {lack}: write one into {name} beside it, or give the source a "
                "default_caption, or set allow_missing_captions."
            ]
            continue
        captions[path] = f"{source.trigger.strip()} {text}".strip()
    return captions, problems


def read_caption(path: Path) -> str:
    """The text of a caption file, stripped; ValueError says what is wrong with it."""
    try:
        if path.stat().st_size > MAX_CAPTION_BYTES:
            raise ValueError(f"a caption of over {MAX_CAPTION_BYTES // 1_000_000} MB is none: shorten it")
        return path.read_bytes().decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise ValueError(f"it could not be read ({error.strerror}): check the file's permissions") from None


def _duplicates(examples: Sequence[Example]) -> Iterator[str]:
    first: dict[str, str] = {}
    for example in examples:
        if example.digest in first:
            yield f"{example.key}: the same file as {first[example.digest]}"
        else:
            first[example.digest] = example.key
