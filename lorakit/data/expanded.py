"""A long sequence that is made as it is read: of millions of examples, all that each of them stands for."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

T = TypeVar("T")


class Expanded(Sequence[T], Generic[T]):
    """`counts[i]` items for each i, one after the other, made by `item(i, number)` when they are asked for."""

    def __init__(self, counts: Any, item: Callable[[int, int], T]) -> None:
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._item = item

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: Any) -> Any:
        position = range(len(self))[index]
        owner = int(np.searchsorted(self._ends, position, side="right"))
        return self._item(owner, position - (int(self._ends[owner - 1]) if owner else 0))
