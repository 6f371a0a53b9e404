"""Which picture formats can be read here: Pillow's own, and those of plugins that are installed.

Pillow knows some forty formats; the list keeps out those that no photograph comes in and few have tested.
"""

import functools
import importlib
import importlib.util

from PIL import features

_ALWAYS = {
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
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
