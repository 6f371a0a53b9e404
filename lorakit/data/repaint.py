"""What an inpainting model is to paint anew in a training picture, where nobody says: masks drawn at random.

By the law that Stable Diffusion's own inpainting models were trained with: boxes or strokes of a brush as LaMa draws
them (Suvorov et al. 2022, arXiv:2109.07161; the numbers are those of its training on 256 pixels), and of a quarter of
the pictures all.
"""

import math

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from lorakit.data.masks import values

WHOLE = 0.25
"""The share of samples of which all is painted anew."""

_SIDE = 256  # the pixels that the following are of
_BOXES, _BOX, _MARGIN = 3, (30, 150), 10
_STROKES, _TURNS, _ANGLE, _LENGTH, _BRUSH = 5, 5, 4.0, (10, 210), (5, 105)


def draw_mask(width: int, height: int, draw: torch.Generator) -> Tensor:
    """A mask (1, height, width), 1 where the picture is to be painted anew and else 0."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=draw, dtype=torch.float64))

    def up_to(most: int) -> int:
        return int(torch.randint(1, most + 1, (), generator=draw))

    if uniform(0, 1) < WHOLE:
        return torch.ones(1, height, width)
    mask = Image.new("L", (width, height))
    pen, unit = ImageDraw.Draw(mask), math.sqrt(width * height) / _SIDE
    if uniform(0, 1) < 0.5:
        for _ in range(up_to(_BOXES)):
            corner = []
            for side in (width, height):
                least, longest = _MARGIN * unit, max(side - 2 * _MARGIN * unit, 1.0)
                length = min(uniform(*_BOX) * unit, longest)
                start = least + uniform(0, longest - length)
                corner.append((start, start + length))
            (left, right), (top, bottom) = corner
            pen.rectangle((left, top, right, bottom), fill=255)
    else:
        for _ in range(up_to(_STROKES)):
            x, y = uniform(0, width), uniform(0, height)
            for turn in range(up_to(_TURNS)):
                angle = uniform(0, _ANGLE)
                angle = -angle if turn % 2 else angle
                length, brush = uniform(*_LENGTH) * unit, max(1, round(uniform(*_BRUSH) * unit))
                to_x = min(max(x + length * math.sin(angle), 0), width)
                to_y = min(max(y + length * math.cos(angle), 0), height)
                pen.line((x, y, to_x, to_y), fill=255, width=brush)
                x, y = to_x, to_y
    return values(mask)
