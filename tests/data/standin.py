"""Pictures held in memory that look like a dataset: what the report, the sheet and the page ask for, and no more."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from lorakit.core.types import Example, Place
from lorakit.data.buckets import Bucket, BucketSettings, assign, make_buckets
from lorakit.data.cut import Cut, covering, crop_info, offset
from lorakit.data.images import Prepared
from lorakit.data.sources import SourceSettings


def source(**changes: Any) -> SourceSettings:
    """A source's settings."""
    return SourceSettings(**{"path": "/home/somebody/photos", **changes})


@dataclass
class Held:
    """A dataset of `images`, whose keys and captions are given or made up."""

    images: Sequence[Image.Image]
    keys: Sequence[str] = ()
    captions: Sequence[str] = ()
    roles: Sequence[str] = ()
    sources: Sequence[Any] = field(default_factory=lambda: [source()])
    resolution: int = 64
    masks: dict[int, Image.Image] = field(default_factory=dict)
    anchor: tuple[float, float] = (0.5, 0.5)
    extra_captions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.settings = SimpleNamespace(sources=self.sources, buckets=BucketSettings(resolution=self.resolution))
        self.buckets = make_buckets(self.settings.buckets, side_multiple=8)
        self.examples = [
            Example(
                key=self.keys[i] if self.keys else f"0/{i:03d}.png",
                source=0,
                place=Place(f"{i}"),
                captions=(self.captions[i] if self.captions else f"picture number {i}",),
                size=image.size,
                digest=f"{i:064d}",
                role=self.roles[i] if self.roles else "train",
                mask=Place("mask") if i in self.masks else None,
            )
            for i, image in enumerate(self.images)
        ]

    def buckets_of(self, index: int) -> tuple[Bucket, ...]:
        return (assign(self.examples[index].size, self.buckets),)

    def cuts_of(self, index: int) -> tuple[Cut, ...]:
        return tuple(Cut(bucket, self.anchor) for bucket in self.buckets_of(index))

    def captions_of(self, index: int) -> tuple[str, ...]:
        return (*self.examples[index].captions, *self.extra_captions)

    def read(self, index: int) -> bytes:
        return self.images[index].tobytes()

    def picture(self, index: int, cut: Cut) -> Prepared:
        image = self.images[index].convert("RGB")
        mask = self.masks.get(index)
        of_mask = None if mask is None else torch.from_numpy(_cropped(mask.convert("L"), cut) / 255.0)[None].float()
        pixels = torch.from_numpy(_cropped(image, cut)).permute(2, 0, 1).float() / 127.5 - 1
        return Prepared(pixels, crop_info(image.size, cut), of_mask)


def _cropped(image: Image.Image, cut: Cut) -> np.ndarray[Any, Any]:
    left, top = offset(image.size, cut)
    resized = image.resize(covering(image.size, cut.bucket), Image.Resampling.BILINEAR)
    return np.array(resized.crop((left, top, left + cut.bucket.width, top + cut.bucket.height)))
