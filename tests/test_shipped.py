"""What ships: a stock pipeline draws with the base, the judge agrees, and the figures are over the gate."""

import json
from pathlib import Path

import torch

from lorakit.core.embedded import embedded
from lorakit.evaluation.judge import load_judge
from lorakit.sampling.pictures import Request, draw

# of the words of the base's card; not the prompts of its score
PROMPTS = {
    "a red circle on a blue background": ("circle", "red", "blue"),
    "a yellow square on a black background": ("square", "yellow", "black"),
    "a big white triangle on a green background": ("triangle", "white", "green"),
    "a black cross on a yellow background": ("cross", "black", "yellow"),
    "a green circle on the left on a white background": ("circle", "green", "white"),
    "a big blue square on a red background": ("square", "blue", "red"),
}


def test_the_base_draws_what_is_asked_for() -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(embedded("base"))
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.unet.dtype == pipeline.text_encoder.dtype == torch.float32
    wanted = [Request(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    seen = load_judge().look(draw(pipeline, wanted, steps=12, guidance=4.0))
    right = [(v.shape, v.colour, v.background) == expected for v, expected in zip(seen, PROMPTS.values(), strict=True)]
    assert sum(right) >= 5


def test_the_base_is_small_and_over_its_gate() -> None:
    folder = embedded("base")
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) <= 16e6
    score = json.loads((folder / "score.json").read_text())
    assert score["prompts"] == 200
    assert all(score["scores"][name] >= bound for name, bound in score["gate"].items())
    drawn, through_vae = score["round_trip"]["drawn"], score["round_trip"]["through_vae"]
    assert all(drawn[name] - through_vae[name] <= 0.03 for name in drawn)


def test_nothing_that_ships_names_the_machine_that_made_it() -> None:
    for name in ("base", "judge", "mascot"):
        for file in embedded(name).rglob("*"):
            if file.is_file() and file.suffix != ".png":
                content = file.read_bytes()
                assert b"/home/" not in content, file
                assert str(Path.home()).encode() + b"/" not in content, file
                assert b"_name_or_path" not in content, file
