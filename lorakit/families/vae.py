"""The autoencoder of latent diffusion (Rombach et al., arXiv:2112.10752): its numbers, and pixels to latents."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.families import folders


def factor(folder: Path) -> int:
    """Pixels to a latent, along each side."""
    config = folders.read_config(folder, "vae")
    # one of films says of each halving whether it halves their time too (diffusers spells it so)
    if halvings := config.get("temperal_downsample"):
        return 2 ** len(halvings)
    return 2 ** (len(config.get("encoder_block_out_channels") or config["block_out_channels"]) - 1)


def drawing_multiple(factor: int) -> int:
    return math.lcm(factor, 8)  # stock pipelines of U-Nets ask for 8, whatever the VAE is


def load(folder: Path, kind: Any = None) -> Any:
    """The VAE, in fp32 and to stay so: Stable Diffusion XL's overflows in fp16, and pictures are encoded but once.

    It is an AutoencoderKL where no `kind` is said.
    """
    from diffusers import AutoencoderKL

    vae = folders.load_component(kind or AutoencoderKL, folder / "vae")
    decode = vae.decode
    # stock pipelines hand over latents in the backbone's precision
    vae.decode = lambda z, *args, **kwargs: decode(z.float(), *args, **kwargs)
    return vae


@torch.no_grad()
def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) in -1 … 1 to the posterior's mean as backbones take it: (B, C, H/f, W/f). Films are (B, 3, T,
    H, W), and so are their latents.

    (z - shift) · scale, or (z - mean) · scale / std where the configuration has these, a number for each channel.
    """
    z, config = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mean, vae.config
    if config.latents_mean is None or config.latents_std is None:
        return (z - (config.shift_factor or 0.0)) * config.scaling_factor
    mean, std = (torch.tensor(x).view(-1, *[1] * (z.ndim - 2)).to(z) for x in (config.latents_mean, config.latents_std))
    return (z - mean) * config.get("scaling_factor", 1.0) / std


def tiny(kind: Any = None, *, levels: int = 3, **more: Any) -> Any:
    """A random one of factor 2^(levels - 1), with `more` of its configuration; `kind` as in `load`."""
    from diffusers import AutoencoderKL

    return (kind or AutoencoderKL)(
        block_out_channels=(*(8,) * (levels - 1), 16),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=32,
        **({} if kind else {"scaling_factor": 0.7}),
        **more,
    )
