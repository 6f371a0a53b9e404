"""lorakit/export/merge.py: a merged pipeline predicts what base and adapters do, and says nothing of this machine."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorakit.adapters import AdapterState
from lorakit.adapters.state import adaptable_layers, factor_shapes, state_metadata
from lorakit.core.errors import InputError, VerificationError
from lorakit.core.files import safetensors_bytes
from lorakit.export import merge, merge_adapter, write_adapter
from lorakit.export.merge import product
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
    assert {t.dtype for t in tensors_of(out / "unet").values()} == {dtype or torch.float32}
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


def test_a_tokenizer_keeps_its_template(tmp_path) -> None:
    (tmp_path / "base" / "tokenizer").mkdir(parents=True)
    for name in ("model_index.json", "tokenizer/tokenizer_config.json", "tokenizer/chat_template.jinja"):
        (tmp_path / "base" / name).write_text("{}")
    merge._copy_rest(tmp_path / "base", tmp_path / "merged", {"tokenizer": None})
    assert {path.name for path in (tmp_path / "merged" / "tokenizer").iterdir()} >= {"chat_template.jinja"}


def test_a_fault_in_the_folding_is_seen_and_nothing_is_left(tmp_path, two, monkeypatch) -> None:
    honest = merge.folded
    monkeypatch.setattr(merge, "folded", lambda weight, states, layer: 1.001 * honest(weight, states, layer))
    with pytest.raises(VerificationError, match="predicts otherwise"):
        merge_adapter(family(), [(two[0][0], 1.0)], out=tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def test_only_what_the_adapter_is_in_changes_and_by_the_formula(tmp_path, two) -> None:
    file, state, _ = two[0]
    weights = {"text_encoder": 0.0, "unet": 0.5, "unet.up_blocks": 2.0}
    merge_adapter(str(family().path), [(file, weights)], out=tmp_path / "merged")
    for part in ("unet", "text_encoder", "vae"):
        before, after = tensors_of(family().path / part), tensors_of(tmp_path / "merged" / part)
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            path = key.removesuffix(".weight").removeprefix("text_model." if part == "text_encoder" else "")
            layer, weight = f"{part}.{path}", {"unet": 0.5}.get(part, 0.0)
            weight = 2.0 if layer.startswith("unet.up_blocks") else weight
            if layer not in state.alphas or not weight:
                assert torch.equal(tensor, after[key]), key
                continue
            first, second = (state.tensors[f"{layer}.lora_{letter}.weight"].double() for letter in "AB")
            change = weight * state.alphas[layer] / len(first) * product(first, second)
            torch.testing.assert_close(after[key].double(), tensor.double() + change, rtol=1e-6, atol=1e-6)


def test_a_base_in_several_files_becomes_one_in_several_files(tmp_path, two) -> None:
    from diffusers import StableDiffusionPipeline

    base, out = tmp_path / "base", tmp_path / "merged"
    StableDiffusionPipeline.from_pretrained(family().path, safety_checker=None).save_pretrained(
        base, max_shard_size="50KB"
    )
    assert len(list((base / "unet").glob("*.safetensors"))) > 3
    told: list[tuple[int, int]] = []
    report = merge_adapter(
        str(base),
        [(two[0][0], 1.0)],
        out=out,
        dtype=torch.float16,
        max_shard_size=60_000,
        on_progress=lambda *now: told.append(now),
    )
    assert report.max_difference is not None and report.max_difference < 1e-2
    shards = sorted((out / "unet").glob("*.safetensors"))
    assert len(shards) > 2 and all(shard.stat().st_size < 60_000 + 10_000 for shard in shards)
    index = json.loads((out / "unet" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert {*index["weight_map"].values()} == {shard.name for shard in shards}
    assert index["weight_map"].keys() == tensors_of(base / "unet").keys()
    assert {t.dtype for t in tensors_of(out / "unet").values()} == {torch.float16}
    assert [done for done, _ in told] == sorted(done for done, _ in told) and len(told) > 300


def test_what_cannot_be_folded_is_told(tmp_path, two) -> None:
    base = tmp_path / "base"
    shutil.copytree(family().path, base)
    (base / "unet" / "diffusion_pytorch_model.safetensors").rename(base / "unet" / "x.fp16.safetensors")
    with pytest.raises(InputError, match=r"x\.fp16\.safetensors: save it as plain safetensors"):
        merge_adapter(str(base), [two[0][0]], out=tmp_path / "merged")
    index = base / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    for text in ("{", "{}", '{"weight_map": {"a": "../x"}}'):
        index.write_text(text)
        with pytest.raises(InputError, match="names no files beside it"):
            merge_adapter(str(base), [two[0][0]], out=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


MEASURED = """
import re, sys
from pathlib import Path
from lorakit.export import merge_adapter

def memory(name):
    return 1024 * int(re.search(rf"{name}:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

small, of_small, large, of_large, out = sys.argv[1:]
merge_adapter(small, [of_small], out=out + "-small", verify=False)  # imports and what they leave behind
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = memory("VmRSS")
merge_adapter(large, [of_large], out=out, verify=False, max_shard_size=50_000_000)
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured as Linux tells it")
def test_memory_stays_below_the_largest_file(tmp_path, two) -> None:
    from diffusers import UNet2DConditionModel

    config = dict(family().components["unet"].config) | {"block_out_channels": (224, 448)}
    large, out = tmp_path / "large", tmp_path / "merged"
    shutil.copytree(family().path, large, ignore=shutil.ignore_patterns("diffusion_pytorch_model.safetensors"))
    shutil.copytree(family().path / "vae", large / "vae", dirs_exist_ok=True)
    unet = UNet2DConditionModel.from_config(config)
    unet.save_pretrained(large / "unet", max_shard_size="50MB")
    sizes = [file.stat().st_size for file in (large / "unet").glob("*.safetensors")]
    assert len(sizes) > 2
    tensors = {}
    for path, layer in adaptable_layers(unet).items():
        first, second = factor_shapes(layer, 1)
        tensors |= {f"unet.{path}.lora_A.weight": torch.ones(first), f"unet.{path}.lora_B.weight": torch.ones(second)}
    state = AdapterState("lora", tensors, {name.rpartition(".lora_")[0]: 1.0 for name in tensors})
    adapter = tmp_path / "a.safetensors"
    adapter.write_bytes(safetensors_bytes(tensors, state_metadata(state)))
    del unet, tensors, state
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(family().path), two[0][0], str(large), str(adapter), str(out)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1.3 * max(sizes)
    assert sum(file.stat().st_size for file in (out / "unet").glob("*.safetensors")) > 2 * max(sizes)


def test_wrong_input_is_told(tmp_path, two) -> None:
    with pytest.raises(InputError, match="exists already"):
        merge_adapter(family(), [(two[0][0], 1.0)], out=tmp_path)
    with pytest.raises(InputError, match="no such adapter file"):
        merge_adapter(family(), [(tmp_path / "no.safetensors", 1.0)], out=tmp_path / "merged")
    with pytest.raises(InputError, match="cannot hold"):
        merge_adapter(family(), [(two[0][0], 1e6)], out=tmp_path / "merged", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []
