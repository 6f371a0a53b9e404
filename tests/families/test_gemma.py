"""Gemma's captions: what the families that have them share."""

import functools
from pathlib import Path
from typing import Any

import torch

from lorakit.families import gemma


@functools.cache
def encoder() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return gemma.tiny(gemma.tiny_tokenizer()).eval()


def test_padding_comes_behind_a_caption_though_gemmas_own_side_is_the_left(tmp_path: Path) -> None:
    assert gemma.tiny_tokenizer().padding_side == "left"
    gemma.tiny_tokenizer().save_pretrained(tmp_path)
    tokenizer = gemma.load_tokenizer(tmp_path)
    _, mask = gemma.encode(tokenizer, encoder(), ["a dog", ""], limit=8)
    assert mask.tolist() == [[1] * 6 + [0] * 2, [1] + [0] * 7]
    assert mask.dtype == torch.int64


@torch.no_grad()
def test_a_caption_does_not_depend_on_what_is_beside_or_behind_it() -> None:
    tokenizer = gemma.tiny_tokenizer()
    tokenizer.padding_side = "right"
    both, _ = gemma.encode(tokenizer, encoder(), ["a", "a longer one"], limit=14)
    alone, mask = gemma.encode(tokenizer, encoder(), ["a"], limit=4)
    own = int(mask.sum())
    torch.testing.assert_close(both[:1, :own], alone[:, :own], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_layer_is_counted_from_the_last() -> None:
    tokenizer = gemma.tiny_tokenizer()
    ids = tokenizer("a", return_tensors="pt")
    output = encoder()(**ids, output_hidden_states=True)
    last, before = (gemma.encode(tokenizer, encoder(), ["a"], limit=2, layer=layer)[0] for layer in (-1, -2))
    assert torch.equal(last, output.last_hidden_state) and torch.equal(before, output.hidden_states[1])


def test_a_caption_is_counted_with_its_start() -> None:
    tokenizer = gemma.tiny_tokenizer()
    assert [gemma.count_tokens(tokenizer, text) for text in ("", "abc", "é")] == [1, 4, 3]
