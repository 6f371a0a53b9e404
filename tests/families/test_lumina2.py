"""Lumina 2: what is particular to it. What all families keep: test_protocol.py."""

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorakit import families
from lorakit.adapters import AdapterState
from lorakit.adapters.state import FIRST, SECOND, factor_shapes
from lorakit.core.errors import InputError
from lorakit.data.cache import fill_text, text_key
from lorakit.data.shards import Cache
from lorakit.export import DIALECTS
from lorakit.export.keymap import family_layers
from lorakit.export.verify import write_verified
from lorakit.families import lumina2, sd, zimage

ROWS = [2304, 768, 768]  # of queries, keys and values as published, which diffusers' converters have built in


@pytest.mark.parametrize("part", lumina2.PARTS)
def test_a_missing_component_is_named(tmp_path: Path, part: str) -> None:
    folder = shutil.copytree(lumina2.tiny().path, tmp_path / "model")
    shutil.rmtree(folder / part)
    with pytest.raises(InputError, match=f"lacks the component {part} "):
        families.load("lumina2", str(folder))


def test_other_families_folders_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"StableDiffusionPipeline.*model\.family"):
        families.load("lumina2", str(sd.tiny().path))
    with pytest.raises(InputError, match=r"Lumina2Pipeline.*model\.family"):
        families.load("sd", str(lumina2.tiny().path))


def test_emphasis_is_refused() -> None:
    with pytest.raises(InputError, match="weighted_tags: captions of Lumina 2"):
        lumina2.tiny().encode_text(["a (dog:1.3)"], weighted=True)


def test_a_caption_comes_behind_the_systems_prompt_and_an_empty_one_alone() -> None:
    family = lumina2.tiny()
    counted = families.describe("lumina2", str(family.path)).count_tokens
    said = len(family.stock_pipeline().system_prompt) + len(" <Prompt Start> ")
    assert [counted(caption) for caption in ("", "a dog")] == [1, 1 + said + 5]
    mask = family.encode_text(["", "a dog"])["mask"]
    assert mask.sum(dim=1).tolist() == [1, 1 + said + 5]


def test_a_models_own_prompt_of_the_system_is_what_captions_and_pictures_are_made_with() -> None:
    path = str(lumina2.tiny().path)
    family: Any = families.load("lumina2", path, system_prompt="Draw well.")
    described = families.describe("lumina2", path, system_prompt="Draw well.")
    assert described.count_tokens("a") == 1 + len("Draw well. <Prompt Start> a")
    states, mask, _, _ = family.live_pipeline().encode_prompt(["a dog"], do_classifier_free_guidance=False)
    own = family.encode_text(["a dog"])
    assert torch.equal(states, own["states"]) and torch.equal(mask, own["mask"])
    assert family.fingerprint("text_encoder") != lumina2.tiny().fingerprint("text_encoder")
    assert family.fingerprint("vae") == lumina2.tiny().fingerprint("vae")


def test_captions_of_several_lengths_are_asked_as_each_alone(tmp_path: Path) -> None:
    family, cache = lumina2.tiny(), Cache(tmp_path)
    captions = ["a", "a longer caption", ""]
    fill_text(cache, captions, encode=family.encode_text, fingerprint="x")
    alone, all_three = (cache.read_stacked([text_key(c, "x") for c in some]) for some in (captions[:1], captions))
    x_t, t = torch.randn(3, *family.latent_shape(32, 48)), torch.tensor([0.3, 0.7, 0.5])
    with torch.no_grad():
        together, one = family.predict(x_t, t, all_three)[:1], family.predict(x_t[:1], t[:1], alone)
    torch.testing.assert_close(together, one, rtol=1e-4, atol=1e-5)


@functools.cache
def published() -> Any:
    """The transformer with one block of each kind, of the published width."""
    from diffusers import Lumina2Transformer2DModel

    with torch.device("meta"):
        return Lumina2Transformer2DModel(num_layers=1, num_refiner_layers=1, cap_feat_dim=2304)


def test_an_original_checkpoint_with_our_names_is_converted_to_ours() -> None:
    from diffusers.loaders.single_file_utils import convert_lumina2_to_diffusers

    names, draw = lumina2.Names({"transformer": published()}), torch.Generator().manual_seed(0)
    # a column of each weight is enough
    wanted = {
        path: torch.randn(layer.out_features, 1, generator=draw)
        for path, layer in published().named_modules()
        if isinstance(layer, nn.Linear)
    }
    given = {f"{names.original_name('transformer', path)}.weight": weight for path, weight in wanted.items()}
    for whole, group in names.fused.items():
        rows = [given.pop(f"{part.removeprefix('transformer.')}.weight") for part in group]
        assert [len(row) for row in rows] == ROWS
        given[f"{whole.removeprefix('transformer.')}.weight"] = torch.cat(rows)
    assert len(given) == len(wanted) - 2 * 3
    converted = convert_lumina2_to_diffusers(given)
    assert {key.removesuffix(".weight") for key in converted} == set(wanted)
    for path, weight in wanted.items():
        assert torch.equal(converted[f"{path}.weight"], weight), path


@functools.cache
def everywhere() -> AdapterState:
    """An adapter on every layer that may have one, whose alphas and ranks differ."""
    draw, tensors, alphas = torch.Generator().manual_seed(0), {}, {}
    for i, (path, layer) in enumerate(family_layers(lumina2.tiny())["transformer"].items()):
        for ending, shape in zip((FIRST, SECOND), factor_shapes(layer, 1 + i % 3), strict=True):
            tensors[f"transformer.{path}{ending}"] = 0.1 * torch.randn(shape, generator=draw)
        alphas[f"transformer.{path}"] = 1.0 + i % 2
    return AdapterState("lora", tensors, alphas)


@pytest.mark.parametrize(("format", "reader"), [("diffusers", "stock pipeline"), ("kohya", "lorakit")])
def test_every_layer_is_written_and_read_back(tmp_path: Path, format: str, reader: str) -> None:
    family = lumina2.tiny()
    report = write_verified(everywhere(), tmp_path / "a.safetensors", family=family, format=format)
    assert (report.modules, report.reader) == (len(everywhere().layers()), reader)


def test_kohyas_names_are_those_of_its_trainer() -> None:
    tensors, _ = DIALECTS.module("kohya").write(everywhere(), lumina2.tiny(), {})
    blocks = [("layers", 2, True), ("noise_refiner", 1, True), ("context_refiner", 1, False)]
    inside = ["attention_qkv", "attention_out", *(f"feed_forward_w{i}" for i in (1, 2, 3))]
    expected = {
        f"lora_unet_{name}_{i}_{layer}"
        for name, count, modulated in blocks
        for i in range(count)
        for layer in [*inside, *(["adaLN_modulation_1"] * modulated)]
    }
    outside = ["x_embedder", "t_embedder_mlp_0", "t_embedder_mlp_2", "cap_embedder_1"]
    expected |= {f"lora_unet_{name}" for name in [*outside, "final_layer_adaLN_modulation_1", "final_layer_linear"]}
    assert {key.partition(".")[0] for key in tensors} == expected


def test_a_file_that_kohyas_trainer_wrote_is_one_of_queries_keys_and_values() -> None:
    base = "lora_unet_layers_0_attention_qkv"
    file = {
        f"{base}.lora_down.weight": torch.randn(2, 32),
        f"{base}.lora_up.weight": torch.randn(32 + 2 * 16, 2),
        f"{base}.alpha": torch.tensor(1.0),
    }
    state = DIALECTS.module("kohya").read(file, {}, lumina2.tiny())
    parts = [f"transformer.layers.0.attn.to_{one}" for one in "qkv"]
    assert {*state.layers()} == {*parts} and set(state.alphas.values()) == {1.0}
    assert torch.equal(torch.cat([state.tensors[part + SECOND] for part in parts]), file[f"{base}.lora_up.weight"])
    assert lumina2.recognises(file) and not zimage.recognises(file)


def test_a_file_in_the_published_names_is_read_as_the_stock_loader_reads_it() -> None:
    from diffusers import Lumina2Pipeline

    names, draw = lumina2.Names({"transformer": published()}), torch.Generator().manual_seed(0)
    shapes = {names.original_name("transformer", path): (w.in_features, w.out_features) for path, w in blocks()}
    for whole, group in names.fused.items():
        rows = [shapes.pop(part.removeprefix("transformer."))[1] for part in group]
        shapes[whole.removeprefix("transformer.")] = published().config.hidden_size, sum(rows)
    file = {}
    for name, (ins, outs) in shapes.items():
        file[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(2, ins, generator=draw)
        file[f"diffusion_model.{name}.lora_B.weight"] = torch.randn(outs, 2, generator=draw)
    state = DIALECTS.module("diffusers").read(file, {}, names, assume_alpha=2.0)
    assert lumina2.recognises(file) and not zimage.recognises(file)
    stock = Lumina2Pipeline.lora_state_dict(dict(file))
    assert state.tensors.keys() == stock.keys() and set(state.alphas.values()) == {2.0}
    assert all(torch.equal(state.tensors[name], stock[name]) for name in stock)


def blocks() -> list[tuple[str, nn.Linear]]:
    """The linear layers of the published transformer's blocks: diffusers reads no others there."""
    inside = ("layers.", "noise_refiner.", "context_refiner.")
    modules = published().named_modules()
    return [(path, w) for path, w in modules if isinstance(w, nn.Linear) and path.startswith(inside)]


def test_files_of_z_image_are_not_its_own() -> None:
    for name in ("transformer.layers.0.attention.to_q.lora_A.weight", "lora_unet_layers_0_attention_to_q.alpha"):
        assert zimage.recognises([name]) and not lumina2.recognises([name])
