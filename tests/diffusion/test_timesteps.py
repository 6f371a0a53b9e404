"""Laws of t against their distribution functions, diffusers' own draws, and the steps that a process has."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from lorakit.core.errors import InputError
from lorakit.core.settings import validate
from lorakit.diffusion import GaussianDiffusion, RectifiedFlow
from lorakit.diffusion.flow import DynamicShift, shift_time
from lorakit.diffusion.objectives.denoising import Settings
from lorakit.diffusion.timesteps import Timesteps, law

FLOW = RectifiedFlow()
QUANTILES = (torch.arange(999, dtype=torch.float64) + 1) / 1000


def laws(**values):
    return TypeAdapter(Timesteps).validate_python(values)


def flow_t(quantile=QUANTILES, **values):
    return law(laws(**values), FLOW)(quantile)


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def normal(x):
    return torch.special.ndtr(x)


# -- closed forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "distribution"),
    [
        (dict(kind="uniform"), lambda t: t),
        (dict(kind="logit_normal"), lambda t: normal(t.logit())),
        (dict(kind="logit_normal", mean=-0.7, std=1.6), lambda t: normal((t.logit() + 0.7) / 1.6)),
        (dict(kind="sigmoid", scale=0.5), lambda t: normal(t.logit() / 0.5)),
        # SD3 eq. 21, 2 / (π - 2πt + 2πt²), integrated
        (dict(kind="cosmap"), lambda t: 2 / math.pi * torch.atan2(t, 1 - t)),
        (dict(kind="shifted", shift=3.0), lambda t: t / (3 - 2 * t)),
        (dict(kind="shifted", shift=0.5), lambda t: t / (0.5 + 0.5 * t)),
        # snr = ((1 - t) / t)²: its logarithm is normal, and falls as t rises
        (dict(kind="log_snr"), lambda t: 1 - normal((2 * ((1 - t) / t).log() + 6) / 2)),
        (dict(kind="log_snr", mean=1.0, std=0.5), lambda t: 1 - normal((2 * ((1 - t) / t).log() - 1) / 0.5)),
        (dict(kind="content"), lambda t: 1 - (1 - t) ** (1 / 3)),
        (dict(kind="style", power=2.0), lambda t: t.sqrt()),
    ],
)
def test_a_law_is_the_inverse_of_its_distribution_function(values, distribution):
    t = flow_t(**values)
    close(distribution(t), QUANTILES)


@pytest.mark.parametrize(
    ("alpha", "beta", "expected"),
    [
        (1.0, 1.0, lambda q: q),
        (0.01, 1.0, lambda q: q**100),
        (0.3, 1.0, lambda q: q ** (1 / 0.3)),
        (5.0, 1.0, lambda q: q ** (1 / 5)),
        (1.0, 0.05, lambda q: 1 - (1 - q) ** 20),
        (1.0, 7.0, lambda q: 1 - (1 - q) ** (1 / 7)),
        (0.5, 0.5, lambda q: (math.pi * q / 2).sin() ** 2),
        (2.0, 2.0, lambda q: 0.5 - ((1 - 2 * q).asin() / 3).sin()),  # the root of 3t² - 2t³ = q
    ],
)
def test_the_beta_law_where_it_has_a_closed_form(alpha, beta, expected):
    close(flow_t(kind="beta", alpha=alpha, beta=beta), expected(QUANTILES), 1e-6)


@pytest.mark.parametrize(("alpha", "beta"), [(0.05, 3.0), (0.4, 0.7), (3.0, 8.0), (60.0, 1.5), (400.0, 900.0)])
def test_the_beta_law_has_its_moments(alpha, beta):
    quantile = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    t = flow_t(quantile, kind="beta", alpha=alpha, beta=beta)
    mean = alpha / (alpha + beta)
    assert t.mean().item() == pytest.approx(mean, abs=1e-6)
    assert t.var().item() == pytest.approx(mean * (1 - mean) / (alpha + beta + 1), rel=1e-3)


def test_logit_normal_and_mode_are_the_stock_draws():
    from diffusers.training_utils import compute_density_for_timestep_sampling as stock

    def seeded():
        return torch.Generator().manual_seed(5)

    quantile = normal(torch.normal(mean=0.0, std=1.0, size=(4000,), generator=seeded()).double())
    drawn = stock("logit_normal", 4000, logit_mean=0.4, logit_std=1.3, generator=seeded())
    close(flow_t(quantile, kind="logit_normal", mean=0.4, std=1.3), drawn.double(), 1e-6)
    quantile = 1 - torch.rand(4000, generator=seeded()).double()  # theirs falls
    for scale in (-1.0, -0.4, 0.5, 1.29, 1.75):
        drawn = stock("mode", 4000, mode_scale=scale, generator=seeded())
        close(flow_t(quantile, kind="mode", scale=scale), drawn.double(), 1e-6)


def test_the_shift_is_the_flows_own():
    close(flow_t(kind="shifted", shift=3.0), shift_time(QUANTILES, 3.0))
    # of a logit-normal law it is a mean of ln(shift)
    shifted = shift_time(flow_t(kind="logit_normal", mean=0.2, std=0.9), 3.0)
    close(flow_t(kind="logit_normal", mean=0.2 + math.log(3), std=0.9), shifted)


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (96, 42), (128, 128), (160, 160)])
def test_the_models_shift_goes_by_the_size_of_the_latents(size):
    """FLUX: mu is a line through 0.5 at 256 tokens and 1.15 at 4096, and t = e^mu / (e^mu + 1/s - 1) of a sigmoid s."""
    flux = RectifiedFlow(dynamic=DynamicShift())
    mu = 0.5 + (size[0] * size[1] / 4 - 256) * (1.15 - 0.5) / (4096 - 256)
    s = torch.sigmoid(0.8 * torch.special.ndtri(QUANTILES))
    drawn = law(laws(kind="sigmoid", scale=0.8, model_shift=True), flux)(QUANTILES, size=size)
    close(drawn, math.exp(mu) / (math.exp(mu) + 1 / s - 1))
    even = law(laws(kind="uniform", model_shift=True), flux)(QUANTILES, size=size)
    close(even, shift_time(QUANTILES, flux.shift_at(size[0] * size[1] // 4)))
    cut = law(laws(kind="uniform", model_shift=True, min=0.3, max=0.9), flux)(QUANTILES, size=size)
    low, high = (shift_time(torch.tensor(t).double(), math.exp(-mu)) for t in (0.3, 0.9))
    close(cut, shift_time(low + (high - low) * QUANTILES, math.exp(mu)), 1e-7)


def test_a_constant_shift_of_the_model_is_the_shifted_law():
    sd3 = RectifiedFlow(shift=3.0)
    close(law(laws(kind="uniform", model_shift=True), sd3)(QUANTILES), flow_t(kind="shifted", shift=3.0))
    patches = DynamicShift(patch=1)
    assert (patches.tokens(20, 30), DynamicShift().tokens(20, 31)) == (600, 150)


@pytest.mark.parametrize("process", [GaussianDiffusion(), FLOW], ids=["gaussian", "flow"])
def test_the_shift_of_a_model_that_has_none_is_refused(process):
    with pytest.raises(ValueError, match=r"objective\.timesteps\.model_shift: this model has no shift"):
        law(laws(kind="mode", model_shift=True), process)


def test_a_range_that_the_models_shift_leaves_is_refused_at_once():
    asked = laws(kind="logit_normal", mean=-3.0, std=0.2, min=0.4, model_shift=True)
    with pytest.raises(ValueError, match="leaves nothing"):
        law(asked, RectifiedFlow(dynamic=DynamicShift()))


# -- what all laws keep ---------------------------------------------------------------------------------------------

KINDS = [
    dict(kind="uniform"),
    dict(kind="logit_normal", mean=1.0),
    dict(kind="sigmoid", scale=2.0),
    dict(kind="mode"),
    dict(kind="mode", scale=-1.0),
    dict(kind="mode", scale=2 / (math.pi - 2)),
    dict(kind="cosmap"),
    dict(kind="beta", alpha=0.4, beta=3.0),
    dict(kind="shifted"),
    dict(kind="log_snr", mean=-2.0),
    dict(kind="content"),
    dict(kind="style"),
]
PROCESSES = [
    FLOW,
    GaussianDiffusion(),
    GaussianDiffusion(37, 0.01, 0.2),
    GaussianDiffusion(1000, 0.00085, 0.012, schedule="scaled_linear", zero_terminal_snr=True),
]
NAMES = ["flow", "linear", "short", "zero"]
FLOATS = st.floats(0, 1, exclude_max=True, width=32)


@pytest.mark.parametrize("values", KINDS, ids=str)
@pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
def test_t_lies_within_the_process_and_never_falls(values, process):
    @settings(max_examples=8)
    @given(st.lists(FLOATS, min_size=1, max_size=6), st.booleans())
    def check(quantiles, ranged):
        kept = dict(min=0.2, max=0.7) if ranged else {}
        drawn = law(laws(**values, **kept), process)
        quantile = torch.tensor([0.0, *sorted(quantiles), 1 - 2**-24])
        t = drawn(quantile)
        process.snr(t)  # refuses what it does not know
        assert bool((t.diff() >= 0).all())
        share = t.double() if process is FLOW else (t + 0.5) / process.timesteps
        if ranged:
            assert bool(((share >= 0.2 - 1e-6) & (share <= 0.7 + 1e-6)).all())
        assert t.dtype == (torch.float32 if process is FLOW else torch.long)

    check()


@pytest.mark.parametrize("count", [1, 7, 1000, 4096])
def test_the_uniform_law_keeps_its_bits(count):
    quantile = torch.cat([torch.rand(100_000), torch.tensor([0.0, 1 - 2**-24])])
    t = law(laws(kind="uniform"), GaussianDiffusion(count))(quantile)
    assert torch.equal(t, (quantile.double() * count).long().clamp(max=count - 1))
    even = law(laws(kind="uniform"), GaussianDiffusion(count))((torch.arange(4 * count) + 0.5) / (4 * count))
    assert even.bincount().tolist() == [4] * count


@pytest.mark.parametrize("values", KINDS, ids=str)
def test_a_range_keeps_the_shape_of_the_law(values):
    """Within the range, quantiles of the cut law are evenly spaced quantiles of the whole one."""
    drawn = law(laws(**values), FLOW)
    least, most = drawn(torch.tensor([0.3, 0.8], dtype=torch.float64)).tolist()
    cut = flow_t(**values, min=least, max=most)
    close(cut, drawn(0.3 + 0.5 * QUANTILES), 1e-7)


def test_a_range_has_the_steps_that_it_says():
    for least, most in [(0.29, 0.57), (0.0, 0.1), (0.1, 1.0), (0.2501, 0.2502)]:
        drawn = law(laws(kind="uniform", min=least, max=most), GaussianDiffusion())
        t = drawn((torch.arange(100_000) + 0.5) / 100_000)
        assert (int(t.min()), int(t.max())) == (math.floor(least * 1000), math.ceil(most * 1000) - 1)
        if most - least > 0.01:
            assert t.bincount()[int(t.min()) :].float().std().item() < 1  # all alike


def test_a_range_loses_no_step_to_rounding():
    assert 0.29 * 100 < 29 and 0.57 * 100 < 57
    t = law(laws(kind="uniform", min=0.29, max=0.57), GaussianDiffusion(100, 0.01, 0.1))(
        torch.tensor([0.0, 1 - 2**-24])
    )
    assert t.tolist() == [29, 56]


# -- the log-SNR law of a discrete process --------------------------------------------------------------------------


SHORT_ZERO = GaussianDiffusion(12, 0.01, 0.3, zero_terminal_snr=True)  # its last step but one has signal to speak of


@pytest.mark.parametrize("process", [*PROCESSES[1:], SHORT_ZERO], ids=[*NAMES[1:], "short zero"])
@pytest.mark.parametrize(("mean", "std"), [(-1.0, 1.5), (-6.0, 2.0)])
def test_log_snr_is_normal_between_the_steps(process, mean, std):
    count = 400_000
    t = law(laws(kind="log_snr", mean=mean, std=std), process)((torch.arange(count) + 0.5).double() / count)
    snr = process.snr(torch.arange(process.timesteps))
    logs = snr[snr > 0].log()
    cuts = torch.cat([logs[:1], (logs[1:] + logs[:-1]) / 2, logs[-1:]])
    share = normal((cuts - mean) / std)
    expected = (share[:-1] - share[1:]) / (share[0] - share[-1])
    found = t.bincount(minlength=process.timesteps).double() / count
    close(found[: len(logs)], expected, 1e-5)
    assert not found[len(logs) :].any()  # a step without signal has no log-SNR


# -- an explicit list -----------------------------------------------------------------------------------------------


def test_a_list_is_taken_as_it_stands():
    quantile = (torch.arange(12) + 0.5) / 12
    t = law(laws(kind="list", values=[900, 3, 3, 500]), GaussianDiffusion())(quantile)
    assert t.tolist() == [3] * 6 + [500] * 3 + [900] * 3
    t = law(laws(kind="list", values=[1.0, 0.25]), FLOW)(quantile)
    assert t.tolist() == [0.25] * 6 + [1.0] * 6
    assert int(law(laws(kind="list", values=[1, 2, 3]), GaussianDiffusion())(torch.tensor([1 - 2**-24]))) == 3


@pytest.mark.parametrize(
    ("values", "process", "message"),
    [
        ([0, 1000], GaussianDiffusion(), r"values: 1000: the timesteps of this model are whole numbers in 0 … 999"),
        ([0.5], GaussianDiffusion(), r"values: 0\.5: .* whole numbers"),
        ([0, 500], FLOW, r"values: 500: .* numbers in 0 … 1"),
    ],
)
def test_a_list_of_steps_that_are_none_is_refused(values, process, message):
    with pytest.raises(ValueError, match=message):
        law(laws(kind="list", values=values), process)


@pytest.mark.parametrize(
    ("values", "process"),
    [
        (dict(kind="logit_normal", mean=-9.0, std=0.1, min=0.9), FLOW),
        (dict(kind="log_snr", mean=60.0), GaussianDiffusion()),
    ],
)
def test_a_law_without_a_t_is_refused(values, process):
    with pytest.raises(ValueError, match=r"objective\.timesteps: .* move them"):
        law(laws(**values), process)


# -- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"kind": "uniform", "shift": 3.0}, "objective.timesteps.shift is not a setting of denoising."),
        ({"kind": "shifted", "model_shift": True}, "objective.timesteps.model_shift is not a setting of denoising."),
        ({"kind": "list", "values": [1], "min": 0.1}, "objective.timesteps.min is not a setting of denoising."),
        ({"kind": "uniform", "min": 0.5, "max": 0.5}, "objective.timesteps: min = 0.5 must be below max = 0.5."),
        ({"kind": "mode", "scale": 1.8}, "objective.timesteps.scale = 1.8: "),
        ({"kind": "list", "values": []}, "objective.timesteps.values = []: "),
        ({"kind": "logitnormal"}, "objective.timesteps.kind = 'logitnormal' is not known. Did you mean logit_normal?"),
    ],
)
def test_what_a_law_does_not_have_is_refused(values, problem):
    with pytest.raises(InputError) as caught:
        validate(Settings, {"timesteps": values}, where="objective", name="denoising")
    assert len(caught.value.problems) == 1 and caught.value.problems[0].startswith(problem)
