"""What families share whose backbone is a diffusers U-Net on a VAE's latents, told a caption by CLIP."""

import functools
from typing import Any

from lorakit.diffusion import GaussianDiffusion
from lorakit.families import base, clip, folders, vae
from lorakit.families.protocol import Description
from lorakit.families.source import Source

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")


def process(model: Source) -> GaussianDiffusion:
    return GaussianDiffusion.from_scheduler_config(model.config("scheduler", base.SCHEDULER))


def describe(model: Source, family: type[Any], *, pooled: int = 0) -> Description:
    """The description of the `model`, whose captions are a state for each token and `pooled` numbers."""
    factor = vae.factor(model.folder)
    channels = model.config("vae")["latent_channels"]
    tokenizer = clip.load_tokenizer(model.folder / "tokenizer")
    width = sum(model.config(part)["hidden_size"] for part in family.text_encoders)
    return Description(
        side_multiple=factor,
        drawing_multiple=vae.drawing_multiple(factor),
        resolution=factor * model.config("unet")["sample_size"],
        token_limit=tokenizer.model_max_length,
        process=process(model),
        count_tokens=functools.partial(clip.count_tokens, tokenizer),
        backbone=family.backbone,
        default_targets=family.default_targets,
        lora_prefixes=family.lora_prefixes,
        weight_shapes=lambda component: folders.weight_shapes(model.folder / component),
        latent_size=lambda width, height: channels * (width // factor) * (height // factor),
        text_size=tokenizer.model_max_length * width + pooled,
    )
