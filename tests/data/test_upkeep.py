import contextlib
import multiprocessing
import os
import time
from pathlib import Path

import torch

from lorakit.data import upkeep
from lorakit.data.shards import Cache, content_key
from lorakit.data.upkeep import Removed, Usage, compact, is_cache

DAY = 86_400.0


def write(folder: Path, name: object, *, age: float = 0.0, size: int = 10) -> Path:
    cache = Cache(folder)
    cache.write({content_key(name): {"x": torch.zeros(size, dtype=torch.uint8)}})
    shard = folder / cache.shard_of(content_key(name))
    then = time.time() - age
    os.utime(shard, (then, then))
    return shard


def test_what_was_not_used_for_long_is_deleted(tmp_path: Path) -> None:
    old, young = write(tmp_path, "old", age=31 * DAY), write(tmp_path, "young", age=29 * DAY)
    (tmp_path / "entries-of-mine.safetensors").write_bytes(b"mine")
    (tmp_path / "notes.txt").write_text("mine")
    size = old.stat().st_size
    cache = Cache(tmp_path)
    assert cache.prune(30 * DAY, dry_run=True) == Removed(shards=1, bytes=size)
    assert old.exists()
    assert cache.prune(30 * DAY) == Removed(shards=1, bytes=size)
    assert {path.name for path in tmp_path.iterdir()} == {young.name, "entries-of-mine.safetensors", "notes.txt"}
    assert not cache.has(content_key("old"))


def test_reading_keeps_a_shard_and_is_noted_once_a_day(tmp_path: Path) -> None:
    shard = write(tmp_path, "a", age=40 * DAY)
    Cache(tmp_path).read(content_key("a"))
    noted = shard.stat().st_mtime
    assert time.time() - noted < 60
    os.utime(shard, (noted - DAY / 2, noted - DAY / 2))
    Cache(tmp_path).read(content_key("a"))
    assert shard.stat().st_mtime == noted - DAY / 2
    assert Cache(tmp_path).prune(30 * DAY) == Removed()


def test_copies_of_tables_that_nobody_reads_go(tmp_path: Path) -> None:
    kept = [tmp_path / "imports" / "mine" / "a.tar", tmp_path / "datasets" / ("1" * 32) / "deep" / "b.arrow"]
    gone = tmp_path / "imports" / ("0" * 32) / "a.tar"
    for file in (*kept, gone):
        file.parent.mkdir(parents=True)
        file.write_bytes(b"12345")
    for folder in (kept[0].parent, gone.parent):
        os.utime(folder, (time.time() - 40 * DAY,) * 2)
    assert Cache(tmp_path).prune(30 * DAY, dry_run=True) == Removed(copies=1, bytes=5) and gone.exists()
    assert Cache(tmp_path).prune(30 * DAY) == Removed(copies=1, bytes=5)
    assert not gone.parent.exists() and all(file.exists() for file in kept)


def test_the_damaged_and_the_half_written_go_too(tmp_path: Path) -> None:
    damaged, whole = write(tmp_path, "damaged"), write(tmp_path, "whole")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    leftover, busy = (tmp_path / f".{whole.name}.{pid}.tmp" for pid in (12, 13))
    for path in (leftover, busy):
        path.write_bytes(b"half")
    os.utime(leftover, (time.time() - DAY, time.time() - DAY))
    size = damaged.stat().st_size + 4
    assert Cache(tmp_path).prune(30 * DAY) == Removed(shards=1, damaged=1, leftovers=1, bytes=size)
    assert {path.name for path in tmp_path.iterdir()} == {whole.name, busy.name}


def test_usage_counts_files_and_entries(tmp_path: Path) -> None:
    assert Cache(tmp_path / "nowhere").usage() == Usage(0, 0, 0)
    assert Cache(tmp_path / "nowhere").prune(0) == Removed()
    sizes = [write(tmp_path, name).stat().st_size for name in range(3)]
    assert Cache(tmp_path).usage() == Usage(3, sum(sizes), 3)
    for name, size in {
        "scan.sqlite": 1,
        "scan.sqlite-journal": 20,
        f"imports/{'0' * 32}/000000.tar": 300,
        "datasets/deep/down/a.arrow": 4000,
        "notes.txt": 50_000,
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)
    assert Cache(tmp_path).usage() == Usage(3, sum(sizes), 3, other_bytes=4321)


def test_a_folder_is_a_cache_if_it_holds_what_one_does_or_nothing(tmp_path: Path) -> None:
    assert is_cache(tmp_path)
    (tmp_path / "entries-of-mine.safetensors").write_bytes(b"mine")
    (tmp_path / "photo.png").write_bytes(b"mine")
    assert not is_cache(tmp_path)
    for name in ("scan.sqlite", "imports", "datasets"):
        (tmp_path / name).mkdir()
        assert is_cache(tmp_path)
        (tmp_path / name).rmdir()
    shard = write(tmp_path, "a")
    assert is_cache(tmp_path)
    shard.rename(tmp_path / f".{shard.name}.12.tmp")
    assert is_cache(tmp_path)


def test_small_shards_are_merged_to_large_ones_neighbours_in_age_together(tmp_path: Path) -> None:
    paths = [write(tmp_path, i, age=(9 - i) * DAY, size=10_000) for i in range(9)]
    large = write(tmp_path, "large", size=30_000)
    stamps = [path.stat().st_mtime for path in paths]
    limit = 4 * paths[0].stat().st_size + 100
    assert compact(tmp_path, large=limit) == 3 + 3
    merged = sorted((p for p in tmp_path.iterdir() if p != large), key=lambda p: p.stat().st_mtime)
    assert [path.stat().st_mtime for path in merged] == [stamps[3], stamps[7], stamps[8]]
    assert all(path.stat().st_size <= limit for path in merged)
    cache = Cache(tmp_path)
    assert cache.missing([content_key(i) for i in range(9)]) == []
    assert compact(tmp_path, large=limit) == 0


def test_merging_leaves_out_what_is_damaged_or_not_ours(tmp_path: Path) -> None:
    damaged, *_ = [write(tmp_path, name) for name in ("damaged", "a", "b")]
    damaged.write_bytes(b"")
    assert compact(tmp_path) == 1
    assert damaged.exists()
    assert Cache(tmp_path).missing([content_key("a"), content_key("b")]) == []


def test_a_merge_that_is_killed_loses_nothing(tmp_path: Path, monkeypatch: object) -> None:
    for name in range(3):
        write(tmp_path, name)

    class Killed(BaseException):
        pass

    def killed(*_: object, **__: object) -> bool:
        raise Killed

    monkeypatch.setattr(upkeep, "_delete", killed)  # type: ignore[attr-defined]
    with contextlib.suppress(Killed):
        compact(tmp_path)
    monkeypatch.undo()  # type: ignore[attr-defined]
    keys = [content_key(name) for name in range(3)]
    assert Cache(tmp_path).missing(keys) == []
    compact(tmp_path)
    assert Cache(tmp_path).missing(keys) == []
    assert Cache(tmp_path).usage() == Usage(3, Cache(tmp_path).usage().bytes, 1)


def _merge_again_and_again(folder: Path) -> None:
    end = time.monotonic() + 2
    while time.monotonic() < end:
        compact(folder)


def test_reading_and_writing_go_on_while_others_merge(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=_merge_again_and_again, args=(tmp_path,)) for _ in range(2)]
    for process in others:
        process.start()
    writer, reader, written = Cache(tmp_path), Cache(tmp_path), 0
    while any(process.is_alive() for process in others):
        writer.write({content_key(written): {"x": torch.tensor([written])}})
        written += 1
        for i in {0, written // 2, written - 1}:
            assert reader.read(content_key(i))["x"].item() == i
    assert written > 20
    assert all(process.exitcode == 0 for process in others)
    assert reader.missing([content_key(i) for i in range(written)]) == []
