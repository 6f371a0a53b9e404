"""What is measured beside a training: the losses of which pictures, and whether the model predicts what it says."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lorakit import families
from lorakit.core.errors import InputError
from lorakit.core.processes import on_first_rank
from lorakit.core.transfer import on_device
from lorakit.core.types import Batch, Predict, Text
from lorakit.data.cache import default_folder
from lorakit.data.dataset import Dataset
from lorakit.data.loader import Loader
from lorakit.data.shards import Cache, content_key
from lorakit.families.protocol import Family
from lorakit.recipe import Recipe
from lorakit.training.caching import text_encoder
from lorakit.training.processes import resolve_precision
from lorakit.training.reading import SHARES, misread, suspected, unexplained
from lorakit.training.sharding import jointly
from lorakit.training.step import Trainee, encoded, predicted, predictor, ready
from lorakit.training.validation import BANDS, Validation, evaluated

_PICTURES = 6  # that a model's predictions are looked at on
_FEW, _NOISY = 1, SHARES[:1]  # of them, and how noisy, that mostly settle it. Each prediction is half of a step


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


def refuse_misread(trainee: Trainee, data: Dataset, loader: Loader) -> None:
    """Raises InputError where the base clearly predicts something else than its configuration says, on every rank.

    A few forwards without adapter and dropout, by the first rank unless they need all; nothing of the run moves by it.
    The cache remembers of which model and data it was found in order.
    """
    family = trainee.family
    key = content_key("predicts", *map(family.fingerprint, (family.backbone, "scheduler")), data.plan.digest())
    if on_first_rank(lambda: loader.cache.has(key)):
        return
    if trainee.sharded:
        with jointly(sharded=True):
            found = _refuse_misread(trainee, data, loader)
    else:
        found = on_first_rank(lambda: _refuse_misread(trainee, data, loader))
    on_first_rank(lambda: loader.cache.write({key: {"unexplained": torch.tensor([*found.values()])}}))


def _refuse_misread(trainee: Trainee, data: Dataset, loader: Loader) -> dict[str, float]:
    def samples(count: int) -> Iterator[tuple[Batch, Predict]]:
        for batch in loader.fixed(data.sample(count), draws=1):
            batch = ready(trainee, batch)
            yield batch, partial(predictor(trainee, batch), adapter=False)

    process = trainee.family.process
    with evaluated(trainee.adapted.values()), trainee.autocast():
        found = unexplained(process, samples(_FEW), shares=_NOISY)
        if suspected(process, found):
            found = unexplained(process, samples(_PICTURES))
    if problem := misread(process, found):
        raise InputError(problem)
    return found


def check_model(recipe: Recipe, data: Dataset) -> tuple[str | None, dict[str, float]]:
    """Loads the model, and says what is wrong with its predictions, if anything, and what they leave unexplained.

    Nothing is cached: the few pictures that are looked at are encoded anew.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision, _ = resolve_precision(recipe.run.precision)
    family = families.load_settings(recipe.model, device=device, precision=precision)
    encode = text_encoder(data, family)
    loader = Loader(
        replace(data, settings=data.settings.model_copy(update={"cache_latents": False})),
        Cache(default_folder()),  # never read
        latents_fingerprint="",
        text_fingerprint=None,
        latent_shapes={bucket: family.latent_shape(*bucket) for bucket in data.buckets},
        seed=recipe.run.seed,
        batch_size=1,
    )

    def samples() -> Iterator[tuple[Batch, Predict]]:
        for batch in loader.fixed(data.sample(_PICTURES), draws=1):
            batch = encoded(family, on_device(batch, device))
            yield batch, partial(_predict, family, encode, batch)

    found = unexplained(family.process, samples())
    return misread(family.process, found), found


def _predict(
    family: Family,
    encode_text: Callable[[Sequence[str]], Text],
    batch: Batch,
    x_t: Tensor,
    t: Tensor,
    *,
    text: Text | None = None,
    adapter: bool = True,
) -> Tensor:
    """The `Predict` of a model without adapters; text is encoded in any case."""
    return predicted(family, batch, x_t, t, encode_text(batch.captions))
