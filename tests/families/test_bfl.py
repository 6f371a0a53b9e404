"""lorakit/families/bfl.py: names and fused layers are those that diffusers reads an original checkpoint by."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.families import bfl


class Original(dict[str, Tensor]):
    """A checkpoint that has, beside what is put in, whatever else is asked for."""

    def pop(self, key: str, *default: Any) -> Tensor:
        return super().pop(key, torch.zeros(7 * bfl.WIDTH))  # a bias of any layer can be cut out of it


@functools.cache
def transformer(name: str) -> Any:
    """Of the published width, which the converter has built in, with two blocks of each kind."""
    import diffusers

    more = {"guidance_embeds": True} if name.startswith("Flux") else {}
    with torch.device("meta"):
        return getattr(diffusers, name)(num_layers=2, num_single_layers=2, **more)


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "ChromaTransformer2DModel", "Flux2Transformer2DModel"])
def test_an_original_checkpoint_with_our_names_is_converted_to_ours(name: str) -> None:
    from diffusers.loaders import single_file_utils

    model = transformer(name)
    draw = torch.Generator().manual_seed(0)
    # a column of each weight is enough
    wanted = {
        path: torch.randn(layer.out_features, 1, generator=draw)
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and path != "norm_out.linear"
    }
    groups = {whole.removeprefix("x."): parts for whole, parts in bfl.fused(model, "x").items()}
    parts = {part.removeprefix("x.") for group in groups.values() for part in group}
    given = Original({f"{bfl.published_name(path)}.weight": w for path, w in wanted.items() if path not in parts})
    assert len(given) + len(parts) == len(wanted)
    for whole, group in groups.items():
        given[f"{whole}.weight"] = torch.cat([wanted[part.removeprefix("x.")] for part in group])
    convert = f"convert_{name[: -len('Transformer2DModel')].lower()}_transformer_checkpoint_to_diffusers"
    converted = getattr(single_file_utils, convert)(given)
    assert not given
    for path, weight in wanted.items():
        assert torch.equal(converted[f"{path}.weight"], weight), path


def test_kohyas_files_are_read_by_the_stock_loader_at_the_published_width_alone() -> None:
    from diffusers import FluxTransformer2DModel

    assert bfl.stock_formats(transformer("FluxTransformer2DModel")) == ("diffusers", "kohya")
    with torch.device("meta"):
        narrow = FluxTransformer2DModel(num_layers=1, num_single_layers=1, num_attention_heads=2)
    assert bfl.stock_formats(narrow) == ("diffusers",)


@pytest.mark.parametrize(("numbers", "expected"), [((4, 36), 2), ((4, 28), 1), ((4, 12), None), ((0, 0), None)])
def test_a_generation_is_told_by_numbers_out_for_one_in(numbers: tuple[int, int], expected: int | None) -> None:
    ins, outs = numbers
    pair = torch.ones(2, ins), torch.ones(outs, 2)
    for ends in (("lora_down", "lora_up"), ("lora_A", "lora_B")):
        file = {f"single_blocks.0.linear1.{end}.weight": tensor for end, tensor in zip(ends, pair, strict=True)}
        assert bfl.generation(file) == expected
        del file[f"single_blocks.0.linear1.{ends[1]}.weight"]
        assert bfl.generation(file) is None
