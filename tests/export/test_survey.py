"""lorakit/export/survey.py: what is in a file of every dialect, without a model, and what two differ in."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorakit.adapters import AdapterState
from lorakit.core.errors import InputError
from lorakit.export import inspect_adapter, write_adapter
from lorakit.export.merge import product
from lorakit.export.survey import compare_adapters, located
from tests.export import fuzz
from tests.export.tiny import family, made

NAMES = {"kohya": {"unet": "lora_unet", "text_encoder": "lora_te"}}
FORMATS = ["kohya", "diffusers", "peft", "lorakit"]


def norm_of(state: AdapterState, beginning: str) -> float:
    square = 0.0
    for layer in (layer for layer in state.layers() if f"{layer}.".startswith(beginning)):
        first, second = (state.tensors[f"{layer}.lora_{letter}.weight"] for letter in "AB")
        square += float((state.alphas[layer] / len(first) * product(first, second)).double().norm()) ** 2
    return math.sqrt(square)


@pytest.mark.parametrize("format", FORMATS)
def test_every_dialect_is_surveyed(tmp_path, format: str) -> None:
    state = made(rank=4, alpha=3.0, targets=("to_q", "conv1"))
    path = tmp_path / ("a" if format == "peft" else "a.safetensors")
    write_adapter(state, path, format=format, family=family(), dtype=torch.bfloat16)
    found = inspect_adapter(path)
    assert (found.format, found.kind, found.dtype, found.modules) == (format, "lora", "bf16", len(state.layers()))
    assert (found.odd, found.dead, found.broken, found.note) == ([], [], [], "")
    assert (found.digest, found.families) == ("verified", [family().name])
    for component, rank, alpha in (("unet", 4, 3.0), ("text_encoder", 2, 4.5)):
        part = found.components[NAMES.get(format, {}).get(component, component)]
        layers = [layer for layer in state.layers() if layer.startswith(f"{component}.")]
        assert (part.layers, part.ranks, part.alphas) == (len(layers), {rank: len(layers)}, [alpha])
        assert part.norm == pytest.approx(norm_of(state, f"{component}."), rel=1e-2)
        for block, norm in part.blocks.items():
            inner = "encoder.layers" if component == "text_encoder" else ""
            beginning = f"{component}.{inner}{block.removeprefix('layers') if inner else block}."
            assert norm == pytest.approx(norm_of(state, beginning), rel=1e-2), block
    assert list(found.components[NAMES.get(format, {}).get("unet", "unet")].blocks) == [
        "down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1",
    ]  # fmt: skip
    json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("base", "component", "block", "place"),
    [
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "lora_unet", "input_blocks.4", "attn1_to_q"),
        ("lora_unet_middle_block_1_proj_in", "lora_unet", "middle_block.1", "proj_in"),
        ("unet.down_blocks.0.resnets.1.conv1", "unet", "down_blocks.0", "conv1"),
        ("unet/base_model.model.mid_block.attentions.0.proj_out", "unet", "mid_block", "proj_out"),
        ("base_model.model.up_blocks.1.attentions.2.transformer_blocks.0.ff.net.2", "", "up_blocks.1", "ff_net_2"),
        ("lora_te_text_model_encoder_layers_11_mlp_fc1", "lora_te", "layers.11", "mlp_fc1"),
        ("unet.conv_in", "unet", "", "conv_in"),
        ("transformer.transformer_blocks.3.attn.to_q", "transformer", "transformer_blocks.3", "attn_to_q"),
    ],
)  # fmt: skip
def test_a_layer_has_its_place_in_every_spelling(base: str, component: str, block: str, place: str) -> None:
    assert located(base, component) == (block, place)


def test_dead_and_broken_layers_are_listed(tmp_path) -> None:
    state = fuzz.adapter()
    state.tensors["unet.to_q.lora_B.weight"].zero_()
    write_adapter(state, tmp_path / "a.safetensors", format="diffusers", family=fuzz.model())
    found = inspect_adapter(tmp_path / "a.safetensors")
    assert (found.dead, found.broken) == (["unet.to_q"], [])
    tensors = load_file(tmp_path / "a.safetensors")
    tensors["unet.conv.lora_A.weight"].fill_(float("nan"))
    save_file(tensors, tmp_path / "b.safetensors")
    found = inspect_adapter(tmp_path / "b.safetensors")
    assert (found.dead, found.broken, found.digest) == (["unet.to_q"], ["unet.conv"], "none")
    json.dumps(found.to_json(), allow_nan=False)


def test_a_changed_file_is_looked_at_and_said_to_be_changed(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    write_adapter(fuzz.adapter(), path, format="kohya", family=fuzz.model())
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["lora_unet_to_q.alpha"] += 1
    save_file(tensors, path, metadata)
    assert inspect_adapter(path).digest == "differs"


def test_what_is_odd_is_listed_and_what_is_missing_shown(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    pair = {"lora_unet_a.lora_down.weight": torch.ones(2, 3), "lora_unet_a.lora_up.weight": torch.ones(3, 2)}
    save_file({**pair, "lora_unet_b.lora_up.weight": torch.ones(3, 2), "lora_unet_a.dora_scale": torch.ones(1)}, path)
    found = inspect_adapter(path)
    assert found.components["lora_unet"].alphas == [None]
    assert found.components["lora_unet"].norm == pytest.approx(6.0)
    assert found.odd == ["lora_unet_a.dora_scale", "lora_unet_b (half of a pair)"]
    assert found.kind == "other" and "a DoRA" in found.note
    save_file({**pair, "lora_unet_a.lora_up.weight": torch.ones(3, 4)}, path)
    with pytest.raises(InputError, match="do not fit each other"):
        inspect_adapter(path)
    with pytest.raises(InputError, match="no such adapter file"):
        inspect_adapter(tmp_path / "b.safetensors")


@pytest.mark.parametrize("format", FORMATS)
def test_a_difference_is_told_by_layer_and_through_dialects(tmp_path, format: str) -> None:
    one = made(targets=("to_q", "conv1"))
    changed = {**one.tensors}
    name = next(key for key in changed if key.endswith("to_q.lora_B.weight"))
    changed[name] = 1.5 * changed[name]
    lacking = next(layer for layer in one.layers() if layer.startswith("text_encoder"))
    kept = {key: tensor for key, tensor in changed.items() if not key.startswith(f"{lacking}.")}
    other = AdapterState("lora", kept, {layer: a for layer, a in one.alphas.items() if layer != lacking})
    first, second = tmp_path / "a.safetensors", tmp_path / ("b" if format == "peft" else "b.safetensors")
    write_adapter(one, first, format="kohya", family=family())
    write_adapter(other, second, format=format, family=family())
    for names in (None, family()):
        found = compare_adapters(first, second, family=names)
        apart = {layer for layer, off in found.layers.items() if off > 1e-7}
        assert len(found.layers) == len(other.layers()) and len(apart) == 1
        assert found.layers[apart.pop()] == pytest.approx(0.5 / 1.5)
        assert len(found.only_first) == 1 and not found.only_second
    assert found.only_first == [lacking]


def test_equal_products_are_equal_whatever_their_factors(tmp_path) -> None:
    one = fuzz.adapter()
    turned = {key: t * (4.0 if "_A" in key else 0.5) for key, t in one.tensors.items()}
    other = AdapterState("lora", turned, {layer: alpha / 2 for layer, alpha in one.alphas.items()})
    for state, name in ((one, "a"), (other, "b")):
        write_adapter(state, tmp_path / f"{name}.safetensors", format="kohya", family=fuzz.model())
    found = compare_adapters(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert len(found.layers) == 5 and max(found.layers.values()) < 1e-7
