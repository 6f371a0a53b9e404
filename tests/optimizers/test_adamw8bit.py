"""8-bit AdamW: the library's own, and near AdamW."""

import torch

from lorakit.optimizers import adamw
from lorakit.optimizers.adamw8bit import Settings, build

VALUES = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 0.1, "weight_decay": 0.5}


def run(optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter) -> torch.Tensor:
    for step in range(4):
        weight.grad = torch.cos(torch.arange(weight.numel()) * 0.7 + step)
        optimizer.step()
    return weight.detach()


def test_the_librarys_own() -> None:
    from bitsandbytes.optim import AdamW8bit

    ours, theirs, whole = (torch.nn.Parameter(torch.linspace(-1, 1, 5000)) for _ in range(3))
    optimizer = build(Settings(**VALUES), [{"params": [ours], "name": "unet"}])
    found = run(optimizer, ours)
    assert torch.equal(found, run(AdamW8bit([theirs], **VALUES), theirs))
    in_32 = run(adamw.build(adamw.Settings(**VALUES), [{"params": [whole]}]), whole)
    assert 0 < (found - in_32).abs().max() < 0.01 and (found - in_32).abs().mean() < 5e-4


def test_small_tensors_keep_their_precision() -> None:
    small, large = (torch.nn.Parameter(torch.ones(n)) for n in (4095, 4096))
    optimizer = build(Settings(), [{"params": [small, large]}])
    for p in (small, large):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[small]["state1"].dtype == torch.float32
    assert optimizer.state[large]["state1"].dtype == torch.uint8
