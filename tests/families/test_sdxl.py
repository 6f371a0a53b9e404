"""Stable Diffusion XL folders and files: what is particular to them. What all families keep: test_protocol.py."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from lorakit import families
from lorakit.adapters import AdapterState
from lorakit.adapters.state import FIRST, SECOND, factor_shapes
from lorakit.core.errors import InputError, VerificationError
from lorakit.export import DIALECTS
from lorakit.export.keymap import family_layers
from lorakit.export.verify import write_verified
from lorakit.families import sd, sdxl


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(sdxl.tiny().path, tmp_path / "model"))


def edit(path: Path, **changed: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def load(path: object) -> sdxl.StableDiffusionXL:
    return families.load("sdxl", str(path))  # type: ignore[return-value]


@pytest.mark.parametrize("part", sdxl.PARTS)
def test_a_missing_component_is_named(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)
    with pytest.raises(InputError, match=f"lacks the component {part} "):
        load(folder)


def test_other_families_folders_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"StableDiffusionPipeline.*model\.family"):
        load(sd.tiny().path)
    with pytest.raises(InputError, match=r"StableDiffusionXLPipeline.*model\.family"):
        families.load("sd", str(sdxl.tiny().path))
    with pytest.raises(InputError, match=r"model\.path is missing"):
        families.validate_settings({"family": "sdxl"})


def test_an_empty_caption_is_zeros_only_where_the_folder_says_so(folder: Path) -> None:
    zeros = load(folder)
    text = zeros.encode_text(["", "a"])
    assert all(not tensor[0].any() and tensor[1].any() for tensor in text.values())
    edit(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    encoded = load(folder)
    said = encoded.encode_text(["", "a"])
    assert all(tensor[0].any() for tensor in said.values())
    assert all(torch.equal(said[name][1], text[name][1]) for name in said)
    assert zeros.fingerprint("text_encoder") != encoded.fingerprint("text_encoder")
    assert zeros.fingerprint("vae") == encoded.fingerprint("vae")


def test_without_sizes_a_picture_is_its_own_original() -> None:
    family = sdxl.tiny()
    x_t, t, text = torch.randn(2, 4, 6, 8), torch.tensor([3, 4]), family.encode_text(["a", "b"])
    with torch.no_grad():
        plain = family.predict(x_t, t, text)
        assert torch.equal(plain, family.predict(x_t, t, text, sizes=torch.tensor([[24, 32, 0, 0, 24, 32]] * 2)))
        for changed in range(6):
            sizes = torch.tensor([[24, 32, 0, 0, 24, 32]] * 2)
            sizes[:, changed] += 40
            assert not torch.equal(plain, family.predict(x_t, t, text, sizes=sizes)), "each number counts"


def test_emphasis_moves_the_states_of_both_encoders_and_not_the_pooled_one() -> None:
    family = sdxl.tiny()
    plain, marked = (family.encode_text([caption], weighted=True) for caption in ("a cat", "a (cat:1.5)"))
    changed = plain["states"] != marked["states"]
    assert changed[..., :24].any() and changed[..., 24:].any()
    assert torch.equal(plain["pooled"], marked["pooled"])


def test_a_fingerprint_is_of_the_encoder_and_its_own_tokenizer(folder: Path) -> None:
    family = load(folder)
    before = {name: family.fingerprint(name) for name in family.text_encoders}
    edit(folder / "tokenizer_2" / "tokenizer_config.json", added=1)
    assert family.fingerprint("text_encoder") == before["text_encoder"]
    assert family.fingerprint("text_encoder_2") != before["text_encoder_2"]


def test_kohya_files_with_the_names_of_diffusers_are_read_too() -> None:
    keymap = DIALECTS.module("kohya").keymap(sdxl.tiny())
    ours = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"
    kohya = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight"
    other = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight"
    assert keymap.to_foreign(ours) == kohya
    assert keymap.from_foreign(kohya) == keymap.from_foreign(other) == ours


def adapter(names: list[str]) -> AdapterState:
    """A random adapter of rank 2 on these layers."""
    layers, generator = family_layers(sdxl.tiny()), torch.Generator().manual_seed(0)
    tensors = {}
    for name in names:
        component, _, path = name.partition(".")
        for ending, shape in zip((FIRST, SECOND), factor_shapes(layers[component][path], 2), strict=True):
            tensors[name + ending] = 0.1 * torch.randn(shape, generator=generator)
    return AdapterState("lora", tensors, dict.fromkeys(names, 1.0))


def test_every_layer_is_loaded_back_from_kohyas_layout_by_the_stock_pipeline(tmp_path: Path) -> None:
    names = [f"{part}.{path}" for part, found in family_layers(sdxl.tiny()).items() for path in found]
    report = write_verified(adapter(names), tmp_path / "a.safetensors", family=sdxl.tiny(), format="kohya")
    assert report.modules == len(names) == 288


def test_a_layer_that_the_stock_pipeline_leaves_out_fails_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # under its own name, diffusers drops this one without a word
    monkeypatch.setitem(sdxl.tiny()._blocks, "add_embedding.linear_1", "add_embedding.linear_1")
    state = adapter(["unet.conv_in", "unet.add_embedding.linear_1"])
    with pytest.raises(VerificationError, match="has 1 adapted layers instead of 2"):
        write_verified(state, tmp_path / "a.safetensors", family=sdxl.tiny(), format="kohya")
    assert list(tmp_path.iterdir()) == []


def test_files_say_which_model_they_are_for() -> None:
    told = sdxl.tiny().metadata()
    assert told["ss_base_model_version"] == "sdxl_base_v1-0"
    assert told["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
