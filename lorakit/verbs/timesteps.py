"""Which timesteps a recipe trains, and how much each counts: as numbers, as bars for a terminal, as a picture.

Nothing is drawn: the law's distribution function is asked. Of the model only the configuration is read. The laws
themselves are in `diffusion/timesteps.py`, the weights in `diffusion/weightings.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from lorakit import families
from lorakit.core.errors import InputError
from lorakit.core.settings import Settings
from lorakit.diffusion import RectifiedFlow
from lorakit.diffusion.objectives import OBJECTIVES
from lorakit.diffusion.timesteps import Law, law
from lorakit.diffusion.weightings import weighting
from lorakit.recipe import Recipe

FINE = 2000  # stretches that a flow's time is taken in; other processes have steps
BINS, BARS = 200, 20  # of the picture, of a terminal

_Colour = tuple[int, int, int]
_GROUND, _TEXT, _QUIET, _RULE = (24, 26, 31), (236, 237, 240), (154, 161, 173), (52, 56, 65)
_DRAWN, _COUNTS = (70, 110, 168), (255, 184, 28)
# pixels of the whole and of the margins; halved in the end, for Pillow's lines have no smooth edges
_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 2000, 1120, 144, 248, 72, 168


@dataclass(frozen=True)
class Emphasis:
    """What a recipe makes of the stretches of t between `edges` (N + 1), which are in the model's unit.

    `drawn` (N,) is the share of samples in each, `counts` (N,) the share of the loss that they would have if every t
    were equally hard; `snr` (N + 1,) the signal-to-noise ratio at the edges.
    """

    law: str
    weighting: str
    model: str
    edges: tuple[float, ...]
    drawn: tuple[float, ...]
    counts: tuple[float, ...]
    snr: tuple[float, ...]


def emphasis(recipe: Recipe, *, bins: int = BINS) -> Emphasis:
    """What `recipe` makes of its model's timesteps; `bins` at most.

    Raises InputError for a model that cannot be read, and where the objective says nothing for it.
    """
    description, objective = families.describe_settings(recipe.model), recipe.objective
    process = description.process
    if problems := OBJECTIVES.module(objective.kind).problems(objective, process):
        raise InputError(problems)
    timesteps, weigh = law(objective.timesteps, process), weighting(objective.weighting, process)
    # a shift may go by the number of patches; a picture's sides are multiples of one
    patch = process.dynamic.patch if isinstance(process, RectifiedFlow) and process.dynamic else 1
    sides = [side // description.side_multiple * patch for side in recipe.data.buckets.resolutions]
    flow = process.prediction_type == "flow"
    edges = torch.linspace(0, 1, FINE + 1, dtype=torch.float64) if flow else torch.arange(process.timesteps + 1)
    inside = (edges[1:] + edges[:-1]) / 2 if flow else edges[:-1]
    drawn = torch.stack([_reached(timesteps, edges, (side, side)) for side in sides]).mean(0).diff()
    counts = drawn if weigh is None else drawn * weigh(inside)
    # summed up to the stretches that are shown
    shown = torch.linspace(0, len(drawn), min(bins, len(drawn)) + 1).round().long()
    shares = [F.pad(x.cumsum(0) / x.sum(), (1, 0))[shown].diff().tolist() for x in (drawn, counts)]
    return Emphasis(
        law=_told(objective.timesteps),
        weighting=_told(objective.weighting),
        model=f"{process.prediction_type}, t in {'0 … 1' if flow else f'0 … {process.timesteps - 1}'}",
        edges=tuple(edges[shown].tolist()),
        drawn=tuple(shares[0]),
        counts=tuple(shares[1]),
        snr=tuple(process.snr(edges[shown].clamp(max=1 if flow else process.timesteps - 1)).tolist()),
    )


def _reached(timesteps: Law, edges: Tensor, size: tuple[int, int]) -> Tensor:
    """The share of samples below each edge, by bisection: a law never falls."""
    low = torch.zeros(len(edges), dtype=torch.float64)
    high = low + 1
    for _ in range(60):
        middle = (low + high) / 2
        below = timesteps(middle, size=size) < edges
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    low[-1] = 1  # what lies at the end itself
    return low


def _told(settings: Settings) -> str:
    """A choice as a person would say it: its kind, and what is not its default."""
    kind = settings.model_dump()["kind"]
    values = settings.model_dump(exclude={"kind"}, exclude_defaults=True)
    rest = ", ".join(key if value is True else f"{key} {value}" for key, value in values.items())
    return f"{kind} ({rest})" if rest else str(kind)


def lines(found: Emphasis, *, solid: str = "█") -> Iterator[str]:
    """The emphasis for a terminal: a line for each of some twenty stretches, as drawn and as counted."""
    yield f"model       {found.model}"
    yield f"timesteps   {found.law}"
    yield f"weighting   {found.weighting}"
    yield ""
    yield f"{'t':>13} {'SNR':>8}  {'drawn':<32}counts"
    step = max(1, len(found.drawn) // BARS)
    rows = [(i, min(i + step, len(found.drawn))) for i in range(0, len(found.drawn), step)]
    shares = [(sum(found.drawn[a:b]), sum(found.counts[a:b])) for a, b in rows]
    most = max(max(pair) for pair in shares)
    whole = found.edges[-1] > 1
    for (a, b), pair in zip(rows, shares):
        low, high = found.edges[a], found.edges[b]
        span = f"{low:.0f} … {high - 1:.0f}" if whole else f"{low:.2f} … {high:.2f}"
        bars = (f"{share:6.1%} {solid * round(24 * share / most)}" for share in pair)
        yield f"{span:>13} {_short(found.snr[a]):>8}  {next(bars):<32}{next(bars)}".rstrip()


# -- the picture ------------------------------------------------------------------------------------------------------


def chart(found: Emphasis, *, title: str) -> Image.Image:
    """The emphasis as a picture: how often each t is drawn as an area, how much it counts as a line; 1 is even."""
    total = found.edges[-1]
    sizes = [(b - a) / total for a, b in zip(found.edges, found.edges[1:])]
    heights = [[share / size for share, size in zip(shares, sizes)] for shares in (found.drawn, found.counts)]
    top, step = _scale(max(map(max, heights)))
    left, right, floor = _LEFT, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    canvas = Image.new("RGB", (_WIDTH, _HEIGHT), _GROUND)
    draw = ImageDraw.Draw(canvas)

    def x(t: float) -> float:
        return left + t / total * (right - left)

    def y(height: float) -> float:
        return floor - height / top * (floor - _TOP)

    def write(at: tuple[float, float], text: str, size: int, *, anchor: str = "la", fill: _Colour = _QUIET) -> None:
        draw.text(at, text, fill, ImageFont.load_default(size), anchor=anchor)

    for i in range(round(top / step) + 1):
        draw.line((left, y(i * step), right, y(i * step)), _RULE, 2)
        write((left - 20, y(i * step)), f"{i * step:g}", 26, anchor="rm")
    outlines = [[(x(t), y(h)) for i, h in enumerate(of) for t in found.edges[i : i + 2]] for of in heights]
    draw.polygon([(left, floor), *outlines[0], (right, floor)], fill=_DRAWN)
    draw.line((left, y(1), right, y(1)), _QUIET, 2)
    draw.line(outlines[1], _COUNTS, 6, joint="curve")
    for i in range(11):
        at = min(range(len(found.edges)), key=lambda e: abs(found.edges[e] - total * i / 10))
        t = found.edges[at] if total == 1 else min(found.edges[at], total - 1)
        draw.line((x(t), floor, x(t), floor + 10), _QUIET, 2)
        write((x(t), floor + 20), f"{t:g}", 26, anchor="ma", fill=_TEXT)
        write((x(t), floor + 60), _short(found.snr[at]), 24, anchor="ma")
    write((left, _HEIGHT - 44), "clean", 24)
    write((_WIDTH / 2, _HEIGHT - 44), f"t ({found.model}), below it the signal-to-noise ratio", 24, anchor="ma")
    write((right, _HEIGHT - 44), "noise", 24, anchor="ra")
    write((left, 52), title, 44, fill=_TEXT)
    legend = {
        f"how often a t is drawn: {found.law}": _DRAWN,
        f"how much it counts in the loss: weighting {found.weighting}": _COUNTS,
    }
    for i, (text, colour) in enumerate(legend.items()):
        draw.rectangle([left, 116 + 44 * i, left + 28, 138 + 44 * i], fill=colour)
        write((left + 44, 112 + 44 * i), text, 26, fill=_TEXT)
    write((left, 202), "1: as often, or as much, as if every t were alike", 24)
    return canvas.resize((_WIDTH // 2, _HEIGHT // 2), Image.Resampling.LANCZOS)


def _scale(most: float) -> tuple[float, float]:
    """The top of an axis that holds `most`, and the distance of its rules: 4 to 8 of them."""
    step = next(
        digit * 10.0**power for power in range(-3, 12) for digit in (1, 2, 5) if most <= 8 * digit * 10.0**power
    )
    return step * -(-most // step), step


def _short(number: float) -> str:
    if number == float("inf"):
        return "inf"
    return f"{number:,.0f}" if number >= 100 else f"{number:.2g}"
