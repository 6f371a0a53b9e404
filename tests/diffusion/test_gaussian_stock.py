"""Gaussian diffusion against the papers' formulas in plain numbers and against diffusers' schedulers, at every t.

The stock schedulers keep their tables in single precision and take differences of numbers near 1 from them: what they
give is only good to 5e-6, and at small t to less (each test says where). So each is asked twice: as it comes, and with
its tables replaced by double ones, which leaves its formulas alone to differ.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lorakit.diffusion import GaussianDiffusion
from lorakit.diffusion.gaussian import PREDICTION_TYPES, rescale_zero_terminal_snr

BASE = dict(num_train_timesteps=1000, clip_sample=False)
CONFIGURATIONS = {
    "scaled_linear": dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **BASE),
    "linear": dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, **BASE),
    "cosine": dict(beta_schedule="squaredcos_cap_v2", **BASE),
    "zero_snr": dict(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=True, **BASE
    ),
    "given": dict(trained_betas=[0.001 * 1.01**i for i in range(400)], num_train_timesteps=400, clip_sample=False),
}
# epsilon says nothing about x0 at the last step of zero_snr
REVERSIBLE = [(n, k) for n in CONFIGURATIONS for k in PREDICTION_TYPES if (n, k) != ("zero_snr", "epsilon")]


def drawn(count: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(count, 3, generator=g, dtype=torch.float64) for _ in range(5)]


def differ(own: Tensor, other: Tensor) -> Tensor:
    """The largest difference at each t, relative to 1 + |value|."""
    return ((own - other).abs() / (1 + other.abs())).flatten(1).amax(1)


def process(name: str, prediction_type: str = "epsilon") -> GaussianDiffusion:
    return GaussianDiffusion.from_scheduler_config({**CONFIGURATIONS[name], "prediction_type": prediction_type})


def in_double(stock, p: GaussianDiffusion):
    stock.betas, stock.alphas, stock.alphas_cumprod = p.betas, p.alphas, p.alphas_cumprod
    stock.one = stock.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    return stock


# -- the papers, in plain numbers ------------------------------------------------------------------------------------


def betas_of(name: str) -> list[float]:
    c, n = CONFIGURATIONS[name], CONFIGURATIONS[name]["num_train_timesteps"]
    if "trained_betas" in c:
        return list(c["trained_betas"])
    if name == "cosine":
        f = [math.cos((i / n + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(n + 1)]
        return [min(1 - f[i + 1] / f[i], 0.999) for i in range(n)]
    power = 1 if name == "linear" else 2
    low, high = c["beta_start"] ** (1 / power), c["beta_end"] ** (1 / power)
    betas = [(low + (high - low) * i / (n - 1)) ** power for i in range(n)]
    if name == "zero_snr":  # Lin et al., algorithm 1
        roots = [math.sqrt(a) for a in running_product(betas)]
        first, last = roots[0], roots[-1]
        squares = [((r - last) * first / (first - last)) ** 2 for r in roots]
        betas = [1 - squares[0]] + [1 - b / a for a, b in pairwise(squares)]
    return betas


def running_product(betas: list[float]) -> list[float]:
    kept, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        kept.append(product)
    return kept


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_t_is_the_papers(name):
    """Eq. 4, 6, 7 and 15 of DDPM, v of Salimans and Ho, to 1e-9 of what Python's own floats give."""
    betas = betas_of(name)
    bars = running_product(betas)
    count = len(betas)
    t = torch.arange(count)
    x0, noise, x_t, prediction, fresh = drawn(count)
    rows: dict[str, list[list[float]]] = {}
    for i, (beta, bar) in enumerate(zip(betas, bars)):
        before = bars[i - 1] if i else 1.0
        s, n = math.sqrt(bar), math.sqrt(1 - bar)
        variance = (1 - before) / (1 - bar) * beta
        c0, ct = math.sqrt(before) * beta / (1 - bar), math.sqrt(1 - beta) * (1 - before) / (1 - bar)
        a, e, x, y, z = (v[i].tolist() for v in (x0, noise, x_t, prediction, fresh))
        now = {
            "x_t": [s * p + n * q for p, q in zip(a, e)],
            "v": [s * q - n * p for p, q in zip(a, e)],
            "mean": [c0 * p + ct * q for p, q in zip(a, x)],
            "variance": [variance],
            "snr": [bar / (1 - bar)],
            "from_v": [c0 * (s * q - n * p) + ct * q + math.sqrt(variance) * w for p, q, w in zip(y, x, z)],
        }
        for key, row in now.items():
            rows.setdefault(key, []).append(row)
    expected = {key: torch.tensor(row, dtype=torch.float64) for key, row in rows.items()}
    p, of_v = process(name), process(name, "v_prediction")
    mean, variance = p.q_posterior(x0, x_t, t)
    found = {
        "x_t": p.q_sample(x0, t, noise),
        "v": of_v.target(x0, t, noise),
        "mean": mean,
        "variance": variance,
        "snr": p.snr(t)[:, None],
        "from_v": of_v.p_sample(x_t, t, prediction, fresh),
    }
    for key, values in expected.items():
        torch.testing.assert_close(found[key], values, rtol=1e-9, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}")
    if name != "zero_snr":  # eq. 15 divides by the signal
        s, n = (torch.tensor([math.sqrt(f(b)) for b in bars]).double()[:, None] for f in (lambda b: b, lambda b: 1 - b))
        torch.testing.assert_close(p.predict_x0(x_t, t, prediction), (x_t - n * prediction) / s, rtol=1e-6, atol=1e-6)
    assert bool((p.snr(t).diff() < 0).all())


# -- diffusers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "DDIMScheduler"])
def test_forward_is_the_stock_one_at_every_t(name, scheduler):
    import diffusers

    stock = getattr(diffusers, scheduler)(**CONFIGURATIONS[name])
    p = GaussianDiffusion.from_scheduler_config({**stock.config, "prediction_type": "v_prediction"})
    assert p.timesteps == stock.config.num_train_timesteps
    t = torch.arange(p.timesteps)
    x0, noise, *_ = drawn(p.timesteps)
    for tolerance in (5e-6, 1e-12):
        assert differ(p.q_sample(x0, t, noise), stock.add_noise(x0, noise, t)).max() < tolerance
        assert differ(p.target(x0, t, noise), stock.get_velocity(x0, noise, t)).max() < tolerance
        in_double(stock, p)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_signal_to_noise_ratio_is_the_stock_one(name):
    """As it comes good to 5e-4 at small t, where 1 - alphas_cumprod has few digits (cosine's to 1e-3).

    Between t = 64 and 990 to 1e-5; the last of zero SNR's is nothing but rounding.
    """
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    stock, p = DDPMScheduler(**CONFIGURATIONS[name]), process(name)
    t = torch.arange(p.timesteps)
    errors = (compute_snr(stock, t) / p.snr(t) - 1).abs()[:-1]
    assert errors.max() < (1e-3 if name == "cosine" else 5e-4)
    assert errors[64:990].max() < 1e-5
    torch.testing.assert_close(compute_snr(in_double(stock, p), t).double(), p.snr(t), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("name", "prediction_type"), REVERSIBLE)
def test_p_sample_is_the_stock_ddpm_step_at_every_t(name, prediction_type, monkeypatch):
    """As it comes, its variance is good to 4e-4 and its mean to 5e-4, from t = 64 on to 5e-6.

    Cosine's variance only to 1e-3, its mean and zero SNR's to 1e-5. At the last t epsilon is divided by almost nothing.
    """
    from diffusers import DDPMScheduler
    from diffusers.schedulers import scheduling_ddpm

    stock = DDPMScheduler(**CONFIGURATIONS[name], prediction_type=prediction_type, variance_type="fixed_small")
    p = GaussianDiffusion.from_scheduler_config(dict(stock.config))
    t = torch.arange(p.timesteps)
    x_t, prediction, noise, *_ = drawn(p.timesteps)
    own, variance = p.p_mean_variance(x_t, t, prediction)
    assert not variance[0].any()
    assert torch.equal(p.p_sample(x_t, t, prediction, noise)[0], own[0])  # no noise at t = 0

    def steps(drawn_by: Callable[[int], Tensor]) -> Tensor:
        rows = []
        for i in range(p.timesteps):
            monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, i=i, **__: drawn_by(i))
            rows.append(stock.step(prediction[i : i + 1], i, x_t[i : i + 1]).prev_sample)
        return torch.cat(rows)

    def stock_variance() -> Tensor:
        return torch.stack([torch.as_tensor(stock._get_variance(i), dtype=torch.float64) for i in t.tolist()])

    errors = differ(own, steps(lambda i: torch.zeros(1, 3, dtype=torch.float64)))
    assert errors.max() < 5e-4
    assert errors[64:-1].max() < (1e-5 if name in ("cosine", "zero_snr") else 5e-6)
    tolerance = 1e-3 if name == "cosine" else 4e-4
    torch.testing.assert_close(variance.flatten()[1:], stock_variance()[1:], rtol=tolerance, atol=0)
    in_double(stock, p)
    whole = p.p_sample(x_t, t, prediction, noise)
    # at t = 0 the stock variance is 1e-20, its noise left out all the same
    assert differ(whole, steps(lambda i: noise[i : i + 1])).max() < 1e-11
    torch.testing.assert_close(variance.flatten()[1:], stock_variance()[1:], rtol=1e-11, atol=0)


@pytest.mark.parametrize(("name", "prediction_type"), [c for c in REVERSIBLE if c[0] != "given"])
def test_ddim_step_is_the_stock_one_at_every_t(name, prediction_type):
    """20 timesteps down from each. As it comes the stock step is good to 5e-4, between t = 64 and 990 to 1e-5."""
    from diffusers import DDIMScheduler

    stock = DDIMScheduler(**CONFIGURATIONS[name], prediction_type=prediction_type)
    stock.set_timesteps(50)
    p = GaussianDiffusion.from_scheduler_config(dict(stock.config))
    t = torch.arange(p.timesteps)
    x_t, prediction, noise, *_ = drawn(p.timesteps)

    def differs(eta: float) -> Tensor:
        own = p.ddim_step(x_t, t, (t - 20).clamp(min=-1), prediction, eta=eta, noise=noise)
        rows = [
            stock.step(prediction[i][None], i, x_t[i][None], eta=eta, variance_noise=noise[i][None]).prev_sample
            for i in range(p.timesteps)
        ]
        return differ(own, torch.cat(rows))

    errors = differs(0.0)
    assert errors.max() < 5e-4
    assert errors[64:990].max() < 1e-5
    in_double(stock, p)
    assert differs(0.4).max() < 1e-10


def test_zero_snr_betas_are_the_stock_ones():
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr as stock

    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    torch.testing.assert_close(rescale_zero_terminal_snr(betas), stock(betas), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 30, 50, 333, 999, 1000])
def test_trailing_timesteps_are_the_stock_ones(steps):
    from diffusers import DDIMScheduler

    stock = DDIMScheduler(**CONFIGURATIONS["linear"], timestep_spacing="trailing")
    stock.set_timesteps(steps)
    assert process("linear").trailing_timesteps(steps) == stock.timesteps.tolist()


def test_what_is_not_of_this_process_is_refused():
    with pytest.raises(ValueError, match="beta_schedule 'sigmoid'"):
        GaussianDiffusion.from_scheduler_config({"beta_schedule": "sigmoid"})
    with pytest.raises(ValueError, match="'flow_prediction' is none of"):
        GaussianDiffusion.from_scheduler_config({"prediction_type": "flow_prediction"})
    for flow in ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, {"use_flow_sigmas": True}):
        with pytest.raises(ValueError, match="has no betas"):
            GaussianDiffusion.from_scheduler_config(flow)
