"""What lies in a folder of pictures, by name and kind alone: no file is opened.

Here: the walk, which files are pictures and which captions belong to them, and what may not be there. Nothing outside
the folder is touched. Next: `sources.py` reads what was found.
"""

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from lorakit.core.files import printable
from lorakit.data.images import SUFFIXES

CAPTION_SUFFIXES = frozenset({".txt", ".caption"})
# pictures that lorakit does not read; left out in silence they would be missed
_FOREIGN = frozenset(
    {".avif", ".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg", ".tga", ".ppm", ".dng", ".cr2", ".cr3", ".nef", ".arw"}
)
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


@dataclass
class Listing:
    """Paths relative to the folder, with /, sorted by escaped name; `captions` of each picture, usually one.

    `refused` and `warnings` are pairs of a path and a text.
    """

    pictures: list[str] = field(default_factory=list)
    captions: dict[str, list[str]] = field(default_factory=dict)
    refused: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[tuple[str, str]] = field(default_factory=list)


def escape(path: str) -> str:
    """`path` on one line, different for different paths: backslashes doubled, unprintable characters escaped."""
    return printable(path.replace("\\", "\\\\"))


def walk(root: Path) -> Listing:
    """What is in `root`, in any depth, but for what is hidden.

    Links to files inside the folder are followed, links to folders inside it are not (what is there is found anyway),
    and links out of it are refused, and so is what is named like a picture or a caption and is no regular file.
    """
    listing = Listing()
    real_root = Path(os.path.realpath(root))
    folders = [""]
    while folders:
        _list_folder(real_root, folders.pop(), listing, folders)
    listing.pictures.sort(key=escape)
    listing.refused.sort()
    listing.warnings.sort()
    return listing


def _list_folder(root: Path, folder: str, listing: Listing, folders: list[str]) -> None:
    pictures: dict[str, list[str]] = {}
    captions: dict[str, list[str]] = {}
    try:
        names = sorted(os.listdir(root / folder))
    except OSError as error:
        listing.refused.append((folder, f"the folder cannot be read ({error.strerror}): change its permissions."))
        return
    for name in names:
        if name.startswith("."):
            continue
        path = f"{folder}/{name}" if folder else name
        stem, suffix = os.path.splitext(name)
        suffix = suffix.lower()
        kind = _kind(root, path)
        wanted = suffix in SUFFIXES or suffix in CAPTION_SUFFIXES
        if kind is None:
            listing.refused.append((path, "it is a link out of the folder: put the file itself there."))
        elif wanted and kind != stat.S_IFREG:
            what = _KINDS.get(kind, "a link that leads nowhere")
            listing.refused.append((path, f"it is {what} and no regular file: remove or rename it."))
        elif kind == stat.S_IFDIR:
            if not os.path.islink(root / path):
                folders.append(path)
        elif suffix in SUFFIXES:
            pictures.setdefault(stem, []).append(path)
        elif suffix in CAPTION_SUFFIXES:
            captions.setdefault(stem, []).append(path)
        elif suffix in _FOREIGN:
            listing.warnings.append((path, f"pictures of format {suffix} are not read: convert it to png or jpg"))
    for stem, paths in pictures.items():
        files = captions.pop(stem, [])
        for path in paths:
            listing.pictures.append(path)
            listing.captions[path] = files
        # an export beside its original is common, and one text may well describe both: allowed, but said
        if len(paths) > 1 and files:
            names_of = ", ".join(printable(PurePosixPath(p).name) for p in paths)
            listing.warnings += [(file, f"it is the caption of several pictures: {names_of}") for file in files]
    listing.warnings += [(file, "a caption of no picture") for files in captions.values() for file in files]


def _kind(root: Path, path: str) -> int | None:
    """The file's kind (stat.S_IF…), 0 where there is none, None for what leads out of `root`."""
    try:
        full = root / path
        if stat.S_ISLNK(os.lstat(full).st_mode) and not Path(os.path.realpath(full)).is_relative_to(root):
            return None
        return stat.S_IFMT(os.stat(full).st_mode)
    except OSError:  # a link to nothing or to itself
        return 0
