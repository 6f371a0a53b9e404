"""A picture file as upright RGB pixels, cut to a bucket, with its mask.

Here: what one file holds, from bytes to tensors. Not here: which files there are (`sources/`), which formats
(`formats.py`), what pixels mean (`colour.py`), and which part of a picture is taken (`cut.py`).
"""

import contextlib
import io
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lorakit.data import masks
from lorakit.data.colour import MODES, continuous, has_alpha, jittered, on_background, to_srgb
from lorakit.data.cut import CropInfo as CropInfo
from lorakit.data.cut import Cut as Cut
from lorakit.data.cut import PictureSettings as PictureSettings
from lorakit.data.cut import covering, crop_info, offset
from lorakit.data.cut import cuts as cuts
from lorakit.data.cut import draw_cut as draw_cut
from lorakit.data.cut import plain_cut as plain_cut
from lorakit.data.formats import formats, jxl_size
from lorakit.data.formats import plugin_for as plugin_for
from lorakit.data.formats import suffixes as suffixes
from lorakit.data.masks import pool_mask as pool_mask
from lorakit.data.resize import resized_part

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
# orientations that exchange width and height, and those that turn the stored right or lower edge to the left or top
_LYING, _FROM_RIGHT, _FROM_BELOW = {5, 6, 7, 8}, {2, 3, 6, 7}, {3, 4, 7, 8}

# a JPEG is decoded at a half, a quarter or an eighth of its size if that is still so many times what is wanted; fewer
# cost quality (twice: 54 dB, docs/performance.md)
_DRAFT_MARGIN = 16

Size = tuple[int, int]


class BadImageError(Exception):
    """A file that cannot be used as a picture; the text says why and what to do."""


@dataclass(frozen=True)
class Prepared:
    """`pixels` (3, H, W) in -1 … 1; `mask` (1, H, W) in 0 … 1 says what of them counts, None: all; `input` are those of
    the picture that an editing model begins with."""

    pixels: Tensor
    info: CropInfo
    mask: Tensor | None = None
    input: Tensor | None = None


@dataclass(frozen=True)
class Decoded:
    """An upright picture, perhaps decoded at a part of its `size` (width, height).

    `box` (left, top, right, bottom) is where in `image` the picture lies: at an eighth of 1001 pixels, 125.125 of 126.
    """

    image: Image.Image
    size: Size
    box: tuple[float, float, float, float]

    def part(self, left: float, top: float, right: float, bottom: float) -> tuple[float, float, float, float]:
        """Where in `image` a part lies that is given in fractions of the picture."""
        x, y, width, height = *self.box[:2], self.box[2] - self.box[0], self.box[3] - self.box[1]
        return x + left * width, y + top * height, x + right * width, y + bottom * height


def decode(file: IO[bytes]) -> Image.Image:
    """The first picture in `file`, decoded to its end and turned upright, in its own mode.

    Raises BadImageError for what is no picture of a format that is read here, has more than MAX_PIXELS, is damaged, or
    is of a mode that has no plain meaning as colours.
    """
    return decode_for(file, lambda size: None).image


def decode_for(file: IO[bytes], wanted: Callable[[Size], Size | None]) -> Decoded:
    """As `decode`, but a JPEG may be decoded smaller: at least at the upright (width, height) that `wanted` names.

    `wanted` is asked with the picture's size; None wants all of it. Entropy decoding reads a file to its end all the
    same, so that damage is found.
    """
    with _complaints():
        if math.prod(jxl_size(file) or (0,)) > MAX_PIXELS:
            raise Image.DecompressionBombError
        image = Image.open(file, formats=tuple(formats()))
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        stored = width, height = image.size
        true: tuple[float, float] = stored
        if image.format in ("JPEG", "MPO"):  # other formats may hold their orientation behind the pixels
            lying = _orientation(image) in _LYING
            least = wanted((height, width) if lying else stored)
            drafted = None if least is None else image.draft(None, least[::-1] if lying else least)
            if drafted is not None:
                true = drafted[1][2:]
        image.load()
        if image.format not in ("JPEG", "MPO"):
            stored = true = image.size
        orientation = _orientation(image)
        turn = _UPRIGHT.get(orientation)
        upright = image if turn is None else image.transpose(turn)
    if upright.mode not in MODES:
        raise BadImageError(f"its pixels are of mode {upright.mode}: save it as 8-bit RGB")
    if orientation in _LYING:
        stored, true = stored[::-1], true[::-1]
    left = upright.width - true[0] if orientation in _FROM_RIGHT else 0.0
    top = upright.height - true[1] if orientation in _FROM_BELOW else 0.0
    return Decoded(upright, stored, (left, top, left + true[0], top + true[1]))


def prepare_picture(data: bytes, cut: Cut, *, mask: bytes | None = None, alpha_mask: bool = False) -> Prepared:
    """The picture in `data` as `cut` says, with its mask: that in `mask`, else with `alpha_mask` its own alpha channel.

    With `alpha_mask` colours are those that the file holds under its alpha, laid on nothing. Pictures are resized by
    Lanczos's filter until they cover the bucket, masks by a triangle; a mask of another size than the picture is
    stretched to it. A colour profile that cannot be read is left out of account, as browsers do. Raises BadImageError
    as `decode`, of the picture or the mask.
    """

    def wanted(size: Size) -> Size:
        width, height = covering(size, cut.bucket)
        return width * _DRAFT_MARGIN, height * _DRAFT_MARGIN

    decoded = decode_for(io.BytesIO(data), wanted)
    image, profile, alpha = decoded.image, _profile(decoded.image), None
    if has_alpha(image) and alpha_mask:
        image = continuous(image)
        alpha = image.getchannel("A")
        # by themselves: resizing both together would forget colours where alpha is 0
        image = image.convert("RGB")
    elif has_alpha(image):
        plain = continuous(image)
        image, profile = on_background(to_srgb(plain, profile), plain.getchannel("A"), cut.background), None
    part = _part(decoded.size, cut)
    # profiles come after resizing, which is in coded values either way: of ten times fewer pixels
    rgb = to_srgb(_resized(continuous(image), decoded, cut), profile)
    if cut.jitter:
        rgb = jittered(rgb, cut.jitter)
    cut_mask = None
    if mask is not None:
        cut_mask = _cut_mask(mask, cut, part)
    elif alpha is not None:
        cut_mask = alpha.resize(cut.bucket, Image.Resampling.BILINEAR, box=decoded.part(*part))
    if cut.flip:
        rgb = ImageOps.mirror(rgb)
        cut_mask = None if cut_mask is None else ImageOps.mirror(cut_mask)
    return Prepared(pixels(rgb), crop_info(decoded.size, cut), None if cut_mask is None else masks.values(cut_mask))


def pixels(image: Image.Image) -> Tensor:
    """An RGB image as float32 (3, H, W) in -1 … 1."""
    array = np.asarray(image, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


@contextlib.contextmanager
def _complaints() -> Iterator[None]:
    """Turns whatever decoders raise into BadImageError."""
    try:
        yield
    except Image.DecompressionBombError:
        raise BadImageError(f"it has more than {MAX_PIXELS // 10**6} million pixels: make it smaller") from None
    except Image.UnidentifiedImageError:
        raise BadImageError(f"it is no picture of a known format ({', '.join(formats())}): save it as one") from None
    except MemoryError:
        raise BadImageError("there is not enough memory to decode it: make it smaller") from None
    except Exception as error:  # whatever their format's damage leads to, struct.error to SyntaxError
        raise BadImageError(f"it is damaged ({_first_line(error)}): save or copy it again") from None


def _part(size: Size, cut: Cut) -> tuple[float, float, float, float]:
    """Where the crop lies, in fractions of the picture: resizing only what remains is cheaper than cropping after."""
    (width, height), (left, top) = covering(size, cut.bucket), offset(size, cut)
    return left / width, top / height, (left + cut.bucket.width) / width, (top + cut.bucket.height) / height


def _resized(image: Image.Image, decoded: Decoded, cut: Cut) -> Image.Image:
    """What `cut` keeps of `image`, which is `decoded`'s in other colours."""
    if image.mode == "RGB" and image.size == decoded.size:
        return resized_part(image, covering(decoded.size, cut.bucket), offset(decoded.size, cut), cut.bucket)
    box = _within(image, decoded.part(*_part(decoded.size, cut)))
    return image.resize(cut.bucket, Image.Resampling.LANCZOS, box=box)


def _within(image: Image.Image, box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    """`box` without what rounding put outside of `image`."""
    return max(0.0, box[0]), max(0.0, box[1]), min(image.width, box[2]), min(image.height, box[3])


def _cut_mask(data: bytes, cut: Cut, part: tuple[float, float, float, float]) -> Image.Image:
    try:
        image = masks.grey(decode(io.BytesIO(data)))
    except BadImageError as error:
        raise BadImageError(f"its mask: {error}") from None
    left, top, right, bottom = part
    box = left * image.width, top * image.height, right * image.width, bottom * image.height
    return image.resize(cut.bucket, Image.Resampling.BILINEAR, box=_within(image, box))


def _profile(image: Image.Image) -> bytes | None:
    return image.info.get("icc_profile")


def _orientation(image: Image.Image) -> int:
    with contextlib.suppress(Exception):  # broken EXIF says nothing: the pixels are still good
        return int(image.getexif().get(_ORIENTATION, 1))
    return 1


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
