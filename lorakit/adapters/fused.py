"""LoRA beside a layer as one operation: y = W x + b + s · B A x, with forward and backward written out.

peft computes the same as six operations: the base's output, the adapter's, that times s and the sum are each a tensor
of the output's size. Here there is one of them, forward and backward. Where there are more rows than W has inputs
(outputs, on the way back), W + s · B A is made first, which is cheaper than going through the adapter with each row;
only in fp32 and fp64, since a small change would be lost in bf16's rounding of W. A base that multiplies in its own way
adds the adapter's product too. Of a convolution A is a convolution of the same kind, and B a product over channels.
Not here: grouped and dilated convolutions, dropout, DoRA and several adapters at once, which stay peft's.
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
        if weight.dtype == dtype or torch.compiler.is_compiling():
            return weight.to(dtype)
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
    from peft.tuners.lora import Conv2d, Linear

    base, names = layer.base_layer, list(layer.r)
    if type(layer) not in (Linear, Conv2d):
        return "another kind of layer"
    if not isinstance(base, (nn.Linear, nn.Conv2d)) or type(base.weight) not in (nn.Parameter, Tensor):
        return "another library's weights"
    if isinstance(base, nn.Conv2d) and (base.groups != 1 or base.dilation != (1, 1)):
        return "a grouped or dilated convolution"
    if isinstance(base, nn.Conv2d) and (isinstance(base.padding, str) or base.padding_mode != "zeros"):
        return "a convolution that pads otherwise"
    if len(names) != 1:
        return "several adapters"
    if layer.lora_variant or layer.lora_B[names[0]].bias is not None:
        return "more than A and B"
    if not isinstance(layer.lora_dropout[names[0]], nn.Identity):
        return "dropout"
    return None


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    names, base, kind = layer.active_adapters, layer.base_layer, x.device.type
    as_planned = len(layer.r) == len(names) == 1 and not (args or kwargs or layer.disable_adapters or layer.merged)
    operation = _LowRankConvolution if isinstance(base, nn.Conv2d) else _LowRank
    as_planned &= operation is _LowRank or x.dim() == 4
    # a compiler fuses by itself, but for what a base's own kernel does
    if as_planned and (hasattr(base, "products") or not torch.compiler.is_compiling()):
        first, second = layer.lora_A[names[0]].weight, layer.lora_B[names[0]].weight
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        if torch.is_autocast_enabled(kind) or first.dtype == dtype:
            return operation.apply(x.to(dtype), first, second, base, layer.scaling[names[0]], layer.rounded)
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
            if _folds(len(rows), base.in_features, x.dtype):
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
            elif _folds(len(of_y), of_y.shape[1], of_y.dtype):
                of_x = of_y @ torch.addmm(ctx.weight(of_y.dtype), b, a, alpha=ctx.scale)
            else:
                of_x = (of_y @ ctx.weight(of_y.dtype)).addmm_(of_inner, a)
            of_x = of_x.view(ctx.shape)
        return of_x, of_first, of_second, None, None, None


class _LowRankConvolution(torch.autograd.Function):
    """Of x (B, inputs, H, W) in the precision that is computed in; the base is frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, first: Tensor, second: Tensor, base: nn.Conv2d, scale: float, rounded: Rounded
    ) -> Tensor:
        a, b = rounded(first, x.dtype), rounded(second, x.dtype)
        bias = None if base.bias is None else base.bias.to(x.dtype)
        ctx.weight = base.weight.to  # of these very weights, as above
        y = F.conv2d(x, ctx.weight(x.dtype), bias, base.stride, base.padding)
        inner = F.conv2d(x, a, None, base.stride, base.padding)
        of_channels, low, up = y.view(*y.shape[:2], -1), inner.flatten(2), b.flatten(1).expand(len(x), -1, -1)
        if of_channels.is_contiguous():
            of_channels.baddbmm_(up, low, alpha=scale)
        else:  # channels-last: what is written to has to lie in order, or bf16 is a thousand times slower on a CPU
            of_channels.mT.baddbmm_(low.mT, up.mT, alpha=scale)
        ctx.save_for_backward(x, inner, a, b)
        ctx.base, ctx.scale, ctx.dtypes = base, scale, (first.dtype, second.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, a, b = ctx.saved_tensors
        of_y, up, asked = gradient.flatten(2), b.flatten(1), ctx.needs_input_grad[0]
        of_inner = torch.bmm(up.t().expand(len(x), -1, -1), of_y).mul_(ctx.scale).view(inner.shape)
        of_second = torch.bmm(of_y, inner.flatten(2).mT).sum(0, dtype=ctx.dtypes[1]).mul_(ctx.scale).view(b.shape)
        # making a convolution's weights costs less arithmetic than memory
        folds = _folds(of_y.numel() // len(up), 4 * len(up), of_y.dtype)
        of_x, of_first = _of_convolution(of_inner, x, a, ctx.base, asked=(asked and not folds, True))
        if asked:  # not before the first adapter
            weight = ctx.weight(of_y.dtype)
            if folds:
                weight = weight.add((up @ a.flatten(1)).view_as(weight), alpha=ctx.scale)
            through, _ = _of_convolution(gradient, x, weight, ctx.base, asked=(True, False))
            of_x = through if folds else through.add_(of_x)
        return of_x, of_first.to(ctx.dtypes[0]), of_second, None, None, None


def _of_convolution(
    of_y: Tensor, x: Tensor, weight: Tensor, base: nn.Conv2d, *, asked: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weight of a convolution of the base's kind, as far as they are `asked` for."""
    kind = (base.stride, base.padding, base.dilation, False, (0, 0), base.groups)
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(of_y, x, weight, None, *kind, (*asked, False))
    return of_x, of_weight


def _folds(rows: int, features: int, dtype: torch.dtype) -> bool:
    """Whether W + s · B A costs less than the adapter's products, of which the one with `features` goes."""
    return rows > features and dtype in (torch.float32, torch.float64)
