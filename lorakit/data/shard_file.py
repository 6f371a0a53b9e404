"""One shard: a safetensors file of many entries, each a few tensors named KEY/PART.

Here: writing one, and reading where in it everything lies. Not here: which shards there are (`shards.py`).

Files are read through memory maps of our own: taking a tensor from the safetensors library's costs twice as much as
copying its bytes.
"""

import contextlib
import json
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, islice
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
_NUMPY = frozenset(_DTYPES.values()) - {torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}
_CHUNK = 4096


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
            return part_tensor(self.dtype, self.shape)
        return torch.frombuffer(data, dtype=_DTYPES[self.dtype]).reshape(self.shape)


Layout = tuple[Part, ...]


def part_tensor(dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor to be filled, of a `Part.dtype`."""
    return torch.empty(shape, dtype=_DTYPES[dtype])


class Contents(NamedTuple):
    """What a shard holds: keys (n, KEY_BYTES) as bytes, and of each its layout and where in the file it starts."""

    keys: NDArray[Any]
    layouts: Sequence[Layout]
    starts: NDArray[Any]


class DamagedShard(Exception):
    """The file is no whole shard; the text says why."""


def write_shard(path: Path, entries: Mapping[str, Mapping[str, Tensor]]) -> Contents:
    """Writes `entries` at `path`, whole or not at all, and says what is where; StorageError if that cannot be."""
    layouts: dict[tuple[tuple[str, torch.dtype, tuple[int, ...]], ...], Layout] = {}
    packed: list[tuple[str, Layout, Sequence[Any]]] = []
    for key, tensors in entries.items():
        ready = [tensor.detach().cpu().contiguous() for tensor in tensors.values()]
        kind = tuple((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in zip(tensors, ready))
        if kind not in layouts:
            ends = [0, *accumulate(tensor.nbytes for tensor in ready)]
            layouts[kind] = tuple(
                Part(name, _NAMES[dtype], shape, start, end - start)
                for (name, dtype, shape), start, end in zip(kind, ends, ends[1:])
            )
        packed.append((key, layouts[kind], [_bytes_of(tensor) for tensor in ready]))
    starts = _write(path, packed)
    return Contents(pack(entries), [layout for _, layout, _ in packed], starts)


def merge_shards(path: Path, shards: Iterable[Path]) -> None:
    """Writes what `shards` hold as one at `path`; of an entry that is in several the last one's.

    Raises DamagedShard and OSError for what cannot be read.
    """
    found: dict[str, tuple[str, Layout, Sequence[Any]]] = {}
    for shard in shards:
        contents = read_contents(shard)
        if contents is not None:
            data = map_file(shard)
            for packed, layout, first in zip(contents.keys, contents.layouts, contents.starts.tolist()):
                key = packed.tobytes().hex()
                places = [(first + part.start, first + part.start + part.size) for part in layout]
                found[key] = key, layout, [data[start:end] for start, end in places]
    _write(path, list(found.values()))


def _write(path: Path, entries: Sequence[tuple[str, Layout, Sequence[Any]]]) -> NDArray[Any]:
    """Entries are (key, layout, the bytes of each part), which come to lie one after the other. Returns the starts.

    The header is put together by hand, and the disk told at once how much will come: half of a write's time.
    """
    starts, end = np.empty(len(entries), np.int64), 0
    about: dict[Part, tuple[str, str]] = {}
    lines = [f'"__metadata__":{{"format":{json.dumps(FORMAT)}}}']
    for i, (key, layout, _) in enumerate(entries):
        starts[i] = end
        for part in layout:
            if part not in about:
                shape = ",".join(map(str, part.shape))
                about[part] = json.dumps(part.name)[1:], f':{{"dtype":"{part.dtype}","shape":[{shape}],"data_offsets":['
            name, text = about[part]
            lines.append(f'"{key}/{name}{text}{end},{end + part.size}]}}')
            end += part.size
    header = ("{" + ",".join(lines) + "}").encode()
    header += b" " * (-len(header) % 8)
    make_folder(path.parent)
    with written_aside(path) as aside, open(aside, "wb") as file:
        with contextlib.suppress(OSError):  # not every file system can; where the disk is full the writing says so
            os.posix_fallocate(file.fileno(), 0, 8 + len(header) + end)
        file.write(len(header).to_bytes(8, "little") + header)
        for _, _, data in entries:
            for piece in data:
                file.write(piece)
    return starts + 8 + len(header)


def _bytes_of(tensor: Tensor) -> Any:
    """The bytes of a contiguous tensor on the CPU; numpy does not know all of torch's types."""
    if tensor.dtype in _NUMPY:
        return tensor.numpy()
    return tensor.reshape(-1).view(torch.uint8).numpy()


def pack(keys: Iterable[str]) -> NDArray[Any]:
    """Keys of 40 hexadecimal digits as bytes (n, KEY_BYTES); ValueError for another."""
    packed = bytearray()
    count, keys = 0, iter(keys)
    while some := list(islice(keys, _CHUNK)):
        packed += bytes.fromhex("".join(some))
        count += len(some)
    return np.frombuffer(packed, np.uint8).reshape(count, KEY_BYTES)


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
    return Contents(pack(entries), found, starts)


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    size = _DTYPES[dtype].itemsize
    for side in shape:
        size *= side
    return size
