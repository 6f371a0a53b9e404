"""Adapter files on disk: safetensors only, whole or not at all, the same bytes for the same adapter.

Which keys they hold is a dialect's affair (dialects/); whether another program makes the same of them, verify.py's.
"""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from lorakit.adapters import AdapterState
from lorakit.core.errors import InputError
from lorakit.core.files import (
    folder_aside,
    printable,
    safetensors_bytes,
    sha256_file,
    split_safetensors,
    storage_errors,
    write_bytes,
)
from lorakit.export.dialects import DIALECTS
from lorakit.export.metadata import adapter_metadata
from lorakit.families.protocol import Family, Names

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_PICKLES = {".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle"}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def dtype_name(dtype: torch.dtype) -> str:
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class AdapterFile:
    """What a file holds, before any model gives it meaning; of a folder, keys begin with "<component>/"."""

    path: Path
    format: str
    dtype: torch.dtype
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]

    @property
    def dialect(self) -> ModuleType:
        return DIALECTS.module(self.format)


def write_adapter(
    state: AdapterState,
    path: Path,
    *,
    format: str,
    family: Family,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes `state` in a dialect, weights in `dtype`, in place of what is at `path`; `metadata` is added to our own.

    Raises InputError for an unknown format, a layer that the family does not have, a value that `dtype` cannot hold and
    a path that does not end as the format asks for, StorageError where the disk refuses.
    """
    dialect = DIALECTS.module(format, where="format")
    if (path.suffix == ".safetensors") == dialect.FOLDER:
        what = "a folder, not a file" if dialect.FOLDER else "a file ending in .safetensors"
        raise InputError(f"{printable(path)}: the format {format} is {what}: choose another name.")
    entries = {**adapter_metadata(state, family, name=path.stem), **(metadata or {})}
    tensors, entries = dialect.write(state, family, entries)
    tensors = _cast(tensors, dtype)
    if dialect.FOLDER:
        _write_folder(path, tensors, entries)
    else:
        write_bytes(path, safetensors_bytes(tensors, {**entries, "sshs_model_hash": data_hash(tensors)}))


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    # alphas (single numbers) stay in fp32: half precision would round some
    cast = {k: t.detach().cpu().to(dtype if t.ndim else t.dtype).contiguous() for k, t in tensors.items()}
    lost = [k for k, t in cast.items() if not t.isfinite().all()]
    if lost:
        raise InputError(
            f"{len(lost)} tensors hold values that {dtype_name(dtype)} cannot hold (the first is {lost[0]}): "
            "choose fp32 or bf16; if they are not finite in fp32 either, the training diverged."
        )
    return cast


def _write_folder(path: Path, tensors: Mapping[str, Tensor], entries: Mapping[str, str]) -> None:
    if path.exists():
        raise InputError(f"{printable(path)} exists already: choose another name, or remove it.")
    configs = {name: text for name, text in entries.items() if name.endswith(f"/{CONFIG}")}
    common = {name: text for name, text in entries.items() if name not in configs}
    with folder_aside(path) as aside:
        for name, text in configs.items():
            component = name.removesuffix(f"/{CONFIG}")
            own = {k.removeprefix(f"{component}/"): t for k, t in tensors.items() if k.startswith(f"{component}/")}
            (aside / component).mkdir()
            (aside / component / CONFIG).write_text(text)
            (aside / component / WEIGHTS).write_bytes(safetensors_bytes(own, common))


def data_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of a file's bytes after its header, kohya's `sshs_model_hash`: the same whatever the metadata says."""
    return hashlib.sha256(split_safetensors(tensors)[1]).hexdigest()


def digest(path: Path) -> str:
    """sha256 of a file, or of the names and digests of a folder's files."""
    if path.is_file():
        return sha256_file(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = [f"{sha256_file(file)}  {file.relative_to(path).as_posix()}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_adapter(path: Path | str, *, family: Names, assume_alpha: float | None = None) -> AdapterState:
    """The adapter at `path`, a file or a peft folder of any dialect, as a state for `family`.

    `assume_alpha` is the alpha of layers whose file does not say it. Raises InputError for what is no adapter, a
    pickle, a damaged file, and every key that the family has no place for.
    """
    return interpret(read_file(Path(path)), family=family, assume_alpha=assume_alpha)


def interpret(file: AdapterFile, *, family: Names, assume_alpha: float | None = None) -> AdapterState:
    """What `file` means for `family`; see `read_adapter`."""
    with _named(file.path):
        state: AdapterState = file.dialect.read(file.tensors, file.metadata, family, assume_alpha=assume_alpha)
        return state


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Puts the file's name before each problem met within."""
    try:
        yield
    except InputError as error:
        raise InputError([f"{printable(path)}: {problem}" for problem in error.problems]) from None


def read_file(path: Path) -> AdapterFile:
    """The tensors and metadata at `path`, and their dialect."""
    path = Path(path)
    if path.is_dir():
        tensors, metadata = _read_folder(path)
    else:
        tensors, metadata = _read_tensors(path)
        config = path.with_name(CONFIG)
        if any(key.startswith("base_model.model.") for key in tensors) and config.is_file():
            metadata = {**metadata, CONFIG: _read_text(config)}
    for name in DIALECTS.names():
        if DIALECTS.module(name).recognises(tensors, metadata):
            kinds = Counter({t.dtype: 0 for t in tensors.values() if t.ndim})
            kinds.update(t.dtype for t in tensors.values() if t.ndim)
            dtype = kinds.most_common(1)[0][0] if kinds else torch.float32
            return AdapterFile(path, name, dtype, tensors, metadata)
    some = ", ".join(printable(key) for key in sorted(tensors)[:3]) or "none"
    raise InputError(
        f"{printable(path)} is no LoRA file of a known format ({', '.join(DIALECTS.names())}); its keys are: {some} …"
    )


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if path.suffix.lower() in _PICKLES:
        raise InputError(
            f"{printable(path)} is a pickle, which can run code when it is opened: lorakit reads safetensors only. "
            "Convert it with a program that you trust, or ask for a .safetensors file."
        )
    if not path.is_file():
        raise InputError(f"{printable(path)}: there is no such adapter file.")
    try:
        with storage_errors(path), safe_open(str(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError:
        raise InputError(f"{printable(path)} is no whole safetensors file: it is damaged or cut off.") from None


def _read_folder(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A peft folder of one component, or a folder of such folders."""
    alone = (path / CONFIG).is_file() or (path / WEIGHTS).is_file()
    parts = [path] if alone else sorted(p for p in path.iterdir() if (p / WEIGHTS).is_file() or (p / CONFIG).is_file())
    if not parts:
        pickled = " (it holds a pickle, which is not read)" if any(path.rglob("adapter_model.bin")) else ""
        raise InputError(f"{printable(path)} is no peft folder: there is no {WEIGHTS} in it or below it{pickled}.")
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for part in parts:
        start = "" if alone else f"{part.name}/"
        own, entries = _read_tensors(part / WEIGHTS)
        tensors |= {f"{start}{key}": tensor for key, tensor in own.items()}
        metadata |= entries
        if (part / CONFIG).is_file():
            metadata[f"{start}{CONFIG}"] = _read_text(part / CONFIG)
    return tensors, metadata


def _read_text(path: Path) -> str:
    try:
        with storage_errors(path):
            return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{printable(path)} is no text in UTF-8: the file is damaged.") from None
