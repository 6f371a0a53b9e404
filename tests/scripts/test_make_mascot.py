"""data/mascot: the pictures show what their captions say, and the prompts ask for something else."""

import json
import re
from pathlib import Path

import make_mascot
import pytest
import scenes
from PIL import Image

from lorakit.core.embedded import embedded

FOLDER = embedded("mascot")
PICTURES = sorted(FOLDER.glob("*.png"))


def caption(picture: Path) -> str:
    return picture.with_suffix(".txt").read_text().strip()


def test_sixteen_pictures_of_several_aspect_ratios_with_captions() -> None:
    assert len(PICTURES) == 16
    ratios = set()
    for picture in PICTURES:
        with Image.open(picture) as image:
            ratios.add(round(image.width / image.height, 1))
            assert min(image.size) >= 128
    assert len(ratios) >= 4
    assert len({caption(p) for p in PICTURES}) == 16


@pytest.mark.parametrize("picture", PICTURES, ids=lambda p: p.stem)
def test_the_background_is_the_one_in_the_caption(picture: Path) -> None:
    named = re.search(r"on an? (\w+) background$", caption(picture))
    assert named
    with Image.open(picture) as image:
        shown = image.convert("RGB").getpixel((0, image.height // 2))
    nearest = min(scenes.COLOURS, key=lambda c: sum((a - b) ** 2 for a, b in zip(scenes.COLOURS[c], shown)))
    assert nearest == named[1]


def test_prompts_ask_for_what_was_not_shown() -> None:
    prompts = json.loads((FOLDER / "prompts.json").read_text())
    shown = {caption(p) for p in PICTURES}
    asked = [entry["prompt"] for entry in prompts["subject"]]
    assert len(set(asked)) == 24
    assert not shown & set(asked)
    assert any(make_mascot.UNSEEN_BACKGROUND in prompt for prompt in asked)
    assert not any(make_mascot.UNSEEN_BACKGROUND in c for c in shown)
    for entry in prompts["subject"]:
        assert prompts["trigger"] in entry["prompt"].split()
        assert entry["prompt"].endswith(f" {entry['background']} background")
    old, regularization = [entry["prompt"] for entry in prompts["old"]], prompts["regularization"]
    assert len(set(old)) == 50
    assert len(set(regularization)) == 192
    assert not set(old) & set(regularization)
    for entry in prompts["old"]:
        assert f"{entry['colour']} {entry['shape']}" in entry["prompt"]
        assert entry["prompt"].endswith(f" {entry['background']} background")
    assert not any(prompts["trigger"] in prompt for prompt in [*old, *regularization])


def test_the_script_makes_what_is_committed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["make_mascot.py", "--out", str(tmp_path)])
    make_mascot.main()
    made = {p.name for p in tmp_path.iterdir()}
    # the demo's recipe lies there too, written by hand
    assert made == {p.name for p in FOLDER.iterdir()} - {"recipe.toml"}
    for name in made:
        if name.endswith(".png"):  # the files' bytes depend on the version of zlib
            with Image.open(tmp_path / name) as new, Image.open(FOLDER / name) as old:
                assert new.size == old.size
                difference = [abs(a - b) for a, b in zip(new.tobytes(), old.tobytes())]
                assert sum(difference) / len(difference) < 0.5
        else:
            assert (tmp_path / name).read_text() == (FOLDER / name).read_text()
