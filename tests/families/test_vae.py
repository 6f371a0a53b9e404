"""Pixels to latents: scaling in closed form, and the inverse of what the stock pipeline decodes."""

import pytest
import torch

from lorakit.families import sd3, sdxl, vae


@pytest.mark.parametrize("kind", ["scaled", "normalised", "shifted"])
def test_what_the_stock_pipeline_decodes_is_what_was_encoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = (sd3 if kind == "shifted" else sdxl).tiny().stock_pipeline()
    if kind == "normalised":
        pipeline.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[0.5, 1.5, 2.0, 3.0])
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = vae.encode(pipeline.vae, pixels)
    decoded: list[torch.Tensor] = []
    decode = pipeline.vae.decode
    monkeypatch.setattr(pipeline.vae, "decode", lambda z, **k: decoded.append(z) or decode(z, **k))
    monkeypatch.setattr(pipeline, "prepare_latents", lambda *args: latents)
    # no denoising: the scheduler hands back what it was given
    monkeypatch.setattr(pipeline.scheduler, "step", lambda noise, t, x, **k: (x,))
    pipeline("a", num_inference_steps=1, guidance_scale=1.0, width=32, height=32)
    with torch.no_grad():
        torch.testing.assert_close(decoded[0], pipeline.vae.encode(pixels).latent_dist.mean, rtol=1e-5, atol=1e-6)
    assert torch.equal(latents, vae.encode(pipeline.vae, pixels)), "the mean, not a draw"


def test_it_decodes_in_fp32_whatever_it_is_given() -> None:
    model = vae.load(sdxl.tiny().path / "vae")
    z = torch.ones(1, 4, 4, 4)
    with torch.no_grad():
        assert torch.equal(model.decode(z.half()).sample, model.decode(z).sample)
