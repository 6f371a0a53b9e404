"""Serving each step's samples from the cache, with all that is random about them.

Here: a sample's noise, timestep quantile, cut and caption, drawn by rule from (seed, n), and the worker processes
that do it ahead of the training. Not here: which samples a step has (`plan.py`), how latents came about (`cache.py`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from lorakit.core.errors import LorakitError
from lorakit.core.seeding import generator
from lorakit.core.transfer import pinned
from lorakit.core.types import Batch, Text
from lorakit.data.ahead import by_processes
from lorakit.data.buckets import Bucket
from lorakit.data.cache import Cache, text_key
from lorakit.data.captions import drops_input
from lorakit.data.dataset import Dataset
from lorakit.data.images import Cut, crop_info, pool_mask
from lorakit.data.plan import GlobalBatch, Plan
from lorakit.data.repaint import draw_mask

LOOKED_AT = 2_000  # steps, some 50 µs each

Extra = Callable[[tuple[int, ...], Callable[[str], torch.Generator]], Mapping[str, Tensor]]
"""What else is random about a sample: from its latents' shape and its generator for a purpose, tensors by name."""


@dataclass(frozen=True)
class StepPlan:
    """An optimizer step: its epoch, the keys of its global batch in order, and this rank's micro steps, maybe none.

    `padding` are micro steps to be made besides and to count for nothing, where all ranks have to make equally many.
    """

    epoch: int
    keys: tuple[str, ...]
    batches: tuple[Batch, ...]
    padding: tuple[Batch, ...] = ()


class Loader:
    """What a rank trains on, step by step.

    Latents, if `data` caches them, and text, unless `text_fingerprint` is None (a text encoder is adapted), are read
    from `cache`, which must hold them under these fingerprints; else a batch has pixels. `latent_shapes` are those of
    all buckets; `extra` makes what is random about a sample besides its noise and quantile. `stratified`: of a step's
    N quantiles each N-th of 0 … 1 holds one. `padded`: all ranks make equally many micro steps. The numbers are
    the same for any number of `workers`; the global random generators are left alone. `pin_memory`: batches of
    steps lie in pinned memory, from which a GPU takes the later ones of a step while it computes.
    """

    def __init__(
        self,
        data: Dataset,
        cache: Cache,
        *,
        latents_fingerprint: str,
        text_fingerprint: str | None,
        latent_shapes: Mapping[Bucket, tuple[int, ...]],
        seed: int,
        batch_size: int,
        stratified: bool = False,
        extra: Extra | None = None,
        rank: int = 0,
        world: int = 1,
        padded: bool = False,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.cache = cache
        self._samples = _Samples(
            data, cache, latents_fingerprint, text_fingerprint, latent_shapes, seed, stratified, extra
        )
        self._split = _Split(batch_size, rank, world, padded)
        self._workers = workers
        self._pin_memory = pin_memory

    def steps(self, first_step: int, last_step: int) -> Iterator[StepPlan]:
        """Steps first_step … last_step - 1, counted from 0 over the whole training.

        Raises StorageError if the cache has lost something, InputError for a picture that changed.
        """
        steps = _Steps(self._samples, self._split)
        numbers = range(first_step, last_step)
        made = by_processes(steps, numbers, self._workers) if self._workers else map(steps.__getitem__, numbers)
        for step in map(_raised, made):
            yield _in_pinned_memory(step) if self._pin_memory else step

    def fixed(self, entries: Iterable[int], *, draws: int) -> Iterator[Batch]:
        """A batch of each of these examples at `draws` fixed noises and stratified timesteps, as its first cut and
        with its first caption.

        The quantiles' strata are [k / draws, (k + 1) / draws), in order, and nothing depends on the step or the rank.
        """
        for entry in entries:
            yield self._samples.fixed(entry, draws)

    def largest(self) -> Batch:
        """The micro step, of any rank, with the most pixels of those looked at: what needs the most memory.

        Looked at are the first epochs after each source joins, as many as there are resolutions and one; of very long
        ones their beginning. Nothing of the run moves by it.
        """
        _, chosen, cut = self._largest()
        return self._samples.batch(chosen, cut)

    def is_largest(self, step: int) -> bool:
        """Whether every rank has a micro step in `step` with as many pixels as `largest()`; all ranks say alike."""
        most, chosen = self._largest()[0], self._samples.data.plan.at(step)
        return all(most in (size for size, _ in self._sizes(chosen, rank)) for rank in range(self._split.world))

    def _sizes(self, chosen: GlobalBatch, rank: int) -> Iterator[tuple[int, range]]:
        """The pixels of each of the rank's micro steps, and its positions."""
        plan, split = self._samples.data.plan, self._split
        for cut in plan.micro_steps(chosen, rank=rank, world=split.world, batch_size=split.batch_size):
            bucket = chosen.buckets[cut.start]
            yield len(cut) * bucket.width * bucket.height, cut

    def _largest(self) -> tuple[int, GlobalBatch, range]:
        plan, split = self._samples.data.plan, self._split
        used = {plan.buckets[b] for b in set(plan.bucket_ids[plan.bucket_ids >= 0].tolist())}
        # no micro step is larger, so the search mostly ends within a few steps
        bound = split.batch_size * max(bucket.width * bucket.height for bucket in used)
        best: tuple[int, GlobalBatch, range] | None = None
        for step in _first_epochs(plan, epochs=plan.bucket_ids.shape[1] + 1):
            chosen = plan.at(step)
            for rank in range(split.world):
                for size, cut in self._sizes(chosen, rank):
                    if best is None or size > best[0]:
                        best = size, chosen, cut
            if best is not None and best[0] == bound:
                break
        assert best is not None, "a plan has a step"
        return best


def _first_epochs(plan: Plan, *, epochs: int) -> Iterator[int]:
    """The steps of the first `epochs` epochs after each source joins, at most LOOKED_AT for each."""
    gap = plan.gap()
    for start in sorted({draw.start for draw in plan.draws}):
        if gap is not None and start >= gap:
            return
        last = plan.epoch_of(start) + epochs  # a source that joins within an epoch takes part from the next
        for step in range(start, start + LOOKED_AT):
            if (gap is not None and step >= gap) or plan.epoch_of(step) > last:
                break
            yield step


@dataclass(frozen=True)
class _Split:
    batch_size: int
    rank: int
    world: int
    padded: bool


@dataclass(frozen=True)
class _Seen:
    """A sample's picture, as latents or as pixels, with its mask in 0 … 1 at the latents' size, and what the model is
    `given` beside its caption."""

    size: Tensor
    latents: Tensor | None
    pixels: Tensor | None
    mask: Tensor | None
    given: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Samples:
    """The making of batches from the examples."""

    data: Dataset
    cache: Cache
    latents_fingerprint: str
    text_fingerprint: str | None
    latent_shapes: Mapping[Bucket, tuple[int, ...]]
    seed: int
    stratified: bool
    extra: Extra | None

    def batch(self, chosen: GlobalBatch, cut: range) -> Batch:
        """The samples at the positions `cut` of a global batch, of one bucket."""
        entries, numbers = [chosen.entries[i] for i in cut], [chosen.numbers[i] for i in cut]
        bucket = chosen.buckets[cut.start]
        cached = self.text_fingerprint is not None
        captions = [
            self.data.draw_caption(entry, draw=self._of(n, "caption"), from_variants=cached)
            for entry, n in zip(entries, numbers)
        ]
        seen = [
            self._seen(
                entry,
                self.data.draw_cut(entry, bucket, draw=self._of(n, "crop")),
                partial(self._of, n),
                dropped=drops_input(self.data.source_of(entry), draw=self._of(n, "caption")),
            )
            for entry, n in zip(entries, numbers)
        ]
        shape = self.latent_shapes[bucket]
        return self._assemble(
            entries,
            numbers,
            captions,
            seen,
            classes=[self.data.class_caption(entry, caption) for entry, caption in zip(entries, captions)],
            noise=torch.stack([torch.randn(shape, generator=self._of(n, "noise")) for n in numbers]),
            quantile=self._quantiles(chosen, cut),
            extra=None if self.extra is None else _stacked([self.extra(shape, partial(self._of, n)) for n in numbers]),
        )

    def _quantiles(self, chosen: GlobalBatch, cut: range) -> Tensor:
        """The quantiles (B,) of the samples at `cut`: independent, or each in a stratum of the global batch's own."""
        drawn = torch.stack([torch.rand((), generator=self._of(chosen.numbers[i], "timestep")) for i in cut])
        if not self.stratified:
            return drawn
        count, first = len(chosen.numbers), chosen.numbers[0]
        strata = torch.randperm(count, generator=self._of(first, "strata"))[cut.start : cut.stop]
        # in double, and never 1, to which it might round
        return ((strata + drawn.double()) / count).float().clamp(max=1 - 2**-24)

    def fixed(self, entry: int, draws: int) -> Batch:
        """`draws` samples of an example, the same at every call."""
        generators = [generator(self.seed, self.data.examples.keys[entry], k, "validation") for k in range(draws)]
        cut = self.data.cuts_of(entry)[0]
        shape = self.latent_shapes[cut.bucket]
        return self._assemble(
            [entry] * draws,
            list(range(draws)),
            [self.data.captions_of(entry)[0]] * draws,
            [self._seen(entry, cut, partial(generator, self.seed, self.data.examples.keys[entry]))] * draws,
            classes=[None] * draws,
            quantile=torch.stack([(k + torch.rand((), generator=g)) / draws for k, g in enumerate(generators)]),
            noise=torch.stack([torch.randn(shape, generator=g) for g in generators]),
        )

    def _assemble(
        self,
        entries: Sequence[int],
        numbers: Sequence[int],
        captions: Sequence[str],
        seen: Sequence[_Seen],
        *,
        classes: Sequence[str | None],
        noise: Tensor,
        quantile: Tensor,
        extra: Mapping[str, Tensor] | None = None,
    ) -> Batch:
        sources = [self.data.source_of(entry) for entry in entries]
        compared = any(text is not None for text in classes)
        return Batch(
            keys=tuple(self.data.examples.keys[entry] for entry in entries),
            numbers=tuple(numbers),
            captions=tuple(captions),
            latents=_stack([s.latents for s in seen]),
            pixels=_stack([s.pixels for s in seen]),
            noise=noise,
            quantile=quantile,
            weight=torch.tensor([source.weight for source in sources], dtype=torch.float32),
            text=self._text(captions),
            class_captions=tuple(classes) if compared else (),
            # a sample that is compared with no text keeps its place with the empty one
            class_text=self._text([text or "" for text in classes]) if compared else None,
            sizes=torch.stack([s.size for s in seen]),
            mask=_masks(seen, noise.shape[-2:]),
            extra=extra,
            given=_stacked([s.given for s in seen]) or None,
        )

    def _seen(self, entry: int, cut: Cut, of: Callable[[str], torch.Generator], *, dropped: bool = False) -> _Seen:
        """A sample's picture; what is random of what the model is given is drawn from `of` a purpose; `dropped`: it is
        given no picture."""
        example, source = self.data.examples[entry], self.data.source_of(entry)
        info = crop_info(example.size, cut)
        width, height = example.size
        size = torch.tensor([height, width, info.top, info.left, cut.bucket.height, cut.bucket.width])
        cached = self.data.cached_latents
        given: dict[str, Tensor] = {}
        if self.data.task == "inpaint" or not cached:
            prepared = self.data.picture(entry, cut)
        if cached:
            stored = self.cache.read(self.data.latent_key(entry, cut, fingerprint=self.latents_fingerprint))
            latents, pixels, mask = stored["latents"], None, stored.get("mask")
        else:
            latents, pixels = None, prepared.pixels
            height, width = self.latent_shapes[cut.bucket][-2:]
            mask = None if prepared.mask is None else pool_mask(prepared.mask, (height, width))
        if self.data.task == "inpaint":
            said = prepared.mask if source.mask_means == "repaint" else None
            hidden = draw_mask(*cut.bucket, of("repaint")) if said is None else (said >= 0.5).float()
            given = {"pixels": prepared.pixels, "mask": hidden}
        elif self.data.task == "edit":
            given = {"dropped": torch.tensor(float(dropped))}
            if cached:
                given["latents"] = stored["input"]
            else:
                assert prepared.input is not None, "an editing model's pictures have one to begin with"
                given["pixels"] = prepared.input
        if source.mask_means == "repaint":
            mask = None
        if mask is not None:
            mask = mask.float().clamp(min=source.mask_floor)
        return _Seen(size, latents, pixels, mask, given)

    def _of(self, n: int, purpose: str) -> torch.Generator:
        return generator(self.seed, n, purpose)

    def _text(self, captions: Sequence[str]) -> Text | None:
        if self.text_fingerprint is None:
            return None
        return self.cache.read_stacked([text_key(caption, self.text_fingerprint) for caption in captions])


def _stack(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """Of a batch all samples have latents, or none has."""
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present) if present else None


def _stacked(samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def _masks(seen: Sequence[_Seen], size: Sequence[int]) -> Tensor | None:
    """The masks (B, 1, h, w), ones for samples without; None where there is none at all."""
    if all(s.mask is None for s in seen):
        return None
    return torch.stack([torch.ones(1, *size) if s.mask is None else s.mask for s in seen])


class _Steps(TorchDataset):
    """Step number → the rank's StepPlan, or the error that a person should read: across processes a raised one would
    come wrapped in a traceback."""

    def __init__(self, samples: _Samples, split: _Split) -> None:
        self._samples, self._split = samples, split

    def __getitem__(self, step: int) -> StepPlan | LorakitError:
        plan, split = self._samples.data.plan, self._split
        chosen = plan.at(step)
        of_ranks = [
            plan.micro_steps(chosen, rank=rank, world=split.world, batch_size=split.batch_size)
            for rank in (range(split.world) if split.padded else [split.rank])
        ]
        cuts = of_ranks[split.rank if split.padded else 0]
        lacking = max(map(len, of_ranks)) - len(cuts)
        try:
            batches = tuple(self._samples.batch(chosen, cut) for cut in cuts)
            # a real sample, so that nothing can come of it that would not come of the step's own
            padding = (_weightless(self._samples.batch(chosen, range(1))),) * lacking if lacking else ()
        except LorakitError as error:
            return error
        keys = self._samples.data.examples.keys
        return StepPlan(chosen.epoch, tuple(keys[i] for i in chosen.entries), batches, padding)


def _weightless(batch: Batch) -> Batch:
    return replace(batch, weight=torch.zeros_like(batch.weight))


def _in_pinned_memory(step: StepPlan) -> StepPlan:
    return replace(step, batches=tuple(map(pinned, step.batches)), padding=tuple(map(pinned, step.padding)))


def _raised(step: StepPlan | LorakitError) -> StepPlan:
    if isinstance(step, LorakitError):
        raise step
    return step
