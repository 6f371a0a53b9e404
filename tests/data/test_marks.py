"""A run's list of examples says what is new, gone or changed, and nothing where nothing is."""

import dataclasses
from pathlib import Path

import pytest

from lorakit.core.types import Example, Place
from lorakit.data.marks import changes, mark, write_marks

ONE = Example(key="0/a.png", source=0, place=Place("a.png"), captions=("a",), size=(8, 8), digest="1" * 64)


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "2" * 64},
        {"captions": ("b",)},
        {"captions": ("a", "a")},
        {"mask_digest": "3" * 64},
        {"focus": (0.5, 0.5)},
        {"role": "validation"},
    ],
)
def test_all_that_is_trained_on_is_in_the_mark(change: dict) -> None:  # type: ignore[type-arg]
    assert mark(dataclasses.replace(ONE, **change)) != mark(ONE)
    assert mark(dataclasses.replace(ONE, size=(9, 9), place=Place("b.tar", 3))) == mark(ONE)


def test_changes_are_named(tmp_path: Path) -> None:
    file = tmp_path / "examples.jsonl"
    before = [dataclasses.replace(ONE, key=f"0/{i}.png") for i in range(40)]
    write_marks(file, before)  # type: ignore[arg-type]
    assert changes(file, before) == []  # type: ignore[arg-type]
    after = [dataclasses.replace(before[0], captions=("other",)), *before[2:], dataclasses.replace(ONE, key="0/\n.png")]
    found = changes(file, after)  # type: ignore[arg-type]
    assert [text.split(" ")[0] for text in found] == ["0/0.png", "0/\\n.png", "0/1.png"]
    assert ["changed" in found[0], "new" in found[1], "gone" in found[2]] == [True] * 3
    assert changes(file, [])[-1] == "… and 20 more."  # type: ignore[arg-type]
    assert changes(tmp_path / "none", before) == []  # type: ignore[arg-type]
