"""Training: from a recipe to RUN/adapter.safetensors, and on from where a run stopped.

Here the floors below are put together: data and cache, the family, the adapter, the loop, checkpoints, the exporter.
The loop itself is `training/loop.py`.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lorakit import families
from lorakit.core.errors import InputError, LorakitError, Stopped
from lorakit.core.files import write_json, write_text
from lorakit.core.memory import is_lack
from lorakit.core.processes import on_first_rank, rank, world
from lorakit.core.quiet import quiet_libraries
from lorakit.data.cache import refuse_within
from lorakit.data.dataset import Dataset
from lorakit.data.loader import Loader
from lorakit.data.marks import write_marks
from lorakit.data.report import DataReport
from lorakit.data.sheet import thumbnail
from lorakit.diffusion.objectives import OBJECTIVES
from lorakit.export.adapter import source_of
from lorakit.export.files import DTYPES, read_file
from lorakit.optimizers.schedules import factor
from lorakit.recipe import Recipe
from lorakit.training.dry import DryReport, dry_step, told
from lorakit.training.engines import zero_stage
from lorakit.training.execution import explained
from lorakit.training.folder import RunFolder
from lorakit.training.interrupt import Interrupt, watched
from lorakit.training.keeper import Keeper
from lorakit.training.loop import LoopReport, run_loop
from lorakit.training.metrics import MetricsFile
from lorakit.training.processes import Runtime, bar, resolve_precision, started_alone
from lorakit.training.step import Trainee
from lorakit.verbs.alike import base_of, refuse_unlike
from lorakit.verbs.class_pictures import draw_missing
from lorakit.verbs.fit import budget, fitted
from lorakit.verbs.measured import measured_sets, refuse_misread, validation_of
from lorakit.verbs.provenance import provenance
from lorakit.verbs.resume import (
    EXAMPLES,
    binding,
    newest_checkpoint,
    recipe_of,
    refuse_other_base,
    refuse_other_data,
    refuse_other_run,
    with_global_batch,
)
from lorakit.verbs.space import refuse_lack_of_space
from lorakit.verbs.suited import unsuited
from lorakit.verbs.survey import global_batch, survey_recipe
from lorakit.verbs.trainee import prepared

log = logging.getLogger("lorakit")


@dataclass(frozen=True)
class RunResult:
    """Where the run is, how many steps it has done, its last loss (None where no step was left to do), the adapter."""

    output: Path
    steps: int
    loss: float | None
    adapter: Path
    seconds: float


def train(recipe: Recipe) -> RunResult:
    """Trains as `recipe` says and leaves a verified `adapter.safetensors` in its output folder.

    Raises InputError, StorageError, DivergedError or InterruptedRun; what was saved stays.
    """
    return _train(recipe, Path(recipe.run.output), resumed=False)


def resume(run: Path | str, *, overrides: Sequence[str] = (), allow: Sequence[str] = ()) -> RunResult:
    """Goes on with the run in folder `run` from its newest whole checkpoint, bit for bit at equal threads and ranks.

    Settings changed by `overrides` are refused unless they are harmless or named in `allow`. Raises as `train` does,
    and InputError where no checkpoint verifies, the data have changed, or the global batch cannot be kept.
    """
    run = Path(run).resolve()
    return _train(recipe_of(run, overrides=overrides, allow=allow), run, resumed=True, allow=allow)


def dry_run(recipe: Recipe) -> list[str]:
    """What one step of `recipe` on its largest bucket costs, in lines; nothing is left of it but what it cached.

    Raises as `train` does, and InputError where the step does not fit into memory.
    """
    quiet_libraries()
    output = Path(recipe.run.output)
    with contextlib.ExitStack() as stack:
        interrupt = stack.enter_context(watched())
        recipe, runtime = _started(recipe, output, stack)
        data, _ = _surveyed(recipe, output, runtime, interrupt)

        def tried(recipe: Recipe) -> tuple[DryReport, int | None]:
            trainee, loader = prepared(recipe, data, runtime, None, interrupt)
            # what the first pass sets up is no part of a step's time
            report = _dry(recipe, trainee, loader, passes=2)
            return report, report.peak_bytes

        recipe, report = fitted(recipe, tried, gpu=runtime.device.type == "cuda")
    return report.lines(
        accumulate=recipe.run.accumulate,
        steps=recipe.run.steps or data.plan.steps_in(recipe.run.epochs or 1),
        weight_bytes=DTYPES[recipe.run.save_dtype].itemsize,
    )


def _train(recipe: Recipe, output: Path, *, resumed: bool, allow: Sequence[str] = ()) -> RunResult:
    started = time.perf_counter()
    quiet_libraries()
    with contextlib.ExitStack() as stack:
        interrupt = stack.enter_context(watched())
        recipe, runtime = _started(recipe, output, stack)
        found = None
        if resumed:
            stack.enter_context(_owned(output, RunFolder.existing, interrupt))
            found = newest_checkpoint(output)
            if found:
                refuse_other_run(recipe, found, allow=allow)
                recipe = with_global_batch(recipe, found)
        data, data_report = _surveyed(recipe, output, runtime, interrupt, fresh=not resumed)
        recipe = replace(recipe, model=families.pinned(recipe.model))
        if found:
            refuse_other_data(data, found, output)
        first_step = int(found.state["step"]) if found else 0
        last_step = recipe.run.steps or data.plan.steps_in(recipe.run.epochs or 1)
        if last_step < first_step:
            raise InputError(
                f"The run has done {first_step} steps already, and run.steps asks for {last_step}: give more."
            )
        if rank() == 0 and recipe.optimizer.schedule.warmup >= last_step:
            log.warning("optimizer.schedule.warmup is as long as the run: its learning rate never becomes the full one")
        if rank() == 0 and world() > 1:
            counts = (global_batch(recipe), recipe.run.batch_size, recipe.run.accumulate, world())
            log.info("a step takes %d pictures: run.batch_size %d × run.accumulate %d × %d processes", *counts)
        interrupt.check()
        on_first_rank(lambda: refuse_lack_of_space(recipe, data, output, first_step=first_step, last_step=last_step))
        if not resumed:
            stack.enter_context(_owned(output, RunFolder.fresh, interrupt))

        def begin(recipe: Recipe) -> tuple[tuple[Trainee, Loader], int | None]:
            taken = None
            with _begun(recipe, output, data, data_report, resumed=resumed), interrupt.ending():
                trainee, loader = prepared(recipe, data, runtime, found, interrupt)
                if found:
                    refuse_other_base(trainee.family, found, allow=allow)
                # what does not fit into memory fails here, or, on a CPU, in a first step that is as large
                later = runtime.device.type == "cpu" and recipe.run.fit is None and world() == 1
                if first_step < last_step and not (later and loader.is_largest(first_step)):
                    taken = _dry(recipe, trainee, loader).peak_bytes
                if recipe.run.check_model and not resumed:
                    refuse_misread(trainee, data, loader)
                return (trainee, loader), taken

        recipe, (trainee, loader) = fitted(recipe, begin, gpu=runtime.device.type == "cuda", numbers_stay=resumed)
        if recipe.run.attention != trainee.attention:  # it was measured: from here on it is said
            recipe = replace(recipe, run=recipe.run.model_copy(update={"attention": trainee.attention}))
            on_first_rank(lambda: write_text(output / "recipe.toml", recipe.to_toml()))
        progress = stack.enter_context(contextlib.closing(bar(unit="step", initial=first_step, total=last_step)))
        keeper = Keeper(
            output=output,
            run=recipe.run,
            sampling=recipe.sample,
            recipe=recipe.to_toml(paths=False),
            about=provenance(recipe, data, data_report, trainee.family) if rank() == 0 else {},
            facts={
                "global_batch": global_batch(recipe),
                "steps_per_epoch": data.plan.steps_per_epoch,
                "digest": data.plan.digest(),
                "settings": binding(recipe),
                "base": base_of(trainee.family) if rank() == 0 else {},
            },
            trainee=trainee,
            runtime=runtime,
            interrupt=interrupt,
            validation=validation_of(recipe, data, loader),
            file=MetricsFile(output / "metrics.jsonl", step=first_step) if rank() == 0 else None,
            # the line of the step that a run goes on from is written anew
            validations=MetricsFile(output / "validation.jsonl", step=first_step - 1) if rank() == 0 else None,
            bar=progress,
            thumbnail=lambda key: thumbnail(data, data.examples.keys.index(key), side=128),
        )
        try:
            report = _loop(recipe, trainee, loader, keeper, interrupt, first_step=first_step, last_step=last_step)
        except InputError:
            if rank() == 0 and not resumed and not (output / "metrics.jsonl").exists():
                _forget(output)
            raise
        adapter = keeper.finish(report.step)
    return RunResult(output, report.step, report.loss, adapter, time.perf_counter() - started)


def _loop(
    recipe: Recipe,
    trainee: Trainee,
    loader: Loader,
    keeper: Keeper,
    interrupt: Interrupt,
    *,
    first_step: int,
    last_step: int,
) -> LoopReport:
    try:
        with interrupt.noting():
            return run_loop(
                trainee,
                loader.steps(first_step, last_step),
                first_step=first_step,
                last_step=last_step,
                lr_factor=lambda step: factor(recipe.optimizer.schedule, step, last_step),
                save_every=recipe.run.save_every,
                sample_every=recipe.run.sample_every,
                validate_every=recipe.run.validate_every,
                hooks=keeper,
                interrupt=interrupt,
            )
    except (RuntimeError, MemoryError, AssertionError) as error:
        if world() > 1:  # others wait
            raise
        if problem := explained(error):
            raise InputError(problem) from error
        if not is_lack(error):
            raise
    finally:  # a run that fails leaves its last lines too
        keeper.flush()
    # out of the handler, whose traceback holds what was made
    raise told(trainee, loader.largest(), count=global_batch(recipe))


# -- what a run starts from ---------------------------------------------------------------------------------------


def _started(recipe: Recipe, output: Path, stack: contextlib.ExitStack) -> tuple[Recipe, Runtime]:
    """Joins the other processes, until `stack` ends; the recipe then names the precision that "auto" stands for, and
    says whether the model is shared out, for which a launcher may ask too. InputError where another has another."""
    precision, reason = resolve_precision(recipe.run.precision)
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 and zero_stage() == 3
    settled = {"precision": precision, "shard": recipe.run.shard or launched}
    recipe = replace(recipe, run=recipe.run.model_copy(update=settled))
    runtime = stack.enter_context(
        Runtime(
            precision,
            trackers=list(recipe.run.trackers),
            folder=output,
            deterministic=recipe.run.deterministic,
            config=recipe.to_dict(paths=False),
        )
    )
    refuse_unlike(recipe)
    if rank() == 0:
        log.info("precision %s: %s", precision, reason)
        if alone := started_alone():
            log.warning("%s", alone)
    return recipe, runtime


def _surveyed(
    recipe: Recipe, output: Path, runtime: Runtime, interrupt: Interrupt, *, fresh: bool = False
) -> tuple[Dataset, DataReport]:
    """`_data` on every rank, with class pictures: what else is wrong is told before the base begins to draw them."""
    found = on_first_rank(lambda: _data(recipe, output, fresh=fresh))
    if draw_missing(recipe, device=runtime.device, check=interrupt.check):
        found = on_first_rank(lambda: _data(recipe, output, fresh=fresh))
    return found


def _data(recipe: Recipe, output: Path, *, fresh: bool = False) -> tuple[Dataset, DataReport]:
    """The scanned data with their plan, and the report on them.

    Raises InputError with all that is wrong with the output folder, which is to be taken if `fresh`, the model and the
    data.
    """
    problems: list[str] = []
    try:
        refuse_within(output, [Path(source.path) for source in recipe.data.sources], key="run.output")
        if fresh:
            RunFolder.refuse_used(output)
    except InputError as error:
        problems += error.problems
    parts = {"adapter": recipe.adapter, "adapter.text_encoder": recipe.adapter.text_encoder}
    rates = {f"{key}.{name}": rate for key, part in parts.items() if part for name, rate in part.rates().items()}
    problems += recipe.optimizer.problems(rates)
    if recipe.adapter.init_from is not None and fresh:
        try:
            read_file(source_of(Path(recipe.adapter.init_from)))
        except InputError as error:
            problems += [f"adapter.init_from: {problem}" for problem in error.problems]
    surveyed = survey_recipe(recipe)
    problems += surveyed.report.errors
    undrawn = "run.sample_every draws nothing without sample.prompts: name some, or set it to 0"
    advice = [undrawn] if recipe.run.sample_every and not recipe.sample.prompts else []
    if not surveyed.report.errors:
        model = families.describe_settings(recipe.model)
        problems += unsuited(recipe, model)
        advice += OBJECTIVES.module(recipe.objective.kind).advice(recipe.objective, model.process)
    if recipe.run.keep_best and surveyed.dataset and not measured_sets(recipe, surveyed.dataset):
        problems.append(
            'run.keep_best goes by the validation loss, and there is none: name a source with role = "validation" or '
            "set data.validation or run.validate_training, and run.validate_every."
        )
    if problems:
        raise InputError(problems)
    for text in (
        *recipe.optimizer.advice(),
        *advice,
        *surveyed.report.warnings,
        *(f"left out: {reason}" for reason in surveyed.report.skipped),
    ):
        log.warning("%s", text)
    return surveyed.usable(), surveyed.report


def _dry(recipe: Recipe, trainee: Trainee, loader: Loader, *, passes: int = 1) -> DryReport:
    weights = [parameter.numel() for parameter in trainee.parameters.values()]
    return dry_step(
        trainee,
        loader.largest(),
        count=global_batch(recipe),
        passes=passes,
        state_size=recipe.optimizer.state_of(weights) / max(1, sum(weights)),
        allowed=budget(recipe),
    )


# -- the run's folder --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _owned(output: Path, take: Callable[[Path], RunFolder], interrupt: Interrupt) -> Iterator[None]:
    """Takes the run's folder on rank 0, hears what is written to its `control`, and writes how the run ended."""
    folders: list[RunFolder] = []
    code, reason = 1, "ended by an unexpected error"
    with interrupt.noting():
        on_first_rank(lambda: folders.append(take(output)))
        if folders:
            interrupt.listen(output)
    try:
        with interrupt.ending():
            interrupt.check()
            yield
        code, reason = 0, "done"
    except LorakitError as error:
        code, reason = error.exit_code, str(error)
        raise
    except Stopped as stopped:
        code, reason = stopped.exit_code, str(stopped)
        raise
    except KeyboardInterrupt:
        code, reason = 130, "interrupted"
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise
    finally:
        with interrupt.noting():
            for folder in folders:
                folder.release(code=code, reason=reason)


@contextlib.contextmanager
def _begun(recipe: Recipe, output: Path, data: Dataset, report: DataReport, *, resumed: bool) -> Iterator[None]:
    """Writes what a run's folder begins with: all that a resume needs where no checkpoint comes to be.

    Where a new run fails within, before its first step, it goes again, so that a mended recipe may take the folder.
    """

    def write() -> None:
        write_text(output / "recipe.toml", recipe.to_toml())
        write_json(output / "check.json", report.to_json())
        write_marks(output / EXAMPLES, data.examples)

    try:
        on_first_rank(write)
        yield
    except Exception as error:
        if rank() == 0 and not resumed:
            _forget(output)
        if problem := explained(error):
            raise InputError(problem) from error
        raise


def _forget(output: Path) -> None:
    """Removes what `_begun` has written."""
    for name in ("recipe.toml", "check.json", EXAMPLES):
        (output / name).unlink(missing_ok=True)
