"""What writers of captions have in common: their settings, what they are handed, and what they answer."""

import re
from collections.abc import Sequence
from typing import Protocol

from pydantic import Field, field_validator

from lorakit.captioning.pictures import Picture
from lorakit.core.settings import Settings


class WriterSettings(Settings):
    """What any kind of writer may be told."""

    kind: str

    prefix: str = ""
    """Put before every caption, with a space between."""

    suffix: str = ""
    """Put behind every caption, with a space between."""

    replace: list[tuple[str, str]] = Field(default_factory=list)
    """Pairs of what is found in a caption and what it becomes, one after the other, before prefix and suffix."""

    regex: bool = False
    r"""Whether what is found is a regular expression, with `\1` in its replacement for its first group."""

    @field_validator("replace")
    @classmethod
    def _can_be_found(cls, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
        if any(not old for old, _ in pairs):
            raise ValueError("what is to be found is empty: write it, or remove the pair.")
        return pairs

    @property
    def texts(self) -> int:
        """How many captions a picture gets."""
        return 1


class Writer(Protocol):
    """`batch_size` pictures are best handed over together."""

    batch_size: int

    def __call__(self, pictures: Sequence[Picture]) -> list[tuple[str, ...] | ValueError]:
        """The captions of each picture, or what is wrong with it."""


def pattern(old: str, new: str, *, regex: bool) -> tuple[re.Pattern[str], str]:
    """`old` as a pattern and `new` as `re.sub` takes it. ValueError says what is wrong with them."""
    if not regex:
        return re.compile(re.escape(old)), new.replace("\\", r"\\")
    try:
        found = re.compile(old)
        found.sub(new, "")  # it looks at the replacement's groups, whether anything is found or not
    except (re.error, IndexError) as error:
        raise ValueError(f"{old!r} with {new!r} is no regular expression and its replacement: {error}") from None
    return found, new


def worded(text: str, settings: WriterSettings) -> str:
    """What a writer says as a caption: on one line, with what is to be replaced, and what stands around it."""
    text = one_line(text)
    for old, new in settings.replace:
        found, new = pattern(old, new, regex=settings.regex)
        text = one_line(found.sub(new, text))
    parts = (settings.prefix, text, settings.suffix)
    return " ".join(part.strip() for part in parts if part.strip()) if text else ""


def one_line(text: str) -> str:
    """`text` without line ends, control characters and halves of characters: a line of a file is a caption."""
    kept = "".join(c if c.isprintable() or c in "\u200d\u00ad" else " " for c in text)
    return " ".join(kept.split())
