"""The kernels of ``head_logits``: logits live in registers, one maximum per group of 32 columns is stored.

The first multiplies a tile of rows by ``W_O[h] @ W_U`` and reduces the product; the second computes the logits of a
few groups again, for the top-k. Operands are padded with zeros, so that no load needs a mask. Offsets are int64.
"""
# Triton types the arguments of a kernel itself, at each call.
# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fastinterp_kernels.common import Precision
from fastinterp_kernels.triton_common import INTERPRETED, as_tf32, finite_or_zero

GROUP = 32
"""Columns to a group, of which the first kernel keeps the maximum; the second looks at k groups."""


@dataclass(frozen=True, kw_only=True)
class HeadTiling:
    """Sizes of a program's tile and how it is scheduled. ``d`` divides the padded length of the vectors."""

    row: int
    column: int
    d: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


@triton.jit
def _load(ptr, offsets, WIDEN: tl.constexpr, ROUND_TF32: tl.constexpr):
    tile = tl.load(ptr + offsets)
    if WIDEN:  # the interpreter multiplies bfloat16 operands as raw integers
        tile = tile.to(tl.float32)
    if ROUND_TF32:
        tile = as_tf32(tile)
    return tile


@triton.jit
def _multiply(
    acc, x, x_low, w_ptr, w_low_ptr, offsets, WIDEN: tl.constexpr, ROUND_TF32: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """acc + x @ w, small terms first; the product of the two low parts, 2^-16 of the whole, is left out."""
    w = _load(w_ptr, offsets, WIDEN, ROUND_TF32)
    if w_low_ptr is not None:
        w_low = _load(w_low_ptr, offsets, WIDEN, False)
        acc = tl.dot(x_low, w, acc, input_precision=DOT)
        acc = tl.dot(x, w_low, acc, input_precision=DOT)
    return tl.dot(x, w, acc, input_precision=DOT)


@triton.jit
def _tile_logits(
    x_ptr, x_low_ptr, x, x_low, x_offsets, w_ptr, w_low_ptr, column, d,
    WIDEN: tl.constexpr, ROUND_TF32: tl.constexpr, DOT: tl.constexpr,
    BLOCK_ROW: tl.constexpr, BLOCK_COLUMN: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Logits of a tile of rows and of the columns from ``column`` on; ``x`` None: it is read block by block."""
    acc = tl.zeros((BLOCK_ROW, BLOCK_COLUMN), dtype=tl.float32)
    first = tl.cast(column, tl.int64) * d
    offsets = tl.arange(0, BLOCK_COLUMN)[None, :] * d + tl.arange(0, BLOCK_D)[:, None]
    w_ptr += first
    if w_low_ptr is not None:
        w_low_ptr += first
    if x is not None:
        return _multiply(acc, x, x_low, w_ptr, w_low_ptr, offsets, WIDEN, ROUND_TF32, DOT)
    for start in range(0, d, BLOCK_D):
        part = _load(x_ptr + start, x_offsets, WIDEN, ROUND_TF32)
        if x_low_ptr is not None:
            low = _load(x_low_ptr + start, x_offsets, WIDEN, False)
            acc = _multiply(acc, part, low, w_ptr + start, w_low_ptr + start, offsets, WIDEN, ROUND_TF32, DOT)
        else:
            acc = _multiply(acc, part, None, w_ptr + start, None, offsets, WIDEN, ROUND_TF32, DOT)
    return acc


@triton.jit
def _reduce_tile(
    logits, shift, total, count, maximum_ptr, minimum_ptr, total_ptr, shift_ptr, target_ptr, threshold_ptr,
    rows, read_rows, column, n_rows, n_columns,
    LAST: tl.constexpr, UNIT: tl.constexpr, N_TARGETS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_ROW: tl.constexpr, BLOCK_COLUMN: tl.constexpr,
):  # fmt: skip
    """Store the extremes of a tile and add it to the sums; ``LAST``: only columns below ``n_columns`` exist."""
    columns = column + tl.arange(0, BLOCK_COLUMN)
    N_GROUPS: tl.constexpr = BLOCK_COLUMN // GROUP
    groups = column // GROUP + tl.arange(0, N_GROUPS)
    places = groups.to(tl.int64)[None, :] * n_rows + rows[:, None]
    stored = tl.broadcast_to(rows[:, None] < n_rows, (BLOCK_ROW, N_GROUPS))
    if LAST:
        stored = stored & (groups[None, :] * GROUP < n_columns)
    if minimum_ptr is not None:
        low = tl.where(columns[None, :] < n_columns, logits, float("inf")) if LAST else logits
        tl.store(minimum_ptr + places, tl.min(tl.reshape(low, (BLOCK_ROW, N_GROUPS, GROUP)), axis=2), mask=stored)
    if LAST:
        logits = tl.where(columns[None, :] < n_columns, logits, float("-inf"))
    if maximum_ptr is not None:
        best = tl.max(tl.reshape(logits, (BLOCK_ROW, N_GROUPS, GROUP)), axis=2)
        tl.store(maximum_ptr + places, best, mask=stored)
    for j in tl.static_range(N_TARGETS):
        place = read_rows * N_TARGETS + j
        # A target's own column does not count: its logit may differ from the threshold in the last digit.
        above = (logits > tl.load(threshold_ptr + place)[:, None]) & (
            columns[None, :] != tl.load(target_ptr + place)[:, None]
        )
        here = tl.sum(above.to(tl.int32), axis=1)
        count += tl.where(tl.arange(0, N_TARGETS)[None, :] == j, here[:, None], 0)
    if shift_ptr is not None:  # the online form
        new_shift = tl.maximum(shift, tl.max(logits, axis=1))
        safe_shift = finite_or_zero(new_shift)
        total *= tl.exp2((shift - safe_shift) * UNIT)
        total += tl.sum(tl.exp2((logits - safe_shift[:, None]) * UNIT), axis=1)
        shift = new_shift
    elif total_ptr is not None:
        total += tl.sum(tl.exp2(logits * UNIT), axis=1)
    return shift, total, count


@triton.jit
def head_logits_kernel(
    x_ptr, x_low_ptr, w_ptr, w_low_ptr, maximum_ptr, minimum_ptr, total_ptr, shift_ptr,
    target_ptr, threshold_ptr, count_ptr,
    n_rows, n_columns, chunk_columns, n_chunks, n_groups, d, stride_x_head, stride_w_head,
    UNIT: tl.constexpr, HOIST: tl.constexpr, WIDEN: tl.constexpr, ROUND_TF32: tl.constexpr, DOT: tl.constexpr,
    N_TARGETS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_ROW: tl.constexpr, BLOCK_COLUMN: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (i, j, h): row tile i of head h over chunk j of the columns.

    ``x`` is ``[head, row, d]``, ``w`` ``[head, column, d]`` with whole tiles of columns, extremes are ``[head,
    group, row]``, sums ``[head, chunk, row]``, targets and thresholds ``[head, row, N_TARGETS]``, counts ``[head,
    chunk, row, N_TARGETS]``. A pointer that is None asks for nothing; ``shift_ptr`` for the online form.
    ``UNIT`` turns logits into powers of two.
    """
    # Programs side by side share a chunk of the weights, which then comes from L2 for all but the first.
    row = tl.program_id(0) * BLOCK_ROW
    chunk = tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)
    rows = row + tl.arange(0, BLOCK_ROW)
    # Rows beyond the last read the last one again and are not stored: cheaper than a mask on every load.
    read_rows = tl.minimum(rows, n_rows - 1)
    x_offsets = (read_rows - row)[:, None] * d + tl.arange(0, BLOCK_D)[None, :]
    x_start = head * stride_x_head + tl.cast(row, tl.int64) * d
    x_ptr += x_start
    w_ptr += head * stride_w_head
    x = None
    x_low = None
    if x_low_ptr is not None:
        x_low_ptr += x_start
        w_low_ptr += head * stride_w_head
    if HOIST:
        x = _load(x_ptr, x_offsets, WIDEN, ROUND_TF32)
        if x_low_ptr is not None:
            x_low = _load(x_low_ptr, x_offsets, WIDEN, False)
    if maximum_ptr is not None:
        maximum_ptr += head * n_groups * n_rows
    if minimum_ptr is not None:
        minimum_ptr += head * n_groups * n_rows
    if target_ptr is not None:
        target_ptr += head * n_rows * N_TARGETS
        threshold_ptr += head * n_rows * N_TARGETS
    shift = tl.full((BLOCK_ROW,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_ROW,), dtype=tl.float32)
    count = tl.zeros((BLOCK_ROW, max(N_TARGETS, 1)), dtype=tl.int32)
    first = chunk * chunk_columns
    n_here = tl.minimum(chunk_columns, n_columns - first)
    n_whole_tiles = n_here // BLOCK_COLUMN
    for tile in range(n_whole_tiles):
        column = first + tile * BLOCK_COLUMN
        logits = _tile_logits(
            x_ptr, x_low_ptr, x, x_low, x_offsets, w_ptr, w_low_ptr, column, d,
            WIDEN, ROUND_TF32, DOT, BLOCK_ROW, BLOCK_COLUMN, BLOCK_D,
        )  # fmt: skip
        shift, total, count = _reduce_tile(
            logits, shift, total, count, maximum_ptr, minimum_ptr, total_ptr, shift_ptr, target_ptr, threshold_ptr,
            rows, read_rows, column, n_rows, n_columns, False, UNIT, N_TARGETS, GROUP, BLOCK_ROW, BLOCK_COLUMN,
        )  # fmt: skip
    if n_whole_tiles * BLOCK_COLUMN < n_here:
        column = first + n_whole_tiles * BLOCK_COLUMN
        logits = _tile_logits(
            x_ptr, x_low_ptr, x, x_low, x_offsets, w_ptr, w_low_ptr, column, d,
            WIDEN, ROUND_TF32, DOT, BLOCK_ROW, BLOCK_COLUMN, BLOCK_D,
        )  # fmt: skip
        shift, total, count = _reduce_tile(
            logits, shift, total, count, maximum_ptr, minimum_ptr, total_ptr, shift_ptr, target_ptr, threshold_ptr,
            rows, read_rows, column, n_rows, n_columns, True, UNIT, N_TARGETS, GROUP, BLOCK_ROW, BLOCK_COLUMN,
        )  # fmt: skip
    out = (head * n_chunks + chunk) * n_rows + rows
    if total_ptr is not None:
        tl.store(total_ptr + out, total, mask=rows < n_rows)
    if shift_ptr is not None:
        tl.store(shift_ptr + out, shift, mask=rows < n_rows)
    if count_ptr is not None:
        places = out[:, None] * N_TARGETS + tl.arange(0, N_TARGETS)[None, :]
        tl.store(count_ptr + places, count, mask=tl.broadcast_to(rows[:, None] < n_rows, (BLOCK_ROW, N_TARGETS)))


@triton.jit
def diagonal_kernel(
    x_ptr, x_low_ptr, w_ptr, w_low_ptr, out_ptr, n_rows, d, stride_x_head, stride_w_head,
    HOIST: tl.constexpr, WIDEN: tl.constexpr, ROUND_TF32: tl.constexpr, DOT: tl.constexpr,
    BLOCK_ROW: tl.constexpr, BLOCK_COLUMN: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (i, h): products of rows and columns of equal index, summed as in ``head_logits_kernel``.

    The output is ``[head, row]``. BLOCK_COLUMN is at most BLOCK_ROW.
    """
    column = tl.program_id(0) * BLOCK_COLUMN
    head = tl.program_id(1).to(tl.int64)
    rows = column + tl.arange(0, BLOCK_ROW)
    read_rows = tl.minimum(rows, n_rows - 1)
    x_offsets = (read_rows - column)[:, None] * d + tl.arange(0, BLOCK_D)[None, :]
    x_start = head * stride_x_head + tl.cast(column, tl.int64) * d
    x_ptr += x_start
    w_ptr += head * stride_w_head
    x = None
    x_low = None
    if x_low_ptr is not None:
        x_low_ptr += x_start
        w_low_ptr += head * stride_w_head
    if HOIST:
        x = _load(x_ptr, x_offsets, WIDEN, ROUND_TF32)
        if x_low_ptr is not None:
            x_low = _load(x_low_ptr, x_offsets, WIDEN, False)
    logits = _tile_logits(
        x_ptr, x_low_ptr, x, x_low, x_offsets, w_ptr, w_low_ptr, column, d,
        WIDEN, ROUND_TF32, DOT, BLOCK_ROW, BLOCK_COLUMN, BLOCK_D,
    )  # fmt: skip
    same = tl.arange(0, BLOCK_ROW)[:, None] == tl.arange(0, BLOCK_COLUMN)[None, :]
    found = tl.sum(tl.where(same, logits, 0.0), axis=1)
    tl.store(out_ptr + head * n_rows + rows, found, mask=rows < tl.minimum(n_rows, column + BLOCK_COLUMN))


@triton.jit
def group_logits_kernel(
    x_ptr, x_low_ptr, w_ptr, w_low_ptr, group_ptr, out_ptr,
    n_rows, n_columns, k, d, stride_x_head, stride_w_head, missing,
    GROUP: tl.constexpr, BLOCK_ROW: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (i, h): logits of the columns of k groups for row tile i of head h; ``missing`` beyond the last.

    Groups are ``[head, row, k]``, the output ``[head, row, k * GROUP]``, ``missing`` an infinity. Products on the
    ordinary cores, exact.
    """
    head = tl.program_id(1).to(tl.int64)
    lanes = tl.arange(0, BLOCK_ROW * GROUP)
    rows = tl.program_id(0) * BLOCK_ROW + lanes // GROUP
    read_rows = tl.minimum(rows, n_rows - 1).to(tl.int64)
    x_offsets = head * stride_x_head + read_rows[:, None] * d + tl.arange(0, BLOCK_D)[None, :]
    places = (head * n_rows + read_rows) * k
    for j in range(k):
        columns = tl.load(group_ptr + places + j) * GROUP + lanes % GROUP
        w_offsets = head * stride_w_head + columns[:, None] * d + tl.arange(0, BLOCK_D)[None, :]
        logits = tl.zeros((BLOCK_ROW * GROUP,), dtype=tl.float32)
        for start in range(0, d, BLOCK_D):
            x = tl.load(x_ptr + x_offsets + start).to(tl.float32)
            w = tl.load(w_ptr + w_offsets + start).to(tl.float32)
            if x_low_ptr is not None:
                x += tl.load(x_low_ptr + x_offsets + start).to(tl.float32)
                w += tl.load(w_low_ptr + w_offsets + start).to(tl.float32)
            logits += tl.sum(x * w, axis=1)
        # Weights beyond the last column are 0, so that a row of NaN has NaN there too and not the smallest value.
        logits += tl.where(columns < n_columns, 0.0, missing)
        tl.store(out_ptr + (places + j) * GROUP + lanes % GROUP, logits, mask=rows < n_rows)


def padded_length(d: int) -> int:
    """The length to which vectors are padded with zeros: whole blocks of ``default_tiling``."""
    multiple = 32 if d <= 128 else 64
    return -(-d // multiple) * multiple


def default_tiling(d: int, stored: torch.dtype, n_parts: int, precision: Precision) -> HeadTiling:
    """The tile sizes for vectors of padded length ``d``, chosen by registers and shared memory on sm_80 and sm_90.

    A tile of rows stays on chip (``d`` is the whole length) where one of them takes at most 256 bytes.
    """
    entry = n_parts * stored.itemsize
    block = d if d * entry <= 256 else 128 // entry
    while block & (block - 1) or d % block:
        block = 32 if block > 32 else block // 2
    if INTERPRETED:  # every operation of a program costs the same there: few, large tiles
        return HeadTiling(row=256, column=2048, d=block, num_warps=1, num_stages=1)
    if stored == torch.float32 and precision == "exact":  # on the ordinary cores
        # The assembler spills a few registers to reach a rounder number of them, unless it is told not to.
        return HeadTiling(row=128, column=64, d=16, num_warps=8, num_stages=2, max_registers=255)
    return HeadTiling(row=128, column=64, d=block, num_warps=8, num_stages=3)


def group_tiling(d: int) -> HeadTiling:
    """Sizes for ``group_logits_kernel``: ``row`` rows and a group of columns of each."""
    block = 64 if d % 64 == 0 else 32
    if INTERPRETED:
        return HeadTiling(row=256, column=GROUP, d=block, num_warps=1, num_stages=1)
    return HeadTiling(row=4, column=GROUP, d=block, num_warps=4, num_stages=2)
