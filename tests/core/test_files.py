import errno
import json
import os
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
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO])
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


def test_what_is_renamed_was_synced_and_so_is_the_folder_after(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(handle):
        events.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))))
        fsync(handle)

    def watched_replace(source, target):
        events.append(("rename", os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    files.write_bytes(tmp_path / "file", b"x")
    assert [kind for kind, _ in events] == ["sync", "rename", "sync"]
    assert "file" in events[0][1]
    assert events[2] == ("sync", tmp_path.name)


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
