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


def kind(said: Any = None) -> Any:
    """A VAE's class: AutoencoderKL where none is said."""
    from diffusers import AutoencoderKL

    return said or AutoencoderKL


def load(path: Path, said: Any = None, *, config: Path | None = None) -> Any:
    """The VAE in a folder, or in a single file with its configuration in the folder `config`, of this `kind`."""
    if path.is_file():
        return decoding_in_fp32(folders.load_from_file(kind(said), path, config or path.parent))
    return decoding_in_fp32(folders.load_component(kind(said), path))


def decoding_in_fp32(vae: Any) -> Any:
    """`vae` in fp32 and to stay so: Stable Diffusion XL's overflows in fp16, and pictures are encoded but once."""
    decode = vae.float().decode
    # stock pipelines hand over latents in the backbone's precision
    vae.decode = lambda z, *args, **kwargs: decode(z.float(), *args, **kwargs)
    return vae


def tile(vae: Any, side: int) -> None:
    """Makes `vae` take pictures larger than `side` pixels in tiles of that size."""
    if hasattr(vae, "tile_latent_min_size"):
        vae.enable_tiling()
        vae.tile_latent_min_size = side * vae.tile_latent_min_size // vae.tile_sample_min_size
        vae.tile_sample_min_size = side
    else:  # of films, and of deep compression: tiles begin each three quarters of a side
        step = side * 3 // 4
        vae.enable_tiling(
            tile_sample_min_height=side,
            tile_sample_min_width=side,
            tile_sample_stride_height=step,
            tile_sample_stride_width=step,
        )


@torch.no_grad()
def posterior_mean(vae: Any, pixels: Tensor) -> Tensor:
    """The posterior's mean of pixels (B, 3, H, W) in -1 … 1, which is its mode too, as the VAE has it."""
    found: Tensor = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mean
    return found


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) in -1 … 1 to the posterior's mean as backbones take it: (B, C, H/f, W/f). Films are (B, 3, T,
    H, W), and so are their latents.

    (z - shift) · scale, or (z - mean) · scale / std where the configuration has these, a number for each channel.
    """
    z, config = posterior_mean(vae, pixels), vae.config
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
