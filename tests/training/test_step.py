"""A step's loss and gradient do not depend on how its global batch is split; a non-finite one changes nothing."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lorakit.core.errors import InputError
from lorakit.core.settings import validate
from lorakit.core.types import Batch, LossReport, Predict, Process
from lorakit.data.plan import share
from lorakit.diffusion import GaussianDiffusion, RectifiedFlow
from lorakit.diffusion.objectives.denoising import Settings, build
from lorakit.training import step
from lorakit.training.step import Trainee, learning_rates, ready, run_step


def batch(numbers: Sequence[int], *, weight: float = 1.0) -> Batch:
    latents = torch.stack([torch.linspace(0, 1, 8).reshape(2, 2, 2) * (n + 1) for n in numbers]).double()
    return Batch(
        keys=tuple(f"0/{n}.png" for n in numbers),
        numbers=tuple(numbers),
        captions=tuple("x" for _ in numbers),
        latents=latents,
        noise=torch.zeros_like(latents),
        quantile=torch.zeros(len(numbers)),
        weight=torch.full((len(numbers),), weight, dtype=torch.float64),
        text={},
    )


def trainee(objective: Any = None, *, max_grad_norm: float = 0.0) -> Trainee:
    torch.manual_seed(0)
    model = nn.Linear(8, 8).double()

    def squared(predict: Predict, batch: Batch) -> LossReport:
        t = torch.zeros(len(batch.keys))
        assert batch.latents is not None
        return LossReport(predict(batch.latents, t, text=batch.text).square().flatten(1).mean(1), t)

    family = SimpleNamespace(backbone="unet", predict=lambda x, t, text, sizes: model(x.flatten(1)))
    parameters = dict(model.named_parameters())
    group = {"params": list(parameters.values()), "lr": 0.1, "full_lr": 0.1, "name": "unet"}
    return Trainee(
        family=family,  # type: ignore[arg-type]
        encode_text=lambda captions: {},
        adapted={},
        parameters=parameters,
        optimizer=torch.optim.SGD([group]),
        group_state=(),
        average=None,
        objective=objective or squared,
        device=torch.device("cpu"),
        autocast=contextlib.nullcontext,
        scaler=None,
        max_grad_norm=max_grad_norm,
        seed=0,
    )


def weights(trainee: Trainee) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainee.parameters.values()])


def test_any_split_into_micro_steps_gives_the_same_update() -> None:
    results = []
    for split in ([[0, 1, 2, 3]], [[0], [1, 2, 3]], [[0], [1], [2], [3]]):
        t = trainee()
        report = run_step(t, [batch(part) for part in split], count=4, lr_factor=1.0)
        results.append((weights(t), report))
    for after, report in results[1:]:
        torch.testing.assert_close(after, results[0][0], rtol=1e-14, atol=0)
        assert report.grad_norm == pytest.approx(results[0][1].grad_norm, rel=1e-12)
        assert report.loss == pytest.approx(results[0][1].loss, rel=1e-6)


def test_the_loss_is_the_weighted_sum_over_the_global_batch() -> None:
    whole = run_step(trainee(), [batch([0, 1])], count=2, lr_factor=1.0)
    halved = run_step(trainee(), [batch([0, 1], weight=0.5)], count=2, lr_factor=1.0)
    assert halved.loss == pytest.approx(whole.loss / 2)
    assert halved.grad_norm == pytest.approx(whole.grad_norm / 2)


def test_the_family_is_told_the_sizes_of_the_batch() -> None:
    t, told = trainee(), []
    answer = t.family.predict
    t.family.predict = lambda x, t, text, sizes: told.append(sizes) or answer(x, t, text, sizes=sizes)  # type: ignore
    sizes = torch.tensor([[512, 512, 0, 64, 256, 192]])
    run_step(t, [replace(batch([0]), sizes=sizes)], count=1, lr_factor=1.0)
    assert torch.equal(*told, sizes)


def test_what_keeps_the_base_is_minimised_too_and_told_apart() -> None:
    def squared_and_kept(predict: Predict, batch: Batch) -> LossReport:
        t = torch.zeros(len(batch.keys))
        error = predict(batch.latents, t, text=batch.text).square().flatten(1).mean(1)
        return LossReport(error, t, preservation=3 * error)

    plain = run_step(trainee(), [batch([0, 1])], count=2, lr_factor=1.0)
    both = run_step(trainee(squared_and_kept), [batch([0], weight=0.5), batch([1], weight=0.5)], count=2, lr_factor=1.0)
    assert plain.preservation == 0
    assert both.loss == pytest.approx(2 * plain.loss) and both.preservation == pytest.approx(1.5 * plain.loss)
    assert both.grad_norm == pytest.approx(2 * plain.grad_norm)
    assert both.losses == pytest.approx(plain.losses), "of each sample what it is to denoise"


def test_a_rank_without_a_share_contributes_zeros() -> None:
    t = trainee()
    before = weights(t)
    report = run_step(t, [], count=4, lr_factor=1.0)
    assert report.loss == 0 and report.grad_norm == 0
    assert torch.equal(weights(t), before)


def test_clipping_scales_the_update_to_the_given_norm() -> None:
    t = trainee(max_grad_norm=0.5)
    before = weights(t)
    report = run_step(t, [batch([3])], count=1, lr_factor=1.0)
    assert report.grad_norm > 0.5, "the report holds the norm before clipping"
    assert (weights(t) - before).norm().item() == pytest.approx(0.1 * 0.5, rel=1e-4)


def test_what_a_step_trained_on_can_be_named() -> None:
    def broken(predict: Predict, batch: Batch) -> LossReport:
        t = torch.tensor([float(n) for n in batch.numbers])
        losses = predict(batch.latents, t, text={}).flatten(1).sum(1)
        return LossReport(losses * torch.tensor([1.0, float("nan")]).double(), t)

    report = run_step(trainee(broken), [batch([4, 7])], count=2, lr_factor=1.0)
    assert report.skipped and report.timesteps == (4.0, 7.0)
    assert math.isfinite(report.losses[0]) and math.isnan(report.losses[1])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_losses_and_timesteps_stand_in_the_global_batch_s_order_whoever_computed_them(
    world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def objective(predict: Predict, batch: Batch) -> LossReport:
        t = torch.tensor([10.0 * n for n in batch.numbers])
        return LossReport(predict(batch.latents, t, text={}).flatten(1).sum(1) * 0 + t.double() + 0.5, t)

    # another rank's buffers are those of its own call: here they are kept, and added up by hand
    parts: list[list[Tensor]] = []
    monkeypatch.setattr(step, "world", lambda: world)
    monkeypatch.setattr(step, "sum_tensors", lambda tensors: parts.append([tensor.clone() for tensor in tensors]))
    for number in range(world):
        monkeypatch.setattr(step, "rank", lambda number=number: number)
        own = share(5, number, world)
        micro_steps = [batch(part, weight=0.25) for part in (own[:1], own[1:]) if part]
        report = run_step(trainee(objective), micro_steps, count=5, lr_factor=1.0, votes=(3.0, 4.0))
    total = sum(part[2] for part in parts)
    assert total.tolist() == [[0.5, 10.5, 20.5, 30.5, 40.5], [0.0, 10.0, 20.0, 30.0, 40.0]]
    assert report.votes == (3.0, 4.0)
    if world == 1:
        assert [list(report.losses), list(report.timesteps)] == total.tolist()


def test_a_report_has_the_weights_that_its_loss_belongs_to() -> None:
    t = trainee()
    before = weights(t)
    report = run_step(t, [batch([0])], count=1, lr_factor=1.0)
    assert torch.equal(torch.cat([w.flatten() for w in report.before().values()]), before)
    assert not torch.equal(weights(t), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["gradient", "moment", "update"])
def test_what_is_not_finite_anywhere_leaves_weights_and_moments_alone(where: str, value: float) -> None:
    t = trainee()
    t = replace(t, optimizer=torch.optim.AdamW(t.optimizer.param_groups))
    run_step(t, [batch([0])], count=1, lr_factor=1.0)
    weight = next(iter(t.parameters.values()))
    if where == "gradient":
        weight.register_hook(lambda gradient: gradient * value)
    elif where == "moment":
        t.optimizer.state[weight]["exp_avg"][0, 0] = value
    before = [weights(t), *(tensor.clone() for table in t.optimizer.state.values() for tensor in table.values())]
    report = run_step(t, [batch([1])], count=1, lr_factor=value if where == "update" else 1.0)
    after = [weights(t), *(tensor for table in t.optimizer.state.values() for tensor in table.values())]
    assert report.skipped
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_loss_leaves_weights_and_moments_alone(value: float) -> None:
    def broken(predict: Predict, batch: Batch) -> LossReport:
        t = torch.zeros(1)
        return LossReport(predict(batch.latents, t, text={}).flatten(1).sum(1) * value, t)

    t = trainee(broken)
    before = weights(t)
    report = run_step(t, [batch([0])], count=1, lr_factor=1.0)
    assert report.skipped
    assert torch.equal(weights(t), before)


def test_an_overflow_lowers_the_loss_scale_and_is_told_from_a_broken_step() -> None:
    def broken(predict: Predict, batch: Batch) -> LossReport:
        t = torch.zeros(1)
        return LossReport(predict(batch.latents, t, text={}).flatten(1).sum(1) * float("inf"), t)

    scaled = replace(trainee(broken), scaler=torch.amp.GradScaler("cpu", init_scale=4.0))
    before = weights(scaled)
    reports = [run_step(scaled, [batch([0])], count=1, lr_factor=1.0) for _ in range(3)]
    assert [r.overflow for r in reports] == [True, True, False]
    assert all(r.skipped for r in reports)
    assert torch.equal(weights(scaled), before)


def test_a_loss_scale_does_not_change_the_update() -> None:
    plain, scaled = trainee(max_grad_norm=0.5), trainee(max_grad_norm=0.5)
    scaled = replace(scaled, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    reports = [run_step(t, [batch([0, 1])], count=2, lr_factor=1.0) for t in (plain, scaled)]
    assert reports[0].grad_norm == pytest.approx(reports[1].grad_norm, rel=1e-12)
    torch.testing.assert_close(weights(plain), weights(scaled), rtol=1e-12, atol=0)


def test_the_learning_rate_is_the_full_one_times_the_factor() -> None:
    t = trainee()
    run_step(t, [batch([0])], count=1, lr_factor=0.25)
    assert t.optimizer.param_groups[0]["lr"] == 0.1 * 0.25
    assert learning_rates(t, 0.25) == {"lr": 0.1 * 0.25}


def test_dropout_follows_the_sample_and_not_the_past() -> None:
    def noisy(predict: Predict, batch: Batch) -> LossReport:
        t = torch.zeros(1)
        zero = predict(batch.latents, t, text={}).flatten(1).sum(1) * 0
        return LossReport(zero + torch.rand(1).double(), t)

    first, second = trainee(noisy), trainee(noisy)
    torch.manual_seed(1)
    one = run_step(first, [batch([0])], count=1, lr_factor=1.0).loss
    torch.manual_seed(2)
    assert run_step(second, [batch([0])], count=1, lr_factor=1.0).loss == one
    assert run_step(trainee(noisy), [batch([1])], count=1, lr_factor=1.0).loss != one


def test_pixels_are_encoded_first_and_what_is_not_finite_is_named() -> None:
    t = trainee()
    pooled = nn.AvgPool2d(2)
    family = SimpleNamespace(backbone="unet", predict=t.family.predict, encode_images=pooled)
    t = replace(t, family=family)  # type: ignore[arg-type]
    given = batch([0, 1])
    pixels = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    encoded = ready(t, replace(given, latents=None, pixels=pixels))
    assert encoded.latents is not None and encoded.pixels is None
    torch.testing.assert_close(encoded.latents, pooled(pixels).float())
    pixels[1, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match=r"^0/1\.png: its latents are not finite"):
        ready(t, replace(given, latents=None, pixels=pixels))


class Queue(TorchFunctionMode):
    """The meta device as a GPU: it counts how often the host would wait for it. Whatever else of a value there is asked
    for is an error of torch's own."""

    waits = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.tolist and args[0].is_meta:
            self.waits += 1
            return [1.0] * args[0].numel()
        found = function(*args, **kwargs)
        if isinstance(found, Tensor) and found.is_meta and not kwargs.get("non_blocking"):
            copied = any(isinstance(one, Tensor) and one.is_cpu for one in args)
            self.waits += copied or function in (torch.tensor, torch.as_tensor)
        return found


@pytest.mark.parametrize("process", [GaussianDiffusion(100, prediction_type="v_prediction"), RectifiedFlow()])
def test_a_step_waits_for_the_device_at_its_end_alone(process: Process) -> None:
    settings = {
        "timesteps": {"kind": "list", "values": [0, 1]},
        "weighting": {"kind": "sigma"},
        "loss": {"kind": "huber", "schedule": "snr"},
        "preservation": {"kind": "differential_output"},
    }
    objective = build(validate(Settings, settings, where="objective", name="it"), process)
    model = nn.Linear(8, 8, device="meta")
    group = {"params": list(model.parameters()), "lr": 0.1, "full_lr": 0.1, "name": "unet"}
    t = replace(
        trainee(objective, max_grad_norm=1.0),
        parameters=dict(model.named_parameters()),
        optimizer=torch.optim.SGD([group]),
        device=torch.device("meta"),
    )
    t.family.predict = lambda x, t, text, sizes: model(x.float().flatten(1)).view_as(x)  # type: ignore[method-assign]
    given = replace(batch([0, 1]), class_captions=("x", None), class_text={})
    waits = []
    for _ in range(2):  # what stays on the device comes there in the first
        with Queue() as queue:
            run_step(t, [given, given], count=4, lr_factor=1.0, votes=(1.0, 0.0))
        waits.append(queue.waits)
    assert waits[1] == 1
