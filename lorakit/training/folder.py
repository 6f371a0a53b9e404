"""The run's folder: taken by one run at a time, and told how the run ended."""

import fcntl
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from lorakit.core.errors import InputError
from lorakit.core.files import make_folder, printable, storage_errors, write_json

SIGNS_OF_A_RUN = ("metrics.jsonl", "adapter.safetensors", "lock")


def _own(lock: IO[str], path: Path) -> None:
    """Locks the open file; the system lets go of it when the file is closed or the process dies."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise InputError(f"{printable(path)} is in use by another process: wait for it or stop it.") from None


@dataclass
class RunFolder:
    """A folder that this process owns until `release`."""

    path: Path
    _lock: IO[str] | None = field(default=None, repr=False)

    @staticmethod
    def refuse_used(path: Path) -> None:
        """Raises InputError where `path` holds a run or is no folder."""
        if path.exists() and not path.is_dir():
            raise InputError(f"run.output = {printable(path)} is a file: give a folder.")
        found = [name for name in SIGNS_OF_A_RUN if (path / name).exists()]
        if found:
            raise InputError(
                f"run.output = {printable(path)} holds a run already ({', '.join(found)}): choose another folder, "
                + (
                    f"or go on with it by `lorakit train --resume {printable(path)}`."
                    if (path / "checkpoints").is_dir()
                    else "or remove this one: it has no checkpoint yet."
                )
            )

    @classmethod
    def fresh(cls, path: Path) -> "RunFolder":
        """Takes a folder for a new run. Raises InputError where it holds one, StorageError where it refuses."""
        cls.refuse_used(path)
        return cls._take(path)

    @staticmethod
    def refuse_busy(path: Path) -> None:
        """Raises InputError where another process runs in `path`."""
        if (path / "lock").is_file():
            with open(path / "lock", encoding="utf-8") as lock:
                _own(lock, path)

    @classmethod
    def existing(cls, path: Path) -> "RunFolder":
        """Takes the folder of a run that is to go on. Raises InputError where it is none or is still running."""
        if not (path / "recipe.toml").is_file():
            raise InputError(f"{printable(path)} holds no run (no recipe.toml): give the folder that a run wrote.")
        return cls._take(path)

    @classmethod
    def _take(cls, path: Path) -> "RunFolder":
        make_folder(path)
        with storage_errors(path):
            lock = open(path / "lock", "a+", encoding="utf-8")  # noqa: SIM115 - held for the life of the run
        _own(lock, path)
        for litter in path.rglob(".*.tmp"):  # what a killed process was writing
            shutil.rmtree(litter) if litter.is_dir() else litter.unlink()
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        return cls(path, lock)

    def release(self, *, code: int, reason: str) -> None:
        """Writes `exit.json` and gives the folder back."""
        if self._lock is None:
            return
        try:
            write_json(self.path / "exit.json", {"code": code, "reason": reason})
            (self.path / "lock").unlink(missing_ok=True)
        finally:
            self._lock.close()
            self._lock = None
