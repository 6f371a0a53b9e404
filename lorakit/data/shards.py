"""A store of tensors by the content they were made from, shared by runs and by processes.

Here: the store. Not here: what is put in and under which keys (`cache.py`), a file (`shard_file.py`), and which files
are deleted or merged (`upkeep.py`). Entries lie packed in safetensors files, "shards", whose headers are the index: one
shard a write, whole or not at all, under a name made from its keys. So several processes may write at once, one that is
killed loses only what it had not written yet, and shards may be merged or deleted while others read.
"""

import contextlib
import hashlib
import logging
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from lorakit.core.errors import StorageError
from lorakit.core.files import printable
from lorakit.data import upkeep
from lorakit.data.shard_file import DamagedShard, map_file, read_contents, write_shard
from lorakit.data.shard_index import Found, Index, pack
from lorakit.data.upkeep import Removed, Usage, is_shard, shard_name

__all__ = ["Cache", "Removed", "Usage", "content_key", "pack"]

log = logging.getLogger("lorakit")

# an open shard costs address space and a file handle, of which a process often has 1,024
_OPEN_SHARDS = 256


def content_key(*parts: object) -> str:
    """A key of 160 bits that depends on every part, by its text."""
    text = "\x1f".join(str(part) for part in parts)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:40]


class Cache:
    """The store in `folder`. Handed to another process it is opened there anew."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._forget()

    def __reduce__(self) -> tuple[type["Cache"], tuple[Path]]:
        return type(self), (self.folder,)

    def has(self, key: str) -> bool:
        return self._find(key) is not None

    def contains(self, keys: NDArray[Any]) -> NDArray[Any]:
        """Which of the packed `keys` (n, 20) are there, as bools; what is counts as used from now on."""
        self._look_for_shards()
        positions = self._index.find(keys)
        for shard in self._index.shards_at(positions[positions >= 0]):
            upkeep.touch(self.folder / shard)
        return positions >= 0

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` that are not there, each once, in order."""
        keys = list(dict.fromkeys(keys))
        return [key for key, there in zip(keys, self.contains(pack(keys)).tolist()) if not there]

    def write(self, entries: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Adds `entries`, each a few named tensors; StorageError if they cannot be written."""
        if entries:
            name = shard_name(entries)
            write_shard(self.folder / name, entries)
            self._open.pop(name, None)
            self._add_shard(name)

    def read(self, key: str) -> dict[str, Tensor]:
        """The tensors of `key`, the caller's own; StorageError if it is not there or not readable any more."""
        found = self._find(key)
        if found is None:
            raise self._lacking()
        try:
            return _tensors(self._map(found.shard), found)
        except FileNotFoundError:
            return self.read_many([key])[0]

    def read_many(self, keys: Sequence[str]) -> list[dict[str, Tensor]]:
        """The tensors of all `keys`, in their order; as `read`."""
        entries: list[dict[str, Tensor]] = [{} for _ in keys]
        for i, data, found in self._places(keys):
            entries[i] = _tensors(data, found)
        return entries

    def read_stacked(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """The tensors of all `keys` stacked, (B, …) by name; faster than stacking what `read_many` gives.

        All must have the same names, shapes and types.
        """
        places = self._places(keys)
        layout = places[0][2].layout
        assert all(found.layout == layout for _, _, found in places), "entries of different shapes cannot be stacked"
        stacked = {}
        for part in layout:
            stacked[part.name] = part.empty(len(places))
            target = stacked[part.name].reshape(-1).view(torch.uint8).numpy().data
            for i, data, found in places:
                start = found.start + part.start
                target[i * part.size : (i + 1) * part.size] = data[start : start + part.size]
        return stacked

    def shard_of(self, key: str) -> str:
        """The name of the file that `key` is read from."""
        found = self._find(key)
        return found.shard if found else ""

    def usage(self) -> Usage:
        """How much there is."""
        self._look_for_shards()
        return upkeep.usage(self.folder, entries=len(self._index))

    def prune(self, unused_for: float, *, dry_run: bool = False) -> Removed:
        """Deletes shards that no process read or filled from for `unused_for` seconds, damaged ones, and what killed
        processes left half written; then merges small shards. Others may read and write meanwhile."""
        removed = upkeep.prune(self.folder, unused_for, dry_run=dry_run)
        if not dry_run:
            upkeep.compact(self.folder)
        return removed

    def _lacking(self) -> StorageError:
        return StorageError(f"{printable(self.folder)} lacks what was cached there a moment ago: start again.")

    def _find(self, key: str) -> Found | None:
        position = self._index.find_one(key)
        if position < 0:
            self._look_for_shards()
            position = self._index.find_one(key)
        return self._index.at_one(position) if position >= 0 else None

    def _places(self, keys: Sequence[str]) -> list[tuple[int, memoryview, Found]]:
        """The place of each of `keys` and its number among them, by shards: each is opened once."""
        packed = pack(keys)
        for last in (False, True):
            positions = self._index.find(packed)
            if last and (positions < 0).any():
                raise self._lacking()
            if not (positions < 0).any():
                found = self._index.at(positions)
                order = sorted(range(len(found)), key=lambda i: found[i][:2])
                # another process may have merged shards since: then the entry lies elsewhere now
                with contextlib.suppress(FileNotFoundError):
                    return [(i, self._map(found[i].shard), found[i]) for i in order]
            self._look_for_shards()
        raise self._lacking()

    def _forget(self) -> None:
        self._index = Index()
        self._known: dict[str, tuple[int, ...]] = {}
        self._open: OrderedDict[str, memoryview] = OrderedDict()

    def _look_for_shards(self) -> None:
        names: set[str] = set()
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as files:
            names = {file.name for file in files if is_shard(file.name)}
        if not names.issuperset(self._known):
            # merged with others or deleted: what it held may lie in another shard that is known already
            self._forget()
        for name in sorted(names):
            if name not in self._known or (self._known[name] and self._known[name] != self._stamp(name)):
                self._add_shard(name)

    def _add_shard(self, name: str) -> None:
        self._known[name] = ()
        try:
            contents = read_contents(self.folder / name)
        except FileNotFoundError:
            del self._known[name]
        except (DamagedShard, OSError) as error:
            log.warning(
                "%s is damaged (%s): it is left out, what it held is made anew, and it may be deleted.",
                printable(self.folder / name),
                error,
            )
            self._known[name] = self._stamp(name)
        else:
            if contents is not None:
                self._index.add(name, contents)

    def _stamp(self, name: str) -> tuple[int, ...]:
        """Changes when a damaged shard was written anew."""
        with contextlib.suppress(OSError):
            about = os.stat(self.folder / name)
            return about.st_mtime_ns, about.st_size, about.st_ino
        return (0,)

    def _map(self, name: str) -> memoryview:
        """The bytes of a shard, memory-mapped: only what is read of it is loaded."""
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        try:
            self._open[name] = map_file(self.folder / name)
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:
            raise StorageError(
                f"{printable(self.folder / name)} became unreadable ({error}): delete it and start again."
            ) from error
        upkeep.touch(self.folder / name)
        if len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)
        return self._open[name]


def _tensors(data: memoryview, found: Found) -> dict[str, Tensor]:
    return {
        part.name: part.tensor(bytearray(data[found.start + part.start : found.start + part.start + part.size]))
        for part in found.layout
    }
