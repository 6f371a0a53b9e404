"""What an adapter file or peft folder holds, before it means anything: tensors, read when asked for, and metadata.

A file is taken as it is or not at all: what safetensors itself lets pass (a name that is given twice) is refused here.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.core.errors import InputError
from lorakit.core.files import printable, storage_errors
from lorakit.export.digests import DIGEST

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PICKLES = {".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle"}
DTYPE_OF = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
}
_LONGEST_HEADER = 100_000_000  # the library's own limit


class Tensors(Mapping[str, Tensor]):
    """The tensors of safetensors files, each read when it is asked for; its keys begin with its file's prefix."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        """`files` by prefix. Raises InputError for what is no whole safetensors file."""
        self.metadata: dict[str, str] = {}
        self.headers: dict[str, Mapping[str, Any]] = {}
        self._handles: dict[str, tuple[Any, str]] = {}
        for prefix, path in files.items():
            handle, header = _opened(path)
            entries = dict(handle.metadata() or {})
            if DIGEST in entries:  # of its own file, where there are several
                self.metadata[prefix + DIGEST] = entries.pop(DIGEST)
            self.metadata |= entries
            for key, entry in header.items():
                self.headers[prefix + key] = entry
                self._handles[prefix + key] = (handle, key)

    def __getitem__(self, key: str) -> Tensor:
        handle, name = self._handles[key]
        tensor: Tensor = handle.get_tensor(name)
        return tensor

    def __contains__(self, key: object) -> bool:
        return key in self._handles

    def __iter__(self) -> Iterator[str]:
        return iter(self._handles)

    def __len__(self) -> int:
        return len(self._handles)


def open_adapter(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Tensors and metadata of the file or folder at `path`; a folder's configurations are among the metadata.

    Raises InputError for what is missing, damaged, a pickle or no adapter folder, StorageError where it cannot be read.
    """
    if path.is_dir():
        return _folder(path)
    tensors = Tensors({"": path})
    config = path.with_name(CONFIG)
    if path.name == WEIGHTS and config.is_file():
        return tensors, {**tensors.metadata, CONFIG: _text(config)}
    return tensors, tensors.metadata


def _folder(path: Path) -> tuple[Tensors, dict[str, str]]:
    """A peft folder of one component, or a folder of such folders."""
    alone = (path / CONFIG).is_file() or (path / WEIGHTS).is_file()
    with storage_errors(path, deed="read"):
        inner = [path] if alone else sorted(p for p in path.iterdir() if p.is_dir())
    parts = {p: "" if alone else f"{p.name}/" for p in inner if (p / WEIGHTS).is_file() or (p / CONFIG).is_file()}
    if not parts:
        pickled = " (it holds a pickle, which is not read)" if any(path.rglob("adapter_model.bin")) else ""
        raise InputError(f"{printable(path)} is no peft folder: there is no {WEIGHTS} in it or below it{pickled}.")
    tensors = Tensors({start: part / WEIGHTS for part, start in parts.items()})
    configs = {f"{start}{CONFIG}": _text(part / CONFIG) for part, start in parts.items() if (part / CONFIG).is_file()}
    return tensors, {**tensors.metadata, **configs}


def _opened(path: Path) -> tuple[Any, dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    if path.suffix.lower() in _PICKLES:
        raise InputError(
            f"{printable(path)} is a pickle, which can run code when it is opened: lorakit reads safetensors only. "
            "Convert it with a program that you trust, or ask for a .safetensors file."
        )
    if not path.is_file():
        raise InputError(f"{printable(path)}: there is no such adapter file.")
    try:
        with storage_errors(path, deed="read"):
            handle = safe_open(str(path), framework="pt")
            header = _header(path)
    except (SafetensorError, ValueError, RecursionError):
        raise InputError(f"{printable(path)} is no whole safetensors file: it is damaged or cut off.") from None
    strange = sorted({str(entry["dtype"]) for entry in header.values()} - DTYPE_OF.keys())
    if strange:
        raise InputError(f"{printable(path)} holds numbers of the kind {', '.join(strange)}, which no adapter has.")
    return handle, header


def _header(path: Path) -> dict[str, Any]:
    """The tensors' entries in a header that the library has taken; ValueError where a name is given twice."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _LONGEST_HEADER:
            raise ValueError("header too large")
        header = json.loads(file.read(length), object_pairs_hook=_once)
    header.pop("__metadata__", None)
    return dict(header)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice")
    return found


def _text(path: Path) -> str:
    try:
        with storage_errors(path, deed="read"):
            return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{printable(path)} is no text in UTF-8: the file is damaged.") from None
