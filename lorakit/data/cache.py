"""What is cached, under which keys, and the filling of it: each picture and caption encoded once, by one process.

Here: keys and who encodes what. Not here: the store (`shards.py`), preparing pictures ahead of the encoder
(`ahead.py`), and the encoders, which are handed in.

All ranks fill together. The first says what is missing; then all work, each on its part, and meet every HEARTBEAT
seconds to share out anew what is left. So none waits longer than that and an item, and a slow rank loses work to the
others.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorakit.core import processes
from lorakit.core.digests import user_folder
from lorakit.core.errors import InputError
from lorakit.core.files import printable
from lorakit.core.types import Text
from lorakit.data.ahead import prepared
from lorakit.data.images import Cut, Prepared, pool_mask
from lorakit.data.shards import Cache, content_key, pack

Job = TypeVar("Job")

LATENTS_VERSION = 2
"""To be raised when the way from a file to what is encoded changes: `images.prepare_picture`, `images.pool_mask`."""

TEXT_VERSION = 2
"""To be raised when the way from a caption to its conditioning changes."""

# a shard is written when so many entries or bytes have come together
_SHARD_ENTRIES = 2048
_SHARD_BYTES = 128 << 20
# or after a quarter of the seconds that the filling has taken, but no less and no more than these: so a kill loses a
# fifth of the work or 20 s of it, and a filling writes some fifteen files and three a minute, which each run opens
_SHARD_SECONDS = 2.0, 20.0


class Filled(NamedTuple):
    """How many entries were made, by all ranks together, and how many were there."""

    made: int
    found: int


def latent_key(
    digest: str,
    cut: Cut,
    *,
    fingerprint: str,
    mask_digest: str = "",
    alpha_mask: bool = False,
    input_digest: str = "",
) -> str:
    """The key of a picture's latents: its file's `digest`, how it is cut, its mask, the encoder's `fingerprint`; and
    the digest of the picture that it is made of."""
    how = (*cut.bucket, *cut.anchor, int(cut.flip), len(cut.jitter), *cut.jitter, cut.background)
    pair = [input_digest] if input_digest else []
    return content_key("latents", LATENTS_VERSION, digest, *how, mask_digest, int(alpha_mask), fingerprint, *pair)


def text_key(caption: str, fingerprint: str) -> str:
    """The key of a caption's conditioning; `fingerprint` stands for the encoders and how they are used."""
    return content_key("text", TEXT_VERSION, fingerprint, caption)


def default_folder() -> Path:
    """Where the cache lies unless the recipe says otherwise: lorakit/data in the user's cache folder."""
    return user_folder() / "data"


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


def refuse_cache(folder: Path, sources: Sequence[Path]) -> None:
    """Raises InputError if `folder`, which data.cache names, is a file or in one, or lies among the users' pictures."""
    refuse_within(folder, sources, key="data.cache")
    for path in (folder, *folder.parents):
        if os.path.exists(path) and not os.path.isdir(path):
            where = "" if path == folder else f": {printable(path.name)} in it"
            raise InputError(f"data.cache = {printable(folder)}{where} is a file: give a folder.")


def fill_latents(
    cache: Cache,
    jobs: Sequence[tuple[str, str, Job]],
    *,
    prepare: Callable[[Job], Prepared],
    encode: Callable[[Tensor], Tensor],
    encode_input: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 1,
    workers: int = 0,
    on_progress: Callable[[int], object] | None = None,
) -> Filled:
    """Encodes the pictures that `cache` lacks, together with the other ranks, each of which calls this alike.

    `jobs` are (`latent_key`, name for messages, what `prepare` takes), asked for one at a time and as often as needed.
    `prepare` reads and cuts a picture, ahead of the encoder, in `workers` processes or else in threads. `encode` takes
    pixels (B, 3, H, W) in -1 … 1 and gives latents (B, C, h, w). An entry is `latents` (C, h, w) in float32 and, where
    the picture has one, its `mask` (1, h, w), and with `encode_input` what that makes of its `input`. Pictures are
    encoded one at a time unless `batch_size` says otherwise: what else is in a batch changes the last bits, and what
    else is missing must not. `on_progress` hears of every entry made, by any rank. Raises what `prepare` raises and,
    for latents that are not finite, InputError; on every rank.
    """
    began = time.monotonic()

    def work(part: NDArray[Any]) -> Generator[int, None, None]:
        with (
            _Shards(cache, began) as shards,
            contextlib.closing(prepared(jobs, part, prepare, workers=workers)) as pictures,
        ):
            for batch in _batches(pictures, batch_size):
                with torch.no_grad():
                    latents = _encoded(encode, [picture.pixels for _, picture in batch])
                    inputs = [picture.input for _, picture in batch if picture.input is not None]
                    shown = _encoded(encode_input, inputs) if encode_input and inputs else [None] * len(batch)
                for (job, picture), of_picture, of_input in zip(batch, latents, shown, strict=True):
                    key, label, _ = jobs[job]
                    shards.add(key, _entry(of_picture, picture.mask, of_input, label=label))
                yield len(batch)

    return _fill(cache, (jobs[i][0] for i in range(len(jobs))), work, on_progress)


def fill_text(
    cache: Cache,
    captions: Sequence[str],
    *,
    encode: Callable[[Sequence[str]], Text],
    fingerprint: str,
    on_progress: Callable[[int], object] | None = None,
) -> Filled:
    """Encodes the captions that `cache` lacks, one at a time, together with the other ranks; else as `fill_latents`.

    `encode` gives tensors of (1, …) by name, kept in their own precision.
    """
    began = time.monotonic()

    def work(part: NDArray[Any]) -> Generator[int, None, None]:
        with _Shards(cache, began) as shards:
            for job in part.tolist():
                caption = captions[job]
                with torch.no_grad():
                    text = encode([caption])
                entry = {name: tensor[0].detach().cpu() for name, tensor in text.items()}
                shards.add(text_key(caption, fingerprint), entry)
                yield 1

    keys = (text_key(captions[i], fingerprint) for i in range(len(captions)))
    return _fill(cache, keys, work, on_progress)


def _encoded(encode: Callable[[Tensor], Tensor], pictures: Sequence[Tensor]) -> Tensor:
    return encode(torch.stack(list(pictures))).detach().float().cpu()


def _entry(latents: Tensor, mask: Tensor | None, shown: Tensor | None, *, label: str) -> dict[str, Tensor]:
    entry = {"latents": latents} if shown is None else {"latents": latents, "input": shown}
    if not all(bool(tensor.isfinite().all()) for tensor in entry.values()):
        raise InputError(
            f"{printable(label)}: its latents are not finite: look at the picture, or encode in another precision."
        )
    if mask is not None:
        entry["mask"] = pool_mask(mask, (latents.shape[-2], latents.shape[-1])).float()
    return entry


# -- sharing the work -----------------------------------------------------------------------------------------------


def _fill(
    cache: Cache,
    keys: Iterable[str],
    work: Callable[[NDArray[Any]], Generator[int, None, None]],
    on_progress: Callable[[int], object] | None,
) -> Filled:
    """Has `work` done on all that is missing; it takes numbers of keys and yields how many it has just finished."""
    todo, found = processes.on_first_rank(lambda: _missing(cache, keys))
    made = len(todo)
    alone = processes.world() == 1
    while len(todo):
        parts = np.array_split(todo, processes.world())
        done, error = _round(work, parts[processes.rank()], math.inf if alone else processes.HEARTBEAT, on_progress)
        if error and alone:
            raise error
        outcomes = processes.gather_objects((done, processes.portable(error)))
        processes.raise_first([of_rank for _, of_rank in outcomes], own=error)
        if on_progress:
            on_progress(sum(count for count, _ in outcomes) - done)
        todo = np.concatenate([part[count:] for part, (count, _) in zip(parts, outcomes)])
    return Filled(made, found)


def _missing(cache: Cache, keys: Iterable[str]) -> tuple[NDArray[Any], int]:
    """The numbers of those `keys` that `cache` lacks, each key once and in order, and how many others it has."""
    packed = pack(keys)
    # as texts of fixed length, which numpy can sort: a row is one key
    _, first = np.unique(packed.view(f"S{packed.shape[1]}")[:, 0], return_index=True)
    first.sort()
    there = cache.contains(packed[first])
    return first[~there], int(there.sum())


def _round(
    work: Callable[[NDArray[Any]], Generator[int, None, None]],
    part: NDArray[Any],
    seconds: float,
    on_progress: Callable[[int], object] | None,
) -> tuple[int, BaseException | None]:
    """Works on `part` for so many seconds, and says how much of it was done and written, and what went wrong or, by a
    signal, ended it."""
    done, end = 0, time.monotonic() + seconds
    try:
        with contextlib.closing(work(part)) as steps:
            for count in steps:
                done += count
                if on_progress:
                    on_progress(count)
                if time.monotonic() >= end:
                    break
    except (Exception, KeyboardInterrupt) as error:
        return done, error
    return done, None


def _batches(pictures: Iterable[tuple[int, Prepared]], batch_size: int) -> Iterator[list[tuple[int, Prepared]]]:
    """Neighbours of one size together, at most `batch_size`."""
    batch: list[tuple[int, Prepared]] = []
    for number, picture in pictures:
        if batch and batch[0][1].pixels.shape != picture.pixels.shape:
            yield batch
            batch = []
        batch.append((number, picture))
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


class _Shards:
    """Collects entries and writes them a shard at a time; on leaving, by an error too, what is left.

    `began` is when the filling did, whose rounds have each a collection of their own.
    """

    def __init__(self, cache: Cache, began: float) -> None:
        self._cache, self._began = cache, began
        self._entries: dict[str, Mapping[str, Tensor]] = {}
        self._bytes = 0
        self._since = time.monotonic()

    def __enter__(self) -> "_Shards":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flush()

    def add(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        self._entries[key] = tensors
        self._bytes += sum(tensor.nbytes for tensor in tensors.values())
        now, (shortest, longest) = time.monotonic(), _SHARD_SECONDS
        late = now - self._since >= min(max((now - self._began) / 4, shortest), longest)
        if late or len(self._entries) >= _SHARD_ENTRIES or self._bytes >= _SHARD_BYTES:
            self._flush()

    def _flush(self) -> None:
        self._cache.write(self._entries)
        self._entries, self._bytes = {}, 0
        self._since = time.monotonic()
