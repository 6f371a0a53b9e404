"""Curves: where the numbers say, in one frame, with round numbers beside it."""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.training.charts import Line, chart, running_mean, sparkline, thinned, ticks


def drawn(page: str) -> list[list[tuple[float, float]]]:
    return [
        [(float(x), float(y)) for x, y in (pair.split(",") for pair in points.split())]
        for points in re.findall(r'polyline[^>]* points="([^"]+)"', page)
    ]


def test_curves_share_a_frame_and_span_it() -> None:
    one, other = drawn(chart([Line("a", [(1, 5.0), (2, 1.0), (3, 3.0)]), Line("b", [(3, 3.0)], 1)], width=572))
    assert one == [(58.0, 14.0), (308.0, 210.0), (558.0, 112.0)] and other == [(558.0, 112.0)]


def test_zero_is_in_the_frame_where_it_is_asked_for() -> None:
    line = Line("", [(0, -2.0), (1, -1.0)])
    assert drawn(chart([line]))[0][1][1] == 14.0 and drawn(chart([line], zero=True))[0][1][1] == 112.0


def test_a_single_number_and_equal_ones_can_be_drawn() -> None:
    assert 'class="c0" cx=' in chart([Line("", [(5, 1.0)])])
    assert len(drawn(chart([Line("", [(1, 2.0), (2, 2.0)])]))[0]) == 2


def test_names_are_text() -> None:
    assert "a &lt;b&gt;" in chart([Line("a <b>", [(1, 1.0)])]) and "legend" not in chart([Line("", [(1, 1.0)])])


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_and_within(bottom: float, length: float) -> None:
    found = ticks(bottom, bottom + length)
    assert 1 <= len(found) <= 6 and all(bottom - 1e-6 * length <= v <= bottom + length * 1.000001 for v in found)
    assert ticks(bottom, bottom) == [bottom]


def test_ticks_are_round() -> None:
    assert ticks(0.03, 0.99) == pytest.approx([0.5]) or ticks(0.03, 0.99) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert ticks(0, 100) == [0, 50, 100] or ticks(0, 100) == [0, 20, 40, 60, 80, 100]


@given(st.integers(1, 5000))
def test_what_is_thinned_is_even_and_ends_as_it_did(count: int) -> None:
    points = [(float(i), float(i)) for i in range(count)]
    shown = thinned(points)
    assert shown[-1] == points[-1] and len(shown) <= 400
    assert len({b[0] - a[0] for a, b in pairwise(shown)}) <= 1


def test_the_running_mean_forgets_what_left_its_window() -> None:
    values = [float(i) for i in range(40)]
    means = running_mean(list(enumerate(values)))
    assert [m for _, m in means] == pytest.approx([0.0] + [(a + b) / 2 for a, b in pairwise(values)])


def test_a_spark_is_drawn_against_one() -> None:
    page = sparkline([(1, 3.0), (5, 2.0)], span=(1, 5))
    assert drawn(page) == [[(2.0, 2.0), (118.0, 14.0)]] and 'y1="26.0"' in page
