"""Stable Diffusion folders: numbers from their configuration, and one message for each thing that is wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from lorakit import families
from lorakit.core.errors import InputError
from lorakit.families import sd


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(sd.tiny().path, tmp_path / "model"))


def edit(path: Path, **changed: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def load(path: object) -> sd.StableDiffusion:
    return families.load("sd", str(path))  # type: ignore[return-value]


def test_scaling_and_prediction_type_come_from_the_configuration(folder: Path) -> None:
    before = load(folder).encode_images(torch.ones(1, 3, 32, 32))
    edit(folder / "vae" / "config.json", scaling_factor=1.4)
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    after = load(folder)
    torch.testing.assert_close(after.encode_images(torch.ones(1, 3, 32, 32)), before * 2, rtol=1e-6, atol=0)
    assert after.process.prediction_type == "v_prediction"


def test_the_precision_asked_for_reaches_all_but_the_vae(folder: Path) -> None:
    family = load(folder)
    family.to("cpu", torch.bfloat16)
    assert family.unet.dtype == family.text_encoder.dtype == torch.bfloat16
    assert family.vae.dtype == torch.float32
    latents = family.encode_images(torch.zeros(1, 3, 32, 32))
    assert family.predict(latents, torch.tensor([1]), family.encode_text(["a"])).dtype == torch.bfloat16


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_component_is_named(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)
    with pytest.raises(InputError, match=f"lacks the component {part}"):
        load(folder)


def test_all_missing_components_are_named_at_once(folder: Path) -> None:
    for part in ("unet", "vae"):
        shutil.rmtree(folder / part)
    with pytest.raises(InputError) as caught:
        load(folder)
    assert len(caught.value.problems) == 2


def test_pickled_weights_are_refused(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(InputError, match="pickle"):
        load(folder)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin"])
def test_a_pickled_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match="pickle"):
        load(tmp_path / name)


def test_what_is_no_model_says_so(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no model_index\.json"):
        load(tmp_path)
    edit(folder / "model_index.json", _class_name="StableDiffusionXLPipeline")
    with pytest.raises(InputError, match=r"StableDiffusionXLPipeline.*model\.family"):
        load(folder)


def test_a_hub_name_that_cannot_be_had_says_so() -> None:
    with pytest.raises(InputError, match="the hub did not give it"):
        load("nobody/nothing")


def test_unknown_family_and_setting() -> None:
    with pytest.raises(InputError, match="'sdd' is no family. Did you mean sd"):
        families.load("sdd", "embedded")
    with pytest.raises(InputError, match="model.pth is not a setting of family sd. Did you mean path"):
        families.load("sd", "embedded", pth=1)


def test_original_names_hold_text_model_whatever_transformers_calls_it() -> None:
    family = sd.tiny()
    wanted = "text_model.encoder.layers.0.mlp.fc1"
    assert family.original_name("text_encoder", "encoder.layers.0.mlp.fc1") == wanted
    assert family.original_name("text_encoder", wanted) == wanted
    assert family.original_name("unet", "mid_block.x") == "mid_block.x"


def test_a_fingerprint_follows_every_byte(folder: Path) -> None:
    family = load(folder)
    before = {name: family.fingerprint(name) for name in ("vae", "text_encoder")}
    edit(folder / "tokenizer" / "tokenizer_config.json", added=1)
    assert family.fingerprint("vae") == before["vae"]
    assert family.fingerprint("text_encoder") != before["text_encoder"]


@pytest.mark.parametrize(
    ("keys", "own"),
    [
        (["lora_unet_conv_in.alpha", "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha"], True),
        (["lora_unet_time_embedding_linear_1.alpha", "lora_unet_mid_block_attentions_0_proj_in.alpha"], True),
        (["lora_unet_up_blocks_1_attentions_0_transformer_blocks_1_attn1_to_q.alpha"], False),  # SDXL
        (["lora_unet_conv_in.alpha", "lora_unet_joint_blocks_0_x_block_attn_qkv.alpha"], False),  # SD 3
        (["lora_unet_layers_0_attention_to_q.alpha"], False),  # Z-Image
        (["lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha", "lora_unet_single_blocks_0_linear1.alpha"], False),
    ],
)
def test_adapters_of_other_programs_are_recognised(keys: list[str], own: bool) -> None:
    assert sd.recognises(keys) == own
