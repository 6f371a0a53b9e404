"""Which sources take part in which epochs, and how many samples they give: the lengths of all epochs, by arithmetic.

Here: counts only. Not here: which samples, in which order (`plan.py`). An *era* is a stretch of epochs in which the
same sources take part; there are at most as many as start and end steps, and the last may go on for ever.
"""

import bisect
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Draw(NamedTuple):
    """How a source takes part; `role` is "train", "regularization" or "validation" (which is never drawn).

    `repeats` is how often an epoch each entry comes, and in the regularization pool the entries' relative weight. With
    `samples` the source gives that many samples an epoch instead. It takes part in the epochs that begin at a step from
    `start` on and before `end`.
    """

    role: str = "train"
    repeats: int = 1
    samples: int | None = None
    start: int = 0
    end: int | None = None


class Walk(NamedTuple):
    """An endless chain of permutations of the slots of `sources`, of which each epoch takes the next `taken` samples.

    In the era's first epoch it goes on at `position`, counted from the beginning of permutation number `cycle`.
    """

    sources: tuple[int, ...]
    taken: int
    slots: int
    cycle: int
    position: int


class Era(NamedTuple):
    """`step`, `epoch` and `sample` are its first ones, counted from 0 over the run; `epochs` None: for ever.

    `plain` are the training sources that give each entry `repeats` times, `samples` is what an epoch gives in all.
    """

    step: int
    epoch: int
    sample: int
    epochs: int | None
    steps_per_epoch: int
    samples: int
    plain: tuple[int, ...]
    walks: tuple[Walk, ...]


class Eras:
    """The eras of a run, from the sources' `draws` and how many entries each has (`counts`)."""

    def __init__(self, draws: Sequence[Draw], counts: Sequence[int], *, global_batch: int) -> None:
        self._draws = draws
        self._counts = counts
        self._global_batch = global_batch
        self.gap: int | None = None
        self.eras = tuple(self._all())

    def of_step(self, step: int) -> Era:
        return self._last_before(step, [era.step for era in self.eras])

    def of_epoch(self, epoch: int) -> Era:
        return self._last_before(epoch, [era.epoch for era in self.eras])

    def _last_before(self, number: int, firsts: Sequence[int]) -> Era:
        assert self.eras and number >= 0, "nothing is left to train on"
        return self.eras[bisect.bisect_right(firsts, number) - 1]

    def _all(self) -> Iterator[Era]:
        """Every era in turn; sets `gap` where one has nothing to train on."""
        step = epoch = sample = 0
        bounds = sorted({bound for draw in self._draws for bound in (draw.start, draw.end) if bound is not None})
        walked: dict[tuple[int, ...] | str, Walk] = {}
        while True:
            era = self._era(step, walked)
            if era is None:
                self.gap = step
                return
            after = bisect.bisect_right(bounds, step)
            epochs = None if after == len(bounds) else -(-(bounds[after] - step) // era.steps_per_epoch)
            yield era._replace(epoch=epoch, sample=sample, epochs=epochs)
            if epochs is None:
                return
            for walk in era.walks:
                walked[_name(walk, self._draws)] = walk._replace(position=walk.position + epochs * walk.taken)
            step, epoch, sample = step + epochs * era.steps_per_epoch, epoch + epochs, sample + epochs * era.samples

    def _era(self, step: int, walked: dict[tuple[int, ...] | str, Walk]) -> Era | None:
        """What an epoch that begins at `step` holds; None: nothing to train on."""
        here = [
            source
            for source, draw in enumerate(self._draws)
            if self._counts[source] and draw.start <= step and (draw.end is None or step < draw.end)
        ]
        train = [s for s in here if self._draws[s].role == "train"]
        kept = [s for s in here if self._draws[s].role == "regularization"]
        plain = tuple(s for s in train if self._draws[s].samples is None)
        asked: list[tuple[tuple[int, ...], int]] = []
        asked += [((s,), self._draws[s].samples or 0) for s in train if self._draws[s].samples is not None]
        trained = sum(self._counts[s] * self._draws[s].repeats for s in plain) + sum(count for _, count in asked)
        if not trained:
            return None
        pool = tuple(s for s in kept if self._draws[s].samples is None)
        if pool:
            asked.append((pool, trained))
        asked += [((s,), self._draws[s].samples or 0) for s in kept if self._draws[s].samples is not None]
        walks = tuple(self._walk(sources, count, walked) for sources, count in asked if count)
        samples = sum(self._counts[s] * self._draws[s].repeats for s in plain) + sum(walk.taken for walk in walks)
        return Era(step, 0, 0, None, -(-samples // self._global_batch), samples, plain, walks)

    def _walk(self, sources: tuple[int, ...], count: int, walked: dict[tuple[int, ...] | str, Walk]) -> Walk:
        """The walk of `sources` from where it stood; a pool that others joined or left begins a new permutation."""
        repeats = [1 if self._draws[s].samples is not None else self._draws[s].repeats for s in sources]
        slots = sum(self._counts[s] * r for s, r in zip(sources, repeats))
        fresh = Walk(sources, count, slots, 0, 0)
        before = walked.get(_name(fresh, self._draws))
        if before is None:
            return fresh
        if before.sources == sources:
            return fresh._replace(cycle=before.cycle, position=before.position)
        return fresh._replace(cycle=before.cycle - (-before.position // before.slots))


def _name(walk: Walk, draws: Sequence[Draw]) -> tuple[int, ...] | str:
    """What tells walks apart over the eras: the pool is one walk whoever is in it."""
    return "pool" if draws[walk.sources[0]].samples is None else walk.sources
