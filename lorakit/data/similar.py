"""Pictures that look alike: a difference hash with two colours, and the pairs that are near each other in both.

After N. Krawetz, "Kind of Like That" (2013): a picture is reduced to a few grey values, and each bit says whether a
value is greater than its neighbour. Recompression, scaling and brightness leave most bits as they are. Drawings on
plain grounds have few bits that differ; what tells them apart is their colours, in the middle and around it.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lorakit.data.colour import continuous, has_alpha, on_background

MAX_DISTANCE = 12
"""Pictures look alike if at most so many of the 128 bits differ. Measured on 27 photographs, some of the same thing:
copies recompressed at quality 20 differ in at most 5, halved or quartered in 4, brightened by a tenth in 7 (one of
them, on white that clips, in 14), and two photographs in 31 at least."""

MAX_COLOUR_DISTANCE = 40
"""Nor may one of the six colour values differ by more: a copy darkened by 15 % differs by 38 at most."""

LOOK_BYTES = 24
"""Of a look: 16 of the hash, 6 of the mean colours of middle and border, 2 that are zero."""

SURE_DISTANCE = 7
"""Of pairs that differ in at most so many bits every one is found, of others most."""

_STEP = 2  # grey values: what is nearly even counts as even, so that noise in a white background is no look
_LEAST_SIDE = 16  # pixels: of less 9 columns are guessed
_LEAST_BITS = 8  # of either kind; a picture with fewer is all but plain, and like any other such
_BANDS = SURE_DISTANCE + 1  # 7 bits cannot lie in all of 8 stretches of 16
_NEIGHBOURS = 50  # where many share a stretch, each is compared with so many of them only


def look(image: Image.Image) -> int:
    """LOOK_BYTES as a number: 64 differences to the right, 64 below, colours; 0 for what is too plain."""
    if min(image.size) < _LEAST_SIDE:
        return 0
    opaque = continuous(image)
    if has_alpha(opaque):
        opaque = on_background(opaque.convert("RGB"), opaque.getchannel("A"), "#ffffff")
    small = opaque.convert("L")
    wide = np.asarray(small.resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    tall = np.asarray(small.resize((8, 9), Image.Resampling.BOX), dtype=np.int16)
    bits = np.concatenate([(wide[:, 1:] - wide[:, :-1] > _STEP).ravel(), (tall[1:] - tall[:-1] > _STEP).ravel()])
    if not _LEAST_BITS <= bits.sum() <= bits.size - _LEAST_BITS:
        return 0
    return int.from_bytes(np.packbits(bits).tobytes() + _colours(opaque.convert("RGB")), "big")


def _colours(rgb: Image.Image) -> bytes:
    """The mean colours of a picture's middle and of what is around it, padded."""
    values = np.asarray(rgb.resize((4, 4), Image.Resampling.BOX), dtype=np.float64)
    middle = np.zeros((4, 4), bool)
    middle[1:3, 1:3] = True
    means = np.concatenate([values[middle].mean(0), values[~middle].mean(0)]).round()
    return means.astype(np.uint8).tobytes().ljust(LOOK_BYTES - 16, b"\0")


def alike(looks: NDArray[np.uint8]) -> Iterator[tuple[int, int]]:
    """Of `looks` (N, LOOK_BYTES) each picture that looks like an earlier one, with the nearest such; by rising number.

    Found are pairs of at most SURE_DISTANCE, and most of at most MAX_DISTANCE. Time and memory grow like N: where more
    pictures than usual agree in 16 bits, not every pair of them is compared, and of hundreds that are all alike some
    may go unnamed.
    """
    # the same look is one picture from here on, its first
    words, first, of = np.unique(looks, axis=0, return_index=True, return_inverse=True)
    count = len(words)
    nearest = np.full(count, -1, dtype=np.int64)
    distance = np.full(count, MAX_DISTANCE + 1, dtype=np.int64)
    hashes, colours = np.ascontiguousarray(words[:, :16]), words[:, 16:].astype(np.int16)
    halves = hashes.view(np.uint64)
    plain = np.asarray(hashes.max(axis=1) == 0)
    for band in hashes.view(np.uint16).T[:_BANDS]:
        order = np.lexsort((first, band))
        sorted_band = band[order]
        for step in range(1, _NEIGHBOURS + 1):
            here = np.flatnonzero(sorted_band[step:] == sorted_band[:-step])
            if not len(here):
                break
            a, b = order[here], order[here + step]
            bits = np.bitwise_count(halves[a] ^ halves[b]).sum(axis=1, dtype=np.int64)
            near = (bits <= MAX_DISTANCE) & ~plain[a] & ~plain[b]
            near &= np.abs(colours[a] - colours[b]).max(axis=1) <= MAX_COLOUR_DISTANCE
            earlier, later, bits = _by_first(a[near], b[near], first, bits[near])
            # nearest first, and of those the earliest: of several for one picture the first one written counts
            for one, other, d in sorted(zip(earlier, later, bits), key=lambda t: (t[2], first[t[0]])):
                if d < distance[other]:
                    nearest[other], distance[other] = first[one], d
    of = of.reshape(-1)
    for i in range(len(looks)):
        group = of[i]
        if plain[group]:
            continue
        if first[group] != i:
            yield i, int(first[group])
        elif nearest[group] >= 0:
            yield i, int(nearest[group])


def _by_first(
    a: NDArray[np.int64], b: NDArray[np.int64], first: NDArray[np.int64], bits: NDArray[np.int64]
) -> tuple[list[int], list[int], list[int]]:
    """The pairs with the picture that came first first."""
    swap = first[a] > first[b]
    return np.where(swap, b, a).tolist(), np.where(swap, a, b).tolist(), bits.tolist()
