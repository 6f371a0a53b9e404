"""Pictures at fixed seeds: each its own, none dependent on its neighbours."""

import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lorakit.families import pixart, sd, sdxl
from lorakit.sampling.pictures import Abandoned, Request, SampleSettings, draw, label, requests


def test_a_picture_does_not_depend_on_its_neighbours() -> None:
    pipeline = sd.tiny().stock_pipeline()
    wanted = [Request("a", 1, width=32, height=32), Request("b", 2, width=40, height=24)]
    both = draw(pipeline, wanted, steps=2, guidance=3.0)
    alone = draw(pipeline, wanted[1:], steps=2, guidance=3.0)
    assert both[1].size == (40, 24)
    assert np.array_equal(np.asarray(both[1]), np.asarray(alone[0]))


def test_seed_prompt_and_negative_prompt_matter() -> None:
    pipeline = sd.tiny().stock_pipeline()

    def pixels(request: Request) -> bytes:
        return draw(pipeline, [request], steps=2, guidance=3.0)[0].tobytes()

    plain = pixels(Request("a", 1))
    assert pixels(Request("a", 1)) == plain
    others = [Request("b", 1), Request("a", 2), Request("a", 1, negative_prompt="c")]
    assert all(pixels(other) != plain for other in others)


@pytest.mark.parametrize("family", [sd, sdxl, pixart])
def test_a_side_that_is_not_given_is_the_models_own(family: Any) -> None:
    model = family.tiny()
    pipeline, given = model.live_pipeline(), model.drawing_multiple * 3

    def size(**sides: int) -> tuple[int, int]:
        return draw(pipeline, [Request("a", 1, **sides)], steps=2, guidance=1.0)[0].size

    own = size()
    assert given not in own
    assert size(width=given) == (given, own[1])
    assert size(height=given) == (own[0], given)


def test_each_prompt_takes_the_next_seed() -> None:
    made = requests(SampleSettings(prompts=["a", "b"], seed=5, negative_prompt="n", width=64, height=32))
    assert made == [Request("a", 5, "n", 64, 32), Request("b", 6, "n", 64, 32)]


def test_drawing_is_given_up_between_denoising_steps_and_between_pictures() -> None:
    pipeline = sd.tiny().stock_pipeline()
    asked = []

    def abandon() -> bool:
        asked.append(1)
        return len(asked) == 4

    with pytest.raises(Abandoned):
        draw(pipeline, [Request("a", 1, width=32, height=32)] * 2, steps=5, guidance=3.0, abandon=abandon)
    assert len(asked) == 4, "before the picture and after each of three steps"


def test_a_pipeline_that_has_no_way_to_ask_is_asked_between_pictures() -> None:
    class Result:
        images = ["picture"]

    drawn = []

    def plain(
        prompt: str,
        negative_prompt: Any,
        num_inference_steps: int,
        guidance_scale: float,
        width: Any,
        height: Any,
        generator: Any,
    ) -> Result:
        drawn.append(prompt)
        return Result()

    wanted = [Request("a", 1), Request("b", 2)]
    with pytest.raises(Abandoned):
        draw(plain, wanted, steps=5, guidance=3.0, abandon=lambda: bool(drawn))
    assert drawn == ["a"]


def noise(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def test_a_picture_drawn_over_has_its_size_and_follows_it_and_the_strength() -> None:
    pipeline = sd.tiny().live_pipeline("image")

    def pixels(image: Image.Image, strength: float) -> np.ndarray:
        request = Request("a", 1, image=image, strength=strength)
        return np.asarray(draw(pipeline, [request], steps=4, guidance=3.0)[0])

    first = pixels(noise(0), 0.5)
    assert first.shape == (32, 40, 3)
    assert not np.array_equal(pixels(noise(1), 0.5), first)
    assert not np.array_equal(pixels(noise(0), 0.75), first)


def test_what_is_not_masked_stays_to_the_pixel() -> None:
    mask = Image.new("L", (40, 32))
    mask.paste(255, (0, 0, 20, 32))
    request = Request("a", 1, width=40, height=32, image=noise(0), mask=mask)
    got = np.asarray(draw(sd.tiny().live_pipeline("inpaint"), [request], steps=2, guidance=3.0)[0])
    before = np.asarray(noise(0))
    assert np.array_equal(got[:, 20:], before[:, 20:])
    assert not np.array_equal(got[:, :20], before[:, :20])


def test_a_label_is_read_back_from_the_file() -> None:
    picture, file = noise(0), io.BytesIO()
    request = Request("ein K\u00e4se \udc80", 7, "n", image=noise(0), strength=0.5)
    picture.save(file, format="PNG", pnginfo=label(request, picture, steps=3, adapters=[{"file": "a", "weight": 0.5}]))
    assert json.loads(Image.open(file).text["lorakit"]) == {  # type: ignore[attr-defined]
        "prompt": request.prompt,
        "negative_prompt": "n",
        "seed": 7,
        "width": 40,
        "height": 32,
        "strength": 0.5,
        "steps": 3,
        "adapters": [{"file": "a", "weight": 0.5}],
    }
