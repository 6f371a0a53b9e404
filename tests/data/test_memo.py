import os
import shutil
import sqlite3
import threading
from pathlib import Path

import pytest

from lorakit.core.types import Place
from lorakit.data import inspection, memo, scan
from lorakit.data.inspection import Seen
from lorakit.data.memo import Memo
from tests.data.pictures import folder_of, noise
from tests.data.scanning import good

SEEN = Seen("ab" * 32, (3, 4), 5, True, (0.25, 1.0))
LATER = 10**19


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The pictures that were read in full, in any order."""
    read: list[bytes] = []
    for name in ("inspect_picture", "inspect_mask"):
        inspect = getattr(inspection, name)
        monkeypatch.setattr(scan, name, lambda data, inspect=inspect: (read.append(data), inspect(data))[1])
    return read


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that were just written count as old."""
    monkeypatch.setattr(memo, "RACY_NS", -3600 * 10**9)


def test_what_is_put_is_got_by_root_place_kind_and_stamp(tmp_path: Path) -> None:
    path = tmp_path / "new" / "scan.sqlite"
    one, other = Place("a\udcff.png"), Place("a.tar", 512, 3)
    first = Memo(path)
    first.put("/r", one, "1-2-3-4", SEEN, began=LATER)
    first.put("/r", other, "1-2-3-4", SEEN._replace(focus=None, look=2**128 - 1), began=LATER, kind="mask")
    first.close()
    second = Memo(path)
    assert second.get("/r", one, "1-2-3-4") == SEEN
    assert second.get("/r", other, "1-2-3-4", kind="mask") == SEEN._replace(focus=None, look=2**128 - 1)
    for root, place, stamp in [
        ("/s", one, "1-2-3-4"),
        ("/r", one, "1-2-3-5"),
        ("/r", other, "1-2-3-4"),
        ("/r", one, ""),
    ]:
        assert second.get(root, place, stamp) is None
    assert first.warning is None and second.warning is None


def test_other_versions_count_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in (1, 2):
        monkeypatch.setattr(memo, "VERSION", version)
        base = Memo(tmp_path / "m")
        assert base.get("/r", Place("a"), "1-2-3-4") is None
        base.put("/r", Place("a"), "1-2-3-4", SEEN, began=LATER)
        base.close()
        base = Memo(tmp_path / "m")
        assert base.get("/r", Place("a"), "1-2-3-4") == SEEN
        base.close()


@pytest.mark.parametrize(("modified", "moved", "kept"), [(0, 0, True), (1, 0, False), (0, 1, False)])
def test_a_file_changed_just_before_is_not_trusted(tmp_path: Path, modified: int, moved: int, kept: bool) -> None:
    began = 10**18
    stamp = f"9-{began - memo.RACY_NS + modified}-{began - memo.RACY_NS + moved}-4"
    base = Memo(tmp_path / "m")
    base.put("/r", Place("a"), stamp, SEEN, began=began)
    base.close()
    assert (Memo(tmp_path / "m").get("/r", Place("a"), stamp) is not None) == kept


def test_a_scan_reads_nothing_twice_and_what_changed_anew(tmp_path: Path, looks: list[bytes], trusting: None) -> None:
    root = folder_of(tmp_path / "p", {"a.png": (20, 20), "b.jpg": (20, 20), "sub/c.png": (20, 20)})
    noise(20, 20).save(root / "a.mask.png")
    first = good(root, cache=tmp_path / "c")
    assert len(looks) == 4
    second = good(root, cache=tmp_path / "c")
    assert len(looks) == 4
    assert list(second.examples) == list(first.examples) and second.warnings == first.warnings
    # the same size and time of change, but another file
    state = (root / "a.png").stat()
    noise(20, 20, 99).save(root / "x.png")
    data = (root / "x.png").read_bytes().ljust(state.st_size, b"\0")[: state.st_size]
    (root / "x.png").write_bytes(data)
    os.utime(root / "x.png", ns=(state.st_atime_ns, state.st_mtime_ns))
    os.replace(root / "x.png", root / "a.png")
    (root / "b.txt").write_text("another caption")
    third = good(root, cache=tmp_path / "c", skip="skip")
    assert looks[4:] == [data]
    assert [e.captions for e in third.examples if e.key == "0/b.jpg"] == [("another caption",)]
    # a copy of the folder is another folder
    shutil.copytree(root, tmp_path / "q")
    good(tmp_path / "q", cache=tmp_path / "c", skip="skip")
    assert len(looks) == 9


def test_files_just_written_are_read_again(tmp_path: Path, looks: list[bytes]) -> None:
    root = folder_of(tmp_path / "p", {"a.png": (20, 20)})
    for _ in range(2):
        good(root, cache=tmp_path / "c")
    assert len(looks) == 2


def test_bad_pictures_are_never_remembered(tmp_path: Path, looks: list[bytes], trusting: None) -> None:
    root = folder_of(tmp_path / "p", {"a.png": (20, 20), "b.png": (20, 20)})
    (root / "a.png").write_bytes(b"junk")
    for n in (1, 2):
        found = good(root, cache=tmp_path / "c", skip="skip")
        assert len(found.skipped) == 1 and len(found.examples) == 1
        assert looks.count(b"junk") == n
    assert len(looks) == 3


@pytest.mark.parametrize("kind", ["damaged", "folder", "other", "file"])
def test_a_memory_that_cannot_be_used_is_one_warning(tmp_path: Path, kind: str, trusting: None) -> None:
    root = folder_of(tmp_path / "p", {"a.png": (20, 20)})
    cache = tmp_path / "c"
    if kind == "file":
        cache.write_text("no folder")
    else:
        cache.mkdir()
    if kind == "damaged":
        good(root, cache=cache)
        data = bytearray((cache / "scan.sqlite").read_bytes())
        data[100:] = b"\xff" * (len(data) - 100)
        (cache / "scan.sqlite").write_bytes(data)
    elif kind == "folder":
        (cache / "scan.sqlite").mkdir()
    elif kind == "other":
        base = sqlite3.connect(cache / "scan.sqlite")
        base.execute("CREATE TABLE pictures (other INTEGER)")
        base.close()
    found = good(root, cache=cache)
    assert len(found.examples) == 1
    (warning,) = found.warnings
    assert "scan.sqlite in the cache could not be used" in warning and str(tmp_path) not in warning


def test_a_locked_memory_is_waited_for_and_then_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusting: None
) -> None:
    monkeypatch.setattr(memo, "_WAIT_S", 0.1)
    root = folder_of(tmp_path / "p", {"a.png": (20, 20)})
    good(root, cache=tmp_path / "c")
    noise(20, 20, 7).save(root / "b.png")
    base = sqlite3.connect(tmp_path / "c" / "scan.sqlite", isolation_level=None)
    base.execute("BEGIN EXCLUSIVE")
    found = good(root, cache=tmp_path / "c", default_caption="x")
    assert len(found.examples) == 2 and "locked" in found.warnings[0]
    base.execute("ROLLBACK")
    assert good(root, cache=tmp_path / "c", default_caption="x").warnings == ()


def test_several_scans_at_once(tmp_path: Path, trusting: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memo, "_FLUSH", 2)
    root = folder_of(tmp_path / "p", {f"{i}.png": (20, 20) for i in range(12)})
    results: list[int] = []
    threads = [
        threading.Thread(target=lambda: results.append(len(good(root, cache=tmp_path / "c").warnings)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [0, 0, 0]


def test_no_memory_among_the_pictures(tmp_path: Path) -> None:
    root = folder_of(tmp_path, {"a.png": (20, 20)})
    before = sorted(os.listdir(root))
    assert len(good(root, cache=root / "cache").examples) == 1
    assert sorted(os.listdir(root)) == before
