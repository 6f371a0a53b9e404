"""Millions of examples in little memory: columns of numbers, and texts packed end to end.

`ExamplesBuilder` takes them one by one; `Examples` is a sequence of them, made anew at each access. What a sequence of
`Example` objects would take is about 1.5 KB each, and forking workers would copy all of it as they count references.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import overload

import numpy as np
from numpy.typing import NDArray

from lorakit.core.types import Example, Place
from lorakit.data.similar import LOOK_BYTES
from lorakit.data.sources.items import unescape

ROLES = ("train", "regularization", "validation")
"""What the numbers in `Examples.roles` stand for."""

_SAME = 0  # of a file's number: the file is the key's own name; a folder of pictures needs no other
_NO_FOCUS = float("nan")
_BETWEEN = "\x1e"  # stands between the captions of an example (ASCII's record separator)


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


@dataclass(frozen=True)
class _Beside:
    """Where the masks, or the inputs, of some examples lie: `rows` (M,) in rising order, `files` one for each, `spans`
    (M, 2)."""

    rows: NDArray[np.int64]
    files: Texts
    spans: NDArray[np.int64]
    digests: NDArray[np.uint8]

    def of(self, index: int) -> tuple[Place | None, str]:
        """Where that of example `index` lies, and its digest."""
        row = int(np.searchsorted(self.rows, index))
        if row == len(self.rows) or self.rows[row] != index:
            return None, ""
        return Place(self.files[row], *self.spans[row].tolist()), self.digests[row].tobytes().hex()


@dataclass
class _BesideBuilder:
    """Collects them."""

    rows: "array[int]" = field(default_factory=lambda: array("q"))
    files: Texts = field(default_factory=Texts)
    spans: "array[int]" = field(default_factory=lambda: array("q"))
    digests: bytearray = field(default_factory=bytearray)

    def add(self, row: int, place: Place | None, digest: str) -> None:
        if place is not None:
            self.rows.append(row)
            self.files.append(place.file)
            self.spans.extend(place[1:])
            self.digests += _digest(digest)

    def build(self) -> _Beside:
        return _Beside(
            np.frombuffer(self.rows, dtype=np.int64),
            self.files,
            np.frombuffer(self.spans, dtype=np.int64).reshape(-1, 2),
            np.frombuffer(self.digests, dtype=np.uint8).reshape(-1, 32),
        )


@dataclass(frozen=True, eq=False)
class Examples(Sequence[Example]):
    """A sequence of Example, at most 400 bytes each at keys of 80 and captions of 100 characters, without masks.

    `keys` is a sequence; `sources` (N,), `roles` (N,) (numbers in ROLES), `sizes` (N, 2) width and height, `digests`
    (N, 32) and `looks` (N, LOOK_BYTES), most significant byte first, are arrays that are not to be written to. Made by
    ExamplesBuilder.
    """

    keys: Texts
    sources: NDArray[np.int32]
    roles: NDArray[np.uint8]
    sizes: NDArray[np.int32]
    digests: NDArray[np.uint8]
    looks: NDArray[np.uint8]
    _captions: Texts
    _files: tuple[str, ...]
    _file_of: NDArray[np.int32]
    _spans: NDArray[np.int64]
    _focus: NDArray[np.float64]
    _masks: _Beside
    _inputs: _Beside

    def with_roles(self, roles: NDArray[np.uint8]) -> "Examples":
        """The same examples in other roles, (N,) numbers in ROLES; all else is shared."""
        roles = np.array(roles, dtype=np.uint8)
        if roles.shape != self.roles.shape or roles.max(initial=0) >= len(ROLES):
            raise ValueError(f"roles must be {len(self)} numbers below {len(ROLES)}")
        return replace(self, roles=roles)

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        key = self.keys[index]
        number = self._file_of[index]
        file = unescape(key.partition("/")[2]) if number == _SAME else self._files[number]
        mask, mask_digest = self._masks.of(index)
        given, given_digest = self._inputs.of(index)
        x, y = self._focus[index].tolist()
        width, height = self.sizes[index].tolist()
        return Example(
            key,
            int(self.sources[index]),
            Place(file, *self._spans[index].tolist()),
            tuple(self._captions[index].split(_BETWEEN)),
            (width, height),
            self.digests[index].tobytes().hex(),
            role=ROLES[self.roles[index]],
            mask=mask,
            mask_digest=mask_digest,
            focus=None if x != x else (x, y),
            look=int.from_bytes(self.looks[index].tobytes(), "big"),
            input=given,
            input_digest=given_digest,
        )

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of one example, without the rest of it."""
        return tuple(self._captions[index].split(_BETWEEN))

    def has_mask(self) -> NDArray[np.bool_]:
        """Which examples have a mask, (N,)."""
        found = np.zeros(len(self), dtype=bool)
        found[self._masks.rows] = True
        return found

    def has_focus(self) -> NDArray[np.bool_]:
        """Which examples have a focus, (N,)."""
        return ~np.isnan(self._focus[:, 0])

    def has_input(self) -> NDArray[np.bool_]:
        """Which examples are made of another picture, (N,)."""
        found = np.zeros(len(self), dtype=bool)
        found[self._inputs.rows] = True
        return found


@dataclass
class ExamplesBuilder:
    """Collects examples one after the other, in the memory that they will need."""

    _keys: Texts = field(default_factory=Texts)
    _captions: Texts = field(default_factory=Texts)
    _files: dict[str, int] = field(default_factory=lambda: {"": _SAME})
    _sources: "array[int]" = field(default_factory=lambda: array("i"))
    _roles: bytearray = field(default_factory=bytearray)
    _sizes: "array[int]" = field(default_factory=lambda: array("i"))
    _digests: bytearray = field(default_factory=bytearray)
    _looks: bytearray = field(default_factory=bytearray)
    _file_of: "array[int]" = field(default_factory=lambda: array("i"))
    _spans: "array[int]" = field(default_factory=lambda: array("q"))
    _focus: "array[float]" = field(default_factory=lambda: array("d"))
    _masks: _BesideBuilder = field(default_factory=_BesideBuilder)
    _inputs: _BesideBuilder = field(default_factory=_BesideBuilder)

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, example: Example) -> None:
        """Adds one at the end. Captions must be text that can be written as UTF-8 and must hold no U+001E."""
        assert example.captions and not any(_BETWEEN in caption for caption in example.captions)
        row = len(self._keys)
        self._keys.append(example.key)
        self._captions.append(_BETWEEN.join(example.captions))
        self._sources.append(example.source)
        self._roles.append(ROLES.index(example.role))
        self._sizes.extend(example.size)
        self._digests += _digest(example.digest)
        self._looks += example.look.to_bytes(LOOK_BYTES, "big")
        place = example.place
        same = place.file == unescape(example.key.partition("/")[2])
        # number 0 is taken: a table's rows, whose file is "", get a number of their own
        self._file_of.append(_SAME if same else self._files.setdefault(f"/{place.file}", len(self._files)))
        self._spans.extend((place.start, place.length))
        self._focus.extend(example.focus or (_NO_FOCUS, _NO_FOCUS))
        self._masks.add(row, example.mask, example.mask_digest)
        self._inputs.add(row, example.input, example.input_digest)

    def build(self) -> Examples:
        """All that were added. The builder must not be used again."""
        return Examples(
            keys=self._keys,
            sources=np.frombuffer(self._sources, dtype=np.int32),
            roles=np.frombuffer(self._roles, dtype=np.uint8),
            sizes=np.frombuffer(self._sizes, dtype=np.int32).reshape(-1, 2),
            digests=np.frombuffer(self._digests, dtype=np.uint8).reshape(-1, 32),
            looks=np.frombuffer(self._looks, dtype=np.uint8).reshape(-1, LOOK_BYTES),
            _captions=self._captions,
            _files=tuple(name[1:] for name in self._files),
            _file_of=np.frombuffer(self._file_of, dtype=np.int32),
            _spans=np.frombuffer(self._spans, dtype=np.int64).reshape(-1, 2),
            _focus=np.frombuffer(self._focus, dtype=np.float64).reshape(-1, 2),
            _masks=self._masks.build(),
            _inputs=self._inputs.build(),
        )


def _digest(text: str) -> bytes:
    """32 bytes of a sha256 in hexadecimal."""
    data = bytes.fromhex(text)
    assert len(data) == 32, f"{text!r} is no sha256"
    return data
