"""Serving each step's samples from the cache, with all that is random about them.

Here: a sample's noise, timestep quantile and dropped caption, drawn by rule from (seed, n), and the worker processes
that do it ahead of the training. Not here: which samples a step has (`plan.py`), how latents came about (`cache.py`).
"""

import signal
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from lorakit.core.errors import LorakitError
from lorakit.core.seeding import generator
from lorakit.core.types import Batch, Text
from lorakit.data.cache import Cache, latent_key, text_key
from lorakit.data.dataset import Dataset
from lorakit.data.plan import GlobalBatch


@dataclass(frozen=True)
class StepPlan:
    """An optimizer step: its epoch, the keys of its global batch in order, and this rank's micro steps, maybe none."""

    epoch: int
    keys: tuple[str, ...]
    batches: tuple[Batch, ...]


class Loader:
    """What a rank trains on, step by step.

    Latents and, unless `text_fingerprint` is None (a text encoder is adapted), text are read from `cache`, which must
    hold them under these fingerprints. The numbers are the same for any number of `workers`; the global random
    generators are left alone.
    """

    def __init__(
        self,
        data: Dataset,
        cache: Cache,
        *,
        latents_fingerprint: str,
        text_fingerprint: str | None,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ) -> None:
        keys = tuple(
            latent_key(e.digest, b, fingerprint=latents_fingerprint) for e, b in zip(data.examples, data.bucket_of)
        )
        self._samples = _Samples(data, cache, keys, text_fingerprint, seed)
        self._split = _Split(batch_size, rank, world)
        self._workers = workers

    def steps(self, first_step: int, last_step: int) -> Iterator[StepPlan]:
        """Steps first_step … last_step - 1, counted from 0 over the whole training.

        Raises StorageError if the cache has lost something.
        """
        steps = _Steps(self._samples, self._split)
        if not self._workers:
            yield from (_raised(steps[step]) for step in range(first_step, last_step))
            return
        for step in self._ahead(steps, range(first_step, last_step)):
            yield _raised(step)

    def _ahead(self, steps: "_Steps", numbers: range) -> Iterator[StepPlan | LorakitError]:
        """`steps` made by worker processes, which end with the iterator."""
        with warnings.catch_warnings():
            # more workers than cores are slower, not wrong, and the user's choice
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            loader = DataLoader(
                steps,
                batch_size=None,
                sampler=numbers,
                num_workers=self._workers,
                collate_fn=_as_it_is,
                worker_init_fn=_leave_signals_to_the_parent,
                # DataLoader draws a seed for its workers, by default from the global generator
                generator=torch.Generator(),
            )
            return iter(loader)


@dataclass(frozen=True)
class _Split:
    batch_size: int
    rank: int
    world: int


@dataclass(frozen=True)
class _Samples:
    """The making of batches from the examples; `latent_keys` go with the examples."""

    data: Dataset
    cache: Cache
    latent_keys: tuple[str, ...]
    text_fingerprint: str | None
    seed: int

    def batch(self, chosen: GlobalBatch, cut: range) -> Batch:
        """The samples at the positions `cut` of a global batch, of one bucket."""
        entries, numbers = [chosen.entries[i] for i in cut], [chosen.numbers[i] for i in cut]
        examples = [self.data.examples[entry] for entry in entries]
        captions = [self._caption(entry, n) for entry, n in zip(entries, numbers)]
        latents = torch.stack([self.cache.read(self.latent_keys[entry])["latents"] for entry in entries])
        return Batch(
            keys=tuple(example.key for example in examples),
            numbers=tuple(numbers),
            captions=tuple(captions),
            latents=latents,
            noise=torch.stack([torch.randn(latents.shape[1:], generator=self._of(n, "noise")) for n in numbers]),
            quantile=torch.stack([torch.rand((), generator=self._of(n, "timestep")) for n in numbers]),
            weight=torch.tensor([example.weight for example in examples], dtype=torch.float32),
            text=self._text(captions),
        )

    def _of(self, n: int, purpose: str) -> torch.Generator:
        return generator(self.seed, n, purpose)

    def _caption(self, entry: int, n: int) -> str:
        chance = self.data.caption_dropout[entry]
        dropped = chance > 0 and float(torch.rand((), generator=self._of(n, "caption"))) < chance
        return "" if dropped else self.data.examples[entry].caption

    def _text(self, captions: Sequence[str]) -> Text | None:
        if self.text_fingerprint is None:
            return None
        parts = [self.cache.read(text_key(caption, fingerprint=self.text_fingerprint)) for caption in captions]
        return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


class _Steps(TorchDataset):
    """Step number → the rank's StepPlan, or the error that a person should read: across processes a raised one would
    come wrapped in a traceback."""

    def __init__(self, samples: _Samples, split: _Split) -> None:
        self._samples, self._split = samples, split

    def __getitem__(self, step: int) -> StepPlan | LorakitError:
        plan, split = self._samples.data.plan, self._split
        chosen = plan.at(step)
        cuts = plan.micro_steps(chosen, rank=split.rank, world=split.world, batch_size=split.batch_size)
        try:
            batches = tuple(self._samples.batch(chosen, cut) for cut in cuts)
        except LorakitError as error:
            return error
        return StepPlan(chosen.epoch, tuple(plan.entries[i].key for i in chosen.entries), batches)


def _raised(step: StepPlan | LorakitError) -> StepPlan:
    if isinstance(step, LorakitError):
        raise step
    return step


def _as_it_is(step: Any) -> Any:
    return step


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C reaches the whole process group: the parent saves and then ends its workers, by SIGTERM if need be,
    which must not meet a handler that the parent had set for itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
