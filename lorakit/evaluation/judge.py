"""A small network that says what is in a picture of the embedded base's world, and whether the mascot is.

It scores the base (scripts/score_base.py) and the demo (lorakit/verbs/demo.py). It knows drawn scenes and nothing else:
not a measure for photographs. Its weights lie in data/judge, made by scripts/make_judge.py.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from lorakit.core.embedded import embedded
from lorakit.core.errors import InputError

SIDE = 64
WIDTHS = (24, 48, 64, 96)


@dataclass(frozen=True)
class Classes:
    """What the judge can name; the last of `colours` and of `shapes` are the mascot's."""

    backgrounds: tuple[str, ...]
    colours: tuple[str, ...]
    shapes: tuple[str, ...]


@dataclass(frozen=True)
class Scores:
    """Logits of `background` (B, backgrounds), `colour` (B, colours), `shape` (B, shapes) and `traces` (B,)."""

    background: Tensor
    colour: Tensor
    shape: Tensor
    traces: Tensor


@dataclass(frozen=True)
class Verdict:
    """What is in one picture.

    `subject` is the probability that the object is the mascot; `traces` that anything of the mascot shows, be it one of
    its colours or one of its horns on another shape.
    """

    background: str
    colour: str
    shape: str
    subject: float
    traces: float


def square(pixels: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) with their longer side scaled to 64 and the shorter one padded with its own edge.

    Stretching would turn circles into ovals; the edge is background in this world.
    """
    height, width = pixels.shape[-2:]
    if max(height, width) != SIDE:
        scale = SIDE / max(height, width)
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
        height, width = size
    left, top = (SIDE - width) // 2, (SIDE - height) // 2
    return F.pad(pixels, (left, SIDE - width - left, top, SIDE - height - top), mode="replicate")


def pixels_of(picture: Image.Image) -> Tensor:
    """A picture as (1, 3, H, W) in 0 … 1."""
    array = np.array(picture.convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255


class Judge(nn.Module):
    """Four strided convolutions, the mean and the maximum over what is left, and a linear head for each question."""

    def __init__(self, classes: Classes) -> None:
        super().__init__()
        self.classes = classes
        layers: list[nn.Module] = []
        channels = 3
        for width in WIDTHS:
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)]
            layers += [nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*layers)
        self.sizes = (len(classes.backgrounds), len(classes.colours), len(classes.shapes), 1)
        self.heads = nn.Linear(2 * channels, sum(self.sizes))

    def forward(self, pixels: Tensor) -> Scores:
        """Scores of pictures (B, 3, 64, 64) in 0 … 1."""
        features = self.features(pixels * 2 - 1)
        pooled = torch.cat([features.mean((2, 3)), features.amax((2, 3))], dim=1)
        background, colour, shape, traces = self.heads(pooled).split(self.sizes, dim=1)
        return Scores(background, colour, shape, traces[:, 0])

    @torch.no_grad()
    def look(self, pictures: Tensor | Sequence[Image.Image]) -> list[Verdict]:
        """What is in each of `pictures`: PIL pictures of any sizes, or a tensor (B, 3, H, W) in 0 … 1."""
        if isinstance(pictures, Tensor):
            ready = square(pictures.float())
        elif pictures:
            ready = torch.cat([square(pixels_of(picture)) for picture in pictures])
        else:
            return []
        was_training = self.training
        self.eval()
        device = self.heads.weight.device
        verdicts = [v for part in ready.split(64) for v in self._verdicts(self(part.to(device)))]
        self.train(was_training)
        return verdicts

    def _verdicts(self, scores: Scores) -> list[Verdict]:
        answers = (scores.background, scores.colour, scores.shape)
        background, colour, shape = (logits.argmax(1).tolist() for logits in answers)
        subject, traces = scores.shape.softmax(1)[:, -1].tolist(), scores.traces.sigmoid().tolist()
        names = self.classes
        return [
            Verdict(names.backgrounds[b], names.colours[c], names.shapes[s], p, q)
            for b, c, s, p, q in zip(background, colour, shape, subject, traces, strict=True)
        ]


def load_judge(folder: Path | None = None) -> Judge:
    """The judge in `folder` (without one: the shipped one), ready to look.

    Raises InputError when its files are missing.
    """
    from safetensors.torch import load_file

    folder = embedded("judge") if folder is None else folder
    missing = [name for name in ("judge.json", "judge.safetensors") if not (folder / name).is_file()]
    if missing:
        raise InputError([f"{folder / name} is missing: make it with scripts/make_judge.py" for name in missing])
    about = json.loads((folder / "judge.json").read_text())
    judge = Judge(Classes(*(tuple(about[key]) for key in ("backgrounds", "colours", "shapes"))))
    tensors = load_file(folder / "judge.safetensors")
    judge.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in tensors.items()})
    return judge.eval()
