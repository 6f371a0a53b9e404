"""Qwen's tokens and states: what families share whose captions are read by a language model of the Qwen series."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lorakit.core.errors import InputError
from lorakit.core.types import Text

# a message of a user, and the answer's beginning; where the model is not to think, it has done so already
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def as_message(tokenizer: Any, caption: str, *, thinking: bool) -> str:
    """`caption` as what a user says to the model, before its answer."""
    message = [{"role": "user", "content": caption}]
    said = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
    return str(said)


def count_tokens(tokenizer: Any, wrap: Callable[[str], str], caption: str) -> int:
    """How many tokens a caption has in what `wrap` makes of it, before it is cut."""
    return len(tokenizer(wrap(caption), truncation=False, verbose=False).input_ids)


def refuse_weights(family: str, *, weighted: bool) -> None:
    if weighted:
        raise InputError(
            f"data.weighted_tags: captions of {family} are read by a language model, whose states no weights are put "
            "on: set it to false, or choose another family."
        )


def padded(states: Sequence[Tensor]) -> Text:
    """{"states": (B, L, D), "lengths": (B,)} of captions (Lᵢ, D): zeros follow the shorter ones."""
    lengths = torch.tensor([len(of_caption) for of_caption in states], device=states[0].device)
    return {"states": pad_sequence(list(states), batch_first=True), "lengths": lengths}


def tiny_tokenizer(folder: Path, *, words: Sequence[str] = ()) -> Any:
    """A tokenizer that knows bytes, the marks of a chat, and `words`."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    entries = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({entry: i for i, entry in enumerate(entries)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = Qwen2Tokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=_TEMPLATE,
    )
    tokenizer.add_tokens(list(words))
    return tokenizer


def tiny_config(tokenizer: Any, *, layers: int = 3) -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
