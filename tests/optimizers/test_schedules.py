"""Schedules in closed form."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.optimizers.schedules import Schedule, factor


def test_cosine_and_linear_in_closed_form() -> None:
    cosine, linear = Schedule(kind="cosine", floor=0.1), Schedule(kind="linear")
    for step in range(10):
        assert factor(cosine, step, 10) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * step / 10)) / 2)
        assert factor(linear, step, 10) == pytest.approx(1 - step / 10)


def test_warmup_rises_evenly_to_the_full_rate() -> None:
    schedule = Schedule(kind="constant", warmup=3)
    assert [factor(schedule, step, 10) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]


@given(st.sampled_from(["constant", "linear", "cosine"]), st.integers(0, 50), st.integers(1, 200), st.floats(0, 1))
def test_never_outside_its_bounds_and_never_rising_after_the_warmup(
    kind: str, warmup: int, total: int, floor: float
) -> None:
    schedule = Schedule(kind=kind, warmup=warmup, floor=floor)  # type: ignore[arg-type]
    factors = [factor(schedule, step, total) for step in range(total)]
    assert all(0 < f <= 1 or f >= floor for f in factors) and max(factors) <= 1
    after = factors[warmup:]
    assert all(a >= b for a, b in pairwise(after))
