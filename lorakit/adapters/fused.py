"""LoRA beside a linear layer as one operation: y = W x + b + s · B A x, with forward and backward written out.

peft computes the same as six operations: the base's output, the adapter's, that times s and the sum are each a tensor
of the output's size. Here there is one of them, forward and backward. Where there are more rows than W has inputs
(outputs, on the way back), W + s · B A is made first, which is cheaper than going through the adapter with each row;
only in fp32 and fp64, since a small change would be lost in bf16's rounding of W. A base that multiplies in its own way
adds the adapter's product too. Not here: convolutions, dropout, DoRA and several adapters at once, which stay peft's.
"""

from collections import Counter
from collections.abc import Sequence
from types import MethodType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorakit.adapters.state import adapter_layers

LowRank = tuple[Tensor, Tensor, float]


class Products(Protocol):
    """What a base has as `products` that multiplies in its own way: rows Wᵀ + b, and the gradient of rows, each with
    factor · left right added, where `low` = (left, right, factor) is given."""

    def times(self, rows: Tensor, *, low: LowRank | None = None) -> Tensor: ...

    def times_back(self, gradient: Tensor, *, low: LowRank | None = None) -> Tensor: ...


def fuse(module: nn.Module) -> Counter[str]:
    """Lets the adapters in `module` be computed so where that is possible; how many were not, by the reason.

    The layers stay peft's, with their names and weights. What changes later (a second adapter, switching off, merging)
    is met layer by layer, by peft's own forward.
    """
    reasons = {layer: _reason(layer) for _, layer in adapter_layers(module)}
    fused = [layer for layer, reason in reasons.items() if reason is None]
    rounded = Rounded(fused)
    for layer in fused:
        layer.rounded = rounded
        layer.forward = MethodType(_forward, layer)
    return Counter(reason for reason in reasons.values() if reason is not None)


class Rounded:
    """The weights of the adapters beside `layers` in the precision that is computed in: all rounded together, once for
    each change of one of them, instead of each in each forward.

    A change shows in a weight's `_version`. Who writes through `.data`, or by a kernel that autograd does not see, says
    so with torch.autograd.graph.increment_version.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self._layers = layers
        self._copies: dict[int, _Copy] = {}

    def __call__(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """`weight`, which is one of the layers', in `dtype`."""
        if weight.dtype == dtype:
            return weight
        copy = self._copies.get(id(weight))
        if copy is None or not copy.holds(weight, dtype):
            self._renew(dtype)
            copy = self._copies[id(weight)]
        return copy.tensor

    @torch.no_grad()
    def _renew(self, dtype: torch.dtype) -> None:
        weights = [p.weight for layer in self._layers for parts in (layer.lora_A, layer.lora_B) for p in parts.values()]
        # parameters: weights, to whoever looks at what is kept for the backward pass
        tensors: list[Tensor] = [
            nn.Parameter(torch.empty_like(weight, dtype=dtype), requires_grad=False) for weight in weights
        ]
        torch._foreach_copy_(tensors, weights)
        self._copies = {id(weight): _Copy(weight, tensor) for weight, tensor in zip(weights, tensors, strict=True)}


class _Copy:
    """`tensor`, made of the `weight` as it is now."""

    def __init__(self, weight: Tensor, tensor: Tensor) -> None:
        self.tensor = tensor
        self._weight, self._version, self._address = weight, weight._version, weight.data_ptr()

    def holds(self, weight: Tensor, dtype: torch.dtype) -> bool:
        same = self._weight is weight and self._version == weight._version and self._address == weight.data_ptr()
        return same and self.tensor.dtype == dtype


def _reason(layer: Any) -> str | None:
    """Why the layer's adapter is left to peft, or None."""
    from peft.tuners.lora import Linear

    if type(layer) is not Linear:
        return "a convolution" if isinstance(layer.base_layer, nn.Conv2d) else "another kind of layer"
    base, names = layer.base_layer, list(layer.r)
    if not isinstance(base, nn.Linear) or type(base.weight) not in (nn.Parameter, Tensor):
        return "another library's weights"
    if len(names) != 1:
        return "several adapters"
    if layer.lora_variant or layer.lora_B[names[0]].bias is not None:
        return "more than A and B"
    if not isinstance(layer.lora_dropout[names[0]], nn.Identity):
        return "dropout"
    return None


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    names, kind = layer.active_adapters, x.device.type
    as_planned = len(layer.r) == len(names) == 1 and not (args or kwargs or layer.disable_adapters or layer.merged)
    if as_planned and not torch.compiler.is_compiling():  # a compiler fuses by itself
        first, second = layer.lora_A[names[0]].weight, layer.lora_B[names[0]].weight
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        if torch.is_autocast_enabled(kind) or first.dtype == dtype:
            return _LowRank.apply(x.to(dtype), first, second, layer.base_layer, layer.scaling[names[0]], layer.rounded)
    return type(layer).forward(layer, x, *args, **kwargs)


class _LowRank(torch.autograd.Function):
    """Of x (…, inputs) in the precision that is computed in. The base is frozen, and may keep its weights packed: they
    are made anew on the way back, of those that it has now. A base that waits in the CPU's memory has others then."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, first: Tensor, second: Tensor, base: nn.Linear, scale: float, rounded: Rounded
    ) -> Tensor:
        rows, a, b = x.reshape(-1, x.shape[-1]), rounded(first, x.dtype), rounded(second, x.dtype)
        products: Products | None = getattr(base, "products", None)
        inner = None
        if products:
            inner = rows @ a.t()
            y = products.times(rows, low=(inner, b.t(), scale))
        else:
            held: Any = getattr(base, "held", None)
            ctx.weight = held() if held else base.weight.to
            weight, bias = ctx.weight(x.dtype), None if base.bias is None else base.bias.to(x.dtype)
            if _folds(rows, base.in_features):
                y = F.linear(rows, torch.addmm(weight, b, a, alpha=scale), bias)
            else:
                y, inner = F.linear(rows, weight, bias), rows @ a.t()
                y.addmm_(inner, b.t(), alpha=scale)
        ctx.save_for_backward(rows, inner, a, b)
        ctx.products, ctx.scale, ctx.shape, ctx.dtypes = products, scale, x.shape, (first.dtype, second.dtype)
        return y.view(*x.shape[:-1], base.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, a, b = ctx.saved_tensors
        of_y = gradient.reshape(-1, gradient.shape[-1])
        of_inner = (of_y @ b).mul_(ctx.scale)
        inner = rows @ a.t() if inner is None else inner
        of_first = (of_inner.t() @ rows).to(ctx.dtypes[0])
        of_second = (of_y.t() @ inner).mul_(ctx.scale).to(ctx.dtypes[1])
        of_x = None
        if ctx.needs_input_grad[0]:  # not before the first adapter
            if ctx.products:
                of_x = ctx.products.times_back(of_y, low=(of_inner, a, 1.0))
            elif _folds(of_y, of_y.shape[1]):
                of_x = of_y @ torch.addmm(ctx.weight(of_y.dtype), b, a, alpha=ctx.scale)
            else:
                of_x = (of_y @ ctx.weight(of_y.dtype)).addmm_(of_inner, a)
            of_x = of_x.view(ctx.shape)
        return of_x, of_first, of_second, None, None, None


def _folds(rows: Tensor, features: int) -> bool:
    """Whether W + s · B A costs less than the adapter's products, of which the one with `features` goes."""
    return len(rows) > features and rows.dtype in (torch.float32, torch.float64)
