"""Which entry lies where, for millions of them in a few arrays: 36 bytes an entry.

Here: keys to places. Not here: files (`shards.py`).
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lorakit.data.shard_file import KEY_BYTES, Contents, Layout

Array = NDArray[Any]


class Found(NamedTuple):
    """Where an entry lies: in `shard`, from byte `start` on, its tensors as `layout` says."""

    shard: str
    start: int
    layout: Layout


class _Columns(NamedTuple):
    """Arrays of one length, sorted by `head`; of equal keys the one that was added last comes last."""

    head: Array  # the first 8 bytes of a key as a number
    tail: Array  # (n, 12), the other bytes
    shard: Array
    layout: Array
    start: Array


class Index:
    """Grows by a shard at a time; what is added later takes the place of what was there."""

    def __init__(self) -> None:
        self._shards: list[str] = []
        self._layouts: list[Layout] = []
        self._layout_ids: dict[Layout, int] = {}
        self._added: list[_Columns] = []
        self._sorted = _Columns(
            np.empty(0, np.uint64), np.empty((0, KEY_BYTES - 8), np.uint8), *(np.empty(0, t) for t in (_I4, _I4, _I8))
        )

    def add(self, shard: str, contents: Contents) -> None:
        layouts = np.empty(len(contents.layouts), _I4)
        for i, layout in enumerate(contents.layouts):
            number = self._layout_ids.get(layout)
            if number is None:
                number = self._layout_ids[layout] = len(self._layouts)
                self._layouts.append(layout)
            layouts[i] = number
        shards = np.full(len(layouts), len(self._shards), _I4)
        self._shards.append(shard)
        self._added.append(
            _Columns(_head(contents.keys), contents.keys[:, 8:].copy(), shards, layouts, contents.starts)
        )

    def __len__(self) -> int:
        self._sort()
        return len(self._sorted.head)

    def find(self, keys: Array) -> Array:
        """The positions of packed keys, for `at` and `shards_at`; -1 for what is not there."""
        self._sort()
        head, tail = _head(keys), keys[:, 8:]
        if not len(self._sorted.head):
            return np.full(len(keys), -1)
        at = np.searchsorted(self._sorted.head, head, side="right") - 1
        same = (self._sorted.head[at] == head) & (at >= 0)
        fits = same & (self._sorted.tail[at] == tail).all(1)
        for i in np.flatnonzero(same & ~fits):
            at[i] = self._before(int(at[i]), head[i], tail[i])
            fits[i] = at[i] >= 0
        return np.where(fits, at, -1)

    def at(self, positions: Array) -> list[Found]:
        """Where the entries at `positions` lie."""
        columns = self._sorted
        rows = zip(*(column[positions].tolist() for column in (columns.shard, columns.start, columns.layout)))
        return [Found(self._shards[shard], start, self._layouts[layout]) for shard, start, layout in rows]

    def shards_at(self, positions: Array) -> list[str]:
        """The shards of all these positions, each once."""
        return [self._shards[i] for i in np.unique(self._sorted.shard[positions]).tolist()]

    def _before(self, at: int, head: Any, tail: Array) -> int:
        """The last entry up to `at` that has this head and tail: heads of different keys may be the same."""
        while at >= 0 and self._sorted.head[at] == head:
            if bool((self._sorted.tail[at] == tail).all()):
                return at
            at -= 1
        return -1

    def _sort(self) -> None:
        if not self._added:
            return
        columns = [list(column) for column in zip(self._sorted, *self._added)]
        self._added = []
        head = np.concatenate(columns[0])
        columns[0] = []
        order = np.argsort(head, kind="stable")
        self._sorted = self._sorted._replace(head=head[order])
        del head
        # column by column, so that no more than one of them is there twice
        done = []
        for column in columns[1:]:
            whole = np.concatenate(column)
            column.clear()
            done.append(whole[order])
            del whole
        del order
        head = self._sorted.head
        last = np.ones(len(head), bool)
        last[:-1] = (head[1:] != head[:-1]) | (done[0][1:] != done[0][:-1]).any(1)
        self._sorted = _Columns(head, *done)
        if not last.all():
            self._sorted = _Columns(*(column[last] for column in self._sorted))


_I4, _I8 = np.int32, np.int64


def _head(keys: Array) -> Array:
    return np.ascontiguousarray(keys[:, :8]).view(">u8").ravel().astype(np.uint64)
