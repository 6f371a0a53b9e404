"""`metrics.jsonl`, exactly one line per optimizer step, and `validation.jsonl`, one per validation.

They are flushed in blocks, every few seconds, and before each checkpoint.
"""

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit.core.errors import StorageError
from lorakit.core.files import storage_errors, write_bytes

log = logging.getLogger("lorakit")

BLOCK = 50  # lines; a flush costs a sync, and a kill loses no more than what a resume computes again
_SECONDS = 10.0  # who looks on sees a slow run's steps no later than this


class MetricsFile:
    """Appends lines to `path`, after cutting what lies past `step` and mending a torn last line."""

    def __init__(self, path: Path, *, step: int) -> None:
        self.path = path
        self._pending: list[str] = []
        self._size = 0  # of what is whole in the file
        self._warned = False
        self._flushed = time.monotonic()
        if path.exists():
            with storage_errors(path, deed="read"):
                kept = b"".join(line + b"\n" for line in whole_lines(path) if json.loads(line)["step"] <= step)
            write_bytes(path, kept)
            self._size = len(kept)

    def write(self, record: dict[str, Any]) -> None:
        """Adds a line. Never fails for the disk: lines that it does not take wait for the next flush."""
        self._pending.append(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        if len(self._pending) % BLOCK and time.monotonic() < self._flushed + _SECONDS:
            return
        self._flushed = time.monotonic()
        try:
            self.flush()
        except StorageError as error:
            if not self._warned:
                log.warning("%s. The run goes on and tries again.", error)
            self._warned = True

    def flush(self) -> None:
        """Brings all lines to the disk. With StorageError the file is as before, and they wait for another call."""
        if not self._pending:
            return
        data = "".join(self._pending).encode()
        with storage_errors(self.path), open(self.path, "ab", buffering=0) as file:
            if file.tell() > self._size:
                file.truncate(self._size)  # half a block, which could not be taken back
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[file.write(rest) :]  # a disk that fills up takes a part
                os.fsync(file.fileno())  # a checkpoint that outlives a power cut has its lines
            except BaseException:
                with contextlib.suppress(OSError):
                    file.truncate(self._size)
                raise
        self._size += len(data)
        self._pending.clear()


def whole_lines(path: Path) -> list[bytes]:
    """The lines of `path` up to the first that is not a whole record."""
    lines = []
    for line in path.read_bytes().split(b"\n"):
        if _record(line) is None:
            break
        lines.append(line)
    return lines


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The records in `path`, wherever they stand; other lines are passed over. None where there is no file."""
    if path.exists():
        for line in path.read_bytes().split(b"\n"):
            if (record := _record(line)) is not None:
                yield record


def is_number(value: object) -> bool:
    """Whether a value of a record is one, and finite."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None
