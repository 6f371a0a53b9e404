"""FLUX.2 klein: what is particular to it. What all families keep: test_protocol.py."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lorakit import families
from lorakit.core.errors import InputError
from lorakit.data.cache import fill_text, text_key
from lorakit.data.shards import Cache
from lorakit.export import DIALECTS, read_adapter, write_verified
from lorakit.export.fused import fuse
from lorakit.families import bfl, chroma, flux, flux2
from lorakit.sampling.pictures import Request
from lorakit.verbs.sample import sample
from tests.families.test_flux import BLOCKS, adapter

CAPTIONS = ["a", "a longer caption"]
READ = tuple(f"transformer.{name}" for name in ("x_embedder", "context_embedder", "time_guidance", "proj_out"))


def folder(tmp_path: Path, **index: Any) -> str:
    """The tiny model with `index` in its model_index.json."""
    copy = Path(shutil.copytree(flux2.tiny().path, tmp_path / "model"))
    file = copy / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **index}))
    return str(copy)


@pytest.mark.parametrize("ask", [families.load, families.describe])
def test_dev_is_refused_by_name(tmp_path: Path, ask: Any) -> None:
    dev = folder(tmp_path, _class_name="Flux2Pipeline")
    with pytest.raises(InputError, match=r"is FLUX\.2 dev, whose text encoder \(Mistral\)"):
        ask(families.named_at(dev), dev)


def test_the_transformer_is_read_from_the_file_that_was_published(tmp_path: Path) -> None:
    family, config = flux2.tiny(), flux2.tiny().path
    wanted = family.transformer.state_dict()
    file = {}
    for name, weight in wanted.items():
        path = name.removesuffix(".weight")
        norm = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.attn\.norm_(added_)?([qk])", path)
        if norm:
            stream = "norm" if norm[1] else f"{'txt' if norm[3] else 'img'}_attn.norm"
            block = f"{'single' if norm[1] else 'double'}_blocks.{norm[2]}"
            file[f"{block}.{stream}.{'query' if norm[4] == 'q' else 'key'}_norm.scale"] = weight
        elif path == "norm_out.linear":
            file["final_layer.adaLN_modulation.1.weight"] = torch.cat(weight.chunk(2)[::-1])
        elif bfl.published_name(path) != path:
            file[f"{bfl.published_name(path)}.weight"] = weight
    for whole, group in family.fused.items():
        weights = [wanted[f"{part.removeprefix('transformer.')}.weight"] for part in group]
        file[f"{whole.removeprefix('transformer.')}.weight"] = torch.cat(weights)
    save_file(file, tmp_path / "klein.safetensors")
    read = families.load("flux2", str(tmp_path / "klein.safetensors"), config=str(config))
    assert all(torch.equal(read.components["transformer"].state_dict()[key], wanted[key]) for key in wanted)


@torch.no_grad()
def test_latents_are_the_stock_pipelines() -> None:
    family, pipeline = flux2.tiny(), flux2.tiny().stock_pipeline()
    assert pipeline.vae.bn.running_var.std() > 0.1
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = family.encode_images(pixels)
    torch.testing.assert_close(latents, pipeline._encode_vae_image(pixels, generator=None), rtol=1e-6, atol=1e-6)
    assert torch.equal(latents, family.encode_images(pixels)), "the mode, not a draw"


@torch.no_grad()
def test_captions_are_padded_and_cached_one_by_one_are_what_the_stock_pipeline_gives(tmp_path: Path) -> None:
    family, pipeline, cache = flux2.tiny(), flux2.tiny().stock_pipeline(), Cache(tmp_path)
    fill_text(cache, CAPTIONS, encode=family.encode_text, fingerprint="x")
    cached = cache.read_stacked([text_key(caption, "x") for caption in CAPTIONS])
    stock, _ = pipeline.encode_prompt(CAPTIONS)
    torch.testing.assert_close(cached["states"], stock, rtol=1e-5, atol=1e-5)
    assert stock.shape == (2, flux2.TOKENS, 3 * family.text_encoder.config.hidden_size)


def test_a_caption_is_no_question_to_think_about() -> None:
    _, wrap = flux2._wrapped(flux2.tiny().path)
    assert wrap("a dog").endswith("<think>\n\n</think>\n\n")


@torch.no_grad()
def test_places_are_whole_numbers_and_the_guidance_is_nobodys_affair() -> None:
    family, pipeline = flux2.tiny(), flux2.tiny().stock_pipeline()
    handed: list[dict[str, Any]] = []
    family.transformer.register_forward_pre_hook(lambda m, args, kwargs: handed.append(kwargs), with_kwargs=True)
    x_t, text = torch.zeros(2, *family.latent_shape(48, 32)), family.encode_text(CAPTIONS)
    family.predict(x_t, torch.tensor([0.1, 0.9]), text)
    family.transformer._forward_pre_hooks.popitem()
    assert torch.equal(handed[0]["img_ids"], pipeline._prepare_latent_ids(x_t))
    assert torch.equal(handed[0]["txt_ids"], pipeline._prepare_text_ids(text["states"]))
    assert handed[0]["img_ids"].dtype == handed[0]["txt_ids"].dtype == torch.int64
    assert "guidance" not in handed[0]


def test_the_shift_in_training_is_that_of_very_many_steps() -> None:
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    family, pipeline = flux2.tiny(), flux2.tiny().stock_pipeline()
    shift = family.process.dynamic
    assert shift is not None
    assert shift.tokens(*family.latent_shape(64, 96)[1:]) == 8 * 12, "a token for each place"
    for tokens in (96, 1024, 4096):
        assert shift.mu(tokens) == pytest.approx(compute_empirical_mu(tokens, 200), abs=1e-4)
    drawn = {"prompt": "a", "width": 64, "height": 96, "guidance_scale": 1.0, "output_type": "latent"}
    for steps in (2, 5):
        pipeline(**drawn, num_inference_steps=steps)
        own = family.process.sigmas(steps, shift=math.exp(compute_empirical_mu(96, steps)))
        torch.testing.assert_close(own.float(), pipeline.scheduler.sigmas, rtol=1e-5, atol=1e-6)
        assert abs(shift.mu(96) - compute_empirical_mu(96, steps)) > 1


def pixels(where: str, out: Path, *, guidance: float, negative_prompt: str = "") -> list[int]:
    wanted = [Request("a", 1, negative_prompt, width=32, height=32)]
    [file] = sample(where, [], wanted=wanted, out=out, steps=2, guidance=guidance)
    return list(Image.open(file).tobytes())


def test_a_negative_prompt_is_led_away_from_though_the_pipeline_has_no_word_for_it(tmp_path: Path) -> None:
    where, pipeline = str(flux2.tiny().path), flux2.tiny().stock_pipeline()
    states, _ = pipeline.encode_prompt("blurry")
    asked = {"prompt": "a", "width": 32, "height": 32, "num_inference_steps": 2, "guidance_scale": 9.0}
    stock = [
        list(pipeline(**asked, **more, generator=torch.Generator().manual_seed(1)).images[0].tobytes())
        for more in ({"negative_prompt_embeds": states}, {})
    ]
    assert pixels(where, tmp_path, guidance=9.0, negative_prompt="blurry") == stock[0] != stock[1]
    assert pixels(where, tmp_path, guidance=9.0) == stock[1]


def test_a_distilled_model_draws_without_guidance(tmp_path: Path) -> None:
    base, distilled = str(flux2.tiny().path), folder(tmp_path, is_distilled=True)
    alone = pixels(base, tmp_path / "a", guidance=1.0)
    assert pixels(distilled, tmp_path / "b", guidance=9.0) == alone != pixels(base, tmp_path / "c", guidance=9.0)
    with pytest.raises(InputError, match=r"sample\.negative_prompt: this model is distilled"):
        families.load("flux2", distilled).guided(9.0, "blurry")  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_stock_loader_splits_what_kohyas_layout_fuses(tmp_path: Path, dtype: torch.dtype) -> None:
    family, state = flux2.tiny(), adapter(flux2.tiny(), (*BLOCKS, *READ))
    report = write_verified(state, tmp_path / "a.safetensors", family=family, dtype=dtype)
    assert (report.format, report.reader, report.modules) == ("kohya", "stock pipeline", len(state.layers()))
    back = read_adapter(tmp_path / "a.safetensors", family=family)
    assert back.layers() == state.layers() and back.alphas == state.alphas


def test_layers_that_the_stock_loader_drops_are_read_back_by_lorakit(tmp_path: Path) -> None:
    from diffusers import Flux2KleinPipeline

    family, state = flux2.tiny(), adapter(flux2.tiny(), ("transformer.",))
    for format, reader in (("kohya", "lorakit"), ("diffusers", "stock pipeline")):
        report = write_verified(state, tmp_path / f"{format}.safetensors", family=family, format=format)
        assert (report.reader, report.modules) == (reader, len(state.layers()))
    converted = Flux2KleinPipeline.lora_state_dict(DIALECTS.module("kohya").write(state, family, {})[0])
    dropped = {*state.layers()} - {key.rpartition(".lora_")[0] for key in converted}
    assert dropped == {layer for layer in state.layers() if any(word in layer for word in family.unread["kohya"])}
    assert len(dropped) == 4


@pytest.mark.parametrize(
    ("module", "layers", "expected"),
    [
        (flux2, "transformer_blocks.0.ff.linear_in", ["flux2"]),
        (flux2, "single_transformer_blocks.0.attn.to_qkv", ["flux2"]),
        (chroma, "single_transformer_blocks.0.proj_mlp", ["chroma"]),
        (chroma, "transformer_blocks.0.ff.net.0", ["chroma", "flux"]),
        (flux2, "transformer_blocks.0.attn", ["chroma", "flux", "flux2"]),  # of the same sizes
    ],
)
def test_files_of_published_names_are_told_apart_by_sizes(module: Any, layers: str, expected: list[str]) -> None:
    family = module.tiny()
    state = adapter(family, (f"transformer.{layers}",))
    kohya, _ = DIALECTS.module("kohya").write(state, family, {})
    comfyui = {}
    for name, tensor in fuse(state, family).tensors.items():
        component, path, ending = re.split(r"\.(?=lora_)|(?<=transformer)\.", name)
        comfyui[f"diffusion_model.{family.original_name(component, path)}.{ending}"] = tensor
    assert families.recognised(comfyui) == expected
    assert families.recognised(kohya) == expected


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("transformer.single_transformer_blocks.0.attn.to_out.lora_A.weight", True),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", False),  # FLUX.1's
        ("transformer.single_transformer_blocks.0.proj_out.lora_A.weight", False),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", False),  # many models'
        ("lora_unet_single_blocks_0_modulation_lin.alpha", False),
    ],
)
def test_adapters_of_other_programs_are_recognised(name: str, own: bool) -> None:
    assert flux2.recognises([name]) == own
    if own:
        assert not flux.recognises([name]) and not chroma.recognises([name])
