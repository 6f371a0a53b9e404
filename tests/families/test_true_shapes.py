"""The published models, from their configurations and without weights: what is adapted, how much, and its names.

Lists of names are written here from the structure of the other layouts, not through lorakit's own maps.
"""

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorakit.adapters import AdapterState, lora, trainable_parameters
from lorakit.core.types import Task
from lorakit.export import DIALECTS
from lorakit.export.keymap import family_layers
from lorakit.families import FAMILIES, recognised, unet
from lorakit.families.protocol import Family

RANK = 2
SHAPES = Path(__file__).parent / "shapes"
FAMILY = {
    "sd15": ("sd", "StableDiffusion"),
    "sdxl": ("sdxl", "StableDiffusionXL"),
    "sd35_large": ("sd3", "StableDiffusion3"),
    "sd35_medium": ("sd3", "StableDiffusion3"),
}
UNETS = ("sd15", "sdxl")
PARAMETERS = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
    "sd35_large": {
        "transformer": 8_056_627_520,
        "vae": 83_819_683,
        "text_encoder": 123_650_304,
        "text_encoder_2": 694_659_840,
        "text_encoder_3": 4_762_310_656,
    },
    "sd35_medium": {"transformer": 2_243_171_520},
}
INNER = [f"attn{n}_to_{one}" for n in (1, 2) for one in ("q", "k", "v", "out_0")] + ["ff_net_0_proj", "ff_net_2"]


@functools.cache
def parts(model: str) -> dict[str, nn.Module]:
    import diffusers
    import transformers

    made: dict[str, nn.Module] = {}
    with torch.device("meta"):
        for name, config in json.loads((SHAPES / f"{model}.json").read_text()).items():
            if name.startswith("text"):
                kind = getattr(transformers, config["architectures"][0])
                made[name] = kind(kind.config_class(**config))
            else:
                made[name] = getattr(diffusers, config["_class_name"]).from_config(config)
    return made


def family(model: str) -> Family:
    """The family with `parts` instead of what it would load."""
    name, kind_name = FAMILY[model]
    kind = getattr(FAMILIES.module(name), kind_name)
    whole = object.__new__(kind)
    kind.__base__.__init__(whole, parts(model))
    return whole  # type: ignore[no-any-return]


@functools.cache
def adapted(model: str) -> AdapterState:
    """A fresh adapter on the default targets of all parts."""
    whole = family(model)
    chosen = {name: whole.components[name] for name in (whole.backbone, *whole.text_encoders)}
    for name, module in chosen.items():
        lora.inject(module, lora.Settings(rank=RANK), targets=whole.default_targets[name], seed=0)
    tensors = {name: parameter.data for name, parameter in trainable_parameters(chosen).items()}
    return AdapterState("lora", tensors, {name.rpartition(".lora_")[0]: float(RANK) for name in tensors})


def kohya_text(prefix: str, layers: int) -> set[str]:
    inner = [f"self_attn_{one}_proj" for one in ("q", "k", "v", "out")] + ["mlp_fc1", "mlp_fc2"]
    return {f"{prefix}text_model_encoder_layers_{i}_{one}" for i in range(layers) for one in inner}


def kohya_attention(block: str, depth: int) -> Iterator[str]:
    yield from (f"lora_unet_{block}_{one}" for one in ("proj_in", "proj_out"))
    yield from (f"lora_unet_{block}_transformer_blocks_{i}_{one}" for i in range(depth) for one in INNER)


# the attention of a model: block in the kohya layout, transformer blocks in it
ATTENTION = {
    "sd15": {
        **{f"down_blocks_{level}_attentions_{i}": 1 for level in (0, 1, 2) for i in (0, 1)},
        "mid_block_attentions_0": 1,
        **{f"up_blocks_{level}_attentions_{i}": 1 for level in (1, 2, 3) for i in (0, 1, 2)},
    },
    "sdxl": {
        **{f"input_blocks_{n}_1": depth for n, depth in ((4, 2), (5, 2), (7, 10), (8, 10))},
        "middle_block_1": 10,
        **{f"output_blocks_{n}_1": depth for n, depth in ((0, 10), (1, 10), (2, 10), (3, 2), (4, 2), (5, 2))},
    },
}
TEXT = {
    "sd15": kohya_text("lora_te_", 12),
    "sdxl": kohya_text("lora_te1_", 12) | kohya_text("lora_te2_", 32),
}
COUNTS = {"sd15": (192, 72), "sdxl": (722, 72 + 192)}


@pytest.mark.parametrize("task", ["inpaint", "edit"])
@pytest.mark.parametrize("model", UNETS)
def test_models_that_see_more_differ_in_their_first_layer_alone(model: str, task: Task) -> None:
    """Whose channels are 9 and 8 (the configurations of the published inpainting and editing models): an adapter's
    layers have the plain model's names and shapes, so a file may go from one to the other."""
    from diffusers import UNet2DConditionModel

    config = json.loads((SHAPES / f"{model}.json").read_text())["unet"]
    with torch.device("meta"):
        plain, other = (
            UNet2DConditionModel.from_config({**config, "in_channels": unet.channels(of, 4)}) for of in ("text", task)
        )
    shapes = [{name: tensor.shape for name, tensor in made.state_dict().items()} for made in (plain, other)]
    assert shapes[0].keys() == shapes[1].keys()
    assert {name for name in shapes[0] if shapes[0][name] != shapes[1][name]} == {"conv_in.weight"}
    assert shapes[1]["conv_in.weight"] == (320, {"inpaint": 9, "edit": 8}[task], 3, 3)


@pytest.mark.parametrize("model", FAMILY)
def test_models_have_their_published_numbers_of_parameters(model: str) -> None:
    # a fresh model: others of these tests put adapters into theirs
    found = {name: sum(p.numel() for p in module.parameters()) for name, module in parts.__wrapped__(model).items()}
    assert found == PARAMETERS[model]


@pytest.mark.parametrize("model", UNETS)
def test_kohya_names_are_exactly_those_of_kohyas_own_default_targets(model: str) -> None:
    unet = {name for block, depth in ATTENTION[model].items() for name in kohya_attention(block, depth)}
    assert (len(unet), len(TEXT[model])) == COUNTS[model]
    tensors, _ = DIALECTS.module("kohya").write(adapted(model), family(model), {})
    endings = ("lora_down.weight", "lora_up.weight", "alpha")
    assert set(tensors) == {f"{name}.{ending}" for name in unet | TEXT[model] for ending in endings}


@pytest.mark.parametrize("model", FAMILY)
def test_diffusers_names_are_those_that_peft_gives_the_adapted_model(model: str) -> None:
    from peft import get_peft_model_state_dict

    state, whole = adapted(model), family(model)
    stock = {
        f"{name}.{key}" if name == whole.backbone or key.startswith("text_model.") else f"{name}.text_model.{key}"
        for name in (whole.backbone, *whole.text_encoders)
        for key in get_peft_model_state_dict(whole.components[name])
    }
    assert set(DIALECTS.module("diffusers").write(state, whole, {})[0]) == stock


def attention_weights(width: int, text: int, depth: int) -> int:
    """Weights of an adapter of rank 1 on an attention block: in and out of each linear layer."""
    own = 4 * 2 * width
    across = 2 * 2 * width + 2 * (text + width)
    forward = (width + 8 * width) + (4 * width + width)
    return 2 * 2 * width + depth * (own + across + forward)


# the depths of the attention blocks of each width
DEPTHS = {
    "sd15": {320: [1] * 5, 640: [1] * 5, 1280: [1] * 6},
    "sdxl": {640: [2] * 5, 1280: [10] * 6},
}
TEXT_WIDTHS = {"sd15": {768: 12}, "sdxl": {768: 12, 1280: 32}}  # and how many layers


@pytest.mark.parametrize("model", UNETS)
def test_an_adapter_has_as_many_weights_as_the_structure_says(model: str) -> None:
    across = sum(TEXT_WIDTHS[model])
    unet = sum(attention_weights(width, across, d) for width, depths in DEPTHS[model].items() for d in depths)
    text = sum(layers * (4 * 2 + 2 * 5) * width for width, layers in TEXT_WIDTHS[model].items())
    counts = {"unet": 0, "text": 0}
    for name, tensor in adapted(model).tensors.items():
        counts[name[:4]] += tensor.numel()
    assert counts == {"unet": RANK * unet, "text": RANK * text}


def test_every_layer_of_sdxl_under_kohyas_name_is_found_by_the_stock_converter() -> None:
    from diffusers import StableDiffusionXLPipeline

    model = family("sdxl")
    layers = family_layers(model)
    bases = DIALECTS.module("kohya").keymap(model).bases
    file: dict[str, Any] = {}
    for base in bases.values():
        file |= {f"{base}.lora_down.weight": torch.ones(1), f"{base}.lora_up.weight": torch.ones(1)}
        file[f"{base}.alpha"] = torch.tensor(1.0)
    assert len(bases) == sum(len(found) for found in layers.values()) > 1000
    converted, _ = StableDiffusionXLPipeline.lora_state_dict(file, unet_config=model.components["unet"].config)
    # attention is spelled in an older way there: <path>.processor.to_q_lora.down.weight, to_out_lora for to_out.0
    spelled = (key.partition(".down.")[0].replace(".processor", "") for key in converted if ".down." in key)
    paths = {re.sub("[._]lora$", "", name).removesuffix("_linear_layer") for name in spelled}
    paths = {f"{path}.0" if path.endswith("to_out") else path for path in paths}
    assert {path for path in paths if path.startswith("unet.")} == {f"unet.{path}" for path in layers["unet"]}


# blocks, those with a second attention of the picture alone, width
JOINT = {"sd35_large": (38, 0, 2432), "sd35_medium": (24, 13, 1536)}


@pytest.mark.parametrize("model", JOINT)
def test_joint_attention_is_adapted_in_every_block(model: str) -> None:
    blocks, dual, width = JOINT[model]
    both = [f"attn.{one}" for one in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")]
    names = {f"{i}.{one}" for i in range(blocks) for one in both}
    names |= {f"{i}.attn.to_add_out" for i in range(blocks - 1)}  # the last block goes on without the text
    names |= {f"{i}.attn2.{one}" for i in range(dual) for one in ("to_q", "to_k", "to_v", "to_out.0")}
    state = adapted(model)
    found = {layer for layer in state.layers() if layer.startswith("transformer.")}
    assert found == {f"transformer.transformer_blocks.{name}" for name in names}
    numbers = sum(tensor.numel() for name, tensor in state.tensors.items() if name.startswith("transformer."))
    assert numbers == len(names) * RANK * 2 * width
    assert recognised(DIALECTS.module("diffusers").write(state, family(model), {})[0]) == ["sd3"]
    size = "large" if model == "sd35_large" else "medium"
    assert family(model).metadata()["modelspec.architecture"] == f"stable-diffusion-3-{size}/lora"
