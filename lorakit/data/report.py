"""What was found in the data, in numbers and sentences, for a person before training and in RUN/check.json.

Here: the report, which is small whatever the number of pictures, and `rows`, one for each picture, made as they are
asked for. Next: `sheet.py` draws pictures of it, `page.py` makes it a page. Pictures go by their keys and folders by
their last name: no absolute path is in it, but in errors, which keep a training from starting.
"""

import bisect
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import PurePath
from typing import Any, Protocol

import numpy as np

from lorakit.core.files import printable
from lorakit.core.types import Example
from lorakit.data.buckets import Bucket, BucketSettings, crop_fraction, upscale
from lorakit.data.cut import Cut, covering, offset, plain_cut
from lorakit.data.images import Prepared
from lorakit.data.plan import Plan
from lorakit.data.sources import SourceSettings

LISTED = 1000
"""So many pictures are named in a report for one and the same reason; the others are counted."""


class DataSection(Protocol):
    """What is needed here of a recipe's data section."""

    @property
    def sources(self) -> Sequence[SourceSettings]: ...
    @property
    def buckets(self) -> BucketSettings: ...


class Data(Protocol):
    """What is needed of a dataset to show its pictures; `cuts_of` and `captions_of` begin with the plain one."""

    @property
    def examples(self) -> Sequence[Example]: ...
    @property
    def settings(self) -> DataSection: ...
    def buckets_of(self, index: int) -> tuple[Bucket, ...]: ...
    def cuts_of(self, index: int) -> tuple[Cut, ...]: ...
    def captions_of(self, index: int) -> tuple[str, ...]: ...
    def read(self, index: int) -> bytes: ...
    def picture(self, index: int, cut: Cut) -> Prepared: ...


@dataclass(frozen=True)
class SourceReport:
    """One source: its folder's name, its role, its pictures and how many samples they give in the first epoch.

    `validation` of its pictures are put aside. It takes part in epochs that begin from `start_step` on and before
    `end_step`.
    """

    folder: str
    role: str
    pictures: int
    repeats: int
    samples_per_epoch: float
    validation: int = 0
    start_step: int = 0
    end_step: int | None = None


@dataclass(frozen=True)
class DataReport:
    """What a training will see.

    `pictures` are all that can be used, `validation` of them are not trained on, `masked` have a mask. `buckets`
    has the number of pictures of each, by "width×height" (with several `resolutions` a picture may be in several);
    crops are what is cut off at each of two sides, were it cut evenly, as a fraction of width or height; `enlarged`
    pictures are smaller than a bucket of theirs. `captions` are the different ones, `caption_variants` the
    different texts that samples come with, `long_captions` the pictures with one that the model does not read to
    its end. `duplicates` are pictures that are or look like another. `skipped` are bad pictures that were left out,
    `unused` captions and masks of no picture. `steps` are those of the whole run, which takes `epochs`. `errors` is
    what keeps the training from starting.
    """

    sources: tuple[SourceReport, ...] = ()
    buckets: Mapping[str, int] = field(default_factory=dict)
    mean_crop: float = 0.0
    largest_crop: float = 0.0
    enlarged: int = 0
    captions: int = 0
    long_captions: int = 0
    samples_per_epoch: int = 0
    steps_per_epoch: int = 0
    warnings: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    pictures: int = 0
    masked: int = 0
    validation: int = 0
    resolutions: tuple[int, ...] = ()
    duplicates: int = 0
    steps: int = 0
    epochs: float = 0.0
    caption_variants: int = 0
    unused: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        values = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@dataclass(frozen=True)
class Row:
    """One picture: `crop` and `scale` are the largest of its buckets; `captions` how many forms its caption has, of
    which `caption` is the first and `tokens` the number of the longest; `mask` is "", "picture" or "alpha"."""

    key: str
    role: str
    size: tuple[int, int]
    buckets: tuple[Bucket, ...]
    crop: float
    scale: float
    caption: str
    captions: int
    tokens: int | None
    repeats: int
    mask: str
    warnings: tuple[str, ...]


def make_report(
    examples: Sequence[Example],
    *,
    settings: DataSection,
    buckets_of: Callable[[int], Sequence[Bucket]] | None = None,
    captions_of: Callable[[int], Sequence[str]] | None = None,
    plan: Plan | None = None,
    errors: Iterable[str] = (),
    warnings: Iterable[str] = (),
    skipped: Iterable[str] = (),
    unused: Iterable[str] = (),
    duplicates: int = 0,
    count_tokens: Callable[[str], int] | None = None,
    token_limit: int | None = None,
    steps: int | None = None,
    epochs: float | None = None,
) -> DataReport:
    """The report on the `examples` that were found, as far as it is known what becomes of them.

    `buckets_of` and `captions_of` tell of an example, by its number; without them crops or captions are not spoken of.
    Captions are measured with `count_tokens` where it is given, against `token_limit` in the same unit. Of `steps` and
    `epochs` of the run one is given, or none. `warnings`, `skipped`, `unused` and `errors` are what was said already.
    """
    counts = _Counts(settings)
    count = lru_cache(maxsize=1 << 16)(count_tokens) if count_tokens and token_limit is not None else None
    for index, example in enumerate(examples):
        counts.add(
            example,
            buckets=tuple(buckets_of(index)) if buckets_of else (),
            captions=captions_of(index) if captions_of else example.captions,
            count_tokens=count,
            token_limit=token_limit or 0,
        )
    total, passes = _length(plan, steps=steps, epochs=epochs)
    return DataReport(
        sources=_sources(settings.sources, counts.of_source, counts.kept_aside, plan),
        buckets={f"{b.width}×{b.height}": counts.buckets[b] for b in sorted(counts.buckets, key=_by_aspect)},
        mean_crop=counts.crops / max(1, counts.buckets.total()),
        largest_crop=counts.largest_crop,
        enlarged=counts.enlarged.number,
        captions=len(np.unique(counts.captions)),
        long_captions=counts.too_long.number,
        samples_per_epoch=plan.samples_per_epoch if plan else 0,
        steps_per_epoch=plan.steps_per_epoch if plan else 0,
        warnings=(*warnings, *counts.warnings()),
        skipped=tuple(skipped),
        errors=tuple(errors),
        pictures=len(examples),
        masked=counts.masked,
        validation=sum(counts.kept_aside.values()),
        resolutions=_resolutions(settings.buckets),
        duplicates=duplicates,
        steps=total,
        epochs=passes,
        caption_variants=len(np.unique(counts.variants)),
        unused=tuple(unused),
    )


def rows(
    data: Data,
    *,
    report: DataReport | None = None,
    count_tokens: Callable[[str], int] | None = None,
    token_limit: int | None = None,
) -> Iterator[Row]:
    """A row for each picture of `data`, one after the other; with the warnings of a scan's `report` about it."""
    said: dict[str, list[str]] = {}
    for text in report.warnings if report else ():
        for end in list(re.finditer(": ", text))[:3]:  # a key may hold a colon itself
            said.setdefault(text[: end.start()], []).append(text[end.end() :])
    count = lru_cache(maxsize=1 << 16)(count_tokens) if count_tokens else None
    for index, example in enumerate(data.examples):
        buckets, captions = data.buckets_of(index), data.captions_of(index)
        tokens = max(count(caption) for caption in captions) if count and captions else None
        source = data.settings.sources[example.source]
        own = [_crop_warning(example, b, data.settings.buckets) for b in buckets]
        own += [_focus_warning(example, b, source) for b in buckets]
        own += [_scale_warning(example, b) for b in buckets]
        if tokens is not None and token_limit is not None and tokens > token_limit:
            own.append(_token_warning(tokens, token_limit))
        yield Row(
            example.key,
            example.role,
            example.size,
            buckets,
            max((crop_fraction(example.size, b) for b in buckets), default=0.0),
            max((upscale(example.size, b) for b in buckets), default=1.0),
            captions[0] if captions else "",
            len(captions),
            tokens,
            source.repeats,
            _mask_of(example),
            tuple(dict.fromkeys([text for text in own if text] + said.get(example.key, []))),
        )


# -- counting, picture by picture ---------------------------------------------------------------------------------


class _Listed:
    """Warnings of one kind: the first are kept, the others counted; at most one is counted for a picture."""

    def __init__(self, what: str) -> None:
        self.number = 0
        self._what = what
        self._kept: list[str] = []

    def add(self, key: str, found: Sequence[str]) -> None:
        if found:
            self.number += 1
            if self.number <= LISTED:
                self._kept += [f"{key}: {text}" for text in found]

    def texts(self) -> list[str]:
        more = self.number - LISTED
        return self._kept + (
            [f"{more:,} more pictures {self._what}: lorakit check --out lists all"] if more > 0 else []
        )


class _Counts:
    """The sums of a report; what it keeps of a picture is 8 bytes for each of its captions."""

    def __init__(self, settings: DataSection) -> None:
        self._settings = settings
        self.of_source: Counter[int] = Counter()
        self.kept_aside: Counter[int] = Counter()
        self.buckets: Counter[Bucket] = Counter()
        self.masked = 0
        self.crops = 0.0
        self.largest_crop = 0.0
        self.captions, self.variants = array("q"), array("q")  # hashes
        self.cropped = _Listed("are cropped by more than data.buckets.max_crop")
        self.missed = _Listed("have what matters in them outside of their crops")
        self.enlarged = _Listed("are enlarged")
        self.too_long = _Listed("have too long captions")

    def warnings(self) -> Iterator[str]:
        for listed in (self.cropped, self.missed, self.enlarged, self.too_long):
            yield from listed.texts()

    def add(
        self,
        example: Example,
        *,
        buckets: Sequence[Bucket],
        captions: Sequence[str],
        count_tokens: Callable[[str], int] | None,
        token_limit: int,
    ) -> None:
        self.of_source[example.source] += 1
        self.kept_aside[example.source] += example.role == "validation"
        self.masked += example.mask is not None
        self.buckets.update(buckets)
        for bucket in buckets:
            crop = crop_fraction(example.size, bucket)
            self.crops += crop
            self.largest_crop = max(self.largest_crop, crop)
        crops = [_crop_warning(example, b, self._settings.buckets) for b in buckets]
        self.cropped.add(example.key, [text for text in crops if text])
        source = self._settings.sources[example.source]
        missed = [text for b in buckets if (text := _focus_warning(example, b, source))]
        self.missed.add(example.key, missed[:1])
        self.enlarged.add(example.key, [text for b in buckets if (text := _scale_warning(example, b))])
        self.captions.extend(hash(caption) for caption in example.captions)
        self.variants.extend(hash(caption) for caption in captions)
        if count_tokens:
            longest = max((count_tokens(caption) for caption in captions), default=0)
            self.too_long.add(example.key, [_token_warning(longest, token_limit)] if longest > token_limit else [])


def _crop_warning(example: Example, bucket: Bucket, settings: BucketSettings) -> str:
    """What a person should know of how this picture is cut; "": nothing."""
    crop, (width, height) = crop_fraction(example.size, bucket), example.size
    if crop <= settings.max_crop:
        return ""
    side = "width" if width * bucket.height > height * bucket.width else "height"
    text = f"{2 * crop:.0%} of its {side} is cut off, from {width}×{height} to {bucket.width}×{bucket.height}"
    if max(width / height, height / width) > settings.max_aspect:
        text += f", for it is longer than data.buckets.max_aspect {settings.max_aspect:g}"
    return text


def _focus_warning(example: Example, bucket: Bucket, source: SourceSettings) -> str:
    """That the middle of a picture's mask or box lies outside of what is kept; "": it does not, or there is none."""
    if example.focus is None or source.crop != "center":
        return ""
    whole = covering(example.size, bucket)
    start = offset(example.size, plain_cut(source, bucket, size=example.size, focus=example.focus))
    if all(start[i] <= example.focus[i] * whole[i] <= start[i] + bucket[i] for i in (0, 1)):
        return ""
    return 'the middle of its mask or box lies outside of what is kept: crop = "focus" would keep it'


def _scale_warning(example: Example, bucket: Bucket) -> str:
    scale, (width, height) = upscale(example.size, bucket), example.size
    if scale <= 1:
        return ""
    return f"it is enlarged {scale:.2f} times, from {width}×{height} to {bucket.width}×{bucket.height}"


def _token_warning(tokens: int, limit: int) -> str:
    return f"its caption has {tokens} tokens, of which the model reads {limit}"


def _mask_of(example: Example) -> str:
    """Where what counts of this picture is said: "" nowhere."""
    if example.mask is None:
        return ""
    return "alpha" if example.mask == example.place else "picture"


def _by_aspect(bucket: Bucket) -> tuple[float, int]:
    return bucket.width / bucket.height, bucket.width


def _resolutions(settings: BucketSettings) -> tuple[int, ...]:
    given: int | Sequence[int] = settings.resolution
    return (given,) if isinstance(given, int) else tuple(given)


# -- sums over the plan -------------------------------------------------------------------------------------------


def _sources(
    sources: Sequence[SourceSettings], counts: Counter[int], aside: Counter[int], plan: Plan | None
) -> tuple[SourceReport, ...]:
    slots = [(counts[i] - aside[i]) * source.repeats for i, source in enumerate(sources)]
    # as many as they ask for, or as they have; the regularization sources without a wish share what is left
    pool = [i for i, s in enumerate(sources) if s.role == "regularization" and not s.samples_per_epoch]
    pool = [i for i in pool if sources[i].start_step == 0]
    asked = [
        float(source.samples_per_epoch or slots[i]) if source.start_step == 0 and slots[i] else 0.0
        for i, source in enumerate(sources)
    ]
    left = (plan.samples_per_epoch if plan else 0) - sum(n for i, n in enumerate(asked) if i not in pool)
    shared = sum(slots[i] for i in pool)
    return tuple(
        SourceReport(
            folder=_folder_name(source.path),
            role=source.role,
            pictures=counts[i],
            repeats=source.repeats,
            samples_per_epoch=round(left * slots[i] / shared if i in pool and shared else asked[i], 2) if plan else 0.0,
            validation=aside[i],
            start_step=source.start_step,
            end_step=source.end_step,
        )
        for i, source in enumerate(sources)
    )


def _folder_name(path: str) -> str:
    return path.removeprefix("hf://datasets/") if path.startswith("hf://") else printable(PurePath(path).name)


def _length(plan: Plan | None, *, steps: int | None, epochs: float | None) -> tuple[int, float]:
    """Steps and epochs of the whole run; epochs may differ in length where sources come and go."""
    if plan is None or not plan.steps_per_epoch:
        return steps or 0, float(epochs or 0)
    if steps is None:
        return (plan.steps_in(round(epochs)), float(epochs)) if epochs else (0, 0.0)
    whole = bisect.bisect_right(range(steps + 1), steps, key=plan.steps_in) - 1
    first, last = plan.steps_in(whole), plan.steps_in(whole + 1)
    return steps, round(whole + (steps - first) / (last - first), 4)
