"""lorakit/export/kinds.py: what is no plain LoRA is named as what it is, and nothing of it is loaded."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.core.errors import InputError
from lorakit.export import DIALECTS, read_adapter, write_adapter
from lorakit.export.kinds import other_kind
from tests.export import fuzz

LAYER = "lora_unet_to_q"
KINDS = [
    ("dora_scale", "a DoRA"),
    ("lora_magnitude_vector.weight", "a DoRA"),
    ("hada_w1_a", "a LoHa"),
    ("hada_t1", "a LoHa"),
    ("lokr_w1", "a LoKr"),
    ("lokr_w2_b", "a LoKr"),
    ("lora_mid.weight", "Tucker"),
    ("a1.weight", "a GLoRA"),
    ("oft_blocks", "an OFT"),
    ("boft_R", "an OFT"),
    ("on_input", "(IA)³"),
    ("vera_lambda_b", "another of peft's kinds"),
    ("lora_B.bias", "biases"),
    ("diff", "a full difference"),
    ("diff_b", "a full difference"),
]


@pytest.mark.parametrize(("ending", "said"), KINDS)
def test_a_kind_is_named_where_it_stands_alone_and_beside_a_pair(tmp_path, ending: str, said: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file({f"{LAYER}.{ending}": torch.ones(2, 2)}, path)
    with pytest.raises(InputError) as error:
        read_adapter(path, family=fuzz.model())
    assert said in str(error.value)
    write_adapter(fuzz.adapter(), path, format="kohya", family=fuzz.model())
    save_file({**load_file(path), f"{LAYER}.{ending}": torch.ones(2, 2)}, path)
    with pytest.raises(InputError) as error:
        read_adapter(path, family=fuzz.model())
    assert said in str(error.value)
    assert f"1 of its 16 keys say so, the first is {LAYER}.{ending}" in str(error.value)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("unet.mid.attn1.processor.to_q_lora.up.weight", "older versions of diffusers"),
        ("emb_params", "an embedding"),
        ("clip_l", "an embedding"),
        ("model.diffusion_model.input_blocks.0.0.weight", "a whole model"),
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.weight", "a whole model"),
    ],
)
def test_what_is_no_adapter_at_all_is_named(key: str, said: str) -> None:
    assert said in (other_kind([key]) or "")


def test_a_plain_lora_is_none_of_them(tmp_path) -> None:
    for format in DIALECTS.names():
        tensors, _ = DIALECTS.module(format).write(fuzz.adapter(), fuzz.model(), {})
        assert other_kind(tensors) is None
    # names that a layer may well have
    assert (
        other_kind(["lora_unet_diff.lora_up.weight", "unet.b1.lora_A.weight", "unet.diffusion_oft.lora_B.weight"])
        is None
    )


@pytest.mark.parametrize("format", DIALECTS.names())
def test_a_dialect_refuses_a_kind_that_it_does_not_declare(tmp_path, format: str) -> None:
    state = fuzz.adapter()
    strange = type(state)("dora", state.tensors, state.alphas)
    path = tmp_path / ("a" if format == "peft" else "a.safetensors")
    with pytest.raises(InputError, match=rf"the format {format} cannot carry an adapter of the kind dora.*merge it"):
        write_adapter(strange, path, format=format, family=fuzz.model())
    assert not list(tmp_path.iterdir())
