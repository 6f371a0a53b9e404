"""The global batch of a run stays, whatever the number of processes. Whole resumes: tests/reliability."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit.core.errors import InputError
from lorakit.recipe import Recipe
from lorakit.training.checkpoint import Checkpoint
from lorakit.verbs.resume import with_global_batch


@pytest.mark.parametrize(
    ("processes", "batch_size", "found"),
    [
        (1, 2, 6),
        (2, 3, 2),
        (3, 2, 2),
        (4, 2, "so many processes: 1, 2, 3, 6"),
        (5, 3, "so many processes: 1, 2, 4"),
        (1, 5, "put run.batch_size back"),
    ],
)
def test_the_global_batch_stays(
    processes: int,
    batch_size: int,
    found: int | str,
    make_recipe: Callable[..., Recipe],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("lorakit.verbs.resume.world", lambda: processes)
    recipe = make_recipe("run", f"run.batch_size={batch_size}")
    checkpoint = Checkpoint(tmp_path, tensors={}, state={"global_batch": 12})
    if isinstance(found, int):
        assert with_global_batch(recipe, checkpoint).run.accumulate == found
        return
    with pytest.raises(InputError, match=found):
        with_global_batch(recipe, checkpoint)
