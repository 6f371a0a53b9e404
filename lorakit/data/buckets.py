"""Aspect buckets: the few picture sizes that a training runs at, and which of them a picture is cut to.

Here: sizes only, as pure functions of numbers. Not here: cutting pixels (`images.py`) and the order of samples
(`plan.py`).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from lorakit.core.errors import InputError
from lorakit.core.settings import Settings

AREA_TOLERANCE = 0.10
"""How far a bucket's area may lie from the target's, as a fraction of it."""

# what cameras and screens make, so that most photographs lose next to nothing; the gaps between are filled as needed
_COMMON_ASPECTS = (4 / 3, 3 / 2, 16 / 9)
_SMALLEST, _LARGEST = 8, 16384
_AT_ONCE = 65_536


class BucketSettings(Settings):
    """Which picture sizes are trained at."""

    resolution: int | list[int] = 512
    """Side in pixels of the square bucket; the others have about its area. A list: every picture is trained at each of
    these resolutions in turn, apart from those that it is too small for."""

    multiple: int | None = Field(default=None, ge=1)
    """What both sides of every bucket are multiples of; absent: the smallest that the model family runs at."""

    max_aspect: float = Field(default=3.0, ge=1.0, le=16.0, allow_inf_nan=False)
    """The longest bucket's ratio of sides; what is longer is cropped to it."""

    max_upscale: float = Field(default=1.5, ge=1.0, allow_inf_nan=False)
    """How many times a picture may be enlarged to fill its bucket; smaller pictures are too small, an error."""

    max_crop: float = Field(default=0.05, gt=0.0, lt=0.5, allow_inf_nan=False)
    """What the crop may take off at one side, as a fraction of the picture's width or height; more buckets if lower."""

    @field_validator("resolution", mode="before")
    @classmethod
    def _are_sides(cls, value: Any) -> Any:
        # a union of types would complain twice, once for each
        sides = value if isinstance(value, list) else [value]
        if not sides or any(isinstance(side, bool) or not isinstance(side, int) for side in sides):
            raise ValueError("write a whole number like 512, or a list of them like [512, 768]")
        if wrong := [side for side in sides if not _SMALLEST <= side <= _LARGEST]:
            raise ValueError(f"{', '.join(map(str, wrong))} is not within {_SMALLEST} … {_LARGEST} pixels")
        if twice := sorted({side for side in sides if sides.count(side) > 1}):
            raise ValueError(f"{', '.join(map(str, twice))} is there twice: keep one")
        return value

    @property
    def resolutions(self) -> tuple[int, ...]:
        """What `resolution` names, the smallest first."""
        return tuple(sorted(self.resolution)) if isinstance(self.resolution, list) else (self.resolution,)


class Bucket(NamedTuple):
    """A size in pixels."""

    width: int
    height: int


def make_buckets(settings: BucketSettings, *, side_multiple: int) -> list[Bucket]:
    """The buckets of each resolution, the smallest resolution's first; of one resolution's, from tall to wide.

    They are few, hold the common aspects and keep crops within `max_crop`. The square is always one, and with (w, h)
    there is (h, w). Areas lie within AREA_TOLERANCE of resolution², which at a small resolution with a large multiple
    leaves few sizes, so that `max_crop` cannot be kept everywhere. `side_multiple` is the model family's. Raises
    InputError where a resolution or the multiple does not fit it, or two resolutions have a bucket in common.
    """
    multiple = settings.multiple or side_multiple
    if multiple % side_multiple:
        fitting = max(1, round(multiple / side_multiple)) * side_multiple
        raise InputError(
            f"data.buckets.multiple = {multiple}: this model needs a multiple of {side_multiple}: write {fitting}, or "
            "leave it out."
        )
    if problems := [_misfit(side, multiple, settings) for side in settings.resolutions if side % multiple]:
        raise InputError(problems)
    buckets: list[Bucket] = []
    owner: dict[Bucket, int] = {}
    for side in settings.resolutions:
        for bucket in _of_resolution(side, multiple, settings):
            if bucket in owner:
                problems.append(
                    f"data.buckets.resolution: {owner[bucket]} and {side} are too near each other, "
                    f"{bucket.width}×{bucket.height} would be a bucket of both: leave one out."
                )
                break
            buckets.append(bucket)
            owner[bucket] = side
    if problems:
        raise InputError(problems)
    return buckets


def by_resolution(buckets: Sequence[Bucket]) -> list[range]:
    """Which of `make_buckets`' are of one resolution: a resolution begins where the next bucket is no wider."""
    starts = [i for i, b in enumerate(buckets) if i == 0 or _log_aspect(b) <= _log_aspect(buckets[i - 1])]
    return [range(start, end) for start, end in zip(starts, [*starts[1:], len(buckets)])]


def fitting(size: tuple[int, int], buckets: Sequence[Bucket], *, max_upscale: float) -> list[Bucket | None]:
    """For each resolution the bucket of a picture of `size` (width, height); None where it would be enlarged too much.

    `buckets` are `make_buckets`'.
    """
    nearest = [assign(size, buckets[part.start : part.stop]) for part in by_resolution(buckets)]
    return [bucket if upscale(size, bucket) <= max_upscale else None for bucket in nearest]


def bucket_ids(sizes: NDArray[Any], buckets: Sequence[Bucket], *, max_upscale: float) -> NDArray[np.int16]:
    """`fitting` of many `sizes` (N, 2): (N, R) indices of `buckets`, one for each resolution, -1 for none."""
    parts = by_resolution(buckets)
    # one number for a size: numpy sorts rows many times slower
    packed, where = np.unique(sizes[:, 0].astype(np.int64) << 32 | sizes[:, 1].astype(np.int64), return_inverse=True)
    width, height = packed >> 32, packed & 0xFFFFFFFF
    # numpy's logarithm may differ in the last bit, and so decide otherwise on a picture between two buckets
    aspect = np.array([_log_aspect(size) for size in zip(width.tolist(), height.tolist())])
    chosen = np.empty((len(packed), len(parts)), np.int16)
    for column, part in enumerate(parts):
        own = np.array(buckets[part.start : part.stop])
        own_aspect = np.array([_log_aspect(bucket) for bucket in buckets[part.start : part.stop]])
        for start in range(0, len(packed), _AT_ONCE):
            rows = slice(start, start + _AT_ONCE)
            nearest = np.abs(own_aspect - aspect[rows, None]).argmin(1)
            scale = np.maximum(own[nearest, 0] / width[rows], own[nearest, 1] / height[rows])
            chosen[rows, column] = np.where(scale <= max_upscale, nearest + part.start, -1)
    return chosen[where.reshape(-1)]


def size_problem(size: tuple[int, int], buckets: Sequence[Bucket], *, max_upscale: float) -> str | None:
    """Why a picture of `size` (width, height) cannot be trained at any resolution, if so."""
    if any(fitting(size, buckets, max_upscale=max_upscale)):
        return None
    smallest = by_resolution(buckets)[0]
    bucket = assign(size, buckets[: smallest.stop])
    return (
        f"it is too small, {size[0]}×{size[1]}: {bucket.width}×{bucket.height} would enlarge it "
        f"{upscale(size, bucket):.1f} times (data.buckets.max_upscale is {max_upscale:g}); use a larger picture or "
        "lower data.buckets.resolution"
    )


def assign(size: tuple[int, int], buckets: Sequence[Bucket]) -> Bucket:
    """The bucket nearest to `size` (width, height) in log-aspect, the one that crops least; of equals the first."""
    aspect = _log_aspect(size)
    return min(buckets, key=lambda bucket: abs(_log_aspect(bucket) - aspect))


def upscale(size: tuple[int, int], bucket: Bucket) -> float:
    """How many times a picture of `size` is enlarged to cover `bucket`; below 1 it is reduced."""
    return max(bucket.width / size[0], bucket.height / size[1])


def crop_fraction(size: tuple[int, int], bucket: Bucket) -> float:
    """What is cut off at each of two opposite sides, as a fraction of the picture's width or height: 0 … 0.5."""
    return (1 - math.exp(-abs(_log_aspect(size) - _log_aspect(bucket)))) / 2


def _misfit(side: int, multiple: int, settings: BucketSettings) -> str:
    below, above = side // multiple * multiple, (side // multiple + 1) * multiple
    nearest = f"{below} or {above}" if below else str(above)
    whose = "data.buckets.multiple" if settings.multiple else "what this model needs"
    return (
        f"data.buckets.resolution = {side} is not a multiple of {multiple} ({whose}): the nearest that fit are "
        f"{nearest}."
    )


def _of_resolution(side: int, multiple: int, settings: BucketSettings) -> list[Bucket]:
    """From tall to wide."""
    candidates = _wide_candidates(side, multiple, max_aspect=settings.max_aspect)
    chosen = {Bucket(side, side)}
    for aspect in (*_COMMON_ASPECTS, settings.max_aspect):
        if aspect <= settings.max_aspect:
            chosen.add(_nearest(candidates, math.log(aspect), side=side))
    # a picture halfway between two buckets loses 1 - exp(-gap / 2) of one dimension, half of it at either side
    gap = -2 * math.log(1 - 2 * settings.max_crop)
    wide = _fill_gaps(sorted(chosen, key=_log_aspect), candidates, gap=gap, side=side)
    return sorted({*wide, *(Bucket(b.height, b.width) for b in wide)}, key=_log_aspect)


def _log_aspect(size: tuple[int, int]) -> float:
    return math.log(size[0] / size[1])


def _wide_candidates(side: int, multiple: int, *, max_aspect: float) -> list[Bucket]:
    """All sizes at least as wide as high, of fitting sides, area and aspect, by aspect; the square is among them."""
    found = []
    for height in range(multiple, side + multiple, multiple):
        middle = side * side / height / multiple
        first, last = math.ceil(middle * (1 - AREA_TOLERANCE)), math.floor(middle * (1 + AREA_TOLERANCE))
        found += [
            Bucket(units * multiple, height)
            for units in range(first, last + 1)
            if height <= units * multiple <= height * max_aspect
        ]
    return sorted({*found, Bucket(side, side)}, key=_log_aspect)


def _nearest(candidates: Sequence[Bucket], log_aspect: float, *, side: int) -> Bucket:
    """The candidate that is nearest in aspect and area together."""

    def distance(bucket: Bucket) -> float:
        area = math.log(bucket.width * bucket.height / side**2)
        return abs(_log_aspect(bucket) - log_aspect) + abs(area)

    return min(candidates, key=distance)


def _fill_gaps(chosen: list[Bucket], candidates: Sequence[Bucket], *, gap: float, side: int) -> list[Bucket]:
    """`chosen` with buckets added in the middle of what is wider apart than `gap`, where there are any."""
    filled = chosen[:1]
    for right in chosen[1:]:
        low, high = _log_aspect(filled[-1]), _log_aspect(right)
        between = [b for b in candidates if low < _log_aspect(b) < high]
        if high - low > gap * (1 + 1e-9) and between:
            middle = _nearest(between, (low + high) / 2, side=side)
            filled += _fill_gaps([filled[-1], middle, right], candidates, gap=gap, side=side)[1:]
        else:
            filled.append(right)
    return filled
