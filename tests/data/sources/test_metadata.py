import csv
import io
import json
import tracemalloc
from pathlib import Path

import pytest

from lorakit.data.sources import metadata
from tests.data.pictures import folder_of
from tests.data.scanning import good, problems_of, scanned


def photos(root: Path, *names: str) -> Path:
    return folder_of(root, dict.fromkeys(names, (8, 8)), caption=None)


def jsonl(path: Path, *rows: object) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def test_a_file_for_each_kind_and_folder(tmp_path: Path) -> None:
    root = photos(tmp_path, "a.png", "sub/b.png", "sub/c.png", "sub/deep/d.png")
    (root / "metadata.jsonl").write_bytes(
        b'\xef\xbb\xbf{"file_name": "a.png", "text": "an a", "focus": [0, 0, 4, 8]}\r\n\n'
        b'{"file_name": "./sub//b.png", "caption": ["one", "two"]}'
    )
    with open(root / "sub" / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [["file_name", "prompt", "face"], ["c.png", "c,\nin two lines", "4,0,8,8"], ["deep/d.png", "d", ""]]
        )
    examples = good(root).examples
    assert [(e.key, e.captions, e.focus) for e in examples] == [
        ("0/a.png", ("an a",), (0.25, 0.5)),
        ("0/sub/b.png", ("one", "two"), None),
        ("0/sub/c.png", ("c,\nin two lines",), (0.75, 0.5)),
        ("0/sub/deep/d.png", ("d",), None),
    ]


def test_the_caption_column_may_be_named(tmp_path: Path) -> None:
    root = photos(tmp_path, "a.png")
    jsonl(root / "metadata.jsonl", {"file_name": "a.png", "text": "short", "long": "a long one"})
    found = good(root, caption_column="long")
    assert found.examples[0].captions == ("a long one",) and found.warnings == ()


def test_a_caption_column_without_metadata_is_told(tmp_path: Path) -> None:
    root = folder_of(tmp_path, {"a.png": (8, 8)})
    assert good(root, caption_column="long").warnings == (
        "data.sources.0.caption_column has no effect: the folder holds neither metadata.jsonl nor metadata.csv",
    )
    (root / "below").mkdir()
    (root / "below" / "metadata.jsonl").touch()
    assert good(root, caption_column="long").warnings == ()


def test_captions_from_two_places(tmp_path: Path) -> None:
    root = photos(tmp_path, "sub/a.png", "sub/b.png")
    (root / "sub" / "a.txt").write_text("beside it")
    jsonl(root / "metadata.jsonl", {"file_name": "sub/a.png", "text": "x"}, {"file_name": "sub/b.png", "text": "x"})
    jsonl(root / "sub" / "metadata.jsonl", {"file_name": "b.png", "text": "y"})
    one, two = problems_of(root)
    assert "a.png: it has two captions, a.txt and metadata.jsonl line 1: keep one" in one
    assert "b.png: it has two captions, metadata.jsonl line 2 and metadata.jsonl line 1: keep one" in two
    jsonl(root / "metadata.jsonl", {"file_name": "sub/a.png", "focus": [0, 0, 1, 1]})
    assert [e.captions for e in good(root).examples] == [("beside it",), ("y",)]


def test_what_is_wrong_is_named_with_its_line(tmp_path: Path) -> None:
    root = photos(tmp_path / "in", "a.png")
    photos(tmp_path, "out.png")
    lines = [
        b'{"file_name": "a.png", "text": "good"}',
        b'{"file_name": "a.png", "text": "again"}',
        b'{"file_name": "../out.png", "text": "x"}',
        b'{"file_name": "/etc/passwd", "text": "x"}',
        b'{"file_name": "gone\\u001b[2J.png", "text": "x"}',
        b'{"text": "of nothing"}',
        b"{bad",
        b"[1]",
        b'{"file_name": "l\xe9.png"}',
        b'{"file_name": "b.png", "text": "' + b"x" * 10_000_000 + b'"}',
        b'{"file_name": "b.png", "text": 3}',
        b"[" * 100_000,
    ]
    (root / "metadata.jsonl").write_bytes(b"\n".join(lines))
    tracemalloc.start()
    try:
        problems = problems_of(root)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8_000_000
    said = [
        "line 2: 'a.png' has a row already, line 1",
        "line 3: file_name '../out.png' leads out of the folder",
        "line 4: file_name '/etc/passwd' leads out of the folder",
        "line 6: it has no file_name",
        "line 7: it is no JSON (column 2",
        "line 8: it is no JSON object",
        "line 9: it is not UTF-8 (byte 16)",
        "line 10: it is longer than 1 MB",
        "line 11: its text: it is neither",
        "line 12: it is no JSON that can be read",
        r"line 5: file_name 'gone\x1b[2J.png' leads to no picture",
    ]
    assert [text in problem for text, problem in zip(said, problems)] == [True] * len(problems) == [True] * len(said)
    assert all(problem.isprintable() and str(root / "metadata.jsonl") in problem for problem in problems)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file_name,text\na.png,a dog, running\n", "line 2: it has 3 fields where the first line has 2"),
        ("name,text\na.png,a dog\n", "line 1: there is no column file_name (columns: name, text)"),
        ("", "line 1: there is no column file_name (columns: none)"),
        ('file_name,text\na.png,"never closed\n' + "x\n" * 100_000, "it is no CSV (field larger than field limit"),
        ('file_name,text\na.png,"x"y\n', "line 2: it is no CSV"),
    ],
)
def test_csv_that_is_none(tmp_path: Path, text: str, said: str) -> None:
    root = photos(tmp_path, "a.png")
    (root / "metadata.csv").write_text(text)
    problems = problems_of(root)
    assert said in problems[0] and "it has no caption" in problems[1]


def test_many_mistakes_are_cut_short(tmp_path: Path) -> None:
    root = photos(tmp_path, "a.png")
    (root / "metadata.jsonl").write_text("{bad\n" * 1000)
    jsonl(root / "metadata.csv")
    problems = scanned(root, default_caption="x").problems
    assert len(problems) == 22 and "980 more of its lines are wrong" in problems[21 - 0] + problems[20]


def test_rows_of_hidden_files_and_of_no_pictures_lead_nowhere(tmp_path: Path) -> None:
    root = photos(tmp_path, ".a.png", "b.png")
    (root / "notes.md").write_text("x")
    rows = [{"file_name": name, "text": "x"} for name in (".a.png", "b.png", "notes.md")]
    jsonl(root / "metadata.jsonl", *rows)
    problems = problems_of(root)
    assert ["line 1" in problems[0], "line 3" in problems[1], len(problems)] == [True, True, 2]


@pytest.mark.parametrize("name", metadata.NAMES)
def test_all_columns_of_what_can_be_read(name: str) -> None:
    csv = "file_name,title,text\na.png,One,x\n../b.png,Two,y\n"
    rows = [{"file_name": "a.png", "title": "One", "text": "x"}, {"file_name": "../b.png"}, {"title": "none"}]
    text = csv if name.endswith("csv") else "".join(json.dumps(row) + "\n" for row in rows) + "no json\n"
    assert metadata.columns(io.BytesIO(text.encode()), name) == {"a.png": rows[0]}
