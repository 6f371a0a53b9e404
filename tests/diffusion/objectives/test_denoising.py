"""The denoising objective in closed form: what a known prediction costs, at which t, with which weight."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit.core.types import Batch
from lorakit.diffusion import GaussianDiffusion
from lorakit.diffusion.objectives import OBJECTIVES
from lorakit.diffusion.objectives.denoising import MinSNR, Settings, build, min_snr_weight, per_example, timesteps


def batch(count: int = 4) -> Batch:
    g = torch.Generator().manual_seed(0)
    return Batch(
        keys=tuple("abcd"[:count]),
        numbers=tuple(range(count)),
        captions=tuple("abcd"[:count]),
        latents=torch.randn(count, 2, 4, 4, generator=g),
        noise=torch.randn(count, 2, 4, 4, generator=g),
        quantile=torch.linspace(0, 0.999, count),
        weight=torch.ones(count),
        text={},
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_prediction_that_is_off_by_a_constant_costs_its_square(prediction_type: str) -> None:
    process = GaussianDiffusion(prediction_type=prediction_type)
    given = batch()
    seen: list[Tensor] = []

    def predict(x_t: Tensor, t: Tensor, *, text: Any = None, adapter: bool = True) -> Tensor:
        seen.append(x_t)
        return process.target(given.latents, t, given.noise) + torch.arange(4.0).view(4, 1, 1, 1)

    report = build(Settings(), process)(predict, given)
    torch.testing.assert_close(report.per_example, torch.tensor([0.0, 1.0, 4.0, 9.0]))
    assert report.t.tolist() == [0, 333, 666, 999]
    torch.testing.assert_close(seen[0], process.q_sample(given.latents, report.t, given.noise))


def test_the_uniform_law_gives_every_timestep_alike() -> None:
    quantile = (torch.arange(4000) + 0.5) / 4000
    t = timesteps(quantile, 1000)
    assert t.bincount().tolist() == [4] * 1000
    assert int(timesteps(torch.tensor([1 - 2**-24]), 1000)) == 999


def test_min_snr_weights_in_closed_form() -> None:
    snr = torch.tensor([0.0, 0.5, 5.0, 20.0], dtype=torch.float64)
    assert min_snr_weight(snr, 5.0, "epsilon").tolist() == [1.0, 1.0, 1.0, 0.25]
    assert min_snr_weight(snr, 5.0, "v_prediction").tolist() == pytest.approx([0, 0.5 / 1.5, 5 / 6, 5 / 21])
    assert min_snr_weight(snr, 5.0, "sample").tolist() == [0.0, 0.5, 5.0, 5.0]


def test_min_snr_means_the_same_loss_of_x0_in_every_prediction_type() -> None:
    given = batch()
    losses = []
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        process = GaussianDiffusion(prediction_type=prediction_type)
        objective = build(Settings(weighting=MinSNR(kind="min_snr", gamma=3.0)), process)

        def predict(
            x_t: Tensor, t: Tensor, *, text: Any = None, adapter: bool = True, process: Any = process
        ) -> Tensor:
            # every type's answer to the same guess of x0
            a = process.alphas_cumprod[t].view(-1, 1, 1, 1).float()
            guess = given.latents + 0.5
            noise = (x_t - a.sqrt() * guess) / (1 - a).sqrt()
            answers = {"epsilon": noise, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * guess, "sample": guess}
            return answers[process.prediction_type]

        losses.append(objective(predict, given).per_example)
    snr = GaussianDiffusion().snr(timesteps(given.quantile, 1000))
    expected = (snr.clamp(max=3.0) * 0.25).float()
    for loss in losses:
        torch.testing.assert_close(loss, expected, rtol=2e-3, atol=1e-6)


def test_the_gradient_reaches_the_prediction_and_the_report_keeps_its_graph() -> None:
    weight = torch.nn.Parameter(torch.zeros(()))

    def predict(x_t: Tensor, t: Tensor, *, text: Any = None, adapter: bool = True) -> Tensor:
        return x_t * weight

    build(Settings(), GaussianDiffusion())(predict, batch()).per_example.sum().backward()
    assert weight.grad is not None and weight.grad != 0


def test_found_by_its_file_name() -> None:
    assert OBJECTIVES.names() == ["denoising"]


def test_a_mask_takes_the_mean_over_its_own_area() -> None:
    error = torch.rand(3, 4, 6, 5)
    whole = error.flatten(1).mean(1)
    torch.testing.assert_close(per_example(error, None), whole)
    torch.testing.assert_close(per_example(error, torch.full((3, 1, 6, 5), 0.3)), whole)
    mask = torch.zeros(3, 1, 6, 5)
    mask[:, :, :2] = 1.0
    torch.testing.assert_close(per_example(error, mask), error[:, :, :2].flatten(1).mean(1))
    mask[:, :, 2:] = 0.25
    above, below = error[:, :, :2].flatten(1).mean(1), error[:, :, 2:].flatten(1).mean(1)
    torch.testing.assert_close(per_example(error, mask), (10 * above + 0.25 * 20 * below) / (10 + 0.25 * 20))
    assert per_example(error, torch.zeros(3, 1, 6, 5)).tolist() == [0.0] * 3


def test_what_a_mask_leaves_out_gives_no_gradient() -> None:
    process = GaussianDiffusion()
    given = batch()
    mask = torch.zeros(4, 1, 4, 4)
    mask[:, :, 1, 2] = 1.0
    predicted = torch.zeros(4, 2, 4, 4, requires_grad=True)
    report = build(Settings(), process)(lambda x_t, t, *, text=None, adapter=True: predicted, replace(given, mask=mask))
    report.per_example.sum().backward()
    assert predicted.grad is not None
    assert torch.equal(predicted.grad.abs().sum(1) > 0, mask[:, 0] > 0)
