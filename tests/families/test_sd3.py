"""Stable Diffusion 3 folders and files: what is particular to them. What all families keep: test_protocol.py."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit import families
from lorakit.adapters import AdapterState
from lorakit.adapters.state import FIRST, SECOND, factor_shapes
from lorakit.core.errors import InputError
from lorakit.export import read_adapter
from lorakit.export.keymap import family_layers
from lorakit.export.verify import write_verified
from lorakit.families import sd3, sdxl
from tests.families.test_protocol import assert_same, recorded


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(sd3.tiny().path, tmp_path / "model"))


@pytest.fixture
def without_t5(folder: Path) -> Path:
    index = json.loads((folder / "model_index.json").read_text())
    for part in sd3.T5:
        shutil.rmtree(folder / part)
        index[part] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def load(path: object, **settings: Any) -> sd3.StableDiffusion3:
    return families.load("sd3", str(path), **settings)  # type: ignore[return-value]


def adapter(family: sd3.StableDiffusion3) -> AdapterState:
    """A random one of rank 2 on every layer that may have one."""
    tensors, generator = {}, torch.Generator().manual_seed(0)
    for component, layers in family_layers(family).items():
        for path, layer in layers.items():
            for ending, shape in zip((FIRST, SECOND), factor_shapes(layer, 2), strict=True):
                tensors[f"{component}.{path}{ending}"] = 0.05 * torch.randn(shape, generator=generator)
    return AdapterState("lora", tensors, {name.removesuffix(FIRST): 1.0 for name in tensors if name.endswith(FIRST)})


@pytest.mark.parametrize("part", [*sd3.PARTS, *sd3.T5])
def test_a_missing_component_is_named(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)
    with pytest.raises(InputError, match=f"lacks the component {part} "):
        load(folder)
    with pytest.raises(InputError, match=f"lacks the component {part} "):
        families.describe("sd3", str(folder))


def test_other_families_folders_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"StableDiffusionXLPipeline.*model\.family"):
        load(sdxl.tiny().path)
    with pytest.raises(InputError, match=r"StableDiffusion3Pipeline.*model\.family"):
        families.load("sdxl", str(sd3.tiny().path))


def drawn(pipeline: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    return pipeline("a dog", num_inference_steps=1, height=32, width=48, generator=generator, output_type="latent")


def told(family: sd3.StableDiffusion3, pipeline: Any) -> int:
    """How many rows of text `pipeline` tells the backbone, which must be those of `family`."""
    stock = recorded(pipeline.transformer, lambda: drawn(pipeline))
    text = family.encode_text(["", "a dog"])
    t = torch.ones(2)
    own = recorded(family.transformer, lambda: family.predict(stock["hidden_states"], t, text))
    assert own.keys() == stock.keys()
    for name in stock:
        assert_same(own[name], stock[name], name)
    return int(stock["encoder_hidden_states"].shape[1])


def test_without_t5_zeros_stand_for_it_as_in_the_stock_pipeline(without_t5: Path, tmp_path: Path) -> None:
    family = load(without_t5)
    assert told(family, family.stock_pipeline()) == 16 + 256
    assert told(family, family.live_pipeline()) == 16 + 256
    assert (family.token_limit, "text_encoder_3" in family.components) == (16, False)
    found = families.describe("sd3", str(without_t5))
    assert found.token_limit == 16
    assert found.text_size == sum(x.numel() for x in family.encode_text(["a"]).values())
    state = adapter(family)
    assert write_verified(state, tmp_path / "a.safetensors", family=family).modules == len(state.layers())


def test_t5_reads_as_many_tokens_as_the_settings_say_and_so_in_samples(folder: Path) -> None:
    few, more = (load(folder, max_sequence_length=n) for n in (7, 300))
    assert told(few, few.live_pipeline()) == 16 + 7
    assert told(more, more.live_pipeline("text")) == 16 + 300
    for n, family in ((7, few), (300, more)):
        found = families.describe("sd3", str(folder), max_sequence_length=n)
        assert found.token_limit == family.token_limit == n
        assert found.text_size == sum(x.numel() for x in family.encode_text(["a"]).values())
    with pytest.raises(InputError, match=r"model\.max_sequence_length"):
        load(folder, max_sequence_length=513)


def test_what_is_cached_goes_by_t5_and_its_limit(folder: Path) -> None:
    few, more = (load(folder, max_sequence_length=n) for n in (7, 8))
    same = {name: few.fingerprint(name) == more.fingerprint(name) for name in few.components}
    assert same == {name: name != "text_encoder_3" for name in few.components}
    before = few.fingerprint("text_encoder_3")
    file = folder / "tokenizer_3" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "added": 1}))
    assert few.fingerprint("text_encoder_3") != before


def test_an_adapter_of_t5_is_refused(tmp_path: Path) -> None:
    family = sd3.tiny()
    write_verified(adapter(family), tmp_path / "a.safetensors", family=family)
    tensors = load_file(tmp_path / "a.safetensors")
    for end in ("lora_A", "lora_B"):
        tensors[f"text_encoder_3.encoder.block.0.layer.0.SelfAttention.q.{end}.weight"] = torch.ones(1, 1)
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match=r"text_encoder_3\.encoder"):
        read_adapter(tmp_path / "b.safetensors", family=family, assume_alpha=1.0)


def test_emphasis_moves_the_states_of_all_encoders_and_not_the_pooled_one() -> None:
    plain, marked = (sd3.tiny().encode_text([caption], weighted=True) for caption in ("a cat", "a (cat:1.5)"))
    changed = plain["states"] != marked["states"]
    assert changed[..., :24].any() and changed[..., 24:].any()
    assert (plain["t5"] != marked["t5"]).any()
    assert torch.equal(plain["pooled"], marked["pooled"])
