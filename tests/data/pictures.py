"""Small pictures for the tests of lorakit.data, and folders of them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture like no other of another seed."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def folder_of(
    root: Path, sizes: Mapping[str, tuple[int, int]], *, caption: str | None = "a picture of {}", seed: int = 0
) -> Path:
    """`root` with a picture of each name and size, all different, and its caption beside it."""
    for i, (name, size) in enumerate(sizes.items(), seed):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(*size, i).save(path)
        if caption is not None:
            path.with_suffix(".txt").write_text(caption.format(path.stem))
    return root
