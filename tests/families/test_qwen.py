"""Qwen's captions: what the families that have them share."""

from pathlib import Path

import torch

from lorakit.families import qwen


def test_captions_keep_their_lengths_and_zeros_follow() -> None:
    long, short = torch.randn(3, 2), torch.randn(1, 2)
    text = qwen.padded([long, short])
    assert text["lengths"].tolist() == [3, 1]
    assert torch.equal(text["states"][0], long) and torch.equal(text["states"][1, :1], short)
    assert not text["states"][1, 1:].any()


def test_a_caption_is_what_a_user_says_and_no_mark_in_it_is_lost(tmp_path: Path) -> None:
    tokenizer = qwen.tiny_tokenizer(tmp_path)
    said = qwen.as_message(tokenizer, "a dog", thinking=True)
    assert said == "<|im_start|>user\na dog<|im_end|>\n<|im_start|>assistant\n"
    assert qwen.as_message(tokenizer, "a dog", thinking=False) == said + "<think>\n\n</think>\n\n"
    assert tokenizer.decode(tokenizer(said).input_ids) == said
    counted = [qwen.count_tokens(tokenizer, lambda text: f"<{text}>", text) for text in ("", "abc")]
    assert counted == [2, 5]
