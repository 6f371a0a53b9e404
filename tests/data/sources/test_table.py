import hashlib
import io
import os
import pickle
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from lorakit.data.shards import Cache
from lorakit.data.sources import SourceSettings, imports, open_source
from lorakit.data.sources.table import TableStorage
from tests.data.pictures import noise
from tests.data.scanning import good, problems_of, scanned


def png(seed: int) -> bytes:
    data = io.BytesIO()
    noise(12, 10, seed).save(data, "PNG")
    return data.getvalue()


def table(rows: int = 3, first: int = 0, **columns: list[Any]) -> Any:
    import datasets

    pictures = [{"bytes": png(first + i), "path": None} for i in range(rows)]
    features = datasets.Dataset.from_dict({"image": pictures, **columns})
    return features.cast_column("image", datasets.Image())


def tree(root: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob("*")) if p.is_file()}


def test_a_saved_dataset(tmp_path: Path) -> None:
    table(text=["one", " two ", "three"]).save_to_disk(tmp_path / "d")
    before = tree(tmp_path / "d")
    examples = good(tmp_path / "d", cache=tmp_path / "c").examples
    assert [(e.key, e.captions, e.size) for e in examples] == [
        ("0/row-00000000", ("one",), (12, 10)),
        ("0/row-00000001", ("two",), (12, 10)),
        ("0/row-00000002", ("three",), (12, 10)),
    ]
    storage = open_source(SourceSettings(path=str(tmp_path / "d")), 0, cache=tmp_path / "c")
    assert storage.read(examples[1].place) == png(1)
    copy = pickle.loads(pickle.dumps(storage))
    assert copy.read(examples[2].place) == png(2)
    assert len(pickle.dumps(storage)) < 4000
    assert tree(tmp_path / "d") == before


def test_splits_of_a_saved_dataset(tmp_path: Path) -> None:
    import datasets

    both = datasets.DatasetDict(train=table(2, text=["a", "b"]), test=table(1, 9, text=["c"]))
    both.save_to_disk(tmp_path / "d")
    assert len(good(tmp_path / "d").examples) == 2
    assert [e.captions for e in good(tmp_path / "d", split="test").examples] == [("c",)]
    assert "there is no split 'dev', only 'train', 'test': set split" in problems_of(tmp_path / "d", split="dev")[0]
    table(1, text=["a"]).save_to_disk(tmp_path / "one")
    assert "one dataset without that split" in problems_of(tmp_path / "one", split="test")[0]


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_files(tmp_path: Path, streaming: bool) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    table(2, captions=[["one", "eins"], ["two"]], focus=[[0, 0, 6, 10], None]).to_parquet(folder / "train-0.parquet")
    table(1, 2, captions=[["three"]], focus=[None]).to_parquet(folder / "train-1.parquet")
    table(1, 3, captions=[["four"]], focus=[None]).to_parquet(folder / "test-0.parquet")
    before = tree(folder)
    settings: dict[str, Any] = {"caption_column": "captions", "streaming": streaming, "cache": tmp_path / "c"}
    for path in (folder, folder / "train-*.parquet"):
        examples = good(path, **settings).examples
        assert [(e.key, e.captions) for e in examples] == [
            ("0/row-00000000", ("one", "eins")),
            ("0/row-00000001", ("two",)),
            ("0/row-00000002", ("three",)),
        ]
        assert [e.focus for e in examples] == [(0.25, 0.5), None, None]
        storage = open_source(
            SourceSettings(path=str(path), caption_column="captions", streaming=streaming), 0, cache=tmp_path / "c"
        )
        assert [storage.read(e.place) for e in examples] == [png(0), png(1), png(2)]
        assert pickle.loads(pickle.dumps(storage)).read(examples[0].place) == png(0)
    assert [e.captions for e in good(folder, split="test", **settings).examples] == [("four",)]
    assert [e.captions for e in good(folder / "test-0.parquet", split="test", **settings).examples] == [("four",)]
    # what datasets makes of the files lies in the cache
    assert any(tmp_path.glob("c/datasets/**/*.arrow")) != streaming
    assert "no split 'dev' among" in problems_of(folder, split="dev", **settings)[0]
    assert tree(folder) == before
    # another file, and the rows are read anew
    table(1, 4, captions=[["five"]], focus=[None]).to_parquet(folder / "test-0.parquet")
    (example,) = good(folder, split="test", **settings).examples
    assert example.captions == ("five",) and example.digest == hashlib.sha256(png(4)).hexdigest()


def test_a_column_of_plain_bytes(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"jpg": [png(0), png(1)], "prompt": ["a", "b"]}).to_parquet(tmp_path / "x.parquet")
    examples = good(tmp_path / "x.parquet", image_column="jpg").examples
    assert [e.captions for e in examples] == [("a",), ("b",)]


def test_columns_that_are_missing_or_unclear(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    table(1, text=["a"], caption=["b"], number=[3]).to_parquet(path)
    for settings, said in [
        ({"image_column": "jpg"}, "there is no column 'jpg': set image_column (its columns are image, text, caption"),
        ({"image_column": "text"}, "column 'text' holds no pictures"),
        ({}, "columns text and caption may both be captions: set caption_column"),
        ({"caption_column": "prompt"}, "there is no column 'prompt': set caption_column"),
        ({"caption_column": "number"}, "column 'number' holds no text"),
    ]:
        (problem,) = problems_of(path, **settings)
        assert said in problem
    table(1, label=[1]).to_parquet(path)
    assert "no column is named text, caption or prompt: set caption_column" in problems_of(path)[0]
    assert good(path, default_caption="x").examples[0].captions == ("x",)
    assert good(path, allow_missing_captions=True).examples[0].captions == ("",)


def test_bad_rows_are_named(tmp_path: Path) -> None:
    import datasets

    rows = [{"bytes": png(0), "path": "x.png"}, {"bytes": b"junk", "path": None}, None, {"bytes": png(3), "path": None}]
    data = datasets.Dataset.from_dict({"image": rows, "text": ["a", "b", "c", None]})
    data.cast_column("image", datasets.Image()).to_parquet(tmp_path / "x.parquet")
    for streaming in (False, True):
        problems = problems_of(tmp_path / "x.parquet", streaming=streaming)
        assert ["row-00000001" in problems[0], "row-00000002" in problems[1], "row-00000003" in problems[2]] == [
            True
        ] * 3
        assert "no picture of a known format" in problems[0]
        assert "no caption: " in problems[2] and len(problems) == 3
    assert "holds no picture" in problems_of(tmp_path / "x.parquet")[1]


def test_rows_that_name_files_are_read_within_the_datasets_folder_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr("lorakit.data.memo.RACY_NS", -3600 * 10**9)

    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "in.png").write_bytes(png(0))
    (tmp_path / "out.png").write_bytes(png(1))
    (folder / "link.png").symlink_to(tmp_path / "out.png")
    os.mkfifo(folder / "pipe.png")
    names = ["in.png", "../out.png", str(tmp_path / "out.png"), "link.png", "pipe.png"]
    rows = [{"bytes": None, "path": name} for name in names]
    features = datasets.Features(
        {
            "image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
            "text": datasets.Value("string"),
        }
    )
    data = datasets.Dataset.from_dict({"image": rows, "text": ["x"] * 5}, features=features)
    data.to_parquet(folder / "x.parquet")
    found = scanned(folder / "x.parquet", skip="skip", cache=tmp_path / "c")
    assert list(found.examples.keys) == ["0/row-00000000"]
    assert ["outside the dataset's folder" in text for text in found.skipped] == [True, True, True, False]
    assert "no regular file" in found.skipped[3]
    # such files change unseen
    (folder / "in.png").write_bytes(png(7))
    again = scanned(folder / "x.parquet", skip="skip", cache=tmp_path / "c")
    assert again.examples[0].digest == hashlib.sha256(png(7)).hexdigest()


def test_a_copy_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "SHARD_ROWS", 2)
    path = tmp_path / "x.parquet"
    table(7, text=[str(i) for i in range(7)]).to_parquet(path)
    settings: dict[str, Any] = {"streaming": True, "cache": tmp_path / "c"}
    write = imports._write
    written = []

    def breaks(target: Path, rows: Any, *rest: Any) -> None:
        if len(written) == 2:
            next(iter(rows))
            raise ConnectionError("the line is dead")
        written.append(target.name)
        write(target, rows, *rest)

    monkeypatch.setattr(imports, "_write", breaks)
    (problem,) = problems_of(path, **settings)
    assert "ConnectionError: the line is dead" in problem and "what was read is kept" in problem
    kept = tree(tmp_path / "c" / "imports")
    assert [Path(name).name for name in kept] == ["000000.tar", "000001.tar"]
    monkeypatch.setattr(imports, "_write", lambda target, *rest: (written.append(target.name), write(target, *rest)))
    assert [e.captions for e in good(path, **settings).examples] == [(str(i),) for i in range(7)]
    assert written == ["000000.tar", "000001.tar", "000002.tar", "000003.tar"]
    assert kept.items() <= tree(tmp_path / "c" / "imports").items()
    # once it is whole the rows are not even asked for again
    monkeypatch.setattr(TableStorage, "_stream", None)
    good(path, **settings)
    assert len(written) == 4


def test_names_on_the_hub_without_a_network(tmp_path: Path) -> None:
    for streaming in (False, True):
        (problem,) = problems_of("hf://datasets/nobody/nothing-there", streaming=streaming)
        assert "data.sources.0.path = hf://datasets/nobody/nothing-there: the dataset cannot be read" in problem
    for path in ("hf://nobody/nothing", "hf://datasets/", "hf://datasets/a/b/c"):
        assert "written hf://datasets/OWNER/NAME" in problems_of(path)[0]


def test_settings_that_do_not_fit_what_is_there(tmp_path: Path) -> None:
    noise(8, 8).save(tmp_path / "a.png")
    problems = problems_of(tmp_path, split="train", image_column="x", streaming=True, subset="y", revision="z")
    keys = ["split", "subset", "revision", "image_column", "streaming"]
    assert [p.partition(":")[0] for p in problems] == [f"data.sources.0.{key}" for key in keys]
    table(1, text=["a"]).save_to_disk(tmp_path / "d")
    assert "remove streaming" in problems_of(tmp_path / "d", streaming=True)[0]
    assert "data.sources.0.revision" in problems_of(tmp_path / "d", revision="x")[0]


def test_a_damaged_dataset(tmp_path: Path) -> None:
    table(1, text=["a"]).save_to_disk(tmp_path / "d")
    next((tmp_path / "d").glob("*.arrow")).write_bytes(b"junk")
    assert "the dataset cannot be read" in problems_of(tmp_path / "d")[0]
    (tmp_path / "x.parquet").write_bytes(b"junk")
    assert "the dataset cannot be read" in problems_of(tmp_path / "x.parquet")[0]
    shutil.rmtree(tmp_path / "d")


def test_nothing_is_copied_into_a_folder_of_pictures(tmp_path: Path) -> None:
    table(1, text=["a"]).to_parquet(tmp_path / "x.parquet")
    before = tree(tmp_path)
    assert "nothing is ever written" in problems_of(tmp_path, cache=tmp_path / "cache")[0]
    assert tree(tmp_path) == before


@pytest.mark.parametrize("streaming", [False, True])
def test_reading_a_copy_counts_as_use(tmp_path: Path, streaming: bool) -> None:
    table(2, text=["a", "b"]).to_parquet(tmp_path / "x.parquet")
    for age in (40, 0):
        good(tmp_path / "x.parquet", streaming=streaming, cache=tmp_path / "c")
        (copy,) = (tmp_path / "c" / ("imports" if streaming else "datasets")).iterdir()
        assert time.time() - copy.stat().st_mtime < 86_400
        os.utime(copy, (time.time() - age * 86_400,) * 2)
    assert Cache(tmp_path / "c").prune(86_400 * 30).copies == 0


@pytest.mark.parametrize("shown", [True, False])
def test_bars_of_datasets_are_off_meanwhile_and_as_they_were_afterwards(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], shown: bool
) -> None:
    import datasets

    folder = tmp_path / "p"
    folder.mkdir()
    table(2, text=["a", "b"]).to_parquet(folder / "train-0.parquet")
    before = datasets.are_progress_bars_disabled()
    try:
        (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
        capfd.readouterr()
        assert len(good(folder, cache=tmp_path / "c").examples) == 2
        assert capfd.readouterr() == ("", "")
        assert datasets.are_progress_bars_disabled() != shown
        (folder / "train-0.parquet").write_bytes(b"PAR1?")
        assert problems_of(folder, cache=tmp_path / "c")
        assert datasets.are_progress_bars_disabled() != shown
    finally:
        (datasets.disable_progress_bars if before else datasets.enable_progress_bars)()
