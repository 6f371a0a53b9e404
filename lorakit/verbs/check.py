"""Looking at a recipe's data before training: the report, and with it a contact sheet and a page.

What is looked at is `survey.py`'s affair, and how it is shown that of `data/report.py`, `data/sheet.py` and
`data/page.py`. No weights are loaded unless the model itself is to be looked at, and nothing is written but where it is
asked for.
"""

import contextlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lorakit import families
from lorakit.core.errors import InputError
from lorakit.core.files import printable, write_bytes, write_json
from lorakit.core.quiet import quiet_libraries
from lorakit.data.cache import refuse_within
from lorakit.data.dataset import Dataset
from lorakit.data.page import THUMBNAILS, write_page
from lorakit.data.report import DataReport, Row, rows
from lorakit.data.sheet import SHOWN, choose, contact_sheet
from lorakit.recipe import Recipe
from lorakit.training.processes import bar
from lorakit.verbs.measured import check_model
from lorakit.verbs.survey import survey_recipe, token_counter


@dataclass(frozen=True)
class Checked:
    """The report, in which `errors` is all that keeps a training from starting, and the files that were written.

    `unexplained` is what the model leaves of what it is asked for, by prediction type; empty where it was not loaded.
    """

    report: DataReport
    files: tuple[Path, ...]
    unexplained: Mapping[str, float]


def check(
    recipe: Recipe, *, deep: bool = False, out: Path | None = None, originals: int = SHOWN, title: str = ""
) -> Checked:
    """Reads the data of `recipe`, and writes what was found to the folder `out`, if given.

    There it becomes check.json and check.html, and contact-sheet.png with at most `originals` of the pictures that can
    be used; errors name these by their keys there. What is wrong is in the report and not raised; InputError only for
    pictures that change meanwhile. `deep` loads the model, where nothing else is wrong, and sees whether it predicts
    what its configuration says.
    """
    quiet_libraries()
    sources = [Path(source.path) for source in recipe.data.sources]
    problems: list[str] = []
    for folder, key in ((out, "--out"), (Path(recipe.run.output), "run.output")):
        if folder is not None:
            try:
                refuse_within(folder, sources, key=key)
            except InputError as error:
                problems += error.problems
    if out is not None and out.exists() and not out.is_dir():
        problems.append(f"--out {printable(out)} is a file: name a folder.")
    surveyed = survey_recipe(recipe)
    writable = out is not None and not any(problem.startswith("--out ") for problem in problems)
    report = replace(surveyed.report, errors=(*problems, *surveyed.report.errors))
    unexplained: Mapping[str, float] = {}
    if deep and surveyed.dataset and not report.errors:
        problem, unexplained = check_model(recipe, surveyed.dataset)
        if problem and recipe.run.check_model:
            report = replace(report, errors=(problem,))
        elif problem:
            report = replace(report, warnings=(*report.warnings, problem))
    if out is None or not writable:
        return Checked(report, (), unexplained)
    files = replace(report, errors=tuple(_without_paths(text, recipe) for text in report.errors))
    written = _written(out, files, recipe, surveyed.dataset, originals=originals, title=title)
    return Checked(report, written, unexplained)


def _without_paths(text: str, recipe: Recipe) -> str:
    """`text` for a file that is passed on: pictures by their keys, other paths of the recipe by their last names."""
    for index, source in enumerate(recipe.data.sources):
        text = text.replace(f"{printable(source.path).rstrip('/')}/", f"{index}/")
    paths = [recipe.model.path, recipe.run.output, recipe.data.cache, *(source.path for source in recipe.data.sources)]
    for path in sorted((path for path in paths if path), key=len, reverse=True):
        text = text.replace(printable(path), printable(Path(path).name))
    return text


def _written(
    out: Path, report: DataReport, recipe: Recipe, data: Dataset | None, *, originals: int, title: str
) -> tuple[Path, ...]:
    """The files of a report, and of pictures as far as there are any."""
    sheet, json, html = out / "contact-sheet.png", out / "check.json", out / "check.html"
    write_json(json, report.to_json())
    if data is None:
        sheet.unlink(missing_ok=True)  # of an earlier check: it would be taken for this one's
        write_page(html, report, title=title)
        return json, html
    shown = len(choose(data, originals).shown)
    total = 2 * shown + (len(data.examples) if len(data.examples) <= THUMBNAILS else 0)
    with contextlib.closing(bar(unit="picture", label="drawing", total=total)) as progress:
        buffer = io.BytesIO()
        contact_sheet(data, count=originals, on_progress=progress.update).save(buffer, "PNG")
        write_bytes(sheet, buffer.getvalue())
        write_page(
            html,
            report,
            data=data,
            rows=_rows(recipe, data, report),
            count=originals,
            title=title,
            on_progress=progress.update,
        )
    return json, sheet, html


def _rows(recipe: Recipe, data: Dataset, report: DataReport) -> Iterator[Row]:
    """A row for each picture, its caption measured in the model's own tokens."""
    description = families.describe_settings(recipe.model)
    count_tokens = token_counter(description, weighted=recipe.data.weighted_tags)
    return rows(data, report=report, count_tokens=count_tokens, token_limit=description.token_limit)
