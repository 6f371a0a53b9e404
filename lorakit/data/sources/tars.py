"""WebDataset tars: pictures, captions and masks in groups of one base name, read where they lie and never extracted.

A group is the members that follow each other and share their path up to the first dot of its last part.
"""

import glob
import itertools
import os
import re
import struct
import tarfile
from collections.abc import Iterator
from typing import IO, NamedTuple

from lorakit.core.digests import stamp_of
from lorakit.core.files import printable
from lorakit.core.types import Place
from lorakit.data.images import suffixes
from lorakit.data.sources import sidecars
from lorakit.data.sources.folder import FOREIGN, MASK_SUFFIX, PLUGINS, no_reader, not_read, split_name
from lorakit.data.sources.items import MAX_PICTURE_BYTES, Box, Found, Item, make_key, read_regular

_MAX_HEADER = 1_000_000  # a header that wants more is none
_MAX_PATTERN = 100_000
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_TRUNCATED = "it is cut off or damaged at byte {}: copy it again"


class _Member(NamedTuple):
    """A file in a tar: its path there, its suffix as `split_name` has it, and where it lies."""

    path: str
    suffix: str
    place: Place


class _Headers:
    """A file for tarfile, which would read a header as long as that header says it is."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > _MAX_HEADER:
            raise tarfile.ReadError("a header is too long")
        return self._file.read(size)


class TarStorage:
    """The pictures in `files`, paths below `root`.

    A picture's name is the tar's and then its own path in it; with `rows` it is its group's name alone, for tars that
    lorakit itself has made of a table's rows.
    """

    def __init__(self, root: str, files: list[str], index: int, *, rows: bool = False) -> None:
        self._shown = root
        self._root = os.path.realpath(root)
        self._files = files
        self._index = index
        self._rows = rows

    @property
    def identity(self) -> str:
        return self._root

    def label(self, name: str) -> str:
        return printable(os.path.join(self._shown, name))

    def caption_advice(self, name: str) -> str:
        return f"put one into {printable(_group_of(os.path.basename(name)))}.txt right behind it in the tar"

    def read(self, place: Place) -> bytes:
        path = os.path.join(self._root, place.file)
        return read_regular(path, MAX_PICTURE_BYTES, start=place.start, length=place.length)

    def items(self, found: Found) -> Iterator[Item]:
        for file in self._files:
            try:
                with open(os.path.join(self._root, file), "rb") as opened:
                    stamp = stamp_of(os.fstat(opened.fileno()))
                    refused: set[str] = set()
                    members = self._members(file, opened, found, refused)
                    for group, of_group in itertools.groupby(members, key=lambda member: _group_of(member.path)):
                        item = self._item(group, list(of_group), stamp, found, refused)
                        if item is not None:
                            yield item
            except OSError as error:
                reason = f"it could not be read ({error.strerror}): check the disk and the file's permissions"
                found.bad(make_key(self._index, file), self.label(file), reason)

    def _members(self, file: str, opened: IO[bytes], found: Found, refused: set[str]) -> Iterator[_Member]:
        """The files in one tar; links, devices and names that lead out are named and left out, their groups `refused`
        where they are pictures."""
        readable = suffixes()
        size = os.fstat(opened.fileno()).st_size
        end = 0
        try:
            with tarfile.open(fileobj=_Headers(opened), mode="r:") as tar:  # type: ignore[call-overload]
                while (info := tar.next()) is not None:
                    tar.members.clear()  # which it keeps
                    if tar.offset <= end or info.size < 0 or info.offset_data + info.size > size:
                        raise tarfile.ReadError
                    end = tar.offset
                    reason = _refused(info)
                    name = f"{file}/{info.name}"
                    parts = [part for part in info.name.split("/") if part not in ("", ".")]
                    if reason is not None:
                        found.bad(make_key(self._index, name), self.label(name), reason)
                        if parts and split_name(parts[-1])[1] in readable:
                            refused.add(_group_of("/".join(parts)))
                    elif info.isfile() and parts and not any(part.startswith(".") for part in parts):
                        path = "/".join(parts)
                        yield _Member(path, split_name(parts[-1])[1], Place(file, info.offset_data, info.size))
                end = tar.offset
            # tarfile takes garbage and the end of the file for the end of the archive, which is a block of zeros
            opened.seek(end)
            if opened.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError
        except (tarfile.TarError, ValueError, ArithmeticError, IndexError, KeyError, struct.error):
            reason = _TRUNCATED.format(end) if end else "it is no tar, or compressed: make it a plain tar"
            found.bad(make_key(self._index, file), self.label(file), reason)

    def _item(self, group: str, members: list[_Member], stamp: str, found: Found, refused: set[str]) -> Item | None:
        readable = suffixes()
        pictures = [m for m in members if m.suffix in readable]
        masks = [m for m in members if m.suffix == MASK_SUFFIX]
        captions = [m for m in members if m.suffix in sidecars.CAPTION_SUFFIXES]
        for member in members:
            name = f"{member.place.file}/{member.path}"
            if member.suffix in PLUGINS and member.suffix not in readable:
                found.bad(make_key(self._index, name), self.label(name), no_reader(member.suffix))
            elif member.suffix in FOREIGN:
                found.warnings.append(f"{make_key(self._index, name)}: {not_read(member.suffix)}")
        for several, what in ((pictures, "pictures"), (masks, "masks")):
            if len(several) > 1:
                names = " and ".join(printable(os.path.basename(m.path)) for m in several)
                label = self.label(f"{several[0].place.file}/{group}")
                found.problems.append(f"{label}: its group has {len(several)} {what}, {names}: keep or rename one.")
                return None
        # a picture that was named itself is one all the same
        if not pictures and (group in refused or any(m.suffix in PLUGINS or m.suffix in FOREIGN for m in members)):
            return None
        if not pictures:
            for member, what in [(m, "a caption") for m in captions] + [(m, "a mask") for m in masks]:
                found.of_no_picture(make_key(self._index, f"{member.place.file}/{member.path}"), what)
            return None
        picture = pictures[0]
        said, box, problems = self._said(picture, captions)
        return Item(
            group if self._rows else f"{picture.place.file}/{picture.path}",
            picture.place,
            said,
            f"{stamp}-{picture.place.start}",
            masks[0].place if masks else None,
            f"{stamp}-{masks[0].place.start}" if masks else "",
            box,
            problems,
        )

    def _said(self, picture: _Member, members: list[_Member]) -> tuple[tuple[str, ...], Box | None, tuple[str, ...]]:
        """Captions and box of a picture, and what is wrong with them."""
        captions: list[tuple[str, tuple[str, ...]]] = []
        box: Box | None = None
        problems = []
        for member in members:
            name = f"{member.place.file}/{member.path}"
            try:
                if member.place.length > sidecars.MAX_CAPTION_BYTES:
                    raise ValueError(sidecars.TOO_LONG)
                said = sidecars.parse(self.read(member.place), member.suffix)
            except (OSError, ValueError) as error:
                problems.append(f"{self.label(name)}: {error}.")
                continue
            box = box or said.box
            text = said.captions or (("",) if member.suffix != ".json" else ())
            # tools that download from the web write the same caption as .txt and into a .json
            if text and all(text != other for _, other in captions):
                captions.append((os.path.basename(member.path), text))
        if len(captions) > 1:
            names = " and ".join(printable(name) for name, _ in captions)
            label = self.label(f"{picture.place.file}/{picture.path}")
            problems.append(f"{label}: it has two captions, {names}: keep one.")
        return captions[0][1] if captions else (), box, tuple(problems)


def _group_of(path: str) -> str:
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}{name.partition('.')[0]}"


def _refused(info: tarfile.TarInfo) -> str | None:
    """Why a member is not even looked at."""
    if info.name.startswith("/") or ".." in info.name.split("/"):
        return "its name leads out of the tar: pack it again"
    if info.isdir():
        return None
    if info.issym() or info.islnk():
        return "it is a link, which is never followed: pack the file itself"
    if info.type not in tarfile.REGULAR_TYPES or info.issparse():
        return "it is a device, a pipe or a sparse file and no regular one: leave it out"
    return None


def expand(pattern: str) -> list[str]:
    """The paths that a pattern stands for: `{000..010}` counts, `*`, `?` and `[…]` match what there is.

    Counted paths are given whether they exist or not. Raises ValueError where there would be far too many.
    """
    counted = [""]
    position = 0
    for match in _RANGE.finditer(pattern):
        first, last = int(match[1]), int(match[2])
        if (last - first + 1) * len(counted) > _MAX_PATTERN:
            raise ValueError(f"it stands for over {_MAX_PATTERN} files: name fewer")
        width = len(match[1]) if match[1].startswith("0") else 0
        between = pattern[position : match.start()]
        counted = [f"{c}{between}{n:0{width}d}" for c in counted for n in range(first, last + 1)]
        position = match.end()
    paths = [c + pattern[position:] for c in counted]
    return [found for path in paths for found in (sorted(glob.glob(path)) if glob.has_magic(path) else [path])]
