"""``attribution_reduce`` in Triton: a program adds up the rows of a tile in registers, reading each input once.

Leading axes of any strides are merged into at most three; a tensor with more is taken slice by slice. Offsets are
int64: activations pass 2^31 elements.
"""
# Triton types the arguments of a kernel itself, at each call.
# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from fastinterp_kernels.triton_common import INTERPRETED, check_triton, launch_device

_N_AXES = 3
_LARGEST_BLOCK = 512
_TILE_ELEMENTS = 2**20 if INTERPRETED else 2**11  # an interpreted program costs a millisecond


@triton.jit
def _load(ptr, offsets, mask):
    tile = tl.load(ptr + offsets) if mask is None else tl.load(ptr + offsets, mask=mask, other=0.0)
    return tile.to(tl.float32)


@triton.jit
def _products(a_ptr, b_ptr, grad_ptr, a_offsets, b_offsets, grad_offsets, mask):
    a = _load(a_ptr, a_offsets, mask)
    if b_ptr is not None:
        a -= _load(b_ptr, b_offsets, mask)
    return a * _load(grad_ptr, grad_offsets, mask)


@triton.jit
def _row_offsets(rows, size_1, size_2, stride_0, stride_1, stride_2):
    """Offsets of rows that are numbered over axes of sizes ``(_, size_1, size_2)``."""
    return (rows // size_2 // size_1) * stride_0 + (rows // size_2 % size_1) * stride_1 + (rows % size_2) * stride_2


@triton.jit
def attribution_reduce_kernel(
    a_ptr, b_ptr, grad_ptr, out_ptr, n_rows, d, size_1, size_2,
    a_0, a_1, a_2, a_d, b_0, b_1, b_2, b_d, grad_0, grad_1, grad_2, grad_d,
    BLOCK_ROW: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum of ``(a - b) * grad`` for a tile of rows; strides by axis of the merged shape."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROW + tl.arange(0, BLOCK_ROW)
    # Rows beyond the last read the last one again and are not stored: cheaper than a mask on every load.
    read_rows = tl.minimum(rows, n_rows - 1)
    steps = tl.arange(0, BLOCK_D).to(tl.int64)
    a_offsets = _row_offsets(read_rows, size_1, size_2, a_0, a_1, a_2)[:, None] + steps[None, :] * a_d
    b_offsets = a_offsets
    if b_ptr is not None:
        b_offsets = _row_offsets(read_rows, size_1, size_2, b_0, b_1, b_2)[:, None] + steps[None, :] * b_d
    grad_offsets = _row_offsets(read_rows, size_1, size_2, grad_0, grad_1, grad_2)[:, None] + steps[None, :] * grad_d
    total = tl.zeros((BLOCK_ROW, BLOCK_D), dtype=tl.float32)
    n_whole = d // BLOCK_D * BLOCK_D
    for start in range(0, n_whole, BLOCK_D):
        step = tl.cast(start, tl.int64)
        total += _products(
            a_ptr, b_ptr, grad_ptr, a_offsets + step * a_d, b_offsets + step * b_d, grad_offsets + step * grad_d, None
        )
    if n_whole < d:
        step = tl.cast(n_whole, tl.int64)
        mask = tl.broadcast_to(steps[None, :] < d - n_whole, (BLOCK_ROW, BLOCK_D))
        total += _products(
            a_ptr, b_ptr, grad_ptr, a_offsets + step * a_d, b_offsets + step * b_d, grad_offsets + step * grad_d, mask
        )
    tl.store(out_ptr + rows, tl.sum(total, axis=1), mask=rows < n_rows)


def attribution_reduce_triton(
    a: Float[Tensor, "*lead d"], b: Float[Tensor, "*#lead d"] | None, grad: Float[Tensor, "*lead d"]
) -> Float[Tensor, "*lead"]:
    """``attribution_reduce`` on a CUDA device, float32. Memory beyond inputs and output: none.

    Raises ``ValueError`` for tensors that are not on a CUDA device (unless Python started with
    ``TRITON_INTERPRET=1``) and for float64.
    """
    check_triton(*(a, grad) if b is None else (a, b, grad))
    out = torch.empty(a.shape[:-1], dtype=torch.float32, device=a.device)
    if a.numel() == 0:
        return out.zero_()
    with launch_device(a):
        _launch(a, None if b is None else b.expand(a.shape), grad, out)
    return out


def _launch(a: Tensor, b: Tensor | None, grad: Tensor, out: Tensor) -> None:
    tensors = [a, grad, out.unsqueeze(-1)] if b is None else [a, grad, out.unsqueeze(-1), b]
    sizes, strides = merged_axes(tuple(out.shape), [tensor.stride()[:-1] for tensor in tensors])
    if len(sizes) > _N_AXES:
        for i in range(a.shape[0]):
            _launch(a[i], None if b is None else b[i], grad[i], out[i])
        return
    missing = _N_AXES - len(sizes)
    sizes = (1,) * missing + sizes
    of_a, of_grad, _, *of_b = ((0,) * missing + axes for axes in strides)
    d = a.shape[-1]
    block_d = min(_LARGEST_BLOCK, d & -d)
    if block_d < 64:  # no power of two divides it well: whole blocks and a masked rest
        block_d = min(_LARGEST_BLOCK, triton.next_power_of_2(d) if d < 64 else triton.next_power_of_2(d + 1) // 2)
    block_row = max(1, _TILE_ELEMENTS // block_d)
    attribution_reduce_kernel[(triton.cdiv(out.numel(), block_row),)](
        a, b, grad, out, out.numel(), d, sizes[1], sizes[2],
        *of_a, a.stride(-1), *(of_b[0] if b is not None else (0, 0, 0)), 0 if b is None else b.stride(-1),
        *of_grad, grad.stride(-1),
        BLOCK_ROW=block_row, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip


def merged_axes(
    sizes: tuple[int, ...], strides: Sequence[tuple[int, ...]]
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The fewest axes that number the same elements in the same order, and the strides of every tensor over them."""
    merged: list[int] = []
    kept: list[list[int]] = [[] for _ in strides]
    for axis, size in enumerate(sizes):
        if size == 1:
            continue
        here = [of_tensor[axis] for of_tensor in strides]
        if merged and all(before[-1] == stride * size for before, stride in zip(kept, here)):
            merged[-1] *= size
            for before, stride in zip(kept, here):
                before[-1] = stride
        else:
            merged.append(size)
            for before, stride in zip(kept, here):
                before.append(stride)
    return tuple(merged), [tuple(of_tensor) for of_tensor in kept]
