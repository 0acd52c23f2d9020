"""``delta_product`` and ``rounded_product`` in Triton: one matrix product with a prologue and an epilogue.

The rows of all variants are one axis; row ``m`` of it belongs to clean row ``m % n_rows``. The prologue is the
difference from the clean run, rounded in registers; the epilogue adds the clean output. Where the columns need more
than two tiles the difference is not formed for each of them again, but once, by :func:`difference_kernel`, for as many
rows as ``OPERAND_BYTES`` hold: they come back from L2 at half the size or less. Offsets of rows are int64.
"""
# Triton types the arguments of a kernel itself, at each call.
# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from fastinterp_kernels.common import Precision
from fastinterp_kernels.triton_common import (
    INTERPRETED,
    as_bf16,
    as_tf32,
    check_triton,
    dot_precision,
    launch_device,
    load_tile,
)

OPERAND_BYTES = 32 * 2**20
"""For the rounded differences of some rows: they stay in the L2 of an A100 or H100 between the two kernels."""

GROUP_ROWS = 8
"""Row tiles whose programs run side by side, so that their operands are found in L2."""


@dataclass(frozen=True, kw_only=True)
class ProductTiling:
    """Sizes of one program's tile and how it is scheduled."""

    row: int
    column: int
    depth: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


# Rounding in registers --------------------------------------------------------------------------------------


@triton.jit
def high_part(tile, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """float32 rounded to a precision: bfloat16 (float32 still with WIDEN) or float32. NaN stays NaN."""
    if PRECISION == "tf32":
        return tl.where(tile == tile, as_tf32(tile), tile)
    elif PRECISION == "exact":
        return tile
    elif WIDEN:
        return tl.where(tile == tile, as_bf16(tile), tile)
    else:
        return tile.to(tl.bfloat16)


@triton.jit
def low_part(tile, high, WIDEN: tl.constexpr):
    """What bfloat16 leaves of ``tile``, rounded to bfloat16; an infinite or NaN high part leaves nothing."""
    high = high.to(tl.float32)
    rest = tl.where(tl.abs(high) < float("inf"), tile - high, 0.0)
    if WIDEN:
        return as_bf16(rest)
    else:
        return rest.to(tl.bfloat16)


# The product ------------------------------------------------------------------------------------------------


@triton.jit
def add_step(
    acc, x_ptr, x_low_ptr, x_offsets, x_mask, clean_x_ptr, clean_offsets, w_ptr, w_offsets, w_mask,
    PRECISION: tl.constexpr, PREPARED: tl.constexpr, WIDEN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """acc + round(x - clean_x) @ round(W) over one step of the depth, small terms first."""
    w = load_tile(w_ptr, w_offsets, w_mask, False, False)
    if PRECISION == "exact" or PRECISION == "tf32" or WIDEN or w_ptr.dtype.element_ty != tl.bfloat16:
        w = w.to(tl.float32)
    # A weight in bfloat16 is its own rounding and has no low part.
    W_ROUNDED: tl.constexpr = w_ptr.dtype.element_ty == tl.bfloat16
    w_high = w if W_ROUNDED else high_part(w, PRECISION, WIDEN)
    x = load_tile(x_ptr, x_offsets, x_mask, WIDEN or not PREPARED, False)
    if PREPARED:
        x_high = x
    else:
        if clean_x_ptr is not None:
            x -= load_tile(clean_x_ptr, clean_offsets, x_mask, True, False)
        x_high = high_part(x, PRECISION, WIDEN)
    if PRECISION == "bf16x3":
        x_low = load_tile(x_low_ptr, x_offsets, x_mask, WIDEN, False) if PREPARED else low_part(x, x_high, WIDEN)
        acc = tl.dot(x_low, w_high, acc, input_precision=DOT)
        if not W_ROUNDED:
            acc = tl.dot(x_high, low_part(w, w_high, WIDEN), acc, input_precision=DOT)
    return tl.dot(x_high, w_high, acc, input_precision=DOT)


@triton.jit
def product_kernel(
    x_ptr, x_low_ptr, clean_x_ptr, w_ptr, base_ptr, out_ptr,
    first, n_product_rows, n_rows, n_in, n_out,
    stride_x_variant, stride_x_row, stride_x_in, stride_clean_row, stride_clean_in,
    stride_w_in, stride_w_out, stride_base_row, stride_base_out,
    PRECISION: tl.constexpr, PREPARED: tl.constexpr, TAIL: tl.constexpr, NARROW: tl.constexpr,
    ALIGNED: tl.constexpr, WIDEN: tl.constexpr, DOT: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_ROW: tl.constexpr, BLOCK_COLUMN: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """``out[m] = base[m % n_rows] + round(x[m] - clean_x[m % n_rows]) @ round(W)`` for one tile.

    ``m`` runs from ``first`` over ``n_product_rows``; with PREPARED ``x`` holds these rows alone, rounded. TAIL:
    ``n_in`` is no multiple of the step. The last tile of columns starts early, so that it is whole: it computes some
    columns again, with the same result. NARROW: there are fewer columns than a tile has. ALIGNED: ``n_out`` is a
    multiple of 16, and so is where a tile starts.
    """
    n_row_tiles = tl.cdiv(n_product_rows, BLOCK_ROW)
    n_column_tiles = tl.cdiv(n_out, BLOCK_COLUMN)
    place = tl.program_id(0)
    group = place // (GROUP * n_column_tiles)
    first_tile = group * GROUP
    n_together = tl.minimum(n_row_tiles - first_tile, GROUP)
    row_tile = first_tile + place % (GROUP * n_column_tiles) % n_together
    column = place % (GROUP * n_column_tiles) // n_together * BLOCK_COLUMN
    if not NARROW:
        column = tl.minimum(column, n_out - BLOCK_COLUMN)
    if ALIGNED:
        column = tl.multiple_of(column, 16)
    columns = column + tl.arange(0, BLOCK_COLUMN)
    inside = row_tile * BLOCK_ROW + tl.arange(0, BLOCK_ROW) < n_product_rows
    # Rows beyond the last are that row again: loads need no mask.
    local = tl.minimum(row_tile * BLOCK_ROW + tl.arange(0, BLOCK_ROW), n_product_rows - 1)
    rows = first + local
    clean_rows = (rows % n_rows).to(tl.int64)
    steps = tl.arange(0, BLOCK_DEPTH).to(tl.int64)

    if PREPARED:
        x_rows = local.to(tl.int64) * stride_x_row
    else:
        x_rows = (rows // n_rows).to(tl.int64) * stride_x_variant + clean_rows * stride_x_row
    x_offsets = x_rows[:, None] + steps[None, :] * stride_x_in
    clean_offsets = clean_rows[:, None] * stride_clean_row + steps[None, :] * stride_clean_in
    read_columns = columns
    if NARROW:
        read_columns = tl.minimum(columns, n_out - 1)
    w_offsets = steps[:, None] * stride_w_in + read_columns.to(tl.int64)[None, :] * stride_w_out

    acc = tl.zeros((BLOCK_ROW, BLOCK_COLUMN), dtype=tl.float32)
    for _ in range(n_in // BLOCK_DEPTH):
        acc = add_step(
            acc, x_ptr, x_low_ptr, x_offsets, None, clean_x_ptr, clean_offsets, w_ptr, w_offsets, None,
            PRECISION, PREPARED, WIDEN, DOT,
        )  # fmt: skip
        x_ptr += BLOCK_DEPTH * stride_x_in
        if x_low_ptr is not None:
            x_low_ptr += BLOCK_DEPTH * stride_x_in
        if clean_x_ptr is not None:
            clean_x_ptr += BLOCK_DEPTH * stride_clean_in
        w_ptr += BLOCK_DEPTH * stride_w_in
    if TAIL:
        left = n_in % BLOCK_DEPTH
        acc = add_step(
            acc, x_ptr, x_low_ptr, x_offsets, (steps < left)[None, :], clean_x_ptr, clean_offsets,
            w_ptr, w_offsets, (steps < left)[:, None], PRECISION, PREPARED, WIDEN, DOT,
        )  # fmt: skip

    # In halves: the clean output beside the sums in registers is what limits how many programs run together.
    halves = tl.permute(tl.reshape(acc, (BLOCK_ROW, 2, BLOCK_COLUMN // 2)), (0, 2, 1))
    left_half, right_half = tl.split(halves)
    half = column + tl.arange(0, BLOCK_COLUMN // 2)
    store_half(
        left_half, base_ptr, out_ptr, rows, clean_rows, half, inside, n_out, stride_base_row, stride_base_out, NARROW
    )
    store_half(
        right_half, base_ptr, out_ptr, rows, clean_rows, half + BLOCK_COLUMN // 2, inside, n_out,
        stride_base_row, stride_base_out, NARROW,
    )  # fmt: skip


@triton.jit
def store_half(
    found, base_ptr, out_ptr, rows, clean_rows, columns, inside, n_out, stride_base_row, stride_base_out,
    NARROW: tl.constexpr,
):  # fmt: skip
    """Store one tile of products, with the clean output added."""
    mask = inside[:, None]
    if NARROW:
        mask = mask & (columns < n_out)[None, :]
    wide = columns.to(tl.int64)[None, :]
    if base_ptr is not None:
        offsets = clean_rows[:, None] * stride_base_row + wide * stride_base_out
        found += tl.load(base_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + (rows.to(tl.int64)[:, None] * n_out + wide), found, mask=mask)


@triton.jit
def difference_kernel(
    x_ptr, clean_x_ptr, high_ptr, low_ptr, first, n_product_rows, n_rows, n_in,
    stride_x_variant, stride_x_row, stride_x_in, stride_clean_row, stride_clean_in, stride_out_row,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, BLOCK_ROW: tl.constexpr, BLOCK_COLUMN: tl.constexpr,
):  # fmt: skip
    """The parts of ``x[m] - clean_x[m % n_rows]``, for ``m`` from ``first`` over ``n_product_rows``."""
    local = tl.program_id(0) * BLOCK_ROW + tl.arange(0, BLOCK_ROW)
    columns = (tl.program_id(1) * BLOCK_COLUMN + tl.arange(0, BLOCK_COLUMN)).to(tl.int64)
    inside = (local < n_product_rows)[:, None] & (columns < n_in)[None, :]
    rows = first + local
    clean_rows = (rows % n_rows).to(tl.int64)
    x_rows = (rows // n_rows).to(tl.int64) * stride_x_variant + clean_rows * stride_x_row
    x = load_tile(x_ptr, x_rows[:, None] + columns[None, :] * stride_x_in, inside, True, False)
    if clean_x_ptr is not None:
        offsets = clean_rows[:, None] * stride_clean_row + columns[None, :] * stride_clean_in
        x -= load_tile(clean_x_ptr, offsets, inside, True, False)
    high = high_part(x, PRECISION, WIDEN)
    offsets = local.to(tl.int64)[:, None] * stride_out_row + columns[None, :]
    tl.store(high_ptr + offsets, high.to(high_ptr.dtype.element_ty), mask=inside)
    if low_ptr is not None:
        tl.store(low_ptr + offsets, low_part(x, high, WIDEN).to(low_ptr.dtype.element_ty), mask=inside)


# Launches ---------------------------------------------------------------------------------------------------


def default_tiling(
    precision: Precision, n_product_rows: int, n_out: int, *, prepared: bool, w_rounded: bool, hopper: bool
) -> ProductTiling:
    """Tile sizes by registers and shared memory on sm_80 and sm_90 (``hopper``)."""
    if INTERPRETED:  # every operation of a program costs the same there: few, large tiles
        return ProductTiling(row=128, column=_columns(n_out, 512), depth=256, num_warps=1, num_stages=1)
    if precision == "exact":
        # Without a limit ptxas stops at 96 registers and spills.
        return ProductTiling(row=64, column=_columns(n_out, 64), depth=16, num_warps=4, num_stages=3, max_registers=128)
    depth = 64 if precision == "bf16" and prepared and w_rounded else 32
    few = -(-n_product_rows // 128) * -(-n_out // 128) < 132  # programs: an H100 has as many multiprocessors
    if few or (precision == "bf16x3" and not hopper):
        return ProductTiling(row=64, column=_columns(n_out, 64), depth=depth, num_warps=4, num_stages=3)
    return ProductTiling(row=128, column=_columns(n_out, 128), depth=depth, num_warps=8, num_stages=3)


def _columns(n_out: int, largest: int) -> int:
    """The largest power of two that fits, so that whole tiles cover the columns; 16 at least."""
    return max(16, min(largest, 1 << (n_out.bit_length() - 1)))


def delta_product_triton(
    x: Float[Tensor, "variant row n_in"],
    clean_x: Float[Tensor, "row n_in"],
    W: Float[Tensor, "n_in n_out"],
    clean_y: Float[Tensor, "row n_out"],
    precision: Precision,
    *,
    tiling: ProductTiling | None = None,
    prepare: bool | None = None,
    n_bytes: int = OPERAND_BYTES,
) -> Float[Tensor, "variant row n_out"]:
    """On a CUDA device; ``prepare``: whether differences are formed once, for rows of ``n_bytes`` at a time.

    Raises ``ValueError`` for tensors that are not on a CUDA device (unless Python started with
    ``TRITON_INTERPRET=1``) and for float64.
    """
    check_triton(x, clean_x, W, clean_y)
    out = torch.empty((*x.shape[:2], W.shape[1]), dtype=torch.float32, device=x.device)
    _multiply(x, clean_x, W, clean_y, out.flatten(0, 1), precision, tiling, prepare, n_bytes)
    return out


def rounded_product_triton(
    x: Float[Tensor, "*rows n_in"],
    W: Float[Tensor, "n_in n_out"],
    b: Float[Tensor, " n_out"] | None,
    precision: Precision,
    *,
    tiling: ProductTiling | None = None,
    prepare: bool | None = None,
    n_bytes: int = OPERAND_BYTES,
) -> Float[Tensor, "*rows n_out"]:
    """As :func:`delta_product_triton`: all rows are clean rows, and one row of clean output stands for all."""
    check_triton(*((x, W) if b is None else (x, W, b)))
    out = torch.empty((*x.shape[:-1], W.shape[1]), dtype=torch.float32, device=x.device)
    rows = x.reshape(1, x.shape[:-1].numel(), x.shape[-1])
    base = None if b is None else b.expand(rows.shape[1], -1)
    _multiply(rows, None, W, base, out.view(rows.shape[1], W.shape[1]), precision, tiling, prepare, n_bytes)
    return out


def _multiply(
    x: Tensor, clean_x: Tensor | None, W: Tensor, base: Tensor | None, out: Tensor, precision: Precision,
    tiling: ProductTiling | None, prepare: bool | None, n_bytes: int,
) -> None:  # fmt: skip
    if out.numel() == 0:
        return
    n_product_rows, n_in = out.shape[0], x.shape[2]
    if prepare is None:
        prepare = _worth_preparing(precision, n_product_rows, n_in, out.shape[1])
    tiling = tiling or default_tiling(
        precision, n_product_rows, out.shape[1], prepared=prepare, w_rounded=W.dtype == torch.bfloat16,
        hopper=x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9,
    )  # fmt: skip
    with launch_device(x):
        if not prepare:
            _launch(x, None, clean_x, W, base, out, 0, n_product_rows, precision, tiling)
            return
        n_parts = 2 if precision == "bf16x3" else 1
        dtype = torch.bfloat16 if precision in ("bf16", "bf16x3") else torch.float32
        stride = -(-n_in // 16) * 16
        step = max(1, n_bytes // max(1, stride * n_parts * dtype.itemsize) // tiling.row) * tiling.row
        step = min(step, n_product_rows)
        parts = torch.empty((n_parts, step, stride), dtype=dtype, device=x.device)
        for first in range(0, n_product_rows, step):
            n_some = min(step, n_product_rows - first)
            _prepare(x, clean_x, parts, first, n_some, precision)
            low = parts[1] if n_parts == 2 else None
            _launch(parts[:1, :, :n_in], low, None, W, base, out, first, n_some, precision, tiling, x.shape[1])


def _worth_preparing(precision: Precision, n_product_rows: int, n_in: int, n_out: int) -> bool:
    """Where the difference is used by more than two tiles of columns, and a second launch is short beside the work.

    Reading ``x`` and ``clean_x`` takes 8 bytes of L2 per number and tile; the parts take 2 (``bf16``) or 4. Exact
    products are limited by arithmetic.
    """
    return precision != "exact" and n_out > 256 and n_product_rows * n_in >= 2**20


def _prepare(
    x: Tensor, clean_x: Tensor | None, parts: Tensor, first: int, n_product_rows: int, precision: Precision
) -> None:
    row, column = (128, 1024) if INTERPRETED else (32, 128)
    n_in = x.shape[2]
    difference_kernel[(-(-n_product_rows // row), -(-n_in // column))](
        x, clean_x, parts[0], parts[1] if len(parts) == 2 else None,
        first, n_product_rows, x.shape[1], n_in,
        *x.stride(), *((0, 0) if clean_x is None else clean_x.stride()), parts.stride(1),
        PRECISION=precision, WIDEN=INTERPRETED, BLOCK_ROW=row, BLOCK_COLUMN=column, num_warps=4,
    )  # fmt: skip


def _launch(
    x: Tensor, x_low: Tensor | None, clean_x: Tensor | None, W: Tensor, base: Tensor | None, out: Tensor,
    first: int, n_product_rows: int, precision: Precision, tiling: ProductTiling, prepared_of: int | None = None,
) -> None:  # fmt: skip
    """``prepared_of``: the number of clean rows, where ``x`` holds prepared rows."""
    n_in, n_out = W.shape
    grid = (-(-n_product_rows // tiling.row) * -(-n_out // tiling.column),)
    product_kernel[grid](
        x, x_low, clean_x, W, base, out,
        first, n_product_rows, x.shape[1] if prepared_of is None else prepared_of, n_in, n_out,
        *x.stride(), *((0, 0) if clean_x is None else clean_x.stride()),
        *W.stride(), *((0, 0) if base is None else base.stride()),
        PRECISION=precision, PREPARED=prepared_of is not None, TAIL=n_in % tiling.depth != 0,
        NARROW=n_out < tiling.column, ALIGNED=n_out % 16 == 0,
        WIDEN=INTERPRETED,  # the interpreter multiplies bfloat16 operands as raw integers
        DOT=dot_precision(precision), GROUP=GROUP_ROWS,
        BLOCK_ROW=tiling.row, BLOCK_COLUMN=tiling.column, BLOCK_DEPTH=tiling.depth,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages, maxnreg=tiling.max_registers,
        enable_fp_fusion=True,  # the default of some Triton releases and not of others
    )  # fmt: skip
