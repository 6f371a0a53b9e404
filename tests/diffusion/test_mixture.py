"""Whole samplings where the best prediction is known: a 2-D mixture of Gaussians, and a single Gaussian in closed form.

Where x0 ~ sum w_k N(m_k, S_k) and x_t = s x0 + n noise, E[x0 | x_t] is known for any s and n, and with it what a
perfect network would predict. What a sampler then misses is its own error.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lorakit.diffusion import GaussianDiffusion, RectifiedFlow

WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MEANS = torch.tensor([[1.5, 0.5], [-1.0, 1.0], [-0.5, -1.5]], dtype=torch.float64)
COVARIANCES = torch.tensor(
    [[[0.10, 0.06], [0.06, 0.08]], [[0.05, -0.02], [-0.02, 0.12]], [[0.20, 0.0], [0.0, 0.02]]], dtype=torch.float64
)
MEAN = WEIGHTS @ MEANS
COVARIANCE = torch.einsum("k,kij->ij", WEIGHTS, COVARIANCES + MEANS[:, :, None] * MEANS[:, None]) - torch.outer(
    MEAN, MEAN
)


def expected_x0(x: Tensor, s: Tensor, n: Tensor) -> Tensor:
    """E[x0 | x_t] for x_t (B, 2), signal and noise scales (B,): Gaussians, conditioned, by their likelihood."""
    s, n = s.reshape(-1, 1, 1, 1), n.reshape(-1, 1, 1, 1)
    spread = s**2 * COVARIANCES + n**2 * torch.eye(2, dtype=torch.float64)  # of x_t in each component: (B, K, 2, 2)
    inverse = torch.linalg.inv(spread)
    off = x[:, None] - s[..., 0] * MEANS
    pulled = torch.einsum("bkij,bkj->bki", inverse, off)
    posterior = MEANS + s[..., 0] * torch.einsum("kij,bkj->bki", COVARIANCES, pulled)
    likelihood = WEIGHTS.log() - (off * pulled).sum(-1) / 2 - torch.logdet(spread) / 2
    return (likelihood.softmax(1)[..., None] * posterior).sum(1)


def perfect(process: GaussianDiffusion | RectifiedFlow) -> Callable[[Tensor, Tensor], Tensor]:
    """What a network that has learned all there is predicts."""

    def predict(x: Tensor, t: Tensor) -> Tensor:
        if bool((t == t[0]).all()):
            t = t[:1]  # one set of small matrices for all
        if isinstance(process, RectifiedFlow):
            x0 = expected_x0(x, 1 - t, t)
            return (x - x0) / t[:, None]
        a = process.alphas_cumprod[t]
        x0 = expected_x0(x, a.sqrt(), (1 - a).sqrt())
        noise = (x - a.sqrt()[:, None] * x0) / (1 - a).sqrt()[:, None]
        v = a.sqrt()[:, None] * noise - (1 - a).sqrt()[:, None] * x0
        return {"epsilon": noise, "sample": x0, "v_prediction": v}[process.prediction_type]

    return predict


def start(count: int) -> Tensor:
    """Standard normal points (count, 2), spread evenly: their own moments are right to about 1 / count."""
    even = torch.quasirandom.SobolEngine(2, scramble=True, seed=3).draw(count, dtype=torch.float64)
    return math.sqrt(2) * torch.erfinv(2 * even.clamp(1e-6, 1 - 1e-6) - 1)


def misses(x: Tensor) -> tuple[float, float, float]:
    """The largest error in the mean, in the covariance, and in the components' shares (by the nearest mean)."""
    nearest = torch.cdist(x, MEANS).argmin(1)
    shares = torch.bincount(nearest, minlength=3) / len(x)
    return tuple((a - b).abs().max().item() for a, b in [(x.mean(0), MEAN), (x.T.cov(), COVARIANCE), (shares, WEIGHTS)])


def last(steps):
    return list(steps)[-1]


def test_the_prediction_is_the_best_one():
    """No other function of x_t and t has a lower loss (DDPM eq. 14): its error is uncorrelated with any of them."""
    g = torch.Generator().manual_seed(0)
    count = 200_000
    component = torch.multinomial(WEIGHTS, count, replacement=True, generator=g)
    roots = torch.linalg.cholesky(COVARIANCES)
    drawn = torch.randn(count, 2, generator=g, dtype=torch.float64)
    x0 = MEANS[component] + torch.einsum("bij,bj->bi", roots[component], drawn)
    assert max(misses(x0)) < 0.01
    noise = torch.randn(count, 2, generator=g, dtype=torch.float64)
    gaussian, flow = GaussianDiffusion(prediction_type="v_prediction"), RectifiedFlow()
    quantile = torch.rand(count, generator=g, dtype=torch.float64)
    for process, t in ((gaussian, (quantile * 1000).long()), (flow, quantile.clamp(min=1e-3))):
        x_t, target = process.q_sample(x0, t, noise), process.target(x0, t, noise)
        best = perfect(process)(x_t, t)
        off = best - target
        for f in (torch.ones_like(x_t), x_t, torch.sin(3 * x_t), x_t.flip(1) ** 2, best):
            error = (off * f).mean(0) / (off * f).std(0) * math.sqrt(count)
            assert error.abs().max() < 4.5  # standard errors


@pytest.mark.parametrize(
    ("prediction_type", "zero_snr"),
    [("epsilon", False), ("v_prediction", False), ("sample", False), ("v_prediction", True), ("sample", True)],
)
def test_ancestral_sampling_recovers_the_mixture(prediction_type, zero_snr):
    """4000 samples know the mean to 0.02 and a share to 0.008 (one sigma each)."""
    p = GaussianDiffusion(200, 1e-3, 0.08, prediction_type=prediction_type, zero_terminal_snr=zero_snr)
    g = torch.Generator().manual_seed(2)
    mean, covariance, shares = misses(last(p.p_sample_loop(perfect(p), start(4000), generator=g)))
    assert mean < 0.05
    assert covariance < 0.07
    assert shares < 0.025


@pytest.mark.parametrize(
    ("eta", "steps", "limit"), [(0.0, 100, 0.035), (0.0, 400, 0.01), (0.5, 100, 0.1), (1.0, 100, 0.1)]
)
def test_ddim_recovers_the_mixture_in_fewer_steps(eta, steps, limit):
    p = GaussianDiffusion(1000, 0.00085, 0.02, zero_terminal_snr=True, prediction_type="v_prediction")
    g = torch.Generator().manual_seed(2)
    assert max(misses(last(p.ddim_sample_loop(perfect(p), start(4096), steps=steps, eta=eta, generator=g)))) < limit


@pytest.mark.parametrize(("solver", "steps", "limit"), [("euler", 200, 0.012), ("heun", 40, 0.006)])
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_a_flow_recovers_the_mixture(solver, steps, limit, shift):
    flow = RectifiedFlow(shift=shift)
    x = last(flow.sample_loop(perfect(flow), start(4096), sigmas=flow.sigmas(steps), solver=solver))
    assert max(misses(x)) < limit


def test_a_start_that_is_no_noise_and_a_wrong_velocity_are_seen():
    """The metric can fail."""
    flow = RectifiedFlow()
    assert max(misses(start(4096))) > 0.3
    for wrong in (lambda x, t: 0.9 * perfect(flow)(x, t), lambda x, t: perfect(flow)(x, (t + 0.05).clamp(max=1))):
        assert max(misses(last(flow.sample_loop(wrong, start(4096), sigmas=flow.sigmas(100))))) > 0.05


# -- one Gaussian: every sampler in plain numbers ----------------------------------------------------------------------

CENTRE, STD = 0.7, 0.4


def test_euler_and_heun_come_to_the_true_path_with_their_order():
    """N(m, s²): a point keeps its quantile, x_t = (1 - t) m + sqrt((1 - t)² s² + t²) z.

    Steps half as long leave half of Euler's error, and a quarter of Heun's.
    """
    flow = RectifiedFlow()
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]

    def predict(x, t):
        t = t[:, None]
        spread = ((1 - t) * STD) ** 2 + t**2
        # the derivative of the path above at the z that x is on
        return -CENTRE + (t - (1 - t) * STD**2) / spread * (x - (1 - t) * CENTRE)

    def path(t: float) -> Tensor:
        return (1 - t) * CENTRE + math.sqrt(((1 - t) * STD) ** 2 + t**2) * z

    # down to 0.2: the step to 0 is Euler's in both
    errors = {
        solver: [
            (
                last(flow.sample_loop(predict, z, sigmas=torch.linspace(1, 0.2, n + 1).double(), solver=solver))
                - path(0.2)
            )
            .abs()
            .max()
            .item()
            for n in (20, 40, 80, 160)
        ]
        for solver in ("euler", "heun")
    }
    for solver, order in (("euler", 1), ("heun", 2)):
        for coarse, fine in pairwise(errors[solver]):
            assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)
    assert errors["heun"][-1] < errors["euler"][-1] / 50
    whole = last(flow.sample_loop(predict, z, sigmas=flow.sigmas(400), solver="heun"))
    torch.testing.assert_close(whole, path(0.0), rtol=0, atol=1e-3)


def optimal(p):
    """E[target | x_t] where x_0 ~ N(CENTRE, STD²): x_0 and x_t are jointly normal, so it is linear in x_t."""

    def predict(x_t, t):
        a = p.alphas_cumprod[t].reshape(-1, *[1] * (x_t.ndim - 1))
        gain = a.sqrt() * STD**2 / (a * STD**2 + 1 - a)
        x0 = CENTRE + gain * (x_t - a.sqrt() * CENTRE)
        if p.prediction_type == "sample":
            return x0
        noise = (x_t - a.sqrt() * x0) / (1 - a).sqrt()
        return noise if p.prediction_type == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * x0

    return predict


def ancestral_moments(betas):
    """Mean and variance after ancestral sampling with the best predictor, step by step in plain numbers.

    Every step is linear in x_t: x_{t-1} = c0 E[x_0 | x_t] + ct x_t + sqrt(beta~) noise (DDPM eq. 6 and 7).
    """
    kept, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        kept.append(product)
    mean, variance = 0.0, 1.0
    for i in reversed(range(len(betas))):
        a, before, beta = kept[i], kept[i - 1] if i else 1.0, betas[i]
        gain = math.sqrt(a) * STD**2 / (a * STD**2 + 1 - a)
        c0, ct = math.sqrt(before) * beta / (1 - a), math.sqrt(1 - beta) * (1 - before) / (1 - a)
        mean = c0 * (CENTRE + gain * (mean - math.sqrt(a) * CENTRE)) + ct * mean
        variance = (c0 * gain + ct) ** 2 * variance + beta * (1 - before) / (1 - a)
    return mean, variance


@pytest.mark.parametrize(
    ("prediction_type", "zero_snr"),
    [("epsilon", False), ("v_prediction", False), ("sample", False), ("v_prediction", True), ("sample", True)],
)
def test_ancestral_sampling_of_a_known_distribution(prediction_type, zero_snr):
    """40,000 samples know the mean to 0.002 and the standard deviation to 0.0014 (one sigma each)."""
    p = GaussianDiffusion(100, 1e-3, 0.15, prediction_type=prediction_type, zero_terminal_snr=zero_snr)
    g = torch.Generator().manual_seed(5)
    x = torch.randn(40_000, 1, generator=g, dtype=torch.float64)
    seen = list(p.p_sample_loop(optimal(p), x, generator=g))
    assert len(seen) == 100
    mean, variance = ancestral_moments(p.betas.tolist())
    assert seen[-1].mean().item() == pytest.approx(mean, abs=0.008)
    assert seen[-1].std().item() == pytest.approx(math.sqrt(variance), abs=0.006)


def test_ancestral_sampling_comes_to_the_data_with_ever_more_steps():
    """The posterior variance is a lower bound (DDPM section 3.2): the spread is found in the limit, from below."""
    spreads = []
    for count in (100, 1000, 4000):
        p = GaussianDiffusion(count, 0.1 / count, 20 / count)
        mean, variance = ancestral_moments(p.betas.tolist())
        assert mean == pytest.approx(CENTRE, abs=0.01)
        spreads.append(math.sqrt(variance))
    assert spreads == sorted(spreads)
    assert spreads[-1] == pytest.approx(STD, abs=0.002)


def test_ddim_finds_a_known_distribution():
    """The deterministic sampler with many steps transports N(0, 1) to the data, sample by sample."""
    p = GaussianDiffusion(1000, zero_terminal_snr=True, prediction_type="v_prediction")
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    z = x
    steps = p.trailing_timesteps(500)
    for step, before in zip(steps, [*steps[1:], -1]):
        t = torch.full((9,), step)
        x = p.ddim_step(x, t, torch.full((9,), before), optimal(p)(x, t))
    torch.testing.assert_close(x, CENTRE + STD * z, rtol=0.02, atol=0.02)
