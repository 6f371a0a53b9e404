import os
import pickle
import signal
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorakit.core.errors import StorageError
from lorakit.core.seeding import generator
from lorakit.core.types import Batch
from lorakit.data.cache import Cache, fill_latents, fill_text
from lorakit.data.dataset import Dataset, DataSettings, prepare
from lorakit.data.loader import Loader, StepPlan
from tests.data.pictures import folder_of


def encode_text(captions: Sequence[str]) -> dict[str, Tensor]:
    return {"states": torch.tensor([[[float(len(c))] * 2] * 3 for c in captions])}


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Cache]:
    """Seven pictures in two buckets, captions of different lengths, half of them dropped; and their cache."""
    root = tmp_path_factory.mktemp("loader")
    sizes = {f"{'p' * (i + 1)}.png": (80, 52) if i % 3 == 0 else (64, 64) for i in range(7)}
    source = {"path": str(folder_of(root / "photos", sizes)), "caption_dropout": 0.5, "repeats": 2, "weight": 0.25}
    settings = DataSettings.model_validate({"sources": [source], "buckets": {"resolution": 64}})
    data = prepare(settings, side_multiple=4, seed=5, global_batch=4)
    cache = Cache(root / "cache")
    pool = torch.nn.AvgPool2d(4)
    fill_latents(cache, data.examples, data.bucket_of, encode=pool, fingerprint="vae")
    fill_text(cache, data.captions(), encode=encode_text, fingerprint="clip")
    return data, cache


def loader_of(cached: tuple[Dataset, Cache], **changes: object) -> Loader:
    arguments = {"latents_fingerprint": "vae", "text_fingerprint": "clip", "seed": 5, "batch_size": 2, **changes}
    return Loader(*cached, **arguments)


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, Batch | StepPlan) and type(a) is type(b):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_a_batch_is_what_the_rules_say(cached: tuple[Dataset, Cache]) -> None:
    data, _ = cached
    steps = list(loader_of(cached).steps(0, 8))
    dropped = 0
    for number, step in enumerate(steps):
        chosen = data.plan.at(number)
        assert step.epoch == chosen.epoch
        assert step.keys == tuple(data.examples[i].key for i in chosen.entries)
        assert [k for batch in step.batches for k in batch.keys] == list(step.keys)
        assert [n for batch in step.batches for n in batch.numbers] == list(chosen.numbers)
        for batch in step.batches:
            assert batch.latents.shape[1:] in [(3, 16, 16), (3, 13, 20)]
            assert batch.weight.tolist() == [0.25] * len(batch.keys)
            for i, n in enumerate(batch.numbers):
                assert torch.equal(
                    batch.noise[i], torch.randn(batch.latents[i].shape, generator=generator(5, n, "noise"))
                )
                assert batch.quantile[i] == torch.rand((), generator=generator(5, n, "timestep"))
                full = f"a picture of {batch.keys[i][2:-4]}"
                assert batch.captions[i] in ("", full)
                dropped += batch.captions[i] == ""
                assert batch.text is not None
                assert batch.text["states"][i].tolist() == [[float(len(batch.captions[i]))] * 2] * 3
    assert 8 <= dropped <= 22  # of thirty
    assert {batch.noise.dtype for step in steps for batch in step.batches} == {torch.float32}


def test_no_text_where_a_text_encoder_is_adapted(cached: tuple[Dataset, Cache]) -> None:
    step = next(loader_of(cached, text_fingerprint=None).steps(0, 1))
    assert step.batches[0].text is None
    assert all(isinstance(caption, str) for caption in step.batches[0].captions)


def test_any_number_of_workers_and_any_first_step_give_the_same(cached: tuple[Dataset, Cache]) -> None:
    alone = list(loader_of(cached).steps(0, 9))
    state = torch.get_rng_state()
    assert same(list(loader_of(cached, workers=2).steps(0, 9)), alone)
    assert same(list(loader_of(cached, workers=1).steps(3, 9)), alone[3:])
    assert torch.equal(torch.get_rng_state(), state), "the global generator was drawn from"


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_together_have_the_same_samples(cached: tuple[Dataset, Cache], world: int) -> None:
    alone = list(loader_of(cached).steps(0, 8))
    ranks = [list(loader_of(cached, rank=rank, world=world).steps(0, 8)) for rank in range(world)]
    empty = 0
    for number, whole in enumerate(alone):
        batches = [batch for of_rank in ranks for batch in of_rank[number].batches]
        empty += sum(not of_rank[number].batches for of_rank in ranks)
        assert {of_rank[number].keys for of_rank in ranks} == {whole.keys}
        for name in ("noise", "latents", "quantile"):
            parts = [x for batch in batches for x in getattr(batch, name)]
            assert same(parts, [x for batch in whole.batches for x in getattr(batch, name)])
    assert (empty > 0) == (world > 2)


def test_leaving_early_leaves_no_worker_behind(cached: tuple[Dataset, Cache]) -> None:
    before = _children()
    steps = loader_of(cached, workers=2).steps(0, 1000)
    next(steps)
    assert len(_children()) == len(before) + 2
    steps.close()
    assert _children() == before


def test_workers_leave_ctrl_c_to_the_parent(cached: tuple[Dataset, Cache]) -> None:
    steps = loader_of(cached, workers=1).steps(0, 1000)
    before = _children()
    next(steps)
    (worker,) = _children() - before
    os.kill(worker, signal.SIGINT)
    for _ in range(20):
        next(steps)
    assert worker in _children()
    steps.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_lost_entry_is_one_readable_message(cached: tuple[Dataset, Cache], workers: int) -> None:
    with pytest.raises(StorageError) as error:
        list(loader_of(cached, latents_fingerprint="another", workers=workers).steps(0, 1))
    assert "Traceback" not in str(error.value)
    assert "\n" not in str(error.value)


def test_what_workers_need_is_picklable_and_small(cached: tuple[Dataset, Cache]) -> None:
    loader = loader_of(cached)
    list(loader.steps(0, 2))
    data = pickle.dumps(loader)
    assert len(data) < 20_000
    assert same(list(pickle.loads(data).steps(0, 4)), list(loader.steps(0, 4)))


def _children() -> set[int]:
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    if not children.exists():
        pytest.skip("this system does not list a process's children")
    return {int(pid) for pid in children.read_text().split()}
