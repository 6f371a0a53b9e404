"""The loss on chosen pictures, at the same noises and timesteps every time: its numbers compare, over a run and between
runs.

What is measured is the plain denoising loss, all timesteps alike, whatever the training's own objective, law of
timesteps and weights are. Here: one measurement, and its line in `validation.jsonl`. When it is made is the loop's
affair; which pictures are put aside, `data/dataset.py`'s.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.errors import LostProcess
from lorakit.core.processes import gather_objects, rank, sum_tensors, world
from lorakit.core.types import Batch
from lorakit.data.plan import share
from lorakit.diffusion.objectives import denoising
from lorakit.training.sharding import jointly
from lorakit.training.step import Trainee, predictor, ready

BANDS = 4  # of timesteps; a picture is measured at one of each
BAND_NAMES = tuple(f"{k / BANDS:g}-{(k + 1) / BANDS:g}" for k in range(BANDS))
CURVES = {"held_out": "validation_loss", "training": "training_loss"}


@dataclass(frozen=True)
class Validation:
    """What is measured: the examples of each set, "held_out" before "training", each a source's of 0 … `sources` - 1.

    `batches` gives of each example that it is asked for a batch, with one sample in each band of timesteps.
    """

    sets: Mapping[str, Sequence[int]]
    source_of: Callable[[int], int]
    sources: int
    batches: Callable[[Sequence[int]], Iterable[Batch]]


@dataclass(frozen=True)
class Measured:
    """Mean losses over so many samples, None where they are not finite: of all, of each source by its number, and of
    each band of timesteps, by its share of the way from clean (0) to noise (1)."""

    loss: float | None
    samples: int
    by_source: Mapping[str, float | None]
    by_band: Mapping[str, float | None]


@contextlib.contextmanager
def evaluated(modules: Iterable[nn.Module]) -> Iterator[None]:
    """`modules` without dropout."""
    modules = list(modules)
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module in modules:
            module.train()


@torch.no_grad()
def validation_loss(
    trainee: Trainee, validation: Validation, *, abandon: Callable[[], bool] = lambda: False
) -> dict[str, Measured] | None:
    """What is measured of each set, on all ranks together: each takes its share of the pictures.

    None on all ranks where `abandon`, asked before each picture, said so on one; and where one fails, all raise.
    Dropout is off, and the training's random numbers are left as they were.
    """
    objective = denoising.build(denoising.Settings(), trainee.family.process)
    pictures = [(i, entry) for i, entries in enumerate(validation.sets.values()) for entry in entries]
    own = [pictures[i] for i in share(len(pictures), rank(), world())]
    # where a forward needs all ranks, all make equally many, and give up together or not at all
    turns = -(-len(pictures) // world()) if trainee.sharded else len(own)
    turn = [*own, *pictures[:1] * (turns - len(own))]
    shape = 2, len(validation.sets), validation.sources, BANDS  # losses and numbers of samples
    table = torch.zeros(shape, device=trainee.device, dtype=torch.float64)
    ended = torch.zeros(2, device=trainee.device, dtype=torch.float64)  # ranks that gave up, that failed
    failure: Exception | None = None
    try:
        with evaluated(trainee.adapted.values()):
            batches = iter(validation.batches([entry for _, entry in turn]))
            for number, (i, entry) in enumerate(turn):
                if any(gather_objects(abandon())) if trainee.sharded else abandon():
                    ended[0] = 1
                    break
                with jointly(sharded=trainee.sharded), trainee.autocast():
                    batch = ready(trainee, next(batches))
                    losses = objective(predictor(trainee, batch), batch).per_example.double()
                if number >= len(own):
                    continue
                band = (batch.quantile * BANDS).long().clamp(max=BANDS - 1)
                sums = table[:, i, validation.source_of(entry)]
                sums.index_add_(1, band, torch.stack([losses, torch.ones_like(losses)]))
    except LostProcess:
        raise
    except Exception as error:  # the others wait for this rank's numbers
        failure, ended[1] = error, 1
    sum_tensors([table, ended])
    gave_up, failed = ended.tolist()
    if failed:
        reasons = gather_objects(None if failure is None else f"{type(failure).__name__}: {failure}")
        raise failure or RuntimeError("; ".join(filter(None, reasons)))
    return None if gave_up else {name: _measured(*table[:, i].cpu()) for i, name in enumerate(validation.sets)}


def _measured(losses: Tensor, counts: Tensor) -> Measured:
    """The means of sums of (source, band)."""

    def means(names: Sequence[str], dim: int) -> dict[str, float | None]:
        rows = zip(names, losses.sum(dim).tolist(), counts.sum(dim).tolist(), strict=True)
        return {name: _finite(loss / count) for name, loss, count in rows if count}

    return Measured(
        loss=_finite(float(losses.sum() / counts.sum())),
        samples=int(counts.sum()),
        by_source=means([str(source) for source in range(len(losses))], 1),
        by_band=means(BAND_NAMES, 0),
    )


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def record(step: int, found: Mapping[str, Measured], *, seconds: float) -> dict[str, Any]:
    """The line of `validation.jsonl`. Its `loss` is that of the pictures put aside, if there are any; else that of
    training pictures, which shows over-fitting less: `measured` says which."""
    first, *others = found
    line = {"step": step, "measured": first, **asdict(found[first])}
    for name in others:
        line |= {name: asdict(found[name]), "train_minus_validation": difference(found[name].loss, found[first].loss)}
    return {**line, "seconds": seconds}


def difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def curves(line: Mapping[str, Any]) -> dict[str, float]:
    """A line's numbers under the names of their curves: "validation_loss", "training_loss_by_source/0", …"""
    found = {"train_minus_validation": line.get("train_minus_validation")}
    sets = {line["measured"]: line, **{name: line[name] for name in CURVES if name in line}}
    for name, values in sets.items():
        curve = CURVES[name]
        found[curve] = values["loss"]
        for part in ("by_source", "by_band"):
            found |= {f"{curve}_{part}/{key}": loss for key, loss in values[part].items()}
    return {name: number for name, number in found.items() if number is not None}
