"""lorakit/export/load.py: one line puts an adapter into pipelines that lorakit did not write, and diffusers knows it.

The oracle is the merged base: a picture with the adapter is the picture of a base whose weights hold it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lorakit
from lorakit.core.errors import InputError
from lorakit.export import write_adapter
from lorakit.export.merge import folded
from lorakit.export.probe import stock_components
from lorakit.export.weights import Weights
from lorakit.families import FAMILIES
from tests.export.stock import KINDS, Kind, Pipeline, with_unet
from tests.export.tiny import calls, equal, family, made, predictions

TOLERANCE = 1e-4  # of values in 0 … 1: merged weights round otherwise than the sum beside them
TEXT = KINDS["text to image"]
STATES: dict[str, dict[str, Any]] = {
    "one": {"targets": ("to_q", "to_v", "ff.net.2"), "alpha": 8.0},
    "two": {"targets": ("to_k",), "rank": 2, "alpha": 6.0, "text": False},
    "sdxl": {"of": "sdxl", "targets": ("to_q", "to_v", "ff.net.2"), "alpha": 8.0},
}


def draw(pipeline: Pipeline, kind: Kind = TEXT) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    result = pipeline("a thing", **kind.arguments, num_inference_steps=2, generator=generator, output_type="np")
    return np.asarray(result.images)


def fresh(kind: Kind = TEXT) -> Pipeline:
    """A stock pipeline, frozen as one with an adapter is: some processors compute learning layers by other kernels."""
    pipeline = kind.build(FAMILIES.module(kind.family).tiny().stock_pipeline())
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    return pipeline


def merged(kind: Kind = TEXT, **weights: float) -> np.ndarray:
    """What a base draws that has the adapters in its own weights."""
    pipeline = fresh(kind)
    for name, weight in weights.items():
        components = stock_components(pipeline, FAMILIES.module(kind.family).tiny())
        state = Weights(weight).applied(made(**STATES[name]))
        for layer in state.layers():
            component, _, path = layer.partition(".")
            own = components[component].get_submodule(path).weight
            own.data.copy_(folded(own.data, [state], layer))
    return draw(pipeline, kind)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters for attention layers and text encoders, in the dialects that most files have."""
    found = {}
    for name, settings in STATES.items():
        model = FAMILIES.module(settings.get("of", "sd")).tiny()
        found[name] = tmp_path_factory.mktemp("adapters") / f"{name}.safetensors"
        write_adapter(made(**settings), found[name], format="diffusers" if name == "two" else "kohya", family=model)
    return found


@pytest.mark.parametrize("name", KINDS)
def test_every_stock_pipeline_draws_what_a_merged_base_draws(name: str, files: dict[str, Path]) -> None:
    kind = KINDS[name]
    file = "sdxl" if kind.family == "sdxl" else "one"
    pipeline = fresh(kind)
    plain = draw(pipeline, kind)
    loaded = lorakit.load_adapter(pipeline, files[file], 0.8)
    assert sum(loaded.layers.values()) == len(made(**STATES[file]).layers())
    assert distance(draw(pipeline, kind), merged(kind, **{file: 0.8})) < TOLERANCE
    assert distance(draw(pipeline, kind), plain) > 20 * TOLERANCE, "the adapter is seen"
    if not hasattr(pipeline, "set_adapters"):  # diffusers gave it no methods for adapters
        assert name == "T2I-adapter"
        return
    pipeline.set_adapters(loaded.name, 0.0)
    assert np.array_equal(draw(pipeline, kind), plain)
    pipeline.unload_lora_weights()
    assert np.array_equal(draw(pipeline, kind), plain)


def test_a_weight_of_zero_changes_nothing(files: dict[str, Path]) -> None:
    pipeline = fresh()
    plain = draw(pipeline)
    lorakit.load_adapter(pipeline, files["one"], 0.0)
    assert np.array_equal(draw(pipeline), plain)


def test_several_adapters_with_weights_and_without(files: dict[str, Path]) -> None:
    pipeline = fresh()
    assert lorakit.load_adapter(pipeline, files["one"], 0.5, adapter_name="first").name == "first"
    assert lorakit.load_adapter(pipeline, str(files["two"]), -1.5).name == "default_0"
    assert pipeline.get_active_adapters() == ["first", "default_0"]
    assert pipeline.unet.active_adapters() == pipeline.text_encoder.active_adapters() == ["first", "default_0"]
    assert pipeline.get_list_adapters() == {"unet": ["first", "default_0"], "text_encoder": ["first"]}
    assert distance(draw(pipeline), merged(one=0.5, two=-1.5)) < TOLERANCE
    pipeline.set_adapters(["first", "default_0"], [1.0, 0.25])
    assert distance(draw(pipeline), merged(one=1.0, two=0.25)) < TOLERANCE
    pipeline.delete_adapters("first")
    assert distance(draw(pipeline), merged(two=0.25)) < TOLERANCE
    assert lorakit.load_adapter(pipeline, files["one"], adapter_name="first").weights == {
        "text_encoder": 1.0,
        "unet": 1.0,
    }
    assert distance(draw(pipeline), merged(one=1.0, two=0.25)) < TOLERANCE


def test_beside_what_diffusers_loaded_and_what_is_switched_off_stays_off(files: dict[str, Path]) -> None:
    pipeline = fresh()
    pipeline.load_lora_weights(files["two"].parent, weight_name=files["two"].name, adapter_name="theirs")
    lorakit.load_adapter(pipeline, files["one"], adapter_name="ours")
    assert distance(draw(pipeline), merged(one=1.0, two=1.0)) < TOLERANCE
    pipeline.set_adapters("ours")
    lorakit.load_adapter(pipeline, files["two"], 0.5)
    assert pipeline.get_active_adapters() == ["ours", "default_0"]
    assert distance(draw(pipeline), merged(one=1.0, two=0.5)) < TOLERANCE


def test_fused_and_taken_out_again(files: dict[str, Path]) -> None:
    pipeline = fresh()
    plain = draw(pipeline)
    lorakit.load_adapter(pipeline, files["one"], 0.8)
    lorakit.load_adapter(pipeline, files["two"], 0.5)
    beside = draw(pipeline)
    pipeline.fuse_lora()
    assert distance(draw(pipeline), beside) < TOLERANCE
    with pytest.raises(InputError, match="unfuse_lora"):
        lorakit.load_adapter(pipeline, files["two"])
    pipeline.unfuse_lora()
    assert distance(draw(pipeline), beside) < TOLERANCE
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert distance(draw(pipeline), beside) < TOLERANCE, "a base of its own"
    assert distance(draw(pipeline), plain) > 20 * TOLERANCE


@pytest.mark.parametrize("format", ["kohya", "diffusers", "lorakit", "peft"])
def test_every_dialect_gives_the_very_bits_of_lorakits_own_injection(format: str, tmp_path: Path) -> None:
    state = made(alpha=3.0, rslora=True)
    path = tmp_path / ("a" if format == "peft" else "a.safetensors")
    write_adapter(state, path, format=format, family=family())
    pipeline = fresh()
    lorakit.load_adapter(pipeline, path, 0.7)
    assert equal(calls().answer(stock_components(pipeline, family())), predictions((state, 0.7)))


def test_a_weight_for_each_component(files: dict[str, Path]) -> None:
    pipeline = fresh()
    lorakit.load_adapter(pipeline, files["one"], {"text_encoder": 0.0})
    got, full = calls().answer(stock_components(pipeline, family())), predictions((made(**STATES["one"]), 1.0))
    assert equal({"unet": got["unet"]}, full)
    assert equal({"text_encoder": got["text_encoder"]}, predictions())


def test_half_precision_stays_half_precision(files: dict[str, Path]) -> None:
    pipeline = fresh().to(dtype=torch.bfloat16)
    lorakit.load_adapter(pipeline, files["one"])
    assert {p.dtype for p in pipeline.unet.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in pipeline.unet.parameters())


def test_what_diffusers_saves_from_the_pipeline_is_the_adapter(files: dict[str, Path], tmp_path: Path) -> None:
    pipeline = fresh()
    lorakit.load_adapter(pipeline, files["one"], 0.3)
    pipeline.unet.save_lora_adapter(tmp_path, adapter_name="default_0")
    again = fresh()
    again.unet.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    got = calls().answer({"unet": again.unet})
    assert equal(got, {"unet": predictions((made(**STATES["one"]), 1.0))["unet"]})


def test_a_compiled_unet_is_seen_through(files: dict[str, Path]) -> None:
    pipeline = fresh()
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    assert lorakit.load_adapter(pipeline, files["two"]).layers["unet"] > 0


@pytest.mark.parametrize("name", ["", "a.b", "keys", "taken"])
def test_a_name_that_cannot_be_one(name: str, files: dict[str, Path]) -> None:
    pipeline = fresh()
    lorakit.load_adapter(pipeline, files["one"], adapter_name="taken")
    with pytest.raises(InputError, match="adapter_name"):
        lorakit.load_adapter(pipeline, files["two"], adapter_name=name)


def test_what_does_not_fit_says_so_and_changes_nothing(files: dict[str, Path], tmp_path: Path) -> None:
    small, pipeline = fresh(), fresh()
    small.unet = with_unet(small, cross_attention_dim=16)["unet"]
    without = fresh()
    without.text_encoder = None
    offloaded = fresh()
    offloaded.unet.to("meta")
    (tmp_path / "a.safetensors").write_bytes(b"no")
    cases: list[tuple[Pipeline, Any, Any, str]] = [
        (
            small,
            files["one"],
            1.0,
            r"one.safetensors does not fit this StableDiffusionPipeline of the family sd:\n.*attn2",
        ),
        (pipeline, files["sdxl"], 1.0, "sdxl.safetensors does not fit .* of the family sd:.* has no place"),
        (without, files["one"], 1.0, "which has no text_encoder:"),
        (offloaded, files["one"], 1.0, "unet are offloaded"),
        (pipeline, tmp_path / "a.safetensors", 1.0, "damaged"),
        (pipeline, tmp_path / "nowhere.safetensors", 1.0, "no such adapter file"),
        (pipeline, files["one"], float("nan"), "finite"),
        (pipeline, files["two"], {"text_encoder": 0.5}, "has no part 'text_encoder', only unet"),
    ]
    for into, file, weight, said in cases:
        with pytest.raises(InputError, match=f"(?s){said}"):
            lorakit.load_adapter(into, file, weight)
        assert into.get_list_adapters() == {}
