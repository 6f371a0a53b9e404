"""`lorakit captions` from the command line."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from lorakit.cli.main import main
from tests.verbs.conftest import write_pictures

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = write_pictures(tmp_path / "photos", 3)
    for i, text in enumerate(["circle, red\ncircle, blue", "circle, blue", " ".join(["circle"] * 90)]):
        (folder / f"{i:02d}.txt").write_text(text)
    return folder


@pytest.fixture
def run(photos: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*words: str) -> tuple[int, str, str]:
        code = 0
        try:
            main(["captions", str(photos), *words])
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        assert said.err.count("error: ") == bool(code) and "Traceback" not in said.err
        return code, said.out, said.err

    return run


def test_a_table_of_all(run: Run) -> None:
    code, out, _ = run()
    assert code == 0 and "00.png  circle, red\n00.png  circle, blue\n" in out and "3 pictures, 3 with captions" in out
    assert "00.png    5  circle, red\n" in run("--table", "--base", "embedded")[1]


def test_counts_with_a_picture(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("--count", "--out", str(tmp_path / "tags.png"))
    assert code == 0 and [line.split()[:2] for line in out.splitlines()[:3]] == [
        ["3", "circle"],
        ["2", "blue"],
        ["1", "circle"],
    ]
    with Image.open(tmp_path / "tags.png") as picture:
        assert picture.width == 900
    assert "      4  circle" in run("--count", "words")[1]


def test_alike_and_too_long_and_known(run: Run) -> None:
    assert "2 times: circle, blue\n  00.png, 01.png" in run("--similar")[1]
    code, out, _ = run("--base", "embedded", "--trigger", "circle")
    assert code == 0 and "Warning: circle is a word that the model knows" in out and "in 4 of 4 captions" in out
    assert "02.png: 92 tokens, " in out and "1 of 4 captions are longer than" in out
    out = run("--base", "embedded", "--trigger", "zorp")[1]
    assert "zorp in tokenizer: z · or · p (3 tokens)" in out and "Warning" not in out


def test_a_change_is_shown_then_made_then_undone(run: Run, photos: Path) -> None:
    words = ("--replace", "circle, b", "zorp, b", "--remove-tag", "red", "--add-tag", "photo", "--first")
    code, out, _ = run(*words)
    assert code == 0 and "  - circle, red\n  + photo, circle\n" in out and "add --apply" in out
    assert (photos / "00.txt").read_text() == "circle, red\ncircle, blue"
    code, out, _ = run(*words, "--apply")
    assert code == 0 and "4 captions in 3 files changed" in out
    assert (photos / "00.txt").read_text() == "photo, circle\nphoto, zorp, blue"
    assert run(*words, "--apply")[1] == "No caption would change.\n"
    code, out, _ = run("--undo")
    assert (
        code == 0
        and "3 files are as they were" in out
        and (photos / "00.txt").read_text() == "circle, red\ncircle, blue"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--apply"], "--apply belongs to a change"),
        (["--out", "x.png"], "--out belongs to --count"),
        (["--trigger", "x"], "--trigger belongs to --base"),
        (["--count", "--add-tag", "x"], "three commands"),
        (["--undo"], "nothing was kept"),
        (["--undo", "nowhere.json"], "no undo file"),
        (["--base", "nowhere"], "nowhere does not exist"),
        (["--replace", "(", "x", "--regex"], "no regular expression"),
    ],
)
def test_bad_input_is_one_message(run: Run, words: list[str], said: str) -> None:
    code, _, err = run(*words)
    assert code == 2 and said in err


def test_captions_that_cannot_be_read(run: Run, photos: Path) -> None:
    (photos / "01.txt").write_bytes("x".encode("utf-16"))
    for words in ([], ["--add-tag", "x", "--apply"]):
        code, out, err = run(*words)
        assert code == 2 and err.count("UTF-16") == 1
        assert ("00.png  circle, blue" in out and "01.png" not in out) == (not words)
    assert (photos / "00.txt").read_text() == "circle, red\ncircle, blue"
    code, out, err = run("--count", "--similar", "--base", "embedded")
    assert code == 2 and "      2  circle" in out and "No two captions" in out and "1 of 3 captions" in out
    for name in ("00", "02"):
        (photos / f"{name}.txt").write_bytes("x".encode("utf-16"))
    code, out, err = run()
    assert code == 2 and out == "" and err.count("UTF-16") == 3
