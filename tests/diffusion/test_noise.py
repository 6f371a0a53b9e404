"""Changed noise against its closed forms: covariances over many samples, and what it does to x_t and to the target."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit.core.errors import InputError
from lorakit.core.seeding import generator
from lorakit.core.settings import validate
from lorakit.core.types import Batch
from lorakit.diffusion import GaussianDiffusion, RectifiedFlow
from lorakit.diffusion.noise import Noise, _gain, extra, noises
from lorakit.diffusion.objectives.denoising import Settings, advice, build, problems

GAUSSIAN, FLOW = GaussianDiffusion(prediction_type="v_prediction"), RectifiedFlow()
EACH: dict[str, dict[str, Any]] = {
    "offset": {"strength": 0.5},
    "pyramid": {"iterations": 4, "discount": 0.6},
    "perturbation": {"gamma": 0.3},
}


def settings(**values: Any) -> Settings:
    return validate(Settings, {"noise": values}, where="objective", name="denoising")


def batch_of(noise: Noise, numbers: range, *, shape: tuple[int, ...] = (2, 4, 4)) -> Batch:
    """Samples as the loader gives them."""
    count = len(numbers)
    drawn = [extra(noise, shape, partial(generator, 0, n)) for n in numbers]
    return Batch(
        keys=("a",) * count,
        numbers=tuple(numbers),
        captions=("",) * count,
        latents=torch.stack([1 + torch.randn(shape, generator=generator(0, n, "latents")) for n in numbers]),
        noise=torch.stack([torch.randn(shape, generator=generator(0, n, "noise")) for n in numbers]),
        quantile=torch.stack([torch.rand((), generator=generator(0, n, "timestep")) for n in numbers]),
        weight=torch.ones(count),
        text={},
        extra={name: torch.stack([sample[name] for sample in drawn]) for name in drawn[0]},
    )


def covariance(x: Tensor) -> tuple[Tensor, float]:
    """The covariance of the samples' numbers, known to be of mean 0, and four standard errors of an entry."""
    flat = x.flatten(1).double()
    return flat.T @ flat / len(flat), 4 * math.sqrt(2 / len(flat))


def of_target(noise: Noise, count: int, shape: tuple[int, ...]) -> Tensor:
    return noises(noise, batch_of(noise, range(count), shape=shape))[0]


# -- offset -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("random", "share"), [(False, 1.0), (True, 1 / 3)])
def test_offset_noise_is_correlated_within_a_channel_and_nowhere_else(random: bool, share: float) -> None:
    """I + strength² · 1 within a channel; a strength times a uniform number has a third of the variance."""
    noise = settings(offset={"strength": 0.7, "random": random}).noise
    found, error = covariance(of_target(noise, 4000, (2, 2, 3)))
    expected = torch.eye(12).double() + 0.7**2 * share * torch.block_diag(*[torch.ones(6, 6).double()] * 2)
    assert (found - expected).abs().max() < 2 * error
    assert (found - torch.eye(12)).abs().max() > 2 * error


def test_adaptive_offset_goes_by_each_channels_own_mean() -> None:
    noise = settings(offset={"strength": 0.1, "adaptive": -0.2}).noise
    batch = batch_of(noise, range(50))
    assert batch.latents is not None and batch.extra is not None
    strength = 0.1 - 0.2 * batch.latents.mean((2, 3)).abs()
    assert bool((strength < 0).any()) and bool((strength > 0).any())
    moved = noises(noise, batch)[0] - batch.noise
    torch.testing.assert_close(moved.std((2, 3)), torch.zeros(50, 2), rtol=0, atol=1e-6)
    torch.testing.assert_close(moved.mean((2, 3)), strength.clamp(min=0) * batch.extra["offset"][..., 0, 0])


# -- pyramid ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [{}, {"iterations": 3, "discount": 1.0}], ids=str)
def test_pyramid_noise_has_variance_1_at_every_place(values: dict[str, Any]) -> None:
    """And neighbours are alike, the more the more the lower resolutions count."""
    noise = settings(pyramid=values).noise
    batch = batch_of(noise, range(3000), shape=(1, 7, 5))
    assert batch.extra is not None
    ratio = (batch.extra["pyramid"] / batch.extra["variance"].sqrt()).square().mean()
    assert ratio.item() == pytest.approx(1, abs=0.06)
    drawn = noises(noise, batch)[0]
    found, error = covariance(drawn)
    assert (found.diagonal() - 1).abs().max() < 1.2 * error
    beside = (drawn[..., 1:] * drawn[..., :-1]).mean()
    assert beside > (0.3 if values else 0.02)


def test_a_pyramid_of_one_pixel_is_an_offset_in_closed_form() -> None:
    """2 × 2 pixels over 1: (√2 ε + d z) / √(2 + d²)."""
    noise = settings(pyramid={"iterations": 2, "discount": 0.8}).noise
    found, error = covariance(of_target(noise, 3000, (2, 2, 2)))
    one = torch.ones(4, 4).double()
    expected = (2 * torch.eye(8).double() + 0.8**2 * torch.block_diag(one, one)) / (2 + 0.8**2)
    assert (found - expected).abs().max() < error


@pytest.mark.parametrize(("low", "high"), [(1, 4), (2, 7), (3, 5), (13, 64)])
def test_the_gain_of_enlarging_is_that_of_its_matrix(low: int, high: int) -> None:
    """Of a whole picture, by its own matrix of size (high · 6) × (low · 2)."""
    basis = torch.eye(low * 2).reshape(low * 2, 1, low, 2)
    matrix = torch.nn.functional.interpolate(basis, size=(high, 6), mode="bilinear").flatten(1)
    expected = matrix.square().sum(0).reshape(high, 6)
    torch.testing.assert_close(_gain(low, high)[:, None] * _gain(2, 6), expected)


# -- perturbation, and all together -----------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [GAUSSIAN, FLOW], ids=["gaussian", "flow"])
def test_perturbation_is_in_the_input_and_not_in_the_target(process: Any) -> None:
    """x_t has gamma times more noise, sigma_t · gamma · z; loss and gradient are those of the unperturbed target."""
    chosen = settings(perturbation={"gamma": 0.3})
    batch = batch_of(chosen.noise, range(6))
    assert batch.extra is not None and batch.latents is not None
    seen: list[Tensor] = []
    answer = torch.zeros(6, 2, 4, 4, requires_grad=True)

    def predict(x_t: Tensor, t: Tensor, *, text: Any = None, adapter: bool = True) -> Tensor:
        seen.append(x_t)
        return answer

    results = []
    for given in (chosen, Settings()):
        answer.grad = None
        report = build(given, process)(predict, batch)
        report.per_example.sum().backward()
        results.append((report.per_example.detach(), answer.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] is not None and results[1][1] is not None and torch.equal(results[0][1], results[1][1])
    sigma = process.q_sample(0 * batch.latents, report.t, torch.ones_like(batch.noise))
    torch.testing.assert_close(seen[0] - seen[1], sigma * 0.3 * batch.extra["perturbation"], rtol=1e-5, atol=1e-6)


def test_a_random_perturbation_is_of_another_size_for_each_sample() -> None:
    noise = settings(perturbation={"gamma": 0.5, "random": True}).noise
    batch = batch_of(noise, range(500), shape=(1, 32, 32))
    target, seen = noises(noise, batch)
    assert torch.equal(target, batch.noise)
    sizes = ((seen - target).flatten(1).std(1) / 0.5).sort().values
    assert (sizes - torch.linspace(0, 1, 500)).abs().max() < 0.12  # uniform: each is known to 2 %, the law to 7


def test_together_the_pyramid_comes_first_and_the_offset_on_top() -> None:
    one = {name: settings(**{name: values}).noise for name, values in EACH.items()}
    both = settings(**EACH).noise
    batch = batch_of(both, range(5))
    target, seen = noises(both, batch)
    pyramid = noises(one["pyramid"], batch)[0]
    torch.testing.assert_close(target, noises(one["offset"], replace(batch, noise=pyramid))[0])
    torch.testing.assert_close(seen - target, noises(one["perturbation"], batch)[1] - batch.noise)


@pytest.mark.parametrize("name", EACH)
def test_a_batch_without_draws_has_plain_noise(name: str) -> None:
    """As validation's, whose losses compare between runs; and what is drawn changes the loss."""
    chosen = settings(**{name: EACH[name]})
    batch = batch_of(chosen.noise, range(4))
    held_out = replace(batch, extra=None)

    def loss(given: Settings, batch: Batch) -> Tensor:
        return build(given, GAUSSIAN)(lambda x_t, t, *, text=None, adapter=True: 0.3 * x_t, batch).per_example

    assert torch.equal(loss(chosen, held_out), loss(Settings(), batch))
    assert not torch.allclose(loss(chosen, batch), loss(Settings(), batch), rtol=1e-3)


@pytest.mark.parametrize("name", EACH)
def test_a_sample_is_the_same_in_any_company(name: str) -> None:
    noise = settings(**{name: {**EACH[name], **({"adaptive": 0.5} if name == "offset" else {})}}).noise
    whole = noises(noise, batch_of(noise, range(6)))
    for cut in (range(2), range(2, 6), range(5, 6)):
        for part, all_of_it in zip(noises(noise, batch_of(noise, cut)), whole):
            assert torch.equal(part, all_of_it[cut.start : cut.stop])


# -- what is refused --------------------------------------------------------------------------------------------------


def test_other_noise_is_refused_for_a_flow_and_advised_against_where_no_signal_is_left() -> None:
    zero = GaussianDiffusion(zero_terminal_snr=True)
    keys = ["objective.noise.offset", "objective.noise.pyramid"]
    found = problems(settings(**EACH), FLOW)
    assert [problem.split(" ")[0] for problem in found] == keys and all("Leave the section out" in p for p in found)
    told = advice(settings(**EACH), zero)
    assert [text.partition(":")[0] for text in told] == keys and all("Leave it out" in text for text in told)
    for process in (zero, GaussianDiffusion()):
        assert problems(settings(**EACH), process) == []
    for process in (FLOW, GaussianDiffusion()):
        assert advice(settings(**EACH), process) == []
    for process in (FLOW, zero):
        assert problems(settings(perturbation={}), process) == advice(settings(perturbation={}), process) == []


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"offset": {"strength": 0.0}}, "objective.noise.offset: strength = 0 without adaptive above 0"),
        ({"offset": {"strength": 0.0, "adaptive": -1.0}}, "objective.noise.offset: strength = 0 without"),
        ({"pyramid": {"iterations": 1}}, "objective.noise.pyramid.iterations = 1: "),
        ({"pyramid": {"gamma": 0.1}}, "objective.noise.pyramid.gamma is not a setting of denoising."),
        ({"perturbation": {"gamma": 0.0}}, "objective.noise.perturbation.gamma = 0.0: "),
        ({"offsets": {}}, "objective.noise.offsets is not a setting of denoising. Did you mean offset?"),
    ],
)
def test_settings_without_a_meaning_are_refused(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError) as caught:
        settings(**values)
    assert len(caught.value.problems) == 1 and caught.value.problems[0].startswith(problem)
