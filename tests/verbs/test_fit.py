"""What does not fit is tried with smaller settings, in their order; what was found is the run's own recipe."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit.core.errors import InputError
from lorakit.recipe import Recipe, load_recipe
from lorakit.training import dry
from lorakit.training.dry import TooLarge
from lorakit.verbs.fit import fitted
from lorakit.verbs.train import dry_run, resume, train

Make = Callable[..., Recipe]


def tried(recipe: Recipe, *, enough: int, **more: Any) -> tuple[Recipe, list[Recipe]]:
    """The recipe that was found where the trial of this number is the first that fits, and all that were tried."""
    seen: list[Recipe] = []

    def attempt(recipe: Recipe) -> None:
        seen.append(recipe)
        if len(seen) < enough:
            raise TooLarge("too large")

    return fitted(recipe, attempt, **more)[0], seen


def test_rungs_go_from_what_changes_nothing_to_what_costs_most(make_recipe: Make) -> None:
    recipe = make_recipe("run", "run.fit=auto")
    found, seen = tried(recipe, enough=5, gpu=False)
    assert [r.run.gradient_checkpointing for r in seen] == [False, True, True, True, True]
    assert [(r.run.batch_size, r.run.accumulate) for r in seen] == [(2, 2), (2, 2), (1, 4), (1, 4), (1, 4)]
    assert [r.model.quantize for r in seen] == [None, None, None, "int8", "nf4"]
    assert found == seen[-1] and all(r.run.offload is None for r in seen)
    with pytest.raises(InputError, match="too large\nrun.fit has nothing left"):
        tried(recipe, enough=6, gpu=False)
    with pytest.raises(InputError, match='^too large\nrun.fit = "auto"'):
        tried(make_recipe("other"), enough=2, gpu=False)


def test_weights_that_are_multiplied_in_8_bits_stay_so(make_recipe: Make) -> None:
    recipe = make_recipe("run", "run.fit=auto", "model.compute=int8")
    assert len(tried(recipe, enough=3, gpu=False)[1]) == 3
    with pytest.raises(InputError, match="nothing left"):
        tried(recipe, enough=4, gpu=False)


def test_a_resume_changes_no_number(make_recipe: Make) -> None:
    seen: list[Recipe] = []
    with pytest.raises(InputError):
        tried(make_recipe("run", "run.fit=auto"), enough=99, gpu=False, numbers_stay=True)
    found, seen = tried(make_recipe("run", "run.fit=auto"), enough=2, gpu=False, numbers_stay=True)
    assert len(seen) == 2 and found.run.gradient_checkpointing and found.run.batch_size == 2


def test_a_run_is_begun_with_what_fits_and_says_so(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train(make_recipe("plain", "run.gradient_checkpointing=true", "run.batch_size=1", "run.accumulate=4"))
    # without checkpoints and in twos it shall not fit: the third trial does
    honest, peaks = dry.memory.peak, iter([3e9, 2.5e9, 1e9, 1e9])
    monkeypatch.setattr(dry.memory, "peak", lambda: int(next(peaks)))
    result = train(make_recipe("run", "run.fit=2GB"))
    monkeypatch.setattr(dry.memory, "peak", honest)
    kept = load_recipe(result.output / "recipe.toml")
    assert (kept.run.gradient_checkpointing, kept.run.batch_size, kept.run.accumulate) == (True, 1, 4)
    assert kept.run.fit == "2GB"

    def losses(run: Any) -> list[float]:
        return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]

    assert losses(result.output) == losses(plain.output)
    assert resume(result.output, overrides=["run.steps=7"], allow=["run.steps"]).steps == 7


def test_what_cannot_fit_leaves_no_run(make_recipe: Make) -> None:
    recipe = make_recipe("run", "run.fit=0.001GB", "model.quantize=int8", "run.gradient_checkpointing=true")
    with pytest.raises(InputError, match=r"does not fit into memory.*\n.*nothing left"):
        train(recipe)
    assert not [*Path(recipe.run.output).glob("recipe.toml")], "a mended recipe may take the folder"
    with pytest.raises(InputError, match="nothing left"):
        dry_run(recipe)
