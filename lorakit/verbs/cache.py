"""The cache by itself: filled for a recipe ahead of its training, looked at, and rid of what nobody uses."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from lorakit import families
from lorakit.core.errors import InputError
from lorakit.core.files import printable
from lorakit.core.processes import on_first_rank, rank
from lorakit.core.quiet import quiet_libraries
from lorakit.data.cache import Filled, default_folder
from lorakit.data.dataset import Dataset
from lorakit.data.shards import Cache
from lorakit.data.upkeep import Removed, Usage, is_cache
from lorakit.recipe import Recipe
from lorakit.training.caching import fill_cache
from lorakit.training.interrupt import watched
from lorakit.training.processes import Runtime, resolve_precision
from lorakit.verbs.alike import refuse_unlike
from lorakit.verbs.class_pictures import draw_missing
from lorakit.verbs.survey import survey_recipe

log = logging.getLogger("lorakit")

DAY = 86_400.0


class CacheResult(NamedTuple):
    """What was encoded for a recipe, None where it is encoded anew in every step, and where it lies."""

    folder: Path
    pictures: Filled | None
    captions: Filled | None


def fill(recipe: Recipe) -> CacheResult:
    """Encodes what a training of `recipe` would, on all processes; the training then finds it.

    Raises InputError with all that is wrong with the model and the data.
    """
    quiet_libraries()
    precision, _ = resolve_precision(recipe.run.precision)
    recipe = replace(recipe, run=recipe.run.model_copy(update={"precision": precision}))
    with watched() as interrupt, Runtime(precision, folder=Path(recipe.run.output)) as runtime:
        refuse_unlike(recipe)
        data = on_first_rank(lambda: _data(recipe))
        if draw_missing(recipe, device=runtime.device, check=interrupt.check):
            data = on_first_rank(lambda: _data(recipe))
        text = recipe.adapter.text_encoder is None
        folder = Path(recipe.data.cache) if recipe.data.cache else default_folder()
        if not text and not data.cached_latents:
            return CacheResult(folder, None, None)
        family = families.load_settings(recipe.model, device=runtime.device, precision=precision, later=("",))
        done = fill_cache(Cache(folder), data, family, precision=precision, text=text, check=interrupt.check)
    return CacheResult(folder, done.pictures if data.cached_latents else None, done.captions if text else None)


def _data(recipe: Recipe) -> Dataset:
    surveyed = survey_recipe(recipe)
    if rank() == 0:
        for reason in surveyed.report.skipped:
            log.warning("left out: %s", reason)
    return surveyed.usable()


def usage(folder: Path | None = None) -> tuple[Path, Usage]:
    """The cache's folder and how much there is. InputError for a `folder` that does not exist or is no cache."""
    folder = _existing(folder)
    return folder, Cache(folder).usage() if folder.is_dir() else Usage(0, 0, 0)


def prune(folder: Path | None = None, *, days: float, dry_run: bool = False) -> tuple[Path, Removed]:
    """Deletes what no run used for so many days, or says what that would be. InputError as `usage`."""
    folder = _existing(folder)
    if not folder.is_dir():
        return folder, Removed()
    return folder, Cache(folder).prune(days * DAY, dry_run=dry_run)


def _existing(folder: Path | None) -> Path:
    if folder is None:
        return default_folder()
    try:
        wrong = "" if is_cache(folder) else "holds no cache of lorakit"
    except OSError as error:
        there = not isinstance(error, FileNotFoundError)
        wrong = f"cannot be read ({error.strerror})" if there else "does not exist"
    if wrong:
        raise InputError(f"--folder {printable(folder)} {wrong}: name the folder that data.cache names.")
    return folder
