"""Does the model predict what its configuration says? A wrong `prediction_type` trains without a word, and to nothing.

A network's output is compared with all that it could have been asked for: noise, v, x0. That is done where most of what
it sees is noise: noise itself is easy to tell there, -v is close to x0, of which something can be told, and the three
lie far apart. Here: the comparison and the verdict. Next: `verbs/measured.py` chooses the pictures.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lorakit.core.types import Batch, Predict, Process

SHARES = (0.65, 0.8)  # of the way from clean to noise
_MUCH = 1.3  # times as much unexplained as of another target
_CLEAR = 1.5  # times as much unexplained: more than a single picture does by chance
# of which so much may be, for it to be believed. Who predicts noise does it well there, while the v of a network that
# has learned nothing, which takes x0 for 0, explains half of the noise as well
_BELIEVED = {"epsilon": 0.25, "v_prediction": 0.9, "sample": 0.9, "flow": 0.9}


def targets(process: Process, x0: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """All that a network of such a process could be asked for, by prediction type."""
    if process.prediction_type == "flow":  # one that has learned nothing looks like one that predicts noise
        return {"flow": process.target(x0, t, noise), "sample": x0}
    v = process.q_sample(noise, t, -x0)  # √a noise - √(1 - a) x0
    return {"epsilon": noise, "v_prediction": v, "sample": x0}


@torch.no_grad()
def unexplained(
    process: Process, samples: Iterable[tuple[Batch, Predict]], *, shares: Sequence[float] = SHARES
) -> dict[str, float]:
    """Of each prediction type, what the network leaves of the target: Σ‖prediction - target‖² / Σ‖target‖².

    0: it is what it predicts; 1: no better than zeros; more: it says something else. The batches have latents.
    """
    sums: dict[str, Tensor] = {}
    for batch, predict in samples:
        assert batch.latents is not None, "pixels are encoded before"
        x0 = batch.latents
        for share in shares:
            t = process.at(torch.full((len(x0),), share, device=x0.device))
            predicted = predict(process.q_sample(x0, t, batch.noise), t, text=batch.text).float()
            for name, target in targets(process, x0, t, batch.noise).items():
                left_and_all = torch.stack([(predicted - target).square().sum(), target.square().sum()]).double()
                sums[name] = sums.get(name, 0) + left_and_all
    return {name: float(left / all_of_it) for name, (left, all_of_it) in sums.items()}


def suspected(process: Process, found: Mapping[str, float]) -> bool:
    """Whether a single picture leaves it open what the network predicts: a reason to look at more.

    It does not where another target is left clearly worse explained than the process's own, if that is believed, and
    else than by zeros.
    """
    own = process.prediction_type
    other = min(left for name, left in found.items() if name != own)
    return other < _CLEAR * (found[own] if found[own] < _BELIEVED[own] else 1)


def misread(process: Process, found: Mapping[str, float]) -> str | None:
    """What is wrong where the network clearly predicts something else than the process says, else None.

    That is where another target is explained in part and much better. A network that has learned nothing explains none,
    and one that knows other pictures than these passes too.
    """
    configured = process.prediction_type
    best = min(found, key=lambda name: found[name])
    if not found[configured] > _MUCH * found[best] or not found[best] < _BELIEVED[best]:
        return None
    return (
        f"model.path: its scheduler_config.json says prediction_type = {configured!r}, but what the model predicts "
        f"fits {best!r}: of noised training pictures it leaves {found[configured]:.0%} unexplained read as the first, "
        f"{found[best]:.0%} as the second. Correct that file; or, if you are sure, set run.check_model = false."
    )
