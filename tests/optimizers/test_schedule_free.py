"""Schedule-free AdamW against its paper in double precision: z, x and y, under a warm-up of ours."""

import pytest
import torch
from torch import Tensor

from lorakit.optimizers.schedule_free import Settings, build
from lorakit.optimizers.state import weights_to_use

BETA1, BETA2, EPS, DECAY = 0.8, 0.95, 0.1, 0.1
RATES = [0.01, 0.02, 0.03, 0.03, 0.03]


def gradient(step: int) -> Tensor:
    return torch.cos(torch.arange(30) * (step + 1.0)).view(5, 6)


def test_the_papers_algorithm() -> None:
    """arXiv:2405.15682, algorithm 1, its averages weighted by the square of the largest rate so far (section 4.2)."""
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 30).view(5, 6))
    settings = Settings(lr=0.03, betas=(BETA1, BETA2), eps=EPS, weight_decay=DECAY)
    optimizer = build(settings, [{"params": [weight], "name": "unet"}])
    start = weights_to_use(optimizer, {"unet.w": weight})
    assert start is not None and torch.equal(start["unet.w"], weight)
    x = z = y = weight.detach().double()
    v, total = torch.zeros_like(z), 0.0
    for step, rate in enumerate(RATES):
        weight.grad = gradient(step)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        g = gradient(step).double()
        v = BETA2 * v + (1 - BETA2) * g * g
        total += rate**2
        z = z - rate * (g / ((v / (1 - BETA2 ** (step + 1))).sqrt() + EPS) + DECAY * y)
        x = x + (rate**2 / total) * (z - x)
        y = (1 - BETA1) * z + BETA1 * x
        torch.testing.assert_close(weight.detach().double(), y, rtol=0, atol=1e-5)
        before = weight.detach().clone()
        found = weights_to_use(optimizer, {"unet.w": weight})
        assert found is not None
        torch.testing.assert_close(found["unet.w"].double(), x, rtol=0, atol=1e-5)
        assert torch.equal(weight, before) and optimizer.param_groups[0]["train_mode"]
    assert (x - y).abs().max() > 1e-3  # else the two could not be told apart


def test_the_weights_to_use_are_the_librarys_own() -> None:
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (30, 7)]
    optimizer = build(Settings(), [{"params": [w], "name": str(i)} for i, w in enumerate(weights)])
    for step in range(3):
        for w in weights:
            w.grad = torch.cos(torch.arange(len(w)) * (step + 1.0))
        optimizer.step()
    found = weights_to_use(optimizer, {str(i): w for i, w in enumerate(weights)})
    assert found is not None
    optimizer.eval()  # type: ignore[attr-defined]
    assert all(torch.equal(found[str(i)], w) for i, w in enumerate(weights))


def test_others_use_what_they_train() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    assert weights_to_use(torch.optim.AdamW([weight]), {"w": weight}) is None


def test_the_average_needs_a_share() -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        Settings(betas=(0.0, 0.9))
