"""Making the base in miniature: a stock pipeline draws with the result, and an interruption is no loss."""

import sys
from pathlib import Path

import make_base
import pytest
import torch


def make(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    out = folder / "base"
    monkeypatch.setattr(sys, "argv", ["make_base", "--smoke", "--out", str(out), "--work", str(folder / "work")])
    make_base.main()
    return out


def weights(base: Path) -> dict[str, bytes]:
    return {str(file.relative_to(base)): file.read_bytes() for file in base.rglob("*.safetensors")}


def test_the_stock_pipeline_draws_and_an_interrupted_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import StableDiffusionPipeline

    base = make(tmp_path / "whole", monkeypatch)
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a red circle", num_inference_steps=1, generator=torch.Generator().manual_seed(0)).images[0]
    assert picture.size == (64, 64)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"

    class Interrupted(Exception):
        pass

    keep = make_base.keep

    def keep_and_stop(path: Path, step: int, *state: object) -> None:
        keep(path, step, *state)  # type: ignore[arg-type]
        raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(make_base, "keep", keep_and_stop)
        make(tmp_path / "stopped", monkeypatch)
    assert not (tmp_path / "stopped" / "base").exists()
    assert weights(make(tmp_path / "stopped", monkeypatch)) == weights(base)


def test_the_vae_starts_as_a_mean_and_an_enlargement() -> None:
    torch.manual_seed(0)
    vae = make_base.new_vae().eval()
    flat = torch.rand(2, 3, 1, 1).expand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        back = vae.decode(vae.encode(flat).latent_dist.mean).sample
    error = (back - flat)[:, :, 4:-4, 4:-4].square().mean()
    assert error < 0.1, "a plain initialisation is off by about the variance of the picture"
