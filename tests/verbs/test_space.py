"""What a run will write is known before its model is loaded, and compared with what the disk has."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit import families
from lorakit.core.errors import StorageError
from lorakit.recipe import Recipe
from lorakit.verbs import space
from lorakit.verbs.train import train

Make = Callable[..., Recipe]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def free(count: int) -> None:
        usage = shutil._ntuple_diskusage(10**12, 0, count)  # type: ignore[attr-defined]
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    return free


def needs(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    inner = space.run_needs
    monkeypatch.setattr(space, "run_needs", lambda output, **given: seen.update(given) or inner(output, **given))
    return seen


def test_the_estimate_is_what_is_written(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = needs(monkeypatch)
    recipe = make_recipe("run", "adapter.text_encoder.rank=2", "run.steps=1")
    run = train(recipe).output
    written = (run / "checkpoints" / "step-000001" / "adapter.safetensors").stat().st_size
    assert 4 * seen["weights"] < written < 4 * seen["weights"] + 64_000, "a header more"
    latents = train(make_recipe("cached", f"data.cache={run.parent}/other", "run.steps=1")).output.parent / "other"
    held = sum(file.stat().st_size for file in latents.rglob("*.safetensors"))
    assert 0.4 * seen["cache_bytes"] < held < 1.5 * seen["cache_bytes"]
    train(make_recipe("again", f"data.cache={latents}", "run.steps=1"))
    assert seen["cache_bytes"] < 0.5 * held, "what is there is not needed again"


def test_a_disk_that_is_too_small_is_told_before_the_model_is_loaded(
    make_recipe: Make, disk: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(settings: object) -> None:
        raise AssertionError("nothing is loaded before")

    disk(10**6)
    monkeypatch.setattr(families, "load_settings", load)
    recipe = make_recipe("run")
    with pytest.raises(StorageError, match=r"1.0 MB are free.*checkpoints.*run.keep_last") as caught:
        train(recipe)
    assert caught.value.exit_code == 4 and not Path(recipe.run.output).exists()


def test_a_folder_that_cannot_be_written_is_told_too(make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("lorakit.training.preflight.tempfile.TemporaryFile", refuse)
    with pytest.raises(StorageError, match="permission"):
        train(make_recipe("run"))
