"""A folder with everything in it that goes wrong with people's pictures, and a copy of it before and after."""

import contextlib
import hashlib
import os
import stat
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

RED = "\x1b[31mred.png"
ODD = ("new\nline.png", "\U0001f600.png", "[bold red]loud.png", RED)
"""Names that are allowed, and must be shown as what they are."""


def scene(width: int, height: int, seed: int) -> Image.Image:
    """Soft shapes, so that a smaller and brighter copy still looks alike."""
    values = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def make(root: Path) -> None:
    """Fills `root`; beside it lies a picture that a link in it leads to."""
    root.mkdir(parents=True)

    def put(name: str, image: Image.Image, caption: str | None = "a thing", **how: object) -> None:
        image.save(root / name, **how)
        if caption is not None:
            (root / name).with_suffix(".txt").write_text(caption)

    exif = Image.Exif()
    exif[0x0112] = 6
    put("turned.jpg", scene(120, 80, 1), exif=exif)
    clear = scene(80, 80, 2).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize((80, 80)))
    put("clear.png", clear)
    put("deep.png", Image.fromarray(np.linspace(0, 65535, 80 * 80).reshape(80, 80).astype(np.uint16)))
    put("long.png", scene(640, 80, 3))
    put("plain.png", scene(160, 160, 4))
    (root / "twin.png").write_bytes((root / "plain.png").read_bytes())
    (root / "twin.txt").write_text("a thing")
    put("near.jpg", scene(160, 160, 4).resize((90, 90)).point(lambda v: min(255, v + 6)), quality=80)
    put("wordy.png", scene(90, 90, 5), "word " * 200)
    for i, name in enumerate(ODD):
        put(name, scene(80, 80, 10 + i))
    (root / "orphan.txt").write_text("nobody's caption")
    # what keeps a training from starting
    put("half.jpg", scene(120, 120, 6))
    whole = (root / "half.jpg").read_bytes()
    (root / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "huge.png").write_bytes(_bomb(50_000))
    (root / "huge.txt").write_text("a bomb")
    put("tiny.png", scene(8, 8, 7))
    put("mute.png", scene(80, 80, 8), None)
    put("torn.png", scene(80, 80, 9))
    (root / "torn.caption").write_text("another caption")
    put("latin.png", scene(80, 80, 20), None)
    (root / "latin.txt").write_bytes("café".encode("latin-1"))
    scene(80, 80, 21).save(root.parent / "outside.png")
    (root / "link.png").symlink_to(root.parent / "outside.png")
    os.mkfifo(root / "pipe.png")


WRONG = {
    "half.jpg": "damaged",
    "huge.png": "million pixels",
    "tiny.png": "too small",
    "mute.png": "no caption",
    "torn.png": "caption",
    "latin": "UTF-8",
    "link.png": "link out of",
    "pipe.png": "a pipe",
}
"""What is wrong in the folder, and a word that is said of it."""

WORTH_A_LOOK = {
    "long.png": "cut off",
    "twin.png": "the same file as",
    "orphan.txt": "a caption of no picture",
    "wordy.png": "tokens",
}


def mend(root: Path) -> None:
    """Does what the messages advise."""
    for name in ("half.jpg", "huge.png", "tiny.png", "link.png", "pipe.png", "torn.caption"):
        (root / name).unlink()
        with contextlib.suppress(FileNotFoundError):
            (root / name).with_suffix(".txt").unlink()
    (root / "torn.txt").write_text("a thing")
    (root / "mute.txt").write_text("a thing")
    (root / "latin.txt").write_text("café", encoding="utf-8")


def fingerprint(root: Path) -> str:
    """A digest of all that is in a folder: names, kinds, times, contents."""
    found = []
    for path in sorted([root, *root.rglob("*")]):
        about = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(about.st_mode) else b""
        found.append((str(path), about.st_mode, about.st_mtime_ns, about.st_size, hashlib.sha256(content).hexdigest()))
    return hashlib.sha256(repr(found).encode("utf-8", "surrogatepass")).hexdigest()


def _bomb(side: int) -> bytes:
    """A PNG whose header promises side × side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )
