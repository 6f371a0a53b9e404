"""Finding settings with which a training fits into memory: the cheapest sufficient ones, by trying.

A trial is the model with its adapters and the dry step on the largest bucket, so that what is decided was measured.
"""

import gc
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch

from lorakit.core.errors import InputError
from lorakit.core.processes import rank
from lorakit.recipe import Recipe
from lorakit.training.dry import TooLarge

log = logging.getLogger("lorakit")

T = TypeVar("T")


def budget(recipe: Recipe) -> int | None:
    """The bytes that `run.fit` allows, if it says so."""
    fit = recipe.run.fit
    return None if fit in (None, "auto") else int(float(str(fit).removesuffix("GB")) * 1e9)


def fitted(
    recipe: Recipe, attempt: Callable[[Recipe], T], *, gpu: bool, numbers_stay: bool = False
) -> tuple[Recipe, T]:
    """The recipe, or with `run.fit` the first of the smaller ones, whose `attempt` fits into memory, and what it gave.

    `numbers_stay`: only with settings that change no number. Raises InputError where none fits.
    """
    allowed = budget(recipe)
    if gpu and allowed is not None:
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total))
    problems: list[str] = []
    for smaller, change in _rungs(recipe, gpu=gpu, numbers_stay=numbers_stay):
        if change and rank() == 0:
            log.info("run.fit: it does not fit, and is tried with %s", change)
        try:
            return smaller, attempt(smaller)
        except TooLarge as error:
            problems = error.problems
        except torch.OutOfMemoryError:  # of the weights alone
            problems = ['The model does not fit into memory: set model.quantize = "nf4", or run.offload = 1.0.']
        # out of the handler, whose traceback holds what was made
        gc.collect()
        if gpu:
            torch.cuda.empty_cache()
    if recipe.run.fit is None:
        raise InputError([*problems, 'run.fit = "auto" finds out what is enough.'])
    raise InputError([*problems, "run.fit has nothing left to try: lower data.buckets.resolution."])


def _rungs(recipe: Recipe, *, gpu: bool, numbers_stay: bool) -> Iterator[tuple[Recipe, str]]:
    """Recipes that take ever less memory, each with what is changed to the one before: first what changes no number,
    and of that what costs the least time."""
    yield recipe, ""
    if recipe.run.fit is None:
        return
    run = recipe.run
    steps: list[tuple[str, dict[str, Any]]] = []
    if not run.gradient_checkpointing:
        steps.append(("run", {"gradient_checkpointing": True}))
    if run.batch_size > 1 and not numbers_stay:  # but for rounding
        steps.append(("run", {"batch_size": 1, "accumulate": run.accumulate * run.batch_size}))
    if gpu and not run.compile and not run.shard:
        steps += [("run", {"offload": share}) for share in (0.5, 1.0) if share > (run.offload or 0)]
        steps += [("run", {"offload_activations": True})] if not run.offload_activations else []
    if recipe.model.quantize is recipe.model.compute is None and not numbers_stay and not run.shard:
        steps += [("model", {"quantize": kind}) for kind in ("int8", "nf4")]
    for section, changes in steps:
        recipe = replace(recipe, **{section: getattr(recipe, section).model_copy(update=changes)})
        yield recipe, ", ".join(f"{section}.{key} = {value}" for key, value in changes.items())
