"""What the kernels of ``linear_cross_entropy`` share: one tile of logits, and operands made ready for it.

Offsets are int64: ``d_model * d_vocab`` passes 2^31 for large models.
"""
# Triton types the arguments of a kernel itself, at each call.
# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastinterp_kernels.common import Precision
from fastinterp_kernels.linear_cross_entropy.gradient import Problem
from fastinterp_kernels.triton_common import (
    INTERPRETED,
    LOG2_E,
    Tiling,
    dot_precision,
    load_tile,
    split_bf16,
)

BLOCK_BYTES = 16 * 2**20
"""Size of the rows of x and kl_from that are rounded, split or copied at a time, and of float32 sums of dx."""


@triton.jit
def tile_logits(
    x_ptr, x_low_ptr, y_ptr, y_low_ptr, w_ptr, w_low_ptr, b_ptr, rows, columns, d_model, n_columns,
    stride_x_row, stride_w_d, stride_w_vocab,
    MASK_VOCAB: tl.constexpr, WIDEN: tl.constexpr, ROUND_TF32: tl.constexpr,
    DOT: tl.constexpr, BLOCK_ROW: tl.constexpr, BLOCK_VOCAB: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Logits of x, and of y unless ``y_ptr`` is None, before the softcap; -inf beyond the vocabulary.

    ``d_model`` is a multiple of ``BLOCK_D``.
    """
    acc = tl.zeros((BLOCK_ROW, BLOCK_VOCAB), dtype=tl.float32)
    y_acc = tl.zeros((BLOCK_ROW, BLOCK_VOCAB), dtype=tl.float32)
    ds = tl.arange(0, BLOCK_D).to(tl.int64)
    x_offsets = rows[:, None] * stride_x_row + ds[None, :]
    w_offsets = ds[:, None] * stride_w_d + columns.to(tl.int64)[None, :] * stride_w_vocab
    for start in range(0, d_model, BLOCK_D):
        # A mask only where a tile is ragged: the compiler makes no asynchronous copies of masked loads.
        w_mask = tl.broadcast_to(columns[None, :] < n_columns, (BLOCK_D, BLOCK_VOCAB)) if MASK_VOCAB else None
        x_step = tl.cast(start, tl.int64)
        w_step = tl.cast(start, tl.int64) * stride_w_d
        w = load_tile(w_ptr + w_step, w_offsets, w_mask, WIDEN, ROUND_TF32)
        x = load_tile(x_ptr + x_step, x_offsets, None, WIDEN, ROUND_TF32)
        # The product of two low parts, 2^-16 of the whole, is left out. Small terms first.
        if x_low_ptr is not None:
            x_low = load_tile(x_low_ptr + x_step, x_offsets, None, WIDEN, False)
            acc = tl.dot(x_low, w, acc, input_precision=DOT)
        if w_low_ptr is not None:
            w_low = load_tile(w_low_ptr + w_step, w_offsets, w_mask, WIDEN, False)
            acc = tl.dot(x, w_low, acc, input_precision=DOT)
        acc = tl.dot(x, w, acc, input_precision=DOT)
        if y_ptr is not None:
            y = load_tile(y_ptr + x_step, x_offsets, None, WIDEN, ROUND_TF32)
            if y_low_ptr is not None:
                y_low = load_tile(y_low_ptr + x_step, x_offsets, None, WIDEN, False)
                y_acc = tl.dot(y_low, w, y_acc, input_precision=DOT)
            if w_low_ptr is not None:
                y_acc = tl.dot(y, w_low, y_acc, input_precision=DOT)
            y_acc = tl.dot(y, w, y_acc, input_precision=DOT)
    if b_ptr is not None:
        b = tl.load(b_ptr + columns, mask=columns < n_columns, other=0.0).to(tl.float32)[None, :]
        acc += b
        y_acc += b
    if MASK_VOCAB:
        acc = tl.where(columns[None, :] < n_columns, acc, float("-inf"))
        y_acc = tl.where(columns[None, :] < n_columns, y_acc, float("-inf"))
    return acc, y_acc


@triton.jit
def soft_capped(x, softcap):
    """softcap * tanh(x / softcap), without a tanh; x where ``softcap`` is None."""
    if softcap is None:
        return x
    else:
        return softcap - 2.0 * softcap / (1.0 + tl.exp2(x * (2.0 * LOG2_E / softcap)))


class Block(NamedTuple):
    """Some rows of x and kl_from, contiguous and in the dtype that is multiplied; ``low`` with ``bf16x3``."""

    rows: slice
    x: Tensor
    x_low: Tensor | None
    y: Tensor | None
    y_low: Tensor | None

    @property
    def n_rows(self) -> int:
        return self.x.shape[0]


def operand_dtype(problem: Problem) -> torch.dtype:
    """The dtype of the operands; of different ones float32, to which they are widened in registers."""
    operands = [t for t in (problem.x, problem.W_U, problem.kl_from) if t is not None]
    return problem.x.dtype if len({t.dtype for t in operands}) == 1 else torch.float32


def row_blocks(problem: Problem, d_multiple: int, *, max_rows: int | None = None) -> Iterator[Block]:
    """The rows in blocks whose copies take at most ``BLOCK_BYTES``; all at once where none has to be made.

    ``d_model`` is padded with zeros to a multiple of ``d_multiple``.
    """
    x, y = problem.x, problem.kl_from
    dtype = x.dtype if y is None else torch.promote_types(x.dtype, y.dtype)
    narrow = operand_dtype(problem) == torch.float32 and problem.precision in ("bf16", "bf16x3")
    narrow &= dtype != torch.bfloat16
    n_d = -(-x.shape[1] // d_multiple) * d_multiple
    usable = [t.dtype == dtype and t.is_contiguous() and n_d == t.shape[1] for t in (x, y) if t is not None]
    step = x.shape[0] if max_rows is None else max_rows
    if narrow or not all(usable):
        step = min(step, max(128, BLOCK_BYTES // (n_d * 4 * len(usable)) // 128 * 128))
    for row in range(0, x.shape[0], max(1, step)):
        rows = slice(row, min(row + step, x.shape[0]))
        parts = []
        for tensor in (x, y):
            source = None if tensor is None else tensor[rows].to(dtype).contiguous()
            if source is not None and n_d != x.shape[1]:
                source = torch.nn.functional.pad(source, (0, n_d - x.shape[1]))
            parts += list(_parts(source, problem.precision if narrow else "exact"))
        yield Block(rows, *parts)


def _parts(source: Tensor | None, precision: Precision) -> tuple[Any, Tensor | None]:
    if source is not None and precision == "bf16x3":
        return split_bf16(source)
    return (source.bfloat16() if source is not None and precision == "bf16" else source), None


def default_tiling(dtype: torch.dtype, precision: Precision, *, ids: bool = False, kl: bool = False) -> Tiling:
    """The tile sizes for operands of this dtype, chosen by registers and shared memory on sm_80 and sm_90.

    ``ids``: for ranks or best tokens too; ``kl``: for two tiles of logits.
    """
    if INTERPRETED:  # every operation of a program costs the same there: few, large tiles
        return Tiling(row=256, vocab=2048, d_model=64, num_warps=1, num_stages=1)
    if dtype != torch.float32 or precision == "bf16":
        tiling = Tiling(row=128, vocab=128, d_model=64, num_warps=8, num_stages=3)
        if ids and not kl:
            tiling = replace(tiling, d_model=32, num_stages=4)
    elif precision == "exact":
        tiling = Tiling(row=64, vocab=64, d_model=16, num_warps=8, num_stages=3)
    else:
        tiling = Tiling(row=128, vocab=128, d_model=32, num_warps=8, num_stages=3)
    return replace(tiling, row=64) if kl else tiling  # a second tile of logits needs registers


def register_limit(
    dtype: torch.dtype, precision: Precision, *, ids: bool = False, kl: bool = False, along_d: bool = False
) -> int | None:
    """Registers per thread of ``reduce_logits_kernel``; None leaves the number to the assembler.

    ``along_d``: neighbours in memory lie along ``d_model``. Exact products of these then spill 32 bytes on sm_90,
    outside of the products' loop, to come down to 128 registers; told to use no more, the assembler finds 128
    without spills.
    """
    return 128 if dtype == torch.float32 and precision == "exact" and ids and along_d and not kl else None


def tile_options(problem: Problem, x: Tensor, W: Tensor, tiling: Tiling) -> dict[str, Any]:
    """The options of a kernel that calls ``tile_logits`` on these operands."""
    return dict(
        # The interpreter multiplies bfloat16 operands as raw integers.
        WIDEN=INTERPRETED or x.dtype != W.dtype,
        ROUND_TF32=INTERPRETED and problem.precision == "tf32" and operand_dtype(problem) == torch.float32,
        DOT=dot_precision(problem.precision),
        BLOCK_ROW=tiling.row, BLOCK_VOCAB=tiling.vocab, BLOCK_D=tiling.d_model,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
        enable_fp_fusion=True,  # the default of some Triton releases and not of others
    )  # fmt: skip
