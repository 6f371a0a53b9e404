"""Every registered optimizer: it resumes bit for bit, and a step on bad numbers leaves nothing behind."""

import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit.core.errors import InputError
from lorakit.optimizers import state
from lorakit.optimizers.state import adapted_rate, guarded_step, optimizer_state, restore_optimizer, weights_to_use
from tests.optimizers.training import CASES, PAGED, SHAPES, after, bits, made

KINDS = list(CASES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [0, 1, 4])
def test_resumes_bit_for_bit(kind: str, stop: int) -> None:
    whole = after(kind, 7)
    resumed = made(kind, seed=1)  # other weights: they must come from the checkpoint
    resumed.restore(*after(kind, stop).save())
    for step in range(stop, 7):
        resumed.step(step)
    assert resumed.save() == whole.save()
    assert resumed.save() != after(kind, 6).save()


@pytest.mark.parametrize("kind", KINDS)
def test_taking_the_state_out_and_putting_it_in_touches_nothing_else(kind: str) -> None:
    trained = after(kind, 3)
    trained.gradients(3)
    gradients = {name: p.grad for name, p in trained.parameters.items()}
    weights = bits(trained.parameters)
    groups = [{k: v for k, v in group.items() if k != "params"} for group in trained.optimizer.param_groups]
    found = trained.save()
    weights_to_use(trained.optimizer, trained.parameters)
    trained.restore(*found)
    assert trained.save() == found and bits(trained.parameters) == weights
    assert all(trained.parameters[name].grad is gradient for name, gradient in gradients.items())
    assert groups == [{k: v for k, v in group.items() if k != "params"} for group in trained.optimizer.param_groups]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_optimizer_that_restores_is_left(kind: str) -> None:
    trained = after(kind, 3)
    trained.restore(*made(kind).save())
    trained.step(0)
    assert trained.save() == after(kind, 1).save()
    fresh = made(kind)
    fresh.restore(*after(kind, 3).save())
    for group, other in zip(fresh.optimizer.param_groups, made(kind).optimizer.param_groups):
        differing = {key for key in group.keys() | other.keys() if key != "params" and group.get(key) != other.get(key)}
        assert differing <= set(fresh.group_state)


@pytest.mark.parametrize("kind", KINDS)
def test_each_entry_is_needed(kind: str) -> None:
    """None may go missing, none may be too many: nothing is restored by halves."""
    data, text = after(kind, 2).save()
    tensors = load(data)
    for name in [name for name in tensors if not name.startswith("weight:")][:8]:
        left = {key: value for key, value in tensors.items() if key != name}
        with pytest.raises(InputError, match=f"1 differences: {name} is missing"):
            made(kind).restore(save(left), text)
        with pytest.raises(InputError, match="is not the optimizer's"):
            made(kind).restore(save({**tensors, "unet.a.elsewhere": tensors[name].clone()}), text)
        with pytest.raises(InputError, match="should be"):
            made(kind).restore(save({**tensors, name: tensors[name].to(torch.float64)}), text)
    numbers = json.loads(text)
    for part, tables in numbers.items():
        for table in tables:
            for entry in tables[table]:
                left = json.loads(text)
                del left[part][table][entry]
                with pytest.raises(InputError, match=f"{entry} is missing"):
                    made(kind).restore(data, json.dumps(left))


def test_another_optimizers_state_is_refused() -> None:
    other = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0, momentum=0.9)
    other.param_groups[0]["name"] = "unet"
    (p,) = other.param_groups[0]["params"]
    tensors, numbers = optimizer_state(*_adamw_of(p))
    with pytest.raises(InputError, match="resume with the optimizer"):
        restore_optimizer(other, {"unet.p": p}, tensors, numbers)


def _adamw_of(p: nn.Parameter) -> tuple[torch.optim.Optimizer, dict[str, nn.Parameter]]:
    optimizer = torch.optim.AdamW([{"params": [p], "name": "unet"}])
    p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer, {"unet.p": p}


def test_state_stays_where_the_optimizer_has_it() -> None:
    """torch's counter is a float of its own, whatever the weights are in."""
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer, parameters = _adamw_of(p)
    found = optimizer_state(optimizer, parameters)
    restore_optimizer(optimizer, parameters, *found)
    kinds = {entry: value.dtype for entry, value in optimizer.state[p].items()}
    assert kinds == {"step": torch.float32, "exp_avg": torch.float64, "exp_avg_sq": torch.float64}


# -- a step that is taken back -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_guarded_step_is_the_optimizers_own(kind: str) -> None:
    guarded, plain = made(kind), made(kind)
    for step in range(3):
        before = bits(guarded.parameters)
        taken = guarded.step(step)
        assert taken.good and bits(taken.before()) == before
        plain.gradients(step)
        for group in plain.optimizer.param_groups:
            group["lr"] = group["full_lr"] * (1 - step / 100)
        plain.optimizer.step()
        assert guarded.save() == plain.save()


@pytest.mark.parametrize("kind", KINDS)
def test_a_guarded_step_shows_in_the_versions_of_the_weights(kind: str) -> None:
    """Copies in another precision are made anew by it (adapters/fused.py)."""
    trained = made(kind)
    before = {name: p._version for name, p in trained.parameters.items()}
    trained.step(0)
    assert all(p._version > before[name] for name, p in trained.parameters.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_gradient_leaves_nothing_behind(kind: str, first: bool, bad: float) -> None:
    trained, other = (after(kind, 0 if first else 2) for _ in range(2))
    trained.gradients(2)
    trained.parameters["unet.a"].grad[3, 5] = bad
    assert not trained.take(2).good
    assert trained.save() == other.save()
    assert [set(group) for group in trained.optimizer.param_groups] == [set(g) for g in other.optimizer.param_groups]
    for step in range(3, 6):
        trained.step(step)
        other.step(step)
    assert trained.save() == other.save()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [True, False])
def test_a_refused_step_on_good_numbers_leaves_nothing_behind(kind: str, first: bool) -> None:
    trained, other = (after(kind, 0 if first else 2) for _ in range(2))
    assert not trained.step(2, good=False).good
    assert trained.save() == other.save()


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "prodigy", "schedule_free", "adafactor"])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_moment_that_overflows_is_refused(kind: str, steps: int) -> None:
    """A gradient of 1e30 is finite and its square is not."""
    trained, other = after(kind, steps), after(kind, steps)
    trained.gradients(2)
    trained.parameters["unet.a"].grad[0, 0] = 1e30
    assert not trained.take(2).good
    assert trained.save() == other.save()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_bad_in_the_state_already_is_refused_too(kind: str) -> None:
    trained = after(kind, 2)
    parameter = trained.parameters["unet.b"]
    entry = next(e for e, v in trained.optimizer.state[parameter].items() if torch.is_tensor(v) and v.dim() > 2)
    trained.optimizer.state[parameter][entry][0, 0] = math.nan
    before = bits(trained.parameters)
    assert not trained.step(2).good
    assert bits(trained.parameters) == before


class Elsewhere(torch.Tensor):
    """Says that it lies on another device, as paged memory does, which a GPU reads too."""

    @property
    def device(self) -> torch.device:
        return torch.device("meta")


@torch.no_grad()
def test_what_lies_elsewhere_is_taken_back_where_it_lies() -> None:
    """bitsandbytes knows paged memory by a mark on the tensor, which no copy has."""
    trained, other = after("adamw", 2), after("adamw", 2)
    table = trained.optimizer.state[trained.parameters["unet.a"]]
    moments = table["exp_avg"] = table["exp_avg"].as_subclass(Elsewhere)
    step = trained.optimizer.step
    trained.optimizer.step = lambda: (moments.as_subclass(torch.Tensor).add_(1), step())[1]  # type: ignore[method-assign]
    assert not trained.step(2, good=False).good
    assert table["exp_avg"] is moments and trained.save() == other.save()


class Reads(TorchDispatchMode):
    """Counts the times that the host asks for a tensor's value, and so waits for the device."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("good", [True, False])
def test_a_guarded_step_waits_for_the_device_no_more_than_the_optimizer(
    kind: str, good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "_is_free_to_read", lambda tensor: False)  # as on a GPU
    trained, plain = after(kind, 2), after(kind, 2)
    trained.gradients(2)
    plain.gradients(2)
    with Reads() as own:
        plain.optimizer.step()
    with Reads() as ours:
        guarded_step(trained.optimizer, trained.parameters, torch.tensor(good))
    assert ours.count == own.count
    assert not good or bits(trained.parameters) == bits(plain.parameters)
    assert (own.count == 0) == (kind not in ("prodigy", "adafactor"))


def test_a_large_norm_is_no_reason() -> None:
    p = nn.Parameter(torch.full((4,), 3e38))  # the root of the sum of squares overflows
    optimizer = torch.optim.SGD([p], lr=1.0)
    p.grad = torch.ones_like(p)
    assert guarded_step(optimizer, {"p": p}, torch.tensor(True)).good


def test_only_prodigy_adapts_its_rate() -> None:
    for kind in KINDS:
        rates = [adapted_rate(after(kind, steps).optimizer) for steps in (1, 4, 7)]
        if kind == "prodigy":
            assert rates[0]["d"] < rates[1]["d"] < rates[2]["d"]
        else:
            assert rates == [{}, {}, {}]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [*CASES, *PAGED])
def test_on_a_gpu(kind: str) -> None:
    on_gpu: dict[str, Any] = {
        "device": "cpu",
        "shapes": {**SHAPES, "unet.large": (400, 256)},
    }  # paging begins at 100,000
    whole, other = after(kind, 7, **on_gpu), after(kind, 4, **on_gpu)
    assert not other.step(4, good=False).good
    resumed = made(kind, seed=1, **on_gpu)
    resumed.restore(*other.save())
    for step in range(4, 7):
        resumed.step(step)
    assert resumed.save() == whole.save()
    large = resumed.optimizer.state[resumed.parameters["unet.large"]]
    assert getattr(large.get("state1"), "is_paged", False) == (kind in PAGED)
