"""lorakit/export/load.py: one line puts an adapter into pipelines that lorakit did not write, and diffusers knows it.

The oracle is the merged base: a picture with the adapter is the picture of a base whose weights hold it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import lorakit
from lorakit.core.errors import InputError
from lorakit.export import write_adapter
from lorakit.export.merge import fold
from lorakit.export.probe import stock_components
from tests.export.tiny import calls, equal, family, made, predictions

TOLERANCE = 1e-4  # of values in 0 … 1: merged weights round otherwise than the sum beside them
SIDE = 32
Pipeline = Any


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((1, SIDE, SIDE, 3), dtype=np.float32)


MASK = (np.arange(SIDE) < SIDE // 2).astype(np.float32)[None, :, None, None] * np.ones((1, 1, SIDE, 1), np.float32)


def with_unet(pipeline: Pipeline, **changed: Any) -> Pipeline:
    """The components of `pipeline` with another U-Net of the same layers, its own weights from a fixed seed."""
    torch.manual_seed(3)
    config = {**pipeline.unet.config, **changed}
    return {**pipeline.components, "unet": diffusers.UNet2DConditionModel.from_config(config).eval()}


def controlled(pipeline: Pipeline) -> Pipeline:
    torch.manual_seed(4)
    net = diffusers.ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(8, 16, 16))
    for block in net.controlnet_down_blocks:  # zero at birth, when they control nothing
        torch.nn.init.normal_(block.weight, std=0.1)
    return diffusers.StableDiffusionControlNetPipeline(**pipeline.components, controlnet=net.eval())


def adapted(pipeline: Pipeline) -> Pipeline:
    torch.manual_seed(5)
    net = diffusers.T2IAdapter(channels=[16, 32], num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter")
    # its features go into blocks with attention before these shrink them
    parts = with_unet(
        pipeline, down_block_types=["CrossAttnDownBlock2D"] * 2, up_block_types=["CrossAttnUpBlock2D"] * 2
    )
    del parts["image_encoder"]
    return diffusers.StableDiffusionAdapterPipeline(**parts, adapter=net.eval())


def upscaling(pipeline: Pipeline) -> Pipeline:
    parts = with_unet(pipeline, in_channels=7, num_class_embeds=1000)
    del parts["image_encoder"]
    scheduler = diffusers.DDPMScheduler()
    return diffusers.StableDiffusionUpscalePipeline(**parts, low_res_scheduler=scheduler, max_noise_level=350)


KINDS: dict[str, tuple[Callable[[Pipeline], Pipeline], dict[str, Any]]] = {
    "text to image": (lambda p: p, {"width": SIDE, "height": SIDE}),
    "image to image": (diffusers.StableDiffusionImg2ImgPipeline.from_pipe, {"image": picture(0), "strength": 0.9}),
    "inpaint": (
        diffusers.StableDiffusionInpaintPipeline.from_pipe,
        {"image": picture(0), "mask_image": MASK, "width": SIDE, "height": SIDE},
    ),
    "inpaint, nine channels": (
        lambda p: diffusers.StableDiffusionInpaintPipeline(**with_unet(p, in_channels=9)),
        {"image": picture(0), "mask_image": MASK, "width": SIDE, "height": SIDE},
    ),
    "ControlNet": (controlled, {"image": picture(1)}),
    "T2I-adapter": (adapted, {"image": torch.from_numpy(picture(1)).movedim(-1, 1)}),
    "upscale": (upscaling, {"image": picture(2)[:, ::2, ::2]}),
}


def draw(pipeline: Pipeline, arguments: dict[str, Any]) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(
        "a thing", **arguments, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np"
    )
    return np.asarray(result.images)


def fresh(kind: str = "text to image") -> Pipeline:
    return KINDS[kind][0](family().stock_pipeline())


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters for the attention layers and the text encoder, in the dialects that most files have."""
    folder = tmp_path_factory.mktemp("adapters")
    one, two = (
        made(targets=("to_q", "to_v", "ff.net.2"), alpha=8.0),
        made(rank=2, alpha=6.0, targets=("to_k",), text=False),
    )
    found = {}
    for name, state, format in (("one", one, "kohya"), ("two", two, "diffusers")):
        found[name] = folder / f"{name}.safetensors"
        write_adapter(state, found[name], format=format, family=family())
    return found


STATES = {
    "one": lambda: made(targets=("to_q", "to_v", "ff.net.2"), alpha=8.0),
    "two": lambda: made(rank=2, alpha=6.0, targets=("to_k",), text=False),
}


def merged(kind: str, **weights: float) -> np.ndarray:
    pipeline = fresh(kind)
    for name, weight in weights.items():
        fold(stock_components(pipeline, family()), STATES[name](), weight=weight)
    return draw(pipeline, KINDS[kind][1])


@pytest.mark.parametrize("kind", KINDS)
def test_every_stock_pipeline_draws_what_a_merged_base_draws(kind: str, files: dict[str, Path]) -> None:
    pipeline, arguments = fresh(kind), KINDS[kind][1]
    plain = draw(pipeline, arguments)
    loaded = lorakit.load_adapter(pipeline, files["one"], 0.8)
    assert loaded.layers == {"text_encoder": 12, "unet": len(STATES["one"]().layers()) - 12}
    got = draw(pipeline, arguments)
    assert distance(got, merged(kind, one=0.8)) < TOLERANCE
    assert distance(got, plain) > 20 * TOLERANCE, "the adapter is seen"
    if kind == "T2I-adapter":  # diffusers gave it no methods for adapters
        assert not hasattr(pipeline, "set_adapters")
        return
    pipeline.set_adapters(loaded.name, 0.0)
    assert np.array_equal(draw(pipeline, arguments), plain)
    pipeline.unload_lora_weights()
    assert np.array_equal(draw(pipeline, arguments), plain)


def test_a_weight_of_zero_changes_nothing(files: dict[str, Path]) -> None:
    pipeline, arguments = fresh(), KINDS["text to image"][1]
    plain = draw(pipeline, arguments)
    lorakit.load_adapter(pipeline, files["one"], 0.0)
    assert np.array_equal(draw(pipeline, arguments), plain)


def test_several_adapters_with_weights_and_without(files: dict[str, Path]) -> None:
    pipeline, arguments = fresh(), KINDS["text to image"][1]
    assert lorakit.load_adapter(pipeline, files["one"], 0.5, adapter_name="first").name == "first"
    assert lorakit.load_adapter(pipeline, str(files["two"]), -1.5).name == "default_0"
    assert pipeline.get_active_adapters() == ["first", "default_0"]
    assert pipeline.unet.active_adapters() == pipeline.text_encoder.active_adapters() == ["first", "default_0"]
    assert pipeline.get_list_adapters() == {"unet": ["first", "default_0"], "text_encoder": ["first"]}
    assert distance(draw(pipeline, arguments), merged("text to image", one=0.5, two=-1.5)) < TOLERANCE
    pipeline.set_adapters(["first", "default_0"], [1.0, 0.25])
    assert distance(draw(pipeline, arguments), merged("text to image", one=1.0, two=0.25)) < TOLERANCE
    pipeline.delete_adapters("first")
    assert distance(draw(pipeline, arguments), merged("text to image", two=0.25)) < TOLERANCE
    assert lorakit.load_adapter(pipeline, files["one"], adapter_name="first").weights == {
        "text_encoder": 1.0,
        "unet": 1.0,
    }
    assert distance(draw(pipeline, arguments), merged("text to image", one=1.0, two=0.25)) < TOLERANCE


def test_beside_what_diffusers_loaded_and_what_is_switched_off_stays_off(files: dict[str, Path]) -> None:
    pipeline, arguments = fresh(), KINDS["text to image"][1]
    pipeline.load_lora_weights(files["two"].parent, weight_name=files["two"].name, adapter_name="theirs")
    lorakit.load_adapter(pipeline, files["one"], adapter_name="ours")
    assert distance(draw(pipeline, arguments), merged("text to image", one=1.0, two=1.0)) < TOLERANCE
    pipeline.set_adapters("ours")
    lorakit.load_adapter(pipeline, files["two"], 0.5)
    assert pipeline.get_active_adapters() == ["ours", "default_0"]
    assert distance(draw(pipeline, arguments), merged("text to image", one=1.0, two=0.5)) < TOLERANCE


def test_fused_and_taken_out_again(files: dict[str, Path]) -> None:
    pipeline, arguments = fresh(), KINDS["text to image"][1]
    plain = draw(pipeline, arguments)
    lorakit.load_adapter(pipeline, files["one"], 0.8)
    lorakit.load_adapter(pipeline, files["two"], 0.5)
    beside = draw(pipeline, arguments)
    pipeline.fuse_lora()
    assert distance(draw(pipeline, arguments), beside) < TOLERANCE
    with pytest.raises(InputError, match="unfuse_lora"):
        lorakit.load_adapter(pipeline, files["two"])
    pipeline.unfuse_lora()
    assert distance(draw(pipeline, arguments), beside) < TOLERANCE
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert distance(draw(pipeline, arguments), beside) < TOLERANCE, "a base of its own"
    assert distance(draw(pipeline, arguments), plain) > 20 * TOLERANCE


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
    got, full = calls().answer(stock_components(pipeline, family())), predictions((STATES["one"](), 1.0))
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
    assert equal(got, {"unet": predictions((STATES["one"](), 1.0))["unet"]})


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
    without = diffusers.StableDiffusionPipeline(**{**fresh().components, "text_encoder": None})
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
