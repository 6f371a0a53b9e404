"""The demo's scores on pictures of which we know what is in them, and its whole road in a few steps."""

import json
import random
from pathlib import Path

import pytest
import scenes

from lorakit.core.errors import InputError
from lorakit.evaluation.judge import load_judge
from lorakit.recipe import load_recipe
from lorakit.verbs import demo as module
from lorakit.verbs.demo import DemoReport, DemoScores, NotLearned, demo

BEFORE = DemoScores(subject=0.0, backgrounds=0.9, old=0.9, traces=0.0)
GOOD = DemoScores(subject=0.75, backgrounds=0.85, old=0.8, traces=0.1)


def report(before: DemoScores, after: DemoScores) -> DemoReport:
    return DemoReport(before, after, 1.0, 1.0, Path("a"), Path("b"))


def test_the_bounds_of_what_counts_as_learned() -> None:
    assert report(BEFORE, GOOD).problems() == []
    worse = {"subject": 0.74, "backgrounds": 0.84, "old": 0.79, "traces": 0.11}
    for name, value in worse.items():
        assert len(report(BEFORE, DemoScores(**{**GOOD.__dict__, name: value})).problems()) == 1
    assert len(report(DemoScores(0.1, 0.9, 0.9, 0.0), GOOD).problems()) == 1


def test_drawn_pictures_score_as_what_they_are() -> None:
    rng = random.Random(5)
    old = [scenes.random_scene(rng) for _ in range(12)]
    mascots = [scenes.MascotScene(background, "", "") for background in ("blue", "green", "yellow", "white")]
    prompts = {
        "subject": [{"background": scene.background} for scene in mascots],
        "old": [{"shape": s.shape, "colour": s.colour, "background": s.background} for s in old],
    }
    drawn = [
        [scenes.draw_mascot(scene, (64, 64), rng) for scene in mascots],
        [scenes.draw(scene, (64, 64), rng) for scene in old],
    ]
    judge = load_judge()
    assert module.scores(judge, prompts, drawn) == DemoScores(1.0, 1.0, 1.0, 0.0)
    swapped = module.scores(judge, prompts, [drawn[1][:4], [drawn[0][i % 4] for i in range(12)]])
    assert swapped.subject == 0.0 and swapped.old == 0.0 and swapped.traces == 1.0


def test_the_road_in_a_few_steps_says_that_nothing_was_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: value[:6] if isinstance(value, list) else value for name, value in module.read_prompts().items()}
    monkeypatch.setattr(module, "STEPS", 2)
    monkeypatch.setattr(module, "read_prompts", lambda: few)
    monkeypatch.setattr(
        module,
        "load_recipe",
        lambda path, *, overrides: load_recipe(path, overrides=[*overrides, "run.steps=2", "run.batch_size=4"]),
    )
    monkeypatch.chdir(tmp_path)
    out = Path("demo")
    with pytest.raises(NotLearned, match="the subject is in"):
        demo(out)
    found = json.loads((out / "demo.json").read_text())
    assert found["learned"] is False and found["adapter"] == "run/adapter.safetensors"
    assert (out / "run" / "adapter.safetensors").is_file() and (out / "before-after.png").is_file()
    assert len(list((out / "regularization").glob("*.png"))) == 6
    with pytest.raises(InputError, match="in use"):
        demo(out)
