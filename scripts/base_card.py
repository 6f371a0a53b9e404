"""The embedded base's model card: its text, the grid of pictures, the training curve. For scripts/score_base.py."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import scenes
from PIL import Image, ImageDraw, ImageFont


@dataclass(frozen=True)
class Tile:
    """A picture, what was asked for, and the judge's reading where it is another."""

    picture: Image.Image
    caption: str
    wrong: str = ""


def grid(tiles: Sequence[Tile], *, columns: int = 6) -> Image.Image:
    """The pictures, enlarged, with their captions below; another reading of the judge stands in red."""
    side, text, font = 144, 42, ImageFont.load_default(10)
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (side + 10) + 10, rows * (side + text + 10) + 10), "white")
    pen = ImageDraw.Draw(sheet)
    for i, tile in enumerate(tiles):
        x, y = 10 + i % columns * (side + 10), 10 + i // columns * (side + text + 10)
        scale = side / max(tile.picture.size)
        large = tile.picture.resize([round(v * scale) for v in tile.picture.size], Image.Resampling.BICUBIC)
        sheet.paste(large, (x + (side - large.width) // 2, y + (side - large.height) // 2))
        middle = tile.caption.rindex(" on a")
        pen.text(
            (x, y + side + 1),
            f"{tile.caption[:middle]}\n{tile.caption[middle + 1 :]}",
            fill="black",
            font=font,
            spacing=1,
        )
        pen.text((x, y + side + 27), tile.wrong, fill=(200, 0, 0), font=font)
    return sheet


def curve(log: Sequence[dict], *, width: int = 720, height: int = 380) -> Image.Image:
    """The U-Net's training loss over its updates, the loss on a logarithmic scale."""
    points = [(entry["step"], entry["loss"]) for entry in log if entry["stage"] == "unet"]
    sheet = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    left, right, top, bottom = 60, width - 20, 30, height - 45
    pen.text((left, 8), "training loss (mean squared error of v), logarithmic, over updates", fill="black", font=font)
    if len(points) < 2:
        return sheet
    last = points[-1][0]
    low, high = (math.log(f(loss for _, loss in points)) for f in (min, max))
    low, high = low - 0.05, high + 0.05

    def place(step: float, loss: float) -> tuple[float, float]:
        up = (math.log(loss) - low) / (high - low)
        return left + (right - left) * step / last, bottom - (bottom - top) * up

    for loss in (0.05, 0.07, 0.1, 0.12, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0):
        if low <= math.log(loss) <= high:
            y = place(0, loss)[1]
            pen.line([(left, y), (right, y)], fill=(225, 225, 225))
            pen.text((left - 8, y), f"{loss:g}", fill="black", font=font, anchor="rm")
    for k in range(5):
        step = last * k / 4
        x = place(step, points[0][1])[0]
        pen.line([(x, bottom), (x, bottom + 5)], fill="black")
        pen.text((x, bottom + 9), f"{step:,.0f}", fill="black", font=font, anchor="mt" if k < 4 else "rt")
    pen.line([(left, top), (left, bottom), (right, bottom)], fill="black")
    pen.line([place(*p) for p in points], fill=(190, 200, 235))
    window = max(1, len(points) // 40)
    smooth = []
    for i in range(len(points)):
        near = points[max(0, i - window) : i + window + 1]
        smooth.append(place(points[i][0], sum(loss for _, loss in near) / len(near)))
    pen.line(smooth, fill=(38, 84, 214), width=2)
    return sheet


def card(score: dict, log: Sequence[dict], pipeline: Any) -> str:
    """The model card's text."""
    parts = {n: getattr(pipeline, n) for n in ("unet", "text_encoder", "vae")}
    config, words = pipeline.vae.config, len(pipeline.tokenizer)
    limit = pipeline.tokenizer.model_max_length
    millions = {n: sum(p.numel() for p in m.parameters()) / 1e6 for n, m in parts.items()}
    names = {"background": "background colour", "colour": "object colour", "shape": "shape", "all": "all three"}
    trip = score["round_trip"]

    def percent(value: float) -> str:
        return f"{100 * value:.1f} %"

    rows = "\n".join(
        f"| {names[q]} | {percent(score['scores'][q])} | {percent(least)} | {percent(trip['drawn'][q])} "
        f"| {percent(trip['through_vae'][q])} |"
        for q, least in score["gate"].items()
    )
    unet = [entry for entry in log if entry["stage"] == "unet"]
    psnr = [entry["psnr"] for entry in log if entry["stage"] == "vae"]
    by_shape = ", ".join(f"{shape} {percent(value)}" for shape, value in score["by_shape"].items())
    shapes, colours = ", ".join(scenes.SHAPES), ", ".join(scenes.COLOURS)
    end = sum(entry["loss"] for entry in unet[-20:]) / max(1, len(unet[-20:]))
    length = f"{unet[-1]['step']:,} updates, loss {end:.3f} at the end" if unet else "not recorded"
    quality = f"{psnr[-1]:.1f} dB" if psnr else "not recorded"
    return f"""# The embedded base

A small text-to-image latent diffusion model in the Stable Diffusion layout, trained from scratch for lorakit's demo and
tests. It is real (text-conditioned, with guidance, loaded by `StableDiffusionPipeline.from_pretrained("data/base")`)
and knows a very small world. Weights are fp16 safetensors.

![Pictures of the first {score["grid"]} test prompts, not selected](card-grid.png)

The first {score["grid"]} test prompts, not selected; what the judge read otherwise stands in red.

## Its world

One bold shape on a plain background, 64×64 px, some pictures wider or taller. Captions read like "a red circle on a
blue background" or "a small green house on the left on a white background".

- Shapes: {shapes}.
- Colours of shape and background: {colours}.
- Sizes: small, unnamed, big. Positions: unnamed, on the left, on the right, at the top, at the bottom.

## Figures

| | of {score["prompts"]} prompts right | gate | judge on drawings | same drawings through the VAE |
|---|---|---|---|---|
{rows}

{score["prompts"]} prompts at fixed seeds, {score["steps"]} DDIM steps (trailing), guidance {score["guidance"]:g}, the
stock pipeline in fp32 on a CPU. Shapes right, one by one:

{by_shape}.

The judge is `lorakit/evaluation/judge.py`, trained on drawings; its own held-out accuracies are in
`data/judge/judge.json`. Measured by `scripts/score_base.py`; the numbers are in `score.json`.

## How it was made

`scripts/make_base.py`, everything drawn on the way by `scripts/scenes.py`; no photograph or downloaded weight.

| part | parameters | |
|---|---|---|
| `AutoencoderKL` | {millions["vae"]:.2f} M | factor 4, {config.latent_channels} whitened channels; {quality} |
| `CLIPTextModel` | {millions["text_encoder"]:.2f} M | own byte-level BPE of {words} entries, {limit} tokens |
| `UNet2DConditionModel` | {millions["unet"]:.2f} M | v-prediction, zero terminal SNR, trailing steps |

U-Net and text encoder were trained together: {length}. AdamW, cosine schedule, averaged weights, a tenth of the
captions dropped for guidance. `training.jsonl` has the log.

![Training loss](card-curve.png)

## Limits

- It knows the words above. Other words do nothing or break the picture.
- One object a picture; no counts, no relations, no texture. Fine detail (under about 5 px) does not pass its VAE.
- For demonstration and tests, not for judging how good a training method is on real models.

## Licence

Weights and code: Apache-2.0. The pictures on this page: CC0 1.0.
"""
