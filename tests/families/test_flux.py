"""lorakit/families/flux.py: guidance, the encoders' captions, and files that the stock loader reads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorakit.adapters import AdapterState
from lorakit.adapters.state import adaptable_layers, factor_shapes
from lorakit.core.errors import InputError, VerificationError
from lorakit.export import read_adapter, write_verified
from lorakit.families import describe, flux, load
from lorakit.families.protocol import Family
from lorakit.recipe import Recipe
from lorakit.sampling.pictures import Request
from lorakit.verbs.sample import sample
from lorakit.verbs.train import train
from tests.verbs.conftest import make_recipe  # noqa: F401, a fixture


def adapter(family: Family, chosen: tuple[str, ...], *, rank: int = 2, alpha: float = 3.0) -> AdapterState:
    """A random adapter on all layers whose name "<component>.<path>" begins with one of `chosen`."""
    draw = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for part in (family.backbone, *family.text_encoders):
        for path, layer in adaptable_layers(family.components[part]).items():
            if f"{part}.{path}".startswith(chosen):
                for letter, shape in zip("AB", factor_shapes(layer, rank), strict=True):
                    tensors[f"{part}.{path}.lora_{letter}.weight"] = 0.1 * torch.randn(shape, generator=draw)
    return AdapterState("lora", tensors, {name.rpartition(".lora_")[0]: alpha for name in tensors})


BLOCKS = ("transformer.transformer_blocks.", "transformer.single_transformer_blocks.")


def schnell(tmp_path: Path) -> Path:
    """The tiny model as if it were not told its guidance: a configuration, no weights that fit it."""
    folder = Path(shutil.copytree(flux.tiny().path, tmp_path / "schnell"))
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "guidance_embeds": False}))
    return folder


def guidance_of(family: Family) -> Tensor | None:
    handed: list[Tensor | None] = []
    hook = family.components["transformer"].register_forward_pre_hook(
        lambda module, args, kwargs: handed.append(kwargs.get("guidance")), with_kwargs=True
    )
    with torch.no_grad():
        x_t = torch.zeros(2, *family.latent_shape(32, 32))
        family.predict(x_t, torch.tensor([0.1, 0.9]), family.encode_text(["a", "b"]))
    hook.remove()
    return handed[0]


def test_dev_is_told_one_in_training_or_what_is_set() -> None:
    assert guidance_of(flux.tiny()).tolist() == [1.0, 1.0]  # type: ignore[union-attr]
    set_to = load("flux", str(flux.tiny().path), guidance=3.5)
    assert guidance_of(set_to).tolist() == [3.5, 3.5]  # type: ignore[union-attr]


def test_what_is_told_no_guidance_refuses_one(tmp_path: Path) -> None:
    folder = str(schnell(tmp_path))
    assert guidance_of(load("flux", folder)) is None
    assert load("flux", folder).metadata()["modelspec.architecture"] == "flux-1-schnell/lora"
    for ask in (load, describe):
        with pytest.raises(InputError, match=r"model\.guidance: this model is told no guidance"):
            ask("flux", folder, guidance=1.0)


def test_t5_reads_as_many_tokens_as_are_set_and_pictures_are_drawn_with_as_many() -> None:
    family = load("flux", str(flux.tiny().path), max_sequence_length=7)
    text = family.encode_text(["a red circle", ""])
    assert text["states"].shape[:2] == (2, 7) and describe("flux", str(family.path), max_sequence_length=7)
    drawn = family.live_pipeline().encode_prompt("a red circle", None)
    torch.testing.assert_close(drawn[0], text["states"][:1])
    torch.testing.assert_close(drawn[1], text["pooled"][:1])
    whole = load("flux", str(flux.tiny().path))
    assert family.fingerprint("text_encoder_2") != whole.fingerprint("text_encoder_2")
    assert family.fingerprint("text_encoder") == whole.fingerprint("text_encoder")


def test_latents_are_shifted_and_scaled() -> None:
    family = flux.tiny()
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        z = family.vae.encode(pixels).latent_dist.mean
    config = family.vae.config
    assert config.shift_factor == 0.1
    torch.testing.assert_close(family.encode_images(pixels), (z - 0.1) * config.scaling_factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_stock_loader_splits_what_kohyas_layout_fuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    # of blocks with one stream it splits the published width alone: tests/families/test_true_shapes.py
    family = flux.tiny()
    monkeypatch.setattr(family, "stock_formats", ("kohya",))
    state = adapter(family, (BLOCKS[0], "text_encoder."))
    report = write_verified(state, tmp_path / "a.safetensors", family=family, format="kohya", dtype=dtype)
    assert (report.reader, report.modules) == ("stock pipeline", len(state.layers()))


def test_a_layer_that_the_stock_loader_drops_or_refuses_fails_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = flux.tiny()
    monkeypatch.setattr(family, "stock_formats", ("kohya",))
    dropped = adapter(family, ("transformer.x_embedder", "transformer.transformer_blocks.0.ff.net.2"))
    with pytest.raises(VerificationError, match="has 1 adapted layers instead of 2"):
        write_verified(dropped, tmp_path / "a.safetensors", family=family, format="kohya")
    with pytest.raises(VerificationError, match="norm_out_linear"):
        state = adapter(family, ("transformer.norm_out",))
        write_verified(state, tmp_path / "a.safetensors", family=family, format="kohya")


@pytest.mark.parametrize(
    "chosen", [(*BLOCKS, "text_encoder."), ("transformer.single_transformer_blocks.0.attn.to_v", BLOCKS[0])]
)
def test_to_kohyas_layout_and_back_the_weights_change_alike(tmp_path: Path, chosen: tuple[str, ...]) -> None:
    family = flux.tiny()
    state = adapter(family, chosen)
    for name, format in (("a", "diffusers"), ("b", "kohya"), ("c", "diffusers")):
        report = write_verified(state, tmp_path / f"{name}.safetensors", family=family, format=format)
        assert report.reader == ("lorakit" if format == "kohya" else "stock pipeline")
        state = read_adapter(tmp_path / f"{name}.safetensors", family=family)
    first, last = (read_adapter(tmp_path / f"{name}.safetensors", family=family) for name in "ac")
    assert first.layers() == last.layers()
    for layer in first.layers():
        one, other = (
            s.alphas[layer]
            / len(s.tensors[f"{layer}.lora_A.weight"])
            * (s.tensors[f"{layer}.lora_B.weight"] @ s.tensors[f"{layer}.lora_A.weight"])
            for s in (first, last)
        )
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_an_adapter_of_t5_has_no_place(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    pair = {"lora_down.weight": torch.ones(2, 32), "lora_up.weight": torch.ones(16, 2), "alpha": torch.tensor(1.0)}
    for prefix in ("lora_te2_", "lora_te3_"):
        layer = f"{prefix}encoder_block_0_layer_0_SelfAttention_q"
        save_file({f"{layer}.{end}": tensor for end, tensor in pair.items()}, tmp_path / "t5.safetensors")
        with pytest.raises(InputError, match=f"{layer}.* has no place in a model of the family flux"):
            read_adapter(tmp_path / "t5.safetensors", family=flux.tiny())


@pytest.mark.parametrize(
    ("keys", "own"),
    [
        (["lora_unet_single_blocks_0_modulation_lin.alpha", "lora_unet_single_blocks_0_linear1.alpha"], True),
        (["lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha", "lora_unet_single_blocks_0_linear1.alpha"], True),
        (["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"], True),  # diffusers' own training script
        (["lora_unet_single_blocks_0_linear1.alpha"], False),  # Chroma has no modulation that could be adapted
        (["lora_unet_double_blocks_0_img_attn_qkv.alpha", "other"], False),
    ],
)
def test_adapters_of_other_programs_are_recognised(keys: list[str], own: bool) -> None:
    assert flux.recognises(keys) == own


def test_a_negative_prompt_is_refused_before_the_start(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:  # noqa: F811
    path, said = str(flux.tiny().path), "negative_prompt: this model is led away from nothing"
    with pytest.raises(InputError, match=said):
        sample(path, [], wanted=[Request("a", 1, "red")], out=tmp_path / "drawn")
    drawn = ("sample.negative_prompt=red", "sample.width=32")
    with pytest.raises(InputError, match=said):
        train(make_recipe("run", "model.family=flux", f"model.path={path}", "adapter.targets=all", *drawn))
    assert not (tmp_path / "drawn").exists() and not (tmp_path / "run" / "recipe.toml").exists()
