"""Pictures from a base with adapters, drawn through the family's stock pipeline."""

from collections.abc import Sequence
from pathlib import Path

from lorakit import families
from lorakit.adapters import load_adapter_state
from lorakit.core.errors import InputError
from lorakit.core.files import make_folder, printable, written_aside
from lorakit.core.quiet import quiet_libraries
from lorakit.export.files import read_adapter
from lorakit.sampling.pictures import Request, draw


def sample(
    base: str,
    adapters: Sequence[tuple[Path, float]],
    *,
    wanted: Sequence[Request],
    out: Path,
    steps: int = 20,
    guidance: float = 5.0,
    family: str = families.DEFAULT,
    assume_alpha: float | None = None,
) -> list[Path]:
    """Draws `wanted` from `base` with every adapter at its weight; returns the PNG files, numbered on in folder `out`.

    Raises InputError for a base or adapter that cannot be read, and for a size that the model cannot draw.
    """
    quiet_libraries()
    model = families.load(family, base)
    multiple = model.drawing_multiple
    wrong = [
        f"--size {r.width}x{r.height}: both sides must be multiples of {multiple}, as the stock pipeline asks."
        for r in wanted
        if (r.width or 0) % multiple or (r.height or 0) % multiple
    ]
    if wrong:
        raise InputError(wrong)
    for path, weight in adapters:
        state = read_adapter(path, family=model, assume_alpha=assume_alpha)
        load_adapter_state({name: model.components[name] for name in state.components()}, state, weight=weight)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {printable(out)} is a file: give a folder.")
    make_folder(out)
    taken = [int(p.stem) for p in out.glob("*.png") if p.stem.isdigit()]
    first = max(taken, default=-1) + 1
    files = []
    for number, picture in enumerate(draw(model.live_pipeline(), wanted, steps=steps, guidance=guidance), start=first):
        files.append(out / f"{number:04d}.png")
        with written_aside(files[-1]) as aside:
            picture.save(aside, format="PNG")
    return files
