"""Which of the cache's files are deleted or merged, while other processes read and write there.

Here: whole files, by name and age. Not here: what is in one (`shard_file.py`) and who looks for it (`shards.py`).
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from lorakit.core.files import storage_errors
from lorakit.data.shard_file import DamagedShard, merge_shards, read_contents

_SHARD = re.compile(r"entries-[0-9a-f]{24}\.safetensors")
_HALF_WRITTEN = re.compile(r"\.entries-[0-9a-f]{24}\.safetensors\.\d+\.tmp")
_COPIES = ("imports", "datasets")  # folders of what was copied from tables, one for each by its digest
_COPY = re.compile(r"[0-9a-f]{32}")
_MEMO = "scan.sqlite"  # what is remembered of pictures; files of SQLite's beside it have its name and more
# a shard's last use is its time stamp, set anew at most so often
_DAY = 86_400.0
# what is being written is younger
_HALF_WRITTEN_SECONDS = 3_600.0
_LARGE = 256 << 20


class Usage(NamedTuple):
    """`bytes` are those of the `shards`, which are files; `other_bytes` those of tables' copies and of the memo."""

    entries: int
    bytes: int
    shards: int
    other_bytes: int = 0


class Removed(NamedTuple):
    """What was deleted, or would be: `shards` in all, of these so many `damaged`, `copies` of tables, `leftovers` of
    writing, `bytes`."""

    shards: int = 0
    damaged: int = 0
    copies: int = 0
    leftovers: int = 0
    bytes: int = 0


def shard_name(keys: Iterable[str]) -> str:
    """The name of the shard that holds just `keys`."""
    text = "\x1f".join(["shard 2", *sorted(keys)])
    return f"entries-{hashlib.sha256(text.encode()).hexdigest()[:24]}.safetensors"


def is_shard(name: str) -> bool:
    return bool(_SHARD.fullmatch(name))


def touch(path: Path) -> None:
    """Notes that a shard or a table's copy is in use; a read-only disk notes nothing, and nothing is deleted there."""
    with contextlib.suppress(OSError):
        if time.time() - path.stat().st_mtime > _DAY:
            os.utime(path)


def usage(folder: Path, *, entries: int) -> Usage:
    sizes = [about.st_size for _, about in _files(folder, _SHARD)]
    memo = [path for path in folder.glob(f"{_MEMO}*") if path.is_file()]
    other = sum(_size(path) for path in [*memo, *(folder / name for name in _COPIES)])
    return Usage(entries, sum(sizes), len(sizes), other)


def is_cache(folder: Path) -> bool:
    """Whether there is a cache in `folder`, or nothing at all. OSError where it cannot be read."""
    names = os.listdir(folder)
    return not names or any(
        name in (_MEMO, *_COPIES) or _SHARD.fullmatch(name) or _HALF_WRITTEN.fullmatch(name) for name in names
    )


def prune(folder: Path, unused_for: float, *, dry_run: bool = False) -> Removed:
    """Deletes shards and tables' copies in `folder` not used for so many seconds, damaged and half-written files."""
    now = time.time()
    removed = Removed()
    with _alone(folder):
        for path, about in _files(folder, _SHARD):
            damaged = _damaged(path)
            if (damaged or now - about.st_mtime > unused_for) and _delete(path, dry_run=dry_run):
                removed = removed._replace(
                    shards=removed.shards + 1,
                    damaged=removed.damaged + damaged,
                    bytes=removed.bytes + about.st_size,
                )
        for path, about in _files(folder, _HALF_WRITTEN):
            if now - about.st_mtime > _HALF_WRITTEN_SECONDS and _delete(path, dry_run=dry_run):
                removed = removed._replace(leftovers=removed.leftovers + 1, bytes=removed.bytes + about.st_size)
        for copy in (path for name in _COPIES for path in (folder / name).glob("*") if _COPY.fullmatch(path.name)):
            if now - copy.stat().st_mtime > unused_for:
                size = _size(copy)
                removed = removed._replace(copies=removed.copies + 1, bytes=removed.bytes + size)
                if not dry_run:
                    with storage_errors(copy):
                        shutil.rmtree(copy)
    return removed


def compact(folder: Path, *, large: int = _LARGE) -> int:
    """Merges shards of less than half of `large` bytes to ones of at most that, and says how many fewer there are.

    The merged one is whole before the others are deleted, so that a reader finds each entry in one of them.
    """
    with _alone(folder):
        merged = 0
        for group in _groups(folder, large):
            target = folder / shard_name([path.name for path in group])
            try:
                newest = max(path.stat().st_mtime for path in group)
                merge_shards(target, group)
                os.utime(target, (newest, newest))
            except (DamagedShard, FileNotFoundError):
                continue
            for path in group:
                _delete(path, dry_run=False)
            merged += len(group) - 1
    return merged


def _groups(folder: Path, large: int) -> Iterator[list[Path]]:
    """Shards to merge, neighbours in age, so that what is unused stays apart from what is used."""
    small = sorted((about.st_mtime, path, about.st_size) for path, about in _files(folder, _SHARD))
    group: list[Path] = []
    size = 0
    for _, path, of_shard in small:
        if of_shard * 2 >= large or not _ours(path):
            continue
        if size + of_shard > large:
            if len(group) > 1:
                yield group
            group, size = [], 0
        group.append(path)
        size += of_shard
    if len(group) > 1:
        yield group


def _ours(path: Path) -> bool:
    with contextlib.suppress(DamagedShard, OSError):
        return read_contents(path) is not None
    return False


def _damaged(path: Path) -> bool:
    try:
        read_contents(path)
    except DamagedShard:
        return True
    except OSError:
        return False
    return False


def _files(folder: Path, pattern: re.Pattern[str]) -> list[tuple[Path, os.stat_result]]:
    found = []
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as files:
        for file in files:
            if pattern.fullmatch(file.name) and file.is_file(follow_symlinks=False):
                with contextlib.suppress(FileNotFoundError):
                    found.append((Path(file.path), file.stat(follow_symlinks=False)))
    return found


def _size(path: Path) -> int:
    """The bytes of a file or of all files in a folder; 0 for what is gone meanwhile."""
    size = 0
    for file in [path, *path.rglob("*")]:
        with contextlib.suppress(FileNotFoundError):
            about = file.lstat()
            size += about.st_size if stat.S_ISREG(about.st_mode) else 0
    return size


def _delete(path: Path, *, dry_run: bool) -> bool:
    """Whether it is gone, or would be."""
    if not dry_run:
        with storage_errors(path):
            path.unlink(missing_ok=True)
    return True


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits for other processes that prune or merge in `folder`; where locks are unknown it goes on without."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        yield
        return
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
