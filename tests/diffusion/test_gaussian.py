"""Closed forms and properties; `test_gaussian_stock.py` has the stock schedulers, `test_mixture.py` whole samplings.

Everything runs in double precision, so that a tolerance of 1e-9 leaves no room for a wrong formula.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.diffusion import GaussianDiffusion
from lorakit.diffusion.gaussian import PREDICTION_TYPES, SCHEDULES

SHAPE = (5, 2, 3, 3)


def drawn(seed=0, shape=SHAPE):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(3)]


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def at(table, t):
    return table[t].reshape(-1, 1, 1, 1)


# -- the tables -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_tables_are_of_one_process(schedule, zero_snr):
    p = GaussianDiffusion(200, schedule=schedule, zero_terminal_snr=zero_snr)
    for table in (p.betas, p.alphas, p.alphas_cumprod, p.alphas_cumprod_prev, p.posterior_variance):
        assert table.dtype == torch.float64
        assert len(table) == p.timesteps == 200
        assert bool(table.isfinite().all())
    assert bool(((p.betas > 0) & (p.betas <= 1)).all())
    assert bool((p.alphas_cumprod.diff() < 0).all())
    close(p.alphas_cumprod, (1 - p.betas).cumprod(0), 1e-12)
    assert p.alphas_cumprod_prev[0] == 1
    assert (p.alphas_cumprod[-1] == 0) == zero_snr
    assert bool((p.posterior_variance <= p.betas).all())
    assert p.posterior_variance[0] == 0


def test_all_tables_come_from_the_rescaled_betas():
    """Lin et al. change the betas: whatever was derived from the old ones would be another process's."""
    rescaled = GaussianDiffusion(200, zero_terminal_snr=True)
    given = GaussianDiffusion(betas=rescaled.betas)
    plain = GaussianDiffusion(200)
    tables = {name for name, value in vars(given).items() if isinstance(value, torch.Tensor)}
    assert len(tables) >= 5
    for name in tables:
        assert torch.equal(getattr(rescaled, name), getattr(given, name))
        assert not torch.allclose(getattr(rescaled, name), getattr(plain, name), rtol=1e-3, atol=0)
    x0, noise, _ = drawn()
    t = torch.tensor([0, 1, 50, 150, 199])
    for a, b in zip(rescaled.q_posterior(x0, noise, t), given.q_posterior(x0, noise, t)):
        assert torch.equal(a, b)


def test_linear_schedule_is_ddpms():
    p = GaussianDiffusion(1000, 1e-4, 0.02)
    assert (p.betas[0].item(), p.betas[-1].item()) == (1e-4, 0.02)
    close(p.betas.diff(), torch.full((999,), (0.02 - 1e-4) / 999, dtype=torch.float64), 1e-12)
    assert p.alphas_cumprod[-1].item() == pytest.approx(4.0358e-5, rel=1e-4)  # DDPM: about 4e-5 of signal is left


def test_scaled_linear_schedule_is_linear_in_the_roots():
    p = GaussianDiffusion(1000, 0.00085, 0.012, schedule="scaled_linear")
    close(p.betas.sqrt().diff(), torch.full((999,), (0.012**0.5 - 0.00085**0.5) / 999, dtype=torch.float64), 1e-12)
    assert p.alphas_cumprod[-1].sqrt().item() == pytest.approx(0.068265, rel=1e-4)  # Lin et al., table 1


def test_cosine_schedule_follows_its_curve():
    p = GaussianDiffusion(100, schedule="cosine")
    curve = [math.cos((i / 100 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(101)]
    close(p.alphas_cumprod[:99], torch.tensor(curve[1:100]) / curve[0], 1e-6)
    assert p.betas[-1] == 0.999  # clipped


def test_zero_terminal_snr_keeps_the_first_step_and_empties_the_last():
    plain = GaussianDiffusion(1000, 0.00085, 0.012, schedule="scaled_linear")
    zero = GaussianDiffusion(1000, 0.00085, 0.012, schedule="scaled_linear", zero_terminal_snr=True)
    assert zero.alphas_cumprod[-1] == 0
    assert zero.betas[-1] == 1
    assert zero.alphas_cumprod[0].item() == pytest.approx(plain.alphas_cumprod[0].item(), rel=1e-12)
    # the roots keep their spacing up to a factor: that is Lin et al.'s algorithm 1
    ratio = zero.alphas_cumprod.sqrt().diff() / plain.alphas_cumprod.sqrt().diff()
    close(ratio, ratio[0].expand(999), 1e-9)
    assert zero.snr(torch.tensor([999])).item() == 0


NONE = [[], [0.1, 0.0], [0.1, 1.5], [[0.1]], [0.1, -0.1], [0.1, math.nan], [math.nan, 0.1], [1e-17, 0.1], [1.0, 0.1]]


@pytest.mark.parametrize("bad", NONE)
def test_betas_that_are_none_are_refused(bad):
    with pytest.raises(ValueError, match="betas"):
        GaussianDiffusion(betas=bad)


def test_betas_may_be_given():
    p = GaussianDiffusion(betas=[0.1, 0.5, 1.0])
    close(p.alphas_cumprod, torch.tensor([0.9, 0.45, 0.0]), 1e-7)
    assert GaussianDiffusion(betas=torch.tensor([0.25])).alphas_cumprod.tolist() == [0.75]
    with pytest.raises(ValueError, match="two timesteps"):
        GaussianDiffusion(1, zero_terminal_snr=True)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'eps' is none of epsilon"):
        GaussianDiffusion(prediction_type="eps")
    with pytest.raises(ValueError, match="'sqrt' is none of linear"):
        GaussianDiffusion(schedule="sqrt")


TAKES_T = ("q_sample", "target", "predict_x0", "predict_noise", "predict_v", "q_posterior", "p_sample", "ddim_step")

# -- t --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "t",
    [
        torch.tensor([0, 1]),  # one too few
        torch.tensor(3),
        torch.tensor([[0, 1, 2]]),
        torch.tensor([0.0, 1.0, 2.0]),
        torch.tensor([-1, 0, 1]),
        torch.tensor([0, 1, 10]),
        torch.tensor([True, False, True]),  # would be taken for a mask
        torch.tensor([0j, 1j, 2j]),
    ],
)
@pytest.mark.parametrize("method", TAKES_T)
def test_a_wrong_t_is_refused_by_every_method(method, t):
    p = GaussianDiffusion(10, prediction_type="sample" if method == "predict_v" else "v_prediction")
    x = torch.zeros(3, 2)
    arguments = {
        "q_sample": (x, t, x),
        "target": (x, t, x),
        "predict_x0": (x, t, x),
        "predict_noise": (x, t, x),
        "predict_v": (x, t, x),
        "q_posterior": (x, x, t),
        "p_sample": (x, t, x, x),
        "ddim_step": (x, t, t, x),
    }[method]
    with pytest.raises(ValueError, match="t must"):
        getattr(p, method)(*arguments)


@pytest.mark.parametrize("t", [torch.tensor(3), torch.tensor([10]), torch.tensor([0.5]), torch.tensor([[1]])])
def test_a_wrong_t_has_no_snr(t):
    with pytest.raises(ValueError, match="t must"):
        GaussianDiffusion(10).snr(t)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_any_integers_do_as_t(dtype):
    p = GaussianDiffusion(10)
    x0, noise, _ = drawn()
    t = torch.tensor([0, 1, 1, 8, 9])
    assert torch.equal(p.q_sample(x0, t.to(dtype), noise), p.q_sample(x0, t, noise))
    assert torch.equal(p.snr(t.to(dtype)), p.snr(t))
    before = (t - 1).clamp(min=0).to(dtype)[1:]
    assert p.ddim_step(x0[1:], t.to(dtype)[1:], before, noise[1:]).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_results_come_in_the_dtype_handed_in(dtype):
    p = GaussianDiffusion(10, prediction_type="v_prediction")
    x0, x_t, noise = (x.to(dtype) for x in drawn())
    t = torch.tensor([0, 2, 5, 8, 9])
    results = [
        p.q_sample(x0, t, noise),
        p.target(x0, t, noise),
        p.predict_x0(x_t, t, noise),
        p.predict_noise(x_t, t, noise),
        *p.p_mean_variance(x_t, t, noise),
        p.p_sample(x_t, t, noise, noise),
        p.ddim_step(x_t, t, t - 1, noise, eta=0.5, noise=noise),
    ]
    assert {r.dtype for r in results} == {dtype}
    assert {tuple(r.shape) for r in results} == {SHAPE, (5, 1, 1, 1)}


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_coefficients_are_rounded_once(prediction_type):
    """In half precision 1 - alphas_cumprod would lose all its digits near the clean end: it is taken in double."""
    p = GaussianDiffusion(prediction_type=prediction_type)
    t = torch.tensor([1, 3, 10, 100, 999])
    one = torch.ones(5, dtype=torch.float64)
    for x_t, prediction, noise in [(one, 0 * one, 0 * one), (0 * one, one, 0 * one), (0 * one, 0 * one, one)]:
        exact = p.ddim_step(x_t, t, t - 1, prediction, eta=0.7, noise=noise)
        if prediction_type == "epsilon" and not noise.any():
            continue  # a difference of two large terms: the tensors' own rounding shows
        half = p.ddim_step(x_t.half(), t, t - 1, prediction.half(), eta=0.7, noise=noise.half())
        close(half, exact, 5e-3)


# -- forward --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(0, 10**6))
def test_the_marginal_is_that_of_single_steps(timesteps, seed):
    """q(x_t | x_0) of eq. 4 is q(x_s | x_{s-1}) of eq. 2 composed: means multiply, v becomes alpha v + beta."""
    g = torch.Generator().manual_seed(seed)
    betas = torch.rand(timesteps, generator=g, dtype=torch.float64) * 0.5 + 1e-4
    p = GaussianDiffusion(betas=betas)
    mean, variance = 1.0, 0.0
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    for step, beta in enumerate(betas.tolist()):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        t = torch.tensor([step])
        assert p.q_sample(one, t, zero).item() == pytest.approx(mean, rel=1e-9)
        assert p.q_sample(zero, t, one).item() == pytest.approx(math.sqrt(variance), rel=1e-9)
        assert p.snr(t).item() == pytest.approx(mean**2 / variance, rel=1e-9)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_posterior_undoes_a_forward_step(zero_snr):
    """Law of total probability: q(x_{t-1} | x_t, x_0) averaged over q(x_t | x_0) is q(x_{t-1} | x_0)."""
    p = GaussianDiffusion(50, 0.01, 0.2, zero_terminal_snr=zero_snr)
    t = torch.arange(1, 50)
    x0 = torch.full((49, 1), 1.7, dtype=torch.float64)
    nil, one = torch.zeros_like(x0), torch.ones_like(x0)
    signal, sigma = p.q_sample(x0, t, nil), p.q_sample(nil, t, one)
    mean, variance = p.q_posterior(x0, signal, t)
    slope = p.q_posterior(nil, one, t)[0]
    close(mean, p.q_sample(x0, t - 1, nil))
    close(slope**2 * sigma**2 + variance, p.q_sample(nil, t - 1, one) ** 2)


def test_the_posterior_agrees_with_bayes_by_quadrature():
    """q(x_{t-1} | x_t, x_0) ∝ q(x_t | x_{t-1}) q(x_{t-1} | x_0), integrated on a grid."""
    p = GaussianDiffusion(20, 0.05, 0.3)
    x0, x_t, t = 0.8, -0.3, 7
    grid = torch.linspace(-6, 6, 20001, dtype=torch.float64)

    def log_normal(x, mean, variance):
        return -((x - mean) ** 2) / (2 * variance)

    a, beta = p.alphas_cumprod[t - 1], p.betas[t]
    weight = (log_normal(grid, a.sqrt() * x0, 1 - a) + log_normal(x_t, (1 - beta).sqrt() * grid, beta)).exp()
    weight /= weight.sum()
    mean = (weight * grid).sum()
    variance = (weight * (grid - mean) ** 2).sum()
    one = torch.ones(1, 1, dtype=torch.float64)
    found = p.q_posterior(x0 * one, x_t * one, torch.tensor([t]))
    assert found[0].item() == pytest.approx(mean.item(), abs=1e-9)
    assert found[1].item() == pytest.approx(variance.item(), abs=1e-9)


# -- what a network predicts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_x0_and_noise_come_back_from_the_target(prediction_type, zero_snr):
    p = GaussianDiffusion(prediction_type=prediction_type, zero_terminal_snr=zero_snr)
    x0, noise, _ = drawn()
    last = 998 if zero_snr and prediction_type == "epsilon" else 999
    t = torch.tensor([0, 1, 250, 700, last])
    x_t, target = p.q_sample(x0, t, noise), p.target(x0, t, noise)
    close(p.predict_x0(x_t, t, target), x0, 1e-8)
    close(p.predict_noise(x_t, t, target), noise, 1e-8)


@pytest.mark.parametrize("to", PREDICTION_TYPES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@given(st.integers(1, 60), st.integers(0, 10**6))
def test_predictions_turn_into_each_other_and_back(prediction_type, to, timesteps, seed):
    """Whatever is predicted, true or not: it reads x_t as one x0 and one noise, and survives the way there and back."""
    g = torch.Generator().manual_seed(seed)
    betas = torch.rand(timesteps, generator=g, dtype=torch.float64) * 0.2 + 1e-4
    p, other = (GaussianDiffusion(betas=betas, prediction_type=k) for k in (prediction_type, to))
    t = torch.arange(timesteps)
    x_t, prediction = torch.randn(2, timesteps, 2, generator=g, dtype=torch.float64)
    turned = p.convert(x_t, t, prediction, to=to)
    close(other.convert(x_t, t, turned, to=prediction_type), prediction, 1e-6)
    x0, noise, v = (p.convert(x_t, t, prediction, to=k) for k in ("sample", "epsilon", "v_prediction"))
    scale = 1 + x0.abs().max()  # an epsilon that is off is off by far in x0
    close(p.q_sample(x0, t, noise) / scale, x_t / scale)
    of_v = GaussianDiffusion(betas=betas, prediction_type="v_prediction")
    close(of_v.target(x0, t, noise) / scale, v / scale)


def test_a_prediction_turns_into_nothing_else():
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="'flow' is none of"):
        GaussianDiffusion(10).convert(x, torch.tensor([0]), x, to="flow")


def test_the_three_targets():
    x0, noise, _ = drawn()
    t = torch.tensor([0, 1, 250, 700, 999])
    assert GaussianDiffusion(prediction_type="epsilon").target(x0, t, noise) is noise
    assert GaussianDiffusion(prediction_type="sample").target(x0, t, noise) is x0
    p = GaussianDiffusion(prediction_type="v_prediction")
    v = p.target(x0, t, noise)
    # v is the derivative of x_t along the angle: a quarter turn of (x0, noise)
    close(v, at(p.alphas_cumprod.sqrt(), t) * noise - at((1 - p.alphas_cumprod).sqrt(), t) * x0, 1e-12)
    close(v**2 + p.q_sample(x0, t, noise) ** 2, x0**2 + noise**2)


def test_epsilon_cannot_tell_x0_without_signal():
    p = GaussianDiffusion(zero_terminal_snr=True)
    x = torch.zeros(2, 1)
    with pytest.raises(ValueError, match="signal is zero"):
        p.predict_x0(x, torch.tensor([0, 999]), x)
    with pytest.raises(ValueError, match="signal is zero"):
        p.predict_v(x, torch.tensor([0, 999]), x)
    p.predict_x0(x, torch.tensor([0, 998]), x)


# -- DDIM -----------------------------------------------------------------------------------------------------------


def test_ddim_with_eta_1_between_neighbours_is_ddpm():
    p = GaussianDiffusion(prediction_type="v_prediction")
    x, prediction, noise = drawn()
    t = torch.tensor([1, 2, 300, 700, 999])
    close(p.ddim_step(x, t, t - 1, prediction, eta=1.0, noise=noise), p.p_sample(x, t, prediction, noise), 1e-8)


def test_ddim_at_the_clean_end_is_x0():
    p = GaussianDiffusion(prediction_type="v_prediction")
    x, prediction, _ = drawn()
    t = torch.tensor([0, 2, 300, 700, 999])
    close(p.ddim_step(x, t, torch.full((5,), -1), prediction), p.predict_x0(x, t, prediction), 1e-12)


def test_ddim_follows_the_true_noise_exactly():
    """With the true noise every deterministic step lands on the same trajectory, however long it is."""
    p = GaussianDiffusion(zero_terminal_snr=True, prediction_type="v_prediction")
    x0, noise, _ = drawn()
    t, t_prev = torch.tensor([999, 999, 500, 10, 1]), torch.tensor([998, 3, 20, 0, 0])
    x = p.ddim_step(p.q_sample(x0, t, noise), t, t_prev, p.target(x0, t, noise))
    close(x, p.q_sample(x0, t_prev, noise), 1e-8)


def test_ddim_wants_noise_where_it_is_used_and_a_step_down():
    p = GaussianDiffusion(10)
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="needs noise"):
        p.ddim_step(x, torch.tensor([5]), torch.tensor([4]), x, eta=0.1)
    for t_prev in (torch.tensor([5]), torch.tensor([3.0]), torch.tensor([7]), torch.tensor([-2]), torch.tensor([1, 2])):
        with pytest.raises(ValueError, match="t_prev must"):
            p.ddim_step(x, torch.tensor([5]), t_prev, x)
    for eta in (-0.1, 1.1):
        with pytest.raises(ValueError, match="eta must"):
            p.ddim_step(x, torch.tensor([5]), torch.tensor([4]), x, eta=eta, noise=x)


@given(st.integers(1, 200))
def test_trailing_timesteps_end_at_the_last_one(steps):
    found = GaussianDiffusion(200).trailing_timesteps(steps)
    assert len(found) == steps
    assert found[0] == 199
    assert min(found) >= 0
    assert found == sorted(set(found), reverse=True)


@pytest.mark.parametrize("steps", [0, 11])
def test_trailing_timesteps_need_as_many_as_there_are(steps):
    with pytest.raises(ValueError, match="1 … 10"):
        GaussianDiffusion(10).trailing_timesteps(steps)


def test_the_ddim_loop_takes_each_step_once():
    """With eta = 1 and every timestep it is p_sample_loop, on the same noise."""
    p = GaussianDiffusion(20, 0.01, 0.2, prediction_type="v_prediction")
    x_T = drawn()[0]
    asked = []

    def predict(x, t):
        asked.append(t[0].item())
        return torch.tanh(x) * (1 + t.reshape(-1, 1, 1, 1) / 20)

    def generator():
        return torch.Generator().manual_seed(1)

    whole = list(p.ddim_sample_loop(predict, x_T, steps=20, eta=1.0, generator=generator()))
    ancestral = list(p.p_sample_loop(predict, x_T, generator=generator()))
    assert asked == [*range(19, -1, -1)] * 2
    for a, b in zip(whole, ancestral, strict=True):
        close(a, b)
    asked.clear()
    (only,) = p.ddim_sample_loop(predict, x_T, steps=1)
    assert asked == [19]
    t = torch.full((5,), 19)
    close(only, p.predict_x0(x_T, t, predict(x_T, t)))
    assert len(list(p.ddim_sample_loop(predict, x_T, steps=7))) == 7


def test_a_share_of_the_way_is_a_t_of_its_own_unit():
    t = GaussianDiffusion(1000).at(torch.tensor([0.0, 0.0005, 0.5, 0.9995, 1.0]))
    assert torch.equal(t, torch.tensor([0, 0, 500, 999, 999]))
