"""The loss on pictures that are put aside: the same noises and timesteps every time, so that the numbers compare.

Here: one measurement. When it is made is the loop's affair; which pictures are put aside, `data/dataset.py`'s.
"""

from collections.abc import Iterable

import torch

from lorakit.core.processes import sum_tensors
from lorakit.core.types import Batch
from lorakit.training.step import Trainee, predictor, ready

DRAWS = 4  # timesteps of each picture, one from each quarter of their range


@torch.no_grad()
def validation_loss(trainee: Trainee, batches: Iterable[Batch]) -> tuple[float, int]:
    """The mean unweighted loss over this rank's `batches` and the other ranks', and the number of their samples.

    Dropout is off, and the training's random numbers are left as they were.
    """
    total = torch.zeros(2, device=trainee.device, dtype=torch.float64)
    for module in trainee.adapted.values():
        module.eval()
    try:
        for batch in batches:
            batch = ready(trainee, batch)
            with trainee.autocast():
                report = trainee.objective(predictor(trainee, batch), batch)
            total[0] += report.per_example.double().sum()
            total[1] += len(batch.keys)
    finally:
        for module in trainee.adapted.values():
            module.train()
    sum_tensors([total])
    loss, count = total.tolist()
    return loss / count, int(count)
