"""Which samples each step trains on, for ever, as a pure function of a seed and the examples' keys and buckets.

Here: the order of an epoch, its global batches, a rank's share of one and the micro steps in it. Nothing is remembered
but a cache, so a resumed run needs only the number of its step. Not here: who takes part in which epoch (`eras.py`) and
the samples' contents (`loader.py`).

A *slot* is an entry and which of its repeats it is. Entries are indices throughout: a million of them are a few arrays.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lorakit.core.seeding import hashed
from lorakit.data.buckets import Bucket
from lorakit.data.eras import Draw, Era, Eras, Walk

__all__ = ["Draw", "GlobalBatch", "Plan", "share"]

Array = NDArray[Any]

# so many slots are hashed at a time: their Python integers cost ten times what the array holds
_CHUNK = 1 << 16


@dataclass(frozen=True)
class GlobalBatch:
    """What one optimizer step trains on: indices of the plan's entries, in order, and the bucket that each comes in.

    `numbers` are the samples' numbers in the run: how many samples came before, over all epochs.
    """

    epoch: int
    numbers: range
    entries: tuple[int, ...]
    buckets: tuple[Bucket, ...]


class _Slots(NamedTuple):
    """Arrays of one length: entries (indices of the plan's), which of its repeats each is, and its bucket's number."""

    entries: Array
    repeats: Array
    buckets: Array


class _Epoch(NamedTuple):
    """An epoch's samples in the order they were dealt in, cut into global batches, and the order these come in."""

    number: int
    first_step: int
    first_sample: int
    entries: Array
    buckets: Array
    order: Array


def share(count: int, rank: int, world: int) -> range:
    """The contiguous part of `count` samples that a rank takes; parts differ in size by at most one."""
    return range(rank * count // world, (rank + 1) * count // world)


class Plan:
    """The global batches of all steps, from the entries' `keys`, `sources` and `bucket_ids` (N, R).

    An entry's source says by its `Draw` how it takes part; its buckets are those ids of its row that are not -1, one
    for each resolution that suits it. An entry without a bucket or with source -1 takes no part. `content` stands for
    whatever else makes the examples what they are: it changes the plan's digest, not the order.

    Slots are ordered by a hash of (seed, epoch, key, repeat). Each bucket gives full global batches; the remainders of
    all buckets share the last ones, each remainder kept together; then the order of the global batches is shuffled. So
    all but one in an epoch are full.

    Each training entry comes exactly `repeats` times an epoch. A source with `samples` gives that many, and the
    regularization sources without are one pool that gives as many as the training sources together; both walk a
    permutation of their own that goes on across epochs, so that all are used evenly however few or many they are.
    Within a bucket the sources of a role interleave in proportion, and so do the roles.

    Where an entry has several buckets, its k-th coming takes number (start + k) modulo their number, start by a hash of
    the key: k = epoch · repeats + repeat, and in a walk the permutation's number in place of the epoch's.
    """

    def __init__(
        self,
        keys: Sequence[str],
        sources: Array,
        bucket_ids: Array,
        *,
        buckets: Sequence[Bucket],
        draws: Sequence[Draw],
        seed: int,
        global_batch: int,
        content: str = "",
    ) -> None:
        assert global_batch > 0, "a global batch holds a sample"
        assert len(set(buckets)) == len(buckets), "a bucket has one number"
        self.keys = keys
        self.sources = np.asarray(sources, np.int32)
        self.bucket_ids = np.asarray(bucket_ids, np.int16)
        assert self.sources.shape == (len(keys),) and self.bucket_ids.shape[:1] == (len(keys),)
        assert self.bucket_ids.ndim == 2, "bucket_ids has a column for each resolution"
        self.buckets = tuple(buckets)
        assert self.sources.max(initial=-1) < len(draws), "every source has a draw"
        self.draws = tuple(draws)
        self.seed = seed
        self.global_batch = global_batch
        self.content = content
        self._choices = (self.bucket_ids >= 0).sum(1, dtype=np.uint8)
        drawn = self.sources[(self._choices > 0) & (self.sources >= 0)]
        counts = np.bincount(drawn, minlength=len(self.draws))
        self._eras = Eras(self.draws, counts.tolist(), global_batch=global_batch)
        self._starts: Array | None = None
        self._epoch: _Epoch | None = None
        self._cycles: dict[tuple[int, ...], tuple[int, _Slots]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_epoch": None, "_cycles": {}}

    @property
    def samples_per_epoch(self) -> int:
        """Of the first epoch; others may differ where a source has a start or an end step."""
        return self._eras.eras[0].samples if self._eras.eras else 0

    @property
    def steps_per_epoch(self) -> int:
        """Of the first epoch."""
        return self._eras.eras[0].steps_per_epoch if self._eras.eras else 0

    def gap(self) -> int | None:
        """The step from which on nothing is left to train on, if there is one; `at` knows no step from there on."""
        return self._eras.gap

    def sources_before(self, step: int) -> set[int]:
        """The sources that take part in some epoch that begins before `step`."""
        eras = [era for era in self._eras.eras if era.step < step]
        return {source for era in eras for group in (era.plain, *(w.sources for w in era.walks)) for source in group}

    def steps_in(self, epochs: int) -> int:
        """The optimizer steps of the first `epochs` epochs; those that have nothing to train on count one each, so that
        the sum goes beyond `gap()`."""
        steps = 0
        for era in self._eras.eras:
            taken = epochs if era.epochs is None else min(epochs, era.epochs)
            steps, epochs = steps + taken * era.steps_per_epoch, epochs - taken
        return steps + epochs

    def epoch_of(self, step: int) -> int:
        era = self._eras.of_step(step)
        return era.epoch + (step - era.step) // era.steps_per_epoch

    def samples_before(self, epoch: int) -> int:
        """How many samples all epochs before `epoch` give: the number of its first one."""
        era = self._eras.of_epoch(epoch)
        return era.sample + (epoch - era.epoch) * era.samples

    def at(self, step: int) -> GlobalBatch:
        """The global batch of optimizer step `step`, counted from 0."""
        gap = self.gap()
        assert gap is None or step < gap, "nothing is left to train on"
        number = self.epoch_of(step)
        if self._epoch is None or self._epoch.number != number:
            self._epoch = None  # freed before the next is made
            self._epoch = self._dealt(number)
        epoch, size = self._epoch, self.global_batch
        index = step - epoch.first_step
        batch = int(epoch.order[index])
        entries = epoch.entries[batch * size : (batch + 1) * size].tolist()
        # all before it are full but maybe the one that was dealt last
        missing = len(epoch.order) * size - len(epoch.entries)
        early = missing if bool((epoch.order[:index] == len(epoch.order) - 1).any()) else 0
        first = epoch.first_sample + index * size - early
        buckets = [self.buckets[b] for b in epoch.buckets[batch * size : (batch + 1) * size].tolist()]
        return GlobalBatch(number, range(first, first + len(entries)), tuple(entries), tuple(buckets))

    def micro_steps(self, batch: GlobalBatch, *, rank: int, world: int, batch_size: int) -> list[range]:
        """Positions in `batch` of a rank's micro steps: its share, cut where the bucket changes and at `batch_size`."""
        cuts: list[range] = []
        for position in share(len(batch.entries), rank, world):
            last = cuts[-1] if cuts else range(0)
            if 0 < len(last) < batch_size and batch.buckets[last.start] == batch.buckets[position]:
                cuts[-1] = range(last.start, position + 1)
            else:
                cuts.append(range(position, position + 1))
        return cuts

    def digest(self) -> str:
        """A digest of all that the plan depends on but the seed; another digest means other data."""
        head = [self.global_batch, len(self.keys), *self.bucket_ids.shape, *map(tuple, self.buckets), *self.draws]
        digest = hashlib.sha256(f"plan 2\x1f{self.content}\x1f{[str(part) for part in head]}\x1f".encode())
        for key in self.keys:
            text = key.encode("utf-8", "surrogatepass")
            digest.update(len(text).to_bytes(4, "little") + text)
        digest.update(np.ascontiguousarray(self.sources, "<i4").tobytes())
        digest.update(np.ascontiguousarray(self.bucket_ids, "<i2").tobytes())
        return digest.hexdigest()

    # -- an epoch ---------------------------------------------------------------------------------------------------

    def _dealt(self, number: int) -> _Epoch:
        """The epoch's samples as global batches."""
        era = self._eras.of_epoch(number)
        ranks = np.empty(len(self.buckets), np.int16)
        order = sorted(
            range(len(self.buckets)), key=lambda i: hashed(self.seed, number, "bucket", *map(int, self.buckets[i]))
        )
        ranks[order] = np.arange(len(order), dtype=np.int16)
        entries, places = self._by_bucket(era, number, ranks)
        counts = np.bincount(places, minlength=len(order))
        index = np.arange(len(places)) - (np.cumsum(counts) - counts)[places]
        rest = index >= (counts // self.global_batch * self.global_batch)[places]
        batches = [hashed(self.seed, number, "global batch", i) for i in range(era.steps_per_epoch)]
        return _Epoch(
            number,
            era.step + (number - era.epoch) * era.steps_per_epoch,
            self.samples_before(number),
            np.concatenate([entries[~rest], entries[rest]]),
            np.array(order, np.int16)[np.concatenate([places[~rest], places[rest]])],
            np.argsort(np.array(batches), kind="stable"),
        )

    def _by_bucket(self, era: Era, epoch: int, ranks: Array) -> tuple[Array, Array]:
        """The epoch's samples and the ranks of their buckets, by rank and within a bucket in their order."""
        roles: dict[str, list[tuple[Array, Array]]] = {"train": [], "regularization": []}
        if era.plain:
            slots = self._ordered(era.plain, epoch, "order")
            roles["train"].append((slots.entries, ranks[slots.buckets]))
            del slots
        for walk in era.walks:
            taken = self._walked(walk, epoch - era.epoch)
            roles[self.draws[walk.sources[0]].role].append((taken.entries, ranks[taken.buckets]))
        return _interleaved([_interleaved(groups) for groups in roles.values() if groups])

    def _walked(self, walk: Walk, epochs: int) -> _Slots:
        """What a walk gives in the era's epoch number `epochs`: the next of an endless chain of permutations."""
        position = walk.position + epochs * walk.taken
        pool = self.draws[walk.sources[0]].samples is None
        found = []
        for cycle in range(position // walk.slots, -(-(position + walk.taken) // walk.slots)):
            number = walk.cycle + cycle
            if self._cycles.get(walk.sources, (-1, None))[0] != number:
                slots = self._ordered(walk.sources, number, "regularization" if pool else "walk", once=not pool)
                self._cycles[walk.sources] = number, slots
            first = cycle * walk.slots
            cut = slice(max(0, position - first), position + walk.taken - first)
            found.append(_Slots(*(part[cut] for part in self._cycles[walk.sources][1])))
        return _Slots(*(np.concatenate(parts) for parts in zip(*found)))

    def _ordered(self, sources: Sequence[int], number: int, purpose: str, *, once: bool = False) -> _Slots:
        """The slots of `sources` by a hash of what they are, not of where they stand; the index would settle a tie."""
        entries = np.flatnonzero(np.isin(self.sources, np.array(sources)) & (self._choices > 0)).astype(np.int32)
        of_source = np.array([1 if once else draw.repeats for draw in self.draws], np.int32)
        counts = of_source[self.sources[entries]]
        repeats = np.arange(int(counts.sum()), dtype=np.int32) - np.repeat(np.cumsum(counts) - counts, counts)
        entries = np.repeat(entries, counts)
        hashes = np.empty(len(entries), np.int64)
        for i in range(0, len(entries), _CHUNK):
            some = zip(entries[i : i + _CHUNK].tolist(), repeats[i : i + _CHUNK].tolist())
            hashes[i : i + _CHUNK] = [hashed(self.seed, number, purpose, self.keys[e], r) for e, r in some]
        order = np.argsort(hashes, kind="stable")
        entries, repeats = entries[order], repeats[order].astype(np.int32)
        return _Slots(
            entries,
            repeats,
            self._buckets_of(entries, number * of_source[self.sources[entries]].astype(np.int64) + repeats),
        )

    def _buckets_of(self, entries: Array, comings: Array) -> Array:
        """The bucket ids of `entries` when each comes for the time number `comings`."""
        if self.bucket_ids.shape[1] == 1:
            return self.bucket_ids[entries, 0]
        if self._starts is None:
            starts = (hashed(self.seed, "resolution", key) % max(1, int(n)) for key, n in zip(self.keys, self._choices))
            self._starts = np.fromiter(starts, np.uint8, len(self.keys))
        rows = self.bucket_ids[entries]
        valid_first = np.argsort(rows < 0, axis=1, kind="stable")
        chosen = (self._starts[entries] + comings) % self._choices[entries]
        return rows[np.arange(len(rows)), valid_first[np.arange(len(rows)), chosen]]


def _interleaved(groups: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Groups of (samples, ranks) as one, by rank; within a rank each group keeps its order and they are mixed so that
    every stretch holds them in proportion, to within one for two of them."""
    ranks = np.concatenate([ranks for _, ranks in groups])
    samples = np.concatenate([samples for samples, _ in groups])
    if len(groups) == 1:
        order = np.argsort(ranks, kind="stable")
    else:
        order = np.lexsort((np.concatenate([_fractions(ranks) for _, ranks in groups]), ranks))
    return samples[order], ranks[order]


def _fractions(ranks: Array) -> Array:
    """How far along among the equals of its rank each one stands, (i + ½) / n."""
    counts = np.bincount(ranks)
    order = np.argsort(ranks, kind="stable")
    fractions = np.empty(len(ranks))
    sorted_ranks = ranks[order]
    index = np.arange(len(ranks)) - (np.cumsum(counts) - counts)[sorted_ranks]
    fractions[order] = (index + 0.5) / counts[sorted_ranks]
    return fractions
