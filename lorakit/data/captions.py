"""From captions as they were written to the text of a sample.

In this order: a line is chosen; of each `{a|b|c}` in it a part; its tags, the parts between commas, are dropped and
shuffled; then prefix, trigger and suffix stand around it. Whether the whole is dropped is drawn apart from that.

Here: text alone. Not here: where captions are written (`sources/`) and how texts are encoded (`cache.py`). Next:
`weights.py` reads emphasis like "(tag:1.3)".
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Literal, Self, TypeAlias

import torch
from pydantic import Field, model_validator

from lorakit.core.seeding import generator
from lorakit.core.settings import Settings
from lorakit.data.weights import parse_weights as parse_weights
from lorakit.data.weights import split_tags, without_weights


class CaptionSettings(Settings):
    """What is made of a source's captions: a line is chosen, wildcards, then tags, then what stands around it."""

    trigger: str = ""
    """A word for what is learnt, put before every caption, with a space between."""

    prefix: str = ""
    """Put before the trigger, with a space between."""

    suffix: str = ""
    """Put behind every caption, with a space between."""

    class_prompt: str | None = None
    """What the captions would say of any other thing of the kind, e.g. "a dog": where differential_output holds the
    model to what it was."""

    class_words: dict[str, str] = Field(default_factory=dict)
    """The same, caption by caption: what stands for any other thing of the kind in the place of a word (or several) for
    what is learnt, `{ zorp = "dog" }`. A caption without these words is held to nothing."""

    caption_dropout: float = Field(default=0.0, ge=0.0, le=1.0)
    """Chance that a sample's caption is dropped as a whole, so that the model still knows what none means."""

    conditioning_dropout: float = Field(default=0.0, ge=0.0, le=1 / 3)
    """Of an editing model's pairs: chance that the caption is dropped, that the picture to begin with is, and that both
    are; each is this. Guidance leads away from just these (Brooks et al. 2023, arXiv:2211.09800, §3.2.1)."""

    shuffle_tags: bool = False
    """Whether a caption's tags, the parts between commas, come in another order for each sample. A caption may say what
    stays in place: `shuffled ||| tail`, or `head ||| shuffled ||| tail`."""

    keep_tags: int = Field(default=0, ge=0)
    """How many of the first tags are neither moved nor dropped."""

    tag_dropout: float = Field(default=0.0, ge=0.0, le=1.0)
    """Chance that a tag is dropped, each by itself."""

    drop_tags: list[str] = Field(default_factory=list)
    """Patterns (*, ?) of the tags that alone may be dropped; empty: all."""

    never_drop: list[str] = Field(default_factory=list)
    """Patterns (*, ?) of tags that are never dropped."""

    lines: Literal["captions", "text"] = "captions"
    """What the lines of a caption are: captions to choose from, or one text."""

    wildcards: bool = True
    """Whether of `{a|b|c}` in a caption one part is chosen for each sample."""

    @model_validator(mode="after")
    def _tags_have_effect(self) -> Self:
        if self.keep_tags and not (self.shuffle_tags or self.tag_dropout):
            raise ValueError("keep_tags has no effect without shuffle_tags or tag_dropout: remove it.")
        if self.caption_dropout and self.conditioning_dropout:
            raise ValueError("caption_dropout and conditioning_dropout are both given: keep one of them.")
        for key in ("drop_tags", "never_drop"):
            if getattr(self, key) and not self.tag_dropout:
                raise ValueError(f"{key} has no effect without tag_dropout: remove it.")
        if not all(word.strip() for word in self.class_words):
            raise ValueError("class_words has an empty word to replace: remove it.")
        if self.class_words and self.class_prompt is not None:
            raise ValueError("class_prompt and class_words are both given: keep one of them.")
        return self


_SEPARATOR = "|||"
_Piece: TypeAlias = "str | list[_Piece]"


def is_random(settings: CaptionSettings, captions: Sequence[str], *, weighted: bool = False) -> bool:
    """Whether samples may come with different texts, not counting captions dropped as a whole."""
    lines = _lines(settings, captions)
    return len(set(lines)) > 1 or any(_varies(settings, line, weighted=weighted) for line in lines)


def variants(
    settings: CaptionSettings, captions: Sequence[str], *, count: int, weighted: bool = False
) -> tuple[str, ...]:
    """At least `count` texts that a sample may come with, equally likely; one where there is no chance.

    Every line is there equally often, so that of several lines there may be more than `count`, and where lines are all
    the chance there is, each once. They follow from settings and captions alone: runs with other seeds share them, and
    more of them begin with the fewer ones.
    """
    assert count >= 1, "a caption has at least one variant"
    lines = _lines(settings, captions)
    each = math.ceil(count / len(lines)) if any(_varies(settings, line, weighted=weighted) for line in lines) else 1
    if len(set(lines)) == 1 and each == 1:
        lines = lines[:1]
    return tuple(
        _text(settings, line, seed=("caption", line, variant), weighted=weighted)
        for variant in range(each)
        for line in lines
    )


def draw_caption(
    settings: CaptionSettings,
    captions: Sequence[str],
    *,
    draw: torch.Generator,
    variants: Sequence[str] | None = None,
    weighted: bool = False,
) -> str:
    """A sample's text: one of `variants`, or a fresh one where they are None; "" if it is dropped as a whole.

    Takes three numbers from `draw`, whatever settings and captions: for the dropout, the choice of a variant or line,
    and what wildcards and tags draw from. So a setting that is switched on leaves what the others draw as it was.
    """
    dropout, choice, seed = torch.rand(3, generator=draw, dtype=torch.float64).tolist()
    # the caption alone, then both, then the picture alone
    if dropout < max(settings.caption_dropout, 2 * settings.conditioning_dropout):
        return ""
    if variants is not None:
        return variants[math.floor(choice * len(variants))]
    lines = _lines(settings, captions)
    return _text(settings, lines[math.floor(choice * len(lines))], seed=("sample", seed), weighted=weighted)


def drops_input(settings: CaptionSettings, *, draw: torch.Generator) -> bool:
    """Whether a sample comes without the picture to begin with; `draw` as `draw_caption` gets it, for one number
    decides on both."""
    dropout = float(torch.rand(3, generator=draw, dtype=torch.float64)[0])
    return settings.conditioning_dropout <= dropout < 3 * settings.conditioning_dropout


def plain(settings: CaptionSettings, captions: Sequence[str], *, weighted: bool = False) -> str:
    """The first line without chance, as a person reads it: wildcards as written, no tag moved or dropped."""
    parts = _lines(settings, captions)[0].split(_SEPARATOR)
    return _around(settings, parts[0].strip() if len(parts) == 1 else _joined(parts, weighted=weighted))


def class_caption(settings: CaptionSettings, caption: str) -> str | None:
    """What a sample's text would be for any other thing of the kind; None where the source does not say."""
    if settings.class_prompt is not None:
        return settings.class_prompt
    found = _class_words(settings).sub(lambda match: settings.class_words[match[0]], caption)
    return None if found == caption else found


def idle_class_words(settings: CaptionSettings, captions: Iterable[Sequence[str]]) -> list[str]:
    """Which of the class words' keys stand in none of the `captions` of a source's examples, nor around them."""
    words = set(settings.class_words)
    around = [_around(settings, "")]
    for text in (text for texts in (around, *captions) for text in texts):
        if not words:
            break
        words -= {match[0] for match in _class_words(settings).finditer(text)}
    return sorted(words)


def _class_words(settings: CaptionSettings) -> re.Pattern[str]:
    """Finds any of the words as a whole, the longest first; where there are none, nothing."""
    words = sorted(map(re.escape, settings.class_words), key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(words)})(?!\w)" if words else r"(?!)")


def _lines(settings: CaptionSettings, captions: Sequence[str]) -> list[str]:
    """What a sample's line is chosen from; [""] where nothing is written."""
    if settings.lines == "captions":
        captions = [line for caption in captions for line in caption.splitlines()]
    return [line.strip() for line in captions if line.strip()] or [""]


def _varies(settings: CaptionSettings, line: str, *, weighted: bool) -> bool:
    """Whether wildcards or tags make different texts of `line`."""
    if settings.wildcards and line != _choose(line, lambda options: 0):
        return True
    _, _, free, _ = _tags(settings, line, weighted=weighted)
    if settings.tag_dropout and any(_may_drop(settings, tag, weighted=weighted) for tag in free):
        return True
    return settings.shuffle_tags and len(set(free)) > 1


def _text(settings: CaptionSettings, line: str, *, seed: tuple[object, ...], weighted: bool) -> str:
    """`line` with all that chance makes of it; wildcards, dropout and order each draw from their own generator."""
    if settings.wildcards:
        draw = generator("wildcards", *seed)
        line = _choose(line, lambda options: int(torch.randint(options, (), generator=draw)))
    if not (settings.shuffle_tags or settings.tag_dropout or _SEPARATOR in line):
        return _around(settings, line)  # nothing is cut, so that commas and blanks stay as they were written
    head, kept, free, tail = _tags(settings, line, weighted=weighted)
    if settings.tag_dropout:
        chances = torch.rand(len(free), generator=generator("tags", *seed), dtype=torch.float64).tolist()
        free = [
            tag
            for tag, chance in zip(free, chances)
            if chance >= settings.tag_dropout or not _may_drop(settings, tag, weighted=weighted)
        ]
    if settings.shuffle_tags:
        free = [free[i] for i in torch.randperm(len(free), generator=generator("order", *seed))]
    return _around(settings, ", ".join([*head, *kept, *free, *tail]))


def _around(settings: CaptionSettings, text: str) -> str:
    parts = (settings.prefix, settings.trigger, text, settings.suffix)
    return " ".join(part.strip() for part in parts if part.strip())


def _tags(settings: CaptionSettings, line: str, *, weighted: bool) -> tuple[list[str], list[str], list[str], list[str]]:
    """Tags of the head, those kept in place, those that chance moves and drops, and the tail's."""
    parts = [split_tags(part, weighted=weighted) for part in line.split(_SEPARATOR)]
    head = parts[0] if len(parts) > 2 else []
    tail = parts[-1] if len(parts) > 1 else []
    middle = [tag for part in parts[len(parts) > 2 : len(parts) - (len(parts) > 1)] for tag in part]
    return head, middle[: settings.keep_tags], middle[settings.keep_tags :], tail


def _joined(parts: Sequence[str], *, weighted: bool) -> str:
    return ", ".join(tag for part in parts for tag in split_tags(part, weighted=weighted))


def _may_drop(settings: CaptionSettings, tag: str, *, weighted: bool) -> bool:
    name = (without_weights(tag) if weighted else tag).strip().lower()
    if any(fnmatchcase(name, pattern.strip().lower()) for pattern in settings.never_drop):
        return False
    return not settings.drop_tags or any(fnmatchcase(name, p.strip().lower()) for p in settings.drop_tags)


def _choose(text: str, choice: Callable[[int], int]) -> str:
    """`text` with one part of each `{a|b|c}`, the innermost first; braces that are unbalanced or hold no | are text.

    `choice` is told how many parts there are. Without recursion: captions may be a megabyte of braces.
    """
    # of every open brace its parts, each a list of pieces; below them all the text outside
    open_parts: list[list[list[_Piece]]] = [[[]]]
    for piece in re.split(r"([{|}])", text):
        if piece == "{":
            open_parts.append([[]])
        elif piece == "|" and len(open_parts) > 1:
            open_parts[-1].append([])
        elif piece == "}" and len(open_parts) > 1:
            parts = open_parts.pop()
            open_parts[-1][-1].append(parts[choice(len(parts))] if len(parts) > 1 else ["{", *parts[0], "}"])
        else:
            open_parts[-1][-1].append(piece)
    # what was never closed stands at the end of what it stands in
    flat: list[str] = []
    for depth, parts in enumerate(open_parts):
        for number, part in enumerate(parts):
            flat += ["{" if depth else ""] if number == 0 else ["|"]
            _flatten(part, flat)
    return "".join(flat)


def _flatten(pieces: list[_Piece], flat: list[str]) -> None:
    todo: list[_Piece] = [pieces]
    while todo:
        piece = todo.pop()
        if isinstance(piece, str):
            flat.append(piece)
        else:
            todo += reversed(piece)
