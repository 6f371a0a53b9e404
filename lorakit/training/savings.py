"""What settings would save of the memory of a micro step: told where it does not fit."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lorakit.training.execution import repeated
from lorakit.training.step import Trainee

_NF4 = 9 / 16  # bytes of a weight: 4 bits, and a scale in single precision for each 64


class Kept:
    """Bytes that autograd has kept for the backward pass, but for weights."""

    bytes = 0


@contextlib.contextmanager
def counted(trainee: Trainee) -> Iterator[Kept]:
    """Counts what is kept within it, but for compiled blocks, which would be compiled anew for it."""
    kept, seen = Kept(), set()
    if any(module._compiled_call_impl for part in trainee.adapted.values() for module in part.modules()):
        yield kept
        return

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        weight = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
        if not weight and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept.bytes += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def savings(trainee: Trainee, *, examples: int, kept: int) -> dict[str, int]:
    """Bytes that settings would save, the most first, for a micro step of `examples` that keeps so many bytes for its
    backward pass, or as many as it came to."""
    backbone = trainee.adapted.get(trainee.family.backbone)
    found: dict[str, float] = {}
    if examples > 1:
        found[f"run.batch_size = 1 with run.accumulate {examples} times as high"] = kept * (1 - 1 / examples)
    if trainee.computed_again < 1:
        found["run.gradient_checkpointing = true"] = kept
    if backbone is not None:
        layers = {layer for layer in repeated(backbone) if type(layer) is nn.Linear}
        frozen = [layer.weight for layer in layers if not layer.weight.requires_grad]
        found['model.quantize = "nf4"'] = sum(weight.nbytes - _NF4 * weight.numel() for weight in frozen)
        if trainee.device.type == "cuda":
            held = sum(weight.nbytes for weight in frozen if weight.device.type == "cuda")
            found["run.offload = 0.5 (with run.gradient_checkpointing)"] = held / 2
    if type(trainee.optimizer) is torch.optim.AdamW:
        found['optimizer.kind = "adamw8bit"'] = 2 * 0.75 * sum(p.nbytes for p in trainee.parameters.values())
    ordered = sorted(found, key=lambda setting: found[setting], reverse=True)
    return {setting: int(found[setting]) for setting in ordered if found[setting] >= 1}
