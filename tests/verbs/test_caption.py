"""Captions by one process and two, killed and gone on with; with a writer that says what it was handed."""

import contextlib
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import captioning
from lorakit.captioning import validate_settings
from lorakit.captioning.pictures import Picture, looked_at
from lorakit.core.errors import InputError, StorageError
from lorakit.verbs.caption import Captioned, caption
from tests.verbs.conftest import in_processes, write_pictures

WRITERS = validate_settings({"template": "{name}"})


class Writer:
    """Looks at pictures, two at a time, and says who it is and which they are; `before` is called with each name."""

    batch_size = 2

    def __init__(self, before: Callable[[str], object] = lambda name: None) -> None:
        self._before = before

    def __call__(self, pictures: Sequence[Picture]) -> list[Any]:
        for picture in pictures:
            self._before(picture.name)
        outcomes = looked_at(pictures, lambda images: [(f"{os.getpid()}", "second") for _ in images], longest=64)
        return [
            said if isinstance(said, ValueError) else (f"{said[0]} {picture.name}", said[1])
            for picture, said in zip(pictures, outcomes, strict=True)
        ]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = write_pictures(tmp_path / "photos", 7)
    for file in folder.glob("*.txt"):
        file.unlink()
    return folder


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    return lambda writer: monkeypatch.setattr(captioning, "load_writers", lambda *_, **__: writer)


def written(folder: Path) -> dict[str, str]:
    return {file.stem: file.read_text() for file in sorted(folder.glob("*.txt"))}


def test_every_line_is_a_caption_and_bad_pictures_stop_nothing(photos: Path, use: Any) -> None:
    (photos / "00.png").write_bytes(b"no picture")
    (photos / "06.png").write_bytes((photos / "06.png").read_bytes()[:-40])
    (photos / "03.txt").write_text("mine")
    use(Writer())
    done = caption(photos, WRITERS)
    assert (done.written, done.there) == (4, 1) and [p.split(": ")[0][-6:] for p in done.problems] == [
        "00.png",
        "06.png",
    ]
    assert written(photos)["03"] == "mine" and written(photos)["01"] == f"{os.getpid()} 01.png\nsecond\n"
    assert sorted(written(photos)) == ["01", "02", "03", "04", "05"]


def test_a_killed_run_goes_on_where_it_stopped(photos: Path, use: Any) -> None:
    use(Writer(lambda name: os.kill(os.getpid(), signal.SIGKILL) if name == "04.png" else None))
    assert in_processes(1, lambda: caption(photos, WRITERS)) == [-signal.SIGKILL]
    first = written(photos)
    assert list(first) == ["00", "01", "02", "03"]
    seen: list[str] = []
    use(Writer(seen.append))
    assert caption(photos, WRITERS) == Captioned(3, 4, (), None)
    assert seen == ["04.png", "05.png", "06.png"] and written(photos).items() >= first.items()
    use(None)
    assert caption(photos, WRITERS) == Captioned(0, 7, (), None), "no writer is loaded where nothing is to be done"


def test_writing_over_goes_on_too(photos: Path, use: Any) -> None:
    for i in range(7):
        (photos / f"{i:02d}.txt").write_text("old")
    use(Writer(lambda name: (_ for _ in ()).throw(KeyboardInterrupt) if name == "04.png" else None))
    with contextlib.suppress(KeyboardInterrupt):
        caption(photos, WRITERS, overwrite=True)
    assert [text == "old" for text in written(photos).values()] == [False] * 4 + [True] * 3
    seen: list[str] = []
    use(Writer(seen.append))
    assert caption(photos, WRITERS, overwrite=True).written == 3 and seen == ["04.png", "05.png", "06.png"]
    assert caption(photos, WRITERS, overwrite=True).written == 7


def test_two_processes_share_the_work(photos: Path, use: Any, tmp_path: Path) -> None:
    (photos / "02.png").write_bytes(b"no picture")

    def run() -> None:
        done = caption(photos, WRITERS)
        (tmp_path / f"said-{os.environ['RANK']}").write_text(repr(done))

    use(Writer())
    assert in_processes(2, run) == [0, 0]
    said = {(tmp_path / f"said-{rank}").read_text() for rank in "01"}
    assert len(said) == 1 and "written=6" in said.pop(), "both know of all"
    by = [text.split()[0] for text in written(photos).values()]
    assert len(by) == 6 and sorted(map(by.count, set(by))) == [3, 3]


def test_what_one_process_meets_ends_both(photos: Path, use: Any) -> None:
    parent = os.getpid()

    def fail(name: str) -> None:
        if os.environ.get("RANK") == "1" and os.getpid() != parent:
            raise torch.OutOfMemoryError("no memory")

    def run() -> None:
        with pytest.raises(InputError, match="--batch-size"):
            caption(photos, WRITERS)

    use(Writer(fail))
    assert in_processes(2, run) == [0, 0]


def test_a_folder_that_cannot_be_written_is_told_before_a_model_is_loaded(
    photos: Path, use: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> None:
        raise StorageError(f"{folder} could not be written")

    use(None)
    monkeypatch.setattr("lorakit.verbs.caption.check_writable", refuse)
    with pytest.raises(StorageError, match="photos"):
        caption(photos, WRITERS)
