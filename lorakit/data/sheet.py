"""A contact sheet: originals with the part that is cut out of them, and beside each what the model will see.

Here: which pictures are shown, their panels, and the sheet that a picture file can hold. Next: `page.py` puts the same
panels into a page.
"""

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lorakit.core.files import printable
from lorakit.core.types import Example
from lorakit.data.buckets import Bucket
from lorakit.data.cut import Cut, covering, offset
from lorakit.data.report import Data

SHOWN = 40
"""How many pictures a sheet shows unless it is told otherwise."""

SIDE = 240
"""Pixels that a picture on the sheet is wide; a tall one is narrower."""

_COLUMNS, _GAP, _MARGIN, _PAD = 4, 22, 36, 12
_GROUND, _CARD, _TEXT, _QUIET = (24, 26, 31), (34, 37, 44), (236, 237, 240), (154, 161, 173)
_FRAME, _DARK = (255, 184, 28), (0, 0, 0)
_MASKED = (224, 36, 146)
_ROLES = {"regularization": (122, 92, 214), "validation": (34, 116, 190)}
_CAPTION_LINES = 3


class Shown(NamedTuple):
    """Example number `number` at one of its buckets."""

    number: int
    bucket: Bucket


@dataclass(frozen=True)
class Panels:
    """`original` upright, with the crop framed and what is cut off dimmed; `cut` as the model will see it.

    What its mask leaves out is tinted. One of few pixels is enlarged to the original's height.
    """

    original: Image.Image
    cut: Image.Image


@dataclass(frozen=True)
class Choice:
    """Pictures to show, by bucket from tall to wide; `counts` says how many pictures each bucket has in all."""

    shown: tuple[Shown, ...]
    counts: Mapping[Bucket, int]

    @property
    def caption(self) -> str:
        """How many of how many are shown."""
        pictures, buckets = sum(self.counts.values()), len(self.counts)
        of = "" if len(self.shown) == pictures else f" of {pictures:,}, chosen evenly over the buckets"
        return f"{_some(len(self.shown), 'picture')}{of} · {_some(buckets, 'bucket')}"


def choose(data: Data, count: int = SHOWN) -> Choice:
    """At most `count` pictures: as many of each bucket as of any other, evenly spread over it. The same every time."""
    members: dict[Bucket, array[int]] = {}
    for index in range(len(data.examples)):
        for bucket in data.buckets_of(index):
            members.setdefault(bucket, array("q")).append(index)
    buckets = sorted(members, key=lambda b: (b.width / b.height, b.width))
    sizes = [len(members[b]) for b in buckets]
    shown = []
    for bucket, size, share in zip(buckets, sizes, _shares(sizes, count)):
        shown += [Shown(members[bucket][(2 * i + 1) * size // (2 * share)], bucket) for i in range(share)]
    return Choice(tuple(shown), dict(zip(buckets, sizes)))


def _shares(sizes: Sequence[int], count: int) -> list[int]:
    """`count` dealt out in turns to groups of `sizes`, none getting more than it has; the largest are served first."""
    shares = [0] * len(sizes)
    turn = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    while count > 0 and turn:
        for i in turn[:count]:
            shares[i] += 1
        count -= len(turn)
        turn = [i for i in turn if shares[i] < sizes[i]]
    return shares


# -- a picture's two panels ---------------------------------------------------------------------------------------


def panels(data: Data, shown: Shown, *, side: int = SIDE) -> Panels:
    """A picture and its cut, each at most `side` pixels wide and a third more than that high.

    InputError where it cannot be read any more.
    """
    example = data.examples[shown.number]
    cut = cut_at(data, shown)
    # a "bucket" of the original's own shape: all of the picture, decoded no larger than needed, and nothing cut off
    whole = Cut(_within(example.size, side), background=cut.background)
    original = _image(data, shown.number, whole)[0]
    seen, mask = _image(data, shown.number, cut)
    if mask is not None:
        seen = Image.composite(seen, Image.blend(seen, Image.new("RGB", seen.size, _MASKED), 0.55), mask)
    if original.height > seen.height:  # a stamp beside it would show little
        enlarged = _within(seen.size, side, scale=original.height / seen.height)
        seen = seen.resize(enlarged, Image.Resampling.BICUBIC)
    else:
        seen = seen.resize(_within(seen.size, side), Image.Resampling.LANCZOS)
    return Panels(_framed(original, example.size, cut), seen)


def thumbnail(data: Data, index: int, *, side: int) -> Image.Image:
    """A small picture of the first cut of example `index`; cheap, for it is decoded no larger than needed."""
    cut = data.cuts_of(index)[0]
    return _image(data, index, cut._replace(bucket=_within(cut.bucket, side)))[0]


def cut_at(data: Data, shown: Shown) -> Cut:
    """The plain cut of a picture at its bucket."""
    cuts = data.cuts_of(shown.number)
    return next((cut for cut in cuts if cut.bucket == shown.bucket), cuts[0])


def frame(size: tuple[int, int], cut: Cut) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what `cut` leaves of an upright picture of `size`, as fractions of its sides."""
    width, height = covering(size, cut.bucket)
    left, top = offset(size, cut)
    return left / width, top / height, (left + cut.bucket.width) / width, (top + cut.bucket.height) / height


def _within(size: tuple[int, int], side: int, *, scale: float = 1.0) -> Bucket:
    """`size` times `scale`, or less if it would be over `side` wide or a third more than that high."""
    scale = min(scale, side / size[0], side * 4 / 3 / size[1])
    return Bucket(max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))


def _image(data: Data, index: int, cut: Cut) -> tuple[Image.Image, Image.Image | None]:
    prepared = data.picture(index, cut)
    pixels = (prepared.pixels.permute(1, 2, 0) + 1).mul(127.5).round().clamp(0, 255).byte().numpy()
    if prepared.mask is None:
        return Image.fromarray(pixels), None
    mask = prepared.mask[0].mul(255).round().clamp(0, 255).byte().numpy()
    return Image.fromarray(pixels), Image.fromarray(mask)


def _framed(original: Image.Image, size: tuple[int, int], cut: Cut) -> Image.Image:
    """`original` with what is cut off dimmed and a frame around the rest."""
    width, height = original.size
    left, top, right, bottom = frame(size, cut)
    box = (round(left * width), round(top * height), round(right * width) - 1, round(bottom * height) - 1)
    dimmed = np.asarray(original.convert("L").convert("RGB"), np.float32) * 0.35
    result = Image.fromarray(dimmed.astype(np.uint8))
    inner = (box[0], box[1], box[2] + 1, box[3] + 1)
    result.paste(original.crop(inner), inner[:2])
    draw = ImageDraw.Draw(result)
    if width >= 40 and height >= 40:  # smaller ones would be all frame
        draw.rectangle(box, outline=_DARK, width=3)
    draw.rectangle(box, outline=_FRAME, width=2 if min(width, height) >= 40 else 1)
    return result


# -- the sheet ----------------------------------------------------------------------------------------------------


def contact_sheet(
    data: Data,
    *,
    count: int = SHOWN,
    on_progress: Callable[[int], object] | None = None,
) -> Image.Image:
    """The sheet of at most `count` pictures; the same for the same data. InputError as `panels`."""
    choice = choose(data, count)
    cards = []
    for shown in choice.shown:
        cards.append(_card(data, shown))
        if on_progress:
            on_progress(1)
    groups = [(b, [c for c, s in zip(cards, choice.shown) if s.bucket == b]) for b in choice.counts]
    rows = [row for bucket, of_bucket in groups if of_bucket for row in _rows(bucket, of_bucket, choice.counts[bucket])]
    columns = max(2, min(_COLUMNS, max((len(row.cards) for row in rows), default=1)))
    width = 2 * _MARGIN + columns * _card_width() + (columns - 1) * _GAP
    head = _MARGIN + 78
    sheet = Image.new("RGB", (width, head + sum(row.height for row in rows) + _MARGIN), _GROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN - 6), "What the model will see", _TEXT, _font(26))
    legend = "left: the original, what is cut off is dimmed · right: what is trained on"
    if any(_has_mask(data, shown.number) for shown in choice.shown):
        legend += ", what its mask leaves out is tinted"
    for i, line in enumerate((choice.caption, legend)):
        draw.text((_MARGIN, _MARGIN + 30 + 20 * i), _fitted(line, width - 2 * _MARGIN, _font(14)), _QUIET, _font(14))
    y = head
    for row in rows:
        _draw_row(sheet, row, y)
        y += row.height
    return sheet


class _Row(NamedTuple):
    heading: str
    cards: list[Image.Image]
    height: int


def _rows(bucket: Bucket, cards: list[Image.Image], count: int) -> Iterator[_Row]:
    """The cards of one bucket in lines of _COLUMNS, the first under the bucket's heading."""
    for start in range(0, len(cards), _COLUMNS):
        line = cards[start : start + _COLUMNS]
        of = f" ({len(cards)} shown)" if len(cards) < count else ""
        heading = f"{bucket.width} x {bucket.height}  ·  {_some(count, 'picture')}{of}" if start == 0 else ""
        yield _Row(heading, line, max(card.height for card in line) + 8 + _GAP + (34 if heading else 0))


def _draw_row(sheet: Image.Image, row: _Row, y: int) -> None:
    draw = ImageDraw.Draw(sheet)
    if row.heading:
        draw.text((_MARGIN, y + 4), row.heading, _FRAME, _font(16))
        y += 34
    height = max(card.height for card in row.cards)
    for i, card in enumerate(row.cards):
        x = _MARGIN + i * (_card_width() + _GAP)
        draw.rounded_rectangle((x, y, x + _card_width() - 1, y + height + 7), 8, fill=_CARD)
        sheet.paste(card, (x, y + 4))  # below the rounded corners


def _card_width() -> int:
    return 2 * SIDE + 3 * _PAD


def _card(data: Data, shown: Shown) -> Image.Image:
    """Both panels of a picture and its caption, on a card's colour, without the corners."""
    example, found = data.examples[shown.number], panels(data, shown)
    height = max(found.original.height, found.cut.height)
    captions = data.captions_of(shown.number)
    lines = _wrapped(captions[0] if captions else "", _card_width() - 2 * _PAD, _font(14))
    card = Image.new("RGB", (_card_width(), height + 2 * _PAD + 26 + 18 * max(1, len(lines))), _CARD)
    for i, panel in enumerate((found.original, found.cut)):
        x = _PAD + i * (SIDE + _PAD) + (SIDE - panel.width) // 2
        card.paste(panel, (x, _PAD - 4 + (height - panel.height) // 2))
    draw = ImageDraw.Draw(card)
    y = height + _PAD + 4
    right = _card_width() - _PAD
    for text, colour in _badges(example, captions):
        width = round(_font(11).getlength(text)) + 12
        draw.rounded_rectangle((right - width, y, right - 1, y + 16), 5, fill=colour)
        draw.text((right - width + 6, y + 2), text, _TEXT, _font(11))
        right -= width + 6
    draw.text((_PAD, y + 1), _fitted(example.key, right - 2 * _PAD, _font(12), end=True), _QUIET, _font(12))
    for i, line in enumerate(lines or ["no caption"]):
        draw.text((_PAD, y + 21 + 18 * i), line, _TEXT if lines else _QUIET, _font(14))
    return card


def _badges(example: Example, captions: Sequence[str]) -> list[tuple[str, tuple[int, int, int]]]:
    """From right to left."""
    found = [(example.role, _ROLES[example.role])] if example.role in _ROLES else []
    return found + ([(f"{len(captions)} captions", (72, 78, 90))] if len(captions) > 1 else [])


def _has_mask(data: Data, index: int) -> bool:
    example = data.examples[index]
    return example.mask is not None or data.settings.sources[example.source].mask == "alpha"


# -- text ---------------------------------------------------------------------------------------------------------


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font


def _fitted(text: str, width: int, font: ImageFont.FreeTypeFont, *, end: bool = False) -> str:
    """`text` on one line of `width` pixels; what does not fit gives way to an ellipsis, at the front if `end`."""
    text = printable(text)[-400:] if end else printable(text)[:400]
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[1:] if end else text[:-1]
    return f"…{text}" if end else f"{text}…"


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """`text` in at most _CAPTION_LINES lines of `width` pixels; a word that is longer than a line is cut."""
    words = printable(text)[:2000].split(" ")
    lines: list[str] = []
    while words and len(lines) < _CAPTION_LINES:
        line = words.pop(0)
        while words and font.getlength(f"{line} {words[0]}") <= width:
            line += f" {words.pop(0)}"
        if words and len(lines) == _CAPTION_LINES - 1:
            line += " …" if font.getlength(line + " …") <= width else " " * 4 + words[0]  # to be cut
        lines.append(_fitted(line, width, font))
    return [line for line in lines if line]


def _some(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
