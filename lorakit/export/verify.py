"""Whether a written adapter gives back what was trained: asked of the loader that its readers have.

Fresh copies of the model's parts answer the same calls (probe.py): without an adapter, with the trained state, with
that state rounded to the file's number format, and with the file, loaded by a stock pipeline or by peft. The file must
equal the rounded state up to the rounding of predictions, and the trained state up to what its number format costs.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit.adapters import AdapterState, copy_adapter_state, load_adapter_state
from lorakit.adapters.state import SECOND, adapter_layers, load_with_peft
from lorakit.core.errors import InputError, StorageError, VerificationError
from lorakit.core.files import make_folder, printable, rename, storage_errors
from lorakit.core.quiet import quiet_libraries
from lorakit.export.dialects import DIALECTS
from lorakit.export.digests import path_digest
from lorakit.export.files import dtype_name, read_adapter, readable, refuse_misnamed, write_adapter
from lorakit.export.probe import Outputs, difference, largest, record_calls, stock_components
from lorakit.families.protocol import Family, stock_reads

# how far predictions may differ, relative to the largest: of the file from the very numbers that are in it …
TOLERANCE = 1e-6
# … and of these numbers from those that were trained; also relative to what the adapter changes, lest the rounding of a
# weak adapter be lost in the first
COST = {torch.float16: 1e-2, torch.bfloat16: 1e-2}
SHARE = 0.1


@dataclass(frozen=True)
class ExportReport:
    """Where the adapter is, in which format and dtype, of how many layers and keys, and how it was verified.

    `max_difference` is the largest difference of a prediction from that of the trained state, relative to the largest
    prediction; `reader` is what loaded the file for it ("stock pipeline", "peft" or "lorakit").
    """

    path: Path
    format: str
    dtype: str
    modules: int
    keys: int
    max_difference: float
    reader: str
    sha256: str

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


def write_verified(
    state: AdapterState,
    path: Path,
    *,
    family: Family,
    format: str | None = None,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> ExportReport:
    """Writes `state` beside `path` and loads it back through a stock pipeline; it takes its place there only if it
    gives what was trained.

    Raises VerificationError where it does not; see `write_adapter` for the rest. What was at `path` then stays.
    """
    format = format or family.default_format
    if path.is_dir():
        raise InputError(f"{printable(path)} exists already: choose another name, or remove it.")
    refuse_misnamed(path, format)  # before it has another name for a while
    make_folder(path.parent)
    with storage_errors(path):
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    written = aside / path.name  # readers go by the name's ending
    try:
        with _called(written, path):
            write_adapter(state, written, format=format, family=family, metadata=metadata, dtype=dtype)
            worst, reader = verify_adapter(state, written, family=family, format=format, dtype=dtype)
            rename(written, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    keys = len(DIALECTS.module(format).write(state, family, {})[0])
    return ExportReport(path, format, dtype_name(dtype), len(state.layers()), keys, worst, reader, path_digest(path))


@contextlib.contextmanager
def _called(written: Path, path: Path) -> Iterator[None]:
    """Errors met within name the file as its users will."""
    try:
        yield
    except (StorageError, VerificationError) as error:
        raise type(error)(str(error).replace(str(written), str(path))) from error


def verify_adapter(
    state: AdapterState, path: Path, *, family: Family, format: str, dtype: torch.dtype = torch.float32
) -> tuple[float, str]:
    """(largest relative difference of a prediction, who loaded the file).

    Raises VerificationError where the loader refuses the file, leaves layers out, or predicts otherwise than the state
    that was trained.
    """
    quiet_libraries()
    state = readable(state, format, family)
    calls = record_calls(family)
    # a part without an adapter is not asked, and would take memory: T5 in fp32 more than all else
    without = family.components.keys() - {family.backbone, *state.components()}
    with torch.random.fork_rng(devices=[]):
        components = stock_components(family.stock_pipeline(without=without), family)
        base = calls.answer(components)
        load_adapter_state(components, state)
        trained = calls.answer(components)
        copy_adapter_state(components, rounded(state, dtype))
        stored = calls.answer(components)
        del components  # one copy of the model at a time
        pipeline = family.stock_pipeline(without=without)
        components = stock_components(pipeline, family)
        reader = DIALECTS.module(format).READER
        can_load = hasattr(pipeline, "load_lora_weights") and stock_reads(family, format, state.layers())
        if reader == "stock pipeline" and not can_load:
            reader = "lorakit"
        try:
            _load(pipeline, components, path, family=family, reader=reader)
        except Exception as error:
            raise VerificationError(f"{printable(path.name)} was refused by {reader}: {printable(error)}") from error
        _same_layers(components, state, family, what=f"{printable(path.name)}, read by {reader},")
        loaded = calls.answer(components)
    _compare(base, stored, loaded, dtype=dtype, what=f"{printable(path.name)}, read by {reader},")
    return _cost(base, trained, loaded, dtype=dtype, name=printable(path.name)), reader


def rounded(state: AdapterState, dtype: torch.dtype) -> AdapterState:
    """`state` with the values that a file in `dtype` holds."""
    return replace(state, tensors={name: tensor.to(dtype).float() for name, tensor in state.tensors.items()})


def _load(pipeline: Any, components: dict[str, nn.Module], path: Path, *, family: Family, reader: str) -> None:
    """Puts the adapter at `path` into `components`, which are `pipeline`'s, as its users would."""
    if reader == "peft":
        for name in components:
            if (path / name).is_dir():
                components[name] = load_with_peft(components[name], path / name)
    elif reader == "stock pipeline":
        pipeline.load_lora_weights(path.parent, weight_name=path.name)
    else:
        load_adapter_state(components, read_adapter(path, family=family))


def _same_layers(components: Mapping[str, nn.Module], state: AdapterState, family: Family, *, what: str) -> None:
    loaded = {
        f"{component}.{path.removeprefix('base_model.model.')}"
        for component, module in components.items()
        for path, _ in adapter_layers(module)
    }
    wanted = set(state.layers())
    # of layers that are written as one, a part without a change may come back or not
    groups = [part for part in family.fused.values() if wanted & {*part}]
    zero = {part for group in groups for part in group if part not in wanted or not state.tensors[part + SECOND].any()}
    odd = sorted((loaded ^ wanted) - zero)
    if odd:
        raise VerificationError(f"{what} has {len(loaded)} adapted layers instead of {len(wanted)}, e.g. not {odd[0]}.")


def _compare(base: Outputs, stored: Outputs, loaded: Outputs, *, dtype: torch.dtype, what: str) -> None:
    """Raises where the loaded file predicts otherwise than the numbers that were written."""
    # some loaders multiply the weights by alpha/rank in the file's own number format, which rounds them once more
    again = torch.finfo(dtype).eps
    for component, wanted in stored.items():
        size, change = largest(wanted), difference(wanted, base[component])
        off = difference(loaded[component], wanted)
        if not off <= TOLERANCE * size + again * change:
            raise VerificationError(
                f"{what} changes {component} otherwise than the training did: predictions differ by {off / size:.1e} "
                f"of their size (the adapter's own effect is {change / size:.1e}). The file was removed."
            )


def _cost(base: Outputs, trained: Outputs, loaded: Outputs, *, dtype: torch.dtype, name: str) -> float:
    """The largest difference from what was trained, relative to the predictions' size; raises where it is too large."""
    worst = 0.0
    for component, wanted in trained.items():
        size, change = largest(wanted), difference(wanted, base[component])
        off = difference(loaded[component], wanted)
        if not off <= min(COST.get(dtype, TOLERANCE) * size, SHARE * change + TOLERANCE * size):
            raise VerificationError(
                f"{name} loses too much in {dtype_name(dtype)}: predictions of {component} move by {off / size:.1e} "
                f"of their size, the adapter moves them by {change / size:.1e}. Write fp32 (run.save_dtype, or "
                "--dtype). The file was removed."
            )
        worst = max(worst, off / size if size else 0.0)
    return worst
