"""One shard: a safetensors file of many entries, each a few tensors named KEY/PART.

Here: writing one, and reading where in it everything lies. Not here: which shards there are (`shards.py`).

Files are read through memory maps of our own: taking a tensor from the safetensors library's costs twice as much as
copying its bytes.
"""

import json
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorakit.core.files import make_folder, written_aside

FORMAT = "lorakit cache 1"
KEY_BYTES = 20
_MAX_HEADER = 256 << 20
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Part(NamedTuple):
    """A tensor of an entry: `start` bytes after the entry's, `size` bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def tensor(self, data: bytearray) -> Tensor:
        """The tensor over the writable bytes `data`, which it shares."""
        if not self.size:
            return self.empty()
        return torch.frombuffer(data, dtype=_DTYPES[self.dtype]).reshape(self.shape)

    def empty(self, *batch: int) -> Tensor:
        """A tensor for as many of its kind as `batch` says, (*batch, …)."""
        return torch.empty((*batch, *self.shape), dtype=_DTYPES[self.dtype])


Layout = tuple[Part, ...]


class Contents(NamedTuple):
    """What a shard holds: keys (n, KEY_BYTES) as bytes, and of each its layout and where in the file it starts."""

    keys: NDArray[Any]
    layouts: Sequence[Layout]
    starts: NDArray[Any]


class DamagedShard(Exception):
    """The file is no whole shard; the text says why."""


def write_shard(path: Path, entries: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Writes `entries` at `path`, whole or not at all; StorageError if that cannot be."""
    parts = [
        (f"{key}/{name}", tensor.detach().cpu().contiguous())
        for key, tensors in entries.items()
        for name, tensor in tensors.items()
    ]
    described = [(name, _NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes) for name, tensor in parts]
    _write(path, described, (tensor.reshape(-1).view(torch.uint8).numpy() for _, tensor in parts))


def merge_shards(path: Path, shards: Iterable[Path]) -> None:
    """Writes what `shards` hold as one at `path`; of an entry that is in several the last one's.

    Raises DamagedShard and OSError for what cannot be read.
    """
    found: dict[bytes, tuple[memoryview, Layout, int]] = {}
    for shard in shards:
        contents = read_contents(shard)
        if contents is not None:
            data = map_file(shard)
            for key, layout, start in zip(contents.keys, contents.layouts, contents.starts.tolist()):
                found[key.tobytes()] = data, layout, start
    described = [
        (f"{key.hex()}/{part.name}", part.dtype, part.shape, part.size)
        for key, (_, layout, _) in found.items()
        for part in layout
    ]
    pieces = (
        data[start + part.start : start + part.start + part.size]
        for data, layout, start in found.values()
        for part in layout
    )
    _write(path, described, pieces)


def _write(path: Path, parts: Sequence[tuple[str, str, tuple[int, ...], int]], data: Iterator[Any]) -> None:
    """Parts are (name, type, shape, bytes), in the order of `data`: entries lie whole, one after the other."""
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT}}
    end = 0
    for name, dtype, shape, size in parts:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (end, end + size)}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    make_folder(path.parent)
    with written_aside(path) as aside, open(aside, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for piece in data:
            file.write(piece)


def map_file(path: Path) -> memoryview:
    """The bytes of a file, read-only, loaded as they are asked for; they stay when the file is deleted."""
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def read_contents(path: Path) -> Contents | None:
    """What the shard at `path` holds, None if it is another program's file.

    Raises DamagedShard if it is not whole, OSError if it cannot be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise DamagedShard("its header is cut off")
        try:
            header = json.loads(file.read(length))
            if header.get("__metadata__", {}).get("format") != FORMAT:
                return None
            return _contents(header, first=8 + length, size=size)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedShard(f"its header cannot be read: {type(error).__name__}") from None


def _contents(header: dict[str, Any], *, first: int, size: int) -> Contents:
    entries: dict[str, list[tuple[int, int, str, str, tuple[int, ...]]]] = {}
    last = 0
    for full, about in header.items():
        if full == "__metadata__":
            continue
        key, _, name = full.partition("/")
        start, end = about["data_offsets"]
        shape = tuple(about["shape"])
        if not 0 <= start <= end or end - start != _bytes(about["dtype"], shape):
            raise ValueError(full)
        last = max(last, end)
        entries.setdefault(key, []).append((start, end, name, about["dtype"], shape))
    if first + last != size:
        raise DamagedShard(f"it has {size} bytes and should have {first + last}")
    layouts: dict[Layout, Layout] = {}
    found: list[Layout] = []
    starts = np.empty(len(entries), np.int64)
    for i, parts in enumerate(entries.values()):
        parts.sort()
        origin = parts[0][0]
        layout = tuple(
            Part(name, dtype, shape, start - origin, end - start) for start, end, name, dtype, shape in parts
        )
        found.append(layouts.setdefault(layout, layout))
        starts[i] = first + origin
    keys = np.frombuffer(bytes.fromhex("".join(entries)), np.uint8).reshape(len(entries), KEY_BYTES)
    return Contents(keys, found, starts)


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    size = _DTYPES[dtype].itemsize
    for side in shape:
        size *= side
    return size
