"""A component's weights on disk, in one safetensors file or several: read and written tensor by tensor.

Never more than a tensor or two is in memory.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.core.errors import InputError
from lorakit.core.files import printable, storage_errors
from lorakit.export.container import DTYPE_OF, Tensors

_NAMES = ("diffusion_pytorch_model", "model")  # diffusers', transformers'
_NAME_OF = {dtype: name for name, dtype in DTYPE_OF.items()}
_METADATA = {"format": "pt"}
Plan = dict[str, tuple[torch.dtype, int]]  # of each tensor: number format and bytes, as they are to be written


@dataclass(frozen=True)
class Stored:
    """The tensors of a component: `files` by key, in the order of the files; `name` is the files' common one."""

    folder: Path
    name: str
    files: dict[str, Path]
    headers: dict[str, Mapping[str, Any]]

    @classmethod
    def found(cls, folder: Path) -> "Stored | None":
        """The weights in `folder`; None where there are none. Raises InputError where they are no whole safetensors."""
        for name in _NAMES:
            index, single = folder / f"{name}.safetensors.index.json", folder / f"{name}.safetensors"
            if index.is_file():
                paths = [folder / file for file in _listed(index)]
            elif single.is_file():
                paths = [single]
            else:
                continue
            files: dict[str, Path] = {}
            headers: dict[str, Mapping[str, Any]] = {}
            for path in paths:
                tensors = Tensors({"": path})
                files |= dict.fromkeys(tensors, path)
                headers |= tensors.headers
            return cls(folder, name, files, headers)
        others = sorted(p.name for p in folder.glob("*") if p.suffix in (".safetensors", ".bin", ".pt", ".ckpt"))
        if others:
            raise InputError(
                f"{printable(folder)} has its weights in {printable(others[0])}: save it as plain safetensors first "
                f"({_NAMES[0]}.safetensors or {_NAMES[1]}.safetensors)."
            )
        return None

    def read(self, key: str) -> Tensor:
        # not by the library's memory map, of which all that was read stays in memory until the file is let go
        entry, path = self.headers[key], self.files[key]
        start, end = entry["data_offsets"]
        data = bytearray(end - start)
        with storage_errors(path, deed="read"), open(path, "rb") as file:
            file.seek(8 + int.from_bytes(file.read(8), "little") + start)
            read = file.readinto(data)
        if read != len(data):
            raise InputError(f"{printable(path)} has become shorter while it was read.")
        dtype = DTYPE_OF[entry["dtype"]]
        return (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).reshape(entry["shape"])

    def dtype(self) -> torch.dtype:
        """The number format of most bytes."""
        sizes: dict[str, int] = {}
        for entry in self.headers.values():
            sizes[entry["dtype"]] = sizes.get(entry["dtype"], 0) + entry["data_offsets"][1] - entry["data_offsets"][0]
        return DTYPE_OF[max(sizes, key=lambda name: sizes[name])] if sizes else torch.float32

    def size(self) -> int:
        return sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in self.headers.values())


def _listed(index: Path) -> list[str]:
    """The files that an index names."""
    try:
        with storage_errors(index, deed="read"):
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if all(Path(name).name == name for name in names):
            return names
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise InputError(f"{printable(index)} names no files beside it: it is damaged.")


def write_stored(
    stored: Stored,
    folder: Path,
    *,
    dtype: torch.dtype | None,
    max_shard_size: int,
    change: Callable[[str, Tensor], Tensor],
    on_progress: Callable[[int], object] = lambda size: None,
) -> None:
    """Writes `change(key, tensor)` of each tensor to `folder`, floating ones in `dtype`, by default their own.

    A file holds at most `max_shard_size` bytes, or one tensor. `on_progress` is called with the bytes of each tensor.
    """
    plans: list[Plan] = [{}]
    total = filled = 0
    for key, (kept, size) in planned(stored, dtype).items():
        if plans[-1] and filled + size > max_shard_size:
            plans.append({})
            filled = 0
        plans[-1][key] = (kept, size)
        filled += size
        total += size
    names = [
        f"{stored.name}.safetensors"
        if len(plans) == 1
        else f"{stored.name}-{i + 1:05d}-of-{len(plans):05d}.safetensors"
        for i in range(len(plans))
    ]
    for name, plan in zip(names, plans, strict=True):
        write_planned(stored, folder / name, plan, change=change, on_progress=on_progress)
    if len(plans) > 1:
        places = {key: name for name, plan in zip(names, plans, strict=True) for key in plan}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / f"{stored.name}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def planned(stored: Stored, dtype: torch.dtype | None) -> Plan:
    """All tensors of `stored`, floating ones in `dtype`, by default their own."""
    plan = {}
    for key, entry in stored.headers.items():
        own = DTYPE_OF[entry["dtype"]]
        kept = dtype if dtype is not None and own.is_floating_point else own
        plan[key] = (kept, kept.itemsize * torch.Size(entry["shape"]).numel())
    return plan


def write_planned(
    stored: Stored,
    path: Path,
    plan: Plan,
    *,
    change: Callable[[str, Tensor], Tensor],
    metadata: Mapping[str, str] = _METADATA,
    on_progress: Callable[[int], object] = lambda size: None,
) -> None:
    """Writes `change(key, tensor)` of the tensors of `plan` as one file."""
    with open(path, "wb") as file:
        file.write(_header(stored, plan, metadata))
        for key, (kept, size) in _aligned(plan):
            data = change(key, stored.read(key)).to(kept).contiguous()
            if not _finite(data):
                raise InputError(
                    f"{printable(key)} has values that {_NAME_OF[kept].lower()} cannot hold: ask for fp32 or bf16."
                )
            file.write(data.reshape(-1).view(torch.uint8).numpy().data)
            on_progress(size)


def _finite(data: Tensor) -> bool:
    """Without a tensor of answers as large as `data` itself."""
    return not data.is_floating_point() or not data.numel() or all(x.isfinite() for x in torch.aminmax(data))


def _aligned(plan: Plan) -> list[tuple[str, tuple[torch.dtype, int]]]:
    """Larger numbers first, so that each lies at a multiple of its size."""
    return sorted(plan.items(), key=lambda item: -item[1][0].itemsize)


def _header(stored: Stored, plan: Plan, metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    start = 0
    for key, (kept, size) in _aligned(plan):
        shape = stored.headers[key]["shape"]
        entries[key] = {"dtype": _NAME_OF[kept], "shape": shape, "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
