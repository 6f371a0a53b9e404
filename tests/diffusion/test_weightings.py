"""Weights against the closed forms of their papers, and against what one guess of x0 costs in every prediction type."""

import pytest
import torch
from pydantic import TypeAdapter

from lorakit.diffusion import GaussianDiffusion, RectifiedFlow
from lorakit.diffusion.weightings import Weighting, weight, weighting

TYPES = ("epsilon", "v_prediction", "sample", "flow")
S = torch.logspace(-6, 6, 200, dtype=torch.float64)
R = S.sqrt()
T = 1 / (1 + R)  # a flow's t


def weights(**values):
    return TypeAdapter(Weighting).validate_python(values)


def close(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b.expand_as(a), rtol=tolerance, atol=0.0)


ONE = torch.ones_like(S)
# kind, and its weight of epsilon, v, x0 and velocity; None: refused
CLOSED = [
    (dict(kind="min_snr"), (5 / S).clamp(max=1), S.clamp(max=5) / (S + 1), S.clamp(max=5), None),
    (dict(kind="min_snr", gamma=2.0, soft=True), 2 / (S + 2), 2 * S / (S + 2) / (S + 1), 2 * S / (S + 2), None),
    (dict(kind="p2"), 1 / (1 + S), S / (1 + S) ** 2, S / (1 + S), (1 - T) ** 2 * T**2 / (T**2 + (1 - T) ** 2)),
    (
        dict(kind="p2", k=0.5, gamma=0.7),
        (0.5 + S) ** -0.7,
        S / (1 + S) * (0.5 + S) ** -0.7,
        S * (0.5 + S) ** -0.7,
        (1 - T) ** 2 * (0.5 + S) ** -0.7,
    ),
    (dict(kind="debiased"), 1 / R, R / (S + 1), R, T * (1 - T)),
    (dict(kind="snr_v"), None, S / (S + 1), S, (1 - T) ** 2),
    (dict(kind="sigma"), (1 + S) ** -0.5, (1 + S) ** -0.5, (1 + S) ** -0.5, T),
    (dict(kind="sigma", power=-2.0), 1 + S, 1 + S, 1 + S, T**-2),
    (dict(kind="edm"), 1 + 4 / S, (S + 4) / (S + 1), S + 4, (1 - T) ** 2 + 4 * T**2),
    (dict(kind="edm", sigma_data=1.0), 1 + 1 / S, ONE, S + 1, (1 - T) ** 2 + T**2),
]


def process_of(prediction_type, **changes):
    return RectifiedFlow() if prediction_type == "flow" else GaussianDiffusion(prediction_type=prediction_type)


@pytest.mark.parametrize(("values", "epsilon", "v", "x0", "velocity"), CLOSED, ids=lambda v: str(v)[:40])
def test_a_weight_in_closed_form(values, epsilon, v, x0, velocity):
    settings = weights(**values)
    for prediction_type, expected in zip(TYPES, (epsilon, v, x0, velocity)):
        if expected is None:
            with pytest.raises(ValueError, match=rf"objective\.weighting\.kind = '{settings.kind}'"):
                weighting(settings, process_of(prediction_type))
            continue
        assert weighting(settings, process_of(prediction_type)) is not None
        found = weight(settings, S, prediction_type)
        close(found, expected if settings.kind != "sigma" else _bounded(expected, settings, prediction_type))


def _bounded(expected, settings, prediction_type):
    sigma = T if prediction_type == "flow" else (1 + S).rsqrt()
    return torch.where(sigma < 1e-3, torch.tensor(1e-3, dtype=torch.float64) ** settings.power, expected)


def test_the_weight_is_that_of_the_snr_at_t():
    for prediction_type in TYPES:
        process = process_of(prediction_type)
        t = torch.tensor([0.1, 0.5, 0.9]) if prediction_type == "flow" else torch.tensor([3, 500, 999])
        of_t = weighting(weights(kind="debiased"), process)
        assert of_t is not None
        close(of_t(t), weight(weights(kind="debiased"), process.snr(t), prediction_type), 1e-12)
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    of_t = weighting(weights(kind="sigma", power=-2.0), RectifiedFlow())
    assert of_t is not None
    close(of_t(t), t**-2, 1e-9)


def test_sigma_of_a_flow_is_the_stock_weighting():
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    t = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    of_t = weighting(weights(kind="sigma", power=-2.0), RectifiedFlow())
    assert of_t is not None
    close(of_t(t), compute_loss_weighting_for_sd3("sigma_sqrt", t).double())


def test_min_snr_is_what_diffusers_computes():
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    stock = DDPMScheduler(1000, 0.00085, 0.012, beta_schedule="scaled_linear")
    t = torch.arange(1000)
    snr = compute_snr(stock, t).double()
    least = snr.clamp(max=5.0)
    for prediction_type, expected in [("epsilon", least / snr), ("v_prediction", least / (snr + 1))]:
        process = GaussianDiffusion(1000, 0.00085, 0.012, schedule="scaled_linear", prediction_type=prediction_type)
        of_t = weighting(weights(kind="min_snr"), process)
        assert of_t is not None
        close(of_t(t), expected, 5e-4)  # its tables are fp32: 1 - alphas_cumprod has few digits at small t


@pytest.mark.parametrize("values", [v for v, *_ in CLOSED if v["kind"] != "sigma"], ids=str)
def test_one_guess_of_x0_costs_the_same_in_every_prediction_type(values):
    """The answers come from the processes' own equations, at levels of equal SNR."""
    g = torch.Generator().manual_seed(0)
    x0, noise, off = (torch.randn(40, 6, generator=g, dtype=torch.float64) for _ in range(3))
    steps = torch.arange(0, 1000, 25)
    snr = GaussianDiffusion().snr(steps)
    losses = []
    for prediction_type in TYPES:
        process = process_of(prediction_type)
        t = 1 / (1 + snr.sqrt()) if prediction_type == "flow" else steps
        try:
            of_t = weighting(weights(**values), process)
        except ValueError:
            continue
        assert of_t is not None
        x_t = process.q_sample(x0, t, noise)
        # what the network would say if it took x0 for x0 + off
        nil = torch.zeros_like(x0)
        signal, sigma = process.q_sample(torch.ones_like(x0), t, nil), process.q_sample(nil, t, torch.ones_like(x0))
        answer = process.target(x0 + off, t, (x_t - signal * (x0 + off)) / sigma)
        torch.testing.assert_close(process.predict_x0(x_t, t, answer), x0 + off, rtol=1e-6, atol=1e-6)
        losses.append(of_t(t) * (answer - process.target(x0, t, noise)).square().mean(1))
    assert len(losses) >= 3
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("values", [v for v, *_ in CLOSED], ids=str)
@pytest.mark.parametrize("prediction_type", TYPES)
def test_a_weight_is_finite_at_both_ends(values, prediction_type):
    ends = torch.tensor([0.0, float("inf")], dtype=torch.float64)
    found = weight(weights(**values), ends, prediction_type)
    assert bool((found.isfinite() & (found >= 0)).all())
    if values["kind"] == "min_snr" and prediction_type == "epsilon":
        assert found[0] == 1


@pytest.mark.parametrize("kind", ["debiased", "edm"])
def test_what_has_no_bound_without_signal_is_refused(kind):
    schedule = dict(zero_terminal_snr=True)
    with pytest.raises(ValueError, match=f"'{kind}' has no bound where no signal is left"):
        weighting(weights(kind=kind), GaussianDiffusion(**schedule))
    for prediction_type in ("v_prediction", "sample"):
        process = GaussianDiffusion(prediction_type=prediction_type, **schedule)
        of_t = weighting(weights(kind=kind), process)
        assert of_t is not None and bool(of_t(torch.arange(1000)).isfinite().all())


def test_no_weighting_is_none():
    assert weighting(weights(kind="none"), GaussianDiffusion()) is None
