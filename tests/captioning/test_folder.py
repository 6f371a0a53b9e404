"""What is to be done in a folder: what lacks captions, what is written over, and what is kept of it."""

import json
from pathlib import Path

import pytest

from lorakit.captioning import undo
from lorakit.captioning.folder import Work, put, work
from lorakit.core.errors import InputError
from tests.data.pictures import folder_of


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Pictures with captions of every kind, and one without any."""
    root = folder_of(tmp_path, {f"{name}.png": (20, 20) for name in ("bare", "text", "sub/caption", "json", "row")})
    (root / "bare.txt").unlink()
    for name in ("sub/caption", "json", "row"):
        (root / f"{name}.txt").unlink()
    (root / "sub" / "caption.CAPTION").write_text("\ufeffa\r\nb")
    (root / "json.json").write_text('["x", "y"]')
    (root / "metadata.jsonl").write_text('{"file_name": "row.png", "text": "of a row"}\n')
    return root


def names(done: Work) -> list[str]:
    return [item.name for item in done.todo]


def begun(root: Path, *, overwrite: bool = False, made_by: str = "me") -> Work:
    return work(root, overwrite=overwrite, made_by=made_by)


def test_what_has_captions_of_any_kind_is_left_alone(root: Path) -> None:
    done = begun(root)
    assert names(done) == ["bare.png"] and done.there == 4 and not done.problems and done.kept is None
    put(root, done.todo[0], ["one", "two"])
    assert (root / "bare.txt").read_text() == "one\ntwo\n"
    assert names(begun(root)) == []


def test_an_empty_text_is_a_caption_that_somebody_wrote(root: Path) -> None:
    (root / "bare.txt").touch()
    assert names(begun(root)) == []


def test_a_box_in_json_is_no_caption(root: Path) -> None:
    (root / "bare.json").write_text('{"focus": [1, 2, 3, 4]}')
    (item,) = begun(root).todo
    put(root, item, ["one"])
    assert names(begun(root)) == [] and not begun(root).problems


def test_pictures_that_share_a_text_get_one_caption(root: Path) -> None:
    (root / "bare.jpg").write_bytes((root / "bare.png").read_bytes())
    assert names(begun(root)) == ["bare.jpg"]


def test_writing_over_keeps_what_was_there_and_goes_on_where_it_stopped(root: Path) -> None:
    old = {path: (root / path).read_bytes() for path in ("text.txt", "sub/caption.CAPTION")}
    done = begun(root, overwrite=True)
    assert names(done) == ["bare.png", "sub/caption.png", "text.png"]
    assert sum("metadata or JSON" in problem for problem in done.problems) == 2
    put(root, done.todo[1], ["new"])
    assert (root / "sub" / "caption.CAPTION").read_text() == "new\n" and not (root / "sub" / "caption.txt").exists()
    again = begun(root, overwrite=True)
    assert names(again) == ["bare.png", "text.png"] and again.kept == done.kept, "of the same making: it goes on"
    other = begun(root, overwrite=True, made_by="another")
    assert names(other) == ["bare.png", "sub/caption.png", "text.png"], "of other settings: all over again"
    other.kept.file.unlink()
    undo.finish(again.kept)
    assert names(begun(root, overwrite=True)) == names(done), "what came to its end is begun anew"
    undo.restore(root, done.kept)
    assert {path: (root / path).read_bytes() for path in old} == old


def test_undoing_can_be_undone(root: Path) -> None:
    kept = undo.keep(root, {"text.txt": "older", "bare.txt": None}, made_by="x", finished=True)
    (root / "bare.txt").write_text("new")
    now = (root / "text.txt").read_text()
    undo.restore(root, kept)
    assert (root / "text.txt").read_text() == "older" and not (root / "bare.txt").exists()
    undo.restore(root, undo.newest(root))
    assert (root / "text.txt").read_text() == now and (root / "bare.txt").read_text() == "new"


@pytest.mark.parametrize("before", [{"../x": "a"}, {"/etc/x": "a"}, []])
def test_an_undo_file_leads_nowhere_else(root: Path, before: object) -> None:
    file = root / ".captions-undo-1.json"
    file.write_text(json.dumps({"made_by": "x", "finished": True, "before": before}))
    with pytest.raises(InputError, match="no undo file"):
        undo.read(file)


def test_what_is_wrong_with_captions_is_named_and_stops_nothing(root: Path) -> None:
    (root / "text.txt").write_bytes("x".encode("utf-16"))
    done = begun(root, overwrite=True)
    assert "text.png" not in names(done) and any("UTF-16" in problem for problem in done.problems)


def test_no_pictures(tmp_path: Path) -> None:
    for folder, said in ((tmp_path, "holds no pictures"), (tmp_path / "x", "does not exist")):
        with pytest.raises(InputError, match=said):
            begun(folder)
