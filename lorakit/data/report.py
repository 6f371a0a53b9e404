"""What was found in the data, in numbers and sentences, for a person before training and in RUN/check.json.

No absolute path is in it: pictures go by their keys, folders by their last name.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorakit.core.files import printable
from lorakit.core.types import Example
from lorakit.data.buckets import Bucket, BucketSettings, crop_fraction, upscale
from lorakit.data.plan import Plan
from lorakit.data.sources import Scan, SourceSettings, source_index


@dataclass(frozen=True)
class SourceReport:
    """One source: its folder's name, its role, its pictures and how many samples an epoch they give."""

    folder: str
    role: str
    pictures: int
    repeats: int
    samples_per_epoch: float


@dataclass(frozen=True)
class DataReport:
    """What a training will see.

    `buckets` has the number of pictures of each, by "width×height"; crops are what is cut off at each of two sides, as
    a fraction of width or height; `skipped` are bad pictures that were left out.
    """

    sources: tuple[SourceReport, ...]
    buckets: Mapping[str, int]
    mean_crop: float
    largest_crop: float
    enlarged: int
    captions: int
    long_captions: int
    samples_per_epoch: int
    steps_per_epoch: int
    warnings: tuple[str, ...]
    skipped: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        values = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def make_report(
    scan: Scan,
    bucket_of: Sequence[Bucket],
    *,
    sources: Sequence[SourceSettings],
    buckets: BucketSettings,
    plan: Plan,
    count_tokens: Callable[[str], int] | None = None,
    token_limit: int | None = None,
) -> DataReport:
    """The report on what was scanned and planned.

    Captions are measured with `count_tokens` where it is given, against `token_limit` in the same unit.
    """
    crops = [crop_fraction(e.size, b) for e, b in zip(scan.examples, bucket_of)]
    about_sizes = [text for e, b in zip(scan.examples, bucket_of) if (text := _size_warning(e, b, buckets))]
    too_long = _long_captions(scan.examples, count_tokens, token_limit)
    sizes = Counter(bucket_of)
    return DataReport(
        sources=tuple(_source(scan.examples, plan, i, source) for i, source in enumerate(sources)),
        buckets={f"{b.width}×{b.height}": sizes[b] for b in sorted(sizes, key=lambda b: b.width / b.height)},
        mean_crop=sum(crops) / len(crops),
        largest_crop=max(crops),
        enlarged=sum(upscale(e.size, b) > 1 for e, b in zip(scan.examples, bucket_of)),
        captions=len({e.caption for e in scan.examples}),
        long_captions=len(too_long),
        samples_per_epoch=plan.samples_per_epoch,
        steps_per_epoch=plan.steps_per_epoch,
        warnings=(*scan.warnings, *about_sizes, *too_long),
        skipped=scan.skipped,
    )


def _source(examples: Sequence[Example], plan: Plan, index: int, source: SourceSettings) -> SourceReport:
    count = sum(source_index(e.key) == index for e in examples)
    samples = float(count * source.repeats)
    if source.role != "train":
        # the walk shares out as many samples as the training sources give
        samples *= plan.samples_per_epoch / 2 / sum(e.repeats for e in plan.entries if e.role == source.role)
    return SourceReport(printable(Path(source.path).name), source.role, count, source.repeats, round(samples, 2))


def _size_warning(example: Example, bucket: Bucket, settings: BucketSettings) -> str | None:
    """What a person should know of how this picture is cut or enlarged."""
    width, height = example.size
    crop, scale = crop_fraction(example.size, bucket), upscale(example.size, bucket)
    to = f"{width}×{height} to {bucket.width}×{bucket.height}"
    texts = []
    if crop > settings.max_crop:
        texts.append(f"{crop:.0%} is cut off at each of two sides, from {to}")
        if max(width / height, height / width) > settings.max_aspect:
            texts[-1] += f", for it is longer than data.buckets.max_aspect {settings.max_aspect:g}"
    if scale > 1:
        texts.append(f"it is enlarged {scale:.2f} times, from {to}")
    return f"{example.key}: {'; '.join(texts)}" if texts else None


def _long_captions(
    examples: Sequence[Example], count_tokens: Callable[[str], int] | None, token_limit: int | None
) -> list[str]:
    if count_tokens is None or token_limit is None:
        return []
    counts = {caption: count_tokens(caption) for caption in {e.caption for e in examples}}
    return [
        f"{e.key}: its caption has {counts[e.caption]} tokens, of which the model reads {token_limit}"
        for e in examples
        if counts[e.caption] > token_limit
    ]
