"""`report.html`: a run's curves and samples in one file that needs nothing else, to look at and to pass on."""

import base64
import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorakit.core.files import write_text
from lorakit.training.metrics import records

_WIDTH, _HEIGHT = 860, 220
_POINTS = 400  # more cannot be told apart on the page
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 900px; padding: 0 1rem; color: #222 }
svg { width: 100%; height: auto; background: #f6f6f6; border-radius: 6px }
polyline { fill: none; stroke: #2a5bd7; stroke-width: 1.5 }
polyline.faint { stroke: #b9c9f3 }
text { font-size: 11px; fill: #555 }
figure { display: inline-block; margin: 0 12px 12px 0; vertical-align: top }
figure img { image-rendering: pixelated; min-width: 128px; border-radius: 4px }
figcaption { max-width: 160px; font-size: 12px; color: #555 }
pre { background: #f6f6f6; padding: 1rem; border-radius: 6px; overflow: auto; font-size: 13px }
"""


def write_report(run: Path, *, prompts: Sequence[str], recipe: str) -> None:
    """Writes RUN/report.html from the run's metrics and samples; `recipe` is shown as it is, so without paths."""
    steps = list(records(run / "metrics.jsonl"))  # a line that a fault has torn is no reason to write no report
    body = [f"<h1>{html.escape(run.name)}</h1>", f"<p>{len(steps)} steps.</p>"]
    for name, words in (("loss", "Loss"), ("grad_norm", "Gradient norm"), ("lr", "Learning rate")):
        points = [(r["step"], r[name]) for r in steps if _number(r.get(name))]
        if points:
            body += [f"<h2>{words}</h2>", curve(points, smooth=name != "lr")]
    for folder in sorted((run / "samples").glob("step-*"), reverse=True):
        body.append(f"<h2>Samples of step {html.escape(folder.name.removeprefix('step-').lstrip('0') or '0')}</h2>")
        body += [_figure(file, prompts) for file in sorted(folder.glob("*.png")) if file.stem.isdecimal()]
    body += ["<h2>Recipe</h2>", f"<pre>{html.escape(recipe)}</pre>"]
    head = f"<!doctype html><meta charset=utf-8><title>{html.escape(run.name)}</title><style>{_STYLE}</style>"
    write_text(run / "report.html", head + "\n".join(body) + "\n")


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def curve(points: Sequence[tuple[int, float]], *, smooth: bool) -> str:
    """An SVG of (step, value) pairs, over them their running mean where `smooth`."""
    stride = max(1, len(points) // _POINTS)
    top, bottom = max(v for _, v in points), min(v for _, v in points)
    first, last = points[0][0], points[-1][0]

    def line(values: Sequence[tuple[int, float]], kind: str) -> str:
        pairs = []
        for step, value in values:
            x = 60 + (_WIDTH - 70) * (step - first) / max(1, last - first)
            y = 10 + (_HEIGHT - 40) * (1 - (value - bottom) / ((top - bottom) or 1.0))
            pairs.append(f"{x:.1f},{y:.1f}")
        return f'<polyline class="{kind}" points="{" ".join(pairs)}"/>'

    lines = [line(points[::stride], "faint" if smooth else "")]
    if smooth:
        lines.append(line(running_mean(points)[::stride], ""))
    labels = [(4, 18, f"{top:.4g}"), (4, _HEIGHT - 30, f"{bottom:.4g}"), (60, _HEIGHT - 8, f"step {first}")]
    labels.append((_WIDTH - 70, _HEIGHT - 8, f"{last}"))
    texts = [f'<text x="{x}" y="{y}">{words}</text>' for x, y, words in labels]
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}">{"".join(lines + texts)}</svg>'


def running_mean(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Each value averaged with those before it, over about a twentieth of the run."""
    window = max(1, len(points) // 20)
    means: list[tuple[int, float]] = []
    total: Any = 0.0
    for i, (step, value) in enumerate(points):
        total += value - (points[i - window][1] if i >= window else 0.0)
        means.append((step, total / min(i + 1, window)))
    return means


def _figure(file: Path, prompts: Sequence[str]) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    number = int(file.stem)
    words = html.escape(prompts[number]) if number < len(prompts) else ""
    return f'<figure><img src="data:image/png;base64,{data}" alt=""><figcaption>{words}</figcaption></figure>'
