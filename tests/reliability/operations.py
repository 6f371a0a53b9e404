"""Every file operation of an action, one after the other: to be killed before, or to fail.

Python tells of opens, renames, removals and the like through its audit hooks; writes and syncs, of which it does not,
are patched. Hooks stay for the life of a process, so all of this happens in a forked child.
"""

import builtins
import io
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.symlink"}
REMOVALS = {"os.remove", "os.rmdir"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

Act = Callable[[str, Callable[[], object]], None]


class Operations:
    """While `act` is set, it is called ahead of each operation: with its name, and with what does the half of it, where
    it is a write."""

    def __init__(self) -> None:
        self.act: Act | None = None
        sys.addaudithook(self._audit)
        unpatched = io.open

        def watched_fsync(_: int) -> None:
            self._before("fsync")  # and nothing: only a power cut would tell, and it is what takes the time

        def watched_open(file: Any, mode: str = "r", buffering: int = -1, *more: Any, **how: Any) -> Any:
            if self.act is None or not {*mode} & {*"wax+"}:
                return unpatched(file, mode, buffering, *more, **how)
            raw = _Written(file, mode.replace("b", "").replace("t", ""), operations=self)
            if "b" in mode and buffering == 0:
                return raw
            buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, *more, **how)

        os.fsync = watched_fsync
        io.open = builtins.open = watched_open

    def _audit(self, event: str, about: tuple[Any, ...]) -> None:
        if event in EVENTS:
            self._before("open to write" if event == "open" and about[2] & _WRITING else event)

    def _before(self, name: str) -> None:
        self.ahead(name, lambda: None)

    def ahead(self, name: str, half: Callable[[], object]) -> None:
        act, self.act = self.act, None  # what `act` does is none of the operations
        if act:
            try:
                act(name, half)
            finally:
                self.act = act


class _Written(io.FileIO):
    def __init__(self, file: Any, mode: str, *, operations: Operations) -> None:
        super().__init__(file, mode)
        self._operations = operations

    def write(self, data: Any) -> int:
        whole = bytes(data)
        self._operations.ahead("write", lambda: super(_Written, self).write(whole[: len(whole) // 2]))
        return super().write(whole)

    def truncate(self, size: int | None = None) -> int:
        self._operations.ahead("truncate", lambda: None)
        return super().truncate(size)


def in_child(action: Callable[[], None]) -> int:
    """The wait status of a forked child that did `action`: 0 if it returned."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]
