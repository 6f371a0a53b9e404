"""Training models that are shown a picture, from end to end: the same however it came about; and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lorakit.cli.main import main
from lorakit.core.errors import InputError
from lorakit.families import sd
from lorakit.recipe import Recipe
from lorakit.verbs.check import check
from lorakit.verbs.train import resume, train
from tests.verbs.test_train import assert_same, records, stopped

Make = Callable[..., Recipe]


@pytest.fixture
def overrides(tmp_path: Path) -> list[str]:
    """A recipe's, with what its samples are drawn over."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "room.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    mask.save(tmp_path / "place.png")
    over = [f"sample.image={tmp_path / 'room.png'}", f"sample.mask={tmp_path / 'place.png'}"]
    return [f"model.path={sd.tiny('inpaint').path}", "data.validation=0.2", "run.validate_every=3", *over]


def test_a_stopped_run_goes_on_bit_for_bit(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    whole = train(make_recipe("whole", *overrides, "run.sample_every=3"))
    run = stopped(make_recipe, monkeypatch, "stopped", *overrides, "run.sample_every=3", at=4)
    resume(run)
    assert_same(whole.output, run)
    measured = [
        [{**json.loads(line), "seconds": 0} for line in (of / "validation.jsonl").read_text().splitlines()]
        for of in (whole.output, run)
    ]
    assert measured[0] == measured[1] and len(measured[0]) == 3
    room, drawn = (
        np.asarray(Image.open(path)) for path in (run.parent / "room.png", run / "samples" / "step-000006" / "00.png")
    )
    assert np.array_equal(room[:, 16:], drawn[:, 16:]) and not np.array_equal(room[:, :16], drawn[:, :16])


def test_another_split_of_the_global_batch_trains_on_the_same_numbers(make_recipe: Make, overrides: list[str]) -> None:
    one = train(make_recipe("one", *overrides))
    other = train(make_recipe("other", *overrides, "run.batch_size=1", "run.accumulate=4", "data.workers=1"))
    for a, b in zip(records(one.output), records(other.output), strict=True):
        assert a["samples"] == b["samples"] and a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_the_model_is_shown_mask_and_picture_at_every_prediction(
    make_recipe: Make, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    seen, predict = [], sd.StableDiffusion.predict

    def listen(self: sd.StableDiffusion, *args: Any, beside: Any = None, **kwargs: Any) -> torch.Tensor:
        seen.append(beside)
        return predict(self, *args, beside=beside, **kwargs)

    monkeypatch.setattr(sd.StableDiffusion, "predict", listen)
    train(make_recipe("run", *overrides, "run.steps=3"))
    assert seen.pop() is None  # of the export's verification
    assert all(beside.shape[1] == 5 for beside in seen)
    assert {0.0, 1.0} == set(torch.cat([beside[:, 0].flatten() for beside in seen]).tolist())


def test_the_check_of_the_model_knows_what_it_sees(make_recipe: Make, overrides: list[str]) -> None:
    found = check(make_recipe("run", *overrides), deep=True)
    assert found.unexplained and not found.report.errors


def test_the_base_is_kept_with_the_same_picture_before_it(make_recipe: Make, overrides: list[str]) -> None:
    keep = "objective.preservation={kind='blank_prompt'}"
    lines = records(train(make_recipe("run", *overrides, keep, "run.steps=2")).output)
    assert lines[0]["preservation"] == 0 < lines[1]["preservation"]


def test_what_such_a_model_cannot_do_is_said(make_recipe: Make, overrides: list[str], tmp_path: Path) -> None:
    model = overrides[0]
    cases = [
        ([model], r"sample\.image: sample\.prompts are drawn over a picture by this model.*\n.*sample\.mask: "),
        ([model, overrides[3], f"sample.mask={tmp_path / 'none.png'}"], r"sample\.mask .*none\.png cannot be read"),
        ([overrides[3]], r"sample\.image: this model's samples are drawn without one: remove it"),
        (["data.sources.0.mask_means=repaint"], "the model is not made for inpainting"),
        (
            [*overrides, "data.sources.0.role=regularization", "data.sources.0.generate={prompts=['a']}"],
            "generate: the model draws over pictures alone",
        ),
        (
            [*overrides, "data.sources.0.mask_means=repaint", "objective.preservation={kind='masked_prior'}"],
            "holds what lies outside of masks, and no picture has one",
        ),
    ]
    for given, said in cases:
        with pytest.raises(InputError, match=said):
            train(make_recipe("run", *given))


def test_an_inpainting_model_draws_where_the_mask_is_and_nothing_else(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = str(sd.tiny("inpaint").path), tmp_path / "out"
    arguments = ["sample", base, "--prompt", "thing", "--steps", "2", "--out", str(out)]
    room, place = str(tmp_path / "room.png"), str(tmp_path / "place.png")
    main([*arguments, "--image", room, "--mask", place])
    drawn = np.asarray(Image.open(out / "0000.png"))
    assert drawn.shape == (32, 32, 3) and np.array_equal(drawn[:, 16:], np.asarray(Image.open(room))[:, 16:])
    for missing in ([], ["--image", room]):
        with pytest.raises(SystemExit):
            main([*arguments, *missing])
        assert "paint a part of a picture anew: give --image and --mask" in capsys.readouterr().err
