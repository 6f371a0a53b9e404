"""What a run will write is known before it starts, and asked of the disk."""

import errno
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.core.errors import StorageError
from lorakit.training import checkpoint
from lorakit.training.preflight import Need, check_space, check_writable, run_needs

Usage = namedtuple("Usage", "total used free")
_GB = 10**9


def free(monkeypatch: pytest.MonkeyPatch, amount: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10 * amount, 9 * amount, amount))


def test_needs_on_one_file_system_add_up_and_each_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 5 * _GB)
    needs = [
        Need(tmp_path / "not" / "there", 3 * _GB, "checkpoints (run.keep_last)"),
        Need(tmp_path / "cache", 2 * _GB, "the cache"),
    ]
    check_space(needs)
    with pytest.raises(StorageError) as caught:
        check_space([*needs, Need(tmp_path, 1, "a line")])
    message = str(caught.value)
    assert str(tmp_path / "not" / "there") in message and str(tmp_path / "cache") in message
    assert "5.0 GB will be needed and 5.0 GB are free" in message and "free some space" in message
    assert all(text in message for text in ("3.0 GB for checkpoints (run.keep_last)", "2.0 GB for the cache"))
    assert not (tmp_path / "not").exists(), "asking makes nothing"


def test_each_file_system_has_its_own_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("one file system only")
    free(monkeypatch, 5)
    check_space([Need(tmp_path, 5, "this"), Need(Path("/dev/shm/x"), 5, "that")])
    with pytest.raises(StorageError, match="(?s)this.*that"):
        check_space([Need(tmp_path, 6, "this"), Need(Path("/dev/shm/x"), 6, "that")])


def test_the_real_disk_has_room_for_little_and_none_for_all(tmp_path: Path) -> None:
    check_space([Need(tmp_path, 1000, "little")])
    with pytest.raises(StorageError, match="1,000,000,000.0 TB will be needed"):
        check_space([Need(tmp_path, 10**21, "all")])


def test_writing_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []

    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(StorageError, match="read-only"):
        check_writable(tmp_path / "a")


COUNTS = st.integers(0, 12)


@given(st.integers(0, 60), st.integers(0, 60), COUNTS, COUNTS, COUNTS, COUNTS)
def test_room_is_asked_for_all_that_is_kept_at_any_time(
    first: int, more: int, save_every: int, keep_last: int, keep_every: int, keep_best: int
) -> None:
    """Against a run played through with `prune`'s own rule; the best are the first ones, which is the worst case."""
    steps = first + more
    saved = [s for s in range(1, steps + 1) if s == steps or (save_every and s % save_every == 0)]
    there: list[int] = []
    before = most = 0
    for step in saved:
        if step > first:
            most = max(most, len(there) + 1 - before)
        there.append(step)
        lasting = {s for s in there if keep_every and s % keep_every == 0} | set(there[:keep_best])
        there = there if not keep_last else [s for s in there if s in lasting or s in there[-keep_last:]]
        before = len(there) if step <= first else before
    needs = run_needs(
        *(Path("run"),), weights=1000, steps=steps, first_step=first, save_every=save_every, keep_last=keep_last,
        keep_every=keep_every, keep_best=keep_best, optimizer_factor=1.5, ema=True,
    )  # fmt: skip
    one = 4 * 1000 * 3.5
    assert needs[0].bytes / one >= most
    assert needs[0].bytes / one <= len(saved) + 1
    exports = sum(step > first for step in saved)
    assert needs[1].bytes >= 2000 * exports


def test_a_checkpoint_takes_what_is_asked_for_it(tmp_path: Path) -> None:
    weight, moments = torch.ones(300, 1000), {"a.exp_avg": torch.ones(300, 1000), "a.exp_avg_sq": torch.ones(300, 1000)}
    content = {"adapter": {"a": weight}, "optimizer": moments, "ema": {"a": weight}}
    path = checkpoint.save(tmp_path, 1, tensors=content, state={"step": 1})
    size = sum(file.stat().st_size for file in path.iterdir())
    asked = run_needs(tmp_path, weights=300_000, steps=1, save_every=0, keep_last=1, ema=True)[0].bytes
    assert size == pytest.approx(asked / 2, rel=0.01), "it and one beside it"


def test_the_cache_and_samples_are_counted_where_they_lie(tmp_path: Path) -> None:
    needs = run_needs(
        tmp_path, weights=1, steps=1, save_every=0, keep_last=1, pictures=10, picture_pixels=10**6,
        cache=tmp_path / "c", cache_bytes=77,
    )  # fmt: skip
    assert needs[-1] == Need(tmp_path / "c", 77, "the cache (data.cache)")
    assert 20 * 10**6 < needs[2].bytes < 60 * 10**6
