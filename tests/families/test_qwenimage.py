"""Qwen-Image: what is particular to it. What all families keep: test_protocol.py."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lorakit import families
from lorakit.adapters import AdapterState
from lorakit.adapters.state import FIRST, SECOND, factor_shapes
from lorakit.core.errors import InputError
from lorakit.export import read_adapter
from lorakit.export.keymap import family_layers
from lorakit.export.verify import verify_adapter, write_verified
from lorakit.families import qwenimage, sd
from lorakit.recipe import build
from lorakit.sampling.pictures import Request
from lorakit.verbs.sample import sample
from lorakit.verbs.train import train


@pytest.mark.parametrize("part", qwenimage.PARTS)
def test_a_missing_component_is_named(tmp_path: Path, part: str) -> None:
    folder = shutil.copytree(qwenimage.tiny().path, tmp_path / "model")
    shutil.rmtree(folder / part)
    with pytest.raises(InputError, match=f"lacks the component {part} "):
        families.load("qwenimage", str(folder))


def test_other_families_folders_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"StableDiffusionPipeline.*model\.family"):
        families.load("qwenimage", str(sd.tiny().path))
    with pytest.raises(InputError, match=r"QwenImagePipeline.*model\.family"):
        families.load("sd", str(qwenimage.tiny().path))


def test_the_template_is_the_stock_pipelines_and_all_before_the_caption_is_cut_away() -> None:
    family, pipeline = qwenimage.tiny(), qwenimage.tiny().live_pipeline()
    assert pipeline.prompt_template_encode == qwenimage.TEMPLATE
    assert pipeline.prompt_template_encode_start_idx == qwenimage.BEFORE
    ids = family.tokenizer(qwenimage.TEMPLATE.format("a dog")).input_ids
    after = "<|im_end|>\n<|im_start|>assistant\n"
    assert family.tokenizer.decode(ids[qwenimage.BEFORE :]) == f"a dog{after}"
    description = families.describe("qwenimage", str(family.path))
    assert [description.count_tokens(caption) for caption in ("", "a dog")] == [5, 10]


def test_a_tokenizer_that_pads_on_the_left_moves_no_caption() -> None:
    family = families.load("qwenimage", str(qwenimage.tiny().path))
    with torch.no_grad():
        before = family.encode_text(["a", "a longer caption"])
        family.tokenizer.padding_side = "left"  # type: ignore[attr-defined]
        after = family.encode_text(["a", "a longer caption"])
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_lower_limit_cuts_captions_in_training_and_in_drawing_alike() -> None:
    whole = qwenimage.tiny()
    family = families.load("qwenimage", str(whole.path), max_sequence_length=3)
    pipeline = family.live_pipeline()
    own, stock = family.encode_text(["a dog"])["states"], pipeline.encode_prompt("a dog")[0]
    assert own.shape[1] == 3 and torch.allclose(own, stock, atol=1e-6)
    assert whole.fingerprint("text_encoder") != family.fingerprint("text_encoder")
    assert whole.fingerprint("vae") == family.fingerprint("vae")


def test_a_mask_goes_with_captions_of_several_lengths_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    family = qwenimage.tiny()
    masks: list[Any] = []
    forward = family.transformer.forward

    def listen(*args: Any, **given: Any) -> Any:
        masks.append(given["encoder_hidden_states_mask"])
        return forward(*args, **given)

    monkeypatch.setattr(family.transformer, "forward", listen)
    for captions in (["a dog", "a cat"], ["a dog", ""]):
        x_t, t = torch.zeros(2, *family.latent_shape(32, 32)), torch.tensor([0.3, 0.7])
        family.predict(x_t, t, family.encode_text(captions))
    assert masks[0] is None
    assert masks[1].tolist() == [[1] * 10, [1] * 5 + [0] * 5]


def test_latents_are_those_of_the_stock_pipeline_that_draws_over_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    family, pipeline = qwenimage.tiny(), qwenimage.tiny().live_pipeline("image")
    pixels = torch.rand(1, 3, 32, 48) * 2 - 1
    posterior = family.vae.encode(pixels.unsqueeze(2)).latent_dist
    monkeypatch.setattr(posterior, "sample", lambda generator: posterior.mean)
    monkeypatch.setattr(family.vae, "encode", lambda film: SimpleNamespace(latent_dist=posterior))
    stock = pipeline._encode_vae_image(pixels.unsqueeze(2), generator=None)
    torch.testing.assert_close(family.encode_images(pixels), stock.squeeze(2))


def test_emphasis_is_refused() -> None:
    with pytest.raises(InputError, match="weighted_tags: captions of Qwen-Image"):
        qwenimage.tiny().encode_text(["a (dog:1.3)"], weighted=True)


def test_guidance_is_told_with_a_negative_prompt_if_a_blank_one() -> None:
    told = [qwenimage.tiny().guided(*given) for given in ((1.0, "blurry"), (4.0, ""), (4.0, "blurry"))]
    assert [one["negative_prompt"] for one in told] == [None, "", "blurry"]
    assert [one["true_cfg_scale"] for one in told] == [1, 4, 4]


def test_a_drawing_is_guided_as_the_stock_pipeline_has_it(tmp_path: Path) -> None:
    def pixels(guidance: float) -> list[int]:
        wanted = [Request("a", 1, width=32, height=32)]
        where = str(qwenimage.tiny().path)
        [file] = sample(where, [], wanted=wanted, out=tmp_path, steps=2, guidance=guidance)
        return list(Image.open(file).tobytes())

    def stock(**told: Any) -> list[int]:
        generator = torch.Generator().manual_seed(1)
        pipeline = qwenimage.tiny().stock_pipeline()
        drawn = pipeline("a", width=32, height=32, num_inference_steps=2, generator=generator, **told)
        return list(drawn.images[0].tobytes())

    assert pixels(1.0) == stock() != pixels(8.0) == stock(true_cfg_scale=8.0, negative_prompt="")


def test_one_step_is_refused_since_its_time_would_be_none(tmp_path: Path) -> None:
    path = str(qwenimage.tiny().path)
    with pytest.raises(InputError, match="--steps = 1: the model draws in 2 steps or more"):
        sample(path, [], wanted=[Request("a", 1)], out=tmp_path, steps=1, guidance=1.0)
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    source: dict[str, Any] = {"path": str(tmp_path)}
    drawn = {"path": str(tmp_path / "b"), "role": "regularization"}
    for sources, key in (
        ([source], "sample.steps"),
        ([source, {**drawn, "generate": {"prompts": ["a"], "count": 1, "steps": 1}}], "data.sources.1.generate.steps"),
    ):
        recipe = build(
            {
                "model": {"family": "qwenimage", "path": path},
                "data": {"sources": sources, "buckets": {"resolution": 32}},
                "sample": {"prompts": ["a"], "steps": 1},
                "run": {"output": str(tmp_path / "run"), "steps": 1},
            }
        )
        with pytest.raises(InputError) as caught:
            train(recipe)
        assert f"{key} = 1: the model draws in 2 steps or more." in caught.value.problems


def test_the_shift_is_the_schedulers_dynamic_one_stretched_to_its_end() -> None:
    pipeline, process = qwenimage.tiny().stock_pipeline(), qwenimage.tiny().process
    pipeline("a", height=4 * 8, width=6 * 8, num_inference_steps=5, output_type="latent")
    torch.testing.assert_close(process.sigmas(5, tokens=4 * 6).float(), pipeline.scheduler.sigmas)
    assert process.sigmas(5, tokens=4 * 6)[-2] == pytest.approx(0.02)


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_every_layer_is_loaded_back_by_the_stock_pipeline(tmp_path: Path, format: str) -> None:
    family, generator = qwenimage.tiny(), torch.Generator().manual_seed(0)
    layers = family_layers(family)["transformer"]
    tensors = {}
    for path, layer in layers.items():
        for ending, shape in zip((FIRST, SECOND), factor_shapes(layer, 2), strict=True):
            tensors[f"transformer.{path}{ending}"] = 0.1 * torch.randn(shape, generator=generator)
    state = AdapterState("lora", tensors, {f"transformer.{path}": 1.0 for path in layers})
    report = write_verified(state, tmp_path / "a.safetensors", family=family, format=format)
    assert (report.modules, report.reader) == (len(layers), "stock pipeline")
    assert families.recognised(state.tensors) == ["qwenimage"]


def test_a_file_for_comfyui_is_read_as_the_stock_pipeline_reads_it(tmp_path: Path) -> None:
    family, draw = qwenimage.tiny(), torch.Generator().manual_seed(0)
    tensors = {}
    for path, layer in family_layers(family)["transformer"].items():
        for ending, shape in zip((FIRST, SECOND), factor_shapes(layer, 2), strict=True):
            tensors[f"diffusion_model.{path}{ending}"] = 0.1 * torch.randn(shape, generator=draw)
        tensors[f"diffusion_model.{path}.alpha"] = torch.tensor(1.0)
    assert families.recognised(tensors) == ["qwenimage"]
    save_file(tensors, tmp_path / "a.safetensors")
    state = read_adapter(tmp_path / "a.safetensors", family=family)
    _, reader = verify_adapter(state, tmp_path / "a.safetensors", family=family, format="diffusers")
    assert reader == "stock pipeline"


def test_an_adapter_of_attention_alone_is_told_from_one_of_stable_diffusion_3_by_its_many_blocks() -> None:
    names = ("attn.to_q", "attn.add_k_proj")
    for blocks, family in ((38, "sd3"), (60, "qwenimage")):
        keys = [f"transformer.transformer_blocks.{i}.{name}.lora_A.weight" for i in range(blocks) for name in names]
        assert families.recognised(keys) == [family]
    assert families.recognised([key.replace("blocks.39", "blocks.39.attn2") for key in keys]) == []
    assert families.recognised(["lora_unet_transformer_blocks_0_attn_to_q.alpha"]) == ["qwenimage"]
