"""Emphasis in captions, "(tag:1.3)": tokens of a caption with the weight that each has.

How captions are marked is `data/captions.py`'s affair; what a family does with weighted states is its own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorakit.data.captions import parse_weights


def weighted_tokens(tokenizer: Any, captions: Sequence[str], *, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token numbers, attention mask and weights, each (B, limit), of marked captions for the tokenizer of CLIP or T5.

    Each stretch of one weight is tokenised by itself; start, end and padding weigh 1. A caption without marks gets what
    the tokenizer gives it.
    """
    ids = torch.full((len(captions), limit), tokenizer.pad_token_id)
    present = torch.zeros_like(ids)
    weights = torch.ones(len(captions), limit)
    for row, caption in enumerate(captions):
        tokens = [] if tokenizer.bos_token_id is None else [(tokenizer.bos_token_id, 1.0)]
        for text, weight in parse_weights(caption):
            own = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
            tokens += [(token, weight) for token in own]
        tokens = [*tokens[: limit - 1], (tokenizer.eos_token_id, 1.0)]
        ids[row, : len(tokens)] = torch.tensor([token for token, _ in tokens])
        present[row, : len(tokens)] = 1
        weights[row, : len(tokens)] = torch.tensor([weight for _, weight in tokens])
    return ids, present, weights


def weigh(states: Tensor, weights: Tensor) -> Tensor:
    """`states` (B, L, D) times `weights` (B, L), brought back to the root mean square that they had.

    A1111 brings back the mean, which may be next to zero behind a layer norm: then the quotient means nothing.
    """
    weighted = states * weights[..., None].to(states)
    before, after = (x.float().square().mean(dim=(1, 2), keepdim=True) for x in (states, weighted))
    return weighted * (before / after).sqrt().to(states)
