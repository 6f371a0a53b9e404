"""What settings are said to save is what they save."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from lorakit.adapters import lora
from lorakit.families.quantized import quantize
from lorakit.training.savings import counted, savings
from tests.training.test_step import trainee


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(3))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_savings_are_those_of_the_numbers() -> None:
    model = Model()
    plain = sum(parameter.nbytes for parameter in model.parameters())
    small = Model()
    quantize(small, "nf4")
    taken = sum(t.nbytes for t in (*small.parameters(), *small.buffers()))
    lora.inject(model, lora.Settings(rank=1), targets=["0"], seed=0)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    t = replace(trainee(), adapted={"unet": model}, parameters=trained)
    t = replace(t, optimizer=torch.optim.AdamW(trained.values()))
    x = torch.ones(4, 64)
    with counted(t) as kept:
        model(x)
    # the first layer's input and three of tanh's outputs, of which two are the next layers' inputs; three of rank 1
    assert kept.bytes == 4 * 4 * (4 * 64 + 3)
    found = savings(t, examples=4, kept=kept.bytes)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert found['model.quantize = "nf4"'] == plain - taken
    assert found["run.gradient_checkpointing = true"] == kept.bytes
    assert found["run.batch_size = 1 with run.accumulate 4 times as high"] == kept.bytes * 3 // 4
    assert found['optimizer.kind = "adamw8bit"'] == 1.5 * 4 * 3 * 128
    t = replace(t, computed_again=1.0)
    assert not any("checkpointing" in key or "batch" in key for key in savings(t, examples=1, kept=1))
