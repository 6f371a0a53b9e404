"""T5's states as stock pipelines make them: every token to the limit counts, with a mask the padding does not."""

import torch

from lorakit.families import clip, t5

TOKENIZER = t5.tiny_tokenizer()
torch.manual_seed(0)
ENCODER = t5.tiny(TOKENIZER, width=16).eval()


@torch.no_grad()
def encode(*captions: str, **given: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return t5.encode(TOKENIZER, ENCODER, captions, limit=8, **given)


def test_captions_are_padded_and_cut_at_the_limit_with_an_end() -> None:
    states, present = encode("cat", "a" * 50)
    assert states.shape == (2, 8, 16)
    assert present.sum(1).tolist() == [clip.count_tokens(TOKENIZER, "cat"), 8] == [5, 8]
    assert torch.equal(states[1:], encode("a" * 51)[0])
    assert TOKENIZER("a" * 50, max_length=8, truncation=True).input_ids[-1] == TOKENIZER.eos_token_id


def test_only_with_a_mask_does_padding_change_nothing() -> None:
    own = TOKENIZER(["cat"], return_tensors="pt").input_ids
    alone = ENCODER(own).last_hidden_state
    torch.testing.assert_close(encode("cat", masked=True)[0][:, :5], alone, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(encode("cat")[0][:, :5], alone, atol=1e-3)


def test_emphasis_without_marks_is_none_and_with_marks_moves_its_own_tokens_most() -> None:
    plain = encode("a cat")[0]
    torch.testing.assert_close(encode("a cat", weighted=True)[0], plain)
    marked = encode("a (cat:1.5)", weighted=True)[0]
    larger = (marked / plain).mean(-1)[0]
    assert larger[2:6].min() > larger[[0, 1, 6, 7]].max()
