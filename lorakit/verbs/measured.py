"""What a recipe wants to be measured beside its training: which pictures' losses are watched."""

from functools import partial

from lorakit.data.dataset import Dataset
from lorakit.data.loader import Loader
from lorakit.recipe import Recipe
from lorakit.training.validation import BANDS, Validation


def measured_sets(recipe: Recipe, data: Dataset) -> dict[str, list[int]]:
    """The examples whose loss is watched, by the name of their set; none where it is never looked at."""
    if not recipe.run.validate_every:
        return {}
    held_out, beside = data.validation(), recipe.run.validate_training
    sets = {"held_out": held_out, "training": data.sample(len(held_out) if beside is None else beside)}
    return {name: entries for name, entries in sets.items() if entries}


def validation_of(recipe: Recipe, data: Dataset, loader: Loader) -> Validation | None:
    """How they are measured, if there are any."""
    sets = measured_sets(recipe, data)
    if not sets:
        return None
    return Validation(
        sets,
        source_of=lambda entry: int(data.examples.sources[entry]),
        sources=len(data.settings.sources),
        batches=partial(loader.fixed, draws=BANDS),
    )
