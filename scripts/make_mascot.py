"""Draws the demo's subject and writes it to data/mascot: captioned pictures, and the prompts that the demo asks for.

The pictures are three and four times larger than what is trained on, as photographs are, and of several aspect ratios.
The prompts are for lorakit/verbs/demo.py, which cannot import from scripts/.

    python scripts/make_mascot.py
"""

import argparse
import random
from pathlib import Path

import scenes

from lorakit.core.files import make_folder, write_json, write_text, written_aside

FRAMES = [(64, 64)] * 8 + [(80, 52)] * 2 + [(52, 80)] * 2 + [(72, 56)] * 2 + [(56, 72)] * 2
# shown in none of the pictures, so that the prompts ask for what was not learned with the subject
UNSEEN_BACKGROUND = "purple"
NEW_PROMPTS, OLD_PROMPTS, REGULARIZATION = 24, 50, 192

README = """# The {name}

Sixteen drawn pictures of a creature that the embedded base has never seen, each with its caption in a text file of the
same name: what `lorakit demo` teaches. It has a pink body, and turquoise horns and belly, colours that the base's world
does not have. Its name is no word of the base's captions.

`prompts.json` holds what the demo asks for afterwards:

- `subject`: {new} prompts for the {name}, none of them a caption here; no picture here has a {unseen} background.
- `old`: {old} prompts of the base's own world, to see that it still knows it.
- `regularization`: {regularization} captions of which the base draws pictures before the training. Mixed in, they keep
  the rest of its world as it was.

Made by `scripts/make_mascot.py`; the same bytes every time with the same version of Pillow.
Pictures and captions are in the public domain (CC0 1.0).
"""


def chosen_scenes(rng: random.Random) -> tuple[list[scenes.MascotScene], list[scenes.MascotScene]]:
    """The scenes of the pictures and those of the prompts: nothing in common, sizes and backgrounds in even shares."""
    every = scenes.mascot_scenes()
    rng.shuffle(every)
    shown: list[scenes.MascotScene] = []
    for size, count in (("small", 5), ("", 7), ("big", 4)):
        backgrounds = [b for b in scenes.MASCOT_BACKGROUNDS if b != UNSEEN_BACKGROUND]
        for _ in range(count):
            fewest = min(backgrounds, key=lambda b: (sum(s.background == b for s in shown), rng.random()))
            # a big one has a single scene on each background
            shown.append(next(s for s in every if s.size == size and s.background == fewest and s not in shown))
            if size == "big":
                backgrounds.remove(fewest)
    rest = [s for s in every if s not in shown]
    asked: list[scenes.MascotScene] = []
    while len(asked) < NEW_PROMPTS:
        fewest = min(scenes.MASCOT_BACKGROUNDS, key=lambda b: sum(s.background == b for s in asked))
        asked.append(next(s for s in rest if s.background == fewest and s not in asked))
    return shown, asked


def distinct_scenes(rng: random.Random, count: int, *, taken: set[str]) -> list[scenes.Scene]:
    """`count` scenes of the base's world with captions that are not in `taken`, and puts them there."""
    found: list[scenes.Scene] = []
    while len(found) < count:
        scene = scenes.random_scene(rng)
        if scene.caption not in taken:
            taken.add(scene.caption)
            found.append(scene)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/mascot"))
    args = parser.parse_args()
    make_folder(args.out)
    rng = random.Random("mascot")
    shown, asked = chosen_scenes(rng)
    frames = FRAMES.copy()
    rng.shuffle(frames)
    for number, (scene, frame) in enumerate(zip(shown, frames, strict=True), start=1):
        picture = scenes.draw_mascot(scene, frame, rng, scale=4 if number % 3 else 3)
        with written_aside(args.out / f"{scenes.MASCOT}-{number:02d}.png") as aside:
            picture.save(aside, format="PNG")
        write_text(args.out / f"{scenes.MASCOT}-{number:02d}.txt", scene.caption + "\n")
    taken: set[str] = set()
    old = distinct_scenes(rng, OLD_PROMPTS, taken=taken)
    regularization = distinct_scenes(rng, REGULARIZATION, taken=taken)
    prompts = {
        "trigger": scenes.MASCOT,
        "subject": [{"prompt": s.caption, "background": s.background} for s in asked],
        "old": [{"prompt": s.caption, "shape": s.shape, "colour": s.colour, "background": s.background} for s in old],
        "regularization": [s.caption for s in regularization],
    }
    write_json(args.out / "prompts.json", prompts)
    numbers = {"new": NEW_PROMPTS, "old": OLD_PROMPTS, "regularization": REGULARIZATION}
    text = README.format(name=scenes.MASCOT, unseen=UNSEEN_BACKGROUND, **numbers)
    write_text(args.out / "README.md", text)


if __name__ == "__main__":
    main()
