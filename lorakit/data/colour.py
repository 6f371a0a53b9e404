"""Pixels of any mode as 8-bit sRGB, transparency apart; and colours varied for training.

Here: what a pixel means. Not here: files and shapes (`images.py`).
"""

import contextlib
import io

import numpy as np
from PIL import Image, ImageCms, ImageEnhance

_SIXTEEN_BIT = ("I", "I;16", "I;16B", "I;16L", "I;16N")
MODES = frozenset({"1", "L", "P", "RGB", "RGBA", "RGBX", "LA", "La", "PA", "RGBa", "CMYK", "YCbCr", *_SIXTEEN_BIT})
"""Pillow's modes that have a plain meaning as colours."""


def has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


def continuous(image: Image.Image) -> Image.Image:
    """`image` in a mode of 8 bits a channel that can be resized: L, RGB, RGBA or CMYK; colours are not converted."""
    if image.mode in ("La", "RGBa"):
        return image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
    if has_alpha(image):
        return eight_bit(image).convert("RGBA")
    if image.mode in _SIXTEEN_BIT:
        return eight_bit(image)
    return image.convert("RGB") if image.mode in ("P", "1", "YCbCr", "RGBX") else image


def eight_bit(image: Image.Image) -> Image.Image:
    """`image`, its values scaled from 16 bits if there are so many."""
    if image.mode not in _SIXTEEN_BIT:
        return image
    values = np.asarray(image).astype(np.float64).clip(0, 65535) / 257
    return Image.fromarray(values.round().astype(np.uint8))


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """`image`, of mode L, RGB, RGBA or CMYK, as RGB by its colour profile, alpha left out.

    A profile that cannot be read is left out of account, as browsers do.
    """
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


def on_background(rgb: Image.Image, alpha: Image.Image, background: str) -> Image.Image:
    """`rgb` laid on a ground of one colour, #rrggbb."""
    ground = Image.new("RGB", rgb.size, background)
    ground.paste(rgb, mask=alpha)
    return ground


def jittered(rgb: Image.Image, factors: tuple[float, float, float, float]) -> Image.Image:
    """`rgb` with its brightness, contrast and saturation times a factor each, and its hue turned by part of a turn."""
    brightness, contrast, saturation, hue = factors
    image = ImageEnhance.Brightness(rgb).enhance(brightness)
    image = ImageEnhance.Contrast(image).enhance(contrast)
    image = ImageEnhance.Color(image).enhance(saturation)
    if (steps := round(hue * 256) % 256) == 0:
        return image
    hsv = np.array(image.convert("HSV"))
    hsv[..., 0] += np.uint8(steps)  # wraps around, as hues do
    return Image.fromarray(hsv, "HSV").convert("RGB")
