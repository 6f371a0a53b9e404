"""The published models whose transformer alone is adapted, from their configurations and without weights.

As in test_true_shapes.py, names are written here from the structure of the model, not through lorakit's own maps.
"""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorakit.adapters import AdapterState, lora, trainable_parameters
from lorakit.export import DIALECTS
from lorakit.export.keymap import family_layers
from lorakit.families import FAMILIES
from lorakit.families.protocol import Family

RANK = 2
SHAPES = Path(__file__).parent / "shapes"
CLASS = {"zimage": "ZImage", "lumina2": "Lumina2", "pixart": "PixArt", "qwenimage": "QwenImage"}
CLASS |= dict.fromkeys(("sana", "sana_600m", "sana15_4800m"), "Sana")
CLASS |= dict.fromkeys(("flux2_klein_4b", "flux2_klein_9b"), "Flux2")
PARAMETERS = {
    "zimage": {"transformer": 6_154_908_736, "vae": 83_819_683, "text_encoder": 4_022_468_096},
    "lumina2": {"transformer": 2_609_769_152, "vae": 83_819_683, "text_encoder": 2_614_341_888},
    # PixArt-Σ at 1024 pixels, as its own tools/convert_pixart_to_diffusers.py makes it
    "pixart": {"transformer": 610_856_096, "vae": 83_653_863, "text_encoder": 4_762_310_656},
    # as diffusers' scripts/convert_sana_to_diffusers.py and convert_dcae_to_diffusers.py make them
    "sana": {"transformer": 1_604_462_752, "vae": 312_250_275, "text_encoder": 2_614_341_888},
    "sana_600m": {"transformer": 591_747_872},
    "sana15_4800m": {"transformer": 4_721_825_952},
    "qwenimage": {"transformer": 20_430_401_088, "vae": 126_892_531, "text_encoder": 8_292_166_656},
    "flux2_klein_4b": {"transformer": 3_875_544_576, "vae": 84_046_115, "text_encoder": 4_022_468_096},
    "flux2_klein_9b": {"transformer": 9_078_581_248, "text_encoder": 8_190_735_360},
}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def zimage() -> Iterator[tuple[str, int, int]]:
    """Each layer that is adapted by default: its path, numbers in and numbers out."""
    width, hidden = 3840, 10240
    for block in [
        f"{part}.{i}" for part, n in (("layers", 30), ("noise_refiner", 2), ("context_refiner", 2)) for i in range(n)
    ]:
        yield from ((f"{block}.attention.{one}", width, width) for one in ATTENTION)
        yield from ((f"{block}.feed_forward.{one}", width, hidden) for one in ("w1", "w3"))
        yield f"{block}.feed_forward.w2", hidden, width


def lumina2() -> Iterator[tuple[str, int, int]]:
    width, hidden, keys, time = 2304, 9216, 768, 1024
    for block in [
        f"{part}.{i}" for part, n in (("layers", 26), ("noise_refiner", 2), ("context_refiner", 2)) for i in range(n)
    ]:
        yield from ((f"{block}.attn.{one}", width, width) for one in ("to_q", "to_out.0"))
        yield from ((f"{block}.attn.{one}", width, keys) for one in ("to_k", "to_v"))
        yield from ((f"{block}.feed_forward.linear_{i}", width, hidden) for i in (1, 3))
        yield f"{block}.feed_forward.linear_2", hidden, width
        if not block.startswith("context"):
            yield f"{block}.norm1.linear", time, 4 * width


def pixart() -> Iterator[tuple[str, int, int]]:
    width = 1152
    for block in [f"transformer_blocks.{i}" for i in range(28)]:
        yield from ((f"{block}.{n}.{one}", width, width) for n in ("attn1", "attn2") for one in ATTENTION)
        yield f"{block}.ff.net.0.proj", width, 4 * width
        yield f"{block}.ff.net.2", 4 * width, width


def qwenimage() -> Iterator[tuple[str, int, int]]:
    width = 3072
    text = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    for block in [f"transformer_blocks.{i}" for i in range(60)]:
        yield from ((f"{block}.attn.{one}", width, width) for one in (*ATTENTION, *text))
        for stream in ("img_mlp", "txt_mlp"):
            yield f"{block}.{stream}.net.0.proj", width, 4 * width
            yield f"{block}.{stream}.net.2", 4 * width, width


def sana(width: int, layers: int) -> Iterator[tuple[Any, ...]]:
    hidden = 5 * width // 2
    for block in [f"transformer_blocks.{i}" for i in range(layers)]:
        yield from ((f"{block}.{n}.{one}", width, width) for n in ("attn1", "attn2") for one in ATTENTION)
        yield f"{block}.ff.conv_inverted", width, 2 * hidden, 1, 1
        yield f"{block}.ff.conv_point", hidden, width, 1, 1


def flux2(double: int, single: int, width: int) -> Iterator[tuple[str, int, int]]:
    """Feed-forward is gated, and in blocks of one stream it is of a piece with attention."""
    hidden = 3 * width
    for i in range(double):
        both = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        yield from ((f"transformer_blocks.{i}.attn.{one}", width, width) for one in both)
        for stream in ("ff", "ff_context"):
            yield f"transformer_blocks.{i}.{stream}.linear_in", width, 2 * hidden
            yield f"transformer_blocks.{i}.{stream}.linear_out", hidden, width
    for i in range(single):
        yield f"single_transformer_blocks.{i}.attn.to_qkv_mlp_proj", width, 3 * width + 2 * hidden
        yield f"single_transformer_blocks.{i}.attn.to_out", width + hidden, width


# of FLUX.2: blocks of two streams, of one, and width, by Black Forest Labs' own code
KLEIN = {"flux2_klein_4b": (5, 20, 3072), "flux2_klein_9b": (8, 24, 4096)}
LAYERS: dict[str, list[tuple[Any, ...]]] = {
    "zimage": list(zimage()),
    "lumina2": list(lumina2()),
    "pixart": list(pixart()),
    "qwenimage": list(qwenimage()),
    "sana": list(sana(2240, 20)),
    "sana_600m": list(sana(1152, 28)),
    "sana15_4800m": list(sana(2240, 60)),
    **{model: list(flux2(*sizes)) for model, sizes in KLEIN.items()},
}


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
    kind = getattr(FAMILIES.module(CLASS[model].lower()), CLASS[model])
    whole = object.__new__(kind)
    kind.__base__.__init__(whole, parts(model))
    return whole  # type: ignore[no-any-return]


@functools.cache
def adapted(model: str) -> AdapterState:
    """A fresh adapter on the default targets."""
    whole = family(model)
    module = whole.components["transformer"]
    lora.inject(module, lora.Settings(rank=RANK), targets=whole.default_targets["transformer"], seed=0)
    tensors = {name: parameter.data for name, parameter in trainable_parameters({"transformer": module}).items()}
    return AdapterState("lora", tensors, {name.rpartition(".lora_")[0]: float(RANK) for name in tensors})


@pytest.mark.parametrize("model", CLASS)
def test_models_have_their_published_numbers_of_parameters(model: str) -> None:
    # a fresh model: others of these tests put adapters into theirs
    found = {name: sum(p.numel() for p in module.parameters()) for name, module in parts.__wrapped__(model).items()}
    assert found == PARAMETERS[model]


@pytest.mark.parametrize("model", CLASS)
def test_the_layers_that_are_adapted_and_their_sizes_are_those_of_the_structure(model: str) -> None:
    expected = {}
    for path, ins, outs, *kernel in LAYERS[model]:
        expected[f"transformer.{path}.lora_A.weight"] = (RANK, ins, *kernel)
        expected[f"transformer.{path}.lora_B.weight"] = (outs, RANK, *kernel)
    assert {name: tuple(tensor.shape) for name, tensor in adapted(model).tensors.items()} == expected


@pytest.mark.parametrize("model", CLASS)
def test_diffusers_names_are_those_that_peft_gives_the_adapted_model(model: str) -> None:
    from peft import get_peft_model_state_dict

    state, whole = adapted(model), family(model)
    stock = {f"transformer.{key}" for key in get_peft_model_state_dict(whole.components["transformer"])}
    assert set(DIALECTS.module("diffusers").write(state, whole, {})[0]) == stock


@pytest.mark.parametrize(("model", "pipeline"), [("qwenimage", "QwenImagePipeline"), ("zimage", "ZImagePipeline")])
def test_every_layer_under_kohyas_name_is_found_by_the_stock_converter(model: str, pipeline: str) -> None:
    import diffusers

    whole = family(model)
    file: dict[str, Any] = {}
    for layer, base in DIALECTS.module("kohya").keymap(whole).bases.items():
        assert base == "lora_unet_" + layer.removeprefix("transformer.").replace(".", "_")
        file |= {f"{base}.lora_down.weight": torch.ones(1, 1), f"{base}.lora_up.weight": torch.ones(1, 1)}
        file[f"{base}.alpha"] = torch.tensor(1.0)
    converted = getattr(diffusers, pipeline).lora_state_dict(file)
    paths = {key.rpartition(".lora_")[0] for key in converted}
    assert paths == {f"transformer.{path}" for path in family_layers(whole)["transformer"]}
    assert len(paths) > len(LAYERS[model])


@pytest.mark.parametrize("model", KLEIN)
def test_kohyas_names_of_flux2_are_those_of_its_trainer_and_the_stock_converter_finds_them(model: str) -> None:
    import diffusers

    double, single, width = KLEIN[model]
    names = {
        f"lora_unet_double_blocks_{i}_{stream}_{one}"
        for i in range(double)
        for stream in ("img", "txt")
        for one in ("attn_qkv", "attn_proj", "mlp_0", "mlp_2")
    } | {f"lora_unet_single_blocks_{i}_linear{one}" for i in range(single) for one in (1, 2)}
    state, whole = adapted(model), family(model)
    tensors, _ = DIALECTS.module("kohya").write(state, whole, {})
    assert {key.partition(".")[0] for key in tensors} == names
    assert tensors["lora_unet_double_blocks_0_txt_attn_qkv.lora_up.weight"].shape == (3 * width, 3 * RANK)
    numbers = {key: torch.ones(tensor.shape) for key, tensor in tensors.items()}
    converted = diffusers.Flux2KleinPipeline.lora_state_dict(numbers)
    assert {key.rpartition(".lora_")[0] for key in converted} == {*state.layers()}
    assert whole.metadata()["modelspec.architecture"] == f"Flux.2-klein-{model[-2:]}/lora"
