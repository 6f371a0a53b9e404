import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit.core.errors import InputError
from lorakit.data import cache as module
from lorakit.data.buckets import Bucket
from lorakit.data.cache import (
    Cache,
    Filled,
    default_folder,
    fill_latents,
    fill_text,
    latent_key,
    refuse_within,
    text_key,
)
from lorakit.data.images import CropInfo, Cut, Prepared

BUCKET, WIDE = Bucket(16, 16), Bucket(24, 8)
INFO = CropInfo((16, 16), 0, 0)


class Jobs(Sequence[tuple[str, str, int]]):
    """Pictures by number; every third one is wide. `asked` is what was asked for."""

    def __init__(self, count: int = 6) -> None:
        self.count = count
        self.asked: Counter[int] = Counter()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: Any) -> Any:
        if number >= self.count:
            raise IndexError(number)
        self.asked[number] += 1
        return key_of(number), f"photos/{number}.png", number


def key_of(number: int) -> str:
    return latent_key(f"{number:064x}", Cut(WIDE if number % 3 == 2 else BUCKET), fingerprint="vae")


def prepare(number: int) -> Prepared:
    size = (3, 8, 24) if number % 3 == 2 else (3, 16, 16)
    return Prepared(torch.full(size, number / 10), INFO)


class Encoder:
    """Means over 4×4 blocks; `seen` counts the pictures of each call."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, pixels: Tensor) -> Tensor:
        assert pixels.dtype == torch.float32
        assert not torch.is_grad_enabled()
        self.seen.append(len(pixels))
        return torch.nn.functional.avg_pool2d(pixels, 4)


def fill(cache: Cache, jobs: Sequence[Any], encode: Any = None, **more: Any) -> Filled:
    return fill_latents(cache, jobs, **({"prepare": prepare, "encode": encode or Encoder()} | more))


# -- filling alone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_each_picture_is_encoded_once_and_only_once(tmp_path: Path, workers: int) -> None:
    cache, encoder, steps = Cache(tmp_path), Encoder(), []
    jobs = [*Jobs(), *Jobs()]  # equal pictures have one entry
    assert fill(cache, jobs, encoder, workers=workers, on_progress=steps.append) == Filled(made=6, found=0)
    assert encoder.seen == [1] * 6
    assert sum(steps) == 6
    assert fill(cache, jobs, encoder, workers=workers) == Filled(made=0, found=6)
    assert fill(cache, [*Jobs(8)], encoder, workers=workers) == Filled(made=2, found=6)
    entries = [cache.read(key_of(i)) for i in range(8)]
    assert [tuple(entry["latents"].shape) for entry in entries] == [(3, 4, 4), (3, 4, 4), (3, 2, 6)] * 2 + [
        (3, 4, 4)
    ] * 2
    assert all(entry.keys() == {"latents"} for entry in entries)
    for i, entry in enumerate(entries):
        torch.testing.assert_close(entry["latents"], torch.full_like(entry["latents"], i / 10))


def test_latents_are_kept_as_float32(tmp_path: Path) -> None:
    fill(Cache(tmp_path), Jobs(1), lambda x: x.double() / 3)
    assert Cache(tmp_path).read(key_of(0))["latents"].dtype == torch.float32


def test_a_mask_is_kept_beside_the_latents_at_their_size(tmp_path: Path) -> None:
    mask = torch.zeros(1, 16, 16)
    mask[:, :4, :6] = 1

    def masked(number: int) -> Prepared:
        return Prepared(torch.zeros(3, 16, 16), INFO, mask if number else None)

    cache = Cache(tmp_path)
    fill(cache, Jobs(2), prepare=masked)
    assert cache.read(key_of(0)).keys() == {"latents"}
    kept = cache.read(key_of(1))["mask"]
    assert kept.tolist() == [[[1, 0.5, 0, 0], [0] * 4, [0] * 4, [0] * 4]]


def test_only_what_is_missing_is_asked_for_and_prepared(tmp_path: Path) -> None:
    cache, prepared = Cache(tmp_path), []
    fill(cache, Jobs(4))

    def noted(number: int) -> Prepared:
        prepared.append(number)
        return prepare(number)

    fill(cache, Jobs(6), prepare=noted)
    assert sorted(prepared) == [4, 5]


def test_jobs_are_not_collected(tmp_path: Path) -> None:
    """One at a time, of a sequence that may make them as it goes: for its key, for preparing, and for writing."""
    jobs = Jobs(40)
    fill(Cache(tmp_path), jobs)
    assert set(jobs.asked.values()) == {3}


def test_an_interrupted_filling_keeps_what_it_had_and_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    class Interrupted(Encoder):
        def __call__(self, pixels: Tensor) -> Tensor:
            if len(self.seen) == 4:
                raise KeyboardInterrupt
            return super().__call__(pixels)

    whole, broken = Cache(tmp_path / "whole"), Cache(tmp_path / "broken")
    fill(whole, Jobs())
    with pytest.raises(KeyboardInterrupt):
        fill(broken, Jobs(), Interrupted())
    assert fill(Cache(tmp_path / "broken"), Jobs()) == Filled(made=2, found=4)
    for number in range(6):
        assert torch.equal(whole.read(key_of(number))["latents"], broken.read(key_of(number))["latents"])


@pytest.mark.parametrize("setting", ["_SHARD_ENTRIES", "_SHARD_BYTES", "_SHARD_SECONDS"])
def test_shards_are_written_as_the_filling_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    monkeypatch.setattr(
        module, setting, {"_SHARD_ENTRIES": 2, "_SHARD_BYTES": 300, "_SHARD_SECONDS": (0.0, 0.0)}[setting]
    )
    fill(Cache(tmp_path), Jobs())
    assert len(list(tmp_path.iterdir())) == (6 if setting == "_SHARD_SECONDS" else 3)


def test_early_work_is_written_soon_and_late_work_in_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, written = [1000.0], []
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    cache = Cache(tmp_path)
    monkeypatch.setattr(cache, "write", lambda entries: written.append((clock[0] - 1000, len(entries))))

    def encode(pixels: Tensor) -> Tensor:
        clock[0] += 0.5
        return torch.nn.functional.avg_pool2d(pixels, 4)

    assert fill(cache, Jobs(600), encode=encode).made == 600
    assert sum(count for _, count in written) == 600
    times = [0.0, *(at for at, _ in written)]
    for before, after in itertools.pairwise(times):
        assert after - before <= min(max(2.0, after / 4), 20.0) + 0.5
    assert len(written) < 30


def test_batches_hold_one_size(tmp_path: Path) -> None:
    encoder, cache = Encoder(), Cache(tmp_path / "cache")
    fill(cache, Jobs(), encoder, batch_size=4)
    assert encoder.seen == [2, 1, 2, 1]
    single = Cache(tmp_path / "single")
    fill(single, Jobs())
    for number in range(6):
        torch.testing.assert_close(cache.read(key_of(number)), single.read(key_of(number)))


def test_latents_that_are_not_finite_name_the_picture(tmp_path: Path) -> None:
    calls = []

    def overflows(pixels: Tensor) -> Tensor:
        calls.append(pixels)
        return pixels / (0.0 if len(calls) == 3 else 1.0)

    with pytest.raises(InputError, match=r"photos/2\.png: its latents are not finite"):
        fill(Cache(tmp_path), Jobs(), overflows)
    assert [Cache(tmp_path).has(key_of(number)) for number in range(6)] == [True] * 2 + [False] * 4


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_changed_ends_it_and_what_was_made_is_kept(tmp_path: Path, workers: int) -> None:
    def changed(number: int) -> Prepared:
        if number == 3:
            raise InputError("photos/3.png: it was changed")
        return prepare(number)

    with pytest.raises(InputError, match=r"^photos/3\.png: it was changed$"):
        fill(Cache(tmp_path), Jobs(), prepare=changed, workers=workers)
    assert [Cache(tmp_path).has(key_of(number)) for number in range(6)] == [True] * 3 + [False] * 3


def test_captions_are_encoded_once_each(tmp_path: Path) -> None:
    cache, asked, steps = Cache(tmp_path), [], []

    def encode(captions: Sequence[str]) -> dict[str, Tensor]:
        asked.extend(captions)
        return {"states": torch.tensor([[len(c)] for c in captions]), "mask": torch.ones(len(captions), 2).bfloat16()}

    captions = ["a dog", "a cat!", "a dog", ""]
    assert fill_text(cache, captions, encode=encode, fingerprint="clip", on_progress=steps.append) == Filled(3, 0)
    assert asked == ["a dog", "a cat!", ""]
    assert sum(steps) == 3
    assert fill_text(cache, [*captions, "new"], encode=encode, fingerprint="clip") == Filled(made=1, found=3)
    assert cache.read(text_key("a cat!", "clip"))["states"].tolist() == [6]
    assert cache.read(text_key("", "clip"))["mask"].dtype == torch.bfloat16
    assert cache.missing([text_key("a dog", "other"), text_key("a dog ", "clip")])


# -- keys -----------------------------------------------------------------------------------------------------------

CUT = Cut(BUCKET, (0.5, 0.25), False, (1.0, 1.1, 0.9, 0.0), "#ffffff")
SAME: dict[str, Any] = {
    "digest": "a" * 64,
    "cut": CUT,
    "fingerprint": "vae",
    "mask_digest": "b" * 64,
    "alpha_mask": False,
}
CHANGES: list[dict[str, Any]] = [
    {"digest": "a" * 63 + "b"},
    {"cut": CUT._replace(bucket=Bucket(16, 17))},
    {"cut": CUT._replace(bucket=Bucket(17, 16))},
    {"cut": CUT._replace(anchor=(0.5, 0.26))},
    {"cut": CUT._replace(anchor=(0.25, 0.5))},
    {"cut": CUT._replace(flip=True)},
    {"cut": CUT._replace(jitter=())},
    *({"cut": CUT._replace(jitter=(*CUT.jitter[:i], 0.5, *CUT.jitter[i + 1 :]))} for i in range(4)),
    {"cut": CUT._replace(background="#fffffe")},
    {"fingerprint": "vaf"},
    {"mask_digest": "b" * 63 + "c"},
    {"mask_digest": ""},
    {"alpha_mask": True},
]


def test_a_latents_key_changes_with_each_single_input() -> None:
    keys = [latent_key(**(SAME | change)) for change in CHANGES]
    assert len({latent_key(**SAME), *keys}) == len(CHANGES) + 1
    assert latent_key(**SAME) == latent_key(**SAME)


def test_a_texts_key_changes_with_each_single_input() -> None:
    assert (
        len({text_key("a dog", "clip"), text_key("a dog ", "clip"), text_key("a dog", "clap"), text_key("", "clip")})
        == 4
    )


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_exactly_the_affected_entry_is_made_anew(tmp_path: Path, change: dict[str, Any]) -> None:
    def jobs(of_second: dict[str, Any]) -> list[tuple[str, str, int]]:
        first = latent_key(**(SAME | {"digest": "f" * 64}))
        return [(first, "first", 0), (latent_key(**(SAME | of_second)), "second", 1)]

    made: list[int] = []

    def noted(number: int) -> Prepared:
        made.append(number)
        return prepare(number)

    for of_second, expected in ((({}), [0, 1]), (change, [1]), ({}, []), (change, [])):
        fill(Cache(tmp_path), jobs(of_second), prepare=noted)
        assert made == expected
        made.clear()


@pytest.mark.parametrize("version", ["LATENTS_VERSION", "TEXT_VERSION"])
def test_a_new_version_of_the_code_makes_new_keys(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    def both() -> list[str]:
        return [latent_key(**SAME), text_key("a dog", "clip")]

    before = both()
    monkeypatch.setattr(module, version, getattr(module, version) + 1)
    assert [a == b for a, b in zip(before, both())] == [version != "LATENTS_VERSION", version != "TEXT_VERSION"]


# -- where ----------------------------------------------------------------------------------------------------------


def test_the_cache_never_lies_among_the_pictures(tmp_path: Path) -> None:
    photos, link = tmp_path / "photos", tmp_path / "link"
    photos.mkdir()
    link.symlink_to(photos, target_is_directory=True)
    for folder in (photos, photos / "a" / "b", link / "cache", photos / ".." / "photos" / "c"):
        with pytest.raises(InputError, match=r"data\.sources\.1\.path"):
            refuse_within(folder, [tmp_path / "other", photos], key="data.cache")
    for folder in (tmp_path, tmp_path / "photos2", tmp_path / "cache"):
        refuse_within(folder, [tmp_path / "other", photos], key="data.cache")


def test_the_default_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_folder() == Path("/somewhere/lorakit/data")


# -- several processes ----------------------------------------------------------------------------------------------

WORKER = """
import datetime, json, os, signal, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from lorakit.core import processes
from lorakit.core.errors import InputError, Stopped, StorageError
from lorakit.data.cache import Cache, fill_latents, fill_text, text_key
from tests.data.test_cache import Jobs, key_of, prepare

scenarios, folder, rank, port = sys.argv[1].split(","), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
torch.set_num_threads(1)
processes.HEARTBEAT = 0.5
dist.init_process_group(
    "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=30)
)
gather = processes.gather_objects
waits = []

def timed(value):
    start = time.monotonic()
    try:
        return gather(value)
    finally:
        waits.append(time.monotonic() - start)

processes.gather_objects = timed

def run(scenario):
    cache, made, heard, filled, error = Cache(folder / scenario), [], [], None, None
    waits.clear()

    def ready(number):
        if scenario == "raises" and rank == 1 and len(made) > 2:
            raise InputError(["photos/x.png: it was changed", "and so was y"])
        return prepare(number)

    def encode(pixels):
        if scenario == "slow" and rank == 1:
            time.sleep(0.2)
        elif scenario in ("killed", "raises", "stopped", "full"):
            time.sleep(0.05)
        if scenario == "stopped" and rank == 1 and len(made) == 3:
            signal.raise_signal(signal.SIGTERM)
        if scenario == "breaks" and rank == 0:
            raise RuntimeError("out of memory")
        made.append(round(float(pixels.flatten()[0]) * 10))
        return torch.nn.functional.avg_pool2d(pixels, 4)

    def text(captions):
        made.append(captions[0])
        return {"states": torch.ones(1, 2)}

    def refuse(entries):
        raise StorageError("the disk is full")

    if scenario == "full" and rank == 1:
        cache.write = refuse
    workers = 1 if scenario == "workers" else 0
    try:
        filled = fill_latents(
            cache, Jobs(40), prepare=ready, encode=encode, workers=workers, on_progress=heard.append
        )
        assert all(cache.has(key_of(number)) for number in range(40)), "every rank has all of it"
        assert fill_text(cache, [f"caption {i}" for i in range(9)], encode=text, fingerprint="clip") == (9, 0)
        assert all(cache.has(text_key(f"caption {i}", "clip")) for i in range(9))
    except (Exception, KeyboardInterrupt) as caught:
        error = type(caught).__name__, str(caught)
    return {"made": made, "filled": filled, "heard": sum(heard), "error": error, "longest": max(waits)}

def stop(number, frame):
    raise Stopped(number)

signal.signal(signal.SIGTERM, stop)
print(json.dumps({scenario: run(scenario) for scenario in scenarios}))
processes.leave()
"""


def start_two(scenarios: str, folder: Path) -> list[subprocess.Popen[str]]:
    """Two gloo processes that fill a cache in `folder` for each scenario."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, scenarios, str(folder), str(rank), port],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]


def run_two(scenarios: str, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What the two say of themselves, by scenario."""
    started = start_two(scenarios, folder)
    ended = [process.communicate(timeout=120) for process in started]
    for process, (_, err) in zip(started, ended):
        assert process.returncode == 0, err
    said = [json.loads(out) for out, _ in ended]
    return {scenario: [rank[scenario] for rank in said] for scenario in scenarios.split(",")}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """All scenarios in one pair of processes, as starting them takes longest."""
    folder = tmp_path_factory.mktemp("two")
    return folder, run_two("equal,workers,slow,raises,breaks,stopped,full", folder)


@pytest.mark.parametrize("scenario", ["equal", "workers"])
def test_two_ranks_make_each_entry_once(two: Any, scenario: str) -> None:
    said = two[1][scenario]
    assert sorted(str(m) for rank in said for m in rank["made"]) == sorted(
        [*map(str, range(40)), *(f"caption {i}" for i in range(9))]
    )
    for rank in said:
        assert (rank["filled"], rank["heard"], rank["error"]) == ([40, 0], 40, None)
        assert len(rank["made"]) > 4


def test_a_slow_rank_loses_its_work_to_the_other_and_nobody_waits_long(two: Any) -> None:
    """Alone, the slow one would take four seconds for its half."""
    said = two[1]["slow"]
    pictures = [[m for m in rank["made"] if isinstance(m, int)] for rank in said]
    assert sorted(pictures[0] + pictures[1]) == list(range(40))
    assert len(pictures[1]) < 12
    assert said[0]["longest"] < 2.0  # a heartbeat of 0.5, an item of 0.2, and a loaded machine


def test_what_one_rank_raises_every_rank_raises(two: Any) -> None:
    said = two[1]["raises"]
    expected = ["InputError", "photos/x.png: it was changed\nand so was y"]
    assert [rank["error"] for rank in said] == [expected, expected]
    kept = [m for rank in said for m in rank["made"]]
    assert kept
    assert all(Cache(two[0] / "raises").has(key_of(number)) for number in kept)


def test_a_signal_on_one_rank_ends_all_and_what_was_made_is_kept(two: Any) -> None:
    said = two[1]["stopped"]
    assert [rank["error"] for rank in said] == [["Stopped", "Stopped by SIGTERM."]] * 2
    kept = [m for rank in said for m in rank["made"]]
    assert len(said[1]["made"]) == 3 and len(said[0]["made"]) < 20
    assert all(Cache(two[0] / "stopped").has(key_of(number)) for number in kept)


def test_a_full_disk_on_one_rank_ends_all(two: Any) -> None:
    assert [rank["error"] for rank in two[1]["full"]] == [["StorageError", "the disk is full"]] * 2


def test_what_breaks_a_rank_ends_the_other_too(two: Any) -> None:
    said = two[1]["breaks"]
    assert said[0]["error"] == ["RuntimeError", "out of memory"]
    assert said[1]["error"] == ["RuntimeError", "rank 0 failed: RuntimeError: out of memory"]


def test_killed_while_filling_what_was_written_is_used(tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    started, end = start_two("killed", tmp_path), time.monotonic() + 60
    while Cache(folder).usage().shards < 2 and time.monotonic() < end:
        time.sleep(0.02)
    for process in started:
        process.kill()
        process.communicate(timeout=60)
    there = {number for number in range(40) if Cache(folder).has(key_of(number))}
    assert 0 < len(there) < 40
    prepared: list[int] = []

    def noted(number: int) -> Prepared:
        prepared.append(number)
        return prepare(number)

    assert fill(Cache(folder), Jobs(40), prepare=noted) == Filled(made=40 - len(there), found=len(there))
    assert sorted(prepared) == sorted({*range(40)} - there)
