"""CLIP's tokens as stock pipelines make them, and its layers' published names."""

import pytest
import torch

from lorakit.families import clip, sdxl


def test_captions_are_padded_with_each_tokenizers_own_token() -> None:
    first, second = sdxl.tiny().tokenizer, sdxl.tiny().tokenizer_2
    for tokenizer, pad in ((first, "<|endoftext|>"), (second, "!")):
        for weighted in (False, True):
            ids, present, weights = clip.tokens(tokenizer, ["cat", "a" * 50], weighted=weighted)
            assert ids.shape == present.shape == (2, 16)
            assert tokenizer.convert_ids_to_tokens(int(ids[0, -1])) == pad
            assert (weights is not None) == weighted
            assert ids[1, -1] == tokenizer.eos_token_id, "what is cut still ends"


def test_counted_are_all_tokens_of_a_caption() -> None:
    tokenizer = sdxl.tiny().tokenizer
    assert clip.count_tokens(tokenizer, "cat") == 5
    assert clip.count_tokens(tokenizer, "a" * 50) == 52


@pytest.mark.parametrize(
    ("path", "published"),
    [
        ("encoder.layers.0.mlp.fc1", "text_model.encoder.layers.0.mlp.fc1"),
        ("text_model.encoder.layers.0.mlp.fc1", "text_model.encoder.layers.0.mlp.fc1"),
        ("text_projection", "text_projection"),
    ],
)
def test_published_names_hold_text_model_whatever_transformers_calls_it(path: str, published: str) -> None:
    assert clip.published_name(path) == published


def test_both_text_encoders_of_a_model_have_published_names() -> None:
    family = sdxl.tiny()
    for name in family.text_encoders:
        linear = [p for p, m in family.components[name].named_modules() if isinstance(m, torch.nn.Linear)]
        assert all(clip.published_name(p).startswith(("text_model.encoder.layers.", "text_projection")) for p in linear)
