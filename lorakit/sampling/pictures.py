"""Pictures from a stock pipeline at fixed seeds. Which pipeline, with which adapters, is the caller's affair."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from pydantic import Field

from lorakit.core.settings import Neutral, Settings


class SampleSettings(Settings):
    prompts: Neutral[list[str]] = []
    """What to draw during training."""
    negative_prompt: Neutral[str] = ""
    """What the guidance leads away from."""
    steps: Neutral[int] = Field(20, gt=0)
    """Denoising steps a picture."""
    guidance: Neutral[float] = Field(5.0, ge=0)
    """Scale of classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598); 1: off."""
    seed: Neutral[int] = Field(0, ge=0)
    """Seed of the first prompt; each further one takes the next."""
    width: Neutral[int | None] = Field(None, gt=0)
    """Pixels; the model's own size where not given."""
    height: Neutral[int | None] = Field(None, gt=0)
    """Pixels; the model's own size where not given."""


@dataclass(frozen=True)
class Request:
    """One picture to draw; width and height in pixels, None for the model's own."""

    prompt: str
    seed: int
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None


def requests(settings: SampleSettings) -> list[Request]:
    return [
        Request(prompt, settings.seed + i, settings.negative_prompt, settings.width, settings.height)
        for i, prompt in enumerate(settings.prompts)
    ]


class Abandoned(Exception):
    """Drawing was given up because the caller wanted so."""


@torch.no_grad()
def draw(
    pipeline: Any,
    wanted: Sequence[Request],
    *,
    steps: int,
    guidance: float,
    abandon: Callable[[], bool] = lambda: False,
) -> list[Image.Image]:
    """One picture for each request, drawn one by one so that no picture depends on its neighbours.

    Latents are drawn on the CPU, so that a seed means the same picture on any device. Raises Abandoned as soon as
    `abandon` says so, which is asked before each picture and, by pipelines that let us, after each denoising step.
    """

    def go_on(*step: Any) -> dict[str, Any]:
        if abandon():
            raise Abandoned
        return {}

    asked = {"callback_on_step_end": go_on} if "callback_on_step_end" in inspect.signature(pipeline).parameters else {}
    pictures = []
    for request in wanted:
        go_on()
        result = pipeline(
            request.prompt,
            negative_prompt=request.negative_prompt or None,
            num_inference_steps=steps,
            guidance_scale=guidance,
            width=request.width,
            height=request.height,
            generator=torch.Generator().manual_seed(request.seed),
            **asked,
        )
        pictures.append(result.images[0])
    return pictures
