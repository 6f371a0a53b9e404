"""Whether there is room for what a run will write: asked before its model is loaded.

The estimate goes by the recipe, the model's configurations and the headers of its files.
"""

from pathlib import Path

from lorakit import families
from lorakit.adapters import ADAPTERS
from lorakit.core.processes import world
from lorakit.data.cache import default_folder
from lorakit.data.dataset import Dataset
from lorakit.data.shards import Cache
from lorakit.export.files import DTYPES
from lorakit.families.protocol import Description
from lorakit.recipe import Recipe
from lorakit.training.preflight import check_space, check_writable, run_needs

_FP32 = 4


def refuse_lack_of_space(recipe: Recipe, data: Dataset, output: Path, *, first_step: int, last_step: int) -> None:
    """Raises StorageError where the run's folder or the cache cannot be written, or has no room for the run."""
    model = families.describe_settings(recipe.model)
    cache = Path(recipe.data.cache) if recipe.data.cache else default_folder()
    for folder in (output, cache):
        check_writable(folder)
    drawn = recipe.run.sample_every and len(recipe.sample.prompts)
    pixels = (recipe.sample.width or model.resolution) * (recipe.sample.height or model.resolution)
    check_space(
        run_needs(
            output,
            weights=_weights(recipe, model),
            steps=last_step,
            save_every=recipe.run.save_every,
            keep_last=recipe.run.keep_last,
            keep_every=recipe.run.keep_every,
            keep_best=recipe.run.keep_best,
            first_step=first_step,
            dtype_bytes=DTYPES[recipe.run.save_dtype].itemsize,
            optimizer_factor=recipe.optimizer.state_size,
            ema=recipe.run.ema is not None,
            pictures=drawn and drawn * ((last_step - first_step) // recipe.run.sample_every + 1),
            picture_pixels=pixels,
            global_batch=recipe.run.batch_size * recipe.run.accumulate * world(),
            cache=cache,
            # what is cached already may be what is needed, or another run's: nobody is refused for nothing
            cache_bytes=max(0, _encoded(recipe, data, model) - Cache(cache).usage().bytes),
        )
    )


def _weights(recipe: Recipe, model: Description) -> int:
    """How many weights the adapter will have; 0 where the model is not here yet."""
    count, total = ADAPTERS.module(recipe.adapter.kind).weight_count, 0
    for component, targets in model.default_targets.items():
        part = recipe.adapter if component == model.backbone else recipe.adapter.text_encoder
        if part is not None:
            total += count(model.weight_shapes(component), part, part.targets or targets)
    return total


def _encoded(recipe: Recipe, data: Dataset, model: Description) -> int:
    """Bytes of all that the run keeps encoded."""
    numbers = 0
    if data.cached_latents:
        largest = max(data.buckets, key=lambda bucket: bucket.width * bucket.height)
        pictures = 2 if model.task == "edit" else 1  # of each, with that which it is made of
        numbers += len(data.all_latents(fingerprint="")) * model.latent_size(*largest) * pictures
    if recipe.adapter.text_encoder is None:
        numbers += len(set(data.all_captions())) * model.text_size
    return numbers * _FP32
