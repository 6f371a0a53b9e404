"""Changes in bulk: what they do to a line, which files they touch, and that they can be undone."""

from pathlib import Path

import pytest

from lorakit.captioning import undo
from lorakit.captioning.texts.edit import apply, changes, replaced, with_tag, without_tag
from lorakit.core.errors import InputError
from tests.data.pictures import folder_of


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two pictures with two captions and one, and one with its caption in JSON."""
    root = folder_of(tmp_path, {f"{name}.png": (20, 20) for name in ("a", "sub/b", "c")})
    (root / "a.txt").write_bytes("\ufeffred dog, grass\r\n\r\nred  dog, sky\n".encode())
    (root / "sub" / "b.txt").write_text("blue bird")
    (root / "c.txt").unlink()
    (root / "c.json").write_text('["green frog"]')
    return root


@pytest.mark.parametrize(
    ("wanted", "line", "left"),
    [
        ("dog", "dog, red dog,  sky", "red dog,  sky"),
        ("DOG", "a, Dog , b", "a, b"),
        ("*dog", "red dog, dog, sky", "sky"),
        ("b", "a, b ||| c", "a||| c"),
        ("c", "a ||| c", "a |||"),
        ("a", "a ||| c, d", "||| c, d"),
        ("d", "a (d:1.2), {d|e}", "a (d:1.2), {d|e}"),
        ("x", "nothing , to, take", "nothing , to, take"),
        ("x", "nothing to take,  ", "nothing to take,  "),
        ("a", "a", ""),
    ],
)
def test_a_tag_is_taken_out_and_the_rest_stays(wanted: str, line: str, left: str) -> None:
    assert without_tag(wanted)(line) == left


def test_a_tag_is_added_once() -> None:
    assert with_tag("x", first=False)("a, b") == "a, b, x" and with_tag("x", first=True)("a") == "x, a"
    assert with_tag("b", first=True)("a, b") == "a, b"
    assert with_tag("b, c,x, c", first=False)("a, c") == "a, c, b, x" and with_tag("x, y", first=True)("a") == "x, y, a"
    for text in ("", " ", "a,,b", "a,", "a ||| b"):
        with pytest.raises(InputError, match="--add-tag"):
            with_tag(text, first=True)


def test_a_blank_text_is_no_caption_to_change(root: Path) -> None:
    for name, blank in (("a.txt", "  \n"), ("sub/b.txt", "\ufeff \n\nblue bird")):
        (root / name).write_text(blank)
    assert changes(root, [without_tag("sky")]) == []
    (root / "c.json").unlink()
    (change,) = changes(root, [replaced(" ", "-", regex=False)])
    assert change.after == " \n\nblue-bird" and change.lines == (("blue bird", "blue-bird"),)


def test_what_would_change_is_shown_and_then_made_and_undone(root: Path) -> None:
    before = {file: file.read_bytes() for file in root.rglob("*.txt")}
    wanted = changes(root, [replaced("red", "brown", regex=False), without_tag("sky")])
    assert [change.file for change in wanted] == ["a.txt"]
    assert wanted[0].lines == (("red dog, grass", "brown dog, grass"), ("red  dog, sky", "brown dog"))
    assert {file: file.read_bytes() for file in before} == before
    kept = apply(root, wanted)
    assert (root / "a.txt").read_bytes() == b"brown dog, grass\r\n\r\nbrown dog\n"
    undo.restore(root, kept)
    assert {file: file.read_bytes() for file in before} == before


def test_a_regular_expression_and_a_line_that_goes(root: Path) -> None:
    (change,) = changes(
        root, [replaced(r"^(\w+) .*grass", r"\1 one", regex=True), replaced("red  dog, sky", "", regex=False)]
    )
    assert change.after == "red one\r\n\r\n" and change.lines[1] == ("red  dog, sky", "")


def test_what_cannot_be_changed_here_is_named_and_nothing_is(root: Path) -> None:
    with pytest.raises(InputError) as caught:
        changes(root, [with_tag("x", first=False)])
    assert "c.png" in str(caught.value) and len(caught.value.problems) == 1
    (root / "c.json").unlink()
    with pytest.raises(InputError, match="no caption would be left"):
        changes(root, [replaced("blue bird", "", regex=False)])
    for old, said in (("(", "no regular expression"), ("", "A is empty")):
        with pytest.raises(InputError, match=said):
            replaced(old, "", regex=True)
