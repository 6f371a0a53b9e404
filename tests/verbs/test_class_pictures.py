"""What the base draws for a training to hold on to: all of it once, as `lorakit sample` does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lorakit import families
from lorakit.core.errors import InputError, InterruptedRun, Stopped
from lorakit.recipe import Recipe
from lorakit.sampling.pictures import Request
from lorakit.verbs import class_pictures as module
from lorakit.verbs.cache import fill
from lorakit.verbs.check import check
from lorakit.verbs.class_pictures import draw_missing, missing
from lorakit.verbs.sample import sample
from lorakit.verbs.train import train

Make = Callable[..., Recipe]


@pytest.fixture
def make(make_recipe: Make, tmp_path: Path) -> Make:
    """Recipes of a step with a second source, whose three pictures of two prompts the base is to draw."""

    def made(name: str, *overrides: str) -> Recipe:
        asked = 'generate={count=3, prompts=["thing", "other"], steps=2, seed=5, sizes=[[32, 32], [48, 24]]}'
        source = f'data.sources.1={{path="{tmp_path}/drawn", role="regularization", {asked}}}'
        return make_recipe(name, source, "run.steps=1", *overrides)

    return made


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_a_training_draws_what_is_missing_as_sample_would(make: Make, tmp_path: Path) -> None:
    recipe = make("run", "run.steps=4")
    warned = check(recipe).report
    assert warned.errors == () and not (tmp_path / "drawn").exists()
    assert [
        text for text in warned.warnings if text.startswith("data.sources.1: 3 of its 3 class pictures are missing")
    ]
    run = train(recipe).output
    keys = [key for line in (run / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)["samples"]]
    assert {key for key in keys if key[0] == "1"} == {"1/000.png", "1/001.png", "1/002.png"}
    drawn = tmp_path / "drawn"
    assert [(drawn / f"00{i}.txt").read_text() for i in range(3)] == ["thing\n", "other\n", "thing\n"]
    same = [Request("thing", 5, "", 32, 32), Request("other", 6, "", 48, 24), Request("thing", 7, "", 32, 32)]
    for i, file in enumerate(sample(recipe.model.path, [], wanted=same, out=tmp_path / "same", steps=2)):
        with Image.open(file) as one, Image.open(drawn / f"00{i}.png") as other:
            assert np.array_equal(np.asarray(one), np.asarray(other))
    before = bytes_of(drawn)
    assert not any("missing" in text for text in check(recipe).report.warnings)
    fill(recipe)
    assert bytes_of(drawn) == before and missing(recipe) == {}


def test_only_what_is_missing_is_drawn_and_always_the_same(make: Make, tmp_path: Path) -> None:
    recipe, drawn = make("run"), tmp_path / "drawn"
    assert draw_missing(recipe) == 3
    before = bytes_of(drawn)
    (drawn / "001.png").unlink()
    assert draw_missing(recipe) == 1 and bytes_of(drawn) == before
    assert draw_missing(recipe) == 0
    # another prompt, seed, number of steps: the picture says so itself; somebody's own says nothing and stays
    Image.new("RGB", (32, 32)).save(drawn / "002.png")
    own = (drawn / "002.png").read_bytes()
    assert draw_missing(make("run", "data.sources.1.generate.prompts=['thing', 'new']")) == 1
    assert (drawn / "001.txt").read_text() == "new\n" and (drawn / "000.png").read_bytes() == before["000.png"]
    assert draw_missing(make("run", "data.sources.1.generate.steps=3")) == 2
    assert (drawn / "002.png").read_bytes() == own
    assert not [name for name in bytes_of(drawn) if name[:2] != "00"], "nothing is left lying about"


def test_what_was_drawn_before_a_stop_is_kept(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    draw = module.draw

    def stopped(*args: Any, **settings: Any) -> Any:
        if len(drawn) == 2:
            raise Stopped(15)
        drawn.append(1)
        return draw(*args, **settings)

    recipe = make("run")
    with monkeypatch.context() as patch:
        patch.setattr(module, "draw", stopped)
        with pytest.raises(InterruptedRun):
            train(recipe)
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 2 and not (tmp_path / "run").exists()
    assert draw_missing(recipe) == 1


def test_all_that_is_wrong_is_told_before_anything_is_drawn(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "load_settings", lambda *args: pytest.fail("a model was loaded"))
    unused = ["data.sources.1.generate.guidance=1", "data.sources.1.generate.negative_prompt=red"]
    wrong = ["data.sources.1.generate.sizes=[[33, 32]]", "sample.width=33", *unused]
    with pytest.raises(InputError) as caught:
        train(make("run", *wrong))
    assert [problem.split(": ")[0].split(" has ")[0] for problem in caught.value.problems] == [
        f"data.sources.1.generate.{key}" for key in ("sizes", "negative_prompt")
    ]
    for change, problem in {
        "data.sources.1.role=train": "data.sources.1.generate: what the base draws is to be kept",
        "data.sources.1.path=x.tar": "data.sources.1.generate: it is drawn into a folder",
        "data.sources.1.generate.prompts=[]": r"data.sources.1.generate.prompts = \[\]",
    }.items():
        with pytest.raises(InputError, match=problem):
            make("run", change)
