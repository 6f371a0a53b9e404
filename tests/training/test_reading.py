"""What a network predicts is told from its outputs, and nothing is said against one that has learned nothing."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lorakit.core.types import Batch, Process
from lorakit.diffusion import GaussianDiffusion, RectifiedFlow
from lorakit.training.reading import misread, suspected, targets, unexplained
from tests.training.test_step import batch

TYPES = ("epsilon", "v_prediction", "sample")
Network = Callable[[Tensor, Tensor], Tensor]


def pictures() -> Batch:
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 4, 3, 16, 16, generator=g)
    return replace(batch(range(4)), latents=x0, noise=noise)


def gaussian(kind: str) -> GaussianDiffusion:
    return GaussianDiffusion(beta_start=0.00085, beta_end=0.012, schedule="scaled_linear", prediction_type=kind)


def measured(process: Process, network: Network) -> dict[str, float]:
    return unexplained(process, [(pictures(), lambda x_t, t, *, text=None, adapter=True: network(x_t, t))])


def knowing(process: Process, kind: str, *, how_much: float) -> Network:
    """A network of another type than the process says, that knows so much of the pictures' variance."""
    given = pictures()
    assert given.latents is not None
    known = given.latents.clone()
    known[..., round(16 * how_much) :] = 0  # the best guess of who knows nothing of the rest

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        noise = (x_t - process.q_sample(known, t, torch.zeros_like(x_t))) / process.q_sample(
            torch.zeros_like(x_t), t, torch.ones_like(x_t)
        )
        return targets(process, known, t, noise)[kind]

    return network


@pytest.mark.parametrize("actual", TYPES)
@pytest.mark.parametrize("configured", TYPES)
def test_a_wrong_type_is_seen_and_a_right_one_is_not_objected_to(configured: str, actual: str) -> None:
    process = gaussian(configured)
    for how_much in (0.5, 0.75, 1.0):
        found = measured(process, knowing(process, actual, how_much=how_much))
        assert min(found, key=lambda name: found[name]) == actual
        problem = misread(process, found)
        if configured == actual:
            assert problem is None
        else:
            assert problem is not None and f"says prediction_type = {configured!r}" in problem
            assert f"fits {actual!r}" in problem and "run.check_model = false" in problem
        if how_much == 1:
            assert found[actual] < 1e-9


@pytest.mark.parametrize("kind", TYPES)
def test_one_picture_settles_it_where_the_own_target_is_clearly_the_best(kind: str) -> None:
    process = gaussian(kind)
    assert not suspected(process, measured(process, knowing(process, kind, how_much=0.9)))
    other, third = (name for name in TYPES if name != kind)
    assert not suspected(process, {kind: 0.2, other: 0.4, third: 2.0})
    assert suspected(process, {kind: 0.2, other: 0.25, third: 2.0}), "a picture may say so by chance"
    assert suspected(process, {kind: 0.95, other: 1.45, third: 2.0}), "so little explains no network's own target"
    assert not suspected(process, {kind: 1.1, other: 1.6, third: 2.0}), "it has learned nothing"


@pytest.mark.parametrize("claimed", TYPES)
@pytest.mark.parametrize("actual", TYPES)
def test_one_picture_never_settles_a_wrong_type(claimed: str, actual: str) -> None:
    for how_much in (0.0, 0.25, 0.5, 0.75, 1.0):
        found = measured(gaussian(claimed), knowing(gaussian(claimed), actual, how_much=how_much))
        if misread(gaussian(claimed), found):
            assert suspected(gaussian(claimed), found)
            continue
        assert claimed == actual or how_much < 0.5, "a test of anything"


def test_the_targets_are_the_processes_own() -> None:
    given = pictures()
    assert given.latents is not None
    t = torch.tensor([0, 300, 600, 999])
    for kind in TYPES:
        for name, target in targets(gaussian(kind), given.latents, t, given.noise).items():
            torch.testing.assert_close(target, gaussian(name).target(given.latents, t, given.noise))


def test_a_flow_may_predict_the_picture_instead() -> None:
    flow = RectifiedFlow()
    assert misread(flow, measured(flow, knowing(flow, "flow", how_much=0.5))) is None
    assert "fits 'sample'" in (misread(flow, measured(flow, knowing(flow, "sample", how_much=0.7))) or "")


@pytest.mark.parametrize("process", [*map(gaussian, TYPES), RectifiedFlow()], ids=[*TYPES, "flow"])
def test_a_network_that_has_learned_nothing_is_let_through(process: Process) -> None:
    assert misread(process, measured(process, knowing(process, process.prediction_type, how_much=0.0))) is None
    for scale in (-1.0, -0.5, -0.1, 0.0, 0.1, 0.3):  # what is x_t itself cannot be told from a guess of the noise
        for chance in (0.0, 0.3, 1.0):
            found = measured(process, passing_on(scale, chance))
            assert misread(process, found) is None, (scale, chance, found)


def passing_on(scale: float, chance: float) -> Network:
    """A network that gives back some of what it sees, and something of its own."""
    g = torch.Generator().manual_seed(1)
    return lambda x_t, t: scale * x_t + chance * torch.randn(x_t.shape, generator=g)
