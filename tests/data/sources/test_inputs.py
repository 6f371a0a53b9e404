"""lorakit/data/sources/inputs.py: pictures to begin with, in a folder or a column, found by name and looked at."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lorakit.data.scan import Scan, scan
from lorakit.data.sources import SourceSettings
from tests.data.pictures import folder_of, noise

SIZES = {"a.png": (64, 48), "deep/b.png": (48, 64), "c.jpg": (50, 50)}


def scanned(tmp_path: Path, **changes: Any) -> Scan:
    values = {"path": str(tmp_path / "photos"), "input_path": str(tmp_path / "before"), **changes}
    on_bad = values.pop("on_bad_image", "error")
    return scan([SourceSettings(**values)], cache=tmp_path / "cache", on_bad_image=on_bad)


@pytest.fixture(autouse=True)
def folders(tmp_path: Path) -> None:
    folder_of(tmp_path / "photos", SIZES)
    # another suffix, half the size
    folder_of(tmp_path / "before", {"a.jpg": (32, 24), "deep/b.png": (48, 64), "c.jpg": (50, 50)}, caption=None, seed=9)


def test_each_picture_has_the_one_of_its_name(tmp_path: Path) -> None:
    for _ in range(2):  # from the files, and from what is remembered of them
        found = scanned(tmp_path)
        assert not found.problems and not found.warnings
        assert [example.key for example in found.examples] == ["0/a.png", "0/c.jpg", "0/deep/b.png"]
        assert found.examples.has_input().all()
        for example, name in zip(found.examples, ("a.jpg", "c.jpg", "deep/b.png"), strict=True):
            assert example.input is not None
            assert found.storages[0].read(example.input) == (tmp_path / "before" / name).read_bytes()
            assert example.input_digest != example.digest


def test_masks_lie_beside_them(tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    Image.new("L", (64, 48), 255).save(tmp_path / "masks" / "a.png")
    first = scanned(tmp_path, mask_path=str(tmp_path / "masks")).examples[0]
    assert first.mask is not None and first.input is not None and first.mask_digest != first.input_digest


def test_a_picture_without_one_or_with_a_wrong_one_is_a_bad_picture(tmp_path: Path) -> None:
    (tmp_path / "before" / "c.jpg").unlink()
    noise(64, 64).save(tmp_path / "before" / "a.jpg")
    (tmp_path / "before" / "deep" / "b.png").write_text("no picture")
    said = "\n".join(scanned(tmp_path).problems)
    assert "photos/c.jpg: it has no picture to begin with in input_path: put one there as " in said
    assert "photos/a.png: its input picture is 64×64 and it is 64×48: make the input picture of the same shape" in said
    assert "photos/deep/b.png: its input picture: it is no picture of a known format" in said
    folder_of(tmp_path / "photos", {"d.png": (40, 40)}, seed=20)
    folder_of(tmp_path / "before", {"d.png": (40, 40)}, caption=None, seed=21)
    found = scanned(tmp_path, on_bad_image="skip")
    assert [example.key for example in found.examples] == ["0/d.png"] and len(found.skipped) == 3


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    noise(50, 50).save(tmp_path / "secret.png")
    (tmp_path / "before" / "c.jpg").unlink()
    (tmp_path / "before" / "c.jpg").symlink_to(tmp_path / "secret.png")
    assert "its input picture: it is a link out of input_path" in "\n".join(scanned(tmp_path).problems)


def test_a_column_holds_them_in_a_table(tmp_path: Path) -> None:
    from datasets import Dataset
    from datasets import Image as ImageFeature

    columns = {
        "image": [noise(40, 40, i) for i in range(3)],
        "before": [noise(40, 40, i + 10) for i in range(3)],
        "text": ["make it so"] * 3,
    }
    rows = Dataset.from_dict(columns).cast_column("image", ImageFeature()).cast_column("before", ImageFeature())
    rows.save_to_disk(str(tmp_path / "table"))
    found = scanned(tmp_path, path=str(tmp_path / "table"), input_path=None, input_column="before")
    assert not found.problems and len(found.examples) == 3
    for i, example in enumerate(found.examples):
        assert example.input is not None
        for place, seed in ((example.place, i), (example.input, i + 10)):
            (tmp_path / "x.png").write_bytes(found.storages[0].read(place))
            assert Image.open(tmp_path / "x.png").tobytes() == noise(40, 40, seed).tobytes()
    missing = scanned(tmp_path, path=str(tmp_path / "table"), input_path=None, input_column="text")
    assert "there is no column of pictures 'text': set input_column" in missing.problems[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"input_column": "x"}, "input_path and input_column are both given"),
        ({"input_path": None, "input_column": "x", "streaming": True}, "not read of rows that stream"),
        ({"input_path": None, "conditioning_dropout": 0.1}, "conditioning_dropout is of pairs"),
        ({"caption_dropout": 0.1, "conditioning_dropout": 0.1}, "caption_dropout and conditioning_dropout are both"),
        ({"conditioning_dropout": 0.4}, "less than or equal to"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        scanned(tmp_path, **changes)
