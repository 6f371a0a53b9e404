"""Signals and RUN/control at any moment: the run ends soon, says so, and goes on to the bits of one left alone."""

import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from lorakit.training import checkpoint
from tests.reliability.harness import Patch, Run, Server
from tests.reliability.scene import write_recipe
from tests.reliability.survival import Survivor, Undisturbed, goes_on, undisturbed, unlike

SOON = 30.0  # seconds within which a run ends after a signal
INT, TERM, USR1 = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1


def slow(where: str, seconds: float) -> Patch:
    return "slow", {"where": where, "seconds": seconds}


@dataclass(frozen=True)
class Moment:
    """When a signal comes: so long after an event, which patches make last longer."""

    event: str
    patches: tuple[Patch, ...]
    after: float = 0.05
    step: int | None = None
    cold: bool = False


MOMENTS = {
    "scan": Moment("", (slow("lorakit.data.inspection:inspect_picture", 0.2),), after=0.05),
    "load": Moment("", (slow("lorakit.families:load_settings", 1.0),), after=0.5),
    "cache": Moment("cache", (slow("lorakit.families.sd:StableDiffusion.encode_images", 0.1),), after=0.25, cold=True),
    "step": Moment("micro", (slow("lorakit.training.step:ready", 0.03),), after=0.1),
    "save": Moment("save", (slow("lorakit.training.checkpoint:save", 0.3),), step=4),
    "validate": Moment("validate", (slow("lorakit.data.loader:_Samples.fixed", 0.2),), step=4),
    "sample": Moment("sample", (slow("lorakit.sampling.pictures:draw", 0.2),), step=5),
    "finish": Moment("finish", (slow("lorakit.export.adapter:export_adapter", 0.3),)),
}


KEEP_ALL = "run.keep_last=0"  # the checkpoint of a stop would push out one that the other run still has


@pytest.fixture(scope="module")
def scene(server: Server, tmp_path_factory: pytest.TempPathFactory) -> "Scene":
    folder = tmp_path_factory.mktemp("signals")
    return Scene(server, folder, undisturbed(server, write_recipe(folder, "whole", KEEP_ALL, model=server.model)))


class Scene:
    """The run that nobody disturbs, and others that are sent signals and compared with it."""

    def __init__(self, server: Server, folder: Path, whole: Undisturbed) -> None:
        self.server, self.folder, self.whole = server, folder, whole

    def recipe(self, *overrides: str, cold: bool = False) -> Path:
        name = f"run-{sum(1 for _ in self.folder.glob('run-*.toml'))}"
        cache = self.folder / (f"cache-{name}" if cold else "cache")
        return write_recipe(self.folder, name, KEEP_ALL, *overrides, model=self.server.model, cache=cache)

    def start(self, recipe: Path, moment: Moment) -> Run:
        run = self.server.start(*goes_on(recipe), patches=moment.patches)
        if moment.event:
            run.wait_for(moment.event, step=moment.step)
        while "precision" not in run.output():
            assert run.alive, run.output()
            time.sleep(0.01)
        time.sleep(moment.after)
        return run

    def goes_on_as_if_nothing_had_been(self, recipe: Path, *runs: Run) -> None:
        last = self.server.run(*goes_on(recipe)) if runs[-1].codes != [0] else runs[-1]
        assert last.codes == [0], last.output()
        survivor = Survivor(recipe.with_suffix(""), [run.trace() for run in (*runs, last)])
        # where it was stopped it saved, which else it would not have
        extra = {line["step"] for run in runs for line in run.trace() if line["event"] == "save"} - set(range(0, 11, 2))
        stops = tuple(f"{kind}/{checkpoint.name_of(step)}" for step in extra for kind in ("adapters", "checkpoints"))
        assert [name for name in unlike(self.whole, survivor) if not name.startswith(stops)] == []


def stopped_well(run: Run, folder: Path, number: int, *, at_the_end: bool) -> None:
    """The run ended soon, as the signal's number says, and what it left is whole."""
    began = time.monotonic()
    code = run.wait(timeout=SOON)
    assert time.monotonic() - began < SOON
    if "precision" not in run.output() or "Step 10 reached" in run.output():
        return  # it was still starting, or all was done: it ended as any program does
    if at_the_end and code == -number:  # after the last of it, when nobody listens any more
        code = 0
    assert code == 128 + number or (at_the_end and code == 0), run.output()
    assert "Traceback" not in run.output(), run.output()
    if folder.exists():
        assert json.loads((folder / "exit.json").read_text())["code"] == code
        assert not (folder / "lock").exists()
        assert not [path for path in folder.rglob(".*") if path.name.endswith(".tmp")]
        found, reasons = checkpoint.newest(folder / "checkpoints")
        assert not reasons
        steps = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
        assert len(steps) == (found.state["step"] if found else 0), "all that was trained is saved"


def stop(scene: Scene, moment: str, number: int, *, group: bool, workers: int) -> None:
    at = MOMENTS[moment]
    recipe = scene.recipe(f"data.workers={workers}", cold=at.cold)
    run = scene.start(recipe, at)
    (run.kill_group if group else run.kill)(number)
    stopped_well(run, recipe.with_suffix(""), number, at_the_end=moment == "finish")
    if moment in ("validate", "sample"):
        assert run.trace()[-1]["event"] != "finish"
    scene.goes_on_as_if_nothing_had_been(recipe, run)


@pytest.mark.parametrize(
    ("moment", "number", "group", "workers"),
    [
        ("cache", TERM, True, 2),
        ("step", INT, True, 2),
        ("save", TERM, False, 0),
        ("validate", INT, False, 0),
        ("sample", TERM, True, 0),
        ("finish", TERM, False, 0),
    ],
)
def test_a_signal_ends_a_run_that_goes_on_as_if_nothing_had_been(
    scene: Scene, moment: str, number: int, group: bool, workers: int
) -> None:
    stop(scene, moment, number, group=group, workers=workers)


@pytest.mark.soak
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("number", "group"), [(INT, False), (INT, True), (TERM, False), (TERM, True)])
@pytest.mark.parametrize("moment", MOMENTS)
def test_signals_at_all_moments(scene: Scene, moment: str, number: int, group: bool, workers: int) -> None:
    stop(scene, moment, number, group=group, workers=workers)


@pytest.mark.soak
@pytest.mark.parametrize("block", range(4))
def test_signals_at_random_moments(scene: Scene, block: int, record_property: Callable[[str, object], None]) -> None:
    """Nobody waits for an event, so a signal may come anywhere, and twice within a second."""
    random, trials = Random(block), 0
    for _ in range(4):
        recipe = scene.recipe(f"data.workers={random.choice([0, 2])}", cold=random.random() < 0.5)
        runs = []
        for _ in range(6):
            run = scene.server.start(*goes_on(recipe))
            time.sleep(random.uniform(0.02, scene.whole.seconds))
            if run.alive:
                number = random.choice([INT, TERM])
                for _ in range(random.choice([1, 1, 2])):
                    (run.kill_group if random.random() < 0.5 else run.kill)(number)
                stopped_well(run, recipe.with_suffix(""), number, at_the_end=True)
                trials += 1
            runs.append(run)
            if run.wait(timeout=SOON) == 0:
                break
        scene.goes_on_as_if_nothing_had_been(recipe, *runs)
    record_property("trials", trials)


@pytest.mark.parametrize("group", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_usr1_saves_and_goes_on(scene: Scene, group: bool) -> None:
    recipe = scene.recipe("run.save_every=0", "run.sample_every=0", f"data.workers={2 * group}")
    run = scene.start(recipe, Moment("step", (slow("lorakit.training.step:ready", 0.03),), step=3, after=0))
    (run.kill_group if group else run.kill)(USR1)
    assert run.wait(timeout=SOON) == 0, run.output()
    saves = [line["step"] for line in run.trace() if line["event"] == "save"]
    assert len(saves) == 2 and saves[0] in (4, 5, 6) and saves[1] == 10


def test_a_second_signal_ends_at_once_and_harms_nothing(scene: Scene) -> None:
    recipe = scene.recipe()
    run = scene.start(recipe, Moment("save", (slow("lorakit.training.checkpoint:save", 3),)))
    run.kill(TERM)
    time.sleep(0.2)
    run.kill(TERM)  # `timeout` and launchers send two at once, which are one
    time.sleep(1.0)
    assert run.alive
    run.kill(TERM)
    assert run.wait(timeout=5) == -TERM
    assert run.trace()[-1]["event"] == "save" and checkpoint.newest(recipe.with_suffix("") / "checkpoints") == (
        None,
        [],
    )
    scene.goes_on_as_if_nothing_had_been(recipe, run)


def test_words_in_the_control_file_are_obeyed(scene: Scene) -> None:
    recipe = scene.recipe("run.save_every=0", "run.sample_every=0")
    folder = recipe.with_suffix("")
    at = Moment("step", (slow("lorakit.training.step:ready", 0.03),), step=1, after=0)
    run = scene.start(recipe, at)
    (folder / "control").write_text("save dance\n")
    run.wait_for("save")
    (folder / "control").write_text("sample\n")
    run.wait_for("sample")
    while not (folder / "samples").exists() and run.alive:
        time.sleep(0.01)
    (folder / "control").write_text("stop\n")
    stopped_well(run, folder, TERM, at_the_end=False)
    assert "dance" in run.output() and not (folder / "control").exists()
    steps = {line["event"]: line["step"] for line in run.trace() if line["event"] in ("save", "sample")}
    assert steps["save"] < 10 and list((folder / "samples").iterdir())
    last = scene.server.run(*goes_on(recipe))
    assert last.codes == [0], last.output()


def test_two_ranks_stop_together_though_one_was_told(scene: Scene) -> None:
    recipe = scene.recipe("run.batch_size=1")
    patches = [slow("lorakit.training.step:ready", 0.02)]
    run = scene.server.start(*goes_on(recipe), ranks=2, patches=patches)
    run.wait_for("step", step=2)
    run.kill(TERM, rank=1)
    stopped_well(run, recipe.with_suffix(""), TERM, at_the_end=False)
    assert run.codes == [143, 143]
