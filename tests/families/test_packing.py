"""lorakit/families/packing.py: tokens and their places are those of the stock pipeline."""

import torch

from lorakit.families import packing


def test_tokens_and_places_are_the_stock_pipelines() -> None:
    from diffusers import FluxPipeline

    x = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    tokens = FluxPipeline._pack_latents(x, 2, 3, 8, 12)
    assert torch.equal(packing.pack(x), tokens)
    assert torch.equal(packing.unpack(tokens, 8, 12), x)
    assert torch.equal(packing.places(x), FluxPipeline._prepare_latent_image_ids(2, 4, 6, x.device, x.dtype))


def test_a_token_is_a_patch_by_channel_row_and_column() -> None:
    x = torch.arange(2 * 2 * 4).reshape(1, 2, 2, 4)
    assert packing.pack(x).tolist() == [[[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]]
