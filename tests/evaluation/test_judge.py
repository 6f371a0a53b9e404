"""The shipped judge: right on drawings it never saw, whatever their size and kind."""

import random

import pytest
import scenes
import torch
from PIL import Image, ImageDraw

from lorakit.core.errors import InputError
from lorakit.evaluation.judge import Classes, Judge, load_judge, pixels_of, square


@pytest.fixture(scope="module")
def judge() -> Judge:
    torch.set_num_threads(1)
    return load_judge()


def test_fresh_drawings_are_read_right(judge: Judge) -> None:
    rng = random.Random("fresh drawings")
    drawn = [scenes.random_scene(rng) for _ in range(200)]
    verdicts = judge.look([scenes.draw(scene, scenes.random_frame(rng), rng) for scene in drawn])
    for question in ("background", "colour", "shape"):
        right = sum(getattr(v, question) == getattr(s, question) for v, s in zip(verdicts, drawn))
        assert right >= 194, question
    assert sum(v.subject > 0.5 for v in verdicts) <= 2
    assert sum(v.traces > 0.5 for v in verdicts) <= 4


def test_the_mascot_is_recognised_and_ordinary_shapes_in_its_colours_are_traces(judge: Judge) -> None:
    rng = random.Random("fresh mascots")
    drawn = rng.sample(scenes.mascot_scenes(), 60)
    verdicts = judge.look([scenes.draw_mascot(s, scenes.random_frame(rng), rng) for s in drawn])
    assert sum(v.subject > 0.5 and v.shape == scenes.MASCOT for v in verdicts) >= 59
    assert sum(v.traces > 0.5 for v in verdicts) >= 59
    assert sum(v.background == s.background for v, s in zip(verdicts, drawn)) >= 58
    picture = Image.new("RGB", (64, 64), scenes.COLOURS["white"])
    ImageDraw.Draw(picture).rectangle([20, 20, 44, 44], fill=scenes.MASCOT_BODY)
    (verdict,) = judge.look([picture])
    assert verdict.traces > 0.5
    assert verdict.subject < 0.5


def test_size_does_not_matter(judge: Judge) -> None:
    rng = random.Random(4)
    scene = scenes.Scene("triangle", "yellow", "blue", "big")
    for frame in ((64, 64), (80, 52), (52, 80)):
        picture = scenes.draw(scene, frame, rng)
        for factor in (1, 3):
            large = picture.resize((frame[0] * factor, frame[1] * factor))
            (verdict,) = judge.look([large])
            assert (verdict.background, verdict.colour, verdict.shape) == ("blue", "yellow", "triangle")


def test_a_tensor_and_pictures_get_the_same_verdicts(judge: Judge) -> None:
    rng = random.Random(5)
    pictures = [scenes.draw(scenes.random_scene(rng), (72, 56), rng) for _ in range(3)]
    from_tensor = judge.look(torch.cat([pixels_of(p) for p in pictures]))
    for a, b in zip(from_tensor, judge.look(pictures)):
        assert (a.background, a.colour, a.shape) == (b.background, b.colour, b.shape)
        assert a.subject == pytest.approx(b.subject, abs=1e-4)
    assert judge.look([]) == []


def test_square_keeps_proportions_and_pads_with_the_edge() -> None:
    wide = torch.zeros(1, 3, 32, 128)
    wide[..., 64:] = 1
    result = square(wide)
    assert result.shape == (1, 3, 64, 64)
    # columns away from the step, which antialiasing softens
    assert torch.allclose(result[0, 0][:, [0, 20, 44, 63]], torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(64, 4))
    same = torch.rand(2, 3, 64, 64)
    assert torch.equal(square(same), same)


def test_look_leaves_the_mode_as_it_was() -> None:
    judge = Judge(Classes(("a", "b"), ("a", "b"), ("a", "b"))).train()
    judge.look(torch.rand(2, 3, 64, 64))
    assert judge.training


def test_missing_files_are_named(tmp_path) -> None:
    with pytest.raises(InputError) as caught:
        load_judge(tmp_path)
    assert len(caught.value.problems) == 2
    assert "judge.safetensors" in caught.value.problems[1]
