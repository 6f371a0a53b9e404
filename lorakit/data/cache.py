"""What is cached, under which keys, and the filling of it: each picture and caption encoded once, by one process.

Here: keys, who encodes what, and reading pictures ahead of the encoder. Not here: the store (`shards.py`) and the
encoders, which are handed in. A process never waits for another: who needs everything there waits for all itself.
"""

import hashlib
import io
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from lorakit.core.errors import InputError
from lorakit.core.files import printable
from lorakit.core.types import Example, Text
from lorakit.data.buckets import Bucket
from lorakit.data.images import BadImageError, crop_to, pixels, upright_rgb
from lorakit.data.shards import Cache, content_key

LATENTS_VERSION = 1
"""To be raised when the way from a file to what is encoded changes: `images.upright_rgb`, `images.crop_to`."""

# a shard is written when this many entries or seconds have come together; a kill loses no more
_SHARD_ENTRIES = 512
_SHARD_SECONDS = 20.0
_READERS, _AHEAD = 2, 6


def latent_key(digest: str, bucket: Bucket, *, fingerprint: str, flip: bool = False) -> str:
    """The key of a picture's latents: file `digest`, size, mirrored or not, and the encoder's `fingerprint`."""
    return content_key("latents", LATENTS_VERSION, digest, bucket.width, bucket.height, int(flip), fingerprint)


def text_key(caption: str, *, fingerprint: str) -> str:
    """The key of a caption's conditioning."""
    return content_key("text", fingerprint, caption)


def default_folder() -> Path:
    """Where the cache lies unless the recipe says otherwise: lorakit/data in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorakit" / "data"


def refuse_within(folder: Path, sources: Sequence[Path], *, key: str) -> None:
    """Raises InputError if `folder`, the setting `key`, lies in one of the users' own picture folders."""
    real = Path(os.path.realpath(folder))
    inside = [i for i, source in enumerate(sources) if real.is_relative_to(os.path.realpath(source))]
    if inside:
        raise InputError(
            [
                f"{key} = {printable(folder)} lies within data.sources.{i}.path: choose a folder outside it, "
                "nothing is ever written among your pictures."
                for i in inside
            ]
        )


def fill_latents(
    cache: Cache,
    examples: Sequence[Example],
    bucket_of: Sequence[Bucket],
    *,
    encode: Callable[[Tensor], Tensor],
    fingerprint: str,
    batch_size: int = 1,
    rank: int = 0,
    world: int = 1,
    on_progress: Callable[[int], object] | None = None,
) -> int:
    """Encodes what `cache` lacks of this rank's part of `examples`, and says how many that were.

    `encode` takes pixels (B, 3, H, W) in -1 … 1 and gives latents (B, …), kept as float32. Pictures are encoded one at
    a time unless `batch_size` says otherwise: what else is in a batch changes the last bits, and what else is missing
    must not. Raises InputError for a file that changed since it was scanned and for latents that are not finite.
    """
    wanted = {latent_key(e.digest, b, fingerprint=fingerprint): (e, b) for e, b in zip(examples, bucket_of)}
    todo = {key: wanted[key] for key in _own_part(cache, list(wanted), rank=rank, world=world)}
    with _Shards(cache) as shards, ThreadPoolExecutor(_READERS) as pool:
        pictures = _read_ahead(pool, list(todo.values()))
        for keys in _batches(todo, batch_size):
            batch = torch.stack([next(pictures) for _ in keys])
            with torch.no_grad():
                latents = encode(batch).detach().float().cpu()
            for key, of_picture in zip(keys, latents):
                if not bool(of_picture.isfinite().all()):
                    raise InputError(
                        f"{printable(todo[key][0].path)}: its latents are not finite: look at the picture, or encode "
                        "in another precision."
                    )
                shards.add(key, {"latents": of_picture})
                if on_progress:
                    on_progress(1)
    return len(todo)


def fill_text(
    cache: Cache,
    captions: Iterable[str],
    *,
    encode: Callable[[Sequence[str]], Text],
    fingerprint: str,
    rank: int = 0,
    world: int = 1,
    on_progress: Callable[[int], object] | None = None,
) -> int:
    """Encodes what `cache` lacks of this rank's part of `captions`, one at a time, and says how many that were.

    `encode` gives tensors of (1, …) by name, kept in their own precision.
    """
    wanted = {text_key(caption, fingerprint=fingerprint): caption for caption in captions}
    todo = _own_part(cache, list(wanted), rank=rank, world=world)
    with _Shards(cache) as shards:
        for key in todo:
            with torch.no_grad():
                text = encode([wanted[key]])
            shards.add(key, {name: tensor[0].detach().cpu() for name, tensor in text.items()})
            if on_progress:
                on_progress(1)
    return len(todo)


def _own_part(cache: Cache, keys: Sequence[str], *, rank: int, world: int) -> list[str]:
    """Every world-th of `keys`, as far as missing.

    The split is over all keys, not over the missing ones: those change while other ranks write.
    """
    return cache.missing(keys[rank::world])


def _batches(todo: Mapping[str, tuple[Example, Bucket]], batch_size: int) -> Iterator[list[str]]:
    """Neighbours of one bucket together, at most `batch_size`."""
    batch: list[str] = []
    for key, (_, bucket) in todo.items():
        if batch and (len(batch) == batch_size or todo[batch[0]][1] != bucket):
            yield batch
            batch = []
        batch.append(key)
    if batch:
        yield batch


def _read_ahead(pool: ThreadPoolExecutor, jobs: Sequence[tuple[Example, Bucket]]) -> Iterator[Tensor]:
    """The pictures of `jobs` in order, the next few already being decoded."""
    waiting: deque[Future[Tensor]] = deque()
    for example, bucket in jobs:
        waiting.append(pool.submit(_read, example, bucket))
        if len(waiting) > _AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _read(example: Example, bucket: Bucket) -> Tensor:
    try:
        data = example.path.read_bytes()
        if hashlib.sha256(data).hexdigest() == example.digest:
            return pixels(crop_to(upright_rgb(io.BytesIO(data)), bucket)[0])
    except (OSError, BadImageError) as error:
        raise InputError(f"{printable(example.path)}: it cannot be read any more ({printable(error)}).") from None
    raise InputError(f"{printable(example.path)}: it was changed since the folder was read: start again.")


class _Shards:
    """Collects entries and writes them a shard at a time; on leaving, by an error too, what is left."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._entries: dict[str, Mapping[str, Tensor]] = {}
        self._since = time.monotonic()

    def __enter__(self) -> "_Shards":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flush()

    def add(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        self._entries[key] = tensors
        if len(self._entries) >= _SHARD_ENTRIES or time.monotonic() - self._since >= _SHARD_SECONDS:
            self._flush()

    def _flush(self) -> None:
        self._cache.write(self._entries)
        self._entries = {}
        self._since = time.monotonic()
