import errno
import json
import os
import pathlib
import stat
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from lorakit.core import files
from lorakit.core.errors import StorageError

WRITERS = {
    "bytes": lambda path: files.write_bytes(path, b"new"),
    "text": lambda path: files.write_text(path, "new"),
    "json": lambda path: files.write_json(path, {"new": 1}),
    "tensors": lambda path: files.write_tensors(path, {"new": torch.ones(2)}),
}


def fails(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_file_is_written_with_its_folders_and_without_litter(tmp_path, write):
    path = tmp_path / "a" / "b" / "file"
    write(path)
    write(path)
    assert [p.name for p in path.parent.iterdir()] == ["file"]
    assert path.stat().st_mode & 0o044 == 0o044, "others may read a result"


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO, errno.ESTALE, errno.EFBIG]
)
def test_a_failing_disk_leaves_the_old_file_and_says_what_to_do(tmp_path, monkeypatch, write, call, number):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, call, fails(number))
    with pytest.raises(StorageError, match="could not be written") as caught:
        write(path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_other_errors_pass_and_leave_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), files.written_aside(path) as aside:
        aside.write_bytes(b"half")
        raise KeyError("a bug of ours")
    with pytest.raises(OSError, match="File name too long"):
        files.write_bytes(tmp_path / ("n" * 300), b"")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_kill_in_between_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = """
import os, sys
from pathlib import Path
from lorakit.core import files
with files.written_aside(Path(sys.argv[1])) as aside:
    aside.write_bytes(b"half")
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -9
    assert path.read_bytes() == b"old"


@pytest.fixture
def events(monkeypatch):
    """What is synced and renamed, in order, by the end of its name."""
    seen = []

    def watch(name, kind, about):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args: (seen.append((kind, about(*args))), real(*args))[1])

    watch("fsync", "sync", lambda handle: os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
    watch("replace", "rename", lambda _, target: os.path.basename(target))
    watch("rename", "rename", lambda _, target: os.path.basename(target))
    return seen


def test_what_is_renamed_was_synced_and_so_is_the_folder_after(tmp_path, events):
    files.write_bytes(tmp_path / "file", b"x")
    assert [kind for kind, _ in events] == ["sync", "rename", "sync"]
    assert "file" in events[0][1]
    assert events[2] == ("sync", tmp_path.name)


def test_all_within_a_folder_is_synced_before_it_appears(tmp_path, events):
    with files.folder_aside(tmp_path / "step-1") as aside:
        (aside / "nested").mkdir()
        (aside / "nested" / "file").touch()
    synced, last = {name for kind, name in events[:3]}, events[3:]
    assert synced == {"file", "nested", aside.name}
    assert last == [("rename", "step-1"), ("sync", tmp_path.name)]


def test_a_folder_that_is_removed_is_gone_before_its_files_are(tmp_path, events):
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-1" / "file").touch()
    files.remove_folder(tmp_path / "step-1")
    (_, aside), last = events
    assert files.litter(tmp_path) == [] and list(tmp_path.iterdir()) == [] and last == ("sync", tmp_path.name)
    (tmp_path / aside).mkdir()  # as a kill leaves it
    assert files.litter(tmp_path) == [tmp_path / aside]


@pytest.mark.parametrize("call", ["rename", "fsync"])
def test_a_folder_that_cannot_be_removed_stays_or_goes(tmp_path, monkeypatch, call):
    (tmp_path / "step-1").mkdir()
    monkeypatch.setattr(os, call, fails(errno.EACCES))
    with pytest.raises(StorageError, match="permission"):
        files.remove_folder(tmp_path / "step-1")
    assert [p.name for p in tmp_path.iterdir()] == (["step-1"] if call == "rename" else [])


def test_a_file_system_that_syncs_no_folders_will_do(tmp_path, monkeypatch):
    fsync, numbers = os.fsync, [errno.EINVAL]

    def no_folders(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(numbers[0], "no")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", no_folders)
    files.write_bytes(tmp_path / "file", b"x")
    with files.folder_aside(tmp_path / "folder") as aside:
        (aside / "x").touch()
    assert {p.name for p in tmp_path.iterdir()} == {"file", "folder"}
    numbers[0] = errno.EIO
    with pytest.raises(StorageError, match="input/output"):
        files.write_bytes(tmp_path / "file", b"x")
    monkeypatch.setattr(os, "fsync", fails(errno.EINVAL))
    with pytest.raises(OSError, match="Invalid argument"):
        files.write_bytes(tmp_path / "file", b"x")


def test_the_first_error_is_told_where_cleaning_up_fails_too(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", fails(errno.ENOSPC))
    monkeypatch.setattr(os, "unlink", fails(errno.EIO))
    monkeypatch.setattr(os, "rmdir", fails(errno.EIO))
    with pytest.raises(StorageError, match="disk is full"):
        files.write_bytes(tmp_path / "file", b"x")
    with pytest.raises(StorageError, match="disk is full"), files.folder_aside(tmp_path / "folder") as aside:
        (aside / "x").touch()


def test_what_could_not_be_read_is_not_said_to_be_written(tmp_path):
    with pytest.raises(StorageError, match="could not be read: the disk"), files.storage_errors(tmp_path, deed="read"):
        raise OSError(errno.EIO, "")


def test_a_full_disk_met_by_safetensors_is_a_full_disk(tmp_path):
    """safetensors writes by itself and keeps only the text of the system's error; this is that text."""
    error = Exception("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(StorageError, match="disk is full"), files.storage_errors(tmp_path):
        raise error
    with pytest.raises(ValueError, match="another"), files.storage_errors(tmp_path):
        raise ValueError("another error")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind root")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        for write in [*WRITERS.values(), files.make_folder]:
            with pytest.raises(StorageError, match="permission"):
                write(tmp_path / "file")
    finally:
        tmp_path.chmod(0o700)


def test_a_folder_appears_whole(tmp_path):
    path = tmp_path / "step-1"
    with files.folder_aside(path) as aside:
        (aside / "nested").mkdir()
        (aside / "nested" / "file").write_text("x")
        assert not path.exists()
    assert (path / "nested" / "file").read_text() == "x"
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    assert path.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [KeyError("x"), OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_folder_that_fails_leaves_nothing(tmp_path, error):
    with pytest.raises((KeyError, StorageError, KeyboardInterrupt)), files.folder_aside(tmp_path / "step-1") as aside:
        (aside / "file").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_never_replaces_what_is_there(tmp_path):
    path = tmp_path / "step-1"
    path.mkdir()
    (path / "old").touch()
    with pytest.raises(OSError, match="not empty"), files.folder_aside(path) as aside:
        (aside / "new").touch()
    assert [p.name for p in tmp_path.rglob("*")] == ["step-1", "old"]


def test_json_refuses_what_no_other_program_reads(tmp_path):
    files.write_json(tmp_path / "f", {"é": [1, 0.1, None]})
    assert json.loads((tmp_path / "f").read_text(encoding="utf-8")) == {"é": [1, 0.1, None]}
    files.write_json(tmp_path / "f", "undecodable \udcff")
    assert json.loads((tmp_path / "f").read_bytes()) == "undecodable \udcff"
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON compliant"):
            files.write_json(tmp_path / "f", value)


def test_equal_tensors_give_equal_bytes_in_any_order(tmp_path):
    a, b = torch.arange(6.0).reshape(2, 3), torch.ones(1, dtype=torch.float16)
    files.write_tensors(tmp_path / "1", {"a": a.T, "b": b}, {"k": "v"})
    files.write_tensors(tmp_path / "2", {"b": b, "a": a.T}, {"k": "v"})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert files.sha256_file(tmp_path / "1") == files.sha256_file(tmp_path / "2")
    read = load_file(tmp_path / "1")
    assert torch.equal(read["a"], a.T)
    assert torch.equal(read["b"], b)


def test_a_digest_is_the_known_one(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert files.sha256_file(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_name_cannot_steer_a_terminal():
    assert files.printable("a\x1b[31mb\nc\x00é日") == "a\\x1b[31mb\\nc\\x00é日"
    assert files.printable("bidi \u202e and \udcff") == "bidi \\u202e and \\udcff"


def test_sizes_have_a_unit_that_suits_them():
    assert [files.size(n) for n in (0, 999, 1000, 1_234_567, 5e9, 7e13)] == [
        *("0 bytes", "999 bytes", "1.0 kB", "1.2 MB", "5.0 GB", "70.0 TB")
    ]


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").touch()
    for wrong in (pathlib.Path("/proc/nothing"), tmp_path / "file" / "below"):
        with pytest.raises(StorageError, match="cannot be made a folder"):
            files.make_folder(wrong)
