"""How often each tag or word comes in captions, and the same as a picture of bars."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw, ImageFont

from lorakit.core.files import printable
from lorakit.data.weights import split_tags

SHOWN = 40
"""So many bars a picture has at most."""

_WIDTH, _ROW, _NAME, _MARGIN = 900, 24, 300, 24
_GROUND, _TEXT, _QUIET, _BAR = (24, 26, 31), (236, 237, 240), (154, 161, 173), (255, 184, 28)


def tags(captions: Iterable[str]) -> Counter[str]:
    """In how many captions each tag comes."""
    return Counter(tag for caption in captions for tag in set(split_tags(caption.replace("|||", ","))))


def words(captions: Iterable[str]) -> Counter[str]:
    """In how many captions each word comes, upper and lower case alike."""
    return Counter(word for caption in captions for word in set(re.findall(r"\w[\w'-]*", caption.lower())))


def bars(counts: Sequence[tuple[str, int]], *, title: str, total: int) -> Image.Image:
    """The first of `counts` as bars, of `total` captions; the same for the same counts."""
    shown = counts[:SHOWN]
    image = Image.new("RGB", (_WIDTH, 2 * _MARGIN + 48 + _ROW * len(shown)), _GROUND)
    draw = ImageDraw.Draw(image)
    more = f", {len(counts) - SHOWN:,} more are not shown" if len(counts) > SHOWN else ""
    draw.text((_MARGIN, _MARGIN - 6), _fitted(title, _WIDTH - 2 * _MARGIN, 20), _TEXT, _font(20))
    draw.text((_MARGIN, _MARGIN + 20), f"in how many of {total:,} captions{more}", _QUIET, _font(13))
    left, widest = _MARGIN + _NAME + 12, _WIDTH - 2 * _MARGIN - _NAME - 12 - 64
    most = max((count for _, count in shown), default=1)
    for row, (name, count) in enumerate(shown):
        y = _MARGIN + 48 + row * _ROW
        text = _fitted(name, _NAME, 14)
        draw.text((left - 12 - _font(14).getlength(text), y + 3), text, _TEXT, _font(14))
        end = left + max(2, round(widest * count / most))
        draw.rounded_rectangle((left, y + 4, end, y + _ROW - 4), 3, fill=_BAR)
        draw.text((end + 8, y + 4), f"{count:,}", _QUIET, _font(13))
    return image


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font


def _fitted(text: str, width: int, size: int) -> str:
    text = printable(text)[:200]
    while _font(size).getlength(text) > width:
        text = f"{text.rstrip('…')[:-1]}…"
    return text
