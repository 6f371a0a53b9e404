"""Frozen linear layers in 8 or 4 bits: stored small, multiplied in the precision of what comes in.

int8 and fp8 (E4M3) hold each row divided by a scale of its own; nf4 (Dettmers et al., arXiv:2305.14314) is made by
bitsandbytes, with a scale for each 64 numbers. Weights are unpacked for a product and forgotten, in the backward pass
once more, so that only the small ones stay in memory. An adapter beside such a layer trains as beside any other. What
multiplies in 8 bits is eightbit.py.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.core.memory import leave_file

Kind = Literal["nf4", "int8", "fp8"]
BLOCK = 64  # numbers that share a scale in nf4
DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantize(module: nn.Module, kind: Kind) -> None:
    """Replaces the linear layers in the repeated blocks of a frozen `module`; embeddings, convolutions and what stands
    before and behind the blocks stay as they are, few weights that much depends on.
    """
    for parent, name in linear_layers(module):
        setattr(parent, name, QuantizedLinear(getattr(parent, name), kind))


def linear_layers(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """The linear layers in the repeated blocks of `module` that hold full weights: what each is a child of, and its
    name there."""
    blocks = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    parents = {parent: None for block in blocks for parent in block.modules()}  # blocks may be within blocks
    return [(parent, name) for parent in parents for name, at in parent.named_children() if type(at) is nn.Linear]


class QuantizedLinear(nn.Linear):
    """A frozen linear layer with packed weights."""

    packed: nn.Parameter
    scales: nn.Parameter
    like: Tensor

    def __init__(self, layer: nn.Linear, kind: Kind) -> None:
        nn.Module.__init__(self)  # there are no weights to be drawn
        self.in_features, self.out_features, self.kind = layer.in_features, layer.out_features, kind
        packed, scales = _packed(layer.weight.detach(), kind)
        # no buffers: so they are shared out over processes as other weights are
        self.packed, self.scales = nn.Parameter(packed, False), nn.Parameter(scales, False)
        self.register_buffer("like", layer.weight.new_empty(0), persistent=False)  # goes along with `.to(dtype)`
        self.bias = layer.bias
        self.train(layer.training)
        leave_file(layer.weight)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        scales = self._parameters["scales"]  # none while they wait elsewhere
        kept = None if scales is None else scales.data
        super()._apply(fn, recurse)
        if kept is not None:
            self.scales.data = kept.to(self.packed.device)  # in fp32, whatever the layer computes in
        return self

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weights (outputs, inputs) as they are multiplied with, unpacked anew each time."""
        return self.unpacked(self.like.dtype)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        return self.held()(dtype)

    def held(self) -> Callable[[torch.dtype], Tensor]:
        """What unpacks the weights that the layer has now: while it waits in the CPU's memory, it has others."""
        shape = self.out_features, self.in_features
        return functools.partial(_unpacked, self.packed, self.scales, shape, kind=self.kind)

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.bias, self)


class _Product(torch.autograd.Function):
    """x Wᵀ + b, which keeps nothing for its backward but what the layer has anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: QuantizedLinear) -> Tensor:
        # these very tensors: a layer that waits in the CPU's memory has others when the backward pass comes
        ctx.save_for_backward(layer.packed, layer.scales)
        ctx.shape, ctx.kind, ctx.dtype = (layer.out_features, layer.in_features), layer.kind, x.dtype
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return F.linear(x.to(dtype), layer.unpacked(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        packed, scales = ctx.saved_tensors
        weight = _unpacked(packed, scales, ctx.shape, gradient.dtype, ctx.kind)
        return (gradient @ weight).to(ctx.dtype), None, None


def _packed(weight: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """(bytes, fp32 scales) of weights (outputs, inputs)."""
    if kind == "nf4":
        from bitsandbytes.functional import quantize_4bit

        # flat: on the CPU, rows that are no whole blocks come back wrong otherwise (bitsandbytes 0.50.2)
        packed, state = quantize_4bit(weight.flatten(), blocksize=BLOCK, quant_type="nf4")
        return packed, state.absmax
    packed, scales = in_8_bits(weight.float(), DTYPES[kind])
    return packed.view(torch.uint8), scales  # bytes: a cast to another precision leaves them alone


def in_8_bits(rows: Tensor, numbers: torch.dtype) -> tuple[Tensor, Tensor]:
    """fp32 rows as 8-bit numbers, and the scales (rows, 1) that they are to be multiplied by; a row with something that
    is not finite has no finite scale."""
    scales = rows.abs().amax(dim=1, keepdim=True) / LARGEST[numbers]
    scaled = rows / scales.clamp(min=torch.finfo(torch.float32).tiny)
    return (scaled.round() if numbers == torch.int8 else scaled).to(numbers), scales


def _unpacked(packed: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype, kind: Kind) -> Tensor:
    if kind == "nf4":
        from bitsandbytes.functional import QuantState, dequantize_4bit

        flat, code = torch.Size([math.prod(shape)]), _code(packed.device)
        state = QuantState(scales, flat, code, blocksize=BLOCK, quant_type="nf4", dtype=dtype)
        return dequantize_4bit(packed, state).view(shape)
    numbers = packed.view(DTYPES[kind])
    return (numbers.to(dtype) * scales).to(dtype)


@functools.cache
def _code(device: torch.device) -> Tensor:
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type("nf4", device)
