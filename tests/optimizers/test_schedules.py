"""Schedules: closed forms, properties, and the libraries' schedulers where they mean the same."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from lorakit.core.errors import InputError
from lorakit.core.settings import validate
from lorakit.optimizers.schedules import Schedule, depends_on_total, factor

KINDS = ["constant", "linear", "cosine", "polynomial", "wsd", "rex"]


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    kind = draw(st.sampled_from(KINDS))
    values: dict[str, Any] = {"kind": kind, "warmup": draw(st.integers(0, 50))}
    if kind != "constant":
        values["floor"] = draw(st.floats(0, 1))
    if kind == "cosine":
        values["restarts"] = draw(st.integers(0, 5))
    if kind == "polynomial":
        values["power"] = draw(st.floats(0.1, 5))
    if kind == "wsd":
        values["decay"] = draw(st.one_of(st.floats(0.01, 0.99), st.integers(1, 300).map(float)))
    return Schedule(**values)


def factors(schedule: Schedule, total: int) -> list[float]:
    return [factor(schedule, step, total) for step in range(total)]


def test_closed_forms() -> None:
    cosine, linear = Schedule(kind="cosine", floor=0.1), Schedule(kind="linear")
    for step in range(10):
        left = 1 - step / 10
        assert factor(cosine, step, 10) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * step / 10)) / 2)
        assert factor(linear, step, 10) == pytest.approx(left)
        assert factor(Schedule(kind="polynomial", power=3), step, 10) == pytest.approx(left**3)
        assert factor(Schedule(kind="rex"), step, 10) == pytest.approx(2 * left / (1 + left))


def test_wsd_stays_and_goes_down_at_the_end() -> None:
    expected = [1.0] * 6 + [1 - math.sqrt(n / 4) for n in range(4)]
    assert factors(Schedule(kind="wsd", decay=0.4), 10) == pytest.approx(expected)
    assert factors(Schedule(kind="wsd", decay=4), 10) == pytest.approx(expected)
    # a fraction of the run, its warm-up included
    assert factors(Schedule(kind="wsd", decay=0.4, warmup=2), 10)[2:] == pytest.approx(expected[2:])
    assert factors(Schedule(kind="wsd", decay=400), 4) == pytest.approx([1 - math.sqrt(n / 4) for n in range(4)])


def test_warmup_rises_evenly_to_the_full_rate() -> None:
    schedule = Schedule(kind="constant", warmup=3)
    assert factors(schedule, 5) == [0.25, 0.5, 0.75, 1, 1]


@given(schedules(), st.integers(1, 200))
def test_bounds_warmup_and_end(schedule: Schedule, total: int) -> None:
    values = factors(schedule, total)
    floor = 1.0 if schedule.kind == "constant" else schedule.floor
    assert all(0 < v <= 1 for v in values[: schedule.warmup])
    assert all(floor <= v <= 1 for v in values[schedule.warmup :])
    assert all(a < b for a, b in pairwise(values[: schedule.warmup + 1]))
    if total > schedule.warmup:
        assert values[schedule.warmup] == 1
        assert factor(schedule, total, total) == factor(schedule, total + 7, total) == floor
    if not schedule.restarts:
        assert all(a >= b for a, b in pairwise(values[schedule.warmup :]))


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 20))
@example(21, 2, 0)  # 22 times 15/22 is less than 15 in double precision
def test_restarts_start_again_at_the_full_rate(restarts: int, length: int, warmup: int) -> None:
    schedule = Schedule(kind="cosine", restarts=restarts, warmup=warmup)
    values = factors(schedule, warmup + length * (restarts + 1))[warmup:]
    assert values == pytest.approx(factors(Schedule(kind="cosine"), length) * (restarts + 1))
    assert [i for i, v in enumerate(values) if v == 1] == list(range(0, len(values), length))


@given(st.sampled_from([k for k in KINDS if k != "wsd"]), st.integers(2, 400))
def test_the_last_step_is_near_the_floor(kind: str, total: int) -> None:
    assume(kind != "constant")
    # rex is the steepest there: 2x/(1 + x) with x = 1/total
    assert 0 < factors(Schedule(kind=kind), total)[-1] <= 2 / total  # type: ignore[arg-type]


def test_only_a_constant_rate_knows_no_end() -> None:
    for kind in KINDS:
        schedule = Schedule(kind=kind)  # type: ignore[arg-type]
        same = factors(schedule, 50) == [factor(schedule, step, 60) for step in range(50)]
        assert same != depends_on_total(schedule)


@pytest.mark.parametrize(
    ("ours", "theirs", "arguments"),
    [
        ({"kind": "linear"}, "get_linear_schedule_with_warmup", {}),
        ({"kind": "cosine"}, "get_cosine_schedule_with_warmup", {}),
        ({"kind": "cosine", "restarts": 2}, "get_cosine_with_hard_restarts_schedule_with_warmup", {"num_cycles": 3}),
        (
            {"kind": "polynomial", "power": 1.7, "floor": 0.05},
            "get_polynomial_decay_schedule_with_warmup",
            {"power": 1.7, "lr_end": 0.1},
        ),
        (
            {"kind": "wsd", "decay": 13, "floor": 0.1},
            "get_wsd_schedule",
            {"num_decay_steps": 13, "decay_type": "1-sqrt", "min_lr_ratio": 0.1},
        ),
    ],
)
def test_the_libraries_mean_the_same_after_the_warmup(
    ours: dict[str, Any], theirs: str, arguments: dict[str, Any]
) -> None:
    import transformers
    from diffusers import optimization

    schedule = Schedule(warmup=6, **ours)
    libraries = [library for library in (transformers, optimization) if hasattr(library, theirs)]
    assert len(libraries) == (1 if theirs == "get_wsd_schedule" else 2)  # diffusers has no wsd
    for library in libraries:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=2.0)
        scheduler = getattr(library, theirs)(optimizer, num_warmup_steps=6, num_training_steps=66, **arguments)
        for step in range(67):
            if step >= 6:
                assert scheduler.get_last_lr()[0] / 2 == pytest.approx(factor(schedule, step, 66), abs=1e-12), step
            optimizer.step()
            scheduler.step()


@pytest.mark.parametrize(
    ("given_values", "message"),
    [
        ({"power": 3.0}, "power = 3.0 does nothing with kind = 'cosine'"),
        ({"kind": "constant", "floor": 0.1, "restarts": 1}, "floor = 0.1 .*restarts = 1 "),
        ({"kind": "wsd", "decay": 2.5}, "decay = 2.5"),
        ({"kind": "linear", "decay": 5}, "decay = 5.0 does nothing"),
        ({"kind": "cosin"}, "Did you mean cosine"),
    ],
)
def test_what_does_nothing_is_refused_by_name(given_values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"optimizer.schedule.*{message}"):
        validate(Schedule, given_values, where="optimizer.schedule", name="a schedule")


@pytest.mark.parametrize("kind", KINDS)
def test_written_out_defaults_are_accepted(kind: str) -> None:
    written = {**Schedule().model_dump(), "kind": kind}
    assert validate(Schedule, written, where="optimizer.schedule", name="a schedule").kind == kind
