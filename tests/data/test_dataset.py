import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lorakit.core.errors import InputError
from lorakit.core.seeding import generator
from lorakit.core.settings import validate
from lorakit.data.dataset import Dataset, DataSettings, Survey, survey
from tests.data.pictures import folder_of


def settings_of(*sources: dict[str, object], **data: object) -> DataSettings:
    buckets = data.pop("buckets", {"resolution": 64})
    return validate(DataSettings, {"sources": list(sources), "buckets": buckets, **data}, where="data", name="data")


def surveyed(settings: DataSettings, **changes: object) -> Survey:
    arguments = {"side_multiple": 4, "seed": 0, "global_batch": 4, **changes}
    return survey(settings, **arguments)


def prepared(settings: DataSettings, **changes: object) -> Dataset:
    return surveyed(settings, **changes).usable()


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
    assert [data.buckets_of(i) for i in range(5)] == [((w, h),) for w, h in [(64, 64), (80, 52), (108, 36)]] + [
        ((64, 64),)
    ] * 2
    assert data.source_of(5).weight == 0.5
    assert data.plan.samples_per_epoch == 20
    assert list(data.all_captions()) == ["", *(f"a picture of {x}" for x in "abcde"), *["a thing"] * 4]


def test_the_empty_caption_is_only_needed_where_captions_are_dropped(photos: Path) -> None:
    assert "" not in prepared(settings_of({"path": str(photos)})).all_captions()


def test_the_report_counts_and_names(photos: Path, kept: Path) -> None:
    found = surveyed(
        settings_of({"path": str(photos), "repeats": 3}, {"path": str(kept), "role": "regularization"}),
        count_tokens=lambda caption: len(caption),
        token_limit=8,
    )
    report = found.report.to_json()
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
        "0/c.png: 30% of its width is cut off, from 300×70 to 108×36, for it is longer than data.buckets.max_aspect 3",
        "0/d.png: it is enlarged 1.07 times, from 60×60 to 64×64",
    ]
    assert "0/a.png: its caption has 14 tokens, of which the model reads 8" in report["warnings"]


def test_too_small_pictures_are_errors_or_skipped(photos: Path) -> None:
    with pytest.raises(InputError, match=r"d\.png: it is too small, 60×60: 64×64 would enlarge it 1\.1 times"):
        prepared(settings_of({"path": str(photos)}, buckets={"resolution": 64, "max_upscale": 1.0}))
    skipping = settings_of({"path": str(photos)}, buckets={"resolution": 64, "max_upscale": 1.0}, on_bad_image="skip")
    found = surveyed(skipping)
    assert len(found.usable().examples) == 4
    assert "0/d.png: it is too small" in found.report.skipped[0]


def test_all_that_is_wrong_in_the_section_is_said_at_once(photos: Path) -> None:
    (photos / "a.txt").unlink()
    wrong = settings_of(
        {"path": str(photos), "role": "regularization"}, buckets={"resolution": 66}, cache=str(photos / "cache")
    )
    with pytest.raises(InputError) as error:
        prepared(wrong)
    said = ["data.buckets.resolution = 66", "data.cache", 'role = "train"', "a.png: it has no caption"]
    assert [text in problem for text, problem in zip(said, error.value.problems)] == [True] * 4


def test_the_digest_follows_pictures_captions_and_how_they_take_part(photos: Path) -> None:
    def digest(**source: object) -> str:
        return prepared(settings_of({"path": str(photos), **source})).plan.digest()

    first = digest()
    assert digest() == first
    digests = {first, digest(repeats=2), digest(end_step=9, start_step=0), digest(samples_per_epoch=5)}
    (photos / "a.txt").write_text("another")
    digests.add(digest())
    (photos / "b.png").write_bytes((photos / "e.png").read_bytes())
    digests.add(digest())
    for value in (255, 128):
        Image.new("L", (64, 64), value).save(photos / "a.mask.png")
        digests.add(digest())
    assert len(digests) == 8


def test_every_cut_that_may_be_drawn_is_encoded(photos: Path) -> None:
    source = {"path": str(photos), "flip": 0.5, "color_jitter": 0.1, "jitter_variants": 3}
    data = prepared(settings_of(source, buckets={"resolution": [32, 64]}))
    keys = {key for key, _, _ in data.all_latents(fingerprint="x")}
    assert len(data.all_latents(fingerprint="x")) == len(keys) == 5 * 2 * 2 * 3
    for index in range(5):
        assert len(data.buckets_of(index)) == 2
        for n in range(20):
            for bucket in data.buckets_of(index):
                cut = data.draw_cut(index, bucket, draw=generator("test", n))
                assert data.latent_key(index, cut, fingerprint="x") in keys
    _, name, (index, cut) = data.all_latents(fingerprint="x")[-1]
    assert (name, index) == ("0/e.png", 4) and data.prepare((index, cut)).pixels.shape == (3, 64, 64)


def test_every_caption_that_may_be_drawn_is_encoded(photos: Path) -> None:
    (photos / "a.txt").write_text("red, green, blue\none, two\n")
    data = prepared(settings_of({"path": str(photos), "shuffle_tags": True, "caption_dropout": 0.3, "trigger": "qzx"}))
    there = set(data.all_captions())
    drawn = {data.draw_caption(0, draw=generator(n), from_variants=True) for n in range(200)}
    assert drawn <= there and "" in drawn and drawn > {""}
    assert all(caption.startswith("qzx ") for caption in drawn - {""})


def test_a_file_that_changed_is_named_when_it_is_read(photos: Path) -> None:
    data = prepared(settings_of({"path": str(photos)}))
    (photos / "c.png").write_bytes((photos / "a.png").read_bytes())
    with pytest.raises(InputError, match=r"0/c\.png: it was changed"):
        data.picture(2, data.cuts_of(2)[0])
    (photos / "c.png").unlink()
    with pytest.raises(InputError, match=r"0/c\.png: it cannot be read any more"):
        data.read(2)


@given(count=st.integers(2, 12), fraction=st.floats(0.01, 0.99), seed=st.integers(0, 3))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_split_is_disjoint_for_every_size_and_fraction(
    tmp_path_factory: pytest.TempPathFactory, count: int, fraction: float, seed: int
) -> None:
    folder = folder_of(tmp_path_factory.mktemp("split"), {f"{i}.png": (16, 16) for i in range(count)})
    (folder / "twin.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "twin.txt").write_text("the same")
    data = prepared(
        settings_of({"path": str(folder)}, buckets={"resolution": 16}, validation=fraction), seed=seed, global_batch=1
    )
    held_out = {data.examples[i].digest for i in data.validation()}
    steps = range(data.plan.steps_per_epoch)
    trained = {data.examples[i].digest for step in steps for i in data.plan.at(step).entries}
    assert held_out and trained and not held_out & trained
    assert len(held_out | trained) == count


def test_validation_by_folder_may_not_hold_what_is_trained_on(photos: Path, kept: Path) -> None:
    sources = [{"path": str(photos)}, {"path": str(kept), "role": "validation"}]
    data = prepared(settings_of(*sources))
    assert [data.examples[i].key for i in data.validation()] == [f"1/{i}.png" for i in range(4)]
    assert data.plan.samples_per_epoch == 5
    (kept / "0.png").write_bytes((photos / "b.png").read_bytes())
    with pytest.raises(InputError, match=r"1/0\.png: it is for validation, and the same file as 0/b\.png"):
        prepared(settings_of(*sources))


def test_a_gap_in_the_sources_is_said_before_training(photos: Path) -> None:
    settings_ = settings_of({"path": str(photos), "end_step": 4})
    assert prepared(settings_, steps=4).plan.gap() == 4
    with pytest.raises(InputError, match="from step 4 on no source is left"):
        prepared(settings_, steps=5)


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


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"keep_tags": 2}, "data.sources.0: keep_tags has no effect without shuffle_tags"),
        ({"never_drop": ["a*"]}, "data.sources.0: never_drop has no effect without tag_dropout"),
        ({"drop_tags": ["a*"], "shuffle_tags": True}, "data.sources.0: drop_tags has no effect"),
        ({"jitter_variants": 8}, "data.sources.0: jitter_variants has no effect without color_jitter"),
        ({"mask": "alpha", "background": "#000000"}, "data.sources.0: background has no effect"),
        ({"mask": "none", "mask_floor": 0.1}, "data.sources.0: mask_floor has no effect"),
        ({"role": "validation", "flip": 0.5}, "data.sources.0: flip has no effect on a validation source"),
    ],
)
def test_settings_without_effect_are_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(InputError) as error:
        settings_of({"path": "photos", **values})
    assert str(error.value).startswith(said)


def test_settings_with_effect_are_taken() -> None:
    settings_of({"path": "p", "keep_tags": 2, "shuffle_tags": True})
    settings_of({"path": "p", "never_drop": ["a*"], "drop_tags": ["b*"], "tag_dropout": 0.1, "keep_tags": 1})
    settings_of({"path": "p", "jitter_variants": 8, "color_jitter": 0.1, "mask_path": "masks"})


def test_a_mask_that_leaves_nothing_is_named_before_anything_is_learnt(photos: Path) -> None:
    mask = Image.new("L", (300, 70))
    mask.paste(255, (280, 0, 300, 70))
    mask.save(photos / "c.mask.png")
    found = surveyed(settings_of({"path": str(photos)}))
    assert any(text.startswith("0/c.png: the middle of its mask") for text in found.report.warnings)
    data = found.usable()
    with pytest.raises(InputError, match=r"0/c\.png: its mask leaves nothing"):
        data.picture(2, data.cuts_of(2)[0])
    for mended in ({"crop": "focus"}, {"mask_floor": 0.1}, {"crop": "random"}, {"mask": "none"}):
        data = prepared(settings_of({"path": str(photos), **mended}))
        data.picture(2, data.cuts_of(2)[0])


def test_a_source_whose_turn_never_comes_is_named(photos: Path, kept: Path) -> None:
    sources = settings_of({"path": str(photos)}, {"path": str(kept), "start_step": 3})
    # two steps an epoch: one begins at step 4
    for steps, said in ((4, True), (5, False)):
        warnings = surveyed(sources, steps=steps).report.warnings
        assert any(text.startswith("data.sources.1: it never takes part") for text in warnings) == said
