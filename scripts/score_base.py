"""Scores the embedded base with the judge and writes its model card; exit code 1 if it is below its gate.

Two hundred captions of the base's world at fixed seeds, drawn by the stock pipeline with guidance, and held-out
drawings sent through the VAE. Into the base's folder go score.json, card-grid.png, card-curve.png and README.md
(scripts/base_card.py).

    python scripts/score_base.py                                       about 2 minutes on one core
    python scripts/score_base.py --sweep --prompts 40                  prints scores at several guidance scales
    python scripts/score_base.py --from-work runs/base --prompts 40    prints how far a training has come
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import base_card
import scenes
import torch
from PIL import Image

from lorakit.core.files import write_json, write_text, written_aside
from lorakit.core.quiet import quiet_libraries
from lorakit.core.seeding import generator
from lorakit.evaluation.judge import Judge, Verdict, load_judge, pixels_of

GATE = {"background": 0.95, "colour": 0.90, "shape": 0.80, "all": 0.70}
ROUND_TRIP_LOSS = 0.03
# the stock pipeline takes sides that are multiples of 8, so 80×52 is trained on but not asked for
FRAMES = {(64, 64): 0.8, (72, 56): 0.1, (56, 72): 0.1}
GRID = 24
SWEEP = (2.0, 3.0, 4.0, 5.0, 6.0, 7.0)


@dataclass(frozen=True)
class Drawn:
    """What was asked for, what came, and what the judge says of it."""

    scene: scenes.Scene
    picture: Image.Image
    verdict: Verdict

    def right(self, question: str) -> bool:
        """Whether the answer to "background", "colour" or "shape" is right; "all": whether all three are."""
        if question == "all":
            return all(self.right(q) for q in ("background", "colour", "shape"))
        return getattr(self.verdict, question) == getattr(self.scene, question)


def asked_scenes(count: int, seed: str) -> list[tuple[scenes.Scene, tuple[int, int]]]:
    """Scenes and the frames to draw them in, the same for the same `seed`."""
    rng = random.Random(seed)
    frames = rng.choices(list(FRAMES), list(FRAMES.values()), k=count)
    return [(scenes.random_scene(rng), frame) for frame in frames]


def sample(
    pipeline: Any, asked: Sequence[tuple[scenes.Scene, tuple[int, int]]], *, steps: int, guidance: float, seed: str
) -> list[Image.Image]:
    """A picture of each scene by the stock pipeline; its noise depends on `seed` and its place in the list."""
    pictures: dict[int, Image.Image] = {}
    for frame in FRAMES:
        index = [i for i, (_, f) in enumerate(asked) if f == frame]
        for part in (index[i : i + 20] for i in range(0, len(index), 20)):
            result = pipeline(
                [asked[i][0].caption for i in part],
                width=frame[0],
                height=frame[1],
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[generator(seed, i) for i in part],
            )
            pictures.update(zip(part, result.images, strict=True))
    return [pictures[i] for i in range(len(asked))]


def draw_all(pipeline: Any, judge: Judge, args: argparse.Namespace, *, guidance: float, seed: str) -> list[Drawn]:
    asked = asked_scenes(args.prompts, seed)
    pictures = sample(pipeline, asked, steps=args.steps, guidance=guidance, seed=seed)
    return [Drawn(s, p, v) for (s, _), p, v in zip(asked, pictures, judge.look(pictures), strict=True)]


def tiles(drawn: Sequence[Drawn]) -> list[base_card.Tile]:
    """The first pictures for the card, with the judge's words where they differ from the caption's."""
    result = []
    for one in drawn[:GRID]:
        said = one.verdict
        wrong = "" if one.right("all") else f"{said.colour} {said.shape} on {said.background}"
        result.append(base_card.Tile(one.picture, one.scene.caption, wrong))
    return result


def scores_of(drawn: Sequence[Drawn]) -> dict[str, float]:
    return {question: round(sum(d.right(question) for d in drawn) / len(drawn), 4) for question in GATE}


@torch.no_grad()
def round_trip(vae: Any, judge: Judge, count: int) -> dict[str, dict[str, float]]:
    """The judge's scores on held-out drawings, as they are and after the VAE."""
    rng = random.Random("round trip")
    plain, after = [], []
    for _ in range(count):
        scene = scenes.random_scene(rng)
        picture = scenes.draw(scene, scenes.random_frame(rng), rng)
        x = pixels_of(picture) * 2 - 1
        y = vae.decode(vae.encode(x).latent_dist.mean).sample / 2 + 0.5
        plain.append(Drawn(scene, picture, judge.look([picture])[0]))
        after.append(Drawn(scene, picture, judge.look(y.clamp(0, 1))[0]))
    return {"drawn": scores_of(plain), "through_vae": scores_of(after)}


# -- the pipeline -------------------------------------------------------------------------------------------------


def load_pipeline(base: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    quiet_libraries()  # diffusers' progress bars can only be switched off after its import

    pipeline = StableDiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pipeline_from_work(work: Path) -> tuple[Any, int]:
    """The pipeline of an unfinished training (averaged weights), and its step."""
    import make_base
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from safetensors.torch import load_file
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    tensors = load_file(work / "unet.safetensors")
    unet, text_encoder = make_base.new_unet(), make_base.new_text_encoder(tokenizer)
    for name, module in (("average.unet.", unet), ("average.text_encoder.", text_encoder)):
        module.load_state_dict(
            {k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)}, strict=False
        )
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae").eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=make_base.new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, int(tensors["step"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("data/base"))
    parser.add_argument("--judge", type=Path, help="a judge's folder; without it the shipped one")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--sweep", action="store_true", help="several guidance scales on other prompts; writes nothing")
    parser.add_argument("--from-work", type=Path, help="score an unfinished training in this folder; writes nothing")
    parser.add_argument("--look", type=Path, help="with --from-work or --sweep: a file for the grid picture")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    quiet_libraries()
    judge = load_judge(args.judge)
    if args.from_work:
        pipeline, step = pipeline_from_work(args.from_work)
        print(f"{args.from_work} at step {step}")
    else:
        pipeline = load_pipeline(args.base)
    if args.sweep or args.from_work:
        for guidance in SWEEP if args.sweep else (args.guidance,):
            drawn = draw_all(pipeline, judge, args, guidance=guidance, seed="sweep")
            traces = sum(d.verdict.traces > 0.5 for d in drawn)
            print(
                f"guidance {guidance:g}: {scores_of(drawn)} traces {traces} {time.process_time():.0f} CPU s", flush=True
            )
            if args.look:
                base_card.grid(tiles(drawn)).save(args.look)
        return 0
    drawn = draw_all(pipeline, judge, args, guidance=args.guidance, seed="score")
    by_shape = {name: [d for d in drawn if d.scene.shape == name] for name in scenes.SHAPES}
    score = {
        "prompts": args.prompts,
        "steps": args.steps,
        "guidance": args.guidance,
        "scores": scores_of(drawn),
        "gate": GATE,
        "by_shape": {k: round(sum(d.right("shape") for d in v) / len(v), 4) for k, v in by_shape.items() if v},
        "round_trip": round_trip(pipeline.vae, judge, 400),
        "subject_seen": sum(d.verdict.subject > 0.5 for d in drawn),
        "traces_seen": sum(d.verdict.traces > 0.5 for d in drawn),
        "grid": min(GRID, args.prompts),
    }
    recorded = args.base / "training.jsonl"
    log = [json.loads(line) for line in recorded.read_text().splitlines()] if recorded.exists() else []
    write_json(args.base / "score.json", score)
    for name, picture in (("card-grid.png", base_card.grid(tiles(drawn))), ("card-curve.png", base_card.curve(log))):
        with written_aside(args.base / name) as aside:
            picture.save(aside, format="PNG", optimize=True)
    write_text(args.base / "README.md", base_card.card(score, log, pipeline))
    print(json.dumps(score, indent=2))
    plain, after = score["round_trip"]["drawn"], score["round_trip"]["through_vae"]
    short = [q for q, least in GATE.items() if score["scores"][q] < least]
    lost = [q for q in ("background", "colour", "shape") if plain[q] - after[q] > ROUND_TRIP_LOSS]
    if short or lost:
        print(f"below the gate: {', '.join(short + [f'{q} after the VAE' for q in lost])}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
