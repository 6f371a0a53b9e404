"""A folder's captions, looked at: each of them, with its tokens, and what is too long, alike or known to the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lorakit import families
from lorakit.captioning.folder import listed
from lorakit.captioning.texts.tokens import Trigger, trigger
from lorakit.core.errors import InputError
from lorakit.core.files import printable
from lorakit.core.quiet import quiet_libraries


@dataclass(frozen=True)
class Line:
    """A caption of a picture, with the number of its tokens where a base is given; no text where it has none."""

    picture: str
    text: str
    tokens: int | None = None


@dataclass(frozen=True)
class Looked:
    """All captions that can be read, and with a base how many tokens it reads and what it makes of the trigger word.

    `problems` name what cannot be read; its pictures have no line.
    """

    lines: tuple[Line, ...]
    token_limit: int | None = None
    trigger: Trigger | None = None
    problems: tuple[str, ...] = ()

    @property
    def too_long(self) -> list[Line]:
        """The captions that the base does not read to their end."""
        limit = self.token_limit
        return [] if limit is None else [line for line in self.lines if (line.tokens or 0) > limit]


def look(folder: Path, *, base: str | None = None, family: str | None = None, word: str | None = None) -> Looked:
    """Reads the captions in `folder`; a model's tokens are counted as its family counts them.

    Raises InputError where there are no pictures or nothing of them can be read.
    """
    texts, problems = _texts(folder)
    if base is None:
        return Looked(tuple(Line(picture, text) for picture, text in texts), problems=problems)
    quiet_libraries()
    model = families.describe(family or families.named_at(base), base)
    count = lru_cache(maxsize=1 << 16)(model.count_tokens)
    said = None
    if word is not None:
        said = trigger(word, families.tokenizers(base))
    lines = tuple(Line(picture, text, count(text)) for picture, text in texts)
    return Looked(lines, model.token_limit, said, problems)


def _texts(folder: Path) -> tuple[Sequence[tuple[str, str]], tuple[str, ...]]:
    items, problems = listed(folder)
    problems += [problem for item in items for problem in item.problems]
    sound = [item for item in items if not item.problems]
    if not sound:
        raise InputError(problems)
    found = []
    for item in sound:
        lines = [line.strip() for text in item.captions for line in text.splitlines() if line.strip()]
        found += [(printable(item.name), line) for line in lines or [""]]
    return found, tuple(dict.fromkeys(problems))
