"""lorakit/export/files.py and metadata.py: whole or not at all, the same bytes, nothing of this machine in them."""

import errno
import getpass
import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorakit.adapters.state import FIRST, SECOND
from lorakit.core.errors import InputError, StorageError
from lorakit.core.files import safetensors_bytes
from lorakit.export import read_adapter, write_adapter
from lorakit.export.digests import data_hash
from lorakit.export.files import interpret, read_file, readable
from tests.export import fuzz
from tests.export.tiny import family, made, same_state

STATE = dict(targets=("to_q", "proj_in"))


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(str(path), framework="pt") as file:
        return dict(file.metadata())


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft", "lorakit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_written_is_read(tmp_path, format: str, dtype: torch.dtype) -> None:
    state = made(**STATE)
    path = tmp_path / ("adapter" if format == "peft" else "adapter.safetensors")
    write_adapter(state, path, format=format, family=family(), dtype=dtype)
    again = read_adapter(path, family=family())
    rounded = type(state)("lora", {k: t.to(dtype).float() for k, t in state.tensors.items()}, state.alphas)
    assert same_state(again, rounded)
    weights = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    assert {t.dtype for file in weights for t in load_file(file).values() if t.ndim} == {dtype}


def test_equal_adapters_are_equal_bytes_in_every_process(tmp_path) -> None:
    code = (
        "import hashlib, torch; from lorakit.export.files import safetensors_bytes as b;"
        "print(hashlib.sha256(b({'b': torch.ones(3), 'a': torch.zeros(2, 2)},"
        " {f'k{i}': str(i) for i in range(9)})).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    metadata = {f"k{i}": str(i) for i in reversed(range(9))}
    here = safetensors_bytes({"a": torch.zeros(2, 2), "b": torch.ones(3)}, metadata)
    assert hashlib.sha256(here).hexdigest() == there
    for format in ("kohya", "diffusers"):
        for name in ("one", "two"):
            write_adapter(made(**STATE), tmp_path / name / "a.safetensors", format=format, family=family())
        one, two = (tmp_path / name / "a.safetensors" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_our_header_is_what_the_library_reads_and_its_entries_are_sorted(tmp_path) -> None:
    tensors = {"z": torch.arange(3.0), "a": torch.ones(2, 2, dtype=torch.bfloat16), "n": torch.tensor(2.5)}
    metadata = {"ü": '\n"x"', "b": "2", "a": "1"}
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes(tensors, metadata))
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, tensors[name])
        assert tensor.dtype == tensors[name].dtype
    assert metadata_of(path) == metadata
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert length % 8 == 0
    assert list(json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]) == ["a", "b", "ü"]


def test_kohya_metadata_is_complete_and_says_nothing_of_this_machine(tmp_path) -> None:
    path = tmp_path / "zebra.safetensors"
    state = made(rank=4, alpha=2.0, text=False, **STATE)
    write_adapter(state, path, format="kohya", family=family())
    metadata = metadata_of(path)
    wanted = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "2.0",
        "ss_output_name": "zebra",
        "ss_base_model_version": "sd_v1",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.title": "zebra",
    }
    assert {key: metadata.get(key) for key in wanted} == wanted
    assert "lora_adapter_metadata" not in metadata, "diffusers refuses a kohya file that has it"
    # kohya's own rule: the sha256 of all that follows the header
    data = path.read_bytes()
    assert metadata["sshs_model_hash"] == hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    write_adapter(state, path, format="kohya", family=family(), metadata={"ss_output_name": "other"})
    assert metadata_of(path)["ss_output_name"] == "other"
    assert metadata_of(path)["sshs_model_hash"] == metadata["sshs_model_hash"]
    write_adapter(made(**STATE), path, format="kohya", family=family())
    assert metadata_of(path)["ss_network_dim"] == "Dynamic"
    assert metadata_of(path)["sshs_model_hash"] != metadata["sshs_model_hash"]


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft", "lorakit"])
def test_no_path_user_or_host_is_in_the_bytes(tmp_path, format: str) -> None:
    path = tmp_path / ("adapter" if format == "peft" else "adapter.safetensors")
    write_adapter(made(**STATE), path, format=format, family=family())
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    content = b"".join(file.read_bytes() for file in files)
    private = {str(tmp_path), str(family().path), str(Path.home()), os.getcwd(), socket.gethostname()}
    private |= {f"/{getpass.getuser()}/", f'"{getpass.getuser()}"'}
    assert [text for text in private if len(text) > 1 and text.encode() in content] == []
    assert b"peft" not in content or format == "peft"


def test_diffusers_metadata_holds_only_what_any_peft_knows(tmp_path) -> None:
    from peft import LoraConfig

    path = tmp_path / "a.safetensors"
    write_adapter(made(rank=4, alpha=3.0, **STATE), path, format="diffusers", family=family())
    entries = json.loads(metadata_of(path)["lora_adapter_metadata"])
    for part, rank, alpha in (("unet", 4, 3.0), ("text_encoder", 2, 4.5)):
        own = {key.removeprefix(f"{part}."): value for key, value in entries.items() if key.startswith(f"{part}.")}
        config = LoraConfig(**own)
        assert (config.r, config.lora_alpha) == (rank, alpha)
    assert all(key.startswith("text_encoder.text_model.") for key in load_file(path) if key.startswith("text"))


@pytest.mark.parametrize("name", ["a.ckpt", "a.pt", "a.bin", "missing.safetensors", "cut.safetensors"])
def test_what_is_no_whole_safetensors_file_is_told(tmp_path, name: str) -> None:
    path = tmp_path / name
    if name.startswith("cut"):
        write_adapter(made(**STATE), path, format="kohya", family=family())
        path.write_bytes(path.read_bytes()[:-100])
    elif not name.startswith("missing"):
        path.write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(InputError, match=r"pickle|no such adapter file|damaged or cut off") as error:
        read_adapter(path, family=family())
    assert str(path) in str(error.value)
    if not name.startswith(("cut", "missing")):
        path.rename(tmp_path / "disguised.safetensors")
        with pytest.raises(InputError, match="damaged"):
            read_adapter(tmp_path / "disguised.safetensors", family=family())


def test_what_is_no_adapter_is_told(tmp_path) -> None:
    save_file({"x.weight": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"no LoRA file of a known format .*x\.weight"):
        read_adapter(tmp_path / "x.safetensors", family=family())
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no peft folder"):
        read_adapter(tmp_path / "empty", family=family())


def test_a_problem_names_the_file(tmp_path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"lora_unet_nowhere.lora_down.weight": torch.ones(2, 2)}, path)
    with pytest.raises(InputError, match=r"x\.safetensors: lora_unet_nowhere"):
        read_adapter(path, family=family())


def test_names_values_and_layers_that_cannot_be_written_are_told(tmp_path) -> None:
    state = made(**STATE)
    for format, name in (("kohya", "a"), ("peft", "a.safetensors"), ("diffusers", "a.bin")):
        with pytest.raises(InputError, match="choose another name"):
            write_adapter(state, tmp_path / name, format=format, family=family())
    with pytest.raises(InputError, match="Did you mean kohya"):
        write_adapter(state, tmp_path / "a.safetensors", format="kohia", family=family())
    large = type(state)("lora", {k: t * 1e9 for k, t in state.tensors.items()}, state.alphas)
    with pytest.raises(InputError, match="fp16 cannot hold"):
        write_adapter(large, tmp_path / "a.safetensors", format="kohya", family=family(), dtype=torch.float16)
    strange = type(state)("lora", {"unet.x.lora_A.weight": torch.ones(1, 1)}, {"unet.x": 1.0})
    with pytest.raises(InputError, match=r"unet\.x: the model has no such layer"):
        write_adapter(strange, tmp_path / "a.safetensors", format="kohya", family=family())
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="exists already"):
        write_adapter(state, tmp_path / "there", format="peft", family=family())
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize(("format", "name"), [("kohya", "a.safetensors"), ("peft", "a")])
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch, format: str, name: str) -> None:
    def full(self: Path, data: bytes) -> int:
        with open(self, "wb") as file:
            file.write(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match="disk is full"):
        write_adapter(made(**STATE), tmp_path / name, format=format, family=family())
    assert list(tmp_path.iterdir()) == []


def test_the_hash_is_of_the_weights_alone() -> None:
    tensors = {"a": torch.ones(2), "b": torch.zeros(2)}
    assert data_hash(tensors) == hashlib.sha256(bytes.fromhex("0000803f0000803f") + bytes(8)).hexdigest()


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft", "lorakit"])
def test_what_an_adapter_does_may_not_change_what_it_is_called_may(tmp_path, format: str) -> None:
    whole = tmp_path / ("a" if format == "peft" else "a.safetensors")
    write_adapter(fuzz.adapter(), whole, format=format, family=fuzz.model())
    path = fuzz.file_of(whole)
    metadata, tensors = metadata_of(path), load_file(path)
    save_file(tensors, path, {**metadata, "modelspec.title": "another"})
    assert same_state(read_adapter(whole, family=fuzz.model()), readable(fuzz.adapter(), format, fuzz.model()))
    key = min(tensors)
    save_file({**tensors, key: tensors[key] + 1}, path, metadata)
    with pytest.raises(InputError, match=r"lorakit\.digest differs.*convert --accept-changed"):
        read_adapter(whole, family=fuzz.model())
    assert interpret(read_file(whole, accept_changed=True), family=fuzz.model())
    if format == "peft":
        config = path.with_name("adapter_config.json")
        save_file(tensors, path, metadata)
        config.write_text(config.read_text().replace('"lora_alpha": ', '"lora_alpha": 9'))
    elif format != "kohya":
        entry = "lora_adapter_metadata" if format == "diffusers" else "lorakit.adapter"
        save_file(tensors, path, {**metadata, entry: metadata[entry].replace("1", "9")})
    with pytest.raises(InputError):
        read_adapter(whole, family=fuzz.model())


def test_a_kohya_file_has_one_alpha_a_component_and_the_same_effect() -> None:
    state = fuzz.adapter()
    found = readable(state, "kohya", fuzz.model())
    for component in state.components():
        own = {layer for layer in state.layers() if layer.startswith(f"{component}.")}
        assert len({found.alphas[layer] for layer in own}) == 1
        for layer in own:
            a, b = (
                found.alphas[layer] * found.tensors[layer + SECOND],
                state.alphas[layer] * state.tensors[layer + SECOND],
            )
            torch.testing.assert_close(a, b)
            assert found.tensors[layer + FIRST] is state.tensors[layer + FIRST]
    assert readable(found, "kohya", fuzz.model()) is found
    assert readable(state, "diffusers", fuzz.model()) is state
