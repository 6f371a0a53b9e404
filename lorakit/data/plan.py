"""Which samples each step trains on, for ever, as a pure function of a seed and the examples' keys and buckets.

Here: the order of an epoch, its global batches, a rank's share of one and the micro steps in it. Nothing is remembered
but a cache, so a resumed run needs only the number of its step. Not here: the samples' contents (`loader.py`).

A *slot* is an entry and which of its repeats it is.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from lorakit.core.seeding import hashed
from lorakit.data.buckets import Bucket


class PlanEntry(NamedTuple):
    """What the plan knows of an example; `role` is "train" or "regularization".

    `content` stands for whatever else makes the example what it is: it changes the plan's digest, not the order.
    """

    key: str
    bucket: Bucket
    repeats: int = 1
    role: str = "train"
    content: str = ""


class _Slot(NamedTuple):
    entry: int
    repeat: int


@dataclass(frozen=True)
class GlobalBatch:
    """What one optimizer step trains on: indices of the plan's entries, in order.

    `numbers` are the samples' numbers in the run, n = epoch · samples per epoch + position.
    """

    epoch: int
    numbers: range
    entries: tuple[int, ...]


def share(count: int, rank: int, world: int) -> range:
    """The contiguous part of `count` samples that a rank takes; parts differ in size by at most one."""
    return range(rank * count // world, (rank + 1) * count // world)


class Plan:
    """The global batches of all steps.

    Slots are ordered by a hash of (seed, epoch, key, repeat). Each bucket gives full global batches; the remainders of
    all buckets share the last ones, each remainder kept together; then the order of the global batches is shuffled. So
    all but one in an epoch are full.

    Each training entry comes exactly `repeats` times an epoch. Regularization entries give as many samples an epoch as
    the training entries together; they walk a permutation of their own that goes on across epochs, so that all are
    used evenly however few or many they are. Within a bucket the two interleave in proportion.
    """

    def __init__(self, entries: Iterable[PlanEntry], *, seed: int, global_batch: int) -> None:
        self.entries = tuple(entries)
        self.seed = seed
        self.global_batch = global_batch
        slots = [_Slot(i, r) for i, entry in enumerate(self.entries) for r in range(entry.repeats)]
        self._train = [slot for slot in slots if self.entries[slot.entry].role == "train"]
        self._kept = [slot for slot in slots if self.entries[slot.entry].role != "train"]
        assert self._train, "a plan needs a training entry"
        assert global_batch > 0, "a global batch holds a sample"
        self._epoch: tuple[int, list[GlobalBatch]] | None = None
        self._cycle: tuple[int, list[_Slot]] | None = None

    @property
    def samples_per_epoch(self) -> int:
        return len(self._train) * (2 if self._kept else 1)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.samples_per_epoch // self.global_batch)

    def at(self, step: int) -> GlobalBatch:
        """The global batch of optimizer step `step`, counted from 0."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._global_batches(epoch)
        return self._epoch[1][index]

    def micro_steps(self, batch: GlobalBatch, *, rank: int, world: int, batch_size: int) -> list[range]:
        """Positions in `batch` of a rank's micro steps: its share, cut where the bucket changes and at `batch_size`."""
        cuts: list[range] = []
        for position in share(len(batch.entries), rank, world):
            last = cuts[-1] if cuts else range(0)
            bucket = self.entries[batch.entries[position]].bucket
            if 0 < len(last) < batch_size and self.entries[batch.entries[last.start]].bucket == bucket:
                cuts[-1] = range(last.start, position + 1)
            else:
                cuts.append(range(position, position + 1))
        return cuts

    def digest(self) -> str:
        """A digest of all that the plan depends on but the seed; another digest means other data."""
        digest = hashlib.sha256(f"plan 1, {self.global_batch}\n".encode())
        for entry in self.entries:
            width, height = entry.bucket
            line = f"{entry.key}\x1f{width}\x1f{height}\x1f{entry.repeats}\x1f{entry.role}\x1f{entry.content}\n"
            digest.update(line.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def _global_batches(self, epoch: int) -> list[GlobalBatch]:
        size = self.global_batch
        full: list[list[int]] = []
        remainders: list[list[int]] = []
        for samples in self._by_bucket(epoch):
            whole = len(samples) // size * size
            full += [samples[i : i + size] for i in range(0, whole, size)]
            remainders.append(samples[whole:])
        rest = [entry for remainder in remainders for entry in remainder]
        full += [rest[i : i + size] for i in range(0, len(rest), size)]
        order = sorted(range(len(full)), key=lambda i: hashed(self.seed, epoch, "global batch", i))
        starts = accumulate((len(full[i]) for i in order), initial=epoch * self.samples_per_epoch)
        return [
            GlobalBatch(epoch, range(start, start + len(full[i])), tuple(full[i])) for start, i in zip(starts, order)
        ]

    def _by_bucket(self, epoch: int) -> list[list[int]]:
        """The epoch's samples of each bucket in their order; the buckets' own order is a hash's too."""
        train: dict[Bucket, list[int]] = {}
        kept: dict[Bucket, list[int]] = {}
        for slot in self._ordered(self._train, epoch, "order"):
            train.setdefault(self.entries[slot.entry].bucket, []).append(slot.entry)
        for slot in self._walk(epoch):
            kept.setdefault(self.entries[slot.entry].bucket, []).append(slot.entry)
        buckets = sorted({*train, *kept}, key=lambda b: hashed(self.seed, epoch, "bucket", b.width, b.height))
        return [_interleave(train.get(bucket, []), kept.get(bucket, [])) for bucket in buckets]

    def _walk(self, epoch: int) -> Iterable[_Slot]:
        """The regularization slots of an epoch: the next ones of an endless chain of permutations of all."""
        if not self._kept:
            return
        count = len(self._train)
        for position in range(epoch * count, (epoch + 1) * count):
            cycle, index = divmod(position, len(self._kept))
            if self._cycle is None or self._cycle[0] != cycle:
                self._cycle = cycle, self._ordered(self._kept, cycle, "regularization")
            yield self._cycle[1][index]

    def _ordered(self, slots: Sequence[_Slot], number: int, purpose: str) -> list[_Slot]:
        """`slots` by a hash of what they are, not of where they stand; the index would settle a tie."""
        return sorted(
            slots, key=lambda s: (hashed(self.seed, number, purpose, self.entries[s.entry].key, s.repeat), s.entry)
        )


def _interleave(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """Both in their order, mixed so that every stretch holds them in proportion, to within one."""
    placed = [((i + 0.5) / len(first), 0, x) for i, x in enumerate(first)]
    placed += [((i + 0.5) / len(second), 1, x) for i, x in enumerate(second)]
    return [x for _, _, x in sorted(placed)]
