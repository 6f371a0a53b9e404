"""What the data section asks for reaches a real training: seen in its metrics, its validation and its adapter."""

import json
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lorakit.core.errors import InputError
from lorakit.recipe import Recipe
from lorakit.verbs.train import resume, train
from tests.verbs.conftest import write_pictures
from tests.verbs.test_processes import launch

Make = Callable[..., Recipe]


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in found]


def seen(run: Path, epoch: int) -> Counter[str]:
    return Counter(key for line in lines(run) if line["epoch"] == epoch for key in line["samples"])


def adapter(run: Path) -> bytes:
    return (run / "adapter.safetensors").read_bytes()


def test_each_picture_comes_as_often_as_it_should_on_workers_and_ranks_and_after_a_resume(
    make_recipe: Make, tmp_path: Path
) -> None:
    kept = write_pictures(tmp_path / "kept", 3, first=20)
    data = ["data.sources.0.repeats=2", f"data.sources.1.path={kept}", 'data.sources.1.role="regularization"']
    # 14 of each role an epoch make seven steps of a global batch of four
    runs = [
        train(make_recipe("alone", *data, "run.steps=14", "run.save_every=5")).output,
        train(make_recipe("workers", *data, "run.steps=14", "data.workers=2")).output,
    ]
    file = tmp_path / "recipe.toml"
    file.write_text(make_recipe("ranks", *data, "run.steps=14", "run.accumulate=1", "data.workers=1").to_toml())
    done = launch("train", str(file), config="cpu_x2")
    assert done.returncode == 0, done.stderr
    runs.append(tmp_path / "ranks")
    cut = train(make_recipe("cut", *data, "run.steps=5")).output
    runs.append(resume(cut, overrides=["run.steps=14"], allow=["run.steps"]).output)
    for run in runs:
        for epoch in (0, 1):
            counts = seen(run, epoch)
            assert {counts.pop(f"0/{i:02d}.png") for i in range(7)} == {2}
            assert sum(counts.values()) == 14 and max(counts.values()) - min(counts.values()) <= 1
        assert [line["samples"] for line in lines(run)] == [line["samples"] for line in lines(runs[0])]


def test_validation_is_written_and_changes_nothing_else(make_recipe: Make, tmp_path: Path) -> None:
    aside = write_pictures(tmp_path / "aside", 2, first=40)
    # with a law of timesteps and a weighting that the measurement leaves alone, and dropout in the adapter
    how = [
        *("data.validation=0.3", f"data.sources.1.path={aside}", 'data.sources.1.role="validation"'),
        *('objective.timesteps.kind="content"', 'objective.weighting.kind="min_snr"', "adapter.dropout=0.3"),
        'optimizer.schedule.kind="constant"',
    ]
    measured = train(make_recipe("measured", *how, "run.validate_every=2")).output
    quiet = train(make_recipe("quiet", *how, "run.validate_every=0")).output
    assert adapter(measured) == adapter(quiet) and lines(measured) == lines(quiet)
    assert not (quiet / "validation.jsonl").exists()
    found = lines(measured, "validation.jsonl")
    assert [line["step"] for line in found] == [0, 2, 4, 6] and {line["measured"] for line in found} == {"held_out"}
    assert len({line["loss"] for line in found}) == len({line["training"]["loss"] for line in found}) == 4
    for line in found:
        trained = line["training"]
        assert line["samples"] == trained["samples"] == (2 + 2) * 4 and list(trained["by_source"]) == ["0"]
        assert line["loss"] == pytest.approx((line["by_source"]["0"] + line["by_source"]["1"]) / 2)
        for part in (line, trained):
            assert part["loss"] == pytest.approx(sum(part["by_band"].values()) / 4) and len(part["by_band"]) == 4
        assert line["train_minus_validation"] == trained["loss"] - line["loss"]
    assert len(seen(measured, 0)) == 5
    cut = train(make_recipe("cut", *how, "run.validate_every=2", "run.steps=3")).output
    assert [line["step"] for line in lines(cut, "validation.jsonl")] == [0, 2, 3]
    resumed = resume(cut, overrides=["run.steps=6"], allow=["run.steps"]).output
    assert lines(resumed, "validation.jsonl") == found


def test_without_pictures_to_spare_training_pictures_are_measured_and_called_so(make_recipe: Make) -> None:
    run = train(make_recipe("run", "run.validate_every=3", "run.validate_training=4", "run.keep_best=1")).output
    found = lines(run, "validation.jsonl")
    assert [line["step"] for line in found] == [0, 3, 6] and {line["measured"] for line in found} == {"training"}
    assert all(line["samples"] == 4 * 4 and "training" not in line for line in found)
    plain = train(make_recipe("plain")).output
    assert adapter(plain) == adapter(run) and not (plain / "validation.jsonl").exists()


@pytest.mark.parametrize(
    "changed",
    [
        ["data.sources.0.flip=0.5"],
        ["data.sources.0.color_jitter=0.3"],
        ["data.sources.0.trigger=qzx"],
        ["data.buckets.resolution=[32, 48]"],
        ["data.sources.0.crop=random", "data.buckets.max_aspect=1.0"],
        ["data.sources.0.weight=0.5"],
        ["data.sources.0.samples_per_epoch=5"],
        ["data.sources.0.caption_dropout=0.5"],
        ["data.sources.0.suffix=(shiny:1.6)", "data.weighted_tags=true"],
    ],
)
def test_a_setting_that_is_taken_has_an_effect(make_recipe: Make, changed: list[str]) -> None:
    plain = train(make_recipe("plain", "run.steps=3")).output
    other = train(make_recipe("other", "run.steps=3", *changed)).output
    assert [line["loss"] for line in lines(plain)] != [line["loss"] for line in lines(other)]


def test_random_crops_and_an_adapted_text_encoder_need_no_cache(make_recipe: Make, tmp_path: Path) -> None:
    # what is remembered of a look at the model lies in the cache too
    how = ["data.sources.0.crop=random", "adapter.text_encoder.rank=2", "run.steps=4", "run.check_model=false"]
    one = train(make_recipe("one", *how)).output
    assert not list((tmp_path / "cache").glob("entries-*")), "nothing was encoded ahead"
    two = train(make_recipe("two", *how, "data.workers=2")).output
    assert adapter(one) == adapter(two)


def test_without_a_cache_the_numbers_are_those_with_one(make_recipe: Make) -> None:
    cached = train(make_recipe("cached", "run.steps=3")).output
    anew = train(make_recipe("anew", "run.steps=3", "data.cache_latents=false")).output
    for one, other in zip(lines(cached), lines(anew), strict=True):
        assert one["samples"] == other["samples"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_what_a_mask_covers_is_not_learnt(make_recipe: Make, tmp_path: Path) -> None:
    train(make_recipe("plain"))
    for i in range(7):
        Image.new("L", Image.open(tmp_path / "photos" / f"{i:02d}.png").size, 255).save(
            tmp_path / "photos" / f"{i:02d}.mask.png"
        )
    whole = train(make_recipe("whole")).output
    for one, other in zip(lines(tmp_path / "plain"), lines(whole), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5), "a white mask counts everything"
    assert json.loads((whole / "check.json").read_text())["masked"] == 7
    for i in range(7):
        with Image.open(tmp_path / "photos" / f"{i:02d}.mask.png") as white:
            white.paste(0, (0, 0, white.width // 2, white.height))
            white.save(tmp_path / "photos" / f"{i:02d}.mask.png")
    half = train(make_recipe("half")).output
    assert [line["loss"] for line in lines(half)] != [line["loss"] for line in lines(whole)]


def test_tars_and_tables_train_as_folders_do(make_recipe: Make, tmp_path: Path) -> None:
    from datasets import Dataset, Features, Value
    from datasets import Image as Picture

    how = ["run.steps=4", "run.check_model=false"]
    folder = train(make_recipe("folder", *how)).output
    photos = sorted((tmp_path / "photos").glob("*.png"))
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        for photo in photos:
            tar.add(photo, photo.name)
            tar.add(photo.with_suffix(".txt"), photo.stem + ".txt")
    rows = {
        "image": [{"bytes": photo.read_bytes(), "path": None} for photo in photos],
        "text": [photo.with_suffix(".txt").read_text() for photo in photos],
    }
    table = Dataset.from_dict(rows, features=Features({"image": Picture(), "text": Value("string")}))
    table.save_to_disk(str(tmp_path / "saved"))
    table.to_parquet(str(tmp_path / "photos.parquet"))
    disk, parquet, tar_run = (
        train(make_recipe(name, *how, f"data.sources.0.path={tmp_path / path}")).output
        for name, path in (("disk", "saved"), ("parquet", "photos.parquet"), ("tar", "photos.tar"))
    )
    assert adapter(disk) == adapter(parquet), "the same names and bytes are the same training"
    for run in (disk, tar_run):
        assert sorted(seen(run, 0).values()) == sorted(seen(folder, 0).values()) == [1] * 7
    assert len(list((tmp_path / "cache").glob("entries-*"))) == 2, "what the folder's run encoded served them all"


def test_a_source_takes_part_from_its_start_on(make_recipe: Make, tmp_path: Path) -> None:
    late = write_pictures(tmp_path / "late", 4, first=30)
    run = train(make_recipe("run", f"data.sources.1.path={late}", "data.sources.1.start_step=3", "run.steps=9")).output
    keys = [{key[0] for key in line["samples"]} for line in lines(run)]
    # two steps an epoch: the third epoch is the first to begin at step three or later
    assert [("1" in key) for key in keys[:4]] == [False] * 4
    assert seen(run, 2).total() == 11 and {key[0] for key in seen(run, 2)} == {"0", "1"}


def test_a_class_prompt_that_nothing_uses_is_refused(make_recipe: Make) -> None:
    with pytest.raises(InputError, match=r"data\.sources\.0\.class_prompt: .*\"none\" does not use it"):
        train(make_recipe("run", "data.sources.0.class_prompt=a dog"))


def test_emphasis_is_encoded_anew_and_its_marks_are_no_tokens(make_recipe: Make) -> None:
    how = ["data.sources.0.suffix=(abcdef:1.6)", "run.steps=2"]
    plain = train(make_recipe("plain", *how)).output
    weighted = train(make_recipe("weighted", *how, "data.weighted_tags=true")).output
    assert [line["loss"] for line in lines(plain)] != [line["loss"] for line in lines(weighted)]
    long = [json.loads((run / "check.json").read_text())["long_captions"] for run in (plain, weighted)]
    assert long == [7, 0]
