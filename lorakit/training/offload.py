"""What is kept in the CPU's memory while a GPU has no use for it: weights of frozen blocks, and activations.

A block's weights come before its forward and go after it; autograd holds on to them where it needs them. They never
change, so nothing is copied back. While a block computes, the one that followed it the last time is on its way.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

Wait = Callable[[], list[Tensor]]  # for the copies to have come
Move = Callable[[Sequence[Tensor]], Wait]


def some_of(blocks: Sequence[nn.Module], fraction: float) -> list[nn.Module]:
    """This fraction of `blocks`, at least one, evenly spread: those between give copies the time to come."""
    count = max(1, round(fraction * len(blocks)))
    return [blocks[i * len(blocks) // count] for i in range(count)]


class Offload:
    """The frozen weights of `blocks` in the CPU's memory; `start` makes them come and go."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.blocks = blocks
        self.slots = [list(_slots(block)) for block in blocks]
        self.stored = [[held[name] for held, name in slots] for slots in self.slots]

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Within it the blocks have none of these weights, and can be moved without them."""
        for slots in self.slots:
            for held, name in slots:
                held[name] = None
        try:
            yield
        finally:
            for slots, stored in zip(self.slots, self.stored, strict=True):
                _put(slots, stored)

    def start(self, move: Move, *, pinned: bool) -> None:
        self.move = move
        if pinned:
            _pin_no_more_than_asked()
            for stored in self.stored:
                for tensor in stored:
                    tensor.data = tensor.data.pin_memory()
        self.trail = (-1, -1)  # the last two blocks: whether it goes on or back is clear from two
        self.followed: dict[tuple[int, int], int] = {}
        self.coming: dict[int, Wait] = {}
        for i, block in enumerate(self.blocks):
            block.register_forward_pre_hook(lambda *_, i=i: self._bring(i))
            block.register_forward_hook(lambda *_, i=i: _put(self.slots[i], self.stored[i]), always_call=True)

    def _bring(self, i: int) -> None:
        wait = self.coming.pop(i, None) or self.move(self.stored[i])
        self.followed[self.trail] = i
        self.trail = (self.trail[1], i)
        foreseen = self.followed.get(self.trail)
        copies = wait()
        self.coming = {} if foreseen is None else {foreseen: self.move(self.stored[foreseen])}
        _put(
            self.slots[i],
            [
                nn.Parameter(c, False) if isinstance(s, nn.Parameter) else c
                for s, c in zip(self.stored[i], copies, strict=True)
            ],
        )


def to_gpu(device: torch.device) -> Move:
    """Copies to a GPU beside its computing. Not tried on one yet."""
    side = torch.cuda.Stream(device)

    def move(tensors: Sequence[Tensor]) -> Wait:
        # after all that is asked for already: so the memory of a block that has gone can be taken for the copies
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            copies = [tensor.detach().to(device, non_blocking=True) for tensor in tensors]

        def wait() -> list[Tensor]:
            torch.cuda.current_stream(device).wait_stream(side)
            return copies

        return wait

    return move


def activations_aside(*, pinned: bool = True) -> AbstractContextManager[Any]:
    """Within it, what the backward pass needs waits in the CPU's memory, all but weights.

    As `torch.autograd.graph.save_on_cpu`, which copies the frozen weights too. Not tried on a GPU yet.
    """

    def pack(tensor: Tensor) -> Any:
        weight = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
        if weight or not tensor.is_floating_point():  # bytes are weights too
            return tensor
        stored = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        stored.copy_(tensor, non_blocking=pinned)
        return stored, tensor.device

    def unpack(packed: Any) -> Tensor:
        return packed[0].to(packed[1], non_blocking=pinned) if isinstance(packed, tuple) else packed

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _pin_no_more_than_asked() -> None:
    """Else torch makes each pinned piece a power of two, and a model takes half as much memory again."""
    said, threshold = torch._C._accelerator_getAllocatorSettings(), "pinned_max_round_threshold_mb"
    if threshold not in said:
        torch._C._accelerator_setAllocatorSettings(",".join(filter(None, [said, f"{threshold}:1"])))


def _slots(block: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Where frozen weights and buffers of `block` are held."""
    for module in block.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and not tensor.requires_grad:
                    yield held, name


def _put(slots: Sequence[tuple[dict[str, Any], str]], tensors: Sequence[Tensor]) -> None:
    for (held, name), tensor in zip(slots, tensors, strict=True):
        held[name] = tensor
