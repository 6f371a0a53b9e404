"""Training models that edit a picture, from end to end: the same however it came about; and what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorakit.cli.main import main
from lorakit.core.errors import InputError
from lorakit.families import sd
from lorakit.recipe import Recipe
from lorakit.verbs.check import check
from lorakit.verbs.train import resume, train
from tests.verbs.conftest import write_pictures
from tests.verbs.test_train import assert_same, records, stopped

Make = Callable[..., Recipe]


@pytest.fixture
def overrides(tmp_path: Path) -> list[str]:
    """A recipe's, with the pictures that its own are made of: their left halves are painted over."""
    before, photos = tmp_path / "before", write_pictures(tmp_path / "photos", 7)
    before.mkdir()
    for path in photos.glob("*.png"):
        picture = Image.open(path)
        picture.paste((0, 0, 0), (0, 0, picture.width // 2, picture.height))
        picture.save(before / path.name)
    pairs = [f"data.sources.0.input_path={before}", "data.sources.0.conditioning_dropout=0.2"]
    over = [f"sample.image={before / '00.png'}", "data.validation=0.2", "run.validate_every=3"]
    return [f"model.path={sd.tiny('edit').path}", *pairs, *over]


def test_a_stopped_run_goes_on_bit_for_bit(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    whole = train(make_recipe("whole", *overrides, "run.sample_every=3"))
    run = stopped(make_recipe, monkeypatch, "stopped", *overrides, "run.sample_every=3", at=4)
    resume(run)
    assert_same(whole.output, run)
    pictures = [Image.open(of / "samples" / "step-000006" / "00.png") for of in (whole.output, run)]
    assert pictures[0].size == (32, 32) and pictures[0].tobytes() == pictures[1].tobytes()


def test_neither_split_nor_cache_changes_what_is_trained_on(make_recipe: Make, overrides: list[str]) -> None:
    one = records(train(make_recipe("one", *overrides)).output)
    for change in (["run.batch_size=1", "run.accumulate=4", "data.workers=1"], ["data.cache_latents=false"]):
        other = records(train(make_recipe(f"other-{len(change)}", *overrides, *change)).output)
        for a, b in zip(one, other, strict=True):
            assert a["samples"] == b["samples"] and a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_the_picture_to_begin_with_is_part_of_what_is_learnt(
    make_recipe: Make, overrides: list[str], tmp_path: Path
) -> None:
    one = records(train(make_recipe("one", *overrides)).output)
    for path in (tmp_path / "before").glob("*.png"):
        Image.new("RGB", Image.open(path).size, (0, 0, 255)).save(path)
    other = records(train(make_recipe("other", *overrides)).output)
    assert all(a["samples"] == b["samples"] and a["loss"] != b["loss"] for a, b in zip(one, other, strict=True))


def test_the_check_of_the_model_knows_what_it_sees(make_recipe: Make, overrides: list[str]) -> None:
    found = check(make_recipe("run", *overrides), deep=True)
    assert found.unexplained and not found.report.errors


def test_what_such_a_model_cannot_do_is_said(make_recipe: Make, overrides: list[str]) -> None:
    model, pairs, dropout, image = overrides[:4]
    cases = [
        ([model, image], r"input_path: the model edits pictures: name the folder of those that it begins with"),
        ([model, pairs], r"sample\.image: sample\.prompts are drawn over a picture by this model: name one"),
        ([model, pairs, image, f"sample.mask={image[13:]}"], r"sample\.mask: this model's samples are drawn without"),
        (["sample.image_guidance=2.0"], r"sample\.image_guidance: the model does not edit pictures: remove it"),
        ([pairs, dropout], r"data\.sources\.0\.input_path: the model does not edit pictures: remove it"),
    ]
    for given, said in cases:
        with pytest.raises(InputError, match=said):
            train(make_recipe("run", *given))


def test_a_changed_picture_to_begin_with_ends_a_resume(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch, overrides: list[str], tmp_path: Path
) -> None:
    run = stopped(make_recipe, monkeypatch, "stopped", *overrides, at=4)
    Image.new("RGB", (64, 64)).save(tmp_path / "before" / "03.png")
    with pytest.raises(InputError, match=r"0/03\.png has changed"):
        resume(run)


def test_an_editing_model_draws_from_a_picture_and_nothing_else(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = str(sd.tiny("edit").path), tmp_path / "out"
    arguments = ["sample", base, "--prompt", "thing", "--steps", "2", "--out", str(out)]
    room, other = (str(tmp_path / "before" / name) for name in ("00.png", "03.png"))
    for image in (room, other):
        main([*arguments, "--image", image])
    main([*arguments, "--image", room, "--image-guidance", "4"])
    drawn = [np.asarray(Image.open(out / f"000{i}.png")) for i in range(3)]
    assert drawn[0].shape == drawn[1].shape == (64, 64, 3)
    assert not np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
    for wrong in ([], ["--image", room, "--mask", room], ["--image", room, "--strength", "0.5"]):
        with pytest.raises(SystemExit):
            main([*arguments, *wrong])
        assert "edit a picture: give --image, and neither --mask nor --strength" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--image", room, "--image-guidance", "0.5"])
    assert "--image-guidance 0.5: it is for models that edit pictures, a number from 1 on" in capsys.readouterr().err
