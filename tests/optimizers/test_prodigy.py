"""Prodigy: the library's own with our settings, and it finds a rate."""

import math

import pytest
import torch

from lorakit.optimizers.prodigy import Settings, build
from lorakit.optimizers.state import adapted_rate


def bowl(optimizer: torch.optim.Optimizer, weights: list[torch.nn.Parameter], steps: int) -> float:
    loss = math.nan
    for _ in range(steps):
        optimizer.zero_grad()
        value = torch.stack([(w - 1).square().sum() for w in weights]).sum()
        value.backward()
        optimizer.step()
        loss = value.item()
    return loss


def test_the_librarys_own(capsys: pytest.CaptureFixture[str]) -> None:
    from prodigyopt import Prodigy

    values = {
        "lr": 0.5,
        "betas": (0.8, 0.95),
        "eps": 0.1,
        "d0": 1e-4,
        "d_coef": 2.0,
        "growth_rate": 1.02,
        "slice_p": 3,
    }
    ours, theirs = ([torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (30, 7)] for _ in range(2))
    optimizer = build(
        Settings(**values, weight_decay=0.1), [{"params": [w], "name": str(i)} for i, w in enumerate(ours)]
    )
    assert capsys.readouterr().out == ""  # standard output is the user's
    stock = Prodigy(theirs, **values, weight_decay=0.1, use_bias_correction=True, safeguard_warmup=True)
    assert bowl(optimizer, ours, 20) == bowl(stock, theirs, 20)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    assert adapted_rate(optimizer) == adapted_rate(stock) != {"d": 1e-4}


def test_it_finds_a_rate() -> None:
    weights = [torch.nn.Parameter(torch.zeros(10))]
    optimizer = build(Settings(), [{"params": weights, "name": "unet"}])
    assert adapted_rate(optimizer) == {"d": 1e-6}
    assert bowl(optimizer, weights, 1) == 10
    assert bowl(optimizer, weights, 150) < 1
    assert 1e-3 < adapted_rate(optimizer)["d"] < 10
