"""A run's folder belongs to one run at a time."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lorakit.core.errors import InputError, StorageError
from lorakit.training.folder import SIGNS_OF_A_RUN, RunFolder


def test_taken_and_released(tmp_path: Path) -> None:
    folder = RunFolder.fresh(tmp_path / "run")
    assert (tmp_path / "run" / "lock").read_text().split() == [f"{os.getpid()}"]
    (tmp_path / "run" / "recipe.toml").touch()
    folder.release(code=0, reason="done")
    assert json.loads((tmp_path / "run" / "exit.json").read_text()) == {"code": 0, "reason": "done"}
    assert not (tmp_path / "run" / "lock").exists()


@pytest.mark.parametrize("name", SIGNS_OF_A_RUN)
def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    (tmp_path / "exit.json").write_text("{}")
    with pytest.raises(InputError, match="--resume" if name == "recipe.toml" else "remove this one"):
        RunFolder.fresh(tmp_path)
    (tmp_path / "recipe.toml").touch()
    with pytest.raises(InputError, match="--resume"):
        RunFolder.fresh(tmp_path)
    assert not (tmp_path / "lock").exists() and (tmp_path / "exit.json").exists(), "left as it was found"


def test_two_at_once_are_refused_and_a_dead_owner_is_not(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").touch()
    (tmp_path / "lock").write_text("1\n")  # of a process that was killed: nobody holds it
    first = RunFolder.existing(tmp_path)
    for take in (RunFolder.existing, RunFolder.fresh, RunFolder.refuse_used):
        with pytest.raises(InputError, match=f"in use by process {os.getpid()}:"):
            take(tmp_path)
    first.release(code=0, reason="done")
    RunFolder.existing(tmp_path).release(code=0, reason="done")


def test_a_run_killed_before_it_began_is_told_apart_from_one_that_runs(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("1\n")
    with pytest.raises(InputError, match="killed before it began.*remove this one"):
        RunFolder.fresh(tmp_path)
    (tmp_path / "lock").unlink()
    folder = RunFolder.fresh(tmp_path)
    with pytest.raises(InputError, match=f"in use by process {os.getpid()}:"):
        RunFolder.fresh(tmp_path)
    folder.release(code=0, reason="")


LITTER = [
    ".metrics.jsonl.7.tmp",
    "checkpoints/.step-000002.x1y.tmp/adapter.safetensors",
    "adapters/.step-000002.safetensors.7.tmp",
    "samples/step-000002/.00.png.7.tmp",
]


def test_what_a_killed_process_was_writing_goes_and_nothing_else(tmp_path: Path) -> None:
    kept = ["wandb/.mine.7.tmp", "checkpoints/step-000001/.x.tmp.gz", ".mine.tmp", "samples/step-000002/00.png"]
    for name in [*LITTER, *kept, "recipe.toml", "exit.json"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    RunFolder.existing(tmp_path)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(
        [*kept, "recipe.toml", "lock"]
    )


def test_names_like_litter_in_a_folder_that_held_no_run_are_the_users(tmp_path: Path) -> None:
    (tmp_path / ".notes.1.tmp").touch()
    RunFolder.fresh(tmp_path)
    assert (tmp_path / ".notes.1.tmp").exists()


def test_a_run_that_did_not_begin_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "one"
    RunFolder.fresh(path).release(code=2, reason="no pictures")
    assert list(tmp_path.iterdir()) == []
    path.mkdir(parents=True)
    RunFolder.fresh(path).release(code=2, reason="no pictures")
    assert list(path.iterdir()) == [], "a folder that was there stays"
    folder = RunFolder.fresh(path / "x")
    (path / "x" / "recipe.toml").touch()
    folder.release(code=2, reason="no pictures")
    assert sorted(p.name for p in (path / "x").iterdir()) == ["exit.json", "recipe.toml"]


def test_how_a_run_ended_is_told_on_a_full_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.fresh(tmp_path / "run")
    (tmp_path / "run" / "recipe.toml").touch()

    def full(path: Path, value: Any) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr("lorakit.training.folder.write_json", full)
    folder.release(code=4, reason="the disk is full")
    assert json.loads((tmp_path / "run" / "exit.json").read_text()) == {"code": 4, "reason": "the disk is full"}
    assert not (tmp_path / "run" / "lock").exists()


def test_a_lock_that_its_owner_removes_meanwhile_is_not_held_by_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened before the owner removed it, locked after: such a file locks nobody out."""
    (tmp_path / "recipe.toml").touch()
    flock, gone = fcntl.flock, []

    def late(file: Any, how: int) -> None:
        if not gone:
            (tmp_path / "lock").unlink()
            gone.append(True)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    folder = RunFolder.existing(tmp_path)
    with pytest.raises(InputError, match="in use"):
        RunFolder.existing(tmp_path)
    folder.release(code=0, reason="")


def test_no_locks_on_that_file_system_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unknown(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unknown)
    RunFolder.fresh(tmp_path / "run").release(code=0, reason="")
    assert "no locks (No locks available)" in caplog.text


def test_a_full_disk_at_the_end_hides_nothing_and_gives_the_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "recipe.toml").touch()
    folder = RunFolder.existing(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        patch.setattr(os, "replace", full)
        folder.release(code=4, reason="full")
    assert "disk is full" in caplog.text and [p.name for p in tmp_path.iterdir()] == ["recipe.toml"]
    RunFolder.existing(tmp_path)


def test_no_run_to_go_on_with(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"recipe\.toml"):
        RunFolder.existing(tmp_path)


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(InputError, match="is a file"):
        RunFolder.fresh(tmp_path / "run")


def test_a_folder_within_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").touch()
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(InputError, match="within the run"):
        RunFolder.refuse_used(tmp_path / "a" / "b")


def test_no_permission_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StorageError, match="permission"):
        RunFolder.fresh(tmp_path / "run")


def test_the_workers_of_a_killed_run_are_waited_for(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").touch()
    # a process that has taken the folder forks one that outlives it by a moment, with the lock still open
    script = """
import os, sys, time
from pathlib import Path
from lorakit.training.folder import RunFolder
folder = RunFolder.existing(Path(sys.argv[1]))
if os.fork():
    os._exit(0)
print("locked", flush=True)
os.close(1)
time.sleep(0.7)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "locked\n"
    started = time.monotonic()
    RunFolder.existing(tmp_path).release(code=0, reason="done")
    assert 0.2 < time.monotonic() - started < 5
