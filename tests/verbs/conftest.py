"""A small data set, and a recipe on the tiny model that trains in about a second; and processes that work together."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.state import PartialState
from PIL import Image

from lorakit.families import sd
from lorakit.recipe import Recipe, apply_override, build


def write_pictures(folder: Path, count: int, *, first: int = 0) -> Path:
    """Noise pictures of three aspect ratios with captions beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        width, height = ((64, 64), (96, 48), (48, 96))[i % 3]
        noise = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"thing {i}")
    return folder


def in_processes(count: int, action: Callable[[], object]) -> list[int]:
    """How `count` processes end that do the same, with the environment of a launcher."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]

    def run(rank: int) -> None:
        if count > 1:
            names = {"WORLD_SIZE": count, "RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
            PartialState._reset_state()  # it knows how many there were in the process that was forked
        action()

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=run, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


@pytest.fixture
def make_recipe(tmp_path: Path) -> Callable[..., Recipe]:
    """`make_recipe("name", "run.steps=3", …)`: a recipe on seven pictures, run into the folder tmp_path/name."""

    def make(name: str, *overrides: str) -> Recipe:
        photos = tmp_path / "photos"
        if not photos.exists():
            write_pictures(photos, 7)
        values: dict[str, Any] = {
            "model": {"path": str(sd.tiny().path)},
            "adapter": {"rank": 2, "targets": ["to_q", "to_k", "to_v"]},
            "data": {
                "sources": [{"path": str(photos)}],
                "cache": str(tmp_path / "cache"),
                "buckets": {"resolution": 32},
            },
            "optimizer": {"lr": 0.01},
            "run": {
                "output": str(tmp_path / name),
                "steps": 6,
                "batch_size": 2,
                "accumulate": 2,
                "save_every": 3,
                "save_dtype": "fp32",
                "precision": "fp32",
            },
            "sample": {"prompts": ["thing 1"], "steps": 2, "width": 32, "height": 32},
        }
        for override in overrides:
            apply_override(values, override)
        return build(values)

    return make
