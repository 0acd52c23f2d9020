"""``linear_logprob`` in Triton: logits live in registers, one (max, sum) per row and chunk is stored.

The product is split over vocabulary chunks so that few rows fill a GPU too; the partial sums, ``[row,
chunk]``, are reduced in torch. Offsets are int64: ``d_model * d_vocab`` passes 2^31 for large models.
"""
# Triton types the arguments of a kernel itself, at each call.
# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False

import contextlib
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp_kernels.linear_logprob.blocked import compute_dtype, target_logits
from fastinterp_kernels.linear_logprob.reference import LinearLogprob

Precision = Literal["ieee", "bf16x3", "tf32"]

# Read when the kernels below are decorated, so setting the variable later changes nothing.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

_LOG2_E = tl.constexpr(1.4426950408889634)
# About four waves of two programs on each of 132 multiprocessors; an interpreted program costs a millisecond.
_PROGRAMS = 16 if INTERPRETED else 1024


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Sizes of one program's tile and how it is scheduled."""

    row: int
    vocab: int
    d_model: int
    num_warps: int
    num_stages: int


@triton.jit
def _as_tf32(tile):
    """Round float32 to tf32, 10 fraction bits: the interpreter ignores ``input_precision``."""
    return ((tile.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _load(ptr, offsets, mask, WIDEN: tl.constexpr, ROUND_TF32: tl.constexpr):
    tile = tl.load(ptr + offsets) if mask is None else tl.load(ptr + offsets, mask=mask, other=0.0)
    if WIDEN:
        tile = tile.to(tl.float32)
    if ROUND_TF32:
        tile = _as_tf32(tile)
    return tile


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
        x = _load(x_ptr + x_step, x_offsets, x_mask, WIDEN, ROUND_TF32)
        w = _load(w_ptr + w_step, w_offsets, w_mask, WIDEN, ROUND_TF32)
        if x_low_ptr is not None:
            # The product of the two low parts, 2^-16 of the whole, is left out. Small terms first.
            x_low = _load(x_low_ptr + x_step, x_offsets, x_mask, WIDEN, False)
            w_low = _load(w_low_ptr + w_step, w_offsets, w_mask, WIDEN, False)
            acc = tl.dot(x_low, w, acc, input_precision=DOT)
            acc = tl.dot(x, w_low, acc, input_precision=DOT)
        acc = tl.dot(x, w, acc, input_precision=DOT)
    if b_ptr is not None:
        acc += tl.load(b_ptr + columns, mask=columns < d_vocab, other=0.0).to(tl.float32)[None, :]
    if softcap is not None:
        # softcap * tanh(acc / softcap), without a tanh
        acc = softcap - 2.0 * softcap / (1.0 + tl.exp2(acc * (2.0 * _LOG2_E / softcap)))
    if MASK_VOCAB:
        acc = tl.where(columns[None, :] < d_vocab, acc, float("-inf"))
    return acc


@triton.jit
def _finite_or_zero(x):
    """-inf - -inf is NaN: a row of nothing but -inf (or one with +inf) is shifted by 0 instead."""
    return tl.where((x == float("-inf")) | (x == float("inf")), 0.0, x)


@triton.jit
def _accumulate(logits, maximum, total):
    new_maximum = tl.maximum(maximum, tl.max(logits, axis=1))
    shift = _finite_or_zero(new_maximum)
    added = tl.sum(tl.exp2((logits - shift[:, None]) * _LOG2_E), axis=1)
    return new_maximum, total * tl.exp2((maximum - shift) * _LOG2_E) + added


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
    if not x.is_cuda and not INTERPRETED:
        raise ValueError(
            f"backend='triton' got tensors on {x.device}; expected a CUDA device. Type backend='blocked' "
            "(or 'auto'), or move x, W_U and targets with .cuda(). To run the kernel on a CPU, slowly, for "
            "tests: start Python with TRITON_INTERPRET=1 in the environment."
        )
    if compute_dtype(x, W_U) == torch.float64:
        raise ValueError("backend='triton' got float64; it computes in float32. Type backend='blocked' or x.float().")
    return LinearLogprob(
        target_logit=target_logits(x, W_U, targets, b_U, softcap),
        logsumexp=_logsumexp(x, W_U, b_U, softcap, precision, tiling),
    )


def align_vocab(W_U: Float[Tensor, "d_model d_vocab"]) -> Float[Tensor, "d_model d_vocab"]:
    """``W_U`` where its layout allows wide loads, otherwise a view of a copy with rows padded to 128 columns.

    Wide loads need one stride of 1 and the other a multiple of 16 elements, the unit that Triton specialises
    on.
    """
    strides = W_U.stride()
    if 1 in strides and max(strides) % 16 == 0:
        return W_U
    d_model, d_vocab = W_U.shape
    padded = torch.empty((d_model, -(-d_vocab // 128) * 128), dtype=W_U.dtype, device=W_U.device)
    return padded[:, :d_vocab].copy_(W_U)


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


def _split_bf16(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """bfloat16 parts whose sum has 16 fraction bits, in the layout of ``tensor``."""
    high = torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.bfloat16, device=tensor.device)
    high.copy_(tensor)
    low = torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.bfloat16, device=tensor.device)
    return high, low.copy_(tensor - high)


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
        (x, x_low), (W_U, W_low) = _split_bf16(x.float()), _split_bf16(W_U.float())
    n_row_tiles, n_tiles = triton.cdiv(n_rows, tiling.row), triton.cdiv(d_vocab, tiling.vocab)
    n_chunks = min(n_tiles, triton.cdiv(_PROGRAMS, n_row_tiles))
    chunk_columns = triton.cdiv(n_tiles, n_chunks) * tiling.vocab
    n_chunks = triton.cdiv(d_vocab, chunk_columns)
    maximum = torch.empty((n_rows, n_chunks), dtype=torch.float32, device=x.device)
    total = torch.empty_like(maximum)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
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
