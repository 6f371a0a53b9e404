"""Files that appear whole or not at all: written aside, synced, renamed.

Every write of lorakit goes through here. A full disk or a missing permission becomes StorageError, with the path and
what to do.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorakit.core.errors import StorageError

_REMEDY = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EFBIG: "a file may not be that large there: choose another file system or raise the limit (ulimit -f)",
    errno.EACCES: "no permission to write there: choose another folder or change its permissions",
    errno.EPERM: "no permission to write there: choose another folder or change its permissions",
    errno.EROFS: "that file system is read-only: choose another folder",
    errno.EIO: "the disk reports an input/output error: check it",
    errno.ESTALE: "the file server lost sight of it: see that its folder is mounted",
}


@contextlib.contextmanager
def storage_errors(path: Path, *, deed: str = "written") -> Iterator[None]:
    """Turns an OSError of the disk met while `path` is written, or read, into StorageError; other OSErrors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REMEDY:
            raise
        raise StorageError(f"{printable(path)} could not be {deed}: {_REMEDY[error.errno]}") from error
    except Exception as error:
        # safetensors wraps an OSError in its own error and keeps only the text
        for number, remedy in _REMEDY.items():
            if f"os error {number})" in str(error):
                raise StorageError(f"{printable(path)} could not be {deed}: {remedy}") from error
        raise


def make_folder(path: Path) -> Path:
    with storage_errors(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileNotFoundError, NotADirectoryError, FileExistsError) as error:  # in /proc; below a file
            raise StorageError(f"{path} cannot be made a folder ({error.strerror}): choose another one") from error
    return path


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file under; it takes the place of `path` on success and is removed on failure."""
    make_folder(path.parent)
    aside = _aside(path)
    try:
        with storage_errors(path):
            yield aside
            _sync(aside)
            os.replace(aside, path)
            _sync(path.parent)
    finally:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            aside.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """A folder beside `path` to fill; it takes the place of `path` (which must not exist) on success."""
    make_folder(path.parent)
    with storage_errors(path):
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        with storage_errors(path):
            yield aside
            for file in sorted(aside.rglob("*")):
                _sync(file)
            _sync(aside)
            aside.chmod(0o755)
            os.rename(aside, path)
            _sync(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Removes the folder at `path`, which disappears at once; what a kill leaves of it is named like other litter."""
    aside = _aside(path)
    shutil.rmtree(aside, ignore_errors=True)  # where an earlier removal failed
    try:
        with storage_errors(path):
            os.rename(path, aside)
            _sync(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def rename(source: Path, target: Path) -> None:
    """Gives a synced file or folder another name beside it."""
    with storage_errors(target):
        os.rename(source, target)
        _sync(target.parent)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def litter(folder: Path) -> list[Path]:
    """What killed processes were writing or removing directly in `folder`."""
    return sorted(folder.glob(".*.*.tmp"))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some file systems know no sync of a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> None:
    with written_aside(path) as aside:
        aside.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`value` as JSON; a NaN or infinity in it is a bug and raises ValueError."""
    write_bytes(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode(errors="backslashreplace")  # half a surrogate, as in an undecodable name: its JSON escape


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file of `tensors` (moved to the CPU, made contiguous), the same bytes for the same content."""
    write_bytes(path, safetensors_bytes(on_cpu(tensors), metadata or {}))


def on_cpu(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """`tensors` as a file can take them: on the CPU, contiguous."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def safetensors_bytes(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with the metadata in sorted order.

    The library writes metadata in the order of a hash map that is seeded anew in each process: two equal files would
    differ in their bytes.
    """
    header, data = split_safetensors(tensors)
    entries = {"__metadata__": dict(sorted(metadata.items())), **header}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, data])


def split_safetensors(tensors: Mapping[str, Any]) -> tuple[dict[str, Any], memoryview]:
    """Header, without metadata, and data of a safetensors file of `tensors` in sorted order."""
    from safetensors.torch import save

    whole = save({name: tensors[name] for name in sorted(tensors)})
    length = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + length]), memoryview(whole)[8 + length :]


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def printable(text: object) -> str:
    """`text` on one line with control characters escaped, so that a file's name cannot steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))


def size(number: float) -> str:
    """`number` of bytes with a unit that suits it."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:,.0f} {unit}" if unit == "bytes" else f"{number:,.1f} {unit}"
        number /= 1000
    return f"{number:,.1f} TB"
