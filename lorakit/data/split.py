"""Which pictures are kept for validation: a share of them, chosen by hashes, so that training never sees one. And which
of those that are trained on are measured beside them."""

import heapq
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.core.seeding import hashed


def split(digests: Iterable[str], fraction: float, *, seed: int) -> NDArray[Any]:
    """Which of `digests` (of the pictures' bytes) are for validation, as an array of bools.

    Those with the lowest hashes of (seed, digest) are: round(n · fraction) of n different ones, at least one where
    `fraction` is above 0 and n above 1, never all. So equal files fall on one side, and when pictures come or go the
    others change sides only as far as the number to choose does.
    """
    hashes = np.fromiter((hashed(seed, "validation", digest) for digest in digests), np.int64)
    lowest = np.unique(hashes)
    count = min(max(1, round(len(lowest) * fraction)), len(lowest) - 1) if fraction > 0 else 0
    return hashes <= lowest[count - 1] if count > 0 else np.zeros(len(hashes), bool)


def sample(keys: Mapping[int, str], count: int, *, seed: int) -> list[int]:
    """`count` of the numbered `keys`, or all, by lowest hashes of (seed, key); by number."""
    return sorted(heapq.nsmallest(count, keys, key=lambda number: hashed(seed, "measured", keys[number])))
