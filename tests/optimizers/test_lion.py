"""Lion against its paper's algorithm 2 in double precision."""

import torch

from lorakit.optimizers.lion import Settings, build


def test_the_papers_algorithm() -> None:
    settings = Settings(lr=0.01, betas=(0.8, 0.95), weight_decay=0.5)
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 30).view(5, 6))
    optimizer = build(settings, [{"params": [weight], "lr": 0.02, "name": "unet"}])
    expected, momentum = weight.detach().double(), torch.zeros(5, 6, dtype=torch.float64)
    for step in range(5):
        gradient = torch.cos(torch.arange(30) * (step + 1.0)).view(5, 6)
        weight.grad = gradient.clone()
        optimizer.step()
        direction = (0.8 * momentum + 0.2 * gradient.double()).sign()
        expected = expected - 0.02 * (direction + 0.5 * expected)
        momentum = 0.95 * momentum + 0.05 * gradient.double()
        torch.testing.assert_close(weight.detach().double(), expected, rtol=0, atol=1e-6)
