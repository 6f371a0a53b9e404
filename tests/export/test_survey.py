"""lorakit/export/survey.py: what is in a file of every dialect, without a model."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lorakit.core.errors import InputError
from lorakit.export import inspect_adapter, write_adapter
from lorakit.export.merge import product
from tests.export.tiny import family, made

NAMES = {"kohya": {"unet": "lora_unet", "text_encoder": "lora_te"}}


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft", "lorakit"])
def test_every_dialect_is_surveyed(tmp_path, format: str) -> None:
    state = made(rank=4, alpha=3.0, targets=("to_q", "conv1"))
    path = tmp_path / ("a" if format == "peft" else "a.safetensors")
    write_adapter(state, path, format=format, family=family(), dtype=torch.bfloat16)
    found = inspect_adapter(path)
    assert (found.format, found.kind, found.dtype, found.modules, found.odd) == (
        format, "lora", "bf16", len(state.layers()), [],
    )  # fmt: skip
    for component, rank, alpha in (("unet", 4, 3.0), ("text_encoder", 2, 4.5)):
        part = found.components[NAMES.get(format, {}).get(component, component)]
        layers = [layer for layer in state.layers() if layer.startswith(f"{component}.")]
        deltas = [product(state.tensors[f"{n}.lora_A.weight"], state.tensors[f"{n}.lora_B.weight"]) for n in layers]
        norm = alpha / rank * float(torch.cat([delta.flatten() for delta in deltas]).norm())
        assert (part.layers, part.ranks, part.alphas) == (len(layers), {rank: len(layers)}, [alpha])
        assert part.norm == pytest.approx(norm, rel=1e-2)
    json.dumps(found.to_json(), allow_nan=False)


def test_what_is_odd_is_listed_and_what_is_missing_shown(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    pair = {"lora_unet_a.lora_down.weight": torch.ones(2, 3), "lora_unet_a.lora_up.weight": torch.ones(3, 2)}
    save_file({**pair, "lora_unet_b.lora_up.weight": torch.ones(3, 2), "lora_unet_a.dora_scale": torch.ones(1)}, path)
    found = inspect_adapter(path)
    assert found.components["lora_unet"].alphas == [None]
    assert found.components["lora_unet"].norm == pytest.approx(6.0)
    assert found.odd == ["lora_unet_a.dora_scale", "lora_unet_b (half of a pair)"]
    save_file({**pair, "lora_unet_a.lora_up.weight": torch.ones(3, 4)}, path)
    with pytest.raises(InputError, match="do not fit each other"):
        inspect_adapter(path)
    with pytest.raises(InputError, match="no such adapter file"):
        inspect_adapter(tmp_path / "b.safetensors")
