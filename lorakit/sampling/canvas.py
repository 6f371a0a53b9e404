"""A picture to draw over, and the mask of what is drawn, cut to the size of the new picture.

They are read as training pictures are (lorakit/data/images.py): upright, colours as sRGB, what is transparent on white.
"""

import io
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lorakit.core.errors import InputError
from lorakit.core.files import printable
from lorakit.data.buckets import Bucket
from lorakit.data.images import BadImageError, Cut, decode, prepare_picture
from lorakit.sampling.pictures import Request, SampleSettings, requests


@dataclass(frozen=True)
class Canvas:
    """The bytes of the files, and the picture's upright size."""

    image: bytes
    mask: bytes | None
    width: int
    height: int

    def cut(self, width: int, height: int) -> tuple[Image.Image, Image.Image | None]:
        """Picture (RGB) and mask (L, 0 or 255) at this size: scaled until they cover it, the middle kept."""
        prepared = prepare_picture(self.image, Cut(Bucket(width, height)), mask=self.mask)
        image = _picture((prepared.pixels.movedim(0, -1) + 1) * 127.5)
        if self.mask is None or prepared.mask is None:
            return image, None
        return image, _picture((prepared.mask[0] >= 0.5) * 255.0)  # as the pipelines round it


def read_canvas(image: Path, mask: Path | None = None, *, key: str = "--") -> Canvas:
    """Raises InputError for what is no picture, and for a mask of another size or without anything to draw; `key`
    stands before "image" and "mask" where they were given."""
    data, picture = _read(image, f"{key}image")
    if mask is None:
        return Canvas(data, None, *picture.size)
    mask_data, mask_picture = _read(mask, f"{key}mask")
    if mask_picture.size != picture.size:
        sizes = ["x".join(map(str, one.size)) for one in (mask_picture, picture)]
        raise InputError(
            f"{key}mask {printable(mask)} is {sizes[0]} pixels and {key}image {sizes[1]}: they must be the same."
        )
    canvas = Canvas(data, mask_data, *picture.size)
    if not (drawn := canvas.cut(*picture.size)[1]) or not drawn.getbbox():
        raise InputError(f"{key}mask {printable(mask)} is black: paint white what shall be drawn.")
    return canvas


def drawn_over(
    request: Request,
    canvas: Canvas,
    multiple: int,
    *,
    strength: float = 1.0,
    upscale: int = 1,
    image_guidance: float | None = None,
    key: str = "--",
) -> Request:
    """`request` with what it is drawn over, at the size asked for, else at its own as far as that can be drawn."""
    width = (request.width or canvas.width // multiple * multiple) * upscale
    height = (request.height or canvas.height // multiple * multiple) * upscale
    if not width or not height:
        wanted = "a --size" if key == "--" else f"{key}width and {key}height"
        raise InputError(
            f"{key}image is {canvas.width}x{canvas.height} pixels: give {wanted}, in multiples of {multiple}."
        )
    image, mask = canvas.cut(width, height)
    over = replace(request, width=width, height=height, image=image, mask=mask, strength=strength)
    return replace(over, image_guidance=image_guidance)


def requests_over(settings: SampleSettings, multiple: int) -> list[Request]:
    """What `settings` ask for, over their picture if they name one. Raises InputError as `read_canvas`."""
    if settings.image is None:
        return requests(settings)
    mask = None if settings.mask is None else Path(settings.mask)
    canvas = read_canvas(Path(settings.image), mask, key="sample.")
    kept = settings.image_guidance
    return [drawn_over(r, canvas, multiple, image_guidance=kept, key="sample.") for r in requests(settings)]


def _read(path: Path, option: str) -> tuple[bytes, Image.Image]:
    try:
        data = path.read_bytes()
        return data, decode(io.BytesIO(data))
    except OSError as error:
        raise InputError(f"{option} {printable(path)} cannot be read: {error.strerror}.") from None
    except BadImageError as error:
        raise InputError(f"{option} {printable(path)}: {error}.") from None


def _picture(values: Tensor) -> Image.Image:
    return Image.fromarray(values.round().to(torch.uint8).numpy())
