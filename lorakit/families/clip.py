"""CLIP's tokens and the names of its text model's layers: what families with CLIP text encoders share."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakit.families import emphasis

TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
_OPEN_CLIP = {"encoder.layers.": "resblocks.", "self_attn": "attn", "fc1": "c_fc", "fc2": "c_proj"}
_ROWS = ("q_proj", "k_proj", "v_proj")


def load_tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)


def count_tokens(tokenizer: Any, caption: str) -> int:
    """How many tokens a caption has, start and end included, before it is cut."""
    return len(tokenizer(caption, truncation=False, verbose=False).input_ids)


def tokens(
    tokenizer: Any, captions: Sequence[str], *, weighted: bool, limit: int | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Token numbers, attention mask and, if `weighted`, weights, each (B, L); padded and cut as by stock pipelines.

    L is the `limit`, or the tokenizer's own.
    """
    limit = limit or tokenizer.model_max_length
    if weighted:
        return emphasis.weighted_tokens(tokenizer, captions, limit=limit)
    given = tokenizer(list(captions), padding="max_length", truncation=True, max_length=limit, return_tensors="pt")
    return given.input_ids, given.attention_mask, None


def published_name(path: str) -> str:
    """transformers 5.6 dropped `text_model.` from CLIPTextModel's names; every published adapter has it."""
    return path if path.startswith(("text_model.", "text_projection")) else f"text_model.{path}"


def single_file_key(path: str, prefix: str) -> tuple[str, int, int]:
    """Where a module's weight is in a single file that has transformers' names; see `protocol.SingleFile`."""
    return f"{prefix}.transformer.{published_name(path)}.weight", 0, 1


def open_clip_key(path: str, prefix: str) -> tuple[str, int, int]:
    """The same in a file with OpenCLIP's names, where q, k and v are the rows of one weight."""
    path = path.removeprefix("text_model.")
    for ours, theirs in _OPEN_CLIP.items():
        path = path.replace(ours, theirs)
    block, _, last = path.rpartition(".")
    if last in _ROWS:
        return f"{prefix}.model.transformer.{block}.in_proj_weight", _ROWS.index(last), len(_ROWS)
    return f"{prefix}.model.transformer.{path}.weight", 0, 1


def tiny_tokenizer(folder: Path, *, pad: str = "<|endoftext|>") -> Any:
    """A tokenizer of 16 tokens that knows printable characters alone."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(33, 127)]
    entries = letters + [c + "</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(exist_ok=True)
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({entry: i for i, entry in enumerate(entries)}))
    merges.write_text("#version: 0.2\n")
    return CLIPTokenizer(vocab=str(vocabulary), merges=str(merges), model_max_length=16, pad_token=pad)


def tiny_config(tokenizer: Any, *, width: int = 24, **more: Any) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )
