"""The whole road on the embedded base: draw what shall be kept, train the mascot, load it into a stock pipeline, score.

Everything that it shows is measured on pictures of a stock diffusers pipeline, by the judge that ships with lorakit.
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from lorakit import families
from lorakit.core.embedded import embedded
from lorakit.core.errors import InputError, LorakitError
from lorakit.core.files import make_folder, printable, write_json, written_aside
from lorakit.core.quiet import quiet_libraries
from lorakit.data.sources.generate import GenerateSettings
from lorakit.evaluation.judge import Judge, Verdict, load_judge
from lorakit.recipe import load_recipe
from lorakit.sampling.pictures import Request, draw
from lorakit.verbs.class_pictures import class_pictures, draw_into_place
from lorakit.verbs.train import train

log = logging.getLogger("lorakit")

STEPS, GUIDANCE = 20, 4.0
KEPT_GUIDANCE = 3.0  # of the pictures of old things: true shapes, colours not driven to extremes
FRAMES = ((64, 64), (64, 64), (72, 56), (56, 72))  # of the pictures of old things; stock pipelines want multiples of 8
# what must hold for the demo to count as learned
SUBJECT, BACKGROUNDS, OLD_LOSS, TRACES = 0.75, 0.85, 0.10, 0.10


class NotLearned(LorakitError):
    """The adapter was trained, and its pictures do not show what they should."""

    exit_code = 1


@dataclass(frozen=True)
class DemoScores:
    """Shares of pictures, 0 … 1: the subject in its prompts, the backgrounds asked for there, the old prompts wholly
    right (shape, colour and background), and traces of the subject in their pictures."""

    subject: float
    backgrounds: float
    old: float
    traces: float


@dataclass(frozen=True)
class DemoReport:
    """Scores before and after, the training's CPU and wall seconds, and the files that show it."""

    before: DemoScores
    after: DemoScores
    train_cpu_seconds: float
    train_seconds: float
    adapter: Path
    picture: Path

    def problems(self) -> list[str]:
        """What the adapter did not learn, or made worse."""
        checks = [
            (
                self.after.subject >= SUBJECT,
                f"the subject is in {self.after.subject:.0%} of its pictures, not {SUBJECT:.0%}",
            ),
            (self.before.subject == 0, f"the judge saw the subject before training, in {self.before.subject:.0%}"),
            (
                self.after.backgrounds >= BACKGROUNDS,
                f"the background asked for is in {self.after.backgrounds:.0%} of them, not {BACKGROUNDS:.0%}",
            ),
            (
                self.before.old - self.after.old <= OLD_LOSS,
                f"old prompts fell from {self.before.old:.0%} to {self.after.old:.0%}",
            ),
            (self.after.traces <= TRACES, f"{self.after.traces:.0%} of the old pictures show traces of the subject"),
        ]
        return [text for good, text in checks if not good]


def demo(out: Path) -> DemoReport:
    """Runs the demo into the new folder `out`: run/, before-after.png, demo.json.

    Raises InputError where `out` is in use, NotLearned where the adapter's pictures fail the scores.
    """
    quiet_libraries()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {printable(out)} is in use: name a new folder, or remove it.")
    make_folder(out)
    prompts = read_prompts()
    wanted = requests(prompts["subject"], first_seed=1000), requests(prompts["old"], first_seed=2000)
    judge = load_judge()
    base = families.load(families.DEFAULT, "embedded").stock_pipeline()
    kept = class_pictures(generated(prompts["regularization"]), out / "regularization", base="embedded")
    log.info("the base draws %d pictures of what it shall keep", len(kept))
    draw_into_place(base, kept)
    log.info("and %d to compare with, before it has learned anything", sum(map(len, wanted)))
    before = [draw(base, part, steps=STEPS, guidance=GUIDANCE) for part in wanted]

    recipe = load_recipe(
        embedded("mascot") / "recipe.toml",
        overrides=[
            f"data.sources.1.path={json.dumps(str(out / 'regularization'))}",
            f"data.cache={json.dumps(str(out / 'cache'))}",
            f"run.output={json.dumps(str(out / 'run'))}",
        ],
    )
    cpu = time.process_time()
    result = train(recipe)
    cpu = time.process_time() - cpu

    log.info("a stock pipeline loads the adapter and draws the same again")
    stock = families.load(families.DEFAULT, "embedded").stock_pipeline()
    stock.load_lora_weights(result.adapter.parent, weight_name=result.adapter.name)
    after = [draw(stock, part, steps=STEPS, guidance=GUIDANCE) for part in wanted]

    picture = out / "before-after.png"
    with written_aside(picture) as aside:
        _before_after(prompts, before, after).save(aside, format="PNG")
    report = DemoReport(
        before=scores(judge, prompts, before),
        after=scores(judge, prompts, after),
        train_cpu_seconds=cpu,
        train_seconds=result.seconds,
        adapter=result.adapter,
        picture=picture,
    )
    write_json(out / "demo.json", _as_json(report, out))
    if report.problems():
        raise NotLearned("The demo did not learn what it should:\n" + "\n".join(report.problems()))
    return report


def read_prompts() -> dict[str, Any]:
    """What is drawn: "subject" and "old" prompts with what they ask for, and the captions of "regularization"."""
    prompts: dict[str, Any] = json.loads((embedded("mascot") / "prompts.json").read_text())
    return prompts


def _as_json(report: DemoReport, out: Path) -> dict[str, Any]:
    """The report for machines, with paths relative to the demo's folder."""
    values = asdict(report)
    for name in ("adapter", "picture"):
        values[name] = getattr(report, name).resolve().relative_to(out.resolve()).as_posix()
    return {**values, "learned": not report.problems(), "problems": report.problems()}


def requests(prompts: Sequence[dict[str, Any]], *, first_seed: int) -> list[Request]:
    return [Request(entry["prompt"], first_seed + i) for i, entry in enumerate(prompts)]


def generated(captions: Sequence[str]) -> GenerateSettings:
    """What the base draws of its own world, so that training can hold on to it."""
    return GenerateSettings(
        prompts=list(captions),
        count=len(captions),
        steps=STEPS,
        guidance=KEPT_GUIDANCE,
        seed=3000,
        sizes=list(FRAMES),
    )


def scores(judge: Judge, prompts: dict[str, Any], pictures: Sequence[Sequence[Image.Image]]) -> DemoScores:
    subject, old = (judge.look(part) for part in pictures)

    def right(verdict: Verdict, wanted: dict[str, str]) -> bool:
        return all(getattr(verdict, key) == wanted[key] for key in ("background", "colour", "shape") if key in wanted)

    def share(flags: Sequence[bool]) -> float:
        return sum(flags) / len(flags)

    return DemoScores(
        subject=share([v.subject >= 0.5 for v in subject]),
        backgrounds=share([v.background == w["background"] for v, w in zip(subject, prompts["subject"], strict=True)]),
        old=share([right(v, w) for v, w in zip(old, prompts["old"], strict=True)]),
        traces=share([v.traces >= 0.5 for v in old]),
    )


def _before_after(
    prompts: dict[str, Any], before: Sequence[Sequence[Image.Image]], after: Sequence[Sequence[Image.Image]]
) -> Image.Image:
    """Columns: prompts of the subject, then old ones; the upper row without the adapter, the lower with it."""
    subject, old, side, gap, text = 6, 3, 128, 10, 44
    columns = [(0, i) for i in range(subject)] + [(1, i) for i in range(old)]
    sheet = Image.new("RGB", (len(columns) * (side + gap) + 70, 2 * (side + gap) + text), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, pictures) in enumerate((("before", before), ("after", after))):
        pen.text((8, row * (side + gap) + side // 2), name, fill="black")
        for column, (part, i) in enumerate(columns):
            tile = pictures[part][i].resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(tile, (60 + column * (side + gap), 6 + row * (side + gap)))
    for column, (part, i) in enumerate(columns):
        words = prompts[("subject", "old")[part]][i]["prompt"]
        pen.multiline_text((60 + column * (side + gap), 2 * (side + gap)), _wrapped(words, 23), fill="black", spacing=1)
    return sheet


def _wrapped(words: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(words, width))
