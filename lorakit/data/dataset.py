"""The data of a training put together: what the sources hold, its buckets, the plan of all steps, and a report.

Here: the `data` section of a recipe and what becomes of it. Next: `cache.py` encodes it, `loader.py` serves it.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from lorakit.core.errors import InputError
from lorakit.core.files import printable
from lorakit.core.settings import Neutral, Settings
from lorakit.core.types import Example, Place, Task
from lorakit.data.buckets import Bucket, BucketSettings, bucket_ids, make_buckets, size_problem
from lorakit.data.cache import default_folder, latent_key, refuse_cache
from lorakit.data.captions import class_caption, draw_caption, variants
from lorakit.data.cut import Cut, cuts, draw_cut, plain_cut
from lorakit.data.examples import ROLES, Examples
from lorakit.data.expanded import Expanded
from lorakit.data.images import BadImageError, Prepared, prepare_picture
from lorakit.data.marks import mark
from lorakit.data.plan import Draw, Plan
from lorakit.data.report import DataReport, make_report
from lorakit.data.scan import scan
from lorakit.data.sources import SourceSettings, Storage
from lorakit.data.split import sample, split

ClassTexts: TypeAlias = Literal["class", "blank"] | None


class DataSettings(Settings):
    """What is trained on, and how it is prepared."""

    sources: list[SourceSettings] = Field(default_factory=list)
    """Where pictures come from."""

    buckets: BucketSettings = BucketSettings()
    """The sizes that pictures are cut to."""

    validation: float = Field(default=0.0, ge=0.0, lt=1.0, allow_inf_nan=False)
    """Share of the training sources' pictures that is put aside for validation."""

    cache: Neutral[str | None] = None
    """Where encoded pictures and captions are kept for other runs; absent: lorakit/data in the user's cache folder."""

    cache_latents: bool = True
    """Whether pictures are encoded once and kept; if not (and where a source's crops are random) at every step."""

    caption_variants: int = Field(default=4, ge=1, le=1000)
    """How many forms of a caption that is shuffled, thinned out or chosen by chance are encoded and kept."""

    weighted_tags: bool = False
    """Whether "(tag:1.3)" in captions means emphasis, as in A1111, and not these characters."""

    workers: Neutral[int] = Field(default=0, ge=0, le=256)
    """Processes that read pictures and cache and draw noise ahead of the training; the numbers are the same for any."""

    on_bad_image: Neutral[Literal["error", "skip"]] = "error"
    """What a picture that cannot be decoded or is too small leads to: all are named, then it ends or goes on without
    them. Missing, doubled or unreadable captions, links out of a source and the like are errors in any case."""


@dataclass(frozen=True)
class Dataset:
    """All examples with what may be drawn of them; `bucket_ids` (N, R) are indices of `buckets`, -1 for none.

    `class_texts` is which texts the objective compares captions with: none, those of the class, or no words at all;
    `task` is what the model was made for, which says what it is shown beside a caption.
    """

    examples: Examples
    settings: DataSettings
    storages: Mapping[int, Storage]
    buckets: tuple[Bucket, ...]
    bucket_ids: NDArray[Any]
    plan: Plan
    class_texts: ClassTexts = None
    task: Task = "text"

    @property
    def cached_latents(self) -> bool:
        """Whether the sets of crops are finite and to be encoded once."""
        return self.settings.cache_latents and all(s.crop != "random" for s in self.settings.sources)

    def source_of(self, index: int) -> SourceSettings:
        return self.settings.sources[int(self.examples.sources[index])]

    def buckets_of(self, index: int) -> tuple[Bucket, ...]:
        """The sizes that example `index` is trained at."""
        return tuple(self.buckets[i] for i in self.bucket_ids[index] if i >= 0)

    def cuts_of(self, index: int) -> tuple[Cut, ...]:
        """Every cut that a sample of example `index` may be, by bucket; where crops are drawn, the middle ones.

        A validation example has its plain cut only, at its first bucket.
        """
        example, source, buckets = self.examples[index], self.source_of(index), self.buckets_of(index)
        if example.role == "validation":
            return (plain_cut(source, buckets[0], size=example.size, focus=example.focus),)
        if source.crop == "random":
            return tuple(plain_cut(source, bucket, size=example.size, focus=example.focus) for bucket in buckets)
        return tuple(
            cut
            for bucket in buckets
            for cut in cuts(source, bucket, digest=example.digest, size=example.size, focus=example.focus)
        )

    def captions_of(self, index: int) -> tuple[str, ...]:
        """The forms of example `index`'s caption that are encoded and kept; of a validation example the first."""
        found = variants(
            self.source_of(index),
            self.examples.captions(index),
            count=self.settings.caption_variants,
            weighted=self.settings.weighted_tags,
        )
        return found[:1] if self._is_validation(index) else found

    def all_captions(self) -> Expanded[str]:
        """Every text that a sample may come with, some more than once; "" stands for all that are dropped."""
        dropped = any(s.caption_dropout or s.conditioning_dropout for s in self.settings.sources)
        extra = [""] if self.class_texts or dropped else []
        counts = [len(extra), *(len(self._texts_of(i)) for i in range(len(self.examples)))]
        return Expanded(counts, partial(self._caption, extra))

    def all_latents(self, *, fingerprint: str) -> Expanded[tuple[str, str, tuple[int, Cut]]]:
        """All that is to be encoded: (cache key, name for messages, (example, cut))."""
        probe = Bucket(64, 64)
        per_bucket = np.array(
            [
                1 if source.crop == "random" else len(cuts(source, probe, digest="", size=probe, focus=None))
                for source in self.settings.sources
            ]
        )
        counts = (self.bucket_ids >= 0).sum(1) * per_bucket[self.examples.sources]
        counts[self.examples.roles == ROLES.index("validation")] = 1
        return Expanded(counts, partial(self._latents, fingerprint))

    def draw_cut(self, index: int, bucket: Bucket, *, draw: torch.Generator) -> Cut:
        """A sample's cut; one of `cuts_of` unless crops are drawn."""
        example, source = self.examples[index], self.source_of(index)
        if example.role == "validation":
            return plain_cut(source, bucket, size=example.size, focus=example.focus)
        return draw_cut(source, bucket, digest=example.digest, size=example.size, focus=example.focus, draw=draw)

    def draw_caption(self, index: int, *, draw: torch.Generator, from_variants: bool) -> str:
        """A sample's caption: one of `captions_of`, or else made anew; or "" where it is dropped."""
        if self._is_validation(index):
            return self.captions_of(index)[0]
        return draw_caption(
            self.source_of(index),
            self.examples.captions(index),
            draw=draw,
            variants=self.captions_of(index) if from_variants else None,
            weighted=self.settings.weighted_tags,
        )

    def class_caption(self, index: int, caption: str) -> str | None:
        """The text that a training sample's `caption` is compared with; None where it is with none."""
        if self.class_texts is None or ROLES[int(self.examples.roles[index])] != "train":
            return None
        return "" if self.class_texts == "blank" else class_caption(self.source_of(index), caption)

    def latent_key(self, index: int, cut: Cut, *, fingerprint: str) -> str:
        """The cache's key of a cut of example `index`."""
        example = self.examples[index]
        own = example.mask == example.place
        digest = "" if own else example.mask_digest
        given = example.input_digest
        return latent_key(
            example.digest, cut, fingerprint=fingerprint, mask_digest=digest, alpha_mask=own, input_digest=given
        )

    def read(self, index: int) -> bytes:
        """The bytes of example `index`; InputError where they are not those that were scanned."""
        example = self.examples[index]
        return self._checked(example, example.place, example.digest)

    def prepare(self, job: tuple[int, Cut]) -> Prepared:
        """`picture` of an entry of `all_latents`."""
        return self.picture(*job)

    def picture(self, index: int, cut: Cut) -> Prepared:
        """A cut of example `index`, with its mask if it has one.

        Raises InputError as `read`, and for a mask that leaves nothing to learn of a cut that does not vary.
        """
        example, source = self.examples[index], self.source_of(index)
        own = example.mask == example.place
        mask = None if own or example.mask is None else self._checked(example, example.mask, example.mask_digest)
        try:
            prepared = prepare_picture(self.read(index), cut, mask=mask, alpha_mask=own)
            if example.input is not None:
                given = prepare_picture(self._checked(example, example.input, example.input_digest), cut)
                prepared = replace(prepared, input=given.pixels)
        except BadImageError as error:
            raise InputError(f"{printable(example.key)}: it cannot be read any more ({printable(error)}).") from None
        empty = prepared.mask is not None and not bool(prepared.mask.any())
        if empty and not source.mask_floor and source.crop != "random":
            raise InputError(
                f"{printable(example.key)}: its mask leaves nothing of the part that is kept: correct it, or give the "
                'source crop = "focus" or a mask_floor.'
            )
        return prepared

    def validation(self) -> list[int]:
        """The examples that are put aside for validation."""
        return [int(i) for i in np.flatnonzero(self.examples.roles == ROLES.index("validation"))]

    def sample(self, count: int) -> list[int]:
        """Up to `count` of the training examples, always the same."""
        trained = np.flatnonzero((self.examples.roles == ROLES.index("train")) & (self.bucket_ids >= 0).any(1))
        return sample({i: self.examples.keys[i] for i in trained.tolist()}, count, seed=self.plan.seed) if count else []

    def _caption(self, extra: Sequence[str], index: int, number: int) -> str:
        return self._texts_of(index - 1)[number] if index else extra[number]

    def _texts_of(self, index: int) -> list[str]:
        """The forms of example `index`'s caption, and what they are compared with."""
        captions = self.captions_of(index)
        classes = (self.class_caption(index, caption) for caption in captions)
        return [*captions, *dict.fromkeys(text for text in classes if text is not None)]

    def _latents(self, fingerprint: str, index: int, number: int) -> tuple[str, str, tuple[int, Cut]]:
        cut = self.cuts_of(index)[number]
        return self.latent_key(index, cut, fingerprint=fingerprint), self.examples.keys[index], (index, cut)

    def _checked(self, example: Example, place: Place, digest: str) -> bytes:
        try:
            data = self.storages[example.source].read(place)
        except (OSError, ValueError) as error:
            raise InputError(f"{printable(example.key)}: it cannot be read any more ({printable(error)}).") from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise InputError(f"{printable(example.key)}: it was changed since it was first read: start again.")
        return data

    def _is_validation(self, index: int) -> bool:
        return ROLES[int(self.examples.roles[index])] == "validation"


@dataclass(frozen=True)
class Survey:
    """The report on the data, and they themselves, without what is wrong: None where nothing is left."""

    dataset: Dataset | None
    report: DataReport

    def usable(self) -> Dataset:
        """The data; InputError with all that is wrong with them."""
        if self.dataset is None or self.report.errors:
            raise InputError(list(self.report.errors))
        return self.dataset


def survey(
    settings: DataSettings,
    *,
    side_multiple: int,
    seed: int,
    global_batch: int,
    count_tokens: Callable[[str], int] | None = None,
    token_limit: int | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    class_texts: ClassTexts = None,
    task: Task = "text",
    on_progress: Callable[[int], object] | None = None,
) -> Survey:
    """Reads the sources and plans the training; no model is touched, and what is wrong is told in the report.

    `side_multiple` is what the model family needs sides to be a multiple of; with `count_tokens` and `token_limit`
    captions that are too long are reported; `steps` or `epochs` is how long is trained; `class_texts` is what captions
    are compared with.
    """
    problems: list[str] = []
    buckets: list[Bucket] = []
    max_upscale = settings.buckets.max_upscale
    cache = Path(settings.cache) if settings.cache else default_folder()
    try:
        buckets = make_buckets(settings.buckets, side_multiple=side_multiple)
    except InputError as error:
        problems += error.problems
    try:
        refuse_cache(cache, [Path(source.path) for source in settings.sources])
    except InputError as error:
        problems += error.problems
    if settings.sources and all(source.role != "train" for source in settings.sources):
        problems.append('data.sources: none is trained on: at least one must have role = "train".')
    elif settings.sources and all(source.weight == 0 for source in settings.sources if source.role == "train"):
        problems.append("data.sources: nothing would be learned: give a training source a weight above 0.")
    found = scan(
        settings.sources,
        cache=cache,
        size_problem=lambda size: size_problem(size, buckets, max_upscale=max_upscale) if buckets else None,
        on_bad_image=settings.on_bad_image,
        on_progress=on_progress,
    )
    problems += found.problems
    idle: list[str] = []
    data = None
    if buckets and (found.examples.roles == ROLES.index("train")).any():
        examples = _with_validation(found.examples, settings, seed=seed)
        ids = bucket_ids(examples.sizes, buckets, max_upscale=max_upscale)
        plan = Plan(
            examples.keys,
            np.where(examples.roles == ROLES.index("validation"), -1, examples.sources),
            ids,
            buckets=buckets,
            draws=[_draw(source) for source in settings.sources],
            seed=seed,
            global_batch=global_batch,
            content=_content(examples),
        )
        data = Dataset(examples, settings, found.storages, tuple(buckets), ids, plan, class_texts, task)
        last_step = steps or plan.steps_in(epochs or 1)
        problems += [*_leaks(examples), *_gaps(plan, last_step=last_step)]
        idle = _idle(plan, settings.sources, last_step=last_step)
    report = make_report(
        data.examples if data else found.examples,
        settings=settings,
        buckets_of=data.buckets_of if data else None,
        captions_of=data.captions_of if data else None,
        plan=data.plan if data else None,
        errors=problems,
        warnings=(*found.warnings, *idle),
        skipped=found.skipped,
        unused=found.unused,
        duplicates=len(found.copies),
        count_tokens=count_tokens,
        token_limit=token_limit,
        steps=steps,
        epochs=epochs,
    )
    return Survey(data, report)


def _gaps(plan: Plan, *, last_step: int) -> list[str]:
    """What is said where the sources end before the training does."""
    gap = plan.gap()
    if gap is None or gap >= last_step:
        return []
    return [
        f"data.sources: from step {gap} on no source is left to train on: raise an end_step or lower a start_step, or "
        "train for fewer steps."
    ]


def _idle(plan: Plan, sources: Sequence[SourceSettings], *, last_step: int) -> list[str]:
    """What is said of sources whose turn never comes, for they take part only in epochs that begin in their window."""
    taking_part = plan.sources_before(last_step)
    return [
        f"data.sources.{i}: it never takes part: no epoch of the run's {last_step} steps begins from step "
        f"{source.start_step} on" + (f" and before {source.end_step}" if source.end_step is not None else "")
        for i, source in enumerate(sources)
        if i not in taking_part and source.role != "validation" and (plan.sources == i).any()
    ]


def _with_validation(examples: Examples, settings: DataSettings, *, seed: int) -> Examples:
    """`examples` with a share of the training ones put aside."""
    trained = np.flatnonzero(examples.roles == ROLES.index("train"))
    held_out = split((examples.digests[i].tobytes().hex() for i in trained), settings.validation, seed=seed)
    roles = examples.roles.copy()
    roles[trained[held_out]] = ROLES.index("validation")
    return examples.with_roles(roles)


def _leaks(examples: Examples) -> list[str]:
    """What is said of pictures both trained on and put aside: their validation loss would mean nothing."""
    held_out = np.flatnonzero(examples.roles == ROLES.index("validation")).tolist()
    if not held_out:
        return []
    digests = {examples.digests[i].tobytes(): examples.keys[i] for i in held_out}
    trained = np.flatnonzero(examples.roles != ROLES.index("validation")).tolist()
    found = ((i, digests.get(examples.digests[i].tobytes())) for i in trained)
    return [
        f"{printable(key)}: it is for validation, and the same file as {printable(examples.keys[i])}, which is trained "
        "on: remove one of them."
        for i, key in found
        if key is not None
    ]


def _draw(source: SourceSettings) -> Draw:
    return Draw(source.role, source.repeats, source.samples_per_epoch, source.start_step, source.end_step)


def _content(examples: Examples) -> str:
    """A digest of what the examples are: their pictures, captions, masks and focus."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(mark(example).encode())
    return digest.hexdigest()
