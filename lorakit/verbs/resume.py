"""What a run that goes on starts from: its own recipe, its newest whole checkpoint, the data that it had.

Each function refuses what would silently make another training of it. The training itself is `train.py`.
"""

import logging
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lorakit.core.errors import InputError
from lorakit.core.files import printable
from lorakit.core.processes import on_first_rank, rank, world
from lorakit.core.settings import did_you_mean
from lorakit.data.dataset import Dataset
from lorakit.data.marks import changes
from lorakit.families.protocol import Family
from lorakit.optimizers.schedules import depends_on_total
from lorakit.recipe import Recipe, apply_override, build, changed_keys, flat, known_keys, neutral_keys
from lorakit.training import checkpoint
from lorakit.training.checkpoint import Checkpoint
from lorakit.verbs.alike import base_of

log = logging.getLogger("lorakit")

EXAMPLES = "examples.jsonl"  # what the data were, in the run's folder


def recipe_of(run: Path, *, overrides: Sequence[str], allow: Sequence[str]) -> Recipe:
    """The recipe of the run in folder `run`, changed by `overrides`.

    Raises InputError for a folder without a run, and for changed settings that are neither harmless nor named in
    `allow`.
    """
    file = run / "recipe.toml"
    if not file.is_file():
        raise InputError(f"{printable(run)} holds no run (no recipe.toml): give the folder that a run wrote.")
    try:
        values, written = (tomllib.loads(file.read_text(encoding="utf-8")) for _ in range(2))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{printable(file)} cannot be read ({printable(error)}): put back the run's own.") from None
    for override in overrides:
        apply_override(values, override)
    values["run"]["output"] = str(run)  # the folder may have been moved
    recipe = build(values)
    # both with the defaults of today: a setting that did not exist when the run began has not been changed
    started = build(written)
    before, after = started.to_dict(), recipe.to_dict()
    known = [*known_keys(before), *known_keys(after)]
    problems = [
        f"--allow-change {printable(key)}: there is no such setting.{did_you_mean(key, known)}"
        for key in allow
        if key not in known
    ]
    changed, neutral = changed_keys(before, after), neutral_keys(recipe) | neutral_keys(started)
    problems += [
        f"{key} differs from the run's: a resumed run goes on with its own recipe. Leave it as it is, "
        f"or say --allow-change {key}."
        for key in changed
        if key not in neutral and not _allowed(key, allow)
    ]
    if problems:
        raise InputError(problems)
    if {"run.steps", "run.epochs"} & {*changed} and depends_on_total(recipe.optimizer.schedule):
        log.warning("the learning rate's schedule is now that of the new number of steps: the rate may jump")
    return recipe


def newest_checkpoint(output: Path) -> Checkpoint | None:
    """The checkpoint to go on from, on every rank; None for step 0. Its thread count becomes ours."""

    def choose() -> Path | None:
        found, skipped = checkpoint.newest(output / "checkpoints")
        for reason in skipped:
            log.warning("%s An older checkpoint is used.", reason)
        return found.path if found else None

    path = on_first_rank(choose)
    if path is None:
        return None
    found = checkpoint.load(path)
    torch.set_num_threads(int(found.state["threads"]))
    if rank() == 0 and found.state["processes"] != world():
        log.info("the run had %d processes and has %d now: equal up to rounding", found.state["processes"], world())
    return found


def with_global_batch(recipe: Recipe, found: Checkpoint) -> Recipe:
    """`recipe` with `accumulate` such that the global batch stays as it was, whatever the number of processes."""
    wanted, micro = int(found.state["global_batch"]), recipe.run.batch_size * world()
    if wanted % micro:
        own = recipe.run.batch_size
        fitting = ", ".join(f"{n}" for n in range(1, wanted // own + 1) if wanted % (n * own) == 0)
        raise InputError(
            f"The run has a global batch of {wanted}, which {world()} processes of run.batch_size {own} cannot make: "
            + (f"resume it on so many processes: {fitting}." if fitting else "put run.batch_size back.")
        )
    return replace(recipe, run=recipe.run.model_copy(update={"accumulate": wanted // micro}))


def binding(recipe: Recipe) -> dict[str, str]:
    """The settings that a run's numbers follow from, as JSON by their keys; the global batch is kept on its own."""
    settings, neutral = flat(recipe.to_dict(paths=False)), neutral_keys(recipe)
    return {key: value for key, value in settings.items() if key not in neutral and key != "run.accumulate"}


def refuse_other_run(recipe: Recipe, found: Checkpoint, *, allow: Sequence[str]) -> None:
    """Raises InputError where the checkpoint was written with other settings than these, but for what may change.

    It is another run's then, or a change was allowed once and is not yet in a checkpoint.
    """
    before, after = found.state["settings"], binding(recipe)
    problems = [
        f"{printable(found.path.name)} was written with another {key} than the recipe has: it is another run's, or say "
        f"--allow-change {key}."
        # what a version has added or dropped was not changed by anybody
        for key in sorted(before.keys() & after.keys())
        if before[key] != after[key] and not _allowed(key, allow)
    ]
    if problems:
        raise InputError(problems)


def _allowed(key: str, allow: Sequence[str]) -> bool:
    return any(key == a or key.startswith(f"{a}.") for a in allow)


def refuse_other_base(family: Family, found: Checkpoint, *, allow: Sequence[str]) -> None:
    """Raises InputError where the model's files are not those that the checkpoint was trained on, nor may be others."""
    before, after = found.state.get("base", {}), base_of(family)
    unlike = [part for part in before if before[part] != after.get(part)]
    if unlike and not any(_allowed(key, ["model"]) for key in allow):
        raise InputError(
            f"model.path: the files of {', '.join(unlike)} are not those that this run was started with: put them "
            "back, start a new run, or say --allow-change model.path."
        )


def refuse_other_data(data: Dataset, found: Checkpoint, output: Path) -> None:
    """Raises InputError, naming what differs, where `data` are not those that the run was started with."""
    if found.state["digest"] == data.plan.digest():
        return
    raise InputError(
        [
            "The pictures, captions or buckets are not those that this run was started with: put them back, or start "
            "a new run.",
            *changes(output / EXAMPLES, data.examples),
        ]
    )
