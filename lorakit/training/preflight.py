"""Before hours are spent: is there room for what a run will write, and may it be written?

What a run writes is estimated from its settings, before a model is loaded.
"""

import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorakit.core.errors import StorageError
from lorakit.core.files import printable, size, storage_errors

_LINE = 400  # bytes of metrics.jsonl for a step
_SAMPLE = 90  # and for each sample in it: its key, loss and timestep
_PICTURE = 2  # bytes for a pixel of a sample; PNG takes 3 for noise, half of that for a photograph
_REPORT = 4 / 3  # of the pictures: base64
_SLACK = 32 << 20  # for headers, JSON, the report, and a file system's own


@dataclass(frozen=True)
class Need:
    """So many `bytes` will be written below `folder`; `what` names them, and the setting that makes them fewer."""

    folder: Path
    bytes: int
    what: str


def check_space(needs: Sequence[Need]) -> None:
    """Raises StorageError where a file system has less room than all that is needed on it; every one is named."""
    systems: dict[int, list[Need]] = {}
    for need in needs:
        if need.bytes:
            systems.setdefault(os.stat(_there(need.folder)).st_dev, []).append(need)
    problems = []
    for together in systems.values():
        needed, free = sum(need.bytes for need in together), shutil.disk_usage(_there(together[0].folder)).free
        if needed > free:
            folders = " and ".join(dict.fromkeys(printable(need.folder) for need in together))
            parts = "; ".join(f"{size(need.bytes)} for {need.what}" for need in together)
            problems.append(
                f"{folders}: {size(needed)} will be needed and {size(free)} are free ({parts}): "
                "free some space or choose another folder."
            )
    if problems:
        raise StorageError("\n".join(problems))


def check_writable(folder: Path) -> None:
    """Raises StorageError where nothing can be written to `folder`, or, if it is not there, to where it will be."""
    there = _there(folder)
    # permissions say little on a server's disk or for root; a file without a name leaves nothing behind
    with storage_errors(folder), tempfile.TemporaryFile(dir=there) as file:
        file.write(b"\0" * 4096)


def run_needs(
    output: Path,
    *,
    weights: int,
    steps: int,
    save_every: int,
    keep_last: int,
    keep_every: int = 0,
    keep_best: int = 0,
    first_step: int = 0,
    dtype_bytes: int = 2,
    optimizer_factor: float = 2.0,
    ema: bool = False,
    pictures: int = 0,
    picture_pixels: int = 0,
    global_batch: int = 1,
    cache: Path | None = None,
    cache_bytes: int = 0,
) -> list[Need]:
    """What a run from `first_step` to `steps` will write, at the time when it is most.

    `weights` are the adapter's numbers, `optimizer_factor` how many fp32 numbers the optimizer keeps for each of them,
    `pictures` the samples of the whole run, of `picture_pixels` each.
    """
    one = int(4 * weights * (1 + optimizer_factor + ema))
    kept = {"save_every": save_every, "keep_last": keep_last, "keep_every": keep_every, "keep_best": keep_best}
    # those of before are there already and make way; one more lies beside them while it is written
    checkpoints = max(0, _kept(steps, **kept) - _kept(first_step, **kept)) + 1
    exports = _saves(steps, save_every) - _saves(first_step, save_every) + 2  # the result, and it beside itself
    samples = int(pictures * picture_pixels * _PICTURE * (1 + _REPORT))
    lines = (steps - first_step) * (_LINE + _SAMPLE * global_batch)
    needs = [
        Need(output, checkpoints * one, f"{checkpoints} checkpoints (run.keep_last, run.keep_every, adapter.rank)"),
        Need(output, exports * weights * dtype_bytes, f"{exports} adapters (run.save_every, run.save_dtype)"),
        Need(output, samples, f"{pictures} samples (run.sample_every)"),
        Need(output, lines + _SLACK, "metrics and the report"),
    ]
    return [*needs, Need(cache, cache_bytes, "the cache (data.cache)")] if cache else needs


def _saves(step: int, save_every: int) -> int:
    """How many checkpoints a run has written at `step`; the last is written at the end in any case."""
    return math.ceil(step / save_every) if save_every else min(step, 1)


def _kept(step: int, *, save_every: int, keep_last: int, keep_every: int, keep_best: int) -> int:
    """How many of them are there still, at most."""
    saves = _saves(step, save_every)
    if not keep_last:
        return saves
    lasting = step // math.lcm(keep_every, save_every or step or 1) if keep_every else 0
    return min(saves, keep_last + keep_best + lasting)


def _there(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that is there."""
    folder = Path(os.path.abspath(folder))
    return next(path for path in (folder, *folder.parents) if path.is_dir())
