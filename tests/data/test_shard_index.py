import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.shard_file import Contents, Part, pack
from lorakit.data.shard_index import Found, Index

LAYOUTS = [(Part("a", "F32", (n,), 0, 4 * n),) for n in (1, 2)]
# few heads, so that keys differ in their tails only, and keys that end in zeros
keys = st.builds(
    lambda head, tail: f"{head:016x}{tail:024x}", st.integers(0, 2), st.integers(0, 3).map(lambda n: n << 40)
)


@given(st.lists(st.lists(keys, unique=True, max_size=6), max_size=5), st.lists(keys, max_size=8))
def test_it_is_a_dictionary_where_the_last_one_counts(shards: list[list[str]], asked: list[str]) -> None:
    index, expected = Index(), {}
    for number, of_shard in enumerate(shards):
        layouts = [LAYOUTS[i % 2] for i in range(len(of_shard))]
        index.add(str(number), Contents(pack(of_shard), layouts, np.arange(len(of_shard)) + 100 * number))
        for i, key in enumerate(of_shard):
            expected[key] = Found(str(number), i + 100 * number, layouts[i])
        if number % 2:
            index.find(pack(asked))  # sorted in between
    positions = index.find(pack(asked))
    assert [position >= 0 for position in positions] == [key in expected for key in asked]
    there = [key for key in asked if key in expected]
    assert index.at(positions[positions >= 0]) == [expected[key] for key in there]
    assert set(index.shards_at(positions[positions >= 0])) == {expected[key].shard for key in there}
    assert len(index) >= len(expected)


def test_a_hundred_thousand_entries_take_75_bytes_each() -> None:
    count, rng = 100_000, np.random.default_rng(0)
    tracemalloc.start()
    index = Index()
    for shard in range(count // 1000):
        packed = rng.integers(0, 256, (1000, 20), dtype=np.uint8)
        index.add(f"entries-{shard:024x}", Contents(packed, [LAYOUTS[0]] * 1000, np.arange(1000)))
    assert len(index) == count
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert now < 40 * count
    assert peak < 75 * count


@pytest.mark.parametrize("key", ["", "g" * 40, "a" * 38])
def test_what_is_no_key_is_refused(key: str) -> None:
    with pytest.raises(ValueError):
        pack([key, "0" * 40])
