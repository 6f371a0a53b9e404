import hashlib
import json
import pickle
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.data.buckets import Bucket
from lorakit.data.plan import Draw, GlobalBatch, Plan, share

BUCKETS = [Bucket(64, 64), Bucket(80, 52), Bucket(52, 80), Bucket(104, 40)]
GOLDEN = json.loads((Path(__file__).parent / "golden_plan.json").read_text())


def make(*sources: tuple[Draw, list[Any]], seed: int = 0, global_batch: int = 4, columns: int = 1, **more: Any) -> Plan:
    """A plan of sources, each a draw and its entries' bucket numbers (one, or a tuple of them)."""
    tuples = [row if isinstance(row, tuple) else (row,) for _, rows in sources for row in rows]
    of = [s for s, (_, rows) in enumerate(sources) for _ in rows]
    keys = [f"{s}/{i:03d} é.png" for s, (_, rows) in enumerate(sources) for i in range(len(rows))]
    draws = [draw for draw, _ in sources]
    ids = np.array([[*row, *[-1] * (columns - len(row))] for row in tuples])
    return Plan(keys, np.array(of), ids, buckets=BUCKETS, draws=draws, seed=seed, global_batch=global_batch, **more)


bucket = st.integers(0, 3)
windows = st.tuples(st.integers(0, 12), st.none() | st.integers(1, 30))


@st.composite
def plans(
    draw: st.DrawFn, *, kept: bool = False, walks: bool = False, windowed: bool = False, several: bool = False
) -> Plan:
    """A plan of a few sources' entries in a few buckets; the first source is a plain training source."""
    columns = 4 if several else 1
    cell = st.lists(bucket, min_size=1, max_size=4, unique=True).map(tuple) if several else bucket

    def source(role: str, index: int) -> tuple[Draw, list[Any]]:
        samples = draw(st.none() | st.integers(1, 9)) if walks and (index or role != "train") else None
        start, end = draw(windows) if windowed and (index or role != "train") else (0, None)
        rows = draw(st.lists(cell, min_size=1, max_size=7))
        return Draw(role, draw(st.integers(1, 3)), samples, start, end), rows

    sources = [source("train", i) for i in range(draw(st.integers(1, 3)))]
    sources += [source("regularization", i) for i in range(draw(st.integers(1, 2)) if kept else 0)]
    return make(*sources, seed=draw(st.integers(0, 9)), global_batch=draw(st.integers(1, 9)), columns=columns)


def steps_of(plan: Plan, epoch: int) -> list[GlobalBatch]:
    first = plan.steps_in(epoch)
    return [plan.at(step) for step in range(first, plan.steps_in(epoch + 1))]


def seen_in(batches: list[GlobalBatch]) -> Counter[int]:
    return Counter(entry for batch in batches for entry in batch.entries)


def rows_of(plan: Plan, source: int) -> list[int]:
    return np.flatnonzero(plan.sources == source).tolist()


# -- what was recorded of the first version -------------------------------------------------------------------------


def golden(case: dict[str, Any]) -> list[Any]:
    sources = [
        (Draw(role, repeats), [(i * i + s) % 4 for i in range(count)])
        for s, (role, repeats, count) in enumerate(case["sources"])
    ]
    plan = make(*sources, seed=case["seed"], global_batch=case["global_batch"])
    batches = [plan.at(step) for step in range(3 * plan.steps_per_epoch)]
    return [[batch.epoch, batch.numbers.start, list(batch.entries)] for batch in batches]


@pytest.mark.parametrize("case", GOLDEN["small"], ids=lambda case: str(case["sources"]))
def test_the_order_is_the_recorded_one(case: dict[str, Any]) -> None:
    assert golden(case) == case["batches"]


@pytest.mark.parametrize("case", GOLDEN["large"], ids=lambda case: str(case["sources"]))
def test_the_order_of_many_is_the_recorded_one(case: dict[str, Any]) -> None:
    assert hashlib.sha256(json.dumps(golden(case)).encode()).hexdigest() == case["sha256"]


# -- coverage -------------------------------------------------------------------------------------------------------


@given(plans(several=True), st.integers(0, 3))
def test_each_example_exactly_its_repeats_an_epoch(plan: Plan, epoch: int) -> None:
    repeats = {i: plan.draws[s].repeats for s in range(len(plan.draws)) for i in rows_of(plan, s)}
    assert seen_in(steps_of(plan, epoch)) == repeats


@given(plans(kept=True, walks=True, windowed=True), st.integers(0, 3), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=50)
def test_so_do_the_ranks_and_micro_steps_together(plan: Plan, epoch: int, world: int, batch_size: int) -> None:
    """However a step is split, its samples are those of the plan, so that coverage does not depend on the split."""
    for batch in steps_of(plan, epoch):
        cuts = [plan.micro_steps(batch, rank=rank, world=world, batch_size=batch_size) for rank in range(world)]
        assert [i for of_rank in cuts for cut in of_rank for i in cut] == list(range(len(batch.entries)))
        sizes = [sum(len(cut) for cut in of_rank) for of_rank in cuts]
        assert max(sizes) - min(sizes) <= 1
        for cut in (cut for of_rank in cuts for cut in of_rank):
            assert 1 <= len(cut) <= batch_size
            assert len({batch.buckets[i] for i in cut}) == 1


@given(plans(kept=True), st.integers(0, 3))
def test_as_many_regularization_samples_as_training_samples(plan: Plan, epoch: int) -> None:
    seen = seen_in(steps_of(plan, epoch))
    by_role = Counter()
    for entry, count in seen.items():
        by_role[plan.draws[plan.sources[entry]].role] += count
    assert by_role["regularization"] == by_role["train"] == plan.samples_per_epoch // 2


@given(plans(kept=True, walks=True), st.integers(1, 6))
@settings(max_examples=50)
def test_walks_use_all_evenly_and_a_source_gives_its_samples(plan: Plan, epochs: int) -> None:
    """Over any number of epochs from the first on, counts differ by at most one permutation."""
    each = [seen_in(steps_of(plan, epoch)) for epoch in range(epochs)]
    for source, draw in enumerate(plan.draws):
        if draw.samples is not None:
            counts = [sum(seen[i] for seen in each) for i in rows_of(plan, source)]
            assert sum(counts) == epochs * draw.samples
            assert max(counts) - min(counts) <= 1
            assert {sum(seen[i] for i in rows_of(plan, source)) for seen in each} == {draw.samples}
    pool = [s for s, draw in enumerate(plan.draws) if draw.role != "train" and draw.samples is None]
    slots = sum(len(rows_of(plan, s)) * plan.draws[s].repeats for s in pool)
    for source in pool:
        walked = sum(seen[i] for seen in each for s in pool for i in rows_of(plan, s))
        for i in rows_of(plan, source):
            whole = walked // slots * plan.draws[source].repeats
            assert whole <= sum(seen[i] for seen in each) <= whole + plan.draws[source].repeats


@given(plans(several=True, kept=True), st.integers(0, 2), st.integers(1, 4))
@settings(max_examples=50)
def test_each_resolution_comes_equally_often(plan: Plan, first: int, epochs: int) -> None:
    """Over any stretch of epochs, to within one."""
    met: Counter[tuple[int, Bucket]] = Counter()
    for epoch in range(first, first + epochs):
        for batch in steps_of(plan, epoch):
            met.update(zip(batch.entries, batch.buckets))
    for entry in (i for s, draw in enumerate(plan.draws) if draw.role == "train" for i in rows_of(plan, s)):
        counts = [met[entry, plan.buckets[b]] for b in plan.bucket_ids[entry] if b >= 0]
        assert sum(counts) == epochs * plan.draws[plan.sources[entry]].repeats
        assert max(counts) - min(counts) <= 1
    assert all(plan.buckets.index(b) in plan.bucket_ids[entry] for entry, b in met)


def test_a_walk_takes_the_resolutions_in_turn_too() -> None:
    plan = make((Draw(), [0]), (Draw(samples=2), [(0, 1, 2)] * 4), columns=3, global_batch=3)
    met = Counter(
        pair for epoch in range(12) for batch in steps_of(plan, epoch) for pair in zip(batch.entries, batch.buckets)
    )
    assert [met[entry, b] for entry in range(1, 5) for b in BUCKETS[:3]] == [2] * 12


def test_entries_begin_with_different_resolutions() -> None:
    plan = make((Draw(), [(0, 1, 2)] * 90), columns=3, global_batch=90)
    first = Counter(plan.at(0).buckets)
    assert all(15 < first[b] < 45 for b in BUCKETS[:3])


@given(plans(kept=True, walks=True, windowed=True), st.integers(0, 5))
@settings(max_examples=50)
def test_all_but_one_batch_are_full_and_numbers_count_on(plan: Plan, epoch: int) -> None:
    batches = steps_of(plan, epoch)
    assert sum(len(batch.entries) != plan.global_batch for batch in batches) <= 1
    first = plan.samples_before(epoch)
    assert [n for batch in batches for n in batch.numbers] == list(
        range(first, first + sum(len(batch.entries) for batch in batches))
    )
    assert first == sum(len(batch.entries) for e in range(epoch) for batch in steps_of(plan, e))
    assert all(batch.epoch == epoch and len(batch.numbers) == len(batch.entries) for batch in batches)
    assert {plan.epoch_of(step) for step in range(plan.steps_in(epoch), plan.steps_in(epoch + 1))} == {epoch}


def test_entries_of_no_bucket_no_source_and_validation_take_no_part() -> None:
    plan = make((Draw(), [0, -1, 0]), (Draw("validation"), [0, 0]))
    plan = Plan(
        plan.keys,
        np.array([0, 0, -1, 1, 1]),
        plan.bucket_ids,
        buckets=BUCKETS,
        draws=plan.draws,
        seed=0,
        global_batch=2,
    )
    assert plan.samples_per_epoch == 1
    assert plan.at(5).entries == (0,)


# -- start and end steps --------------------------------------------------------------------------------------------


@given(plans(kept=True, walks=True, windowed=True))
@settings(max_examples=60)
def test_a_source_is_seen_in_just_the_epochs_that_begin_in_its_window(plan: Plan) -> None:
    for epoch in range(12):
        begin = plan.steps_in(epoch)
        seen = {int(plan.sources[i]) for i in seen_in(steps_of(plan, epoch))}
        within = {s for s, d in enumerate(plan.draws) if d.start <= begin and (d.end is None or begin < d.end)}
        assert seen <= within
        # a pool may be larger than what it gives in an epoch
        assert {s for s in within if plan.draws[s].role == "train"} <= seen


def test_a_walk_goes_on_where_it_stopped_when_others_come_and_go() -> None:
    """The walker's permutation of 10 is used up in five epochs, although epochs change their length in between."""
    plan = make((Draw(), [0, 1]), (Draw(samples=2), [0] * 10), (Draw(start=2, end=5), [0, 1, 2]), global_batch=2)
    assert [plan.steps_in(epoch) for epoch in range(6)] == [0, 2, 6, 8, 10, 12]
    seen = sum((seen_in(steps_of(plan, epoch)) for epoch in range(5)), Counter())
    assert [seen[i] for i in rows_of(plan, 1)] == [1] * 10
    assert [seen[i] for i in rows_of(plan, 2)] == [1] * 3


def test_a_pool_that_another_source_joins_is_used_evenly_again() -> None:
    plan = make(
        (Draw(), [0] * 4), (Draw("regularization"), [0] * 6), (Draw("regularization", start=2), [0] * 3), global_batch=8
    )
    first, after = (sum((seen_in(steps_of(plan, e)) for e in epochs), Counter()) for epochs in (range(2), range(2, 11)))
    assert sorted(first[i] for i in rows_of(plan, 1)) == [1] * 4 + [2] * 2
    assert [after[i] for i in rows_of(plan, 1) + rows_of(plan, 2)] == [4] * 9


def test_a_gap_is_told() -> None:
    assert make((Draw(), [0]), (Draw(end=3), [0])).gap() is None
    gapped = make((Draw(end=3), [0] * 8), (Draw("regularization"), [0]), global_batch=8)
    assert gapped.gap() == 4  # two steps an epoch: the one that begins at step 2 is finished
    assert gapped.at(3).epoch == 1
    with pytest.raises(AssertionError, match="nothing is left"):
        gapped.at(4)
    assert gapped.steps_in(2) == 4
    assert gapped.steps_in(3) > 4
    assert make((Draw(start=1), [0])).gap() == 0
    assert make((Draw("regularization"), [0])).gap() == 0
    late = make((Draw(end=3), [0] * 4), (Draw(start=9), [0] * 4))
    assert late.gap() == 3


# -- a pure function of little --------------------------------------------------------------------------------------


def fresh(plan: Plan, order: list[int] | None = None, **changes: Any) -> Plan:
    order = list(range(len(plan.keys))) if order is None else order
    about = dict(
        buckets=plan.buckets, draws=plan.draws, seed=plan.seed, global_batch=plan.global_batch, content=plan.content
    )
    return Plan([plan.keys[i] for i in order], plan.sources[order], plan.bucket_ids[order], **(about | changes))


@given(plans(kept=True, walks=True, windowed=True, several=True), st.integers(0, 40))
def test_any_step_is_a_pure_function_of_its_number(plan: Plan, step: int) -> None:
    resumed = fresh(plan)
    assert resumed.at(step) == [plan.at(s) for s in range(step + 1)][-1]
    assert pickle.loads(pickle.dumps(plan)).at(step) == resumed.at(step)


@given(plans(kept=True, walks=True, several=True), st.randoms(use_true_random=False))
def test_the_order_of_the_sources_files_does_not_matter(plan: Plan, random: Any) -> None:
    order = list(range(len(plan.keys)))
    random.shuffle(order)
    shuffled = fresh(plan, order)
    for step in range(plan.steps_per_epoch):
        assert [order[i] for i in shuffled.at(step).entries] == list(plan.at(step).entries)


def test_epochs_and_seeds_differ() -> None:
    plan, other = (make((Draw(), [0] * 20), seed=seed, global_batch=20) for seed in (0, 1))
    orders = {plan.at(0).entries, plan.at(1).entries, other.at(0).entries, tuple(range(20))}
    assert len(orders) == 4


def test_walks_differ_from_epoch_to_epoch() -> None:
    plan = make((Draw(samples=5), [0] * 5), global_batch=5)
    assert len({plan.at(step).entries for step in range(4)}) == 4


def test_the_digest_tells_other_data() -> None:
    plan = make((Draw(repeats=2), [0, 1]), (Draw("regularization"), [0]))
    assert plan.digest() == fresh(plan, seed=1).digest()
    draws = plan.draws
    others = [
        fresh(plan, global_batch=5),
        fresh(plan, content="other pictures"),
        fresh(plan, [1, 0, 2]),
        fresh(plan, [0, 2]),
        fresh(plan, buckets=BUCKETS[::-1]),
        *(
            fresh(plan, draws=(draws[0], draws[1]._replace(**change)))
            for change in ({"role": "train"}, {"repeats": 2}, {"samples": 3}, {"start": 1}, {"end": 9})
        ),
        make((Draw(repeats=2), [0, 2]), (Draw("regularization"), [0])),
        make((Draw(repeats=2), [0]), (Draw("regularization"), [1, 0])),
        make((Draw(repeats=2), [(0,), (1,)]), (Draw("regularization"), [(0,)]), columns=2),
    ]
    assert len({plan.digest(), *(other.digest() for other in others)}) == len(others) + 1
    assert fresh(make((Draw(), [0, 0])), content="").digest() != ""


def test_keys_are_told_apart_whatever_they_hold() -> None:
    def digest(*keys: str) -> str:
        return Plan(
            keys, np.zeros(2), np.zeros((2, 1)), buckets=BUCKETS, draws=[Draw()], seed=0, global_batch=1
        ).digest()

    assert len({digest("a", "b\n"), digest("a\nb", "\n"), digest("ab", "\n"), digest("a", "\udc80")}) == 4


# -- how batches are made up ----------------------------------------------------------------------------------------


def test_micro_steps_are_as_few_as_the_buckets_allow() -> None:
    plan = make((Draw(), [0] * 10 + [1] * 6), global_batch=16)
    cuts = plan.micro_steps(plan.at(0), rank=0, world=1, batch_size=4)
    assert sorted(len(cut) for cut in cuts) == [2, 2, 4, 4, 4]


def test_full_batches_are_of_one_bucket_and_remainders_stay_together() -> None:
    plan = make((Draw(), [b for b in range(4) for _ in range(6)]), seed=3, global_batch=4)
    batches = steps_of(plan, 0)
    assert all(batch.buckets == tuple(BUCKETS[plan.bucket_ids[i, 0]] for i in batch.entries) for batch in batches)
    assert sum(len(set(batch.buckets)) == 1 for batch in batches) == 4
    shared = [batch.buckets for batch in batches if len(set(batch.buckets)) > 1]
    assert [buckets[0] == buckets[1] != buckets[2] == buckets[3] for buckets in shared] == [True, True]


def test_the_roles_share_every_batch_of_a_bucket_by_half() -> None:
    plan = make((Draw(repeats=3), [0] * 5), (Draw("regularization"), [0] * 40), global_batch=6)
    for batch in (batch for epoch in range(3) for batch in steps_of(plan, epoch)):
        assert sum(plan.sources[i] == 0 for i in batch.entries) == len(batch.entries) // 2


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_every_stretch_of_a_bucket_holds_roles_and_sources_in_proportion(plain: int, walked: int, kept: int) -> None:
    total = plain + walked + kept
    draws = (Draw(), [0] * plain), (Draw(samples=walked), [0] * 20), (Draw("regularization", samples=kept), [0] * 20)
    plan = make(*draws, global_batch=total)
    order = [int(plan.sources[i]) for i in plan.at(0).entries]
    for end in range(total + 1):
        of = Counter(order[:end])
        assert abs(of[2] - end * kept / total) <= 1
        assert abs(of[0] - (end - of[2]) * plain / (plain + walked)) <= 1


@given(st.lists(st.integers(1, 3), min_size=1, max_size=6), st.integers(1, 12))
def test_roles_stay_in_proportion_however_many_sources_they_have(walked: list[int], kept: int) -> None:
    total = sum(walked) + kept
    draws = [(Draw(samples=count), [0] * 3) for count in walked]
    plan = make(*draws, (Draw("regularization", samples=kept), [0] * 20), global_batch=total)
    order = [int(plan.sources[i]) == len(walked) for i in plan.at(0).entries]
    assert all(abs(sum(order[:end]) - end * kept / total) <= 1 for end in range(total + 1))


def test_the_order_of_the_batches_is_shuffled() -> None:
    """Without it every epoch would end with the rare buckets' remainders."""
    plan = make((Draw(), [0] * 9), global_batch=2)
    places = {[len(batch.entries) for batch in steps_of(plan, epoch)].index(1) for epoch in range(20)}
    assert len(places) > 2


@given(st.integers(0, 40), st.integers(1, 9))
def test_shares_are_contiguous_and_differ_by_at_most_one(count: int, world: int) -> None:
    shares = [share(count, rank, world) for rank in range(world)]
    assert [i for part in shares for i in part] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_hundred_thousand_entries_take_a_few_bytes_each() -> None:
    """150 bytes an entry at the peak, of plan and epoch together and without the keys."""
    count = 100_000
    keys = [f"0/{i:08d}.png" for i in range(count)]
    ids = np.arange(count)[:, None] % 4
    tracemalloc.start()
    plan = Plan(keys, np.zeros(count), ids, buckets=BUCKETS, draws=[Draw()], seed=0, global_batch=8)
    plan.at(0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 150 * count
