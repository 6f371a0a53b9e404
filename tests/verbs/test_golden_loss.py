"""No lever of speed or memory changes what is learned by more than its bound, and today's losses are yesterday's."""

import json
from collections.abc import Callable

import pytest

from lorakit.recipe import Recipe
from lorakit.training.keeper import Keeper
from lorakit.verbs.train import train

GOLDEN = [1.049793004989624, 1.1817768812179565, 1.02372145652771, 1.0745110511779785]
OTHER_MACHINES = 1e-3  # relative: other kernels, other libraries
# how far a loss may be from the plain path's, relative
LEVERS = {
    "adapter.fused=true": 1e-5,
    "data.workers=1": 0.0,
    "run.gradient_checkpointing=true": 1e-6,
    "run.gradient_checkpointing=0.5": 1e-6,
    "run.channels_last=true": 1e-5,
    "run.attention=math": 1e-5,
    "run.precision=bf16": 2e-2,
    "model.compute=int8": 1e-2,
    "model.compute=fp8": 1e-2,
}
# the same where convolutions are adapted as well
CONVOLUTIONS = "adapter.targets=all+conv"
GOLDEN_OF_CONVOLUTIONS = [1.049793004989624, 1.1707862615585327, 1.008888602256775, 1.0519459247589111]
LEVERS_OF_CONVOLUTIONS = {
    "adapter.fused=true": 1e-5,
    "adapter.fused=true run.channels_last=true": 1e-5,
    "adapter.fused=true run.precision=bf16": 2e-2,
}


@pytest.fixture
def losses(make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[float]]:
    """Those of four steps at a rate at which the adapter soon does something."""
    monkeypatch.setattr(Keeper, "finish", lambda self, step: self.output)

    def of(name: str, *overrides: str) -> list[float]:
        plain = ("run.steps=4", "run.save_every=0", "run.check_model=false", "adapter.fused=false")
        run = train(make_recipe(name, *plain, *overrides))
        return [json.loads(line)["loss"] for line in (run.output / "metrics.jsonl").read_text().splitlines()]

    return of


def test_golden_loss(losses: Callable[..., list[float]]) -> None:
    plain = losses("plain")
    assert plain == pytest.approx(GOLDEN, rel=OTHER_MACHINES)
    for number, (lever, bound) in enumerate(LEVERS.items()):
        assert losses(str(number), lever) == pytest.approx(plain, rel=bound, abs=0), lever


def test_golden_loss_of_convolutions(losses: Callable[..., list[float]]) -> None:
    plain = losses("plain", CONVOLUTIONS)
    assert plain == pytest.approx(GOLDEN_OF_CONVOLUTIONS, rel=OTHER_MACHINES)
    for number, (lever, bound) in enumerate(LEVERS_OF_CONVOLUTIONS.items()):
        assert losses(str(number), CONVOLUTIONS, *lever.split()) == pytest.approx(plain, rel=bound, abs=0), lever
