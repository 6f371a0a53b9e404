"""Where pictures come from: folders, datasets, parquet files and tars, each in its own file.

`open_source` looks at what a path leads to. `../scan.py` reads what is there.
"""

import os
from pathlib import Path

from lorakit.core.errors import InputError
from lorakit.core.files import printable
from lorakit.data.images import suffixes
from lorakit.data.sources.folder import FOREIGN, PLUGINS, FolderStorage, split_name
from lorakit.data.sources.inputs import Paired
from lorakit.data.sources.items import Found, Item, Storage, escape, make_key, source_index, unescape
from lorakit.data.sources.masks import Masked
from lorakit.data.sources.settings import TABLE_KEYS, SourceSettings
from lorakit.data.sources.table import HUB, TableStorage, is_saved_dataset
from lorakit.data.sources.tars import TarStorage, expand

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

_HUB_KEYS = ("subset", "revision")  # what only a dataset by name has


def open_source(settings: SourceSettings, index: int, *, cache: Path) -> Storage:
    """The storage of source `index`, by what its path is; nothing is listed yet.

    Raises InputError where there is nothing at the path, or a setting does not fit what is there.
    """
    try:
        storage = _open(settings, index, cache)
    except ValueError as error:
        raise InputError(f"data.sources.{index}.path = {printable(settings.path)}: {error}.") from None
    for key, path in (("mask_path", settings.mask_path), ("input_path", settings.input_path)):
        if path is not None and ("\0" in path or not os.path.isdir(path)):
            raise InputError(f"data.sources.{index}.{key} = {printable(path)}: there is no such folder.")
    if settings.input_path is not None:
        storage = Paired(storage, settings.input_path, index)
    if settings.mask_path is None:
        return storage
    otherwise = "all of it counts" if settings.mask_means == "loss" else "what is to be painted anew is drawn"
    return Masked(storage, settings.mask_path, index, otherwise=otherwise)


def _open(settings: SourceSettings, index: int, cache: Path) -> Storage:
    path = settings.path
    if path.startswith("hf://"):
        if not path.startswith(HUB) or path.removeprefix(HUB).count("/") > 1 or path == HUB:
            raise ValueError("a dataset's name is written hf://datasets/OWNER/NAME")
        return TableStorage(settings, index, kind="hub", files=(), cache=cache)
    if "\0" in path:
        raise ValueError("there is no such folder")
    if os.path.isdir(path):
        return _open_folder(settings, index, cache)
    files = [path] if os.path.lexists(path) else expand(path)
    lower = path.lower()
    if not files or (files == [path] and not os.path.exists(path)):
        what = "file" if lower.endswith((".tar", ".parquet")) else "folder"
        raise ValueError("nothing matches it" if not files else f"there is no such {what}")
    if lower.endswith(".tar"):
        _refuse(settings, index, TABLE_KEYS, "tars")
        missing = [file for file in files if not os.path.isfile(file)]
        if missing:
            are = "is missing," if len(missing) == 1 else "are missing, first"
            raise ValueError(f"{len(missing)} of its {len(files)} tars {are} {printable(missing[0])}")
        root = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
        return TarStorage(root, [os.path.relpath(os.path.abspath(file), root) for file in files], index)
    if lower.endswith(".parquet"):
        _refuse(settings, index, _HUB_KEYS, "parquet files")
        return TableStorage(settings, index, kind="parquet", files=tuple(files), cache=cache)
    suffix = split_name(os.path.basename(path))[1]
    if suffix in suffixes() or suffix in PLUGINS or suffix in FOREIGN:
        raise ValueError("it is a picture: name its folder")
    raise ValueError("it is no folder, no parquet file and no tar")


def _open_folder(settings: SourceSettings, index: int, cache: Path) -> Storage:
    path = settings.path
    if is_saved_dataset(path):
        _refuse(settings, index, _HUB_KEYS, "a saved dataset")
        return TableStorage(settings, index, kind="saved", files=(), cache=cache)
    tars, tables = _held(path)
    if tables:
        _refuse(settings, index, _HUB_KEYS, "parquet files")
        return TableStorage(settings, index, kind="parquet", files=tuple(tables), cache=cache)
    if tars:
        _refuse(settings, index, TABLE_KEYS, "tars")
        return TarStorage(path, tars, index)
    _refuse(settings, index, [key for key in TABLE_KEYS if key != "caption_column"], "a folder of pictures")
    return FolderStorage(path, index, caption_key=settings.caption_column)


def _held(path: str) -> tuple[list[str], list[str]]:
    """The tars, by name, or the parquet files, by path, that a folder holds instead of pictures.

    Parquet files may lie in `data/`, as they do in a dataset's repository.
    """
    readable = suffixes()
    for folder in (path, os.path.join(path, "data")):
        found: dict[str, list[str]] = {".tar": [], ".parquet": []}
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    suffix = split_name(entry.name)[1]
                    if suffix in readable and not entry.name.startswith("."):
                        return [], []
                    if suffix in found and not entry.name.startswith(".") and entry.is_file(follow_symlinks=False):
                        found[suffix].append(entry.name)
        except OSError:  # the walk will say what is wrong
            return [], []
        if found[".parquet"]:
            return [], sorted(os.path.join(folder, name) for name in found[".parquet"])
        if found[".tar"] and folder == path:
            return sorted(found[".tar"]), []
    return [], []


def _refuse(settings: SourceSettings, index: int, keys: "tuple[str, ...] | list[str]", what: str) -> None:
    """Raises InputError for every one of `keys` that was given, since `what` has no use for it."""
    given = [key for key in keys if getattr(settings, key) != SourceSettings.model_fields[key].default]
    if given:
        path = printable(settings.path)
        raise InputError([f"data.sources.{index}.{key}: {path} is {what}, which has none: remove it." for key in given])
