"""A folder of pictures with their captions and masks beside them, listed folder by folder.

Here: the walk, which files are pictures and which captions and masks belong to them, and what may not be there. Nothing
outside the folder is touched. Not here: what captions say (`sidecars.py`, `metadata.py`).
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field

from lorakit.core.digests import stamp_of
from lorakit.core.files import printable
from lorakit.core.types import Place
from lorakit.data.images import suffixes
from lorakit.data.sources import metadata, sidecars
from lorakit.data.sources.items import MAX_PICTURE_BYTES, Found, Item, escape, make_key, read_regular

MASK_SUFFIX = ".mask.png"
# pictures that lorakit does not read; left out in silence they would be missed
PLUGINS = {
    ".avif": "pillow-avif-plugin",
    ".heic": "pillow-heif",
    ".heif": "pillow-heif",
    ".jxl": "pillow-jxl-plugin",
}
_RAW = {".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"}
FOREIGN = frozenset({".jp2", ".psd", ".svg", ".tga", ".ppm", ".ico", ".exr"} | _RAW)
# what lies in many folders and is no loss
_USUAL = frozenset({"thumbs.db", "desktop.ini", "readme", "readme.md", "license", "license.md"})
_SHOWN = 5  # names of files that are left out
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def no_reader(suffix: str) -> str:
    """What is wrong with a picture of a format whose plugin is not installed."""
    plugin = PLUGINS[suffix]
    return f"pictures of format {suffix} need {plugin}: pip install {plugin}, or convert it to png or jpg"


def not_read(suffix: str) -> str:
    """The warning about a picture of a format that is never read."""
    return f"pictures of format {suffix} are not read: convert it to png or jpg"


def split_name(name: str) -> tuple[str, str]:
    """The stem and the suffix, in lower case, of a file's name; that of a mask is MASK_SUFFIX."""
    if name[-len(MASK_SUFFIX) :].lower() == MASK_SUFFIX and len(name) > len(MASK_SUFFIX):
        return name[: -len(MASK_SUFFIX)], MASK_SUFFIX
    stem, _, suffix = name.rpartition(".")
    return (stem, f".{suffix.lower()}") if stem else (name, "")


@dataclass
class _Folder:
    """What one folder holds, by name and kind; captions and masks go by their stems."""

    entries: list[tuple[str, os.DirEntry[str]]] = field(default_factory=list)  # pictures and folders, by sorting key
    captions: dict[str, list[str]] = field(default_factory=dict)
    masks: dict[str, str] = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)
    pictures_of: dict[str, list[str]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)  # pictures that are named elsewhere and left out


@dataclass
class _Met:
    """What a walk has met: whether metadata; of files that nothing is made of how many, and the keys of the first."""

    metadata: bool = False
    number: int = 0
    keys: list[str] = field(default_factory=list)

    def add(self, key: str) -> None:
        self.number += 1
        if len(self.keys) < _SHOWN:
            self.keys.append(key)

    def warning(self) -> str:
        more = f" and {self.number - len(self.keys):,} more" if self.number > len(self.keys) else ""
        files = "1 file is" if self.number == 1 else f"{self.number:,} files are"
        return (
            f"{files} left out, neither picture, caption, mask nor metadata by name ({', '.join(self.keys)}{more}): "
            "rename what is a picture as its format wants, or convert it to png or jpg"
        )


@dataclass
class _Table:
    """A metadata file in force: what is below its folder is named from there on, behind `prefix`."""

    path: str
    prefix: str
    content: metadata.Metadata


class FolderStorage:
    """The pictures below `path`, but for what is hidden.

    Links to files inside the folder are followed, links to folders inside it are not (what is there is found anyway),
    and links out of it are refused, and so is what is named like a picture or a caption and is no regular file.
    """

    def __init__(self, path: str, index: int, *, caption_key: str | None = None) -> None:
        self._shown = path
        self._root = os.path.realpath(path)
        self._index = index
        self._caption_key = caption_key

    @property
    def identity(self) -> str:
        return self._root

    def label(self, name: str) -> str:
        return printable(os.path.join(self._shown, name))

    def caption_advice(self, name: str) -> str:
        return f"write one into {printable(split_name(os.path.basename(name))[0])}.txt beside it"

    def read(self, place: Place) -> bytes:
        path = os.path.join(self._root, place.file)
        if not self._is_inside(path):  # a link may have taken its place since it was listed
            raise ValueError("it is a link out of the folder: put the file itself there")
        return read_regular(path, MAX_PICTURE_BYTES, start=place.start, length=place.length)

    def items(self, found: Found) -> Iterator[Item]:
        tables: list[_Table] = []
        met = _Met()
        open_folders = [self._enter("", tables, met, found)]
        while open_folders:
            step = next(open_folders[-1], None)
            if step is None:
                open_folders.pop()
            elif isinstance(step, Item):
                yield step
            else:
                open_folders.append(self._enter(step, tables, met, found))
        setting = f"data.sources.{self._index}"
        if met.number:
            found.warnings.append(f"{setting}: {met.warning()}")
        if self._caption_key is not None and not met.metadata:
            names = " nor ".join(metadata.NAMES)
            found.warnings.append(f"{setting}.caption_column has no effect: the folder holds neither {names}")

    def _enter(self, path: str, tables: list[_Table], met: _Met, found: Found) -> Iterator[Item | str]:
        """The pictures of one folder and, in their places, the paths of its folders."""
        folder = self._list(path, met, found)
        prefix = f"{path}/" if path else ""
        met.metadata = met.metadata or bool(folder.tables)
        for name in folder.tables:
            tables += self._read_table(prefix, name, found)
        for _, entry in folder.entries:
            if entry.is_dir(follow_symlinks=False):
                yield prefix + entry.name
            else:
                item = self._item(prefix, entry, folder, tables, found)
                if item is not None:
                    yield item
        for name in folder.refused:
            for table in tables:
                table.content.rows.pop((prefix + name)[len(table.prefix) :], None)
        self._leftover(prefix, folder, found)
        while tables and tables[-1].prefix == prefix:
            table = tables.pop()
            label = self.label(table.path)
            found.problems += [f"{label}: {text}." for text in table.content.leftover()]

    def _list(self, path: str, met: _Met, found: Found) -> _Folder:
        folder = _Folder()
        prefix = f"{path}/" if path else ""
        readable = suffixes()
        try:
            with os.scandir(os.path.join(self._root, path)) as scanned:
                entries = sorted((e for e in scanned if not e.name.startswith(".")), key=lambda e: e.name)
        except OSError as error:
            found.problems.append(
                f"{self.label(path)}: the folder cannot be read ({error.strerror}): change its permissions."
            )
            return folder
        for entry in entries:
            name = entry.name
            stem, suffix = split_name(name)
            is_table = name in metadata.NAMES
            wanted = suffix in readable or suffix in sidecars.CAPTION_SUFFIXES or suffix == MASK_SUFFIX or is_table
            kind = self._kind(entry)
            refused = kind != stat.S_IFREG if suffix in readable else suffix in PLUGINS or suffix in FOREIGN
            if refused:
                folder.refused.append(name)
            if kind is None:
                reason = "it is a link out of the folder: put the file itself there"
                found.problems.append(f"{self.label(prefix + name)}: {reason}.")
            elif wanted and kind != stat.S_IFREG:
                reason = f"it is {_KINDS.get(kind, 'a link that leads nowhere')} and no regular file"
                found.problems.append(f"{self.label(prefix + name)}: {reason}: remove or rename it.")
            elif kind == stat.S_IFDIR:
                if not entry.is_symlink():
                    folder.entries.append((f"{escape(name)}/", entry))
            elif is_table:
                folder.tables.append(name)
            elif suffix == MASK_SUFFIX:
                folder.masks[stem] = name
            elif suffix in readable:
                folder.entries.append((escape(name), entry))
                folder.pictures_of.setdefault(stem, []).append(name)
            elif suffix in sidecars.CAPTION_SUFFIXES:
                folder.captions.setdefault(stem, []).append(name)
            elif suffix in PLUGINS:
                found.bad(make_key(self._index, prefix + name), self.label(prefix + name), no_reader(suffix))
            elif suffix in FOREIGN:
                found.warnings.append(f"{make_key(self._index, prefix + name)}: {not_read(suffix)}")
            elif kind == stat.S_IFREG and name.lower() not in _USUAL:
                met.add(make_key(self._index, prefix + name))
        # so the pictures of all folders come in the order of their escaped paths
        folder.entries.sort(key=lambda pair: pair[0])
        return folder

    def _kind(self, entry: os.DirEntry[str]) -> int | None:
        """The file's kind (stat.S_IF…), 0 where there is none, None for what leads out of the folder."""
        try:
            if entry.is_symlink():
                return stat.S_IFMT(os.stat(entry.path).st_mode) if self._is_inside(entry.path) else None
            if entry.is_file(follow_symlinks=False):
                return stat.S_IFREG
            return stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode)
        except OSError:  # a link to nothing or to itself
            return 0

    def _is_inside(self, path: str) -> bool:
        real = os.path.realpath(path)
        return real.startswith(self._root.rstrip("/") + "/") or real == self._root

    def _item(
        self, prefix: str, entry: os.DirEntry[str], folder: _Folder, tables: list[_Table], found: Found
    ) -> Item | None:
        name = prefix + entry.name
        try:
            stamp = stamp_of(entry.stat())
        except OSError as error:  # gone since it was listed
            found.bad(make_key(self._index, name), self.label(name), f"it could not be read ({error.strerror})")
            return None
        stem, _ = split_name(entry.name)
        mask, mask_stamp = folder.masks.get(stem), ""
        if mask is not None:
            mask_stamp = self._stamp(prefix + mask)
        captions, box, problems, file = self._said(name, prefix, folder.captions.get(stem, []), tables)
        mask_place = None if mask is None else Place(prefix + mask)
        return Item(name, Place(name), captions, stamp, mask_place, mask_stamp, box, problems, file)

    def _stamp(self, path: str) -> str:
        try:
            return stamp_of(os.stat(os.path.join(self._root, path)))
        except OSError:  # reading it will say what is wrong
            return ""

    def _said(
        self, name: str, prefix: str, files: list[str], tables: list[_Table]
    ) -> tuple[tuple[str, ...], sidecars.Box | None, tuple[str, ...], str]:
        """The captions and the box of a picture, what is wrong with them, and the text file that the captions are."""
        sources: list[tuple[str, sidecars.Said]] = []
        problems: list[str] = []
        for file in files:
            suffix = split_name(file)[1]
            try:
                data = read_regular(os.path.join(self._root, prefix + file), sidecars.MAX_CAPTION_BYTES)
                said = sidecars.parse(data, suffix)
            except OSError as error:
                reason = f"it could not be read ({error.strerror}): check the file's permissions"
                problems.append(f"{self.label(prefix + file)}: {reason}.")
                continue
            except ValueError as error:
                problems.append(f"{self.label(prefix + file)}: {error}.")
                continue
            # an empty text file is a caption, if none that can be used
            sources.append((file, said if said.captions or suffix == ".json" else said._replace(captions=("",))))
        for table in tables:
            row = table.content.rows.pop(name[len(table.prefix) :], None)
            if row is not None:
                sources.append((f"{os.path.basename(table.path)} line {row.line}", row.said))
        captions = [(where, said.captions) for where, said in sources if said.captions]
        boxes = [(where, said.box) for where, said in sources if said.box]
        for what, given in (("captions", captions), ("boxes", boxes)):
            if len(given) > 1:
                names = " and ".join(printable(where) for where, _ in given)
                problems.append(f"{self.label(name)}: it has two {what}, {names}: keep one.")
        texts = [prefix + where for where, _ in captions[:1] if split_name(where)[1] in sidecars.TEXT_SUFFIXES]
        file = texts[0] if texts else ""
        return captions[0][1] if captions else (), boxes[0][1] if boxes else None, tuple(problems), file

    def _read_table(self, prefix: str, name: str, found: Found) -> list[_Table]:
        path = prefix + name
        label = self.label(path)
        try:
            with open(os.path.join(self._root, path), "rb") as file:
                content = metadata.read(file, name, caption_key=self._caption_key)
        except OSError as error:
            found.problems.append(f"{label}: it could not be read ({error.strerror}): check the file's permissions.")
            return []
        found.problems += [f"{label}: {text}." for text in content.problems]
        return [_Table(path, prefix, content)]

    def _leftover(self, prefix: str, folder: _Folder, found: Found) -> None:
        """Says which captions and masks belong to no picture, and which to several.

        A refused picture is one: it has been named itself.
        """
        refused = {split_name(name)[0] for name in folder.refused}
        for stem, files in folder.captions.items():
            pictures = folder.pictures_of.get(stem, [])
            for key in (make_key(self._index, prefix + file) for file in files):
                if not pictures and stem not in refused:
                    found.of_no_picture(key, "a caption")
                elif len(pictures) > 1:
                    # an export beside its original is common, and one text may well describe both: allowed, but said
                    names = ", ".join(printable(picture) for picture in pictures)
                    found.warnings.append(f"{key}: it is the caption of several pictures: {names}")
        for stem, file in folder.masks.items():
            if stem not in folder.pictures_of and stem not in refused:
                found.of_no_picture(make_key(self._index, prefix + file), "a mask")
