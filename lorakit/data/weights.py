"""Emphasis in captions, in the syntax that AUTOMATIC1111's web UI made common: "a (red:1.3) [small] house".

Here: text to parts with their weights. What weights do is a matter of the model family's text encoder.
"""

import math
import re

_UP = 1.1
# of either kind; deeper brackets are text, so that a megabyte of them takes no quadratic time
_DEEPEST = 20
_PIECES = re.compile(
    r"""
    \\[\\()\[\]]                  # an escaped bracket, meant as itself
  | :\s*([+-]?[.\d]+)\s*\)       # a weight and the bracket that it closes
  | [()\[\]]
  | [^\\()\[\]:]+
  | .
    """,
    re.VERBOSE | re.DOTALL,
)


def parse_weights(text: str) -> list[tuple[str, float]]:
    """`text` in parts with their weights, neighbours of equal weight as one; [("", 1.0)] of an empty text.

    `(tag)` weighs 1.1, `(tag:1.3)` 1.3 and `[tag]` 1 / 1.1; within each other they multiply. What is opened and never
    closed reaches to the end, what closes nothing is text, and so is a bracket behind a backslash.
    """
    parts: list[tuple[str, float]] = []
    # how many parts there were before each open bracket
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(start: int, factor: float) -> None:
        parts[start:] = [(part, weight * factor) for part, weight in parts[start:]]

    for match in _PIECES.finditer(text):
        piece, number = match.group(), match.group(1)
        if piece in opened and len(opened[piece]) < _DEEPEST:
            opened[piece].append(len(parts))
        elif number is not None and opened["("] and _is_number(number):
            multiply(opened["("].pop(), float(number))
        elif piece == ")" and opened["("]:
            multiply(opened["("].pop(), _UP)
        elif piece == "]" and opened["["]:
            multiply(opened["["].pop(), 1 / _UP)
        elif number is not None and opened["("]:  # ":..)": no number, but a bracket that closes
            parts.append((piece[:-1], 1.0))
            multiply(opened["("].pop(), _UP)
        else:
            parts.append((piece[1:] if len(piece) == 2 and piece[0] == "\\" else piece, 1.0))
    for start in opened["("]:
        multiply(start, _UP)
    for start in opened["["]:
        multiply(start, 1 / _UP)
    joined: list[tuple[str, float]] = []
    for part, weight in parts:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + part, weight)
        else:
            joined.append((part, weight))
    return joined or [("", 1.0)]


def without_weights(text: str) -> str:
    """`text` as the model reads it: without the marks of emphasis."""
    return "".join(part for part, _ in parse_weights(text))


def split_tags(text: str, *, weighted: bool = False) -> list[str]:
    """What stands between commas, stripped, the empty left out; if `weighted`, not within brackets that are closed."""
    if not weighted:
        return [tag.strip() for tag in text.split(",") if tag.strip()]
    tags, start, depth = [], 0, 0
    closed = _closed(text)
    for i, letter in enumerate(text):
        if i in closed:
            depth += 1 if letter in "([" else -1
        elif letter == "," and depth == 0:
            tags.append(text[start:i])
            start = i + 1
    return [tag.strip() for tag in [*tags, text[start:]] if tag.strip()]


def _closed(text: str) -> set[int]:
    """Where the brackets stand that have their partner."""
    opened: dict[str, list[int]] = {"(": [], "[": []}
    closed: set[int] = set()
    for match in re.finditer(r"\\.|[()\[\]]", text, re.DOTALL):
        piece = match.group()
        if piece in opened:
            opened[piece].append(match.start())
        elif piece in ")]" and opened["(" if piece == ")" else "["]:
            closed |= {opened["(" if piece == ")" else "["].pop(), match.start()}
    return closed


def _is_number(text: str) -> bool:
    return bool(re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", text)) and math.isfinite(float(text))
