"""What the Triton kernels share: interpretation, loads that widen and round, aligned and split weights.

Import it from a ``triton_kernel.py`` only: it imports Triton.
"""
# Triton types the arguments of a kernel itself, at each call.
# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from fastinterp_kernels.common import Precision, compute_dtype

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""Whether ``TRITON_INTERPRET=1`` was set when kernels were decorated; setting it later changes nothing."""

LOG2_E = tl.constexpr(1.4426950408889634)

PROGRAMS = 16 if INTERPRETED else 1024
"""How many programs to split a launch into at least, where rows are few: about four waves of two programs on each
of 132 multiprocessors. An interpreted program costs a millisecond."""

SLAB_BYTES = 32 * 2**20
"""Size of a prepared (aligned, rounded, split) part of ``W_U``: see :func:`weight_slabs`."""


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Sizes of one program's tile and how it is scheduled."""

    row: int
    vocab: int
    d_model: int
    num_warps: int
    num_stages: int


# Inside kernels ---------------------------------------------------------------------------------------------


@triton.jit
def as_tf32(tile):
    """Round float32 to tf32, 10 fraction bits: the interpreter ignores ``input_precision``."""
    return ((tile.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def as_bf16(tile):
    """Round float32 to the nearest bfloat16 value, before a cast that the interpreter makes by cutting bits off."""
    bits = tile.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def load_tile(ptr, offsets, mask, WIDEN: tl.constexpr, ROUND_TF32: tl.constexpr):
    """Load, 0 where masked (``mask`` None: no mask), as float32 with WIDEN, rounded to tf32 with ROUND_TF32."""
    tile = tl.load(ptr + offsets) if mask is None else tl.load(ptr + offsets, mask=mask, other=0.0)
    if WIDEN:
        tile = tile.to(tl.float32)
    if ROUND_TF32:
        tile = as_tf32(tile)
    return tile


@triton.jit
def finite_or_zero(x):
    """-inf - -inf is NaN: a row of nothing but -inf (or one with +inf) is shifted by 0 instead."""
    return tl.where((x == float("-inf")) | (x == float("inf")), 0.0, x)


# Before a launch --------------------------------------------------------------------------------------------


def check_triton(*operands: Tensor) -> None:
    """Raise ``ValueError`` for operands that a kernel cannot take: not on CUDA (unless interpreted), or float64."""
    if not operands[0].is_cuda and not INTERPRETED:
        raise ValueError(
            f"backend='triton' got tensors on {operands[0].device}; expected a CUDA device. Type backend='blocked' "
            "(or 'auto'), or move every input with .cuda(). To run the kernel on a CPU, slowly, for "
            "tests: start Python with TRITON_INTERPRET=1 in the environment."
        )
    if compute_dtype(*operands) == torch.float64:
        raise ValueError("backend='triton' got float64; it computes in float32. Type backend='blocked' or x.float().")


def launch_device(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """The context in which to launch a kernel on tensors like this one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def dot_precision(precision: Precision) -> Literal["ieee", "tf32"]:
    """``input_precision`` of ``tl.dot`` for operands that were prepared for ``precision``."""
    return "tf32" if precision == "tf32" else "ieee"


def align_vocab(W_U: Float[Tensor, "d_model d_vocab"]) -> Float[Tensor, "d_model d_vocab"]:
    """``W_U`` where its layout allows wide loads, otherwise a view of a copy with rows padded to 128 columns.

    Wide loads need one stride of 1 and the other a multiple of 16 elements, the unit that Triton specialises
    on.
    """
    if is_aligned(W_U):
        return W_U
    d_model, d_vocab = W_U.shape
    padded = torch.empty((d_model, -(-d_vocab // 128) * 128), dtype=W_U.dtype, device=W_U.device)
    return padded[:, :d_vocab].copy_(W_U)


def is_aligned(W_U: Float[Tensor, "d_model d_vocab"]) -> bool:
    """Whether one stride is 1, the other a multiple of 16 elements, and the first element on 16 bytes."""
    strides = W_U.stride()
    return 1 in strides and max(strides) % 16 == 0 and W_U.data_ptr() % 16 == 0


def split_bf16_(
    high: Float[Tensor, "m ..."], low: Float[Tensor, "m ..."], source: Float[Tensor, "m ..."]
) -> tuple[Float[Tensor, "m ..."], Float[Tensor, "m ..."]]:
    """Fill two bfloat16 tensors whose sum is ``source`` to 16 fraction bits; in slices of about 1 MiB."""
    step = max(1, 2**18 * source.shape[0] // max(1, source.numel()))
    for row in range(0, source.shape[0], step):
        rows = slice(row, row + step)
        high[rows] = source[rows]
        # An infinite high part has no rest: inf - inf is NaN.
        low[rows] = (source[rows] - high[rows]).masked_fill_(~torch.isfinite(high[rows]), 0.0)
    return high, low


def split_bf16(tensor: Float[Tensor, "m ..."]) -> tuple[Float[Tensor, "m ..."], Float[Tensor, "m ..."]]:
    """Two new contiguous bfloat16 tensors as :func:`split_bf16_` fills them."""
    high, low = torch.empty((2, *tensor.shape), dtype=torch.bfloat16, device=tensor.device)
    return split_bf16_(high, low, tensor)


class Slab(NamedTuple):
    """Columns ``first`` to ``first + W.shape[1]`` of ``W_U``, ready for wide loads; ``low`` with ``bf16x3``."""

    first: int
    W: Float[Tensor, "d_model column"]
    low: Float[Tensor, "d_model column"] | None


def weight_slabs(
    W_U: Float[Tensor, "d_model d_vocab"],
    dtype: torch.dtype,
    precision: Precision,
    *,
    along: Literal["d_model", "vocab"] | None = None,
    d_multiple: int = 1,
    n_bytes: int = SLAB_BYTES,
) -> Iterator[Slab]:
    """``W_U`` for ``tl.dot``, part by part in one buffer of about ``n_bytes``, or whole where nothing must change.

    ``dtype`` is the operands' common one. float32 operands are rounded (``bf16``) or split (``bf16x3``); others
    are only aligned. ``along``: the axis along which neighbours must lie; None takes what comes, but ``d_model``
    for ``tf32``. (Hopper's tensor cores read tf32 only along the axis that is summed over, and any other
    order is copied 4 bytes at a time.) ``d_multiple``: rows of zeros are added up to a multiple of it. A slab
    is valid until the next one is asked for. It is never narrower than 128 columns; its columns beyond
    ``d_vocab``, if read, hold zeros.
    """
    narrow = dtype == torch.float32 and W_U.dtype != torch.bfloat16 and precision in ("bf16", "bf16x3")
    if along is None and dtype == torch.float32 and precision == "tf32":
        along = "d_model"
    usable = is_aligned(W_U) and W_U.shape[0] % d_multiple == 0
    if usable and not narrow and (along is None or W_U.stride(0 if along == "d_model" else 1) == 1):
        yield Slab(0, W_U, None)
        return
    d_model, d_vocab = -(-W_U.shape[0] // d_multiple) * d_multiple, W_U.shape[1]
    n_parts = 2 if narrow and precision == "bf16x3" else 1
    stored = torch.bfloat16 if narrow else W_U.dtype
    n_columns = max(128, n_bytes // (d_model * n_parts * stored.itemsize) // 128 * 128)
    n_columns = min(n_columns, -(-d_vocab // 128) * 128)
    if along == "d_model":
        stride = -(-d_model // 16) * 16
        buffer = torch.empty((n_parts, n_columns, stride), dtype=stored, device=W_U.device)[..., :d_model].mT
    else:
        buffer = torch.empty((n_parts, d_model, n_columns), dtype=stored, device=W_U.device)
    for first in range(0, d_vocab, n_columns):
        source = W_U[:, first : first + n_columns]
        part = buffer[:, :, : source.shape[1]]
        if n_parts == 2:
            split_bf16_(part[0, : len(source)], part[1, : len(source)], source)
        else:
            part[0, : len(source)].copy_(source)
        buffer[:, len(source) :] = 0.0
        buffer[:, :, source.shape[1] :] = 0.0
        yield Slab(first, part[0], part[1] if n_parts == 2 else None)
