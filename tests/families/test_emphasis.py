"""Emphasis: the tokens of a caption with the weights that its marks give."""

import torch

from lorakit.families import sd
from lorakit.families.emphasis import weigh, weighted_tokens


def test_a_caption_without_marks_gets_what_the_tokenizer_gives_it() -> None:
    tokenizer = sd.tiny().tokenizer
    captions = ["red cat", "", "a long caption that is cut at the limit of the model"]
    ids, present, weights = weighted_tokens(tokenizer, captions, limit=16)
    plain = tokenizer(captions, padding="max_length", truncation=True, max_length=16, return_tensors="pt")
    assert torch.equal(ids, plain.input_ids) and torch.equal(present, plain.attention_mask)
    assert torch.equal(weights, torch.ones(3, 16))


def test_marked_tokens_have_their_weight_and_no_mark_is_a_token() -> None:
    tokenizer = sd.tiny().tokenizer
    ids, _, weights = weighted_tokens(tokenizer, ["a (cat:1.5) b"], limit=16)
    plain = tokenizer(["a cat b"], padding="max_length", max_length=16, return_tensors="pt")
    assert torch.equal(ids, plain.input_ids)
    heavy = [tokenizer.decode([token]) for token, weight in zip(ids[0], weights[0]) if weight == 1.5]
    assert "".join(heavy).strip() == "cat" and int((weights != 1).sum()) == len(heavy)


def test_weighing_keeps_the_size_and_moves_what_is_emphasised() -> None:
    states = torch.randn(2, 5, 4)
    states -= states.mean((1, 2), keepdim=True)  # as behind a layer norm
    weights = torch.ones(2, 5)
    assert torch.equal(weigh(states, weights), states)
    weights[0, 2] = 2.0
    weighed = weigh(states, weights)
    torch.testing.assert_close(weighed.square().mean((1, 2)), states.square().mean((1, 2)))
    ratio = weighed[0] / states[0]
    torch.testing.assert_close(ratio[2] / ratio[1], torch.full((4,), 2.0))
    assert torch.equal(weighed[1], states[1])


def test_a_family_encodes_with_emphasis_only_where_asked() -> None:
    family = sd.tiny()
    plain, marked = (
        family.encode_text(["a cat"])["states"],
        family.encode_text(["a (cat:1.5)"], weighted=True)["states"],
    )
    assert not torch.equal(plain, marked)
    torch.testing.assert_close(family.encode_text(["a cat"], weighted=True)["states"], plain)
    assert not torch.equal(family.encode_text(["a (cat:1.5)"])["states"], marked)
