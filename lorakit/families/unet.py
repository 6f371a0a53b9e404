"""What families share whose backbone is a diffusers U-Net on a VAE's latents, told a caption by CLIP."""

import functools
from pathlib import Path
from typing import Any

from lorakit.diffusion import GaussianDiffusion
from lorakit.families import clip, folders, vae
from lorakit.families.protocol import Description

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")


def describe(folder: Path, family: type[Any], *, pooled: int = 0) -> Description:
    """The description of the model in `folder`, whose captions are a state for each token and `pooled` numbers."""
    factor = vae.factor(folder)
    channels = folders.read_config(folder, "vae")["latent_channels"]
    tokenizer = clip.load_tokenizer(folder / "tokenizer")
    width = sum(folders.read_config(folder, part)["hidden_size"] for part in family.text_encoders)
    scheduler = folders.read_config(folder, "scheduler", "scheduler_config.json")
    return Description(
        side_multiple=factor,
        drawing_multiple=vae.drawing_multiple(factor),
        resolution=factor * folders.read_config(folder, "unet")["sample_size"],
        token_limit=tokenizer.model_max_length,
        process=GaussianDiffusion.from_scheduler_config(scheduler),
        count_tokens=functools.partial(clip.count_tokens, tokenizer),
        backbone=family.backbone,
        default_targets=family.default_targets,
        lora_prefixes=family.lora_prefixes,
        weight_shapes=lambda component: folders.weight_shapes(folder / component),
        latent_size=lambda width, height: channels * (width // factor) * (height // factor),
        text_size=tokenizer.model_max_length * width + pooled,
    )
