"""Pictures from a stock pipeline at fixed seeds, and what they say of themselves.

Which pipeline, with which adapters, is the caller's affair. Prompts with settings of their own: prompts.py; pictures to
draw over: canvas.py.
"""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import Field

from lorakit.core.errors import LorakitError
from lorakit.core.settings import Neutral, Settings
from lorakit.core.types import Process
from lorakit.families.protocol import classifier_free


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
    image: Neutral[str | None] = None
    """A picture to draw over, at its own size where none is given: for models that are made for it."""
    mask: Neutral[str | None] = None
    """A picture that is white where an inpainting model is to paint."""
    image_guidance: Neutral[float | None] = Field(None, ge=1)
    """How close an editing model keeps to the picture; left out: the stock pipeline's own, 1.5. Of 1 on, its two
    guidances are used."""


@dataclass(frozen=True)
class Request:
    """One picture to draw; width and height in pixels, None for the model's own.

    Drawn over `image`, of these sizes, it starts at the share `strength` of the noise: 1 forgets it, 0 leaves it as it
    is. With a `mask` only what is white there is drawn, and the rest stays to the pixel. `image_guidance` is how close
    an editing model keeps to it; None: as its pipeline has it.
    """

    prompt: str
    seed: int
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    image: Image.Image | None = None
    mask: Image.Image | None = None
    strength: float = 1.0
    image_guidance: float | None = None


def requests(settings: SampleSettings) -> list[Request]:
    return [
        Request(prompt, settings.seed + i, settings.negative_prompt, settings.width, settings.height)
        for i, prompt in enumerate(settings.prompts)
    ]


def wrong_steps(name: str, steps: int, process: Process) -> list[str]:
    """What is wrong with a setting, for this process: of too few steps NaN would come in silence."""
    if steps < process.least_steps:
        return [f"{name} = {steps}: the model draws in {process.least_steps} steps or more."]
    if process.most_steps is not None and steps > process.most_steps:
        return [f"{name} = {steps}: the model draws in {process.most_steps} steps at most, the times that it knows."]
    return []


class Abandoned(LorakitError):
    """Drawing was given up because the caller wanted so."""


@torch.no_grad()
def draw(
    pipeline: Any,
    wanted: Sequence[Request],
    *,
    steps: int,
    guidance: float,
    guided: Callable[[float, str], Mapping[str, Any]] = classifier_free,
    abandon: Callable[[], bool] = lambda: False,
) -> list[Image.Image]:
    """One picture for each request, drawn one by one so that no picture depends on its neighbours.

    `guided` puts scale and negative prompt as the pipeline has them. Latents are drawn on the CPU, so that a seed means
    the same picture on any device. Raises Abandoned as soon as `abandon` says so, which is asked before each picture
    and, by pipelines that let us, after each denoising step.
    """

    def go_on(*step: Any) -> dict[str, Any]:
        if abandon():
            raise Abandoned
        return {}

    takes = inspect.signature(pipeline).parameters
    asked = {"callback_on_step_end": go_on} if "callback_on_step_end" in takes else {}
    pictures = []
    for request in wanted:
        go_on()
        result = pipeline(
            prompt=request.prompt,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(request.seed),
            **guided(guidance, request.negative_prompt),
            **{name: value for name, value in _frame(request, pipeline).items() if name in takes},
            **asked,
        )
        pictures.append(_kept(result.images[0], request))
    return pictures


def _frame(request: Request, pipeline: Any) -> dict[str, Any]:
    """What a pipeline is told of the picture's size and of what it is drawn over."""
    size = {"width": request.width, "height": request.height}
    unet = getattr(pipeline, "unet", None)
    if unet is not None and (request.width or request.height):  # of one side alone a pipeline for SD takes no notice
        own = unet.config.sample_size * pipeline.vae_scale_factor
        size = {name: side or own for name, side in size.items()}
    if request.image is None:
        return size
    masked = {"mask_image": request.mask} if request.mask is not None else {}
    kept = {"image_guidance_scale": request.image_guidance} if request.image_guidance is not None else {}
    return {**size, **masked, **kept, "image": request.image, "strength": request.strength}


def _kept(picture: Image.Image, request: Request) -> Image.Image:
    """`picture` with what was not to be drawn as it was: the pipeline has sent that through the VAE too."""
    if request.image is None or request.mask is None:
        return picture
    return Image.composite(picture, request.image, request.mask)


def label(request: Request, picture: Image.Image, **settings: Any) -> PngInfo:
    """The text, JSON under the key "lorakit", by which a PNG file says how it was drawn; `settings` hold no path."""
    entries = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
        "width": picture.width,
        "height": picture.height,
        **({"strength": request.strength} if request.image is not None else {}),
        **({"image_guidance": request.image_guidance} if request.image_guidance is not None else {}),
        **settings,
    }
    text = PngInfo()
    # an argument may hold half a character that UTF-8 cannot
    text.add_itxt("lorakit", json.dumps(entries, ensure_ascii=False).encode(errors="backslashreplace").decode())
    return text
