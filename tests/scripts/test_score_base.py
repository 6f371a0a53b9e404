"""The scoring script: what it counts as right, its card and pictures. The base itself is scored by running it."""

import random

import base_card
import scenes
import score_base
from PIL import Image

from lorakit.evaluation.judge import Verdict


def drawn(colour: str = "red", shape: str = "circle", background: str = "blue") -> score_base.Drawn:
    scene = scenes.Scene("circle", "red", "blue")
    return score_base.Drawn(scene, Image.new("RGB", (72, 56)), Verdict(background, colour, shape, 0.0, 0.0))


def test_scores_count_each_question_and_all_three() -> None:
    pictures = [drawn(), drawn(colour="green"), drawn(shape="star"), drawn(shape="star", background="white")]
    assert score_base.scores_of(pictures) == {"background": 0.75, "colour": 0.75, "shape": 0.5, "all": 0.25}


def test_the_same_prompts_every_time_in_sides_that_the_stock_pipeline_takes() -> None:
    first, second = (score_base.asked_scenes(200, "score") for _ in range(2))
    assert first == second
    assert first != score_base.asked_scenes(200, "sweep")
    assert all(side % 8 == 0 for _, frame in first for side in frame)
    assert {scene.shape for scene, _ in first} == set(scenes.SHAPES)


def test_grid_has_a_place_for_every_picture_and_marks_what_is_wrong() -> None:
    tiles = score_base.tiles([drawn(), drawn(shape="star")])
    assert [tile.wrong for tile in tiles] == ["", "red star on blue"]
    right, wrong = (base_card.grid([tile]) for tile in tiles)
    assert right.size == wrong.size
    reds = [sum(p[0] > 150 and p[1] < 60 for _, p in sheet.getcolors(1 << 20)) for sheet in (right, wrong)]
    assert reds[0] == 0 < reds[1]


def test_curve_falls_where_the_loss_falls() -> None:
    rng = random.Random(0)
    log = [{"stage": "unet", "step": 50 * i, "loss": 2 / (i + 1) * rng.uniform(0.95, 1.05)} for i in range(1, 41)]
    sheet = base_card.curve(log)
    blue = [(x, y) for x in range(sheet.width) for y in range(sheet.height) if sheet.getpixel((x, y)) == (38, 84, 214)]
    left, right = min(blue), max(blue)
    assert right[0] - left[0] > 0.8 * sheet.width
    assert right[1] > left[1] + 100
    assert base_card.curve([]).size == sheet.size
