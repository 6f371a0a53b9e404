"""Several processes: one training on any split of the global batch, killed groups go on, a lost process ends all."""

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from lorakit.optimizers.schedules import factor
from lorakit.recipe import load_recipe
from lorakit.training import checkpoint
from tests.reliability.harness import Run, Server
from tests.reliability.scene import write_recipe
from tests.reliability.survival import Undisturbed, goes_on, survive, undisturbed, unlike
from tests.verbs.conftest import write_pictures

GLOBAL_BATCH = 24
MORE_LOSSES = [(0, "save"), (1, "micro"), (1, "cache"), (0, "cache"), (1, "validate"), (2, "finish")]
# with something to validate and several checkpoints
LOST = ("run.batch_size=4", "run.accumulate=2", "data.validation=0.2")
SPLITS = [(1, 4), (2, 1), (3, 4), *(pytest.param(*case, marks=pytest.mark.soak) for case in [(2, 4), (3, 1)])]
HOW = (
    "data.sources.0.repeats=4",  # 24 of an epoch, and then the 4 that are left: less than one for each micro step
    "data.validation=0.0",
    "run.steps=7",
    "run.sample_every=0",
    "optimizer.schedule={kind='linear', warmup=2, floor=0.1}",
    "optimizer.eps=0.01",  # a gradient that is wrong by a factor then moves the weights by another length
)


def split(ranks: int, accumulate: int) -> tuple[str, ...]:
    return (f"run.batch_size={GLOBAL_BATCH // ranks // accumulate}", f"run.accumulate={accumulate}")


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_agree(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    """The same examples and rates, the same numbers up to rounding."""
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a["samples"] == b["samples"] and a["lr"] == b["lr"] and a["epoch"] == b["epoch"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6, abs=0)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5, abs=0)


@pytest.fixture(scope="module")
def place(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("ranks")
    return lambda name, *how: write_recipe(folder, name, *HOW, *how, model=server.model)


@pytest.fixture(scope="module")
def alone(server: Server, place: Callable[..., Path]) -> list[dict[str, Any]]:
    """The metrics of one process with one micro step for each bucket."""
    recipe = place("alone", *split(1, 1))
    assert server.run("train", recipe).codes == [0]
    return lines(recipe.with_suffix(""))


@pytest.mark.parametrize(("ranks", "accumulate"), SPLITS)
def test_any_split_of_the_global_batch_is_the_same_training(
    server: Server, place: Callable[..., Path], alone: list[dict[str, Any]], ranks: int, accumulate: int
) -> None:
    recipe = place(f"split-{ranks}-{accumulate}", *split(ranks, accumulate))
    run = server.run("train", recipe, ranks=ranks)
    assert set(run.codes) == {0}, run.output()
    found = lines(recipe.with_suffix(""))
    assert_agree(found, alone)
    assert len(found[0]["samples"]) == GLOBAL_BATCH and len(found[1]["samples"]) == 4
    schedule = load_recipe(recipe).optimizer.schedule
    assert [line["lr"] for line in found] == [0.01 * factor(schedule, step, 7) for step in range(7)]
    assert found[-1]["lr"] == pytest.approx(0.01 * (0.1 + 0.9 / 5)), "one fifth of the way is left to the floor"
    weights = [end(run, rank)["weights"] for rank in range(ranks)]
    assert len(weights[0]) > 10 and all(of_rank == weights[0] for of_rank in weights), "the same bits on every rank"


@pytest.mark.parametrize("shard", [False, True])
def test_there_may_be_more_processes_than_pictures(server: Server, tmp_path: Path, shard: bool) -> None:
    folder = write_pictures(tmp_path / "two", 2)  # of two sizes
    how = (
        f"data.sources.0.path={folder}",
        "data.validation=0.0",
        "run.steps=3",
        "run.sample_every=0",
        "run.accumulate=1",
    )
    one = write_recipe(tmp_path, "one", *how, "run.batch_size=4", "run.accumulate=1", model=server.model)
    how += ("run.batch_size=1", "run.accumulate=1", f"run.shard={shard}".lower())
    four = write_recipe(tmp_path, "four", *how, model=server.model)
    assert server.run("train", one).codes == [0]
    run = server.run("train", four, ranks=4)
    assert set(run.codes) == {0}, run.output()
    assert_agree(lines(one.with_suffix("")), lines(four.with_suffix("")))
    weights = [end(run, rank)["weights"] for rank in range(4)]
    assert len(weights[0]) > 10 and all(of_rank == weights[0] for of_rank in weights)


def end(run: Run, rank: int) -> dict[str, Any]:
    return next(line for line in run.trace(rank) if line["event"] == "finish")


def test_three_processes_killed_again_and_again_end_with_the_same_bits(
    server: Server, place: Callable[..., Path], record_property: Callable[[str, object], None]
) -> None:
    trials = killed_together(server, place, "killed", trials=1)
    record_property("trials", trials)


@pytest.mark.soak
@pytest.mark.parametrize("ranks", [2, 3])
def test_many_killed_groups(
    server: Server, place: Callable[..., Path], record_property: Callable[[str, object], None], ranks: int
) -> None:
    record_property("trials", killed_together(server, place, f"soak-{ranks}", trials=5, ranks=ranks))


def killed_together(server: Server, place: Callable[..., Path], name: str, *, trials: int, ranks: int = 3) -> int:
    """How many kills `trials` runs survived, with dropout and an average, and metrics of the first rank compared."""
    how = ("adapter.dropout=0.2", "run.ema.decay=0.9", *split(ranks, 2))
    whole = undisturbed(server, place(f"{name}-whole", *how), ranks=ranks)
    total = 0
    for trial in range(trials):
        recipe, random = place(f"{name}-{trial}", *how), Random(trial)
        survivor = survive(server, recipe, kills=2, random=random, seconds=0, aim="step", between=(1, 4), ranks=ranks)
        assert unlike(whole, survivor) == []
        total += survivor.kills.total()
    assert total >= trials
    return total


@pytest.fixture(scope="module")
def three(server: Server, place: Callable[..., Path]) -> Undisturbed:
    return undisturbed(server, place("three", *LOST), ranks=3)


@pytest.mark.parametrize(
    ("lost", "event"),
    [(0, "micro"), (2, "save"), *(pytest.param(*case, marks=pytest.mark.soak) for case in MORE_LOSSES)],
)
def test_a_lost_process_ends_the_others(
    server: Server, place: Callable[..., Path], three: Undisturbed, lost: int, event: str
) -> None:
    recipe = place(f"lost-{lost}-{event}", *LOST)
    folder = recipe.with_suffix("")
    run = server.start("train", recipe, ranks=3)
    run.wait_for(event, step=4 if event == "save" else None, rank=lost)
    run.kill(signal.SIGKILL, rank=lost)
    killed = time.monotonic()
    run.wait(timeout=60)
    others = [code for rank, code in enumerate(run.codes) if rank != lost]
    assert run.codes[lost] == -9 and all(code is not None and code > 0 for code in others), run.output()
    assert time.monotonic() - killed < 60
    kept = list((folder / "checkpoints").glob("step-*"))
    assert all(checkpoint.damage(path) is None for path in kept)
    again = server.run(*goes_on(recipe), ranks=3)
    assert set(again.codes) == {0}, again.output()
    assert (folder / "adapter.safetensors").read_bytes() == (three.folder / "adapter.safetensors").read_bytes()
    assert not list(folder.rglob(".*.tmp")), "no half checkpoint is left"


def test_a_run_goes_on_with_another_number_of_processes(
    server: Server, place: Callable[..., Path], alone: list[dict[str, Any]]
) -> None:
    recipe = place("fewer", *split(3, 2))
    folder = recipe.with_suffix("")
    run = server.start("train", recipe, ranks=3)
    run.wait_for("step", step=5)
    run.kill_group(signal.SIGKILL)
    run.wait()
    for ranks in (1, 2):
        copy = Path(shutil.copytree(folder, folder.with_name(f"now-{ranks}")))
        again = server.run("train", "--resume", copy, ranks=ranks)
        assert set(again.codes) == {0}, again.output()
        assert_agree(lines(copy), alone)
