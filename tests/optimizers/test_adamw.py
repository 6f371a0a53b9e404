"""AdamW as the recipe says it."""

import torch

from lorakit.optimizers.adamw import Settings, build


def test_settings_arrive_in_torch() -> None:
    settings = Settings(lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.5)
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = build(settings, [{"params": [weight], "lr": 0.02, "name": "unet"}])
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.02, (0.8, 0.9), 1e-6, 0.5)
    weight.grad = torch.zeros(3)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((3,), 1 - 0.02 * 0.5))
