"""lorakit/data/loader.py: what a model is given beside a caption, by rule, whoever loads it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lorakit.core.seeding import generator
from lorakit.core.types import Task
from lorakit.data.cache import fill_latents, fill_text
from lorakit.data.dataset import Dataset, DataSettings, survey
from lorakit.data.loader import Loader
from lorakit.data.repaint import draw_mask
from lorakit.data.scan import scan
from lorakit.data.shards import Cache
from lorakit.data.sources import SourceSettings
from tests.data.pictures import folder_of

SIZES = {"a.png": (64, 64), "bb.png": (64, 64), "ccc.png": (64, 32), "dddd.png": (60, 60)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, others to begin with, and masks of the left third of all but one."""
    root = tmp_path_factory.mktemp("given")
    folder_of(root / "photos", SIZES)
    folder_of(root / "before", SIZES, caption=None, seed=9)
    (root / "masks").mkdir()
    for name, (width, height) in list(SIZES.items())[1:]:
        mask = Image.new("L", (width, height))
        mask.paste(255, (0, 0, width // 3, height))
        mask.save(root / "masks" / name)
    return root


def pooled_twice(pixels: Tensor) -> Tensor:
    return 2 * torch.nn.AvgPool2d(4)(pixels)


def loader_of(
    root: Path,
    *,
    task: Task = "inpaint",
    cache_latents: bool = True,
    batch_size: int = 2,
    workers: int = 0,
    **source: Any,
) -> Loader:
    values = {"path": str(root / "photos"), **source}
    settings = {"sources": [values], "buckets": {"resolution": 64}, "cache_latents": cache_latents, "validation": 0.25}
    data: Dataset = survey(
        DataSettings.model_validate(settings), side_multiple=4, seed=5, global_batch=4, task=task
    ).usable()
    cache = Cache(root / "cache")
    if data.cached_latents:
        jobs = data.all_latents(fingerprint="vae")
        of_input = pooled_twice if task == "edit" else None
        fill_latents(cache, jobs, prepare=data.prepare, encode=torch.nn.AvgPool2d(4), encode_input=of_input)
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
            of_batch = {"latents": batch.latents, "pixels": batch.pixels, "loss": batch.mask, "keys": batch.keys}
            of_batch |= {"captions": batch.captions}
            found[n] = {key: None if x is None else x[i] for key, x in of_batch.items()}
            found[n]["given"] = {key: x[i] for key, x in batch.given.items()}
    return found


def test_masks_are_drawn_for_each_sample_by_its_number(root: Path) -> None:
    samples = by_sample(loader_of(root))
    for n, sample in samples.items():
        _, height, width = sample["given"]["pixels"].shape
        assert torch.equal(sample["given"]["mask"], draw_mask(width, height, generator(5, n, "repaint")))
        assert torch.equal(sample["latents"], torch.nn.AvgPool2d(4)(sample["given"]["pixels"]))
        assert sample["loss"] is None
    assert len({sample["given"]["mask"].numpy().tobytes() for sample in samples.values()}) > len(samples) // 2


@pytest.mark.parametrize("split", [{"batch_size": 1}, {"workers": 1}, {"cache_latents": False}], ids=str)
def test_no_sample_depends_on_how_it_is_loaded(root: Path, split: dict[str, Any]) -> None:
    samples, others = by_sample(loader_of(root)), by_sample(loader_of(root, **split))
    assert samples.keys() == others.keys()
    for n, sample in samples.items():
        assert torch.equal(sample["given"]["pixels"], others[n]["given"]["pixels"]) and torch.equal(
            sample["given"]["mask"], others[n]["given"]["mask"]
        )


def test_the_masks_of_a_source_say_what_is_repainted_and_count_in_no_loss(root: Path) -> None:
    samples = by_sample(loader_of(root, mask_path=str(root / "masks"), mask_means="repaint", flip=1.0))
    seen = set()
    for n, sample in samples.items():
        _, height, width = sample["given"]["pixels"].shape
        seen.add(sample["keys"])
        if sample["keys"] == "0/a.png":  # which has none
            assert torch.equal(sample["given"]["mask"], draw_mask(width, height, generator(5, n, "repaint")))
        else:
            expected = np.arange(width)[::-1] < width // 3
            assert np.array_equal(sample["given"]["mask"][0].numpy(), np.tile(expected, (height, 1)))
        assert sample["loss"] is None
    assert len(seen) == 3


def test_it_is_said_for_which_pictures_masks_are_drawn_all_the_same(root: Path) -> None:
    source = SourceSettings(path=str(root / "photos"), mask_path=str(root / "masks"), mask_means="repaint")
    found = scan([source], cache=root / "cache")
    assert found.warnings == ("0/a.png: it has no mask in mask_path, so what is to be painted anew is drawn",)


def test_masks_that_weigh_the_loss_still_do(root: Path) -> None:
    for n, sample in by_sample(loader_of(root, mask_path=str(root / "masks"))).items():
        _, height, width = sample["given"]["pixels"].shape
        assert sample["keys"] == "0/a.png" or 0.2 < sample["loss"].mean() < 0.4
        assert torch.equal(sample["given"]["mask"], draw_mask(width, height, generator(5, n, "repaint")))


def test_validation_is_given_the_same_every_time(root: Path) -> None:
    loader = loader_of(root)
    entry = next(iter(range(4)))
    first, second = (next(loader.fixed([entry], draws=2)) for _ in range(2))
    assert first.given is not None and second.given is not None
    assert all(torch.equal(first.given[key], second.given[key]) for key in ("pixels", "mask"))


# -- pairs ------------------------------------------------------------------------------------------------------------


def pairs_of(root: Path, **changes: Any) -> Loader:
    return loader_of(
        root, **{"task": "edit", "input_path": str(root / "before"), "conditioning_dropout": 0.2} | changes
    )


def test_both_pictures_of_a_pair_are_cut_and_mirrored_alike(root: Path) -> None:
    """The second picture is the first one's negative: their sum is grey everywhere."""
    negatives = root / "negatives"
    negatives.mkdir()
    for name in SIZES:
        with Image.open(root / "photos" / name) as picture:
            Image.fromarray(255 - np.asarray(picture)).save(negatives / name)
    for cache_latents in (True, False):
        changes = {"flip": 0.5, "crop": "center" if cache_latents else "random", "cache_latents": cache_latents}
        for sample in by_sample(pairs_of(root, input_path=str(negatives), **changes)).values():
            seen, given = sample["latents"], sample["given"].get("latents")
            if not cache_latents:
                seen, given = sample["pixels"], 2 * sample["given"]["pixels"]
            # both were rounded to eight bits, and what a filter overshoots is cut off at black and white
            assert (given / 2 + seen).abs().mean() < 0.01


def test_one_number_drops_caption_both_or_picture(root: Path) -> None:
    samples = by_sample(pairs_of(root), steps=150)
    for n, sample in samples.items():
        u = float(torch.rand(3, generator=generator(5, n, "caption"), dtype=torch.float64)[0])
        assert (sample["captions"] == "") == (u < 0.4)
        assert bool(sample["given"]["dropped"]) == (0.2 <= u < 0.6)
    found = [(sample["captions"] == "", bool(sample["given"]["dropped"])) for sample in samples.values()]
    assert all(0.13 < found.count(kind) / len(found) < 0.27 for kind in ((True, False), (True, True), (False, True)))


@pytest.mark.parametrize("split", [{"batch_size": 1}, {"workers": 1}], ids=str)
def test_no_pair_depends_on_how_it_is_loaded(root: Path, split: dict[str, Any]) -> None:
    samples, others = by_sample(pairs_of(root)), by_sample(pairs_of(root, **split))
    for n, sample in samples.items():
        assert all(torch.equal(sample["given"][key], others[n]["given"][key]) for key in ("latents", "dropped"))


def test_nothing_is_dropped_in_validation(root: Path) -> None:
    loader = pairs_of(root, conditioning_dropout=1 / 3)
    batches = [batch for entry in range(4) for batch in loader.fixed([entry], draws=2)]
    assert all(batch.given is not None and not batch.given["dropped"].any() for batch in batches)
    assert all("" not in batch.captions for batch in batches)
    assert any(sample["given"]["dropped"] for sample in by_sample(loader).values())


def test_another_picture_to_begin_with_is_another_entry_of_the_cache(root: Path) -> None:
    plain = loader_of(root, task="text")._samples.data
    pairs = pairs_of(root)._samples.data
    keys = [{key for key, _, _ in data.all_latents(fingerprint="vae")} for data in (plain, pairs)]
    assert not keys[0] & keys[1]
