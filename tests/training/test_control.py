"""RUN/control: words are obeyed once, anything else is a warning and never an error."""

import os
from pathlib import Path

import pytest

from lorakit.training.control import Control


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("save\n", {"save"}),
        ("stop", {"stop"}),
        ("Save sample\nstop\n", {"save", "sample", "stop"}),
        ("\ufeffsave\r\n", {"save"}),
    ],
)
def test_words_are_read_once_and_the_file_goes(
    text: str, words: set[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    control = Control(tmp_path)
    assert control.read() == set()
    (tmp_path / "control").write_text(text, encoding="utf-8")
    assert control.read() == words
    assert control.read() == set() and not (tmp_path / "control").exists()
    assert not caplog.records


def test_an_unknown_word_is_a_warning_beside_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    control = Control(tmp_path)
    (tmp_path / "control").write_bytes(b"save pause\x1b[2J \xff")
    assert control.read() == {"save"}
    (said,) = [record.getMessage() for record in caplog.records]
    assert "pause" in said and "save, sample, stop" in said and "\x1b" not in said


def test_a_file_that_is_still_empty_waits_for_its_words(tmp_path: Path) -> None:
    control = Control(tmp_path)
    (tmp_path / "control").touch()  # as a shell does before it writes
    assert control.read() == set() and (tmp_path / "control").exists()
    (tmp_path / "control").write_text("save")
    assert control.read() == {"save"}


def test_what_is_no_plain_file_is_one_warning_and_nothing_waits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("stop")
    for name in ("pipe", "link", "folder"):
        folder = tmp_path / f"run-{name}"
        folder.mkdir()
        control = Control(folder)
        {"pipe": os.mkfifo, "link": lambda at: at.symlink_to(elsewhere), "folder": Path.mkdir}[name](folder / "control")
        caplog.clear()
        assert [control.read() for _ in range(3)] == [set(), set(), set()]
        assert len(caplog.records) == 1
    assert elsewhere.exists()


def test_a_file_that_cannot_be_removed_is_not_obeyed_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    control = Control(tmp_path)
    (tmp_path / "control").write_text("save")
    monkeypatch.setattr(Path, "unlink", lambda self: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    assert [control.read() for _ in range(3)] == [set(), set(), set()]
    assert len(caplog.records) == 1


def test_a_word_left_by_an_earlier_run_is_not_for_this_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "control").write_text("stop")
    control = Control(tmp_path)
    assert control.read() == set() and not (tmp_path / "control").exists()
    assert "left from before" in caplog.text
