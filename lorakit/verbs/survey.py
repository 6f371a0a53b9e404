"""A recipe's data, read and planned for its model: what `check` shows and `train` starts from.

No weights are loaded.
"""

import contextlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from lorakit import families
from lorakit.core.errors import InputError
from lorakit.core.files import printable
from lorakit.core.processes import world
from lorakit.data.captions import idle_class_words, without_weights
from lorakit.data.dataset import Dataset, Survey, survey
from lorakit.families.protocol import Description
from lorakit.recipe import Recipe
from lorakit.training.processes import bar
from lorakit.verbs.class_pictures import drawing_problems, said_of_missing
from lorakit.verbs.measured import measured_sets
from lorakit.verbs.suited import of_another_task


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
    kept = recipe.objective.preservation
    problems += _class_texts(recipe)
    if description:
        problems += drawing_problems(recipe, multiple=description.drawing_multiple, process=description.process)
        problems += of_another_task(recipe, description.task)
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
            class_texts=None if kept.at == "caption" else kept.at,
            task=description.task if description else "text",
            on_progress=progress.update,
        )
    idle: list[str] = []
    if found.dataset:
        problems += _without_effect(recipe, found.dataset)
        idle = _idle(recipe, found.dataset)
    data = found.dataset if description else None  # for another model, buckets would be others
    report = replace(
        found.report,
        errors=(*problems, *found.report.errors),
        warnings=(*found.report.warnings, *idle, *said_of_missing(recipe)),
    )
    return Survey(data, report)


def _class_texts(recipe: Recipe) -> list[str]:
    """What is wrong with the sources' class_prompt and class_words: given and of no use, or needed and not given."""
    kind, wanted = recipe.objective.preservation.kind, recipe.objective.preservation.at == "class"
    given = [
        (i, name, source.role)
        for i, source in enumerate(recipe.data.sources)
        for name, of_source in (("class_prompt", source.class_prompt), ("class_words", source.class_words or None))
        if of_source is not None
    ]
    if not wanted:
        remedy = f'objective.preservation.kind = "{kind}" does not use it: remove it, or ask for "differential_output".'
        return [f"data.sources.{i}.{name}: {remedy}" for i, name, _ in given]
    problems = [
        f'data.sources.{i}.{name}: only a source with role = "train" is compared with its class: remove it.'
        for i, name, role in given
        if role != "train"
    ]
    if all(role != "train" for _, _, role in given):
        problems.append(
            f'objective.preservation.kind = "{kind}" asks what else the pictures could be of: give a training source '
            'class_words, like { zorp = "dog" }, or a class_prompt.'
        )
    return problems


def _without_effect(recipe: Recipe, data: Dataset) -> list[str]:
    """What the objective asks the data for, and they do not have."""
    kept, examples = recipe.objective.preservation, data.examples
    problems = []
    counting = np.array([source.mask_means == "loss" for source in recipe.data.sources])
    if kept.at == "caption" and not (examples.has_mask() & counting[examples.sources]).any():
        problems.append(
            f'objective.preservation.kind = "{kept.kind}" holds what lies outside of masks, and no picture has one: '
            'put a.mask.png beside a.jpg, or give a source mask_path or mask = "alpha".'
        )
    for i, source in enumerate(recipe.data.sources):
        captions = (examples.captions(int(row)) for row in (examples.sources == i).nonzero()[0])
        problems += [
            f"data.sources.{i}.class_words: {printable(word)!r} is in none of its captions: correct or remove it."
            for word in idle_class_words(source, captions)
        ]
    return problems


def _idle(recipe: Recipe, data: Dataset) -> list[str]:
    """Which settings change nothing, for the data have not what they are of."""
    masks, focuses = data.examples.has_mask(), data.examples.has_focus()
    said = []
    for i, source in enumerate(recipe.data.sources):
        own = data.examples.sources == i
        if source.mask_floor and own.any() and not masks[own].any():
            said.append(f"data.sources.{i}.mask_floor has no effect: none of its pictures has a mask")
        if source.crop == "focus" and own.any() and not focuses[own].any():
            said.append(
                f'data.sources.{i}.crop = "focus" has no effect: none of its pictures has a mask or a box, so the '
                "middle is kept"
            )
    every = recipe.run.validate_every
    if every not in (0, type(recipe.run).model_fields["validate_every"].default) and not measured_sets(recipe, data):
        said.append(
            f"run.validate_every = {every} has no effect: no picture is put aside. Set data.validation or "
            "run.validate_training"
        )
    return said


def token_counter(description: Description, *, weighted: bool) -> Callable[[str], int]:
    """Counts a caption's tokens as the model takes them; `weighted`: without the marks of emphasis."""
    if not weighted:
        return description.count_tokens
    return lambda caption: description.count_tokens(without_weights(caption))
