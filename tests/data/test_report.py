"""The report counts what it is told, and says nothing where there is nothing to be known."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lorakit.data import report as module
from lorakit.data.plan import Draw, Plan
from lorakit.data.report import DataReport, make_report, rows
from tests.data.standin import Held, source


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    return [Image.new("RGB", size, (i % 256, 90, 160)) for i, size in enumerate(sizes)]


def plan_of(data: Held, *, global_batch: int = 4, draws: list[Draw] | None = None) -> Plan:
    buckets = sorted({b for i in range(len(data.examples)) for b in data.buckets_of(i)})
    return Plan(
        [e.key for e in data.examples],
        [-1 if e.role == "validation" else e.source for e in data.examples],
        [[buckets.index(data.buckets_of(i)[0])] for i in range(len(data.examples))],
        buckets=buckets,
        draws=draws or [Draw(repeats=s.repeats, samples=s.samples_per_epoch) for s in data.sources],
        seed=0,
        global_batch=global_batch,
    )


def report_of(data: Held, **changes: Any) -> DataReport:
    known = {"buckets_of": data.buckets_of, "captions_of": data.captions_of, "plan": plan_of(data)}
    return make_report(data.examples, settings=data.settings, **{**known, **changes})


@pytest.fixture
def five() -> Held:
    return Held(
        pictures((64, 64), (160, 104), (300, 70), (60, 60), (128, 128)),
        captions=["a", "b", "c", "c", "d"],
        roles=["train", "train", "train", "train", "validation"],
        sources=[source(repeats=3)],
        masks={1: Image.new("L", (160, 104), 255)},
        extra_captions=("another form",),
    )


def test_it_counts(five: Held) -> None:
    report = report_of(five, steps=8)
    assert (report.pictures, report.validation, report.masked, report.enlarged) == (5, 1, 1, 1)
    assert (report.captions, report.caption_variants, report.resolutions) == (4, 5, (64,))
    assert report.buckets == {"64×64": 3, "80×56": 1, "104×40": 1}
    wide = 0.5 * (1 - (104 / 40) / (300 / 70))
    near = 0.5 * (1 - (80 / 56) / (160 / 104))
    assert report.largest_crop == pytest.approx(wide) and report.mean_crop == pytest.approx((wide + near) / 5)
    # 4 pictures thrice, by fours
    assert (report.samples_per_epoch, report.steps_per_epoch, report.steps) == (12, 3, 8)
    assert report.epochs == pytest.approx(8 / 3, abs=1e-4)
    assert report.sources[0] == module.SourceReport("photos", "train", 5, 3, 12.0, validation=1)


def test_it_is_plain_json_without_absolute_paths(five: Held) -> None:
    values = report_of(five, warnings=["w"], skipped=["s"], errors=["e"]).to_json()
    assert json.loads(json.dumps(values)) == values
    assert "/home" not in json.dumps(values) and "somebody" not in json.dumps(values)
    assert (values["warnings"][0], values["skipped"], values["errors"]) == ("w", ["s"], ["e"])


def test_what_is_cropped_enlarged_or_too_long_is_named(five: Held) -> None:
    report = report_of(five, count_tokens=len, token_limit=11)
    assert report.long_captions == 5  # the other form, of 12
    assert report.warnings[:2] == (
        "0/002.png: 39% of its width is cut off, from 300×70 to 104×40, for it is longer than "
        "data.buckets.max_aspect 3",
        "0/003.png: it is enlarged 1.07 times, from 60×60 to 64×64",
    )
    assert report.warnings[2] == "0/000.png: its caption has 12 tokens, of which the model reads 11"
    assert report_of(five, count_tokens=len, token_limit=12).long_captions == 0
    assert report_of(five, count_tokens=len).long_captions == 0


def test_a_long_list_is_cut_and_the_rest_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LISTED", 3)
    data = Held(pictures(*[(60, 60)] * 8))
    report = report_of(data)
    assert report.enlarged == 8 and len(report.warnings) == 4
    assert report.warnings[-1] == "5 more pictures are enlarged: lorakit check --out lists all"


def test_a_report_of_next_to_nothing() -> None:
    data = Held(pictures((64, 64)))
    for examples in ([], data.examples):
        report = make_report(examples, settings=data.settings, errors=["all is lost"], epochs=3, steps=None)
        assert report.errors == ("all is lost",) and report.pictures == len(examples)
        assert (report.buckets, report.steps, report.largest_crop, report.warnings) == ({}, 0, 0.0, ())
    assert report.captions == 1


def test_regularization_sources_share_what_the_training_sources_give() -> None:
    data = Held(
        pictures(*[(64, 64)] * 6),
        sources=[source(), source(role="regularization"), source(role="regularization", repeats=2)],
    )
    examples = [
        module.Example(e.key, i // 2, e.place, e.captions, e.size, e.digest, role=data.sources[i // 2].role)
        for i, e in enumerate(data.examples)
    ]
    data.examples = examples
    plan = plan_of(data, draws=[Draw(), Draw("regularization"), Draw("regularization", 2)])
    report = report_of(data, plan=plan)
    assert [s.samples_per_epoch for s in report.sources] == [2.0, 0.67, 1.33]
    assert sum(s.samples_per_epoch for s in report.sources) == plan.samples_per_epoch == 4


@given(count=st.integers(1, 40), batch=st.integers(1, 9), steps=st.integers(1, 200), start=st.integers(0, 60))
def test_steps_and_epochs_belong_together(count: int, batch: int, steps: int, start: int) -> None:
    """Epochs, counted one by one as the plan walks through them, are what the report says; also where they differ."""
    plan = Plan(
        [str(i) for i in range(count + 3)],
        [0] * count + [1] * 3,
        [[0]] * (count + 3),
        buckets=[module.Bucket(64, 64)],
        draws=[Draw(), Draw(start=start)],
        seed=0,
        global_batch=batch,
    )
    settings = Held([], sources=[source(), source()]).settings
    report = make_report([], settings=settings, plan=plan, steps=steps)
    epoch = math.floor(report.epochs + 1e-3)
    assert plan.steps_in(epoch) <= steps < plan.steps_in(epoch + 1) + 1
    assert report.steps == steps
    if steps < plan.steps_in(epoch + 1) and abs(report.epochs - round(report.epochs)) > 1e-3:
        assert plan.epoch_of(steps - 1) == epoch
    again = make_report([], settings=settings, plan=plan, epochs=epoch + 1)
    assert (again.steps, again.epochs) == (plan.steps_in(epoch + 1), epoch + 1)


def test_rows_are_made_one_by_one_and_say_what_the_report_says(five: Held) -> None:
    report = report_of(five, warnings=["0/001.png: looks like 0/000.png"], count_tokens=len, token_limit=11)
    made = rows(five, report=report, count_tokens=len, token_limit=11)
    first = next(made)
    assert (first.key, first.caption, first.captions, first.tokens) == ("0/000.png", "a", 2, 12)
    found = [first, *made]
    assert [row.mask for row in found] == ["", "picture", "", "", ""]
    assert found[1].warnings[-1] == "looks like 0/000.png"
    assert {f"{row.key}: {text}" for row in found for text in row.warnings} == set(report.warnings)
    assert max(row.crop for row in found) == report.largest_crop
    assert sum(row.scale > 1 for row in found) == report.enlarged
    assert [row.repeats for row in found] == [3] * 5 and found[4].role == "validation"
    assert all(row.tokens is None for row in rows(five))


def test_a_focus_outside_of_the_crop_is_named_where_it_is_not_kept(five: Held) -> None:
    five.examples = [replace(five.examples[2], focus=focus) for focus in ((0.05, 0.5), (0.5, 0.5))]
    (warning,) = [text for text in report_of(five).warnings if "middle of its mask" in text]
    assert warning.startswith("0/002.png: ")
    for crop in ("focus", "random"):
        five.sources = five.settings.sources = [source(crop=crop)]
        assert not [text for text in report_of(five).warnings if "middle of its mask" in text]
