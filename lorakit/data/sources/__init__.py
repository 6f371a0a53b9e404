"""Where pictures come from: folders, datasets, parquet files and tars, each in its own file.

`open_source` looks at what a path leads to. `../scan.py` reads what is there.
"""

from pathlib import Path

from lorakit.data.sources.items import Found, Item, Storage, escape, make_key, source_index, unescape
from lorakit.data.sources.settings import SourceSettings

__all__ = [
    "Found",
    "Item",
    "SourceSettings",
    "Storage",
    "escape",
    "make_key",
    "open_source",
    "source_index",
    "unescape",
]


def open_source(settings: SourceSettings, index: int, *, cache: Path) -> Storage:
    """The storage of source `index`, by what its path is; nothing is listed yet.

    Raises InputError where there is nothing at the path, or a setting does not fit what is there.
    """
    raise NotImplementedError


def __getattr__(name: str) -> object:  # until dataset.py and report.py import them from scan.py
    if name in ("Scan", "scan"):
        from lorakit.data import scan as module

        return getattr(module, name)
    raise AttributeError(name)
