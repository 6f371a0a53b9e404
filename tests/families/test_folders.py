"""Folders of weights: half precision is taken where nothing else lies there, single files never."""

import shutil
from pathlib import Path

import pytest
import torch

from lorakit import families
from lorakit.core.errors import InputError
from lorakit.families import sdxl


def halved(folder: Path, parts: tuple[str, ...]) -> Path:
    for part in parts:
        for file in (folder / part).glob("*.safetensors"):
            file.rename(file.with_suffix(".fp16.safetensors"))
    return folder


@pytest.mark.parametrize("parts", [("unet", "vae", "text_encoder", "text_encoder_2"), ("unet", "text_encoder")])
def test_weights_that_are_there_in_half_precision_alone_are_read(tmp_path: Path, parts: tuple[str, ...]) -> None:
    folder = halved(Path(shutil.copytree(sdxl.tiny().path, tmp_path / "model")), parts)
    family = families.load("sdxl", str(folder))
    pipeline = family.stock_pipeline()
    for name, module in sdxl.tiny().components.items():
        for loaded in (family.components[name], getattr(pipeline, name)):
            assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), module.parameters(), strict=True)), name


def test_where_both_are_there_the_full_precision_is_read(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sdxl.tiny().path, tmp_path / "model"))
    for part in ("unet", "text_encoder"):
        for file in list((folder / part).glob("*.safetensors")):
            file.with_suffix(".fp16.safetensors").write_bytes(b"not to be read")
    family = families.load("sdxl", str(folder))
    assert torch.equal(family.components["unet"].conv_in.weight, sdxl.tiny().unet.conv_in.weight)
    assert torch.equal(family.stock_pipeline().unet.conv_in.weight, sdxl.tiny().unet.conv_in.weight)


def test_the_hub_is_not_asked_for_single_files_of_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked: list[list[str]] = []

    def fetch(name: str, *, allow_patterns: list[str], revision: str | None) -> str:
        files = [
            "sd_xl_base_1.0.safetensors",
            "unet/a.safetensors",
            "unet/a.bin",
            "vae/config.json",
            "tokenizer/x.txt",
            "tokenizer/chat_template.jinja",
        ]
        asked.append(list(filter_repo_objects(files, allow_patterns=allow_patterns)))
        return str(sdxl.tiny().path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    families.load("sdxl", "somebody/sdxl")
    families.describe("sdxl", "somebody/sdxl")
    configurations = ["vae/config.json", "tokenizer/x.txt", "tokenizer/chat_template.jinja"]
    assert asked == [["unet/a.safetensors", *configurations], configurations]


def test_an_empty_path_is_no_name_of_the_current_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(sdxl.tiny().path)
    with pytest.raises(InputError, match=r"model\.path is empty"):
        families.named_at("")
