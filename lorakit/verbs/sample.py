"""Pictures from a base with adapters, drawn through the family's stock pipelines: from text, or over a picture."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lorakit import families
from lorakit.adapters import load_adapter_state
from lorakit.core.errors import InputError
from lorakit.core.files import make_folder, printable, sha256_file, written_aside
from lorakit.core.quiet import quiet_libraries
from lorakit.export.files import dtype_name, read_adapter
from lorakit.export.weights import Weights
from lorakit.families.protocol import Family, guided
from lorakit.sampling.canvas import drawn_over, read_canvas
from lorakit.sampling.pictures import Request, draw, label, too_few_steps
from lorakit.training.processes import resolve_precision

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
    last, free = "upscale" if upscale > 1 else task, strength is None
    strength = STRENGTH.get(last, 1.0) if strength is None else strength
    if last != "text" and int(steps * strength) < 1:
        raise InputError(f"--strength {strength} of --steps {steps} leaves no step to draw: raise one of them.")
    canvas = None if image is None else read_canvas(image, mask)
    model = _loaded(base, config, family, precision)
    if model.task == "edit" and task == "image" and free:
        task, strength = "edit", 1.0
    if image_guidance is not None and (task != "edit" or image_guidance < 1):
        raise InputError(f"--image-guidance {image_guidance}: it is for models that edit pictures, a number from 1 on.")
    if task not in model.pipelines and model.task != "text":
        raise InputError(f"the model is made to {DOES[model.task]}.")
    for option, needed, asked in (("--image", task, image), ("--upscale", "image", upscale > 1)):
        if asked and needed not in model.pipelines:
            with_mask = " with --mask" if needed == "inpaint" else ""
            raise InputError(f"{option}{with_mask}: the family {model.name} has no stock pipeline for it.")
    _check_sizes(wanted, model.drawing_multiple)
    if wrong := too_few_steps("--steps", steps, least=model.process.least_steps):
        raise InputError(wrong)
    if canvas is not None:
        multiple = model.drawing_multiple
        over: dict[str, Any] = {"strength": strength, "upscale": upscale, "image_guidance": image_guidance}
        wanted = [drawn_over(request, canvas, multiple, **over) for request in wanted]
    for path, weight in adapters:
        state = Weights.of(weight).applied(read_adapter(path, family=model, assume_alpha=assume_alpha))
        load_adapter_state({name: model.components[name] for name in state.components()}, state)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {printable(out)} is a file: give a folder.")
    make_folder(out)
    pipeline, told = model.live_pipeline(task), guided(model)
    pictures = draw(pipeline, wanted, steps=steps, guidance=guidance, guided=told)
    if upscale > 1 and canvas is None:
        wanted = [_enlarged(r, picture, strength, upscale) for r, picture in zip(wanted, pictures, strict=True)]
        pictures = draw(model.live_pipeline("image"), wanted, steps=steps, guidance=guidance, guided=told)
    settings: dict[str, Any] = {
        "steps": steps,
        "guidance": guidance,
        "sampler": type(pipeline.scheduler).__name__,
        "base": base if base == "embedded" else Path(base).resolve().name,
        "adapters": [_named(path, weight) for path, weight in adapters],
        "precision": dtype_name(model.dtype),
        **{option: path.name for option, path in (("image", image), ("mask", mask)) if path is not None},
        **({"upscale": upscale} if upscale > 1 else {}),
    }
    taken = [int(p.stem) for p in out.glob("*.png") if p.stem.isdigit()]
    files = []
    for number, (request, picture) in enumerate(zip(wanted, pictures, strict=True), start=max(taken, default=-1) + 1):
        files.append(out / f"{number:04d}.png")
        with written_aside(files[-1]) as aside:
            picture.save(aside, format="PNG", pnginfo=label(request, picture, **settings))
    return files


def _loaded(base: str, config: str | None, family: str | None, precision: str) -> Family:
    where = {} if config is None else {"config": config}
    name = family or families.named_at(config or base)
    settings = families.validate_settings({"family": name, "path": base, **where})
    device = "cuda" if torch.cuda.is_available() else "cpu"
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


def _check_sizes(wanted: Sequence[Request], multiple: int) -> None:
    wrong = [
        f"--size {r.width}x{r.height}: both sides must be multiples of {multiple}, as the stock pipeline asks."
        for r in wanted
        if (r.width or 0) % multiple or (r.height or 0) % multiple
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
