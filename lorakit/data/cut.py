"""How a picture becomes what is encoded: which part of it, mirrored or not, in which colours. Numbers only, no pixels.

Here: a source's settings for its pictures, a sample's cut, and where in the picture its crop lies. Next: `images.py`
carries a cut out.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, field_validator, model_validator

from lorakit.core.seeding import generator
from lorakit.core.settings import Settings
from lorakit.data.buckets import Bucket, upscale


class PictureSettings(Settings):
    """How a source's pictures are cut, augmented and masked."""

    crop: Literal["center", "random", "focus"] = "center"
    """Which part of a picture is kept where it is longer than its bucket: the middle; anywhere, drawn for each sample
    (then nothing can be cached); or as near as possible to its focus: the middle of its mask or of a box given with
    it, else the picture's middle."""

    flip: float = Field(default=0.0, ge=0.0, le=1.0)
    """Chance that a sample is mirrored; both ways are cached."""

    color_jitter: float = Field(default=0.0, ge=0.0, le=1.0)
    """How far colours vary: brightness, contrast and saturation by factors in 1 ± it, hue by ± half of it, in turns."""

    jitter_variants: int = Field(default=4, ge=2, le=64)
    """How many variants of a picture's colours there are under `color_jitter`, the picture as it is among them."""

    background: str = "#ffffff"
    """The colour, as #rrggbb, that transparent pictures are laid on."""

    mask: Literal["auto", "alpha", "none"] = "auto"
    """What of a picture counts in the loss: what its mask picture says, where it has one; what is not transparent; or
    all of it."""

    mask_means: Literal["loss", "repaint"] = "loss"
    """What a mask picture says: what counts in the loss; or, to an inpainting model, what is to be painted anew (white)
    and what is shown to it. Where nothing says the latter, it is drawn at random for each sample."""

    mask_floor: float = Field(default=0.0, ge=0.0, le=1.0)
    """What counts least: a mask's values below it are raised to it."""

    @model_validator(mode="after")
    def _all_has_effect_on_pictures(self) -> Self:
        if not self.color_jitter and self.jitter_variants != type(self).model_fields["jitter_variants"].default:
            raise ValueError("jitter_variants has no effect without color_jitter: remove it.")
        if self.mask == "alpha" and self.background != type(self).model_fields["background"].default:
            raise ValueError('background has no effect with mask = "alpha": remove one of them.')
        if self.mask == "none" and self.mask_floor:
            raise ValueError('mask_floor has no effect with mask = "none": remove one of them.')
        if self.mask_means == "repaint" and self.mask != "auto":
            raise ValueError(f'mask_means = "repaint" is of mask pictures, not of mask = "{self.mask}": remove one.')
        if self.mask_means == "repaint" and self.mask_floor:
            raise ValueError('mask_floor has no effect with mask_means = "repaint": remove one of them.')
        return self

    @field_validator("background")
    @classmethod
    def _is_colour(cls, value: str) -> str:
        if not re.fullmatch("#[0-9a-fA-F]{6}", value):
            raise ValueError(f'"{value}" is no colour: write it as #rrggbb, e.g. #ffffff for white')
        return value.lower()


class Cut(NamedTuple):
    """How a picture becomes what is encoded.

    `anchor` says where the crop lies in what sticks out: 0 is left or top, 1 right or bottom; the crop's offset is
    floor(slack · anchor). `flip` mirrors after the crop. `jitter` is the factors of brightness, contrast and saturation
    and the shift of hue in turns; () leaves colours alone. What is transparent lies on `background`.
    """

    bucket: Bucket
    anchor: tuple[float, float] = (0.5, 0.5)
    flip: bool = False
    jitter: tuple[float, float, float, float] | tuple[()] = ()
    background: str = "#ffffff"


@dataclass(frozen=True)
class CropInfo:
    """`original` (width, height) of the upright picture; `left` and `top` of the crop in pixels of the resized one.

    Of a flipped cut they are those in the mirrored picture.
    """

    original: tuple[int, int]
    left: int
    top: int


def covering(size: tuple[int, int], bucket: Bucket) -> tuple[int, int]:
    """(width, height) of a picture of `size` resized until it just covers `bucket`."""
    scale = upscale(size, bucket)
    return max(bucket.width, round(size[0] * scale)), max(bucket.height, round(size[1] * scale))


def offset(size: tuple[int, int], cut: Cut) -> tuple[int, int]:
    """(left, top) of the crop in the resized picture, before it is mirrored."""
    slack = _slack(size, cut.bucket)
    return math.floor(slack[0] * cut.anchor[0]), math.floor(slack[1] * cut.anchor[1])


def crop_info(size: tuple[int, int], cut: Cut) -> CropInfo:
    """What there is to say of the crop that `cut` makes of an upright picture of `size` (width, height)."""
    left, top = offset(size, cut)
    return CropInfo(size, _slack(size, cut.bucket)[0] - left if cut.flip else left, top)


def plain_cut(
    settings: PictureSettings, bucket: Bucket, *, size: tuple[int, int], focus: tuple[float, float] | None
) -> Cut:
    """The cut without chance: not mirrored, colours as they are; where crops are drawn, the one in the middle."""
    anchor = _focused(size, bucket, focus) if settings.crop == "focus" and focus is not None else (0.5, 0.5)
    return Cut(bucket, anchor, background=settings.background)


def cuts(
    settings: PictureSettings,
    bucket: Bucket,
    *,
    digest: str,
    size: tuple[int, int],
    focus: tuple[float, float] | None,
) -> tuple[Cut, ...]:
    """Every cut that may come of a picture at `bucket`, the plain one first; not for crops that are drawn.

    `digest` is the picture's, `size` its upright (width, height), `focus` a point (x, y) in 0 … 1 of it.
    """
    assert settings.crop != "random", "random crops are no finite set"
    plain = plain_cut(settings, bucket, size=size, focus=focus)
    flips = [flip for flip, possible in ((False, settings.flip < 1), (True, settings.flip > 0)) if possible]
    variants = range(settings.jitter_variants if settings.color_jitter else 1)
    return tuple(
        plain._replace(flip=flip, jitter=_jitter(settings, digest, variant)) for flip in flips for variant in variants
    )


def draw_cut(
    settings: PictureSettings,
    bucket: Bucket,
    *,
    digest: str,
    size: tuple[int, int],
    focus: tuple[float, float] | None,
    draw: torch.Generator,
) -> Cut:
    """One sample's cut; one of `cuts(…)` unless crops are drawn.

    Takes four numbers from `draw`, whatever the settings: for the flip, the variant of colours, and the crop's x and y.
    So a setting that is switched on or off leaves what the others draw as it was.
    """
    flip, variant, x, y = torch.rand(4, generator=draw, dtype=torch.float64).tolist()
    plain = plain_cut(settings, bucket, size=size, focus=focus)
    if settings.crop == "random":
        slack = _slack(size, bucket)
        left, top = (math.floor(part * (free + 1)) for part, free in zip((x, y), slack))
        plain = plain._replace(anchor=(_anchor(left, slack[0]), _anchor(top, slack[1])))
    jitter = _jitter(settings, digest, math.floor(variant * settings.jitter_variants)) if settings.color_jitter else ()
    return plain._replace(flip=flip < settings.flip, jitter=jitter)


def _slack(size: tuple[int, int], bucket: Bucket) -> tuple[int, int]:
    width, height = covering(size, bucket)
    return width - bucket.width, height - bucket.height


def _anchor(start: int, slack: int) -> float:
    """An anchor that gives the offset `start` of 0 … `slack`; half a pixel away from where rounding could matter."""
    if slack == 0:
        return 0.5
    return 1.0 if start == slack else (start + 0.5) / slack


def _focused(size: tuple[int, int], bucket: Bucket, focus: tuple[float, float]) -> tuple[float, float]:
    whole, slack = covering(size, bucket), _slack(size, bucket)
    starts = [min(max(round(focus[i] * whole[i] - bucket[i] / 2), 0), slack[i]) for i in (0, 1)]
    return _anchor(starts[0], slack[0]), _anchor(starts[1], slack[1])


def _jitter(settings: PictureSettings, digest: str, variant: int) -> tuple[float, float, float, float] | tuple[()]:
    """A variant's factors; they depend on no run's seed, so that runs share what they cached."""
    if not settings.color_jitter or variant == 0:
        return ()
    signed = (2 * torch.rand(4, generator=generator("jitter", digest, variant), dtype=torch.float64) - 1).tolist()
    brightness, contrast, saturation, hue = (settings.color_jitter * part for part in signed)
    return 1 + brightness, 1 + contrast, 1 + saturation, hue / 2
