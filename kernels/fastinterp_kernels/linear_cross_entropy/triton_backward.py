"""The gradient of ``linear_cross_entropy`` in Triton: logits again, tile by tile, and ``dx += G @ W_U.T``.

``G`` (see ``gradient.py``) exists for one block of rows and one stretch of the vocabulary at a time. Two kernels take
turns: one recomputes logits and stores ``G``, the other multiplies it. dx is larger than any tile of registers, so
one kernel alone would have to add to it atomically, in an order that differs from run to run.
"""
# Triton types the arguments of a kernel itself, at each call.
# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastinterp_kernels.common import Precision
from fastinterp_kernels.linear_cross_entropy.gradient import Problem, Slopes, rows_of_slopes
from fastinterp_kernels.linear_cross_entropy.triton_tiles import (
    BLOCK_BYTES,
    Block,
    default_tiling,
    operand_dtype,
    row_blocks,
    soft_capped,
    tile_logits,
    tile_options,
)
from fastinterp_kernels.triton_common import (
    INTERPRETED,
    LOG2_E,
    SLAB_BYTES,
    Slab,
    Tiling,
    as_bf16,
    dot_precision,
    launch_device,
    load_tile,
    weight_slabs,
)

SLOPE_BYTES = 24 * 2**20
"""Size of G, its low parts included."""


@triton.jit
def _softmax(logits, logsumexp):
    """0 in a row of -inf alone."""
    shift = tl.where(logsumexp == float("-inf"), 0.0, logsumexp)
    return tl.exp2((logits - shift[:, None]) * LOG2_E)


@triton.jit
def slope_kernel(
    x_ptr, x_low_ptr, y_ptr, y_low_ptr, w_ptr, w_low_ptr, b_ptr,
    q_ptr, p_ptr, logsumexp_ptr, y_logsumexp_ptr, target_ptr, target_slope_ptr, out_ptr, out_low_ptr,
    n_rows, d_model, n_columns, first_id, k, stride_x_row, stride_w_d, stride_w_vocab, stride_out_row, softcap,
    ROUND_BF16: tl.constexpr, WIDEN: tl.constexpr, ROUND_TF32: tl.constexpr, DOT: tl.constexpr,
    BLOCK_ROW: tl.constexpr, BLOCK_VOCAB: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (i, j): G of row tile i and column tile j, 0 beyond ``n_columns``; in two parts if there is a low one."""
    rows = tl.program_id(0) * BLOCK_ROW + tl.arange(0, BLOCK_ROW)
    columns = tl.program_id(1) * BLOCK_VOCAB + tl.arange(0, BLOCK_VOCAB)
    read_rows = tl.minimum(rows, n_rows - 1).to(tl.int64)
    if (tl.program_id(1) + 1) * BLOCK_VOCAB <= n_columns:
        raw, y_raw = tile_logits(
            x_ptr, x_low_ptr, y_ptr, y_low_ptr, w_ptr, w_low_ptr, b_ptr, read_rows, columns, d_model, n_columns,
            stride_x_row, stride_w_d, stride_w_vocab,
            False, WIDEN, ROUND_TF32, DOT, BLOCK_ROW, BLOCK_VOCAB, BLOCK_D,
        )  # fmt: skip
    else:
        raw, y_raw = tile_logits(
            x_ptr, x_low_ptr, y_ptr, y_low_ptr, w_ptr, w_low_ptr, b_ptr, read_rows, columns, d_model, n_columns,
            stride_x_row, stride_w_d, stride_w_vocab,
            True, WIDEN, ROUND_TF32, DOT, BLOCK_ROW, BLOCK_VOCAB, BLOCK_D,
        )  # fmt: skip
    logits = soft_capped(raw, softcap)
    slope = _softmax(logits, tl.load(logsumexp_ptr + read_rows)) * tl.load(q_ptr + read_rows)[:, None]
    if y_ptr is not None:
        p = _softmax(soft_capped(y_raw, softcap), tl.load(y_logsumexp_ptr + read_rows))
        slope -= p * tl.load(p_ptr + read_rows)[:, None]
    if target_ptr is not None:
        for j in range(k):
            target = tl.load(target_ptr + read_rows * k + j) - first_id
            added = tl.load(target_slope_ptr + read_rows * k + j)
            slope += tl.where(columns[None, :] == target[:, None], added[:, None], 0.0)
    if softcap is not None:
        bounded = logits / softcap
        slope *= 1.0 - bounded * bounded
    slope = tl.where(columns[None, :] < n_columns, slope, 0.0)
    out = rows.to(tl.int64)[:, None] * stride_out_row + columns[None, :]
    stored = tl.broadcast_to(rows[:, None] < n_rows, (BLOCK_ROW, BLOCK_VOCAB))
    high = (as_bf16(slope) if ROUND_BF16 else slope).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out, high, mask=stored)
    if out_low_ptr is not None:
        low = slope - high.to(tl.float32)
        tl.store(out_low_ptr + out, (as_bf16(low) if ROUND_BF16 else low).to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def _product_step(
    acc, g_ptr, g_low_ptr, w_ptr, w_low_ptr, g_offsets, w_offsets, w_mask,
    WIDEN: tl.constexpr, ROUND_TF32: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    g = load_tile(g_ptr, g_offsets, None, WIDEN, ROUND_TF32)
    w = load_tile(w_ptr, w_offsets, w_mask, WIDEN, ROUND_TF32)
    if g_low_ptr is not None:
        acc = tl.dot(load_tile(g_low_ptr, g_offsets, None, WIDEN, False), w, acc, input_precision=DOT)
    if w_low_ptr is not None:
        acc = tl.dot(g, load_tile(w_low_ptr, w_offsets, w_mask, WIDEN, False), acc, input_precision=DOT)
    return tl.dot(g, w, acc, input_precision=DOT)


@triton.jit
def add_product_kernel(
    g_ptr, g_low_ptr, w_ptr, w_low_ptr, dx_ptr, n_rows, d_model, n_columns,
    stride_g_row, stride_w_d, stride_w_vocab, stride_dx_row,
    WIDEN: tl.constexpr, ROUND_TF32: tl.constexpr, DOT: tl.constexpr,
    BLOCK_ROW: tl.constexpr, BLOCK_VOCAB: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx [row, d_model] += G [row, column] @ W [d_model, column].T"""
    rows = tl.program_id(0) * BLOCK_ROW + tl.arange(0, BLOCK_ROW)
    ds = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    vs = tl.arange(0, BLOCK_VOCAB).to(tl.int64)
    read_rows = tl.minimum(rows, n_rows - 1).to(tl.int64)
    # Beyond the last, the first ones again, which are not stored: that keeps loads wide, a mask does not.
    read_ds = (ds % d_model).to(tl.int64)
    g_offsets = read_rows[:, None] * stride_g_row + vs[None, :]
    w_offsets = vs[:, None] * stride_w_vocab + read_ds[None, :] * stride_w_d
    acc = tl.zeros((BLOCK_ROW, BLOCK_D), dtype=tl.float32)
    n_whole = n_columns // BLOCK_VOCAB * BLOCK_VOCAB
    for start in range(0, n_whole, BLOCK_VOCAB):
        g_step = tl.cast(start, tl.int64)
        w_step = tl.cast(start, tl.int64) * stride_w_vocab
        acc = _product_step(
            acc, g_ptr + g_step, None if g_low_ptr is None else g_low_ptr + g_step,
            w_ptr + w_step, None if w_low_ptr is None else w_low_ptr + w_step,
            g_offsets, w_offsets, None, WIDEN, ROUND_TF32, DOT,
        )  # fmt: skip
    if n_whole < n_columns:
        g_step = tl.cast(n_whole, tl.int64)
        w_step = tl.cast(n_whole, tl.int64) * stride_w_vocab
        w_mask = tl.broadcast_to(vs[:, None] < n_columns - n_whole, (BLOCK_VOCAB, BLOCK_D))
        acc = _product_step(
            acc, g_ptr + g_step, None if g_low_ptr is None else g_low_ptr + g_step,
            w_ptr + w_step, None if w_low_ptr is None else w_low_ptr + w_step,
            g_offsets, w_offsets, w_mask, WIDEN, ROUND_TF32, DOT,
        )  # fmt: skip
    out = rows.to(tl.int64)[:, None] * stride_dx_row + ds[None, :]
    stored = (rows[:, None] < n_rows) & (ds[None, :] < d_model)
    acc += tl.load(dx_ptr + out, mask=stored, other=0.0)
    tl.store(dx_ptr + out, acc, mask=stored)


@dataclass(frozen=True, kw_only=True)
class BackwardTilings:
    """``slope`` for the kernel that stores G; ``product`` for the one that multiplies it."""

    slope: Tiling
    product: Tiling


def default_product_tiling(dtype: torch.dtype, precision: Precision) -> Tiling:
    """The tile sizes of ``add_product_kernel`` for ``W_U`` and G of this dtype."""
    if INTERPRETED:
        return Tiling(row=256, vocab=2048, d_model=256, num_warps=1, num_stages=1)
    if dtype == torch.float32 and precision == "exact":
        return Tiling(row=128, vocab=16, d_model=64, num_warps=8, num_stages=2)
    if dtype == torch.float32 and precision in ("tf32", "bf16x3"):
        return Tiling(row=128, vocab=32, d_model=128, num_warps=8, num_stages=3)
    return Tiling(row=128, vocab=64, d_model=128, num_warps=8, num_stages=3)


class _Product(NamedTuple):
    """How G and W_U are multiplied: not as the logits are where that needs another layout or loses range."""

    dtype: torch.dtype
    precision: Precision
    along: Literal["vocab"] | None
    shared: bool  # whether the slab that the logits were made from serves here too


def _product_of(problem: Problem) -> _Product:
    dtype = operand_dtype(problem)
    if dtype == torch.float16:  # G reaches below the range of float16
        return _Product(torch.float32, "bf16x3", None, False)
    if dtype == torch.float32 and problem.precision == "tf32":
        return _Product(dtype, "tf32", "vocab", False)
    return _Product(dtype, problem.precision, None, True)


def backward_triton(problem: Problem, slopes: Slopes, *, tilings: BackwardTilings | None = None) -> Tensor:
    """The gradient with respect to ``x`` on a CUDA device, summed in float32, in the dtype of ``x``.

    G is rounded like the other operands: to two bfloat16 parts with ``bf16x3`` and for float16 operands, to
    bfloat16 with ``bf16`` and for bfloat16 operands. The same sums in every run. Memory beyond ``forward_triton``:
    ``SLOPE_BYTES``, and for an ``x`` in a reduced dtype float32 sums of ``BLOCK_BYTES``.
    """
    x = problem.x
    product = _product_of(problem)
    tilings = tilings or BackwardTilings(
        slope=default_tiling(operand_dtype(problem), problem.precision, kl=slopes.p is not None),
        product=default_product_tiling(product.dtype, product.precision),
    )
    dx = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    max_rows = max(128, BLOCK_BYTES // max(1, x.shape[1] * 4) // 128 * 128)
    if slopes.p is None:
        problem = problem._replace(kl_from=None)
    with launch_device(x):
        for block in row_blocks(problem, tilings.slope.d_model, max_rows=max_rows):
            sums = dx[block.rows].float()  # itself, if it is float32
            own = rows_of_slopes(slopes, block.rows)
            slabs = weight_slabs(
                problem.W_U, operand_dtype(problem), problem.precision,
                d_multiple=tilings.slope.d_model, n_bytes=SLAB_BYTES // 2,
            )  # fmt: skip
            for slab in slabs:
                _add_slab_(sums, problem, block, own, slab, product, tilings)
            if sums.dtype != dx.dtype:
                dx[block.rows] = sums
    return dx


def _add_slab_(
    dx: Tensor, problem: Problem, block: Block, slopes: Slopes, slab: Slab, product: _Product, tilings: BackwardTilings
) -> None:
    """Add to dx what the columns of a slab contribute, one stretch after the other."""
    split = product.dtype == torch.float32 and product.precision == "bf16x3"
    narrow = split or product.dtype == torch.bfloat16 or product.precision == "bf16"
    n_bytes = 4 if split or not narrow else 2
    unit = max(tilings.slope.vocab, tilings.product.vocab, 128)
    step = max(unit, SLOPE_BYTES // (block.n_rows * n_bytes) // unit * unit)
    step = min(step, -(-slab.W.shape[1] // unit) * unit)
    shape, dtype = (1 + split, block.n_rows, step), torch.bfloat16 if narrow else torch.float32
    # What the multiplication reads beyond the last column meets a weight of 0, and must not be NaN.
    G = torch.zeros(shape, dtype=dtype, device=dx.device)
    for column in range(0, slab.W.shape[1], step):
        W = slab.W[:, column : column + step]
        W_low = None if slab.low is None else slab.low[:, column : column + step]
        first = slab.first + column
        _store_slopes(problem, block, slopes, Slab(first, W, W_low), G, tilings.slope)
        if product.shared:
            _add_product_(dx, G, Slab(0, W, W_low), product.precision, tilings.product)
            continue
        part = problem.W_U[:, first : first + W.shape[1]]
        for own in weight_slabs(
            part, product.dtype, product.precision, along=product.along, n_bytes=SLAB_BYTES // 2
        ):  # fmt: skip
            _add_product_(dx, G[:, :, own.first :], own, product.precision, tilings.product)


def _store_slopes(
    problem: Problem, block: Block, slopes: Slopes, slab: Slab, G: Tensor, tiling: Tiling
) -> None:  # fmt: skip
    first, W, W_low = slab
    n_columns = W.shape[1]
    targets = None if slopes.target is None else problem.targets[block.rows].to(torch.int32).contiguous()
    slope_kernel[(triton.cdiv(block.n_rows, tiling.row), triton.cdiv(n_columns, tiling.vocab))](
        block.x, block.x_low, block.y, block.y_low, W, W_low,
        None if problem.b_U is None else problem.b_U[first : first + n_columns].contiguous(),
        slopes.q, slopes.p, slopes.logsumexp, slopes.kl_logsumexp, targets, slopes.target,
        G[0], G[1] if len(G) == 2 else None, block.n_rows, W.shape[0], n_columns, first, problem.targets.shape[1],
        block.x.stride(0), W.stride(0), W.stride(1), G.stride(1), problem.softcap,
        ROUND_BF16=INTERPRETED and G.dtype == torch.bfloat16, **tile_options(problem, block.x, W, tiling),
    )  # fmt: skip


def _add_product_(dx: Tensor, G: Tensor, slab: Slab, precision: Precision, tiling: Tiling) -> None:
    W, W_low = slab.W, slab.low
    (n_rows, d_model), n_columns = dx.shape, W.shape[1]
    add_product_kernel[(triton.cdiv(n_rows, tiling.row), triton.cdiv(d_model, tiling.d_model))](
        G[0], G[1] if len(G) == 2 else None, W, W_low, dx, n_rows, d_model, n_columns,
        G.stride(1), W.stride(0), W.stride(1), dx.stride(0),
        WIDEN=INTERPRETED or G.dtype != W.dtype,
        ROUND_TF32=INTERPRETED and precision == "tf32",
        DOT=dot_precision(precision),
        BLOCK_ROW=tiling.row, BLOCK_VOCAB=tiling.vocab, BLOCK_D=tiling.d_model,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
