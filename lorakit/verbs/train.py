"""Training: from a recipe to RUN/adapter.safetensors, and on from where a run stopped.

Here the floors below are put together: data and cache, the family, the adapter, the loop, checkpoints, the exporter.
The loop itself is `training/loop.py`.
"""

import contextlib
import logging
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit import families
from lorakit.adapters import ADAPTERS, copy_adapter_state, trainable_parameters
from lorakit.adapters.state import state_from
from lorakit.core.errors import InputError, LorakitError
from lorakit.core.files import printable, write_json, write_text
from lorakit.core.processes import on_first_rank, rank, world
from lorakit.core.quiet import quiet_libraries
from lorakit.core.settings import did_you_mean
from lorakit.data.cache import default_folder, refuse_within
from lorakit.data.dataset import Dataset
from lorakit.data.loader import Loader
from lorakit.data.report import DataReport
from lorakit.data.shards import Cache
from lorakit.diffusion.objectives import OBJECTIVES
from lorakit.export.files import DTYPES
from lorakit.families.protocol import Family
from lorakit.optimizers import OPTIMIZERS
from lorakit.optimizers.schedules import factor
from lorakit.recipe import Recipe, apply_override, build, changed_keys, known_keys
from lorakit.training import checkpoint
from lorakit.training.caching import fill_cache, text_encoder
from lorakit.training.checkpoint import Checkpoint
from lorakit.training.folder import RunFolder
from lorakit.training.interrupt import watched
from lorakit.training.keeper import Keeper
from lorakit.training.loop import run_loop
from lorakit.training.metrics import MetricsFile
from lorakit.training.processes import Runtime, bar, resolve_precision
from lorakit.training.step import Trainee
from lorakit.training.validation import DRAWS
from lorakit.verbs.survey import global_batch, survey_recipe

log = logging.getLogger("lorakit")

# what a resumed run may change and still train on the same numbers
HARMLESS = (
    "run.output",
    "run.save_every",
    "run.keep_last",
    "run.sample_every",
    "run.validate_every",
    "run.trackers",
    "sample.",
    "data.workers",
    "data.cache",
)


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
    file = run / "recipe.toml"
    if not file.is_file():
        raise InputError(f"{printable(run)} holds no run (no recipe.toml): give the folder that a run wrote.")
    before = tomllib.loads(file.read_text(encoding="utf-8"))
    values = tomllib.loads(file.read_text(encoding="utf-8"))
    for override in overrides:
        apply_override(values, override)
    values["run"]["output"] = str(run)  # the folder may have been moved
    recipe = build(values)
    known = [*known_keys(before), *known_keys(recipe.to_dict())]
    unknown = [key for key in allow if key not in known]
    if unknown:
        raise InputError(
            [f"--allow-change {printable(key)}: there is no such setting.{did_you_mean(key, known)}" for key in unknown]
        )
    refused = [
        key
        for key in changed_keys(before, recipe.to_dict())
        if not key.startswith(HARMLESS) and not any(key == a or key.startswith(f"{a}.") for a in allow)
    ]
    if refused:
        raise InputError(
            [
                f"{key} differs from the run's: a resumed run goes on with its own recipe. Leave it as it is, "
                f"or say --allow-change {key}."
                for key in refused
            ]
        )
    return _train(recipe, run, resumed=True)


def _train(recipe: Recipe, output: Path, *, resumed: bool) -> RunResult:
    started = time.perf_counter()
    quiet_libraries()
    precision, reason = resolve_precision(recipe.run.precision)
    recipe = replace(recipe, run=recipe.run.model_copy(update={"precision": precision}))
    runtime = Runtime(precision, trackers=list(recipe.run.trackers), folder=output)
    if rank() == 0:
        log.info("precision %s: %s", precision, reason)
    found = None
    if resumed:
        on_first_rank(lambda: RunFolder.refuse_busy(output))
        found = _newest_checkpoint(output)
        recipe = _keep_global_batch(recipe, found)
    data, data_report = on_first_rank(lambda: _data(recipe, output, resumed=resumed))
    if found and found.state["digest"] != data.plan.digest():
        raise InputError(
            "The pictures, captions or buckets are not those that this run was started with: "
            "put them back, or start a new run."
        )
    first_step = int(found.state["step"]) if found else 0
    last_step = recipe.run.steps or data.plan.steps_in(recipe.run.epochs or 1)
    if last_step < first_step:
        raise InputError(f"The run has done {first_step} steps already, and run.steps asks for {last_step}: give more.")
    if rank() == 0 and recipe.optimizer.schedule.warmup >= last_step:
        log.warning("optimizer.schedule.warmup is as long as the run: its learning rate never becomes the full one")
    family = families.load_settings(recipe.model)
    family.to(runtime.device, DTYPES[precision])
    adapted = _adapted(recipe, family)
    _inject(recipe, family, adapted)
    loader = _loader(recipe, data, family, text_encoders_adapted=len(adapted) > 1)
    trainee = _trainee(recipe, data, family, adapted, runtime)
    if found:
        copy_adapter_state(adapted, state_from(found.adapter, found.state["adapter"]))
        checkpoint.restore_optimizer(trainee.optimizer, trainee.parameters, found.optimizer)
        if trainee.scaler:
            trainee.scaler.load_state_dict(found.state["scaler"])
    progress_bar = bar(unit="step", initial=first_step, total=last_step)
    with _owned(output, resumed=resumed), watched() as interrupt, contextlib.closing(progress_bar) as progress:
        keeper = Keeper(
            output=output,
            run=recipe.run,
            sampling=recipe.sample,
            recipe=recipe.to_toml(paths=False),
            facts={
                "global_batch": global_batch(recipe),
                "steps_per_epoch": data.plan.steps_per_epoch,
                "digest": data.plan.digest(),
            },
            trainee=trainee,
            runtime=runtime,
            validation=(lambda: loader.validation(DRAWS)) if data.validation() else None,
            file=_start_files(recipe, output, data_report, step=first_step) if rank() == 0 else None,
            # the line of the step that a run goes on from is written anew
            validations=MetricsFile(output / "validation.jsonl", step=first_step - 1)
            if rank() == 0 and data.validation()
            else None,
            bar=progress,
        )
        try:
            report = run_loop(
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
        finally:  # a run that fails leaves its last lines too
            keeper.flush()
        adapter = keeper.finish()
    return RunResult(output, report.step, report.loss, adapter, time.perf_counter() - started)


# -- what a run starts from ---------------------------------------------------------------------------------------


def _newest_checkpoint(output: Path) -> Checkpoint | None:
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


def _keep_global_batch(recipe: Recipe, found: Checkpoint | None) -> Recipe:
    """`recipe` with `accumulate` such that the global batch stays as it was, whatever the number of processes."""
    if found is None:
        return recipe
    wanted, micro = int(found.state["global_batch"]), recipe.run.batch_size * world()
    if wanted % micro:
        raise InputError(
            f"The run has a global batch of {wanted}, which {world()} processes of run.batch_size "
            f"{recipe.run.batch_size} cannot make: resume it on a number of processes that divides it."
        )
    return replace(recipe, run=recipe.run.model_copy(update={"accumulate": wanted // micro}))


def _data(recipe: Recipe, output: Path, *, resumed: bool) -> tuple[Dataset, DataReport]:
    """The scanned data with their plan, and the report on them.

    Raises InputError with all that is wrong with the output folder, the model and the data.
    """
    problems: list[str] = []
    try:
        refuse_within(output, [Path(source.path) for source in recipe.data.sources], key="run.output")
        if not resumed:
            RunFolder.refuse_used(output)
    except InputError as error:
        problems += error.problems
    surveyed = survey_recipe(recipe)
    problems += surveyed.report.errors
    if problems:
        raise InputError(problems)
    for text in (*surveyed.report.warnings, *(f"left out: {reason}" for reason in surveyed.report.skipped)):
        log.warning("%s", text)
    return surveyed.usable(), surveyed.report


def _adapted(recipe: Recipe, family: Family) -> dict[str, nn.Module]:
    """The components that get an adapter, the backbone first."""
    names = [family.backbone]
    if recipe.adapter.text_encoder is not None:
        if not family.text_encoders:
            raise InputError(
                f"adapter.text_encoder: the stock pipeline of {family.name} loads no adapter for its text encoders: "
                "leave the section out."
            )
        names += family.text_encoders
    return {name: family.components[name] for name in names}


def _loader(recipe: Recipe, data: Dataset, family: Family, *, text_encoders_adapted: bool) -> Loader:
    """Fills the cache, with the other ranks, and makes the loader that reads it."""
    cache = Cache(Path(recipe.data.cache) if recipe.data.cache else default_folder())
    encoded = fill_cache(cache, data, family, precision=recipe.run.precision, text=not text_encoders_adapted)
    return Loader(
        data,
        cache,
        latents_fingerprint=encoded.latents,
        text_fingerprint=encoded.text,
        latent_shapes={bucket: family.latent_shape(*bucket) for bucket in data.buckets},
        seed=recipe.run.seed,
        batch_size=recipe.run.batch_size,
        rank=rank(),
        world=world(),
        workers=recipe.data.workers,
    )


# -- what is trained ----------------------------------------------------------------------------------------------


def _part(recipe: Recipe, family: Family, component: str) -> Any:
    """The adapter settings of a component."""
    return recipe.adapter if component == family.backbone else recipe.adapter.text_encoder


def _inject(recipe: Recipe, family: Family, adapted: Mapping[str, nn.Module]) -> None:
    inject = ADAPTERS.module(recipe.adapter.kind).inject
    for name, module in adapted.items():
        part = _part(recipe, family, name)
        inject(module, part, targets=part.targets or family.default_targets[name], seed=recipe.run.seed)
        module.train()  # dropout of the adapter, gradient checkpointing
        if recipe.run.gradient_checkpointing:
            # diffusers and transformers have different names for it
            switch: Any = getattr(module, "enable_gradient_checkpointing", None)
            switch = switch or getattr(module, "gradient_checkpointing_enable")  # noqa: B009
            switch()


def _trainee(
    recipe: Recipe, data: Dataset, family: Family, adapted: Mapping[str, nn.Module], runtime: Runtime
) -> Trainee:
    parameters = trainable_parameters(adapted)
    groups: list[dict[str, Any]] = []
    for name in adapted:
        lr = _part(recipe, family, name).lr or recipe.optimizer.lr
        own = [p for key, p in parameters.items() if key.startswith(f"{name}.")]
        groups.append({"params": own, "lr": lr, "full_lr": lr, "name": name})
    return Trainee(
        family=family,
        encode_text=text_encoder(data, family),
        adapted=adapted,
        parameters=parameters,
        optimizer=OPTIMIZERS.module(recipe.optimizer.kind).build(recipe.optimizer, groups),
        objective=OBJECTIVES.module(recipe.objective.kind).build(recipe.objective, family.process),
        device=runtime.device,
        autocast=runtime.autocast,
        scaler=runtime.scaler,
        max_grad_norm=recipe.optimizer.max_grad_norm,
        seed=recipe.run.seed,
    )


# -- the run's folder --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _owned(output: Path, *, resumed: bool) -> Iterator[None]:
    """Takes the run's folder on rank 0 and writes how the run ended."""
    folders: list[RunFolder] = []
    take = RunFolder.existing if resumed else RunFolder.fresh
    on_first_rank(lambda: folders.append(take(output)))
    code, reason = 1, "ended by an unexpected error"
    try:
        yield
        code, reason = 0, "done"
    except LorakitError as error:
        code, reason = error.exit_code, str(error)
        raise
    except KeyboardInterrupt:
        code, reason = 130, "interrupted"
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise
    finally:
        for folder in folders:
            folder.release(code=code, reason=reason)


def _start_files(recipe: Recipe, output: Path, report: DataReport, *, step: int) -> MetricsFile:
    """Writes what is known at the start, and opens the metrics after `step`."""
    write_text(output / "recipe.toml", recipe.to_toml())
    write_json(output / "check.json", report.to_json())
    return MetricsFile(output / "metrics.jsonl", step=step)
