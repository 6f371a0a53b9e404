"""One look at a picture or mask in full: is it whole, how large, what is it like.

Here: what is kept of it (`memo.py` remembers it). Not here: its pixels as they are trained on (`images.py`).
"""

import hashlib
import io
from typing import NamedTuple

import numpy as np

from lorakit.core.files import printable
from lorakit.data import images, masks, similar
from lorakit.data.colour import has_alpha

_ENOUGH = (96, 96)  # pixels for a look


class Seen(NamedTuple):
    """What is known of a picture or mask: sha256, upright (width, height), look, transparency; of a mask its focus."""

    digest: str
    size: tuple[int, int]
    look: int = 0
    alpha: bool = False
    focus: tuple[float, float] | None = None


def inspect_picture(data: bytes) -> Seen:
    """What a picture is like, decoded to its end; ValueError says why it cannot be used.

    A JPEG is decoded at down to an eighth of its size, in less than half the time; its data are read to their end all
    the same, so that what is cut off or damaged is found.
    """
    try:
        decoded = images.decode_for(io.BytesIO(data), lambda size: _ENOUGH)
    except images.BadImageError as error:
        raise ValueError(printable(error)) from None
    image = decoded.image
    return Seen(hashlib.sha256(data).hexdigest(), decoded.size, similar.look(image), has_alpha(image))


def inspect_mask(data: bytes) -> Seen:
    """What a mask is like; its focus is the middle of its brighter part, in 0 … 1. ValueError as of a picture."""
    try:
        image = masks.grey(images.decode(io.BytesIO(data)))
    except images.BadImageError as error:
        raise ValueError(printable(error)) from None
    brightest = int(np.asarray(image).max())
    box = image.point([255 if 2 * value >= brightest > 0 else 0 for value in range(256)]).getbbox()
    if box is None:
        raise ValueError("it is all black, so nothing would count: paint what counts in white")
    focus = ((box[0] + box[2]) / 2 / image.width, (box[1] + box[3]) / 2 / image.height)
    return Seen(hashlib.sha256(data).hexdigest(), image.size, focus=focus)
