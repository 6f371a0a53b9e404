"""8-bit Lion: the library's own, and near Lion."""

import torch

from lorakit.optimizers import lion
from lorakit.optimizers.lion8bit import Settings, build


def run(optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter) -> torch.Tensor:
    for step in range(4):
        weight.grad = torch.cos(torch.arange(5000) * 0.7 + step)
        optimizer.step()
    return weight.detach()


def test_the_librarys_own() -> None:
    from bitsandbytes.optim import Lion8bit

    ours, theirs, whole = (torch.nn.Parameter(torch.linspace(-1, 1, 5000)) for _ in range(3))
    optimizer = build(Settings(lr=0.01, betas=(0.8, 0.95), weight_decay=0.5), [{"params": [ours], "name": "unet"}])
    found = run(optimizer, ours)
    assert torch.equal(found, run(Lion8bit([theirs], lr=0.01, betas=(0.8, 0.95), weight_decay=0.5), theirs))
    assert optimizer.state[ours]["state1"].dtype == torch.uint8
    in_32 = run(lion.build(lion.Settings(lr=0.01, betas=(0.8, 0.95), weight_decay=0.5), [{"params": [whole]}]), whole)
    # the momentum's rounding turns a sign here and there
    assert 0.95 < (found - in_32).abs().lt(1e-6).float().mean() < 1
