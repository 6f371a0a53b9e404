"""A picture as a writer of captions gets it, and as a model looks at it: upright, in sRGB, on white."""

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image

from lorakit.core.files import printable
from lorakit.data import colour, images

_THREADS = 4  # decoding releases the interpreter's lock


@dataclass(frozen=True)
class Picture:
    """`name` is the path below the folder, with / between its parts; `read` gives its bytes.

    `read` raises OSError, or ValueError which says what is wrong.
    """

    name: str
    read: Callable[[], bytes]


def seen(picture: Picture, *, longest: int) -> Image.Image:
    """All of it as RGB, its longer side at most so many pixels. ValueError says why it cannot be used."""

    def wanted(size: tuple[int, int]) -> tuple[int, int]:
        part = min(1.0, longest / max(size))
        return round(size[0] * part), round(size[1] * part)

    try:
        image = images.decode_for(io.BytesIO(picture.read()), wanted).image
        profile = image.info.get("icc_profile")
        plain = colour.continuous(image)
        rgb = colour.to_srgb(plain, profile)
        if colour.has_alpha(image):
            rgb = colour.on_background(rgb, plain.getchannel("A"), "#ffffff")
    except images.BadImageError as error:
        raise ValueError(printable(error)) from None
    except OSError as error:
        raise ValueError(
            f"it could not be read ({error.strerror or printable(error)}): check the disk and the file's permissions"
        ) from None
    rgb.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return rgb


def looked_at(
    pictures: Sequence[Picture],
    write: Callable[[list[Image.Image]], list[tuple[str, ...]]],
    *,
    longest: int,
) -> list[tuple[str, ...] | ValueError]:
    """What `write` says of those of `pictures` that can be decoded, and of the others what is wrong."""
    with ThreadPoolExecutor(min(_THREADS, len(pictures))) as pool:
        found = list(pool.map(lambda picture: _try(picture, longest), pictures))
    good = [image for image in found if not isinstance(image, ValueError)]
    texts = iter(write(good) if good else [])
    return [image if isinstance(image, ValueError) else next(texts) for image in found]


def _try(picture: Picture, longest: int) -> Image.Image | ValueError:
    try:
        return seen(picture, longest=longest)
    except ValueError as error:
        return error
