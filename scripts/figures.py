"""Drawing for the documentation: rows of small pictures with labels, tensors as pictures, curves. Pillow alone.

What is shown is decided by whoever calls; `scripts/latent_diffusion.py` does.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SIDE, GAP = 112, 8
INK, QUIET, RULE = (32, 34, 40), (110, 114, 124), (224, 226, 230)
LINES = ((38, 84, 214), (214, 82, 30), (30, 140, 90), (150, 60, 180), (120, 120, 120), (200, 150, 0))


class Row(NamedTuple):
    """What stands at its left, and its pictures, each with the label below it; None leaves a place empty."""

    name: str
    tiles: list[tuple[Image.Image | None, str]]


def sheet(rows: Sequence[Row], *, side: int = SIDE) -> Image.Image:
    """The rows below each other, pictures enlarged to `side` pixels by whole pixels where they are small."""
    widest = max((_font(13).getlength(line) for row in rows for line in row.name.split("\n")), default=0)
    left = math.ceil(widest) + 2 * GAP if widest else GAP
    heights = [side + GAP + 15 * max(label.count("\n") + 1 if label else 0 for _, label in row.tiles) for row in rows]
    columns = max(len(row.tiles) for row in rows)
    result = Image.new("RGB", (left + columns * (side + GAP), sum(heights) + GAP * (len(rows) + 1)), "white")
    pen, y = ImageDraw.Draw(result), GAP
    for row, height in zip(rows, heights):
        pen.multiline_text((GAP, y + side / 2), row.name, INK, _font(13), anchor="lm", spacing=3)
        for column, (picture, label) in enumerate(row.tiles):
            x = left + column * (side + GAP)
            if picture is not None:
                result.paste(_enlarged(picture, side), (x, y))
            pen.multiline_text(
                (x + side / 2, y + side + 4), label, INK, _font(12), anchor="ma", align="center", spacing=2
            )
        y += height + GAP
    return result


def _enlarged(picture: Image.Image, side: int) -> Image.Image:
    whole = max(1, side // picture.width)  # so that each pixel is as wide as the next
    large = picture.convert("RGB").resize((picture.width * whole, picture.height * whole), Image.Resampling.NEAREST)
    return large if large.width == side else large.resize((side, side), Image.Resampling.BICUBIC)


def centred(picture: Image.Image, side: int) -> Image.Image:
    """`picture` in the middle of a white square."""
    result = Image.new("RGB", (side, side), "white")
    result.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return result


# -- tensors ------------------------------------------------------------------------------------------------------


def rgb(pixels: Tensor) -> Image.Image:
    """Pixels (3, H, W) in -1 … 1; what lies beyond is cut."""
    return Image.fromarray((pixels.permute(1, 2, 0) + 1).mul(127.5).round().clamp(0, 255).byte().numpy())


def grey(values: Tensor, *, low: float, high: float) -> Image.Image:
    """Values (H, W) from black at `low` to white at `high`."""
    return Image.fromarray(((values - low) / (high - low) * 255).round().clamp(0, 255).byte().numpy())


def false_colour(latents: Tensor, *, reach: float = 3.0) -> Image.Image:
    """The first three channels of latents (C, h, w) as red, green and blue, each from -reach to reach."""
    return rgb(latents[:3] / reach)


def signed(values: Tensor, *, reach: float) -> Image.Image:
    """Values (H, W): white at 0, blue down to -reach, red up to reach."""
    share = (values / reach).clamp(-1, 1)
    cold, warm = share.clamp(max=0), share.clamp(min=0)
    return rgb(torch.stack([1 + 2 * cold, 1 - 2 * share.abs(), 1 - 2 * warm]))


def heat(picture: Image.Image, share: Tensor) -> Image.Image:
    """`picture` lit where `share` (h, w) in 0 … 1 is high, and dark elsewhere."""
    light = grey(share, low=0, high=1).resize(picture.size, Image.Resampling.BILINEAR)
    dark = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size), 0.8)
    return Image.composite(picture, dark, light)


# -- curves -------------------------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """A line through points, those beyond the axes left out; curves of one `name` share a place in the legend."""

    name: str
    x: Tensor
    y: Tensor
    thick: float = 1.8


@dataclass(frozen=True)
class Axes:
    """A panel's title and axes; `ticks` at which values lines are drawn, with `logarithmic` y where it is asked for."""

    title: str
    x: tuple[float, float]
    y: tuple[float, float]
    x_name: str = ""
    x_ticks: Sequence[float] = ()
    y_ticks: Sequence[float] = ()
    logarithmic: bool = False


def panel(axes: Axes, curves: Sequence[Curve], *, width: int = 430, height: int = 300) -> Image.Image:
    """The curves in their axes with a legend; lines are drawn large and reduced, so that they are smooth."""
    names = list(dict.fromkeys(curve.name for curve in curves))
    left, top, right, bottom = 50, 34, width - 14, height - 44 - 17 * math.ceil(len(names) / 2)
    up: Callable[[float], float] = math.log10 if axes.logarithmic else float
    low, high = (up(value) for value in axes.y)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - axes.x[0]) / (axes.x[1] - axes.x[0])
        return left + (right - left) * across, bottom - (bottom - top) * (up(y) - low) / (high - low)

    scale = 4
    large = Image.new("RGB", (width * scale, height * scale), "white")
    pen = ImageDraw.Draw(large)

    def line(points: Sequence[tuple[float, float]], colour: tuple[int, int, int], thick: float) -> None:
        pen.line([(x * scale, y * scale) for x, y in points], colour, round(thick * scale), joint="curve")

    for tick in axes.y_ticks:
        line([(left, place(axes.x[0], tick)[1]), (right, place(axes.x[0], tick)[1])], RULE, 1)
    line([(left, top), (left, bottom), (right, bottom)], QUIET, 1)
    colours = {name: LINES[i % len(LINES)] for i, name in enumerate(names)}
    for curve in curves:
        points = zip(curve.x.tolist(), curve.y.tolist())
        line([place(x, y) for x, y in points if axes.y[0] <= y <= axes.y[1]], colours[curve.name], curve.thick)
    result = large.resize((width, height), Image.Resampling.BOX)
    pen = ImageDraw.Draw(result)
    pen.text((left - 42, 9), axes.title, INK, _font(14))
    for tick in axes.y_ticks:
        pen.text((left - 6, place(axes.x[0], tick)[1]), f"{tick:g}", QUIET, _font(12), anchor="rm")
    for tick in axes.x_ticks:
        pen.text((place(tick, axes.y[0])[0], bottom + 5), f"{tick:g}", QUIET, _font(12), anchor="ma")
    pen.text((right, bottom + 20), axes.x_name, QUIET, _font(12), anchor="ra")
    for i, name in enumerate(names):
        x, y = left + i % 2 * (right - left) / 2, bottom + 44 + 17 * (i // 2)
        pen.line([(x, y), (x + 18, y)], colours[name], 3)
        pen.text((x + 24, y), name, INK, _font(12), anchor="lm")
    return result


def beside(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures in a row."""
    result = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)), "white")
    x = 0
    for picture in pictures:
        result.paste(picture, (x, 0))
        x += picture.width
    return result


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font
