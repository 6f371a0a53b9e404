"""lorakit/data/loader.py: what a model is given beside a caption, by rule, whoever loads it."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lorakit.core.seeding import generator
from lorakit.core.types import Batch
from lorakit.data.cache import fill_latents, fill_text
from lorakit.data.dataset import Dataset, DataSettings, survey
from lorakit.data.loader import Loader
from lorakit.data.repaint import draw_mask
from lorakit.data.shards import Cache
from tests.data.pictures import folder_of

SIZES = {"a.png": (64, 64), "bb.png": (64, 64), "ccc.png": (64, 32), "dddd.png": (60, 60)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, and masks of the left third of all but one."""
    root = tmp_path_factory.mktemp("given")
    folder_of(root / "photos", SIZES)
    (root / "masks").mkdir()
    for name, (width, height) in list(SIZES.items())[1:]:
        mask = Image.new("L", (width, height))
        mask.paste(255, (0, 0, width // 3, height))
        mask.save(root / "masks" / name)
    return root


def loader_of(
    root: Path, *, cache_latents: bool = True, batch_size: int = 2, workers: int = 0, **source: Any
) -> Loader:
    values = {"path": str(root / "photos"), **source}
    settings = {"sources": [values], "buckets": {"resolution": 64}, "cache_latents": cache_latents, "validation": 0.25}
    data: Dataset = survey(
        DataSettings.model_validate(settings), side_multiple=4, seed=5, global_batch=4, task="inpaint"
    ).usable()
    cache = Cache(root / "cache")
    if data.cached_latents:
        jobs = data.all_latents(fingerprint="vae")
        fill_latents(cache, jobs, prepare=data.prepare, encode=torch.nn.AvgPool2d(4))
    fill_text(cache, data.all_captions(), encode=lambda captions: {"x": torch.zeros(len(captions), 1)}, fingerprint="t")
    return Loader(
        data,
        cache,
        latents_fingerprint="vae",
        text_fingerprint="t",
        latent_shapes={bucket: (3, bucket.height // 4, bucket.width // 4) for bucket in data.buckets},
        seed=5,
        batch_size=batch_size,
        workers=workers,
    )


def by_sample(loader: Loader, steps: int = 6) -> dict[int, dict[str, Any]]:
    """All that is given of a sample, by its number."""
    found = {}
    for batch in (batch for step in loader.steps(0, steps) for batch in step.batches):
        assert batch.given is not None and batch.beside is None
        for i, n in enumerate(batch.numbers):
            whole = {field.name: getattr(batch, field.name) for field in fields(Batch) if field.name != "mask"}
            whole |= {**batch.given, "loss": batch.mask}
            found[n] = {key: x[i] for key, x in whole.items() if isinstance(x, Tensor | tuple) and len(x)}
    return found


def test_masks_are_drawn_for_each_sample_by_its_number(root: Path) -> None:
    samples = by_sample(loader_of(root))
    for n, sample in samples.items():
        _, height, width = sample["pixels"].shape
        assert torch.equal(sample["mask"], draw_mask(width, height, generator(5, n, "repaint")))
        assert torch.equal(sample["latents"], torch.nn.AvgPool2d(4)(sample["pixels"]))
        assert "loss" not in sample
    assert len({sample["mask"].numpy().tobytes() for sample in samples.values()}) > len(samples) // 2


@pytest.mark.parametrize("split", [{"batch_size": 1}, {"workers": 1}, {"cache_latents": False}], ids=str)
def test_no_sample_depends_on_how_it_is_loaded(root: Path, split: dict[str, Any]) -> None:
    samples, others = by_sample(loader_of(root)), by_sample(loader_of(root, **split))
    assert samples.keys() == others.keys()
    for n, sample in samples.items():
        assert torch.equal(sample["pixels"], others[n]["pixels"]) and torch.equal(sample["mask"], others[n]["mask"])


def test_the_masks_of_a_source_say_what_is_repainted_and_count_in_no_loss(root: Path) -> None:
    samples = by_sample(loader_of(root, mask_path=str(root / "masks"), mask_means="repaint", flip=1.0))
    seen = set()
    for n, sample in samples.items():
        _, height, width = sample["pixels"].shape
        seen.add(sample["keys"])
        if sample["keys"] == "0/a.png":  # which has none
            assert torch.equal(sample["mask"], draw_mask(width, height, generator(5, n, "repaint")))
        else:
            expected = np.arange(width)[::-1] < width // 3
            assert np.array_equal(sample["mask"][0].numpy(), np.tile(expected, (height, 1)))
        assert "loss" not in sample
    assert len(seen) == 3


def test_masks_that_weigh_the_loss_still_do(root: Path) -> None:
    for n, sample in by_sample(loader_of(root, mask_path=str(root / "masks"))).items():
        _, height, width = sample["pixels"].shape
        assert sample["keys"] == "0/a.png" or 0.2 < sample["loss"].mean() < 0.4
        assert torch.equal(sample["mask"], draw_mask(width, height, generator(5, n, "repaint")))


def test_validation_is_given_the_same_every_time(root: Path) -> None:
    loader = loader_of(root)
    entry = next(iter(range(4)))
    first, second = (next(loader.fixed([entry], draws=2)) for _ in range(2))
    assert first.given is not None and second.given is not None
    assert all(torch.equal(first.given[key], second.given[key]) for key in ("pixels", "mask"))
