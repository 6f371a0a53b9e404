"""The data of a training put together: what the sources hold, its buckets, the plan of all steps, and a report.

Here: the `data` section of a recipe and what becomes of it. Next: `cache.py` encodes it, `loader.py` serves it.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from lorakit.core.errors import InputError
from lorakit.core.settings import Settings
from lorakit.core.types import Example
from lorakit.data.buckets import Bucket, BucketSettings, assign, make_buckets, upscale
from lorakit.data.cache import default_folder, refuse_within
from lorakit.data.plan import Plan, PlanEntry
from lorakit.data.report import DataReport, make_report
from lorakit.data.sources import Scan, SourceSettings, scan, source_index


class DataSettings(Settings):
    """What is trained on, and how it is prepared."""

    sources: list[SourceSettings] = Field(default_factory=list)
    """Folders of pictures."""

    buckets: BucketSettings = BucketSettings()
    """The sizes that pictures are cut to."""

    cache: str | None = None
    """Where encoded pictures and captions are kept for other runs; absent: lorakit/data in the user's cache folder."""

    workers: int = Field(default=0, ge=0, le=256)
    """Processes that read the cache and draw noise ahead of the training; the numbers are the same for any."""

    on_bad_image: Literal["error", "skip"] = "error"
    """What a picture that cannot be used leads to: all of them are named, and then it ends or goes on without them."""


@dataclass(frozen=True)
class Dataset:
    """`bucket_of` and `caption_dropout` go with `examples`, by index, and so do the entries of `plan`."""

    examples: tuple[Example, ...]
    bucket_of: tuple[Bucket, ...]
    caption_dropout: tuple[float, ...]
    plan: Plan
    report: DataReport

    def captions(self) -> list[str]:
        """Every caption that a sample may come with, each once; the empty one too if captions may be dropped."""
        dropped = [""] if any(self.caption_dropout) else []
        return list(dict.fromkeys([*(e.caption for e in self.examples), *dropped]))


def prepare(
    settings: DataSettings,
    *,
    side_multiple: int,
    seed: int,
    global_batch: int,
    count_tokens: Callable[[str], int] | None = None,
    token_limit: int | None = None,
) -> Dataset:
    """Reads the sources and plans the training; nothing is written and no model is touched.

    `side_multiple` is what the model family needs sides to be a multiple of; with `count_tokens` and `token_limit`
    captions that are too long are reported. Raises InputError with all that is wrong in settings and folders.
    """
    problems: list[str] = []
    buckets: list[Bucket] = []
    found: Scan | None = None
    try:
        buckets = make_buckets(settings.buckets, side_multiple=side_multiple)
    except InputError as error:
        problems += error.problems
    try:
        folder = Path(settings.cache) if settings.cache else default_folder()
        refuse_within(folder, [Path(source.path) for source in settings.sources], key="data.cache")
    except InputError as error:
        problems += error.problems
    if settings.sources and all(source.role != "train" for source in settings.sources):
        problems.append('data.sources are all for regularization: at least one must have role = "train".')

    def size_problem(size: tuple[int, int]) -> str | None:
        return _too_small(size, buckets, max_upscale=settings.buckets.max_upscale) if buckets else None

    try:
        found = scan(settings.sources, size_problem=size_problem, on_bad_image=settings.on_bad_image)
    except InputError as error:
        problems += error.problems
    if problems or found is None:
        raise InputError(problems)
    bucket_of = tuple(assign(example.size, buckets) for example in found.examples)
    sources = [settings.sources[source_index(example.key)] for example in found.examples]
    entries = [
        PlanEntry(example.key, bucket, source.repeats, source.role, _content(example, source))
        for example, bucket, source in zip(found.examples, bucket_of, sources)
    ]
    plan = Plan(entries, seed=seed, global_batch=global_batch)
    report = make_report(
        found,
        bucket_of,
        sources=settings.sources,
        buckets=settings.buckets,
        plan=plan,
        count_tokens=count_tokens,
        token_limit=token_limit,
    )
    dropout = tuple(source.caption_dropout for source in sources)
    return Dataset(found.examples, bucket_of, dropout, plan, report)


def _too_small(size: tuple[int, int], buckets: list[Bucket], *, max_upscale: float) -> str | None:
    bucket = assign(size, buckets)
    scale = upscale(size, bucket)
    if scale <= max_upscale:
        return None
    return (
        f"it is too small, {size[0]}×{size[1]}: {bucket.width}×{bucket.height} would enlarge it {scale:.1f} times "
        f"(data.buckets.max_upscale is {max_upscale:g}); use a larger picture or lower data.buckets.resolution"
    )


def _content(example: Example, source: SourceSettings) -> str:
    """A digest of what a sample of this example trains on, its file and its caption and how they count."""
    text = "\x1f".join([example.digest, example.caption, str(example.weight), str(source.caption_dropout)])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
