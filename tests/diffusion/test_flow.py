"""Rectified flow: closed forms in double precision, then stock schedulers; `test_mixture.py` has whole samplings."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorakit.diffusion import RectifiedFlow
from lorakit.diffusion.flow import DynamicShift, shift_time

SHAPE = (5, 2, 3, 3)
T = torch.tensor([0.0, 1e-3, 0.3, 0.9, 1.0], dtype=torch.float64)


def drawn(seed=0, shape=SHAPE) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(3)]


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


# -- the line ---------------------------------------------------------------------------------------------------------


def test_the_line_and_its_ends():
    flow = RectifiedFlow()
    x0, noise, _ = drawn()
    t = T.reshape(-1, 1, 1, 1)
    close(flow.q_sample(x0, T, noise), (1 - t) * x0 + t * noise)
    assert torch.equal(flow.q_sample(x0, T, noise)[0], x0[0])
    assert torch.equal(flow.q_sample(x0, T, noise)[4], noise[4])
    assert torch.equal(flow.target(x0, T, noise), noise - x0)


def test_the_target_is_the_derivative_of_the_line():
    flow = RectifiedFlow()
    x0, noise, _ = drawn()
    t, h = torch.full((5,), 0.4, dtype=torch.float64), 1e-3
    slope = (flow.q_sample(x0, t + h, noise) - flow.q_sample(x0, t - h, noise)) / (2 * h)
    close(slope, flow.target(x0, t, noise), 1e-10)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.integers(0, 10**6))
def test_both_ends_come_back_from_any_velocity(times, seed):
    """From the true one the true ends; from any other, ends between which x_t lies and whose difference it is."""
    flow = RectifiedFlow()
    t = torch.tensor(times, dtype=torch.float64)
    x0, noise, velocity = drawn(seed, (len(t), 3))
    x_t = flow.q_sample(x0, t, noise)
    close(flow.predict_x0(x_t, t, noise - x0), x0)
    close(flow.predict_noise(x_t, t, noise - x0), noise)
    start, end = flow.predict_x0(x_t, t, velocity), flow.predict_noise(x_t, t, velocity)
    close(flow.q_sample(start, t, end), x_t)
    close(flow.target(start, t, end), velocity)


def test_snr_in_closed_form():
    flow = RectifiedFlow()
    assert flow.snr(torch.tensor([0.0, 0.2, 0.5, 1.0], dtype=torch.float64)).tolist() == [math.inf, 16.0, 1.0, 0.0]
    assert flow.snr(torch.tensor([0.25])).dtype == torch.float64
    assert bool((flow.snr(torch.linspace(0, 1, 1001, dtype=torch.float64)).diff()[1:] < 0).all())


# -- t ----------------------------------------------------------------------------------------------------------------

WRONG = [
    torch.tensor([0.1, 0.2]),  # one too few
    torch.tensor(0.3),
    torch.tensor([[0.1, 0.2, 0.3]]),
    torch.tensor([0, 1, 1]),  # whole numbers are the other process's unit
    torch.tensor([0.5, 0.5, 1.001]),
    torch.tensor([-1e-6, 0.5, 0.5]),
    torch.tensor([0.5, math.nan, 0.5]),
    torch.tensor([1.0, 500.0, 999.0]),
]


@pytest.mark.parametrize("t", WRONG)
def test_a_wrong_t_is_refused_by_every_method(t):
    flow = RectifiedFlow()
    x, right = torch.zeros(3, 2), torch.full((3,), 1.0)
    calls = {
        "q_sample": (x, t, x),
        "target": (x, t, x),
        "predict_x0": (x, t, x),
        "predict_noise": (x, t, x),
        "euler_step": (x, t, 0 * right, x),
    }
    for method, arguments in calls.items():
        with pytest.raises(ValueError, match="t must"):
            getattr(flow, method)(*arguments)
    with pytest.raises(ValueError, match="t must"):
        flow.heun_step(x, right, t, x, ahead=x)
    if t.ndim != 1 or len(t) == 3:
        with pytest.raises(ValueError, match="t must"):
            flow.snr(t)


def test_a_step_leads_down():
    flow = RectifiedFlow()
    x = torch.zeros(2, 1)
    for t_next in (torch.tensor([0.5, 0.1]), torch.tensor([0.1, 0.6])):
        with pytest.raises(ValueError, match="below t"):
            flow.euler_step(x, torch.tensor([0.5, 0.5]), t_next, x)
        with pytest.raises(ValueError, match="below t"):
            flow.heun_step(x, torch.tensor([0.5, 0.5]), t_next, x, ahead=x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_results_come_in_the_dtype_handed_in_and_are_rounded_once(dtype):
    """1 - t is taken in double: in bfloat16 1 - 0.999 would be 0."""
    flow = RectifiedFlow()
    x0, x_t, noise = (x.to(dtype) for x in drawn())
    t, t_next = T.clamp(min=0.5, max=0.999), T.clamp(max=0.4)
    results = [
        flow.q_sample(x0, t, noise),
        flow.target(x0, t, noise),
        flow.predict_x0(x_t, t, noise),
        flow.predict_noise(x_t, t, noise),
        flow.euler_step(x_t, t, t_next, noise),
        flow.heun_step(x_t, t, t_next, noise, ahead=x0),
    ]
    assert {r.dtype for r in results} == {dtype}
    assert {tuple(r.shape) for r in results} == {SHAPE}
    one = torch.ones(SHAPE, dtype=dtype)
    rest = flow.q_sample(one, torch.full((5,), 0.999, dtype=torch.float64), 0 * one)
    torch.testing.assert_close(
        rest.double(), torch.full(SHAPE, 1 - 0.999, dtype=torch.float64), rtol=torch.finfo(dtype).eps, atol=0
    )
    seen = []
    for x in flow.sample_loop(lambda x, t: (seen.append(t), x)[1], x_t, sigmas=flow.sigmas(7), solver="heun"):
        assert x.dtype == dtype
    asked = torch.stack(seen)[:, 0].unique().flip(0)
    torch.testing.assert_close(asked.double(), flow.sigmas(7)[:-1], rtol=1e-6, atol=0)  # half precision or not


# -- the shift --------------------------------------------------------------------------------------------------------


@given(st.floats(0, 1), st.floats(0.1, 20))
def test_a_shift_multiplies_noise_over_signal(t, shift):
    moved = shift_time(torch.tensor(t, dtype=torch.float64), shift)
    back = shift_time(moved, 1 / shift)
    assert back.item() == pytest.approx(t, abs=1e-12)
    if 1e-6 < t < 1 - 1e-6:
        assert (moved / (1 - moved)).item() == pytest.approx(shift * t / (1 - t), rel=1e-9)
    flow = RectifiedFlow()
    if 0.01 < t < 0.99:  # so the signal-to-noise ratio falls by the square, at which t it may be
        assert flow.snr(moved[None]).item() == pytest.approx(flow.snr(torch.tensor([t]).double()).item() / shift**2)


@pytest.mark.parametrize("shift", [0, -1.0, math.inf, math.nan])
def test_what_is_no_shift_is_refused(shift):
    with pytest.raises(ValueError, match="above 0"):
        shift_time(torch.tensor(0.5), shift)
    with pytest.raises(ValueError, match="above 0"):
        RectifiedFlow(shift=shift)


def test_a_dynamic_shift_follows_the_number_of_tokens():
    """FLUX: 0.5 at 256 pixels square (256 tokens), 1.15 at 1024 (4096); the line goes on."""
    dynamic = DynamicShift()
    assert dynamic.mu(256) == pytest.approx(0.5)
    assert dynamic.mu(4096) == pytest.approx(1.15)
    assert dynamic.mu(2176) == pytest.approx(0.825)
    assert dynamic.mu(8192) == pytest.approx(1.15 + 0.65 * 4096 / 3840)
    assert dynamic.at(4096) == pytest.approx(3.158193)
    assert DynamicShift(kind="linear").at(4096) == pytest.approx(1.15)
    assert RectifiedFlow(dynamic=dynamic).shift_at(4096) == dynamic.at(4096)
    assert RectifiedFlow(shift=3.0).shift_at(4096) == RectifiedFlow(shift=3.0).shift_at() == 3.0


def test_wrong_settings_are_refused():
    for message, make in {
        "number of tokens": lambda: RectifiedFlow(dynamic=DynamicShift()).sigmas(4),
        "one shift": lambda: RectifiedFlow(shift=3.0, dynamic=DynamicShift()),
        "'log' is none of": lambda: DynamicShift(kind="log"),
        "two points": lambda: DynamicShift(256, 256),
        "shift_terminal must": lambda: RectifiedFlow(shift_terminal=1.0),
        "timesteps must": lambda: RectifiedFlow(0),
        "at least 1, got 0": lambda: RectifiedFlow().sigmas(0),
        "at least 2, got 1": lambda: RectifiedFlow(shift_terminal=0.1).sigmas(1),
        "spacing 'even'": lambda: RectifiedFlow().sigmas(4, spacing="even"),
        "solver 'rk4'": lambda: list(
            RectifiedFlow().sample_loop(lambda x, t: x, torch.zeros(1, 1), sigmas=torch.ones(1), solver="rk4")
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            make()


@given(st.integers(1, 100), st.floats(0.2, 10), st.sampled_from(["trailing", "stock"]))
def test_sigmas_fall_from_1_to_0(steps, shift, spacing):
    sigmas = RectifiedFlow(shift=shift).sigmas(steps, spacing=spacing)
    assert sigmas.dtype == torch.float64
    assert len(sigmas) == steps + 1
    assert (sigmas[0].item(), sigmas[-1].item()) == (1.0, 0.0)
    assert bool((sigmas.diff() < 0).all())


# -- diffusers as oracle: its tables are of single precision ----------------------------------------------------------

PLAIN = dict(num_train_timesteps=1000)
DYNAMIC = dict(use_dynamic_shifting=True, shift=3.0, **PLAIN)
CONFIGURATIONS = [
    PLAIN,
    dict(shift=3.0, **PLAIN),  # SD 3
    dict(shift=0.5, **PLAIN),
    dict(shift=6.0, num_train_timesteps=400),
    DYNAMIC,  # FLUX
    dict(time_shift_type="linear", **DYNAMIC),
    dict(base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02, **DYNAMIC),  # Qwen-Image
    dict(shift=2.0, shift_terminal=0.1, **PLAIN),
]


@pytest.mark.parametrize("config", CONFIGURATIONS)
@pytest.mark.parametrize("spacing", ["trailing", "stock"])
@pytest.mark.parametrize("steps", [1, 2, 7, 28, 50])
@pytest.mark.parametrize("tokens", [64, 1024, 4096])
def test_sigmas_are_the_stock_ones(config, spacing, steps, tokens):
    from diffusers import FlowMatchEulerDiscreteScheduler

    if steps == 1 and "shift_terminal" in config:
        return  # the stock scheduler gives NaN, ours refuses
    stock = FlowMatchEulerDiscreteScheduler(**config)
    flow = RectifiedFlow.from_scheduler_config(dict(stock.config))
    asked = {"sigmas": torch.linspace(1, 1 / steps, steps).tolist()} if spacing == "trailing" else {}
    # the pipelines' calculate_shift
    c = stock.config
    slope = (c.max_shift - c.base_shift) / (c.max_image_seq_len - c.base_image_seq_len)
    mu = tokens * slope + c.base_shift - slope * c.base_image_seq_len
    stock.set_timesteps(steps, mu=mu if c.use_dynamic_shifting else None, **asked)
    close(flow.sigmas(steps, tokens=tokens, spacing=spacing), stock.sigmas, 5e-6)
    close(flow.sigmas(steps, tokens=tokens, spacing=spacing)[:-1] * flow.timesteps, stock.timesteps, 5e-6)
    assert flow.timesteps == c.num_train_timesteps
    if c.use_dynamic_shifting:  # a family's own rule for mu overrides the line
        stock.set_timesteps(steps, mu=1.7, **asked)
        own = math.exp(1.7) if c.time_shift_type == "exponential" else 1.7
        close(flow.sigmas(steps, shift=own, spacing=spacing), stock.sigmas, 5e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_forward_is_the_stock_one_at_every_t(shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    stock = FlowMatchEulerDiscreteScheduler(shift=shift)
    x0, noise, _ = drawn(shape=(1000, 3))
    t = stock.timesteps.double() / 1000
    own = RectifiedFlow().q_sample(x0, t, noise)
    assert ((own - stock.scale_noise(x0, stock.timesteps, noise)).abs() / (1 + own.abs())).max() < 5e-6


def predicted(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(3 * x) + t.reshape(-1, 1, 1, 1).to(x)


@pytest.mark.parametrize("config", CONFIGURATIONS)
def test_every_step_is_the_stock_euler_step(config):
    from diffusers import FlowMatchEulerDiscreteScheduler

    stock = FlowMatchEulerDiscreteScheduler(**config)
    flow = RectifiedFlow.from_scheduler_config(dict(stock.config))
    stock.set_timesteps(20, mu=1.15 if stock.config.use_dynamic_shifting else None)
    theirs = x = drawn()[0].float()
    sigmas = flow.sigmas(20, tokens=4096, spacing="stock")
    if stock.config.max_shift == 0.9:
        sigmas = flow.sigmas(20, shift=math.exp(1.15), spacing="stock")
    own = list(flow.sample_loop(predicted, x, sigmas=sigmas))
    for i, time in enumerate(stock.timesteps):
        t = torch.full((5,), float(time) / flow.timesteps)
        theirs = stock.step(predicted(theirs, t), time, theirs).prev_sample
        close(own[i], theirs, 5e-6)
    assert len(own) == 20


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_step_from_any_t_is_the_stock_one(shift):
    """All thousand, each from another x, with another velocity; the way that is gone is good to fp32's 1e-7 of x."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    stock = FlowMatchEulerDiscreteScheduler(shift=shift)
    stock.set_timesteps(1000)
    flow = RectifiedFlow.from_scheduler_config(dict(stock.config))
    x, velocity, _ = drawn(shape=(1000, 3))
    sigmas = flow.sigmas(1000, spacing="stock")
    own = flow.euler_step(x, sigmas[:-1], sigmas[1:], velocity)
    rows = []
    for i, time in enumerate(stock.timesteps):
        stock._step_index = i  # else it counts on from the step before
        rows.append(stock.step(velocity[i : i + 1], time, x[i : i + 1]).prev_sample)
    assert ((own - torch.cat(rows)).abs() / (1 + own.abs())).max() < 2e-7
    gone = (own - x) / velocity
    torch.testing.assert_close(gone, sigmas.diff()[:, None].expand_as(gone), rtol=1e-9, atol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_every_step_is_the_stock_heun_step(shift):
    from diffusers import FlowMatchHeunDiscreteScheduler

    stock = FlowMatchHeunDiscreteScheduler(shift=shift)
    flow = RectifiedFlow.from_scheduler_config({**stock.config, "_class_name": "FlowMatchHeunDiscreteScheduler"})
    stock.set_timesteps(10)
    theirs = x = drawn()[0].float()
    own = list(flow.sample_loop(predicted, x, sigmas=flow.sigmas(10, spacing="stock"), solver="heun"))
    after = []
    for time in stock.timesteps:
        t = torch.full((5,), float(time) / 1000)
        theirs = stock.step(predicted(theirs, t), time, theirs).prev_sample
        if stock.state_in_first_order:
            after.append(theirs)
    after.append(theirs)  # the step to 0 has no second half
    assert len(own) == len(after) == 10
    for a, b in zip(own, after):
        close(a, b, 5e-6)


def test_other_configurations_of_flows():
    sana = {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 3.0}
    sana["prediction_type"] = "flow_prediction"
    assert RectifiedFlow.from_scheduler_config(sana).shift == 3.0
    schnell = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0, "use_dynamic_shifting": False}
    assert RectifiedFlow.from_scheduler_config(schnell).dynamic is None
    with pytest.raises(ValueError, match="'epsilon' is not that of a rectified flow"):
        RectifiedFlow.from_scheduler_config({**sana, "prediction_type": "epsilon"})
    with pytest.raises(ValueError, match="DDIMScheduler is not"):
        RectifiedFlow.from_scheduler_config({"_class_name": "DDIMScheduler"})


@pytest.mark.parametrize(
    "key",
    ["invert_sigmas", "stochastic_sampling", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"],
)
def test_a_setting_that_would_have_no_effect_is_refused(key):
    from diffusers import FlowMatchEulerDiscreteScheduler

    assert key in FlowMatchEulerDiscreteScheduler().config
    with pytest.raises(ValueError, match=key):
        RectifiedFlow.from_scheduler_config({key: True})


def test_a_share_of_the_way_is_a_t_of_its_own_unit():
    t = RectifiedFlow(1000).at(torch.tensor([0.0, 0.0005, 0.5, 0.9995, 1.0]))
    assert torch.equal(t, torch.tensor([0.0, 0.0005, 0.5, 0.9995, 1.0]))
