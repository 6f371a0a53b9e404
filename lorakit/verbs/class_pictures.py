"""Class pictures (DreamBooth's prior preservation, Ruiz et al. 2022, arXiv:2208.12242, §3.2).

What the base, without any adapter, draws of its own world into the folders of sources with `generate`, for trainings to
hold on to. A picture says in its file how it was drawn: one of other settings or another base is drawn anew, one that
says nothing is somebody's own and stays. Each appears whole, behind its caption: a kill loses at most one a process.
"""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lorakit import families
from lorakit.core.files import write_text, written_aside
from lorakit.core.memory import let_go
from lorakit.core.processes import on_first_rank, rank, together, world
from lorakit.core.types import Process
from lorakit.data.sources.generate import GenerateSettings
from lorakit.families.protocol import classifier_free, guided
from lorakit.recipe import Recipe
from lorakit.sampling.pictures import Request, draw, label, wrong_steps
from lorakit.training.processes import bar

log = logging.getLogger("lorakit")


@dataclass(frozen=True)
class ClassPicture:
    """A picture to be drawn: its file, what is asked for, and how, as `label` writes it into the file."""

    file: Path
    request: Request
    steps: int
    guidance: float
    base: str

    def there(self) -> bool:
        """Whether the file is there, drawn like this or by nobody that we know."""
        if not os.path.lexists(self.file):
            return False
        try:
            with Image.open(self.file) as picture:
                said = json.loads(picture.info["lorakit"])
        except (OSError, ValueError, KeyError):  # somebody's own; what is wrong with it, the scan will say
            return True
        asked = {"steps": self.steps, "guidance": self.guidance, "base": self.base}
        asked |= {
            name: getattr(self.request, name) for name in ("prompt", "negative_prompt", "seed", "width", "height")
        }
        return all(said.get(name) == value for name, value in asked.items() if value is not None)


def class_pictures(settings: GenerateSettings, folder: Path, *, base: str) -> list[ClassPicture]:
    """All that `settings` ask for."""
    found = []
    for i in range(settings.count):
        width, height = settings.sizes[i % len(settings.sizes)] if settings.sizes else (None, None)
        prompt = settings.prompts[i % len(settings.prompts)]
        request = Request(prompt, settings.seed + i, settings.negative_prompt, width, height)
        found.append(ClassPicture(folder / f"{i:03d}.png", request, settings.steps, settings.guidance, base))
    return found


def missing(recipe: Recipe) -> dict[int, list[ClassPicture]]:
    """What is still to be drawn, by the numbers of the sources."""
    base = recipe.model.path if recipe.model.path == "embedded" else Path(recipe.model.path).resolve().name
    wanted = {
        i: class_pictures(source.generate, Path(source.path), base=base)
        for i, source in enumerate(recipe.data.sources)
        if source.generate is not None
    }
    lacking = {i: [picture for picture in pictures if not picture.there()] for i, pictures in wanted.items()}
    return {i: pictures for i, pictures in lacking.items() if pictures}


def draw_missing(recipe: Recipe, *, device: Any = "cpu", check: Callable[[], object] = lambda: None) -> int:
    """Draws what is missing by a freshly loaded base, on all ranks together, and returns how many pictures that was.

    Raises what `check` does, which is called before each picture; what was drawn until then is kept.
    """
    todo = [picture for pictures in on_first_rank(lambda: missing(recipe)).values() for picture in pictures]
    if not todo:
        return 0
    _draw(recipe, todo, device=device, check=check)
    let_go()  # the base that drew them
    return len(todo)


def _draw(recipe: Recipe, todo: Sequence[ClassPicture], *, device: Any, check: Callable[[], object]) -> None:
    if rank() == 0:
        log.info("the base draws %d class pictures", len(todo))
    precision = recipe.run.precision if recipe.run.precision != "auto" else "fp32"
    family = families.load_settings(recipe.model, device=device, precision=precision)
    pipeline = family.live_pipeline()
    with contextlib.closing(bar(unit="picture", label="drawing", total=len(todo))) as progress:
        # one each in turn: who is slow keeps the others waiting for a picture and not for an hour
        for first in range(0, len(todo), world()):
            turn = todo[first : first + world()]

            def own(picture: Sequence[ClassPicture] = turn[rank() : rank() + 1]) -> None:
                check()
                draw_into_place(pipeline, picture, guided=guided(family))

            together(own)
            progress.update(len(turn))


def draw_into_place(
    pipeline: Any,
    pictures: Sequence[ClassPicture],
    *,
    guided: Callable[[float, str], Mapping[str, Any]] = classifier_free,
) -> None:
    """Draws each of `pictures` and writes its caption and it."""
    for wanted in pictures:
        (drawn,) = draw(pipeline, [wanted.request], steps=wanted.steps, guidance=wanted.guidance, guided=guided)
        write_text(wanted.file.with_suffix(".txt"), wanted.request.prompt + "\n")
        said = label(wanted.request, drawn, steps=wanted.steps, guidance=wanted.guidance, base=wanted.base)
        with written_aside(wanted.file) as aside:
            drawn.save(aside, format="PNG", pnginfo=said)


def drawing_problems(recipe: Recipe, *, multiple: int, process: Process) -> list[str]:
    """What a stock pipeline would not draw that draws multiples of `multiple` pixels, in steps of `process`."""
    problems = []
    for i, source in enumerate(recipe.data.sources):
        key, wanted = f"data.sources.{i}.generate", source.generate
        if wanted is not None:
            problems += [
                f"{key}.sizes: {width}×{height}: the model draws multiples of {multiple} pixels."
                for width, height in wanted.sizes
                if width < 1 or height < 1 or width % multiple or height % multiple
            ]
            if wanted.negative_prompt and wanted.guidance <= 1:
                problems.append(f"{key}.negative_prompt has no effect with a guidance of 1 or less: remove it.")
            problems += wrong_steps(f"{key}.steps", wanted.steps, process)
    return problems


def said_of_missing(recipe: Recipe) -> list[str]:
    """What a report says of pictures that are to be drawn, for each source that lacks some."""
    lacking = missing(recipe)
    return [
        f"data.sources.{i}: {len(lacking[i])} of its {source.generate.count} class pictures are missing: "
        "`lorakit train` and `lorakit cache` draw them first; the numbers here are without them."
        for i, source in enumerate(recipe.data.sources)
        if source.generate is not None and i in lacking
    ]
