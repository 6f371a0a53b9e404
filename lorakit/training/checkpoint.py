"""Checkpoints: all that a resumed run needs, whole or not at all, safetensors and JSON only.

A checkpoint is a folder `step-000200` with `adapter.safetensors`, `optimizer.safetensors`, `state.json` and
`manifest.json` (sha256 and size of each). Optimizer state is kept by parameter name.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lorakit.core.errors import InputError
from lorakit.core.files import folder_aside, printable, sha256_file, write_json, write_tensors

FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, read: `adapter` and `optimizer` tensors by name and the `state` dictionary."""

    path: Path
    adapter: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's state as tensors named `<parameter>.<entry>`."""
    tensors = {}
    for name, parameter in parameters.items():
        for entry, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}.{entry}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return tensors


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Puts back what `optimizer_tensors` took; every tensor is used."""
    for full_name, tensor in tensors.items():
        name, _, entry = full_name.rpartition(".")
        parameter = parameters[name]
        optimizer.state[parameter][entry] = tensor.to(parameter.device, copy=True)


def save(
    folder: Path,
    step: int,
    *,
    adapter: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes `folder/step-…`, `metadata` into its adapter; it appears complete or, with StorageError, not at all."""
    path = folder / name_of(step)
    if path.exists():  # an older attempt at the same step, cut off by a resume from before it
        shutil.rmtree(path)
    with folder_aside(path) as aside:
        write_tensors(aside / FILES[0], adapter, metadata)
        write_tensors(aside / FILES[1], optimizer)
        write_json(aside / FILES[2], state)
        manifest = {
            name: {"sha256": sha256_file(aside / name), "size": (aside / name).stat().st_size} for name in FILES
        }
        write_json(aside / "manifest.json", manifest)
    return path


def damage(path: Path) -> str | None:
    """What is wrong with the checkpoint at `path`, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name in FILES:
            if (path / name).stat().st_size != manifest[name]["size"]:
                return f"{name} has another size than its manifest says"
            if sha256_file(path / name) != manifest[name]["sha256"]:
                return f"{name} has another content than its manifest says"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its manifest cannot be read ({type(error).__name__})"
    return None


def load(path: Path) -> Checkpoint:
    """The checkpoint at `path`, taken to be whole (see `damage`)."""
    state = json.loads((path / FILES[2]).read_text())
    return Checkpoint(path, load_file(path / FILES[0]), load_file(path / FILES[1]), state)


def listed(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted((p for p in folder.glob("step-*") if p.is_dir() and p.name[5:].isdigit()), key=step_of)


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and why newer ones were passed over.

    None where there is no checkpoint at all. Raises InputError where there are some and none verifies.
    """
    skipped: list[str] = []
    for path in reversed(listed(folder)):
        reason = damage(path)
        if reason is None:
            return load(path), skipped
        skipped.append(f"{printable(path.name)} is damaged: {reason}.")
    if skipped:
        raise InputError(
            [*skipped, f"No checkpoint in {printable(folder)} can be used: train again into another folder."]
        )
    return None, []


def prune(folder: Path, *, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints; 0 keeps all."""
    if keep:
        for path in listed(folder)[:-keep]:
            shutil.rmtree(path)
