import json
from pathlib import Path

import pytest

from lorakit.core.errors import InputError
from lorakit.core.settings import validate
from lorakit.data.dataset import Dataset, DataSettings, prepare
from tests.data.pictures import folder_of


def settings_of(*sources: dict[str, object], **data: object) -> DataSettings:
    buckets = data.pop("buckets", {"resolution": 64})
    return validate(DataSettings, {"sources": list(sources), "buckets": buckets, **data}, where="data", name="data")


def prepared(settings: DataSettings, **changes: object) -> Dataset:
    arguments = {"side_multiple": 4, "seed": 0, "global_batch": 4, **changes}
    return prepare(settings, **arguments)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    sizes = {"a.png": (64, 64), "b.png": (160, 104), "c.png": (300, 70), "d.png": (60, 60), "e.png": (128, 128)}
    return folder_of(tmp_path / "photos", sizes)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "kept", {f"{i}.png": (64, 64) for i in range(4)}, caption="a thing", seed=9)


def test_examples_their_buckets_and_the_plan_go_together(photos: Path, kept: Path) -> None:
    data = prepared(
        settings_of(
            {"path": str(photos), "repeats": 2, "caption_dropout": 0.1},
            {"path": str(kept), "role": "regularization", "weight": 0.5},
        )
    )
    assert [e.key for e in data.examples[:6]] == ["0/a.png", "0/b.png", "0/c.png", "0/d.png", "0/e.png", "1/0.png"]
    assert data.bucket_of[:5] == ((64, 64), (80, 52), (108, 36), (64, 64), (64, 64))
    assert data.caption_dropout == (0.1,) * 5 + (0.0,) * 4
    assert [(e.key, e.bucket) for e in data.plan.entries] == [(e.key, b) for e, b in zip(data.examples, data.bucket_of)]
    assert {(e.role, e.repeats) for e in data.plan.entries} == {("train", 2), ("regularization", 1)}
    assert data.plan.samples_per_epoch == 20
    assert data.captions() == [*(f"a picture of {x}" for x in "abcde"), "a thing", ""]


def test_the_empty_caption_is_only_needed_where_captions_are_dropped(photos: Path) -> None:
    assert "" not in prepared(settings_of({"path": str(photos)})).captions()


def test_the_report_counts_and_names(photos: Path, kept: Path) -> None:
    data = prepared(
        settings_of({"path": str(photos), "repeats": 3}, {"path": str(kept), "role": "regularization"}),
        count_tokens=lambda caption: len(caption),
        token_limit=8,
    )
    report = data.report.to_json()
    assert json.loads(json.dumps(report)) == report
    assert str(photos.parent) not in json.dumps(report)
    assert [(s["folder"], s["role"], s["pictures"], s["samples_per_epoch"]) for s in report["sources"]] == [
        ("photos", "train", 5, 15.0),
        ("kept", "regularization", 4, 15.0),
    ]
    assert report["buckets"] == {"64×64": 7, "80×52": 1, "108×36": 1}
    assert (report["samples_per_epoch"], report["steps_per_epoch"]) == (30, 8)
    assert (report["enlarged"], report["captions"], report["long_captions"]) == (1, 6, 5)
    assert report["largest_crop"] == pytest.approx(0.5 * (1 - 3 * 70 / 300))
    assert report["mean_crop"] == pytest.approx(report["largest_crop"] / 9)  # the others fit
    assert [w for w in report["warnings"] if "tokens" not in w] == [
        "0/c.png: 15% is cut off at each of two sides, from 300×70 to 108×36, "
        "for it is longer than data.buckets.max_aspect 3",
        "0/d.png: it is enlarged 1.07 times, from 60×60 to 64×64",
    ]
    assert "0/a.png: its caption has 14 tokens, of which the model reads 8" in report["warnings"]


def test_too_small_pictures_are_errors_or_skipped(photos: Path) -> None:
    with pytest.raises(InputError, match=r"d\.png: it is too small, 60×60: 64×64 would enlarge it 1\.1 times"):
        prepared(settings_of({"path": str(photos)}, buckets={"resolution": 64, "max_upscale": 1.0}))
    settings = settings_of({"path": str(photos)}, buckets={"resolution": 64, "max_upscale": 1.0}, on_bad_image="skip")
    data = prepared(settings)
    assert len(data.examples) == 4
    assert "0/d.png: it is too small" in data.report.skipped[0]


def test_all_that_is_wrong_in_the_section_is_said_at_once(photos: Path) -> None:
    (photos / "a.txt").unlink()
    settings = settings_of(
        {"path": str(photos), "role": "regularization"}, buckets={"resolution": 66}, cache=str(photos / "cache")
    )
    with pytest.raises(InputError) as error:
        prepared(settings)
    said = ["data.buckets.resolution = 66", "data.cache", 'role = "train"', "a.png: it has no caption"]
    assert [text in problem for text, problem in zip(said, error.value.problems)] == [True] * 4


def test_the_digest_follows_pictures_captions_and_weights(photos: Path) -> None:
    def digest(**source: object) -> str:
        return prepared(settings_of({"path": str(photos), **source})).plan.digest()

    first = digest()
    assert digest() == first
    digests = {first, digest(weight=0.5), digest(caption_dropout=0.1), digest(repeats=2), digest(trigger="sks")}
    (photos / "a.txt").write_text("another")
    digests.add(digest())
    (photos / "b.png").write_bytes((photos / "e.png").read_bytes())
    digests.add(digest())
    assert len(digests) == 7


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"repeats": 0}, "data.sources.0.repeats"),
        ({"repeats": "2"}, "data.sources.0.repeats"),
        ({"caption_dropout": 1.5}, "data.sources.0.caption_dropout"),
        ({"weight": float("nan")}, "data.sources.0.weight"),
        ({"role": "regularisation"}, "data.sources.0.role"),
        ({"repaets": 2}, "Did you mean repeats?"),
    ],
)
def test_wrong_settings_are_named(values: dict[str, object], said: str) -> None:
    with pytest.raises(InputError) as error:
        settings_of({"path": "photos", **values})
    assert said in str(error.value)
