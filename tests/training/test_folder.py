"""A run's folder belongs to one run at a time."""

import json
from pathlib import Path

import pytest

from lorakit.core.errors import InputError, StorageError
from lorakit.training.folder import SIGNS_OF_A_RUN, RunFolder


def test_taken_and_released(tmp_path: Path) -> None:
    folder = RunFolder.fresh(tmp_path / "run")
    assert (tmp_path / "run" / "lock").exists()
    folder.release(code=0, reason="done")
    assert json.loads((tmp_path / "run" / "exit.json").read_text()) == {"code": 0, "reason": "done"}
    assert not (tmp_path / "run" / "lock").exists()


@pytest.mark.parametrize("name", SIGNS_OF_A_RUN)
def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(InputError, match="remove this one"):
        RunFolder.fresh(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="--resume"):
        RunFolder.fresh(tmp_path)


def test_two_at_once_are_refused_and_a_dead_owner_is_not(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").touch()
    (tmp_path / "lock").write_text("1\n")  # of a process that was killed: nobody holds it
    (tmp_path / "checkpoints" / ".step-000002.x.tmp").mkdir(parents=True)
    RunFolder.refuse_busy(tmp_path)
    first = RunFolder.existing(tmp_path)
    assert not list(tmp_path.rglob("*.tmp")), "what the killed process was writing is gone"
    for take in (RunFolder.existing, RunFolder.refuse_busy):
        with pytest.raises(InputError, match="in use"):
            take(tmp_path)
    first.release(code=0, reason="done")
    RunFolder.existing(tmp_path).release(code=0, reason="done")


def test_no_run_to_go_on_with(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"recipe\.toml"):
        RunFolder.existing(tmp_path)


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(InputError, match="is a file"):
        RunFolder.fresh(tmp_path / "run")


def test_no_permission_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StorageError, match="permission"):
        RunFolder.fresh(tmp_path / "run")
