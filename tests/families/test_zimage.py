"""Z-Image: what is particular to it. What all families keep: test_protocol.py."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from lorakit import families
from lorakit.adapters import AdapterState
from lorakit.adapters.state import FIRST, SECOND, factor_shapes
from lorakit.core.errors import InputError
from lorakit.export.keymap import family_layers
from lorakit.export.verify import write_verified
from lorakit.families import sd, zimage
from lorakit.sampling.pictures import Request
from lorakit.verbs.sample import sample


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(zimage.tiny().path, tmp_path / "model"))


@pytest.mark.parametrize("part", zimage.PARTS)
def test_a_missing_component_is_named(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)
    with pytest.raises(InputError, match=f"lacks the component {part} "):
        families.load("zimage", str(folder))


def test_other_families_folders_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"StableDiffusionPipeline.*model\.family"):
        families.load("zimage", str(sd.tiny().path))
    with pytest.raises(InputError, match=r"ZImagePipeline.*model\.family"):
        families.load("sd", str(zimage.tiny().path))


def test_emphasis_is_refused() -> None:
    with pytest.raises(InputError, match="weighted_tags: captions of Z-Image"):
        zimage.tiny().encode_text(["a (dog:1.3)"], weighted=True)


def test_guidance_is_none_at_one_and_what_it_is_elsewhere_above() -> None:
    assert [zimage.tiny().guided(scale, "")["guidance_scale"] for scale in (0, 1, 5)] == [0, 0, 4]
    assert zimage.tiny().guided(5, "blurry")["negative_prompt"] == "blurry"


def test_a_drawing_is_guided_as_the_family_has_it(tmp_path: Path) -> None:
    def pixels(guidance: float) -> list[int]:
        wanted = [Request("a", 1, width=32, height=32)]
        where = str(zimage.tiny().path)
        [file] = sample(where, [], wanted=wanted, out=tmp_path, steps=2, guidance=guidance, family="zimage")
        return list(Image.open(file).tobytes())

    def stock(scale: float) -> list[int]:
        generator = torch.Generator().manual_seed(1)
        pipeline = zimage.tiny().stock_pipeline()
        drawn = pipeline("a", width=32, height=32, num_inference_steps=2, guidance_scale=scale, generator=generator)
        return list(drawn.images[0].tobytes())

    assert pixels(1.0) == stock(0.0) != pixels(8.0) == stock(7.0)


def test_a_language_model_saved_with_its_head_is_read_too(folder: Path) -> None:
    from transformers import Qwen3ForCausalLM

    from lorakit.families import qwen

    family = zimage.tiny()
    headed = Qwen3ForCausalLM(qwen.tiny_config(family.tokenizer))
    headed.model.load_state_dict(family.text_encoder.state_dict())
    shutil.rmtree(folder / "text_encoder")
    headed.save_pretrained(folder / "text_encoder")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps({**index, "text_encoder": ["transformers", "Qwen3ForCausalLM"]})
    )
    loaded = families.load("zimage", str(folder))
    with torch.no_grad():
        assert torch.equal(loaded.encode_text(["a"])["states"], family.encode_text(["a"])["states"])


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_every_layer_is_loaded_back_by_the_stock_pipeline(tmp_path: Path, format: str) -> None:
    family, generator = zimage.tiny(), torch.Generator().manual_seed(0)
    layers = family_layers(family)["transformer"]
    tensors = {}
    for path, layer in layers.items():
        for ending, shape in zip((FIRST, SECOND), factor_shapes(layer, 2), strict=True):
            tensors[f"transformer.{path}{ending}"] = 0.1 * torch.randn(shape, generator=generator)
    state = AdapterState("lora", tensors, {f"transformer.{path}": 1.0 for path in layers})
    report = write_verified(state, tmp_path / "a.safetensors", family=family, format=format)
    assert (report.modules, report.reader) == (len(layers), "stock pipeline")
    assert all(zimage.recognises(keys) for keys in (state.tensors, ["lora_unet_layers_0_attention_to_q.alpha"]))


def test_files_of_lumina_are_not_its_own() -> None:
    for name in ("layers.0.attn.to_q", "layers.0.feed_forward.linear_1", "noise_refiner.0.attn.to_out.0"):
        assert not zimage.recognises([f"transformer.{name}.lora_A.weight"])
