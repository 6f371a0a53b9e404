"""Captions that are alike: every pair is found, as by comparing each with each."""

from hypothesis import given
from hypothesis import strategies as st

from lorakit.captioning.texts.near import NEAR, alike

CAPTIONS = st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=7).map(" ".join), max_size=12)


@given(CAPTIONS, st.sampled_from([0.5, NEAR, 1.0]))
def test_every_pair_is_found(captions: list[str], least: float) -> None:
    expected = []
    sets = [frozenset(caption.split()) for caption in captions]
    for first in dict.fromkeys(map(sets.index, sets)):
        same = tuple(i for i, words in enumerate(sets) if words == sets[first])
        near = [
            i for i in range(first)
            if sets[i] != sets[first] and len(sets[i] & sets[first]) >= least * len(sets[i] | sets[first])
        ]  # fmt: skip
        if len(same) > 1 or near:
            expected.append((same, min(near, default=None)))
    assert [(found.same, found.near) for found in alike(captions, least=least)] == expected


def test_case_and_points_are_no_difference() -> None:
    assert [found.same for found in alike(["A dog.", "a DOG", "a cat"])] == [(0, 1)]
