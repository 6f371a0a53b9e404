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
from lorakit.data.shard_file import DamagedShard, map_file, pack, part_tensor, read_contents, write_shard
from lorakit.data.shard_index import Found, Index
from lorakit.data.upkeep import Removed, Usage, is_shard, shard_name

__all__ = ["Cache", "Removed", "Usage", "content_key", "pack"]

log = logging.getLogger("lorakit")

# an open shard costs address space and a file handle, of which a process often has 1,024
_OPEN_SHARDS = 256
# the index takes 30 µs to ask, which are 30 for a batch too: of so many keys the places are remembered, in some 20 MB
_RECENT = 1 << 16
# others may write and merge faster than one can look, but not for ever
_LOOKS = 20


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
            contents = write_shard(self.folder / name, entries)
            self._open.pop(name, None)
            self._known[name] = ()
            self._index.add(name, contents)

    def read(self, key: str) -> dict[str, Tensor]:
        """The tensors of `key`, the caller's own; StorageError if it is not there or not readable any more."""
        return self.read_many([key])[0]

    def read_many(self, keys: Sequence[str]) -> list[dict[str, Tensor]]:
        """The tensors of all `keys`, in their order; as `read`."""
        entries: list[dict[str, Tensor]] = []
        for first in range(0, len(keys), _OPEN_SHARDS):
            places, maps = self._opened(keys[first : first + _OPEN_SHARDS])
            entries += [_tensors(maps[place.shard], place) for place in places]
        return entries

    def read_stacked(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """The tensors of all `keys` stacked, (B, …) by name: they are copied once, from the disk's pages to the batch.

        All must have the same names and types, and the same shapes but for the first axis: captions have lengths of
        their own, and zeros follow the shorter ones.
        """
        places, maps = self._opened(keys)
        stacked = {}
        for parts in zip(*(place.layout for place in places), strict=True):
            name, dtype, shape, _, _ = parts[0]
            assert all(
                part[:2] == (name, dtype) and part.shape[1:] == shape[1:] and len(part.shape) == len(shape)
                for part in parts
            ), "entries of different shapes cannot be stacked"
            longest, size = max(part.shape for part in parts), max(part.size for part in parts)
            stacked[name] = part_tensor(dtype, (len(keys), *longest))
            target = stacked[name].reshape(-1).view(torch.uint8).numpy().data
            for at, (shard, start, _), part in zip(range(0, len(target), size or 1), places, parts):
                begin, end = start + part.start, at + part.size
                target[at:end] = maps[shard][begin : begin + part.size]
                target[end : at + size] = bytes(size - part.size)
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

    def _find(self, key: str) -> Found | None:
        places = self._places([key])
        if places is None:
            self._look_for_shards()
            places = self._places([key])
        return places[0] if places else None

    def _opened(self, keys: Sequence[str]) -> tuple[list[Found], dict[str, memoryview]]:
        """Where each of `keys` lies, and the bytes of these shards."""
        for _ in range(_LOOKS):
            # another process may have written, merged or deleted shards since
            with contextlib.suppress(FileNotFoundError):
                places = self._places(keys)
                if places is not None:
                    maps = {name: self._map(name) for name in sorted({place.shard for place in places})}
                    for name, start, layout in places:
                        if start + layout[-1].start + layout[-1].size > len(maps[name]):
                            raise self._unreadable(name, "it was cut off")
                    return places, maps
            if not self._look_for_shards():
                break
        raise StorageError(f"{printable(self.folder)} lacks what was cached there a moment ago: start again.")

    def _places(self, keys: Sequence[str]) -> list[Found] | None:
        """None if one is not known."""
        try:
            return [self._recent[key] for key in keys]
        except KeyError:
            pass
        positions = self._index.find(pack(keys))
        if (positions < 0).any():
            return None
        places = self._index.at(positions)
        if len(self._recent) >= _RECENT:
            self._recent.clear()
        self._recent.update(zip(keys, places))
        return places

    def _forget(self) -> None:
        self._index = Index()
        self._recent: dict[str, Found] = {}
        self._known: dict[str, tuple[int, ...]] = {}
        self._open: OrderedDict[str, memoryview] = OrderedDict()

    def _look_for_shards(self) -> bool:
        """Looks until nothing changes any more, and says whether anything did.

        Once is not enough: a listing is not of one moment, and may miss both a shard and what it was just merged into.
        """
        looks = 0
        while looks < _LOOKS and self._look():
            looks += 1
        return looks > 0

    def _look(self) -> bool:
        names: set[str] = set()
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as files:
            names = {file.name for file in files if is_shard(file.name)}
        gone = not names.issuperset(self._known)
        if gone:
            # merged with others or deleted: what it held may lie in another shard that is known already
            self._forget()
        fresh = [n for n in names if n not in self._known or (self._known[n] and self._known[n] != self._stamp(n))]
        for name in sorted(fresh):
            self._add_shard(name)
        return gone or bool(fresh)

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
            data = map_file(self.folder / name)
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:
            raise self._unreadable(name, error) from error
        self._open[name] = data
        upkeep.touch(self.folder / name)
        if len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)
        return self._open[name]

    def _unreadable(self, name: str, why: object) -> StorageError:
        shown = printable(self.folder / name)
        return StorageError(f"{shown} became unreadable ({why}): delete it and start again.")


def _tensors(data: memoryview, place: Found) -> dict[str, Tensor]:
    first = place.start
    return {
        part.name: part.tensor(bytearray(data[first + part.start : first + part.start + part.size]))
        for part in place.layout
    }
