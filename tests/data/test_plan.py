from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.data.buckets import Bucket
from lorakit.data.plan import GlobalBatch, Plan, PlanEntry, share

BUCKETS = [Bucket(64, 64), Bucket(80, 52), Bucket(52, 80), Bucket(104, 40)]


@st.composite
def plans(draw: st.DrawFn, *, regularization: bool = False) -> Plan:
    """A plan of a few sources' examples in a few buckets."""

    def entries(role: str, count: int) -> list[PlanEntry]:
        return [
            PlanEntry(f"{role}/{i}", draw(st.sampled_from(BUCKETS)), draw(st.integers(1, 3)), role)
            for i in range(count)
        ]

    train = entries("train", draw(st.integers(1, 12)))
    kept = entries("regularization", draw(st.integers(1, 8))) if regularization else []
    return Plan(train + kept, seed=draw(st.integers(0, 9)), global_batch=draw(st.integers(1, 9)))


def epoch_of(plan: Plan, epoch: int) -> list[GlobalBatch]:
    return [plan.at(epoch * plan.steps_per_epoch + i) for i in range(plan.steps_per_epoch)]


@given(plans(), st.integers(0, 3))
def test_each_example_exactly_its_repeats_an_epoch(plan: Plan, epoch: int) -> None:
    seen = Counter(entry for batch in epoch_of(plan, epoch) for entry in batch.entries)
    assert seen == {i: entry.repeats for i, entry in enumerate(plan.entries)}


@given(plans(regularization=True), st.integers(0, 3))
def test_as_many_regularization_samples_as_training_samples(plan: Plan, epoch: int) -> None:
    seen = Counter(entry for batch in epoch_of(plan, epoch) for entry in batch.entries)
    train = {i: entry.repeats for i, entry in enumerate(plan.entries) if entry.role == "train"}
    assert {i: seen[i] for i in train} == train
    assert sum(seen.values()) == 2 * sum(train.values()) == plan.samples_per_epoch


@given(plans(regularization=True))
@settings(max_examples=30)
def test_regularization_is_used_evenly_over_epochs(plan: Plan) -> None:
    pool = {i: entry.repeats for i, entry in enumerate(plan.entries) if entry.role != "train"}
    # as many epochs as there are slots: the walk then has gone round a whole number of times
    rounds = plan.samples_per_epoch // 2
    epochs = sum(pool.values())
    seen = Counter(entry for e in range(epochs) for batch in epoch_of(plan, e) for entry in batch.entries)
    assert {i: seen[i] for i in pool} == {i: rounds * repeats for i, repeats in pool.items()}


@given(plans(regularization=True), st.integers(0, 3))
def test_all_but_one_batch_are_full_and_numbers_count_on(plan: Plan, epoch: int) -> None:
    batches = epoch_of(plan, epoch)
    assert sum(len(batch.entries) != plan.global_batch for batch in batches) <= 1
    numbers = [n for batch in batches for n in batch.numbers]
    first = epoch * plan.samples_per_epoch
    assert numbers == list(range(first, first + plan.samples_per_epoch))
    assert all(batch.epoch == epoch and len(batch.numbers) == len(batch.entries) for batch in batches)


@given(plans(regularization=True), st.integers(0, 20), st.integers(1, 5), st.integers(1, 4))
def test_ranks_and_micro_steps_give_the_global_batch_in_order(
    plan: Plan, step: int, world: int, batch_size: int
) -> None:
    batch = plan.at(step)
    cuts = [plan.micro_steps(batch, rank=rank, world=world, batch_size=batch_size) for rank in range(world)]
    assert [i for of_rank in cuts for cut in of_rank for i in cut] == list(range(len(batch.entries)))
    sizes = [sum(len(cut) for cut in of_rank) for of_rank in cuts]
    assert max(sizes) - min(sizes) <= 1
    for cut in (cut for of_rank in cuts for cut in of_rank):
        assert 1 <= len(cut) <= batch_size
        assert len({plan.entries[batch.entries[i]].bucket for i in cut}) == 1


def test_micro_steps_are_as_few_as_the_buckets_allow() -> None:
    entries = [PlanEntry(str(i), BUCKETS[0]) for i in range(10)] + [
        PlanEntry(str(i), BUCKETS[1]) for i in range(10, 16)
    ]
    plan = Plan(entries, seed=0, global_batch=16)
    cuts = plan.micro_steps(plan.at(0), rank=0, world=1, batch_size=4)
    assert sorted(len(cut) for cut in cuts) == [2, 2, 4, 4, 4]


@given(plans(regularization=True), st.integers(0, 20))
def test_any_step_is_a_pure_function_of_its_number(plan: Plan, step: int) -> None:
    fresh = Plan(plan.entries, seed=plan.seed, global_batch=plan.global_batch)
    assert fresh.at(step) == [plan.at(s) for s in range(step + 1)][-1]


@given(plans(regularization=True), st.randoms(use_true_random=False))
def test_the_order_of_the_sources_files_does_not_matter(plan: Plan, random: object) -> None:
    order = list(range(len(plan.entries)))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = Plan([plan.entries[i] for i in order], seed=plan.seed, global_batch=plan.global_batch)
    for step in range(plan.steps_per_epoch):
        assert [order[i] for i in shuffled.at(step).entries] == list(plan.at(step).entries)


def test_full_batches_are_of_one_bucket_and_remainders_stay_together() -> None:
    entries = [PlanEntry(f"{b}/{i}", bucket) for b, bucket in enumerate(BUCKETS) for i in range(6)]
    plan = Plan(entries, seed=3, global_batch=4)
    batches = epoch_of(plan, 0)
    of_bucket = [[plan.entries[i].bucket for i in batch.entries] for batch in batches]
    assert sum(len(set(buckets)) == 1 for buckets in of_bucket) == 4
    shared = [buckets for buckets in of_bucket if len(set(buckets)) > 1]
    assert [buckets[0] == buckets[1] != buckets[2] == buckets[3] for buckets in shared] == [True, True]


def test_the_roles_share_every_batch_of_a_bucket_by_half() -> None:
    entries = [PlanEntry(f"t{i}", BUCKETS[0], 3) for i in range(5)]
    entries += [PlanEntry(f"r{i}", BUCKETS[0], 1, "regularization") for i in range(40)]
    plan = Plan(entries, seed=0, global_batch=6)
    for batch in (batch for epoch in range(3) for batch in epoch_of(plan, epoch)):
        assert sum(plan.entries[i].role == "train" for i in batch.entries) == len(batch.entries) // 2


def test_epochs_and_seeds_differ() -> None:
    entries = [PlanEntry(str(i), BUCKETS[0]) for i in range(20)]
    plan, other = (Plan(entries, seed=seed, global_batch=20) for seed in (0, 1))
    orders = {plan.at(0).entries, plan.at(1).entries, other.at(0).entries, tuple(range(20))}
    assert len(orders) == 4


def test_the_order_of_the_batches_is_shuffled() -> None:
    """Without it every epoch would end with the rare buckets' remainders."""
    entries = [PlanEntry(str(i), BUCKETS[0]) for i in range(9)]
    places = {
        [len(batch.entries) for batch in epoch_of(Plan(entries, seed=0, global_batch=2), epoch)].index(1)
        for epoch in range(20)
    }
    assert len(places) > 2


def test_the_digest_tells_other_data() -> None:
    entry = PlanEntry("0/a.png", BUCKETS[0], 2)
    plan = Plan([entry], seed=0, global_batch=4)
    assert plan.digest() == Plan([entry], seed=1, global_batch=4).digest()
    others = [
        Plan([entry], seed=0, global_batch=5),
        Plan([entry._replace(key="0/b.png")], seed=0, global_batch=4),
        Plan([entry._replace(bucket=BUCKETS[1])], seed=0, global_batch=4),
        Plan([entry._replace(repeats=3)], seed=0, global_batch=4),
        Plan([entry._replace(content="another picture")], seed=0, global_batch=4),
        Plan([entry, entry._replace(key="1/a.png", role="regularization")], seed=0, global_batch=4),
    ]
    assert len({plan.digest(), *(other.digest() for other in others)}) == 7


@given(st.integers(0, 40), st.integers(1, 9))
def test_shares_are_contiguous_and_differ_by_at_most_one(count: int, world: int) -> None:
    shares = [share(count, rank, world) for rank in range(world)]
    assert [i for part in shares for i in part] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
