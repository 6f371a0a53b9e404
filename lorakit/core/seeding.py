"""Randomness by rule: what is random about a sample follows from (seed, number, purpose), never from a state."""

import hashlib

import torch


def hashed(*parts: object) -> int:
    """63 bits that depend on every part; parts are told apart by their text, so use ints and strings."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1


def generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded by a hash of `parts`.

    torch's CPU generator uses only the low 32 bits of its seed, so parts are hashed, never shifted together.
    """
    return torch.Generator().manual_seed(hashed(*parts))
