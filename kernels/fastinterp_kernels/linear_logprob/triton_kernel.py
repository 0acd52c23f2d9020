"""``linear_logprob`` in Triton: logits live in registers, one (max, sum) per row and chunk is stored.

The product is split over vocabulary chunks so that few rows fill a GPU too; the partial sums, ``[row,
chunk]``, are reduced in torch. Offsets are int64: ``d_model * d_vocab`` passes 2^31 for large models.
"""
# Triton types the arguments of a kernel itself, at each call.
# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False

from dataclasses import replace
from typing import Literal, get_args

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp_kernels.common import target_logits
from fastinterp_kernels.linear_logprob.reference import LinearLogprob
from fastinterp_kernels.triton_common import (
    INTERPRETED,
    LOG2_E,
    PROGRAMS,
    Tiling,
    align_vocab,
    check_triton,
    finite_or_zero,
    launch_device,
    load_tile,
    split_bf16,
)

Precision = Literal["ieee", "bf16x3", "tf32"]


@triton.jit
def _tile_logits(
    x_ptr, x_low_ptr, w_ptr, w_low_ptr, b_ptr, rows, columns, d_model, d_vocab,
    stride_x_row, stride_x_d, stride_w_d, stride_w_vocab, softcap,
    MASK_VOCAB: tl.constexpr, MASK_D: tl.constexpr, WIDEN: tl.constexpr, ROUND_TF32: tl.constexpr,
    DOT: tl.constexpr, BLOCK_ROW: tl.constexpr, BLOCK_VOCAB: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Softcapped logits of one tile, -inf beyond the vocabulary."""
    acc = tl.zeros((BLOCK_ROW, BLOCK_VOCAB), dtype=tl.float32)
    ds = tl.arange(0, BLOCK_D).to(tl.int64)
    x_offsets = rows[:, None] * stride_x_row + ds[None, :] * stride_x_d
    w_offsets = ds[:, None] * stride_w_d + columns.to(tl.int64)[None, :] * stride_w_vocab
    for start in range(0, d_model, BLOCK_D):
        # Masks only where a tile is ragged: the compiler makes no asynchronous copies of masked loads.
        if MASK_D:
            x_mask = tl.broadcast_to(ds[None, :] < d_model - start, (BLOCK_ROW, BLOCK_D))
            w_mask = (ds[:, None] < d_model - start) & (columns[None, :] < d_vocab)
        elif MASK_VOCAB:
            x_mask = None
            w_mask = tl.broadcast_to(columns[None, :] < d_vocab, (BLOCK_D, BLOCK_VOCAB))
        else:
            x_mask = None
            w_mask = None
        x_step = tl.cast(start, tl.int64) * stride_x_d
        w_step = tl.cast(start, tl.int64) * stride_w_d
        x = load_tile(x_ptr + x_step, x_offsets, x_mask, WIDEN, ROUND_TF32)
        w = load_tile(w_ptr + w_step, w_offsets, w_mask, WIDEN, ROUND_TF32)
        if x_low_ptr is not None:
            # The product of the two low parts, 2^-16 of the whole, is left out. Small terms first.
            x_low = load_tile(x_low_ptr + x_step, x_offsets, x_mask, WIDEN, False)
            w_low = load_tile(w_low_ptr + w_step, w_offsets, w_mask, WIDEN, False)
            acc = tl.dot(x_low, w, acc, input_precision=DOT)
            acc = tl.dot(x, w_low, acc, input_precision=DOT)
        acc = tl.dot(x, w, acc, input_precision=DOT)
    if b_ptr is not None:
        acc += tl.load(b_ptr + columns, mask=columns < d_vocab, other=0.0).to(tl.float32)[None, :]
    if softcap is not None:
        # softcap * tanh(acc / softcap), without a tanh
        acc = softcap - 2.0 * softcap / (1.0 + tl.exp2(acc * (2.0 * LOG2_E / softcap)))
    if MASK_VOCAB:
        acc = tl.where(columns[None, :] < d_vocab, acc, float("-inf"))
    return acc


@triton.jit
def _accumulate(logits, maximum, total):
    new_maximum = tl.maximum(maximum, tl.max(logits, axis=1))
    shift = finite_or_zero(new_maximum)
    added = tl.sum(tl.exp2((logits - shift[:, None]) * LOG2_E), axis=1)
    return new_maximum, total * tl.exp2((maximum - shift) * LOG2_E) + added


@triton.jit
def partial_logsumexp_kernel(
    x_ptr, x_low_ptr, w_ptr, w_low_ptr, b_ptr, maximum_ptr, total_ptr,
    n_rows, d_model, d_vocab, chunk_columns, n_chunks,
    stride_x_row, stride_x_d, stride_w_d, stride_w_vocab, softcap,
    MASK_D: tl.constexpr, WIDEN: tl.constexpr, ROUND_TF32: tl.constexpr, DOT: tl.constexpr,
    BLOCK_ROW: tl.constexpr, BLOCK_VOCAB: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (i, j): maximum and sum of exp(logit - maximum) of row tile i over vocabulary chunk j."""
    # Programs side by side share a vocabulary chunk, which then comes from L2 for all but the first.
    rows = tl.program_id(0) * BLOCK_ROW + tl.arange(0, BLOCK_ROW)
    chunk = tl.program_id(1)
    # Rows beyond the last read the last one again and are not stored: cheaper than a mask on every load.
    read_rows = tl.minimum(rows, n_rows - 1).to(tl.int64)
    first = chunk * chunk_columns
    n_columns = tl.minimum(chunk_columns, d_vocab - first)
    n_whole_tiles = n_columns // BLOCK_VOCAB
    maximum = tl.full((BLOCK_ROW,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_ROW,), dtype=tl.float32)
    for tile in range(n_whole_tiles):
        columns = first + tile * BLOCK_VOCAB + tl.arange(0, BLOCK_VOCAB)
        logits = _tile_logits(
            x_ptr, x_low_ptr, w_ptr, w_low_ptr, b_ptr, read_rows, columns, d_model, d_vocab,
            stride_x_row, stride_x_d, stride_w_d, stride_w_vocab, softcap,
            False, MASK_D, WIDEN, ROUND_TF32, DOT, BLOCK_ROW, BLOCK_VOCAB, BLOCK_D,
        )  # fmt: skip
        maximum, total = _accumulate(logits, maximum, total)
    if n_whole_tiles * BLOCK_VOCAB < n_columns:
        columns = first + n_whole_tiles * BLOCK_VOCAB + tl.arange(0, BLOCK_VOCAB)
        logits = _tile_logits(
            x_ptr, x_low_ptr, w_ptr, w_low_ptr, b_ptr, read_rows, columns, d_model, d_vocab,
            stride_x_row, stride_x_d, stride_w_d, stride_w_vocab, softcap,
            True, MASK_D, WIDEN, ROUND_TF32, DOT, BLOCK_ROW, BLOCK_VOCAB, BLOCK_D,
        )  # fmt: skip
        maximum, total = _accumulate(logits, maximum, total)
    out = rows.to(tl.int64) * n_chunks + chunk
    tl.store(maximum_ptr + out, maximum, mask=rows < n_rows)
    tl.store(total_ptr + out, total, mask=rows < n_rows)


def linear_logprob_triton(
    x: Float[Tensor, "row d_model"],
    W_U: Float[Tensor, "d_model d_vocab"],
    targets: Int[Tensor, "row k"],
    b_U: Float[Tensor, " d_vocab"] | None = None,
    *,
    softcap: float | None = None,
    precision: Precision = "ieee",
    tiling: Tiling | None = None,
) -> LinearLogprob:
    """``linear_logprob`` on a CUDA device, with float32 accumulation and float32 results.

    ``precision`` says how float32 operands are multiplied for the logsumexp: ``"ieee"`` exactly, on the
    ordinary cores; ``"bf16x3"`` as three bfloat16 products of split operands (16 fraction bits kept);
    ``"tf32"`` with operands rounded to 10 fraction bits. bfloat16 and float16 operands are multiplied as they
    are in every mode. Target logits are float32 dot products in every mode.

    Memory beyond the inputs: two floats per row and vocabulary chunk; with ``"bf16x3"`` the size of a float32
    ``W_U`` again for its parts; and an aligned copy of ``W_U`` where ``align_vocab`` has to make one (call it
    once, ahead).

    Raises ``ValueError`` for tensors that are not on a CUDA device (unless Python started with
    ``TRITON_INTERPRET=1``), for float64 and for a precision it does not know.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision is {precision!r}; expected 'ieee', 'bf16x3' or 'tf32'.")
    check_triton(x, W_U)
    return LinearLogprob(
        target_logit=target_logits(x, W_U, targets, b_U, softcap),
        logsumexp=_logsumexp(x, W_U, b_U, softcap, precision, tiling),
    )


def default_tiling(dtype: torch.dtype, precision: Precision, d_model: int) -> Tiling:
    """The tile sizes for operands of this dtype, chosen by registers and shared memory on sm_80 and sm_90."""
    if INTERPRETED:  # every operation of a program costs the same there: few, large tiles
        return Tiling(row=256, vocab=2048, d_model=64, num_warps=1, num_stages=1)
    if dtype != torch.float32:
        tiling = Tiling(row=128, vocab=128, d_model=64, num_warps=8, num_stages=3)
    elif precision == "ieee":
        tiling = Tiling(row=128, vocab=64, d_model=16, num_warps=8, num_stages=2)
    else:
        tiling = Tiling(row=128, vocab=128, d_model=32, num_warps=8, num_stages=3)
    # Masks need registers: a d_model that is no multiple of the tile gets half the rows.
    return tiling if d_model % tiling.d_model == 0 else replace(tiling, row=64)


def _logsumexp(
    x: Tensor,
    W_U: Tensor,
    b_U: Tensor | None,
    softcap: float | None,
    precision: Precision,
    tiling: Tiling | None,
) -> Tensor:
    n_rows, d_model = x.shape
    d_vocab = W_U.shape[1]
    if n_rows == 0 or d_vocab == 0:
        return torch.full((n_rows,), float("-inf"), device=x.device)
    # Operands of different dtypes are widened to float32 tile by tile, in registers.
    dtype = x.dtype if x.dtype == W_U.dtype else torch.float32
    tiling = tiling or default_tiling(dtype, precision, d_model)
    x, W_U = x.contiguous(), align_vocab(W_U)
    x_low = W_low = None
    if precision == "bf16x3" and dtype == torch.float32:
        (x, x_low), (W_U, W_low) = split_bf16(x.float()), split_bf16(W_U.float())
    n_row_tiles, n_tiles = triton.cdiv(n_rows, tiling.row), triton.cdiv(d_vocab, tiling.vocab)
    n_chunks = min(n_tiles, triton.cdiv(PROGRAMS, n_row_tiles))
    chunk_columns = triton.cdiv(n_tiles, n_chunks) * tiling.vocab
    n_chunks = triton.cdiv(d_vocab, chunk_columns)
    maximum = torch.empty((n_rows, n_chunks), dtype=torch.float32, device=x.device)
    total = torch.empty_like(maximum)
    with launch_device(x):
        partial_logsumexp_kernel[(n_row_tiles, n_chunks)](
            x, x_low, W_U, W_low, None if b_U is None else b_U.contiguous(), maximum, total,
            n_rows, d_model, d_vocab, chunk_columns, n_chunks,
            x.stride(0), x.stride(1), W_U.stride(0), W_U.stride(1), softcap,
            MASK_D=d_model % tiling.d_model != 0,
            # The interpreter multiplies bfloat16 operands as raw integers.
            WIDEN=INTERPRETED or x.dtype != W_U.dtype,
            ROUND_TF32=INTERPRETED and precision == "tf32" and dtype == torch.float32,
            DOT="tf32" if precision == "tf32" else "ieee",
            BLOCK_ROW=tiling.row, BLOCK_VOCAB=tiling.vocab, BLOCK_D=tiling.d_model,
            num_warps=tiling.num_warps, num_stages=tiling.num_stages,
            enable_fp_fusion=True,  # the default of some Triton releases and not of others
        )  # fmt: skip
    row_maximum = maximum.amax(1)
    shift = row_maximum.masked_fill(~torch.isfinite(row_maximum), 0.0)
    return (total * (maximum - shift[:, None]).exp()).sum(1).log() + shift
