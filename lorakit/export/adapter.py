"""Exporting: from a run, a file of any dialect or a state, to a file of the wanted dialect that was verified."""

import tomllib
from collections.abc import Mapping
from pathlib import Path

import torch

from lorakit import families
from lorakit.adapters import AdapterState
from lorakit.core.errors import InputError
from lorakit.core.files import printable
from lorakit.export.files import interpret, read_file
from lorakit.export.metadata import carried
from lorakit.export.verify import ExportReport, write_verified
from lorakit.families.protocol import Family

RECIPE, RESULT = "recipe.toml", "adapter.safetensors"


def export_adapter(
    run_or_file: AdapterState | Path | str,
    *,
    format: str | None = None,
    out: Path | str | None = None,
    dtype: torch.dtype | None = None,
    family: Family | None = None,
    step: int | None = None,
    metadata: Mapping[str, str] | None = None,
    assume_alpha: float | None = None,
    accept_changed: bool = False,
) -> ExportReport:
    """Writes an adapter in `format` at `out`, and loads it back to see that it gives what was trained.

    `run_or_file` is a run's folder, one of its checkpoints, an adapter file or peft folder, or a state; `step` chooses
    among what a run has saved. Left out: `format` is the one that most programs read for the family, `out`
    "<name>-<format>.safetensors" in the current folder, `dtype` the file's own, `family` the one of the run that the
    file lies in. What a file says of itself goes with it; entries of `metadata` replace it. `accept_changed` takes a
    file that is no more what its digest says.
    Raises InputError for what cannot be read or is not said, StorageError where the disk refuses, VerificationError
    (and leaves no file) where the written file does not give back the same predictions.
    """
    if isinstance(run_or_file, AdapterState):
        if family is None or out is None:
            raise InputError("export_adapter: a state needs family= and out=.")
        dtype = dtype or torch.float32
        return write_verified(run_or_file, Path(out), family=family, format=format, dtype=dtype, metadata=metadata)
    given = Path(run_or_file)
    source = source_of(given, step=step)
    file = read_file(source, accept_changed=accept_changed)
    family = family or family_of_run(source)
    state = interpret(file, family=family, assume_alpha=assume_alpha)
    format = format or family.default_format
    if out is None:
        stem = given.resolve().name.removesuffix(".safetensors")
        out = Path(f"{stem}-{format}" + ("" if format == "peft" else ".safetensors"))
        if out.exists():
            raise InputError(f"{printable(out)} exists already: say out= to choose another name.")
    entries = {**carried(file.metadata, family, name=source.stem), **(metadata or {})}
    return write_verified(state, Path(out), family=family, format=format, dtype=dtype or file.dtype, metadata=entries)


def source_of(given: Path, *, step: int | None = None) -> Path:
    """The adapter file that a run's folder, one of its checkpoints, or a file's own path means.

    A checkpoint means what the run hands out at its step, which may be an average of what is trained on.
    """
    if step is not None and not (given / RECIPE).is_file():
        raise InputError(f"{printable(given)} is no run's folder, and a step chooses among what a run has saved.")
    if given.is_dir() and given.parent.name == "checkpoints" and (given.parents[1] / RECIPE).is_file():
        given, step = given.parents[1], _number(given)
    if not (given / RECIPE).is_file():
        return given
    if step is None:
        if not (given / RESULT).is_file():
            raise InputError(
                f"{printable(given)} holds no {RESULT}: the run has not ended yet. Take one of "
                f"{printable(given / 'adapters')} (to export one, say --step), or let it go on with "
                f"`lorakit train --resume {printable(given)}`."
            )
        return given / RESULT
    saved = {_number(path): path for path in (given / "adapters").glob("step-*.safetensors")}
    if step not in saved:
        steps = ", ".join(str(number) for number in sorted(saved)) or "none"
        raise InputError(f"{printable(given)} has saved no adapter at step {step}; it has: {steps}.")
    return saved[step]


def _number(path: Path) -> int:
    text = path.name.removesuffix(".safetensors").removeprefix("step-")
    return int(text) if text.isdecimal() else -1  # of no step


def family_of_run(path: Path) -> Family:
    """The model that the run which `path` lies in was trained on; InputError where it lies in none."""
    for folder in list(path.resolve().parents)[:3]:
        if (folder / RECIPE).is_file():
            return families.load_settings(families.validate_settings(_model_table(folder / RECIPE)))
    raise InputError(
        f"{printable(path)} lies in no run, so its model is unknown: give the base it was trained on with --base."
    )


def _model_table(recipe: Path) -> dict[str, object]:
    try:
        return dict(tomllib.loads(recipe.read_text(encoding="utf-8"))["model"])
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{printable(recipe)}: its [model] section cannot be read: {printable(error)}.") from None
