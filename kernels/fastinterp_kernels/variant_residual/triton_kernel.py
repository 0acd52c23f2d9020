"""``variant_residual`` in Triton: a program writes one tile of one variant, adding up the edited heads in registers.

What is read again for every variant, ``z - replacement`` and ``W_O`` in the dtype and parts of the products, is
prepared once, for some rows and columns at a time. Offsets are int64: the output passes 2^31 elements.
"""
# Triton types the arguments of a kernel itself, at each call.
# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp_kernels.common import Precision
from fastinterp_kernels.direct_effect_loss.triton_operands import (
    Parts,
    Stored,
    add_product,
    fill_parts,
    parts_of,
    stored_as,
    whole_multiple,
)
from fastinterp_kernels.triton_common import INTERPRETED, check_triton, dot_precision, launch_device
from fastinterp_kernels.variant_residual.reference import Edits, as_mask

OPERAND_BYTES = 24 * 2**20
"""For the prepared ``z`` of some rows, and as much again for the prepared ``W_O`` of some columns."""


@dataclass(frozen=True, kw_only=True)
class VariantTiling:
    """Sizes of one program's tile and how it is scheduled."""

    row: int
    column: int
    d_head: int
    num_warps: int
    num_stages: int


@triton.jit
def variant_residual_kernel(
    resid_ptr, z_ptr, z_low_ptr, w_ptr, w_low_ptr, start_ptr, head_ptr, out_ptr,
    n_rows, n_columns, n_padded_rows, n_row_tiles, n_column_tiles,
    stride_resid_row, stride_resid_column, stride_w_head, stride_w_depth, stride_w_column,
    stride_out_variant, stride_out_row, stride_out_column,
    WIDEN: tl.constexpr, ROUND_TF32: tl.constexpr, DOT: tl.constexpr, D_HEAD: tl.constexpr,
    BLOCK_ROW: tl.constexpr, BLOCK_COLUMN: tl.constexpr, BLOCK_D_HEAD: tl.constexpr,
):  # fmt: skip
    """One tile of one variant, whose heads are ``head[start[variant]:start[variant + 1]]``."""
    # Programs side by side write neighbouring tiles of one variant.
    place = tl.program_id(0)
    variant = place // n_column_tiles // n_row_tiles
    rows = (place // n_column_tiles % n_row_tiles * BLOCK_ROW + tl.arange(0, BLOCK_ROW)).to(tl.int64)
    columns = (place % n_column_tiles * BLOCK_COLUMN + tl.arange(0, BLOCK_COLUMN)).to(tl.int64)
    steps = tl.arange(0, BLOCK_D_HEAD).to(tl.int64)
    z_offsets = rows[:, None] * D_HEAD + steps[None, :]
    w_offsets = steps[:, None] * stride_w_depth + columns[None, :] * stride_w_column
    change = tl.zeros((BLOCK_ROW, BLOCK_COLUMN), dtype=tl.float32)
    for i in range(tl.load(start_ptr + variant), tl.load(start_ptr + variant + 1)):
        head = tl.load(head_ptr + i).to(tl.int64)
        z_start = head * n_padded_rows * D_HEAD
        w_start = head * stride_w_head
        for step in range(0, D_HEAD, BLOCK_D_HEAD):
            change = add_product(
                change, z_ptr, z_low_ptr, z_offsets + (z_start + step),
                w_ptr, w_low_ptr, w_offsets + (w_start + step * stride_w_depth), WIDEN, ROUND_TF32, DOT,
            )  # fmt: skip
    inside = (rows[:, None] < n_rows) & (columns[None, :] < n_columns)
    offsets = rows[:, None] * stride_resid_row + columns[None, :] * stride_resid_column
    resid = tl.load(resid_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    offsets = variant.to(tl.int64) * stride_out_variant + rows[:, None] * stride_out_row
    offsets += columns[None, :] * stride_out_column
    tl.store(out_ptr + offsets, (resid - change).to(out_ptr.dtype.element_ty), mask=inside)


def default_tiling(stored: Stored, d_head: int) -> VariantTiling:
    """Tile sizes by registers and shared memory on sm_80 and sm_90; ``d_head`` is a multiple of 32."""
    if INTERPRETED:  # every operation of a program costs the same there: few, large tiles
        return VariantTiling(row=256, column=512, d_head=min(256, d_head & -d_head), num_warps=1, num_stages=1)
    if stored.dtype == torch.float32 and stored.precision == "exact":
        return VariantTiling(row=64, column=64, d_head=16, num_warps=4, num_stages=2)
    return VariantTiling(row=128, column=64, d_head=min(32, d_head // 2), num_warps=4, num_stages=3)


def variant_residual_triton(
    resid: Float[Tensor, "row d_model"],
    z: Float[Tensor, "row head d_head"],
    W_O: Float[Tensor, "head d_head d_model"],
    edits: Edits,
    replacement: Float[Tensor, "#row head d_head"] | None,
    out: Float[Tensor, "variant row d_model"],
    precision: Precision,
    *,
    tiling: VariantTiling | None = None,
    n_bytes: int = OPERAND_BYTES,
) -> None:
    """Fill ``out`` on a CUDA device, with float32 accumulation, rounded once to its dtype.

    Memory beyond inputs and output: at most twice ``n_bytes`` (one tile of rows and columns at least).

    Raises ``ValueError`` for tensors that are not on a CUDA device (unless Python started with
    ``TRITON_INTERPRET=1``) and for float64.
    """
    multiplied = [tensor for tensor in (z, W_O, replacement) if tensor is not None]
    check_triton(resid, *multiplied)
    if out.numel() == 0:
        return
    stored = stored_as(multiplied, precision)
    (n_rows, n_heads, d_head), d_model = z.shape, resid.shape[1]
    d_head = whole_multiple(d_head, 32)
    tiling = tiling or default_tiling(stored, d_head)
    starts, heads = _head_lists(edits, n_heads)
    of_one = n_heads * d_head * stored.n_bytes  # a row of z, and a column of W_O
    row_step = min(whole_multiple(n_rows, tiling.row), max(1, n_bytes // of_one // tiling.row) * tiling.row)
    step = min(whole_multiple(d_model, tiling.column), max(1, n_bytes // of_one // tiling.column) * tiling.column)
    other = None if replacement is None else replacement.expand(n_rows, -1, -1)
    with launch_device(z):
        for row in range(0, n_rows, row_step):
            rows = slice(row, row + row_step)
            some = z[rows].transpose(0, 1)
            prepared = _empty(stored, z, n_heads, whole_multiple(some.shape[1], tiling.row), d_head)
            fill_parts(prepared, some, None if other is None else other[rows].transpose(0, 1))
            for column in range(0, d_model, step):
                columns = slice(column, column + step)
                weights = _weights(stored, W_O[:, :, columns], d_head, tiling)
                _launch(
                    resid[rows, columns], parts_of(prepared), weights, starts, heads, out[:, rows, columns],
                    stored, tiling,
                )  # fmt: skip


def _empty(stored: Stored, like: Tensor, *shape: int) -> Tensor:
    return torch.empty((stored.n_parts, *shape), dtype=stored.dtype, device=like.device)


def _weights(stored: Stored, W_O: Tensor, d_head: int, tiling: VariantTiling) -> Parts:
    """``W_O`` of some columns in whole tiles; for ``tf32``, which Hopper reads only so, neighbours along ``d_head``."""
    n_heads, n_columns = W_O.shape[0], whole_multiple(W_O.shape[2], tiling.column)
    if stored.precision == "tf32":
        weights = _empty(stored, W_O, n_heads, n_columns, d_head).mT
    else:
        weights = _empty(stored, W_O, n_heads, d_head, n_columns)
    return fill_parts(weights, W_O, None)


def _head_lists(edits: Edits, n_heads: int) -> tuple[Int[Tensor, " variant_1"], Int[Tensor, " edit"]]:
    """Where each variant's heads start in the list of all variants' heads, and that list."""
    if edits.dtype != torch.bool:
        return torch.arange(edits.shape[0] + 1, dtype=torch.int32, device=edits.device), edits.int().contiguous()
    mask = as_mask(edits, n_heads)
    starts = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
    return starts, mask.nonzero()[:, 1].int()


def _launch(
    resid: Tensor, z: Parts, W_O: Parts, starts: Tensor, heads: Tensor, out: Tensor, stored: Stored,
    tiling: VariantTiling,
) -> None:  # fmt: skip
    n_padded_rows = z.high.shape[1]
    n_row_tiles, n_column_tiles = n_padded_rows // tiling.row, W_O.high.shape[2] // tiling.column
    variant_residual_kernel[(out.shape[0] * n_row_tiles * n_column_tiles,)](
        resid, *z, *W_O, starts, heads, out,
        *resid.shape, n_padded_rows, n_row_tiles, n_column_tiles,
        *resid.stride(), *W_O.high.stride(), *out.stride(),
        WIDEN=INTERPRETED,  # the interpreter multiplies bfloat16 operands as raw integers
        ROUND_TF32=INTERPRETED and stored.precision == "tf32",
        DOT=dot_precision(stored.precision), D_HEAD=z.high.shape[2],
        BLOCK_ROW=tiling.row, BLOCK_COLUMN=tiling.column, BLOCK_D_HEAD=tiling.d_head,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
        enable_fp_fusion=True,  # the default of some Triton releases and not of others
    )  # fmt: skip
