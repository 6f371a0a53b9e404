"""`report.html`: a run's curves, pictures and samples in one file that needs nothing else, to look at and to pass on.

Here: what is on the page. Next: `charts.py` draws the curves, `hardest.py` ranks the pictures.
"""

import base64
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from lorakit.core.errors import InputError
from lorakit.core.files import printable, write_text
from lorakit.data.page_style import STYLE
from lorakit.training import charts
from lorakit.training.charts import Line, chart, running_mean, sparkline
from lorakit.training.hardest import hardest
from lorakit.training.metrics import is_number, records
from lorakit.training.validation import CURVES, curves

_SHOWN = 12  # of the hardest pictures
_WIDE = 1160
_STYLE = """
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));gap:16px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px}
.card h3{font-size:15px;margin:0 0 8px;font-weight:600}.card p{margin:8px 4px 0;color:var(--quiet);font-size:13px}
.card.wide{grid-column:1/-1}
.hard img{display:block;max-width:64px;max-height:64px;border-radius:3px}.hard :is(td,th){vertical-align:middle}
.hard :is(td,th):first-child{width:1%}.hard .n{width:12%}.hard td:last-child{width:18%}
.samples{display:flex;flex-wrap:wrap;gap:12px}.samples figure{padding:8px}
.samples img{image-rendering:pixelated;min-width:128px;max-width:320px;border-radius:4px}
.samples figcaption{max-width:160px;font-size:12px;color:var(--quiet);padding-top:6px}
pre{background:var(--card);border:1px solid var(--line);padding:1rem;border-radius:10px;overflow:auto;font-size:13px}
"""

Records = Sequence[Mapping[str, Any]]
Thumbnail = Callable[[str], Image.Image]


def write_report(run: Path, *, prompts: Sequence[str], recipe: str, thumbnail: Thumbnail | None = None) -> None:
    """Writes RUN/report.html from the run's files; `recipe` is shown as it is, so without paths.

    `thumbnail(key)` draws a small picture; InputError where it cannot any more.
    """
    steps = list(records(run / "metrics.jsonl"))  # a line that a fault has torn is no reason to write no report
    validations = [
        {"step": line["step"], "measured": line["measured"], **curves(line)}
        for line in records(run / "validation.jsonl")
        if line.get("measured") in CURVES and line.keys() >= {"loss", "by_source", "by_band"}
    ]
    parts = [
        f"<header><h1>{_text(run.name)}</h1><p>{_some(len(steps), 'step')}</p></header>",
        f"<main>{_tiles(steps, validations)}",
        *_charts(steps, validations, _source_names(run)),
        *_hardest(steps, thumbnail),
        *_samples(run, prompts),
        f"<section><h2>Recipe</h2><pre>{escape(recipe)}</pre></section></main>",
    ]
    head = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{_text(run.name)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}{charts.STYLE}{_STYLE}</style>"
    )
    write_text(run / "report.html", head + "\n".join(parts) + "\n")


def _tiles(steps: Records, validations: Records) -> str:
    """The numbers that a person looks for first."""
    found: list[tuple[str, str]] = []
    losses = _points(steps, "loss")
    if losses:
        found.append(("loss lately", f"{running_mean(losses)[-1][1]:.4g}"))
    if validations:
        name = CURVES[validations[-1]["measured"]]
        if measured := _points(validations, name):
            step, best = min(measured, key=lambda point: point[1])
            found += [
                (f"{name.replace('_', ' ')} at the end", f"{measured[-1][1]:.4g}"),
                (f"its lowest, at step {int(step)}", f"{best:.4g}"),
            ]
    pictures = {key for record in steps for key in record.get("samples", [])}
    found.append(("pictures seen", f"{len(pictures):,}"))
    seconds = sum(record["seconds"] for record in steps if is_number(record.get("seconds")))
    found.append(("time in steps", f"{seconds / 60:.0f} min" if seconds >= 600 else f"{seconds:.0f} s"))
    skipped = sum(bool(record.get("skipped")) for record in steps)
    if skipped:
        found.append(("steps skipped", f"{skipped:,}"))
    tiles = [f"<div><span>{words}</span><strong>{number}</strong></div>" for words, number in found]
    return f'<section class="tiles">{"".join(tiles)}</section>'


def _charts(steps: Records, validations: Records, sources: Mapping[str, str]) -> Iterator[str]:
    cards = []
    losses = _points(steps, "loss")
    if losses:
        both = [Line("each step", losses, faint=True), Line("mean of a twentieth of the run", running_mean(losses))]
        cards.append(_card("Loss", chart(both, width=_WIDE), wide=True))
    cards += _validation_cards(validations, sources)
    for name, words in (("grad_norm", "Gradient norm, before clipping"), ("lr", "Learning rate")):
        if points := _points(steps, name):
            smooth = [Line("", points, faint=True), Line("", running_mean(points))]
            cards.append(_card(words, chart(smooth if name == "grad_norm" else [Line("", points)])))
    if cards:
        yield f'<section class="charts">{"".join(cards)}</section>'


def _validation_cards(lines: Records, sources: Mapping[str, str]) -> Iterator[str]:
    """The measurements at fixed noises and timesteps: as they are, their difference, by band and by source."""
    words = {"validation_loss": "pictures put aside", "training_loss": "training pictures"}
    both = {name: points for name in words if (points := _points(lines, name))}
    if not both:
        return
    note = "The plain denoising loss at fixed noises and timesteps, the same pictures every time."
    if "validation_loss" not in both:
        note += " No pictures are put aside: training pictures show over-fitting less."
    shown = [Line(words[name], points, colour) for colour, (name, points) in enumerate(both.items())]
    yield _card("Validation", chart(shown), note)
    if gap := _points(lines, "train_minus_validation"):
        note = "The further below zero, the more is learned by heart."
        yield _card("Training pictures minus those put aside", chart([Line("", gap, 2)], zero=True), note)
    for name in both:
        bands = _named(lines, f"{name}_by_band/")
        note = "Share of the way from clean to noise; each over its first value, since the levels lie far apart."
        shown = [Line(band, _relative(of_band), i) for i, (band, of_band) in enumerate(bands.items())]
        if shown:
            yield _card(f"By timestep: {words[name]}", chart(shown), note)
        of_sources = _named(lines, f"{name}_by_source/")
        if len(of_sources) > 1:
            shown = [Line(sources.get(key, key), p, i) for i, (key, p) in enumerate(of_sources.items())]
            yield _card(f"By source: {words[name]}", chart(shown))


def _hardest(steps: Records, thumbnail: Thumbnail | None) -> Iterator[str]:
    """The table of the pictures with the highest losses."""
    found = hardest(steps, count=_SHOWN)
    if not found:
        return
    steps_shown = steps[0]["step"], steps[-1]["step"]
    rows = [
        f"<tr><td>{_small(thumbnail, picture.key)}</td><th>{_text(picture.key)}</th>"
        f'<td class="n">{picture.loss:.2f} <small>± {picture.error:.2f}</small></td>'
        f'<td class="n">{picture.seen:,}</td><td>{sparkline(picture.trend, span=steps_shown)}</td></tr>'
        for picture in found
    ]
    yield (
        '<section><h2>Hardest pictures</h2><p class="quiet">Their loss over that of samples at like timesteps and of '
        "about the same step: 1 is as hard as the others. What stays hard may have a caption that does not fit, or be "
        "cut badly, or be what there is most to learn of.</p>"
        '<div class="scroll"><table class="hard"><thead><tr><th></th><th>picture</th><th class="n">relative loss</th>'
        '<th class="n">times seen</th><th>over the run</th></tr></thead><tbody>'
        f"{''.join(rows)}</tbody></table></div></section>"
    )


def _small(thumbnail: Thumbnail | None, key: str) -> str:
    if thumbnail is None:
        return ""
    buffer = io.BytesIO()
    try:
        thumbnail(key).convert("RGB").save(buffer, "JPEG", quality=82)
    except InputError:  # it was changed, or is gone
        return ""
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}" alt="">'


def _samples(run: Path, prompts: Sequence[str]) -> Iterator[str]:
    for folder in sorted((run / "samples").glob("step-*"), reverse=True):
        step = folder.name.removeprefix("step-").lstrip("0") or "0"
        figures = [_figure(file, prompts) for file in sorted(folder.glob("*.png")) if file.stem.isdecimal()]
        yield f'<section><h2>Samples of step {_text(step)}</h2><div class="samples">{"".join(figures)}</div></section>'


def _figure(file: Path, prompts: Sequence[str]) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    number = int(file.stem)
    words = escape(prompts[number]) if number < len(prompts) else ""
    return f'<figure><img src="data:image/png;base64,{data}" alt=""><figcaption>{words}</figcaption></figure>'


# -- what the files say -------------------------------------------------------------------------------------------


def _points(lines: Records, name: str) -> list[tuple[float, float]]:
    return [(line["step"], line[name]) for line in lines if is_number(line.get(name))]


def _named(lines: Records, start: str) -> dict[str, list[tuple[float, float]]]:
    """The curves whose names start so, by the rest of their names."""
    names = dict.fromkeys(name for line in lines for name in line if name.startswith(start))
    return {name.removeprefix(start): points for name in names if (points := _points(lines, name))}


def _relative(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    first = points[0][1] or 1.0
    return [(step, value / first) for step, value in points]


def _source_names(run: Path) -> dict[str, str]:
    """The sources' folders by their numbers, as the check of the data at the start of the run has them."""
    try:
        sources = json.loads((run / "check.json").read_text(encoding="utf-8"))["sources"]
        return {str(i): f"{i} {source['folder']}" for i, source in enumerate(sources)}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


# -- text ---------------------------------------------------------------------------------------------------------


def _card(title: str, content: str, note: str = "", *, wide: bool = False) -> str:
    words = f"<p>{note}</p>" if note else ""
    return f'<div class="card{" wide" if wide else ""}"><h3>{escape(title)}</h3>{content}{words}</div>'


def _text(text: object) -> str:
    return escape(printable(text))


def _some(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
