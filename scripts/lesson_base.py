"""What the sections of docs/latent-diffusion.md share: the embedded base, and how much of it is shown."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import figures
import scenes
import torch
from PIL import Image
from torch import Tensor

from lorakit import families
from lorakit.adapters import AdapterState, load_adapter_state
from lorakit.core.seeding import generator
from lorakit.core.types import Text
from lorakit.diffusion import GaussianDiffusion
from lorakit.evaluation.judge import Judge, pixels_of
from lorakit.export import read_adapter

SIDE, NBSP = 64, "\u00a0"
SHOWN = scenes.Scene("house", "red", "blue")


class Effort(NamedTuple):
    """How much is drawn: the pictures that means and scores are taken over, steps, and what the rows go through."""

    drawings: int = 64
    prompts: int = 48
    steps: int = 20
    step_counts: tuple[int, ...] = (1, 2, 5, 10, 20)
    ancestral: int = 1000
    scales: tuple[float, ...] = (1, 2, 4, 6, 8, 12)
    weights: tuple[float, ...] = (0, 0.25, 0.5, 0.75, 1, 1.25)


QUICK = Effort(drawings=2, prompts=1, steps=1, step_counts=(1,), ancestral=1, scales=(4,), weights=(1,))


@dataclass(frozen=True)
class Section:
    """What a section of the page shows: pictures by their files' names, and the numbers of its text, as written."""

    pictures: dict[str, Image.Image] = field(default_factory=dict)
    numbers: dict[str, str] = field(default_factory=dict)


class Model:
    """The embedded base, as the lesson speaks to it; `learned` is an adapter, in effect `weight` times."""

    def __init__(self, effort: Effort, adapter: Path | AdapterState, *, weight: float = 0.0) -> None:
        self.effort = effort
        self.family: Any = families.load("sd", "embedded")
        self.process: GaussianDiffusion = self.family.process
        learned = adapter if isinstance(adapter, AdapterState) else read_adapter(adapter, family=self.family)
        self.learned: AdapterState = learned
        if weight:
            load_adapter_state(self.family.components, learned, weight=weight)

    def with_adapter(self, weight: float) -> "Model":
        return Model(self.effort, self.learned, weight=weight)

    def encode(self, pictures: Sequence[Image.Image]) -> Tensor:
        return self.family.encode_images(torch.cat([pixels_of(picture) for picture in pictures]) * 2 - 1)

    def decode(self, latents: Tensor) -> list[Image.Image]:
        vae, parts = self.family.vae, latents.split(16)
        return [figures.rgb(pixels) for z in parts for pixels in vae.decode(z / vae.config.scaling_factor).sample]

    def noise(self, count: int, purpose: str) -> Tensor:
        shape = (count, *self.family.latent_shape(SIDE, SIDE))
        return torch.randn(shape, generator=generator("latent diffusion", purpose))

    def text(self, captions: Sequence[str]) -> Text:
        return self.family.encode_text(captions)

    def predict(self, x_t: Tensor, t: Tensor, captions: Sequence[str]) -> Tensor:
        """The U-Net's answer: v."""
        return self.family.predict(x_t, t, self.text(captions))

    def guided(
        self, captions: Sequence[str], *, scale: float, negative: str = ""
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """predict(empty) + scale · (predict(text) - predict(empty)), as a function of x_t and t."""
        states = torch.cat([self.text([negative] * len(captions))["states"], self.text(captions)["states"]])

        def predict(x_t: Tensor, t: Tensor) -> Tensor:
            both = self.family.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), {"states": states})
            without, given = both.chunk(2)
            return without + scale * (given - without)

        return predict

    def draw(
        self, captions: Sequence[str], x_T: Tensor, *, scale: float = 4.0, negative: str = "", **loop: Any
    ) -> list[Image.Image]:
        """Pictures at the end of the way back from x_T; `loop` is for `ddim_sample_loop`."""
        predict = self.guided(captions, scale=scale, negative=negative)
        *_, x0 = self.process.ddim_sample_loop(predict, x_T, **{"steps": self.effort.steps, **loop})
        return self.decode(x0)


def at(t: int, count: int = 1) -> Tensor:
    return torch.full((count,), t)


def drawings(count: int, seed: str) -> tuple[list[scenes.Scene], list[Image.Image]]:
    """Scenes of the base's world and their drawings; the base was trained on others."""
    rng = random.Random(seed)
    found = [scenes.random_scene(rng) for _ in range(count)]
    return found, [scenes.draw(scene, (SIDE, SIDE), rng) for scene in found]


def prompts(count: int, seed: str) -> list[dict[str, str]]:
    """Captions of the base's world and what they ask for, as data/mascot/prompts.json has them."""
    return [{"prompt": scene.caption, **vars(scene)} for scene in drawings(count, seed)[0]]


def share_right(judge: Judge, asked: Sequence[Mapping[str, str]], pictures: Sequence[Image.Image]) -> float:
    """The share of pictures in which the judge finds shape, colour and background, where they are asked for."""
    right = [
        all(getattr(verdict, key) == wanted[key] for key in ("background", "colour", "shape") if key in wanted)
        for verdict, wanted in zip(judge.look(pictures), asked)
    ]
    return sum(right) / len(right)


def percent(share: float) -> str:
    return f"{100 * share:.0f}{NBSP}%"
