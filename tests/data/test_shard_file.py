import json
from pathlib import Path

import pytest
import torch

from lorakit.data.shard_file import DamagedShard, merge_shards, read_contents, write_shard

KEYS = ["0" * 40, "f" * 39 + "0"]


def shard(path: Path) -> Path:
    write_shard(path, {key: {"x": torch.arange(i + 3.0)} for i, key in enumerate(KEYS)})
    return path


def test_what_a_write_says_is_what_a_reader_finds(tmp_path: Path) -> None:
    said = write_shard(tmp_path / "a", {key: {"x": torch.zeros(2, 3), "y": torch.ones(())} for key in KEYS})
    found = read_contents(tmp_path / "a")
    assert found is not None
    assert found.keys.tolist() == said.keys.tolist()
    assert found.starts.tolist() == said.starts.tolist()
    assert list(found.layouts) == list(said.layouts)
    assert found.layouts[0] is found.layouts[1]  # said once, however many entries are alike


def test_a_file_of_the_same_content_has_the_same_bytes(tmp_path: Path) -> None:
    assert shard(tmp_path / "a").read_bytes() == shard(tmp_path / "b").read_bytes()


@pytest.mark.parametrize("change", [-1, -9, 1])
def test_a_wrong_length_is_damage(tmp_path: Path, change: int) -> None:
    path = shard(tmp_path / "a")
    whole = path.read_bytes()
    path.write_bytes(whole + b"x" if change > 0 else whole[:change])
    with pytest.raises(DamagedShard, match=f"it has {len(whole) + change} bytes and should have {len(whole)}"):
        read_contents(path)


def edited(path: Path, change: object) -> Path:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)  # type: ignore[operator]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h[f"{KEYS[0]}/x"].update(shape=[4]),
        lambda h: h[f"{KEYS[0]}/x"].update(dtype="F31"),
        lambda h: h[f"{KEYS[0]}/x"].update(data_offsets=[-12, 0]),
        lambda h: h[f"{KEYS[0]}/x"].pop("shape"),
        lambda h: h.update({f"{KEYS[0]}/x": 5}),
        lambda h: h.update({"no key/x": h.pop(f"{KEYS[0]}/x")}),
        lambda h: h.pop(f"{KEYS[1]}/x"),
    ],
)
def test_a_header_that_cannot_be_is_damage(tmp_path: Path, change: object) -> None:
    with pytest.raises(DamagedShard):
        read_contents(edited(shard(tmp_path / "a"), change))


@pytest.mark.parametrize("data", [b"", b"\0" * 7, b"\xff" * 40, b"\2\0\0\0\0\0\0\0[]", b"\1\0\0\0\0\0\0\0{"])
def test_what_is_no_shard_at_all_is_damage(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(DamagedShard):
        read_contents(tmp_path / "a")


def test_another_programs_file_is_none_of_ours(tmp_path: Path) -> None:
    assert read_contents(edited(shard(tmp_path / "a"), lambda h: h.pop("__metadata__"))) is None


def test_of_an_entry_in_several_shards_the_last_ones_is_kept(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for name, value in (("a", 1.0), ("b", 2.0)):
        write_shard(tmp_path / name, {KEYS[0]: {"x": torch.full((2,), value)}, KEYS[1]: {name: torch.ones(1)}})
    merge_shards(tmp_path / "c", [tmp_path / "a", tmp_path / "b"])
    merged = load_file(tmp_path / "c")
    assert merged.keys() == {f"{KEYS[0]}/x", f"{KEYS[1]}/b"}
    assert merged[f"{KEYS[0]}/x"].tolist() == [2, 2]
