"""lorakit/export/heat.py: each layer has a cell, dark where much is added, red where nothing is."""

import pytest

from lorakit.export import inspect_adapter, write_adapter
from lorakit.export.heat import _DEAD, _colour, heat_map
from tests.export import fuzz


def test_a_dead_layer_is_red_and_a_picture_without_one_has_no_red(tmp_path) -> None:
    state, path = fuzz.adapter(), tmp_path / "a.safetensors"
    write_adapter(state, path, format="kohya", family=fuzz.model())
    plain = heat_map(inspect_adapter(path), title="a")
    state.tensors["unet.conv.lora_B.weight"].zero_()
    write_adapter(state, path, format="kohya", family=fuzz.model())
    dead = heat_map(inspect_adapter(path), title="a")
    assert plain.size == dead.size

    def count(picture, colour) -> int:
        return {c: n for n, c in picture.getcolors(1 << 20)}.get(colour, 0)

    assert count(plain, _DEAD) == 0 < count(dead, _DEAD)
    # the largest of each of two components
    assert count(plain, _colour(1.0)) > 2 * 1000


def test_the_more_the_darker() -> None:
    lights = [sum(_colour(share / 10)) for share in range(11)]
    assert lights == sorted(lights, reverse=True) and len(set(lights)) == 11


@pytest.mark.parametrize("format", ["peft", "diffusers"])
def test_every_dialect_can_be_drawn(tmp_path, format: str) -> None:
    path = tmp_path / ("a" if format == "peft" else "a.safetensors")
    write_adapter(fuzz.adapter(), path, format=format, family=fuzz.model())
    assert heat_map(inspect_adapter(path), title="\n\x1b").size[0] >= 720
