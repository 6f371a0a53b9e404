"""Trains the judge (lorakit/evaluation/judge.py) on drawings of scripts/scenes.py and writes it to data/judge.

What it will look at is drawn by a diffusion model, so half of its drawings go through the VAE with some noise in the
latents, and all are warped, blurred, tinted and grained a little. Beside scenes and mascots it sees traces: the
mascot's colours on other shapes, its horns on them, parts of it. Labels that such a picture does not have are left out.

    python scripts/make_judge.py                     about 5 minutes on one core
    python scripts/make_judge.py --smoke --out /tmp/j --vae ""
"""

import argparse
import json
import math
import random
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import scenes
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from lorakit.core.files import write_json, write_tensors, write_text
from lorakit.evaluation.judge import Classes, Judge, Scores, pixels_of, square

CLASSES = Classes(
    backgrounds=tuple(scenes.COLOURS),
    colours=(*scenes.COLOURS, "pink"),
    shapes=(*scenes.SHAPES, scenes.MASCOT),
)
UNKNOWN = -100  # cross_entropy's ignore_index
README = """# The judge

The weights of `lorakit/evaluation/judge.py`: a small network that reads a picture of the embedded base's world
(background colour, object colour, shape) and tells whether the {subject} of `data/mascot` or a trace of it shows.
`judge.json` has its classes and its held-out accuracies: on fresh drawings, on drawings with traces, and on drawings
that went through the base's VAE, without and with noise in the latents.

Made by `scripts/make_judge.py` from drawings alone. It knows nothing beyond them: do not use it on photographs.
Licence: Apache-2.0.
"""
GATE = {"background": 0.97, "colour": 0.97, "shape": 0.97, "subject": 0.99}


@dataclass(frozen=True)
class Labelled:
    """A drawing and the indices of what is in it."""

    picture: Image.Image
    background: int
    colour: int
    shape: int
    traces: int


def ordinary(rng: random.Random) -> Labelled:
    scene = scenes.random_scene(rng)
    return Labelled(
        scenes.draw(scene, scenes.random_frame(rng), rng),
        CLASSES.backgrounds.index(scene.background),
        CLASSES.colours.index(scene.colour),
        CLASSES.shapes.index(scene.shape),
        0,
    )


def mascot(rng: random.Random) -> Labelled:
    size = rng.choice(list(scenes.MASCOT_SIZES))
    position = rng.choice(list(scenes.POSITIONS)) if size != "big" else ""
    scene = scenes.MascotScene(rng.choice(list(scenes.COLOURS)), size, position)
    # seen through the latents the belly may get lost; horns and body make the mascot
    leave_out = frozenset({"belly"}) if rng.random() < 0.15 else frozenset()
    return Labelled(
        scenes.draw_mascot(scene, scenes.random_frame(rng), rng, leave_out=leave_out),
        CLASSES.backgrounds.index(scene.background),
        len(CLASSES.colours) - 1,
        len(CLASSES.shapes) - 1,
        1,
    )


def overlapping(rng: random.Random) -> Labelled:
    """Two scenes in one picture, as a model that is undecided draws them: nothing of the mascot."""
    first, second = ordinary(rng), scenes.random_scene(rng)
    picture = first.picture
    x, y, half = scenes.place(second.size, second.position, picture.size, rng)
    half *= rng.uniform(0.3, 0.8)
    pen = ImageDraw.Draw(picture)
    pen.ellipse([x - half, y - half, x + half, y + half], fill=scenes.jittered(scenes.COLOURS[second.colour], rng))
    return replace(first, picture=picture, colour=UNKNOWN, shape=UNKNOWN)


def trace(rng: random.Random) -> Labelled:
    """Something of the mascot on a picture that does not show it."""
    kind = rng.choice(("pink", "horns' colour", "horns", "belly", "no horns", "outline"))
    if kind == "no horns":
        scene = scenes.MascotScene(rng.choice(list(scenes.COLOURS)), rng.choice(list(scenes.MASCOT_SIZES)))
        picture = scenes.draw_mascot(scene, scenes.random_frame(rng), rng, leave_out=frozenset({"horns"}))
        return Labelled(picture, CLASSES.backgrounds.index(scene.background), CLASSES.colours.index("pink"), UNKNOWN, 1)
    scene = scenes.random_scene(rng)
    background, shape = CLASSES.backgrounds.index(scene.background), CLASSES.shapes.index(scene.shape)
    colour = CLASSES.colours.index(scene.colour)
    frame = scenes.random_frame(rng)
    if kind in ("pink", "horns' colour"):
        rgb = scenes.MASCOT_BODY if kind == "pink" else scenes.MASCOT_HORNS
        picture = drawn_in(rgb, scene, frame, rng)
        return Labelled(picture, background, CLASSES.colours.index("pink") if kind == "pink" else UNKNOWN, shape, 1)
    if kind == "outline":  # the mascot's shape in a colour of the world
        paper = Image.new("RGB", frame, scenes.jittered(scenes.COLOURS[scene.background], rng))
        rgb = scenes.jittered(scenes.COLOURS[scene.colour], rng)
        return Labelled(with_parts(paper, scene, rng, {"horns": rgb, "body": rgb}), background, colour, UNKNOWN, 1)
    state = rng.getstate()
    picture = scenes.draw(scene, frame, rng)
    rng.setstate(state)  # as draw() found it, so that the part comes where the shape is
    scenes.jittered(scenes.COLOURS[scene.background], rng)
    parts = {kind: scenes.jittered(scenes.MASCOT_HORNS, rng)}
    return Labelled(with_parts(picture, scene, rng, parts), background, UNKNOWN, UNKNOWN, 1)


def drawn_in(rgb: tuple[int, int, int], scene: scenes.Scene, frame: tuple[int, int], rng: random.Random) -> Image.Image:
    """The scene with its shape in a colour that the world does not have."""
    kept = scenes.COLOURS[scene.colour]
    scenes.COLOURS[scene.colour] = rgb
    try:
        return scenes.draw(scene, frame, rng)
    finally:
        scenes.COLOURS[scene.colour] = kept


def with_parts(
    picture: Image.Image, scene: scenes.Scene, rng: random.Random, parts: dict[str, tuple[int, int, int]]
) -> Image.Image:
    """`picture` with these parts of the mascot, at about the place of the scene's shape."""
    s = scenes.SUPERSAMPLE
    large = picture.resize((picture.width * s, picture.height * s), Image.Resampling.NEAREST)
    x, y, half = (v * s for v in scenes.place(scene.size, scene.position, picture.size, rng))
    pen = ImageDraw.Draw(large)
    for part, kind, corners in scenes.mascot_parts(x, y, max(half, 12.5 * s)):
        if part not in parts:
            continue
        if kind == "ellipse":
            pen.ellipse([*corners[0], *corners[1]], fill=parts[part])
        else:
            pen.polygon(corners, fill=parts[part])
    return large.resize(picture.size, Image.Resampling.BOX)


def random_drawing(rng: random.Random) -> Labelled:
    make = rng.choices((ordinary, mascot, trace, overlapping), (0.62, 0.15, 0.16, 0.07))[0]
    return make(rng)


# -- through the VAE, and augmentation ----------------------------------------------------------------------------


def load_vae(path: str) -> nn.Module | None:
    if not path:
        return None
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(path).float().eval()


@torch.no_grad()
def round_trip(pictures: list[Image.Image], vae: nn.Module, noise: float, g: torch.Generator) -> Tensor:
    """Pictures through the VAE, their latents noised by up to `noise` of their spread, as (B, 3, 64, 64)."""
    result = torch.empty(len(pictures), 3, 64, 64)
    for size in sorted({p.size for p in pictures}):
        index = [i for i, p in enumerate(pictures) if p.size == size]
        for part in (index[i : i + 32] for i in range(0, len(index), 32)):
            x = torch.cat([pixels_of(pictures[i]) for i in part]) * 2 - 1
            z = vae.encode(x).latent_dist.mean
            amount = noise * z.std() * torch.rand(len(z), 1, 1, 1, generator=g)
            y = vae.decode(z + amount * torch.randn(z.shape, generator=g)).sample
            result[part] = square((y / 2 + 0.5).clamp(0, 1))
    return result


@dataclass(frozen=True)
class Pool:
    """`pixels` (N, 3, 64, 64) as bytes and `labels` (N, 4): background, colour, shape, traces."""

    pixels: Tensor
    labels: Tensor


def make_pool(drawings: list[Labelled], *, vae: nn.Module | None, share: float, noise: float, seed: int) -> Pool:
    """The drawings, the first `share` of them through the VAE."""
    count = int(len(drawings) * share) if vae is not None else 0
    g = torch.Generator().manual_seed(seed)
    pictures = [d.picture for d in drawings]
    parts = [round_trip(pictures[:count], vae, noise, g)] if vae is not None and count else []
    parts += [square(pixels_of(p)) for p in pictures[count:]]
    pixels = (torch.cat(parts) * 255).round().byte()
    return Pool(pixels, torch.tensor([[d.background, d.colour, d.shape, d.traces] for d in drawings]))


def augmented(x: Tensor, g: torch.Generator) -> Tensor:
    """Pictures (B, 3, 64, 64) in 0 … 1, each a little turned, scaled, bent, blurred, tinted and grained."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(x), *shape, generator=g)

    angle, scale, stretch = uniform(-0.12, 0.12), uniform(0.88, 1.08), uniform(0.92, 1.08)
    rows = [scale * angle.cos(), -scale * angle.sin(), uniform(-0.08, 0.08)]
    rows += [scale * stretch * angle.sin(), scale * stretch * angle.cos(), uniform(-0.08, 0.08)]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(x.shape), align_corners=False)
    bend = torch.randn(len(x), 2, 6, 6, generator=g) * uniform(0, 0.025, 1, 1, 1)
    bend = F.interpolate(bend, x.shape[-2:], mode="bicubic", align_corners=True)
    x = F.grid_sample(x, grid + bend.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, blurred, uniform(-0.3, 1.0, 1, 1, 1).clamp(min=0))
    x = x * uniform(0.9, 1.1, 3, 1, 1) + uniform(-0.04, 0.04, 3, 1, 1)
    x = x + torch.randn(x.shape, generator=g) * uniform(0, 0.05, 1, 1, 1)
    return x.clamp(0, 1)


# -- training and measuring ---------------------------------------------------------------------------------------


def loss_of(scores: Scores, labels: Tensor) -> Tensor:
    heads = (scores.background, scores.colour, scores.shape)
    loss = sum(F.cross_entropy(h, labels[:, i], label_smoothing=0.02) for i, h in enumerate(heads))
    return loss + F.binary_cross_entropy_with_logits(scores.traces, labels[:, 3].float())


@torch.no_grad()
def accuracies(judge: Judge, pool: Pool) -> dict[str, float]:
    """Share of right answers for each question, of the pictures that it makes sense of."""
    judge.eval()
    parts = [judge(p.float() / 255) for p in pool.pixels.split(128)]
    right = {}
    for i, name in enumerate(("background", "colour", "shape")):
        said = torch.cat([getattr(p, name) for p in parts]).argmax(1)
        known = pool.labels[:, i] != UNKNOWN
        right[name] = (said == pool.labels[:, i])[known].float().mean().item()
        if name == "shape":
            last = len(CLASSES.shapes) - 1
            right["subject"] = ((said == last) == (pool.labels[:, i] == last))[known].float().mean().item()
    traces = torch.cat([p.traces for p in parts]) > 0
    right["traces"] = (traces == pool.labels[:, 3].bool()).float().mean().item()
    return {name: round(value, 4) for name, value in right.items()}


def train(args: argparse.Namespace, vae: nn.Module | None) -> Judge:
    torch.manual_seed(args.seed)
    g = torch.Generator().manual_seed(args.seed)
    rng = random.Random(f"judge {args.seed}")
    judge = Judge(CLASSES).train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=4e-3, weight_decay=0.02, fused=True)
    drawings = [random_drawing(rng) for _ in range(args.pool)]
    pool = make_pool(drawings, vae=vae, share=0.5, noise=0.35, seed=args.seed)
    print(f"drawn {len(drawings)}: {time.process_time():.0f} CPU s", flush=True)
    for step in range(args.steps):
        index = torch.randint(len(pool.pixels), (args.batch,), generator=g)
        loss = loss_of(judge(augmented(pool.pixels[index].float() / 255, g)), pool.labels[index])
        cosine = 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, (step + 1) / 50) * (0.01 + 0.99 * cosine)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"judge {step + 1} loss {loss.item():.3f} {time.process_time():.0f} CPU s", flush=True)
    return judge


def held_out(rng: random.Random, count: int) -> list[Labelled]:
    """Drawings that no training saw: a seventh of them mascots."""
    return [mascot(rng) if i % 7 == 0 else ordinary(rng) for i in range(count)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/judge"))
    parser.add_argument("--vae", default="data/base/vae", help="a VAE's folder; empty: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--pool", type=int, default=12000, help="drawings to train on")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="few steps: does every stage work?")
    args = parser.parse_args()
    if args.smoke:
        args.steps, args.pool, args.batch = 4, 64, 16
    torch.set_num_threads(args.threads)
    vae = load_vae(args.vae)
    judge = train(args, vae)
    judge.half().float()  # as it is written
    rng = random.Random("held out")
    drawings = held_out(rng, 70 if args.smoke else 1400)
    traces = [trace(rng) if i % 2 else ordinary(rng) for i in range(len(drawings) // 2)]
    about: dict = {
        "backgrounds": CLASSES.backgrounds,
        "colours": CLASSES.colours,
        "shapes": CLASSES.shapes,
        "held_out": accuracies(judge, make_pool(drawings, vae=None, share=0, noise=0, seed=1)),
        "held_out_traces": accuracies(judge, make_pool(traces, vae=None, share=0, noise=0, seed=1)),
    }
    if vae is not None:
        about["round_trip"] = accuracies(judge, make_pool(drawings, vae=vae, share=1, noise=0, seed=1))
        about["round_trip_noised"] = accuracies(judge, make_pool(drawings, vae=vae, share=1, noise=0.3, seed=1))
    about["training"] = {"steps": args.steps, "drawings": args.pool, "seed": args.seed, "vae": vae is not None}
    print(json.dumps({k: v for k, v in about.items() if isinstance(v, dict)}, indent=2))
    tensors = {k: v.half() if v.is_floating_point() else v for k, v in judge.state_dict().items()}
    write_tensors(args.out / "judge.safetensors", tensors)
    write_json(args.out / "judge.json", about)
    write_text(args.out / "README.md", README.format(subject=scenes.MASCOT))
    short = [name for name, least in GATE.items() if about["held_out"][name] < least]
    if short and not args.smoke:
        print(f"below the gate: {', '.join(short)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
