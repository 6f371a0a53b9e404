"""FLUX.1 dev and Chroma as published, from their configurations and without weights; see test_true_shapes.py.

Names of kohya's files are written here from the structure of sd-scripts' networks/lora_flux.py: every linear layer of
the blocks.
"""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.adapters import AdapterState, lora, trainable_parameters
from lorakit.adapters.state import adaptable_layers, factor_shapes
from lorakit.export import DIALECTS
from lorakit.families import FAMILIES
from lorakit.families.protocol import Family
from tests.families.test_true_shapes import kohya_text, parts

RANK, WIDTH, DOUBLE, SINGLE = 2, 3072, 19, 38
CLASSES = {"flux_dev": ("flux", "Flux"), "chroma": ("chroma", "Chroma")}
PARAMETERS = {
    "flux_dev": {
        "transformer": 11_901_408_320,
        "vae": 83_819_683,
        "text_encoder": 123_060_480,
        "text_encoder_2": 4_762_310_656,
    },
    "chroma": {"transformer": 8_899_983_424, "vae": 83_819_683, "text_encoder": 4_762_310_656},
}
MODULATED = {"flux_dev": True, "chroma": False}
TEXT = {"flux_dev": kohya_text("lora_te1_", 12), "chroma": set()}
COUNTS = {"flux_dev": (494, 304), "chroma": (418, 228)}  # layers of the transformer, and in kohya's layout


def family(model: str) -> Family:
    module, name = CLASSES[model]
    kind = getattr(FAMILIES.module(module), name)
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


def kohya_blocks(*, modulated: bool) -> Iterator[str]:
    inner = ["attn_qkv", "attn_proj", "mlp_0", "mlp_2"] + ["mod_lin"] * modulated
    yield from (
        f"lora_unet_double_blocks_{i}_{s}_{one}" for i in range(DOUBLE) for s in ("img", "txt") for one in inner
    )
    inner = ["linear1", "linear2"] + ["modulation_lin"] * modulated
    yield from (f"lora_unet_single_blocks_{i}_{one}" for i in range(SINGLE) for one in inner)


@pytest.mark.parametrize("model", CLASSES)
def test_models_have_their_published_numbers_of_parameters(model: str) -> None:
    found = {name: sum(p.numel() for p in module.parameters()) for name, module in parts.__wrapped__(model).items()}
    assert found == PARAMETERS[model]


@pytest.mark.parametrize("model", CLASSES)
def test_kohya_names_are_exactly_those_of_kohyas_own_default_targets(model: str) -> None:
    blocks = set(kohya_blocks(modulated=MODULATED[model]))
    layers = [layer for layer in adapted(model).layers() if layer.startswith("transformer.")]
    assert (len(layers), len(blocks)) == COUNTS[model]
    tensors, _ = DIALECTS.module("kohya").write(adapted(model), family(model), {})
    endings = ("lora_down.weight", "lora_up.weight", "alpha")
    assert set(tensors) == {f"{name}.{ending}" for name in blocks | TEXT[model] for ending in endings}
    ranks = {name: tensors[f"{name}.lora_down.weight"].shape[0] for name in blocks}
    for name, rank in ranks.items():
        assert rank == RANK * (4 if name.endswith("linear1") else 3 if name.endswith("qkv") else 1)
        assert tensors[f"{name}.alpha"] == rank


@pytest.mark.parametrize("model", CLASSES)
def test_diffusers_names_are_those_that_peft_gives_the_adapted_model(model: str) -> None:
    from peft import get_peft_model_state_dict

    state, whole = adapted(model), family(model)
    stock = {
        f"{name}.{key}" if name == whole.backbone or key.startswith("text_model.") else f"{name}.text_model.{key}"
        for name in (whole.backbone, *whole.text_encoders)
        for key in get_peft_model_state_dict(whole.components[name])
    }
    assert set(DIALECTS.module("diffusers").write(state, whole, {})[0]) == stock


@pytest.mark.parametrize("model", CLASSES)
def test_an_adapter_has_as_many_weights_as_the_structure_says(model: str) -> None:
    attention, forward, modulation = 4 * 2, 2 * 5, 7 * MODULATED[model]  # in and out of each layer, in widths
    double = 2 * (attention + forward + modulation)
    single = 3 * 2 + 5 + 6 + 4 * MODULATED[model]
    state = {n: t for n, t in adapted(model).tensors.items() if n.startswith("transformer.")}
    assert sum(t.numel() for t in state.values()) == RANK * WIDTH * (DOUBLE * double + SINGLE * single)
    # block-diagonal, B is three and four times as high as its parts together
    double, single = double + 2 * (12 - 6), single + (4 + 28) - (6 + 5)
    tensors, _ = DIALECTS.module("kohya").write(adapted(model), family(model), {})
    written = sum(t.numel() for key, t in tensors.items() if key.startswith("lora_unet_") and t.ndim)
    assert written == RANK * WIDTH * (DOUBLE * double + SINGLE * single)


def product(pair: tuple[Tensor, Tensor], scale: float) -> Tensor:
    """What the pair gives for some inputs: their whole product would be 60 million numbers."""
    first, second = pair
    x = torch.randn(first.shape[1], 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return scale * second.double() @ (first.double() @ x)


def converted(model: str, tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """What the stock pipeline's loader makes of kohya's file: a pair for each layer of the transformer."""
    import diffusers

    pipeline = getattr(diffusers, family(model).pipelines["text"])
    state = pipeline.lora_state_dict({key: tensor.clone() for key, tensor in tensors.items()})
    ends = (".lora_A.weight", ".lora_B.weight")
    return {
        k.removesuffix(ends[0]): (state[k], state[k.removesuffix(ends[0]) + ends[1]]) for k in state if ends[0] in k
    }


BLOCKS = (
    "transformer_blocks.0.",
    "transformer_blocks.18.",
    "single_transformer_blocks.0.",
    "single_transformer_blocks.37.",
)
MISSING = (
    "transformer_blocks.18.attn.to_k",
    "single_transformer_blocks.37.attn.to_q",
    "single_transformer_blocks.37.proj_mlp",
)


@pytest.mark.parametrize("model", CLASSES)
def test_the_stock_loader_splits_what_kohyas_layout_fuses(model: str) -> None:
    whole, draw = family(model), torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for path, layer in adaptable_layers(whole.components["transformer"]).items():
        if path.startswith(BLOCKS) and path not in MISSING:
            assert isinstance(layer, nn.Linear)
            rank = 3 if path == "transformer_blocks.0.attn.to_v" else 2
            for letter, shape in zip("AB", factor_shapes(layer, rank), strict=True):
                tensors[f"transformer.{path}.lora_{letter}.weight"] = torch.randn(shape, generator=draw)
    state = AdapterState("lora", tensors, {name.rpartition(".lora_")[0]: 1.5 for name in tensors})
    got = converted(model, DIALECTS.module("kohya").write(state, whole, {})[0])
    zero = {f"transformer.{path}" for path in MISSING}
    assert got.keys() - zero == {*state.layers()}
    for layer, pair in got.items():
        if layer in zero:
            assert not product(pair, 1.0).any()
        else:
            own = tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]
            wanted = product(own, state.alphas[layer] / len(own[0]))
            torch.testing.assert_close(product(pair, 1.0), wanted, rtol=1e-5, atol=1e-4, msg=layer)


@pytest.mark.parametrize("model", CLASSES)
def test_a_file_that_kohyas_trainer_wrote_is_read_as_the_stock_loader_reads_it(model: str) -> None:
    draw = torch.Generator().manual_seed(0)
    file: dict[str, Tensor] = {}
    for layer, heights in (("double_blocks_3_txt_attn_qkv", 3), ("single_blocks_5_linear1", 7)):
        file[f"lora_unet_{layer}.lora_down.weight"] = torch.randn(4, WIDTH, generator=draw)
        file[f"lora_unet_{layer}.lora_up.weight"] = torch.randn(heights * WIDTH, 4, generator=draw)
        file[f"lora_unet_{layer}.alpha"] = torch.tensor(2.0)
    state: Any = DIALECTS.module("kohya").read(file, {}, family(model))
    got = converted(model, file)
    assert got.keys() == {*state.layers()} and len(got) == 7
    for layer, pair in got.items():
        own = state.tensors[f"{layer}.lora_A.weight"], state.tensors[f"{layer}.lora_B.weight"]
        torch.testing.assert_close(product(own, state.alphas[layer] / 4), product(pair, 1.0), rtol=1e-5, atol=1e-4)
