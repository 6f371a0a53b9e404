"""kill -9 before every file operation of a save and of a resume's beginning, and within every write.

What a power cut does to files that were renamed before they were synced cannot be seen this way:
tests/core/test_files.py watches the order.
"""

import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit.training.folder import RunFolder
from lorakit.training.metrics import MetricsFile
from tests.reliability import saves
from tests.reliability.operations import Operations, in_child


def killed(run: Path, action: saves.Action, *, point: int) -> bool:
    """Whether `action` has so many operations: it is killed before that one."""

    def child() -> None:
        operations, count = Operations(), 0

        def act(_: str, half: Callable[[], object]) -> None:
            nonlocal count
            count += 1
            if count == point:
                half()
                os.kill(os.getpid(), signal.SIGKILL)

        operations.act = act
        action(run)
        operations.act = None

    status = in_child(child)
    assert status in (0, signal.SIGKILL)
    return status != 0


@pytest.mark.parametrize(("scene", "points"), [*zip(saves.SCENES, (60, 55, 55, 25))])
def test_a_kill_at_any_operation_leaves_the_old_or_the_new_state_whole(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
    scene: str,
    points: int,
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # takes long, and only a power cut would tell
    steps, action = saves.SCENES[scene]
    saves.begin(tmp_path / "before", steps)
    before = saves.whole(tmp_path / "before")
    done, run = shutil.copytree(tmp_path / "before", tmp_path / "done"), tmp_path / "run"
    RunFolder.existing(done)
    action(done)
    after = saves.whole(done)
    seen: Counter[tuple[int, int]] = Counter()
    while True:
        shutil.copytree(tmp_path / "before", run)
        if not killed(run, action, point=seen.total() + 1):
            break
        found = saves.whole(run)
        assert found in (before, after)
        seen[found] += 1
        RunFolder.existing(run)
        assert saves.litter(run) == [] and saves.whole(run) == found
        MetricsFile(run / "metrics.jsonl", step=found[0])
        assert saves.metrics(run)[-1:] == [found[0]] or action is saves.take
        action(run)  # once more, and nothing tells of the kill
        assert saves.tree(run) == saves.tree(done)
        shutil.rmtree(run)
    assert seen.total() >= points
    assert seen[before] > 20 and (seen[after] > 20 or before == after)
    record_property("trials", seen.total())
