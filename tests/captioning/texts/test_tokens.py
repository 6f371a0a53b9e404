"""A trigger word, cut by the tokenizers of real families."""

import pytest

from lorakit import families
from lorakit.captioning.texts.tokens import trigger


def test_the_embedded_bases_tokenizer_knows_words_and_cuts_others() -> None:
    tokenizers = families.tokenizers("embedded")
    assert trigger("zorp", tokenizers).pieces == {"tokenizer": ("z", "or", "p")}
    assert not trigger("zorp", tokenizers).known and trigger("circle", tokenizers).known == ("tokenizer",)
    assert not trigger("zorp circle", tokenizers).known and trigger("red circle", tokenizers).known


@pytest.mark.parametrize("name", families.FAMILIES.names())
def test_every_familys_tokenizers_are_found(name: str) -> None:
    module = families.FAMILIES.module(name)
    found = trigger("qz", families.tokenizers(str(module.tiny().path)))
    assert found.pieces and set(found.pieces.values()) == {("q", "z")}
