"""`inspect --timesteps`: shares against the laws' own distribution functions, and a picture that shows them."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lorakit import families
from lorakit.cli.main import main
from lorakit.core.errors import InputError
from lorakit.diffusion import GaussianDiffusion, RectifiedFlow
from lorakit.diffusion.flow import DynamicShift, shift_time
from lorakit.recipe import Recipe
from lorakit.verbs import timesteps as module
from lorakit.verbs.timesteps import chart, emphasis, lines

Make = Callable[..., Recipe]


@pytest.fixture
def with_process(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the tiny model say that it is of another process."""
    describe = families.describe_settings

    def use(process: Any, **changes: Any) -> None:
        monkeypatch.setattr(
            families, "describe_settings", lambda settings: replace(describe(settings), process=process, **changes)
        )

    return use


def doubles(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_uniform_without_a_weighting_is_even(make_recipe: Make) -> None:
    found = emphasis(make_recipe("run"), bins=7)
    assert found.edges == (0, 143, 286, 429, 571, 714, 857, 1000)  # whole steps
    torch.testing.assert_close(doubles(found.drawn), doubles(found.edges).diff() / 1000)
    assert found.counts == pytest.approx(found.drawn)


def test_what_is_drawn_and_what_counts_in_closed_form(make_recipe: Make, with_process: Callable[..., None]) -> None:
    process = GaussianDiffusion(prediction_type="v_prediction")
    with_process(process)
    asked = ('objective.timesteps={kind="logit_normal",mean=0.4}', 'objective.weighting={kind="min_snr"}')
    found = emphasis(make_recipe("run", *asked), bins=1000)
    reached = torch.special.ndtr((torch.arange(1001).double() / 1000).logit() - 0.4)
    torch.testing.assert_close(doubles(found.drawn), reached.diff(), rtol=0, atol=1e-12)
    snr = process.snr(torch.arange(1000))
    weighted = reached.diff() * snr.clamp(max=5) / (snr + 1)
    torch.testing.assert_close(doubles(found.counts), weighted / weighted.sum(), rtol=0, atol=1e-12)
    torch.testing.assert_close(doubles(found.snr), snr[[*range(1000), 999]])


def test_a_flow_at_its_own_shift_for_each_resolution(make_recipe: Make, with_process: Callable[..., None]) -> None:
    flow = RectifiedFlow(dynamic=DynamicShift())
    with_process(flow, side_multiple=16)
    asked = ("data.buckets.resolution=[512,1024]", 'objective.timesteps={kind="uniform",model_shift=true}')
    found = emphasis(make_recipe("run", *asked))
    assert (found.edges[0], found.edges[-1], len(found.drawn)) == (0.0, 1.0, 200)
    below = [
        shift_time(torch.linspace(0, 1, 201, dtype=torch.float64), 1 / flow.shift_at(tokens)) for tokens in (1024, 4096)
    ]
    torch.testing.assert_close(doubles(found.drawn), ((below[0] + below[1]) / 2).diff(), rtol=0, atol=1e-9)
    assert math.isinf(found.snr[0]) and found.snr[-1] == 0
    assert found.law == "uniform (model_shift)"


@pytest.mark.parametrize(("process", "values"), [(GaussianDiffusion(), [0, 999]), (RectifiedFlow(), [0.0, 1.0])])
def test_a_list_at_both_ends(
    make_recipe: Make, with_process: Callable[..., None], process: Any, values: list[float]
) -> None:
    with_process(process)
    found = emphasis(make_recipe("run", f'objective.timesteps={{kind="list",values={values}}}'))
    assert (found.drawn[0], found.drawn[-1]) == pytest.approx((0.5, 0.5))
    assert sum(found.drawn[1:-1]) == pytest.approx(0, abs=1e-12)


def test_a_short_process_has_a_stretch_for_each_step(make_recipe: Make, with_process: Callable[..., None]) -> None:
    with_process(GaussianDiffusion(12, 0.01, 0.3))
    found = emphasis(make_recipe("run"))
    assert found.edges == tuple(range(13)) and found.drawn == pytest.approx([1 / 12] * 12)
    assert len(list(lines(found))) == 5 + 12


def test_what_says_nothing_for_the_model_is_refused(make_recipe: Make) -> None:
    with pytest.raises(InputError, match="model_shift: this model has no shift"):
        emphasis(make_recipe("run", 'objective.timesteps={kind="uniform",model_shift=true}'))


def test_the_bars_and_the_picture_show_the_shares(make_recipe: Make) -> None:
    found = emphasis(make_recipe("run", 'objective.timesteps={kind="uniform",min=0.25,max=0.75}'))
    *head, first, second = list(lines(found, solid="#"))[:7]
    assert head[1] == "timesteps   uniform (min 0.25, max 0.75)"
    assert "#" not in first + second
    middle = list(lines(found, solid="#"))[5 + 10]
    assert middle.split()[:3] == ["500", "…", "549"] and middle.count("10.0%") == 2 and middle.count("#") == 48
    picture = chart(found, title="x")
    # half of the field's width is filled, to the height 2
    row = [picture.getpixel((x, picture.height - 120)) for x in range(picture.width)]
    filled = sum(pixel == module._DRAWN for pixel in row)
    assert filled == pytest.approx((module._WIDTH - module._LEFT - module._RIGHT) / 4, abs=8)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[[data.sources]]\npath = "photos"\n')  # which need not be there
    out = tmp_path / "t.png"
    main(["inspect", "--timesteps", str(recipe), "objective.timesteps.kind=style", "--out", str(out)])
    text = capsys.readouterr().out
    assert "timesteps   style" in text and "weighting   none" in text and text.endswith(f"Written: {out}\n")
    with Image.open(out) as picture:
        assert picture.size == (1000, 560) and len(picture.getcolors(10**6) or []) > 100
    main(["inspect", str(recipe), "--timesteps", "--json"])
    assert sum(json.loads(capsys.readouterr().out)["drawn"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{recipe}", "--timesteps", "--out", "x.jpg"], "--out x.jpg: the picture is a PNG"),
        (
            ["{recipe}", "--timesteps", "objective.timesteps.kind=norm"],
            "objective.timesteps.kind = 'norm' is not known",
        ),
        (["{missing}", "--timesteps"], "does not exist"),
        (["x.safetensors", "run.steps=3"], "goes with --timesteps"),
    ],
)
def test_wrong_input_is_one_message(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[[data.sources]]\npath = "photos"\n')
    named = [word.format(recipe=recipe, missing=tmp_path / "none.toml") for word in words]
    with pytest.raises(SystemExit) as ended:
        main(["inspect", *named])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and said in error and error.count("error: ") == 1
