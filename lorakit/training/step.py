"""One optimizer step: micro steps forward and backward, gradients summed over the ranks, clipped, one update.

The loss of a step is the sum of the weighted example losses over the number of examples in the global batch, on however
many ranks and micro steps they were computed. Not here: what the loop does between steps (`loop.py`).
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters.ema import Average
from lorakit.adapters.state import adapters_disabled
from lorakit.core.errors import InputError
from lorakit.core.files import printable
from lorakit.core.processes import rank, sum_tensors, world
from lorakit.core.seeding import hashed
from lorakit.core.transfer import on_device, sent
from lorakit.core.types import Batch, LossReport, Predict, Text
from lorakit.data.plan import share
from lorakit.families.protocol import Family
from lorakit.optimizers.state import guarded_step
from lorakit.training.execution import Kernel, attention
from lorakit.training.offload import activations_aside
from lorakit.training.sharding import jointly


@dataclass(frozen=True)
class Trainee:
    """What is trained and how: the parts of a step that stay the same for the whole run.

    `adapted` are the family's components that carry an adapter, `parameters` all trainable weights by name, `average`
    their moving average if there is one; `group_state` names what the optimizer itself changes in its groups;
    `preserves` says whether the objective keeps the base somewhere, `computed_again` of how many of the blocks the
    backward pass makes the activations, `sharded` whether a forward needs all ranks.
    """

    family: Family
    encode_text: Callable[[Sequence[str]], Text]
    adapted: Mapping[str, nn.Module]
    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    group_state: tuple[str, ...]
    average: Average | None
    objective: Callable[[Predict, Batch], LossReport]
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]]
    scaler: torch.amp.GradScaler | None
    max_grad_norm: float
    seed: int
    preserves: bool = False
    computed_again: float = 0.0
    attention: Kernel = "auto"
    offload_activations: bool = False
    sharded: bool = False


@dataclass(frozen=True)
class StepReport:
    """`loss` of the global batch, `grad_norm` before clipping, whether the update was `skipped`, and what the ranks'
    `votes` add up to. `preservation` is the part of the loss that is for keeping the base.

    A skip is an `overflow` while fp16's loss scale can still fall: it does, and says nothing about the training.
    `losses` and `timesteps` are those of the global batch's samples, in their order and on all ranks the same; a
    source's weight is not in them, nor what is for keeping the base. `before()` are the weights that the loss belongs
    to.
    """

    loss: float
    preservation: float
    grad_norm: float
    skipped: bool
    overflow: bool
    votes: tuple[float, ...]
    losses: tuple[float, ...]
    timesteps: tuple[float, ...]
    before: Callable[[], Mapping[str, Tensor]]


def predictor(trainee: Trainee, batch: Batch) -> Predict:
    """The closure through which an objective sees the model."""

    def predict(x_t: Tensor, t: Tensor, *, text: Text | Sequence[str] | None = None, adapter: bool = True) -> Tensor:
        if not adapter:
            with adapters_disabled(trainee.adapted):
                return predict(x_t, t, text=text)
        text = batch.captions if text is None else text
        states = text if isinstance(text, Mapping) else trainee.encode_text(text)
        return predicted(trainee.family, batch, x_t, t, states)

    return predict


def predicted(family: Family, batch: Batch, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
    """What the model says at x_t and t, told of the batch all else than its text."""
    shown = {} if batch.beside is None else {"beside": batch.beside}  # most families take none
    return family.predict(x_t, t, text, sizes=batch.sizes, **shown)


def ready(trainee: Trainee, batch: Batch) -> Batch:
    """`batch` on the device, its pixels encoded where it has no latents yet.

    Raises InputError naming the picture whose latents are not finite.
    """
    return encoded(trainee.family, on_device(batch, trainee.device))


@torch.no_grad()
def encoded(family: Family, batch: Batch) -> Batch:
    """`batch` with latents of its pixels, and what the backbone sees of what it is given; as `ready`."""
    if batch.given is not None:
        batch = replace(batch, beside=family.encode_given(batch.given).float(), given=None)
    if batch.latents is None:
        assert batch.pixels is not None, "a batch has latents or pixels"
        latents = family.encode_images(batch.pixels).float()
        bad = [key for key, of_picture in zip(batch.keys, latents) if not bool(of_picture.isfinite().all())]
        if bad:
            raise InputError([f"{printable(key)}: its latents are not finite: look at the picture." for key in bad])
        batch = replace(batch, latents=latents, pixels=None)
    return batch


def forward_backward(trainee: Trainee, batch: Batch, *, count: int) -> tuple[Tensor, LossReport]:
    """This micro step's part of the loss, and what of that is for keeping the base, (2,), its gradients accumulated;
    `count` examples are in the global batch."""
    # dropout inside the model draws from the global generators: tie them to the sample, not to the past
    torch.manual_seed(hashed(trainee.seed, batch.numbers[0], "dropout"))
    aside = activations_aside() if trainee.offload_activations else contextlib.nullcontext()
    with attention(trainee.attention), aside:  # what is computed again in the backward pass, too
        with trainee.autocast():
            report = trainee.objective(predictor(trainee, batch), batch)
        kept = torch.zeros_like(report.per_example) if report.preservation is None else report.preservation
        loss = ((report.per_example + kept) * batch.weight).sum() / count
        (trainee.scaler.scale(loss) if trainee.scaler else loss).backward()
    return torch.stack([loss.detach(), (kept.detach() * batch.weight).sum() / count]), report


def run_step(
    trainee: Trainee,
    batches: Sequence[Batch],
    *,
    padding: Sequence[Batch] = (),
    count: int,
    lr_factor: float,
    votes: Sequence[float] = (),
) -> StepReport:
    """One update from this rank's `batches` of a global batch of `count` examples. `padding` are more of weight 0, as
    ranks that share the model have to run equally many.

    A non-finite loss, gradient, moment or weight leaves weights and moments as they were; that is decided on the
    device, and the host reads all it wants to know at once. `votes` are summed over the ranks on the way, so that all
    ranks decide alike at the same step.
    """
    parameters = list(trainee.parameters.values())
    trainee.optimizer.zero_grad(set_to_none=True)
    losses, own = torch.zeros(2, device=trainee.device), torch.zeros(2, count, device=trainee.device)
    place = share(count, rank(), world()).start
    if trainee.scaler:
        trainee.scaler.scale(losses)  # makes its tensors, which a rank without a share needs too
    with jointly(sharded=trainee.sharded):
        for batch in batches:
            parts, report = forward_backward(trainee, ready(trainee, batch), count=count)
            losses += parts
            end = place + len(batch.keys)
            own[0, place:end], own[1, place:end] = report.per_example.detach(), report.t
            place = end
        for batch in padding:
            losses += forward_backward(trainee, ready(trainee, batch), count=count)[0]
    for parameter in parameters:
        if parameter.grad is None:  # a rank without a share contributes zeros
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    ballot = sent(votes, trainee.device)
    sum_tensors([losses, ballot, own, *gradients])  # of what is another rank's, `own` holds zeros
    if trainee.scaler:
        trainee.scaler.unscale_(trainee.optimizer)
    norm = nn.utils.get_total_norm(gradients)
    if trainee.max_grad_norm:
        nn.utils.clip_grads_with_norm_(parameters, trainee.max_grad_norm, norm)
    for group in trainee.optimizer.param_groups:
        group["lr"] = group["full_lr"] * lr_factor
    # a norm that overflows is refused too: clipping would make nothing of such gradients
    taken = guarded_step(trainee.optimizer, trainee.parameters, norm.isfinite() & losses[0].isfinite())
    overflow = False
    if trainee.scaler:
        scale = trainee.scaler.get_scale()
        trainee.scaler.update()  # lowers the scale where unscaling met a non-finite gradient
        overflow = scale > 1
    of_step = torch.stack([*losses.double(), norm.double(), taken.good.double()])
    numbers = torch.cat([of_step, own.flatten().double(), ballot.double()]).tolist()
    good = bool(numbers[3])
    taken.settle(good)
    return StepReport(
        loss=numbers[0],
        preservation=numbers[1],
        grad_norm=numbers[2],
        skipped=not good,
        overflow=overflow and not good,
        votes=tuple(numbers[4 + 2 * count :]),
        losses=tuple(numbers[4 : 4 + count]),
        timesteps=tuple(numbers[4 + count : 4 + 2 * count]),
        before=taken.before,
    )


def learning_rates(trainee: Trainee, lr_factor: float) -> dict[str, float]:
    """The rates of a step as `metrics.jsonl` names them: `lr` of the backbone, `lr_<group>` of the others."""
    rates = {}
    for group in trainee.optimizer.param_groups:
        name = "lr" if group["name"] == trainee.family.backbone else f"lr_{group['name']}"
        rates[name] = group["full_lr"] * lr_factor
    return rates
