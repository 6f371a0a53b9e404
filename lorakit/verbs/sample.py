"""Pictures from a base with adapters, drawn through the family's stock pipelines: from text, or over a picture."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lorakit import families
from lorakit.adapters import load_adapter_state
from lorakit.core import memory
from lorakit.core.errors import InputError
from lorakit.core.files import make_folder, printable, sha256_file, written_aside
from lorakit.core.processes import on_each_rank, on_first_rank, rank, together, world
from lorakit.core.quiet import quiet_libraries
from lorakit.export.files import dtype_name, read_adapter
from lorakit.export.weights import Weights
from lorakit.families.protocol import Family, guided
from lorakit.sampling.canvas import drawn_over, read_canvas
from lorakit.sampling.pictures import Request, draw, label, wrong_steps
from lorakit.training.interrupt import watched
from lorakit.training.processes import Runtime, bar, resolve_precision

log = logging.getLogger("lorakit")

# how much of the noise a picture that is drawn over starts with, where nobody says: enough for another subject in the
# same place; all, where only what is masked is drawn; little enough to keep what is enlarged
STRENGTH = {"image": 0.6, "inpaint": 1.0, "upscale": 0.3}

# what models that are made for one task alone want
DOES = {
    "inpaint": "paint a part of a picture anew: give --image and --mask",
    "edit": "edit a picture: give --image, and neither --mask nor --strength",
}


def sample(
    base: str,
    adapters: Sequence[tuple[Path, float | Weights]],
    *,
    wanted: Sequence[Request],
    out: Path,
    steps: int = 20,
    guidance: float = 5.0,
    family: str | None = None,
    assume_alpha: float | None = None,
    image: Path | None = None,
    mask: Path | None = None,
    strength: float | None = None,
    image_guidance: float | None = None,
    upscale: int = 1,
    config: str | None = None,
    precision: str = "auto",
) -> list[Path]:
    """Draws `wanted` from `base` with every adapter at its weight; returns the PNG files, numbered on in folder `out`.
    `family` is the base's, which mostly says it itself, `config` the folder beside a base that is one file; it computes
    on a GPU where there is one, in `precision`.

    Over `image`, where given, and there only what `mask` says. With `upscale` the picture, drawn or given, is enlarged
    so many times and drawn over at that size. `strength` is the share of noise that what is drawn over starts from,
    `image_guidance` how close an editing model keeps to it.

    Raises InputError for a base, adapter or picture that cannot be read, for options that do not go together or that
    the family has no stock pipeline for, and for a size that the model cannot draw.
    """
    quiet_libraries()
    task = "text" if image is None else "image" if mask is None else "inpaint"
    _check_options(task, mask=mask, strength=strength, upscale=upscale)
    _check_guidance(guidance, wanted)
    last, free = "upscale" if upscale > 1 else task, strength is None
    strength = STRENGTH.get(last, 1.0) if strength is None else strength
    if last != "text" and int(steps * strength) < 1:
        raise InputError(f"--strength {strength} of --steps {steps} leaves no step to draw: raise one of them.")

    def ready(device: torch.device) -> _Ready:
        canvas = None if image is None else read_canvas(image, mask)
        model = _loaded(base, config, family, precision, device)
        edits = model.task == "edit" and task == "image" and free
        done, share = ("edit", 1.0) if edits else (task, strength)
        _check_model(model, done, image=image, upscale=upscale, image_guidance=image_guidance)
        _check_sizes(wanted, model.drawing_multiple)
        if wrong := wrong_steps("--steps", steps, model.process):
            raise InputError(wrong)
        for negative in {request.negative_prompt for request in wanted}:
            guided(model)(guidance, negative)  # refuses now what it has no words for
        over: dict[str, Any] = {"strength": share, "upscale": upscale, "image_guidance": image_guidance}
        asked = wanted if canvas is None else [drawn_over(r, canvas, model.drawing_multiple, **over) for r in wanted]
        for path, weight in adapters:
            state = Weights.of(weight).applied(read_adapter(path, family=model, assume_alpha=assume_alpha))
            load_adapter_state({name: model.components[name] for name in state.components()}, state)
        if out.exists() and not out.is_dir():
            raise InputError(f"--out {printable(out)} is a file: give a folder.")
        how: dict[str, Any] = {"steps": steps, "guidance": guidance}
        pipeline = model.live_pipeline(done)
        again = model.live_pipeline("image") if upscale > 1 and canvas is None else None

        def drawn(request: Request) -> tuple[Request, Image.Image]:
            with _in_memory(request):
                (picture,) = draw(pipeline, [request], **how, guided=guided(model))
                if again is not None:
                    request = _enlarged(request, picture, share, upscale)
                    (picture,) = draw(again, [request], **how, guided=guided(model))
            return request, picture

        said = {
            **how,
            "sampler": type(pipeline.scheduler).__name__,
            "base": base if base == "embedded" else Path(base).resolve().name,
            "adapters": [_named(path, weight) for path, weight in adapters],
            "precision": dtype_name(model.dtype),
            **{option: path.name for option, path in (("image", image), ("mask", mask)) if path is not None},
            **({"upscale": upscale} if upscale > 1 else {}),
        }
        return _Ready(asked, drawn, said)

    with watched() as interrupt, Runtime("fp32", folder=out) as runtime:
        prepared = together(lambda: ready(runtime.device))
        return _drawn_into(out, prepared, interrupt.check)


@dataclass(frozen=True)
class _Ready:
    """What is to be drawn; what draws it, and says what was asked for in the end; what every picture says of both."""

    wanted: Sequence[Request]
    drawn: Callable[[Request], tuple[Request, Image.Image]]
    said: Mapping[str, Any]


def _drawn_into(out: Path, ready: _Ready, check: Callable[[], object]) -> list[Path]:
    """Draws and writes what is wanted, on all ranks together, each a picture in turn; returns all files."""
    files: list[Path] = []
    on_first_rank(lambda: make_folder(out))
    with contextlib.closing(bar(unit="picture", label="drawing", total=len(ready.wanted))) as progress:
        for first in range(0, len(ready.wanted), world()):
            turn = ready.wanted[first : first + world()]
            files += _drawn_turn(turn, out, ready, check)
            progress.update(len(turn))
    return files


def _drawn_turn(turn: Sequence[Request], out: Path, ready: _Ready, check: Callable[[], object]) -> list[Path]:
    """Draws a picture on each rank, and writes them under the next free numbers of folder `out`."""
    own: list[tuple[Request, Image.Image]] = []

    def draw_own() -> None:
        check()
        own.extend(ready.drawn(request) for request in turn[rank() : rank() + 1])

    on_each_rank(draw_own)
    number = on_first_rank(lambda: _next_number(out))
    files = [out / f"{number + i:04d}.png" for i in range(len(turn))]

    def write_own() -> None:
        for (request, picture), file in zip(own, files[rank() :], strict=False):
            with written_aside(file) as aside:
                picture.save(aside, format="PNG", pnginfo=label(request, picture, **ready.said))

    together(write_own)
    return files


@contextlib.contextmanager
def _in_memory(request: Request) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not memory.is_lack(error):
            raise
        raise InputError(
            f"there is not enough memory to draw {printable(request.prompt)!r}: give a smaller --size (or width and "
            "height of --prompts), or --precision bf16. What was drawn so far stays."
        ) from error


def _next_number(folder: Path) -> int:
    return max((int(p.stem) for p in folder.glob("*.png") if p.stem.isdigit()), default=-1) + 1


def _loaded(base: str, config: str | None, family: str | None, precision: str, device: torch.device) -> Family:
    where = {} if config is None else {"config": config}
    name = family or families.named_at(config or base)
    settings = families.validate_settings({"family": name, "path": base, **where})
    return families.load_settings(settings, device=device, precision=resolve_precision(precision)[0])


def _check_options(task: str, *, mask: Path | None, strength: float | None, upscale: int) -> None:
    problems = []
    if mask is not None and task == "text":
        problems.append("--mask says what of a picture is drawn: give --image too.")
    if strength is not None and task == "text" and upscale == 1:
        problems.append("--strength is for what is drawn over: give --image or --upscale too.")
    if strength is not None and not 0 < strength <= 1:
        problems.append(f"--strength {strength}: give a number above 0, at most 1.")
    if upscale < 1:
        problems.append(f"--upscale {upscale}: give a whole number from 2 on.")
    if mask is not None and upscale > 1:
        problems.append("--upscale draws the whole picture over, --mask a part of it: give one of them.")
    if problems:
        raise InputError(problems)


def _check_guidance(guidance: float, wanted: Sequence[Request]) -> None:
    if not 0 <= guidance < float("inf"):
        raise InputError(f"--guidance {guidance:g}: give a number from 0 on; 1 is none.")
    if guidance <= 1 and any(request.negative_prompt for request in wanted):
        raise InputError(
            f"--negative (or negative_prompt in --prompts) has no effect with --guidance {guidance:g}: leave it out, "
            "or guide by more than 1."
        )


def _check_model(model: Family, task: str, *, image: Path | None, upscale: int, image_guidance: float | None) -> None:
    if image_guidance is not None and (task != "edit" or image_guidance < 1):
        raise InputError(f"--image-guidance {image_guidance}: it is for models that edit pictures, a number from 1 on.")
    if task not in model.pipelines and model.task != "text":
        raise InputError(f"the model is made to {DOES[model.task]}.")
    for option, needed, asked in (("--image", task, image), ("--upscale", "image", upscale > 1)):
        if asked and needed not in model.pipelines:
            with_mask = " with --mask" if needed == "inpaint" else ""
            raise InputError(f"{option}{with_mask}: the family {model.name} has no stock pipeline for it.")


def _check_sizes(wanted: Sequence[Request], multiple: int) -> None:
    wrong = [
        f"{name} {side} (by --size or --prompts): it must be a multiple of {multiple}, as the stock pipeline asks."
        for r in wanted
        for name, side in (("width", r.width), ("height", r.height))
        if (side or 0) % multiple
    ]
    if wrong:
        raise InputError(list(dict.fromkeys(wrong)))


def _enlarged(request: Request, picture: Image.Image, strength: float, upscale: int) -> Request:
    width, height = picture.width * upscale, picture.height * upscale
    larger = picture.resize((width, height), Image.Resampling.LANCZOS)
    return replace(request, width=width, height=height, image=larger, strength=strength)


def _named(path: Path, weight: float | Weights) -> dict[str, Any]:
    """An adapter without the folder that it lies in; many have the same name, so its digest beside it."""
    weights = Weights.of(weight)
    said = {"weight": weights.default, **({"weights": dict(weights.parts)} if weights.parts else {})}
    return {"file": path.name, **said, **({"sha256": sha256_file(path)} if path.is_file() else {})}
