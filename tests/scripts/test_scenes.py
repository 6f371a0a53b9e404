"""Captions and drawings of the embedded base's world agree with each other and stay what they were."""

import hashlib
import random
import re

import pytest
import scenes

GRAMMAR = re.compile(
    r"an? (small |big )?(?P<thing>(\w+ )?\w+)( on the left| on the right| at the top| at the bottom)?"
    r" on an? (?P<background>\w+) background"
)


def test_captions_follow_the_grammar_and_say_what_is_drawn() -> None:
    rng = random.Random(1)
    for _ in range(300):
        scene = scenes.random_scene(rng)
        match = GRAMMAR.fullmatch(scene.caption)
        assert match, scene.caption
        assert match["thing"] == f"{scene.colour} {scene.shape}"
        assert match["background"] == scene.background
        assert scene.colour != scene.background
        assert not re.search(r"\ba o", scene.caption)


def test_caption_examples() -> None:
    assert scenes.Scene("circle", "red", "blue").caption == "a red circle on a blue background"
    house = scenes.Scene("house", "green", "white", "small", "on the left")
    assert house.caption == "a small green house on the left on a white background"
    assert scenes.Scene("star", "orange", "orange").caption == "an orange star on an orange background"
    assert scenes.MascotScene("blue").caption == "a zorp on a blue background"
    small = scenes.MascotScene("orange", "small", "on the left")
    assert small.caption == "a small zorp on the left on an orange background"


def test_mascot_captions_are_all_different_and_follow_the_grammar() -> None:
    captions = [scene.caption for scene in scenes.mascot_scenes()]
    assert len(set(captions)) == len(captions) > 60
    assert all(GRAMMAR.fullmatch(c) and scenes.MASCOT in c.split() for c in captions)


@pytest.mark.parametrize("frame", list(scenes.FRAMES))
def test_shapes_and_mascots_stay_within_the_picture_on_their_background(frame: tuple[int, int]) -> None:
    rng = random.Random(2)
    for size in scenes.SIZES:
        for position in scenes.POSITIONS if size != "big" else [""]:
            shape = scenes.draw(scenes.Scene("square", "red", "blue", size, position), frame, rng)
            creature = scenes.draw_mascot(scenes.MascotScene("blue", size, position), frame, rng)
            for picture in (shape, creature):
                assert picture.size == frame
                # every corner shows the background, jittered by at most 10 a channel
                width, height = frame
                for corner in ((0, 0), (width - 1, 0), (0, height - 1), (width - 1, height - 1)):
                    near = zip(picture.getpixel(corner), scenes.COLOURS["blue"], strict=True)
                    assert all(abs(a - b) <= 10 for a, b in near), (size, position)


def test_a_mascot_scaled_up_is_the_same_drawing() -> None:
    scene = scenes.MascotScene("white", "", "at the top")
    small = scenes.draw_mascot(scene, (72, 56), random.Random(3))
    large = scenes.draw_mascot(scene, (72, 56), random.Random(3), scale=4)
    assert large.size == (288, 224)
    difference = [abs(a - b) for a, b in zip(small.tobytes(), large.reduce(4).tobytes())]
    assert sum(difference) / len(difference) < 1


def test_the_drawings_that_the_base_was_trained_on_have_not_changed() -> None:
    rng = random.Random(0)
    digest = hashlib.sha256()
    for _ in range(20):
        scene, frame = scenes.random_scene(rng), scenes.random_frame(rng)
        digest.update(scene.caption.encode())
        picture = scenes.draw(scene, frame, rng)
        # corners and the middle, which do not depend on how Pillow rounds an edge
        for x, y in ((0, 0), (frame[0] - 1, 0), (frame[0] // 2, frame[1] // 2)):
            digest.update(bytes(picture.getpixel((x, y))))
    assert digest.hexdigest() == "032775a3b5fb88082474f7890a7c96a84feb5d54fb11042400c9507e9b76c810"
