"""Checkpoints: all that a resumed run needs, whole or not at all, safetensors and JSON only.

A checkpoint is a folder `step-000200` with `adapter.safetensors`, `optimizer.safetensors`, where there is an average
`ema.safetensors`, `state.json` and `manifest.json` (sha256 and size of each). What the tensors mean is known where they
come from: adapters/state.py, optimizers/state.py, adapters/ema.py.
"""

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from lorakit.core.errors import DivergedError, InputError
from lorakit.core.files import (
    folder_aside,
    json_bytes,
    on_cpu,
    printable,
    remove_folder,
    rename,
    safetensors_bytes,
    sha256_file,
    storage_errors,
)
from lorakit.training.metrics import records

MANIFEST, STATE = "manifest.json", "state.json"
_NEEDED = {"adapter.safetensors", "optimizer.safetensors", STATE}
_AGAIN = ".again"  # ends the name of a checkpoint that is about to take the place of another of the same step


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, read: `tensors["adapter"]` and the other files' by name, and the `state` dictionary."""

    path: Path
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def save(
    folder: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
    state: Mapping[str, Any],
) -> Path:
    """Writes `folder/step-…` with a file for each of `tensors`, `metadata` into the adapter's. `state` has the `step`.

    It appears complete or not at all: StorageError where the disk refuses, DivergedError naming what is not finite.
    Checkpoints of this step and later ones are then gone: the run was resumed from before them.
    """
    ready = {name: on_cpu(part) for name, part in tensors.items()}
    lost = [f"{name}.{key}" for name, part in ready.items() for key, t in part.items() if not _finite(t)]
    lost += [f"state.{key}" for key in _not_finite(state)]
    if lost:
        raise DivergedError(
            f"Step {step} was not saved, {len(lost)} of its values are not finite (the first is {lost[0]}): "
            "lower optimizer.lr. The checkpoints before it are good."
        )
    path = folder / name_of(step)
    # beside one of the same step, which goes only when this one is whole: it may be the only one
    target = path.with_suffix(_AGAIN) if path.exists() else path
    if target.exists():
        remove_folder(target)
    manifest = {}
    with folder_aside(target) as aside:
        for name, data in _contents(ready, metadata or {}, state):
            (aside / name).write_bytes(data)
            manifest[name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        (aside / MANIFEST).write_bytes(json_bytes(manifest))
    for other in listed(folder):
        if step_of(other) >= step and other != target:
            remove_folder(other)
    if target != path:
        rename(target, path)
    return path


def _contents(
    tensors: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, str], state: Mapping[str, Any]
) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each file, one at a time: they may be large."""
    for name, part in tensors.items():
        yield f"{name}.safetensors", safetensors_bytes(part, metadata if name == "adapter" else {})
    yield STATE, json_bytes(state)


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _not_finite(value: Any) -> Iterator[str]:
    """The dotted keys in `value`, of dictionaries and lists, under which lies a number that is not finite."""
    listed = enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, item in value.items() if isinstance(value, Mapping) else listed:
        if isinstance(item, float) and not math.isfinite(item):
            yield str(key)
        yield from (f"{key}.{rest}" for rest in _not_finite(item))


def damage(path: Path) -> str | None:
    """What is wrong with the checkpoint at `path`, or None. Every changed byte and a changed name are seen."""
    name = MANIFEST
    try:
        text = (path / MANIFEST).read_bytes()
        manifest = json.loads(text)
        if json_bytes(manifest) != text or not manifest.keys() >= _NEEDED:
            return f"{MANIFEST} is not as it was written"
        for name, entry in manifest.items():
            if (path / name).stat().st_size != entry["size"]:
                return f"{name} has another size than its manifest says"
            if sha256_file(path / name) != entry["sha256"]:
                return f"{name} has another content than its manifest says"
        name = STATE
        if (step := json.loads((path / STATE).read_bytes())["step"]) != step_of(path):
            return f"it is of step {step}, so the folder was renamed"
    except FileNotFoundError:
        return f"{printable(name)} is missing"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return f"{printable(name)} cannot be read ({type(error).__name__})"
    # hidden ones are a file manager's or a file server's
    others = [file.name for file in path.iterdir() if file.name not in {*manifest, MANIFEST} and file.name[0] != "."]
    return f"{printable(others[0])} does not belong there" if others else None


def load(path: Path) -> Checkpoint:
    """The checkpoint at `path`, taken to be whole (see `damage`)."""
    with storage_errors(path, deed="read"):
        names = [name for name in json.loads((path / MANIFEST).read_bytes()) if name != STATE]
        tensors = {name.removesuffix(".safetensors"): load_file(path / name) for name in names}
        return Checkpoint(path, tensors, json.loads((path / STATE).read_bytes()))


def listed(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    found = [path for path in folder.glob("step-*") if path.is_dir() and path.suffix in ("", _AGAIN)]
    return sorted((path for path in found if path.stem[5:].isdecimal()), key=lambda path: (step_of(path), path.name))


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
            [
                *skipped,
                f"No checkpoint in {printable(folder)} can be used: train again into another folder, with "
                "adapter.init_from if you like: the adapters of the saved steps are in the folder adapters beside it.",
            ]
        )
    return None, []


def prune(folder: Path, *, keep_last: int, keep_every: int = 0, keep: Collection[int] = ()) -> None:
    """Removes all but the newest `keep_last` checkpoints (0 keeps all), those of a step that `keep_every` divides
    (0: none) and those of the steps in `keep`. Raises StorageError where the disk refuses."""
    for path in listed(folder)[: -keep_last or None] if keep_last else []:
        step = step_of(path)
        if step not in keep and not (keep_every and step % keep_every == 0):
            remove_folder(path)


def best_steps(validations: Path, folder: Path, count: int) -> list[int]:
    """The steps of the `count` checkpoints in `folder` with the lowest loss in the file `validations`, best first.

    Of a step that was not validated nothing is known: it is none of them.
    """
    losses = {
        r["step"]: r["loss"]
        for r in records(validations)
        if isinstance(r.get("loss"), float) and math.isfinite(r["loss"])
    }
    there = {step_of(path) for path in listed(folder)} & losses.keys()
    return sorted(there, key=lambda step: (losses[step], step))[:count]
