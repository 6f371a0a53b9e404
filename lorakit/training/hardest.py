"""Which pictures a model finds hardest, from the samples' losses in `metrics.jsonl`.

A loss says more of its timestep than of its picture, and it falls as the training goes on. So each is divided by what
samples at like timesteps lost, and that by what samples of about the same step did.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.training.metrics import is_number

_FEWEST, _SHARE = 31, 50  # a sample is compared with so many, or a fiftieth of all
_PARTS = 12  # of a trend

Array = NDArray[Any]


@dataclass(frozen=True)
class Hard:
    """A picture that came `seen` times: its `loss`, where 1 is what others lose at like timesteps, how far that may be
    off by chance (a standard error), and its course over the run, (step, loss) by parts."""

    key: str
    loss: float
    error: float
    seen: int
    trend: tuple[tuple[float, float], ...]


def hardest(steps: Iterable[Mapping[str, Any]], *, count: int) -> list[Hard]:
    """Up to `count` pictures of these records, by the loss that is certain, `loss - error`; the hardest first."""
    numbers: dict[str, int] = {}
    rows = [
        (numbers.setdefault(key, len(numbers)), record["step"], t, loss)
        for record in steps
        for key, t, loss in _samples(record)
        if is_number(t) and is_number(loss)
    ]
    if not rows:
        return []
    picture, step, t, loss = np.array(rows, float).T
    relative = _compared(_compared(loss, along=t), along=step)
    picture = picture.astype(int)
    seen = np.bincount(picture, minlength=len(numbers))
    means = np.bincount(picture, relative, minlength=len(numbers)) / np.maximum(seen, 1)
    errors = relative.std() / np.sqrt(np.maximum(seen, 1))
    keys = list(numbers)
    return [
        Hard(keys[i], float(means[i]), float(errors[i]), int(seen[i]), _trend(step[of_it], relative[of_it]))
        for i in np.argsort(-(means - errors), kind="stable")[:count].tolist()
        for of_it in [picture == i]
    ]


def _samples(record: Mapping[str, Any]) -> Iterable[tuple[str, Any, Any]]:
    """Key, timestep and loss of each; none of a line that an older version, or nobody, wrote so."""
    lists = [record.get(name) for name in ("samples", "timesteps", "losses")]
    whole = all(isinstance(values, list) and len(values) == len(lists[0] or ()) for values in lists)
    return zip(*lists) if whole else ()


def _compared(values: Array, *, along: Array) -> Array:
    """Each value over the mean of those that stand around it in the order of `along`, itself among them."""
    order = np.argsort(along, kind="stable")
    reach = max(_FEWEST, len(values) // _SHARE) // 2
    sums = np.concatenate([[0.0], np.cumsum(values[order])])
    places = np.arange(len(values))
    first, end = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    means = (sums[end] - sums[first]) / (end - first)
    compared = np.empty(len(values))
    compared[order] = np.where(means > 0, values[order] / np.where(means > 0, means, 1), 1)
    return compared


def _trend(step: Array, relative: Array) -> tuple[tuple[float, float], ...]:
    parts = [np.array_split(values, min(_PARTS, len(step))) for values in (step, relative)]
    return tuple((float(s.mean()), float(r.mean())) for s, r in zip(*parts, strict=True))
