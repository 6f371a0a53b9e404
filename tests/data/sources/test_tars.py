import io
import os
import tarfile
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lorakit.data.images import suffixes
from lorakit.data.sources import SourceSettings, open_source
from lorakit.data.sources.tars import expand
from tests.data.pictures import folder_of, noise
from tests.data.scanning import good, problems_of, scanned


def picture(seed: int = 0, kind: str = "PNG", size: tuple[int, int] = (16, 16)) -> bytes:
    data = io.BytesIO()
    noise(*size, seed).save(data, kind)
    return data.getvalue()


def mask() -> bytes:
    data = io.BytesIO()
    Image.new("L", (16, 16), 255).save(data, "PNG")
    return data.getvalue()


def tar_of(path: Path, members: "dict[str, bytes | tarfile.TarInfo]", **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members.items():
            info = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(data, bytes):
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data) if isinstance(data, bytes) else None)
    return path


def odd(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_groups_are_read_where_they_lie(tmp_path: Path, form: int) -> None:
    long = "d" * 120
    members = {
        "./a/000.jpg": picture(0, "JPEG"),
        "./a/000.txt": b" one ",
        "a/001.v2.png": picture(1),
        "a/001.json": b'{"caption": "two", "url": "x", "focus": [0, 0, 8, 16]}',
        "a/001.mask.png": mask(),
        "a/001.cls": b"7",
        f"{long}/é.webp": picture(2, "WEBP"),
        f"{long}/é.caption": b"drei",
        "._a/000.jpg": b"what a Mac leaves behind",
    }
    path = tar_of(tmp_path / "x.tar", members, format=form)
    found = good(path)
    assert [(e.key, e.captions, e.focus) for e in found.examples] == [
        ("0/x.tar/a/000.jpg", ("one",), None),
        ("0/x.tar/a/001.v2.png", ("two",), (0.25, 0.5)),
        (f"0/x.tar/{long}/é.webp", ("drei",), None),
    ]
    storage = open_source(SourceSettings(path=str(path)), 0, cache=tmp_path)
    pictures = [data for name, data in members.items() if name[-3:] in ("jpg", "png", "ebp") and name[-8:-4] != "mask"]
    assert [storage.read(e.place) for e in found.examples] == pictures[:3]
    assert found.examples[1].mask is not None and storage.read(found.examples[1].mask) == mask()
    assert found.warnings == ()
    assert sorted(os.listdir(tmp_path)) == ["x.tar"]


def test_folders_braces_and_globs_of_tars(tmp_path: Path) -> None:
    for i in range(9, 12):
        tar_of(tmp_path / f"s/x-{i:03d}.tar", {"0.png": picture(i), "0.txt": b"x"})
    for path in (tmp_path / "s", tmp_path / "s/x-{009..011}.tar", tmp_path / "s" / "x-*.tar"):
        assert list(good(path).examples.keys) == [f"0/x-{i:03d}.tar/0.png" for i in (9, 10, 11)]
    assert "2 of its 5 tars are missing, first" in problems_of(tmp_path / "s/x-{008..012}.tar")[0]
    (problem,) = problems_of(tmp_path / "s/x-{008..011}.tar")
    assert problem.endswith(f": 1 of its 4 tars is missing, {tmp_path}/s/x-008.tar.")
    assert "nothing matches it" in problems_of(tmp_path / "s/y-*.tar")[0]
    assert "over 100000 files" in problems_of(tmp_path / "s/x-{0..999999999}.tar")[0]
    # beside pictures, tars are none of the source
    folder_of(tmp_path / "s", {"a.png": (8, 8)})
    assert list(good(tmp_path / "s").examples.keys) == ["0/a.png"]


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 4))
def test_ranges_count_like_a_shells(first: int, more: int, width: int) -> None:
    pattern = f"x-{{{first:0{width}d}..{first + more:0{width}d}}}.tar"
    padded = width if f"{first:0{width}d}".startswith("0") else 0
    assert expand(pattern) == [f"x-{n:0{padded}d}.tar" for n in range(first, first + more + 1)]


def test_what_a_group_must_not_hold(tmp_path: Path) -> None:
    members = {
        "two.jpg": picture(0, "JPEG"),
        "two.png": picture(1),
        "caps.png": picture(2),
        "caps.txt": b"one",
        "caps.json": b'["another"]',
        "same.png": picture(3),
        "same.txt": b"one",
        "same.json": b'{"caption": "one"}',
        "none.png": picture(4),
        "latin.png": picture(5),
        "latin.txt": b"\xe9",
        "huge.png": picture(6),
        "huge.txt": b"x" * 1_000_001,
        "bad.png": b"junk",
        "orphan.txt": b"x",
        "orphan.mask.png": b"x",
    }
    found = scanned(tar_of(tmp_path / "x.tar", members))
    said = {
        "two": "its group has 2 pictures, two.jpg and two.png: keep or rename one",
        "caps.png": "it has two captions, caps.txt and caps.json: keep one",
        "none.png": "no caption: put one into none.txt right behind it in the tar",
        "latin.txt": "not UTF-8 (byte 0)",
        "huge.txt": "over 1 MB",
        "bad.png": "no picture of a known format",
    }
    assert len(found.problems) == len(said)
    for name, text in said.items():
        assert any(f"{tmp_path}/x.tar/{name}: " in p and text in p for p in found.problems), name
    assert list(found.examples.keys) == ["0/x.tar/same.png"]
    assert found.warnings == (
        "0/x.tar/orphan.txt: a caption of no picture",
        "0/x.tar/orphan.mask.png: a mask of no picture",
    )


def test_what_a_refused_picture_has_is_not_of_no_picture(tmp_path: Path) -> None:
    suffix = next(s for s in (".heic", ".jxl", ".avif") if s not in suffixes())
    members: dict[str, bytes | tarfile.TarInfo] = {"a.png": picture(0), "a.txt": b"x"}
    for stem, held in (("new", suffix), ("raw", ".cr2"), ("bad", ".png"), ("orphan", ".md")):
        members |= {f"{stem}{held}": b"?", f"{stem}.txt": b"x", f"{stem}.mask.png": b"?"}
    members |= {"./before/link.png": odd("./before/link.png", tarfile.SYMTYPE, "a.png"), "./before/link.txt": b"x"}
    members |= {"after.txt": b"x", "after.png": odd("after.png", tarfile.LNKTYPE, "a.png")}
    members |= {"text.txt": odd("text.txt", tarfile.SYMTYPE, "a.txt"), "text.json": b"{}"}
    found = scanned(tar_of(tmp_path / "x.tar", members), skip="skip")
    assert found.unused == (
        "0/x.tar/orphan.txt: a caption of no picture",
        "0/x.tar/orphan.mask.png: a mask of no picture",
        "0/x.tar/text.json: a caption of no picture",
    )


def test_two_pictures_of_one_name(tmp_path: Path) -> None:
    members = {"a.png": picture(0), "a.txt": b"x", "b.png": picture(1), "b.txt": b"x"}
    path = tar_of(tmp_path / "x.tar", members)
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("a.png")
        info.size = len(picture(2))
        tar.addfile(info, io.BytesIO(picture(2)))
    problems = problems_of(path, default_caption="x")
    assert problems == (f"{path}/a.png: there are two pictures of this name: keep or rename one.",)


def test_links_devices_and_names_that_lead_out_are_named_and_never_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(picture())
    members = {
        "good.png": picture(1),
        "good.txt": b"x",
        "a": odd("link.png", tarfile.SYMTYPE, "../secret.png"),
        "b": odd("hard.png", tarfile.LNKTYPE, "good.png"),
        "c": odd("dev.png", tarfile.CHRTYPE),
        "d": odd("fifo.png", tarfile.FIFOTYPE),
        "../up.png": picture(2),
        "/abs.png": picture(3),
        "x/../../up.png": picture(4),
        "esc\x1b[2J\n.png": b"junk",
    }
    path = tar_of(tmp_path / "x.tar", members)
    began = time.monotonic()
    problems = problems_of(path)
    assert time.monotonic() - began < 5
    said = ["a link", "a link", "a device", "a device", "leads out", "leads out", "leads out", "no picture"]
    assert [text in problem for text, problem in zip(said, problems)] == [True] * 8 and len(problems) == 8
    assert all(problem.isprintable() for problem in problems)
    found = good(path, skip="skip")
    assert list(found.examples.keys) == ["0/x.tar/good.png"] and len(found.skipped) == 8


def test_wherever_a_tar_is_cut_off_that_is_said_and_the_rest_kept(tmp_path: Path) -> None:
    members = {f"{i}{s}": picture(i) if s == ".png" else b"x" for i in range(3) for s in (".png", ".txt")}
    whole = tar_of(tmp_path / "x.tar", members).read_bytes()
    with tarfile.open(tmp_path / "x.tar") as tar:
        infos = {info.name: info for info in tar}
    end = max(info.offset_data + 512 for info in infos.values())
    lengths = [
        700,
        512,
        infos["1.png"].offset,
        infos["1.png"].offset + 100,
        infos["2.png"].offset_data + 5,
        end - 100,
        end,
    ]
    for length in [*lengths, 0]:
        (tmp_path / "x.tar").write_bytes(whole[:length])
        problems = problems_of(tmp_path / "x.tar", default_caption="x")
        assert len(problems) == 1 and "x.tar: it is" in problems[0], length
        # a picture whose bytes are all there is kept
        kept = [n for n, info in infos.items() if n.endswith("png") and info.offset_data + info.size <= length]
        found = scanned(tmp_path / "x.tar", default_caption="x", skip="skip")
        assert [key[8:] for key in found.examples.keys] == kept, length
        assert len(found.skipped) == 1 and bool(found.problems) == (not kept)
    garbage = bytearray(whole)
    garbage[infos["1.txt"].offset : infos["1.txt"].offset + 512] = b"\xff" * 512
    (tmp_path / "x.tar").write_bytes(garbage)
    assert "cut off or damaged at byte" in problems_of(tmp_path / "x.tar", default_caption="x")[0]


def test_what_is_no_tar_and_headers_that_want_gigabytes(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(picture())
    assert "it is no tar, or compressed" in problems_of(tmp_path / "x.tar")[0]
    with tarfile.open(tmp_path / "x.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    assert "it is no tar, or compressed" in problems_of(tmp_path / "x.tar")[0]
    info = tarfile.TarInfo("h")
    info.type, info.size = tarfile.XHDTYPE, 7 << 30
    with open(tmp_path / "x.tar", "wb") as file:
        file.write(info.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(8 << 30)  # a hole: no disk is used
    began = time.monotonic()
    assert "it is" in problems_of(tmp_path / "x.tar")[0]
    assert time.monotonic() - began < 5


@given(st.integers(0, 5119), st.integers(0, 255))
def test_no_damage_makes_it_raise(tmp_path_factory: pytest.TempPathFactory, at: int, value: int) -> None:
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    data = bytearray(
        tar_of(path, {"a.png": picture(0), "a.txt": b"x", "b.png": picture(1), "b.txt": b"y"}).read_bytes()
    )
    data[at] = value
    path.write_bytes(data)
    scanned(path)
