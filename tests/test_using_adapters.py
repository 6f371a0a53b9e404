"""docs/using-adapters.md: its Python runs as it stands, its commands parse, its pictures are there and small."""

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lorakit.cli.main import parser
from lorakit.export import write_adapter
from tests.export.stock import controlnet
from tests.export.tiny import family, made

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "using-adapters.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = re.findall(r"^    lorakit (.*)$", PAGE, re.MULTILINE)


def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(family().path)
    for name, state in (("zorp", made()), ("ink", made(targets=("to_q",), rank=2, text=False))):
        write_adapter(state, tmp_path / f"{name}.safetensors", format="kohya", family=family())
    stock = family().stock_pipeline()
    controlnet(stock).save_pretrained(tmp_path / "controlnet")
    for name in ("room.png", "place.png"):
        pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    names: dict[str, Any] = {}
    assert len(BLOCKS) == 4
    for block in BLOCKS[:3]:
        exec(block.replace("num_inference_steps=20", "num_inference_steps=2"), names)
    assert all(
        np.allclose(a.numpy(), b.numpy(), rtol=0, atol=1e-6)
        for a, b in zip(*_weights(names["pipeline"], stock), strict=True)
    )
    exec(BLOCKS[3], names)
    assert names["pipeline"].get_active_adapters() == ["zorp"]


def _weights(one: Any, other: Any) -> tuple[list[Any], list[Any]]:
    parts = ("unet", "text_encoder")
    found = [[p.detach() for part in parts for p in getattr(x, part).parameters()] for x in (one, other)]
    return found[0], found[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_parses(command: str) -> None:
    parser().parse_args(shlex.split(command))


def test_what_the_page_names_is_there_and_small() -> None:
    assert len(COMMANDS) == 6
    linked = re.findall(r"\]\(([^)#]+)\)", PAGE)
    named = re.findall(r"`((?:scripts|tests|docs)/[\w./-]+)`", PAGE)
    assert len(linked) == 4 and all((ROOT / "docs" / name).is_file() for name in linked)
    assert named and all((ROOT / name).is_file() for name in named)
    assert sum((ROOT / "docs" / name).stat().st_size for name in linked) < 400_000
