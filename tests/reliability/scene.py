"""A small training for the reliability tests: its recipe as a file, and what two runs of it differ in."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorakit.recipe import apply_override, build
from tests.verbs.conftest import write_pictures

# how long things took, who held the folder, how a run ended, where it lies
OWN = ("recipe.toml", "lock", "exit.json", "control")


def write_recipe(folder: Path, name: str, *overrides: str, model: str, cache: Path | None = None) -> Path:
    """folder/name.toml, a training of the tiny model on the seven pictures in folder/photos, run into folder/name.

    Ten steps of two micro steps, with checkpoints, validations and pictures on the way.
    """
    if not (folder / "photos").exists():
        write_pictures(folder / "photos", 7)
    values: dict[str, Any] = {
        "model": {"path": model},
        "adapter": {"rank": 2, "targets": ["to_q", "to_v"]},
        "data": {
            "sources": [{"path": str(folder / "photos")}],
            "cache": str(cache or folder / "cache"),
            "buckets": {"resolution": 32},
            "validation": 0.2,
        },
        "optimizer": {"lr": 0.01},
        "run": {
            "output": str(folder / name),
            "steps": 10,
            "batch_size": 2,
            "accumulate": 2,
            "save_every": 2,
            "keep_last": 2,
            "sample_every": 5,
            "validate_every": 4,
            "save_dtype": "fp32",
            "precision": "fp32",
        },
        "sample": {"prompts": ["thing 1"], "steps": 1, "width": 32, "height": 32},
    }
    for override in overrides:
        apply_override(values, override)
    file = folder / f"{name}.toml"
    file.write_text(build(values).to_toml())
    return file


def left(run: Path) -> dict[str, Any]:
    """What a run left that must not depend on how it came about: its metrics without the time, line by line and key by
    key, floats in hex, and the bytes of its other files."""
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.is_dir() or name in OWN or name == "report.html":
            continue
        if name in ("metrics.jsonl", "validation.jsonl"):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                values = json.loads(line)
                found |= {f"{name}:{number}:{key}": _exact(v) for key, v in values.items() if key != "seconds"}
        else:
            found[name] = path.read_bytes()
    return found


def _exact(value: Any) -> Any:
    return value.hex() if isinstance(value, float) else value


def differences(one: Path, other: Path) -> list[str]:
    """The names of what differs between two runs, and of what only one has."""
    a, b = left(one), left(other)
    assert "adapter.safetensors" in a and any(name.startswith("metrics.jsonl:1:") for name in a), (
        f"{one} is no whole run"
    )
    return [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]


def micro_steps(traces: Sequence[Sequence[dict[str, Any]]]) -> dict[str, set[str]]:
    """By the numbers of its samples, all that micro steps were computed on: noise, timesteps, latents, captions."""
    found: dict[str, set[str]] = {}
    for trace in traces:
        for line in trace:
            if line["event"] == "micro":
                found.setdefault(str(line["numbers"]), set()).add(json.dumps(line, sort_keys=True))
    return found
