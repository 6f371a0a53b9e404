"""Curves over a run's steps as SVG, without a library: with a grid and a legend, in the colours of the page's style."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

_HEIGHT = 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 14, 30
_POINTS = 400  # more cannot be told apart on the page
_DOTS = 40  # so few points are marked, or a single one would not be seen
_TICKS = 4

Points = Sequence[tuple[float, float]]

STYLE = """
.chart{width:100%;height:auto;display:block;font:12px system-ui,sans-serif;font-variant-numeric:tabular-nums}
.chart text{fill:var(--quiet)}.chart .grid{stroke:var(--line);stroke-width:1}
.chart .zero{stroke:var(--quiet);stroke-width:1;stroke-dasharray:4 3}
.chart polyline,.spark polyline{fill:none;stroke:currentColor;stroke-width:1.8;stroke-linejoin:round}
.chart circle{fill:currentColor}.chart .faint{opacity:.28;stroke-width:1}
.c0{color:var(--blue)}.c1{color:var(--bar)}.c2{color:var(--violet)}.c3{color:var(--error)}.c4{color:#3f9a5f}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:13px;padding:6px 0 0 4px}
.legend span::before{content:"";display:inline-block;width:14px;height:3px;border-radius:2px;background:currentColor;
vertical-align:middle;margin-right:6px}
.legend .faint::before{opacity:.28}.legend b{font-weight:400;color:var(--ink)}
.spark{width:120px;height:28px;display:block;color:var(--bar)}.spark line{stroke:var(--line)}
"""
_COLOURS = 5


@dataclass(frozen=True)
class Line:
    """A curve of (step, value) points, its `name` for the legend, the number of its `colour`; `faint` lies behind."""

    name: str
    points: Points
    colour: int = 0
    faint: bool = False


def chart(lines: Sequence[Line], *, width: int = 560, zero: bool = False) -> str:
    """The curves in one frame, whose scale they share, with a legend of their names; `zero` is in it, as a line."""
    points = [point for line in lines for point in line.points]
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    bottom = min([y for _, y in points] + [0.0] * zero)
    top = max([y for _, y in points] + [0.0] * zero)

    def x_of(step: float) -> float:
        return _LEFT + (width - _LEFT - _RIGHT) * (step - first) / ((last - first) or 1)

    def y_of(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - (value - bottom) / ((top - bottom) or 1))

    parts = []
    for value in ticks(bottom, top):
        y = y_of(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for step in ticks(first, last):
        if step == int(step):
            parts.append(f'<text x="{x_of(step):.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{int(step)}</text>')
    if zero:
        parts.append(f'<line class="zero" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y_of(0):.1f}" y2="{y_of(0):.1f}"/>')
    for line in lines:
        shown = thinned(line.points)
        pairs = [f"{x_of(step):.1f},{y_of(value):.1f}" for step, value in shown]
        look = _look(line)
        parts.append(f'<polyline class="{look}" points="{" ".join(pairs)}"/>')
        if len(shown) <= _DOTS and not line.faint:
            dots = (pair.split(",") for pair in pairs)
            parts += [f'<circle class="{look}" cx="{x}" cy="{y}" r="2.6"/>' for x, y in dots]
    names = [f'<span class="{_look(line)}"><b>{escape(line.name)}</b></span>' for line in lines if line.name]
    legend = f'<div class="legend">{"".join(names)}</div>' if names else ""
    return f'<svg class="chart" viewBox="0 0 {width} {_HEIGHT}">{"".join(parts)}</svg>{legend}'


def _look(line: Line) -> str:
    return f"c{line.colour % _COLOURS}{' faint' if line.faint else ''}"


def sparkline(points: Points, *, span: tuple[float, float]) -> str:
    """A small curve without numbers over the steps of `span`, on a scale of its own; behind it a line at 1."""
    values = [1.0, *(value for _, value in points)]
    bottom, height = min(values), (max(values) - min(values)) or 1
    first, length = span[0], (span[1] - span[0]) or 1

    def y_of(value: float) -> float:
        return 26 - 24 * (value - bottom) / height

    pairs = " ".join(f"{2 + 116 * (step - first) / length:.1f},{y_of(value):.1f}" for step, value in points)
    return (
        f'<svg class="spark" viewBox="0 0 120 28"><line x1="0" x2="120" y1="{y_of(1):.1f}" y2="{y_of(1):.1f}"/>'
        f'<polyline points="{pairs}"/></svg>'
    )


def ticks(bottom: float, top: float) -> list[float]:
    """Some round numbers (1, 2 or 5 times a power of ten apart) in bottom … top."""
    if not top > bottom:
        return [bottom]
    rough = (top - bottom) / _TICKS
    power = 10 ** math.floor(math.log10(rough))
    apart = next(power * n for n in (1, 2, 5, 10) if power * n >= rough * 0.999)
    return [apart * i for i in range(math.ceil(bottom / apart - 1e-9), math.floor(top / apart + 1e-9) + 1)]


def thinned(points: Points) -> Points:
    """Some of the points, evenly, the last among them."""
    stride = max(1, math.ceil(len(points) / _POINTS))
    return points[::-stride][::-1]


def running_mean(points: Points) -> Points:
    """Each value averaged with those before it, over about a twentieth of the run."""
    window = max(1, len(points) // 20)
    means: list[tuple[float, float]] = []
    total: Any = 0.0
    for i, (step, value) in enumerate(points):
        total += value - (points[i - window][1] if i >= window else 0.0)
        means.append((step, total / min(i + 1, window)))
    return means
