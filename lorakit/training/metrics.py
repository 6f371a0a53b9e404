"""`metrics.jsonl`, exactly one line per optimizer step, and `validation.jsonl`, one per validation.

They are flushed in blocks and before each checkpoint.
"""

import json
from pathlib import Path
from typing import Any

from lorakit.core.files import storage_errors, write_bytes

BLOCK = 50  # lines; a flush costs a system call, and a kill loses no more than what a resume computes again


class MetricsFile:
    """Appends lines to `path`, after cutting what lies past `step` and mending a torn last line."""

    def __init__(self, path: Path, *, step: int) -> None:
        self.path = path
        if path.exists():
            kept = [line for line in whole_lines(path) if json.loads(line)["step"] <= step]
            write_bytes(path, b"".join(line + b"\n" for line in kept))
        self._pending: list[str] = []

    def write(self, record: dict[str, Any]) -> None:
        self._pending.append(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        if len(self._pending) >= BLOCK:
            self.flush()

    def flush(self) -> None:
        if not self._pending:
            return
        with storage_errors(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(self._pending))
        self._pending.clear()


def whole_lines(path: Path) -> list[bytes]:
    """The lines of `path` up to the first that is not whole JSON."""
    lines = []
    for line in path.read_bytes().split(b"\n"):
        try:
            json.loads(line)
        except ValueError:
            break
        lines.append(line)
    return lines
