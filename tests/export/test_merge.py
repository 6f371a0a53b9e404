"""lorakit/export/merge.py: a merged pipeline predicts what base and adapters do, and says nothing of this machine."""

import json

import pytest
import torch

from lorakit.adapters import AdapterState
from lorakit.core.errors import InputError, VerificationError
from lorakit.export import merge, merge_adapter, write_adapter
from lorakit.export.merge import product, stored_dtype
from lorakit.export.probe import stock_components
from tests.export.tiny import base, calls, family, made, predictions


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[tuple[str, AdapterState, float]]:
    folder = tmp_path_factory.mktemp("adapters")
    states = [made(alpha=3.0), made(rank=2, alpha=2.0, targets=("to_q", "conv2"), text=False)]
    files = [folder / "one.safetensors", folder / "two.safetensors"]
    for state, file, format in zip(states, files, ("kohya", "diffusers"), strict=True):
        write_adapter(state, file, format=format, family=family())
    return [(str(file), state, weight) for file, state, weight in zip(files, states, (0.7, -0.3), strict=True)]


def test_the_product_is_the_change_of_a_convolution() -> None:
    first, second, x = torch.randn(2, 3, 3, 3), torch.randn(5, 2, 1, 1), torch.randn(1, 3, 6, 6)
    step = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, first, padding=1), second)
    torch.testing.assert_close(torch.nn.functional.conv2d(x, product(first, second), padding=1), step)


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-5), (torch.float16, 1e-2)])
def test_merged_is_base_and_adapters(tmp_path, two, dtype, tolerance: float) -> None:
    out = tmp_path / "merged"
    report = merge_adapter(family(), [(file, weight) for file, _, weight in two], out=out, dtype=dtype)
    assert report.max_difference <= tolerance
    assert set(report.dtypes.values()) == {"fp32" if dtype is None else "fp16"}
    assert stored_dtype(out / "unet") == (dtype or torch.float32)
    from diffusers import StableDiffusionPipeline

    fresh = StableDiffusionPipeline.from_pretrained(out, dtype=torch.float32, safety_checker=None)
    got = calls().answer(stock_components(fresh, family()))
    wanted = predictions(*[(state, weight) for _, state, weight in two])
    plain = base()
    for name in got:
        size = wanted[name][0].abs().max()
        assert (got[name][0] - wanted[name][0]).abs().max() <= tolerance * size
        assert (wanted[name][0] - plain[name][0]).abs().max() > 2 * tolerance * size
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    for file in out.rglob("*.json"):
        assert str(family().path) not in file.read_text()
        assert "_name_or_path" not in json.loads(file.read_text())


def test_a_fault_in_the_folding_is_seen_and_nothing_is_left(tmp_path, two, monkeypatch) -> None:
    honest = merge.fold
    monkeypatch.setattr(merge, "fold", lambda c, s, *, weight: honest(c, s, weight=1.001 * weight))
    with pytest.raises(VerificationError, match="predicts otherwise"):
        merge_adapter(family(), [(two[0][0], 1.0)], out=tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_wrong_input_is_told(tmp_path, two) -> None:
    with pytest.raises(InputError, match="exists already"):
        merge_adapter(family(), [(two[0][0], 1.0)], out=tmp_path)
    with pytest.raises(InputError, match="no such adapter file"):
        merge_adapter(family(), [(tmp_path / "no.safetensors", 1.0)], out=tmp_path / "merged")
    with pytest.raises(InputError, match="cannot hold"):
        merge_adapter(family(), [(two[0][0], 1e6)], out=tmp_path / "merged", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []
