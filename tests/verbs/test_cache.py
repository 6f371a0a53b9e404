"""`lorakit cache RECIPE` leaves nothing for the training to encode, and encodes nothing twice."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit import families
from lorakit.core.errors import InputError, InterruptedRun, Stopped
from lorakit.data.cache import Filled
from lorakit.recipe import Recipe
from lorakit.training.caching import fill_cache
from lorakit.verbs.cache import DAY, fill, prune, usage
from lorakit.verbs.train import train

Make = Callable[..., Recipe]


def test_it_is_filled_once_and_the_training_finds_all_of_it(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe("run", "run.steps=1", "data.sources.0.flip=0.5", "data.sources.0.caption_dropout=0.1")
    done = fill(recipe)
    # seven pictures, mirrored or not; their captions and none
    assert done == (tmp_path / "cache", Filled(14, 0), Filled(8, 0))
    assert fill(recipe)[1:] == (Filled(0, 14), Filled(0, 8))
    assert usage(tmp_path / "cache")[1].entries == 22
    assert not (tmp_path / "run").exists()

    seen: list[Any] = []

    def watched(*args: Any, **settings: Any) -> Any:
        seen.append(fill_cache(*args, **settings))
        return seen[0]

    monkeypatch.setattr("lorakit.verbs.trainee.fill_cache", watched)
    train(recipe)
    assert (seen[0].pictures, seen[0].captions) == (Filled(0, 14), Filled(0, 8))
    assert (tmp_path / "run" / "adapter.safetensors").is_file()


def test_a_stop_is_heard_after_each_entry_and_what_was_made_is_kept(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def check() -> None:
        made.append(1)
        if len(made) == 3:
            raise Stopped(15)

    def checked(*args: Any, **settings: Any) -> Any:
        return fill_cache(*args, **{**settings, "check": check})

    recipe = make_recipe("run")
    with monkeypatch.context() as patch:
        patch.setattr("lorakit.verbs.cache.fill_cache", checked)
        with pytest.raises((Stopped, InterruptedRun)):
            fill(recipe)
    assert fill(recipe).pictures == Filled(4, 3)


def test_what_is_encoded_in_every_step_is_not_cached(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    text = ["adapter.text_encoder.rank=2"]
    random = ["data.sources.0.crop=random"]
    done = fill(make_recipe("run", *text))
    assert done.captions is None and done.pictures == Filled(7, 0)
    done = fill(make_recipe("run", *random))
    assert done.pictures is None and done.captions == Filled(7, 0)

    def refuse(*args: object) -> Any:
        raise AssertionError("a model was loaded for nothing")

    monkeypatch.setattr(families, "load_settings", refuse)
    assert fill(make_recipe("run", *text, *random))[1:] == (None, None)


def test_what_is_wrong_is_said_before_a_model_is_loaded(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe("run")
    (tmp_path / "photos" / "03.txt").unlink()
    monkeypatch.setattr(families, "load_settings", lambda *args: pytest.fail("a model was loaded"))
    with pytest.raises(InputError, match=r"03\.png"):
        fill(recipe)
    assert not list((tmp_path / "cache").glob("entries-*"))


def test_what_nobody_used_goes_and_what_is_used_stays(make_recipe: Make, tmp_path: Path) -> None:
    recipe = make_recipe("run")
    fill(recipe)
    folder = tmp_path / "cache"
    shards = sorted(folder.glob("entries-*"))
    assert len(shards) == 2
    old = time.time() - 40 * DAY
    os.utime(shards[0], (old, old))
    assert prune(folder, days=30, dry_run=True)[1].shards == 1
    assert len(sorted(folder.glob("entries-*"))) == 2
    assert prune(folder, days=50, dry_run=True)[1].shards == 0
    found, removed = prune(folder, days=30)
    assert found == folder and removed.shards == 1 and not shards[0].exists()


def test_a_cache_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert usage()[0] == tmp_path / "lorakit" / "data" and usage()[1].entries == 0
    assert prune(days=0)[1].shards == 0 and not list(tmp_path.iterdir())
    for act in (lambda: usage(tmp_path / "no"), lambda: prune(tmp_path / "no", days=1)):
        with pytest.raises(InputError, match="--folder"):
            act()


def test_a_folder_that_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for act in (lambda: usage(tmp_path), lambda: prune(tmp_path, days=0)):
        with pytest.raises(InputError, match="holds no cache of lorakit: name the folder that data.cache names"):
            act()
    with pytest.raises(InputError, match="--folder .*file cannot be read"):
        usage(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert usage(tmp_path / "empty")[1].shards == 0
