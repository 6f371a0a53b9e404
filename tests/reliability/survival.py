"""Killing a run again and again until it is through, and comparing what it left with a run that nobody disturbed."""

import shutil
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests.reliability.harness import Patch, Run, Server
from tests.reliability.scene import differences, micro_steps


@dataclass(frozen=True)
class Undisturbed:
    """A run from start to end in one process: its folder, its trace, and how long it took."""

    recipe: Path
    folder: Path
    micro: dict[str, set[str]]
    seconds: float


@dataclass
class Survivor:
    """A run that was killed: its folder, the traces of its processes, where the kills fell (the last event before)."""

    folder: Path
    traces: list[list[dict[str, Any]]] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)


def undisturbed(server: Server, recipe: Path, *, ranks: int = 1, patches: Sequence[Patch] = ()) -> Undisturbed:
    """Trains `recipe`, whose run's folder bears its name, to the end."""
    started = time.monotonic()
    run = server.run("train", recipe, ranks=ranks, patches=patches)
    assert set(run.codes) == {0}, run.output()
    traces = [run.trace(rank) for rank in range(ranks)]
    return Undisturbed(recipe, recipe.with_suffix(""), micro_steps(traces), time.monotonic() - started)


def goes_on(recipe: Path) -> tuple[str, ...]:
    """The command line that a person gives after a kill: resume where there is a run, else start anew."""
    folder = recipe.with_suffix("")
    if (folder / "recipe.toml").exists():
        return ("train", "--resume", str(folder))
    if folder.exists():  # killed in the instant before it wrote its recipe: the message asks for this
        assert all(path.name == "lock" or path.name.startswith(".") for path in folder.iterdir())
        shutil.rmtree(folder)
    return ("train", str(recipe))


def survive(
    server: Server,
    recipe: Path,
    *,
    kills: int,
    random: Random,
    seconds: float,
    aim: str | None = None,
    between: tuple[int, int] = (1, 3),
    ranks: int = 1,
    patches: Sequence[Patch] = (),
) -> Survivor:
    """Starts the run and kills it up to `kills` times, going on after each, until it is through.

    A kill comes at a uniform moment of `seconds`, or, where `aim` names an event, within a hundredth of a second after
    one of these that is `between` so many of the process. All processes of the run are killed.
    """
    survivor = Survivor(recipe.with_suffix(""))
    for attempt in range(kills + 1):
        run = server.start(*goes_on(recipe), ranks=ranks, patches=patches)
        if attempt < kills:
            if aim is None:
                time.sleep(random.uniform(0, seconds))
            else:
                _await(run, aim, random.randint(*between))
                time.sleep(random.uniform(0, 0.01))
            alive = run.alive
            run.kill_group(signal.SIGKILL)
        code = run.wait()
        survivor.traces += [run.trace(rank) for rank in range(ranks)]
        if attempt < kills and alive and code == -signal.SIGKILL:
            trace = run.trace()
            survivor.kills[trace[-1]["event"] if trace else "start"] += 1
            continue
        assert code == 0, run.output()
        break
    return survivor


def _await(run: Run, event: str, count: int) -> None:
    """Waits for the `count`-th event of this name, or the end."""
    while run.alive and sum(line["event"] == event for line in run.trace()) < count:
        time.sleep(0.002)


def unlike(whole: Undisturbed, survivor: Survivor) -> list[str]:
    """All in which the survivor is not bit for bit the undisturbed run; nothing where it is."""
    found = differences(whole.folder, survivor.folder)
    micro = micro_steps(survivor.traces)
    found += [f"micro step {numbers}" for numbers, of_it in whole.micro.items() if micro.get(numbers) != of_it]
    return found + [f"micro step {numbers} of its own" for numbers in micro.keys() - whole.micro.keys()]
