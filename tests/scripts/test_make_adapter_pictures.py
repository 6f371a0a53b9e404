"""The pictures of docs/using-adapters.md: one sheet for each way to draw, from whatever `sample` draws."""

from pathlib import Path
from typing import Any

import make_adapter_pictures
import pytest
from PIL import Image


def test_each_way_is_drawn_and_put_on_a_sheet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def sample(base: str, adapters: Any, *, wanted: Any, out: Path, **options: Any) -> list[Path]:
        asked.append({"adapters": len(adapters), **options})
        out.mkdir(parents=True)
        files = [out / f"{i}.png" for i in range(len(wanted))]
        for file in files:
            Image.new("RGB", (64, 64), "red" if adapters else "blue").save(file)
        return files

    monkeypatch.setattr(make_adapter_pictures, "sample", sample)
    monkeypatch.setattr(make_adapter_pictures, "OUT", tmp_path / "out")
    monkeypatch.setattr("sys.argv", ["make_adapter_pictures.py", "--adapter", "a.safetensors"])
    make_adapter_pictures.main()
    sheets = {path.stem: Image.open(path).convert("RGB") for path in (tmp_path / "out").iterdir()}
    assert sheets.keys() == {"prompt", "image-to-image", "inpaint", "upscale"}
    first, last = (sheets["inpaint"].getpixel((300, y)) for y in (60, 200))
    assert first == (0, 0, 255) and last == (255, 0, 0), "the row without an adapter is above"
    assert sum("mask" in options for options in asked) == 2
    assert [options["upscale"] for options in asked if "upscale" in options] == [2]
