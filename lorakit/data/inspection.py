"""One look at a picture or mask in full: is it whole, how large, what is it like.

Here: what is kept of it (`memo.py` remembers it). Not here: its pixels as they are trained on (`images.py`).
"""

import hashlib
import io
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from lorakit.core.files import printable
from lorakit.data import images, similar

_JPEG = b"\xff\xd8\xff"
_ENOUGH = (96, 96)  # for a look: the decoder gives an eighth at least, and no less than this


class Seen(NamedTuple):
    """What is known of a picture or mask: sha256, upright (width, height), perceptual hash; of a mask its focus."""

    digest: str
    size: tuple[int, int]
    look: int = 0
    focus: tuple[float, float] | None = None


def inspect_picture(data: bytes) -> Seen:
    """What a picture is like, decoded to its end; ValueError says why it cannot be used."""
    digest = hashlib.sha256(data).hexdigest()
    seen = _inspect_jpeg(data) if data.startswith(_JPEG) else None
    size, look = seen or _inspect(data)
    return Seen(digest, size, look)


def inspect_mask(data: bytes) -> Seen:
    """What a mask is like; its focus is the middle of its brighter part, in 0 … 1. ValueError as of a picture."""
    try:
        image = similar.grey(images.decode(io.BytesIO(data)))
    except images.BadImageError as error:
        raise ValueError(printable(error)) from None
    brightest = int(np.asarray(image).max())
    box = image.point([255 if 2 * value >= brightest > 0 else 0 for value in range(256)]).getbbox()
    if box is None:
        raise ValueError("it is all black, so nothing would count: paint what counts in white")
    focus = ((box[0] + box[2]) / 2 / image.width, (box[1] + box[3]) / 2 / image.height)
    return Seen(hashlib.sha256(data).hexdigest(), image.size, focus=focus)


def _inspect(data: bytes) -> tuple[tuple[int, int], int]:
    try:
        image = images.decode(io.BytesIO(data))
    except images.BadImageError as error:
        raise ValueError(printable(error)) from None
    return image.size, similar.look(image)


def _inspect_jpeg(data: bytes) -> tuple[tuple[int, int], int] | None:
    """The same of a JPEG in less than half the time; None where `images.decode` will tell what is the matter.

    It is decoded at down to an eighth of its size, but its data are read to their end all the same, so that what is cut
    off or damaged is found.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=["JPEG"])
        width, height = image.size
        if width * height > images.MAX_PIXELS:
            return None
        image.draft(None, _ENOUGH)
        image.load()
        upright = ImageOps.exif_transpose(image)
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        return (height, width) if turned else (width, height), similar.look(upright)
    except Exception:  # decoders raise whatever a format's damage leads to
        return None
