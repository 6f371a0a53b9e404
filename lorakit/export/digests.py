"""Digests of adapters: of the weights alone, as other programs write it, and ours, of all that an adapter does.

A reader that finds ours compares it, so that a file whose weights or alphas have changed is not taken for the one that
was trained. Titles and other notes may change: they are not in it.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lorakit.core.files import sha256_file, split_safetensors

DIGEST = "lorakit.digest"


def data_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of a file's bytes after its header, kohya's `sshs_model_hash`: the same whatever the metadata says."""
    return hashlib.sha256(split_safetensors(tensors)[1]).hexdigest()


def adapter_digest(tensors: Iterable[tuple[str, Tensor]], alphas: Mapping[str, float | None]) -> str:
    """sha256 of names, number formats, shapes and bytes of `tensors`, in this order, and of the alphas by layer."""
    found = hashlib.sha256()
    for key, tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        found.update(f"{key}\x1f{tensor.dtype}\x1f{list(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    for layer in sorted(alphas):
        found.update(f"{layer}\x1f{alphas[layer]!r}\n".encode())
    return found.hexdigest()


def path_digest(path: Path) -> str:
    """sha256 of a file, or of the names and digests of a folder's files."""
    if path.is_file():
        return sha256_file(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = [f"{sha256_file(file)}  {file.relative_to(path).as_posix()}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
