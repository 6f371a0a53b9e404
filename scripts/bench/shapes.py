"""What is trained in the measurements: a base of a model's shape, photographs, and the recipe over both."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lorakit.core.embedded import embedded

RANK = 8


@dataclass(frozen=True)
class Shape:
    """A base of `size` that `make_random_sd.py` makes, None: the embedded one; pictures have `side` pixels a side."""

    size: str | None
    side: int
    family: str = "sd"


SHAPES = {
    "embedded": Shape(None, 64),
    "tiny": Shape("tiny", 64),  # these to try the scripts
    "tiny-sdxl": Shape("tiny", 64, "sdxl"),
    "tiny-flux": Shape("tiny", 64, "flux"),
    "sd-small": Shape("small", 256),
    "sd15": Shape("full", 512),
    "sdxl": Shape("full", 1024, "sdxl"),
    "flux": Shape("full", 1024, "flux"),
}
RECIPE = """
[model]
family = "{family}"
path = "{base}"
[adapter]
rank = {rank}
[[data.sources]]
path = "{photos}"
[data]
cache = "{cache}"
[data.buckets]
resolution = {side}
[run]
output = "{output}"
batch_size = {batch}
save_every = 0
"""


def base(name: str, folder: Path) -> Path:
    """The base of shape `name`, made below `folder` if it is not there yet."""
    shape = SHAPES[name]
    if shape.size is None:
        return embedded("base")
    made = folder / name
    if not made.exists():
        import torch
        from make_random_sd import make  # seconds

        dtype = torch.bfloat16 if shape.size == "full" else torch.float32
        make(made, model=shape.family, size=shape.size, seed=0, dtype=dtype)
    return made


def photos(folder: Path, *, side: int, count: int) -> Path:
    """`count` JPEGs of twice the side and captions: smooth, as photographs are, and of nothing."""
    made = folder / f"photos-{side}-{count}"
    if not made.exists():
        made.mkdir(parents=True)
        for i in range(count):
            noise = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((2 * side, 2 * side), Image.Resampling.BICUBIC).save(made / f"{i:03}.jpg")
            (made / f"{i:03}.txt").write_text(f"a photo of a dog, {i}\n")
    return made


def pictures(folder: Path, *, side: int, count: int) -> Path:
    """The same photographs with their captions in metadata.jsonl, as `datasets` reads a folder."""
    made = folder / f"pictures-{side}-{count}"
    if not made.exists():
        made.mkdir()
        lines = []
        for file in sorted(photos(folder, side=side, count=count).glob("*.jpg")):
            (made / file.name).hardlink_to(file)
            lines.append(json.dumps({"file_name": file.name, "text": file.with_suffix(".txt").read_text().strip()}))
        (made / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return made


def recipe(name: str, file: Path, *, bases: Path, cache: Path, count: int, batch: int) -> Path:
    """Writes to `file` the recipe of a run beside it, of shape `name` on so many photographs that lie beside it too."""
    shape = SHAPES[name]
    text = RECIPE.format(
        family=shape.family,
        base=base(name, bases),
        rank=RANK,
        photos=photos(file.parent, side=shape.side, count=count),
        cache=cache,
        side=shape.side,
        output=file.with_suffix(""),
        batch=batch,
    )
    file.write_text(text)
    return file
