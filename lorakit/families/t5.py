"""T5's states (Raffel et al., arXiv:1910.10683): what families with a T5 text encoder share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakit.families import clip, emphasis


def load_tokenizer(folder: Path) -> Any:
    from transformers import T5TokenizerFast

    return T5TokenizerFast.from_pretrained(folder)


def encode(
    tokenizer: Any, encoder: Any, captions: Sequence[str], *, limit: int, masked: bool = False, weighted: bool = False
) -> tuple[Tensor, Tensor]:
    """States (B, limit, D) and which of the tokens are the caption's (B, limit); captions are padded, and cut at limit.

    If `masked` the caption's tokens see nothing of the padding, as some stock pipelines want it. `weighted`: see
    `emphasis`.
    """
    ids, present, weights = clip.tokens(tokenizer, captions, weighted=weighted, limit=limit)
    ids, present = ids.to(encoder.device), present.to(encoder.device)
    states = encoder(ids, attention_mask=present if masked else None).last_hidden_state
    return states if weights is None else emphasis.weigh(states, weights.to(states.device)), present


def with_limit(pipeline: Any, limit: int, **more: Any) -> Any:
    """`pipeline`, which now cuts prompts at `limit` tokens, and encodes them with `more`, whatever its call says."""
    encode_prompt, fixed = pipeline.encode_prompt, {"max_sequence_length": limit, **more}
    pipeline.encode_prompt = lambda *args, **given: encode_prompt(*args, **{**given, **fixed})
    return pipeline


def tiny_tokenizer() -> Any:
    """A tokenizer that knows printable characters alone."""
    from transformers import T5TokenizerFast

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((chr(c), -3.0) for c in range(33, 127))]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0)


def tiny(tokenizer: Any, *, width: int) -> Any:
    """A random encoder."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    )
