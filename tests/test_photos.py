"""Real photographs on a model of Stable Diffusion 1.5's layout, from files to a stock pipeline that draws with them."""

import shutil
from pathlib import Path

import make_random_sd
import pytest
import torch

import lorakit

ROOT = Path(__file__).parent.parent
PHOTOS = ROOT.parent / "shared" / "photos"


@pytest.fixture(params=["sd", "sdxl", "sd3", "flux"])
def model(request, tmp_path):
    """The family, and a random pipeline of it with a VAE of factor 8, made as the README says."""
    folder = tmp_path / "base"
    make_random_sd.main(["--out", str(folder), "--model", request.param])
    return request.param, folder


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"no photographs at {PHOTOS}")
def test_six_photos_become_an_adapter_that_a_stock_pipeline_draws_with(model, tmp_path, monkeypatch):
    from diffusers import DiffusionPipeline

    family, model = model
    photos = tmp_path / "photos"
    photos.mkdir()
    chosen = [*sorted((PHOTOS / "dog").glob("*.jpg"))[:4], *sorted((PHOTOS / "vase").glob("*.jpg"))[:2]]
    assert len(chosen) == 6
    for path in chosen:
        name = f"{path.parent.name}-{path.name}"
        shutil.copyfile(path, photos / name)
        (photos / name).with_suffix(".txt").write_text(f"a photo of a {path.parent.name}\n")

    monkeypatch.chdir(tmp_path)
    recipe = lorakit.load_recipe(
        ROOT / "recipes" / "photos_cpu.toml",
        overrides=[
            f"model.family={family}",
            f"model.path={model}",
            "data.sources.0.path=photos",
            "data.cache=cache",
            "run.steps=3",
            "run.batch_size=2",
            "run.sample_every=0",
            "run.save_dtype=fp32",
            "optimizer.lr=0.01",
            "optimizer.schedule.warmup=0",
        ],
    )
    result = lorakit.train(recipe)
    assert result.output == tmp_path / "runs" / "photos_cpu"
    lines = (result.output / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert all(f"{path.parent.name}-{path.name}" in lines[0] + lines[1] + lines[2] for path in chosen)

    assert list((tmp_path / "cache").rglob("*.safetensors")), "latents were cached where the recipe says"

    pipeline = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)  # as beside an adapter: some processors compute learning layers by other kernels

    def picture():
        g = torch.Generator().manual_seed(0)
        return pipeline(
            "a photo of a dog", num_inference_steps=2, width=64, height=64, generator=g, output_type="np"
        ).images

    before = picture()
    pipeline.load_lora_weights(result.output, weight_name="adapter.safetensors")
    after = picture()
    assert abs(after - before).max() > 1e-3, "the adapter must be felt"
    exported = tmp_path / "dog.safetensors"
    lorakit.export_adapter(result.output, format="diffusers", out=exported)
    pipeline.unload_lora_weights()
    assert abs(picture() - before).max() < 1e-6
    pipeline.load_lora_weights(tmp_path, weight_name="dog.safetensors")
    assert abs(picture() - after).max() < 1e-4, "both dialects say the same"
