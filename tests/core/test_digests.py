"""A large file is read for its digest once, and again as soon as it may have changed."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit.core import digests
from lorakit.core.digests import sha256_of_unchanged


@pytest.fixture
def reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read; the user has nothing kept, any file is large, and none was changed just now."""
    real, read = digests.sha256_file, list[Path]()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(digests, "_LARGE", 1)
    monkeypatch.setattr(digests, "RACY_NS", -3600 * 10**9)
    monkeypatch.setattr(digests, "sha256_file", lambda path: read.append(path) or real(path))
    return read


def written(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def kept(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "user" / "lorakit" / "digests").glob("*"))


def test_an_unchanged_file_is_read_once(tmp_path: Path, reads: list[Path]) -> None:
    path = tmp_path / "weights"
    right = written(path, b"a" * 9)
    assert [sha256_of_unchanged(path) for _ in range(3)] == [right] * 3 and reads == [path]
    link = tmp_path / "link"
    link.symlink_to(path)
    assert sha256_of_unchanged(link) == right and reads == [path], "a link is the same file"


def in_place(path: Path) -> None:
    before = path.stat()
    path.write_bytes(b"b" * 9)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as copying does that keeps times


def replaced(path: Path) -> None:
    before = path.stat()
    other = path.with_name("other")
    other.write_bytes(b"b" * 9)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("change", [in_place, replaced])
def test_a_changed_file_is_read_again_though_size_and_time_are_the_same(
    change: Callable[[Path], None], tmp_path: Path, reads: list[Path]
) -> None:
    path = tmp_path / "weights"
    written(path, b"a" * 9)
    sha256_of_unchanged(path)
    change(path)
    assert sha256_of_unchanged(path) == hashlib.sha256(b"b" * 9).hexdigest() and len(reads) == 2


def test_of_what_was_changed_just_before_and_of_small_files_nothing_is_kept(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights"
    right = written(path, b"a" * 9)
    monkeypatch.setattr(digests, "RACY_NS", 2 * 10**9)
    assert sha256_of_unchanged(path) == right and not kept(tmp_path)
    monkeypatch.setattr(digests, "RACY_NS", -3600 * 10**9)
    monkeypatch.setattr(digests, "_LARGE", 10)
    assert sha256_of_unchanged(path) == right and not kept(tmp_path)


@pytest.mark.parametrize(
    "said", [b"", b"nonsense", b"\xff\xfe", b"1-2-3-4 " + b"0" * 64, b"one two three", b"{stamp} " + b"z" * 64]
)
def test_what_is_kept_and_makes_no_sense_counts_for_nothing(said: bytes, tmp_path: Path, reads: list[Path]) -> None:
    path = tmp_path / "weights"
    right = written(path, b"a" * 9)
    sha256_of_unchanged(path)
    (file,) = kept(tmp_path)
    file.write_bytes(said.replace(b"{stamp}", file.read_bytes().split()[0]))
    assert sha256_of_unchanged(path) == right and len(reads) == 2
    assert sha256_of_unchanged(path) == right and len(reads) == 2, "and is put right"


def test_where_nothing_can_be_kept_it_is_read_each_time(tmp_path: Path, reads: list[Path]) -> None:
    path = tmp_path / "weights"
    right = written(path, b"a" * 9)
    (tmp_path / "user").write_text("a file, no folder")
    assert sha256_of_unchanged(path) == sha256_of_unchanged(path) == right and len(reads) == 2
