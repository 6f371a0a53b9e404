import hashlib
import os
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image

from lorakit.core.errors import InputError
from lorakit.data.folder import escape
from lorakit.data.sources import Scan, SourceSettings, scan, source_index
from tests.data.pictures import folder_of, noise

PHOTOS = Path(__file__).parents[3] / "shared" / "photos"


def scanned(*folders: Path, **settings: object) -> Scan:
    return scan([SourceSettings(path=str(folder), **settings) for folder in folders])


def problems_of(*folders: Path, **settings: object) -> list[str]:
    with pytest.raises(InputError) as error:
        scanned(*folders, **settings)
    return error.value.problems


def test_pictures_and_captions_at_any_depth_in_a_stable_order(tmp_path: Path) -> None:
    root = folder_of(tmp_path, {"b.png": (9, 8), "a/z.jpg": (7, 6), "a/é 🐕.webp": (5, 4), "C.PNG": (3, 2)})
    examples = scanned(root, weight=0.5).examples
    assert [e.key for e in examples] == ["0/C.PNG", "0/a/z.jpg", "0/a/é 🐕.webp", "0/b.png"]
    assert [e.caption for e in examples] == ["a picture of C", "a picture of z", "a picture of é 🐕", "a picture of b"]
    assert [e.size for e in examples] == [(3, 2), (7, 6), (5, 4), (9, 8)]
    assert [e.digest for e in examples] == [hashlib.sha256(e.path.read_bytes()).hexdigest() for e in examples]
    assert {(e.weight, e.role) for e in examples} == {(0.5, "train")}


def test_the_size_is_the_upright_pictures(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(30, 20).save(tmp_path / "a.jpg", exif=exif)
    assert scanned(tmp_path, default_caption="x").examples[0].size == (20, 30)


def test_keys_tell_sources_apart(tmp_path: Path) -> None:
    root = folder_of(tmp_path, {"a.png": (8, 8)})
    examples = scanned(root, root).examples
    assert [e.key for e in examples] == ["0/a.png", "1/a.png"]
    assert [source_index(e.key) for e in examples] == [0, 1]


def test_keys_are_one_line_and_unique(tmp_path: Path) -> None:
    names = ["a\nb.png", "a\\nb.png", "a\x1b[2J.png", os.fsdecode(b"\xff.png"), "a  b.png"]
    for seed, name in enumerate(names):
        noise(4, 4, seed).save(tmp_path / name)
    keys = [e.key for e in scanned(tmp_path, default_caption="x").examples]
    assert len(set(keys)) == len(names)
    assert all(key.isprintable() for key in keys)
    assert escape("a\nb") == r"a\nb"
    assert escape(r"a\nb") == r"a\\nb"


def test_captions_algebra(tmp_path: Path) -> None:
    root = folder_of(tmp_path, {"a.png": (8, 8), "b.png": (8, 8)}, caption=None)
    (root / "a.txt").write_bytes(b"\xef\xbb\xbf  a d\xc3\xa9j\xc3\xa0 vu \r\n")
    captions = [e.caption for e in scanned(root, trigger="sks,", default_caption="a thing").examples]
    assert captions == ["sks, a déjà vu", "sks, a thing"]
    assert [e.caption for e in scanned(root, trigger="sks", allow_missing_captions=True).examples][1] == "sks"
    assert [e.caption for e in scanned(root, allow_missing_captions=True).examples][1] == ""


def test_a_caption_file_of_the_other_suffix(tmp_path: Path) -> None:
    root = folder_of(tmp_path, {"a.png": (8, 8)}, caption=None)
    (root / "a.caption").write_text("one")
    assert scanned(root).examples[0].caption == "one"


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    names = ["good", "none", "empty", "two", "latin", "long", "cut", "text"]
    root = folder_of(tmp_path / "photos", {f"{name}.png": (16, 16) for name in names})
    (root / "none.txt").unlink()
    (root / "empty.txt").write_text(" \n")
    (root / "two.caption").write_text("another")
    (root / "latin.txt").write_bytes("déjà".encode("latin-1"))
    (root / "long.txt").write_bytes(b"x" * 1_000_001)
    (root / "cut.png").write_bytes((root / "cut.png").read_bytes()[:200])
    (root / "text.png").write_text("not a picture")
    (tmp_path / "nothing").mkdir()
    problems = problems_of(root, tmp_path / "absent", tmp_path / "nothing", root / "good.txt")
    said = {
        "cut.png": "damaged",
        "empty.png": "its caption is empty",
        "latin.txt": "not UTF-8 (byte 1)",
        "long.txt": "over 1 MB",
        "none.png": "no caption: write one into none.txt beside it",
        "text.png": "no picture of a known format",
        "two.png": "two captions, two.caption and two.txt",
        "data.sources.1.path": "no such folder",
        "data.sources.2.path": "holds no pictures",
        "data.sources.3.path": "it is no folder",
    }
    assert len(problems) == len(said)
    for problem, (name, text) in zip(problems, said.items()):
        assert name in problem
        assert text in problem
    # a picture's own mistake hides no other source's
    assert str(root / "cut.png") in problems[0]


def test_bad_pictures_may_be_skipped_but_not_captions(tmp_path: Path) -> None:
    root = folder_of(tmp_path, {"a.png": (16, 16), "b.png": (16, 16), "c.png": (4, 4)})
    (root / "b.png").write_bytes(b"junk")
    (root / "b.txt").unlink()  # nor is a caption of a skipped picture asked for
    settings = [SourceSettings(path=str(root))]

    def too_small(size: tuple[int, int]) -> str | None:
        return "it is too small" if min(size) < 8 else None

    found = scan(settings, size_problem=too_small, on_bad_image="skip")
    assert [e.key for e in found.examples] == ["0/a.png"]
    assert [text.split(":")[0] for text in found.skipped] == ["0/b.png", "0/c.png"]
    assert "too small" in found.skipped[1]
    assert not any(str(tmp_path) in text for text in found.skipped)
    with pytest.raises(InputError) as error:
        scan(settings, size_problem=too_small)
    assert ["b.png" in error.value.problems[0], "c.png: it is too small" in error.value.problems[1]] == [True, True]
    (root / "a.txt").unlink()
    with pytest.raises(InputError, match=r"a\.png: it has no caption"):
        scan(settings, size_problem=too_small, on_bad_image="skip")
    (root / "a.png").unlink()
    with pytest.raises(InputError, match="none of its pictures can be used"):
        scan(settings, size_problem=too_small, on_bad_image="skip")


def test_warnings_name_what_is_left_over_or_doubled(tmp_path: Path) -> None:
    root = folder_of(tmp_path, {"a.png": (8, 8), "sub/b.jpg": (8, 8), "b.png": (8, 8)})
    shutil.copy(root / "a.png", root / "copy.png")
    (root / "copy.txt").write_text("again")
    (root / "b.jpg").write_bytes((root / "sub/b.jpg").read_bytes())  # b.txt now belongs to two
    (root / "orphan.txt").write_text("of nobody")
    (root / "new.heic").write_text("?")
    (root / "README.md").write_text("no caption, no picture")
    assert sorted(scanned(root).warnings) == [
        "0/b.txt: it is the caption of several pictures: b.jpg, b.png",
        "0/copy.png: the same file as 0/a.png",
        "0/new.heic: pictures of format .heic are not read: convert it to png or jpg",
        "0/orphan.txt: a caption of no picture",
        "0/sub/b.jpg: the same file as 0/b.jpg",
    ]


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    root = folder_of(tmp_path, {"a.png": (8, 8), ".cache/b.png": (8, 8), ".c.png": (8, 8)})
    found = scanned(root)
    assert [e.key for e in found.examples] == ["0/a.png"]
    assert found.warnings == ()


def test_links_inside_are_followed_and_links_out_are_refused(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "root", {"a.png": (8, 8), "sub/b.png": (8, 8)})
    outside = folder_of(tmp_path / "outside", {"secret.png": (8, 8)})
    (root / "inner.png").symlink_to("a.png")
    (root / "inner.txt").symlink_to("a.txt")
    (root / "sub" / "up").symlink_to("..", target_is_directory=True)  # a loop
    assert [e.key for e in scanned(root).examples] == ["0/a.png", "0/inner.png", "0/sub/b.png"]
    (root / "out.png").symlink_to(outside / "secret.png")
    (root / "a.caption").symlink_to(outside / "secret.txt")
    (root / "outdir").symlink_to(outside, target_is_directory=True)
    (root / "gone.png").symlink_to("nowhere.png")
    (root / "self.png").symlink_to("self.png")
    problems = problems_of(root)
    assert [(Path(p.split(":")[0]).name, "out of the folder" in p) for p in problems] == [
        ("a.caption", True),
        ("gone.png", False),
        ("out.png", True),
        ("outdir", True),
        ("self.png", False),
    ]
    assert "leads nowhere" in problems[1]
    # a linked root is where the user pointed, and no way out
    link = tmp_path / "link"
    link.symlink_to(outside, target_is_directory=True)
    assert len(scanned(link).examples) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
def test_pipes_and_folders_named_like_pictures_block_nothing(tmp_path: Path) -> None:
    root = folder_of(tmp_path, {"a.png": (8, 8), "d.png/inside.png": (8, 8)})
    os.mkfifo(root / "b.png")
    os.mkfifo(root / "a.caption")
    began = time.monotonic()
    problems = problems_of(root)
    assert time.monotonic() - began < 5
    assert ["a pipe" in p or "a folder" in p for p in problems] == [True, True, True]


def test_no_sources_and_odd_paths(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.sources is empty"):
        scan([])
    problem = problems_of(Path(f"{tmp_path}/a\nb"))[0]
    assert "\n" not in problem
    with pytest.raises(InputError, match="no such folder"):
        scan([SourceSettings(path="a\0b")])


def test_real_photographs(tmp_path: Path) -> None:
    if not PHOTOS.is_dir():
        pytest.skip("../shared/photos is absent")
    folder = tmp_path / "dog"
    folder.mkdir()
    for path in sorted((PHOTOS / "dog").glob("*.jpg")):
        shutil.copyfile(path, folder / path.name)
    found = scanned(folder, default_caption="a dog")
    assert len(found.examples) == 5
    assert all(min(e.size) >= 256 for e in found.examples)
