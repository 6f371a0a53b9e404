"""The captions and boxes that a file, a line of metadata or a table's row holds about one picture.

Here: what the bytes or values mean. Not here: which picture they belong to (`folder.py`, `tars.py`, `table.py`).
"""

import codecs
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from lorakit.core.files import printable
from lorakit.data.sources.items import Box

MAX_CAPTION_BYTES = 1_000_000
TEXT_SUFFIXES = frozenset({".txt", ".caption"})
CAPTION_SUFFIXES = TEXT_SUFFIXES | {".json"}
CAPTION_KEYS = ("text", "caption", "prompt")
BOX_KEYS = ("focus", "face")
NOT_UTF8 = "it is not UTF-8 (byte {}): save it as UTF-8"
UTF16 = "it looks like UTF-16: save it as UTF-8"
TOO_LONG = f"a caption of over {MAX_CAPTION_BYTES // 1_000_000} MB is none: shorten it"


class Said(NamedTuple):
    """What is said of a picture: `captions`, stripped and none of them empty, and what of it matters."""

    captions: tuple[str, ...] = ()
    box: Box | None = None


def parse(data: bytes, suffix: str) -> Said:
    """What a caption file of that suffix says; ValueError says what is wrong with it."""
    if len(data) > MAX_CAPTION_BYTES:
        raise ValueError(TOO_LONG)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # what Windows long called "Unicode"
        raise ValueError(UTF16)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(NOT_UTF8.format(error.start)) from None
    if suffix in TEXT_SUFFIXES:
        return Said(captions_of(text))
    value = parse_json(text)
    if not isinstance(value, dict):
        return Said(captions_of(value))
    return from_mapping(value)


def parse_json(text: str) -> Any:
    """The value that a JSON text stands for; ValueError says where it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"it is no JSON ({where}: {error.msg}): mend or remove it") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, a thousand brackets
        raise ValueError("it is no JSON that can be read: mend or remove it") from None


def from_mapping(values: Mapping[str, Any], *, caption_key: str | None = None) -> Said:
    """What an object or row says: its captions, under `caption_key` or any of the usual names, and its box.

    Raises ValueError where two keys hold captions or a value is of the wrong kind.
    """
    known = [*CAPTION_KEYS, "tags"] if caption_key is None else [caption_key]
    given = [key for key in known if values.get(key) not in (None, "", [])]
    if len(given) > 1:
        raise ValueError(f"it has two captions, {' and '.join(given)}: keep one")
    captions: tuple[str, ...] = ()
    if given:
        value = values[given[0]]
        if given[0] == "tags" and isinstance(value, list) and all(isinstance(tag, str) for tag in value):
            value = ", ".join(value)
        try:
            captions = captions_of(value)
        except ValueError as error:
            raise ValueError(f"its {printable(given[0])}: {error}") from None
    boxes = [(key, values[key]) for key in BOX_KEYS if values.get(key) not in (None, "")]
    if len(boxes) > 1:
        raise ValueError("it has two boxes, focus and face: keep one")
    return Said(captions, box_of(boxes[0][1], boxes[0][0]) if boxes else None)


def captions_of(value: Any) -> tuple[str, ...]:
    """A text or a list of texts as captions; ValueError if it is neither."""
    texts = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError('it is neither a text nor a list of texts: write "a caption" or ["one", "another"]')
    stripped = tuple(text.strip() for text in texts)
    for text in stripped:
        # an escaped half of a character cannot be written again; U+001E parts the captions of an example
        if any("\ud800" <= c <= "\udfff" or c == "\x1e" for c in text):
            raise ValueError("it holds characters that are no text (half a surrogate pair or U+001E): remove them")
        if len(text) > MAX_CAPTION_BYTES:
            raise ValueError(TOO_LONG)
    return tuple(text for text in stripped if text)


def box_of(value: Any, key: str) -> Box:
    """[left, top, right, bottom], or a text of them with commas between, as numbers; ValueError says what is wrong."""
    parts = value.strip("[] ").split(",") if isinstance(value, str) else value
    try:
        if isinstance(parts, str | bytes | dict) or any(isinstance(part, bool) for part in parts):
            raise TypeError
        left, top, right, bottom = (float(part) for part in parts)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"its {key} is no box: write [left, top, right, bottom] in pixels") from None
    if not all(math.isfinite(side) for side in (left, top, right, bottom)) or left >= right or top >= bottom:
        raise ValueError(f"its {key} is an empty box: left < right and top < bottom, in pixels")
    return left, top, right, bottom
