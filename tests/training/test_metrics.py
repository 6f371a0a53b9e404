"""metrics.jsonl: one line per step, whole lines only."""

import errno
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit.core.errors import StorageError
from lorakit.training.metrics import BLOCK, MetricsFile, records


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_are_flushed_in_blocks_and_on_demand(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, step=0)
    for step in range(1, BLOCK + 3):
        file.write({"step": step, "loss": 0.1})
    assert steps(path) == list(range(1, BLOCK + 1))
    file.flush()
    assert steps(path) == list(range(1, BLOCK + 3))


def test_floats_come_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, step=0)
    file.write({"step": 1, "loss": 1 / 3})
    file.flush()
    assert json.loads(path.read_text())["loss"] == 1 / 3


def test_going_on_cuts_what_lies_past_the_step_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = "".join(json.dumps({"step": s}) + "\n" for s in (1, 2, 3, 4))
    path.write_text(whole + '{"step": 5, "lo')
    file = MetricsFile(path, step=3)
    assert steps(path) == [1, 2, 3]
    file.write({"step": 4})
    file.flush()
    assert steps(path) == [1, 2, 3, 4]


def test_what_is_no_record_ends_what_a_resume_keeps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for odd in (b"7", b"\0\0", b"\xff", b'{"loss": 1.0}', b'{"step": "2"}', b""):
        path.write_bytes(b'{"step": 1}\n' + odd + b'\n{"step": 2}\n')
        MetricsFile(path, step=9)
        assert path.read_bytes() == b'{"step": 1}\n'


def test_records_are_those_that_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert list(records(path)) == []
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo\n\n\xff\n{"step": 3}\n{"st')
    assert list(records(path)) == [{"step": 1}, {"step": 3}]


def fails(number: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("stuck", [False, True], ids=["taken back", "not even taken back"])
def test_lines_that_the_disk_refuses_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, stuck: bool
) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, step=0)
    file.write({"step": 1})
    file.flush()
    before = path.read_bytes()
    file.write({"step": 2})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails(number))  # what was written may be there or not
        if stuck:
            patch.setattr("lorakit.training.metrics.contextlib.suppress", _Never)
        with pytest.raises((StorageError, AssertionError)):
            file.flush()
    assert stuck or path.read_bytes() == before
    file.write({"step": 3})
    file.flush()
    assert steps(path) == [1, 2, 3]


class _Never:
    """A cleaning up that fails."""

    def __init__(self, *_: object) -> None:
        raise AssertionError


def test_a_full_disk_is_told_once_and_loses_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, step=0)
    tries = []
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "lorakit"):
        patch.setattr(os, "fsync", lambda handle: tries.append(handle) or fails(errno.ENOSPC)())  # type: ignore[func-returns-value]
        for step in range(1, 3 * BLOCK):
            file.write({"step": step})
    assert len(tries) == 2, "tried again with each block, not with each line"
    assert [r.getMessage() for r in caplog.records if "disk is full" in r.getMessage()] == [
        caplog.records[0].getMessage()
    ]
    assert path.read_bytes() == b""
    file.write({"step": 3 * BLOCK})
    assert steps(path) == list(range(1, 3 * BLOCK + 1))


def test_a_file_that_was_taken_away_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, step=0)
    for step in (1, 2):
        file.write({"step": step})
        file.flush()
        path.unlink()
    file.write({"step": 3})
    file.flush()
    assert path.read_bytes() == b'{"step": 3}\n', "no zeros where the lines were"
