"""How many processes train together, which of them this is, and what they say to each other.

Thin functions on torch.distributed that are right with one process too, so that nobody asks whether it is initialised.
Starting the processes is Accelerate's work (training/).
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def barrier() -> None:
    if world() > 1:
        dist.barrier()


def leave() -> None:
    """Ends the connection to the others; without it gloo's threads now and then abort a process that is done."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in rank order, on every rank."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def on_first_rank(action: Callable[[], T]) -> T:
    """What `action` returns on rank 0, on every rank; what it raises there, every rank raises."""
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome = [action(), None]
        except Exception as error:
            if world() == 1:
                raise
            outcome = [None, error]
    if world() > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def sum_tensors(tensors: Iterable[Tensor]) -> None:
    """Adds up `tensors` over the ranks, in place and in rank order: one gather of one flat buffer.

    A gather and a sum in a fixed order, not an all-reduce, whose order may depend on the number of elements.
    """
    if world() == 1:
        return
    tensors = list(tensors)
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    parts = [torch.empty_like(flat) for _ in range(world())]
    dist.all_gather(parts, flat)
    total = parts[0]
    for part in parts[1:]:
        total += part
    offset = 0
    for tensor in tensors:
        tensor.copy_(total[offset : offset + tensor.numel()].view_as(tensor))
        offset += tensor.numel()
