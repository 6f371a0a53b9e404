"""From captions as they were written to the text of a sample."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field

from lorakit.core.settings import Settings


class CaptionSettings(Settings):
    """What is made of a source's captions: a line is chosen, wildcards, then tags, then what stands around it."""

    trigger: str = ""
    """A word for what is learnt, put before every caption, with a space between."""

    prefix: str = ""
    """Put before the trigger, with a space between."""

    suffix: str = ""
    """Put behind every caption, with a space between."""

    class_prompt: str | None = None
    """What the captions would say of any other thing of the kind, e.g. "a dog", for objectives that ask for it."""

    caption_dropout: float = Field(default=0.0, ge=0.0, le=1.0)
    """Chance that a sample's caption is dropped as a whole, so that the model still knows what none means."""

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


def is_random(settings: CaptionSettings, captions: Sequence[str], *, weighted: bool = False) -> bool:
    """Whether samples may come with different texts, apart from captions dropped as a whole."""
    raise NotImplementedError


def variants(
    settings: CaptionSettings, captions: Sequence[str], *, count: int, weighted: bool = False
) -> tuple[str, ...]:
    """About `count` texts that a sample may come with, equally likely; one where there is no chance."""
    raise NotImplementedError


def draw_caption(
    settings: CaptionSettings,
    captions: Sequence[str],
    *,
    draw: torch.Generator,
    variants: Sequence[str] | None = None,
    weighted: bool = False,
) -> str:
    """A sample's text: one of `variants`, or a fresh one where they are None; "" if it is dropped as a whole."""
    raise NotImplementedError


def plain(settings: CaptionSettings, captions: Sequence[str]) -> str:
    """The first caption without chance, as a person reads it: wildcards as written, no tag moved or dropped."""
    raise NotImplementedError


def parse_weights(text: str) -> list[tuple[str, float]]:
    """`text` in parts with their weights."""
    raise NotImplementedError


def without_weights(text: str) -> str:
    """`text` without the marks of weights."""
    raise NotImplementedError
