"""``linear_cross_entropy`` in Triton, forward: logits live in registers, reductions of them are stored.

A program reduces one tile of rows over one chunk of the vocabulary, so that few rows fill a GPU too; the partial
results, ``[chunk, row]``, are combined in torch. ``W_U`` may come in slabs (see ``weight_slabs``): a program
then goes on with what it stored for the slab before.
"""
# Triton types the arguments of a kernel itself, at each call.
# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastinterp_kernels.common import IGNORED, finite_or_zero, target_logits
from fastinterp_kernels.linear_cross_entropy.gradient import Problem
from fastinterp_kernels.linear_cross_entropy.reference import LinearCrossEntropy
from fastinterp_kernels.linear_cross_entropy.triton_tiles import (
    Block,
    default_tiling,
    operand_dtype,
    register_limit,
    row_blocks,
    soft_capped,
    tile_logits,
    tile_options,
)
from fastinterp_kernels.triton_common import (
    LOG2_E,
    PROGRAMS,
    SLAB_BYTES,
    Tiling,
    check_triton,
    launch_device,
    weight_slabs,
)
from fastinterp_kernels.triton_common import finite_or_zero as finite_or_zero_

_NO_ID = tl.constexpr(2147483647)


@triton.jit
def _count_larger(
    raw, ids, rows, in_range, target_ptr, threshold_ptr, count_ptr, k, BLOCK_ROW: tl.constexpr
):  # fmt: skip
    """Add to ``count [row, k]`` how many logits exceed each threshold, the target's own aside."""
    for j in range(k):
        entries = rows * k + j
        threshold = tl.load(threshold_ptr + entries)
        target = tl.load(target_ptr + entries)
        larger = (raw > threshold[:, None]) & (ids[None, :] != target[:, None])
        tl.atomic_add(count_ptr + entries, tl.sum(larger.to(tl.int32), axis=1), mask=in_range, sem="relaxed")


@triton.jit
def _reduce_tile(
    raw, y_raw, ids, rows, in_range, softcap, target_ptr, threshold_ptr, count_ptr, k,
    maximum, total, best, best_id, y_maximum, y_total, cross, n_ids,
    MASK_VOCAB: tl.constexpr, TOP1: tl.constexpr, KL: tl.constexpr, BLOCK_ROW: tl.constexpr,
):  # fmt: skip
    """The state after one more tile of logits."""
    raw_maximum = tl.max(raw, axis=1)
    if count_ptr is not None:
        _count_larger(raw, ids, rows, in_range, target_ptr, threshold_ptr, count_ptr, k, BLOCK_ROW)
    if TOP1:
        # Elementwise, then a minimum: cheaper than a reduction that carries indices, and the lowest of equals.
        tile_best = tl.min(tl.where(raw == raw_maximum[:, None], ids[None, :], _NO_ID), axis=1)
        best_id = tl.where(raw_maximum > best, tile_best, best_id)
        best = tl.maximum(best, raw_maximum)
    logits = soft_capped(raw, softcap)
    if softcap is not None and MASK_VOCAB:
        logits = tl.where(ids[None, :] < n_ids, logits, float("-inf"))
    new_maximum = tl.maximum(maximum, soft_capped(raw_maximum, softcap))
    shift = finite_or_zero_(new_maximum)
    added = tl.sum(tl.exp2((logits - shift[:, None]) * LOG2_E), axis=1)
    total = total * tl.exp2((maximum - shift) * LOG2_E) + added
    maximum = new_maximum
    if KL:
        y_logits = soft_capped(y_raw, softcap)
        if softcap is not None and MASK_VOCAB:
            y_logits = tl.where(ids[None, :] < n_ids, y_logits, float("-inf"))
        new_maximum = tl.maximum(y_maximum, tl.max(y_logits, axis=1))
        shift = finite_or_zero_(new_maximum)
        weights = tl.exp2((y_logits - shift[:, None]) * LOG2_E)
        scale = tl.exp2((y_maximum - shift) * LOG2_E)
        y_total = y_total * scale + tl.sum(weights, axis=1)
        # A token of weight 0 adds nothing, also where both logits are -inf (whose difference is NaN).
        difference = tl.where(weights == 0.0, 0.0, y_logits) - tl.where(weights == 0.0, 0.0, logits)
        cross = cross * scale + tl.sum(weights * difference, axis=1)
        y_maximum = new_maximum
    return maximum, total, best, best_id, y_maximum, y_total, cross


@triton.jit
def reduce_logits_kernel(
    x_ptr, x_low_ptr, y_ptr, y_low_ptr, w_ptr, w_low_ptr, b_ptr,
    maximum_ptr, total_ptr, best_ptr, best_id_ptr, y_maximum_ptr, y_total_ptr, cross_ptr,
    target_ptr, threshold_ptr, count_ptr,
    n_rows, d_model, n_columns, first_id, chunk_columns, k,
    stride_x_row, stride_w_d, stride_w_vocab, softcap,
    WIDEN: tl.constexpr, ROUND_TF32: tl.constexpr, DOT: tl.constexpr,
    BLOCK_ROW: tl.constexpr, BLOCK_VOCAB: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (i, j): reductions of row tile i over chunk j of the slab, on top of those of earlier slabs."""
    # Programs side by side share a vocabulary chunk, which then comes from L2 for all but the first.
    rows = tl.program_id(0) * BLOCK_ROW + tl.arange(0, BLOCK_ROW)
    chunk = tl.program_id(1)
    in_range = rows < n_rows
    # Rows beyond the last read the last one again and are not stored: cheaper than a mask on every load.
    read_rows = tl.minimum(rows, n_rows - 1).to(tl.int64)
    state = tl.cast(chunk, tl.int64) * n_rows + read_rows
    maximum = tl.load(maximum_ptr + state)
    total = tl.load(total_ptr + state)
    best = maximum
    best_id = rows
    y_maximum = maximum
    y_total = total
    cross = total
    TOP1: tl.constexpr = best_ptr is not None
    KL: tl.constexpr = y_ptr is not None
    if TOP1:
        best = tl.load(best_ptr + state)
        best_id = tl.load(best_id_ptr + state)
    if KL:
        y_maximum = tl.load(y_maximum_ptr + state)
        y_total = tl.load(y_total_ptr + state)
        cross = tl.load(cross_ptr + state)
    first = chunk * chunk_columns
    n_own = tl.maximum(tl.minimum(chunk_columns, n_columns - first), 0)
    n_whole_tiles = n_own // BLOCK_VOCAB
    n_ids = first_id + n_columns
    for tile in range(n_whole_tiles):
        columns = first + tile * BLOCK_VOCAB + tl.arange(0, BLOCK_VOCAB)
        raw, y_raw = tile_logits(
            x_ptr, x_low_ptr, y_ptr, y_low_ptr, w_ptr, w_low_ptr, b_ptr, read_rows, columns, d_model, n_columns,
            stride_x_row, stride_w_d, stride_w_vocab,
            False, WIDEN, ROUND_TF32, DOT, BLOCK_ROW, BLOCK_VOCAB, BLOCK_D,
        )  # fmt: skip
        maximum, total, best, best_id, y_maximum, y_total, cross = _reduce_tile(
            raw, y_raw, first_id + columns, read_rows, in_range, softcap, target_ptr, threshold_ptr, count_ptr, k,
            maximum, total, best, best_id, y_maximum, y_total, cross, n_ids, False, TOP1, KL, BLOCK_ROW,
        )  # fmt: skip
    if n_whole_tiles * BLOCK_VOCAB < n_own:
        columns = first + n_whole_tiles * BLOCK_VOCAB + tl.arange(0, BLOCK_VOCAB)
        raw, y_raw = tile_logits(
            x_ptr, x_low_ptr, y_ptr, y_low_ptr, w_ptr, w_low_ptr, b_ptr, read_rows, columns, d_model, n_columns,
            stride_x_row, stride_w_d, stride_w_vocab,
            True, WIDEN, ROUND_TF32, DOT, BLOCK_ROW, BLOCK_VOCAB, BLOCK_D,
        )  # fmt: skip
        maximum, total, best, best_id, y_maximum, y_total, cross = _reduce_tile(
            raw, y_raw, first_id + columns, read_rows, in_range, softcap, target_ptr, threshold_ptr, count_ptr, k,
            maximum, total, best, best_id, y_maximum, y_total, cross, n_ids, True, TOP1, KL, BLOCK_ROW,
        )  # fmt: skip
    tl.store(maximum_ptr + state, maximum, mask=in_range)
    tl.store(total_ptr + state, total, mask=in_range)
    if TOP1:
        tl.store(best_ptr + state, best, mask=in_range)
        tl.store(best_id_ptr + state, best_id, mask=in_range)
    if KL:
        tl.store(y_maximum_ptr + state, y_maximum, mask=in_range)
        tl.store(y_total_ptr + state, y_total, mask=in_range)
        tl.store(cross_ptr + state, cross, mask=in_range)


@triton.jit
def diagonal_kernel(
    x_ptr, x_low_ptr, w_ptr, w_low_ptr, b_ptr, out_ptr, n_rows, d_model, stride_x_row, stride_w_d, stride_w_vocab,
    stride_out, WIDEN: tl.constexpr, ROUND_TF32: tl.constexpr, DOT: tl.constexpr,
    BLOCK_ROW: tl.constexpr, BLOCK_VOCAB: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The logit of row t for column t of as many columns, by the arithmetic of a whole tile: equals stay equal."""
    rows = tl.program_id(0) * BLOCK_ROW + tl.arange(0, BLOCK_ROW)
    read_rows = tl.minimum(rows, n_rows - 1).to(tl.int64)
    found = tl.zeros((BLOCK_ROW,), dtype=tl.float32)
    for start in range(0, BLOCK_ROW, BLOCK_VOCAB):
        columns = tl.program_id(0) * BLOCK_ROW + start + tl.arange(0, BLOCK_VOCAB)
        logits, _ = tile_logits(
            x_ptr, x_low_ptr, None, None, w_ptr, w_low_ptr, b_ptr, read_rows, columns, d_model, n_rows,
            stride_x_row, stride_w_d, stride_w_vocab,
            True, WIDEN, ROUND_TF32, DOT, BLOCK_ROW, BLOCK_VOCAB, BLOCK_D,
        )  # fmt: skip
        found += tl.sum(tl.where(rows[:, None] == columns[None, :], logits, 0.0), axis=1)
    tl.store(out_ptr + rows.to(tl.int64) * stride_out, found, mask=rows < n_rows)


def forward_triton(problem: Problem, *, tiling: Tiling | None = None) -> tuple[LinearCrossEntropy, Tensor | None]:
    """The results on a CUDA device: float32 sums, float32 results; exact target logits in every precision.

    Memory beyond inputs and results: a slab of ``W_U`` and a block of rows where those are rounded, split or
    copied, and up to seven numbers per row and vocabulary chunk. Ranks of k targets compare every logit k times.

    Raises ``ValueError`` for tensors that are not on a CUDA device (unless Python started with
    ``TRITON_INTERPRET=1``) and for float64.
    """
    x, W_U, targets, b_U, kl_from, softcap, rank, top1, precision = problem
    check_triton(*(t for t in (x, W_U, kl_from) if t is not None))
    n_rows, kl = x.shape[0], kl_from is not None
    tiling = tiling or default_tiling(operand_dtype(problem), precision, ids=rank or top1, kl=kl)
    logsumexp = x.new_full((n_rows,), float("-inf"), dtype=torch.float32)
    y_logsumexp, divergence = (torch.empty_like(logsumexp) for _ in range(2)) if kl else (None, None)
    best = torch.zeros(n_rows, dtype=torch.long, device=x.device) if top1 else None
    count = torch.zeros(targets.shape, dtype=torch.int32, device=x.device) if rank else None
    for block in row_blocks(problem, tiling.d_model):
        state = _reduce_block(problem, block, None if count is None else count[block.rows], tiling)
        maximum, total = state["maximum"], state["total"]
        logsumexp[block.rows], _ = _combined(maximum, total)
        if best is not None:
            ids = state["best_id"].masked_fill(state["best"] < state["best"].amax(0), 2**31 - 1).amin(0)
            best[block.rows] = ids
        if y_logsumexp is not None and divergence is not None:
            y_logsumexp[block.rows], shares = _combined(state["y_maximum"], state["y_total"])
            crossed = (state["cross"] * shares).sum(0) / (state["y_total"] * shares).sum(0)
            divergence[block.rows] = crossed - y_logsumexp[block.rows] + logsumexp[block.rows]
    nan = logsumexp.isnan()
    out = LinearCrossEntropy(
        target_logits(x, W_U, targets, b_U, softcap),
        logsumexp,
        None if count is None else count.long().masked_fill_((targets == IGNORED) | nan[:, None], -1),
        None if best is None else best.masked_fill_(nan, -1),
        None if divergence is None else divergence.clamp_min(0.0),
    )
    return out, y_logsumexp


def _combined(maximum: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """The logsumexp over chunks ``[chunk, row]``, and the factor that brings each chunk to a common shift."""
    shift = finite_or_zero(maximum.amax(0))
    shares = (maximum - shift).exp()
    return (total * shares).sum(0).log() + shift, shares


def _reduce_block(problem: Problem, block: Block, count: Tensor | None, tiling: Tiling) -> dict[str, Tensor]:
    """The partial reductions ``[chunk, row]`` of a block of rows; ``count`` is added to."""
    W_U, b_U = problem.W_U, None if problem.b_U is None else problem.b_U.contiguous()
    n_row_tiles = triton.cdiv(block.n_rows, tiling.row)
    state: dict[str, Tensor] = {}
    targets = thresholds = None
    if count is not None:
        targets = problem.targets[block.rows].to(torch.int32).contiguous()
        thresholds = _thresholds(problem, block, tiling)
    with launch_device(problem.x):
        slabs = weight_slabs(
            W_U, operand_dtype(problem), problem.precision, d_multiple=tiling.d_model, n_bytes=SLAB_BYTES
        )
        for first, W, W_low in slabs:
            n_tiles = triton.cdiv(W.shape[1], tiling.vocab)
            if not state:  # the first slab, the widest, fixes the number of chunks
                state = _empty_state(problem, block, min(n_tiles, triton.cdiv(PROGRAMS, n_row_tiles)))
            n_chunks = len(state["total"])
            limit = register_limit(
                operand_dtype(problem), problem.precision, ids=count is not None or problem.top1,
                kl=block.y is not None, along_d=W.stride(0) == 1,
            )  # fmt: skip
            reduce_logits_kernel[(n_row_tiles, n_chunks)](
                block.x, block.x_low, block.y, block.y_low, W, W_low,
                None if b_U is None else b_U[first : first + W.shape[1]],
                state["maximum"], state["total"], state.get("best"), state.get("best_id"),
                state.get("y_maximum"), state.get("y_total"), state.get("cross"), targets, thresholds, count,
                block.n_rows, W.shape[0], W.shape[1], first, triton.cdiv(n_tiles, n_chunks) * tiling.vocab,
                problem.targets.shape[1], block.x.stride(0), W.stride(0), W.stride(1), problem.softcap,
                **tile_options(problem, block.x, W, tiling), maxnreg=limit,
            )  # fmt: skip
    return state


def _empty_state(problem: Problem, block: Block, n_chunks: int) -> dict[str, Tensor]:
    def full(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((n_chunks, block.n_rows), value, dtype=dtype, device=problem.x.device)

    lowest = float("-inf")
    state = {"maximum": full(lowest), "total": full(0.0)}
    if problem.top1:
        state |= {"best": full(lowest), "best_id": full(0, torch.int32)}
    if block.y is not None:
        state |= {"y_maximum": full(lowest), "y_total": full(0.0), "cross": full(0.0)}
    return state


def _thresholds(problem: Problem, block: Block, tiling: Tiling) -> Tensor:
    """Logits of the targets before the softcap, rounded as in a tile: ``[row, k]``."""
    d_model, targets = problem.x.shape[1], problem.targets[block.rows].clamp_min(0)
    out = torch.empty(targets.shape, dtype=torch.float32, device=problem.x.device)
    step = max(tiling.row, SLAB_BYTES // 8 // (4 * d_model) // tiling.row * tiling.row)
    for row in range(0, block.n_rows, step):
        rows = slice(row, row + step)
        x, x_low = block.x[rows], None if block.x_low is None else block.x_low[rows]
        for j, ids in enumerate(targets[rows].T):
            columns = problem.W_U.index_select(1, ids)
            slabs = weight_slabs(
                columns, operand_dtype(problem), problem.precision, d_multiple=tiling.d_model,
                n_bytes=8 * (d_model + tiling.d_model) * (len(ids) + 128),  # all of them in one slab
            )  # fmt: skip
            for _, W, W_low in slabs:
                diagonal_kernel[(triton.cdiv(len(ids), tiling.row),)](
                    x, x_low, W, W_low, None if problem.b_U is None else problem.b_U[ids], out[rows, j:],
                    len(ids), W.shape[0], x.stride(0), W.stride(0), W.stride(1), out.stride(0),
                    **tile_options(problem, x, W, tiling),
                )  # fmt: skip
    return out
