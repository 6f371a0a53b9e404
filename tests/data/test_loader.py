import os
import pickle
import signal
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorakit.core.errors import StorageError
from lorakit.core.seeding import generator
from lorakit.core.types import Batch
from lorakit.data.buckets import Bucket
from lorakit.data.cache import fill_latents, fill_text
from lorakit.data.dataset import ClassTexts, Dataset, DataSettings, survey
from lorakit.data.loader import Loader, StepPlan
from lorakit.data.plan import Draw, GlobalBatch, Plan
from lorakit.data.shards import Cache
from tests.data.pictures import folder_of, noise


def encode_text(captions: Sequence[str]) -> dict[str, Tensor]:
    return {"states": torch.tensor([[[float(len(c))] * 2] * 3 for c in captions])}


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Cache]:
    """Seven pictures in two buckets, captions of different lengths, half of them dropped; and their cache."""
    root = tmp_path_factory.mktemp("loader")
    sizes = {f"{'p' * (i + 1)}.png": (80, 52) if i % 3 == 0 else (64, 64) for i in range(7)}
    source = {"path": str(folder_of(root / "photos", sizes)), "caption_dropout": 0.5, "repeats": 2, "weight": 0.25}
    settings = DataSettings.model_validate({"sources": [source], "buckets": {"resolution": 64}})
    return filled(settings, root / "cache")


def filled(settings: DataSettings, folder: Path, *, class_texts: ClassTexts = None) -> tuple[Dataset, Cache]:
    """The data of `settings`, encoded by averaging over 4 × 4 pixels."""
    data = survey(settings, side_multiple=4, seed=5, global_batch=4, class_texts=class_texts).usable()
    cache = Cache(folder)
    if data.cached_latents:
        jobs = data.all_latents(fingerprint="vae")
        fill_latents(cache, jobs, prepare=data.prepare, encode=torch.nn.AvgPool2d(4))
    fill_text(cache, data.all_captions(), encode=encode_text, fingerprint="clip")
    return data, cache


def loader_of(cached: tuple[Dataset, Cache], **changes: object) -> Loader:
    arguments = {"latents_fingerprint": "vae", "text_fingerprint": "clip", "seed": 5, "batch_size": 2, **changes}
    shapes = {bucket: (3, bucket.height // 4, bucket.width // 4) for bucket in cached[0].buckets}
    return Loader(*cached, latent_shapes=shapes, **arguments)


def batches_of(loader: Loader, steps: int) -> list[Batch]:
    return [batch for step in loader.steps(0, steps) for batch in step.batches]


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
            assert batch.latents is not None and batch.mask is None and batch.pixels is None
            assert batch.latents.shape[1:] in [(3, 16, 16), (3, 13, 20)]
            assert batch.weight.tolist() == [0.25] * len(batch.keys)
            for i, n in enumerate(batch.numbers):
                assert batch.latents is not None
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


# -- timesteps in strata, and what else is random ------------------------------------------------------------------


def test_stratified_quantiles_are_one_to_a_stratum_whatever_the_split(cached: tuple[Dataset, Cache]) -> None:
    plain, alone = (list(loader_of(cached, stratified=on).steps(0, 8)) for on in (False, True))
    orders = set()
    for whole, independent in zip(alone, plain):
        quantile = torch.cat([batch.quantile for batch in whole.batches])
        count = len(whole.keys)
        strata = (quantile.double() * count).long().tolist()
        assert sorted(strata) == list(range(count))
        orders.add(tuple(strata))
        # the place within the stratum is the sample's own number
        own = torch.cat([batch.quantile for batch in independent.batches])
        torch.testing.assert_close(quantile * count - torch.tensor(strata), own, rtol=0, atol=1e-5)
        assert same([b.noise for b in whole.batches], [b.noise for b in independent.batches])
    assert len(orders) > 3
    for split in ({"workers": 2}, {"batch_size": 1}, {"batch_size": 4}):
        of_split = list(loader_of(cached, stratified=True, **split).steps(2, 8))
        for a, b in zip(of_split, alone[2:], strict=True):
            assert torch.equal(*(torch.cat([batch.quantile for batch in step.batches]) for step in (a, b)))
    ranks = [list(loader_of(cached, stratified=True, rank=rank, world=3).steps(0, 8)) for rank in range(3)]
    for number, whole in enumerate(alone):
        parts = [batch.quantile for of_rank in ranks for batch in of_rank[number].batches]
        assert torch.equal(torch.cat(parts), torch.cat([batch.quantile for batch in whole.batches]))


def test_stratified_quantiles_are_uniform_each_and_vary_less_together(cached: tuple[Dataset, Cache]) -> None:
    """Of N strata the mean of q varies N² times less than one number does, independent ones N times less."""
    means: dict[bool, Tensor] = {}
    for on in (False, True):
        samples = loader_of(cached, stratified=on)._samples
        steps = []
        for first in range(0, 4000, 4):
            chosen = GlobalBatch(0, range(first, first + 4), (0,) * 4, (cached[0].buckets[0],) * 4)
            steps.append(samples._quantiles(chosen, range(4)))
        quantiles = torch.stack(steps).double()
        for place in quantiles.T:  # of 1000 uniform numbers, Kolmogorov's distance is below 0.06 but once in a thousand
            rank = torch.arange(1000) / 1000
            assert (place.sort().values - rank).abs().max() < 0.06
        means[on] = quantiles.mean(1)
    assert means[False].var().item() == pytest.approx(1 / 12 / 4, rel=0.15)
    assert means[True].var().item() == pytest.approx(1 / 12 / 64, rel=0.15)


def test_what_else_is_random_goes_by_the_number_of_the_sample(cached: tuple[Dataset, Cache]) -> None:
    plain = list(loader_of(cached).steps(0, 8))
    alone = list(loader_of(cached, extra=more).steps(0, 8))
    for a, b in zip(plain, alone):
        assert same([replace(batch, extra=None) for batch in b.batches], list(a.batches)), "other numbers were moved"
        for batch in b.batches:
            assert batch.extra is not None and batch.extra["even"].shape == batch.noise.shape
            for i, n in enumerate(batch.numbers):
                assert batch.extra["one"][i] == torch.randn((), generator=generator(5, n, "one"))
    assert same(list(loader_of(cached, extra=more, workers=2).steps(3, 8)), alone[3:])
    ranks = [list(loader_of(cached, extra=more, rank=rank, world=3).steps(0, 8)) for rank in range(3)]
    for number, whole in enumerate(alone):
        for name in ("one", "even"):
            parts = [x for of_rank in ranks for batch in of_rank[number].batches for x in batch.extra[name]]
            assert same(parts, [x for batch in whole.batches for x in batch.extra[name]])


def more(shape: tuple[int, ...], of: Callable[[str], torch.Generator]) -> dict[str, Tensor]:
    return {"one": torch.randn((), generator=of("one")), "even": torch.rand(shape, generator=of("even"))}


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
def test_all_of_a_steps_tensors_are_pinned_for_a_gpu(
    cached: tuple[Dataset, Cache], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tensors(thing: object) -> list[int]:
        if isinstance(thing, Batch | StepPlan):
            thing = {f.name: getattr(thing, f.name) for f in fields(thing)}
        if isinstance(thing, dict | tuple):
            return [i for part in (thing.values() if isinstance(thing, dict) else thing) for i in tensors(part)]
        return [id(thing)] if isinstance(thing, Tensor) else []

    copies: list[Tensor] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: copies.append(tensor.clone()) or copies[-1])
    own = {"batch_size": 1, "world": 3, "rank": 0, "padded": True, "workers": workers}
    plain = list(loader_of(cached, **own).steps(0, 6))
    assert not copies and all(step.padding for step in plain)
    steps = list(loader_of(cached, pin_memory=True, **own).steps(0, 6))
    assert same(steps, plain)
    assert {i for step in steps for i in tensors(step)} == {id(copy) for copy in copies}


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


def test_sizes_are_those_of_the_original_the_crop_and_the_target(cached: tuple[Dataset, Cache]) -> None:
    seen = {tuple(size) for batch in batches_of(loader_of(cached), 8) for size in batch.sizes.tolist()}
    # 80×52 fits its bucket; height comes first
    assert seen == {(52, 80, 0, 0, 52, 80), (64, 64, 0, 0, 64, 64)}


def test_flips_are_drawn_and_read_mirrored_with_their_crop(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "photos", {f"{i}.png": (91, 64) for i in range(4)})
    source = {"path": str(folder), "flip": 0.5, "crop": "center"}
    cached = filled(DataSettings.model_validate({"sources": [source], "buckets": {"resolution": 64}}), tmp_path / "c")
    lefts: dict[int, set[tuple[int, bool]]] = {}
    plain = {}
    for batch in batches_of(loader_of(cached), 12):
        assert batch.latents is not None and batch.sizes is not None
        for key, latents, size in zip(batch.keys, batch.latents, batch.sizes):
            plain.setdefault(key, latents)
            mirrored = torch.allclose(latents, plain[key].flip(-1), atol=1e-6)
            assert mirrored or torch.equal(latents, plain[key])
            lefts.setdefault(int(key[2]), set()).add((int(size[3]), mirrored))
    assert all(len(found) == 2 for found in lefts.values()), "both ways are drawn"


def test_random_crops_come_as_pixels_that_differ_between_samples_and_not_between_workers(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "photos", {"a.png": (140, 100)})
    source = {"path": str(folder), "crop": "random", "repeats": 6}
    square = {"resolution": 64, "max_aspect": 1.0}
    cached = filled(DataSettings.model_validate({"sources": [source], "buckets": square}), tmp_path / "c")
    batches = batches_of(loader_of(cached), 3)
    assert all(batch.latents is None and batch.pixels is not None for batch in batches)
    assert {batch.noise.shape[1:] for batch in batches} == {(3, 16, 16)}
    places = [tuple(size[2:4].tolist()) for batch in batches for size in batch.sizes]
    assert len(set(places)) > 1
    assert same(batches, batches_of(loader_of(cached, workers=2), 3))
    assert same(batches[2:], batches_of(loader_of(cached), 3)[2:])


def test_masks_come_with_their_floor_and_ones_for_who_has_none(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "photos", {"a.png": (64, 64), "b.png": (64, 64)})
    half = noise(64, 64).convert("L").point(lambda _: 0)
    half.paste(255, (0, 0, 32, 64))
    half.save(folder / "a.mask.png")
    source = {"path": str(folder), "mask_floor": 0.25, "repeats": 2}
    for how in ({}, {"cache_latents": False}):
        settings = DataSettings.model_validate({"sources": [source], "buckets": {"resolution": 64}, **how})
        (batch,) = batches_of(loader_of(filled(settings, tmp_path / "c"), batch_size=4), 1)
        assert batch.mask is not None and batch.mask.shape == (4, 1, 16, 16)
        for key, mask in zip(batch.keys, batch.mask):
            assert mask[0, :, :8].unique().tolist() == [1.0]
            assert mask[0, :, 8:].unique().tolist() == ([0.25] if "a.png" in key else [1.0])


def test_what_is_transparent_does_not_count_where_alpha_is_the_mask(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "photos", {"a.png": (64, 64)})
    picture = noise(64, 64).convert("RGBA")
    picture.paste((0, 0, 0, 0), (0, 0, 64, 32))
    picture.save(folder / "a.png")
    for how in ({}, {"cache_latents": False}):
        for mask, counts in (("alpha", [0.0] * 8 + [1.0] * 8), ("none", None)):
            source = {"path": str(folder), "mask": mask}
            settings = DataSettings.model_validate({"sources": [source], "buckets": {"resolution": 64}, **how})
            (batch,) = batches_of(loader_of(filled(settings, tmp_path / "c")), 1)
            assert (None if batch.mask is None else batch.mask[0, 0].mean(1).tolist()) == counts


def test_shuffled_captions_are_read_from_their_variants_or_made_anew(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "photos", {"a.png": (64, 64)}, caption="a, b, c, d, e, f")
    source = {"path": str(folder), "shuffle_tags": True, "repeats": 40, "caption_dropout": 0.2}
    cached = filled(DataSettings.model_validate({"sources": [source], "buckets": {"resolution": 64}}), tmp_path / "c")
    drawn = [caption for batch in batches_of(loader_of(cached), 10) for caption in batch.captions]
    assert set(drawn) == {*cached[0].captions_of(0), ""} and len(set(drawn)) == 5
    anew = [c for batch in batches_of(loader_of(cached, text_fingerprint=None), 10) for c in batch.captions]
    assert len(set(anew)) > 20
    assert [c == "" for c in anew] == [c == "" for c in drawn], "which are dropped does not depend on the cache"


def test_class_texts_come_encoded_for_training_pictures_alone(tmp_path: Path) -> None:
    """Of sources with a word that another stands for, with a prompt, with neither, and of one to keep."""
    sources: list[dict[str, Any]] = [
        {"class_words": {"of": "like"}},
        {"class_prompt": "a dog"},
        {},
        {"role": "regularization"},
    ]
    for i, source in enumerate(sources):
        source["path"] = str(folder_of(tmp_path / f"{i}", {f"{i}.png": (64, 64)}))
    settings = DataSettings.model_validate({"sources": sources, "buckets": {"resolution": 64}})
    expected = {"class": ["a picture like 0", "a dog", None, None], "blank": ["", "", "", None], None: [None] * 4}
    for kind, texts in expected.items():
        cached = filled(settings, tmp_path / f"cache-{kind}", class_texts=kind)  # type: ignore[arg-type]
        seen = batches_of(loader_of(cached, batch_size=4), 4)
        for batch in seen:
            wanted = [texts[int(key[0])] for key in batch.keys]
            if any(text is not None for text in wanted):
                assert batch.class_captions == tuple(wanted) and batch.class_text is not None
                lengths = batch.class_text["states"][:, 0, 0].tolist()
                assert lengths == [len(text or "") for text in wanted]
            else:
                assert batch.class_captions == () and batch.class_text is None
        assert {key[0] for batch in seen for key in batch.keys} == set("0123")
        live = batches_of(loader_of(cached, batch_size=4, text_fingerprint=None), 4)
        assert [batch.class_captions for batch in live] == [batch.class_captions for batch in seen]
        assert all(batch.class_text is None for batch in live)


def test_fixed_samples_are_the_same_every_time_and_take_nothing_by_chance(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "photos", {f"{i}.png": (64, 64) for i in range(10)})
    source = {"path": str(folder), "flip": 0.5, "caption_dropout": 0.5}
    data = {"sources": [source], "buckets": {"resolution": 64}, "validation": 0.3}
    cached = filled(DataSettings.model_validate(data), tmp_path / "c")
    held_out, trained = cached[0].validation(), cached[0].sample(3)
    assert len(held_out) == len(trained) == 3
    first = list(loader_of(cached).fixed([*held_out, *trained], draws=4))
    assert [batch.keys for batch in first] == [(cached[0].examples.keys[i],) * 4 for i in (*held_out, *trained)]
    seen = {key for step in loader_of(cached).steps(0, 6) for key in step.keys}
    assert len(seen) == 7 and seen.isdisjoint(batch.keys[0] for batch in first[:3])
    assert seen.issuperset(batch.keys[0] for batch in first[3:])
    for batch in first:
        assert (batch.quantile * 4).long().tolist() == [0, 1, 2, 3]
        assert len(set(batch.captions)) == 1 and "" not in batch.captions
        assert len({noise.sum().item() for noise in batch.noise}) == 4
        entry = cached[0].examples.keys.index(batch.keys[0])
        latents = cached[1].read(cached[0].latent_key(entry, cached[0].cuts_of(entry)[0], fingerprint="vae"))
        assert batch.latents is not None and all(torch.equal(part, latents["latents"]) for part in batch.latents)
    changed = loader_of(cached, rank=1, world=2, stratified=True, extra=more)
    assert same(list(changed.fixed([*held_out, *trained], draws=4)), first)


def _children() -> set[int]:
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    if not children.exists():
        pytest.skip("this system does not list a process's children")
    return {int(pid) for pid in children.read_text().split()}


# -- the micro step that needs the most memory ---------------------------------------------------------------------


def pixels_of(batch: Batch) -> int:
    assert batch.sizes is not None
    return int(batch.sizes[:, 4:].prod(1).sum())


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_the_largest_micro_step_is_one_of_the_plan_and_moves_nothing(
    cached: tuple[Dataset, Cache], world: int, batch_size: int
) -> None:
    split = {"world": world, "batch_size": batch_size}
    ranks = [loader_of(cached, rank=rank, **split) for rank in range(world)]
    before = [list(loader_of(cached, rank=rank, **split).steps(0, 8)) for rank in range(world)]
    state = torch.get_rng_state()
    found = [loader.largest() for loader in ranks]
    assert torch.equal(torch.get_rng_state(), state), "the global generator was drawn from"
    assert all(same(batch, found[0]) for batch in found), "the ranks try different ones"
    batches = [batch for steps in before for step in steps for batch in step.batches]
    assert pixels_of(found[0]) == max(map(pixels_of, batches))
    assert any(same(batch, found[0]) for batch in batches)
    for number in range(8):
        reached = all(
            any(pixels_of(batch) == pixels_of(found[0]) for batch in steps[number].batches) for steps in before
        )
        assert [loader.is_largest(number) for loader in ranks] == [reached] * world
    assert same([list(loader.steps(0, 8)) for loader in ranks], before), "the steps are others after it"


def test_the_largest_micro_step_has_pixels_where_there_are_no_latents(tmp_path: Path) -> None:
    source = {"path": str(folder_of(tmp_path / "photos", {"a.png": (80, 52), "b.png": (64, 64)})), "crop": "random"}
    settings = DataSettings.model_validate({"sources": [source], "buckets": {"resolution": 64}})
    batch = loader_of(filled(settings, tmp_path / "cache"), text_fingerprint=None).largest()
    assert batch.latents is None and batch.pixels is not None and batch.text is None
    assert batch.pixels[0].numel() == 3 * pixels_of(batch)


@given(st.data())
def test_no_micro_step_that_is_looked_at_is_larger(data: st.DataObject) -> None:
    """Buckets of any area, one or two resolutions, sources that join later, any split."""
    areas = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4, unique=True))
    count = data.draw(st.integers(1, 12))
    columns = data.draw(st.integers(1, 2))
    ids = st.integers(0, len(areas) - 1)
    rows = [
        [data.draw(ids), *(data.draw(st.integers(-1, len(areas) - 1)) for _ in range(columns - 1))]
        for _ in range(count)
    ]
    starts = [0, data.draw(st.integers(0, 30))]
    plan = Plan(
        [f"0/{i}" for i in range(count)],
        np.array([0] + [data.draw(st.integers(0, 1)) for _ in range(count - 1)]),
        np.array(rows),
        buckets=[Bucket(area, 1) for area in areas],
        draws=[Draw(repeats=data.draw(st.integers(1, 3)), start=start) for start in starts],
        seed=0,
        global_batch=data.draw(st.integers(1, 7)),
    )
    world, batch_size = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    loader = object.__new__(Loader)
    samples = SimpleNamespace(data=SimpleNamespace(plan=plan), batch=lambda chosen, cut: (chosen, cut))
    loader._samples, loader._split = samples, SimpleNamespace(batch_size=batch_size, rank=0, world=world)

    def size(chosen: Any, cut: range) -> int:
        return len(cut) * chosen.buckets[cut.start].width

    def largest_in(steps: range) -> int:
        return max(
            size(chosen, cut)
            for chosen in map(plan.at, steps)
            for rank in range(world)
            for cut in plan.micro_steps(chosen, rank=rank, world=world, batch_size=batch_size)
        )

    found = size(*loader.largest())
    assert found >= largest_in(range(plan.steps_per_epoch))
    joined = (
        next(step for step in range(starts[1], 100) if plan.epoch_of(step - 1) < plan.epoch_of(step))
        if starts[1]
        else 0
    )
    epoch = next(step for step in range(joined + 1, 200) if plan.epoch_of(step) > plan.epoch_of(joined))
    assert found >= largest_in(range(joined, epoch))
