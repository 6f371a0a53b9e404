import hashlib
import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from lorakit.data.images import suffixes
from lorakit.data.sources import escape, source_index
from lorakit.data.sources.folder import FolderStorage
from lorakit.data.sources.items import Found
from tests.data.pictures import folder_of, noise
from tests.data.scanning import good, problems_of, scanned

PHOTOS = Path(__file__).parents[4] / "shared" / "photos"


def test_pictures_and_captions_at_any_depth_in_a_stable_order(tmp_path: Path) -> None:
    root = folder_of(tmp_path, {"b.png": (9, 8), "a/z.jpg": (7, 6), "a/é 🐕.webp": (5, 4), "C.PNG": (3, 2)})
    examples = good(root, role="regularization").examples
    assert list(examples.keys) == ["0/C.PNG", "0/a/z.jpg", "0/a/é 🐕.webp", "0/b.png"]
    assert [e.captions for e in examples] == [(f"a picture of {x}",) for x in ["C", "z", "é 🐕", "b"]]
    assert [e.size for e in examples] == [(3, 2), (7, 6), (5, 4), (9, 8)]
    assert [e.digest for e in examples] == [
        hashlib.sha256((root / e.place.file).read_bytes()).hexdigest() for e in examples
    ]
    assert {e.role for e in examples} == {"regularization"}


NAME = st.text(st.sampled_from("ab.!-~é\\\n"), min_size=1, max_size=3).filter(lambda s: not s.startswith("."))


@given(st.lists(st.lists(NAME, min_size=1, max_size=3), max_size=8))
def test_the_order_is_that_of_the_escaped_paths(tmp_path_factory: pytest.TempPathFactory, paths: list) -> None:
    root = tmp_path_factory.mktemp("order")
    for parts in paths:
        file = root.joinpath(*parts[:-1], f"{parts[-1]}.png")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"")
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            continue
    found = Found()
    names = [item.name for item in FolderStorage(str(root), 0).items(found)]
    there = [str(p.relative_to(root)) for p in root.rglob("*.png") if p.is_file()]
    assert names == sorted(there, key=escape)


def test_the_size_is_the_upright_pictures(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(30, 20).save(tmp_path / "a.jpg", exif=exif)
    noise(30, 20).save(tmp_path / "b.png", exif=exif)
    assert [e.size for e in good(tmp_path, default_caption="x").examples] == [(20, 30)] * 2


def test_keys_tell_sources_and_suffixes_apart(tmp_path: Path) -> None:
    root = folder_of(tmp_path, {"a.png": (8, 8), "a.jpg": (8, 8)})
    keys = list(good(root, root).examples.keys)
    assert keys == ["0/a.jpg", "0/a.png", "1/a.jpg", "1/a.png"]
    assert [source_index(key) for key in keys] == [0, 0, 1, 1]


def test_keys_are_one_line_and_unique_and_lead_back(tmp_path: Path) -> None:
    names = ["a\nb.png", "a\\nb.png", "a\x1b[2J.png", os.fsdecode(b"\xff.png"), "a  b.png"]
    for seed, name in enumerate(names):
        noise(4, 4, seed).save(tmp_path / name)
    examples = good(tmp_path, default_caption="x").examples
    assert len(set(examples.keys)) == len(names)
    assert all(key.isprintable() for key in examples.keys)
    assert sorted(e.place.file for e in examples) == sorted(names)
    assert escape("a\nb") == r"a\nb" and escape(r"a\nb") == r"a\\nb"


def test_captions_of_every_kind(tmp_path: Path) -> None:
    given = {
        "a.txt": b"\xef\xbb\xbf  a d\xc3\xa9j\xc3\xa0 vu \r\n",
        "b.caption": b"one\ntwo",
        "c.json": b'"just a text"',
        "d.json": b'["one", " two ", ""]',
        "e.json": b'{"caption": "a caption", "other": 3, "text": null}',
        "f.json": b'{"prompt": ["one", "two"]}',
        "g.json": b'{"tags": ["red", "round"], "focus": [2, 2, 4, 4]}',
        "h.json": b'{"tags": "red, round", "face": [0, 0, 2.0, 8]}',
        "i.json": b'{"focus": [-8, 0, 8, 80]}',
    }
    for i, (name, data) in enumerate(given.items()):
        noise(8, 8, i).save(tmp_path / f"{name[0]}.png")
        (tmp_path / name).write_bytes(data)
    examples = good(tmp_path, default_caption=" a thing ").examples
    assert {e.key[2]: e.captions for e in examples} == {
        "a": ("a déjà vu",),
        "b": ("one\ntwo",),
        "c": ("just a text",),
        "d": ("one", "two"),
        "e": ("a caption",),
        "f": ("one", "two"),
        "g": ("red, round",),
        "h": ("red, round",),
        "i": ("a thing",),
    }
    assert [e.focus for e in examples[-3:]] == [(3 / 8, 3 / 8), (1 / 8, 0.5), (0.5, 0.5)]
    assert [e.focus for e in examples[:6]] == [None] * 6
    (tmp_path / "c.json").unlink()
    assert good(tmp_path, allow_missing_captions=True).examples[2].captions == ("",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"caption": "a", "text": "b"}', "two captions, text and caption: keep one"),
        ("{", "no JSON (line 1, column 2"),
        ("[" * 100_000, "no JSON that can be read"),
        ("9" * 5000, "no JSON that can be read"),
        ("3", "neither a text nor a list of texts"),
        ('{"caption": {"a": 1}}', "its caption: it is neither"),
        ('"\\ud800"', "no text (half a surrogate"),
        ('"a\\u001eb"', "U+001E"),
        ('{"focus": [1, 2, 3]}', "its focus is no box"),
        ('{"focus": [true, 2, 3, 4]}', "its focus is no box"),
        ('{"face": "abcd"}', "its face is no box"),
        ('{"face": [4, 0, 4, 4]}', "empty box"),
        ('{"face": [0, 0, NaN, 4]}', "empty box"),
        ('{"face": [0, 0, 1, 4], "focus": [0, 0, 1, 1]}', "two boxes"),
        ('{"focus": [8, 0, 9, 9], "text": "a"}', "lies outside its 8×8 pixels"),
    ],
)
def test_json_that_says_nothing_clear_is_named(tmp_path: Path, text: str, said: str) -> None:
    noise(8, 8).save(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(text)
    (problem,) = problems_of(tmp_path)
    assert said in problem and str(tmp_path / "a.") in problem


@pytest.mark.parametrize("order", ["le", "be"])
@pytest.mark.parametrize("suffix", [".txt", ".json"])
def test_captions_in_utf_16_are_told(tmp_path: Path, order: str, suffix: str) -> None:
    noise(8, 8).save(tmp_path / "a.png")
    (tmp_path / f"a{suffix}").write_bytes('\ufeff"a d\xe9j\xe0 vu"'.encode(f"utf-16-{order}"))
    assert problems_of(tmp_path) == (f"{tmp_path}/a{suffix}: it looks like UTF-16: save it as UTF-8.",)


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    root = folder_of(tmp_path, {"a.png": (8, 8), ".cache/b.png": (8, 8), ".c.png": (8, 8)})
    found = good(root)
    assert list(found.examples.keys) == ["0/a.png"]
    assert found.warnings == ()


def test_pictures_by_all_the_suffixes_of_their_formats(tmp_path: Path) -> None:
    kinds = {"a.jfif": "JPEG", "b.jpe": "JPEG", "c.mpo": "MPO", "d.apng": "PNG", "e.PJPEG": "JPEG", "f.mpo": "JPEG"}
    for seed, (name, kind) in enumerate(kinds.items()):
        moving = {"save_all": True, "append_images": [noise(16, 12, 9)]} if kind != "JPEG" else {}
        noise(16, 12, seed).save(tmp_path / name, format=kind, **moving)
        (tmp_path / name).with_suffix(".txt").write_text("x")
    (tmp_path / "f.txt").unlink()
    found = good(tmp_path, default_caption="y")
    assert [example.key[2:] for example in found.examples] == list(kinds) and found.warnings == ()
    assert [example.captions for example in found.examples] == [("x",)] * 5 + [("y",)]


def test_files_that_nothing_is_made_of_are_counted_and_some_named(tmp_path: Path) -> None:
    root = folder_of(tmp_path, {"a.png": (8, 8)})
    for name in (".hidden.xyz", "Thumbs.db", "README.md", "metadata.csv", "z.PIC"):
        (root / name).write_text("file_name,text\n" if name == "metadata.csv" else "?")
    (root / "a folder.xyz").mkdir()
    said = "neither picture, caption, mask nor metadata by name"
    (warning,) = good(root).warnings
    assert warning.startswith(f"data.sources.0: 1 file is left out, {said} (0/z.PIC): rename")
    for number in range(6):
        (root / "a folder.xyz" / f"{number}").write_text("?")
    (warning,) = good(root).warnings
    names = ", ".join(f"0/{name}" for name in ("z.PIC", *(f"a folder.xyz/{number}" for number in range(4))))
    assert f": 7 files are left out, {said} ({names} and 2 more): rename" in warning
    for name in ("r.orf", "r.RW2", "r.raf", "r.exr", "r.ico"):
        (root / name).write_text("?")
    assert sum("are not read: convert it" in text for text in good(root).warnings) == 5


def test_warnings_name_what_is_left_over_or_doubled(tmp_path: Path) -> None:
    root = folder_of(tmp_path, {"a.png": (8, 8), "sub/b.jpg": (8, 8), "b.png": (8, 8)})
    shutil.copy(root / "a.png", root / "copy.png")
    (root / "copy.txt").write_text("again")
    (root / "b.jpg").write_bytes((root / "sub/b.jpg").read_bytes())  # b.txt now belongs to two
    (root / "orphan.txt").write_text("of nobody")
    (root / "orphan.json").write_text("{}")
    (root / "gone.mask.png").write_bytes(b"?")
    (root / "new.psd").write_text("?")
    (root / "README.md").write_text("no caption, no picture")
    assert sorted(good(root).warnings) == [
        "0/b.txt: it is the caption of several pictures: b.jpg, b.png",
        "0/copy.png: the same file as 0/a.png",
        "0/gone.mask.png: a mask of no picture",
        "0/new.psd: pictures of format .psd are not read: convert it to png or jpg",
        "0/orphan.json: a caption of no picture",
        "0/orphan.txt: a caption of no picture",
        "0/sub/b.jpg: the same file as 0/b.jpg",
    ]


def test_what_a_refused_picture_has_is_not_of_no_picture(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "root", {"a.png": (8, 8), "sub/b.png": (8, 8)})
    suffix = next(s for s in (".heic", ".jxl", ".avif") if s not in suffixes())
    outside = folder_of(tmp_path / "outside", {"c.png": (8, 8)}) / "c.png"
    for name in (f"IMG_1{suffix.upper()}", "new.psd", "sub/raw.cr2", "bad.png"):
        (root / name).write_text("?")
    (root / "link.png").symlink_to(outside)
    (root / "gone.png").symlink_to("nowhere")
    for stem in ("IMG_1", "new", "sub/raw", "bad", "link", "gone", "nobody"):
        (root / f"{stem}.txt").write_text("its caption")
        noise(8, 8).convert("L").save(root / f"{stem}.mask.png")
    assert scanned(root, skip="skip").unused == (
        "0/nobody.txt: a caption of no picture",
        "0/nobody.mask.png: a mask of no picture",
    )
    # so are rows
    for text in root.glob("**/*.txt"):
        text.unlink()
    lines = [f'{{"file_name": "{name}", "text": "x"}}\n' for name in ("link.png", "sub/raw.cr2", "no.png", "new.psd")]
    (root / "metadata.jsonl").write_text("".join(lines))
    said = [text for text in scanned(root, default_caption="x").problems if "leads to no picture" in text]
    assert len(said) == 1 and "'no.png'" in said[0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.png", "it is a picture: name its folder"),
        ("A.JPG", "it is a picture: name its folder"),
        ("a.heic", "it is a picture: name its folder"),
        ("a.txt", "it is no folder, no parquet file and no tar"),
        ("no", "there is no such folder"),
        ("no.png", "there is no such folder"),
        ("no.tar", "there is no such file"),
        ("no.parquet", "there is no such file"),
        ("no-*.tar", "nothing matches it"),
    ],
)
def test_paths_that_lead_to_no_source(tmp_path: Path, name: str, said: str) -> None:
    if not name.startswith("no"):
        (tmp_path / name).write_text("?")
    assert problems_of(tmp_path / name) == (f"data.sources.0.path = {tmp_path / name}: {said}.",)


def test_photo_formats_without_their_plugin_are_errors_unless_skipped(tmp_path: Path) -> None:
    root = folder_of(tmp_path, {"a.png": (8, 8)})
    suffix = next(s for s in (".heic", ".jxl", ".avif") if s not in suffixes())
    (root / f"new{suffix.upper()}").write_text("?")
    (problem,) = problems_of(root)
    assert f"new{suffix.upper()}: pictures of format {suffix} need pillow-" in problem and "pip install" in problem
    found = good(root, skip="skip")
    assert [text.partition(":")[0] for text in found.skipped] == [f"0/new{suffix.upper()}"]
    assert not any(str(tmp_path) in text for text in found.skipped)
    assert ".avif" not in suffixes() or features.check("avif")


def test_masks_beside_their_pictures(tmp_path: Path) -> None:
    root = folder_of(tmp_path, {"a.jpg": (40, 20), "b.png": (40, 20), "c.png": (40, 20), "d.png": (41, 21)})
    white = Image.new("L", (40, 20))
    white.paste(255, (30, 0, 40, 10))
    white.save(root / "a.mask.png")
    white.resize((20, 10)).save(root / "B.MASK.PNG")  # of no picture: names are told apart by case
    white.resize((20, 10)).save(root / "d.mask.png")
    found = good(root)
    a, b, _, d = found.examples
    assert len(found.examples) == 4 and b.mask is None and b.mask_digest == ""
    assert a.mask is not None and a.mask.file == "a.mask.png" and a.focus == (0.875, 0.25)
    assert a.mask_digest == hashlib.sha256((root / "a.mask.png").read_bytes()).hexdigest()
    assert d.mask is not None and d.focus == (0.875, 0.25)
    assert found.warnings == found.unused == ("0/B.MASK.PNG: a mask of no picture",)
    Image.new("L", (40, 20)).save(root / "a.mask.png")
    white.resize((20, 20)).save(root / "b.mask.png")
    (root / "d.mask.png").write_bytes(b"junk")
    problems = problems_of(root)
    assert "its mask: it is all black" in problems[0]
    assert "its mask is 20×20 and it is 40×20" in problems[1]
    assert "its mask: it is no picture" in problems[2]
    assert len(scanned(root, skip="skip").examples) == 1
    # a box says more of what matters than a mask does
    white.save(root / "a.mask.png")
    (root / "a.txt").unlink()
    (root / "a.json").write_text(json.dumps({"text": "x", "focus": [0, 0, 20, 20]}))
    assert scanned(root, skip="skip").examples[0].focus == (0.25, 0.5)


def test_a_folder_of_masks(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "photos", {"sub/a.jpg": (40, 20), "b.png": (40, 20)})
    masks = tmp_path / "masks"
    (masks / "sub").mkdir(parents=True)
    Image.new("L", (40, 20), 255).save(masks / "sub" / "a.png")
    Image.new("L", (40, 20), 255).save(masks / "z.png")
    found = good(root, mask_path=str(masks))
    assert [e.mask is not None for e in found.examples] == [False, True]
    assert found.warnings == (
        "0/b.png: it has no mask in mask_path, so all of it counts",
        "mask_path of source 0, z.png: a mask of no picture",
    )
    Image.new("L", (40, 20), 255).save(root / "sub" / "a.mask.png")
    assert "it has two masks" in problems_of(root, mask_path=str(masks))[0]
    (root / "sub" / "a.mask.png").unlink()
    (masks / "sub" / "a.png").unlink()
    (masks / "sub" / "a.png").symlink_to(root / "b.png")
    assert "a link out of mask_path" in problems_of(root, mask_path=str(masks))[0]
    (masks / "sub" / "a.png").unlink()
    assert "a mask for none of the pictures" in problems_of(root, mask_path=str(masks))[0]
    assert "mask_path = " in problems_of(root, mask_path=str(tmp_path / "absent"))[0]


def test_links_inside_are_followed_and_links_out_are_refused(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "root", {"a.png": (8, 8), "sub/b.png": (8, 8)})
    outside = folder_of(tmp_path / "root outside", {"secret.png": (8, 8)})
    (root / "inner.png").symlink_to("a.png")
    (root / "inner.txt").symlink_to("a.txt")
    (root / "sub" / "up").symlink_to("..", target_is_directory=True)  # a loop
    assert list(good(root).examples.keys) == ["0/a.png", "0/inner.png", "0/sub/b.png"]
    (root / "out.png").symlink_to(outside / "secret.png")
    (root / "a.caption").symlink_to(outside / "secret.txt")
    (root / "a.mask.png").symlink_to(outside / "secret.png")
    (root / "metadata.csv").symlink_to(outside / "secret.txt")
    (root / "outdir").symlink_to(outside, target_is_directory=True)
    (root / "gone.png").symlink_to("nowhere.png")
    (root / "self.png").symlink_to("self.png")
    assert [(Path(p.split(":")[0]).name, "out of the folder" in p) for p in problems_of(root)] == [
        ("a.caption", True),
        ("a.mask.png", True),
        ("gone.png", False),
        ("metadata.csv", True),
        ("out.png", True),
        ("outdir", True),
        ("self.png", False),
    ]
    assert "leads nowhere" in problems_of(root)[2]
    # a linked root is where the user pointed, and no way out
    link = tmp_path / "link"
    link.symlink_to(outside, target_is_directory=True)
    assert len(good(link).examples) == 1


def test_a_link_that_takes_a_files_place_later_is_not_followed(tmp_path: Path) -> None:
    root = folder_of(tmp_path / "root", {"a.png": (8, 8)})
    outside = folder_of(tmp_path / "outside", {"secret.png": (8, 8)})
    storage = FolderStorage(str(root), 0)
    (item,) = storage.items(Found())
    assert storage.read(item.place) == (root / "a.png").read_bytes()
    (root / "a.png").unlink()
    (root / "a.png").symlink_to(outside / "secret.png")
    with pytest.raises(ValueError, match="a link out of the folder"):
        storage.read(item.place)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
def test_pipes_sockets_and_folders_named_like_pictures_block_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder_of(tmp_path, {"a.png": (8, 8), "d.png/inside.png": (8, 8)})
    monkeypatch.chdir(root)
    for name in ("b.png", "a.caption", "a.mask.png", "metadata.jsonl"):
        os.mkfifo(name)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("c.png")
        began = time.monotonic()
        problems = problems_of(root)
    assert time.monotonic() - began < 5
    assert ["a pipe" in p or "a folder" in p or "a socket" in p for p in problems] == [True] * 6
    (root / "e.png").write_bytes((root / "a.png").read_bytes())
    storage = FolderStorage(str(root), 0)
    place = next(item.place for item in storage.items(Found()) if item.name == "e.png")
    (root / "e.png").unlink()
    os.mkfifo(root / "e.png")
    with pytest.raises(ValueError, match="no regular file"):
        storage.read(place)


def test_folders_deeper_than_the_interpreters_stack(tmp_path: Path) -> None:
    deep = tmp_path / "deep"
    deep.mkdir()
    try:
        handle = os.open(deep, os.O_RDONLY)
        for _ in range(1200):
            os.mkdir("d", dir_fd=handle)
            inner = os.open("d", os.O_RDONLY, dir_fd=handle)
            os.close(handle)
            handle = inner
        os.close(handle)
        noise(8, 8).save(tmp_path / "a.png")
        assert len(good(tmp_path, default_caption="x").examples) == 1
    finally:
        subprocess.run(["rm", "-rf", str(deep)], check=True)  # shutil.rmtree recurses, and so does pytest's cleaning


def test_ten_thousand_pictures_are_listed_in_a_second(tmp_path: Path) -> None:
    count = 2000
    for i in range(count):
        (tmp_path / f"{i}.png").write_bytes(b"")
        (tmp_path / f"{i}.txt").write_text(f"caption {i}")
    began = time.process_time()
    assert sum(1 for _ in FolderStorage(str(tmp_path), 0).items(Found())) == count
    # 0.2 s for 10,000, measured; three times what the aim allows, for busy machines
    assert time.process_time() - began < 3 * count / 10_000


def test_real_photographs(tmp_path: Path) -> None:
    if not PHOTOS.is_dir():
        pytest.skip("../shared/photos is absent")
    folder = tmp_path / "dog"
    folder.mkdir()
    for path in sorted((PHOTOS / "dog").glob("*.jpg")):
        shutil.copyfile(path, folder / path.name)
    found = good(folder, default_caption="a dog")
    assert len(found.examples) == 5
    assert all(min(e.size) >= 256 for e in found.examples)
    assert found.warnings == ()


def test_which_file_the_captions_are(tmp_path: Path) -> None:
    root = folder_of(tmp_path, {f"{name}.png": (9, 8) for name in ("a/text", "json", "row", "none")})
    for name in ("json", "row", "none"):
        (root / f"{name}.txt").unlink()
    (root / "json.json").write_text('"x"')
    (root / "metadata.jsonl").write_text('{"file_name": "row.png", "text": "x"}\n')
    files = {item.name: item.caption_file for item in FolderStorage(str(root), 0).items(Found())}
    assert files == {"a/text.png": "a/text.txt", "json.png": "", "none.png": "", "row.png": ""}
