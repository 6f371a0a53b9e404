"""A picture file as upright RGB pixels, cut to a bucket.

Here: what one file holds. Not here: which files there are (`sources.py`) and which bucket is theirs (`buckets.py`).

JPEG's draft mode (decoding at half size or less) is not used: it changes pixels, if little.
"""

import contextlib
import io
import warnings
from dataclasses import dataclass
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageCms
from torch import Tensor

from lorakit.data.buckets import Bucket, upscale
from lorakit.data.cut import CropInfo as CropInfo
from lorakit.data.cut import Cut as Cut
from lorakit.data.cut import PictureSettings as PictureSettings
from lorakit.data.cut import crop_info as crop_info
from lorakit.data.cut import cuts as cuts
from lorakit.data.cut import draw_cut as draw_cut
from lorakit.data.cut import plain_cut as plain_cut

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
MAX_PIXELS = 178_956_970
"""Pictures of more pixels are refused before they are decoded: Pillow's own limit, half a gigabyte of RGB."""

# Pillow warns from half the limit on; between the two pictures are large, not suspicious
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIXTEEN_BIT = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_MODES = frozenset({"1", "L", "P", "RGB", "RGBA", "RGBX", "LA", "La", "PA", "RGBa", "CMYK", "YCbCr", *_SIXTEEN_BIT})


class BadImageError(Exception):
    """A file that cannot be used as a picture; the text says why and what to do."""


@dataclass(frozen=True)
class Prepared:
    """`pixels` (3, H, W) in -1 … 1; `mask` (1, H, W) in 0 … 1 says what of them counts."""

    pixels: Tensor
    info: CropInfo
    mask: Tensor | None = None


def suffixes() -> frozenset[str]:
    """The suffixes, with their dots and in lower case, of pictures that can be read here and now."""
    return SUFFIXES


def prepare_picture(data: bytes, cut: Cut, *, mask: bytes | None = None, alpha_mask: bool = False) -> Prepared:
    """The picture in `data` as `cut` says, with its mask."""
    raise NotImplementedError


def pool_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """`mask` (1, H, W) averaged over the area of each of (1, h, w) cells."""
    raise NotImplementedError


def decode(file: IO[bytes]) -> Image.Image:
    """The first picture in `file`, decoded to its end and turned upright, in its own mode.

    Raises BadImageError for what is no picture of FORMATS, has more than MAX_PIXELS, is damaged, or is of a mode that
    has no plain meaning as colours.
    """
    try:
        image = Image.open(file, formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        image.load()
        turn = _UPRIGHT.get(_orientation(image))
        upright = image if turn is None else image.transpose(turn)
    except Image.DecompressionBombError:
        raise BadImageError(f"it has more than {MAX_PIXELS // 10**6} million pixels: make it smaller") from None
    except Image.UnidentifiedImageError:
        raise BadImageError(f"it is no picture of a known format ({', '.join(FORMATS)}): save it as one") from None
    except MemoryError:
        raise BadImageError("there is not enough memory to decode it: make it smaller") from None
    except Exception as error:  # decoders raise whatever their format's damage leads to, struct.error to SyntaxError
        raise BadImageError(f"it is damaged ({_first_line(error)}): save or copy it again") from None
    if upright.mode not in _MODES:
        raise BadImageError(f"its pixels are of mode {upright.mode}: save it as 8-bit RGB")
    return upright


def upright_rgb(file: IO[bytes]) -> Image.Image:
    """The picture in `file` as upright sRGB: 8 bits a channel, what is transparent on white; BadImageError as `decode`.

    A colour profile that cannot be read is left out of account, as browsers do.
    """
    image = decode(file)
    profile = image.info.get("icc_profile")
    alpha = None
    if image.mode in ("La", "RGBa"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = _eight_bit(image).convert("RGBA")
        alpha = image.getchannel("A")
    elif image.mode in _SIXTEEN_BIT:
        image = _eight_bit(image)
    elif image.mode in ("P", "1"):
        image = image.convert("RGB")
    rgb = _to_srgb(image, profile)
    if alpha is None:
        return rgb
    white = Image.new("RGB", rgb.size, (255, 255, 255))
    white.paste(rgb, mask=alpha)
    return white


def crop_to(image: Image.Image, bucket: Bucket) -> tuple[Image.Image, CropInfo]:
    """`image` resized (Lanczos) until it just covers `bucket`, and what sticks out cut off evenly at both sides."""
    scale = upscale(image.size, bucket)
    width, height = max(bucket.width, round(image.width * scale)), max(bucket.height, round(image.height * scale))
    left, top = (width - bucket.width) // 2, (height - bucket.height) // 2
    info = CropInfo(image.size, left, top)
    if image.size == bucket:
        return image, info
    # resizing only what remains gives the pixels of resizing all and cropping, cheaper
    x, y = image.width / width, image.height / height
    box = (left * x, top * y, min(image.width, (left + bucket.width) * x), min(image.height, (top + bucket.height) * y))
    return image.resize(bucket, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0), info


def pixels(image: Image.Image) -> Tensor:
    """An RGB image as float32 (3, H, W) in -1 … 1."""
    array = np.asarray(image, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def _orientation(image: Image.Image) -> int:
    with contextlib.suppress(Exception):  # broken EXIF says nothing: the pixels are still good
        return int(image.getexif().get(_ORIENTATION, 1))
    return 1


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode not in _SIXTEEN_BIT:
        return image
    values = np.asarray(image).astype(np.float64).clip(0, 65535) / 257
    return Image.fromarray(values.round().astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if profile:
        with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            space = source.profile.xcolor_space.strip()
            of_mode = {"RGB": "RGB", "RGBA": "RGB", "L": "GRAY", "CMYK": "CMYK"}.get(image.mode)
            if "srgb" not in (source.profile.profile_description or "").lower() and space == of_mode:
                opaque = image.convert("RGB") if image.mode == "RGBA" else image
                converted = ImageCms.profileToProfile(opaque, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
                if converted is not None:
                    return converted
    # RGBA to RGB drops the alpha; compositing comes after
    return image.convert("RGB")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
