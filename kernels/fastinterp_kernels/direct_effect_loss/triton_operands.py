"""Operands of Triton products: prepared once in the dtype, the parts and the padding that the kernels read.

A prepared operand consists of whole tiles, with zeros beyond its shape, so that no load of it needs a mask.
"""
# Triton types the arguments of a kernel itself, at each call.
# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastinterp_kernels.common import Precision
from fastinterp_kernels.triton_common import INTERPRETED, as_bf16, load_tile

# Inside kernels ---------------------------------------------------------------------------------------------


@triton.jit
def store_parts(high_ptr, low_ptr, offsets, x):
    """Store float32 in the dtype of ``high_ptr``; of bfloat16, the rest in ``low_ptr`` where there is one."""
    if high_ptr.dtype.element_ty == tl.bfloat16:
        high = tl.where(x == x, as_bf16(x), x)
        tl.store(high_ptr + offsets, high.to(tl.bfloat16))
        if low_ptr is not None:
            # An infinite high part has no rest: inf - inf is NaN.
            rest = tl.where(tl.abs(high) < float("inf"), x - high, 0.0)
            tl.store(low_ptr + offsets, as_bf16(rest).to(tl.bfloat16))
    else:
        tl.store(high_ptr + offsets, x.to(high_ptr.dtype.element_ty))


@triton.jit
def prepare_kernel(
    source_ptr, other_ptr, high_ptr, low_ptr, n_rows, n_columns,
    stride_source_batch, stride_source_row, stride_source_column,
    stride_other_batch, stride_other_row, stride_other_column,
    stride_batch, stride_row, stride_column,
    BLOCK_ROW: tl.constexpr, BLOCK_COLUMN: tl.constexpr,
):  # fmt: skip
    """Copy ``source [batch, row, column]`` (minus ``other``) to whole tiles in other dtypes, zeros beyond its shape."""
    rows = (tl.program_id(0) * BLOCK_ROW + tl.arange(0, BLOCK_ROW)).to(tl.int64)[:, None]
    columns = (tl.program_id(1) * BLOCK_COLUMN + tl.arange(0, BLOCK_COLUMN)).to(tl.int64)[None, :]
    batch = tl.program_id(2).to(tl.int64)
    inside = (rows < n_rows) & (columns < n_columns)
    offsets = batch * stride_source_batch + rows * stride_source_row + columns * stride_source_column
    x = tl.load(source_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if other_ptr is not None:
        offsets = batch * stride_other_batch + rows * stride_other_row + columns * stride_other_column
        x -= tl.load(other_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    store_parts(high_ptr, low_ptr, batch * stride_batch + rows * stride_row + columns * stride_column, x)


@triton.jit
def add_product(
    acc, a_ptr, a_low_ptr, a_offsets, b_ptr, b_low_ptr, b_offsets,
    WIDEN: tl.constexpr, ROUND_TF32: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """acc + a @ b, small terms first; the product of the two low parts, 2^-16 of the whole, is left out."""
    a = load_tile(a_ptr, a_offsets, None, WIDEN, ROUND_TF32)
    b = load_tile(b_ptr, b_offsets, None, WIDEN, ROUND_TF32)
    if a_low_ptr is not None:
        a_low = load_tile(a_low_ptr, a_offsets, None, WIDEN, False)
        b_low = load_tile(b_low_ptr, b_offsets, None, WIDEN, False)
        acc = tl.dot(a_low, b, acc, input_precision=DOT)
        acc = tl.dot(a, b_low, acc, input_precision=DOT)
    return tl.dot(a, b, acc, input_precision=DOT)


# Before a launch --------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """How operands are kept: as one tensor, or as the two parts of ``bf16x3``."""

    dtype: torch.dtype
    n_parts: int
    precision: Precision

    @property
    def n_bytes(self) -> int:
        return self.n_parts * self.dtype.itemsize


class Parts(NamedTuple):
    """An operand as it is stored; ``low`` with ``bf16x3``."""

    high: Tensor
    low: Tensor | None


def stored_as(operands: Sequence[Tensor], precision: Precision) -> Stored:
    """How operands are kept for a precision: their own dtype where all are bfloat16 or float16."""
    dtypes = {tensor.dtype for tensor in operands}
    if len(dtypes) == 1 and dtypes != {torch.float32}:
        return Stored(dtypes.pop(), 1, "exact")
    if precision in ("bf16x3", "bf16"):
        return Stored(torch.bfloat16, 2 if precision == "bf16x3" else 1, precision)
    return Stored(torch.float32, 1, precision)


def whole_multiple(n: int, of: int) -> int:
    return -(-n // of) * of


def parts_of(stacked: Tensor) -> Parts:
    return Parts(stacked[0], stacked[1] if stacked.shape[0] == 2 else None)


def fill_parts(out: Tensor, source: Tensor, other: Tensor | None) -> Parts:
    """Fill ``[part, batch, row, column]`` with ``source [batch, row, column]`` minus ``other``, and zeros beyond."""
    parts = parts_of(out)
    n_batch, n_rows, n_columns = parts.high.shape
    largest = 2048 if INTERPRETED else 64
    block_row, block_column = min(largest, n_rows & -n_rows), min(largest, n_columns & -n_columns)
    prepare_kernel[(n_rows // block_row, n_columns // block_column, n_batch)](
        source, other, *parts, source.shape[1], source.shape[2],
        *source.stride(), *((0, 0, 0) if other is None else other.stride()), *parts.high.stride(),
        BLOCK_ROW=block_row, BLOCK_COLUMN=block_column, num_warps=4,
    )  # fmt: skip
    return parts
