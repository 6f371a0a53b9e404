"""A table's rows copied into tars as they come: what was read once is never downloaded again.

Each tar is written whole or not at all and holds SHARD_ROWS rows, so that a copy that was cut off goes on behind its
last one.
"""

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from lorakit.core.errors import StorageError
from lorakit.core.files import make_folder, printable, write_json, written_aside
from lorakit.data.sources.columns import Columns
from lorakit.data.sources.settings import SourceSettings

SHARD_ROWS = 500
_DONE = "done.json"
# pictures are told by their content: the suffix only says that it is one
_SUFFIX = ".png"


def import_rows(folder: Path, stream: Callable[[], Any], settings: SourceSettings, *, needs_caption: bool) -> None:
    """Copies all rows of `stream()` into tars in `folder`, unless they are there.

    Raises ValueError where the rows cannot be read; those that could be are kept. StorageError as writing does.
    """
    if (folder / _DONE).is_file():
        return
    try:
        rows = stream()
        features = rows.features if rows.features is not None else next(iter(rows))
        columns = Columns(features, settings, needs_caption=needs_caption)
        shard = len(list(folder.glob("*.tar")))
        numbered = enumerate(rows.skip(shard * SHARD_ROWS) if shard else rows, shard * SHARD_ROWS)
        make_folder(folder)
        while batch := _first_of(numbered):
            _write(folder / f"{shard:06d}.tar", batch, columns, settings)
            shard += 1
    except (ValueError, StorageError):
        raise
    except Exception as error:  # the network, a damaged file
        reason = f"{type(error).__name__}: {printable(error)[:300]}"
        raise ValueError(f"its rows cannot be read ({reason}): try again, what was read is kept") from None
    write_json(folder / _DONE, {"shards": shard})


def _first_of(rows: Iterator[tuple[int, Any]]) -> "Iterable[tuple[int, Any]] | None":
    """The next rows for one tar, as they come; None at the end."""
    first = next(rows, None)
    return None if first is None else _chained(first, rows)


def _chained(first: tuple[int, Any], rows: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    yield first
    yield from islice(rows, SHARD_ROWS - 1)


def _write(
    path: Path, rows: Iterable[tuple[int, Mapping[str, Any]]], columns: Columns, settings: SourceSettings
) -> None:
    with written_aside(path) as aside, tarfile.open(aside, "w") as tar:
        for number, row in rows:
            name = f"row-{number:08d}"
            picture = row[settings.image_column]
            if isinstance(picture, Mapping):
                picture = picture.get("bytes")
            # a row without a picture stays: it is named as a bad one when it is looked at
            _add(tar, name + _SUFFIX, bytes(picture or b""))
            said = {key: row[key] for key in columns.told if row.get(key) is not None}
            if columns.caption in said:
                said["caption"] = said.pop(str(columns.caption))
            if said:
                _add(tar, f"{name}.json", json.dumps(said).encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
