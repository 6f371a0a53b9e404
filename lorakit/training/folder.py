"""The run's folder: taken by one run at a time, from its very start, and told how the run ended."""

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from lorakit.core.errors import InputError, StorageError
from lorakit.core.files import json_bytes, litter, make_folder, printable, storage_errors, write_json

log = logging.getLogger("lorakit")

SIGNS_OF_A_RUN = ("recipe.toml", "metrics.jsonl", "checkpoints", "adapter.safetensors")
_WRITTEN = ("", "checkpoints", "adapters", "samples", "samples/step-*")  # folders in which a kill may leave litter

_ROOM = 4096  # bytes of the file `lock`: for how a run ended, if a full disk has none
_PATIENCE = 10.0  # seconds that a killed run has for its loader workers to end


@dataclass
class RunFolder:
    """A folder that this process owns until `release`; `made` are the folders that were not there before."""

    path: Path
    made: tuple[Path, ...] = ()
    _lock: IO[str] | None = field(default=None, repr=False)

    @classmethod
    def fresh(cls, path: Path) -> "RunFolder":
        """Takes a folder for a new run. Raises InputError where it holds one, StorageError where it refuses."""
        cls.refuse_used(path)
        return cls._take(path)

    @classmethod
    def existing(cls, path: Path) -> "RunFolder":
        """Takes the folder of a run that is to go on. Raises InputError where it is none or is still running."""
        if not (path / "recipe.toml").is_file():
            raise InputError(f"{printable(path)} holds no run (no recipe.toml): give the folder that a run wrote.")
        return cls._take(path)

    @staticmethod
    def refuse_used(path: Path) -> None:
        """Raises InputError where `path` holds a run, be it a killed one, or is no folder."""
        if path.exists() and not path.is_dir():
            raise InputError(f"run.output = {printable(path)} is a file: give a folder.")
        around = next((folder for folder in path.resolve().parents if _is_run(folder)), None)
        if around:
            raise InputError(
                f"run.output = {printable(path)} lies within the run {printable(around)}: choose a folder outside."
            )
        if (path / "lock").is_file():
            _owned(path).close()  # where another process runs in it, that is the message
        found = [name for name in (*SIGNS_OF_A_RUN, "lock") if (path / name).exists()]
        if not found:
            return
        holds = "holds a run already" if found != ["lock"] else "holds a run that was killed before it began"
        raise InputError(
            f"run.output = {printable(path)} {holds} ({', '.join(found)}): choose another folder, "
            + (
                f"or go on with it by `lorakit train --resume {printable(path)}`."
                if "recipe.toml" in found
                else "or remove this one: it has no recipe to go on with."
            )
        )

    @classmethod
    def _take(cls, path: Path) -> "RunFolder":
        made = tuple(folder for folder in (path, *path.parents) if not folder.exists())
        make_folder(path)
        folder = cls(path, made, _owned(path))
        try:
            if (path / "recipe.toml").exists():  # in a folder that held no run, such names are not ours
                folder._clear()
            folder._sign()
        except BaseException:
            folder._leave()
            raise
        return folder

    def _clear(self) -> None:
        """Removes what a killed process was writing, and how the run ended before."""
        for pattern in _WRITTEN:
            for folder in self.path.glob(pattern) if pattern else [self.path]:
                for left in litter(folder):
                    with contextlib.suppress(OSError):  # it harms nobody
                        shutil.rmtree(left) if left.is_dir() else left.unlink()
        with storage_errors(self.path / "exit.json"):
            (self.path / "exit.json").unlink(missing_ok=True)

    def _sign(self) -> None:
        assert self._lock is not None
        with storage_errors(self.path / "lock"):
            self._lock.truncate(0)
            self._lock.write(f"{os.getpid()}\n".ljust(_ROOM))
            self._lock.flush()

    def release(self, *, code: int, reason: str) -> None:
        """Writes `exit.json` and gives the folder back; one in which nothing has begun is as it was found.

        Never fails: why the run ended matters more.
        """
        if self._lock is None:
            return
        try:
            if self._begun():
                self._clear()  # a signal's exception may have come between a file's making and its removal
                ending = {"code": code, "reason": reason}
                try:
                    write_json(self.path / "exit.json", ending)
                except StorageError:
                    self._end_in_the_lock(json_bytes(ending))
        except (StorageError, OSError) as error:
            log.warning("%s", error)
        finally:
            self._leave()

    def _end_in_the_lock(self, ending: bytes) -> None:
        """On a full disk: its file is there already, and has room."""
        with storage_errors(self.path / "exit.json"):
            if len(ending) > _ROOM:
                raise OSError(errno.ENOSPC, "no room")
            with open(self.path / "lock", "r+b") as file:
                file.write(ending)
                file.truncate()
            os.replace(self.path / "lock", self.path / "exit.json")

    def _begun(self) -> bool:
        return any((self.path / name).exists() for name in SIGNS_OF_A_RUN)

    def _leave(self) -> None:
        assert self._lock is not None
        with contextlib.suppress(OSError):
            (self.path / "lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._lock.close()
        self._lock = None
        with contextlib.suppress(OSError):  # from the innermost; the first that is not empty ends it
            for folder in () if self._begun() else self.made:
                folder.rmdir()


def _is_run(folder: Path) -> bool:
    return (folder / "recipe.toml").is_file() and (folder / "metrics.jsonl").is_file()


def _is_dead(owner: str) -> bool:
    """Whether there is no process of this number on this machine."""
    try:
        os.kill(int(owner), 0)
    except ProcessLookupError:
        return True
    except (ValueError, OSError, OverflowError):
        pass
    return False


def _owned(path: Path) -> IO[str]:
    """The file `lock` in `path`, locked; the system lets go of it when it is closed or the process dies.

    Raises InputError where a living process holds it. Where its owner is dead, its own processes hold it still, loader
    workers that end with it: they are waited for.
    """
    file = path / "lock"
    until = time.monotonic() + _PATIENCE
    while True:
        with storage_errors(file):
            lock = open(file, "a+", encoding="utf-8")  # noqa: SIM115 - held for the life of the run
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with lock:
                lock.seek(0)
                owner = printable(lock.read(20).strip()) or "that has just started"
            if _is_dead(owner) and time.monotonic() < until:
                time.sleep(0.05)
                continue
            raise InputError(f"{printable(path)} is in use by process {owner}: wait for it or stop it.") from None
        except OSError as error:
            log.warning(
                "%s: this file system has no locks (%s): see to it that no other run uses the folder",
                printable(path),
                error.strerror,
            )
            return lock
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), file.stat()):
                return lock
        lock.close()  # its owner has just ended, and removed it
