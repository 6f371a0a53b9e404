"""The loss on pictures that are put aside: the same noises and timesteps every time, so that the numbers compare.

Here: one measurement. When it is made is the loop's affair; which pictures are put aside, `data/dataset.py`'s.
"""

from collections.abc import Callable, Iterable

import torch

from lorakit.core.processes import gather_objects, sum_tensors
from lorakit.core.types import Batch
from lorakit.training.step import Trainee, predictor, ready

DRAWS = 4  # timesteps of each picture, one from each quarter of their range


@torch.no_grad()
def validation_loss(
    trainee: Trainee, batches: Iterable[Batch], *, abandon: Callable[[], bool] = lambda: False
) -> tuple[float, int] | None:
    """The mean unweighted loss over this rank's `batches` and the other ranks', and the number of their samples.

    None on all ranks where `abandon`, asked before each batch, said so on one; and where one fails, all raise. Dropout
    is off, and the training's random numbers are left as they were.
    """
    total = torch.zeros(4, device=trainee.device, dtype=torch.float64)  # loss, samples, ranks that gave up, that failed
    failure: Exception | None = None
    for module in trainee.adapted.values():
        module.eval()
    try:
        for batch in batches:
            if abandon():
                total[2] = 1
                break
            batch = ready(trainee, batch)
            with trainee.autocast():
                report = trainee.objective(predictor(trainee, batch), batch)
            total[0] += report.per_example.double().sum()
            total[1] += len(batch.keys)
    except Exception as error:  # the others wait for this rank's numbers
        failure, total[3] = error, 1
    finally:
        for module in trainee.adapted.values():
            module.train()
    sum_tensors([total])
    loss, count, gave_up, failed = total.tolist()
    if failed:
        reasons = gather_objects(None if failure is None else f"{type(failure).__name__}: {failure}")
        raise failure or RuntimeError("; ".join(filter(None, reasons)))
    return None if gave_up else (loss / count, int(count))
