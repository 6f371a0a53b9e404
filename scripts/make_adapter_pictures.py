"""Draws the pictures of docs/using-adapters.md: each way to draw, without and with the demo's adapter.

lorakit demo --out demo && python scripts/make_adapter_pictures.py --adapter demo/run/adapter.safetensors

What is drawn over is itself drawn by the embedded base, so that nothing but the adapter comes from outside.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from lorakit.core.files import written_aside
from lorakit.sampling.pictures import Request
from lorakit.verbs.sample import sample

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "images" / "using-adapters"
SETTINGS: dict[str, Any] = {"steps": 20, "guidance": 4.0}
SIDE, GAP, COLUMNS = 128, 8, 4
GROUND = "a red circle on a blue background"
SUBJECT = "a zorp on a blue background"


def drawn(folder: Path, adapters: list[tuple[Path, float]], *, seed: int, **options: Any) -> list[Path]:
    wanted = [Request(SUBJECT, seed + i) for i in range(COLUMNS)]
    return sample("embedded", adapters, wanted=wanted, out=folder, **SETTINGS, **options)


def sheet(rows: list[tuple[str, list[Path]]], *, marked: Image.Image | None = None) -> Image.Image:
    """Named rows of pictures, enlarged by their pixels as they are; `marked` is shown first in every row."""
    wide = 96 + (COLUMNS + (marked is not None)) * (SIDE + GAP)
    page = Image.new("RGB", (wide, len(rows) * (SIDE + GAP) + GAP), "white")
    pen = ImageDraw.Draw(page)
    for row, (name, files) in enumerate(rows):
        top = GAP + row * (SIDE + GAP)
        pen.multiline_text((GAP, top + SIDE // 2 - 12), name, fill="black")
        tiles = ([marked] if marked is not None else []) + [Image.open(file) for file in files]
        for column, tile in enumerate(tiles):
            large = tile.convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST)
            page.paste(large, (96 + column * (SIDE + GAP), top))
    return page


def save(name: str, page: Image.Image) -> None:
    with written_aside(OUT / f"{name}.png") as aside:
        page.quantize(128).save(aside, format="PNG", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True, help="the adapter of `lorakit demo`")
    args = parser.parse_args()
    whole = [(args.adapter, 1.0)]
    both = {"without": [], "with the\nadapter": whole}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ground = sample("embedded", [], wanted=[Request(GROUND, 1)], out=folder / "ground", **SETTINGS)[0]
        shown = Image.open(ground).convert("RGB")
        mask = Image.new("L", shown.size)
        ImageDraw.Draw(mask).rectangle((6, 6, 57, 57), fill=255)
        mask.save(folder / "mask.png")
        dimmed = Image.composite(shown, Image.blend(shown, Image.new("RGB", shown.size, "white"), 0.6), mask)

        def rows(ways: dict[str, Any], seed: int, **options: Any) -> list[tuple[str, list[Path]]]:
            return [(name, drawn(folder / f"{seed}{name}", ways[name], seed=seed, **options)) for name in ways]

        half = {"without": [], "weight 0.5": [(args.adapter, 0.5)], "with the\nadapter": whole}
        save("prompt", sheet(rows(half, 10)))
        save("image-to-image", sheet(rows(both, 20, image=ground, strength=0.8), marked=shown))
        save("inpaint", sheet(rows(both, 30, image=ground, mask=folder / "mask.png"), marked=dimmed))
        larger = rows({"128 pixels": whole}, 40, upscale=2, strength=0.2)
        save("upscale", sheet(rows({"64 pixels": whole}, 40) + larger))


if __name__ == "__main__":
    main()
