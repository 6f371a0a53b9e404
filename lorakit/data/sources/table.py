"""Tables of `datasets`: saved to disk, in parquet files, or by name on the hub.

Here: where rows are and what their columns say. Not here: rows that are read as they come (`imports.py`).
"""

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lorakit.core.digests import stamp_of
from lorakit.core.files import make_folder, printable
from lorakit.core.types import Place
from lorakit.data.sources import sidecars
from lorakit.data.sources.columns import Columns
from lorakit.data.sources.imports import import_rows
from lorakit.data.sources.items import MAX_PICTURE_BYTES, Found, Item, read_regular
from lorakit.data.sources.settings import SourceSettings
from lorakit.data.sources.tars import TarStorage
from lorakit.data.upkeep import touch

HUB = "hf://datasets/"
Kind = Literal["saved", "parquet", "hub"]
_BATCH = 1000
_INPUT = "input"  # a place's file, of a row's picture to begin with


def is_saved_dataset(path: str) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    held = [os.path.isfile(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json")]
    return held[0] or (held[1] and os.path.isfile(os.path.join(path, "dataset_info.json")))


def row_name(number: int) -> str:
    """The name of a table's row."""
    return f"row-{number:08d}"


class TableStorage:
    """The rows of a table; with `streaming` they are copied once into tars in the cache, and read there."""

    def __init__(self, settings: SourceSettings, index: int, *, kind: Kind, files: Sequence[str], cache: Path) -> None:
        self._settings = settings
        self._split = settings.split or "train"
        self._index = index
        self._kind = kind
        self._files = tuple(files)
        self._cache = cache
        self._lock = threading.Lock()
        self._table: Any = None
        if settings.streaming and kind == "saved":
            raise ValueError("a saved dataset is read where it lies: remove streaming")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_table", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _table=None, _lock=threading.Lock())

    @property
    def writes(self) -> bool:
        """Whether listing the rows writes into the cache."""
        return self._kind != "saved"

    @property
    def identity(self) -> str:
        s = self._settings
        if self._imported is not None:
            return self._imported.identity
        path = s.path if self._kind == "hub" else os.path.realpath(s.path)
        given = [s.input_column] if s.input_column is not None else []
        return json.dumps([path, s.subset, self._split, s.revision, s.image_column, *given])

    def label(self, name: str) -> str:
        return f"{printable(self._settings.path)}: {printable(name)}"

    def caption_advice(self, name: str) -> str:
        return "write one into the dataset"

    def read(self, place: Place) -> bytes:
        if self._imported is not None:
            return self._imported.read(place)
        column = self._settings.input_column if place.file == _INPUT else self._settings.image_column
        value = self._open()[place.start][column]
        if isinstance(value, Mapping):
            if value.get("bytes") is None and value.get("path"):
                return self._read_file(value["path"])
            value = value.get("bytes")
        if value is None:
            raise ValueError("its row holds no picture: fill or remove it")
        return bytes(value)

    def _read_file(self, name: str) -> bytes:
        """The picture that a row only names."""
        if self._kind == "hub":
            raise ValueError("its row holds only a path: that is read of datasets on disk alone")
        first = self._files[0] if self._files else os.path.join(self._settings.path, "row")
        root = os.path.realpath(os.path.dirname(first))
        path = os.path.realpath(os.path.join(root, name))
        if not path.startswith(root.rstrip("/") + "/"):
            raise ValueError(f"its row names {printable(name)}, outside the dataset's folder: put the picture into it")
        return read_regular(path, MAX_PICTURE_BYTES)

    def items(self, found: Found) -> Iterator[Item]:
        setting = f"data.sources.{self._index}"
        try:
            if self._imported is not None:
                import_rows(self._copied_to("imports"), self._stream, self._settings, needs_caption=self._needs_caption)
                yield from self._imported.items(found)
                return
            table = self._open()
            columns = Columns(table.features, self._settings, needs_caption=self._needs_caption)
        except ValueError as error:
            found.problems.append(f"{setting}.path = {printable(self._settings.path)}: {error}.")
            return
        stamp = self._stamp(table)
        number = 0
        told = table.select_columns(columns.told)
        for batch in told.iter(batch_size=_BATCH) if columns.told else ():
            for values in zip(*(batch[name] for name in columns.told)):
                yield self._item(number, columns.said(dict(zip(columns.told, values))), stamp)
                number += 1
        for rest in range(number, len(table)):
            yield self._item(rest, sidecars.Said(), stamp)

    def _item(self, number: int, said: "sidecars.Said | str", stamp: str) -> Item:
        name, place = row_name(number), Place("", number)
        given = None if self._settings.input_column is None else Place(_INPUT, number)
        item = Item(name, place, ("",), stamp, input=given, input_stamp=stamp)
        if isinstance(said, str):
            return item._replace(problems=(f"{self.label(name)}: {said}.",))
        return item._replace(captions=said.captions, box=said.box)

    @property
    def _needs_caption(self) -> bool:
        return not (self._settings.allow_missing_captions or self._settings.default_caption)

    @property
    def _picture_columns(self) -> list[str]:
        return [column for column in (self._settings.image_column, self._settings.input_column) if column is not None]

    # -- where the rows are --------------------------------------------------------------------------------------

    def _open(self) -> Any:
        """The table, its pictures undecoded; ValueError says why there is none."""
        with self._lock:
            if self._table is None:
                table = self._load()
                for column in self._picture_columns:
                    table = undecoded(table, column)
                self._table = table
            return self._table

    def _load(self) -> Any:
        import datasets

        s = self._settings
        if self._kind != "saved":
            return self._load_dataset(streaming=False)
        try:
            with _no_bars():
                loaded = datasets.load_from_disk(s.path)
        except Exception as error:  # whatever pyarrow, fsspec and datasets raise of damaged files
            raise ValueError(f"the dataset cannot be read ({_reason(error)}): save it again") from None
        if isinstance(loaded, datasets.DatasetDict):
            if self._split not in loaded:
                raise ValueError(f"there is no split {self._split!r}, only {', '.join(map(repr, loaded))}: set split")
            return loaded[self._split]
        if s.split is not None and str(loaded.split) != s.split:
            raise ValueError("it is one dataset without that split: remove split")
        return loaded

    def _load_dataset(self, *, streaming: bool) -> Any:
        import datasets

        s = self._settings
        try:
            if self._kind == "hub":
                name = s.path.removeprefix(HUB)
                with _no_bars():
                    return datasets.load_dataset(
                        name, s.subset, split=self._split, revision=s.revision, streaming=streaming
                    )
            # so that datasets writes its copy there and not beside the files
            copies = make_folder(self._copied_to("datasets"))
            touch(copies)
            files = {self._split: split_files(self._files, self._split)}
            with _no_bars():
                return datasets.load_dataset(
                    "parquet", data_files=files, split=self._split, cache_dir=str(copies), streaming=streaming
                )
        except ValueError as error:
            raise ValueError(f"the dataset cannot be read: {_reason(error)}") from None
        except Exception as error:
            advice = "check its name, subset, split and the network" if self._kind == "hub" else "check its files"
            raise ValueError(f"the dataset cannot be read ({_reason(error)}): {advice}") from None

    def _stream(self) -> Any:
        return undecoded(self._load_dataset(streaming=True), self._settings.image_column)

    def _copied_to(self, kind: str) -> Path:
        """The folder for a copy of this table as it is now."""
        s = self._settings
        state = [(os.path.realpath(file), stamp_of(os.stat(file))) for file in self._files]
        parts = [s.path, s.subset, self._split, s.revision, s.image_column, s.caption_column, state]
        digest = hashlib.sha256(json.dumps(parts).encode("utf-8", "surrogatepass")).hexdigest()
        return self._cache / kind / digest[:32]

    @property
    def _imported(self) -> TarStorage | None:
        """The tars that the rows are in, whether they are there yet or not."""
        if not self._settings.streaming:
            return None
        root = self._copied_to("imports")
        touch(root)
        files = sorted(path.name for path in root.glob("*.tar"))
        return TarStorage(str(root), files, self._index, rows=True)

    def _stamp(self, table: Any) -> str:
        """What every row's stamp is: one text for all files; "" where rows only name files, which change unseen."""
        for chunk in (chunk for column in self._picture_columns for chunk in table.data.column(column).chunks):
            if str(chunk.type).startswith("struct") and chunk.field("bytes").null_count:
                return ""
        files = self._files or [entry["filename"] for entry in table.cache_files]
        try:
            stamps = [stamp_of(os.stat(file)) for file in files]
        except OSError:
            return ""
        parts = [stamp.split("-") for stamp in stamps]
        if self._kind == "hub":  # its copy here is written once and never again
            parts = [[part[0], "0", "0", part[3]] for part in parts]
        digest = hashlib.sha256(" ".join("-".join(part) for part in parts).encode()).hexdigest()[:32]
        latest = [max((int(part[k]) for part in parts), default=0) for k in (1, 2)]
        return f"{sum(int(part[0]) for part in parts)}-{latest[0]}-{latest[1]}-{digest}"


def split_files(files: Sequence[str], split: str) -> list[str]:
    """Of parquet files those of a split, where their names tell splits, as in `train-00000-of-00004.parquet`."""
    known = ("train", "test", "validation", "valid", "val", "dev")
    told = {file: next((w for w in known if os.path.basename(file).lower().startswith(w)), None) for file in files}
    if split != "train" or all(told.values()):
        chosen = [file for file in files if os.path.basename(file).startswith(split)]
        if not chosen:
            names = ", ".join(printable(os.path.basename(file)) for file in files[:10])
            raise ValueError(f"there is no split {split!r} among {names}: set split")
        return chosen
    return list(files)


def undecoded(table: Any, column: str) -> Any:
    """The table with its pictures as bytes."""
    import datasets

    features = table.features
    if features is not None and isinstance(features.get(column), datasets.Image):
        return table.cast_column(column, datasets.Image(decode=False))
    return table


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """No bars of datasets' own among our output meanwhile, unless its environment variable asks for them."""
    import datasets

    shown = not datasets.are_progress_bars_disabled() and datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS is None
    if shown:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {printable(lines[0])[:300]}" if lines else type(error).__name__
