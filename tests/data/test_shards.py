import logging
import multiprocessing
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorakit.core.errors import StorageError
from lorakit.data import shards
from lorakit.data.shards import Cache, content_key


def entry(seed: int) -> dict[str, Tensor]:
    return {"latents": torch.full((2, 3), float(seed)), "ids": torch.arange(seed)}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def key(name: object) -> str:
    return content_key(name)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    assert cache.missing([key(1), key(2)]) == [key(1), key(2)]
    assert not cache.has(key(1))
    half = {"states": torch.randn(2, 3).bfloat16(), "mask": torch.tensor(True)}
    cache.write({key(1): entry(1), key(2): half})
    cache.write({})
    for reader in (cache, Cache(tmp_path / "cache"), pickle.loads(pickle.dumps(cache))):
        assert equal(reader.read(key(1)), entry(1))
        assert equal(reader.read(key(2)), half)
        assert reader.missing([key(3), key(1), key(3)]) == [key(3)]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_reader_finds_what_others_write_later(tmp_path: Path) -> None:
    reader = Cache(tmp_path)
    assert not reader.has(key(1))
    Cache(tmp_path).write({key(1): entry(1)})
    assert equal(reader.read(key(1)), entry(1))


def _write(folder: Path, first: int) -> None:
    cache = Cache(folder)
    for i in range(first, first + 20):
        cache.write({key(i): entry(i), key("both"): entry(7)})


def test_several_processes_write_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(tmp_path, first)) for first in (0, 10)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    cache = Cache(tmp_path)
    assert cache.missing([key(i) for i in range(30)]) == []
    assert all(equal(cache.read(key(i)), entry(i)) for i in range(30))


@pytest.mark.parametrize("damage", ["cut", "header", "empty"])
def test_a_damaged_shard_is_left_out_said_once_and_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    Cache(tmp_path).write({key(1): entry(1)})
    Cache(tmp_path).write({key(2): entry(2)})
    shard = Path(tmp_path / Cache(tmp_path).shard_of(key(1)))
    whole = shard.read_bytes()
    damaged = {"cut": whole[:-4], "header": b"\xff" * 16 + whole[16:], "empty": b""}[damage]
    shard.write_bytes(damaged)
    cache = Cache(tmp_path)
    with caplog.at_level(logging.WARNING, logger="lorakit"):
        assert cache.missing([key(1), key(2)]) == [key(1)]
        assert cache.missing([key(1)]) == [key(1)]
    assert [shard.name in message and "damaged" in message for message in caplog.messages] == [True]
    cache.write({key(1): entry(1)})
    assert equal(cache.read(key(1)), entry(1))
    assert equal(Cache(tmp_path).read(key(1)), entry(1))


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({f"{key(1)}/latents": torch.zeros(1)}, tmp_path / "entries-of-another-program.safetensors")
    (tmp_path / "notes.txt").write_text("mine")
    assert not Cache(tmp_path).has(key(1))


def test_a_kill_while_writing_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path)
    cache.write({key(1): entry(1)})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lorakit.core.files.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        cache.write({key(2): entry(2)})
    assert Cache(tmp_path).missing([key(1), key(2)]) == [key(2)]


def test_what_vanishes_is_told_apart_from_what_was_never_there(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with pytest.raises(StorageError, match="lacks what was cached"):
        cache.read(key(1))
    cache.write({key(1): entry(1)})
    (tmp_path / cache.shard_of(key(1))).unlink()
    cache._open.clear()
    with pytest.raises(StorageError, match="became unreadable"):
        cache.read(key(1))


def test_only_so_many_shards_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_OPEN_SHARDS", 3)
    cache = Cache(tmp_path)
    for i in range(8):
        cache.write({key(i): entry(i)})
    assert all(equal(cache.read(key(i)), entry(i)) for i in (0, 7, 3, 0, 1, 2, 4, 5, 6))
    assert len(cache._open) == 3


def test_keys_depend_on_every_part_and_their_bounds() -> None:
    assert len({content_key("a", "b"), content_key("ab"), content_key("b", "a"), content_key("a", "b", "")}) == 4
    assert len(content_key("a")) == 40
