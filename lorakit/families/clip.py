"""CLIP's tokens and the names of its text model's layers: what families with CLIP text encoders share."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
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
    tokenizer: Any, captions: Sequence[str], *, weighted: bool, limit: int | None = None, chunks: int = 1
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Token numbers, attention mask and, if `weighted`, weights, each (B, L); padded and cut as by stock pipelines.

    L is the `limit`, or the tokenizer's own. With several `chunks` a caption is cut only at the end of the last, and
    each chunk of it is a row of L tokens with a start and an end of its own, (B · chunks, L): see `joined`.
    """
    limit = limit or long_limit(tokenizer, chunks)
    if weighted:
        found = emphasis.weighted_tokens(tokenizer, captions, limit=limit)
    else:
        given = tokenizer(list(captions), padding="max_length", truncation=True, max_length=limit, return_tensors="pt")
        found = given.input_ids, given.attention_mask, torch.ones(given.input_ids.shape)
    ids, present, weights = found if chunks == 1 else _chunked(tokenizer, *found, chunks=chunks)
    return ids, present, weights if weighted else None


def long_limit(tokenizer: Any, chunks: int) -> int:
    """How many tokens a caption in so many chunks may have, its start and end included."""
    return int(tokenizer.model_max_length - 2) * chunks + 2


def joined(x: Tensor, chunks: int) -> Tensor:
    """(B · chunks, L, …) of captions' chunks to (B, chunks · L, …), as A1111 and ComfyUI join them."""
    return x.reshape(-1, chunks * x.shape[1], *x.shape[2:])


def _chunked(
    tokenizer: Any, ids: Tensor, present: Tensor, weights: Tensor, *, chunks: int
) -> tuple[Tensor, Tensor, Tensor]:
    size = tokenizer.model_max_length
    shape = (len(ids) * chunks, size)
    parts = torch.full(shape, tokenizer.pad_token_id), torch.zeros(shape, dtype=present.dtype), torch.ones(shape)
    for row in range(shape[0]):
        caption, number = divmod(row, chunks)
        first, end = 1 + number * (size - 2), int(present[caption].sum()) - 1
        own = slice(first, max(first, min(first + size - 2, end)))
        count = own.stop - own.start
        start, stop = torch.tensor([tokenizer.bos_token_id]), torch.tensor([tokenizer.eos_token_id])
        parts[0][row, : count + 2] = torch.cat([start, ids[caption, own], stop])
        parts[1][row, : count + 2] = 1
        parts[2][row, 1 : count + 1] = weights[caption, own]
    return parts


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
