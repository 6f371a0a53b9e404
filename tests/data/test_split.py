from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.split import sample, split

digests = st.lists(st.integers(0, 30).map(str), max_size=40)
fractions = st.floats(0, 1, exclude_max=True)


@given(digests, fractions, st.integers(0, 9))
def test_the_share_is_as_asked_and_no_picture_is_on_both_sides(names: list[str], fraction: float, seed: int) -> None:
    chosen = split(names, fraction, seed=seed)
    assert chosen.dtype == bool
    assert len(chosen) == len(names)
    held = {name for name, side in zip(names, chosen) if side}
    trained = {name for name, side in zip(names, chosen) if not side}
    assert not held & trained
    count = len(set(names))
    if fraction == 0 or count < 2:
        assert not held
    else:
        assert len(held) == min(max(round(count * fraction), 1), count - 1)


@given(st.lists(st.integers(0, 10**6).map(str), min_size=2, max_size=40, unique=True), fractions, st.integers(0, 9))
def test_a_picture_more_moves_at_most_one_other(names: list[str], fraction: float, seed: int) -> None:
    before, after = split(names[:-1], fraction, seed=seed), split(names, fraction, seed=seed)
    assert sum(before != after[:-1]) <= 1


@given(digests, fractions, st.randoms(use_true_random=False))
def test_the_order_does_not_matter(names: list[str], fraction: float, random: object) -> None:
    order = list(range(len(names)))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert split([names[i] for i in order], fraction, seed=0).tolist() == split(names, fraction, seed=0)[order].tolist()


def test_seeds_choose_differently() -> None:
    names = [str(i) for i in range(100)]
    assert len({tuple(split(names, 0.1, seed=seed)) for seed in range(5)}) == 5


@given(st.lists(st.integers(0, 10**6), max_size=40, unique=True), st.integers(0, 50), st.integers(0, 9))
def test_a_sample_goes_by_the_keys_and_not_by_their_numbers(names: list[int], count: int, seed: int) -> None:
    keys = {i: str(name) for i, name in enumerate(names)}
    chosen = sample(keys, count, seed=seed)
    assert chosen == sorted(set(chosen)) and len(chosen) == min(count, len(names))
    moved = sample({i + 7: key for i, key in keys.items()}, count, seed=seed)
    assert [i - 7 for i in moved] == chosen
    assert set(chosen) <= set(sample(keys, count + 1, seed=seed)), "one more changes none of the others"
