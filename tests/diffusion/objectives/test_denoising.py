"""The denoising objective in closed form: what a known prediction costs, at which t, with which weight."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit.core.errors import InputError
from lorakit.core.settings import validate
from lorakit.core.types import Batch
from lorakit.diffusion import GaussianDiffusion, RectifiedFlow
from lorakit.diffusion.flow import DynamicShift, shift_time
from lorakit.diffusion.objectives import OBJECTIVES
from lorakit.diffusion.objectives.denoising import Settings, build, per_example, problems


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


# -- every option takes effect ----------------------------------------------------------------------------------------

PROCESSES: dict[str, Any] = {
    "epsilon": GaussianDiffusion(),
    "v_prediction": GaussianDiffusion(prediction_type="v_prediction"),
    "sample": GaussianDiffusion(prediction_type="sample"),
    "flow": RectifiedFlow(),
}
# what a kind needs, and another value for each setting that it has
OTHER: dict[str, dict[str, dict[str, Any]]] = {
    "timesteps": {
        "uniform": {},
        "logit_normal": {"mean": 0.5, "std": 0.6},
        "sigmoid": {"scale": 0.5},
        "mode": {"scale": 0.5},
        "cosmap": {},
        "beta": {"alpha": 3.0, "beta": 0.7},
        "shifted": {"shift": 2.0},
        "log_snr": {"mean": -2.0, "std": 1.0},
        "content": {"power": 2.0},
        "style": {"power": 2.0},
        "list": {"values": [1]},
    },
    "weighting": {
        "none": {},
        "min_snr": {"gamma": 0.3, "soft": True},
        "p2": {"k": 0.5, "gamma": 0.5},
        "debiased": {},
        "snr_v": {},
        "sigma": {"power": -2.0},
        "edm": {"sigma_data": 0.8},
    },
    "loss": {
        "mse": {},
        "l1": {},
        "log_cosh": {},
        "huber": {"delta": 0.4, "schedule": "snr"},
        "pseudo_huber": {"delta": 0.4, "schedule": "exponential"},
        "smooth_l1": {"delta": 0.4, "schedule": "snr"},
    },
}
RANGE = {"min": 0.3, "max": 0.6}
REFUSED = {("min_snr", "flow"), ("snr_v", "epsilon")}


def settings(**values: Any) -> Settings:
    return validate(Settings, values, where="objective", name="denoising")


def losses(process: Any, **values: Any) -> Tensor:
    """The losses of a fixed batch under a prediction that is neither right nor far off."""
    given = replace(batch(), quantile=torch.tensor([0.03, 0.31, 0.52, 0.94]))

    def predict(x_t: Tensor, t: Tensor, *, text: Any = None, adapter: bool = True) -> Tensor:
        return 0.3 * x_t

    return build(settings(**values), process)(predict, given).per_example


def of_kind(kind: str) -> dict[str, Any]:
    return {"kind": kind, **({"values": [1, 0]} if kind == "list" else {})}


def kinds(option: str) -> dict[str, Any]:
    """The settings classes that an option may be of, by their kinds."""
    models = Settings.model_fields[option].annotation.__args__  # type: ignore[union-attr]
    return {model.model_fields["kind"].annotation.__args__[0]: model for model in models}


def test_every_kind_and_setting_is_walked() -> None:
    assert set(OTHER) == set(Settings.model_fields) - {"kind", "noise", "preservation"}  # these have tests of their own
    for option, of_option in OTHER.items():
        assert set(of_option) == set(kinds(option))
        for kind, model in kinds(option).items():
            ranged = set(RANGE) if option == "timesteps" and kind != "list" else set()
            # the loader's, and what needs a flow that has a shift
            elsewhere = {"kind", "stratified", "model_shift"}
            assert set(of_option[kind]) | ranged == set(model.model_fields) - elsewhere


@pytest.mark.parametrize("prediction_type", PROCESSES)
@pytest.mark.parametrize("option", OTHER)
def test_every_option_changes_the_loss(option: str, prediction_type: str) -> None:
    process = PROCESSES[prediction_type]
    default = losses(process)
    seen: dict[str, Tensor] = {}
    for kind, others in OTHER[option].items():
        values = of_kind(kind)
        if (kind, prediction_type) in REFUSED:
            with pytest.raises(ValueError, match=f"objective.weighting.kind = {kind!r}"):
                losses(process, **{option: values})
            continue
        base = losses(process, **{option: values})
        assert bool(base.isfinite().all())
        if kind in ("uniform", "none", "mse"):
            assert torch.equal(base, default)
        # a sigmoid is the logit-normal law around 0
        for other, found in seen.items():
            assert {kind, other} == {"logit_normal", "sigmoid"} or not torch.equal(base, found), (kind, other)
        seen[kind] = base
        ranged = RANGE if option == "timesteps" and kind != "list" else {}
        for key, value in {**others, **ranged}.items():
            changed = losses(process, **{option: {**values, key: value}})
            assert not torch.equal(changed, base), (kind, key)


def test_the_timesteps_may_go_by_the_size_of_the_latents() -> None:
    flow = RectifiedFlow(dynamic=DynamicShift(base_tokens=4, max_tokens=64))
    asked = settings(timesteps={"kind": "uniform", "model_shift": True})
    for side, tokens in ((4, 4), (8, 16)):
        latents = torch.zeros(4, 2, side, side)
        given = replace(batch(), latents=latents, noise=latents)
        report = build(asked, flow)(lambda x_t, t, *, text=None, adapter=True: x_t, given)
        torch.testing.assert_close(report.t, shift_time(given.quantile, flow.shift_at(tokens)))


@pytest.mark.parametrize("prediction_type", PROCESSES)
def test_the_default_is_the_plain_mean_to_the_last_bit(prediction_type: str) -> None:
    process = PROCESSES[prediction_type]
    given = batch()

    def predict(x_t: Tensor, t: Tensor, *, text: Any = None, adapter: bool = True) -> Tensor:
        return 0.3 * x_t

    t = given.quantile if prediction_type == "flow" else (given.quantile.double() * 1000).long().clamp(max=999)
    x_t = process.q_sample(given.latents, t, given.noise)
    plain = (0.3 * x_t - process.target(given.latents, t, given.noise)).square().flatten(1).mean(1)
    report = build(Settings(), process)(predict, given)
    assert torch.equal(report.per_example, plain)
    assert torch.equal(report.t, t)


@pytest.mark.parametrize("kind", OTHER["loss"])
def test_a_mask_and_a_weight_go_with_every_loss(kind: str) -> None:
    """Half of the picture, each half by itself: their mean is the whole; and the weight comes on top."""
    process = PROCESSES["v_prediction"]
    given = batch()
    left = torch.zeros(4, 1, 4, 4)
    left[..., :2] = 1.0

    def of(mask: Tensor | None, **values: Any) -> Tensor:
        def predict(x_t: Tensor, t: Tensor, *, text: Any = None, adapter: bool = True) -> Tensor:
            return 0.3 * x_t

        return build(settings(loss={"kind": kind}, **values), process)(predict, replace(given, mask=mask)).per_example

    whole = of(None)
    assert not torch.allclose(of(left), whole)
    torch.testing.assert_close((of(left) + of(1 - left)) / 2, whole)
    snr = process.snr(torch.tensor([0, 333, 666, 999]))
    weighted = of(left, weighting={"kind": "snr_v"})
    torch.testing.assert_close(weighted, (of(left).double() * snr / (snr + 1)).float())


# -- what is refused --------------------------------------------------------------------------------------------------


def test_all_that_does_not_fit_the_process_is_told_at_once() -> None:
    asked = settings(timesteps={"kind": "list", "values": [7]}, weighting={"kind": "min_snr"})
    found = problems(asked, RectifiedFlow())
    assert [problem.split(" ")[0].rstrip(":") for problem in found] == [
        "objective.timesteps.values",
        "objective.weighting.kind",
    ]
    with pytest.raises(ValueError) as caught:
        build(asked, RectifiedFlow())
    assert str(caught.value).splitlines() == found
    assert problems(asked, GaussianDiffusion()) == []


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"weighting": {"kind": "none", "gamma": 1.0}}, "objective.weighting.gamma is not a setting of denoising."),
        ({"weighting": {"kind": "p2", "soft": True}}, "objective.weighting.soft is not a setting of denoising."),
        ({"loss": {"kind": "mse", "delta": 0.1}}, "objective.loss.delta is not a setting of denoising."),
        ({"loss": {"kind": "huber", "schedule": "linear"}}, "objective.loss.schedule = 'linear': "),
        ({"loss": {"kind": "hubber"}}, "objective.loss.kind = 'hubber' is not known. Did you mean huber?"),
        ({"loss": {"kind": "huber", "delta": 0.0}}, "objective.loss.delta = 0.0: "),
    ],
)
def test_keys_of_another_kind_are_refused(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError) as caught:
        settings(**values)
    assert len(caught.value.problems) == 1 and caught.value.problems[0].startswith(problem)
