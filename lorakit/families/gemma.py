"""Gemma's tokens and states: what families share whose captions are read by a language model of the Gemma 2 series.

Their stock pipelines put an instruction before a caption, and none before what guidance leads away from: an empty
caption is that here, so that dropped captions train what is led away from.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, padding_side="right")  # as stock pipelines set it; its own is the left


def count_tokens(tokenizer: Any, text: str) -> int:
    """How many tokens a text has, the start included, before it is cut."""
    return len(tokenizer(text, truncation=False, verbose=False).input_ids)


def encode(tokenizer: Any, encoder: Any, texts: Sequence[str], *, limit: int, layer: int = -1) -> tuple[Tensor, Tensor]:
    """States (B, limit, D) behind a `layer`, and which tokens are the text's (B, limit): 1, those of the padding 0."""
    given = tokenizer(list(texts), padding="max_length", truncation=True, max_length=limit, return_tensors="pt")
    given = given.to(encoder.device)
    inner = layer != -1  # else the states behind all layers need not be kept
    output = encoder(given.input_ids, attention_mask=given.attention_mask, output_hidden_states=inner, use_cache=False)
    return output.hidden_states[layer] if inner else output.last_hidden_state, given.attention_mask


def tiny_tokenizer() -> Any:
    """A tokenizer that knows printable characters and bytes alone."""
    from transformers import GemmaTokenizer

    characters = ["▁", *(chr(c) for c in range(33, 127)), *(f"<0x{byte:02X}>" for byte in range(256))]
    entries = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *characters]
    return GemmaTokenizer(vocab={entry: i for i, entry in enumerate(entries)}, add_bos_token=True)


def tiny(tokenizer: Any) -> Any:
    """A random language model of width 16."""
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=16,
            query_pre_attn_scalar=16,
        )
    )
