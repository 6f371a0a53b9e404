"""A store of tensors by the content they were made from, shared by runs and by processes.

Here: the store. Not here: what is put in and under which keys (`cache.py`). Entries lie packed in safetensors files,
"shards", whose headers are the index: one shard a write, whole or not at all, under a name made from its keys. So
several processes may write at once, and one that is killed loses only what it had not written yet.
"""

import contextlib
import hashlib
import logging
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorakit.core.errors import StorageError
from lorakit.core.files import make_folder, printable, write_tensors

log = logging.getLogger("lorakit")

_FORMAT = "lorakit cache 1"
_PREFIX, _SUFFIX = "entries-", ".safetensors"
# an open shard costs address space and, on some systems, a file handle, of which a process often has 1,024
_OPEN_SHARDS = 256


def content_key(*parts: object) -> str:
    """A key of 160 bits that depends on every part, by its text."""
    text = "\x1f".join(str(part) for part in parts)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:40]


class Cache:
    """The store in `folder`. Handed to another process it is opened there anew."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._index: dict[str, tuple[str, tuple[str, ...]]] = {}
        self._known: set[str] = set()
        self._open: OrderedDict[str, Any] = OrderedDict()

    def __reduce__(self) -> tuple[type["Cache"], tuple[Path]]:
        return type(self), (self.folder,)

    def has(self, key: str) -> bool:
        if key not in self._index:
            self._look_for_shards()
        return key in self._index

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` that are not there, each once, in order."""
        self._look_for_shards()
        return [key for key in dict.fromkeys(keys) if key not in self._index]

    def write(self, entries: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Adds `entries`, each a few named tensors; StorageError if they cannot be written."""
        if not entries:
            return
        name = f"{_PREFIX}{content_key('shard', *sorted(entries))[:24]}{_SUFFIX}"
        tensors = {f"{key}/{part}": tensor for key, parts in entries.items() for part, tensor in parts.items()}
        write_tensors(make_folder(self.folder) / name, tensors, {"format": _FORMAT})
        self._known.discard(name)
        self._add_shard(name)

    def read(self, key: str) -> dict[str, Tensor]:
        """The tensors of `key`; StorageError if it is not there or not readable any more."""
        if not self.has(key):
            raise StorageError(f"{printable(self.folder)} lacks what was cached there a moment ago: start again.")
        shard, parts = self._index[key]
        try:
            return {part: self._shard(shard).get_tensor(f"{key}/{part}") for part in parts}
        except (SafetensorError, OSError) as error:
            raise StorageError(
                f"{printable(self.folder / shard)} became unreadable ({error}): delete it and start again."
            ) from error

    def shard_of(self, key: str) -> str:
        """The name of the file that `key` is read from."""
        return self._index[key][0] if self.has(key) else ""

    def _look_for_shards(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            with os.scandir(self.folder) as files:
                names = {file.name for file in files if file.name.startswith(_PREFIX) and file.name.endswith(_SUFFIX)}
            for name in sorted(names - self._known):
                self._add_shard(name)

    def _add_shard(self, name: str) -> None:
        self._known.add(name)
        try:
            shard = self._shard(name)
            if (shard.metadata() or {}).get("format") != _FORMAT:
                return
            parts: dict[str, list[str]] = {}
            for full in shard.keys():  # noqa: SIM118, it is no mapping
                key, _, part = full.partition("/")
                parts.setdefault(key, []).append(part)
        except (SafetensorError, OSError) as error:
            log.warning(
                "%s is damaged (%s): it is left out, what it held is made anew, and it may be deleted.",
                printable(self.folder / name),
                error,
            )
            return
        for key, names in parts.items():
            self._index[key] = name, tuple(names)

    def _shard(self, name: str) -> Any:
        """The open shard, memory-mapped: only what is read of it is loaded."""
        if name in self._open:
            self._open.move_to_end(name)
        else:
            self._open[name] = safe_open(str(self.folder / name), "pt")
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        return self._open[name]
