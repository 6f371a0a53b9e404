"""Finding settings with which a training fits into memory: the cheapest sufficient ones, by trying.

A trial is the model with its adapters and the dry step on the largest bucket, so that what is decided was measured.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from lorakit.core.errors import InputError
from lorakit.core.memory import is_lack, let_go
from lorakit.core.processes import rank
from lorakit.optimizers import adamw8bit
from lorakit.recipe import Recipe
from lorakit.training.dry import TooLarge

log = logging.getLogger("lorakit")

T = TypeVar("T")
Changes = Mapping[str, Any]  # values by their keys in the recipe

_AGAIN, _SHARES = "run.gradient_checkpointing", (0.25, 0.5, True)
_EIGHT_BITS = 'optimizer.kind = "adamw8bit"'
_NOTICEABLE = 100e6  # bytes: saving less is not worth other numbers


def budget(recipe: Recipe) -> int | None:
    """The bytes that `run.fit` allows, if it says so."""
    fit = recipe.run.fit
    return None if fit in (None, "auto") else int(float(str(fit).removesuffix("GB")) * 1e9)


def fitted(
    recipe: Recipe, attempt: Callable[[Recipe], tuple[T, int | None]], *, gpu: bool, numbers_stay: bool = False
) -> tuple[Recipe, T]:
    """The recipe, or with `run.fit` the first of the smaller ones, whose `attempt` fits into memory, and what it gave.

    An attempt gives the bytes that it took too, where they are known. `numbers_stay`: only with settings that change
    no number. Raises InputError where none fits.
    """
    allowed = budget(recipe)
    with _allowed(allowed) if gpu and allowed is not None else contextlib.nullcontext():
        return _tried(recipe, attempt, allowed, gpu=gpu, numbers_stay=numbers_stay)


@contextlib.contextmanager
def _allowed(number: int) -> Iterator[None]:
    """Within it torch takes no more bytes of the GPU's memory."""
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, number / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _tried(
    recipe: Recipe,
    attempt: Callable[[Recipe], tuple[T, int | None]],
    allowed: int | None,
    *,
    gpu: bool,
    numbers_stay: bool,
) -> tuple[Recipe, T]:
    failures: list[TooLarge] = []
    for changes, cost in _rungs(recipe, failures, gpu=gpu, numbers_stay=numbers_stay):
        if failures:
            _say(f"{_taken(failures[-1].peak, allowed)}; tried with {_words(changes)}: {cost}")
        smaller = _changed(recipe, changes)
        try:
            found, taken = attempt(smaller)
            if recipe.run.fit is not None and taken is not None:
                without = f" (without: {_taken(failures[0].peak, None)})" if failures else ""
                _say(f"{_taken(taken, allowed)} with {_words(changes) or 'the recipe as it is'}{without}")
            return smaller, found
        except TooLarge as error:
            failures.append(error.with_traceback(None))
        except (RuntimeError, MemoryError) as error:  # of the weights alone
            if not is_lack(error):
                raise
            failures.append(
                TooLarge('The model does not fit into memory: set model.quantize = "nf4", or run.offload = 1.0.')
            )
        # out of the handler, whose traceback holds what was made
        let_go()
    last = (
        'run.fit = "auto" finds out what is enough.'
        if recipe.run.fit is None
        else "run.fit has nothing left to try: lower data.buckets.resolution."
    )
    raise InputError([*failures[-1].problems, last])


def _rungs(
    recipe: Recipe, failures: Sequence[TooLarge], *, gpu: bool, numbers_stay: bool
) -> Iterator[tuple[Changes, str]]:
    """What is changed to take ever less memory, and what that costs: first what changes no number, and of that what
    costs the least time. `failures` are those of the rungs before, when the next is asked for."""
    yield {}, ""
    run = recipe.run
    if run.fit is None:
        return
    again: list[Changes] = [{}, *({_AGAIN: share} for share in _SHARES if share > run.gradient_checkpointing)]
    for changes in again[1:]:
        yield changes, f"{changes[_AGAIN]:.0%} of the blocks compute twice".replace("%", " %")
    most: Changes = again[-1]
    if run.batch_size > 1 and not numbers_stay:  # but for rounding
        alone: Changes = {"run.batch_size": 1, "run.accumulate": run.accumulate * run.batch_size}
        for changes in again:
            yield {**changes, **alone}, "one picture at a time"
        most = {**most, **alone}
    if gpu and not run.compile and not run.shard:
        for share in (0.5, 1.0):
            if share > (run.offload or 0):
                most = {**most, "run.offload": share}
                yield most, "weights come to the GPU in each step"
        if not run.offload_activations:
            most = {**most, "run.offload_activations": True}
            yield most, "activations leave the GPU and come back"
    if numbers_stay:
        return
    if failures[-1].saved.get(_EIGHT_BITS, 0) >= _NOTICEABLE and not adamw8bit.Settings().problems({}):
        most = {**most, "optimizer.kind": "adamw8bit"}
        yield most, "the optimizer's state is rounded"
    whole = recipe.model.quantize is recipe.model.compute is None and not run.shard
    for kind in ("int8", "nf4") if whole else ():
        most = {**most, "model.quantize": kind}
        yield most, "the model's weights are rounded"


def _changed(recipe: Recipe, changes: Changes) -> Recipe:
    for key, value in changes.items():
        section, _, name = key.partition(".")
        own: Any = getattr(recipe, section)
        if key == "optimizer.kind":
            changed: Any = adamw8bit.Settings.model_validate({**own.model_dump(), "kind": value})
        else:
            changed = own.model_copy(update={name: value})
        parts: dict[str, Any] = {section: changed}
        recipe = replace(recipe, **parts)
    return recipe


def _taken(taken: int | None, allowed: int | None) -> str:
    if taken is None:
        return "it does not fit into memory"
    return f"{taken / 1e9:.2f} GB" + ("" if allowed is None else f" of {allowed / 1e9:.2f} GB allowed")


def _words(changes: Changes) -> str:
    return ", ".join(f"{key} = {json.dumps(value)}" for key, value in changes.items())


def _say(text: str) -> None:
    if rank() == 0:
        log.info("run.fit: %s", text)
