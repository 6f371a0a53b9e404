"""Which picture formats can be read here: Pillow's own, and those of plugins that are installed.

Pillow knows some forty formats; the list keeps out those that no photograph comes in and few have tested.
"""

import functools
import importlib
import importlib.util
from typing import IO

from PIL import features

_ALWAYS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
}
# package to install, its module, Pillow's name of the format, what to call to make it known ("": importing does that),
# suffixes
_PLUGINS = (
    ("pillow-avif-plugin", "pillow_avif", "AVIF", "", (".avif",)),
    ("pillow-heif", "pillow_heif", "HEIF", "register_heif_opener", (".heic", ".heif")),
    ("pillow-jxl-plugin", "pillow_jxl", "JXL", "", (".jxl",)),
)


@functools.cache
def formats() -> dict[str, tuple[str, ...]]:
    """Pillow's names of the formats that can be read, with their suffixes; plugins are made known to Pillow."""
    found = dict(_ALWAYS)
    for _, module, name, register, suffixes in _PLUGINS:
        if name == "AVIF" and features.check("avif"):
            found[name] = suffixes
        elif importlib.util.find_spec(module):
            try:
                plugin = importlib.import_module(module)
                if register:
                    getattr(plugin, register)()
            except (
                ImportError,
                AttributeError,
                OSError,
            ):  # built for another Pillow or system: as if it were not there
                continue
            found[name] = suffixes
    return found


@functools.cache
def suffixes() -> frozenset[str]:
    """The suffixes, with their dots and in lower case, of pictures that can be read here and now."""
    return frozenset(suffix for all_of_one in formats().values() for suffix in all_of_one)


def plugin_for(suffix: str) -> str | None:
    """The package to install for pictures of `suffix`, where they cannot be read without."""
    if suffix in suffixes():
        return None
    return next((package for package, _, _, _, own in _PLUGINS if suffix in own), None)


_JXL_CONTAINER = bytes.fromhex("0000000c 4a584c20 0d0a870a")
_JXL_RATIOS = {1: (1, 1), 2: (12, 10), 3: (4, 3), 4: (3, 2), 5: (16, 9), 6: (5, 4), 7: (2, 1)}


def jxl_size(file: IO[bytes]) -> tuple[int, int] | None:
    """(width, height) in the header of a JPEG XL file, None of any other; leaves `file` where it was.

    Its plugin decodes all pixels on opening, when it is too late to refuse a picture of millions. ISO/IEC 18181-1,
    D.2 (SizeHeader), and 18181-2 (boxes).
    """
    start = file.tell()
    try:
        head = file.read(12)
        if head == _JXL_CONTAINER:
            head = _jxl_codestream(file)
        if head[:2] != b"\xff\x0a" or len(head) < 12:
            return None
        bits = int.from_bytes(head[2:], "little")

        def take(count: int) -> int:
            nonlocal bits
            value, bits = bits & ((1 << count) - 1), bits >> count
            return value

        small = take(1)

        def side() -> int:
            return 8 * (take(5) + 1) if small else take((9, 13, 18, 30)[take(2)]) + 1

        height = side()
        ratio = _JXL_RATIOS.get(take(3))
        return (height * ratio[0] // ratio[1] if ratio else side()), height
    finally:
        file.seek(start)


def _jxl_codestream(file: IO[bytes]) -> bytes:
    """The first bytes of the codestream within a container whose signature has been read."""
    while len(head := file.read(8)) == 8:
        size, kind, header = int.from_bytes(head[:4], "big"), head[4:], 8
        if size == 1:
            size, header = int.from_bytes(file.read(8), "big"), 16
        if kind in (b"jxlc", b"jxlp"):
            return file.read(16)[4 if kind == b"jxlp" else 0 :]
        if size < header:  # 0: to the file's end
            break
        file.seek(size - header, 1)
    return b""
