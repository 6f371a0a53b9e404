"""What a run does not put up with: a second process in its folder, other data, another recipe. And what it does."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.reliability.harness import Run, Server
from tests.reliability.scene import differences
from tests.verbs.conftest import write_pictures

Make = Callable[..., Path]
SHORT = ("run.steps=6", "run.sample_every=0", "run.validate_every=0")


def refused(run: Run, *words: str) -> None:
    """It ended with exit code 2 and one message, which has these words."""
    text = run.output()
    assert run.codes == [2] and "Traceback" not in text, text
    assert text.count("error: ") == 1 and all(word in text for word in words), text


def killed(server: Server, recipe: Path, *, step: int = 3) -> Path:
    """The folder of a run that was killed after `step`."""
    run = server.start("train", recipe)
    run.wait_for("micro")
    run.wait_for("step", step=step)
    run.kill(signal.SIGKILL)
    assert run.wait() == -9
    return recipe.with_suffix("")


def test_a_second_process_is_refused_and_the_first_is_unharmed(server: Server, recipe: Make) -> None:
    whole = recipe("whole", *SHORT)
    assert server.run("train", whole).codes == [0]
    file = recipe("run", *SHORT)
    folder = file.with_suffix("")
    slow = ("slow", {"where": "lorakit.training.step:run_step", "seconds": 0.4})
    first = server.start("train", file, patches=[slow])
    first.wait_for("loop")
    refused(server.run("train", file), str(folder), "in use", str(first.pids[0]))
    first.wait_for("step", step=2)
    before = sorted(path.name for path in folder.rglob("*") if "checkpoints" not in str(path))
    refused(server.run("train", "--resume", folder), str(folder), "in use", str(first.pids[0]))
    assert set(before) <= {path.name for path in folder.rglob("*")} and (folder / "lock").exists()
    assert first.wait() == 0, first.output()
    assert differences(whole.with_suffix(""), folder) == []
    assert json.loads((folder / "exit.json").read_text())["code"] == 0


def test_the_lock_of_a_killed_run_is_no_obstacle_to_going_on(server: Server, recipe: Make) -> None:
    file = recipe("run", *SHORT)
    folder = killed(server, file)
    assert (folder / "lock").exists() and not (folder / "exit.json").exists()
    refused(server.run("train", file), "lorakit train --resume")
    assert server.run("train", "--resume", folder).codes == [0]
    assert not (folder / "lock").exists()


def test_other_data_are_refused_by_name_and_those_of_before_go_on(server: Server, recipe: Make, tmp_path: Path) -> None:
    whole, file = recipe("whole", *SHORT), recipe("run", *SHORT)
    assert server.run("train", whole).codes == [0]
    folder, photos, kept = killed(server, file), tmp_path / "photos", tmp_path / "kept"
    shutil.copytree(photos, kept)

    def repaint() -> None:
        with Image.open(photos / "03.png") as picture:
            picture.putpixel((1, 1), (1, 2, 3))
            picture.save(photos / "03.png")

    changes: dict[str, tuple[Callable[[], object], str]] = {
        "a caption": (lambda: (photos / "02.txt").write_text("another thing"), "0/02.png has changed"),
        "a pixel": (repaint, "0/03.png has changed"),
        "one more": (lambda: write_pictures(photos, 8, first=7), "0/07.png is new"),
        "one less": (lambda: [(photos / f"04.{end}").unlink() for end in ("png", "txt")], "0/04.png is gone"),
    }
    for change, words in changes.values():
        change()
        refused(server.run("train", "--resume", folder), words)
        shutil.rmtree(photos)
        shutil.copytree(kept, photos)
    assert server.run("train", "--resume", folder).codes == [0]
    assert differences(whole.with_suffix(""), folder) == []


def test_another_recipe_is_refused_by_its_keys_and_more_steps_are_had_by_asking(server: Server, recipe: Make) -> None:
    constant = ("optimizer.schedule.kind=constant", *SHORT)
    longer, file = recipe("longer", *constant, "run.steps=8"), recipe("run", *constant)
    assert server.run("train", longer).codes == [0]
    folder = killed(server, file)
    before = {
        path.relative_to(folder).as_posix() for path in folder.glob("adapters/*")
    }  # these say how they were asked for
    changed = ("optimizer.lr=0.5", "run.seed=3", "adapter.rank=4", "run.steps=8", "run.save_every=3")
    run = server.run("train", "--resume", folder, *changed)
    refused(run, *(f"{key} differs" for key in ("optimizer.lr", "run.seed", "adapter.rank", "run.steps")))
    assert "save_every" not in run.output(), "that one does no harm"
    run = server.run("train", "--resume", folder, "run.steps=8", "--allow-change", "run.steps")
    assert run.codes == [0], run.output()
    assert {*differences(longer.with_suffix(""), folder)} <= before, "as if it had been asked for at once"


@pytest.mark.parametrize(("steps", "words"), [("5", "6 steps already"), ("9", "schedule is now that of")])
def test_a_run_that_is_done_may_be_made_longer_but_not_shorter(
    server: Server, recipe: Make, steps: str, words: str
) -> None:
    file = recipe("run", *SHORT)
    assert server.run("train", file).codes == [0]
    run = server.run("train", "--resume", file.with_suffix(""), f"run.steps={steps}", "--allow-change", "run.steps")
    assert run.codes == [0 if steps == "9" else 2] and words in run.output(), run.output()
