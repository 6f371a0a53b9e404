from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.eras import Draw, Eras

windows = st.tuples(st.integers(0, 40), st.none() | st.integers(0, 60))
draws = st.builds(
    lambda role, repeats, samples, window: Draw(role, repeats, samples, *window),
    st.sampled_from(["train", "regularization", "validation"]),
    st.integers(1, 3),
    st.none() | st.integers(0, 9),
    windows,
)


def by_counting(draws: list[Draw], counts: list[int], size: int, epochs: int) -> list[tuple[int, int, int]]:
    """First step, first sample and samples of every epoch, one after the other, until nothing is left."""
    found, step, sample = [], 0, 0
    for _ in range(epochs):
        here = [i for i, d in enumerate(draws) if d.start <= step and (d.end is None or step < d.end) and counts[i]]
        given = {i: draws[i].samples if draws[i].samples is not None else counts[i] * draws[i].repeats for i in here}
        train = sum(given[i] for i in here if draws[i].role == "train")
        kept = [i for i in here if draws[i].role == "regularization"]
        pool = train if any(draws[i].samples is None for i in kept) else 0
        samples = train + pool + sum(draws[i].samples or 0 for i in kept)
        if not train:
            break
        found.append((step, sample, samples))
        step, sample = step + -(-samples // size), sample + samples
    return found


@given(st.lists(draws, min_size=1, max_size=4), st.data(), st.integers(1, 7))
def test_the_arithmetic_is_that_of_counting_epochs(draws: list[Draw], data: st.DataObject, size: int) -> None:
    counts = data.draw(st.lists(st.integers(0, 8), min_size=len(draws), max_size=len(draws)))
    eras = Eras(draws, counts, global_batch=size)
    counted = by_counting(draws, counts, size, 80)
    for epoch, (step, sample, samples) in enumerate(counted):
        era = eras.of_epoch(epoch)
        assert era is eras.of_step(step)
        assert (era.step + (epoch - era.epoch) * era.steps_per_epoch, era.samples) == (step, samples)
        assert era.sample + (epoch - era.epoch) * era.samples == sample
    if len(counted) < 80:
        last = counted[-1] if counted else (0, 0, 0)
        assert eras.gap == last[0] + -(-last[2] // size)
    bounds = {b for draw in draws for b in (draw.start, draw.end) if b is not None}
    assert len(eras.eras) <= len(bounds) + 1


def test_many_epochs_cost_nothing() -> None:
    eras = Eras([Draw(), Draw(start=10**12)], [5, 5], global_batch=1)
    assert [era.epochs for era in eras.eras] == [10**12 // 5, None]


def test_an_empty_source_and_an_empty_pool_give_nothing() -> None:
    eras = Eras([Draw(), Draw("regularization"), Draw(samples=0)], [3, 0, 4], global_batch=2)
    assert (eras.eras[0].samples, eras.eras[0].walks) == (3, ())
