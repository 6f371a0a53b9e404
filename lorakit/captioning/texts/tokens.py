"""What a model's tokenizers make of a trigger word, and whether they know it as a word already."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Trigger:
    """A word's `pieces` by the tokenizers' names; `known` to those that have it, each part of it, as one token."""

    word: str
    pieces: Mapping[str, tuple[str, ...]]
    known: tuple[str, ...]


def trigger(word: str, tokenizers: Mapping[str, Any]) -> Trigger:
    """How `word` is cut within a caption."""
    pieces = {name: _pieces(tokenizer, word) for name, tokenizer in tokenizers.items()}
    known = [name for name, t in tokenizers.items() if all(len(_pieces(t, part)) == 1 for part in word.split())]
    return Trigger(word, pieces, tuple(known))


def _pieces(tokenizer: Any, word: str) -> tuple[str, ...]:
    # behind another word, for most tokenizers cut a text's first word otherwise than others
    before, both = (tokenizer(text, add_special_tokens=False).input_ids for text in ("a", f"a {word}"))
    decoded = [tokenizer.decode([number]).strip() for number in both[len(before) :]]
    return tuple(piece for piece in decoded if piece)
