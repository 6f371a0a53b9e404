"""A model that predicts something else than its configuration says is met before the first step, and by `check --deep`
alone; looking moves nothing of the run."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from lorakit import families
from lorakit.cli.main import main
from lorakit.core.embedded import embedded
from lorakit.core.errors import InputError
from lorakit.recipe import Recipe
from lorakit.verbs import measured
from lorakit.verbs.check import check
from lorakit.verbs.train import train
from tests.verbs.test_beside import outcome

Make = Callable[..., Recipe]


@pytest.fixture
def base(tmp_path: Path) -> Callable[[str], Path]:
    """The embedded base with a configuration that claims another prediction type."""

    def claiming(kind: str) -> Path:
        folder = tmp_path / kind
        for part in embedded("base").iterdir():
            if part.name != "scheduler":
                folder.mkdir(exist_ok=True)
                (folder / part.name).symlink_to(part)
        (folder / "scheduler").mkdir()
        config = json.loads((embedded("base") / "scheduler" / "scheduler_config.json").read_text())
        assert config["prediction_type"] != kind
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({**config, "prediction_type": kind}))
        return folder

    return claiming


def on_the_base(make_recipe: Make, name: str, path: str | Path, *overrides: str) -> Recipe:
    pictures = embedded("mascot")
    how = [f"model.path={path}", f"data.sources.0.path={pictures}", "data.buckets.resolution=64", "run.steps=1"]
    return make_recipe(name, *how, *overrides)


@pytest.mark.parametrize("claimed", ["epsilon", "sample"])
def test_a_wrong_prediction_type_ends_a_run_before_it_begins(
    claimed: str, base: Callable[[str], Path], make_recipe: Make, tmp_path: Path
) -> None:
    path = base(claimed)
    with pytest.raises(InputError) as caught:
        train(on_the_base(make_recipe, "run", path))
    (message,) = caught.value.problems
    assert f"prediction_type = {claimed!r}" in message and "fits 'v_prediction'" in message
    assert not (tmp_path / "run").exists(), "the folder is free for a mended recipe"
    (found,) = check(on_the_base(make_recipe, "run", path), deep=True).report.errors
    assert "fits 'v_prediction'" in found
    sure = on_the_base(make_recipe, "run", path, "run.check_model=false")
    assert "fits 'v_prediction'" in check(sure, deep=True).report.warnings[-1]


def test_an_honest_model_is_let_through_and_told_of(
    make_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(on_the_base(make_recipe, "run", "embedded").to_toml())
    main(["check", str(file), "--deep"])
    said = capsys.readouterr().out
    assert "Ready to train." in said and "read as v_prediction, " in said
    assert not list((tmp_path / "cache").glob("entries-*")), "nothing is cached"


def test_a_plain_check_loads_no_model(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(settings: object, **how: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(families, "load_settings", refused)
    assert check(make_recipe("run")).unexplained == {}
    with pytest.raises(AssertionError, match="was loaded"):
        check(make_recipe("run"), deep=True)


def test_looking_at_the_model_changes_nothing(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With dropout in the adapter, which draws from the global generators, and with an adapter that is no identity."""

    def anew(name: str, *overrides: str) -> Recipe:  # a cache remembers what was looked at
        return make_recipe(name, f"data.cache={tmp_path / name}-cache", *overrides)

    first = train(anew("first", "run.steps=1")).output
    how = ("adapter.dropout=0.3", f"adapter.init_from={first / 'adapter.safetensors'}")
    looked = outcome(train(anew("looked", *how)).output)
    seen: list[float] = []
    original = measured.unexplained
    monkeypatch.setattr(
        measured,
        "unexplained",
        lambda *given, **how: seen.append(original(*given, **how)["epsilon"]) or {"epsilon": 0.0, "v_prediction": 1.0},
    )
    assert outcome(train(anew("again", *how)).output) == looked
    assert outcome(train(make_recipe("plain", *how, "run.check_model=false")).output) == looked
    train(anew("fresh", "run.steps=1"))
    assert len(seen) == 2 and seen[0] == seen[1], "the base alone is looked at, without its adapter"


def test_of_the_same_model_and_pictures_it_is_looked_at_once(
    make_recipe: Make, base: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    real = measured.unexplained

    def noting(process: object, samples: Iterable[object], **how: object) -> dict[str, float]:
        seen = list(samples)
        looks.append(len(seen))
        return real(process, seen, **how)

    monkeypatch.setattr(measured, "unexplained", noting)
    train(on_the_base(make_recipe, "first", "embedded"))
    assert looks in ([1], [1, 6]), "one picture may not settle it"
    once = len(looks)
    train(on_the_base(make_recipe, "second", "embedded", "run.seed=7", "optimizer.lr=1e-5"))
    assert len(looks) == once
    train(on_the_base(make_recipe, "third", "embedded", "data.sources.0.repeats=2"))
    assert len(looks) > once, "other data"
    path = base("epsilon")
    for name in ("refused", "refused again"):  # what was wrong is not taken for looked at
        with pytest.raises(InputError, match="fits 'v_prediction'"):
            train(on_the_base(make_recipe, name, path))
