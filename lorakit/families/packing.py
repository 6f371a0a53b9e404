"""Latents as FLUX and its kin take them: a row of tokens, each a patch of 2 × 2, told their places beside it."""

import torch
from torch import Tensor

PATCH = 2


def pack(x: Tensor) -> Tensor:
    """(B, C, h, w) to tokens (B, h w / 4, 4 C), row by row; within one by channel, then row, then column."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // PATCH) * (width // PATCH), channels * PATCH**2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack` for latents of this size."""
    batch, _, size = tokens.shape
    x = tokens.reshape(batch, height // PATCH, width // PATCH, size // PATCH**2, PATCH, PATCH)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(batch, size // PATCH**2, height, width)


def places(x: Tensor) -> Tensor:
    """(0, row, column) of each token of latents (B, C, h, w): (h w / 4, 3)."""
    rows, columns = (torch.arange(side // PATCH, device=x.device, dtype=torch.float32) for side in x.shape[-2:])
    return torch.cartesian_prod(torch.zeros(1, device=x.device), rows, columns)
