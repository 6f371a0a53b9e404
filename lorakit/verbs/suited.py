"""Settings that say nothing for the model of a recipe, told before it is loaded."""

from lorakit.core.errors import InputError
from lorakit.core.types import Task
from lorakit.diffusion.objectives import OBJECTIVES
from lorakit.export.files import unsuited as unsuited_format
from lorakit.families.protocol import Description
from lorakit.recipe import Recipe
from lorakit.sampling.canvas import requests_over
from lorakit.sampling.pictures import wrong_steps
from lorakit.training import sharding

# settings of `run` that are untried where a model is shared out
_WHOLE = ("compile", "channels_last", "offload", "offload_activations", "fit")


def unsuited(recipe: Recipe, model: Description) -> list[str]:
    """Settings of objective, samples and export that say nothing for this model, or would be honoured otherwise."""
    problem = recipe.run.format and unsuited_format(recipe.run.format, model.lora_prefixes)
    wrong = [*_samples(recipe, model), *([f"run.format: {problem}"] if problem else [])]
    wrong += _without_a_gpu(recipe) + _unshareable(recipe)
    return wrong + OBJECTIVES.module(recipe.objective.kind).problems(recipe.objective, model.process)


def _unshareable(recipe: Recipe) -> list[str]:
    """Why `run.shard` cannot be kept, if it is asked for."""
    others = {
        "model.compute": recipe.model.compute is not None,
        **{f"run.{key}": bool(getattr(recipe.run, key)) for key in _WHOLE},
        # more forwards for some batches than for others, and all processes must make equally many
        "objective.preservation": recipe.objective.preservation.at is not None,
    }
    return sharding.problems(others) if recipe.run.shard else []


def _without_a_gpu(recipe: Recipe) -> list[str]:
    import torch

    asked = [key for key in ("offload", "offload_activations") if getattr(recipe.run, key)]
    there = torch.cuda.is_available()
    return [f"run.{key}: there is no GPU here whose memory it would save: leave it out." for key in asked if not there]


def of_another_task(recipe: Recipe, task: Task) -> list[str]:
    """What the sources ask for that a model for `task` does not do."""
    problems = []
    for i, source in enumerate(recipe.data.sources):
        key = f"data.sources.{i}"
        if source.mask_means == "repaint" and task != "inpaint":
            problems.append(f'{key}.mask_means = "repaint": the model is not made for inpainting: remove it.')
        pairs = {"input_path": source.input_path, "input_column": source.input_column}
        if task == "edit" and not any(pairs.values()):
            problems.append(
                f"{key}.input_path: the model edits pictures: name the folder of those that it begins with."
            )
        if task != "edit":
            problems += [f"{key}.{name}: the model does not edit pictures: remove it." for name in pairs if pairs[name]]
        if source.generate is not None and task != "text":
            problems.append(f"{key}.generate: the model draws over pictures alone: name a folder of pictures.")
    return problems


def _samples(recipe: Recipe, model: Description) -> list[str]:
    """What the stock pipeline would not draw, or at other sizes in silence."""
    asked = recipe.sample
    if not asked.prompts:
        return []
    wrong = [
        f"sample.{name} = {side}: the model draws multiples of {model.drawing_multiple} pixels."
        for name, side in (("width", asked.width), ("height", asked.height))
        if side is not None and side % model.drawing_multiple
    ]
    if asked.negative_prompt and asked.guidance <= 1:
        wrong.append(
            "sample.negative_prompt has no effect with sample.guidance of 1 or less: remove it, or raise that."
        )
    wrong += wrong_steps("sample.steps", asked.steps, model.process)
    needed = {"text": (), "inpaint": ("image", "mask"), "edit": ("image",)}[model.task]
    unshown = []
    for key, given in (("image", asked.image), ("mask", asked.mask)):
        if given is None and key in needed:
            unshown.append(f"sample.{key}: sample.prompts are drawn over a picture by this model: name one.")
        elif given is not None and key not in needed:
            unshown.append(f"sample.{key}: this model's samples are drawn without one: remove it.")
    if asked.image_guidance is not None and model.task != "edit":
        unshown.append("sample.image_guidance: the model does not edit pictures: remove it.")
    if not unshown:
        try:
            requests_over(asked, model.drawing_multiple)
        except InputError as error:
            unshown += error.problems
    return wrong + unshown
