"""Frozen linear layers that multiply in 8 bits, forward and on the way back.

The weights are W = diag(s_w) Q with a scale for each output, as quantized.py holds them; what comes in becomes q(x),
each row divided by a scale of its own and rounded:

    y  = (q(x) Qᵀ) · s_x s_w + b        ∂x = (q(g s_w) Q) · s_g

since s_w lies along what is summed on the way back. int8 has whole numbers up to 127 and sums them exactly, fp8 (E4M3)
sums in fp32. Scales, bias and an adapter's up-projection are added before anything is written: on a GPU in one kernel
(kernels.py), elsewhere by plain torch, with the same numbers.
"""

import importlib.util
import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorakit.core.errors import InputError
from lorakit.core.processes import rank
from lorakit.families.quantized import DTYPES, QuantizedLinear, in_8_bits, linear_layers

log = logging.getLogger("lorakit")

Kind = Literal["int8", "fp8"]
LowRank = tuple[Tensor, Tensor, float]  # (rows, rank), (rank, columns), and what their product is multiplied by
CAPABLE = {"int8": ((8, 0), "Ampere"), "fp8": ((8, 9), "Ada")}  # and newer
MULTIPLE = 16  # of inputs and outputs: tensor cores read 16 bytes at a time


def problems(kind: Kind) -> list[str]:
    """Why this machine's GPU cannot multiply so, if there is one."""
    if not torch.cuda.is_available():
        return []
    if kind == "fp8" and torch.version.hip:  # numbers its own
        return ['model.compute = "fp8" is tried on NVIDIA\'s numbers alone, and this GPU is AMD\'s: use "int8".']
    needed, name = CAPABLE[kind]
    found = torch.cuda.get_device_capability()
    if found < needed:
        return [
            f'model.compute = "{kind}" needs a GPU of compute capability {needed[0]}.{needed[1]} ({name} or newer), '
            f"and {torch.cuda.get_device_name()} has {found[0]}.{found[1]}: leave it out."
        ]
    if importlib.util.find_spec("triton") is None:
        return [f'model.compute = "{kind}" needs triton on a GPU: pip install triton, or leave it out.']
    return []


def compute_in(module: nn.Module, kind: Kind) -> None:
    """Replaces the linear layers in the repeated blocks of a frozen `module`, but for those whose inputs or outputs are
    no multiple of 16; InputError where there are no others.
    """
    layers = linear_layers(module)
    fitting = [(parent, name) for parent, name in layers if _fits(getattr(parent, name))]
    if not fitting:
        raise InputError(
            f'model.compute = "{kind}": this model\'s blocks have no linear layers with inputs and outputs in '
            f"multiples of {MULTIPLE}: leave it out."
        )
    for parent, name in fitting:
        setattr(parent, name, EightBitLinear(getattr(parent, name), kind))
    if rank() == 0:
        stay, tried = len(layers) - len(fitting), not torch.cuda.is_available()
        log.info(
            "model.compute: %d layers multiply in %s%s%s",
            len(fitting),
            kind,
            f", and {stay} of other sizes stay as they are" if stay else "",
            "; without a GPU that shows its numbers and not its speed" if tried else "",
        )


def _fits(layer: nn.Linear) -> bool:
    return layer.in_features % MULTIPLE == 0 == layer.out_features % MULTIPLE


class EightBitLinear(QuantizedLinear):
    """A frozen linear layer with 8-bit weights that are multiplied as they are."""

    @property
    def products(self) -> "Products":
        """With the weights as they are now: while a layer waits in the CPU's memory, it has others."""
        return Products(self.packed, self.scales, self.bias, DTYPES[self.kind])

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return _Product.apply(x.to(dtype), self.packed, self.scales, self.bias, DTYPES[self.kind])


class _Product(torch.autograd.Function):
    """Which keeps nothing for its backward but what the layer has anyway."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, numbers: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(packed, scales)
        ctx.numbers = numbers
        y = Products(packed, scales, bias, numbers).times(x.reshape(-1, x.shape[-1]))
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        packed, scales = ctx.saved_tensors
        of_x = Products(packed, scales, None, ctx.numbers).times_back(gradient.reshape(-1, gradient.shape[-1]))
        return of_x.view(*gradient.shape[:-1], of_x.shape[-1]), None, None, None, None


@dataclass(frozen=True)
class Products:
    """Of weights Q (outputs, inputs), given as bytes, with `scales` (outputs, 1): of rows, and of their gradients.

    `low` is a product of two that is added, an adapter's.
    """

    packed: Tensor
    scales: Tensor
    bias: Tensor | None
    numbers: torch.dtype

    def times(self, rows: Tensor, *, low: LowRank | None = None) -> Tensor:
        """(rows, inputs) to (rows, outputs)."""
        return self._scaled(rows, self.packed.view(self.numbers).t(), None, self.scales, self.bias, low)

    def times_back(self, gradient: Tensor, *, low: LowRank | None = None) -> Tensor:
        """(rows, outputs) to (rows, inputs)."""
        return self._scaled(gradient, self.packed.view(self.numbers), self.scales, None, None, low)

    def _scaled(
        self,
        rows: Tensor,
        columns: Tensor,
        within: Tensor | None,
        behind: Tensor | None,
        bias: Tensor | None,
        low: LowRank | None,
    ) -> Tensor:
        traced = torch.compiler.is_compiling()
        quantized, scaled_product = (_QUANTIZED, _SCALED_PRODUCT) if traced else (_quantized, _scaled_product)
        numbers, scales = quantized(rows, within, self.numbers)
        left, right, factor = low or (None, None, 1.0)
        return scaled_product(numbers, scales, columns, behind, bias, left, right, factor, rows.dtype)


def _quantized(x: Tensor, within: Tensor | None, numbers: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows x, their columns multiplied by `within`, as `in_8_bits` has them."""
    if x.device.type == "cuda":
        from lorakit.families import kernels

        return kernels.quantized(x, within, numbers)
    x = x.float().contiguous()
    return in_8_bits(x if within is None else x * within.view(1, -1), numbers)


def _scaled_product(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor | None,
    bias: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    factor: float,
    dtype: torch.dtype,
) -> Tensor:
    """(a b) · a_scales · b_scales + bias + factor · left right, in `dtype`, of 8-bit a (m, k) and b (k, n)."""
    if a.device.type == "cuda":
        from lorakit.families import kernels

        return kernels.scaled_product(a, a_scales, b, b_scales, bias, left, right, factor, dtype)
    with torch.autocast(a.device.type, enabled=False):  # sums are fp32's
        y = torch._int_mm(a, b).float() if a.dtype == torch.int8 else a.float() @ b.float()
        y *= a_scales
        if b_scales is not None:
            y *= b_scales.view(1, -1)
        if bias is not None:
            y += bias
        if left is not None and right is not None:
            y.addmm_(left.float(), right.float(), alpha=factor)
    return y.to(dtype)


# a compiler takes them as they are, and knows what comes of them
_QUANTIZED = torch.library.custom_op("lorakit::quantized", _quantized, mutates_args=())
_SCALED_PRODUCT = torch.library.custom_op("lorakit::scaled_product", _scaled_product, mutates_args=())


@_QUANTIZED.register_fake
def _(x: Tensor, within: Tensor | None, numbers: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=numbers), x.new_empty((x.shape[0], 1), dtype=torch.float32)


@_SCALED_PRODUCT.register_fake
def _(a: Tensor, a_scales: Tensor, b: Tensor, *rest: Any) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]), dtype=rest[-1])
