"""Millions of examples in little memory: columns of numbers, and texts packed end to end.

`ExamplesBuilder` takes them one by one; `Examples` is a sequence of them, made anew at each access.
"""

from array import array
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from lorakit.core.types import Example, Place
from lorakit.data.sources.items import escape, unescape

ROLES = ("train", "regularization", "validation")
"""What the numbers in `Examples.roles` stand for."""

_SAME = -1  # of a file's number: the file is the key's own name


class Texts(Sequence[str]):
    """Texts packed as UTF-8, each decoded when it is asked for."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._ends = array("q", [0])

    def append(self, text: str) -> None:
        self._data += text.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._data))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return self._data[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


class Examples(Sequence[Example]):
    """A sequence of Example, at most 400 bytes each at keys of 80 and captions of 100 characters, without masks.

    `keys` is a sequence; `sources` (N,), `roles` (N,) (numbers in ROLES), `sizes` (N, 2) width and height, `digests`
    (N, 32) and `looks` (N, 16) are arrays that are not to be written to. Made by ExamplesBuilder.
    """

    keys: Texts
    sources: NDArray[np.int32]
    roles: NDArray[np.uint8]
    sizes: NDArray[np.int32]
    digests: NDArray[np.uint8]
    looks: NDArray[np.uint8]

    def __init__(self, columns: dict[str, object]) -> None:
        self.__dict__.update(columns)

    def with_roles(self, roles: NDArray[np.uint8]) -> "Examples":
        """The same examples in other roles, (N,) numbers in ROLES; all else is shared."""
        roles = np.ascontiguousarray(roles, dtype=np.uint8)
        if roles.shape != self.roles.shape or roles.max(initial=0) >= len(ROLES):
            raise ValueError(f"roles must be {len(self)} numbers below {len(ROLES)}")
        return Examples({**self.__dict__, "roles": roles})

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        raise NotImplementedError


class ExamplesBuilder:
    """Collects examples one after the other."""

    def add(self, example: Example) -> None:
        """Adds one at the end."""
        raise NotImplementedError

    def build(self) -> Examples:
        """All that were added; the builder is empty then."""
        raise NotImplementedError


_ = (Place, escape, unescape, _SAME)
