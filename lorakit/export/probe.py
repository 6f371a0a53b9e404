"""The same calls put to several copies of a model: how an adapter in one form is compared with another.

The calls of the model's parts are recorded once, with fixed inputs, and can then be answered by any copy of these
parts. Nothing here knows what a call looks like, so it serves every family.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters import adapters_disabled
from lorakit.core.seeding import generator
from lorakit.families.protocol import Family, Names

Modules = Mapping[str, nn.Module]
Outputs = dict[str, list[Tensor]]

CAPTIONS = ("a red circle on a blue background", "two")


@dataclass(frozen=True)
class Calls:
    """Calls of a model's parts, by component: positional and keyword arguments, tensors in fp32 on the CPU."""

    made: Mapping[str, list[tuple[tuple[Any, ...], dict[str, Any]]]]

    @torch.no_grad()
    def answer(self, components: Modules) -> Outputs:
        """Every floating point tensor that `components` return to the recorded calls."""
        return {
            name: [tensor for args, kwargs in self.made[name] for tensor in _tensors(module(*args, **kwargs))]
            for name, module in components.items()
        }


class _Heard(Exception):
    """The backbone has been called."""


def record_calls(family: Family) -> Calls:
    """What backbone and text encoders of `family` are called with for two captions, noisy latents and two times."""
    parts = {name: family.components[name] for name in (family.backbone, *family.text_encoders)}
    device = next(parts[family.backbone].parameters()).device
    shape = family.latent_shape(*[8 * family.side_multiple] * 2)

    def enough(module: nn.Module, args: Any, kwargs: Any) -> None:
        raise _Heard

    # what the backbone answers does not matter, and it may lie in parts that only all ranks together can use
    hook = parts[family.backbone].register_forward_pre_hook(enough, prepend=True, with_kwargs=True)
    with family.at_hand(), _listening(parts) as calls, contextlib.suppress(_Heard), contextlib.ExitStack() as stack:
        stack.callback(hook.remove)
        # the others may be in training, where dropout would move the generator
        with torch.no_grad(), torch.random.fork_rng(devices=[]), adapters_disabled(parts):
            x_t = torch.randn(2, *shape, generator=generator("probe", "latents")).to(device)
            t = family.process.at(torch.tensor([0.2, 0.7], device=device))
            family.predict(x_t, t, family.encode_text(CAPTIONS))
    return calls


def record_drawing(pipeline: Any, names: Names) -> Calls:
    """The same of a stock pipeline, as it draws small pictures of two captions in two steps."""
    side = 8 * pipeline.vae_scale_factor
    shown: dict[str, Any] = {}
    takes = inspect.signature(pipeline.__call__).parameters
    if "image_guidance_scale" in takes:  # what it edits
        shown = {"image": torch.zeros(2, 3, side, side)}
    if "mask_image" in takes:  # what it paints over
        shown = {"image": torch.zeros(2, 3, side, side), "mask_image": torch.ones(2, 1, side, side), "strength": 1.0}
    with _listening(stock_components(pipeline, names)) as calls:
        pipeline(
            prompt=list(CAPTIONS),
            height=side,
            width=side,
            num_inference_steps=2,
            guidance_scale=1.0,
            generator=generator("probe", "latents"),
            output_type="latent",
            **shown,
        )
    return calls


@contextlib.contextmanager
def _listening(parts: Modules) -> Iterator[Calls]:
    """Calls that are filled with those that `parts` get meanwhile."""
    made: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {name: [] for name in parts}

    def listen(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: made[name].append((_plain(args), _plain(kwargs)))

    hooks = [
        part.register_forward_pre_hook(listen(name), prepend=True, with_kwargs=True) for name, part in parts.items()
    ]
    try:
        yield Calls(made)
    finally:
        for hook in hooks:
            hook.remove()


def stock_components(pipeline: Any, family: Names) -> dict[str, nn.Module]:
    """The components of a stock pipeline that an adapter may be in, but for those that it was read without."""
    parts = {name: getattr(pipeline, name) for name in (family.backbone, *family.text_encoders)}
    return {name: part for name, part in parts.items() if part is not None}


def largest(outputs: list[Tensor]) -> float:
    """The largest absolute value."""
    return max((float(tensor.abs().max()) for tensor in outputs), default=0.0)


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest absolute difference; infinite where there is a NaN."""
    distances = [float((a - b).abs().max()) for a, b in zip(one, other, strict=True)]
    return float("inf") if any(d != d for d in distances) else max(distances, default=0.0)


def _plain(value: Any) -> Any:
    """`value` with its tensors detached, on the CPU, floating ones in fp32."""
    if isinstance(value, Tensor):
        value = value.detach().to("cpu", copy=True)
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
