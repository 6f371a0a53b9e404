"""Lanczos's filter over a whole picture, several times faster than Pillow's and the same but for rounding.

Pillow's takes longer than decoding a JPEG; torch has the same with vector instructions: 8 bits, rows first, rounded
between. docs/performance.md has the figures.
"""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

Size = tuple[int, int]

# so much is copied out of Pillow at a time: what fits a processor's cache copies two or three times as fast
_BAND_BYTES = 2**18


def resized_part(image: Image.Image, size: Size, corner: Size, part: Size) -> Image.Image:
    """The `part` (width, height) at `corner` (left, top) of `image`, of mode RGB, resized to `size`."""
    left, top = corner
    box = (left, top, left + part[0], top + part[1])
    if image.size == size:
        return image if part == size else image.crop(box)
    if not _torch_knows_lanczos():
        return image.resize(size, Image.Resampling.LANCZOS).crop(box)
    small = _lanczos(_array(image), size)[top : top + part[1], left : left + part[0]]
    return Image.fromarray(np.ascontiguousarray(small))


def _array(image: Image.Image) -> np.ndarray:
    array = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, _BAND_BYTES // (3 * image.width))
    for top in range(0, image.height, rows):
        below = min(top + rows, image.height)
        array[top:below] = np.asarray(image.crop((0, top, image.width, below)))
    return array


def _lanczos(array: np.ndarray, size: Size) -> np.ndarray:
    channels_last = torch.from_numpy(array).permute(2, 0, 1).unsqueeze(0)
    small = F.interpolate(channels_last, size=size[::-1], mode="lanczos", antialias=True)
    return small[0].permute(1, 2, 0).numpy()


@functools.cache
def _torch_knows_lanczos() -> bool:
    """newer ones have it; whether it is Pillow's is asked with a picture, not a version's number."""
    array = np.arange(20 * 24 * 3, dtype=np.uint32).reshape(20, 24, 3) * 2654435761 >> 7
    image = Image.fromarray((array % 256).astype(np.uint8))
    try:
        ours = _lanczos(np.array(image), (9, 7))
    except (NotImplementedError, RuntimeError, ValueError):
        return False
    theirs = np.asarray(image.resize((9, 7), Image.Resampling.LANCZOS))
    return bool(np.abs(ours.astype(int) - theirs).max() <= 1)
