"""Captions that say the same of several pictures, or nearly: of these the model learns to tell nothing apart.

Near are captions whose sets of words have a Jaccard similarity of at least NEAR. Every such pair is found: two sets
that similar share one of the few words of each that are the rarest (Chaudhuri, Ganti, Kaushik 2006, "A primitive
operator for similarity joins in data cleaning", prefix filter).
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

NEAR = 0.8
"""Words in both captions, as a part of those in either: one word of nine may differ."""


@dataclass(frozen=True)
class Alike:
    """The numbers of captions that have the same words, and of one that is near to them and came before."""

    same: tuple[int, ...]
    near: int | None = None


def alike(captions: Sequence[str], *, least: float = NEAR) -> list[Alike]:
    """Of `captions` those that have the words of others, or nearly; each with the earliest that it is near to."""
    groups: dict[frozenset[str], list[int]] = {}
    for number, caption in enumerate(captions):
        groups.setdefault(frozenset(re.findall(r"\w+", caption.lower())), []).append(number)
    often = Counter(word for words in groups for word in words)
    of_word: dict[str, list[frozenset[str]]] = {}
    found = []
    for words, numbers in groups.items():
        rarest = sorted(words, key=lambda word: (often[word], word))
        rarest = rarest[: len(words) - math.ceil(least * len(words)) + 1]
        candidates = {id(other): other for word in rarest for other in of_word.get(word, ())}
        near = [groups[other][0] for other in candidates.values() if _similarity(words, other) >= least]
        if len(numbers) > 1 or near:
            found.append(Alike(tuple(numbers), min(near, default=None)))
        for word in rarest:
            of_word.setdefault(word, []).append(words)
    return found


def _similarity(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)
