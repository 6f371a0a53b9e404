"""What is trained in the measurements: a base of a model's shape, photographs, and the recipe over both."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lorakit.core.embedded import embedded

SCRIPTS = Path(__file__).parents[1]
RANK = 8


@dataclass(frozen=True)
class Shape:
    """A base that `make_random_sd.py` makes (or the embedded one), trained on pictures of `side` pixels."""

    made: tuple[str, ...]
    side: int


SHAPES = {
    "embedded": Shape((), 64),
    "tiny": Shape(("--size", "tiny"), 64),  # to try the scripts
    "sd-small": Shape(("--size", "small"), 256),
    "sd15": Shape(("--size", "full"), 512),
    "sdxl": Shape(("--model", "sdxl", "--size", "full"), 1024),
    "flux": Shape(("--model", "flux", "--size", "full"), 1024),
}
RECIPE = """
[model]
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
    if not shape.made:
        return embedded("base")
    made = folder / name
    if not made.exists():
        dtype = "bf16" if "full" in shape.made else "fp32"
        command = [sys.executable, str(SCRIPTS / "make_random_sd.py"), "--out", str(made), "--dtype", dtype]
        subprocess.run([*command, *shape.made], check=True, stdout=subprocess.DEVNULL)
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


def recipe(file: Path, *, base: Path, photos: Path, cache: Path, side: int, batch: int) -> Path:
    """Writes the recipe of a run beside `file`."""
    output = file.with_suffix("")
    file.write_text(
        RECIPE.format(base=base, rank=RANK, photos=photos, cache=cache, side=side, output=output, batch=batch)
    )
    return file
