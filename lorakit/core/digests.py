"""Digests of large files, which are read for them once: the weights of a model are tens of gigabytes.

What was found is kept in the user's cache folder and counts as long as a file's size, times and place on the disk stay
what they were. It is a convenience: where nothing can be kept files are read each time.
"""

import contextlib
import hashlib
import os
import time
from pathlib import Path

from lorakit.core.errors import StorageError
from lorakit.core.files import sha256_file, write_text

RACY_NS = 2_000_000_000
"""A file that was changed so shortly before it was read may be changed again within one tick of its clock, which its
times would not show (git calls such files racily clean)."""

_LARGE = 16 * 2**20  # bytes; smaller ones are read as fast


def user_folder() -> Path:
    """Where lorakit keeps what it can make again: lorakit in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorakit"


def stamp_of(state: os.stat_result) -> str:
    """A text that changes whenever the file's bytes may have changed: size, times and inode."""
    return f"{state.st_size}-{state.st_mtime_ns}-{state.st_ctime_ns}-{state.st_ino}"


def changed_at(stamp: str) -> int:
    """When the file of a stamp was last changed, in nanoseconds since 1970."""
    _, modified, moved, *_ = stamp.split("-")
    return max(int(modified), int(moved))


def sha256_of_unchanged(path: Path) -> str:
    """The sha256 of a file, which is read where it is not known or the file may have changed since."""
    began, state = time.time_ns(), path.stat()
    if state.st_size < _LARGE:
        return sha256_file(path)
    stamp, place = stamp_of(state), os.path.realpath(path)
    kept = user_folder() / "digests" / hashlib.sha256(os.fsencode(place)).hexdigest()
    with contextlib.suppress(OSError, ValueError):
        known, digest = kept.read_text(encoding="ascii").split()
        if known == stamp and len(bytes.fromhex(digest)) == 32:
            return digest
    digest = sha256_file(path)
    if changed_at(stamp) <= began - RACY_NS and stamp_of(path.stat()) == stamp:
        with contextlib.suppress(StorageError, OSError):
            write_text(kept, f"{stamp} {digest}\n")
    return digest
