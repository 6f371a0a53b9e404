"""lorakit/export/single.py: diffusers reads a merged single file as base and adapters; all else is the base's own."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorakit import families
from lorakit.adapters import load_adapter_state
from lorakit.adapters.state import adaptable_layers
from lorakit.cli.main import main
from lorakit.core.errors import InputError, VerificationError
from lorakit.export import merge_single_file, read_adapter, single, write_adapter
from lorakit.export.probe import difference, largest, record_calls, stock_components
from lorakit.families import FAMILIES
from tests.export.tiny import CONVS, made
from tests.families.single import single_file

NOTES = {"modelspec.title": "tiny", "format": "pt"}


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def base(request, tmp_path_factory) -> tuple[str, Path, str, Path]:
    """Family, single file, folder of configurations, adapter."""
    of, folder = request.param, tmp_path_factory.mktemp(request.param)
    tiny = FAMILIES.module(of).tiny()
    save_file(single_file(of), folder / "base.safetensors", NOTES)
    shutil.copytree(tiny.path, folder / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    targets = (*tiny.default_targets["unet"], *CONVS, "conv2", "conv_shortcut", "upsamplers.0.conv", "linear_1")
    write_adapter(made(of=of, targets=targets, alpha=3.0), folder / "a.safetensors", format="kohya", family=tiny)
    return of, folder / "base.safetensors", str(folder / "config"), folder / "a.safetensors"


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-5), (torch.float16, 1e-2)])
def test_diffusers_reads_base_and_adapter(base, tmp_path, dtype, tolerance: float) -> None:
    of, file, config, adapter = base
    out = tmp_path / "merged.safetensors"
    report = merge_single_file(file, [(adapter, 0.7)], config=config, out=out, dtype=dtype)
    assert report.max_difference is not None and report.max_difference <= tolerance
    tiny = FAMILIES.module(of).tiny()
    calls = record_calls(tiny)
    components = stock_components(tiny.stock_pipeline(), tiny)  # from the folder, not from the single file
    plain = calls.answer(components)
    load_adapter_state(components, read_adapter(adapter, family=tiny), weight=0.7)
    wanted = calls.answer(components)
    got = calls.answer(stock_components(families.load_single_file(out, config), tiny))
    for name in wanted:
        assert difference(got[name], wanted[name]) <= tolerance * largest(wanted[name])
        assert difference(plain[name], wanted[name]) > 2 * tolerance * largest(wanted[name])
    assert [path.name for path in tmp_path.iterdir()] == ["merged.safetensors"]


def test_every_layer_has_its_own_place(base) -> None:
    of, file, config, _ = base
    names, tensors = families.outline(config), load_file(file)
    for component in (names.backbone, *names.text_encoders):
        whole = FAMILIES.module(of).tiny().components[component]
        for path, layer in adaptable_layers(whole).items():
            if path == "text_projection":
                continue
            key, part, parts = names.single_file_key(component, path)
            assert torch.equal(tensors[key].chunk(parts)[part].flatten(1), layer.weight.flatten(1)), path


def test_only_what_the_adapter_is_in_changes(base, tmp_path) -> None:
    _, file, config, adapter = base
    out, weights = tmp_path / "merged.safetensors", {"unet": 0.0, "unet.mid_block": 1.0, "text_encoder": 0.0}
    weights |= {"text_encoder_2": 0.0} if "sdxl" in str(file) else {}
    merge_single_file(file, [(adapter, weights)], config=config, out=out, verify=False)
    before, after = load_file(file), load_file(out)
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all("middle_block" in key for key in changed)
    with safe_open(out, "pt") as opened:
        assert opened.metadata() == NOTES


@pytest.mark.parametrize("base", ["sd"], indirect=True)
def test_a_linear_layer_may_be_a_convolution_in_the_file(base, tmp_path) -> None:
    _, file, config, adapter = base
    tensors = load_file(file)
    key = "model.diffusion_model.middle_block.1.proj_in.weight"
    tensors[key] = tensors[key].reshape(tensors[key].shape[:2])
    other = tmp_path / "other.safetensors"
    save_file(tensors, other)
    merge_single_file(other, [adapter], config=config, out=tmp_path / "flat.safetensors", verify=False)
    merge_single_file(file, [adapter], config=config, out=tmp_path / "four.safetensors", verify=False)
    flat, four = (load_file(tmp_path / f"{name}.safetensors")[key] for name in ("flat", "four"))
    assert flat.ndim == 2 and four.ndim == 4 and torch.equal(flat, four.flatten(1))
    assert not torch.equal(flat, tensors[key])


def test_a_fault_in_the_folding_is_seen_and_nothing_is_left(base, tmp_path, monkeypatch) -> None:
    _, file, config, adapter = base
    honest = single.folded
    monkeypatch.setattr(single, "folded", lambda weight, states, layer: 1.001 * honest(weight, states, layer))
    with pytest.raises(VerificationError, match="predicts otherwise"):
        merge_single_file(file, [adapter], config=config, out=tmp_path / "merged.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_folded_is_told(base, tmp_path) -> None:
    of, file, config, adapter = base
    out = tmp_path / "merged.safetensors"

    def refused(match: str, file: Path = file, config: str = config, out: Path = out) -> None:
        with pytest.raises(InputError, match=match):
            merge_single_file(file, [adapter], config=config, out=out)

    other = FAMILIES.module("sd" if of == "sdxl" else "sdxl").tiny()
    refused("made for another family|no place in", config=str(other.path))
    refused("single files of the family flux", config=str(FAMILIES.module("flux").tiny().path))
    refused("exists already", out=file)
    refused("name it .safetensors", out=tmp_path / "merged.ckpt")
    tensors = load_file(file)
    key = next(key for key in tensors if "middle_block.1" in key and "attn1.to_q" in key)
    pickle, lacking, narrow = (tmp_path / name for name in ("a.ckpt", "lacking.safetensors", "narrow.safetensors"))
    pickle.write_bytes(b"x")
    refused("is a pickle", pickle)
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, lacking)
    refused(f"{key}, of the layer unet.mid_block.*is --config", lacking)
    save_file(tensors | {key: tensors[key][:-1].clone()}, narrow)
    refused(f"{key}, of the layer unet.mid_block", narrow)
    for gone, match in (
        ("middle_block.0.in_layers.0", "are weights missing"),
        ("transformer.text_model.final_layer_norm", "finds no weights of text_encoder.final_layer_norm"),
    ):
        save_file({name: tensor for name, tensor in tensors.items() if gone not in name}, lacking)
        refused(match, lacking)
    assert not out.exists()


@pytest.mark.parametrize("base", ["sd"], indirect=True)
def test_the_command_line(base, tmp_path, capsys) -> None:
    _, file, config, adapter = base
    out = str(tmp_path / "merged.safetensors")
    main(["merge", str(file), f"{adapter}:0.5", "--config", config, "--out", out])
    assert "loaded back: predictions differ" in capsys.readouterr().out
    new = ["--out", str(tmp_path / "new.safetensors")]
    for more, said in (
        ([str(file), str(adapter), *new], "is one file: give --config"),
        ([config, str(adapter), "--config", config, *new], "--config goes with a base in one file"),
        ([str(file), str(adapter), "--config", config, "--family", "sd", *new], "--family does not go with"),
        ([str(file), str(adapter), "--config", config, "--max-shard-size", "1GB", *new], "--max-shard-size does not"),
    ):
        with pytest.raises(SystemExit):
            main(["merge", *more])
        assert said in capsys.readouterr().err
