import logging
import multiprocessing
import os
import pickle
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorakit.core.errors import StorageError
from lorakit.data import shards, upkeep
from lorakit.data.shard_file import part_tensor
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
    with pytest.raises(StorageError, match="lacks what was cached"):
        cache.read(key(1))
    assert not cache.has(key(1))


@pytest.mark.parametrize("cut", [40, None])
def test_a_shard_that_became_unreadable_is_named(tmp_path: Path, cut: int | None) -> None:
    cache = Cache(tmp_path)
    cache.write({key(1): entry(1)})
    shard = tmp_path / cache.shard_of(key(1))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-cut] if cut else b"")
    with pytest.raises(StorageError, match=f"{shard.name} became unreadable"):
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


def test_many_are_read_at_once_in_the_order_asked_for(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for first in (0, 5):
        cache.write({key(i): entry(i) for i in range(first, first + 5)})
    asked = [7, 2, 2, 9, 0]
    for reader in (cache, Cache(tmp_path)):
        assert all(equal(got, entry(i)) for got, i in zip(reader.read_many([key(i) for i in asked]), asked))
    with pytest.raises(StorageError, match="lacks what was cached"):
        cache.read_many([key(1), key(99)])


def test_a_batch_is_read_as_one_tensor_a_name(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    entries = {key(i): {"latents": torch.randn(2, 3, 4), "on": torch.tensor([True, i > 2])} for i in range(6)}
    cache.write(dict(list(entries.items())[:3]))
    cache.write(dict(list(entries.items())[3:]))
    asked = [key(i) for i in (4, 0, 4, 5)]
    stacked = cache.read_stacked(asked)
    assert equal(stacked, {name: torch.stack([entries[k][name] for k in asked]) for name in ("latents", "on")})
    cache.write({key("other"): {"latents": torch.zeros(1)}})
    with pytest.raises(AssertionError, match="different shapes"):
        cache.read_stacked([key(1), key("other")])


def test_zeros_follow_what_is_shorter_in_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path)
    entries = {key(n): {"length": torch.tensor(n), "states": torch.randn(n, 2).bfloat16()} for n in (3, 0, 5)}
    cache.write(entries)
    monkeypatch.setattr(shards, "part_tensor", lambda dtype, shape: part_tensor(dtype, shape).fill_(7))
    stacked = cache.read_stacked([key(3), key(0), key(5)])
    assert stacked["length"].tolist() == [3, 0, 5] and stacked["states"].shape == (3, 5, 2)
    for n, states in zip((3, 0, 5), stacked["states"]):
        assert torch.equal(states[:n], entries[key(n)]["states"]) and not states[n:].any()
    assert cache.read_stacked([key(3)])["states"].shape == (1, 3, 2), "padding depends on the batch alone"
    for n, other in enumerate([torch.zeros(3), torch.zeros(3, 3).bfloat16(), torch.zeros(3, 2)]):
        cache.write({key(f"other {n}"): {"length": torch.tensor(3), "states": other}})
        with pytest.raises(AssertionError, match="different shapes"):
            cache.read_stacked([key(3), key(f"other {n}")])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.uint8])
@pytest.mark.parametrize("shape", [(), (0,), (3, 2), (2, 0, 4)])
def test_every_type_and_shape_survives_and_others_can_read_the_file(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    from safetensors.torch import load_file

    cache = Cache(tmp_path)
    # the odd number of bytes before puts the second one where no number of its size would lie
    second = (torch.randn(shape) * 9).to(dtype)
    written = {"a": torch.ones(3, dtype=torch.bool), "b": second.t() if len(shape) == 2 else second}
    cache.write({key(1): written, key(2): written})
    for reader in (cache, Cache(tmp_path)):
        assert equal(reader.read(key(2)), written)
        assert equal(reader.read_stacked([key(2)]), {name: tensor[None] for name, tensor in written.items()})
    stock = load_file(tmp_path / cache.shard_of(key(1)))
    assert equal(stock, {f"{k}/{name}": tensor for k in (key(1), key(2)) for name, tensor in written.items()})


def test_what_the_safetensors_library_wrote_is_read(tmp_path: Path) -> None:
    """As the first version of this cache had it: sorted by type, so that an entry's parts lie apart."""
    from safetensors.torch import save_file

    entries = {
        key(i): {"states": torch.randn(2, i + 1).bfloat16(), "ids": torch.arange(3), "on": torch.tensor([i > 1])}
        for i in range(4)
    }
    flat = {f"{k}/{name}": tensor for k, parts in entries.items() for name, tensor in parts.items()}
    save_file(flat, tmp_path / f"entries-{'0' * 24}.safetensors", {"format": "lorakit cache 1"})
    cache = Cache(tmp_path)
    assert all(equal(cache.read(k), parts) for k, parts in entries.items())
    cache.write({key(9): entry(9)})
    assert upkeep.compact(tmp_path) == 1
    assert all(equal(Cache(tmp_path).read(k), parts) for k, parts in entries.items())


def test_what_is_read_is_the_callers_own(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.write({key(1): entry(1)})
    before = (tmp_path / cache.shard_of(key(1))).read_bytes()
    for read in (cache.read, lambda k: cache.read_many([k])[0], lambda k: cache.read_stacked([k])):
        read(key(1))["latents"].fill_(99)
        assert equal(cache.read(key(1)), entry(1))
    assert (tmp_path / cache.shard_of(key(1))).read_bytes() == before


def test_an_open_shard_is_read_on_when_it_is_deleted(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.write({key(i): entry(i) for i in range(3)})
    held = cache.read(key(1))
    (tmp_path / cache.shard_of(key(1))).unlink()
    assert equal(cache.read(key(2)), entry(2))
    assert equal(held, entry(1))


def test_readers_follow_what_another_process_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_OPEN_SHARDS", 2)
    writer, reader, late = Cache(tmp_path), Cache(tmp_path), Cache(tmp_path)
    for i in range(5):
        writer.write({key(i): entry(i)})
    assert equal(reader.read(key(0)), entry(0))
    assert late.missing([key(i) for i in range(5)]) == []
    assert upkeep.compact(tmp_path) == 4
    for cache in (reader, late, writer):
        assert all(equal(cache.read(key(i)), entry(i)) for i in range(5))
    assert reader.usage().shards == 1
    assert reader.usage().entries == 5


def test_a_reader_notices_what_was_deleted(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.write({key(1): entry(1)})
    cache.write({key(2): entry(2)})
    (tmp_path / cache.shard_of(key(1))).unlink()
    assert cache.missing([key(1), key(2)]) == [key(1)]


def test_a_damaged_shard_that_another_process_made_anew_is_read(tmp_path: Path) -> None:
    other = Cache(tmp_path)
    other.write({key(1): entry(1)})
    shard = tmp_path / other.shard_of(key(1))
    shard.write_bytes(shard.read_bytes()[:-4])
    cache = Cache(tmp_path)
    assert not cache.has(key(1))
    other.write({key(1): entry(1)})
    assert equal(cache.read(key(1)), entry(1))


def test_asking_what_is_missing_counts_as_use(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.write({key(1): entry(1)})
    cache.write({key(2): entry(2)})
    old = time.time() - 10 * 86_400
    for i in (1, 2):
        os.utime(tmp_path / cache.shard_of(key(i)), (old, old))
    assert Cache(tmp_path).missing([key(1)]) == []
    assert cache.prune(5 * 86_400).shards == 1
    assert Cache(tmp_path).missing([key(1), key(2)]) == [key(2)]
    assert cache.missing([key(1), key(2)]) == [key(2)]


def test_a_listing_that_missed_what_was_just_merged_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder's listing is not of one moment: it may have passed the place of a shard that then appeared there."""
    cache = Cache(tmp_path)
    cache.write({key(1): entry(1)})
    cache.write({key(2): entry(2)})
    upkeep.compact(tmp_path)
    (tmp_path / "empty").mkdir()
    folders = iter([tmp_path / "empty"])
    scandir = os.scandir
    monkeypatch.setattr(shards.os, "scandir", lambda folder: scandir(next(folders, folder)))
    assert cache.missing([key(1), key(2)]) == []
