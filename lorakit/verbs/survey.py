"""A recipe's data, read and planned for its model: what `check` shows and `train` starts from.

No weights are loaded.
"""

import contextlib
from collections.abc import Callable
from dataclasses import replace

from lorakit import families
from lorakit.core.errors import InputError
from lorakit.core.processes import world
from lorakit.data.captions import without_weights
from lorakit.data.dataset import Survey, survey
from lorakit.families.protocol import Description
from lorakit.recipe import Recipe
from lorakit.training.processes import bar


def global_batch(recipe: Recipe) -> int:
    """Examples per optimizer step, over all processes and micro steps."""
    return int(recipe.run.batch_size * recipe.run.accumulate * world())


def survey_recipe(recipe: Recipe) -> Survey:
    """The data of `recipe`; all that is wrong with them, its model's folder included, is in the report's errors."""
    problems: list[str] = []
    description: Description | None = None
    try:
        description = families.describe_settings(recipe.model)
    except InputError as error:
        problems += error.problems
    problems += [
        f"data.sources.{i}.class_prompt: the objective {recipe.objective.kind} does not use it: remove it."
        for i, source in enumerate(recipe.data.sources)
        if source.class_prompt is not None
    ]
    with contextlib.closing(bar(unit="picture", label="reading")) as progress:
        found = survey(
            recipe.data,
            # without a model any side will do: the pictures are looked at all the same
            side_multiple=description.side_multiple if description else 1,
            seed=recipe.run.seed,
            global_batch=global_batch(recipe),
            count_tokens=token_counter(description, weighted=recipe.data.weighted_tags) if description else None,
            token_limit=description.token_limit if description else None,
            steps=recipe.run.steps,
            epochs=recipe.run.epochs,
            on_progress=progress.update,
        )
    if not problems:
        return found
    data = found.dataset if description else None  # for another model, buckets would be others
    return Survey(data, replace(found.report, errors=(*problems, *found.report.errors)))


def token_counter(description: Description, *, weighted: bool) -> Callable[[str], int]:
    """Counts a caption's tokens as the model takes them; `weighted`: without the marks of emphasis."""
    if not weighted:
        return description.count_tokens
    return lambda caption: description.count_tokens(without_weights(caption))
