"""lorakit/export/dialects/: read is the inverse of write, names are those that other programs read, faults are told."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lorakit.adapters import AdapterState
from lorakit.core.errors import InputError
from lorakit.export import DIALECTS, read_adapter
from lorakit.export.keymap import family_layers
from lorakit.export.probe import record_calls, stock_components
from tests.export.tiny import equal, family, made, predictions, same_state

R = 4
NAMES = DIALECTS.names()


@pytest.mark.parametrize(("alpha", "rslora"), [(1.0, False), (R / 2, False), (R, False), (4 * R, False), (3.0, True)])
def test_through_every_dialect_and_back_nothing_changes(alpha: float, rslora: bool) -> None:
    state = made(rank=R, alpha=alpha, rslora=rslora)
    assert set(state.alphas.values()) != {float(R)}, "alphas that are not the rank are what gets lost"
    again = state
    for name in ("kohya", "diffusers", "peft", "lorakit", "kohya"):
        dialect = DIALECTS.module(name)
        tensors, metadata = dialect.write(again, family(), {"note": "x"})
        assert all(isinstance(value, str) for value in metadata.values())
        again = dialect.read(tensors, metadata, family())
        assert same_state(again, state), name


@pytest.mark.parametrize("name", NAMES)
def test_names_are_a_bijection_on_all_layers(name: str) -> None:
    keymap = DIALECTS.module(name).keymap(family())
    ours = [f"{layer}.{ending}" for layer in keymap.bases for ending in keymap.endings]
    assert len(ours) > 150
    foreign = [keymap.to_foreign(one) for one in ours]
    assert len(set(foreign)) == len(ours)
    assert [keymap.from_foreign(key) for key in foreign] == ours
    assert keymap.from_foreign("nothing.lora_A.weight") is None
    for key in foreign:
        assert (
            DIALECTS.module(name).recognises([key], {"lorakit.adapter": ""} if name == "lorakit" else {})
            or "alpha" in key
        )


def test_each_file_is_of_one_dialect_only() -> None:
    state = made(targets=("to_q",))
    for name in NAMES:
        tensors, metadata = DIALECTS.module(name).write(state, family(), {})
        assert [other for other in NAMES if DIALECTS.module(other).recognises(tensors, metadata)] == [name]


def sd15() -> SimpleNamespace:
    """The names of a real Stable Diffusion 1.5, without its weights."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12))
    whole = family()
    return SimpleNamespace(
        components={"unet": unet, "text_encoder": text},
        backbone="unet",
        text_encoders=("text_encoder",),
        lora_prefixes=whole.lora_prefixes,
        fused={},
        original_name=whole.original_name,
        default_targets=whole.default_targets,
    )


def test_kohya_names_of_stable_diffusion_are_those_that_programs_know() -> None:
    model = sd15()
    keymap = DIALECTS.module("kohya").keymap(model)
    chosen = {
        layer: base
        for layer, base in keymap.bases.items()
        if layer.endswith(tuple(f".{t}" for t in model.default_targets[layer.split(".")[0]]))
    }
    unet = {base for layer, base in chosen.items() if layer.startswith("unet.")}
    text = {base for layer, base in chosen.items() if layer.startswith("text_encoder.")}
    assert (len(unet), len(text)) == (192, 72)
    block = r"(down_blocks_[012]_attentions_[01]|mid_block_attentions_0|up_blocks_[123]_attentions_[012])"
    inner = r"transformer_blocks_0_(attn[12]_to_(q|k|v|out_0)|ff_net_(0_proj|2))"
    assert all(re.fullmatch(rf"lora_unet_{block}_(proj_in|proj_out|{inner})", base) for base in unet)
    layer = r"lora_te_text_model_encoder_layers_\d+_(self_attn_(q|k|v|out)_proj|mlp_fc[12])"
    assert all(re.fullmatch(layer, base) for base in text)
    # literally as in published files
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0" in unet
    assert "lora_te_text_model_encoder_layers_11_self_attn_q_proj" in text
    assert keymap.bases["unet.down_blocks.0.resnets.0.conv1"] == "lora_unet_down_blocks_0_resnets_0_conv1"
    assert sum(len(layers) for layers in family_layers(model).values()) == len(set(keymap.bases.values()))


def test_shapes_are_those_that_programs_read() -> None:
    tensors, _ = DIALECTS.module("kohya").write(made(rank=R), family(), {})
    assert tensors["lora_unet_conv_in.lora_down.weight"].shape == (R, 4, 3, 3)
    assert tensors["lora_unet_conv_in.lora_up.weight"].shape == (16, R, 1, 1)
    linear = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    assert tensors[f"{linear}.lora_down.weight"].ndim == tensors[f"{linear}.lora_up.weight"].ndim == 2
    assert tensors[f"{linear}.alpha"].shape == ()
    assert tensors[f"{linear}.alpha"].dtype == torch.float32


def test_the_spelling_of_others_is_read_too() -> None:
    state = made(targets=("proj_in", "to_q"))
    kohya = DIALECTS.module("kohya")
    tensors, _ = kohya.write(state, family(), {})
    other: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        tensor = (
            tensor.flatten(1) if tensor.ndim == 4 else tensor[:, :, None, None] if tensor.ndim == 2 else tensor[None]
        )
        other[key.replace("lora_te_", "lora_te1_")] = tensor.half() if tensor.ndim > 1 else tensor
    halved = AdapterState("lora", {k: t.half().float() for k, t in state.tensors.items()}, state.alphas)
    assert same_state(kohya.read(other, {}, family()), halved)


def plant(fault: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    key = next(k for k in tensors if k.endswith("to_q.lora_down.weight"))
    base = key.removesuffix(".lora_down.weight")
    changed = dict(tensors)
    if fault == "unknown":
        changed["lora_unet_nowhere.lora_down.weight"] = torch.ones(2, 2)
    elif fault == "half pair":
        del changed[f"{base}.lora_up.weight"]
    elif fault == "other half":
        del changed[key]
    elif fault == "shape":
        changed[key] = torch.ones(4, 5)
    elif fault == "nan":
        changed[f"{base}.lora_up.weight"] = torch.full_like(changed[f"{base}.lora_up.weight"], float("nan"))
    elif fault == "alpha":
        changed[f"{base}.alpha"] = torch.tensor(float("inf"))
    elif fault == "twice":
        text = next(k for k in tensors if k.startswith("lora_te_"))
        changed[text.replace("lora_te_", "lora_te1_")] = tensors[text]
    elif fault == "no alpha":
        del changed[f"{base}.alpha"]
    return changed


FAULTS = [
    ("unknown", "lora_unet_nowhere.lora_down.weight has no place"),
    ("half pair", "only one of its two matrices"),
    ("other half", r"alpha is an alpha without matrices"),
    ("shape", r"has matrices of \(4, 5\)"),
    ("nan", "not finite"),
    ("alpha", "not one finite number"),
    ("twice", "are the same layer's: keep one"),
    ("no alpha", "1 of 28 layers have no alpha.*--assume-alpha"),
]


@pytest.mark.parametrize(("fault", "said"), FAULTS)
def test_a_faulty_file_is_told(fault: str, said: str) -> None:
    kohya = DIALECTS.module("kohya")
    tensors, metadata = kohya.write(made(targets=("to_q", "to_v")), family(), {})
    assert kohya.read(tensors, metadata, family())
    with pytest.raises(InputError, match=said):
        kohya.read(plant(fault, tensors), metadata, family())


@pytest.mark.parametrize("name", ["kohya", "diffusers", "peft"])
def test_alphas_that_are_not_stored_are_asked_for(name: str) -> None:
    dialect = DIALECTS.module(name)
    state = made(targets=("to_q",))
    tensors, _ = dialect.write(state, family(), {})
    tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}
    with pytest.raises(InputError, match="--assume-alpha"):
        dialect.read(tensors, {}, family())
    assert set(dialect.read(tensors, {}, family(), assume_alpha=2.5).alphas.values()) == {2.5}


@pytest.mark.parametrize(
    "change", [{"use_dora": True}, {"bias": "all"}, {"peft_type": "LOHA"}, {"alpha_pattern": {"(a+)+": 1}}]
)
def test_a_peft_configuration_that_means_something_else_is_refused(change: dict[str, object]) -> None:
    import json

    peft = DIALECTS.module("peft")
    tensors, metadata = peft.write(made(targets=("to_q",), text=False), family(), {})
    metadata["unet/adapter_config.json"] = json.dumps({**json.loads(metadata["unet/adapter_config.json"]), **change})
    with pytest.raises(InputError, match=r"unet/adapter_config.json (sets|has a pattern)"):
        peft.read(tensors, metadata, family())


def test_what_peft_itself_saves_is_read(tmp_path) -> None:
    from peft import LoraConfig, get_peft_model

    components = stock_components(family().stock_pipeline(), family())
    config = LoraConfig(
        r=4, lora_alpha=3, use_rslora=True, target_modules=["to_q", "conv_in"], rank_pattern={"conv_in": 2},
        alpha_pattern={"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 7}, init_lora_weights=False,
    )  # fmt: skip
    model = get_peft_model(components["unet"], config)
    model.save_pretrained(tmp_path / "unet")
    expected = record_calls(family()).answer({"unet": model})
    for path in (tmp_path, tmp_path / "unet", tmp_path / "unet" / "adapter_model.safetensors"):
        got = predictions((read_adapter(path, family=family()), 1.0))
        torch.testing.assert_close(got["unet"], expected["unet"], rtol=1e-5, atol=1e-6)
    assert not equal({"unet": predictions()["unet"]}, expected)


def test_what_diffusers_itself_saves_is_read(tmp_path) -> None:
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    components = stock_components(family().stock_pipeline(), family())
    entries = {}
    for name, targets in (("unet", ["to_k"]), ("text_encoder", ["q_proj"])):
        config = LoraConfig(r=4, lora_alpha=3, target_modules=targets, init_lora_weights=False)
        components[name].add_adapter(config, adapter_name="default")
        entries[name] = config.to_dict()
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(components["unet"]),
        text_encoder_lora_layers=get_peft_model_state_dict(components["text_encoder"]),
        unet_lora_adapter_metadata=entries["unet"],
        text_encoder_lora_adapter_metadata=entries["text_encoder"],
    )
    state = read_adapter(tmp_path / "pytorch_lora_weights.safetensors", family=family())
    assert equal(predictions((state, 1.0)), record_calls(family()).answer(components))
