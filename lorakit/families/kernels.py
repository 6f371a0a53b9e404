"""Products in 8 bits on a GPU, in Triton: rows to 8 bits in one go, and a product that is scaled before it is written.

What they compute is said in eightbit.py. Sizes of tiles go by the shapes alone: measuring which are fastest, as Triton
can, would make the order of fp8's sums a matter of the moment, and a resumed run another one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorakit.families.quantized import LARGEST

BLOCK = 4096  # of a row at a time
HALVES = tl.constexpr(12582912.0)  # 1.5 · 2²³: what is added to it is rounded, halves to even


@triton.jit
def _quantize(x, within, q, scales, columns, LARGEST: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x += row * columns
    q += row * columns
    largest = tl.zeros((BLOCK,), tl.float32)
    broken = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(x + at, mask=at < columns, other=0.0).to(tl.float32)
        if within is not None:
            values *= tl.load(within + at, mask=at < columns, other=0.0)
        largest = tl.maximum(largest, tl.abs(values))
        broken += values * 0.0  # a maximum may pass over what is no number
    scale = tl.div_rn(tl.max(largest, 0), tl.full((), LARGEST, tl.float32)) + tl.sum(broken, 0)  # as torch divides
    tl.store(scales + row, scale)
    divisor = tl.maximum(scale, 1.1754943508222875e-38)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(x + at, mask=at < columns, other=0.0).to(tl.float32)
        if within is not None:
            values *= tl.load(within + at, mask=at < columns, other=0.0)
        values = tl.div_rn(values, divisor)
        if WHOLE:
            values = (values + HALVES) - HALVES
        tl.store(q + at, values.to(q.dtype.element_ty), mask=at < columns)


@triton.jit
def _multiply(
    a,
    a_scales,
    b,
    b_scales,
    bias,
    left,
    right,
    y,
    m,
    n,
    k,
    rank,
    b_k,
    b_n,
    right_r,
    right_n,
    factor,
    SUMS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    GROUP: tl.constexpr,
):
    # tiles of GROUP rows of tiles follow each other, so that what they share stays in the cache
    number, columns = tl.program_id(0), tl.cdiv(n, BN)
    first = number // (GROUP * columns) * GROUP
    group = min(tl.cdiv(m, BM) - first, GROUP)
    tile_m = first + number % (GROUP * columns) % group
    tile_n = number % (GROUP * columns) // group
    at_m, at_n, at_k = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    in_m, in_n = (at_m < m)[:, None], (at_n < n)[None, :]
    rows = at_m.to(tl.int64)[:, None]  # rows times columns may be more than 2³¹
    a += rows * k
    b += at_n[None, :] * b_n
    sums = tl.zeros((BM, BN), SUMS)
    for start in range(0, k, BK):
        inner = start + at_k
        left_tile = tl.load(a + inner[None, :], mask=in_m & (inner < k)[None, :], other=0.0)
        right_tile = tl.load(b + inner[:, None] * b_k, mask=in_n & (inner < k)[:, None], other=0.0)
        # fp8's sums on Hopper have few bits of their own, and go to fp32 after this many
        sums = tl.dot(left_tile, right_tile, sums, out_dtype=SUMS, max_num_imprecise_acc=128)
    out = sums.to(tl.float32) * tl.load(a_scales + at_m, mask=at_m < m, other=0.0)[:, None]
    if b_scales is not None:
        out *= tl.load(b_scales + at_n, mask=at_n < n, other=0.0)[None, :]
    if bias is not None:
        out += tl.load(bias + at_n, mask=at_n < n, other=0.0).to(tl.float32)[None, :]
    if left is not None:
        low = tl.zeros((BM, BN), tl.float32)
        for start in range(0, rank, BR):
            at_r = start + tl.arange(0, BR)
            left_tile = tl.load(left + rows * rank + at_r[None, :], mask=in_m & (at_r < rank)[None, :], other=0.0)
            where = right + at_r[:, None] * right_r + at_n[None, :] * right_n
            right_tile = tl.load(where, mask=in_n & (at_r < rank)[:, None], other=0.0)
            low = tl.dot(left_tile, right_tile, low, input_precision="ieee")
        out += low * factor
    tl.store(y + rows * n + at_n[None, :], out.to(y.dtype.element_ty), mask=in_m & in_n)


def quantized(x: Tensor, within: Tensor | None, numbers: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `eightbit._quantized`."""
    x = x.contiguous()
    rows, columns = x.shape
    q, scales = torch.empty_like(x, dtype=numbers), x.new_empty((rows, 1), dtype=torch.float32)
    whole = numbers == torch.int8
    block = min(BLOCK, triton.next_power_of_2(columns))
    _quantize[(rows,)](x, within, q, scales, columns, LARGEST=LARGEST[numbers], WHOLE=whole, BLOCK=block)
    return q, scales


def scaled_product(
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
    """As `eightbit._scaled_product`."""
    (m, k), n = a.shape, b.shape[1]
    y = a.new_empty((m, n), dtype=dtype)
    rank, of_right = (0, (0, 0)) if left is None or right is None else (left.shape[1], right.stride())
    tiles = _tiles(m, rank, dtype.itemsize)
    grid = (triton.cdiv(m, tiles["BM"]) * triton.cdiv(n, tiles["BN"]),)
    _multiply[grid](
        a,
        a_scales,
        b,
        b_scales,
        bias,
        None if left is None else left.contiguous(),
        right,
        y,
        m,
        n,
        k,
        rank,
        *b.stride(),
        *of_right,
        factor,
        SUMS=tl.int32 if a.dtype == torch.int8 else tl.float32,
        **tiles,
    )
    return y


def _tiles(m: int, rank: int, size: int) -> dict[str, int]:
    """Tiles for m rows, and for an adapter's product of numbers of so many bytes: they fit into the 99 KiB of shared
    memory that the smallest of these GPUs have. A tile of more rows than there are would be computed for nothing."""
    rows = min(128, max(16, triton.next_power_of_2(m)))
    return {
        "BM": rows,
        "BN": 128,
        "BK": 128,
        "BR": min(128 // size, max(16, triton.next_power_of_2(rank))),
        "GROUP": 8,
        "num_warps": 8 if rows == 128 else 4,
        "num_stages": 3,
    }
