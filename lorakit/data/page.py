"""The report as one HTML page that needs nothing else: pictures are within it, and nothing is loaded from a network.

Here: the page's parts, as text; everything that comes from files is escaped. Not here: its look and its script
(`page_style.py`), and which pictures are shown (`sheet.py`). The table is sorted and filtered by the script, and
readable without.
"""

import base64
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from lorakit.core.files import printable, written_aside
from lorakit.data.page_style import SCRIPT, STYLE
from lorakit.data.report import Data, DataReport, Row
from lorakit.data.sheet import SHOWN, Choice, Shown, choose, panels, thumbnail

THUMBNAILS = 2000
"""Up to so many pictures all have one in the table; of more, only those of the contact sheet are shown."""

_OPEN_LINES = 20  # of a list; the others are folded away
_PANEL, _THUMB = 280, 96
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_COLUMNS = (
    # title, what it means, whether it is a number
    ("picture", "source number and name", False),
    ("part", "how it takes part in the training", False),
    ("size", "width × height, in pixels", True),
    ("bucket", "the sizes that it is trained at", True),
    ("cut off", "of its width or height, both sides together", True),
    ("scale", "above 1 it is enlarged", True),
    ("caption", "as the model reads it", False),
    ("tokens", "of the longest form of its caption", True),
    ("repeats", "how often in an epoch", True),
    ("mask", "says what of it counts", False),
    ("notes", "", False),
)


def write_page(
    path: Path,
    report: DataReport,
    *,
    data: Data | None = None,
    rows: Iterable[Row] = (),
    count: int = SHOWN,
    title: str = "",
    on_progress: Callable[[int], object] | None = None,
) -> None:
    """Writes the page to `path`: `report`, and of `data` (None: nothing can be trained on) `count` pictures and `rows`.

    `rows` are those of `data`, in its order; they are taken one by one, so that memory stays flat. Raises InputError
    where a picture cannot be read any more, StorageError where the page cannot be written.
    """
    with written_aside(path) as aside, aside.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for part in page(report, data=data, rows=rows, count=count, title=title, on_progress=on_progress):
            file.write(part)


def page(
    report: DataReport,
    *,
    data: Data | None = None,
    rows: Iterable[Row] = (),
    count: int = SHOWN,
    title: str = "",
    on_progress: Callable[[int], object] | None = None,
) -> Iterator[str]:
    """The page's text, part after part; see `write_page`."""
    done = on_progress or (lambda number: None)
    heading = f"Data of {title}" if title else "Data"
    yield (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(heading)}</title>\n<style>{STYLE}</style></head>\n<body>\n"
    )
    yield f"<header><h1>{_text(heading)}</h1><p>{_verdict(report)}</p></header>\n<main>\n"
    yield _tiles(report)
    for name, kind, texts in (
        ("What keeps the training from starting", "error", report.errors),
        ("Warnings", "warning", report.warnings),
        ("Bad pictures that are left out", "warning", report.skipped),
    ):
        yield _list(name, kind, texts)
    yield _sources(report)
    yield _histogram(report)
    choice = choose(data, count) if data else Choice((), {})
    if data and choice.shown:
        yield from _sheet(data, choice, done)
    if data and len(data.examples):
        yield from _table(data, rows, done)
    yield f"</main>\n<script>{SCRIPT}</script>\n</body></html>\n"


# -- numbers ------------------------------------------------------------------------------------------------------


def _verdict(report: DataReport) -> str:
    if report.errors:
        return f'<b class="error">{_some(len(report.errors), "error")}</b>: mend them, then check again.'
    if report.warnings or report.skipped:
        return "Ready to train. Some things are worth a look."
    return "Ready to train."


def _tiles(report: DataReport) -> str:
    per_epoch = report.steps_per_epoch
    tiles = [
        ("pictures", f"{report.pictures:,}", f"{report.validation:,} for validation" if report.validation else ""),
        ("captions", f"{report.captions:,}", _forms(report)),
        ("steps", f"{report.steps:,}" if per_epoch else "", f"{per_epoch:,} an epoch, {report.epochs:g} epochs"),
        ("buckets", f"{len(report.buckets):,}", ", ".join(f"{side} px" for side in report.resolutions)),
        (
            "cut off",
            # the report's crops are those of one of two sides, were it cut evenly
            f"{2 * report.mean_crop:.1%}" if report.buckets else "",
            f"of width or height on average, {2 * report.largest_crop:.1%} at most",
        ),
        ("enlarged", f"{report.enlarged:,}", ""),
        ("long captions", f"{report.long_captions:,}", ""),
        ("duplicates", f"{report.duplicates:,}", ""),
        ("with a mask", f"{report.masked:,}", ""),
        ("files of no use", f"{len(report.unused):,}", ""),
    ]
    # what is not known is left out, and so are what is not there and would be news
    usual = ("pictures", "captions", "cut off", "steps")
    return (
        '<section class="tiles">'
        + "".join(
            f"<div><span>{name}</span><strong>{number}</strong><small>{_text(more)}</small></div>"
            for name, number, more in tiles
            if number and (number != "0" or name in usual)
        )
        + "</section>\n"
    )


def _forms(report: DataReport) -> str:
    return f"in {report.caption_variants:,} forms" if report.caption_variants > report.captions else ""


def _list(name: str, kind: str, texts: Sequence[str]) -> str:
    """A list, of which only the first lines are unfolded."""
    if not texts:
        return ""

    def lines(some: Sequence[str]) -> str:
        return "<ul>" + "".join(f"<li>{_text(text)}</li>" for text in some) + "</ul>"

    rest = texts[_OPEN_LINES:]
    more = f"<details><summary>and {len(rest):,} more</summary>{lines(rest)}</details>" if rest else ""
    return (
        f'<section class="list {kind}"><h2>{name} <span class="count">{len(texts):,}</span></h2>'
        f"{lines(texts[:_OPEN_LINES])}{more}</section>\n"
    )


def _sources(report: DataReport) -> str:
    if not report.sources:
        return ""
    body = "".join(
        f"<tr><td>{i}</td><th scope=row>{_text(s.folder)}</th><td>{_text(s.role)}</td><td class=n>{s.pictures:,}</td>"
        f"<td class=n>{s.validation:,}</td><td class=n>{s.repeats:,}</td><td class=n>{s.samples_per_epoch:,g}</td>"
        f"<td>{_window(s.start_step, s.end_step)}</td></tr>"
        for i, s in enumerate(report.sources)
    )
    heads = ("", "source", "role", "pictures", "validation", "repeats", "samples an epoch", "steps")
    row = "".join(f"<th scope=col{' class=n' if 3 <= i <= 6 else ''}>{head}</th>" for i, head in enumerate(heads))
    return (
        '<section><h2>Sources</h2><div class="scroll"><table>'
        f"<thead><tr>{row}</tr></thead><tbody>{body}</tbody></table></div></section>\n"
    )


def _window(start: int, end: int | None) -> str:
    if end is None:
        return f"from {start:,} on" if start else "all"
    return f"{start:,} to {end:,}"


def _histogram(report: DataReport) -> str:
    """Bars of how many pictures each bucket has, each beside the bucket's outline."""
    if not report.buckets:
        return ""
    most, high, left, wide = max(report.buckets.values()), 34, 150, 720
    bars = []
    for i, (name, number) in enumerate(report.buckets.items()):
        y, length = i * high, max(3.0, (wide - left - 70) * number / most)
        width, height = (int(side) for side in name.split("×"))
        scale = 24 / max(width, height)
        w, h = width * scale, height * scale
        bars.append(
            f'<g transform="translate(0 {y})"><title>{name}: {_some(number, "picture")}</title>'
            f'<rect class="shape" x="{14 - w / 2:.1f}" y="{15 - h / 2:.1f}" width="{w:.1f}" height="{h:.1f}" rx="1.5"/>'
            f'<text x="{left - 12}" y="20" text-anchor="end">{width} × {height}</text>'
            f'<rect class="bar" x="{left}" y="5" width="{length:.1f}" height="20" rx="4"/>'
            f'<text class="quiet" x="{left + length + 8:.1f}" y="20">{number:,}</text></g>'
        )
    size = f'viewBox="0 0 {wide} {high * len(bars)}" style="max-width:{wide}px"'
    return (
        f'<section><h2>Buckets</h2><svg class="bars" role="img" aria-label="pictures in each bucket" {size}>'
        f"{''.join(bars)}</svg></section>\n"
    )


# -- pictures -----------------------------------------------------------------------------------------------------


def _sheet(data: Data, choice: Choice, done: Callable[[int], object]) -> Iterator[str]:
    yield (
        '<section><h2>What the model will see</h2><p class="quiet">'
        f"{_text(choice.caption)}. Left the original, in which what is cut off is dimmed, right what is trained on"
        ' (what a mask leaves out is tinted).</p><div class="cards">\n'
    )
    for shown in choice.shown:
        yield _card(data, shown)
        done(1)
    yield "</div></section>\n"


def _card(data: Data, shown: Shown) -> str:
    example, found = data.examples[shown.number], panels(data, shown, side=_PANEL)
    captions = data.captions_of(shown.number)
    caption = _text(captions[0]) if captions and captions[0] else "<i>no caption</i>"
    role = "" if example.role == "train" else f'<span class="badge {example.role}">{example.role}</span>'
    more = f'<span class="badge">{len(captions)} forms</span>' if len(captions) > 1 else ""
    return (
        f'<figure><div class="pair">{_img(found.original, "original")}{_img(found.cut, "what is trained on")}</div>'
        f"<figcaption><p>{caption}</p>"
        f"<small>{shown.bucket.width} × {shown.bucket.height} {role}{more}<br>{_text(example.key)}</small>"
        "</figcaption></figure>\n"
    )


def _table(data: Data, rows: Iterable[Row], done: Callable[[int], object]) -> Iterator[str]:
    thumbs = len(data.examples) <= THUMBNAILS
    heads = "".join(
        f'<th scope=col aria-sort="none"{" class=n" if number else ""}><button type=button title="{_text(meaning)}">'
        f"{name}</button></th>"
        for name, meaning, number in _COLUMNS
    )
    yield (
        f'<section><h2>All pictures <span class="count">{len(data.examples):,}</span></h2>'
        '<p id="tools" hidden><input type="search" id="filter" placeholder="Filter: a name, a word, a bucket, a note"'
        ' aria-label="filter"> <output id="matches"></output></p>'
        '<div class="scroll"><table id="pictures" class="pictures"><thead><tr>'
        f"{'<th></th>' if thumbs else ''}{heads}</tr></thead><tbody>\n"
    )
    for index, row in enumerate(rows):
        thumb = ""
        if thumbs:
            thumb = f"<td>{_img(thumbnail(data, index, side=_THUMB), '')}</td>"
            done(1)
        yield _table_row(row, thumb)
    yield "</tbody></table></div></section>\n"


def _table_row(row: Row, thumb: str) -> str:
    buckets = "<br>".join(f"{b.width}&nbsp;×&nbsp;{b.height}" for b in row.buckets)
    more = f'<small class="quiet"> 1 of {row.captions} forms</small>' if row.captions > 1 else ""
    tokens = "" if row.tokens is None else str(row.tokens)
    notes = "".join(f"<li>{_text(text)}</li>" for text in row.warnings)
    return (
        f"<tr{' class=noted' if notes else ''}>{thumb}<td class=key>{_text(row.key)}</td><td>{row.role}</td>"
        f'<td class=n data-v="{row.size[0] * row.size[1]}">{row.size[0]}&nbsp;×&nbsp;{row.size[1]}</td>'
        f'<td class=n data-v="{row.buckets[0].width / row.buckets[0].height if row.buckets else 0:.4f}">{buckets}</td>'
        f'<td class=n data-v="{2 * row.crop:.6f}">{2 * row.crop:.1%}</td>'
        f'<td class=n data-v="{row.scale:.6f}">{row.scale:.2f}</td>'
        f"<td class=caption><div>{_text(row.caption)}{more}</div></td>"
        f'<td class=n data-v="{tokens or -1}">{tokens}</td>'
        f'<td class=n data-v="{row.repeats}">{row.repeats}</td><td>{row.mask}</td>'
        f"<td class=notes>{f'<ul>{notes}</ul>' if notes else ''}</td></tr>\n"
    )


def _img(image: Image.Image, meaning: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82, optimize=True)
    code = base64.b64encode(buffer.getvalue()).decode("ascii")
    return (
        f'<img src="data:image/jpeg;base64,{code}" alt="{meaning}" width="{image.width}" height="{image.height}"'
        ' decoding="async" loading="lazy">'
    )


# -- text ---------------------------------------------------------------------------------------------------------


def _text(text: object) -> str:
    """`text` for between tags and within quotes; control characters are spelled out."""
    return escape(printable(text))


def _some(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
