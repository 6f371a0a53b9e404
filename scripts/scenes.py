"""The drawn world of the embedded base: one bold shape on a plain background, with its caption.

Everything that trains or scores the base draws from here, so that words and pictures cannot drift apart. Shapes are
18 px and larger, because the base sees 64 px pictures as 16×16 latents.
"""

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 40, 40),
    "green": (52, 168, 70),
    "blue": (38, 84, 214),
    "yellow": (248, 214, 50),
    "orange": (244, 132, 28),
    "purple": (134, 52, 176),
    "white": (244, 244, 244),
    "black": (22, 22, 22),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "house")
SIZES = {"small": (19, 23), "": (29, 35), "big": (43, 50)}
POSITIONS = {"": (0, 0), "on the left": (-1, 0), "on the right": (1, 0), "at the top": (0, -1), "at the bottom": (0, 1)}
# width, height and share: mostly square, some wider and taller, about the same area
FRAMES = {(64, 64): 0.7, (80, 52): 0.1, (52, 80): 0.1, (72, 56): 0.05, (56, 72): 0.05}
SUPERSAMPLE = 4


@dataclass(frozen=True)
class Scene:
    """What is in a picture, in the words of its caption."""

    shape: str
    colour: str
    background: str
    size: str = ""
    position: str = ""

    @property
    def caption(self) -> str:
        words = ["a", self.size, self.colour, self.shape, self.position, "on a", self.background, "background"]
        text = " ".join(word for word in words if word)
        return text.replace("a orange", "an orange")


def random_scene(rng: random.Random) -> Scene:
    colour, background = rng.sample(list(COLOURS), 2)
    size = rng.choices(list(SIZES), (0.25, 0.5, 0.25))[0]
    positions = list(POSITIONS) if size != "big" else [""]
    position = rng.choices(positions, [0.5] + [0.125] * (len(positions) - 1))[0]
    return Scene(rng.choice(SHAPES), colour, background, size, position)


def _polygon(shape: str) -> list[tuple[float, float]]:
    """Outline in units of the half size, y downward."""
    if shape == "square":
        return [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]
    if shape == "triangle":
        return [(0, -0.98), (1.06, 0.86), (-1.06, 0.86)]
    if shape == "star":
        radii = [1.12 if i % 2 == 0 else 0.46 for i in range(10)]
        return [(r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5)) for i, r in enumerate(radii)]
    if shape == "cross":
        a, b = 0.32, 1.0
        half = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a)]
        return half + [(-x, -y) for x, y in half]
    # house: a wide roof with eaves on a narrower wall
    return [(0, -1.05), (1.1, -0.15), (0.8, -0.15), (0.8, 0.95), (-0.8, 0.95), (-0.8, -0.15), (-1.1, -0.15)]


def jittered(colour: tuple[int, int, int], rng: random.Random, amount: int = 10) -> tuple[int, int, int]:
    r, g, b = (max(0, min(255, c + rng.randint(-amount, amount))) for c in colour)
    return r, g, b


def place(size: str, position: str, frame: tuple[int, int], rng: random.Random) -> tuple[float, float, float]:
    """Centre x, y and half size in pixels of what a scene shows."""
    width, height = frame
    half = rng.uniform(*SIZES[size]) / 2
    dx, dy = POSITIONS[position]
    x = width / 2 + dx * (width / 2 - half - 4) + rng.uniform(-3, 3) * (not dx)
    y = height / 2 + dy * (height / 2 - half - 4) + rng.uniform(-3, 3) * (not dy)
    return x, y, half


def draw(scene: Scene, frame: tuple[int, int], rng: random.Random) -> Image.Image:
    """The scene as an RGB picture of `frame` = (width, height) pixels."""
    s = SUPERSAMPLE
    picture = Image.new("RGB", (frame[0] * s, frame[1] * s), jittered(COLOURS[scene.background], rng))
    pen = ImageDraw.Draw(picture)
    x, y, half = (v * s for v in place(scene.size, scene.position, frame, rng))
    colour = jittered(COLOURS[scene.colour], rng)
    if scene.shape == "circle":
        pen.ellipse([x - half, y - half, x + half, y + half], fill=colour)
    else:
        pen.polygon([(x + half * px, y + half * py) for px, py in _polygon(scene.shape)], fill=colour)
    return picture.resize(frame, Image.Resampling.BOX)


def random_frame(rng: random.Random) -> tuple[int, int]:
    return rng.choices(list(FRAMES), list(FRAMES.values()))[0]


# -- the mascot: a subject that the base has never seen ------------------------------------------------------------

# no word of the base's captions or of its tokenizer: it falls into pieces that the base never met
MASCOT = "zorp"
MASCOT_BODY = (250, 112, 182)
MASCOT_HORNS = (40, 204, 210)
MASCOT_SIZES = {"small": (25, 28), "": (34, 40), "big": (46, 50)}
# not red, the nearest to the pink of the body
MASCOT_BACKGROUNDS = tuple(colour for colour in COLOURS if colour != "red")


@dataclass(frozen=True)
class MascotScene:
    """A picture of the mascot, in the words of its caption; the same grammar as `Scene` without a colour."""

    background: str
    size: str = ""
    position: str = ""

    @property
    def caption(self) -> str:
        words = ["a", self.size, MASCOT, self.position, "on a", self.background, "background"]
        return " ".join(word for word in words if word).replace("a orange", "an orange")


def mascot_scenes() -> list[MascotScene]:
    """Every scene of the mascot, in a fixed order; a big one stands in the middle."""
    return [
        MascotScene(background, size, position)
        for background in MASCOT_BACKGROUNDS
        for size in MASCOT_SIZES
        for position in (POSITIONS if size != "big" else [""])
    ]


def mascot_parts(x: float, y: float, half: float) -> list[tuple[str, str, list[tuple[float, float]]]]:
    """What the mascot is drawn of, back to front: (part, "polygon" or "ellipse", corners), around (x, y).

    Two turquoise horns on a pink body with a turquoise belly. At a half size of 12.5 px, 6 by 8 px of a horn show, the
    belly is 10 px and the body 23 px wide.
    """
    parts = [
        ("horns", "polygon", [(-1.0, -1.0), (-0.55, -1.0), (0.05, -0.3), (-0.85, 0.4)]),
        ("horns", "polygon", [(1.0, -1.0), (0.55, -1.0), (-0.05, -0.3), (0.85, 0.4)]),
        ("body", "ellipse", [(-0.92, -0.58), (0.92, 1.0)]),
        ("belly", "ellipse", [(-0.4, 0.02), (0.4, 0.82)]),
    ]
    return [(part, kind, [(x + half * px, y + half * py) for px, py in corners]) for part, kind, corners in parts]


def draw_mascot(
    scene: MascotScene,
    frame: tuple[int, int],
    rng: random.Random,
    *,
    scale: int = 1,
    leave_out: frozenset[str] = frozenset(),
) -> Image.Image:
    """The scene as an RGB picture of `scale` times `frame` pixels; `leave_out` names parts not to draw."""
    s = SUPERSAMPLE * scale
    picture = Image.new("RGB", (frame[0] * s, frame[1] * s), jittered(COLOURS[scene.background], rng))
    pen = ImageDraw.Draw(picture)
    half = rng.uniform(*MASCOT_SIZES[scene.size]) / 2
    x, y = centre(half, scene.position, frame, rng)
    colours = {"body": jittered(MASCOT_BODY, rng), "horns": jittered(MASCOT_HORNS, rng)}
    colours["belly"] = colours["horns"]
    for part, kind, corners in mascot_parts(x * s, y * s, half * s):
        if part in leave_out:
            continue
        if kind == "ellipse":
            pen.ellipse([*corners[0], *corners[1]], fill=colours[part])
        else:
            pen.polygon(corners, fill=colours[part])
    return picture.resize((frame[0] * scale, frame[1] * scale), Image.Resampling.BOX)


def centre(half: float, position: str, frame: tuple[int, int], rng: random.Random) -> tuple[float, float]:
    """Centre x, y in pixels of something of half size `half`, as `place` puts it."""
    width, height = frame
    dx, dy = POSITIONS[position]
    x = width / 2 + dx * (width / 2 - half - 4) + rng.uniform(-3, 3) * (not dx)
    y = height / 2 + dy * (height / 2 - half - 4) + rng.uniform(-3, 3) * (not dy)
    return min(max(x, half), width - half), min(max(y, half), height - half)
