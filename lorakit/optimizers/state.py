"""What an optimizer has learned: taken out by name, put back bit for bit, and a step that can be taken back.

All of it holds for any torch optimizer, also one with plain numbers in its state (bitsandbytes) or in its groups
(Prodigy, schedule-free). Which entries of a group an optimizer changes, its module says as `GROUP_STATE`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.errors import InputError
from lorakit.core.files import printable

# where a value is: the table that holds it, and its key there (an optimizer may put another tensor in its place)
_Place = tuple[dict[str, Any], str]


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], *, group_state: Sequence[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All that the optimizer has learned: tensors and JSON-able numbers.

    Copies of the tensors on the CPU, by "<parameter>.<entry>" or "group.<group>.<entry>", and
    {"parameters": {name: {entry: number}}, "groups": {name: {entry: number}}}. `group_state` are the entries of a group
    that the optimizer changes itself.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {"parameters": {}, "groups": {}}
    for part, name, (table, entry) in _learned(optimizer, parameters, group_state):
        value = table[entry]
        if isinstance(value, Tensor):
            # copies: entries may share their memory (the code book of 8-bit states), which safetensors refuses
            tensors[_full_name(part, name, entry)] = value.detach().to("cpu", copy=True).contiguous()
        else:
            assert isinstance(value, (int, float)), f"{name}.{entry} is a {type(value).__name__}: it cannot be saved"
            numbers[part].setdefault(name, {})[entry] = value
    return tensors, numbers


@torch.no_grad()
def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
    *,
    group_state: Sequence[str] = (),
) -> None:
    """Puts back what `optimizer_state` took: the same bits, each where the optimizer itself would have it.

    Raises InputError where an entry is missing, superfluous or of another type or shape than the optimizer's own.
    """
    optimizer.state.clear()
    if tensors or numbers["parameters"]:
        # not before there is something to fill: an optimizer that has taken no step has no state
        _make_state(optimizer, parameters)
    places = {(part, name, place[1]): place for part, name, place in _learned(optimizer, parameters, group_state)}
    saved: dict[tuple[str, str, str], Any] = {
        (part, name, entry): value
        for part in ("parameters", "groups")
        for name, entries in numbers[part].items()
        for entry, value in entries.items()
    }
    by_name = {_full_name(*key): key for key in places}
    saved |= {by_name.get(name, ("parameters", *_split(name))): tensor for name, tensor in tensors.items()}
    problems = [f"{_full_name(*key)} is missing" for key in places.keys() - saved.keys()]
    problems += [f"{_full_name(*key)} is not the optimizer's" for key in saved.keys() - places.keys()]
    for key in places.keys() & saved.keys():
        table, entry = places[key]
        difference = _difference(saved[key], table[entry])
        problems += [f"{_full_name(*key)} {difference}"] if difference else []
    if problems:
        shown = "; ".join(printable(text) for text in sorted(problems)[:3])
        raise InputError(
            f"The checkpoint's optimizer state does not fit this optimizer ({len(problems)} differences: {shown}"
            f"{'; …' if len(problems) > 3 else ''}): resume with the optimizer and the library versions of the run, "
            "or start a new run from its adapter."
        )
    for key, (table, entry) in places.items():
        value, own = saved[key], table[entry]
        if isinstance(own, Tensor) and own.shape == value.shape:
            own.copy_(value)  # in place: it may be paged memory
        else:
            table[entry] = value.to(own.device, copy=True) if isinstance(own, Tensor) else value


@dataclass
class Taken:
    """A step that was taken, or, where not `good` (a 0-dim bool on the device), taken back.

    `before()` are the parameters as they were before it.
    """

    good: Tensor
    before: Callable[[], dict[str, Tensor]]
    _take_back: Callable[[], None]

    def settle(self, good: bool) -> None:
        """To be called with `good`'s value once the host knows it: takes back what is no tensor on the device."""
        if not good:
            self._take_back()


@torch.no_grad()
def guarded_step(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], good: Tensor) -> Taken:
    """`optimizer.step()`, after which all is as before unless `good` and all gradients and all it wrote are finite.

    Decided on the device: the host waits for nothing here. What the host keeps (plain numbers, state that the step
    made) follows in `Taken.settle`. Costs two copies of weights and state for the time of the step.
    """
    device = good.device
    weights: dict[str, Any] = dict(parameters)
    places = _places(optimizer, weights)
    keys = {id(table): (table, set(table)) for table, _ in places}
    had_state = {parameter for parameter, table in optimizer.state.items() if table}
    on_device: dict[torch.dtype, list[_Place]] = {}
    on_host: list[tuple[_Place, Any]] = []
    for table, key in places:
        value = table[key]
        if isinstance(value, Tensor) and value.device == device:
            on_device.setdefault(value.dtype, []).append((table, key))
        else:
            on_host.append(((table, key), value.clone() if isinstance(value, Tensor) else value))
    kept = {dtype: _flat(found) for dtype, found in on_device.items()}
    # a NaN may vanish on the way (8-bit Lion's sign of it is 0), and a step may write over the gradients
    good = _finite([torch.cat([p.grad.reshape(-1) for p in parameters.values() if p.grad is not None])], good)

    optimizer.step()
    torch.autograd.graph.increment_version(list(parameters.values()))  # most kernels write unseen by autograd

    now = {dtype: _flat(found) for dtype, found in on_device.items()}
    # the rest is what the step made, and what has changed on the host: some settings are infinite (a growth rate)
    old = {(id(table), key): value for (table, key), value in on_host}
    flat = {(id(table), key) for found in on_device.values() for table, key in found}
    others = [(table, key) for table, key in _places(optimizer, weights) if (id(table), key) not in flat]
    changed = [table[key] for table, key in others if table[key] is not old.get((id(table), key))]
    good = _finite([*now.values(), *changed], good)
    nothing_to_do = _is_free_to_read(good) and bool(good)
    for dtype, found in () if nothing_to_do else on_device.items():
        torch.where(good, now[dtype], kept[dtype], out=now[dtype])
        torch._foreach_copy_([table[key] for table, key in found], _views(now[dtype], found))

    @torch.no_grad()
    def take_back() -> None:
        for parameter in optimizer.state.keys() - had_state:
            del optimizer.state[parameter]
        for table, known in keys.values():
            for key in table.keys() - known:
                del table[key]
        for (table, key), value in on_host:
            own = table.get(key)
            if isinstance(own, Tensor) and isinstance(value, Tensor) and own.shape == value.shape:
                own.copy_(value)  # in place: it may be paged memory
            else:
                table[key] = value

    of_weights = {dtype: [place for place in found if place[0] is weights] for dtype, found in on_device.items()}
    # they come first; copied, since whoever keeps them shall not keep the state too
    flat_weights = {dtype: kept[dtype][: _numel(found)].clone() for dtype, found in of_weights.items()}

    def before() -> dict[str, Tensor]:
        return {
            key: view
            for dtype, found in of_weights.items()
            for (_, key), view in zip(found, _views(flat_weights[dtype], found))
        }

    return Taken(good, before, take_back)


def weights_to_use(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor] | None:
    """Copies of the weights to draw and export with, where they are not those that are trained; else None.

    Schedule-free optimizers train y = (1 - beta) z + beta x and ask for x (Defazio et al., arXiv:2405.15682, eq. 2-4).
    """
    if "train_mode" not in optimizer.param_groups[0]:
        return None
    beta = {p: group["betas"][0] for group in optimizer.param_groups for p in group["params"]}
    with torch.no_grad():
        return {
            # before its first step an optimizer has no z, and x is y
            name: torch.lerp(p, optimizer.state[p]["z"], 1 - 1 / beta[p]) if optimizer.state.get(p) else p.clone()
            for name, p in parameters.items()
        }


def adapted_rate(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """What an optimizer multiplies its rate by on its own account, for the metrics: Prodigy's `d`. Often empty."""
    group = optimizer.param_groups[0]
    return {"d": float(group["d"])} if "d_numerator" in group else {}


# -- where the state is --------------------------------------------------------------------------------------------


def _learned(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], group_state: Sequence[str]
) -> Iterator[tuple[str, str, _Place]]:
    """ "parameters" or "groups", the name there, and the place of each entry of the state."""
    for name, parameter in parameters.items():
        table = optimizer.state.get(parameter, {})
        for entry in table:
            yield "parameters", name, (table, entry)
    for group in optimizer.param_groups:
        for entry in group_state:
            yield "groups", group["name"], (group, entry)


def _full_name(part: str, name: str, entry: str) -> str:
    return f"group.{name}.{entry}" if part == "groups" else f"{name}.{entry}"


def _split(full_name: str) -> tuple[str, str]:
    name, _, entry = full_name.rpartition(".")
    return name, entry


def _places(optimizer: torch.optim.Optimizer, weights: dict[str, Any]) -> list[_Place]:
    """Everything that a step may write: the weights, their state, and all of the groups but the lists of parameters."""
    tables = [weights, *(optimizer.state[p] for p in weights.values() if p in optimizer.state)]
    places = [(table, key) for table in tables for key in table]
    return places + [(group, key) for group in optimizer.param_groups for key in group if key != "params"]


def _flat(places: Sequence[_Place]) -> Tensor:
    """One copy of all tensors there: adapters are hundreds of small ones, and each launch costs microseconds."""
    return torch.cat([table[key].reshape(-1) for table, key in places])


def _is_free_to_read(tensor: Tensor) -> bool:
    """Whether the host need not wait for a device to know it."""
    return tensor.device.type == "cpu"


def _numel(places: Sequence[_Place]) -> int:
    return sum(table[key].numel() for table, key in places)


def _views(flat: Tensor, places: Sequence[_Place]) -> list[Tensor]:
    """The parts of `flat` in the shapes of the tensors at `places`."""
    own = [table[key] for table, key in places]
    return [part.view(tensor.shape) for part, tensor in zip(flat.split([t.numel() for t in own]), own)]


def _finite(values: Sequence[Any], good: Tensor) -> Tensor:
    """`good`, and no number in `values` is an infinity or NaN; each value by itself, since a norm may overflow."""
    for value in values:
        if isinstance(value, float):
            good = good if math.isfinite(value) else torch.zeros_like(good)
        elif isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            # they keep a NaN; six times faster than isfinite().all() on a CPU
            extremes = torch.stack(torch.aminmax(value)).isfinite().all()
            good = good & extremes.to(good.device)
    return good


def _make_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Lets the optimizer make its own state, by a step on zero gradients of which nothing else stays.

    So each entry is of the dtype, on the device and in the (paged) memory that the optimizer's library gives it.
    """
    kept = [(p, p.detach().clone(), p.grad) for p in parameters.values()]
    groups = [dict(group) for group in optimizer.param_groups]
    for p, _, _ in kept:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, weight, gradient in kept:
        p.copy_(weight)
        p.grad = gradient
    for group, before in zip(optimizer.param_groups, groups):
        group.clear()
        group.update(before)


def _difference(saved: Any, own: Any) -> str | None:
    """In what a saved value differs in kind from the optimizer's own, or None."""
    if isinstance(saved, Tensor) != isinstance(own, Tensor):
        return "is a number in one and a tensor in the other"
    if not isinstance(own, Tensor):
        return None
    # Prodigy keeps the start of a weight that is all zeros as a single zero
    fits = saved.shape == own.shape or 0 in (saved.dim(), own.dim())
    if fits and saved.dtype == own.dtype:
        return None
    return f"is {tuple(saved.shape)} {saved.dtype} and should be {tuple(own.shape)} {own.dtype}"
