"""What families share whose backbone is a diffusers transformer on patches of latents, mostly for a flow."""

from collections.abc import Callable
from typing import Any, TypeVar

from lorakit.core.errors import InputError
from lorakit.core.files import printable
from lorakit.core.types import Process
from lorakit.diffusion import GaussianDiffusion, RectifiedFlow
from lorakit.families import base, folders
from lorakit.families.protocol import Description
from lorakit.families.source import Source

# attention between picture and text, and of the picture alone, as in diffusers' DreamBooth examples for SD 3 and FLUX
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
P = TypeVar("P", GaussianDiffusion, RectifiedFlow)


def process(model: Source, *, patch: int = 2) -> RectifiedFlow:
    """The flow that the scheduler of the `model` describes; InputError where it describes none.

    Its transformer takes latents in patches of `patch` × `patch`.
    """
    return _of_scheduler(model, RectifiedFlow, patch=patch)


def gaussian(model: Source) -> GaussianDiffusion:
    """The same where it is no flow."""
    return _of_scheduler(model, GaussianDiffusion)


def _of_scheduler(model: Source, kind: type[P], **more: Any) -> P:
    try:
        return kind.from_scheduler_config(model.config("scheduler", base.SCHEDULER), **more)
    except ValueError as error:
        raise InputError(f"{printable(model.folder / 'scheduler' / base.SCHEDULER)}: {error}.") from None


def describe(
    model: Source,
    family: type[Any],
    *,
    factor: int,
    channels: int,
    patch: int,
    resolution: int,
    token_limit: int,
    count_tokens: Callable[[str], int],
    text_size: int,
    own_process: Process | None = None,
) -> Description:
    """The description of the `model`; for what is not said here see `Description`.

    Its latents have `channels`, are of `factor` pixels a side, and are taken in patches of `patch` × `patch`. Its
    process is the flow that its scheduler describes, or `own_process`.
    """
    return Description(
        side_multiple=factor * patch,
        drawing_multiple=factor * patch,
        resolution=resolution,
        process=own_process or process(model, patch=patch),
        token_limit=token_limit,
        count_tokens=count_tokens,
        backbone=family.backbone,
        default_targets=family.default_targets,
        lora_prefixes=family.lora_prefixes,
        weight_shapes=lambda component: folders.weight_shapes(model.folder / component),
        latent_size=lambda width, height: channels * (width // factor) * (height // factor),
        text_size=text_size,
    )
